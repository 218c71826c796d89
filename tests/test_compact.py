"""Removing channels that are zero: groups_of and compact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg

pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def kill(
    model: nn.Module,
    x: Any,
    share: float = 0.5,
    seed: int = 0,
    readers: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Set random channels of every set to zero; return how many are left of each.

    Momenta in the optimizer would bring them back to life: they become zero as well.
    """
    draw = torch.Generator().manual_seed(seed)
    left = {}
    for group in fusereg.groups_of(model, x, readers=readers):
        dead = torch.rand(group.size, generator=draw) < share
        dead[int(torch.randint(group.size, (), generator=draw))] = False
        for member in (*group.members, *group.readers):
            slices = (dead[member.channels.clamp_min(0)] & (member.channels >= 0)).nonzero()
            states = {} if optimizer is None else optimizer.state[member.parameter]
            moments = [states[k] for k in ("exp_avg", "momentum_buffer") if k in states]
            with torch.no_grad():
                for tensor in (member.parameter, *moments):
                    tensor.index_fill_(member.dim, slices.flatten(), 0)
        left[group.name] = int((~dead).sum())
    return left


def shaken(model: nn.Module) -> nn.Module:
    """The model with random batch norms, as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 20) -> None:
    draw = torch.Generator().manual_seed(5)
    model.train()
    for _ in range(steps):
        batch = torch.randn(x.shape, generator=draw)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    model.eval()


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        *(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    )
    return net, torch.randn(4, 6)


def chain() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)),
    )
    return shaken(net).eval(), torch.randn(4, 3, 6, 6)


SMALL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mlp": mlp, "chain": chain}


@pytest.mark.parametrize("name", SMALL)
def test_the_smaller_model_has_the_outputs_and_only_the_channels_that_live(name: str) -> None:
    net, x = SMALL[name]()
    left = kill(net, x)
    before = copy.deepcopy(net.state_dict())
    small = fusereg.compact(net, x)
    assert off(small.eval()(x), net.eval()(x)) < 1e-12
    sizes = {g.name: g.size for g in fusereg.groups_of(small, x)}
    assert sizes == left
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_training_goes_on_as_with_the_zeros(name: str, kind: str, own: bool) -> None:
    net, x = SMALL[name]()
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01}
    if kind == "SGD":
        settings["momentum"] = 0.9
    make = getattr(fusereg.optim if own else torch.optim, kind)
    optimizer = make(net.parameters(), **settings)
    train(net, optimizer, x, 3)
    kill(net, x, optimizer=optimizer)
    zeroed, its = copy.deepcopy((net, optimizer))
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    train(zeroed, its, x)
    train(small, optimizer, x)
    assert off(small(x), zeroed(x)) < 1e-10
