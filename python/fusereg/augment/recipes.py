"""Recipes by name: what torchvision, timm and others train with, as one :class:`Compose`.

Each has the order of its own library. What is returned takes uint8 batches [N, C, H, W] on either
device, single images, and in ``collate`` samples of several sizes, and draws for each sample:

>>> train = fusereg.augment.recipes.torchvision_classification(224, policy="ta_wide", erase=0.1)
>>> loader = DataLoader(WithIds(dataset), 64, collate_fn=train.collate, num_workers=4)
>>> evaluate = fusereg.augment.recipes.torchvision_classification(224, train=False)

``train.eval()`` is the recipe of evaluation as well, with the same arguments, until ``train()``.
``print(train.plan())`` shows the passes. A policy of automatic augmentation may be a name, a
transform or a function; it runs in a pass of its own, sample by sample where there is no kernel.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ..core.hints import explains
from .arguments import (
    Interpolation,
    PerChannel,
    Size,
    flag,
    for_channels,
    integer,
    interpolation_name,
    interval,
    one_of,
    per_channel,
    probability,
    size_pair,
    within,
)
from .compose import Compose, Transform
from .render import PAIRS, Mix
from .rules import RULES
from .steps import FullImage, ShortSide, Step
from .transforms import (
    CenterCrop,
    Normalize,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    TimmAugment,
    TrivialAugmentWide,
    mixing,
    resize_stage,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "detection",
    "segmentation",
    "simclr",
    "timm_imagenet",
    "torchvision_classification",
]

#: Of ImageNet's images in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: A name ("ra", "ta_wide", "rand-m9-mstd0.5-inc1"), a transform or a function; None for none.
Policy: TypeAlias = str | Callable[..., Any] | None


@explains("fusereg.recipes.torchvision_classification", more=RULES)
def torchvision_classification(
    size: Size = 224,
    *,
    train: bool = True,
    policy: Policy = None,
    erase: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    num_classes: int | None = None,
    resize: int | None = None,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: Interpolation = "bilinear",
    magnitude: int = 9,
    mean: PerChannel = IMAGENET_MEAN,
    std: PerChannel = IMAGENET_STD,
    seed: int | None = None,
    **rules: Any,
) -> Compose:
    """Return torchvision's recipe for classification.

    In training: RandomResizedCrop, flip, ``policy``, normalization, RandomErasing, then MixUp or
    CutMix: one of the two for each sample where both are on (torchvision draws one for a batch).
    In evaluation: the shorter side becomes ``resize`` pixels, the center is cropped.

    Args:
        size: of the result; torchvision's newer recipes train with 176 and evaluate with 224.
        train: the recipe of training, or that of evaluation.
        policy: "ra", "ta_wide", "imagenet", "augmix", one of timm's names, or a transform.
        erase: RandomErasing's probability.
        mixup: MixUp's alpha, 0 for none; torchvision's is 0.2.
        cutmix: CutMix's alpha, 0 for none; torchvision's is 1.
        num_classes: of labels that are mixed.
        resize: the shorter side before the central crop; default: size / 0.875, which is 256 for
            224. (232 in the newer recipes.)
        scale: the cropped share of the area.
        ratio: width over height of the crop.
        hflip: the probability of a horizontal flip.
        interpolation: "bilinear" or "bicubic", antialiased.
        magnitude: of "ra".
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        seed: as for :class:`Compose`.
        rules: how targets move, as for :class:`Compose`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.

    Source: torchvision, references/classification/presets.py and transforms.py; "How to train
    state-of-the-art models using TorchVision's latest primitives" (2021).
    """
    op = "recipes.torchvision_classification"
    normal = Normalize(mean, std)
    after = _evaluation(size, resize, 0.875, interpolation, normal, op)
    if not flag(train, op, "train"):
        return Compose(after, seed=seed, **rules)
    chain: list[Any] = [
        RandomResizedCrop(size, scale, ratio, interpolation, seed=0),
        RandomHorizontalFlip(hflip, seed=0),
        *_policy(policy, magnitude, interpolation, mean),
        normal,
        *([RandomErasing(erase, seed=0)] if erase else []),
        *_mixing(mixup, cutmix, num_classes),
    ]
    return Compose(chain, evaluation=after, seed=seed, **rules)


@explains("fusereg.recipes.timm_imagenet", more=RULES)
def timm_imagenet(
    policy: Policy = "rand-m9-mstd0.5-inc1",
    size: Size = 224,
    *,
    train: bool = True,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_prob: float = 1.0,
    mix_switch: float = 0.5,
    mix_mode: str = "batch",
    label_smoothing: float = 0.1,
    num_classes: int = 1000,
    reprob: float = 0.0,
    remode: str = "const",
    recount: int = 1,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    interpolation: Interpolation = "bicubic",
    crop_pct: float = 0.875,
    mean: PerChannel = IMAGENET_MEAN,
    std: PerChannel = IMAGENET_STD,
    seed: int | None = None,
    **rules: Any,
) -> Compose:
    """Return timm's recipe for ImageNet.

    In training: RandomResizedCrop, flips, ``policy``, MixUp or CutMix of the bytes, normalization,
    then erasing, as in its loader. In evaluation: the shorter side becomes size / crop_pct
    pixels, rounded down, and the center is cropped.

    Args:
        policy: a name that timm reads, such as "rand-m9-mstd0.5-inc1" or "augmix-m3-w3", one of
            torchvision's ("ra", "ta_wide"), or a transform; None for none.
        size: of the result.
        train: the recipe of training, or that of evaluation.
        mixup: MixUp's alpha, 0 for none.
        cutmix: CutMix's alpha, 0 for none.
        mix_prob: the probability that a sample is mixed.
        mix_switch: the probability of CutMix where both are on.
        mix_mode: "batch" (one draw for all), "pair", "elem" or "ids", as for :class:`Mix`.
        label_smoothing: of the labels, where samples are mixed.
        num_classes: of labels.
        reprob: the probability that boxes of an image are erased.
        remode: "const" (zeros after normalization), "rand" (a color for each box), "pixel" (noise).
            Where it is "rand", or ``recount`` above 1, timm's RandomErasing is called.
        recount: the most boxes of an image.
        scale: the cropped share of the area.
        ratio: width over height of the crop.
        hflip: the probability of a horizontal flip.
        vflip: the probability of a vertical flip.
        interpolation: "bicubic" or "bilinear", antialiased. (In training, timm draws one of the two
            for each image.)
        crop_pct: of evaluation: the share of the side that is cropped.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        seed: as for :class:`Compose`.
        rules: how targets move, as for :class:`Compose`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.

    Source: timm, data/transforms_factory.py, auto_augment.py, random_erasing.py and mixup.py.
    """
    op = "recipes.timm_imagenet"
    normal = Normalize(mean, std)
    after = _evaluation(size, None, crop_pct, interpolation, normal, op)
    remode = one_of(remode, op, "remode", ("const", "rand", "pixel"))
    reprob, recount = probability(reprob, op, "reprob"), integer(recount, op, "recount", least=1)
    one_of(mix_mode, op, "mix_mode", PAIRS)
    if not flag(train, op, "train"):
        return Compose(after, seed=seed, **rules)
    chain: list[Any] = [
        RandomResizedCrop(size, scale, ratio, interpolation, seed=0),
        RandomHorizontalFlip(hflip, seed=0),
        *([RandomVerticalFlip(vflip, seed=0)] if vflip else []),
        *_policy(policy, 9, interpolation, mean),
        *_mixing(mixup, cutmix, num_classes, mix_prob, mix_switch, label_smoothing, mix_mode),
        normal,
    ]
    if reprob and remode != "rand" and recount == 1:
        value: float | str = "random" if remode == "pixel" else 0.0
        chain.append(RandomErasing(reprob, (0.02, 1 / 3), (0.3, 1 / 0.3), value, seed=0))
    elif reprob:
        timm = _library("timm.data.random_erasing", f"remode={remode!r} and recount={recount}")
        chain.append(
            timm.RandomErasing(reprob, mode=remode, max_count=recount, num_splits=0, device="cpu")
        )
    return Compose(chain, evaluation=after, seed=seed, **rules)


@explains("fusereg.recipes.segmentation", more=RULES)
def segmentation(
    size: Size = 480,
    *,
    train: bool = True,
    base: int = 520,
    scale: Sequence[float] = (0.5, 2.0),
    hflip: float = 0.5,
    ignore: int = 255,
    fill: PerChannel = 0,
    mean: PerChannel = IMAGENET_MEAN,
    std: PerChannel = IMAGENET_STD,
    seed: int | None = None,
    **rules: Any,
) -> Compose:
    """Return torchvision's recipe for semantic segmentation; give masks as tv_tensors.Mask.

    In training the shorter side becomes one of ``scale`` times ``base`` pixels (the upper end left
    out), the image is flipped, and a window of ``size`` is cropped, of which what lies outside
    the image is ``fill``, and ``ignore`` in masks. It is one pass. In evaluation the shorter side
    becomes ``base`` pixels.

    Args:
        size: of the result.
        train: the recipe of training, or that of evaluation.
        base: of the shorter side.
        scale: (from, to).
        hflip: the probability of a horizontal flip.
        ignore: the label of pixels outside the image.
        fill: of images, in units of the images.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        seed: as for :class:`Compose`.
        rules: how targets move, as for :class:`Compose`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.

    Source: torchvision, references/segmentation/presets.py.
    """
    op = "recipes.segmentation"
    low, high = interval(scale, op, "scale", low=0.0, open_low=True)
    base = integer(base, op, "base", least=1)
    normal = Normalize(mean, std)
    after = [_resize("Resize", ShortSide((base, base)), "bilinear"), normal]
    rules = {"mask_fill": ignore, **rules}
    if not flag(train, op, "train"):
        return Compose(after, seed=seed, **rules)
    shortest = max(int(low * base), 1)
    sides = (shortest, max(int(high * base) - 1, shortest))
    chain: list[Any] = [
        _resize("RandomResize", ShortSide(sides), "bilinear"),
        RandomHorizontalFlip(hflip, seed=0),
        RandomCrop(size, pad_if_needed=True, fill=fill, seed=0),
        normal,
    ]
    return Compose(chain, evaluation=after, seed=seed, **rules)


@explains("fusereg.recipes.detection", more=RULES)
def detection(
    policy: str = "hflip",
    size: Size | None = None,
    *,
    train: bool = True,
    hflip: float = 0.5,
    fill: Sequence[float] = (123.0, 117.0, 104.0),
    seed: int | None = None,
    **rules: Any,
) -> Compose:
    """Return torchvision's recipe for detection; give boxes as tv_tensors.BoundingBoxes.

    Args:
        policy: "hflip"; "multiscale" (the shorter side is 480, 512, ... or 800, the longer one at
            most 1333); "lsj" (scaled by 0.1 to 2 and cropped to ``size``); "ssd" (colors, zooming
            out, a crop by its overlap with boxes); "ssdlite" (that crop). All flip.
        size: of "lsj" (1024), and of "ssd" and "ssdlite" the size that images are resized to in the
            end, as a batch needs it. Without a size, images keep different ones: give them one by
            one.
        train: the recipe of training; in evaluation values are converted, and resized to ``size``.
        hflip: the probability of a horizontal flip.
        fill: of the images of "lsj" and "ssd", in units of the images.
        seed: as for :class:`Compose`.
        rules: how targets move, as for :class:`Compose`.

    Boxes come back as XYXY, without those of less than a pixel (``min_area=``) and their rows in
    what is beside them (``rows=``), and images in [0, 1], as torchvision's models want them.
    "lsj" pads all sides, torchvision's reference the right and the bottom one. torchvision is
    needed.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.
        ImportError: torchvision cannot be imported.

    Source: torchvision, references/detection/presets.py.
    """
    op = "recipes.detection"
    policy = one_of(policy, op, "policy", ("hflip", "multiscale", "lsj", "ssd", "ssdlite"))
    v2 = _library("torchvision.transforms.v2", "detection")
    tv = _library("torchvision.tv_tensors", "detection")
    hflip, shade = probability(hflip, op, "hflip"), per_channel(fill, op, "fill")
    if policy == "lsj" and size is None:
        size = 1024
    pair = None if size is None else size_pair(size, op)
    resized = [] if pair is None else [_resize("Resize", FullImage(pair), "bilinear")]
    after = [v2.ToDtype(torch.float32, scale=True), v2.ConvertBoundingBoxFormat("XYXY")]
    rules = {"min_area": 1.0, **rules}
    if not flag(train, op, "train"):
        return Compose([*resized, *after], seed=seed, **rules)
    chain: list[Any] = []
    filling = {tv.Image: shade, tv.Mask: 0, "others": 0}
    if policy == "multiscale":
        chain += [v2.RandomShortestSize(list(range(480, 801, 32)), max_size=1333)]
    elif policy == "lsj":
        chain += [v2.ScaleJitter(pair, (0.1, 2.0), antialias=True)]
        chain += [v2.RandomCrop(pair, pad_if_needed=True, fill=filling)]
    elif policy == "ssd":
        chain += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=filling)]
    if policy.startswith("ssd"):
        chain += [v2.RandomIoUCrop()]
    chain += [v2.RandomHorizontalFlip(hflip), *([] if policy == "lsj" else resized), *after]
    return Compose(chain, evaluation=[*resized, *after], seed=seed, **rules)


@explains("fusereg.recipes.simclr", more=RULES)
def simclr(
    size: Size = 224,
    *,
    train: bool = True,
    strength: float = 1.0,
    scale: Sequence[float] = (0.08, 1.0),
    hflip: float = 0.5,
    blur: float = 0.5,
    solarize: float = 0.0,
    mean: PerChannel = IMAGENET_MEAN,
    std: PerChannel = IMAGENET_STD,
    seed: int | None = None,
    **rules: Any,
) -> Compose:
    """Return SimCLR's recipe; its views are calls with ``view=0`` and ``view=1``.

    RandomResizedCrop, flip, jitter of brightness, contrast, saturation (0.8 times ``strength``) and
    hue (0.2) with probability 0.8, gray with 0.2, blur, normalization. In evaluation: the shorter
    side becomes size / 0.875 pixels, the center is cropped. torchvision is needed for training.

    >>> augment = fusereg.augment.recipes.simclr(224)
    >>> first, second = (augment(images, sample_ids=ids, view=v) for v in (0, 1))

    Args:
        size: of the result.
        train: the recipe of training, or that of evaluation.
        strength: of the jitter, at most 2.5; 0.5 for CIFAR-10.
        scale: the cropped share of the area.
        hflip: the probability of a horizontal flip.
        blur: of a Gaussian blur: a kernel of a tenth of the side, sigma from 0.1 to 2. BYOL's
            views have 1 and 0.1.
        solarize: that values from 128 on are inverted; 0.2 in BYOL's second view.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        seed: as for :class:`Compose`.
        rules: how targets move, as for :class:`Compose`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.
        ImportError: torchvision cannot be imported.

    Source: Chen et al. 2020, appendix A; Grill et al. 2020, appendix B.
    """
    op = "recipes.simclr"
    normal = Normalize(mean, std)
    after = _evaluation(size, None, 0.875, "bicubic", normal, op)
    s = within(strength, op, "strength", 0.0, 2.5)  # hue turns by half at most
    blur, solarize = probability(blur, op, "blur"), probability(solarize, op, "solarize")
    if not flag(train, op, "train"):
        return Compose(after, seed=seed, **rules)
    v2 = _library("torchvision.transforms.v2", "simclr")
    kernel = max(min(size_pair(size, op)) // 10, 1) // 2 * 2 + 1
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    chain: list[Any] = [
        RandomResizedCrop(size, scale, interpolation="bicubic", seed=0),
        RandomHorizontalFlip(hflip, seed=0),
        *([v2.RandomApply([jitter], p=0.8)] if s else []),
        v2.RandomGrayscale(0.2),
        *([v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur)] if blur else []),
        *([v2.RandomSolarize(128, solarize)] if solarize else []),
        normal,
    ]
    return Compose(chain, evaluation=after, seed=seed, **rules)


# --- parts ----------------------------------------------------------------------------------------


def _resize(name: str, step: Step, interpolation: Interpolation) -> Transform:
    return Transform(resize_stage(name, step, interpolation, True), 0)


def _evaluation(
    size: Size,
    resize: int | None,
    crop_pct: float,
    interpolation: Interpolation,
    normal: Transform,
    op: str,
) -> list[Any]:
    """Return a resize of the shorter side, the central crop and normalization: one pass."""
    pair = size_pair(size, op)
    share = within(crop_pct, op, "crop_pct", 0.0, 1.0, open_low=True)
    side = math.floor(min(pair) / share)
    if resize is not None:
        side = integer(resize, op, "resize", least=1)
    step: Step = ShortSide((side, side))
    if resize is None and pair[0] != pair[1]:
        step = FullImage((math.floor(pair[0] / share), math.floor(pair[1] / share)))
    return [_resize("Resize", step, interpolation), CenterCrop(pair, seed=0), normal]


def _mixing(
    mixup: float,
    cutmix: float,
    num_classes: int | None,
    p: float = 1.0,
    switch: float = 0.5,
    label_smoothing: float = 0.0,
    mode: str = "ids",
) -> list[Transform]:
    if not mixup and not cutmix:
        return []
    return [mixing(Mix(mixup, cutmix, p, switch, num_classes, label_smoothing, mode))]


def _policy(
    policy: Policy, magnitude: int, interpolation: Interpolation, mean: PerChannel
) -> list[Any]:
    """Return the transform of a policy of automatic augmentation."""
    if policy is None:
        return []
    policy = getattr(policy, "value", policy)  # torchvision's AutoAugmentPolicy
    if not isinstance(policy, str):
        if not callable(policy):
            hint = "; size is another argument" if isinstance(policy, int | tuple | list) else ""
            raise TypeError(
                f"fusereg.recipes: policy must be a name, a transform or None, got {policy!r}{hint}"
            )
        return [policy]
    # torchvision turns tensors by no other.
    nearest = interpolation_name(interpolation, "recipes") == "nearest"
    name = "nearest" if nearest else "bilinear"
    if policy == "ra":
        return [RandAugment(magnitude=magnitude, interpolation=name, seed=0)]
    if policy == "ta_wide":
        return [TrivialAugmentWide(interpolation=name, seed=0)]
    if policy in ("imagenet", "cifar10", "svhn", "augmix"):
        v2 = _library("torchvision.transforms.v2", f"policy={policy!r}")
        how = v2.InterpolationMode(name)
        if policy == "augmix":
            return [v2.AugMix(interpolation=how)]
        return [v2.AutoAugment(v2.AutoAugmentPolicy(policy), interpolation=how)]
    levels = for_channels(per_channel(mean, "recipes", "mean"), 3, "recipes", "mean")
    shade = tuple(min(255, round(255 * m)) for m in levels)
    try:
        return [TimmAugment(policy, fill=shade, seed=0)]
    except ValueError:
        pass  # such as weighted sets, and "augmix": timm has those
    auto = _library("timm.data.auto_augment", f"policy={policy!r}")
    options: dict[str, Any] = {"translate_const": 100, "img_mean": shade}
    make = auto.auto_augment_transform
    if policy.startswith("rand"):
        make = auto.rand_augment_transform
    elif policy.startswith("augmix"):
        options["translate_pct"] = 0.3
        make = auto.augment_and_mix_transform
    try:
        return [make(policy, options)]
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"fusereg.recipes: policy must be 'ra', 'ta_wide', 'imagenet', 'cifar10', 'svhn', "
            f"'augmix', or a policy that timm reads, such as 'rand-m9-mstd0.5-inc1', got {policy!r}"
        ) from error


def _library(module: str, what: str) -> Any:
    """Import a module of another library, or say what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"fusereg.augment.recipes: {what} needs {name}: {error}") from error
