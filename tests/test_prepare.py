"""prepare: every ReLU call gets a staircase of its own. calibrate: every staircase its best step size."""

import copy
import io
import pickle
import warnings

import oracles
import pytest
import torch
import torchqat
from torch import nn
from torch.nn import functional as F
from torchqat.nn import OPTIMAL_ALPHA, StaircaseReLU


class Block(nn.Module):
    """One ReLU called twice, as in torchvision's residual blocks."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))) + x)


class Functional(nn.Module):
    def forward(self, x):
        x = F.relu(x - 1, inplace=True)
        x = torch.relu(x + 1)
        return (F.relu6(input=x) - 0.5).relu()


class InPlaceThenReused(nn.Module):
    """The ReLU writes into x, and what is added afterwards is the written x."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1
        return self.act(x) + x


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        if x.sum() > 0:
            x = self.act(x)
        return F.relu(self.act(x))


class TrainingDependent(nn.Module):
    def forward(self, x):
        return F.relu(F.dropout(x, 0.5, self.training))


class OptionalArgument(nn.Module):
    def forward(self, x, scale=None):
        return F.relu(x) if scale is None else F.relu(x * scale)


class MakesTensors(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.arange(4))


class HoldsFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.relu, F.relu6

    def forward(self, x, scale=1.0):
        return self.second(self.first(x) * scale)


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x)


class ScriptableFunctional(nn.Module):
    def forward(self, x):
        return F.relu(x)


def staircases(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, StaircaseReLU)}


def quietly(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torchqat.prepare(model, 2, **options)


def test_nested_modules_become_staircases_with_the_options_given():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.ReLU6(), nn.Linear(4, 2)))
    assert quietly(model, ste="identity", alpha_grad="pact", alpha_init=0.5) is model
    assert list(staircases(model)) == model.prepare_report.replaced == ["1", "2.0"]
    for module in staircases(model).values():
        assert (module.bits, module.ste, module.alpha_grad, module.alpha.item()) == (
            2,
            "identity",
            "pact",
            0.5,
        )


def test_one_object_in_several_places_becomes_several():
    relu = nn.ReLU()
    model = quietly(nn.Sequential(relu, nn.Linear(4, 4), relu, nn.ModuleDict({"act": relu})))
    assert len({id(module) for module in staircases(model).values()}) == 3


def test_one_module_called_twice_becomes_two_and_computes_the_same():
    model = quietly(nn.Sequential(Block(), Block()))
    assert sorted(staircases(model)) == ["0.act", "0.act_1", "1.act", "1.act_1"]
    assert isinstance(model[0], Block)
    block, x = model[0], torch.randn(3, 4)
    block.act.alpha.data.fill_(0.25)
    block.act_1.alpha.data.fill_(0.5)
    hidden = oracles.staircase(block.first(x), block.act.alpha, 2)
    want = oracles.staircase(block.second(hidden) + x, block.act_1.alpha, 2)
    torch.testing.assert_close(block(x), want, rtol=0, atol=0)


def test_functional_calls_become_modules():
    model = quietly(Functional())
    assert len(staircases(model)) == 4
    x = torch.randn(5, 4)
    alpha = torch.tensor(OPTIMAL_ALPHA[2])
    want = oracles.staircase(x - 1, alpha, 2)
    want = oracles.staircase(oracles.staircase(want + 1, alpha, 2), alpha, 2)
    torch.testing.assert_close(model(x), oracles.staircase(want - 0.5, alpha, 2), rtol=0, atol=0)


def test_what_an_in_place_relu_wrote_is_still_what_is_used():
    model = quietly(InPlaceThenReused())
    x = torch.randn(5, 4)
    y = oracles.staircase(x, model.act.alpha, 2)
    torch.testing.assert_close(model(x), y + y, rtol=0, atol=0)


