"""scripts/gpu_check.sh says what happened, whatever happens: with stand-ins for all the programs it calls."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = f"""
case "$*" in
  *gpu_report.py*) exec {sys.executable} "$@" ;;
  *is_available*) echo "a warning of torch"; echo fake-gpu 90 ;;
  *"import cases"*) echo staircase_relu ;;
  *"run.py staircase_relu --device cuda --json"*) echo '{{"cases": {{}}}}' >"$6"; echo "| table |" ;;
  *profiled_kernels.py*) ;;
  *"-m pytest"*) echo "7 passed" ;;
esac"""
CMAKE = """
case "$*" in
  *"--target help") echo "test_kernels_on_device: phony" ;;
  *"--target torchqat_python") touch build-gpu/libtorchqat.so ;;
  *"--target test_kernels_on_device")
    mkdir -p build-gpu/tests/cpp/on_device
    cd build-gpu/tests/cpp/on_device
    printf '#!/bin/sh\\necho "[  PASSED  ] $GTEST_SHARD_INDEX"\\n' >test_kernels_on_device
    chmod +x test_kernels_on_device ;;
esac"""
NCU = """
while [ "$1" != --log-file ]; do shift; done
cat >"$2" <<'END'
==PROF== Connected
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","us","%"
"0","void torchqat::cuda::a_kernel<(int)2, float>(const T2 *, long)","(8, 1, 1)","12.5","91.2"
END"""
PROGRAMS = {
    "python": PYTHON,
    "cmake": CMAKE,
    "ncu": NCU,
    "ninja": "",
    "nvcc": "",
    "nvidia-smi": "",
    "compute-sanitizer": 'while [[ "$1" = --* ]]; do shift 2; done; exec "$@"',
}


class Check:
    """A checkout with the scripts alone, and a folder of programs that comes first in the PATH."""

    def __init__(self, folder):
        self.root = folder / "a checkout"
        self.reports = folder / "reports"
        self.bin = folder / "bin"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "tests").mkdir()
        for name in ("gpu", "staircase_relu", "consumers"):
            (self.root / f"tests/test_{name}.py").touch()
        (self.root / "benchmarks").mkdir()
        self.bin.mkdir()
        for name, text in PROGRAMS.items():
            self.program(name, text)

    def program(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def python_where(self, words, text):
        """What Python does where its arguments contain these words."""
        self.program("python", PYTHON.replace("in\n", f'in\n  *"{words}"*) {text} ;;\n', 1))

    def start(self, *arguments, limits=""):
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHON": "python",
            "CUDA_HOME": str(self.root),
            "TORCHQAT_GPU_CHECK_LIMITS": limits,
            "TORCHQAT_JOBS": "2",
        }
        for name in ("TORCHQAT_LIBRARY", "TORCHQAT_KERNEL_TESTS"):
            environment.pop(name, None)
        return subprocess.Popen(
            [self.root / "scripts/gpu_check.sh", *arguments, self.reports],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, limits=""):
        process = self.start(*arguments, limits=limits)
        return process.communicate(timeout=60)[0], process.returncode

    @property
    def report(self):
        return json.loads((self.reports / "gpu_check-fake-gpu.json").read_text())

    @property
    def verdicts(self):
        """Of each stage; the Markdown must have the same."""
        stages = {s["name"]: (s["verdict"], s["reason"]) for s in self.report["stages"]}
        table = (self.reports / "gpu_check-fake-gpu.md").read_text().split("##")[0]
        rows = re.findall(r"^\| (\w+) \| ([\w ]+) \|", table, re.M)
        assert dict(rows[1:]) == {name: verdict for name, (verdict, _) in stages.items()}
        return stages


@pytest.fixture
def check(tmp_path):
    if not Path("/bin/bash").exists() or not shutil.which("timeout", path="/usr/bin:/bin"):
        pytest.skip("no bash or no timeout")
    return Check(tmp_path)


def runs(pid):
    """Whether the process still does something; one that ended may stay listed until it is asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def others(verdicts, *names):
    return {verdict for name, (verdict, _) in verdicts.items() if name not in names}


