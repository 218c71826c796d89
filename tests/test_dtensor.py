"""Sharded models: every penalty of a DTensor is that of the whole tensor, on every rank.

One program each of 2, 3 and 4 gloo processes runs all checks for that number of processes, because
starting processes costs more than the checks. Each check is a function of the ``Ranks``; pytest
shows it as a test of its own. References are whole tensors, made by every rank from the same seed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fusereg
import reference
from fusereg import WeightPenalty
from fusereg import functional as F
from ranks import Ranks, collect, fully_shard, on
from sharded import (
    PENALTIES,
    assert_same,
    assert_value,
    counted_reductions,
    make_cases,
    shard,
    whole,
)

# --- functions ----------------------------------------------------------------------------------


@on(2, 3)
def values_and_gradients_of_each(ranks: Ranks) -> None:
    for name, penalty, strengths in PENALTIES:
        for case in make_cases(ranks, columns=name != "group"):
            value = penalty(case.held)
            assert value.dtype is torch.float64
            assert_value(value, reference.penalty(case.whole, **strengths))
            (3 * value).backward()
            grad = case.held.grad
            if isinstance(case.held, DTensor):
                assert isinstance(grad, DTensor), f"{name}, {case.name}"
                assert grad.placements == case.held.placements
            assert_same(whole(grad), 3 * reference.gradient(case.whole, **strengths))


@on(2, 3)
def values_and_gradients_of_the_list(ranks: Ranks) -> None:
    for name, penalty, strengths in PENALTIES:
        cases = make_cases(ranks, columns=name != "group")
        with counted_reductions() as reductions:
            value = penalty(c.held for c in cases)
        assert reductions == [1], "one all-reduce of one number for all tensors of a mesh"
        assert_value(value, reference.total([c.whole for c in cases], **strengths))
        (0.5 * value).backward()
        for case in cases:
            wanted = 0.5 * reference.gradient(case.whole, **strengths)
            assert_same(whole(case.held.grad), wanted)


@on(2)
def values_of_every_dtype(ranks: Ranks) -> None:
    everything = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases = make_cases(ranks, dtype)
        everything += cases
        value = F.elastic_net_penalty([c.held for c in cases], 0.3, 0.7)
        assert value.dtype is torch.float32
        wanted = reference.total([c.whole for c in cases], l1=0.3, l2=0.7)
        assert_value(value, wanted, 1e-6)
        value.backward()
        for case in cases:
            assert case.held.grad is not None
            assert case.held.grad.dtype is dtype
    everything += make_cases(ranks)
    value = F.l1_penalty([c.held for c in everything], 0.3)
    assert value.dtype is torch.float64
    assert_value(value, reference.total([c.whole for c in everything], l1=0.3), 1e-6)


@on(2)
def values_without_a_graph(ranks: Ranks) -> None:
    cases = make_cases(ranks)
    wanted = reference.total([c.whole for c in cases], l1=0.3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = F.l1_penalty([c.held for c in cases], 0.3)
            assert not value.requires_grad
            assert_value(value.clone(), wanted)
    frozen = [c.held.detach() for c in cases]
    value = F.l1_penalty(frozen, 0.3)
    assert not value.requires_grad
    assert_value(value, wanted)


@on(2)
def strengths_per_tensor_and_repeated_tensors(ranks: Ranks) -> None:
    a = torch.randn(5, 3, dtype=torch.float64)
    b = torch.randn(3, 4, dtype=torch.float64)
    x, y = shard(a, ranks, Shard(0)), shard(b, ranks, Shard(1))
    plain = torch.randn(3, dtype=torch.float64)
    value = F.elastic_net_penalty([x, plain, y, x], [0.1, 0.2, 0.3, 0.1], 0.5)
    wanted = reference.penalty(a, l1=0.1, l2=0.5) + reference.penalty(b, l1=0.3, l2=0.5)
    assert_value(value, wanted + reference.penalty(plain, l1=0.2, l2=0.5))
    # The group term of rows, where only the tensor with whole rows has one.
    value = fusereg.add_penalty_grad_([x, y], l1=0.1, group=[0.5, 0.0])
    assert_value(value, reference.penalty(a, l1=0.1, group=0.5) + reference.penalty(b, l1=0.1))


@on(2)
def second_derivative(ranks: Ranks) -> None:
    w = torch.randn(5, 3, dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for x, y in ((w.clone(), v), (shard(w, ranks, Shard(0)), shard(v, ranks, Shard(0)))):
        x.requires_grad_()
        value = F.l2_penalty(x, 0.3) + F.group_lasso_penalty(x, 0.2)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(grad, x, y)
        results.append(whole(second))
    assert_same(results[1], results[0])


@on(2, 3)
def add_penalty_grad(ranks: Ranks) -> None:
    scales: list[Any] = [None, 8.0, torch.tensor(8.0)]
    for scale in scales:
        for strengths in ({"l1": 0.3, "l2": 0.7}, {"l1": 0.3, "group": 0.5}):
            cases = make_cases(ranks, columns="group" not in strengths)
            before = []
            for i, case in enumerate(cases):
                old = torch.randn_like(case.whole)
                if i % 3 == 0:  # a missing gradient is made
                    old.zero_()
                elif isinstance(case.held, DTensor):
                    case.held.grad = shard(old, ranks, case.held.placements[0])
                else:
                    case.held.grad = old.clone()
                if i % 4 == 3:
                    case.held.requires_grad_(False)
                before.append(old)
            kept = [c.held.grad for c in cases]
            with counted_reductions() as reductions:
                value = fusereg.add_penalty_grad_(
                    [c.held for c in cases], **strengths, grad_scale=scale
                )
            assert reductions == [1]
            assert not value.requires_grad
            assert_value(value, reference.total([c.whole for c in cases], **strengths))
            factor = 1.0 if scale is None else 8.0
            for case, old, grad in zip(cases, before, kept, strict=True):
                assert_same(whole(case.held), case.whole, 0.0)
                if not case.held.requires_grad:
                    assert case.held.grad is grad
                    if grad is not None:
                        assert_same(whole(grad), old, 0.0)
                    continue
                assert grad is None or case.held.grad is grad, "gradients are added to in place"
                if isinstance(case.held, DTensor):
                    assert isinstance(case.held.grad, DTensor)
                    assert case.held.grad.placements == case.held.placements
                wanted = old + factor * reference.gradient(case.whole, **strengths)
                assert_same(whole(case.held.grad), wanted)


@on(2, 3)
def proximal_steps(ranks: Ranks) -> None:
    steps: list[tuple[Callable[[Any], None], dict[str, float]]] = [
        (lambda p: fusereg.prox.l1_(p, 0.6), {"l1": 0.6}),
        (lambda p: fusereg.prox.elastic_net_(p, 0.6, 0.7), {"l1": 0.6, "l2": 0.7}),
        (lambda p: fusereg.prox.group_lasso_(p, 0.9), {"group": 0.9}),
    ]
    for step, strengths in steps:
        cases = make_cases(ranks, columns="group" not in strengths)
        with counted_reductions() as reductions:
            step(c.held for c in cases)
        assert reductions == []
        for case in cases:
            wanted = reference.prox(case.whole, **strengths)
            found = whole(case.held)
            assert_same(found, wanted)
            assert torch.equal(found == 0, wanted == 0), case.name
            assert not found[found == 0].signbit().any()
            assert case.held.grad is None
            if case.name in ("replicated", "even"):
                assert (found == 0).any()


@on(2)
def columns_as_groups(ranks: Ranks) -> None:
    """Groups along dimension 1 are whole where that dimension is sharded."""
    w = torch.randn(4, 5, dtype=torch.float64)
    for dim in (1, -1):
        for placement in (Shard(1), Shard(-1), Replicate()):
            x = shard(w, ranks, placement).requires_grad_()
            value = F.group_lasso_penalty(x, 0.5, dim=dim)
            assert_value(value, reference.penalty(w, group=0.5, dim=1))
            value.backward()
            assert_same(whole(x.grad), reference.gradient(w, group=0.5, dim=1))
            fusereg.prox.group_lasso_(x, 0.9, dim=dim)
            assert_same(whole(x), reference.prox(w, group=0.9, dim=1))


@on(2)
def autograd_learns_of_proximal_steps(ranks: Ranks) -> None:
    """As with any in-place change: what a graph has saved must not be used when it is no more."""
    x = shard(torch.randn(4, 3), ranks, Shard(0)).requires_grad_()
    loss = x.square().sum()
    fusereg.prox.l1_(x, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on(2, 3)
def sparsity(ranks: Ranks) -> None:
    cases = make_cases(ranks, torch.float32, columns=True)
    for case in cases:
        with torch.no_grad():
            case.whole[torch.rand_like(case.whole) < 0.3] = 0.0
            if isinstance(case.held, DTensor):
                case.held.copy_(shard(case.whole, ranks, case.held.placements[0]))
            else:
                case.held.copy_(case.whole)
        zeros = (case.whole == 0).sum().item()
        assert fusereg.sparsity(case.held) == zeros / max(case.whole.numel(), 1)
    zeros = sum(int((c.whole == 0).sum()) for c in cases)
    with counted_reductions() as reductions:
        found = fusereg.sparsity([c.held for c in cases])
    assert reductions == [1]
    assert found == zeros / sum(c.whole.numel() for c in cases)


# --- what is refused ----------------------------------------------------------------------------


def all_calls(x: Any, **strengths: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "add_penalty_grad_", lambda: fusereg.add_penalty_grad_(x, **strengths)
    if "group" in strengths:
        yield "group_lasso_penalty", lambda: F.group_lasso_penalty(x, 0.5)
        yield r"prox\.group_lasso_", lambda: fusereg.prox.group_lasso_(x, 0.5)
    else:
        yield "elastic_net_penalty", lambda: F.elastic_net_penalty(x, 0.5, 0.5)
        yield r"prox\.elastic_net_", lambda: fusereg.prox.elastic_net_(x, 0.5, 0.5)
        yield "sparsity", lambda: fusereg.sparsity(x)


@on(2)
def sharding_that_cuts_groups_is_refused(ranks: Ranks) -> None:
    plain = torch.randn(3, 3).requires_grad_()
    w = torch.randn(4, 6)
    for placement in (Shard(1), Shard(-1)):
        x = shard(w, ranks, placement).requires_grad_()
        before = plain.detach().clone()
        for op, call in all_calls([plain, x], l1=0.5, group=0.5):
            said = rf"^fusereg\.{op}: params\[1\] is sharded along dimension 1, .*along dimension 0"
            with pytest.raises(ValueError, match=said):
                call()
        with pytest.raises(
            ValueError, match=r"params\[0\] is sharded along dimension 0, which cuts"
        ):
            F.group_lasso_penalty(shard(w, ranks, Shard(0)), 0.5, dim=1)
        assert plain.grad is None
        assert x.grad is None
        assert torch.equal(plain, before)
        assert torch.equal(whole(x), w)


@on(2)
def partial_is_refused(ranks: Ranks) -> None:
    plain = torch.randn(3, 3).requires_grad_()
    before = plain.detach().clone()
    x = DTensor.from_local(torch.randn(4, 3), ranks.mesh, [Partial()])
    for op, call in all_calls([plain, x], l1=0.5):
        said = rf"^fusereg\.{op}: params\[1\] is a DTensor with placement .*redistribute it"
        with pytest.raises(ValueError, match=said):
            call()
    assert plain.grad is None
    assert torch.equal(plain, before)


@on(2)
def what_is_no_parameter_is_refused(ranks: Ranks) -> None:
    """With its index in the list, as without DTensors, and before any gradient is written."""
    x = shard(torch.randn(4, 3), ranks, Shard(0)).requires_grad_()
    plain = torch.randn(3).requires_grad_()
    cases: list[tuple[Any, type[Exception], str]] = [
        ("weight", TypeError, r"params\[2\] must be a torch\.Tensor, got str"),
        (("weight", plain), TypeError, r"params\[2\] must be .*got tuple; pass parameters\(\)"),
        (torch.randn(2, dtype=torch.complex64), ValueError, r"params\[2\] is complex"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"params\[2\] has dtype torch\.int64"),
        (torch.randn(2, 2).to_sparse(), ValueError, r"params\[2\] is sparse"),
        (plain * 2, ValueError, r"params\[2\] is not a leaf"),
        (x * 2, ValueError, r"params\[2\] is not a leaf"),
    ]
    for wrong, error, said in cases:
        with pytest.raises(error, match=rf"^fusereg\.add_penalty_grad_: {said}"):
            fusereg.add_penalty_grad_([plain, x, wrong], l1=0.5)
        if "leaf" not in said:
            with pytest.raises(error, match=rf"^fusereg\.l1_penalty: {said}"):
                F.l1_penalty([plain, x, wrong], 0.5)
        assert plain.grad is None
        assert x.grad is None
    for call in (F.l1_penalty, fusereg.prox.l1_):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            call([plain, x], -1.0)
        with pytest.raises(ValueError, match="one number or 2 of them"):
            call([plain, x], [1.0, 2.0, 3.0])


@on(2)
def gradients_placed_otherwise_are_refused(ranks: Ranks) -> None:
    plain = torch.randn(3).requires_grad_()
    plain.grad = torch.ones(3)
    x = shard(torch.randn(4, 3), ranks, Shard(0)).requires_grad_()
    x.grad = shard(torch.ones(4, 3), ranks, Replicate())
    said = (
        r"^fusereg\.add_penalty_grad_: params\[1\]\.grad must be a DTensor placed as its parameter"
    )
    with pytest.raises(ValueError, match=said):
        fusereg.add_penalty_grad_([plain, x], l1=0.5)
    assert torch.equal(plain.grad, torch.ones(3))
    assert torch.equal(whole(x.grad), torch.ones(4, 3))


@on(2)
def gradients_are_all_checked_before_one_is_written(ranks: Ranks) -> None:
    plain = torch.randn(2, 3).requires_grad_()
    plain.grad = torch.ones(2, 3)
    x = shard(torch.randn(4, 3), ranks, Shard(0)).requires_grad_()
    x.grad = shard(torch.ones(4, 3), ranks, Shard(0))
    missing = shard(torch.randn(4, 3), ranks, Shard(0)).requires_grad_()
    expanded = torch.randn(3).requires_grad_()
    expanded.grad = torch.ones(()).expand(3)
    shared = torch.randn(2, 3).requires_grad_()
    shared.grad = x.grad.to_local()
    for wrong, said in ((expanded, r"params\[3\]\.grad"), (shared, r"params\[1\].*params\[3\]")):
        with pytest.raises(ValueError, match=rf"^fusereg\.add_penalty_grad_: {said}"):
            fusereg.add_penalty_grad_([plain, x, missing, wrong], l1=0.5)
        assert torch.equal(plain.grad, torch.ones(2, 3))
        assert torch.equal(whole(x.grad), torch.ones(4, 3))
        assert missing.grad is None


# --- models -------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    """Return a model with rows that no number of ranks divides, a one-row layer and a LayerNorm."""
    return nn.Sequential(
        nn.Linear(6, 13), nn.LayerNorm(13), nn.Tanh(), nn.Linear(13, 1), nn.Linear(1, 5)
    ).double()


ARGUMENTS: dict[str, Any] = {
    "l1": 1e-3,
    "l2": 1e-2,
    "group": 1e-3,
    "rules": {"3.*": {"l1": 5e-3, "group": 0.0}},
}


def distributed(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return a copy with every second weight sharded, the others replicated, biases plain."""
    copied = copy.deepcopy(model)
    for i, module in enumerate(m for m in copied.modules() if isinstance(m, nn.Linear)):
        placement = Shard(0) if i % 2 == 0 else Replicate()
        module.weight = nn.Parameter(shard(module.weight.detach(), ranks, placement))
    return copied


