"""Steps of sharded models: each rank updates its own shards.

Updates are elementwise, so they need nothing of other ranks; the penalty's value and the norm of
the gradients are added over them. Groups along dimension 0 stay whole where tensors are sharded
along it, as FSDP2 does; other placements are refused with a group term.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..core import distributed
from ..penalty import dtensor as _sharded
from ..penalty.strengths import Strengths
from . import kernels as _kernels
from .kernels import Call, given

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def run(call: Call, keys: tuple[str, ...]) -> None:
    """Run the step over local shards. The value is the same on every rank."""
    hypers = call.hyper_of()
    indices = [i for i, _ in call.present()]
    params = [call.params[i] for i in indices]
    total = None if call.value is None else torch.zeros_like(call.value)
    with torch.no_grad():
        for dim in {hypers[i].group_dim for i in indices}:
            # A tensor's strength is not asked for: it counts as a group term.
            by_group = [
                given(h.group) and h.group_dim == dim for h in map(hypers.__getitem__, indices)
            ]
            strengths = Strengths(group=[float(x) for x in by_group], dim=dim)
            buckets = _sharded.by_mesh(call.op, params, strengths)
        grads = [_local_grad(call.op, i, call.params[i]) for i in indices]
        for where, own in buckets:
            local = [_sharded.local_part(params[n]) for n in own]
            value = None if total is None else torch.zeros_like(total)
            whole = [indices[n] for n in own]
            own_grads = [grads[n] for n in own]
            part = call.part(whole, params=local, grads=own_grads, value=value)
            states = [{k: _local_state(v) for k, v in s.items()} for s in part.states]
            over_ranks = partial(_sharded.sum_over_ranks, where=where)
            _kernels.run_in_place(part._replace(states=states), keys, over_ranks)
            if total is not None and value is not None:
                total += _sharded.sum_over_ranks(value, where).to(total.device)
    if total is not None and call.value is not None:
        call.value.copy_(total)
    _sharded.mark_written(params)


def _local_state(value: Any) -> Any:
    return _sharded.local_part(value) if isinstance(value, Tensor) else value


def _local_grad(op: str, i: int, p: Tensor) -> Tensor | None:
    grad = p.grad
    if grad is None or not distributed.is_dtensor(p):
        return grad
    if not distributed.is_dtensor(grad):
        raise ValueError(
            f"fusereg.{op}: params[{i}].grad must be a DTensor as its parameter, got a plain tensor"
        )
    wanted = cast("DTensor", p)
    placed: Any = grad
    if placed.placements != wanted.placements:
        placed = placed.redistribute(wanted.device_mesh, wanted.placements)
    return cast(Tensor, placed.to_local())
