"""Benchmark of data augmentation against the ways in which it is usually done.

The work takes a batch of 64 uint8 images, 3 x 224 x 224, to normalized 192 x 192 (both layouts):

- ``warp``: rotated by up to 15 degrees, scaled by 0.8 to 1.2, flipped with probability 0.5, cropped
  at random, normalized;
- ``crop``: cropped at random, flipped with probability 0.5, normalized;
- ``resize``: 384 x 384 to 224 x 224, bilinear with antialiasing, normalized.

And the recipes that people train with (fusereg.augment.recipes), of 64 (quick: 8) uint8 images:

- ``recipe``: 400 x 500, RandomResizedCrop(224), flip, normalized;
- ``rotation``: the same with a rotation by up to 15 degrees, after the crop; ``Augment`` is
  ``Augment(224, crop="resized", degrees=15)``, whose one matrix turns before it crops;
- ``lsj``: 400 x 500, ScaleJitter(0.1 to 2) and RandomCrop(512) as for detection, flip, in [0, 1];
- ``scales``: 400 x 500, RandomShortestSize(240, 256, ... 400), flip, Resize(320), in [0, 1];
- ``augmix``: 224 x 224, torchvision's AugMix, in [0, 1];
- ``recipe list``: the same as ``recipe`` for images of 300 to 600 pixels in a list, as
  ``collate`` gets them;
- ``evaluation``: 400 x 500, Resize(256), CenterCrop(224), normalized;
- ``segmentation``: 400 x 500 and their masks, RandomResize(160 to 639), flip, RandomCrop(288),
  normalized.
- ``policy``: 224 x 224, RandomResizedCrop(224), flip, TrivialAugmentWide (bilinear), normalized,
  one in ten erased, as torchvision trains;
- ``timm``: 224 x 224, timm's recipe with "rand-m9-mstd0.5-inc1-mmax9", one in four erased by noise.
  The levels end at 9 on both sides: at 10, timm posterizes to 0 bits, an error since Pillow 13.
  Each operation draws bilinear or bicubic on both; timm's crop does as well, ours is bicubic.

By contract each byte of the input (``crop``: of the windows) is read once and each element of the
result written once. Images a second are 64 (quick: 8) over the time. Providers:

- ``eager``: the composed matrices, one ``grid_sample`` of the images as floats, normalized; for
  ``crop`` a loop of slices and flips, stacked, and normalized; for ``resize`` torch's
  ``interpolate`` of the images as floats.
- ``interpolate uint8``: that of the bytes, which torch rounds after each pass.
- ``kornia``, ``torchvision v2``: their transforms, with different parameters for each sample (the
  latter in a loop over the images; kornia's policy draws one operation for the batch, with a
  strength for each image). torchvision's transforms need none of its C++ operators; where
  those are missing, stand-ins are declared so that it can be imported.
- ``timm``: ``timm.data.create_transform``, image by image, of PIL's images.
- ``cv2``, ``cv2 x 2``: ``warpAffine`` with the composed matrices, image by image, on one thread and
  on two.
- ``fusereg``: ``warp_affine``, ``crop_flip_normalize`` or ``resize``, given the same parameters as
  eager; the recipe, which draws them.
- ``Augment``: ``fusereg.augment.Augment``, which also draws the parameters.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusereg import augment

from ..harness import EAGER, Accuracy, Call, Case, Options, Provider, Workload
from ..harness.layers import FORWARD, relative_error, results, timed, tolerances

UINT8, KORNIA, TORCHVISION, PIL = "interpolate uint8", "kornia", "torchvision v2", "timm"
PROVIDERS = (EAGER, UINT8, KORNIA, TORCHVISION, PIL, "cv2", "cv2 x 2", "fusereg", "Augment")

SIDE, SIZE = 224, 192
LARGE, SMALL = 384, 224  # resize
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARP, CROP, RESIZE = "warp", "crop", "resize"
RECIPE, LIST, EVALUATION, SEGMENTATION = "recipe", "recipe list", "evaluation", "segmentation"
ROTATION, DEGREES = "rotation", 15
LSJ, SCALES, AUGMIX = "lsj", "scales", "augmix"
#: The sides of the results that are not SMALL.
_SIDES = {"segmentation": 288, "lsj": 512, "scales": 320}
POLICY, TIMM = "policy", "timm"
PHOTO, BASE = (400, 500), 320

# grid_sample has float32 coordinates over the whole image.
_STRING = "rand-m9-mstd0.5-inc1-mmax9"
_TOLERANCE = tolerances(1e-5, 1e-4, 2e-3, 1.6e-2)


def cases(options: Options) -> list[Case]:
    """Return both layouts in each mode and each dtype of the result."""
    batch = 8 if options.quick else 64
    layouts = {"": torch.contiguous_format, " nhwc": torch.channels_last}

    def case(mode: str, name: str, layout: torch.memory_format, dtype: torch.dtype) -> Case:
        side, size = (LARGE, SMALL) if mode == RESIZE else (SIDE, SIZE)
        elements = batch * 3 * size * size
        read = elements if mode == CROP else batch * 3 * side * side
        return Case(
            op="augment",
            mode=mode,
            shape=f"{batch}x3x{side}x{side}{name}",
            dtype=dtype,
            device=options.device,
            tensors=1,
            elements=elements,
            bytes_moved=read + elements * dtype.itemsize,
            # float32 and float64 copies of images and results, grids, and the checks' references.
            memory=batch * 3 * side * side * 64,
            setup=functools.partial(_setup, batch, layout, mode, dtype, options),
        )

    return [
        case(mode, name, layout, dtype)
        for mode in (WARP, CROP, RESIZE)
        for name, layout in layouts.items()
        for dtype in options.dtypes
    ] + [
        _recipe_case(mode, batch, name, layout, options)
        for mode in (
            *(RECIPE, ROTATION, LIST, EVALUATION, SEGMENTATION, LSJ, SCALES, AUGMIX, POLICY, TIMM),
        )
        for name, layout in layouts.items()
        if mode not in (LIST, *_LISTED) or not (name or options.device.type == "cuda")
    ]


def _recipe_case(
    mode: str, batch: int, name: str, layout: torch.memory_format, options: Options
) -> Case:
    """Return the case of a recipe; its result is float32."""
    small = dict.fromkeys((POLICY, TIMM, AUGMIX), (SIDE, SIDE))
    height, width = {LIST: (450, 450), **small}.get(mode, PHOTO)
    side = _SIDES.get(mode, SMALL)
    elements = batch * 3 * side * side
    setup = _setup_listed if mode in _LISTED else _setup_recipe
    setup = _setup_policy if mode in (POLICY, TIMM) else setup
    shape = f"{batch}x3x300-600" if mode == LIST else f"{batch}x3x{height}x{width}{name}"
    return Case(
        op="augment",
        mode=mode,
        shape=shape,
        dtype=torch.float32,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=batch * 3 * height * width + elements * 4,
        memory=batch * 3 * height * width * 64,
        setup=functools.partial(setup, mode, batch, layout, options),
    )


def _smooth(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return smooth images, as photographs are."""
    coarse = torch.rand(n, 3, 16, 16, generator=generator) * 255
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)


