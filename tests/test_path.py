"""Paths over strengths: where they lie, what is chosen, and that a killed one goes on as it was."""

from __future__ import annotations

import csv
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg import PathPoint, RegularizationPath
from fusereg.early_stopping import CheckpointError

# --- strengths ------------------------------------------------------------------------------------


def test_the_shrink_budget_is_its_formula() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert fusereg.shrink_budget(w, 2.0) == pytest.approx(5 / (2 * math.sqrt(2)))
    assert fusereg.shrink_budget(w, 2.0, dim=1) == pytest.approx(math.sqrt(17) / (2 * math.sqrt(2)))
    assert fusereg.shrink_budget(w, 2.0, dim=None) == pytest.approx(4 / 2)
    w.grad = torch.tensor([[0.0, 0.0], [3.0, 4.0]])  # moves the second row by 2 * 5
    assert fusereg.shrink_budget([w], 2.0) == pytest.approx((1 + 2 * 5) / (2 * math.sqrt(2)))
    moved = [torch.tensor([1.0, 0.5])]
    assert fusereg.shrink_budget([w], 2.0, moved=moved) == pytest.approx(6 / (2 * math.sqrt(2)))
    assert fusereg.shrink_budget(torch.zeros(3, 4), 1.0) == 0.0


def test_a_budget_that_is_spent_on_a_group_at_rest_removes_it_and_less_does_not() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64)
    high = fusereg.shrink_budget(start, lr_sum=0.1 * 20)
    for factor, wanted in ((1.0001, 0), (0.9999, 1)):
        w = start.clone()
        for _ in range(20):
            fusereg.prox.group_lasso_(w, 0.1 * factor * high)
        assert int((w != 0).any(1).sum()) == wanted


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lr_sum": 0.0}, ValueError, "lr_sum must be positive"),
        ({"lr_sum": "1"}, TypeError, "lr_sum must be a number, got str"),
        ({"dim": 2}, ValueError, r"dim must be a dimension of params\[0\]"),
        ({"params": []}, ValueError, "params must have a tensor"),
        ({"params": torch.tensor([math.nan])}, ValueError, "not finite"),
        ({"params": 3}, TypeError, "params must be"),
    ],
)
def test_a_budget_of_bad_arguments_is_refused(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fusereg.shrink_budget(**{"params": torch.ones(2, 2), "lr_sum": 1.0, **arguments})


class Lone(nn.Module):
    """Two groups of two weights, with norms 5 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))


Make = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), 0.1),
        (lambda m: fusereg.optim.SGD(m.parameters(), lr=0.1), 0.1),
        (lambda m: fusereg.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), 1.0),
        (lambda m: fusereg.optim.SGD(m.parameters(), 0.1, 0.9, prox="decoupled"), 0.1),
        (lambda m: fusereg.optim.Adam(m.parameters(), lr=0.1), 0.1),
    ],
    ids=["torch", "SGD", "momentum", "decoupled", "Adam"],
)
def test_a_number_of_strengths_is_bracketed_by_the_training_without_a_penalty(
    optimizer: Make, step: float
) -> None:
    """Without gradients, so that only norms and steps count."""
    seen = []

    def train(model: nn.Module, strength: float) -> None:
        assert isinstance(model, Lone)
        seen.append(strength)
        own = optimizer(model)
        for _ in range(10):
            model.w.grad = torch.zeros_like(model.w)
            own.step()
            fusereg.prox.group_lasso_(model.w, step * strength)

    path = fusereg.path(
        Lone, train, lambda m: 0.5, strengths=3, penalized=lambda m: m.w, progress=False
    )
    high = 5 / (10 * step * math.sqrt(2))
    assert seen[0] == 0.0
    assert seen[1:4] == pytest.approx([0.02 * high, 0.02**0.5 * high, high])
    assert [p.strength for p in path.points] == seen
    assert path.points[-1].zeros == 1.0  # the path ends when nothing is left
    assert len(seen) == 4


def test_a_path_goes_on_beyond_its_bracket_while_groups_are_left() -> None:
    def train(model: nn.Module, strength: float) -> None:
        assert isinstance(model, Lone)
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            own.zero_grad()
            # The loss resists only where there is a penalty: no training without one tells it.
            ((0.0 if strength == 0 else 20.0) * (model.w - 1).square()).sum().backward()
            own.step()
            fusereg.prox.group_lasso_(model.w, 0.1 * strength)

    path = fusereg.path(
        Lone, train, lambda m: 0.5, strengths=3, penalized=lambda m: m.w, progress=False
    )
    strengths = [p.strength for p in path.points]
    assert len(strengths) == 2 * 3 + 1
    ratios = [b / a for a, b in itertools.pairwise(strengths[1:])]
    assert ratios == pytest.approx([50**0.5] * 5)


def test_a_bracket_that_is_not_known_is_refused() -> None:
    def without_steps(model: nn.Module, strength: float) -> None:
        pass

    def with_adam(model: nn.Module, strength: float) -> None:
        own = fusereg.optim.Adam(model.parameters(), l1=strength)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        own.step()

    for train, dim, text in (
        (without_steps, 0, "made no step"),
        (with_adam, None, "in the optimizer's metric"),
    ):
        with pytest.raises(ValueError, match=text):
            fusereg.path(Lone, train, lambda m: 0.5, penalized=lambda m: m.w, dim=dim)


# --- choice ---------------------------------------------------------------------------------------


def points(*values: tuple[float, float], error: float | None = None) -> list[PathPoint]:
    return [PathPoint(s, {"metric": v}, error) for s, v in values]


def test_the_strongest_within_one_standard_error_is_chosen() -> None:
    found = points((0.0, 0.90), (0.1, 0.95), (0.2, 0.945), (0.3, 0.941), (0.4, 0.939), error=0.01)
    path = RegularizationPath(found)
    assert path.best.strength == 0.1
    assert path.chosen.strength == 0.3
    assert RegularizationPath(found[::-1]).chosen.strength == 0.3  # in any order
    losses = [PathPoint(p.strength, {"loss": 1 - p.value}, 0.01) for p in found]
    assert RegularizationPath(losses, mode="min").chosen.strength == 0.3
    equal = RegularizationPath(points((0.0, 0.9), (0.1, 0.9), error=0.0))
    assert equal.best.strength == equal.chosen.strength == 0.1


def test_the_standard_error_is_that_of_an_accuracy_or_given() -> None:
    def train(model: nn.Module, strength: float) -> None:
        pass

    def run(found: Any, **options: Any) -> RegularizationPath:
        return fusereg.path(Lone, train, lambda m: found, strengths=[0.1, 0.2], **options)

    assert run(0.98, samples=1000).points[0].standard_error == pytest.approx(0.00443, rel=1e-3)
    given = run({"loss": torch.tensor(2.0), "standard_error": 0.3, "other": 1}, mode="min")
    assert given.points[0].standard_error == 0.3
    assert given.points[0].metrics == {"loss": 2.0, "other": 1.0}
    assert given.chosen.strength == 0.2
    with pytest.raises(ValueError, match="needs the standard error"):
        _ = run(0.98).chosen
    assert run(0.98).best.strength == 0.2
    with pytest.raises(ValueError, match="is a smaller loss better"):
        run({"loss": 1.0})
    with pytest.raises(ValueError, match=r"an accuracy in \[0, 1\]"):
        run(98.0, samples=1000)
    with pytest.raises(ValueError, match="NaN at every strength"):
        _ = run(math.nan).best


def test_a_metric_that_is_not_finite_is_a_point_that_is_not_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(answers: list[Any], **options: Any) -> RegularizationPath:
        answered = iter(answers)
        return fusereg.path(
            Lone, lambda m, s: None, lambda m: next(answered), strengths=[0.1, 0.2], **options
        )

    for first, options in (
        (math.nan, {"samples": 100}),
        ({"accuracy": math.nan, "standard_error": math.nan}, {}),
    ):
        caplog.clear()
        path = run([first, {"accuracy": 0.5, "standard_error": 0.01}], **options)
        assert [p.standard_error for p in path.points] == [None, 0.01]
        assert path.best.strength == path.chosen.strength == 0.2
        assert "the metric is NaN at strength 0.1" in caplog.text
    losses = [{"loss": x, "standard_error": 0.1} for x in (math.inf, math.inf)]
    assert run(losses, mode="min").chosen.strength == 0.2


# --- groups ---------------------------------------------------------------------------------------


def test_a_group_leaves_where_it_does_not_return() -> None:
    used = {0.0: "abc", 0.1: "ac", 0.2: "abc", 0.3: "c", 0.4: "c"}
    found = [
        PathPoint(s, {"m": 1.0}, used=[name in names for name in "abc"])
        for s, names in used.items()
    ]
    for order in (1, -1):
        path = RegularizationPath(found[::order], names=list("abc"))
        assert path.leaves_at() == {"c": math.inf, "a": 0.3, "b": 0.3}
        assert list(path.leaves_at()) == ["c", "a", "b"]
        assert path.used_at(found[1]) == ["a", "c"]


# --- training -------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 2))


def fit(model: nn.Module, strength: float) -> Iterator[float]:
    """Train on random batches, by random numbers of torch's global generator."""
    own = fusereg.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, group=strength)
    for _ in range(2):
        own.zero_grad()
        x = torch.randn(8, 6)
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        loss.backward()
        own.step()
        yield float(loss.detach())


