"""Arguments of a wrong type are refused with the function, the argument and what came."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fusereg
import fusereg.functional as F
from fusereg import EarlyStopping, TrainingRun, WeightPenalty, optim
from fusereg.early_stopping import Ema
from odd_tensors import UNREADABLE

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


# --- whatever is passed ---------------------------------------------------------------------------

ODD: dict[str, Callable[[], Any]] = {
    **{
        name: functools.partial(UNREADABLE[name][0], torch.device("cpu"))
        for name in ("nested, strided", "sparse COO", "sparse CSR", "quantized", "meta", "complex")
    },
    "a string": lambda: "0.1x",
    "None": lambda: None,
    "a number": lambda: 3,
    "a list": lambda: [1.0],
    "an array": lambda: np.ones(4),
    "a type": lambda: nn.ReLU,
}


def optimizer(**options: Any) -> optim.SGD:
    return optim.SGD(parameters(), **{"lr": 0.1, "l1": 0.1, "ema_decay": 0.9, **options})


def penalty(**options: Any) -> WeightPenalty:
    return WeightPenalty(nn.Linear(2, 1), **{"l1": 0.1, **options})


def batch_norm(**options: Any) -> torch.Tensor:
    return F.batch_norm(
        torch.ones(2, 3, 4), torch.zeros(3), torch.ones(3), training=True, **options
    )


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    **{
        f"batch_norm({name}=)": functools.partial(
            lambda name, odd: batch_norm(**{"activation": "leaky_relu", name: odd}), name
        )
        for name in (
            *("eps", "momentum", "negative_slope", "dropout", "virtual_batch_size", "weight"),
            *("residual", "mask", "seed", "generator"),
        )
    },
    **{
        f"cross_entropy({name}=)": functools.partial(
            lambda name, odd: F.cross_entropy(
                torch.ones(2, 3), **{"target": torch.tensor([0, 1]), name: odd}
            ),
            name,
        )
        for name in ("target", "weight", "ignore_index", "label_smoothing")
    },
    **{
        f"SGD({name}=)": functools.partial(lambda name, odd: optimizer(**{name: odd}), name)
        for name in ("lr", "l1", "l2", "group", "prox", "max_grad_norm", "ema_decay", "groups")
    },
    "SGD.load_state_dict": lambda odd: optimizer().load_state_dict(odd),
    "SGD.averaged": lambda odd: optimizer().averaged(odd).__enter__(),
    "SGD.copy_averaged": lambda odd: optimizer().copy_averaged(odd),
    "StrengthScheduler": lambda odd: optim.StrengthScheduler(odd, lambda t: 1.0),
    "StrengthScheduler(factor)": lambda odd: optim.StrengthScheduler(optimizer(), odd),
    "clip_grad_norm_": lambda odd: optim.clip_grad_norm_(odd, 1.0),
    "clip_grad_norm_(max_norm)": lambda odd: optim.clip_grad_norm_(parameters(), odd),
    "clip_grad_norm_(norm_type)": lambda odd: optim.clip_grad_norm_(parameters(), 1.0, odd),
    "get_total_norm": optim.get_total_norm,
    "clip_grad_value_": lambda odd: optim.clip_grad_value_(odd, 1.0),
    "clip_grad_value_(clip_value)": lambda odd: optim.clip_grad_value_(parameters(), odd),
    "adaptive_clip_grad_": optim.adaptive_clip_grad_,
    "adaptive_clip_grad_(eps)": lambda odd: optim.adaptive_clip_grad_(parameters(), 0.1, odd),
    "param_groups_weight_decay": lambda odd: optim.param_groups_weight_decay(odd, 0.1),
    "WeightPenalty": lambda odd: WeightPenalty(odd, l1=0.1),
    **{
        f"WeightPenalty({name}=)": functools.partial(lambda name, odd: penalty(**{name: odd}), name)
        for name in ("l1", "l2", "group", "group_dim", "rules")
    },
    "WeightPenalty.attach": lambda odd: penalty().attach(odd),
    "WeightPenalty.load_state_dict": lambda odd: penalty().load_state_dict(odd),
    "WeightPenalty.add_grad_": lambda odd: penalty().add_grad_(grad_scale=odd),
    "EarlyStopping": lambda odd: EarlyStopping(odd, patience=2),
    **{
        f"EarlyStopping({name}=)": functools.partial(
            lambda name, odd: stopper(**{"model": nn.Linear(1, 1), name: odd}), name
        )
        for name in (
            *("patience", "mode", "min_delta", "nan", "start_from_epoch", "target", "smoothing"),
            *("metrics", "weights", "combine", "also", "snapshot", "folder", "on_save_error"),
        )
    },
    "EarlyStopping.step": lambda odd: stopper().step(odd, epoch=0),
    "EarlyStopping.step(epoch=)": lambda odd: stopper().step(1.0, epoch=odd),
    "EarlyStopping.epochs": lambda odd: stopper().epochs(odd),
    "EarlyStopping.load_state_dict": lambda odd: stopper().load_state_dict(odd),
    "load_best": fusereg.early_stopping.load_best,
    "TrainingRun": lambda odd: TrainingRun(odd, model=nn.Linear(1, 1)),
    **{
        f"TrainingRun({name}=)": functools.partial(
            lambda name, odd: TrainingRun("run", **{"thing": nn.Linear(1, 1), name: odd}), name
        )
        for name in ("model", "every_steps", "every_minutes", "keep_best", "mode")
    },
    "TrainingRun.save": lambda odd: TrainingRun("run", model=nn.Linear(1, 1)).save(odd),
    "prox.l1_": lambda odd: fusereg.prox.l1_(odd, 0.1),
    "prox.l1_(threshold)": lambda odd: fusereg.prox.l1_(torch.ones(3), odd),
    "l1_penalty(strength)": lambda odd: fusereg.functional.l1_penalty(torch.ones(3), odd),
    "convert": fusereg.convert,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", ARGUMENTS)
def test_whatever_is_passed_the_error_is_of_fusereg(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no error of a line inside, which tells users nothing."""
    monkeypatch.chdir(tmp_path)
    for kind, make in ODD.items():
        text = "fusereg."
        try:
            ARGUMENTS[call](make())
        except (TypeError, ValueError, RuntimeError) as error:
            text = f"{error}"
        assert text.startswith("fusereg."), kind


