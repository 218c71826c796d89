"""A converted model computes what its own code says, whatever changes after the conversion.

A forward can read a value from many places. Each of them is changed after the conversion here, and
the result must be that of the model that was not converted, whether or not it was rewritten.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusereg
import reading_models
from plain_models import Calls, watched_calls
from reading_models import (
    READS_CLOSURE,
    SETTINGS,
    AsksForAttribute,
    AsksForAutocast,
    AsksForBuffer,
    AsksForClass,
    AsksForDeterminism,
    AsksForDtype,
    AsksForEnvironment,
    AsksForExport,
    AsksForGradients,
    AsksForLayer,
    AsksForMode,
    AsksForParameter,
    AsksForProcesses,
    AsksForThreads,
    AsksForType,
    Asserts,
    Base,
    BranchesOnBuffer,
    CallsBuiltin,
    CallsGlobal,
    CallsMath,
    CallsMethod,
    CallsStatic,
    CallsSuper,
    CallsTorch,
    ChainsOfOthers,
    Config,
    CutsText,
    GoesThroughChildren,
    GoesThroughItems,
    HandsTextOn,
    HasDefault,
    MakesText,
    OpenConfig,
    ReadsBuffer,
    ReadsChild,
    ReadsClass,
    ReadsConfig,
    ReadsDefault,
    ReadsGlobal,
    ReadsGlobalDict,
    ReadsInstance,
    ReadsModeOfChild,
    ReadsTuple,
    Scales,
    TakesFloat,
    TakesNumber,
    agree,
    change_closure,
    other_scaled,
    other_scaled_method,
    scaled,
    twins_of,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return watched_calls(monkeypatch)


def set_attribute(name: str, value: object) -> Callable[[Any], None]:
    """Return a change that sets an attribute of the model, or of a layer."""

    def change(m: Any) -> None:
        *path, last = name.split(".")
        setattr(m.get_submodule(".".join(path)), last, value)

    return change


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


def more_children(m: Any) -> None:
    m.parts["3"] = nn.Tanh()


def the_same_child_twice(m: Any) -> None:
    m.parts["0"] = m.parts["2"]


def new_layer(m: Any) -> None:
    m.relu = nn.Tanh()


def in_config(name: str, value: object) -> Callable[[Any], None]:
    """Return a change of a setting."""

    def change(m: Any) -> None:
        *path, last = name.split(".")
        owner = m.config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return change


#: A model, and a change of this model after the conversion.
OF_MODELS: list[tuple[type[Base], Callable[[Any], None]]] = [
    (ReadsInstance, set_attribute("own", 3.0)),
    (ReadsInstance, set_attribute("own", 1)),
    (ReadsInstance, set_attribute("own", torch.tensor(3.0))),
    (ReadsTuple, set_attribute("shape", (3, 2.0))),
    *((ReadsConfig, in_config(name, 3.0)) for name in ("factor", "names.factor", "late")),
    *((ReadsConfig, in_config(name, 3.0)) for name in ("scales.factor", "slotted.factor")),
    (ReadsConfig, in_config("shared", 3.0)),
    (ReadsConfig, in_config("mode", "single")),
    (ReadsConfig, in_config("scales", Scales(3.0))),
    (ReadsConfig, in_config("scales", SimpleNamespace(factor=3.0))),
    (ReadsConfig, set_attribute("config", OpenConfig())),
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
    (AsksForClass, set_attribute("drop", nn.Identity())),
    (GoesThroughChildren, more_children),
    (GoesThroughChildren, the_same_child_twice),
    (GoesThroughItems, more_children),
    (GoesThroughItems, the_same_child_twice),
    (GoesThroughItems, lambda m: m.parts.pop("2")),
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


HERE = reading_models

#: A model, and a change of what it shares with others.
OF_SHARED: list[tuple[type[Base], Callable[[], Undo]]] = [
    (ReadsConfig, patched(Config, "shared", 3.0)),
    (ReadsConfig, patched(Config, "late", property(lambda self: True))),
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
    (GoesThroughItems, patched(nn.ModuleDict, "items", lambda self: [])),
    (GoesThroughChildren, patched(nn.Module, "children", lambda self: iter(()))),
    (AsksForClass, patched(HERE, "isinstance", lambda value, kinds: True)),
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


def test_copies_with_settings_of_their_own_are_fused(calls: Calls) -> None:
    _, converted = twins_of(ReadsConfig)
    for m in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        calls.clear()
        m(torch.randn(2, 3, 4, 4))
        assert [call[0] for call in calls] == ["relu"]
        m.config.factor = 2.0
        calls.clear()
        m(torch.randn(2, 3, 4, 4))
        assert not any(call[0] == "relu" for call in calls)


def test_one_that_asks_whether_it_got_a_tensor_still_takes_others(calls: Calls) -> None:
    plain, converted = twins_of(AsksForType)
    agree(plain, converted)
    assert calls[0][0] == "relu"
    x = torch.randn(2, 3, 4, 4)
    for m in (plain, converted):
        m.eval()
    torch.testing.assert_close(converted([x, x]), plain([x, x]))
    assert [activation for activation, *_ in calls] == ["relu", "relu"]


def test_an_assertion_says_what_it_said(calls: Calls) -> None:
    plain, converted = twins_of(Asserts)
    agree(plain, converted)
    assert calls[0][0] == "relu"
    texts = []
    for m in (plain, converted):
        with pytest.raises(AssertionError) as caught:
            m(torch.zeros(1, 4, 2, 2))
        texts.append(str(caught.value))
    assert texts == ["{3} channels, got 4 of torch.Size([1, 4, 2, 2])   4"] * 2


@pytest.mark.parametrize("cls", [MakesText, CutsText, HandsTextOn])
def test_text_of_a_tensor_goes_into_an_assertion_alone(cls: type[Base]) -> None:
    plain, converted = twins_of(cls)
    assert not hasattr(converted, "fusereg_plans")
    agree(plain, converted)


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


# Dynamo itself asks whether there are processes, and for their rank.
COMPILED = [(cls, change) for cls, change in OF_SHARED if cls is not AsksForProcesses]


@pytest.mark.slow
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("cls", "change"), COMPILED, ids=names(COMPILED))
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