def _setup_recipe(mode: str, batch: int, layout: torch.memory_format, options: Options) -> Workload:
    generator = torch.Generator().manual_seed(0)
    side = _SIDES.get(mode, SMALL)
    images: list[Tensor]
    if mode == LIST:
        sizes = torch.randint(300, 601, (batch, 2), generator=generator).tolist()
        images = [_smooth(1, h, w, generator)[0] for h, w in sizes]
        x = None
    else:
        x = _smooth(batch, *PHOTO, generator).to(options.device).contiguous(memory_format=layout)
        images = list(x)
    masks = [(image[0] > 128).long() for image in images] if mode == SEGMENTATION else None

    def ours() -> Callable[[], Tensor]:
        classify = augment.recipes.torchvision_classification
        if mode == LIST:
            chain = classify(SMALL)
            return lambda: chain.collate(images)
        if mode == ROTATION:
            steps = [augment.RandomResizedCrop(SMALL), augment.RandomRotation(DEGREES, "bilinear")]
            steps += [augment.RandomHorizontalFlip(), augment.Normalize(MEAN, STD)]
            turns = augment.Compose(steps)
            return lambda: turns(x)
        if mode != SEGMENTATION:
            chain = classify(SMALL, train=mode == RECIPE)
            return lambda: chain(x)
        chain = augment.recipes.segmentation(side, base=BASE)
        if importlib.util.find_spec("torchvision") is None:
            return lambda: chain(x)  # there are no masks
        torchvision_transforms()
        tv = importlib.import_module("torchvision.tv_tensors")
        labels = tv.Mask(torch.stack(masks or []))
        return lambda: chain(x, labels)[0]

    def turned_first() -> Callable[[], Tensor]:
        how: Any = {"crop": "resized", "hflip": 0.5, "mean": MEAN, "std": STD}
        turn = augment.Augment(SMALL, degrees=DEGREES, **how)
        return lambda: turn(x)

    def theirs() -> Callable[[], Tensor]:
        v2 = torchvision_transforms()
        tv = importlib.import_module("torchvision.tv_tensors")
        end = [v2.ToDtype({tv.Image: torch.float32, "others": None}, scale=True)]
        end += [v2.Normalize(MEAN, STD)]
        if mode == SEGMENTATION:
            fill = {tv.Image: 0, tv.Mask: 255, "others": 0}
            steps = [v2.RandomResize(BASE // 2, BASE * 2), v2.RandomHorizontalFlip(0.5)]
            steps += [v2.RandomCrop(side, pad_if_needed=True, fill=fill)]
            chain = v2.Compose(steps + end)
            typed = [(tv.Image(i), tv.Mask(m)) for i, m in zip(images, masks or [], strict=True)]

            def both() -> Tensor:
                pairs = [chain(*pair) for pair in typed]
                torch.stack([mask for _, mask in pairs])
                return torch.stack([image for image, _ in pairs])

            return both
        steps = [v2.RandomResizedCrop(SMALL, antialias=True), v2.RandomHorizontalFlip(0.5)]
        if mode == ROTATION:
            bilinear = v2.InterpolationMode.BILINEAR
            steps.insert(1, v2.RandomRotation(DEGREES, interpolation=bilinear))
        if mode == EVALUATION:
            steps = [v2.Resize(256, antialias=True), v2.CenterCrop(SMALL)]
        chain = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        return lambda: torch.stack([chain(image) for image in images])

    def kornia() -> Callable[[], Tensor]:
        import kornia.augmentation as K

        steps = [K.RandomResizedCrop((SMALL, SMALL)), K.RandomHorizontalFlip(p=0.5)]
        if mode == ROTATION:
            steps.insert(1, K.RandomRotation(float(DEGREES), p=1.0))
        chain = torch.nn.Sequential(*steps, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
        if x is None:
            raise AssertionError
        return lambda: chain(x.float() / 255)

    mean, std = (torch.tensor(v, device=options.device)[:, None, None] for v in (MEAN, STD))
    shares = (0.3 + 0.7 * torch.rand(batch, generator=generator)).tolist()
    angles = ((torch.rand(batch, generator=generator) * 2 - 1) * math.radians(DEGREES)).tolist()

    def resized(image: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]

    def turned(image: Tensor, angle: float) -> Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[[cos, sin, 0.0], [-sin, cos, 0.0]]], device=options.device)
        grid = F.affine_grid(matrix, [1, 3, side, side], align_corners=False)
        return F.grid_sample(image[None].float(), grid, align_corners=False)[0]

    def eager(image: Tensor, share: float, angle: float) -> Tensor:
        """Return an image by functions of torch, with windows in the corner."""
        height, width = image.shape[1:]
        if mode in (RECIPE, ROTATION, LIST):
            window = image[:, : int(height * share), : int(width * share)]
            small = resized(window, side, side)
            return (turned(small, angle) if mode == ROTATION else small).flip(2)
        short = 256 if mode == EVALUATION else int(2 * BASE * share)
        ratio = short / min(height, width)
        whole = resized(image, int(height * ratio), int(width * ratio))
        gap = [max(0, side - whole.shape[2]), max(0, side - whole.shape[1])]
        return F.pad(whole, (0, gap[0], 0, gap[1]))[:, :side, :side]

    def loop() -> Tensor:
        each = zip(images, shares, angles, strict=True)
        y = torch.stack([eager(*sample) for sample in each])
        if masks is not None:
            torch.stack([mask[:side, :side] for mask in masks])
        return (y / 255 - mean) / std

    providers = [
        _provider(EAGER, lambda: loop, "functions of torch, image by image"),
        _provider("fusereg", ours, _DRAWS),
    ]
    if mode == ROTATION:
        providers.append(_provider("Augment", turned_first, "one interpolation"))
    if importlib.util.find_spec("torchvision") is not None:
        providers.insert(1, _provider(TORCHVISION, theirs, "image by image"))
    if mode in (RECIPE, ROTATION) and importlib.util.find_spec("kornia") is not None:
        providers.insert(1, _provider(KORNIA, kornia, "without antialiasing"))
    return Workload(providers, lambda call: _spread(call, batch, side))


def _spread(call: Call, batch: int, side: int) -> Accuracy:
    """Check random results by their shape and spread."""
    (result,) = results(call)
    if tuple(result.shape) != (batch, 3, side, side):
        return Accuracy(math.inf, 0.0, f"result of shape {tuple(result.shape)}")
    return _of_spread(result, 0.0)


def _of_spread(result: Tensor, tolerance: float) -> Accuracy:
    spread = float(result.double().std())
    return Accuracy(0.0 if 0.3 < spread < 3.0 else math.inf, tolerance, "spread")


class _Data:
    """The images, and the parameters of each."""

    def __init__(
        self,
        batch: int,
        layout: torch.memory_format,
        dtype: torch.dtype,
        device: torch.device,
        side: int,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def uniform(low: float, high: float) -> Tensor:
            numbers = torch.rand(batch, generator=generator, dtype=torch.float64)
            return low + (high - low) * numbers

        # Smooth: on noise, a small error of a coordinate would be a large one.
        self.x = _smooth(batch, side, side, generator).to(device).contiguous(memory_format=layout)
        self.dtype, self.layout = dtype, layout
        self.top = uniform(0, SIDE - SIZE + 1).long()
        self.left = uniform(0, SIDE - SIZE + 1).long()
        self.flip = uniform(0, 1) < 0.5
        angle, zoom = uniform(-15, 15).deg2rad(), uniform(0.8, 1.2)
        center = (SIDE - 1) / 2
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        mirror = 1.0 - 2.0 * self.flip
        # Output pixel, to the window (mirrored), to the image rotated about its center.
        start_x = self.left + self.flip * (SIZE - 1) - center
        start_y = self.top - center
        rows = [
            torch.stack([cos * mirror, -sin, cos * start_x - sin * start_y + center], 1),
            torch.stack([sin * mirror, cos, sin * start_x + cos * start_y + center], 1),
        ]
        self.matrix = torch.stack(rows, 1).to(device)
        self.mean = torch.tensor(MEAN, device=device)[:, None, None]
        self.std = torch.tensor(STD, device=device)[:, None, None]

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype of the computation."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def normalized(self, v: Tensor) -> Tensor:
        """Normalize images in [0, 255], in the dtype and layout of the result."""
        y = (v / 255 - self.mean) / self.std
        return y.to(self.dtype).contiguous(memory_format=self.layout)

    def exact(self, count: int) -> _Data:
        """Return the first images, in float64."""
        few = _Data.__new__(_Data)
        first = {n: getattr(self, n)[:count] for n in ("x", "top", "left", "flip", "matrix")}
        few.__dict__.update(self.__dict__, **first, dtype=torch.float64)
        return few


def _setup(
    batch: int, layout: torch.memory_format, mode: str, dtype: torch.dtype, options: Options
) -> Workload:
    data = _Data(batch, layout, dtype, options.device, LARGE if mode == RESIZE else SIDE)
    providers = {WARP: _warps, CROP: _crops, RESIZE: _resizes}[mode](data)
    return Workload(providers, lambda call: _check(data, mode, call))


def _setup_policy(mode: str, batch: int, layout: torch.memory_format, options: Options) -> Workload:
    """Return the recipe with a policy of each image, beside its own library's."""
    x = _smooth(batch, SIDE, SIDE, torch.Generator().manual_seed(0)).to(options.device)
    x = x.contiguous(memory_format=layout)

    def ours() -> Callable[[], Tensor]:
        if mode == POLICY:
            chain = augment.recipes.torchvision_classification(SMALL, policy="ta_wide", erase=0.1)
        else:
            chain = augment.recipes.timm_imagenet(_STRING, SMALL, reprob=0.25, remode="pixel")
        return lambda: chain(x)

    def torchvision() -> Callable[[], Tensor]:
        v2 = torchvision_transforms()
        end = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.1),
        ]
        start = [v2.RandomResizedCrop(SMALL, antialias=True), v2.RandomHorizontalFlip(0.5)]
        wide = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
        chain = v2.Compose([*start, wide, *end])
        return lambda: torch.stack([chain(image) for image in x])

    def kornia() -> Callable[[], Tensor]:
        import kornia.augmentation as K
        from kornia.augmentation.auto import TrivialAugment

        chain = torch.nn.Sequential(
            K.RandomResizedCrop((SMALL, SMALL)),
            K.RandomHorizontalFlip(p=0.5),
            TrivialAugment(),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
            K.RandomErasing(p=0.1),
        )
        return lambda: chain(x.float() / 255)

    def timm() -> Callable[[], Tensor]:
        torchvision_transforms()  # timm imports torchvision
        image = importlib.import_module("PIL.Image")
        create = importlib.import_module("timm.data").create_transform
        how = {"re_prob": 0.25, "re_mode": "pixel", "interpolation": "random"}
        chain = create(SMALL, is_training=True, auto_augment=_STRING, color_jitter=None, **how)
        images = [image.fromarray(one.permute(1, 2, 0).contiguous().cpu().numpy()) for one in x]
        return lambda: torch.stack([chain(one) for one in images])

    providers = [_provider("fusereg", ours, _DRAWS)]
    theirs, name, package = (
        (torchvision, TORCHVISION, "torchvision") if mode == POLICY else (timm, PIL, "timm")
    )
    if importlib.util.find_spec(package) is not None:
        providers.insert(0, _provider(name, theirs, "image by image"))
    if mode == POLICY and importlib.util.find_spec("kornia") is not None:
        note = "one operation for the batch, without antialiasing"
        providers.insert(0, _provider(KORNIA, kornia, note))
    return Workload(providers, lambda call: _spread(call, batch, SMALL))


