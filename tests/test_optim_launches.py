"""Tables of tensors: small for short lists, one launch for long ones, with the bits of several."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
from conftest import Backend
from fusereg import functional as F
from fusereg import optim
from fusereg.core.groups import CoupledChannels, Groups, Member
from fusereg.optim.optimizer import RegularizedOptimizer
from reference_optim import Reference

_C = fusereg._C
#: More than the parameters of a kernel hold: some 300 parameters, some 1100 gradients. Empty
#: tensors fill a table as others do, and are no work for the host.
SHAPES = [(3,), (0,), (2, 5), (0,), (0, 2), (), (0,), (0,)] * 50


def several_launches(optimizer: RegularizedOptimizer) -> None:
    """Remove the memory for long tables, as while a CUDA graph is captured."""
    optimizer._step_tables = optimizer._norm_tables = None  # type: ignore[assignment]


def launches(backend: Backend, function: Callable[[], Any]) -> int:
    """Return the number of kernel launches, which only the host backend counts."""
    if not backend.on_host:
        function()
        return 0
    before: int = _C._launch_count()  # type: ignore[attr-defined]
    function()
    return int(_C._launch_count() - before)  # type: ignore[attr-defined]


def params_of(backend: Backend, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(backend.device).requires_grad_() for s in shapes]


def give_grads(params: list[Tensor], turn: int, keep: list[Tensor]) -> None:
    """Set new gradients while the old ones are alive, so that addresses differ."""
    generator = torch.Generator().manual_seed(turn)
    for p in params:
        keep += [] if p.grad is None else [p.grad]
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def everything(optimizer: RegularizedOptimizer) -> list[Tensor]:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [p.detach() for p in params] + states


def test_two_thousand_tensors_are_one_launch(backend: Backend) -> None:
    """With and without a group term, from the second step on."""
    params = params_of(backend, [(3,), (2, 4), *[(0,)] * 18] * 100)
    optimizer = optim.AdamW(params, lr=0.1, l1=0.05, group=0.1, weight_decay=0.0)
    references = [Reference("AdamW", p, lr=0.1, l1=0.05, group=0.1) for p in params[:6]]
    keep: list[Tensor] = []
    for turn in range(2):
        give_grads(params, turn, keep)
        for p, reference in zip(params, references, strict=False):
            assert p.grad is not None
            reference.step(p.grad)
        count = launches(backend, optimizer.step)
        assert not backend.on_host or count == 1 or turn == 0
    for p, reference in zip(params, references, strict=False):
        torch.testing.assert_close(p.detach().double().cpu(), reference.p, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adagrad", "FTRL", "RMSprop", "NAdam", "Lion", "LAMB"]
)
def test_a_largest_norm_is_one_launch_more(backend: Backend, name: str) -> None:
    """LAMB's norms are a pass of their own."""
    for largest in (None, 0.1):
        params = params_of(backend, [(3,), (2, 4), (0,)] * 200)
        optimizer = getattr(optim, name)(params, lr=0.1, l1=0.05, max_grad_norm=largest)
        keep: list[Tensor] = []
        for turn in range(3):
            give_grads(params, turn, keep)
            count = launches(backend, optimizer.step)
        assert not backend.on_host or count == 1 + (name == "LAMB") + (largest is not None)


def test_clipping_is_two_launches(backend: Backend) -> None:
    params = params_of(backend, [(2,), (0,), (0,), (0,)] * 300)
    keep: list[Tensor] = []
    for turn in range(2):
        give_grads(params, turn, keep)
        before = torch.cat([p.grad for p in params if p.grad is not None])
        count = launches(backend, lambda: optim.clip_grad_norm_(params, 1.0))
        assert not backend.on_host or count == 2 or turn == 0
        wanted = before / (before.double().norm().float() + 1e-6)
        torch.testing.assert_close(
            torch.cat([p.grad for p in params if p.grad is not None]), wanted
        )


def events(optimizer: RegularizedOptimizer, params: list[Tensor]) -> Iterator[None]:
    """Make the changes that may happen between steps, one before each step."""
    keep: list[Tensor] = []
    for turn in range(2):
        give_grads(params, turn, keep)
        yield
    optimizer.param_groups[0]["lr"] *= 0.5
    params[7].grad = None
    yield
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # states lie elsewhere
    give_grads(params, 3, keep)
    yield
    params[1].data = params[1].data.clone()
    yield


