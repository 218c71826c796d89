"""Conversion of torchvision's transforms, by their names and attributes; it is never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import compose, policies
from . import program as P
from . import transforms as T
from .arguments import per_channel, size_pair
from .compose import Transform
from .fuse import UNIT, Stage
from .loop import Called, why_called
from .render import Mix
from .steps import FullImage, Padded, ScaleJitter, ShortestSize, ShortSide, Step
from .tree import plain, wrap


def _by_name(options: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return options of types by the names of these."""
    return {getattr(kind, "__name__", kind): value for kind, value in options.items()}


def _of_kind(options: Mapping[Any, Any], *kinds: str) -> Any:
    """Return the option of the first of these types that has one, or that of others."""
    named = _by_name(options)
    return next((named[kind] for kind in (*kinds, "others") if kind in named), None)


def _fill(transform: Any, *kinds: str) -> Any:
    """Return the fill of images, or of other types: a number, or one for each channel."""
    fill = transform.fill
    if isinstance(fill, dict):
        fill = _of_kind(fill, *(kinds or ("Image", "Tensor")))
    return 0 if fill is None else fill


def _filled(made: Transform, transform: Any) -> Stage:
    """Return the stage with the fill of masks: torchvision's is the images' if it is one number."""
    fill = _fill(transform, "Mask")
    return replace(made.stage, mask_fill=float(fill) if isinstance(fill, (int, float)) else None)


def _rotation(t: Any) -> Stage | str:
    if t.expand:
        return "it expands the canvas for the angle that it draws, fusereg for all of a range"
    made = T.RandomRotation(list(t.degrees), t.interpolation, False, t.center, _fill(t), seed=0)
    return _filled(made, t)


def _affine(t: Any) -> Stage:
    shear = None if t.shear is None else list(t.shear)
    made = T.RandomAffine(
        list(t.degrees), t.translate, t.scale, shear, t.interpolation, _fill(t), t.center, seed=0
    )
    return _filled(made, t)


def _perspective(t: Any) -> Stage:
    made = T.RandomPerspective(t.distortion_scale, t.p, t.interpolation, _fill(t), seed=0)
    return _filled(made, t)


def _crop(t: Any) -> Stage:
    padding = t.padding
    is_v2 = type(t).__module__.startswith("torchvision.transforms.v2")
    if isinstance(padding, (list, tuple)) and len(padding) == 4 and is_v2:
        left, right, top, bottom = padding  # v2 keeps them in this order
        padding = [left, top, right, bottom]
    made = T.RandomCrop(list(t.size), padding, t.pad_if_needed, _fill(t), t.padding_mode, seed=0)
    return _filled(made, t)


def _pad(t: Any) -> Stage:
    made = T.RandomCrop(1, t.padding, False, _fill(t), t.padding_mode, seed=0)
    step = Padded(T.margins_of(t.padding, "Pad"))
    return replace(_filled(made, t), name="Pad", steps=(step,), moves=False)


def _resize(t: Any) -> Stage:
    size, longest = t.size, getattr(t, "max_size", None)
    step: Step
    if size is None or isinstance(size, int) or len(size) == 1:
        side = 0 if size is None else size if isinstance(size, int) else size[0]
        if side and longest and longest <= side:
            raise ValueError(f"max_size = {longest} must be greater than the size {side}")
        step = ShortSide((side, side), longest or 0)
    else:
        step = FullImage(size_pair(list(size), "Resize"))
    return T.resize_stage("Resize", step, t.interpolation, t.antialias)


def _random_resize(t: Any) -> Stage:
    step = ShortSide((t.min_size, t.max_size - 1))
    return T.resize_stage("RandomResize", step, t.interpolation, t.antialias)


def _shortest_size(t: Any) -> Stage | str:
    sides = list(t.min_size)
    strides = {b - a for a, b in pairwise(sides)}
    if len(strides) > 1 or min(sides) < 1:
        return "its sizes are not evenly spaced"
    step = ShortestSize(sides[0], min(strides, default=0), len(sides), t.max_size or 0)
    return T.resize_stage("RandomShortestSize", step, t.interpolation, t.antialias)


def _scale_jitter(t: Any) -> Stage:
    height, width = (
        t.target_size[1],
        t.target_size[0],
    )  # torchvision fits the height into the second
    step = ScaleJitter((height, width), (float(t.scale_range[0]), float(t.scale_range[1])))
    return T.resize_stage("ScaleJitter", step, t.interpolation, t.antialias)


def _dtype(t: Any) -> Stage | str:
    """Return the stage of ToDtype: of images, to a floating dtype with 255 as 1."""
    dtype, cast = t.dtype, None
    if isinstance(dtype, dict):
        cast = _Cast(_by_name(dtype))
        dtype = _of_kind(dtype, "Image", "Tensor")
    if dtype is None:
        return Stage("ToDtype", cast=cast)
    if not dtype.is_floating_point or not getattr(t, "scale", True):
        return "it converts values without scaling, or to integers"
    return Stage(type(t).__name__, normal=UNIT, dtype=dtype, cast=cast)


