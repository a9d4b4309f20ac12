"""The command line of train_classifier.py, and what other programs take of it."""

import argparse
import os
from pathlib import Path

import data
import ending
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
NOT_SETTINGS = (
    "out",
    "resume",
    "overwrite",
    "seeds",
    "data_dir",
    "no_plots",
    "threads",
    "device",
    "memory_report",
    "recompute",
)
# What SGD and Adam would ignore.
BCGD_ONLY = ("blend", "method", "weight_bits", "per_channel", "keep_first_last_float")
# What a run that trains no float network would ignore.
FLOAT_ONLY = ("float_epochs", "float_lr")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every option but those that are off unless given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is False else super()._get_help_string(action)


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
    parser = Parser(usage="%(prog)s [options]", description=description, formatter_class=Help)
    _add_task(parser.add_argument_group("task"))
    _add_quantization(parser.add_argument_group("quantization"))
    _add_training(parser.add_argument_group("training"))
    add_run(parser.add_argument_group("run"), Path("runs/classifier"))
    # A value that is there already keeps argparse from the default: what stays None was not given.
    args = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(BCGD_ONLY)))
    given = [key for key in BCGD_ONLY if getattr(args, key) is not None]
    for key in set(BCGD_ONLY) - set(given):
        setattr(args, key, parser.get_default(key))
    given += [key for key in FLOAT_ONLY if hasattr(args, key)]
    for key, value in RECIPES[args.dataset].items():
        if not hasattr(args, key):
            setattr(args, key, value)
    args.data_dir, args.subset, args.float_weights = (
        getattr(args, key, None) for key in ("data_dir", "subset", "float_weights")
    )
    args.settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    args.kept = "checkpoint.pt"
    problem = _misfit(args, given) or problem_of_run(args)
    if problem:
        ending.fail(problem)
    return args


def _misfit(args: argparse.Namespace, given: list[str]) -> str | None:
    """Which options do not go together; `given` are those of BCGD_ONLY and FLOAT_ONLY on the command line."""

    def names(keys: tuple[str, ...]) -> str:
        return ", ".join("--" + key.replace("_", "-") for key in given if key in keys)

    if args.optimizer != "bcgd" and names(BCGD_ONLY):
        return f"--optimizer {args.optimizer} leaves the weights float and takes no {names(BCGD_ONLY)}"
    if args.float_weights and names(FLOAT_ONLY):
        return f"--float-weights trains no float network and takes no {names(FLOAT_ONLY)}"
    if args.method == "twn" and args.weight_bits != 2:
        return f"--method twn is for --weight-bits 2, not {args.weight_bits}"
    return None


def problem_of_run(args: argparse.Namespace) -> str | None:
    """What cannot work of the options of `add_run`, beyond what argparse sees.

    `args.kept` is a pattern for what a run keeps in the folder of a seed.
    """
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {args.device}: {str(error).splitlines()[0]}"
    device = torch.device(args.device).type
    if device not in ("cpu", "cuda"):
        return f"--device {args.device}: cpu and cuda are supported"
    if device == "cuda" and not torchqat.build_info()["cuda"]:
        return f"--device {args.device}: this torchqat was built without CUDA kernels"
    if len(set(args.seeds)) < len(args.seeds):
        return "--seeds names a seed twice"
    try:
        return _problem_of_folder(args)
    except OSError as error:
        return f"--out {args.out}: {error.strerror}"


def _problem_of_folder(args: argparse.Namespace) -> str | None:
    if args.out == Path():
        return "--out is empty or the current directory: name a folder for the results"
    if args.out.exists() and not args.out.is_dir():
        return f"--out {args.out} is not a folder"
    if args.resume and not any(args.out.glob(f"seed-*/{args.kept}")):
        return f"--resume: there is no checkpoint in {args.out}"
    for seed in [] if args.resume or args.overwrite else args.seeds:
        for path in args.out.glob(f"seed-{seed}/{args.kept}"):
            return f"{path} is there already: give --resume, --overwrite or another --out"
    return None


