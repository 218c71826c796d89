"""Models that read something in an unusual way compute the same, before and after it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import unusual_models
from fusereg.backend import fusereg_backend
from hostile_models import Plain
from plain_models import basic, bottleneck, close, mlp, same_state, without_dropout
from test_hostile import agree, results, same, twins
from unusual_models import (
    CASES,
    FACTOR,
    LIMITS,
    Descriptor,
    EnumByText,
    EnumByValue,
    EnumProperty,
)

Make = Callable[[], nn.Module]
_BY_NAME = {make.__name__: make for make in CASES}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Undo changes of what models share."""
    classes: list[Any] = [make for make in CASES if "factor" in vars(make)]
    before = [vars(cls)["factor"] for cls in classes]
    yield
    unusual_models.FLAG, LIMITS[0], Descriptor.value = True, 1.0, 1.0
    FACTOR.set(1.0)
    unusual_models._factor.cache_clear()
    for cls, value in zip(classes, before, strict=True):
        if not hasattr(value, "__get__"):
            cls.factor = value


@pytest.mark.parametrize("name", _BY_NAME)
def test_converted_it_follows_every_change(name: str) -> None:
    make = _BY_NAME[name]
    plain, m = twins(make)
    fusereg.convert(m)
    same(m, plain)
    for part in (m, plain):
        part.train()
        CASES[make](part)
    same(m, plain)
    fusereg.revert(m)
    same(m, plain)


@pytest.mark.parametrize("name", _BY_NAME)
def test_folded_as_it_is_now_it_computes_the_same(name: str) -> None:
    make = _BY_NAME[name]
    for changed in (False, True):
        plain, m = twins(make)
        for part in (m, plain):
            if changed:
                CASES[make](part)
            part.eval()
        folded, copied = fusereg.fold_into_conv(m), copy.deepcopy(plain)
        for _ in range(2):
            x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
            agree(results(folded, x)[:2], results(copied, x)[:2])


#: What Dynamo's guards do not see, see docs/backend.md and tests/test_backend.py.
_UNSEEN = {"OwnDictionary", "Vars"}


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True], ids=["backend fusereg", "converted"])
@pytest.mark.parametrize("name", [name for name in _BY_NAME if name not in _UNSEEN])
def test_compiled_it_follows_every_change(name: str, converted: bool) -> None:
    make = _BY_NAME[name]
    plain, m = twins(make)
    torch._dynamo.reset()
    run: Any = torch.compile(
        fusereg.convert(m) if converted else m, backend="eager" if converted else fusereg_backend
    )
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for changed in (False, True):
            if changed:
                for part in (m, plain):
                    CASES[make](part)
            x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
            agree(results(run, x), results(plain, x))


# --- other ways of running a model ----------------------------------------------------------------


def traced(m: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(m, x, check_trace=False)


def exported(m: nn.Module, x: Tensor) -> Any:
    return torch.export.export(m, (x,)).module()


def symbolic(m: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(m)


def replica(m: nn.Module, x: Tensor) -> Any:
    """A copy as DataParallel makes it: with parameters as attributes."""
    copies = {part: part._replicate_for_data_parallel() for part in m.modules()}
    for part, made in copies.items():
        made._former_parameters = {}
        for name, child in part._modules.items():
            if child is not None:
                setattr(made, name, copies[child])
        made._parameters = dict.fromkeys(part._parameters)
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                made._parameters.pop(name, None)
                setattr(made, name, tensor)
    return copies[m]


def called_with_tensors(m: nn.Module, x: Tensor) -> Any:
    tensors = {**dict(m.named_parameters()), **dict(m.named_buffers())}
    return lambda x: torch.func.functional_call(m, tensors, (x,))


def mapped(m: nn.Module, x: Tensor) -> Any:
    return lambda x: torch.func.vmap(lambda x: m(x[None])[0])(x)


def proxied(m: nn.Module, x: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(m)(x)


WAYS = [traced, exported, symbolic, replica, called_with_tensors, mapped, proxied]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [basic, bottleneck, mlp, Plain])
def test_run_another_way_it_computes_the_same(way: Any, make: Make) -> None:
    plain, m = twins(lambda: without_dropout(make()))
    fusereg.convert(m)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    for training in (False, True):
        if training and way in (mapped, proxied, exported):
            continue  # of torch's own batch norm, these take evaluation or a functional form alone
        plain.train(training)
        run = way(m.train(training), x)
        close(run(x), plain(x), 1e-10)
        if way is not replica or not training:
            continue
        same_state(m, plain, 1e-10)


@pytest.mark.parametrize(
    ("make", "fused"), [(EnumByValue, True), (EnumByText, True), (EnumProperty, False)]
)
def test_members_of_plain_enumerations_are_values(make: Any, fused: bool) -> None:
    m = fusereg.convert(make())
    assert bool(getattr(m, "fusereg_plans", ())) is fused
