"""Measures the operators beside their peers.

    python benchmarks/run.py                       every case on the CPU
    python benchmarks/run.py bcgd --json b.json    one case; results in b.json and plots beside it
    python benchmarks/run.py --quick               small problems, three rounds: does everything run?

Tables go to the standard output as Markdown. A peer that is not installed or fails is listed with the
reason; that one of ours fails makes the exit status 1.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import cases
import harness
import meters
import torch
from tqdm import tqdm


def main():
    options = arguments(sys.argv[1:])
    torch.set_num_threads(options.threads)
    meters.keep_freed_memory()
    report = {
        "command": f"python benchmarks/run.py {shlex.join(sys.argv[1:])}".strip(),
        "device": options.device,
        "quick": options.quick,
        "machine": meters.machine(options.device),
        "rates": meters.rates(options.device),
        "cases": {},
    }
    print(headline(report))
    for name in options.cases or cases.names():
        report["cases"][name] = run_case(name, report, options)
        if options.json:
            write(report, options.json)
    if options.json:
        import plot

        for path in plot.draw(options.json):
            print(f"wrote {path}", file=sys.stderr)
    sys.exit(any(failed(results) for results in report["cases"].values()))


def arguments(words):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "cases", nargs="*", metavar="case", help=f"any of {', '.join(cases.names())}; default: all"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads for every contender"
    )
    parser.add_argument("--quick", action="store_true", help="small problems, three rounds, nothing compiled")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results here and the plots beside it"
    )
    options = parser.parse_args(words)
    unknown = [name for name in options.cases if name not in cases.names()]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(cases.names())}")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"unknown device {options.device!r}; choose from cpu, cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: torch.cuda.is_available() is False")
    if not 1 <= options.threads <= 1024:  # torch crashes where the system has no more threads to give
        parser.error(f"--threads must be in 1..1024, got {options.threads}")
    if options.json:
        options.json = options.json.resolve()  # what a link points to is written, the link stays
        problem = cannot_write(options.json)
        if problem:
            parser.error(f"--json: {problem}")
    return options


def cannot_write(path):
    """Why a report cannot be written to this path, or None; asked before anything is measured."""
    try:
        if path.exists() and not path.is_file():
            return f"{path} is there, and is not a file"
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return f"cannot write to the folder {path.parent}: {error.strerror}"


def run_case(name, report, options):
    results = []
    for problem in cases.load(name).problems(options.device, options.quick):
        with tqdm(desc=f"{name}, {problem.name}", unit=" measurements", file=sys.stderr, leave=False) as bar:

            def advance(contender, bar=bar):
                bar.set_postfix_str(contender, refresh=False)
                bar.update()

            results.append(harness.measure(problem, options.device, report["rates"], options.quick, advance))
        if "curve" not in results[-1]:
            print(table(name, results[-1]), flush=True)
    for title, points in curves(results).items():
        print(curve_table(f"{name}: {title}", points), flush=True)
    return results


def curves(results):
    """The points of each curve, by its title."""
    found = {}
    for result in results:
        if "curve" in result:
            found.setdefault(result["curve"]["title"], []).append(result)
    return found


def failed(results):
    """Whether a contender of ours could not be measured."""
    rows = [row for result in results for row in result["rows"]]
    return any(row["status"] == "failed" and row["name"].startswith("torchqat") for row in rows)


def headline(report):
    machine, rates = report["machine"], report["rates"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return (
        f"`{report['command']}`\n\n{device}, torch {torch.__version__}: "
        f"copies {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"float32 products {rates['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )


def table(case, result):
    """A row for each contender; a column that all would leave empty is left out."""
    floor = result["floor"]["ms"]
    columns = {
        "median ms": lambda row: f"{row['ms']:.4g}",
        "quartiles": lambda row: f"{row['low_ms']:.4g} to {row['high_ms']:.4g}",
        "least": lambda row: f"{row['least_ms']:.4g}",
        "graph replay ms": lambda row: replayed(row.get("graph")),
        "times the floor": lambda row: number(row["ms"] / floor if floor else None),
        **{
            f"times {name}": lambda row, name=name: number(row["times"].get(name))
            for name in result["beside"]
        },
        "saved B/element": lambda row: number(row.get("saved_bytes_per_element")),
        "peak extra B/element": lambda row: number(row.get("peak_bytes_per_element")),
        "peak extra MiB": lambda row: mebibytes(row.get("peak_bytes")),
    }
    measured = [row for row in result["rows"] if row["status"] == "ok"]
    columns = {
        head: cell
        for head, cell in columns.items()
        if head == "median ms" or any(cell(row) for row in measured)
    }
    lines = [f"\n### {case}: {result['name']}{f' (floor {floor:.4g} ms)' if floor else ''}\n"]
    lines.append(f"| contender | {' | '.join(columns)} |")
    lines.append("|---" * (1 + len(columns)) + "|")
    for row in result["rows"]:
        if row["status"] == "ok":
            cells = [cell(row) for cell in columns.values()]
        else:
            cells = [f"{row['status']}: {row['reason']}"] + [""] * (len(columns) - 1)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_table(title, points):
    """A row for each point, a column for each contender, and who could not take part below."""
    names = list(dict.fromkeys(row["name"] for point in points for row in point["rows"]))
    head = [points[0]["curve"]["axis"], *names]
    floors = any(point["floor"]["ms"] for point in points)
    lines = [f"\n### {title}, median ms\n", f"| {' | '.join([*head, 'floor'] if floors else head)} |"]
    lines.append("|---" * (len(head) + floors) + "|")
    for point in points:
        rows = {row["name"]: row for row in point["rows"]}
        cells = [f"{rows[name]['ms']:.4g}" if "ms" in rows.get(name, ()) else "" for name in names]
        floor = [f"{point['floor']['ms']:.4g}"] if floors else []
        lines.append(f"| {' | '.join([str(point['curve']['at']), *cells, *floor])} |")
    failures = {
        f"{row['name']} {row['status']}: {row['reason']}"
        for point in points
        for row in point["rows"]
        if row["status"] != "ok"
    }
    return "\n".join([*lines, *([""] if failures else []), *sorted(failures)])


def replayed(graph):
    """The median as a CUDA graph, or why there is none."""
    if graph is None:
        return ""
    return f"{graph['ms']:.4g}" if graph["status"] == "ok" else f"{graph['status']}: {graph['reason'][:60]}"


def number(value):
    return "" if value is None else f"{value:.3g}"


def mebibytes(value):
    return "" if value is None else f"{value / 2**20:.1f}"


def write(report, path):
    """All of the file or none: a reader never sees half a report."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
