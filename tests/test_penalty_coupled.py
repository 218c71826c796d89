"""Group lasso over channels that span tensors and dimensions, on every backend, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
from conftest import DTYPES, TOLERANCES, Backend
from fusereg import functional as F
from fusereg.core.groups import CoupledChannels, Groups, Member

#: Shapes, dimensions, and how the channels of a set of 12 lie in them.
LAYOUTS: list[tuple[str, tuple[int, ...], int, list[int]]] = [
    ("conv", (12, 5, 3, 3), 0, list(range(12))),
    ("conv.bias", (12,), 0, list(range(12))),
    ("norm", (12,), 0, list(range(12))),
    ("wide", (12, 70, 3, 3), 0, list(range(12))),  # rows of more than 64 elements
    ("transposed", (6, 12, 3, 3), 1, list(range(12))),  # strided slices of 9
    ("columns", (40, 12), 1, list(range(12))),  # strided slices of 1
    ("strided", (3, 12, 90), 1, list(range(12))),  # strided slices of 90
    ("flattened", (7, 48), 1, [i // 4 for i in range(48)]),  # four columns a channel
    ("offset", (20, 4), 0, [-1] * 3 + [11 - i for i in range(12)] + [-1] * 5),
    ("some columns", (9, 15), 1, [0, -1, -1, *range(1, 9), -1, 9, 10, 11]),
    ("deep", (12, 2, 2), 0, [5] * 12),  # all slices belong to one channel
]


def make_groups(
    dtype: torch.dtype, backend: Backend, layouts: list[Any] | None = None, **options: Any
) -> Groups:
    """Two sets of 12 channels; the second has other numbers, and one tensor in channels_last."""
    generator = torch.Generator().manual_seed(7)
    sets = []
    for k in range(2):
        members = []
        for name, shape, dim, channels in layouts or LAYOUTS:
            w = torch.randn(shape, generator=generator, dtype=torch.float64)
            # Channels of different sizes, so that some vanish and some do not.
            size = torch.linspace(0.05, 1.0, shape[dim], dtype=torch.float64)
            w *= size.reshape([-1 if d == dim else 1 for d in range(w.dim())])
            if k == 1 and w.dim() == 4:
                w = w.contiguous(memory_format=torch.channels_last)
            w = w.to(dtype).to(backend.device)
            p = torch.nn.Parameter(w)
            members.append(Member(f"{k}.{name}", p, dim, torch.tensor(channels)))
        operations = torch.arange(12, dtype=torch.float64)
        readers: tuple[Member, ...] = ()
        if options.get("readers"):
            reader = torch.randn((8, 12), generator=generator, dtype=torch.float64).to(dtype)
            p = torch.nn.Parameter(reader.to(backend.device))
            readers = (Member(f"{k}.reader", p, 1, torch.arange(12)),)
        sets.append(CoupledChannels(f"set{k}", 12, tuple(members), readers, operations))
    return Groups(sets)


def by_channel(own: CoupledChannels, tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return the slices of each channel, as views."""
    found: list[list[Tensor]] = [[] for _ in range(own.size)]
    for member, t in zip(own.members, tensors, strict=True):
        for i, c in enumerate(member.channels.tolist()):
            if c >= 0:
                found[c].append(t.select(member.dim, i))
    return found


def exact(own: CoupledChannels) -> list[Tensor]:
    return [m.parameter.detach().cpu().double().clone() for m in own.members]


def reference_prox(groups: Groups, threshold: float, l1: float) -> list[Tensor]:
    """The closed form, in float64, slice by slice."""
    found = []
    for own in groups:
        tensors = exact(own)
        for slices in by_channel(own, tensors):
            for s in slices:
                s.copy_(s.sign() * (s.abs() - l1).clamp_min(0))
            norm = math.sqrt(sum(float(s.square().sum()) for s in slices))
            limit = threshold * math.sqrt(sum(s.numel() for s in slices))
            for s in slices:
                s.mul_(max(0.0, 1.0 - limit / norm) if norm else 0.0)
        found.extend(tensors)
    return found


def reference_value(groups: Groups, tensors: list[Tensor], strength: float, l1: float) -> Tensor:
    value = torch.zeros((), dtype=torch.float64)
    at = 0
    for own in groups:
        for slices in by_channel(own, tensors[at : at + len(own.members)]):
            size = sum(s.numel() for s in slices)
            squares = torch.stack([s.square().sum() for s in slices]).sum()
            absolute = torch.stack([s.abs().sum() for s in slices]).sum()
            value = value + strength * math.sqrt(size) * squares.sqrt() + l1 * absolute
        at += len(own.members)
    return value


