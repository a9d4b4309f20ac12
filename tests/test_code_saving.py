"""Layers that keep a staircase's codes: results and gradients are those of the plain layers, bit by bit."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchqat
from example_programs import imported
from kept_bytes import bytes_kept, kept
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchqat.nn import QuantConv1d, QuantConv2d, QuantLinear, QuantMaxPool2d, StaircaseReLU
from torchqat.nn.quant_layers import QUANT_LAYERS

PLAIN = {quant: plain for plain, quant in QUANT_LAYERS.items()}


@pytest.fixture(autouse=True)
def everything_on(device, monkeypatch):
    """Networks and images of these tests; on a GPU, convolutions of one and the same order."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        with device:
            yield
    else:
        yield


def plain_twin(model):
    """The same network of torch's own layers, beside staircases that keep two bits."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
        if isinstance(module, StaircaseReLU):
            module.save_codes = False
    return model


def results(model, *inputs, forward=None):
    """The output and all gradients."""
    model.zero_grad()
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    y = (forward or model)(*inputs)
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return [
        y.detach(),
        *(v.grad for v in inputs),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


def assert_same(a, b):
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=0, atol=0, equal_nan=True)
        assert s.stride() == t.stride()


def assert_as_plain(model, *inputs, forward=None):
    twin = plain_twin(model)
    there = None if forward is None else lambda *v: forward(twin, *v)
    here = None if forward is None else lambda *v: forward(model, *v)
    assert_same(results(model, *inputs, forward=here), results(twin, *inputs, forward=there))


def staircase(bits=2, **options):
    return StaircaseReLU(bits, alpha_init=0.4, **options)


def block(bits=2, **options):
    """A staircase between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), staircase(bits, **options), QuantConv2d(4, 5, 3))


