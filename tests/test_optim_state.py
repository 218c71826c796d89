"""The states of optimizers: under schedules, when weights change from outside, and averages."""

from __future__ import annotations

import contextlib
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

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "FTRL", "RMSprop", "NAdam", "Lion", "LAMB"]
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


@pytest.mark.parametrize(("l1", "group"), [(1e-3, 0.0), (1e-3, 0.05), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_weight_is_taken_for_its_master(
    backend: Backend, name: str, dtype: torch.dtype, l1: float, group: float
) -> None:
    """Element by element: others keep the digits that only the master has."""
    own = {"group": group} if name != "FTRL" else {}
    params = [random(backend, *shape, dtype=dtype) for shape in ((5, 7), (3, 600), (2, 9))]
    optimizer = getattr(optim, name)(params, lr=1e-3, l1=l1, master_weights=True, **own)
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
        wanted = getattr(optim, name)(wanted_params, lr=1e-3, l1=l1, master_weights=True, **own)
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


# --- averages of the weights ----------------------------------------------------------------------


class Weights(nn.Module):
    """A module of some parameters, for the averages of torch and timm."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in params])
        self.register_buffer("count", torch.zeros(()))

    def take(self, params: list[Tensor]) -> None:
        for own, p in zip(self.params, params, strict=True):
            own.data.copy_(p.detach())


def averages_of(optimizer: RegularizedOptimizer, params: list[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["ema_param"] for p in params]


OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "Adagrad": {"lr": 0.1},
    "FTRL": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "NAdam": {"lr": 0.1},
    "Lion": {"lr": 0.1},
    "LAMB": {"lr": 0.1},
}


@pytest.mark.parametrize("group", [0.0, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.4, 0.999], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_averages_are_those_of_torch(
    backend: Backend, name: str, decay: float, group: float
) -> None:
    """From any alignment, in float32 and float64; the weights have the bits of a step without."""
    whole = [random(backend, 5, 7), random(backend, 2, 700), random(backend, 40)]
    whole[2] = torch.randn(50, device=backend.device)[3:40].requires_grad_()
    params = [*whole, random(backend, 33, dtype=torch.float64)]
    plain = [p.detach().clone().requires_grad_() for p in params]
    own = {**OPTIONS[name], "l1": 0.01} | ({"group": group} if group and name != "FTRL" else {})
    optimizer = getattr(optim, name)(params, **own, ema_decay=decay)
    other = getattr(optim, name)(plain, **own)
    module = Weights(plain)
    average = swa_utils.AveragedModel(
        module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), device=backend.device
    )
    for _ in range(4):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        module.take(plain)
        average.update_parameters(module)
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
    for a, b in zip(averages_of(optimizer, params), average.module.params, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_are_those_of_timm(warmup: bool) -> None:
    """With its warm-up too, which a schedule of ``ema_decay`` gives."""
    import other_libraries  # noqa: F401

    utils = pytest.importorskip("timm.utils")
    params = [torch.randn(5, 7).requires_grad_(), torch.randn(33).requires_grad_()]
    optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.99)
    averages = None
    for turn in range(12):
        for p in params:
            p.grad = torch.randn_like(p)
        if averages is not None:
            optimizer.param_groups[0]["ema_decay"] = averages.get_decay(turn if warmup else None)
        optimizer.step()
        module = Weights(params)
        if averages is None:
            averages = utils.ModelEmaV3(module, decay=0.99, use_warmup=warmup)
        else:
            averages.update(module, step=turn if warmup else None)
    assert averages is not None
    for a, b in zip(averages_of(optimizer, params), averages.module.params, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
def test_averages_of_16_bit_weights_are_float32(
    backend: Backend, dtype: torch.dtype, master: bool
) -> None:
    """Of the master, if there is one, else of the rounded weights."""
    params = [random(backend, 3, 130, dtype=dtype), random(backend, 21, dtype=dtype)]
    optimizer = optim.AdamW(
        params, lr=1e-3, l1=0.01, group=0.01, master_weights=master, ema_decay=0.75
    )
    wanted: list[Tensor] = []
    for turn in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        now = [optimizer.state[p]["master_param"] if master else p.float() for p in params]
        if turn == 0:
            wanted = [p.detach().clone() for p in now]
        for a, p in zip(wanted, now, strict=True):
            a.lerp_(p.detach(), 0.25)
    for a, b in zip(averages_of(optimizer, params), wanted, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_bfloat16_average_at_a_large_decay_moves() -> None:
    p = torch.ones(8, dtype=torch.bfloat16).requires_grad_()
    optimizer = optim.SGD([p], lr=0.0, ema_decay=0.9999)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        p.fill_(2.0)
    for _ in range(2000):
        optimizer.step()
    wanted = 2.0 - 0.9999**2000
    assert float(optimizer.state[p]["ema_param"][0]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_a_gradient_are_averaged_too(backend: Backend, name: str) -> None:
    """As in the libraries; also at a rate of 0. Not in a step that a GradScaler skips."""
    p, q = random(backend, 9), random(backend, 9)
    optimizer = getattr(optim, name)([p, q], **OPTIONS[name], ema_decay=0.5)
    for t in (p, q):
        t.grad = torch.randn_like(t)
    optimizer.step()
    with torch.no_grad():
        q.add_(1.0)
    wanted = [(optimizer.state[t]["ema_param"] + t.detach()) / 2 for t in (p, q)]
    optimizer.param_groups[0]["lr"] = 0.0
    q.grad = None
    for skipped in (1.0, 0.0):
        before = [a.clone() for a in averages_of(optimizer, [p, q])]
        optimizer.found_inf = torch.full((), skipped, device=backend.device)
        optimizer.step()
        after = averages_of(optimizer, [p, q])
        torch.testing.assert_close(after, before if skipped else wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("l1", [0.0, 0.01])
@pytest.mark.parametrize("dtype", LOW, ids=["float16", "bfloat16"])
def test_a_changed_weight_is_averaged_where_its_step_rests(
    backend: Backend, dtype: torch.dtype, l1: float
) -> None:
    """At a rate of 0 FTRL writes no weight; its average is of the weight, not of the old master."""
    params = [random(backend, n, dtype=dtype) for n in (3, 130, 16400)]
    optimizer = optim.FTRL(params, lr=0.1, l1=l1, master_weights=True, ema_decay=0.5)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    wanted = []
    for p, average in zip(params, averages_of(optimizer, params), strict=True):
        master = optimizer.state[p]["master_param"].clone()
        with torch.no_grad():
            p[1::2] += 1.0
        master[1::2] = p.detach()[1::2].float()
        wanted.append((average + master) / 2)
    optimizer.step()
    torch.testing.assert_close(averages_of(optimizer, params), wanted, rtol=1e-6, atol=1e-6)


def test_groups_have_decays_of_their_own_or_none() -> None:
    params = [torch.randn(4).requires_grad_() for _ in range(3)]
    decays = (0.5, None, torch.tensor(0.25))
    optimizer = optim.AdamW(
        [{"params": [p], "ema_decay": d} for p, d in zip(params, decays, strict=True)], lr=0.1
    )
    wanted = []
    for turn in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if turn == 0:
            wanted = [p.detach().clone() for p in params]
    assert "ema_param" not in optimizer.state[params[1]]
    for i in (0, 2):
        average = optimizer.state[params[i]]["ema_param"]
        torch.testing.assert_close(average, wanted[i].lerp(params[i].detach(), 1 - decays[i]))


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Linear, Any]:
    model = nn.Linear(6, 5).to(dtype)
    options = {"lr": 0.05, "l1": 0.05, "ema_decay": 0.5, **options}
    optimizer = optim.AdamW(model.parameters(), **options)
    train(model, optimizer, 4)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("master", [False, True])
def test_the_model_shows_its_averages_and_gets_its_bits_back(master: bool) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    model, optimizer = trained(dtype, master_weights=master)
    params = list(model.parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with contextlib.suppress(KeyError), optimizer.averaged():
        for p, average in zip(params, averages_of(optimizer, params), strict=True):
            assert torch.equal(p, average.to(dtype))
        saved = copy.deepcopy(model.state_dict())
        raise KeyError
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
    optimizer.copy_averaged()
    torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0.0, atol=0.0)


def test_the_zeros_of_the_weights_are_kept_on_request() -> None:
    model, optimizer = trained(l1=0.9)
    weight = model.weight
    zeros = weight.detach() == 0
    assert 0 < int(zeros.sum()) < zeros.numel()
    with optimizer.averaged():
        assert int((weight == 0).sum()) < int(zeros.sum())
        dense = weight.detach().clone()
    with optimizer.averaged(keep_zeros=True):
        assert torch.equal(weight.detach(), torch.where(zeros, 0.0, dense))
    optimizer.copy_averaged(keep_zeros=True)
    assert torch.equal(weight.detach() == 0, zeros)


def test_what_is_written_inside_stays() -> None:
    """The best weights that early stopping restores, for example."""
    model, optimizer = trained()
    raw = copy.deepcopy(model.state_dict())
    with optimizer.averaged(), torch.no_grad():
        model.weight.copy_(model.weight.clone())  # the same numbers, but on purpose
        average = model.weight.clone()
    assert torch.equal(model.weight, average)
    assert torch.equal(model.bias, raw["bias"])
    with optimizer.averaged():
        model.bias.data.fill_(3.0)
    assert bool((model.bias == 3.0).all())


def test_early_stopping_keeps_and_restores_the_averages_that_were_validated() -> None:
    model, optimizer = trained()
    stopper = EarlyStopping(model, patience=2)
    shown = []
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 2.0]):
        train(model, optimizer, 2)
        with optimizer.averaged():
            shown.append(copy.deepcopy(model.state_dict()))
            stopper.step(loss, epoch=epoch)
            if stopper.stopped:
                stopper.restore()
    assert stopper.best_epoch == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, shown[1][key])


def test_nothing_steps_while_the_averages_are_shown() -> None:
    model, optimizer = trained()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with optimizer.averaged():
        for call in (optimizer.step, optimizer.copy_averaged, optimizer.averaged().__enter__):
            with pytest.raises(RuntimeError, match="hold their averages, inside averaged"):
                call()
    optimizer.step()


def test_without_a_decay_there_are_no_averages() -> None:
    _, optimizer = trained(ema_decay=None)
    for call in (optimizer.copy_averaged, optimizer.averaged().__enter__):
        with pytest.raises(ValueError, match="there are no averages without ema_decay"):
            call()
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1.0\)"):
            trained(ema_decay=decay)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_averages_resume(name: str, dtype: torch.dtype) -> None:
    """With the same bits; of a state dict without averages they begin at the next step."""
    model = nn.Linear(6, 5).to(dtype)
    options = {**OPTIONS[name], "master_weights": True, "ema_decay": 0.9}
    optimizer = getattr(optim, name)(model.parameters(), **options)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(5)
    train(model, optimizer, 2)
    other = nn.Linear(6, 5).to(dtype)
    resumed = getattr(optim, name)(other.parameters(), **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.manual_seed(5)
    train(other, resumed, 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["ema_param"], resumed.state[q]["ema_param"])
    for state in saved[1]["state"].values():
        del state["ema_param"]
    resumed.load_state_dict(saved[1])
    train(other, resumed, 1)
    for q in other.parameters():
        assert torch.equal(resumed.state[q]["ema_param"].to(dtype), q)


def test_odd_layouts_are_averaged() -> None:
    base = torch.randn(4, 300)
    params = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        base[:, 5:170],
        torch.randn(100)[::3],
    ]
    params = [p.detach().requires_grad_() for p in params]
    optimizer = optim.AdamW(params, lr=0.1, group=0.01, ema_decay=0.5)
    wanted: list[Tensor] = []
    for turn in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
        if turn == 0:
            wanted = [p.detach().clone() for p in params]
        wanted = [a.lerp(p.detach(), 0.5) for a, p in zip(wanted, params, strict=True)]
    for a, b in zip(averages_of(optimizer, params), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["|=", "update", "assignment", "replaced"])
def test_states_that_are_put_in_by_hand_are_those_of_the_next_step(how: str) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs = optim.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for optimizer, param in ((ours, p), (theirs, q)):
        for step in range(3):
            param.grad = torch.tensor([0.1, -0.2, 0.3]) * (step + 1)
            optimizer.step()
            if step > 0:
                continue
            new = {"step": torch.tensor(7.0), "exp_avg": torch.full((3,), 0.5)}
            new["exp_avg_sq"] = torch.full((3,), 0.25)
            if how == "|=":
                optimizer.state |= {param: new}  # type: ignore[assignment]
            elif how == "update":
                optimizer.state.update({param: new})
            elif how == "assignment":
                optimizer.state[param] = new
            else:
                optimizer.state = type(optimizer.state)(dict, {param: new})
    torch.testing.assert_close(p, q)
