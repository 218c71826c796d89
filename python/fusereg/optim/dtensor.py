"""Steps of sharded models: each rank updates its own shards.

Updates are elementwise, so they need nothing of other ranks; the penalty's value and the norm of
the gradients are added over them. Groups along dimension 0 stay whole where tensors are sharded
along it, as FSDP2 does; other placements are refused with a group term.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core import distributed
from ..penalty import dtensor as _dtensor
from ..penalty.kernels import Strengths
from . import clip
from . import kernels as _kernels
from .kernels import Call, State


def run(call: Call, keys: tuple[str, ...]) -> None:
    """As _kernels.run_prepared, over local shards. The value is the same on every rank."""
    indices = [i for i, p in enumerate(call.params) if p.grad is not None]
    groups = call.group_of()
    rows = [call.hypers[groups[i]][7] for i in indices]
    # A tensor's strength is not asked for: it counts as a group term.
    present = [1.0 if isinstance(r, Tensor) or r != 0.0 else 0.0 for r in rows]
    params = [call.params[i] for i in indices]
    buckets = _dtensor.by_mesh(call.op, params, Strengths(0.0, 0.0, present), 0)
    total = None if call.value is None else torch.zeros_like(call.value)
    with torch.no_grad():
        grads = [_local_grad(call.op, i, call.params[i]) for i in indices]
        for where, own in buckets:
            whole = [indices[n] for n in own]
            local = [_dtensor.local_part(call.params[i]) for i in whole]
            value = None if total is None else torch.zeros_like(total)
            part = call.part(whole, local[0].device, value)
            states = [_local_state(s) for s in part.states]
            part = part._replace(params=local, states=states)
            _kernels.run_prepared(part, keys, [grads[n] for n in own])
            if total is not None and value is not None:
                total += _dtensor.sum_over_ranks(value, where).to(total.device)
    if total is not None and call.value is not None:
        call.value.copy_(total)
    torch.autograd.graph.increment_version([p for p in params if distributed.is_dtensor(p)])


def _local_state(state: State) -> State:
    return {k: _dtensor.local_part(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def _local_grad(op: str, i: int, p: Tensor) -> Tensor | None:
    grad = p.grad
    if grad is None or not distributed.is_dtensor(p):
        return grad
    if not distributed.is_dtensor(grad):
        raise ValueError(
            f"fusereg.{op}: params[{i}].grad must be a DTensor as its parameter, got a plain tensor"
        )
    wanted = cast(DTensor, p)
    placed: Any = cast(DTensor, grad)
    if placed.placements != wanted.placements:
        placed = placed.redistribute(wanted.device_mesh, wanted.placements)
    return cast(Tensor, placed.to_local())


def total_norm(op: str, tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm over whole tensors, the same on every rank."""
    zero = Strengths(0.0, 0.0, 0.0)
    kind = {1.0: 0, 2.0: 1, math.inf: 2}[norm_type]
    parts = []
    with torch.no_grad():
        for where, own in _dtensor.by_mesh(op, tensors, zero, 0):
            norm = clip.local_norm(op, [_dtensor.local_part(tensors[i]) for i in own], kind)
            parts.append(_over_ranks(norm, where, norm_type))
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    return clip.combined(parts, norm_type).to(dtype)


def _over_ranks(norm: Tensor, where: _dtensor.Where, norm_type: float) -> Tensor:
    if where is None or not where[1]:
        return norm
    mesh, dims = where
    total = norm.square() if norm_type == 2.0 else norm.clone()
    how = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    for mesh_dim in dims:
        dist.all_reduce(total, op=how, group=mesh.get_group(mesh_dim))
    return total.sqrt() if norm_type == 2.0 else total
