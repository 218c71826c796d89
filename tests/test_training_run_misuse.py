"""TrainingRun: what would have trained, saved or restored nothing is said in words."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, IterableDataset, Sampler

import fusereg
from fusereg import EarlyStopping, TrainingRun, WeightPenalty
from fusereg.run import CheckpointError

safetensors_torch = pytest.importorskip("safetensors.torch")


# --- restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "keep_best", "metrics", "why"),
    [
        ("last", 0, (), "none has been saved yet"),
        ("best", 1, (), "none has been saved yet"),
        ("best", 0, (1.0,), "keep_best is 0"),
        ("best", 1, (None,), "none was saved with a finite metric"),
        ("best", 2, (float("nan"), None), "none was saved with a finite metric"),
    ],
)
@pytest.mark.filterwarnings("ignore:fusereg.TrainingRun.save")
def test_restoring_what_is_not_there_is_refused_and_changes_nothing(
    tmp_path: Path, which: Any, keep_best: int, metrics: tuple[float | None, ...], why: str
) -> None:
    model = nn.Linear(1, 1)
    run = TrainingRun(tmp_path, model=model, keep_best=keep_best)
    for metric in metrics:
        run.save(metric)
    nn.init.constant_(model.weight, 3.0)
    text = rf"^fusereg.TrainingRun.restore: there is no {which} checkpoint: {why}"
    with pytest.raises(CheckpointError, match=text):
        run.restore(which)
    assert float(model.weight.detach()) == 3.0
    run.save(metric=1.0)
    nn.init.constant_(model.weight, 4.0)
    if keep_best or which == "last":
        assert run.restore(which) == 0
        assert float(model.weight.detach()) == 3.0


def test_averages_are_not_saved_as_the_weights_in_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = fusereg.optim.SGD(model.parameters(), lr=0.5, ema_decay=0.5)
    run = TrainingRun(tmp_path, model=model, optimizer=optimizer, on_save_error="warn")
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    raw = copy.deepcopy(model.state_dict())
    with optimizer.averaged(), pytest.raises(RuntimeError, match=r"save outside of its averaged"):
        run.save()
    run.save()
    nn.init.zeros_(model.weight)
    run.restore("last")
    assert torch.equal(model.weight, raw["weight"])
    run = TrainingRun(tmp_path, model=model, optimizer=optimizer)
    for _ in run.epochs(2):  # what is asked for inside the loops is saved after the block
        with optimizer.averaged():
            run.save()
    run.restore("last")
    assert torch.equal(model.weight, raw["weight"])


@pytest.mark.parametrize("gone", ["one", "all", "the folder"])
def test_a_best_checkpoint_that_has_gone_is_told_and_no_longer_named(
    tmp_path: Path, gone: str
) -> None:
    folder = tmp_path / "run"
    run = TrainingRun(folder, model=nn.Linear(1, 1), keep_best=2)
    for epoch in run.epochs(3):
        run.save(float(epoch))
    names = [saved.path for saved in run.best]
    if gone == "the folder":
        folder.rename(tmp_path / "moved")
    for path in names[: {"one": 1, "all": 2}.get(gone, 0)]:
        shutil.rmtree(path)
    with pytest.warns(RuntimeWarning, match="one of the best, is no longer in"):
        run.save(9.0)
    assert [saved.metric for saved in run.best] == ([1.0, 9.0] if gone == "one" else [9.0])
    run.restore("best")
    again = TrainingRun(folder, model=nn.Linear(1, 1), keep_best=2)
    assert [saved.path.is_dir() for saved in again.best] == [True] * len(again.best)


@pytest.mark.parametrize("loop", ["batches", "epochs", "own"])
def test_the_best_are_kept_whoever_loops(tmp_path: Path, loop: str) -> None:
    """Only the run's own loops count steps and epochs."""
    model = nn.Linear(1, 1)
    run = TrainingRun(tmp_path, model=model, keep_best=2)
    metrics = [3.0, 1.0, 2.0, 4.0, 1.5]
    for epoch in range(5) if loop == "own" else run.epochs(5):
        nn.init.constant_(model.weight, metrics[epoch])
        for _ in run.batches([1, 2]) if loop == "batches" else ():
            pass
        run.save(metrics[epoch])
    assert [saved.metric for saved in run.best] == [1.0, 1.5]
    run.restore("best")
    assert model.weight.item() == 1.0
    assert TrainingRun(tmp_path, model=model, keep_best=2).best == run.best


