"""Draws the pictures of docs/ anew, with the library that is installed.

python scripts/draw_docs.py
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import plots  # noqa: E402 - it lies in examples/

SWEEP = ROOT / "benchmarks" / "results" / "distillation_sweep.csv"
RESULTS = ("epoch_1", "epoch_2", "epoch_5", "last_epoch", "mean_of_last_3")
TEACHER = ("teacher", "teacher_labels", "lambda_label", "kd", "temperature")
AFFINITY = ("affinity", "lambda_fa", "maps", "connector", "affinity_epochs")


def main():
    docs = ROOT / "docs"
    pictures = {
        "ste_catalogue.png": lambda path: plots.estimators(path, bits=2),
        "distillation_sweep.png": draw_sweep,
    }
    for name, draw in pictures.items():
        with plots.plt.rc_context(plots.STYLE):
            draw(docs / name)
        print(f"wrote {(docs / name).relative_to(ROOT)}")


def draw_sweep(path):
    """What a teacher in place of labels did to the accuracy, and what feature affinity added to logits."""
    with SWEEP.open(newline="") as file:
        runs = list(csv.DictReader(file))
    teachers = differences(
        runs,
        lambda run: run["kd"] and not run["affinity"] and not float(run["lambda_label"]),
        TEACHER,
        {"teacher": ""},
        lambda run: f"{run['kd']} {run['temperature']}".strip() + f" of {run['teacher']}",
    )
    affinities = differences(
        runs,
        lambda run: run["affinity"],
        AFFINITY,
        {"affinity": ""},
        lambda run: (
            f"{run['affinity']} x {run['lambda_fa']} on {run['maps']}"
            + f"{', connector' if run['connector'] else ''}"
            + f"{', first half' if int(run['affinity_epochs']) < int(run['epochs']) else ''}"
        ),
    )
    panels = {
        "a teacher's logits, without labels, over labels": teachers,
        "affinity over logits alone": affinities,
    }
    rows = [len(panel) for panel in panels.values()]
    figure, axes = plots.plt.subplots(
        2, 1, figsize=(9, 1.5 + 0.21 * sum(rows)), height_ratios=rows, sharex=True, layout="constrained"
    )
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for place, gains in enumerate(panel.values()):
            axis.plot(gains, [place] * len(gains), "o", color="C0", alpha=0.6, markersize=4)
        axis.axvline(0, color=plots.MARK, linewidth=0.7)
        axis.set_yticks(range(len(panel)), panel, fontsize=6)
        axis.invert_yaxis()
        axis.grid(color="#e6e6e6")
        axis.set_title(title, fontsize=9)
    axes[-1].set_xlabel("points of test accuracy after the last epoch; each seed")
    figure.savefig(path)
    plots.plt.close(figure)


def differences(runs, wanted, varied, partner, name):
    """The gain of the wanted runs over those that differ in the `varied` columns only and match `partner`."""

    def key(run):
        return tuple(value for column, value in run.items() if column not in (*varied, *RESULTS))

    partners = {key(run): run for run in runs if all(run[k] == v for k, v in partner.items())}
    gains = defaultdict(list)
    for run in filter(wanted, runs):
        if key(run) in partners:
            start = "float" if int(run["start_labels"]) else "random"
            task = f"{run['images']} images, {run['epochs']} epochs, {run['student']} from {start}"
            gain = float(run["last_epoch"]) - float(partners[key(run)]["last_epoch"])
            gains[f"{task}, lr {run['lr']}: {name(run)}"].append(gain)
    return gains


if __name__ == "__main__":
    main()