class _Cast:
    """ToDtype's dtypes of targets, by the names of their types."""

    def __init__(self, named: Mapping[Any, torch.dtype | None]) -> None:
        self.named = named

    def __call__(self, value: Any) -> Any:
        """Return a target in its dtype; plain tensors and images stay."""
        if not isinstance(value, Tensor) or type(value) is Tensor:
            return value
        dtype = self.named.get(type(value).__name__, self.named.get("others"))
        if dtype is None or type(value).__name__ in ("Image", "Video"):
            return value
        return wrap(plain(value).to(dtype), value)


def _check_mix(t: Any) -> None:
    """Raise ValueError unless a mix does what its arguments say: none is called."""
    name, own = type(t).__name__, why_called(t)
    if own:
        raise ValueError(f"fusereg.Compose: {name} is not called but read, and {own}")
    if getattr(t._labels_getter, "__name__", "") != "_find_labels_default_heuristic":
        raise ValueError(
            f"fusereg.Compose: {name} must have no labels_getter; Compose(..., labels=) names the "
            "keys of the labels"
        )


def _choice(t: Any) -> Stage | str:
    """Return the stage of a choice of MixUp and CutMix."""
    names = [type(inner).__name__ for inner in t.transforms]
    if sorted(names) != ["CutMix", "MixUp"]:
        return "it is drawn for each sample"
    by_name = dict(zip(names, t.transforms, strict=True))
    share = dict(zip(names, t.p, strict=True))
    mixup, cutmix = by_name["MixUp"], by_name["CutMix"]
    if mixup.num_classes != cutmix.num_classes:
        return "MixUp and CutMix have several numbers of classes"
    mix = Mix(mixup.alpha, cutmix.alpha, switch=share["CutMix"], num_classes=mixup.num_classes)
    return T.mix_stage(mix)


def _sometimes(t: Any, code: int, *arguments: float) -> Stage:
    policy = policies.always(code, *((float(a), float(a)) for a in arguments))
    return Stage(type(t).__name__, policy=policies.maybe(float(t.p), policy))


def _jitter(t: Any) -> Stage:
    ranges = {
        P.BRIGHTNESS: t.brightness,
        P.CONTRAST: t.contrast,
        P.SATURATION: t.saturation,
        P.HUE: t.hue,
    }
    return Stage("ColorJitter", policy=policies.jitter(ranges))


def _gray(t: Any) -> Stage | str:
    if t.num_output_channels != 3:
        return "it changes the number of channels"
    return Stage("Grayscale", policy=policies.always(P.GRAY, (3.0, 3.0)))


def _solarize(t: Any) -> Stage | str:
    if not 0 <= t.threshold <= 255:
        return "its threshold is not within 0 and 255"
    # The second argument: in units of the images, also if they are floats.
    return _sometimes(t, P.SOLARIZE, t.threshold, 1)


def _posterize(t: Any) -> Stage | str:
    if t.bits not in range(9):
        return "its bits are not within 0 and 8"
    return _sometimes(t, P.POSTERIZE, t.bits)


def _blur(t: Any) -> Stage | str:
    x, y = (float(k) for k in t.kernel_size)
    if max(x, y) > 255:
        return "its kernel is larger than 255 pixels"
    sigma = (float(t.sigma[0]), float(t.sigma[-1]))
    policy = policies.always(P.BLUR, (x, x), (y, y), sigma, sigma, last_alike=True)
    return Stage("GaussianBlur", policy=policy)


def _apply(t: Any) -> Stage | str:
    found: list[P.Policy] = []
    for inner in t.transforms:
        known = from_torchvision(inner)
        policy = known.policy if isinstance(known, Stage) else None
        if policy is None or policy.moves or policy.first:
            return ""
        found.append(policy)
    return Stage("RandomApply", policy=policies.maybe(float(t.p), *found))


def _auto(t: Any) -> Stage | str:
    name = type(t).__name__
    how = T.interpolation_of(t.interpolation, name)
    if name == "AutoAugment":
        pairs = getattr(t, "_policies", None) or t.policies
        policy = policies.auto_augment(tuple(tuple(pair) for pair in pairs), how)
    else:
        layers, magnitude = getattr(t, "num_ops", 1), getattr(t, "magnitude", None)
        bins = t.num_magnitude_bins
        if magnitude is not None and not -bins <= magnitude < bins:
            return "its magnitude is not one of its bins"
        policy = policies.bins(layers, magnitude, bins, name != "RandAugment", how)
    return Stage(name, policy=policy, fill=per_channel(_fill(t), name, "fill"), own_units=True)


