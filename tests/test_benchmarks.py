"""The benchmarks run, leave nobody out silently, and cover every operator."""

import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CASES = sorted(path.stem for path in (BENCHMARKS / "cases").glob("[!_]*.py"))
RATES = {"flops_per_s": 1e9}


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


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_a_case_measures_everyone_who_is_installed(name, harness, cases, one_thread):
    installed = {peer for peer in ("torchao", "brevitas") if importlib.util.find_spec(peer)}
    allowed = {"left out by --quick"} | {
        f"{peer} is not installed" for peer in {"torchao", "brevitas"} - installed
    }
    if name == "call_overhead":
        allowed |= {"cmake is not installed", "c++ is not installed"}
    for problem in cases.load(name).problems("cpu", True):
        assert any(contender.name.startswith("torchqat") for contender in problem.contenders), problem.name
        rows = harness.measure(problem, "cpu", RATES, quick=True)["rows"]
        unmeasured = [row for row in rows if row["status"] != "ok" and row.get("reason") not in allowed]
        assert not unmeasured, problem.name
        assert set(problem.beside) <= {row["name"] for row in rows}
        assert all(set(row["times"]) <= set(problem.beside) for row in rows if row["status"] == "ok")


@pytest.mark.slow
def test_who_is_said_to_train_w1a4_does(harness, cases, one_thread):
    """Every convolution sees two values of its weights, and 16 of its input unless that is the image."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if "conv" in operator.name():
                calls.append([tensor.unique().numel() for tensor in args[:2]])
            return operator(*args, **(kwargs or {}))

    (problem,) = cases.load("training_step").problems("cpu", True)
    named = [c for c in problem.contenders if c.name.endswith("W1A4") and not c.compiles]
    assert len(named) == 5
    for contender in named:
        try:
            step = contender.make()
        except harness.Absent:
            continue
        for _ in range(3):
            step()
        calls = []
        with Seen(), torch.no_grad():
            step.model.train(False)(step.images)
        assert len(calls) == 19, contender.name
        assert {weights for _, weights in calls} == {2}, contender.name
        assert all(inputs <= 16 for inputs, _ in calls[1:]), contender.name


def test_a_quick_run_writes_a_report_and_a_plot(tmp_path, harness):
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
    assert report["machine"]["torchqat"]["commit"] == torchqat.build_info()["commit"]
    assert report["machine"]["checkout"] == harness.meters.checkout()
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
        (["--threads", "0"], "--threads must be in 1..1024, got 0"),
        (["--threads", "99999"], "--threads must be in 1..1024, got 99999"),
        (["--json", "no/such/folder/report.json"], "no/such/folder: No such file or directory"),
        (["--json", "folder"], "folder is there, and is not a file"),
        (["--json", "/dev/null"], "/dev/null is there, and is not a file"),
        (["--json", "/proc/report.json"], "cannot write to the folder /proc"),
        (["--json", ""], "is there, and is not a file"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(arguments, says, harness, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("run").arguments(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_report_goes_where_a_link_points_to(harness, tmp_path):
    pytest.importorskip("tqdm")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/report.json").touch()
    (tmp_path / "link.json").symlink_to("kept/report.json")
    options = importlib.import_module("run").arguments(["--json", str(tmp_path / "link.json")])
    assert options.json == tmp_path / "kept/report.json"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no report of run.py: Expecting value"),
        ("rubbish", "is no report of run.py: Expecting value"),
        ("[]", "is no report of run.py, or of a run that measured nothing"),
        ('{"machine": {}, "cases": {}}', "a run that measured nothing"),
        (b"\xff\xfe\x00", "is no report of run.py: 'utf-8' codec"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_report_is_not_drawn(text, says, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    command = [sys.executable, BENCHMARKS / "plot.py", path]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]  # matplotlib may speak before
    assert last.startswith("plot.py: ") and says in last and "Traceback" not in finished.stderr


def test_every_report_that_is_kept_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    reports = []
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        if "cases" in json.loads(path.read_text()):
            reports.append(tmp_path / path.name)
            reports[-1].write_bytes(path.read_bytes())
    assert len(reports) >= 7
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "plot.py", *reports], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    for report in reports:
        for name in json.loads(report.read_text())["cases"]:
            assert (tmp_path / f"{report.stem}_{name}.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_clear_error(harness, capsys):
    pytest.importorskip("tqdm")
    with pytest.raises(SystemExit):
        importlib.import_module("run").arguments(["--device", "cuda"])
    assert "no CUDA device here: torch.cuda.is_available() is False" in capsys.readouterr().err


def small_problem(harness, calls, **options):
    makers = [harness.Contender(name, lambda call=call: call) for name, call in calls.items()]
    return harness.Problem("small", 10, makers, **({"floor_bytes": 64} | options))


def test_times_are_given_as_multiples_of_the_chosen_contenders(harness):
    times = {"one": [1.0, 2.0, 9.0], "other": [2.0, 4.0, 2.0]}
    assert harness.ratios(times, "one", ("other", "absent")) == {"other": 0.5}
    problem = small_problem(harness, {"one": lambda: None, "other": lambda: None}, beside=("other",))
    result = harness.measure(problem, "cpu", RATES, quick=True)
    assert result["beside"] == ["other"]
    assert result["rows"][1]["times"] == {"other": 1.0}
    pytest.importorskip("tqdm")
    table = importlib.import_module("run").table("case", result)
    assert "| times other |" in table and "saved" not in table


def test_a_problem_can_set_the_threads(harness, one_thread):
    seen = set()
    problem = small_problem(harness, {"one": lambda: seen.add(torch.get_num_threads())}, threads=2)
    harness.measure(problem, "cpu", RATES, quick=True)
    assert (seen, torch.get_num_threads()) == ({2}, 1)


@pytest.fixture
def curve(harness):
    """Two points of a curve, without a contender on the second."""

    def too_large():
        raise harness.Absent("too large")

    points = [small_problem(harness, {"torchqat": lambda: None, "peer": lambda: None}) for _ in range(2)]
    points[1].contenders[1].make = too_large
    for point, size in zip(points, (16, 64), strict=True):
        point.curve = harness.Curve("a title", "pixels", size)
    return [harness.measure(point, "cpu", RATES, quick=True) for point in points]


def test_a_curve_is_one_table(curve, harness):
    pytest.importorskip("tqdm")
    run = importlib.import_module("run")
    ((title, points),) = run.curves(curve).items()
    lines = run.curve_table(title, points).strip().splitlines()
    assert lines[0] == "### a title, median ms"
    assert lines[2] == "| pixels | torchqat | peer | floor |"
    assert lines[4].startswith("| 16 | ") and lines[5].startswith("| 64 | ")
    assert lines[5].split(" | ")[2] == ""
    assert lines[-1] == "peer absent: too large"


def test_bars_and_curves_are_drawn(curve, harness, tmp_path):
    pytest.importorskip("matplotlib")
    without_floor = small_problem(harness, {"torchqat": lambda: None}, floor_bytes=0)
    without_floor.contenders.append(harness.Contender("peer", lambda: harness.require("no_such_library")))
    bars = harness.measure(without_floor, "cpu", RATES, quick=True)
    assert bars["floor"]["ms"] == 0
    machine = {"cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    report = {"machine": machine, "cases": {"curves": curve, "bars": [bars, curve[0] | {"name": "x"}]}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    drawn = importlib.import_module("plot").draw(tmp_path / "report.json")
    assert [path.name for path in drawn] == ["report_curves.png", "report_bars.png"]
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_the_share_of_the_floor_is_told_in_the_unit_that_sets_it(harness):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    floor = {"bytes": 4_000_000, "flops": 8_000_000, "by": "bytes", "ms": 1.0}
    assert plot.reached(floor, 2.0) == ", 50 % (2 GB/s)"
    assert plot.reached(floor | {"by": "flops"}, 2.0) == ", 50 % (4 GFLOP/s)"
    assert plot.reached(floor | {"ms": 0.0}, 2.0) == ""


@pytest.fixture
def pretended_gpu(harness, monkeypatch):
    """A device "cuda" that is the CPU: what the harness does with a GPU's instruments, without one."""
    meters = importlib.import_module("meters")
    copy_of, captures = meters.copy_of, []

    def captured(call):
        if getattr(call, "waits", False):
            raise RuntimeError("called a synchronizing operation")
        captures.append(call)
        return call

    class Events:
        def __call__(self, call):
            call()
            return 1e-3

    monkeypatch.setattr(meters, "synchronize", lambda device: None)
    monkeypatch.setattr(meters, "copy_of", lambda size, device: copy_of(size, "cpu"))
    monkeypatch.setattr(meters, "cache_bytes", lambda: 64)
    monkeypatch.setattr(meters, "captured", captured)
    monkeypatch.setattr(meters, "ColdEvents", Events)
    return captures


