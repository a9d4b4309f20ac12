"""The papers' theorems as tests, with the operator itself in the middle.

Two linear layers with a binary activation between them, a teacher of the same form, and m independent rows
z_i of n standard normal inputs (Yin et al. 2019, "Understanding straight-through estimator"):

    y(Z; v, w) = sum_i v_i s(z_i . w),   s(x) = 1{x > 0},   loss = (y(Z; v, w) - y(Z; v*, w*))^2 / 2

with |w*| = 1. `staircase_relu` with bits = 1 and alpha = 1 is s, and its backward is the STE, so autograd
gives the coarse gradient in w. u = w / |w|, t is the unit vector of w* across u, theta the angle between w
and w*, phi and Phi the standard normal density and its integral.
"""

import itertools
import math
from typing import NamedTuple

import numpy
import pytest
import torch
import torchqat.functional as F
from torchqat.optim import BCGD

ROOT_TWO_PI = math.sqrt(2 * math.pi)


class Model(NamedTuple):
    v: torch.Tensor
    w: torch.Tensor
    v_star: torch.Tensor
    w_star: torch.Tensor


def model(m, n, theta, norm, seed):
    """A student at angle theta from its teacher, |w| = norm, in a random plane of R^n."""
    generator = torch.Generator().manual_seed(seed)
    frame, _ = torch.linalg.qr(torch.randn(n, 2, generator=generator, dtype=torch.float64))
    w = norm * (math.cos(theta) * frame[:, 0] + math.sin(theta) * frame[:, 1])
    v, v_star = torch.randn(2, m, generator=generator, dtype=torch.float64)
    return Model(v, w, v_star, frame[:, 0])


def binary(x, ste="clipped_relu"):
    return F.staircase_relu(x, x.new_ones(()), 1, ste=ste)


# Closed forms


def phi(x):
    return math.exp(-x * x / 2) / ROOT_TWO_PI


