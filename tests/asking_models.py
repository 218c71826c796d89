"""Models whose forward asks Python something of a value that a stand-in could answer wrongly.

A forward is followed with stand-ins for its tensors, layers and functions. Python lets code ask
much of an object besides calling it: its attributes, its class, its identity, its hash, whether it
is None. What the answer would be at the call must be known, or the forward is left alone.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reading_models import Base


def helper(y: Tensor) -> Tensor:
    return y * 1.0


helper.enabled = True  # type: ignore[attr-defined]

#: A model -> a change of it after the conversion, if its forward is left alone with this reason.
ASKING: list[tuple[type[nn.Module], Callable[[Any], object], str | None]] = []


def left(reason: str | None, change: Callable[[Any], object] = lambda m: None) -> Any:
    """Add a model whose forward is left alone for a reason; None: it is rewritten."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        ASKING.append((cls, change, reason))
        return cls

    return add


# --- functions ------------------------------------------------------------------------------------


@left("it reads enabled of a function")
class AttributeOfFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if getattr(helper, "enabled", False) else y


@left("it reads enabled of a function", lambda m: vars(helper).pop("enabled"))
class HasAttributeOfFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = helper(self.chain(x))
        return y * 2 if hasattr(helper, "enabled") else y


@left("it reads __dict__ of a function")
class DictionaryOfFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if "factor" in helper.__dict__ else y


@left("it reads flag of a function")
class AttributeOfMethod(Base):
    def part(self, y: Tensor) -> Tensor:
        return y

    part.flag = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if getattr(self.part, "flag", False) else y


class HoldsFunction(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act: Any = F.relu


@left(None, lambda m: setattr(m, "act", F.silu))
class CallsHeldFunction(HoldsFunction):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.chain(x))


@left("it compares functions")
class ComparesFunctions(HoldsFunction):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.act == F.relu else y


@left("it compares functions")
class LooksForFunction(HoldsFunction):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.act in (F.gelu, F.relu) else y


@left("it compares functions")
class KeyedByFunction(HoldsFunction):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * {F.relu: 2.0}.get(self.act, 1.0)


@left("it reads __name__ of a function")
class NameOfFunction(HoldsFunction):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.act.__name__ == "relu" else y


# --- tensors --------------------------------------------------------------------------------------


