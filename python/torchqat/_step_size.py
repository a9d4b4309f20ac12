"""The step size of a ceil staircase that fits observed activations best; what `calibrate` is made of."""

import torch
from torch import Tensor

# A bin is the leading bits of a float32: its exponent, from 2^-30 to 2^30, and this much of its mantissa.
_LOW, _HIGH = 2.0**-30, 2.0**30
_MANTISSA_BITS, _MANTISSA_BITS_PER_CHANNEL = 11, 8
_COARSE, _FINE = 256, 65


class Histogram:
    """Counts the positive values of each channel, in memory that does not grow with the data.

    Bins are 0.05 % wide, 0.4 % where there are several channels.
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.shift = 23 - (_MANTISSA_BITS if channels == 1 else _MANTISSA_BITS_PER_CHANNEL)
        self.first, last = (torch.tensor([_LOW, _HIGH]).view(torch.int32) >> self.shift).tolist()
        self.counts = torch.zeros(channels, last - self.first + 1, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Adds the positive elements of `x`; its dimension 1 is the channel where there are several."""
        x = x.detach().to(torch.float32)
        bins = self.counts.shape[1]
        index = (x.clamp(_LOW, _HIGH).contiguous().view(torch.int32) >> self.shift) - self.first
        if self.channels > 1:
            channel = torch.arange(self.channels, device=x.device).view(-1, *[1] * (x.dim() - 2))
            index = index + channel * bins
        counts = torch.bincount(index[x > 0], minlength=self.channels * bins)
        self.counts += counts.view(self.channels, bins).to(self.counts.device)

    def best_steps(self, bits: int) -> list[float | None]:
        """For each channel the step size with the least squared error; None where nothing was positive."""
        return [self._best_step(counts, 2**bits - 1) for counts in self.counts]

    def _best_step(self, counts: Tensor, top: int) -> float | None:
        used = counts.nonzero().squeeze(1)
        if len(used) == 0:
            return None
        lower, upper = (
            ((used + self.first + i) << self.shift).int().view(torch.float32).double() for i in (0, 1)
        )
        sample = _Sample(lower, upper, counts[used].double())
        # Below mean / (2 top) the error only falls as the step grows, above the largest value it only grows.
        ends = torch.stack([sample.sum[-1] / sample.count[-1] / (2 * top), upper[-1]]).log2().tolist()
        steps = torch.logspace(*ends, _COARSE, 2.0, dtype=torch.float64)
        best = int(sample.errors(steps, top).argmin())
        low, high = float(steps[max(best - 1, 0)]), float(steps[min(best + 1, _COARSE - 1)])
        steps = torch.linspace(low, high, _FINE, dtype=torch.float64)
        return float(steps[sample.errors(steps, top).argmin()])


class _Sample:
    """Weighted bins, each taken as uniform between its edges."""

    def __init__(self, lower: Tensor, upper: Tensor, weight: Tensor):
        self.lower, self.upper, self.weight = lower, upper, weight
        self.count = weight.cumsum(0)
        self.sum = (weight * (lower + upper) / 2).cumsum(0)

    def up_to(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """How many values are at most `bound`, and their sum."""
        i = torch.searchsorted(self.upper, bound).clamp(max=len(self.upper) - 1)
        inside = bound.clamp(self.lower[i], self.upper[i])
        missing = self.weight[i] * (self.upper[i] - inside) / (self.upper[i] - self.lower[i])
        return self.count[i] - missing, self.sum[i] - missing * (self.upper[i] + inside) / 2

    def errors(self, steps: Tensor, top: int) -> Tensor:
        """The squared error of the staircase of each step size, less the sum of squares."""
        k = torch.arange(1, top, dtype=torch.float64)
        count, sum = self.up_to(steps[:, None] * k)
        inner = top * self.sum[-1] - sum.sum(1)  # sum of level * x
        square = top**2 * self.count[-1] - (count * (2 * k + 1)).sum(1)  # sum of level^2
        return steps.square() * square - 2 * steps * inner