@pytest.mark.parametrize("every", [{}, {"every_steps": 100}])
def test_a_run_whose_loop_over_batches_is_the_callers_own_is_saved_after_each_epoch(
    tmp_path: Path, every: dict[str, Any]
) -> None:
    model = nn.Linear(1, 1)
    run = TrainingRun(tmp_path, model=model, **every)
    for epoch in run.epochs(3):
        assert (run.last.epoch if run.last else 0) == epoch
        for _ in range(4):
            pass


def test_a_save_that_is_asked_for_is_made_when_the_batch_is_complete(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), every_steps=100)
    seen = []
    for _ in run.epochs(1):
        for batch in run.batches(range(4)):
            if batch == 1:
                run.save()
            seen.append(run.last and run.last.step)
    assert seen == [None, None, 2, 2]


def test_any_reader_takes_the_files(tmp_path: Path) -> None:
    """JSON and safetensors, each with its SHA-256 in ``run.json``."""
    model = nn.Linear(2, 1)
    TrainingRun(tmp_path, model=model, generator=torch.Generator()).save()
    (folder,) = tmp_path.glob("step-*")
    last = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["last"]
    assert last["name"] == folder.name
    assert set(last["files"]) == {path.name for path in folder.iterdir()}
    tensors: list[torch.Tensor] = []
    for name, said in last["files"].items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == said["sha256"]
        if name.endswith(".json"):
            json.loads(content)
        else:
            tensors += safetensors_torch.load(content).values()
    for p in model.parameters():
        assert any(torch.equal(t, p) for t in tensors)


def test_any_object_may_end_the_run_and_is_finished_after_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    class Budget:
        def __init__(self) -> None:
            self.stopped = False
            self.finished: list[int] = []

        def state_dict(self) -> dict[str, bool]:
            return {"stopped": self.stopped}

        def load_state_dict(self, state: dict[str, bool]) -> None:
            self.stopped = state["stopped"]

        def finish(self) -> None:
            assert run.last is not None
            self.finished.append(run.last.epoch)

    budget = Budget()
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), budget=budget)
    for epoch in run.epochs(9):
        budget.stopped = epoch == 2
    assert budget.finished == [3]
    again = Budget()
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), budget=again)
    assert list(run.epochs(9)) == []
    assert again.finished == [3]


def test_a_new_run_begins_without_a_checkpoint(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), keep_best=1)
    assert not run.resumed
    assert list(run.epochs(1)) == [0]


@pytest.mark.parametrize(("keep_best", "first", "told"), [(1, None, 1), (1, 2.0, 0), (0, None, 0)])
def test_saving_without_a_metric_while_the_best_are_kept_is_told_once(
    tmp_path: Path, keep_best: int, first: float | None, told: int
) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), keep_best=keep_best)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in run.epochs(3):
            run.save(first)
            run.save()
    texts = [str(w.message) for w in caught if "metric" in str(w.message)]
    assert len(texts) == told
    assert all("keep_best is 1, but a checkpoint without metric= is not among" in t for t in texts)


# --- objects of another model ---------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


OF_A_MODEL: dict[str, Callable[[nn.Module], Any]] = {
    "optimizer": sgd,
    "own optimizer": lambda m: fusereg.optim.AdamW(m.parameters()),
    "scheduler": lambda m: torch.optim.lr_scheduler.StepLR(sgd(m), 3),
    "stopper": lambda m: EarlyStopping(m, patience=3),
    "penalty": lambda m: WeightPenalty(m, l1=0.1),
}