def score(model: nn.Module) -> float:
    assert not model.training
    assert not torch.is_grad_enabled()
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    return float((model(x).argmax(1) == (x[:, 0] > 0)).float().mean())


def weights(path: RegularizationPath) -> list[Tensor]:
    """All weights of all points."""
    return [
        torch.cat([p.detach().flatten() for p in path.model_at(point).parameters()])
        for point in path.points
    ]


def whole(folder: Path | None, **options: Any) -> RegularizationPath:
    torch.manual_seed(0)
    return fusereg.path(
        net, options.pop("train", fit), score, penalized=lambda m: m[0].weight, samples=50,
        folder=folder, **{"strengths": 3, **options},
    )  # fmt: skip


@pytest.mark.parametrize("strengths", [3, [0.0, 0.01, 0.1]], ids=["number", "list"])
@pytest.mark.parametrize("crash_at", [0, 1, 3])
def test_a_path_that_crashed_goes_on_with_the_same_bits(
    strengths: Any, crash_at: int, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    wanted = whole(None, strengths=strengths)
    trained = []

    def crashing(model: nn.Module, strength: float) -> Iterator[float]:
        for done, loss in enumerate(fit(model, strength)):
            if len(trained) == crash_at and done == 1:
                raise KeyboardInterrupt  # amid a strength
            yield loss
        trained.append(strength)

    if crash_at < len(wanted.points):
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path, strengths=strengths, train=crashing)
        torch.rand(7)  # whatever happened since
    again = []

    def counting(model: nn.Module, strength: float) -> Iterator[float]:
        again.append(strength)
        yield from fit(model, strength)

    found = whole(tmp_path, strengths=strengths, train=counting)
    assert found.points == wanted.points
    assert trained + again == [p.strength for p in wanted.points]
    for own, other in zip(weights(found), weights(wanted), strict=True):
        assert torch.equal(own, other)
    assert whole(tmp_path, strengths=strengths, train=None).points == wanted.points  # done


