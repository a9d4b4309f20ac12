"""How the time of a call grows: with elements, channels, number of tensors, pixels, and threads. A curve for
each, the sizes on it a problem each; contenders are those of the operators' own cases."""

import os
from dataclasses import replace

import torch
import torchqat.functional as F
from harness import Contender, Curve, Problem, renewable

from cases import bcgd, feature_affinity, quantize_weight, staircase_relu

OPS = ()

BITS, TOP, STEP = staircase_relu.BITS, staircase_relu.TOP, staircase_relu.STEP


def problems(device, quick):
    """One after another: their inputs are large."""
    curves = [forward, forward_and_backward, channels, tensors, pixels]
    for curve in curves if device == "cuda" else [*curves, threads]:
        yield from curve(device, quick)


def powers(least, most, factor):
    """From 2^least to 2^most by factors of 2^factor."""
    return [2**exponent for exponent in range(least, most + 1, factor)]


def elements(device, quick):
    return powers(4, 12, 8) if quick else powers(4, 28 if device == "cuda" else 26, 2)


def on_curve(problem, title, axis, at, names=None):
    """The problem as a point of a curve; `names` says which of its contenders take part."""
    chosen = [c for c in problem.contenders if (c.name in names if names else not c.compiles)]
    return replace(problem, name=f"{title}, {at} {axis}", contenders=chosen, curve=Curve(title, axis, at))


def forward(device, quick):
    for n in elements(device, quick):
        yield on_curve(without_gradient(n, device), "staircase_relu without gradient", "elements", n)


@renewable
def without_gradient(n, device):
    x, alpha = torch.randn(n, device=device), torch.tensor(STEP, device=device)
    calls = {
        "torchqat": lambda: F.staircase_relu(x, alpha, BITS),
        "torch.relu": lambda: torch.relu(x),
        "fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, STEP, 0, 0, TOP),
    }
    makers = [Contender(name, lambda call=call: call) for name, call in calls.items()]
    return Problem("", n, makers, floor_bytes=8 * n)


def forward_and_backward(device, quick):
    names = ("torchqat", "torch.relu", "fake_quantize_per_tensor_affine")
    for n in elements(device, quick):
        problem = staircase_relu.problem("", (n,), torch.float32, device)
        yield on_curve(problem, "staircase_relu, forward and backward", "elements", n, names)


def channels(device, quick):
    """A step size for each channel, of 4 M elements."""
    names = ("torchqat", "torchqat, per channel", "torch.relu", "fake_quantize_per_channel_affine")
    rest = 2 ** (8 if quick else 18)
    for count in powers(0, 4, 4) if quick else powers(0, 12, 2):
        shape = (16, count, 1, rest // count)
        problem = staircase_relu.problem("", shape, torch.float32, device)
        title = f"staircase_relu per channel, {16 * rest} elements, forward and backward"
        yield on_curve(problem, title, "channels", count, names)


def tensors(device, quick):
    """An optimizer step over 4 M weights in ever more tensors."""
    total = 2 ** (14 if quick else 22)
    for count in powers(0, 4, 4) if quick else powers(0, 10, 2):
        shapes = [(total // count // 16, 16)] * count
        names = [f"torchqat BCGD, {bits} bits" for bits in (1, 4)]
        names += ["torch SGD fused", "torch SGD foreach", "torchao PARQ least squares, 1 bits"]
        problem = Problem("", total, bcgd.contenders(shapes, device), floor_bytes=24 * total)
        yield on_curve(problem, f"BCGD step over {total} weights", "tensors", count, names)


def pixels(device, quick):
    gram = "eager Gram, float32 (loses all digits close to the teacher)"
    names = ("torchqat", f"torchqat fast, {feature_affinity.PROBES} probes", "eager, pixels by pixels", gram)
    for norm in ("l1", "fro"):
        for side in (8,) if quick else (8, 16, 32, 64):
            problem = feature_affinity.problem((4, 64, side, side), norm, device)
            yield on_curve(problem, f"feature affinity {norm}, 4 x 64 channels", "pixels", side**2, names)


def threads(device, quick):
    """Ours, and a float operator that does about as much, on ever more threads, whatever --threads says."""
    size, count = ((4, 8, 16, 16), 32) if quick else ((64, 64, 32, 32), 1200)
    weight = torch.randn(count, 512, 3, 3) * 0.03
    features = (2, 8, 16, 16) if quick else (8, 64, 32, 32)
    found = {
        "staircase_relu": staircase_relu.problem("", size, torch.float32, device),
        "BCGD": next(iter(bcgd.problems(device, quick))),
        "quantize_weight": quantize_weight.problem(weight, quantize_weight.ours(weight)),
        "feature affinity l1": feature_affinity.problem(features, "l1", device),
    }
    names = ("torchqat", "torch.relu", "torchqat BCGD, 1 bits", "torchqat BCGD, 4 bits", "torch SGD fused")
    names += ("torchqat exact, 1 bits", "torchqat exact, 2 bits", "torchqat exact, 4 bits")
    names += ("eager, pixels by pixels",)
    for title, problem in found.items():
        if problem.floor_flops:  # a product's rate was measured on --threads threads: no floor for others
            problem = replace(problem, floor_flops=0, floor_bytes=0)
        for n in [n for n in powers(0, 10, 1) if n <= os.cpu_count()]:
            yield replace(on_curve(problem, f"{title} by threads", "threads", n, names), threads=n)
