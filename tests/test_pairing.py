"""prepare finds the layers that read staircases; memory_report counts what it saves."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat
from example_programs import imported
from kept_bytes import bytes_kept
from torch import nn
from torch.nn import functional as F
from torchqat.nn import QuantBatchNorm2d, QuantConv2d, QuantLinear, QuantMaxPool2d, StaircaseReLU


def report_of(model, bits=2, **options):
    return torchqat.prepare(model, bits, **options).prepare_report


def test_a_sequence():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(20, 6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(6, 2),
    )
    before = dict(model.named_parameters())
    report = report_of(model)
    assert report.paired == ["2 -> 3", "2 -> 4", "5 -> 8"]
    assert report.not_paired == ["0: it reads the model's input", "11: it reads the output of 10 (Dropout)"]
    kinds = [type(model[i]) for i in (0, 3, 4, 8, 11)]
    assert kinds == [nn.Conv2d, QuantMaxPool2d, QuantConv2d, QuantLinear, nn.Linear]
    assert [model[i].save_codes for i in (2, 5, 9)] == [True, True, False]
    assert all(value is dict(model.named_parameters())[name] for name, value in before.items())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.beside, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.second(self.act(self.first(x)))
        return self.act(y + self.beside(x) + x)


def test_blocks_with_shortcuts():
    model = nn.Sequential(
        nn.ReLU(), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    report = report_of(model)
    assert sorted(report.paired) == sorted(
        [
            "0 -> 1.first",
            "0 -> 1.beside",
            "1.act -> 1.second",
            "1.act_1 -> 2.first",
            "1.act_1 -> 2.beside",
            "2.act -> 2.second",
        ]
    )
    assert report.not_paired == ["5: it reads the output of 3 (AdaptiveAvgPool2d)"]
    assert not model[2].act_1.save_codes


class Functional(nn.Module):
    """What lies between is written as functions and methods."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.last = nn.Conv2d(3, 4, 3), nn.Linear(64, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(x)))
        x = F.dropout(torch.flatten(x.contiguous().view(2, 4, 16, 1), 1), 0.5, training=False)
        return self.last(F.relu(self.linear(x)) * 2)


def test_functions_between():
    model = Functional()
    report = report_of(model)
    assert report.paired == ["relu -> conv", "relu_1 -> linear"]
    assert report.not_paired == ["last: it reads the result of mul"]
    model(torch.randn(2, 3, 6, 6)).sum().backward()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x, y):
        return self.conv(y), self.act(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.inner, self.conv = nn.ReLU(), TwoInputs(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        first, second = self.inner(x, self.act(x))
        return self.conv(second) + first


def test_several_inputs_and_outputs():
    report = report_of(Outer())
    assert report.paired == ["act -> inner.conv"]
    assert report.not_paired == ["conv: it reads the result of getitem"]


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.conv = nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.conv(self.act(x))
        return x


def test_what_does_not_trace_is_taken_in_order():
    model = nn.Sequential(Untraceable(), nn.Conv2d(3, 3, 1))
    report = report_of(model)
    (pair,) = report.paired
    assert pair.startswith("0.act -> 0.conv (assumed: 0 does not trace: TraceError")
    assert report.not_paired == ["1: it reads the output of 0, which does not trace"]
    model(torch.randn(2, 3, 4, 4)).sum().backward()


def test_a_module_called_from_two_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv = nn.ReLU(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.act(self.conv(x)))

    model = Shared()
    report = report_of(model)
    assert report.paired == [] and report.not_paired == ["conv: it reads the model's input"]
    assert type(model.conv) is nn.Conv2d and not model.act.save_codes


def test_excluded_and_foreign_layers_are_left_alone():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), Own(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    report = report_of(model, exclude=["1"])
    assert report.paired == ["3 -> 4"]
    assert report.not_paired == ["2: Own is a class of its own", "1: it is excluded"]
    assert [type(model[i]) for i in (1, 2, 4)] == [nn.Conv2d, Own, QuantConv2d]
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    model = nn.Sequential(nn.ReLU(), parametrized)
    assert report_of(model).not_paired == ["1: ParametrizedConv2d is a class of its own"]
    model(torch.randn(2, 3, 4, 4)).sum().backward()


def plain_model():
    return nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))