def big_phi(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def angle(a):
    """theta, u and t; t is any unit vector across u where w and w* are parallel."""
    u = a.w / a.w.norm()
    across = a.w_star - (a.w_star @ u) * u
    theta = math.atan2(across.norm(), a.w_star @ u)
    if across.norm() < 1e-12:
        across = torch.roll(u, 1) - (torch.roll(u, 1) @ u) * u
    return theta, u, across / across.norm()


def population_loss(a):
    """(5.1)"""
    theta, _, _ = angle(a)
    kernel = (1 - 2 * theta / math.pi) * (a.v @ a.v_star) + a.v.sum() * a.v_star.sum()
    return float((a.v @ a.v + a.v.sum() ** 2 - 2 * kernel + a.v_star @ a.v_star + a.v_star.sum() ** 2) / 8)


def gradient_v(a):
    """(5.2), the true gradient in v."""
    theta, _, _ = angle(a)
    return (a.v + a.v.sum() - (1 - 2 * theta / math.pi) * a.v_star - a.v_star.sum()) / 4


def mean_identity(a):
    """(5.5)"""
    _, u, _ = angle(a)
    return ((a.v @ a.v) * u - (a.v @ a.v_star) * a.w_star) / ROOT_TWO_PI


def mean_relu(a):
    """(5.6'), the form of (5.6) that has no angle in it"""
    _, u, _ = angle(a)
    radial = a.v @ a.v + a.v.sum() * (a.v.sum() - a.v_star.sum())
    return (radial * u - (a.v @ a.v_star) * a.w_star) / (2 * ROOT_TWO_PI)


def mean_clipped_relu(a):
    """(5.7), the proxy clipped at 1"""
    theta, u, t = angle(a)
    end, k, kappa = 1 / float(a.w.norm()), 1 / math.tan(theta), 1 / math.sin(theta)
    first = phi(0) - phi(end)
    q = (big_phi(kappa * end) - 0.5) / (kappa * ROOT_TWO_PI)
    p = phi(0) / 2 - phi(end) * big_phi(k * end) + k * q
    inner = a.v @ a.v_star
    h = a.v @ a.v + a.v.sum() ** 2 - a.v.sum() * a.v_star.sum() + inner
    return (first * h / 2 - inner * p) * u - inner * q * t


def mean_of_any(a, slope):
    """(5.8) for a slope that vanishes on x <= 0 and may have a kink at 1: three integrals over s = z . u."""
    theta, u, t = angle(a)
    norm, k = float(a.w.norm()), 1 / math.tan(theta)
    s, weight = panels([0, 1 / norm, 4 + 1 / norm, 12 + 1 / norm], 40)
    density = weight * slope(norm * s) * numpy.exp(-s * s / 2) / ROOT_TWO_PI
    first = (s * density).sum()
    p = (s * density * [big_phi(k * x) for x in s]).sum()
    q = (density * numpy.exp(-((k * s) ** 2) / 2)).sum() / ROOT_TWO_PI
    inner = a.v @ a.v_star
    square, total = a.v @ a.v, a.v.sum()
    radial = (
        square * first
        + first * (total**2 - square) / 2
        - first * (total * a.v_star.sum() - inner) / 2
        - inner * p
    )
    return radial * u - inner * q * t


CLOSED_FORMS = {
    "identity": mean_identity,
    "relu": mean_relu,
    "clipped_relu": mean_clipped_relu,
    "log_tailed_relu": lambda a: mean_of_any(a, lambda x: numpy.where(x <= 1, 1, 1 / numpy.maximum(x, 1))),
    "reverse_exponential": lambda a: mean_of_any(a, lambda x: numpy.exp(-x)),
}


def panels(edges, order):
    """Gauss-Legendre nodes and weights on each interval between consecutive edges (arrays broadcast)."""
    x, weight = numpy.polynomial.legendre.leggauss(order)
    edges = [numpy.asarray(e, dtype=float)[..., None] for e in edges]
    nodes = [(lo + hi) / 2 + (hi - lo) / 2 * x for lo, hi in itertools.pairwise(edges)]
    weights = [(hi - lo) / 2 * weight for lo, hi in itertools.pairwise(edges)]
    return numpy.concatenate(nodes, -1), numpy.concatenate(weights, -1)


# The operator's mean coarse gradient, by sampling and by quadrature


def sampled_mean(a, ste, samples, seed):
    """Mean over draws of Z of each sample's own coarse gradient, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    total, squares = torch.zeros_like(a.w), torch.zeros_like(a.w)
    chunk = 100_000
    for _ in range(samples // chunk):
        z = torch.randn(chunk, len(a.v), len(a.w), generator=generator, dtype=torch.float64)
        w = a.w.repeat(chunk, 1).requires_grad_()  # one copy per sample keeps the gradients apart
        error = binary((z @ w[..., None])[..., 0], ste) @ a.v - binary(z @ a.w_star) @ a.v_star
        (gradient,) = torch.autograd.grad(error.square().sum() / 2, w)
        total += gradient.sum(0)
        squares += gradient.square().sum(0)
    mean = total / samples
    return mean, ((squares / samples - mean.square()) / samples).sqrt()


def nodes(a, order, radius=9.0):
    """Nodes z and weights for one Gaussian row, in the plane of w and w*, where alone it matters.

    Polar, and cut where the integrand jumps: where z . w or z . w* changes sign, and at z . w = 1.
    """
    theta, u, t = angle(a)
    half = math.pi / 2
    angles, weight = panels([-half, theta - half, half, theta + half, 3 * half], order)
    cosine = numpy.cos(angles)
    cut = numpy.where(cosine > 0, 1 / (float(a.w.norm()) * numpy.maximum(cosine, 1e-9)), radius / 2)
    r, r_weight = panels([0 * angles, numpy.minimum(cut, radius / 2), 0 * angles + radius], 16)
    weight = weight[:, None] * r_weight * r * numpy.exp(-r * r / 2) / (2 * math.pi)
    x, y = r * cosine[:, None], r * numpy.sin(angles)[:, None]
    points = torch.from_numpy(numpy.stack([x.ravel(), y.ravel()], 1)) @ torch.stack([u, t])
    return points, torch.from_numpy(weight.ravel())


def loss_by_quadrature(a, ste, order):
    """E loss over independent rows is made of one-row means; its autograd is the mean coarse gradient."""
    z, weight = nodes(Model(*(x.detach() for x in a)), order)
    error = binary(z @ a.w, ste)[:, None] * a.v - binary(z @ a.w_star)[:, None] * a.v_star
    mean = weight @ error
    return (weight @ error.square() - mean.square()).sum() / 2 + mean.sum().square() / 2


def gradients(a, ste, order=24):
    v, w = a.v.clone().requires_grad_(), a.w.clone().requires_grad_()
    loss = loss_by_quadrature(a._replace(v=v, w=w), ste, order)
    return loss.item(), *torch.autograd.grad(loss, (v, w))


# rows m, inputs n, theta, |w|
MODELS = [(1, 2, 1.0, 1.0), (3, 2, 1.9, 0.7), (2, 4, 1.2, 1.5), (5, 4, 2.5, 1.0)]
SAMPLES = 2_000_000


@pytest.fixture(params=range(len(MODELS)), ids=str, scope="module")
def instance(request):
    return model(*MODELS[request.param], seed=request.param)


@pytest.mark.parametrize("ste", ["identity", "relu", "clipped_relu"])
def test_sampled_coarse_gradients_have_the_mean_of_the_closed_form(instance, ste):
    expected = CLOSED_FORMS[ste](instance)
    mean, error = sampled_mean(instance, ste, SAMPLES, seed=7)
    assert ((mean - expected) / error).abs().max() < 5
    assert ((mean - 1.03 * expected) / error).abs().max() > 5, "a formula that is 3 % off must be told apart"


@pytest.mark.parametrize("ste", F.ste_names())
def test_coarse_gradients_by_quadrature_match_the_closed_form(instance, ste):
    loss, gradient_of_v, gradient_of_w = gradients(instance, ste, order=64)
    expected = CLOSED_FORMS[ste](instance)
    assert loss == pytest.approx(population_loss(instance), rel=1e-9)
    torch.testing.assert_close(gradient_of_v, gradient_v(instance), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient_of_w, expected, rtol=0, atol=1e-6)
    wrong = [form(instance) for name, form in CLOSED_FORMS.items() if name != ste]
    assert min((gradient_of_w - other).norm() for other in wrong) > 1e-3, "the closed forms must differ here"


# The spurious minimum


def spurious_minimum():
    """theta = pi and v = J^-1 (1 1^T - I) v*, J = I + 1 1^T: a local minimum that is not global."""
    v_star = torch.tensor([1.3, -0.7, 0.8, -0.5, 0.9], dtype=torch.float64)
    w_star = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    v = 2 * v_star.sum() / (len(v_star) + 1) - v_star
    return Model(v, -w_star, v_star, w_star)


def descend(ste, rate=0.1, steps=300):
    """Coarse gradient descent from 1e-3 beside the spurious minimum: losses, norms |w|, the last point."""
    start = spurious_minimum()
    noise = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = start._replace(w=start.w + 1e-3 * noise)
    losses, norms = [], []
    for _ in range(steps):
        loss, gradient_of_v, gradient_of_w = gradients(a, ste)
        losses.append(loss)
        norms.append(float(a.w.norm()))
        a = a._replace(v=a.v - rate * gradient_of_v, w=a.w - rate * gradient_of_w)
    return numpy.array(losses), numpy.array(norms), a


def test_identity_is_repelled_by_the_spurious_minimum():
    minimum = spurious_minimum()
    rows, total = len(minimum.v), float(minimum.v_star.sum())
    _, gradient_of_v, gradient_of_w = gradients(minimum, "identity")
    residual = 2 * (rows - 1) * total**2 / (ROOT_TWO_PI * (rows + 1) ** 2)
    assert gradient_of_v.norm() < 1e-9
    assert float(gradient_of_w.norm()) == pytest.approx(residual, rel=1e-6)
    losses, norms, _ = descend("identity")
    assert losses.max() > 5 * losses[0]
    assert norms.min() < 0.1


@pytest.mark.parametrize("ste", [name for name in F.ste_names() if name != "identity"])
def test_an_ste_that_vanishes_on_negatives_stays_at_the_spurious_minimum(ste):
    minimum = spurious_minimum()
    _, gradient_of_v, gradient_of_w = gradients(minimum, ste)
    assert gradient_of_v.norm() < 1e-9
    assert gradient_of_w.norm() < 1e-9
    losses, _, last = descend(ste)
    assert numpy.diff(losses).max() < 1e-8  # descent, up to chatter across the end point theta = pi
    assert losses[-1] == pytest.approx(population_loss(minimum), abs=1e-6)
    assert (last.v - minimum.v).norm() < 1e-3
    assert angle(last)[0] > math.pi - 1e-3


# BCGD's descent


def quadratics(count, n, seed=0):
    """f_c(w) = w^T A_c w / 2 - b_c^T w with the largest eigenvalue of every A_c equal to 1."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
    a = root @ root.mT
    a /= torch.linalg.eigvalsh(a)[:, -1, None, None]
    return a, torch.randn(count, n, generator=generator, dtype=torch.float64)


def bcgd_path(bits, blend, rate, steps=200, count=200, n=12):
    """Losses [steps + 1, count] and squared moves [steps, count]; each row of w is a problem of its own."""
    a, b = quadratics(count, n)
    w = torch.nn.Parameter(
        torch.randn(count, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    optimizer = BCGD([{"params": [w], "quant_bits": bits, "channel_dim": 0}], lr=rate, blend=blend)
    losses, moves = [], []
    for _ in range(steps + 1):
        product = (a @ w.detach()[..., None])[..., 0]
        losses.append((w.detach() * (product / 2 - b)).sum(1))
        before, w.grad = w.detach().clone(), product - b
        optimizer.step()
        moves.append((w.detach() - before).square().sum(1))
    return torch.stack(losses), torch.stack(moves)[:-1]


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("blend", [1.0, 0.5, 0.1])
def test_bcgd_descends_by_what_the_theorem_says(bits, blend):
    rate = 0.9 * blend  # the theorem asks for rate < blend / Lipschitz constant, here 1
    losses, moves = bcgd_path(bits, blend, rate)
    promised = losses[:-1] - (blend / rate - 1) / 2 * moves
    assert (losses[1:] - promised).max() < 1e-12
    assert (moves > 0).any(), "a path that never moves proves nothing"


@pytest.mark.parametrize("bits", [1, 2])
def test_without_blending_the_loss_rises_again_and_again(bits):
    losses, _ = bcgd_path(bits, blend=0.0, rate=0.09)
    rises = (losses[1:] > losses[:-1] + 1e-9).double().mean()
    assert rises > 0.1
