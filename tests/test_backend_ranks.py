"""Compiled models in DDP and FSDP2, on two gloo processes, against models that are not compiled."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fusereg
from fusereg.backend import fusereg_backend
from plain_models import basic, stir, without_dropout
from ranks import Ranks, collect, fully_shard, on
from test_convert_ranks import train


def fresh() -> nn.Module:
    torch._dynamo.reset()
    counters.clear()
    return stir(without_dropout(basic())).double()


@on(2)
def ddp(ranks: Ranks) -> None:
    """DDP's optimizer hands over the graph in pieces: with small buckets a sum may be cut off."""
    for megabytes in (25, 0.002):
        plain = fresh()
        other = DistributedDataParallel(copy.deepcopy(plain), bucket_cap_mb=megabytes)
        first = torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
        other.bucket_bytes_cap = max(other.bucket_bytes_cap, 1)
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = min(first, other.bucket_bytes_cap)
        try:
            compiled = torch.compile(other, backend=fusereg_backend)
            train([DistributedDataParallel(plain), compiled], ranks.rank)
        finally:
            torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = first
        found = counters["fusereg"]
        assert found["graphs"] == (1 if megabytes == 25 else found["graphs"])
        assert megabytes == 25 or found["graphs"] > 1
        assert found["batch_norm + relu"] >= 5
        assert found["batch_norm + add + relu"] >= 2


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, self.first(x), use_reentrant=False)
        return y


@on(2)
def ddp_of_a_checkpoint(ranks: Ranks) -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = Recomputed().double()
    twin = copy.deepcopy(plain)
    models = [
        DistributedDataParallel(fusereg.convert(plain)),
        torch.compile(DistributedDataParallel(twin), backend=fusereg_backend),
    ]
    x = torch.randn(8, 6, dtype=torch.float64)
    for model in models:
        torch.manual_seed(5)
        model(x).square().mean().backward()
    for p, q in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert counters["fusereg"]["batch_norm + relu + dropout"] == 1


@on(2)
def fsdp_blocks(ranks: Ranks) -> None:
    """Blocks of a user's class are captured one graph a block."""
    plain = fresh()
    sharded = []
    for model, compile_it in ((plain, False), (copy.deepcopy(plain), True)):
        for layer in model.layers:
            if compile_it:
                layer.compile(backend=fusereg_backend)
            fully_shard(layer, mesh=ranks.mesh)
        sharded.append(fully_shard(model, mesh=ranks.mesh))
    train(sharded, ranks.rank)
    assert counters["fusereg"]["batch_norm + add + relu"] >= 3
    assert counters["fusereg"]["batch_norm + relu"] >= 3


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.norm(self.first(x) * 2.0))
        return y


@on(2)
def sequential_blocks_that_are_skipped_are_noticed(ranks: Ranks) -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = Rooted().double()
    twin = copy.deepcopy(plain)
    for model in (plain, twin):
        fully_shard(model.first, mesh=ranks.mesh)
        fully_shard(model, mesh=ranks.mesh)
    heard = Heard()
    logging.getLogger("fusereg").addHandler(heard)
    try:
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(torch.compile(twin, backend=fusereg_backend)(x), plain(x))
    finally:
        logging.getLogger("fusereg").removeHandler(heard)
    assert counters["fusereg"]["batch_norm + relu"] == 1  # not that of the block
    (line,) = heard.lines
    assert "first, a Sequential under fully_shard, is not compiled" in line


test_ranks = collect(__name__)