#: torchvision's own transforms, in its Compose and in ours.
_LISTED: dict[str, Callable[[Any], list[Any]]] = {
    LSJ: lambda v2: [
        v2.ScaleJitter((512, 512), (0.1, 2.0)),
        v2.RandomCrop(512, pad_if_needed=True),
        v2.RandomHorizontalFlip(0.5),
    ],
    SCALES: lambda v2: [
        v2.RandomShortestSize(list(range(240, 401, 16))),
        v2.RandomHorizontalFlip(0.5),
        v2.Resize((320, 320)),
    ],
    AUGMIX: lambda v2: [v2.AugMix()],
}


def _setup_listed(mode: str, batch: int, layout: torch.memory_format, options: Options) -> Workload:
    size = (SIDE, SIDE) if mode == AUGMIX else PHOTO
    x = _smooth(batch, *size, torch.Generator().manual_seed(0)).to(options.device)

    def steps() -> list[Any]:
        v2 = torchvision_transforms()
        return [*_LISTED[mode](v2), v2.ToDtype(torch.float32, scale=True)]

    def ours() -> Callable[[], Tensor]:
        chain = augment.Compose(steps())
        return lambda: chain(x)

    def theirs() -> Callable[[], Tensor]:
        chain = torchvision_transforms().Compose(steps())
        return lambda: torch.stack([chain(image) for image in x])

    providers = []
    if importlib.util.find_spec("torchvision") is not None:
        providers = [
            _provider(TORCHVISION, theirs, "image by image"),
            _provider("fusereg", ours, _DRAWS),
        ]
    return Workload(providers, lambda call: _shaped(call, batch, _SIDES.get(mode, SMALL)))


