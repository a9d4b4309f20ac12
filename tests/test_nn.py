"""nn.StaircaseReLU: where its step size starts, how it is bounded, and what its gradient goes through."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torchqat.nn import OPTIMAL_ALPHA, StaircaseReLU


def half_gaussian_error(alpha, bits):
    """Mean squared error of the ceil staircase on max(z, 0), z ~ N(0, 1), by Gauss-Legendre on each cell."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    top = 2**bits - 1
    ends = np.append(np.arange(top) * alpha, max(12.0, top * alpha))
    half = np.diff(ends)[:, None] / 2
    z = ends[:-1, None] + half * (1 + nodes)
    error = (z - np.arange(1, top + 1)[:, None] * alpha) ** 2
    return (half * weights * error * np.exp(-(z**2) / 2)).sum() / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_optimal_step_size_is_the_minimum(bits):
    alpha = OPTIMAL_ALPHA[bits]
    assert StaircaseReLU(bits).alpha.item() == pytest.approx(alpha)
    here = half_gaussian_error(alpha, bits)
    for factor in (0.97, 0.995, 1.005, 1.03):
        assert here < half_gaussian_error(factor * alpha, bits)


def test_where_alpha_starts():
    assert [StaircaseReLU(b, alpha_init="papers").alpha.item() for b in (1, 2, 4)] == pytest.approx(
        [1.2221, 0.6511, 0.1946]
    )
    act = StaircaseReLU(3, alpha_init=0.25, channels=5)
    assert act.alpha.tolist() == [0.25] * 5 and act.alpha.dtype == torch.float32
    assert StaircaseReLU(3, alpha_init=1e-9).alpha.item() == pytest.approx(1e-3)  # never below the bound


@pytest.mark.parametrize("channels", [None, 4])
def test_forward_is_the_operator(channels, device):
    act = StaircaseReLU(2, alpha_init=0.5, channels=channels).to(device)
    x = torch.randn(3, 4, 5, device=device)
    torch.testing.assert_close(act(x), oracles.staircase(x, act.alpha.detach(), 2), rtol=0, atol=0)


def alpha_gradient(upstream, device="cpu", **options):
    act = StaircaseReLU(2, alpha_init=0.5, **options).to(device)
    act(torch.tensor([9.0], device=device)).backward(torch.tensor([upstream], device=device))
    return act.alpha.grad.item()


def test_the_gradient_of_alpha_is_scaled_then_clipped(device):
    assert alpha_gradient(10.0, device) == pytest.approx(0.01 * 30)
    assert alpha_gradient(-1e4, device) == -1.0
    assert alpha_gradient(1e4, device, alpha_grad_clip=2.5) == 2.5
    assert alpha_gradient(1e4, device, alpha_grad_scale=1.0, alpha_grad_clip=math.inf) == 3e4


def test_the_lower_bound_passes_the_gradient_and_writes_nothing(device):
    act = StaircaseReLU(2, alpha_init=0.5).to(device)
    with torch.no_grad():
        act.alpha.fill_(-3.0)
    y = act(torch.tensor([9.0], device=device))
    y.sum().backward()
    assert y.item() == pytest.approx(3e-3) and act.alpha.item() == -3.0
    assert act.alpha.grad.item() == pytest.approx(0.03)


def test_a_nan_in_alpha_is_not_hidden_by_the_bound():
    act = StaircaseReLU(2)
    with torch.no_grad():
        act.alpha.fill_(math.nan)
    assert act(torch.ones(2)).isnan().all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bits=0), "StaircaseReLU: bits must be in 1..8, got 0"),
        (dict(ste="tanh"), "unknown ste 'tanh'; choose one of identity, relu"),
        (dict(alpha_grad="mean"), "unknown alpha_grad 'mean'"),
        (dict(channels=0), "channels must be None or at least 1, got 0"),
        (dict(alpha_init="zero"), "alpha_init must be 'optimal', 'papers' or a number, got 'zero'"),
        (dict(alpha_init=-1.0), "alpha_init must be a finite number > 0, got -1.0"),
        (dict(alpha_init=math.nan), "alpha_init must be a finite number > 0, got nan"),
        (dict(bits=3, alpha_init="papers"), "the papers give no alpha_init for 3 bits, only for 1, 2, 4"),
        (dict(alpha_grad_clip=0.0), "alpha_grad_clip must be > 0, got 0.0"),
        (dict(alpha_min=0.0), "alpha_min must be a finite number > 0, got 0.0"),
        (dict(alpha_min=math.inf), "alpha_min must be a finite number > 0, got inf"),
        (dict(alpha_grad_scale=math.inf), "alpha_grad_scale must be finite, got inf"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StaircaseReLU(**options)


@pytest.mark.parametrize("bits", [2.5, 2.0, "2", None, True])
def test_bits_that_are_no_int_are_named(bits):
    with pytest.raises(TypeError, match=f"StaircaseReLU: bits must be an int, got {bits!r}"):
        StaircaseReLU(bits)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="one for each of the 3 channels of dimension 1"):
        StaircaseReLU(2, channels=4)(torch.randn(2, 3))


def test_it_pickles_and_prints():
    act = StaircaseReLU(3, ste="relu", channels=2)
    assert repr(act) == "StaircaseReLU(bits=3, ste='relu', alpha_grad='three_valued', channels=2)"
    twin = pickle.loads(pickle.dumps(act))
    x = torch.randn(3, 2)
    torch.testing.assert_close(twin(x), act(x), rtol=0, atol=0)


# ---- state dicts ----


def net(**options):
    return torch.nn.Sequential(torch.nn.Linear(3, 3), StaircaseReLU(**{"bits": 2, **options}))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options, got",
    [
        ({"bits": 4}, "bits=4"),
        ({"ste": "identity"}, "ste='identity'"),
        ({"alpha_grad": "min"}, "alpha_grad='min'"),
    ],
)
@pytest.mark.parametrize("way", [lambda s: s, saved_and_loaded, copy.deepcopy], ids=["as is", "file", "copy"])
def test_a_state_of_other_settings_is_refused_by_name(way, options, got):
    state = way(net(**options).state_dict())
    ours = "bits=2, ste='clipped_relu', alpha_grad='three_valued'"
    with pytest.raises(RuntimeError, match=f"StaircaseReLU '1': the state must be of {ours}, got .*{got}"):
        net().load_state_dict(state)
    with pytest.raises(RuntimeError, match="StaircaseReLU '1'"):
        net().load_state_dict(state, strict=False)
    net(**options).load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_a_state_holds_alpha_alone_and_loads_without_its_metadata():
    """As from formats that hold tensors only, and from before the settings were kept."""
    model = net(alpha_init=0.5)
    assert [key for key in model.state_dict() if key.startswith("1.")] == ["1.alpha"]
    for options in ({}, {"bits": 4}):
        other = net(**options)
        other.load_state_dict(dict(model.state_dict()))
        assert other[1].alpha == 0.5
    state = model.state_dict()
    del state._metadata["1"]["staircase_relu"]
    net(bits=4).load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_averages_copies_and_exports_keep_their_settings():
    model = net()
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    AveragedModel(net()).load_state_dict(saved_and_loaded(averaged.state_dict()))
    with pytest.raises(RuntimeError, match="StaircaseReLU 'module.1'"):
        AveragedModel(net(bits=3)).load_state_dict(averaged.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export itself
        exported = torch.export.export(model, (torch.randn(2, 3),))
    assert set(exported.state_dict) == set(model.state_dict())
    StaircaseReLU(2).load_state_dict(StaircaseReLU(2).state_dict())
