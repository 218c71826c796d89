"""The states of optimizers: under schedules, when weights change from outside, and averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from conftest import TOLERANCES, Backend
from fusereg import EarlyStopping, optim, prox
from fusereg.optim.optimizer import RegularizedOptimizer
from reference_optim import Reference

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "FTRL"]
LOW = [torch.float16, torch.bfloat16]


def random(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(backend.device, dtype).requires_grad_()


def assert_close(came: Tensor, wanted: Tensor, factor: float = 40.0) -> None:
    came, wanted = came.detach().double().cpu(), wanted.double().cpu()
    scale = max(float(wanted.abs().max()), 1.0)
    atol = factor * TOLERANCES[torch.float32] * scale
    torch.testing.assert_close(came, wanted, rtol=0.0, atol=atol)


# --- schedules ------------------------------------------------------------------------------------

STEPS = 24
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS // 2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 0.2, 4, cycle_momentum=cycles(o)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.6),
    "LRScheduler": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1e-4 if 5 <= t < 15 else 1.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 10)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 10),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9], 0.1),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 1.5 if t < 5 else 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.3, total_steps=STEPS + 1, cycle_momentum=cycles(o)
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS // 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, 4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01), lr_scheduler.StepLR(o, 2, 0.5)], [6]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.3),
}


def cycles(optimizer: torch.optim.Optimizer) -> bool:
    group = optimizer.param_groups[0]
    return bool(group.get("momentum")) or "betas" in group


def test_all_schedulers_of_torch_are_here() -> None:
    assert {*lr_scheduler.__all__, "SWALR"} == set(SCHEDULES)


def follow(optimizer: RegularizedOptimizer, reference: Reference) -> None:
    """Step both, the reference with the numbers that a schedule has set."""
    (group,) = optimizer.param_groups
    (p,) = group["params"]
    reference.o.update({key: group[key] for key in reference.o if key in group})
    reference.step(p.grad)
    optimizer.step()


@pytest.mark.parametrize("strengths", [{}, {"l1": 0.4, "l2": 0.2}], ids=["plain", "penalized"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", NAMES)
def test_steps_under_a_schedule_are_those_of_the_formula(
    name: str, schedule: str, strengths: dict[str, float]
) -> None:
    """In float64 to the last digits, in float32 from the same gradients as closely as it can."""
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    for dtype, factor in ((torch.float64, 1e-5), (torch.float32, 100.0)):
        p = torch.randn(60, dtype=dtype).requires_grad_()
        options = {"lr": 0.1, "weight_decay": 0.01, **momentum, **strengths}
        optimizer = getattr(optim, name)([p], **options)
        reference = Reference(name, p, **options)
        scheduler = SCHEDULES[schedule](optimizer)
        for _ in range(STEPS):
            p.grad = torch.randn_like(p)
            follow(optimizer, reference)
            scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
        assert_close(p, reference.p, factor)


@pytest.mark.parametrize("strengths", [{}, {"l1": 1.0, "l2": 0.5}], ids=["plain", "penalized"])
def test_ftrl_forgets_nothing_while_the_rate_is_near_zero(
    backend: Backend, strengths: dict[str, float]
) -> None:
    p = random(backend, 50)
    reference = Reference("FTRL", p, **strengths)
    optimizer = optim.FTRL([p], lr=0.1, **strengths)
    for turn in range(60):
        optimizer.param_groups[0]["lr"] = 1e-8 if 10 <= turn < 50 else 0.1
        p.grad = torch.randn_like(p)
        follow(optimizer, reference)
    assert_close(p, reference.p)
    assert not strengths or torch.equal(p.detach().cpu() == 0, reference.p == 0)


def test_ftrl_at_a_constant_rate_is_the_papers_recurrence(backend: Backend) -> None:
    """Algorithm 1 of McMahan et al. 2013, line by line, from zero weights."""
    alpha, beta, l1, l2 = 0.3, 0.7, 0.8, 0.4
    p = torch.zeros(50, device=backend.device).requires_grad_()
    optimizer = optim.FTRL([p], alpha, beta, l1=l1, l2=l2)
    z = torch.zeros(50, dtype=torch.float64)
    n, w = z.clone(), z.clone()
    for _ in range(30):
        p.grad = torch.randn_like(p)
        g = p.grad.double().cpu()
        sigma = ((n + g * g).sqrt() - n.sqrt()) / alpha
        z += g - sigma * w
        n += g * g
        w = torch.where(z.abs() <= l1, 0.0, -(z - z.sign() * l1) / ((beta + n.sqrt()) / alpha + l2))
        optimizer.step()
        assert_close(p, w)
        assert_close(optimizer.state[p]["linear"], z)
    assert 0 < int((w == 0).sum()) < 50


@pytest.mark.parametrize("strengths", [{}, {"l1": 1.0, "l2": 0.5}], ids=["plain", "penalized"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_changes_moves_no_weight_by_itself(
    name: str, strengths: dict[str, float]
) -> None:
    """FTRL too, whose z holds the weights at the rate of each step."""
    p = torch.randn(40, dtype=torch.float64).requires_grad_()
    optimizer = getattr(optim, name)([p], lr=0.1, **({} if name != "FTRL" else strengths))
    if name in ("SGD", "Adagrad", "FTRL"):  # no momentum
        p.grad = torch.randn_like(p)
        optimizer.step()
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    for rate in (0.05, 1e-8, 0.3, 1e3):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        torch.testing.assert_close(p.detach(), before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ftrl_goes_on_from_a_state_that_has_no_last_step(dtype: torch.dtype) -> None:
    """As earlier versions saved it."""
    p = torch.randn(50).to(dtype).requires_grad_()
    optimizer = optim.FTRL([p], lr=0.1, l1=0.5, l2=0.1)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step()
    q = p.detach().clone().requires_grad_()
    other = optim.FTRL([q], lr=0.1, l1=0.5, l2=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["last"]
    other.load_state_dict(saved)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(p, q)


# --- weights that are kept twice ------------------------------------------------------------------


def by_slice(p: Tensor) -> None:
    p[3:9] = 2.5


def by_load(p: Tensor) -> None:
    module = nn.Module()
    module.p = nn.Parameter(p)
    module.p.data = p.data
    module.load_state_dict({"p": torch.full_like(p, -0.75)})


def by_data(p: Tensor) -> None:
    p.data.copy_(torch.linspace(-2, 2, p.numel()).view_as(p))


def by_vector(p: Tensor) -> None:
    nn.utils.vector_to_parameters(torch.ones(p.numel(), device=p.device, dtype=p.dtype), [p])


def by_storage(p: Tensor) -> None:
    p.data = torch.full_like(p, 3.0)


def by_prox(p: Tensor) -> None:
    prox.l1_([p], 0.5)


def by_zero(p: Tensor) -> None:
    p.data.mul_(p.data.abs() > 0.5)


def by_sign_of_zero(p: Tensor) -> None:
    p.data.fill_(-0.0)


EDITS = [
    by_slice,
    by_load,
    by_data,
    by_vector,
    by_storage,
    by_prox,
    by_zero,
    by_sign_of_zero,
]


@pytest.mark.parametrize("group", [0.0, 0.05])
@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_weight_is_taken_for_its_master(
    backend: Backend, name: str, dtype: torch.dtype, group: float
) -> None:
    """Element by element: others keep the digits that only the master has."""
    own = {"group": group} if name != "FTRL" else {}
    params = [random(backend, *shape, dtype=dtype) for shape in ((5, 7), (3, 600), (2, 9))]
    optimizer = getattr(optim, name)(params, lr=1e-3, l1=1e-3, master_weights=True, **own)
    for edit in EDITS:
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        masters = [optimizer.state[p]["master_param"].clone() for p in params]
        lost = sum(int((m != p.float()).sum()) for m, p in zip(masters, params, strict=True))
        assert lost > 0
        with torch.no_grad():
            for p in params:
                edit(p)
        wanted_params = [p.detach().clone().requires_grad_() for p in params]
        wanted = getattr(optim, name)(wanted_params, lr=1e-3, l1=1e-3, master_weights=True, **own)
        wanted.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q, master in zip(params, wanted_params, masters, strict=True):
            kept = master.to(dtype).view(torch.int16) == q.detach().view(torch.int16)
            wanted.state[q]["master_param"] = torch.where(kept, master, q.detach().float())
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        wanted.step()
        assert torch.equal(optimizer.penalty_value, wanted.penalty_value)
        for p, q in zip(params, wanted_params, strict=True):
            assert torch.equal(p, q)
            master = optimizer.state[p]["master_param"]
            assert torch.equal(master, wanted.state[q]["master_param"])


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=["float32", "float16", "bfloat16"])
def test_ftrl_goes_on_from_changed_weights(
    backend: Backend, dtype: torch.dtype, edit: Callable[[Tensor], None]
) -> None:
    """With a gradient of zero they stay as they are, up to the rounding of the formula."""
    p = random(backend, 6, 50, dtype=dtype)
    optimizer = optim.FTRL([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    with torch.no_grad():
        edit(p)
    wanted = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
def test_small_steps_of_ftrl_add_up_in_z(backend: Backend, dtype: torch.dtype) -> None:
    """Each is less than half a unit of the parameter; z has the digits."""
    p = torch.tensor([1.0, -1.0, 0.5, 3.0], device=backend.device).to(dtype).requires_grad_()
    reference = Reference("FTRL", p, lr=1e-4)
    optimizer = optim.FTRL([p], lr=1e-4)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        follow(optimizer, reference)
    moved = reference.p - torch.tensor([1.0, -1.0, 0.5, 3.0])
    assert float(moved.abs().min()) > 2e-3
    torch.testing.assert_close(
        p.detach().double().cpu(), reference.p, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_model_trains_on_from_the_restored_weights(name: str) -> None:
    model = nn.Linear(4, 4).bfloat16()
    stopper = EarlyStopping(model, patience=9)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.5, master_weights=True)
    best: list[Tensor] = []
    for epoch in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        if epoch == 1:
            best = [p.detach().clone() for p in model.parameters()]
        stopper.step([1.0, 0.1, 0.9, 0.9][epoch], epoch=epoch)
    stopper.restore()
    optimizer.param_groups[0]["lr"] = 1e-6
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, wanted in zip(model.parameters(), best, strict=True):
        torch.testing.assert_close(p.detach(), wanted)
