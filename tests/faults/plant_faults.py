"""Plants mistakes in the CUDA kernels, one at a time: do the tests of the emulated kernels find them?

    make faults                                      all of faults.toml
    make faults ARGS="prefix-barrier group-tail"     some, by name
    make faults ARGS="--jobs 4"
    make faults ARGS=--list                          what there is

Each mistake is made in a copy of the sources. Every test program that includes the changed file is built
from it and run, the smaller first, until one fails. A mistake that does not compile is an error of the list.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.toml")
SOURCES = ("cuda", "csrc/torchqat/math", "tests/cpp")
FOLDERS = ("cuda", "csrc", "tests/cpp", "tests/cpp/emu")  # where includes are looked for
EMULATOR = ("emu/engine.cpp", "emu/fiber.cpp")
# Those of tests/cpp/CMakeLists.txt, but quick to compile, since a program is built for one mistake and run
# once: not optimized, without UBSan's checks of every pointer, and with one dtype.
FLAGS = (
    "-std=c++20 -O0 -w -fno-omit-frame-pointer -fno-strict-aliasing -ffp-contract=off "
    "-fsanitize=address,undefined -fno-sanitize-recover=all "
    "-fno-sanitize=null,object-size,pointer-overflow,vptr -DTORCHQAT_STORAGE_TYPES=c10::Half"
).split()


class Problem(Exception):
    """What is wrong with the list, or with the tree, in a sentence."""


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...] = ()  # where not all that include the file need be asked

    def programs(self) -> list[str]:
        """The sources of the test programs that may find it, the smaller first."""
        return sorted(
            self.tests or tests_of(self.file), key=lambda test: (ROOT / "tests/cpp" / test).stat().st_size
        )

    def planted(self, source: str) -> str:
        if (count := source.count(self.text)) != 1:
            raise Problem(f"{self.name}: its text occurs {count} times in {self.file}, not once")
        return source.replace(self.text, self.replacement)


def read_faults(path: Path = LIST) -> list[Fault]:
    return [Fault(**entry) for entry in tomllib.loads(path.read_text())["fault"]]


@functools.cache
def included(file: Path) -> frozenset[Path]:
    """The files of the tree that a file includes, and those that these include, and itself."""
    files = {file}
    for name in re.findall(r'^\s*#include\s*["<]([^">]+)[">]', file.read_text(), re.MULTILINE):
        found = next((path for folder in FOLDERS if (path := ROOT / folder / name).is_file()), None)
        if found is not None:
            files |= included(found)
    return frozenset(files)


def tests_of(file: str) -> list[str]:
    """The sources of test programs that include a file."""
    paths = sorted((ROOT / "tests/cpp").glob("test_*_kernels.cpp")) + [ROOT / "tests/cpp/test_emulator.cpp"]
    return [path.name for path in paths if ROOT / file in included(path)]


def headers_and_libraries() -> tuple[list[str], list[str]]:
    """What the compiler needs to know of torch's headers and of GoogleTest, installed or fetched by CMake."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Problem("torch is not installed for this Python; `make faults` uses the one of .venv")
    headers = ["-isystem", str(Path(torch.origin).parent / "include")]
    fetched = ROOT / "build/googletest"
    libraries = [str(path) for name in ("gtest_main", "gtest") for path in ROOT.glob(f"build/**/lib{name}.a")]
    if len(libraries) != 2:
        if not Path("/usr/include/gtest/gtest.h").exists():
            raise Problem(
                "GoogleTest is missing: install it (apt install libgtest-dev), or run make test once"
            )
        return headers, ["-lgtest_main", "-lgtest", "-lpthread"]
    return [*headers, "-isystem", str(fetched / "googletest/include")], [*libraries, "-lpthread"]


@dataclass(frozen=True)
class Outcome:
    failed: bool
    how: str
    seconds: float


