"""The decision to stop, as a pure function: (rules, state, values, epoch) -> (state, decision).

Nothing here knows a model, a file or another rank. All records are frozen: a check that fails
halfway through, while taking a snapshot or writing a file, leaves the previous state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from ..core.arguments import check_choice, check_integer
from ..core.checks import as_number
from ..core.files import check_kinds
from ..core.hints import explains
from .checks import OP
from .smoothing import Ema, Memory, Rolling, Smoothing

Reason: TypeAlias = Literal["patience", "target", "divergence", "non_finite"]
Mode: TypeAlias = Literal["min", "max"]


@dataclass(frozen=True)
class Decision:
    """The outcome of a check.

    Attributes:
        improved: the metric beat its reference by more than ``min_delta``, so that patience starts
            anew; of several metrics, at least one did.
        new_best: the metric is strictly better than ever before, by however little; ``restore()``
            returns to the state of the last check with a new best.
        stop: training should end.
        reason: why: ``"patience"``, ``"target"``, ``"divergence"`` or ``"non_finite"``; None while
            training goes on. ``EarlyStopping.explain()`` says it in a sentence.
    """

    improved: bool
    new_best: bool
    stop: bool
    reason: Reason | None


@explains("fusereg.early_stopping.Metric")
@dataclass(frozen=True)
class Metric:
    """Rules for one metric; the arguments are those of :class:`fusereg.EarlyStopping`.

    Raises:
        ValueError: a word is unknown, a number is not finite, ``min_delta`` is negative, or
            ``target`` lies beyond ``divergence``.
    """

    mode: Mode = "min"
    min_delta: float = 0.0
    delta_mode: Literal["absolute", "relative"] = "absolute"
    baseline: float | None = None
    target: float | None = None
    divergence: float | None = None
    smoothing: Smoothing | None = None

    def __post_init__(self) -> None:
        check_choice(self.mode, ("min", "max"), f"{OP}: mode")
        check_choice(self.delta_mode, ("absolute", "relative"), f"{OP}: delta_mode")
        for name in ("min_delta", "baseline", "target", "divergence"):
            value = getattr(self, name)
            if value is None and name != "min_delta":
                continue
            if not math.isfinite(as_number(value, f"{OP}: {name}")):
                raise ValueError(f"{OP}: {name} must be finite, got {value}")
        if self.smoothing is not None and not isinstance(self.smoothing, (Ema, Rolling)):
            raise TypeError(
                f"{OP}: smoothing must be an Ema or a Rolling of fusereg.early_stopping, or None, "
                f"got {self.smoothing!r}"
            )
        if self.min_delta < 0:
            raise ValueError(f"{OP}: min_delta must be >= 0, got {self.min_delta}")
        bounds = (self.target, self.divergence)
        if None not in bounds and not self.better(*bounds):  # type: ignore[arg-type]
            raise ValueError(
                f"{OP}: target must be better than divergence (mode {self.mode}), "
                f"got target {self.target} and divergence {self.divergence}"
            )

    def better(self, a: float, b: float) -> bool:
        """Return whether a is strictly better than b."""
        return a < b if self.mode == "min" else a > b

    def improves(self, value: float, reference: float | None) -> bool:
        """Return whether the value beats the reference by more than the delta."""
        if reference is None:
            return True
        delta = self.min_delta
        if self.delta_mode == "relative":
            delta *= abs(reference)  # |.|: a negative reference must not turn the delta around
        return self.better(value, reference - delta if self.mode == "min" else reference + delta)


@dataclass(frozen=True)
class Rules:
    """Everything a decision depends on, besides the metrics' values."""

    metrics: Mapping[str, Metric]
    patience: int
    patience_unit: Literal["checks", "epochs"] = "checks"
    nan: Literal["stop", "count", "ignore"] = "stop"
    nan_limit: int | None = None
    start_from_epoch: int = 0
    combine: Literal["any", "all"] = "any"
    best_by: str = ""

    def __post_init__(self) -> None:
        why = " (patience p stops at the p-th check in a row without improvement)"
        check_integer(self.patience, 1, f"{OP}: patience", why)
        check_choice(self.patience_unit, ("checks", "epochs"), f"{OP}: patience_unit")
        check_choice(self.nan, ("stop", "count", "ignore"), f"{OP}: nan")
        check_choice(self.combine, ("any", "all"), f"{OP}: combine")
        check_integer(self.start_from_epoch, 0, f"{OP}: start_from_epoch")
        if self.nan_limit is not None:
            if self.nan != "ignore":
                raise ValueError(f'{OP}: nan_limit goes with nan="ignore", got nan={self.nan!r}')
            check_integer(self.nan_limit, 1, f"{OP}: nan_limit")
        if not self.metrics:
            raise ValueError(f"{OP}: metrics must name at least one metric")
        check_choice(self.best_by, list(self.metrics), f"{OP}: best_by")

    @property
    def best_index(self) -> int:
        """The position of the metric whose best state is kept."""
        return list(self.metrics).index(self.best_by)


