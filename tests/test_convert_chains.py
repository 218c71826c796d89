"""What conversion fuses, and that only the speed changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.convert.chain import ADD, chain
from plain_models import (
    MODELS,
    BasicBlock,
    Bottleneck,
    Calls,
    Encoder,
    Maker,
    Volumes,
    basic,
    bottleneck,
    close,
    convolutions,
    images,
    mlp,
    same_state,
    stir,
    watched_calls,
)

CHAINS = {basic: 9, bottleneck: 7, convolutions: 4, mlp: 2, Encoder: 0, Volumes: 3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return watched_calls(monkeypatch)


# --- what is fused --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_chains(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.convert(make())
    # Encoder's layer is torch's, with a forward of its own; the report says so.
    left = "1 module left as it is" if make is Encoder else "0 modules left as they are"
    assert f"{CHAINS[make]} chains fused, {left}" in caplog.text
    said = "layer (TransformerEncoderLayer) not fused: its forward is torch's own"
    assert (said in caplog.text) == (make is Encoder)


def test_residual_blocks_call_one_kernel_for_a_chain(calls: list[object]) -> None:
    for block, chains in ((BasicBlock(4, 4), 2), (BasicBlock(4, 8, 2), 3)):
        fusereg.convert(block)
        calls.clear()
        block(torch.randn(2, 4, 6, 6))
        assert len(calls) == chains
        assert calls[0] == ("relu", False, 0.0)
        assert calls[-1] == ("relu", True, 0.0)


def test_a_sequential_calls_one_kernel_for_a_chain(calls: list[object]) -> None:
    fusereg.convert(convolutions())(images().float())
    wanted = [("relu", 0.1), ("leaky_relu", 0.0), ("silu", 0.0), ("gelu", 0.0), (None, 0.0)]
    assert calls == [(activation, False, p) for activation, p in wanted]


def test_fused_dropout_drops() -> None:
    model = nn.Sequential(nn.BatchNorm1d(400), nn.ReLU(), nn.Dropout(0.5))
    torch.nn.init.constant_(model[0].bias, 100.0)
    y = fusereg.convert(model)(torch.randn(200, 400))
    assert abs((y == 0).double().mean() - 0.5) < 0.01
    assert abs(y.mean() / 100 - 1) < 0.01


# --- where fusing would show ----------------------------------------------------------------------


def block_and_twin() -> tuple[BasicBlock, BasicBlock]:
    model = stir(BasicBlock(3, 3)).double()
    return model, fusereg.convert(copy.deepcopy(model))


@pytest.mark.parametrize("name", ["bn1", "bn3", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_what_they_saw(name: str, kind: str) -> None:
    seen: list[list[Tensor]] = []
    x = images()
    plain = stir(Bottleneck(3, 3)).double()
    for model in (plain, fusereg.convert(copy.deepcopy(plain))):
        tensors: list[Tensor] = []

        def hook(module: nn.Module, *args: object, into: list[Tensor] = tensors) -> None:
            values = [a for a in args if a is not None]
            into += [t.clone() for a in values for t in (a if isinstance(a, tuple) else (a,))]

        getattr(model.get_submodule(name), f"register_{kind}_hook")(hook)
        model.relu.inplace = False  # backward hooks and layers in place exclude each other in torch
        model(x.clone().requires_grad_()).sum().backward()
        seen.append(tensors)
    assert seen[0]
    assert len(seen[0]) == len(seen[1])
    for a, b in zip(*seen, strict=True):
        close(b, a)


def test_a_hook_that_was_there_before_stays() -> None:
    model = BasicBlock(3, 3)
    seen: list[int] = []
    model.bn1.register_forward_hook(lambda *_: seen.append(1))
    model.register_forward_hook(lambda *_: seen.append(2))
    model._register_state_dict_hook(lambda *_: seen.append(3))
    fusereg.convert(model)
    model(images().float())
    model.state_dict()
    assert seen == [1, 2, 3]


def frozen_norm(m: BasicBlock) -> None:
    m.bn1.eval()


def new_activation(m: BasicBlock) -> None:
    m.relu = nn.Tanh()


def new_norm(m: BasicBlock) -> None:
    m.bn2 = nn.BatchNorm2d(3).double()


def shortcut(m: BasicBlock) -> None:
    m.downsample = nn.AvgPool2d(3, 1, 1)


def broadcast(m: BasicBlock) -> None:
    m.downsample = nn.AdaptiveAvgPool2d(1)


def own_forward(m: BasicBlock) -> None:
    m.bn1.forward = lambda x: x * 2


@pytest.mark.parametrize(
    "change", [frozen_norm, new_activation, new_norm, shortcut, broadcast, own_forward]
)
def test_a_model_that_is_changed_later_computes_what_it_says(
    change: Callable[[BasicBlock], None],
) -> None:
    model, converted = block_and_twin()
    x = images()
    close(converted(x), model(x))
    change(model)
    change(converted)
    close(converted(x), model(x))
    same_state(converted, model)


def test_a_frozen_norm_does_not_switch_its_dropout_off(calls: list[object]) -> None:
    model = fusereg.convert(nn.Sequential(nn.BatchNorm1d(50), nn.ReLU(), nn.Dropout(0.5)))
    nn.init.constant_(model[0].bias, 100.0)
    model[0].eval()
    y = model(torch.randn(20, 50))
    assert calls == [("relu", False, 0.0)]
    assert abs((y == 0).double().mean() - 0.5) < 0.1
    model[0].train()
    model[2].eval()
    assert (model(torch.randn(20, 50)) > 0).all()


def test_parts_of_a_sequential_are_themselves() -> None:
    model = fusereg.convert(nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5)))
    x = torch.randn(8, 5)
    wanted = nn.BatchNorm1d(5)(x)
    torch.testing.assert_close(model[0](x), wanted)
    torch.testing.assert_close(model[:1](x), wanted)
    torch.testing.assert_close(model[:2](x), wanted.relu())
    model.append(nn.Tanh())
    assert float(model(x).abs().max().detach()) <= 1.0
    fusereg.revert(model)
    assert type(model) is nn.Sequential


def test_shared_layers() -> None:
    shared = nn.BatchNorm1d(4)
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), shared, act, nn.Linear(4, 4), shared, act).double()
    twin = fusereg.convert(copy.deepcopy(model))
    assert twin[1] is twin[4]
    x = torch.randn(6, 4, dtype=torch.float64)
    close(twin(x), model(x))
    same_state(twin, model)


def test_tensors_changed_in_place_elsewhere() -> None:
    """X += y changes x for everybody who has it; a norm must not be read too late."""

    class Mutating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            z = self.bn(y)
            y += 3
            x += self.relu(z) + y
            return x * 2 + y

    model, x = stir(Mutating()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = fusereg.convert(copy.deepcopy(model))
    a, b = x.clone(), x.clone()
    close(twin(a), model(b))
    close(a, b)


# --- code that cannot be read ---------------------------------------------------------------------


class Unreadable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.relu = nn.ReLU()
        self.counts = {"calls": 0}
        self.calls = 0

    def chain(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class ReadsModeOfLayer(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) if self.bn.training else x


class Head(nn.Identity):
    scale = 1.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale


class CallsAnother(Unreadable):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head.scaled(self.chain(x))


class AsksForType(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        return self.chain(x) if isinstance(y, Tensor) else y[0]


class AsksForValue(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) if x.sum() > 0 else x


class Counts(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.chain(x)


class CountsInHelper(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.count(x)

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.chain(x)


class ReadsDictionary(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.counts["calls"]


class Throws(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) if torch.rand(1) < 0.5 else x


class EntersContext(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.chain(x)


class DecoratedHelper(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.quiet(x)

    @torch.no_grad()
    def quiet(self, x: Tensor) -> Tensor:
        return self.chain(x)


class MakesTensor(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) + torch.ones(4)


class Variadic(Unreadable):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.chain(xs[0])


class Pickled(Unreadable):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)

    def __reduce__(self) -> tuple[object, ...]:
        return (Pickled, ())


UNREADABLE = [*Unreadable.__subclasses__()]


@pytest.mark.parametrize("cls", UNREADABLE)
def test_code_that_cannot_be_read_is_left_alone(
    cls: type[Unreadable], caplog: pytest.LogCaptureFixture, calls: list[object]
) -> None:
    model = cls()
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.convert(model)
    assert type(model) is cls
    assert model.calls == 0
    assert f"({cls.__name__}) not fused: " in caplog.text
    assert type(model.bn) is fusereg.nn.BatchNorm1d
    assert not any(name.startswith("_tensor_constant") for name in vars(model))
    for _ in range(3):
        model(torch.ones(6, 4) + torch.randn(6, 4) / 9)
    assert all(activation is None for activation, *_ in calls)


def test_both_modes_of_a_forward_that_asks_for_its_mode(calls: list[object]) -> None:
    class Modes(Unreadable):
        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(self.chain(x), 0.5, training=self.training)
            return self.relu(self.bn(y)) if not self.training else y

    for mode in (True, False):
        model = stir(Modes()).double().train(mode)
        twin = fusereg.convert(copy.deepcopy(model))
        x = torch.randn(6, 4, dtype=torch.float64)
        for training in (mode, not mode):
            torch.manual_seed(2)
            wanted = model.train(training)(x)
            calls.clear()
            torch.manual_seed(2)
            close(twin.train(training)(x), wanted)
            # In evaluation the norm is called twice, and such a norm begins no chain.
            assert calls == ([("relu", False, 0.0)] if training else [(None, False, 0.0)] * 2)


def test_an_attribute_that_changes_brings_the_original_forward_back() -> None:
    class Scaled(Unreadable):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.skip = 2.0, False

        def forward(self, x: Tensor, add: float = 1.0) -> Tensor:
            return x if self.skip else self.chain(x) * self.scale + add

    model = Scaled().double()
    twin = fusereg.convert(copy.deepcopy(model))
    x = torch.randn(6, 4, dtype=torch.float64)
    close(twin(x), model(x))
    close(twin(x, 5.0), model(x, 5.0))
    close(twin(x=x), model(x=x))
    for name, value in (("scale", 3.0), ("scale", torch.tensor(4.0)), ("skip", True)):
        setattr(model, name, value)
        setattr(twin, name, value)
        close(twin(x), model(x))


def test_the_chain_falls_back_on_unknown_layers() -> None:
    x = torch.randn(4, 3)
    layers = [nn.LayerNorm(3), nn.ReLU()]
    got = chain(x, x, layers[0], ADD, "relu", layers[1])
    assert torch.equal(got, F.relu(layers[0](x) + x))
