"""Checks of arguments: each returns the value in one form, or raises an error that names it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch

#: A number, or one for each channel.
PerChannel: TypeAlias = float | Sequence[float]
#: A number, or the interval to draw it from.
Interval: TypeAlias = float | Sequence[float]
Size: TypeAlias = int | Sequence[int]
#: A name, a member of torchvision's InterpolationMode, or PIL's number.
Interpolation: TypeAlias = str | int | Enum

INTERPOLATIONS = {"nearest": 0, "bilinear": 1, "bicubic": 2}
#: By PIL's numbers of them, which torchvision and timm take as well.
_PIL_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
FILL_MODES = {"constant": 0, "border": 1, "reflect": 2, "symmetric": 3, "wrap": 4}
#: With what a pass may have: of crops that are resized, the border of the window that was cropped.
FILLS = {**FILL_MODES, "window": 5}


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether a value is a sequence, and not a string."""
    # Classes of Python's own are asked about first: abstract ones take longer.
    return isinstance(value, (tuple, list)) or (
        not isinstance(value, (float, int, str)) and isinstance(value, Sequence)
    )


def of_array(value: Any) -> Any:
    """Return an array of NumPy as a number or a list, and other values as they are."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def number(value: object, op: str, name: str) -> float:
    """Check that a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"fusereg.{op}: {name} must be a number, got {type(value).__name__}")
    result = float(value)
    # Not math.isfinite, which compilers do not trace for a number that may change.
    if not -sys.float_info.max <= result <= sys.float_info.max:
        raise ValueError(f"fusereg.{op}: {name} must be finite, got {result}")
    return result


