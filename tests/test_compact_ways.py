"""Compaction of models that training runs otherwise, and other things that probes must see."""

# ruff: noqa: NPY002 (models draw by the legacy functions)
from __future__ import annotations

import copy
import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.cli.errors import InputError
from fusereg.demo import techniques

pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def kill(model: nn.Module, x: Any, share: float = 0.5) -> None:
    """Set random channels of every set to zero."""
    draw = torch.Generator().manual_seed(0)
    for group in fusereg.groups_of(model, x):
        dead = torch.rand(group.size, generator=draw) < share
        dead[0] = False
        for member in group.members:
            slices = (dead[member.channels.clamp_min(0)] & (member.channels >= 0)).nonzero()
            with torch.no_grad():
                member.parameter.index_fill_(member.dim, slices.flatten(), 0)


class Branches(nn.Module):
    """A network that computes something else in training, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.aux, self.aux_head = nn.Conv2d(8, 4, 1), nn.Linear(4, 5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.stem(x))
        if self.kind == "extra layer" and self.training:
            y = torch.relu(self.c(y))
        for number, layer in enumerate((self.a, self.b)):
            draw = 1.0
            if self.training and self.kind == "torch draws":
                draw = float(torch.rand(1))
            elif self.training and self.kind == "a coin":
                draw = float(torch.bernoulli(torch.tensor([0.9])))
            elif self.training and self.kind == "python draws":
                draw = random.random()
            elif self.training and self.kind == "numpy draws":
                draw = np.random.uniform()
            if draw >= 0.3:
                y = torch.relu(layer(y))
            if number == 0:
                middle = y
        out = self.head(y.mean((2, 3)))
        if self.kind.startswith("auxiliary") and self.training:
            aux = self.aux_head(torch.relu(self.aux(middle)).mean((2, 3)))
            return {"out": out, "aux": aux} if self.kind.endswith("dict") else (out, aux)
        if self.kind == "a skip" and self.training:
            return self.head((y + middle).mean((2, 3)))
        if self.kind == "features" and self.training:
            return out, middle
        return out


KINDS = (
    *("auxiliary head", "auxiliary head, dict", "extra layer", "torch draws", "a coin"),
    *("python draws", "numpy draws", "a skip", "features"),
)


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return list(out.values() if isinstance(out, dict) else out)


@pytest.mark.all_cases
@pytest.mark.parametrize("kind", KINDS)
def test_what_training_alone_does_still_works_and_computes_the_same(kind: str) -> None:
    net, x = Branches(kind).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    kill(net, x)
    small = fusereg.compact(net, x)
    assert small.training
    left = [small.stem.out_channels, small.a.out_channels, small.b.out_channels]
    if "draws" in kind or kind == "a coin":  # any of the layers may be left out
        assert left == [8, 8, 8]
        assert "a" in fusereg.groups_of(net, x).kept
    else:
        assert min(left) < 8
    for seed in range(12):  # both branches of each draw
        made = []
        for model in (net, small):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            made.append(tensors(model(x)))
        assert len(made[0]) == len(made[1])
        for wanted, got in zip(*made, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=1e-12, atol=1e-12)


def test_channels_that_only_an_auxiliary_head_reads_as_well_can_go() -> None:
    net, x = Branches("auxiliary head"), torch.randn(2, 3, 6, 6)
    groups = fusereg.groups_of(net, x, readers=True)
    assert {"stem", "a", "b", "aux"} <= {g.name for g in groups}
    (found,) = (g for g in groups if g.name == "a")
    assert {m.name for m in found.readers} == {"b.weight", "aux.weight"}
    assert net.training


def test_training_that_cannot_be_tried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Losses(Branches):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            out = super().forward(x)
            if self.training:
                assert targets is not None, "targets are needed"
                return F.cross_entropy(out, targets)
            return out

    net, x = Losses("plain"), torch.randn(2, 3, 6, 6)
    kill(net, x)
    with caplog.at_level(logging.WARNING, "fusereg"):
        small = fusereg.compact(net, x)
    assert "evaluation alone" in caplog.text
    assert "targets are needed" in caplog.text
    torch.testing.assert_close(small.eval()(x), net.eval()(x))
    caplog.clear()
    fusereg.compact(net, {"x": x, "targets": torch.tensor([1, 2])})
    assert "evaluation alone" not in caplog.text


def test_draws_and_buffers_are_as_before() -> None:
    class Counts(Branches):
        def __init__(self) -> None:
            super().__init__("python draws")
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Any:
            if self.training:
                self.calls += 1
                x = x + 0.1 * torch.randn_like(x) + float(np.random.uniform())
            return super().forward(F.dropout(x, 0.3, self.training))

    net, x = Counts(), torch.randn(2, 3, 6, 6)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    groups = fusereg.groups_of(net, x)
    assert {"stem", "head"} <= {g.name for g in groups} | set(groups.kept)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2]) == states[1:]
    assert not net.calls.any()
    assert net.training


# --- other types of numbers -----------------------------------------------------------------------


class Casts(nn.Module):
    """Networks that choose the type of numbers in forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "float":
            return self.c(self.b(self.a(x.float()).relu()).float().relu())
        if self.kind == "to":
            return self.c(self.b(self.a(x.to(torch.float32)).relu()).relu().to(torch.float32))
        if self.kind == "softmax":
            gate = x.sigmoid().sum(-1, keepdim=True, dtype=torch.float32)
            return self.c(self.b(self.a(x).relu() * gate).relu())
        if self.kind == "half":
            y = self.a(x).relu()
            return self.c(self.b(y.half().to(y.dtype)).relu())
        made = torch.ones(len(x), 6, dtype=torch.float32)
        return self.c(self.b(self.a(made * x.float()).relu()).relu())


