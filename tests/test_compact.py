"""Removing channels that are zero: groups_of and compact."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusereg
from compact_models import LIBRARIES

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
    scales: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Set random channels of every set to zero, momenta too; return how many are left of each."""
    draw = torch.Generator().manual_seed(seed)
    left = {}
    for group in fusereg.groups_of(model, x, readers=readers, scales=scales):
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
    """The model with random batch norms and no layer of zeros, as after training."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
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


# --- widths that go together ----------------------------------------------------------------------


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.last(self.b(torch.relu(self.norm(self.a(x)))))
        return torch.relu(x + branch)


def blocks() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    return shaken(net).eval(), torch.randn(3, 3, 7, 7)


SMALL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "chain": chain,
    "blocks": blocks,
}


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


class Graph(nn.Module):
    """A network whose steps are drawn: branches, concatenations, groups, splits."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = []
        self.layers = nn.ModuleList()
        widths = [4]
        for kind, i, j in [("conv", 0, 3), *steps]:
            i, j = i % len(widths), j % len(widths) if kind in ("add", "cat", "gate") else j
            c = widths[i]
            layer: nn.Module = nn.Identity()
            width = c
            if kind == "conv":
                width = (4, 6, 8)[j % 3]
                layer = nn.Conv2d(c, width, (1, 3)[j % 2], padding=(0, 1)[j % 2])
            elif kind == "groups":
                groups = 2 if c % 2 == 0 else 1
                layer, width = nn.Conv2d(c, 8, 1, groups=groups), 8
            elif kind == "depthwise":
                layer = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=bool(j % 2))
            elif kind == "norm":
                layer = nn.BatchNorm2d(c)
            elif kind == "group_norm":
                layer = nn.GroupNorm(2 if c % 2 == 0 else 1, c)
            elif kind == "act":
                layer = (nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Hardswish())[j % 4]
            elif kind == "pool":
                layer = (nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1))[j % 2]
            elif kind in ("add", "gate") and widths[j] != c:
                kind = "cat"
            elif kind == "chunk" and c % 2:
                kind = "act"
            if kind == "cat":
                width = c + widths[j]
            if kind == "chunk":
                width = c // 2
            self.layers.append(layer)
            self.steps.append((kind, i, j))
            widths.append(width)
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for (kind, i, j), layer in zip(self.steps, self.layers, strict=True):
            if kind == "add":
                made.append(made[i] + made[j])
            elif kind == "gate":
                made.append(made[i] * torch.sigmoid(made[j]))
            elif kind == "cat":
                made.append(torch.cat([made[i], made[j]], 1))
            elif kind == "chunk":
                made.append(made[i].chunk(2, 1)[j % 2])
            else:
                made.append(layer(made[i]))
        return self.head(made[-1].mean((2, 3)))


KINDS = (
    *("conv", "conv", "norm", "act", "add", "cat", "gate", "chunk", "groups", "depthwise"),
    *("pool", "group_norm"),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9
)


def check_graph(
    steps: list[tuple[str, int, int]], seed: int, share: float, shifts: bool, scales: bool = False
) -> None:
    torch.manual_seed(seed)
    net = shaken(Graph(steps)).eval()
    x = torch.randn(2, 4, 5, 5)
    kill(net, x, share, seed, scales=scales)
    if shifts:  # constants instead of zeros
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.uniform_(-0.5, 0.5)
    wanted = net(x)
    if torch.allclose(net(torch.randn_like(x)), wanted, rtol=0, atol=1e-14):
        with suppress(ValueError):  # a model that has become constant may be refused
            fusereg.compact(net, x)
        return
    small = fusereg.compact(net, x)
    assert off(small(x), wanted) < 1e-12


@settings(max_examples=12, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 99), st.sampled_from((0.3, 0.7)), st.booleans())
def test_graphs_with_branches_concatenations_groups_and_splits_compute_the_same(
    steps: list[tuple[str, int, int]], seed: int, share: float, shifts: bool
) -> None:
    check_graph(steps, seed, share, shifts)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 9999), st.sampled_from((0.3, 0.7)), st.booleans())
