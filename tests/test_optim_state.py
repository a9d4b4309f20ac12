"""BCGD's latents: reading, swapping, changes from outside, checkpoints."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from small_nets import assert_same, quantized, small_net, snapshot, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchqat.optim import BCGD

pytestmark = pytest.mark.filterwarnings("error:BCGD")
LOST = "BCGD: .* changed outside the optimizer"
SETTINGS = [
    {"bits": 1},
    {"bits": 2, "channel_dim": 0},
    {"bits": 2, "method": "twn"},
    {"bits": 4},
    {"bits": 4, "method": "lloyd", "channel_dim": 0},
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def trained(steps=3, dtype=torch.float32, seed=0, **options):
    model = small_net(seed, dtype)
    optimizer = quantized(model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- latents() ----


@every_setting
def test_latents_are_swapped_in_and_w_comes_back(setting):
    model, optimizer = trained(**setting)
    control = copy.deepcopy((model, optimizer))
    weight = model[0].weight
    before, latent = snapshot(model, optimizer), optimizer.latent(weight).clone()
    with optimizer.latents():
        assert_same(weight.detach(), latent)
        assert_same(model[4].weight.detach(), optimizer.latent(model[4].weight))
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 3)
    train(*control, 3)
    assert_same(snapshot(model, optimizer), snapshot(*control))


def test_w_comes_back_after_an_exception_and_an_edit():
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(KeyError), optimizer.latents():
        with torch.no_grad():
            model[0].weight.zero_()
        raise KeyError
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 1)


@pytest.mark.parametrize("what", ["step", "latents", "refresh", "load_state_dict"])
def test_the_optimizer_rests_inside_latents(what):
    model, optimizer = trained()
    arguments = [optimizer.state_dict()] if what == "load_state_dict" else []
    before = snapshot(model, optimizer)
    with optimizer.latents(), pytest.raises(RuntimeError, match=f"{what} must not be called inside latents"):
        with getattr(optimizer, what)(*arguments):
            pass
    assert_same(snapshot(model, optimizer), before)


def test_half_precision_parameters_hold_rounded_latents():
    _, optimizer = trained()
    p = torch.nn.Parameter(torch.randn(5, 4).bfloat16())
    optimizer = BCGD([{"params": [p], "quant_bits": 1}], lr=0.1)
    p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    latent = optimizer.latent(p)
    assert latent.dtype == torch.float32 and not torch.equal(latent, latent.bfloat16().float())
    with optimizer.latents():
        assert_same(p.detach(), latent.bfloat16())


# ---- changes from outside ----


def test_a_changed_parameter_gets_a_new_latent_with_one_warning():
    model, optimizer = trained()
    for repeat in range(2):
        for layer in (model[0], model[4]):
            with torch.no_grad():
                layer.weight.copy_(torch.randn_like(layer.weight))
        new = model[0].weight.detach().clone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with optimizer.latents():
                assert_same(model[0].weight.detach(), new)
        assert len(caught) == (1 if repeat == 0 else 0)
        if caught:
            assert "2 parameter(s) changed" in str(caught[0].message)
    assert model[0].weight.unique().numel() == 2


def test_the_step_after_a_change_starts_from_the_new_values():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = BCGD([{"params": [p], "quant_bits": 1}], lr=0.5, momentum=0.9, blend=0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        p.copy_(torch.tensor([7.0, 8.0, -9.0]))
    with pytest.warns(UserWarning, match=LOST):
        optimizer.step()
    torch.testing.assert_close(
        optimizer.latent(p), torch.tensor([7.0, 8.0, -9.0]) - 0.5 * 1.9
    )  # momentum goes on
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 1.0, -1.0]) * optimizer.latent(p).abs().mean())


def test_new_storage_is_a_change():
    model, optimizer = trained()
    model[0].weight.data = torch.randn_like(model[0].weight)
    with pytest.warns(UserWarning, match=LOST):
        train(model, optimizer, 1)


def test_writes_through_data_are_seen_by_refresh_only():
    model, optimizer = trained()
    reference, control = trained()
    new = torch.randn_like(model[0].weight)
    model[0].weight.data.copy_(new)
    optimizer.refresh()
    assert_same(optimizer.latent(model[0].weight), new)
    train(model, optimizer, 1)

    control.param_groups[0]["blend"] = 0.0
    latent = control.latent(reference[0].weight).clone()
    reference[0].weight.data.copy_(new)
    train(reference, control, 1)  # the write is lost, but for the gradient
    moved = latent - 0.05 * control.state[reference[0].weight]["momentum_buffer"]
    torch.testing.assert_close(control.latent(reference[0].weight), moved)


@every_setting
@pytest.mark.parametrize("through_data", [False, True])
def test_values_swapped_out_and_back_change_nothing(setting, through_data):
    """What averaging schemes do to evaluate: store, copy the average in, restore."""
    model, optimizer = trained(**setting)
    control = copy.deepcopy((model, optimizer))
    for step in range(3):
        held = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            (p.data if through_data else p.detach()).mul_(0.5)
        for p, value in zip(model.parameters(), held, strict=True):
            (p.data if through_data else p.detach()).copy_(value)
        train(model, optimizer, 1, first=step)
    train(*control, 3)
    assert_same(snapshot(model, optimizer), snapshot(*control))


def test_a_parameter_without_gradient_is_left_as_it_was_set():
    model, optimizer = trained()
    optimizer.zero_grad()
    with torch.no_grad():
        model[0].weight.fill_(0.3)
    optimizer.step()
    assert (model[0].weight == 0.3).all()


def test_state_follows_a_model_that_is_cast():
    model, optimizer = trained(bits=2)
    latent = optimizer.latent(model[0].weight).clone()
    model.double()
    for p in optimizer.param_groups[1]["params"] + optimizer.param_groups[2]["params"]:
        optimizer.state.pop(p)  # of plain groups, as with torch.optim.SGD, the user takes care
    with optimizer.latents():
        assert_same(model[0].weight.detach(), latent.double())
    train(model, optimizer, 1)


def test_a_cleared_state_starts_anew_without_warning():
    model, optimizer = trained()
    w = model[0].weight.detach().clone()
    optimizer.state.clear()
    with optimizer.latents():
        assert_same(model[0].weight.detach(), w)
    train(model, optimizer, 2)


def test_nan_weights_are_not_taken_for_a_change():
    model, optimizer = trained()
    model[0].weight.grad.fill_(torch.nan)
    optimizer.step()
    with torch.no_grad():
        model[0].weight.mul_(1.0)  # a new version of the same values
    with optimizer.latents():
        assert model[0].weight.isnan().all()


# ---- parameters that are quantized already ----


STARTED = r"BCGD: 2 parameter\(s\), the first of shape \(6, 2, 3, 3\), held quantized values"


# Rounding to half precision moves lloyd's scale too far for its weights to be told from others.
SEEN = [(setting, dtype) for setting in SETTINGS for dtype in (torch.float64, torch.float32)] + [
    (setting, dtype) for setting in SETTINGS[:4] for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("setting, dtype", SEEN)
def test_a_second_optimizer_of_quantized_parameters_says_once_that_latents_are_lost(setting, dtype):
    model, _ = trained(dtype=dtype, **setting)
    second = quantized(model, **setting)
    with pytest.warns(UserWarning, match=STARTED):
        train(model, second, 1)
    train(model, second, 2)  # silent: warnings of BCGD are errors here


def test_a_second_optimizer_that_loads_the_state_of_the_first_is_silent_and_the_same():
    model, optimizer = trained()
    second = quantized(model)
    second.load_state_dict(optimizer.state_dict())
    control = copy.deepcopy((model, optimizer))
    train(model, second, 2)
    train(*control, 2)
    assert_same(snapshot(model, second), snapshot(*control))


def test_a_second_optimizer_from_the_latents_is_silent_and_the_same():
    model, optimizer = trained(momentum=0.0)
    control = copy.deepcopy((model, optimizer))
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.copy_(optimizer.latent(layer.weight))
    second = quantized(model, momentum=0.0)
    train(model, second, 2)
    train(*control, 2)
    assert_same(snapshot(model, second), snapshot(*control))


def test_an_optimizer_of_meta_parameters_can_be_made():
    BCGD([{"params": [torch.nn.Parameter(torch.empty(9, 9, device="meta"))], "quant_bits": 1}], lr=0.1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "values",
    [torch.zeros(40, 40), torch.ones(40, 40), torch.tensor([0.5]), torch.tensor([1.0, -1.0]), torch.empty(0)],
    ids=["zeros", "ones", "one", "two", "none"],
)
def test_constant_and_tiny_parameters_are_not_taken_for_quantized_ones(values, bits):
    p = torch.nn.Parameter(values.clone())
    optimizer = BCGD([{"params": [p], "quant_bits": bits}], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_float_parameters_are_not_taken_for_quantized_ones(bits, dtype):
    params = [torch.nn.Parameter(torch.randn(2**bits + 1).to(dtype)) for _ in range(50)]
    optimizer = BCGD([{"params": params, "quant_bits": bits}], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


# ---- averages ----


def test_an_average_of_latents():
    model, optimizer = trained()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(3):
        train(model, optimizer, 1, first=step)
        with optimizer.latents():
            averaged.update_parameters(model)
        latent = optimizer.latent(model[0].weight)
        expected = latent.clone() if expected is None else 0.5 * expected + 0.5 * latent
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    assert model[0].weight.unique().numel() == 2


def test_averages_of_w_leave_training_alone():
    model, optimizer = trained()
    control = copy.deepcopy((model, optimizer))
    averaged = AveragedModel(model, use_buffers=True)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        averaged.update_parameters(model)
    train(*control, 3)
    assert_same(snapshot(model, optimizer), snapshot(*control))


# ---- checkpoints and copies ----


def resume(order, model_state, optimizer_state, dtype=torch.float32, **setting):
    """A fresh model and optimizer with the checkpoint in them."""
    model = small_net(7, dtype)
    if order == "model, make, optimizer":
        model.load_state_dict(model_state)
    optimizer = quantized(model, **setting)
    if order == "make, optimizer, model":
        optimizer.load_state_dict(optimizer_state)
    model.load_state_dict(model_state) if order != "model, make, optimizer" else None
    if order != "make, optimizer, model":
        optimizer.load_state_dict(optimizer_state)
    return model, optimizer


@pytest.mark.parametrize(
    "order", ["model, make, optimizer", "make, model, optimizer", "make, optimizer, model"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_setting
def test_a_resumed_run_continues_bit_for_bit(setting, dtype, order):
    model, optimizer = trained(dtype=dtype, **setting)
    checkpoint = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    resumed = resume(order, *checkpoint, dtype=dtype, **setting)
    train(model, optimizer, 4, first=3)
    train(*resumed, 4, first=3)
    assert_same(snapshot(model, optimizer), snapshot(*resumed))


def test_a_model_loaded_alone_gets_new_latents_with_a_warning():
    model, optimizer = trained()
    other, _ = trained(seed=3)
    model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=LOST):
        train(model, optimizer, 1)


@every_setting
def test_an_optimizer_loaded_alone_brings_its_weights(setting):
    model, optimizer = trained(**setting)
    fresh = small_net(7)
    resumed = quantized(fresh, **setting)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for layer, other in ((fresh[0], model[0]), (fresh[4], model[4])):
        assert_same(layer.weight.detach(), other.weight.detach())
    train(fresh, resumed, 1)


def test_loaded_state_keeps_its_precision_and_is_a_copy():
    model, optimizer = trained(dtype=torch.bfloat16)
    state = optimizer.state_dict()
    other = resume("make, model, optimizer", model.state_dict(), state, dtype=torch.bfloat16)[1]
    assert_same(other.state_dict(), state)
    for key in ("latent", "momentum_buffer", "scale", "step"):
        ours, theirs = (o.state[o.param_groups[0]["params"][0]][key] for o in (optimizer, other))
        assert ours.dtype == torch.float32 and ours.data_ptr() != theirs.data_ptr()


def test_loading_twice_rolls_back():
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    train(model, optimizer, 3)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    control = resume("make, model, optimizer", *before)
    train(model, optimizer, 2)
    train(*control, 2)
    assert_same(snapshot(model, optimizer), snapshot(*control))


def test_hooks_of_the_user_see_the_loaded_state():
    _, optimizer = trained(dtype=torch.bfloat16)
    state = copy.deepcopy(optimizer.state_dict())
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, s: {**s, "param_groups": copy.deepcopy(s["param_groups"])}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(copy.deepcopy(o.state_dict())))
    optimizer.load_state_dict(state)
    assert_same(seen, [state])


def test_copies_and_pickles_train_on_alike():
    original = trained(bits=2)
    runs = [original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    for run in runs:
        train(*run, 3, first=3)
    assert_same(snapshot(*runs[0]), snapshot(*runs[1]))
    assert_same(snapshot(*runs[0]), snapshot(*runs[2]))


def test_options_that_an_old_checkpoint_lacks_stay():
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["min_value"], group["blend"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[1]["name"] == "alphas"
    assert optimizer.param_groups[1]["min_value"] == model[2].alpha_min


def test_the_state_of_sgd_fits_groups_that_are_not_quantized():
    model, other = small_net(), small_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    train(model, sgd, 2)
    bcgd = BCGD([{"params": other.parameters(), "quant_bits": None}], lr=0.01)
    other.load_state_dict(model.state_dict())
    bcgd.load_state_dict(sgd.state_dict())
    train(model, sgd, 2, first=2)
    train(other, bcgd, 2, first=2)
    assert_same(model.state_dict(), other.state_dict())


def without(state, *path):
    state = copy.deepcopy(state)
    *parents, last = path
    target = state
    for key in parents:
        target = target[key]
    del target[last]
    return state


def wider(state):
    state = copy.deepcopy(state)
    state["state"][0]["latent"] = torch.zeros(7, 2, 3, 3)
    return state


def requantized(state):
    state = copy.deepcopy(state)
    state["param_groups"][0]["quant_bits"] = 2
    return state


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: without(s, "param_groups", 2), "must have groups of"),
        (lambda s: without(s, "param_groups", 0, "params", 0), "must have groups of"),
        (lambda s: without(s, "state", 0), "no latent for parameter 0"),
        (lambda s: without(s, "state", 1, "scale"), "no scale for parameter 1"),
        (lambda s: without(s, "state", 1, "step"), "only one of momentum_buffer and step for parameter 1"),
        (
            wider,
            r"latent of parameter 0 in the state_dict must have shape \(6, 2, 3, 3\), got \(7, 2, 3, 3\)",
        ),
        (requantized, "group 0 of the state_dict must be quantized as"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(spoil, message):
    model, optimizer = trained()
    train(model, optimizer, 1)
    state = spoil(optimizer.state_dict())
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 1)


@pytest.mark.parametrize("keys", [(), ("state",), ("param_groups",)])
def test_a_checkpoint_without_its_parts_is_refused(keys):
    _, optimizer = trained()
    state = {key: optimizer.state_dict()[key] for key in keys}
    lacks = ", ".join(key for key in ("state", "param_groups") if key not in keys)
    with pytest.raises(ValueError, match=f"BCGD: the state_dict must have .*, got one without {lacks}$"):
        optimizer.load_state_dict(state)


def test_a_checkpoint_with_momentum_of_another_shape_is_refused_in_plain_groups_too():
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][4]["momentum_buffer"] = torch.zeros(9)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 4"):
        optimizer.load_state_dict(state)


def test_a_truncated_checkpoint_is_refused():
    _, optimizer = trained()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
        torch.load(io.BytesIO(file.getvalue()[:-200]), weights_only=True)
