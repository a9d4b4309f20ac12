"""Which straight-through estimators train: a paper's MNIST results measured again, and binary weights beside.

    python examples/reproduce_ste_mnist.py --seeds 0 1 2               # the whole table
    python examples/reproduce_ste_mnist.py --seeds 0 1 2 --rows w1a2   # 1-bit weights, 2-bit activations only
    python examples/reproduce_ste_mnist.py --subset 2000 --epochs 2    # a quick try

P. Yin et al., "Understanding straight-through estimator in training activation quantized neural nets", ICLR
2019, give in their table of validation accuracies for LeNet-5 on MNIST, float weights and 2-bit activations:
98.49 % for the identity's slope in backward, 99.24 % for ReLU's, 99.23 % for clipped ReLU's. They start from
a float network, keep the step size alpha fixed, and train for 50 epochs. Here alpha is set from training
images, not from simulated half-Gaussian data, batch normalization keeps its scale and shift, and a cosine
schedule makes do with fewer epochs. The other rows have no published numbers: the same with alpha learned;
and all weights binary (BCGD), alpha learned.

A float network is trained once for each seed, and all rows of the seed start from it. Finished rows are kept
in --out, with a checkpoint per epoch of the one in work: after Ctrl-C the same command with --resume goes on,
to the same numbers; it can name other --rows and --seeds. The table is of all that is finished in --out.
MNIST is read from --data-dir, else $TORCHQAT_DATA, else ./data, and downloaded where it is not there.
"""

import ending  # noqa: F401, first: for a Ctrl-C while the others are imported

# isort: split
import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import data
import models
import options
import packing
import plots
import table
import torch
import torchqat
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import nn
from torchqat.nn import StaircaseReLU
from torchqat.optim import BCGD, param_groups
from training import orderly, report_memory


@dataclass(frozen=True)
class Row:
    """What is trained; `published` is the paper's accuracy in percent."""

    title: str
    ste: str = ""
    learned: bool = False
    weight_bits: int | None = None
    published: float | None = None


ROWS = {
    "relu-frozen": Row("ReLU, alpha frozen", "relu", published=99.24),
    "clipped-frozen": Row("clipped ReLU, alpha frozen", "clipped_relu", published=99.23),
    "identity-frozen": Row("identity, alpha frozen", "identity", published=98.49),
    "relu-learned": Row("ReLU, alpha learned", "relu", learned=True),
    "clipped-learned": Row("clipped ReLU, alpha learned", "clipped_relu", learned=True),
    "identity-learned": Row("identity, alpha learned", "identity", learned=True),
    "w1a2": Row("all weights binary, clipped ReLU", "clipped_relu", learned=True, weight_bits=1),
}
FLOAT = Row("float")
ALL = ("float", *ROWS)
RECIPE = options.RECIPES["mnist"]
FLOAT_SETTINGS = ("subset", "float_epochs", "float_lr", "batch_size", "momentum", "weight_decay")
ACT_BITS = 2


def main() -> None:
    args = parse_arguments()
    with orderly(args):
        dataset = data.load("mnist", args.data_dir).subset(args.subset)
        results = table.fill(args, ALL, settings_of, lambda seed, name: Network(args, seed, dataset, name))
        report(results, args)


def parse_arguments() -> argparse.Namespace:
    parser = options.Parser(usage="%(prog)s [options]", description=__doc__, formatter_class=options.Help)
    task = parser.add_argument_group("task")
    which = f"what to train: {', '.join(ROWS)} (default: all)"
    task.add_argument("--rows", choices=ROWS, nargs="+", default=argparse.SUPPRESS, help=which, metavar="ROW")
    options.add_data(task)
    options.add_schedule(parser.add_argument_group("training"), {"default:": RECIPE})
    options.add_run(parser.add_argument_group("run"), Path("runs/ste-mnist"), ("rows", *options.NOT_SETTINGS))
    args = parser.parse_args(
        namespace=argparse.Namespace(rows=list(ROWS), data_dir=None, subset=None, **RECIPE)
    )
    args.kept = "*/*"
    problem = options.problem_of_run(args)
    if problem:
        ending.fail(problem)
    return args


def settings_of(args: argparse.Namespace, name: str) -> dict:
    keys = FLOAT_SETTINGS if name == "float" else (*FLOAT_SETTINGS, "epochs", "lr")
    return {"row": name, **{key: getattr(args, key) for key in keys}}


