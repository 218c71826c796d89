"""Penalties of sharded models: the local part of each DTensor, then one all-reduce per mesh.

The penalty of a DTensor is that of the whole tensor, on every rank. Each rank computes the part of
its own shard, and the parts are added over the mesh dimensions along which the tensor is sharded.
Group terms need whole groups on one rank: sharding along the group dimension (as FSDP2 shards rows)
keeps groups whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import checks, distributed
from . import kernels as _kernels
from . import op as _op
from .strengths import NO_PENALTY, Strengths

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: The mesh and those of its dimensions along which a tensor is sharded; None: not a DTensor.
Where: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]] | None"


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    return cast("DTensor", tensor).to_local() if distributed.is_dtensor(tensor) else tensor


def by_mesh(op: str, tensors: Sequence[Tensor], s: Strengths) -> list[tuple[Where, list[int]]]:
    """Return indices by mesh and sharded dimensions, in an order that is the same on every rank."""
    found: dict[Where, list[int]] = {}
    for i, (t, (_, _, group, dim)) in enumerate(zip(tensors, s.each(len(tensors)), strict=True)):
        # By the mesh's value: fully_shard() without a mesh makes a new, equal one at each call.
        found.setdefault(_placement(f"fusereg.{op}: params[{i}]", t, group, dim), []).append(i)
    return list(found.items())


def _placement(where: str, tensor: Tensor, group: float, dim: int) -> Where:
    if not distributed.is_dtensor(tensor):
        return None
    tensor = cast("DTensor", tensor)
    sharded = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or tensor.device_mesh.size(mesh_dim) == 1:
            continue
        # Not isinstance(Shard): FSDP2 over tensor parallelism deals rows out in another order, with
        # a placement that is none of its subclasses but has a dim as well.
        along = getattr(placement, "dim", None)
        if not isinstance(along, int):
            raise ValueError(
                f"{where} is a DTensor with placement {placement}; "
                "redistribute it to Shard or Replicate first"
            )
        if group and along % tensor.dim() != dim % tensor.dim():
            raise ValueError(
                f"{where} is sharded along dimension {along}, which cuts its "
                f"groups (along dimension {dim}) across ranks; shard it along dimension {dim}"
            )
        sharded.append(mesh_dim)
    return tensor.device_mesh, tuple(sharded)


def across(tensor: Tensor, where: Where, dim: int) -> Where:
    """Return over which ranks the slices along a dimension are spread; None if over none."""
    if where is None:
        return None
    placements = cast("DTensor", tensor).placements
    spread = tuple(m for m in where[1] if placements[m].dim % tensor.dim() != dim)  # type: ignore[attr-defined]
    return (where[0], spread) if spread else None


def check_grad(op: str, i: int, tensor: Tensor) -> None:
    """Raise if a DTensor has a gradient that is placed otherwise."""
    grad = tensor.grad if tensor.is_leaf and distributed.is_dtensor(tensor) else None
    if grad is None:
        return
    wanted = cast("DTensor", tensor).placements
    if not distributed.is_dtensor(grad) or cast("DTensor", grad).placements != wanted:
        raise ValueError(
            f"fusereg.{op}: params[{i}].grad must be a DTensor placed as its parameter, {wanted}"
        )


class _SumOverRanks(torch.autograd.Function):
    """All-reduce. Each rank has the same total, so the gradient passes to its part unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: DeviceMesh, dims: tuple[int, ...]) -> Tensor:
        total = value.clone()
        for mesh_dim in dims:
            dist.all_reduce(total, group=mesh.get_group(mesh_dim))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


def sum_over_ranks(value: Tensor, where: Where) -> Tensor:
    """Return the sum over the ranks that hold other shards, differentiable."""
    if where is None or not where[1]:
        return value
    return cast(Tensor, _SumOverRanks.apply(value, *where))  # type: ignore[no-untyped-call]


def penalty(op: str, tensors: Sequence[Tensor], s: Strengths) -> Tensor:
    """Return the differentiable sum of R over whole tensors, the same on every rank."""
    values = []
    for where, indices in by_mesh(op, tensors, s):
        local = [local_part(tensors[i]) for i in indices]
        own = s.select(indices).arguments()
        values.append(sum_over_ranks(_op.penalty.eager(local, *own, op), where))
    return _kernels.sum_on_first(values)


def add_grads_(
    op: str, tensors: Sequence[Tensor], scale: Tensor | float | None, s: Strengths
) -> Tensor:
    """Add to gradients as kernels.add_grads_ does, over local shards and their gradients.

    Everything is checked before the first bucket's gradients are written.
    """
    with torch.no_grad():
        local = [local_part(t) for t in tensors]
    for i, t in enumerate(local):
        checks.plain(t, op, f"params[{i}]")
    buckets = by_mesh(op, tensors, s)
    for i, t in enumerate(tensors):
        check_grad(op, i, t)
    values = []
    with torch.no_grad():
        found = [g if g is None else local_part(g) for g in _kernels.own_grads(op, tensors)]
        _kernels.check_targets(op, local, found)
        targets = _kernels.create_missing(tensors)
        for where, indices in buckets:
            part = [local[i] for i in indices]
            grads = [None if (g := targets[i]) is None else local_part(g) for i in indices]
            value = _kernels.add_grads_(op, part, grads, scale, s.select(indices))
            values.append(sum_over_ranks(value, where))
    mark_written(t for t in targets if t is not None)
    return _kernels.sum_on_first(values)


def prox_(op: str, tensors: Sequence[Tensor], s: Strengths) -> None:
    """Apply the proximal operator to local shards; there is nothing to communicate."""
    by_mesh(op, tensors, s)  # raises where a group would be cut
    with torch.no_grad():
        _kernels.prox_(op, [local_part(t) for t in tensors], s)
    mark_written(tensors)


def mark_written(tensors: Iterable[Tensor]) -> None:
    """Increment the versions of DTensors, which do not follow those of their local parts."""
    torch.autograd.graph.increment_version([t for t in tensors if distributed.is_dtensor(t)])


def zeros(tensors: Sequence[Tensor]) -> Tensor:
    """Return the number of exact zeros in the whole tensors, the same on every rank."""
    counts = []
    with torch.no_grad():
        for where, indices in by_mesh("sparsity", tensors, NO_PENALTY):
            local = [local_part(tensors[i]) for i in indices]
            count = _kernels.sum_on_first([t.numel() - torch.count_nonzero(t) for t in local])
            counts.append(sum_over_ranks(count, where))
    return _kernels.sum_on_first(counts)