def test_many_graphs_compute_the_same(
    steps: list[tuple[str, int, int]], seed: int, share: float, shifts: bool
) -> None:
    check_graph(steps, seed, share, shifts)


def test_the_sets_share_no_slice_of_what_writes_them_and_name_the_models_own_parameters() -> None:
    net, x = blocks()
    groups = fusereg.groups_of(net, x, readers=True)
    named = dict(net.named_parameters())
    taken: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        for member in (*group.members, *group.readers):
            assert member.parameter is named[member.name]
            assert member.channels.shape == (member.parameter.shape[member.dim],)
            assert set(range(group.size)) <= set(member.channels.tolist())
        for member in group.members:
            mine = member.channels >= 0
            before = taken.get((member.name, member.dim), torch.zeros_like(mine))
            assert not (mine & before).any()
            taken[member.name, member.dim] = mine | before
        assert group.operations is not None
        assert (group.operations > 0).all()
    assert {g.name: g.size for g in groups} == {"0": 8, "3.a": 8, "4.a": 8}
    stream = {m.name for m in groups[0].members}
    assert stream == {
        *("0.weight", "1.weight", "1.bias", "3.b.weight", "3.last.weight", "3.last.bias"),
        *("4.b.weight", "4.last.weight", "4.last.bias"),
    }
    assert {m.name for m in groups[0].readers} == {"3.a.weight", "4.a.weight", "7.weight"}
    assert "outputs" in groups.kept["7"]
    assert all(not g.readers for g in fusereg.groups_of(net, x))


class Wrong(nn.Module):
    """Networks of which the dependency graph is wrong without a word."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(3, 8, 1)
        self.b, self.c = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8 * 9, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        if self.kind in ("chunk", "slices"):
            u, v = y.chunk(2, 1) if self.kind == "chunk" else (y[:, :4], y[:, 4:])
            return self.head((self.b(u) + self.c(v)).relu().mean((2, 3)))
        if self.kind == "layer_norm":
            y = self.norm(y.movedim(1, -1)).movedim(-1, 1)
        if self.kind == "softmax":
            y = y.softmax(1)
        if self.kind == "shuffle":
            y = y.view(-1, 2, 4, 3, 3).transpose(1, 2).reshape(-1, 8, 3, 3)
        if self.kind == "channels_last":
            y = y.permute(0, 2, 3, 1)
        if self.kind == "flip":
            y = y.flip(1)
        return self.head(self.linear(y.reshape(len(x), -1)).relu())


@pytest.mark.parametrize(
    "kind", ["chunk", "slices", "layer_norm", "softmax", "shuffle", "channels_last", "flip"]
)
def test_a_mapping_that_is_wrong_is_found_out_and_the_layer_is_kept(kind: str) -> None:
    net, x = Wrong(kind).eval(), torch.randn(3, 3, 3, 3)
    groups = fusereg.groups_of(net, x)
    assert "a" in groups.kept
    assert "a" not in {g.name for g in groups}
    kill(net, x)
    with torch.no_grad():  # channels of it that are zero stay
        net.a.weight[:3], net.a.bias[:3] = 0, 0
    small = fusereg.compact(net, x)
    assert small.a.out_channels == 8
    assert off(small(x), net(x)) < 1e-12
    (row,) = (r for r in fusereg.compact(net, x, dry_run=True) if r.layer == "a")
    assert row.note == groups.kept["a"]


# --- constants ------------------------------------------------------------------------------------


def dead_norms(padding: int, bias: bool, norm: bool, act: type[nn.Module]) -> nn.Module:
    """Four of eight channels whose scale is zero and whose shift is not."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act()),
        *(nn.Conv2d(8, 6, 3, padding=padding, bias=bias), nn.BatchNorm2d(6) if norm else act()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )
    shaken(net)
    with torch.no_grad():
        net[1].weight[2:6] = 0
        net[1].bias[2:6] = torch.tensor([0.5, -0.5, 0.25, 1.0])
    return net.eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_constants_go_into_the_bias_or_the_running_mean_behind(bias: bool, norm: bool) -> None:
    net, x = dead_norms(0, bias, norm, nn.GELU), torch.randn(2, 3, 8, 8)
    small = fusereg.compact(net, x)
    assert small[0].out_channels == 4
    assert off(small(x), net(x)) < 1e-12
    added = set(small.state_dict()) - set(net.state_dict())
    assert added == (set() if bias or norm else {"3.bias"})
    if norm and not bias:
        assert not torch.equal(small[4].running_mean, net[4].running_mean)
        assert off(small.train()(x), net.train()(x)) < 1e-12
    elif not bias:
        table = fusereg.compact(net, x, dry_run=True)
        assert any("3.bias: new" in note for note in table.notes)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        small = fusereg.compact(net, x, optimizer=optimizer)
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert held == {id(p) for p in small.parameters()}


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_one_channel_stays_for_the_constants_that_zero_padding_cuts_off(
    act: type[nn.Module],
) -> None:
    net, x = dead_norms(1, True, True, act), torch.randn(2, 3, 8, 8)
    small = fusereg.compact(net, x)
    assert small[0].out_channels == 5
    assert off(small(x), net(x)) < 1e-12
    row = fusereg.compact(net, x, dry_run=True)[0]
    assert row.outputs == (8, 5)
    assert "zero padding" in row.note
    with torch.no_grad():
        net[1].bias[2:6] = -0.5  # behind ReLU that is zero
    assert fusereg.compact(net, x)[0].out_channels == (4 if act is nn.ReLU else 5)


