"""Transforms with the names and arguments of torchvision v2.

Each works alone and in :class:`fusereg.augment.Compose`. Where torchvision draws one number for a
whole batch, each sample has its own here, keyed by its id; a single image [C, H, W] is a batch of
one. ``compat=`` names the library whose conventions for angles, scales and fills are used
(:mod:`fusereg.augment.conventions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import policies
from . import program as P
from .arguments import (
    INTERPOLATIONS,
    Interpolation,
    Interval,
    PerChannel,
    Size,
    around,
    factors,
    flag,
    integer,
    interpolation_name,
    interval,
    is_sequence,
    normalization,
    numbers,
    per_channel,
    probability,
    size_pair,
)
from .augment import affine_step
from .compose import Transform
from .conventions import Convention, convention
from .fuse import Stage
from .render import Erase, Mix
from .steps import (
    LARGER_IS_AN_ERROR,
    LARGER_WIDENS_MARGINS,
    Affine,
    CenterWindow,
    ExpandCanvas,
    Flip,
    Perspective,
    RandomWindow,
    ResizedWindow,
    Step,
)

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "CutMix",
    "MixUp",
    "Normalize",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomPerspective",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "TimmAugment",
    "TrivialAugmentWide",
]


def _interpolation(value: object, rules: Convention, op: str) -> str:
    """Return the name of an interpolation, or of torchvision's InterpolationMode.

    None stands for the convention's.
    """
    if value is None:
        return rules.interpolation
    return interpolation_name(value, op)


def _resampling(value: object, op: str) -> tuple[str, bool]:
    """Return the interpolation of a resize, and whether it is by the corners of pixels."""
    name = interpolation_name(value, op, corners=True)
    return ("nearest" if name == "nearest-exact" else name), name == "nearest"


def interpolation_of(value: object, op: str) -> int:
    """Return the kernels' number of an interpolation of torchvision."""
    return INTERPOLATIONS[interpolation_name(value, op)]


def _fill(value: object, op: str) -> tuple[float, ...]:
    """Return a fill: one number, or one for each channel."""
    return per_channel(0.0 if value is None else value, op, "fill")


def _center(
    center: Sequence[float] | None, rules: Convention, op: str
) -> tuple[float, float] | None:
    """Return a center in coordinates whose integers are the centers of pixels."""
    if center is None:
        return None
    x, y = numbers(center, op, "center", (2,), "(x, y)")
    return (x - 0.5, y - 0.5) if rules.corner_origin else (x, y)


def _warp_stage(
    name: str, steps: tuple[Step, ...], moves: bool, interpolation: str, fill: object, mode: str
) -> Stage:
    """Return the stage of a rotation, an affine map or a perspective."""
    return Stage(
        name,
        steps,
        resamples=moves,
        moves=moves,
        fills=moves or len(steps) > 1,
        interpolation=interpolation,
        fill_mode=mode,
        fill=_fill(fill, name),
    )


def _affine_stage(
    name: str,
    step: Affine,
    interpolation: object,
    fill: object,
    fill_mode: str | None,
    rules: Convention,
    *before: Step,
) -> Stage:
    """Return the stage of a rotation or an affine map by a library's conventions."""
    mode = rules.mode(rules.fill_mode if fill_mode is None else fill_mode, name)
    how = _interpolation(interpolation, rules, name)
    return _warp_stage(name, (*before, step), not step.is_identity, how, fill, mode)


class RandomRotation(Transform):
    """Rotation of each image about its center.

    Args:
        degrees: a number d is (-d, d); positive is counter-clockwise.
        interpolation: default: the convention's, "nearest" for torchvision.
        expand: enlarges the images so that every angle of the range fits; all of a batch have one
            size. (torchvision draws one angle for a batch and expands for that one, by up to a
            pixel more.)
        center: (x, y), from the image's corner for torchvision, else from its first pixel's center.
        fill: a number, or one for each channel, in the images' units.
        p: the probability that an image is rotated.
        fill_mode: default: the convention's.
        compat: the library whose conventions are used.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        degrees: Interval,
        interpolation: Interpolation | None = None,
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
                f"fusereg.{op}: expand turns about the image's center; leave center away"
            )
        step = Affine(
            p=probability(p, op, "p"),
            degrees=around(degrees, op, "degrees"),
            sign=rules.rotation_sign,
            center=_center(center, rules, op),
        )
        room = [ExpandCanvas(step.degrees)] if expand else []
        stage = _affine_stage(op, step, interpolation, fill, fill_mode, rules, *room)
        super().__init__(stage, seed, degrees=step.degrees, interpolation=stage.interpolation)


class RandomAffine(Transform):
    """Rotation, translation, scale and shear of each image about its center.

    Args:
        degrees: a number d is (-d, d); positive is clockwise for torchvision and kornia.
        translate: the largest shift (x, y) as fractions of width and height; in whole pixels for
            torchvision.
        scale: factors (from, to); four of them: x and y separately.
        shear: degrees: a number a is x from -a to a; (from, to) of x; or of x and y.
        interpolation: default: the convention's, "nearest" for torchvision.
        fill: a number, or one for each channel, in the images' units.
        center: as for :class:`RandomRotation`.
        p: the probability that an image is changed.
        fill_mode: default: the convention's.
        compat: the library whose conventions are used.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        degrees: Interval,
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: Interval | None = None,
        interpolation: Interpolation | None = None,
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
        step = affine_step(rules, degrees, scale, translate, shear, op)
        step = replace(step, p=probability(p, op, "p"), center=_center(center, rules, op))
        super().__init__(
            _affine_stage(op, step, interpolation, fill, fill_mode, rules),
            seed,
            degrees=step.degrees,
            translate=translate,
            scale=scale,
            shear=shear,
        )


