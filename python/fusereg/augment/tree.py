"""Nestings of targets: containers of every kind, what is in them, and torchvision's types."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..core import memory
from .params import corners_of

# --- torchvision's types ---


def tv_tensors() -> Any:
    """Return torchvision's module if it has been imported; without it no tensor has its types."""
    return sys.modules.get("torchvision.tv_tensors")


def kind_of(value: Any) -> str:
    """Return the name of torchvision's type of a tensor, "Tensor" for a plain one, else ""."""
    if type(value) is Tensor:
        return "Tensor"
    if not isinstance(value, Tensor):
        return ""
    tv = tv_tensors()
    if tv is not None and isinstance(value, tv.TVTensor):
        known = ("Mask", "BoundingBoxes", "KeyPoints", "Image", "Video")
        return next((k for k in known if isinstance(value, getattr(tv, k, ()))), "TVTensor")
    return "Tensor"


def plain(value: Tensor) -> Tensor:
    """Return a tensor without torchvision's type, and others as they are."""
    if type(value) is Tensor or kind_of(value) == "Tensor":
        return value
    return value.as_subclass(Tensor)


def wrap(value: Tensor, like: Any, **more: Any) -> Any:
    """Return a tensor as one of the tv_tensors, and as it is where ``like`` is none."""
    if type(like) is Tensor or kind_of(like) in ("", "Tensor"):
        return value
    return tv_tensors().wrap(value, like=like, **more)


def odd_form(value: Any) -> str:
    """Return the form of a tensor that is not dense, whose rows and values are not read, or ""."""
    if not isinstance(value, Tensor):
        return ""
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch._").removeprefix("torch.")
    return "quantized" if value.is_quantized else ""


# --- containers ---


@dataclass(frozen=True)
class Columns:
    """A loader's values of the whole batch; labels in the first alone are mixed."""

    values: list[Any]


class Node:
    """A container: its items, by key or index, and how one like it is built."""

    def __init__(self, like: Any, items: dict[Any, Any], each: bool = False) -> None:
        self.like, self.items, self.each = like, items, each

    def build(self, values: list[Any], plain: bool = False) -> Any:
        """Return a container of these values; ``plain``: what torchvision goes through."""
        like = self.like
        if isinstance(like, Columns):
            return list(values)
        if isinstance(like, Mapping) or dataclasses.is_dataclass(like):
            pairs = dict(zip(self.items, values, strict=True))
            frozen = isinstance(like, Mapping) and not isinstance(like, MutableMapping)
            if plain or frozen or type(like) is dict:
                return pairs
            made: Any = copy.copy(like)
            for key, value in pairs.items():
                if isinstance(like, Mapping):
                    made[key] = value
                else:
                    object.__setattr__(made, key, value)
            return made
        if plain:  # what torch knows of other classes is how some are made, or nothing
            return tuple(values) if isinstance(like, tuple) else values
        if isinstance(like, tuple):  # a class of its own may be made in another way
            row = tuple.__new__(type(like), values)
            if hasattr(like, "__dict__"):
                vars(row).update(vars(like))
            return row
        made = copy.copy(like)
        made[:] = values
        return made