def test_a_constant_that_a_padded_pooling_makes_uneven_stays_and_is_named() -> None:
    net = dead_norms(0, True, True, nn.GELU)
    net.insert(3, nn.AvgPool2d(3, 1, 1))
    x = torch.randn(2, 3, 8, 8)
    assert fusereg.compact(net, x)[0].out_channels == 8
    row = fusereg.compact(net, x, dry_run=True)[0]
    assert "4 of its channels are zero where they are made, but not constant" in row.note
    net[3].count_include_pad = False
    small = fusereg.compact(net, x)
    assert small[0].out_channels == 4
    assert off(small(x), net(x)) < 1e-12


def test_a_channel_that_some_inputs_leave_at_zero_is_not_dead() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].bias.data[:4] = -1e3
    assert fusereg.compact(net, torch.randn(3, 4))[0].out_features == 8


def test_a_channel_that_nothing_reads_goes() -> None:
    net, x = mlp()
    net[2].weight.data[:, 3:9] = 0
    small = fusereg.compact(net, x)
    assert small[0].out_features == 10
    assert off(small(x), net(x)) < 1e-12


def test_the_number_of_channels_is_rounded_up() -> None:
    net, x = chain()
    kill(net, x, 0.6)
    table = fusereg.compact(net, x, round_to=4, dry_run=True)
    assert {r.outputs[1] % 4 for r in table[:2]} == {0}
    assert any("multiple of 4" in r.note for r in table)
    small = fusereg.compact(net, x, round_to=4)
    assert (small[0].out_channels, small[3].out_channels) == tuple(r.outputs[1] for r in table[:2])
    assert off(small(x), net(x)) < 1e-12


# --- whole layers ---------------------------------------------------------------------------------


def test_a_residual_block_whose_branch_is_zero_becomes_an_identity() -> None:
    net, x = blocks()
    with torch.no_grad():
        for p in (net[3].norm.weight, net[3].norm.bias, net[3].last.weight, net[3].last.bias):
            p.zero_()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, x, 0)
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert isinstance(small[3], nn.Identity)
    assert isinstance(small[4], Block)
    assert off(small(x), net(x)) < 1e-12
    assert len(optimizer.param_groups[0]["params"]) == len(list(small.parameters()))
    table = fusereg.compact(net, x, dry_run=True)
    assert "3: nn.Identity, for its branch is zero" in table.notes
    assert "3: nn.Identity" in str(table)


