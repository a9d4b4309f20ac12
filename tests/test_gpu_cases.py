"""The cases of test_gpu.py cover every operator that has a CUDA kernel, and run on the CPU too."""

import torch
from gpu_cases import CASES, FOR_SANITIZERS, Training
from small_nets import assert_same
from torch.autograd.profiler import profile


def with_cuda_kernel():
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qat::")}
    return {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}


def called_by(names):
    """The operators that these cases call, in forward and backward."""
    with profile() as events:
        for name in names:
            case = CASES[name]()
            case.run(case.on("cpu"))
    return {event.name for event in events.function_events}


def test_every_operator_with_a_cuda_kernel_is_in_a_case():
    assert with_cuda_kernel() > {"qat::staircase_relu", "qat::_staircase_relu_backward"}
    assert with_cuda_kernel() - called_by(CASES) == set()


def test_the_cases_for_sanitizers_have_every_operator_too():
    assert FOR_SANITIZERS <= CASES.keys()
    assert with_cuda_kernel() - called_by(FOR_SANITIZERS) == set()


def trained(steps):
    training = Training("cpu")
    losses = []
    for number in range(steps):
        training.load(number)
        losses.append(training.step().item())
    return training, losses


def test_the_training_learns_and_repeats():
    training, losses = trained(8)
    again, same_losses = trained(8)
    assert losses == same_losses
    assert_same(training.state(), again.state())
    assert sum(losses[4:]) < 0.7 * sum(losses[:4]), losses


def test_a_step_of_the_training_changes_every_tensor_and_adds_none():
    """What it changes are the addresses that a graph writes to; those of the first step are made in it."""
    training, _ = trained(1)
    before = training.state()
    training.load(1)
    training.step()
    after = training.state()
    assert len(after) == len(before)
    same = [tuple(a.shape) for a, b in zip(after, before, strict=True) if torch.equal(a, b)]
    assert same == [], same
