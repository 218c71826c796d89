"""Augmentation in plain float64 torch, pixel by pixel: what the kernels must give.

Slow and simple on purpose. Differentiable in x, so that torch's autograd is the reference of the
gradient too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import reference_philox

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
FILL_MODES = ("constant", "border", "reflect", "symmetric", "wrap")
#: Columns of a record.
MATRIX, ERASE, MIX, PARTNER, LAM, COLOR, PERSPECTIVE, RECORD = 0, 6, 10, 14, 15, 16, 28, 30


def identity_records(n: int, matrix: Tensor | Sequence[Sequence[float]] | None = None) -> Tensor:
    """Records that do nothing but warp by one matrix ([2, 3]) or one a sample ([n, 2, 3])."""
    records = torch.zeros(n, RECORD, dtype=torch.float64)
    if matrix is None:
        matrix = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    m = torch.as_tensor(matrix, dtype=torch.float64)
    records[:, MATRIX : MATRIX + 6] = m.reshape(-1, 6)
    records[:, PARTNER] = -1
    records[:, LAM] = 1
    for i in range(3):
        records[:, COLOR + 5 * i] = 1
    return records


def fold(index: Tensor, size: int, fill_mode: str) -> Tensor:
    """The pixel that stands for one outside the image."""
    if fill_mode == "constant":
        return index
    if fill_mode == "border":
        return index.clamp(0, size - 1)
    if fill_mode == "wrap":
        return index.remainder(size)
    if fill_mode == "symmetric":
        index = index.remainder(2 * size)
        return torch.minimum(index, 2 * size - 1 - index)
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * (size - 1))
    return torch.minimum(index, 2 * (size - 1) - index)


def bicubic(t: Tensor, a: float) -> Tensor:
    t = t.abs()
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def axis_taps(
    v: Tensor, size: int, interpolation: str, antialias: bool, extent: float, fill_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices and weights [pixels, taps] along one axis, and the share within the image.

    The share is that of the output pixel's extent (in input pixels); 1 without antialiasing.
    """
    one = torch.ones_like(v)
    if interpolation == "nearest":
        return (v + 0.5).floor().long()[:, None], one[:, None], one
    if not antialias:
        first = v.floor().long() - (1 if interpolation == "bicubic" else 0)
        index = first[:, None] + torch.arange(4 if interpolation == "bicubic" else 2)
        distance = index - v[:, None]
        if interpolation == "bicubic":
            return index, bicubic(distance, -0.75), one
        return index, (1 - distance.abs()).clamp(min=0), one
    width = max(1.0, extent)
    radius = (2 if interpolation == "bicubic" else 1) * width
    first = (v - radius + 1).floor().long()
    index = first[:, None] + torch.arange(math.ceil(2 * radius) + 1)
    inside = index <= (v[:, None] + radius + 1).floor() - 1
    distance = (index - v[:, None]) / width
    if interpolation == "bicubic":
        weight = bicubic(distance, -0.5)
    else:
        weight = (1 - distance.abs()).clamp(min=0)
    weight = weight * inside
    coverage = one
    if fill_mode == "constant":
        weight = weight * ((index >= 0) & (index < size))
        extent = max(extent, 2.0**-20)
        low = (v - extent / 2).clamp(min=-0.5)
        high = (v + extent / 2).clamp(max=size - 0.5)
        coverage = ((high - low) / extent).clamp(0, 1)
    total = weight.sum(1)
    coverage = torch.where(total > 0, coverage, torch.zeros_like(coverage))
    weight = weight / torch.where(total > 0, total, one)[:, None]
    return index, weight, coverage


