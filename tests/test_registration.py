"""Every operator under every part of PyTorch that looks at operators: one table of samples."""

import copy
import os

import pytest
import torch
import torchqat
import torchqat.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)
X_KEEPING = dict(ste="log_tailed_relu", alpha_grad="exact")


def x(*shape, grad=True, dtype=torch.float32):
    return torch.randn(*(shape or (2, 3, 4, 5)), dtype=dtype).requires_grad_(grad)


def alpha(*shape, grad=True):
    return torch.full(shape, 0.4).requires_grad_(grad)


def zeros(size):
    return torch.zeros(size, dtype=torch.uint8)


def of_four(bits):
    """alpha, size, stride and bits of a private operator over four elements."""
    return alpha(grad=False), [4], [1], bits


def small(*shape, bits):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


def lists():
    """params, grads, latents, scales, momentum_buffers, steps of bcgd_step_."""
    latents = [torch.randn(3, 4), torch.randn(5)]
    params = [torch.where(y < 0, -y.abs().mean(), y.abs().mean()) for y in latents]
    grads = [torch.randn_like(p) for p in params]
    scales = [y.abs().mean() for y in latents]
    return (
        params,
        grads,
        latents,
        scales,
        [torch.zeros_like(p) for p in params],
        [torch.zeros(()) for _ in params],
    )