@on(2, 3)
def weight_penalty_of_a_sharded_model(ranks: Ranks) -> None:
    model = make_model()
    sharded = distributed(model, ranks)
    wanted, penalty = WeightPenalty(model, **ARGUMENTS), WeightPenalty(sharded, **ARGUMENTS)
    assert repr(penalty) == repr(wanted), "sizes are those of whole tensors"
    wanted.l1 = 2e-3
    penalty.load_state_dict(wanted.state_dict())
    assert penalty.state_dict() == wanted.state_dict()
    value = penalty.penalty()
    assert_value(value, wanted.penalty().detach())
    assert_value(penalty.add_grad_(), wanted.add_grad_())
    grads = [p.grad for p in model.parameters()]
    for p, grad in zip(sharded.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            assert_same(whole(p.grad), grad)
    sharded.zero_grad()
    value.backward()
    for p, grad in zip(sharded.parameters(), grads, strict=True):
        if grad is not None:
            assert_same(whole(p.grad), grad)


def compare(sharded: nn.Module, model: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(sharded.named_parameters(), model.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(
            whole(p), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def fsdp_layers(model: nn.Module, **arguments: Any) -> nn.Module:
    """Shard layer by layer, as large models are, and the remaining parameters at the root."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def fsdp_train(
    ranks: Ranks,
    term: str,
    *,
    before: bool = False,
    steps: int = 6,
    shard_model: Callable[[nn.Module], nn.Module] | None = None,
    data_rank: int | None = None,
    data_ranks: int | None = None,
) -> None:
    """Compare training of shards, each rank on its data, with training in one process."""
    model = make_model()
    ours = copy.deepcopy(model)
    part = ranks.rank if data_rank is None else data_rank
    parts = ranks.world if data_ranks is None else data_ranks
    data = torch.randn(steps, 2 * parts, 6, dtype=torch.float64)
    arguments = {**ARGUMENTS, "schedule": lambda t: min(1.0, (t + 1) / 3)}

    penalty = WeightPenalty(ours, **arguments) if before else None
    stale = list(ours.parameters()) if before else []
    ours = (shard_model or (lambda m: fsdp_layers(m, mesh=ranks.mesh)))(ours)
    if penalty is None:
        penalty = WeightPenalty(ours, **arguments)
    else:
        penalty.refresh()
    wanted = WeightPenalty(model, **arguments)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True) for m in (ours, model)
    ]
    for x in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        target = x.sum(1, keepdim=True)
        (model(x) - target).square().mean().backward()
        value = wanted.add_grad_()
        mine = slice(2 * part, 2 * part + 2)
        loss = (ours(x[mine]) - target[mine]).square().mean()
        if term == "in the loss":
            found = penalty.penalty()
            (loss + found).backward()
        elif term == "accumulated":
            for i in (0, 1):
                row = slice(2 * part + i, 2 * part + i + 1)
                ((ours(x[row]) - target[row]).square().mean() / 2).backward()
            found = penalty.add_grad_()
        else:
            loss.backward()
            found = penalty.add_grad_()
        assert_value(found, value, 1e-12)
        for optimizer in optimizers:
            optimizer.step()
        if term == "prox":
            for m in (ours, model):
                fusereg.prox.l1_([p for p in m.parameters() if p.dim() > 1], 0.05 * 0.4)
        penalty.step()
        wanted.step()
    compare(ours, model)
    if term == "prox":
        zeros = fusereg.sparsity(model)
        assert 0.0 < zeros < 1.0
        assert fusereg.sparsity(ours) == zeros
    assert all(p.grad is None for p in stale)


@on(2, 3)
def fsdp_training_after_backward(ranks: Ranks) -> None:
    fsdp_train(ranks, "after backward", steps=20)


@on(2, 3)
def fsdp_training_in_the_loss(ranks: Ranks) -> None:
    fsdp_train(ranks, "in the loss", steps=20)


@on(2)
def fsdp_training_with_a_penalty_made_before(ranks: Ranks) -> None:
    fsdp_train(ranks, "after backward", before=True)


@on(2)
def fsdp_training_with_accumulation(ranks: Ranks) -> None:
    fsdp_train(ranks, "accumulated")


@on(3)
def fsdp_training_with_proximal_steps(ranks: Ranks) -> None:
    fsdp_train(ranks, "prox")


@on(2)
def fsdp_training_without_resharding(ranks: Ranks) -> None:
    """Layers that stay whole between forward and backward: the penalty still is of the shards."""
    for term in ("after backward", "in the loss"):
        fsdp_train(
            ranks,
            term,
            shard_model=lambda m: fsdp_layers(m, mesh=ranks.mesh, reshard_after_forward=False),
        )


@on(2)
def fsdp_with_equal_meshes_needs_one_reduction(ranks: Ranks) -> None:
    """As without a mesh argument, where each call of fully_shard makes a mesh of its own."""
    model = make_model()
    sharded = copy.deepcopy(model)
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=init_device_mesh("cpu", (ranks.world,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (ranks.world,)))
    penalty = WeightPenalty(sharded, **ARGUMENTS)
    for call in (penalty.penalty, penalty.add_grad_):
        with counted_reductions() as reductions:
            value = call()
        assert reductions == [1]
        assert_value(value, WeightPenalty(model, **ARGUMENTS).penalty().detach())
    with counted_reductions() as reductions:
        fusereg.sparsity(sharded)
    assert reductions == [1]


# --- meshes of two dimensions -------------------------------------------------------------------


@on(4)
def two_dimensional_placements(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: list[tuple[Sequence[Any], bool, int]] = [
        # placements, whether rows stay whole, dimensions to reduce over
        ([Shard(0), Shard(0)], True, 2),
        ([Shard(0), Replicate()], True, 1),
        ([Replicate(), Shard(0)], True, 1),
        ([Replicate(), Replicate()], True, 0),
        ([Shard(0), Shard(1)], False, 2),
        ([Shard(1), Replicate()], False, 1),
    ]
    strengths = {"l1": 0.3, "l2": 0.7}
    for shape in ((8, 4), (5, 3), (1, 6)):
        for placements, rows, reduced in layouts:
            w = torch.randn(shape, dtype=torch.float64)
            x = distribute_tensor(w.clone(), mesh, placements).requires_grad_()
            with counted_reductions() as reductions:
                value = F.elastic_net_penalty(x, 0.3, 0.7)
            assert len(reductions) == reduced
            assert_value(value, reference.penalty(w, **strengths))
            value.backward()
            wanted = reference.gradient(w, **strengths)
            assert_same(whole(x.grad), wanted)
            assert_value(fusereg.add_penalty_grad_(x, **strengths), value.detach())
            assert_same(whole(x.grad), 2 * wanted)
            if rows:
                value = F.group_lasso_penalty(x, 0.5)
                assert_value(value, reference.penalty(w, group=0.5))
            else:
                with pytest.raises(ValueError, match="is sharded along dimension 1, which cuts"):
                    F.group_lasso_penalty(x, 0.5)
            fusereg.prox.l1_(x, 0.6)
            wanted = reference.prox(w, l1=0.6)
            assert_same(whole(x), wanted)
            assert fusereg.sparsity(x) == (wanted == 0).sum().item() / w.numel()


@on(4)
def several_meshes_in_one_list(ranks: Ranks) -> None:
    """One reduction for each mesh and set of sharded dimensions, in the order of the list."""
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    wholes = [torch.randn(5, 3, dtype=torch.float64) for _ in range(8)]
    held = [
        distribute_tensor(wholes[0].clone(), ranks.mesh, [Shard(0)]),
        distribute_tensor(wholes[1].clone(), two["tp"], [Shard(0)]),
        wholes[2].clone(),
        distribute_tensor(wholes[3].clone(), two, [Shard(0), Shard(1)]),
        distribute_tensor(wholes[4].clone(), ranks.mesh, [Shard(1)]),
        distribute_tensor(wholes[5].clone(), two["dp"], [Shard(1)]),
        distribute_tensor(wholes[6].clone(), two, [Replicate(), Replicate()]),
        distribute_tensor(wholes[7].clone(), two["tp"], [Shard(0)]),
    ]
    for x in held:
        x.requires_grad_()
    with counted_reductions() as reductions:
        value = F.l1_penalty(held, 0.3)
    assert len(reductions) == 1 + 1 + 2 + 1
    assert_value(value, reference.total(wholes, l1=0.3))
    value.backward()
    assert_value(fusereg.add_penalty_grad_(held, l1=0.3), value.detach())
    for x, w in zip(held, wholes, strict=True):
        assert_same(whole(x.grad), 2 * reference.gradient(w, l1=0.3))


@on(4)
def a_mesh_dimension_of_one_rank_cuts_nothing(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (4, 1))
    w = torch.randn(5, 3, dtype=torch.float64)
    x = distribute_tensor(w, mesh, [Shard(0), Shard(1)])
    with counted_reductions() as reductions:
        value = F.group_lasso_penalty(x, 0.5)
    assert len(reductions) == 1
    assert_value(value, reference.penalty(w, group=0.5))


@on(4)
def fsdp_training_with_replicas(ranks: Ranks) -> None:
    """HSDP: sharded along one dimension of the mesh, replicated along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for term in ("after backward", "in the loss"):
        fsdp_train(ranks, term, shard_model=lambda m: fsdp_layers(m, mesh=mesh))


@on(4)
def fsdp_training_over_tensor_parallelism(ranks: Ranks) -> None:
    """Rows sharded by both: FSDP2 marks those with a placement that is no subclass of Shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    ours = copy.deepcopy(model)
    parallelize_module(ours, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fsdp_layers(ours, mesh=mesh["dp"])
    first, second = ours[0].weight, ours[2].weight
    assert not all(isinstance(p, Shard) for p in first.placements), "else this shows nothing"
    arguments: dict[str, Any] = {"l1": 1e-3, "l2": 1e-2, "rules": {"0.*": {"group": 1e-3}}}
    penalty, wanted = WeightPenalty(ours, **arguments), WeightPenalty(model, **arguments)
    penalty.group = 1e-3
    with pytest.raises(ValueError, match=re.escape("sharded along dimension 1, which cuts")):
        penalty.penalty()
    penalty.group = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, model)]
    part = mesh["dp"].get_local_rank()
    for step, x in enumerate(torch.randn(8, 4, 6, dtype=torch.float64)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().mean().backward()
        value = wanted.add_grad_()
        loss = ours(x[2 * part : 2 * part + 2]).square().mean()
        if step % 2:
            found = penalty.penalty()
            (loss + found).backward()
        else:
            loss.backward()
            found = penalty.add_grad_()
        assert_value(found, value, 1e-12)
        for optimizer in optimizers:
            optimizer.step()
    compare(ours, model)
    threshold = model[0].weight.detach().norm(dim=1).median().item() / math.sqrt(6)
    for layer in (ours[0].weight, model[0].weight):
        fusereg.prox.group_lasso_(layer, threshold)
    compare(ours, model)
    for layer in (second, model[2].weight):
        fusereg.prox.l1_(layer, 0.1)
    compare(ours, model)
    assert 0.0 < fusereg.sparsity(ours) == fusereg.sparsity(model)


# --- the tests ----------------------------------------------------------------------------------


test_ranks = collect(__name__)