def test_a_staircase_that_shall_keep_no_codes():
    model = nn.Sequential(StaircaseReLU(2, save_codes=False), nn.Conv2d(3, 3, 1))
    report = report_of(model, exclude="0")
    assert (report.paired, report.not_paired) == ([], ["1: it reads the output of 0, which keeps no codes"])
    assert report_of(model).paired == ["0 -> 1"] and model[0].save_codes


@pytest.mark.parametrize("exclude", [None, 3, nn.ReLU()])
def test_what_can_be_excluded(exclude):
    with pytest.raises(TypeError, match="prepare: exclude takes module names and types, got"):
        torchqat.prepare(nn.Sequential(nn.ReLU()), 2, exclude=exclude)


def test_what_can_be_prepared():
    with pytest.raises(TypeError, match="prepare: model must be a torch.nn.Module, got function"):
        torchqat.prepare(F.relu, 2)


def test_twice_changes_nothing():
    model = plain_model()
    first = report_of(model, recompute=True)
    second = report_of(model, recompute=True)
    assert first.paired == second.paired
    assert "1 -> 2: computed again in backward" in first.paired
    assert isinstance(model[2], QuantBatchNorm2d) and model[1].recompute and not model[4].recompute


def test_layers_that_would_keep_floats_all_the_same():
    reflecting = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    uneven = nn.Conv2d(3, 3, 2, padding="same")
    for layer, reason in (
        (reflecting, "it pads with padding=(1, 1), padding_mode='reflect'"),
        (uneven, "it pads with padding='same', padding_mode='zeros'"),
        (nn.MaxPool2d(2, return_indices=True), "it returns indices"),
    ):
        model = nn.Sequential(nn.ReLU(), layer)
        report = report_of(model)
        assert (report.paired, report.not_paired) == ([], [f"1: {reason}"])
        assert not model[0].save_codes and type(model[1]) is type(layer)


def test_the_last_call_says_what_is_recomputed():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    report_of(model, recompute=True)
    assert model[1].recompute
    report_of(model)
    assert not model[1].recompute


def test_recomputing_needs_codes():
    with pytest.raises(ValueError, match="recompute=True .* must not go with save_codes=False"):
        torchqat.prepare(nn.Sequential(nn.ReLU()), recompute=True, save_codes=False)
    model = torchqat.prepare(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), save_codes=False)
    assert type(model[1]) is nn.Conv2d and not model[0].save_codes and model.prepare_report.paired == []


def test_the_last_call_says_whether_codes_are_kept():
    model = plain_model()
    report_of(model, recompute=True)
    report_of(model, save_codes=False, exclude="3")
    assert [model[i].save_codes for i in (0, 3)] == [False, True] and not model[1].recompute
    x = torch.randn(2, 3, 4, 4)
    report_of(model, save_codes=False)
    assert bytes_kept(model, x) == bytes_kept(torchqat.prepare(plain_model(), 2, save_codes=False), x)
    report_of(model)
    assert bytes_kept(model, x) == bytes_kept(torchqat.prepare(plain_model(), 2), x)


class Classic(nn.Module):
    """As tutorials write it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.linear = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(16, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), (2, 2), ceil_mode=True)
        return self.linear(torch.flatten(x, 1))


def test_pooling_that_is_called_as_a_function():
    model, x = Classic(), torch.randn(3, 1, 12, 12)
    floats = copy.deepcopy(model)
    report = report_of(model)
    assert report.paired == ["relu, relu_1 -> F.max_pool2d", "relu -> second", "relu_1 -> linear"]
    assert report.not_paired == ["first: it reads the model's input"]
    assert report_of(model).paired == report.paired
    twin = torchqat.prepare(floats, 2, save_codes=False)
    assert bytes_kept(model, x) < 0.5 * bytes_kept(twin, x)
    twin(x).square().sum().backward()
    for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        net.zero_grad()
        net(x).square().sum().backward()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    targets = {str(node.target) for node in torch.export.export(model.eval(), (x,)).graph.nodes}
    assert not any("qat._max_pool2d" in target for target in targets)


def test_pooling_that_is_left_alone():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1))
    report = report_of(model, exclude="1")
    assert report.paired == []
    assert report.not_paired[1] == "2: it reads the output of 1, which is excluded"


def test_a_network_that_recomputes_is_traced_as_torchs_own_layers_are():
    model, x = torchqat.prepare(plain_model(), 2, recompute=True), torch.randn(2, 3, 4, 4)
    traced = torch.fx.symbolic_trace(model)
    assert isinstance(traced.get_submodule("2"), QuantBatchNorm2d)
    a, b = model(x), traced(x)
    assert (
        torch.equal(a, b) and traced.get_submodule("2").num_batches_tracked == 2
    )  # one module, called twice


def test_modules_under_several_names():
    block = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = block, nn.Sequential(block, nn.MaxPool2d(2))

        def forward(self, x):
            return self.head(self.backbone(x))

    model = Holder()
    report = report_of(model, recompute=True)
    assert report.paired == ["backbone.0 -> backbone.1"]
    assert report.not_paired == ["head.1: it reads the output of backbone.1"]
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.ReLU(), nn.Sequential(nn.Identity(), conv))
    report = report_of(model)
    assert (report.paired, report.not_paired) == ([], ["0: it reads the model's input"])


def test_a_module_that_stands_twice_in_a_sequence():
    drop = nn.Dropout(0.5)
    layers = [nn.Linear(4, 4), nn.ReLU(), drop, nn.Linear(4, 4), nn.ReLU(), drop, nn.Linear(4, 4)]
    report = report_of(nn.Sequential(*layers))
    assert report.paired == []
    assert report.not_paired[1:] == [f"{i}: it reads the output of 2 (Dropout)" for i in (3, 6)]


class WithMask(nn.Module):
    """Does not trace for its optional argument; one layer hangs from a function."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ReLU(), nn.Linear(4, 4)])
        self.held = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(4, 2, 8)})

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


