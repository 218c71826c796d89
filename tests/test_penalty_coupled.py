"""Group lasso over channels that span tensors and dimensions, on every backend, against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
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


SIMPLE = [row for row in LAYOUTS if row[0] in ("conv", "norm", "transposed", "columns", "offset")]


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
    torch.testing.assert_close(value.detach().cpu().double(), reference.detach(), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(2.0 * value, tensors)
    for g, e in zip(grads, torch.autograd.grad(2.0 * reference, wanted), strict=True):
        error = (g.cpu().double() - e).abs().max()
        assert error <= 4 * TOLERANCES[dtype] * e.abs().max()
    with torch.no_grad():
        assert torch.equal(F.group_lasso_penalty(groups, 0.3, l1=l1), value)


def test_gradients_of_first_and_second_order(backend: Backend) -> None:
    rows = [row for row in LAYOUTS if row[0] in ("columns", "offset", "some columns", "conv.bias")]
    groups = make_groups(torch.float64, backend, rows)
    with torch.no_grad():
        for m in groups[0].members:  # a channel that is zero
            for i in (m.channels == 4).nonzero().flatten().tolist():
                m.parameter.select(m.dim, i).zero_()
    tensors = tensors_of(groups)

    def value(*_: Tensor) -> Tensor:
        return F.group_lasso_penalty(groups, 0.3)

    grads = torch.autograd.grad(value(), tensors)
    for own, start in zip(groups, (0, len(rows)), strict=True):
        found = by_channel(own, list(grads[start : start + len(rows)]))
        assert all(not s.any() for s in found[4]) == (own is groups[0])
    live = make_groups(torch.float64, backend, rows)
    assert torch.autograd.gradcheck(
        lambda *_: F.group_lasso_penalty(live, 0.3, l1=0.05), tensors_of(live), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda *_: F.group_lasso_penalty(live, 0.3, l1=0.05), tensors_of(live), fast_mode=True
    )


def test_weights_made_of_each_other_have_one_gradient_differentiable_or_not() -> None:
    source = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    members = tuple(
        Member(name, t, 0, torch.arange(12)) for name, t in (("a", source), ("b", source.sin()))
    )
    groups = Groups([CoupledChannels("set", 12, members, (), None)])
    value = F.group_lasso_penalty(groups, 0.3)
    (wanted,) = torch.autograd.grad(value, source, retain_graph=True)
    (came,) = torch.autograd.grad(value, source, create_graph=True)
    torch.testing.assert_close(came, wanted)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_tiny_and_huge_weights_keep_their_groups(backend: Backend, factor: float) -> None:
    groups = make_groups(torch.float32, backend)
    tensors = tensors_of(groups)
    with torch.no_grad():
        for t in tensors:
            t.mul_(factor)
    expected = reference_prox(groups, 0.3 * factor, 0.0)
    fusereg.prox.group_lasso_(groups, 0.3 * factor)
    for t, e in zip(tensors, expected, strict=True):
        assert (t.detach().cpu().double() - e).abs().max() <= 1e-5 * e.abs().max()
        assert torch.equal(t.cpu() == 0, e == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l1", [0.0, 0.01])
@pytest.mark.parametrize("rows", [True, False])
def test_one_pass_gives_the_bits_of_two(
    backend: Backend, rows: bool, l1: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards take two, since ranks add their sums between them."""
    layouts = [row for row in LAYOUTS if row[2] == 0] if rows else LAYOUTS
    one, two = (make_groups(dtype, backend, layouts) for _ in range(2))
    fusereg.prox.group_lasso_(one, 0.02, l1=l1)
    monkeypatch.setattr("fusereg.core.distributed.has_dtensor", lambda tensors: True)
    fusereg.prox.group_lasso_(two, 0.02, l1=l1)
    for a, b in zip(tensors_of(one), tensors_of(two), strict=True):
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [True, False])
def test_results_have_the_same_bits_for_any_number_of_threads(rows: bool) -> None:
    """Also on every instruction set, which add the same numbers in the same order."""
    cpu = Backend("cpu", torch.device("cpu"))
    each = list(range(12))
    shapes: list[Any] = [("a", (12, 3000, 3, 3), 0, each), ("norm", (12,), 0, each)]
    if not rows:
        shapes = [("a", (12, 300, 3, 3), 0, each), ("b", (700, 12), 1, each)]
    found: list[list[Tensor]] = []
    before = torch.get_num_threads(), fusereg._C.cpu_isa()
    try:
        for isa in fusereg._C.cpu_isas():
            for threads in (1, 2, 5):
                fusereg._C.set_cpu_isa(isa)
                torch.set_num_threads(threads)
                groups = make_groups(torch.float32, cpu, shapes)
                fusereg.prox.group_lasso_(groups, 0.3)
                found.append(tensors_of(groups))
    finally:
        torch.set_num_threads(before[0])
        fusereg._C.set_cpu_isa(before[1])
    assert (found[0][0] == 0).any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_weights_of_channels(backend: Backend) -> None:
    """By size, by the operations that each saves, or given: for a set or each of its channels."""
    groups = make_groups(torch.float64, backend, SIMPLE)
    norms = torch.stack(
        [
            torch.stack([s.square().sum() for s in slices]).sum().sqrt()
            for own in groups
            for slices in by_channel(own, exact(own))
        ]
    )
    sizes = [
        sum(s.numel() for s in slices) for own in groups for slices in by_channel(own, exact(own))
    ]
    roots = torch.tensor(sizes, dtype=torch.float64).sqrt()
    operations = torch.arange(12.0).double().repeat(2)
    each = torch.linspace(0, 2, 12)
    for weights, factors in (
        ("size", roots),
        ("operations", operations * roots.sum() / operations.sum()),
        ([2.0, each], torch.cat([torch.full((12,), 2.0), each])),
    ):
        value = F.group_lasso_penalty(groups, 0.3, weights=weights).detach().cpu()
        torch.testing.assert_close(value, 0.3 * torch.dot(factors.double(), norms))


