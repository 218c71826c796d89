"""What each technique sends between processes: the table of docs/scaling-out.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fusereg
from fusereg import functional as F
from ranks import Ranks, collect, on

#: The functions that send, and which of their arguments is what a process gives.
_SENDS = {"all_reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1, "all_gather_single": 1}


@contextmanager
def sent() -> Iterator[list[tuple[str, int]]]:
    """Record the name of each collective, and its bytes."""
    found: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in _SENDS if hasattr(dist, name)}

    def recorded(name: str) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given: Tensor = args[_SENDS[name]]
            found.append((name.removesuffix("_single"), given.numel() * given.element_size()))
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, recorded(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def sharded(ranks: Ranks) -> nn.Linear:
    """A layer whose parameters are sharded by rows."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    for name, p in list(layer.named_parameters()):
        shard = distribute_tensor(p.detach(), ranks.mesh, [Shard(0)])
        setattr(layer, name, nn.Parameter(shard))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    return layer


@on(2)
def plain_tensors_send_nothing(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    fusereg.convert(model)
    penalty = fusereg.WeightPenalty(model, l1=1e-3, group=1e-3)
    optimizer = fusereg.optim.AdamW(model.parameters(), lr=0.1, l1=1e-3, max_grad_norm=1.0)
    augment = fusereg.augment.Augment(8, degrees=10, hflip=0.5)
    with sent() as found:
        (model(torch.randn(4, 6)).sum() + penalty.penalty()).backward()
        penalty.add_grad_()
        optimizer.step()
        augment(torch.rand(4, 3, 9, 9))
        fusereg.fold_into_conv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert found == []


@on(2)
def sharded_parameters_send_a_number_for_a_value(ranks: Ranks) -> None:
    layer = sharded(ranks)
    for value in (F.l1_penalty, F.l2_penalty, F.group_lasso_penalty):
        with sent() as found:
            value(layer.weight, 0.1)
        assert [name for name, _ in found] == ["all_reduce"], value
        assert found[0][1] <= 8, value
    with sent() as found:
        fusereg.prox.l1_(layer.weight, 0.01)
    assert found == []
    for options, reductions in (
        ({}, 0),
        ({"l1": 1e-3}, 1),
        ({"max_grad_norm": 1.0}, 1),
    ):
        optimizer = fusereg.optim.SGD(layer.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
        with sent() as found:
            optimizer.step()
        assert [name for name, _ in found] == ["all_reduce"] * reductions, options
        assert all(size <= 8 for _, size in found), options


@on(2)
def dropout_sends_the_seed_of_dtensors_alone(ranks: Ranks) -> None:
    x = distribute_tensor(torch.ones(8, 6), ranks.mesh, [Shard(0)])
    with sent() as found:
        y = F.dropout(x, 0.5)
    assert isinstance(y, DTensor)
    assert found == [("broadcast", 16)]
    with sent() as found:
        F.dropout(x, 0.5, seed=3)
        F.dropout(x.to_local(), 0.5)
    assert found == []


@on(2)
def synchronized_statistics_send_moments_and_sums(ranks: Ranks) -> None:
    channels = 5
    layer = fusereg.nn.SyncBatchNorm(channels)
    x = torch.randn(4, channels, 3, 3, requires_grad=True)
    with sent() as found:
        y = layer(x)
    gathers = [size for name, size in found if name.startswith("all_gather")]
    assert gathers == [24 * channels]
    assert len(found) == 1
    with sent() as found:
        y.square().sum().backward()
    assert found == [("all_reduce", 16 * channels)]
    with sent() as found:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert found[1:] == [("all_reduce", 16 * channels)] * 2
    with sent() as found:
        gradient.square().sum().backward()
    assert found == [("all_reduce", 16 * channels)] * 3


test_ranks = collect(__name__)
