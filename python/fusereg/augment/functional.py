"""Functions on batches of images, with the parameters given: one kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import dispatch
from ..core import docs as _docs
from . import op as _augment_ops
from . import resize_op as _resize_ops
from .arguments import (
    FILL_MODES,
    INTERPOLATIONS,
    Size,
    flag,
    for_channels,
    integer,
    number,
    one_of,
    per_channel,
    size_pair,
)

__all__ = ["crop_flip_normalize", "erase", "mix", "resize", "warp_affine"]

#: Columns of a record (csrc/augment/augment.h).
_ERASE, _MIX, _PARTNER, _LAM, _RECORD = 6, 10, 14, 15, 28
#: Noise shares no Philox counter with dropout, whose counters have this bit clear.
_NOISE = -(2**63)

_COMMON = """
        mean, std: numbers, one for each channel or one for all: the result is (v - mean) / std with
            v scaled to [0, 1] if x is uint8; None: values as they are.
        out_dtype: of the result: uint8 (rounded to nearest and clamped to [0, 255]) or a
            floating-point dtype. None: x's, or float32 for uint8 with mean and std.
        memory_format: torch.contiguous_format or torch.channels_last; None: as x lies in memory.
        out: takes the result; no gradients then."""

_TAIL = """
    Arithmetic is float32, or float64 if x is. The same bits on every device, instruction set and
    number of threads. Differentiable in x (not for uint8 results).

    Raises:
        TypeError, ValueError: an argument is of another type, shape, dtype or device, or out of its
            range; the message names it."""


#: A record that changes nothing.
_PLAIN = torch.zeros(_RECORD, dtype=torch.float64)
_PLAIN[[0, 4, _LAM, 16, 21, 26]] = 1.0
_PLAIN[_PARTNER] = -1.0


#: What top, left, mirrored, upside down, and the latter times the window's last column and its last
#: row add to a record.
_WINDOW = torch.zeros(6, _RECORD, dtype=torch.float64)
_WINDOW[[0, 1, 4, 5], [5, 2, 2, 5]] = 1.0
_WINDOW[[2, 3], [0, 4]] = -2.0


def _identity(x: Tensor) -> Tensor:
    """A record for each sample that changes nothing."""
    return _PLAIN.repeat(x.shape[0], 1)


def _values(
    x: Tensor, mean: object, std: object, out_dtype: torch.dtype | None, out: Tensor | None, op: str
) -> tuple[list[float], list[float], torch.dtype]:
    """scale and shift for each channel, and the result's dtype."""
    channels = x.shape[1]
    if (mean is None) != (std is None):
        raise ValueError(f"fusereg.{op}: mean and std must be given both or neither")
    if out_dtype is None and isinstance(out, Tensor):
        out_dtype = out.dtype
    if mean is None:
        return [1.0] * channels, [0.0] * channels, out_dtype or x.dtype
    if out_dtype is None:
        out_dtype = torch.float32 if x.dtype is torch.uint8 else x.dtype
    limit = 255.0 if x.dtype is torch.uint8 else 1.0
    means = for_channels(per_channel(mean, op, "mean"), channels, op, "mean")
    stds = for_channels(per_channel(std, op, "std"), channels, op, "std")
    if 0.0 in stds:
        raise ValueError(f"fusereg.{op}: std must not be zero")
    return (
        [1.0 / (limit * s) for s in stds],
        [-m / s for m, s in zip(means, stds, strict=True)],
        out_dtype,
    )


