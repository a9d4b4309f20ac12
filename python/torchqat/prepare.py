"""From a float network to one with quantized activations: puts a staircase in the place of every ReLU."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from torchqat import _pairing, _rewrite
from torchqat._bits import check_bits
from torchqat._excluded import Excluded
from torchqat.nn.staircase_relu import StaircaseReLU, as_arguments

RELUS = (nn.ReLU, nn.ReLU6)
NOTHING_REPLACED = (
    "prepare: nothing was replaced, the model has no ReLU that is not excluded: nn.ReLU, nn.ReLU6, F.relu, "
    "F.relu6, torch.relu and Tensor.relu are replaced, other activations are not"
)
SCRIPTED_CALLS = ("aten::relu", "aten::relu_", "aten::relu6", "aten::relu6_")


@dataclass
class PrepareReport:
    """What `prepare` did; `model.prepare_report` is that of the last call.

    Attributes:
        replaced: the names of the StaircaseReLUs it made.
        not_replaced: one line for each ReLU that it found and could not replace: where, and why.
        shared: one line for each StaircaseReLU that a forward calls more than once: the calls share a step.
        kept: one line for each StaircaseReLU that was there before, with other settings than are asked for.
        paired: one line for each layer that keeps the codes of the StaircaseReLUs it reads, and with
            ``recompute`` for each normalization whose input is computed again.
        not_paired: one line for each convolution, linear layer and max pooling that keeps its input: why.
    """

    replaced: list[str] = field(default_factory=list)
    not_replaced: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    paired: list[str] = field(default_factory=list)
    not_paired: list[str] = field(default_factory=list)


def prepare(
    model: nn.Module,
    act_bits: int = 4,
    *,
    exclude: str | type | Iterable[str | type] = (),
    ste: str = "clipped_relu",
    alpha_grad: str = "three_valued",
    save_codes: bool = True,
    recompute: bool = False,
    **options,
) -> nn.Module:
    """Replaces every ReLU of a model by a :class:`~torchqat.nn.StaircaseReLU`, in place, and has the layers
    that read them keep codes rather than floats.

    ``nn.ReLU`` and ``nn.ReLU6`` modules are replaced wherever they are, also where one object is used in
    several places. A module that calls one ReLU several times, or calls ``F.relu``, ``F.relu6``,
    ``torch.relu`` or ``Tensor.relu``, gets one StaircaseReLU per call: its forward function is traced with
    torch.fx and rewritten (the object stays an instance of its class). A forward that fx cannot trace
    faithfully (control flow that depends on data or on ``self.training``, optional arguments, tensors it
    makes itself) is left as it is; what is then seen to stay unquantized, or to share a step, is told by
    name in one warning and in ``model.prepare_report``, and so are ReLUs inside TorchScript. No inspection
    sees all: a ReLU that such a forward calls through a function outside its class, or takes from a plain
    Python list, stays as it is and is not told. As always with fx, a rewritten forward has the Python
    values of this moment built in.

    Then the model is followed from module to module: convolutions, linear layers, max pooling and batch
    normalizations that read the output of a StaircaseReLU, as it is or through views, become
    :class:`~torchqat.nn.QuantConv2d` and its like, which keep the packed codes for backward where the plain
    layers keep floats; a forward that calls ``F.max_pool2d`` there is rewritten too. This sets ``save_codes``
    of the StaircaseReLUs. Results and gradients stay the same bit by bit.
    ``model.prepare_report.paired`` and ``not_paired`` say which layers, and why not the others;
    :func:`torchqat.memory_report` says what it saves. Where a forward does not trace, layers are taken to
    follow one another as they are registered; a wrong guess costs memory, never a wrong result.

    Training mode, device and hooks are kept. Step sizes are float32, float64 in a float64 model, and never
    less: convert a model to half precision before preparing it. Weights are not touched: quantize those
    with :class:`~torchqat.optim.BCGD`.

    **Prepare before making the optimizer**: the step sizes are new parameters, and an optimizer that does not
    have them does not train them. StaircaseReLUs that are there already are kept: preparing twice changes
    nothing the second time, and a warning names those whose ``bits``, ``ste`` or ``alpha_grad`` are not the
    ones asked for (exclude them where widths are mixed on purpose). Another warning tells that there was
    nothing to replace: other activations (GELU, SiLU, LeakyReLU, ...) stay as they are.

    Args:
        model: any module that is not a ReLU itself. Changed in place.
        act_bits: width of the activations, 1 to 8.
        exclude: modules to leave alone, with all that is inside them: one name or type, or several. They stay
            as they are, and as an earlier call has left them.
        ste: see :func:`torchqat.functional.ste_names`.
        alpha_grad: the rule for the gradient of alpha: ``exact``, ``three_valued``, ``min`` or ``pact``.
        save_codes: ``False`` leaves all layers but the ReLUs as they are.
        recompute: convolutions whose results a batch normalization reads are computed again in backward
            rather than kept: even less memory, for the time of one more pass through them.
        options: further options of :class:`~torchqat.nn.StaircaseReLU`, for every one of them.

    Returns:
        nn.Module: ``model``.

    Example:
        >>> import torchqat
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = torchqat.prepare(model, act_bits=2)
        >>> model.prepare_report.replaced
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, RELUS):
        raise TypeError("prepare: the model is itself a ReLU and cannot be replaced in place")
    check_bits("prepare: act_bits", act_bits)
    if recompute and not save_codes:
        raise ValueError("prepare: recompute=True begins with codes: it must not go with save_codes=False")
    left_alone = Excluded("prepare", exclude, model)
    options = {"ste": ste, "alpha_grad": alpha_grad, **options}
    before = {name: m for name, m in model.named_modules() if isinstance(m, StaircaseReLU)}
    report = PrepareReport(kept=_other_settings(before, act_bits, options, left_alone))
    settings = {**options, "save_codes": False}  # until a layer is found that reads them
    made = _replace_modules(model, lambda: StaircaseReLU(act_bits, **settings), left_alone, report)
    taken: set[nn.Module] = set()
    scripted = _report_scripted(model, left_alone, report)
    for name, owner in list(model.named_modules()):
        if left_alone(name) or owner in scripted:
            continue
        if type(owner).__module__.startswith("torch.nn."):
            report.not_replaced += _functions_held(name, owner)
            continue

        def new(owner=owner):
            return _adopt(StaircaseReLU(act_bits, **settings), owner, model)

        try:
            added = _rewrite.split_calls(owner, _rewrite.own_graph(owner), made, taken, new)
            report.replaced += [_join(name, slot) for slot in added]
        except _rewrite.Untraceable as reason:
            _report_untraced(name, owner, made, str(reason), report)
    _pairing.unpair(model, left_alone)
    if save_codes:
        report.paired, report.not_paired = _pairing.pair(model, left_alone, recompute)
    model.prepare_report = report
    _warn("prepare: these ReLUs are not quantized", report.not_replaced)
    _warn("prepare: these StaircaseReLUs have one step for several calls", report.shared)
    _warn("prepare: these StaircaseReLUs are there already and keep their settings", report.kept)
    if not (report.replaced or report.not_replaced or before):
        warnings.warn(NOTHING_REPLACED, stacklevel=2)
    return model


