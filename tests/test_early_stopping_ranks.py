"""Early stopping on several ranks: one decision, one best state, and no rank hangs on an error.

Each check is a function of the ``Ranks`` that runs on two and three gloo processes; see ranks.py.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from early_stopping_runs import fill
from fusereg import EarlyStopping
from fusereg.early_stopping import CheckpointError, Decision, Rolling, load_best
from fusereg.early_stopping.checkpoint import CheckpointFolder
from ranks import Ranks, collect, fully_shard, on


def everywhere(mine: Any) -> list[Any]:
    """Gather each rank's object on all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def assert_agreed(mine: Any) -> None:
    of_all = everywhere(mine)
    assert all(other == mine for other in of_all), of_all


def common_folder() -> Path:
    """Make a folder that all ranks use."""
    held = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held)
    assert held[0] is not None
    return Path(held[0])


def raised(kind: type[BaseException], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# --- the decision ---------------------------------------------------------------------------------


@on(2, 3)
def diverging_metrics_give_one_decision(ranks: Ranks) -> None:
    """Each rank alone would stop at another epoch: rank r's metric rises after epoch 2 + r."""
    alone = EarlyStopping(patience=2, agreement="none")
    together = EarlyStopping(patience=2)
    own = [abs(epoch - 2.0 - ranks.rank) for epoch in range(20)]
    mean = [
        sum(abs(epoch - 2.0 - rank) for rank in range(ranks.world)) / ranks.world
        for epoch in range(20)
    ]
    reference = EarlyStopping(patience=2, agreement="none")
    made = []
    for epoch in together.epochs(20):
        made.append(together.step(own[epoch], epoch=epoch))
        assert made[-1] == reference.step(mean[epoch], epoch=epoch)
    for epoch in alone.epochs(20):
        alone.step(own[epoch], epoch=epoch)
    assert_agreed((made, together.state_dict()))
    assert together.stopped
    assert len(set(everywhere(alone.epoch))) == ranks.world
    assert together.state_dict() == reference.state_dict()


@on(2, 3)
def each_way_to_agree(ranks: Ranks) -> None:
    last = ranks.world - 1
    for agreement, wanted in (("min", 0.0), ("max", last), ("mean", last / 2), ("rank0", 0.0)):
        stopper = EarlyStopping(patience=2, agreement=agreement)  # type: ignore[arg-type]
        stopper.step(torch.tensor(float(ranks.rank)), epoch=0)
        assert_agreed(stopper.best)
        assert stopper.best == wanted
    stopper = EarlyStopping(patience=2, agreement="rank0")
    assert stopper.step(0.25 if ranks.rank == 0 else None, epoch=0).new_best
    assert stopper.best == 0.25


@on(2, 3)
def equal_metrics_stay_exactly_so(ranks: Ranks) -> None:
    """Rounding the mean must not turn equal metrics into new bests."""
    stopper = EarlyStopping(patience=9)
    made = [stopper.step(0.1, epoch=e).new_best for e in range(3)]
    assert made == [True, False, False]
    assert stopper.best == 0.1


@on(2, 3)
def one_rank_s_nan_is_everybodys(ranks: Ranks) -> None:
    bad = math.nan if ranks.rank == ranks.world - 1 else 0.5
    stopper = EarlyStopping(patience=2)
    decision = stopper.step(bad, epoch=0)
    assert decision == Decision(False, False, True, "non_finite")
    stopper = EarlyStopping(patience=2, nan="count")
    assert [stopper.step(bad, epoch=e).stop for e in range(2)] == [False, True]
    assert stopper.best is None
    # Only rank 0's counts where only rank 0 is asked.
    assert EarlyStopping(patience=2, agreement="rank0").step(bad, epoch=0).new_best


@on(2, 3)
def several_metrics_and_smoothing(ranks: Ranks) -> None:
    from fusereg.early_stopping import Metric

    metrics = {"loss": Metric(smoothing=Rolling(2)), "f1": Metric("max")}
    stopper = EarlyStopping(patience=2, metrics=metrics)
    made = []
    for epoch in stopper.epochs(20):
        both = {"f1": 0.1 * min(epoch, 3 + ranks.rank), "loss": 1.0 + ranks.rank}
        made.append(stopper.step(both, epoch=epoch))
    assert_agreed((made, stopper.state_dict()))
    assert len(made) == 3 + ranks.world + 2  # the mean f1 rises as long as that of the last rank


@on(2, 3)
def ranks_that_came_from_different_states_follow_rank_0(ranks: Ranks) -> None:
    stopper = EarlyStopping(patience=3)
    before = EarlyStopping(patience=3, agreement="none")
    for epoch in range(ranks.rank + 1):
        before.step(1.0 - 0.1 * ranks.rank, epoch=epoch)
    stopper.load_state_dict(before.state_dict())
    stopper.step(2.0, epoch=9)
    assert_agreed(stopper.state_dict())
    assert stopper.best == 1.0


@on(2, 3)
def one_rank_may_restore_alone(ranks: Ranks) -> None:
    """It does not communicate: nobody waits for the others."""
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=2)
    fill(model, 1)
    stopper.step(1.0, epoch=0)
    fill(model, 2)
    if ranks.rank == 1:
        assert stopper.restore() == 0
    assert bool((model.weight == (1 if ranks.rank == 1 else 2)).all())
    stopper.step(2.0, epoch=1)