# op -> samples (args, kwargs). An operator that is not here fails test_every_operator_has_samples.
SAMPLES = {
    "staircase_relu": lambda: [
        ((x(), alpha(), 2), {}),
        ((x(), alpha(1), 1), X_KEEPING),
        ((x(grad=False), alpha(3), 4), X_KEEPING),
        ((x(), alpha(3, grad=False), 3), dict(alpha_grad="pact", ste="identity")),
        ((x(2, 3, 4, 5).to(memory_format=torch.channels_last), alpha(3), 4), {}),
        ((x(4, 5), alpha(4), 8), dict(channel_dim=0)),
        ((x(7, dtype=torch.bfloat16), alpha(), 2), {}),
        ((x(0, 3), alpha(3), 2), {}),
        ((x(grad=False), alpha(grad=False), 2), {}),
    ],
    "staircase_codes": lambda: [((x(), alpha(), 2), {}), ((x(grad=False), alpha(3, grad=False), 8), {})],
    "quantize_weight": lambda: [
        ((x(), 1), {}),
        ((x(grad=False), 2), dict(channel_dim=0)),
        ((x(), 4), dict(method="lloyd")),
        ((x(dtype=torch.float16), 2), dict(method="twn")),
        ((x(2, 3, 4, 5).to(memory_format=torch.channels_last), 3), dict(channel_dim=-1)),
        ((x(4, 9)[:, ::2], 8), dict(channel_dim=1)),
    ],
    "weight_codes": lambda: [
        ((x(), alpha(), 4), {}),
        ((x(grad=False), alpha(3, grad=False), 2), dict(channel_dim=1)),
        ((x(2, 3, 4, 5).to(memory_format=torch.channels_last), alpha(5), 3), dict(channel_dim=-1)),
        ((x(4, 9)[:, ::2], alpha(), 8), {}),
    ],
    "pack_codes": lambda: [
        ((small(3, 5, bits=2), 2), {}),
        ((small(2, 3, 4, 5, bits=1).to(memory_format=torch.channels_last), 1), {}),
        ((small(4, 9, bits=4)[:, ::2], 4), {}),
        ((small(0, 3, bits=8), 8), {}),
        ((small(bits=1), 1), {}),
    ],
    "unpack_codes": lambda: [
        ((small(4, bits=8), 2, [3, 5]), {}),
        ((small(3, bits=8), 1, [23]), {}),
        ((small(20, bits=8)[::2], 4, [4, 5]), {}),
        ((small(0, bits=8), 4, [0, 3]), {}),
        ((small(1, bits=8), 8, []), {}),
    ],
    "bcgd_step_": lambda: [
        (lists(), dict(lr=torch.tensor(0.1), bits=1, momentum=0.9)),
        ((*lists()[:4], [], []), dict(lr=torch.tensor(0.1), bits=2)),
        (lists(), dict(lr=torch.tensor(0.1), bits=4, momentum=0.9, nesterov=True, weight_decay=1e-4)),
        (
            (*lists()[:4], [], []),
            dict(lr=torch.tensor(0.1), bits=1, grad_scale=alpha(grad=False), found_inf=torch.zeros(())),
        ),
    ],
    "feature_affinity_loss": lambda: [
        ((x(), x(grad=False)), {}),
        ((x(), x(2, 7, 4, 5)), dict(norm="fro", reduction="sum")),
        ((x(2, 3, 4, 5).to(memory_format=torch.channels_last), x(grad=False)), {}),
        ((x(dtype=torch.bfloat16), x(2, 1, 4, 5, grad=False)), dict(norm="fro")),
        ((x(2, 3, 1, dtype=torch.float64), x(2, 3, 1, grad=False)), {}),
        ((x(0, 3, 4), x(0, 3, 4, grad=False)), {}),
        ((x(grad=False), x(2, 7, 4, 5, grad=False)), {}),
    ],
    "fast_feature_affinity_loss": lambda: [
        ((x(), x(grad=False), x(20, 3, grad=False)), {}),
        ((x(), x(2, 7, 4, 5), x(20, 1, grad=False)), dict(norm="fro", reduction="sum")),
        ((x(dtype=torch.float16), x(2, 1, 4, 5, grad=False), x(20, 4, grad=False)), {}),
        ((x(grad=False), x(grad=False), x(20, 3, grad=False)), {}),
    ],
    "recommend_feature_affinity": lambda: [],
    # What calibrate counts with, outside of graphs.
    "_empty_magnitude_counts": lambda: [],
    "_count_magnitudes": lambda: [],
    "_best_step_sizes": lambda: [],
    "_bounded_alpha": lambda: [((alpha(3), 1e-3, 0.01, 1.0), {}), ((alpha(grad=False), 1.0, 1.0, 1.0), {})],
    "_staircase_relu_forward": lambda: [
        ((x(grad=False), alpha(grad=False), bits, 1, codes), {})
        for bits, codes in [(2, False), (1, True), (2, True), (4, True), (8, True)]
    ],
    "_staircase_relu_rebuild": lambda: [
        ((zeros(size), alpha(3, grad=False), [2, 3, 4, 5], [60, 1, 15, 3], dtype, bits, 1, torch.ones(1)), {})
        for bits, size, dtype in [(1, 30, torch.float32), (4, 120, torch.bfloat16), (8, 240, torch.float64)]
    ],
    "_staircase_relu_backward": lambda: [
        ((x(4, grad=False), zeros(2), *of_four(2), "relu", "min", 1, False), {}),
        ((x(4, grad=False), zeros(4), *of_four(2), "relu", "exact", 1, True), {}),
        ((x(4, grad=False), x(4, grad=False), *of_four(2), "relu", "exact", 1, False), {}),
    ],
    "_convolution": lambda: (
        [
            ((x(), x(6, 3, 2, 2), x(6), [1, 1], [0, 0], [1, 1], 1, recompute), {})
            for recompute in (False, True)
        ]
        + [((x(2, 4, 5), x(2, 2, 3), None, [2], [1], [1], 2, False), {})]
    ),
    "_linear": lambda: [((x(4, 5), x(3, 5), x(3)), {}), ((x(4, 5, grad=False), x(3, 5), None), {})],
    "_max_pool2d": lambda: [((x(), [2, 2], [2, 2], [0, 0], [1, 1], False), {})],
    "_batch_norm": lambda: [
        ((x(), x(3), x(3), x(3, grad=False), torch.ones(3), 0.1, 1e-5), {}),
    ],
    "_in_backward": lambda: [((x(grad=False), torch.ones(1)), {})],
    "_with_size": lambda: [((x(grad=False), [2, 3, 4, 5]), {})],
    "_feature_affinity_loss": lambda: [((x(grad=False), x(grad=False), "l1", "mean", 1e-5), {})],
    "_fast_feature_affinity_loss": lambda: [
        ((x(grad=False), x(grad=False), x(20, 3, grad=False), "fro", "sum", 1e-5), {})
    ],
    "_feature_affinity_backward": lambda: [((alpha(grad=False), x(grad=False), torch.bfloat16), {})],
    "ste_names": lambda: [],
    "_save_safetensors": lambda: [],  # files: tests/test_checkpoint.py
    "_load_safetensors": lambda: [],
}
CASES = [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples()))]


def overload(name):
    return getattr(torch.ops.qat, name).default


def detached(value):
    """The arguments again, as new leaves."""
    if isinstance(value, (list, tuple)):
        return type(value)(detached(v) for v in value)
    return (
        value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
    )


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def gradients(out, args):
    out = out if isinstance(out, torch.Tensor) else out[0]
    return (
        torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), leaves(args))
        if out.requires_grad
        else ()
    )


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_every_operator_has_samples():
    registered = {
        name.removeprefix("qat::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qat::")
    }
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("name, i", CASES)
def test_opcheck(name, i):
    args, kwargs = SAMPLES[name]()[i]
    opcheck(overload(name), args, kwargs, test_utils=ALL_CHECKS)


