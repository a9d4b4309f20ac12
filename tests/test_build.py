"""How torchqat is built, found and loaded, and what it says where something is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat
from cmake_projects import folder_of_build
from torchqat import _library

ROOT = Path(__file__).parents[1]
BUILT = {"torchqat": "0.1.0", "torch": "2.15.0+cu132", "cuda": "13.0"}


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(torchqat.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------------------------------- loading the library


def test_build_info_says_what_the_library_is():
    info = torchqat.build_info()
    assert info["torchqat"] == torchqat.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cuda"] is None or info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])
    assert Path(info["library"]).is_file()


def test_build_info_is_a_copy():
    torchqat.build_info().clear()
    assert torchqat.build_info()


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_another_commit_is_configured_anew():
    """Else build_info() would name the commit at which the folder was first configured."""
    folder = folder_of_build()
    rules = folder / "build.ninja"
    if f"={ROOT}\n" not in (folder / "CMakeCache.txt").read_text() or not rules.exists():
        pytest.skip("the library was not built here, by ninja")
    for name in ("HEAD", "logs/HEAD"):
        command = ["git", "rev-parse", "--git-path", name]
        path = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        assert f" {ROOT / path} " in rules.read_text()


def test_another_torch_is_named_in_the_error():
    with pytest.raises(
        ImportError, match=r"built against torch 2\.15\.0\+cu132, but torch 2\.11\.0\+cu130 is"
    ):
        _library.check_torch(BUILT, "2.11.0+cu130", "13.0")


@pytest.mark.parametrize(("cuda", "named"), [(None, "is a CPU-only build"), ("12.8", "is for CUDA 12.8")])
def test_a_torch_without_our_cuda_is_named_in_the_error(cuda, named):
    with pytest.raises(ImportError, match=f"built with CUDA 13.0 .* {named}"):
        _library.check_torch(BUILT, "2.15.0", cuda)


def test_a_patch_release_and_another_minor_cuda_are_fine():
    _library.check_torch(BUILT, "2.15.1+cu130", "13.0")
    _library.check_torch({**BUILT, "cuda": None}, "2.15.0+cpu", None)


def test_the_library_is_not_loaded_into_another_torch(tmp_path):
    library = tmp_path / "libtorchqat.so"
    library.write_bytes(b"")
    facts = '{"torchqat": "0.1.0", "torch": "1.0.0", "cuda": null}'
    library.with_suffix(".json").write_text(facts)
    result = run_python("import torchqat", TORCHQAT_LIBRARY=str(library))
    assert result.returncode != 0
    assert "ImportError: torchqat 0.1.0 was built against torch 1.0.0, but torch" in result.stderr


def test_a_library_that_is_not_there_is_named(tmp_path):
    result = run_python("import torchqat", TORCHQAT_LIBRARY=str(tmp_path / "nothing.so"))
    assert f"TORCHQAT_LIBRARY names a file that is not there: {tmp_path}/nothing.so" in result.stderr


def test_graphs_compiled_with_another_build_are_not_used(tmp_path):
    """torch keeps compiled graphs on disk: ours may call operators that another build does not have."""
    info = torchqat.build_info()
    for file in (info["library"], Path(info["library"]).with_suffix(".json")):
        shutil.copy2(file, tmp_path)
    library = tmp_path / Path(info["library"]).name
    code = """
import torch, torchqat
from torch._dynamo.utils import counters
act = torchqat.nn.StaircaseReLU(2)
torch.compile(act)(torch.randn(4, requires_grad=True)).sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])"""

    def hits():
        environment = dict(TORCHQAT_LIBRARY=str(library), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        result = run_python(code, **environment)
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    assert hits() == 0
    assert hits() > 0
    os.utime(library, ns=(0, 0))
    assert hits() == 0


def test_import_needs_torch_alone():
    code = """
import sys, importlib.metadata, torch
import torch._dynamo, torch.fx, torch.export  # torch's own dependencies, whenever it loads them
before = {name.split(".")[0] for name in sys.modules}
import torchqat
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - {"torchqat"} - sys.stdlib_module_names))
"""
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ------------------------------------------------------------------------------------------- a CPU-only build


def kernels(key):
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qat::")}
    return {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


def test_every_operator_answers_to_a_cuda_tensor():
    assert kernels("CPU")
    assert kernels("CPU") == kernels("CUDA")


@pytest.mark.skipif(torchqat.build_info()["cuda"] is not None, reason="this build has CUDA kernels")
def test_a_cpu_only_build_says_so_to_a_cuda_tensor():
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        NotImplementedError, match=r"^staircase_relu: got a CUDA tensor, .* CPU-only build.*TORCHQAT_CUDA=on"
    ):
        torch.ops.qat.staircase_relu.default.redispatch(key, torch.ones(3), torch.tensor(1.0), 2)


# ---------------------------------------------------------------------------------- what make says is missing


@pytest.fixture
def checkout(tmp_path):
    """A checkout without an environment: the scripts, and a folder `bin` that comes first in the PATH."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(path, script):
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


def build(checkout, **environment):
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [checkout / "scripts/build.sh"],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_fails(result, line):
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith(f"torchqat: {line}"), result.stderr


def test_another_machine_is_refused(checkout):
    stand_in(checkout / "bin/uname", '[ "$1" = -s ] && echo Darwin || echo arm64')
    assert_fails(build(checkout), "torchqat supports Linux on x86-64; this is Darwin on arm64.")


