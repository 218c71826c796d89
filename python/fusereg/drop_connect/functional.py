"""DropConnect: layers that drop weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as torch_F

from ..core.hints import explains
from ..core.random import Source
from .op import Geometry, check, conv2d, linear, pair, prepared, sides


@explains()
def drop_connect_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Apply a linear layer with DropConnect.

    :math:`y = x\, (m \odot W / (1-p))^T + b`.

    One mask for the whole batch. In eager mode the dropped weight is not kept for backward: it is
    drawn again.

    Args:
        x: of shape (..., in_features).
        weight: of shape (out_features, in_features), float64, float32, float16 or bfloat16.
        bias: of shape (out_features,), or None. It is not dropped.
        p: the probability of dropping a weight, within [0, 1].
        training: whether to drop at all.
        seed: as in :func:`dropout`; ``dropout_mask(weight.shape, p, seed)`` is then the mask.
        generator: as in :func:`dropout`.

    Raises:
        TypeError, ValueError: as :func:`dropout`, of the weight; also if it has not 2 dimensions.
    """
    op, draw = "drop_connect_linear", None
    p = check(x, weight, p, 2, op)
    if training and p != 0:
        x, weight, bias, draw = prepared(x, weight, bias, p, Source(seed, generator), op)
    if draw is None:
        return torch_F.linear(x, weight, bias)
    return linear(x, weight, bias, draw)


@explains()
def drop_connect_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Apply a convolution with DropConnect.

    :math:`y = x * (m \odot W / (1-p)) + b`.

    One mask for the whole batch and all positions. In eager mode the dropped weight is not kept for
    backward: it is drawn again.

    Args:
        x: of shape (N, in_channels, H, W) or (in_channels, H, W).
        weight: of shape (out_channels, in_channels / groups, kH, kW), float64, float32, float16 or
            bfloat16.
        bias: of shape (out_channels,), or None. It is not dropped.
        stride: as in torch.nn.functional.conv2d, like the next three.
        padding: "valid", "same", or zeros to add on both sides.
        dilation: the distance of the weight's elements in x.
        groups: of channels that are convolved apart.
        p: the probability of dropping a weight, within [0, 1].
        training: whether to drop at all.
        seed: as in :func:`dropout`; ``dropout_mask(weight.shape, p, seed)`` is then the mask of a
            contiguous weight.
        generator: as in :func:`dropout`.

    Raises:
        TypeError, ValueError: as :func:`dropout`, of the weight; also if it has not 4 dimensions.
        RuntimeError: what torch says of shapes that do not go together.

    Example:
        >>> y = fusereg.functional.drop_connect_conv2d(x, weight, bias, padding="same", p=0.2)
    """
    op, draw = "drop_connect_conv2d", None
    p = check(x, weight, p, 4, op)
    if training and p != 0:
        x, weight, bias, draw = prepared(x, weight, bias, p, Source(seed, generator), op)
    if draw is None:
        return torch_F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    stride, dilation = pair(stride, op, "stride"), pair(dilation, op, "dilation")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"fusereg.{op}: padding='same' needs stride 1, got {stride}")
    top, bottom, left, right = sides(padding, dilation, weight.shape[2:], op)
    if (top, left) != (bottom, right):
        x = torch_F.pad(x, (0, right - left, 0, bottom - top))
    geometry = Geometry(stride, (top, left), dilation, groups)
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, draw, geometry).squeeze(0)
    return conv2d(x, weight, bias, draw, geometry)