# --- what goes wrong on one rank ------------------------------------------------------------------


@on(2, 3)
def a_wrong_argument_on_one_rank_raises_on_all(ranks: Ranks) -> None:
    stopper = EarlyStopping(patience=2)
    last = ranks.world - 1
    said = raised(
        TypeError,
        lambda: stopper.step("x" if ranks.rank == last else 1.0, epoch=0),  # type: ignore[arg-type]
    )
    assert "metric must be a number or a tensor of one element, got str" in said
    assert ranks.rank == last or said.endswith(f"(on rank {last} of {ranks.world})")
    assert "got NoneType" in raised(
        TypeError, lambda: stopper.step(1.0 if ranks.rank else None, epoch=0)
    )
    said = raised(ValueError, lambda: stopper.step(1.0, epoch=5 + ranks.rank))
    assert f"the ranks are at different epochs: {[5 + r for r in range(ranks.world)]}" in said
    assert stopper.epoch is None
    assert stopper.step(1.0, epoch=0).new_best


@on(2, 3)
def arguments_that_differ_raise_and_nobody_waits(ranks: Ranks) -> None:
    """The folder or the model is given to one rank alone, which is a likely mistake."""
    shared = common_folder()
    folder = shared if ranks.rank == 0 else None
    for options in ({"folder": folder}, {"model": nn.Linear(2, 2) if ranks.rank == 0 else None}):

        def check(options: Any = options) -> None:
            EarlyStopping(patience=2, **options).step(1.0, epoch=0)

        said = raised(ValueError, check)  # rank 0 is told when it makes the stopper with a folder
        assert "the ranks must have the same arguments (rank 0 alone writes to folder" in said


@on(2, 3)
def a_folder_that_fails_on_rank_0_is_told_to_all(ranks: Ranks) -> None:
    """Damage, a checkpoint without resume=, and a folder that cannot be: none waits for rank 0."""
    shared = common_folder()
    (shared / "file").write_text("mine")
    dist.barrier()
    said = raised(
        CheckpointError, lambda: EarlyStopping(nn.Linear(2, 2), patience=2, folder=shared / "file")
    )
    assert "cannot write to folder" in said
    assert (ranks.rank > 0) == said.endswith(f"(on rank 0 of {ranks.world})")
    folder = shared / "run"
    model = nn.Linear(2, 2)
    EarlyStopping(model, patience=2, folder=folder).step(1.0, epoch=0)
    assert "holds a checkpoint" in raised(
        ValueError, lambda: EarlyStopping(model, patience=2, folder=folder)
    )
    resumed = EarlyStopping(model, patience=2, folder=folder, resume=True)
    assert_agreed((resumed.epoch, resumed.best, resumed.best_epoch, resumed.restore()))
    dist.barrier()
    if ranks.rank == 0:
        (folder / "early_stopping.json").write_bytes(b"\xff")
    dist.barrier()
    for resume in (True, None):
        said = raised(
            CheckpointError,
            lambda resume=resume: EarlyStopping(  # type: ignore[misc]
                model, patience=2, folder=folder, resume=resume
            ),
        )
        assert "is not a complete checkpoint" in said
    EarlyStopping(model, patience=2, folder=folder, resume=False).step(1.0, epoch=0)


@on(2)
def a_best_state_that_one_rank_cannot_read_is_told_to_all(ranks: Ranks) -> None:
    folder, model = common_folder(), nn.Linear(2, 2)
    EarlyStopping(model, patience=2, folder=folder).step(1.0, epoch=0)
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(CheckpointFolder, "read_tensors", full)
        said = raised(
            RuntimeError,
            lambda: EarlyStopping(model, patience=2, folder=folder, resume=True),
        )
    assert "No space left on device" in said


