"""Folding in forwards that may go several ways, and in decorated ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fold_models import Asserts, Make, Pair, folded, norms, randomized, sequence, untraceable

# --- forwards that decide by what is known at a call alone ----------------------------------------


class DecidesByValue(Pair):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            x = x * 2
        y = self.bn(self.conv(x))
        return y if y.mean() > 0.1 and not x.max() < 0 else -y


class PadsByShape(Pair):
    """As convolutions of TensorFlow's are padded."""

    def pad(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        height, width = int(x.shape[-2]), len(x[0, 0, 0])
        more = max(conv.kernel_size[0] - height % conv.stride[0], 0)
        more += math.ceil(width / 2) * 2 - round(abs(float(width)))
        return F.pad(x, (more // 2, more - more // 2))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(self.pad(x, self.conv)))


class AsksForType(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if isinstance(y, tuple):
            y = y[0]
        return y


class AsksTorch(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y if torch.is_grad_enabled() or torch.jit.is_tracing() else y * 2


class Chooses(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = sequence()

    def forward(self, x: Tensor) -> Any:
        return self.other(x) if x.sum() > 0 else self.bn(self.conv(x))


class SeveralTimes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(sequence(), sequence())

    def forward(self, x: Tensor) -> Any:
        for _ in range(3):
            x = self.part(x)
        return self.part[1](x) if x.sum() > 0 else x


FOLLOWED: list[type[Pair]] = [
    *(DecidesByValue, PadsByShape, Asserts, AsksForType, AsksTorch, Chooses),
]


@pytest.mark.parametrize("cls", FOLLOWED)
def test_what_every_way_shows_is_folded(cls: type[Pair], caplog: pytest.LogCaptureFixture) -> None:
    for sign in (1.0, -1.0):
        x = torch.rand(2, 6, 7, 5, dtype=torch.float64) * sign
        assert norms(folded(randomized(cls()), x, caplog=caplog)) == 0


def test_a_sequence_that_is_called_several_times_is_folded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    copied = folded(randomized(SeveralTimes()), caplog=caplog)
    assert norms(copied.part) == 0  # type: ignore[arg-type]


class UsedOnOneWay(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.bn(y)
        return z + y if x.sum() > 0 else z


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor | None:
        return x if x.sum() > 0 else None


class UsedIfNone(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.positive = Positive()

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.bn(y)
        return z + y if self.positive(x) is None else z


class WithoutNormOnOneWay(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y if x.sum() > 0 else self.bn(y)


class OtherSourceOnOneWay(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x) if x.sum() > 0 else x)


class ReadsOnOneWay(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y * self.conv.weight.sum() if x.sum() > 0 else y


class ReadsEpsOnOneWay(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y * self.bn.eps if x.sum() > 0 else y


class DecidesByResult(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y * 2 if y.sum() > 0 else y)


class Loops(Pair):
    def forward(self, x: Tensor) -> Any:
        while x.abs().max() > 0.1:
            x = x / 2
        return self.bn(self.conv(x))


class TooManyWays(Pair):
    def forward(self, x: Tensor) -> Any:
        for i in range(7):
            if x[0, 0, i, 0] > 0:
                x = x + i
        return self.bn(self.conv(x))


class LoopsOverNumber(Pair):
    def forward(self, x: Tensor) -> Any:
        for _ in range(int(x.sum() > 0) + 1):
            x = x * 2
        return self.bn(self.conv(x))


UNFOLLOWED: dict[type[Pair], str] = {
    UsedOnOneWay: "is used elsewhere too",
    UsedIfNone: "is used elsewhere too",
    WithoutNormOnOneWay: "it is called with and without this batch norm",
    OtherSourceOnOneWay: "no convolution or linear layer is seen before it",
    ReadsOnOneWay: "reads its parameters",
    ReadsEpsOnOneWay: "reads its eps",
    DecidesByResult: "no convolution or linear layer is seen before it",
    Loops: "it decides by the value of a tensor",
    TooManyWays: "it decides by the values of many tensors",
    LoopsOverNumber: "it takes a number or text out of a tensor",
}


@pytest.mark.parametrize("cls", UNFOLLOWED)
def test_what_one_way_uses_otherwise_stays(
    cls: type[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    for sign in (1.0, -1.0):
        x = torch.rand(2, 6, 7, 5, dtype=torch.float64) * sign
        assert norms(folded(randomized(cls()), x, caplog=caplog)) == 1
        assert UNFOLLOWED[cls] in caplog.text


# --- decorators -----------------------------------------------------------------------------------


def doubling(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and type(self).__name__ == "Never":
            return None
        return forward(self, *args, **kwargs) * (2 if self.flag else 1)

    return wrapper


def handing_all_on(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


def with_an_argument(factor: float) -> Any:
    def decorator(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: Any, x: Tensor) -> Any:
            return forward(self, x * factor)

        return wrapper

    return decorator


def twice(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, forward(self, x))

    return wrapper


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", enabled=False),
    "own": doubling,
    "all arguments": handing_all_on,
    "with an argument": with_an_argument(0.5),
    "twice": twice,
    "several": lambda f: torch.no_grad()(doubling(torch.enable_grad()(f))),
}


def reading(use: str, arguments: str = "self, x") -> Callable[[Any], Any]:
    """Return a decorator whose function does something with the module, by its source."""
    source = f"""
def decorator(forward):
    @functools.wraps(forward)
    def wrapper({arguments}):
        y = forward({arguments})
        return y + 0 * {use}
    return wrapper
"""
    return lambda forward: _made(source)(forward)


def _made(source: str) -> Any:
    import linecache

    name = f"<decorator {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {"functools": functools, "helper": _helper, "LAYERS": LAYERS}
    exec(compile(source, name, "exec"), space)
    return space["decorator"]


def _helper(module: Any) -> Any:
    return module.conv.weight.sum()


LAYERS: list[nn.Module] = [nn.ReLU()]

HARMFUL: dict[str, Callable[[Any], Any]] = {
    "reads a weight": reading("self.conv.weight.sum()"),
    "calls a layer": reading("self.conv(x).sum()"),
    "calls a method": reading("self.look(x).sum()"),
    "reads by name": reading("getattr(self, 'conv').weight.sum()"),
    "goes through all": reading("sum(p.sum() for p in self.parameters())"),
    "hands it to a function": reading("helper(self)"),
    "hands it on by another name": reading("(lambda m: m.conv.weight.sum())(self)"),
    "of all arguments": reading("args[0].conv.weight.sum()", "*args"),
    "reads its dictionary": reading("self.__dict__['_modules']['conv'].weight.sum()"),
    "holds layers": reading("LAYERS[0](x).sum()"),
}


def pair(decorator: Callable[[Any], Any], inside: bool) -> Make:
    """Return a pair whose forward is decorated, or a module whose decorated forward calls one."""

    class Decorated(Pair):
        flag = True

        def look(self, x: Tensor) -> Any:
            return self.conv.weight.sum()

        @decorator
        def forward(self, x: Tensor) -> Any:
            return torch.relu(self.bn(self.conv(x)))

    class Around(nn.Module):
        flag = True

        def __init__(self) -> None:
            super().__init__()
            self.part = Pair()

        @decorator
        def forward(self, x: Tensor) -> Any:
            with untraceable:
                return self.part(x)

    return Around if inside else Decorated


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_decorator_does_not_touch_is_folded(
    name: str, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert norms(folded(randomized(pair(HARMLESS[name], inside)()), caplog=caplog)) == 0


@pytest.mark.parametrize("name", HARMFUL)
def test_what_a_decorator_may_use_stays(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert norms(folded(randomized(pair(HARMFUL[name], False)()), caplog=caplog)) == 1
    assert "a decorator of it may use its layers" in caplog.text


def test_what_a_decorator_may_use_inside_of_a_layer_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for use in ("self.part.conv(x).sum()", "self.part.conv.weight.sum()", "helper(self.part)"):
        model = pair(reading(use), True)()
        assert norms(folded(randomized(model), caplog=caplog)) == 1
        assert "a decorator of it may use its layers" in caplog.text
