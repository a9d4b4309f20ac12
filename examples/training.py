"""One network in training, epoch by epoch, with checkpoints; and how a program that trains ends."""

import argparse
import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoint
import data
import ending
import models
import packing
import torch
import torchqat
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm


class Diverged(Exception):
    """Training left the finite numbers."""


@contextlib.contextmanager
def orderly(args: argparse.Namespace) -> Iterator[None]:
    """Turns what goes wrong into one line, and a request to stop into a word on what is left behind."""
    try:
        ending.handle_signals(ending.orderly)
        torch.set_num_threads(args.threads)
        yield
    except (data.DataError, checkpoint.CheckpointError, packing.PackingError, Diverged) as error:
        ending.fail(str(error))
    except OSError as error:
        ending.fail(f"{error.strerror or error}: {error.filename or args.out}")
    except ending.Stopped as stop:
        ending.handle_signals(signal.SIG_IGN)  # nothing is left to be stopped
        print(f"\nstopped. {_left_behind(args)}")
        raise SystemExit(stop.exit_code) from None


def _left_behind(args: argparse.Namespace) -> str:
    if not any(path for seed in args.seeds for path in args.out.glob(f"seed-{seed}/{args.kept}")):
        return "There is no checkpoint yet"
    how = "--resume in place of --overwrite" if args.overwrite else "--resume"
    return f"{args.out} has the last whole epoch; the same command with {how} goes on there"


def conditions(args: argparse.Namespace, settings: dict) -> dict:
    """What to write beside results."""
    where = {"device": args.device, "threads": args.threads}
    return {"settings": settings, **where, "torch": torch.__version__, "torchqat": torchqat.__version__}


def report_memory(
    args: argparse.Namespace,
    model: torch.nn.Module,
    images: Tensor,
    quantize: Callable[[torch.nn.Module], None],
) -> None:
    """Says, with --memory-report, what a network keeps for backward once it is quantized; and draws it."""
    if not args.memory_report:
        return
    args.memory_report = False  # all seeds are alike
    model = copy.deepcopy(model)
    quantize(model)
    report = torchqat.memory_report(model, images)
    print(f"what is kept for the backward pass of {len(images)} images\n{report}\n")
    if not args.no_plots:
        import plots

        plots.draw_memory(args.out / "memory.png", report)


class Training:
    """One network, of one seed and certain settings: its stages, its checkpoint, its history."""

    def __init__(self, args: argparse.Namespace, settings: dict, seed: int, dataset: data.Data, folder: Path):
        self.args, self.settings, self.seed, self.dataset = args, settings, seed, dataset
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.saved = None
        if args.resume and self.checkpoint.exists():
            self.saved = checkpoint.load(self.checkpoint, settings, seed)
        elif args.overwrite:
            self.checkpoint.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.progress = self.saved["progress"] if self.saved else {"history": [], "bytes": {}, "seconds": 0.0}

    def sgd_options(self) -> dict:
        return {"momentum": self.args.momentum, "weight_decay": self.args.weight_decay}

    def train(
        self, stage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, epochs: int
    ) -> None:
        """Trains for the epochs of a stage, or what is left of them; a checkpoint before and after each."""
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
        start = 0
        if self.saved:
            checkpoint.restore(self.saved, model, optimizer, schedule)
            start, self.saved = self.saved["epoch"], None
        else:
            self._end_epoch(stage, 0, epochs, model, optimizer, schedule, loss=None)
        for epoch in range(start + 1, epochs + 1):
            began = time.perf_counter()
            loss = self._train_epoch(f"{stage} {epoch}/{epochs}", model, optimizer)
            schedule.step()
            self.progress["seconds"] += time.perf_counter() - began
            self._end_epoch(stage, epoch, epochs, model, optimizer, schedule, loss)

    def _train_epoch(self, title: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """The mean loss of one epoch."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        batches = self.dataset.batches(self.args.batch_size, self.args.device)
        seen = 0
        for images, labels in tqdm(batches, title, leave=False, disable=None, unit="batch"):
            loss = self.loss(model, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # BCGD: y <- (1 - rho) y + rho w - lr * coarse gradient at w, then w <- Proj(y)
            total += loss.detach() * len(images)
            seen += len(images)
        return total.item() / seen

    def loss(self, model: torch.nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return F.cross_entropy(model(images), labels)

    def terms_of_loss(self) -> str:
        """What to show of the losses of an epoch beside their mean."""
        return ""

    def classifier(self, model: torch.nn.Module) -> torch.nn.Module:
        """What is tested of a model in training."""
        return model

    def _end_epoch(self, stage, epoch, epochs, model, optimizer, schedule, loss: float | None) -> None:
        images = self.dataset.normalized(self.dataset.test_images, self.args.device)
        scores = models.class_scores(self.classifier(model), images).cpu()
        self._check_finite(stage, epoch, loss, scores)
        hits = scores.argmax(1) == self.dataset.test_labels
        accuracy = 100 * hits.double().mean().item()
        self.progress["history"].append({"stage": stage, "epoch": epoch, "loss": loss, "accuracy": accuracy})
        states = [thing.state_dict() for thing in (model, optimizer, schedule)]
        place = {"stage": stage, "epoch": epoch, "progress": self.progress, "states": states}
        checkpoint.save(self.checkpoint, self.settings, self.seed, **place)
        shown = "" if loss is None else f"loss {loss:.4f}{self.terms_of_loss()}  "
        print(
            f"seed {self.seed}  {stage:9} epoch {epoch:3}/{epochs}  {shown}test accuracy {accuracy:.2f} %",
            flush=True,
        )

    def _check_finite(self, stage: str, epoch: int, loss: float | None, scores: Tensor) -> None:
        """Keeps what has diverged out of the checkpoint."""
        lost = loss is not None and not math.isfinite(loss)
        if lost or not scores.isfinite().all():
            what = f"loss {loss}" if lost else "outputs not finite"
            option = "--float-lr" if stage.endswith("float") else "--lr"
            raise Diverged(
                f"seed {self.seed}: {stage} training diverged at epoch {epoch} ({what}): lower {option}"
            )