def block_with_norm(channels=3):
    return nn.Conv2d(channels, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()


def images(*shape):
    return torch.randn(shape or (2, 3, 9, 8))


# --------------------------------------------------------------------------------------------- whole networks

NETWORKS = {
    "lenet5": (1, 16, 0.25),
    "vgg11": (3, 16, 0.125),
    "resnet20": (3, 16, 0.5),
    "resnet18": (3, 64, 0.0625),
    "mobilenet": (3, 16, 0.25),
}


@pytest.fixture
def network(monkeypatch):
    def make(name):
        channels, size, width = NETWORKS[name]
        with imported("models", monkeypatch) as models:
            return models.MODELS[name](channels, size, 10, width), torch.randn(4, channels, size, size)

    return make


def train(model, x, steps):
    """Outputs and losses of a W1 training run, and the state in the end."""
    optimizer = torchqat.optim.BCGD(torchqat.optim.param_groups(model, 1), lr=0.01, momentum=0.9)
    target = torch.arange(len(x)) % 10
    seen = []
    for step in range(steps):
        y = model(x.roll(step, -1))
        loss = F.cross_entropy(y.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += [y.detach().clone(), loss.detach().clone()]
    return seen + [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_plain_ones_bit_by_bit(network, name, dtype, channels_last):
    model, x = network(name)
    x = x.to(dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model = torchqat.prepare(model.to(dtype), 2, recompute=True)
    assert any(isinstance(m, QuantConv2d) for m in model.modules())
    twin = plain_twin(model)
    without = copy.deepcopy(model)
    for module in without.modules():
        module.recompute = False
    expected = results(copy.deepcopy(twin), x)
    assert_same(results(copy.deepcopy(model), x), expected)
    assert_same(results(copy.deepcopy(without), x), expected)
    expected = train(twin, x, 20)
    assert not torch.equal(expected[0], expected[38])
    assert_same(train(without, x, 20), expected)
    assert_same(train(model, x, 20), expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_width_and_dtype(bits, dtype):
    model = block(bits, channels=4).to(dtype)
    with torch.no_grad():
        model[1].alpha.copy_(torch.tensor([0.1, 0.3, 0.5, 0.7]) / 2**bits)
    assert_as_plain(model, images().to(dtype))
    states = 2**bits + 1  # and one for NaN
    width = next(w for w in (1, 2, 4, 8, 16) if 2**w >= states)
    tensors, _ = kept(lambda: model(images().to(dtype)))
    elements = 2 * 4 * 7 * 6
    assert [t.numel() for t in tensors if t.dtype == torch.uint8] == [elements * width // 8]
    assert not any(t.numel() == elements for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("alpha_grad", ["exact", "three_valued", "min", "pact"])
@pytest.mark.parametrize("ste", torchqat.functional.ste_names())
def test_every_estimator_and_rule(ste, alpha_grad):
    assert_as_plain(block(3, ste=ste, alpha_grad=alpha_grad), images())


# ----------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    "layer, shape, keeps_codes",
    [
        (QuantConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 4, 9, 8), True),
        (QuantConv2d(4, 8, 3, groups=4), (2, 4, 9, 8), True),
        (QuantConv2d(4, 6, (3, 2), dilation=(1, 2), padding="same"), (2, 4, 9, 8), True),
        (QuantConv2d(4, 6, 2, padding="same"), (2, 4, 9, 8), False),
        (QuantConv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8), True),
        (QuantConv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8), False),
        (QuantConv2d(4, 6, 3), (4, 9, 8), False),
        (QuantConv2d(4, 6, 1), (0, 4, 9, 8), True),
        (QuantConv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9), True),
        (QuantConv1d(4, 6, 3), (4, 9), False),
        (QuantLinear(8, 5), (3, 8), True),
        (QuantLinear(8, 5, bias=False), (2, 3, 8), True),
        (QuantLinear(8, 5), (2, 3, 8), True),
        (QuantLinear(8, 5), (2, 2, 3, 8), True),
        (QuantLinear(8, 5, bias=False), (2, 2, 3, 8), True),
        (QuantLinear(8, 5), (8,), False),
        (QuantLinear(8, 5), (1, 8), True),
        (QuantLinear(1, 1), (4, 1), True),
        (QuantLinear(8, 5), (0, 8), True),
        (QuantMaxPool2d(2), (2, 4, 9, 8), True),
        (QuantMaxPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 4, 9, 8), True),
        (QuantMaxPool2d((2, 3), dilation=2), (2, 4, 9, 8), True),
        (QuantMaxPool2d(2), (4, 9, 8), False),
    ],
    ids=lambda v: repr(v),
)
def test_layers_are_the_plain_ones(layer, shape, keeps_codes):
    model = nn.Sequential(staircase(), layer)
    assert_as_plain(model, torch.randn(shape))
    assert_as_plain(nn.Sequential(layer), torch.randn(shape))  # not behind a staircase
    with torch.no_grad():
        torch.testing.assert_close(model(torch.ones(shape)), plain_twin(model)(torch.ones(shape)))
    x = torch.randn(shape)
    tensors, _ = kept(lambda: model(x))
    own = {p.data_ptr() for p in model.parameters()}
    floats = [t for t in tensors if t.is_floating_point() and t.data_ptr() not in own]
    assert any(t.numel() >= max(x.numel(), 2) for t in floats) == (not keeps_codes)


def test_frozen_weights_and_inputs():
    model = block()
    model[2].weight.requires_grad_(False)
    assert_as_plain(model, images())
    model = nn.Sequential(staircase(), QuantConv2d(3, 4, 3))
    model[0].alpha.requires_grad_(False)
    model(images()).sum().backward()
    assert model[1].weight.grad is not None and model[0].alpha.grad is None


def test_one_copy_serves_all_that_read():
    act, first, second, pool = staircase(), QuantConv2d(3, 4, 3), QuantConv2d(3, 4, 1), QuantMaxPool2d(2)

    def forward():
        y = act(images().requires_grad_())
        return first(y), second(y), first(pool(y))

    tensors, _ = kept(forward)
    elements = 2 * 3 * 9 * 8
    assert sorted(t.numel() for t in tensors if t.dtype == torch.uint8) == [2 * 3 * 4 * 4, elements // 2]
    assert not any(t.numel() >= elements for t in tensors if t.is_floating_point())


def test_views_of_the_activation_are_read_as_codes():
    views = {
        "slice": lambda y: y[:, 1:, ::2, 1:],
        "transpose": lambda y: y.transpose(2, 3),
        "reshape": lambda y: y.reshape(2, 4, 7, 6),
        "split": lambda y: y.split(2, dim=2)[1],
        "of a view": lambda y: y.view(2, 4, 42).view(2, 4, 6, 7).permute(0, 1, 3, 2),
    }
    for view in views.values():
        y = view(torch.zeros(2, 4, 7, 6))
        model = nn.Sequential(nn.Conv2d(3, 4, 3), staircase(), QuantConv2d(y.shape[1], 5, 2))

        def forward(net, x, view=view):
            return net[2](view(net[1](net[0](x))))

        assert_as_plain(model, images(), forward=forward)
        tensors, _ = kept(lambda model=model, forward=forward: forward(model, images()))
        assert not {y.numel(), 2 * 4 * 7 * 6} & {t.numel() for t in tensors if t.is_floating_point()}


def test_flatten_between():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), staircase(), QuantMaxPool2d(2), nn.Flatten(), QuantLinear(36, 5)
        )
        x = images().to(memory_format=memory_format)
        assert_as_plain(model, x)
        tensors, _ = kept(lambda model=model, x=x: model(x))
        floats = [t for t in tensors if t.is_floating_point() and t.numel() == 2 * 36]
        assert len(floats) == (memory_format == torch.channels_last)  # there flatten copies


