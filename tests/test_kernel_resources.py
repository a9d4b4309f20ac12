"""scripts/kernel_resources.py on small samples of what ptxas and cuobjdump print."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import kernel_facts  # noqa: E402
import kernel_resources  # noqa: E402

PTXAS = """ptxas info    : Compiling entry function '_ZN8torchqat4cuda6kernelIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN8torchqat4cuda6kernelIfEEvPT_
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 8 bytes cumulative stack size, 44 bytes smem
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90'
ptxas info    : Used 10 registers, used 0 barriers
"""
SPILLING_LIBRARY = PTXAS.replace(
    "ptxas info    : Used 10",
    "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\nptxas info    : Used 10",
)
UNSPILLED = PTXAS.replace("12 bytes spill stores, 4", "0 bytes spill stores, 0")

SASS = """	code for sm_80
		Function : _ZN8torchqat4cuda6kernelIfEEvPT_
        /*0000*/    LDG.E.128 R4, [R2.64] ;
	code for sm_90
		Function : _ZN8torchqat4cuda6kernelIfEEvPT_
        /*0000*/    LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/    LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/    LDG.E.U16 R9, desc[UR4][R6.64] ;
        /*0028*/    LDG.E.EF.LTC128B.128 R8, desc[UR4][R2.64+0x20] ;
        /*0030*/    LDS.128 R8, [R2] ;
        /*0040*/    STG.E desc[UR4][R2.64], R9 ;
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script on a folder with one object and a cuobjdump that prints sass.txt."""
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\nexec cat {tmp_path}/sass.txt\n")
    tool.chmod(0o755)
    (tmp_path / "sass.txt").write_text(SASS)

    def run(command, *arguments):
        script = [
            sys.executable,
            str(ROOT / "scripts/kernel_resources.py"),
            command,
            str(tmp_path),
            *arguments,
        ]
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(script, capture_output=True, text=True, env=env)

    return run


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys):
    """Checks the sample, without its spill, against a list of memory-bound kernels."""

    def check(lines, ptxas=UNSPILLED, sass=SASS):
        (tmp_path / "a.o.resources.txt").write_text(ptxas)
        (tmp_path / "sass.txt").write_text(sass)
        (tmp_path / "list.txt").write_text(lines)
        tool = tmp_path / "cuobjdump"
        tool.write_text(f"#!/bin/sh\nexec cat {tmp_path}/sass.txt\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(kernel_resources, "LISTED", tmp_path / "list.txt")
        return kernel_resources.check(tmp_path), capsys.readouterr().out

    return check


def test_the_report_reads_what_ptxas_says(run, tmp_path):
    empty = run("report")
    assert empty.returncode == 1 and "0 kernels" in empty.stdout
    (tmp_path / "a.o.resources.txt").write_text(SPILLING_LIBRARY)
    done = run("report")
    rows = [line.split()[:6] for line in done.stdout.splitlines() if line.startswith("sm_90")]
    assert sorted(rows) == [["sm_90", "10", "0", "8", "8", "100%"], ["sm_90", "48", "44", "8", "16", "62%"]]
    assert done.returncode == 0
    assert "2 kernels, at most 48 registers; 1 of ours spill, 1 of libraries'" in done.stdout


def test_a_folder_that_is_not_there_is_told(run, tmp_path):
    shutil.rmtree(tmp_path)
    done = run("report")
    assert done.returncode == 1 and done.stderr == f"kernel_resources.py: no folder {tmp_path}\n"


def test_the_page_has_columns_for_each_architecture(run, tmp_path):
    (tmp_path / "a.o.resources.txt").write_text(PTXAS + PTXAS.replace("sm_90", "sm_80"))
    done = run("page", "13.0", "sm_80", "sm_90", "sm_100")
    assert done.returncode == 0, done.stderr
    assert "nvcc of CUDA 13.0" in done.stdout
    assert "Missing: sm_100" in done.stdout
    assert "| `kernel<float>` | 48 · 16 · 44 · 62% | 48 · 16 · 44 · 62% |\n" in done.stdout
    assert done.stdout.endswith("| `kernel<float>` | 1 x 16 |  | 3 x 16, 1 x 2 | 1 x 4 |\n")
    none = run("page", "13.0", "sm_100")
    assert none.returncode == 1 and f"{tmp_path} has no kernels for sm_100" in none.stderr


def test_the_check_passes_what_is_as_listed(listed):
    code, output = listed("# of the sample\n\nkernel<*>    3x16    -\nkernel<float>  4x2  1x4\n")
    assert code == 0 and "1 kernels for sm_90: 0 problems" in output


def test_the_check_fails_on_a_spill(listed):
    code, output = listed("", ptxas=PTXAS)
    assert code == 1 and "sm_90 kernel<float>: spills 16 bytes" in output


def test_a_spill_in_a_kernel_of_a_library_is_told_only(listed):
    code, output = listed(
        "",
        ptxas=UNSPILLED + PTXAS.replace("_ZN8torchqat4cuda6kernelIfEEvPT_", "_ZN3cub6kernelIfEEvPT_"),
    )
    assert code == 0 and "left as it is: sm_90 cub::kernel<float> spills 16 bytes" in output


def test_the_check_fails_on_narrowed_accesses(listed):
    code, output = listed("kernel<*>  3x16  1x4\n", sass=SASS.replace("LDG.E.128 R8", "LDG.E.64 R8"))
    assert code == 1
    assert "sm_90 kernel<float>: loads must have 3 x 16, has 2 x 16, 1 x 8, 1 x 2" in output
    code, output = listed("kernel<*>  -  1x4\n", sass=SASS.replace("STG.E ", "STG.E.U16 "))
    assert code == 1 and "kernel<float>: stores must have 1 x 4, has 1 x 2" in output


def test_the_check_fails_where_a_listed_kernel_is_missing(listed):
    code, output = listed("kernel<double>  1x16  -\n")
    assert code == 1 and "sm_90 kernel<double>: is in list.txt, but no kernel has this name" in output


def test_the_check_fails_on_a_kernel_without_loads(listed):
    code, output = listed("", sass=SASS.replace("LDG", "LDL"))
    assert code == 1 and "sm_90 kernel<float>: no load from global memory" in output


def test_the_check_fails_where_there_is_nothing_to_check(run):
    done = run("check")
    assert done.returncode == 1 and "has no kernels; build with CUDA first" in done.stderr


# The first four follow from the limits in NVIDIA's guides: 65536 registers for 2048 threads, and blocks of
# 48 KB and 1 KB more in shared memory of 164, 228 and 100 KB. The others are cuda_occupancy.h's, of CUDA 13.
@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        ("sm_90", 256, 32, 0, 8),
        ("sm_80", 256, 16, 48 * 1024, 3),
        ("sm_90", 256, 16, 48 * 1024, 4),
        ("sm_86", 256, 16, 48 * 1024, 2),
        ("sm_80", 1024, 64, 0, 1),
        ("sm_80", 256, 41, 24776, 5),
        ("sm_80", 256, 64, 41192, 3),
        ("sm_89", 256, 202, 44, 1),
        ("sm_90", 256, 48, 41192, 5),
        ("sm_100", 256, 65, 24776, 3),
        ("sm_120", 128, 33, 0, 12),
    ],
)
def test_blocks_on_an_sm(arch, threads, registers, shared, blocks):
    assert kernel_facts.blocks_at_once(arch, registers, shared, threads) == blocks


def test_launches_are_what_occupancy_is_computed_for():
    """Blocks of kThreads threads, started in one place, which asks for no dynamic shared memory."""
    launch = (ROOT / "cuda/launch.cuh").read_text()
    assert f"constexpr int kThreads = {kernel_facts.THREADS};" in launch
    sources = "".join(path.read_text() for path in (ROOT / "cuda").iterdir())
    assert sources.count("cudaLaunchKernel") == 1 and "<<<" not in sources
    assert "dynamicSmemBytes" not in sources and not re.search(r"extern\s+__shared__", sources)


def test_every_line_of_the_list_can_be_read():
    for pattern, loads, stores in kernel_resources.listed_kernels():
        assert "_kernel<" in pattern
        assert all(re.fullmatch(r"-|\d+x\d+", least) for least in (loads, stores)), pattern
        assert (loads, stores) != ("-", "-"), pattern
