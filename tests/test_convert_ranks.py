"""Converted models in DDP and FSDP2, on two gloo processes, against unconverted ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusereg
from fusereg.convert.layers import Planned
from plain_models import BasicBlock, basic, bottleneck, stir, without_dropout
from ranks import Ranks, collect, fully_shard, on
from sharded import whole


def train(models: list[nn.Module], rank: int) -> None:
    """Train the models, each rank on its own images; outputs and parameters must stay equal."""
    images = torch.Generator().manual_seed(rank)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=images)
        outputs: list[Tensor] = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-10, atol=1e-10)
    first, *others = [m.state_dict() for m in models]
    for state in others:
        for value, wanted in zip(state.values(), first.values(), strict=True):
            torch.testing.assert_close(whole(value), whole(wanted), rtol=1e-10, atol=1e-10)


def models_of(make: Callable[[], nn.Module]) -> list[nn.Module]:
    model = stir(without_dropout(make())).double()
    return [copy.deepcopy(model) for _ in range(3)]


@on(2)
def synchronized_layers(ranks: Ranks) -> None:
    """Torch's SyncBatchNorm does not run on the CPU: the reference has the whole batch."""
    plain, converted, _ = models_of(basic)
    nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    fusereg.convert(converted)
    kinds = {type(m) for m in converted.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {fusereg.nn.SyncBatchNorm}
    assert any(isinstance(m, Planned) for m in converted.modules())
    x = torch.randn(6, 3, 12, 12, dtype=torch.float64)
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    torch.testing.assert_close(converted(x[mine]), plain(x)[mine], rtol=1e-9, atol=1e-9)
    fusereg.revert(converted)
    assert {type(m) for m in converted.modules() if "BatchNorm" in type(m).__name__} == {
        nn.SyncBatchNorm
    }


@on(2)
def ddp(ranks: Ranks) -> None:
    for make in (basic, bottleneck):
        plain, before, after = models_of(make)
        models = [
            DistributedDataParallel(plain),
            DistributedDataParallel(fusereg.convert(before)),
            fusereg.convert(DistributedDataParallel(after)),
        ]
        assert isinstance(before.layers[0], Planned)
        assert isinstance(after.layers[0], Planned)
        train(models, ranks.rank)
        fusereg.revert(models[1])
        assert type(before.layers[0]) is type(plain.layers[0])
        train([*models[:2]], ranks.rank)


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=ranks.mesh)
    return fully_shard(model, mesh=ranks.mesh)


@on(2)
def fsdp_blocks(ranks: Ranks) -> None:
    for make in (basic, bottleneck):
        plain, before, after = models_of(make)
        models = [
            shard(plain, ranks),
            shard(fusereg.convert(before), ranks),
            fusereg.convert(shard(after, ranks)),
        ]
        assert isinstance(before.layers[0], Planned)
        assert isinstance(after.layers[0], Planned)
        train(models, ranks.rank)
        for model in models[1:]:
            fusereg.revert(model)
            assert type(model.bn1) is nn.BatchNorm2d
            assert all("fusereg_plans" not in vars(m) for m in model.modules())
        assert type(after.layers[0]) is type(plain.layers[0])
        train(models, ranks.rank)


@on(2)
def fsdp_layers(ranks: Ranks) -> None:
    """Layers that are wrapped themselves: convert first; later they are left alone."""
    plain, before, after = (BasicBlock(3, 3).double() for _ in range(3))
    for model in (before, after):
        model.load_state_dict(plain.state_dict())
    fusereg.convert(before)
    for model in (plain, before, after):
        fully_shard(model.bn1, mesh=ranks.mesh)
        fully_shard(model, mesh=ranks.mesh)
    kind = type(after.bn1)
    fusereg.convert(after)
    assert type(after.bn1) is kind
    assert isinstance(before.bn1, fusereg.nn.BatchNorm2d)
    train([plain, before, after], ranks.rank)
    fusereg.revert(before)
    assert isinstance(before.bn1, fusereg.nn.BatchNorm2d)
    assert type(before.bn2) is nn.BatchNorm2d
    train([plain, before, after], ranks.rank)


test_ranks = collect(__name__)
