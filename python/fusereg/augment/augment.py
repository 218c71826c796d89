"""Augment: a whole chain of augmentations in one pass over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from . import op as _augment_ops
from .arguments import (
    INTERPOLATIONS,
    Interval,
    PerChannel,
    Size,
    around,
    factors,
    flag,
    interval,
    number,
    numbers,
    one_of,
    per_channel,
    probability,
    size_pair,
)
from .conventions import Convention, convention
from .keyed import Keyed
from .labels import transform_targets
from .params import AugmentParams, draw
from .render import Erase, Look, Mix, render, repeat_edge
from .steps import (
    LARGER_ANYWHERE,
    Affine,
    Centre,
    Colour,
    Flip,
    Resized,
    Step,
    Whole,
    Window,
    encode,
)

__all__ = ["Augment", "WithIds"]

_CROPS = ("random", "center", "resized", "none")


class Augment(Keyed):
    r"""Rotation, scale, shear, translation, flips, crop, colour, normalization, erasing and mixing.

    One kernel reads the batch once and writes the result once. Everything geometric composes, per
    sample, to one matrix that takes an output pixel to its place in the input. With integers at the
    centres of pixels, :math:`c = ((W-1)/2, (H-1)/2)` and y pointing down,

    .. math:: M = F \cdot A \cdot C, \qquad
        A^{-1}(p) = c + t + R(\theta)\, S(s)\, H_y H_x\, (p - c)

    - F: flips, x to W - 1 - x with probability ``hflip``, y likewise with ``vflip``: an image is
      flipped first, then turned, then cropped;
    - A: ``degrees`` (R turns counter-clockwise as one sees it), ``scale`` (above 1 zooms in),
      ``shear`` (x - y tan of the first angle, then y - x tan of the second) and ``translate``;
      multiples of 90 degrees are exact;
    - C: ``crop``, the window of the turned image that is the result.

    Values: interpolation, colour (clamped to the image's range), then ``(v - mean) / std`` with v
    in [0, 1], then erasing, then mixing, then rounding.

    Every random number is a function of (seed, epoch, sample id, operation), by Philox: neither
    batch size nor order, workers, device or the other arguments change it. So with ``sample_ids`` a
    run is reproducible sample by sample.

    Args:
        size: (height, width) of the result; an integer is both.
        degrees: the rotation's range: a number d is (-d, d).
        scale: zoom factors (from, to), or (from, to, from, to) for x and y by themselves.
        translate: the largest shift (x, y) as shares of width and height; a number is both.
        shear: degrees: a number a is x from -a to a; (from, to) of x; four numbers: of x and of y.
        hflip: probability of mirroring left to right.
        vflip: probability of mirroring top to bottom.
        crop: "random": a window of ``size`` at a random place (an image that is smaller lies
            anywhere in it); "center": in the middle; "resized": a random window of ``crop_scale``
            of the area and ``crop_ratio`` of width to height, resized to ``size``; "none": the
            whole image, resized.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: filter as wide as the output pixel is where the image is made smaller.
        fill_mode: what lies outside the image: "constant" (the default; "symmetric" for Keras),
            "border" (the edge pixel), "reflect" (-1 is 1), "symmetric" (-1 is 0) or "wrap". Chains
            that only crop and resize read nothing outside but half-pixel margins, which repeat the
            edge.
        fill: the constant, in the images' units (0 to 255 for uint8); one number for each channel.
        brightness: v is (1 - v, 1 + v); a factor of all values.
        contrast: likewise; a factor of the distance to mid-grey. (torchvision takes the image's
            mean, for which it reads the image twice.)
        saturation: likewise; between grey (0) and the colour (1). Images of 3 channels.
        erase: a probability, or :class:`Erase`.
        mix: "mixup" (alpha 0.2), "cutmix" (alpha 1) or :class:`Mix`.
        mean: of each channel, for images in [0, 1].
        std: of each channel, positive.
        out_dtype: of the result. Default: the images' own, and float32 in [0, 1] for uint8.
        memory_format: torch.contiguous_format or torch.channels_last; default: as the images.
        seed: 64 bits.
        crop_scale: of "resized".
        crop_ratio: of "resized".
        compat: whose angles, scales and fills these are ("fusereg", "torchvision", "kornia",
            "keras"); see :mod:`fusereg.augment.conventions`.

    In evaluation mode (``.eval()``) nothing is random: the central crop ("center" in place of
    "random"; the whole image for "resized" and "none"), normalized.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.

    Example:
        >>> augment = fusereg.augment.Augment(
        ...     192, degrees=15, scale=(0.8, 1.2), hflip=0.5, mean=mean, std=std)
        >>> for epoch in range(90):
        ...     for images, labels, ids in loader:        # uint8 [N, 3, 224, 224]
        ...         x = augment(images, sample_ids=ids, epoch=epoch)  # float32 [N, 3, 192, 192]
    """

    _op = "Augment"

    def __init__(
        self,
        size: Size,
        *,
        degrees: Interval = 0.0,
        scale: Sequence[float] | None = None,
        translate: Interval | None = None,
        shear: Interval | None = None,
        hflip: float = 0.0,
        vflip: float = 0.0,
        crop: str = "random",
        interpolation: str = "bilinear",
        antialias: bool = False,
        fill_mode: str | None = None,
        fill: PerChannel = 0.0,
        brightness: Interval | None = None,
        contrast: Interval | None = None,
        saturation: Interval | None = None,
        erase: float | Erase | None = None,
        mix: str | Mix | None = None,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        seed: int = 0,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        compat: str = "fusereg",
    ) -> None:
        super().__init__(seed)
        op = self._op
        rules = convention(compat, op)
        self.size = size_pair(size, op)
        self.out_dtype = out_dtype
        self.memory_format = check_memory_format(memory_format, op)
        affine = affine_step(rules, degrees, scale, translate, shear, op)
        flips = Flip(probability(hflip, op, "hflip"), probability(vflip, op, "vflip"))
        self.crop = one_of(crop, op, "crop", _CROPS)
        area = interval(crop_scale, op, "crop_scale", low=0.0, high=1.0, open_low=True)
        ratio = interval(crop_ratio, op, "crop_ratio", low=0.0, open_low=True)
        colour = Colour(
            factors(brightness, op, "brightness"),
            factors(contrast, op, "contrast"),
            factors(saturation, op, "saturation"),
        )
        coloured = any(v is not None for v in (brightness, contrast, saturation))
        erasing = check_erase(erase, op)
        mixing = check_mix(mix, op)
        look = Look(
            interpolation=one_of(interpolation, op, "interpolation", list(INTERPOLATIONS)),
            antialias=flag(antialias, op, "antialias"),
            fill_mode=rules.mode(rules.fill_mode if fill_mode is None else fill_mode, op),
            fill=per_channel(fill, op, "fill"),
            colour=coloured,
            three_channels=saturation is not None,
            **normalization(mean, std, op),
            **erase_look(erasing),
            mixed=mixing is not None,
            num_classes=None if mixing is None else mixing.num_classes,
        )
        if affine.still and self.crop in ("resized", "none"):
            look = repeat_edge(look)
        look.out_dtype(torch.empty(0), out_dtype, op, False)
        crops: dict[str, Step] = {
            "random": Window(self.size, larger=LARGER_ANYWHERE),
            "center": Centre(self.size),
            "resized": Resized(self.size, area, ratio),
            "none": Whole(self.size),
        }
        steps: list[Step] = [flips, affine, crops[self.crop]]
        if coloured:
            steps.append(colour)
        if erasing is not None:
            steps.append(erasing.step())
        if mixing is not None:
            steps.append(mixing.step())
        self._look = look
        self._steps = encode(steps)
        still = crops["center" if self.crop in ("random", "center") else "none"]
        calm = Look(
            interpolation=look.interpolation,
            antialias=look.antialias,
            fill_mode=look.fill_mode,
            fill=look.fill,
            mean=look.mean,
            std=look.std,
        )
        self._still_look = calm if isinstance(still, Centre) else repeat_edge(calm)
        self._still_steps = encode([still])
        self._text = ", ".join(
            f"{name}={value!r}"
            for name, value, default in (
                ("degrees", degrees, 0.0),
                ("scale", scale, None),
                ("translate", translate, None),
                ("shear", shear, None),
                ("hflip", hflip, 0.0),
                ("vflip", vflip, 0.0),
                ("crop", crop, None),
                ("interpolation", interpolation, None),
                ("brightness", brightness, None),
                ("contrast", contrast, None),
                ("saturation", saturation, None),
                ("erase", erase, None),
                ("mix", mix, None),
                ("mean", mean, None),
                ("std", std, None),
                ("seed", seed, None),
            )
            if value != default
        )

    def extra_repr(self) -> str:
        """Size and what differs from the defaults."""
        return f"{self.size}, {self._text}"

    def sample_params(
        self,
        n: int,
        *,
        input_size: Size,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> AugmentParams:
        """Draws the parameters of n samples, on the CPU (in evaluation mode: the central crop's).

        Args:
            n: how many.
            input_size: (height, width) of the images.
            sample_ids: n integers; without them the next numbers of a running count.
            epoch: default: that of :meth:`set_epoch`.
        """
        ids = self._ids_of(sample_ids, n)
        steps = self._steps if self.training else self._still_steps
        size = size_pair(input_size, self._op, "input_size")
        return draw(steps, ids, size, self.seed, self._epoch_of(epoch), self._op)

    def forward(
        self,
        x: Tensor,
        targets: Any = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        params: AugmentParams | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """The batch, augmented.

        Args:
            x: [N, C, H, W], uint8, float16, bfloat16, float32 or float64, contiguous or
                channels_last; a torchvision tv_tensors.Image gives one back.
            targets: class indices [N] or probabilities [N, K], which come back mixed if the images
                are; torchvision's BoundingBoxes and Mask move with the images (a list of N, or a
                mapping of targets); anything else comes back as it is where nothing is mixed.
            sample_ids: N integers that name the samples; those on a GPU are waited for. Without
                them the next numbers of a running count.
            epoch: default: that of :meth:`set_epoch`.
            params: what :meth:`sample_params` drew, on any device; nothing is drawn then.
            out: where the result goes: [N, C, *size].

        Returns:
            The result, differentiable in x; (result, targets) if there are targets.
        """
        _augment_ops.check_images(x, self._op)
        if params is None:
            params = self.sample_params(
                x.shape[0], input_size=tuple(x.shape[2:]), sample_ids=sample_ids, epoch=epoch
            )
        elif sample_ids is not None or epoch is not None:
            raise ValueError("fusereg.Augment: params exclude sample_ids and epoch")
        look = self._look if self.training else self._still_look
        y = render(
            x,
            params,
            look,
            self._op,
            out_dtype=self.out_dtype,
            memory_format=self.memory_format,
            out=out,
        )
        if targets is None:
            return y
        return y, transform_targets(targets, params, look.mixed, look.num_classes, self._op)

    def collate(self, samples: Sequence[Any]) -> Any:
        """For ``DataLoader(collate_fn=augment.collate)``: stacks the samples and augments them.

        A sample is an image [C, H, W] or a tuple whose first two are image and target; those of
        :class:`WithIds` bring their ids. Images may differ in size where nothing is mixed: the
        result has one.
        """
        return collate(self, self._look.mixed, samples)


class WithIds(Dataset[Any]):
    """A dataset whose samples bring their index along, as sample id for :meth:`Augment.collate`.

    >>> loader = DataLoader(WithIds(dataset), 64, collate_fn=augment.collate, num_workers=4)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Identified:
        return _Identified(self.dataset[index], index)


class _Identified:
    """A sample and its id."""

    def __init__(self, sample: Any, id: int) -> None:
        self.sample, self.id = sample, id


def collate(augment: Any, mixed: bool, samples: Sequence[Any]) -> Any:
    """Samples of a dataset as an augmented batch."""
    op = augment._op
    ids = None
    if samples and isinstance(samples[0], _Identified):
        ids = [s.id for s in samples]
        samples = [s.sample for s in samples]
    alone = isinstance(samples[0], Tensor)
    images = list(samples) if alone else [s[0] for s in samples]
    for image in images:
        if not isinstance(image, Tensor) or image.dim() != 3:
            what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"fusereg.{op}.collate: images must be tensors (C, H, W), got {what}")
    targets = None if alone or len(samples[0]) < 2 else default_collate([s[1] for s in samples])
    rest = (
        []
        if alone
        else [default_collate(list(part)) for part in list(zip(*samples, strict=True))[2:]]
    )
    if all(image.shape == images[0].shape for image in images):
        result = augment(torch.stack(images), targets, sample_ids=ids)
        if alone or targets is None:
            return result
        return [*result, *rest]
    if mixed:
        raise ValueError(
            f"fusereg.{op}.collate: images must be of one size to be mixed, got several"
        )
    parts = [
        augment(image[None], sample_ids=None if ids is None else [ids[i]])
        for i, image in enumerate(images)
    ]
    y = torch.cat(parts)
    return y if targets is None else [y, targets, *rest]


