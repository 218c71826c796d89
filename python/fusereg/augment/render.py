"""Render a batch: from images and drawn parameters to the result, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import memory
from ..core.hints import explains
from . import op as _ops
from .arguments import (
    FILLS,
    INTERPOLATIONS,
    Normalization,
    for_channels,
    full_intensity,
    integer,
    interval,
    number,
    one_of,
    per_channel,
    probability,
    scale_and_shift,
)
from .params import AugmentParams
from .steps import EraseBox, MixPair
from .tree import plain, wrap

__all__ = ["Erase", "Mix"]


@explains()
@dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al. 2017): a box of each image is overwritten.

    Args:
        p: the probability that a box of an image is erased.
        scale: the box's share of the image's area (from, to).
        ratio: its height over its width (from, to); the logarithm is uniform.
        value: what it is filled with, in units of the result (0 is the mean after normalization);
            one number for each channel, or "random" for standard normal noise.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.
    """

    p: float = 0.5
    scale: Sequence[float] = (0.02, 0.33)
    ratio: Sequence[float] = (0.3, 3.3)
    value: float | Sequence[float] | str = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        probability(self.p, "Erase", "p")
        interval(self.scale, "Erase", "scale", low=0.0, high=1.0)
        interval(self.ratio, "Erase", "ratio", low=0.0, open_low=True)
        if not isinstance(self.value, str):
            per_channel(self.value, "Erase", "value")
        elif self.value != "random":
            raise ValueError(
                f"fusereg.Erase: value must be a number, one for each channel or 'random', "
                f"got {self.value!r}"
            )

    def step(self) -> EraseBox:
        """Return the step of the chain."""
        return EraseBox(
            float(self.p),
            interval(self.scale, "Erase", "scale"),
            interval(self.ratio, "Erase", "ratio"),
        )

    def fill(self) -> tuple[tuple[float, ...], bool]:
        """Return the value of erased boxes, and whether they are filled with noise instead."""
        if isinstance(self.value, str):
            return (0.0,), True
        return per_channel(self.value, "Erase", "value"), False


#: How samples find their partners, in the order of csrc/augment/augment_params.h.
PAIRS = ("ids", "elem", "pair", "batch")


@explains()
@dataclass(frozen=True)
class Mix:
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) within a batch.

    Each sample draws for itself, keyed by its id, whether it is mixed, by which of the two, and its
    weight from Beta(alpha, alpha). The batch's samples are ordered by a hash of (seed, epoch, id),
    and each is paired with the next one. So the pairs depend on which samples are in the batch, but
    not on their order, and every sample is a partner at most once. With another ``mode``, samples i
    and N - 1 - i are paired, as in timm.

    Args:
        mixup: MixUp's alpha, 0 to leave MixUp out.
        cutmix: CutMix's alpha, 0 to leave CutMix out.
        p: the probability that a sample is mixed.
        switch: the probability of CutMix instead of MixUp where both are on.
        num_classes: for class indices as targets: they come back as probabilities [N, num_classes];
            without it as :class:`fusereg.augment.MixedLabels`.
        label_smoothing: the share of the labels' weight that all classes have alike; of classes, it
            needs num_classes. Samples that are not mixed are smoothed as well, as in timm.
        mode: "ids", as above; timm's "elem" (each sample draws), "pair" (the two draw together) or
            "batch" (all do), by the hashes of all ids that are concerned.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5
    num_classes: int | None = None
    label_smoothing: float = 0.0
    mode: str = "ids"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("mixup", "cutmix"):
            alpha = number(getattr(self, name), "Mix", name)
            if alpha < 0.0:
                raise ValueError(f"fusereg.Mix: {name} must not be negative, got {alpha}")
        if self.mixup == 0 and self.cutmix == 0:
            raise ValueError("fusereg.Mix: mixup or cutmix must be positive, got 0 for both")
        probability(self.p, "Mix", "p")
        probability(self.switch, "Mix", "switch")
        if self.num_classes is not None and integer(self.num_classes, "Mix", "num_classes") < 1:
            raise ValueError(f"fusereg.Mix: num_classes must be positive, got {self.num_classes}")
        if probability(self.label_smoothing, "Mix", "label_smoothing") and self.num_classes is None:
            raise ValueError("fusereg.Mix: label_smoothing needs num_classes")
        one_of(self.mode, "Mix", "mode", PAIRS)

    def step(self) -> MixPair:
        """Return the step of the chain."""
        share = 1.0 if self.mixup == 0 else 0.0 if self.cutmix == 0 else float(self.switch)
        pairs = PAIRS.index(self.mode)
        return MixPair(float(self.p), self.mixup or 1.0, self.cutmix or 1.0, share, pairs)


