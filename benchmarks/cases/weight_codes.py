"""Integer levels of weights, against the same in eager torch, plain and compiled."""

import torch
import torchqat.functional as F
from harness import Contender, Problem, renewable

OPS = ("weight_codes",)

BITS = 4


def eager(weight, scale):
    return (torch.ceil(weight.abs() / scale - 0.5).clamp(0, 2 ** (BITS - 1) - 1) * weight.sign()).to(
        torch.int8
    )


def problems(device, quick):
    counts = [64 if quick else 2400] + ([15000] if device == "cuda" and not quick else [])
    return [problem((count, 512, 3, 3), device) for count in counts]


@renewable
def problem(shape, device):
    weight = torch.randn(shape, device=device)
    _, scale = F.quantize_weight(weight, BITS)
    makers = [
        Contender("torchqat", lambda: lambda: F.weight_codes(weight, scale, BITS)),
        Contender("eager abs, ceil, clamp, cast", lambda: lambda: eager(weight, scale)),
        Contender("torch.compile of it", lambda: compiled(weight, scale), compiles=True),
    ]
    size = f"{weight.numel() / 1e6:.1f} M float32"
    return Problem(size, weight.numel(), makers, floor_bytes=5 * weight.numel())


def compiled(weight, scale):
    function = torch.compile(eager, fullgraph=True)
    return lambda: function(weight, scale)
