"""Python, C++ and the schemas name the same things alike: arguments, their order, their defaults."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torchqat
import torchqat.functional as F

ROOT = Path(__file__).parent.parent
PUBLIC = F.__all__
CPP_LITERALS = {"std::nullopt": None, "true": True, "false": False}


def literal(text):
    """A C++ default as the Python value it stands for."""
    if text.startswith('"'):
        return text.strip('"')
    return CPP_LITERALS[text] if text in CPP_LITERALS else float(text)


def cpp_functions():
    """name -> [(argument, default)] of every exported free function."""
    functions = {}
    for header in sorted((ROOT / "csrc/torchqat/ops").glob("*.h")):
        for name, body in re.findall(r"TORCHQAT_API [^;{]*?(\w+)\(([^;{]*)\);", header.read_text()):
            body = re.sub(r"<[^<>]*>", "", body)
            parts = [part.partition("=") for part in re.split(r",\s*", body) if part.strip()]
            functions[name] = [
                (left.split()[-1].lstrip("&*"), literal(right.strip()) if right else inspect.Parameter.empty)
                for left, _, right in parts
            ]
    return functions


def python_arguments(name):
    parameters = inspect.signature(getattr(F, name)).parameters.values()
    return [(p.name, p.default) for p in parameters]


@pytest.mark.parametrize("name", PUBLIC)
def test_cpp_mirrors_python(name):
    assert cpp_functions()[name] == python_arguments(name)


def cpp_modules():
    """name -> [(option, default)] of every module of torchqat::nn."""
    header = "\n".join(path.read_text() for path in sorted((ROOT / "csrc/torchqat/nn").glob("*.h")))
    modules = {}
    for name, body in re.findall(r"struct TORCHQAT_API (\w+)Options {(.*?)\n};", header, re.DOTALL):
        options = re.findall(r"TORCH_ARG\(.*, (\w+)\) = ([^;]*);", body)
        assert len(options) == body.count("TORCH_ARG") > 0 and f"TORCH_MODULE({name});" in header
        modules[name] = [(option, literal(default)) for option, default in options]
    return modules


@pytest.mark.parametrize("name", cpp_modules())
def test_cpp_modules_mirror_python(name):
    parameters = inspect.signature(getattr(torchqat.nn, name)).parameters.values()
    assert cpp_modules()[name] == [(p.name, p.default) for p in parameters]


def test_every_module_is_one_in_cpp():
    header = "\n".join(path.read_text() for path in (ROOT / "csrc/torchqat/nn").glob("*.h"))
    assert set(re.findall(r"TORCH_MODULE\((\w+)\);", header)) == set(torchqat.nn.__all__)
    of_torch = {
        name for name in torchqat.nn.__all__ if name.startswith("Quant")
    }  # these take torch's options
    assert set(cpp_modules()) == set(torchqat.nn.__all__) - of_torch


@pytest.mark.parametrize("name", PUBLIC)
def test_the_schema_has_the_same_arguments_in_the_same_order(name):
    schema = getattr(torch.ops.qat, name).default._schema
    assert [a.name for a in schema.arguments] == [a for a, _ in python_arguments(name)]
    for argument, (_, default) in zip(schema.arguments, python_arguments(name), strict=True):
        if argument.has_default_value():
            assert argument.default_value == default


def test_every_public_operator_is_in_functional_and_in_the_umbrella_header():
    names = {n.removeprefix("qat::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("qat::")}
    assert {n for n in names if not n.startswith("_")} == set(PUBLIC)
    umbrella = (ROOT / "csrc/torchqat/torchqat.h").read_text()
    for header in (ROOT / "csrc/torchqat/ops").glob("*.h"):
        if any(f" {name}(" in header.read_text() for name in PUBLIC):
            assert f"torchqat/ops/{header.name}" in umbrella


def test_the_readme_lists_every_ste_and_operator():
    readme = (ROOT / "README.md").read_text()
    for name in [*F.ste_names(), *PUBLIC]:
        assert f"`{name}`" in readme