@dataclass(frozen=True)
class Settings:
    """Settings of a pass besides its geometry: sampling of pixels, and changes of their values.

    Attributes:
        floors: "nearest" takes the pixel at the place of the output pixel's corner, as
            torchvision's NEAREST does where it resizes.
        fill_normalized: fill is in units of the result: the images were normalized before.
        cuts: interpolated bytes are bytes again: bicubic's overshoot is cut before normalization.
        three_channels: only images of 3 channels are accepted.
        erase_before: the value of erased boxes is in units of the images: normalized after it.
        erase_noise: erased boxes are filled with noise.
        mixed, num_classes, label_smoothing: whether samples are mixed, and how labels.
        mask_fill: the fill of masks, as transforms have it.
        dtype: of the result, where a transform says so.
    """

    interpolation: str = "bilinear"
    antialias: bool = False
    floors: bool = False
    fill_mode: str = "constant"
    fill: tuple[float, ...] = (0.0,)
    fill_normalized: bool = False
    cuts: bool = False
    color: bool = False
    three_channels: bool = False
    normal: Normalization | None = None
    erase: tuple[float, ...] = (0.0,)
    erase_before: bool = False
    erase_noise: bool = False
    mixed: bool = False
    num_classes: int | None = None
    label_smoothing: float = 0.0
    mask_fill: float | None = None
    dtype: torch.dtype | None = None

    def check_out_dtype(self, out_dtype: torch.dtype | None, op: str) -> None:
        """Check that the result can be of this dtype."""
        if out_dtype is not None:
            _ops.check_dtype(out_dtype, op)
        if out_dtype is torch.uint8 and self.normal is not None:
            raise ValueError(
                f"fusereg.{op}: out_dtype must be floating to hold what mean and std give, "
                "got torch.uint8"
            )

    @property
    def edge(self) -> str:
        """The fill mode that repeats the edge of an image.

        Antialiasing drops the taps outside and raises the weights of the others, as torch's does.
        """
        return "constant" if self.antialias else "border"

    @property
    def fill_mode_of_targets(self) -> str:
        """The fill mode of what moves with the images: the edge of a window is the image's."""
        return self.edge if self.fill_mode == "window" else self.fill_mode

    def repeat_edge(self) -> Settings:
        """Return the settings for geometry that only resizes, and reads half a pixel outside."""
        return replace(self, fill_mode=self.edge, fill=(0.0,))

    def crop_first(self) -> Settings:
        """Return the settings for windows that are cropped, and then resized.

        Nothing outside a window is read; its edge is treated as the image's is by repeat_edge.
        """
        return replace(self, fill_mode="window", fill=(0.0,))


def render(
    x: Tensor | Sequence[Tensor],
    params: AugmentParams,
    settings: Settings,
    op: str,
    *,
    out_dtype: torch.dtype | None = None,
    keep_dtype: bool = False,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the batch [N, C, height, width] after one pass; the images have been checked.

    ``out_dtype`` None stands for that of ``out``, else for that of the images, but for float32 if
    they are uint8 (with ``keep_dtype``: only if they are normalized).

    A list has images [C, H, W] of several sizes, for which op.one_call is true.
    """
    if out_dtype is None and isinstance(out, Tensor):
        out_dtype = out.dtype
    how = (settings, op, out_dtype, keep_dtype, memory_format)
    if isinstance(x, Tensor):
        images = plain(x)
        params.check_images(images.shape, op)
        y = _ops.apply(images, *pass_of(images, params, *how), op, out)
        return wrap(y, x)  # type: ignore[no-any-return]
    several = [image[None] for image in x]
    images = several[0].expand(len(several), -1, -1, -1)  # of the dtype and channels of all
    return _ops.apply_several(images, several, *pass_of(several[0], params, *how), op)


def pass_of(
    images: Tensor,
    params: AugmentParams,
    settings: Settings,
    op: str,
    out_dtype: torch.dtype | None,
    keep_dtype: bool,
    memory_format: torch.memory_format | None,
) -> _ops.Pass:
    """Return what the kernel takes for images of this dtype, layout and number of channels."""
    options, dtype = _options(images, settings, op, out_dtype, keep_dtype)
    records, keys = _numbers(images, params, settings, op)
    target = _ops.Target.of(images, params.size, dtype, memory_format)
    return _ops.Pass(records, keys, target, options)


def _options(
    images: Tensor, settings: Settings, op: str, out_dtype: torch.dtype | None, keep_dtype: bool
) -> tuple[_ops.Options, torch.dtype]:
    """Return the kernel's options for these images, and the dtype of the result."""
    channels, dtype, normal = images.shape[1], images.dtype, settings.normal
    if settings.three_channels and channels != 3:
        raise ValueError(f"fusereg.{op}: saturation needs images of 3 channels, got {channels}")
    settings.check_out_dtype(out_dtype, op)
    if out_dtype is None:
        keep = dtype is not torch.uint8 or (keep_dtype and normal is None)
        out_dtype = dtype if keep else torch.float32
    scale, shift = scale_and_shift(normal, dtype, channels, op)
    if normal is None:
        scale = (full_intensity(out_dtype) / full_intensity(dtype),) * channels
    fill = for_channels(settings.fill, channels, op, "fill")
    if settings.fill_normalized:
        fill = tuple((f - b) / a for f, a, b in zip(fill, scale, shift, strict=True))
    erase = for_channels(settings.erase, channels, op, "erase value")
    if settings.erase_before:
        erase = tuple(e * a + b for e, a, b in zip(erase, scale, shift, strict=True))
    # Colors that change nothing are cut as well.
    cuts = settings.cuts and dtype is torch.uint8 and out_dtype is not torch.uint8
    options = _ops.Options(
        INTERPOLATIONS[settings.interpolation],
        settings.antialias,
        FILLS[settings.fill_mode],
        settings.color or cuts,
        fill,
        scale,
        shift,
        erase,
    )
    return options, out_dtype


def _numbers(
    images: Tensor, params: AugmentParams, settings: Settings, op: str
) -> tuple[Tensor, Tensor | None]:
    """Return the records, and the keys of noise if there is any, on the device of the images."""
    records = params.records
    if settings.floors:
        records = records.clone()
        records[:, 2] -= (records[:, 0].abs() + records[:, 1].abs()) / 2
        records[:, 5] -= (records[:, 3].abs() + records[:, 4].abs()) / 2
    if settings.color and images.dtype is torch.uint8:
        records = records.clone()
        records[:, 19::4] *= 255.0
    keys = memory.to_device(params.keys, images.device, op) if settings.erase_noise else None
    return memory.to_device(records, images.device, op), keys
