"""Checkpoints that survive being interrupted, and are refused when they do not fit."""

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

FORMAT = "torchqat train_classifier 1"


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message says why."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which then takes the place of `path`; removed if anything goes wrong."""
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, settings: dict, seed: int, **state) -> None:
    """Writes a checkpoint, with the state of the random generators."""
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    content = {"format": FORMAT, "settings": settings, "seed": seed, "random": random, **state}
    with written_whole(path) as temporary:
        torch.save(content, temporary)


def load(path: Path, settings: dict, seed: int) -> dict:
    """Reads a checkpoint of the same settings. Never runs code from the file (weights_only)."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    settings = {**settings, "seed": seed}
    other = {**saved["settings"], "seed": saved["seed"]}
    differ = [
        f"{key} {other.get(key)}, not {value}" for key, value in settings.items() if other.get(key) != value
    ]
    if differ:
        raise CheckpointError(f"{path} was made with other arguments: {'; '.join(differ)}")
    return saved


def restore(saved: dict, *objects) -> None:
    """Puts back the states of model, optimiser and scheduler, and of the random generators."""
    try:
        for thing, state in zip(objects, saved["states"], strict=True):
            thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError):
        raise CheckpointError("the checkpoint is of another network or optimiser") from None
    torch.set_rng_state(saved["random"]["cpu"])
    if saved["random"]["cuda"]:
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])


class Stopped(BaseException):
    """Ctrl-C, or a request to terminate."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


def stop_on_signals() -> None:
    """Turns SIGINT and SIGTERM into Stopped; a second one ends the process at once."""

    def stop(number, _frame):
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def fail(message: str) -> None:
    """One line and exit code 2."""
    print(f"train_classifier: error: {message}", file=sys.stderr)
    raise SystemExit(2)
