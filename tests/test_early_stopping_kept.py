"""What early stopping keeps of a best epoch and brings back: tensors, optimizers, other objects."""

from __future__ import annotations

import copy
import io
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fusereg import EarlyStopping
from stopping_cases import Odd, fill, holds

# --- what is kept ---------------------------------------------------------------------------------


def test_shared_tensors_are_copied_once() -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=2)
    stopper.step(1.0, epoch=0)
    kept = stopper.state_dict()["best"]["states"]["model"]
    assert kept["first.weight"] is kept["second.weight"]
    assert kept["first.weight"].data_ptr() != model.first.weight.data_ptr()
    assert not kept["first.weight"].requires_grad
    assert kept["conv.weight"].stride() == model.conv.weight.stride()
    assert kept["few"].dtype == torch.bfloat16
    assert isinstance(kept, OrderedDict)
    assert kept._metadata["norm"] == {"version": 2}  # type: ignore[attr-defined]


def test_overlapping_views_and_expanded_tensors_come_back() -> None:
    model = nn.Module()
    flat = torch.arange(6.0)
    model.register_buffer("all", flat)
    model.register_buffer("part", flat[2:4])
    model.register_buffer("wide", torch.ones(1, 3).expand(4, 3).clone().t())
    stopper = EarlyStopping(model, patience=2)
    stopper.step(1.0, epoch=0)
    wanted = {name: b.clone() for name, b in model.named_buffers()}
    flat.zero_()
    model.get_buffer("wide").zero_()
    stopper.restore()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, wanted[name])
    assert model.get_buffer("part").data_ptr() == flat[2:].data_ptr()


def test_a_buffer_that_grew_or_went_comes_back() -> None:
    model = Odd()
    stopper = EarlyStopping(model, patience=2)
    fill(model, 1)
    stopper.step(1.0, epoch=0)
    model.cache = torch.zeros(5)
    stopper.restore()
    assert torch.equal(model.cache, torch.ones(2))


Make = Callable[[nn.Module], tuple[torch.optim.Optimizer, Any]]


def sgd_multistep(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3])


