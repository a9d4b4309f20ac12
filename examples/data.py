"""The data sets of the examples, as uint8 tensors; downloaded only where the files are not there."""

import gzip
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")
IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
# Where torchvision keeps them.
FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}


class DataError(Exception):
    """The data set cannot be had; the message says what to do."""


@dataclass
class Data:
    """Training and test images (N, C, H, W), uint8, and their labels."""

    images: Tensor
    labels: Tensor | None  # None: there are none, and batches have None in their place
    test_images: Tensor
    test_labels: Tensor
    shift: int = 0  # training images are moved by up to so many pixels,
    mirror: bool = False  # and half of them mirrored
    epoch_size: int | None = None  # images in an epoch, where they are not those there are

    def __post_init__(self):
        pixels = self.images.transpose(0, 1).flatten(1).double()
        self.mean, self.std = (s.float().view(-1, 1, 1) for s in (pixels.mean(1), pixels.std(1)))
        self.channels, self.size = self.images.shape[1], self.images.shape[-1]
        self.classes = 10

    def subset(self, n: int | None) -> "Data":
        parts = (self.images, self.labels, self.test_images, self.test_labels)
        return Data(*(part[:n] for part in parts), self.shift, self.mirror)

    def first(self, n: int | None) -> "Data":
        """The first n training images."""
        if n is not None and n > len(self.images):
            raise DataError(f"there are {len(self.images)} training images, and {n} are wanted")
        return self._changed(images=self.images[:n], labels=self.labels[:n])

    def labelled(self, n: int | None) -> "Data":
        """The first n training images, in epochs of as many as there are in all."""
        return self.first(n)._changed(epoch_size=len(self.images))

    def unlabelled(self) -> "Data":
        """The same images; their labels are nowhere in it."""
        return self._changed(labels=None)

    def _changed(self, **parts) -> "Data":
        """With other images or labels, normalized as these are."""
        changed = replace(self, **parts)
        changed.mean, changed.std = self.mean, self.std
        return changed

    def normalized(self, images: Tensor, device: torch.device) -> Tensor:
        return ((images.float() - self.mean) / self.std).to(device)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One epoch in random order, in batches of nearly equal size."""
        size, there = self.epoch_size or len(self.images), len(self.images)
        order = torch.cat([torch.randperm(there) for _ in range(-(-size // there))])[:size]
        # Batch normalization cannot train on one image: rather than that, batches of two take in a third.
        for index in order.tensor_split(min(-(-size // batch_size), size // 2)):
            images = self.normalized(_moved(self.images[index], self.shift, self.mirror), device)
            yield images, None if self.labels is None else self.labels[index].to(device)


def load(name: str, data_dir: str | None) -> Data:
    """Loads one of DATASETS.

    All but the digits, which come with scikit-learn, are looked for in `data_dir`, else in the folder
    that the environment variable TORCHQAT_DATA names, else in ./data. MNIST and Fashion-MNIST may lie
    there as the four .gz files in `mnist` and `fashion-mnist`, or as torchvision stores them. What is
    missing is downloaded, but never into the folder of TORCHQAT_DATA.
    """
    if name == "digits":
        return _digits()
    given = os.environ.get("TORCHQAT_DATA") if data_dir is None else None
    root = Path(given or data_dir or "data")
    if given and not root.is_dir():
        raise DataError(f"TORCHQAT_DATA names a folder that is not there: {root}")
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is not a folder")
    folder = root / FOLDERS[name]
    if name != "cifar10" and (root / name).is_dir():
        return _from_idx_files(root / name, ".gz")
    if _holds(folder) == "nothing":
        if given:
            raise DataError(f"TORCHQAT_DATA names {root}, which has no {_what_is_missing(name, root)}")
        _download(name, root, folder)
    return _from_cifar10(root, folder) if name == "cifar10" else _from_idx_files(folder, "")


def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 1797 images of 8 x 8, values 0 to 16
    parts = train_test_split(
        digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    images, test_images = (torch.from_numpy(part).to(torch.uint8).unsqueeze(1) for part in parts[:2])
    labels, test_labels = (torch.from_numpy(part).long() for part in parts[2:])
    return Data(images, labels, test_images, test_labels)


def _from_idx_files(folder: Path, suffix: str) -> Data:
    paths = [folder / f"{file}{suffix}" for file in IDX_FILES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}; it holds {_holds(folder)}")
    parts = [_read_idx(path) for path in paths]
    for images, labels in (parts[:2], parts[2:]):
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise DataError(f"the files in {folder} do not hold images of 28 x 28 pixels in 10 classes")
    images, labels, test_images, test_labels = parts
    return Data(images.unsqueeze(1), labels.long(), test_images.unsqueeze(1), test_labels.long())


def _read_idx(path: Path) -> Tensor:
    """The bytes in a file of the idx format: 0, 0, 8, the number of dimensions, their sizes, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    dimensions = 3 if "images" in path.name else 1
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    fits = len(content) == start + math.prod(sizes) > start
    if not fits or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is damaged or not of MNIST's format")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def _from_cifar10(root: Path, folder: Path) -> Data:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    bad = [file for file, checksum in files if not check_integrity(folder / file, checksum)]
    if bad:
        raise DataError(f"missing or damaged in {folder}: {', '.join(bad)}; it holds {_holds(folder)}")
    train, test = (CIFAR10(root, train=part) for part in (True, False))
    images, test_images = (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    )
    return Data(
        images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), shift=4, mirror=True
    )


def _download(name: str, root: Path, folder: Path) -> None:
    """Downloads to beside `folder` and moves what is whole there: a failure leaves nothing behind."""
    from torchvision import datasets

    loader = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[
        name
    ]
    beside = next(place for place in (root, *root.absolute().parents) if place.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=beside) as temporary:
            loader(temporary, download=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / FOLDERS[name], folder)
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(
            f"{root} has no {_what_is_missing(name, root)}, and it cannot be downloaded: {reason}"
        ) from None


def _what_is_missing(name: str, root: Path) -> str:
    files = f"{name}/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz"
    if name == "cifar10":
        files = "cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}"
    found = f"holds {_holds(root)}" if root.is_dir() else "is not there"
    return f"{name}: looked for {files} ({root} {found})"


def _holds(folder: Path) -> str:
    """What there is in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"


def _moved(images: Tensor, shift: int, mirror: bool) -> Tensor:
    """Each image moved by up to `shift` pixels in both directions, and half of them mirrored."""
    if not (shift or mirror):
        return images
    n, _, height, width = images.shape
    row, column = torch.randint(2 * shift + 1, (2, n, 1))
    rows, columns = row + torch.arange(height), column + torch.arange(width)
    if mirror:
        columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (shift,) * 4)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
