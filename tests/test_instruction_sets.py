"""The CPU kernels for each instruction set: the operators' tests on every one, and the same results.

The environment variable ATEN_CPU_CAPABILITY takes away what the processor has; the fullest set is what the
other tests run on.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat

TESTS = Path(__file__).parent
CAPABILITIES = ["default", "avx2", "avx512"]
HERE = torch.backends.cpu.get_cpu_capability()
LESSER = {"AVX512": ["default", "avx2"], "AVX2": ["default"]}.get(HERE, [])

RESULTS = """
import hashlib, torch, torchqat.functional as F
seen = []
def numbers(shape, step):  # torch.randn depends on the instruction set itself
    return (torch.arange(torch.Size(shape).numel()) * step % 2003 / 500 - 2).reshape(shape)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for shape in ((5, 37, 41), (3, 40, 1), (50001,)):
        for alpha in (torch.tensor(0.3), torch.linspace(0.1, 0.9, shape[1] if len(shape) > 1 else 1)):
            for options in ({}, {"alpha_grad": "exact"}, {"ste": "log_tailed_relu"}):
                x = numbers(shape, 7919).to(dtype).requires_grad_()
                a = alpha.clone().requires_grad_()
                y = F.staircase_relu(x, a, 3, **options)
                y.backward(numbers(shape, 104729).to(dtype))
                seen += [y, x.grad, F.staircase_codes(x, a, 3)]
digest = hashlib.sha256()
for t in seen:
    digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
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
    files = [TESTS / f"test_{op}.py" for op in ("staircase_relu", "bcgd_step")]
    result = python(
        capability, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compile", *files
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


def test_what_is_not_a_sum_is_the_same_bits_on_all():
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
        weak = [line[19:] for line in symbols.splitlines() if line[17:18] in ("W", "V", "u")]
        assert [name for name in weak if f"{isa}::" not in name] == []
