"""The command line of train_classifier.py."""

import argparse
import os
from pathlib import Path

import data
import models
import torch
import torchqat
from torchqat.functional import ste_names

# What depends on the data set, where the command line does not say.
RECIPES = {
    "digits": {"float_epochs": 20, "epochs": 30, "batch_size": 64, "float_lr": 0.05, "lr": 0.05},
    "mnist": {"float_epochs": 4, "epochs": 8, "batch_size": 128, "float_lr": 0.05, "lr": 0.02},
    "fashion-mnist": {"float_epochs": 6, "epochs": 8, "batch_size": 128, "float_lr": 0.05, "lr": 0.02},
    "cifar10": {"float_epochs": 200, "epochs": 200, "batch_size": 128, "float_lr": 0.1, "lr": 0.1},
}
# Of what the command line says, these do not change what is trained.
NOT_SETTINGS = ("out", "resume", "overwrite", "seeds", "data_dir", "no_plots", "threads", "device")
# What SGD and Adam would ignore.
BCGD_ONLY = ("blend", "method", "weight_bits", "per_channel", "keep_first_last_float")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def number(kind: type, low: float, high: float = float("inf")):
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be {low} to {high}" if high < float("inf") else f"must be >= {low}"
            )
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    _add_task(parser.add_argument_group("task"))
    _add_quantisation(parser.add_argument_group("quantisation"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("run"))
    # A value that is there already keeps argparse from the default: what stays None was not given.
    args = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(BCGD_ONLY)))
    given = [key for key in BCGD_ONLY if getattr(args, key) is not None]
    for key in set(BCGD_ONLY) - set(given):
        setattr(args, key, parser.get_default(key))
    for key, value in RECIPES[args.dataset].items():
        if not hasattr(args, key):
            setattr(args, key, value)
    args.data_dir, args.subset, args.float_weights = (
        getattr(args, key, None) for key in ("data_dir", "subset", "float_weights")
    )
    problem = _misfit(args, given) or _problem(args)
    if problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    args.settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    return args


def _misfit(args: argparse.Namespace, given: list[str]) -> str | None:
    """Which options do not go together; `given` are those of BCGD_ONLY on the command line."""
    if args.optimizer != "bcgd" and given:
        names = ", ".join("--" + key.replace("_", "-") for key in given)
        return f"--optimizer {args.optimizer} leaves the weights float and takes no {names}"
    if args.method == "twn" and args.weight_bits != 2:
        return f"--method twn is for --weight-bits 2, not {args.weight_bits}"
    return None


def _problem(args: argparse.Namespace) -> str | None:
    """What cannot work, beyond what argparse sees."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {args.device}: {str(error).splitlines()[0]}"
    if torch.device(args.device).type == "cuda" and not torchqat.build_info()["cuda"]:
        return f"--device {args.device}: this torchqat was built without CUDA kernels"
    if args.out.exists() and not args.out.is_dir():
        return f"--out {args.out} is not a folder"
    if len(set(args.seeds)) < len(args.seeds):
        return "--seeds names a seed twice"
    if args.resume and not any(args.out.glob("seed-*/checkpoint.pt")):
        return f"--resume: there is no checkpoint in {args.out}"
    for seed in [] if args.resume or args.overwrite else args.seeds:
        path = args.out / f"seed-{seed}" / "checkpoint.pt"
        if path.exists():
            return f"{path} is there already: give --resume, --overwrite or another --out"
    return None


def _add_task(group) -> None:
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="digits needs no files")
    where = "where the data sets are, or are downloaded to (default: $TORCHQAT_DATA, else ./data)"
    group.add_argument("--data-dir", default=argparse.SUPPRESS, help=where)
    quick = "use so many training and test images only, for a quick try"
    group.add_argument("--subset", type=number(int, 2), default=argparse.SUPPRESS, help=quick)
    group.add_argument("--model", choices=models.MODELS, default="lenet5", help="the network")


def _add_quantisation(group) -> None:
    group.add_argument("--weight-bits", type=number(int, 1, 8), default=1, help="2 is ternary; bcgd only")
    group.add_argument("--act-bits", type=number(int, 1, 8), default=2, help="bits of the activations")
    group.add_argument(
        "--ste", choices=ste_names(), default="clipped_relu", help="straight-through estimator"
    )
    rules = ("exact", "three_valued", "min", "pact")
    group.add_argument(
        "--alpha-grad", choices=rules, default="three_valued", help="gradient of the step sizes"
    )
    group.add_argument(
        "--method",
        choices=("exact", "lloyd", "twn"),
        default="exact",
        help="projection of weights; twn is for 2 bits; bcgd only",
    )
    group.add_argument(
        "--per-channel", action="store_true", help="one weight scale per output channel; bcgd only"
    )
    group.add_argument(
        "--keep-first-last-float", action="store_true", help="do not quantise these weights; bcgd only"
    )


def _add_training(group) -> None:
    group.add_argument(
        "--optimizer",
        choices=("bcgd", "sgd", "adam"),
        default="bcgd",
        help="of the quantised network; sgd and adam leave its weights float",
    )
    group.add_argument(
        "--blend", type=number(float, 0, 1), default=1e-5, help="BCGD's rho; 0 is BinaryConnect; bcgd only"
    )
    group.add_argument(
        "--momentum", type=number(float, 0, 1), default=0.9, help="of the float training, and of bcgd and sgd"
    )
    group.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of both trainings")
    group.add_argument(
        "--float-weights",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a float.tqat to start from instead of training one",
    )
    for option, kind, low, what in (
        ("--float-epochs", int, 0, "epochs of the float network"),
        ("--epochs", int, 0, "epochs of the quantised network"),
        ("--batch-size", int, 2, "images per step"),
        ("--float-lr", float, 0, "learning rate of the float network, to 0 by cosine, epoch by epoch"),
        ("--lr", float, 0, "learning rate of the quantised network, to 0 by cosine, epoch by epoch"),
    ):
        key = option.strip("-").replace("-", "_")
        defaults = ", ".join(f"{name} {recipe[key]}" for name, recipe in RECIPES.items())
        group.add_argument(
            option, type=number(kind, low), default=argparse.SUPPRESS, help=f"{what} ({defaults})"
        )


def _add_run(group) -> None:
    group.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0], help="one run for each")
    group.add_argument(
        "--threads", type=number(int, 1), default=len(os.sched_getaffinity(0)), help="threads of torch"
    )
    group.add_argument("--device", default="cpu", help="cpu or cuda")
    group.add_argument("--out", type=Path, default=Path("runs/classifier"), help="folder of all results")
    free = ", ".join(
        "--" + key.replace("_", "-") for key in NOT_SETTINGS if key not in ("resume", "overwrite")
    )
    again = group.add_mutually_exclusive_group()
    resume = f"go on from the checkpoints in --out; all options but {free} must be what they were"
    again.add_argument("--resume", action="store_true", help=resume)
    again.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of these seeds in --out"
    )
    group.add_argument("--no-plots", action="store_true", help="write no PNG files")
