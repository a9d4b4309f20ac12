"""staircase_relu, staircase_codes, ste_names: forward, backward, layouts, what is saved, and bad input."""

import math

import layouts
import oracles
import pytest
import torch
import torchqat.functional as F

STES = torch.ops.qat.ste_names()
RULES = ["exact", "three_valued", "min", "pact"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

LAYOUTS = layouts.LAYOUTS | {
    "vectors": lambda **o: torch.randn(33, 5, **o),
    "more_than_a_chunk": lambda **o: torch.randn(2, 5, 101, 97, **o),
    "empty": lambda **o: torch.randn(0, 5, 4, **o),
}


def steps(x, per_channel, dtype=torch.float32, channel_dim=1):
    if not per_channel:
        return torch.tensor(0.3, dtype=dtype, device=x.device)
    return torch.linspace(0.1, 0.9, x.size(channel_dim), device=x.device).to(dtype)


def run(x, alpha, bits, grad=None, **options):
    x, alpha = x.detach().requires_grad_(), alpha.detach().requires_grad_()
    y = F.staircase_relu(x, alpha, bits, **options)
    y.backward(torch.ones_like(y) if grad is None else grad)
    return y.detach(), x.grad, alpha.grad


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ---- forward ----


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_oracle_in_every_layout(layout, dtype, per_channel, device):
    x = LAYOUTS[layout](device=device, dtype=dtype)
    alpha = steps(x, per_channel)
    y = F.staircase_relu(x, alpha, 2)
    exactly(y, oracles.staircase(x, alpha, 2))
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    exactly(F.staircase_codes(x, alpha, 2), oracles.level(x, alpha, 2).to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits, device):
    x = torch.linspace(-1, 1.5, 4001, device=device)
    alpha = torch.tensor(1.2 / (2**bits - 1), device=device)
    exactly(F.staircase_relu(x, alpha, bits), oracles.staircase(x, alpha, bits))
    codes = F.staircase_codes(x, alpha, bits)
    assert codes.max() == 2**bits - 1 and codes.dtype == torch.uint8


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_alpha_along_any_dimension(channel_dim, memory_format, device):
    x = torch.randn(4, 3, 5, 6, device=device).to(memory_format=memory_format)
    alpha = steps(x, True, channel_dim=channel_dim)
    grad = torch.randn_like(x)
    y, grad_x, grad_alpha = run(x, alpha, 3, grad, channel_dim=channel_dim)
    exactly(y, oracles.staircase(x, alpha, 3, channel_dim))
    expected_x, expected_alpha = oracles.staircase_grads(
        grad, x, alpha, 3, "clipped_relu", "three_valued", channel_dim
    )
    exactly(grad_x, expected_x)
    torch.testing.assert_close(grad_alpha.double(), expected_alpha, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "shape, channels", [((3, 0), 0), ((0, 0), 0), ((0, 3), 3), ((2, 0, 5), 0), ((0,), None)]
)
@pytest.mark.parametrize("rule", ["three_valued", "exact"])
def test_no_elements_and_no_channels(shape, channels, rule, device):
    x = torch.ones(shape, device=device)
    alpha = torch.ones((), device=device) if channels is None else torch.ones(channels, device=device)
    y, grad_x, grad_alpha = run(x, alpha, 2, alpha_grad=rule)
    assert y.shape == grad_x.shape == F.staircase_codes(x, alpha, 2).shape == x.shape
    exactly(grad_alpha, torch.zeros_like(alpha))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_on_just_above_and_just_below_every_step(bits, dtype, device):
    """x = k alpha belongs to step k. A product with 1 / alpha would move one point in ten of these."""
    alphas = torch.rand(200, dtype=torch.float64) * 3 + 1e-3
    top = 2**bits - 1
    for alpha in alphas.to(dtype).to(device):
        k = torch.arange(1, top + 2, device=device)
        grid = (k * alpha.double()).to(dtype)
        inf = torch.full_like(grid, math.inf)
        x = torch.cat([grid, torch.nextafter(grid, inf), torch.nextafter(grid, -inf)])
        exactly(F.staircase_relu(x, alpha, bits), oracles.staircase(x, alpha, bits))
        _, grad_x, _ = run(x, alpha, bits)
        exactly(grad_x, oracles.ste_slope(x, alpha, bits, "clipped_relu").to(dtype))


def test_power_of_two_steps_are_fixed_points(device):
    alpha = torch.tensor(0.25, device=device)
    y = F.staircase_relu(torch.randn(1000, device=device), alpha, 3)
    exactly(F.staircase_relu(y, alpha, 3), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_special(dtype, device):
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny, tiny / 2], dtype=dtype, device=device
    )
    y, grad_x, grad_alpha = run(x, torch.tensor(10.0, device=device), 2)
    nan = math.nan
    exactly(y, torch.tensor([nan, 30, 0, 0, 0, 10, 0, 10], dtype=dtype, device=device))
    exactly(grad_x, torch.tensor([nan, 0, 0, 0, 0, 1, 0, 1], dtype=dtype, device=device))
    assert not torch.signbit(y[2:5]).any()
    assert grad_alpha.isnan()
    exactly(
        F.staircase_codes(x, torch.tensor(10.0, device=device), 2).cpu(),
        torch.tensor([0, 3, 0, 0, 0, 1, 0, 1], dtype=torch.uint8),
    )


