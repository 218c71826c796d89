"""A converted model computes what its own code says, whatever changes after the conversion.

A forward can read a value from many places. Each of them is changed after the conversion here, and
the result must be that of the model that was not converted, whether or not it was rewritten.
"""

from __future__ import annotations

import copy
import cProfile
import math
import os
import pstats
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from plain_models import MODELS, BasicBlock, Calls, Maker, images, stir, watched_calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return watched_calls(monkeypatch)


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


def set_attribute(name: str, value: object) -> Callable[[Any], None]:
    """Return a change that sets an attribute of the model, or of a layer."""

    def change(m: Any) -> None:
        *path, last = name.split(".")
        setattr(m.get_submodule(".".join(path)), last, value)

    return change


class ReadsInstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.own


class ReadsTuple(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.shape[0]


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


def unset(name: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        *path, last = name.split(".")
        setattr(m.get_submodule(".".join(path)), last, None)

    return change


def fill(name: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        getattr(m, name).fill_(3.0)

    return change


def instance_method(m: Any) -> None:
    m.scale = lambda x: x * 4.0


def own_forward(m: Any) -> None:
    m.forward = lambda x: x * 4.0


def child_forward(m: Any) -> None:
    m.relu.forward = lambda x: x * 4.0


def hook(m: Any) -> None:
    m.relu.register_forward_hook(lambda module, args, out: out * 4.0)


def pre_hook(m: Any) -> None:
    m.bn.register_forward_pre_hook(lambda module, args: (args[0] * 4.0,))


def own_hook(m: Any) -> None:
    m.register_forward_hook(lambda module, args, out: out * 4.0)


def loaded(m: Any) -> None:
    state = m.state_dict()
    m.load_state_dict({**state, "temperature": torch.tensor(5.0), "flag": torch.tensor(True)})


def frozen(m: Any) -> None:
    m.bn.eval()


def new_layer(m: Any) -> None:
    m.relu = nn.Tanh()


#: A model, and a change of this model after the conversion.
OF_MODELS: list[tuple[type[Base], Callable[[Any], None]]] = [
    (ReadsInstance, set_attribute("own", 3.0)),
    (ReadsInstance, set_attribute("own", 1)),
    (ReadsInstance, set_attribute("own", torch.tensor(3.0))),
    (ReadsTuple, set_attribute("shape", (3, 2.0))),
    (ReadsClass, set_attribute("export", True)),
    (ReadsClass, set_attribute("factor", 3.0)),
    (ReadsDefault, set_attribute("scaled", True)),
    (AsksForAttribute, set_attribute("late", 3.0)),
    (ReadsChild, set_attribute("drop.p", 0.9)),
    (ReadsModeOfChild, lambda m: m.drop.eval()),
    (ReadsBuffer, fill("temperature")),
    (ReadsBuffer, set_attribute("temperature", torch.tensor(2.0))),
    (TakesNumber, fill("temperature")),
    (TakesNumber, loaded),
    (TakesFloat, fill("temperature")),
    (TakesFloat, loaded),
    (BranchesOnBuffer, loaded),
    (AsksForBuffer, set_attribute("absent", torch.tensor(3.0))),
    (AsksForParameter, unset("conv.bias")),
    (AsksForLayer, unset("drop")),
    (AsksForMode, lambda m: m.eval()),
    (CallsMethod, instance_method),
    (CallsMethod, own_forward),
    (ChainsOfOthers, own_forward),
    (ChainsOfOthers, child_forward),
    (ChainsOfOthers, hook),
    (ChainsOfOthers, pre_hook),
    (ChainsOfOthers, own_hook),
    (ChainsOfOthers, frozen),
    (ChainsOfOthers, new_layer),
]

Undo = Callable[[], Any]


def patched(owner: Any, name: str, value: Any) -> Callable[[], Undo]:
    """Return a change of something that all models share, which returns how to undo it."""

    def change() -> Undo:
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, value, raising=False)
        return patch.undo

    return change


def closure() -> Undo:
    change_closure(3.0)
    return lambda: change_closure(1.0)


def environment() -> Undo:
    os.environ["FUSEREG_TEST_SWITCH"] = "1"
    return lambda: os.environ.pop("FUSEREG_TEST_SWITCH")


def setting() -> Undo:
    SETTINGS["factor"] = 3.0
    return lambda: SETTINGS.update(factor=1.0)


def no_gradients() -> Undo:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    return lambda: torch.set_grad_enabled(before)


def deterministic() -> Undo:
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def default_dtype() -> Undo:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def threads() -> Undo:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    return lambda: torch.set_num_threads(before)


def autocast() -> Undo:
    context = torch.autocast("cpu", torch.bfloat16)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def default_of_keyword() -> Undo:
    HasDefault.forward.__kwdefaults__["offset"] = 3.0  # type: ignore[index]
    return lambda: HasDefault.forward.__kwdefaults__.update(offset=0.0)  # type: ignore[union-attr]


def new_code() -> Undo:
    before = Base.scale.__code__
    Base.scale.__code__ = other_scaled_method.__code__
    return lambda: setattr(Base.scale, "__code__", before)


def other_scaled_method(self: Any, x: Tensor) -> Tensor:
    return x * 3.0


HERE = sys.modules[__name__]

#: A model, and a change of what it shares with others.
OF_SHARED: list[tuple[type[Base], Callable[[], Undo]]] = [
    (ReadsClass, patched(ReadsClass, "export", True)),
    (ReadsClass, patched(Base, "factor", 3.0)),
    (ReadsDefault, patched(ReadsDefault, "scaled", True)),
    (ReadsGlobal, patched(HERE, "FACTOR", 3.0)),
    (ReadsGlobalDict, setting),
    (CallsGlobal, patched(HERE, "scaled", other_scaled)),
    (CallsGlobal, patched(scaled, "__code__", other_scaled.__code__)),
    (CallsBuiltin, patched(HERE, "abs", lambda x: 3.0)),
    (CallsTorch, patched(F, "softsign", other_scaled)),
    (CallsTorch, patched(HERE, "F", types.SimpleNamespace(softsign=other_scaled))),
    (CallsMath, patched(math, "sqrt", lambda x: 3.0)),
    (HasDefault, patched(HasDefault.forward, "__defaults__", (3.0,))),
    (HasDefault, default_of_keyword),
    (CallsMethod, patched(Base, "scale", other_scaled_method)),
    (CallsMethod, patched(CallsMethod, "scale", other_scaled_method)),
    (CallsMethod, new_code),
    (CallsMethod, patched(CallsMethod, "forward", other_scaled_method)),
    (CallsStatic, patched(CallsStatic, "static", staticmethod(other_scaled))),
    (CallsSuper, patched(CallsMethod, "forward", other_scaled_method)),
    (ChainsOfOthers, patched(nn.ReLU, "forward", other_scaled_method)),
    (READS_CLOSURE, closure),
    (AsksForGradients, no_gradients),
    (AsksForDeterminism, deterministic),
    (AsksForDtype, default_dtype),
    (AsksForAutocast, autocast),
    (AsksForThreads, threads),
    (AsksForExport, patched(torch.onnx, "is_in_onnx_export", lambda: True)),
    (AsksForProcesses, patched(torch.distributed, "is_initialized", lambda: True)),
    (AsksForEnvironment, environment),
]


def names(cases: list[tuple[Any, Any]]) -> list[str]:
    return [f"{cls.__name__}-{getattr(change, '__name__', 'change')}" for cls, change in cases]


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


def test_most_of_these_models_are_rewritten() -> None:
    """Otherwise the tests below would show nothing."""
    classes = {cls for cls, _ in [*OF_MODELS, *OF_SHARED]}
    left = {cls for cls in classes if not hasattr(twins_of(cls)[1], "fusereg_plans")}
    assert left == {
        READS_CLOSURE, ReadsModeOfChild, ReadsGlobalDict, TakesFloat, BranchesOnBuffer,
        AsksForGradients, AsksForDeterminism, AsksForDtype, AsksForAutocast, AsksForThreads,
        AsksForExport, AsksForProcesses, AsksForEnvironment,
    }  # fmt: skip


@pytest.mark.parametrize(("cls", "change"), OF_MODELS, ids=names(OF_MODELS))
def test_a_change_of_the_model_is_seen(cls: type[Base], change: Callable[[Any], None]) -> None:
    plain, converted = twins_of(cls)
    agree(plain, converted)
    for m in (plain, converted):
        change(m)
    agree(plain, converted)
    fusereg.revert(converted)
    agree(plain, converted)


@pytest.mark.parametrize(("cls", "change"), OF_SHARED, ids=names(OF_SHARED))
def test_a_change_of_what_models_share_is_seen(cls: type[Base], change: Callable[[], Undo]) -> None:
    plain, converted = twins_of(cls)
    before = agree(plain, converted)
    undo = change()
    try:
        agree(plain, converted)
    finally:
        undo()
    assert agree(plain, converted).dtype is before.dtype


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def guarded() -> Iterator[None]:
    """Make Dynamo see hooks that are added later, which it does not by default."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("cls", "change"), OF_MODELS, ids=names(OF_MODELS))
def test_a_change_of_the_model_is_seen_by_compiled_code(
    cls: type[Base], change: Callable[[Any], None]
) -> None:
    plain, converted = twins_of(cls)
    compiled = torch.compile(converted, backend="eager")
    agree(plain, compiled)
    for m in (plain, converted):
        change(m)
    agree(plain, compiled)


@pytest.mark.slow
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("cls", "change"), OF_SHARED, ids=names(OF_SHARED))
def test_a_change_of_what_models_share_is_seen_by_compiled_code(
    cls: type[Base], change: Callable[[], Undo]
) -> None:
    plain, converted = twins_of(cls)
    compiled, reference = (
        torch.compile(m, backend="eager") for m in (converted, copy.deepcopy(plain))
    )
    agree(plain, compiled)
    agree(plain, reference)
    undo = change()
    try:
        try:
            agree(plain, reference)
        except AssertionError:
            pytest.skip("Dynamo does not see it in the original model either")
        agree(plain, compiled)
    finally:
        undo()
    agree(plain, compiled)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "cls", [ReadsClass, ReadsGlobal, CallsGlobal, CallsBuiltin, ChainsOfOthers]
)
def test_compiled_code_has_the_chain_and_no_break(cls: type[Base], calls: Calls) -> None:
    converted = twins_of(cls)[1]
    torch.compile(converted, backend="eager", fullgraph=True)(torch.randn(4, 3, 5, 5))
    assert ("relu", False, 0.0) in calls


# --- the conversion changes classes and nothing else ----------------------------------------------


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
    (AsksForExport, "it uses is_in_onnx_export"),
    (AsksForProcesses, "it uses is_initialized"),
    (AsksForEnvironment, "it reads environ"),
]


@pytest.mark.parametrize(("cls", "reason"), LEFT, ids=[cls.__name__ for cls, _ in LEFT])
def test_forwards_that_cannot_be_followed_are_left_alone_with_the_reason(
    cls: type[Base], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    plain = cls()
    with caplog.at_level("INFO", "fusereg"):
        converted = fusereg.convert(copy.deepcopy(plain))
    assert type(converted) is cls
    assert f"the model ({cls.__name__}) not fused: {reason}" in caplog.text
    for training in (True, True, False):
        plain.train(training)
        agree(plain, converted.train(training))
    for a, b in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def state(m: nn.Module) -> list[Any]:
    """Return all that a model holds, with the identity, version and bytes of tensors."""
    found: list[Any] = []
    for module in m.modules():
        for name, value in sorted(vars(module).items()):
            if name in ("_fusereg_original", "fusereg_plans") or name in EXTRA:
                continue
            found.append((id(module), name, id(value)))
            if isinstance(value, dict):
                found.append([(key, id(held)) for key, held in value.items()])
            else:
                found.append(repr(value))
    for tensor in (*m.parameters(), *m.buffers()):
        grad = None if not isinstance(tensor, nn.Parameter) else tensor.requires_grad
        found.append((id(tensor), tensor._version, tensor.data_ptr(), grad, tensor.tolist()))
    return found


#: Attributes that fusereg's batch norms have and torch's do not.
EXTRA = ("activation", "dropout", "negative_slope", "update_stats", "inplace")


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate()]


@pytest.mark.parametrize("make", [*MODELS, *(cls for cls, _ in LEFT)])
def test_conversion_changes_classes_and_nothing_else(make: Maker) -> None:
    m = make()
    stir(m)
    before, draws = state(m), random_states()
    names = [sorted(vars(module)) for module in m.modules()]
    classes = [type(module) for module in m.modules()]
    for _ in range(2):
        fusereg.convert(m)
        assert state(m) == before
        fusereg.revert(m)
        assert state(m) == before
        assert [sorted(vars(module)) for module in m.modules()] == names
        assert [type(module) for module in m.modules()] == classes
    assert random_states() == draws


# --- threads and profilers ------------------------------------------------------------------------


def forwards(m: nn.Module) -> list[str]:
    return [
        getattr(module, "fusereg_plans", ((),))[0].run.__code__.co_code.hex()
        if getattr(module, "fusereg_plans", ())
        else type(module).__name__
        for module in m.modules()
    ]


def test_threads_convert_at_once_and_disturb_no_other_thread() -> None:
    models: list[nn.Module] = [
        nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 6, 2)) for _ in range(16)
    ]
    wanted = forwards(fusereg.convert(copy.deepcopy(models[0])))
    assert sum(len(code) > 50 for code in wanted) == 2
    served, failed, done = [0], [], threading.Event()

    def serve() -> None:
        other, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        while not done.is_set() or not served[0]:
            try:
                other(x)
                served[0] += 1
            except Exception as error:
                failed.append(error)

    server = threading.Thread(target=serve)
    server.start()
    barrier = threading.Barrier(len(models))

    def convert(m: nn.Module) -> None:
        barrier.wait()
        fusereg.convert(m)

    threads = [threading.Thread(target=convert, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    server.join()
    assert not failed
    assert served[0] > 0
    assert all(forwards(m) == wanted for m in models)


def test_one_model_can_be_run_by_a_thread_while_another_converts_it() -> None:
    m = nn.Sequential(*(BasicBlock(3, 3) for _ in range(6))).eval()
    x = images(2).float()
    wanted = m(x)
    got: list[Tensor] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set() or not got:
            got.append(m(x))

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(5):
        fusereg.revert(fusereg.convert(m))
    done.set()
    server.join()
    assert got
    for y in got:
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def after_the_conversion() -> None:
    """Appear in the profile."""


def test_under_a_profiler_all_chains_are_fused_and_the_profile_goes_on() -> None:
    wanted = forwards(fusereg.convert(BasicBlock(3, 6, 2)))
    m = BasicBlock(3, 6, 2)
    profile = cProfile.Profile()
    profile.enable()
    fusereg.convert(m)
    after_the_conversion()
    profile.disable()
    assert forwards(m) == wanted
    called = {name for _, _, name in pstats.Stats(profile).stats}  # type: ignore[attr-defined]
    assert "after_the_conversion" in called


# --- other tools ----------------------------------------------------------------------------------


def test_converted_models_are_traced_by_torch_fx_as_the_original_ones() -> None:
    plain = BasicBlock(3, 6, 2)
    converted = fusereg.convert(copy.deepcopy(plain))
    graphs = [torch.fx.symbolic_trace(m) for m in (plain, converted)]
    ours, theirs = ([(n.op, str(n.target)) for n in g.graph.nodes] for g in graphs)
    assert ours == theirs
    agree(plain, graphs[1])
    whole = torch.fx.symbolic_trace(nn.Sequential(converted, nn.Sequential(converted)))
    assert sum(n.op == "call_module" for n in whole.graph.nodes) == 2 * sum(
        n.op == "call_module" for n in graphs[0].graph.nodes
    )


def test_scripting_says_in_one_sentence_what_to_do() -> None:
    m = nn.Sequential(BasicBlock(3, 3), nn.Dropout(0.5)).eval()
    fusereg.convert(m)
    for part in (m, m[0], m[1]):
        with pytest.raises(RuntimeError, match=r"call fusereg\.revert\(model\) first"):
            torch.jit.script(part)
    with pytest.raises(RuntimeError, match=r"cannot compile fusereg's Dropout; use torch\.compile"):
        torch.jit.script(fusereg.nn.Dropout(0.5))
    fusereg.revert(m)
    x = images(2).float()
    torch.testing.assert_close(torch.jit.script(m)(x), m(x))


def test_eager_quantization_fuses_a_reverted_model() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()

    m = fusereg.convert(make())
    with pytest.raises(Exception, match=r"fusereg\.batch_norm\.layers\.BatchNorm2d"):
        torch.ao.quantization.fuse_modules(m, [["0", "1", "2"]])
    fusereg.revert(m)
    x = images(2).float()
    fused = torch.ao.quantization.fuse_modules(m, [["0", "1", "2"]])
    torch.testing.assert_close(fused(x), m(x), rtol=1e-4, atol=1e-5)


# --- what is lost, and layers that stay -----------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class WithPath(Base):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.path = between

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self.bn(self.conv(x))) + x


class OfWrapper(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Wrapper(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.relu(self.inner(self.conv(x))))


def test_layers_between_that_cost_a_chain_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fusereg"):
        fusereg.convert(WithPath(fusereg.nn.DropPath(0.1)))
        fusereg.convert(WithPath(fusereg.nn.DropBlock2d(0.1, 3)))
        fusereg.convert(WithPath(Wrapper(nn.Identity())))
        fusereg.convert(OfWrapper())
    for name in ("DropPath", "DropBlock2d", "Wrapper"):
        assert f"the model: bn and add are not fused: path ({name}) is between them" in caplog.text
    said = "the model: relu is not fused with the BatchNorm2d inside inner (Wrapper)"
    assert said in caplog.text


def test_layers_that_fusereg_cannot_replace_stay_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3, dtype=torch.complex64)
    norm.activation = "mine"
    with caplog.at_level("INFO", "fusereg"):
        m = fusereg.convert(nn.ModuleList([norm, other]))
    assert [type(layer) for layer in m] == [nn.BatchNorm2d] * 2
    assert norm.activation == "mine"
    assert "0 left alone: fusereg's layer has an attribute activation" in caplog.text
    assert "1 left alone: its weight is of torch.complex64 on cpu" in caplog.text
    monkeypatch.setattr(nn.Dropout, "forward", other_scaled_method)
    with caplog.at_level("INFO", "fusereg"):
        fusereg.convert(nn.Sequential(nn.Dropout(0.5)))
    assert "0 left alone: Dropout.forward is not torch's any more" in caplog.text
