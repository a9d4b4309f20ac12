"""Sorting the parameters of a model into the groups that BCGD takes."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchqat._bits import check_bits
from torchqat._excluded import Excluded
from torchqat.nn import StaircaseReLU

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def param_groups(
    model: nn.Module,
    weight_bits: int | None,
    *,
    alpha_lr: float | None = None,
    alpha_weight_decay: float | None = None,
    quantize_first: bool = True,
    quantize_last: bool = True,
    exclude: str | type | Iterable[str | type] = (),
    channel_dim: int | None = None,
    method: str = "exact",
) -> list[dict[str, Any]]:
    """Sorts the parameters of a model into groups for :class:`BCGD`, each under a ``name``:

    - ``quantized``: the weights of linear layers and convolutions, transposed ones too;
    - ``alphas``: the step sizes of :class:`torchqat.nn.StaircaseReLU`, ``min_value`` being its ``alpha_min``;
    - ``float``: everything else: biases, norms, embeddings, attention's joint ``in_proj_weight``.

    Frozen parameters (``requires_grad=False``) are in no group, every other one is in exactly one. A weight
    that several modules share is quantized only where each of them would have it quantized: a linear layer
    tied to an embedding stays float. Empty groups are left out.

    Args:
        model: any module.
        weight_bits: 1 to 8, 2 is ternary; None: the same groups with float weights.
        alpha_lr: learning rate of the alphas; None: that of the optimizer.
        alpha_weight_decay: weight decay of the alphas; None: that of the optimizer, as in the papers.
        quantize_first, quantize_last: whether the first and the last of these layers, in the order of
            ``model.modules()``, are quantized.
        exclude: names of modules, with all that is inside them, and types, whose weights stay float.
        channel_dim: None for one scale per tensor, 0 for one per output channel. (Transposed convolutions
            have the output channel in dimension 1: they get a group of their own, with 0 and 1 exchanged.)
        method: see :func:`torchqat.functional.quantize_weight`.

    Returns:
        list[dict]: the groups, for BCGD or to be edited first.

    Raises:
        TypeError: ``weight_bits`` is neither an int nor None.
        ValueError: ``weight_bits`` is out of range; there is no weight to quantize; the weight of a layer
            is not its own parameter (weight norm and other parametrizations) or has no shape yet (lazy
            modules): exclude such layers.

    Example:
        >>> import torch, torchqat
        >>> layers = torch.nn.Linear(4, 8), torchqat.nn.StaircaseReLU(bits=2), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> groups = param_groups(model, weight_bits=1, alpha_lr=1e-3)
        >>> [(group["name"], len(group["params"])) for group in groups]
        [('quantized', 2), ('alphas', 1), ('float', 2)]
        >>> optimizer = torchqat.optim.BCGD(groups, lr=0.05, momentum=0.9)
    """
    if weight_bits is not None:
        check_bits("param_groups: weight_bits", weight_bits)
    layers = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    left_float = set(layers[: 0 if quantize_first else 1] + ([] if quantize_last else layers[-1:]))
    excluded = Excluded("param_groups", exclude, model)
    roles: dict[Tensor, set[Role]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        quantized = isinstance(module, WEIGHTED) and module not in left_float and not excluded(name)
        if quantized:
            _check_weight(name, module)
        for key, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                roles.setdefault(param, set()).add(_role(module, key, quantized, channel_dim))
    members: dict[Role, list[Tensor]] = {}
    for param, given in roles.items():
        members.setdefault(given.pop() if len(given) == 1 else FLOAT, []).append(param)
    if weight_bits is not None and not any(role.name == "quantized" for role in members):
        raise ValueError("param_groups: the model has no weight to quantize")
    alphas = {"lr": alpha_lr, "weight_decay": alpha_weight_decay}
    options = {
        "quantized": {"quant_bits": weight_bits, "method": method},
        "alphas": {key: value for key, value in alphas.items() if value is not None},
        "float": {},
    }
    ordered = sorted(members, key=lambda role: list(options).index(role.name))
    return [{"name": r.name, "params": members[r], **options[r.name], **dict(r.settings)} for r in ordered]


class Role(NamedTuple):
    """What a module wants for a parameter: the group it belongs to and what sets that group apart."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()


FLOAT = Role("float")


def _role(module: nn.Module, key: str, quantized: bool, channel_dim: int | None) -> Role:
    if isinstance(module, StaircaseReLU) and key == "alpha":
        return Role("alphas", (("min_value", module.alpha_min),))
    if not (quantized and key == "weight"):
        return FLOAT
    if channel_dim in (0, 1) and isinstance(module, TRANSPOSED):
        channel_dim = 1 - channel_dim
    return Role("quantized", (("channel_dim", channel_dim),))


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or isinstance(weight, UninitializedParameter):
        what = "no weight parameter of its own" if weight is None else "a weight without a shape yet"
        raise ValueError(f"param_groups: layer {name!r} has {what}; exclude it to leave it float")
