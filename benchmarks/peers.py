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


class BinaryWeight(torch.autograd.Function):
    """The least-squares binary weights, mean |w| times the sign, passed straight through in backward."""

    @staticmethod
    def forward(ctx, weight):
        return torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean()

    @staticmethod
    def backward(ctx, grad):
        return grad


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


def unit_columns(features):
    columns = features.flatten(2)
    return columns / (columns.norm(dim=1, keepdim=True) + 1e-5)


def affinity_by_pixels(student, teacher, norm):
    """Feature affinity as its authors have it: by matrices of pixels by pixels, diagonals included."""
    a, b = unit_columns(student), unit_columns(teacher)
    s = a.mT @ a - b.mT @ b
    return (s.abs() if norm == "l1" else s.square()).sum((1, 2)).mean() / s.shape[-1] ** 2


def affinity_by_channels(student, teacher):
    """Its squared Frobenius norm by Gram matrices of the channels: float32 loses a small difference."""
    a, b = unit_columns(student), unit_columns(teacher)
    squares = [(u @ v.mT).square().sum((1, 2)) for u, v in ((a, a), (b, b), (a, b))]
    return (squares[0] + squares[1] - 2 * squares[2]).mean() / a.shape[-1] ** 2


def similarity(student, teacher):
    """Similarity-preserving distillation (Tung, Mori 2019): which images of the batch are alike."""
    grams = [torch.nn.functional.normalize(f.flatten(1) @ f.flatten(1).mT) for f in (student, teacher)]
    return (grams[0] - grams[1]).square().sum() / len(student) ** 2
