"""Projection of 11 M weights with one scale or one per output channel; of fewer where peers need minutes."""

import torch
import torchqat.functional as F
from harness import Contender, Problem, require
from peers import exact_by_sweeping, ternary_by_sorting

OPS = ("quantize_weight",)

BITS = (1, 2, 4, 8)


def problems(device, quick):
    generator = torch.Generator(device).manual_seed(0)
    channels = 32 if quick else 2400
    weight = torch.randn(channels, 512, 3, 3, device=device, generator=generator) * 0.03
    few = weight.flatten()[: 2**12 if quick else 2**17].clone()
    return [problem(weight, ours(weight) + peers(weight)), problem(few, slow_peers(few))]


def problem(weight, contenders):
    size = f"{weight.numel() / 1e6:.2g} M float32"
    return Problem(size, weight.numel(), contenders, floor_bytes=8 * weight.numel())


def ours(weight):
    tensor = [contender(weight, f"exact, {bits} bits", bits) for bits in BITS]
    channel = [contender(weight, f"exact per channel, {bits} bits", bits, channel_dim=0) for bits in BITS]
    lloyd = [contender(weight, f"lloyd, {bits} bits", bits, method="lloyd") for bits in BITS]
    return [*tensor, *channel, *lloyd, contender(weight, "twn, 2 bits", 2, method="twn")]


def contender(weight, name, bits, **options):
    return Contender(f"torchqat {name}", lambda: lambda: F.quantize_weight(weight, bits, **options))


def peers(weight):
    return [
        Contender("eager sort, 2 bits", lambda: lambda: ternary_by_sorting(weight)),
        Contender("torchao PARQ least squares, 1 bits", lambda: parq("LSBQuantizer", weight, 1)),
        Contender("torchao PARQ uniform, 4 bits", lambda: parq("UnifQuantizer", weight, 4)),
    ]


def parq(name, weight, bits, **options):
    quantizer = getattr(require("torchao.prototype.parq"), name)(**options)
    return lambda: quantizer.quantize(weight, bits)


def slow_peers(weight):
    """A sweep sorts 2^(bits-1) - 1 keys per weight; PARQ's ternary optimum takes some 35 us per weight."""
    found = []
    for bits in (2, 4):
        found.append(contender(weight, f"exact, {bits} bits", bits))
        found.append(
            Contender(f"eager sweep, {bits} bits", lambda b=bits: lambda: exact_by_sweeping(weight, b))
        )
    ternary = Contender(
        "torchao PARQ least squares, ternary", lambda: parq("LSBQuantizer", weight, 0, optimal=True)
    )
    return [*found, ternary]