def integer(value: object, op: str, name: str, least: float = -math.inf) -> int:
    """Check that a value is an integer, of Python or of NumPy, and not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"fusereg.{op}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"fusereg.{op}: {name} must be at least {least}, got {value}")
    return int(value)


def flag(value: object, op: str, name: str) -> bool:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"fusereg.{op}: {name} must be True or False, got {type(value).__name__}")
    return value


def numbers(
    value: object, op: str, name: str, lengths: Sequence[int], wanted: str
) -> tuple[float, ...]:
    """Check that a value is a sequence of finite numbers of one of these lengths."""
    if not is_sequence(value):
        raise TypeError(f"fusereg.{op}: {name} must be {wanted}, got {type(value).__name__}")
    if len(value) not in lengths:
        raise ValueError(f"fusereg.{op}: {name} must be {wanted}, got {len(value)} of them")
    return tuple(number(v, op, name) for v in value)


def probability(value: object, op: str, name: str) -> float:
    """Check that a value is a number within [0, 1]."""
    if isinstance(value, bool):
        raise TypeError(
            f"fusereg.{op}: {name} must be a number, got bool; {float(value)} is {value}"
        )
    return within(value, op, name, 0.0, 1.0)


def within(
    value: object, op: str, name: str, low: float, high: float, *, open_low: bool = False
) -> float:
    """Check that a value is a number within [low, high], or (low, high] if ``open_low``."""
    v = number(value, op, name)
    if not low <= v <= high or (open_low and v <= low):
        left = "(" if open_low else "["
        raise ValueError(f"fusereg.{op}: {name} must be within {left}{low:g}, {high:g}], got {v}")
    return v


def interval(
    value: object,
    op: str,
    name: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> tuple[float, float]:
    """Check two numbers (from, to) within [low, high], or (low, high] if ``open_low``."""
    a, b = numbers(value, op, name, (2,), "two numbers (from, to)")
    if a > b:
        raise ValueError(f"fusereg.{op}: {name} must be (from, to) with from <= to, got ({a}, {b})")
    if a < low or b > high or (open_low and a <= low):
        left = "(" if open_low else "["
        raise ValueError(
            f"fusereg.{op}: {name} must be within {left}{low:g}, {high:g}], got ({a}, {b})"
        )
    return a, b


def around(value: object, op: str, name: str, limit: float = math.inf) -> tuple[float, float]:
    """Return (-v, v) for a number v >= 0; check two numbers (from, to) within [-limit, limit]."""
    if is_sequence(value):
        return interval(value, op, name, low=-limit, high=limit)
    v = number(value, op, name)
    if not 0.0 <= v <= limit:
        raise ValueError(
            f"fusereg.{op}: {name} as one number must be within [0, {limit:g}], got {v}"
        )
    return -v, v


def factors(value: object, op: str, name: str) -> tuple[float, float]:
    """Return an interval of factors.

    A number v >= 0 stands for (max(0, 1 - v), 1 + v), None for (1, 1).
    """
    if value is None:
        return 1.0, 1.0
    if is_sequence(value):
        return interval(value, op, name, low=0.0)
    v = number(value, op, name)
    if v < 0:
        raise ValueError(f"fusereg.{op}: {name} as one number must not be negative, got {v}")
    return max(0.0, 1.0 - v), 1.0 + v


def size_pair(value: object, op: str, name: str = "size") -> tuple[int, int]:
    """Return (height, width), which are positive integers; one integer is both."""
    if is_sequence(value):
        if len(value) not in (1, 2):
            raise ValueError(
                f"fusereg.{op}: {name} must be an integer or (height, width), "
                f"got {len(value)} numbers{'; pass shape[-2:]' * (len(value) in (3, 4))}"
            )
        sides = [integer(v, op, name) for v in value]
    else:
        sides = [integer(value, op, name)]
    if min(sides) < 1:
        raise ValueError(f"fusereg.{op}: {name} must be positive, got {tuple(sides)}")
    return sides[0], sides[-1]


def per_channel(value: object, op: str, name: str) -> tuple[float, ...]:
    """Check one number, or one for each channel; tensors and arrays are read."""
    value = value.tolist() if isinstance(value, torch.Tensor) else of_array(value)
    if is_sequence(value):
        if len(value) == 0:
            raise ValueError(
                f"fusereg.{op}: {name} must be a number or one for each channel, got none"
            )
        return tuple(number(v, op, name) for v in value)
    return (number(value, op, name),)


def for_channels(values: tuple[float, ...], channels: int, op: str, name: str) -> tuple[float, ...]:
    """Return one number for each channel; a single one is repeated."""
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        wanted = "1 number" if channels == 1 else f"1 or {channels} numbers"
        colors = "; 3 are of RGB, as recipes have them: convert the images, or pass others"
        raise ValueError(
            f"fusereg.{op}: {name} must have {wanted} for images of {channels} "
            f"channel{'s' * (channels > 1)}, got {len(values)}{colors * (len(values) == 3)}"
        )
    return values


def one_of(value: object, op: str, name: str, known: Sequence[str]) -> str:
    """Return one of these names: given so, or as a member of an enumeration that stands for it."""
    value = getattr(value, "value", value)
    if not isinstance(value, str) or value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"fusereg.{op}: {name} must be one of {names}, got {value!r}")
    return value


def interpolation_name(
    value: object, op: str, name: str = "interpolation", *, corners: bool = False
) -> str:
    """Return the name of an interpolation: given so, as torchvision's enum or PIL's number.

    "nearest-exact" is the pixel at whose center a place is, as "nearest" is here; with ``corners``
    both names are kept.
    """
    value = getattr(value, "value", value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 6:
        value = _PIL_INTERPOLATIONS[value]
    if value == "nearest-exact":
        return "nearest-exact" if corners else "nearest"
    return one_of(value, op, name, list(INTERPOLATIONS))


def check_memory_format(
    memory_format: torch.memory_format | None, op: str
) -> torch.memory_format | None:
    """Check that the kernels write this memory format."""
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"fusereg.{op}: memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    return memory_format


class Normalization(NamedTuple):
    """(v - mean) / std for v in [0, 1]; each has one number, or one for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalization(mean: object, std: object, op: str) -> Normalization | None:
    """Check mean and std, which are given together or not at all."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"fusereg.{op}: mean and std must be given together")
    result = Normalization(per_channel(mean, op, "mean"), per_channel(std, op, "std"))
    if min(result.std) <= 0:
        raise ValueError(f"fusereg.{op}: std must be positive, got {result.std}")
    return result


def full_intensity(dtype: torch.dtype) -> float:
    """Return the value that stands for 1: images of uint8 go from 0 to 255, others from 0 to 1."""
    return 255.0 if dtype is torch.uint8 else 1.0


def scale_and_shift(
    normal: Normalization | None, dtype: torch.dtype, channels: int, op: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what normalizes values of this dtype, for each channel: v * scale + shift."""
    if normal is None:
        return (1.0,) * channels, (0.0,) * channels
    limit = full_intensity(dtype)
    if dtype is torch.uint8 and (max(map(abs, normal.mean)) > 1.5 or min(normal.std) > 1.5):
        raise ValueError(
            f"fusereg.{op}: mean and std are of images in [0, 1], also for uint8, got mean "
            f"{normal.mean} and std {normal.std}; divide them by 255"
        )
    means = for_channels(normal.mean, channels, op, "mean")
    stds = for_channels(normal.std, channels, op, "std")
    pairs = [(1.0 / (limit * s), -m / s) for m, s in zip(means, stds, strict=True)]
    scale, shift = zip(*pairs, strict=True)
    return scale, shift
