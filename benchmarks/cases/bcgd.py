"""One optimizer step over the weights of a ResNet-18, gradients given."""

import torch
from harness import Contender, Problem, require
from torchqat.optim import BCGD

OPS = ("bcgd_step_",)

BITS = (1, 2, 4, 8)
MOMENTUM = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}


def resnet18():
    """Shapes of the convolutions and the linear layer: 11.7 M weights."""
    shapes = [(64, 3, 7, 7)] + [(64, 64, 3, 3)] * 4
    for width in (128, 256, 512):
        half = width // 2
        shapes += [(width, half, 3, 3), (width, width, 3, 3), (width, half, 1, 1)] + [
            (width, width, 3, 3)
        ] * 2
    return [*shapes, (1000, 512)]


def problems(device, quick):
    shapes = resnet18()[:5] if quick else resnet18()
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    title = f"ResNet-18, {elements / 1e6:.1f} M float32"
    bytes_moved = 24 * elements  # gradient, momentum and latent in; momentum, latent and weight out
    found = [Problem(title, elements, contenders(shapes, device), bytes_moved)]
    for name, draw in HARD_WEIGHTS.items():
        own = [*our_contenders(shapes, device, draw), fused_sgd(shapes, device)]
        found.append(Problem(f"{title}, {name}", elements, own, bytes_moved))
    return found


def our_contenders(shapes, device, draw=torch.randn):
    return [
        Contender(f"torchqat BCGD, {bits} bits", lambda b=bits: ours(shapes, device, b, draw))
        for bits in BITS
    ]


def fused_sgd(shapes, device):
    return Contender("torch SGD fused", lambda: sgd(shapes, device, {"fused": True}))


def contenders(shapes, device):
    found = [*our_contenders(shapes, device), fused_sgd(shapes, device)]
    for name, options in {
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
    }.items():
        found.append(Contender(f"torch SGD {name}", lambda o=options: sgd(shapes, device, o)))
    for name, (quantizer, bits) in PARQ.items():
        found.append(
            Contender(f"torchao PARQ {name}", lambda q=quantizer, b=bits: parq(shapes, device, q, b))
        )
    return found


PARQ = {
    "least squares, 1 bits": ("LSBQuantizer", 1),
    "uniform, ternary": ("TernaryUnifQuantizer", 0),
    "least squares, 2 bits": ("LSBQuantizer", 2),
    "uniform, 4 bits": ("UnifQuantizer", 4),
    "uniform, 8 bits": ("UnifQuantizer", 8),
}


def student_t(shape, device, generator):
    """Three degrees of freedom: heavy tails."""
    normal = torch.randn((4, *shape), device=device, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def clusters(shape, device, generator):
    """Around seven levels."""
    level = torch.randint(-3, 4, shape, device=device, generator=generator)
    return level + 0.05 * torch.randn(shape, device=device, generator=generator)


# Where the search for the ternary scale must look again.
HARD_WEIGHTS = {"Student t": student_t, "clusters": clusters}


def parameters(shapes, device, draw=torch.randn):
    """Weights of about He's size and small gradients: a step moves a weight as it would in training."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in shapes:
        std = (2 / torch.Size(shape[1:]).numel()) ** 0.5
        weight = torch.nn.Parameter(std * draw(shape, device=device, generator=generator))
        weight.grad = 1e-2 * torch.randn(shape, device=device, generator=generator)
        found.append(weight)
    return found


def ours(shapes, device, bits, draw=torch.randn):
    return BCGD([{"params": parameters(shapes, device, draw), "quant_bits": bits}], **MOMENTUM).step


def sgd(shapes, device, options):
    return torch.optim.SGD(parameters(shapes, device), **MOMENTUM, **options).step


def parq(shapes, device, quantizer, bits):
    """The hard map with its levels renewed every step, as our projection is."""
    module = require("torchao.prototype.parq")
    base = torch.optim.SGD([{"params": parameters(shapes, device), "quant_bits": bits}], **MOMENTUM)
    return module.QuantOptimizer(
        base, getattr(module, quantizer)(), module.ProxHardQuant(), quant_period=1
    ).step
