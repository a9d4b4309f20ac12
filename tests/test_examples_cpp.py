"""The C++ programs of examples/cpp: what they train, how they resume, what they say when something is wrong,
and that Python and they read each other's files."""

import contextlib
import fcntl
import functools
import gzip
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchqat
from cmake_projects import CMAKE, CXX, ROOT, compile_project, configure, missing
from example_programs import files_in, imported, one_line_of, run_main, write_idx_files
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchqat.distill import Distiller, FAQDLoss
from torchqat.nn import FastFeatureAffinityLoss
from torchqat.optim import BCGD, param_groups

sys.path.append(str(ROOT / "examples"))
import models  # noqa: E402

QUICK = {"subset": 64, "batch-size": 16, "width": 0.1, "float-epochs": 1, "epochs": 2, "threads": 1}
# An epoch of a quarter of a second: enough to be stopped within.
SLOWER = {**QUICK, "subset": 200, "batch-size": 2, "float-epochs": 3, "epochs": 3}
RESULTS = ("float.safetensors", "quantized.safetensors")

one_line = functools.partial(one_line_of, "train_mnist: error: ")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder with the compiled programs."""
    needed = {"CLI/CLI.hpp": "CLI11 (libcli11-dev)", "zlib.h": "ZLIB (zlib1g-dev)"}
    if not CMAKE or not shutil.which(CXX):
        missing("no cmake, or no C++ compiler")
    for header, package in needed.items():
        command = [CXX, "-fsyntax-only", "-include", header, "-xc++", "/dev/null"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            missing(f"no {package}")
    build = tmp_path_factory.mktemp("examples") / "build"
    configure(build, f"-DCMAKE_PREFIX_PATH={torchqat.cmake_prefix_path}", source=ROOT / "examples/cpp")
    compile_project(build)
    return build


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("data") / "mnist"
    write_idx_files(folder, count=200)
    return folder


@dataclass
class Program:
    """train_mnist, in an environment without any variable."""

    command: Path
    data_dir: Path

    def words(self, out, *more, options=QUICK, **changed):
        given = {"data-dir": self.data_dir, "out": out, **options}
        given |= {name.replace("_", "-"): value for name, value in changed.items()}
        return [self.command, *(f"--{name}={value}" for name, value in given.items()), *more]

    def __call__(self, *words, env=None, **kwargs):
        done = subprocess.run(
            self.words(*words, **kwargs), env=env or {}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def train(programs, data_dir):
    return Program(programs / "train_mnist", data_dir)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A short run: the folder, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "new" / "run"
    code, stdout, stderr = train(out)
    assert (code, stderr) == (0, "")
    return out, stdout


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(out, options=SLOWER)[0] == 0
    return out


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """A function: the folder of a run that a signal stopped in a stage, its exit code and last words."""

    @functools.cache
    def stop(stage, number):
        out = tmp_path_factory.mktemp(stage)
        words = train.words(out, options=SLOWER)
        with subprocess.Popen(
            words, env={}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while not re.match(rf"{stage} +epoch +1/3", process.stdout.readline()):
                assert process.poll() is None
            process.send_signal(number)
            stdout, stderr = process.communicate()
        assert stderr == ""
        return out, process.returncode, stdout

    return stop


def accuracies(printed):
    return [float(number) for number in re.findall(r"test accuracy (\S+) %", printed)]


def tensors_of(folder):
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def assert_same_files(folder, other):
    """Every tensor of every file; only the seconds may differ."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        assert [key for key in tensors if not torch.equal(tensors[key], theirs[name][key])] == []


def stage_of(out):
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        return file.metadata()["train_mnist.stage"]


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_writes_everything_and_says_what_came_of_it(finished):
    out, stdout = finished
    lines = stdout.splitlines()
    epochs = [(stage, n, of) for stage, of in (("float", 1), ("quantized", 2)) for n in range(of + 1)]
    for (stage, epoch, of), line in zip(epochs, lines[: len(epochs)], strict=True):
        loss = r"loss \d+\.\d{4}  " if epoch else ""
        assert re.fullmatch(rf"{stage:9} epoch {epoch:3}/{of}  {loss}test accuracy \d+\.\d\d %", line)
    assert re.fullmatch(r"test accuracy: float \d+\.\d\d %, quantized \d+\.\d\d %", lines[-2])
    assert re.fullmatch(
        rf"\d+\.\d s of training on 1 threads; everything is in {re.escape(str(out))}", lines[-1]
    )
    assert {path.name for path in out.iterdir()} == {"checkpoint.safetensors", *RESULTS}


