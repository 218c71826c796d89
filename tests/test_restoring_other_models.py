"""States that are loaded into another model than theirs change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusereg import EarlyStopping, TrainingRun


def _more(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def _fewer(model: nn.Sequential) -> None:
    del model[2]


def _other(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm1d(2)


def _without_bias(model: Any) -> None:
    model[0].bias = None


def _buffer(model: nn.Sequential) -> None:
    model[0].register_buffer("scale", torch.ones(2))


CHANGES: list[Callable[[Any], None]] = [_more, _fewer, _other, _without_bias, _buffer]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def _trained(model: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    return optimizer


def _bits(*things: Any) -> list[Any]:
    return [copy.deepcopy(thing.state_dict()) for thing in things]


def _same(now: list[Any], before: list[Any]) -> None:
    for a, b in zip(now, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["cpu", "device", "disk"])
def test_early_stopping_does_not_restore_a_part_of_a_model_that_has_changed(
    change: Callable[[Any], None], place: Any, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    folder = tmp_path if place == "disk" else None
    other, model = _model(), _model()
    optimizer = _trained(model)
    stopper = EarlyStopping(
        model, patience=3, snapshot=place, folder=folder, also={"a": other, "o": optimizer}
    )
    stopper.step(1.0, epoch=0)
    optimizer.step()
    with torch.no_grad():
        for p in (*model.parameters(), *other.parameters()):
            p.add_(1.0)
    change(model)
    before = _bits(model, other, optimizer)
    with pytest.raises(ValueError, match=r"of epoch 0 (lacks|also has) .* of model; is it"):
        stopper.restore()
    _same(_bits(model, other, optimizer), before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_load_a_part_of_another_architecture(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    model = _model()
    first = TrainingRun(tmp_path, model=model, other=_model(), optimizer=_trained(model))
    first.save()
    fresh, other = _model(), _model()
    change(fresh)
    optimizer = _trained(other)
    before = _bits(fresh, other, optimizer)
    with pytest.raises(
        ValueError, match=r"^fusereg.TrainingRun: the state .* of another architecture"
    ):
        TrainingRun(tmp_path, other=other, model=fresh, optimizer=optimizer)
    _same(_bits(fresh, other, optimizer), before)


class _Renamed(nn.Linear):
    """Takes a state with other names."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def test_a_model_whose_hooks_know_other_names_is_restored(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    old = _Renamed(2, 2)
    old.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update(kernel=state.pop("weight"))
    )
    TrainingRun(tmp_path, model=old).save()
    model = _Renamed(2, 2)
    TrainingRun(tmp_path, model=model)
    assert torch.equal(model.weight, old.weight)
