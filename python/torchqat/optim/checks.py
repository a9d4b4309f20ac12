"""What BCGD refuses: options out of range, parameters and checkpoints that do not fit."""

import math
from typing import Any

from torch import Tensor

from torchqat._bits import check_bits

Group = dict[str, Any]
State = dict[str, Any]

PROJECTION = ("quant_bits", "channel_dim", "method")
# Keys that torch.optim and its schedulers write into groups.
OF_TORCH = ("params", "name", "param_names", "differentiable", "initial_lr", "max_lr", "min_lr", "swa_lr",
            "base_momentum", "max_momentum")  # fmt: skip


def check_options(options: Group) -> None:
    """Raises where an option is out of range; the rules of torch.optim.SGD."""
    lr, momentum, weight_decay = options["lr"], options["momentum"], options["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"BCGD: a tensor as lr must have one element, got shape {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and not lr.is_floating_point():
        raise TypeError(f"BCGD: a tensor as lr must be floating point, got {lr.dtype}")
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"BCGD: {name} must be at least 0, got {value}")
        if value == math.inf:
            raise ValueError(f"BCGD: {name} must be finite, got {value}")
    if not math.isfinite(options["dampening"]):
        raise ValueError(f"BCGD: dampening must be finite, got {options['dampening']}")
    if not 0.0 <= options["blend"] <= 1.0:
        raise ValueError(f"BCGD: blend must be in 0..1, got {options['blend']}")
    if options["nesterov"] and (momentum <= 0 or options["dampening"] != 0):
        raise ValueError("BCGD: Nesterov momentum requires a momentum and zero dampening")


def check_group(group: Group, defaults: Group) -> None:
    """Raises where a group has an unknown key, an option out of range, or a quantization that there is not;
    quantize_weight checks the rest."""
    unknown = [key for key in group if key not in defaults and key not in OF_TORCH]
    if unknown:
        known = ", ".join(key for key in ("params", "name", *defaults) if key != "differentiable")
        raise ValueError(f"BCGD: the keys of a group must be among {known}, got {unknown[0]!r}")
    check_options(group)
    if group["quant_bits"] is None:
        return
    check_bits("BCGD: quant_bits", group["quant_bits"])
    if group["min_value"] is not None:
        raise ValueError("BCGD: min_value is for groups without quant_bits")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(
                f"BCGD: parameters of a group with quant_bits must be floating point, got {p.dtype}"
            )


def refuse_sparse_gradients(params: list[Tensor]) -> None:
    if any(p.grad.is_sparse for p in params):
        raise RuntimeError("BCGD: gradients in a group with quant_bits must be dense, got a sparse one")


def check_saved_parts(state_dict: dict[str, Any]) -> None:
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            "BCGD: the state_dict must have state and param_groups, as state_dict() of an optimizer gives, "
            f"got one without {', '.join(missing)}"
        )


def check_saved_groups(saved: list[Group], groups: list[Group]) -> None:
    """Raises where the groups of a state_dict are not those of the optimizer."""
    sizes, got = ([len(g["params"]) for g in x] for x in (groups, saved))
    if sizes != got:
        raise ValueError(
            f"BCGD: the state_dict must have groups of {sizes} parameters, got {got}: another model's?"
        )
    for i, (group, other) in enumerate(zip(groups, saved, strict=True)):
        ours, theirs = ({key: g.get(key) for key in PROJECTION} for g in (group, other))
        if ours != theirs and (group["quant_bits"] is not None or other.get("quant_bits") is not None):
            raise ValueError(f"BCGD: group {i} of the state_dict must be quantized as {ours}, got {theirs}")


def check_saved_state(param: Tensor, saved: State, group: Group, number: int) -> None:
    """Raises where a saved state is not that of a parameter like `param` in `group`."""
    quantized = group["quant_bits"] is not None
    for key in ("latent", "scale") if quantized else ():
        if not isinstance(saved.get(key), Tensor):
            raise ValueError(f"BCGD: the state_dict has no {key} for parameter {number}, which is quantized")
    if quantized and ("momentum_buffer" in saved) != ("step" in saved):
        raise ValueError(
            f"BCGD: the state_dict has only one of momentum_buffer and step for parameter {number}"
        )
    full = tuple(param.shape)
    channels = () if group["channel_dim"] is None else (full[group["channel_dim"]],)
    for key, shape in (("latent", full), ("momentum_buffer", full), ("scale", channels), ("step", ())):
        value = saved.get(key)
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"BCGD: {key} of parameter {number} in the state_dict must have shape {shape}, "
                f"got {tuple(value.shape)}: another model's?"
            )
