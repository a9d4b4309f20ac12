"""param_groups: every trainable parameter in exactly one group, and in the right one."""

import pytest
import torch
import torchqat
from torch import nn
from torchqat.optim import BCGD, param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = torchqat.nn.StaircaseReLU(bits=2, channels=4)
        self.block = nn.Sequential(nn.Conv1d(4, 4, 1), torchqat.nn.StaircaseReLU(bits=2), nn.Conv3d(4, 4, 1))
        self.up = nn.ModuleList(
            [nn.ConvTranspose1d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.ConvTranspose3d(4, 4, 1)]
        )
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.free = nn.Parameter(torch.zeros(3))
        self.last = nn.Linear(4, 2)


def names_of(groups, model):
    names = {p: name for name, p in model.named_parameters()}
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


WEIGHTS = {"first.weight", "block.0.weight", "block.2.weight", "attention.out_proj.weight", "last.weight"}
UP = {"up.0.weight", "up.1.weight", "up.2.weight"}


def test_each_parameter_is_in_its_group():
    model = Net()
    groups = param_groups(model, 1)
    names = names_of(groups, model)
    assert list(names) == ["quantized", "alphas", "float"]
    assert names["quantized"] == WEIGHTS | UP
    assert names["alphas"] == {"act.alpha", "block.1.alpha"}
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_options_land_in_the_groups():
    groups = param_groups(Net(), 2, alpha_lr=0.1, alpha_weight_decay=0.0, method="twn")
    weights, alphas, rest = groups
    assert (weights["quant_bits"], weights["method"], weights["channel_dim"]) == (2, "twn", None)
    assert (alphas["lr"], alphas["weight_decay"], alphas["min_value"]) == (0.1, 0.0, 1e-3)
    assert rest.keys() == {"name", "params"}
    assert "lr" not in param_groups(Net(), 2)[1]


def test_alphas_stay_above_their_minimum_and_have_their_own_rate():
    model = nn.Sequential(nn.Linear(2, 2), torchqat.nn.StaircaseReLU(2, alpha_min=0.25), nn.Linear(2, 2))
    model.append(torchqat.nn.StaircaseReLU(2, alpha_min=0.125))
    optimizer = BCGD(param_groups(model, 1, alpha_lr=100.0), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (model[1].alpha, model[3].alpha) == (0.25, 0.125)
    assert model[0].bias.abs().max() < 10


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_first_and_last_may_stay_float(first, last):
    model = Net()
    names = names_of(param_groups(model, 1, quantize_first=first, quantize_last=last), model)
    assert ("first.weight" in names["quantized"]) == first
    assert ("last.weight" in names["quantized"]) == last
    assert names["quantized"] | {"first.weight", "last.weight"} == WEIGHTS | UP


@pytest.mark.parametrize(
    "exclude, left_out",
    [
        ("last", {"last.weight"}),
        (["block", "up.1"], {"block.0.weight", "block.2.weight", "up.1.weight"}),
        ([nn.Conv2d, nn.ModuleList], {"first.weight"} | UP),
    ],
)
def test_excluded_modules_stay_float(exclude, left_out):
    model = Net()
    names = names_of(param_groups(model, 1, exclude=exclude), model)
    assert names["quantized"] == (WEIGHTS | UP) - left_out
    assert left_out <= names["float"]


def test_one_scale_per_output_channel_of_every_kind_of_layer():
    model = Net()
    groups = param_groups(model, 1, channel_dim=0)
    assert [(group["name"], group.get("channel_dim")) for group in groups][:2] == [
        ("quantized", 0),
        ("quantized", 1),
    ]
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in groups[1]["params"]} == UP
    BCGD(groups, lr=0.1)
    assert model.up[1].weight.abs().flatten(2).std(dim=(0, 2)).max() < 1e-6


def test_frozen_parameters_are_left_out():
    model = Net()
    model.last.requires_grad_(False)
    groups = param_groups(model, 1)
    assert not {"last.weight", "last.bias"} & set().union(*names_of(groups, model).values())


@pytest.mark.parametrize("tied_to", ["linear", "embedding", "excluded"])
def test_shared_weights_are_listed_once_and_quantized_where_all_agree(tied_to):
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "e": nn.Embedding(4, 4), "other": nn.Linear(4, 4)}
    )
    model["e" if tied_to == "embedding" else "b"].weight = model["a"].weight
    groups = param_groups(model, 1, exclude=["b"] if tied_to == "excluded" else [])
    holders = [group["name"] for group in groups for p in group["params"] if p is model["a"].weight]
    assert holders == ["quantized" if tied_to == "linear" else "float"]


def test_a_shared_module_excluded_under_one_name_stays_float():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    names = names_of(param_groups(model, 1, exclude="b"), model)
    assert names["quantized"] == {"c.weight"}


def test_no_bits_give_the_same_groups_with_float_weights():
    model = Net()
    groups = param_groups(model, None)
    before = model.first.weight.detach().clone()
    BCGD(groups, lr=0.1)
    assert names_of(groups, model) == names_of(param_groups(model, 1), model)
    assert torch.equal(model.first.weight, before)


def test_what_cannot_be_quantized_is_named():
    with pytest.raises(ValueError, match="no weight to quantize"):
        param_groups(nn.BatchNorm1d(3), 1)
    with pytest.raises(ValueError, match="no weight to quantize"):
        param_groups(nn.Linear(3, 3), 1, quantize_last=False)
    normed = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="layer '1' has no weight parameter of its own"):
        param_groups(normed, 1)
    assert len(param_groups(normed, 1, exclude="1")) == 2
    with pytest.raises(ValueError, match="layer '' has a weight without a shape yet"):
        param_groups(nn.LazyLinear(3), 1)
    with pytest.raises(ValueError, match="exclude names no module of the model: nowhere"):
        param_groups(Net(), 1, exclude="nowhere")
    with pytest.raises(TypeError, match="exclude takes module names and types"):
        param_groups(Net(), 1, exclude=[3])
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"param_groups: weight_bits must be in 1..8, got {bits}"):
            param_groups(Net(), bits)
    with pytest.raises(TypeError, match="param_groups: weight_bits must be an int, got 2.0"):
        param_groups(Net(), 2.0)
