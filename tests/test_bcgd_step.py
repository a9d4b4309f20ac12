"""The operator bcgd_step_: the oracle, torch.optim.SGD, the exact projection, its promises, its errors."""

import copy

import oracles
import pytest
import torch
import torchqat.functional as F

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PROJECTIONS = [
    (1, "exact"), (1, "lloyd"), (2, "exact"), (2, "lloyd"), (2, "twn"),
    (3, "exact"), (4, "exact"), (4, "lloyd"), (8, "exact"),
]  # fmt: skip
SGD = [
    {},
    dict(weight_decay=0.1),
    dict(momentum=0.9),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    dict(momentum=0.9, nesterov=True, weight_decay=0.1),
]
LISTS = ("params", "grads", "latents", "scales", "momentum_buffers", "steps")


class Case:
    """The lists of a step over tensors of these shapes, and the step."""

    def __init__(
        self, shapes, bits, method="exact", dtype=torch.float32, device="cpu", channel_dim=None, **options
    ):
        self.options = dict(bits=bits, method=method, channel_dim=channel_dim, blend=0.25, **options)
        self.lr = torch.tensor(0.1, dtype=torch.float64)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.latents = [torch.randn(s, dtype=real, device=device) for s in shapes]
        self.scales = [torch.full(self.scale_shape(y), 0.4, dtype=real, device=device) for y in self.latents]
        self.params = [torch.empty_like(y, dtype=dtype) for y in self.latents]
        for w, y, scale in zip(self.params, self.latents, self.scales, strict=True):
            w.copy_(self.along(scale, y) * y.sign())
        self.grads = [torch.randn_like(w) for w in self.params]
        with_momentum = options.get("momentum", 0) != 0
        self.momentum_buffers = [torch.full_like(y, 7.0) for y in self.latents] if with_momentum else []
        self.steps = [torch.zeros((), device=device) for _ in self.latents] if with_momentum else []

    def scale_shape(self, y):
        return () if self.options["channel_dim"] is None else (y.shape[self.options["channel_dim"]],)

    def along(self, scale, y):
        shape = [1] * y.dim()
        if self.options["channel_dim"] is not None:
            shape[self.options["channel_dim"]] = -1
        return scale.reshape(shape)

    def slices(self, t):
        """What shares a scale."""
        return [t] if self.options["channel_dim"] is None else t.unbind(self.options["channel_dim"])

    def lists(self):
        return [getattr(self, name) for name in LISTS]

    def tensors(self):
        return [t for tensors in self.lists() for t in tensors]

    def step(self, **more):
        F.bcgd_step_(*self.lists(), lr=self.lr, **(self.options | more))

    def copy(self):
        return copy.deepcopy(self)