def test_torchvision_resnet18():
    resnet = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    assert len(staircases(quietly(resnet))) == 17  # one in the stem, two in each of eight blocks
    assert resnet(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "model, reason",
    [
        (DataDependent(), "TraceError"),
        (TrainingDependent(), "train and eval"),
        (OptionalArgument(), "optional argument 'scale'"),
        (MakesTensors(), "makes tensors"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_forward_that_does_not_trace_is_left_and_named_with_its_line(model, reason):
    forward = type(model).forward
    before = dict(vars(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchqat.prepare(nn.Sequential(model), 2)
    message = str(caught[0].message)
    assert type(model).forward is forward and vars(model) == before
    assert (
        "not quantized" in message
        and reason in message
        and "0: F.relu at " in message
        and "test_prepare.py:" in message
    )


def test_a_shared_module_in_such_a_forward_is_named():
    with pytest.warns(UserWarning) as caught:
        model = torchqat.prepare(DataDependent(), 2)
    assert isinstance(model.act, StaircaseReLU)
    (line,) = model.prepare_report.shared
    assert line.startswith("act: called at ") and line in str(caught[1].message)


def test_what_has_no_call_in_python_is_named():
    with pytest.warns(UserWarning, match="0.activation: a function inside TransformerEncoderLayer"):
        torchqat.prepare(nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)))

    class Own(nn.ReLU):
        pass

    with pytest.warns(UserWarning, match="0: Own is a class of its own"):
        torchqat.prepare(nn.Sequential(Own()))


def test_functions_held_by_a_forward_that_does_not_trace_are_named():
    with pytest.warns(UserWarning, match="not quantized"):
        model = torchqat.prepare(nn.Sequential(HoldsFunctions()), 2)
    assert model.prepare_report.not_replaced == [
        f"0.{name}: a function inside HoldsFunctions" for name in ("first", "second")
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3))])
def test_relus_in_torchscript_are_named(compiled):
    relus = compiled(Scriptable()), compiled(ScriptableFunctional())
    model = nn.Sequential(*relus, compiled(nn.Linear(3, 3)), nn.ReLU())
    with pytest.warns(UserWarning, match="not quantized"):
        torchqat.prepare(model, 2)
    first, second = model.prepare_report.not_replaced
    assert first.startswith("0: 0.act (in TorchScript")
    assert second.startswith("1: it calls a ReLU (in TorchScript")
    quietly(model, exclude=["0", "1"])  # says nothing


@pytest.mark.parametrize("exclude", ["0", ["0.act", "2"], [Block], Block])
def test_excluded_modules_stay(exclude):
    model = quietly(nn.Sequential(Block(), nn.ReLU(), nn.Sequential(Block())), exclude=exclude)
    assert type(model[0].act) is nn.ReLU and type(model[0]) is Block
    assert isinstance(model[1], StaircaseReLU)


@pytest.mark.parametrize("exclude, error", [(["nowhere"], ValueError), ([3], TypeError)])
def test_exclude_must_name_something(exclude, error):
    with pytest.raises(error, match="exclude"):
        torchqat.prepare(nn.Sequential(nn.ReLU()), exclude=exclude)


def test_bad_options_leave_the_model_alone():
    model = nn.Sequential(nn.ReLU())
    for options in ({"ste": "tanh"}, {"alpha_grad": "none"}):
        with pytest.raises(ValueError):
            torchqat.prepare(model, **options)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"prepare: act_bits must be in 1..8, got {bits}"):
            torchqat.prepare(model, act_bits=bits)
    with pytest.raises(TypeError, match="prepare: act_bits must be an int, got 2.0"):
        torchqat.prepare(model, 2.0)
    assert type(model[0]) is nn.ReLU
    with pytest.raises(TypeError, match="itself a ReLU"):
        torchqat.prepare(nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mode_device_and_hooks_are_kept_and_alpha_is_never_half(device, dtype):
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.ReLU()).to(device, dtype).eval()
    seen = []
    handle = model[2].register_forward_hook(lambda *_: seen.append(1))
    quietly(model)
    assert not any(module.training for module in model.modules())
    assert {(m.alpha.device.type, m.alpha.dtype) for m in staircases(model).values()} == {
        (device.type, torch.float64 if dtype == torch.float64 else torch.float32)
    }
    x = torch.randn(2, 4, device=device, dtype=dtype)
    assert model(x).dtype == dtype
    handle.remove()
    model(x)
    assert seen == [1]