_WAITING = torch.tensor(0.1, requires_grad=True)
_IMAGES = torch.rand(2, 3, 4, 4)
_WEIGHTS = torch.randn(3, 3)
_LOGITS, _CLASSES = torch.randn(2, 3), torch.tensor([0, 1])
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "l1_penalty: strength": lambda s: F.l1_penalty(_WEIGHTS, s),
    "l2_penalty: strength": lambda s: F.l2_penalty([_WEIGHTS], s.expand(1)),
    "elastic_net_penalty: l2": lambda s: F.elastic_net_penalty(_WEIGHTS, 0.1, s),
    "group_lasso_penalty: strength": lambda s: F.group_lasso_penalty(_WEIGHTS, s),
    "orthogonality_penalty: strength": lambda s: F.orthogonality_penalty(_WEIGHTS, s),
    "spectral_norm_penalty: strength": lambda s: F.spectral_norm_penalty(_WEIGHTS, s),
    "prox.l1_: threshold": lambda s: fusereg.prox.l1_(_WEIGHTS.clone(), s),
    "dropout: p": lambda s: F.dropout(_WEIGHTS, s),
    "Dropout: p": fusereg.nn.Dropout,
    "gaussian_dropout: p": lambda s: F.gaussian_dropout(_WEIGHTS, s),
    "cross_entropy: label_smoothing": lambda s: F.cross_entropy(
        _LOGITS, _CLASSES, label_smoothing=s
    ),
    "warp_affine: matrix": lambda s: fusereg.augment.warp_affine(_IMAGES, s.expand(2, 3)),
    "mix: lam": lambda s: fusereg.augment.mix(_IMAGES, torch.tensor([1, 0]), s),
}


