"""What would have to move, in whatever form: it moves, or an error names it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from fusereg.augment import Augment, Compose, RandomHorizontalFlip, recipes

N, H, W = 2, 40, 60


def v2() -> Any:
    return torchvision_module("torchvision.transforms.v2")


def tv() -> Any:
    return torchvision_module("torchvision.tv_tensors")


def boxes(*rows: tuple[float, ...]) -> Any:
    given = torch.tensor(rows or [(0.0, 0, 10, 10)])
    return tv().BoundingBoxes(given, format="XYXY", canvas_size=(H, W))


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


FLIPS: dict[str, Callable[[], Any]] = {
    "Augment": lambda: Augment((H, W), hflip=1.0, crop="none"),
    "Compose": lambda: Compose([RandomHorizontalFlip(1.0)]),
    "called": lambda: Compose([v2().RandomChoice([v2().RandomHorizontalFlip(1.0)])]),
}


class Default(NamedTuple):
    boxes: Any
    labels: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    boxes: Any
    labels: Any = None


class Encoding(collections.UserDict[str, Any]):
    """As Hugging Face's BatchEncoding."""

    def __getattr__(self, key: str) -> Any:
        return self.data[key]


class Argument(dict[str, Any]):
    def __init__(self, given: Any, other: int) -> None:
        super().__init__(boxes=given)
        self.other = other


class Row(tuple[Any, ...]):
    pass


def feature(given: Any) -> Any:
    return pytest.importorskip("transformers.feature_extraction_utils").BatchFeature(
        {"boxes": given}
    )


NESTINGS: dict[str, Callable[[Any], Any]] = {
    "OrderedDict": lambda b: collections.OrderedDict(boxes=b),
    "defaultdict": lambda b: collections.defaultdict(list, boxes=b),
    "read only": lambda b: MappingProxyType({"boxes": b}),
    "ChainMap": lambda b: collections.ChainMap({"boxes": b}, {"labels": 1}),
    "UserDict": lambda b: collections.UserDict(boxes=b),
    "encoding": lambda b: Encoding(boxes=b),
    "feature": feature,
    "argument": lambda b: Argument(b, 3),
    "default": Default,
    "slots": Slots,
    "deep": lambda b: {"a": {"b": [{"boxes": b}]}},
    "row": lambda b: Row([b, 1]),
}


def found(tree: Any) -> Tensor:
    """The boxes in a nesting."""
    if isinstance(tree, Tensor):
        return plain(tree)
    if isinstance(tree, tuple | list):
        return found(tree[0])
    if hasattr(tree, "keys"):
        return found(tree["boxes"] if "boxes" in tree else next(iter(tree.values())))
    return found(tree.boxes)


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_boxes_move_in_any_container(nesting: str, flip: str) -> None:
    x = tv().Image(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8))
    _, moved = FLIPS[flip]()(x, [NESTINGS[nesting](boxes()) for _ in range(N)])
    for tree in moved:
        assert found(tree).tolist() == [[50, 0, 60, 10]]


#: Each with what the error names.
PLACES: dict[str, tuple[Any, str]] = {
    "rle": ({"segmentation": {"counts": [1, 2, 3], "size": [40, 60]}}, r"\['size'\]"),
    "rle of bytes": ({"rle": {"counts": b"abc", "size": [40, 60]}}, r"\['size'\]"),
    "polygons": ({"segmentation": [[1.0, 2.0, 3.0, 4.0]]}, "segmentation"),
    "polygons of several lengths": ({"parts": [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]]}, "parts"),
    "poly": ({"poly": [1.0, 2.0, 3.0, 4.0]}, "poly"),
    "contour": ({"contour": [[1.0, 2.0], [3.0, 4.0]]}, "contour"),
    "points in a list": ({"points": [[1.0, 2.0], [3.0, 4.0]]}, "points"),
    "points in a tuple": ({"points": ((1, 2), (3, 4))}, "points"),
    "a mask in lists": ({"mask": [[0] * W] * H}, "mask"),
    "landmarks by name": ({"landmarks": {"left_eye": (3.0, 4.0)}}, "left_eye"),
    "boxes by side": ({"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}, "xmin"),
    "roi": ({"roi": [0, 0, 10, 10]}, "roi"),
    "COCO's annotations": (
        {"annotations": [{"bbox": [0.0, 0.0, 9.0, 9.0], "category_id": 3, "id": 7}]},
        "bbox",
    ),
    "Hugging Face's objects": ({"objects": {"bbox": [[0.0, 0.0, 9.0, 9.0]], "id": [3]}}, "bbox"),
    "array of boxes": ({"boxes": np.zeros((1, 4))}, "boxes"),
    "array of integers": ({"bboxes": np.zeros((1, 4), dtype=np.int64)}, "bboxes"),
    "parameter": ({"boxes": torch.nn.Parameter(torch.rand(1, 4))}, "boxes"),
    "depth": ({"depth": torch.rand(H, W)}, "depth"),
    "array of depth": ({"depth": np.zeros((H, W))}, "depth"),
    "flow": ({"flow": torch.rand(2, H, W)}, "flow"),
    "panoptic": ({"panoptic": torch.zeros(H, W, 3)}, "panoptic"),
    "camera": ({"K": torch.eye(3)}, "K"),
    "heatmap": ({"heatmap": torch.rand(17, 10, 15)}, "heatmap"),
    "phase": ({"phase": torch.zeros(H, W, dtype=torch.complex64)}, "phase"),
    "namespace": (SimpleNamespace(boxes=torch.zeros(1, 4)), "SimpleNamespace"),
    "deque": (collections.deque([torch.zeros(1, 4)]), "deque"),
    "UserList": (collections.UserList([torch.zeros(1, 4)]), "UserList"),
    "records": (np.zeros(3, dtype=[("x", "f4"), ("y", "f4")]), "array"),
    "objects": (np.array([torch.zeros(4), None], dtype=object), "array"),
}


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("name", PLACES)
def test_places_in_plain_values_are_errors_that_name_them(name: str, flip: str) -> None:
    x = tv().Image(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8))
    target, named = PLACES[name]
    with pytest.raises(ValueError, match=named) as caught:
        FLIPS[flip]()(x, [target] * N)
    assert "passthrough=" in str(caught.value)
    if isinstance(target, dict):
        keys = {"size", "left_eye", "bbox", *target}
        chain = FLIPS[flip]()
        chain.rules = dataclasses.replace(chain.rules, passthrough=sorted(keys))
        _, moved = chain(x, [target] * N)
        assert str(moved[0]) == str(target)


