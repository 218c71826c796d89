"""Transforms by torchvision v2's names and arguments, each sample of a batch by itself.

Each works alone and in :class:`fusereg.augment.Compose`. Where torchvision draws one number for a
whole batch, each sample has its own here, keyed by its id; a single image [C, H, W] is a batch of
one. ``compat=`` says whose angles, scales and fills are meant (:mod:`fusereg.augment.conventions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .arguments import (
    INTERPOLATIONS,
    Interval,
    PerChannel,
    Size,
    around,
    flag,
    integer,
    interval,
    numbers,
    one_of,
    per_channel,
    probability,
    size_pair,
)
from .augment import affine_step, erase_look, normalization
from .compose import Transform
from .conventions import Convention, convention
from .fuse import Stage
from .render import Erase, Mix
from .steps import (
    LARGER_IS_AN_ERROR,
    LARGER_WIDENS_MARGINS,
    Affine,
    Centre,
    Flip,
    Resized,
    Room,
    Step,
    Window,
)

__all__ = [
    "CenterCrop",
    "CutMix",
    "MixUp",
    "Normalize",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
]


def _interpolation(value: object, rules: Convention, op: str) -> str:
    """A name, or torchvision's InterpolationMode; None: the convention's."""
    if value is None:
        return rules.interpolation
    return one_of(getattr(value, "value", value), op, "interpolation", list(INTERPOLATIONS))


def _centre(
    center: Sequence[float] | None, rules: Convention, op: str
) -> tuple[float, float] | None:
    if center is None:
        return None
    x, y = numbers(center, op, "center", (2,), "(x, y)")
    # torchvision counts from the image's corner, here pixels' centres are integers.
    return (x - 0.5, y - 0.5) if rules.corner_origin else (x, y)


def _warp_stage(
    name: str,
    step: Step,
    interpolation: object,
    fill: object,
    fill_mode: str | None,
    rules: Convention,
) -> Stage:
    still = isinstance(step, Affine) and step.still
    return Stage(
        name,
        (step,),
        resamples=not still,
        moves=not still,
        fills=not still,
        interpolation=_interpolation(interpolation, rules, name),
        fill_mode=rules.mode(rules.fill_mode if fill_mode is None else fill_mode, name),
        fill=per_channel(0.0 if fill is None else fill, name, "fill"),
    )


class RandomRotation(Transform):
    """Turns each image about its centre.

    Args:
        degrees: a number d is (-d, d); positive is counter-clockwise.
        interpolation: default: the convention's, "nearest" for torchvision.
        expand: makes the images larger, so that every angle of the range fits; all of a batch have
            one size. (torchvision draws one angle for a batch and makes room for that one, by up
            to a pixel more.)
        center: (x, y), from the image's corner for torchvision, else from its first pixel's centre.
        fill: a number, or one for each channel, in the images' units.
        p: the probability that an image is turned.
        fill_mode: default: the convention's.
        compat: whose conventions.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        degrees: Interval,
        interpolation: str | None = None,
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: PerChannel | None = 0,
        *,
        p: float = 1.0,
        fill_mode: str | None = None,
        compat: str = "torchvision",
        seed: int | None = None,
    ) -> None:
        op = "RandomRotation"
        rules = convention(compat, op)
        if flag(expand, op, "expand") and center is not None:
            raise ValueError(
                f"fusereg.{op}: expand turns about the image's centre; leave center away"
            )
        step = Affine(
            p=probability(p, op, "p"),
            degrees=around(degrees, op, "degrees"),
            sign=rules.rotation_sign,
            centre=_centre(center, rules, op),
        )
        stage = _warp_stage(op, step, interpolation, fill, fill_mode, rules)
        if expand:
            stage = replace(stage, steps=(Room(step.degrees), step), fills=True)
        super().__init__(stage, seed)
        self._text = f"degrees={step.degrees}, interpolation={self.stage.interpolation!r}"


