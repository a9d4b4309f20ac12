"""Distils a float network into a smaller quantized one: from labels, from the teacher, and from both.

    python examples/distill_classifier.py                                       # digits, one seed
    python examples/distill_classifier.py --dataset fashion-mnist --seeds 0 1 2
    python examples/distill_classifier.py --dataset fashion-mnist --images 1000 --epochs 100 --temperature 4
    python examples/distill_classifier.py --dataset fashion-mnist --labelled 6000 --teacher-labelled 6000
    python examples/distill_classifier.py --dataset mnist --subset 2000 --epochs 2 --arms labels kd

The teacher, a float network, is trained once for each seed. Each arm then trains the same student, of the
same first weights and with the same batches, with another loss:

    labels             cross entropy with the labels
    kd                 the teacher's logits, and the labels
    kd+fa              the same, and feature affinity: how alike the pixels of a feature map are
    kd+ffa             the same, feature affinity by random probes
    kd-unlabelled      as kd, from images alone: what hands out the batches has no labels
    kd+fa-unlabelled   as kd+fa, from images alone

With --images N the students see N training images only. With --labelled N the arms that read labels see N
training images only, in as many steps, and those without labels see all of them. The teacher has been trained
on all, or with --teacher-labelled N on N of them.

Finished arms are kept in --out, with a checkpoint per epoch of the one in work: after Ctrl-C the same command
with --resume goes on, to the same numbers; it can name other --arms and --seeds. The table, the plot and the
JSON file are of all that is finished in --out. Where the data is looked for: see --data-dir.
"""

import ending  # noqa: F401, first: for a Ctrl-C while the others are imported

# isort: split
import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import data
import models
import packing
import plots
import table
import torch
import torchqat
from distill_options import ARMS, parse_arguments, settings_of
from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor, nn
from torchqat.distill import Distiller, FAQDLoss, LazyConnector
from torchqat.nn import FastFeatureAffinityLoss
from torchqat.optim import BCGD, param_groups
from training import orderly, report_memory

FIRST_EPOCHS = (1, 2, 5)
ALL = ["float", *ARMS]


def main() -> None:
    args = parse_arguments(__doc__)
    with orderly(args):
        dataset = data.load(args.dataset, args.data_dir).subset(args.subset)
        dataset = replace(dataset, shift=args.shift, mirror=args.mirror)
        check_taps(args, dataset)
        results = table.fill(args, ALL, settings_of, lambda seed, name: Network(args, seed, dataset, name))
        report(results, args)


def check_taps(args: argparse.Namespace, dataset: data.Data) -> None:
    """Compares features once, so that what does not fit is told before anything is trained."""
    criterion = FAQDLoss(lambda_kd=0, lambda_fa=1, lambda_label=0)
    student, teacher = new_student(args, dataset), new_teacher(args, dataset).eval()
    try:
        Distiller(student, teacher, taps_of(args, student, teacher), criterion)(
            dataset.normalized(dataset.images[:2], torch.device("cpu"))
        )
    except (ValueError, RuntimeError, TypeError) as error:
        ending.fail(f"--taps: {str(error).splitlines()[0]}")