# --- arguments that the drop-in transforms share ---


def affine_step(
    rules: Convention,
    degrees: object,
    scale: object,
    translate: object,
    shear: object,
    op: str,
) -> Affine:
    """Rotation, scale, translation and shear from the arguments of Augment."""
    zoom_x, zoom_y = (1.0, 1.0), None
    if scale is not None:
        four = numbers(scale, op, "scale", (2, 4), "(from, to), or (from, to) of x and of y")
        zoom_x = interval(four[:2], op, "scale", low=0.0, open_low=True)
        if len(four) == 4:
            zoom_y = interval(four[2:], op, "scale", low=0.0, open_low=True)
    move = (0.0, 0.0)
    if translate is not None:
        if isinstance(translate, Sequence) and not isinstance(translate, str):
            x, y = numbers(translate, op, "translate", (2,), "a number, or one for x and one for y")
        else:
            x = y = number(translate, op, "translate")
        move = (x, y)
        if min(move) < 0:
            raise ValueError(f"fusereg.{op}: translate must not be negative, got {move}")
    shear_x = shear_y = (0.0, 0.0)
    if shear is not None:
        if isinstance(shear, Sequence) and not isinstance(shear, str):
            four = numbers(
                shear, op, "shear", (2, 4), "a number, (from, to) or (from, to, from, to)"
            )
            shear_x = interval(four[:2], op, "shear", low=-90, high=90)
            if len(four) == 4:
                shear_y = interval(four[2:], op, "shear", low=-90, high=90)
        else:
            shear_x = around(shear, op, "shear", 90)
        if 90 in (abs(a) for a in (*shear_x, *shear_y)):
            raise ValueError(f"fusereg.{op}: shear must be below 90 degrees, got {shear}")
    return Affine(
        degrees=around(degrees, op, "degrees"),
        sign=rules.affine_sign,
        scale_x=zoom_x,
        scale_y=zoom_y,
        zooms_out=rules.zooms_out,
        translate_x=(-move[0], move[0]),
        translate_y=(-move[1], move[1]),
        whole_pixels=rules.whole_pixels,
        shear_x=shear_x,
        shear_y=shear_y,
    )


