"""Targets, ids and images of unusual forms: they move, come back as they are, or are named."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusereg.augment import Augment, Compose, MixUp, RandomHorizontalFlip
from target_cases import FLIPS, H, W, box, images, v2


def _nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=layout)


ODD: dict[str, Callable[[], Any]] = {
    "sparse_coo": lambda: torch.eye(2).to_sparse(),
    "sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "nested": lambda: _nested(torch.strided),
    "jagged": lambda: _nested(torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(2, 3), 0.1, 0, torch.quint8),
    "mkldnn": lambda: torch.rand(2, 4).to_mkldnn(),
    "meta": lambda: torch.zeros(2, 4, device="meta"),
    "objects": lambda: np.array([[None, 1]] * 2, dtype=object),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("through", ["a kernel", "called", "each", "collate", "mixed"])
def test_values_that_cannot_be_read_are_named_or_passed_through(name: str, through: str) -> None:
    value = ODD[name]()
    x = images().as_subclass(Tensor)
    steps = {"called": [v2().ElasticTransform()], "mixed": [MixUp(num_classes=4)]}

    def run(**rules: Any) -> Any:
        chain = Compose(steps.get(through, [RandomHorizontalFlip(1.0)]), seed=1, **rules)
        if through == "collate":
            return chain.collate([{"image": x[i], "labels": value} for i in range(2)])["labels"]
        if through == "each":
            return chain(x, [{"labels": value}, {"labels": value}])[1][0]["labels"]
        return chain(x, {"labels": value})[1]["labels"]

    if (name, through) == ("meta", "mixed"):
        assert run().device.type == "meta"  # its shape says what it is
        return
    with pytest.raises((ValueError, TypeError), match=r"fusereg\.Compose: "):
        run()
    if name not in ("meta", "objects"):  # which have rows, as any others
        kept = run(passthrough=["labels"])
        assert kept is value or all(v is value for v in kept)


@pytest.mark.parametrize(
    "make",
    [lambda: iter([box(), box()]), lambda: (b for b in [box(), box()]), lambda: zip([box()] * 2)],
    ids=["iterator", "generator", "zip"],
)
def test_an_iterator_is_refused(make: Callable[[], Any]) -> None:
    flip = Augment((H, W), hflip=1.0, crop="none")
    for targets in (make(), {"boxes": make()}):
        with pytest.raises(ValueError, match="which fusereg does not go through"):
            flip(images(), targets)


class OwnNew(collections.namedtuple("OwnNew", "boxes label")):
    __slots__ = ()

    def __new__(cls, boxes: Any) -> OwnNew:
        return super().__new__(cls, boxes, 7)


class OwnTuple(tuple[Any, ...]):
    note: str

    def __new__(cls, first: Any, second: Any) -> OwnTuple:
        made = super().__new__(cls, (first, second))
        made.note = "kept"
        return made


class OwnList(list[Any]):
    def __init__(self, note: str, *values: Any) -> None:
        super().__init__(values)
        self.note = note


@dataclasses.dataclass(frozen=True, slots=True)
class Inner:
    boxes: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    label: int = 3


CONTAINERS: dict[str, Callable[[], Any]] = {
    "a named tuple that is made in another way": lambda: [OwnNew(box()), OwnNew(box())],
    "a tuple that is made in another way": lambda: OwnTuple(box(), box()),
    "a list that is made in another way": lambda: OwnList("kept", box(), box()),
    "such a list in each sample": lambda: [{"boxes": OwnList("", box())} for _ in range(2)],
    "such a tuple in each sample": lambda: [{"boxes": OwnTuple(box(), "a")} for _ in range(2)],
    "frozen records with slots": lambda: [Outer(Inner(box())), Outer(Inner(box()))],
    "defaultdict": lambda: [collections.defaultdict(list, boxes=box()) for _ in range(2)],
    "ChainMap": lambda: collections.ChainMap({"boxes": [box(), box()]}, {"a": 1}),
}


@pytest.mark.parametrize("through", FLIPS)
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_every_class_come_back(name: str, through: str) -> None:
    given = CONTAINERS[name]()
    _, moved = FLIPS[through]()(images(), given)
    assert type(moved) is type(given)
    assert getattr(moved, "note", "kept") == "kept"
    first = moved["boxes"] if isinstance(moved, collections.ChainMap) else moved
    first = first[0]
    if type(given) is list:
        assert type(first) is type(given[0])
        first = first.inner if isinstance(first, Outer) else first
        first = first["boxes"] if isinstance(first, dict) else first.boxes
    first = first[0] if isinstance(first, (OwnList, OwnTuple)) else first
    assert first.tolist() == [[W - 10.0, 0.0, W, 10.0]]


@pytest.mark.parametrize(
    "ids", [[2**63, 0], [0, -(2**63) - 1], np.array([2**64 - 1, 1], np.uint64)]
)
def test_ids_of_more_than_64_bits_are_named(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"sample_ids must be within \[-2\^63, 2\^63\)"):
        Augment(8)(torch.rand(2, 3, 9, 9), sample_ids=ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_gray_of_one_channel_has_three_whatever_the_number_of_images(
    n: int, dtype: torch.dtype
) -> None:
    x = (torch.rand(n, 1, 9, 9) * 255).to(torch.uint8)
    x = x if dtype is torch.uint8 else x / 255
    for rest in ([], [v2().ColorJitter(0.3)], [v2().CenterCrop(5)]):
        y = Compose([v2().Grayscale(3), *rest])(x)
        assert y.shape == (n, 3, *y.shape[2:])
    color = x.expand(-1, 3, -1, -1)
    assert Compose([v2().Grayscale(3)])(color).shape == color.shape


def test_an_image_of_pil_keeps_what_is_noted_beside_its_pixels() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (W, H))
    image.info.update(dpi=(72, 72), exif=b"Exif\0\0turned")
    moved = Compose([RandomHorizontalFlip(1.0)])(image)
    assert moved.info == image.info
    assert moved.info is not image.info
