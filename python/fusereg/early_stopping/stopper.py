"""EarlyStopping: the decision, the snapshots, the files and the ranks in one object."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from .agreement import Agreement, Ranks, raise_first, told
from .checkpoint import CheckpointError, CheckpointFolder
from .decision import Decision, Metric, Mode, Rules, State, advance, choice, explain, whole
from .keeper import Keeper, OnSaveError, Where
from .metrics import check_metrics, check_weights, number, weighted_sum
from .smoothing import Smoothing
from .snapshot import Snapshot, Sources, Stateful

_OP = "fusereg.EarlyStopping"
_VERSION = 1


class EarlyStopping:
    r"""Ends training when a validation metric stops improving, and brings the best model back.

    Two records are kept of the metric :math:`m_t` (the smoothed one, where ``smoothing`` is given),
    and they have different work. For ``mode="min"``:

    .. math::
        \text{improved}_t &:\; m_t < ref - \delta, \quad
            \delta = min\_delta \text{ or } min\_delta \cdot |ref| \\
        \text{new best}_t &:\; m_t < best

    ``improved`` sets ref to :math:`m_t` and patience anew; anything else is a miss, and with the
    ``patience``-th miss in a row training stops. ``new_best`` sets best to :math:`m_t`, takes a
    snapshot and writes the checkpoint. So gains that are too small to matter do not prolong
    training, unless they add up, and the best model is still the best one. ``mode="max"`` mirrors
    both. The reasons to stop, the first one that holds: ``"non_finite"`` (by ``nan``),
    ``"divergence"`` (:math:`m_t > divergence`), ``"target"`` (:math:`m_t \le target`),
    ``"patience"``.

    The model is brought back to the best check on every way out: at the end of ``epochs()`` or of
    the ``with`` block, by stopping, by the last epoch, by ``break``, by an exception, by Ctrl-C.
    ``with`` does so whatever happens; a plain ``for epoch in stopper.epochs(n)`` when the loop is
    left. Without a finite metric so far the model stays as it is.

    Args:
        model: the module to keep the best state of: parameters and buffers (those that are not
            persistent too), tied ones once. None: only decide.
        patience: p >= 1: training stops at the p-th check in a row without improvement.
        mode: ``"min"`` or ``"max"``: what is better.
        min_delta: by how much a value has to beat the reference to count as improved, >= 0, in the
            metric's unit or, with ``delta_mode="relative"``, as a share of the reference's size
            (0.01: one percent; also right for negative metrics).
        delta_mode: ``"absolute"`` or ``"relative"``.
        nan: what a metric that is NaN or infinite means: ``"stop"`` at once, ``"count"`` as a miss,
            ``"ignore"``: no miss, but more than ``nan_limit`` in a row stop training. It never
            becomes reference or best, and no smoothing sees it.
        nan_limit: for ``nan="ignore"``, >= 1; ``patience`` if not given.
        patience_unit: ``"checks"``: calls of :meth:`step`; ``"epochs"``: epochs since the last
            improvement (before the first: since the epoch before the first check), for those who do
            not check in each epoch. Then a miss stops if at least ``patience`` epochs have passed.
        start_from_epoch: checks of earlier epochs feed the smoothing and watch for non-finite
            values, and do nothing else: no miss, no best, no target, no divergence.
        baseline: the first reference: until a check beats it by ``min_delta``, all are misses.
        target: training stops when the metric is at least as good.
        divergence: training stops when the metric is worse.
        smoothing: :class:`fusereg.early_stopping.Ema` or ``Rolling``; everything is judged by the
            smoothed metric then, the best too.
        metrics: several metrics by name, each ``"min"``, ``"max"`` or a
            :class:`fusereg.early_stopping.Metric` with arguments of its own; :meth:`step` takes a
            mapping then. Takes the place of the single-metric arguments above.
        weights: several metrics by name, each with its weight: the sum of weight times metric is
            judged as a single one (give metrics that count the other way a negative weight).
        combine: with ``metrics``, ``"any"``: training goes on while any of them has improved within
            the patience; ``"all"``: while each has. Targets stop when every metric that has one has
            reached it at the same check; divergence and non-finite values of one are enough.
        best_by: with ``metrics``, the one whose best state is kept; the first if not given.
        also: further objects with ``state_dict`` and ``load_state_dict`` (optimizer, scheduler,
            scaler, averaged model) by name, kept and restored with the model.
        rng: whether to keep and restore torch's random generators too.
        snapshot: where the best state is kept: ``"cpu"`` memory, the tensors' own ``"device"``,
            ``"disk"`` (in ``folder`` only), ``"none"``.
        restore_best: whether leaving ``epochs()`` or ``with`` calls :meth:`restore`.
        folder: where to write checkpoints, or None. One run writes to it; it must be visible to
            every rank, and rank 0 writes. The best state goes to a safetensors file; progress, with
            that file's SHA-256, to ``early_stopping.json`` at each check. Each write is atomic: a
            process that dies at any moment leaves the old checkpoint or the new one, whole.
            Parameters that are sharded over ranks (DTensor, FSDP2) are gathered and written as
            whole tensors, for which rank 0 has memory to hold; any number of ranks, or one process
            without sharding, can go on from them.
        resume: if the folder holds a checkpoint: True goes on from it (and starts anew where there
            is none), False starts anew, and the old one stays until the first save; None is an
            error.
        on_save_error: ``"raise"``, or ``"warn"`` and train on; the next check tries again. The last
            checkpoint stays whole either way.
        agreement: with torch.distributed, how the ranks' metrics become one: their ``"mean"``,
            ``"min"``, ``"max"``, or that of ``"rank0"`` (others may pass None); then rank 0 decides
            for all, and each rank must call :meth:`step` at each check. A metric that is not finite
            on one rank is not finite. ``"none"``: each rank decides alone, without a folder.
        process_group: the ranks that decide together; None: all.

    Raises:
        TypeError, ValueError: an argument is not as described, or ``folder`` holds a checkpoint and
            ``resume`` is not given.
        ImportError: ``folder`` is given and safetensors is not installed
            (``pip install "fusereg[checkpoints]"``).
        CheckpointError: ``folder`` cannot be written to, or its checkpoint is damaged.

    Example:
        >>> stopper = fusereg.EarlyStopping(model, patience=5)
        >>> for epoch in stopper.epochs(100):
        ...     train(model)
        ...     stopper.step(validate(model), epoch=epoch)
        >>> stopper.best_epoch, stopper.explain()

    Paper:
        L. Prechelt, "Early Stopping - But When?", in: Neural Networks: Tricks of the Trade, 1998.
    """

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
        found = check_metrics(metrics, single, self._weights)
        if best_by is not None and metrics is None:
            raise ValueError(f"{_OP}: best_by goes with metrics")
        self._rules = Rules(
            found,
            patience,
            patience_unit,
            nan,
            nan_limit,
            start_from_epoch,
            combine,
            next(iter(found), "") if best_by is None else best_by,
        )
        choice("agreement", agreement, ("mean", "min", "max", "rank0", "none"))
        self._restore_best = restore_best
        self._entered = False
        self._ranks = Ranks(agreement, process_group)
        self._state = State.initial(self._rules)
        sources = Sources(model, also, rng)
        self._keeper = Keeper(sources, self._ranks, snapshot, folder, resume, on_save_error)
        progress = self._keeper.open()
        if progress is not None:
            self._state = self._checked(progress)
            self._keeper.take_over()

    # -- what there is to know --

    @property
    def stopped(self) -> bool:
        """Whether the last check said to stop."""
        return self._state.last is not None and self._state.last.stop

    @property
    def decision(self) -> Decision | None:
        """The last check's."""
        return self._state.last

    @property
    def epoch(self) -> int | None:
        """Of the last check."""
        return self._state.epoch

    @property
    def best(self) -> float | None:
        """The best metric so far (that of ``best_by``), smoothed where there is smoothing."""
        return self._state.tracks[self._best_index].best

    @property
    def best_epoch(self) -> int | None:
        """Its epoch."""
        return self._state.tracks[self._best_index].best_epoch

    @property
    def restorable(self) -> bool:
        """Whether :meth:`restore` would find the best state; after resuming it may be lost."""
        return self._keeper.restorable

    @property
    def misses(self) -> int:
        """Checks (or epochs, by ``patience_unit``) since the last improvement.

        Of several metrics, that of the one that decides: the least with ``combine="any"``, the most
        with ``"all"``.
        """
        counts = [track.misses for track in self._state.tracks]
        return min(counts) if self._rules.combine == "any" else max(counts)

    @property
    def _best_index(self) -> int:
        return list(self._rules.metrics).index(self._rules.best_by)

    def explain(self) -> str:
        """The last decision in a sentence, with the best so far."""
        return explain(self._rules, self._state)

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self._rules.patience}, {self.explain()})"

    # -- the loop --

    def step(
        self, metric: float | Tensor | Mapping[str, float | Tensor] | None, *, epoch: int
    ) -> Decision:
        """One check: takes the metric, decides, keeps the state if it is the best so far.

        Args:
            metric: a number or a tensor of one element; with ``metrics`` or ``weights`` a mapping
                that has all of their names (others are ignored).
            epoch: the epoch it belongs to, >= 0 and not before that of the last check; several
                checks may share one. Any counter that grows will do (steps, samples).

        Returns:
            The decision, the same on every rank.

        Raises:
            TypeError, ValueError: an argument is not as described, here or on another rank, or the
                ranks are at different epochs or were made with different arguments. Nothing has
                changed then.
            CheckpointError: a write failed and ``on_save_error`` is ``"raise"``. The decision
                counts, the snapshot in memory is the new one, the folder holds the old checkpoint.
        """
        values, own = self._read(metric, epoch)
        heard = self._ranks.gather((values, epoch, self._keeper.meetings, told(own)))
        raise_first([problem for _, _, _, problem in heard], own)
        epochs = [other for _, other, _, _ in heard]
        if any(other != epoch for other in epochs):
            raise ValueError(f"{_OP}.step: the ranks are at different epochs: {epochs}")
        meetings = [other for _, _, other, _ in heard]
        if any(other != meetings[0] for other in meetings):
            raise ValueError(
                f"{_OP}.step: the ranks must have the same arguments (rank 0 alone writes to "
                f"folder, but all must be given it), got {meetings}"
            )
        by_metric = zip(*(theirs for theirs, _, _, _ in heard), strict=True)
        reduced = [self._ranks.reduce(of_all) for of_all in by_metric]
        state, decision = self._ranks.from_first(
            lambda: advance(self._rules, self._state, reduced, epoch)
        )
        captured = None
        if decision.new_best:
            track = state.tracks[self._best_index]
            assert track.best is not None
            captured = self._keeper.capture(epoch, track.best)
        # Together, and only now: whatever goes wrong before leaves record and snapshot in step.
        self._state = state
        self._keeper.accept(captured)
        self._keeper.write(self.state_dict(snapshot=False), epoch)
        return decision

    def epochs(self, count: int, *, start: int | None = None) -> Iterator[int]:
        """The epochs to train: from ``start`` up to ``count``, until a check says to stop.

        When the loop is left, and no ``with`` block does so, the best state is restored.

        Args:
            count: the epoch that is not reached any more, >= 0.
            start: the first one; by default the one after the last check (0 in a new run).
        """
        whole("count", count, 0)
        if start is None:
            start = 0 if self._state.epoch is None else self._state.epoch + 1
        whole("start", start, 0)
        return self._epochs(start, count)

    def _epochs(self, start: int, count: int) -> Iterator[int]:
        try:
            for epoch in range(start, count):
                if self.stopped:
                    return
                yield epoch
        finally:
            if self._restore_best and not self._entered:
                self.restore()

    def __enter__(self) -> EarlyStopping:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        if self._restore_best:
            self.restore()

    def restore(self) -> int | None:
        """Brings model and companions to the state of the best check. No rank waits for another.

        Returns:
            The epoch of that check; None if there is no such state, and nothing has changed.

        Raises:
            CheckpointError: with ``snapshot="disk"``, the file is damaged.
        """
        return self._keeper.restore()

    # -- going on later --

    def state_dict(self, *, snapshot: bool = True) -> dict[str, Any]:
        """All records, as plain data that ``torch.save`` and ``weights_only=True`` take.

        Args:
            snapshot: whether the best state, where it is kept in memory, is part of it (without
                copying). Needed to restore, after resuming, a best from before, unless it is in
                the folder that the run is resumed from.
        """
        return {
            "version": _VERSION,
            "meaning": self._meaning(),
            "state": self._state.as_dict(),
            "best": self._keeper.content() if snapshot else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave; the decisions are those of an unbroken run.

        ``patience``, ``min_delta`` and bounds may differ from then; what the records mean may not.

        Raises:
            ValueError: another version, something is missing, or metrics, modes, smoothing, weights
                or the unit of patience differ. Nothing has changed then.
        """
        state = self._checked(state_dict)
        track = state.tracks[self._best_index]
        self._keeper.load(state_dict.get("best"), track.best_epoch, track.best)
        self._state = state

    def _meaning(self) -> dict[str, Any]:
        """What the records of a run depend on."""
        return {
            "metrics": {
                name: {"mode": metric.mode, "smoothing": repr(metric.smoothing)}
                for name, metric in self._rules.metrics.items()
            },
            "weights": self._weights,
            "patience_unit": self._rules.patience_unit,
        }

    def _checked(self, content: Mapping[str, Any]) -> State:
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{_OP}.load_state_dict: version must be {_VERSION}, got {content.get('version')!r}"
            )
        mine, theirs = self._meaning(), content.get("meaning")
        if theirs != mine:
            raise ValueError(
                f"{_OP}.load_state_dict: the state is that of {theirs}, this one has {mine}"
            )
        try:
            state = State.from_dict(content["state"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{_OP}.load_state_dict: not a whole state: {error}") from error
        if len(state.tracks) != len(self._rules.metrics):
            raise ValueError(
                f"{_OP}.load_state_dict: wanted {len(self._rules.metrics)} tracks, "
                f"got {len(state.tracks)}"
            )
        return state

    # -- reading a metric --

    def _read(self, metric: Any, epoch: Any) -> tuple[list[float], Exception | None]:
        """The values to judge, or what is wrong with them: raised after the ranks have met."""
        try:
            whole("epoch", epoch, 0)
            if self._state.epoch is not None and epoch < self._state.epoch:
                raise ValueError(
                    f"{_OP}.step: epoch must not go back: got {epoch} after {self._state.epoch}; "
                    "to train again from an earlier epoch, load the state_dict of that time"
                )
            if metric is None and self._ranks.agreement == "rank0" and self._ranks.index() > 0:
                return [math.nan] * len(self._rules.metrics), None
            return self._values(metric), None
        except Exception as problem:  # whatever it is, the other ranks wait to hear of it
            return [], problem

    def _values(self, metric: Any) -> list[float]:
        if self._single:
            return [number(metric, "metric")]
        names = list(self._weights or self._rules.metrics)
        if not isinstance(metric, Mapping):
            raise TypeError(
                f"{_OP}.step: metric must be a mapping with {', '.join(names)}, "
                f"got {type(metric).__name__}"
            )
        missing = [name for name in names if name not in metric]
        if missing:
            raise ValueError(
                f"{_OP}.step: metric lacks {', '.join(missing)}; it has {', '.join(metric)}"
            )
        values = [number(metric[name], f'metric["{name}"]') for name in names]
        if self._weights is None:
            return values
        return [weighted_sum(list(self._weights.values()), values)]


def load_best(folder: str | os.PathLike[str]) -> Snapshot:
    """The best state that a run wrote to this folder, on the CPU; its SHA-256 is checked.

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
