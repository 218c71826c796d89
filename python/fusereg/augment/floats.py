"""Programs of floating images in [0, 1]: torchvision's formulas for them, by torch's functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ..core import memory

_WEIGHTS = (0.2989, 0.587, 0.114)


def gray(x: Tensor) -> Tensor:
    """Return the gray [1, H, W] of an image of 3 channels, or one of 1 channel as it is."""
    if len(x) == 1:
        return x
    r, g, b = (x[i : i + 1] * w for i, w in enumerate(_WEIGHTS))
    return r + g + b


def blend(x: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return factor * x + (1 - factor) * other within [0, 1]."""
    return (x * factor + other * (1 - factor)).clamp(0, 1)


def hue(x: Tensor, turn: float) -> Tensor:
    """Return an image [3, H, W] with its hue moved by a part of a turn."""
    low, high = x.amin(0), x.amax(0)  # aminmax() has no derivative before torch 2.13
    span = high - low
    r, g, b = ((high - x) / torch.where(span == 0, 1, span)).unbind(0)
    of_r, of_g, of_b = b - g, 2 + r - b, 4 + g - r
    sixths = torch.where(x[0] == high, of_r, torch.where(x[1] == high, of_g, of_b))
    h = (sixths / 6 + 1 + turn).remainder(1) * 6
    s = span / torch.where(span == 0, 1, high)
    # Each channel is 1 minus what the place on the circle takes away of the saturation.
    places = memory.numbers((5.0, 3.0, 1.0), x.dtype, x.device)[:, None, None]
    k = (places + h).remainder(6)
    return (high * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))).clamp(0, 1)


def posterize(x: Tensor, bits: int) -> Tensor:
    """Return an image with 2^bits levels."""
    levels = 1 << bits
    return (x * levels).floor().clamp(0, levels - 1) / levels


def stretch(x: Tensor) -> Tensor:
    """Return an image each of whose channels goes from 0 to 1, if it is not constant."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    span = high - low
    return torch.where(span == 0, x, ((x - low) / torch.where(span == 0, 1, span)).clamp(0, 1))


def sharpen(x: Tensor, factor: float) -> Tensor:
    """Return an image whose inner pixels are further from their neighbors' mean, or nearer."""
    if min(x.shape[1:]) <= 2:
        return x
    kernel = x.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 5
    smooth = conv2d(x[:, None], kernel / 13)[:, 0]
    y = x.clone()
    inner = y[:, 1:-1, 1:-1]
    inner.copy_(blend(inner, smooth, factor))
    return y.clamp(0, 1)


def blur(x: Tensor, taps: tuple[int, int], sigmas: tuple[float, float]) -> Tensor:
    """Return an image after a Gaussian blur of (x, y), reflected at its edges."""
    y = pad(x[None], (taps[0] // 2,) * 2 + (taps[1] // 2,) * 2, mode="reflect")[0][:, None]
    for count, sigma, shape in zip(taps, sigmas, ((1, 1, 1, -1), (1, 1, -1, 1)), strict=True):
        distance = torch.arange(count, dtype=torch.float32, device=x.device) - count // 2
        weights = torch.softmax(-0.5 * (distance / sigma) ** 2, 0).to(x.dtype)
        y = conv2d(y, weights.view(shape))
    return y[:, 0]