class Workshop:
    """Builds and runs test programs in copies of the sources."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.compiler = os.environ.get("CXX", "c++")
        if not shutil.which(self.compiler):
            raise Problem(f"there is no compiler {self.compiler}; CXX names another")
        self.headers, self.libraries = headers_and_libraries()
        self.objects: list[str] = []

    def copy(self, name: str) -> Path:
        tree = self.folder / name
        for folder in SOURCES:
            shutil.copytree(ROOT / folder, tree / folder)
        return tree

    def call(self, command: list[str], tree: Path, what: str):
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Problem(f"{what} does not compile:\n{done.stderr or done.stdout}")

    def compile(self, tree: Path, source: str) -> str:
        result = str(tree / (Path(source).stem + ".o"))
        folders = [f"-I{folder}" for folder in FOLDERS]
        command = [self.compiler, *FLAGS, *folders, *self.headers, "-c", f"tests/cpp/{source}", "-o", result]
        self.call(command, tree, source)
        return result

    def run(self, tree: Path, test: str, limit: float | None = None, *options: str) -> Outcome:
        program = tree / Path(test).stem
        objects = [self.compile(tree, test), *self.objects]
        self.call([self.compiler, *FLAGS, *objects, *self.libraries, "-o", str(program)], tree, test)
        start = time.monotonic()
        environment = {**os.environ, "ASAN_OPTIONS": "symbolize=0:detect_leaks=0"}
        try:
            done = subprocess.run(
                [str(program), "--gtest_brief=0", *options],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(True, f"hang, no end in {limit:.0f} s", time.monotonic() - start)
        how = "" if done.returncode == 0 else reason(done)
        return Outcome(done.returncode != 0, how, time.monotonic() - start)


def reason(done: subprocess.CompletedProcess) -> str:
    """The test that failed, and what the sanitizers said."""
    begun = re.findall(r"^\[ RUN      \] (\S+)", done.stdout, re.MULTILINE)
    failed = re.findall(r"^\[  FAILED  \] ([^\s,]+)", done.stdout, re.MULTILINE)
    test = failed[0] if failed else begun[-1] if begun else "no test"
    if found := re.search(r"ERROR: AddressSanitizer: (\S+)|runtime error: (.*)", done.stderr):
        return f"{test}: {found[1] or found[2]}"
    if done.returncode < 0:
        return f"{test}: signal {-done.returncode}"
    if found := re.search(r'exception with description "(.*)', done.stdout):
        return f"{test}: {found[1]}"
    return test


class Checks:
    """Whether the tests find a fault. A program has to pass without it first."""

    def __init__(self, workshop: Workshop):
        self.workshop = workshop
        self.tree = workshop.copy("unchanged")
        workshop.objects = [workshop.compile(self.tree, source) for source in EMULATOR]
        self.unchanged: dict[str, Future[float]] = {}
        self.lock = Lock()

    def seconds(self, test: str) -> float:
        """How long a program runs without any fault."""
        with self.lock:
            mine = test not in self.unchanged
            future = self.unchanged.setdefault(test, Future())
        if mine:
            try:
                outcome = self.workshop.run(self.tree, test)
                if outcome.failed:
                    raise Problem(f"without any fault {test} fails already: {outcome.how}")
                print(f"{test} passes without any fault ({outcome.seconds:.0f} s)", flush=True)
                future.set_result(outcome.seconds)
            except BaseException as error:  # whatever it is, those who wait for the result must hear of it
                future.set_exception(error)
        return future.result()

    def check(self, fault: Fault) -> tuple[str, str]:
        tree = self.workshop.copy(fault.name)
        source = tree / fault.file
        source.write_text(fault.planted(source.read_text()))
        try:
            for test in fault.programs():
                outcome = self.workshop.run(tree, test, 60 + 10 * self.seconds(test), "--gtest_fail_fast")
                if outcome.failed:
                    return "caught", outcome.how
            return "SURVIVED", fault.what
        except Problem as problem:
            return "ERROR", str(problem)
        finally:
            shutil.rmtree(tree)


def check_all(faults: list[Fault], checks: Checks, jobs: int) -> int:
    width = max(len(fault.name) for fault in faults)
    caught = 0
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(checks.check, faults)
        try:
            for number, (fault, (state, how)) in enumerate(zip(faults, results, strict=True), 1):
                caught += state == "caught"
                print(f"[{number}/{len(faults)}] {fault.name:{width}} {state}: {how}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"faults caught: {caught}/{len(faults)}")
    return 0 if caught == len(faults) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults of the list; all where none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print what there is to plant, and plant nothing")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    faults = read_faults()
    if unknown := set(arguments.names) - {fault.name for fault in faults}:
        raise Problem(f"no such faults: {', '.join(sorted(unknown))}; --list prints all names")
    if arguments.list:
        print("\n".join(f"{fault.name}: {fault.what}" for fault in faults))
        return 0
    if arguments.names:
        faults = [fault for fault in faults if fault.name in arguments.names]
    for fault in faults:
        fault.planted((ROOT / fault.file).read_text())
    with tempfile.TemporaryDirectory(prefix="torchqat-faults-") as folder:
        return check_all(faults, Checks(Workshop(Path(folder))), arguments.jobs)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        sys.exit(f"torchqat: {problem}")
    except KeyboardInterrupt:
        sys.exit("torchqat: interrupted; the checkout is as it was")
