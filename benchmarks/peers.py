"""The activations and weight quantizers that ours are measured against, written as their users would."""

import torch


def lsq(x, alpha, bits):
    """Learned step size quantization in plain torch operators, rounding passed straight through by detach."""
    scaled = (x / alpha).clamp(0, 2**bits - 1)
    return ((scaled.round() - scaled).detach() + scaled) * alpha


class EagerStaircase(torch.autograd.Function):
    """Our default staircase as most papers' code has it: a Python Function that saves x."""

    @staticmethod
    def forward(ctx, x, alpha, bits):
        ctx.save_for_backward(x, alpha)
        ctx.top = 2**bits - 1
        return alpha * torch.ceil(x / alpha).clamp(0, ctx.top)

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        above = x > ctx.top * alpha
        inside = (x > 0) & ~above
        grad_alpha = (grad * (inside * ((ctx.top + 1) / 2) + above * ctx.top)).sum()
        return grad * inside, grad_alpha.reshape(alpha.shape), None


def ternary_by_sorting(weight):
    """The least-squares ternary projection: sort |w|, take the prefix of largest (sum)^2 / length."""
    magnitude = weight.abs().flatten()
    ordered = magnitude.sort(descending=True).values
    sums = ordered.cumsum(0, dtype=torch.float64)
    counts = torch.arange(1, len(ordered) + 1, device=weight.device)
    best = (sums.square() / counts).argmax()
    scale = (sums[best] / counts[best]).to(weight.dtype)
    return torch.where(weight.abs() >= ordered[best], weight.sign(), 0) * scale, scale


def exact_by_sweeping(weight, bits):
    """The least-squares projection for any bits: breakpoints |w| / (j - 1/2) sorted, and the best prefix."""
    magnitude = weight.abs().flatten().double()
    steps = torch.arange(1, 2 ** (bits - 1), dtype=torch.float64, device=weight.device)
    order = (magnitude[:, None] / (steps - 0.5)).flatten().sort(descending=True).indices
    products = magnitude[order // len(steps)].cumsum(0)
    squares = (2 * steps - 1)[order % len(steps)].cumsum(0)
    best = (products.square() / squares).argmax()
    scale = (products[best] / squares[best]).to(weight.dtype)
    return torch.ceil(weight.abs() / scale - 0.5).clamp(0, len(steps)) * weight.sign() * scale, scale
