"""The main example: that it runs, that it resumes bit for bit, and what it says when something is wrong."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torchqat
from example_programs import (
    EXAMPLES,
    files_in,
    imported,
    one_line_of,
    run_main,
    stopped_after,
    write_idx_files,
)
from safetensors.torch import load_file

for needed in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(needed)

QUICK_QUANTIZED = ("--subset", "120", "--epochs", "2", "--batch-size", "40", "--threads", "1")
QUICK = ("--float-epochs", "1", *QUICK_QUANTIZED)


@pytest.fixture
def example(monkeypatch):
    with imported("train_classifier", monkeypatch) as module:
        yield module


@pytest.fixture
def train(example, monkeypatch, capsys):
    """A short run: the function run_main of these arguments."""

    def run(*arguments, quick=QUICK):
        return run_main(example, ("--no-plots", *quick, *arguments), monkeypatch, capsys)

    return run


def start(*arguments, script=(EXAMPLES / "train_classifier.py",), env=None):
    command = [sys.executable, "-u", *script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def contents(folder):
    """What must be the same when the numbers are: both networks, and the metrics but for the time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics, *((folder / f"{stage}.tqat").read_bytes() for stage in ("float", "quantized"))


one_line = functools.partial(one_line_of, "train_classifier")


def test_a_run_writes_everything_and_prints_the_table(tmp_path):
    process = start(*QUICK, "--seeds", 3, "--out", tmp_path)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")  # no progress bar where there is no terminal
    assert "1 / 2" in stdout and "32 / 32" in stdout
    folder = tmp_path / "seed-3"
    pictures = {"training.png", "weights.png", "activations.png", "estimators.png"}
    files = {"checkpoint.pt", "float.tqat", "quantized.tqat", "quantized.safetensors", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == pictures | files
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "metrics.json").read_text())
    for stage in ("float", "quantized"):
        size = (folder / f"{stage}.tqat").stat().st_size
        assert summary[stage]["bytes"] == size and f"{size:,} bytes" in stdout
    assert summary["quantized"]["bytes"] < summary["float"]["bytes"] / 15