@pytest.mark.parametrize(
    "name, i", [case for case in CASES if case[0] != "bcgd_step_"]
)  # which returns nothing
def test_the_meta_kernel_predicts_shape_dtype_and_strides(name, i):
    args, kwargs = SAMPLES[name]()[i]
    with torch.no_grad():
        real = overload(name)(*args, **kwargs)
        meta = overload(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    for r, m in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, meta)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


PURE = [
    (name, i)
    for name, i in CASES
    if name == "_bounded_alpha" or not name.startswith("_") and name != "bcgd_step_"
]


# The code generator of inductor sees an operator as a black box: two samples of each are enough.
COMPILED = [(*case, "aot_eager") for case in PURE] + [(*case, "inductor") for case in PURE if case[1] < 2]


@pytest.mark.parametrize("name, i, backend", COMPILED)
def test_compile_fullgraph_forward_and_backward(name, i, backend):
    torch._dynamo.reset()
    args, kwargs = SAMPLES[name]()[i]
    again = detached(args)
    expected = overload(name)(*args, **kwargs)
    actual = torch.compile(lambda *a: overload(name)(*a, **kwargs), fullgraph=True, backend=backend)(*again)
    assert_same(actual, expected)
    assert_same(gradients(actual, again), gradients(expected, args))


def test_compile_of_the_step_changes_what_the_eager_step_changes():
    torch._dynamo.reset()
    args, kwargs = SAMPLES["bcgd_step_"]()[0]
    again = detached(args)
    F.bcgd_step_(*args, **kwargs)
    torch.compile(lambda *a: F.bcgd_step_(*a, **kwargs), fullgraph=True, backend="aot_eager")(*again)
    assert_same(again, args)


DIFFERENTIABLE = ("staircase_relu", "feature_affinity_loss", "fast_feature_affinity_loss")


@pytest.mark.parametrize(
    "name, i", [(name, i) for name in DIFFERENTIABLE for i in range(len(SAMPLES[name]()) - 1)]
)  # the last sample has no gradient
def test_compiled_autograd(name, i):
    torch._dynamo.reset()
    args, kwargs = SAMPLES[name]()[i]
    again = detached(args)
    expected = gradients(overload(name)(*args, **kwargs), args)
    out = overload(name)(*again, **kwargs)
    weight = torch.arange(out.numel()).view_as(out)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        (out * weight).sum().backward()
    assert_same(tuple(a.grad for a in leaves(again)), expected)


class Net(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.act = torchqat.nn.StaircaseReLU(2, **options)

    def forward(self, image):
        return self.act(self.conv(image)).mean((2, 3))


@pytest.mark.parametrize("options", [{}, X_KEEPING, dict(channels=4)])
def test_export(options):
    net, image = Net(**options).eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (image,))
    assert any("qat.staircase_relu" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(image), net(image))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, X_KEEPING])