class Held(nn.Module):
    """A module that holds another, as a DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),  # type: ignore[return-value]
    "held": Held,
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", OF_A_MODEL)
def test_what_is_of_another_model_is_refused(tmp_path: Path, kind: str, wrap: str) -> None:
    model, make, wrapped = nn.Linear(2, 1), OF_A_MODEL[kind], WRAPS[wrap]
    for other in (copy.deepcopy(model), nn.Linear(3, 1), wrapped(nn.Linear(2, 1))):
        with pytest.raises(ValueError, match=r"^fusereg.TrainingRun: thing \(\w+\) is of another"):
            TrainingRun(tmp_path, model=wrapped(model), thing=make(other))
        TrainingRun(tmp_path / "both", model=model, other=other, thing=make(other))
    assert not (tmp_path / "run.json").exists()
    TrainingRun(tmp_path, model=wrapped(model), thing=make(model))
    TrainingRun(tmp_path, model=model, thing=make(wrapped(model)))
    TrainingRun(tmp_path, model=wrapped(model), thing=make(nn.Sequential(model, nn.Linear(1, 1))))
    TrainingRun(tmp_path, thing=make(model))


def test_models_without_parameters_and_averages_go_with_any(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    TrainingRun(tmp_path, model=nn.ReLU(), optimizer=sgd(model))
    average = swa_utils.AveragedModel(model)
    for averaged in (average, torch.compile(average, backend="eager")):
        for stopper in (EarlyStopping(averaged, patience=3), EarlyStopping(patience=3)):  # type: ignore[arg-type]
            TrainingRun(tmp_path, model=model, stopper=stopper)
            TrainingRun(tmp_path, model=model, average=average, stopper=stopper)
    TrainingRun(tmp_path, model=model, stopper=EarlyStopping(nn.ReLU(), patience=3))


def test_two_models_with_an_optimizer_each_are_a_run(tmp_path: Path) -> None:
    one, two = nn.Linear(2, 1), nn.Linear(1, 2)
    TrainingRun(tmp_path, one=one, two=two, first=sgd(one), second=sgd(two))
    with pytest.raises(ValueError, match="second"):
        TrainingRun(tmp_path, one=one, first=sgd(one), second=sgd(two))


# --- loaders --------------------------------------------------------------------------------------

BATCHES = [torch.zeros(1), torch.ones(1)]


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(BATCHES)


class Again:
    """A loader that is its own iterator, and begins anew, as some libraries' are."""

    def __init__(self, anew: bool = True) -> None:
        self.anew, self.at = anew, 0

    def __iter__(self) -> Again:
        self.at = 0 if self.anew else self.at
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == 2:
            raise StopIteration
        self.at += 1
        return BATCHES[self.at - 1]


class Indexed:
    """What Python iterates over by index alone."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return BATCHES[index]


ONCE: dict[str, Callable[[], Any]] = {
    "generator": lambda: (x for x in BATCHES),
    "list": lambda: iter(BATCHES),
    "dict": lambda: iter(dict(enumerate(BATCHES)).values()),
    "range": lambda: iter(range(2)),
    "enumerate": lambda: enumerate(DataLoader(BATCHES)),  # type: ignore[arg-type]
    "zip": lambda: zip(BATCHES, BATCHES, strict=True),
    "map": lambda: map(torch.neg, BATCHES),
    "slice": lambda: itertools.islice(BATCHES, 2),
    "chain": lambda: itertools.chain(BATCHES),
    "DataLoader": lambda: iter(DataLoader(BATCHES)),  # type: ignore[arg-type]
    "number": lambda: 3,
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", ONCE)
def test_an_iterator_is_no_loader(tmp_path: Path, kind: str) -> None:
    run, loader = TrainingRun(tmp_path, model=nn.Linear(1, 1)), ONCE[kind]()
    wanted = "must be something that can be iterated over once an epoch, such as a DataLoader, got "
    for _ in run.epochs(2):
        with pytest.raises(TypeError, match=rf"batches: loader {wanted}{type(loader).__name__}"):
            run.batches(loader)
        assert len(list(run.batches(BATCHES))) == 2, "the loop may be begun after the error"


def test_an_iterator_that_does_not_begin_anew_is_noticed_in_the_second_epoch(
    tmp_path: Path,
) -> None:
    run, loader = TrainingRun(tmp_path, model=nn.Linear(1, 1)), Again(anew=False)
    epochs = run.epochs(2)
    next(epochs)
    assert len(list(run.batches(loader))) == 2
    next(epochs)
    with pytest.raises(TypeError, match="got Again, an iterator that gives its batches only once"):
        list(run.batches(loader))


@pytest.mark.parametrize("crash_at", [3, 4, 10])
@pytest.mark.parametrize(
    ("samples", "size", "told"),
    [
        (40, 4, ""),
        (40, 8, "5 batches of size 8"),
        (40, 2, "20 batches of size 2"),
        (44, 4, "11 batches of size 4"),
    ],
)
def test_a_loader_of_another_size_is_told_where_an_epoch_is_gone_on_with(
    tmp_path: Path, crash_at: int, samples: int, size: int, told: str
) -> None:
    def run(samples: int, size: int, stop_at: int) -> int:
        run = TrainingRun(tmp_path, model=nn.Linear(1, 1), every_steps=1)
        loader = DataLoader(torch.arange(samples), batch_size=size, shuffle=True)  # type: ignore[arg-type]
        for _ in run.epochs(2):
            for _ in run.batches(loader):
                if run.step == stop_at:
                    run._folder.release()
                    return run.step
        return run.step

    assert run(40, 4, crash_at) == crash_at
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = run(samples, size, -1)
    epoch = samples // size
    assert steps == (epoch if crash_at < 10 else 10) + epoch
    within = told and crash_at < 10  # of an epoch that is complete nothing is left
    found = [str(w.message) for w in caught]
    assert len(found) == bool(within), found
    if within:
        assert f"the loader has {told}, and had 10 batches of size 4 when" in found[0]
        assert f"after {crash_at} batches of this epoch" in found[0]


class Streaming(IterableDataset[int]):
    """A stream that says that it is shorter than it is."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Unsized(Sampler[int]):
    """A sampler whose length is not known."""

    def __len__(self) -> int:
        raise RuntimeError("not known before the first epoch")

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Streaming()), DataLoader(torch.arange(3), sampler=Unsized())],  # type: ignore[arg-type]
)
@pytest.mark.filterwarnings("error")
def test_a_loader_that_does_not_know_its_size_is_saved(
    tmp_path: Path, loader: DataLoader[Any]
) -> None:
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), every_steps=1)
    for _ in run.epochs(2):
        for _ in run.batches(loader):
            pass
    assert run.step == 6


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: BATCHES,
    "range": lambda: range(2),
    "dict": lambda: dict(enumerate(BATCHES)),
    "DataLoader": lambda: DataLoader(BATCHES),  # type: ignore[arg-type]
    "stream": lambda: DataLoader(Stream(), batch_size=None),
    "its own iterator": Again,
    "by index": Indexed,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.filterwarnings("error")
