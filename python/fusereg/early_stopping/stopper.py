"""EarlyStopping: the decision, the snapshots, the files and the ranks in one object."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..core.arguments import check_choice, check_integer, check_type
from ..core.checks import check_mapping
from ..core.files import CheckpointError
from ..core.hints import explains
from ..core.ranks import Problem, describe, raise_first
from ..core.snapshot import RandomState, Snapshot, Sources, Stateful
from .agreement import AgreeingRanks, Agreement
from .checkpoint import CheckpointFolder
from .checks import OP
from .decision import Decision, Metric, Mode, Rules, State, Track, advance, explain, judged_anew
from .keeper import SAME_ARGUMENTS, Keeper, OnSaveError, Where
from .metrics import check_metrics, check_weights, number, weighted_sum
from .smoothing import Smoothing

_VERSION = 1


#: Arguments of the early stopping of Keras, Lightning, transformers and ignite.
ELSEWHERE = {
    "monitor": "give the monitored value to step(value); of several, metrics= names them",
    "restore_best_weights": "restore_best=True, the default, restores the best state",
    "verbose": "print(stopper.explain()) tells where it stands",
    "delta": "it is min_delta here",
    "early_stopping_patience": "it is patience here",
    "early_stopping_threshold": "it is min_delta here",
    "stopping_threshold": "it is target here",
    "divergence_threshold": "it is divergence here",
    "check_finite": 'nan="stop", the default, stops at NaN and infinity',
    "optimizer": 'also={"optimizer": optimizer} keeps and restores it with the model',
    "scheduler": 'also={"scheduler": scheduler} keeps and restores it with the model',
    "path": "it is folder here",
    "filepath": "it is folder here",
    "checkpoint_dir": "it is folder here",
    "max_epochs": "give it to epochs(max_epochs)",
    "score_function": 'give the score to step(score), with mode="max"',
    "trainer": "step(value) returns whether to go on; fusereg.integrations has callbacks",
}


class _Report(NamedTuple):
    """The message of each rank to the others at a check."""

    values: list[float]
    epoch: int
    arguments: dict[str, object]
    problem: Problem | None


class _Malformed(ValueError):
    """Records that this class has not written."""


def _sources(model: Any, also: Mapping[str, Any] | None, rng: bool) -> Sources:
    """Return the objects to keep, by the names of their states."""
    objects: dict[str, Any] = {}
    if model is not None:
        check_type(model, nn.Module, f"{OP}: model", "a torch.nn.Module or None")
        objects["model"] = model
    if also is not None:
        check_mapping(also, f"{OP}: also", 'like {"optimizer": optimizer}')
    for name, thing in (also or {}).items():
        if name in ("model", "rng"):
            raise ValueError(f'{OP}: also: the name "{name}" is taken, choose another')
        objects[name] = thing
    if rng:
        objects["rng"] = RandomState()
    return Sources(OP, objects, 'also["{}"]')


class EarlyStopping:
    r"""Stops training when a validation metric stops improving, and restores the best model.

    Two records are kept of the metric :math:`m_t` (the smoothed one, if ``smoothing`` is given),
    with different purposes. For ``mode="min"``:

    .. math::
        \text{improved}_t &:\; m_t < ref - \delta, \quad
            \delta = min\_delta \text{ or } min\_delta \cdot |ref| \\
        \text{new best}_t &:\; m_t < best

    ``improved`` sets ref to :math:`m_t` and resets patience; anything else is a miss, and training
    stops at the ``patience``-th miss in a row. ``new_best`` sets best to :math:`m_t`, takes a
    snapshot and writes the checkpoint. So gains that are too small to matter do not prolong
    training, unless they add up, and the best model is still the best one. ``mode="max"`` mirrors
    both. The reasons to stop, of which the first that holds is reported: ``"non_finite"`` (see
    ``nan``), ``"divergence"`` (:math:`m_t > divergence`), ``"target"`` (:math:`m_t \le target`),
    ``"patience"``.

    The best model is restored when training ends: in a loop over ``epochs()``, by the :meth:`step`
    that stops it, or after the last epoch; with a ``with`` block, at its end, however it is left
    (``break``, an exception, Ctrl-C). A loop without a ``with`` block that is left by ``break`` or
    an exception warns that nothing was restored: Python does not tell an iterator reliably when its
    loop is left, and weights are never written later. A loop of your own calls :meth:`finish` at
    its end. If no metric was finite, the model stays as it is.

    Args:
        model: the module to keep the best state of: parameters and buffers (including those that
            are not persistent, and trained ones that its ``state_dict()`` leaves out), tied ones
            once. None: only decide.
        patience: p >= 1: training stops at the p-th check in a row without improvement.
        mode: ``"min"`` or ``"max"``: which values are better.
        min_delta: by how much a value has to beat the reference to count as improved, >= 0, in the
            metric's unit or, with ``delta_mode="relative"``, as a fraction of the reference's
            absolute value (0.01: one percent; also right for negative metrics).
        delta_mode: ``"absolute"`` or ``"relative"``.
        nan: how to treat a metric that is NaN or infinite: ``"stop"`` at once, ``"count"`` it as a
            miss, or ``"ignore"`` it: no miss, but more than ``nan_limit`` in a row stop training.
            It never becomes reference or best, and does not enter the smoothing.
        nan_limit: for ``nan="ignore"``, >= 1; ``patience`` if not given.
        patience_unit: ``"checks"``: calls of :meth:`step`; ``"epochs"``: epochs since the last
            improvement (before the first one: since the epoch before the first check), if not every
            epoch has a check. Then a miss stops if at least ``patience`` epochs have passed.
        start_from_epoch: checks of earlier epochs only feed the smoothing and watch for non-finite
            values: no miss, no best, no target, no divergence.
        baseline: the first reference: until a check beats it by ``min_delta``, all are misses.
        target: training stops when the metric is at least as good.
        divergence: training stops when the metric is worse.
        smoothing: :class:`fusereg.early_stopping.Ema` or ``Rolling``; the smoothed metric is then
            judged in place of the metric, and recorded as the best.
        metrics: several metrics by name, each ``"min"``, ``"max"`` or a
            :class:`fusereg.early_stopping.Metric` with arguments of its own; :meth:`step` then
            takes a mapping. Replaces the single-metric arguments above.
        weights: several metrics by name, each with its weight: the weighted sum is judged as a
            single metric (give metrics of the opposite direction a negative weight).
        combine: with ``metrics``, ``"any"``: training goes on while any of them has improved within
            the patience; ``"all"``: while each has. Targets stop when every metric that has one has
            reached it at the same check; divergence and non-finite values of one are enough.
        best_by: with ``metrics``, the one whose best state is kept; the first if not given.
        also: further objects with ``state_dict`` and ``load_state_dict`` (optimizer, scheduler,
            scaler, averaged model) by name, kept and restored with the model.
        rng: whether to keep and restore torch's random generators too.
        snapshot: where the best state is kept: in ``"cpu"`` memory, on the tensors' own
            ``"device"``, on ``"disk"`` (in ``folder`` only), or ``"none"``: nowhere.
        restore_best: whether the best state is restored at the end, as described above.
        folder: where to write checkpoints, or None; ``~`` is the home directory. One run writes to
            it, which a lock ensures (a later stopper of the same process takes it over); it must be
            visible to every rank, and rank 0 writes. The best state goes to a safetensors file;
            progress, with that file's SHA-256, to ``early_stopping.json`` at each check. Each write
            is atomic: a process that dies at any moment leaves the old checkpoint or the new one,
            complete.
            Parameters that are sharded over ranks (DTensor, FSDP2) are gathered in rank 0's memory
            and written as whole tensors; any number of ranks, or one process without sharding, can
            resume from them.
        resume: if the folder holds a checkpoint: True resumes from it (and starts anew if there is
            none), False starts anew, and the old one stays until the first save; None is an error.
            It holds records and the best state, not the model in training: load that first, or use
            :class:`fusereg.TrainingRun`. A model that is neither the one of the last check nor the
            best gives a warning.
        on_save_error: ``"raise"``, or ``"warn"`` and go on training; the next check tries again.
            The last checkpoint stays intact either way.
        agreement: with torch.distributed, how the ranks' metrics become one: their ``"mean"``,
            ``"min"``, ``"max"``, or that of ``"rank0"`` (others may pass None); then rank 0 decides
            for all, and each rank must call :meth:`step` at each check. A metric that is not finite
            on one rank is not finite. ``"none"``: each rank decides alone, without a folder.
        process_group: the ranks that decide together; None: all.

    Raises:
        TypeError, ValueError: an argument is invalid, ``folder`` holds a checkpoint and ``resume``
            is not given, or a file cannot hold the state of an object.
        ImportError: ``folder`` is given and safetensors is not installed
            (``pip install "fusereg[checkpoints]"``).
        CheckpointError: ``folder`` cannot be written to or is in use by another run, or its
            checkpoint is damaged.

    Example:
        >>> stopper = fusereg.EarlyStopping(model, patience=5)
        >>> for epoch in stopper.epochs(100):
        ...     train(model)
        ...     stopper.step(validate(model), epoch=epoch)
        >>> stopper.best_epoch, stopper.explain()

    Paper:
        L. Prechelt, "Early Stopping - But When?", in: Neural Networks: Tricks of the Trade, 1998.
    """

    @explains(OP, ELSEWHERE)
    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        patience: int,
        mode: Mode = "min",
        min_delta: float = 0.0,
        delta_mode: Literal["absolute", "relative"] = "absolute",
        nan: Literal["stop", "count", "ignore"] = "stop",
        nan_limit: int | None = None,
        patience_unit: Literal["checks", "epochs"] = "checks",
        start_from_epoch: int = 0,
        baseline: float | None = None,
        target: float | None = None,
        divergence: float | None = None,
        smoothing: Smoothing | None = None,
        metrics: Mapping[str, Metric | Mode] | None = None,
        weights: Mapping[str, float] | None = None,
        combine: Literal["any", "all"] = "any",
        best_by: str | None = None,
        also: Mapping[str, Stateful] | None = None,
        rng: bool = False,
        snapshot: Where = "cpu",
        restore_best: bool = True,
        folder: str | os.PathLike[str] | None = None,
        resume: bool | None = None,
        on_save_error: OnSaveError = "raise",
        agreement: Agreement = "mean",
        process_group: Any = None,
    ) -> None:
        single = Metric(mode, min_delta, delta_mode, baseline, target, divergence, smoothing)
        self._single = metrics is None and weights is None
        self._weights = check_weights(weights)
        found = check_metrics(metrics, single, self._weights is not None)
        if best_by is None:
            best_by = next(iter(found), "")
        elif metrics is None:
            raise ValueError(f"{OP}: best_by goes with metrics")
        self._rules = Rules(
            found,
            patience,
            patience_unit,
            nan=nan,
            nan_limit=nan_limit,
            start_from_epoch=start_from_epoch,
            combine=combine,
            best_by=best_by,
        )
        check_choice(agreement, ("mean", "min", "max", "rank0", "none"), f"{OP}: agreement")
        self._restore_best = restore_best
        self._entered = False
        self._loop: object = None  # identifies the loop over epochs() that is running
        self._steps = 0
        self._ended = False
        self._restored = False
        self._ranks = AgreeingRanks(agreement, process_group)
        self._state = State.initial(self._rules)
        sources = _sources(model, also, rng)
        self._model = model  # TrainingRun looks whether it is that of the run
        self._keeper = Keeper(sources, self._ranks, snapshot, folder, resume, on_save_error)
        try:
            self._resume(self._keeper.open())
        except BaseException:
            self._keeper.close()
            raise

    def _resume(self, progress: Mapping[str, Any] | None) -> None:
        """Go on from the progress in the folder, if there is any."""
        if progress is None:
            return
        try:
            self._state = self._checked(progress)
        except _Malformed as error:
            raise CheckpointError(f"{OP}: the checkpoint is damaged: {error}") from error
        self._keeper.take_over()
        if self._keeper.unfamiliar(progress.get("model")):
            warnings.warn(
                f"{OP}: the folder holds the records and the best state (of epoch "
                f"{self.best_epoch}) but not the model in training, and this model is neither the "
                f"one of the last check (of epoch {self.epoch}) nor the best one. If it is a fresh "
                "one, the old records would judge it: load the last model and optimizer first, "
                "call restore() to go on from the best, or use fusereg.TrainingRun, which saves "
                "and resumes a whole run",
                RuntimeWarning,
                stacklevel=3,
            )

    # -- results --

    @property
    def stopped(self) -> bool:
        """Return whether the last check said to stop."""
        return self._state.last is not None and self._state.last.stop

    @property
    def decision(self) -> Decision | None:
        """The decision of the last check."""
        return self._state.last

    @property
    def epoch(self) -> int | None:
        """The epoch of the last check."""
        return self._state.epoch

    @property
    def best(self) -> float | None:
        """The best metric so far (that of ``best_by``), smoothed with ``smoothing``."""
        return self._best_track(self._state).best

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best metric."""
        return self._best_track(self._state).best_epoch

    @property
    def restorable(self) -> bool:
        """Return whether :meth:`restore` would find the best state, which resuming may lose."""
        return self._keeper.restorable

    @property
    def misses(self) -> int:
        """Checks (or epochs, see ``patience_unit``) since the last improvement.

        Of several metrics, the count that decides: the least with ``combine="any"``, the most with
        ``"all"``.
        """
        counts = [track.misses for track in self._state.tracks]
        return min(counts) if self._rules.combine == "any" else max(counts)

    def _best_track(self, state: State) -> Track:
        """Return the record of the metric whose best state is kept."""
        return state.tracks[self._rules.best_index]

    def explain(self) -> str:
        """Return the last decision, and the best so far, in a sentence."""
        text = explain(self._rules, self._state, self._ended)
        return f"{text}, restored" if self._restored else text

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self._rules.patience}, {self.explain()})"

    # -- the loop --

    def step(
        self, metric: float | Tensor | Mapping[str, float | Tensor] | None, *, epoch: int
    ) -> Decision:
        """Check a metric: decide whether to stop, and keep the state if it is the best so far.

        If it says to stop a loop over :meth:`epochs` that is not in a ``with`` block, it restores
        the best state at once.

        Args:
            metric: a number or a tensor of one element, for whose device this waits; with
                ``metrics`` or ``weights`` a mapping that has all of their names (others are
                ignored).
            epoch: the epoch it belongs to, >= 0 and not before that of the last check; several
                checks may share one. Any counter that grows will do (steps, samples).

        Returns:
            The decision, the same on every rank.

        Raises:
            TypeError, ValueError: an argument is invalid, here or on another rank, or the ranks are
                at different epochs or were made with different arguments. Nothing has changed then.
            CheckpointError: a write failed and ``on_save_error`` is ``"raise"``. The decision
                counts, the snapshot in memory is the new one, the folder holds the old checkpoint.
                Or the best state could not be restored.
        """
        values, own = self._read(metric, epoch)
        if own is None:
            epoch = int(epoch)
        arguments = self._keeper.collective_arguments
        heard = self._ranks.gather(_Report(values, epoch, arguments, describe(own)))
        if not all(isinstance(report, _Report) for report in heard):
            raise ValueError(f"{OP}.step: {SAME_ARGUMENTS}")
        raise_first([report.problem for report in heard], own)
        if any(report.epoch != epoch for report in heard):
            epochs = [report.epoch for report in heard]
            raise ValueError(f"{OP}.step: the ranks are at different epochs: {epochs}")
        if any(report.arguments != heard[0].arguments for report in heard):
            raise ValueError(
                f"{OP}.step: {SAME_ARGUMENTS}, got {[report.arguments for report in heard]}"
            )
        by_metric = zip(*(report.values for report in heard), strict=True)
        reduced = [self._ranks.reduce(of_all) for of_all in by_metric]
        state, decision = self._ranks.from_first(
            lambda: advance(self._rules, self._state, reduced, epoch)
        )
        captured = None
        if decision.new_best:
            best = self._best_track(state).best
            assert best is not None
            captured = self._keeper.capture(epoch, best)
        # Only now, and both at once: after an error before this, state and snapshot still agree.
        self._state = state
        self._steps += 1
        self._ended = self._restored = False
        if captured is not None:
            self._keeper.accept(captured)
        try:
            self._keeper.write(self.state_dict(snapshot=False), decision.new_best, epoch)
        except Exception:
            self._restore_at_stop(decision)
            raise
        self._restore_at_stop(decision)
        return decision

    def _restore_at_stop(self, decision: Decision) -> None:
        """Restore the best state if a loop over ``epochs`` is to stop. All ranks must call it."""
        if not decision.stop:
            return
        wanted = self._loop is not None and not self._entered
        self._ranks.together(self.finish if wanted else lambda: None)

    def epochs(self, count: int, *, start: int | None = None) -> Iterator[int]:
        """Iterate over the epochs from ``start`` up to ``count``, until a check says to stop.

        The check that stops the loop restores the best state, and so does the end of the last
        epoch, unless a ``with`` block will do so. A loop that is left by ``break`` or an exception
        without a ``with`` block restores nothing, and warns.

        Args:
            count: the end of the range, which is not trained itself, >= 0.
            start: the first epoch; by default the one after the last check (0 in a new run).
        """
        count = check_integer(count, 0, f"{OP}: count")
        if start is None:
            start = 0 if self._state.epoch is None else self._state.epoch + 1
        start = check_integer(start, 0, f"{OP}: start")
        return self._epochs(start, count)

    def _epochs(self, start: int, count: int) -> Iterator[int]:
        """Iterate; apart from ``epochs``, whose checks must not wait for the first epoch."""
        loop = self._loop = object()
        self._ended = False
        steps, trained = self._steps, 0
        for epoch in range(start, count):
            if self.stopped:
                break
            try:
                yield epoch
            except BaseException:
                # The loop was left, now or long ago: the model is the caller's by now.
                self._leave(loop, epoch)
                raise
            trained += 1
        if self._loop is loop:
            self._loop = None
        if trained and self._steps == steps:
            warnings.warn(
                f"{OP}: the loop over epochs() has ended without a call of step(): no metric was "
                "checked, and no state kept",
                RuntimeWarning,
                stacklevel=3,
            )
        if self._entered:
            self._ended = True
        else:
            self.finish()

    def _leave(self, loop: object, epoch: int) -> None:
        """Warn if a loop was left without restoring the best state."""
        if self._loop is not loop:
            return
        self._loop, self._ended = None, True
        wanted = self._restore_best and self.restorable
        if not wanted or self._entered or self._restored or sys.is_finalizing():
            return
        warnings.warn(
            f"{OP}: the loop over epochs() was left in epoch {epoch} before its end, and the best "
            f"state (of epoch {self.best_epoch}) was not restored; call restore(), or put the loop "
            'into a block "with stopper:", which restores it however the block is left',
            RuntimeWarning,
            stacklevel=3,
        )

    def __enter__(self) -> EarlyStopping:
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._loop = None
        self.finish()

    def finish(self) -> int | None:
        """End the run: restore the best state, unless ``restore_best=False``.

        ``with`` and loops over :meth:`epochs` do so by themselves.

        Returns:
            As :meth:`restore`.
        """
        self._ended = True
        return self.restore() if self._restore_best else None

    def restore(self) -> int | None:
        """Restore the state of the best check, of model and other objects, without communication.

        Returns:
            The epoch of that check; None if there is no such state, and nothing has changed.

        Raises:
            CheckpointError: with ``snapshot="disk"``, the file is damaged.
            ValueError: the state does not fit an object. Nothing has changed then.
        """
        epoch = self._keeper.restore()
        self._restored = epoch is not None
        return epoch

    def watches(self, model: nn.Module) -> bool:
        """Return whether the model, or one that wraps it, is the one whose best state is kept."""
        own = self._model
        return isinstance(own, nn.Module) and any(m is model for m in own.modules())

    def why_not_movable(self) -> str | None:
        """Return why :meth:`move` cannot give this to another model; None if it can."""
        return self._keeper.why_not_movable()

    def move(self, model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Go on with another model in place of the present one, as with one that was compacted.

        Args:
            model: the model from now on.
            change: given the best state so far, a ``state_dict`` of the old model, it returns one
                of the new model.

        Raises:
            ValueError: states of other objects are kept as well, or they are kept in a folder.
        """
        reason = self.why_not_movable()
        if reason is not None:
            raise ValueError(f"{OP}.move: {reason}")
        self._keeper.move(model, change)

    def reset(self) -> None:
        """Forget all checks and the best state, for another run with the same arguments.

        Objects keep their state. The checkpoint in ``folder`` stays until the next save.
        """
        self._state = State.initial(self._rules)
        self._keeper.forget()
        self._loop, self._ended, self._restored = None, False, False

    # -- saving and resuming --

    def state_dict(self, *, snapshot: bool = True) -> dict[str, Any]:
        """Return all records, as plain data for ``torch.save`` and ``weights_only=True``.

        Args:
            snapshot: whether to include the best state, if it is kept in memory (without copying
                it). Needed to restore a best from before after resuming, unless it is in the
                folder that the run is resumed from.
        """
        return {
            "version": _VERSION,
            "meaning": self._meaning(),
            "state": self._state.as_dict(),
            "best": self._keeper.content() if snapshot else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned, deciding as an uninterrupted run would.

        ``patience``, ``min_delta`` and bounds may be different now; a run that stopped goes on if
        its reason to stop holds no more. What the records mean may not differ.

        Raises:
            ValueError: another version, something is missing, or metrics, modes, smoothing, weights
                or the unit of patience differ. Nothing has changed then.
        """
        state = self._checked(state_dict)
        track = self._best_track(state)
        self._keeper.load(state_dict.get("best"), track.best_epoch, track.best)
        self._state = state
        self._ended = self._restored = False

    def _meaning(self) -> dict[str, Any]:
        """Return the arguments that the meaning of the records depends on."""
        return {
            "metrics": {
                name: {"mode": metric.mode, "smoothing": repr(metric.smoothing)}
                for name, metric in self._rules.metrics.items()
            },
            "weights": self._weights,
            "patience_unit": self._rules.patience_unit,
        }

    def _checked(self, content: Mapping[str, Any]) -> State:
        """Return the records of a state_dict; raise ValueError if they do not fit this object."""
        where = f"{OP}.load_state_dict"
        check_mapping(content, f"{where}: state_dict", "as state_dict() returns it")
        if (version := content.get("version")) != _VERSION:
            raise ValueError(f"{where}: version must be {_VERSION}, got {version!r}")
        mine, theirs = self._meaning(), content.get("meaning")
        if theirs != mine:
            raise ValueError(f"{where}: the state is that of {theirs}, this one has {mine}")
        try:
            state = State.from_dict(content["state"])
        except (KeyError, TypeError, AttributeError) as error:
            raise _Malformed(f"{where}: not a whole state: {error}") from error
        wanted, found = len(self._rules.metrics), len(state.tracks)
        if found != wanted:
            raise _Malformed(f"{where}: wanted {wanted} tracks, got {found}")
        return judged_anew(self._rules, state)

    # -- reading a metric --

    def _read(self, metric: Any, epoch: Any) -> tuple[list[float], Exception | None]:
        """Return the values to judge, and the error in them, which is raised on all ranks later."""
        try:
            check_integer(epoch, 0, f"{OP}: epoch")
            if self._state.epoch is not None and epoch < self._state.epoch:
                raise ValueError(
                    f"{OP}.step: epoch must not go back: got {epoch} after {self._state.epoch}; "
                    "to train again from an earlier epoch, load the state_dict of that time"
                )
            if metric is None and self._ranks.agreement == "rank0" and self._ranks.index() > 0:
                return [math.nan] * len(self._rules.metrics), None
            return self._values(metric), None
        except Exception as problem:  # of any type: the other ranks wait to hear of it
            return [], problem

    def _values(self, metric: Any) -> list[float]:
        """Return one value for each metric that is judged."""
        if self._single:
            return [number(metric, "metric")]
        names = list(self._weights or self._rules.metrics)
        wanted = f"a mapping with {', '.join(names)}"
        check_type(metric, Mapping, f"{OP}.step: metric", wanted)
        missing = [name for name in names if name not in metric]
        if missing:
            raise ValueError(
                f"{OP}.step: metric lacks {', '.join(missing)}; it has {', '.join(metric)}"
            )
        values = {name: number(metric[name], f'metric["{name}"]') for name in names}
        if self._weights is not None:
            return [weighted_sum(self._weights, values)]
        return list(values.values())


@explains("fusereg.early_stopping.load_best")
def load_best(folder: str | os.PathLike[str]) -> Snapshot:
    """Load the best state that a run wrote to this folder, on the CPU, and check its SHA-256.

    Example:
        >>> best = fusereg.early_stopping.load_best("runs/7")
        >>> model.load_state_dict(best.states["model"])

    Raises:
        CheckpointError: there is none, or it is damaged.
        ImportError: safetensors is not installed.
    """
    found = CheckpointFolder(folder).load_best()
    if found is None:
        raise CheckpointError(f"fusereg.early_stopping.load_best: no checkpoint in {folder}")
    return found
