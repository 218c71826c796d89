"""Models whose forward is a chain and then reads something, for the tests of conversion."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg

FACTOR = 1.0
SETTINGS = {"factor": 1.0}


def scaled(x: Tensor) -> Tensor:
    return x * 1.0


def other_scaled(x: Tensor) -> Tensor:
    return x * 3.0


class Base(nn.Module):
    """A chain of a norm and an activation, whose result subclasses work on."""

    factor = 1.0
    export = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.own = 1.0
        self.shape = (1, 2.0)
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0.0))
        self.register_buffer("absent", None)

    def chain(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y

    def scale(self, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 1.0


class ReadsInstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.own


class ReadsTuple(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.shape[0]


@dataclass
class Scales:
    factor: float = 1.0


@dataclass(slots=True)
class Slotted:
    factor: float = 1.0


class Config:
    """A model's settings."""

    shared = 1.0

    def __init__(self) -> None:
        self.factor, self.mode = 1.0, "double"
        self.scales, self.slotted = Scales(), Slotted()
        self.names = SimpleNamespace(factor=1.0)
        self.several = [1.0]

    @property
    def computed(self) -> float:
        return self.factor

    def scale(self) -> float:
        return self.factor


class OpenConfig(Config):
    def __getattr__(self, name: str) -> float:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1.0


class HasConfig(Base):
    made: type[Config] = Config

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = self.made()


class ReadsConfig(HasConfig):
    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        y = self.chain(x) * config.factor * config.shared * config.names.factor
        y = y * config.scales.factor * self.config.slotted.factor
        if getattr(config, "late", False):
            y = y + 1.0
        return y * 2 if config.mode == "double" else y


class ReadsConfigList(HasConfig):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.config.several[0]


class ReadsConfigProperty(HasConfig):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.config.computed


class CallsConfig(HasConfig):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.config.scale()


class AsksForConfig(HasConfig):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.config else y


class ReadsOpenConfig(HasConfig):
    made = OpenConfig

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.config.anything


class ReadsClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y.flatten(1) if self.export else y * self.factor


