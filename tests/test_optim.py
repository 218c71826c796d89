"""Optimizer steps against torch.optim and against float64 formulas, on every backend."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusereg
from conftest import DTYPES, TOLERANCES, Backend
from fusereg import optim
from reference_optim import Reference, penalty

# The update and torch's own round in other places: some units of the last place for each step.
STEPS = 4
NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "FTRL", "RMSprop", "NAdam", "Lion", "LAMB"]
SHAPES = [(5, 7), (64,), (33,), (3, 4, 5, 2), (1,), (0,), (0, 3), (), (2, 130)]


def weights(
    backend: Backend, shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: Any = torch.float32
) -> list[Tensor]:
    return [
        torch.randn(s, dtype=torch.float64).to(backend.device, dtype).requires_grad_()
        for s in shapes
    ]


def give_grads(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    for p in params:
        g = torch.randn(p.shape, dtype=torch.float64).to(p.device, dtype or p.dtype)
        # A gradient in its parameter's layout, as autograd gives it.
        p.grad = torch.empty_like(p, dtype=g.dtype).copy_(g)


def copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def assert_close(came: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 8.0) -> None:
    came, wanted = came.detach().double().cpu(), wanted.detach().double().cpu()
    assert came.shape == wanted.shape
    if wanted.numel():
        scale = max(float(wanted.abs().max()), 1.0)
        torch.testing.assert_close(
            came, wanted, rtol=0.0, atol=factor * TOLERANCES[dtype] * scale, equal_nan=True
        )


def as_bits(t: Tensor) -> list[int]:
    return t.detach().contiguous().view(-1).view(torch.uint8).tolist()


# --- without a penalty: torch.optim over its own options ------------------------------------------


def grid(**options: list[Any]) -> list[dict[str, Any]]:
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


GRIDS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        o
        for o in grid(
            lr=[0.1],
            momentum=[0.0, 0.9],
            dampening=[0.0, 0.4],
            weight_decay=[0.0, 0.2],
            nesterov=[False, True],
            maximize=[False, True],
        )
        if not o["nesterov"] or (o["momentum"] and not o["dampening"])
    ],
    "Adam": grid(
        betas=[(0.9, 0.999), (0.0, 0.5)],
        weight_decay=[0.0, 0.2],
        amsgrad=[False, True],
        maximize=[False, True],
        decoupled_weight_decay=[False, True],
    ),
    "AdamW": grid(lr=[1e-2], eps=[1e-8, 1e-2], weight_decay=[0.0, 0.2], amsgrad=[False, True]),
    "Adagrad": grid(
        lr_decay=[0.0, 0.3],
        weight_decay=[0.0, 0.2],
        initial_accumulator_value=[0.0, 0.1],
        maximize=[False, True],
    ),
    "RMSprop": grid(
        alpha=[0.99, 0.5],
        momentum=[0.0, 0.9],
        centered=[False, True],
        weight_decay=[0.0, 0.2],
        maximize=[False, True],
    ),
    "NAdam": grid(
        betas=[(0.9, 0.999), (0.5, 0.5)],
        momentum_decay=[4e-3, 0.5],
        weight_decay=[0.0, 0.2],
        decoupled_weight_decay=[False, True],
        maximize=[False, True],
    ),
}


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_steps_are_those_of_torch_without_a_penalty(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    for options in GRIDS[name][:: 5 if backend.on_host else 1]:
        ours = weights(backend, dtype=dtype)
        theirs = copies(ours)
        own = getattr(optim, name)(ours, **options)
        other = getattr(torch.optim, name)(theirs, **options)
        for _ in range(STEPS):
            give_grads(ours)
            for a, b in zip(ours, theirs, strict=True):
                assert a.grad is not None
                b.grad = a.grad.clone()
            own.step()
            other.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, dtype)
            assert set(own.state[a]) == set(other.state[b])
            for key, value in other.state[b].items():
                if value is not None:
                    assert_close(own.state[a][key], value, dtype)


# --- with a penalty: float64 formulas -------------------------------------------------------------

PENALTIES = [
    {"l1": 0.3},
    {"l2": 0.7},
    {"l1": 0.2, "l2": 0.5},
    {"group": 0.2},
    {"l1": 0.1, "l2": 0.3, "group": 0.15},
]
EXTRAS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.2},
    ],
    "Adam": [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True, "maximize": True, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.1, "weight_decay": 0.2}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}],
    "RMSprop": [
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.02, "momentum": 0.5, "alpha": 0.5, "centered": True, "eps": 0.1},
        {"lr": 0.02, "alpha": 0.5, "centered": True, "eps": 0.1},
    ],
    "NAdam": [{"lr": 0.1}, {"lr": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}],
    "LAMB": [
        {"lr": 0.02, "weight_decay": 0.2},
        {"lr": 0.02, "always_adapt": True, "trust_clip": True, "weight_decay": 0.0},
    ],
    "Lion": [{"lr": 0.1}, {"lr": 0.05, "betas": (0.5, 0.9), "weight_decay": 0.2}],
    "FTRL": [{"lr": 0.1}, {"lr": 0.3, "beta": 0.5, "initial_accumulator_value": 0.2}],
}


def penalized(name: str) -> list[dict[str, Any]]:
    found = []
    for extra, strengths in itertools.product(EXTRAS[name], PENALTIES):
        group = "group" in strengths
        if name == "FTRL":
            found += [] if group else [{**extra, **strengths}]
            continue
        for prox in (True, False, "capped", "decoupled", "preconditioned"):
            if name == "LAMB" and group and not prox:
                continue
            if not (group and prox in ("capped", "preconditioned") and name == "Lion"):
                found.append({**extra, **strengths, "prox": prox})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_penalized_steps_against_float64_formulas(
    backend: Backend, name: str, pytestconfig: pytest.Config
) -> None:
    # No multiple of five, the ways of prox, which follow each other: all come with all penalties.
    step = 1 if pytestconfig.getoption("all_cases") else 3
    for options in penalized(name)[:: 7 if backend.on_host else step]:
        params = weights(backend)
        with torch.no_grad():
            params[0][2] = 0.0  # an all-zero row
        references = [Reference(name, p, **options) for p in params]
        optimizer = getattr(optim, name)(params, **options)
        strengths = {k: options[k] for k in ("l1", "l2", "group") if k in options}
        for _ in range(STEPS):
            give_grads(params)
            wanted = sum(penalty(p, **strengths) for p in params)
            optimizer.step()
            for p, reference in zip(params, references, strict=True):
                assert p.grad is not None
                reference.step(p.grad)
            assert float(optimizer.penalty_value) == pytest.approx(wanted, rel=1e-6)
        for p, reference in zip(params, references, strict=True):
            # Near a threshold a rounding decides between zero and the next number.
            assert_close(p, reference.p, torch.float32, 40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """One step from the same numbers; with the gradient in each dtype."""
    options = {"lr": 0.1, "l1": 0.3, "l2": 0.2, "weight_decay": 0.0}
    for grad_dtype in DTYPES:
        params = weights(backend, [(5, 7), (70,)], dtype)
        references = [Reference(name, p, **options) for p in params]
        optimizer = getattr(optim, name)(params, **options)
        assert optimizer.penalty_value.dtype is torch.float32
        give_grads(params)
        for p, reference in zip(params, references, strict=True):
            assert p.grad is not None
            g = p.grad.to(grad_dtype)
            p.grad = g if grad_dtype == dtype else None
            reference.step(g)
            if p.grad is None:
                p.grad_dtype = grad_dtype  # type: ignore[attr-defined]
                p.grad = g
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert_close(p, reference.p, dtype, 40)
            low = dtype in (torch.float16, torch.bfloat16)
            for key in optimizer._keys:
                if key in optimizer.state[p]:
                    assert optimizer.state[p][key].dtype is (torch.float32 if low else dtype)


def test_small_steps_reach_master_weights(backend: Backend) -> None:
    """A step of less than half a unit of bfloat16 is lost without a master weight."""
    for master, moves in ((False, False), (True, True)):
        p = torch.ones(40, dtype=torch.bfloat16, device=backend.device).requires_grad_()
        optimizer = optim.SGD([p], lr=1e-3, master_weights=master, l1=1e-6)
        exact = Reference("SGD", p, lr=1e-3, l1=1e-6)
        for _ in range(8):
            p.grad = torch.ones_like(p)
            optimizer.step()
            exact.step(p.grad)
        assert bool((p != 1.0).all()) == moves
        if master:
            assert_close(optimizer.state[p]["master_param"], exact.p, torch.float32)
            assert torch.equal(p, optimizer.state[p]["master_param"].to(torch.bfloat16))


@pytest.mark.parametrize("group", [0.0, 0.1])
def test_zeros_are_positive_and_stay(backend: Backend, group: float) -> None:
    p = (torch.randn(6, 40, device=backend.device) * 1e-3).requires_grad_()
    optimizer = optim.AdamW([p], lr=0.1, l1=0.5, group=group)
    p.grad = torch.full_like(p, 1e-9)  # one of 0 would be no evidence yet
    optimizer.step()
    assert as_bits(p) == [0] * (4 * p.numel())


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_seen(backend: Backend, name: str) -> None:
    p = torch.ones(40, device=backend.device).requires_grad_()
    optimizer = getattr(optim, name)([p], lr=0.1, l1=0.1)
    p.grad = torch.ones_like(p)
    p.grad[7] = torch.nan
    optimizer.step()
    assert p.isnan().nonzero().flatten().tolist() == [7]


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0.0, 0.1])
def test_layouts(backend: Backend, group: float) -> None:
    options: dict[str, Any] = {"lr": 0.1, "l1": 0.1, "group": group}
    device = backend.device
    base = torch.randn(4, 300, device=device)
    params = [
        torch.randn(200, device=device)[3:150],  # off alignment
        torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
        torch.randn(6, 9, device=device).t(),
        base[:, 5:170],
        torch.randn(100, device=device)[::3],
        torch.complex(torch.randn(9), torch.randn(9)).to(device).conj().imag,
    ]
    params = [p.detach().requires_grad_() for p in params]
    untouched = base[:, 170:].clone()
    references = [Reference("AdamW", p.resolve_neg(), **options) for p in params]
    optimizer = optim.AdamW(params, weight_decay=0.0, **options)
    for turn in range(3):
        for p, reference in zip(params, references, strict=True):
            g = torch.randn(p.shape, device=device)
            if turn == 1:
                g = torch.randn(*p.shape, 2, device=device)[..., 0]  # a gradient in an odd layout
            p.grad = g
            reference.step(g)
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert_close(p.resolve_neg(), reference.p, torch.float32, 40)
    assert torch.equal(base[:, 170:], untouched)


def test_states_of_another_layout_are_laid_out_anew(backend: Backend) -> None:
    p = torch.randn(2, 3, 4, 5, device=backend.device).to(memory_format=torch.channels_last)
    p.requires_grad_()
    q = p.detach().contiguous().requires_grad_()
    ours, theirs = optim.Adam([p]), torch.optim.Adam([q])
    for _ in range(2):
        q.grad = torch.randn(q.shape, device=q.device)
        p.grad = q.grad.clone()
        theirs.step()
        if ours.state:
            ours.step()
        else:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            with torch.no_grad():
                p.copy_(q)
    assert_close(p, q, torch.float32)
    assert ours.state[p]["exp_avg"].stride() == p.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_tails_chunks_and_alignment(backend: Backend, dtype: torch.dtype) -> None:
    """Sizes about a vector, a tile and a chunk, each with tensors that start anywhere."""
    sizes = [1, 15, 31, 63, 511, 513] + ([] if backend.on_host else [16384, 16401, 70001])
    params, grads = [], []
    for i, n in enumerate(sizes):
        params.append(torch.randn(n + 8, device=backend.device).to(dtype)[i % 5 :][:n])
        grads.append(torch.randn(n + 8, device=backend.device).to(dtype)[i % 3 :][:n])
    params = [p.detach().requires_grad_() for p in params]
    references = [Reference("Adam", p, lr=0.1, l1=0.1) for p in params]
    optimizer = optim.Adam(params, lr=0.1, l1=0.1)
    for p, g, reference in zip(params, grads, references, strict=True):
        p.grad = g
        reference.step(g)
    optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.p, dtype, 40)


@pytest.mark.parametrize("prox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_rows_of_all_lengths(backend: Backend, dtype: torch.dtype, prox: bool) -> None:
    """Short and long ones, their beginnings and those of the states anywhere."""
    options: dict[str, Any] = {"lr": 0.1, "l1": 0.05, "group": 0.1, "prox": prox}
    params = []
    for i, shape in enumerate([(9, 3), (3, 64), (2, 257), (2, 1032), (1, 1029)]):
        p = torch.randn(shape[0] * shape[1] + 8, device=backend.device).to(dtype)
        params.append(p[i:][: shape[0] * shape[1]].view(shape).detach().requires_grad_())
    references = [Reference("Adam", p, **options) for p in params]
    optimizer = optim.Adam(params, **options)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad)
            assert_close(p, reference.p, dtype, 40)
            with torch.no_grad():
                reference.p.copy_(p)


def test_more_parameters_than_a_launch_takes(backend: Backend) -> None:
    params = weights(backend, [(3,)] * (400 if backend.on_host else 1100) + [(2, 3)] * 5)
    references = [Reference("AdamW", p, l1=0.1, group=0.2, lr=0.1) for p in params]
    optimizer = optim.AdamW(params, lr=0.1, l1=0.1, group=0.2, weight_decay=0.0)
    value = sum(penalty(p, 0.1, 0.0, 0.2) for p in params)
    give_grads(params)
    optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert p.grad is not None
        reference.step(p.grad)
        assert_close(p, reference.p, torch.float32, 40)
        assert float(optimizer.state[p]["step"]) == 1.0
    assert float(optimizer.penalty_value) == pytest.approx(value, rel=1e-6)


# --- determinism ----------------------------------------------------------------------------------


def run_some(backend: Backend, name: str, **options: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(9, 41), (700,)] if backend.on_host else [(90, 410), (70000,)]
    params = [torch.randn(s, generator=generator).to(backend.device) for s in sizes]
    params = [p.requires_grad_() for p in params]
    optimizer = getattr(optim, name)(params, lr=0.1, l1=0.1, l2=0.1, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(backend.device)
        optimizer.step()
    return [as_bits(t) for t in (*params, optimizer.penalty_value)]


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(backend: Backend, name: str) -> None:
    options: dict[str, Any] = {} if name == "FTRL" else {"group": 0.1}
    once = run_some(backend, name, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert run_some(backend, name, **options) == once
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_instruction_set(backend: Backend, name: str) -> None:
    if backend.isa is None:
        pytest.skip("a property of the CPU kernels")
    options: dict[str, Any] = {} if name == "FTRL" else {"group": 0.1}
    mine = run_some(backend, name, **options)
    fusereg._C.set_cpu_isa("baseline")
    assert run_some(backend, name, **options) == mine


# --- scaling, clipping, scalars on the device -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scaled_gradients_and_overflow(backend: Backend, name: str) -> None:
    plain = weights(backend)
    scaled = copies(plain)
    a = getattr(optim, name)(plain, lr=0.1, l1=0.1)
    b = getattr(optim, name)(scaled, lr=0.1, l1=0.1)
    for turn in range(3):
        give_grads(plain)
        for p, q in zip(plain, scaled, strict=True):
            assert p.grad is not None
            q.grad = p.grad * 1024.0
        b.grad_scale = torch.full((), 1024.0, device=backend.device)
        b.found_inf = torch.full((), float(turn == 1), device=backend.device)
        before = copy.deepcopy(b.state_dict()["state"]), copies(scaled)
        value = sum(penalty(p, 0.1) for p in scaled)
        b.step()
        assert float(b.penalty_value) == pytest.approx(value, rel=1e-6)
        if turn != 1:
            a.step()
            continue
        assert all(torch.equal(x, y) for x, y in zip(scaled, before[1], strict=True))
        for i, state in b.state_dict()["state"].items():
            assert all(torch.equal(v, before[0][i][k]) for k, v in state.items())
    for p, q in zip(plain, scaled, strict=True):
        assert_close(q, p, torch.float32)


def test_a_first_step_that_overflows_is_a_first_step_again(backend: Backend) -> None:
    p = torch.ones(4, device=backend.device).requires_grad_()
    reference = Reference("SGD", p, lr=0.1, momentum=0.9, dampening=0.5)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    for overflow in (1.0, 0.0, 0.0):
        p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.full((), overflow, device=backend.device)
        optimizer.step()
        if not overflow:
            reference.step(p.grad)
    assert_close(p, reference.p, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_clipping_inside_the_step(backend: Backend, scale: float) -> None:
    ours = weights(backend)
    theirs = copies(ours)
    own = optim.SGD(ours, lr=0.1, max_grad_norm=0.7)
    other = torch.optim.SGD(theirs, lr=0.1)
    if scale != 1.0:
        own.grad_scale = torch.full((), scale, device=backend.device)
    give_grads(ours)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
        p.grad *= scale
    before = [as_bits(p.grad) for p in ours if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    own.step()
    other.step()
    assert own.grad_norm is not None
    assert float(own.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert [as_bits(p.grad) for p in ours if p.grad is not None] == before
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_may_be_tensors(backend: Backend, name: str) -> None:
    """Read at each step, where they lie."""
    strengths = {"lr": 0.1, "l1": 0.1, "l2": 0.2, "weight_decay": 0.05}
    if name != "FTRL":
        strengths["group"] = 0.1
    a = weights(backend)
    b = copies(a)
    numbers = getattr(optim, name)(a, **strengths)
    tensors = {k: torch.full((), v, device=backend.device) for k, v in strengths.items()}
    live = getattr(optim, name)(b, **tensors)
    for factor in (1.0, 0.5):
        for key, value in strengths.items():
            numbers.param_groups[0][key] = value * factor
            tensors[key].fill_(value * factor)
        give_grads(a)
        for p, q in zip(a, b, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        numbers.step()
        live.step()
    for p, q in zip(a, b, strict=True):
        assert_close(q, p, torch.float32)
    assert float(live.penalty_value) == pytest.approx(float(numbers.penalty_value), rel=1e-6)


def test_groups_have_strengths_of_their_own(backend: Backend) -> None:
    params = weights(backend, [(5, 7), (40,), (6, 2)])
    own: list[dict[str, Any]] = [
        {"l1": 0.2, "prox": "preconditioned"},
        {"lr": 0.5, "amsgrad": True},
        {"group": 0.3, "prox": False},
    ]
    references = [
        Reference("Adam", p, **{"lr": 0.1, **o}) for p, o in zip(params, own, strict=True)
    ]
    groups = [{"params": [p], **o} for p, o in zip(params, own, strict=True)]
    optimizer = optim.Adam(groups, lr=0.1)
    for _ in range(3):
        give_grads(params)
        wanted = penalty(params[0], l1=0.2) + penalty(params[2], group=0.3)
        optimizer.step()
        assert float(optimizer.penalty_value) == pytest.approx(wanted, rel=1e-6)
        for p, reference in zip(params, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad)
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.p, torch.float32, 40)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf"), 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_grad_norm_is_torchs(backend: Backend, norm_type: float, max_norm: float) -> None:
    # torch has no maximum of no elements.
    ours = weights(backend, [s for s in SHAPES if 0 not in s or norm_type < 4])
    give_grads(ours)
    ours.append(torch.zeros(3, device=backend.device).requires_grad_())  # without a gradient
    theirs = copies(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    came = optim.clip_grad_norm_(ours, max_norm, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert float(came) == pytest.approx(float(wanted), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            assert_close(p.grad, q.grad, torch.float32)


def test_an_exhausted_generator_is_warned_of_as_by_torch() -> None:
    params = [torch.ones(3, requires_grad=True)]
    params[0].grad = torch.ones(3)
    ours: list[Callable[[Iterable[Tensor]], object]] = [
        lambda given: fusereg.functional.l1_penalty(given, 0.1),
        lambda given: fusereg.add_penalty_grad_(given, l1=0.1),
        lambda given: fusereg.prox.l1_(given, 0.1),
        fusereg.sparsity,
    ]
    for call in ours:
        spent = (p for p in params)
        list(spent)
        with pytest.warns(UserWarning, match="generator without elements") as caught:
            call(spent)
        assert caught[0].filename == __file__
    for clip in (torch.nn.utils.clip_grad_norm_, optim.clip_grad_norm_):
        spent = (p for p in params)
        list(spent)
        with pytest.warns(UserWarning, match="parameters.* generator") as caught:
            assert float(clip(spent, 0.1)) == 0.0
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clip([], 0.1)
            clip((p for p in params), 0.1)
    assert params[0].grad.norm() < 0.2


def test_norms_of_any_dtype_layout_and_size(backend: Backend) -> None:
    device = backend.device
    tensors = [
        torch.randn(40, device=device, dtype=torch.bfloat16)[3:],
        torch.randn(5, 6, device=device, dtype=torch.float64)[:, ::2],
        torch.full((50,), 1e30, device=device),  # squares overflow float32
        torch.full((70,), 60000.0, device=device, dtype=torch.float16),
    ]
    wanted = torch.cat([t.double().flatten() for t in tensors])
    for norm_type in (1.0, 2.0, float("inf")):
        norm = optim.get_total_norm(tensors, norm_type)
        assert norm.dtype is torch.float64
        assert float(norm) == pytest.approx(float(wanted.norm(norm_type)), rel=1e-7)
    tensors[0][2] = torch.nan
    for norm_type in (1.0, 2.0, float("inf")):
        assert bool(optim.get_total_norm(tensors, norm_type).isnan())
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.get_total_norm(tensors, error_if_nonfinite=True)
    assert float(optim.get_total_norm([])) == 0.0


# --- properties -----------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=5),
    name=st.sampled_from(NAMES),
    l1=st.sampled_from([0.0, 0.1, 2.0]),
    l2=st.sampled_from([0.0, 0.3]),
    missing=st.integers(0, 5),
)
def test_any_list_of_shapes(
    backend: Backend, sizes: list[list[int]], name: str, l1: float, l2: float, missing: int
) -> None:
    params = weights(backend, [tuple(s) for s in sizes])
    if not params:
        return
    references = [Reference(name, p, lr=0.1, l1=l1, l2=l2) for p in params]
    optimizer = getattr(optim, name)(params, lr=0.1, l1=l1, l2=l2, weight_decay=0.0)
    give_grads(params)
    if missing < len(params):
        params[missing].grad = None
    optimizer.step()
    for p, reference in zip(params, references, strict=True):
        if p.grad is not None:
            reference.step(p.grad)
        assert_close(p, reference.p, torch.float32, 40)


@pytest.mark.parametrize("place", ["argument", "param group", "added"])
@pytest.mark.parametrize("dim", [2, -3])
def test_a_dimension_of_groups_that_no_parameter_has_is_told_when_it_is_given(
    place: str, dim: int
) -> None:
    def vector() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(5))  # whose groups are along 0, whatever is asked for

    def matrix() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(3, 4))

    group: dict[str, Any] = {"params": [vector(), matrix()], "group": 0.1, "group_dim": dim}
    wanted = r"SGD: group_dim must be a dimension of params\[{}\], whose shape is \(3, 4\), got"
    if place == "argument":
        with pytest.raises(ValueError, match=wanted.format(1)):
            optim.SGD(group["params"], group=0.1, group_dim=dim)
    elif place == "param group":
        with pytest.raises(ValueError, match=wanted.format(2)):
            optim.SGD([{"params": [matrix()]}, group])
    else:
        optimizer = optim.SGD([matrix()])
        with pytest.raises(ValueError, match=wanted.format(2)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({**group, "params": [vector()]})
    optim.SGD([matrix()], group_dim=dim)  # without a strength there are no groups
