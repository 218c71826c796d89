"""Dropout + addition + normalization, fused and step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fusereg
import reference_philox
from conftest import SEED
from fusereg import functional as F

EPS = 1e-5


def fused(
    rms: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    **options: Any,
) -> Any:
    if rms:
        return F.dropout_add_rms_norm(x, residual, weight, p, EPS, **options)
    return F.dropout_add_layer_norm(x, residual, weight, bias, p, EPS, **options)


def normalized(
    rms: bool, s: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """By the formula, in the dtype that comes: torch's own is not exact enough at a large mean."""
    d = s if rms else s - s.mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def unfused(
    rms: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    mask: Tensor,
    rounded_to: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(y, s) of float64 arguments; what is normalized is s as it is returned."""
    keep = reference_philox.keep_probability(p) if p else 1.0
    s = torch.where(mask.to(x.device).view(x.shape), x / keep if keep else x, 0.0)
    s = s if residual is None else residual + s
    s = s + (s.detach().to(rounded_to).double() - s.detach())
    return normalized(rms, s, weight, None if rms else bias), s


def row_mask(shape: tuple[int, ...], p: float, index_offset: int = 0) -> Tensor:
    """From plain Python, unless that would take seconds."""
    if math.prod(shape) > 4000:
        return fusereg.dropout_mask(shape, p, SEED, index_offset=index_offset).flatten()
    return reference_philox.mask(math.prod(shape), p, SEED, 0, index_offset)
