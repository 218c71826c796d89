"""Arguments of a wrong type are refused with the function, the argument and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusereg
from fusereg import EarlyStopping, WeightPenalty, optim
from fusereg.early_stopping import Ema

BETAS = [optim.Adam, optim.AdamW, optim.NAdam, optim.LAMB, optim.Lion]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 0.9, 0.9), torch.tensor(0.9)])
def test_betas_are_two_numbers(kind: Callable[..., Any], betas: Any) -> None:
    name = kind.__name__  # type: ignore[attr-defined]
    text = rf"^fusereg.optim.{name}: betas must be two numbers, got "
    with pytest.raises(TypeError, match=text):
        kind(parameters(), betas=betas)
    with pytest.raises(TypeError, match=text):
        kind([{"params": parameters(), "betas": betas}])
    with pytest.raises(
        TypeError, match=rf"^fusereg.optim.{name}: betas\[1\] must be a number, got"
    ):
        kind(parameters(), betas=(0.9, "0.9"))
    for fine in ((0.9, 0.9), [0.9, 0.9], torch.tensor([0.9, 0.9])):
        kind(parameters(), betas=fine)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1], 1j])
def test_numbers_of_optimizers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^fusereg.optim.AdamW: {name} must be a number"):
        optim.AdamW(parameters(), **{name: value})


@pytest.mark.parametrize("name", ["target", "baseline", "divergence", "min_delta"])
@pytest.mark.parametrize("value", ["0.1", [0.1], 1j, 10**400, torch.ones(2)])
def test_numbers_of_early_stopping_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^fusereg.EarlyStopping: {name} must be a number"):
        EarlyStopping(patience=2, **{name: value})


STOPPING: list[tuple[Callable[[], Any], str]] = [
    (lambda: Ema("0.9"), "decay must be a number, got str"),  # type: ignore[arg-type]
    (lambda: stopper(weights={"a": "1"}), r'weights\["a"\] must be a number, got str'),
    (lambda: stopper(weights=["a"]), "weights must be a mapping .*, got list"),
    (lambda: stopper(metrics=["a"]), "metrics must be a mapping .*, got list"),
    (lambda: stopper(metrics="loss"), "metrics must be a mapping .*, got str"),
    (lambda: stopper(also=[optim.SGD(parameters())]), "also must be a mapping .*, got list"),
    (lambda: stopper(min_delta=None), "min_delta must be a number, got NoneType"),
]


def stopper(**arguments: Any) -> EarlyStopping:
    return EarlyStopping(patience=2, **arguments)


@pytest.mark.parametrize(("make", "text"), STOPPING, ids=[text for _, text in STOPPING])
def test_early_stopping_says_what_it_wants(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=f"^fusereg.EarlyStopping: {text}"):
        make()


@pytest.mark.parametrize("value", [["head.*"], "head.*", 3])
def test_rules_of_a_penalty_are_a_mapping(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^fusereg.WeightPenalty: rules must be a mapping like"):
        WeightPenalty(nn.Linear(2, 1), l1=0.1, rules=value)
    with pytest.raises(TypeError, match=r"^fusereg.WeightPenalty: exclude must be name patterns"):
        WeightPenalty(nn.Linear(2, 1), l1=0.1, exclude=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["make_model", "train", "evaluate", "penalized", "smaller"])
@pytest.mark.parametrize("value", [3, "net", torch.ones(2)])
def test_a_path_takes_functions(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"make_model": nn.Identity, "train": print, "evaluate": print}
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^fusereg.path: {name} must be a function, got {kind}$"):
        fusereg.path(**{**arguments, name: value}, strengths=[0.1])


def test_a_path_takes_no_model_in_place_of_a_function_that_makes_it() -> None:
    with pytest.raises(TypeError, match=r"^fusereg.path: make_model must be a function, got Lin"):
        fusereg.path(nn.Linear(2, 1), print, print, strengths=[0.1])  # type: ignore[arg-type]
