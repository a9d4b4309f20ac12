"""torchqat as C++ projects find it: in the build folder, in an installation and in an installed wheel."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchqat
import torchqat.__main__
from cmake_projects import CMAKE, CXX, ROOT, compile_project, configure, folder_of_build, run
from torch import nn

TORCH = Path(torch.__file__).parent
MINOR = ".".join(torch.__version__.split(".")[:2])

pytestmark = pytest.mark.skipif(not CMAKE or not shutil.which(CXX), reason="no cmake, or no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("consumers")


@pytest.fixture(scope="module")
def build_folder():
    return folder_of_build()


@pytest.fixture(scope="module")
def prefix(build_folder, folder):
    run(CMAKE, "--install", build_folder, "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="module")
def site(build_folder, folder):
    """A folder of Python packages: torch, and torchqat from a wheel, which pip builds in a copy of the build
    folder, so that the objects that are there need not be compiled again."""
    pytest.importorskip("setuptools", minversion="77.0.3")
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
    shutil.rmtree(objects)
    (wheel,) = (folder / "wheel").glob("torchqat-*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    for name in ("torch", "nvidia"):
        (folder / "site" / name).symlink_to(TORCH.parent / name)
    return folder / "site"


@pytest.fixture(scope="module")
def libtorch(folder):
    """LibTorch for the CPU as its zip has it: this torch without its CUDA half and without Python."""
    (folder / "libtorch/lib").mkdir(parents=True)
    for part in ("include", "share"):
        (folder / "libtorch" / part).symlink_to(TORCH / part)
    for file in (TORCH / "lib").iterdir():
        if "cuda" not in file.name and "python" not in file.name and file.name != "libtorch.so":
            (folder / "libtorch/lib" / file.name).symlink_to(file)
    # libtorch_cpu.so of a CUDA build asks for its profiler.
    (folder / "nvidia").symlink_to(TORCH.parent / "nvidia")
    # libtorch.so only stands for the others; the one of a CUDA build asks for CUDA's.
    library = folder / "libtorch/lib/libtorch.so"
    links = [f"-L{library.parent}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    run(CXX, "-shared", "-Wl,-soname,libtorch.so", "-o", library, *links)
    (folder / "libtorch/build-version").write_text(f"{MINOR}.0+cpu\n")
    return folder / "libtorch"


def output_of(build, program="consumer", **kwargs):
    """Builds the program and runs it with an empty environment."""
    compile_project(build, program)
    return subprocess.run(
        [build / program], env={}, check=True, capture_output=True, text=True, **kwargs
    ).stdout


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


@pytest.mark.slow
def test_the_program_of_the_readme_trains_for_python(build_folder, folder):
    (text,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "readme.cpp").write_text(text)
    build = folder / "of-readme"
    configure(build, f"-DTorchQAT_DIR={build_folder}", f"-DREADME_PROGRAM={folder}/readme.cpp")
    printed = output_of(build, "readme", cwd=folder).split()
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    model = torchqat.prepare(nn.Sequential(*layers), act_bits=2)
    optimizer = torchqat.optim.BCGD(torchqat.optim.param_groups(model, weight_bits=1), lr=0.05, momentum=0.9)
    torchqat.load_checkpoint(folder / "checkpoint.safetensors", model, optimizer)
    assert torch.tensor([float(value) for value in printed[:2]]).allclose(model[0].weight.unique(), atol=1e-4)
    assert optimizer.state[model[0].weight]["latent"].unique().numel() == model[0].weight.numel()
    assert len(optimizer.state) == 7


@pytest.mark.slow
def test_a_wheel_looks_for_libraries_beside_it_only(site):
    folders = re.findall(r"runpath: \[(.*?)\]", run("readelf", "-d", site / "torchqat/lib/libtorchqat.so"))
    assert all(name.startswith("$ORIGIN/../../") for name in folders[0].split(":"))
    for file in (site / "torchqat/lib/cmake").rglob("*.cmake"):
        assert str(TORCH.parent) not in file.read_text(), file


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
        of_torch = re.findall(r"lib(?:torch|c10)(?:_\w+)?\.so => (\S+)", linked)
        assert sorted(of_torch) == [f"{libtorch}/lib/lib{name}.so" for name in ("c10", "torch", "torch_cpu")]


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
    built = torchqat.build_info()["torch"]
    assert (
        f"This TorchQAT was built against torch {built}, but the torch in {other} is 1.0.0. "
        "Rebuild TorchQAT against it, or name another torch with -DTORCHQAT_TORCH_DIR=<folder>."
    ) in output


FIND = f"""
cmake_minimum_required(VERSION 3.25)
include("{ROOT}/cmake/TorchQATTorch.cmake")
torchqat_find_torch("${{LOADS}}")
if(TORCHQAT_TORCH_PROBLEM)
  message(FATAL_ERROR "${{TORCHQAT_TORCH_PROBLEM}}")
