"""Models that do what nn.Module's authors did not think of, for conversion, folding and syncing."""

from __future__ import annotations

import abc
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

WIDTH = 4
SCALE = 1.5
T = TypeVar("T")


class Plain(nn.Module):
    """Two chains, each behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.head, self.bn2 = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.0)

    def first(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.relu(self.bn(self.conv(x))))
        return y

    def second(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn2(self.head(x)))
        return y

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


# --- attributes -----------------------------------------------------------------------------------


class PropertyOfLayer(Plain):
    @property
    def norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.norm(self.conv(x))))


class PropertyOfMode(Plain):
    @property
    def scale(self) -> float:
        return 2.0 if self.training else 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.scale


class RaisingProperty(Plain):
    @property
    def never(self) -> float:
        raise RuntimeError("never")


class OwnGetattr(Plain):
    def __getattr__(self, name: str) -> Any:
        return self.bn if name == "norm" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.norm(self.conv(x))))


class Delegates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.relu(self.bn(self.conv(x))))


class Frozen(Plain):
    """Takes no attribute after its construction but the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["done"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "done" in self.__dict__ and name != "training":
            raise RuntimeError(f"{name} is set")
        super().__setattr__(name, value)


class Slots(Plain):
    __slots__ = ("extra",)


class OverridesQueries(Plain):
    def get_submodule(self, target: str) -> nn.Module:
        raise RuntimeError(target)


class NotEqual(Plain):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = object.__hash__


class Empty(Plain):
    def __len__(self) -> int:
        return 0


class AsksWhetherEmpty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.bn, self.relu = Empty(), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.bn(x))
        return self.part(x) if self.part else x


# --- classes --------------------------------------------------------------------------------------

#: Classes that list their subclasses add them here.
LISTED: list[type] = []


class ListsSubclasses(Plain):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        LISTED.append(cls)


class Listed(ListsSubclasses):
    pass


class Meta(type):
    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        LISTED.append(cls)


class OfMeta(Plain, metaclass=Meta):
    pass


class Abstract(Plain, abc.ABC):
    @abc.abstractmethod
    def more(self) -> int: ...


class Concrete(Abstract):
    def more(self) -> int:
        return 1


class OfType(Plain, Generic[T]):
    pass


@dataclasses.dataclass(eq=False)
class Dataclass(nn.Module):
    width: int = WIDTH
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, self.width, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y * self.scale


# --- forwards and calls ---------------------------------------------------------------------------


class DefaultFromGlobal(Plain):
    def forward(self, x: Tensor, scale: float = SCALE, *, bias: Tensor | None = None) -> Tensor:
        y = self.second(self.first(x)) * scale
        return y if bias is None else y + bias


class TakesAny(Plain):
    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return self.second(self.first(args[0]))


class LambdaForward(Plain):
    forward = lambda self, x: self.second(self.first(x))  # noqa: E731


class Callable_:
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, module: Any, x: Tensor) -> Any:
        return module.second(module.first(x))


class ObjectForward(Plain):
    forward = Callable_()