@pytest.mark.parametrize("name", _CONSTANTS)
def test_what_gets_no_gradient_is_not_taken_while_it_waits_for_one(name: str) -> None:
    call = _CONSTANTS[name]
    with pytest.raises(ValueError, match=f"{name} gets no gradient; detach") as raised:
        call(_WAITING)
    assert str(raised.value).startswith("fusereg.")
    with torch.no_grad():
        call(_WAITING)
    call(_WAITING.detach())


# --- what says nothing, or is not there yet -------------------------------------------------------


def test_adding_a_penalty_needs_a_strength_and_0_is_one() -> None:
    layer = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^fusereg.add_penalty_grad_: no strength is given; pass"):
        fusereg.add_penalty_grad_(layer)
    assert layer.weight.grad is None
    assert fusereg.add_penalty_grad_(layer, l1=0.0) == 0.0


@pytest.mark.parametrize("of", ["model_at", "used_at"])
def test_a_point_of_a_path_is_no_strength(of: str) -> None:
    path = fusereg.path(lambda: nn.Linear(2, 1), lambda *_: None, lambda _: 1.0, strengths=[0.1, 2])
    for wrong in (0.1, None, dataclasses.replace(path.points[0], strength=7.0)):
        with pytest.raises(ValueError, match=r"such as path.chosen .* strengths are 0.1, 2$"):
            getattr(path, of)(wrong)
    getattr(path, of)(path.points[1])


@pytest.mark.parametrize("value", [None, "a", [0.1]])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_numbers_of_param_groups_are_numbers(name: str, value: Any) -> None:
    """When a group is added, and at the step after it was changed."""
    weight = nn.Parameter(torch.ones(2))
    text = rf"^fusereg.optim.SGD: {name} must be a number"
    with pytest.raises(TypeError, match=text):
        optim.SGD([{"params": [weight], name: value}], lr=0.1)
    with pytest.raises(ValueError, match=f"{name} must be not negative, got -1"):
        optim.SGD([{"params": [weight], name: -1.0}], lr=0.1)
    optimizer = optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0][name] = value
    weight.grad = torch.ones(2)
    with pytest.raises(TypeError, match=text):
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


LAZY: dict[str, Callable[[nn.Module, Path], Any]] = {
    "EarlyStopping": lambda m, _: EarlyStopping(m, patience=2).step(1.0, epoch=0),
    "EarlyStopping on disk": lambda m, folder: EarlyStopping(m, patience=2, folder=folder),
    "TrainingRun": lambda m, folder: [*TrainingRun(folder, model=m).epochs(1)],
    "WeightPenalty": lambda m, _: WeightPenalty(m, l1=0.1).penalty(),
    "add_penalty_grad_": lambda m, _: fusereg.add_penalty_grad_(m, l1=0.1),
    "prox": lambda m, _: fusereg.prox.l1_(m, 0.1),
    "sparsity": lambda m, _: fusereg.sparsity(m),
    "groups_of": lambda m, _: fusereg.groups_of(m, torch.ones(2, 4)),
    "compact": lambda m, _: fusereg.compact(m, torch.ones(2, 4)),
    "param_groups_weight_decay": lambda m, _: optim.param_groups_weight_decay(m, 0.1),
}


@pytest.mark.parametrize("call", LAZY)
def test_a_lazy_model_is_to_be_called_once_first(call: str, tmp_path: Path) -> None:
    if call in ("groups_of", "compact"):
        pytest.importorskip("torch_pruning")
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"^fusereg\..* is an uninitialized parameter of a lazy"):
        LAZY[call](model, tmp_path)
    model(torch.ones(2, 4))
    LAZY[call](model, tmp_path)
