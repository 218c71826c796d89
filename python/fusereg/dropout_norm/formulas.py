"""Dropout, residual sum and normalization in torch's own operations.

``second_gradient``
    the derivative of backward.
``unfused``
    the same operation step by step, for torch.func transforms and forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..core import draws
from ..core.draws import Kind
from ..core.random import Source

#: Gradients of x, residual, weight, bias.
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels compute."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def second_gradient(
    drop: Callable[[Tensor], Tensor],
    eps: float,
    rms: bool,
    grad: Tensor,
    total: Tensor,
    weight: Tensor | None,
    along: Gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``grad``, of the sum's gradient, of the sum and of weight.

    ``along`` are those of the four results of backward; ``drop`` is the linear map of dropout. With
    the names of dropout_norm.h, u the gradient of grad_s and P(v) = v - mean(v) - h mean(v h) (RMS:
    without mean(v)), the projection in grad_s = rstd P(g) + grad_sum, which is symmetric.
    """
    compute = compute_dtype(grad.dtype)
    v_x, v_residual, v_weight, v_bias = (None if v is None else v.to(compute) for v in along)
    s, dy = total.to(compute), grad.to(compute)
    w = torch.ones((), dtype=compute, device=s.device) if weight is None else weight.to(compute)
    n = s.shape[-1]

    def mean(v: Tensor) -> Tensor:
        return v.sum(-1, keepdim=True) / n

    d = s if rms else s - mean(s)
    rstd = torch.rsqrt(mean(d * d) + eps)
    h = d * rstd

    def project(v: Tensor) -> Tensor:
        p = v - h * mean(v * h)
        return p if rms else p - mean(v)

    u = torch.zeros_like(s) if v_residual is None else v_residual
    if v_x is not None:
        u = u + drop(v_x.contiguous())
    g = dy * w
    through = rstd * project(u)
    of_grad = w * through
    # What h gets by itself, and rstd by itself: d rstd / d s_i = -rstd^2 h_i / n.
    of_h = -rstd * (u * mean(g * h) + g * mean(u * h))
    if v_weight is not None:
        of_grad = of_grad + v_weight * h
        of_h = of_h + v_weight * dy
    if v_bias is not None:
        of_grad = of_grad + v_bias
    of_sum = rstd * project(of_h) - rstd * rstd * h * mean(u * project(g))
    of_weight = None
    if weight is not None:
        of_weight = (dy * through).reshape(-1, n).sum(0).to(weight.dtype)
    return of_grad.to(grad.dtype), u.to(total.dtype), of_sum.to(total.dtype), of_weight


def unfused(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    rms: bool,
    source: Source,
    index_offset: int,
    op: str,
) -> tuple[Tensor, Tensor]:
    """Return y and the sum, step by step with the same mask, in the kernels' dtype."""
    compute = compute_dtype(x.dtype)

    s = draws.dropout(x.to(compute).contiguous(), p, True, False, *source, index_offset, Kind(op))
    if residual is not None:
        s = residual.to(compute) + s
    # Not torch's layer_norm: as of 2.13, its derivative in forward mode has a wrong gradient.
    centered = s if rms else s - s.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), s.to((x if residual is None else residual).dtype)