@pytest.mark.all_cases("host")
@pytest.mark.parametrize("name", ["SGD", "Adam", "FTRL"])
def test_a_long_list_has_the_bits_of_several_short_ones(backend: Backend, name: str) -> None:
    options: dict[str, Any] = {"SGD": {"momentum": 0.9}, "Adam": {"group": 0.1}, "FTRL": {}}[name]
    found = []
    for one in (True, False):
        params = params_of(backend, SHAPES)
        optimizer = getattr(optim, name)(params, lr=0.1, l1=0.05, l2=0.1, **options)
        if not one:
            several_launches(optimizer)
        for _ in events(optimizer, params):
            optimizer.step()
        found.append(everything(optimizer))
    assert_same_bits(*found)


@pytest.mark.parametrize("name", ["SGD", "Adam", "FTRL"])
def test_a_list_of_any_length_has_the_bits_of_its_tensors_alone(
    backend: Backend, name: str
) -> None:
    """Up to 16 tensors have tables of their own kind."""
    for count in (1, 15, 16, 17, 40):
        found = []
        for together in (True, False):
            params = params_of(backend, [(5,), (2, 3)] * (count // 2) + [(7,)] * (count % 2))
            lists = [params] if together else [[p] for p in params]
            optimizers = [getattr(optim, name)(p, lr=0.1, l1=0.05, l2=0.1) for p in lists]
            keep: list[Tensor] = []
            for turn in range(2):
                give_grads(params, turn, keep)
                for optimizer in optimizers:
                    assert launches(backend, optimizer.step) in (0, 1)
            found.append([p.detach() for p in params])
        assert_same_bits(*found)


def coupled_of(params: list[Tensor]) -> Groups:
    """All of them have one channel, their slices along the first dimension."""
    members = [
        Member(str(i), p, 0, torch.zeros(p.shape[0], dtype=torch.int64))  # type: ignore[arg-type]
        for i, p in enumerate(params)
    ]
    return Groups([CoupledChannels("all", 1, tuple(members), (), torch.ones(1))])


LISTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.1, l1=0.05).step(),
    "LAMB": lambda p: optim.LAMB(p, lr=0.1).step(),
    "clip_grad_norm_": lambda p: optim.clip_grad_norm_(p, 1.0),
    "clip_grad_value_": lambda p: optim.clip_grad_value_(p, 0.1),
    "adaptive_clip_grad_": lambda p: optim.adaptive_clip_grad_(p, 0.1),
    "elastic_net_penalty": lambda p: F.elastic_net_penalty(p, 0.1, 0.1).backward(),
    "group_lasso_penalty": lambda p: F.group_lasso_penalty(p, 0.1).backward(),
    "prox.elastic_net_": lambda p: fusereg.prox.elastic_net_(p, 0.1, 0.1),
    "prox.group_lasso_": lambda p: fusereg.prox.group_lasso_(p, 0.1),
    "group_lasso_penalty of channels": lambda p: F.group_lasso_penalty(
        coupled_of(p), 0.1
    ).backward(),
    "prox.group_lasso_ of channels": lambda p: fusereg.prox.group_lasso_(
        coupled_of(p), 0.1, l1=0.1
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_short_list_copies_a_small_table(backend: Backend, name: str) -> None:
    """All of a table travels with each launch: 32 KB of a whole one, however few its tensors."""
    if not backend.on_host:
        pytest.skip("only the host counts what launches copy")
    copied = {}
    for count in (1, 16, 17):
        params = params_of(backend, [(3, 2)] * count)
        give_grads(params, 0, [])
        before: int = _C._parameter_bytes()  # type: ignore[attr-defined]
        number = launches(backend, lambda: LISTS[name](params))  # noqa: B023
        copied[count] = (_C._parameter_bytes() - before) / number  # type: ignore[attr-defined]
    assert copied[1] == copied[16] < 4096
    assert copied[17] > 8192


@pytest.mark.parametrize("l1", [0.0, 0.05])
def test_channels_of_a_list_of_any_length_have_the_bits_of_a_long_one(
    backend: Backend, l1: float
) -> None:
    """Tensors that belong to no channel only lengthen the table."""
    for count in (1, 16, 17, 450):
        found = []
        for more in (0, 40):
            params = params_of(backend, [(5, 3), (5,)] * (count // 2) + [(5, 70)] * (count % 2))
            others = params_of(backend, [(2, 2)] * more)
            members = [
                Member(str(i), p, 0, torch.arange(5) if i < count else torch.full((2,), -1))  # type: ignore[arg-type]
                for i, p in enumerate([*params, *others])
            ]
            groups = Groups([CoupledChannels("set", 5, tuple(members), (), torch.ones(5))])
            value = F.group_lasso_penalty(groups, 0.1, l1=l1)
            value.backward()
            gradients = [p.grad for p in params if p.grad is not None]
            fusereg.prox.group_lasso_(groups, 0.05, l1=l1)
            found.append([value.detach(), *gradients, *(p.detach() for p in params)])
        assert len(found[0]) == 1 + 2 * count
        assert_same_bits(*found)


def test_norms_reach_beyond_the_squares_of_float32(backend: Backend) -> None:
    for size in (1e-30, 1e-20, 1e20, 1e30):
        for dtype in (torch.float32, torch.bfloat16):
            grads = [torch.full((n,), size, dtype=dtype, device=backend.device) for n in (3, 37)]
            for kind, factor in ((2.0, 40.0**0.5), (1.0, 40.0), (math.inf, 1.0)):
                norm = optim.get_total_norm(grads, kind)
                assert float(norm) == pytest.approx(float(grads[0][0]) * factor, rel=1e-5)


def test_a_captured_stream_gets_whole_tables(backend: Backend) -> None:
    """In a graph that is replayed the memory may hold something else."""
    if not hasattr(_C, "_set_capturing"):
        pytest.skip("the host's streams say what they are told to")
    found = []
    for capturing in (False, True):
        params = params_of(backend, SHAPES)
        optimizer = optim.AdamW(params, lr=0.1, l1=0.05)
        keep: list[Tensor] = []
        for turn in range(2):
            give_grads(params, turn, keep)
            _C._set_capturing(capturing and turn == 1)  # type: ignore[attr-defined]
            try:
                count = launches(backend, optimizer.step)
            finally:
                _C._set_capturing(False)  # type: ignore[attr-defined]
        assert count == (2 if capturing else 1)
        found.append(everything(optimizer))
    assert_same_bits(*found)


def test_two_optimizers_do_not_disturb_each_other(backend: Backend) -> None:
    keep: list[Tensor] = []
    pairs = []
    for one in (True, False):
        lists = [params_of(backend, SHAPES), params_of(backend, SHAPES[::-1])]
        pair = [optim.SGD(p, lr=0.1, l1=0.1, momentum=0.9, dampening=0.1) for p in lists]
        pairs.append(pair)
        for turn in range(3):
            for params, optimizer in zip(lists, pair, strict=True):
                if not one:
                    several_launches(optimizer)
                give_grads(params, turn, keep)
                count = launches(backend, optimizer.step)
                # At the second step the momentum buffers are no longer fresh.
                assert not backend.on_host or count == (1 if one else 2) or turn < 2
    for a, b in zip(*pairs, strict=True):
        assert_same_bits(everything(a), everything(b))


def test_many_groups_are_one_launch(backend: Backend) -> None:
    """Their numbers are written anew only when they change."""
    found = []
    for one in (True, False):
        params = params_of(backend, [(3,), (4,)] * 12)
        groups = [
            {"params": params[i : i + 2], "lr": 0.1 / (i + 1), "l1": 0.01 * i}
            for i in range(0, 24, 2)
        ]
        optimizer = optim.Adam(groups)
        if not one:
            several_launches(optimizer)
        keep: list[Tensor] = []
        for turn in range(4):
            give_grads(params, turn, keep)
            if turn == 3:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
            count = launches(backend, optimizer.step)
            wanted = (2 if turn == 3 else 1) if one else 2
            assert not backend.on_host or count == wanted or turn == 0
        found.append(everything(optimizer))
    assert_same_bits(*found)


def test_more_tensors_than_addresses_travel_with_a_launch(backend: Backend) -> None:
    params = params_of(backend, [*[(0,)] * 4000, (2, 3), *[(3,), (0,)] * 100])
    before = [p.detach().clone() for p in params]
    give_grads(params, 0, [])
    optimizer = optim.SGD(params, lr=0.5, max_grad_norm=1e9)
    optimizer.step()
    for p, start in zip(params, before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), start - 0.5 * p.grad)
    norm = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).norm()
    torch.testing.assert_close(optimizer.grad_norm, norm)