def test_writers_and_readers_alternate_in_this_order(backend: Backend) -> None:
    """Columns of one set that are rows of another: the steps' order shows, and is the one named."""
    for _ in range(2):
        both, alone, columns = (make_groups(torch.float64, backend, SIMPLE) for _ in range(3))
        shared = both[0].members[0].parameter  # a convolution's rows: what reads them, its columns
        reader = Member("0.conv", shared, 1, torch.arange(5))
        both = Groups([both[0]._replace(readers=(reader,)), both[1]])
        fusereg.prox.group_lasso_(both, 0.3)
        fusereg.prox.group_lasso_(alone, 0.3)
        first = alone[0].members[0].parameter
        by_columns = columns[0]._replace(
            size=5, members=(Member("0.conv", first, 1, torch.arange(5)),)
        )
        fusereg.prox.group_lasso_(Groups([by_columns]), 0.3)
        assert torch.equal(shared, first)


def test_the_value_is_that_of_writers_and_readers(backend: Backend) -> None:
    groups = make_groups(torch.float64, backend, SIMPLE, readers=True)
    alone = Groups(own._replace(readers=()) for own in groups)
    readers = [own.readers[0].parameter.detach().cpu() for own in groups]
    wanted = F.group_lasso_penalty(alone, 0.3).detach().cpu()
    wanted += 0.3 * 8**0.5 * sum(r.norm(dim=0).sum() for r in readers)
    torch.testing.assert_close(F.group_lasso_penalty(groups, 0.3).detach().cpu(), wanted)