class RandomPerspective(Transform):
    """A perspective of each image: its corners move inward, each by a random distance.

    Args:
        distortion_scale: the most by which a corner moves, as a share of half a side.
        p: the probability that an image is changed.
        interpolation: "nearest", "bilinear" or "bicubic".
        fill: a number, or one for each channel, in the images' units.
        fill_mode: how pixels outside the image are filled, as for :class:`Augment`.
        seed: default: from torch's generator.

    An image of whose corners three come to lie on a line stays as it is.
    """

    def __init__(
        self,
        distortion_scale: float = 0.5,
        p: float = 0.5,
        interpolation: Interpolation = "bilinear",
        fill: PerChannel | None = 0,
        *,
        fill_mode: str = "constant",
        seed: int | None = None,
    ) -> None:
        op = "RandomPerspective"
        share = probability(distortion_scale, op, "distortion_scale")
        step = Perspective(probability(p, op, "p"), share)
        how = interpolation_name(interpolation, op)
        mode = convention("torchvision", op).mode(fill_mode, op)
        stage = _warp_stage(op, (step,), step.p > 0, how, fill, mode)
        super().__init__(stage, seed, distortion_scale=share, p=p, interpolation=how)


class RandomResizedCrop(Transform):
    """A random window of each image, resized.

    Args:
        size: (height, width); an integer is both.
        scale: the window's share of the area (from, to).
        ratio: its width over its height (from, to); the logarithm is uniform.
        interpolation: "nearest", "nearest-exact", "bilinear" or "bicubic"; "nearest" takes the
            pixel at the output pixel's corner, as torchvision does, "nearest-exact" that at its
            center.
        antialias: filter as wide as the output pixel where the window is made smaller.
        seed: default: from torch's generator.

    As in torchvision, the window is cropped and then resized: no pixel outside it is read.
    (``Compose(..., merge=True)`` reads those around it where it joins other geometry.)
    """

    def __init__(
        self,
        size: Size,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
        antialias: bool | None = True,
        *,
        seed: int | None = None,
    ) -> None:
        op = "RandomResizedCrop"
        step = ResizedWindow(
            size_pair(size, op),
            interval(scale, op, "scale", low=0.0, high=1.0, open_low=True),
            interval(ratio, op, "ratio", low=0.0, open_low=True),
        )
        stage = resize_stage(op, step, interpolation, antialias)
        stage = replace(stage, moves=True, half_pixels=True)
        super().__init__(stage, seed, size=step.size, scale=step.area, ratio=step.ratio)


class RandomHorizontalFlip(Transform):
    """Horizontal flip of each image with probability p."""

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        step = Flip(x=probability(p, "RandomHorizontalFlip", "p"))
        super().__init__(Stage("RandomHorizontalFlip", (step,)), seed, p=p)


class RandomVerticalFlip(Transform):
    """Vertical flip of each image with probability p."""

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        step = Flip(y=probability(p, "RandomVerticalFlip", "p"))
        super().__init__(Stage("RandomVerticalFlip", (step,)), seed, p=p)


