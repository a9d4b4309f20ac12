"""The list of mistakes that `make faults` plants in the kernels fits the tree as it is."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_program():
    spec = importlib.util.spec_from_file_location("plant_faults", ROOT / "tests/faults/plant_faults.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_program()
FAULTS = run.read_faults()


def test_every_fault_can_be_planted():
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        assert fault.planted(source) != source, fault.name
        assert fault.what.endswith("."), fault.name
        assert fault.programs(), f"{fault.name}: no test includes {fault.file}"
        assert set(fault.programs()) <= set(run.tests_of(fault.file)), fault.name


def test_there_are_enough_faults_in_every_file():
    assert len(FAULTS) >= 25
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").glob("*.cuh")}
    assert kernels - {fault.file for fault in FAULTS} == set()


@pytest.mark.parametrize(("text", "count"), [("a", 2), ("c", 0)])
def test_a_text_that_does_not_occur_once_is_an_error(text, count):
    fault = run.Fault("some-name", "A sentence.", "some/file", text, "x")
    with pytest.raises(run.Problem, match=rf"some-name: its text occurs {count} times in some/file"):
        fault.planted("aba")
    assert fault.planted("c" if text == "c" else "ab") == ("x" if text == "c" else "xb")


def test_includes_are_followed():
    assert run.tests_of("cuda/bcgd_ternary_bins.cuh") == ["test_bcgd_step_kernels.cpp"]
    assert "test_emulator.cpp" in run.tests_of("cuda/launch.cuh")
    assert run.tests_of("csrc/torchqat/math/weight_fit.h") == [
        "test_bcgd_step_kernels.cpp",
        "test_quantize_weight_kernels.cpp",
    ]


@pytest.mark.parametrize(
    ("states", "status"), [(["caught", "caught"], 0), (["caught", "SURVIVED"], 1), (["ERROR", "caught"], 1)]
)
def test_every_fault_must_be_caught(capsys, states, status):
    class Checks:
        def check(self, fault):
            return states[FAULTS.index(fault)], "how"

    assert run.check_all(FAULTS[:2], Checks(), jobs=1) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"[1/2] {FAULTS[0].name} ") and f"{states[0]}: how" in lines[0]
    assert lines[-1] == f"faults caught: {states.count('caught')}/2"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--list"], 0, f"{FAULTS[0].name}: {FAULTS[0].what}\n"),
        (["--jobs", "0"], 2, "--jobs must be at least 1, got 0"),
        (["ticket-not-reset", "nonsense"], 1, "torchqat: no such faults: nonsense; --list prints all names"),
    ],
)
def test_arguments(words, status, says):
    program = [sys.executable, ROOT / "tests/faults/plant_faults.py"]
    done = subprocess.run([*program, *words], capture_output=True, text=True)
    assert done.returncode == status and says in done.stdout + done.stderr


def test_a_compiler_that_is_not_there_is_told():
    program = [sys.executable, ROOT / "tests/faults/plant_faults.py", "ticket-not-reset"]
    done = subprocess.run(program, env={**os.environ, "CXX": "no-such-c++"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "torchqat: there is no compiler no-such-c++; CXX names another\n"
