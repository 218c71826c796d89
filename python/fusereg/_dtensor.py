"""Penalties of sharded models: the local part of each DTensor, then one all-reduce per mesh.

A DTensor's penalty is that of the whole tensor, on every rank. Each rank computes its own shard's part
and the parts are added over the mesh dimensions along which the tensor is sharded; over those along
which it is replicated there is nothing to add. Group terms need whole groups on one rank: sharding
along the group dimension (as FSDP2 shards rows) keeps them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import _dispatch, _penalty_ops
from ._penalty_ops import Strengths

_Where = tuple[DeviceMesh, tuple[int, ...]] | None  # mesh and its sharded dimensions; None: not a DTensor


def _placement(op: str, tensor: Tensor, group: float, dim: int, index: int) -> _Where:
    if not _dispatch.is_dtensor(tensor):
        return None
    tensor = cast(DTensor, tensor)
    sharded = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard):
            raise ValueError(
                f"fusereg.{op}: params[{index}] is a DTensor with placement {placement}; "
                "redistribute it to Shard or Replicate first"
            )
        if group and placement.dim % tensor.dim() != dim % tensor.dim():
            raise ValueError(
                f"fusereg.{op}: params[{index}] is sharded along dimension {placement.dim}, which cuts "
                f"its groups (along dimension {dim}) across ranks; shard it along dimension {dim}"
            )
        sharded.append(mesh_dim)
    return tensor.device_mesh, tuple(sharded)


def _buckets(
    op: str, tensors: Sequence[Tensor], s: Strengths, dim: int
) -> list[tuple[_Where, list[int]]]:
    """Indices by mesh and sharded dimensions, in an order that is the same on every rank."""
    groups = s.lists(len(tensors), op)[2]
    found: dict[Any, tuple[_Where, list[int]]] = {}
    for i, (t, group) in enumerate(zip(tensors, groups, strict=True)):
        where = _placement(op, t, group, dim, i)
        key = None if where is None else (id(where[0]), where[1])
        found.setdefault(key, (where, []))[1].append(i)
    return list(found.values())


class _SumOverRanks(torch.autograd.Function):
    """All-reduced value; its gradient is that of the local part, for every rank holds the same total."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: DeviceMesh, dims: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        total = value.clone()
        for mesh_dim in dims:
            dist.all_reduce(total, group=mesh.get_group(mesh_dim))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return grad, None, None


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for v in values[1:]:
        total = total + v.to(total.device)
    return total


def _reduced(value: Tensor, where: _Where) -> Tensor:
    if where is None or not where[1]:
        return value
    return cast(Tensor, _SumOverRanks.apply(value, *where))


def penalty(op: str, tensors: Sequence[Tensor], s: Strengths, dim: int) -> Tensor:
    """The differentiable sum of R over whole tensors, the same on every rank."""
    values = []
    for where, indices in _buckets(op, tensors, s, dim):
        local = [_local(tensors[i]) for i in indices]
        part = s.select(indices)
        values.append(_reduced(_penalty_ops.penalty(local, *part, dim, op), where))
    return _total(values)


def add_grads_(
    op: str, tensors: Sequence[Tensor], scale: Tensor | float | None, s: Strengths, dim: int
) -> Tensor:
    """As _penalty_ops.add_grads_, over local shards and their gradients."""
    buckets = _buckets(op, tensors, s, dim)
    for i, t in enumerate(tensors):
        grad = t.grad
        if _dispatch.is_dtensor(t) and grad is not None:
            wanted = cast(DTensor, t).placements
            if not _dispatch.is_dtensor(grad) or cast(DTensor, grad).placements != wanted:
                raise ValueError(
                    f"fusereg.{op}: params[{i}].grad must be a DTensor placed as its parameter, {wanted}"
                )
    for t in tensors:
        if t.requires_grad and t.grad is None:
            t.grad = torch.zeros_like(t)
    values = []
    with torch.no_grad():
        for where, indices in buckets:
            local = [_local(tensors[i]) for i in indices]
            grads = [
                None if (g := tensors[i].grad) is None or not tensors[i].requires_grad else _local(g)
                for i in indices
            ]
            value = _penalty_ops.add_grads_(op, local, grads, scale, s.select(indices), dim)
            values.append(_reduced(value, where))
    return _total(values)


def prox_(op: str, tensors: Sequence[Tensor], s: Strengths, dim: int) -> None:
    _buckets(op, tensors, s, dim)  # raises where a group would be cut; there is nothing to communicate
    with torch.no_grad():
        _penalty_ops.prox_(op, [_local(t) for t in tensors], s, dim)


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local() if _dispatch.is_dtensor(tensor) else tensor


def zeros(tensors: Sequence[Tensor]) -> Tensor:
    """The number of exact zeros in the whole tensors, the same on every rank."""
    counts = []
    for i, t in enumerate(tensors):
        local = _local(t.detach())
        count = local.numel() - torch.count_nonzero(local)
        counts.append(_reduced(count, _placement("sparsity", t, 0.0, 0, i)))
    return _total(counts)