def warp(
    x: Tensor,
    record: Tensor,
    size: tuple[int, int],
    interpolation: str,
    antialias: bool,
    fill_mode: str,
    fill: Tensor,
    dtype: torch.dtype = torch.float64,
    nudge: float = 0.0,
) -> Tensor:
    """[C, Ho, Wo] of one image [C, H, W], both float64; ``dtype`` is that of the image."""
    c, h, w = x.shape
    ho, wo = size
    m = record[MATRIX : MATRIX + 6]
    if antialias and not bool(record[PERSPECTIVE:].any()) and bool(m[1] != 0 or m[3] != 0):
        x, m = reduced(x, m, interpolation, dtype, nudge)
        record = torch.cat([m, record[6:]])
        return warp(x, record, size, interpolation, False, fill_mode, fill)
    oy, ox = torch.meshgrid(
        torch.arange(ho, dtype=torch.float64), torch.arange(wo, dtype=torch.float64), indexing="ij"
    )
    ox, oy = ox.reshape(-1), oy.reshape(-1)
    tilt = record[PERSPECTIVE:]
    antialias = antialias and not bool(tilt.any())
    vx = (m[0] * ox + (m[1] * oy + m[2])) / (tilt[0] * ox + tilt[1] * oy + 1)
    vy = (m[3] * ox + (m[4] * oy + m[5])) / (tilt[0] * ox + tilt[1] * oy + 1)
    extent_x = math.hypot(float(m[0]), float(m[1]))
    extent_y = math.hypot(float(m[3]), float(m[4]))
    ix, wx, cover_x = axis_taps(vx, w, interpolation, antialias, extent_x, fill_mode)
    iy, wy, cover_y = axis_taps(vy, h, interpolation, antialias, extent_y, fill_mode)
    ix, iy = fold(ix, w, fill_mode), fold(iy, h, fill_mode)
    index_x, index_y = ix[:, None, :], iy[:, :, None]
    weight = wx[:, None, :] * wy[:, :, None]
    inside = (index_x >= 0) & (index_x < w) & (index_y >= 0) & (index_y < h)
    taps = x[:, index_y.clamp(0, h - 1), index_x.clamp(0, w - 1)]  # [C, pixels, ty, tx]
    taps = torch.where(inside, taps, fill[:, None, None, None])
    # What has no weight does not count, not even if it is not a number.
    taps = torch.where(weight == 0, torch.zeros_like(taps), taps)
    value = (taps * weight).sum((2, 3))
    coverage = cover_x * cover_y
    value = torch.where(coverage > 0, value, torch.zeros_like(value))
    value = value * coverage + (1 - coverage) * fill[:, None]
    return value.reshape(c, ho, wo)


def reduced(
    x: Tensor, m: Tensor, interpolation: str, dtype: torch.dtype, nudge: float
) -> tuple[Tensor, Tensor]:
    """The image at about a pixel for each pixel of the output, and the matrix to that.

    ``nudge`` is added before bytes are rounded: sums of bytes are often halves, which float32 may
    have on either side.
    """
    sides, rest = [], m.clone()
    for axis, side in enumerate((x.shape[2], x.shape[1])):
        row = m[3 * axis : 3 * axis + 3]
        own = math.floor(side / math.hypot(float(row[0]), float(row[1])) + 0.5)
        own = min(side, max(1, own))
        sides.append(own)
        rest[3 * axis : 3 * axis + 3] = row * own / side
        rest[3 * axis + 2] = (row[2] + 0.5) * own / side - 0.5
    z = F.interpolate(x[None], tuple(sides[::-1]), mode=interpolation, antialias=True)[0]
    return (
        (z + nudge).round().clamp(0, 255) if dtype is torch.uint8 else z.to(dtype).double()
    ), rest


def colored(v: Tensor, record: Tensor, limit: float) -> Tensor:
    matrix = record[COLOR : COLOR + 12].reshape(3, 4)
    if v.shape[0] == 3:
        v = torch.einsum("ij,jhw->ihw", matrix[:, :3], v) + matrix[:, 3, None, None]
    else:
        v = v * matrix[0, 0] + matrix[0, 3]
    return v.clamp(0, limit)


