"""The decision to stop, as a pure function: (rules, state, values, epoch) -> (state, decision).

Nothing here knows a model, a file or another rank. All records are frozen: a check that fails half
way through, in a snapshot or a write, leaves the state of before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from .smoothing import Memory, Smoothing

Reason: TypeAlias = Literal["patience", "target", "divergence", "non_finite"]
Mode: TypeAlias = Literal["min", "max"]

_OP = "fusereg.EarlyStopping"


@dataclass(frozen=True)
class Decision:
    """What a check came to.

    Attributes:
        improved: the metric beat its reference by more than ``min_delta``, so that patience starts
            anew; of several metrics, at least one did.
        new_best: the metric is strictly better than ever before, by however little: what
            ``restore()`` goes back to.
        stop: training should end.
        reason: why: ``"patience"``, ``"target"``, ``"divergence"`` or ``"non_finite"``; None while
            training goes on. ``EarlyStopping.explain()`` says it in a sentence.
    """

    improved: bool
    new_best: bool
    stop: bool
    reason: Reason | None


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the allowed words."""
    if value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{_OP}: {name} must be one of {words}, got {value!r}")


def whole(name: str, value: object, least: int, why: str = "") -> None:
    """Raises unless the value is an integer that is not less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_OP}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{_OP}: {name} must be >= {least}, got {value}{why}")


@dataclass(frozen=True)
class Metric:
    """How one metric is judged; the arguments are those of :class:`fusereg.EarlyStopping`.

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
        choice("mode", self.mode, ("min", "max"))
        choice("delta_mode", self.delta_mode, ("absolute", "relative"))
        for name in ("min_delta", "baseline", "target", "divergence"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{_OP}: {name} must be finite, got {value}")
        if self.min_delta < 0:
            raise ValueError(f"{_OP}: min_delta must be >= 0, got {self.min_delta}")
        if (
            self.target is not None
            and self.divergence is not None
            and not self.better(self.target, self.divergence)
        ):
            raise ValueError(
                f"{_OP}: target must be better than divergence (mode {self.mode}), "
                f"got target {self.target} and divergence {self.divergence}"
            )

    def better(self, a: float, b: float) -> bool:
        """Whether a is strictly better than b."""
        return a < b if self.mode == "min" else a > b

    def improves(self, value: float, reference: float | None) -> bool:
        """Whether the value beats the reference by more than the delta."""
        if reference is None:
            return True
        delta = self.min_delta
        if self.delta_mode == "relative":
            delta *= abs(reference)  # |.|: a negative reference must not turn the delta around
        return self.better(value, reference - delta if self.mode == "min" else reference + delta)


@dataclass(frozen=True)
class Rules:
    """Everything a decision depends on, besides the metrics themselves."""

    metrics: Mapping[str, Metric]
    patience: int
    patience_unit: Literal["checks", "epochs"] = "checks"
    nan: Literal["stop", "count", "ignore"] = "stop"
    nan_limit: int | None = None
    start_from_epoch: int = 0
    combine: Literal["any", "all"] = "any"
    best_by: str = ""

    def __post_init__(self) -> None:
        whole(
            "patience",
            self.patience,
            1,
            " (patience p stops at the p-th check in a row without improvement)",
        )
        choice("patience_unit", self.patience_unit, ("checks", "epochs"))
        choice("nan", self.nan, ("stop", "count", "ignore"))
        choice("combine", self.combine, ("any", "all"))
        whole("start_from_epoch", self.start_from_epoch, 0)
        if self.nan_limit is not None:
            if self.nan != "ignore":
                raise ValueError(f'{_OP}: nan_limit goes with nan="ignore", got nan={self.nan!r}')
            whole("nan_limit", self.nan_limit, 1)
        if not self.metrics:
            raise ValueError(f"{_OP}: metrics must name at least one metric")
        choice("best_by", self.best_by, list(self.metrics))

    @property
    def ignored(self) -> int:
        """How many non-finite values in a row are ignored."""
        return self.patience if self.nan_limit is None else self.nan_limit


@dataclass(frozen=True)
class Track:
    """What is remembered of one metric. Values are smoothed ones where there is smoothing.

    Attributes:
        reference: what the next value has to beat by ``min_delta``; patience hangs on it.
        since: the epoch at which it was set; before that, the one before the first check.
        best: the best value so far; restoring hangs on it.
        best_epoch: its epoch.
        misses: checks, or epochs, since the reference was set.
        non_finite: how many values in a row, up to the last, were not finite.
        memory: of the smoothing.
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
    """What all checks so far have come to."""

    tracks: tuple[Track, ...]
    epoch: int | None = None
    checks: int = 0
    last: Decision | None = None

    @staticmethod
    def initial(rules: Rules) -> State:
        """Before the first check."""
        return State(tuple(Track(metric.baseline) for metric in rules.metrics.values()))

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        content = asdict(self)
        content["tracks"] = [
            {**track, "memory": list(track["memory"])} for track in content["tracks"]
        ]
        return content

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> State:
        """What ``as_dict`` made; KeyError or TypeError for anything else."""
        names = {field.name for field in fields(Track)}
        tracks = []
        for track in content["tracks"]:
            if set(track) != names:
                raise KeyError(f"a track has {sorted(track)}, wanted {sorted(names)}")
            tracks.append(Track(**{**track, "memory": tuple(track["memory"])}))
        last = content["last"]
        return State(
            tuple(tracks),
            content["epoch"],
            content["checks"],
            None if last is None else Decision(**last),
        )


@dataclass(frozen=True)
class _Outcome:
    track: Track
    improved: bool = False
    new_best: bool = False
    failed: bool = False
    diverged: bool = False
    reached: bool = False


def advance(
    rules: Rules, state: State, values: Sequence[float], epoch: int
) -> tuple[State, Decision]:
    """One check: the state after it, and the decision. The formula is in EarlyStopping's docs.

    Args:
        values: one for each of ``rules.metrics``, in their order; they may be non-finite.
        epoch: not less than that of the check before.
    """
    outcomes = [
        _follow(rules, metric, track, value, epoch)
        for metric, track, value in zip(rules.metrics.values(), state.tracks, values, strict=True)
    ]
    reason = _reason(rules, outcomes)
    best = outcomes[list(rules.metrics).index(rules.best_by)]
    decision = Decision(
        improved=any(outcome.improved for outcome in outcomes),
        new_best=best.new_best,
        stop=reason is not None,
        reason=reason,
    )
    tracks = tuple(outcome.track for outcome in outcomes)
    return State(tracks, epoch, state.checks + 1, decision), decision


def _follow(rules: Rules, metric: Metric, track: Track, value: float, epoch: int) -> _Outcome:
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
        failed = rules.nan == "stop" or (rules.nan == "ignore" and track.non_finite > rules.ignored)
        return _Outcome(track, failed=failed)
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
    return _Outcome(
        track,
        improved,
        new_best,
        diverged=metric.divergence is not None and metric.better(metric.divergence, value),
        reached=metric.target is not None and not metric.better(metric.target, value),
    )


def _missed(rules: Rules, track: Track, epoch: int) -> Track:
    if rules.patience_unit == "checks":
        return replace(track, misses=track.misses + 1)
    assert track.since is not None
    return replace(track, misses=epoch - track.since)


def _reason(rules: Rules, outcomes: Sequence[_Outcome]) -> Reason | None:
    if any(outcome.failed for outcome in outcomes):
        return "non_finite"
    if any(outcome.diverged for outcome in outcomes):
        return "divergence"
    with_target = [
        outcome.reached
        for outcome, metric in zip(outcomes, rules.metrics.values(), strict=True)
        if metric.target is not None
    ]
    if with_target and all(with_target):
        return "target"
    exhausted = [outcome.track.misses >= rules.patience for outcome in outcomes]
    # Training goes on while any metric (or all of them) has improved within the patience.
    if all(exhausted) if rules.combine == "any" else any(exhausted):
        return "patience"
    return None


def explain(rules: Rules, state: State) -> str:
    """The last decision in a sentence."""
    if state.last is None:
        return "no check yet"
    named = list(zip(rules.metrics.items(), state.tracks, strict=True))
    ((_, by), best) = next(item for item in named if item[0][0] == rules.best_by)
    tail = (
        f"best {rules.best_by} {best.best:g} at epoch {best.best_epoch}"
        if (best.best is not None)
        else f"no finite {rules.best_by} yet"
    )
    if best.best is not None and by.smoothing is not None:
        tail += " (smoothed)"
    head = f"goes on after epoch {state.epoch}"
    if state.last.reason == "patience":
        worn = [
            f"{name} has not improved on "
            + ("anything" if track.reference is None else f"{track.reference:g}")
            + (f" by more than {metric.min_delta:g}" if metric.min_delta else "")
            + (" (relative)" if metric.min_delta and metric.delta_mode == "relative" else "")
            + f" for {track.misses} {rules.patience_unit}"
            for (name, metric), track in named
            if track.misses >= rules.patience
        ]
        head = f"stops after epoch {state.epoch}: {' and '.join(worn)}"
    elif state.last.reason == "non_finite":
        bad = [f"{n} ({t.non_finite} in a row)" for (n, _), t in named if t.non_finite]
        head = f"stops after epoch {state.epoch}: not finite: {', '.join(bad)}"
    elif state.last.reason == "divergence":
        bounds = [f"{n} {m.divergence:g}" for (n, m), _ in named if m.divergence is not None]
        head = f"stops after epoch {state.epoch}: worse than the bound on {', '.join(bounds)}"
    elif state.last.reason == "target":
        bounds = [f"{n} {m.target:g}" for (n, m), _ in named if m.target is not None]
        head = f"stops after epoch {state.epoch}: reached the target {', '.join(bounds)}"
    return f"{head}; {tail}"
