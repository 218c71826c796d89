"""The steps that a sample goes through, as csrc/augment/augment_params.h has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

#: (kind, which of the steps that draw the same things it is, values)
Encoded: TypeAlias = tuple[int, int, list[float]]
Pair: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """Base of the steps. Steps of one ``group`` draw the same numbers: the n-th of them is told
    apart by its occurrence."""

    kind: ClassVar[int]
    group: ClassVar[str]

    def values(self) -> list[float]:
        """The numbers in the order of the header."""
        raise NotImplementedError


@dataclass(frozen=True)
class Affine(Step):
    """Rotation, scale, shear and translation about a centre."""

    p: float = 1.0
    degrees: Pair = (0.0, 0.0)
    sign: float = 1.0
    scale_x: Pair = (1.0, 1.0)
    scale_y: Pair | None = None
    zooms_out: bool = False
    translate_x: Pair = (0.0, 0.0)
    translate_y: Pair = (0.0, 0.0)
    whole_pixels: bool = False
    shear_x: Pair = (0.0, 0.0)
    shear_y: Pair = (0.0, 0.0)
    centre: Pair | None = None

    kind = 0
    group = "affine"

    def values(self) -> list[float]:
        scale_y = self.scale_x if self.scale_y is None else self.scale_y
        centre = (0.0, 0.0) if self.centre is None else self.centre
        return [
            self.p,
            *self.degrees,
            self.sign,
            *self.scale_x,
            *scale_y,
            float(self.scale_y is None),
            float(self.zooms_out),
            *self.translate_x,
            *self.translate_y,
            float(self.whole_pixels),
            *self.shear_x,
            *self.shear_y,
            float(self.centre is not None),
            *centre,
        ]

    @property
    def still(self) -> bool:
        """Whether it never moves a pixel."""
        zero, one = (0.0, 0.0), (1.0, 1.0)
        return self.p == 0.0 or (
            self.degrees == self.translate_x == self.translate_y == zero
            and self.shear_x == self.shear_y == zero
            and self.scale_x == one
            and self.scale_y in (None, one)
        )


@dataclass(frozen=True)
class Flip(Step):
    """Mirroring left to right with probability x, top to bottom with probability y."""

    x: float = 0.0
    y: float = 0.0

    kind = 1
    group = "flip"

    def values(self) -> list[float]:
        return [self.x, self.y]


#: What is done where a window is larger than the image with its margins.
LARGER_IS_AN_ERROR, LARGER_WIDENS_MARGINS, LARGER_ANYWHERE = 0, 1, 2


@dataclass(frozen=True)
class Window(Step):
    """A random window in whole pixels; margins (left, top, right, bottom) may be seen."""

    size: tuple[int, int] = (1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    larger: int = LARGER_IS_AN_ERROR

    kind = 2
    group = "crop"

    def values(self) -> list[float]:
        return [float(v) for v in (*self.size, *self.margins, self.larger)]


@dataclass(frozen=True)
class Centre(Step):
    """The window in the middle."""

    size: tuple[int, int] = (1, 1)
    larger: int = LARGER_ANYWHERE

    kind = 3
    group = "crop"

    def values(self) -> list[float]:
        return [float(v) for v in (*self.size, self.larger)]


@dataclass(frozen=True)
class Resized(Step):
    """A random window of a share of the area and an aspect ratio, resized."""

    size: tuple[int, int] = (1, 1)
    area: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)

    kind = 4
    group = "crop"

    def values(self) -> list[float]:
        return [*(float(v) for v in self.size), *self.area, *self.ratio]


@dataclass(frozen=True)
class Whole(Step):
    """The whole image, resized."""

    size: tuple[int, int] = (1, 1)

    kind = 5
    group = "crop"

    def values(self) -> list[float]:
        return [float(v) for v in self.size]


@dataclass(frozen=True)
class Colour(Step):
    """Brightness, contrast and saturation, as factors."""

    brightness: Pair = (1.0, 1.0)
    contrast: Pair = (1.0, 1.0)
    saturation: Pair = (1.0, 1.0)

    kind = 6
    group = "colour"

    def values(self) -> list[float]:
        return [*self.brightness, *self.contrast, *self.saturation]


@dataclass(frozen=True)
class EraseBox(Step):
    """A random box that is erased."""

    p: float = 0.5
    area: Pair = (0.02, 0.33)
    ratio: Pair = (0.3, 3.3)

    kind = 7
    group = "erase"

    def values(self) -> list[float]:
        return [self.p, *self.area, *self.ratio]


@dataclass(frozen=True)
class MixPair(Step):
    """MixUp or CutMix with another sample of the batch."""

    p: float = 1.0
    mixup_alpha: float = 1.0
    cutmix_alpha: float = 1.0
    cutmix_share: float = 0.0

    kind = 8
    group = "mix"

    def values(self) -> list[float]:
        return [self.p, self.mixup_alpha, self.cutmix_alpha, self.cutmix_share]


@dataclass(frozen=True)
class Room(Step):
    """A canvas about the same centre that holds the present one, turned by any of these degrees."""

    degrees: Pair = (0.0, 0.0)

    kind = 9
    group = "room"

    def values(self) -> list[float]:
        return [*self.degrees]


def encode(steps: Iterable[Step], seen: dict[str, int] | None = None) -> list[Encoded]:
    """The steps for the compiled module. ``seen`` counts each group over several lists."""
    seen = {} if seen is None else seen
    encoded = []
    for step in steps:
        occurrence = seen.get(step.group, 0)
        seen[step.group] = occurrence + 1
        encoded.append((step.kind, occurrence, step.values()))
    return encoded
