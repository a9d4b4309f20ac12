"""Draws a report of run.py, one PNG per case beside it.

python benchmarks/plot.py benchmarks/results/FILE.json
"""

import json
import sys
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

OURS, PEER = "#c0392b", "#7f8c8d"


def draw(report_path):
    """Writes the plots; returns their paths."""
    report_path = Path(report_path)
    report = json.loads(report_path.read_text())
    return [draw_case(name, results, report, report_path) for name, results in report["cases"].items()]


def draw_case(name, results, report, report_path):
    columns = min(2, len(results))
    rows = [results[i : i + columns] for i in range(0, len(results), columns)]
    heights = [1.2 + 0.24 * max(len(result["rows"]) for result in row) for row in rows]
    figure, panels = plt.subplots(
        len(rows), columns, figsize=(8 * columns, sum(heights)), height_ratios=heights, squeeze=False
    )
    for result, panel in zip_longest(results, panels.flat):
        draw_problem(panel, result) if result else panel.set_axis_off()
    figure.set_layout_engine("constrained")
    machine = report["machine"]
    device = machine.get("gpu", machine["cpu"])
    figure.suptitle(
        f"{name}: {device}, {machine['threads']} thread(s), torch {machine['versions']['torch']}", fontsize=10
    )
    path = report_path.with_name(f"{report_path.stem}_{name}.png")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return path


def draw_problem(panel, result):
    """A bar per contender, quartiles on it; who has no time has a line of text in its place."""
    rows = result["rows"]
    floor = result["floor"]["ms"]
    for place, row in enumerate(rows):
        color = OURS if row["name"].startswith("torchqat") else PEER
        if row["status"] != "ok":
            text = f"{row['status']}: {row['reason']}"
            panel.text(floor or 1, place, text[:90], va="center", fontsize=7, color=PEER, style="italic")
            continue
        spread = [[row["ms"] - row["low_ms"]], [row["high_ms"] - row["ms"]]]
        panel.barh(place, row["ms"], xerr=spread, color=color, height=0.7, error_kw={"elinewidth": 1})
        panel.text(row["high_ms"], place, f" {row['ms']:.3g}", va="center", fontsize=7)
    if floor:
        panel.axvline(floor, color="black", linestyle="--", linewidth=1, label=f"floor {floor:.3g} ms")
        panel.legend(fontsize=7)
    panel.set_xscale("log")
    panel.margins(x=0.12)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=7)
    panel.set_xlabel("ms", fontsize=7)
    panel.set_title(result["name"], fontsize=9, loc="left")


if __name__ == "__main__":
    for written in draw(sys.argv[1]):
        print(f"wrote {written}")