@on(2)
def an_extra_state_that_cannot_be_saved_on_one_rank_is_told_to_all(ranks: Ranks) -> None:
    also = {"thing": Holder(object() if ranks.rank == 1 else 1)}
    said = raised(
        TypeError,
        lambda: EarlyStopping(patience=2, also=also, folder=common_folder()),
    )
    assert "cannot write thing.value to a checkpoint: object is neither" in said


@on(2, 3)
def a_snapshot_that_fails_on_one_rank_counts_on_none(ranks: Ranks) -> None:
    class Thing:
        fails = False

        def state_dict(self) -> Any:
            if self.fails:
                raise LookupError("no state today")
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    thing = Thing()
    stopper = EarlyStopping(patience=2, also={"thing": thing})
    stopper.step(2.0, epoch=0)
    thing.fails = ranks.rank == 1
    if ranks.rank == 1:
        assert "no state today" in raised(LookupError, lambda: stopper.step(1.0, epoch=1))
    else:
        said = raised(RuntimeError, lambda: stopper.step(1.0, epoch=1))
        assert said == f"LookupError: no state today (on rank 1 of {ranks.world})"
    assert_agreed((stopper.best, stopper.epoch))
    assert stopper.best == 2.0


# --- models and files -----------------------------------------------------------------------------


@on(2, 3)
def ddp_goes_back_to_the_same_best_and_the_file_loads_without_it(ranks: Ranks) -> None:
    folder = common_folder()
    model = DistributedDataParallel(nn.Linear(3, 2))
    with EarlyStopping(model, patience=2, folder=folder) as stopper:
        for epoch in stopper.epochs(9):
            fill(model, epoch)
            stopper.step([3.0, 1.0, 2.0, 2.0][epoch] + ranks.rank, epoch=epoch)
    assert_agreed((stopper.epoch, stopper.best_epoch))
    assert (stopper.epoch, stopper.best_epoch) == (3, 1)
    assert all(bool((p == 1).all()) for p in model.parameters())
    best = load_best(folder)
    assert best.epoch == 1
    plain = nn.Linear(3, 2)
    plain.load_state_dict(best.states["model"])
    assert bool((plain.weight == 1).all())
    dist.barrier()
    resumed = EarlyStopping(plain, patience=2, folder=folder, resume=True)
    assert resumed.stopped
    fill(plain, 7)
    assert resumed.restore() == 1
    assert bool((plain.weight == 1).all())


@on(2, 3)
def on_disk_only_all_ranks_go_back_to_what_rank_0_wrote(ranks: Ranks) -> None:
    folder = common_folder()
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=5, folder=folder, snapshot="disk", on_save_error="warn")
    assert stopper.restore() is None
    fill(model, 1)
    stopper.step(2.0, epoch=0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        patch.setattr("safetensors.torch.save_file", full)
        fill(model, 2)
        assert stopper.step(1.0, epoch=1).new_best
    assert len(heard) == (1 if ranks.rank == 0 else 0)
    fill(model, 3)
    assert stopper.restore() == 0
    assert bool((model.weight == 1).all())


def full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@on(2, 3)
def a_full_disk_on_rank_0_stops_all_or_none(ranks: Ranks) -> None:
    folder = common_folder()
    model = nn.Linear(3, 2)
    stopper = EarlyStopping(model, patience=5, folder=folder)
    fill(model, 1)
    stopper.step(2.0, epoch=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        fill(model, 2)
        said = raised(CheckpointError, lambda: stopper.step(1.0, epoch=1))
    assert "No space left on device; the checkpoint of epoch 0 is intact; training stops" in said
    assert_agreed((stopper.epoch, stopper.best))
    assert load_best(folder).epoch == 0
    dist.barrier()
    stopper.step(3.0, epoch=2)  # writes what could not be written then
    assert load_best(folder).epoch == 1


@on(2, 3)
def fsdp_shards_are_kept_and_come_back(ranks: Ranks) -> None:
    assert fully_shard is not None
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    fully_shard(model, mesh=ranks.mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train() -> torch.Tensor:
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
        return torch.cat([p.full_tensor().flatten() for p in model.parameters()])  # type: ignore[attr-defined]

    train()
    stopper = EarlyStopping(model, patience=2, also={"optimizer": optimizer})
    stopper.step(1.0, epoch=0)
    wanted = train()
    for _ in range(2):
        assert stopper.restore() == 0
        assert torch.equal(train(), wanted)
    other = EarlyStopping(model, patience=2, also={"optimizer": optimizer})
    other.load_state_dict(stopper.state_dict())
    assert other.restore() == 0
    assert torch.equal(train(), wanted)


def sharded_model(ranks: Ranks) -> nn.Sequential:
    assert fully_shard is not None
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))  # 7 and 1 rows: uneven
    fully_shard(model, mesh=ranks.mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=draw)).square().sum().backward()
        optimizer.step()