endif()
foreach(name DIR VERSION MINOR CUDA)
  message("<${{TORCHQAT_TORCH_${{name}}}}>")
endforeach()
"""


@pytest.fixture
def found(tmp_path):
    """Folder, version, minor version and CUDA of the torch that is found, for options; LOADS is the folder
    that the library would load it from."""
    script = tmp_path / "find.cmake"
    script.write_text(FIND)

    def find(*options, CMAKE_PREFIX_PATH="", **kwargs):
        options = [f"-D{option}" for option in options]
        output = run(CMAKE, *options, "-P", script, CMAKE_PREFIX_PATH=CMAKE_PREFIX_PATH, **kwargs)
        return output if kwargs.get("fails") else re.findall("<(.*?)>", output)

    return find


def python_with(path, folder):
    """A Python that would import torch from a folder."""
    path.write_text(f"#!/bin/sh\necho {folder}\n")
    path.chmod(0o755)
    return path


def test_torch_is_looked_for_from_the_named_to_the_guessed(found, tmp_path):
    named, loads, prefixed, package = (str(a_torch(tmp_path / name)) for name in ("a", "b", "c", "d"))
    by_name, by_library = f"TORCHQAT_TORCH_DIR={named}", f"LOADS={loads}"
    by_python = f"Python_EXECUTABLE={python_with(tmp_path / 'python', package)}"
    by_prefix = f"CMAKE_PREFIX_PATH=/usr;{prefixed}"
    assert found(by_name, by_python, by_prefix, by_library)[0] == named
    assert found(by_python, by_prefix, by_library)[0] == package
    assert found(by_prefix, by_library)[0] == prefixed
    assert found(by_library)[0] == loads
    assert found(f"LOADS={tmp_path}/nothing", VIRTUAL_ENV=sys.prefix)[0] == str(TORCH)


def test_a_prefix_names_torch_as_python_prints_it_and_as_find_package_keeps_it(found, tmp_path):
    torch_folder = str(a_torch(tmp_path / "torch"))
    assert found(f"CMAKE_PREFIX_PATH={torch_folder}/share/cmake")[0] == torch_folder
    assert found(f"Torch_DIR={torch_folder}/share/cmake/Torch")[0] == torch_folder
    assert found(CMAKE_PREFIX_PATH=f"/usr:{torch_folder}")[0] == torch_folder


def test_a_python_without_torch_is_passed_over(found, tmp_path):
    python, loads = python_with(tmp_path / "python", ""), a_torch(tmp_path / "torch")
    assert found(f"Python_EXECUTABLE={python}", f"LOADS={loads}")[0] == str(loads)


def test_no_torch_is_one_sentence_with_every_way_to_name_it(found):
    output = found("CMAKE_DISABLE_FIND_PACKAGE_Python=ON", fails=True)
    assert (
        "torchqat: no torch was found; name its folder (<site-packages>/torch, or LibTorch) with "
        "-DTORCHQAT_TORCH_DIR=<folder>, a Python that has it with -DPython_EXECUTABLE=<python>, or add it to "
        "CMAKE_PREFIX_PATH."
    ) in output


def test_a_project_that_can_do_without_is_not_stopped_where_there_is_no_torch(build_folder, tmp_path):
    lists = 'find_package(TorchQAT QUIET)\nmessage("<${TorchQAT_FOUND}>")\n'
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.25)\nproject(p CXX)\n{lists}")
    options = f"-DTorchQAT_DIR={build_folder}", f"-DTORCHQAT_TORCH_DIR={tmp_path}"
    assert "<0>" in run(CMAKE, "-S", tmp_path, "-B", tmp_path / "build", *options)


@pytest.mark.parametrize(
    ("file", "text", "version", "cuda"),
    [
        (
            "version.py",
            "__version__ = '2.15.0+cu132'\ncuda: Optional[str] = '13.2'\n",
            "2.15.0+cu132",
            "13.2",
        ),
        ("version.py", "__version__ = '2.15.0'\ncuda: Optional[str] = None\n", "2.15.0", ""),
        ("build-version", "2.15.0+cu128\n", "2.15.0+cu128", "12.8"),
        ("build-version", "2.15.0+cpu\n", "2.15.0+cpu", ""),
        ("nothing", "", "2.15.1", ""),
    ],
)
def test_the_version_of_torch_is_read(found, tmp_path, file, text, version, cuda):
    folder = a_torch(tmp_path / "torch", "2.15.1")
    (folder / file).write_text(text)
    assert found(f"TORCHQAT_TORCH_DIR={folder}")[1:] == [version, "2.15", cuda]


def test_the_version_of_this_torch_is_read(found):
    version = [str(torch.__version__), MINOR, torch.version.cuda or ""]
    assert found(f"TORCHQAT_TORCH_DIR={TORCH}") == [str(TORCH), *version]


# --------------------------------------------------------------------------------------- python -m torchqat


def test_the_prefix_path_is_that_of_the_library(prefix):
    """From the command; it is the attribute too, and both follow TORCHQAT_LIBRARY."""
    (library,) = prefix.rglob("libtorchqat.so")
    environment = {"TORCHQAT_LIBRARY": str(library), "PYTHONPATH": str(ROOT / "python")}
    printed = run(sys.executable, "-m", "torchqat", "--cmake-prefix-path", **environment)
    assert printed == f"{prefix};{torch.utils.cmake_prefix_path}"
    ours, theirs = (Path(path) for path in torchqat.cmake_prefix_path.split(";"))
    assert theirs == Path(torch.utils.cmake_prefix_path)
    assert any((ours / place / "TorchQATConfig.cmake").exists() for place in (".", "lib/cmake/TorchQAT"))


@pytest.fixture
def ask(monkeypatch, capsys):
    """Exit code and output of `python -m torchqat`, in this process."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["torchqat", *arguments])
        try:
            code = torchqat.__main__.main() or 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return main


