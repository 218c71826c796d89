"""Functions on batches of images, with the parameters given: one kernel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..core import dispatch, docs, memory
from ..core.checks import check_constant
from ..core.hints import explains
from . import op as _ops
from . import resize_op as _resize_ops
from .arguments import (
    INTERPOLATIONS,
    Interpolation,
    Size,
    check_memory_format,
    flag,
    for_channels,
    integer,
    interpolation_name,
    normalization,
    number,
    one_of,
    per_channel,
    scale_and_shift,
    size_pair,
)

__all__ = ["crop_flip_normalize", "erase", "mix", "resize", "warp_affine", "warp_perspective"]

#: Columns of a record (csrc/augment/augment.h).
_ERASE, _MIX, _PARTNER, _LAM, _PERSPECTIVE, _RECORD = 6, 10, 14, 15, 28, 30
#: Noise shares no Philox counter with dropout, whose counters have this bit clear.
_NOISE = -(2**63)

_IMAGES = """
        x: images (N, C, H, W), contiguous or channels_last (others are copied): uint8, float16,
            bfloat16, float32 or float64."""

_FILL = """
        fill_mode: how pixels outside the image are filled: "constant" (``fill``), "border" (by the
            nearest pixel), "reflect" (-1 is 1), "symmetric" (-1 is 0) or "wrap".
        fill: a number, or one for each channel, in x's units."""

_RESULT = """
        mean, std: numbers, one for each channel or one for all: the result is (v - mean) / std with
            v scaled to [0, 1] if x is uint8; None: values stay as they are.
        out_dtype: of the result: uint8 (rounded to nearest and clamped to [0, 255]) or a
            floating-point dtype. None: x's, or float32 for uint8 with mean and std.
        memory_format: torch.contiguous_format or torch.channels_last; None: that of x.
        out: the tensor that the result is written to; no gradients then."""

_TAIL = """
    Arithmetic is float32, or float64 if x is. Bits are the same on every device, instruction set
    and number of threads. Differentiable in x (not for uint8 results).

    Raises:
        TypeError, ValueError: an argument is of another type, shape, dtype or device, or out of its
            range; the message names it."""


#: A record that changes nothing.
_IDENTITY = [float(i in (0, 4, _LAM, 16, 21, 26)) for i in range(_RECORD)]
_IDENTITY[_PARTNER] = -1.0
#: What top, left, hflip, vflip, and the latter times the window's last column and its last row add
#: to a record.
_WINDOW = [[0.0] * _RECORD for _ in range(6)]
_WINDOW[0][5] = _WINDOW[1][2] = _WINDOW[4][2] = _WINDOW[5][5] = 1.0
_WINDOW[2][0] = _WINDOW[3][4] = -2.0
_TENSORS = (
    torch.tensor(_IDENTITY, dtype=torch.float64, device="cpu"),
    torch.tensor(_WINDOW, dtype=torch.float64, device="cpu"),
)


def _constants(device: torch.device, op: str) -> tuple[Tensor, ...]:
    """Return the identity and the window; tracers and fake tensors want tensors of their own."""
    if dispatch.eager():
        return memory.constants("records", device, lambda: _TENSORS, op)
    identity = torch.tensor(_IDENTITY, dtype=torch.float64, device="cpu")
    return identity.to(device), torch.tensor(_WINDOW, dtype=torch.float64, device="cpu").to(device)


def _has_shape(t: Tensor, *shape: int) -> bool:
    """Return whether a tensor has this shape, whose sizes may be symbolic."""
    return t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True))


def _identity(x: Tensor, device: torch.device, op: str) -> Tensor:
    """Return a record for each sample that changes nothing."""
    return _constants(device, op)[0].repeat(x.shape[0], 1)