LEFT: dict[str, Any] = {
    "text": {"caption": "the cat is on the left"},
    "nothing": {"boxes": None, "labels": None},
    "no boxes": {"boxes": [], "labels": []},
    "classes": {"label": 3, "label_names": ["a", "b"], "category": [1, 2]},
    "numbers of an array": {"label": np.int64(3)},
    "one hot in lists": {"classes": [[0, 1], [1, 0]]},
    "ids of tokens": {"input_ids": [[1, 2, 3], [4, 5, 6]]},
    "numbers beside places": {"keypoints": {"num": 3, "names": ["a"]}},
}


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_place_stays(name: str, flip: str) -> None:
    x = tv().Image(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8))
    _, moved = FLIPS[flip]()(x, [LEFT[name]] * N)
    assert str(moved[0]) == str(LEFT[name])


# --- rows beside boxes that are left out ---

MANY = [(0.0, 0.0, 10.0, 10.0), (58.0, 0.0, 60.0, 1.0), (5.0, 5.0, 20.0, 20.0)]
ROWS: dict[str, Any] = {
    "class_labels": lambda: torch.tensor([1, 2, 3]),
    "track_ids": lambda: torch.tensor([1, 2, 3]),
    "difficult": lambda: torch.tensor([True, False, True]),
    "masks": lambda: tv().Mask(torch.ones(3, H, W, dtype=torch.uint8)),
    "keypoints": lambda: tv().KeyPoints(torch.ones(3, 5, 2), canvas_size=(H, W)),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_rows_beside_boxes_are_left_out_with_them_or_an_error_names_them(flip: str) -> None:
    x = tv().Image(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8))

    def filtered(target: dict[str, Any], **rules: Any) -> dict[str, Any]:
        chain = FLIPS[flip]()
        chain.rules = dataclasses.replace(chain.rules, min_area=4.0, **rules)
        moved: dict[str, Any] = chain(x, [{"boxes": boxes(*MANY), **target}] * N)[1][0]
        return moved

    every = filtered({name: make() for name, make in ROWS.items()})
    assert {len(value) for value in every.values()} == {2}
    assert every["track_ids"].tolist() == [1, 3]
    for odd in (torch.tensor([1, 2, 3]), ["a", "b", "c"], tv().Mask(torch.ones(3, H, W))):
        with pytest.raises(ValueError, match=r"odd_scores.* may have a row for each of the 3"):
            filtered({"odd_scores": odd})
    assert (
        len(filtered({"odd_scores": torch.rand(3)}, passthrough=["odd_scores"])["odd_scores"]) == 3
    )
    rows = ["labels", "odd_scores"]
    assert len(filtered({"odd_scores": torch.rand(3)}, rows=rows)["odd_scores"]) == 2
    kept = {"image_id": torch.arange(3), "orig_size": torch.arange(3), "caption": "abc"}
    assert [len(v) for v in filtered(kept).values()] == [2, 3, 3, 3]


def test_the_recipe_of_detection_leaves_out_every_row() -> None:
    chain = recipes.detection("hflip", (H, W))
    target = {"boxes": boxes(*MANY, (1.0, 1.0, 1.0, 9.0)), "labels": torch.arange(4)}
    target |= {"area": torch.arange(4.0), "iscrowd": torch.zeros(4), "image_id": torch.tensor([5])}
    x = torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8)
    for mode in (chain, chain.eval()):
        _, moved = mode(x, [target] * N)
        assert moved[0]["labels"].tolist() == [0, 1, 2]
        assert [len(v) for v in moved[0].values()] == [3, 3, 3, 3, 1]