def test_a_zero_slope_stops_an_infinite_gradient(device):
    x = torch.tensor([-1.0, 0.5, 9.0], device=device)
    grad = torch.tensor([math.inf, 1.0, -math.inf], device=device)
    _, grad_x, grad_alpha = run(x, torch.tensor(1.0, device=device), 2, grad, alpha_grad="pact")
    exactly(grad_x, torch.tensor([0.0, 1.0, 0.0], device=device))
    assert grad_alpha == -math.inf


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, -math.inf])
@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("rule", RULES)
def test_an_alpha_that_is_not_positive_gives_nan(value, ste, rule, device):
    x = torch.tensor([-1.0, 0.0, 0.5, 9.0], device=device)
    y, grad_x, grad_alpha = run(x, torch.tensor(value, device=device), 2, ste=ste, alpha_grad=rule)
    assert y.isnan().all() and grad_x.isnan().all() and grad_alpha.isnan()
    y, grad_x, grad_alpha = run(
        x.view(1, 4), torch.tensor([1.0, value, 1.0, 1.0], device=device), 2, ste=ste, alpha_grad=rule
    )
    bad = torch.tensor([[False, True, False, False]], device=device)
    exactly(y.isnan(), bad)
    exactly(grad_x.isnan(), bad)
    exactly(grad_alpha.isnan(), bad[0])