def test_odd_layouts_are_prepared(backend: Backend) -> None:
    """A strided view, a slice that starts anywhere, a negated view, and 0 channels."""
    groups = make_groups(torch.float32, backend, SIMPLE)
    plain = make_groups(torch.float32, backend, SIMPLE)
    sets = []
    for own in groups:
        members = []
        for i, m in enumerate(own.members):
            wide = torch.zeros((*m.parameter.shape, 2), device=backend.device)
            view = wide[..., 1] if i % 2 else wide.flatten()[1 : 1 + m.parameter.numel()]
            view = view.view(m.parameter.shape)
            view.copy_(m.parameter.detach())
            members.append(m._replace(parameter=view))
        sets.append(own._replace(members=tuple(members)))
    sets.append(CoupledChannels("none", 0, (), (), None))
    odd = Groups(sets)
    torch.testing.assert_close(F.group_lasso_penalty(odd, 0.3), F.group_lasso_penalty(plain, 0.3))
    fusereg.prox.group_lasso_(odd, 0.3)
    fusereg.prox.group_lasso_(plain, 0.3)
    for a, b in zip(tensors_of(odd), tensors_of(plain), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_sparse_group_lasso_of_plain_tensors(backend: Backend) -> None:
    """l1 beside a group term of slices of one tensor: soft threshold, then group shrink."""
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w *= torch.linspace(0.1, 1, 6, dtype=torch.float64)[:, None]
    v = w.sign() * (w.abs() - 0.1).clamp_min(0)
    expected = v * (1 - 0.5 * 40**0.5 / v.norm(dim=1, keepdim=True)).clamp_min(0)
    ours = w.to(backend.device)
    value = F.group_lasso_penalty(ours, 0.5, l1=0.1)
    wanted = 0.5 * 40**0.5 * w.norm(dim=1).sum() + 0.1 * w.abs().sum()
    torch.testing.assert_close(value.cpu(), wanted)
    fusereg.prox.group_lasso_(ours, 0.5, l1=0.1)
    torch.testing.assert_close(ours.cpu(), expected)


def bad_groups() -> dict[str, Groups]:
    w = torch.ones(4, 3)
    one = Member("w", w, 0, torch.arange(4))

    def of(*members: Member, size: int = 4) -> Groups:
        return Groups([CoupledChannels("s", size, members, (), None)])

    return {
        "belong to two channels": of(one, one),
        "must not overlap": of(one, Member("w", w, 1, torch.arange(3))),
        "none to cut along is 2": of(Member("w", w, 2, torch.arange(3))),
        "channels must be 4 integers": of(Member("w", w, 0, torch.arange(3))),
        "channels must be below the size": of(one, size=3),
        "dtype torch.int64": of(Member("w", torch.ones(4, dtype=torch.int64), 0, torch.arange(4))),
    }


@pytest.mark.parametrize("text", bad_groups())
def test_groups_that_cannot_be_are_refused_and_nothing_changes(text: str) -> None:
    groups = bad_groups()[text]
    for call in (F.group_lasso_penalty, fusereg.prox.group_lasso_):
        with pytest.raises(ValueError, match=text):
            call(groups, 0.3)
    assert all((m.parameter == 1).all() for own in groups for m in own.members)


def test_wrong_arguments_beside_groups_are_refused() -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    for error, text, arguments, options in (
        (ValueError, "dim must be left out", (0.3, 1), {}),
        (TypeError, "threshold must be one number", ([0.3],), {}),
        (ValueError, "l1 must be finite and not negative", (0.3,), {"l1": -1.0}),
        (ValueError, "weights must be 'size'", (0.3,), {"weights": "sizes"}),
        (ValueError, "weights must have 2 entries", (0.3,), {"weights": [1.0]}),
        (ValueError, "the weight of set1 must be", (0.3,), {"weights": [1.0, [1.0, 2.0]]}),
        (ValueError, "the weights of set0 must be finite", (0.3,), {"weights": [-1.0, 1.0]}),
    ):
        with pytest.raises(error, match=text):
            fusereg.prox.group_lasso_(groups, *arguments, **options)
    with pytest.raises(ValueError, match="go with groups of channels only"):
        fusereg.prox.group_lasso_(torch.ones(3, 3), 0.3, weights="operations")
    params = [m.parameter for s in groups for m in s.members]
    with pytest.raises(ValueError, match="group_dim must be left out with groups"):
        fusereg.optim.SGD(params, lr=0.1, groups=groups, group=0.1, group_dim=1)
    with pytest.raises(TypeError, match=r"got CoupledChannels$"):  # no pair of a name and a tensor
        fusereg.add_penalty_grad_(groups, group=0.1)


# --- in the optimizers ---

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "group": 0.8},
    "Adam": {"lr": 0.02, "group": 5.0},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1, "group": 5.0},
    "RMSprop": {"lr": 0.02, "group": 15.0},
    "Lion": {"lr": 0.02, "group": 5.0},
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
    lr, strength = options["lr"], options.pop("group")
    models = [make_groups(torch.float32, backend, SIMPLE) for _ in range(2)]
    ours, theirs = (
        getattr(fusereg.optim, name)(tensors_of(m), **options, **extra)
        for m, extra in zip(models, ({"groups": models[0], "group": strength}, {}), strict=True)
    )
    for _ in range(3):
        for groups in models:
            with_grads(tensors_of(groups))
        theirs.step()
        wanted = F.group_lasso_penalty(models[1], strength).detach()
        fusereg.prox.group_lasso_(models[1], lr * strength / (1.0 + lr * 0.02))
        ours.step()
        for a, b in zip(tensors_of(models[0]), tensors_of(models[1]), strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(ours.penalty_value, theirs.penalty_value + wanted)
    dead = dead_channels(models[0][0])
    assert 0 < len(dead) < 12


def test_masters_averages_missing_gradients_and_skipped_steps(backend: Backend) -> None:
    """As one step after the other: update, proximal step, average."""
    ours, theirs = (make_groups(torch.bfloat16, backend, SIMPLE) for _ in range(2))
    options = {"lr": 0.01, "momentum": 0.9, "prox": "decoupled", "master_weights": True}
    mine = fusereg.optim.SGD(tensors_of(ours), **options, ema_decay=0.5, groups=ours, group=2.0)
    other = fusereg.optim.SGD(tensors_of(theirs), **options)
    averages: list[Tensor] = []
    for step in range(4):
        for groups in (ours, theirs):
            with_grads(tensors_of(groups))
        mine.step()
        other.step()
        masters = [other.state[p]["master_param"] for p in tensors_of(theirs)]
        members = iter(masters)
        copies = Groups(
            own._replace(members=tuple(m._replace(parameter=next(members)) for m in own.members))
            for own in theirs
        )
        fusereg.prox.group_lasso_(copies, 0.01 * 2.0)
        for i, (p, q, m) in enumerate(
            zip(tensors_of(ours), tensors_of(theirs), masters, strict=True)
        ):
            with torch.no_grad():
                q.copy_(m)
            assert torch.equal(mine.state[p]["master_param"], m)
            assert torch.equal(p, q)
            if step == 0:
                averages.append(m.clone())
            averages[i].lerp_(m, 0.5)
            torch.testing.assert_close(mine.state[p]["ema_param"], averages[i])
    # Channels of which a tensor has no gradient stay, and a skipped step changes nothing.
    plain = make_groups(torch.float32, backend, SIMPLE)
    params = tensors_of(plain)
    optimizer = fusereg.optim.SGD(params, lr=0.1, groups=plain, group=2.0)
    before = [p.detach().clone() for p in params]
    with_grads(params)
    optimizer.found_inf = torch.ones((), device=backend.device)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    del optimizer.found_inf
    params[0].grad = None  # of the first set
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not dead_channels(plain[0])
    assert dead_channels(plain[1])


def test_param_groups_that_share_channels_must_take_the_same_step() -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    params = tensors_of(groups)
    with_grads(params)
    half = len(params) // 2
    split = [{"params": params[:half]}, {"params": params[half:], "lr": 0.01, "group": 0.1}]
    fusereg.optim.SGD(split, lr=0.1, groups=groups, group=1.0).step()  # a set in each
    crossed = [{"params": params[1:]}, {"params": params[:1], "group": 0.1}]
    with pytest.raises(ValueError, match="param groups 0 and 1 hold slices of the same channels"):
        fusereg.optim.SGD(crossed, lr=0.1, groups=groups, group=1.0)
    optimizer = fusereg.optim.SGD(crossed, lr=0.1, group=1.0)
    optimizer.groups = groups
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="param groups 0 and 1 hold slices of the same channels"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with pytest.raises(ValueError, match="prox=False does not take"):
        fusereg.optim.SGD(params, lr=0.1, groups=groups, group=1.0, prox=False)
    with pytest.raises(TypeError, match="groups must be what fusereg"):
        fusereg.optim.SGD(params, lr=0.1, groups=[params], group=1.0)


NAMES = ("SGD", "Adam", "AdamW", "Adagrad", "LAMB", "Lion", "NAdam", "RMSprop")


@pytest.mark.parametrize(
    "weights",
    [1.0, None, torch.tensor(1.0), {"0": 1.0, "1": 1.0}, ["a", "b"], [None, 1.0], np.array(1.0)],
    ids=str,
)
@pytest.mark.parametrize("of", ["penalty", "prox", "optimizer"])
def test_weights_of_another_type_say_what_is_wanted(of: str, weights: Any) -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    says = "the weight of .* must be one number or" if type(weights) is list else "must be 'size', "
    call: Callable[[], object] = {
        "penalty": lambda: F.group_lasso_penalty(groups, 0.3, weights=weights),
        "prox": lambda: fusereg.prox.group_lasso_(groups, 0.3, weights=weights),
        "optimizer": lambda: fusereg.optim.SGD(
            tensors_of(groups), lr=0.1, groups=groups, group=1.0, group_weights=weights
        ),
    }[of]
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize("kind", [getattr(fusereg.optim, name) for name in NAMES])
def test_groups_that_do_not_fit_are_found_when_the_optimizer_is_made(kind: Any) -> None:
    cpu = Backend("cpu", torch.device("cpu"))
    groups, others = (make_groups(torch.float32, cpu, SIMPLE) for _ in range(2))
    params = tensors_of(groups)
    for own, given in ((params, others), (params[1:], groups)):
        with pytest.raises(ValueError, match="groups hold 0\\.conv, which is not among the para"):
            kind(own, lr=0.1, groups=given, group=1.0)
    for weights, says in (([1.0], "must have 2 entries"), ("sizes", "must be 'size'")):
        with pytest.raises(ValueError, match=says):
            kind(params, lr=0.1, groups=groups, group=1.0, group_weights=weights)
    with pytest.raises(ValueError, match="group_weights are those of groups"):
        kind(params, lr=0.1, group=1.0, group_weights=[1.0, 1.0])
    later = kind(params[1:], lr=0.1, group=1.0)
    later.add_param_group({"params": params[:1]})
    later.groups = groups
    with_grads(params)
    later.step()


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.2), ("group", 0.1), ("l2", 0.3), ("prox", "decoupled"),
                       ("momentum", 0.5), ("dampening", 0.5)]
)  # fmt: skip
def test_what_makes_the_threshold_must_be_the_same_where_channels_are_shared(
    key: str, value: Any
) -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    params = tensors_of(groups)
    with_grads(params)
    options = {"lr": 0.1, "momentum": 0.9, "groups": groups, "group": 1.0}
    split: list[dict[str, Any]] = [{"params": params[1:]}, {"params": params[:1], key: value}]
    with pytest.raises(ValueError, match="0 and 1 hold slices of the same channels, so their lr"):
        fusereg.optim.SGD(split, **options).step()
    split = [{"params": params[1:]}, {"params": params[:1], "l1": 0.1}]  # of each element
    fusereg.optim.SGD(split, **options).step()


