"""Penalties of sharded models: the local part of each DTensor, then one all-reduce per mesh.

A DTensor's penalty is that of the whole tensor, on every rank. Each rank computes its own shard's
part and the parts are added over the mesh dimensions along which the tensor is sharded; over those
along which it is replicated there is nothing to add. Group terms need whole groups on one rank:
sharding along the group dimension (as FSDP2 shards rows) keeps them so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..core import checks, distributed
from . import kernels as _penalty_kernels
from . import op as _penalty_ops
from .kernels import Strengths

# The mesh and those of its dimensions along which a tensor is sharded; None: not a DTensor.
Where = tuple[DeviceMesh, tuple[int, ...]] | None


def _placement(op: str, tensor: Tensor, group: float, dim: int, index: int) -> Where:
    if not distributed.is_dtensor(tensor):
        return None
    tensor = cast(DTensor, tensor)
    sharded = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or tensor.device_mesh.size(mesh_dim) == 1:
            continue
        # Not isinstance(Shard): FSDP2 over tensor parallelism deals rows out in another order, with
        # a placement that is none of its subclasses but has a dim as well.
        along = getattr(placement, "dim", None)
        if not isinstance(along, int):
            raise ValueError(
                f"fusereg.{op}: params[{index}] is a DTensor with placement {placement}; "
                "redistribute it to Shard or Replicate first"
            )
        if group and along % tensor.dim() != dim % tensor.dim():
            raise ValueError(
                f"fusereg.{op}: params[{index}] is sharded along dimension {along}, which cuts its "
                f"groups (along dimension {dim}) across ranks; shard it along dimension {dim}"
            )
        sharded.append(mesh_dim)
    return tensor.device_mesh, tuple(sharded)


def by_mesh(
    op: str, tensors: Sequence[Tensor], s: Strengths, dim: int
) -> list[tuple[Where, list[int]]]:
    """Indices by mesh and sharded dimensions, in an order that is the same on every rank."""
    groups = s.lists(len(tensors))[2]
    found: dict[Where, list[int]] = {}
    for i, (t, group) in enumerate(zip(tensors, groups, strict=True)):
        where = _placement(op, t, group, dim, i)
        # By the mesh's value: fully_shard() without a mesh makes a new, equal one at each call.
        found.setdefault(where, []).append(i)
    return list(found.items())


class _SumOverRanks(torch.autograd.Function):
    """All-reduced value. Its gradient is the local part's, for every rank holds the same total."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: DeviceMesh, dims: tuple[int, ...]) -> Tensor:
        total = value.clone()
        for mesh_dim in dims:
            dist.all_reduce(total, group=mesh.get_group(mesh_dim))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for v in values[1:]:
        total = total + v.to(total.device)
    return total


def sum_over_ranks(value: Tensor, where: Where) -> Tensor:
    if where is None or not where[1]:
        return value
    return cast(Tensor, _SumOverRanks.apply(value, *where))  # type: ignore[no-untyped-call]


def penalty(op: str, tensors: Sequence[Tensor], s: Strengths, dim: int) -> Tensor:
    """The differentiable sum of R over whole tensors, the same on every rank."""
    values = []
    for where, indices in by_mesh(op, tensors, s, dim):
        local = [local_part(tensors[i]) for i in indices]
        part = s.select(indices)
        values.append(sum_over_ranks(_penalty_ops.penalty(op, local, part, dim), where))
    return _total(values)


def add_grads_(
    op: str, tensors: Sequence[Tensor], scale: Tensor | float | None, s: Strengths, dim: int
) -> Tensor:
    """As _penalty_kernels.add_grads_, over local shards and their gradients.

    Everything is checked before the first bucket's gradients are written.
    """
    with torch.no_grad():
        local = [local_part(t) for t in tensors]
    for i, t in enumerate(local):
        checks.plain(t, op, f"params[{i}]")
    buckets = by_mesh(op, tensors, s, dim)
    for i, t in enumerate(tensors):
        grad = t.grad if t.is_leaf else None
        if distributed.is_dtensor(t) and grad is not None:
            wanted = cast(DTensor, t).placements
            if not distributed.is_dtensor(grad) or cast(DTensor, grad).placements != wanted:
                raise ValueError(
                    f"fusereg.{op}: params[{i}].grad must be a DTensor placed as its parameter, "
                    f"{wanted}"
                )
    values = []
    with torch.no_grad():
        found = [g if g is None else local_part(g) for g in _penalty_kernels.own_grads(tensors, op)]
        _penalty_kernels.check_targets(local, found, op)
        targets = _penalty_kernels.create_missing(tensors)
        for where, indices in buckets:
            part = [local[i] for i in indices]
            grads = [None if (g := targets[i]) is None else local_part(g) for i in indices]
            value = _penalty_kernels.add_grads_(op, part, grads, scale, s.select(indices), dim)
            values.append(sum_over_ranks(value, where))
    _tell_autograd(t for t in targets if t is not None)
    return _total(values)


def prox_(op: str, tensors: Sequence[Tensor], s: Strengths, dim: int) -> None:
    """As _penalty_kernels.prox_, over local shards; there is nothing to communicate."""
    by_mesh(op, tensors, s, dim)  # raises where a group would be cut
    with torch.no_grad():
        _penalty_kernels.prox_(op, [local_part(t) for t in tensors], s, dim)
    _tell_autograd(tensors)


def _tell_autograd(written: Iterable[Tensor]) -> None:
    """A DTensor counts its versions apart from those of its local part, which the kernel moved."""
    torch.autograd.graph.increment_version([t for t in written if distributed.is_dtensor(t)])


def local_part(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local() if distributed.is_dtensor(tensor) else tensor


def zeros(tensors: Sequence[Tensor]) -> Tensor:
    """The number of exact zeros in the whole tensors, the same on every rank."""
    counts = []
    with torch.no_grad():
        for where, indices in by_mesh("sparsity", tensors, Strengths(0.0, 0.0, 0.0), 0):
            local = [local_part(tensors[i]) for i in indices]
            count = _total([t.numel() - torch.count_nonzero(t) for t in local])
            counts.append(sum_over_ranks(count, where))
    return _total(counts)
