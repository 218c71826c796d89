"""Calls of the penalties' kernels on any tensors, without autograd.

A kernel takes plain dense tensors of one device. A list of such goes to it as it is, in one call.
Only if the kernel's binding declines (it has written nothing then) are the tensors prepared one by
one: odd layouts are copied, negated views resolved, devices separated, and a tensor that cannot be
used is named in an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory
from ..core import params as _params
from ..core.operator import refused
from .strengths import Strengths

#: What a binding returns.
DONE, NEEDS_FLOAT64, NEEDS_PREPARATION = 0, 1, 2


def value_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of a sum over the tensors."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def reduced(
    tensors: Sequence[Tensor], kernel: Callable[[Tensor, Tensor | None], int]
) -> Tensor | None:
    """Return the 0-d result of ``kernel(out, workspace)``; None if the tensors need preparation."""
    device = tensors[0].device if isinstance(tensors[0], Tensor) else None
    if device is None or device.type not in ("cpu", "cuda"):
        return None
    for dtype in (torch.float32, torch.float64):
        out = torch.empty((), dtype=dtype, device=device)
        status = kernel(out, memory.workspace(device))
        if status == DONE:
            return out
        if status != NEEDS_FLOAT64:
            break
    return None


def must(op: str, status: int) -> None:
    """Raise if a kernel has declined prepared tensors."""
    if status != DONE:
        raise refused(op)


def sum_on_first(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors, on the first one's device."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy without autograd; torch lets inference tensors be written in inference mode alone."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.copy_(source)


def value(op: str, tensors: list[Tensor], s: Strengths) -> Tensor:
    """Return the sum of R over the tensors: 0-d, on the first tensor's device."""
    whole = reduced(tensors, lambda out, work: _C.penalty_forward(tensors, out, *s, work, op))
    if whole is not None:
        return whole
    plain = _prepared(op, tensors)
    dtype = value_dtype(plain)
    parts = []
    for device, indices, own in _by_device(plain, s):
        part = [plain[i] for i in indices]
        out = torch.empty((), dtype=dtype, device=device)
        must(op, _C.penalty_forward(part, out, *own, memory.workspace(device), op))
        parts.append(out)
    return sum_on_first(parts)


def write_grads(op: str, scale: Tensor, tensors: Sequence[Tensor], s: Strengths) -> list[Tensor]:
    """Return scale * dR/dw for each tensor, in its dtype and, where it is dense, its layout."""
    if not tensors:
        return []
    grads = [torch.empty_like(t) for t in tensors]
    work = memory.workspace(tensors[0].device)
    if _C.penalty_backward(tensors, grads, scale, *s, work, op) == DONE:
        return grads
    plain = _prepared(op, tensors)
    grads = [torch.empty_like(t) for t in plain]
    scale = checks.plain(scale, op, "grad")
    for device, indices, own in _by_device(plain, s):
        part, to = [plain[i] for i in indices], [grads[i] for i in indices]
        work = memory.workspace(device)
        must(op, _C.penalty_backward(part, to, scale.to(device), *own, work, op))
    return grads


def add_grads_(
    op: str,
    tensors: list[Tensor],
    grads: Sequence[Tensor | None] | None,
    scale: Tensor | float | None,
    s: Strengths,
) -> Tensor:
    """Add scale * dR/dw into each gradient and return the sum of R, in one pass over the memory.

    ``grads=None`` means each tensor's ``.grad``, created where it is missing.
    """
    whole = reduced(
        tensors, lambda out, work: _C.penalty_add_grad_(tensors, grads, out, scale, *s, work, op)
    )
    if whole is not None:
        return whole
    plain = [checks.plain(t, op, f"params[{i}]") for i, t in enumerate(tensors)]
    targets = list(grads) if grads is not None else own_grads(op, tensors)
    check_targets(op, plain, targets)
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
    for device, indices, own in _by_device(plain, s):
        part, to = [plain[i] for i in indices], [ready[i] for i in indices]
        out = torch.empty((), dtype=dtype, device=device)
        work = memory.workspace(device)
        factor = scale.to(device) if isinstance(scale, Tensor) else scale
        must(op, _C.penalty_add_grad_(part, to, out, factor, *own, work, op))
        parts.append(out)
    for g, target in copy_back:
        copy_into(g, target)
    return sum_on_first(parts)


def prox_(op: str, tensors: list[Tensor], s: Strengths) -> None:
    """Apply the proximal operator of R in place."""
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("cpu")
    if device.type in ("cpu", "cuda"):
        status = _C.prox_(tensors, *s, memory.workspace(device), op)
        if status == DONE:
            return
    plain = []
    for i, t in enumerate(tensors):
        plain.append(checks.plain(t, op, f"params[{i}]"))
        checks.check_writable(t, op, f"params[{i}]")
    checks.check_apart(tensors, op, "params[{}]")
    _check_dim(op, tensors, s)
    ready = [checks.dense(t) for t in plain]
    for device, indices, own in _by_device(ready, s):
        part = [ready[i] for i in indices]
        must(op, _C.prox_(part, *own, memory.workspace(device), op))
    for t, p, r in zip(tensors, plain, ready, strict=True):
        if r is not p or t.is_neg():
            copy_into(t, r)


def own_grads(op: str, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return each tensor's .grad, or None where there is none yet or none is wanted."""
    for i, t in enumerate(tensors):
        if t.requires_grad and not t.is_leaf:
            raise ValueError(
                f"fusereg.{op}: params[{i}] is not a leaf (it was computed from another tensor), "
                "so it has no .grad of its own; pass the parameters themselves"
            )
    return [t.grad if t.requires_grad else None for t in tensors]


def create_missing(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients, zeros where one is wanted and missing; call it after all checks."""
    for t in tensors:
        if t.requires_grad and t.grad is None:
            t.grad = torch.zeros_like(t, memory_format=torch.preserve_format)
    return [t.grad if t.requires_grad else None for t in tensors]


def check_targets(op: str, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Raise if a gradient does not go with its tensor, or cannot be written."""
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


def _prepared(op: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [checks.dense(checks.plain(t, op, f"params[{i}]")) for i, t in enumerate(tensors)]


def _by_device(
    tensors: Sequence[Tensor], s: Strengths
) -> Iterator[tuple[torch.device, list[int], Strengths]]:
    """Yield each device with the indices of its tensors and their strengths."""
    for device, indices in _params.by_device(tensors).items():
        yield device, indices, s.select(indices)


def _check_dim(op: str, tensors: Sequence[Tensor], s: Strengths) -> None:
    """Check as the kernels' binding does, but before the first of several devices is written."""
    for i, (t, (_, _, group, dim)) in enumerate(zip(tensors, s.each(len(tensors)), strict=True)):
        rank = max(t.dim(), 1)
        if group and not -rank <= dim < rank:
            raise ValueError(
                f"fusereg.{op}: dim {dim} is out of range for params[{i}] with {t.dim()} dimensions"
            )


def _matching(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return w and a gradient to write to, in one layout and dtype, and whether that is g's own."""
    own = g.detach()
    if type(own) is not Tensor:
        own = own.as_subclass(Tensor)
    if g.dtype == w.dtype and not g.is_neg() and _C.inspect(own) == (0, True):
        return w if w.stride() == g.stride() else torch.empty_like(own).copy_(w), own, True
    w = checks.dense(w)
    return w, torch.empty_like(w).copy_(own), False