# ---- backward ----


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_the_oracle(ste, rule, bits, dtype, device):
    x = torch.randn(4, 6, 35, dtype=dtype, device=device)
    grad = torch.randn_like(x)
    for alpha in (steps(x, False), steps(x, True)):
        y, grad_x, grad_alpha = run(x, alpha, bits, grad, ste=ste, alpha_grad=rule)
        expected_x, expected_alpha = oracles.staircase_grads(grad, x, alpha, bits, ste, rule)
        exactly(y, oracles.staircase(x, alpha, bits))
        if ste in ("log_tailed_relu", "reverse_exponential"):
            torch.testing.assert_close(grad_x, expected_x)  # exp and 1/x round differently by vendor
        else:
            exactly(grad_x, expected_x)
        terms = grad.double().abs().sum() * 2**bits
        tolerance = float(terms) * (1e-14 if dtype == torch.float64 else 1e-6)
        torch.testing.assert_close(grad_alpha.double(), expected_alpha, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", ["three_valued", "exact"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_in_every_layout(layout, rule, per_channel, device):
    x = LAYOUTS[layout](device=device, dtype=torch.float32)
    alpha = steps(x, per_channel)
    grads = {
        "like x": torch.randn_like(x),
        "row-major": torch.randn(x.shape, device=device),
        "expanded": torch.randn((), device=device).expand(x.shape),
    }
    for grad in grads.values():
        _, grad_x, grad_alpha = run(x, alpha, 2, grad, alpha_grad=rule)
        expected_x, expected_alpha = oracles.staircase_grads(grad, x, alpha, 2, "clipped_relu", rule)
        exactly(grad_x, expected_x)
        torch.testing.assert_close(grad_alpha.double(), expected_alpha, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [None, 1, 3, 8, 17, 40])
def test_every_number_of_elements_and_length_of_a_channel(channels, dtype, device):
    """Vectors end, and channels change, at every place in a vector."""
    for inner in [*range(1, 20), 31, 32, 33, 49, 65, 2001]:
        x = torch.randn((inner,) if channels is None else (2, channels, inner), dtype=dtype, device=device)
        alpha = steps(x, channels is not None)
        grad = torch.randn_like(x)
        y, grad_x, grad_alpha = run(x, alpha, 2, grad)
        exactly(y, oracles.staircase(x, alpha, 2))
        exactly(F.staircase_codes(x, alpha, 2), oracles.level(x, alpha, 2).to(torch.uint8))
        expected_x, expected_alpha = oracles.staircase_grads(
            grad, x, alpha, 2, "clipped_relu", "three_valued"
        )
        exactly(grad_x, expected_x)
        torch.testing.assert_close(grad_alpha.double(), expected_alpha, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("alpha_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_may_have_any_floating_dtype(dtype, alpha_dtype, device):
    x = torch.randn(50, device=device, dtype=dtype)
    alpha = torch.tensor(0.375, dtype=alpha_dtype, device=device)  # exact in all of them
    y, _, grad_alpha = run(x, alpha, 2)
    assert y.dtype == dtype and grad_alpha.dtype == alpha_dtype
    exactly(y, oracles.staircase(x, alpha, 2))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_one_element_serves_any_shape(shape, device):
    alpha = torch.full(shape, 0.3, device=device)
    for x in (
        torch.tensor(0.7, device=device),
        torch.randn(5, device=device),
        torch.randn(2, 3, 4, device=device),
    ):
        y, grad_x, grad_alpha = run(x, alpha, 2, channel_dim=99)
        exactly(y, oracles.staircase(x, alpha, 2))
        assert grad_alpha.shape == alpha.shape and grad_x.shape == x.shape


def test_only_what_requires_a_gradient_gets_one(device):
    x = torch.randn(9, device=device)
    alpha = torch.tensor(0.5, device=device)
    assert not F.staircase_relu(x, alpha, 2).requires_grad
    F.staircase_relu(x, alpha.requires_grad_(), 2, alpha_grad="exact").sum().backward()
    expected = oracles.staircase_grads(torch.ones_like(x), x, alpha.detach(), 2, "clipped_relu", "exact")[1]
    torch.testing.assert_close(alpha.grad.double(), expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_sums_do_not_depend_on_the_number_of_threads(per_channel):
    x = torch.randn(8, 16, 64, 64)
    grad = torch.randn_like(x)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        results.append(run(x, steps(x, per_channel), 4, grad)[2])
    torch.set_num_threads(before)
    for other in results[1:]:
        exactly(other, results[0])


# ---- what is kept for backward ----


def saved_bytes(x, alpha, bits, **options):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.staircase_relu(x, alpha, bits, **options)
    return sum(t.numel() * t.element_size() for t in saved if t.data_ptr() != alpha.data_ptr()), saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_bits_per_element_are_kept(dtype, device):
    x = torch.randn(16, 64, 32, 32, dtype=dtype, device=device, requires_grad=True)
    alpha = torch.tensor(0.2, device=device, requires_grad=True)
    total, _ = saved_bytes(x, alpha, 4)
    assert total / x.numel() <= 0.26


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [1, 4])
def test_x_is_kept_only_where_the_mathematics_asks_for_it_and_never_copied(ste, rule, bits, device):
    x = torch.randn(800, device=device, requires_grad=True)
    alpha = torch.tensor(0.2, device=device, requires_grad=True)
    total, saved = saved_bytes(x, alpha, bits, ste=ste, alpha_grad=rule)
    if ste in ("log_tailed_relu", "reverse_exponential"):
        assert any(t.data_ptr() == x.data_ptr() for t in saved) and total == 3200
    elif rule == "exact" and bits > 1:
        assert total == 800  # the levels, in codes of a byte
    else:
        assert total == 200


def test_a_frozen_alpha_needs_no_level(device):
    x = torch.randn(800, device=device, requires_grad=True)
    total, _ = saved_bytes(x, torch.tensor(0.2, device=device), 4, alpha_grad="exact")
    assert total == 200


# ---- bad input ----


def call(x=None, alpha=None, bits=2, op=F.staircase_relu, **options):
    x = torch.randn(2, 3) if x is None else x
    return op(x, torch.tensor(0.5) if alpha is None else alpha, bits, **options)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [F.staircase_relu, F.staircase_codes])
def test_bad_input_is_named(op, requires_grad):
    name = op.__name__
    alpha = torch.tensor(0.5, requires_grad=requires_grad)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"{name}: bits must be in 1..8, got {bits}"):
            call(alpha=alpha, bits=bits, op=op)
    for x in (
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.bool),
    ):
        with pytest.raises(
            TypeError, match=rf"{name}: x must be float64, float32, bfloat16 or float16, got "
        ):
            call(x, alpha, op=op)
    with pytest.raises(TypeError, match=rf"{name}: alpha must be float64, .* got Long"):
        call(alpha=torch.tensor(1), op=op)
    with pytest.raises(
        ValueError, match=rf"{name}: alpha must have one element, or one for each of the 3 channels"
    ):
        call(alpha=torch.ones(2), op=op)
    with pytest.raises(
        ValueError, match=rf"{name}: alpha must have shape \[\], \[1\] or \[channels\], got \[1, 3\]"
    ):
        call(alpha=torch.ones(1, 3), op=op)
    with pytest.raises(
        ValueError, match=rf"{name}: channel_dim must be in -2..1 for x of shape \[2, 3\], got 2"
    ):
        call(alpha=torch.ones(3), op=op, channel_dim=2)
    with pytest.raises(ValueError, match=rf"{name}: alpha must be on the device of x, meta, got cpu"):
        call(torch.randn(2, 3, device="meta"), alpha, op=op)


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(ValueError, match="unknown ste 'tanh'; choose one of " + ", ".join(STES)):
        call(ste="tanh")
    with pytest.raises(
        ValueError, match="unknown alpha_grad 'mean'; choose one of exact, three_valued, min, pact"
    ):
        call(alpha_grad="mean")