class ReadsDefault(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if getattr(self, "scaled", False) else y


class AsksForAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * self.late if hasattr(self, "late") else y


class ReadsChild(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * self.drop.p + 1 if self.drop.p > 0 else y


class ReadsModeOfChild(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if self.drop.training else y * 2


class ReadsGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * FACTOR


class ReadsGlobalDict(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * SETTINGS["factor"]


class CallsGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.chain(x))


class CallsBuiltin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * abs(-1)


class CallsTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(self.chain(x))


class CallsMath(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * math.sqrt(4.0)


class HasDefault(Base):
    def forward(self, x: Tensor, factor: float = 1.0, *, offset: float = 0.0) -> Tensor:
        return self.chain(x) * factor + offset


class CallsMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.chain(x))


class CallsStatic(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.static(self.chain(x))


class CallsSuper(CallsMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def factory() -> tuple[type[Base], Callable[[float], None]]:
    factor = 1.0

    class ReadsClosure(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x) * factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return ReadsClosure, change


READS_CLOSURE, change_closure = factory()


class ReadsBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) / self.temperature


class TakesNumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) / self.temperature.item()


class TakesFloat(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) / float(self.temperature)


class BranchesOnBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.flag else y


class AsksForBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if self.absent is None else y * self.absent


class AsksForParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if self.conv.bias is None else y + 1


class AsksForLayer(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if self.drop is None else self.drop(y) + 1


class AsksForClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 3 if isinstance(self.drop, nn.Identity) else self.drop(y)


class AsksForType(Base):
    def forward(self, x: Any) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.chain(torch.cat(parts, 0))


class Asserts(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(self.own > 0, "never")
        torch._assert(
            x.shape[1] == 3, f"{{3}} channels, got {x.shape[1]} of {x.shape} {x.dim():>3}"
        )
        return self.chain(x)


class MakesText(Base):
    """Its text goes elsewhere before it goes into an assertion."""

    def forward(self, x: Tensor) -> Tensor:
        text = f"{x.dim()}"
        y = self.chain(x)
        torch._assert(x.dim() > 0, f"got {text}")
        return y * 3 if text == "4" else y


class CutsText(Base):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() > 0, f"{f'{x.dim()}'[0]}")
        return self.chain(x)


class HandsTextOn(Base):
    def look(self, text: str) -> str:
        return text

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() > 0, f"{self.look(f'{x.dim()}')}{x.dim()}")
        return self.chain(x)


class HasChildren(Base):
    def __init__(self) -> None:
        super().__init__()
        parts = nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.0)
        self.parts = nn.ModuleDict({str(i): part for i, part in enumerate(parts)})


class GoesThroughChildren(HasChildren):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for part in self.parts.children():
            x = part(x)
        return x


class GoesThroughItems(HasChildren):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for _, part in self.parts.items():
            x = part(x)
        return x


class AsksForMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if self.training else y


class AsksForGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if torch.is_grad_enabled() else y * 2


class AsksForDeterminism(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if torch.are_deterministic_algorithms_enabled() else y


class AsksForDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if torch.get_default_dtype() is torch.float64 else y


class AsksForAutocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if torch.is_autocast_enabled("cpu") else y


class AsksForThreads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * torch.get_num_threads()


class AsksForExport(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if torch.onnx.is_in_onnx_export() else y


class AsksForProcesses(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if torch.distributed.is_initialized() else y


class AsksForEnvironment(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * 2 if os.environ.get("FUSEREG_TEST_SWITCH") else y


class ChainsOfOthers(Base):
    """Nothing is read; the layers change."""

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


# --- forwards that cannot be rewritten ------------------------------------------------------------


class CountsInBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.chain(x)


class AddsToBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        steps = self.steps
        steps += 1
        return self.chain(x)


class AveragesInBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        self.steps.mul_(0.9).add_(y.mean().detach())
        return y


class InitializesItself(Base):
    """ActNorm's way: the first batch sets the scale."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        if self.steps == 0:
            self.steps.fill_(1)
            self.temperature.copy_(y.std().detach())
        return y / self.temperature


class DrawsItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y + torch.zeros_like(y).uniform_() * 0


class DrawsFromTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * (1 + 0 * torch.bernoulli(x.sigmoid()))


class DrawsFromPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if random.random() < 2 else -y


class TakesSeveral(Base):
    def forward(self, x: Any) -> Tensor:
        return self.chain(x if torch.is_tensor(x) else torch.cat(x, 1))


class SetsItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.own += 1.0
        return self.chain(x)


class CatchesErrors(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        try:
            return y * float(self.temperature)
        except TypeError:
            return y * 5.0


class WritesText(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y * len(f"{self.temperature.item()}")


class ComparesObjects(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.chain(x))
        return y * 2 if self.drop(y) is y else y


class HasProperty(Base):
    @property
    def twice(self) -> float:
        return self.own * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.twice


#: A model whose forward cannot be rewritten, and the beginning of the reason.
LEFT: list[tuple[type[Base], str]] = [
    (CountsInBuffer, "it changes steps in place"),
    (AddsToBuffer, "it changes steps in place"),
    (AveragesInBuffer, "it changes steps in place"),
    (InitializesItself, "it decides by the value of a tensor"),
    (DrawsItself, "it calls uniform_, which draws random numbers"),
    (DrawsFromTorch, "it uses bernoulli, which may depend on more than its arguments"),
    (DrawsFromPython, "it uses random, which may depend on more than its arguments"),
    (TakesSeveral, "it uses is_tensor, which may depend on more than its arguments"),
    (SetsItself, "it sets an attribute"),
    (CatchesErrors, "it has a with or try statement"),
    (WritesText, "it takes a number or text out of a tensor"),
    (ComparesObjects, "it compares objects by identity"),
    (HasProperty, "it reads self.twice, a property; set an attribute in __init__"),
    (ReadsConfigList, "it reads self.config.several, a list, which may change unseen"),
    (ReadsConfigProperty, "it uses self.config.computed, a property; make it a plain value"),
    (CallsConfig, "it uses self.config.scale, a function"),
    (AsksForConfig, "it asks whether an object is true"),
    (ReadsOpenConfig, "it reads self.config, a OpenConfig, which may change unseen"),
    (READS_CLOSURE, "it reads factor of the function around it; make it an attribute"),
    (TakesFloat, "it takes a number or text out of a tensor"),
    (ReadsModeOfChild, "it reads self.drop.training, the mode of another layer"),
    (ReadsGlobalDict, "it reads SETTINGS, a dict, which may change unseen; make it a tuple"),
    (BranchesOnBuffer, "it decides by the value of a tensor"),
    (AsksForGradients, "it uses is_grad_enabled"),
    (AsksForDeterminism, "it uses are_deterministic_algorithms_enabled"),
    (AsksForDtype, "it compares objects by identity"),
    (AsksForAutocast, "it uses is_autocast_enabled"),
    (AsksForThreads, "it uses get_num_threads"),
    (AsksForExport, "it uses "),  # torch.onnx, or its function if something has imported it
    (AsksForProcesses, "it uses is_initialized"),
    (AsksForEnvironment, "it reads environ"),
]


def other_scaled_method(self: Any, x: Tensor) -> Tensor:
    return x * 3.0


def twins_of(cls: type[Base]) -> tuple[Base, Base]:
    torch.manual_seed(3)
    plain = cls()
    return plain, fusereg.convert(copy.deepcopy(plain))


def agree(plain: nn.Module, converted: Callable[..., Tensor]) -> Tensor:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float32)
    wanted = plain(x)
    tolerance = 1e-4 if not torch.is_autocast_enabled("cpu") else 0.1
    torch.testing.assert_close(converted(x), wanted, rtol=tolerance, atol=tolerance)
    return wanted
