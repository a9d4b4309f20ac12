"""What a call costs before it has anything to compute: 16 elements, from C++ and from Python. A thousand
calls are timed at a time, so that a millisecond in the table is a microsecond of each."""

import timeit

import cpp_library
import torch
import torchqat.functional as F
from harness import Contender, Problem

OPS = ()

# Contenders with a fixed alpha compute one gradient, as fake quantization does. Where none is asked for they
# would repeat the others, and are left out.
FIXED = ", alpha fixed"

CALLS = 1000
BITS = 4
NO_GRADIENT, FORWARD, BOTH = PASSES = range(3)  # as benchmarks/cpp/call_overhead.cpp numbers them
TITLES = ("no gradient", "forward with gradient", "forward and backward")


def problems(device, quick):
    calls = CALLS // 10 if quick else CALLS
    found = [from_python(passes, calls, device) for passes in PASSES]
    return found if device == "cuda" else [*(from_cpp(passes, calls) for passes in PASSES), *found]


def problem(language, passes, calls, contenders, beside):
    if passes == NO_GRADIENT:
        contenders = [one for one in contenders if not one.name.endswith(FIXED)]
    name = f"{calls} calls from {language}, 16 float32 each, {TITLES[passes]}"
    return Problem(name, 16 * calls, contenders, floor_bytes=0, beside=beside)


def from_cpp(passes, calls):
    names = {
        "torchqat::staircase_relu": "staircase_relu",
        "torchqat::staircase_relu" + FIXED: "staircase_relu_fixed_alpha",
        "at::relu": "relu",
        "at::gelu, tanh": "gelu",
        "at::fake_quantize_per_tensor_affine": "fake_quantize",
        "at::_fake_quantize_learnable_per_tensor_affine": "fake_quantize_learnable",
    }
    makers = [Contender(who, lambda f=f: cpp_loop(f, calls, passes)) for who, f in names.items()]
    return problem("C++", passes, calls, makers, ("at::relu", "at::fake_quantize_per_tensor_affine"))


def cpp_loop(function, calls, passes):
    loop = cpp_library.load("call_overhead")[function]
    loop.restype, loop.argtypes = None, (cpp_library.ctypes.c_int64, cpp_library.ctypes.c_int)
    return lambda: loop(calls, passes)


def from_python(passes, calls, device):
    x = torch.randn(16, device=device, requires_grad=passes != NO_GRADIENT)
    alpha = torch.tensor(0.1, device=device, requires_grad=passes != NO_GRADIENT)
    scale = torch.tensor([0.1], device=device, requires_grad=passes != NO_GRADIENT)
    names = {
        "F": F,
        "qat": torch.ops.qat,
        "aten": torch.ops.aten,
        "torch": torch,
        "x": x,
        "alpha": alpha,
        "fixed": alpha.detach(),
        "scale": scale,
        "zero": torch.zeros_like(scale),
        "seed": torch.ones_like(x),
    }
    top = 2**BITS - 1
    statements = {
        "torchqat staircase_relu": (f"qat.staircase_relu(x, alpha, {BITS})", "x, alpha"),
        "torchqat staircase_relu" + FIXED: (f"qat.staircase_relu(x, fixed, {BITS})", "x"),
        "torchqat.functional.staircase_relu": (f"F.staircase_relu(x, alpha, {BITS})", "x, alpha"),
        "aten.gelu, tanh": ("aten.gelu(x, approximate='tanh')", "x"),
        "torch.relu": ("torch.relu(x)", "x"),
        "fake_quantize_per_tensor_affine": (
            f"torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, {top})",
            "x",
        ),
        "torch.ops.aten.fake_quantize_per_tensor_affine": (
            f"aten.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, {top})",
            "x",
        ),
        "_fake_quantize_learnable_per_tensor_affine": (
            f"torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, {top})",
            "x, scale",
        ),
    }
    makers = []
    for who, (statement, inputs) in statements.items():
        if passes == BOTH:
            statement = f"torch.autograd.grad({statement}, ({inputs},), seed)"
        timer = timeit.Timer(statement, globals=names)
        makers.append(Contender(who, lambda timer=timer: lambda: timer.timeit(calls)))
    return problem("Python", passes, calls, makers, ("aten.gelu, tanh", "fake_quantize_per_tensor_affine"))