def test_a_missing_compiler_is_named(checkout):
    assert_fails(
        build(checkout, CXX="/no/compiler"), "no C++20 compiler with OpenMP: '/no/compiler' is missing or too"
    )


def test_a_compiler_without_cpp20_is_named(checkout):
    old = stand_in(checkout / "bin/old", "exit 1")
    assert_fails(build(checkout, CXX=old), f"no C++20 compiler with OpenMP: '{old}'")


def test_an_old_python_is_named(checkout):
    assert_fails(
        build(checkout, PYTHON="/bin/false"), "no Python 3.11 or newer; /bin/false is missing or older."
    )


def test_a_python_without_venv_is_named(checkout):
    python = stand_in(checkout / "bin/python", '[[ "$*" != *ensurepip* ]]')
    assert_fails(
        build(checkout, PYTHON=python), f"{python} cannot make virtual environments. Install its venv"
    )


def test_a_failing_pip_is_explained(checkout):
    script = """
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip install"*) exit 1 ;;
esac"""
    python = stand_in(checkout / "bin/python", script)
    assert_fails(build(checkout, PYTHON=python), "pip could not install the packages of constraints.txt")


# ------------------------------------------------------------------------------------------------------ CMake


@pytest.fixture
def cmake(tmp_path):
    """Runs CMake on this checkout, if there is a CMake; what it finds itself can be narrowed by options."""
    program = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("cmake is not installed")

    def configure(*options, source=ROOT):
        command = [
            program,
            "-S",
            source,
            "-B",
            tmp_path / "build",
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    return configure


def without_nvcc():
    """Options that hide every nvcc of this machine from CMake."""
    folders = [*os.environ["PATH"].split(":"), "/usr/local/bin", "/usr/local/cuda/bin"]
    hidden = dict.fromkeys(folder for folder in folders if (Path(folder) / "nvcc").exists())
    return f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}", f"-DCMAKE_CXX_COMPILER={shutil.which('c++')}"


@pytest.fixture
def cuda_torch():
    if not torch.version.cuda:
        pytest.skip("this torch is a CPU-only build")


def test_pip_ends_in_one_line_where_cmake_fails(cmake, tmp_path):
    pytest.importorskip("setuptools")
    (tmp_path / "file").touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, "TORCHQAT_BUILD_DIR": str(tmp_path / "file/build")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert_fails(result, "the build failed, its messages are above: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("version", ["65.5.0", "77.0.2"])
def test_an_old_setuptools_is_one_sentence(tmp_path, version):
    """A new virtual environment of Python 3.11 has 65.5, which has no bdist_wheel."""
    for module in ("setuptools", "setuptools/command", "setuptools/command/build_ext"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("class build_ext: pass\n")
    (tmp_path / "setuptools/__init__.py").write_text(
        f"__version__ = {version!r}\nDistribution = object\ndef Extension(): pass\nsetup = Extension\n"
    )
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert result.stderr == (
        f"torchqat: setuptools must be 77.0.3 or newer and older than 82, found {version}; "
        "pip install 'setuptools>=77.0.3,<82' and try again\n"
    )


def test_the_readme_has_the_bounds_of_setuptools():
    (bounds,) = re.findall(r'"(setuptools>[^"]*)"', (ROOT / "pyproject.toml").read_text())
    readme = (ROOT / "README.md").read_text()
    for command in ("\n`pip install --no-build-isolation .`", "\npip install --no-build-isolation ."):
        before, found, _ = readme.partition(command)
        assert found and bounds in before[-800:]


def test_no_nvcc_is_an_error_where_cuda_is_asked_for(cmake, cuda_torch):
    code, output = cmake("-DTORCHQAT_CUDA=on", *without_nvcc())
    assert code != 0
    assert "TORCHQAT_CUDA=on, but no nvcc was found. Install the CUDA toolkit" in output


def test_no_nvcc_is_a_warning_by_default(cmake, cuda_torch):
    code, output = cmake("-DTORCHQAT_CUDA=auto", *without_nvcc())
    assert code == 0, output
    assert "building WITHOUT CUDA kernels, because no nvcc was found. Install the CUDA toolkit" in output


def test_an_nvcc_of_another_cuda_is_named(cmake, cuda_torch, tmp_path):
    nvcc = stand_in(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 9.1, V9.1.0'")
    code, output = cmake("-DTORCHQAT_CUDA=on", f"-DCMAKE_CUDA_COMPILER={nvcc}")
    assert code != 0
    assert f"{nvcc} is of CUDA '9.1', and torch {torch.__version__} needs CUDA" in output


def test_cuda_must_be_auto_on_or_off(cmake):
    code, output = cmake("-DTORCHQAT_CUDA=yes")
    assert code != 0
    assert "TORCHQAT_CUDA must be auto, on or off, got 'yes'" in output


def test_kernels_are_tested_on_a_device_only_where_they_are_built(cmake):
    code, output = cmake("-DTORCHQAT_CUDA=off", "-DTORCHQAT_DEVICE_TESTS=ON")
    assert code != 0
    assert "TORCHQAT_DEVICE_TESTS=ON needs the CUDA kernels" in output


def test_a_folder_that_is_not_torch_is_named(cmake, tmp_path):
    code, output = cmake(f"-DTORCHQAT_TORCH_DIR={tmp_path}")
    assert code != 0
    assert f"{tmp_path} is not the folder of a torch: a Python package's" in output
