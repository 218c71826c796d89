"""Which parameters stand for a channel: batch norms' scales, trained ones, biases that are new."""

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


def held(groups: fusereg.core.groups.Groups) -> list[set[str]]:
    return [{m.name for m in (*g.members, *g.readers)} for g in groups]


@pytest.mark.parametrize("readers", [False, True])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_an_optimizer_holds_the_same_groups_of_the_smaller_model(
    name: str, scales: bool, readers: bool
) -> None:
    net, x = SMALL[name]()
    groups = fusereg.groups_of(net, x, readers=readers, scales=scales)
    optimizer = fusereg.optim.SGD(net.parameters(), lr=0.01, groups=groups, group=0.1)
    wanted = held(groups)
    kill(net, x, scales=scales)
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert held(optimizer.groups) == wanted
    parameters = {id(p) for p in small.parameters()}
    assert all(id(m.parameter) in parameters for g in optimizer.groups for m in g.members)


def test_an_optimizer_holds_only_the_sets_that_it_was_given() -> None:
    net, x = SMALL["blocks"]()
    groups = fusereg.groups_of(net, x)
    one = fusereg.core.groups.Groups([groups[1]])
    optimizer = fusereg.optim.SGD(net.parameters(), lr=0.01, groups=one, group=0.1)
    kill(net, x)
    fusereg.compact(net, x, optimizer=optimizer)
    assert held(optimizer.groups) == held(one)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_weights_follow_the_channels_that_stay(name: str, scales: bool) -> None:
    net, x = SMALL[name]()
    groups = fusereg.groups_of(net, x, scales=scales)
    weights = [torch.linspace(1.0 + k, 2.0 + k, g.size) for k, g in enumerate(groups)]
    one_each: list[Any] = [0.5, *weights[1:]]
    optimizer = fusereg.optim.SGD(
        net.parameters(), lr=0.01, groups=groups, group=0.1, group_weights=one_each
    )
    kill(net, x, scales=scales)
    # Each slice that stays is known by a value of its own, in a copy whose zeros are the same.
    weight_of: dict[tuple[str, float], float] = {}
    with torch.no_grad():
        for g, w in zip(groups, one_each, strict=True):
            for m in g.members:
                if not isinstance(m.parameter, Tensor) or m.parameter.dim() != 1:
                    continue
                for i, c in enumerate(m.channels.tolist()):
                    value = float(m.parameter[i])
                    if value and c >= 0:
                        m.parameter[i] = value * (1.0 + 1e-3 * i)
                        key = m.name, float(m.parameter[i])
                        weight_of[key] = float(torch.as_tensor(w).expand(g.size)[c])
    before = optimizer.group_weights
    fusereg.compact(net, x, dry_run=True, optimizer=optimizer)
    assert optimizer.group_weights is before
    fusereg.compact(net, x, optimizer=optimizer)
    seen = 0
    assert len(optimizer.group_weights) == len(optimizer.groups)
    for g, w in zip(optimizer.groups, optimizer.group_weights, strict=True):
        assert w.shape == (g.size,)
        for m in g.members:
            for i, c in enumerate(m.channels.tolist()):
                if m.parameter.dim() == 1 and (m.name, m.parameter[i].item()) in weight_of:
                    assert float(w[c]) == weight_of[m.name, m.parameter[i].item()]
                    seen += 1
    assert seen >= 3
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_a_new_bias_belongs_to_the_group_of_its_layer() -> None:
    net = nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    )
    with torch.no_grad():
        net[0].weight[:3] = 0  # their biases stay
        net[0].bias.fill_(0.5)
    x = torch.randn(3, 4)
    groups = fusereg.groups_of(net, x)
    optimizer = fusereg.optim.SGD(net.parameters(), lr=0.01, groups=groups, group=0.1)
    fusereg.compact(net, x, optimizer=optimizer)
    assert held(optimizer.groups) == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]


def test_frozen_parameters_are_no_members_beside_trained_ones() -> None:
    net, x = SMALL["chain"]()
    net[1].requires_grad_(False)
    groups = fusereg.groups_of(net, x)
    assert {m.name for m in groups[0].members} == {"0.weight"}
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = fusereg.optim.SGD(trained, lr=1.0, groups=groups, group=1.0)
    net(x).sum().backward()
    optimizer.step()
    assert not net[0].weight.any()
    net.requires_grad_(False)
    assert len(fusereg.groups_of(net, x)[0].members) == 3


@settings(max_examples=12, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 99), st.sampled_from((0.3, 0.7)))
def test_graphs_compute_the_same(
    steps: list[tuple[str, int, int]], seed: int, share: float
) -> None:
    check_graph(steps, seed, share, shifts=False, scales=True)


# --- biases that are new --------------------------------------------------------------------------

BIASLESS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6, bias=False), (3, 4)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1, bias=False), (3, 4, 5, 5)),
    "groups": (lambda: nn.Conv2d(8, 6, 1, groups=2, bias=False), (3, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 1, bias=False), (3, 4, 5, 5)),
    "reflect": (
        lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False),
        (3, 4, 5, 5),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.GroupNorm(3, 6)),
        (3, 4, 5, 5),
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.InstanceNorm2d(6, affine=True)),
        (3, 4, 5, 5),
    ),
    "norm without statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, track_running_stats=False)
        ),
        (3, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("kind", BIASLESS)
def test_a_layer_that_gets_a_bias_may_lose_rows_itself(kind: str) -> None:
    make, shape = BIASLESS[kind]
    flat = len(shape) == 2
    first, last = (nn.Linear, nn.Linear) if flat else (nn.Conv2d, nn.Conv2d)
    size = () if flat else (1,)
    net = nn.Sequential(first(4, 8, *size), nn.ReLU(), make(), nn.ReLU(), last(6, 2, *size))
    x = torch.randn(shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, x, 2)
    with torch.no_grad():
        for group in fusereg.groups_of(net, x):
            for member in group.members:
                if member.name != "0.bias":  # a constant
                    dead = (member.channels % 3 == 0) & (member.channels >= 0)
                    member.parameter.index_fill_(member.dim, dead.nonzero().flatten(), 0)
        net[0].bias.fill_(0.1)
    small = fusereg.compact(net.eval(), x, optimizer=optimizer)
    assert off(small(x), net(x)) < 1e-12
    inner = (
        small[2]
        if isinstance(small[2], (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        else small[2][0]
    )
    if inner.bias is not None:
        assert inner.bias.shape == (inner.weight.shape[1 if kind == "transposed" else 0],)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    train(small, optimizer, x, 2)
