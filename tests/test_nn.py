"""nn.StaircaseReLU: where its step size starts, how it is bounded, and what its gradient goes through."""

import math
import pickle

import numpy as np
import oracles
import pytest
import torch
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
        (dict(bits=0), "bits must be in 1..8, got 0"),
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
        (dict(bits=2.5), "bits must be an integer, got 2.5"),
        (dict(alpha_grad_scale=math.inf), "alpha_grad_scale must be finite, got inf"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StaircaseReLU(**options)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match="one for each of the 3 channels of dimension 1"):
        StaircaseReLU(2, channels=4)(torch.randn(2, 3))


def test_it_pickles_and_prints():
    act = StaircaseReLU(3, ste="relu", channels=2)
    assert repr(act) == "StaircaseReLU(bits=3, ste='relu', alpha_grad='three_valued', channels=2)"
    twin = pickle.loads(pickle.dumps(act))
    x = torch.randn(3, 2)
    torch.testing.assert_close(twin(x), act(x), rtol=0, atol=0)