def _shaped(call: Call, batch: int, side: int) -> Accuracy:
    """Check random results in [0, 1] by their shape."""
    (result,) = results(call)
    good = tuple(result.shape) == (batch, 3, side, side) and bool((result >= 0).all())
    return Accuracy(0.0 if good and float(result.max()) < 1.0001 else math.inf, 0.0, "shape")


# --- providers ------------------------------------------------------------------------------------

_DRAWS = "draws its own parameters"


def _provider(name: str, make: Callable[[], Callable[..., Tensor]], note: str = "") -> Provider:
    """Return the provider of what ``make`` makes, called without gradients."""
    return Provider(name, lambda: timed(FORWARD)(make()), note=note)


def _augment(data: _Data, **changes: Any) -> Provider:
    """Return the provider of the module, which draws the parameters itself."""
    module = augment.Augment(SIZE, hflip=0.5, mean=MEAN, std=STD, out_dtype=data.dtype, **changes)
    return _provider("Augment", lambda: lambda: module(data.x), _DRAWS)


def _fused(data: _Data, function: Callable[..., Tensor], *args: Any, **options: Any) -> Provider:
    """Return the provider of one function of fusereg, given the parameters."""
    call = functools.partial(
        function, data.x, *args, **options, mean=MEAN, std=STD, out_dtype=data.dtype
    )
    return _provider("fusereg", lambda: call)