def test_max_pooling_keeps_places_in_the_smallest_type():
    for side, dtype in ((16, torch.uint8), (17, torch.int16), (181, torch.int16), (182, torch.int32)):
        model = nn.Sequential(staircase(), QuantMaxPool2d(2))
        assert_as_plain(model, torch.randn(1, 2, side, side))
        tensors, y = kept(lambda model=model, side=side: model(torch.randn(1, 2, side, side)))
        assert dtype in {t.dtype for t in tensors if t.numel() == y.numel()}
        assert not any(t.is_floating_point() and t.numel() > 1 for t in tensors)


def test_max_pooling_of_nan_and_ties():
    x = torch.randn(2, 3, 8, 8)
    x[0, 0, :3] = float("nan")
    x[1, 2] = 5.0
    model = nn.Sequential(staircase(), QuantMaxPool2d(3, stride=2), QuantConv2d(3, 2, 2))
    assert_as_plain(model, x)


def test_what_is_not_a_number_goes_the_same_way():
    x = images()
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 1, 0, 0] = float("nan"), float("inf"), -float("inf")
    assert_as_plain(nn.Sequential(staircase(4), QuantConv2d(3, 4, 3)), x)
    model = nn.Sequential(staircase(4, channels=3, alpha_min=1e-30), QuantConv2d(3, 4, 3))
    with torch.no_grad():
        model[0].alpha.copy_(torch.tensor([1.0, 1e-20, 0.5]))
    x[0, 2] = 1e-44
    assert_as_plain(model, x)

    def without_a_step(net, v):
        return net[1](torchqat.functional.staircase_relu(v, torch.tensor(0.0), 2, save_codes=True))

    assert_as_plain(nn.Sequential(nn.Identity(), QuantConv2d(3, 4, 3)), x, forward=without_a_step)


# ----------------------------------------------------------------------------- what may not go wrong silently


def op_level(alpha, conv, x):
    return conv(torchqat.functional.staircase_relu(x, alpha, 2, save_codes=True))


