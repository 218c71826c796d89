"""Hostile models compute the same converted, reverted, copied, folded and synchronized."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from hostile_models import LISTED, MODELS
from plain_models import stir

Make = Callable[[], nn.Module]


def twins(make: Make) -> tuple[nn.Module, nn.Module]:
    """Return a model in float64 twice."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(stir(make()).double())
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def results(m: nn.Module, x: Tensor) -> list[Any]:
    """Return output and gradients, or the type of the error."""
    m.zero_grad()
    x = x.clone().requires_grad_()
    try:
        y = m(x)
        y.square().sum().backward()
    except Exception as error:
        return [type(error)]
    return [y.detach(), x.grad, *(p.grad for p in m.parameters())]


def agree(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        else:
            assert a == b


def same(found: nn.Module, wanted: nn.Module) -> None:
    """Check outputs, gradients and state over two steps of training and one evaluation."""
    for training in (True, True, False):
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        agree(results(found.train(training), x), results(wanted.train(training), x))
        with torch.inference_mode():
            torch.testing.assert_close(found(x), wanted(x), rtol=1e-7, atol=1e-7)
    states = [m.state_dict() for m in (found, wanted)]
    assert list(states[0]) == list(states[1])
    agree(list(states[0].values()), list(states[1].values()))


def copies(m: nn.Module) -> list[Any]:
    """Return copies by deepcopy and pickle, or the type of the error."""
    found: list[Any] = []
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        try:
            found.append(copied(m))
        except Exception as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_converted_it_computes_the_same_whatever_is_done_with_it(make: Make) -> None:
    plain, m = twins(make)
    classes, listed = [type(part) for part in m.modules()], LISTED.copy()
    fusereg.convert(m)
    assert listed == LISTED
    same(m, plain)
    for found, wanted in zip(copies(m), copies(plain), strict=True):
        if isinstance(wanted, nn.Module):
            same(found, wanted)
        else:
            assert found is wanted
    with torch.no_grad():
        for part in (m, plain):
            for p in part.parameters():
                p.data = p.data * 1.1
    same(m, plain)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found, wanted = [], []
    for part, outputs in ((m, found), (plain, wanted)):
        values = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        values = {k: v * 1.05 if v.is_floating_point() else v.clone() for k, v in values.items()}
        with contextlib.suppress(Exception):
            outputs.append(torch.func.functional_call(part, values, (x,)).detach())
            outputs.append(torch.func.vmap(lambda x, part=part: part(x[None]))(x).detach())
    agree(found, wanted)
    fusereg.revert(m)
    assert [type(part) for part in m.modules()] == classes
    same(m, plain)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_folded_it_computes_the_same(make: Make) -> None:
    plain, m = twins(make)
    for part in (plain, m):
        for layer in part.modules():
            layer.training = False
    if not isinstance(copies(plain)[0], nn.Module):
        pytest.skip("it cannot be copied")
    folded = fusereg.fold_into_conv(m)
    for _ in range(2):
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        agree(results(folded, x)[:2], results(plain, x)[:2])


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_synchronized_it_computes_the_same(make: Make) -> None:
    plain, m = twins(make)
    m = fusereg.nn.SyncBatchNorm.convert_sync_batchnorm(m)
    same(m, plain)
    same(fusereg.nn.SyncBatchNorm.revert_sync_batchnorm(m), plain)