def test_all_stages_pass(check):
    output, code = check.run()
    assert code == 0, output
    assert others(check.verdicts) == {"passed"}
    assert len(check.verdicts) == 15
    assert check.report["benchmarks"] == {"cases": {}}
    kernel = {
        "kernel": "a_kernel<2, float>",
        "grid": "(8, 1, 1)",
        "duration": "12.5 us",
        "DRAM, % of peak": "91.2 %",
    }
    assert check.report["kernels"] == [kernel]
    logs = {s["name"]: "\n".join(s["log"]) for s in check.report["stages"]}
    assert "[  PASSED  ] 3" in logs["kernels"] and "[  PASSED  ] 3" in logs["kernels_memcheck"]
    assert "passed tests/test_staircase_relu.py: 7 passed" in logs["pytest_gpu"]
    assert "consumers" not in logs["pytest_host"] and "python/torchqat" in logs["pytest_host"]
    assert not list(check.reports.glob("*.part"))


def test_a_stage_that_fails_ends_nothing(check):
    check.python_where("-k graph or stream", "echo '1 failed, 6 passed'; exit 1")
    output, code = check.run("--quick")
    assert code == 1
    assert output.splitlines()[-1] == "torchqat: failed: graphs_and_streams "
    verdicts = check.verdicts
    assert verdicts["graphs_and_streams"] == ("FAILED", "exit status 1: 1 failed, 6 passed")
    assert others(verdicts, "graphs_and_streams") == {"passed"}
    assert "racecheck" not in verdicts and "pytest_host" not in verdicts


def test_one_file_that_fails_is_named(check):
    check.python_where(
        "-m gpu tests/test_staircase_relu.py", "echo 'FAILED tests/x.py::test_y'; echo '1 failed'; exit 1"
    )
    _, code = check.run("--quick")
    assert code == 1
    (log,) = (s["log"] for s in check.report["stages"] if s["name"] == "pytest_gpu")
    assert log[1:] == ["FAILED tests/test_staircase_relu.py after 0 s: 1 failed", "FAILED tests/x.py::test_y"]


def test_a_stage_that_hangs_is_ended(check):
    pids = check.root / "pids"
    hang = f'trap "" TERM; echo $$ >>"{pids}"; while :; do sleep 50; done'
    check.program("compute-sanitizer", f'[[ "$*" = *"-m pytest"* ]] || exit 0; {hang}')
    output, code = check.run("--quick", limits="memcheck=1")
    assert code == 1, output
    assert check.verdicts["memcheck"][0] == "TIMED OUT"
    assert check.verdicts["benchmarks"][0] == "passed"
    assert pids.read_text()
    assert not any(runs(pid) for pid in pids.read_text().split())


def test_what_is_missing_is_named(check):
    (check.bin / "compute-sanitizer").unlink()
    (check.bin / "ncu").unlink()
    check.program("cmake", CMAKE.replace('echo "test_kernels_on_device: phony"', "true"))
    output, code = check.run()
    assert code == 0, output
    verdicts = check.verdicts
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck", "kernels_memcheck", "kernels_racecheck"):
        assert verdicts[tool] == ("SKIPPED", "compute-sanitizer is not installed")
    assert verdicts["ncu"] == ("SKIPPED", "ncu is not installed")
    assert verdicts["kernels"][0] == "SKIPPED" and "no GoogleTest" in verdicts["kernels"][1]


