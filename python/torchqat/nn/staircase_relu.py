"""The activation of a quantized network as a module."""

import math
from typing import Any

import torch
from torch import Tensor

from torchqat import functional as F
from torchqat._bits import check_bits

# Step sizes with the least mean squared error for half-Gaussian input max(z, 0), z ~ N(0, 1) (tests recompute
# them).
OPTIMAL_ALPHA = {
    1: 0.797885,
    2: 0.486570,
    3: 0.289310,
    4: 0.166641,
    5: 0.0938287,
    6: 0.0519708,
    7: 0.0284185,
    8: 0.0153773,
}
# The values that BCGD's authors start from; optimal for a round-to-nearest staircase rather than for this
# one.
PAPERS_ALPHA = {1: 1.2221, 2: 0.6511, 4: 0.1946}


class StaircaseReLU(torch.nn.Module):
    r"""The staircase ReLU with its own learnable step size: :func:`torchqat.functional.staircase_relu` as a
    module.

    Args:
        bits: width of the activation codes, 1 to 8.
        ste: straight-through estimator of the backward pass, one of :func:`torchqat.functional.ste_names`.
        alpha_grad: rule for the gradient of the step size: ``exact``, ``three_valued``, ``min`` or ``pact``.
        channels: ``None`` for one step size, or the size of dimension 1 of the input for one per channel.
        alpha_init: ``"optimal"``: the step size of least mean squared error where the input is standard
            normal, as after batch normalization; ``"papers"``: what BCGD's authors start from (bits 1, 2 and
            4); or a number. :func:`torchqat.calibrate` sets it from data.
        alpha_grad_scale: what the gradient of ``alpha`` is multiplied by.
        alpha_grad_clip: what it is then clamped to, ``[-alpha_grad_clip, alpha_grad_clip]``; ``inf`` for no
            bound. The module cannot know of a factor on the loss: with a gradient scaler give ``inf`` (and
            clip after ``unscale_``), or the bound times the scaler's factor, else alpha hardly moves.
        alpha_min: the least step size that forward uses. The bound passes the gradient, and forward never
            writes ``alpha``. :class:`torchqat.optim.BCGD` clamps the parameter itself after its step, in
            groups of :func:`torchqat.optim.param_groups` (``min_value``); under another optimizer, or in
            other groups, the parameter may wander below, where forward goes on with ``alpha_min``.
        save_codes: keep the packed codes for backward, which :class:`QuantConv2d` and its like share: 2 bits
            an element with 1 bit, 4 with 2 and 3, 8 with 4 to 7, 16 with 8. ``False`` keeps 2 bits, for
            layers that keep their own input (the rule ``exact`` needs the codes all the same).
            :func:`torchqat.prepare` sets it where it pays.

    Shape:
        any; with ``channels`` dimension 1 must have that size. The result has the input's shape and dtype.

    Attributes:
        alpha: the step size, a parameter of shape ``[]`` or ``[channels]``, in the units of the input;
            float32 unless the module is converted. Keep it float32 beside half-precision activations: its
            small updates need it.

    A ``state_dict`` remembers ``bits``, ``ste`` and ``alpha_grad`` in its metadata, which ``torch.save``
    keeps: ``load_state_dict`` into a model with others raises, ``strict`` or not. What holds tensors alone
    forgets it, such as ``dict(state_dict)``: then nothing is compared. :func:`torchqat.save_checkpoint`
    writes it into its file.

    Raises:
        TypeError: ``bits`` is no int.
        ValueError: an option is out of range or unknown.

    Example:
        >>> import torchqat
        >>> act = torchqat.nn.StaircaseReLU(bits=2, alpha_init=0.5)
        >>> act(torch.tensor([-1.0, 0.2, 0.6, 9.0])).detach()
        tensor([0.0000, 0.5000, 1.0000, 1.5000])

    Source: Yin, Zhang, Lyu, Osher, Qi, Xin, "Blended coarse gradient descent for full quantization of deep
    neural networks" (2019), section 2; the defaults of ``alpha_grad_scale``, ``alpha_grad_clip`` and
    ``alpha_min`` are the authors'.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        ste: str = "clipped_relu",
        alpha_grad: str = "three_valued",
        channels: int | None = None,
        alpha_init: str | float = "optimal",
        alpha_grad_scale: float = 0.01,
        alpha_grad_clip: float = 1.0,
        alpha_min: float = 1e-3,
        save_codes: bool = True,
    ):
        super().__init__()
        check_bits("StaircaseReLU: bits", bits)
        if channels is not None and channels < 1:
            raise ValueError(f"StaircaseReLU: channels must be None or at least 1, got {channels}")
        if not alpha_grad_clip > 0:
            raise ValueError(f"StaircaseReLU: alpha_grad_clip must be > 0, got {alpha_grad_clip}")
        if not (alpha_min > 0 and math.isfinite(alpha_min)):
            raise ValueError(f"StaircaseReLU: alpha_min must be a finite number > 0, got {alpha_min}")
        if not math.isfinite(alpha_grad_scale):
            raise ValueError(f"StaircaseReLU: alpha_grad_scale must be finite, got {alpha_grad_scale}")
        self.bits = bits
        self.ste = ste
        self.alpha_grad = alpha_grad
        self.channels = channels
        self.alpha_grad_scale = alpha_grad_scale
        self.alpha_grad_clip = alpha_grad_clip
        self.alpha_min = alpha_min
        self.save_codes = save_codes
        # The operator knows what its options may be: ask it rather than keep a second list.
        F.staircase_relu(torch.empty(0), torch.tensor(1.0), bits, ste=ste, alpha_grad=alpha_grad)
        start = max(self._initial_alpha(alpha_init), alpha_min)
        self.alpha = torch.nn.Parameter(torch.full(() if channels is None else (channels,), start))

    def _initial_alpha(self, alpha_init: str | float) -> float:
        tables = {"optimal": OPTIMAL_ALPHA, "papers": PAPERS_ALPHA}
        if isinstance(alpha_init, str):
            if alpha_init not in tables:
                raise ValueError(
                    f"StaircaseReLU: alpha_init must be 'optimal', 'papers' or a number, got {alpha_init!r}"
                )
            if self.bits not in tables[alpha_init]:
                raise ValueError(
                    f"StaircaseReLU: the papers give no alpha_init for {self.bits} bits, only for 1, 2, 4"
                )
            return tables[alpha_init][self.bits]
        if not (alpha_init > 0 and math.isfinite(alpha_init)):
            raise ValueError(f"StaircaseReLU: alpha_init must be a finite number > 0, got {alpha_init}")
        return float(alpha_init)

    def step_size(self) -> Tensor:
        """What forward uses: ``alpha``, not less than ``alpha_min``, with its gradient scaled and clipped."""
        return torch.ops.qat._bounded_alpha(
            self.alpha, self.alpha_min, self.alpha_grad_scale, self.alpha_grad_clip
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.staircase_relu(
            x,
            self.step_size(),
            self.bits,
            ste=self.ste,
            alpha_grad=self.alpha_grad,
            save_codes=self.save_codes,
        )

    def settings(self) -> dict[str, Any]:
        """What a state must have been trained with to fit: ``bits``, ``ste`` and ``alpha_grad``."""
        return {"bits": self.bits, "ste": self.ste, "alpha_grad": self.alpha_grad}

    def extra_repr(self) -> str:
        channels = "" if self.channels is None else f", channels={self.channels}"
        return as_arguments(self.settings()) + channels

    # The settings travel in the metadata of a state_dict, where torch keeps its version numbers: the tensors
    # of a state, their names and their files stay what they would be without.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["staircase_relu"] = self.settings()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        ours, saved = self.settings(), local_metadata.get("staircase_relu")
        if saved is not None and saved != ours:
            error_msgs.append(
                f"StaircaseReLU {prefix[:-1]!r}: the state must be of {as_arguments(ours)}, "
                f"got {as_arguments(saved)}; dict(state_dict) is loaded without this check."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def as_arguments(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
