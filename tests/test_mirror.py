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
CPP_LITERALS = {"std::nullopt": None, "nullptr": None, "{}": (), "true": True, "false": False}


def literal(text):
    """A C++ default as the Python value it stands for."""
    if text.startswith('"'):
        return text.strip('"')
    return CPP_LITERALS[text] if text in CPP_LITERALS else float(text)


def cpp_functions(folder="ops"):
    """name -> [(argument, default)] of every free function that headers export, or have as a template."""
    functions = {}
    for header in sorted((ROOT / "csrc/torchqat" / folder).glob("*.h")):
        text = re.sub(r"(at::Tensor& \w+) = {}", r"\1 = nullptr", header.read_text())  # an undefined one
        declaration = r"(?:TORCHQAT_API|\ntemplate <.*>\n) ?[^;{()]*?(\w+)\(((?:[^;{]|{})*)\);"
        for name, body in re.findall(declaration, text):
            while body != (shorter := re.sub(r"<[^<>]*>", "", body)):
                body = shorter
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


#: The functions in C++ that are no operators: their folder, and what Python calls them.
OTHERS = {
    "param_groups": ("optim", torchqat.optim.param_groups),
    "faqd_loss": ("distill", torchqat.distill.FAQDLoss.forward),
    "resize_like": ("distill", torchqat.distill.resize_like),
    "save_checkpoint": (".", torchqat.save_checkpoint),
    "load_checkpoint": (".", torchqat.load_checkpoint),
    "calibrate": (".", torchqat.calibrate),
}
#: `names` are those of the features in messages.
ONLY_IN_PYTHON = ["self", "names"]
#: What only C++ has: files without a model, checkpoints without a file, facts without arguments.
ONLY_IN_CPP = {"save_safetensors", "load_safetensors", "checkpoint_of", "restore_checkpoint", "build_info",
               "operators_are_registered"}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_mirror_python(name):
    folder, ours = OTHERS[name]
    arguments = cpp_functions(folder)[name]
    parameters = inspect.signature(ours).parameters.values()
    wanted = [(p.name, p.default) for p in parameters if p.name not in ONLY_IN_PYTHON]
    if arguments[-1] == ("options", ()):  # a struct, which is compared by itself
        arguments.pop()
        wanted = [(name, default) for name, default in wanted if name not in dict(cpp_options_of(ours))]
    assert arguments == wanted


def test_no_function_is_left_out():
    folders = (".", "nn", "optim", "distill")
    assert {name for folder in folders for name in cpp_functions(folder)} == {*OTHERS, *ONLY_IN_CPP}


def cpp_options():
    """name -> [(option, default)] of every struct of options; what has no default is for the constructor."""
    headers = "\n".join(path.read_text() for path in sorted((ROOT / "csrc/torchqat").glob("*/*.h")))
    structs = {}
    for name, body in re.findall(r"struct TORCHQAT_API (\w+)Options[^;{]*{(.*?)\n};", headers, re.DOTALL):
        options = re.findall(r"TORCH_ARG\(.*, (\w+)\)(?: = ([^;]*))?;", body)
        assert len(options) == body.count("TORCH_ARG") > 0
        structs[name] = [
            (o, literal(default) if default else inspect.Parameter.empty) for o, default in options
        ]
    return structs


def cpp_options_of(owner):
    """The options that a function takes as a struct."""
    return next((cpp_options()[name] for name, other in OWNERS.items() if other is owner), [])


def test_a_group_of_parameters_has_pythons_keys_and_defaults():
    text = (ROOT / "csrc/torchqat/optim/bcgd.h").read_text()
    (body,) = re.findall(r"struct ParamGroup {(.*?)\n};", text, re.DOTALL)
    fields = dict(re.findall(r"(\w+) = ([^;]*);", body))
    optimizer = torchqat.optim.BCGD(
        [{"params": [torch.nn.Parameter(torch.ones(1))], "quant_bits": 1}], lr=0.5
    )
    keys = {"name", "params", *optimizer.defaults} - {"differentiable"}  # which is torch's own
    assert fields.keys() == keys
    # What a group does not say of the rest is the optimizer's.
    options = inspect.signature(torchqat.optim.BCGD).parameters.keys()
    for key in keys - {"name", "params"}:
        assert literal(fields[key]) == (None if key in options else optimizer.defaults[key]), key


def cpp_modules():
    headers = [path.read_text() for path in sorted((ROOT / "csrc/torchqat/nn").glob("*.h"))]
    return re.findall(r"^TORCH_MODULE\((\w+)\);", "\n".join(headers), re.MULTILINE)


#: What Python calls these options' owner.
OWNERS = {
    **{name: getattr(torchqat.nn, name) for name in cpp_modules() if name in cpp_options()},
    "BCGD": torchqat.optim.BCGD,
    "ParamGroups": torchqat.optim.param_groups,
    "FAQDLoss": torchqat.distill.FAQDLoss,
}
#: What a C++ group has as options, and Python as keys.
OF_GROUPS = ["quant_bits", "channel_dim", "method", "min_value", "name"]
#: What Python takes by position and C++ as arguments of their own.
NO_OPTIONS = ["params", "model", "weight_bits"]


def test_every_struct_of_options_is_compared():
    assert OWNERS.keys() == cpp_options().keys()


@pytest.mark.parametrize("name", OWNERS)
def test_cpp_options_mirror_python(name):
    parameters = inspect.signature(OWNERS[name]).parameters.values()
    wanted = [(p.name, p.default) for p in parameters if p.name not in NO_OPTIONS]
    options = [(option, default) for option, default in cpp_options()[name] if option not in OF_GROUPS]
    if name == "ParamGroups":  # where these are options in Python too
        options = cpp_options()[name]
    assert options == wanted


def test_every_module_is_there_in_cpp():
    assert set(cpp_modules()) == set(torchqat.nn.__all__)


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
