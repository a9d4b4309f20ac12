"""What a network keeps for its backward pass, layer by layer, beside the float network."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchqat.nn.quant_layers import QUANT_LAYERS
from torchqat.nn.staircase_relu import StaircaseReLU

PLAIN_CLASSES = {quant: plain for plain, quant in QUANT_LAYERS.items()}


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer keeps for backward, and that no layer before it has kept.

    Attributes:
        name: the layer, as in ``model.named_modules()``; empty for what the model's own forward keeps.
        kind: its class.
        float_bytes: in the float network.
        bytes: in the network.
    """

    name: str
    kind: str
    float_bytes: int
    bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """What :func:`memory_report` found; ``print(report)`` shows the table.

    Attributes:
        layers: one entry for each layer that keeps something, in either network.
    """

    layers: list[LayerMemory]

    @property
    def float_bytes(self) -> int:
        """Of the whole float network."""
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of the whole network."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """The network's bytes as a part of the float network's."""
        return self.bytes / self.float_bytes if self.float_bytes else float("nan")

    def __str__(self) -> str:
        size, unit = (2**20, "MiB") if self.float_bytes >= 2**22 else (2**10, "KiB")
        names = [layer.name or "(its own forward)" for layer in self.layers]
        width = max(map(len, ["layer", *names]))
        kinds = max(map(len, ["kind", *(layer.kind for layer in self.layers)]))

        def columns(of: LayerMemory | MemoryReport) -> str:
            return f"{of.float_bytes / size:12.3f}  {of.bytes / size:12.3f}"

        lines = [f"{'layer':{width}}  {'kind':{kinds}}  {'float, ' + unit:>12}  {'this, ' + unit:>12}"]
        for name, layer in zip(names, self.layers, strict=True):
            lines.append(f"{name:{width}}  {layer.kind:{kinds}}  {columns(layer)}")
        total = f"{'kept for backward':{width + kinds + 2}}  {columns(self)}"
        lines.append(f"{total}  = {self.ratio:.3f} of the float network")
        return "\n".join(lines)


@torch.inference_mode(False)
def memory_report(model: nn.Module, example_input: Tensor | tuple | list | dict) -> MemoryReport:
    """Counts the bytes that a network keeps between its forward and its backward pass, layer by layer, and
    the same for the float network: with ReLUs for the StaircaseReLUs (which may have been ReLU6), in place if
    they can be, and torch's own layers for those that keep codes.

    Copies of the model run forward once each, in training mode; the model itself, its statistics and the
    random state stay as they are. Counted is what autograd saves (``torch.autograd.graph
    .saved_tensors_hooks``): each piece of memory once, at the layer that saves it first, without parameters
    and buffers. The input counts where a layer keeps it.

    Args:
        model: a module, prepared or not.
        example_input: a batch; a tuple or list of arguments; or a dict of keyword arguments. What is counted
            grows with the batch. It may be on the meta device with the model: nothing is computed then.

    Returns:
        MemoryReport: ``layers``, ``bytes``, ``float_bytes`` and ``ratio``; ``str`` gives a table.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torchqat
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> report = torchqat.memory_report(torchqat.prepare(model, 1), torch.randn(4, 3, 10, 10))
        >>> report.layers[1].name, report.layers[1].float_bytes, report.layers[1].bytes
        ('1', 8192, 516)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"memory_report: model must be a torch.nn.Module, got {type(model).__name__}")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    ours = _kept(copy.deepcopy(model), example_input)
    try:
        floats = _kept(_float_twin(model, inplace=True), example_input)
    except RuntimeError:  # ReLUs of views of a split, of expanded tensors, of parameters
        floats = _kept(_float_twin(model, inplace=False), example_input)
    return MemoryReport(
        [
            LayerMemory(name, kind, floats.get(name, 0), ours.get(name, 0))
            for name, kind in kinds.items()
            if name in floats or name in ours
        ]
    )


def _float_twin(model: nn.Module, inplace: bool) -> nn.Module:
    model = copy.deepcopy(model)
    if isinstance(model, StaircaseReLU):
        return nn.ReLU(inplace)
    for module in list(model.modules()):
        module.__class__ = PLAIN_CLASSES.get(type(module), type(module))
        for name, child in module._modules.items():  # a module may be there under several names
            if isinstance(child, StaircaseReLU):
                module._modules[name] = nn.ReLU(inplace)
    return model


def _kept(model: nn.Module, example_input: Any) -> dict[str, int]:
    """The bytes that each layer keeps."""
    own = {_memory(t) for t in (*model.parameters(), *model.buffers())}
    calls, seen, kept = [""], {}, {}

    def pack(tensor: Tensor) -> Tensor:
        memory = _memory(tensor)
        if memory not in own and memory not in seen:
            seen[memory] = tensor  # held, so that its address stays its own
            kept[calls[-1]] = kept.get(calls[-1], 0) + tensor.untyped_storage().nbytes()
        return tensor

    def leave(*_) -> None:
        calls.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        module.register_forward_hook(leave, always_call=True)
    if not isinstance(example_input, (tuple, list, dict)):
        example_input = (example_input,)
    # In-place ReLUs write into them.
    arguments = tree_map_only(Tensor, lambda t: t.detach().clone(), example_input)
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.random.fork_rng(), torch.enable_grad(), saved:
        model.train()
        model(**arguments) if isinstance(arguments, dict) else model(*arguments)
    return kept


def _memory(tensor: Tensor) -> int:
    """What tells one piece of memory from another, on the meta device too."""
    return tensor.untyped_storage()._cdata