def test_what_begins_anew_in_each_epoch_is_a_loader(tmp_path: Path, kind: str) -> None:
    loader = LOADERS[kind]()
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1), every_steps=1)
    for _ in run.epochs(3):
        assert len(list(run.batches(loader))) == 2
    assert run.step == 6


def test_an_epoch_without_a_batch_is_told(tmp_path: Path) -> None:
    few = DataLoader(BATCHES, batch_size=3, drop_last=True)  # type: ignore[arg-type]
    run = TrainingRun(tmp_path, model=nn.Linear(1, 1))
    for _ in run.epochs(1):
        with pytest.warns(RuntimeWarning, match=r"epoch 0 had no batch, as the loader \(DataLoad"):
            assert list(run.batches(few)) == []


@pytest.mark.parametrize("kind", [k for k in LOADERS if k != "by index"])
def test_a_loader_that_is_shorter_than_the_position_is_refused(tmp_path: Path, kind: str) -> None:
    model = nn.Linear(1, 1)
    run = TrainingRun(tmp_path, model=model, every_steps=1)
    for _ in run.epochs(1):
        for at in run.batches(range(9)):
            if at == 5:
                break
        break
    run = TrainingRun(tmp_path, model=model)
    epochs = run.epochs(1)
    next(epochs)
    with pytest.raises(ValueError, match="has only 2 batches, and the checkpoint was saved after"):
        list(run.batches(LOADERS[kind]()))


# --- another architecture -------------------------------------------------------------------------


def _two_layers(width: int = 3, norm: bool = False) -> nn.Module:
    middle = nn.BatchNorm1d(width) if norm else nn.ReLU()
    return nn.Sequential(nn.Linear(2, width), middle, nn.Linear(width, 1))