def _other_settings(staircases, act_bits: int, options: dict, left_alone) -> list[str]:
    """One line for each StaircaseReLU that is not what a new one would be."""
    wanted = {"bits": act_bits, "ste": options["ste"], "alpha_grad": options["alpha_grad"]}
    return [
        f"{name or type(module).__name__}: {as_arguments(module.settings())}"
        for name, module in staircases.items()
        if module.settings() != wanted and not left_alone(name)
    ]


def _replace_modules(model, new, left_alone, report) -> dict[nn.Module, bool]:
    """Puts a StaircaseReLU of its own wherever a ReLU is; returns which of those ReLUs worked in place."""
    made = {}
    for name, owner in list(model.named_modules()):
        for slot, child in list(owner._modules.items()):
            path = _join(name, slot)
            if not isinstance(child, RELUS) or left_alone(path):
                continue
            if type(child) not in RELUS:
                report.not_replaced.append(f"{path}: {type(child).__name__} is a class of its own")
                continue
            staircase = _adopt(new(), owner, model).train(child.training)
            for attribute, hooks in vars(child).items():
                if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                    setattr(
                        staircase, attribute, hooks
                    )  # the same dictionary, so handles still remove theirs
            setattr(owner, slot, staircase)
            made[staircase] = child.inplace
            report.replaced.append(path)
    return made


def _adopt(staircase: StaircaseReLU, owner: nn.Module, model: nn.Module) -> StaircaseReLU:
    """Moves a new StaircaseReLU to where its surroundings are: training mode, device, float64.

    Its alpha never has less than float32: in half precision most of its small updates would round to nothing.
    """
    for module in (owner, model):
        near = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        if near is not None and near is not staircase.alpha:
            wide = torch.float64 if near.dtype == torch.float64 else torch.float32
            staircase.to(device=near.device, dtype=wide)
            break
    return staircase.train(owner.training)


def _functions_held(name: str, module: nn.Module) -> list[str]:
    """ReLU functions that a module keeps as an attribute, as nn.TransformerEncoderLayer does."""
    held = [key for key, value in vars(module).items() if any(value is f for f in _rewrite.FUNCTIONS)]
    return [f"{_join(name, key)}: a function inside {type(module).__name__}" for key in held]


def _report_scripted(model: nn.Module, left_alone, report: PrepareReport) -> set[nn.Module]:
    """Tells of ReLUs in TorchScript, which cannot be rewritten; returns all modules that are TorchScript."""
    scripted: set[nn.Module] = set()
    for name, owner in model.named_modules():
        if owner in scripted or not isinstance(owner, torch.jit.ScriptModule) or left_alone(name):
            continue
        scripted.update(owner.modules())
        inner = [
            _join(name, slot) for slot, m in owner.named_modules() if m.original_name in ("ReLU", "ReLU6")
        ]
        graph = getattr(owner, "inlined_graph", None)
        calls = graph is not None and any(graph.findAllNodes(kind) for kind in SCRIPTED_CALLS)
        if inner or calls:
            what = ", ".join(inner) or "it calls a ReLU"
            report.not_replaced.append(
                f"{name or owner.original_name}: {what} (in TorchScript: prepare the model before that)"
            )
    return scripted


def _report_untraced(name, owner, made, reason: str, report: PrepareReport) -> None:
    calls = _rewrite.calls_in_source(owner)
    label = name or type(owner).__name__
    report.not_replaced += _functions_held(name, owner)
    for callee, where in calls:
        if _rewrite.is_functional_relu(callee):
            report.not_replaced.append(f"{label}: {callee} at {where} ({reason})")
    for slot, child in owner.named_children():
        lines = [where for callee, where in calls if callee == f"self.{slot}"]
        if child in made and len(lines) > 1:
            report.shared.append(f"{_join(name, slot)}: called at {', '.join(lines)} ({reason})")


def _join(name: str, slot: str) -> str:
    return f"{name}.{slot}" if name else slot


def _warn(what: str, lines: list[str]) -> None:
    if lines:
        warnings.warn(f"{what}:\n  " + "\n  ".join(lines), stacklevel=3)
