"""Rows of the inventory: augmentation, geometry, values, erasing and mixing in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ..core.inventory import Inputs, Operation, Pairs, Shape, exact
from . import functional
from .augment import Augment
from .compose import Compose
from .transforms import ColorJitter

#: RGB images; their sides are multiples of 3, so that two thirds of them are whole.
_SHAPES: dict[str, Shape] = {
    "tiny": (2, 3, 6, 6),
    "small": (3, 3, 15, 21),
    "large": (16, 3, 63, 45),
    "empty": (0, 3, 15, 21),
}
_NORMALIZE: Any = {"mean": (0.5, 0.25, -0.125), "std": (0.5, 2.0, 0.75)}
#: Few bits, so that coordinates are exact on both sides.
_MATRIX = ((0.875, -0.25, 3.0625), (0.3125, 1.125, -2.5))
_HOMOGRAPHY = (*_MATRIX, (0.0078125, -0.015625, 1.0))


def _normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in _NORMALIZE.values())
    return (x - mean) / std


def _cropped(x: Tensor) -> Tensor:
    return _normalized(x[:, :, 2:6, 1:6].flip(3))


def _levels(inputs: Inputs) -> Tensor:
    images = exact([inputs.normal(*_SHAPES[inputs.size])])[0]
    return (images * 60 + 128).clamp(0, 255).to(torch.uint8)


def _bytes(inputs: Inputs) -> Pairs:
    x = _levels(inputs)
    # The arithmetic of uint8 is float32.
    dtype = torch.float32 if inputs.dtype == torch.float64 else inputs.dtype
    size = tuple(x.shape[2:])
    came = functional.crop_flip_normalize(x.to(inputs.device), size, **_NORMALIZE, out_dtype=dtype)
    return [(came, _normalized(x.double() / 255))]


def _warped(x: Tensor, matrix: Tensor) -> Tensor:
    h, w = x.shape[2:]
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack((u, v, torch.ones_like(u)), dim=2).double() @ matrix.t()
    if len(matrix) == 3:
        places = places[..., :2] / places[..., 2:]
    grid = (2.0 * places + 1.0) / torch.tensor([w, h]) - 1.0
    if not len(x):
        return x.clone()
    return grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


def _erased(x: Tensor, boxes: Tensor) -> Tensor:
    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[3:9, 4:11] = True
    return torch.where(inside, 0.75, x)


def _with(argument: Callable[[int], Tensor]) -> Any:
    """Return a maker of an image batch and a constant argument, made from the batch size."""
    return lambda inputs, shape: [inputs.normal(*shape), argument(shape[0]).to(inputs.device)]


def _chain(inputs: Inputs) -> Pairs:
    h, w = (side - 2 for side in _SHAPES[inputs.size][2:])
    chain = Augment((h, w), hflip=1.0, vflip=1.0, crop="center", **_NORMALIZE)
    row = Operation(
        name="augment.Augment",
        formula="",
        function=chain.forward,
        reference=lambda x: _normalized(x[:, :, 1 : 1 + h, 1 : 1 + w].flip(2, 3)),
    )
    return row.compare([inputs.normal(*_SHAPES[inputs.size])])


def _list(inputs: Inputs) -> Pairs:
    h, w = _SHAPES[inputs.size][2:]
    images = exact([inputs.normal(3, h + 2 * i, w + 4 * i) for i in range(2)])
    chain = Augment((h - 2, w - 2), hflip=1.0, crop="center", **_NORMALIZE)
    came, _ = chain.collate([(x.to(inputs.dtype).to(inputs.device), 0) for x in images])
    cuts = [x[None, :, i + 1 : i + h - 1, 2 * i + 1 : 2 * i + w - 1] for i, x in enumerate(images)]
    return [(came, _normalized(torch.cat(cuts).double().flip(3)))]


def _program(inputs: Inputs) -> Pairs:
    x = _levels(inputs)
    jitter = ColorJitter(brightness=(1.25, 1.25))
    came = Compose([jitter], out_dtype=torch.uint8)(x.to(inputs.device))
    wanted = (x.double() * 1.25).clamp(0, 255).floor()
    return [(came.to(inputs.dtype), wanted.to(inputs.dtype).double())]


_row = partial(Operation, shapes=_SHAPES)

OPERATIONS = [
    _row(
        name="augment.crop_flip_normalize",
        formula="(a window, mirrored - mean) / std",
        function=functional.crop_flip_normalize,
        options={"size": (4, 5), "top": 2, "left": 1, "hflip": True, **_NORMALIZE},
        reference=_cropped,
    ),
    _row(
        name="augment.crop_flip_normalize, uint8",
        formula="the same of x / 255",
        function=functional.crop_flip_normalize,
        pairs=_bytes,
    ),
    _row(
        name="augment.resize",
        formula="interpolate(x, antialias=True)",
        function=functional.resize,
        options={"size": (10, 14)},
        reference=lambda x: interpolate(x, (10, 14), mode="bilinear", antialias=True),
    ),
    _row(
        name="augment.resize, bicubic",
        formula="interpolate(x, antialias=True), other sides",
        function=functional.resize,
        options={"size": (19, 7), "interpolation": "bicubic"},
        reference=lambda x: interpolate(x, (19, 7), mode="bicubic", antialias=True),
    ),
    _row(
        name="augment.warp_affine",
        formula="grid_sample(x, M (u, v, 1)^T)",
        function=functional.warp_affine,
        tensors=_with(lambda n: torch.tensor(_MATRIX, dtype=torch.float64)),
        arguments=("x", "matrix"),
        constants=("matrix",),
        reference=_warped,
    ),
    _row(
        name="augment.warp_perspective",
        formula="grid_sample(x, H (u, v, 1)^T, divided by its third)",
        function=functional.warp_perspective,
        tensors=_with(lambda n: torch.tensor(_HOMOGRAPHY, dtype=torch.float64)),
        arguments=("x", "matrix"),
        constants=("matrix",),
        reference=_warped,
    ),
    _row(
        name="augment.erase",
        formula="a box of each image overwritten",
        function=functional.erase,
        tensors=_with(lambda n: torch.tensor([[4, 3, 11, 9]]).expand(n, 4)),
        arguments=("x", "boxes"),
        options={"value": 0.75},
        reference=_erased,
    ),
    _row(
        name="augment.mix",
        formula="lam * x_i + (1 - lam) * x_j",
        function=functional.mix,
        tensors=_with(lambda n: torch.arange(n).roll(1)),
        arguments=("x", "partner"),
        options={"lam": 0.6875},
        reference=lambda x, partner: 0.6875 * x + 0.3125 * x[partner],
    ),
    _row(
        name="augment.Augment",
        formula="drawn in the kernel: flips that are certain, center crop",
        function=Augment,
        pairs=_chain,
    ),
    _row(
        name="augment.Augment, a list",
        formula="center crops of a list of images",
        function=Augment,
        pairs=_list,
    ),
    _row(
        name="augment.ColorJitter",
        formula="a program of one operation: min(floor(5/4 x), 255)",
        function=ColorJitter,
        pairs=_program,
    ),
]
