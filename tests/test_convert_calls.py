"""Converted models that are called in any way, and forwards that unpack or have defaults."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from plain_models import Calls, watched_calls

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


def both(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = cls().double()
    return plain, fusereg.convert(copy.deepcopy(plain))


def outcome(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The result, or the class and the text of the error."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).partition(" takes ")[0].partition(" missing ")[0]


def agree(plain: Any, converted: Any) -> None:
    if isinstance(plain, Tensor):
        torch.testing.assert_close(converted, plain)
    else:
        assert converted == plain


# --- unpacking ------------------------------------------------------------------------------------


class Shape(Base):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.body(x[:, :, -6:]).reshape(n, c, h * w)


class OfTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x
        return self.body(a) + b


class OfChunks(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        a, b = y.chunk(3, 1)
        return a + b


class Several(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return (x,) * (int(x.shape[-1]) - 4)


class OfLayer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.several = Several()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.several(x)
        return self.body(a) - b


class InALoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for a, b in ((y, x), (x, y)):
            y = y + a * b
        return y


@pytest.mark.parametrize("cls", [Shape, OfTensor, OfChunks, OfLayer, InALoop])
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (3, 6, 6), (2, 4, 3, 6, 6), (3, 4, 3, 6, 6)])
@pytest.mark.parametrize("last", [5, 6, 7])
def test_unpacking_wants_as_many_items_as_there_are_names(
    cls: type[nn.Module], shape: tuple[int, ...], last: int
) -> None:
    plain, converted = both(cls)
    assert type(converted) is not cls
    x = torch.randn(*shape[:-1], last, dtype=torch.float64)
    for training in (True, False):
        agree(outcome(plain.train(training), x), outcome(converted.train(training), x))


# --- defaults -------------------------------------------------------------------------------------


class Optional(Base):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.5,
        *,
        flag: bool = False,
        **more: Any,
    ) -> Tensor:
        y = self.body(x) * scale
        if mask is not None:
            y = y * mask
        if flag:
            y = y + 1
        return y + more.get("extra", 0)


GIVEN: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = [
    ((), {}, True),
    ((None,), {}, True),
    ((None, 1.5), {}, False),  # equal, but another object unless Python shares it
    ((), {"mask": None}, True),
    ((X,), {}, False),
    ((None, 2.0), {}, False),
    ((), {"scale": 2.0}, False),
    ((), {"mask": X, "flag": True}, False),
    ((), {"flag": True}, False),
    ((), {"flag": False}, False),
    ((), {"extra": 3}, False),
    ((None,), {"mask": None}, False),
    ((None, 1.5, 3), {}, False),
    ((), {"x": X}, False),
    ((None,), {"scale": 1.5}, False),
]


@pytest.mark.parametrize(("args", "kwargs", "fused"), GIVEN)
def test_defaults_that_are_passed_are_defaults(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, converted = both(Optional)
    for training in (True, False):
        agree(
            outcome(plain.train(training), X, *args, **kwargs),
            outcome(converted.train(training), X, *args, **kwargs),
        )
    calls: Calls = watched_calls(monkeypatch)
    outcome(converted, X, *args, **kwargs)
    if fused:
        assert len(calls) == 1


def test_a_default_that_changes_is_seen() -> None:
    plain, converted = both(Optional)
    before = Optional.forward.__defaults__
    Optional.forward.__defaults__ = (None, 3.0)
    try:
        agree(plain(X), converted(X))
        agree(plain(X, None), converted(X, None))
    finally:
        Optional.forward.__defaults__ = before
    agree(plain(X, None), converted(X, None))


# --- results that a hook keeps --------------------------------------------------------------------


class InPlace(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.act(self.conv(x)))
        return y


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_result_that_a_hook_keeps_is_written_to_as_before(when: str) -> None:
    kept: list[Tensor] = []
    plain = InPlace().double()
    models = [plain, copy.deepcopy(plain)]
    for i, model in enumerate(models):
        if i and when == "after":
            fusereg.convert(model)
        model.conv.register_forward_hook(lambda module, args, result: kept.append(result))
        if i and when == "before":
            fusereg.convert(model)
        model(X)
    assert (kept[0] >= 0).all()
    torch.testing.assert_close(kept[1], kept[0])