def test_the_same_again_from_plain_files_and_from_the_environment(finished, train, data_dir, tmp_path):
    plain = tmp_path / "mnist"
    plain.mkdir()
    for path in data_dir.iterdir():
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    words = train.words(tmp_path / "run")
    words.remove(f"--data-dir={data_dir}")
    environment = {"TORCHQAT_DATA": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:-1] == finished[1].splitlines()[:-1]
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_another_seed_gives_other_numbers(finished, train, tmp_path):
    assert train(tmp_path, seed=1)[1].splitlines()[:-1] != finished[1].splitlines()[:-1]


def test_it_is_the_run_of_the_python_program(whole, train, data_dir, tmp_path, monkeypatch, capsys):
    for needed in ("matplotlib", "tqdm"):
        pytest.importorskip(needed)
    options = {
        **SLOWER,
        "teacher-width": SLOWER["width"],
        "data-dir": data_dir.parent,
        "out": tmp_path / "py",
    }
    words = "--dataset mnist --model lenet5 --teacher-model lenet5 --start teacher --warm-up 0 --shift 0"
    words = [
        *words.split(),
        "--lr=0.02",
        "--arms",
        "kd+ffa",
        "--no-plots",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    with imported("distill_classifier", monkeypatch) as example:
        code, said, _ = run_main(example, words, monkeypatch, capsys)
        assert code == 0
        said = said[: said.index("\n\n")].replace("kd+ffa   ", "quantized").replace("seed 0  ", "")
        cpp = train(whole, "--resume", options=SLOWER)[1]
        _, printed, _ = train(tmp_path / "cpp", options=SLOWER)
        assert printed.splitlines()[:-2] == re.sub(r" \(kd .*?\)", "", said).splitlines()
        assert cpp.splitlines()[0] == printed.splitlines()[-2]
        python = example.packing.load(tmp_path / "py/seed-0/float/float.tqat")
    ours = load_file(whole / "float.safetensors")
    assert [name for name in ours if not torch.equal(ours[name], python[name])] == []


@pytest.mark.parametrize("changed", [{"epochs": 0}, {"float_epochs": 0, "epochs": 1}])
def test_a_stage_without_epochs(train, tmp_path, changed):
    code, stdout, _ = train(tmp_path, **changed)
    assert code == 0 and "epoch   0/0  test accuracy" in stdout
    student = load_file(tmp_path / "quantized.safetensors")
    assert student["0.weight"].unique().numel() == 2


def test_progress_is_shown_on_a_terminal_and_cleared(train, tmp_path):
    master, terminal = pty.openpty()
    words = train.words(tmp_path, lr=1e30)
    subprocess.run(words, env={}, stdout=subprocess.PIPE, stderr=terminal, check=False)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as file:
        while part := file.read(4096):
            shown += part
    assert b"float 1/1: batch 4/4, loss" in shown and b"quantized 1/2: batch 1/4" in shown
    assert b"\r\x1b[Ktrain_mnist: error: quantized training diverged" in shown


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("float", signal.SIGINT, 130),
        ("quantized", signal.SIGTERM, 143),
        ("quantized", signal.SIGKILL, -9),
    ],
)
def test_stopped_in_either_stage_it_resumes_bit_for_bit(stopped, whole, train, tmp_path, stage, number, code):
    out, returned, stdout = stopped(stage, number)
    assert returned == code
    if code > 0:
        last = f"stopped. {out} has the last whole epoch; the same command with --resume goes on there"
        assert stdout.splitlines()[-1] == last
        assert [path.name for path in out.iterdir()] == ["checkpoint.safetensors"]
    assert stage_of(out) == stage
    again = tmp_path / "again"
    shutil.copytree(out, again)
    code, stdout, stderr = train(again, "--resume", options=SLOWER)
    assert (code, stderr) == (0, "") and "epoch   0/3  test" not in stdout.partition("quantized")[0]
    assert_same_files(again, whole)


def test_resuming_what_is_finished_says_it_again_and_changes_nothing(finished, train):
    out, printed = finished
    before = files_in(out)
    code, stdout, _ = train(out, "--resume")
    assert code == 0 and stdout.splitlines() == printed.splitlines()[-2:]
    assert files_in(out) == before


