"""Conversion of torchvision's transforms, by their names and attributes; it is never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import compose
from . import transforms as T


def _fill(transform: Any) -> Any:
    """Return a number or one for each channel; None if the fill depends on the input's type."""
    fill = transform.fill
    return None if isinstance(fill, dict) else 0 if fill is None else fill


def _rotation(t: Any) -> compose.Transform | None:
    # torchvision expands the canvas for the angle that it draws, fusereg for the whole range.
    if t.expand or _fill(t) is None:
        return None
    return T.RandomRotation(list(t.degrees), t.interpolation, False, t.center, _fill(t))


def _affine(t: Any) -> compose.Transform | None:
    if _fill(t) is None:
        return None
    shear = None if t.shear is None else list(t.shear)
    return T.RandomAffine(
        list(t.degrees), t.translate, t.scale, shear, t.interpolation, _fill(t), t.center
    )


def _crop(t: Any) -> compose.Transform | None:
    if _fill(t) is None:
        return None
    padding = t.padding
    is_v2 = type(t).__module__.startswith("torchvision.transforms.v2")
    if isinstance(padding, (list, tuple)) and len(padding) == 4 and is_v2:
        left, right, top, bottom = padding  # v2 keeps them in this order
        padding = [left, top, right, bottom]
    return T.RandomCrop(list(t.size), padding, t.pad_if_needed, _fill(t), t.padding_mode)


def _erasing(t: Any) -> compose.Transform | None:
    value = "random" if t.value is None else t.value
    return None if t.inplace else T.RandomErasing(t.p, t.scale, t.ratio, value)


_KNOWN: Mapping[str, Callable[[Any], compose.Transform | None]] = {
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "RandomCrop": _crop,
    "RandomErasing": _erasing,
    "RandomResizedCrop": lambda t: T.RandomResizedCrop(
        list(t.size), t.scale, t.ratio, t.interpolation, t.antialias
    ),
    "RandomHorizontalFlip": lambda t: T.RandomHorizontalFlip(t.p),
    "RandomVerticalFlip": lambda t: T.RandomVerticalFlip(t.p),
    "CenterCrop": lambda t: T.CenterCrop(list(t.size)),
    "Normalize": lambda t: None if t.inplace else T.Normalize(list(t.mean), list(t.std)),
    "MixUp": lambda t: T.MixUp(alpha=t.alpha, num_classes=t.num_classes),
    "CutMix": lambda t: T.CutMix(alpha=t.alpha, num_classes=t.num_classes),
}


def from_torchvision(transform: object) -> compose.Transform | None:
    """Return fusereg's transform for one of torchvision's, None for anything else."""
    kind = type(transform)
    if not kind.__module__.startswith("torchvision.transforms"):
        return None
    convert = _KNOWN.get(kind.__name__)
    return None if convert is None else convert(transform)


compose.converters.append(from_torchvision)