def test_each_strength_starts_from_the_weights_of_the_one_before() -> None:
    ends, starts = [], []

    def train(model: nn.Module, strength: float) -> Iterator[float]:
        starts.append(next(model.parameters()).detach().clone())
        assert all(p.grad is None for p in model.parameters())
        assert model.training
        yield from fit(model, strength)
        ends.append(next(model.parameters()).detach().clone())

    path = whole(None, train=train)
    assert len(path.points) > 2
    for end, start in zip(ends, starts[1:], strict=False):
        assert torch.equal(end, start)


def test_a_folder_of_another_path_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    whole(tmp_path, strengths=[0.1, 0.2])
    with pytest.raises(ValueError, match="a path over other strengths"):
        whole(tmp_path, strengths=[0.1, 0.3])
    assert len(whole(tmp_path, strengths=[0.1, 0.3], resume=False).points) == 2


SCRIPT = """
import os, sys, torch
sys.path[:0] = {paths!r}
import test_path
left = int(sys.argv[2])

def train(model, strength):
    global left
    for loss in test_path.fit(model, strength):
        left -= 1
        if left == 0:
            os._exit(9)
        yield loss

path = test_path.whole(sys.argv[1], train=train)
path.to_json(sys.argv[1] + "/path.json")
"""


@pytest.mark.slow
def test_a_killed_path_goes_on_in_a_new_process(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=sys.path), encoding="utf-8")
    for left, code in ((5, 9), (3, 9), (10**9, 0)):
        command = [sys.executable, str(script), str(tmp_path / "path"), str(left)]
        assert subprocess.run(command, check=False).returncode == code
    found = RegularizationPath.from_json(tmp_path / "path" / "path.json")
    assert found.points == whole(None).points


