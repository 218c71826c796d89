"""TrainingRun on several ranks: each has its own place, and sharded models are written in parts.

Each check is a function of the ``Ranks`` that runs on several gloo processes; see ranks.py.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fusereg
from fusereg import EarlyStopping, TrainingRun
from fusereg.run import CheckpointError, training_run
from ranks import Ranks, collect, fully_shard, on

pytest.importorskip("safetensors")


class Crash(Exception):
    pass


def common_folder() -> Path:
    """Make a folder that all ranks use."""
    held = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held)
    assert held[0] is not None
    return Path(held[0])


def train(folder: Path, wrap: Any, crash_at: int | None = None, **options: Any) -> torch.Tensor:
    """Train a run, as a script that makes everything anew; return its weights and a draw."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    model = wrap(model)
    optimizer = fusereg.optim.AdamW(model.parameters(), lr=0.05, l1=1e-3)
    data = torch.linspace(-1, 1, 120).view(24, 5)
    sampler: Any = DistributedSampler(data, shuffle=True)  # type: ignore[arg-type]
    loader: Any = DataLoader(data, batch_size=3, sampler=sampler)  # type: ignore[arg-type]
    run = TrainingRun(folder, model=model, optimizer=optimizer, every_steps=1, **options)
    for epoch in run.epochs(2):
        sampler.set_epoch(epoch)
        for x in run.batches(loader):
            if run.step == crash_at:
                raise Crash
            optimizer.zero_grad()
            model(x + torch.rand(1)).square().mean().backward()
            optimizer.step()
    parts = [getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in model.parameters()]
    return torch.cat([*parts, torch.rand(2)]).detach()


def resumes_exactly(wrap: Any) -> Path:
    wanted = train(common_folder(), wrap)
    folder = common_folder()
    for crash_at in (1, 3, 6):
        with pytest.raises(Crash):
            train(folder, wrap, crash_at)
        dist.barrier()
    assert torch.equal(train(folder, wrap), wanted)
    dist.barrier()
    return folder


@on(2)
def ddp_goes_on_with_the_same_bits_on_each_rank(ranks: Ranks) -> None:
    folder = resumes_exactly(DistributedDataParallel)
    (place,) = folder.glob("step-*")
    assert sorted(p.name for p in place.iterdir()) == [
        *("rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"),
        *("shared.json", "shared.safetensors"),
    ]


@on(2)
def fsdp_goes_on_with_the_same_bits_and_damage_is_found(ranks: Ranks) -> None:
    assert fully_shard is not None

    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=ranks.mesh)  # type: ignore[misc]
        return model

    folder = resumes_exactly(wrap)
    (place,) = folder.glob("step-*")
    parts = sorted(p.name for p in (place / "sharded").iterdir())
    assert parts == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    for name in parts:
        path = place / "sharded" / name
        whole = path.read_bytes()
        dist.barrier()
        if ranks.rank == 0:
            path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        dist.barrier()
        with pytest.raises(CheckpointError, match="is damaged"):
            train(folder, wrap)
        dist.barrier()
        if ranks.rank == 0:
            path.write_bytes(whole)
        dist.barrier()
    train(folder, wrap)


@on(2)
def fsdp_early_stopping_keeps_its_best_in_its_own_folder(ranks: Ranks) -> None:
    assert fully_shard is not None
    folder = common_folder()
    for start in range(2):
        model = nn.Linear(4, 3)
        fully_shard(model, mesh=ranks.mesh)
        with torch.no_grad():
            model.weight.fill_(-1.0)
        options: dict[str, Any] = {"folder": folder / "best", "resume": True}
        stopper = EarlyStopping(model, patience=9, **options)
        run = TrainingRun(folder / "run", model=model, stopper=stopper)
        try:
            for epoch in run.epochs(4):
                with torch.no_grad():
                    model.weight.fill_(float(epoch))
                if start == 0 and epoch == 3:
                    raise Crash
                stopper.step([3.0, 1.0, 2.0, 2.0][epoch], epoch=epoch)
        except Crash:
            dist.barrier()
            continue
        assert bool((model.weight.full_tensor() == 1).all())  # type: ignore[operator]


