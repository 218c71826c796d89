"""Augment: a whole chain of augmentations in one pass over the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .arguments import (
    Interpolation,
    Interval,
    PerChannel,
    Size,
    around,
    factors,
    flag,
    interpolation_name,
    interval,
    is_sequence,
    normalization,
    number,
    numbers,
    one_of,
    per_channel,
    probability,
    size_pair,
)
from .chain import ELSEWHERE, Chain, Pipeline, Unit
from .conventions import Convention, convention
from .loading import collate
from .params import AugmentParams
from .render import Erase, Mix, Settings
from .steps import (
    LARGER_ANYWHERE,
    Affine,
    CenterWindow,
    Color,
    Flip,
    FullImage,
    RandomWindow,
    ResizedWindow,
    Step,
    encode,
)

__all__ = ["Augment"]

_CROPS = ("random", "center", "resized", "none")


class Augment(Chain):
    r"""Rotation, scale, shear, translation, flips, crop, color, normalization, erasing and mixing.

    One kernel reads the batch once and writes the result once. All geometry composes, per sample,
    to one matrix that maps an output pixel to its place in the input. With integers at the centers
    of pixels, :math:`c = ((W-1)/2, (H-1)/2)` and y pointing down,

    .. math:: M = F \cdot A \cdot C, \qquad
        A^{-1}(p) = c + t + R(\theta)\, S(s)\, H_y H_x\, (p - c)

    - F: flips, x to W - 1 - x with probability ``hflip``, y likewise with ``vflip``: an image is
      flipped first, then rotated, then cropped;
    - A: ``degrees`` (R is counter-clockwise as seen), ``scale`` (above 1 zooms in), ``shear``
      (x - y tan of the first angle, then y - x tan of the second) and ``translate``; multiples of
      90 degrees are exact;
    - C: ``crop``, the window of the rotated image that is the result.

    Values: interpolation, color (clamped to the image's range), then ``(v - mean) / std`` with v
    in [0, 1], then erasing, then mixing, then rounding.

    Every random number is a function of (seed, epoch, sample id, its occurrence, operation), by
    Philox; batch size, order, workers, device and the other arguments do not change it. So with
    ``sample_ids`` a run is reproducible sample by sample. Without ``seed`` it also depends on
    torch's generator and on the rank.

    Args:
        size: (height, width) of the result; an integer is both.
        degrees: the range of the rotation: a number d is (-d, d).
        scale: zoom factors (from, to), or (from, to, from, to) for x and y separately.
        translate: the largest shift (x, y) as fractions of width and height; a number is both.
        shear: range of the angle: a number a is (-a, a) degrees along x; four numbers: x, then y.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        crop: "random": a window of ``size`` at a random place (a smaller image is placed anywhere
            in it); "center": the central window; "resized": a random window of ``crop_scale`` of
            the area and ``crop_ratio`` of width to height, resized to ``size``; "none": the full
            image, resized.
        interpolation: "nearest", "bilinear" or "bicubic"; here and elsewhere also torchvision's
            InterpolationMode or PIL's number.
        antialias: filter as wide as the output pixel where the image is made smaller; images that
            are turned or sheared are resized so first, and then interpolated at points
            (:func:`warp_affine` has the formula). None: for resized crops, as torchvision does,
            unless ``interpolation`` is "nearest".
        fill_mode: how pixels outside the image are filled: "constant" (the default; "symmetric"
            for Keras), "border" (the edge pixel), "reflect" (-1 is 1), "symmetric" (-1 is 0) or
            "wrap". Chains that only crop and resize read nothing outside but half-pixel margins,
            which repeat the edge.
        fill: the constant, in the images' units (0 to 255 for uint8); one number for each channel.
        brightness: range of a factor of all values; a number v is (1 - v, 1 + v).
        contrast: likewise, a factor of the distance to mid-gray. (torchvision takes the image's
            mean, for which it reads the image twice.)
        saturation: likewise, from gray (0) to the image's color (1) and beyond; for 3 channels.
        erase: a probability, or :class:`Erase`.
        mix: "mixup" (alpha 0.2), "cutmix" (alpha 1) or :class:`Mix`.
        mean: mean of each channel, of images in [0, 1]; given together with ``std``.
        std: standard deviation of each channel, positive.
        out_dtype: dtype of the result; default: that of the images; float32 in [0, 1] for uint8.
        memory_format: torch.contiguous_format or torch.channels_last; default: that of the images.
        seed: 64 bits; default: from torch's generator, and another one on each rank.
        crop_scale: range of the window's share of the image's area, for "resized".
        crop_ratio: range of its width over its height, for "resized".
        compat: the library whose conventions for angles, scales and fills are used ("fusereg",
            "torchvision", "kornia", "keras"); see :mod:`fusereg.augment.conventions`.
        rules: how targets move. ``mask_fill``: the label of a mask outside the image (0), such as
            255; masks follow the images' ``fill_mode``, and those beside boxes are filled with 0.
            ``mask_interpolation``: of floating masks ("nearest"). ``image_interpolation``: of
            further images ("bilinear" as the images). ``keypoint_pairs``: pairs of indices of
            points that change places where an image is mirrored. ``min_area`` (pixels) and
            ``min_visibility`` (share): boxes with less are left out, which waits for a GPU that
            has them, with their rows in the values beside them whose keys ``rows`` names
            ("labels", "masks", "keypoints", "area", ...).
            ``labels``: the keys of values that are mixed; by default those that say so ("label",
            "class", "target", "y"), while "image_id" and other names stay and the rest is refused.
            ``passthrough``: keys whose values stay as they are, or True for all that fusereg does
            not understand.

    Points are (x, y) with integers at the centers of pixels; boxes are edges of pixels.

    In evaluation mode (``.eval()``) nothing is random: the central crop ("center" in place of
    "random"; the full image for "resized" and "none"), normalized.

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
    _keep_dtype = False
    _single = False
    _elsewhere: ClassVar[Mapping[str, str]] = {
        **ELSEWHERE,
        "p": "each part has a probability of its own: hflip, vflip, erase, mix",
        "normalize": "give mean and std",
        "padding": "crop takes smaller images; fill_mode and fill say what is around them",
        "policy": "RandAugment and its kin are transforms; Compose takes them",
        "auto_augment": "RandAugment and its kin are transforms; Compose takes them",
        "mixup_alpha": "give mix=Mix(mixup=alpha)",
        "cutmix_alpha": "give mix=Mix(cutmix=alpha)",
    }

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
        interpolation: Interpolation = "bilinear",
        antialias: bool | None = None,
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
        seed: int | None = None,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        compat: str = "fusereg",
        **rules: Any,
    ) -> None:
        given = dict(locals())
        op = self._op
        library = convention(compat, op)
        pair = size_pair(size, op)
        affine = affine_step(library, degrees, scale, translate, shear, op)
        flips = Flip(probability(hflip, op, "hflip"), probability(vflip, op, "vflip"))
        crop = one_of(crop, op, "crop", _CROPS)
        area = interval(crop_scale, op, "crop_scale", low=0.0, high=1.0, open_low=True)
        ratio = interval(crop_ratio, op, "crop_ratio", low=0.0, open_low=True)
        color = Color(
            factors(brightness, op, "brightness"),
            factors(contrast, op, "contrast"),
            factors(saturation, op, "saturation"),
        )
        colored = any(v is not None for v in (brightness, contrast, saturation))
        erasing = (
            erase if isinstance(erase, Erase | None) else Erase(probability(erase, op, "erase"))
        )
        mixing = check_mix(mix, op)
        how = interpolation_name(interpolation, op)
        if antialias is None:
            antialias = crop == "resized" and how != "nearest"
        plain = Settings(
            interpolation=how,
            antialias=flag(antialias, op, "antialias"),
            fill_mode=library.mode(library.fill_mode if fill_mode is None else fill_mode, op),
            fill=per_channel(fill, op, "fill"),
            normal=normalization(mean, std, op),
        )
        settings = replace(plain, color=colored, three_channels=saturation is not None)
        if affine.is_identity and crop in ("resized", "none"):
            settings = settings.crop_first() if crop == "resized" else settings.repeat_edge()
        crops: dict[str, Step] = {
            "random": RandomWindow(pair, larger=LARGER_ANYWHERE),
            "center": CenterWindow(pair),
            "resized": ResizedWindow(pair, area, ratio),
            "none": FullImage(pair),
        }
        steps: list[Step] = [flips, affine, crops[crop], *([color] if colored else [])]
        if erasing is not None:
            value, noise = erasing.fill()
            settings = replace(settings, erase=value, erase_noise=noise)
            steps.append(erasing.step())
        if mixing is not None:
            classes, smoothing = mixing.num_classes, mixing.label_smoothing
            settings = replace(settings, mixed=True, num_classes=classes, label_smoothing=smoothing)
            steps.append(mixing.step())
        central = crop in ("random", "center")
        after = plain if central else plain.repeat_edge()
        super().__init__(
            Pipeline([Unit(encode(steps), settings)]),
            Pipeline([Unit(encode([crops["center" if central else "none"]]), after)]),
            seed=seed,
            out_dtype=out_dtype,
            memory_format=memory_format,
            rules=rules,
        )
        self.size, self.crop = pair, crop
        known = inspect.signature(Augment.__init__).parameters
        self._text = ", ".join(
            f"{name}={given[name]!r}"
            for name, argument in known.items()
            if argument.kind is argument.KEYWORD_ONLY and given[name] is not argument.default
        )

    def extra_repr(self) -> str:
        """Return the size and the arguments that differ from their defaults."""
        return f"{self.size}, {self._text}"

    def sample_params(
        self,
        n: int,
        *,
        input_size: Size,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        view: int | Sequence[int] | Tensor | None = None,
    ) -> AugmentParams:
        """Draw the parameters of n samples, on the CPU (in evaluation mode: the central crop's).

        Args:
            n: the number of samples.
            input_size: (height, width) of the images.
            sample_ids: n integers; default: the next numbers of a running count.
            epoch: default: that of :meth:`set_epoch`.
            view: which occurrence of its sample each is: one integer, or n; default: counted in
                this call, from 0.
        """
        keys = self._keys(n, sample_ids, epoch, view)
        size = size_pair(input_size, self._op, "input_size")
        (params,) = self._drawn(keys, size)
        assert isinstance(params, AugmentParams)
        return params

    def forward(
        self,
        x: Tensor,
        targets: Any = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        view: int | Sequence[int] | Tensor | None = None,
        params: AugmentParams | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """Augment a batch.

        Args:
            x: [N, C, H, W], uint8, float16, bfloat16, float32 or float64, contiguous or
                channels_last; clips [N, T, C, H, W], with one draw for all frames of a clip. A
                torchvision tv_tensors.Image or Video returns one.
            targets: in any nesting of mappings, lists, tuples and dataclasses. Class indices [N] or
                probabilities [N, K] are mixed if the images are; telling those from places in the
                image waits for a GPU. torchvision's Mask,
                BoundingBoxes, KeyPoints, Image and Video move with the images; a list or tuple of
                N has one for each. Numbers, strings and labels are returned as they are; plain
                tensors and arrays that may be places in the image are an error.
            sample_ids: N integers that identify the samples; reading them from a GPU waits for it.
                Default: the next numbers of a running count.
            epoch: default: that of :meth:`set_epoch`.
            view: as for :meth:`sample_params`.
            params: drawn by :meth:`sample_params`, on any device; nothing is drawn then.
            out: the tensor that the result is written to: [N, C, *size].

        Returns:
            The result, differentiable in x; (result, targets) if there are targets.
        """
        given = None if params is None else [params]
        return self._apply_to(x, targets, sample_ids, epoch, view, given, out)

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack samples and augment them, for ``DataLoader(collate_fn=augment.collate)``.

        A sample is an image [C, H, W] (a tensor, or an image of PIL or NumPy), a tuple that starts
        with image and target, or a mapping with a key such as "image" or "pixel_values"; those of
        :class:`WithIds` also carry their ids. torchvision's types stay; boxes become a list of N.
        Images may differ in size: on the CPU they are one call of the kernel.
        """
        return collate(self, samples)


def affine_step(
    rules: Convention,
    degrees: object,
    scale: object,
    translate: object,
    shear: object,
    op: str,
) -> Affine:
    """Return the step of rotation, scale, translation and shear."""
    zoom_x, zoom_y = (1.0, 1.0), None
    if scale is not None:
        four = numbers(scale, op, "scale", (2, 4), "(from, to), or (from, to) of x and of y")
        zoom_x = interval(four[:2], op, "scale", low=0.0, open_low=True)
        if len(four) == 4:
            zoom_y = interval(four[2:], op, "scale", low=0.0, open_low=True)
    move = (0.0, 0.0)
    if translate is not None:
        if is_sequence(translate):
            x, y = numbers(translate, op, "translate", (2,), "a number, or one for x and one for y")
        else:
            x = y = number(translate, op, "translate")
        move = (x, y)
        if not 0 <= min(move) <= max(move) <= 1:
            raise ValueError(
                f"fusereg.{op}: translate must be within [0, 1], a share of the image, got {move}"
            )
    shear_x = shear_y = (0.0, 0.0)
    if shear is not None:
        if is_sequence(shear):
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


def check_mix(mix: object, op: str) -> Mix | None:
    """Return the mixing that an argument names."""
    if mix is None or isinstance(mix, Mix):
        return mix
    if one_of(mix, op, "mix", ("mixup", "cutmix")) == "mixup":
        return Mix(mixup=0.2)
    return Mix(cutmix=1.0)
