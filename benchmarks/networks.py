"""The networks of the examples, quantized as users of each library would do it."""

import copy
import sys
from pathlib import Path

import torch
import torchqat
from harness import require
from peers import BinaryWeight, EagerStaircase
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import models  # noqa: E402


def network(name, size):
    torch.manual_seed(0)
    return models.MODELS[name](3, size, 10)


def floats(model):
    """With ReLUs in place, which keep nothing of their own."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def ours(model, bits, **options):
    return torchqat.prepare(model, bits, **options)


class Checkpointed(nn.Module):
    """A convolution and its normalization, computed again in backward."""

    def __init__(self, convolution, norm):
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x):
        return checkpoint(lambda v: self.norm(self.convolution(v)), x, use_reentrant=False)


def checkpointed(model):
    """torch's checkpointing of the float network, at the boundaries at which ours recomputes."""
    for owner in list(floats(model).modules()):
        convolution = None
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = name
            elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
                setattr(owner, name, Checkpointed(getattr(owner, convolution), child))
                setattr(owner, convolution, nn.Identity())
                convolution = None
    return model


def replaced(model, make):
    """Every layer by what make(layer) returns, where that is not None."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            new = make(child)
            if new is not None:
                setattr(owner, name, new)
    return split_relus(model)


def split_relus(model):
    """A block that calls one activation twice gets a second one, as each has a step size of its own."""
    for block in model.modules():
        if isinstance(block, models._Residual):
            block.relu2 = copy.deepcopy(block.relu)
            block.__class__ = _TwoReLUs
    return model


class _TwoReLUs(models._Residual):
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            return self.relu2(y + self.shortcut(x))
        return self.relu2(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow)))


WEIGHTED = (nn.Conv2d, nn.Linear)


def arguments(layer):
    if isinstance(layer, nn.Linear):
        names = ("in_features", "out_features")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def brevitas_network(model, bits):
    """Binary weights and QuantReLU, past the calls in which that gathers statistics."""
    layers, quant = require("brevitas.nn"), require("brevitas.quant")

    def make(module):
        if isinstance(module, WEIGHTED):
            layer = layers.QuantConv2d if isinstance(module, nn.Conv2d) else layers.QuantLinear
            return layer(**arguments(module), weight_quant=quant.SignedBinaryWeightPerTensorConst)
        if isinstance(module, nn.ReLU):
            relu = layers.QuantReLU(bit_width=bits)
            for _ in range(301):
                relu(torch.rand(64))
            return relu
        return None

    return replaced(model, make)


class FakeQuantizedConv2d(nn.Conv2d):
    """A convolution of fake-quantized weights; `quantize` takes a matrix of rows."""

    def __init__(self, quantize, **arguments):
        super().__init__(**arguments)
        self.quantize = quantize

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, self.quantize(weight.flatten(1)).view_as(weight), bias)


class FakeQuantizedLinear(nn.Linear):
    def __init__(self, quantize, **arguments):
        super().__init__(**arguments)
        self.quantize = quantize

    def forward(self, input):
        return F.linear(input, self.quantize(self.weight), self.bias)


def with_weights(layer, quantize):
    kind = FakeQuantizedConv2d if isinstance(layer, nn.Conv2d) else FakeQuantizedLinear
    return kind(quantize, **arguments(layer))


def torch_network(model, bits):
    """PyTorch's own fake quantization: 8-bit weights per channel, activations with moving ranges."""
    quantization = require("torch.ao.quantization")

    def make(module):
        if isinstance(module, WEIGHTED):
            observer = quantization.MovingAveragePerChannelMinMaxObserver
            weights = quantization.FakeQuantize(
                observer, -128, 127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0
            )
            return with_weights(module, weights)
        if isinstance(module, nn.ReLU):
            fake = quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 2**bits - 1)
            return nn.Sequential(nn.ReLU(inplace=True), fake)
        return None

    return replaced(model, make)


def torchao_network(model, bits):
    """torchao quantizes activations to 8 bits by the rows of matrices, here samples, and weights to 4."""
    qat = require("torchao.quantization.qat")

    def quantizer(dtype, granularity, symmetric):
        config = qat.IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric)
        return qat.IntxFakeQuantizer(config)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantize = quantizer(torch.int8, "per_token", False)

        def forward(self, x):
            return self.quantize(F.relu(x, inplace=True).flatten(1)).view_as(x)

    def make(module):
        if isinstance(module, WEIGHTED):
            return with_weights(module, quantizer(torch.int4, "per_channel", True))
        return Rows() if isinstance(module, nn.ReLU) else None

    return replaced(model, make)


class HandWrittenReLU(nn.Module):
    """Our default staircase and its step size, without torchqat."""

    def __init__(self, bits):
        super().__init__()
        self.bits, self.alpha = bits, nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return EagerStaircase.apply(x, self.alpha, self.bits)


def hand_written_activations(model, bits):
    return replaced(model, lambda module: HandWrittenReLU(bits) if isinstance(module, nn.ReLU) else None)


def hand_written_network(model, bits):
    """Binary weights and staircases by Python Functions, as most papers' code has them."""

    def make(module):
        if isinstance(module, WEIGHTED):
            return with_weights(module, BinaryWeight.apply)
        return HandWrittenReLU(bits) if isinstance(module, nn.ReLU) else None

    return replaced(model, make)
