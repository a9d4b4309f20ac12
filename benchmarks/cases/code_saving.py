"""A training step of whole networks, forward and backward: what is kept between them, its time and its peak.
Bytes are per element of the outputs of the ReLUs; the network's weights do not count."""

import torch
from harness import Contender, Problem
from networks import brevitas_network, checkpointed, floats, network, ours, torch_network, torchao_network
from torch import nn
from torch.nn import functional as F

OPS = ()

SIZES = [("resnet20", 32, 128), ("resnet18", 32, 16), ("resnet18", 224, 4)]
QUICK_SIZES = [("resnet20", 16, 2)]


def problems(device, quick):
    sizes = QUICK_SIZES if quick else SIZES
    return [problem(*size, bits, device) for size in sizes for bits in (2, 4)]


def problem(name, size, batch, bits, device):
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.arange(batch, device=device) % 10
    elements, flops = counted(network(name, size).to(device), images)
    return Problem(
        name=f"{name}, {batch}x3x{size}x{size}, activations of {bits} bits",
        elements=elements,
        contenders=contenders(name, size, images, labels, bits, device),
        floor_bytes=0,
        floor_flops=3 * flops,  # forward, and backward in input and weights
        saves=True,
        least_rounds=15,
    )


def contenders(name, size, images, labels, bits, device):
    found = {
        "float, ReLU in place": floats,
        "torchqat": lambda model: ours(model, bits),
        "torchqat, recompute": lambda model: ours(model, bits, recompute=True),
        "torchqat without codes": lambda model: ours(model, bits, save_codes=False),
        "float, torch.utils.checkpoint": checkpointed,
        "brevitas": lambda model: brevitas_network(model, bits),
        "torch fake quantization": lambda model: torch_network(model, bits),
        "torchao fake quantization, 8 bits": lambda model: torchao_network(model, bits),
    }
    return [
        Contender(who, lambda make=make: Step(make(network(name, size)).to(device), images, labels))
        for who, make in found.items()
    ]


class Step:
    """A call that runs forward and backward; `weights` are not what is counted."""

    def __init__(self, model, images, labels):
        self.model, self.images, self.labels = model, images, labels
        self.weights = [*model.parameters(), *model.buffers()]

    def __call__(self):
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.model.zero_grad()  # a call begins without gradients, so that they are part of its peak


def counted(model, images):
    """Elements of the outputs of ReLUs, and flops of the convolutions' forward passes."""
    elements, flops = [], []

    def see(module, inputs, output):
        if isinstance(module, nn.ReLU):
            elements.append(output.numel())
        elif isinstance(module, nn.Conv2d):
            flops.append(2 * output.numel() * module.weight[0].numel())

    for module in model.modules():
        module.register_forward_hook(see)
    with torch.no_grad():
        model(images)
    return sum(elements), sum(flops)