def test_a_model_that_is_constant_is_refused_and_a_dead_layer_elsewhere_keeps_a_channel() -> None:
    net, x = mlp()
    net[0].weight.data.zero_()
    with pytest.raises(ValueError, match=r"all 16 channels of 0 are dead.*do not depend"):
        fusereg.compact(net, x)
    net, x = blocks()
    net[3].norm.weight.data.zero_()
    net[3].norm.bias.data.fill_(-1.0)
    small = fusereg.compact(net, x)
    assert small[3].a.out_channels == 1
    assert off(small(x), net(x)) < 1e-12
    (row,) = (r for r in fusereg.compact(net, x, dry_run=True) if r.layer == "3.a")
    assert "a layer needs one" in row.note


# --- other models, other uses ---------------------------------------------------------------------


def test_converted_models_stay_converted() -> None:
    net, x = blocks()
    kill(net, x)
    wanted = net(x)
    converted = fusereg.convert(copy.deepcopy(net))
    small = fusereg.compact(converted, x)
    assert type(small[1]) is fusereg.nn.BatchNorm2d
    assert type(small[3]) is type(converted[3])
    assert off(small(x), wanted) < 1e-12
    assert small[3].a.out_channels < 8
    assert off(fusereg.revert(small)(x), wanted) < 1e-12


def test_fused_layers_of_this_package_are_known() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), fusereg.nn.BatchNorm2d(8, activation="relu")),
        *(nn.Conv2d(8, 6, 3), fusereg.nn.BatchNorm2d(6, activation="silu"), nn.Flatten()),
        nn.Linear(6 * 4, 2),
    )
    x = torch.randn(2, 3, 6, 6)
    left = kill(shaken(net).eval(), x)
    small = fusereg.compact(net, x)
    assert small[0].out_channels == left["0"] < 8
    assert off(small(x), net(x)) < 1e-12


def test_the_given_model_its_mode_and_its_dtype_stay() -> None:
    torch.set_default_dtype(torch.float32)
    net, x = chain()
    kill(net, x)
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    before = copy.deepcopy(net.state_dict())
    small = fusereg.compact(net, x)
    assert [m.training for m in net.modules()] == modes
    assert [m.training for m in small.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert not small[0].weight.requires_grad
    assert small[3].weight.requires_grad
    theirs = {p.data_ptr() for p in net.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in small.parameters())
    assert torch.allclose(small.eval()(x), net.eval()(x), atol=1e-6)


def test_an_average_is_cut_at_the_same_channels() -> None:
    net, x = chain()
    average = torch.optim.swa_utils.AveragedModel(net)
    kill(net, x)
    average.module.load_state_dict(net.state_dict())
    small = fusereg.compact(net, x, averaged=[average])
    assert average.module is not small
    assert off(average.eval()(x), net(x)) < 1e-12
    average.update_parameters(small)


def test_an_early_stopper_goes_on_with_the_smaller_model(tmp_path: Path) -> None:
    net, x = chain()
    kill(net, x)
    stopper = fusereg.EarlyStopping(net, patience=3)
    stopper.step(0.5, epoch=0)
    wanted = net(x)
    net[8].bias.data += 1
    stopper.step(0.7, epoch=1)
    small = fusereg.compact(net, x, stopper=stopper)
    assert off(small(x), net(x)) < 1e-12
    assert stopper.misses == 1
    assert stopper.restore() == 0
    assert off(small(x), wanted) < 1e-12
    assert off(net(x), wanted) > 1e-3

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for other, said in (
        (fusereg.EarlyStopping(net, patience=1, also={"sgd": optimizer}), "states of sgd"),
        (fusereg.EarlyStopping(net, patience=1, folder=tmp_path), "in a folder"),
    ):
        with pytest.raises(ValueError, match=f"stopper cannot go on with another model: .*{said}"):
            fusereg.compact(net, x, stopper=other)


def test_the_smaller_model_is_exported() -> None:
    torch.set_default_dtype(torch.float32)
    net, x = blocks()
    kill(net, x)
    small = fusereg.compact(net, x)
    exported = torch.export.export(small, (x,))
    assert torch.allclose(exported.module()(x), net(x), atol=1e-5)


@pytest.mark.slow
def test_the_smaller_model_is_exported_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.set_default_dtype(torch.float32)
    net, x = blocks()
    kill(net, x)
    small = fusereg.compact(net, x)
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), net(x), atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    net, x = mlp()
    with pytest.raises(TypeError, match=r"groups_of: model must be a torch.nn.Module, got int"):
        fusereg.groups_of(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, or .* got int"):
        fusereg.compact(net, 3)
    with pytest.raises(ValueError, match=r"model's device .cpu., got a tensor on meta"):
        fusereg.compact(net, x.to("meta"))
    with pytest.raises(TypeError, match="round_to must be an integer, got float"):
        fusereg.compact(net, x, round_to=1.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="round_to must be >= 1, got 0"):
        fusereg.compact(net, x, round_to=0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got str"):
        fusereg.compact(net, x, optimizer="sgd")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"averaged holds must be a .*AveragedModel, got str"):
        fusereg.compact(net, x, averaged="ema")  # type: ignore[call-overload]


def test_a_model_that_cannot_be_traced_is_an_error_and_stays() -> None:
    net, _ = mlp()
    before = copy.deepcopy(net.state_dict())
    net.train()
    for op in (fusereg.groups_of, fusereg.compact):
        with pytest.raises(ValueError, match="cannot be traced with these example_inputs"):
            op(net, torch.randn(2, 7))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_frozen_and_detached_layers() -> None:
    net, x = mlp()
    net.requires_grad_(False)
    assert len(fusereg.groups_of(net, x)) == 2
    assert not any(p.requires_grad for p in net.parameters())

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).detach()))

    groups = fusereg.groups_of(Detached(), torch.randn(2, 4))
    assert [g.name for g in groups] == ["b"]
    assert "no gradient" in groups.kept["a"]


