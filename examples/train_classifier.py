"""Trains a classifier in float, quantizes it, trains on with blended coarse gradients, and compares.

    python examples/train_classifier.py                            # digits, 1-bit weights, 2-bit activations
    python examples/train_classifier.py --seeds 0 1 2 3 4          # the same five times: mean and spread
    python examples/train_classifier.py --dataset cifar10 --model resnet20 --act-bits 4 --device cuda

Everything goes to --out: a checkpoint per epoch, both networks with their weights packed, metrics and plots.
Ctrl-C leaves a good checkpoint; the same command with --resume goes on from it, bit for bit. Without it a
checkpoint that is there already is kept, and refused unless --overwrite is given.
"""

import ending  # first, for a Ctrl-C while the others are imported

# isort: split
import argparse
import json
import math
import signal
import statistics
import time

import checkpoint
import data
import models
import packing
import plots
import torch
import torchqat
from options import parse_arguments
from torch.nn import functional as F
from torchqat.optim import BCGD, param_groups
from tqdm import tqdm


def main() -> None:
    args = parse_arguments(__doc__)
    try:
        ending.handle_signals(ending.orderly)
        torch.set_num_threads(args.threads)
        dataset = data.load(args.dataset, args.data_dir).subset(args.subset)
        with checkpoint.claimed(args.out):
            runs = [Run(args, seed, dataset) for seed in args.seeds]
            report([run.go() for run in runs], args)
    except (data.DataError, checkpoint.CheckpointError, packing.PackingError, Diverged) as error:
        ending.fail(str(error))
    except OSError as error:
        ending.fail(f"{error.strerror or error}: {error.filename or args.out}")
    except ending.Stopped as stop:
        ending.handle_signals(signal.SIG_IGN)  # nothing is left to be stopped
        print(f"\nstopped. {_left_behind(args)}")
        raise SystemExit(stop.exit_code) from None


def _left_behind(args: argparse.Namespace) -> str:
    if not any((args.out / f"seed-{seed}" / "checkpoint.pt").exists() for seed in args.seeds):
        return "There is no checkpoint yet"
    how = "--resume in place of --overwrite" if args.overwrite else "--resume"
    return f"{args.out} has the last whole epoch; the same command with {how} goes on there"


class Diverged(Exception):
    """Training left the finite numbers."""