@left("it uses is_, which may depend on more than its arguments", lambda m: m.eval())
class IsTheSame(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if operator.is_(self.drop(y), y) else y


@left("it compares objects by identity", lambda m: m.eval())
class CountsInSet(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * len({y, self.drop(y)})


@left("it compares objects by identity")
class KeyedByTensor(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return sum(dict.fromkeys([y, F.relu(y, inplace=True)]))


@left("it asks whether a value has an attribute")
class HasAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if hasattr(x, "note") else y


@left("it asks whether a value has an attribute")
class AttributeOrDefault(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        note = getattr(x, "note", None)
        return y if note is None else y * note


@left(None)
class AttributeByName(Base):
    def forward(self, x: Tensor) -> Any:
        return self.chain(x).flatten(getattr(x, "ndim") - 3)  # noqa: B009


@left("it decides by the value of a tensor")
class NameOfClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if x.__class__.__name__ == "Tensor" else y


@left("it iterates over a tensor")
class DictionaryOfTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if "tracer" in x.__dict__ else y


class Record:
    """What a layer returns; its fields are named as those of a proxy of torch.fx."""

    def __init__(self, y: Tensor) -> None:
        self.node, self.tracer, self.root, self.attr, self.none = y * 2, y * 3, self, y * 5, None


class Records(nn.Module):
    def forward(self, x: Tensor) -> Record:
        return Record(x)


class GivesRecord(Base):
    def __init__(self) -> None:
        super().__init__()
        self.records = Records()


@left(None)
class ReadsRecord(GivesRecord):
    def forward(self, x: Tensor) -> Any:
        record = self.records(self.chain(x))
        return self.drop(record.node) + record.root.root.attr + record.root.tracer


@left("it asks whether a value is None")
class FieldIsNone(GivesRecord):
    def forward(self, x: Tensor) -> Any:
        record = self.records(self.chain(x))
        return record.node * 2 if record.none is None else record.node


# --- None, which no proxy is ----------------------------------------------------------------------


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def forward(self, x: Tensor) -> Tensor | None:
        return x * 3 if self.on else None


class HasSometimes(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux, self.absent_layer = Sometimes(), None


def off(m: Any) -> None:
    m.aux.on = False


@left("it asks whether a value is None", off)
class ResultIsNotNone(HasSometimes):
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        more = self.aux(y)
        return y + more if more is not None else y * 5


@left("it asks whether a value is None", off)
class ResultIsNone(HasSometimes):
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        more = self.aux(y)
        if more is None:
            more = y * 7
        return more


@left("it asks whether a value is None", off)
class NumberByNone(HasSometimes):
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return y * (1.0 if self.aux(y) is None else 2.0)


@left("it asks whether a value is None", off)
class MatchesNone(HasSometimes):
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        match self.aux(y):
            case None:
                return y
            case more:
                return more * 3


@left("it asks whether a value is None")
class HasGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if x.grad is None else y


@left("it asks whether a value is None", lambda m: m.requires_grad_(False))
class HasHistory(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if y.grad_fn is None else y


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class GivesPair(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()


@left("it asks whether a value is None")
class ItemIsNone(GivesPair):
    def forward(self, x: Tensor) -> Any:
        y, weights = self.pair(self.chain(x))
        return y * 2 if weights is None else y


@left(None)
class SumsInALoop(Base):
    """What is compared with None is the result of layers of torch, which is never None."""

    def __init__(self) -> None:
        super().__init__()
        parts = nn.Identity(), nn.Sequential(nn.Tanh(), nn.Identity()), nn.Conv2d(3, 3, 1)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        x, total = self.chain(x), None
        for part, z in zip(self.parts, (x, x[:], x.chunk(1)[0]), strict=True):
            y = part(z)
            total = y if total is None else total + y
        return total


@left("it asks whether a value is None", off)
class IdentityOfNone(HasSometimes):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return y if self.same(self.aux(y)) is None else y * 2


@left("it matches the type of a value")
class MatchesTuple(GivesPair):
    def forward(self, x: Tensor) -> Any:
        match self.pair(self.chain(x)):
            case (y, _):
                return y * 2
            case y:
                return self.drop(y)


@left(None, lambda m: setattr(m, "absent_layer", nn.Tanh()))
class AsksOfArgumentsAndLayers(HasSometimes):
    """What is None is known; and a result that is used must not be."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.bn(self.conv(x))
        if self.absent_layer is not None:
            x = self.absent_layer(x)
        y = self.relu(y + x)
        y = y + self.aux(y).mean()
        return y if mask is None else y * mask


# --- containers with methods of their own ---------------------------------------------------------


class FromTheEnd(nn.ModuleList):
    def __getitem__(self, i: Any) -> Any:
        return list(self._modules.values())[::-1][i]


class Seven(nn.ModuleList):
    def __len__(self) -> int:
        return 7


class Never(nn.ModuleList):
    def __bool__(self) -> bool:
        return False


class Forwards(nn.ModuleList):
    def __reversed__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values()))  # type: ignore[arg-type]


class NamesBackwards(nn.ModuleList):
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(list(super().named_children())[::-1])


class HasAll(nn.ModuleDict):
    def __contains__(self, key: str) -> bool:
        return True


def parts(container: Callable[[Any], nn.Module]) -> type[Base]:
    """Return a model with two layers in such a container."""

    class Holds(Base):
        def __init__(self) -> None:
            super().__init__()
            layers = {"0": nn.Conv2d(3, 3, 1), "1": nn.Tanh()}
            of_names = isinstance(container, type) and issubclass(container, nn.ModuleDict)
            self.parts: Any = container(layers if of_names else layers.values())

    return Holds


@left("it iterates over parts, a FromTheEnd")
class TakesItem(parts(FromTheEnd)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        return self.parts[0](self.chain(x))


@left("it iterates over parts, a Seven")
class TakesLength(parts(Seven)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        return self.chain(x) * len(self.parts)


@left("it iterates over parts, a Never")
class TakesTruth(parts(Never)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return y * 2 if self.parts else y


@left("it iterates over parts, a Forwards")
class TakesReversed(parts(Forwards)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        for part in reversed(self.parts):
            y = part(y)
        return y


@left("NamesBackwards has its own way of listing its children")
class TakesChildren(parts(NamesBackwards)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        for part in self.parts.children():
            y = part(y)
        return y


@left("it iterates over parts, a HasAll")
class TakesMembership(parts(HasAll)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return y * 2 if "b" in self.parts else y


@left("it compares layers")
class LooksIntoList(parts(nn.ModuleList)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        return y * 2 if "0" in self.parts else y


@left("it compares layers")
class KeyedByLayer(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        for layer in {self.bn: 1, self.relu: 2}:
            y = layer(y)
        return y


# --- names and constants that the rewritten code must hold ----------------------------------------


@left(None)
class NamedAsInsideTheCheck(Base):
    def forward(this, same: Tensor) -> Any:
        return this.chain(same) * this.own * getattr(this, "late", 1.0)


@left(None)
class ArgumentNamedSelf(Base):
    def forward(this, self: Tensor) -> Any:
        return this.chain(self) * this.own


class HasNames(Base):
    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Tanh() for name in self.names})

    def forward(self, x: Tensor) -> Any:
        y = self.chain(x)
        for part in self.parts.values():
            y = part(y)
        return y


@left(None)
class OddNames(HasNames):
    names = "my-key", "a b", "ä", "0"


@left("a name of a layer cannot be written in Python code")
class NameWithQuote(HasNames):
    names = ('a"b',)


@left("a name of a layer cannot be written in Python code")
class NameIsKeyword(HasNames):
    names = ("class",)


class Mode(str, enum.Enum):
    NEAREST = "nearest"


@left("it gives a member of an Enum")
class GivesEnum(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mode = Mode.NEAREST

    def forward(self, x: Tensor) -> Any:
        return F.interpolate(self.chain(x), scale_factor=2.0, mode=self.mode)


@left(None, lambda m: setattr(m, "dtype", torch.float32))
class Constants(Base):
    dtype, place = torch.float64, torch.device("cpu")
    size, layout, numbers = torch.Size([4, 75]), torch.channels_last, (float("inf"), -0.0, 2j)

    def forward(self, x: Tensor) -> Any:
        y = self.chain(x).to(self.dtype).to(self.place).contiguous(memory_format=self.layout)
        y = torch.clamp(y, max=self.numbers[0]) + self.numbers[1]
        return (y.reshape(self.size) * self.numbers[2]).real[..., 0]


@left("it has a complex number that is not finite")
class InfiniteComplex(Base):
    number = complex("inf+infj")

    def forward(self, x: Tensor) -> Any:
        return (self.chain(x) * self.number).real.isinf()
