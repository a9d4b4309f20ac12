"""The command line of distill_classifier.py: what can be trained, and how unless one says otherwise."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import data
import ending
import models
import options
from options import number
from torch import nn
from torchqat.nn import FastFeatureAffinityLoss, FeatureAffinityLoss

# What is set where the command line does not say: for all data sets,
COMMON = {
    "weight_bits": 1,
    "act_bits": 2,
    "kd": "kl",
    "lambda_kd": 1.0,
    "lambda_fa": 10.0,
    "lambda_label": 0.3,
    "probes": 15,
    "connector": "none",
}
# and for each.
RECIPES = {
    "digits": {
        **{"model": "cnn4", "width": 1.0, "teacher_model": "cnn4-fine", "teacher_width": 2.0},
        **{"shift": 0, "mirror": False, "batch_size": 64, "float_epochs": 20, "float_lr": 0.05},
        **{"start": "random", "warm_up": 10, "epochs": 20, "lr": 0.05, "norm": "l1", "temperature": 4.0},
    },
    "mnist": {
        **{"model": "cnn4", "width": 1.0, "teacher_model": "cnn4-fine", "teacher_width": 2.0},
        **{"shift": 2, "mirror": False, "batch_size": 128, "float_epochs": 6, "float_lr": 0.05},
        **{"start": "random", "warm_up": 4, "epochs": 10, "lr": 0.05, "norm": "l1", "temperature": 4.0},
    },
    "fashion-mnist": {
        **{"model": "cnn4-strided", "width": 1.0, "teacher_model": "cnn4-strided", "teacher_width": 1.0},
        **{"shift": 2, "mirror": True, "batch_size": 128, "float_epochs": 12, "float_lr": 0.05},
        **{"start": "teacher", "warm_up": 0, "epochs": 30, "lr": 0.02, "norm": "fro", "temperature": 1.0},
    },
    "cifar10": {
        **{"model": "resnet20", "width": 1.0, "teacher_model": "resnet20", "teacher_width": 2.0},
        **{"shift": 4, "mirror": True, "batch_size": 128, "float_epochs": 200, "float_lr": 0.1},
        **{"start": "random", "warm_up": 50, "epochs": 150, "lr": 0.1, "norm": "l1", "temperature": 4.0},
    },
}
# The maps that are compared where the command line does not say, for a student and a teacher of these models;
# for others the last ones.
TAPS = {("cnn4-strided", "cnn4-strided"): [["8", "8"]]}  # the third of four, 7 x 7 pixels of a 28 x 28 image
FLOAT_SETTINGS = (
    *("dataset", "subset", "teacher_labelled", "teacher_model", "teacher_width", "shift", "mirror"),
    *("float_epochs", "float_lr", "batch_size", "momentum", "weight_decay"),
)


@dataclass(frozen=True)
class Arm:
    """What a student learns from."""

    title: str
    teacher: bool = True
    affinity: type[nn.Module] | None = None
    labels: bool = True


ARMS = {
    "labels": Arm("labels only", teacher=False),
    "kd": Arm("KD"),
    "kd+fa": Arm("KD + FA", affinity=FeatureAffinityLoss),
    "kd+ffa": Arm("KD + FFA", affinity=FastFeatureAffinityLoss),
    "kd-unlabelled": Arm("KD, no labels", labels=False),
    "kd+fa-unlabelled": Arm("KD + FA, no labels", affinity=FeatureAffinityLoss, labels=False),
}


def parse_arguments(description: str) -> argparse.Namespace:
    parser = options.Parser(usage="%(prog)s [options]", description=description, formatter_class=options.Help)
    task = parser.add_argument_group("task")
    task.add_argument("--dataset", choices=data.DATASETS, default="digits", help="digits needs no files")
    options.add_data(task)
    which = f"what to train: {', '.join(ARMS)} (default: all)"
    task.add_argument("--arms", choices=ARMS, nargs="+", default=argparse.SUPPRESS, help=which, metavar="ARM")
    few = "so many training images for the students (default: all)"
    task.add_argument("--images", type=number(int, 2), default=argparse.SUPPRESS, help=few, metavar="N")
    for option, whom in (("--labelled", "the students"), ("--teacher-labelled", "the teacher")):
        some = f"labels of so many training images for {whom} (default: of all)"
        task.add_argument(option, type=number(int, 2), default=argparse.SUPPRESS, help=some, metavar="N")
    _add_networks(parser.add_argument_group("networks"))
    _add_loss(parser.add_argument_group("loss"))
    training = parser.add_argument_group("training")
    options.add_schedule(training, RECIPES)
    begin, before, moved = (
        "the student's first weights: random, or the teacher's",
        "epochs of the student in float, of the same arm",
        "pixels that images are moved by at most",
    )
    rows = (
        ("--start", {"choices": ("random", "teacher")}, begin),
        ("--warm-up", {"type": number(int, 0)}, before),
        ("--shift", {"type": number(int, 0, 8)}, moved),
        ("--mirror", {"action": argparse.BooleanOptionalAction}, "mirror half of the images"),
    )
    options.add_from_recipes(training, RECIPES, rows)
    free = ("arms", *options.NOT_SETTINGS)
    options.add_run(parser.add_argument_group("run"), Path("runs/distill"), free)
    parser.set_defaults(**COMMON)
    args = parser.parse_args()
    absent = dict.fromkeys(("images", "labelled", "teacher_labelled", "taps", "data_dir", "subset"))
    for key, value in {"arms": list(ARMS), **absent, **RECIPES[args.dataset]}.items():
        vars(args).setdefault(key, value)
    args.rows, args.kept = args.arms, "*/*"
    args.settings = {
        key: value for key, value in vars(args).items() if key not in (*free, "rows", "kept", "settings")
    }
    args.taps = args.taps or TAPS.get((args.model, args.teacher_model))
    args.settings["taps"] = args.taps
    problem = _misfit(args) or options.problem_of_run(args)
    if problem:
        ending.fail(problem)
    return args


def _misfit(args: argparse.Namespace) -> str | None:
    """Which options do not go together."""
    student, teacher = f"{args.model} x {args.width:g}", f"{args.teacher_model} x {args.teacher_width:g}"
    if args.start == "teacher" and student != teacher:
        return f"--start teacher needs a student and a teacher of one network, not {student} and {teacher}"
    if len(set(args.arms)) < len(args.arms):
        return "--arms names an arm twice"
    for name in args.arms:
        arm = ARMS[name]
        if arm.affinity and not args.lambda_fa:
            return f"--lambda-fa 0 leaves nothing to compare to the arm {name}"
        if arm.teacher and not (args.lambda_kd or arm.affinity or (arm.labels and args.lambda_label)):
            return f"--lambda-kd 0 leaves nothing to learn from to the arm {name}"
    return None


def _add_networks(group) -> None:
    width, name = number(float, 0.05, 100), {"choices": models.MODELS}
    rows = (
        ("--model", name, "the student"),
        ("--width", {"type": width}, "multiplies its number of channels"),
        ("--teacher-model", name, "the teacher"),
        ("--teacher-width", {"type": width}, "multiplies its number of channels"),
    )
    options.add_from_recipes(group, RECIPES, rows)
    group.add_argument("--weight-bits", type=number(int, 1, 8), help="of the student; 2 is ternary")
    group.add_argument("--act-bits", type=number(int, 1, 8), help="of the student's activations")


def _add_loss(group) -> None:
    weight = number(float, 0, 1e6)
    group.add_argument("--kd", choices=("mse", "kl"), help="distance between logits")
    group.add_argument("--lambda-kd", type=weight, help="weight of the logits")
    group.add_argument("--lambda-fa", type=weight, help="weight of the features")
    group.add_argument("--lambda-label", type=weight, help="weight of the labels, beside a teacher")
    rows = (
        ("--norm", {"choices": ("l1", "fro")}, "norm of the feature affinity"),
        ("--temperature", {"type": number(float, 0.01, 100)}, "of kl"),
    )
    options.add_from_recipes(group, RECIPES, rows)
    group.add_argument("--probes", type=number(int, 1, 10_000), help="number of probes of FFA")
    where = "modules whose outputs are compared (default: the last feature maps; cnn4-strided: the third)"
    group.add_argument(
        "--taps",
        type=_pair,
        nargs="+",
        default=argparse.SUPPRESS,
        help=where,
        metavar="STUDENT[=TEACHER]",
    )
    behind = "what the student's features pass: a 1x1 convolution, one with a ReLU"
    group.add_argument("--connector", choices=("none", "linear", "relu"), help=behind)


def _pair(text: str) -> list[str]:
    student, equals, teacher = text.partition("=")
    if not student or (equals and not teacher):
        raise argparse.ArgumentTypeError(f"must be STUDENT or STUDENT=TEACHER, not {text!r}")
    return [student, teacher or student]


def settings_of(args: argparse.Namespace, name: str) -> dict:
    settings = {key: args.settings[key] for key in FLOAT_SETTINGS} if name == "float" else args.settings
    return {"row": name, **settings}
