"""Batch norm writes its gradient over a large one that it gets, where nobody can see that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_F

from fusereg import functional as F
from fusereg.nn import BatchNorm2d

SHAPE = (32, 64, 14, 14)  # 1.6 MB


class Given(torch.autograd.Function):
    """The identity, whose gradient is made by ``make``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.make(), None


GRADIENT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def _expected(activation: str | None = None) -> Tensor:
    x = X.clone().requires_grad_()
    y = torch_F.batch_norm(x, None, None, None, None, True)
    y = y if activation is None else y.relu()
    return torch.autograd.grad(y, x, GRADIENT)[0]


def _pass_through(seen: list[Any]) -> Callable[[Tensor], Tensor]:
    """Return the identity; it appends where its gradient lies."""

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(grad.data_ptr())
            return grad

    apply: Callable[[Tensor], Tensor] = Spy.apply
    return apply


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_memory_that_nobody_else_has_is_used_anew(
    activation: str | None, layout: torch.memory_format
) -> None:
    made: list[int] = []

    def make() -> Tensor:
        grad = GRADIENT.clone(memory_format=layout)
        made.append(grad.data_ptr())
        return grad

    x = X.clone(memory_format=layout).requires_grad_()
    seen: list[int] = []
    y = F.batch_norm(_pass_through(seen)(x), None, None, training=True, activation=activation)
    Given.apply(y, make).sum().backward()
    assert seen == made
    assert x.grad is not None
    torch.testing.assert_close(x.grad, _expected(activation), rtol=1e-4, atol=1e-5)


def _of_numpy(kept: list[Any]) -> Tensor:
    array = GRADIENT.numpy().copy()
    kept.append(torch.from_numpy(array))
    return torch.from_numpy(array)


def _shared(kept: list[Any]) -> Tensor:
    grad = GRADIENT.clone().share_memory_()
    kept.append(grad.clone())  # what another process would see; that it is shared is enough
    return grad


def _part(kept: list[Any]) -> Tensor:
    whole = torch.stack((GRADIENT, GRADIENT))
    kept.append(whole[0])
    return whole[0]


#: Gradients in memory that somebody else can read.
MADE: dict[str, Callable[[list[Any]], Tensor]] = {
    "of an array": _of_numpy,
    "shared with processes": _shared,
    "kept": lambda kept: kept.append(GRADIENT.clone()) or kept[-1],
    "of a kept detached tensor": lambda kept: kept.append(GRADIENT.clone()) or kept[-1].detach(),
    "of a kept storage": lambda kept: (
        kept.append(GRADIENT.clone().untyped_storage())
        or torch.empty(0).set_(kept[-1], 0, SHAPE, GRADIENT.stride())
    ),
    "a part": _part,
}

#: What a hook of the result's gradient may keep.
KEPT: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda g: g,
    "detached": lambda g: g.detach(),
    "view": lambda g: g.view(-1),
    "slice": lambda g: g[:, 1:2],
    "array": lambda g: g.numpy(),
    "storage": lambda g: g.untyped_storage(),
    "capsule": lambda g: torch.utils.dlpack.to_dlpack(g),
    "weak reference": weakref.ref,
}


def _check(x: Tensor, values: list[Any]) -> None:
    assert x.grad is not None
    torch.testing.assert_close(x.grad, _expected(), rtol=1e-4, atol=1e-5)
    for value in values:
        torch.testing.assert_close(value, GRADIENT, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", MADE)
def test_memory_that_somebody_has_keeps_its_numbers(name: str) -> None:
    kept: list[Any] = []
    x = X.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    Given.apply(y, lambda: MADE[name](kept)).sum().backward()
    if name == "of a kept storage":
        kept = [torch.empty(0).set_(kept[0], 0, SHAPE, GRADIENT.stride())]
    _check(x, kept)


@pytest.mark.parametrize("name", KEPT)
def test_what_a_hook_keeps_of_the_gradient_keeps_its_numbers(name: str) -> None:
    kept: list[Any] = []
    found: list[Tensor] = []

    def read() -> Tensor:
        value = kept[0]
        if name == "weak reference":
            # As it is when batch norm's gradient goes on, which may be in its place.
            value = value()
            return GRADIENT if value is None else value.clone()
        if name == "capsule":
            value = torch.from_dlpack(value)
        if name == "array":
            value = torch.from_numpy(value)
        if name == "storage":
            value = torch.empty(0).set_(value, 0, SHAPE, GRADIENT.stride())
        whole = GRADIENT[:, 1:2] if name == "slice" else GRADIENT
        assert torch.equal(value.reshape(whole.shape), whole)
        return GRADIENT

    x = X.clone().requires_grad_()
    x.register_hook(lambda _: found.append(read()))
    y = F.batch_norm(x, None, None, training=True)
    y.register_hook(lambda g: kept.append(KEPT[name](g)))
    Given.apply(y, lambda: GRADIENT.clone()).sum().backward()
    _check(x, found)


def test_gradients_that_others_get_keep_their_numbers() -> None:
    x = X.clone().requires_grad_()
    given = GRADIENT.clone()
    F.batch_norm(x, None, None, training=True).backward(given)
    _check(x, [given])

    # Asked for beside that of x.
    x = X.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    x.grad, of_y = torch.autograd.grad(
        Given.apply(y, lambda: GRADIENT.clone()).sum(), (x, y), retain_graph=True
    )
    _check(x, [of_y])

    # Kept for y.
    x = X.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    y.retain_grad()
    Given.apply(y, lambda: GRADIENT.clone()).sum().backward()
    _check(x, [y.grad])

    # Of two summands, whose gradient is the same tensor.
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    total = F.batch_norm(x, None, None, training=True) + z
    Given.apply(total, lambda: GRADIENT.clone()).sum().backward()
    _check(x, [z.grad])


def test_hooks_of_the_node_and_of_modules_see_the_gradient() -> None:
    seen: list[Tensor] = []
    x = X.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda _, of_results: seen.append(of_results[0].clone()))
    Given.apply(y, lambda: GRADIENT.clone()).sum().backward()
    _check(x, seen)

    seen.clear()
    x = X.clone().requires_grad_()
    layer = nn.Sequential(BatchNorm2d(64, affine=False))
    layer.register_full_backward_hook(lambda _, __, of_results: seen.append(of_results[0].clone()))
    Given.apply(layer(x.clone()), lambda: GRADIENT.clone()).sum().backward()
    _check(x, seen)


def test_a_graph_can_be_gone_through_twice() -> None:
    x = X.clone().requires_grad_()
    loss = Given.apply(F.batch_norm(x, None, None, training=True), lambda: GRADIENT.clone()).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(x.grad, first)
    _check(x, [])
