"""Every operator with arguments, and steps of training: what test_gpu.py runs on a GPU, and test_gpu_cases.py
anywhere."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchqat
from torch import nn
from torchqat import functional as F

# Around a vector, a warp, a block and a wave of blocks.
SIZES = (1, 7, 33, 255, 1025, 70_001)


@dataclass
class Case:
    """An operator with arguments: `run` returns what it computes, or what it changed in place. It may be
    captured in a CUDA graph: nothing in it waits for the device, or copies from or to the host."""

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

# One of each kernel, and no more than compute-sanitizer has the time for.
FOR_SANITIZERS = {
    "staircase_relu-clipped_relu",
    "staircase_relu-reverse_exponential",
    "staircase_relu-channels",
    "staircase_relu-kept-4",
    "staircase_relu-kept-bfloat16",
    "staircase_codes",
    "pack_codes-2",
    "quantize_weight-4",
    "quantize_weight-channels",
    "quantize_weight-twn",
    "bcgd_step_-1",
    "bcgd_step_-2",
    "bcgd_step_-4",
    "bcgd_step_-lloyd",
    "feature_affinity_loss-l1-torch.float32",
    "feature_affinity_loss-l1-torch.bfloat16",
    "feature_affinity_loss-fro-torch.float32",
    "fast_feature_affinity_loss-l1",
}


class LeNet(nn.Module):
    """1-bit weights and 2-bit activations; the features are those after the second convolution."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.BatchNorm2d(6),
            torchqat.nn.StaircaseReLU(bits=2),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.BatchNorm2d(16),
            torchqat.nn.StaircaseReLU(bits=2, channels=16),
        )
        self.head = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 60),
            nn.BatchNorm1d(60),
            torchqat.nn.StaircaseReLU(bits=2),
            nn.Linear(60, 10),
        )

    def forward(self, images):
        features = self.features(images)
        return self.head(features), features


def training_batch(number):
    """Images of one of ten patterns, under noise; their patterns; and a teacher's features of the images."""
    fixed = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 28, 28, generator=fixed)
    filters = torch.randn(24, 1, 5, 5, generator=fixed)
    generator = torch.Generator().manual_seed(1 + number)
    targets = torch.randint(0, 10, (32,), generator=generator)
    images = patterns[targets] + 0.3 * torch.randn(32, 1, 28, 28, generator=generator)
    return images, targets, nn.functional.conv2d(nn.functional.avg_pool2d(images, 2), filters).relu()


class Training:
    """Distillation into a LeNet by BCGD. What a step reads lies in `batch` and `lr`, whose addresses stay, so
    that a step captured in a CUDA graph reads it anew. The rate of what is not quantized is a number, which a
    graph keeps: torch's SGD would read a tensor back to the host."""

    BATCHES = 8

    def __init__(self, device, seed=0):
        torch.manual_seed(seed)
        self.model = LeNet().to(device)
        groups = torchqat.optim.param_groups(self.model, 1)
        self.lr = torch.tensor(0.0, dtype=torch.float64, device=device)
        groups[0]["lr"] = self.lr
        self.optimizer = torchqat.optim.BCGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.affinity = torchqat.nn.FeatureAffinityLoss()
        self.batches = [[t.to(device) for t in training_batch(i)] for i in range(self.BATCHES)]
        self.batch = [t.clone() for t in self.batches[0]]

    def load(self, number):
        """Puts the batch and the rate of this step where the step reads them."""
        for t, source in zip(self.batch, self.batches[number % self.BATCHES], strict=True):
            t.copy_(source)
        self.lr.fill_(0.3 * 0.9**number)

    def step(self):
        images, targets, teacher = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        logits, features = self.model(images)
        loss = nn.functional.cross_entropy(logits, targets) + self.affinity(features, teacher)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self):
        """A copy of all that steps change."""
        kept = [self.optimizer.state[p] for group in self.optimizer.param_groups for p in group["params"]]
        tensors = [*self.model.state_dict().values(), *(t for state in kept for t in state.values())]
        return [t.detach().clone() for t in tensors]
