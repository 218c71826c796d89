"""Optimizers of sharded models: each rank steps its shards, and the whole is that of one process.

As in test_dtensor.py, one program for each number of gloo processes runs all checks.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fusereg import optim
from ranks import Ranks, collect, fully_shard, on
from sharded import assert_same, assert_value, make_cases, shard, whole

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "l1": 0.1, "ema_decay": 0.7}),
    ("AdamW", {"lr": 0.1, "l1": 0.1, "l2": 0.2, "prox": "preconditioned"}),
    ("AdamW", {"lr": 0.1, "l1": 0.1, "group": 0.1}),
    ("Adagrad", {"lr": 0.1, "group": 0.1, "prox": False}),
    ("FTRL", {"lr": 0.1, "l1": 0.1, "ema_decay": 0.7}),
    ("LAMB", {"lr": 0.1, "l1": 0.1, "max_grad_norm": 1.0}),
]


def give_grads(held: list[Tensor], plain: list[Tensor], ranks: Ranks) -> None:
    for p, q in zip(held, plain, strict=True):
        g = torch.randn(q.shape, dtype=q.dtype)
        q.grad = g.clone()
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(g, ranks.mesh, p.placements)
        else:
            p.grad = g


@on(2, 3)
def steps_are_those_of_the_whole(ranks: Ranks) -> None:
    for name, options in OPTIONS:
        cases = make_cases(ranks)
        held = [c.held for c in cases]
        plain = [c.whole.clone().requires_grad_() for c in cases]
        ours = getattr(optim, name)(held, **options)
        theirs = getattr(optim, name)(plain, **options)
        for _ in range(3):
            give_grads(held, plain, ranks)
            ours.step()
            theirs.step()
            assert_value(ours.penalty_value, theirs.penalty_value, 1e-12)
        for p, q in zip(held, plain, strict=True):
            assert_same(whole(p), q, 1e-12)
            for key in (*ours._keys, "ema_param"):
                if key in ours.state[p]:
                    assert isinstance(ours.state[p][key], DTensor) == isinstance(p, DTensor)
            if "ema_decay" in options:
                assert_same(whole(ours.state[p]["ema_param"]), theirs.state[q]["ema_param"], 1e-6)


@on(2, 3)
def norms_are_those_of_the_whole(ranks: Ranks) -> None:
    for norm_type in (1.0, 2.0, float("inf")):
        cases = make_cases(ranks, columns=True)
        held = [c.held for c in cases]
        plain = [c.whole.clone().requires_grad_() for c in cases]
        give_grads(held, plain, ranks)
        wanted = optim.clip_grad_norm_(plain, 0.5, norm_type)
        assert_value(optim.clip_grad_norm_(held, 0.5, norm_type), wanted, 1e-12)
        for p, q in zip(held, plain, strict=True):
            assert q.grad is not None
            assert_same(whole(p.grad), q.grad, 1e-12)


@on(2, 3)
def units_are_clipped_as_those_of_the_whole(ranks: Ranks) -> None:
    """Whatever of a unit lies on other ranks: a bias as a whole, a column of rows."""
    cases = make_cases(ranks, columns=True)
    held = [c.held for c in cases]
    plain = [c.whole.clone().requires_grad_() for c in cases]
    models: list[nn.Module] = []
    for sharded in (True, False):
        turned = nn.ConvTranspose1d(4, 3, 2).double()  # its outputs are dimension 1
        with torch.no_grad():
            for p in turned.parameters():
                p.copy_(torch.arange(p.numel()).view_as(p) / 7 - 1)
        if sharded:
            for name, p in list(turned.named_parameters()):
                turned.register_parameter(name, nn.Parameter(shard(p.detach(), ranks, Shard(0))))
        models.append(turned)
    held_too, plain_too = (list(m.parameters()) for m in models)
    give_grads([*held, *held_too], [*plain, *plain_too], ranks)
    for some, model in zip((held, plain), models, strict=True):
        optim.adaptive_clip_grad_(some, 0.1)
        optim.adaptive_clip_grad_(model, 0.1)
    for p, q in zip([*held, *held_too], [*plain, *plain_too], strict=True):
        assert q.grad is not None
        assert_same(whole(p.grad), q.grad, 1e-12)


@on(2)
def states_that_kernels_cannot_take_are_updated_too(ranks: Ranks) -> None:
    """Counts that were loaded as integers, and states in another memory order."""
    first = torch.randn(4, 6, dtype=torch.float64)
    ours, theirs = shard(first, ranks, Shard(0)).requires_grad_(), first.clone().requires_grad_()
    optimizers = [optim.AdamW([p], lr=0.1, l1=0.01) for p in (ours, theirs)]
    for step in range(4):
        give_grads([ours], [theirs], ranks)
        for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            state = optimizer.state[p]
            if step == 0:
                state["step"] = state["step"].long()
                average = state["exp_avg"]
                if isinstance(average, DTensor):
                    local = average.to_local().t().contiguous().t()
                    state["exp_avg"] = DTensor.from_local(local, ranks.mesh, average.placements)
    assert int(optimizers[0].state[ours]["step"]) == 4
    assert_same(whole(ours), theirs, 1e-12)


@on(2)
def clipping_inside_the_step(ranks: Ranks) -> None:
    cases = make_cases(ranks)
    held = [c.held for c in cases]
    plain = [c.whole.clone().requires_grad_() for c in cases]
    ours = optim.SGD(held, lr=0.1, max_grad_norm=0.3)
    theirs = optim.SGD(plain, lr=0.1, max_grad_norm=0.3)
    give_grads(held, plain, ranks)
    ours.step()
    theirs.step()
    for p, q in zip(held, plain, strict=True):
        assert_same(whole(p), q, 1e-6)


@on(2)
def groups_that_are_cut_are_refused(ranks: Ranks) -> None:
    p = shard(torch.randn(3, 7), ranks, Shard(1)).requires_grad_()
    before = whole(p).clone()
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="is sharded along dimension 1, which cuts its groups"):
        optim.SGD([p], lr=0.1, group=0.1).step()
    assert torch.equal(whole(p), before)


@on(2)
def fsdp_models_train_as_one_process_does(ranks: Ranks) -> None:
    assert fully_shard is not None
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    same = copy.deepcopy(model)
    fully_shard(model, mesh=ranks.mesh)
    options: dict[str, Any] = {"lr": 0.05, "l1": 0.01, "group": 0.01, "ema_decay": 0.5}
    ours = optim.AdamW(model.parameters(), **options)
    theirs = optim.AdamW(same.parameters(), **options)
    for _ in range(3):
        x = torch.randn(8, 6)
        for network, optimizer in ((model, ours), (same, theirs)):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        assert_value(ours.penalty_value, theirs.penalty_value, 1e-5)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert_same(whole(p), q, 1e-5)
    saved = ours.state_dict()
    trained = [whole(p).clone() for p in model.parameters()]
    with ours.averaged(model), theirs.averaged():
        assert_value(model(x).square().mean(), same(x).square().mean(), 1e-5)
        for p, q in zip(model.parameters(), same.parameters(), strict=True):
            assert_same(whole(p), q, 1e-5)
    for p, q in zip(model.parameters(), trained, strict=True):
        assert torch.equal(whole(p), q)
    with pytest.raises(ValueError, match=r"averaged: model must be given with DTensors"):
        ours.averaged().__enter__()
    assert isinstance(saved["state"][0]["exp_avg"], DTensor)
    ours.load_state_dict(saved)
    ours.step()


@on(2)
def states_travel_as_full_and_as_sharded_state_dicts(ranks: Ranks) -> None:
    """FTRL's record of its last step and the averages too."""
    from torch.distributed.checkpoint import state_dict as dcp

    assert fully_shard is not None
    found = []
    for how in (None, dcp.StateDictOptions(), dcp.StateDictOptions(full_state_dict=True)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
        fully_shard(model, mesh=ranks.mesh)
        options: dict[str, Any] = {"lr": 0.05, "l1": 0.3, "l2": 0.1, "ema_decay": 0.5}
        optimizer = optim.FTRL(model.parameters(), **options)
        for turn in range(4):
            x = torch.randn(8, 6)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if turn == 1 and how is not None:
                saved = dcp.get_optimizer_state_dict(model, optimizer, options=how)
                optimizer.zero_grad()  # torch makes no states to load into otherwise
                optimizer = optim.FTRL(model.parameters(), **options)
                dcp.set_optimizer_state_dict(model, optimizer, saved, options=how)
        states = [optimizer.state[p] for p in model.parameters()]
        found.append([whole(s[key]).clone() for s in states for key in sorted(s)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


# --- the tests ----------------------------------------------------------------------------------


test_ranks = collect(__name__)