def test_tools_that_may_not_are_no_failure(check):
    check.program("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    check.program("compute-sanitizer", "echo '========= Error: Device not supported'; exit 1")
    output, code = check.run("--quick")
    assert code == 0, output
    refused = ("SKIPPED", "compute-sanitizer refuses this device: Device not supported")
    assert check.verdicts["memcheck"] == check.verdicts["kernels_memcheck"] == refused
    assert check.verdicts["ncu"] == ("SKIPPED", "ncu is not allowed or not able here: ERR_NVGPUCTRPERM")


def test_without_a_library_the_rest_says_so(check):
    check.program("cmake", "echo 'error: no such thing'; exit 2")
    _, code = check.run("--quick")
    assert code == 1
    verdicts = check.verdicts
    assert verdicts["build"] == ("FAILED", "exit status 2: error: no such thing")
    for name in ("operators", "graphs_and_streams", "pytest_gpu", "memcheck", "benchmarks", "ncu"):
        assert verdicts[name] == ("SKIPPED", "there is no library: see the stage build")


def test_no_stage_begins_when_the_time_is_spent(check):
    output, code = check.run(limits="total=0")
    assert code == 0, output
    assert {*check.verdicts.values()} == {("SKIPPED", "the 0 s of the whole check are spent")}


def wait_for(pid):
    for _ in range(200):
        if pid.exists() and pid.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"no {pid}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_killed_has_said_how_far_it_came(check, how):
    pid = check.root / "pid"
    check.program("cmake", f"echo $$ >'{pid}'; sleep 50")
    process = check.start()
    wait_for(pid)
    process.send_signal(how)
    if how == signal.SIGKILL:
        process.wait()
        assert "another gpu_check.sh, or what one has left" in check.run()[0]  # its stage goes on
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert process.wait(timeout=20) == (143 if how == signal.SIGTERM else -how)
    verdicts = check.verdicts
    assert verdicts["machine"] == ("passed", "")
    expected = {
        signal.SIGTERM: ("FAILED", "the check was interrupted"),
        signal.SIGKILL: ("RUNNING", "when this was written"),
    }
    assert verdicts["build"] == expected[how]
    assert others(verdicts, "machine", "build") == {"NOT REACHED"}


def test_without_a_gpu_there_is_the_reason_and_one_line(check):
    check.python_where("is_available", "echo 'no GPU' >&2; exit 1")
    output, code = check.run()
    assert code == 1
    assert output.splitlines()[0] == "no GPU"
    assert output.splitlines()[1].startswith(
        "torchqat: nothing was checked: python has no torch that sees a GPU."
    )
    assert len(output.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fast"], "torchqat: unknown option --fast"),
        (["other/folder"], "torchqat: one folder, got "),
    ],
)
def test_a_wrong_argument_is_told_with_what_can_be_said(check, words, says):
    output, code = check.run(*words)
    assert code == 2
    assert output.startswith(says) and "gpu_check.sh [--quick] [FOLDER]" in output


def test_a_folder_that_takes_no_report_is_told_before_anything_runs(check):
    check.reports.write_text("a file")
    output, code = check.run()
    assert code == 1
    assert output.splitlines()[-1] == f"torchqat: cannot write to {check.reports}"
    assert "==>" not in output and check.reports.read_text() == "a file"


def test_reports_that_cannot_be_written_later_are_a_failure(check):
    check.python_where("gpu_report.py", "echo 'No space left on device' >&2; exit 1")
    output, code = check.run("--quick")
    assert code == 1
    assert f"torchqat: could not write the reports to {check.reports}" in output.splitlines()[-1]


def test_a_second_check_at_the_same_time_is_refused(check):
    pid = check.root / "pid"
    check.program("cmake", f"echo $$ >'{pid}'; sleep 50")
    first = check.start()
    wait_for(pid)
    try:
        output, code = check.run()
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=20)
    refusal = "torchqat: another gpu_check.sh, or what one has left, runs in this checkout\n"
    assert code == 1 and output == refusal
    assert check.verdicts["machine"] == ("passed", ""), "the second one has touched what the first one wrote"


def test_the_limits_add_up_to_less_than_nine_minutes():
    """And those in the script's head are those that hold."""
    text = (ROOT / "scripts/gpu_check.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    said = re.findall(r"^#   ((?:\w+ ?)+?) {2,}(\d+)  ", text, re.M)
    assert sum(int(seconds) for _, seconds in said) <= 530 < limits["total"] < 540
    for names, seconds in said:
        assert {limits[name] for name in names.split()} == {int(seconds)}
    assert len(said) == 6
