"""Times contenders side by side, each in turn, round after round: a noisy moment is noisy for all."""

import functools
import importlib
import importlib.util
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import meters
import torch

BLOCK_SECONDS = 2e-3  # a call shorter than this is repeated until a block of calls is this long
EVENT_BLOCK = 40  # GPU calls of 50 us and more, this many or fewer to a block, are timed by events


class Absent(Exception):
    """A contender that cannot take part; the message says why."""


@dataclass
class Contender:
    name: str
    make: Callable[[], Callable[[], object]]  # builds the inputs and returns the call to measure
    compiles: bool = False  # starts too slowly for --quick


@dataclass
class Curve:
    """A row of problems that differ in one number."""

    title: str
    axis: str  # what the number counts
    at: int  # the number of this problem


@dataclass
class Problem:
    name: str
    elements: int
    contenders: list[Contender]
    floor_bytes: int  # what has to cross memory once, whoever does it; without it and flops there is no floor
    floor_flops: int = 0
    saves: bool = False  # the call builds an autograd graph: count what it keeps
    least_rounds: int = 5  # more of them where a few percent matter and a round is long
    beside: tuple[str, ...] = ()  # contenders that the table divides everyone's times by
    curve: Curve | None = None  # the curve that this problem is a point of
    threads: int | None = None  # where that is what the curve is about
    again: Callable[[], "Problem"] | None = None  # see `renewable`


@dataclass
class Effort:
    """How long to go on: at least `least` rounds, then until `seconds` or `most` rounds are spent."""

    least: int
    most: int
    seconds: float


def renewable(build):
    """Lets the problems that `build` returns be built again: the same contenders with inputs of their own."""

    @functools.wraps(build)
    def built(*args, **kwargs):
        return replace(build(*args, **kwargs), again=lambda: built(*args, **kwargs))

    return built


class Rotation:
    """Calls that differ in their inputs, one after the other."""

    def __init__(self, calls):
        self.calls, self.order = calls, itertools.cycle(calls)

    def __call__(self):
        return next(self.order)()


QUICK = Effort(least=3, most=3, seconds=0.0)


def require(module):
    """The module, or Absent when it is not installed. One installed but broken raises its own error."""
    distribution = module.partition(".")[0]
    if importlib.util.find_spec(distribution) is None:
        raise Absent(f"{distribution} is not installed")
    return importlib.import_module(module)


def measure(problem, device, rates, quick=False, advance=lambda name: None):
    """One row per contender, in their order, and the floor: the fastest copy of as many bytes, or the flops
    at the speed of the machine's matrix product, whichever takes longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(problem.threads or threads)
    try:
        return measured(problem, device, rates, quick, advance)
    finally:
        torch.set_num_threads(threads)


def measured(problem, device, rates, quick, advance):
    copy = Contender("copy", lambda: meters.copy_of(problem.floor_bytes, device))
    inputs = input_sets(problem, device)
    rows, calls, blocks = {}, {}, {}
    for contender in [copy, *problem.contenders]:
        name = contender.name
        advance(name)
        row = rows[name] = {"name": name, "status": "ok"}
        try:
            if quick and contender.compiles:
                raise Absent("left out by --quick")
            each = [makers.get(name, contender).make() for makers in inputs]
            blocks[name] = [warm_up(call, device) for call in each][-1]
            calls[name] = Rotation(each) if len(each) > 1 else each[0]
        except Absent as reason:
            row |= {"status": "absent", "reason": str(reason)}
        except Exception as error:  # that a peer fails is a result, whatever the error
            row |= {"status": "failed", "reason": first_line(error)}
    effort = QUICK if quick else Effort(problem.least_rounds, most=60, seconds=12.0)
    times = interleave(calls, blocks, device, effort, advance)
    for name, call in calls.items():
        rows[name] |= summary(times[name]) | {"times": ratios(times, name, problem.beside)}
        one = call.calls[0] if isinstance(call, Rotation) else call
        rows[name] |= meters.footprint(one, problem.elements, problem.saves, device)
    if device == "cuda":
        replay(calls, rows, effort, advance)
    del rows["copy"]
    copying = min(times["copy"]) if problem.floor_bytes else 0.0
    computing = problem.floor_flops / rates["flops_per_s"]
    facts = {"name": problem.name, "elements": problem.elements, "beside": list(problem.beside)}
    if problem.curve:
        facts["curve"] = asdict(problem.curve)
    facts["floor"] = {
        "bytes": problem.floor_bytes,
        "flops": problem.floor_flops,
        "by": "flops" if computing > copying else "bytes",
        "ms": 1e3 * max(copying, computing),
    }
    return facts | {"rows": list(rows.values())}


def input_sets(problem, device):
    """Makers of each contender by its name, for as many sets of inputs as it takes for a call not to find its
    own in a GPU's cache. On a CPU one: there a call finds in the caches what the call before has left, as it
    does in a loop, and so does the copy that is the floor."""
    count = meters.sets_beyond_cache(max(problem.floor_bytes, 4 * problem.elements), device)
    problems = [problem, *((problem.again or (lambda: problem))() for _ in range(count - 1))]
    return [{contender.name: contender for contender in each.contenders} for each in problems]


def replay(calls, rows, effort, advance):
    """The calls once more, as CUDA graphs: the device's time, whatever the host does."""
    graphs = {}
    for name, call in calls.items():
        try:
            each = call.calls if isinstance(call, Rotation) else [call]
            graphs[name] = Rotation([meters.captured(one) for one in each])
        except Exception as error:  # what waits for the device cannot be captured
            rows[name]["graph"] = {"status": "failed", "reason": first_line(error)}
    times = interleave(graphs, dict.fromkeys(graphs, 1), "cuda", effort, advance)
    for name in graphs:
        rows[name]["graph"] = {"status": "ok"} | summary(times[name])


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def warm_up(call, device):
    """Runs the call until what it prepares on first use is prepared; returns how many calls make a block."""
    for _ in range(3):
        seconds = wall_clock(call, 1, device)
        if seconds > 1:
            return 1
    return max(1, math.ceil(BLOCK_SECONDS / max(seconds, 1e-7)))


def wall_clock(call, count, device):
    """Seconds per call, the device's work included."""
    meters.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    meters.synchronize(device)
    return (time.perf_counter() - start) / count


def interleave(calls, blocks, device, effort, advance):
    """Seconds per call of each contender in each round. Events time what is long enough on a GPU for its host
    not to matter; the wall clock the rest, and everything on a CPU."""
    events = meters.ColdEvents() if device == "cuda" else None
    times = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        shuffle(order)  # so that no one always follows the same neighbor's caches
        for name in order:
            advance(name)
            alone = events is not None and blocks[name] <= EVENT_BLOCK
            times[name].append(
                events(calls[name]) if alone else wall_clock(calls[name], blocks[name], device)
            )
    return times


def summary(seconds):
    """Median, quartiles and least in milliseconds."""
    ms = sorted(1e3 * s for s in seconds)
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return {
        "ms": statistics.median(ms),
        "low_ms": low,
        "high_ms": high,
        "least_ms": ms[0],
        "rounds": len(ms),
    }


def ratios(times, name, beside):
    """How many times as long as others it took, the median over rounds: neighbors in time share its noise."""
    pairs = {other: zip(times[name], times[other], strict=True) for other in beside if other in times}
    return {other: statistics.median(mine / its for mine, its in each) for other, each in pairs.items()}