def test_activation_checkpointing(options, use_reentrant):
    net, image = Net(**options), torch.randn(2, 3, 8, 8, requires_grad=True)
    net(image).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    checkpoint(net, image, use_reentrant=use_reentrant).sum().backward()
    assert_same([p.grad for p in net.parameters()], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_of_the_activations(dtype):
    net, image = Net(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        hidden = net.conv(image)
        y = net.act(hidden)
    assert hidden.dtype == dtype and y.dtype == dtype
    y.float().sum().backward()
    assert net.act.alpha.grad.dtype == torch.float32 and net.act.alpha.grad.isfinite()


@pytest.mark.parametrize("name, i", PURE)
def test_autocast_changes_nothing_in_the_operators(name, i):
    args, kwargs = SAMPLES[name]()[i]
    expected = overload(name)(*args, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(overload(name)(*args, **kwargs), expected)


class Call(torch.nn.Module):
    def __init__(self, name, args, kwargs):
        super().__init__()
        self.name, self.constants, self.kwargs = name, args[1:], kwargs

    def forward(self, tensor):
        return overload(self.name)(tensor, *self.constants, **self.kwargs)


@pytest.mark.parametrize("name, i", [case for case in PURE if not case[0].startswith("_")])
def test_export_of_every_operator(name, i):
    args, kwargs = SAMPLES[name]()[i]
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    program = torch.export.export(Call(name, args, kwargs), (args[0],))
    assert_same(program.module()(args[0]), overload(name)(*args, **kwargs))


def test_a_module_copies_and_loads():
    net = Net(channels=4, alpha_grad="min")
    twin = copy.deepcopy(net)
    image = torch.randn(2, 3, 8, 8)
    assert_same(twin(image), net(image))
    with torch.no_grad():
        twin.act.alpha.mul_(2)
    assert not torch.equal(twin(image), net(image))
    net.load_state_dict(twin.state_dict())
    assert_same(twin(image), net(image))


# ---- torch.vmap and torch.func ----

BATCH = 3


@pytest.mark.parametrize("op", [F.staircase_relu, F.staircase_codes])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (-1, None), (0, 0), (None, 0), (2, -1)])
def test_vmap_is_a_loop(op, per_channel, in_dims):
    def batched(t, dim):
        return t[0] if dim is None else t.movedim(0, dim).contiguous()

    xs, alphas = torch.randn(BATCH, 2, 4, 5), torch.rand(BATCH, *((4,) if per_channel else ())) + 0.1
    args = batched(xs, in_dims[0]), batched(alphas, in_dims[1])
    if in_dims[1] == -1 and not per_channel:
        args = args[0], alphas
    actual = torch.vmap(lambda v, a: op(v, a, 2), in_dims)(*args)
    expected = [
        op(xs[0 if in_dims[0] is None else k], alphas[0 if in_dims[1] is None else k], 2)
        for k in range(BATCH)
    ]
    assert_same(actual, torch.stack(expected))


@pytest.mark.parametrize("ste", F.ste_names())
@pytest.mark.parametrize("shape", [(), (4,)])
def test_per_sample_gradients(ste, shape):
    """vmap over grad, as torch.func users take per-sample gradients."""

    def loss(a, v):
        return (F.staircase_relu(v, a, 2, ste=ste) * torch.arange(5.0)).sum()

    a, xs = torch.full(shape, 0.4), torch.randn(BATCH, 2, 4, 5)
    grads_a, grads_x = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(a, xs)
    for k in range(BATCH):
        leaf_a, leaf_x = a.clone().requires_grad_(), xs[k].clone().requires_grad_()
        loss(leaf_a, leaf_x).backward()
        assert_same(grads_a[k], leaf_a.grad)
        assert_same(grads_x[k], leaf_x.grad)


@pytest.mark.parametrize("op", [F.staircase_relu, F.staircase_codes])
def test_vmap_names_a_wrong_channel_dim_as_eager_does(op):
    for sample, channel_dim in ((torch.randn(3), 1), (torch.randn(3, 4), 5), (torch.randn(()), 0)):
        with pytest.raises(ValueError, match=f"{op.__name__}: channel_dim must be .* got {channel_dim}"):
            op(sample, torch.ones(3), 2, channel_dim=channel_dim)
        with pytest.raises(ValueError, match=f"{op.__name__}: channel_dim must be .* got {channel_dim}"):
            batch = torch.stack([sample, sample])
            torch.vmap(lambda v, d=channel_dim: op(v, torch.ones(3), 2, channel_dim=d))(batch)


def test_vmap_with_gradients_outside():
    a = torch.rand(BATCH, requires_grad=True)
    xs = torch.randn(BATCH, 7, requires_grad=True)
    torch.vmap(lambda v, s: F.staircase_relu(v, s, 2))(xs, a).sum().backward()
    for k in range(BATCH):
        leaf_a, leaf_x = a[k].detach().requires_grad_(), xs[k].detach().requires_grad_()
        F.staircase_relu(leaf_x, leaf_a, 2).sum().backward()
        assert_same(a.grad[k], leaf_a.grad)
        assert_same(xs.grad[k], leaf_x.grad)


def test_an_ensemble_of_modules():
    nets = [Net() for _ in range(BATCH)]
    params, buffers = torch.func.stack_module_state(nets)
    image = torch.randn(2, 3, 8, 8)

    def call(p, b):
        return torch.func.functional_call(nets[0], (p, b), (image,))

    torch.testing.assert_close(torch.vmap(call)(params, buffers), torch.stack([net(image) for net in nets]))


def test_nested_function_transforms_say_what_is_missing():
    def f(v):
        return F.staircase_relu(v, torch.tensor(0.5), 2).pow(2).sum()

    with pytest.raises(RuntimeError, match="forward AD with qat::_staircase_relu_.* does not support it"):
        torch.func.hessian(f)(torch.randn(3))
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.func.grad(lambda v: torch.func.grad(f)(v).sum())(torch.randn(3))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(f)(torch.randn(3))


# ---- large tensors ----


def free_gib():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.slow
@pytest.mark.skipif(free_gib() < 12, reason="needs 12 GiB of free memory")
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 9
    v = torch.zeros(n, dtype=torch.bfloat16)
    v[-3:] = torch.tensor([0.5, 3.0, 5.0])
    alpha = torch.tensor(1.0)
    y, regions = torch.ops.qat._staircase_relu_forward(v, alpha, 2, 1, False)
    assert y[-4:].tolist() == [0, 1, 3, 3]
    del v
    grad_x, grad_alpha = torch.ops.qat._staircase_relu_backward(
        y, regions, alpha, y.shape, y.stride(), 2, "clipped_relu", "three_valued", 1, False
    )
    assert grad_x[-4:].tolist() == [0, 1, 3, 0] and grad_alpha == 2 * (1 + 3) + 3 * 3
