"""What is changed between the steps of an optimizer: param groups, and weights kept twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import Backend
from fusereg import optim
from test_optim_state import LOW, NAMES, SCHEDULES, STEPS, assert_close, random
from test_optim_torch import OWN, PAIRS, assert_same, copies, give_grads, params_of


def a_rate(group: dict[str, Any]) -> None:
    group["lr"] = 0.02


def a_rate_in_place(group: dict[str, Any]) -> None:
    group["lr"] = torch.tensor(0.02) if not isinstance(group["lr"], Tensor) else group["lr"].mul_(2)


def a_number_of_numpy(group: dict[str, Any]) -> None:
    group["lr"] = np.float32(0.02)


def a_list(group: dict[str, Any]) -> None:
    if isinstance(group.get("betas"), list):
        group["betas"][0] *= 0.9
    elif "betas" in group:
        group["betas"] = list(group["betas"])


def a_decay(group: dict[str, Any]) -> None:
    group["weight_decay"] += 0.1


def a_flag(group: dict[str, Any]) -> None:
    group["maximize"] = not group["maximize"]


CHANGES = [a_rate, a_rate_in_place, a_number_of_numpy, a_list, a_decay, a_flag]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_change_of_a_group_is_seen_by_the_next_step(
    name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    mine = params_of((5, 3), (4,), (3, 2))
    other = copies(mine)
    optimizers = []
    for params, library in ((mine, optim), (other, torch.optim)):
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizers.append(getattr(library, name)(groups, **PAIRS[name]))
    for step in range(9):
        give_grads(mine, other)
        for optimizer in optimizers:
            if step in (2, 3, 4, 7):
                change(optimizer.param_groups[step % 2])
            if step == 5:  # the groups' places, too
                optimizer.param_groups.reverse()
            optimizer.step()
        assert_same(mine, other, 2e-6)


def test_after_a_strength_that_is_refused_the_others_are_those_of_now() -> None:
    p, q = params_of((3,), (3,))
    optimizer = optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1, l1=0.01)
    first, second = optimizer.param_groups
    with torch.no_grad():
        for w in (p, q):
            w.fill_(1.0)
            w.grad = torch.zeros(3)
    optimizer.step()
    first["l1"], second["l1"] = 0.5, -1.0
    with pytest.raises(ValueError, match="l1"):
        optimizer.step()
    second["l1"] = 0.01
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1.0 - 0.1 * 0.51))
    torch.testing.assert_close(q.detach(), torch.full((3,), 1.0 - 0.1 * 0.02))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, np.array])
@pytest.mark.parametrize("name", OWN)
def test_numbers_may_be_numpys(name: str, kind: Callable[[float], Any]) -> None:
    mine = params_of((5, 3))
    other = copies(mine)
    options: dict[str, Any] = {**OWN[name], "lr": 1.0, "weight_decay": 2.0}
    given = {k: kind(v) if k in ("lr", "weight_decay") else v for k, v in options.items()}
    optimizers = [
        getattr(optim, name)(params, **how) for params, how in ((mine, given), (other, options))
    ]
    for _ in range(3):
        give_grads(mine, other)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(mine, other)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", NAMES)
def test_clipping_averages_and_masters_follow_a_schedule(name: str, schedule: str) -> None:
    """Beside a plain float32 step of the clipped gradients, averaged by torch."""
    options = {"lr": 0.1, "weight_decay": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    plain = torch.randn(50).bfloat16().float().requires_grad_()
    p = plain.detach().bfloat16().requires_grad_()
    together = {"max_grad_norm": 2.0, "ema_decay": 0.9, "master_weights": True}
    optimizers = [
        getattr(optim, name)([p], **options, **together),
        getattr(optim, name)([plain], **options),
    ]
    schedulers = [SCHEDULES[schedule](optimizer) for optimizer in optimizers]
    average = None
    for _ in range(STEPS):
        p.grad = torch.randn_like(p)
        plain.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_([plain], 2.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
        now = plain.detach()
        average = now.clone() if average is None else torch.lerp(average, now, 0.1)
        state = optimizers[0].state[p]
        assert_close(state["master_param"], now)
        assert torch.equal(p.detach(), state["master_param"].bfloat16())
        assert_close(state["ema_param"], average)


@pytest.mark.parametrize("weight", [1.0, 0.0, -0.0, math.inf])
@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
def test_a_weight_is_taken_for_a_master_that_is_not_a_number(
    backend: Backend, dtype: torch.dtype, weight: float
) -> None:
    """Whatever the bits of the NaN, whose rounding may look like a number."""
    p = random(backend, 37, dtype=dtype)
    optimizer = optim.SGD([p], lr=0.5, master_weights=True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32)
    nan = bits.repeat(10)[:37].view(torch.float32).to(p.device)
    optimizer.state[p]["master_param"].copy_(nan)
    with torch.no_grad():
        p.fill_(weight)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, weight))
    assert torch.equal(optimizer.state[p]["master_param"], torch.full_like(nan, weight))
    optimizer.state[p]["master_param"].copy_(nan)
    with torch.no_grad():
        p.fill_(math.nan)
    optimizer.step()
    assert p.isnan().all()
