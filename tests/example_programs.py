"""What tests of the programs in examples/ share."""

import contextlib
import gzip
import importlib
import json
import signal
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextlib.contextmanager
def imported(name, monkeypatch):
    """An example's module, imported as the script sees it, with the process left as it was."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delenv("TORCHQAT_DATA", raising=False)
    yield importlib.import_module(name)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_main(module, words, monkeypatch, capsys):
    """Runs an example in this process; returns its exit code, its output and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    try:
        module.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@contextlib.contextmanager
def stopped_after(checkpoints, example, monkeypatch):
    """Ctrl-C right after so many checkpoints have been written."""
    checkpoint = importlib.import_module("checkpoint")  # the one that the example imports
    save, left = checkpoint.save, [checkpoints]

    def save_then_stop(*args, **state):
        save(*args, **state)
        left[0] -= 1
        if left[0] == 0:
            raise example.ending.Stopped(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_then_stop)
        yield


def contents_of_table(out):
    """What must be the same when the numbers are: all results but for the time, and the float networks."""
    found = {}
    for path in sorted(out.glob("seed-*/*/metrics.json")):
        found[path.relative_to(out)] = json.loads(path.read_text()) | {"seconds": None}
    return found, [path.read_bytes() for path in sorted(out.glob("seed-*/float/float.tqat"))]


def one_line_of(program, stderr, *parts):
    """Whether a program said what is wrong in one line that holds these parts."""
    assert stderr.startswith(program) and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr
    return True


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_idx_files(folder, count=20, side=28, suffix=".gz", labels=range(10)):
    """A tiny MNIST in the format of the real one: noise, and a bright square whose place tells the class."""
    folder.mkdir(parents=True)
    pack = gzip.compress if suffix else bytes
    for part in ("train", "t10k"):
        sizes = b"".join(n.to_bytes(4, "big") for n in (count, side, side))
        classes = bytes(labels[i % len(labels)] for i in range(count))
        images = torch.randint(100, (count, side, side), dtype=torch.uint8)
        for image, label in zip(images, classes, strict=True):
            row, column = 12 * (label // 5), 5 * (label % 5)
            image[row + 4 : row + 12, column : column + 6] = 255
        images = b"\x00\x00\x08\x03" + sizes + images.numpy().tobytes()
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
        classes = b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + classes
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(classes))
