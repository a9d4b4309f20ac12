"""Finds which layers of a model read the outputs of its staircases; what `prepare` pairs them by.

The model is followed from module to module: those with a forward of their own are traced by themselves
(torch.fx), as for `prepare`. What is found here decides what is kept for backward, never what results: the
operators look for themselves whether their input is a staircase's output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from torchqat import _rewrite
from torchqat.nn.quant_layers import QUANT_LAYERS, max_pool2d, why_floats
from torchqat.nn.staircase_relu import StaircaseReLU

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
POOLS = (nn.MaxPool2d,)
POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d, max_pool2d)
READERS = (*CONVOLUTIONS, nn.Linear)
QUANT_CONVOLUTIONS = tuple(QUANT_LAYERS[kind] for kind in CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
PASSING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
PASSING_FUNCTIONS = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
PASSING_METHODS = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous")


@dataclass(frozen=True)
class Steps:
    """A tensor on the steps of one of these staircases."""

    staircases: tuple[str, ...]


@dataclass(frozen=True)
class Other:
    """Any other tensor: what it is. `convolution` is named where it is that one's result."""

    what: str
    convolution: str | None = None


@dataclass
class Edges:
    """What was found.

    Attributes:
        reads: what each layer that could keep codes reads, by the name of the layer; one entry per call.
        pool_calls: what the calls of F.max_pool2d in the forward of each module read.
        normalizes: the convolutions whose results each batch normalization reads.
        foreign: layers of classes derived from those that could keep codes; why they are left alone.
        assumed: layers inside modules whose forward does not trace, taken to be called in the order of their
            registration; why it does not trace.
    """

    reads: dict[str, list] = field(default_factory=dict)
    pool_calls: dict[str, list] = field(default_factory=dict)
    normalizes: dict[str, list] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)


def find_edges(model: nn.Module, left_alone: Callable[[str], bool]) -> Edges:
    walk = _Walk({module: name for name, module in model.named_modules()}, left_alone)
    walk.module("", model, [Other("the model's input")])
    return walk.edges


def plain_class(module: nn.Module) -> type:
    """The torch class of a layer that may have become one of ours."""
    return next((plain for plain, quant in QUANT_LAYERS.items() if type(module) is quant), type(module))


class _Walk:
    def __init__(self, names: dict[nn.Module, str], left_alone: Callable[[str], bool]):
        self.names = names  # a module may be called by several
        self.left_alone = left_alone
        self.edges = Edges()
        self.untraceable: str | None = None

    def module(self, path: str, module: nn.Module, inputs: list):
        """What a module returns for these inputs."""
        path = self.names.get(module, path)
        first = inputs[0] if inputs else Other("nothing")
        kind = plain_class(module)
        if isinstance(module, StaircaseReLU):
            without = self.left_alone(path) and not module.save_codes
            return Other(f"the output of {path}, which keeps no codes") if without else Steps((path,))
        if kind in PASSING_MODULES or (kind in DROPOUTS and module.p == 0):
            return first
        if kind in POOLS:
            self._reads(path, first)
            return self._pooled(path, f"the output of {path}", first)
        if kind in READERS:
            self._reads(path, first)
            return Other(f"the output of {path}", path if kind in CONVOLUTIONS else None)
        if kind in NORMS:
            self.edges.normalizes.setdefault(path, []).append(first)
            return Other(f"the output of {path}")
        in_order = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if in_order or kind in (nn.ModuleList, nn.ModuleDict):
            return self._in_order(path, module, first)
        if isinstance(module, (*READERS, *POOLS)):
            self.edges.foreign[path] = f"{kind.__name__} is a class of its own"
        if isinstance(module, torch.jit.ScriptModule):
            return Other(f"the output of {path or kind.__name__}, which is TorchScript")
        if kind.__module__.startswith("torch.nn.") or not any(True for _ in module.children()):
            return Other(f"the output of {path} ({kind.__name__})")
        try:
            graph = _rewrite.own_graph(module)
        except _rewrite.Untraceable as reason:
            before, self.untraceable = self.untraceable, f"{path or kind.__name__} does not trace: {reason}"
            self._in_order(path, module, Other(f"the input of {path or kind.__name__}, which does not trace"))
            self.untraceable = before
            return Other(f"the output of {path or kind.__name__}, which does not trace")
        return self._graph(path, module, graph, inputs)

    def _reads(self, path: str, value) -> None:
        self.edges.reads.setdefault(path, []).append(value)
        if self.untraceable is not None:
            self.edges.assumed[path] = self.untraceable

    def _pooled(self, path: str, what: str, value):
        """A max of codes is a code."""
        if self.left_alone(path) and isinstance(value, Steps):
            return Other(f"{what}, which is excluded")
        return value if isinstance(value, Steps) else Other(what)

    def _in_order(self, path: str, module: nn.Module, value):
        for name, child in module._modules.items():  # one that is there twice is called twice
            if child is not None:
                value = self.module(_join(path, name), child, [value])
        return value

    def _graph(self, path: str, module: nn.Module, graph: fx.Graph, inputs: list):
        values: dict[fx.Node, object] = {}
        remaining = iter(inputs)
        for node in graph.nodes:
            arguments = [values.get(a) for a in node.all_input_nodes]
            first = arguments[0] if arguments else Other("nothing")
            if node.op == "placeholder":
                values[node] = next(remaining, Other(f"an input of {path or 'the model'}"))
            elif node.op == "call_module":
                child = module.get_submodule(node.target)
                values[node] = self.module(_join(path, node.target), child, arguments)
            elif node.op == "output":
                one = len(node.all_input_nodes) == 1 and node.args[0] is node.all_input_nodes[0]
                return first if one else Other(f"one of several outputs of {path or 'the model'}")
            elif node.op == "call_function" and node.target in POOL_FUNCTIONS:
                self.edges.pool_calls.setdefault(path, []).append(first)
                values[node] = self._pooled(path, "the result of max_pool2d", first)
            elif _passes(node):
                values[node] = first
            else:
                values[node] = Other(f"the result of {_callee(node)}")
        return Other("nothing")