def test_nothing_to_resume(train, tmp_path):
    code, _, stderr = train(tmp_path / "run", "--resume")
    assert code == 2 and one_line(stderr, f"--resume: there is no checkpoint in {tmp_path}/run")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_overwritten_only_on_demand(finished, train, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = files_in(out)
    code, _, stderr = train(out, epochs=0)
    assert code == 2 and one_line(
        stderr, f"{out}/checkpoint.safetensors is there already: give --resume, --overw"
    )
    assert files_in(out) == before
    code, _, _ = train(out, "--overwrite", float_lr=1e30)
    assert code == 2 and [path.name for path in out.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(
    "damage",
    ["other options", "of Python", "no stage", "truncated", "tensors", "a folder", "epoch", "stage"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(finished, train, tmp_path, damage):
    path, changed, said = tmp_path / "checkpoint.safetensors", {}, str(tmp_path)
    shutil.copy(finished[0] / path.name, path)
    if damage == "other options":
        changed = {"width": 0.2, "seed": 3}
        said = f"{path} was made with other options: --seed 0, not 3; --width 0.1, not 0.2"
    elif damage == "of Python":
        torchqat.save_checkpoint(path, nn.Linear(2, 2))
        said = f"{path} is not a checkpoint of this program"
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
        said = f"{path}: Is a directory"
    else:
        names, values, metadata = torch.ops.qat._load_safetensors(str(path))
        if damage == "no stage":
            metadata = {key: text for key, text in metadata.items() if not key.endswith(".stage")}
            said = f"{path} is not a checkpoint of this program"
        elif damage == "tensors":
            names, values, said = names[1:], values[1:], f"{path}: must have the names of the model"
        elif damage == "epoch":
            values[names.index("epoch")].fill_(1 << 60)
            said = f"{path} is damaged: it is of no epoch of this run"
        else:
            metadata = {**metadata, "train_mnist.stage": "none"}
            said = f"{path} is damaged: it is of no epoch of this run"
        torch.ops.qat._save_safetensors(str(path), names, values, metadata)
    before = files_in(tmp_path)
    code, _, stderr = train(tmp_path, "--resume", **changed)
    assert code == 2 and one_line(stderr, said)
    assert files_in(tmp_path) == before


# ----------------------------------------------------------------------------------------------- bad input


def changed_idx(change):
    """A kind of damage to one of the files: a function of its bytes, without gzip."""

    def damage(path):
        path.write_bytes(gzip.compress(bytes(change(bytearray(gzip.decompress(path.read_bytes()))))))

    return damage


def with_byte(place, value):
    def change(content):
        content[place] = value
        return content

    return changed_idx(change)


def flip_in_gz(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 0x10  # in the checksum
    path.write_bytes(content)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
BAD_FILES = {
    "missing": (
        LABELS,
        Path.unlink,
        "mnist has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz",
    ),
    "truncated gz": (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-500]), "damaged or cut short"),
    "no checksum": (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-8]), "damaged or cut short"),
    "flipped": (IMAGES, flip_in_gz, f"{IMAGES}: it is damaged or cut short"),
    "truncated": (IMAGES, changed_idx(lambda content: content[:-1]), f"{IMAGES}: it is damaged or cut short"),
    "empty": (IMAGES, lambda path: path.write_bytes(b""), f"{IMAGES}: it is damaged or cut short"),
    "trailing": (
        LABELS,
        changed_idx(lambda content: content + b"\0"),
        f"{LABELS}: it is longer than it says",
    ),
    "magic": (IMAGES, with_byte(2, 9), f"{IMAGES}: it does not begin as an idx file of 3 dimensions"),
    "dimensions": (LABELS, with_byte(3, 3), f"{LABELS}: it does not begin as an idx file of 1 dimensions"),
    "huge": (IMAGES, with_byte(4, 255), f"{IMAGES}: it is larger than MNIST's"),
    "wide": (IMAGES, with_byte(14, 1), f"{IMAGES}: it is larger than MNIST's"),
    "classes": (LABELS, with_byte(20, 10), "the t10k files in "),
    "fewer labels": (
        LABELS,
        changed_idx(lambda content: content[:7] + b"\x05" + content[8:13]),
        "hold 200 images and 5 labels",
    ),
    "one color": (
        IMAGES,
        changed_idx(lambda content: content[:16] + b"\x07" * (len(content) - 16)),
        "hold images of one color",
    ),
    "a folder": (IMAGES, make_a_folder, f"{IMAGES}: Is a directory"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_idx_files_are_one_line_and_leave_nothing(train, data_dir, tmp_path, kind):
    name, damage, said = BAD_FILES[kind]
    shutil.copytree(data_dir, tmp_path / "mnist")
    damage(tmp_path / "mnist" / name)
    code, stdout, stderr = train(tmp_path / "run", data_dir=tmp_path / "mnist")
    assert (code, stdout) == (2, "") and one_line(stderr, said, str(tmp_path / "mnist"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epoch=3"], "The following argument was not expected: --epoch=3"),
        (["--epochs=-1"], "--epochs: must be 0 to 100000, got -1"),
        (["--batch-size=many"], "--batch-size: must be 2 to 60000, got many"),
        (["--lr=nan"], "--lr: must be 0 to 1e+30, got nan"),
        (["--resume", "--overwrite"], "--resume excludes --overwrite"),
        (["--out", ""], "--out is empty"),
        (["--data-dir", ""], "where is MNIST? Give --data-dir, or set TORCHQAT_DATA"),
        (["--data-dir=/dev/null"], "/dev/null is not a folder"),
        (["--lambda-kd=0", "--lambda-fa=0", "--lambda-label=0"], "one of --lambda-kd, --lambda-fa and"),
    ],
)
def test_a_wrong_command_line_is_one_line(train, tmp_path, words, said):
    code, stdout, stderr = train(tmp_path / "run", *words)
    assert (code, stdout) == (2, "") and one_line(stderr, said)
    assert not (tmp_path / "run").exists()


def test_help_shows_the_defaults(train):
    done = subprocess.run([train.command, "--help"], env={}, capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert done.stderr == "" and re.search(
        r"--epochs INT:0 to 100000[ =]\[?8\]? epochs of the quantized student", text
    )


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "/proc"])
def test_a_folder_that_cannot_be_written_to(train, tmp_path, out):
    (tmp_path / "file").write_text("here")
    code, stdout, stderr = train(tmp_path / out)
    assert (code, stdout) == (2, "") and one_line(stderr, f"cannot write to --out {tmp_path / out}: ")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["here"]


def test_what_it_says_must_have_been_written(train, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            train.words(tmp_path / "run"), env={}, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2 and one_line(done.stderr, "the standard output could not be written")
    assert (tmp_path / "run" / "quantized.safetensors").exists()


def test_two_runs_do_not_share_a_folder(finished, train):
    before = files_in(finished[0])
    other = os.open(finished[0], os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        for how in ("--resume", "--overwrite"):
            code, _, stderr = train(finished[0], how)
            assert code == 2 and one_line(stderr, f"another run is writing to {finished[0]}")
    finally:
        os.close(other)
    assert files_in(finished[0]) == before


def test_no_room_for_a_checkpoint(train, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000, 10_000))
    done = subprocess.run(
        train.words(tmp_path),
        env={},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        restore_signals=False,
        check=False,
    )
    assert done.returncode == 2 and one_line(
        done.stderr, f"{tmp_path}/checkpoint.safetensors: File too large"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"float_lr": 1e30}, "float training diverged at epoch 1 (loss nan): lower --float-lr"),
        ({"lr": 1e30}, "quantized training diverged at epoch 1 (loss nan): lower --lr"),
        # One step an epoch: its loss is that of the network before.
        ({"float_lr": 1e30, "batch_size": 64}, "epoch 1 (outputs not finite): lower --float-lr"),
    ],
)
def test_diverged_training_says_so_and_keeps_the_checkpoint_before(train, tmp_path, changed, said):
    code, _, stderr = train(tmp_path, **changed)
    assert code == 2 and one_line(stderr, said)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert saved["epoch"] == 0 and stage_of(tmp_path) == ("quantized" if "lr" in changed else "float")
    assert all(value.isfinite().all() for value in saved.values())