def _aug_mix(t: Any) -> Stage | str:
    if t.alpha != 1 or not 0 < t.mixture_width <= P.WIDTH - 2:
        return "its alpha is not 1, or it mixes more than 6 chains"
    how = T.interpolation_of(t.interpolation, "AugMix")
    policy = policies.aug_mix(t.severity, t.mixture_width, t.chain_depth, t.all_ops, how)
    shade = per_channel(_fill(t), "AugMix", "fill")
    return Stage("AugMix", policy=policy, fill=shade, own_units=True)


def _floats(values: Any) -> list[float]:
    return [float(v) for v in values]


def _erasing(t: Any) -> Stage:
    value = "random" if t.value is None else t.value
    return T.RandomErasing(t.p, t.scale, t.ratio, value, seed=0).stage


_KNOWN: Mapping[str, Callable[[Any], Stage | str]] = {
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "RandomPerspective": _perspective,
    "RandomCrop": _crop,
    "RandomErasing": _erasing,
    "RandomResizedCrop": lambda t: (
        T.RandomResizedCrop(
            list(t.size), t.scale, t.ratio, t.interpolation, t.antialias, seed=0
        ).stage
    ),
    "RandomHorizontalFlip": lambda t: T.RandomHorizontalFlip(t.p, seed=0).stage,
    "RandomVerticalFlip": lambda t: T.RandomVerticalFlip(t.p, seed=0).stage,
    "CenterCrop": lambda t: (
        T.CenterCrop(list(t.size) if isinstance(t.size, (list, tuple)) else t.size, seed=0).stage
    ),
    "Normalize": lambda t: T.Normalize(_floats(t.mean), _floats(t.std)).stage,
    "MixUp": lambda t: T.MixUp(alpha=t.alpha, num_classes=t.num_classes, seed=0).stage,
    "CutMix": lambda t: T.CutMix(alpha=t.alpha, num_classes=t.num_classes, seed=0).stage,
    "RandomChoice": _choice,
    "RandomApply": _apply,
    "ColorJitter": _jitter,
    "Grayscale": _gray,
    "RandomGrayscale": lambda t: _sometimes(t, P.GRAY),
    "RandomInvert": lambda t: _sometimes(t, P.INVERT),
    "RandomPosterize": _posterize,
    "RandomSolarize": _solarize,
    "RandomAutocontrast": lambda t: _sometimes(t, P.AUTOCONTRAST),
    "RandomEqualize": lambda t: _sometimes(t, P.EQUALIZE),
    "RandomAdjustSharpness": lambda t: _sometimes(t, P.SHARPNESS, t.sharpness_factor),
    "GaussianBlur": _blur,
    "RandAugment": _auto,
    "TrivialAugmentWide": _auto,
    "AutoAugment": _auto,
    "AugMix": _aug_mix,
    "Resize": _resize,
    "RandomResize": _random_resize,
    "RandomShortestSize": _shortest_size,
    "ScaleJitter": _scale_jitter,
    "Pad": _pad,
    "ToDtype": _dtype,
    "ConvertImageDtype": _dtype,
    "Identity": lambda t: Stage("Identity"),
    "ToImage": lambda t: Stage("ToImage", types="image"),
    "ToPureTensor": lambda t: Stage("ToPureTensor", types="pure"),
    "PILToTensor": lambda t: Stage("PILToTensor", types="pure"),
    "ToTensor": lambda t: Stage("ToTensor", normal=UNIT, dtype=torch.float32, types="pure"),
}


#: timm's transforms that have one of its policies.
_OF_TIMM = ("RandAugment", "AutoAugment")


def from_torchvision(transform: object) -> Stage | Called | None:
    """Return the stage of a transform of torchvision, or how it is called; None: not of it."""
    kind = type(transform)
    if kind.__module__.startswith("timm.data") and kind.__name__ == "MaybeToTensor":
        return Stage("MaybeToTensor", normal=UNIT, dtype=torch.float32, types="pure")
    if kind.__module__ == "timm.data.auto_augment" and kind.__name__ in _OF_TIMM:
        known = policies.of_timm(transform)
        if known is None:
            return None
        policy, shade = known
        fill = per_channel(shade, kind.__name__, "fill")
        return Stage(kind.__name__, policy=policy, fill=fill, whole_pixels=True)
    if not kind.__module__.startswith("torchvision.transforms") or not callable(transform):
        return None
    convert = _KNOWN.get(kind.__name__)
    for part in (transform, *getattr(transform, "transforms", ())):
        if type(part).__name__ in ("MixUp", "CutMix"):
            _check_mix(part)
    own = why_called(transform)
    if convert is None or own:
        return Called.of(transform, own)
    if getattr(transform, "inplace", False):
        return Called.of(transform, "it writes into its input")
    try:
        stage = convert(transform)
    except (ValueError, TypeError) as error:
        return Called.of(transform, f"fusereg has no such arguments ({error})")
    return stage if isinstance(stage, Stage) else Called.of(transform, stage)


compose.converters.append(from_torchvision)
