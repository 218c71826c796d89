"""From images and parameters to the result: one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import op as _augment_ops
from .arguments import (
    FILL_MODES,
    INTERPOLATIONS,
    for_channels,
    integer,
    interval,
    number,
    per_channel,
    probability,
)
from .labels import rewrap, unwrap
from .params import AugmentParams
from .steps import EraseBox, MixPair

__all__ = ["Erase", "Mix"]


@dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al. 2017): a box of each image is overwritten.

    Args:
        p: the probability that an image has one.
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
        probability(self.p, "Erase", "p")
        interval(self.scale, "Erase", "scale", low=0.0, high=1.0)
        interval(self.ratio, "Erase", "ratio", low=0.0, open_low=True)
        if isinstance(self.value, str):
            if self.value != "random":
                raise ValueError(
                    f"fusereg.Erase: value must be a number, one for each channel or 'random', "
                    f"got {self.value!r}"
                )
        else:
            per_channel(self.value, "Erase", "value")

    def step(self) -> EraseBox:
        """As a step of the chain."""
        return EraseBox(
            float(self.p),
            interval(self.scale, "Erase", "scale"),
            interval(self.ratio, "Erase", "ratio"),
        )


@dataclass(frozen=True)
class Mix:
    """MixUp (Zhang et al. 2017) and CutMix (Yun et al. 2019) within a batch.

    Each sample draws for itself, keyed by its id, whether it is mixed, by which of the two, and its
    weight from Beta(alpha, alpha). Partners: the batch's samples in the order of a hash of (seed,
    epoch, id), each with the next one. So the pairs depend on which samples are in the batch, but
    not on their order, and every sample is a partner at most once.

    Args:
        mixup: MixUp's alpha, 0 to leave MixUp out.
        cutmix: CutMix's alpha, 0 to leave CutMix out.
        p: the probability that a sample is mixed.
        switch: the share of CutMix where both are there.
        num_classes: for class indices as targets: they come back as probabilities [N, num_classes];
            without it as :class:`fusereg.augment.MixedLabels`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0
    switch: float = 0.5
    num_classes: int | None = None

    def __post_init__(self) -> None:
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

    def step(self) -> MixPair:
        """As a step of the chain."""
        share = 1.0 if self.mixup == 0 else 0.0 if self.cutmix == 0 else float(self.switch)
        return MixPair(float(self.p), self.mixup or 1.0, self.cutmix or 1.0, share)


@dataclass(frozen=True)
class Look:
    """All of a pass but its geometry: how pixels are read, and what becomes of their values."""

    interpolation: str = "bilinear"
    antialias: bool = False
    fill_mode: str = "constant"
    fill: tuple[float, ...] = (0.0,)
    #: fill is in units of the result: what it fills has been normalized already.
    fill_normalized: bool = False
    colour: bool = False
    three_channels: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    erase: tuple[float, ...] = (0.0,)
    #: the value of erased boxes is in units of the input: normalization comes after it.
    erase_before: bool = False
    erase_noise: bool = False
    mixed: bool = False
    num_classes: int | None = None

    def out_dtype(self, x: Tensor, asked: torch.dtype | None, op: str, keep: bool) -> torch.dtype:
        """The result's dtype: as asked; else floats stay, uint8 becomes float32 (with ``keep``:
        only if it is normalized)."""
        if asked is not None:
            if asked not in _augment_ops.DTYPES:
                raise ValueError(
                    f"fusereg.{op}: out_dtype must be uint8, float16, bfloat16, float32 or "
                    f"float64, got {asked}"
                )
            if asked is torch.uint8 and self.mean is not None:
                raise ValueError(
                    f"fusereg.{op}: out_dtype must be floating to hold what mean and std give, "
                    "got torch.uint8"
                )
            return asked
        if x.dtype is torch.uint8 and (self.mean is not None or not keep):
            return torch.float32
        return x.dtype


def affine_of_values(
    look: Look, dtype: torch.dtype, out_dtype: torch.dtype, channels: int, op: str
) -> tuple[list[float], list[float]]:
    """scale and shift for each channel: y = v * scale + shift.

    uint8 values are 0 to 255, all others 0 to 1.
    """
    limit = 255.0 if dtype is torch.uint8 else 1.0
    if look.mean is None or look.std is None:
        top = 255.0 if out_dtype is torch.uint8 else 1.0
        return [top / limit] * channels, [0.0] * channels
    mean = for_channels(look.mean, channels, op, "mean")
    std = for_channels(look.std, channels, op, "std")
    return [1.0 / (limit * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def render(
    x: Tensor,
    params: AugmentParams,
    look: Look,
    op: str,
    *,
    out_dtype: torch.dtype | None = None,
    keep_dtype: bool = False,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The pass over a batch: [N, C, *params.size]."""
    plain = _augment_ops.check_images(unwrap(x), op)
    params.check_images(plain, op)
    channels = plain.shape[1]
    if look.three_channels and channels != 3:
        raise ValueError(f"fusereg.{op}: saturation needs images of 3 channels, got {channels}")
    if isinstance(out, Tensor) and out_dtype is None:
        out_dtype = out.dtype
    dtype = look.out_dtype(plain, out_dtype, op, keep_dtype)
    scale, shift = affine_of_values(look, plain.dtype, dtype, channels, op)
    fill = for_channels(look.fill, channels, op, "fill")
    if look.fill_normalized:
        fill = [(f - b) / a for f, a, b in zip(fill, scale, shift, strict=True)]
    erase = for_channels(look.erase, channels, op, "erase value")
    if look.erase_before:
        erase = [e * a + b for e, a, b in zip(erase, scale, shift, strict=True)]
    records = params.records
    if look.colour and plain.dtype is torch.uint8:
        records = records.clone()
        records[:, 19::4] *= 255.0
    y = _augment_ops.apply(
        plain,
        on_device(records, plain.device),
        on_device(params.keys, plain.device) if look.erase_noise else None,
        params.size,
        interpolation=INTERPOLATIONS[look.interpolation],
        antialias=look.antialias,
        fill_mode=FILL_MODES[look.fill_mode],
        colour=look.colour,
        fill=fill,
        scale=scale,
        shift=shift,
        erase=erase,
        erase_noise=look.erase_noise,
        out_dtype=dtype,
        memory_format=memory_format,
        out=out,
        op=op,
    )
    return rewrap(y, x)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """There without waiting: through pinned memory."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def repeat_edge(look: Look) -> Look:
    """The same for images of which only resizing reads the outside, by half a pixel.

    Antialiasing drops the taps outside and raises the others' weights, as torch's resize does;
    without it the edge is repeated, as torch's resize does.
    """
    return replace(look, fill_mode="constant" if look.antialias else "border", fill=(0.0,))