def _warps(data: _Data) -> list[Provider]:
    return [
        _provider(EAGER, lambda: lambda: _warp(data), "composed matrices, one grid_sample"),
        *_kornia(data, WARP),
        *_torchvision(data, WARP),
        *_cv2(data),
        _fused(data, augment.warp_affine, data.matrix, SIZE),
        _augment(data, degrees=15, scale=(0.8, 1.2)),
    ]


def _crops(data: _Data) -> list[Provider]:
    parameters = {"top": data.top, "left": data.left, "hflip": data.flip}
    return [
        _provider(EAGER, lambda: lambda: _crop(data), "a loop of slices and flips"),
        *_kornia(data, CROP),
        *_torchvision(data, CROP),
        _fused(data, augment.crop_flip_normalize, SIZE, **parameters),
        _augment(data),
    ]


def _resizes(data: _Data) -> list[Provider]:
    found = [
        _provider(EAGER, lambda: lambda: _resize(data), "interpolate of floats"),
        _provider(UINT8, lambda: lambda: _resize(data, True), "rounded after each pass"),
        _fused(data, augment.resize, SMALL),
    ]
    return [found[0], found[2]] if data.x.is_cuda else found


def _warp(data: _Data) -> Tensor:
    dtype = data.wide
    steps = torch.arange(SIZE, dtype=dtype, device=data.x.device)
    m = data.matrix.to(dtype)[:, None, None]
    col, row = steps[None, None, :], steps[None, :, None]
    grid = torch.stack([m[..., i, 0] * col + m[..., i, 1] * row + m[..., i, 2] for i in (0, 1)], -1)
    grid = (2 * grid + 1) / SIDE - 1
    return data.normalized(F.grid_sample(data.x.to(dtype), grid, align_corners=False))


