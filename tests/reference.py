"""What the kernels must give, in float64 and with torch's own operations; no regard for speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def group_dims(w: Tensor, dim: int) -> list[int]:
    return [d for d in range(w.dim()) if d != dim % w.dim()]


def group_norms(w: Tensor, dim: int) -> tuple[Tensor, int]:
    """Norms with the reduced dimensions kept, and the number of elements of a group."""
    if w.dim() == 0:
        return w.abs(), 1
    dims = group_dims(w, dim)
    norms = torch.linalg.vector_norm(w, dim=dims, keepdim=True) if dims else w.abs()
    return norms, math.prod(w.shape[d] for d in dims)


def penalty(
    w: Tensor, l1: float = 0.0, l2: float = 0.0, group: float = 0.0, dim: int = 0
) -> Tensor:
    w = w.detach().double()
    value = torch.zeros((), dtype=torch.float64, device=w.device)
    if l1:
        value = value + l1 * w.abs().sum()
    if l2:
        value = value + l2 / 2 * w.square().sum()
    if group and w.numel():
        norms, n = group_norms(w, dim)
        value = value + group * math.sqrt(n) * norms.sum()
    return value


def gradient(
    w: Tensor, l1: float = 0.0, l2: float = 0.0, group: float = 0.0, dim: int = 0
) -> Tensor:
    w = w.detach().double()
    grad = torch.zeros_like(w)
    if l1:
        grad = grad + l1 * torch.where(w.isnan(), w, w.sign())
    if l2:
        grad = grad + l2 * w
    if group and w.numel():
        norms, n = group_norms(w, dim)
        factor = torch.where(norms == 0, 0.0, group * math.sqrt(n) / norms)
        grad = grad + factor * w
    return grad


def prox(w: Tensor, l1: float = 0.0, l2: float = 0.0, group: float = 0.0, dim: int = 0) -> Tensor:
    w = w.detach().double()
    v = torch.where(w.abs() <= l1, 0.0, w - l1 * w.sign())
    if group and w.numel():
        norms, n = group_norms(v, dim)
        threshold = group * math.sqrt(n)
        v = v * torch.where(norms <= threshold, 0.0, 1 - threshold / norms)
    return v / (1 + l2) + 0.0


def total(tensors: Sequence[Tensor], **strengths: float) -> Tensor:
    return sum((penalty(w, **strengths).cpu() for w in tensors), torch.zeros(()).double())