@pytest.mark.parametrize("kind", ["float", "to", "softmax", "half", "zeros"])
def test_casts_in_forward_are_no_obstacle(kind: str) -> None:
    net, x = Casts(kind).eval(), torch.randn(4, 6)
    kill(net, x)
    small = fusereg.compact(net, x)
    assert small.a.out_features < 8
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_run_in_float64_is_refused_in_words() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.mix = np.eye(6, dtype=np.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x @ torch.from_numpy(self.mix)).relu())

    net, x = Constant(), torch.randn(4, 6)
    net(x)
    with pytest.raises(ValueError, match=r"cannot be traced .*tried in float64; make tensors in"):
        fusereg.groups_of(net, x)


# --- inputs ---------------------------------------------------------------------------------------


def small_nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "linear": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
        "conv": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8)),
        "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), (3, 9)),
        "norm": (
            nn.Sequential(
                *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
                *(nn.Flatten(), nn.Linear(8, 4)),
            ),
            (3, 8, 8),
        ),
    }


@pytest.mark.parametrize("name", small_nets())
def test_inputs_without_a_batch_and_empty_ones(name: str) -> None:
    net, shape = small_nets()[name]
    net.eval()
    for op in (fusereg.groups_of, fusereg.compact):
        with pytest.raises(ValueError, match=r"example_inputs must hold no empty tensor, got one"):
            op(net, torch.randn(0, *shape))
    x = torch.randn(shape)
    kill(net, x[None])
    if name == "norm":
        with pytest.raises(ValueError, match="cannot be traced with these example_inputs"):
            fusereg.compact(net, x)
        return
    of_one, of_two = (fusereg.compact(net, y, dry_run=True) for y in (x, torch.stack([x, x])))
    assert of_one.operations == of_two.operations
    torch.testing.assert_close(fusereg.compact(net, x)(x), net(x))