@pytest.mark.parametrize("key", ["lr", "group"])
def test_equal_numbers_in_different_tensors_are_the_same(key: str) -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    params = tensors_of(groups)
    with_grads(params)
    copies = [torch.tensor(0.1), torch.tensor(0.1)]
    split = [{"params": p, key: v} for p, v in zip((params[1:], params[:1]), copies, strict=True)]
    optimizer = fusereg.optim.SGD(split, lr=0.1, groups=groups, group=0.1)
    optimizer.step()
    copies[1].fill_(0.2)
    with pytest.raises(ValueError, match="hold slices of the same channels"):
        optimizer.step()


@pytest.mark.parametrize("prox", [True, "capped", "preconditioned", "decoupled"])
def test_momentum_amplifies_the_threshold_unless_it_is_decoupled(prox: bool | str) -> None:
    w = torch.nn.Parameter(torch.ones(3, 4))
    groups = Groups([CoupledChannels("s", 3, (Member("w", w, 0, torch.arange(3)),), (), None)])
    optimizer = fusereg.optim.SGD(
        [w], 0.1, momentum=0.9, dampening=0.5, groups=groups, group=0.02, prox=prox
    )
    w.grad = torch.zeros_like(w)
    optimizer.step()
    gain = 1.0 if prox == "decoupled" else (1 - 0.5) / (1 - 0.9)
    torch.testing.assert_close(w.detach(), torch.full_like(w, 1 - 0.1 * 0.02 * gain))


