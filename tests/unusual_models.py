"""Models whose forward reads something in an unusual way, each with a change of what it reads."""

from __future__ import annotations

import contextvars
import dataclasses
import enum
import functools
import types
from collections import ChainMap, OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hostile_models import Doubled, Plain

FLAG = True
LIMITS = [1.0]
FACTOR = contextvars.ContextVar("FACTOR", default=1.0)
NAMES = types.SimpleNamespace(factor=1.0)

#: A maker of a model -> what is changed after conversion.
CASES: dict[Callable[[], nn.Module], Callable[[Any], object]] = {}


def changed_by(change: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Add a class of models and its change to the cases."""

    def add(make: Any) -> Any:
        CASES[make] = change
        return make

    return add


def set_global(name: str, value: object) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        globals()[name] = value

    return change


def sets(name: str, value: object) -> Callable[[Any], None]:
    """Set an attribute of the object that a path leads to."""

    def change(m: Any) -> None:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, m), last, value)

    return change


def on_class(name: str, value: object) -> Callable[[Any], None]:
    return lambda m: setattr(getattr(type(m), "fusereg_original", type(m)), name, value)


# --- attributes and descriptors -------------------------------------------------------------------


class Descriptor:
    value = 1.0

    def __get__(self, instance: Any, owner: Any = None) -> float:
        return self.value


class Stored:
    """A descriptor that keeps its values beside the object."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self.kept: list[Any] = []  # so that no other object gets an id

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.values.get(id(instance), 1.0)

    def __set__(self, instance: Any, value: float) -> None:
        self.values[id(instance)] = value
        self.kept.append(instance)


@changed_by(lambda m: setattr(Descriptor, "value", 3.0))
class NonDataDescriptor(Plain):
    factor = Descriptor()

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.factor


@changed_by(sets("factor", 3.0))
class DataDescriptor(Plain):
    factor = Stored()

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.factor


@changed_by(sets("base", 3.0))
class Cached(Plain):
    base = 1.0

    @functools.cached_property
    def factor(self) -> float:
        return self.base

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.factor


@changed_by(on_class("factor", 3.0))
class ClassAttribute(Plain):
    factor: ClassVar[float] = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * type(self).factor


@changed_by(on_class("factor", 3.0))
class OfNamedClass(Plain):
    factor: ClassVar[float] = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * OfNamedClass.factor


@changed_by(on_class("factor", 3.0))
class ClassMethod(Plain):
    factor: ClassVar[float] = 1.0

    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return x * cls.factor

    def forward(self, x: Tensor) -> Any:
        return self.scaled(self.second(self.first(x)))


@changed_by(lambda m: m.__dict__.update(factor=3.0))
class OwnDictionary(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.__dict__.get("factor", 1.0)


@changed_by(lambda m: m.__dict__.update(factor=3.0))
class Vars(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * vars(self).get("factor", 1.0)


# --- outside of the object ------------------------------------------------------------------------


@changed_by(set_global("FLAG", False))
class ModuleFlag(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y) if FLAG else y


@changed_by(lambda m: LIMITS.__setitem__(0, 3.0))
class MutableDefault(Plain):
    def forward(self, x: Tensor, limits: Any = LIMITS) -> Any:
        return self.second(self.first(x)) * limits[0]


@changed_by(lambda m: FACTOR.set(3.0))
class ContextVariable(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * FACTOR.get()


@changed_by(sets("names.factor", 3.0))
class SharedNamespace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.names = types.SimpleNamespace(factor=1.0, inner=types.SimpleNamespace(on=True))

    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x)) * self.names.factor
        return y + 1 if self.names.inner.on else y


def counting() -> tuple[type[Plain], Callable[[Any], None]]:
    count = 0.0

    class Counting(Plain):
        def forward(self, x: Tensor) -> Any:
            nonlocal count
            count += 1.0
            return self.second(self.first(x)) + 0.0

    class Nonlocal(Plain):
        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x)) * (1.0 if count < 100 else 3.0)

    def change(m: Any) -> None:
        nonlocal count
        count = 100.0

    CASES[Counting] = lambda m: None
    return Nonlocal, change


NONLOCAL, _change = counting()
CASES[NONLOCAL] = _change