def _add_task(group) -> None:
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="digits needs no files")
    add_data(group)
    group.add_argument("--model", choices=models.MODELS, default="lenet5", help="the network")


def add_data(group) -> None:
    where = "where the data sets are, or are downloaded to (default: $TORCHQAT_DATA, else ./data)"
    group.add_argument("--data-dir", default=argparse.SUPPRESS, help=where)
    quick = "use so many training and test images only, for a quick try"
    group.add_argument("--subset", type=number(int, 2), default=argparse.SUPPRESS, help=quick)


def _add_quantization(group) -> None:
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
        "--keep-first-last-float", action="store_true", help="do not quantize these weights; bcgd only"
    )


def _add_training(group) -> None:
    group.add_argument(
        "--optimizer",
        choices=("bcgd", "sgd", "adam"),
        default="bcgd",
        help="of the quantized network; sgd and adam leave its weights float",
    )
    group.add_argument(
        "--blend", type=number(float, 0, 1), default=1e-5, help="BCGD's rho; 0 is BinaryConnect; bcgd only"
    )
    group.add_argument(
        "--float-weights",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a float.tqat to start from instead of training one",
    )
    add_schedule(group, RECIPES)


def add_schedule(group, recipes: dict[str, dict]) -> None:
    """Options of both trainings; `recipes` are the defaults, under the names that --help gives them."""
    group.add_argument(
        "--momentum", type=number(float, 0, 1), default=0.9, help="of the float training, and of bcgd and sgd"
    )
    group.add_argument("--weight-decay", type=number(float, 0, 1e30), default=1e-4, help="of both trainings")
    count, rate = number(int, 0), number(float, 0, 1e30)
    rows = (
        ("--float-epochs", {"type": count}, "epochs of the float network"),
        ("--epochs", {"type": count}, "epochs of the quantized network"),
        ("--batch-size", {"type": number(int, 2)}, "images per step"),
        ("--float-lr", {"type": rate}, "learning rate of the float network, to 0 by cosine, epoch by epoch"),
        ("--lr", {"type": rate}, "learning rate of the quantized network, to 0 by cosine, epoch by epoch"),
    )
    add_from_recipes(group, recipes, rows)


def add_from_recipes(group, recipes: dict[str, dict], rows: tuple[tuple[str, dict, str], ...]) -> None:
    """Options (name, kind, what) whose defaults are in `recipes`, under the names that --help gives them."""
    for option, kind, what in rows:
        key = option.strip("-").replace("-", "_")
        defaults = ", ".join(f"{name} {recipe[key]}" for name, recipe in recipes.items())
        group.add_argument(option, **kind, default=argparse.SUPPRESS, help=f"{what} ({defaults})")


def add_run(group, out: Path, not_settings: tuple[str, ...] = NOT_SETTINGS) -> None:
    """`out` is the default of --out; `not_settings` may change when a run is resumed."""
    group.add_argument(
        "--seeds", type=number(int, 0, 2**63 - 1), nargs="+", default=[0], help="one run for each"
    )
    group.add_argument(
        "--threads", type=number(int, 1, 1024), default=len(os.sched_getaffinity(0)), help="threads of torch"
    )
    group.add_argument("--device", default="cpu", help="cpu or cuda")
    group.add_argument(
        "--memory-report",
        action="store_true",
        help="say at first what the quantized network keeps for backward, beside the float one",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        help="keep less: compute convolutions again in backward (same results, more time)",
    )
    group.add_argument("--out", type=Path, default=out, help="folder of all results")
    free = ", ".join(
        "--" + key.replace("_", "-") for key in not_settings if key not in ("resume", "overwrite")
    )
    again = group.add_mutually_exclusive_group()
    resume = f"go on from the checkpoints in --out; all options but {free} must be what they were"
    again.add_argument("--resume", action="store_true", help=resume)
    again.add_argument("--overwrite", action="store_true", help="delete all results of these seeds in --out")
    group.add_argument("--no-plots", action="store_true", help="write no PNG files")
