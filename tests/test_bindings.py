"""The C++ objects that Python can be given: the same facts, and an optimizer that takes the same steps."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torchqat
from cmake_projects import missing
from torchqat.optim import BCGD, param_groups


@pytest.fixture(scope="module")
def bindings():
    """The module of the library in use: in the package, or beside a library of a build folder."""
    folders = (Path(torchqat.__file__).parent, Path(torchqat.build_info()["library"]).parent)
    found = [path for folder in folders for path in folder.glob("_bindings*.so")]
    if not found:
        missing("torchqat._bindings was not built: it needs Python's headers")
    spec = importlib.util.spec_from_file_location("torchqat._bindings", found[-1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_languages_tell_the_same_of_the_build(bindings):
    info = torchqat.build_info()
    assert bindings.build_info() == {key: value for key, value in info.items() if key != "library"}


def network():
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(3, 5, 3),
        torchqat.nn.StaircaseReLU(2),
        torch.nn.Flatten(),
        torch.nn.Linear(80, 7),
    )
    return torch.nn.Sequential(*layers)


def set_gradients(model, step):
    """The same for every model; in some steps a parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if (i + step) % 4 == 0 else grad


OPTIONS = {
    "plain": {},
    "momentum": dict(momentum=0.9, weight_decay=1e-2),
    "nesterov": dict(momentum=0.8, nesterov=True, blend=0.1),
    "dampening": dict(momentum=0.5, dampening=0.3, maximize=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("bits", "method", "channel_dim"),
    [
        (1, "exact", None),
        (2, "exact", 0),
        (2, "twn", None),
        (4, "exact", None),
        (3, "lloyd", 0),
        (None, "exact", None),
    ],
)
def test_the_cpp_optimizer_takes_the_steps_of_pythons_bit_for_bit(
    bindings, bits, method, channel_dim, options
):
    models = network(), network()
    groups = [
        param_groups(m, bits, method=method, channel_dim=channel_dim, alpha_lr=1e-3, alpha_weight_decay=0.0)
        for m in models
    ]
    python = BCGD(groups[0], lr=0.05, **options)
    cpp = bindings.BCGD(groups[1], lr=0.05, **options)
    for step in range(20):
        if step == 10:  # values from outside: both take them for new latents
            for model in models:
                torch.nn.init.constant_(model[0].weight[0], 0.3)
        for model in models:
            set_gradients(model, step)
        if step == 10:
            with (
                pytest.warns(UserWarning, match="changed outside the optimizer") if bits else torch.no_grad()
            ):
                python.step()
        else:
            python.step()
        cpp.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)
            ours, theirs = python.state[p], cpp.state(q)
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype


def test_groups_have_options_of_their_own_in_both(bindings):
    def groups(model):
        return [
            {"params": [model[0].weight], "quant_bits": 1, "momentum": 0.5, "blend": 0.1, "maximize": True},
            {"params": [model[3].weight], "lr": 0.3, "momentum": 0.9, "nesterov": True, "min_value": -0.1},
            {
                "params": [model[0].bias, model[3].bias],
                "weight_decay": 0.1,
                "dampening": 0.5,
                "momentum": 0.1,
            },
        ]

    models = network(), network()
    python, cpp = BCGD(groups(models[0]), lr=0.05), bindings.BCGD(groups(models[1]), lr=0.05)
    for step in range(10):
        for model in models:
            set_gradients(model, step)
        python.step()
        cpp.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)


def test_the_cpp_optimizer_names_what_is_wrong_in_a_group(bindings):
    with pytest.raises(ValueError, match="BCGD: a group has no key 'quantbits'"):
        bindings.BCGD([{"params": [], "quantbits": 1}], lr=0.1)
    with pytest.raises(ValueError, match=r"BCGD: quant_bits must be in 1\.\.8, got 9"):
        bindings.BCGD([{"params": [], "quant_bits": 9}], lr=0.1)