def test_on_a_gpu_inputs_take_turns_and_calls_are_replayed_as_graphs(harness, pretended_gpu):
    built = []

    @harness.renewable
    def problem():
        inputs = len(built)
        built.append(set())
        return small_problem(harness, {"torchqat": lambda: built[inputs].add(inputs), "waits": Waits()})

    class Waits:
        waits = True

        def __call__(self):
            pass

    result = harness.measure(problem(), "cuda", RATES, quick=True)
    assert built == [{0}, {1}]  # 64 bytes of inputs for a cache of 64: two sets fill it twice
    ours, waits = result["rows"]
    assert ours["graph"] == {"status": "ok", "ms": 1, "low_ms": 1, "high_ms": 1, "least_ms": 1, "rounds": 3}
    assert waits["graph"]["reason"] == "RuntimeError: called a synchronizing operation"
    assert waits["status"] == "ok"
    assert len(pretended_gpu) == 4  # the copy's and ours, two sets of inputs each
    pytest.importorskip("tqdm")
    run = importlib.import_module("run")
    assert "| graph replay ms |" in run.table("case", result)
    assert "failed: RuntimeError: called a synchronizing operation" in run.table("case", result)


@pytest.fixture
def pretended_graphs(monkeypatch):
    """What torch.cuda is asked for when a call is captured, in order."""
    asked = []

    class Stream:
        def wait_stream(self, other):
            asked.append("wait")

    class Graph:
        def replay(self):
            asked.append("replay")

    def in_context(word):
        @contextlib.contextmanager
        def context(*_, **__):
            asked.append(word)
            yield
            asked.append(f"end of {word}")

        return context

    for name, fake in {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": in_context("stream"),
        "graph": in_context("capture"),
        "synchronize": lambda: asked.append("synchronize"),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": asked.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def test_a_call_is_captured_once_it_is_known_not_to_wait(harness, pretended_graphs):
    captured = importlib.import_module("meters").captured
    captured(lambda: pretended_graphs.append("call"))()
    warm_up = ["wait", "stream", "call", "error", "call", 0, "end of stream", "synchronize"]
    capture = ["capture", "call", "end of capture", "replay", "synchronize"]
    assert pretended_graphs == [*warm_up, *capture, "replay"]


def test_a_call_that_waits_is_never_captured(harness, pretended_graphs):
    def waits():
        if "error" in pretended_graphs:
            raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        importlib.import_module("meters").captured(waits)
    assert pretended_graphs[-1] == 0, "other calls may wait again"
    assert "capture" not in pretended_graphs


def test_sets_of_inputs_fill_the_cache_twice(pretended_gpu):
    sets = importlib.import_module("meters").sets_beyond_cache
    assert [sets(size, "cuda") for size in (0, 1, 64, 127, 128, 10**6)] == [8, 8, 2, 2, 1, 1]
    assert sets(1, "cpu") == 1


def row_of(harness, make, **options):
    problem = harness.Problem("small", 10, [harness.Contender("one", make, **options)], floor_bytes=64)
    (row,) = harness.measure(problem, "cpu", RATES, quick=True)["rows"]
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
    assert harness.measure(problem, "cpu", RATES, quick=True)["floor"]["ms"] == 1000


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
