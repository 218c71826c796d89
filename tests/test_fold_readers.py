"""Folding leaves a pair that something else reads, calls, or may reach."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fold_models import (
    Make,
    Pair,
    Residual,
    Untraceable,
    convolution,
    folded,
    norms,
    randomized,
    sequence,
    untraceable,
)
from fusereg.nn import BatchNorm2d

# --- what stays: something else reads the pair ----------------------------------------------------


class ReturnsBoth(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y, self.bn(y)


class Adds(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class CallsTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv(x * 2)


class NormalizesTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn(x)


class TakesListsOtherwise(Pair):
    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(x)) if isinstance(x, Tensor) else self.conv(x[0])


class CallsItWithAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = TakesListsOtherwise()

    def forward(self, x: Tensor) -> Any:
        return self.part([self.part(x)])


class AsksForItsClass(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y if isinstance(self.bn, nn.Identity) else y * 2


class ReadsWeight(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class ReadsBias(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv.bias.sum()


class ReadsScale(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.bn.weight.abs().sum()


class ReadsStatistics(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.bn.running_var.sum()


class Between(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x) * 2)


class OtherOrder(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.conv(self.bn(x))


class Method(Pair):
    """Also calls its convolution in another method, which its parent calls."""

    def raw(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CallsMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Method()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.raw(x)


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * self.part.conv.weight.sum()


class Masked(Pair):
    def __init__(self) -> None:
        super().__init__(norm=BatchNorm2d(6))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x), mask=x[:, 0] > -9.0)


class ReadsSetting(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn.eps


class AsksForBias(Pair):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(6, 6, 1, bias=False))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) if self.conv.bias is None else self.bn(x)


class CallsItsOwn(Pair):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + self.conv(x)


class Replaces(nn.Module):
    """Reads attributes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()
        self.other = Pair()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.conv if name == "other" else found

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.other(x)


class OwnResidual(Pair):
    def __init__(self) -> None:
        super().__init__(norm=BatchNorm2d(6))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y, y)


class OwnResidualKeyword(OwnResidual):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y, residual=y)


