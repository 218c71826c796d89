"""Benchmark of compaction: a network with channels that are zero, and the one without them.

A residual network of 18 layers on images of 64 x 64 pixels, and a small vision transformer, of
which only the hidden units of the MLPs can go. So many random channels are made zero that at most
40 % of the multiply-adds of convolutions and linear layers are left, with numbers of channels that
are multiples of 16. Two modes:

- ``inference``: the forward pass, without autograd, in evaluation.
- ``step``: forward, mean and backward, in training.

Both networks are of torch's layers: ``eager`` is the one with its zeros, ``fusereg`` what
:func:`fusereg.compact` makes of it. Needs Torch-Pruning (``fusereg[compact]``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusereg

from ..harness import EAGER, Accuracy, Call, Case, Options, Provider, Workload
from ..harness.layers import training_case
from ..models import Layer, Mlp, ResNet, ViT

OP = "compact"
SMALL = "fusereg"
PROVIDERS = (EAGER, SMALL)
INFERENCE, STEP = "inference", "step"
#: The share of the multiply-adds that is left at most, and the multiple of channels that stays.
SHARE, ROUND_TO = 0.4, 16


class Network(NamedTuple):
    """A network, its input, and the share of its channels that is made zero first."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dead: float


def resnet18(widths: tuple[int, ...] = (64, 128, 256, 512), depth: int = 2) -> nn.Module:
    """Return the network of He et al. 2016, with its stem of stride 4."""
    model = ResNet(widths, depth, dropout=0.0, channels=3)
    model.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
    stem: Any = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model.relu = stem
    return model


def vit(width: int = 192, depth: int = 4) -> nn.Module:
    """Return a vision transformer whose MLPs are four times as wide as its tokens."""
    model = ViT(32, width, depth, heads=3, dropout=0.0)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.mlp = Mlp(width, 4 * width, 0.0)
    return model


@functools.cache
def networks(quick: bool) -> dict[str, Network]:
    """Return what is measured; ``quick``: tiny ones."""
    if quick:
        return {"resnet": Network(lambda: resnet18((32, 48), 1), (2, 3, 16, 16), 0.5)}
    return {
        "resnet18": Network(resnet18, (8, 3, 64, 64), 0.35),
        "vit": Network(vit, (16, 1, 32, 32), 0.85),
    }


def cases(options: Options) -> list[Case]:
    """Return each network in both modes."""
    return [
        training_case(
            f"{name} {'x'.join(map(str, network.shape))}",
            list(network.make().parameters()),
            torch.float32,
            options,
            functools.partial(_setup, network, mode, options),
            op=OP,
            mode=mode,
        )
        for name, network in networks(options.quick).items()
        for mode in (INFERENCE, STEP)
    ]


@torch.no_grad()
def zeroed(network: Network, x: Tensor) -> nn.Module:
    """Return the network with so many channels that are zero that its smaller one fits SHARE."""
    torch.manual_seed(0)
    model = network.make().to(x.device)
    groups = fusereg.groups_of(model, x)
    orders = [torch.randperm(group.size) for group in groups]
    for step in range(20):
        share = network.dead + 0.03 * step
        for group, order in zip(groups, orders, strict=True):
            dead = order < min(share * group.size, group.size - 1)
            for member in group.members:
                slices = dead[member.channels.clamp_min(0)] & (member.channels >= 0)
                index = slices.nonzero().flatten().to(x.device)
                member.parameter.index_fill_(member.dim, index, 0)
        before, after = fusereg.compact(model, x, ROUND_TO, dry_run=True).operations
        if after <= SHARE * before:
            return model
    raise RuntimeError(f"{SHARE:.0%} of the operations are not reached")


class Run:
    """A forward pass or a training step; the call that is timed."""

    def __init__(self, model: nn.Module, mode: str, x: Tensor) -> None:
        self.model, self.mode, self.x = model.train(mode == STEP), mode, x

    def __call__(self) -> object:
        if self.mode == INFERENCE:
            with torch.no_grad():
                return self.model(self.x)
        self.model.zero_grad(set_to_none=True)
        loss = self.model(self.x).square().mean()
        loss.backward()
        return loss


@functools.cache
def _prepared(network: Network, device: torch.device) -> tuple[Tensor, nn.Module, nn.Module]:
    """Return an input, the network with its zeros and the smaller one."""
    x = torch.randn(network.shape, device=device)
    dense = zeroed(network, x)
    return x, dense, fusereg.compact(dense, x, ROUND_TO)


def _setup(network: Network, mode: str, options: Options) -> Workload:
    x, *networks = _prepared(network, options.device)
    dense, small = copy.deepcopy(networks)
    with torch.no_grad():
        wanted = dense.eval()(x)

    def check(call: Call) -> Accuracy:
        off = (call() - wanted).abs().max() / wanted.abs().max()
        return Accuracy(float(off), 1e-4, what="output")

    return Workload(
        [
            Provider(EAGER, lambda: Run(dense, mode, x)),
            Provider(SMALL, lambda: Run(small, mode, x)),
        ],
        check if mode == INFERENCE else None,  # a step moves the running statistics
    )
