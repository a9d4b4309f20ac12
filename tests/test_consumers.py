"""torchqat as C++ projects find it: in the build folder, in an installation and in an installed wheel."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchqat

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
MINOR = ".".join(torch.__version__.split(".")[:2])
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
CXX = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(not CMAKE or not shutil.which(CXX), reason="no cmake, or no C++ compiler")


def run(*command, fails=False, **environment):
    """What the command prints, in one line; it must succeed, or fail where that is expected."""
    environment = {**os.environ, "PATH": PATH, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = " ".join((result.stdout + result.stderr).split())
    assert (result.returncode != 0) == fails, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("consumers")


@pytest.fixture(scope="module")
def build_folder():
    """Where the library under test was built: the folder that it lies in, or `build` of this checkout."""
    for place in (Path(torchqat.build_info()["library"]).parent, ROOT / "build"):
        facts, mine = place / "libtorchqat.json", Path(torchqat.build_info()["library"]).with_suffix(".json")
        if (place / "CMakeCache.txt").is_file() and facts.is_file() and facts.read_text() == mine.read_text():
            return place
    pytest.skip("the folder that this library was built in is not here")


@pytest.fixture(scope="module")
def prefix(build_folder, folder):
    run(CMAKE, "--install", build_folder, "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="module")
def site(build_folder, folder):
    """A folder of Python packages: torch, and torchqat from a wheel. The wheel is built as pip does it, from the objects
    that are there, in a copy of the build folder, so that nothing is compiled again."""
    pytest.importorskip("setuptools")
    objects = folder / "objects"
    shutil.copytree(
        build_folder, objects, ignore=shutil.ignore_patterns("CMakeCache.txt", "tests", "googletest*")
    )
    options = dict(
        re.findall(r"^(TORCHQAT_CUDA\w*):STRING=(.*)$", (build_folder / "CMakeCache.txt").read_text(), re.M)
    )
    (folder / "setup.cfg").write_text(
        f"[build]\nbuild_base = {folder}/base\n[egg_info]\negg_base = {folder}\n"
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(
        *[*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder / "wheel", ROOT],
        **options,
        TORCHQAT_BUILD_DIR=str(objects),
        DIST_EXTRA_CONFIG=str(folder / "setup.cfg"),
    )
    (wheel,) = (folder / "wheel").glob("torchqat-*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    (folder / "site/torch").symlink_to(TORCH)
    return folder / "site"


@pytest.fixture(scope="module")
def libtorch(folder):
    """LibTorch for the CPU as its zip has it: this torch without its CUDA half and without anything of Python."""
    (folder / "libtorch/lib").mkdir(parents=True)
    for part in ("include", "share"):
        (folder / "libtorch" / part).symlink_to(TORCH / part)
    for file in (TORCH / "lib").iterdir():
        if "cuda" not in file.name and "python" not in file.name and file.name != "libtorch.so":
            (folder / "libtorch/lib" / file.name).symlink_to(file)
    (folder / "nvidia").symlink_to(
        TORCH.parent / "nvidia"
    )  # libtorch_cpu.so of a CUDA build asks for its profiler
    library = (
        folder / "libtorch/lib/libtorch.so"
    )  # it only stands for the others; the one of a CUDA build asks for CUDA's
    run(CXX, "-shared", "-o", library, "-Wl,--no-as-needed", f"-L{library.parent}", "-ltorch_cpu", "-lc10")
    (folder / "libtorch/build-version").write_text(f"{MINOR}.0+cpu\n")
    return folder / "libtorch"


def configure(build, *options, source=ROOT / "tests/consumer", **kwargs):
    """Configures a project in a folder, on a machine that has no CUDA toolkit."""
    hidden = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("CUDA", "CUDAToolkit")]
    if shutil.which("ccache"):
        hidden.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    return run(CMAKE, "-S", source, "-B", build, *hidden, *options, **kwargs)


def output_of(build, program="consumer"):
    """Builds the program and runs it with an empty environment."""
    run(CMAKE, "--build", build, "--target", program, CCACHE_BASEDIR=str(build.parent))
    return subprocess.run([build / program], env={}, check=True, capture_output=True, text=True).stdout


NUMBERS = "2 5 0\n"


# ------------------------------------------------------------------------------------------ the three places


@pytest.mark.slow
def test_a_program_uses_the_build_folder(build_folder, folder):
    configure(folder / "of-build", f"-DTorchQAT_DIR={build_folder}")
    assert output_of(folder / "of-build") == NUMBERS


@pytest.mark.slow
def test_a_program_uses_an_installation(prefix, folder):
    configure(folder / "of-prefix", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert output_of(folder / "of-prefix") == NUMBERS


@pytest.mark.slow
def test_a_program_that_calls_operators_by_name_keeps_the_library(prefix, folder):
    configure(folder / "of-prefix", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert output_of(folder / "of-prefix", "by_name") == f"{len(torchqat.functional.ste_names())}\n"


@pytest.mark.slow
def test_a_program_uses_an_installed_wheel(site, folder):
    environment = {"PYTHONPATH": str(site), "TORCHQAT_LIBRARY": ""}
    prefixes = run(sys.executable, "-m", "torchqat", "--cmake-prefix-path", **environment)
    assert prefixes == f"{site}/torchqat;{site}/torch/share/cmake"
    configure(folder / "of-wheel", f"-DCMAKE_PREFIX_PATH={prefixes}")
    assert output_of(folder / "of-wheel") == NUMBERS


def test_a_wheel_keeps_no_path_of_the_machine_that_built_it(site, build_folder):
    for file in (site / "torchqat").rglob("*"):
        if file.is_file():
            text = file.read_bytes()
            assert str(TORCH).encode() not in text and str(build_folder).encode() not in text, file


@pytest.mark.slow
def test_torchqat_configures_with_libtorch(libtorch, folder):
    options = [
        f"-DCMAKE_PREFIX_PATH={libtorch}",
        "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON",
        "-DTORCHQAT_CUDA=auto",
    ]
    output = configure(folder / "torchqat", *options, source=ROOT)
    assert f"building WITHOUT CUDA kernels, because torch {MINOR}.0+cpu is a CPU-only build." in output


@pytest.mark.slow
def test_a_program_uses_libtorch(libtorch, prefix, folder):
    options = [f"-DCMAKE_PREFIX_PATH={prefix};{libtorch}", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"]
    cuda = torchqat.build_info()["cuda"]
    output = configure(folder / "of-libtorch", *options, fails=bool(cuda))
    if cuda:
        assert f"built with CUDA {cuda}, but the torch {MINOR}.0+cpu in {libtorch} is not for CUDA" in output
    else:
        assert output_of(folder / "of-libtorch") == NUMBERS
        linked = run("ldd", folder / "of-libtorch/consumer")
        assert f"{libtorch}/lib/libtorch_cpu.so" in linked and f"{TORCH}/lib" not in linked


# -------------------------------------------------------------------------------------- which torch is found


def a_torch(path, version="1.0.0"):
    """A folder that looks like torch to CMake until it wants a library of it."""
    numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True))
    (path / "include/torch/headeronly").mkdir(parents=True)
    text = "".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in numbers.items())
    (path / "include/torch/headeronly/version.h").write_text(text)
    (path / "share/cmake/Torch").mkdir(parents=True)
    (path / "share/cmake/Torch/TorchConfig.cmake").touch()
    return path


def test_another_torch_is_named(build_folder, tmp_path):
    other = a_torch(tmp_path / "torch")
    output = configure(
        tmp_path / "build", f"-DTorchQAT_DIR={build_folder}", f"-DTORCHQAT_TORCH_DIR={other}", fails=True
    )
    assert (
        f"This TorchQAT was built against torch {torchqat.build_info()['torch']}, but the torch in {other} is 1.0.0. "
        "Rebuild TorchQAT against it, or name another torch with -DTORCHQAT_TORCH_DIR=<folder>."
    ) in output


@pytest.fixture
def found(tmp_path):
    """What TorchQATTorch.cmake says of torch, for options and for the folder that the library would load it from."""
    script = tmp_path / "find.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        f'include("{ROOT}/cmake/TorchQATTorch.cmake")\ntorchqat_find_torch("${{LOADS}}")\n'
        'message("${TORCHQAT_TORCH_DIR} ${TORCHQAT_TORCH_VERSION} ${TORCHQAT_TORCH_MINOR} <${TORCHQAT_TORCH_CUDA}>")\n'
    )
    return lambda *options, **kwargs: run(
        CMAKE, *[f"-D{option}" for option in options], "-P", script, **kwargs
    )


def python_with(path, folder):
    """A Python that would import torch from a folder."""
    path.write_text(f"#!/bin/sh\necho {folder}\n")
    path.chmod(0o755)
    return path


def test_torch_is_looked_for_from_the_named_to_the_guessed(found, tmp_path):
    named, loads, prefixed, package = (a_torch(tmp_path / name) for name in ("a", "b", "c", "d"))
    python = python_with(tmp_path / "python", package)
    by_python, by_prefix = f"Python_EXECUTABLE={python}", f"CMAKE_PREFIX_PATH=/usr;{prefixed}"
    assert found(f"TORCHQAT_TORCH_DIR={named}", by_python, by_prefix, f"LOADS={loads}").startswith(
        f"{named} "
    )
    assert found(by_python, by_prefix, f"LOADS={loads}").startswith(f"{package} ")
    assert found(by_prefix, f"LOADS={loads}").startswith(f"{prefixed} ")
    assert found(f"CMAKE_PREFIX_PATH={prefixed}/share/cmake").startswith(f"{prefixed} ")
    assert found(f"Torch_DIR={prefixed}/share/cmake/Torch").startswith(f"{prefixed} ")
    assert found(CMAKE_PREFIX_PATH=f"/usr:{prefixed}").startswith(f"{prefixed} ")
    assert found(f"LOADS={loads}").startswith(f"{loads} ")
    assert found(f"LOADS={tmp_path}/nothing", VIRTUAL_ENV=sys.prefix).startswith(f"{TORCH} ")


def test_a_python_without_torch_is_passed_over(found, tmp_path):
    python, loads = python_with(tmp_path / "python", ""), a_torch(tmp_path / "torch")
    assert found(f"Python_EXECUTABLE={python}", f"LOADS={loads}").startswith(f"{loads} ")


def test_no_torch_is_one_sentence_with_every_way_to_name_it(found):
    output = found("CMAKE_DISABLE_FIND_PACKAGE_Python=ON", fails=True)
    assert (
        "torchqat: no torch was found; name its folder (<site-packages>/torch, or LibTorch) with "
        "-DTORCHQAT_TORCH_DIR=<folder>, a Python that has it with -DPython_EXECUTABLE=<python>, or add it to "
        "CMAKE_PREFIX_PATH."
    ) in output


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        (
            "version.py",
            "__version__ = '2.15.0+cu132'\ncuda: Optional[str] = '13.2'\n",
            "2.15.0+cu132 2.15 <13.2>",
        ),
        ("version.py", "__version__ = '2.15.0'\ncuda: Optional[str] = None\n", "2.15.0 2.15 <>"),
        ("build-version", "2.15.0+cu128\n", "2.15.0+cu128 2.15 <12.8>"),
        ("build-version", "2.15.0+cpu\n", "2.15.0+cpu 2.15 <>"),
        ("nothing", "", "2.15.1 2.15 <>"),
    ],
)
def test_the_version_of_torch_is_read(found, tmp_path, file, text, version):
    folder = a_torch(tmp_path / "torch", "2.15.1")
    (folder / file).write_text(text)
    assert found(f"TORCHQAT_TORCH_DIR={folder}") == f"{folder} {version}"


def test_this_torch_is_read(found):
    assert (
        found(f"TORCHQAT_TORCH_DIR={TORCH}")
        == f"{TORCH} {torch.__version__} {MINOR} <{torch.version.cuda or ''}>"
    )


# -------------------------------------------------------------------------------------- python -m torchqat


def test_the_prefix_path_is_printed_and_an_attribute():
    library = Path(torchqat.build_info()["library"])
    printed = run(sys.executable, "-m", "torchqat", "--cmake-prefix-path", PYTHONPATH=str(ROOT / "python"))
    assert printed == torchqat.cmake_prefix_path
    ours, theirs = printed.split(";")
    assert theirs == torch.utils.cmake_prefix_path
    assert [
        *Path(ours).glob("TorchQATConfig.cmake"),
        *Path(ours).glob("lib/cmake/TorchQAT/TorchQATConfig.cmake"),
    ]
    assert library.is_relative_to(ours)


def test_a_library_elsewhere_has_a_prefix_of_its_own(prefix):
    library = prefix / "lib/libtorchqat.so"
    printed = run(sys.executable, "-m", "torchqat", "--cmake-prefix-path", TORCHQAT_LIBRARY=str(library))
    assert printed.split(";")[0] == str(prefix)


def test_the_version_is_printed():
    assert run(sys.executable, "-m", "torchqat", "--version") == torchqat.__version__


@pytest.mark.parametrize("arguments", [[], ["--prefix"], ["--version", "--cmake-prefix-path"]])
def test_other_questions_are_answered_by_the_usage(arguments):
    result = subprocess.run([sys.executable, "-m", "torchqat", *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("usage: python -m torchqat ")


# ------------------------------------------------------------------------------------ the library, the headers


def test_the_library_has_no_python_in_it():
    linked = run("readelf", "-d", torchqat.build_info()["library"])
    needed = re.findall(r"\(NEEDED\) Shared library: \[(\S+)\]", linked)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]


def in_cmake(name):
    (text,) = re.findall(rf"set\({name}([^)]*)\)", (ROOT / "cmake/TorchQATInstall.cmake").read_text())
    return text.split()


SOURCES = ROOT / "csrc/torchqat"
PRIVATE = in_cmake("TORCHQAT_PRIVATE_HEADERS")
PUBLIC = [
    header
    for header in sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.h"))
    if not any(header == name or header.startswith(f"{name}/") for name in PRIVATE)
]


def test_only_public_headers_are_installed(prefix):
    assert not [name for name in PRIVATE if not (SOURCES / name).exists()]
    installed = (prefix / "include").rglob("*.*")
    assert sorted(str(path.relative_to(prefix / "include/torchqat")) for path in installed) == PUBLIC


@pytest.fixture(scope="module")
def compiled(prefix):
    """What the compiler says of each installed header when a file includes it and nothing else."""
    torch_headers = [f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include"]
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-xc++"]

    def check(header):
        command = [CXX, *options, *torch_headers, f"-I{prefix}/include", "-"]
        text = f"#include <torchqat/{header}>\n"
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor(2) as pool:
        yield {header: pool.submit(check, header) for header in PUBLIC}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("header", PUBLIC)
def test_a_header_compiles_alone(compiled, header):
    assert compiled[header].result() == ""
