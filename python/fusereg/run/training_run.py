"""TrainingRun: the loops over epochs and batches of a run that is saved as it goes."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import GeneratorType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ..core import distributed
from ..core.arguments import check_choice, check_integer
from ..core.checks import as_number
from ..core.encoding import check_savable
from ..core.files import CheckpointError
from ..core.hints import check_names
from ..core.lock import FolderInUse
from ..core.ranks import Ranks, attempt, describe, raise_first
from ..core.snapshot import Snapshot, Sources, Stateful
from . import sharded
from .checkpoint import OP, RunFolder
from .loader import Position

#: Names of its arguments elsewhere.
ELSEWHERE = {
    "save_steps": "it is every_steps here",
    "every_n_train_steps": "it is every_steps here",
    "save_top_k": "it is keep_best here",
    "monitor": "give the monitored value to save(metric=value)",
}
#: With several ranks, rank 0's clock is asked once in so many batches.
_CLOCK_EVERY = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    Attributes:
        step: how many batches were trained.
        epoch: the epoch it is in, or before which it is.
        batch: how many of the epoch's batches were trained.
        metric: the metric it was saved with, if any.
        path: its folder.
    """

    step: int
    epoch: int
    batch: int
    metric: float | None
    path: Path


class TrainingRun:
    r"""Saves a whole training run, and lets a restarted script go on with the same bits.

    A checkpoint has the states of all objects that are given (model, optimizer, scheduler,
    gradient scaler, averages, early stopping and so on), the position in the epoch's batches, and
    the random generators: torch's on the CPU and on CUDA devices, NumPy's, Python's and those of
    the data loader. A script that is killed at any moment and started again goes on from the last
    one, and computes what it would have computed, as far as its operations are deterministic. The
    batches of the epoch before the checkpoint are read again without being trained, which restores
    samplers and worker processes too; a loader with a ``state_dict`` of its own is asked for it.

    Checkpoints are made between batches and between epochs, after a step of an optimizer (never
    amid gradient accumulation). What the body of the loop over epochs does before the loop over
    batches is done again when a run is resumed within the epoch.

    Each checkpoint is a new folder, which ``run.json`` names, with the SHA-256 of all files, only
    when it is on the disk; then older ones are removed. With torch.distributed, rank 0 writes
    modules and optimizers (all ranks get its buffers back), and each rank its generators and the
    other objects; modules that are sharded (DTensor, FSDP2), and their optimizers, are written by
    all ranks with torch.distributed.checkpoint, and may be resumed by another number of ranks.
    Early stopping of a sharded model needs a ``folder`` of its own for its best state, and as
    ``resume`` whether the run's folder has a ``run.json``.

    Args:
        folder: where to write; ``~`` is the home directory. One run writes to it, which a lock
            ensures (a later run of the same process takes it over).
        every_steps: save after so many batches, of :meth:`batches`; without such a loop, after
            each epoch.
        every_minutes: save after so many minutes, at the end of a batch. Without either, a
            checkpoint is made after each epoch. The end of the last epoch is saved in any case.
        keep_best: how many of the checkpoints with the best metrics are kept besides the last one;
            see :meth:`save`.
        mode: ``"min"`` or ``"max"``: which metrics are better.
        resume: whether to go on from the checkpoint in the folder, if there is one. If not, the
            first checkpoint replaces it.
        on_save_error: ``"raise"``, or ``"warn"`` and go on training; the last checkpoint stays
            intact either way.
        process_group: the ranks of the run; None: all.
        objects: what to save, by name: any object with ``state_dict`` and ``load_state_dict``, or a
            ``torch.Generator``. If one of them has an attribute ``stopped`` that becomes True (as
            :class:`fusereg.EarlyStopping`), training ends; its ``finish()`` is called at the end,
            after the last checkpoint.

    Attributes:
        epoch: the epoch in training, or the next one.
        batch: how many batches of it were trained.
        step: how many batches were trained in all.
        resumed: whether the run goes on from a checkpoint.

    Raises:
        TypeError, ValueError: an argument is invalid, an optimizer, scheduler, penalty or early
            stopping is of a model that the run was not given, the checkpoint lacks the state of an
            object, or a file cannot hold one.
        CheckpointError: the folder cannot be written to or is in use, or its checkpoint is damaged.
        ImportError: safetensors is not installed (``pip install "fusereg[checkpoints]"``).

    Example:
        >>> run = fusereg.TrainingRun("runs/7", model=model, optimizer=optimizer, every_minutes=10)
        >>> for epoch in run.epochs(90):
        ...     for x, y in run.batches(loader):
        ...         train_step(x, y)
        ...     run.save(metric=validate(model))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_best: int = 0,
        mode: Literal["min", "max"] = "min",
        resume: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise",
        process_group: Any = None,
        **objects: Stateful | torch.Generator,
    ) -> None:
        if every_steps is not None:
            check_integer(every_steps, 1, f"{OP}: every_steps")
        check_integer(keep_best, 0, f"{OP}: keep_best")
        if every_minutes is not None and not as_number(every_minutes, f"{OP}: every_minutes") > 0:
            raise ValueError(f"{OP}: every_minutes must be > 0, got {every_minutes!r}")
        check_choice(mode, ("min", "max"), f"{OP}: mode")
        check_choice(on_save_error, ("raise", "warn"), f"{OP}: on_save_error")
        numbers = [k for k, v in objects.items() if isinstance(v, (int, float, str))]
        numbers = [k for k in numbers if k != "model"]  # nearly "mode", but meant
        check_names(OP, numbers, inspect.signature(TrainingRun).parameters, ELSEWHERE)
        if not objects:
            raise ValueError(f"{OP}: give the objects to save by name, e.g. model=model")
        shared = {k: v for k, v in objects.items() if isinstance(v, (nn.Module, _Optimizer))}
        for name, thing in shared.items():
            _check_whole(name, thing)
        self._shared = Sources(OP, shared)
        others: dict[str, Any] = {k: v for k, v in objects.items() if k not in shared}
        if self._shared.sharded():
            others = {
                k: _WithoutBest(v) if hasattr(v, "restorable") else v for k, v in others.items()
            }
        self._own = Sources(OP, others)
        _check_related(objects)
        self._objects = shared
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._keep_best, self._mode, self._on_save_error = keep_best, mode, on_save_error
        self._ranks = Ranks(process_group)
        self._folder = RunFolder(folder)
        self._position = Position()
        self.epoch = self.batch = self.step = 0
        self.resumed = False
        self._last: dict[str, Any] | None = None
        self._best: list[dict[str, Any]] = []
        self._metric: float | None = None
        self._requested = False
        self._told = False  # whether save() has been called, and what it lacked been said
        self._running = False
        self._iterating: bool | None = None  # None: no loop over batches in this epoch yet
        self._clock = time.monotonic()
        self._stepped = [False, False]  # whether an optimizer made a step: ever, in this batch
        self._waits = any(isinstance(thing, _Optimizer) for thing in shared.values())
        try:
            self._open(resume)
        except BaseException:
            self._folder.release()
            raise
        for thing in shared.values():
            if isinstance(thing, _Optimizer):
                thing.register_step_post_hook(_Noted(self._stepped))

    # -- opening and resuming --

    def _open(self, resume: bool) -> None:
        """Lock the folder, and go on from the checkpoint in it. All ranks must call it."""

        def claimed() -> Any:
            for sources in (self._shared, self._own):
                check_savable(sources, OP)
            if self._ranks.index() > 0:
                return None
            if resume:
                self._folder.entries()  # before it is claimed: another run may be using it
            self._claim()
            return self._folder.entries() if resume else None

        mine = self._ranks.together(claimed)
        found = self._ranks.from_first(lambda: mine)
        if found is None:
            self._warn_of_records()
            return
        self._last, self._best = found
        state = self._load(self._last)
        self.epoch, self.batch, self.step = (self._last[k] for k in ("epoch", "batch", "step"))
        self.resumed = True
        if self._last["ranks"] != self._ranks.count():
            warnings.warn(
                f"{OP}: the checkpoint is of {self._last['ranks']} ranks, and there are "
                f"{self._ranks.count()} now: the run goes on, but with other batches and random "
                "numbers",
                RuntimeWarning,
                stacklevel=3,
            )
        if state is not None:
            self._position.resume(state)

    def _warn_of_records(self) -> None:
        """Warn if early stopping goes on from records of its own while the run begins anew."""
        for name, thing in zip(self._own.names(), self._own, strict=True):
            if hasattr(thing, "restorable") and getattr(thing, "epoch", None) is not None:
                warnings.warn(
                    f"{OP}: the run begins anew, but {name} has the records of its epoch "
                    f"{thing.epoch} already; make it with resume=False, or call its reset()",  # type: ignore[attr-defined]
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _claim(self) -> None:
        """Lock the folder, on rank 0."""
        if self._ranks.unsettled():
            raise ValueError(
                f"{OP}: WORLD_SIZE says that there are several ranks; call "
                "torch.distributed.init_process_group before you make the run"
            )
        try:
            self._folder.claim()
        except CheckpointError as error:
            if self._on_save_error == "raise" or isinstance(error.__cause__, FolderInUse):
                raise
            warnings.warn(f"{error}; training goes on", RuntimeWarning, stacklevel=5)

    def _load(self, entry: dict[str, Any]) -> Any:
        """Load a checkpoint into the objects; return this rank's position. All must call it."""
        index, count = self._ranks.index(), self._ranks.count()
        in_parts = any(name.startswith("sharded/") for name in entry["files"])

        def load() -> Any:
            shared = None
            if in_parts:
                self._folder.check_files(entry, slice(index, None, count))
            else:
                states = self._folder.read_states(entry, "shared")
                shared = Snapshot(entry["epoch"], math.nan, **states)
                self._shared.check(shared)  # before other objects are restored
            # A rank that was not there yet takes what rank 0 had, but no position.
            rank = index if index < entry["ranks"] else 0
            mine = self._folder.read_states(entry, f"rank-{rank}")
            self._warn_of_others(entry, mine["names"])
            self._own.restore(Snapshot(entry["epoch"], math.nan, mine["states"], {}))
            if shared is not None:
                self._shared.restore(shared)
            return mine["position"] if rank == index else None

        state = self._ranks.together(load)
        if in_parts:
            place = self._folder.path_of(entry["name"]) / "sharded"
            sharded.load(self._objects, place, self._ranks.group)
        return state

    def _warn_of_others(self, entry: dict[str, Any], names: list[str]) -> None:
        """Warn if the checkpoint has states of objects that the run has not been given."""
        unknown = set(names) - set(self._shared.names()) - set(self._own.names())
        if unknown:
            warnings.warn(
                f"{OP}: checkpoint {entry['name']} has the states of "
                f"{', '.join(sorted(unknown))} too, which this run was not given",
                RuntimeWarning,
                stacklevel=5,
            )

    # -- the loops --

    def epochs(self, count: int) -> Iterator[int]:
        """Iterate over the epochs up to ``count``, of a resumed run from where it was.

        The loop ends early if one of the objects says so by ``stopped``. When it has ended, the
        last checkpoint is made, and then ``finish()`` of each object that has it is called.
        """
        return self._epochs(check_integer(count, 0, f"{OP}.epochs: count"))

    def _epochs(self, count: int) -> Iterator[int]:
        if self.batch and not self._position.resuming:
            raise RuntimeError(
                f"{OP}.epochs: the loop before was left within an epoch; make a new TrainingRun, "
                "which goes on from the last checkpoint"
            )
        self._running, self._clock = True, time.monotonic()
        self._position.set_generators()
        try:
            while self.epoch < count and not self._stopped():
                self._iterating = None
                yield self.epoch
                self.epoch, self.batch = self.epoch + 1, 0
                self._waits = self._waits and self._stepped[0]  # a wrapper may hide the steps
                often = self._every_minutes is not None or (
                    # Batches of a loop of the caller's own are not counted.
                    self._every_steps is not None and self._iterating is not None
                )
                if self._requested or not often or self._due():
                    self._save()
            if self._position_now() != self._position_saved():
                self._save()
        finally:
            self._running = False
        for thing in self._own:
            finish = getattr(thing, "finish", None)
            if callable(finish):
                finish()

    def _stopped(self) -> bool:
        return any(getattr(thing, "stopped", False) is True for thing in self._own)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over the epoch's batches, of a resumed run from where it was.

        Args:
            loader: a DataLoader, or whatever gives the same batches again each time it is iterated
                over with the same random generators. One loop in each epoch.

        Raises:
            TypeError: ``loader`` is an iterator that ends once and for all, such as a generator,
                ``enumerate(loader)`` or ``iter(loader)``.
        """
        if not self._running or self._iterating is not None:
            raise RuntimeError(
                f"{OP}.batches: " + "there is one loop over batches in each epoch, and this is "
                "another"
                if self._running
                else f"{OP}.batches: it belongs into a loop over epochs()"
            )
        if not isinstance(loader, Iterable) and not hasattr(type(loader), "__getitem__"):
            raise TypeError(f"{_WANTED}, got {type(loader).__name__}")
        if isinstance(loader, _ENDING):
            raise _ended(loader)
        self._iterating = True
        return self._batches(loader)

    def _batches(self, loader: Iterable[T]) -> Iterator[T]:
        for batch in self._position.iterator(loader, self.batch):
            self._stepped[1] = False
            yield batch
            self.batch, self.step = self.batch + 1, self.step + 1
            due = self._requested or self._due()
            if due and (self._stepped[1] or not self._waits):
                self._save()
        self._iterating = False
        if self.batch == 0 and isinstance(loader, Iterator):
            raise _ended(loader)
        if self.batch == 0:
            warnings.warn(
                f"{OP}.batches: epoch {self.epoch} had no batch, as the loader "
                f"({type(loader).__name__}) gave none",
                RuntimeWarning,
                stacklevel=2,
            )

    def _due(self) -> bool:
        """Return whether a checkpoint is due, the same on every rank."""
        done = self.step - (0 if self._last is None else self._last["step"])
        if self._every_steps is not None and done >= self._every_steps:
            return True
        if self._every_minutes is None:
            return False
        late = time.monotonic() - self._clock >= 60 * self._every_minutes
        if self._ranks.count() == 1:
            return late
        return self.step % _CLOCK_EVERY == 0 and self._ranks.from_first(lambda: late)

    # -- saving --

    def save(self, metric: float | Tensor | None = None) -> None:
        """Save when the current batch or epoch is complete; at once outside of the loops.

        Within the loop over batches this is at the end of the batch's body, and after it at the end
        of the epoch's.

        Args:
            metric: by which the best checkpoints are kept, if ``keep_best`` is > 0; the same on all
                ranks. One that is not finite counts as none. Checkpoints without one are never
                among the best, of which a warning tells if the first call has none.
        """
        value = None if metric is None else as_number(metric, f"{OP}.save: metric")
        if value is None and self._keep_best and not self._best and not self._told:
            warnings.warn(
                f"{OP}.save: keep_best is {self._keep_best}, but a checkpoint without metric= is "
                "not among the best",
                RuntimeWarning,
                stacklevel=2,
            )
        self._told = True
        self._metric = None if value is None or not math.isfinite(value) else value
        self._requested = True
        if not self._running:
            self._save()

    def _position_now(self) -> tuple[int, int, int]:
        return self.step, self.epoch, self.batch

    def _position_saved(self) -> tuple[int, int, int] | None:
        return None if self._last is None else _position(self._last)

    def _save(self) -> None:
        """Write a checkpoint of this moment. All ranks must call it."""
        for name, thing in self._objects.items():
            if getattr(thing, "_shows_averages", False):
                raise RuntimeError(
                    f"{OP}.save: {name} shows its averages, which would be saved as the weights in "
                    "training; save outside of its averaged()"
                )
        entry: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
        entry |= {"metric": self._metric, "ranks": self._ranks.count(), "name": "", "files": {}}
        with ExitStack() as stack:

            def make_place() -> Path | None:
                if self._ranks.index() > 0:
                    return None
                work = stack.enter_context(self._folder.workplace())
                (work / "step").mkdir()
                return work

            def publish() -> tuple[str, list[dict[str, Any]]]:
                best = []
                if self._ranks.index() == 0:
                    best = self._ranked(entry)
                    self._folder.publish(work, work / "step", entry, best)
                return entry["name"], best

            heard = self._agreed(make_place)
            if heard is None:
                return
            work = Path(heard[0])
            heard = self._agreed(lambda: self._write(work / "step"))
            if heard is None:
                return
            for of_rank in heard:
                entry["files"].update(of_rank)
            heard = self._agreed(publish)
            if heard is None:
                return
        entry["name"], self._best = heard[0]
        self._last = entry
        self._metric, self._requested = None, False
        self._clock = time.monotonic()

    def _agreed(self, work: Callable[[], Any]) -> list[Any] | None:
        """Return a function's results on all ranks; raise, or warn and return None, if it fails."""
        own, mine = attempt(work)
        heard = self._ranks.gather((describe(own), mine))
        problems = [problem for problem, _ in heard]
        if not any(problems):
            return [result for _, result in heard]
        if own is not None and isinstance(own, (OSError, CheckpointError)):
            intact = "there was none before"
            if self._last is not None:
                intact = f"the checkpoint of step {self._last['step']} is intact"
            follows = "training goes on" if self._on_save_error == "warn" else "training stops"
            text = (
                f"{OP}: cannot write the checkpoint of step {self.step} to {self._folder.path}: "
                f"{getattr(own, 'strerror', None) or own}; {intact}; {follows} "
                f'(on_save_error="{self._on_save_error}")'
            )
            made = CheckpointError(text)
            made.__cause__ = own
            own = made
        failed = next(problem for problem in problems if problem is not None)
        if self._on_save_error == "raise" or failed[0] not in ("CheckpointError", "RuntimeError"):
            raise_first(problems, own)
        if own is not None:
            warnings.warn(str(own), RuntimeWarning, stacklevel=4)
        self._clock = time.monotonic()
        return None

    def _write(self, place: Path) -> dict[str, Any]:
        """Write this rank's files, and return their entries."""
        in_parts = self._shared.sharded()
        paths: list[Path] = []
        if in_parts:
            paths = sharded.save(self._objects, place / "sharded", self._ranks.group)
        elif self._ranks.index() == 0:
            kept = self._shared.capture(self.epoch, math.nan, "cpu")
            tree = {"states": kept.states, "buffers": kept.buffers}
            paths = self._folder.write_states(place, "shared", tree)
        mine = {
            "names": [*self._shared.names(), *self._own.names()],
            "states": self._own.capture(self.epoch, math.nan, "cpu").states,
            "position": self._position.state(self.batch),
        }
        paths += self._folder.write_states(place, f"rank-{self._ranks.index()}", mine)
        return self._folder.described(place, paths)

    def _ranked(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the entries of the best checkpoints that are still there, with this one."""
        entries = [e for e in self._best if self._folder.path_of(e["name"]).is_dir()]
        for gone in (e for e in self._best if e not in entries):
            warnings.warn(
                f"{OP}: checkpoint {gone['name']}, one of the best, is no longer in "
                f"{self._folder.path}",
                RuntimeWarning,
                stacklevel=4,
            )
        if entry["metric"] is not None:
            # One of the same position is replaced, but a loop of the caller's own has none.
            where = _position(entry)
            entries = [e for e in entries if _position(e) != where or not any(where)] + [entry]
        sign = 1 if self._mode == "min" else -1
        return sorted(entries, key=lambda e: sign * e["metric"])[: self._keep_best]

    # -- results --

    @property
    def last(self) -> Saved | None:
        """The last checkpoint."""
        return None if self._last is None else self._public(self._last)

    @property
    def best(self) -> list[Saved]:
        """The best checkpoints, the best first."""
        return [self._public(entry) for entry in self._best]

    def _public(self, entry: dict[str, Any]) -> Saved:
        path = self._folder.path_of(entry["name"])
        return Saved(entry["step"], entry["epoch"], entry["batch"], entry["metric"], path)

    def restore(self, which: Literal["best", "last"] = "best") -> int:
        """Load the objects' states of the best or the last checkpoint; all ranks must call it.

        The position and the random generators stay as they are.

        Returns:
            The step of that checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        check_choice(which, ("best", "last"), f"{OP}.restore: which")
        entry = self._last if which == "last" else next(iter(self._best), None)
        if entry is None:
            why = "none has been saved yet"
            if self._last is not None and not self._keep_best:
                why = "keep_best is 0; pass the number to keep to TrainingRun"
            elif self._last is not None:
                why = "none was saved with a finite metric; call save(metric=...)"
            raise CheckpointError(f"{OP}.restore: there is no {which} checkpoint: {why}")
        self._load(entry)
        return int(entry["step"])


def _position(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    return entry["step"], entry["epoch"], entry["batch"]


_Optimizer = torch.optim.Optimizer
_WANTED = (
    f"{OP}.batches: loader must be something that can be iterated over once an epoch, such as a "
    "DataLoader"
)
#: Iterators that cannot begin anew; one of another type may do so in its ``__iter__``.
_ENDING = (
    *(GeneratorType, enumerate, zip, map, filter, reversed, itertools.chain, itertools.islice),
    *map(type, (iter([]), iter(()), iter(range(0)), iter({}), iter(set()), iter({}.values()))),
    type(iter({}.items())),
    _BaseDataLoaderIter,
)


def _ended(loader: Any) -> TypeError:
    return TypeError(
        f"{_WANTED}, got {type(loader).__name__}, an iterator that gives its batches only once; "
        "for its index write enumerate(run.batches(loader))"
    )


def _check_whole(name: str, thing: Any) -> None:
    """Raise for a module whose state dict one rank cannot make alone."""
    for module in thing.modules() if isinstance(thing, nn.Module) else ():
        if (kind := type(module).__name__) in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(
                f"{OP}: {name} has a {kind}, whose parts are not DTensors; shard it with "
                "torch.distributed.fsdp.fully_shard, or save it as its library says"
            )


def _check_related(objects: Mapping[str, Any]) -> None:
    """Raise for an object that is of none of the models: the run would save the wrong one."""
    modules = [thing for thing in objects.values() if isinstance(thing, nn.Module)]
    given = {id(p) for module in modules for p in module.parameters()}
    for name, thing in objects.items() if given else ():
        held = _parameters_of(thing)
        if held and not any(id(p) in given for p in held):
            raise ValueError(
                f"{OP}: {name} ({type(thing).__name__}) is of another model: it has no parameter "
                "of a module that the run was given; make it of that one, or give its module, too"
            )


def _parameters_of(thing: Any) -> list[Tensor]:
    """Return the parameters that an optimizer, a scheduler, a penalty or a stopper is for."""
    optimizer = thing if isinstance(thing, _Optimizer) else getattr(thing, "optimizer", None)
    if isinstance(optimizer, _Optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]
    model = getattr(thing, "_model", None)
    ours = any(kind.__module__.startswith("fusereg.") for kind in type(thing).__mro__)
    # An average of the weights has parameters of its own.
    if not ours or not isinstance(model, nn.Module) or distributed.is_average(model):
        return []
    return list(model.parameters())


class _WithoutBest:
    """Early stopping of a sharded model, whose best state is in a folder of its own."""

    def __init__(self, stopper: Any) -> None:
        self._stopper = stopper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stopper, name)

    def state_dict(self) -> Any:
        """Return the records."""
        return self._stopper.state_dict(snapshot=False)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the records; warn if the best state, which the folder should have, is lost."""
        self._stopper.load_state_dict(state_dict)
        if self._stopper.best_epoch is not None and not self._stopper.restorable:
            warnings.warn(
                f"{OP}: the best weights so far, of epoch {self._stopper.best_epoch}, are not in "
                "the run's checkpoint, as those of a sharded model are not; unless a later epoch "
                "is better, training will end with its last ones (give EarlyStopping a folder= "
                "of its own to keep them)",
                RuntimeWarning,
                stacklevel=2,
            )


class _Noted:
    """A hook of optimizers that notes their steps, without keeping the run alive."""

    def __init__(self, stepped: list[bool]) -> None:
        self._stepped = stepped

    def __call__(self, *_: Any) -> None:
        self._stepped[:] = True, True