def whole(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in model.parameters()]
    ).detach()


@on(2, 3)
def fsdp_shards_are_written_whole_and_resumed(ranks: Ranks) -> None:
    """From memory and from the disk alone; on the ranks again, and in one process without any."""
    for where in ("cpu", "disk"):
        folder = common_folder()
        model = sharded_model(ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"patience": 5, "folder": folder, "snapshot": where}
        stopper = EarlyStopping(model, also={"optimizer": optimizer}, **options)
        train(model, optimizer, 1)
        stopper.step(2.0, epoch=0)
        train(model, optimizer, 2)
        with torch.no_grad():
            model(torch.ones(1, 5))  # leaves whole parameters in the root module
        stopper.step(1.0, epoch=1)
        wanted = whole(model)
        train(model, optimizer, 3)
        further = whole(model)
        stopper.step(3.0, epoch=2)
        assert stopper.restore() == 1
        assert torch.equal(whole(model), wanted)
        dist.barrier()

        other = sharded_model(ranks)
        theirs = torch.optim.AdamW(other.parameters(), lr=0.1)
        resumed = EarlyStopping(other, also={"optimizer": theirs}, resume=True, **options)
        assert (resumed.best, resumed.best_epoch, resumed.epoch) == (1.0, 1, 2)
        assert resumed.restore() == 1
        assert torch.equal(whole(other), wanted)
        train(other, theirs, 3)  # the optimizer's state is back too: the same bits
        assert torch.equal(whole(other), further)
        dist.barrier()

        plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
        plain.load_state_dict(load_best(folder).states["model"])
        assert torch.equal(whole(plain), wanted)
        dist.barrier()


@on(2, 3)
def fsdp_shards_and_a_full_disk(ranks: Ranks) -> None:
    """The next check writes what this one could not, without the other ranks' parts."""
    folder = common_folder()
    model = sharded_model(ranks)
    stopper = EarlyStopping(model, patience=5, folder=folder, on_save_error="warn")
    fill(model, 1)
    stopper.step(2.0, epoch=0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        patch.setattr("safetensors.torch.save_file", full)
        fill(model, 2)
        assert stopper.step(1.0, epoch=1).new_best
    assert len(heard) == (1 if ranks.rank == 0 else 0)
    assert load_best(folder).epoch == 0
    fill(model, 3)
    assert stopper.restore() == 1  # from memory
    assert bool((whole(model) == 2).all())
    dist.barrier()
    stopper.step(3.0, epoch=2)
    found = load_best(folder)
    assert found.epoch == 1
    assert bool((found.states["model"]["0.weight"] == 2).all())
    assert found.states["model"]["0.weight"].shape == (7, 5)


class Holder:
    """An object of unknown type with a sharded tensor in its state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


@on(2)
def fsdp_shards_of_other_objects_are_refused_on_all_ranks(ranks: Ranks) -> None:
    model = sharded_model(ranks)
    also = {"average": Holder(model[0].weight.detach())}
    stopper = EarlyStopping(model, patience=5, folder=common_folder(), also=also)
    said = raised(ValueError, lambda: stopper.step(2.0, epoch=0))
    assert "cannot write average.value to a checkpoint: it is sharded over ranks" in said


@on(3)
def a_group_of_some_ranks_decides_by_itself(ranks: Ranks) -> None:
    some = dist.new_group([1, 2])
    if ranks.rank == 0:
        return
    stopper = EarlyStopping(patience=2, process_group=some)
    stopper.step(float(ranks.rank), epoch=0)
    assert stopper.best == 1.5
    stopper = EarlyStopping(patience=2, process_group=some, agreement="rank0")
    stopper.step(float(ranks.rank), epoch=0)
    assert stopper.best == 1.0


# --- the tests ------------------------------------------------------------------------------------


test_ranks = collect(__name__)