def test_a_step_size_changed_in_place_is_caught():
    alpha, conv = torch.tensor(0.4, requires_grad=True), QuantConv2d(3, 4, 3)
    y = op_level(alpha, conv, images())
    with torch.no_grad():
        alpha.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_step_size_of_a_module_may_change():
    """What forward has used is a copy."""

    def forward(net, x):
        z = net(x)
        with torch.no_grad():
            net[1].alpha.mul_(2)
        return z

    assert_as_plain(block(), images(), forward=forward)


def test_a_weight_changed_in_place_is_caught():
    model = block()
    y = model(images())
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_given_other_memory():
    """torch's layers differ in it: a linear layer goes on with what forward has used."""

    def forward(net, x):
        z = net(x)
        net[1].weight.data = net[1].weight.data + 1
        return z

    for layer, shape in ((QuantLinear(8, 5), (3, 8)), (QuantConv2d(3, 4, 3), (2, 3, 9, 8))):
        assert_as_plain(nn.Sequential(staircase(), layer), torch.randn(shape), forward=forward)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_recipe_begins_with_changed_before_it_is_read(recompute):
    """A step size or a weight, written into between producer and reader: the reader keeps what it reads."""
    x = images()
    if recompute:
        conv, norm = QuantConv2d(3, 4, 3), torchqat.nn.QuantBatchNorm2d(4)
        conv.recompute = True
        y, changed, reader = conv(x), conv.weight, norm
    else:
        alpha, conv = torch.tensor(0.4, requires_grad=True), QuantConv2d(3, 4, 3)
        y = torchqat.functional.staircase_relu(x, alpha, 2, save_codes=True)
        changed, reader = alpha, conv
    with torch.no_grad():
        changed.mul_(2)
    (grad,) = torch.autograd.grad(reader(y).square().sum(), reader.weight)
    twin = plain_twin(reader)
    (expected,) = torch.autograd.grad(twin(y.detach()).square().sum(), twin.weight)
    assert torch.equal(grad, expected)


def other_memory(y):
    y.data = y.data * 1.5


def other_memory_twice(y):
    """The second block may begin where the first one did."""
    y.data = y.data * 1.5
    y.data = y.data + 1


def another_view(y):
    y.data = y.data.transpose(2, 3)


@pytest.mark.parametrize("change", [other_memory, other_memory_twice, another_view])
def test_an_activation_given_other_memory(change):
    model = block()
    model[1].register_forward_hook(lambda module, inputs, y: change(y))
    assert_as_plain(model, images(2, 3, 9, 9))


def test_a_negative_view_is_no_view_of_codes():
    assert_as_plain(block(), images(), forward=lambda net, x: net[2](torch._neg_view(net[1](net[0](x)))))


def test_several_threads_through_one_graph():
    """One of them gets the gradient; the others hear that the graph is gone, as in torch."""
    model, x = block(), images().requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    for _ in range(40):
        loss = model(x).sum()
        with ThreadPoolExecutor(6) as pool:
            runs = [pool.submit(torch.autograd.grad, loss, x) for _ in range(6)]
        errors = [run.exception() for run in runs]
        assert all(e is None or "backward through the graph a second time" in str(e) for e in errors)
        assert all(torch.equal(run.result()[0], expected) for run in runs if run.exception() is None)
        assert errors.count(None) >= 1


@pytest.mark.parametrize("grad", [True, False])
def test_an_activation_that_something_has_written_into(grad):
    def forward(net, x):
        y = net[1](net[0](x))
        with torch.set_grad_enabled(grad):
            y[:, 0].mul_(1.7)
        return net[2](y)

    assert_as_plain(block(), images(), forward=forward)


