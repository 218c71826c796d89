"""Calls of the penalties' kernels, on whatever tensors there are; no autograd.

A kernel takes plain dense tensors of one device. A list of such goes to it as it is, in one call.
Only if the kernel's binding declines (it has written nothing then) are the tensors looked at one by
one: odd layouts are copied, negated views resolved, devices separated, and what cannot be is named
in an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory
from ..core import params as _params
from ..core.params import Strength

_DONE, _NEEDS_FLOAT64, _NEEDS_PREPARATION = 0, 1, 2


class Strengths(NamedTuple):
    l1: Strength
    l2: Strength
    group: Strength

    def select(self, indices: Sequence[int]) -> Strengths:
        return Strengths(*(_params.select(s, indices) for s in self))

    def lists(self, count: int) -> tuple[list[float], list[float], list[float]]:
        l1, l2, group = (_params.as_floats(s, count) for s in self)
        return l1, l2, group


def value_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def value(op: str, tensors: list[Tensor], s: Strengths, dim: int) -> Tensor:
    """The sum of R over the tensors: 0-d, on the first tensor's device."""
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("cpu")
    if device.type in ("cpu", "cuda"):
        dtype = torch.float32
        for _ in range(2):
            out = torch.empty((), dtype=dtype, device=device)
            work = memory.workspace(device)
            status = _C.penalty_forward(tensors, out, *s, dim, work, op)
            if status == _DONE:
                return out
            if status == _NEEDS_PREPARATION:
                break
            dtype = torch.float64

    plain = [checks.dense(checks.plain(t, op, f"params[{i}]")) for i, t in enumerate(tensors)]
    dtype = value_dtype(plain)
    parts = []
    for device, indices in _params.by_device(plain).items():
        out = torch.empty((), dtype=dtype, device=device)
        part = [plain[i] for i in indices]
        _must(
            _C.penalty_forward(part, out, *s.select(indices), dim, memory.workspace(device), op),
            op,
        )
        parts.append(out)
    return _sum_on_first(parts)


def write_grads(
    op: str, scale: Tensor, tensors: Sequence[Tensor], s: Strengths, dim: int
) -> list[Tensor]:
    """scale * dR/dw for each tensor, in its dtype and, where it is dense, its layout."""
    if not tensors:
        return []
    grads = [torch.empty_like(t) for t in tensors]
    work = memory.workspace(tensors[0].device)
    if _C.penalty_backward(tensors, grads, scale, *s, dim, work, op) == _DONE:
        return grads

    plain = [checks.dense(checks.plain(t, op, f"params[{i}]")) for i, t in enumerate(tensors)]
    grads = [torch.empty_like(t) for t in plain]
    scale = checks.plain(scale, op, "grad")
    for device, indices in _params.by_device(plain).items():
        status = _C.penalty_backward(
            [plain[i] for i in indices],
            [grads[i] for i in indices],
            scale.to(device),
            *s.select(indices),
            dim,
            memory.workspace(device),
            op,
        )
        _must(status, op)
    return grads


def add_grads_(
    op: str,
    tensors: list[Tensor],
    grads: Sequence[Tensor | None] | None,
    scale: Tensor | float | None,
    s: Strengths,
    dim: int,
) -> Tensor:
    """Adds scale * dR/dw into each gradient and gives the sum of R, in one pass over the memory.

    ``grads=None`` means each tensor's ``.grad``, created where it is missing.
    """
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("cpu")
    if device.type in ("cpu", "cuda"):
        dtype = torch.float32
        for _ in range(2):
            out = torch.empty((), dtype=dtype, device=device)
            work = memory.workspace(device)
            status = _C.penalty_add_grad_(tensors, grads, out, scale, *s, dim, work, op)
            if status == _DONE:
                return out
            if status == _NEEDS_PREPARATION:
                break
            dtype = torch.float64

    plain = [checks.plain(t, op, f"params[{i}]") for i, t in enumerate(tensors)]
    targets = list(grads) if grads is not None else own_grads(tensors, op)
    check_targets(plain, targets, op)
    if grads is None:
        targets = create_missing(tensors)
    ready: list[Tensor | None] = []
    copy_back: list[tuple[Tensor, Tensor]] = []
    for i, g in enumerate(targets):
        if g is None:
            plain[i] = checks.dense(plain[i])
            ready.append(None)
            continue
        plain[i], target, is_own = _matching(plain[i], g)
        ready.append(target)
        if not is_own:
            copy_back.append((g, target))
    dtype = value_dtype(plain)
    parts = []
    for device, indices in _params.by_device(plain).items():
        out = torch.empty((), dtype=dtype, device=device)
        status = _C.penalty_add_grad_(
            [plain[i] for i in indices],
            [ready[i] for i in indices],
            out,
            scale.to(device) if isinstance(scale, Tensor) else scale,
            *s.select(indices),
            dim,
            memory.workspace(device),
            op,
        )
        _must(status, op)
        parts.append(out)
    for g, target in copy_back:
        _copy_into(g, target)
    return _sum_on_first(parts)


