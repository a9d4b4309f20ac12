"""The MNIST table: that it is complete, resumes to the same numbers, and says what is wrong."""

import functools
import json
import statistics
import sys

import pytest
import torch
from example_programs import (
    contents_of_table,
    files_in,
    imported,
    one_line_of,
    run_main,
    stopped_after,
    write_idx_files,
)
from torchqat.nn import StaircaseReLU

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

QUICK = ("--float-epochs", "1", "--epochs", "1", "--batch-size", "10", "--threads", "1")
TWO_ROWS = ("--rows", "clipped-frozen", "w1a2")


@pytest.fixture
def example(monkeypatch):
    with imported("reproduce_ste_mnist", monkeypatch) as module:
        yield module


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Twenty images of noise, in the files of MNIST."""
    folder = tmp_path_factory.mktemp("data")
    write_idx_files(folder / "mnist")
    return folder


@pytest.fixture
def reproduce(example, mnist, monkeypatch, capsys):
    """A short run on that data: the function run_main of these arguments."""

    def run(*arguments, data_dir=mnist):
        return run_main(example, ("--data-dir", data_dir, *QUICK, *arguments), monkeypatch, capsys)

    return run


one_line = functools.partial(one_line_of, "reproduce_ste_mnist")


def test_the_whole_table(reproduce, example, tmp_path):
    code, stdout, stderr = reproduce("--seeds", 0, 1, "--out", tmp_path)
    assert (code, stderr) == (0, "") and "mean +- standard deviation" in stdout
    lines = [line.split("|")[1:-1] for line in stdout.splitlines() if line.startswith("|")][2:]
    summary = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert list(summary) == ["float", *example.ROWS]
    published = dict.fromkeys(summary) | {
        "relu-frozen": 99.24,
        "clipped-frozen": 99.23,
        "identity-frozen": 98.49,
    }
    for cells, (name, row) in zip(lines, summary.items(), strict=True):
        runs = [json.loads((tmp_path / f"seed-{i}" / name / "metrics.json").read_text()) for i in (0, 1)]
        accuracy = [run["history"][-1]["accuracy"] for run in runs]
        assert (row["accuracy"], row["published"], row["epochs"]) == (accuracy, published[name], 1)
        assert row["mean"] == statistics.fmean(accuracy) and row["spread"] == statistics.stdev(accuracy)
        shown = [
            row["title"],
            str(published[name] or ""),
            f"{row['mean']:.2f} +- {row['spread']:.2f}",
            "2",
            "1",
        ]
        assert [cell.strip() for cell in cells[:5]] == shown
    assert (tmp_path / "ste_mnist.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.name for path in tmp_path.glob("seed-*/*/*")}
    assert kept == {"metrics.json", "float.tqat"}  # no checkpoint of what is finished


@pytest.mark.parametrize("checkpoints", range(1, 7))
def test_stopped_after_any_checkpoint_it_resumes_to_the_same_numbers(
    reproduce, example, tmp_path, monkeypatch, checkpoints
):
    assert reproduce(*TWO_ROWS, "--no-plots", "--out", tmp_path / "whole")[0] == 0
    out = ("--no-plots", "--out", tmp_path / "stopped")
    with stopped_after(checkpoints, example, monkeypatch):
        code, stdout, _ = reproduce(*TWO_ROWS, *out)
    assert code == 130 and "--resume goes on there" in stdout
    assert reproduce(*TWO_ROWS, *out, "--resume")[0] == 0
    assert contents_of_table(tmp_path / "stopped") == contents_of_table(tmp_path / "whole")


def test_rows_and_seeds_added_later_are_those_of_one_run(reproduce, tmp_path):
    both = ("--no-plots", "--out", tmp_path / "both")
    assert reproduce(*TWO_ROWS, "--seeds", 0, 1, *both)[0] == 0
    out = ("--no-plots", "--out", tmp_path / "parts")
    assert reproduce("--rows", "w1a2", *out)[0] == 0
    before = contents_of_table(tmp_path / "parts")
    code, stdout, _ = reproduce(*TWO_ROWS, *out, "--resume")
    assert code == 0 and "float     epoch" not in stdout and "w1a2      epoch" not in stdout
    assert contents_of_table(tmp_path / "parts")[0].items() > before[0].items()
    assert reproduce(*TWO_ROWS, "--seeds", 1, *out, "--resume")[0] == 0
    assert contents_of_table(tmp_path / "parts") == contents_of_table(tmp_path / "both")
    parts, both = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("parts", "both"))
    for summary in (parts, both):  # the last one is of all rows and seeds
        for row in summary["rows"].values():
            row["seconds"] = None
    assert parts["rows"] == both["rows"] and both["rows"]["w1a2"]["seeds"] == [0, 1]


def test_rows_are_what_they_say(example, mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce_ste_mnist.py", "--out", str(tmp_path)])
    args, dataset = example.parse_arguments(), example.data.load("mnist", str(mnist))
    for name, row in example.ROWS.items():
        model = example.models.lenet5(1, 28, 10)
        optimizer = example.Network(args, 0, dataset, name).quantized(model)
        staircases = [module for module in model.modules() if isinstance(module, StaircaseReLU)]
        assert [(module.bits, module.ste) for module in staircases] == 3 * [(2, row.ste)]
        groups = {group["name"]: group for group in optimizer.param_groups}
        assert len(groups.get("alphas", {"params": []})["params"]) == (0 if name.endswith("-frozen") else 3)
        assert groups["quantized"]["quant_bits"] == (1 if name == "w1a2" else None)
        assert len(groups["quantized"]["params"]) == 4
        alphas = [module.alpha.item() for module in staircases]
        images = dataset.normalized(dataset.images, torch.device("cpu"))
        model(images).square().sum().backward()
        optimizer.step()
        moved = [module.alpha.item() != alpha for module, alpha in zip(staircases, alphas, strict=True)]
        assert any(moved) == row.learned
        levels = [p.unique().numel() for p in groups["quantized"]["params"]]
        assert (max(levels) == 2) == (row.weight_bits == 1)


def test_the_network_is_32c5_p2_64c5_p2_512_10(example):
    convolutions = [m for m in example.models.lenet5(1, 28, 10) if isinstance(m, torch.nn.Conv2d)]
    linears = [m for m in example.models.lenet5(1, 28, 10) if isinstance(m, torch.nn.Linear)]
    assert [(m.out_channels, m.kernel_size) for m in convolutions] == [(32, (5, 5)), (64, (5, 5))]
    assert [(m.in_features, m.out_features) for m in linears] == [(64 * 7 * 7, 512), (512, 10)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--rows", "tanh"), "'w1a2'"),  # the message lists those there are
        (("--rows",), "expected at least one argument"),
        (("--seeds", "1", "1"), "twice"),
        (("--seeds", "-1"), "--seeds"),
        (("--epochs", "-1"), "must be >= 0"),
        (("--lr", "nan"), "must be 0 to 1e+30"),
        (("--threads", "0"), "must be 1 to 1024"),
        (("--batch-size", "1"), "must be >= 2"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--out", __file__), "is not a folder"),
        (("--out", ""), "--out is empty or the current directory"),
        (("--resume",), "there is no checkpoint in"),
        (("--resume", "--overwrite"), "not allowed with"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments(reproduce, tmp_path, arguments, said):
    code, _, stderr = reproduce("--out", tmp_path / "run", *arguments)
    assert code == 2 and one_line(stderr, said)
    assert not (tmp_path / "run").exists()


def test_missing_data(reproduce, tmp_path, monkeypatch):
    (tmp_path / "empty" / "mnist").mkdir(parents=True)
    code, _, stderr = reproduce("--out", tmp_path / "run", data_dir=tmp_path / "empty")
    assert code == 2 and one_line(stderr, f"{tmp_path / 'empty' / 'mnist'} has no train-images-idx3-ubyte.gz")
    assert not (tmp_path / "run").exists()


def test_results_are_replaced_only_on_demand(reproduce, tmp_path):
    out = ("--no-plots", "--rows", "relu-frozen", "--out", tmp_path)
    assert reproduce(*out)[0] == 0
    before = files_in(tmp_path)
    code, _, stderr = reproduce(*out)
    assert code == 2 and one_line(stderr, "is there already", "--resume", "--overwrite")
    code, _, stderr = reproduce(*out, "--resume", "--lr", "0.5")
    said = "seed-0/relu-frozen/metrics.json was made with other arguments: lr 0.02, not 0.5"
    assert code == 2 and one_line(stderr, said)
    more = ("--no-plots", "--rows", "w1a2", "--seeds", 1, "--out", tmp_path, "--resume", "--lr", "0.5")
    code, _, stderr = reproduce(*more)  # would not fit in the table of the row that is there
    assert code == 2 and one_line(stderr, said)
    assert files_in(tmp_path) == before
    assert reproduce(*out, "--overwrite", "--lr", "0.5")[0] == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["lr"] == 0.5


def test_results_of_wrong_types_are_refused(reproduce, tmp_path):
    out = ("--no-plots", "--rows", "w1a2", "--out", tmp_path)
    assert reproduce(*out)[0] == 0
    path = tmp_path / "seed-0" / "w1a2" / "metrics.json"
    result = json.loads(path.read_text())
    for damage in ({"accuracy": "abc"}, {"seconds": None}, {"history": [{}]}, {"history": []}):
        path.write_text(json.dumps(result | damage))
        code, _, stderr = reproduce(*out, "--resume")
        assert code == 2 and one_line(stderr, f"{path} is damaged or not a result")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_damaged_results_are_refused_and_kept(reproduce, tmp_path, damage):
    path = tmp_path / "seed-0" / "relu-frozen" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    code, _, stderr = reproduce("--out", tmp_path, "--resume")
    assert code == 2 and one_line(stderr, f"{path} is damaged or not a result")
    assert path.read_bytes() == damage


def test_diverged_training_says_so(reproduce, tmp_path):
    code, _, stderr = reproduce("--rows", "w1a2", "--lr", "1e30", "--out", tmp_path)
    assert code == 2 and one_line(stderr, "seed 0: w1a2 training diverged at epoch 1", "lower --lr")


def test_help_fits_a_terminal(reproduce, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, stdout, _ = reproduce("--help")
    assert code == 0 and stdout.startswith("usage: reproduce_ste_mnist.py [options]\n")
    assert max(map(len, stdout.splitlines())) <= 110