def test_a_state_that_cannot_be_cut_is_refused_before_anything_changes() -> None:
    net, x = mlp()
    optimizer = torch.optim.Adafactor(net.parameters())
    train(net, optimizer, x, 1)
    kill(net, x)
    params = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"optimizer keeps row_var of shape .* cannot be cut"):
        fusereg.compact(net, x, optimizer=optimizer)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))


def test_torch_pruning_is_asked_for_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    net, x = mlp()
    with pytest.raises(ImportError, match=r"pip install 'fusereg\[compact\]'"):
        fusereg.compact(net, x)


# --- the libraries' models ------------------------------------------------------------------------


def check_model(name: str, steps: int) -> None:
    pytest.importorskip("other_libraries")
    pytest.importorskip(name.split("-")[0])
    make, pixels = LIBRARIES[name]
    net = shaken(make()).eval()
    x = torch.randn(2, 3, pixels, pixels)
    # Batch normalization of few values would amplify rounding from step to step.
    batch = torch.randn(16, 3, pixels, pixels)
    for module in net.modules():  # they draw other masks in a smaller model
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=2e-5, momentum=0.9, weight_decay=1e-2)
    train(net, optimizer, batch, 1)
    # With their readers zero as well, channels stay zero behind any activation.
    left = kill(net, x, readers=True, optimizer=optimizer)
    assert left
    zeroed = copy.deepcopy((net, optimizer))
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert off(small(x), net(x)) < 1e-12
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, net)]
    assert sizes[0] < 0.9 * sizes[1]
    # A network in which a rounding grows from step to step is compared after fewer.
    for count in (steps, 5, 2, 1):
        ours, wanted = copy.deepcopy(((small, optimizer), zeroed))
        touched = copy.deepcopy(zeroed)
        with torch.no_grad():
            for p in touched[0].parameters():
                p.mul_(1 + 1e-15)
        for model, its in (ours, wanted, touched):
            train(model, its, batch, count)
        if off(touched[0](x), wanted[0](x)) < 1e-10:
            break
    else:
        pytest.fail("roundings grow too fast for a comparison")
    assert off(ours[0](x), wanted[0](x)) < 1e-9


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-squeezenet"])
def test_models_of_libraries_compute_and_train_the_same(name: str) -> None:
    check_model(name, 3)