def prox_(op: str, tensors: list[Tensor], s: Strengths, dim: int) -> None:
    """The proximal step of R, in place."""
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("cpu")
    if device.type in ("cpu", "cuda"):
        status = _C.prox_(tensors, *s, dim, memory.workspace(device), op)
        if status == _DONE:
            return
    plain = []
    for i, t in enumerate(tensors):
        plain.append(checks.plain(t, op, f"params[{i}]"))
        checks.check_writable(t, op, f"params[{i}]")
    checks.check_apart(tensors, op, "params[{}]")
    _check_dim(tensors, s, dim, op)
    ready = [checks.dense(t) for t in plain]
    for device, indices in _params.by_device(ready).items():
        part = [ready[i] for i in indices]
        _must(_C.prox_(part, *s.select(indices), dim, memory.workspace(device), op), op)
    for t, p, r in zip(tensors, plain, ready, strict=True):
        if r is not p or t.is_neg():
            _copy_into(t, r)


def _check_dim(tensors: Sequence[Tensor], s: Strengths, dim: int, op: str) -> None:
    """As the kernels' binding does, but before the first of several devices has been written."""
    for i, (t, group) in enumerate(zip(tensors, s.lists(len(tensors))[2], strict=True)):
        rank = max(t.dim(), 1)
        if group and not -rank <= dim < rank:
            raise ValueError(
                f"fusereg.{op}: dim {dim} is out of range for params[{i}] with {t.dim()} dimensions"
            )


def own_grads(tensors: Sequence[Tensor], op: str) -> list[Tensor | None]:
    """Each tensor's .grad, or None where there is none yet or none is wanted."""
    for i, t in enumerate(tensors):
        if t.requires_grad and not t.is_leaf:
            raise ValueError(
                f"fusereg.{op}: params[{i}] is not a leaf (it was computed from another tensor), "
                "so it has no .grad of its own; pass the parameters themselves"
            )
    return [t.grad if t.requires_grad else None for t in tensors]


def create_missing(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Zeros for each .grad that is wanted and missing; all of them, after all checks."""
    for t in tensors:
        if t.requires_grad and t.grad is None:
            t.grad = torch.zeros_like(t, memory_format=torch.preserve_format)
    return [t.grad if t.requires_grad else None for t in tensors]


def check_targets(tensors: Sequence[Tensor], grads: Sequence[Tensor | None], op: str) -> None:
    for i, (w, g) in enumerate(zip(tensors, grads, strict=True)):
        if g is None:
            continue
        name = f"params[{i}].grad"
        checks.plain(g, op, name)
        if g.shape != w.shape:
            raise ValueError(
                f"fusereg.{op}: {name} must have shape {tuple(w.shape)}, got {tuple(g.shape)}"
            )
        if g.device != w.device:
            raise ValueError(f"fusereg.{op}: {name} must be on {w.device}, got {g.device}")
        checks.check_writable(g, op, name)
    checks.check_apart(grads, op, "params[{}].grad")


def _matching(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, bool]:
    """w, and a gradient to write to, in one layout and dtype; the gradient's own if it can be."""
    own = g.detach()
    if type(own) is not Tensor:
        own = own.as_subclass(Tensor)
    if g.dtype == w.dtype and not g.is_neg() and _C.inspect(own) == (0, True):
        return w if w.stride() == g.stride() else torch.empty_like(own).copy_(w), own, True
    w = checks.dense(w)
    return w, torch.empty_like(w).copy_(own), False


def _copy_into(target: Tensor, source: Tensor) -> None:
    """Without autograd; torch lets inference tensors be written in inference mode alone."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.copy_(source)


def _sum_on_first(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _must(status: int, op: str) -> None:
    if status != _DONE:
        raise RuntimeError(f"fusereg.{op}: the kernel refused prepared tensors; please report this")
