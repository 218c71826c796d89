"""Augmentation: a chain of geometry, values, erasing and mixing in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusereg import augment
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.cli.checks._masks import result_and_gradients

_MEAN, _STD = (0.5, 0.25, -0.125), (0.5, 2.0, 0.75)


def _images(inputs: Inputs) -> Tensor:
    """RGB images; their sides are multiples of 3, so that two thirds of them are whole."""
    return inputs.normal(*((16, 3, 63, 45) if inputs.large else (3, 3, 15, 21)))


def _normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (_MEAN, _STD))
    return (x - mean) / std


@kernel_check("augment.crop_flip_normalize", "(a window, mirrored - mean) / std")
def _crop(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    h, w = x.shape[2] - 4, x.shape[3] - 3

    def wanted(t: Tensor) -> Tensor:
        return _normalized(t[:, :, 2 : 2 + h, 1 : 1 + w].flip(3))

    def call(t: Tensor) -> Tensor:
        return augment.crop_flip_normalize(
            t, (h, w), top=2, left=1, hflip=True, mean=_MEAN, std=_STD
        )

    return result_and_gradients(call, wanted, [x])


@kernel_check("augment.crop_flip_normalize, uint8", "the same of x / 255")
def _bytes(inputs: Inputs) -> Pairs:
    x = ((exact([_images(inputs)])[0] * 60 + 128).clamp(0, 255)).to(torch.uint8)
    # Of uint8 the arithmetic is float32.
    dtype = torch.float32 if inputs.dtype == torch.float64 else inputs.dtype
    came = augment.crop_flip_normalize(
        x.to(inputs.device), tuple(x.shape[2:]), mean=_MEAN, std=_STD, out_dtype=dtype
    )
    return [(came, _normalized(x.double() / 255))]


@kernel_check("augment.resize", "interpolate(x, antialias=True)")
def _resize(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    size = (x.shape[2] // 3 * 2, x.shape[3] // 3 * 2)
    return result_and_gradients(
        lambda t: augment.resize(t, size),
        lambda t: torch.nn.functional.interpolate(t, size, mode="bilinear", antialias=True),
        [x],
    )


@kernel_check("augment.resize, bicubic", "interpolate(x, antialias=True), other sides")
def _cubic(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    size = (x.shape[2] + 4, x.shape[3] // 3)
    return result_and_gradients(
        lambda t: augment.resize(t, size, interpolation="bicubic"),
        lambda t: torch.nn.functional.interpolate(t, size, mode="bicubic", antialias=True),
        [x],
    )


@kernel_check("augment.warp_affine", "grid_sample(x, M (u, v, 1)^T)")
def _warp(inputs: Inputs) -> Pairs:
    """The matrix has few bits, so that coordinates are exact on both sides."""
    x = _images(inputs)
    h, w = x.shape[2:]
    matrix = torch.tensor([[0.875, -0.25, 3.0625], [0.3125, 1.125, -2.5]], dtype=torch.float64)
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack((u, v, torch.ones_like(u)), dim=2).double() @ matrix.t()
    grid = (2.0 * places + 1.0) / torch.tensor([w, h]) - 1.0

    def wanted(t: Tensor) -> Tensor:
        return torch.nn.functional.grid_sample(
            t, grid.expand(len(t), -1, -1, -1), align_corners=False
        )

    return result_and_gradients(lambda t: augment.warp_affine(t, matrix.to(t.device)), wanted, [x])


@kernel_check("augment.erase", "a box of each image overwritten")
def _erase(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    box = torch.tensor([[4, 3, 11, 9]]).expand(len(x), 4)

    def wanted(t: Tensor) -> Tensor:
        inside = torch.zeros(t.shape[2:], dtype=torch.bool)
        inside[3:9, 4:11] = True
        return torch.where(inside, 0.75, t)

    return result_and_gradients(lambda t: augment.erase(t, box.to(t.device), 0.75), wanted, [x])


@kernel_check("augment.mix", "lam * x_i + (1 - lam) * x_j")
def _mix(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    partner = torch.arange(len(x)).roll(1)
    return result_and_gradients(
        lambda t: augment.mix(t, partner.to(t.device), 0.6875),
        lambda t: 0.6875 * t + 0.3125 * t[partner],
        [x],
    )


@kernel_check("augment.Augment", "drawn in the kernel: flips that are certain, center crop")
def _chain(inputs: Inputs) -> Pairs:
    x = _images(inputs)
    h, w = x.shape[2] - 2, x.shape[3] - 2
    chain = augment.Augment((h, w), hflip=1.0, vflip=1.0, crop="center", mean=_MEAN, std=_STD)
    return result_and_gradients(
        lambda t: chain(t),
        lambda t: _normalized(t[:, :, 1 : 1 + h, 1 : 1 + w].flip(2, 3)),
        [x],
    )