def adam_plateau(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def adam_onecycle(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.Adam([{"params": model.parameters(), "lr": torch.tensor(0.1)}])
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)


def continued(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, ema: AveragedModel, n: int
) -> torch.Tensor:
    for _ in range(n):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()
    parts = [p.detach().flatten().float() for m in (model, ema) for p in m.parameters()]
    return torch.cat(parts)


@pytest.mark.parametrize("make", [sgd_multistep, adam_plateau, adam_onecycle])
@pytest.mark.parametrize("how", ["cpu", "device", "state_dict", "disk", "folder"])
def test_training_goes_on_from_the_best_as_it_did_the_first_time(
    make: Make, how: Any, tmp_path: Any
) -> None:
    """Model, optimizer, scheduler, average and random numbers: all of it, or the steps differ.

    Twice, as an optimizer that is given a snapshot's own tensors trains on inside the snapshot.
    """
    options: dict[str, Any] = {"snapshot": how if how in ("cpu", "device", "disk") else "cpu"}
    if how in ("disk", "folder"):
        options["folder"] = tmp_path

    def build() -> tuple[Any, ...]:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer, scheduler = make(model)
        return model, optimizer, scheduler, AveragedModel(model)

    def stop(parts: tuple[Any, ...], **more: Any) -> EarlyStopping:
        model, optimizer, scheduler, ema = parts
        also = {"optimizer": optimizer, "scheduler": scheduler, "ema": ema}
        return EarlyStopping(model, patience=2, also=also, rng=True, **options, **more)

    parts = build()
    stopper = stop(parts)
    continued(*parts, 2)
    stopper.step(1.0, epoch=0)
    wanted = continued(*parts, 5)
    for _ in range(2):
        if how == "state_dict":
            file = io.BytesIO()
            torch.save(stopper.state_dict(), file)
            file.seek(0)
            parts = build()
            stopper = stop(parts)
            stopper.load_state_dict(torch.load(file, weights_only=True))
        elif how == "folder":
            parts = build()
            stopper = stop(parts, resume=True)
        assert stopper.restore() == 0
        assert torch.equal(continued(*parts, 5), wanted)


def test_under_inference_mode_training_can_go_on_afterwards() -> None:
    """Where a validation function is decorated with it, step() and restore() may be inside."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    parts = (model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), AveragedModel(model))
    continued(*parts, 2)
    stopper = EarlyStopping(model, patience=2, also={"optimizer": optimizer})
    with torch.inference_mode():
        stopper.step(torch.ones(()), epoch=0)
        assert stopper.restore() == 0
    continued(*parts, 2)
    assert stopper.restore() == 0
    continued(*parts, 2)


def test_a_gradient_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    stopper = EarlyStopping(patience=2, also={"scaler": scaler})
    scaler.scale(torch.ones(()))
    stopper.step(1.0, epoch=0)
    scaler.update(2.0)
    assert scaler.get_scale() == 2.0
    stopper.restore()
    assert scaler.get_scale() == 64.0


def test_plain_objects_come_back_with_their_types() -> None:
    class Thing:
        def __init__(self) -> None:
            self.state: Any = {
                "counter": Counter({3: 2}),
                "tuple": (1, [2.5, None]),
                "nested": {1: {"t": torch.ones(2)}},
            }

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    thing = Thing()
    stopper = EarlyStopping(patience=2, also={"thing": thing})
    stopper.step(1.0, epoch=0)
    mine = thing.state
    mine["counter"][3] = 0
    mine["nested"][1]["t"].zero_()
    mine["tuple"][1][0] = 0.0
    for _ in range(2):
        stopper.restore()
        assert thing.state is not mine
        assert thing.state["counter"] == Counter({3: 2})
        assert type(thing.state["counter"]) is Counter
        assert thing.state["tuple"] == (1, [2.5, None])
        assert torch.equal(thing.state["nested"][1]["t"], torch.ones(2))
        thing.state["nested"][1]["t"].zero_()


def test_wrappers_are_looked_through() -> None:
    """So that a checkpoint made under a wrapper loads without it."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    model = nn.Linear(2, 2)
    stopper = EarlyStopping(Wrapper(model), patience=2)
    stopper.step(1.0, epoch=0)
    assert list(stopper.state_dict()["best"]["states"]["model"]) == ["weight", "bias"]
    fill(model, 5)
    stopper.restore()
    assert not holds(model, 5)


def test_a_tensor_without_values_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    stopper = EarlyStopping(model, patience=2)
    with pytest.raises(ValueError, match="a tensor on the meta device has no values to keep"):
        stopper.step(1.0, epoch=0)
    assert stopper.epoch is None


def test_a_state_of_other_companions_is_refused() -> None:
    model = nn.Linear(2, 2)
    first = EarlyStopping(model, patience=2)
    first.step(1.0, epoch=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    second = EarlyStopping(model, patience=2, also={"optimizer": optimizer})
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(model.state_dict())
    fill(model, 3)
    with pytest.raises(ValueError, match="epoch 0 holds nothing for optimizer; it has model"):
        second.restore()
    assert holds(model, 3)
    first.restore()
    assert torch.equal(model.weight, before["weight"])


def test_a_loaded_state_is_a_copy() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = EarlyStopping(model, patience=2), EarlyStopping(other, patience=2)
    fill(model, 1)
    first.step(1.0, epoch=0)
    state = first.state_dict()
    second.load_state_dict(state)
    state["best"]["states"]["model"]["weight"].zero_()
    second.restore()
    assert holds(other, 1)
    third = EarlyStopping(other, patience=2)
    third.load_state_dict(first.state_dict(snapshot=False))
    assert (third.best_epoch, third.restore()) == (0, None)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_a_model_on_a_gpu(place: Any) -> None:
    model = Odd().cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    stopper = EarlyStopping(model, patience=2, snapshot=place, also={"optimizer": optimizer})
    fill(model, 1)
    stopper.step(torch.tensor(1.0, device="cuda"), epoch=0)
    kept = stopper.state_dict()["best"]["states"]["model"]["first.weight"]
    assert kept.device.type == ("cpu" if place == "cpu" else "cuda")
    fill(model, 2)
    assert stopper.restore() == 0
    assert holds(model, 1)
    assert next(model.parameters()).is_cuda