class _Result(NamedTuple):
    """The arguments that say what becomes of the values."""

    mean: object = None
    std: object = None
    out_dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    out: Tensor | None = None

    def resolve(
        self, x: Tensor, size: Sequence[int], op: str
    ) -> tuple[_ops.Target, tuple[_ops.Channels, _ops.Channels]]:
        """Return the target, and (scale, shift) for each channel."""
        normal = normalization(self.mean, self.std, op)
        affine = scale_and_shift(normal, x.dtype, x.shape[1], op)
        dtype = self.out_dtype
        if dtype is None and isinstance(self.out, Tensor):
            dtype = self.out.dtype
        if dtype is None:
            dtype = torch.float32 if normal and x.dtype is torch.uint8 else x.dtype
        _ops.check_dtype(dtype, op)
        form = check_memory_format(self.memory_format, op)
        return _ops.Target.of(x, size, dtype, form), affine


_Sampling: TypeAlias = tuple[object, bool, str, object]
_NEAREST: _Sampling = ("nearest", False, "constant", 0.0)


def _apply(
    x: Tensor,
    records: Tensor,
    size: Sequence[int],
    result: _Result,
    op: str,
    sampling: _Sampling = _NEAREST,
    *,
    keys: Tensor | None = None,
    erase: tuple[float, ...] | None = None,
) -> Tensor:
    """Apply a pass; ``sampling`` is interpolation, antialias, fill mode and fill."""
    target, affine = result.resolve(x, size, op)
    options = _ops.Options.of(x.shape[1], op, sampling, affine, erase)
    if flag(sampling[1], op, "antialias") and options.interpolation == INTERPOLATIONS["nearest"]:
        raise ValueError(f"fusereg.{op}: antialias needs interpolation 'bilinear' or 'bicubic'")
    keys = None if keys is None else memory.to_device(keys, x.device, op)
    records = memory.to_device(records, x.device, op)
    return _ops.apply(x, records, keys, target, options, op, result.out)