@changed_by(sets("scaled", functools.partial(torch.mul, other=3.0)))
class HoldsPartial(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scaled: Any = functools.partial(torch.mul, other=1.0)

    def forward(self, x: Tensor) -> Any:
        return self.scaled(self.second(self.first(x)))


@functools.lru_cache
def _factor(n: int) -> float:
    return LIMITS[0] * n


@changed_by(lambda m: (LIMITS.__setitem__(0, 3.0), _factor.cache_clear()))
class LruCache(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * _factor(1)


# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    factor: float = 1.0
    steps: tuple[int, ...] = (1, 2)
    more: Any = None

    @property
    def double(self) -> float:
        return 2 * self.factor


class Point(NamedTuple):
    x: float = 1.0
    y: float = 2.0


Pair_ = namedtuple("Pair_", "a b")


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Word(str, enum.Enum):
    ONE = "one"
    TWO = "two"


class Smart(enum.Enum):
    ONE = 1

    @property
    def factor(self) -> float:
        return LIMITS[0]


class WithSettings(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.settings, self.kind, self.word, self.smart = Settings(), Kind.ONE, Word.ONE, Smart.ONE
        self.point, self.pair = Point(), Pair_(1.0, 2.0)
        self.order = OrderedDict(a=1.0)
        self.chain_map: Any = ChainMap({"a": 1.0})


@changed_by(sets("settings.factor", 3.0))
class DataclassField(WithSettings):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.settings.factor


@changed_by(sets("settings.factor", 3.0))
class DataclassProperty(WithSettings):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.settings.double


@changed_by(sets("settings", Settings(3.0)))
class DataclassReplaced(WithSettings):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * dataclasses.asdict(self.settings)["factor"]


@changed_by(sets("settings.steps", (1, 2, 3)))
class DataclassTuple(WithSettings):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(sum((y * n for n in self.settings.steps), y))


@changed_by(sets("kind", Kind.TWO))
class EnumByValue(WithSettings):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y) * self.kind.value if self.kind == Kind.ONE else y * 3


@changed_by(sets("kind", Kind.TWO))
class EnumByIdentity(WithSettings):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y) if self.kind is Kind.ONE else y * 3


@changed_by(sets("word", Word.TWO))
class EnumByText(WithSettings):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y) if self.word == "one" else y * 3


@changed_by(lambda m: LIMITS.__setitem__(0, 3.0))
class EnumProperty(WithSettings):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.smart.factor


@changed_by(sets("kind", Kind.TWO))
class MatchStatement(WithSettings):
    def forward(self, x: Tensor) -> Any:
        match self.kind:
            case Kind.ONE:
                return self.second(self.first(x))
            case _:
                return self.first(x)


@changed_by(sets("point", Point(3.0)))
class NamedTuples(WithSettings):
    def forward(self, x: Tensor) -> Any:
        a, _ = self.pair
        return self.second(self.first(x)) * self.point.x * a


@changed_by(lambda m: m.order.update(a=3.0))
class OrderedSettings(WithSettings):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * sum(self.order.values()) * self.chain_map["a"]


# --- statements -----------------------------------------------------------------------------------


@changed_by(sets("times", 3))
class WalrusAndComprehension(Plain):
    times = 1

    def forward(self, x: Tensor) -> Any:
        parts = [z for i in range(self.times) if (z := self.first(x) * (i + 1)) is not None]
        return self.second(sum(parts[1:], parts[0]))


@changed_by(sets("fails", True))
class TriesAndCleansUp(Plain):
    fails = False

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        try:
            if self.fails:
                raise KeyError
            y = self.second(y)
        except KeyError:
            y = y * 3
        finally:
            y = y + 1
        return y


@changed_by(sets("times", 3))
class GeneratorExpression(Plain):
    times = 1

    def parts(self, y: Tensor) -> Iterator[Tensor]:
        yield from (y * (i + 1) for i in range(self.times))

    def forward(self, x: Tensor) -> Any:
        return self.second(sum(self.parts(self.first(x))))  # type: ignore[arg-type]


@changed_by(sets("factor", 3.0))
class StarArguments(Plain):
    factor = 1.0

    def helper(self, *parts: Tensor, scale: float, **more: float) -> Tensor:
        return sum(parts, parts[0]) * scale * more.get("extra", 1.0)

    def forward(self, x: Tensor) -> Any:
        parts = (self.first(x),) * 2
        return self.second(self.helper(*parts, scale=self.factor, extra=2.0))


@changed_by(sets("factor", 3.0))
class Deletes(Plain):
    factor = 1.0

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        del x
        z = self.second(y)
        del y
        return z * self.factor


@changed_by(sets("training", False))
class ReadsModeTwice(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x) * (1 if self.training else 2)
        return self.second(y) + (1 if self.training else 2)


@changed_by(lambda m: m.bn.eval())
class ReadsModeOfNorm(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y) * (2 if self.bn.training else 3)


