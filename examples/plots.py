"""The pictures of a run: how it went, where weights and activations lie, and the estimators there are."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor, nn
from torchqat import MemoryReport
from torchqat import functional as QF
from torchqat.nn import StaircaseReLU
from torchqat.optim import BCGD

FLOAT, QUANTIZED, MARK, GRAY = "#4c72b0", "#c44e52", "#222222", "#b8bcc4"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
MAX_PANELS = 12


def draw_all(folder: Path, history: list[dict], model: nn.Module, optimizer, images: Tensor) -> None:
    """Writes every picture of a run as PNG."""
    with plt.rc_context(STYLE):
        training(folder / "training.png", history)
        if isinstance(optimizer, BCGD) and any(group.get("quant_bits") for group in optimizer.param_groups):
            weights(folder / "weights.png", model, optimizer)
        activations(folder / "activations.png", model, images)
        first = next(module for module in model.modules() if isinstance(module, StaircaseReLU))
        estimators(folder / "estimators.png", first.bits)


def draw_memory(path: Path, report: MemoryReport) -> None:
    """Bars for what each layer keeps for backward, in the float network and in the quantized one."""
    with plt.rc_context(STYLE):
        size, unit = (2**20, "MiB") if report.float_bytes >= 2**22 else (2**10, "KiB")
        figure, axes = plt.subplots(figsize=(7, 1 + 0.22 * len(report.layers)))
        places = range(len(report.layers))
        for shift, color, what, total in (
            (-0.2, FLOAT, "float_bytes", report.float_bytes),
            (0.2, QUANTIZED, "bytes", report.bytes),
        ):
            name = "float" if color is FLOAT else "quantized"
            axes.barh(
                [place + shift for place in places],
                [getattr(layer, what) / size for layer in report.layers],
                0.4,
                color=color,
                label=f"{name}: {total / size:.1f} {unit} in all",
            )
        axes.set_yticks(places, [f"{layer.name} ({layer.kind})" for layer in report.layers])
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set(xlabel=f"kept for backward ({unit})", title=f"{report.ratio:.2f} of the float network")
        axes.legend()
        _save(figure, path)


def training(path: Path, history: list[dict]) -> None:
    """Loss and accuracy of both trainings, one after the other on one axis of epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    start = 0
    for stage, color in (("float", FLOAT), ("quantized", QUANTIZED)):
        entries = [entry for entry in history if entry["stage"] == stage]
        epochs = [start + entry["epoch"] for entry in entries]
        left.plot(epochs[1:], [entry["loss"] for entry in entries[1:]], ".-", color=color, label=stage)
        accuracy = [entry["accuracy"] for entry in entries]
        right.plot(epochs, accuracy, ".-", color=color, label=f"{stage}: {accuracy[-1]:.2f} % at the end")
        start = epochs[-1]
    accuracies = sorted(entry["accuracy"] for entry in history)
    right.set_ylim(min(accuracies[len(accuracies) // 5], accuracies[-1] - 2) - 1, 100.3)
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log", title="Training loss")
    right.set(
        xlabel="epoch", ylabel="test accuracy (%)", title="Test accuracy (epochs far below are cut off)"
    )
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e6e6e6")
        axes.legend()
    _save(figure, path)


def weights(path: Path, model: nn.Module, optimizer: BCGD) -> None:
    """For each quantized layer: its latents in units of the scale, and the share of weights at each level."""
    names = {
        parameter: f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    layers = [
        (parameter, group)
        for group in optimizer.param_groups
        if group.get("quant_bits")
        for parameter in group["params"]
    ]
    figure, panels = _panels(len(layers))
    for axes, (parameter, group) in zip(panels, _spread(layers), strict=True):
        state, bits, channel_dim = optimizer.state[parameter], group["quant_bits"], group["channel_dim"]
        scale = state["scale"]
        if channel_dim is not None:
            scale = scale.view([-1 if d == channel_dim else 1 for d in range(parameter.dim())])
        latents = (state["latent"] / scale).flatten().cpu()
        codes = QF.weight_codes(parameter.detach(), state["scale"], bits, channel_dim=channel_dim)
        codes = codes.flatten().cpu()
        top = max(2 ** (bits - 1) - 1, 1)
        levels = [level for level in range(-top, top + 1) if bits > 1 or level]
        shares = [(codes == level).double().mean().item() for level in levels]
        reach = max(1.4 * top, _quantile(latents.abs(), 0.995))
        axes.hist(latents.numpy(), bins=80, range=(-reach, reach), density=True, color=GRAY)
        beside = axes.twinx()
        beside.bar(levels, shares, min(0.06 * reach, 0.5), color=QUANTIZED, alpha=0.85)
        beside.set_ylim(0, 1.15 * max(shares))
        beside.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        beside.tick_params(axis="y", colors=QUANTIZED)
        axes.set_yticks([])
        axes.set_xticks(sorted({-top, top, 0} & {0, *levels}))
        axes.set_title(f"{names[parameter]}: {parameter.numel():,} weights")
    figure.supxlabel("weight / scale")
    figure.suptitle(
        "Float latents (gray) and the share of the quantized weights at each level (red, right axis)"
    )
    _save(figure, path)


def activations(path: Path, model: nn.Module, images: Tensor) -> None:
    """For each staircase: its input in units of the step size, and the share of outputs at each step."""
    seen: dict[str, tuple[int, float, Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(_observe(seen, name))
        for name, module in model.named_modules()
        if isinstance(module, StaircaseReLU)
    ]
    model.eval()
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    figure, panels = _panels(len(seen))
    for axes, (name, (bits, alpha, x, codes)) in zip(panels, _spread(list(seen.items())), strict=True):
        top = 2**bits - 1
        low = min(max(_quantile(x, 0.005), -4.0 * top), -0.5 * top)
        high = max(min(_quantile(x, 0.995), 4.0 * top), 1.2 * top)
        axes.hist(x.numpy(), bins=100, range=(low, high), density=True, color=GRAY)
        axes.set_yticks([])
        beside = axes.twinx()
        edges = [low, *range(top), high]
        beside.step(edges, [0, *range(top + 1), top][: len(edges)], where="pre", color=QUANTIZED)
        beside.set_ylim(-0.15 * top, 1.25 * top)
        beside.tick_params(axis="y", colors=QUANTIZED)
        beside.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        if bits <= 2:
            _label_shares(beside, codes, top, low, high)
        axes.set_xlim(low, high)
        axes.set_title(f"staircase {name}: step {alpha:.3g}, {(codes == 0).double().mean():.0%} at zero")
    figure.supxlabel("input / step size")
    figure.suptitle("Inputs of each staircase (gray) and its output in steps (red, right axis)")
    _save(figure, path)


def _label_shares(axes, codes: Tensor, top: int, low: float, high: float) -> None:
    for level in range(top + 1):
        left, right = (low, 0) if level == 0 else (level - 1, level if level < top else high)
        share = (codes == level).double().mean().item()
        axes.text((left + right) / 2, level + 0.06 * top, f"{share:.0%}", ha="center", fontsize=7, color=MARK)


def _observe(seen: dict, name: str):
    def hook(module: StaircaseReLU, args: tuple[Tensor], _output: Tensor) -> None:
        x, alpha = args[0].detach(), module.step_size().detach()
        codes = QF.staircase_codes(x, alpha, module.bits).flatten()
        if alpha.numel() > 1:
            alpha = alpha.view(-1, *[1] * (x.dim() - 2))
        seen[name] = (module.bits, float(alpha.mean()), (x / alpha).flatten().float().cpu(), codes.cpu())

    return hook


def estimators(path: Path, bits: int) -> None:
    """The catalogue: for each estimator the slope that backward uses, and the proxy whose slope it is."""
    alpha, top = torch.tensor(1.0), 2**bits - 1
    x = torch.linspace(-0.75 * top, 2.25 * top, 3001).requires_grad_()
    stes = QF.ste_names()
    figure, grid = plt.subplots(
        2, len(stes), figsize=(2.6 * len(stes), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for (above, below), ste in zip(grid.T, stes, strict=True):
        y = QF.staircase_relu(x, alpha, bits, ste=ste)
        (slope,) = torch.autograd.grad(y.sum(), x)
        points = x.detach()
        proxy = torch.cumulative_trapezoid(slope, points)
        proxy = torch.cat([proxy.new_zeros(1), proxy])
        proxy -= proxy[(points <= 0).sum() - 1].clone()  # every proxy is 0 at 0
        above.plot(points, y.detach(), color=GRAY, linewidth=2, label="staircase (forward)")
        above.plot(points, proxy, color=QUANTIZED, label="proxy")
        below.plot(points, slope, color=QUANTIZED)
        for axes in (above, below):
            axes.axvline(top, color=MARK, linewidth=0.7, linestyle=":")
        above.set_title(ste)
        above.set_ylim(-0.4 * top, 1.9 * top)
        below.set(xlabel="x / step size", ylim=(-0.08, 1.15))
    grid[0][0].set_ylabel("output / step size")
    grid[1][0].set_ylabel("slope used in backward")
    grid[0][0].legend(loc="upper left", fontsize=7)
    figure.suptitle(f"Straight-through estimators of the {bits}-bit staircase (dotted: its upper bound q)")
    _save(figure, path)


def _quantile(values: Tensor, q: float) -> float:
    return float(values[:: len(values) // 100_000 + 1].quantile(q))


def _panels(count: int):
    count = min(count, MAX_PANELS)
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(3.0 * columns, 7), 2.4 * rows + 0.7), squeeze=False
    )
    panels = list(grid.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _spread(items: list) -> list:
    """At most MAX_PANELS of the items, evenly from first to last."""
    if len(items) <= MAX_PANELS:
        return items
    return [items[round(i * (len(items) - 1) / (MAX_PANELS - 1))] for i in range(MAX_PANELS)]


def _save(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
