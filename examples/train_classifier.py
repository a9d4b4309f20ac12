"""Trains a classifier in float, quantizes it, trains on with blended coarse gradients, and compares.

    python examples/train_classifier.py                            # digits, 1-bit weights, 2-bit activations
    python examples/train_classifier.py --seeds 0 1 2 3 4          # the same five times: mean and spread
    python examples/train_classifier.py --dataset cifar10 --model resnet20 --act-bits 4 --device cuda

Everything goes to --out: a checkpoint per epoch, both networks with their weights packed, the quantized one
as safetensors too (examples/cpp/embed.cpp runs it, without Python), metrics and plots.
Ctrl-C leaves a good checkpoint; the same command with --resume goes on from it, bit for bit. Without it a
checkpoint that is there already is kept, and refused unless --overwrite is given.
"""

import ending  # noqa: F401, first: for a Ctrl-C while the others are imported

# isort: split
import argparse
import statistics

import checkpoint
import data
import models
import packing
import plots
import torch
import torchqat
from options import parse_arguments
from torchqat.optim import BCGD, param_groups
from training import Training, conditions, orderly, report_memory


def main() -> None:
    args = parse_arguments(__doc__)
    with orderly(args):
        dataset = data.load(args.dataset, args.data_dir).subset(args.subset)
        with checkpoint.claimed(args.out):
            runs = [Run(args, seed, dataset) for seed in args.seeds]
            report([run.go() for run in runs], args)


class Run(Training):
    """One seed: float training, quantization, quantized training, files."""

    def __init__(self, args: argparse.Namespace, seed: int, dataset: data.Data):
        super().__init__(args, args.settings, seed, dataset, args.out / f"seed-{seed}")

    def go(self) -> dict:
        """Trains, writes every file, and returns what metrics.json holds."""
        args, dataset = self.args, self.dataset
        torch.manual_seed(self.seed)
        model = models.MODELS[args.model](dataset.channels, dataset.size, dataset.classes).to(args.device)
        images = dataset.normalized(dataset.images[: args.batch_size], args.device)
        report_memory(args, model, images, self.quantize)
        if self.saved is None and args.float_weights:
            packing.load_into(model, args.float_weights)
        if self.saved is None or self.saved["stage"] == "float":
            optimizer = torch.optim.SGD(model.parameters(), args.float_lr, **self.sgd_options())
            self.train("float", model, optimizer, 0 if args.float_weights else args.float_epochs)
            self.progress["bytes"]["float"] = packing.save(self.folder / "float.tqat", model)

        self.quantize(model)
        if self.saved is None:
            torchqat.calibrate(model, [dataset.normalized(dataset.images[:1000], args.device)])
        optimizer = self.quantizing_optimizer(model)
        self.train("quantized", model, optimizer, args.epochs)
        weights = packing.quantized_weights(optimizer)
        self.progress["bytes"]["quantized"] = packing.save(self.folder / "quantized.tqat", model, weights)
        torchqat.save_checkpoint(self.folder / "quantized.safetensors", model)
        if not args.no_plots:
            images = dataset.normalized(dataset.test_images[:1000], args.device)
            plots.draw_all(self.folder, self.progress["history"], model, optimizer, images)
        return self.metrics()

    def quantize(self, model: torch.nn.Module) -> None:
        args = self.args
        options = {"ste": args.ste, "alpha_grad": args.alpha_grad, "recompute": args.recompute}
        torchqat.prepare(model, args.act_bits, **options)

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

    def metrics(self) -> dict:
        last = {entry["stage"]: entry["accuracy"] for entry in self.progress["history"]}
        result = {"seed": self.seed, "accuracy": last, **self.progress}
        checkpoint.write_json(
            self.folder / "metrics.json", {**conditions(self.args, self.settings), **result}
        )
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
    checkpoint.write_json(
        args.out / "metrics.json", {**conditions(args, args.settings), "seconds": seconds, **summary}
    )


if __name__ == "__main__":
    main()