def taps_of(args: argparse.Namespace, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    return args.taps or [tuple(list(models.maps(model))[-1] for model in (student, teacher))]


def new_student(args: argparse.Namespace, dataset: data.Data) -> nn.Module:
    return models.MODELS[args.model](dataset.channels, dataset.size, dataset.classes, args.width)


def new_teacher(args: argparse.Namespace, dataset: data.Data) -> nn.Module:
    new = models.MODELS[args.teacher_model]
    return new(dataset.channels, dataset.size, dataset.classes, args.teacher_width)


class Network(table.Network):
    """The teacher of one seed, or a student of one seed and arm."""

    def __init__(self, args: argparse.Namespace, seed: int, dataset: data.Data, name: str):
        self.arm = ARMS.get(name)
        dataset = dataset.first(args.images) if self.arm else dataset
        if self.arm and not self.arm.labels:
            dataset = dataset.unlabelled()
        else:
            dataset = dataset.labelled(args.labelled if self.arm else args.teacher_labelled)
        self.terms: dict[str, list[Tensor]] = {}
        super().__init__(args, settings_of(args, name), seed, dataset, name)

    def train_from_start(self) -> None:
        torch.manual_seed(self.seed)
        if self.arm:
            self.train_student(self.placed(new_student(self.args, self.dataset)))
        else:
            self.train_teacher(self.placed(new_teacher(self.args, self.dataset)))

    def placed(self, model: nn.Module) -> nn.Module:
        # The convolutions take most of the time, and up to half less of it in this layout.
        return model.to(self.args.device, memory_format=torch.channels_last)

    def train_teacher(self, model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), self.args.float_lr, **self.sgd_options())
        self.train("float", model, optimizer, self.args.float_epochs)
        self.progress["bytes"]["float"] = packing.save(self.float_file, model)

    def train_student(self, student: nn.Module) -> None:
        """In float, then quantized, with one and the same loss."""
        args, warm_up = self.args, f"{self.name}, float"
        images = self.dataset.normalized(self.dataset.images[: args.batch_size], args.device)
        report_memory(args, student, images, self.quantize)
        if args.start == "teacher":
            packing.load_into(student, self.float_file)
        distiller = self.distiller(student)
        if args.warm_up and (self.saved is None or self.saved["stage"] == warm_up):
            optimizer = torch.optim.SGD(distiller.parameters(), args.float_lr, **self.sgd_options())
            self.train(warm_up, distiller, optimizer, args.warm_up)
        self.quantize(student)
        if (args.warm_up or args.start == "teacher") and self.saved is None:
            torchqat.calibrate(student, [self.dataset.normalized(self.dataset.images[:1000], args.device)])
        groups = param_groups(student, args.weight_bits)
        groups.append({"name": "connectors", "params": list(distiller.connectors.parameters())})
        optimizer = BCGD(groups, args.lr, **self.sgd_options())
        self.train(self.name, distiller, optimizer, args.epochs)

    def quantize(self, student: nn.Module) -> None:
        torchqat.prepare(student, self.args.act_bits, recompute=self.args.recompute)

    def distiller(self, student: nn.Module) -> Distiller:
        """The student beside its teacher, with the loss of the arm."""
        args, arm = self.args, self.arm
        teacher = new_teacher(args, self.dataset)
        packing.load_into(teacher, self.float_file)
        teacher = self.placed(teacher).eval()
        taps = taps_of(args, student, teacher) if arm.affinity else []
        connectors = {}
        if args.connector != "none":
            connectors = {path: LazyConnector(relu=args.connector == "relu") for path, _ in taps}
        distiller = Distiller(student, teacher, taps, self.criterion(), connectors=connectors)
        distiller.to(args.device).build(self.dataset.normalized(self.dataset.images[:2], args.device))
        torch.manual_seed(self.seed)  # connectors draw numbers, and batches are to be those of all arms
        return distiller

    def criterion(self) -> FAQDLoss:
        args, arm = self.args, self.arm
        if not arm.teacher:
            return FAQDLoss(lambda_kd=0, lambda_fa=0, lambda_label=1)
        affinity = None
        if arm.affinity:
            probes = {"probes": args.probes} if arm.affinity is FastFeatureAffinityLoss else {}
            affinity = arm.affinity(**probes, norm=args.norm)
        weights = (
            args.lambda_kd,
            args.lambda_fa if arm.affinity else 0,
            args.lambda_label if arm.labels else 0,
        )
        return FAQDLoss(*weights, kd=args.kd, temperature=args.temperature, fa=affinity)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        if not self.arm:
            return super().loss(model, images, labels)
        result = model(images, labels)
        for name, term in result.terms._asdict().items():
            if name != "loss" and term is not None:
                self.terms.setdefault(name, []).append(term)
        return result.loss

    def terms_of_loss(self) -> str:
        means = [f"{name} {torch.stack(terms).mean():.4f}" for name, terms in self.terms.items()]
        self.terms = {}
        return f" ({', '.join(means)})" if len(means) > 1 else ""

    def classifier(self, model: nn.Module) -> nn.Module:
        return model.student if self.arm else model


