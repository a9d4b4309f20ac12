"""The main example: that it runs, that it resumes bit for bit, and what it says when something is wrong."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat

for needed in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ("--subset", "120", "--float-epochs", "1", "--epochs", "2", "--batch-size", "40", "--threads", "1")


@pytest.fixture
def example(monkeypatch):
    """The example's modules, imported as the script sees them, with the process left as it was."""
    threads, handlers = (
        torch.get_num_threads(),
        {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
    )
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delenv("TORCHQAT_DATA", raising=False)
    import train_classifier

    yield train_classifier
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(example, monkeypatch, capsys):
    """Runs the example in this process; returns its exit code, its output and what it wrote to stderr."""

    def run(*arguments, quick=QUICK):
        monkeypatch.setattr(sys, "argv", ["train_classifier.py", "--no-plots", *quick, *map(str, arguments)])
        try:
            example.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def start(*arguments):
    command = [sys.executable, "-u", EXAMPLES / "train_classifier.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    """What must be the same when the numbers are: both networks, and the metrics but for the time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics, *((folder / f"{stage}.tqat").read_bytes() for stage in ("float", "quantised"))


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(stderr, *parts):
    assert stderr.startswith("train_classifier") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr
    return True


def test_a_run_writes_everything_and_prints_the_table(tmp_path):
    process = start(*QUICK, "--seeds", 3, "--out", tmp_path)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")  # no progress bar where there is no terminal
    assert "1 / 2" in stdout and "32 / 32" in stdout
    folder = tmp_path / "seed-3"
    pictures = {"training.png", "weights.png", "activations.png", "estimators.png"}
    files = {"checkpoint.pt", "float.tqat", "quantised.tqat", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == pictures | files
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "metrics.json").read_text())
    for stage in ("float", "quantised"):
        size = (folder / f"{stage}.tqat").stat().st_size
        assert summary[stage]["bytes"] == size and f"{size:,} bytes" in stdout
    assert summary["quantised"]["bytes"] < summary["float"]["bytes"] / 15


def test_same_seed_same_numbers_and_another_seed_others(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("--seeds", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = (contents(tmp_path / name / f"seed-{seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b
    assert a[1:] != c[1:]


def test_several_seeds_give_mean_and_spread(train, tmp_path):
    code, stdout, _ = train("--seeds", 0, 1, "--out", tmp_path)
    assert code == 0 and "mean and standard deviation of 2 seeds" in stdout
    summary = json.loads((tmp_path / "metrics.json").read_text())["quantised"]
    first, second = summary["accuracy"]
    assert summary["mean"] == pytest.approx((first + second) / 2)
    assert summary["spread"] == pytest.approx(abs(first - second) / 2**0.5)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 5])
def test_stopped_after_any_checkpoint_it_resumes_bit_for_bit(
    train, example, tmp_path, monkeypatch, checkpoints
):
    assert train("--out", tmp_path / "whole")[0] == 0
    save, left = example.checkpoint.save, [checkpoints]

    def save_then_stop(*args, **state):
        save(*args, **state)
        left[0] -= 1
        if left[0] == 0:
            raise example.checkpoint.Stopped(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(example.checkpoint, "save", save_then_stop)
        code, stdout, _ = train("--out", tmp_path / "stopped")
    assert code == 130 and "--resume" in stdout
    assert train("--out", tmp_path / "stopped", "--resume")[0] == 0
    assert contents(tmp_path / "stopped" / "seed-0") == contents(tmp_path / "whole" / "seed-0")


def test_stopped_before_the_first_checkpoint_it_says_so(train, example, tmp_path, monkeypatch):
    def stop(*_args):
        raise example.checkpoint.Stopped(signal.SIGINT)

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
        if "quantised epoch   2/" in line:
            break
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (code, "")
    assert f"stopped. {tmp_path} has the last whole epoch" in stdout
    assert not list(tmp_path.rglob("*.tmp"))
    saved = torch.load(tmp_path / "seed-0" / "checkpoint.pt", weights_only=True)
    assert saved["stage"] == "quantised" and saved["epoch"] >= 2


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


def test_resuming_what_is_finished_trains_no_more(train, tmp_path):
    train("--out", tmp_path)
    before = contents(tmp_path / "seed-0")
    code, stdout, _ = train("--out", tmp_path, "--resume")
    assert code == 0 and "seed 0  quantised epoch" not in stdout and contents(tmp_path / "seed-0") == before


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "other arguments", "other seed", "not ours", "code", "a folder"]
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
    elif damage == "not ours":
        torch.save({"epoch": 3}, path)
        said = "not a checkpoint of this program"
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
def test_the_packed_network_is_the_network(train, example, tmp_path, options):
    quick = ("--subset", "40", "--float-epochs", "0", "--epochs", "1", "--batch-size", "20", "--threads", "1")
    assert train(*options, "--out", tmp_path, quick=quick)[0] == 0
    folder = tmp_path / "seed-0"
    model_state = torch.load(folder / "checkpoint.pt", weights_only=True)["states"][0]
    packed = example.packing.load(folder / "quantised.tqat")
    assert packed.keys() == model_state.keys()
    for name, value in model_state.items():
        assert torch.equal(packed[name], value), name


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("name, staircases", [("lenet5", 3), ("vgg11", 8), ("resnet20", 19)])
def test_every_model_takes_every_image_size(example, name, staircases, size):
    model = torchqat.prepare(example.models.MODELS[name](1, size, 10), 2)
    assert len(model.prepare_report.replaced) == staircases and not model.prepare_report.not_replaced
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_it_starts_from_float_weights_of_another_run(train, tmp_path):
    train("--out", tmp_path / "a")
    weights = tmp_path / "a" / "seed-0" / "float.tqat"
    code, stdout, _ = train("--out", tmp_path / "b", "--float-weights", weights)
    assert code == 0 and "float     epoch   1" not in stdout
    assert (tmp_path / "b" / "seed-0" / "float.tqat").read_bytes() == weights.read_bytes()
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, stderr = train("--out", tmp_path / "c", "--float-weights", weights)
    assert code == 2 and one_line(stderr, "does not hold the weights of this network")
    code, _, stderr = train("--out", tmp_path / "c", "--float-weights", tmp_path / "nowhere")
    assert code == 2 and one_line(stderr, "cannot read")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--weight-bits", "9"), "must be 1 to 8"),
        (("--act-bits", "0"), "must be 1 to 8"),
        (("--blend", "2"), "must be 0 to 1"),
        (("--batch-size", "1"), "must be >= 2"),
        (("--ste", "tanh"), "reverse_exponential"),  # the message lists those there are
        (("--seeds", "1", "1"), "twice"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--resume",), "there is no checkpoint in"),
        (("--out", __file__), "is not a folder"),
        (("--method", "twn"), "--method twn is for --weight-bits 2, not 1"),
        (("--optimizer", "sgd", "--weight-bits", "1"), "--optimizer sgd leaves the weights float"),
        (("--optimizer", "adam", "--blend", "0", "--method", "exact"), "takes no --blend, --method"),
        (("--resume", "--overwrite"), "not allowed with"),
    ],
)
def test_bad_arguments(train, tmp_path, arguments, said):
    code, _, stderr = train("--out", tmp_path / "run", *arguments)
    assert code == 2 and said in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_mnist_from_the_data_folder(data_dir, train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHQAT_DATA", data_dir)
    for name in ("mnist", "fashion-mnist"):
        before = sorted(Path(data_dir, name).iterdir())
        assert train("--dataset", name, "--out", tmp_path / name)[0] == 0
        assert sorted(Path(data_dir, name).iterdir()) == before


def write_idx_files(folder, count=20):
    """A tiny MNIST in the format of the real one."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        sizes = b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        images = b"\x00\x00\x08\x03" + sizes + os.urandom(count * 28 * 28)
        labels = b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


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
        assert code == 2 and one_line(stderr, "TORCHQAT_DATA", str(tmp_path), f"{dataset} is not there")
    (tmp_path / "mnist").mkdir()
    code, _, stderr = train("--dataset", "mnist", "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"{tmp_path / 'mnist'} has no train-images-idx3-ubyte.gz, ")
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


@pytest.mark.parametrize("damage", [b"", b"not gzip", gzip.compress(b"not idx")])
def test_damaged_data_files(train, tmp_path, damage):
    write_idx_files(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(damage)
    code, _, stderr = train("--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, str(tmp_path / "mnist"))


def test_no_network(train, tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # refuses connections
    code, _, stderr = train("--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and one_line(stderr, f"mnist is not in {tmp_path} and cannot be downloaded")


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
