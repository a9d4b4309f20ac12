"""torchqat.functional: what it adds to the operators, which is words for arguments of a wrong type."""

import pytest
import torch
from torch import fx
from torchqat import functional as F
from torchqat._call import call

X, STEP = torch.tensor([-1.0, 0.2, 0.6, 9.0]), torch.tensor(0.5)
CODES = torch.tensor([1, 0, 3], dtype=torch.uint8)
ONE_STEP = dict(params=[X], grads=[X], latents=[X], scales=[STEP], momentum_buffers=[], steps=[])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: F.staircase_relu(X, 0.5, 2), "staircase_relu: alpha must be of type Tensor, got float"),
        (lambda: F.staircase_relu(X, STEP, 2.0), "staircase_relu: bits must be of type int, got float"),
        (lambda: F.staircase_relu([0.1], STEP, 2), "staircase_relu: x must be of type Tensor, got list"),
        (lambda: F.staircase_relu(X, STEP, 2, ste=3), "staircase_relu: ste must be of type str, got int"),
        (lambda: F.staircase_codes(X, STEP, "2"), "staircase_codes: bits must be of type int, got str"),
        (lambda: F.quantize_weight(3.0, 2), "quantize_weight: weight must be of type Tensor, got float"),
        (
            lambda: F.quantize_weight(X, 2, channel_dim=0.0),
            r"quantize_weight: channel_dim must be of type Optional\[int\], got float",
        ),
        (lambda: F.weight_codes(X, 0.5, 2), "weight_codes: scale must be of type Tensor, got float"),
        (lambda: F.pack_codes([1, 0], 2), "pack_codes: codes must be of type Tensor, got list"),
        (
            lambda: F.unpack_codes(CODES, 8, 3),
            r"unpack_codes: size must be of type List\[int\], got int",
        ),
        (
            lambda: F.bcgd_step_(**ONE_STEP, lr=0.1, bits=1),
            "bcgd_step_: lr must be of type Tensor, got float",
        ),
        (
            lambda: F.bcgd_step_(**{**ONE_STEP, "latents": X}, lr=STEP, bits=1),
            r"bcgd_step_: latents must be of type List\[Tensor\], got Tensor",
        ),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(wrong, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        wrong()


def test_other_errors_of_an_operator_pass_unchanged():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="staircase_relu: bits must be in 1..8, got 9"):
        F.staircase_relu(x, STEP, 9)
    with pytest.raises(RuntimeError, match="missing value for argument"):
        call(torch.ops.qat.staircase_relu, x)


def test_only_the_operators_own_defaults_are_left_to_it(monkeypatch):
    seen = []
    monkeypatch.setattr(F, "call", lambda operator, *args, **options: seen.append(options))
    schema = torch.ops.qat.staircase_relu.default._schema
    defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
    F.staircase_relu(X, STEP)
    F.staircase_relu(X, STEP, **defaults)
    assert seen == [{}, {}]
    others = {"ste": "relu", "alpha_grad": "exact", "channel_dim": 0, "save_codes": True}
    assert others.keys() == defaults.keys()
    for name, other in [*others.items(), ("channel_dim", 1.0), ("channel_dim", True), ("save_codes", 0)]:
        F.staircase_relu(X, STEP, **{name: other})
        assert seen.pop() == {name: other}


CALLS = {
    "staircase_relu": lambda x, step: F.staircase_relu(x, step, 2),
    "staircase_codes": lambda x, step: F.staircase_codes(x, step, 2),
    "quantize_weight": lambda x, step: F.quantize_weight(x, 2),
    "weight_codes": lambda x, step: F.weight_codes(x, step, 2),
    "pack_codes": lambda x, step: F.pack_codes(x.relu().ceil().to(torch.uint8), 4),
    "unpack_codes": lambda x, step: F.unpack_codes(x.relu().ceil().to(torch.uint8), 4, [2, 4]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_compile_to_one_graph_and_trace(name):
    compiled = torch.compile(CALLS[name], backend="eager", fullgraph=True)
    traced = fx.symbolic_trace(CALLS[name])
    want = CALLS[name](X, STEP)
    for got in (compiled(X, STEP), traced(X, STEP)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert getattr(torch.ops.qat, name) in {node.target for node in traced.graph.nodes}