def _run(
    x: Tensor,
    records: Tensor,
    size: tuple[int, int],
    op: str,
    *,
    interpolation: str = "bilinear",
    antialias: bool = False,
    fill_mode: str = "constant",
    fill: object = 0.0,
    mean: object = None,
    std: object = None,
    erase: Sequence[float] | None = None,
    keys: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    channels = x.shape[1]
    scale, shift, dtype = _values(x, mean, std, out_dtype, out, op)
    how = INTERPOLATIONS[one_of(interpolation, op, "interpolation", list(INTERPOLATIONS))]
    border = FILL_MODES[one_of(fill_mode, op, "fill_mode", list(FILL_MODES))]
    if flag(antialias, op, "antialias") and interpolation == "nearest":
        raise ValueError(f"fusereg.{op}: antialias needs interpolation 'bilinear' or 'bicubic'")
    return _augment_ops.apply(
        x,
        records.to(x.device),
        None if keys is None else keys.to(x.device),
        size,
        interpolation=how,
        antialias=antialias,
        fill_mode=border,
        colour=False,
        fill=for_channels(per_channel(fill, op, "fill"), channels, op, "fill"),
        scale=scale,
        shift=shift,
        erase=[0.0] * channels if erase is None else erase,
        erase_noise=keys is not None,
        out_dtype=dtype,
        memory_format=memory_format,
        out=out,
        op=op,
    )


def warp_affine(
    x: Tensor,
    matrix: Tensor,
    size: Size | None = None,
    *,
    interpolation: str = "bilinear",
    antialias: bool = False,
    fill_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Each image under an affine map: output pixel :math:`(u, v)` comes from the point
    :math:`M_i\,(u, v, 1)^T` of image i. Integers are the centres of pixels, on both sides.

    Args:
        x: images (N, C, H, W), contiguous or channels last (others are copied): uint8, float16,
            bfloat16, float32 or float64.
        matrix: (N, 2, 3), or (2, 3) for all. No gradient goes to it.
        size: of the result, (height, width) or one integer for both; None: x's.
        interpolation: "nearest", "bilinear" or "bicubic" (a = -0.75).
        antialias: widens the filter where the map shrinks ("bilinear", "bicubic" with a = -0.5).
        fill_mode: what lies outside the image: "constant" (``fill``), "border" (its nearest pixel),
            "reflect" (-1 is 1), "symmetric" (-1 is 0) or "wrap".
        fill: a number, or one for each channel, in x's units.
    {common}

    Returns:
        (N, C, height, width). Whole-pixel shifts, flips and quarter turns are exact. A NaN reaches
        only the pixels that it has a weight in.
    {tail}

    Example::

        turn = torch.tensor([[0.0, -1.0, 31.0], [1.0, 0.0, 0.0]])
        y = fusereg.augment.warp_affine(images, turn)  # 32 x 32, a quarter of a turn
    """
    op = "warp_affine"
    _augment_ops.check_images(x, op)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"fusereg.{op}: matrix must be a torch.Tensor, got {type(matrix).__name__}")
    n = x.shape[0]
    if tuple(matrix.shape) not in ((2, 3), (n, 2, 3)) or not matrix.is_floating_point():
        raise ValueError(
            f"fusereg.{op}: matrix must be a floating-point tensor of shape ({n}, 2, 3) or (2, 3), "
            f"got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"fusereg.{op}: matrix gets no gradient; detach() it")
    shape = (x.shape[2], x.shape[3]) if size is None else size_pair(size, op)
    records = _identity(x).to(matrix.device)
    records[:, :6] = matrix.double().reshape(-1, 6)
    return _run(
        x,
        records,
        shape,
        op,
        interpolation=interpolation,
        antialias=antialias,
        fill_mode=fill_mode,
        fill=fill,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
        memory_format=memory_format,
        out=out,
    )


def _for_samples(value: object, n: int, op: str, name: str, kind: str) -> Tensor:
    """A number for each sample, on the CPU or where the tensor is."""
    if isinstance(value, Tensor):
        integral = not (value.is_floating_point() or value.is_complex())
        good = {
            "flags": value.dtype is torch.bool,
            "integers": integral and value.dtype is not torch.bool,
            "numbers": value.dtype is not torch.bool and not value.is_complex(),
        }[kind]
        if tuple(value.shape) not in ((), (n,)) or not good:
            raise ValueError(
                f"fusereg.{op}: {name} must have shape ({n},) and hold {kind}, got {value.dtype} "
                f"of shape {tuple(value.shape)}"
            )
        return value.expand(n) if integral else value.detach().double().expand(n)
    if kind == "flags":
        plain = float(flag(value, op, name))
    else:
        plain = float((integer if kind == "integers" else number)(value, op, name))
    return torch.full((n,), plain, dtype=torch.float64)


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
    """A window of each image, flipped or not, normalized and converted in one pass.

    Args:
        x: images (N, C, H, W), contiguous or channels last (others are copied): uint8, float16,
            bfloat16, float32 or float64.
        size: of the window, (height, width) or one integer for both.
        top, left: the window's first row and column: integers, or integer tensors (N,). It may
            reach beyond the image, also by negative ones.
        hflip, vflip: whether the window is mirrored left to right, upside down: True or False, or
            boolean tensors (N,).
        fill_mode: what lies outside the image: "constant" (``fill``), "border" (its nearest pixel),
            "reflect" (-1 is 1), "symmetric" (-1 is 0) or "wrap".
        fill: a number, or one for each channel, in x's units.
    {common}

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
    _augment_ops.check_images(x, op)
    height, width = size_pair(size, op)
    n = x.shape[0]
    given = [
        _for_samples(top, n, op, "top", "integers"),
        _for_samples(left, n, op, "left", "integers"),
        _for_samples(hflip, n, op, "hflip", "flags"),
        _for_samples(vflip, n, op, "vflip", "flags"),
    ]
    device = next((g.device for g in given if g.device.type != "cpu"), torch.device("cpu"))
    rows, columns, mirrored, upside_down = (g.to(device) for g in given)
    places = [rows, columns, mirrored, upside_down, mirrored * (width - 1)]
    places.append(upside_down * (height - 1))
    # One product instead of a write to each column.
    numbers = torch.stack(places, 1).double()
    records = torch.addmm(_PLAIN.to(device), numbers, _WINDOW.to(device))
    return _run(
        x,
        records,
        (height, width),
        op,
        interpolation="nearest",
        fill_mode=fill_mode,
        fill=fill,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
        memory_format=memory_format,
        out=out,
    )


def resize(
    x: Tensor,
    size: Size,
    *,
    interpolation: str = "bilinear",
    antialias: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Images of another size: torch.nn.functional.interpolate with align_corners=False, normalized
    and converted in the same pass.

    Args:
        x: images (N, C, H, W), contiguous or channels last (others are copied): uint8, float16,
            bfloat16, float32 or float64.
        size: of the result, (height, width) or one integer for both.
        interpolation: "nearest" (torch's "nearest-exact"; needs ``antialias=False``), "bilinear" or
            "bicubic".
        antialias: widens the filter where the image shrinks.
    {common}

    Returns:
        (N, C, height, width).
    {tail}

    Example::

        y = fusereg.augment.resize(images, 224)
    """
    op = "resize"
    _augment_ops.check_images(x, op)
    height, width = size_pair(size, op)
    if flag(antialias, op, "antialias") and interpolation in ("bilinear", "bicubic"):
        scale, shift, dtype = _values(x, mean, std, out_dtype, out, op)
        return _resize_ops.apply(
            x,
            (height, width),
            interpolation=INTERPOLATIONS[interpolation],
            scale=scale,
            shift=shift,
            out_dtype=dtype,
            memory_format=memory_format,
            out=out,
            op=op,
        )
    by_y, by_x = x.shape[2] / height, x.shape[3] / width
    records = _identity(x)
    records[:, :6] = torch.tensor(
        [by_x, 0.0, (by_x - 1.0) / 2.0, 0.0, by_y, (by_y - 1.0) / 2.0], dtype=torch.float64
    )
    return _run(
        x,
        records,
        (height, width),
        op,
        interpolation=interpolation,
        antialias=antialias,
        fill_mode="border",
        mean=mean,
        std=std,
        out_dtype=out_dtype,
        memory_format=memory_format,
        out=out,
    )


def _boxes(boxes: object, n: int, op: str) -> Tensor:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"fusereg.{op}: boxes must be a torch.Tensor, got {type(boxes).__name__}")
    if tuple(boxes.shape) != (n, 4) or boxes.is_floating_point() or boxes.is_complex():
        raise ValueError(
            f"fusereg.{op}: boxes must be integers of shape ({n}, 4), got {boxes.dtype} of shape "
            f"{tuple(boxes.shape)}"
        )
    return boxes.double()


def erase(
    x: Tensor,
    boxes: Tensor,
    value: float | Sequence[float] | str = 0.0,
    *,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """A copy of the images with a box of each overwritten (Zhong et al. 2017, "Random erasing data
    augmentation").

    Args:
        x: images (N, C, H, W), contiguous or channels last (others are copied): uint8, float16,
            bfloat16, float32 or float64.
        boxes: integers (N, 4): x0, y0, x1, y1, half open; empty ones erase nothing.
        value: a number, or one for each channel, or "random": standard normal noise, a function of
            (seed, the sample's index, the element) alone.
        seed: of the noise.
        out: takes the result; no gradients then.

    Returns:
        Like x.
    {tail}

    Example::

        y = fusereg.augment.erase(images, torch.tensor([[4, 4, 12, 12]]).expand(len(images), 4))
    """
    op = "erase"
    _augment_ops.check_images(x, op)
    records = _identity(x)
    records = records.to(boxes.device) if isinstance(boxes, Tensor) else records
    records[:, _ERASE : _ERASE + 4] = _boxes(boxes, x.shape[0], op)
    keys = None
    fill = None
    if isinstance(value, str):
        one_of(value, op, "value", ["random"])
        keys = torch.empty(x.shape[0], 2, dtype=torch.int64)
        keys[:, 0] = (integer(seed, op, "seed") + 2**63) % 2**64 - 2**63
        keys[:, 1] = torch.arange(x.shape[0]) + _NOISE
    else:
        fill = for_channels(per_channel(value, op, "value"), x.shape[1], op, "value")
    return _run(
        x,
        records,
        (x.shape[2], x.shape[3]),
        op,
        interpolation="nearest",
        erase=fill,
        keys=keys,
        out=out,
    )


def mix(
    x: Tensor,
    partner: Tensor,
    lam: float | Tensor,
    boxes: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""Each image with another of the batch: :math:`\lambda_i x_i + (1 - \lambda_i) x_{p_i}` inside
    its box, :math:`x_i` outside: MixUp (Zhang et al. 2018) without boxes, CutMix (Yun et al. 2019)
    with boxes and lam = 0.

    Args:
        x: images (N, C, H, W), contiguous or channels last (others are copied): uint8, float16,
            bfloat16, float32 or float64.
        partner: integers (N,), indices into the batch; negative: none. One beyond the batch is an
            error; on a GPU and in compiled code, where nobody looks, it is none as well.
        lam: within [0, 1]: a number, or a tensor (N,).
        boxes: integers (N, 4): x0, y0, x1, y1, half open; None: the whole image.
        out: takes the result; no gradients then.

    Returns:
        Like x.
    {tail}

    Example::

        y = fusereg.augment.mix(images, torch.randperm(len(images)), 0.7)
    """
    op = "mix"
    _augment_ops.check_images(x, op)
    n = x.shape[0]
    if not isinstance(partner, Tensor):
        raise TypeError(
            f"fusereg.{op}: partner must be a torch.Tensor, got {type(partner).__name__}"
        )
    with_whom = _for_samples(partner, n, op, "partner", "integers")
    share = _for_samples(lam, n, op, "lam", "numbers").to(partner.device)
    # A GPU's numbers would be waited for, a graph has none yet: the kernel takes an index beyond
    # the batch for no partner.
    if with_whom.device.type == "cpu" and n > 0 and dispatch.eager():
        if float(with_whom.max()) >= n:
            raise ValueError(
                f"fusereg.{op}: partner must be below the batch size {n}, "
                f"got {int(with_whom.max())}"
            )
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(f"fusereg.{op}: lam must be within [0, 1]")
    records = _identity(x).to(partner.device)
    records[:, _PARTNER] = with_whom
    records[:, _LAM] = share
    if boxes is None:
        records[:, _MIX + 2], records[:, _MIX + 3] = x.shape[3], x.shape[2]
    else:
        records[:, _MIX : _MIX + 4] = _boxes(boxes, n, op).to(partner.device)
    return _run(x, records, (x.shape[2], x.shape[3]), op, interpolation="nearest", out=out)


for _function in (warp_affine, crop_flip_normalize, resize, erase, mix):
    _docs.share_paragraphs(_function, common=_COMMON, tail=_TAIL)