@dataclass(frozen=True)
class Track:
    """The record of one metric. With smoothing, its values are the smoothed ones.

    Attributes:
        reference: the value that the next one has to beat by ``min_delta`` to reset patience.
        since: the epoch at which it was set; before that, the one before the first check.
        best: the best value so far.
        best_epoch: the epoch of the best value.
        misses: checks, or epochs, since the reference was set.
        non_finite: how many values in a row, up to the last, were not finite.
        memory: the smoothing's memory.
    """

    reference: float | None
    since: int | None = None
    best: float | None = None
    best_epoch: int | None = None
    misses: int = 0
    non_finite: int = 0
    memory: Memory = ()


@dataclass(frozen=True)
class State:
    """The record of all checks so far."""

    tracks: tuple[Track, ...]
    epoch: int | None = None
    checks: int = 0
    last: Decision | None = None

    @staticmethod
    def initial(rules: Rules) -> State:
        """Return the state before the first check."""
        return State(tuple(Track(metric.baseline) for metric in rules.metrics.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts, lists and numbers."""
        tracks = [{**asdict(track), "memory": list(track.memory)} for track in self.tracks]
        return {**asdict(self), "tracks": tracks}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> State:
        """Rebuild the state that ``as_dict`` described; KeyError or TypeError for anything else."""
        for track in content["tracks"]:
            if set(track) != set(_TRACK):
                raise KeyError(f"a track has {sorted(track)}, wanted {sorted(_TRACK)}")
            check_kinds(track, _TRACK)
            for number in track["memory"]:
                check_kinds({"memory": number}, {"memory": (int, float)})
        tracks = [Track(**{**t, "memory": tuple(t["memory"])}) for t in content["tracks"]]
        last = None if content["last"] is None else Decision(**content["last"])
        if last is not None:
            check_kinds(content["last"], dict.fromkeys(("improved", "new_best", "stop"), (bool,)))
            if last.reason not in (None, *get_args(Reason)) or last.stop != (
                last.reason is not None
            ):
                raise TypeError(f"the reason is {last.reason!r}")
        check_kinds(content, {"epoch": (int, type(None)), "checks": (int,)})
        return State(tuple(tracks), content["epoch"], content["checks"], last)


_NUMBER, _EPOCH = (int, float, type(None)), (int, type(None))
#: The types of a record's fields.
_TRACK: dict[str, tuple[type, ...]] = {
    "reference": _NUMBER,
    "best": _NUMBER,
    "since": _EPOCH,
    "best_epoch": _EPOCH,
    "misses": (int,),
    "non_finite": (int,),
    "memory": (list, tuple),
}


def judged_anew(rules: Rules, state: State) -> State:
    """Return the state of a resumed run, which goes on if its reason to stop holds no more.

    Patience and bounds may be others than when it stopped.
    """
    if state.last is None or not state.last.stop:
        return state
    tracks, metrics = state.tracks, rules.metrics.values()
    named = list(zip(metrics, tracks, strict=True))
    holds = True
    if state.last.reason == "patience":
        holds = _exhausted(rules, [track.misses for track in tracks])
    elif state.last.reason == "non_finite":
        holds = any(_failed(rules, track) for track in tracks if track.non_finite)
    elif state.last.reason == "target":
        aims = [(m, m.target, t.best) for m, t in named if m.target is not None]
        reached = [best is not None and not m.better(aim, best) for m, aim, best in aims]
        holds = bool(reached) and all(reached)
    elif state.last.reason == "divergence":
        holds = any(metric.divergence is not None for metric in metrics)
    if holds:
        return state
    return replace(state, last=replace(state.last, stop=False, reason=None))


class _Outcome(NamedTuple):
    """The result of one metric's check: its new record, and what was found."""

    track: Track
    improved: bool = False
    new_best: bool = False
    failed: bool = False
    diverged: bool = False
    reached: bool = False


def advance(
    rules: Rules, state: State, values: Sequence[float], epoch: int
) -> tuple[State, Decision]:
    """Return the state after one more check, and the decision; EarlyStopping has the formula.

    Args:
        rules: what the decision depends on.
        state: the state after the check before.
        values: one for each of ``rules.metrics``, in their order; they may be non-finite.
        epoch: not less than that of the check before.
    """
    outcomes = [
        _check_metric(rules, metric, track, value, epoch)
        for metric, track, value in zip(rules.metrics.values(), state.tracks, values, strict=True)
    ]
    reason = _reason(rules, outcomes)
    improved = any(outcome.improved for outcome in outcomes)
    new_best = outcomes[rules.best_index].new_best
    decision = Decision(improved, new_best, reason is not None, reason)
    tracks = tuple(outcome.track for outcome in outcomes)
    return State(tracks, epoch, state.checks + 1, decision), decision


def _check_metric(rules: Rules, metric: Metric, track: Track, value: float, epoch: int) -> _Outcome:
    """Judge one metric's value and update its record."""
    counted = epoch >= rules.start_from_epoch
    if counted and track.since is None:
        track = replace(track, since=epoch - 1)
    memory = track.memory
    if metric.smoothing is not None and math.isfinite(value):
        memory, value = metric.smoothing.update(memory, value)
    if not math.isfinite(value):
        track = replace(track, non_finite=track.non_finite + 1)
        if rules.nan == "count" and counted:
            track = _missed(rules, track, epoch)
        return _Outcome(track, failed=_failed(rules, track))
    track = replace(track, memory=memory, non_finite=0)
    if not counted:
        return _Outcome(track)
    new_best = track.best is None or metric.better(value, track.best)
    if new_best:
        track = replace(track, best=value, best_epoch=epoch)
    improved = metric.improves(value, track.reference)
    if improved:
        track = replace(track, reference=value, since=epoch, misses=0)
    else:
        track = _missed(rules, track, epoch)
    diverged = metric.divergence is not None and metric.better(metric.divergence, value)
    reached = metric.target is not None and not metric.better(metric.target, value)
    return _Outcome(track, improved, new_best, diverged=diverged, reached=reached)


def _missed(rules: Rules, track: Track, epoch: int) -> Track:
    """Count a check without improvement."""
    if rules.patience_unit == "checks":
        return replace(track, misses=track.misses + 1)
    assert track.since is not None
    return replace(track, misses=epoch - track.since)


def _reason(rules: Rules, outcomes: Sequence[_Outcome]) -> Reason | None:
    """Return the first reason to stop that holds, if any."""
    if any(outcome.failed for outcome in outcomes):
        return "non_finite"
    if any(outcome.diverged for outcome in outcomes):
        return "divergence"
    judged = zip(outcomes, rules.metrics.values(), strict=True)
    reached = [outcome.reached for outcome, metric in judged if metric.target is not None]
    if reached and all(reached):
        return "target"
    worn = _exhausted(rules, [outcome.track.misses for outcome in outcomes])
    return "patience" if worn else None


def _exhausted(rules: Rules, misses: Sequence[int]) -> bool:
    """Return whether no metric, or not all of them, has improved within the patience."""
    return (all if rules.combine == "any" else any)(count >= rules.patience for count in misses)


def _failed(rules: Rules, track: Track) -> bool:
    """Return whether the non-finite values so far are a reason to stop."""
    limit = rules.patience if rules.nan_limit is None else rules.nan_limit
    return rules.nan == "stop" or (rules.nan == "ignore" and track.non_finite > limit)


def explain(rules: Rules, state: State, ended: bool = False) -> str:
    """Describe the last decision, and the best so far, in a sentence.

    ``ended``: training has ended, whether or not a check said so.
    """
    if state.last is None:
        return "no check yet"
    best = state.tracks[rules.best_index]
    tail = f"no finite {rules.best_by} yet"
    if best.best is not None:
        tail = f"best {rules.best_by} {best.best:g} at epoch {best.best_epoch}"
        if rules.metrics[rules.best_by].smoothing is not None:
            tail += " (smoothed)"
    reason, named = state.last.reason, rules.metrics.items()
    if reason is None and ended:
        return f"ended after epoch {state.epoch} without a reason to stop; {tail}"
    if reason is None:
        return f"goes on after epoch {state.epoch}; {tail}"
    if reason == "patience":
        worn = [
            _without_improvement(rules, name, metric, track)
            for (name, metric), track in zip(named, state.tracks, strict=True)
            if track.misses >= rules.patience
        ]
        why = " and ".join(worn)
    elif reason == "non_finite":
        counts = zip(rules.metrics, state.tracks, strict=True)
        bad = [f"{name} ({t.non_finite} in a row)" for name, t in counts if t.non_finite]
        why = f"not finite: {', '.join(bad)}"
    else:
        bounds = [(name, getattr(metric, reason)) for name, metric in named]
        found = ", ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)
        why = f"worse than the bound on {found}"
        if reason == "target":
            why = f"reached the target {found}"
    return f"stops after epoch {state.epoch}: {why}; {tail}"


def _without_improvement(rules: Rules, name: str, metric: Metric, track: Track) -> str:
    """Describe how long a metric has not improved."""
    reference = "anything" if track.reference is None else f"{track.reference:g}"
    delta = f" by more than {metric.min_delta:g}" if metric.min_delta else ""
    relative = " (relative)" if delta and metric.delta_mode == "relative" else ""
    unit = rules.patience_unit if track.misses != 1 else rules.patience_unit.removesuffix("s")
    return f"{name} has not improved on {reference}{delta}{relative} for {track.misses} {unit}"