def _crop(data: _Data) -> Tensor:
    views = []
    for image, t, s, flip in zip(
        data.x, data.top.tolist(), data.left.tolist(), data.flip.tolist(), strict=True
    ):
        view = image[:, t : t + SIZE, s : s + SIZE]
        views.append(view.flip(2) if flip else view)
    return data.normalized(torch.stack(views))


def _resize(data: _Data, rounded: bool = False) -> Tensor:
    x = data.x if rounded else data.x.to(data.wide)
    return data.normalized(F.interpolate(x, SMALL, mode="bilinear", antialias=True))


def _kornia(data: _Data, mode: str) -> list[Provider]:
    if importlib.util.find_spec("kornia") is None:
        return []

    def make() -> Callable[[], Tensor]:
        import kornia.augmentation as K

        steps = [
            K.RandomHorizontalFlip(p=0.5),
            K.RandomCrop((SIZE, SIZE)),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        ]
        if mode == WARP:
            steps.insert(0, K.RandomAffine(15.0, scale=(0.8, 1.2), p=1.0))
        chain = torch.nn.Sequential(*steps)
        return lambda: chain(data.x.float() / 255).to(data.dtype)

    return [_provider(KORNIA, make, _DRAWS)]


def _torchvision(data: _Data, mode: str) -> list[Provider]:
    if importlib.util.find_spec("torchvision") is None:
        return []

    def make() -> Callable[[], Tensor]:
        v2 = torchvision_transforms()
        steps = [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomCrop(SIZE),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
        if mode == WARP:
            bilinear = v2.InterpolationMode.BILINEAR
            steps.insert(0, v2.RandomAffine(15, scale=(0.8, 1.2), interpolation=bilinear))
        chain = v2.Compose(steps)
        return lambda: torch.stack([chain(image) for image in data.x]).to(data.dtype)

    return [_provider(TORCHVISION, make, _DRAWS)]


def torchvision_transforms() -> Any:
    """Import torchvision.transforms.v2, even if torchvision's C++ operators are missing.

    Its transforms need none of them, but importing it does: each missing operator is declared,
    without code, one after the other.
    """
    while True:
        try:
            return importlib.import_module("torchvision.transforms.v2")
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if lacking is None or lacking[1] in _stand_ins:
                raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{lacking[1]}() -> ()")
        _stand_ins[lacking[1]] = library
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


#: The declarations end with these objects.
_stand_ins: dict[str, torch.library.Library] = {}


def _cv2(data: _Data) -> list[Provider]:
    if importlib.util.find_spec("cv2") is None or data.x.is_cuda:
        return []

    def make(threads: int) -> Callable[[], Tensor]:
        import numpy as np

        cv2 = importlib.import_module("cv2")

        cv2.setNumThreads(1)
        images = data.x.permute(0, 2, 3, 1).contiguous().numpy()
        matrices = data.matrix.numpy()
        scale = (1 / (255 * np.array(STD))).astype(np.float32)
        shift = (-np.array(MEAN) / np.array(STD)).astype(np.float32)
        y = np.empty((len(images), SIZE, SIZE, 3), np.float32)

        def one(i: int) -> None:
            warped = cv2.warpAffine(
                images[i], matrices[i], (SIZE, SIZE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            )
            np.multiply(warped, scale, out=y[i])
            np.add(y[i], shift, out=y[i])

        pool = ThreadPoolExecutor(threads)

        def call() -> Tensor:
            list(pool.map(one, range(len(images))))
            result = torch.from_numpy(y).permute(0, 3, 1, 2)
            return result.to(data.dtype).contiguous(memory_format=data.layout)

        return call

    note = "weights of 5 bits"
    return [
        _provider("cv2", functools.partial(make, 1), note),
        _provider("cv2 x 2", functools.partial(make, 2), note),
    ]


# --- checks ---------------------------------------------------------------------------------------


def _check(data: _Data, mode: str, call: Call) -> Accuracy:
    """Check the first images against float64; random ones by their shape and spread."""
    (result,) = results(call)
    size = SMALL if mode == RESIZE else SIZE
    shape = (data.x.shape[0], 3, size, size)
    if tuple(result.shape) != shape or result.dtype is not data.dtype:
        return Accuracy(math.inf, 0.0, f"result of shape {tuple(result.shape)}")
    few = data.exact(4)
    exact = {WARP: _warp, CROP: _crop, RESIZE: _resize}
    error = relative_error([result[:4]], [exact[mode](few)])
    tolerance = _TOLERANCE[data.dtype]
    if error <= 0.05:
        # cv2's weights are multiples of 1/32; torch resizes bytes to bytes.
        return Accuracy(error, max(tolerance, 0.01), "the first images")
    return _of_spread(result, tolerance)