@explains()
def warp_affine(
    x: Tensor,
    matrix: Tensor,
    size: Size | None = None,
    *,
    interpolation: Interpolation = "bilinear",
    antialias: bool = False,
    fill_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Warp each image by an affine map.

    Output pixel :math:`(u, v)` comes from the point :math:`M_i\,(u, v, 1)^T` of image i. Integers
    are the centers of pixels, in input and output.

    Args:
    {images}
        matrix: (N, 2, 3), or (2, 3) for all. No gradient goes to it.
        size: of the result, (height, width) or one integer for both; None: x's.
        interpolation: "nearest", "bilinear" or "bicubic" (a = -0.75).
        antialias: filters as wide as the output pixel where the map shrinks ("bilinear", or
            "bicubic" with a = -0.5); see below.
    {fill}
    {result}

    Returns:
        (N, C, height, width). Whole-pixel shifts, flips and quarter turns are exact. A NaN reaches
        only the pixels in which it has a weight.

    ``antialias``: an output pixel is :math:`e_x = \sqrt{m_{00}^2 + m_{01}^2}` wide and
    :math:`e_y = \sqrt{m_{10}^2 + m_{11}^2}` high in the image. If :math:`M_i` only scales, shifts
    and flips, the filter is :math:`\max(1, e_x)` wide and :math:`\max(1, e_y)` high, as that of
    :func:`resize`. If it turns or shears, the image is resized first, so filtered, to

    .. math:: w' = \min(w, \max(1, \lfloor w / e_x + 1/2 \rfloor)), \qquad
        h' = \min(h, \max(1, \lfloor h / e_y + 1/2 \rfloor)),

    rounded to x's dtype, and then interpolated at points by the rest of the map, which fills what
    is outside. The CPU keeps what is read of the resized image in its cache. Gradients, float64
    images and CUDA filter each of its pixels where it is read: the same bits, but slower.
    {tail}

    Example::

        turn = torch.tensor([[0.0, -1.0, 31.0], [1.0, 0.0, 0.0]])
        y = fusereg.augment.warp_affine(images, turn)  # 32 x 32, a quarter of a turn
    """
    op = "warp_affine"
    shape, m, records = _matrices(x, matrix, 2, size, op)
    records[:, :6] = m.reshape(-1, 6)
    result = _Result(mean, std, out_dtype, memory_format, out)
    return _apply(x, records, shape, result, op, (interpolation, antialias, fill_mode, fill))


def _matrices(
    x: Tensor, matrix: Tensor, rows: int, size: Size | None, op: str
) -> tuple[Sequence[int], Tensor, Tensor]:
    """Check images and matrices; return the result's size, float64 matrices, records to fill."""
    _ops.check_images(x, op)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"fusereg.{op}: matrix must be a torch.Tensor, got {type(matrix).__name__}")
    n = x.shape[0]
    shaped = _has_shape(matrix, rows, 3) or _has_shape(matrix, n, rows, 3)
    if not (shaped and matrix.is_floating_point()):
        raise ValueError(
            f"fusereg.{op}: matrix must be a floating-point tensor of shape ({n}, {rows}, 3) or "
            f"({rows}, 3), got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    check_constant(matrix, f"fusereg.{op}: matrix")
    shape = (x.shape[2], x.shape[3]) if size is None else size_pair(size, op)
    return shape, matrix.double(), _identity(x, matrix.device, op)


@explains()
def warp_perspective(
    x: Tensor,
    matrix: Tensor,
    size: Size | None = None,
    *,
    interpolation: Interpolation = "bilinear",
    fill_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Warp each image by a perspective map (a homography).

    Output pixel :math:`(u, v)` comes from the point :math:`(a / c, b / c)` of image i, where
    :math:`(a, b, c)^T = H_i\,(u, v, 1)^T`. Integers are the centers of pixels.

    Args:
    {images}
        matrix: (N, 3, 3), or (3, 3) for all, whose last element is not zero. No gradient goes to
            it.
        size: of the result, (height, width) or one integer for both; None: x's.
        interpolation: "nearest", "bilinear" or "bicubic" (a = -0.75).
    {fill}
    {result}

    Returns:
        (N, C, height, width). Where c is zero, a place is infinitely far.
    {tail}

    Example::

        tilt = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.2, 0.0], [0.0, 0.005, 1.0]])
        y = fusereg.augment.warp_perspective(images, tilt)
    """
    op = "warp_perspective"
    shape, m, records = _matrices(x, matrix, 3, size, op)
    last = m[..., 2:, 2:]
    if m.device.type == "cpu" and dispatch.eager() and bool((last == 0).any()):
        raise ValueError(f"fusereg.{op}: matrix must have a last element that is not zero")
    flat = (m / last).reshape(-1, 9)
    records[:, :6] = flat[:, :6]
    records[:, _PERSPECTIVE:] = flat[:, 6:8]
    result = _Result(mean, std, out_dtype, memory_format, out)
    return _apply(x, records, shape, result, op, (interpolation, False, fill_mode, fill))


def _for_samples(
    value: object, n: int, op: str, name: str, kind: str, device: torch.device
) -> Tensor:
    """Return a number for each sample: of a tensor on its device, others on this one."""
    if isinstance(value, Tensor):
        integral = not (value.is_floating_point() or value.is_complex())
        good = {
            "flags": value.dtype is torch.bool,
            "integers": integral and value.dtype is not torch.bool,
            "numbers": value.dtype is not torch.bool and not value.is_complex(),
        }[kind]
        if not good or not (value.dim() == 0 or _has_shape(value, n)):
            raise ValueError(
                f"fusereg.{op}: {name} must have shape ({n},) and hold {kind}, got {value.dtype} "
                f"of shape {tuple(value.shape)}"
            )
        check_constant(value, f"fusereg.{op}: {name}")
        return value.expand(n) if integral else value.detach().double().expand(n)
    checks: dict[str, Callable[[object, str, str], float]] = {
        "flags": flag,
        "integers": integer,
        "numbers": number,
    }
    made = float(checks[kind](value, op, name))
    return torch.full((n,), made, dtype=torch.float64, device=device)


@explains()
def crop_flip_normalize(
    x: Tensor,
    size: Size,
    *,
    top: int | Tensor = 0,
    left: int | Tensor = 0,
    hflip: bool | Tensor = False,
    vflip: bool | Tensor = False,
    fill_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Crop, flip, normalize and convert each image in one pass.

    Args:
    {images}
        size: of the window, (height, width) or one integer for both.
        top, left: the window's first row and column: integers, or integer tensors (N,). The window
            may reach outside the image; negative values are allowed.
        hflip, vflip: whether the window is flipped horizontally, vertically: True or False, or
            boolean tensors (N,).
    {fill}
    {result}

    Returns:
        (N, C, height, width).
    {tail}

    Example::

        y = fusereg.augment.crop_flip_normalize(
            images, 192, top=16, left=16, hflip=torch.rand(len(images)) < 0.5,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        )
    """
    op = "crop_flip_normalize"
    _ops.check_images(x, op)
    height, width = size_pair(size, op)
    n = x.shape[0]
    tensors = [g for g in (top, left, hflip, vflip) if isinstance(g, Tensor)]
    device = next((g.device for g in tensors if g.device.type != "cpu"), torch.device("cpu"))
    if not tensors and memory.capturing(x.device):
        device = x.device  # numbers are constants of the graph
    given = [
        _for_samples(top, n, op, "top", "integers", device),
        _for_samples(left, n, op, "left", "integers", device),
        _for_samples(hflip, n, op, "hflip", "flags", device),
        _for_samples(vflip, n, op, "vflip", "flags", device),
    ]
    rows, columns, flipped_x, flipped_y = (memory.to_device(g, device, op) for g in given)
    places = [rows, columns, flipped_x, flipped_y, flipped_x * (width - 1)]
    places.append(flipped_y * (height - 1))
    # One product instead of a write to each column.
    numbers = torch.stack(places, 1).double()
    identity, window = _constants(device, op)
    if not tensors and device != x.device:
        _constants(x.device, op)  # for a capture after this call, which can copy none
    records = torch.addmm(identity, numbers, window)
    result = _Result(mean, std, out_dtype, memory_format, out)
    return _apply(x, records, (height, width), result, op, ("nearest", False, fill_mode, fill))


