"""A small network and a few training steps, for the tests of the optimizer."""

import copy

import torch
import torchqat
from torch import nn
from torch.nn import functional as F


def small_net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        torchqat.nn.StaircaseReLU(bits=2),
        nn.Flatten(),
        nn.Linear(96, 5),
    ]
    return nn.Sequential(*layers).to(dtype)


def quantized(model, bits=1, lr=0.05, momentum=0.9, **options):
    groups = torchqat.optim.param_groups(model, bits, **options)
    return torchqat.optim.BCGD(groups, lr=lr, momentum=momentum, weight_decay=1e-3)


def batch(seed, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 5, (size,), generator=generator)


def train(model, optimizer, steps, first=0):
    """Steps with the batches `first`, `first` + 1, ...; the loss of the last."""
    loss = None
    for step in range(first, first + steps):
        x, target = batch(step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
    return loss


def snapshot(model, optimizer):
    """Everything there is, to be compared by `assert_same`."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assert_same(a, b):
    """Bit for bit, sign of zero included, through lists and dicts; also dtypes and options."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit(), b.signbit())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), [b[key] for key in a])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
