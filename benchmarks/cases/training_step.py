"""Whole training steps of whole networks: forward, loss, backward, optimizer step, gradients let go.

W1A4 are binary weights, those of the first and the last layer too (what `param_groups` does if not told
otherwise), and 4-bit activations. Libraries that cannot train these bits train the nearest that their
quantizers have, which their names say. Weights and images of a step are as warm in caches as a training loop
has them: a step of such networks goes through far more memory than caches hold."""

import torch
from harness import Contender, Problem, require
from networks import (
    brevitas_network,
    floats,
    hand_written_activations,
    hand_written_network,
    network,
    ours,
    torch_network,
    torchao_network,
)
from torch import nn
from torch.nn import functional as F
from torchqat.optim import BCGD, param_groups

from cases.code_saving import counted

OPS = ()

BITS = 4
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SIZES = [("resnet20", 32, 32), ("resnet20", 32, 128), ("resnet18", 224, 4)]
QUICK_SIZES = [("resnet20", 16, 2)]
FLOAT, OURS = "float, fused SGD", "torchqat BCGD, W1A4"


def problems(device, quick):
    """One after another: networks share code, and torch.compile keeps few versions of it."""
    larger = [("resnet18", 224, 64)] if device == "cuda" else []
    for size in QUICK_SIZES if quick else SIZES + larger:
        torch.compiler.reset()
        yield problem(*size, device)


def problem(name, size, batch, device):
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.arange(batch, device=device) % 10
    elements, flops = counted(network(name, size).to(device), images)
    return Problem(
        name=f"{name}, {batch}x3x{size}x{size}",
        elements=elements,  # of the outputs of ReLUs
        contenders=contenders(name, size, images, labels),
        floor_bytes=0,
        floor_flops=3 * flops,  # forward, and backward in input and weights
        saves=True,
        least_rounds=15,
        beside=(FLOAT, OURS),
    )


def contenders(name, size, images, labels):
    def contender(who, quantize, optimizer, compiles=False):
        def make():
            model = quantize(network(name, size)).to(images.device)
            called = torch.compile(model, fullgraph=True) if compiles else model
            return Step(called, optimizer(model), images, labels)

        return Contender(who, make, compiles)

    def by_hand(model):
        return hand_written_network(model, BITS)

    def prepared(model):
        return ours(model, BITS)

    return [
        contender(FLOAT, floats, fused_sgd),
        contender(OURS, prepared, bcgd),
        contender("torchqat BCGD, recompute, W1A4", lambda model: ours(model, BITS, recompute=True), bcgd),
        contender("brevitas, W1A4", lambda model: brevitas_network(model, BITS), fused_sgd),
        contender(
            "torchao PARQ least squares, eager staircase, W1A4",
            lambda model: hand_written_activations(model, BITS),
            parq,
        ),
        contender("eager autograd.Functions, W1A4", by_hand, fused_sgd),
        contender("torch fake quantization, other bits: W8A4", lambda m: torch_network(m, BITS), fused_sgd),
        contender(
            "torchao fake quantization, other bits: W4A8", lambda m: torchao_network(m, BITS), fused_sgd
        ),
        contender("torch.compile of eager autograd.Functions, W1A4", by_hand, fused_sgd, compiles=True),
        contender("torchqat BCGD, torch.compile of the network, W1A4", prepared, bcgd, compiles=True),
        contender("torch.compile of float", floats, fused_sgd, compiles=True),
    ]


def fused_sgd(model):
    return torch.optim.SGD(model.parameters(), **SGD, fused=True)


def bcgd(model):
    return BCGD(param_groups(model, 1), **SGD)


def parq(model):
    """Its least-squares quantizer with the hard map, levels renewed as often as it does by default."""
    module = require("torchao.prototype.parq")
    weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    kept = {id(weight) for weight in weights}
    others = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    base = torch.optim.SGD([{"params": weights, "quant_bits": 1}, {"params": others}], **SGD, fused=True)
    return module.QuantOptimizer(base, module.LSBQuantizer(), module.ProxHardQuant())


class Step:
    """A call that trains one step; gradients are let go at its end, so that they are part of its peak."""

    def __init__(self, model, optimizer, images, labels):
        self.model, self.optimizer, self.images, self.labels = model, optimizer, images, labels

    @property
    def weights(self):
        """What is there before forward and is not counted as kept for backward."""
        return [*self.model.parameters(), *self.model.buffers()]

    def __call__(self):
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