class RandomAffine(Transform):
    """Turns, shifts, scales and shears each image about its centre.

    Args:
        degrees: a number d is (-d, d); positive is clockwise for torchvision and kornia.
        translate: the largest shift (x, y) as shares of width and height; in whole pixels for
            torchvision.
        scale: factors (from, to); four of them: x and y by themselves.
        shear: degrees: a number a is x from -a to a; (from, to) of x; or of x and y.
        interpolation: default: the convention's, "nearest" for torchvision.
        fill: a number, or one for each channel, in the images' units.
        center: as for :class:`RandomRotation`.
        p: the probability that an image is changed.
        fill_mode: default: the convention's.
        compat: whose conventions.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        degrees: Interval,
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: Interval | None = None,
        interpolation: str | None = None,
        fill: PerChannel | None = 0,
        center: Sequence[float] | None = None,
        *,
        p: float = 1.0,
        fill_mode: str | None = None,
        compat: str = "torchvision",
        seed: int | None = None,
    ) -> None:
        op = "RandomAffine"
        rules = convention(compat, op)
        centre = _centre(center, rules, op)
        step = affine_step(rules, degrees, scale, translate, shear, op)
        step = replace(step, p=probability(p, op, "p"), centre=centre)
        super().__init__(_warp_stage(op, step, interpolation, fill, fill_mode, rules), seed)
        self._text = (
            f"degrees={step.degrees}, translate={translate}, scale={scale}, shear={shear}, "
            f"interpolation={self.stage.interpolation!r}"
        )


class RandomResizedCrop(Transform):
    """A random window of each image, resized.

    Args:
        size: (height, width); an integer is both.
        scale: the window's share of the area (from, to).
        ratio: its width over its height (from, to); the logarithm is uniform.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: filter as wide as the output pixel is where the window is made smaller.
        seed: default: from torch's generator.

    torchvision crops, then resizes: pixels beyond the window are not seen. Here the resize sees
    them, which differs on the window's edge alone.
    """

    def __init__(
        self,
        size: Size,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        antialias: bool | None = True,
        *,
        seed: int | None = None,
    ) -> None:
        op = "RandomResizedCrop"
        mode = _interpolation(interpolation, convention("torchvision", op), op)
        step = Resized(
            size_pair(size, op),
            interval(scale, op, "scale", low=0.0, high=1.0, open_low=True),
            interval(ratio, op, "ratio", low=0.0, open_low=True),
        )
        stage = Stage(
            op,
            (step,),
            resamples=True,
            moves=True,
            half_pixels=True,
            interpolation=mode,
            antialias=flag(bool(antialias), op, "antialias") and mode != "nearest",
            fill_mode="border",
        )
        super().__init__(stage, seed)
        self._text = f"size={step.size}, scale={step.area}, ratio={step.ratio}"


class RandomHorizontalFlip(Transform):
    """Mirrors each image left to right with probability p."""

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        op = "RandomHorizontalFlip"
        super().__init__(Stage(op, (Flip(x=probability(p, op, "p")),)), seed)
        self._text = f"p={p}"


class RandomVerticalFlip(Transform):
    """Mirrors each image top to bottom with probability p."""

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        op = "RandomVerticalFlip"
        super().__init__(Stage(op, (Flip(y=probability(p, op, "p")),)), seed)
        self._text = f"p={p}"


class RandomCrop(Transform):
    """A window at a random place of each image, which may be padded before.

    Args:
        size: (height, width); an integer is both.
        padding: one number; (x, y); or (left, top, right, bottom).
        pad_if_needed: an image that is smaller than ``size`` gets the difference on both sides.
        fill: for "constant", in the images' units.
        padding_mode: "constant", "edge", "reflect" or "symmetric".
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        size: Size,
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: PerChannel | None = 0,
        padding_mode: str = "constant",
        *,
        seed: int | None = None,
    ) -> None:
        op = "RandomCrop"
        step = Window(
            size_pair(size, op),
            _margins(padding, op),
            LARGER_WIDENS_MARGINS
            if flag(pad_if_needed, op, "pad_if_needed")
            else LARGER_IS_AN_ERROR,
        )
        stage = Stage(
            op,
            (step,),
            moves=True,
            fills=any(step.margins),
            may_fill=pad_if_needed,
            fill_mode=convention("torchvision", op).mode(padding_mode, op, "padding_mode"),
            fill=per_channel(0.0 if fill is None else fill, op, "fill"),
        )
        super().__init__(stage, seed)
        self._text = f"size={step.size}, padding={padding}"


