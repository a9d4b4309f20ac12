"""BCGD in training loops: accumulation, clipping, autocast, checkpointing, several processes."""

import contextlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from small_nets import assert_same, batch, quantized, small_net, snapshot, train
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("error:BCGD")


def linear_net(seed=0):
    """Without batch statistics, so that a batch is the sum of its parts."""
    torch.manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)]
    return torch.nn.Sequential(*layers).double()


def step_on(model, optimizer, x, target, scale=1.0):
    (scale * F.cross_entropy(model(x), target)).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_close_runs(ours, theirs):
    """The same up to the rounding of sums, which moves latents and must not flip a weight."""
    (model, optimizer), (other, reference) = ours, theirs
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for p, q in zip(optimizer.param_groups[0]["params"], reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(optimizer.latent(p), reference.latent(q), rtol=1e-10, atol=1e-12)
        assert torch.equal(p > 0, q > 0)


def run_whole_batches(steps=5):
    model = linear_net()
    optimizer = quantized(model)
    for step in range(steps):
        step_on(model, optimizer, *batch(step, 8, torch.float64))
    return model, optimizer


def test_gradients_accumulate_to_those_of_the_whole_batch():
    model = linear_net()
    optimizer = quantized(model)
    for step in range(5):
        x, target = batch(step, 8, torch.float64)
        (0.5 * F.cross_entropy(model(x[:4]), target[:4])).backward()
        step_on(model, optimizer, x[4:], target[4:], scale=0.5)
    assert_close_runs((model, optimizer), run_whole_batches())


def test_clipped_gradients_are_what_the_step_takes():
    model, other = linear_net(), linear_net()
    clipped, scaled = quantized(model), quantized(other)
    x, target = batch(0, 8, torch.float64)
    F.cross_entropy(model(x), target).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    clipped.step()
    F.cross_entropy(other(x), target).backward()
    for p in other.parameters():
        p.grad *= 0.1 / (norm + 1e-6)  # as clip_grad_norm_ has it
    scaled.step()
    assert norm > 0.1
    assert_close_runs((model, clipped), (other, scaled))


@pytest.mark.parametrize("scaler", [False, True])
def test_autocast_trains(scaler):
    model = small_net()
    optimizer = quantized(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=scaler)
    x, target = batch(0, 32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model[0].weight.abs().unique().numel() == 1


def test_activation_checkpointing_changes_nothing():
    runs = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = small_net()
        model[1] = torch.nn.Identity()  # batch norm would see each batch twice
        optimizer = quantized(model)
        for step in range(3):
            x, target = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model[3:](wrap(model[:3], x)), target).backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


def test_training_learns():
    """Binary weights and 2-bit activations fit a batch that a random net does not."""
    model = small_net()
    optimizer = quantized(model, lr=0.1)
    x, target = batch(0, 32)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert (model(x).argmax(1) == target).float().mean() > 0.9
    assert all(w.abs().unique().numel() == 1 for w in optimizer.param_groups[0]["params"])


def test_lr_edited_in_the_groups_trains_as_if_given_at_first():
    """As schedulers and frameworks do."""
    model, other = small_net(), small_net()
    optimizer, reference = quantized(model, lr=0.1), quantized(other, lr=0.05)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    train(model, optimizer, 3)
    train(other, reference, 3)
    assert_same(model.state_dict(), other.state_dict())


# ---- two processes ----


@contextlib.contextmanager
def process_group(rank, rendezvous):
    rendezvous, patience = f"file://{rendezvous}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def half_of_the_batches(_, rank, folder):
    with process_group(rank, folder / "rendezvous"):
        # DistributedDataParallel copies the first process's weights: the others may start anywhere.
        model = torch.nn.parallel.DistributedDataParallel(linear_net(seed=rank))
        optimizer = quantized(model)
        for step in range(5):
            x, target = batch(step, 8, torch.float64)
            step_on(model, optimizer, x[4 * rank :][:4], target[4 * rank :][:4])
        torch.save([model.module.state_dict(), optimizer.state_dict()], folder / f"{rank}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    other = torch.multiprocessing.spawn(half_of_the_batches, (1, tmp_path), join=False)
    half_of_the_batches(0, 0, tmp_path)
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    model = linear_net(seed=5)
    optimizer = quantized(model)
    model.load_state_dict(first[0])
    optimizer.load_state_dict(first[1])
    assert_close_runs((model, optimizer), run_whole_batches())