@on(2)
def fsdp_early_stopping_without_a_folder_says_that_its_best_is_lost(ranks: Ranks) -> None:
    assert fully_shard is not None
    folder = common_folder()
    for start in range(2):
        model = nn.Linear(4, 3)
        fully_shard(model, mesh=ranks.mesh)
        stopper = EarlyStopping(model, patience=9)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run = TrainingRun(folder, model=model, stopper=stopper)
        texts = [str(w.message) for w in heard]
        assert len(texts) == start, texts
        if start:
            assert "best weights so far, of epoch 0, are not in the run's checkpoint" in texts[0]
        stopper.step(1.0, epoch=start)
        run.save()


@on(3)
def shards_load_on_another_number_of_ranks(ranks: Ranks) -> None:
    """Weights and the optimizer's states, by any reader of torch.distributed.checkpoint."""
    assert fully_shard is not None
    folder, found = common_folder(), []
    # Whoever is in no group must make the groups, too, and not what is in them.
    for world in (2, 3):
        group = dist.new_group(list(range(world)))
        dist.barrier()
        if ranks.rank >= world:
            continue
        mesh = DeviceMesh.from_group(group, "cpu")
        model = nn.Linear(5, 7)
        fully_shard(model, mesh=mesh)
        optimizer = fusereg.optim.AdamW(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"model": model, "optimizer": optimizer, "process_group": group}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run = TrainingRun(folder, **options)
        if world == 2:
            model(torch.ones(2, 5)).sum().backward()
            optimizer.step()
            run.save()
        else:
            assert "is of 2 ranks, and there are 3 now" in str(heard[-1].message)
        tensors = [model.weight, optimizer.state[model.weight]["exp_avg"]]
        found.append([t.full_tensor().detach() for t in tensors])  # type: ignore[operator]
    dist.barrier()
    for a, b in zip(found[0], found[-1], strict=True):
        assert torch.equal(a, b)
        assert bool(b.any())


@on(2)
def what_fails_on_one_rank_is_told_to_all(ranks: Ranks) -> None:
    folder = common_folder()
    last = ranks.rank == 1

    class Thing:
        fails = False

        def state_dict(self) -> Any:
            return {"f": print} if self.fails else {}

        def load_state_dict(self, state: Any) -> None:
            if self.fails:
                raise LookupError("not today")

    thing = Thing()
    run = TrainingRun(folder, model=nn.Linear(2, 2), thing=thing)
    run.save()
    thing.fails = last
    with pytest.raises(TypeError, match=r"cannot write rank-1\.states\.thing\.f"):
        run.save()
    with pytest.raises(TypeError, match=r"cannot write thing\.f"):
        TrainingRun(folder, model=nn.Linear(2, 2), thing=thing)
    thing.state_dict = dict  # type: ignore[method-assign]
    with pytest.raises((LookupError, RuntimeError), match="not today"):
        TrainingRun(folder, model=nn.Linear(2, 2), thing=thing)
    dist.barrier()
    if ranks.rank == 0:
        (folder / "run.json").write_text("[]")
    dist.barrier()
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        TrainingRun(folder, model=nn.Linear(2, 2))


@on(2)
def saving_by_the_clock_follows_the_first_ranks(ranks: Ranks) -> None:
    """Clocks differ; the others are asked every so many steps only, and all save together."""
    every = training_run._CLOCK_EVERY
    now = [0.0]
    with patch.object(training_run, "time", SimpleNamespace(monotonic=lambda: now[0])):
        run = TrainingRun(common_folder(), model=nn.Linear(2, 2), every_minutes=1)
        saved = []
        for _ in run.epochs(1):
            for step in run.batches(range(4 * every)):
                saved.append(run.last.step if run.last else None)
                # The second rank's own clock would have it save each time.
                now[0] += 1000.0 if ranks.rank == 1 else 60.0 * (step == every + 2)
    assert saved == [None] * 2 * every + [2 * every] * 2 * every
    assert run.last is not None
    assert run.last.step == 4 * every


@on(3)
def another_number_of_ranks_warns(ranks: Ranks) -> None:
    folder = common_folder()
    two, three = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
    if ranks.rank < 2:
        TrainingRun(folder, model=nn.Linear(2, 2), process_group=two).save()
    dist.barrier()
    with pytest.warns(RuntimeWarning, match="is of 2 ranks, and there are 3 now"):
        run = TrainingRun(folder, model=nn.Linear(2, 2), process_group=three)
    assert run.resumed


test_ranks = collect(__name__)
