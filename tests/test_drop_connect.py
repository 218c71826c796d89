"""DropConnect on a linear layer, against the unfused chain with the same mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusereg
from conftest import Backend
from fusereg import functional as F


def chain(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: int) -> Tensor:
    mask = fusereg.dropout_mask(weight.shape, p, seed, device=weight.device)
    keep = fusereg._C.dropout_constants(p, False)[2]
    return nn.functional.linear(x, torch.where(mask, weight / keep, 0.0), bias)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients(shape: tuple[int, ...], with_bias: bool, backend: Backend) -> None:
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, (11, 7), (11,))]
    ours = [t.to(backend.device).requires_grad_() for t in tensors]
    theirs = [t.to(backend.device).requires_grad_() for t in tensors]
    y = F.drop_connect_linear(ours[0], ours[1], ours[2] if with_bias else None, 0.4, seed=3)
    wanted = chain(theirs[0], theirs[1], theirs[2] if with_bias else None, 0.4, 3)
    torch.testing.assert_close(y, wanted, rtol=1e-13, atol=1e-13)
    (y * y.detach()).sum().backward()
    (wanted * wanted.detach()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_gradcheck_twice() -> None:
    inputs = tuple(
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,))
    )

    def f(*t: Tensor) -> Tensor:
        return F.drop_connect_linear(*t, 0.4, seed=3)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_a_transposed_weight_has_the_mask_of_its_memory() -> None:
    weight = torch.randn(7, 11).t().requires_grad_()
    y = F.drop_connect_linear(torch.eye(7), weight, None, 0.5, seed=3)
    y.backward(torch.ones_like(y))
    assert weight.grad is not None
    assert torch.equal(weight.grad != 0, y.detach().t() != 0)
    mask = fusereg.dropout_mask((7, 11), 0.5, 3)
    assert torch.equal(y.detach() != 0, mask)


def test_the_dropped_weight_is_not_kept() -> None:
    layer, x = fusereg.nn.DropConnectLinear(64, 32), torch.randn(4, 64)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert set(kept) == {t.untyped_storage().data_ptr() for t in (x, layer.weight)}


def test_module() -> None:
    layer = fusereg.nn.DropConnectLinear(6, 4, keep_prob=0.75)
    assert repr(layer) == ("DropConnectLinear(in_features=6, out_features=4, bias=True, p=0.25)")
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    y = layer(x)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.eval()(x), plain)


def test_compile_func_and_autocast() -> None:
    layer, x = fusereg.nn.DropConnectLinear(6, 4), torch.randn(3, 6)

    def seeded(t: Tensor) -> Tensor:
        return F.drop_connect_linear(t, layer.weight, layer.bias, 0.5, seed=3)

    torch._dynamo.reset()
    compiled = torch.compile(seeded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), seeded(x))
    torch.testing.assert_close(torch.vmap(seeded)(x), seeded(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32


def test_bad_arguments_are_named() -> None:
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"drop_connect_linear: p must be within \[0, 1\]"):
        F.drop_connect_linear(x, weight, None, 1.5)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.int64"):
        F.drop_connect_linear(x, weight.long())
    with pytest.raises(ValueError, match="weight must have 2 dimensions, got 1"):
        F.drop_connect_linear(x, weight[0])
    assert torch.equal(F.drop_connect_linear(x, weight, None, 1.0), torch.zeros(3, 5))