@explains()
def resize(
    x: Tensor,
    size: Size,
    *,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize images, normalize and convert them in the same pass.

    The result is that of torch.nn.functional.interpolate with align_corners=False.

    Args:
    {images}
        size: of the result, (height, width) or one integer for both.
        interpolation: "nearest" (torch's "nearest-exact"; needs ``antialias=False``), "bilinear" or
            "bicubic".
        antialias: widens the filter where the image shrinks.
    {result}

    Returns:
        (N, C, height, width).
    {tail}

    Example::

        y = fusereg.augment.resize(images, 224)
    """
    op = "resize"
    _ops.check_images(x, op)
    height, width = size_pair(size, op)
    result = _Result(mean, std, out_dtype, memory_format, out)
    how = interpolation_name(interpolation, op)
    if flag(antialias, op, "antialias") and how != "nearest":
        target, affine = result.resolve(x, (height, width), op)
        resampling = (INTERPOLATIONS[how], False, *affine)
        return _ops.call(_resize_ops.resize, x, (*target, *resampling), target, op, out)
    by_y, by_x = x.shape[2] / height, x.shape[3] / width
    device = x.device if dispatch.eager() else torch.device("cpu")
    records = _identity(x, device, op)
    matrix = (by_x, 0.0, (by_x - 1.0) / 2.0, 0.0, by_y, (by_y - 1.0) / 2.0)
    records[:, :6] = memory.numbers(matrix, torch.float64, device)
    return _apply(x, records, (height, width), result, op, (how, antialias, "border", 0.0))


def _boxes(boxes: object, n: int, op: str) -> Tensor:
    """Check boxes (N, 4) of integers."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"fusereg.{op}: boxes must be a torch.Tensor, got {type(boxes).__name__}")
    if not _has_shape(boxes, n, 4) or boxes.is_floating_point() or boxes.is_complex():
        raise ValueError(
            f"fusereg.{op}: boxes must be integers of shape ({n}, 4), got {boxes.dtype} of shape "
            f"{tuple(boxes.shape)}"
        )
    return boxes.double()


@explains()
def erase(
    x: Tensor,
    boxes: Tensor,
    value: float | Sequence[float] | str = 0.0,
    *,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Copy images and overwrite a box of each.

    Zhong et al. 2017, "Random erasing data augmentation".

    Args:
    {images}
        boxes: integers (N, 4): x0, y0, x1, y1, half open; empty ones erase nothing.
        value: a number, or one for each channel, or "random": standard normal noise, a function of
            (seed, the sample's index, the element) alone.
        seed: of the noise.
        out: the tensor that the result is written to; no gradients then.

    Returns:
        Images like x.
    {tail}

    Example::

        y = fusereg.augment.erase(images, torch.tensor([[4, 4, 12, 12]]).expand(len(images), 4))
    """
    op = "erase"
    _ops.check_images(x, op)
    n = x.shape[0]
    corners = _boxes(boxes, n, op)
    records = _identity(x, corners.device, op)
    records[:, _ERASE : _ERASE + 4] = corners
    keys = fill = None
    if isinstance(value, str):
        one_of(value, op, "value", ["random"])
        keys = torch.empty(n, 2, dtype=torch.int64, device="cpu")
        keys[:, 0] = (integer(seed, op, "seed") + 2**63) % 2**64 - 2**63
        keys[:, 1] = torch.arange(n, device="cpu") + _NOISE
    else:
        fill = for_channels(per_channel(value, op, "value"), x.shape[1], op, "value")
    return _apply(x, records, x.shape[2:], _Result(out=out), op, keys=keys, erase=fill)


@explains()
def mix(
    x: Tensor,
    partner: Tensor,
    lam: float | Tensor,
    boxes: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""Mix each image with another of the batch.

    The result is :math:`\lambda_i x_i + (1 - \lambda_i) x_{p_i}` inside the image's box and
    :math:`x_i` outside: MixUp (Zhang et al. 2018) without boxes, CutMix (Yun et al. 2019) with
    boxes and lam = 0.

    Args:
    {images}
        partner: integers (N,), indices into the batch; negative: none. An index beyond the batch is
            an error; on a GPU and in compiled code, where it is not checked, it is none as well.
        lam: within [0, 1]: a number, or a tensor (N,).
        boxes: integers (N, 4): x0, y0, x1, y1, half open; None: the whole image.
        out: the tensor that the result is written to; no gradients then.

    Returns:
        Images like x.
    {tail}

    Example::

        y = fusereg.augment.mix(images, torch.randperm(len(images)), 0.7)
    """
    op = "mix"
    _ops.check_images(x, op)
    n = x.shape[0]
    if not isinstance(partner, Tensor):
        raise TypeError(
            f"fusereg.{op}: partner must be a torch.Tensor, got {type(partner).__name__}"
        )
    indices = _for_samples(partner, n, op, "partner", "integers", partner.device)
    share = _for_samples(lam, n, op, "lam", "numbers", partner.device)
    share = memory.to_device(share, partner.device, op)
    # Reading a GPU's numbers would wait for it, and a graph has none yet: the kernel takes an index
    # beyond the batch for no partner.
    if indices.device.type == "cpu" and n > 0 and dispatch.eager():
        if float(indices.max()) >= n:
            raise ValueError(
                f"fusereg.{op}: partner must be below the batch size {n}, got {int(indices.max())}"
            )
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(f"fusereg.{op}: lam must be within [0, 1]")
    records = _identity(x, partner.device, op)
    records[:, _PARTNER] = indices
    records[:, _LAM] = share
    if boxes is None:
        records[:, _MIX + 2], records[:, _MIX + 3] = x.shape[3], x.shape[2]
    else:
        records[:, _MIX : _MIX + 4] = memory.to_device(_boxes(boxes, n, op), partner.device, op)
    return _apply(x, records, x.shape[2:], _Result(out=out), op)


for _function in (warp_affine, warp_perspective, crop_flip_normalize, resize, erase, mix):
    docs.share_paragraphs(_function, images=_IMAGES, fill=_FILL, result=_RESULT, tail=_TAIL)
