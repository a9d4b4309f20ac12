"""A C++ program and Python train the same network to the same bits."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchqat
from cmake_projects import folder_of_build, missing
from safetensors.torch import load_file, save_file
from torchqat.distill import Distiller, FAQDLoss
from torchqat.nn import FastFeatureAffinityLoss
from torchqat.optim import BCGD, param_groups

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
import models  # noqa: E402

STEPS, BATCH = 100, 16


@pytest.fixture
def train_steps():
    """The program of the build in use; `make test` builds it."""
    program = folder_of_build() / "tests/cpp/train_steps"
    if not program.exists():
        missing(f"{program} is not built")
    return program


def images_with_classes(steps):
    """Images of squares in places that tell their class: something to learn."""
    torch.manual_seed(1)
    labels = torch.randint(10, (steps, BATCH))
    images = 0.5 * torch.randn(steps, BATCH, 1, 28, 28)
    for (step, i), label in zip(
        torch.cartesian_prod(*map(torch.arange, labels.shape)), labels.flatten(), strict=True
    ):
        row, column = divmod(int(label), 5)
        images[step, i, 0, 4 + 12 * row : 12 + 12 * row, 5 * column : 5 * column + 6] += 2
    return images, labels


def optimizer_of(student):
    return BCGD(param_groups(student, weight_bits=1), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(student, optimizer, teacher, batches):
    """The losses of the steps that tests/cpp/train_steps.cpp takes."""
    losses = []
    with Distiller(student, teacher.eval(), {"6": "6"}, FAQDLoss(fa=FastFeatureAffinityLoss())) as distiller:
        for images, labels in batches:
            loss = distiller(images, labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


def test_a_hundred_steps_in_cpp_are_those_in_python_bit_by_bit(train_steps, tmp_path, one_thread):
    torch.manual_seed(0)
    images, labels = images_with_classes(STEPS)
    batches = list(zip(images, labels, strict=True))
    teacher = models.lenet5(channels=1, size=28, classes=10)
    student = torchqat.prepare(copy.deepcopy(teacher), act_bits=2)
    start = {f"{name}.{key}": value for name, net in (("teacher", teacher), ("student", student))
             for key, value in net.state_dict().items()}  # fmt: skip
    save_file({**copy.deepcopy(start), "images": images, "labels": labels}, tmp_path / "in.safetensors")
    command = [train_steps, tmp_path / "in.safetensors", tmp_path / "cpp.safetensors"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    torchqat.calibrate(student, [images[0]])
    optimizer = optimizer_of(student)
    losses = train(student, optimizer, teacher, batches)
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()  # it has learned something
    assert torch.equal(load_file(tmp_path / "cpp.safetensors.losses")["losses"], losses)
    torchqat.save_checkpoint(tmp_path / "python.safetensors", student, optimizer)
    cpp, python = (load_file(tmp_path / f"{language}.safetensors") for language in ("cpp", "python"))
    assert cpp.keys() == python.keys()
    assert [name for name in python if not torch.equal(python[name], cpp[name])] == []
    assert any(name.endswith(".latent") for name in python)

    # What C++ wrote, Python goes on with.
    other = torchqat.prepare(models.lenet5(channels=1, size=28, classes=10), act_bits=2)
    its_optimizer = optimizer_of(other)
    torchqat.load_checkpoint(tmp_path / "cpp.safetensors", other, its_optimizer)
    assert torch.equal(
        train(other, its_optimizer, teacher, batches[:5]), train(student, optimizer, teacher, batches[:5])
    )
    for p, q in zip(other.parameters(), student.parameters(), strict=True):
        assert torch.equal(p, q)