def test_preparing_twice_changes_nothing():
    model = quietly(nn.Sequential(Block(), Functional()))
    before = {name: id(module) for name, module in model.named_modules()}
    quietly(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("options", [{"act_bits": 4}, {"ste": "relu"}, {"alpha_grad": "exact"}])
def test_preparing_again_with_other_settings_says_what_stays(options):
    model = quietly(nn.Sequential(nn.ReLU(), Block()))
    with pytest.warns(UserWarning) as caught:
        torchqat.prepare(model, **{"act_bits": 2, **options})
    assert len(caught) == 1 and caught[0].filename == __file__
    names, kept = ["0", "1.act", "1.act_1"], "bits=2, ste='clipped_relu', alpha_grad='three_valued'"
    assert model.prepare_report.kept == [f"{name}: {kept}" for name in names]
    message = str(caught[0].message)
    assert "are there already and keep their settings" in message
    assert all(line in message for line in model.prepare_report.kept)
    assert {module.bits for module in staircases(model).values()} == {2}


def test_widths_may_be_mixed_by_preparing_in_turns():
    model = quietly(nn.Sequential(nn.ReLU(), nn.ReLU()), exclude="1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchqat.prepare(model, 4, exclude="0")
    assert [module.bits for module in model] == [2, 4] and model.prepare_report.kept == []


@pytest.mark.parametrize(
    "model, exclude",
    [(nn.Linear(2, 2), ()), (nn.Sequential(nn.Linear(2, 2), nn.GELU()), ()), (nn.Sequential(nn.ReLU()), "0")],
)
def test_a_model_without_relus_is_told_of(model, exclude):
    with pytest.warns(UserWarning, match="prepare: nothing was replaced.*nn.ReLU, nn.ReLU6") as caught:
        torchqat.prepare(model, 2, exclude=exclude)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_independent_and_equal(copied):
    model = quietly(nn.Sequential(Functional(), Block()))
    x = torch.randn(3, 4)
    other = copied(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    other[1].act_1.alpha.data.fill_(3.0)
    assert not torch.equal(other(x), model(x))


def test_state_dict_goes_into_another_prepared_model():
    model, other = (quietly(nn.Sequential(Block(), Functional())) for _ in range(2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 4)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_a_rewritten_forward_compiles():
    model = quietly(Block())
    x = torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def error_of(x, step, bits):
    return float(
        (x.clamp(min=0) - oracles.staircase(x, torch.tensor(step, dtype=x.dtype), bits)).square().sum()
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "heavy", "uniform", "outlier"])
def test_no_step_of_a_dense_grid_fits_better(bits, shape):
    x = torch.randn(4_000, dtype=torch.float64)
    x = {
        "normal": x,
        "heavy": x**3,
        "uniform": torch.rand(4_000, dtype=torch.float64),
        "outlier": torch.cat([x, x.new_tensor([100.0])]),
    }[shape]
    model = StaircaseReLU(bits)
    torchqat.calibrate(model, x.float().split(1500))
    grid = torch.logspace(-3.5, 1.5, 1000, dtype=torch.float64).tolist()
    assert error_of(x, model.alpha.item(), bits) <= 1.01 * min(error_of(x, step, bits) for step in grid)


def test_values_on_a_grid_are_kept_exactly_enough():
    model = StaircaseReLU(2)
    x = torch.tensor([0.0, 0.7, 1.4, 2.1])
    torchqat.calibrate(model, [x])
    torch.testing.assert_close(model(x), x, rtol=1e-3, atol=0)


def test_each_channel_gets_its_step(device):
    model = StaircaseReLU(2, channels=3).to(device)
    x = torch.randn(8, 3, 50, device=device).abs() * torch.tensor([0.1, 1.0, 10.0], device=device).view(3, 1)
    torchqat.calibrate(model, [x])
    for channel in range(3):
        alone = torchqat.calibrate(StaircaseReLU(2).to(device), [x[:, channel]])
        torch.testing.assert_close(model.alpha[channel], alone.alpha, rtol=0.02, atol=0)


def test_the_staircases_act_as_relus_while_they_look():
    model = nn.Sequential(StaircaseReLU(1, alpha_init=100.0), StaircaseReLU(1))
    torchqat.calibrate(model, [torch.tensor([-4.0, 1.0, 3.0])])
    torch.testing.assert_close([m.alpha.item() for m in model], [2.0, 2.0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["tensor", "pair", "list", "dict"])
def test_forms_of_a_batch(form):
    x = torch.randn(4, 3)
    batch = {"tensor": x, "pair": (x, torch.zeros(4)), "list": [x], "dict": {"x": x}}[form]
    model = StaircaseReLU(2, alpha_init=50.0)
    assert torchqat.calibrate(model, iter([batch])) is model
    assert model.alpha.item() < 5


def test_nothing_but_alpha_changes():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), StaircaseReLU(2), nn.Linear(4, 2))
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=16, shuffle=True)
    random = torch.get_rng_state()
    torchqat.calibrate(model, loader)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["2.alpha"]
    assert not model[2]._forward_hooks and model[2].alpha.grad is None


def test_a_module_without_positive_input_keeps_its_step():
    model = nn.ModuleDict({"live": StaircaseReLU(2), "unused": StaircaseReLU(2)})
    model.forward = lambda x: model["live"](x)
    with pytest.warns(UserWarning) as caught:
        torchqat.calibrate(model, [-torch.rand(4)])
    assert "live: no positive input" in str(caught[0].message) and "unused: never called" in str(
        caught[0].message
    )
    assert model["live"].alpha.item() == torch.tensor(OPTIMAL_ALPHA[2]).item()
    channels = StaircaseReLU(2, channels=2, alpha_init=7.0)
    with pytest.warns(UserWarning, match="no positive input in 1 of 2 channels"):
        torchqat.calibrate(channels, [torch.tensor([[1.0, -1.0]])])
    assert channels.alpha[0] < 2 and channels.alpha[1] == 7


def test_several_calls_of_one_module_are_named():
    act = StaircaseReLU(2)
    with pytest.warns(UserWarning, match="0: 2 calls a batch"):
        torchqat.calibrate(nn.Sequential(act, act), [torch.rand(4)] * 3)


def test_a_model_is_calibrated_once_at_a_time():
    model = nn.Sequential(StaircaseReLU(1))

    def batches():
        with pytest.raises(RuntimeError, match="'0' is being calibrated already"):
            torchqat.calibrate(model, [torch.ones(2)])
        assert not model.training
        yield torch.tensor([3.0])

    torchqat.calibrate(model, batches())
    assert model.training and model[0].alpha.item() == pytest.approx(3, abs=0.01)


def test_a_step_is_never_below_alpha_min():
    model = StaircaseReLU(2, alpha_min=0.25)
    torchqat.calibrate(model, [torch.tensor([1e-12, 1e-6])])
    assert model.alpha.item() == 0.25


@pytest.mark.parametrize(
    "model, batches, error, match",
    [
        (nn.Sequential(StaircaseReLU(2)), [], ValueError, "batches is empty"),
        (nn.Linear(2, 2), [torch.rand(2)], ValueError, "no StaircaseReLU"),
        (
            nn.Sequential(StaircaseReLU(2)),
            [torch.rand(2), torch.tensor([0.5, float("nan")])],
            ValueError,
            "'0' has NaN",
        ),
        (
            nn.Sequential(StaircaseReLU(2)),
            [torch.tensor([0.5, float("inf")])],
            ValueError,
            "'0' has NaN or infinity",
        ),
        (nn.Sequential(StaircaseReLU(2)), [3], TypeError, "a batch must be"),
        (
            nn.Sequential(StaircaseReLU(2)),
            torch.rand(2),
            TypeError,
            r"batches must be an iterable of batches, got one tensor: give \[images\]",
        ),
    ],
)
def test_bad_input_is_an_error_and_changes_nothing(model, batches, error, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        torchqat.calibrate(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "x, counts, message",
    [
        (torch.ones(3), 3, r"x must have 3 channels in dimension 1, got shape \[3\]"),
        (torch.ones(()), 3, r"got shape \[\]"),
        (torch.ones(3, 2), 3, r"got shape \[3, 2\]"),
        (torch.ones(3), None, r"counts must have shape \[channels, bins\], got \[4\]"),
    ],
)
def test_magnitudes_are_counted_by_channels_that_are_there(x, counts, message):
    counts = torch.ops.qat._empty_magnitude_counts(counts) if counts else torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"count_magnitudes: .*{message}"):
        torch.ops.qat._count_magnitudes(x, counts)
    assert not counts.any()
