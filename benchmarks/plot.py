"""Draws reports of run.py, one PNG per case beside each.

python benchmarks/plot.py benchmarks/results/FILE.json...
"""

import argparse
import json
import sys
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
from matplotlib import ticker

OURS, PEER = "#c0392b", "#7f8c8d"
OUR_LINES = ("#c0392b", "#e67e22", "#8e44ad", "#d35480")
PEER_LINES = ("#2c3e50", "#2980b9", "#16a085", "#7f8c8d", "#6c8e23")


def draw(report_path):
    """Writes the plots; returns their paths. ValueError where it is no report of run.py."""
    report_path = Path(report_path)
    try:
        report = json.loads(report_path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{report_path} is no report of run.py: {error}") from None
    if not (isinstance(report, dict) and "machine" in report and report.get("cases")):
        raise ValueError(f"{report_path} is no report of run.py, or of a run that measured nothing")
    return [draw_case(name, results, report, report_path) for name, results in report["cases"].items()]


def draw_case(name, results, report, report_path):
    """A panel for each problem, or for each curve that problems are the points of."""
    groups = {}
    for result in results:
        groups.setdefault(result["curve"]["title"] if "curve" in result else result["name"], []).append(
            result
        )
    groups = list(groups.values())
    columns = min(2, len(groups))
    rows = [groups[i : i + columns] for i in range(0, len(groups), columns)]
    heights = [max(map(height, row)) for row in rows]
    figure, panels = plt.subplots(
        len(rows), columns, figsize=(8 * columns, sum(heights) + 0.4), height_ratios=heights, squeeze=False
    )
    for group, panel in zip_longest(groups, panels.flat):
        if group is None:
            panel.set_axis_off()
        elif "curve" in group[0]:
            draw_curve(panel, group)
        else:
            draw_problem(panel, group[0])
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


def height(group):
    return 3.4 if "curve" in group[0] else 1.2 + 0.24 * len(group[0]["rows"])


def draw_problem(panel, result):
    """A bar per contender with its quartiles, and the floor as the wall that none can pass: at each bar stand
    its time and how much of what the machine can do it does. Who has no time has a line of text instead."""
    rows = result["rows"]
    floor = result["floor"]["ms"]
    left, right = limits([row for row in rows if "ms" in row], floor)
    for place, row in enumerate(rows):
        if row["status"] != "ok":
            text = f"  {row['status']}: {row['reason']}"
            panel.text(floor or left, place, text[:90], va="center", fontsize=7, color=PEER, style="italic")
            continue
        color = OURS if row["name"].startswith("torchqat") else PEER
        spread = [[row["ms"] - row["low_ms"]], [row["high_ms"] - row["ms"]]]
        panel.barh(place, row["ms"], xerr=spread, color=color, height=0.7, error_kw={"elinewidth": 1})
        text = f"  {row['ms']:.3g} ms{reached(result['floor'], row['ms'])}"
        panel.text(row["high_ms"], place, text, va="center", fontsize=7)
    if floor:
        panel.axvspan(left, floor, color="black", alpha=0.08, linewidth=0, zorder=0)
        panel.axvline(floor, color="black", linestyle="--", linewidth=1)
        panel.text(
            floor,
            1,
            f" floor {floor:.3g} ms",
            fontsize=7,
            va="bottom",
            transform=panel.get_xaxis_transform(),
        )
    panel.set_xscale("log")
    plain_ticks(panel.xaxis)
    panel.set_xlim(left, right)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.tick_params(axis="x", labelsize=7)
    panel.set_xlabel("ms", fontsize=7)
    panel.set_title(result["name"], fontsize=9, loc="left", pad=14)


def plain_ticks(axis):
    """1, 3, 10, 30 rather than powers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def limits(rows, floor):
    """An axis with room left of the floor, and for text right of the longest bar."""
    times = [row["ms"] for row in rows] or [floor or 1.0]
    left = 0.7 * min([*times, floor or times[0]])
    longest = max([*times, *(row["high_ms"] for row in rows)])
    return left, longest * (longest / left) ** 0.45


def reached(floor, ms):
    """The share of the machine's bandwidth or arithmetic, by which of the two sets the floor."""
    if not floor["ms"]:
        return ""
    # Older reports have floors by bytes only, and no "by".
    work, unit = (floor["flops"], "GFLOP/s") if floor.get("by") == "flops" else (floor["bytes"], "GB/s")
    share = 100 * floor["ms"] / ms
    return f", {share:.{0 if share >= 1 else 1}f} % ({work / ms / 1e6:.3g} {unit})"


def draw_curve(panel, points):
    """Time against the number that the problems differ in; the band of a line is its quartiles."""
    ours, peers = iter(OUR_LINES), iter(PEER_LINES)
    for name in dict.fromkeys(row["name"] for point in points for row in point["rows"]):
        found = [
            (point["curve"]["at"], row)
            for point in points
            for row in point["rows"]
            if row["name"] == name and row["status"] == "ok"
        ]
        if not found:
            continue
        is_ours = name.startswith("torchqat")
        at = [place for place, _ in found]
        (line,) = panel.plot(
            at,
            [row["ms"] for _, row in found],
            marker=".",
            color=next(ours if is_ours else peers, PEER),
            linewidth=2 if is_ours else 1.2,
            label=name,
        )
        low, high = ([row[key] for _, row in found] for key in ("low_ms", "high_ms"))
        panel.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    at, floors = [p["curve"]["at"] for p in points], [p["floor"]["ms"] for p in points]
    if any(floors):
        panel.plot(at, floors, color="black", linestyle="--", linewidth=1, label="floor")
    panel.set_xscale("log", base=2)
    panel.set_xticks(at, [f"$2^{{{n.bit_length() - 1}}}$" if n > 4096 else str(n) for n in at])
    panel.set_yscale("log")
    plain_ticks(panel.yaxis)
    panel.tick_params(labelsize=7)
    panel.set_xlabel(points[0]["curve"]["axis"], fontsize=7)
    panel.set_ylabel("ms", fontsize=7)
    panel.set_title(points[0]["curve"]["title"], fontsize=9, loc="left")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", nargs="+", metavar="FILE.json", help="what run.py --json has written")
    for report in parser.parse_args().reports:
        try:
            for written in draw(report):
                print(f"wrote {written}")
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