def _passes(node: fx.Node) -> bool:
    """Whether a call returns its first argument's elements as they are, in another shape."""
    if node.op == "call_method":
        return node.target in PASSING_METHODS
    if node.target is F.dropout:
        return node.kwargs.get("p") == 0 or node.kwargs.get("training") is False
    return node.op == "call_function" and node.target in PASSING_FUNCTIONS


def _callee(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unpair(model: nn.Module, left_alone: Callable[[str], bool]) -> None:
    """Takes back what an earlier call has asked for: the layers are then the plain ones."""
    for name, module in model.named_modules():
        if left_alone(name):
            continue
        if isinstance(module, StaircaseReLU):
            module.save_codes = False
        elif isinstance(module, QUANT_CONVOLUTIONS):
            module.recompute = False


def pair(model: nn.Module, left_alone: Callable[[str], bool], recompute: bool) -> tuple[list[str], list[str]]:
    """Makes the layers that read staircases keep codes; says what was paired and what was not."""
    edges = find_edges(model, left_alone)
    modules = dict(model.named_modules())
    paired: list[str] = []
    not_paired = [f"{path}: {reason}" for path, reason in edges.foreign.items()]

    def keep_codes(values: list, reader: str) -> None:
        names = sorted({name for value in values if isinstance(value, Steps) for name in value.staircases})
        for name in names:
            modules[name].save_codes |= not left_alone(name)
        paired.append(f"{', '.join(names)} -> {reader}")

    for path, values in edges.pool_calls.items():
        if not left_alone(path) and any(isinstance(value, Steps) for value in values):
            _rewrite.replace_calls(modules[path], POOL_FUNCTIONS, max_pool2d)
            keep_codes(values, _join(path, "F.max_pool2d"))
    for path, values in edges.reads.items():
        others = [f"it reads {value.what}" for value in values if isinstance(value, Other)]
        floats = why_floats(modules[path])
        if left_alone(path) or others or floats:
            reason = "it is excluded" if left_alone(path) else others[0] if others else floats
            not_paired.append(f"{path}: {reason}")
            continue
        become_quant(modules[path])
        assumed = f" (assumed: {edges.assumed[path]})" if path in edges.assumed else ""
        keep_codes(values, path + assumed)
    for path, values in edges.normalizes.items():
        if all(isinstance(value, Steps) for value in values) and not (
            left_alone(path) or why_floats(modules[path])
        ):
            become_quant(modules[path])
            keep_codes(values, path)
    reached = {*edges.reads, *edges.foreign}
    for path, module in modules.items():
        if isinstance(module, (*READERS, *POOLS)) and path not in reached:
            not_paired.append(f"{path}: no forward that could be followed calls it")
    if recompute:
        paired += _recompute(edges, modules, left_alone)
    return paired, not_paired


def _recompute(edges: Edges, modules: dict[str, nn.Module], left_alone) -> list[str]:
    """Has the convolutions that normalizations read computed again; returns which, in words."""
    done = []
    for path, values in edges.normalizes.items():
        read = dict.fromkeys(value.convolution if isinstance(value, Other) else None for value in values)
        convolutions = list(read)
        if None in convolutions:
            continue
        if any(left_alone(name) or why_floats(modules[name]) for name in (path, *convolutions)):
            continue
        become_quant(modules[path])
        for name in convolutions:
            become_quant(modules[name])
            modules[name].recompute = True
        done.append(f"{', '.join(convolutions)} -> {path}: computed again in backward")
    return done


def become_quant(module: nn.Module) -> None:
    """Changes the class: the object stays, with its parameters, its hooks and whatever refers to it."""
    if type(module) in QUANT_LAYERS:
        module.__class__ = QUANT_LAYERS[type(module)]