def _margins(padding: object, op: str) -> tuple[int, int, int, int]:
    if padding is None:
        return 0, 0, 0, 0
    sides = padding if isinstance(padding, Sequence) and not isinstance(padding, str) else [padding]
    values = [integer(v, op, "padding") for v in sides]
    if len(values) not in (1, 2, 4) or min(values) < 0:
        raise ValueError(
            f"fusereg.{op}: padding must be 1, 2 or 4 numbers that are not negative, got {padding}"
        )
    if len(values) == 4:
        return values[0], values[1], values[2], values[3]
    x, y = values[0], values[-1]
    return x, y, x, y


class CenterCrop(Transform):
    """The window in the middle; an image that is smaller is surrounded by zeros."""

    def __init__(self, size: Size, *, seed: int | None = None) -> None:
        op = "CenterCrop"
        step = Centre(size_pair(size, op))
        super().__init__(Stage(op, (step,), moves=True, may_fill=True), seed)
        self._text = f"size={step.size}"


class Normalize(Transform):
    """(v - mean) / std of each channel, for v in [0, 1]: uint8 images are divided by 255 first.

    Args:
        mean: a number, or one for each channel.
        std: likewise, positive.
        inplace: must be False; ``out=`` of the call takes its place.
        seed: nothing is drawn.
    """

    def __init__(
        self, mean: PerChannel, std: PerChannel, inplace: bool = False, *, seed: int | None = 0
    ) -> None:
        op = "Normalize"
        _not_inplace(inplace, op)
        super().__init__(Stage(op, **normalization(mean, std, op)), seed)
        self._text = f"mean={mean}, std={std}"


class RandomErasing(Transform):
    """Overwrites a random box of each image (Zhong et al. 2017).

    Args:
        p: the probability that an image has one.
        scale: the box's share of the area (from, to).
        ratio: its height over its width (from, to).
        value: a number, one for each channel, or "random" for standard normal noise; in units of
            what comes in (normalized values after Normalize).
        inplace: must be False; ``out=`` of the call takes its place.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | Sequence[float] | str = 0.0,
        inplace: bool = False,
        *,
        seed: int | None = None,
    ) -> None:
        op = "RandomErasing"
        _not_inplace(inplace, op)
        erase = Erase(p, scale, ratio, value)
        super().__init__(Stage(op, (erase.step(),), erases=True, **erase_look(erase)), seed)
        self._text = f"p={p}, scale={scale}, ratio={ratio}, value={value}"


class MixUp(Transform):
    """MixUp of each sample with another of the batch (Zhang et al. 2017).

    ``MixUp(num_classes=10)(images, labels)`` gives (images, probabilities [N, 10]). Each sample has
    a weight of its own from Beta(alpha, alpha), where torchvision has one for the batch.

    Args:
        alpha: of the Beta distribution.
        num_classes: for class indices; without it they come back as
            :class:`fusereg.augment.MixedLabels`.
        seed: default: from torch's generator.
    """

    def __init__(
        self, *, alpha: float = 1.0, num_classes: int | None = None, seed: int | None = None
    ) -> None:
        mix = Mix(mixup=alpha, num_classes=num_classes)
        super().__init__(Stage("MixUp", (mix.step(),), mixes=True, num_classes=num_classes), seed)
        self._text = f"alpha={alpha}, num_classes={num_classes}"


class CutMix(Transform):
    """A box of each sample is that of another of the batch (Yun et al. 2019).

    Args:
        alpha: the box's share of the area is 1 - Beta(alpha, alpha), before it is cut off at edges.
        num_classes: as for :class:`MixUp`.
        seed: default: from torch's generator.
    """

    def __init__(
        self, *, alpha: float = 1.0, num_classes: int | None = None, seed: int | None = None
    ) -> None:
        mix = Mix(cutmix=alpha, num_classes=num_classes)
        super().__init__(Stage("CutMix", (mix.step(),), mixes=True, num_classes=num_classes), seed)
        self._text = f"alpha={alpha}, num_classes={num_classes}"


def _not_inplace(inplace: object, op: str) -> None:
    if flag(inplace, op, "inplace"):
        raise ValueError(
            f"fusereg.{op}: inplace must be False; give out= to the call to choose where the "
            "result goes"
        )
