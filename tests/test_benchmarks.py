"""The benchmarks run, leave nobody out silently, and cover every operator."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat  # noqa: F401 - loads the operators

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


@pytest.fixture
def cases(harness):
    return importlib.import_module("cases")


def public_operators():
    """Names of the operators that compute on tensors and are not private."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("qat::")]
    return {s.name[5:] for s in schemas if "Tensor" in str(s) and not s.name.startswith("qat::_")}


def test_every_operator_has_a_case(cases):
    covered = {operator for name in cases.names() for operator in cases.load(name).OPS}
    assert covered == public_operators()


def test_a_quick_run_writes_a_report_and_a_plot(tmp_path):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    report_path = tmp_path / "report.json"
    command = [sys.executable, BENCHMARKS / "run.py", "staircase_relu", "--quick", "--threads", "1"]
    finished = subprocess.run([*command, "--json", report_path], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "report_staircase_relu.png").stat().st_size > 1000
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}, "a half-written file was left"
    report = json.loads(report_path.read_text())
    assert report["machine"]["threads"] == 1
    assert report["machine"]["versions"]["torch"] in torch.__version__
    for result in report["cases"]["staircase_relu"]:
        assert result["floor"]["ms"] > 0
        rows = {row["name"]: row for row in result["rows"]}
        assert rows["torchqat"]["status"] == "ok"
        assert rows["torchqat"]["low_ms"] <= rows["torchqat"]["ms"] <= rows["torchqat"]["high_ms"]
        assert rows["torch.relu"]["ms"] > 0
        if importlib.util.find_spec("brevitas") is None:
            assert rows["brevitas QuantReLU"]["reason"] == "brevitas is not installed"
        assert all(row["status"] in ("ok", "absent", "failed") for row in rows.values())
        assert all(row["reason"] for row in rows.values() if row["status"] != "ok")
        assert all(f"| {name} |" in finished.stdout for name in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["staircase"], "unknown case 'staircase'; choose from bcgd, "),
        (["--device", "tpu"], "unknown device 'tpu'; choose from cpu, cuda"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "no/such/folder/report.json"], "no folder no/such/folder"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(arguments, says, harness, capsys):
    pytest.importorskip("tqdm")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("run").arguments(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_clear_error(harness, capsys):
    pytest.importorskip("tqdm")
    with pytest.raises(SystemExit):
        importlib.import_module("run").arguments(["--device", "cuda"])
    assert "no CUDA device here: torch.cuda.is_available() is False" in capsys.readouterr().err


def row_of(harness, make, **options):
    problem = harness.Problem("small", 10, [harness.Contender("one", make, **options)], floor_bytes=64)
    (row,) = harness.measure(problem, "cpu", {"flops_per_s": 1e9}, quick=True)["rows"]
    return row


def test_who_cannot_take_part_is_named_with_the_reason(harness):
    row = row_of(harness, lambda: harness.require("no_such_library.part"))
    assert row == {"name": "one", "status": "absent", "reason": "no_such_library is not installed"}
    row = row_of(harness, lambda: lambda: torch.zeros(2) @ torch.zeros(3))
    assert row["status"] == "failed"
    assert row["reason"].startswith("RuntimeError: ")
    row = row_of(harness, lambda: lambda: None, compiles=True)
    assert row == {"name": "one", "status": "absent", "reason": "left out by --quick"}
    assert row_of(harness, lambda: lambda: None)["status"] == "ok"


def test_the_floor_is_the_slower_of_bytes_and_flops(harness):
    problem = harness.Problem("small", 10, [], floor_bytes=64, floor_flops=10**9)
    assert harness.measure(problem, "cpu", {"flops_per_s": 1e9}, quick=True)["floor"]["ms"] == 1000


def test_saved_bytes_counts_every_storage_once(harness):
    meters = importlib.import_module("meters")
    x = torch.ones(1000, requires_grad=True)
    assert meters.saved_bytes(lambda: x * x) == 4000  # both factors are x
    assert meters.saved_bytes(lambda: x.exp()) == 4000  # its output
    assert meters.saved_bytes(lambda: x.exp().sin()) == 4000  # the output of exp is the input of sin
    assert meters.saved_bytes(lambda: x.sin().exp()) == 8000


def test_peak_bytes_sees_what_a_call_takes_and_gives_back(harness):
    meters = importlib.import_module("meters")
    size = 1 << 26

    def takes_and_gives_back():
        return torch.ones(size // 4).sum()

    peak = meters.peak_bytes(takes_and_gives_back, "cpu")
    if peak is None:
        pytest.skip("this kernel does not tell the peak of resident memory")
    assert 0.9 * size < peak < 1.2 * size


def test_a_larger_batch_trains_where_the_float_network_does_not(harness):
    command = [sys.executable, BENCHMARKS / "larger_batch.py", "--batch", "128", "--memory", "180"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split(" | ") for line in finished.stdout.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1], row[2].startswith("trains: losses ")) for row in rows] == [
        ("| float", "128", False),
        ("| codes", "128", True),
        ("| codes", "192", True),
        ("| recompute", "384", True),
    ]
    assert "memory" in rows[0][2]  # what it died of
