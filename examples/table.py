"""A table of networks: each row is trained once for each seed, and kept in a folder as it is finished."""

import abc
import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import checkpoint
import data
import plots
from matplotlib import pyplot as plt
from training import Training, conditions

Settings = Callable[[argparse.Namespace, str], dict]


class Network(Training, abc.ABC):
    """One row of one seed, in a folder of its own; `train_from_start` is what a program adds."""

    def __init__(self, args: argparse.Namespace, settings: dict, seed: int, dataset: data.Data, name: str):
        self.name = name
        self.metrics = metrics_of(args, seed, name)
        super().__init__(args, settings, seed, dataset, self.metrics.parent)

    def go(self) -> None:
        """Trains and writes metrics.json, unless that is done."""
        if not self.metrics.exists():
            self.train_from_start()
            last = self.progress["history"][-1]
            what = {"seed": self.seed, "accuracy": last["accuracy"], "epochs": last["epoch"]}
            checkpoint.write_json(
                self.metrics, {**conditions(self.args, self.settings), **what, **self.progress}
            )
        self.checkpoint.unlink(missing_ok=True)

    @abc.abstractmethod
    def train_from_start(self) -> None:
        """Trains from the first weights, or from what a checkpoint has."""

    @property
    def float_file(self) -> Path:
        """The float network of this seed, which the row "float" writes."""
        return self.folder.parent / "float" / "float.tqat"


def metrics_of(args: argparse.Namespace, seed: int, name: str) -> Path:
    return args.out / f"seed-{seed}" / name / "metrics.json"


def fill(
    args: argparse.Namespace,
    names: list[str],
    settings_of: Settings,
    new: Callable[[int, str], Network],
) -> dict[str, list[dict]]:
    """Trains what is missing of the rows `args.rows` and the float network; returns all that is finished."""
    with checkpoint.claimed(args.out):
        if args.overwrite:
            for seed, name in itertools.product(args.seeds, names):
                metrics_of(args, seed, name).unlink(missing_ok=True)
        finished(args, names, settings_of)  # what cannot stand in one table is refused before training
        wanted = [name for name in names if name in ("float", *args.rows)]
        for network in [new(seed, name) for seed in args.seeds for name in wanted]:
            network.go()
        return finished(args, names, settings_of)


def finished(args: argparse.Namespace, names: list[str], settings_of: Settings) -> dict[str, list[dict]]:
    """The results of all rows and seeds in --out, by name; those of other settings are an error."""
    seeds = sorted(int(n) for path in args.out.glob("seed-*") if (n := path.name[5:]).isdecimal())
    found = {}
    for name in names:
        read = (checkpoint.read_result(metrics_of(args, n, name), settings_of(args, name), n) for n in seeds)
        if runs := [result for result in read if result]:
            found[name] = runs
    return found


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def summary_of(runs: list[dict]) -> dict:
    """The numbers of one row: accuracies after the last epoch, one of each seed, their mean and spread."""
    accuracy = [run["accuracy"] for run in runs]
    numbers = {"accuracy": accuracy, "seeds": [run["seed"] for run in runs], "epochs": runs[0]["epochs"]}
    return {
        **mean_and_spread(accuracy),
        **numbers,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def curves(runs: list[dict], stage: str) -> list[list[float]]:
    """The accuracies of a stage by epoch, from before the first; of each epoch those of all seeds."""
    histories = [[entry["accuracy"] for entry in run["history"] if entry["stage"] == stage] for run in runs]
    return [list(epoch) for epoch in zip(*histories, strict=True)]


def shown(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" + ("" if spread is None else f" +- {spread:.2f}")


def publish(
    args: argparse.Namespace, settings: dict, rows: dict[str, dict], name: str, draw: Callable[[Path], None]
) -> None:
    """Writes the numbers of a table and its plot, and says where they are."""
    checkpoint.write_json(args.out / "metrics.json", {**conditions(args, settings), "rows": rows})
    plot = args.out / name
    plot.unlink(missing_ok=True)  # an old one would not show these numbers
    if not args.no_plots:
        with plt.rc_context(plots.STYLE):
            draw(plot)
    print(f"\nall numbers{'' if args.no_plots else ' and the plot'} are in {args.out}")