def normal(seed: int, low: int, index: int) -> float:
    """Box and Muller, from the words of one Philox call for 4 indices."""
    m32, m64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    low, high = low & m64, index // 4
    words = reference_philox.philox(
        seed & m64, (low & m32, low >> 32 & m32, high & m32, high >> 32 & m32)
    )
    first, second = words[index % 4 // 2 * 2 : index % 4 // 2 * 2 + 2]
    r = math.sqrt(-2 * math.log(((first >> 1) + 0.5) / 2**31))
    quarter = second << 2 & m32
    angle = (quarter - 2**32 if quarter >= 2**31 else quarter) / 2**31 * math.pi / 4
    pair = [r * math.cos(angle), r * math.sin(angle)]
    if second >> 31:
        pair.reverse()
    return -pair[index % 2] if second >> 30 & 1 else pair[index % 2]


def box_mask(box: Tensor, size: tuple[int, int]) -> Tensor:
    x0, y0, x1, y1 = (int(v) for v in box)
    mask = torch.zeros(size, dtype=torch.bool)
    if x1 > x0 and y1 > y0:
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


def per_channel(values: float | Sequence[float] | Tensor | None, c: int, default: float) -> Tensor:
    v = torch.as_tensor(default if values is None else values, dtype=torch.float64)
    return v.expand(c) if v.dim() == 0 else v


def augment(
    x: Tensor,
    records: Tensor,
    *,
    size: tuple[int, int] | None = None,
    keys: Tensor | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
    fill_mode: str = "constant",
    color: bool = False,
    fill: float | Sequence[float] | Tensor | None = None,
    scale: float | Sequence[float] | Tensor | None = None,
    shift: float | Sequence[float] | Tensor | None = None,
    erase: float | Sequence[float] | Tensor | None = None,
    erase_noise: bool = False,
    nudge: float = 0.0,
) -> Tensor:
    """[N, C, Ho, Wo] in float64, not yet rounded to the result's dtype."""
    n, c = x.shape[:2]
    size = (int(x.shape[2]), int(x.shape[3])) if size is None else size
    limit = 255.0 if x.dtype is torch.uint8 else 1.0
    image = x.double().cpu()
    records = records.double().cpu()
    fill, erase = per_channel(fill, c, 0.0), per_channel(erase, c, 0.0)
    scale, shift = per_channel(scale, c, 1.0), per_channel(shift, c, 0.0)
    own = []
    for i in range(n):
        v = warp(
            image[i], records[i], size, interpolation, antialias, fill_mode, fill, x.dtype, nudge
        )
        if color:
            v = colored(v, records[i], limit)
        v = v * scale[:, None, None] + shift[:, None, None]
        mask = box_mask(records[i, ERASE : ERASE + 4], size)
        if erase_noise:
            assert keys is not None
            values = torch.zeros(c, *size, dtype=torch.float64)
            for k, y, xx in ((k, *p) for k in range(c) for p in mask.nonzero().tolist()):
                index = (k * size[0] + y) * size[1] + xx
                values[k, y, xx] = normal(int(keys[i, 0]), int(keys[i, 1]), index)
        else:
            values = erase[:, None, None].expand(c, *size)
        own.append(torch.where(mask, values, v))
    mixed = []
    for i in range(n):
        partner, lam = int(records[i, PARTNER]), float(records[i, LAM])
        mask = box_mask(records[i, MIX : MIX + 4], size)
        if partner < 0 or lam == 1:
            mixed.append(own[i])
        elif lam == 0:
            mixed.append(torch.where(mask, own[partner], own[i]))
        else:
            both = lam * own[i] + (1 - lam) * own[partner]
            mixed.append(torch.where(mask, both, own[i]))
    return torch.stack(mixed) if mixed else torch.zeros(0, c, *size, dtype=torch.float64)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """To the result's dtype; integers to nearest (halves to even), within 0 and 255."""
    if dtype is torch.uint8:
        return y.nan_to_num(0.0).round().clamp(0, 255).to(dtype)
    return y.to(dtype)
