"""torchvision's own transforms, read by their names and attributes; it is never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import transforms as ours
from .compose import Transform


def _fill(transform: Any) -> Any:
    """A number or one for each channel; None if it depends on the type."""
    fill = transform.fill
    return None if isinstance(fill, dict) else 0 if fill is None else fill


def _rotation(t: Any) -> Transform | None:
    # torchvision makes room for the angle that it draws, not for all.
    if t.expand or _fill(t) is None:
        return None
    return ours.RandomRotation(list(t.degrees), t.interpolation, False, t.center, _fill(t))


def _affine(t: Any) -> Transform | None:
    if _fill(t) is None:
        return None
    shear = None if t.shear is None else list(t.shear)
    return ours.RandomAffine(
        list(t.degrees), t.translate, t.scale, shear, t.interpolation, _fill(t), t.center
    )


def _crop(t: Any) -> Transform | None:
    if _fill(t) is None:
        return None
    padding = t.padding
    if isinstance(padding, (list, tuple)) and len(padding) == 4 and _is_v2(t):
        left, right, top, bottom = padding  # v2 keeps them in this order
        padding = [left, top, right, bottom]
    return ours.RandomCrop(list(t.size), padding, t.pad_if_needed, _fill(t), t.padding_mode)


def _erasing(t: Any) -> Transform | None:
    value = "random" if t.value is None else t.value
    return None if t.inplace else ours.RandomErasing(t.p, t.scale, t.ratio, value)


def _is_v2(transform: object) -> bool:
    return type(transform).__module__.startswith("torchvision.transforms.v2")


_KNOWN: Mapping[str, Callable[[Any], Transform | None]] = {
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "RandomCrop": _crop,
    "RandomErasing": _erasing,
    "RandomResizedCrop": lambda t: ours.RandomResizedCrop(
        list(t.size), t.scale, t.ratio, t.interpolation, t.antialias
    ),
    "RandomHorizontalFlip": lambda t: ours.RandomHorizontalFlip(t.p),
    "RandomVerticalFlip": lambda t: ours.RandomVerticalFlip(t.p),
    "CenterCrop": lambda t: ours.CenterCrop(list(t.size)),
    "Normalize": lambda t: None if t.inplace else ours.Normalize(list(t.mean), list(t.std)),
    "MixUp": lambda t: ours.MixUp(alpha=t.alpha, num_classes=t.num_classes),
    "CutMix": lambda t: ours.CutMix(alpha=t.alpha, num_classes=t.num_classes),
}


def from_torchvision(transform: object) -> Transform | None:
    """Our transform for one of torchvision's; None for everything else."""
    kind = type(transform)
    if not kind.__module__.startswith("torchvision.transforms"):
        return None
    make = _KNOWN.get(kind.__name__)
    return None if make is None else make(transform)