def test_a_step_with_groups_is_not_in_a_full_graph() -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    optimizer = fusereg.optim.AdamW(tensors_of(groups), lr=0.02, groups=groups, group=5.0)
    for _ in range(2):  # states are there the second time
        torch._dynamo.reset()
        with_grads(tensors_of(groups))
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(optimizer.step, backend="eager", fullgraph=True)()
        torch.compile(optimizer.step, backend="eager")()
    assert dead_channels(groups[0])


def test_compiled_code_runs_the_functions_of_groups_outside_of_its_graphs() -> None:
    torch._dynamo.reset()
    groups, same = (
        make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE) for _ in range(2)
    )

    @torch.compile(backend="eager")
    def compiled(x: Tensor) -> Tensor:
        y = x + 1
        value = F.group_lasso_penalty(groups, 0.3)
        fusereg.prox.group_lasso_(groups, 0.3)
        return y * value

    wanted = 2 * F.group_lasso_penalty(same, 0.3)
    fusereg.prox.group_lasso_(same, 0.3)
    assert torch.equal(compiled(torch.ones(())), wanted)
    for a, b in zip(tensors_of(groups), tensors_of(same), strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_an_optimizer_steps_its_own_groups() -> None:
    groups = make_groups(torch.float32, Backend("cpu", torch.device("cpu")), SIMPLE)
    optimizer = fusereg.optim.AdamW(tensors_of(groups), lr=0.02, groups=groups, group=5.0)
    other = copy.deepcopy(optimizer)
    for o in (optimizer, other):
        params = o.param_groups[0]["params"]
        for _ in range(3):
            with_grads(params)
            o.step()
    assert other.groups is not None
    assert other.groups is not groups
    assert dead_channels(groups[0])
    for p, q in zip(tensors_of(groups), tensors_of(other.groups), strict=True):
        assert p is not q
        assert torch.equal(p, q)
    assert "groups" not in optimizer.state_dict()["param_groups"][0]
