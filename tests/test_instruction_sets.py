"""The CPU kernels for each instruction set: the operators' tests on every one, and the same results.

The environment variable ATEN_CPU_CAPABILITY takes away what the processor has; the fullest set is what the
other tests run on.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat

TESTS = Path(__file__).parent
HERE = torch.backends.cpu.get_cpu_capability()
LESSER = {"AVX512": ["default", "avx2"], "AVX2": ["default"]}.get(HERE, [])

RESULTS = """
import hashlib, torch, torchqat.functional as F
seen = []
def numbers(shape, step):  # torch.randn depends on the instruction set itself
    values = (torch.arange(torch.Size(shape).numel()) * step % 2003 / 500 - 2).reshape(shape)
    extremes = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-40, -1e-40, 3e38, 1e30])
    values.view(-1)[5:5 + len(extremes)] = extremes[:max(0, values.numel() - 5)]
    return values
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for shape in ((5, 37, 41), (3, 40, 1), (50001,)):
        for alpha in (torch.tensor(0.3), torch.linspace(0.1, 0.9, shape[1] if len(shape) > 1 else 1)):
            for bits, options in ((3, {}), (8, {"alpha_grad": "exact"}), (2, {"ste": "log_tailed_relu"}),
                                  (4, {"ste": "reverse_exponential"})):
                x = numbers(shape, 7919).to(dtype).requires_grad_()
                a = alpha.clone().requires_grad_()
                y = F.staircase_relu(x, a, bits, **options)
                y.backward(numbers(shape, 104729).to(dtype).clamp(-9, 9))
                seen += [y, x.grad, a.grad, F.staircase_codes(x, a, bits)]
                op, x, a = torch.ops.qat, x.detach(), a.detach()
                y, kept = op._staircase_relu_forward(x, a, bits, 1, True)
                seen += [kept, op._staircase_relu_rebuild(kept, a, y.shape, y.stride(), dtype, bits, 1, y)]
                of_y = (y.shape, y.stride(), bits)
                seen += op._staircase_relu_backward(y, kept, a, *of_y, "relu", "exact", 1, True)
    for bits, method in ((1, "exact"), (2, "exact"), (2, "twn"), (3, "exact"), (4, "lloyd"), (8, "exact")):
        for n in (1, 7, 40, 3000, 40000):
            latent = (numbers((n,), 7919) / 3).clamp(-9, 9).to(dtype)
            w, scale = F.quantize_weight(latent, bits, method=method)
            y = latent.to(scale.dtype)
            for _ in range(3):
                F.bcgd_step_([w], [numbers((n,), 31).clamp(-9, 9).to(dtype)], [y], [scale], [], [],
                             lr=torch.tensor(0.01), bits=bits, method=method)
                seen += [w.clone(), y.clone(), scale.clone()]
    w = numbers((96, 70), 7919).clamp(-9, 9).to(dtype)
    for bits, method in ((1, "exact"), (2, "twn"), (3, "exact"), (4, "lloyd"), (8, "exact")):
        for channel_dim in (None, 0, 1):
            quantized, scale = F.quantize_weight(w, bits, method=method, channel_dim=channel_dim)
            seen += [quantized, scale, F.weight_codes(w, scale, bits, channel_dim=channel_dim)]
k = torch.arange(50_000.0, dtype=torch.float64)
hard = [(k + 1).sqrt() - k.sqrt(), torch.tensor([3.4e38] * 3 + [1.03e38] * 10 + [1e38] + [0.0] * 2034),
        torch.tensor([2.95, 1.38, 1.0195, 0.9805, 0.979]).repeat(4000), numbers((3000,), 7919)]
for latent in hard:
    for before in (0.0, -1.0, torch.nan, torch.inf, 1e-45, 2.0, 1.14e38, 3.3e38):
        y, scale = latent.clone(), torch.tensor(before, dtype=latent.dtype)
        w = y / 2
        lr = torch.tensor(0.0)
        F.bcgd_step_([w], [torch.zeros_like(y)], [y], [scale], [], [], lr=lr, bits=2, blend=0.0)
        seen += [w, scale]
digest = hashlib.sha256()
for t in seen:
    digest.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def python(capability, *arguments):
    paths = [str(Path(torchqat.__file__).parents[1]), *sys.path]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("capability", LESSER)
def test_the_tests_of_the_operators_pass_on_lesser_processors(capability):
    """But for compiled code: inductor writes vectors of its own, for the processor that is there."""
    files = [
        TESTS / f"test_{op}.py" for op in ("staircase_relu", "quantize_weight", "bcgd_step", "pack_codes")
    ]
    files.append(f"{TESTS}/test_code_saving.py::test_every_width_and_dtype")
    result = python(
        capability, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compile", *files
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


@pytest.mark.skipif(not LESSER, reason="this processor has one instruction set")
def test_results_are_the_same_bits_on_all():
    capabilities = ["avx512" if HERE == "AVX512" else HERE.lower(), *LESSER]
    printed = [python(capability, "-c", RESULTS).stdout.split() for capability in capabilities]
    assert len({capability for capability, _ in printed}) == len(capabilities)
    assert len({digest for _, digest in printed}) == 1


def test_no_function_can_be_linked_from_one_instruction_set_into_another():
    """A weak function, of which the linker keeps any one, must have the instruction set in its name."""
    folder = TESTS.parent / "build/CMakeFiles"
    if not shutil.which("nm") or not folder.is_dir():
        pytest.skip("needs nm and the build folder of this checkout")
    objects = {isa: list(folder.glob(f"torchqat_{isa}.dir/**/*.o")) for isa in ("avx2", "avx512")}
    for isa, files in objects.items():
        assert len(files) >= 2
        symbols = subprocess.run(["nm", "-C", *files], capture_output=True, text=True, check=True).stdout
        weak = re.findall(r"^[0-9a-f]+ [WVu] (.*)$", symbols, re.MULTILINE)
        assert weak, symbols
        assert [name for name in weak if f"{isa}::" not in name] == []
