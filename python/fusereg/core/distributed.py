"""DTensors and process groups.

Dropout of a DTensor: each rank drops from its own shard, under one Philox state for the mesh.

Where a shard's draws are consecutive among those of the whole tensor (it is sharded along the first
dimension, or along one in which rows share their draw), it gets exactly its part of the whole
tensor's mask, through index_offset; replicas get the same mask. Shards along other dimensions draw
from indices of their own, beyond those of the whole tensor: independent, but another mask than the
whole tensor would get on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import _C
from . import random
from .random import Source

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def drawn(
    x: Tensor,
    source: Source,
    index_offset: int,
    rows: int,
    op: str,
    draw: Callable[[Tensor, int | Tensor, int], Tensor],
) -> Tensor:
    """Return the DTensor of draw(local part, seed, its index_offset) on each rank."""
    from torch.distributed.tensor import DTensor

    x = cast(DTensor, x)
    index_offset += _first_index(x, rows, op)
    y = draw(x.to_local().contiguous(), _common_state(x, source, op), index_offset)
    return DTensor.from_local(
        y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=_row_major(x.shape)
    )


def _row_major(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _first_index(x: DTensor, row_dims: int, op: str) -> int:
    """Return the index of this rank's first draw."""
    mesh = x.device_mesh
    coordinate = mesh.get_coordinate()
    counted = x.shape[:row_dims] if row_dims else x.shape
    sizes, starts = list(counted), [0] * len(counted)
    shard, plain = 0, True  # the shard's number; whether its place can be told by its sizes
    for mesh_dim, placement in enumerate(x.placements):
        count = mesh.size(mesh_dim)
        if placement.is_replicate() or count == 1 or coordinate is None:
            continue
        along = getattr(placement, "dim", None)
        if not isinstance(along, int):
            raise ValueError(
                f"fusereg.{op}: x is a DTensor with placement {placement}; redistribute it to "
                "Shard or Replicate first"
            )
        if along >= len(counted):
            continue  # within rows: each rank has a piece of all of them
        part = coordinate[mesh_dim]
        shard = shard * count + part
        plain = plain and placement.is_shard()
        length = -(-sizes[along] // count)
        start = min(sizes[along], part * length)
        starts[along] += start
        sizes[along] = min(length, sizes[along] - start)
    strides = _row_major(counted)
    cut = [d for d, (n, whole) in enumerate(zip(sizes, counted, strict=True)) if n != whole]
    if plain and (not cut or math.prod(counted[: cut[-1]]) == 1):
        return sum(at * stride for at, stride in zip(starts, strides, strict=True))
    return (shard + 1) * math.prod(counted)


def _common_state(x: DTensor, source: Source, op: str) -> int | Tensor:
    """Return one state for all ranks of the mesh: as given, or drawn by its first rank."""
    device = x.to_local().device
    random.check_source(device, source, op)
    if source.seed is not None:
        return source.seed
    state = random.traced_state(x.to_local(), source, op)
    for mesh_dim in range(x.device_mesh.ndim):
        torch.distributed.broadcast(state, group=x.device_mesh.get_group(mesh_dim), group_src=0)
    return state


def is_dtensor(tensor: object) -> bool:
    """Return whether this is a DTensor; torch.distributed.tensor is imported only if it may be."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def has_dtensor(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a DTensor is among the tensors."""
    only_plain, _ = _C.scan(tensors)  # a few nanoseconds a tensor
    return not only_plain and any(is_dtensor(t) for t in tensors)


def all_gather(tensor: torch.Tensor, group: object) -> torch.Tensor:
    """Return every process's tensor in the order of ranks, as [processes, *shape]."""
    world: int = torch.distributed.get_world_size(group)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        flat = functional.all_gather_tensor(tensor.flatten(), 0, group)  # type: ignore[arg-type]
        return flat.view(world, *tensor.shape)
    result = tensor.new_empty((world, *tensor.shape))
    # Its name since 2.13, where the old one warns.
    gather = getattr(torch.distributed, "all_gather_single", None)
    if gather is None:
        gather = torch.distributed.all_gather_into_tensor
    gather(result.view(-1), tensor.contiguous().view(-1), group=group)
    return result


def all_reduce(tensor: torch.Tensor, group: object) -> torch.Tensor:
    """Return the sum of every process's tensor; ``tensor`` itself may be written to."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        result: torch.Tensor = functional.all_reduce(tensor, "sum", group)  # type: ignore[arg-type]
        return result
    torch.distributed.all_reduce(tensor, group=group)
    return tensor


def is_average(module: torch.nn.Module) -> bool:
    """Return whether a module holds averages of another's weights: torch's, or one of timm's."""
    kinds = type(unwrapped(module)).__mro__
    return any(kind.__name__.startswith(("AveragedModel", "ModelEma")) for kind in kinds)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        # Looked up by name: to import torch._dynamo, for its type, takes seconds.
        compiled = getattr(module, "_orig_mod", None)
        if isinstance(compiled, torch.nn.Module):
            module = compiled
        elif torch.distributed.is_available() and isinstance(
            module, torch.nn.parallel.DistributedDataParallel
        ):
            module = module.module
        else:
            return module
