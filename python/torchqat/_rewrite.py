"""Gives every ReLU call in a model's forward functions a module of its own; what `prepare` is made of.

Each module's own forward is traced by itself (torch.fx, with every module that it calls left as a call), so
code that does not trace costs only the module that contains it.
"""

import ast
import importlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn import functional as F

FUNCTIONS = (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_)
METHODS = ("relu", "relu_")
IN_PLACE = (F.relu_, torch.relu_, "relu_")


class Untraceable(Exception):
    """Says why a forward function must be left as it is."""


class _OwnForward(fx.Tracer):
    """Traces the forward of one module; what it calls stays a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def own_graph(module: nn.Module) -> fx.Graph:
    """The graph of `module`'s own forward; Untraceable where a trace would not mean what the code does."""
    for parameter in inspect.signature(module.forward).parameters.values():
        # fx would take `mask is not None` for true, whatever is passed.
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise Untraceable(f"forward has the optional argument '{parameter.name}'")
    graphs = {training: _trace(module, training) for training in (True, False)}
    if graphs[True].python_code("self").src != graphs[False].python_code("self").src:
        raise Untraceable("forward differs between train and eval mode")
    return graphs[True]


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    before = dict(module.__dict__)
    module.training = training
    try:
        graph = _OwnForward().trace(module)
    except Exception as error:  # whatever the user's code or fx raises: the forward does not trace
        raise Untraceable(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None
    finally:
        changed = [key for key, value in module.__dict__.items() if before.get(key) is not value]
        module.__dict__.clear()
        module.__dict__.update(before)
    if set(changed) - {"training"}:  # tensors made inside forward show up here too, as constants of the trace
        raise Untraceable("forward makes tensors or sets attributes of its own")
    return graph


def split_calls(
    owner: nn.Module,
    graph: fx.Graph,
    made: dict[nn.Module, bool],
    taken: set[nn.Module],
    new: Callable[[], nn.Module],
) -> list[str]:
    """Gives each ReLU call in `graph`, the forward of `owner`, its own module, and installs the new forward.

    `made` holds the modules that stand for a ReLU, and whether that ReLU worked in place; the first call of
    one keeps it (`taken` remembers that), each later call and each functional call gets what `new()` returns.
    Returns the names of the modules added.
    """
    added, changed = [], False
    for node in list(graph.nodes):
        module = owner.get_submodule(node.target) if node.op == "call_module" else None
        in_place = made.get(module, False) or _works_in_place(node)
        if module in made and module not in taken:
            taken.add(module)
            changed |= in_place and _redirect_later_uses(node)
            continue
        if module not in made and not _is_functional_relu(node):
            continue
        name = _free_name(owner, node.name if module is None else node.target.replace(".", "_"))
        owner.add_module(name, new())
        with graph.inserting_before(node):
            call = graph.call_module(name, (_input(node),))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if in_place:
            _redirect_later_uses(call)
        added.append(name)
    if added or changed:
        _install(owner, graph)
    return added


def replace_calls(owner: nn.Module, functions: tuple[Callable, ...], by: Callable) -> None:
    """Has the forward of `owner` call one function in place of others."""
    graph = own_graph(owner)
    others = [function for function in functions if function is not by]
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in others]
    for node in calls:
        node.target = by
    if calls:
        _install(owner, graph)


def _is_functional_relu(node: fx.Node) -> bool:
    names = METHODS if node.op == "call_method" else FUNCTIONS if node.op == "call_function" else ()
    return node.target in names


def _works_in_place(node: fx.Node) -> bool:
    if not _is_functional_relu(node):
        return False
    return node.target in IN_PLACE or bool(
        node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False)
    )


def _input(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.kwargs["input"]


def _redirect_later_uses(call: fx.Node) -> bool:
    """After an in-place ReLU its input *is* its output; whether anything did use the input again."""
    order = {node: i for i, node in enumerate(call.graph.nodes)}
    later = [user for user in _input(call).users if order[user] > order[call]]
    for user in later:
        user.replace_input_with(_input(call), call)
    return bool(later)


def _free_name(owner: nn.Module, wish: str) -> str:
    names = (wish if i == 0 else f"{wish}_{i}" for i in range(1_000_000))
    return next(name for name in names if not hasattr(owner, name))


def _install(owner: nn.Module, graph: fx.Graph) -> None:
    """Makes `graph` the forward of this one object, which stays an instance of its class."""
    if isinstance(owner, fx.GraphModule):
        owner.graph = graph
        return
    code = graph.python_code("self")
    base = vars(type(owner)).get("_prepared_from", (type(owner),))[0]  # the class that the user wrote
    owner.__class__ = _class_with_forward(base, code.src, code.globals)


def _class_with_forward(base: type, source: str, names: dict) -> type:
    filename = f"<forward of {base.__qualname__} as torchqat.prepare left it, {abs(hash(source))}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)
    members = {
        "forward": namespace["forward"],
        "_prepared_from": (base, source, names),
        "__reduce__": _reduce,
    }
    return type(base.__name__, (base,), {**members, "__module__": base.__module__, "__doc__": base.__doc__})


def _reduce(self):
    """Pickles and copies an object whose class exists in memory only."""
    base, source, names = self._prepared_from
    portable = {k: ("module", v.__name__) if isinstance(v, types.ModuleType) else v for k, v in names.items()}
    return _rebuild, (base, source, portable), self.__dict__


def _rebuild(base: type, source: str, portable: dict) -> nn.Module:
    names = {
        k: importlib.import_module(v[1]) if isinstance(v, tuple) and v[0] == "module" else v
        for k, v in portable.items()
    }
    cls = _class_with_forward(base, source, names)
    return cls.__new__(cls)


def calls_in_source(module: nn.Module) -> list[tuple[str, str]]:
    """(callee, "file:line") of every call in the source of the module's class, where it can be read."""
    try:
        lines, first = inspect.getsourcelines(type(module))
        file = inspect.getsourcefile(type(module))
    except (OSError, TypeError):
        return []
    tree = ast.parse(textwrap.dedent("".join(lines)))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [(ast.unparse(call.func), f"{file}:{first + call.lineno - 1}") for call in calls]


def is_functional_relu(callee: str) -> bool:
    """Whether an expression in source, such as "F.relu" or "x.relu_", is a ReLU that is not a module."""
    return callee.split(".")[-1] in ("relu", "relu_", "relu6") and not callee.startswith("self.")