class InPlace(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        y.add_(1.0)
        return self.bn(y)


class View(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        v = y.view(-1)
        z = self.bn(y)
        return z + v.sum()


READ: dict[str, tuple[Make, str]] = {
    "own residual": (OwnResidual, "is its residual as well"),
    "own residual by keyword": (OwnResidualKeyword, "is its residual as well"),
    "in place": (InPlace, "is used elsewhere"),
    "view": (View, "is used elsewhere"),
    "a setting": (ReadsSetting, "reads its eps"),
    "whether there is a bias": (AsksForBias, "reads its bias"),
    "its own way of calling": (CallsItsOwn, "it has its own way of being called"),
    "both returned": (ReturnsBoth, "is used elsewhere"),
    "added": (Adds, "is used elsewhere"),
    "convolution twice": (CallsTwice, "it is called 2 times"),
    "batch norm twice": (NormalizesTwice, "it is called 2 times"),
    "called otherwise with lists": (CallsItWithAList, ""),
    "class": (AsksForItsClass, "reads its __class__"),
    "weight": (ReadsWeight, "reads its "),
    "bias": (ReadsBias, "reads its "),
    "scale": (ReadsScale, "reads its "),
    "statistics": (ReadsStatistics, "reads its "),
    "something between": (Between, "no convolution or linear layer is seen before it"),
    "other order": (OtherOrder, "no convolution or linear layer is seen before it"),
    "a method": (CallsMethod, "may use it"),
    "a child's weight": (ReadsChild, "reads its "),
    "a mask": (Masked, "it is called with mask"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_what_something_else_reads_stays(
    name: str, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = READ[name]
    model = make()
    copied = folded(randomized(model if traced else Untraceable(model)), caplog=caplog)
    assert norms(copied) == 1
    assert reason in caplog.text


def test_nothing_is_folded_where_attributes_are_read_in_an_own_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert norms(folded(randomized(Replaces()), caplog=caplog)) == 2


class OptionalTensor(Pair):
    """Returns the convolution's result unless it gets a second argument."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.conv(x)
        return z if y is None else self.bn(z) + y


class OptionalKeyword(Pair):
    def forward(self, x: Tensor, *, y: Tensor | None = None) -> Any:
        z = self.conv(x)
        return self.bn(z) if y is None else z + y


class OptionalNeither(Pair):
    """Does the same with the pair in both cases, if at all."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        if y is None:
            return self.bn(self.conv(x))
        return x + y


class OptionalAdded(Pair):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.bn(self.conv(x))
        return z if y is None else z + y


class Flag(Pair):
    def forward(self, x: Tensor, raw: bool = False) -> Any:
        z = self.conv(x)
        return z if raw else self.bn(z)


class Word(Pair):
    def forward(self, x: Tensor, mode: str = "usual") -> Any:
        z = self.conv(x)
        return z if mode == "raw" else self.bn(z)


class Any_(Pair):
    def forward(self, x: Tensor, *more: Any, **options: Any) -> Any:
        z = self.conv(x)
        return z if more or options else self.bn(z)


class Needed(Pair):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return self.bn(self.conv(x)) * scale + shift


@pytest.mark.parametrize(
    ("cls", "left", "calls"),
    [
        (OptionalTensor, 1, [(), (1.0,)]),
        (OptionalKeyword, 1, [()]),
        (OptionalNeither, 0, [(), (1.0,)]),
        (OptionalAdded, 0, [(), (1.0,)]),
        (Flag, 1, [(), (True,)]),
        (Word, 1, [(), ("raw",)]),
        (Any_, 1, [(), (1.0,)]),
        (Needed, 0, [(2.0, 3.0)]),
    ],
)
def test_all_that_a_forward_may_get_is_considered(
    cls: Any, left: int, calls: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for more in calls:
        assert norms(folded(randomized(cls()), x, *more, caplog=caplog)) == left


def test_models_are_folded_in_several_threads_while_another_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = randomized(Residual())
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                running(x)
            except Exception as error:
                errors.append(error)

    def fold() -> None:
        try:
            for _ in range(5):
                assert norms(fusereg.fold_into_conv(running)) == 0
        except Exception as error:
            errors.append(error)

    runner = threading.Thread(target=run)
    threads = [threading.Thread(target=fold) for _ in range(4)]
    for thread in (runner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    runner.join()
    assert not errors


@pytest.mark.parametrize(
    ("cls", "left"), [(Pair, 0), (ReturnsBoth, 1), (ReadsWeight, 1), (CallsTwice, 1), (Method, 0)]
)
def test_a_module_of_torch_fx_is_read_from_its_graph(
    cls: Any, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    for model in (cls(), nn.Sequential(cls())):
        traced = torch.fx.symbolic_trace(randomized(model))
        assert norms(folded(traced, caplog=caplog)) == left


class Domains(nn.Module):
    """Parts for several domains, chosen by an argument: no trace of the whole."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.domains = nn.ModuleList(parts)

    def forward(self, x: Tensor, i: int) -> Any:
        return self.domains[i](x)


def with_shared_convolution(wrap: Any) -> nn.Module:
    conv = convolution()
    return wrap(Pair(conv), Pair(conv))


def with_shared_norm(wrap: Any) -> nn.Module:
    norm = nn.BatchNorm2d(6)
    return wrap(Pair(norm=norm), Pair(norm=norm))


def with_convolution_outside(wrap: Any) -> nn.Module:
    pair = Pair()
    return wrap(pair, nn.Sequential(pair.conv))


@pytest.mark.parametrize(
    ("share", "left"),
    [(with_shared_convolution, 2), (with_shared_norm, 1), (with_convolution_outside, 1)],
)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_what_two_parts_share_stays(
    share: Any, left: int, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(share(nn.Sequential if traced else Domains))
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for inputs in [(x,)] if traced else [(x, 0), (x, 1)]:
        assert norms(folded(model, *inputs, caplog=caplog)) == left
    assert "it is called 2 times" in caplog.text


# --- parents that cannot be traced and look inside ------------------------------------------------


class Inside(nn.Module):
    """Does not only call its part, after a decision that depends on the data."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.part = sequence() if part is None else part

    def forward(self, x: Tensor) -> Any:
        with untraceable:
            return self.look(x)


class Taps(Inside):
    """Collects the results of its part's layers, as perceptual losses and detectors do."""

    def look(self, x: Tensor) -> Any:
        found = []
        for layer in self.part:
            x = layer(x)
            found.append(x)
        return found


class Names(Inside):
    def look(self, x: Tensor) -> Any:
        return [self.part.get_submodule(name)(x) for name in ("0", "1")]


class Items(Inside):
    def look(self, x: Tensor) -> Any:
        return [layer(x) for _, layer in self.part._modules.items()]


class Index(Inside):
    def look(self, x: Tensor) -> Any:
        return self.part[0](x)


class Slice(Inside):
    def look(self, x: Tensor) -> Any:
        return self.part[:1](x)


class Local(Inside):
    def look(self, x: Tensor) -> Any:
        part = self.part
        return part[0](x)


class Weight(Inside):
    def look(self, x: Tensor) -> Any:
        return F.conv2d(x, self.part[0].weight)


class Getattr(Inside):
    def look(self, x: Tensor) -> Any:
        return getattr(self, "part")[0](x)  # noqa: B009


class Children(Inside):
    def look(self, x: Tensor) -> Any:
        return next(iter(self.children()))[0](x)


class Handed(Inside):
    def look(self, x: Tensor) -> Any:
        return first_of(self.part, x)


class HandedItself(Inside):
    def look(self, x: Tensor) -> Any:
        return first_of_part(self, x)


class Hidden(Inside):
    """Holds a part of its part where no child is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.part[0]]

    def look(self, x: Tensor) -> Any:
        return self.hidden[0](x)


class InAList(Inside):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList([sequence()]))

    def look(self, x: Tensor) -> Any:
        return [layer(x) for part in self.part for layer in part]


class Values(Inside):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"a": sequence()}))

    def look(self, x: Tensor) -> Any:
        return [part[0](x) for part in self.part.values()]


class Walrus(Inside):
    def look(self, x: Tensor) -> Any:
        return (p := self.part)(x) + p[0](x)


def first_of(part: Any, x: Tensor) -> Tensor:
    return part[0](x)


def first_of_part(module: Any, x: Tensor) -> Tensor:
    return module.part[0](x)


@pytest.mark.parametrize("cls", Inside.__subclasses__())
@pytest.mark.parametrize("outer", [False, True])
def test_inside_a_part_that_is_not_only_called_nothing_is_folded(
    cls: Any, outer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(nn.Sequential(cls()) if outer else cls())
    assert norms(folded(model, caplog=caplog)) == 1
    assert "cannot be traced" in caplog.text


class _Uses:
    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Any:
        return self.part.conv(x)


class _UsesBySlot:
    __slots__ = ("part",)

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, x: Tensor) -> Any:
        return self.part.conv(x)


def _closure(part: Any) -> Any:
    return lambda x: part.conv(x)


def _default(part: Any) -> Any:
    def call(x: Tensor, using: Any = part) -> Any:
        return using.conv(x)

    return call


def _weakly(part: Any) -> Any:
    held = weakref.ref(part)
    return lambda x: held().conv(x)  # type: ignore[union-attr]


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a bound method": lambda part: part.conv.forward,
    "a partial function": lambda part: functools.partial(part.conv),
    "an object": _Uses,
    "slots": _UsesBySlot,
    "an object in an object": lambda part: _Uses(SimpleNamespace(conv=part.conv)),
    "a closure": _closure,
    "a default": _default,
    "a weak reference": _weakly,
    "a partial closure": lambda part: functools.partial(_closure(part)),
}


class _Holds(nn.Module):
    """Calls its part, and through something else a layer of it."""

    def __init__(self, how: Callable[[Any], Any], where: str) -> None:
        super().__init__()
        self.part, self.where = Pair(), where
        self.held: Any = {
            "attribute": lambda h: h,
            "list": lambda h: [h],
            "dict": lambda h: {"h": (h,)},
            "set": lambda h: {h},
            "queue": lambda h: deque([h]),
        }[where](how(self.part))

    def forward(self, x: Tensor) -> Any:
        found: Any = self.held
        while not callable(found):
            found = next(iter(found.values() if isinstance(found, dict) else found))
        return self.part(x) + found(x)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("where", ["attribute", "list", "dict", "set", "queue"])
def test_what_an_attribute_gives_access_to_stays(holder: str, where: str) -> None:
    model = randomized(_Holds(HOLDERS[holder], where))
    copied = fusereg.fold_into_conv(model)
    assert norms(copied) == 1
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(copied(x), copy.deepcopy(model)(x))


class _HoldsForAll(nn.Module):
    held: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()

    def forward(self, x: Tensor) -> Any:
        return self.part(x) + self.held(x)


def test_what_an_attribute_of_the_class_gives_access_to_stays() -> None:
    model = _HoldsForAll()
    _HoldsForAll.held = _Uses(model.part)
    assert norms(fusereg.fold_into_conv(randomized(model))) == 1


class _Harmless(nn.Module):
    """Has attributes that give access to no modules, and is not traced for them."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.3)
        self.log = logging.getLogger("fold")
        self.names = SimpleNamespace(a=[1, {"b": torch.ones(2)}], c=None, d=nn.ReLU)
        self.names.itself = self.names

    def forward(self, x: Tensor, *more: Any) -> Any:
        self.log.debug("%s", self.names)
        return self.act(self.part(x))


def test_what_gives_access_to_no_modules_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    assert norms(folded(randomized(_Harmless()), caplog=caplog)) == 0


def _reads_weight(module: Any, given: Any, result: Tensor) -> Tensor:
    return result + module.conv.weight.sum()


def _reads_among_all(*args: Any) -> Any:
    return args[2] + args[0].conv.weight.sum()


class _Reader:
    def hook(self, module: Any, given: Any, result: Tensor) -> Tensor:
        return result + module.conv.bias.sum()


HOOKS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "reads the module": (lambda part: _reads_weight, True),
    "reads it among all": (lambda part: _reads_among_all, True),
    "a method": (lambda part: _Reader().hook, True),
    "holds another": (lambda part: lambda m, i, o: o + part.conv.weight.sum(), True),
    "partial": (lambda part: functools.partial(lambda a, m, i, o: o + m.conv.bias.sum(), 1), True),
    "reads the result": (lambda part: lambda module, given, result: result * 2, False),
    "partial of the result": (lambda part: functools.partial(lambda a, m, i, o: o * a, 2), False),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("above", [0, 1])
def test_what_a_hook_of_a_part_above_may_read_stays(name: str, above: int) -> None:
    make, reads = HOOKS[name]
    part = Pair()
    model = nn.Sequential(nn.Sequential(part)) if above else nn.Sequential(part)
    randomized(model)
    part.register_forward_hook(make(part))
    copied = fusereg.fold_into_conv(model)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(copied(x), model(x))
    assert norms(copied) == reads
