"""Channels that span tensors in sharded and replicated models: as those of one process.

One program for each number of gloo processes runs all checks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusereg
from fusereg.core.groups import CoupledChannels, Groups, Member
from ranks import Ranks, collect, fully_shard, on
from sharded import counted_reductions


def make_model() -> nn.Module:
    """A convolution and its batch norm, of 6 channels, that two more layers read or write."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    ).double()


def make_groups(model: nn.Module, readers: bool = False) -> Groups:
    named = dict(model.named_parameters())
    writers = tuple(
        Member(name, named[name], 0, torch.arange(6))
        for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    )
    columns = Member("4.weight", named["4.weight"], 1, torch.arange(96) // 16)
    rows = (Member("4.weight", named["4.weight"], 0, torch.tensor([-1, 0, 1, -1, 2])),)
    sets = [CoupledChannels("0", 6, writers, (columns,) if readers else (), None)]
    if not readers:
        sets.append(CoupledChannels("4", 3, rows, (), None))
    return Groups(sets)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_equal_models(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        full = whole(p.detach())
        torch.testing.assert_close(full, q.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(full == 0, q.detach() == 0)


def train(model: nn.Module, groups: Groups, x: Tensor, y: Tensor) -> fusereg.optim.SGD:
    optimizer = fusereg.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, l1=0.001, groups=groups, group=0.05
    )
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 4, 4).double(), torch.randn(8, 5).double()


@on(2, 3)
def a_model_with_fsdp2_trains_as_a_whole_one(ranks: Ranks) -> None:
    for readers in (False, True):
        plain = make_model().eval()
        sharded = copy.deepcopy(plain)
        x, y = data()
        traced = make_groups(sharded, readers)
        fully_shard(sharded, mesh=ranks.mesh)
        ours = train(sharded, traced.of(sharded), x, y)
        theirs = train(plain, make_groups(plain, readers), x, y)
        with counted_reductions() as sizes:
            ours.step()
        theirs.step()
        assert len([n for n in sizes if n > 1]) == 1 + readers, sizes  # and the value of l1
        assert_equal_models(sharded, plain, 1e-12)
        assert any((whole(p.detach()) == 0).any() for p in sharded.parameters())
        torch.testing.assert_close(ours.penalty_value, theirs.penalty_value)


@on(2, 4)
def a_model_with_fsdp2_in_two_dimensions_trains_as_a_whole_one(ranks: Ranks) -> None:
    """Replicas of shards: fully_shard over a mesh of two dimensions, each rank with its data."""
    for shape in ((2, 1), (1, 2)) if ranks.world == 2 else ((2, 2), (4, 1), (1, 4)):
        for readers in (False, True):
            plain = make_model().eval()
            sharded = copy.deepcopy(plain)
            x, y = data()
            traced = make_groups(sharded, readers)
            names = ("replicate", "shard")
            fully_shard(sharded, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
            own = slice(ranks.rank, None, ranks.world)
            train(sharded, traced.of(sharded), x[own], y[own])
            train(plain, make_groups(plain, readers), x, y)
            assert_equal_models(sharded, plain, 1e-12)
            assert any((whole(p.detach()) == 0).any() for p in sharded.parameters())


@on(4)
def a_model_trained_with_fsdp2_is_compacted_and_sharded_again(ranks: Ranks) -> None:
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    plain = make_model()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        plain.get_parameter(name).data[1::2] = 0.0
    example = torch.zeros(1, 3, 4, 4).double()
    small = fusereg.compact(plain, example)
    assert isinstance(small, nn.Module)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises((TypeError, ValueError), match="DTensor"):
        fusereg.compact(sharded, example)
    gathered = make_model()
    gathered.load_state_dict({n: whole(t) for n, t in sharded.state_dict().items()})
    again = fusereg.compact(gathered, example)
    assert isinstance(again, nn.Module)
    for p, q in zip(again.parameters(), small.parameters(), strict=True):
        assert p.shape == q.shape
        assert torch.equal(p, q)
    assert again[0].weight.shape[0] == 3
    x, y = data()
    groups = fusereg.groups_of(again, example)
    fully_shard(again, mesh=mesh)
    own = slice(ranks.rank, None, ranks.world)
    train(again.eval(), groups.of(again), x[own], y[own])
    train(small.eval(), fusereg.groups_of(small, example), x, y)
    assert_equal_models(again, small, 1e-12)


@on(2)
def what_no_replica_of_ddp_uses_stays(ranks: Ranks) -> None:
    model = make_model().eval()
    model.register_module("unused", nn.Linear(3, 6).double())
    groups = make_groups(model)
    unused = Member("unused.weight", model.unused.weight, 0, torch.arange(6))
    own = groups[0]._replace(members=(*groups[0].members, unused))
    before = copy.deepcopy(model.state_dict())
    x, y = data()
    model.forward = lambda z: nn.Sequential.forward(model[:5], z)  # type: ignore[method-assign]
    replica = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    train(replica, Groups([own, groups[1]]), x[ranks.rank :: 2], y[ranks.rank :: 2])
    assert torch.equal(model.unused.weight, before["unused.weight"])
    assert not (model[0].weight == 0).flatten(1).all(1).any()  # as a member has no gradient
    for p in model.parameters():
        others = [torch.empty_like(p) for _ in range(2)]
        torch.distributed.all_gather(others, p.detach())
        assert torch.equal(others[0], others[1])


@on(2, 3, 4)
def any_placement_gives_the_value_gradient_and_step_of_the_whole(ranks: Ranks) -> None:
    mesh, every = ranks.mesh, [[Shard(0)], [Shard(1)], [Replicate()]]
    if ranks.world == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        every = [[*a, *b] for a in every for b in every]
    for placements in every:
        plain = make_model()
        held = copy.deepcopy(plain)
        for module in (held[0], held[4]):
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            module.weight = nn.Parameter(
                distribute_tensor(module.weight.detach(), mesh, placements)
            )
        ours, theirs = make_groups(held), make_groups(plain)
        values = [fusereg.functional.group_lasso_penalty(g, 0.3, l1=0.1) for g in (ours, theirs)]
        torch.testing.assert_close(values[0], values[1])
        for v in values:
            v.backward()
        for p, q in zip(held.parameters(), plain.parameters(), strict=True):
            assert (q.grad is None) == (p.grad is None)
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(whole(p.grad), q.grad)
        for g in (ours, theirs):
            fusereg.prox.group_lasso_(g, 0.1, l1=0.01)
        assert_equal_models(held, plain, 1e-12)


@on(2)
def replicas_of_ddp_stay_the_same(ranks: Ranks) -> None:
    model = make_model().eval()
    plain = copy.deepcopy(model)
    groups = make_groups(model)
    x, y = data()
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = train(replica, groups, x[ranks.rank :: 2], y[ranks.rank :: 2])
    with counted_reductions() as sizes:
        optimizer.step()
    assert sizes == []
    train(plain, make_groups(plain), x, y).step()
    assert_equal_models(model, plain, 1e-12)
    for p in model.parameters():
        others = [torch.empty_like(p) for _ in range(2)]
        torch.distributed.all_gather(others, p.detach())
        assert torch.equal(others[0], others[1])


test_ranks = collect(__name__)