class Run:
    """One seed: float training, quantization, quantized training, files."""

    def __init__(self, args: argparse.Namespace, seed: int, dataset: data.Data):
        self.args, self.seed, self.dataset = args, seed, dataset
        self.folder = args.out / f"seed-{seed}"
        self.checkpoint = self.folder / "checkpoint.pt"
        self.saved = None
        if args.resume and self.checkpoint.exists():
            self.saved = checkpoint.load(self.checkpoint, args.settings, seed)
        elif args.overwrite:
            self.checkpoint.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress = self.saved["progress"] if self.saved else {"history": [], "bytes": {}, "seconds": 0.0}

    def go(self) -> dict:
        """Trains, writes every file, and returns what metrics.json holds."""
        args, dataset = self.args, self.dataset
        torch.manual_seed(self.seed)
        model = models.MODELS[args.model](dataset.channels, dataset.size, dataset.classes).to(args.device)
        if self.saved is None and args.float_weights:
            packing.load_into(model, args.float_weights)
        if self.saved is None or self.saved["stage"] == "float":
            optimizer = torch.optim.SGD(model.parameters(), args.float_lr, **self.sgd_options())
            self.train("float", model, optimizer)
            self.progress["bytes"]["float"] = packing.save(self.folder / "float.tqat", model)

        torchqat.prepare(model, args.act_bits, ste=args.ste, alpha_grad=args.alpha_grad)
        if self.saved is None:
            torchqat.calibrate(model, [dataset.normalized(dataset.images[:1000], args.device)])
        optimizer = self.quantizing_optimizer(model)
        self.train("quantized", model, optimizer)
        weights = packing.quantized_weights(optimizer)
        self.progress["bytes"]["quantized"] = packing.save(self.folder / "quantized.tqat", model, weights)
        if not args.no_plots:
            images = dataset.normalized(dataset.test_images[:1000], args.device)
            plots.draw_all(self.folder, self.progress["history"], model, optimizer, images)
        return self.metrics()

    def sgd_options(self) -> dict:
        return {"momentum": self.args.momentum, "weight_decay": self.args.weight_decay}

    def quantizing_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        args = self.args
        groups = param_groups(
            model,
            args.weight_bits if args.optimizer == "bcgd" else None,
            quantize_first=not args.keep_first_last_float,
            quantize_last=not args.keep_first_last_float,
            channel_dim=0 if args.per_channel else None,
            method=args.method,
        )
        if args.optimizer == "adam":
            return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
        return BCGD(groups, args.lr, blend=args.blend, **self.sgd_options())

    def train(self, stage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Trains for the epochs of a stage, or what is left of them; a checkpoint before and after each."""
        epochs = self.args.epochs
        if stage == "float":
            epochs = 0 if self.args.float_weights else self.args.float_epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
        start = 0
        if self.saved:
            checkpoint.restore(self.saved, model, optimizer, schedule)
            start, self.saved = self.saved["epoch"], None
        else:
            self.end_epoch(stage, 0, epochs, model, optimizer, schedule, loss=None)
        for epoch in range(start + 1, epochs + 1):
            began = time.perf_counter()
            loss = self.train_epoch(f"{stage} {epoch}/{epochs}", model, optimizer)
            schedule.step()
            self.progress["seconds"] += time.perf_counter() - began
            self.end_epoch(stage, epoch, epochs, model, optimizer, schedule, loss)

    def train_epoch(self, title: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """The mean loss of one epoch."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        batches = self.dataset.batches(self.args.batch_size, self.args.device)
        for images, labels in tqdm(batches, title, leave=False, disable=None, unit="batch"):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # BCGD: y <- (1 - rho) y + rho w - lr * coarse gradient at w, then w <- Proj(y)
            total += loss.detach() * len(labels)
        return total.item() / len(self.dataset.labels)

    def end_epoch(self, stage, epoch, epochs, model, optimizer, schedule, loss: float | None) -> None:
        images = self.dataset.normalized(self.dataset.test_images, self.args.device)
        scores = models.class_scores(model, images).cpu()
        self.check_finite(stage, epoch, loss, scores)
        hits = scores.argmax(1) == self.dataset.test_labels
        accuracy = 100 * hits.double().mean().item()
        self.progress["history"].append({"stage": stage, "epoch": epoch, "loss": loss, "accuracy": accuracy})
        states = [thing.state_dict() for thing in (model, optimizer, schedule)]
        place = {"stage": stage, "epoch": epoch, "progress": self.progress, "states": states}
        checkpoint.save(self.checkpoint, self.args.settings, self.seed, **place)
        shown = "" if loss is None else f"loss {loss:.4f}  "
        print(
            f"seed {self.seed}  {stage:9} epoch {epoch:3}/{epochs}  {shown}test accuracy {accuracy:.2f} %",
            flush=True,
        )

    def check_finite(self, stage: str, epoch: int, loss: float | None, scores: torch.Tensor) -> None:
        """Keeps what has diverged out of the checkpoint."""
        lost = loss is not None and not math.isfinite(loss)
        if lost or not scores.isfinite().all():
            what = f"loss {loss}" if lost else "outputs not finite"
            option = "--float-lr" if stage == "float" else "--lr"
            raise Diverged(
                f"seed {self.seed}: {stage} training diverged at epoch {epoch} ({what}): lower {option}"
            )

    def metrics(self) -> dict:
        last = {entry["stage"]: entry["accuracy"] for entry in self.progress["history"]}
        result = {"seed": self.seed, "accuracy": last, **self.progress}
        _write_json(self.folder / "metrics.json", {**_conditions(self.args), **result})
        return result


def report(results: list[dict], args: argparse.Namespace) -> None:
    """Prints the table and writes the numbers of all seeds."""
    bits = {
        "float": "32 / 32",
        "quantized": f"{args.weight_bits if args.optimizer == 'bcgd' else 32} / {args.act_bits}",
    }
    summary, several = {}, len(results) > 1
    print(f"\n{args.dataset}, {args.model}: test accuracy after the last epoch", end="")
    print(
        f", mean and standard deviation of {len(results)} seeds"
        if several
        else f", seed {results[0]['seed']}"
    )
    print(f"{'':10} {'bits of weights / activations':>30} {'accuracy':>16} {'size on disk':>15}")
    for stage, width in bits.items():
        accuracy = [result["accuracy"][stage] for result in results]
        size = results[0]["bytes"][stage]
        mean, spread = statistics.fmean(accuracy), statistics.stdev(accuracy) if several else 0.0
        summary[stage] = {"mean": mean, "spread": spread, "accuracy": accuracy, "bytes": size}
        shown = f"{mean:.2f} +- {spread:.2f} %" if several else f"{mean:.2f} %"
        print(f"{stage:10} {width:>30} {shown:>16} {size:>9,} bytes")
    gain = summary["quantized"]["mean"] - summary["float"]["mean"]
    ratio = summary["float"]["bytes"] / summary["quantized"]["bytes"]
    seconds = sum(result["seconds"] for result in results)
    print(f"quantized: {gain:+.2f} points, {ratio:.1f} times smaller")
    print(f"{seconds:.1f} s of training on {args.threads} threads; everything is in {args.out}")
    _write_json(args.out / "metrics.json", {**_conditions(args), "seconds": seconds, **summary})


def _conditions(args: argparse.Namespace) -> dict:
    where = {"device": args.device, "threads": args.threads}
    return {"settings": args.settings, **where, "torch": torch.__version__, "torchqat": torchqat.__version__}


def _write_json(path, content: dict) -> None:
    with checkpoint.written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