def test_a_single_average_is_taken_and_anything_else_is_refused() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    average = torch.optim.swa_utils.AveragedModel(net)
    kill(net, x)
    small = fusereg.compact(net, x, averaged=average)
    assert average.module[0].out_features == small[0].out_features < 8
    for wrong in (3, net, None):
        with pytest.raises(TypeError, match=r"averaged (holds )?must"):
            fusereg.compact(net, x, averaged=wrong)  # type: ignore[call-overload]


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(8, 4), (4, 4)])
def test_the_states_of_ftrl_go_with_the_model(widths: tuple[int, int]) -> None:
    # Its record of the last step has four numbers, as a bias of four has.
    net = nn.Sequential(
        *(nn.Linear(6, widths[0]), nn.ReLU(), nn.Linear(widths[0], widths[1]), nn.ReLU()),
        nn.Linear(widths[1], 3),
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    optimizer = fusereg.optim.FTRL(net.parameters(), lr=0.1, l1=1e-3, l2=1e-3)

    def step(model: nn.Module, its: torch.optim.Optimizer) -> None:
        its.zero_grad()
        model(x).square().mean().backward()
        its.step()

    step(net, optimizer)
    with torch.no_grad():  # what writes and what reads it, and their history
        for layer, following in ((net[0], net[2]), (net[2], net[4])):
            for p, at in ((layer.weight, 0), (layer.bias, 0), (following.weight, 1)):
                for tensor in (p, optimizer.state[p]["linear"]):
                    tensor.index_fill_(at, torch.tensor([1, 2]), 0)
    zeroed, its = copy.deepcopy((net, optimizer))
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert (small[0].out_features, small[2].out_features) == tuple(w - 2 for w in widths)
    for _ in range(20):
        step(small, optimizer)
        step(zeroed, its)
    torch.testing.assert_close(small(x), zeroed(x), rtol=1e-11, atol=1e-12)


def test_groups_without_a_strength_are_said() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    groups = fusereg.groups_of(net, x)
    for kind in (fusereg.optim.SGD, fusereg.optim.AdamW, fusereg.optim.Lion):
        with pytest.warns(UserWarning, match="groups do nothing without a strength"):
            kind(net.parameters(), lr=0.1, groups=groups)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusereg.optim.SGD(net.parameters(), lr=0.1, groups=groups, group=0.0)  # grows later
        fusereg.optim.SGD([{"params": net.parameters(), "group": 1.0}], lr=0.1, groups=groups)


# --- batch norms that live ------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, fusereg.nn.BatchNorm2d])
def test_rows_that_are_zero_before_a_live_norm_go_when_training_agrees(
    norm: type[nn.Module], affine: bool
) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm(8, affine=affine), nn.GELU()),
        *(nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    statistics: Any = net[1]
    with torch.no_grad():
        net[0].weight[:3] = 0
        if affine:
            statistics.bias.uniform_(-0.5, 0.5)
        statistics.running_mean.uniform_(-0.5, 0.5)
    assert fusereg.compact(net, x)[0].out_channels == 8  # type: ignore[index]
    note = fusereg.compact(net, x, dry_run=True)[0].note
    assert "in training they are another constant" in note
    with torch.no_grad():  # as after some hundred batches
        statistics.running_mean[:3] = 0
    small: Any = fusereg.compact(net, x)
    assert small[0].out_channels == 5
    for mode in (True, False):
        torch.testing.assert_close(small.train(mode)(x), net.train(mode)(x), rtol=1e-12, atol=1e-12)


# --- halves ---------------------------------------------------------------------------------------


def halves(kind: str, y: Tensor) -> Tensor:
    """Join the halves of a layer's channels, or take one."""
    if kind == "glu":
        return F.glu(y, 1)
    if kind == "three":
        u, v, w = y.chunk(3, 1)
        return u * v + w
    u, v = y.split(y.shape[1] // 2, 1) if kind == "split" else y.chunk(2, 1)
    if kind == "first":
        return u
    if kind == "second":
        return v
    if kind == "turned":
        return torch.cat([v, u.relu()], 1)
    if kind == "sum":
        return u + v
    if kind == "largest":
        return torch.maximum(u, v)
    return {"gate": F.silu(u) * v, "split": u * v.sigmoid(), "tanh": u.tanh() * v.sigmoid()}[kind]


class Halves(nn.Module):
    def __init__(self, kind: str, convolves: bool, width: int) -> None:
        super().__init__()
        made = width * (3 if kind == "three" else 2)
        layer: Any = (lambda i, o: nn.Conv2d(i, o, 1)) if convolves else nn.Linear
        self.kind = kind
        self.a, self.b = layer(3, made), layer(made if kind == "turned" else width, 5)
        self.c = layer(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(halves(self.kind, self.a(x))).relu())


HALVES = (*("glu", "gate", "split", "tanh", "three", "first", "second", "sum", "largest"),)


def test_a_model_that_the_dependency_graph_fails_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="Torch-Pruning's dependency graph fails for this model"):
        fusereg.groups_of(Halves("turned", False, 4), torch.randn(4, 3))


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("kind", HALVES)
def test_what_is_offered_for_halves_is_taken(kind: str, convolves: bool, width: int) -> None:
    net = Halves(kind, convolves, width).double()
    x = torch.randn((2, 3, 3, 3) if convolves else (4, 3), dtype=torch.float64)
    for group in fusereg.groups_of(net, x):
        for dead in ([1], list(range(1, group.size, 2)), list(range(1, group.size))):
            model = copy.deepcopy(net)
            with torch.no_grad():
                for m in group.members:
                    mask = torch.isin(m.channels, torch.tensor(dead))
                    p = model.get_parameter(m.name)
                    p.index_fill_(m.dim, mask.nonzero().flatten(), 0)
            small = fusereg.compact(model, x)
            got = small.get_submodule(group.name).weight
            wanted = model.get_submodule(group.name).weight
            assert len(got) < len(wanted)
            torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    for rows in ([1], [width + 1], [1, width + 1], [0, 1]):  # whoever made them zero
        model = copy.deepcopy(net)
        with torch.no_grad():
            model.a.weight[rows], model.a.bias[rows] = 0, 0
        torch.testing.assert_close(fusereg.compact(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


# --- the demo -------------------------------------------------------------------------------------


def test_the_row_compact_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fusereg\[compact\]'"):
        techniques.choose(None)
    assert len(techniques.choose(["l1"])) == 1


# --- the dependency graph -------------------------------------------------------------------------


class Positions(nn.Module):
    """Products over positions, in which the graph multiplies the channels again and again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear({"gram": 36 * 36, "outer": 36 * 36}.get(kind, 8), 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        v = self.b(u.relu())
        u, v = u.flatten(2), v.flatten(2)
        if self.kind == "gram":
            return self.head(torch.bmm(u.transpose(1, 2), v).flatten(1))
        if self.kind == "outer":
            return self.head((u.mean(1).unsqueeze(1) * v.mean(1).unsqueeze(2)).flatten(1))
        attention = (u.transpose(1, 2) @ v).softmax(-1)
        return self.head((v @ attention.transpose(1, 2)).mean(2))


@pytest.mark.parametrize("kind", ["gram", "outer", "attention"])
def test_products_over_positions_come_to_an_end(kind: str) -> None:
    net, x = Positions(kind).eval(), torch.randn(2, 3, 6, 6)
    groups = fusereg.groups_of(net, x)
    with torch.no_grad():
        net.a.weight[:3], net.a.bias[:3] = 0, 0
    small = fusereg.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    if kind == "gram":
        assert "does not come to an end" in groups.kept["a"]


def test_a_graph_that_goes_around_forever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_pruning.dependency import group

    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    # Nothing is ever found to be in the group already.
    monkeypatch.setattr(group.Group, "has_pruning_op", lambda *_: False)
    groups = fusereg.groups_of(net, x)
    assert not len(groups)
    assert "does not come to an end" in groups.kept["0"]
