"""The steps that a sample goes through, as csrc/augment/augment_params.h defines them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, TypeAlias

#: (kind, how many steps of the same group come before it, values)
Values: TypeAlias = tuple[int, int, list[float]]
Pair: TypeAlias = tuple[float, float]
_ZERO, _ONE = (0.0, 0.0), (1.0, 1.0)


@dataclass(frozen=True)
class Step:
    """Base of the steps.

    Steps of one ``group`` draw the same random numbers, so a counter keeps them apart.
    """

    kind: ClassVar[int]
    group: ClassVar[str]

    def values(self) -> list[float]:
        """Return the numbers in the order of the header: the fields, pairs flattened."""
        values: list[float] = []
        for value in astuple(self):
            values += value if isinstance(value, tuple) else (value,)
        return [float(v) for v in values]


@dataclass(frozen=True)
class Affine(Step):
    """Rotation, scale, shear and translation about a center."""

    p: float = 1.0
    degrees: Pair = _ZERO
    sign: float = 1.0
    scale_x: Pair = _ONE
    scale_y: Pair | None = None
    zooms_out: bool = False
    translate_x: Pair = _ZERO
    translate_y: Pair = _ZERO
    whole_pixels: bool = False
    shear_x: Pair = _ZERO
    shear_y: Pair = _ZERO
    center: Pair | None = None

    kind = 0
    group = "affine"

    def values(self) -> list[float]:
        """Return the numbers in the order of the header."""
        return [
            self.p,
            *self.degrees,
            self.sign,
            *self.scale_x,
            *(self.scale_y or self.scale_x),
            float(self.scale_y is None),
            float(self.zooms_out),
            *self.translate_x,
            *self.translate_y,
            float(self.whole_pixels),
            *self.shear_x,
            *self.shear_y,
            float(self.center is not None),
            *(self.center or _ZERO),
        ]

    @property
    def turns(self) -> bool:
        """Return whether rows may not stay rows."""
        angles = (self.degrees, self.shear_x, self.shear_y)
        return self.p > 0.0 and any(pair != _ZERO for pair in angles)

    @property
    def is_identity(self) -> bool:
        """Return whether it never moves a pixel."""
        return self.p == 0.0 or (
            self.degrees == self.translate_x == self.translate_y == _ZERO
            and self.shear_x == self.shear_y == _ZERO
            and self.scale_x == _ONE
            and self.scale_y in (None, _ONE)
        )


@dataclass(frozen=True)
class Flip(Step):
    """Horizontal flip with probability x, vertical flip with probability y."""

    x: float = 0.0
    y: float = 0.0

    kind = 1
    group = "flip"


#: What happens where a window is larger than the image with its margins.
LARGER_IS_AN_ERROR, LARGER_WIDENS_MARGINS, LARGER_ANYWHERE = 0, 1, 2


@dataclass(frozen=True)
class RandomWindow(Step):
    """A random window in whole pixels, which may reach into margins (left, top, right, bottom)."""

    size: tuple[int, int] = (1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    larger: int = LARGER_IS_AN_ERROR

    kind = 2
    group = "crop"


@dataclass(frozen=True)
class CenterWindow(Step):
    """The central window."""

    size: tuple[int, int] = (1, 1)
    larger: int = LARGER_ANYWHERE

    kind = 3
    group = "crop"


@dataclass(frozen=True)
class ResizedWindow(Step):
    """A random window of a share of the area and an aspect ratio, resized."""

    size: tuple[int, int] = (1, 1)
    area: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)

    kind = 4
    group = "crop"


@dataclass(frozen=True)
class FullImage(Step):
    """The full image, resized."""

    size: tuple[int, int] = (1, 1)

    kind = 5
    group = "crop"


@dataclass(frozen=True)
class Color(Step):
    """Brightness, contrast and saturation, as factors."""

    brightness: Pair = _ONE
    contrast: Pair = _ONE
    saturation: Pair = _ONE

    kind = 6
    group = "color"


@dataclass(frozen=True)
class EraseBox(Step):
    """A random box that is erased."""

    p: float = 0.5
    area: Pair = (0.02, 0.33)
    ratio: Pair = (0.3, 3.3)

    kind = 7
    group = "erase"


@dataclass(frozen=True)
class MixPair(Step):
    """MixUp or CutMix with another sample of the batch."""

    p: float = 1.0
    mixup_alpha: float = 1.0
    cutmix_alpha: float = 1.0
    cutmix_share: float = 0.0
    pairs: int = 0

    kind = 8
    group = "mix"


@dataclass(frozen=True)
class ExpandCanvas(Step):
    """A canvas with the same center that holds the image rotated by any of these degrees."""

    degrees: Pair = _ZERO

    kind = 9
    group = "expand"


@dataclass(frozen=True)
class ShortSide(Step):
    """A resize of the shorter side, with the longer side at most ``longest`` (0: no limit).

    Its length is one of ``sides`` (from, to). With (0, 0), the longer side becomes ``longest``.
    """

    sides: tuple[int, int] = (0, 0)
    longest: int = 0

    kind = 10
    group = "crop"


@dataclass(frozen=True)
class ShortestSize(Step):
    """Both sides times a factor that makes the shorter one first, first + stride, ... pixels long.

    The longer one has at most ``longest`` pixels (0: no limit).
    """

    first: int = 1
    stride: int = 1
    count: int = 1
    longest: int = 0

    kind = 12
    group = "crop"


@dataclass(frozen=True)
class ScaleJitter(Step):
    """Both sides times what fits them into a size, and times a random factor."""

    size_within: tuple[int, int] = (1, 1)
    scale: Pair = _ONE

    kind = 13
    group = "crop"


@dataclass(frozen=True)
class Perspective(Step):
    """A perspective whose corners move inward by a random share of half a side."""

    p: float = 0.5
    distortion: float = 0.5

    kind = 11
    group = "perspective"


@dataclass(frozen=True)
class Padded(Step):
    """The image with margins (left, top, right, bottom): the one window that is as large."""

    margins: tuple[int, int, int, int] = (0, 0, 0, 0)

    kind = RandomWindow.kind
    group = "crop"

    def values(self) -> list[float]:
        """Return the numbers of a window without a size of its own."""
        return RandomWindow((0, 0), self.margins).values()


#: The kinds of steps that leave pixels where they are.
VALUES = (Color.kind, EraseBox.kind, MixPair.kind)
#: Those after which images have one size, and those after which they may not.
_FIXED = (RandomWindow.kind, CenterWindow.kind, ResizedWindow.kind, FullImage.kind)
_FREE = (ExpandCanvas.kind, ShortSide.kind, ShortestSize.kind, ScaleJitter.kind)
#: The steps that resize the whole image.
RESIZES = (FullImage, ShortSide, ShortestSize, ScaleJitter)


def ends_alike(steps: Sequence[Values]) -> bool:
    """Return whether images of several sizes have one after these steps."""
    alike = False
    for kind, _, values in steps:
        alike = (kind in _FIXED and values[0] > 0) or (alike and kind not in _FREE)
    return alike


def ends_apart(steps: Sequence[Values]) -> bool:
    """Return whether images of one size may have several after these steps."""
    apart = False
    for kind, _, values in steps:
        apart = (apart and not (kind in _FIXED and values[0] > 0)) or (
            (kind == ShortSide.kind and values[0] != values[1])
            or (kind == ShortestSize.kind and values[2] > 1)
            or (kind == ScaleJitter.kind and values[2] != values[3])
        )
    return apart


def encode(steps: Iterable[Step], seen: dict[str, int] | None = None) -> list[Values]:
    """Return the steps as the compiled module takes them.

    ``seen`` counts the steps of each group across several calls.
    """
    seen = {} if seen is None else seen
    encoded: list[Values] = []
    for step in steps:
        occurrence = seen.get(step.group, 0)
        seen[step.group] = occurrence + 1
        encoded.append((step.kind, occurrence, step.values()))
    return encoded
