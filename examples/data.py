"""The data sets of the examples, as uint8 tensors; downloaded only where the files are not there."""

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")
IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class DataError(Exception):
    """The data set cannot be had; the message says what to do."""


@dataclass
class Data:
    """Training and test images (N, C, H, W), uint8, and their labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    shift: int = 0  # training images are moved by up to so many pixels,
    mirror: bool = False  # and half of them mirrored

    def __post_init__(self):
        pixels = self.images.transpose(0, 1).flatten(1).double()
        self.mean, self.std = (s.float().view(-1, 1, 1) for s in (pixels.mean(1), pixels.std(1)))
        self.channels, self.size = self.images.shape[1], self.images.shape[-1]
        self.classes = 10

    def subset(self, n: int | None) -> "Data":
        parts = (self.images, self.labels, self.test_images, self.test_labels)
        return Data(*(part[:n] for part in parts), self.shift, self.mirror)

    def normalised(self, images: Tensor, device: torch.device) -> Tensor:
        return ((images.float() - self.mean) / self.std).to(device)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, in batches of nearly equal size."""
        # Batch normalisation cannot train on one image: rather than that, batches of two take in a third.
        count = min(-(-len(self.labels) // batch_size), len(self.labels) // 2)
        for index in torch.randperm(len(self.labels)).tensor_split(count):
            images = _moved(self.images[index], self.shift, self.mirror)
            yield self.normalised(images, device), self.labels[index].to(device)


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
    flat = root / name
    if name != "cifar10" and flat.is_dir():
        return _from_idx_files(name, flat)
    try:
        return _from_torchvision(name, root, download=not given)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        if given:
            raise DataError(f"TORCHQAT_DATA names {root}, but {name} is not there (see --data-dir)") from None
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"{name} is not in {root} and cannot be downloaded: {reason}") from None


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


def _from_idx_files(name: str, folder: Path) -> Data:
    """Unpacks the .gz files into a temporary folder laid out as torchvision's loader wants it."""
    missing = [f"{file}.gz" for file in IDX_FILES if not (folder / f"{file}.gz").is_file()]
    if missing:
        raise DataError(f"the folder {folder} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / _loader(name).__name__ / "raw"
        raw.mkdir(parents=True)
        for file in IDX_FILES:
            try:
                with gzip.open(folder / f"{file}.gz") as packed, open(raw / file, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"cannot read {folder / file}.gz: {error}") from None
        try:
            return _from_torchvision(name, Path(root), download=False)
        except (RuntimeError, ValueError, AssertionError, KeyError, IndexError):
            raise DataError(f"the files in {folder} do not hold {name}") from None


def _from_torchvision(name: str, root: Path, download: bool) -> Data:
    train, test = (_loader(name)(root, train=part, download=download) for part in (True, False))
    images, test_images = (torch.as_tensor(part.data) for part in (train, test))
    labels, test_labels = (torch.as_tensor(part.targets) for part in (train, test))
    if name == "cifar10":
        images, test_images = (t.permute(0, 3, 1, 2).contiguous() for t in (images, test_images))
        return Data(images, labels, test_images, test_labels, shift=4, mirror=True)
    return Data(images.unsqueeze(1), labels, test_images.unsqueeze(1), test_labels)


def _loader(name: str):
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[
        name
    ]


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
