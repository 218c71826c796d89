"""Sharded tensors and models, and comparisons with whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusereg import functional as F
from ranks import Ranks


@dataclass
class Case:
    """A whole tensor, and the same one sharded."""

    name: str
    whole: Tensor
    held: Tensor


def shard(whole: Tensor, ranks: Ranks, placement: Any) -> Tensor:
    # Of a copy: replicas may be the very memory that they are made from.
    return distribute_tensor(whole.clone(), ranks.mesh, [placement])


def make_cases(
    ranks: Ranks, dtype: torch.dtype = torch.float64, columns: bool = False
) -> list[Case]:
    """Return a tensor for each kind of placement; columns cut groups along dimension 0."""
    wanted: list[tuple[str, tuple[int, ...], Any]] = [
        ("plain", (2, 5), None),
        ("even", (4 * ranks.world, 3), Shard(0)),
        ("uneven", (2 * ranks.world + 1, 3), Shard(0)),
        ("empty shards", (1, 4), Shard(0)),
        ("empty", (0, 3), Shard(0)),
        ("replicated", (4, 3), Replicate()),
        ("replicated scalar", (), Replicate()),
        ("one dimension", (ranks.world + 1,), Shard(0)),
        ("four dimensions", (5, 2, 3, 3), Shard(0)),
        ("plain scalar", (), None),
        ("more than one chunk", (2 * ranks.world - 1, 20_000), Shard(0)),
    ]
    if columns:
        wanted += [("columns", (3, 7), Shard(1)), ("columns, negative", (2, 3, 5), Shard(-1))]
    cases = []
    for name, shape, placement in wanted:
        whole = torch.randn(shape, dtype=torch.float64).to(dtype)
        held = whole.clone() if placement is None else shard(whole, ranks, placement)
        cases.append(Case(name, whole, held.requires_grad_()))
    return cases


def whole(tensor: Tensor | None) -> Tensor:
    """Gather a plain or sharded tensor; check that replicas are equal on every rank."""
    assert tensor is not None
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            local = tensor.to_local().contiguous()
            other = local.clone()
            dist.broadcast(other, group=tensor.device_mesh.get_group(mesh_dim), group_src=0)
            assert torch.equal(local, other), "replicas differ"
    return tensor.full_tensor()


def same_on_every_rank(value: Tensor) -> None:
    """Check that a tensor has the same bits on every rank."""
    assert not isinstance(value, DTensor)
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.detach().contiguous())
    assert all(torch.equal(v, values[0]) for v in values), values


def assert_value(value: Tensor, wanted: Tensor, tolerance: float = 1e-13) -> None:
    assert value.shape == ()
    torch.testing.assert_close(
        value.detach().double(), wanted.double(), rtol=tolerance, atol=tolerance
    )
    same_on_every_rank(value)


def assert_same(actual: Tensor, wanted: Tensor, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(
        actual.detach().double(), wanted.detach().double(), rtol=tolerance, atol=tolerance
    )


@contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """Record the number of elements of each all-reduce."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


PENALTIES: list[tuple[str, Callable[[Any], Tensor], dict[str, float]]] = [
    ("l1", lambda p: F.l1_penalty(p, 0.3), {"l1": 0.3}),
    ("l2", lambda p: F.l2_penalty(p, 0.7), {"l2": 1.4}),
    ("l2 half", lambda p: F.l2_penalty(p, 0.7, half=True), {"l2": 0.7}),
    ("elastic net", lambda p: F.elastic_net_penalty(p, 0.3, 0.7), {"l1": 0.3, "l2": 0.7}),
    ("group", lambda p: F.group_lasso_penalty(p, 0.5), {"group": 0.5}),
]