def _normed() -> nn.Module:
    net = _two_layers()
    nn.utils.parametrizations.weight_norm(net[0])  # type: ignore[index]  # may load older names
    return net


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(*_two_layers(), nn.Linear(1, 1)), "lacks 3.weight, 3.bias of model"),
        (lambda: nn.Sequential(nn.Linear(2, 3)), "also has 2.weight, 2.bias of model"),
        (
            lambda: _two_layers(norm=True),
            r"lacks 1.weight, 1.bias, 1.running_mean, \.\.\. of model",
        ),
        (lambda: _two_layers(4), r"has model's 0.weight with shape \(3, 2\), wanted \(4, 2\)"),
        (lambda: _normed(), "lacks 0.parametrizations.weight.original0, .* also has 0.weight of"),
    ],
)
@pytest.mark.parametrize("how", ["run", "stopper"])
@pytest.mark.filterwarnings("ignore:.*the folder holds the records")
def test_a_state_of_another_architecture_is_refused_before_anything_changes(
    tmp_path: Path, how: str, other: Callable[[], nn.Module], words: str
) -> None:
    def begin(model: nn.Module) -> tuple[Any, Any, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return model, optimizer, rates

    def resume(model: nn.Module, optimizer: Any, rates: Any) -> None:
        if how == "run":
            TrainingRun(tmp_path, model=model, optimizer=optimizer, rates=rates)
        else:
            also = {"optimizer": optimizer, "rates": rates}
            arguments: dict[str, Any] = {"patience": 3, "folder": tmp_path, "also": also}
            EarlyStopping(model, resume=True, **arguments).restore()

    model, optimizer, rates = begin(_two_layers())
    optimizer.step()
    rates.step()
    if how == "run":
        TrainingRun(tmp_path, model=model, optimizer=optimizer, rates=rates).save()
    else:
        also = {"optimizer": optimizer, "rates": rates}
        EarlyStopping(model, patience=3, folder=tmp_path, also=also).step(1.0, epoch=0)
    things = begin(other())
    before = [copy.deepcopy(thing.state_dict()) for thing in things]
    with pytest.raises(ValueError, match=words):
        resume(*things)
    for thing, state in zip(things, before, strict=True):
        torch.testing.assert_close(thing.state_dict(), state, rtol=0, atol=0)


def test_two_weights_are_not_restored_into_one() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    stopper = EarlyStopping(net, patience=3)
    stopper.step(1.0, epoch=0)
    net[1].weight = net[0].weight
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"two weights as 0.weight and 1.weight of model, .* tied"):
        stopper.restore()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    stopper.step(0.5, epoch=1)  # tied ones into one, and into two
    net[1].weight = nn.Parameter(torch.zeros(3, 3))
    assert stopper.restore() == 1
    assert torch.equal(net[1].weight, net[0].weight)


class _Renaming(nn.Linear):
    """A layer that loads states of an earlier version of itself."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if prefix + "w" in state:
            state[prefix + "weight"] = state.pop(prefix + "w")
        super()._load_from_state_dict(state, prefix, *args)


def test_a_module_that_loads_other_names_is_let(tmp_path: Path) -> None:
    model = _Renaming(2, 1)

    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.bias = nn.Parameter(torch.full((1, 2), 5.0)), nn.Parameter(torch.ones(1))

    TrainingRun(tmp_path, model=Older()).save()
    TrainingRun(tmp_path, model=model)
    assert model.weight.tolist() == [[5.0, 5.0]]


# --- persistent workers ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fusereg.TrainingRun. the loader's persistent workers")
@pytest.mark.parametrize(("crashes", "every"), [((8, 13), 2), ((7,), None)])
def test_persistent_workers_bring_the_batches_that_they_would_have_brought(
    crashes: tuple[int, ...], every: int | None, tmp_path: Path
) -> None:
    """Starting workers draws a number, which their next epochs do not."""

    def script(folder: Path, crash_at: int | None = None) -> list[list[int]]:
        torch.manual_seed(0)
        loader = DataLoader(
            torch.arange(20), 4, shuffle=True, num_workers=1, persistent_workers=True
        )
        run = TrainingRun(folder, model=nn.Linear(1, 1), every_steps=every)
        for _ in run.epochs(3):
            for batch in run.batches(loader):
                seen[run.step] = batch.tolist()
                if run.step == crash_at:
                    raise RuntimeError("the power is gone")
        return list(seen.values())

    seen: dict[int, list[int]] = {}
    wanted = script(tmp_path / "whole")
    seen = {}
    for crash_at in crashes:
        with pytest.raises(RuntimeError, match="the power is gone"):
            script(tmp_path / "crashed", crash_at)
    assert script(tmp_path / "crashed") == wanted