def assert_bitwise(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def check_step(case, divisor=1.0, **more):
    """One step, each part of it against the oracle for what the step before it left."""
    before = case.copy()
    case.step(**more)
    options = {k: v for k, v in case.options.items() if k not in ("bits", "method", "channel_dim")}
    tolerance = (
        dict(rtol=1e-12, atol=1e-12) if case.latents[0].dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    )
    for i, y in enumerate(case.latents):
        first = bool(before.steps) and before.steps[i] == 0
        buffer = before.momentum_buffers[i] if before.steps else None
        latent, buffer = oracles.bcgd_latent(
            before.params[i], before.grads[i], before.latents[i], buffer, first,
            lr=case.lr.item(), grad_scale=divisor, **options,
        )  # fmt: skip
        torch.testing.assert_close(y, latent, **tolerance)
        if before.steps:
            torch.testing.assert_close(case.momentum_buffers[i], buffer, **tolerance)
            assert case.steps[i] == before.steps[i] + 1
        check_projection(case, i, before.scales[i])


def check_projection(case, i, scale_before):
    bits, method = case.options["bits"], case.options["method"]
    for y, w, scale, was in zip(
        case.slices(case.latents[i]),
        case.slices(case.params[i]),
        case.scales[i].reshape(-1),
        scale_before.reshape(-1),
        strict=True,
    ):
        expected, at, levels = oracles.bcgd_projection(y, was, bits, method)
        torch.testing.assert_close(
            scale.double(), expected.double(), rtol=1e-6 if y.dtype == torch.float32 else 1e-12, atol=0
        )
        assert_bitwise([w], [(scale * levels(scale if at is None else at)).to(w.dtype)])


# ---- the step against the oracle ----

SHAPES = [(3, 4, 5), (7,), (), (0, 3), (1,), (40, 5, 5, 5), (2, 8200)]


@pytest.mark.parametrize(
    "dtype, sgd", [(torch.float32, sgd) for sgd in SGD] + [(dtype, SGD[3]) for dtype in DTYPES]
)
@pytest.mark.parametrize("bits, method", PROJECTIONS)
def test_steps_are_the_oracles(bits, method, sgd, dtype, device):
    case = Case(SHAPES, bits, method, dtype, device, **sgd)
    for _ in range(2):
        check_step(case)
        case.grads = [torch.randn_like(g) for g in case.grads]


@pytest.mark.parametrize("channel_dim", [0, 1, -1, -3])
@pytest.mark.parametrize("bits, method", PROJECTIONS)
def test_scales_per_channel(bits, method, channel_dim, device):
    shapes = [(6, 4, 5), (1, 3, 2), (3, 1, 600), (2, 0, 3), (0, 2, 3)]
    case = Case(shapes, bits, method, torch.float32, device, channel_dim, momentum=0.9)
    for _ in range(2):
        check_step(case)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_channels_of_long_and_of_many_runs(bits, device):
    check_step(Case([(3, 2, 3000), (40, 2, 700)], bits, channel_dim=1, device=device))


def test_one_scale_per_channel_is_one_tensor_per_channel(device):
    whole = Case([(5, 30)], 4, channel_dim=0, device=device)
    parts = Case([(30,)] * 5, 4, device=device)
    for name in ("params", "grads", "latents", "scales"):
        for part, of_whole in zip(getattr(parts, name), getattr(whole, name)[0].unbind(0), strict=True):
            part.copy_(of_whole)
    whole.step()
    parts.step()
    for name in ("params", "latents", "scales"):
        assert_bitwise([torch.stack(getattr(parts, name))], getattr(whole, name))


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t):
    return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channel_dim", [None, 0, 1, 3])
