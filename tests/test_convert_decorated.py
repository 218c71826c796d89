"""Forwards inside of decorators, which run as they are."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from plain_models import Calls, watched_calls
from test_convert_calls import Base, X

Decorator = Callable[[Any], Any]


def passes(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


def renames(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "old" in kwargs:
            kwargs["x"] = kwargs.pop("old")
        return forward(*args, **kwargs)

    return wrapper


def adds(forward: Any, more: float = 1.0) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor, scale: float = 2.0) -> Any:
        return forward(self, x * scale) + forward(self, x) + more + self.conv.bias.sum()

    return wrapper


def counts(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any) -> Any:
        self.__dict__["calls"] = vars(self).get("calls", 0) + 1
        if getattr(self, "off", False):
            return args[0]
        call = functools.partial(forward, self)
        return call(*args)

    return wrapper


def knows_itself(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        outermost = type(self).forward is wrapper
        return forward(self, x) * (3 if outermost else 5)

    return wrapper


def reads_code(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x) * len(forward.__code__.co_varnames)

    return wrapper


def compares(forward: Any) -> Any:
    kept = forward

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x) * (2 if kept is forward else 3)

    return wrapper


class Holder:
    def __init__(self, forward: Any) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return functools.partial(self.forward, instance)


def elsewhere(forward: Any) -> Any:
    table = {"forward": forward}

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return table["forward"](self, x)

    return wrapper


def with_a_setting(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x) * wrapper.scale  # type: ignore[attr-defined]

    wrapper.scale = 1.0  # type: ignore[attr-defined]
    return wrapper


def with_a_count(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        wrapper.calls += 1  # type: ignore[attr-defined]
        return forward(self, x)

    wrapper.calls = 0  # type: ignore[attr-defined]
    return wrapper


def with_a_setting_by_name(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x) if getattr(wrapper, "enabled", True) else x

    return wrapper


FUSED: dict[str, list[Decorator]] = {
    "passes": [passes],
    "renames": [renames],
    "adds": [adds],
    "counts": [counts],
    "knows itself": [knows_itself],
    "twice": [knows_itself, knows_itself],
    "three": [passes, counts, renames],
    "no_grad": [torch.no_grad()],
    "inference mode": [torch.inference_mode()],
    "autocast": [torch.autocast("cpu", torch.bfloat16)],
    "enabled": [torch.enable_grad(), passes],
}
LEFT: dict[str, list[Decorator]] = {
    "reads its code": [reads_code],
    "compares it": [compares],
    "an object": [Holder],
    "held elsewhere": [elsewhere],
    "has a setting": [with_a_setting],
    "has a count": [with_a_count],
    "has a setting by name": [with_a_setting_by_name],
    "compiled": [torch.compile(backend="eager")],
    "one of them": [passes, reads_code],
}


def model_of(decorators: list[Decorator], dtype: torch.dtype = torch.float64) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))

    for decorator in reversed(decorators):
        forward = decorator(forward)
    cls = type("Decorated", (Base,), {"forward": forward, "__module__": __name__})
    globals()["Decorated"] = cls  # for pickle
    torch.manual_seed(0)
    return cls().to(dtype)


def same(plain: nn.Module, converted: nn.Module, x: Tensor = X) -> None:
    for training in (True, False):
        want, got = plain.train(training)(x), converted.train(training)(x)
        torch.testing.assert_close(got, want)
        assert (got.requires_grad, got.is_inference()) == (want.requires_grad, want.is_inference())
    for a, b in zip(converted.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", ["called", "copied", "pickled", "compiled", "reverted"])
def test_what_is_decorated_is_fused_and_its_decorators_run(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if name == "autocast" else torch.float64
    plain = model_of(FUSED[name], dtype)
    converted: Any = fusereg.convert(copy.deepcopy(plain))
    assert type(converted) is not type(plain)
    if how == "copied":
        converted = copy.deepcopy(converted)
    elif how == "pickled":
        converted = pickle.loads(pickle.dumps(converted))
    elif how == "compiled":
        if name in ("inference mode", "counts", "three"):
            return
        torch._dynamo.reset()
        same(plain, torch.compile(converted, backend="eager"), X.to(dtype))
        return
    elif how == "reverted":
        fusereg.revert(converted)
        assert type(converted) is type(plain)
    same(plain, converted, X.to(dtype))
    if how == "reverted":
        return
    calls: Calls = watched_calls(monkeypatch)
    converted.train()(X.to(dtype))
    assert len(calls) == (2 if name == "adds" else 1)
    if name in ("counts", "three"):
        assert converted.calls == plain.calls + 1  # type: ignore[operator]
        plain.off = converted.off = True
        assert converted(X) is X


@pytest.mark.parametrize("name", LEFT)
def test_decorators_that_look_at_what_they_decorate_leave_it_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = model_of(LEFT[name])
    with caplog.at_level("INFO", "fusereg"):
        converted = fusereg.convert(copy.deepcopy(plain))
    assert type(converted) is type(plain)
    assert "its forward is" in caplog.text
    same(plain, converted)


def test_a_class_whose_decorated_forward_is_replaced_later_runs_the_new_one() -> None:
    plain = model_of([knows_itself])
    converted = fusereg.convert(copy.deepcopy(plain))
    cls: Any = type(plain)
    cls.forward = lambda self, x: self.conv(x)
    same(plain, converted)
    cls.forward = passes(lambda self, x: self.bn(self.conv(x)))
    same(plain, converted)


def test_a_change_within_a_decorated_forward_is_seen() -> None:
    plain = model_of([passes, adds])
    converted: Any = fusereg.convert(copy.deepcopy(plain))
    for model in (plain, converted):
        model.relu = nn.Sigmoid()
    same(plain, converted)
    for model in (plain, converted):
        model.bn = nn.Identity()
    same(plain, converted)


def test_layers_of_transformers_keep_gradient_checkpointing() -> None:
    importlib.import_module("other_libraries")  # transformers imports torchvision
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    plain = transformers.ViTForImageClassification(config).double()
    converted = fusereg.convert(copy.deepcopy(plain))
    layers = list(converted.vit.layers)
    assert all(type(a) is not type(b) for a, b in zip(layers, plain.vit.layers, strict=True))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(converted.eval()(x).logits, plain.eval()(x).logits)
    recomputed: list[int] = []
    for model in (plain, converted):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        calls: list[Any] = []
        model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        model.train()(x).logits.sum().backward()
        recomputed.append(len(calls))
    assert recomputed == [2, 2]
    for p, q in zip(plain.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
