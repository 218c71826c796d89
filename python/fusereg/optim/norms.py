"""Norms over all elements of many tensors, DTensors as wholes: one launch for plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed, memory
from ..core import params as _params
from ..penalty import dtensor as _sharded
from ..penalty.kernels import must, reduced, value_dtype
from ..penalty.strengths import NO_PENALTY

#: Norms that have kernels, and the kernels' numbers for them.
KINDS = {1.0: 0, 2.0: 1, math.inf: 2}
#: For calls outside an optimizer. Only sizes and dtypes are in it (the addresses of some 3800
#: tensors travel with each launch), so that calls with the same model find it as they need it.
_tables = memory.launch_tables()


def in_one_call(
    op: str,
    tensors: Sequence[Tensor],
    norm_type: float,
    *,
    of_params: bool = False,
    max_norm: float = -1.0,
    tables: _C._LaunchTables = _tables,
) -> Tensor | None:
    """Return the norm; None, with nothing written, if a tensor must be prepared first.

    Args:
        of_params: read each tensor's ``.grad``.
        max_norm: scale the tensors, or gradients, so that the norm is at most this; < 0: do not.
        tables: memory for CUDA launches over lists like this one.
    """
    kind = KINDS[norm_type]
    return reduced(
        tensors,
        lambda out, work: _C.grad_norm(tensors, of_params, out, kind, max_norm, work, tables, op),
    )


def norm_of_grads(op: str, params: list[Tensor], tables: _C._LaunchTables) -> Tensor:
    """Return the 2-norm of all gradients; ``tables`` are for such calls alone."""
    norm = in_one_call(op, params, 2.0, of_params=True, tables=tables)
    if norm is None:
        norm = total_norm(op, [p.grad for p in params if p.grad is not None], 2.0)
    return norm


@dispatch.outside_graphs
def total_norm(op: str, tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm over all elements; DTensors count as wholes, the same on every rank."""
    if not tensors:
        return torch.tensor(0.0)
    if norm_type not in KINDS:
        return torch.nn.utils.get_total_norm(tensors, norm_type)
    if any(isinstance(t, Tensor) and t.is_complex() for t in tensors):
        # The 2-norm of complex numbers is that of their parts; others are of absolute values.
        two = norm_type == 2.0
        parts_of = [
            torch.view_as_real(t.resolve_conj()) if two else t.abs()
            for t in (t.detach() for t in tensors)
            if t.is_complex()
        ]
        tensors = [*(t for t in tensors if not t.is_complex()), *parts_of]
    buckets: list[tuple[_sharded.Where, Sequence[int]]] = [(None, range(len(tensors)))]
    if distributed.has_dtensor(tensors):
        buckets = list(_sharded.by_mesh(op, tensors, NO_PENALTY))
    else:
        norm = in_one_call(op, tensors, norm_type)
        if norm is not None:
            return norm
    with torch.no_grad():
        parts = []
        for where, own in buckets:
            local = [_sharded.local_part(tensors[i]) for i in own]
            parts.append(_over_ranks(_prepared_norm(op, local, norm_type), where, norm_type))
        return _combined(parts, norm_type).to(value_dtype(tensors))


def _prepared_norm(op: str, tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm in float64, of tensors that are prepared one by one."""
    plain = [
        checks.dense(checks.plain(_densified(t), op, f"tensors[{i}]"))
        for i, t in enumerate(tensors)
    ]
    parts = []
    for device, indices in _params.by_device(plain).items():
        out = torch.empty((), dtype=torch.float64, device=device)
        own = [plain[i] for i in indices]
        work = memory.workspace(device)
        must(op, _C.grad_norm(own, False, out, KINDS[norm_type], -1.0, work, _tables, op))
        parts.append(out)
    return _combined(parts, norm_type)


def _combined(norms: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of the whole from those of its parts, on the first one's device."""
    if len(norms) == 1:
        return norms[0]
    together = torch.stack([n.to(norms[0].device, torch.float64) for n in norms])
    norm: Tensor = torch.linalg.vector_norm(together, norm_type)
    return norm


def _densified(t: object) -> Tensor:
    if isinstance(t, Tensor) and t.layout is torch.sparse_coo:
        return t.coalesce().values()
    return t  # type: ignore[return-value]


def _over_ranks(norm: Tensor, where: _sharded.Where, norm_type: float) -> Tensor:
    """Return the norm of the shards of all ranks."""
    if where is None or not where[1]:
        return norm
    mesh, dims = where
    total = norm.square() if norm_type == 2.0 else norm.clone()
    how = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    for mesh_dim in dims:
        dist.all_reduce(total, op=how, group=mesh.get_group(mesh_dim))
    return total.sqrt() if norm_type == 2.0 else total