def test_the_version_is_printed(ask):
    assert ask("--version") == (0, f"{torchqat.__version__}\n", "")


def test_help_says_what_can_be_asked(ask):
    assert "--cmake-prefix-path" in ask("--help")[1]


@pytest.mark.parametrize("arguments", [[], ["--prefix"], ["--version", "--cmake-prefix-path"]])
def test_other_questions_are_answered_by_the_usage(ask, arguments):
    code, output, error = ask(*arguments)
    assert (code, output) == (2, "") and error.startswith("usage: python -m torchqat ")


# ----------------------------------------------------------------------------------- the library, the headers


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


def functions_at_namespace_level(text):
    """The declarations of functions in a header that are not in a class."""
    text = re.sub(r"//.*|^ *#.*|= \{\}|namespace [\w:]* ?{", "", text, flags=re.MULTILINE)
    while text != (shorter := re.sub(r"{[^{}]*}", ";", text)):
        text = shorter
    statements = [" ".join(statement.split()) for statement in re.split(r"[;}]", text)]
    return [s for s in statements if re.match(r"\w[^(=]*\w\(", s) and not s.startswith("TORCH_MODULE(")]


@pytest.mark.parametrize("header", PUBLIC)
def test_a_program_can_link_what_a_public_header_declares(header):
    for function in functions_at_namespace_level((SOURCES / header).read_text()):
        assert re.match(r"(TORCHQAT_HD )?(template|inline|constexpr|TORCHQAT_API)\b", function), function


@pytest.fixture(scope="module")
def compiled(prefix, request):
    """What the compiler says of each installed header that is asked for, when a file includes it alone."""
    tests = [test for test in request.session.items if test.name.startswith("test_a_header_compiles_alone")]
    torch_headers = [f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include"]
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-xc++"]

    def check(header):
        command = [CXX, *options, *torch_headers, f"-I{prefix}/include", "-"]
        text = f"#include <torchqat/{header}>\n"
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(check, name) for name in (test.callspec.params["header"] for test in tests)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("header", PUBLIC)
def test_a_header_compiles_alone(compiled, header):
    assert compiled[header].result() == ""
