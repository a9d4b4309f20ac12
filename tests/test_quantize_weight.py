"""quantize_weight, weight_codes: the optimum by brute force, methods, layouts, compilers, bad input."""

import math
import subprocess
import sys

import oracles
import pytest
import torch
import torchqat.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
METHODS = ["exact", "lloyd", "twn"]
NAN = math.nan
INF = math.inf


def normal(n):
    return torch.randn(n, dtype=torch.float64) * 0.05


# Hard and easy weights: name -> function of their number.
WEIGHTS = {
    "normal": normal,
    "uniform": lambda n: torch.rand(n, dtype=torch.float64) - 0.5,
    "heavy_tails": lambda n: normal(n) / normal(n),
    "log_normal": lambda n: (normal(n) * 60).exp() * normal(n).sign(),
    "ties": lambda n: (normal(n) * 40).round() / 8,
    "all_equal": lambda n: torch.full((n,), -0.3, dtype=torch.float64),
    "two_clusters": lambda n: torch.where(normal(n) > 0, 1.0, 1e-3 + 1e-9 * normal(n)),
    "on_a_grid": lambda n: torch.randint(-7, 8, (n,)).double() * 0.013,
    "one_huge_outlier": lambda n: torch.cat([normal(n - 1) * 0.02, torch.tensor([1e30])]),
    "one_tiny": lambda n: torch.cat([normal(n - 1), torch.tensor([1e-30])]),
    "flat_score": lambda n: torch.arange(1, n + 1).double().sqrt() - torch.arange(n).double().sqrt(),
    "denormal": lambda n: normal(n) * 1e-37,
    "mostly_zero": lambda n: normal(n) * (torch.rand(n) < 0.1),
}


def relative_error(w, q):
    unit = w.double().abs().max().clamp(min=1e-300)
    w, q = w.double() / unit, q.double() / unit
    return ((w - q).square().sum() / w.square().sum().clamp(min=1e-300)).item()


def optimum(w, bits):
    scale = oracles.exact_scale(w, bits)
    return relative_error(w, scale * oracles.nearest_level(w.double(), scale, bits))


def fit(w, bits, **options):
    """What weight_codes and the scale say, in float64: no rounding to the dtype of the weights."""
    _, scale = F.quantize_weight(w, bits, **options)
    return scale.double() * F.weight_codes(w, scale, bits).double()


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ---- the optimum ----


