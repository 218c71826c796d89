"""Channels by the scale and shift of their batch norms: groups_of(..., scales=True)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusereg
from test_compact import SMALL, STEPS, check_graph, double, kill, off, shaken, train

pytest.importorskip("torch_pruning")
assert double  # a fixture, for all tests here


class PreActivation(nn.Module):
    """A residual stream that batch norms read and nothing normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.inner, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(torch.relu(self.inner(self.a(torch.relu(self.norm(x))))))
        return self.head(x.mean((2, 3)))


def members(net: nn.Module, x: Tensor) -> dict[str, set[str]]:
    """Return the names of the members of each set."""
    return {g.name: {m.name for m in g.members} for g in fusereg.groups_of(net, x, scales=True)}


def test_a_norm_stands_for_the_layer_whose_result_it_alone_reads() -> None:
    net, x = SMALL["blocks"]()
    assert members(net, x) == {
        "0": {f"{n}.{k}" for n in ("1", "3.last", "4.last") for k in ("weight", "bias")},
        "3.a": {"3.norm.weight", "3.norm.bias"},
        "4.a": {"4.norm.weight", "4.norm.bias"},
    }
    net, x = SMALL["mlp"]()  # no norm: rows and biases
    assert members(net, x) == {"0": {"0.weight", "0.bias"}, "2": {"2.weight", "2.bias"}}


def test_layers_that_no_norm_stands_for_keep_their_rows() -> None:
    net = shaken(PreActivation()).eval()
    found = members(net, torch.randn(2, 3, 6, 6))
    assert found["stem"] >= {"stem.weight", "stem.bias", "b.weight", "b.bias"}
    assert found["a"] == {"inner.weight", "inner.bias"}


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.weight.requires_grad_(False),
        lambda n: n.bias.requires_grad_(False),
        lambda n: n.register_parameter("weight", None) or n.register_parameter("bias", None),
    ],
    ids=["frozen scale", "frozen shift", "no parameters"],
)
def test_a_norm_that_cannot_become_zero_stands_for_nothing(
    change: Callable[[nn.Module], Any],
) -> None:
    net, x = SMALL["chain"]()
    change(net[1])
    assert "0.weight" in members(net, x)["0"]


@pytest.mark.parametrize("name", SMALL)
def test_the_smaller_model_computes_and_trains_as_the_zeroed_one(name: str) -> None:
    net, x = SMALL[name]()
    optimizer = fusereg.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    train(net, optimizer, x, 3)
    left = kill(net, x, scales=True, optimizer=optimizer)
    zeroed, its = copy.deepcopy((net, optimizer))
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert off(small.eval()(x), net.eval()(x)) < 1e-12
    assert {g.name: g.size for g in fusereg.groups_of(small, x)} == left
    train(zeroed, its, x)
    train(small, optimizer, x)
    assert off(small(x), zeroed(x)) < 1e-11


def test_a_step_leaves_the_rows_alone_and_zeros_scale_and_shift() -> None:
    net, x = SMALL["blocks"]()
    groups = fusereg.groups_of(net, x, scales=True)
    rows = copy.deepcopy(net[3].a.weight)
    optimizer = fusereg.optim.SGD(net.parameters(), lr=1.0, groups=groups, group=1.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(net[3].a.weight, rows)
    dead = net[3].norm.weight == 0
    assert dead.any()
    assert torch.equal(dead, net[3].norm.bias == 0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 99), st.sampled_from((0.3, 0.7)))
def test_graphs_compute_the_same(
    steps: list[tuple[str, int, int]], seed: int, share: float
) -> None:
    check_graph(steps, seed, share, shifts=False, scales=True)
