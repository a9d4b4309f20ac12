"""The distillation losses forward and backward, against matrices of pixels by pixels and of channels by
channels in plain torch, and against the similarity loss that distillation libraries offer."""

import torch
from harness import Contender, Problem, renewable
from peers import affinity_by_channels, affinity_by_pixels, similarity
from torchqat.functional import fast_feature_affinity_loss, feature_affinity_loss

OPS = ("feature_affinity_loss", "fast_feature_affinity_loss")

PROBES = 15
SIZES = [(8, 64, 32, 32), (8, 64, 56, 56), (100, 16, 32, 32), (100, 32, 16, 16), (100, 64, 8, 8)]
QUICK_SIZES = [(2, 8, 16, 16)]


def problems(device, quick):
    sizes = QUICK_SIZES if quick else SIZES
    return [problem(size, norm, device) for size in sizes for norm in ("l1", "fro")]


@renewable
def problem(size, norm, device):
    """The floor is the float32 products of the cheapest exact form, the symmetric ones by half."""
    batch, channels, height, width = size
    pixels = height * width
    by_pixels = 4 * pixels * pixels * channels  # half of A'A and B'B, AS
    by_channels = 2 * pixels * channels * channels * 4  # half of AA' and BB', AB', (AA')A, (AB')B
    flops = by_pixels if norm == "l1" else min(by_pixels, by_channels)
    student = torch.randn(size, device=device).requires_grad_()
    return Problem(
        name=f"{norm}, {'x'.join(map(str, size))} float32",
        elements=2 * student.numel(),  # of student and teacher
        contenders=contenders(student, torch.randn(size, device=device), norm),
        floor_bytes=3 * student.numel() * 4,  # both in, the gradient out
        floor_flops=batch * flops,
        saves=True,
    )


def contenders(student, teacher, norm):
    probes = torch.randn(student[0, 0].numel(), PROBES, device=student.device)
    found = {
        "torchqat": lambda: feature_affinity_loss(student, teacher, norm=norm),
        f"torchqat fast, {PROBES} probes": lambda: fast_feature_affinity_loss(
            student, teacher, probes, norm=norm
        ),
        "eager, pixels by pixels": lambda: affinity_by_pixels(student, teacher, norm),
    }
    if norm == "fro":
        found["eager Gram, float32 (loses all digits close to the teacher)"] = lambda: affinity_by_channels(
            student, teacher
        )
        found["eager similarity of images, for scale"] = lambda: similarity(student, teacher)
    makers = [Contender(name, lambda f=loss: step(f, student)) for name, loss in found.items()]
    makers.append(
        Contender("torch.compile, pixels by pixels", lambda: compiled(student, teacher, norm), compiles=True)
    )
    return makers


def compiled(student, teacher, norm):
    loss = torch.compile(affinity_by_pixels, fullgraph=True)
    return step(lambda: loss(student, teacher, norm), student)


def step(loss, student):
    """A call that runs forward and its backward pass."""
    return lambda: torch.autograd.grad(loss(), student)