def normalization(mean: object, std: object, op: str) -> dict[str, Any]:
    """mean and std as Look has them: both or none."""
    if mean is None and std is None:
        return {}
    means = per_channel(0.0 if mean is None else mean, op, "mean")
    stds = per_channel(1.0 if std is None else std, op, "std")
    if min(stds) <= 0:
        raise ValueError(f"fusereg.{op}: std must be positive, got {stds}")
    return {"mean": means, "std": stds}


def check_erase(erase: object, op: str) -> Erase | None:
    """Erase from a probability."""
    if erase is None or isinstance(erase, Erase):
        return erase
    return Erase(probability(erase, op, "erase"))


def erase_look(erase: Erase | None) -> dict[str, Any]:
    """The value of erased boxes as Look has it."""
    if erase is None:
        return {}
    if isinstance(erase.value, str):
        return {"erase_noise": True}
    return {"erase": per_channel(erase.value, "Erase", "value")}


def check_mix(mix: object, op: str) -> Mix | None:
    """Mix from a name."""
    if mix is None or isinstance(mix, Mix):
        return mix
    if one_of(mix, op, "mix", ("mixup", "cutmix")) == "mixup":
        return Mix(mixup=0.2)
    return Mix(cutmix=1.0)


def check_memory_format(
    memory_format: torch.memory_format | None, op: str
) -> torch.memory_format | None:
    """One that the kernels write."""
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"fusereg.{op}: memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    return memory_format
