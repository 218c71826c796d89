"""What conversion fuses with a dropout that follows no batch norm, and where it must not."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from plain_models import close, without_dropout


class Mlp(nn.Module):
    """Two linear layers, each with a dropout, as in timm."""

    def __init__(self, features: int, hidden: int, act: nn.Module, p: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = act
        self.drop1 = nn.Dropout(p)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, features)
        self.drop2 = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class Block(nn.Module):
    """A transformer block, with its sums written in both orders."""

    def __init__(self, features: int = 8, p: float = 0.25) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.mix = nn.Linear(features, features)
        self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p)
        self.linear1, self.linear2 = nn.Linear(features, 16), nn.Linear(16, features)
        self.dropout = nn.Dropout(p)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(F.gelu(self.linear1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout1(self.mix(self.norm1(x)))
        return self.feed_forward(self.norm2(x)) + x


Calls = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record the calls of fused kernels."""
    seen: Calls = []
    for name in ("activation_dropout", "dropout_add"):
        original = getattr(fusereg.functional, name)

        def watched(
            *args: object, name: str = name, original: Callable[..., Tensor] = original
        ) -> Tensor:
            seen.append(f"{name} {args[2]}" if name == "activation_dropout" else name)
            return original(*args)

        monkeypatch.setattr(fusereg.functional, name, watched)
    return seen


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlps(name: str, calls: Calls) -> None:
    model = fusereg.convert(Mlp(8, 32, copy.deepcopy(ACTIVATIONS[name]), 0.25))
    model(torch.randn(5, 8))
    assert calls == [f"activation_dropout {name}"]
    model.eval()(torch.randn(5, 8))
    assert len(calls) == 1, "evaluation has nothing to fuse"


def test_sequentials(calls: Calls) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True),
        nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(8, 8), nn.LeakyReLU(), nn.Dropout(0.5),
        nn.Linear(8, 8), nn.SiLU(), nn.Dropout1d(0.5),
        nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5),
    )  # fmt: skip
    fusereg.convert(model)(torch.randn(4, 6))
    assert calls == ["activation_dropout relu", "activation_dropout gelu"]


def test_blocks(calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    model = Block()
    with caplog.at_level(logging.DEBUG, "fusereg"):
        fusereg.convert(model)
    for chain in ("dropout1 + add", "gelu + Dropout", "dropout2 + add"):
        assert f"fused {chain}" in caplog.text
    model(torch.randn(3, 4, 8))
    assert calls == ["dropout_add", "activation_dropout gelu", "dropout_add"]
    copied = pickle.loads(pickle.dumps(model))
    calls.clear()
    copied(torch.randn(3, 4, 8))
    assert len(calls) == 3
    assert type(fusereg.revert(copied)) is Block


@pytest.mark.parametrize("make", [Block, lambda: Mlp(8, 16, nn.SiLU(), 0.1)])
def test_results_and_gradients_are_the_same(make: Callable[[], nn.Module]) -> None:
    """With probabilities of 0, which draw nothing but go through the fused kernels."""
    model = without_dropout(make()).double()
    twin = fusereg.convert(copy.deepcopy(model))
    for training in (True, False):
        model.train(training)
        twin.train(training)
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [m(t) for m, t in zip((twin, model), inputs, strict=True)]
        for y in results:
            y.square().sum().backward()
        close(results[0], results[1], 1e-9)
        close(inputs[0].grad, inputs[1].grad, 1e-9)
        for a, b in zip(twin.parameters(), model.parameters(), strict=True):
            close(a.grad, b.grad, 1e-9)


def test_fused_dropouts_drop_with_their_probability() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.25))
    y = fusereg.convert(model)(torch.ones(40_000))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((y == 0).double().mean() - 0.25) < 0.01

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.25)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(x)

    y = fusereg.convert(Residual())(torch.ones(40_000))
    assert y.unique().tolist() == pytest.approx([1.0, 7 / 3])
    assert abs((y == 1).double().mean() - 0.25) < 0.01


# --- where fusing would show ----------------------------------------------------------------------


def test_hooks_evaluation_and_new_layers(calls: Calls) -> None:
    model = fusereg.convert(Mlp(8, 16, nn.ReLU(), 0.5))
    seen: list[int] = []
    for layer in (model.act, model.drop1):
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        model(torch.randn(3, 8))
        handle.remove()
    assert seen == [1, 1]
    model.drop1.eval()
    model(torch.randn(3, 8))
    model.drop1.train()
    model.act = nn.Tanh()
    model(torch.randn(3, 8))
    assert calls == []
    model.act = nn.SiLU()
    model(torch.randn(3, 8))
    assert calls == ["activation_dropout silu"]


def test_excluded_layers_are_not_fused(calls: Calls) -> None:
    fusereg.convert(Mlp(8, 16, nn.ReLU(), 0.5), exclude="act")(torch.randn(3, 8))
    fusereg.convert(Mlp(8, 16, nn.ReLU(), 0.5), exclude="drop1")(torch.randn(3, 8))
    assert calls == []


class ReluInPlace(nn.Module):
    """The caller's tensor is written to, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.relu(x))
        return y * x


class DropInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0, inplace=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.drop(x) + y


class SumInPlace(nn.Module):
    """In evaluation a dropout's result is its input, which the sum changes then."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.drop(x)
        z += y
        return z * x


class WrittenBetween(nn.Module):
    """What the dropout reads changes before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dropped = self.drop(x)
        x += 3
        return dropped + y


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        return self.drop(y) * y


class IntoTheResidual(nn.Module):
    """``x += dropout(y)`` changes x for all that hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += self.drop(y)
        return x


@pytest.mark.parametrize(
    "make", [ReluInPlace, DropInPlace, SumInPlace, WrittenBetween, ReadTwice, IntoTheResidual]
)
def test_what_is_written_elsewhere_is_left_alone(
    make: Callable[[], nn.Module], calls: Calls
) -> None:
    for training in (True, False):
        model = make().train(training)
        twin = fusereg.convert(copy.deepcopy(model))
        count = 1 if make in (ReluInPlace, ReadTwice) else 2
        given = [torch.randn(4, 3, dtype=torch.float64) for _ in range(count)]
        own, theirs = ([t.clone() for t in given] for _ in range(2))
        if make is WrittenBetween and training:
            twin(*own)
        else:
            close(twin(*own), model(*theirs))
            for a, b in zip(own, theirs, strict=True):
                close(a, b)
    assert calls == []


def test_a_residual_that_is_broadcast_or_of_another_dtype(calls: Calls) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.drop(x) + y

    model = Residual()
    twin = fusereg.convert(copy.deepcopy(model))
    x = torch.randn(4, 3)
    for y in (torch.randn(3), torch.randn(4, 3).double(), torch.randn(1, 1)):
        close(twin(x, y), model(x, y))
    assert calls == []
    close(twin(x, x), model(x, x))
    assert calls == ["dropout_add"]


def test_compiled_whole() -> None:
    model = without_dropout(Block()).double()
    twin = fusereg.convert(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    close(compiled(x), model(x), 1e-9)


def test_mlp_of_timm(calls: Calls) -> None:
    importlib.import_module("other_libraries")  # timm imports torchvision
    layers = pytest.importorskip("timm.layers")
    model = layers.Mlp(8, 16, drop=0.25)
    wanted = copy.deepcopy(model).eval()
    fusereg.convert(model)(torch.randn(3, 8))
    assert calls == ["activation_dropout gelu"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(model.eval()(x), wanted(x))