# --------------------------------------------------------------------------------------- Python and C++


class Networks(nn.Module):
    """What a checkpoint of train_mnist holds, by its names."""

    def __init__(self, width):
        super().__init__()
        self.teacher = models.lenet5(1, 28, 10, width)
        self.student = torchqat.prepare(models.lenet5(1, 28, 10, width), act_bits=2)
        self.affinity = FastFeatureAffinityLoss()
        self.register_buffer("random", torch.get_rng_state())
        self.register_buffer("epoch", torch.tensor(0))
        self.to(memory_format=torch.channels_last)


@pytest.fixture
def dataset(data_dir, monkeypatch):
    with imported("data", monkeypatch) as module:
        torch.set_num_threads(1)
        yield module.load("mnist", str(data_dir.parent))


def test_python_evaluates_what_cpp_trained(whole, train, dataset):
    networks = Networks(SLOWER["width"])
    found = []
    for model, name in ((networks.teacher, "float"), (networks.student, "quantized")):
        torchqat.load_checkpoint(whole / f"{name}.safetensors", model)
        hits = models.class_scores(model, dataset.normalized(dataset.test_images, "cpu")).argmax(1)
        found.append(f"{name} {100 * (hits == dataset.test_labels).double().mean():.2f} %")
    assert train(whole, "--resume", options=SLOWER)[1].startswith(f"test accuracy: {', '.join(found)}\n")
    weights = [m.weight for m in networks.student if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [weight.unique().numel() for weight in weights] == [2] * 4


def test_python_goes_on_from_a_checkpoint_of_cpp_bit_for_bit(stopped, whole, dataset, tmp_path):
    out, *_ = stopped("quantized", signal.SIGTERM)
    networks = Networks(SLOWER["width"])
    student = networks.student
    optimizer = BCGD(param_groups(student, weight_bits=1), lr=0.02, momentum=0.9, weight_decay=1e-4)
    torchqat.load_checkpoint(out / "checkpoint.safetensors", networks, optimizer)
    assert all(latent.unique().numel() > 2 for group in optimizer.param_groups if group["quant_bits"]
               for latent in (optimizer.state[p]["latent"] for p in group["params"]))  # fmt: skip

    criterion = FAQDLoss(kd="kl", temperature=4.0, fa=networks.affinity)
    distiller = Distiller(student, networks.teacher.eval(), {"6": "6"}, criterion)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SLOWER["epochs"])
    torch.set_rng_state(networks.random)
    for epoch in range(SLOWER["epochs"]):
        if epoch >= networks.epoch:
            distiller.train()
            for images, labels in dataset.batches(SLOWER["batch-size"], torch.device("cpu")):
                loss = distiller(images, labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with pytest.warns() if epoch < networks.epoch else contextlib.nullcontext():  # no step before it
            schedule.step()
    networks.random.copy_(torch.get_rng_state())
    networks.epoch.fill_(SLOWER["epochs"])
    torchqat.save_checkpoint(tmp_path / "checkpoint.safetensors", networks, optimizer)
    torchqat.save_checkpoint(tmp_path / "float.safetensors", networks.teacher)
    torchqat.save_checkpoint(tmp_path / "quantized.safetensors", student)
    assert_same_files(tmp_path, whole)


# ---------------------------------------------------------------------------------------------------- embed


@pytest.fixture
def embed(programs):
    def run(*words):
        done = subprocess.run(
            [programs / "embed", *words], env={}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_embed_prints_the_codes_that_python_computes(embed, tmp_path):
    model = torchqat.prepare(models.lenet5(channels=1, size=28, classes=10), act_bits=2)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    model[6].alpha.data.fill_(0.1)
    torchqat.save_checkpoint(tmp_path / "model.safetensors", model)
    code, stdout, stderr = embed(tmp_path / "model.safetensors")
    assert (code, stderr) == (0, "")
    torch.manual_seed(0)
    images = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        model.eval()
        codes = torchqat.functional.staircase_codes(model[:6](images), model[6].step_size(), bits=2)[0, 0]
        assert stdout.splitlines()[-1] == f"class {model(images).argmax()}"
    printed = [list(map(int, line.split())) for line in stdout.splitlines() if re.fullmatch(r"[ \d]+", line)]
    assert printed == codes.tolist() and codes.unique().numel() == 4


@pytest.mark.parametrize("kind", ["nothing", "no file", "damaged", "another network"])
def test_embed_says_what_is_wrong(embed, finished, tmp_path, kind):
    path = tmp_path / "model.safetensors"
    words, said = [path], f"{path}: No such file or directory"
    if kind == "nothing":
        words, said = [], "usage: embed FILE.safetensors"
    elif kind == "damaged":
        path.write_bytes(b"12345")
        said = f"{path}: "
    elif kind == "another network":
        words, said = (
            [finished[0] / "quantized.safetensors"],
            "'0.weight' must have shape [32, 1, 5, 5], got [3, 1, 5, 5]",
        )
    code, stdout, stderr = embed(*words)
    assert (code, stdout) == (1, "") and one_line_of("embed: ", stderr, said)
