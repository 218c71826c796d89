"""Optimizers: steps that do not take place, states of others, and averages that are interrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusereg import optim
from fusereg.optim.averages import KEY

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "FTRL", "RMSprop", "NAdam", "Lion", "LAMB"]

# --- steps that do not take place -----------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty": {"l1": 1e-2, "l2": 0.1},
    "decoupled": {"l1": 1e-2, "prox": "decoupled"},
    "rows": {"group": 1e-2},
    "clipped": {"max_grad_norm": 0.5},
    "averages": {"ema_decay": 0.9},
    "masters and averages": {"master_weights": True, "ema_decay": 0.9, "l1": 1e-3},
}
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "Adam": {"amsgrad": True},
    "Adagrad": {"lr_decay": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "NAdam": {"momentum_decay": 0.1},
    "LAMB": {"always_adapt": True},
}


def state_after(
    name: str, options: dict[str, Any], dtype: torch.dtype, skipped: tuple[int, ...], doing: bool
) -> dict[Any, Tensor]:
    """Return all weights and states after scaled steps; the skipped ones are made or left out."""
    torch.manual_seed(0)
    params = [torch.randn(4, 3).to(dtype).requires_grad_(), torch.randn(5).to(dtype)]
    params[1].requires_grad_()
    optimizer = getattr(optim, name)(params, lr=0.05, **OWN_OPTIONS.get(name, {}), **options)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        grads = [(8 * torch.randn(p.shape, generator=generator)).to(dtype) for p in params]
        if step in skipped and not doing:
            continue
        params[0].grad, params[1].grad = grads[0], None if step == 4 else grads[1]
        if step in skipped:
            params[0].grad[0, 0] = float("nan" if step % 2 else "inf")
        optimizer.grad_scale = torch.tensor(8.0)
        optimizer.found_inf = torch.tensor(float(step in skipped))
        optimizer.step()
    found = {(i, k): v for i, p in enumerate(params) for k, v in optimizer.state[p].items()}
    return {**found, **dict(enumerate(p.detach() for p in params))}


@pytest.mark.parametrize("skipped", [(0, 1), (0, 3), (2,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_no_trace(
    name: str, options: str, dtype: torch.dtype, skipped: tuple[int, ...]
) -> None:
    """Neither in states nor in averages, which begin with the first step that takes place."""
    if name == "FTRL" and options in ("decoupled", "rows"):
        return
    wanted = state_after(name, OPTIONS[options], dtype, skipped, False)
    came = state_after(name, OPTIONS[options], dtype, skipped, True)
    assert came.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(came[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_step_leaves_the_next_one_the_first(name: str) -> None:
    """What was refused is mended, and training begins as if nothing had happened."""
    ends = []
    for refused in (False, True):
        p = torch.linspace(-1, 1, 6).requires_grad_()
        optimizer = getattr(optim, name)([p], lr=0.05, ema_decay=0.5, **OWN_OPTIONS.get(name, {}))
        if refused:
            p.grad_dtype = None
            p.grad = torch.ones(6, dtype=torch.complex64)
            with pytest.raises(ValueError, match="is complex"):
                optimizer.step()
        for _ in range(3):
            p.grad = torch.ones(6)
            optimizer.step()
        ends.append((p.detach(), optimizer.state[p][KEY]))
    for came, wanted in zip(*ends, strict=True):
        assert torch.equal(came, wanted)


# --- states of another optimizer ------------------------------------------------------------------

THEIRS = ("SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "Adamax", "Adadelta", "Rprop", "ASGD")
#: Whose states mean the same: moments, or sums of squares.
ALIKE = {
    *(("Adam", "AdamW"), ("Adam", "Lion"), ("Adam", "LAMB"), ("AdamW", "Adam"), ("AdamW", "Lion")),
    *(("AdamW", "LAMB"), ("LAMB", "Adam"), ("LAMB", "AdamW"), ("LAMB", "Lion"), ("NAdam", "Adam")),
    *(("NAdam", "AdamW"), ("NAdam", "LAMB"), ("NAdam", "Lion"), ("FTRL", "Adagrad")),
    *(("Adamax", "Lion"), ("Adadelta", "RMSprop")),
}


@pytest.mark.parametrize("own", NAMES)
def test_states_of_another_kind_of_optimizer_are_refused_and_nothing_changes(own: str) -> None:
    """They would be begun anew, with the other's count of steps."""
    sources: list[tuple[str, Any]] = [(n, getattr(optim, n)) for n in NAMES if n != own]
    sources += [(n, getattr(torch.optim, n)) for n in THEIRS if n != own]
    for name, of in sources:
        p = torch.ones(3, requires_grad=True)
        other = of([p], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        optimizer = getattr(optim, own)([p], lr=0.01, l1=0.5)
        for each in (other, optimizer):
            p.grad = torch.ones(3)
            each.step()
        before = copy.deepcopy(optimizer.state_dict())
        if (name, own) in ALIKE:
            optimizer.load_state_dict(other.state_dict())
            continue
        with pytest.raises(ValueError, match=r"^fusereg.optim.\w+.load_state_dict: the state of"):
            optimizer.load_state_dict(other.state_dict())
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for key, value in before["state"].get(0, {}).items():
            assert torch.equal(now["state"][0][key], value)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "LAMB"])
