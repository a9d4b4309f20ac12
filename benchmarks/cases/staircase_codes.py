"""Step indices of an activation, against the same in eager torch, plain and compiled."""

import torch
import torchqat.functional as F
from harness import Contender, Problem, renewable

OPS = ("staircase_codes",)

BITS = 4


def eager(x, alpha):
    return torch.ceil(x / alpha).clamp(0, 2**BITS - 1).to(torch.uint8)


def problems(device, quick):
    sizes = [(4 if quick else 64, 64, 32, 32)] + (
        [(64, 256, 64, 64)] if device == "cuda" and not quick else []
    )
    return [problem(size, device) for size in sizes]


@renewable
def problem(shape, device):
    x = torch.randn(shape, device=device)
    alpha = torch.tensor(0.1, device=device)
    makers = [
        Contender("torchqat", lambda: lambda: F.staircase_codes(x, alpha, BITS)),
        Contender("eager ceil, clamp, cast", lambda: lambda: eager(x, alpha)),
        Contender("torch.compile of it", lambda: compiled(x, alpha), compiles=True),
    ]
    return Problem(f"{'x'.join(map(str, shape))} float32", x.numel(), makers, floor_bytes=5 * x.numel())


def compiled(x, alpha):
    function = torch.compile(eager, fullgraph=True)
    return lambda: function(x, alpha)