def test_an_activation_written_into_after_it_was_read():
    """The plain layer, whose saved input has changed, raises; the codes are still those of what was read."""

    def forward(net, x):
        y = net[1](net[0](x))
        z = net[2](y)
        with torch.no_grad():
            y.mul_(3)
        return z

    model, x = block(), images()
    twin = plain_twin(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results(twin, x, forward=lambda v: forward(twin, v))
    assert_same(results(model, x, forward=lambda v: forward(model, v)), results(plain_twin(model), x))


def test_a_hook_that_replaces_the_activation():
    model = block()
    model[1].register_forward_hook(lambda module, inputs, y: y * 1.5)
    assert_as_plain(model, images())
    model = block()
    model[2].register_forward_pre_hook(lambda module, inputs: inputs[0] + 0.01)
    assert_as_plain(model, images())


def test_staircases_of_several_widths_before_one_layer():
    model = nn.Sequential(staircase(2), staircase(4), QuantConv2d(3, 4, 3))

    def forward(net, x):
        narrow, wide = net[0](x), net[1](x * 2)
        return net[2](narrow) + net[2](wide) * net[2](narrow + wide)

    assert_as_plain(model, images(), forward=forward)


def test_dropout_between():
    model = nn.Sequential(staircase(), nn.Dropout(0.5), QuantConv2d(3, 4, 3))

    def forward(net, x):
        torch.manual_seed(3)
        return net(x)

    assert_as_plain(model, images(), forward=forward)
    assert_as_plain(model.eval(), images(), forward=forward)


def test_without_codes_it_is_the_plain_layer():
    model = block(save_codes=False)
    assert_as_plain(model, images())
    assert bytes_kept(model, images()) == bytes_kept(plain_twin(model), images())


def test_wrong_arguments_raise_as_in_torch():
    model = block()
    with pytest.raises(RuntimeError, match="expected input.* to have 3 channels"):
        model(torch.randn(2, 4, 9, 8))
    with pytest.raises(RuntimeError):
        nn.Sequential(staircase(), QuantConv2d(3, 4, 3).double())(images())
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        nn.Sequential(staircase(), QuantLinear(3, 4))(torch.randn(2, 4))


def test_the_private_operators_read_no_more_than_they_are_given():
    few, alpha = torch.zeros(7, dtype=torch.uint8), torch.tensor(0.4)
    with pytest.raises(ValueError, match="_staircase_relu_rebuild: what is kept must be 8 contiguous bytes"):
        torch.ops.qat._staircase_relu_rebuild(few, alpha, [16], [1], torch.float32, 2, 1, few)
    codes = torch.zeros(8, dtype=torch.uint8)
    rebuild = torch.ops.qat._staircase_relu_rebuild
    with pytest.raises(ValueError, match="stride \\[0\\] must be that of a dense tensor"):
        rebuild(codes, alpha, [16], [0], torch.float32, 2, 1, few)
    with pytest.raises(ValueError, match="alpha must have one element, or one for each of the 4 channels"):
        rebuild(codes, torch.ones(3), [4, 4], [4, 1], torch.float32, 2, 1, few)
    backward = torch.ops.qat._staircase_relu_backward
    with pytest.raises(ValueError, match="_staircase_relu_backward: what is kept must be 4 contiguous bytes"):
        backward(torch.ones(16), few, alpha, [16], [1], 2, "relu", "min", 1, False)
    with pytest.raises(RuntimeError, match="must match|broadcast"):
        backward(torch.ones(99), few[:4], alpha, [16], [1], 2, "relu", "min", 1, False)
    with pytest.raises(ValueError, match="stride \\[0\\] must be that of a dense tensor"):
        backward(torch.ones(16), few[:4], alpha, [16], [0], 2, "relu", "min", 1, False)


# ------------------------------------------------------------------------------------ graphs and their memory


def test_backward_twice_needs_the_graph():
    model, x = block(), images().requires_grad_()
    loss = model(x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(
    "layer, shape, name",
    [
        (QuantConv2d(3, 4, 3), (2, 3, 9, 8), "convolution"),
        (QuantLinear(8, 4), (2, 8), "linear"),
        (QuantMaxPool2d(2), (2, 3, 9, 8), "max_pool2d"),
    ],
)
def test_second_derivatives_are_refused(layer, shape, name):
    x = torch.randn(shape, requires_grad=True)
    y = layer(staircase()(x)).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad.sum().backward()
    if list(layer.parameters()):
        y = layer(staircase()(x)).square().sum()
        (grad,) = torch.autograd.grad(y, layer.weight, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{name}: second derivatives"):
            grad.sum().backward()


def test_codes_go_with_the_graph():
    model = block()
    tensors, z = kept(lambda: model(images()))
    (codes,) = [weakref.ref(t) for t in tensors if t.dtype == torch.uint8]
    del tensors
    gc.collect()
    assert codes() is not None
    z.sum().backward()
    gc.collect()
    assert codes() is None


def checkpointed(**options):
    return lambda net, x: checkpoint(net, x, **options)


@pytest.mark.parametrize(
    "forward",
    [
        checkpointed(use_reentrant=False),
        checkpointed(use_reentrant=True),
        lambda net, x: checkpoint(net[2:], net[:2](x), use_reentrant=False),
        lambda net, x: net[2:](checkpoint(net[:2], x, use_reentrant=False)),
        lambda net, x: net[3:](checkpoint(net[1:3], net[:1](x), use_reentrant=False)),
        lambda net, x: checkpoint(lambda v: net[2:](net[:2](v)), x, use_reentrant=False),
    ],
    ids=["whole", "reentrant", "tail", "head", "middle", "function"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing(forward, recompute):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    model = nn.Sequential(*model, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2))
    assert_as_plain(torchqat.prepare(model, 2, recompute=recompute), images(), forward=forward)


def nested(net, x):
    return checkpoint(lambda v: checkpoint(net[2:], net[:2](v), use_reentrant=False), x, use_reentrant=False)


def offloaded(net, x):
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(net[2:], net[:2](x), use_reentrant=False)


@pytest.mark.parametrize("forward", [nested, offloaded])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpoints_inside_other_hooks(forward, recompute):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert_as_plain(torchqat.prepare(model, 2, recompute=recompute), images(), forward=forward)


def test_saved_tensors_may_be_elsewhere():
    def forward(net, x):
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    assert_as_plain(block(), images(), forward=forward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(network, dtype, recompute, device):
    model, x = network("lenet5")
    model = torchqat.prepare(model, 2, recompute=recompute)

    def forward(net, v):
        with torch.autocast(device.type, dtype):
            return net(v)

    assert_as_plain(model, x, forward=forward)
    with torch.autocast(device.type, dtype):
        assert bytes_kept(model, x) < 0.75 * bytes_kept(plain_twin(model), x)  # with the weights' copies


@pytest.fixture
def one_layout():
    """Inductor lays out each convolution as it likes, and a recomputed one in another way than the first."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(layout_optimization=False):
        yield


def assert_compiles_as_plain(model, inputs, forward=None, **options):
    """One graph; bit by bit what compiling the plain network gives."""
    twin = plain_twin(model)
    ours = torch.compile(model if forward is None else lambda x: forward(model, x), fullgraph=True, **options)
    theirs = torch.compile(twin if forward is None else lambda x: forward(twin, x), fullgraph=True, **options)
    for x in inputs:
        assert_same(results(model, x, forward=ours), results(twin, x, forward=theirs))
    with torch.no_grad():
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_inside_autocast_of_a_forward_outside(device, recompute):
    model, x = normalized(recompute), images()
    expected = results(model, x)
    y = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
        model.zero_grad()
        loss.backward()
    assert_same([p.grad for p in model.parameters()], expected[2:])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compile(network, one_layout, backend, recompute):
    model, x = network("lenet5")
    assert_compiles_as_plain(torchqat.prepare(model, 2, recompute=recompute), [x], backend=backend)


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_of_batches_of_any_size(network, one_layout, recompute):
    model, x = network("lenet5")
    model = torchqat.prepare(model, 2, recompute=recompute)
    assert_compiles_as_plain(model, [x, x[:3]], backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_of_bfloat16_in_channels_last(network, one_layout, recompute):
    model, x = network("lenet5")
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    x = x.to(torch.bfloat16, memory_format=torch.channels_last)
    assert_compiles_as_plain(torchqat.prepare(model, 2, recompute=recompute), [x], backend="inductor")


def test_compile_in_autocast(network, one_layout, device):
    model, x = network("lenet5")

    def forward(net, v):
        with torch.autocast(device.type, torch.bfloat16):
            return net(v)

    assert_compiles_as_plain(torchqat.prepare(model, 2, recompute=True), [x], forward, backend="aot_eager")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_network_keeps_no_more(backend, recompute):
    torch._dynamo.reset()
    model = torchqat.prepare(nn.Sequential(*block_with_norm(), *block_with_norm(4)), 2, recompute=recompute)
    x = images(2, 3, 16, 16)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())  # inductor copies them
    assert bytes_kept(compiled, x) <= bytes_kept(model, x) + 2 * weights
    assert 3 * weights < bytes_kept(plain_twin(model), x) - bytes_kept(model, x)


def test_compiled_autograd(network):
    torch._dynamo.reset()
    model, x = network("lenet5")
    model = torchqat.prepare(model, 2, recompute=True)
    twin = plain_twin(model)
    loss = F.cross_entropy(model(x), torch.arange(4))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    F.cross_entropy(twin(x), torch.arange(4)).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_compiled_autograd_of_a_graph_that_is_gone():
    torch._dynamo.reset()
    loss = block()(images()).sum()
    loss.backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_func_transforms():
    model, x = block().eval(), images()

    def grads(net):
        def loss(params, image):
            return torch.func.functional_call(net, params, (image[None],)).square().sum()

        params = dict(net.named_parameters())
        one = torch.func.grad(loss)(params, x[0])
        return one, torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)

    torch.testing.assert_close(grads(model), grads(plain_twin(model)))


@pytest.mark.filterwarnings("error")  # torch says where it takes sample by sample
@pytest.mark.parametrize("recompute", [False, True])
def test_vmap_batches_as_torchs_own_layers_do(recompute):
    model = nn.Sequential(*normalized(recompute), QuantMaxPool2d(2), nn.Flatten(), QuantLinear(20, 3)).eval()
    twin, x = plain_twin(model), images(4, 2, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(x), torch.vmap(twin)(x))
    params = {name: torch.stack([p, p + 1]) for name, p in model.named_parameters()}

    def ensemble(net):
        return torch.vmap(lambda p, v: torch.func.functional_call(net, p, (v,)), (0, None))(params, x[0])

    with torch.no_grad():
        torch.testing.assert_close(ensemble(model), ensemble(twin))


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_mode_goes_through_torchs_own_layers(recompute):
    conv = QuantConv2d(3, 4, 3)
    conv.recompute = recompute
    x, tangent = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    y = staircase()(x)

    def by_weight(weight):
        return torch.func.functional_call(conv, {"weight": weight}, (y.detach(),))

    _, derivative = torch.func.jvp(by_weight, (conv.weight,), (tangent,))
    assert torch.equal(derivative, F.conv2d(y, tangent))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(conv.weight, tangent)
        z = torch.func.functional_call(conv, {"weight": dual}, (y,))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(z).tangent, F.conv2d(y, tangent))


def test_export_has_torchs_own_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2)
    )
    model = torchqat.prepare(nn.Sequential(*model, nn.Flatten(), nn.Linear(20, 2)), 2, recompute=True).eval()
    program = torch.export.export(model, (images(),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {t for t in targets if t.startswith("qat.")} <= {
        "qat.staircase_relu.default",
        "qat._bounded_alpha.default",
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_tracing_has_torchs_own_layers():
    model = torchqat.prepare(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), 2)
    traced = torch.jit.trace(model, images())
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::_convolution" in kinds and "qat::_convolution" not in kinds


def _train_in_parallel(rank, store, recompute):
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(normalized(recompute), nn.Flatten(), nn.Linear(100, 10))
    twin, alone = plain_twin(model), copy.deepcopy(model)
    torch.manual_seed(rank)
    x = images(4, 3, 9, 8)
    trained = [train(nn.parallel.DistributedDataParallel(net), x, 3) for net in (model, twin)]
    assert_same(*trained)
    assert not torch.equal(trained[0][4], train(alone, x, 3)[4])  # the other rank's images count
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_distributed_data_parallel(tmp_path, recompute):
    torch.multiprocessing.spawn(_train_in_parallel, (f"file://{tmp_path}/store", recompute), nprocs=2)


# ------------------------------------------------------------------------------------------------ recomputing


def normalized(recompute=True, norm=None):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm or nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)
    )
    model = nn.Sequential(*model, nn.BatchNorm2d(5), nn.ReLU())
    return torchqat.prepare(model, 2, recompute=recompute)


def test_running_statistics_move_once_and_random_state_stays():
    model, x = normalized(), images()
    twin = plain_twin(model)
    before = torch.random.get_rng_state()
    assert_same(results(model, x), results(twin, x))
    assert torch.equal(before, torch.random.get_rng_state())
    assert_same(list(model.state_dict().values()), list(twin.state_dict().values()))
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm2d(4), (1, 3, 3, 3)), (nn.BatchNorm1d(4), (1, 3, 3))])
def test_one_value_per_channel_is_refused_as_in_torch(norm, shape):
    conv = nn.Conv2d(3, 4, 3) if len(shape) == 4 else nn.Conv1d(3, 4, 3)
    model = torchqat.prepare(nn.Sequential(nn.ReLU(), conv, norm), 2, recompute=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.randn(shape))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=0.0),
        nn.GroupNorm(2, 4),
    ],
    ids=repr,
)
def test_every_kind_of_normalization(norm):
    model, x = normalized(norm=norm), images()
    twin = plain_twin(model)
    for _ in range(2):
        assert_same(results(model, x), results(twin, x))
    assert_same(list(model.state_dict().values()), list(twin.state_dict().values()))
    assert_same(results(model.eval(), x), results(twin.eval(), x))


def test_an_empty_batch():
    model, x = normalized(), images(0, 3, 9, 8)
    assert_as_plain(model, x)
    assert torchqat.memory_report(model, x).layers


def test_a_frozen_convolution_is_recomputed_too():
    model, x = normalized(), images()
    before = bytes_kept(model, x)
    model[0].requires_grad_(False)
    assert bytes_kept(model, x) <= before
    y, twin = model(x), plain_twin(model)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is b.grad or torch.equal(a.grad, b.grad)
    assert_as_plain(model, x)


def test_a_recomputed_block_keeps_codes_and_statistics_alone():
    model, x = normalized(), images(2, 3, 20, 20)
    tensors, y = kept(lambda: model(x))
    floats = [t for t in tensors if t.is_floating_point() and t.numel() > 4 * 5 * 9]
    assert [t.data_ptr() for t in floats] == [x.data_ptr()]
    codes = [t for t in tensors if t.dtype == torch.uint8 and t.numel() > 0]
    assert sorted(t.numel() for t in codes) == sorted([2 * 4 * 18 * 18 // 2, y.numel() // 4])


# ------------------------------------------------------------------------------------------------- as modules


def test_a_layer_of_torch_becomes_ours_and_back():
    conv = nn.Conv2d(3, 4, 3)
    handle = conv.register_forward_hook(lambda module, inputs, y: None)
    weight, state = conv.weight, conv.state_dict()
    conv.__class__ = QuantConv2d
    assert conv.weight is weight and repr(conv) == repr(nn.Conv2d(3, 4, 3)).replace("Conv2d", "QuantConv2d")
    nn.Conv2d(3, 4, 3).load_state_dict(conv.state_dict())
    conv.load_state_dict(state)
    handle.remove()


def test_copies_and_pickles():
    model, x = block(), images()
    assert_same(results(copy.deepcopy(model), x), results(model, x))
    assert_same(results(pickle.loads(pickle.dumps(model)), x), results(model, x))
