"""BCGD: what a step does, against torch.optim.SGD and the formulas of the paper."""

import copy
import warnings

import pytest
import torch
import torchqat
from small_nets import assert_same, batch, quantized, small_net, snapshot, train
from torch.nn import functional as F
from torchqat.optim import BCGD

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
LRS = [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)]


def random_params(dtype=torch.float32, device="cpu", shapes=((4, 3), (5,), ())):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in values]


def plain(params):
    """Groups that say that they are not quantized; without a word BCGD warns."""
    return [{"params": list(params), "quant_bits": None}]


def set_gradients(params, step):
    """The same for equal parameters; every third time one parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if step % 3 == 1 and i == 1:
            p.grad = None


# ---- groups without quant_bits ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", LRS, ids=["number", "0-dim", "1-element"])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_a_group_without_quant_bits_is_sgd_bit_for_bit(options, lr, dtype, device):
    ours, theirs = random_params(dtype, device), random_params(dtype, device)
    bcgd = BCGD(plain(ours), lr=lr, **options)
    sgd = torch.optim.SGD(theirs, lr=lr, foreach=False, fused=False, **options)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        bcgd.step()
        sgd.step()
        assert_same(ours, theirs)
        assert_same(bcgd.state_dict()["state"], sgd.state_dict()["state"])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [2.0**10, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_group_is_sgd_under_a_gradient_scaler_too(dtype, scale, unscale):
    runs = []
    for make in (BCGD, lambda *a, **k: torch.optim.SGD(*a, foreach=False, fused=False, **k)):
        params = random_params(dtype)
        optimizer = make(plain(params), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        seen = []
        for step in range(5):
            set_gradients(params, step)
            for p in params:
                if p.grad is not None:
                    p.grad = scaler.scale(p.grad).to(p.dtype)
            if step in (0, 3):
                params[0].grad[0, 0] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            seen.append(copy.deepcopy((params, optimizer.state_dict()["state"])))
        runs.append(seen)
    assert_same(*runs)


def test_min_value_clamps_after_the_step():
    low, free = random_params(shapes=((3,), (3,)))
    optimizer = BCGD([{"params": [low], "min_value": 0.25}, *plain([free])], lr=1.0)
    for p in (low, free):
        p.grad = torch.tensor([10.0, -10.0, torch.nan])
    expected = low.detach() - low.grad, free.detach() - free.grad
    optimizer.step()
    assert_same(low.detach(), expected[0].clamp(min=0.25))
    assert_same(free.detach(), expected[1])


# ---- quantized groups ----


def binary(y):
    return torch.where(y < 0, -y.abs().mean(), y.abs().mean())


def ternary(y):
    """The support of the k largest maximizes S_k^2 / k."""
    magnitude = y.abs().flatten().sort(descending=True).values
    sums, counts = magnitude.cumsum(0), torch.arange(1, len(magnitude) + 1, device=y.device)
    best = (sums**2 / counts).argmax()
    return torch.where(y.abs() >= magnitude[best], y.sign() * sums[best] / counts[best], 0.0)


@pytest.mark.parametrize("bits, project", [(1, binary), (2, ternary)])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_the_trajectory_is_that_of_the_paper(options, bits, project, device):
    """y <- (1 - rho) y + rho w, an SGD step on y with the gradient at w, w <- Proj(y)."""
    p = random_params(torch.float64, device, shapes=((6, 5),))[0]
    y = p.detach().clone()
    rho, reference = 0.01, torch.optim.SGD([y], lr=0.1, **options)
    optimizer = BCGD([{"params": [p], "quant_bits": bits}], lr=0.1, blend=rho, **options)
    target = torch.randn(6, 5, dtype=torch.float64).to(device)
    for _ in range(20):
        w = project(y)
        torch.testing.assert_close(p.detach(), w)
        optimizer.zero_grad()
        F.mse_loss(p.sin(), target).backward()
        y.copy_((1 - rho) * y + rho * w)
        y.grad = p.grad
        reference.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.latent(p), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "group",
    [{"quant_bits": 1}, {"quant_bits": 2, "channel_dim": 0}, {"quant_bits": 2, "method": "twn"},
     {"quant_bits": 4, "channel_dim": -1}, {"quant_bits": 4, "method": "lloyd"}, {"quant_bits": 8}],
)  # fmt: skip
def test_parameters_are_quantized_when_the_optimizer_is_made(group, dtype, device):
    p = random_params(dtype, device, shapes=((4, 3),))[0]
    before = p.detach().clone()
    optimizer = BCGD([{"params": [p], **group}], lr=0.1)
    options = {k: v for k, v in group.items() if k != "quant_bits"}
    computed = before.double() if dtype == torch.float64 else before.float()
    w, scale = torchqat.functional.quantize_weight(computed, group["quant_bits"], **options)
    assert_same(p.detach(), w.to(dtype))
    assert_same(optimizer.latent(p), computed)
    assert_same(optimizer.state[p]["scale"], scale)


def test_late_groups_are_quantized_and_trained():
    first, late = random_params(shapes=((4, 3), (5, 2)))
    optimizer = BCGD([{"params": [first], "quant_bits": 1}], lr=0.1, momentum=0.9)
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [late], "quant_bits": 2, "lr": 0.01})
    assert late.unique().numel() <= 3
    latent = optimizer.latent(late).clone()
    late.grad = torch.ones_like(late)
    optimizer.step()
    torch.testing.assert_close(optimizer.latent(late), latent - 0.01)


def test_parameters_without_gradient_stay_untouched():
    model = small_net()
    optimizer = quantized(model)
    before = snapshot(model, optimizer)
    versions = [p._version for p in model.parameters()]
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert versions == [p._version for p in model.parameters()]


def test_groups_of_several_dtypes_take_the_steps_of_groups_of_one():
    mixed, apart = ([q for d in DTYPES for q in random_params(d)] for _ in range(2))
    one = BCGD([{"params": mixed, "quant_bits": 2}], lr=0.1, momentum=0.9)
    many = BCGD([{"params": [p], "quant_bits": 2} for p in apart], lr=0.1, momentum=0.9)
    for step in range(4):
        set_gradients(mixed, step)
        set_gradients(apart, step)
        one.step()
        many.step()
    assert_same(mixed, apart)
    assert_same(one.state_dict()["state"], many.state_dict()["state"])


def test_one_call_of_the_operator_for_each_group(monkeypatch):
    calls = []
    step = torchqat.functional.bcgd_step_
    monkeypatch.setattr(
        torchqat.functional, "bcgd_step_", lambda *a, **k: (calls.append(len(a[0])), step(*a, **k))
    )
    params = random_params() + random_params(torch.bfloat16) + random_params(shapes=((7, 7),))
    optimizer = BCGD(
        [{"params": params[:6], "quant_bits": 1}, {"params": params[6:], "quant_bits": 2}],
        lr=0.1,
        momentum=0.9,
    )
    set_gradients(params, 0)
    optimizer.step()
    assert calls == [6, 1]


def test_lr_may_be_a_number_or_a_tensor():
    results = []
    for lr in LRS:
        model = small_net()
        optimizer = quantized(model, lr=lr.double() if isinstance(lr, torch.Tensor) else lr)
        optimizer.param_groups[0]["lr"] = torch.as_tensor(0.1, dtype=torch.float64).reshape(
            torch.as_tensor(lr).shape
        )
        for group in optimizer.param_groups[1:]:
            group["lr"] = 0.1
        train(model, optimizer, 3)
        results.append(model.state_dict())
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_cosine_to_zero_then_nothing_but_the_blend_moves(tensor_lr):
    model = small_net()
    optimizer = quantized(model, lr=torch.tensor(0.05) if tensor_lr else 0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for step in range(4):
        train(model, optimizer, 1, first=step)
        scheduler.step()
    assert all(float(group["lr"]) == pytest.approx(0, abs=1e-9) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["blend"] = 0.0
    weight = model[0].weight
    latent, w = optimizer.latent(weight).clone(), weight.detach().clone()
    train(model, optimizer, 1, first=4)
    torch.testing.assert_close(optimizer.latent(weight), latent, rtol=0, atol=1e-9)
    torch.testing.assert_close(weight.detach(), w, rtol=0, atol=1e-9)


def test_a_closure_is_evaluated_with_gradients():
    model, other = small_net(), small_net()
    optimizer, plain_call = quantized(model), quantized(other)
    x, target = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert_same(loss.detach(), train(other, plain_call, 1).detach())
    assert_same(snapshot(model, optimizer), snapshot(other, plain_call))


def test_a_step_is_seen_by_autograd():
    """Backward through weights that a step has changed since must raise."""
    model = small_net()
    optimizer = quantized(model)
    x, target = batch(0)
    loss = F.cross_entropy(model(x), target)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_momentum_may_be_switched_on_later():
    p = random_params(shapes=((4, 3),))[0]
    optimizer = BCGD([{"params": [p], "quant_bits": 1}], lr=0.1, dampening=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert "momentum_buffer" not in optimizer.state[p]
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert_same(optimizer.state[p]["momentum_buffer"], torch.ones_like(p))
    assert optimizer.state[p]["step"] == 1


def test_quant_bits_may_be_switched_on_later_and_momentum_goes_on():
    p = random_params(torch.bfloat16, shapes=((4, 3),))[0]
    optimizer = BCGD(plain([p]), lr=0.1, momentum=0.9)
    for bits in (None, 1):
        optimizer.param_groups[0]["quant_bits"] = bits
        p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert p.detach().abs().unique().numel() == 1
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full((4, 3), 1.9))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_same_seed_same_numbers(bits):
    runs = []
    for _ in range(2):
        model = small_net()
        optimizer = quantized(model, bits)
        train(model, optimizer, 5)
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


# ---- a skipped step ----


def poisoned_step(model, optimizer, scaler):
    """A step of a gradient scaler that finds an infinite gradient."""
    x, target = batch(0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), target)).backward()
    model[0].weight.grad[0, 0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("steps", [0, 2], ids=["first", "third"])
def test_a_skipped_step_changes_nothing_at_all(steps):
    model = small_net()
    optimizer = quantized(model)
    train(model, optimizer, steps)
    x, target = batch(0)
    F.cross_entropy(model(x), target)  # batch statistics move in forward, before the snapshot too
    optimizer_before, params_before = copy.deepcopy((optimizer.state_dict(), list(model.parameters())))
    poisoned_step(model, optimizer, torch.amp.GradScaler("cpu"))
    assert_same(optimizer.state_dict(), optimizer_before)
    assert_same(list(model.parameters()), params_before)


def test_a_skipped_step_does_not_even_take_over_changes_from_outside():
    model = small_net()
    optimizer = quantized(model)
    with torch.no_grad():
        model[0].weight.mul_(3).add_(1)
    before, state = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poisoned_step(model, optimizer, torch.amp.GradScaler("cpu"))
    assert_same(list(model.parameters()), before)
    assert_same(optimizer.state_dict(), state)


def test_a_skipped_step_of_quantized_groups_alone_is_left_to_the_operator(monkeypatch):
    p = random_params(shapes=((4, 3),))[0]
    optimizer = BCGD([{"params": [p], "quant_bits": 1}], lr=0.1, momentum=0.9)
    p.grad = torch.full_like(p, torch.nan)
    before = copy.deepcopy((p, optimizer.state_dict()))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("read on the host"))
    optimizer.step()
    assert_same([p, optimizer.state_dict()], list(before))


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_nothing_in_exact_arithmetic(unscale):
    """A scale that is a power of two cancels without rounding."""
    model, reference = small_net(), small_net()
    # Backward clips alpha's gradient while it is still scaled.
    model[2].alpha_grad_clip = reference[2].alpha_grad_clip = float("inf")
    optimizer, plain = quantized(model), quantized(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(4):
        x, target = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), target)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train(reference, plain, 1, first=step)
    assert_same(snapshot(model, optimizer), snapshot(reference, plain))
    assert not hasattr(optimizer, "grad_scale")


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, "must have one element"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"lr": torch.tensor(float("inf"))}, "lr must be finite, got inf"),
        ({"momentum": float("inf")}, "momentum must be finite, got inf"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite, got inf"),
        ({"dampening": float("-inf")}, "dampening must be finite, got -inf"),
        ({"dampening": float("nan")}, "dampening must be finite, got nan"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"blend": 1.5}, "blend must be in 0..1, got 1.5"),
        ({"nesterov": True}, "Nesterov momentum requires"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BCGD(random_params(), **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        BCGD([{"params": random_params(), **options}], lr=0.1)


@pytest.mark.parametrize("group", [{}, {"quant_bits": 1}])
def test_lr_must_not_be_a_tensor_of_integers(group):
    with pytest.raises(TypeError, match="a tensor as lr must be floating point, got torch.int64"):
        BCGD([{"params": random_params(), **group}], lr=torch.tensor(1))
    with pytest.raises(TypeError, match="a tensor as lr must be floating point, got torch.int64"):
        BCGD([{"params": random_params(), **group, "lr": torch.tensor(1)}], lr=0.1)


@pytest.mark.parametrize(
    "group, error, message",
    [
        ({"quant_bits": 0}, ValueError, "quant_bits must be in 1..8, got 0"),
        ({"quant_bits": 9}, ValueError, "quant_bits must be in 1..8, got 9"),
        ({"quant_bits": 2.0}, TypeError, "quant_bits must be an int, got 2.0"),
        ({"quant_bits": True}, TypeError, "quant_bits must be an int"),
        ({"quant_bits": 1, "method": "best"}, ValueError, "exact, lloyd, twn"),
        ({"quant_bits": 4, "method": "twn"}, ValueError, "twn"),
        ({"quant_bits": 1, "channel_dim": 5}, (ValueError, IndexError), "channel_dim"),
        ({"quant_bits": 1, "min_value": 0.1}, ValueError, "min_value is for groups without quant_bits"),
        ({"quant_bits": 1, "lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"momentum": -1}, ValueError, "momentum must be at least 0, got -1"),
        ({"quantbits": 1}, ValueError, "must be among .*quant_bits, channel_dim.*, got 'quantbits'"),
        ({"weight_bits": 1}, ValueError, "got 'weight_bits'"),
        ({"bits": 1, "quant_bits": 1}, ValueError, "got 'bits'"),
        ({"quant_bits": 1, "chanel_dim": 0}, ValueError, "got 'chanel_dim'"),
        ({"quant_bits": 1, "lr_scale": 0.5}, ValueError, "got 'lr_scale'"),
        (
            {"quant_bits": 1, "params": [torch.zeros(3, dtype=torch.int64)]},
            TypeError,
            "floating point, got torch.int64",
        ),
        ({"quant_bits": 1, "params": [torch.zeros(3, dtype=torch.complex64)]}, TypeError, "torch.complex64"),
    ],
)
def test_a_bad_group_is_refused_and_leaves_the_optimizer_as_it_was(group, error, message):
    kept, fresh = random_params(), random_params(shapes=((4, 3), (2, 2)))
    optimizer = BCGD([{"params": kept, "quant_bits": 1}], lr=0.1)
    before, values = copy.deepcopy((optimizer.state_dict(), fresh))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": fresh, **group})
    assert_same(optimizer.state_dict(), before)
    assert_same(fresh, values)
    with pytest.raises(error, match=message):
        BCGD([{"params": fresh, **group}], lr=0.1)


#: What is refused before anything is written, and by the writing itself.
REFUSED = [
    {"params": [torch.zeros(3)], "quant_bits": 9},
    {"params": [torch.zeros(3)], "quant_bits": 4, "method": "twn"},
    {"params": [torch.zeros(3)], "quant_bits": 1, "channel_dim": 5},
    {"params": [torch.zeros(3, dtype=torch.int64)], "quant_bits": 1},
    {"params": [torch.zeros(1).expand(3)], "quant_bits": 1},
]


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refused_group_leaves_the_weights_of_those_before_it(refused, dtype):
    params = random_params(dtype)
    values = copy.deepcopy(params)
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
        BCGD([{"params": params, "quant_bits": 2}, refused], lr=0.1, momentum=0.9)
    assert_same(params, values)


def test_a_group_that_cannot_be_written_leaves_its_weights_and_can_be_added_again():
    kept, fresh = random_params(), random_params(shapes=((4, 3), (2, 2)))
    optimizer = BCGD([{"params": kept, "quant_bits": 1}], lr=0.1)
    before, values = copy.deepcopy((optimizer.state_dict(), fresh))
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.add_param_group({"params": [*fresh, torch.zeros(1).expand(3)], "quant_bits": 1})
    assert_same(optimizer.state_dict(), before)
    assert_same(fresh, values)
    optimizer.add_param_group({"params": fresh, "quant_bits": 1})
    assert_same(optimizer.latent(fresh[0]), values[0].detach())


def schedulers(optimizer):
    scheduled = torch.optim.lr_scheduler
    return [
        scheduled.CosineAnnealingLR(optimizer, 4),
        scheduled.OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
        scheduled.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1),
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    ]


def test_groups_may_have_keys_of_torch_and_load_them():
    def made(groups):
        return BCGD(groups, lr=0.1, momentum=0.9)

    first = made([{"params": random_params(), "quant_bits": 1, "name": "weights"}])
    keys = set(first.param_groups[0])
    schedulers(first)
    first.param_groups[0]["my_own"] = 3
    assert {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"} <= (
        set(first.param_groups[0]) - keys
    )
    second = made([{"params": random_params(), "quant_bits": 1}])
    second.load_state_dict(first.state_dict())
    assert_same(second.state_dict(), first.state_dict())
    del first.param_groups[0]["my_own"]
    made(first.param_groups)
    made([{"params": [("weight", random_params()[0])], "quant_bits": 1}])  # with torch's param_names


def test_a_model_that_nothing_quantizes_is_told_of():
    message = "BCGD: no group has quant_bits.*torchqat.optim.param_groups"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = BCGD(small_net().parameters(), lr=0.1)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match=message):
        BCGD([{"params": random_params(), "lr": 0.5}], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": random_params(shapes=((5, 5),)), "quant_bits": 1})
        BCGD(torchqat.optim.param_groups(small_net(), None), lr=0.1)  # float on purpose
        quantized(small_net())
    assert optimizer.param_groups[1]["params"][0].abs().unique().numel() == 1


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    dense = random_params()
    optimizer = BCGD(
        [{"params": dense, "quant_bits": 1}, {"params": embedding.weight, "quant_bits": 1}], lr=0.1
    )
    set_gradients(dense, 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="must be dense, got a sparse one"):
        optimizer.step()
    assert_same(optimizer.state_dict(), before)


def test_sparse_gradients_of_plain_groups_are_those_of_sgd():
    results = []
    for make in (BCGD, lambda params, lr: torch.optim.SGD(params, lr=lr, foreach=False)):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(5, 3, sparse=True)
        optimizer = make(plain(embedding.parameters()), lr=0.1)
        embedding(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        results.append(embedding.weight.detach())
    assert_same(*results)


def test_latent_is_only_for_quantized_parameters():
    model = small_net()
    optimizer = quantized(model)
    with pytest.raises(ValueError, match="groups with quant_bits"):
        optimizer.latent(model[1].weight)