def test_same_seed_same_numbers_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("--seeds", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = (contents(tmp_path / name / f"seed-{seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b
    assert a[1:] != c[1:]


def test_memory_is_reported_and_recomputing_changes_no_result(example, tmp_path, monkeypatch, capsys):
    plain, leaner = tmp_path / "plain", tmp_path / "leaner"
    words = (*QUICK, "--model", "resnet20", "--seeds", 0, 1, "--memory-report", "--out")
    code, said, _ = run_main(example, (*words, plain), monkeypatch, capsys)
    assert code == 0 and said.count("of the float network") == 1
    assert said.startswith("what is kept for the backward pass of 40 images\nlayer ")
    assert (plain / "memory.png").stat().st_size > 10_000
    code, said, _ = run_main(example, (*words, leaner, "--recompute", "--no-plots"), monkeypatch, capsys)
    assert code == 0 and not (leaner / "memory.png").exists()
    kept = float(said.split(" of the float network")[0].split()[-1])
    assert kept < 0.15
    for seed in ("seed-0", "seed-1"):
        ours, theirs = contents(leaner / seed), contents(plain / seed)
        assert ours[1:] == theirs[1:] and ours[0]["history"] == theirs[0]["history"]


def test_several_seeds_give_mean_and_spread(train, tmp_path):
    code, stdout, _ = train("--seeds", 0, 1, "--out", tmp_path)
    assert code == 0 and "mean and standard deviation of 2 seeds" in stdout
    summary = json.loads((tmp_path / "metrics.json").read_text())["quantized"]
    first, second = summary["accuracy"]
    assert summary["mean"] == pytest.approx((first + second) / 2)
    assert summary["spread"] == pytest.approx(abs(first - second) / 2**0.5)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 5])
def test_stopped_after_any_checkpoint_it_resumes_bit_for_bit(
    train, example, tmp_path, monkeypatch, checkpoints
):
    assert train("--out", tmp_path / "whole")[0] == 0
    with stopped_after(checkpoints, example, monkeypatch):
        code, stdout, _ = train("--out", tmp_path / "stopped")
    assert code == 130 and "--resume" in stdout
    assert train("--out", tmp_path / "stopped", "--resume")[0] == 0
    assert contents(tmp_path / "stopped" / "seed-0") == contents(tmp_path / "whole" / "seed-0")


def test_stopped_before_the_first_checkpoint_it_says_so(train, example, tmp_path, monkeypatch):
    def stop(*_args):
        raise example.ending.Stopped(signal.SIGINT)

    monkeypatch.setattr(example.data, "load", stop)
    code, stdout, _ = train("--out", tmp_path)
    assert code == 130 and "no checkpoint yet" in stdout and "--resume" not in stdout


def test_a_checkpoint_is_overwritten_only_on_demand(train, tmp_path):
    assert train("--out", tmp_path, "--epochs", 0)[0] == 0
    path = tmp_path / "seed-0" / "checkpoint.pt"
    before = path.read_bytes()
    code, _, stderr = train("--out", tmp_path, "--seeds", 1, 0)
    assert code == 2 and one_line(stderr, str(path), "--resume", "--overwrite")
    assert path.read_bytes() == before and not (tmp_path / "seed-1").exists()
    assert train("--out", tmp_path, "--overwrite")[0] == 0
    assert torch.load(path, weights_only=True)["epoch"] == 2


def test_no_batch_has_one_image(example, train, tmp_path):
    for images in range(2, 12):
        part = torch.arange(images)
        data = example.data.Data(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), part, part, part)
        for size in range(2, 12):
            labels = [labels for _, labels in data.batches(size, torch.device("cpu"))]
            assert min(map(len, labels)) > 1 and max(map(len, labels)) <= max(size, 3)
            assert torch.cat(labels).sort().values.tolist() == part.tolist()
    code, *_ = train("--out", tmp_path, "--subset", 5, "--batch-size", 2, "--epochs", 1)
    assert code == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_good_checkpoint(tmp_path, number, code):
    process = start(*QUICK, "--epochs", 100_000, "--out", tmp_path, "--no-plots")
    for line in process.stdout:
        if "quantized epoch   2/" in line:
            break
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (code, "")
    assert f"stopped. {tmp_path} has the last whole epoch" in stdout
    assert not list(tmp_path.rglob("*.tmp"))
    saved = torch.load(tmp_path / "seed-0" / "checkpoint.pt", weights_only=True)
    assert saved["stage"] == "quantized" and saved["epoch"] >= 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports(tmp_path, number, code):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = start(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    assert process.communicate() == ("\nstopped at once\n", "") and process.returncode == code


SLOW_SAVE = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import torch, train_classifier
save, calls = torch.save, []

def slow_save(*args):
    save(*args)
    calls.append(0)
    if len(calls) == 3:
        try:
            print("saving", flush=True)
            time.sleep(60)
        finally:
            print("cleaning up", flush=True)
            time.sleep(60)

torch.save = slow_save
train_classifier.main()
"""


def test_a_second_signal_while_saving_leaves_the_checkpoint_before(tmp_path):
    process = start(*QUICK, "--out", tmp_path, "--no-plots", script=("-c", SLOW_SAVE, EXAMPLES))
    for awaited in ("saving\n", "cleaning up\n"):
        while process.stdout.readline() != awaited:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.communicate() == ("\nstopped at once\n", "") and process.returncode == 130
    saved = torch.load(tmp_path / "seed-0" / "checkpoint.pt", weights_only=True)
    assert (saved["stage"], saved["epoch"]) == ("float", 1)


def test_a_failed_write_leaves_the_checkpoint_before(train, example, tmp_path, monkeypatch):
    train("--out", tmp_path)
    path = tmp_path / "seed-0" / "checkpoint.pt"
    before = path.read_bytes()

    def full(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(example.checkpoint.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        example.checkpoint.save(path, {}, 0)
    assert path.read_bytes() == before and not path.with_suffix(".tmp").exists()


@pytest.mark.parametrize("room, kept", [(1_000_000, []), (6_000_000, ["float"])])  # the latents take more
def test_no_room_for_a_checkpoint_is_one_line(train, tmp_path, room, kept):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        code, _, stderr = train("--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and one_line(stderr, f"File too large: {tmp_path}")
    checkpoints = tmp_path.rglob("checkpoint.*")
    assert [torch.load(path, weights_only=True)["stage"] for path in checkpoints] == kept


def test_two_runs_at_once_do_not_share_a_folder(train, tmp_path):
    process = start(*QUICK, "--epochs", 100_000, "--out", tmp_path, "--no-plots")
    process.stdout.readline()
    for how in ("--overwrite", "--resume"):
        code, _, stderr = train("--out", tmp_path, "--epochs", 100_000, how)
        assert code == 2 and one_line(stderr, f"another run is writing to {tmp_path}")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "") and "the last whole epoch" in stdout


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run", "/proc"])
def test_a_folder_that_cannot_be_written_to(train, example, monkeypatch, out):
    monkeypatch.delattr(example.Run, "go")
    code, _, stderr = train("--out", out)
    assert code == 2 and one_line(stderr, f"cannot write to --out {out}: ")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--float-lr", "1e30"), "seed 0: float training diverged at epoch 1 (loss nan): lower --float-lr"),
        (("--lr", "1e30"), "seed 0: quantized training diverged at epoch 1 (loss nan): lower --lr"),
        (("--lr", "1e30", "--weight-bits", "4"), "quantized training diverged at epoch 1"),
        (("--lr", "1e30", "--optimizer", "sgd"), "quantized training diverged at epoch 1"),
        (("--lr", "1e30", "--optimizer", "adam"), "quantized training diverged at epoch 1"),
        # One step an epoch: its loss is that of the network before.
        (("--float-lr", "1e30", "--batch-size", "120"), "outputs not finite): lower --float-lr"),
    ],
)
def test_diverged_training_says_so_and_keeps_the_checkpoint_before(train, tmp_path, arguments, said):
    code, _, stderr = train("--out", tmp_path, *arguments)
    assert code == 2 and one_line(stderr, said)
    saved = torch.load(tmp_path / "seed-0" / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 0 and saved["stage"] in said + "quantized"
    assert all(value.isfinite().all() for value in saved["states"][0].values())


def test_resuming_what_is_finished_trains_no_more(train, tmp_path):
    train("--out", tmp_path)
    before = contents(tmp_path / "seed-0")
    code, stdout, _ = train("--out", tmp_path, "--resume")
    assert code == 0 and "seed 0  quantized epoch" not in stdout and contents(tmp_path / "seed-0") == before


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "other arguments", "other seed", "not ours", "incomplete", "code", "a folder"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(train, tmp_path, damage):
    train("--out", tmp_path, "--seeds", 0)
    path = tmp_path / "seed-0" / "checkpoint.pt"
    arguments, said, marker = (), "damaged or not a checkpoint", tmp_path / "executed"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other arguments":
        arguments, said = ("--act-bits", 4), "made with other arguments: act_bits 2, not 4"
    elif damage == "other seed":
        path.parent.rename(tmp_path / "seed-7")
        path, arguments = tmp_path / "seed-7" / "checkpoint.pt", ("--seeds", 7)
        said = "made with other arguments: seed 0, not 7"
    elif damage == "incomplete":
        saved = torch.load(path, weights_only=True)
        del saved["settings"]
        torch.save(saved, path)
    elif damage == "not ours":
        torch.save({"epoch": 3}, path)
        said = "not a checkpoint of this version of the program"
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
        said = f"cannot read {path}: Is a directory"
    else:
        path.write_bytes(pickle.dumps(_Mkdir(str(marker)), protocol=2))
    before = files_in(tmp_path)
    code, _, stderr = train("--out", tmp_path, "--resume", *arguments)
    assert code == 2 and one_line(stderr, str(path), said)
    assert files_in(tmp_path) == before and not marker.exists()


def test_no_flipped_byte_of_a_checkpoint_goes_unnoticed(train, example, tmp_path):
    train("--out", tmp_path, "--epochs", 0)
    path = tmp_path / "seed-0" / "checkpoint.pt"
    whole = path.read_bytes()
    weight = whole.index(torch.load(path, weights_only=True)["states"][0]["0.weight"].numpy().tobytes())
    path.write_bytes(flipped(whole, weight + 7))
    code, _, stderr = train("--out", tmp_path, "--epochs", 0, "--resume")
    assert code == 2 and one_line(stderr, f"{path} is damaged or not a checkpoint")

    example.checkpoint.save(path, {}, 0, epoch=3, states=[torch.arange(5)])
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place))
        try:
            saved = example.checkpoint.load(path, {}, 0)
        except example.checkpoint.CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # padding and the like
            assert saved["epoch"] == 3 and torch.equal(saved["states"][0], torch.arange(5))
            assert torch.equal(saved["random"]["cpu"], torch.get_rng_state())
    assert refused > len(whole) / 2


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


class _Mkdir:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back(example, bits):
    top = max(2 ** (bits - 1) - 1, 1)
    codes = torch.randint(-top, top + 1, (5, 7, 3), dtype=torch.int8)
    if bits == 1:
        codes = torch.where(codes < 0, -1, 1).to(torch.int8)
    packed = example.packing.pack(codes, bits)
    assert len(packed) == -(-codes.numel() * bits // 8)
    assert torch.equal(example.packing.unpack(packed, bits, list(codes.shape)).to(torch.int8), codes)


@pytest.mark.parametrize(
    "options",
    [
        ("--weight-bits", "1", "--model", "resnet20"),
        ("--weight-bits", "2", "--per-channel"),
        ("--weight-bits", "4", "--keep-first-last-float"),
        ("--weight-bits", "2", "--method", "twn"),
        ("--weight-bits", "3", "--method", "lloyd", "--ste", "reverse_exponential", "--alpha-grad", "exact"),
        ("--optimizer", "sgd"),
        ("--optimizer", "adam", "--lr", "0.001"),
    ],
    ids=" ".join,
)
def test_the_saved_networks_are_the_network(train, example, tmp_path, options):
    quick = ("--subset", "40", "--float-epochs", "0", "--epochs", "1", "--batch-size", "20", "--threads", "1")
    assert train(*options, "--out", tmp_path, quick=quick)[0] == 0
    folder = tmp_path / "seed-0"
    model_state = torch.load(folder / "checkpoint.pt", weights_only=True)["states"][0]
    for saved in (
        example.packing.load(folder / "quantized.tqat"),
        load_file(folder / "quantized.safetensors"),
    ):
        assert saved.keys() == model_state.keys()
        for name, value in model_state.items():
            assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize(
    "name, staircases", [("lenet5", 3), ("vgg11", 8), ("resnet20", 19), ("resnet18", 17), ("mobilenet", 11)]
)
def test_every_model_takes_every_image_size(example, name, staircases, size):
    model = torchqat.prepare(example.models.MODELS[name](1, size, 10), 2)
    assert len(model.prepare_report.replaced) == staircases and not model.prepare_report.not_replaced
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_it_starts_from_float_weights_of_another_run(train, tmp_path):
    train("--out", tmp_path / "a")
    weights = tmp_path / "a" / "seed-0" / "float.tqat"
    code, stdout, _ = train("--out", tmp_path / "b", "--float-weights", weights, quick=QUICK_QUANTIZED)
    assert code == 0 and "float     epoch   1" not in stdout
    assert (tmp_path / "b" / "seed-0" / "float.tqat").read_bytes() == weights.read_bytes()


def test_float_weights_that_do_not_fit_are_told_apart(train, example, tmp_path):
    for name, options in (("bcgd", ()), ("sgd", ("--optimizer", "sgd"))):
        assert train("--out", tmp_path / name, "--float-epochs", 0, "--epochs", 0, *options)[0] == 0
    seed = tmp_path / "bcgd" / "seed-0"
    whole = (seed / "float.tqat").read_bytes()
    files = {name: tmp_path / name for name in ("cut", "flipped", "foreign", "nan", "nowhere")}
    files["cut"].write_bytes(whole[:-100])
    files["flipped"].write_bytes(flipped(whole, len(whole) // 2))
    files["foreign"].write_bytes((seed / "checkpoint.pt").read_bytes())
    lenet = example.models.lenet5(1, 8, 10)
    torch.nn.init.constant_(lenet[0].weight, float("nan"))
    example.packing.save(files["nan"], lenet)
    for path, said, options in (
        (files["cut"], "is damaged or cut short", ()),
        (files["flipped"], "is damaged or cut short", ()),
        (files["foreign"], "is not a packed network", ()),
        (files["nan"], "has values that are not finite", ()),
        (files["nowhere"], "No such file or directory", ()),
        (seed, "Is a directory", ()),
        (seed / "quantized.tqat", "is quantized already; a float.tqat is wanted", ()),
        (tmp_path / "sgd" / "seed-0" / "quantized.tqat", "is quantized already; a float.tqat is wanted", ()),
        (seed / "float.tqat", "is of another network, of another --model or --dataset", ("--model", "vgg11")),
    ):
        arguments = ("--out", tmp_path / "run", "--float-weights", path, *options)
        code, _, stderr = train(*arguments, quick=QUICK_QUANTIZED)
        assert code == 2 and one_line(stderr, str(path), said)


def packed_by_hand(entries, body):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    rest = header + b"\n" + body
    return b"torchqat packed network 1 %08x\n" % zlib.crc32(rest) + rest


ENTRY = {"shape": [2, 3], "dtype": "float32"}
CODES = {"shape": [2, 3], "dtype": "float32", "bits": 2, "channel_dim": 0}  # 2 scales, 6 codes


def test_packed_files_hold_what_the_header_says(example, tmp_path):
    path = tmp_path / "net.tqat"
    values = torch.randn(6)
    path.write_bytes(packed_by_hand({"a": ENTRY, "b": CODES}, values.numpy().tobytes() + _SCALES + _CODES))
    state = example.packing.load(str(path))
    assert torch.equal(state["a"], values.view(2, 3))
    assert state["b"].tolist() == [[-1.5, 0.0, 1.5], [0.0, 0.25, 0.25]]


_SCALES = torch.tensor([1.5, 0.25]).numpy().tobytes()
_CODES = bytes([0b01_10_01_00, 0b10_10])  # 0, 1, 2, 1, 2, 2 from the lowest bits on: levels -1, 0, 1, 0, 1, 1


@pytest.mark.parametrize(
    "entries, body, said",
    [
        ({"a": ENTRY}, bytes(23), "does not fit the 23 bytes of tensors"),
        ({"a": ENTRY}, bytes(25), "does not fit the 25 bytes of tensors"),
        ({"a": CODES}, bytes(9), "does not fit the 9 bytes of tensors"),
        ({"a": {**ENTRY, "shape": [10**4000, 10**4000]}}, bytes(24), "does not fit"),
        ({"a": {**ENTRY, "shape": [0, 10**30]}}, b"", "tensor that cannot be"),
        ({"a": {**ENTRY, "shape": [-2, -3]}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "shape": [2.0, 3]}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "shape": [True, 6]}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "shape": "23"}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "dtype": "Tensor"}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "dtype": ["float32"]}}, bytes(24), "header is wrong"),
        ({"a": {**ENTRY, "more": 1}}, bytes(24), "header is wrong"),
        ({"a": {"shape": [2, 3]}}, bytes(24), "header is wrong"),
        ({"a": {**CODES, "bits": 0}}, bytes(10), "header is wrong"),
        ({"a": {**CODES, "bits": 9}}, bytes(15), "header is wrong"),
        ({"a": {**CODES, "bits": "2"}}, bytes(10), "header is wrong"),
        ({"a": {**CODES, "dtype": "int64"}}, bytes(10), "header is wrong"),
        ({"a": {**CODES, "channel_dim": 2}}, bytes(10), "header is wrong"),
        ({"a": {**CODES, "channel_dim": -1}}, bytes(10), "header is wrong"),
        ({"a": CODES}, _SCALES + b"\xff\xff", "codes that 2 bits do not have"),
        ({"a": []}, b"", "header is wrong"),
        ([ENTRY], bytes(24), "header is wrong"),
        (b"{", b"", "header is wrong"),
        (b"\xff\xfe", b"", "header is wrong"),
        (b"[" * 100_000, b"", "header is wrong"),
    ],
)
def test_packed_files_made_up_by_hand_are_refused(example, tmp_path, entries, body, said):
    path = tmp_path / "net.tqat"
    path.write_bytes(packed_by_hand(entries, body))
    with pytest.raises(ValueError, match=said) as raised:
        example.packing.load(path)
    assert str(path) in str(raised.value)


def test_no_damaged_packed_file_is_read(example, tmp_path):
    path = tmp_path / "net.tqat"
    example.packing.save(path, torch.nn.Linear(3, 2))
    whole = path.read_bytes()
    for damaged in (
        *(whole[:length] for length in range(len(whole))),
        *(flipped(whole, place) for place in range(len(whole))),
        whole + b"\0",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a packed network|is damaged or cut short"):
            example.packing.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_packed_tensors_keep_their_dtype(example, tmp_path, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(dtype)
    model.register_buffer("empty", torch.empty(0, 4, dtype=dtype))
    optimizer = torchqat.optim.BCGD(torchqat.optim.param_groups(model, 2, channel_dim=0), lr=0.1)
    example.packing.save(tmp_path / "net", model, example.packing.quantized_weights(optimizer))
    state = example.packing.load(tmp_path / "net")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_the_readme_reads_packed_files(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train()[0] == 0
    section = (EXAMPLES.parent / "README.md").read_text().split("### Packed files")[1]
    scope = {}
    exec(section.split("```py\n")[1].split("```")[0], scope)
    levels = capsys.readouterr().out
    assert levels.startswith("tensor([-") and levels.count(",") == 1
    metrics = json.loads(Path("runs/classifier/metrics.json").read_text())
    test = sys.modules["data"].load("digits", None).subset(120)
    hits = (
        scope["model"](test.normalized(test.test_images, torch.device("cpu"))).argmax(1) == test.test_labels
    )
    assert 100 * hits.double().mean().item() == metrics["quantized"]["mean"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--weight-bits", "9"), "must be 1 to 8"),
        (("--weight-bits", "0"), "must be 1 to 8"),
        (("--act-bits", "0"), "must be 1 to 8"),
        (("--act-bits", "9"), "must be 1 to 8"),
        (("--epochs", "-1"), "must be >= 0"),
        (("--epochs", "1.5"), "invalid int value: '1.5'"),
        (("--lr", "nan"), "must be 0 to 1e+30"),
        (("--float-lr", "inf"), "must be 0 to 1e+30"),
        (("--weight-decay", "inf"), "must be 0 to 1e+30"),
        (("--threads", "0"), "must be 1 to 1024"),
        (("--threads", "100000"), "must be 1 to 1024"),
        (("--seeds", "-1"), "--seeds"),
        (("--seeds", str(2**70)), "must be 0 to"),
        (("--seeds",), "expected at least one argument"),
        (("--subset", "1"), "must be >= 2"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--blend", "2"), "must be 0 to 1"),
        (("--batch-size", "1"), "must be >= 2"),
        (("--ste", "tanh"), "reverse_exponential"),  # the message lists those there are
        (("--seeds", "1", "1"), "twice"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--device", "meta"), "--device meta: cpu and cuda are supported"),
        (("--resume",), "there is no checkpoint in"),
        (("--out", __file__), "is not a folder"),
        (("--out", "x" * 300), "File name too long"),
        (("--float-weights", "f"), "--float-weights trains no float network and takes no --float-epochs"),
        (("--method", "twn"), "--method twn is for --weight-bits 2, not 1"),
        (("--optimizer", "sgd", "--weight-bits", "1"), "--optimizer sgd leaves the weights float"),
        (("--optimizer", "adam", "--blend", "0", "--method", "exact"), "takes no --blend, --method"),
        (("--resume", "--overwrite"), "not allowed with"),
    ],
)
def test_bad_arguments(train, tmp_path, arguments, said):
    code, _, stderr = train("--out", tmp_path / "run", *arguments)
    assert code == 2 and one_line(stderr, said)
    assert not (tmp_path / "run").exists()


def test_help_is_short_and_fits_a_terminal(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, stdout, _ = train("--help")
    assert code == 0 and stdout.startswith("usage: train_classifier.py [options]\n")
    assert "(default: False)" not in stdout and "(default: clipped_relu)" in stdout
    assert max(map(len, stdout.splitlines())) <= 110


def test_mnist_from_the_data_folder(data_dir, train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHQAT_DATA", data_dir)
    for name in ("mnist", "fashion-mnist"):
        before = sorted(Path(data_dir, name).iterdir())
        assert train("--dataset", name, "--out", tmp_path / name)[0] == 0
        assert sorted(Path(data_dir, name).iterdir()) == before


def write_cifar10(folder, monkeypatch):
    """A tiny CIFAR-10 in the format of the real one, whose checksums torchvision then expects."""
    from torchvision import datasets

    folder.mkdir(parents=True)
    sums = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        labels = [i % 10 for i in range(8)]
        pixels = torch.randint(256, (8, 3072), dtype=torch.uint8).numpy()
        content = pickle.dumps({"data": pixels, "labels": labels, "label_names": [str(i) for i in range(10)]})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    batches = [[name, digest] for name, digest in sums.items()]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches[5:6])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)


@pytest.fixture
def no_network(monkeypatch):
    from torchvision import datasets

    nowhere = "http://127.0.0.1:9/"  # refuses connections
    monkeypatch.setattr(datasets.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(datasets.CIFAR10, "url", nowhere)


def test_idx_files_are_read_where_they_lie(example, tmp_path):
    write_idx_files(tmp_path / "fashion-mnist")
    data = example.data.load("fashion-mnist", str(tmp_path))
    assert data.images.shape == (20, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.test_labels.tolist() == [i % 10 for i in range(20)]
    packed = (tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()
    assert data.test_images.numpy().tobytes() == gzip.decompress(packed)[16:]


def test_a_data_folder_that_is_not_there_or_empty(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHQAT_DATA", str(tmp_path / "nowhere"))
    code, _, stderr = train("--dataset", "mnist", "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, "TORCHQAT_DATA", "not there", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCHQAT_DATA", str(tmp_path))
    for dataset in ("mnist", "fashion-mnist", "cifar10"):
        code, _, stderr = train("--dataset", dataset, "--out", tmp_path / "run")
        assert code == 2 and one_line(stderr, f"TORCHQAT_DATA names {tmp_path}, which has no {dataset}: ")
        assert one_line(stderr, WANTED[dataset], f"{tmp_path} holds nothing")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train.csv").touch()
    code, _, stderr = train("--dataset", "mnist", "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"{tmp_path / 'mnist'} has no train-images-idx3-ubyte.gz, ")
    assert one_line(stderr, "; it holds train.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


WANTED = {
    "mnist": "mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
    "fashion-mnist": "fashion-mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
    "cifar10": "cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}",
}


@pytest.mark.parametrize("dataset", WANTED)
@pytest.mark.parametrize("place", [".", "mistyped", "mistyped/twice"])
def test_what_cannot_be_downloaded_leaves_nothing_behind(
    train, tmp_path, monkeypatch, no_network, dataset, place
):
    monkeypatch.chdir(tmp_path)
    if place == ".":
        Path("notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for arguments in (("--data-dir", place), ()):
        code, _, stderr = train("--dataset", dataset, "--out", tmp_path / "run", *arguments)
        folder = arguments[1] if arguments else "data"
        assert code == 2 and one_line(stderr, f"{folder} has no {dataset}: looked for {WANTED[dataset]}")
        found = "holds notes.txt" if folder == "." else "is not there"
        assert one_line(stderr, f"({folder} {found})", "cannot be downloaded: ")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_download_goes_where_the_next_run_looks(example, tmp_path, monkeypatch):
    from torchvision import datasets

    write_idx_files(tmp_path / "mirror")
    files = [path.name for path in (tmp_path / "mirror").iterdir()]
    sums = [(name, hashlib.md5((tmp_path / "mirror" / name).read_bytes()).hexdigest()) for name in files]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "mirror")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        first = example.data.load("mnist", str(tmp_path / "new" / "data"))
        server.shutdown()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    monkeypatch.setenv("TORCHQAT_DATA", str(tmp_path / "new" / "data"))
    again = example.data.load("mnist", None)
    assert torch.equal(first.images, again.images) and torch.equal(first.test_labels, again.test_labels)


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_unpacked_files_as_torchvision_stores_them(train, tmp_path, dataset, folder):
    write_idx_files(tmp_path / folder, suffix="")
    assert train("--dataset", dataset, "--data-dir", tmp_path, "--out", tmp_path / "run")[0] == 0


def test_cifar10_batches(train, example, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, monkeypatch)
    data = example.data.load("cifar10", str(tmp_path))
    assert data.images.shape == (40, 3, 32, 32) and data.test_images.shape == (8, 3, 32, 32)
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and (data.shift, data.mirror) == (4, True)
    (folder / "test_batch").unlink()
    (folder / "data_batch_3").write_bytes(pickle.dumps(_Mkdir(str(tmp_path / "executed"))))
    before = files_in(tmp_path)
    code, _, stderr = train("--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"missing or damaged in {folder}: data_batch_3, test_batch")
    assert files_in(tmp_path) == before and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("kind", ["labels-idx1", "images-idx3"])
@pytest.mark.parametrize("damage", ["empty", "junk", "truncated", "other idx", "longer", "no images"])
def test_damaged_data_files(train, tmp_path, suffix, kind, damage):
    folder = tmp_path / "mnist" if suffix else tmp_path / "MNIST" / "raw"
    write_idx_files(folder, suffix=suffix)
    path = folder / f"train-{kind}-ubyte{suffix}"
    whole, pack = path.read_bytes(), gzip.compress if suffix else bytes
    dimensions = int(kind[-1])
    other = folder / f"train-{'images-idx3' if kind == 'labels-idx1' else 'labels-idx1'}-ubyte{suffix}"
    path.write_bytes(
        {
            "empty": b"",
            "junk": b"<html>404 not found</html>",
            "truncated": whole[: len(whole) // 2],
            "other idx": other.read_bytes(),
            "no images": pack(bytes((0, 0, 8, dimensions, *[0] * 4 * dimensions))),
            "longer": pack((gzip.decompress(whole) if suffix else whole) + b"\0"),
        }[damage]
    )
    before = files_in(tmp_path)
    code, _, stderr = train("--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, str(path)) and files_in(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"labels": [3, 10]}, {"side": 27}])
def test_data_files_of_something_else(train, tmp_path, wrong):
    write_idx_files(tmp_path / "mnist", **wrong)
    code, _, stderr = train("--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"{tmp_path / 'mnist'}", "28 x 28")


def test_more_labels_than_images(train, tmp_path):
    write_idx_files(tmp_path / "mnist")
    write_idx_files(tmp_path / "more", count=21)
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "mnist" / name).write_bytes((tmp_path / "more" / name).read_bytes())
    code, _, stderr = train("--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"{tmp_path / 'mnist'}", "28 x 28")


def test_a_data_folder_that_is_a_file(train, tmp_path):
    code, _, stderr = train("--dataset", "mnist", "--data-dir", __file__, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"{__file__} is not a folder")


def test_shifted_and_mirrored_images(example):
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    assert example.data._moved(images, 0, False) is images
    seen = set()
    for _ in range(40):
        moved = example.data._moved(images, 1, True)
        assert moved.shape == images.shape
        padded = torch.nn.functional.pad(images[1], (1, 1, 1, 1))
        windows = [padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
        windows += [window.flip(2) for window in windows]
        seen.add([torch.equal(moved[1], window) for window in windows].index(True))
    assert len(seen) > 9
