"""One file with what training goes on from, which Python and C++ programs read alike."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import torchqat
from torchqat.nn import StaircaseReLU
from torchqat.optim import BCGD
from torchqat.optim.checks import PROJECTION, check_saved_state

FORMAT = "torchqat checkpoint 1"
OPTIMIZER = "optimizer."
STATE_KEYS = ("latent", "scale", "momentum_buffer", "step")

FilePath = str | os.PathLike[str]


def save_checkpoint(path: FilePath, model: nn.Module, optimizer: BCGD | None = None) -> None:
    """Writes the state of a model, and of its optimizer, into one safetensors file.

    The file holds every tensor of ``model.state_dict()`` under its name there, and for each parameter that
    the optimizer has a state for the tensors ``optimizer.<name of the parameter>.<key>`` (``latent``,
    ``scale``, ``momentum_buffer``, ``step``). Its metadata say what the state was trained with: ``bits``,
    ``ste`` and ``alpha_grad`` of each :class:`torchqat.nn.StaircaseReLU`, ``quant_bits``, ``channel_dim`` and
    ``method`` of each quantized parameter; :func:`load_checkpoint` compares them. Any program that reads
    safetensors gets the tensors; ``torchqat::load_checkpoint`` goes on with it in C++.

    Learning rates, momentum factors and the other options of the optimizer's groups are **not** in the file,
    nor is the state of schedulers, data loaders and random generators: they are the program's.

    The file is made beside ``path`` and then takes its name: whatever happens, there is either the new file
    or the old one.

    Args:
        path: of the file; an existing one is replaced.
        model: any module. A parameter under two names is written under both.
        optimizer: None for a file that evaluates, or starts training anew.

    Raises:
        ValueError: the optimizer has a parameter that the model has not; a state of the optimizer that is
            not BCGD's; a name in the model begins with ``optimizer.``; a parameter has no shape yet.
        TypeError: an entry of ``model.state_dict()`` is no tensor, or one of a dtype or layout that
            safetensors does not have here (float64, float32, float16, bfloat16, int64, int32, int16, int8,
            uint8, bool; dense); the optimizer is no BCGD.
        RuntimeError: within ``optimizer.latents()``, where the parameters hold latents.
        OSError: the file cannot be written; FileNotFoundError, PermissionError and so on say why.

    Example:
        >>> import tempfile, torch, torchqat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torchqat.nn.StaircaseReLU(bits=2))
        >>> groups = torchqat.optim.param_groups(model, weight_bits=1)
        >>> optimizer = torchqat.optim.BCGD(groups, lr=0.1, momentum=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torchqat.save_checkpoint(f"{folder}/model.safetensors", model, optimizer)
        ...     torchqat.load_checkpoint(f"{folder}/model.safetensors", model, optimizer)
    """
    what = "save_checkpoint"
    tensors = _model_state(what, model)
    metadata = {"format": FORMAT, "torchqat": torchqat.__version__, **_staircases(model)}
    if optimizer is not None:
        _check_optimizer(what, optimizer)
        metadata |= {"optimizer": "BCGD", **_projections(what, model, optimizer)}
        for name, param, _ in _named(what, model, optimizer):
            for key, value in optimizer.state.get(param, {}).items():
                if value is None:  # as torch.optim.SGD has for the momentum that it does not use
                    continue
                if key not in STATE_KEYS or not isinstance(value, Tensor):
                    raise ValueError(
                        f"{what}: the optimizer's state of {name!r} must be tensors "
                        f"{', '.join(STATE_KEYS)}, got {key!r}: {type(value).__name__}"
                    )
                tensors[f"{OPTIMIZER}{name}.{key}"] = value
    values = [value.detach() for value in tensors.values()]
    _call(what, torch.ops.qat._save_safetensors, path, list(tensors), values, metadata)


def load_checkpoint(path: FilePath, model: nn.Module, optimizer: BCGD | None = None) -> None:
    """Loads what :func:`save_checkpoint` wrote, here or in C++, into a model and its optimizer.

    With the optimizer, of the same groups, training goes on bit for bit; make it as the program did at first,
    from the same model. Without it the model alone is loaded, for evaluation, and a state of an optimizer in
    the file is left aside. The model alone also takes any other safetensors file that has its names and
    shapes.

    Everything is read and checked first: when this raises, model and optimizer are what they were. The
    tensors of the model keep their device and dtype; floating-point values are converted, as by
    ``load_state_dict``, and so is a single number that is an integer on one side only (BatchNorm's counter in
    a LibTorch model after ``to(dtype)``), which must be whole to become one. Other dtypes must agree. The
    optimizer's keep BCGD's dtypes, and its groups their options: learning rates and the like are not in the
    file.

    Args:
        path: of the file.
        model: with the names and shapes that the saved one had.
        optimizer: None to load the model alone.

    Raises:
        ValueError: the file is damaged; names, shapes or dtypes are not the model's or the optimizer's;
            settings of a :class:`torchqat.nn.StaircaseReLU` or of a quantized parameter differ from those in
            the file; the optimizer is given, and the file has no state of one.
        TypeError: an entry of ``model.state_dict()`` is no tensor; the optimizer is no BCGD.
        RuntimeError: within ``optimizer.latents()``, where the parameters hold latents; or the model refuses
            a state of its own kind (``set_extra_state``).
        OSError: the file cannot be read; FileNotFoundError, PermissionError and so on say why.

    Example:
        >>> import tempfile, torch, torchqat
        >>> trained, model = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torchqat.save_checkpoint(f"{folder}/model.safetensors", trained)
        ...     torchqat.load_checkpoint(f"{folder}/model.safetensors", model)
        >>> torch.equal(trained.weight, model.weight)
        True
    """
    what = "load_checkpoint"
    own = _model_state(what, model)
    if optimizer is not None:
        _check_optimizer(what, optimizer)
    names, values, metadata = _call(what, torch.ops.qat._load_safetensors, path)
    what = f"{what}: {os.fspath(path)}"
    tensors = dict(zip(names, values, strict=True))
    states = {}
    if metadata.get("format", "").startswith("torchqat checkpoint"):
        _check_metadata(what, model, metadata)
        states = {name: tensors.pop(name) for name in names if name.startswith(OPTIMIZER)}
    _check_model_state(what, tensors, own)
    state_dict = None if optimizer is None else _optimizer_state(what, model, optimizer, states, metadata)

    before = {name: value.detach().to("cpu", copy=True) for name, value in own.items()}
    try:
        model.load_state_dict(tensors)
        if optimizer is not None:
            optimizer.load_state_dict(state_dict)
    except Exception:
        model.load_state_dict(before)
        raise


def _call(what: str, operator: Callable, path: FilePath, *args: Any) -> Any:
    """Calls an operator on files; its errors become those of `what`, and those of the system OSErrors."""
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"{what}: path must be a str or os.PathLike of one, got {path!r}")
    prefix = f"{operator.__name__.lstrip('_')}: "
    try:
        return operator(path, *args)
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        if not text.startswith(prefix):
            raise
        if isinstance(error, (ValueError, TypeError)):
            raise type(error)(f"{what}: {text.removeprefix(prefix)}") from None
        text = text.removeprefix(f"{prefix}{path}: ").partition("\n")[0]
    code = next((code for code in errno.errorcode if os.strerror(code) == text), errno.EIO)
    kind = type(OSError(code, text))  # FileNotFoundError for ENOENT, and so on
    error = kind(f"{what}: {path}: {text}")
    error.errno = code
    raise error


def _model_state(what: str, model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{what}: the entries of the model's state_dict must be tensors, {name!r} is "
                f"{type(value).__name__}"
            )
        if is_lazy(value):
            raise ValueError(f"{what}: {name!r} has no shape yet: run a batch through the model first")
        if name.startswith(OPTIMIZER):
            raise ValueError(f"{what}: no name in the model must begin with {OPTIMIZER!r}, got {name!r}")
    return state


def _check_optimizer(what: str, optimizer: BCGD) -> None:
    if not isinstance(optimizer, BCGD):
        raise TypeError(f"{what}: optimizer must be a torchqat.optim.BCGD, got {type(optimizer).__name__}")
    optimizer._refuse_swapped(what)


def _named(what: str, model: nn.Module, optimizer: BCGD) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, parameter and group of everything in the optimizer, in its order."""
    names = {param: name for name, param in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            if param not in names:
                called = f" ({group['name']})" if "name" in group else ""
                raise ValueError(
                    f"{what}: parameter {place} of the optimizer's group {number}{called}, of shape "
                    f"{tuple(param.shape)}, is not in the model: give a module that holds both"
                )
            yield names[param], param, group


def _as_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _staircases(model: nn.Module) -> dict[str, str]:
    return {
        f"staircase_relu.{name}": _as_text(module.settings())
        for name, module in model.named_modules()
        if isinstance(module, StaircaseReLU)
    }


def _projections(what: str, model: nn.Module, optimizer: BCGD) -> dict[str, str]:
    return {
        f"quantized.{name}": _as_text({key: group[key] for key in PROJECTION})
        for name, _, group in _named(what, model, optimizer)
        if group["quant_bits"] is not None
    }


def _check_metadata(what: str, model: nn.Module, metadata: dict[str, str]) -> None:
    if metadata["format"] != FORMAT:
        raise ValueError(f"{what}: the format must be {FORMAT!r}, got {metadata['format']!r}")
    _check_settings(what, _staircases(model), metadata, "staircase_relu.", "StaircaseReLU", "the model")


def _check_settings(
    what: str, ours: dict[str, str], metadata: dict[str, str], prefix: str, kind: str, whose: str
) -> None:
    saved = {key: value for key, value in metadata.items() if key.startswith(prefix)}
    for key in [*ours, *saved]:
        if saved.get(key) != ours.get(key):
            raise ValueError(
                f"{what}: {kind} {key.removeprefix(prefix)!r} must be the same in the file and in {whose}: "
                f"the file has {saved.get(key, 'none')}; {whose} has {ours.get(key, 'none')}"
            )


def _check_model_state(what: str, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    _check_names(what, saved, own, "the model")
    for name, value in saved.items():
        if name.rpartition(".")[2] == "_extra_state":  # whose form is its module's own affair
            continue
        if value.shape != own[name].shape:
            raise ValueError(
                f"{what}: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
        _check_dtype(f"{what}: {name!r}", value, own[name])


def _check_dtype(what: str, value: Tensor, own: Tensor) -> None:
    """BatchNorm's counter of batches is an integer, but for a LibTorch model after to(dtype)."""
    floating = value.is_floating_point()
    if value.dtype == own.dtype or (own.is_floating_point() and (floating or _is_integer(value))):
        return
    if not (floating and _is_integer(own)):
        raise ValueError(f"{what} must be {own.dtype}, got {value.dtype}")
    if value.double() != value.to(own.dtype).double():
        raise ValueError(f"{what} must be a whole number for {own.dtype}, got {value.item()}")


def _is_integer(value: Tensor) -> bool:
    return (
        value.dim() == 0
        and not (value.is_floating_point() or value.is_complex())
        and value.dtype != torch.bool
    )


def _check_names(what: str, saved: dict[str, Any], own: dict[str, Any], whose: str) -> None:
    for kind, names in (("lacks", own.keys() - saved.keys()), ("also has", saved.keys() - own.keys())):
        if names:
            first, rest = sorted(names)[:5], len(names) - 5
            more = f" and {rest} more" if rest > 0 else ""
            raise ValueError(
                f"{what}: must have the names of {whose}, {kind} {', '.join(map(repr, first))}{more}"
            )


def _optimizer_state(
    what: str, model: nn.Module, optimizer: BCGD, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, Any]:
    """The checked state_dict of the optimizer: its state from the file, its groups as they are."""
    if "optimizer" not in metadata:
        raise ValueError(f"{what}: must have the state of an optimizer; to load the model alone give none")
    if metadata["optimizer"] != "BCGD":
        raise ValueError(f"{what}: the optimizer must be 'BCGD', got {metadata['optimizer']!r}")
    ours = _projections("load_checkpoint", model, optimizer)
    _check_settings(what, ours, metadata, "quantized.", "quantized parameter", "the optimizer")
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        param, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        if key not in STATE_KEYS or not value.is_floating_point():
            raise ValueError(
                f"{what}: the optimizer's state must be floating-point {', '.join(STATE_KEYS)}, "
                f"got {name!r} of {value.dtype}"
            )
        states.setdefault(param, {})[key] = value
    state_dict = optimizer.state_dict()
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    state_dict["state"] = {}
    named = _named("load_checkpoint", model, optimizer)
    for number, (name, param, group) in zip(numbers, named, strict=True):
        state = states.pop(name, {})
        try:
            check_saved_state(param, state, group, repr(name))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if state:
            state_dict["state"][number] = state
    if states:
        raise ValueError(f"{what}: has a state for {next(iter(states))!r}, which is not in the optimizer")
    return state_dict