def report(results: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Prints the table, writes it with all numbers, and draws it."""
    first = [epoch for epoch in FIRST_EPOCHS if epoch < args.epochs]
    rows = {name: row_of(name, runs, first) for name, runs in results.items()}
    bits = f"{args.weight_bits}-bit weights and {args.act_bits}-bit activations"
    print(f"\n{args.dataset}: {args.teacher_model}, float, teaches {args.model} of {bits};")
    print("test accuracy in %, mean +- standard deviation of the seeds\n")
    columns = ["", *(f"epoch {epoch}" for epoch in first), "last epoch", "against labels", "seeds", "seconds"]
    print(f"| {' | '.join(columns)} |")
    print("|" + len(columns) * "---|")
    for name, row in rows.items():
        accuracies = *row["first_epochs"].values(), row
        shown = [table.shown(numbers["mean"], numbers["spread"]) for numbers in accuracies]
        gap = ""
        if name in ARMS and name != "labels" and "labels" in rows:
            row["against_labels"] = row["mean"] - rows["labels"]["mean"]
            gap = f"{row['against_labels']:+.2f}"
        missing = [""] * (len(first) + 1 - len(shown))
        cells = row["title"], *missing, *shown, gap, len(row["seeds"]), round(row["seconds"])
        print(f"| {' | '.join(map(str, cells))} |")
    table.publish(args, args.settings, rows, "distill.png", lambda path: draw(path, rows, results))


def row_of(name: str, runs: list[dict], first: list[int]) -> dict:
    if name == "float":
        return {"title": "teacher, float", **table.summary_of(runs), "first_epochs": {}}
    epochs = table.curves(runs, stage=name)
    early = {epoch: table.mean_and_spread(epochs[epoch]) for epoch in first}
    return {"title": ARMS[name].title, **table.summary_of(runs), "first_epochs": early}


def draw(path: Path, rows: dict[str, dict], results: dict[str, list[dict]]) -> None:
    """Test error by epoch of each arm, mean and range of the seeds, and the last accuracy of each seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=(3, 2))
    arms = [name for name in rows if name in ARMS]
    for place, name in enumerate(arms):
        row, color = rows[name], f"C{list(ARMS).index(name)}"
        epochs = table.curves(results[name], stage=name)[1:]
        errors = [[max(100 - accuracy, 0.01) for accuracy in epoch] for epoch in epochs]  # no 0 on the axis
        at = range(1, len(errors) + 1)
        left.plot(at, [statistics.fmean(e) for e in errors], color=color, label=row["title"])
        low, high = [min(e) for e in errors], [max(e) for e in errors]
        left.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        right.plot(row["accuracy"], [place] * len(row["accuracy"]), "o", color=color, alpha=0.5)
        right.plot(row["mean"], place, "|", color=color, markersize=16, markeredgewidth=2)
    if "float" in rows:
        teacher, style = rows["float"]["mean"], {"color": plots.MARK, "linewidth": 0.7, "linestyle": ":"}
        left.axhline(max(100 - teacher, 0.01), label="teacher, float", **style)
        right.axvline(teacher, **style)
    right.set_yticks(range(len(arms)), [rows[name]["title"] for name in arms])
    right.invert_yaxis()
    left.set(xlabel="epoch", yscale="log", title="Test error by epoch (%), mean and range of the seeds")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    right.set(xlabel="test accuracy (%)", title="After the last epoch, each seed (bar: mean)")
    for axes in (left, right):
        axes.grid(color="#e6e6e6")
    left.legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