def items_of(value: Any) -> dict[Any, Any] | None:
    """Return the items of a mapping, record, list or tuple, and None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return None


def values_of(value: Any) -> list[Any]:
    """Return the values in a container."""
    items = items_of(value)
    assert items is not None
    return list(items.values())


#: Dimensions of a value for the whole batch; those of one sample have one less.
_BATCHED = {"Mask": (4,), "Image": (4,), "Video": (5,)}


def _look(value: Any) -> object:
    """Return what a sequence with one item for each sample has in common; None fits anything."""
    if value is None:
        return None
    kind = kind_of(value)
    if kind:
        return "a batch" if value.dim() in _BATCHED.get(kind, ()) else kind
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        looks = [look for look in map(_look, value) if look is not None]
        return ("sequence", *(looks[:1] if len(set(looks)) == 1 else looks))
    return "value" if isinstance(value, (str, bytes, int, float)) else type(value)


def one_each(value: Sequence[Any], n: int) -> bool:
    """Return whether a list or tuple has an item for each of n samples."""
    looks = {_look(v) for v in value} - {None}
    return len(value) == n and len(looks) == 1 and looks != {"a batch"}


def hides_tensors(value: Any, depth: int = 3) -> bool:
    """Return whether there may be tensors, arrays or images in an object of an unknown class.

    What an iterator has is not known before it is used up.
    """
    if isinstance(value, (Tensor, Iterator)) or hasattr(value, "__array__"):
        return True
    if depth == 0 or isinstance(value, (str, bytes, int, float, type)):
        return False
    slots = [s for base in type(value).__mro__ for s in getattr(base, "__slots__", ())]
    inside = [*getattr(value, "__dict__", {}).values()]
    inside += [getattr(value, s, None) for s in slots if isinstance(s, str)]
    if isinstance(value, Mapping):
        inside += value.values()
    elif isinstance(value, Collection):
        inside += value
    return any(hides_tensors(v, depth - 1) for v in inside)


def stack(values: Sequence[Any]) -> Any:
    """Return the targets of samples as those of a batch, with torchvision's types.

    Boxes, and tensors whose sizes differ, become lists; in a mapping with boxes, all values do.
    """
    first = values[0]
    kinds = {kind_of(v) for v in values}
    if "BoundingBoxes" in kinds or any(v is None or odd_form(v) for v in values):
        return list(values)
    if isinstance(first, Tensor):
        if len({v.shape for v in values}) > 1:
            return list(values)
        return wrap(torch.stack([plain(v) for v in values]), first)
    if any(type(v) is not type(first) for v in values):
        return list(values)
    items = items_of(first)
    if items is None:
        alike = len({getattr(v, "shape", None) for v in values}) == 1
        numbers = isinstance(first, (int, float, str, bytes)) or (
            hasattr(first, "__array__") and _kind_of_array(first) in "biufc"
        )
        return default_collate(list(values)) if alike and numbers else list(values)
    parts = [items_of(v) or {} for v in values]
    if isinstance(first, list) and len({len(v) for v in values}) > 1:
        return list(values)
    if isinstance(first, Mapping) and any(p.keys() != items.keys() for p in parts):
        return list(values)
    with_boxes = any(kind_of(v) == "BoundingBoxes" for p in parts for v in p.values())
    joined = [
        list(column) if with_boxes else stack(column)
        for column in ([p[name] for p in parts] for name in items)
    ]
    # As torch's default_collate: a plain tuple of columns is a list.
    like = list(first) if type(first) is tuple else first
    return Node(like, items).build(joined)


def batch_tree(targets: Any) -> Any:
    """Return the targets of a batch: of a list of columns, labels in the first are mixed."""
    return Columns(targets) if isinstance(targets, list) else targets


def leaves_of(tree: Any) -> list[Any]:
    """Return what is in a nesting of containers."""
    items = items_of(tree)
    return [tree] if items is None else [leaf for v in items.values() for leaf in leaves_of(v)]


def _kind_of_array(value: Any) -> str:
    """Return NumPy's letter for what is in an array: "U" text, "O" objects."""
    return getattr(getattr(value, "dtype", None), "kind", "f")


def are_probabilities(value: Any, columns: int) -> bool:
    """Return whether values [N, K] are probabilities, several classes or tokens, and no places."""
    if _kind_of_array(value) not in "biufc":
        return _kind_of_array(value) in "US"
    if isinstance(value, Tensor) and value.is_meta:
        return columns not in (2, 4, 5, 8)
    x = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    if not x.is_floating_point() and x.dtype is not torch.bool:
        few = columns in (2, 4, 5, 8)
        return not few or bool(((x == 0) | (x == 1)).all())
    x = x.detach()
    if x.dtype is torch.bool or bool(((x == 0) | (x == 1)).all()):
        return True
    if not bool(((x >= 0) & (x <= 1)).all()):
        return False
    sums = x.double().sum(-1)
    return columns not in (2, 4, 5, 8) or bool(((sums - 1).abs() < 1e-2).all())


def are_rows_of_numbers(value: Any) -> bool:
    """Return whether a list has lists of numbers, such as points, polygons or a mask."""
    return bool(value) and all(
        isinstance(row, (list, tuple))
        and not hasattr(row, "_fields")
        and bool(row)
        and (are_rows_of_numbers(row) or all(isinstance(v, (int, float)) for v in row))
        for row in value
    )


def hulls_of(boxes: Tensor, name: str) -> Tensor:
    """Return boxes of a format, or what is around their corners, as x0, y0, x1, y1."""
    if name != "XYXYXYXY":
        return corners_of(boxes, name.lower())
    points = boxes.double().reshape(-1, 4, 2)
    return torch.cat([points.amin(1), points.amax(1)], dim=1)


def cut_corners(boxes: Any) -> Tensor:
    """Return boxes, or what is around their corners, as x0, y0, x1, y1 within their canvas."""
    corners = hulls_of(plain(boxes), str(boxes.format.value))
    height, width = boxes.canvas_size
    sides = memory.numbers((width, height, width, height), corners.dtype, corners.device)
    return corners.clamp(min=0).minimum(sides)


def area(corners: Tensor) -> Tensor:
    """Return the area of boxes x0, y0, x1, y1."""
    return (corners[:, 2:4] - corners[:, :2]).clamp(min=0).prod(1)
