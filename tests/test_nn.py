"""nn.StaircaseReLU: where its step size starts, how it is bounded, what its gradient goes through. The
feature-affinity losses: that they are what they say, statistics included, and draw their own probes."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from small_nets import assert_same
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torchqat.nn import OPTIMAL_ALPHA, FastFeatureAffinityLoss, FeatureAffinityLoss, StaircaseReLU


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


# ---- the feature-affinity losses ----


def features(*shape, seed=0, dtype=torch.float32):
    """Features after a ReLU, one pixel all zero."""
    f = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()
    f.flatten(2)[0, :, 0] = 0
    return f.to(dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("norm", ["l1", "fro"])
def test_feature_affinity_is_that_of_the_definition(norm, reduction, device):
    student, teacher = features(3, 4, 5, 6).to(device), features(3, 7, 5, 6, seed=1).to(device)
    loss = FeatureAffinityLoss(norm, reduction)(student.requires_grad_(), teacher)
    torch.testing.assert_close(loss, oracles.feature_affinity(student, teacher, norm, reduction).float())
    loss.backward()
    assert student.grad.abs().sum() > 0 and student.grad[0, :, 0, 0].eq(0).all()


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("norm", ["l1", "fro"])
def test_the_fast_loss_is_that_of_its_probes(norm, distribution, device):
    student, teacher = features(2, 4, 3, 5).to(device), features(2, 6, 3, 5, seed=1).to(device)
    fast = FastFeatureAffinityLoss(4, norm=norm, distribution=distribution)
    for dtype in (torch.float32, torch.float64):  # one wide input is enough
        v = copy.deepcopy(fast).draw(15, device, dtype)
        assert v.dtype == dtype and v.shape == (15, 4)
        assert (v.abs() == 1).all() == (distribution == "rademacher")
        want = oracles.fast_feature_affinity(student, teacher, v, norm)
        torch.testing.assert_close(fast(student.to(dtype), teacher), want.to(dtype))


def draws_of(losses, batch, probes=1, **options):
    """N^2 times the loss of so many draws of so many probes."""
    student, teacher = features(batch, 3, 4, 2, dtype=torch.float64), features(batch, 5, 4, 2, seed=1)
    fast = FastFeatureAffinityLoss(probes, **options)
    drawn = torch.stack([fast(student, teacher) for _ in range(losses)]) * 8**2
    return drawn, oracles.affinity_difference(student, teacher)


def assert_mean_and_variance(drawn, mean, variance):
    """Within five standard errors, as the draws themselves have it."""
    n, centred = len(drawn), drawn - drawn.mean()
    assert abs(drawn.mean() - mean) < 5 * (variance / n) ** 0.5
    assert abs(drawn.var() - variance) < 5 * ((centred**4).mean() / n) ** 0.5
    assert 5 * ((centred**4).mean() / n) ** 0.5 < 0.3 * variance  # else it would show nothing


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_squared_loss_has_the_mean_and_the_variance_it_says(distribution):
    drawn, s = draws_of(6000, batch=2, norm="fro", distribution=distribution)
    m = (s @ s).mean(0)  # the images share the probes
    variance = 2 * (m.square().sum() - (distribution == "rademacher") * m.diagonal().square().sum())
    assert_mean_and_variance(drawn, s.square().sum((1, 2)).mean(), variance)
    assert m.diagonal().square().sum() > 0.3 * m.square().sum()  # so that the two differ


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_the_squared_loss_stays_in_the_tail_bound(t):
    drawn, s = draws_of(4000, batch=1, norm="fro")
    m = s[0] @ s[0]
    spread, top = m.norm() * t**0.5, torch.linalg.matrix_norm(m, 2)
    above = (drawn >= m.trace() + 2 * spread + 2 * top * t).double().mean()
    below = (drawn <= m.trace() - 2 * spread).double().mean()
    slack = 5 * math.exp(-t / 2) / 4000**0.5
    assert above <= math.exp(-t) + slack and below <= math.exp(-t) + slack
    assert (drawn >= m.trace() + spread).double().mean() > 0.02  # draws do reach that far


@pytest.mark.parametrize("k, delta", [(1, 1.0), (1, 1.4), (8, 0.7), (8, 1.0), (32, 0.4)])
def test_the_squared_loss_stays_in_the_short_tail_bound(k, delta):
    drawn, s = draws_of(2000, batch=2, norm="fro", probes=k)
    exact = s.square().sum((1, 2)).mean()
    off = ((drawn - exact).abs() >= delta * exact).double().mean()
    bound = 2 * math.exp(-k * (delta**2 / 4 - delta**3 / 6))
    assert off <= bound
    # The worst S there can be has rank 1: its loss is a chi-squared number of k degrees.
    worst = torch.randn(20000, k, generator=torch.Generator().manual_seed(k)).square().mean(1)
    assert ((worst - 1).abs() >= delta).double().mean() <= bound


def test_the_l1_loss_estimates_the_2_1_norm_and_not_the_entrywise_one():
    drawn, s = draws_of(6000, batch=1, norm="l1")
    s = s[0]
    rows = s.norm(dim=1)
    outer = torch.outer(rows, rows)
    cosines = (s @ s.mT / outer).nan_to_num().clamp(-1, 1)  # a pixel that is zero in both has a zero row
    shape = (1 - cosines.square()).sqrt() + cosines * cosines.asin() - 1
    assert_mean_and_variance(drawn, (2 / math.pi) ** 0.5 * rows.sum(), 2 / math.pi * (outer * shape).sum())
    entrywise = s.abs().sum()
    assert abs(drawn.mean() - entrywise) > 0.3 * entrywise
    assert rows.sum() <= entrywise <= 8**0.5 * rows.sum()
    drawn, _ = draws_of(1000, batch=1, norm="l1", distribution="rademacher")
    assert 0.5**0.5 * rows.sum() < drawn.mean() < rows.sum()


def test_more_probes_have_less_variance():
    student, teacher = features(1, 3, 4, 4), features(1, 5, 4, 4, seed=1)
    spread = {}
    for k in (1, 16):
        fast = FastFeatureAffinityLoss(k, norm="fro")
        spread[k] = torch.stack([fast(student, teacher) for _ in range(1500)]).var().item()
    assert spread[1] / spread[16] == pytest.approx(16, rel=0.4)


def test_probes_are_new_at_each_call_and_touch_no_global_generator():
    student, teacher = features(2, 4, 3, 3), features(2, 4, 3, 3, seed=1)
    before = torch.get_rng_state()
    first, second = FastFeatureAffinityLoss(), FastFeatureAffinityLoss()
    drawn = [first(student, teacher).item() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn)) == 3
    torch.manual_seed(7)
    assert [second(student, teacher).item() for _ in range(3)] == drawn  # its seed is its own:
    zero = torch.Generator().manual_seed(0)
    assert torch.equal(FastFeatureAffinityLoss().draw(9, "cpu"), torch.randn(9, 15, generator=zero))


def test_a_generator_that_is_given_is_used_and_shared():
    generator = torch.Generator().manual_seed(3)
    want = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    fast = FastFeatureAffinityLoss(2, generator)
    assert torch.equal(fast.draw(9, "cpu"), want)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


@pytest.mark.parametrize(
    "way",
    [
        lambda fast: copy.deepcopy(fast),
        lambda fast: pickle.loads(pickle.dumps(fast)),
        lambda fast: loaded(FastFeatureAffinityLoss(3), fast.state_dict()),
        lambda fast: loaded(FastFeatureAffinityLoss(3), saved_and_loaded(fast.state_dict())),
    ],
    ids=["deepcopy", "pickle", "state", "file"],
)
def test_the_next_probes_survive(way):
    fast = FastFeatureAffinityLoss(3)
    fast.draw(5, "cpu")
    twin = way(fast)
    drawn = [fast.draw(5, "cpu") for _ in range(2)]
    assert all(torch.equal(twin.draw(5, "cpu"), v) for v in drawn)  # and do not share


def loaded(module, state):
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize(
    "state, got",
    [
        (torch.zeros(16, dtype=torch.uint8), "16 values: Expected .* size"),
        (torch.zeros_like(torch.Generator().get_state()), "[0-9]+ values: Invalid mt19937 state"),
        (3, "3"),
    ],
)
def test_a_state_of_another_generator_is_refused(state, got):
    with pytest.raises(RuntimeError, match=f"the state must be of a generator on cpu, got {got}"):
        FastFeatureAffinityLoss().load_state_dict({"_extra_state": state})


@pytest.mark.parametrize("make", [FeatureAffinityLoss, FastFeatureAffinityLoss])
def test_affinity_losses_compile(make):
    student, teacher = features(2, 4, 3, 3).requires_grad_(), features(2, 4, 3, 3, seed=1)
    eager = make()
    compiled = torch.compile(make(), backend="aot_eager", fullgraph=make is FeatureAffinityLoss)
    for _ in range(2):
        want, got = eager(student, teacher), compiled(student, teacher)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
        torch.testing.assert_close(*gradients)


def test_what_compile_says_of_a_fast_loss():
    compiled = torch.compile(FastFeatureAffinityLoss(), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="draws from a generator of its own"):
        compiled(features(2, 4, 3, 3), features(2, 4, 3, 3))


def test_affinity_losses_print():
    assert repr(FeatureAffinityLoss()) == "FeatureAffinityLoss(norm='l1', reduction='mean', eps=1e-05)"
    assert repr(FastFeatureAffinityLoss(3, norm="fro")) == (
        "FastFeatureAffinityLoss(probes=3, norm='fro', reduction='mean', eps=1e-05, distribution='gaussian')"
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(norm="l2"), ValueError, "l2"),
        (dict(reduction="none"), ValueError, "none"),
        (dict(eps="0"), TypeError, "eps must be of type float, got str"),
        (dict(probes=0), ValueError, "FastFeatureAffinityLoss: probes must be at least 1, got 0"),
        (dict(probes=2.0), TypeError, "FastFeatureAffinityLoss: probes must be an int, got 2.0"),
        (dict(probes=True), TypeError, "probes must be an int, got True"),
        (dict(generator=3), TypeError, "generator must be a torch.Generator, got 3"),
        (
            dict(distribution="cauchy"),
            ValueError,
            "unknown distribution 'cauchy'; choose one of gaussian, ra",
        ),
    ],
)
def test_bad_options_of_affinity_losses_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FastFeatureAffinityLoss(**options)
    if options.keys() <= {"norm", "reduction", "eps"}:
        with pytest.raises(error, match=message):
            FeatureAffinityLoss(**options)


@pytest.mark.parametrize("make", [FeatureAffinityLoss, FastFeatureAffinityLoss])
def test_making_an_affinity_loss_computes_nothing_on_a_default_device(make):
    with NoKernels():
        make()
        with pytest.raises(ValueError, match="norm must be l1 or fro, got l2"):
            make(norm="l2")


class NoKernels(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta, operator
        return result


@pytest.mark.parametrize("make", [FeatureAffinityLoss, FastFeatureAffinityLoss])
@pytest.mark.parametrize(
    "student, teacher, error, message",
    [
        (torch.ones(2, 3), torch.ones(2, 3), ValueError, "student must have shape"),
        (torch.ones(2, 3, 4), torch.ones(1, 3, 4), ValueError, "the batch size of student, 2, got 1"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 5), ValueError, r"spatial shape of student, \[4\], got \[5\]"),
        (torch.ones(2, 0, 4), torch.ones(2, 3, 4), ValueError, "student must have"),
        (torch.ones(2, 3, 0), torch.ones(2, 3, 0), ValueError, "student must have"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta"), ValueError, "on the device of student"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 4, dtype=int),
            TypeError,
            "teacher must be float64, .*, got Long",
        ),
        (
            torch.ones(2, 3, 4, dtype=torch.float8_e4m3fn),
            torch.ones(2, 3, 4),
            TypeError,
            "student must be float64, .*, got Float8",
        ),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 4).to_mkldnn(),
            TypeError,
            "teacher must be a dense tensor, got layout Mkldnn",
        ),
        (None, torch.ones(2, 3, 4), TypeError, "student must be of type Tensor, got None"),
        (torch.ones(2, 3, 4), [], TypeError, "teacher must be of type Tensor, got "),
    ],
)
def test_features_that_do_not_belong_together_are_refused_and_nothing_is_drawn(
    make, student, teacher, error, message
):
    loss = make()
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(error, match=f"feature_affinity_loss: .*{message}"):
        loss(student, teacher)
    assert_same(loss.state_dict(), before)