def test_early_stopping_ends_each_strength_and_restores_its_best_epoch() -> None:
    closed = []

    def train(model: nn.Module, strength: float) -> Iterator[float]:
        try:
            for epoch, objective in enumerate((3.0, 1.0, 2.0, 2.0, 0.0)):
                with torch.no_grad():
                    next(model.parameters()).fill_(strength + epoch)
                yield objective
        finally:
            closed.append(strength)

    path = whole(None, train=train, strengths=[10.0, 20.0], patience=2)
    assert [p.epochs for p in path.points] == [4, 4]
    assert [float(w[0]) for w in weights(path)] == [11.0, 21.0]
    assert closed == [10.0, 20.0]


def test_what_a_smaller_network_costs_is_measured() -> None:
    def smaller(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        model[0].weight.data.zero_()  # of a copy
        if model[1].p == 0.3 and len(made) == 1:
            raise ValueError("nothing is left")
        made.append(model)
        return nn.Linear(6, 3)

    made: list[nn.Module] = []
    path = whole(None, strengths=[0.0, 0.1], example_inputs=torch.ones(5, 6), smaller=smaller)
    first, second = path.points
    assert (first.parameters, first.operations) == (3 * 6 + 3, 2 * 5 * 6 * 3)
    assert first.milliseconds is not None
    assert first.milliseconds > 0
    assert (second.parameters, second.operations, second.milliseconds) == (None, None, None)
    assert all(w.any() for w in weights(path))
    plain = whole(None, strengths=[0.1], example_inputs=torch.ones(5, 6)).points[0]
    assert plain.operations == 2 * 5 * (6 * 4 + 4 * 2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"strengths": 0}, ValueError, "at least 1"),
        ({"strengths": [0.1, 0.1]}, ValueError, "must ascend or descend"),
        ({"strengths": [0.1, 0.3, 0.2]}, ValueError, "must ascend or descend"),
        ({"strengths": [-0.1]}, ValueError, "not negative"),
        ({"strengths": []}, ValueError, "at least one, got none"),
        ({"strengths": "weak"}, TypeError, "an int or a sequence"),
        ({"strengths": "123"}, TypeError, "an int or a sequence"),
        ({"strengths": torch.ones(2, 2)}, TypeError, "an int or a sequence"),
        ({"strengths": [0.1, math.nan]}, ValueError, "finite and not negative"),
        ({"strengths": 3, "penalized": None}, ValueError, "needs penalized="),
        ({"mode": "large"}, ValueError, "mode must be"),
        ({"samples": 0}, ValueError, "samples must be >= 1, got 0"),
        ({"patience": 0}, ValueError, "patience must be >= 1, got 0"),
        ({"names": ["a"]}, ValueError, "4 different ones"),
        ({"names": ["a"] * 4}, ValueError, "4 different ones"),
        ({"names": "abcd"}, TypeError, "got the word 'abcd'"),
        ({"names": list("abcd"), "dim": None}, ValueError, "a dim that has groups"),
        ({"dim": 2}, ValueError, "dim must be a dimension"),
        ({"smaller": lambda m: m}, ValueError, "smaller goes with example_inputs"),
        ({"example_inputs": "x"}, TypeError, "example_inputs must be"),
        ({"make_model": lambda: 3}, TypeError, "make_model returns must be a torch.nn.Mod"),
        ({"penalized": lambda m: []}, ValueError, "penalized must return"),
        ({"train": lambda m, s: 3}, TypeError, "train returns must be None or a generator"),
        ({"train": lambda m, s: None, "patience": 2}, TypeError, "must yield the objective"),
        ({"train": lambda m, s: iter([None]), "patience": 2}, TypeError, "got None"),
        ({"evaluate": lambda m: "good"}, TypeError, "evaluate must return numbers"),
        ({"evaluate": lambda m: {}}, ValueError, "must return a metric"),
        ({"evaluate": lambda m: (0.9, 0.01)}, TypeError, "evaluate must return numbers"),
        ({"evaluate": lambda m: torch.ones(2)}, TypeError, "evaluate must return numbers"),
        ({"evaluate": lambda m: None}, TypeError, "evaluate must return numbers"),
    ],
)
def test_bad_arguments_and_answers_are_refused(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    arguments: dict[str, Any] = {
        "make_model": net,
        "train": fit,
        "evaluate": score,
        "strengths": [0.1],
        "penalized": lambda m: m[0].weight,
        **change,
    }
    with pytest.raises(error, match=text):
        fusereg.path(**arguments)


# --- tables, files, pictures ----------------------------------------------------------------------


def shown() -> RegularizationPath:
    found = [
        PathPoint(s, {"accuracy": a, "loss": 1 - a}, 0.01, z, [True, z < 0.5], 2, 10, 10**6, 0.5)
        for s, a, z in (
            (0.0, 0.95, 0.0),
            (0.01, 0.955, 0.3),
            (0.1, 0.951, 0.6),
            (1.0, math.nan, 1.0),
        )
    ]
    return RegularizationPath(found, names=["age", "sex"], samples=400)


def test_the_table_has_each_figure_and_the_choice() -> None:
    text = str(shown())
    for word in ("accuracy", "standard", "60.0 %", "1,000,000", "0.955", "nan"):
        assert word in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "best" in line] == ["0.01"]
    assert [line.split()[0] for line in lines if "chosen" in line] == ["0.1"]
    few = str(RegularizationPath(points((0.1, 0.5))))
    assert "milliseconds" not in few
    assert "standard" not in few