class Network(table.Network):
    """One row of one seed, or the float network that the rows of that seed start from."""

    def __init__(self, args: argparse.Namespace, seed: int, dataset: data.Data, name: str):
        self.row = ROWS.get(name, FLOAT)
        super().__init__(args, settings_of(args, name), seed, dataset, name)

    def train_from_start(self) -> None:
        torch.manual_seed(self.seed)
        model = models.lenet5(self.dataset.channels, self.dataset.size, self.dataset.classes)
        # The convolutions take most of the time, and a quarter less of it in this layout.
        model = model.to(self.args.device, memory_format=torch.channels_last)
        if self.name == "float":
            optimizer = torch.optim.SGD(model.parameters(), self.args.float_lr, **self.sgd_options())
            self.train("float", model, optimizer, self.args.float_epochs)
            self.progress["bytes"]["float"] = packing.save(self.float_file, model)
        else:
            images = self.dataset.normalized(self.dataset.images[: self.args.batch_size], self.args.device)
            report_memory(self.args, model, images, self.quantize)
            packing.load_into(model, self.float_file)
            self.train(self.name, model, self.quantized(model), self.args.epochs)

    def quantize(self, model: nn.Module) -> None:
        torchqat.prepare(model, ACT_BITS, ste=self.row.ste, recompute=self.args.recompute)

    def quantized(self, model: nn.Module) -> BCGD:
        """Makes the activations staircases and returns the optimizer: with float weights it is plain SGD."""
        self.quantize(model)
        torchqat.calibrate(model, [self.dataset.normalized(self.dataset.images[:1000], self.args.device)])
        for module in model.modules():
            if isinstance(module, StaircaseReLU):
                module.alpha.requires_grad_(self.row.learned)
        return BCGD(param_groups(model, self.row.weight_bits), self.args.lr, **self.sgd_options())


def report(results: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Prints the table, writes it with all numbers, and draws it."""
    summary = {}
    print("\nLeNet-5 on MNIST, activations of 2 bits, test accuracy in % after the last epoch\n")
    print("| row | published | ours, mean +- standard deviation | seeds | epochs | seconds a seed |")
    print("|---|---|---|---|---|---|")
    for name, runs in results.items():
        row, numbers = ROWS.get(name, FLOAT), table.summary_of(runs)
        summary[name] = {"title": row.title, "published": row.published, **numbers}
        ours, seconds = table.shown(numbers["mean"], numbers["spread"]), numbers["seconds"]
        cells = row.title, row.published or "", ours, len(runs), numbers["epochs"], f"{seconds:.1f}"
        print(f"| {' | '.join(map(str, cells))} |")
    settings = {key: getattr(args, key) for key in (*FLOAT_SETTINGS, "epochs", "lr")}
    table.publish(args, settings, summary, "ste_mnist.png", lambda path: draw(path, summary, results))


def draw(path: Path, summary: dict[str, dict], results: dict[str, list[dict]]) -> None:
    """The last accuracy of each seed beside the published one, and the mean over seeds by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    for place, (name, row) in enumerate(summary.items()):
        left.plot(row["accuracy"], [place] * len(row["accuracy"]), "o", color=plots.FLOAT, alpha=0.4)
        left.plot(row["mean"], place, "|", color=plots.FLOAT, markersize=16, markeredgewidth=2)
        if row["published"]:
            left.plot(row["published"], place, "D", color=plots.QUANTIZED, markersize=6)
        means = map(statistics.fmean, table.curves(results[name], stage=name))
        errors = [max(100 - mean, 0.01) for mean in means]  # one of 10,000 images: the axis has no 0
        right.plot(errors, ".--" if name == "float" else ".-", label=row["title"])
    left.plot([], [], "o", color=plots.FLOAT, alpha=0.4, label="ours, each seed (bar: mean)")
    left.plot([], [], "D", color=plots.QUANTIZED, label="published")
    left.set_yticks(range(len(summary)), [row["title"] for row in summary.values()])
    left.invert_yaxis()
    left.set(xlabel="test accuracy (%)", title="After the last epoch")
    right.set(xlabel="epoch", title="Test error by epoch (%), mean of the seeds", yscale="log")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.grid(color="#e6e6e6")
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="upper right")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
