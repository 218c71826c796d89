"""Early stopping: decisions on random metrics, against a reference and by their properties.

The oracle restates the rules over the whole history, where the state machine goes step by step.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_stopping_runs import run
from fusereg import EarlyStopping
from fusereg.early_stopping import Ema, Rolling

NAN, INF = math.nan, math.inf

VALUES = st.lists(
    st.one_of(
        st.integers(-6, 6).map(float),
        st.floats(-1e300, 1e300),
        st.sampled_from([NAN, INF, -INF]),
    ),
    max_size=30,
)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    made: dict[str, Any] = {
        "patience": draw(st.integers(1, 4)),
        "mode": draw(st.sampled_from(["min", "max"])),
        "min_delta": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "delta_mode": draw(st.sampled_from(["absolute", "relative"])),
        "nan": draw(st.sampled_from(["stop", "count", "ignore"])),
        "start_from_epoch": draw(st.sampled_from([0, 0, 2])),
        "baseline": draw(st.sampled_from([None, None, 2.0])),
    }
    if made["nan"] == "ignore":
        made["nan_limit"] = draw(st.sampled_from([None, 1, 2]))
    sign = 1 if made["mode"] == "min" else -1
    made["target"] = draw(st.sampled_from([None, None, -5.0 * sign]))
    made["divergence"] = draw(st.sampled_from([None, None, 5.0 * sign]))
    return made


def oracle(o: dict[str, Any], values: list[float]) -> tuple[bool, bool, str | None]:
    """Return (improved, new best, reason) for the last value of a history."""
    sign = 1 if o["mode"] == "min" else -1
    counted = [(e, sign * v) for e, v in enumerate(values) if e >= o["start_from_epoch"]]
    finite = [(e, v) for e, v in counted if math.isfinite(v)]
    gains = []  # (epoch, value) of improvements: they are the references
    reference = None if o["baseline"] is None else sign * o["baseline"]
    for epoch, v in finite:
        margin = o["min_delta"]
        if reference is not None and o["delta_mode"] == "relative":
            margin = margin * abs(reference)
        if reference is None or v < reference - margin:
            gains.append(epoch)
            reference = v
    since = [(e, v) for e, v in counted if not gains or e > gains[-1]]
    misses = sum(o["nan"] == "count" or math.isfinite(v) for _, v in since)
    last, now = sign * values[-1], len(values) - 1
    improved = bool(gains) and gains[-1] == now
    new_best = bool(finite) and finite[-1][0] == now and all(last < v for _, v in finite[:-1])
    tail = 0
    while tail < len(values) and not math.isfinite(values[-1 - tail]):
        tail += 1
    limit = o.get("nan_limit") or o["patience"]
    reason = None
    if misses >= o["patience"]:
        reason = "patience"
    if finite and finite[-1][0] == now:
        if o["target"] is not None and last <= sign * o["target"]:
            reason = "target"
        if o["divergence"] is not None and last > sign * o["divergence"]:
            reason = "divergence"
    if (tail and o["nan"] == "stop") or (o["nan"] == "ignore" and tail > limit):
        reason = "non_finite"
    return improved, new_best, reason


@given(options(), VALUES)
def test_every_decision_is_the_oracles(o: dict[str, Any], values: list[float]) -> None:
    """Decisions are right after a stop too, for callers that go on nevertheless."""
    stopper = EarlyStopping(**o)
    for epoch, value in enumerate(values):
        decision = stopper.step(value, epoch=epoch)
        improved, new_best, reason = oracle(o, values[: epoch + 1])
        assert (decision.improved, decision.new_best, decision.reason) == (
            improved,
            new_best,
            reason,
        )
        assert decision.stop == (reason is not None)
        assert not (improved and not new_best and o["baseline"] is None)


@given(options(), VALUES)
def test_the_best_is_the_best_and_patience_is_never_exceeded(
    o: dict[str, Any], values: list[float]
) -> None:
    stopper = EarlyStopping(**o)
    made = run(stopper, values)
    counted = {
        e: v
        for e, v in enumerate(values[: len(made)])
        if math.isfinite(v) and e >= o["start_from_epoch"]
    }
    if counted:
        wanted = (min if o["mode"] == "min" else max)(counted.values())
        assert stopper.best == wanted
        assert stopper.best_epoch == next(e for e, v in counted.items() if v == wanted)
    else:
        assert stopper.best is None
        assert stopper.best_epoch is None
    assert stopper.misses <= o["patience"]


@given(options(), VALUES, st.data())
def test_a_resumed_run_decides_as_the_unbroken_one(
    o: dict[str, Any], values: list[float], data: st.DataObject
) -> None:
    o["smoothing"] = data.draw(
        st.sampled_from([None, Ema(0.7), Rolling(3), Rolling(4, "median")]), "smoothing"
    )
    unit = data.draw(st.sampled_from(["checks", "epochs"]), "unit")
    cut = data.draw(st.integers(0, len(values)), "cut")
    whole, before = (EarlyStopping(**o, patience_unit=unit) for _ in range(2))
    wanted = [whole.step(v, epoch=e) for e, v in enumerate(values)]
    made = [before.step(v, epoch=e) for e, v in enumerate(values[:cut])]
    state = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    after = EarlyStopping(**o, patience_unit=unit)
    after.load_state_dict(state)
    assert (after.best, after.best_epoch, after.stopped) == (
        before.best,
        before.best_epoch,
        before.stopped,
    )
    made += [after.step(v, epoch=e) for e, v in enumerate(values[cut:], cut)]
    assert made == wanted
    assert after.state_dict() == whole.state_dict()


@given(options(), VALUES)
def test_max_is_the_mirror_of_min(o: dict[str, Any], values: list[float]) -> None:
    mirrored = {**o, "mode": "max" if o["mode"] == "min" else "min"}
    for name in ("baseline", "target", "divergence"):
        mirrored[name] = None if o[name] is None else -o[name]
    assert run(EarlyStopping(**o), values) == run(EarlyStopping(**mirrored), [-v for v in values])


@given(options(), VALUES)
def test_ignored_values_leave_no_trace(o: dict[str, Any], values: list[float]) -> None:
    ignoring = {**o, "nan": "ignore", "nan_limit": len(values) + 1, "start_from_epoch": 0}
    a, b = EarlyStopping(**ignoring), EarlyStopping(**ignoring)
    finite = [v for v in values if math.isfinite(v)]
    with_nan = [a.step(v, epoch=e) for e, v in enumerate(values)]
    without = [b.step(v, epoch=e) for e, v in enumerate(finite)]
    assert [d for d, v in zip(with_nan, values, strict=True) if math.isfinite(v)] == without
    assert not any(
        d.improved or d.new_best
        for d, v in zip(with_nan, values, strict=True)
        if not math.isfinite(v)
    )
    assert a.best == b.best


@given(VALUES, st.integers(1, 4), st.sampled_from([0.01, 0.25]), st.integers(-20, 20))
def test_a_relative_delta_does_not_depend_on_the_unit(
    values: list[float], patience: int, delta: float, exponent: int
) -> None:
    values = [v for v in values if v == 0 or 1e-200 < abs(v) < 1e200]
    scaled = [math.ldexp(v, exponent) for v in values]
    made = [
        run(EarlyStopping(patience=patience, min_delta=delta, delta_mode="relative"), some)
        for some in (values, scaled)
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("values", "before", "goes_on", "stays"),
    [
        ([3, 4], {"divergence": 3.5}, {"divergence": None}, {"divergence": 3.0}),
        ([3, 1], {"target": 1.0}, {"target": 0.5}, {"target": 1.5}),
        ([3, NAN], {"nan": "stop"}, {"nan": "ignore"}, {"nan": "stop"}),
        (
            [3, NAN, NAN],
            {"nan": "ignore", "nan_limit": 1},
            {"nan": "ignore", "nan_limit": 2},
            {"nan": "ignore", "nan_limit": 1},
        ),
    ],
)
def test_a_run_that_stopped_goes_on_if_its_reason_holds_no_more(
    values: list[float], before: dict[str, Any], goes_on: dict[str, Any], stays: dict[str, Any]
) -> None:
    first = EarlyStopping(patience=9, **before)
    run(first, values)
    assert first.stopped
    for options, stopped in ((goes_on, False), (stays, True)):
        second = EarlyStopping(patience=9, **options)
        second.load_state_dict(first.state_dict())
        assert second.stopped == stopped
