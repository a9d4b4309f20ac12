"""Checkpoints as safetensors files: what goes in comes out, and what is no checkpoint changes nothing."""

import copy
import json
import os
import random
import re
import stat
import struct
import subprocess
import sys
import textwrap

import pytest
import safetensors
import safetensors.torch
import torch
import torchqat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_nets import assert_same, quantized, small_net, snapshot, train
from torch import nn
from torchqat.optim import BCGD, param_groups

pytestmark = pytest.mark.filterwarnings("error:BCGD")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip
SETTINGS = [
    {"bits": 1},
    {"bits": 1, "momentum": 0.0},
    {"bits": 2, "channel_dim": 0},
    {"bits": 2, "method": "twn"},
    {"bits": 4},
    {"bits": 4, "method": "lloyd", "channel_dim": 0},
    {"bits": None},
    {"bits": None, "momentum": 0.0},
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def trained(steps=3, dtype=torch.float32, seed=0, **options):
    model = small_net(seed, dtype)
    optimizer = quantized(model, **{"bits": 1, **options})
    train(model, optimizer, steps)
    return model, optimizer


def save(path, tensors, metadata=()):
    torch.ops.qat._save_safetensors(str(path), list(tensors), list(tensors.values()), dict(metadata))


def load(path):
    names, tensors, metadata = torch.ops.qat._load_safetensors(str(path))
    return dict(zip(names, tensors, strict=True)), metadata


def read(path):
    """The file as the safetensors package sees it."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# ---- there and back ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_setting
def test_training_goes_on_bit_for_bit(path, setting, dtype):
    model, optimizer = trained(dtype=dtype, **setting)
    torchqat.save_checkpoint(path, model, optimizer)
    resumed = trained(steps=1, seed=7, dtype=dtype, **setting)
    torchqat.load_checkpoint(path, *resumed)
    assert_same(snapshot(*resumed), snapshot(model, optimizer))
    for run in ((model, optimizer), resumed):
        train(*run, 4, first=3)
    assert_same(snapshot(*resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_from_before_the_first_step_and_of_parameters_without_gradient(path, steps):
    model, optimizer = trained(steps=steps)
    model[4].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    torchqat.save_checkpoint(path, model, optimizer)
    resumed = trained(steps=0, seed=3)
    torchqat.load_checkpoint(path, *resumed)
    for p in (model[4].bias, model[4].weight):
        p.requires_grad_(True)
    for run in ((model, optimizer), resumed):
        train(*run, 3)
    assert_same(snapshot(*resumed), snapshot(model, optimizer))


def test_the_options_of_the_groups_stay_the_programs(path):
    model, optimizer = trained()
    torchqat.save_checkpoint(path, model, optimizer)
    other, second = trained(seed=1)
    for group in second.param_groups:
        group["lr"], group["weight_decay"] = 0.003, 0.5
    scheduler = torch.optim.lr_scheduler.StepLR(second, 1)
    options = copy.deepcopy(second.state_dict()["param_groups"])
    torchqat.load_checkpoint(path, other, second)
    assert_same(second.state_dict()["param_groups"], options)
    train(other, second, 1)
    scheduler.step()
    assert second.param_groups[0]["lr"] == pytest.approx(0.0003)


def test_the_model_alone(path):
    model, optimizer = trained()
    for optimizers in ((), (optimizer,)):
        torchqat.save_checkpoint(path, model, *optimizers)
        other = small_net(5)
        torchqat.load_checkpoint(path, other)
        assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_counter_is_converted(path, dtype):
    """LibTorch's to(dtype) converts BatchNorm's counter of batches, and Python's does not."""
    integer, floating = nn.BatchNorm1d(2), nn.BatchNorm1d(2).to(dtype)
    floating.num_batches_tracked = torch.tensor(7, dtype=dtype)
    torchqat.save_checkpoint(path, floating)
    torchqat.load_checkpoint(path, integer)
    assert_same(integer.num_batches_tracked, torch.tensor(7))
    integer.num_batches_tracked.fill_(5)
    torchqat.save_checkpoint(path, integer)
    torchqat.load_checkpoint(path, floating)
    assert_same(floating.num_batches_tracked, torch.tensor(5, dtype=dtype))


def test_names_settings_and_version_are_in_the_file(path):
    model, optimizer = trained(bits=2, channel_dim=0)
    torchqat.save_checkpoint(path, model, optimizer)
    tensors, metadata = read(path)
    keys = ("latent", "scale", "momentum_buffer", "step")
    expected = {**model.state_dict()}
    for name in ("0.weight", "4.weight"):
        state = optimizer.state[model.get_parameter(name)]
        expected |= {f"optimizer.{name}.{key}": state[key] for key in keys}
    for name in ("1.weight", "1.bias", "2.alpha", "4.bias"):
        expected[f"optimizer.{name}.momentum_buffer"] = optimizer.state[model.get_parameter(name)][
            "momentum_buffer"
        ]
    assert_same(dict(sorted(tensors.items())), dict(sorted(expected.items())))
    assert metadata == {
        "format": "torchqat checkpoint 1",
        "torchqat": torchqat.__version__,
        "optimizer": "BCGD",
        "staircase_relu.2": "bits=2, ste=clipped_relu, alpha_grad=three_valued",
        "quantized.0.weight": "quant_bits=2, channel_dim=0, method=exact",
        "quantized.4.weight": "quant_bits=2, channel_dim=0, method=exact",
    }


class Shared(nn.Module):
    """A tied weight, a buffer that no state has, a generator's state, integers, and layouts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight
        self.fa = torchqat.nn.FastFeatureAffinityLoss(probes=2)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.nan = nn.Parameter(torch.tensor(float("nan")))


def test_tied_parameters_generators_and_odd_tensors(path):
    torch.manual_seed(3)
    model, other = Shared(), Shared()
    student = torch.randn(1, 2, 3, 3)
    model.fa(student, student + 1)  # moves its generator on
    torchqat.save_checkpoint(path, model)
    assert "out.weight" in read(path)[0] and "embedding.weight" in read(path)[0]
    torchqat.load_checkpoint(path, other)
    assert_same(other.state_dict(), model.state_dict())
    assert other.out.weight is other.embedding.weight
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(other.fa(student, student + 1), model.fa(student, student + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_keeps_its_dtype_and_the_latents_theirs(path, dtype):
    model, optimizer = trained()
    torchqat.save_checkpoint(path, model, optimizer)
    other, second = trained(dtype=dtype, seed=2)
    torchqat.load_checkpoint(path, other, second)
    assert all(p.dtype == dtype for p in other.parameters())
    latent = second.latent(other[0].weight)
    assert_same(latent, optimizer.latent(model[0].weight).to(latent.dtype))
    assert_same(other[4].bias.detach(), model[4].bias.detach().to(dtype))
    train(other, second, 1)  # silent: the parameters hold the projections of the latents


def test_the_model_keeps_its_device(path, device):
    model, optimizer = trained()
    torchqat.save_checkpoint(path, model, optimizer)
    moved = small_net(4).to(device)
    second = quantized(moved)
    torchqat.load_checkpoint(path, moved, second)
    assert all(p.device.type == device.type for p in moved.parameters())
    assert second.latent(moved[0].weight).device.type == device.type
    again = path.with_name("again.safetensors")
    torchqat.save_checkpoint(again, moved, second)
    assert again.read_bytes() == path.read_bytes()


def test_paths_of_every_kind(tmp_path, monkeypatch):
    model = small_net()
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "./dotted", "with spaces: and ü \U0001f600", "x" * 255):
        torchqat.save_checkpoint(name, model)
        torchqat.load_checkpoint(tmp_path / name, model)
    with pytest.raises(
        TypeError, match="save_checkpoint: path must be a str or os.PathLike of one, got b'x'"
    ):
        torchqat.save_checkpoint(b"x", model)
    with pytest.raises(TypeError):
        torchqat.load_checkpoint(3, model)
    with pytest.raises(ValueError, match="load_checkpoint: a path must have no NUL in it"):
        torchqat.load_checkpoint("a\0b", model)


# ---- other programs' files ----


def some_tensors():
    tensors = {}
    for dtype in DTYPES:
        for shape in ((3,), (), (0, 4), (2, 3, 4)):
            tensors[f"{str(dtype)[6:]}/{shape}"] = (torch.randn(shape) * 3).to(dtype)
    tensors["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return tensors


NAMES = [
    "",
    "plain",
    "a.b.c",
    'quote " and \\ backslash',
    "\n\t\r\b\f\x01\x1f\x7f\0",
    "ü€\U0001f600",
    "'{}[]:,",
]


def test_files_are_those_of_the_safetensors_package_byte_for_byte(tmp_path):
    tensors = some_tensors() | {name: torch.full((k + 1,), float(k)) for k, name in enumerate(NAMES)}
    for number, metadata in enumerate([{}, *({name: name[::-1]} for name in NAMES)]):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        save(ours, tensors, metadata)
        safetensors.torch.save_file(tensors, theirs, metadata or None)
        assert ours.read_bytes() == theirs.read_bytes()
        loaded, found = load(theirs)
        assert_same(loaded, dict(sorted(tensors.items())))
        assert found == metadata
        assert all(t.is_contiguous() for t in loaded.values())


def test_a_file_of_the_safetensors_package_loads_into_a_model(path):
    model, other = small_net(), small_net(1)
    safetensors.torch.save_file(model.state_dict(), path, {"format": "pt"})
    torchqat.load_checkpoint(path, other)
    assert_same(other.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"load_checkpoint: .*: must have the state of an optimizer"):
        torchqat.load_checkpoint(path, other, quantized(other))


def test_the_safetensors_package_loads_a_checkpoint_into_a_model(path):
    model, _ = trained()
    torchqat.save_checkpoint(path, model)
    other = small_net(1)
    other.load_state_dict(safetensors.torch.load_file(path))
    assert_same(other.state_dict(), model.state_dict())


def test_layouts_are_written_row_by_row(path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": torch.ones(()).expand(3, 2),
        "negated": torch.imag(torch.complex(base, base).conj()),
        "channels_last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "grad": base.clone().requires_grad_(),
    }
    save(path, tensors)
    assert_same(load(path)[0], {name: t.detach().contiguous() for name, t in sorted(tensors.items())})


@pytest.mark.parametrize(
    "tensors, metadata, error, message",
    [
        (
            {"z": torch.zeros(2, dtype=torch.complex64)},
            {},
            TypeError,
            "tensor 'z' has the dtype ComplexFloat",
        ),
        ({"s": torch.eye(2).to_sparse()}, {}, TypeError, "tensor 's' must be dense"),
        ({"m": torch.empty(2, device="meta")}, {}, TypeError, "tensor 'm' must be dense and have values"),
        ({"__metadata__": torch.ones(1)}, {}, ValueError, "a name must be UTF-8 and not __metadata__"),
        ({}, {"k": "v" * 100_000_000}, ValueError, "names and the metadata must fit 100000000 bytes"),
    ],
)
def test_what_cannot_be_written(path, tensors, metadata, error, message):
    with pytest.raises(error, match=f"^save_safetensors: .*{message}"):
        save(path, tensors, metadata)
    assert not list(path.parent.iterdir())


def test_names_are_given_once_each(path):
    one = torch.ones(1)
    with pytest.raises(ValueError, match="one name for each of 2 tensors, got 1"):
        torch.ops.qat._save_safetensors(str(path), ["a"], [one, one], {})
    with pytest.raises(ValueError, match="the name 'a' is there twice"):
        torch.ops.qat._save_safetensors(str(path), ["a", "a"], [one, one], {})


# ---- damaged files ----


def file_of(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape="[1]", offsets="[0,4]"):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def one(text=None, data=b"1234", **fields):
    """A file of the tensor `a`."""
    return file_of(f'{{"a":{entry(**fields) if text is None else text}}}', data)


def two(first, second, data=8):
    return file_of(f'{{"a":{entry(offsets=first)},"b":{entry(offsets=second)}}}', bytes(data))


BIG = 2**62
DAMAGED = {
    "empty file": (b"", "must have 8 bytes for a length, has 0"),
    "half a length": (b"\x02\0\0", "must have 8 bytes for a length, has 3"),
    "header longer than the file": (file_of("{}", length=3), "the header must be within 2 bytes, got .* 3"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "got a length of 18446744073709551615"),
    "header of 2^63 bytes": (file_of("{}", length=2**63), "got a length of 9223372036854775808"),
    "no header": (file_of(""), "must begin with '{'"),
    "space before it": (file_of(" {}"), "must begin with '{'"),
    "a list": (file_of("[]"), "must begin with '{'"),
    "unclosed": (file_of("{"), "must have a string at byte 1"),
    "more behind it": (file_of("{}{}"), "must have nothing but spaces at byte 2"),
    "NUL behind it": (file_of(b"{}\0"), "must have nothing but spaces at byte 2"),
    "no UTF-8": (file_of(b'{"\xff":{}}'), "must be UTF-8"),
    "overlong UTF-8": (file_of(b'{"\xc0\x80":{}}'), "must be UTF-8"),
    "surrogate in UTF-8": (file_of(b'{"\xed\xa0\x80":{}}'), "must be UTF-8"),
    "UTF-8 cut off": (file_of(b'{"a":{}}\xe2\x82'), "must be UTF-8"),
    "trailing comma": (one('{"dtype":"F32",}'), "must have a string"),
    "no colon": (file_of('{"a" {}}'), "must have ':' at byte 5"),
    "no comma": (file_of('{"__metadata__":{"a":"b" "c":"d"}}'), "must have ',' or '}'"),
    "unclosed string": (file_of('{"a'), "must have the end of a string at byte 3"),
    "unclosed escape": (file_of('{"a\\'), "must have a known escape"),
    "unknown escape": (file_of('{"\\x":1}'), "must have a known escape"),
    "short escape": (file_of('{"\\u12":1}'), "must have four hexadecimal digits"),
    "signed escape": (file_of('{"\\u-123":1}'), "must have four hexadecimal digits"),
    "lone surrogate": (file_of('{"\\ud800":1}'), "must have surrogates in pairs"),
    "low surrogate first": (file_of('{"\\udc00\\ud800":1}'), "must have surrogates in pairs"),
    "two high surrogates": (file_of('{"\\ud800\\ud800":1}'), "must have surrogates in pairs"),
    "control character": (file_of('{"a\n":1}'), "must have no control character"),
    "name twice": (two("[0,4]", "[4,8]").replace(b'"b"', b'"a"'), "the name 'a' is there twice"),
    "name twice, escaped": (file_of(f'{{"a":{entry()},"\\u0061":{entry()}}}', b"1234"), "'a' is there twice"),
    "metadata twice": (file_of('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is there twice"),
    "metadata key twice": (file_of('{"__metadata__":{"k":"1","k":"2"}}'), "metadata 'k' is there twice"),
    "metadata of a number": (file_of('{"__metadata__":{"k":1}}'), "must have a string"),
    "metadata of an object": (file_of('{"__metadata__":{"k":{}}}'), "must have a string"),
    "metadata of null": (file_of('{"__metadata__":null}'), "must have '{'"),
    "tensor of null": (one("null"), "must have '{'"),
    "nested too deep": (one("[" * 10000), "must have '{'"),
    "objects too deep": (file_of('{"a":' * 100000), "data_offsets once each, got 'a'"),
    "no dtype": (one('{"shape":[1],"data_offsets":[0,4]}'), "'a' must have dtype, shape and two"),
    "no shape": (one('{"dtype":"F32","data_offsets":[0,4]}'), "'a' must have dtype, shape and two"),
    "no offsets": (one('{"dtype":"F32","shape":[1]}'), "'a' must have dtype, shape and two data_offsets"),
    "one offset": (one(offsets="[0]"), "'a' must have dtype, shape and two data_offsets"),
    "three offsets": (one(offsets="[0,4,4]"), "'a' must have dtype, shape and two data_offsets"),
    "dtype twice": (one('{"dtype":"F32","dtype":"F32"}'), "once each, got 'dtype'"),
    "unknown field": (one('{"strides":[1]}'), "once each, got 'strides'"),
    "dtype of a number": (one('{"dtype":32}'), "must have a string"),
    "unknown dtype": (one(dtype="F8_E4M3"), "'a' has the dtype 'F8_E4M3', which torchqat"),
    "lower-case dtype": (one(dtype="f32"), "has the dtype 'f32'"),
    "negative size": (one(shape="[-1]"), r"must have an integer from 0 to 2\^63 - 1"),
    "leading zero": (one(shape="[01]"), "must have an integer"),
    "a float": (one(shape="[1.0]"), "must have ',' or '\\]'"),
    "an exponent": (one(shape="[1e0]"), "must have ',' or '\\]'"),
    "size of 2^63": (one(shape=f"[{2**63}]"), "must have an integer"),
    "size of 10^400": (one(shape=f"[1{'0' * 400}]"), "must have an integer"),
    "shape overflows": (one(shape=f"[{BIG},{BIG}]"), "the shape of tensor 'a' overflows"),
    "shape overflows to 4": (one(shape=f"[{BIG},4,1]"), "the shape of tensor 'a' overflows"),
    "empty, strides overflow": (one(shape=f"[0,{BIG},8]", offsets="[0,0]"), "of tensor 'a' overflows"),
    "too large a shape": (one(shape="[2]"), "tensor 'a' must have 8 bytes, Float of shape \\[2\\], got"),
    "too small a shape": (one(shape="[]", offsets="[0,8]", data=bytes(8)), "tensor 'a' must have 4 bytes"),
    "wrong dtype": (one(dtype="F64"), "tensor 'a' must have 8 bytes, Double of shape \\[1\\]"),
    "begin after end": (one(offsets="[4,0]"), "the bytes of tensor 'a' must begin at 0"),
    "beyond the file": (one(offsets="[0,8]", shape="[2]"), "lie within 4, got data_offsets 0 to 8"),
    "far beyond the file": (one(offsets=f"[0,{BIG}]", shape=f"[{BIG // 4}]"), "lie within 4"),
    "a hole at the start": (one(offsets="[4,8]", data=bytes(8)), "must begin at 0"),
    "a hole": (two("[0,4]", "[8,12]", 12), "the bytes of tensor 'b' must begin at 4"),
    "an overlap": (two("[0,4]", "[2,6]"), "the bytes of tensor 'b' must begin at 4"),
    "the same bytes": (two("[0,4]", "[0,4]", 4), "must begin at 4"),
    "bytes left over": (one(data=b"12345"), "the tensors must fill the 5 bytes of data, got 4"),
    "bytes of no tensor": (file_of("{}", b"1"), "the tensors must fill the 1 bytes of data, got 0"),
    "a boolean of 2": (one(dtype="BOOL", offsets="[0,1]", data=b"\x02"), "'a' is BOOL and must have"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused_by_name(path, what):
    content, message = DAMAGED[what]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^load_safetensors: {re.escape(str(path))}: .*{message}"):
        load(path)
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^load_checkpoint: {re.escape(str(path))}: .*{message}"):
        torchqat.load_checkpoint(path, model)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"data_offsets" : [ 0 , 4 ],\t"shape":\r\n[1], "dtype":"F32"} }   ',
        '{"\\u0061":{"dtype":"\\u00462\\u0031"'.replace("2\\u0031", "32")
        + ',"shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"z":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
    ],
)
def test_headers_may_be_written_in_other_ways(path, text):
    path.write_bytes(file_of(text, struct.pack("<f", 2.5)))
    assert load(path)[0]["a"].tolist() == [2.5]


def test_escapes_are_read(path):
    name = '"\\/\b\f\n\r\t ü\U0001f600\U0010ffff\uffff\0'
    path.write_bytes(file_of(json.dumps({"__metadata__": {name: name}}).replace("/", "\\/")))
    assert load(path)[1] == {name: name}


def load_or_refuse(path, content):
    path.write_bytes(content)
    try:
        load(path)
    except ValueError as error:
        assert str(error).startswith(f"load_safetensors: {path}: ")
        return False
    return True


def small_file(path):
    tensors = {"a": torch.ones(2), "b\n": torch.zeros(3, dtype=torch.bool), "ü": torch.empty(0, 2)}
    save(path, tensors, {"key": "\U0001f600 value"})
    return path.read_bytes()


def test_a_file_cut_off_anywhere_is_refused(path):
    content = small_file(path)
    assert load_or_refuse(path, content)
    assert not any(load_or_refuse(path, content[:length]) for length in range(len(content)))
    assert not load_or_refuse(path, content + b"\0")


def test_every_flipped_byte_loads_or_is_refused(path):
    content = small_file(path)
    rng = random.Random(0)
    for position in range(len(content)):
        for value in {0, 0xFF, ord('"'), ord("9"), content[position] ^ 1 << rng.randrange(8)}:
            load_or_refuse(path, content[:position] + bytes([value]) + content[position + 1 :])


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2), st.binary(max_size=4)), min_size=1, max_size=6)
)
def test_random_edits_load_or_are_refused(path, edits):
    content = small_file(path)
    for position, removed, inserted in edits:
        content = content[:position] + inserted + content[position + removed :]
    load_or_refuse(path, content)


TOKENS = ["{", "}", "[", "]", ":", ",", '"', "\\", "\\u12", '"a"', '"dtype"', '"F32"', '"shape"',
          '"data_offsets"', '"__metadata__"', "0", "4", "18446744073709551616", "-", ".", "e", "null", " ",
          "\xff"]  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(TOKENS), max_size=20), st.binary(max_size=8))
def test_random_headers_load_or_are_refused(path, tokens, data):
    load_or_refuse(path, file_of("{" + "".join(tokens), data))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=5).filter(lambda name: name != "__metadata__"), st.integers(0, 3)),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
)
def test_any_names_and_metadata_come_back_and_the_package_reads_them(path, sizes, metadata):
    tensors = {name: torch.arange(float(size)) for name, size in sizes.items()}
    save(path, tensors, metadata)
    loaded, found = load(path)
    assert_same({name: loaded[name] for name in tensors}, tensors)
    assert found == metadata and loaded.keys() == tensors.keys()
    theirs, found = read(path)
    assert_same({name: theirs[name] for name in tensors}, tensors)
    assert (found or {}) == metadata


# ---- what the system refuses ----


@pytest.mark.parametrize("what", ["save", "load"])
def test_errors_of_the_system_have_their_class_and_reason(tmp_path, what):
    model, call = small_net(), getattr(torchqat, f"{what}_checkpoint")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path, error, reason in (
        (tmp_path / "no" / "where", FileNotFoundError, "No such file or directory"),
        (tmp_path, IsADirectoryError, "Is a directory"),
        (tmp_path / "file" / "x", NotADirectoryError, "Not a directory"),
        (tmp_path / "pipe", OSError, "not a regular file"),
        ("/dev/full", OSError, "not a regular file"),
        (tmp_path / ("x" * 256), OSError, "File name too long"),
    ):
        with pytest.raises(error, match=f"^{what}_checkpoint: {re.escape(str(path))}: {reason}$") as caught:
            call(path, model)
        assert caught.value.errno
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_permissions(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    torchqat.save_checkpoint(path, small_net())
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError, match="save_checkpoint: .*: Permission denied"):
        torchqat.save_checkpoint(path, small_net())
    path.chmod(0)
    with pytest.raises(PermissionError, match="load_checkpoint: .*: Permission denied"):
        torchqat.load_checkpoint(path, small_net())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path):
    """A file beyond the limit of the process: as a full disk, in the midst of the tensors."""
    torchqat.save_checkpoint(path, small_net())
    before = path.read_bytes()
    program = f"""
        import resource, signal, torch, torchqat
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            torchqat.save_checkpoint({str(path)!r}, torch.nn.Linear(100, 100))
        except OSError as error:
            print(error, end="")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"save_checkpoint: {path}: File too large"
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_through_a_link_and_has_the_usual_permissions(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    torchqat.save_checkpoint(real, small_net(1))
    link.symlink_to("real")
    torchqat.save_checkpoint(link, small_net(2))
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    model = small_net()
    torchqat.load_checkpoint(real, model)
    assert_same(model.state_dict(), small_net(2).state_dict())
    (tmp_path / "other").touch()
    assert stat.S_IMODE(real.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


# ---- checkpoints that do not fit ----


def edited(path, change):
    """The checkpoint again, with its tensors and metadata changed."""
    tensors, metadata = load(path)
    change(tensors, metadata)
    save(path, tensors, metadata)


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def replaced(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def says(name, value):
    return lambda tensors, metadata: metadata.update({name: value})


def forgets(name):
    return lambda tensors, metadata: metadata.pop(name)


THREE_BITS = "bits=3, ste=clipped_relu, alpha_grad=three_valued"
MISFITS = [
    (without("4.bias"), "must have the names of the model, lacks '4.bias'"),
    (without("2.alpha"), "must have the names of the model, lacks '2.alpha'"),
    (replaced("5.weight", torch.ones(1)), "must have the names of the model, also has '5.weight'"),
    (replaced("4.bias", torch.ones(6)), r"'4.bias' must have shape \(5,\), got \(6,\)"),
    (replaced("4.bias", torch.ones(5).int()), "'4.bias' must be torch.float32, got torch.int32"),
    (replaced("1.num_batches_tracked", torch.tensor(2.5)), "must be a whole number for torch.int64, got 2.5"),
    (replaced("1.num_batches_tracked", torch.tensor(torch.nan)), "must be a whole number .*, got nan"),
    (replaced("1.num_batches_tracked", torch.tensor(True)), "must be torch.int64, got torch.bool"),
    (says("format", "torchqat checkpoint 2"), "format must be 'torchqat checkpoint 1', got '.* 2'"),
    (
        says("staircase_relu.2", THREE_BITS),
        "StaircaseReLU '2' must be the same in the file and in the model: the file has bits=3, .*; the model "
        "has bits=2, ste=clipped_relu, alpha_grad=three_valued",
    ),
    (forgets("staircase_relu.2"), "StaircaseReLU '2' must be .* the file has none; the model has bits=2"),
    (says("staircase_relu.3", THREE_BITS), "StaircaseReLU '3' must be .* bits=3, .*; the model has none"),
]
MISFITS_OF_THE_OPTIMIZER = [
    (
        says("quantized.0.weight", "quant_bits=2, channel_dim=None, method=exact"),
        "quantized parameter '0.weight' must be the same in the file and in the optimizer: the file has "
        "quant_bits=2, .*; the optimizer has quant_bits=1, channel_dim=None, method=exact",
    ),
    (forgets("quantized.0.weight"), "'0.weight' must be .* the file has none; the optimizer has"),
    (says("quantized.4.bias", "quant_bits=1"), "'4.bias' must be .* quant_bits=1; the optimizer has none"),
    (says("optimizer", "SGD"), "the optimizer must be 'BCGD', got 'SGD'"),
    (forgets("optimizer"), "must have the state of an optimizer; to load the model alone give none"),
    (without("optimizer.0.weight.latent"), "no latent for parameter '0.weight', which is quantized"),
    (without("optimizer.4.weight.scale"), "no scale for parameter '4.weight', which is quantized"),
    (without("optimizer.4.weight.step"), "only one of momentum_buffer and step for parameter '4.weight'"),
    (replaced("optimizer.0.weight.latent", torch.ones(2)), r"latent of parameter '0.weight' .* got \(2,\)"),
    (replaced("optimizer.4.bias.momentum_buffer", torch.ones(2)), "momentum_buffer of parameter '4.bias'"),
    (replaced("optimizer.0.weight.exp_avg", torch.ones(2)), "floating-point latent, .* got 'opt.*exp_avg'"),
    (replaced("optimizer.0.weight.step", torch.tensor(1)), "must be floating-point .* of torch.int64"),
    (replaced("optimizer.7.bias.momentum_buffer", torch.ones(2)), "has a state for '7.bias', which is not"),
    (replaced("optimizer.latent", torch.ones(2)), "has a state for ''"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", MISFITS + MISFITS_OF_THE_OPTIMIZER)
def test_what_does_not_fit_is_said_and_changes_nothing(path, change, message):
    torchqat.save_checkpoint(path, *trained())
    edited(path, change)
    model, optimizer = trained(seed=8)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=f"^load_checkpoint: {re.escape(str(path))}: .*{message}"):
        torchqat.load_checkpoint(path, model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 1)  # silent: nothing was touched


@pytest.mark.parametrize("change, message", MISFITS)
def test_what_does_not_fit_the_model_alone(path, change, message):
    torchqat.save_checkpoint(path, *trained())
    edited(path, change)
    model = small_net(8)
    with pytest.raises(ValueError, match=message):
        torchqat.load_checkpoint(path, model)
    assert_same(model.state_dict(), small_net(8).state_dict())


@pytest.mark.parametrize("change", [change for change, _ in MISFITS_OF_THE_OPTIMIZER])
def test_the_model_alone_does_not_look_at_the_optimizers_state(path, change):
    trained_model, optimizer = trained()
    torchqat.save_checkpoint(path, trained_model, optimizer)
    edited(path, change)
    model = small_net(8)
    torchqat.load_checkpoint(path, model)
    assert_same(model.state_dict(), trained_model.state_dict())


def test_many_names_are_not_all_said(path):
    save(path, {f"{k:02}": torch.ones(1) for k in range(20)})
    with pytest.raises(ValueError, match="also has '00', '01', '02', '03', '04' and 15 more$"):
        torchqat.load_checkpoint(path, nn.Module())


def test_a_model_that_refuses_its_state_is_left_as_it_was(path):
    model = nn.Sequential(nn.Linear(2, 2), torchqat.nn.FastFeatureAffinityLoss())
    torchqat.save_checkpoint(path, model)
    edited(path, replaced("1._extra_state", torch.zeros(3, dtype=torch.uint8)))
    other = nn.Sequential(nn.Linear(2, 2), torchqat.nn.FastFeatureAffinityLoss())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError):
        torchqat.load_checkpoint(path, other)
    assert_same(other.state_dict(), before)


class WithOptions(nn.Linear):
    def get_extra_state(self):
        return {"options": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("what", ["save", "load"])
def test_models_and_optimizers_that_no_checkpoint_is_made_of(path, what):
    call = getattr(torchqat, f"{what}_checkpoint")
    torchqat.save_checkpoint(path, nn.Linear(2, 2))
    model, inner = nn.Linear(2, 2), nn.ModuleDict({"optimizer": nn.Linear(2, 2)})
    for arguments, error, message in (
        ((WithOptions(2, 2),), TypeError, "'_extra_state' is dict"),
        ((nn.LazyLinear(2),), ValueError, "'weight' has no shape yet: run a batch through the model first"),
        ((inner,), ValueError, "no name in the model must begin with 'optimizer.', got 'optimizer.weight'"),
        ((model, torch.optim.SGD(model.parameters())), TypeError, "must be a torchqat.optim.BCGD, got SGD"),
    ):
        with pytest.raises(error, match=f"^{what}_checkpoint: .*{message}"):
            call(path, *arguments)
    optimizer = BCGD(param_groups(model, 1), lr=0.1)
    torchqat.save_checkpoint(path, model, optimizer)
    with (
        optimizer.latents(),
        pytest.raises(RuntimeError, match=f"{what}_checkpoint must not be called inside"),
    ):
        call(path, model, optimizer)


@pytest.mark.parametrize("what", ["save", "load"])
def test_parameters_of_a_connector_need_a_module_that_holds_both(path, what):
    both = nn.ModuleDict({"model": nn.Linear(2, 2), "connector": nn.Linear(2, 3)})
    connectors = {"name": "connectors", "params": [both["connector"].weight], "quant_bits": None}
    optimizer = BCGD([*param_groups(both["model"], 1), connectors], lr=0.1)
    torchqat.save_checkpoint(path, both, optimizer)
    torchqat.load_checkpoint(path, both, optimizer)
    torchqat.save_checkpoint(path, both["model"], BCGD(param_groups(both["model"], None), lr=0.1))
    with pytest.raises(
        ValueError,
        match=rf"^{what}_checkpoint: parameter 0 of the optimizer's group 2 \(connectors\), of shape "
        r"\(3, 2\), is not in the model: give a module that holds both$",
    ):
        getattr(torchqat, f"{what}_checkpoint")(path, both["model"], optimizer)


def test_a_foreign_state_of_an_optimizer_is_not_saved(path):
    model, optimizer = trained()
    optimizer.state[model[4].bias]["exp_avg"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match="the optimizer's state of '4.bias' must be tensors .* got 'exp_avg'"
    ):
        torchqat.save_checkpoint(path, model, optimizer)
    assert not path.exists()


def test_the_state_of_sgd_without_momentum_has_none(path):
    model, optimizer = trained(bits=None, momentum=0.0)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = None  # as loading the state of torch.optim.SGD leaves it
    torchqat.save_checkpoint(path, model, optimizer)
    torchqat.load_checkpoint(path, model, optimizer)


def test_a_checkpoint_within_latents_is_that_of_the_float_network(path):
    model, optimizer = trained()
    with optimizer.latents():
        torchqat.save_checkpoint(path, model)
    assert_same(load(path)[0]["0.weight"], optimizer.latent(model[0].weight))
