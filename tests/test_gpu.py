"""What only a GPU can show of every operator: no host synchronization, CUDA graphs, streams, repeatability,
and agreement with the CPU. scripts/gpu_check.sh runs this file under compute-sanitizer too."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torchqat import functional as F
from torchqat.nn import FastFeatureAffinityLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]

# Around a vector, a warp, a block and a wave of blocks.
SIZES = (1, 7, 33, 255, 1025, 70_001)


@dataclass
class Case:
    """An operator with arguments: `run` returns what it computes, or what it changed in place."""

    inputs: list[torch.Tensor]
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]]

    def on(self, device):
        return [t.to(device, copy=True) for t in self.inputs]


def staircase(dtype, ste, channels=None):
    x = torch.randn(16, 8, 31, 33, dtype=dtype)
    alpha = torch.rand(channels or (), dtype=torch.float32) + 0.1

    def run(inputs):
        x, alpha, grad = inputs[0].requires_grad_(), inputs[1].requires_grad_(), inputs[2]
        y = F.staircase_relu(x, alpha, 2, ste=ste)
        return [y.detach(), *torch.autograd.grad(y, (x, alpha), grad)]

    return Case([x, alpha, torch.randn_like(x)], run)


def codes(dtype):
    x = torch.randn(16, 8, 31, 33, dtype=dtype)
    return Case([x, torch.tensor(0.3)], lambda inputs: [F.staircase_codes(*inputs, 4)])


def kept(bits, dtype=torch.float32):
    """y, what is kept of it, y once more, and the gradients of a network that keeps codes."""
    x = torch.randn(16, 8, 31, 33, dtype=dtype)

    def run(inputs):
        x, alpha = inputs[0].requires_grad_(), inputs[1].requires_grad_()
        op = torch.ops.qat
        y, codes = op._staircase_relu_forward(x.detach(), alpha.detach(), bits, 1, True)
        again = op._staircase_relu_rebuild(codes, alpha.detach(), y.shape, y.stride(), dtype, bits, 1, y)
        z = F.staircase_relu(x, alpha, bits, alpha_grad="exact", save_codes=True)
        grads = torch.autograd.grad(
            op._max_pool2d(z, [2, 2], [2, 2], [0, 0], [1, 1], False).sum(), (x, alpha)
        )
        return [y, codes, again, *grads]

    return Case([x, torch.rand(8) + 0.1], run)


def packing(bits):
    codes = torch.randint(0, 2**bits, (70_001,), dtype=torch.uint8)

    def run(inputs):
        packed = F.pack_codes(inputs[0], bits)
        return [packed, F.unpack_codes(packed, bits, [70_001])]

    return Case([codes], run)


def weights(bits, method="exact", channel_dim=None):
    def run(inputs):
        quantized, scale = F.quantize_weight(inputs[0], bits, method=method, channel_dim=channel_dim)
        return [quantized, scale, F.weight_codes(inputs[0], scale, bits, channel_dim=channel_dim)]

    return Case([torch.randn(64, 300, dtype=torch.float64)], run)


def step(bits, method="exact"):
    shapes = [size for size in SIZES for _ in range(20)]
    lists = [[torch.randn(size, dtype=torch.float64) for size in shapes] for _ in range(4)]
    tail = [torch.full((), 0.2, dtype=torch.float64) for _ in shapes] + [torch.tensor(2.0) for _ in shapes]
    lr = torch.tensor(0.05, dtype=torch.float64)

    def run(inputs):
        k = len(shapes)
        params, grads, latents, buffers, scales, steps = (list(inputs[i * k : (i + 1) * k]) for i in range(6))
        options = {"bits": bits, "method": method, "momentum": 0.9, "weight_decay": 1e-4}
        F.bcgd_step_(params, grads, latents, scales, buffers, steps, lr=inputs[-1], **options)
        return inputs

    return Case([*sum(lists, []), *tail, lr], run)


def affinity(dtype, loss, *probes, spatial=(9, 13), **options):
    """The loss and the gradient; only the loss of l1 below float64, whose gradient has signs of rounding."""
    student, teacher = (torch.randn(3, channels, *spatial, dtype=dtype) for channels in (20, 17))

    def run(inputs):
        student = inputs[0].requires_grad_()
        value = loss(student, *inputs[1:], **options)
        gradient = torch.autograd.grad(value, student)
        return [value.detach(), *(gradient if options["norm"] == "fro" or dtype == torch.float64 else ())]

    return Case([student, teacher, *probes], run)


CASES = {
    **{f"staircase_relu-{ste}": lambda ste=ste: staircase(torch.float32, ste) for ste in F.ste_names()},
    **{
        f"staircase_relu-{dtype}": lambda dtype=dtype: staircase(dtype, "clipped_relu")
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    },
    "staircase_relu-channels": lambda: staircase(torch.float32, "clipped_relu", channels=8),
    "staircase_codes": lambda: codes(torch.float32),
    **{f"staircase_relu-kept-{bits}": lambda bits=bits: kept(bits) for bits in (1, 2, 4, 8)},
    "staircase_relu-kept-bfloat16": lambda: kept(4, torch.bfloat16),
    **{f"pack_codes-{bits}": lambda bits=bits: packing(bits) for bits in (1, 2, 4, 8)},
    **{f"quantize_weight-{bits}": lambda bits=bits: weights(bits) for bits in (1, 2, 3, 4, 8)},
    "quantize_weight-channels": lambda: weights(4, channel_dim=0),
    "quantize_weight-lloyd": lambda: weights(4, "lloyd"),
    "quantize_weight-twn": lambda: weights(2, "twn"),
    **{f"bcgd_step_-{bits}": lambda bits=bits: step(bits) for bits in (1, 2, 4)},
    "bcgd_step_-lloyd": lambda: step(3, "lloyd"),
    **{
        f"feature_affinity_loss-{norm}-{dtype}": lambda norm=norm, dtype=dtype: affinity(
            dtype, F.feature_affinity_loss, norm=norm
        )
        for norm in ("l1", "fro")
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    "feature_affinity_loss-direct": lambda: affinity(
        torch.float32, F.feature_affinity_loss, norm="fro", spatial=(3, 3)
    ),
    **{
        f"fast_feature_affinity_loss-{norm}": lambda norm=norm: affinity(
            torch.float64, F.fast_feature_affinity_loss, torch.randn(9 * 13, 5), norm=norm
        )
        for norm in ("l1", "fro")
    },
    "bcgd_step_-twn": lambda: step(2, "twn"),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_the_gpu_agrees_with_the_cpu(case):
    on_gpu = [t.cpu() for t in case.run(case.on("cuda"))]
    torch.testing.assert_close(on_gpu, case.run(case.on("cpu")), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_l1_affinity_gradients_agree_with_the_cpu_as_a_whole(dtype):
    """Element by element they cannot: signs of elements of S near 0 are rounding."""
    student, teacher = (torch.randn(3, channels, 17, 13).to(dtype) for channels in (70, 33))
    gradients = []
    for device in ("cpu", "cuda"):
        leaf = student.to(device).requires_grad_()
        (1e4 * F.feature_affinity_loss(leaf, teacher.to(device))).backward()
        gradients.append(leaf.grad.double().cpu())
    assert (gradients[1] - gradients[0]).norm() < max(1e-3, torch.finfo(dtype).eps) * gradients[0].norm()


def test_the_values_of_the_staircase_are_those_of_the_cpu():
    case = staircase(torch.float32, "clipped_relu")
    (y, grad_x, _), (y_gpu, grad_x_gpu, _) = case.run(case.on("cpu")), case.run(case.on("cuda"))
    assert_same([y_gpu.cpu(), grad_x_gpu.cpu()], [y, grad_x])


def test_runs_repeat_bit_for_bit(case):
    first = [t.clone() for t in case.run(case.on("cuda"))]
    for _ in range(3):
        assert_same(case.run(case.on("cuda")), first)


def test_nothing_waits_for_the_device(case):
    inputs = case.on("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_is_used_where_it_is_current(case):
    expected = [t.clone() for t in case.run(case.on("cuda"))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs = case.on("cuda")
        torch.cuda._sleep(10_000_000)  # work on any other stream would overtake the inputs
        for t, source in zip(inputs, case.inputs, strict=True):
            t.copy_(source, non_blocking=True)
        actual = case.run(inputs)
    stream.synchronize()
    assert_same(actual, expected)


def test_a_cuda_graph_replays_it(case):
    expected = [t.clone() for t in case.run(case.on("cuda"))]
    inputs = case.on("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(inputs)  # what is set up once is set up outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.run(inputs)
    for _ in range(2):
        with torch.no_grad():
            for t, source in zip(inputs, case.inputs, strict=True):
                t.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(outputs, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU on this machine")
def test_the_second_gpu_is_used_where_the_tensors_are(case):
    expected = [t.cpu() for t in case.run(case.on("cuda:0"))]
    actual = case.run(case.on("cuda:1"))
    assert all(t.device.index == 1 for t in actual)
    assert_same([t.cpu() for t in actual], expected)


def test_probes_in_a_cuda_graph_are_new_at_each_replay():
    generator = torch.Generator("cuda").manual_seed(0)
    fast = FastFeatureAffinityLoss(generator=generator)
    student, teacher = (torch.randn(2, 4, 5, 5, device="cuda") for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        fast(student, teacher)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss = fast(student, teacher)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(loss.item())
    assert len(set(seen)) == 3


def test_probes_of_a_cpu_generator_are_those_of_the_cpu_and_wait_for_nothing():
    fast, other = FastFeatureAffinityLoss(), FastFeatureAffinityLoss()
    fast.draw(9, torch.device("cuda"))  # what is allocated only once
    other.draw(9, torch.device("cpu"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        probes = [fast.draw(9, torch.device("cuda")) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for v in probes:
        torch.testing.assert_close(v.cpu(), other.draw(9, torch.device("cpu")), rtol=0, atol=0)
