"""Images, boxes, points, masks, and nestings of them, for tests of augmentation's targets."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import augment_peers
from fusereg.augment import Augment, Compose, RandomHorizontalFlip

H, W, N = 40, 60, 2


def tv() -> Any:
    return augment_peers.torchvision_module("torchvision.tv_tensors")


def v2() -> Any:
    return augment_peers.torchvision_module("torchvision.transforms.v2")


def f() -> Any:
    return augment_peers.torchvision_module("torchvision.transforms.v2.functional")


def images(n: int = N) -> Any:
    return tv().Image(torch.randint(0, 256, (n, 3, H, W), dtype=torch.uint8))


def box(*rows: tuple[float, ...], form: str = "XYXY") -> Any:
    data = torch.tensor(rows or [(0.0, 0, 10, 10)]).reshape(-1, len(rows[0]) if rows else 4)
    return tv().BoundingBoxes(data, format=form, canvas_size=(H, W))


def points(*rows: tuple[float, float]) -> Any:
    return tv().KeyPoints(torch.tensor(rows or [(3.0, 4.0)]), canvas_size=(H, W))


def mask() -> Any:
    return tv().Mask(torch.randint(0, 9, (H, W)))


def masks() -> Any:
    return tv().Mask(torch.randint(0, 9, (N, H, W)))


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    first: Any
    second: Any


FLIPS: dict[str, Callable[[], Any]] = {
    "Augment": lambda: Augment((H, W), hflip=1.0, crop="none"),
    "a transform": lambda: RandomHorizontalFlip(1.0),
    "Compose": lambda: Compose([RandomHorizontalFlip(1.0)]),
    "Compose of torchvision's": lambda: Compose([v2().RandomHorizontalFlip(1.0)]),
    "a nested v2.Compose": lambda: Compose([v2().Compose([v2().RandomHorizontalFlip(1.0)])]),
    "RandomApply": lambda: Compose([v2().RandomApply([v2().RandomHorizontalFlip(1.0)], p=1.0)]),
    "RandomChoice": lambda: Compose([v2().RandomChoice([v2().RandomHorizontalFlip(1.0)])]),
    "RandomOrder": lambda: Compose([v2().RandomOrder([v2().RandomHorizontalFlip(1.0)])]),
}

#: Nestings of a box and points for each sample, as functions of the two lists.
EACH: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "list of dicts": lambda a, b: [{"boxes": x, "points": y} for x, y in zip(a, b, strict=True)],
    "tuple of dicts": lambda a, b: tuple(
        {"boxes": x, "points": y} for x, y in zip(a, b, strict=True)
    ),
    "dict of lists": lambda a, b: {"boxes": a, "points": b},
    "dict of tuples": lambda a, b: {"boxes": tuple(a), "points": tuple(b)},
    "tuple of lists": lambda a, b: (a, b),
    "list of tuples": lambda a, b: list(zip(a, b, strict=True)),
    "list of named tuples": lambda a, b: [Pair(x, y) for x, y in zip(a, b, strict=True)],
    "list of dataclasses": lambda a, b: [Record(x, y) for x, y in zip(a, b, strict=True)],
    "frozen": lambda a, b: [FrozenRecord(x, y) for x, y in zip(a, b, strict=True)],
    "a dataclass of lists": lambda a, b: Record(a, b),
    "a named tuple of lists": lambda a, b: Pair(a, b),
    "deep": lambda a, b: {"x": {"y": [{"z": (x, [y])} for x, y in zip(a, b, strict=True)]}},
    "other mappings": lambda a, b: [
        OrderedDict(boxes=a[0], more=UserDict(points=b[0])),
        OrderedDict(boxes=a[1], more=UserDict(points=b[1])),
    ],
}


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (dict, UserDict)):
        return [leaf for v in tree.values() for leaf in leaves(v)]
    if dataclasses.is_dataclass(tree):
        return leaves([getattr(tree, g.name) for g in dataclasses.fields(tree)])
    if isinstance(tree, (list, tuple)):
        return [leaf for v in tree for leaf in leaves(v)]
    return [tree]


def types_of(tree: Any) -> Any:
    if isinstance(tree, (dict, UserDict)):
        return type(tree), {k: types_of(v) for k, v in tree.items()}
    if dataclasses.is_dataclass(tree):
        return type(tree), [types_of(getattr(tree, g.name)) for g in dataclasses.fields(tree)]
    if isinstance(tree, (list, tuple)):
        return type(tree), [types_of(v) for v in tree]
    return type(tree)


def plain(x: Any) -> Tensor:
    return x.as_subclass(Tensor)


def sample(i: int) -> Any:
    return tv().Image(torch.full((3, H, W), i, dtype=torch.uint8))