@changed_by(sets("names", ("conv", "bn")))
class ReadsByName(Plain):
    names: tuple[str, ...] = ("conv", "bn", "relu")

    def forward(self, x: Tensor) -> Any:
        for name in self.names:
            x = getattr(self, name)(x)
        return self.second(x)


@changed_by(sets("format", "{}"))
class FormatsText(Plain):
    format = "{}{}"

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * len(self.format.format(1, 2))


@changed_by(lambda m: None)
class ReadsGradMode(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x))
        return y if torch.is_grad_enabled() else y * 3


# --- tensors --------------------------------------------------------------------------------------


@changed_by(lambda m: None)
class ViewInPlace(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        y[:, 0] += 1.0
        y.view(-1)[::2].mul_(2.0)
        return self.second(self.relu(y))


@changed_by(lambda m: None)
class WritesIntoInputOfNorm(Plain):
    def forward(self, x: Tensor) -> Any:
        c = self.conv(x)
        y = self.bn(c)
        c.data.mul_(0.5)
        return self.second(self.relu(y) + c)


@changed_by(lambda m: None)
class Detaches(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.second(self.relu(y)) + y.detach()


@changed_by(lambda m: None)
class HookOnTensor(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return self.second(self.relu(y))


@changed_by(lambda m: m.scale.fill_(3.0))
class ReadsBufferAsNumber(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * self.scale.item() + self.scale.tolist()


@changed_by(lambda m: None)
class AutocastInside(Plain):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = self.first(x)
        return self.second(y)


@changed_by(lambda m: None)
class Checkpoints(Plain):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.second, self.first(x), use_reentrant=False)


@changed_by(lambda m: None)
class VmapInside(Plain):
    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x))
        return torch.func.vmap(torch.tanh)(y)


# --- layers ---------------------------------------------------------------------------------------


@changed_by(lambda m: setattr(m, "shared", nn.BatchNorm2d(4, affine=False).double()))
class TiedAndShared(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again, self.shared = nn.Conv2d(4, 4, 1), self.bn2
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.bn2(self.head(self.first(x))))
        return self.relu(self.shared(self.again(y)) + y)


@changed_by(lambda m: m.steps.append(nn.Tanh()))
class SlicesOfList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([self.conv, self.bn, self.relu, nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Any:
        for step in self.steps[:2]:
            x = step(x)
        for step in self.steps[2:]:
            x = step(x)
        return self.second(x)


@changed_by(lambda m: setattr(m, "forward", lambda x: m.first(x) * 3))
class ForwardOnInstance(Plain):
    pass


@changed_by(lambda m: setattr(m, "part", "second"))
class CalledTwice(Plain):
    part = "first"

    def forward(self, x: Tensor) -> Any:
        a, b = self.bn(self.conv(x)), self.bn(self.conv(x * 2))
        y = self.relu(a + b)
        return y if self.part == "first" else self.second(y)


@changed_by(lambda m: m.bn.register_forward_hook(lambda *a, **k: a[-1] * 3, with_kwargs=True))
class HookWithKeywords(Plain):
    pass


@changed_by(lambda m: parametrize.register_parametrization(m.conv, "weight", Doubled()))
class LaterParametrized(Plain):
    pass


@changed_by(lambda m: parametrize.register_parametrization(m.bn, "weight", Doubled()))
class LaterParametrizedNorm(Plain):
    pass


@changed_by(
    lambda m: m.register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True)
)
class PreHookOfModel(Plain):
    pass


@changed_by(lambda m: m.relu.__dict__.update(forward=lambda x: x * 3))
class ActivationReplaced(Plain):
    pass


@changed_by(lambda m: setattr(m.relu, "__class__", nn.Tanh))
class ActivationOfOtherClass(Plain):
    pass


@changed_by(lambda m: setattr(m.bn, "__class__", nn.InstanceNorm2d))
class NormOfOtherClass(Plain):
    pass


@changed_by(lambda m: delattr(m, "drop"))
class LayerDeleted(Plain):
    def first(self, x: Tensor) -> Any:
        y = self.relu(self.bn(self.conv(x)))
        return self.drop(y) if hasattr(self, "drop") else y * 3


@changed_by(lambda m: m.__class__.__call__ is None)
class CallOverridden(Plain):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


@changed_by(lambda m: None)
class KeywordOnly(Plain):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        return self.second(self.first(x)) * scale


@changed_by(lambda m: None)
class PositionOnly(Plain):
    def forward(self, x: Tensor, /, scale: float = 1.0) -> Any:
        return F.relu(self.second(self.first(x)) * scale)
