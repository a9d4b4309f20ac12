"""The distillation example: that its arms are what they say, that it resumes, and what it says when wrong."""

import functools
import json
import re
import shutil
import statistics
import sys

import pytest
import torch
from example_programs import (
    EXAMPLES,
    contents_of_table,
    files_in,
    imported,
    one_line_of,
    run_main,
    stopped_after,
)
from torchqat.nn import StaircaseReLU
from torchqat.optim import BCGD

for needed in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)

QUICK = ("--subset", "60", "--float-epochs", "1", "--warm-up", "1", "--epochs", "2", "--batch-size", "20")
PROBED = ("--arms", "kd+ffa", "--connector", "relu")


@pytest.fixture
def example(monkeypatch):
    with imported("distill_classifier", monkeypatch) as module:
        yield module


@pytest.fixture
def distill(example, monkeypatch, capsys):
    """A short run on digits: the function run_main of these arguments."""

    def run(*arguments):
        return run_main(example, ("--threads", "1", *QUICK, *arguments), monkeypatch, capsys)

    return run


one_line = functools.partial(one_line_of, "distill_classifier")


def test_the_whole_table(distill, example, tmp_path):
    code, stdout, stderr = distill("--seeds", 0, 1, "--out", tmp_path)
    assert (code, stderr) == (0, "") and "mean +- standard deviation" in stdout
    lines = [line.split("|")[1:-1] for line in stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]][1:] == [
        *("epoch 1", "last epoch", "against labels", "seeds", "seconds")
    ]
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert list(rows) == ["float", "labels", "kd", "kd+fa", "kd+ffa", "kd-unlabelled", "kd+fa-unlabelled"]
    for cells, (name, row) in zip(lines[2:], rows.items(), strict=True):
        runs = [json.loads((tmp_path / f"seed-{i}" / name / "metrics.json").read_text()) for i in (0, 1)]
        accuracy = [run["history"][-1]["accuracy"] for run in runs]
        assert row["accuracy"] == accuracy and row["epochs"] == (1 if name == "float" else 2)
        assert row["mean"] == statistics.fmean(accuracy) and row["spread"] == statistics.stdev(accuracy)
        shown = [row["title"], "", f"{row['mean']:.2f} +- {row['spread']:.2f}", "", "2"]
        if name != "float":
            first = [run["history"][-2]["accuracy"] for run in runs]
            assert row["first_epochs"]["1"]["mean"] == statistics.fmean(first)
            shown[1] = f"{statistics.fmean(first):.2f} +- {statistics.stdev(first):.2f}"
        if name not in ("float", "labels"):
            shown[3] = f"{row['mean'] - rows['labels']['mean']:+.2f}"
        assert [cell.strip() for cell in cells[:5]] == shown
    assert (tmp_path / "distill.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.name for path in tmp_path.glob("seed-*/*/*")}
    assert kept == {"metrics.json", "float.tqat"}  # no checkpoint of what is finished


def test_the_arm_without_labels_gives_the_same_whatever_the_labels(distill, example, tmp_path, monkeypatch):
    arms = ("--no-plots", "--arms", "kd", "kd+fa-unlabelled")
    assert distill(*arms, "--out", tmp_path / "right")[0] == 0
    (tmp_path / "wrong" / "seed-0").mkdir(parents=True)
    shutil.copytree(tmp_path / "right" / "seed-0" / "float", tmp_path / "wrong" / "seed-0" / "float")
    load = example.data.load

    def mislabelled(*arguments):
        data = load(*arguments)
        data.labels = data.labels.roll(1)
        return data

    monkeypatch.setattr(example.data, "load", mislabelled)
    assert distill(*arms, "--out", tmp_path / "wrong", "--resume")[0] == 0
    right, wrong = (
        {path.parts[1]: result for path, result in contents_of_table(tmp_path / run)[0].items()}
        for run in ("right", "wrong")
    )
    assert wrong["kd+fa-unlabelled"] == right["kd+fa-unlabelled"]
    assert wrong["kd"]["history"] != right["kd"]["history"]


def test_arms_are_what_they_say_and_start_alike(distill, example, tmp_path, monkeypatch):
    seen = {}

    class Spy(example.Distiller):
        def forward(self, images, labels=None):
            if self.training and self in seen and len(seen[self]["batches"]) < 3:
                seen[self]["batches"].append((images, labels))
            return super().forward(images, labels)

        def build(self, images):
            weights = [p.detach().clone() for p in self.student.parameters()]
            seen[self] = {"weights": weights, "batches": []}
            return super().build(images)

    optimized = []

    def bcgd(groups, *arguments, **options):
        optimized.append(next(group["params"] for group in groups if group["name"] == "connectors"))
        return BCGD(groups, *arguments, **options)

    monkeypatch.setattr(example, "Distiller", Spy)
    monkeypatch.setattr(example, "BCGD", bcgd)
    words = ("--no-plots", "--connector", "relu", "--kd", "mse", "--lambda-fa", "7", "--out", tmp_path)
    assert distill(*words, "--weight-bits", "2", "--act-bits", "3")[0] == 0
    arms = dict(
        zip(("labels", "kd", "kd+fa", "kd+ffa", "kd-unlabelled", "kd+fa-unlabelled"), seen, strict=True)
    )
    losses = {name: (d.loss.lambda_kd, d.loss.lambda_fa, d.loss.lambda_label) for name, d in arms.items()}
    assert losses == {
        "labels": (0, 0, 1),
        "kd": (1, 0, 0.3),
        "kd+fa": (1, 7, 0.3),
        "kd+ffa": (1, 7, 0.3),
        "kd-unlabelled": (1, 0, 0),
        "kd+fa-unlabelled": (1, 7, 0),
    }
    kinds = [type(d.loss.fa).__name__ for name, d in arms.items() if d.loss.lambda_fa]
    assert kinds == ["FeatureAffinityLoss", "FastFeatureAffinityLoss", "FeatureAffinityLoss"]
    trained = [[id(p) for p in model.connectors.parameters()] for model in arms.values()]
    assert trained == [[id(p) for p in group] for group in optimized] and len(trained[-1]) == 2
    first, data = seen[arms["labels"]], example.data.load("digits", None).subset(60)
    for name, model in arms.items():
        assert model.loss.kd == "mse" and len(model.connectors) == ("fa" in name)
        assert all(c.relu and c.weight.unique().numel() > 3 for c in model.connectors.values())
        assert model.teacher is not model.student and not model.teacher.training
        assert [m.bits for m in model.student.modules() if isinstance(m, StaircaseReLU)] == 4 * [3]
        assert model.student[0].weight.unique().numel() == 3
        scores = example.models.class_scores(model.student, data.normalized(data.test_images, "cpu"))
        result = json.loads((tmp_path / "seed-0" / name / "metrics.json").read_text())
        hits = (scores.argmax(1) == data.test_labels).double()
        assert result["accuracy"] == pytest.approx(100 * hits.mean().item())
        for a, b in zip(first["weights"], seen[model]["weights"], strict=True):
            assert torch.equal(a, b)
        for (a, y), (b, z) in zip(first["batches"], seen[model]["batches"], strict=True):
            assert torch.equal(a, b)
            assert z is None if name.endswith("unlabelled") else torch.equal(y, z)


@pytest.mark.parametrize("checkpoints", range(2, 7))  # of the teacher, of the student in float, quantized
def test_stopped_after_any_checkpoint_it_resumes_to_the_same_numbers(
    distill, example, tmp_path, monkeypatch, checkpoints
):
    assert distill(*PROBED, "--no-plots", "--out", tmp_path / "whole")[0] == 0
    out = ("--no-plots", "--out", tmp_path / "stopped")
    with stopped_after(checkpoints, example, monkeypatch):
        code, stdout, _ = distill(*PROBED, *out)
    assert code == 130 and "--resume goes on there" in stdout
    assert distill(*PROBED, *out, "--resume")[0] == 0
    assert contents_of_table(tmp_path / "stopped") == contents_of_table(tmp_path / "whole")


def test_arms_and_seeds_added_later_are_those_of_one_run(distill, tmp_path):
    both = ("--no-plots", "--out", tmp_path / "both")
    assert distill("--arms", "labels", "kd", "--seeds", 0, 1, *both)[0] == 0
    out = ("--no-plots", "--out", tmp_path / "parts")
    assert distill("--arms", "kd", *out)[0] == 0
    code, stdout, _ = distill("--arms", "labels", "kd", "--seeds", 0, 1, *out, "--resume")
    assert code == 0 and "seed 0  float" not in stdout and "seed 0  kd" not in stdout
    assert contents_of_table(tmp_path / "parts") == contents_of_table(tmp_path / "both")


def test_a_student_can_start_from_its_teachers_weights(distill, example, tmp_path, monkeypatch):
    started = []

    class Spy(example.Distiller):
        def build(self, images):
            started.append(
                [(p.clone(), q.clone()) for p, q in zip(*map(states, self.networks()), strict=True)]
            )
            return super().build(images)

        def networks(self):
            return self.student, self.teacher

    def states(model):
        return model.state_dict().values()

    monkeypatch.setattr(example, "Distiller", Spy)
    same = (
        "--model",
        "cnn4-strided",
        "--teacher-model",
        "cnn4-strided",
        "--teacher-width",
        "1",
        "--no-plots",
    )
    words = (*same, "--warm-up", "0", "--arms", "kd+fa-unlabelled", "--start", "teacher", "--out", tmp_path)
    code, stdout, _ = distill(*words)
    assert code == 0 and "float 1/" not in stdout
    assert all(torch.equal(a, b) for a, b in started[0])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["taps"] == [["8", "8"]]  # those of this model


def test_few_labels_make_no_shorter_epochs(example):
    data = example.data.load("digits", None).subset(50)
    part = data.labelled(7)
    batches = list(part.batches(20, torch.device("cpu")))
    assert [len(labels) for _, labels in batches] == [17, 17, 16]
    first = {image.numpy().tobytes() for image in data.normalized(data.images[:7], torch.device("cpu"))}
    assert {image.numpy().tobytes() for images, _ in batches for image in images} == first  # as all are
    counts = torch.cat([labels for _, labels in batches]).bincount(minlength=10)
    assert torch.equal(counts >= 7, data.labels[:7].bincount(minlength=10) > 0)
    assert part.unlabelled().labels is None
    assert [labels for _, labels in part.unlabelled().batches(20, torch.device("cpu"))] == 3 * [None]


def test_more_images_than_there_are_cannot_be_had(distill, tmp_path):
    for option in ("--labelled", "--images"):
        code, _, stderr = distill(option, "61", "--out", tmp_path)
        assert code == 2 and one_line(stderr, "there are 60 training images, and 61 are wanted")


def test_labelled_is_for_the_arms_that_read_labels(distill, example, tmp_path, monkeypatch):
    seen = []
    batches = example.data.Data.batches

    def spied(self, *arguments):
        seen.append((self.labels is not None, len(self.images), self.epoch_size))
        return batches(self, *arguments)

    monkeypatch.setattr(example.data.Data, "batches", spied)
    words = ("--labelled", 20, "--teacher-labelled", 30, "--arms", "kd", "kd+fa-unlabelled")
    assert distill(*words, "--no-plots", "--out", tmp_path)[0] == 0
    assert seen == [(True, 30, 60)] + 3 * [(True, 20, 60)] + 3 * [(False, 60, None)]
    seen.clear()
    words = ("--images", 20, "--arms", "kd", "kd+fa-unlabelled", "--overwrite")
    assert distill(*words, "--no-plots", "--out", tmp_path)[0] == 0
    assert seen == [(True, 60, 60)] + 3 * [(True, 20, 20)] + 3 * [(False, 20, None)]


@pytest.mark.parametrize("name", ["lenet5", "vgg11", "resnet20", "cnn4", "cnn4-fine", "cnn4-strided"])
def test_any_network_may_teach_any(example, name):
    models, sizes = example.models, (8, 28, 32)
    assert name in models.MODELS
    for size in sizes[: 1 if name == "vgg11" else 3]:
        wide = models.MODELS[name](1, size, 10, 0.5)
        last = list(models.maps(wide))[-1]
        _, features = example.torchqat.distill.FeatureTaps(wide, [last])(torch.randn(2, 1, size, size))
        assert features[last].dim() == 4 and (features[last] >= 0).all()
        whole = models.MODELS[name](1, size, 10)
        channels = [
            (a.out_channels, b.out_channels)
            for a, b in zip(wide.modules(), whole.modules(), strict=True)
            if isinstance(a, torch.nn.Conv2d)
        ]
        assert channels and all(2 * a == b for a, b in channels)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--arms", "hints"), "'kd+fa-unlabelled'"),  # the message lists those there are
        (("--arms",), "expected at least one argument"),
        (("--labelled", "1"), "must be >= 2"),
        (("--kd", "l1"), "'mse', 'kl'"),
        (("--temperature", "0"), "must be 0.01 to 100"),
        (("--lambda-fa", "-1"), "must be 0 to 1000000"),
        (("--probes", "0"), "must be 1 to 10000"),
        (("--width", "0"), "must be 0.05 to 100"),
        (("--connector", "big"), "'none', 'linear', 'relu'"),
        (("--lambda-fa", "0", "--arms", "kd", "kd+ffa"), "leaves nothing to compare to the arm kd+ffa"),
        (("--lambda-kd", "0"), "leaves nothing to learn from to the arm kd-unlabelled"),
        (("--lambda-kd", "0", "--lambda-label", "0"), "leaves nothing to learn from to the arm kd"),
        (("--arms", "kd", "kd"), "--arms names an arm twice"),
        (("--taps", "7="), "must be STUDENT or STUDENT=TEACHER, not '7='"),
        (
            ("--start", "teacher"),
            "needs a student and a teacher of one network, not cnn4 x 1 and cnn4-fine x 2",
        ),
        (("--taps", "relu9"), "--taps: FeatureTaps: Sequential has no module 'relu9'; the nearest name is"),
        (("--taps", "2=nowhere"), "(the teacher)"),
        (("--taps", "15"), "--taps: "),  # the logits: no feature maps
        (("--seeds", "1", "1"), "twice"),
        (("--out", __file__), "is not a folder"),
        (("--resume",), "there is no checkpoint in"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments(distill, tmp_path, arguments, said):
    code, _, stderr = distill("--out", tmp_path / "run", *arguments)
    assert code == 2 and one_line(stderr, said)
    assert not (tmp_path / "run").exists()


def test_taps_may_differ_in_place_and_grid(distill, tmp_path):
    words = ("--no-plots", "--arms", "kd+fa", "--taps", "1", "5=6", "--norm", "fro", "--out", tmp_path)
    assert distill(*words)[0] == 0
    result = json.loads((tmp_path / "seed-0" / "kd+fa" / "metrics.json").read_text())
    assert result["settings"]["taps"] == [["1", "1"], ["5", "6"]]
    assert distill(*words, "--resume")[0] == 0  # the same taps are the same settings


def test_results_are_replaced_only_on_demand(distill, tmp_path):
    out = ("--no-plots", "--arms", "kd", "--out", tmp_path)
    assert distill(*out)[0] == 0
    before = files_in(tmp_path)
    code, _, stderr = distill(*out)
    assert code == 2 and one_line(stderr, "is there already", "--resume", "--overwrite")
    code, _, stderr = distill(*out, "--resume", "--temperature", "2")
    assert code == 2 and one_line(
        stderr, "kd/metrics.json was made with other arguments: temperature 4.0, not 2"
    )
    assert files_in(tmp_path) == before
    assert distill(*out, "--overwrite", "--temperature", "2")[0] == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["temperature"] == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--lr", "1e30"), "seed 0: kd training diverged at epoch 1"),
        (("--float-lr", "1e30"), "seed 0: float training diverged at epoch 1"),
    ],
)
def test_diverged_training_says_so(distill, tmp_path, arguments, said):
    code, _, stderr = distill("--arms", "kd", "--out", tmp_path, *arguments)
    assert code == 2 and one_line(stderr, said, "lower " + arguments[0])


def test_the_terms_of_the_loss_are_shown(distill, tmp_path):
    _, stdout, _ = distill("--no-plots", "--arms", "kd+fa", "labels", "--out", tmp_path)
    shown = r"seed 0  kd\+fa +epoch   2/2  loss (\S+) \(kd (\S+), fa (\S+), label (\S+)\)"
    loss, kd, fa, label = map(float, re.search(shown, stdout).groups())
    assert loss == pytest.approx(kd + 10 * fa + 0.3 * label, abs=2e-3)
    assert re.search(r"seed 0  labels +epoch   2/2  loss \S+  test", stdout)  # one term is the loss


def test_help_fits_a_terminal(distill, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, stdout, _ = distill("--help")
    assert code == 0 and stdout.startswith("usage: distill_classifier.py [options]\n")
    assert "(default: False)" not in stdout and "(default: 15)" in stdout
    assert max(map(len, stdout.splitlines())) <= 110


def test_recipes_are_complete_and_the_demo_is_one(example, monkeypatch):
    options = sys.modules["distill_options"]
    assert list(options.RECIPES) == list(example.data.DATASETS)
    assert len({tuple(sorted(recipe)) for recipe in options.RECIPES.values()}) == 1
    makefile = (EXAMPLES.parent / "Makefile").read_text().replace("\\\n", " ")
    words = re.search(r"DISTILL_DEMO := examples/distill_classifier.py (.*)", makefile)[1].split()
    monkeypatch.setattr(sys, "argv", ["distill_classifier.py", *words])
    args = example.parse_arguments("")
    assert args.dataset == "digits" and args.overwrite and len(args.seeds) > 1
    assert args.labelled == args.teacher_labelled == 100  # as the README says