def test_every_layer_is_spoken_of():
    model = WithMask()
    report = report_of(model)
    (pair,) = report.paired
    assert pair.startswith("layers.0 -> layers.1 (assumed: WithMask does not trace")
    told = {line.split(":")[0] for line in report.not_paired}
    assert told >= {"held.encoder.linear1", "held.encoder.linear2"}
    assert all(line.endswith("no forward that could be followed calls it") for line in report.not_paired)


def test_normalizations_that_read_a_staircase():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), torch.randn(2, 3, 9, 9)
    plain = torchqat.prepare(copy.deepcopy(model), 2, save_codes=False)
    assert report_of(model).paired == ["1 -> 2"] and isinstance(model[2], QuantBatchNorm2d)
    assert bytes_kept(model, x) < bytes_kept(plain, x) - 3 * 2 * 4 * 49
    for net in (model, plain):
        net(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "conv, norm",
    [
        (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(3)),
    ],
)
def test_what_cannot_be_recomputed_is_not_said_to_be(conv, norm):
    model = nn.Sequential(conv, norm, nn.ReLU())
    assert report_of(model, recompute=True).paired == []
    assert type(norm) is nn.BatchNorm2d and not getattr(conv, "recompute", False)


def test_recomputing_convolutions_that_others_read_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.conv, self.norm = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(self.act(x))
            return self.norm(y) * y

    model, x = Both(), torch.randn(2, 3, 4, 4)
    torchqat.prepare(model, 2, recompute=True)
    twin = torchqat.prepare(copy.deepcopy(model), 2)
    twin.conv.__class__, twin.norm.__class__ = nn.Conv2d, nn.BatchNorm2d
    for net in (model, twin):
        net(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# ----------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def models(monkeypatch):
    with imported("models", monkeypatch) as module:
        yield module.MODELS


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name, size", [("resnet20", 32), ("resnet18", 32), ("resnet18", 224)])
def test_a_quantized_network_keeps_less_than_the_float_one(models, name, size, bits):
    """At most 0.65 of the float network's bytes, recomputing 0.15; the report says what is counted."""
    network, x = models[name](3, size, 10), torch.randn(2, 3, size, size)
    floats = copy.deepcopy(network)
    for module in floats.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    expected = bytes_kept(floats, x)
    for recompute, bound in ((False, 0.65), (True, 0.15)):
        model = torchqat.prepare(copy.deepcopy(network), bits, recompute=recompute)
        report = torchqat.memory_report(model, x)
        ours = bytes_kept(model, x)
        assert (report.bytes, report.float_bytes) == (ours, expected)
        assert report.ratio == ours / expected <= bound


def test_the_report_is_a_table_and_leaves_the_model_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)
    )
    torchqat.prepare(model, 2).eval()
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 10, 10)
    random, classes = torch.random.get_rng_state(), [type(module) for module in model]
    report = torchqat.memory_report(model, x)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "float,", "KiB", "this,", "KiB"]
    assert [line.split()[0] for line in lines[1:-1]] == [layer.name for layer in report.layers]
    assert lines[-1].endswith(f"= {report.ratio:.3f} of the float network")
    assert len({len(line) for line in lines[:-1]}) == 1
    assert not model.training and [type(module) for module in model] == classes
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_report_takes_several_arguments_and_a_single_staircase():
    x = torch.randn(64, 100, requires_grad=True)
    report = torchqat.memory_report(nn.Sequential(nn.Linear(100, 100), StaircaseReLU(2, save_codes=False)), x)
    assert (report.layers[1].float_bytes, report.layers[1].bytes) == (25600, 1600 + 4)
    before = x.detach().clone()
    assert torchqat.memory_report(StaircaseReLU(1), x).bytes == 1600 + 4
    assert torchqat.memory_report(StaircaseReLU(1), before).float_bytes == 0
    assert torch.equal(x, before)
    report = torchqat.memory_report(torchqat.prepare(TwoInputs(), 2), (torch.randn(1, 3, 8, 8),) * 2)
    assert {layer.name for layer in report.layers} == {"act", "conv"}
    with torch.no_grad():
        assert torchqat.memory_report(StaircaseReLU(2), torch.randn(64, 100)).bytes > 0
    with pytest.raises(TypeError, match="memory_report: model must be a torch.nn.Module, got int"):
        torchqat.memory_report(3, torch.randn(2))