def tensors_of(groups: Groups) -> list[Tensor]:
    return [m.parameter for own in groups for m in own.members]


@pytest.mark.parametrize("l1", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proximal_step_is_that_of_a_float64_reference(
    backend: Backend, dtype: torch.dtype, l1: float
) -> None:
    groups = make_groups(dtype, backend)
    expected = reference_prox(groups, 0.3, l1)
    before = [t.detach().clone() for t in tensors_of(groups)]
    versions = [t._version for t in tensors_of(groups)]
    fusereg.prox.group_lasso_(groups, 0.3, l1=l1)
    dead = sum(int((e == 0).sum()) for e in expected)
    assert 0 < dead < sum(e.numel() for e in expected) // 2
    tolerance = TOLERANCES[dtype]
    for t, e, old, version in zip(tensors_of(groups), expected, before, versions, strict=True):
        now = t.detach().cpu().double()
        assert (now - e).abs().max() <= 4 * tolerance * e.abs().max().clamp_min(1e-3)
        assert torch.equal(now == 0, e.to(dtype).double() == 0) or dtype is not torch.float64
        assert not (now.signbit() & (now == 0) & (old.cpu() != 0)).any()
        assert t._version > version
    # Slices of no channel keep their bits.
    for own, start in zip(groups, (0, len(LAYOUTS)), strict=True):
        for i, member in enumerate(own.members):
            for j in (member.channels == -1).nonzero().flatten().tolist():
                assert torch.equal(
                    member.parameter.select(member.dim, j), before[start + i].select(member.dim, j)
                )


@pytest.mark.parametrize("l1", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_those_of_a_float64_reference(
    backend: Backend, dtype: torch.dtype, l1: float
) -> None:
    groups = make_groups(dtype, backend)
    tensors = tensors_of(groups)
    value = F.group_lasso_penalty(groups, 0.3, l1=l1)
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    wanted = [t.detach().cpu().double().requires_grad_() for t in tensors]
    reference = reference_value(groups, wanted, 0.3, l1)
    assert abs(float(value) - float(reference)) <= 1e-5 * float(reference)
    grads = torch.autograd.grad(2.0 * value, tensors)
    for g, e in zip(grads, torch.autograd.grad(2.0 * reference, wanted), strict=True):
        error = (g.cpu().double() - e).abs().max()
        assert error <= 4 * TOLERANCES[dtype] * e.abs().max()
    with torch.no_grad():
        assert torch.equal(F.group_lasso_penalty(groups, 0.3, l1=l1), value)


# --- in the optimizers ---

SIMPLE = [row for row in LAYOUTS if row[0] in ("conv", "norm", "transposed", "columns", "offset")]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.02},
    "Lion": {"lr": 0.02},
}


def dead_channels(own: CoupledChannels) -> list[int]:
    """Return the channels whose slices are zero in all tensors."""
    slices = by_channel(own, [m.parameter.detach() for m in own.members])
    return [c for c, of_channel in enumerate(slices) if all(not s.any() for s in of_channel)]


def with_grads(params: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in params:
        p.grad = 0.1 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_step_ends_with_the_groups_proximal_step(backend: Backend, name: str) -> None:
    """As the optimizer without groups, and then prox.group_lasso_, bit for bit."""
    options = {**OPTIMIZERS[name], "l1": 0.01, "l2": 0.02, "prox": "decoupled"}
    lr = options["lr"]
    models = [make_groups(torch.float32, backend, SIMPLE) for _ in range(2)]
    ours, theirs = (
        getattr(fusereg.optim, name)(tensors_of(m), **options, **extra)
        for m, extra in zip(models, ({"groups": models[0], "group": 5.0}, {}), strict=True)
    )
    for _ in range(3):
        for groups in models:
            with_grads(tensors_of(groups))
        theirs.step()
        wanted = F.group_lasso_penalty(models[1], 5.0).detach()
        fusereg.prox.group_lasso_(models[1], lr * 5.0 / (1.0 + lr * 0.02))
        ours.step()
        for a, b in zip(tensors_of(models[0]), tensors_of(models[1]), strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(ours.penalty_value, theirs.penalty_value + wanted)
    dead = dead_channels(models[0][0])
    assert 0 < len(dead) < 12
