"""Clipping of gradients element by element, and unit by unit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import _C
from ..core import checks, dispatch, distributed, memory
from ..core import params as _params
from ..core.hints import explains
from ..penalty import dtensor as _sharded
from ..penalty.kernels import DONE
from ..penalty.strengths import NO_PENALTY
from .clip import not_negative

__all__ = ["adaptive_clip_grad_", "clip_grad_value_"]

_tables = memory.launch_tables()
_rows_tables = memory.launch_tables()


@explains("fusereg.optim.clip_grad_value_")
@dispatch.outside_graphs
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    r"""Clip each element of all gradients to the range from ``-clip_value`` to ``clip_value``.

    As ``torch.nn.utils.clip_grad_value_``, in one launch that reads and writes each element once.
    NaN stays. DTensors are clipped shard by shard.

    Args:
        parameters: a tensor, an iterable of tensors, or a module; those without ``.grad`` do not
            count.
        clip_value: >= 0.
        foreach: accepted for compatibility, ignored.

    Raises:
        TypeError, ValueError: a gradient that kernels cannot read, named by its index; gradients
            share memory; or ``clip_value`` is negative.

    Example:
        >>> loss.backward()
        >>> fusereg.optim.clip_grad_value_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    op = "optim.clip_grad_value_"
    limit = not_negative(clip_value, op, "clip_value")
    listed = list({id(p): p for p in _params.as_list(parameters, op)}.values())
    if _C.clip_values(listed, limit, _tables, op) == DONE:
        return
    local: list[Tensor | None] = []
    for i, p in enumerate(listed):
        g = p.grad
        local.append(None)
        if g is None:
            continue
        if g.layout is torch.sparse_coo:
            p.grad = g = g.coalesce()
            g = g.values()
        if distributed.is_dtensor(g):
            g = _sharded.local_part(g)
        checks.check(g, op, f"parameters[{i}].grad")
        local[-1] = g
    checks.check_apart(local, op, "parameters[{}].grad")
    with torch.no_grad():
        for g in local:
            if g is not None:
                g.clamp_(-limit, limit)


@explains("fusereg.optim.adaptive_clip_grad_")
@dispatch.outside_graphs
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor] | nn.Module, clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    r"""Clip the gradient of each unit by the norm of its weights (Brock et al. 2021, NFNets).

    .. math:: g_r \leftarrow g_r \frac{c \max(\|w_r\|, \epsilon)}{\max(\|g_r\|, 10^{-6})}
              \quad \text{unless} \quad \|g_r\| < c \max(\|w_r\|, \epsilon)

    A unit is an index of dimension 0, which is an output of a layer; of transposed convolutions and
    GPT-2's Conv1D, in a module, of dimension 1. A tensor of one dimension is one unit. The paper
    leaves out the last layer: pass the parameters of the others. As timm's
    ``adaptive_clip_grad``, in one launch; norms are summed in float64.

    Args:
        parameters: a tensor, an iterable of tensors, or a module; those without ``.grad`` do not
            count. The norms of a DTensor's units are those of all ranks' parts of them.
        clip_factor: c >= 0.
        eps: least norm of a unit's weights, >= 0: units of zeros may begin to move.

    Raises:
        TypeError, ValueError: a parameter or gradient that kernels cannot read, named by its index;
            gradients share memory; a number is negative.

    Example:
        >>> loss.backward()
        >>> fusereg.optim.adaptive_clip_grad_(model.body, 0.01)
        >>> optimizer.step()
    """
    op = "optim.adaptive_clip_grad_"
    clip_factor = not_negative(clip_factor, op, "clip_factor")
    eps = not_negative(eps, op, "eps")
    turned = _turned(parameters) if isinstance(parameters, nn.Module) else set()
    listed = list({id(p): p for p in _params.as_list(parameters, op)}.values())
    pairs = [(p, p.grad) for p in listed if p.grad is not None]
    listed = [p for p, _ in pairs]
    sharded = distributed.has_dtensor(listed)
    if not (sharded or turned) and _C.clip_rows(listed, clip_factor, eps, _rows_tables, op) == DONE:
        return
    where_of = {i: at for at, own in _sharded.by_mesh(op, listed, NO_PENALTY) for i in own}
    local = [(_sharded.local_part(p), _sharded.local_part(g)) for p, g in pairs]
    for i, (w, g) in enumerate(local):
        _sharded.check_grad(op, i, listed[i])
        checks.check(w, op, f"parameters[{i}]")
        checks.check(g, op, f"parameters[{i}].grad")
    checks.check_apart([g for _, g in local], op, "parameters[{}].grad")
    with torch.no_grad():
        for i, (p, (w, g)) in enumerate(zip(listed, local, strict=True)):
            unit = -1 if p.dim() < 2 else int(id(p) in turned)
            across = _sharded.across(p, where_of[i], unit)
            limit = _norms(w, unit, across).clamp(min=eps) * clip_factor
            norms = _norms(g, unit, across)
            factor = torch.where(norms < limit, 1.0, limit / norms.clamp(min=1e-6))
            g.mul_(factor.to(g.dtype) if g.dtype is torch.float64 else factor.float())


def _norms(t: Tensor, unit: int, across: _sharded.Where) -> Tensor:
    """Return the norms of the slices along a dimension, of all ranks' parts of them; -1: of all."""
    dims = [d for d in range(t.dim()) if d != unit]
    norms: Tensor = torch.linalg.vector_norm(t, 2, dims or None, keepdim=True, dtype=torch.float64)
    return norms if across is None else _sharded.sum_over_ranks(norms.square(), across).sqrt()


def _turned(model: nn.Module) -> set[int]:
    """Return the ids of the weights whose outputs are indices of dimension 1."""
    weights = ((getattr(m, "weight", None), _params.output_dim(m)) for m in model.modules())
    return {id(w) for w, dim in weights if dim and isinstance(w, Tensor) and w.dim() > 1}