def test_files_hold_what_the_path_has(tmp_path: Path) -> None:
    path = shown()
    path.to_json(tmp_path / "path.json")
    found = RegularizationPath.from_json(tmp_path / "path.json")
    assert repr(found.points) == repr(path.points)  # NaN is not equal to itself
    assert found.leaves_at() == path.leaves_at()
    assert (found.mode, found.samples) == (path.mode, path.samples)
    with pytest.raises(ValueError, match="no weights are held"):
        found.model_at(found.points[0])
    path.to_csv(tmp_path / "path.csv")
    with (tmp_path / "path.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in rows] == [0.0, 0.01, 0.1, 1.0]
    assert rows[1]["accuracy"] == "0.955"
    assert rows[1]["groups"] == "2"


def test_the_pictures_have_a_color_and_a_marker_for_each_series(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = shown().plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    lines = [axes.get_lines()[0] for axes in figure.axes]
    assert len(lines) == 5
    assert (
        len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 5
    )
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes] == [
        "accuracy", "zeros", "groups used", "operations", "milliseconds",
    ]  # fmt: skip
    bars = shown().plot_groups(tmp_path / "groups.png").axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["age", "sex"]
    assert [patch.get_hatch() for patch in bars.patches] == ["///", None]
    with pytest.raises(ValueError, match="no groups to draw"):
        RegularizationPath(points((0.1, 0.5))).plot_groups()


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_a_path_of_one_point_has_pictures(strength: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = [PathPoint(strength, {"accuracy": 0.5}, 0.01, 0.3, [True, False])]
    path = RegularizationPath(one, names=["age", "sex"])
    path.plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    if strength:
        path.plot_groups(tmp_path / "groups.png")
        assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(ValueError, match="needs a strength > 0"):
            path.plot_groups()


def test_a_folder_that_cannot_be_one_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises((OSError, CheckpointError), match="file"):
            whole(folder, train=lambda m, s: pytest.fail("it was trained"))


def test_a_progress_bar_is_shown_if_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    whole(None, strengths=[0.5], progress=True)
    assert "strength 0.5" in capsys.readouterr().err
    whole(None, strengths=[0.5], progress=False)
    assert capsys.readouterr().err == ""
