"""The Python of the README, run as a reader would: block after block in one program."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import safetensors
from small_nets import assert_same
from torch.nn import functional as F

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def printed():
    return io.StringIO()


@pytest.fixture
def program(tmp_path, printed):
    """What the blocks leave behind: the names of each, after it ran, with no warning."""
    names, after = {}, []
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
            after.append(dict(names))
    return after


def test_training_ends_with_binary_weights(program, printed):
    weight = program[0]["model"][0].weight
    assert weight.unique().numel() == 2
    assert weight.numel() == int(printed.getvalue().split()[0])  # all latents differ


def test_a_checkpoint_goes_on_bit_for_bit(program):
    runs = []
    for names in program[:2]:
        model, optimizer = names["model"], names["optimizer"]
        optimizer.zero_grad()
        F.cross_entropy(model(names["images"]), names["labels"]).backward()
        optimizer.step()
        runs.append([model.state_dict(), optimizer.state_dict()])
    assert program[0]["model"] is not program[1]["model"]
    assert_same(*runs)


def test_a_safetensors_checkpoint_is_of_the_same_model(program, tmp_path):
    model = program[2]["model"]
    with safetensors.safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert_same(file.get_tensor("0.weight"), model[0].weight.detach())
        assert "optimizer.0.weight.latent" in file.keys()  # noqa: SIM118


def test_a_teacher_in_place_of_labels(program):
    student, teacher, result = (program[3][name] for name in ("student", "teacher", "result"))
    assert student[0].weight.unique().numel() == 2 and teacher[0].weight.unique().numel() > 2
    assert result.terms.kd > 0 and result.terms.fa > 0 and result.terms.label is None


def test_every_block_of_python_is_tried():
    assert len(BLOCKS) == README.count("```python") == 4