class RandomCrop(Transform):
    """A window at a random place of each image, which may be padded first.

    Args:
        size: (height, width); an integer is both.
        padding: one number; (x, y); or (left, top, right, bottom).
        pad_if_needed: an image smaller than ``size`` is padded by the difference on both sides.
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
        widens = flag(pad_if_needed, op, "pad_if_needed")
        step = RandomWindow(
            size_pair(size, op),
            margins_of(padding, op),
            LARGER_WIDENS_MARGINS if widens else LARGER_IS_AN_ERROR,
        )
        stage = Stage(
            op,
            (step,),
            moves=True,
            fills=any(step.margins),
            may_fill=widens,
            fill_mode=convention("torchvision", op).mode(padding_mode, op, "padding_mode"),
            fill=_fill(fill, op),
        )
        super().__init__(stage, seed, size=step.size, padding=padding)


def margins_of(padding: object, op: str) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a padding."""
    if padding is None:
        return 0, 0, 0, 0
    sides = padding if is_sequence(padding) else [padding]
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
    """The central window; a smaller image is padded with zeros."""

    def __init__(self, size: Size, *, seed: int | None = None) -> None:
        step = CenterWindow(size_pair(size, "CenterCrop"))
        stage = Stage("CenterCrop", (step,), moves=True, may_fill=True)
        super().__init__(stage, seed, size=step.size)


class Normalize(Transform):
    """Normalization (v - mean) / std of each channel, for v in [0, 1]; uint8 is divided by 255.

    Args:
        mean: a number, or one for each channel.
        std: likewise, positive.
        inplace: must be False; use ``out=`` of the call instead.
        seed: not used; nothing is drawn.
    """

    def __init__(
        self, mean: PerChannel, std: PerChannel, inplace: bool = False, *, seed: int | None = 0
    ) -> None:
        op = "Normalize"
        _not_inplace(inplace, op)
        for name, value in (("mean", mean), ("std", std)):
            per_channel(value, op, name)  # which refuses None
        stage = Stage(op, normal=normalization(mean, std, op))
        super().__init__(stage, seed, mean=mean, std=std)


class RandomErasing(Transform):
    """Erasing of a random box of each image (Zhong et al. 2017).

    Args:
        p: the probability that a box of an image is erased.
        scale: the box's share of the area (from, to).
        ratio: its height over its width (from, to).
        value: a number, one for each channel, or "random" for standard normal noise; in units of
            the input (normalized values after Normalize).
        inplace: must be False; use ``out=`` of the call instead.
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
        fill, noise = erase.fill()
        stage = Stage(op, (erase.step(),), erases=True, erase=fill, erase_noise=noise)
        super().__init__(stage, seed, p=p, scale=scale, ratio=ratio, value=value)


class MixUp(Transform):
    """MixUp of each sample with another of the batch (Zhang et al. 2018).

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
        super().__init__(mix_stage(mix), seed, alpha=alpha, num_classes=num_classes)


class CutMix(Transform):
    """CutMix: a box of each sample is replaced by that of another of the batch (Yun et al. 2019).

    Args:
        alpha: the box's share of the area is 1 - Beta(alpha, alpha), before it is clipped to the
            image.
        num_classes: as for :class:`MixUp`.
        seed: default: from torch's generator.
    """

    def __init__(
        self, *, alpha: float = 1.0, num_classes: int | None = None, seed: int | None = None
    ) -> None:
        mix = Mix(cutmix=alpha, num_classes=num_classes)
        super().__init__(mix_stage(mix), seed, alpha=alpha, num_classes=num_classes)


def mixing(mix: Mix) -> Transform:
    """Return the transform of MixUp and CutMix with one drawn for each sample."""
    return Transform(mix_stage(mix), 0)


def mix_stage(mix: Mix) -> Stage:
    """Return the stage of MixUp, CutMix, or one of the two."""
    name = "MixUp" if mix.cutmix == 0 else "CutMix" if mix.mixup == 0 else "MixUp or CutMix"
    return Stage(
        name,
        (mix.step(),),
        mixes=True,
        num_classes=mix.num_classes,
        label_smoothing=mix.label_smoothing,
    )


