"""Forward and backward with a given output gradient, 4 bits, against what users of other libraries write."""

import torch
import torchqat.functional as F
from harness import Contender, Problem, renewable, require
from peers import EagerStaircase, lsq

OPS = ("staircase_relu",)

BITS = 4
TOP = 2**BITS - 1
STEP = 0.1
SIZES = {"16x64x32x32": (16, 64, 32, 32), "64x64x32x32": (64, 64, 32, 32), "16": (16,)}
CUDA_SIZES = SIZES | {"64x256x64x64": (64, 256, 64, 64)}
QUICK_SIZES = {"4x8x16x16": (4, 8, 16, 16), "16": (16,)}


def problems(device, quick):
    sizes = QUICK_SIZES if quick else CUDA_SIZES if device == "cuda" else SIZES
    dtypes = (torch.float32, torch.bfloat16)
    return [problem(name, shape, dtype, device) for name, shape in sizes.items() for dtype in dtypes]


@renewable
def problem(name, shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    # forward: x in, y out, a 2-bit code out; backward: the code and the gradient in, a gradient out
    moved = 4 * x.element_size() + 0.5
    return Problem(
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        elements=x.numel(),
        contenders=contenders(x, torch.randn_like(x)),
        floor_bytes=round(moved * x.numel()),
        saves=True,
    )


def contenders(x, grad):
    """Each is a maker: its inputs and imports are its own business, and so are its failures."""
    scalar = parameter(STEP, x)
    zero = torch.zeros(1, device=x.device)
    found = {
        "torchqat": lambda: step(lambda: F.staircase_relu(x, scalar, BITS), grad, x, scalar),
        "torch.relu": lambda: step(lambda: torch.relu(x), grad, x),
        "fake_quantize_per_tensor_affine": lambda: step(
            lambda: torch.fake_quantize_per_tensor_affine(x, STEP, 0, 0, TOP), grad, x
        ),
        "the same with tensors for scale and zero point": lambda: step(
            lambda: torch.fake_quantize_per_tensor_affine(x, scalar.detach(), zero[0].int(), 0, TOP), grad, x
        ),
        "_fake_quantize_learnable_per_tensor_affine": lambda: step(
            lambda: torch._fake_quantize_learnable_per_tensor_affine(x, scalar[None], zero, 0, TOP, 1.0),
            grad,
            x,
            scalar,
        ),
        "eager LSQ composite": lambda: step(lambda: lsq(x, scalar, BITS), grad, x, scalar),
        "eager autograd.Function": lambda: step(
            lambda: EagerStaircase.apply(x, scalar, BITS), grad, x, scalar
        ),
        "brevitas QuantReLU": lambda: brevitas_relu(x, grad),
    }
    makers = [Contender(name, make) for name, make in found.items()]
    makers.append(Contender("torch.compile of LSQ", lambda: compiled_lsq(x, scalar, grad), compiles=True))
    makers.append(
        Contender("torch.compile of QuantReLU", lambda: brevitas_relu(x, grad, torch.compile), compiles=True)
    )
    return makers + (per_channel(x, grad) if x.dim() == 4 else [])


def per_channel(x, grad):
    channels = x.shape[1]
    steps = parameter([STEP] * channels, x)
    zeros = torch.zeros(channels, device=x.device)
    found = {
        "torchqat, per channel": lambda: step(lambda: F.staircase_relu(x, steps, BITS), grad, x, steps),
        "fake_quantize_per_channel_affine": lambda: step(
            lambda: torch.fake_quantize_per_channel_affine(x, steps.detach(), zeros.int(), 1, 0, TOP), grad, x
        ),
        "_fake_quantize_learnable_per_channel_affine": lambda: step(
            lambda: torch._fake_quantize_learnable_per_channel_affine(x, steps, zeros, 1, 0, TOP, 1.0),
            grad,
            x,
            steps,
        ),
        "torchao int8 per token": lambda: torchao_quantizer(x, grad, "per_token"),
        "torchao int4 per row": lambda: torchao_quantizer(x, grad, "per_channel"),
    }
    return [Contender(name, make) for name, make in found.items()]


def parameter(value, x):
    return torch.tensor(value, device=x.device, requires_grad=True)


def step(forward, grad, *inputs):
    """A call that runs forward and its backward pass."""
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def compiled_lsq(x, alpha, grad):
    compiled = torch.compile(lsq, fullgraph=True)
    return step(lambda: compiled(x, alpha, BITS), grad, x, alpha)


def brevitas_relu(x, grad, finish=lambda relu: relu):
    """QuantReLU as it is in training, its first 300 calls over, in which it gathers statistics."""
    relu = require("brevitas.nn").QuantReLU(bit_width=BITS).to(x.device)
    for _ in range(301):
        relu(torch.rand(64, device=x.device))
    relu = finish(relu.to(x.dtype))
    return step(lambda: relu(x), grad, x, *relu.parameters())


def torchao_quantizer(x, grad, granularity):
    """torchao quantizes rows of matrices: the last dimension's for tokens, whole samples for channels."""
    qat = require("torchao.quantization.qat")
    symmetric = granularity == "per_channel"
    dtype = torch.int4 if symmetric else torch.int8
    quantizer = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric))
    return step(lambda: quantizer(x.flatten(1) if symmetric else x).view_as(x), grad, x)
