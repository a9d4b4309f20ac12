"""The reports of scripts/gpu_check.sh, from what its stages have left so far: one Markdown, one JSON.

    python scripts/gpu_report.py --folder FOLDER --gpu GPU --logs LOGS --command TEXT --seconds N STAGE...

LOGS holds verdicts/<stage> (verdict, seconds, limit and reason, separated by tabs), <stage>.log, and what the
stages benchmarks and ncu write there. Each report is there as a whole or not at all. Needs no torch.
"""

import argparse
import csv
import datetime
import json
import os
import re
import sys
from pathlib import Path

LINES = {"passed": 40, "SKIPPED": 10}  # of a log, from its end
MOST_LINES = 150  # of any other, and of tables of results

# Nsight Compute's names, and ours.
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, kind in {"folder": Path, "gpu": str, "logs": Path, "command": str, "seconds": int}.items():
        parser.add_argument(f"--{option}", type=kind, required=True)
    parser.add_argument("stages", nargs="+", metavar="stage")
    options = parser.parse_args()
    report = {
        "command": options.command,
        "gpu": options.gpu,
        "date": datetime.date.today().isoformat(),
        "seconds": options.seconds,
        "stages": [stage(name, options.logs) for name in options.stages],
        "benchmarks": benchmarks(options.logs / "benchmarks.json"),
        "kernels": kernels(options.logs / "ncu.csv"),
    }
    path = options.folder / f"gpu_check-{options.gpu}"
    write(path.with_name(path.name + ".json"), json.dumps(report, indent=1) + "\n")
    write(path.with_name(path.name + ".md"), markdown(report))


def stage(name, logs):
    try:
        verdict, seconds, limit, reason = (
            (logs / "verdicts" / name).read_text().rstrip("\n").split("\t", maxsplit=3)
        )
    except (OSError, ValueError):
        verdict, seconds, limit, reason = "NOT REACHED", "", "", ""
    most = MOST_LINES if name == "benchmarks" else LINES.get(verdict, MOST_LINES)
    lines = last_lines(logs / f"{name}.log", most)
    facts = {"name": name, "verdict": verdict, "reason": reason, "log": lines}
    return facts | {"seconds": number(seconds), "limit_s": number(limit)}


def number(text):
    return int(text) if text.isdecimal() else None


def last_lines(path, count):
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def benchmarks(path):
    """What benchmarks/run.py has written so far."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def kernels(path):
    """A row per kernel that ncu measured: its name and the metrics with their units, as text."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    rows = list(csv.DictReader(lines[head:]))
    units = rows[0] if rows and not rows[0]["ID"] else {}  # the row below the head
    measured = [row for row in rows if row["ID"]]
    return [
        {"kernel": short(row["Kernel Name"]), "grid": row.get("Grid Size", "")}
        | {
            ours: f"{row[metric]} {units.get(metric, '')}".strip()
            for metric, ours in METRICS.items()
            if row.get(metric)
        }
        for row in measured
    ]


def short(name):
    """A demangled name without its namespaces and arguments."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # the types of template arguments that are numbers
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\b(?:torchqat|cuda|math|c10)::", "", name)


def markdown(report):
    parts = [
        f"# GPU check: {report['gpu']}\n",
        f"Written by `{report['command']}` on {report['date']}, {report['seconds']} s after it began.\n",
        table(["stage", "verdict", "seconds", "limit", ""], [verdict_row(s) for s in report["stages"]]),
    ]
    if report["kernels"]:
        heads = ["kernel", "grid", *METRICS.values()]
        parts.append("## Kernels\n")
        parts.append(
            table(
                heads, [[f"`{k['kernel']}`", *(k.get(h, "") for h in heads[1:])] for k in report["kernels"]]
            )
        )
    for s in report["stages"]:
        if not s["log"]:
            continue
        fence = "" if s["name"] == "benchmarks" and s["verdict"] == "passed" else "```\n"
        parts.append(f"## {s['name']}\n\n{fence}" + "\n".join(s["log"]) + f"\n{fence}")
    return "\n".join(parts)


def verdict_row(s):
    times = ["" if value is None else f"{value} s" for value in (s["seconds"], s["limit_s"])]
    return [s["name"], s["verdict"], *times, s["reason"].replace("|", "\\|")]


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
