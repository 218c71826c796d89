"""Optimizers of every kind go on with the smaller model, or are refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fusereg
from test_compact import chain, off
from test_compact import double as double  # in float64 from one seed

pytest.importorskip("torch_pruning")

Optimizer: TypeAlias = torch.optim.Optimizer
T, F = torch.optim, fusereg.optim

KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: T.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, foreach": lambda p: T.SGD(p, 0.01, momentum=0.9, foreach=True),
    "Adam, amsgrad": lambda p: T.Adam(p, 0.01, amsgrad=True, foreach=False),
    "Adam, lr in a tensor": lambda p: T.Adam(p, torch.tensor(0.01), foreach=False),
    "AdamW, foreach": lambda p: T.AdamW(p, 0.01, amsgrad=True, foreach=True),
    "AdamW, fused": lambda p: T.AdamW(p, 0.01, fused=True),
    "NAdam": lambda p: T.NAdam(p, 0.01),
    "RAdam": lambda p: T.RAdam(p, 0.01),
    "Adamax": lambda p: T.Adamax(p, 0.01),
    "Adadelta": lambda p: T.Adadelta(p),
    "Adagrad": lambda p: T.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda p: T.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: T.Rprop(p, 0.01),
    "ASGD": lambda p: T.ASGD(p, 0.01, t0=2),
    "fusereg SGD": lambda p: F.SGD(p, lr=0.01, momentum=0.9, l1=1e-4),
    "fusereg Adam": lambda p: F.Adam(p, lr=0.01, amsgrad=True, l1=1e-4),
    "fusereg AdamW": lambda p: F.AdamW(p, lr=0.01, amsgrad=True, ema_decay=0.9),
    "fusereg NAdam": lambda p: F.NAdam(p, lr=0.01, l2=1e-3),
    "fusereg RMSprop": lambda p: F.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "fusereg Adagrad": lambda p: F.Adagrad(p, lr=0.01, l1=1e-4),
    "fusereg LAMB": lambda p: F.LAMB(p, lr=0.0005),  # larger ones let a rounding grow
    "fusereg Lion": lambda p: F.Lion(p, lr=0.001),
    "fusereg FTRL": lambda p: F.FTRL(p, lr=0.01, l1=1e-4),
}


def train(net: nn.Module, x: Tensor, step: Callable[[Tensor], object], steps: int) -> None:
    draw = torch.Generator().manual_seed(5)
    net.train()
    for _ in range(steps):
        loss = net(torch.randn(x.shape, generator=draw)).square().mean()
        loss.backward()
        step(loss)
        net.zero_grad()
    net.eval()


def kill(net: nn.Module, x: Tensor, optimizer: Optimizer, share: float = 0.5) -> None:
    """Set channels to zero, their readers too, with all that the optimizer has of them."""
    draw = torch.Generator().manual_seed(0)
    for own in fusereg.groups_of(net, x, readers=True):
        dead = torch.rand(own.size, generator=draw) < share
        dead[0] = False
        for m in (*own.members, *own.readers):
            slices = (dead[m.channels.clamp_min(0)] & (m.channels >= 0)).nonzero().flatten()
            states = optimizer.state.get(m.parameter, {}).values()
            with torch.no_grad():
                for t in (m.parameter, *states):
                    if isinstance(t, Tensor) and t.shape == m.parameter.shape:
                        t.index_fill_(m.dim, slices, 0)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_with_the_zeros(kind: str) -> None:
    net, x = chain()
    optimizer = KINDS[kind](net.parameters())
    train(net, x, lambda _: optimizer.step(), 3)
    kill(net, x, optimizer)
    zeroed, its = copy.deepcopy((net, optimizer))
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert size(small) < 0.7 * size(net)
    train(zeroed, x, lambda _: its.step(), 20)
    train(small, x, lambda _: optimizer.step(), 20)
    assert off(small(x), zeroed(x)) < 1e-10
    assert off(small(x), net(x)) > 1e-3  # which has not moved


def test_all_optimizers_of_this_package_are_among_them() -> None:
    own = {n for n in dir(F) if isinstance(getattr(F, n), type)}
    own = {n for n in own if issubclass(getattr(F, n), torch.optim.Optimizer)}
    assert own == {kind.split()[1] for kind in KINDS if kind.startswith("fusereg ")}


@pytest.mark.parametrize("kind", ["SGD", "AdamW, foreach", "fusereg AdamW"])
def test_schedulers_scalers_and_averages_go_on(kind: str) -> None:
    """Two param groups with rates of their own, and all that usually goes with an optimizer."""
    net, x = chain()
    first, rest = [], []
    for name, p in net.named_parameters():
        (first if name.startswith("0.") else rest).append(p)
    optimizer = KINDS[kind]([{"params": first, "lr": 0.003}, {"params": rest}])
    schedulers: list[Any] = [
        T.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=40),
        T.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    ]
    average = AveragedModel(net, use_buffers=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)

    def stepping(net: nn.Module, parts: tuple[Any, ...]) -> Callable[[Tensor], None]:
        optimizer, schedulers, average, scaler = parts

        def step(loss: Tensor) -> None:
            with torch.no_grad():  # as scaler.scale(loss).backward() would
                for p in net.parameters():
                    p.grad *= scaler.scale(torch.ones(())).item()
            scaler.step(optimizer)
            scaler.update()
            schedulers[0].step()
            schedulers[1].step(float(loss.detach()))
            average.update_parameters(net)

        return step

    parts = optimizer, schedulers, average, scaler
    train(net, x, stepping(net, parts), 3)
    kill(net, x, optimizer)
    zeroed, its = copy.deepcopy((net, parts))
    small = fusereg.compact(net, x, optimizer=optimizer, averaged=average)
    assert size(average.module) == size(small) < 0.7 * size(net)
    train(zeroed, x, stepping(zeroed, its), 20)
    train(small, x, stepping(small, parts), 20)
    assert off(small(x), zeroed(x)) < 1e-10
    assert average.n_averaged == its[2].n_averaged == 23
    rates = [[g["lr"] for g in o.param_groups] for o in (optimizer, its[0])]
    assert rates[0] == rates[1]
    assert rates[0][0] != rates[0][1]
    assert scaler.get_scale() == its[3].get_scale() > 4.0


def test_an_average_of_weights_gets_the_constants_that_were_folded() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    optimizer = T.ASGD(net.parameters(), 0.01, t0=0)
    train(net, x, lambda _: optimizer.step(), 3)
    with torch.no_grad():
        net[0].weight[:4], net[0].bias[:4] = 0, 0.5
    before = optimizer.state[net[2].bias]["ax"].clone()
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert small[0].out_features == 4
    added = small[2].bias - net[2].bias
    assert added.abs().min() > 1e-3
    torch.testing.assert_close(optimizer.state[small[2].bias]["ax"], before + added.detach())


class Wrapped(torch.optim.SGD):
    """An optimizer around another one, whose states it does not show."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, lr=0.1)
        self.base = {"of": [base]}