def test_the_report_in_inference_mode_and_on_the_meta_device():
    model, x = torchqat.prepare(plain_model(), 2), torch.randn(2, 3, 8, 8)
    expected = torchqat.memory_report(model, x)
    with torch.inference_mode():
        assert torchqat.memory_report(model, torch.randn(2, 3, 8, 8)) == expected
    assert torchqat.memory_report(model.to("meta"), x.to("meta")) == expected


def test_the_report_of_keyword_arguments():
    x = torch.randn(1, 3, 8, 8)
    reports = [torchqat.memory_report(torchqat.prepare(TwoInputs(), 2), v) for v in ((x, x), [x, x])]
    assert (
        torchqat.memory_report(torchqat.prepare(TwoInputs(), 2), {"y": x, "x": x}) == reports[0] == reports[1]
    )


class Gated(nn.Module):
    """Its ReLU cannot work in place: what it reads is a part of a split."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()

    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        return self.act(a) * b


def test_the_report_of_a_relu_that_cannot_work_in_place():
    report = torchqat.memory_report(torchqat.prepare(Gated(), 2), torch.randn(2, 3, 8, 8))
    (act,) = [layer for layer in report.layers if layer.name == "act"]
    assert act.float_bytes == 4 * 2 * 4 * 6 * 6 and act.bytes == 2 * 4 * 6 * 6 // 4 + 4


RESIDENT = """
import sys, torch, meters, torchqat
sys.path.insert(0, sys.argv[1])
import models
torch.set_num_threads(1)
kind, name, size, batch = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
model = models.MODELS[name](3, size, 10, 0.5)
if kind == "float":
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
else:
    torchqat.prepare(model, 2, recompute=kind == "recompute")
x = torch.randn(batch, 3, size, size)
def forward():
    return model(x).sum()
forward().backward()  # gradients, and what libraries prepare
print(meters.peak_bytes(lambda: forward().backward(), "cpu") or -1)
print(torchqat.memory_report(model, x).bytes)
"""


@pytest.mark.parametrize("name, size, batch", [("resnet20", 32, 64), ("resnet18", 224, 4)])
def test_resident_memory_confirms_it(name, size, batch):
    """The peak of a training step in a process of its own."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    peaks = {}
    for kind in ("float", "codes", "recompute"):
        command = [sys.executable, "-c", RESIDENT, str(root / "examples"), kind, name, str(size), str(batch)]
        env = {**os.environ, "PYTHONPATH": paths}
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks[kind] = [int(word) for word in result.stdout.split()]
    if peaks["float"][0] < 0:
        pytest.skip("this kernel does not tell the peak of resident memory")
    peak, counted_bytes = ({kind: values[i] for kind, values in peaks.items()} for i in range(2))
    saved = counted_bytes["float"] - counted_bytes["codes"]
    assert abs(peak["float"] - peak["codes"] - saved) < 0.15 * saved
    assert peak["codes"] < 0.7 * peak["float"]
    assert peak["recompute"] < 0.5 * peak["float"]  # what a layer's backward pass takes for itself included
