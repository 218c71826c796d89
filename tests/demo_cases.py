"""Digits that are made, not downloaded, for tests of the demo."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fusereg.demo import data as demo_data
from fusereg.demo.data import DataSet

Bytes = npt.NDArray[np.uint8]


def idx_bytes(array: Bytes, kind: int = 0x08) -> bytes:
    header = bytes([0, 0, kind, array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(count: int, height: int = 9, width: int = 8, seed: int = 0) -> tuple[Bytes, Bytes]:
    """Return images that can be learned: a bright row per label, noise, a blank last column."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = random.integers(0, 120, (count, height, width))
    for image, label in zip(images, labels, strict=True):
        image[label % height, : width // 2 + label // height] += 130
    images[:, :, -1] = 0
    return images.astype(np.uint8), labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of MNIST's form, one file gzipped."""
    made = tmp_path / "digits"
    made.mkdir()
    for part, seed, count in (("train", 1, 200), ("t10k", 2, 50)):
        images, labels = digits(count, seed=seed)
        (made / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (made / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return made


@pytest.fixture
def small(folder: Path) -> DataSet:
    return with_validation(demo_data.load([folder]))


def with_validation(data: DataSet) -> DataSet:
    """Return the data with validation images beside all of its training images."""
    made = digits(50, data.height, data.width, seed=3)
    other = demo_data._data_set("made", made, made)
    return dataclasses.replace(
        data, validation_images=other.train_images, validation_labels=other.train_labels
    )