@pytest.mark.parametrize("layout", [transposed, sliced, channels_last])
@pytest.mark.parametrize(
    "which", [("params",), ("grads",), ("latents", "momentum_buffers"), LISTS[:3] + LISTS[4:5]]
)
def test_any_layout_gives_the_same(which, layout, channel_dim, device):
    case = Case([(4, 3, 5, 6)], 4, channel_dim=channel_dim, device=device, momentum=0.9)
    expected = case.copy()
    for name in which:
        setattr(case, name, [layout(t) for t in getattr(case, name)])
    strides = [t.stride() for t in case.tensors()]
    case.step()
    expected.step()
    assert [t.stride() for t in case.tensors()] == strides
    # Sums in another order of memory differ in rounding.
    for actual, t in zip(case.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(actual, t, rtol=1e-5, atol=1e-6)


def test_a_scale_may_be_a_slice(device):
    case = Case([(4, 9)], 2, channel_dim=0, device=device)
    case.scales = [torch.ones(8, device=device)[::2]]
    check_step(case)
    assert case.scales[0].stride() == (2,)


def test_dtypes_may_be_mixed(device):
    cases = [Case([(30,), (2, 3)], 4, dtype=dtype, device=device, momentum=0.9) for dtype in DTYPES]
    mixed = cases[0].copy()
    for name in LISTS:
        setattr(mixed, name, [getattr(c, name)[i].clone() for i in range(2) for c in cases])
    mixed.step()
    for case in cases:
        case.step()
    for name in LISTS:
        assert_bitwise(getattr(mixed, name), [getattr(c, name)[i] for i in range(2) for c in cases])


def test_empty_lists_do_nothing():
    F.bcgd_step_([], [], [], [], [], [], lr=torch.tensor(0.1), bits=1)


# ---- torch.optim.SGD ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sgd", SGD)
def test_without_blend_the_latents_are_those_of_sgd(sgd, dtype, device):
    case = Case([(50, 30), (7,)], 1, dtype=dtype, device=device, **sgd)
    params = [torch.nn.Parameter(y.clone()) for y in case.latents]
    sgd_optimizer = torch.optim.SGD(params, lr=0.1, **sgd)
    for _ in range(20):
        case.grads = [torch.randn_like(g) for g in case.grads]
        for p, g in zip(params, case.grads, strict=True):
            p.grad = g.clone()
        sgd_optimizer.step()
        case.step(blend=0.0)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for y, p in zip(case.latents, params, strict=True):
        torch.testing.assert_close(y, p.detach(), rtol=tolerance, atol=tolerance)


# ---- gradient scaler, learning rate ----


@pytest.mark.parametrize("sgd", SGD)
def test_a_skipped_step_changes_nothing(sgd, device):
    """On the first step too: the one after it is then the first, whose buffer is not dampened."""
    case = Case([(50, 30), (7,)], 2, device=device, **sgd)
    case.params[0] = transposed(case.params[0])
    before = case.copy()
    case.step(found_inf=torch.ones((), device=device))
    assert_bitwise(case.tensors(), before.tensors())
    check_step(case, found_inf=torch.zeros((), device=device))
    before = case.copy()
    case.step(found_inf=torch.ones(1, device=device))
    assert_bitwise(case.tensors(), before.tensors())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_gradient_scale_divides(maximize, dtype, device):
    case = Case([(50, 30)], 2, dtype=dtype, device=device, momentum=0.9, maximize=maximize)
    check_step(case, divisor=3.0, grad_scale=torch.tensor([3.0], device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_rate_may_be_on_either_device(dtype, device):
    case = Case([(50, 30)], 2, device=device)
    here = case.copy()
    case.lr = torch.tensor(0.125, dtype=dtype)
    here.lr = torch.tensor([0.125], dtype=dtype, device=device)
    check_step(case)
    here.step()
    assert_bitwise(here.tensors(), case.tensors())


# ---- values ----


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("bits, method", PROJECTIONS)
def test_what_is_not_finite_spoils_its_own_scale_only(bits, method, value, device):
    case = Case([(3, 40)], bits, method, device=device, channel_dim=0)
    case.grads[0][1, 7] = value
    case.step()
    assert case.scales[0].isnan().tolist() == [False, True, False]
    assert case.params[0].isnan().all(dim=1).tolist() == [False, True, False]
    assert case.params[0].isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("bits, method", PROJECTIONS)
def test_zeros_have_scale_zero(bits, method, device):
    case = Case([(30,)], bits, method, device=device)
    for t in case.latents + case.params + case.scales + case.grads:
        t.zero_()
    case.step()
    assert case.scales[0] == 0 and not case.params[0].any()


@pytest.mark.parametrize("before", [0.0, -1.0, torch.nan, 1e30])
def test_without_a_scale_to_start_from_the_papers_step_is_the_scale(before, device):
    case = Case([(30,)], 4, device=device)
    case.scales[0].fill_(before)
    case.step()
    torch.testing.assert_close(case.scales[0], 2 * case.latents[0].abs().max() / 15)


@pytest.mark.parametrize("bits, method", [p for p in PROJECTIONS if p[1] == "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_are_levels_of_their_scale(bits, method, dtype, device):
    case = Case([(40, 9)], bits, method, dtype, device, channel_dim=0)
    case.step()
    level = F.weight_codes(case.latents[0], case.scales[0], bits, channel_dim=0).to(case.scales[0].dtype)
    assert_bitwise(case.params, [(case.scales[0][:, None] * level).to(dtype)])


def ternary_difficulties():
    k = torch.arange(50000, dtype=torch.float64)
    flat = (k + 1).sqrt() - k.sqrt()  # every number of kept weights is about as good
    outlier = torch.randn(50000, dtype=torch.float64)
    outlier[3] = 1e6
    clusters = 2.0 ** torch.randint(20, (50000,)) * (1 + 1e-4 * torch.randn(50000, dtype=torch.float64))
    return [flat, outlier, clusters, torch.ones(50000), torch.rand(50000) ** -0.5, torch.randn(50000).exp()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("i", range(6))
def test_the_ternary_scale_is_optimal(i, dtype, device):
    y = ternary_difficulties()[i].to(dtype)
    case = Case([y.shape], 2, dtype=dtype, device=device)
    case.latents = [y.to(device)]
    case.lr.zero_()
    case.step(blend=0.0)

    def score(scale):
        q = oracles.nearest_level(y, scale.cpu().to(dtype), 2).double()
        return (y.double() * q).sum() / (q * q).sum().sqrt()

    torch.testing.assert_close(
        score(case.scales[0]),
        score(oracles.exact_scale(y, 2)),
        rtol=1e-12 if dtype == torch.float64 else 1e-9,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("i", range(7))
def test_the_ternary_scale_does_not_show_the_one_before(i, dtype, device):
    huge = torch.tensor([3.4e38] * 3 + [1.03e38] * 10 + [1e38] + [0.0] * 2034)
    y = [*ternary_difficulties(), huge][i].to(dtype)
    best = oracles.exact_scale(y, 2)

    def score(scale):
        q = oracles.nearest_level(y, scale.cpu().to(dtype), 2).double()
        return (y.double() * q).sum() / (q * q).sum().sqrt()

    near = [best.item() * share for share in (1, 1.004, 0.9, 1 / 3, 50)]
    for before in [*near, 0.0, -1.0, torch.nan, torch.inf, 1e-45, 1.14e38, 3.3e38]:
        case = Case([y.shape], 2, dtype=dtype, device=device)
        case.latents, case.scales = [y.to(device)], [torch.tensor(before, dtype=dtype, device=device)]
        case.lr.zero_()
        case.step(blend=0.0)
        rtol = 1e-12 if dtype == torch.float64 else 1e-9
        torch.testing.assert_close(score(case.scales[0]), score(best), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_step_too_large_for_the_caches_does_the_same(bits, dtype, device):
    large = Case([(64, 70_003)], bits, dtype=dtype, device=device, channel_dim=0, momentum=0.9)
    alone = large.copy()
    large.step()
    for channel in range(64):
        one = [[t if t.dim() == 0 else t[channel : channel + 1] for t in ts] for ts in alone.lists()[:5]]
        F.bcgd_step_(*one, [torch.zeros((), device=device)], lr=alone.lr, **alone.options)
    assert_bitwise(large.tensors()[:5], alone.tensors()[:5])


# ---- three bits and more follow the exact projection ----


def projection_error(y, scale, bits):
    q = oracles.nearest_level(y.double(), scale.double(), bits)
    return (y.double() - scale.double() * q).square().sum()


@pytest.mark.parametrize("bits, mean, worst", [(3, 0.01, 0.05), (4, 0.01, 0.05), (8, 0.05, 0.1)])
@pytest.mark.parametrize("rate", [0.05, 0.005])
def test_the_warm_start_follows_the_optimum(bits, mean, worst, rate):
    """How far the projection's error is above that of the exact one, on the way down a noisy quadratic."""
    case = Case([(2048,)], bits, momentum=0.9, weight_decay=0.01)
    curvature, target = torch.rand(2048) * 0.9 + 0.1, torch.randn(2048)
    case.scales = [oracles.exact_scale(case.latents[0], bits).float()]
    case.lr.fill_(rate)
    excess = []
    for i in range(300):
        case.grads = [curvature * (case.params[0] - target) + 0.3 * torch.randn(2048)]
        case.step(blend=1e-5)
        if i % 10 == 9:
            y = case.latents[0]
            best = projection_error(y, oracles.exact_scale(y, bits), bits)
            excess.append((projection_error(y, case.scales[0], bits) / best - 1).item())
    assert sum(excess) / len(excess) < mean and max(excess) < worst


# ---- determinism ----


@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("bits, method", PROJECTIONS)
def test_runs_and_numbers_of_threads_agree_to_the_bit(bits, method, channel_dim):
    case = Case([(3, 70001), (300, 40), (5,)], bits, method, channel_dim=channel_dim, momentum=0.9)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        run = case.copy()
        run.step()
        run.step()
        results.append(run.tensors())
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert_bitwise(result, results[0])


# ---- PyTorch ----


def test_versions_are_bumped():
    case = Case([(5,)], 1, momentum=0.9)
    before = [t._version for t in case.tensors()]
    case.step()
    changed = [now._version > was for now, was in zip(case.tensors(), before, strict=True)]
    assert changed == [True, False, True, True, True, True]


def test_a_parameter_that_requires_grad_needs_no_grad():
    case = Case([(5,), (3,)], 1)
    case.params[1].requires_grad_()
    with pytest.raises(
        ValueError, match=r"bcgd_step_: changes params\[1\], which requires grad; .*torch.no_grad"
    ):
        case.step()
    with torch.no_grad():
        case.step()
    with torch.inference_mode():
        case.step()


def test_vmap_is_refused():
    case = Case([(5,)], 1)
    with pytest.raises(
        ValueError, match="bcgd_step_: works in place on lists of tensors and cannot be batched"
    ):
        torch.vmap(lambda w: F.bcgd_step_([w], *case.lists()[1:], lr=case.lr, bits=1))(torch.randn(2, 5))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_compiled_with_what_comes_before_and_after(bits, backend):
    def train(case):
        case.grads = [g * 2 for g in case.grads]
        case.step()
        return [w.sum() for w in case.params]

    torch._dynamo.reset()
    case = Case([(30, 4), (7,)], bits, momentum=0.9)
    compiled = case.copy()
    expected = train(case)
    actual = torch.compile(train, fullgraph=True, backend=backend)(compiled)
    torch.testing.assert_close(actual, expected)
    assert_bitwise(compiled.tensors(), case.tensors())


# ---- errors ----


def shorter(name):
    return lambda c: getattr(c, name).pop()


def replaced(name, change, i=1):
    def edit(case):
        tensors = getattr(case, name)
        tensors[i] = change(tensors[i])

    return edit


def options(**more):
    return lambda c: c.options.update(more)


def twice(case):
    for tensors in case.lists():
        tensors[1] = tensors[0]


def aliased(case):
    case.latents[1] = case.params[1]


def partly_aliased(case):
    """The latents begin at the last element of the parameter."""
    memory = torch.randn(5)
    case.params[1], case.latents[1] = memory[:3], memory[2:]


def interleaved(case):
    """A parameter with gaps, and latents that begin where it begins."""
    memory = torch.randn(40)
    case.params[0], case.latents[0] = memory[::2].view(4, 5), memory[:20].view(4, 5)


def without_momentum(case):
    case.options["momentum"] = 0.0


def attribute(name, value):
    return lambda c: setattr(c, name, value)


ERRORS = [
    (shorter("grads"), ValueError, "grads must have 2 tensors, one for each of params, got 1"),
    (shorter("latents"), ValueError, "latents must have 2 tensors"),
    (shorter("scales"), ValueError, "scales must have 2 tensors"),
    (shorter("momentum_buffers"), ValueError, "momentum_buffers must have 2 tensors"),
    (shorter("steps"), ValueError, "steps must have 2 tensors"),
    (without_momentum, ValueError, "momentum_buffers must have 0 tensors, as momentum is 0, got 2"),
    (replaced("params", lambda t: t.int()), TypeError, r"params\[1\] must be float64, .*, got Int"),
    (replaced("params", lambda t: t.to(torch.complex64)), TypeError,
     r"params\[1\] must be float64, .*, got ComplexFloat"),
    (replaced("params", lambda t: t.to_sparse()), TypeError,
     r"params\[1\] must be a dense tensor, got layout Sparse"),
    (replaced("params", lambda t: t[:1].expand(3)), ValueError, r"params\[1\] must not overlap itself"),
    (replaced("params", lambda t: t.to("meta")), ValueError,
     r"grads\[1\] must be on|params\[1\] must be on the device"),
    (replaced("params", lambda t: t[None].to_sparse_csr()), TypeError, r"params\[1\] must be a dense tensor"),
    (replaced("grads", lambda t: t.to_sparse()), TypeError,
     r"grads\[1\] must be a dense tensor, got layout Sparse"),
    (replaced("grads", lambda t: t.double()), TypeError, r"grads\[1\] must be Float, got Double"),
    (replaced("grads", lambda t: t[:2]), ValueError,
     r"grads\[1\] must have the shape of params\[1\], \[3\], got \[2\]"),
    (replaced("grads", lambda t: t.to("meta")), ValueError,
     r"grads\[1\] must be on the device of params\[0\], cpu, got meta"),
    (replaced("latents", lambda t: t.bfloat16()), TypeError, r"latents\[1\] must be Float, got BFloat16"),
    (replaced("latents", lambda t: t[:2]), ValueError, r"latents\[1\] must have the shape of params\[1\]"),
    (replaced("momentum_buffers", lambda t: t.double()), TypeError,
     r"momentum_buffers\[1\] must be Float, got Double"),
    (replaced("momentum_buffers", lambda t: t[:2]), ValueError, r"momentum_buffers\[1\] must have the shape"),
    (replaced("scales", lambda t: t.double()), TypeError, r"scales\[1\] must be Float, got Double"),
    (replaced("scales", lambda t: t[None]), ValueError, r"scales\[1\] must be 0-dim .*, got shape \[1\]"),
    (replaced("steps", lambda t: t.double()), TypeError, r"steps\[1\] must be Float, got Double"),
    (replaced("steps", lambda t: t[None]), ValueError, r"steps\[1\] must be 0-dim, got shape \[1\]"),
    (twice, ValueError,
     r"(\w+)\[0\] and \1\[1\], which the step writes, must not share memory; is a parameter "),
    (aliased, ValueError, r"params\[1\] and latents\[1\], .* must not share memory"),
    (partly_aliased, ValueError, r"params\[1\] and latents\[1\], .* must not share memory"),
    (interleaved, ValueError, r"params\[0\] and latents\[0\], .* must not share memory"),
    (options(bits=0), ValueError, "bits must be in 1..8, got 0"),
    (options(bits=9), ValueError, "bits must be in 1..8, got 9"),
    (options(method="best"), ValueError, "unknown method 'best'; choose one of exact, lloyd, twn"),
    (options(method="twn", bits=3), ValueError, "method 'twn' is ternary, so bits must be 2, got 3"),
    (options(channel_dim=0), ValueError,
     r"scales\[0\] must have shape \[4\], one for each channel of dimension 0"),
    (options(channel_dim=1), ValueError, r"scales\[0\] must have shape \[5\]"),
    (options(channel_dim=2), ValueError,
     r"channel_dim must be a dimension of params\[0\], .* \[4, 5\], got 2"),
    (options(momentum=-0.1), ValueError, "momentum must be at least 0, got -0.1"),
    (options(weight_decay=-0.1), ValueError, "weight_decay must be at least 0, got -0.1"),
    (options(blend=-0.1), ValueError, r"blend must be in \[0, 1\], got -0.1"),
    (options(blend=1.1), ValueError, r"blend must be in \[0, 1\], got 1.1"),
    (options(blend=float("nan")), ValueError, r"blend must be in \[0, 1\], got nan"),
    (options(nesterov=True, dampening=0.1), ValueError, "nesterov needs a momentum and no dampening"),
    (options(found_inf=torch.zeros(2)), ValueError, r"found_inf must have one element, got shape \[2\]"),
    (options(grad_scale=torch.ones((), dtype=torch.int)), TypeError,
     "grad_scale must be a dense float tensor, got Int"),
    (options(grad_scale=torch.ones((), device="meta")), ValueError,
     "grad_scale must be on the device of params, cpu, got meta"),
    (attribute("lr", torch.ones((), device="meta")), ValueError,
     "lr must be on the device of params, cpu, got meta"),
    (attribute("lr", torch.tensor(-0.1)), ValueError, "lr must be at least 0, got -0.1"),
    (attribute("lr", torch.tensor([0.1, 0.1])), ValueError, r"lr must have one element, got shape \[2\]"),
    (attribute("lr", torch.tensor(1)), TypeError, "lr must be a dense float tensor, got Long"),
]  # fmt: skip


@pytest.mark.parametrize("edit, error, message", ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(edit, error, message):
    case = Case([(4, 5), (3,)], 2, momentum=0.9)
    edit(case)
    with pytest.raises(error, match=f"bcgd_step_: {message}"):
        case.step()


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov needs a momentum and no dampening, got momentum = 0"):
        Case([(4,)], 1, nesterov=True).step()


def test_columns_of_one_matrix_step_as_tensors_of_their_own():
    """They lie between one another in memory without sharing any."""
    torch.manual_seed(0)
    alone = Case([(6, 3), (6, 4)], 4, momentum=0.9)
    joined = copy.deepcopy(alone)
    joined.params = list(torch.cat(alone.params, 1).split([3, 4], 1))
    for case in (alone, joined):
        case.step()
    for a, b in zip(alone.params, joined.params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_large_latents_have_a_scale(bits, device):
    """Their squares and sums are far beyond float32."""
    case = Case([(3000,)], bits, device=device)
    case.options["blend"] = 0.0
    case.latents[0].uniform_(1e34, 2e34)
    scale = F.quantize_weight(case.latents[0], bits)[1]
    case.scales[0].copy_(scale)
    case.params[0].copy_(scale)
    case.step()
    torch.testing.assert_close(case.scales[0], scale, rtol=0.05, atol=0)
    assert case.params[0].isfinite().all()
