"""Early stopping: the decisions for tables of metrics, and invalid arguments."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusereg
from early_stopping_runs import run
from fusereg import EarlyStopping
from fusereg.early_stopping import Decision, Ema, Metric, Rolling

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]
    values: list[Any]
    stop: int | None  # the epoch at which it stops
    reason: str | None
    best: int | None  # the epoch that would be restored
    improved: list[int] | None = field(default=None)


FOREVER = [0.5] * 20
CASES = [
    Case("falls for ever", {"patience": 1}, [5, 4, 3, 2, 1], None, None, 4, [0, 1, 2, 3, 4]),
    Case("stops at the p-th miss", {"patience": 3}, [1, 2, 2, 2, 0], 3, "patience", 0, [0]),
    Case("patience 1: at the first", {"patience": 1}, [1, 1, 0], 1, "patience", 0),
    Case("equal is no improvement", {"patience": 2}, [1, 1, 1], 2, "patience", 0, [0]),
    Case("a gain sets patience anew", {"patience": 2}, [3, 4, 2, 3, 3], 4, "patience", 2, [0, 2]),
    Case("max", {"patience": 2, "mode": "max"}, [1, 3, 2, 2, 9], 3, "patience", 1, [0, 1]),
    # Keras, min_delta 0.1, keeps one record for both: it restores epoch 0. The last is the best
    # model there is, though its gain is too small to prolong training.
    Case(
        "keras: two records", {"patience": 2, "min_delta": 0.1}, [1, 0.95, 0.93], 2, "patience", 2
    ),
    # Small gains add up against the reference, which stays where it was set.
    Case(
        "many small gains",
        {"patience": 3, "min_delta": 0.1},
        [1, 0.95, 0.89, 0.85, 0.78],
        None,
        None,
        4,
        [0, 2, 4],
    ),
    # Keras takes a NaN in the first epoch for the best, beats it never, stops at epoch 3 and
    # restores the NaN epoch. A NaN is neither reference nor best.
    Case(
        "keras: NaN first, ignored",
        {"patience": 3, "nan": "ignore"},
        [NAN, 1, 0.9, 0.8, 0.7],
        None,
        None,
        4,
        [1, 2, 3, 4],
    ),
    Case(
        "keras: NaN first, counted",
        {"patience": 3, "nan": "count"},
        [NAN, 1, 0.9, 0.8, 0.7],
        None,
        None,
        4,
    ),
    Case("NaN stops by default", {"patience": 3}, [1, NAN, 0], 1, "non_finite", 0),
    Case("inf is not finite", {"patience": 3}, [1, INF, 0], 1, "non_finite", 0),
    Case("-inf is no triumph", {"patience": 3}, [1, -INF, 0], 1, "non_finite", 0),
    # ignite never stops on nothing but NaN: each comparison with it is false.
    Case(
        "ignite: only NaN, counted", {"patience": 3, "nan": "count"}, [NAN] * 9, 2, "patience", None
    ),
    Case(
        "ignite: only NaN, ignored",
        {"patience": 3, "nan": "ignore"},
        [NAN] * 9,
        3,
        "non_finite",
        None,
    ),
    Case(
        "ignore(1) in a row",
        {"patience": 9, "nan": "ignore", "nan_limit": 1},
        [1, NAN, 2, NAN, 2, NAN, NAN],
        6,
        "non_finite",
        0,
    ),
    Case(
        "a miss is not forgotten over an ignored one",
        {"patience": 2, "nan": "ignore"},
        [1, 2, NAN, 2],
        3,
        "patience",
        0,
    ),
    # ignite (best * (1 + delta), higher is better): -100 * 1.01 = -101, so that -100.5, which is
    # worse, counts as a gain and patience never ends. The margin is |reference| * delta.
    Case(
        "ignite: relative, negative, max",
        {"patience": 2, "mode": "max", "min_delta": 0.01, "delta_mode": "relative"},
        [-100, -100.5, -100.9, -50],
        2,
        "patience",
        0,
        [0],
    ),
    # skorch (best * (1 - threshold), lower is better): -100 * 0.99 = -99; -99.5 is worse than -100
    # and counts as a gain.
    Case(
        "skorch: relative, negative, min",
        {"patience": 2, "min_delta": 0.01, "delta_mode": "relative"},
        [-100, -99.5, -99.5, -200],
        2,
        "patience",
        0,
        [0],
    ),
    Case(
        "relative gains, negative",
        {"patience": 2, "min_delta": 0.01, "delta_mode": "relative"},
        [-100, -100.5, -102, -102.5],
        None,
        None,
        3,
        [0, 2],
    ),
    Case(
        "relative at a reference of zero is any gain",
        {"patience": 2, "min_delta": 0.5, "delta_mode": "relative"},
        [0, -1e-9, 0],
        None,
        None,
        1,
        [0, 1],
    ),
    # HF, Lightning and ignite know no warm-up.
    Case(
        "start: earlier epochs are no misses and no best",
        {"patience": 2, "start_from_epoch": 3},
        [0.1, 9, 9, 1, 2, 2],
        5,
        "patience",
        3,
        [3],
    ),
    Case(
        "start: NaN stops all the same",
        {"patience": 2, "start_from_epoch": 3},
        [1, NAN],
        1,
        "non_finite",
        None,
    ),
    Case(
        "start: NaN before it is no miss",
        {"patience": 1, "start_from_epoch": 3, "nan": "count"},
        [NAN, NAN, NAN, 1, 0.5],
        None,
        None,
        4,
    ),
    Case(
        "start: neither target nor divergence before it",
        {"patience": 2, "start_from_epoch": 2, "target": 0.1, "divergence": 5},
        [0.0, 9, 1],
        None,
        None,
        2,
    ),
    Case(
        "baseline never beaten",
        {"patience": 3, "baseline": 0.5},
        [0.9, 0.8, 0.7, 0.4],
        2,
        "patience",
        2,
        [],
    ),
    Case(
        "baseline beaten in time",
        {"patience": 3, "baseline": 0.5},
        [0.9, 0.8, 0.4, 0.5],
        None,
        None,
        2,
        [2],
    ),
    Case("target reached", {"patience": 3, "target": 0.5}, [0.9, 0.5, 0.1], 1, "target", 1),
    Case("target, max", {"patience": 3, "mode": "max", "target": 0.9}, [0.5, 0.95], 1, "target", 1),
    Case("divergence", {"patience": 9, "divergence": 4}, [1, 4, 4.1], 2, "divergence", 0),
    Case(
        "divergence, max",
        {"patience": 9, "mode": "max", "divergence": 0.1},
        [0.5, 0.05],
        1,
        "divergence",
        0,
    ),
    Case(
        "divergence goes before patience",
        {"patience": 1, "divergence": 4},
        [1, 5],
        1,
        "divergence",
        0,
    ),
    Case(
        "a spike that the rolling median does not see",
        {"patience": 2, "smoothing": Rolling(3, "median"), "divergence": 10},
        [5, 4, 99, 3.5, 3, 2],
        None,
        None,
        5,
    ),
    # Means of two: 4, 3, 2.5, 3.5, 4: without smoothing, epoch 2 would be a new start.
    Case(
        "rolling mean",
        {"patience": 2, "smoothing": Rolling(2)},
        [4, 2, 3, 4, 4],
        4,
        "patience",
        2,
        [0, 1, 2],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sequence(case: Case) -> None:
    stopper = EarlyStopping(**case.options)
    made = run(stopper, case.values)
    assert stopper.stopped == (case.stop is not None)
    assert len(made) - 1 == (len(case.values) - 1 if case.stop is None else case.stop)
    assert made[-1].reason == case.reason
    assert stopper.best_epoch == case.best
    if case.improved is not None:
        assert [epoch for epoch, one in enumerate(made) if one.improved] == case.improved
    assert stopper.decision == made[-1]
    assert stopper.epoch == len(made) - 1
    said = stopper.explain()
    assert said.startswith(
        f"{'stops' if stopper.stopped else 'goes on'} after epoch {len(made) - 1}"
    )
    assert said in repr(stopper)


def test_a_decision_is_a_frozen_record_of_four() -> None:
    decision = EarlyStopping(patience=1).step(1.0, epoch=0)
    assert decision == Decision(improved=True, new_best=True, stop=False, reason=None)
    assert [f.name for f in dataclasses.fields(Decision)] == [
        "improved",
        "new_best",
        "stop",
        "reason",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.stop = True  # type: ignore[misc]


def test_the_sentences() -> None:
    stopper = EarlyStopping(patience=2, min_delta=0.1)
    assert stopper.explain() == "no check yet"
    run(stopper, [1, 0.95, 0.93])
    assert stopper.explain() == (
        "stops after epoch 2: metric has not improved on 1 by more than 0.1 for 2 checks; "
        "best metric 0.93 at epoch 2"
    )
    stopper = EarlyStopping(patience=2, nan="count")
    run(stopper, [NAN, NAN])
    assert stopper.explain() == (
        "stops after epoch 1: metric has not improved on anything for 2 checks; "
        "no finite metric yet"
    )
    stopper = EarlyStopping(patience=2, smoothing=Ema(0.5), divergence=2)
    run(stopper, [1, 4])
    assert stopper.explain() == (
        "stops after epoch 1: worse than the bound on metric 2; best metric 1 at epoch 0 (smoothed)"
    )


# --- the unit of patience -------------------------------------------------------------------------


def stop_epoch(stopper: EarlyStopping, checks: dict[int, float]) -> int | None:
    for epoch, value in checks.items():
        if stopper.step(value, epoch=epoch).stop:
            return epoch
    return None


def test_patience_in_checks_and_in_epochs() -> None:
    every_fifth = {4: 3.0, 9: 2.0, 14: 2.5, 19: 2.5, 24: 2.5, 29: 2.5}
    assert stop_epoch(EarlyStopping(patience=3), every_fifth) == 24
    assert stop_epoch(EarlyStopping(patience=12, patience_unit="epochs"), every_fifth) == 24
    assert stop_epoch(EarlyStopping(patience=10, patience_unit="epochs"), every_fifth) == 19
    assert stop_epoch(EarlyStopping(patience=5, patience_unit="epochs"), every_fifth) == 14


def test_patience_in_epochs_with_several_checks_an_epoch() -> None:
    stopper = EarlyStopping(patience=2, patience_unit="epochs")
    made = [stopper.step(1.0, epoch=i // 4).stop for i in range(9)]
    assert made == [False] * 8 + [True]
    assert stopper.misses == 2
    assert stopper.epoch == 2


def test_patience_in_epochs_before_the_first_improvement() -> None:
    """Count from the epoch before the first check: a run may begin at epoch 100."""
    stopper = EarlyStopping(patience=3, patience_unit="epochs", baseline=0.5)
    assert [stopper.step(0.9, epoch=e).stop for e in (100, 101, 102)] == [False, False, True]


@given(
    st.lists(st.one_of(st.integers(-5, 5), st.just(NAN)), max_size=30),
    st.integers(1, 5),
    st.sampled_from(["count", "stop"]),
)
def test_with_one_check_an_epoch_both_units_agree(
    values: list[float], patience: int, nan: Any
) -> None:
    by_check = run(EarlyStopping(patience=patience, nan=nan), values, first=7)
    by_epoch = run(
        EarlyStopping(patience=patience, nan=nan, patience_unit="epochs"), values, first=7
    )
    assert by_check == by_epoch


# --- smoothing ------------------------------------------------------------------------------------


def test_ema_is_the_weighted_mean_of_the_whole_past() -> None:
    ema, memory, past = Ema(0.9), (), []
    for x in (3.0, -1.0, 7.5, 0.25, 2.0):
        past.append(x)
        memory, y = ema.update(memory, x)
        weights = [0.9**k for k in range(len(past))]
        wanted = sum(w * v for w, v in zip(weights, reversed(past), strict=True)) / sum(weights)
        assert y == pytest.approx(wanted, rel=1e-14)


@given(st.floats(-1e300, 1e300), st.sampled_from([Ema(0.3), Ema(0.999), Rolling(3), Rolling(49)]))
def test_smoothing_keeps_a_constant_exactly(value: float, smoothing: Ema | Rolling) -> None:
    """Rounding must not turn equal values into new bests."""
    stopper = EarlyStopping(patience=60, smoothing=smoothing)
    made = [stopper.step(value, epoch=e) for e in range(60)]
    assert [d.new_best for d in made] == [True] + [False] * 59


def test_smoothing_sees_no_non_finite_value() -> None:
    stopper = EarlyStopping(patience=9, nan="ignore", smoothing=Rolling(2))
    run(stopper, [4.0, NAN, 2.0, INF, 2.0])
    assert stopper.best == 2.0


def test_an_average_that_overflows_is_not_finite() -> None:
    stopper = EarlyStopping(patience=9, nan="count", smoothing=Ema(0.5))
    assert stopper.step(1.7e308, epoch=0).new_best
    assert not stopper.step(-1.7e308, epoch=1).new_best
    assert stopper.step(1.0, epoch=2).new_best


# --- several metrics ------------------------------------------------------------------------------

TWO = {"loss": "min", "f1": "max"}


def test_any_goes_on_while_one_improves_and_all_while_each_does() -> None:
    loss = [5, 4, 3, 2, 2, 2, 2, 2]
    f1 = [0.5, 0.6, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7]
    both = [{"loss": a, "f1": b} for a, b in zip(loss, f1, strict=True)]
    any_ = EarlyStopping(patience=2, metrics=TWO)
    assert len(run(any_, both)) - 1 == 7  # two after f1's last gain
    assert "loss has not improved on 2 for 4 checks and f1" in any_.explain()
    all_ = EarlyStopping(patience=2, metrics=TWO, combine="all")
    assert len(run(all_, both)) - 1 == 3  # two after f1's first plateau began
    assert (any_.misses, all_.misses) == (2, 2)
    # The loss drives restoring, unless told otherwise.
    assert any_.best_epoch == 3
    by_f1 = EarlyStopping(patience=2, metrics=TWO, best_by="f1")
    run(by_f1, both)
    assert (by_f1.best, by_f1.best_epoch) == (0.7, 5)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=25),
    st.integers(1, 4),
)
def test_several_metrics_are_single_ones_combined(
    pairs: list[tuple[int, int]], patience: int
) -> None:
    singles = [EarlyStopping(patience=patience, mode=mode) for mode in ("min", "max")]
    any_ = EarlyStopping(patience=patience, metrics=TWO)
    all_ = EarlyStopping(patience=patience, metrics=TWO, combine="all")
    for epoch, (loss, f1) in enumerate(pairs):
        a, b = (s.step(v, epoch=epoch) for s, v in zip(singles, (loss, f1), strict=True))
        both = {"loss": loss, "f1": f1, "not watched": NAN}
        any_one, all_of = any_.step(both, epoch=epoch), all_.step(both, epoch=epoch)
        assert any_one.stop == (a.stop and b.stop)
        assert all_of.stop == (a.stop or b.stop)
        assert any_one.improved == all_of.improved == (a.improved or b.improved)
        assert any_one.new_best == all_of.new_best == a.new_best


def test_targets_of_several_must_hold_at_once_and_one_divergence_is_enough() -> None:
    metrics = {
        "loss": Metric(target=0.5, divergence=9),
        "f1": Metric("max", target=0.9),
        "time": "min",
    }
    stopper = EarlyStopping(patience=9, metrics=metrics)
    assert not stopper.step({"loss": 0.4, "f1": 0.8, "time": 3}, epoch=0).stop
    assert not stopper.step({"loss": 0.6, "f1": 0.9, "time": 3}, epoch=1).stop
    assert stopper.step({"loss": 0.5, "f1": 0.9, "time": 3}, epoch=2).reason == "target"
    assert stopper.step({"loss": 10, "f1": 0.9, "time": 3}, epoch=3).reason == "divergence"
    assert stopper.step({"loss": 1, "f1": NAN, "time": 3}, epoch=4).reason == "non_finite"
    assert "f1 (1 in a row)" in stopper.explain()


def test_weights_make_one_metric_of_several() -> None:
    stopper = EarlyStopping(patience=2, min_delta=0.1, weights={"loss": 1.0, "f1": -2.0})
    made = run(
        stopper,
        [
            {"loss": 1, "f1": 0.5},
            {"loss": 1.2, "f1": 0.7},
            {"loss": 1, "f1": 0.5},
            {"loss": 1.5, "f1": 0.7},
        ],
    )
    assert [d.improved for d in made] == [True, True, False, False]
    assert stopper.best == pytest.approx(-0.2)
    assert "weighted sum" in stopper.explain()
    stopper = EarlyStopping(patience=2, weights={"a": 1.0, "b": 0.0})
    assert stopper.step({"a": 1, "b": INF}, epoch=0).reason == "non_finite"
    stopper = EarlyStopping(patience=2, weights={"a": 1.0, "b": 1.0})
    assert stopper.step({"a": 1.7e308, "b": 1.7e308}, epoch=0).reason == "non_finite"


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "error", "text"),
    [
        (
            {"patience": 0},
            ValueError,
            r"patience must be >= 1, got 0 \(patience p stops at the p-th",
        ),
        ({"patience": 2.0}, TypeError, "patience must be an integer, got float"),
        ({"patience": True}, TypeError, "patience must be an integer, got bool"),
        ({"mode": "auto"}, ValueError, 'mode must be one of "min", "max", got \'auto\''),
        ({"min_delta": -1.0}, ValueError, "min_delta must be >= 0, got -1.0"),
        ({"min_delta": NAN}, ValueError, "min_delta must be finite, got nan"),
        ({"baseline": INF}, ValueError, "baseline must be finite, got inf"),
        ({"delta_mode": "percent"}, ValueError, "delta_mode must be one of"),
        ({"nan": "skip"}, ValueError, 'nan must be one of "stop", "count", "ignore"'),
        ({"nan_limit": 2}, ValueError, "nan_limit goes with nan=\"ignore\", got nan='stop'"),
        ({"nan": "ignore", "nan_limit": 0}, ValueError, "nan_limit must be >= 1, got 0"),
        ({"patience_unit": "steps"}, ValueError, 'must be one of "checks", "epochs"'),
        ({"start_from_epoch": -1}, ValueError, "start_from_epoch must be >= 0, got -1"),
        ({"target": 2.0, "divergence": 1.0}, ValueError, "target must be better than divergence"),
        ({"metrics": {}}, ValueError, "metrics must name at least one metric"),
        ({"metrics": {"a": "up"}}, ValueError, r'metrics\["a"\] must be one of'),
        ({"metrics": {"a": 3}}, TypeError, r'metrics\["a"\] must be "min", "max" or a Metric'),
        ({"metrics": TWO, "best_by": "acc"}, ValueError, 'best_by must be one of "loss", "f1"'),
        ({"best_by": "loss"}, ValueError, "best_by goes with metrics"),
        ({"metrics": TWO, "mode": "max"}, ValueError, "are for a single metric"),
        ({"metrics": TWO, "weights": {"a": 1}}, ValueError, "exclude each other"),
        ({"weights": {"a": INF}}, ValueError, "finite weights"),
        ({"combine": "most"}, ValueError, 'combine must be one of "any", "all"'),
        ({"snapshot": "ram"}, ValueError, "snapshot must be one of"),
        ({"snapshot": "disk"}, ValueError, 'snapshot="disk" needs a folder'),
        ({"resume": True}, ValueError, "resume needs a folder"),
        ({"folder": "x", "snapshot": "none"}, ValueError, "leaves nothing to write"),
        ({"on_save_error": "ignore"}, ValueError, "on_save_error must be one of"),
        ({"agreement": "vote"}, ValueError, "agreement must be one of"),
        ({"agreement": "none", "folder": "x"}, ValueError, "would write over each other's"),
        ({"also": {"model": torch.nn.ReLU()}}, ValueError, 'the name "model" is taken'),
        ({"also": {"x": object()}}, TypeError, r'also\["x"\] must have state_dict and load_state'),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_arguments_that_make_no_sense(
    given_: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^fusereg.EarlyStopping: .*{text}"):
        EarlyStopping(**{"patience": 3, **given_})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Ema(1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: Rolling(0), "window must be an integer >= 1, got 0"),
        (lambda: Rolling(2, "mode"), "statistic must be"),  # type: ignore[arg-type]
        (
            lambda: EarlyStopping("model", patience=1),
            "model must be a torch.nn.Module or None, got str",
        ),  # type: ignore[arg-type]
    ],
)
def test_other_arguments_that_make_no_sense(make: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def test_a_metric_is_a_number_or_a_tensor_of_one_element() -> None:
    stopper = EarlyStopping(patience=3)
    parameter = torch.nn.Parameter(torch.tensor([[2.5]], dtype=torch.bfloat16))
    for epoch, value in enumerate(
        (3, parameter, torch.tensor(2.25), torch.tensor(2.0).numpy()[()])
    ):
        assert stopper.step(value, epoch=epoch).new_best
    assert stopper.best == 2.0
    for wrong, error, text in (
        (torch.zeros(2), ValueError, r"got shape \(2,\)"),
        ("0.5", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (True, TypeError, "got bool"),
        ({"loss": 1.0}, TypeError, "got dict"),
        (torch.zeros(3).numpy(), TypeError, "got ndarray"),
    ):
        with pytest.raises(error, match=f"step: metric must be a number or a tensor .*{text}"):
            stopper.step(wrong, epoch=9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metric must be real, got dtype torch\.complex64"):
        stopper.step(torch.tensor(1j), epoch=9)
    assert stopper.epoch == 3
    assert stopper.step(-(10**400), epoch=9).reason == "non_finite"
    two = EarlyStopping(patience=3, metrics=TWO)
    with pytest.raises(TypeError, match="metric must be a mapping with loss, f1, got float"):
        two.step(1.0, epoch=0)
    with pytest.raises(ValueError, match="metric lacks f1; it has loss, acc"):
        two.step({"loss": 1.0, "acc": 2.0}, epoch=0)


def test_an_epoch_does_not_go_back() -> None:
    stopper = EarlyStopping(patience=3)
    stopper.step(1.0, epoch=5)
    before = stopper.state_dict()
    with pytest.raises(ValueError, match="epoch must not go back: got 4 after 5; to train again"):
        stopper.step(0.5, epoch=4)
    with pytest.raises(TypeError, match="epoch must be an integer, got float"):
        stopper.step(0.5, epoch=6.0)  # type: ignore[arg-type]
    assert stopper.state_dict() == before
    assert stopper.step(0.5, epoch=5).new_best
    stopper.step(0.4, epoch=9)
    stopper.load_state_dict(before)  # to go back to an earlier epoch
    assert stopper.step(0.5, epoch=6).new_best
    assert (stopper.best_epoch, stopper.epoch) == (6, 6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": None}, "version must be 1, got None"),
        ({"state": {}}, "not a whole state: 'tracks'"),
        ({"state": {"tracks": [{}], "epoch": 1, "checks": 1, "last": None}}, "a track has"),
        (
            {"state": {"tracks": [], "epoch": 1, "checks": 1, "last": None}},
            "wanted 1 tracks, got 0",
        ),
    ],
)
def test_a_state_that_is_none_is_refused(change: dict[str, Any], text: str) -> None:
    stopper = EarlyStopping(patience=3)
    stopper.step(1.0, epoch=0)
    state = stopper.state_dict()
    with pytest.raises(ValueError, match=f"load_state_dict: .*{text}"):
        stopper.load_state_dict({**state, **change})
    assert stopper.state_dict() == state


@pytest.mark.parametrize(
    "other",
    [
        {"mode": "max"},
        {"smoothing": Ema(0.5)},
        {"patience_unit": "epochs"},
        {"metrics": {"loss": "min"}},
        {"weights": {"loss": 1.0}},
    ],
)
def test_a_state_whose_records_mean_something_else_is_refused(other: dict[str, Any]) -> None:
    """There is no implicit reset, and a best loss is never mistaken for a best accuracy."""
    state = EarlyStopping(patience=3).state_dict()
    with pytest.raises(ValueError, match="load_state_dict: the state is that of"):
        EarlyStopping(patience=3, **other).load_state_dict(state)


def test_patience_may_change_on_resuming() -> None:
    first = EarlyStopping(patience=2)
    run(first, [1, 2, 2])
    assert first.stopped
    second = EarlyStopping(patience=4)
    second.load_state_dict(first.state_dict())
    assert not second.stopped
    assert second.explain() == "goes on after epoch 2; best metric 1 at epoch 0"
    seen = [epoch for epoch in second.epochs(9) if second.step(2, epoch=epoch)]
    assert seen == [3, 4]
    less = EarlyStopping(patience=2)
    less.load_state_dict(first.state_dict())
    assert less.stopped
    assert list(less.epochs(9)) == []


# --- loops ----------------------------------------------------------------------------------------


def test_epochs_end_where_a_check_says_so_and_go_on_after_the_last_check() -> None:
    stopper = EarlyStopping(patience=2)
    seen = []
    for epoch in stopper.epochs(100):
        seen.append(epoch)
        stopper.step([3, 2, 2, 2][epoch], epoch=epoch)
    assert seen == [0, 1, 2, 3]
    assert list(stopper.epochs(100)) == []
    stopper = EarlyStopping(patience=2)
    stopper.step(1.0, epoch=4)
    with pytest.warns(RuntimeWarning, match="ended without a call of step"):
        assert list(stopper.epochs(7)) == [5, 6]
    with pytest.warns(RuntimeWarning, match="ended without a call of step"):
        assert list(stopper.epochs(7, start=4)) == [4, 5, 6]
    assert list(stopper.epochs(3)) == []
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        stopper.epochs(-1)


def test_explain_is_true_after_the_end() -> None:
    stopper = EarlyStopping(patience=9)
    for epoch in stopper.epochs(2):
        stopper.step([2, 3][epoch], epoch=epoch)
        assert stopper.explain().startswith(f"goes on after epoch {epoch}; ")
    ended = "ended after epoch 1 without a reason to stop; best metric 2 at epoch 0"
    assert stopper.explain() == ended
    with stopper:
        stopper.step(1, epoch=2)
        assert stopper.explain().startswith("goes on after epoch 2")
    assert stopper.explain().startswith("ended after epoch 2")
    stopper.step(1, epoch=3)  # a loop of one's own
    assert stopper.explain().startswith("goes on after epoch 3")
    stopper.finish()
    assert stopper.explain().startswith("ended after epoch 3")
    stopper.reset()
    assert stopper.explain() == "no check yet"
    for epoch in stopper.epochs(2):
        stopper.step(1.0, epoch=epoch)
        break
    assert stopper.explain().startswith("ended after epoch 0")


def test_reset_begins_another_run() -> None:
    model = torch.nn.Linear(1, 1)
    stopper = EarlyStopping(model, patience=1, baseline=5.0)
    run(stopper, [1, 2])
    assert stopper.stopped
    stopper.reset()
    assert (stopper.stopped, stopper.epoch, stopper.best, stopper.restorable) == (
        *(False, None, None),
        False,
    )
    assert stopper.restore() is None
    assert [d.stop for d in run(stopper, [4, 3, 3])] == [False, False, True]


def test_an_epoch_may_be_numpys() -> None:
    stopper = EarlyStopping(patience=torch.ones(2, dtype=torch.int64).numpy()[0])
    stopper.step(1.0, epoch=torch.tensor(3).numpy()[()])
    assert type(stopper.epoch) is int


def test_it_is_there_at_the_top() -> None:
    assert fusereg.EarlyStopping is fusereg.early_stopping.EarlyStopping
    assert "EarlyStopping" in fusereg.__all__