class Lists(torch.optim.SGD):
    """An optimizer that keeps several statistics of a parameter in a list."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["factors"] = [torch.eye(n) for n in p.shape]
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: T.LBFGS(p), r"\(LBFGS\) keeps parameters in _params"),
        (lambda p: Wrapped(T.Adam(p)), r"\(Wrapped\) keeps parameters in base"),
        (lambda p: T.Adafactor(p), "keeps row_var of shape"),
        (lambda p: Lists(p, 0.1), "keeps factors of shape"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_cannot_follow_is_refused_and_nothing_changes(
    make: Callable[[Any], Optimizer], text: str, first: bool
) -> None:
    """Whether the first layer is cut, or the second alone."""
    net = nn.Sequential(
        *(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    x = torch.randn(4, 6)
    optimizer = make(net.parameters())
    if not isinstance(optimizer, T.LBFGS):
        train(net, x, lambda _: optimizer.step(), 1)
    with torch.no_grad():
        for p in (net[0] if first else net[2]).parameters():
            p[:4] = 0
    held = [id(p) for p in net.parameters()]
    with pytest.raises(ValueError, match=text):
        fusereg.compact(net, x, optimizer=optimizer)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == held


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_a_member_that_was_frozen_stays_one(frozen: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    groups = fusereg.groups_of(model.double(), x)
    with torch.no_grad():
        for member in groups[0].members:
            member.parameter[:3] = 0
    model.get_parameter(frozen).requires_grad_(False)
    large = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.1, "group": 0.5, "group_weights": [1.0]}
    optimizer = fusereg.optim.SGD(model.parameters(), groups=groups, **options)
    of_large = fusereg.optim.SGD(large.parameters(), groups=groups.of(large), **options)
    small = fusereg.compact(model, x, optimizer=optimizer)
    assert optimizer.groups is not None
    assert {m.name for s in optimizer.groups for m in s.members} == {
        m.name for s in groups for m in s.members
    }
    for name, p in small.named_parameters():
        assert p.requires_grad == (name != frozen)
    for _ in range(3):
        for net, one in ((large, of_large), (small, optimizer)):
            one.zero_grad()
            net(x).square().mean().backward()
            one.step()
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("watched", ["another", "none", "inside of a wrapper"])
def test_the_stopper_is_the_models(watched: str) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    model, x = make(), torch.randn(4, 6)
    own = {"another": make(), "none": None, "inside of a wrapper": nn.Sequential(model)}[watched]
    stopper = fusereg.EarlyStopping(own, patience=3)
    if watched == "inside of a wrapper":
        fusereg.compact(model, x, stopper=stopper)
        return
    with pytest.raises(ValueError, match="stopper watches another model, or none"):
        fusereg.compact(model, x, stopper=stopper)
