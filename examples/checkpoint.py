"""Checkpoints and results that survive being interrupted, and are refused when they do not fit."""

import contextlib
import fcntl
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

FORMAT = "torchqat train_classifier 2"


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message says why."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder, sees that it can be written to, and keeps other runs out of it."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another run is writing to {folder}") from None
        except OSError as error:
            raise CheckpointError(f"cannot write to --out {folder}: {error.strerror}") from None
        yield


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
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with written_whole(path) as temporary:  # where the disk is full this says so; torch.save would not
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, settings: dict, seed: int) -> dict:
    """Reads a checkpoint of the same settings. Never runs code from the file (weights_only)."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums, and reads nothing from what is marked as a folder.
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # a damaged or foreign file can raise anything
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of the program")
    if not isinstance(saved.get("settings"), dict) or not {"seed", "progress", "states"} <= saved.keys():
        raise CheckpointError(f"{path} is damaged or not a checkpoint")
    _refuse_other(path, {**settings, "seed": seed}, {**saved["settings"], "seed": saved["seed"]})
    return saved


def write_json(path: Path, content: dict) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_result(path: Path, settings: dict, seed: int) -> dict | None:
    """What `write_json` wrote of a network of the same settings and seed; None where there is no file."""
    try:
        result = json.loads(path.read_bytes())
        made_with = {**result["settings"], "seed": result["seed"]}
        accuracies = [float(entry["accuracy"]) for entry in result["history"]]
        if not accuracies or result["accuracy"] != accuracies[-1] or float(result["seconds"]) < 0:
            raise ValueError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged or not a result") from None
    _refuse_other(path, {**settings, "seed": seed}, made_with)
    return result


def _refuse_other(path: Path, settings: dict, other: dict) -> None:
    differ = [
        f"{key} {other.get(key)}, not {value}" for key, value in settings.items() if other.get(key) != value
    ]
    if differ:
        raise CheckpointError(f"{path} was made with other arguments: {'; '.join(differ)}")


def restore(saved: dict, *objects) -> None:
    """Puts back the states of model, optimizer and scheduler, and of the random generators."""
    try:
        for thing, state in zip(objects, saved["states"], strict=True):
            thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError):
        raise CheckpointError("the checkpoint is of another network or optimizer") from None
    torch.set_rng_state(saved["random"]["cpu"])
    if saved["random"]["cuda"]:
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])