class PartialForward(Plain):
    def scaled(self, factor: float, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * factor

    forward = functools.partialmethod(scaled, 2.0)


class OwnCall(Plain):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + 1


class NormWithCall(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 3


class ConvWithCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 3


class Generates(Plain):
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.first(x)
        yield x
        yield self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        for y in self.steps(x):
            x = y
        return x


class WithoutGradient(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return self.second(y)


class DecoratedPart(Plain):
    @torch.no_grad()
    def part(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.part(x))


class SetsDefaultDtype(Plain):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            y = self.first(x) * torch.tensor(1.5)
        finally:
            torch.set_default_dtype(before)
        return self.second(y.to(x.dtype))


class Matches(Plain):
    mode = "one"

    def forward(self, x: Tensor) -> Tensor:
        return sum([(y := self.first(x)), y * 2], 0.0) if self.mode == "one" else x  # type: ignore[return-value]


class Checkpointed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class TupleAndDict(Plain):
    def both(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        y = self.bn(self.conv(x))
        return {"y": (self.relu(y), y)}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x)["y"]
        return self.second(a * 2 + b)


# --- memory and buffers ---------------------------------------------------------------------------


class InPlaceOnOutput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y.mul_(2)
        z: Tensor = self.relu(y)
        z += 1
        return z


class InPlaceOnInput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        y = self.bn(c)
        if not self.training:
            c.add_(1.0)
        z: Tensor = self.relu(y) + c
        return z


class InPlaceOnView(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if not self.training:
            y[:, :1].zero_()
        z: Tensor = self.relu(y)
        return z


class ReadsStatistics(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        mean = self.bn.running_mean.clone()
        z = F.relu(y, inplace=True).type_as(x) * (self.bn.num_batches_tracked.float() + 1)
        return z + mean.view(1, -1, 1, 1)


# --- layers ---------------------------------------------------------------------------------------


class SharedNorm(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        z: Tensor = self.relu(self.bn(self.head(y))) + y
        return z


class HeldInLists(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.more = [self.conv, self.bn, self.relu], (self.head, {"norm": self.bn2})

    def forward(self, x: Tensor) -> Any:
        for part in self.parts:
            x = part(x)
        head, norms = self.more
        return self.relu(norms["norm"](head(x)))  # type: ignore[index, operator]


class HeldWeakly(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["norm"] = weakref.ref(self.bn)

    def __deepcopy__(self, memo: Any) -> HeldWeakly:
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied.to(self.conv.weight.dtype).train(self.training)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.relu(self.__dict__["norm"]()(self.conv(x))))


class Chooses(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(WIDTH), "b": nn.BatchNorm2d(WIDTH)})
        self.parts = nn.ModuleList([self.head, nn.BatchNorm2d(WIDTH), nn.ReLU()])
        self.key = "a"

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.norms[self.key](self.conv(x)))
        return self.parts[-1](self.parts[-2](self.parts[0](x)))


class Backwards(nn.Sequential):
    def forward(self, input: Tensor) -> Any:
        for part in reversed(self):
            input = part(input)
        return input


class IteratesBackwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[::-1])  # type: ignore[arg-type]


class KeepsNormFrozen(Plain):
    def train(self, mode: bool = True) -> KeepsNormFrozen:
        super().train(mode)
        self.bn.eval()
        return self


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class OwnParameter(nn.Parameter):
    pass


def hooked(register: str, hook: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        m = Plain()
        getattr(m.bn, register)(hook)
        return m

    make.__name__ = register
    return make


def _scaled_gradients(module: nn.Module, of_input: Any, of_output: Any) -> Any:
    return tuple(None if g is None else g * 2 for g in of_input)


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    """Return a maker of a plain model with a change; its name is the change's."""

    @functools.wraps(change)
    def make() -> nn.Module:
        m = Plain()
        change(m)
        return m

    return make


@changed
def weight_norm(m: Any) -> None:
    parametrizations.weight_norm(m.conv)


@changed
def parametrized_norm(m: Any) -> None:
    parametrize.register_parametrization(m.bn, "weight", Doubled())


@changed
def norm_with_call(m: Any) -> None:
    m.bn = NormWithCall(WIDTH)


@changed
def convolution_with_call(m: Any) -> None:
    m.conv = ConvWithCall(3, WIDTH, 3, padding=1)


@changed
def own_parameter(m: Any) -> None:
    m.bn.weight = OwnParameter(torch.rand(WIDTH))


@changed
def odd_settings(m: Any) -> None:
    m.bn.momentum, m.bn2.eps, m.bn2.track_running_stats = None, 1e-3, False


@changed
def tied_norms(m: Any) -> None:
    m.bn2.weight, m.bn2.running_mean = m.bn.weight, m.bn.running_mean


def lazy() -> nn.Module:
    m = nn.Sequential(nn.LazyConv2d(WIDTH, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Dropout(0.0))
    m(torch.randn(2, 3, 8, 8))
    return m


def data_parallel() -> nn.Module:
    return nn.DataParallel(Plain())


def own_call_inside() -> nn.Module:
    return nn.Sequential(OwnCall(), nn.BatchNorm2d(WIDTH), nn.ReLU())


def backwards() -> nn.Module:
    return Backwards(nn.ReLU(), nn.BatchNorm2d(WIDTH), nn.Conv2d(3, WIDTH, 1))


def iterates_backwards() -> nn.Module:
    return IteratesBackwards(nn.ReLU(), nn.BatchNorm2d(WIDTH), nn.Conv2d(3, WIDTH, 1))


def without_parameters() -> nn.Module:
    norms = nn.BatchNorm2d(WIDTH, affine=False), nn.BatchNorm2d(WIDTH, track_running_stats=False)
    first = nn.Sequential(nn.Conv2d(3, WIDTH, 1), norms[0], nn.ReLU(inplace=True))
    return nn.Sequential(first, nn.Conv2d(WIDTH, WIDTH, 1), norms[1], nn.Dropout2d(0.0))


def scripted_part() -> nn.Module:
    part = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
    return nn.Sequential(Plain(), torch.jit.script(part), nn.BatchNorm2d(WIDTH), nn.ReLU())


def traced_part() -> nn.Module:
    part = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    return nn.Sequential(torch.jit.trace(part, torch.randn(2, 3, 4, 4)), Plain())


MODELS: list[Callable[[], nn.Module]] = [
    *(PropertyOfLayer, PropertyOfMode, RaisingProperty, OwnGetattr, Delegates, Frozen, Slots),
    *(OverridesQueries, NotEqual, AsksWhetherEmpty, Listed, OfMeta, Concrete, OfType, Dataclass),
    *(DefaultFromGlobal, TakesAny, LambdaForward, ObjectForward, PartialForward, OwnCall),
    *(Generates, WithoutGradient, DecoratedPart, SetsDefaultDtype, Matches, Checkpointed),
    *(TupleAndDict, InPlaceOnOutput, InPlaceOnInput, InPlaceOnView, ReadsStatistics, SharedNorm),
    *(HeldInLists, HeldWeakly, Chooses, KeepsNormFrozen, weight_norm, parametrized_norm),
    *(norm_with_call, convolution_with_call, own_parameter, odd_settings, tied_norms, lazy),
    *(data_parallel, own_call_inside, backwards, iterates_backwards, without_parameters),
    *(scripted_part, traced_part),
    hooked("register_forward_hook", lambda module, args, y: y * 2),
    hooked("register_forward_pre_hook", lambda module, args: (args[0] - 0.1,)),
    hooked("register_full_backward_hook", _scaled_gradients),
    hooked("register_full_backward_pre_hook", lambda module, grads: (grads[0] * 2,)),
]