def test_moments_without_a_count_of_steps_are_refused(name: str) -> None:
    """As timm's Lamb and apex's optimizers save them: the corrections of both would begin anew."""
    p = torch.ones(3, requires_grad=True)
    optimizer = getattr(optim, name)([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["step"]
    state["param_groups"][0]["step"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"has exp_avg, .*but no step; is it another kind"):
        getattr(optim, name)([p], lr=0.1).load_state_dict(state)


def test_the_states_of_timms_lamb_are_refused() -> None:
    pytest.importorskip("other_libraries")
    p = torch.ones(3, requires_grad=True)
    theirs = pytest.importorskip("timm.optim").Lamb([p], lr=0.1)
    p.grad = torch.ones(3)
    theirs.step()
    with pytest.raises(ValueError, match="but no step"):
        optim.LAMB([p], lr=0.1).load_state_dict(theirs.state_dict())


def test_a_state_dict_of_the_optimizer_brings_no_weights_back() -> None:
    """Its masters are of other weights: the parameters count."""
    p, q = (torch.randn(9).bfloat16().requires_grad_() for _ in range(2))
    saved, other = (optim.SGD([t], lr=1e-3, momentum=0.9, master_weights=True) for t in (p, q))
    p.grad = torch.ones_like(p)
    saved.step()
    before = q.detach().clone()
    other.load_state_dict(saved.state_dict())
    assert torch.equal(q, before)
    other.param_groups[0]["lr"] = 0.0
    q.grad = torch.ones_like(q)
    other.step()
    assert torch.equal(q, before)
    assert torch.equal(other.state[q]["master_param"], before.float())


def test_what_users_keep_in_states_is_let_be() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([p], lr=0.1)
    optimizer.state[p].update(mask=torch.ones(3), step=torch.ones(()))
    again = optim.SGD([p], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["mask"], torch.ones(3))


# --- averages -------------------------------------------------------------------------------------


def averaging(**options: Any) -> tuple[nn.Module, optim.SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.5, ema_decay=0.5, **options)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("at", range(4))
def test_weights_come_back_where_the_averages_could_not_all_be_shown(at: int) -> None:
    model, optimizer = averaging()
    before = weights(model)
    p = list(model.parameters())[at]
    optimizer.state[p][KEY] = torch.ones(7)
    with pytest.raises(RuntimeError, match="size of tensor"), optimizer.averaged():
        pytest.fail("the block is not entered")
    assert all(map(torch.equal, weights(model), before))
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    optimizer.state[p][KEY] = p.detach().clone()
    optimizer.step()  # as averages are not shown


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_weights_come_back_from_averages_that_are_not_finite(
    value: float, keep_zeros: bool
) -> None:
    model, optimizer = averaging(l1=0.3)
    before = weights(model)
    for p in model.parameters():
        optimizer.state[p][KEY].view(-1)[0] = value
    with optimizer.averaged(keep_zeros=keep_zeros):
        pass
    assert all(map(torch.equal, weights(model), before))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_weights_come_back_however_a_validation_ends(error: type[BaseException]) -> None:
    model, optimizer = averaging()
    before = weights(model)

    def validate() -> None:
        with optimizer.averaged():
            assert not any(map(torch.equal, weights(model), before))
            raise error

    with pytest.raises(error):
        validate()
    assert all(map(torch.equal, weights(model), before))


def test_buffers_are_not_averaged() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = optim.SGD(model.parameters(), lr=0.5, ema_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    before, raw = copy.deepcopy(dict(model.named_buffers())), weights(model)
    with optimizer.averaged():
        torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0.0, atol=0.0)
        assert not torch.equal(model[0].weight, raw[0])