def assert_optimal(w, bits):
    """As good as the best of all breakpoints, but for the rounding of the scale, which costs its square."""
    _, scale = F.quantize_weight(w, bits)
    ulp = torch.nextafter(scale, torch.full_like(scale, INF)) - scale
    rounding = (ulp.double() / scale.double() / 2).item() ** 2 if scale > 0 else 0.0
    best = optimum(w, bits)
    assert relative_error(w, fit(w, bits)) <= best * (1 + 1e-9) + rounding + 1e-14, (w.numel(), best)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_exact_is_the_best_of_all_breakpoints(kind, dtype, bits, device):
    for n in (1, 2, 3, 10, 257, 700):
        assert_optimal(WEIGHTS[kind](n).to(device=device, dtype=dtype), bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_of_half_precision_weights(dtype, bits, device):
    for n in (1, 700, 5000):
        assert_optimal(normal(n).to(device=device, dtype=dtype), bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_exact_scale_is_that_of_the_sweep(bits, device):
    w = torch.randn(3000, dtype=torch.float64, device=device)
    _, scale = F.quantize_weight(w, bits)
    torch.testing.assert_close(scale, oracles.exact_scale(w, bits), rtol=1e-13, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy_tails", "uniform", "ties"])
def test_no_scale_of_a_dense_grid_is_better(kind, bits, device):
    w = WEIGHTS[kind](500).to(device)
    error = relative_error(w, fit(w, bits))
    for step in torch.logspace(-6, 0.4, 700, dtype=torch.float64, device=device) * w.abs().max():
        q = oracles.nearest_level(w, step, bits)
        assert error <= relative_error(w, oracles.best_scale_for(w, q) * q) + 1e-14


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    bits=st.integers(2, 8),
)
def test_exact_whatever_the_values(values, bits):
    assert_optimal(torch.tensor(values, dtype=torch.float64), bits)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_exact_of_many_weights(bits):
    assert_optimal(torch.randn(20_000, dtype=torch.float64), bits)


def test_gaussian_errors_are_the_known_ones():
    """Of N(0, 1) weights, as math gives them: 1 - 2/pi at one bit, then 0.1902, 0.0466, 0.0127."""
    w = torch.randn(200_000)
    for bits, error in ((1, 1 - 2 / math.pi), (2, 0.1902), (3, 0.0466), (4, 0.0128)):
        assert relative_error(w, fit(w, bits)) == pytest.approx(error, rel=0.02)


@pytest.mark.slow
def test_scratch_of_eleven_million_weights():
    """At 8 bits: at most 16 bytes of scratch per weight. (The benchmark says how long it takes.)"""
    program = """
import resource, sys, torch, torchqat
torch.set_num_threads(1)
channel_dim = 0 if sys.argv[1] == "channel" else None
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torchqat.functional.quantize_weight(torch.randn(8, 9), 8, channel_dim=channel_dim)
w = torch.randn(4800, 2304)
before = peak()
torchqat.functional.quantize_weight(w, 8, channel_dim=channel_dim)
print((peak() - before) / w.numel())
"""
    for per, most in (("tensor", 16), ("channel", 5)):  # 4 are the result's, written when the scratch is gone
        done = subprocess.run(
            [sys.executable, "-c", program, per], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) <= most


# ---- the other methods, and one bit ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_is_one_step_from_the_papers_start(bits, dtype, device):
    w = normal(1501).to(device=device, dtype=dtype)
    quantized, scale = F.quantize_weight(w, bits, method="lloyd")
    if bits == 1:
        return exactly((quantized, scale), F.quantize_weight(w, bits))
    step, expected = oracles.lloyd_scale(w, bits)
    torch.testing.assert_close(scale, expected.to(scale.dtype), rtol=2e-7, atol=0)
    exactly(quantized, (scale * oracles.nearest_level(oracles.opmath(w), step, bits)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_twn_keeps_what_is_large(dtype, device):
    w = normal(1501).to(device=device, dtype=dtype)
    quantized, scale = F.quantize_weight(w, 2, method="twn")
    levels = oracles.twn_levels(w)
    torch.testing.assert_close(scale, oracles.best_scale_for(w, levels).to(scale.dtype), rtol=2e-7, atol=0)
    exactly(quantized, (scale * levels).to(dtype))


def test_twn_keeps_the_threshold_itself(device):
    w = torch.tensor([0.7, -1.3, 0.7, 1.3], dtype=torch.float64, device=device)  # 0.7 is 0.7 of the mean, 1
    assert 0.7 * w.abs().mean().item() == 0.7
    exactly(F.quantize_weight(w, 2, method="twn")[0], torch.tensor([1.0, -1, 1, 1]).to(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_is_the_mean_and_the_sign(dtype, device):
    w = torch.tensor([0.0, -0.0, 2.0, -4.0], device=device, dtype=dtype)
    quantized, scale = F.quantize_weight(w, 1)
    assert scale.item() == 1.5 and scale.dtype == oracles.opmath(w).dtype
    exactly(quantized, torch.tensor([1.5, 1.5, 1.5, -1.5]).to(w))


# ---- shapes and layouts ----


def assert_channels_alone(w, method, channel_dim):
    """A channel is quantized as a tensor of its own would be; sums may add up in another order."""
    dtype = w.dtype
    quantized, scale = F.quantize_weight(w, 2, method=method, channel_dim=channel_dim)
    assert quantized.dtype == dtype and quantized.stride() == torch.empty_like(w).stride()
    assert scale.dtype == oracles.opmath(w).dtype
    slices = [w] if channel_dim is None else w.unbind(channel_dim)
    alone = [F.quantize_weight(s.contiguous(), 2, method=method) for s in slices]
    expected = torch.stack([s for _, s in alone])
    expected = expected[0] if channel_dim is None else expected
    torch.testing.assert_close(scale, expected, rtol=1e-12 if dtype == torch.float64 else 3e-7, atol=0)
    stacked = alone[0][0] if channel_dim is None else torch.stack([q for q, _ in alone], channel_dim)
    torch.testing.assert_close(quantized, stacked, rtol=1e-3 if dtype.itemsize == 2 else 3e-7, atol=0)


@pytest.mark.parametrize("channel_dim", [None, 0, 1, 2, -1, -2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_channel_dimension(layout, dtype, method, channel_dim, device):
    assert_channels_alone(LAYOUTS[layout](device=device, dtype=dtype), method, channel_dim)


@pytest.mark.parametrize("channel_dim", [None, 0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_channels_that_take_more_than_one_slice(method, channel_dim, device):
    assert_channels_alone(torch.randn(2, 3, 40_001, device=device), method, channel_dim)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "twn"])
@pytest.mark.parametrize("run", [1, 63, 3001])
def test_channels_in_runs_of_any_length_have_the_bits_that_they_have_alone(run, method, dtype, device):
    w = torch.randn(-(-40_001 // run), 3, run, dtype=torch.float64).to(device, dtype)
    assert_channels_alone(w, method, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channel_dim", [None, 0, -1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_times_scale_are_the_weights(bits, channel_dim, layout, device):
    w = LAYOUTS[layout](device=device)
    quantized, scale = F.quantize_weight(w, bits, channel_dim=channel_dim)
    codes = F.weight_codes(w, scale, bits, channel_dim=channel_dim)
    assert codes.dtype == torch.int8 and codes.stride() == torch.empty_like(w).stride()
    assert codes.abs().max() <= oracles.top_level(bits)
    step = scale if channel_dim is None else oracles.along(scale, w, channel_dim)
    exactly(step * codes, quantized)
    exactly(F.weight_codes(quantized, scale, bits, channel_dim=channel_dim), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_codes_of_quantized_weights_are_their_levels(method, dtype, device):
    w = normal(400).to(device=device, dtype=dtype)
    for bits in (2,) if method == "twn" else range(1, 9):
        quantized, scale = F.quantize_weight(w, bits, method=method)
        codes = F.weight_codes(quantized, scale, bits)
        exactly((scale * codes).to(dtype), quantized)


def test_codes_are_the_nearest_levels(device):
    w = torch.linspace(-2, 2, 4001, device=device)
    for bits in range(1, 9):
        scale = torch.tensor(2.1 / (2**bits - 1), device=device)
        exactly(F.weight_codes(w, scale, bits), oracles.nearest_level(w, scale, bits).to(torch.int8))
    ties = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5], device=device)
    exactly(F.weight_codes(ties, torch.tensor(1.0, device=device), 3).tolist(), [0, 1, 0, -1, 2])


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_shapes_without_elements_or_dimensions(bits, device):
    for shape, channel_dim, scales in (
        ((0,), None, ()),
        ((0, 5), 1, (5,)),
        ((0, 5), 0, (0,)),
        ((5, 0), 0, (5,)),
        ((0, 5), None, ()),
    ):
        w = torch.empty(shape, device=device)
        quantized, scale = F.quantize_weight(w, bits, channel_dim=channel_dim)
        exactly((quantized, scale), (w, torch.zeros(scales, device=device)))
        assert F.weight_codes(w, scale, bits, channel_dim=channel_dim).shape == shape
    w = torch.tensor(-0.7, device=device)
    quantized, scale = F.quantize_weight(w, bits)
    assert quantized.shape == scale.shape == () and quantized.item() == pytest.approx(-0.7)


# ---- special values ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zero_weights_have_scale_zero(bits, method, device):
    if method == "twn" and bits != 2:
        return
    for zeros in (torch.zeros(700), -torch.zeros(5), torch.zeros(1)):
        quantized, scale = F.quantize_weight(zeros.to(device), bits, method=method)
        assert scale.item() == 0 and not quantized.any() and not quantized.signbit().any()
    codes = F.weight_codes(torch.zeros(3, device=device), scale, bits)
    assert codes.tolist() == [1, 1, 1] if bits == 1 else [0, 0, 0]


def test_small_weights_become_zero_without_a_sign(device):
    quantized, _ = F.quantize_weight(torch.tensor([-1e-3, 1.0], device=device), 2)
    assert quantized.tolist() == [0.0, 1.0] and not quantized.signbit().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("n", [5, 600])
def test_what_is_not_finite_spoils_its_own_channel_alone(n, bad, bits, method, device):
    if method == "twn" and bits != 2:
        return
    w = torch.randn(3, n, device=device)
    good = F.quantize_weight(w[[0, 2]], bits, method=method, channel_dim=0)
    w[1, 3] = bad
    quantized, scale = F.quantize_weight(w, bits, method=method, channel_dim=0)
    assert scale[1].isnan() and quantized[1].isnan().all()
    exactly((quantized[[0, 2]], scale[[0, 2]]), good)
    assert F.quantize_weight(w, bits, method=method)[1].isnan()


def test_one_huge_outlier_is_kept(device):
    w = torch.full((1000,), 1e-3, device=device)
    w[17] = -1e30
    for bits in range(2, 9):
        quantized, scale = F.quantize_weight(w, bits)
        assert quantized[17].item() == pytest.approx(-1e30) and quantized.count_nonzero() == 1


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_matter(bits):
    w = torch.randn(3, 100_000)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for options in ({}, {"channel_dim": 0}, {"method": "lloyd"}):
            results.append((count, options, F.quantize_weight(w, bits, **options)))
    torch.set_num_threads(threads)
    for _, options, result in results:
        exactly(result, next(r for count, o, r in results if count == 1 and o == options))


# ---- derivatives: there are none, and that is never silent ----


def test_results_never_require_grad(device):
    w = torch.randn(4, 5, device=device, requires_grad=True)
    quantized, scale = F.quantize_weight(w, 3)
    assert not quantized.requires_grad and not scale.requires_grad
    assert not F.weight_codes(w, scale, 3).requires_grad
    (quantized * w).sum().backward()  # the quantized weights are constants
    exactly(w.grad, quantized)


def test_func_transforms_are_refused():
    def loss(w):
        return F.quantize_weight(w, 3)[0].sum()

    w = torch.randn(4, 5)
    for transform in (
        lambda: torch.func.grad(loss)(w),
        lambda: torch.func.vjp(loss, w),
        lambda: torch.func.jacrev(loss)(w),
        lambda: torch.func.vmap(torch.func.grad(loss))(w),
    ):
        with pytest.raises(NotImplementedError, match="quantize_weight: not differentiable"):
            transform()
    for transform in (lambda: torch.func.jvp(loss, (w,), (w,)), lambda: torch.func.jacfwd(loss)(w)):
        with pytest.raises(NotImplementedError, match="quantize_weight: not differentiable.*jvp"):
            transform()


def test_a_detached_weight_is_a_constant_to_func_transforms():
    def loss(w):
        return (F.quantize_weight(w.detach(), 3)[0] * w).sum()

    w = torch.randn(4, 5)
    exactly(torch.func.grad(loss)(w), F.quantize_weight(w, 3)[0])
    exactly(torch.func.jvp(loss, (w,), (torch.ones_like(w),))[1], F.quantize_weight(w, 3)[0].sum())


# ---- compilers and batching ----

SAMPLES = [
    dict(bits=1),
    dict(bits=2),
    dict(bits=4, channel_dim=1),
    dict(bits=8, channel_dim=-1),
    dict(bits=3, method="lloyd", channel_dim=0),
    dict(bits=2, method="twn"),
]


def both(sample):
    options = {"channel_dim": sample.get("channel_dim")}

    def function(w):
        quantized, scale = F.quantize_weight(w, **sample)
        return quantized, scale, F.weight_codes(quantized, scale, sample["bits"], **options)

    return function


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_compile_and_export(sample, device):
    torch._dynamo.reset()
    function = both(sample)
    w = torch.randn(6, 5, 4, device=device, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    exactly(compiled(w), function(w))
    exactly(compiled(w[:3, :2]), function(w[:3, :2]))

    class Module(torch.nn.Module):
        def forward(self, w):
            return function(w)

    exported = torch.export.export(Module(), (w.detach(),)).module()
    exactly(exported(w.detach()), function(w))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_vmap_is_the_loop(sample, in_dim, device):
    sample = {**sample, "channel_dim": None if "channel_dim" not in sample else sample["channel_dim"]}
    w = torch.randn(3, 5, 4, device=device)
    batched = torch.vmap(both(sample), in_dims=in_dim)(w)
    loop = [both(sample)(s.contiguous()) for s in w.unbind(in_dim)]
    for actual, expected in zip(batched, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected), rtol=3e-7, atol=0)


def test_vmap_of_codes_with_either_argument_batched(device):
    w, scales = torch.randn(3, 4, device=device), torch.rand(2, 3, device=device)
    per_tensor = torch.vmap(lambda s: F.weight_codes(w, s, 4))(scales[0])
    exactly(per_tensor, torch.stack([F.weight_codes(w, s, 4) for s in scales[0]]))
    per_channel = torch.vmap(lambda s: F.weight_codes(w, s, 4, channel_dim=-2))(scales)
    exactly(per_channel, torch.stack([F.weight_codes(w, s, 4, channel_dim=0) for s in scales]))
    one_scale = torch.vmap(lambda v: F.weight_codes(v, scales[0, 0], 4))(w)
    exactly(one_scale, F.weight_codes(w, scales[0, 0], 4))
    nested = torch.vmap(torch.vmap(lambda v: F.quantize_weight(v, 3)[1]))(torch.stack([w, 2 * w]))
    torch.testing.assert_close(nested[1], 2 * nested[0], rtol=3e-7, atol=0)


def test_vmap_checks_what_belongs_to_one_sample():
    w = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"quantize_weight: channel_dim must be a dimension .*4.*got 1"):
        torch.vmap(lambda v: F.quantize_weight(v, 3, channel_dim=1))(w)
    with pytest.raises(ValueError, match=r"scale must have shape \(4,\), got \(3,\)"):
        torch.vmap(lambda v: F.weight_codes(v, torch.ones(3), 3, channel_dim=0))(w)


# ---- bad input ----


@pytest.mark.parametrize("bits", [-1, 0, 9, 64])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"quantize_weight: bits must be in 1..8, got {bits}"):
        F.quantize_weight(torch.ones(3), bits)
    with pytest.raises(ValueError, match=f"weight_codes: bits must be in 1..8, got {bits}"):
        F.weight_codes(torch.ones(3), torch.tensor(1.0), bits)


def test_unknown_method():
    with pytest.raises(
        ValueError, match="quantize_weight: unknown method 'best'; choose one of exact, lloyd, twn"
    ):
        F.quantize_weight(torch.ones(3), 2, method="best")
    for bits in (1, 3, 8):
        with pytest.raises(ValueError, match=f"method 'twn' is ternary, so bits must be 2, got {bits}"):
            F.quantize_weight(torch.ones(3), bits, method="twn")


@pytest.mark.parametrize("channel_dim", [-3, 2, 100])
def test_channel_dim_out_of_range(channel_dim):
    w = torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=rf"channel_dim must be a dimension of weight.*\[3, 4\], got {channel_dim}"
    ):
        F.quantize_weight(w, 2, channel_dim=channel_dim)
    with pytest.raises(ValueError, match="weight_codes: channel_dim must be a dimension"):
        F.weight_codes(w, torch.ones(3), 2, channel_dim=channel_dim)
    with pytest.raises(ValueError, match="channel_dim must be a dimension"):
        F.quantize_weight(torch.tensor(1.0), 2, channel_dim=0)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(3, dtype=torch.int32), "float64, float32, bfloat16 or float16, got Int"),
        (torch.ones(3, dtype=torch.bool), "got Bool"),
        (torch.ones(3, dtype=torch.complex64), "got ComplexFloat"),
        (torch.eye(3).to_sparse(), "weight must be a dense tensor, got layout Sparse"),
        (torch.eye(3).to_sparse_csr(), "weight must be a dense tensor, got layout SparseCsr"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "got QInt8"),
        (torch.ones(3).to(torch.float8_e4m3fn), "got Float8_e4m3fn"),
    ],
    ids=["int", "bool", "complex", "coo", "csr", "quantized", "float8"],
)
def test_weights_that_are_not_dense_floats(weight, message):
    with pytest.raises(TypeError, match=message):
        F.quantize_weight(weight, 2)
    with pytest.raises(TypeError, match=message):
        F.weight_codes(weight, torch.tensor(1.0), 2)


def test_scales_that_do_not_belong_to_the_weights():
    w = torch.ones(3, 4)
    for scale, channel_dim in (
        (torch.ones(1), None),
        (torch.ones(3), None),
        (torch.tensor(1.0), 0),
        (torch.ones(4), 0),
        (torch.ones(3, 1), 0),
    ):
        with pytest.raises(ValueError, match="weight_codes: scale must have shape"):
            F.weight_codes(w, scale, 2, channel_dim=channel_dim)
    for scale in (torch.tensor(1.0, dtype=torch.float64), torch.tensor(1), torch.tensor(1.0).half()):
        with pytest.raises(TypeError, match="weight_codes: scale must be a dense tensor of Float"):
            F.weight_codes(w, scale, 2)
    with pytest.raises(
        ValueError, match="weight_codes: scale must be on the device of weight, cpu, got meta"
    ):
        F.weight_codes(w, torch.tensor(1.0, device="meta"), 2)


def test_meta_tensors_have_shapes_only():
    w = torch.empty(4, 5, device="meta", dtype=torch.bfloat16)
    quantized, scale = F.quantize_weight(w, 2, channel_dim=1)
    assert quantized.device.type == "meta" and quantized.dtype == torch.bfloat16
    assert scale.shape == (5,) and scale.dtype == torch.float32
    assert F.weight_codes(w, scale, 2, channel_dim=-1).dtype == torch.int8