@pytest.mark.parametrize("op", [F.staircase_relu, F.staircase_codes])
def test_sparse_tensors_are_refused(op):
    with pytest.raises(TypeError, match=f"{op.__name__}: x must be a dense tensor, got layout Sparse"):
        call(torch.eye(3).to_sparse(), op=op)
    with pytest.raises(TypeError, match=f"{op.__name__}: alpha must be a dense tensor, got layout Sparse"):
        call(alpha=torch.ones(3).to_sparse(), op=op)


def test_codes_are_not_differentiable_and_say_so():
    x, alpha = torch.randn(5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    assert not F.staircase_codes(x, alpha, 2).requires_grad
    for argnum in (0, 1):
        with pytest.raises(NotImplementedError, match="staircase_codes: not differentiable"):
            torch.func.grad(lambda v, a: F.staircase_codes(v, a, 2).float().sum(), argnum)(x, alpha)


def test_a_gradient_that_keeps_its_graph_is_the_same_and_can_be_used():
    x = torch.randn(5, requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True)
    plain = torch.autograd.grad(F.staircase_relu(x, alpha, 2).sum(), (x, alpha))
    kept = torch.autograd.grad(F.staircase_relu(x, alpha, 2).sum(), (x, alpha), create_graph=True)
    for a, b in zip(plain, kept, strict=True):
        assert not a.requires_grad and torch.equal(a, b.detach())


def test_second_and_forward_derivatives_say_that_they_are_missing():
    x = torch.randn(5, requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True)
    for ste in STES:

        def loss(v, a, power, ste=ste):
            return F.staircase_relu(v, a, 2, ste=ste).pow(power).sum()

        # With power 1 nothing that the gradient is computed from requires a gradient but x and alpha.
        for power in (1, 2):
            for grad in torch.autograd.grad(loss(x, alpha, power), (x, alpha), create_graph=True):
                with pytest.raises(NotImplementedError, match="^staircase_relu: second derivatives"):
                    grad.sum().backward()
            with pytest.raises(NotImplementedError, match="^staircase_relu: second derivatives"):
                torch.autograd.functional.hessian(lambda v, p=power: loss(v, alpha.detach(), p), x)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda v: F.staircase_relu(v, alpha.detach(), 2), (x.detach(),), (torch.ones(5),))


# ---- the catalogue ----


def test_the_catalogue_is_the_documented_one():
    assert STES == ["identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential"]
    for name in STES + RULES:
        assert f"``{name}``" in F.staircase_relu.__doc__