def resize_stage(name: str, step: Step, interpolation: object, antialias: bool | None) -> Stage:
    """Return the stage of a resize of the whole image."""
    mode, floors = _resampling(interpolation, name)
    filters = bool(antialias) and mode != "nearest"
    return Stage(
        name,
        (step,),
        resamples=True,
        half_pixels=not filters,  # a filter gives no weight to what is outside the image
        interpolation=mode,
        antialias=filters,
        floors=floors,
        fill_mode="border",
    )


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue of each image, in an order that it draws.

    Contrast is about the mean of the image's own gray. Images of uint8 are whole numbers after each
    operation, bit for bit those of torchvision's functions of tensors. Others, in [0, 1], go
    through torch's functions one by one, which is slower.

    Args:
        brightness: a factor; v is from max(0, 1 - v) to 1 + v, or (from, to).
        contrast: likewise.
        saturation: likewise.
        hue: in turns of the color circle: v is from -v to v, or (from, to), within 1/2.
        p: the probability that an image is changed.
        seed: default: from torch's generator.

    Images have 1 or 3 channels.
    """

    def __init__(
        self,
        brightness: Interval | None = None,
        contrast: Interval | None = None,
        saturation: Interval | None = None,
        hue: Interval | None = None,
        *,
        p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        op = "ColorJitter"
        ranges = {
            P.BRIGHTNESS: None if brightness is None else factors(brightness, op, "brightness"),
            P.CONTRAST: None if contrast is None else factors(contrast, op, "contrast"),
            P.SATURATION: None if saturation is None else factors(saturation, op, "saturation"),
            P.HUE: None if hue is None else around(hue, op, "hue", 0.5),
        }
        policy = policies.jitter(ranges)
        if probability(p, op, "p") < 1:
            policy = policies.maybe(float(p), policy)
        super().__init__(
            Stage(op, policy=policy),
            seed,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            p=p,
        )


class RandAugment(Transform):
    """RandAugment (Cubuk et al. 2020) as torchvision has it, each image by its own draws.

    Args:
        num_ops: operations of an image, one after the other.
        magnitude: of each, a bin.
        num_magnitude_bins: from no change to the largest.
        interpolation: "nearest", "bilinear" or "bicubic".
        fill: of pixels outside the image, from 0 to 255; one number for each channel.
        seed: default: from torch's generator.

    Images have 1 or 3 channels; uint8 stays so after each operation (:class:`ColorJitter`).
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation = "nearest",
        fill: PerChannel | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        op = "RandAugment"
        layers, at = integer(num_ops, op, "num_ops"), integer(magnitude, op, "magnitude")
        bins = integer(num_magnitude_bins, op, "num_magnitude_bins")
        if layers < 0 or bins < 2 or not 0 <= at < bins:
            raise ValueError(
                f"fusereg.{op}: num_ops must not be negative and magnitude one of at least 2 bins "
                f"from 0, got {layers}, {at} and {bins}"
            )
        policy = policies.bins(layers, at, bins, False, interpolation_of(interpolation, op))
        stage = Stage(op, policy=policy, fill=_fill(fill, op))
        super().__init__(
            stage, seed, num_ops=num_ops, magnitude=magnitude, interpolation=interpolation
        )


class TrivialAugmentWide(Transform):
    """TrivialAugment (Mueller, Hutter 2021), wide, as torchvision has it, drawn for each image.

    Args:
        num_magnitude_bins: of which each image draws one.
        interpolation: as for :class:`RandAugment`.
        fill: as for :class:`RandAugment`.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: Interpolation = "nearest",
        fill: PerChannel | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        op = "TrivialAugmentWide"
        bins = integer(num_magnitude_bins, op, "num_magnitude_bins")
        if bins < 2:
            raise ValueError(f"fusereg.{op}: num_magnitude_bins must be at least 2, got {bins}")
        policy = policies.bins(1, None, bins, True, interpolation_of(interpolation, op))
        stage = Stage(op, policy=policy, fill=_fill(fill, op))
        super().__init__(stage, seed, num_magnitude_bins=bins, interpolation=interpolation)


class TimmAugment(Transform):
    """RandAugment or AutoAugment as timm's strings name them, each image by its own draws.

    Pixels are moved as PIL moves them, on which timm's policies run: bicubic has a = -1, values are
    rounded toward zero, and a pixel is of the image, its edge repeated, or filled. Colors are those
    of torchvision's functions of uint8, which differ from PIL's by one level an operation.
    Posterizing keeps one bit at least, where timm's stops in an error of PIL.

    Args:
        config: such as "rand-m9-mstd0.5-inc1"; "original", "originalr", "v0" or "v0r", also with
            "-mstd0.5". A section that is not understood is an error.
        interpolation: "random": bilinear or bicubic, drawn for each operation; or one of them.
        fill: of pixels outside the image, from 0 to 255; one number for each channel.
        seed: default: from torch's generator.
    """

    def __init__(
        self,
        config: str,
        interpolation: Interpolation = "random",
        fill: PerChannel = 128,
        *,
        seed: int | None = None,
    ) -> None:
        op = "TimmAugment"
        if not isinstance(config, str):
            raise TypeError(f"fusereg.{op}: config must be a string, got {type(config).__name__}")
        hows = (1, 2) if interpolation == "random" else (interpolation_of(interpolation, op),)
        by_pil = tuple(P.PIL_BICUBIC if h == INTERPOLATIONS["bicubic"] else h for h in hows)
        policy = policies.timm_policy(config, by_pil, op)
        shade = per_channel(fill, op, "fill")
        stage = Stage(op, policy=policy, fill=shade, whole_pixels=True)
        super().__init__(stage, seed, config=config, interpolation=interpolation)


def _not_inplace(inplace: object, op: str) -> None:
    if flag(inplace, op, "inplace"):
        raise ValueError(
            f"fusereg.{op}: inplace must be False; give out= to the call to choose where the "
            "result goes"
        )
