"""Dropout of DTensors on several gloo processes, against the whole tensor on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusereg
from fusereg import functional as F
from ranks import Ranks, collect, on

SEED = 11


def whole(t: Tensor | None) -> Tensor:
    assert isinstance(t, DTensor)
    return t.full_tensor()


@on(2, 3)
def shards_get_their_part_of_the_mask(ranks: Ranks) -> None:
    """Along the first dimension, unevenly and with empty shards; replicated; within rows."""
    for rows in (6, 5, 1):
        for placement in (Shard(0), Replicate()):
            x = torch.randn(rows, 4, 3)
            held = distribute_tensor(x, ranks.mesh, [placement])
            held.requires_grad_()
            for function in (F.dropout, F.alpha_dropout, F.drop_path, F.gaussian_dropout):
                held.grad = None
                y = function(held, 0.4, True, seed=SEED, index_offset=5)
                wanted = function(x, 0.4, True, seed=SEED, index_offset=5)
                assert isinstance(y, DTensor)
                assert y.placements == (placement,)
                assert torch.equal(whole(y), wanted)
                leaf = x.clone().requires_grad_()
                function(leaf, 0.4, True, seed=SEED, index_offset=5).sum().backward()
                y.sum().backward()
                assert torch.equal(whole(held.grad), leaf.grad)
    images = torch.randn(4, 6, 5, 3)
    for placement in (Shard(0), Shard(2), Shard(3), Replicate()):
        held = distribute_tensor(images, ranks.mesh, [placement])
        y = F.dropout2d(held, 0.4, seed=SEED)
        assert torch.equal(whole(y), F.dropout2d(images, 0.4, seed=SEED))


@on(2, 3)
def ranks_share_a_pair_that_nobody_gave(ranks: Ranks) -> None:
    torch.manual_seed(ranks.rank)  # each rank's generator is somewhere else
    x = torch.ones(64, 8)
    for placement in (Shard(0), Replicate()):
        held = distribute_tensor(x, ranks.mesh, [placement])
        first, second = whole(F.dropout(held)), whole(F.dropout(held))
        assert not torch.equal(first, second)
        for t in (first, second):
            parts: list[Any] = [torch.empty_like(t) for _ in range(ranks.world)]
            torch.distributed.all_gather(parts, t)
            assert all(torch.equal(part, t) for part in parts)
    generator = torch.Generator().manual_seed(ranks.rank)
    y = F.dropout(distribute_tensor(x, ranks.mesh, [Replicate()]), generator=generator)
    parts = [torch.empty_like(x) for _ in range(ranks.world)]
    torch.distributed.all_gather(parts, y.to_local())
    assert all(torch.equal(part, y.to_local()) for part in parts)


@on(2)
def sequences_share_their_mask(ranks: Ranks) -> None:
    x = torch.randn(6, 5, 4)
    for placement in (Shard(0), Shard(1), Replicate()):
        held = distribute_tensor(x, ranks.mesh, [placement])
        y = F.consistent_dropout(held, 0.4, 1, seed=SEED)
        assert torch.equal(whole(y), F.consistent_dropout(x, 0.4, 1, seed=SEED)), placement


@on(2)
def other_shards_are_independent(ranks: Ranks) -> None:
    x = torch.ones(200, 64)
    y = F.dropout(distribute_tensor(x, ranks.mesh, [Shard(1)]), 0.5, seed=SEED)
    found = whole(y)
    assert set(found.unique().tolist()) == {0.0, 2.0}
    left, right = found[:, :32] != 0, found[:, 32:] != 0
    assert 0.45 < float(found.mean()) / 2 < 0.55
    assert 0.45 < float((left == right).double().mean()) < 0.55
    again = F.dropout(distribute_tensor(x, ranks.mesh, [Shard(1)]), 0.5, seed=SEED)
    assert torch.equal(whole(again), found)


@on(2)
def modules_in_place_and_errors(ranks: Ranks) -> None:
    x = torch.ones(8, 4)
    held = distribute_tensor(x, ranks.mesh, [Shard(0)])
    assert fusereg.nn.Dropout(0.5).eval()(held) is held
    y = fusereg.nn.Dropout(0.5)(held)
    assert isinstance(y, DTensor)
    assert set(whole(y).unique().tolist()) == {0.0, 2.0}
    copy = held.clone()
    assert F.dropout(copy, 0.5, inplace=True, seed=SEED) is copy
    assert torch.equal(whole(copy), F.dropout(x, 0.5, seed=SEED))
    partial = DTensor.from_local(x, ranks.mesh, [Partial()])
    with pytest.raises(ValueError, match=r"fusereg\.dropout: x is a DTensor with placement"):
        F.dropout(partial)
    images = distribute_tensor(torch.ones(4, 2, 5, 5), ranks.mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"fusereg\.drop_block2d: x is a DTensor"):
        F.drop_block2d(images)
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        F.dropout(held, seed=1, generator=torch.Generator())


@on(4)
def meshes_of_two_dimensions(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(ranks.rank)
    x = torch.ones(10, 6)
    for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        held = distribute_tensor(x, mesh, placements)
        assert torch.equal(whole(F.dropout(held, seed=SEED)), F.dropout(x, seed=SEED))
        local = F.dropout(held)
        parts: list[Any] = [None] * 4
        torch.distributed.all_gather_object(parts, whole(local))
        assert all(torch.equal(part, parts[0]) for part in parts)


test_ranks = collect(__name__)
