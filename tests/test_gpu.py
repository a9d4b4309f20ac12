"""What only a GPU can show of every operator and of training: no host synchronization, CUDA graphs, streams,
repeatability, and agreement with the CPU. scripts/gpu_check.sh runs this file under compute-sanitizer too."""

import pytest
import torch
from gpu_cases import CASES, FOR_SANITIZERS, Training, staircase
from torchqat import functional as F
from torchqat.nn import FastFeatureAffinityLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def watched(name):
    return pytest.param(name, marks=[pytest.mark.sanitizer] if name in FOR_SANITIZERS else [])


@pytest.fixture(params=[watched(name) for name in CASES])
def case(request):
    return CASES[request.param]()


@pytest.fixture
def same_convolutions():
    """cuDNN takes the same algorithms each time, and none that adds in an order of the moment."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


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


def test_a_cuda_graph_replays_a_training_step(same_convolutions):
    """Forward, loss, backward and BCGD's step, captured as one, do what they do one by one, for new batches
    and new rates too."""
    eager, captured = Training("cuda"), Training("cuda")
    for number in range(3):
        eager.load(number)
        eager.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(3):  # what is made at the first step is made outside the capture
            captured.load(number)
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured.step()
    torch.cuda.synchronize()
    assert_same(captured.state(), eager.state())
    for number in range(3, 3 + Training.BATCHES):
        eager.load(number)
        expected = eager.step()
        captured.load(number)
        graph.replay()
        torch.cuda.synchronize()
        assert_same([loss, *captured.state()], [expected, *eager.state()])


def test_a_training_step_waits_for_nothing():
    training = Training("cuda")
    training.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def at_once():
    """Makes two streams that wait until work for both is there."""

    def streams():
        both = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        for stream in both:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
        return both

    yield streams
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", CASES)
def test_two_streams_at_once_disturb_nothing(name, at_once):
    """The same operator twice, which may share no scratch memory; and with the next one in the list."""
    names = list(CASES)
    for partner in (name, names[(names.index(name) + 1) % len(names)]):
        pair = [CASES[name](), CASES[partner]()]
        alone = [[t.clone() for t in case.run(case.on("cuda"))] for case in pair]
        inputs = [[case.on("cuda") for case in pair] for _ in range(4)]
        streams = at_once()
        results = [[], []]
        for both in inputs:
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[i].append(pair[i].run(both[i]))
        torch.cuda.synchronize()
        for i in range(2):
            for result in results[i]:
                assert_same(result, alone[i])


def test_two_trainings_on_two_streams_disturb_nothing(same_convolutions, at_once):
    def train(training, number):
        training.load(number)
        return training.step()

    alone = [Training("cuda", seed) for seed in range(2)]
    losses = [[train(training, number) for number in range(4)] for training in alone]
    together = [Training("cuda", seed) for seed in range(2)]
    streams = at_once()
    seen = [[], []]
    for number in range(4):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                seen[i].append(train(together[i], number))
    torch.cuda.synchronize()
    for i in range(2):
        assert_same([*seen[i], *together[i].state()], [*losses[i], *alone[i].state()])


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
