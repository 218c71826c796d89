"""DropConnect on linear layers and convolutions, against the unfused chain with its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from conftest import Backend
from fusereg import functional as F


def dropped(weight: Tensor, p: float, seed: int) -> Tensor:
    mask = fusereg.dropout_mask(weight.shape, p, seed, device=weight.device)
    keep = fusereg._C.dropout_constants(p, False)[2]
    return torch.where(mask, weight / keep, 0.0)


def chain(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: int) -> Tensor:
    return nn.functional.linear(x, dropped(weight, p, seed), bias)


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


def test_bad_arguments_are_named() -> None:
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"drop_connect_linear: p must be within \[0, 1\]"):
        F.drop_connect_linear(x, weight, None, 1.5)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.int64"):
        F.drop_connect_linear(x, weight.long())
    with pytest.raises(ValueError, match="weight must have 2 dimensions, got 1"):
        F.drop_connect_linear(x, weight[0])
    assert torch.equal(F.drop_connect_linear(x, weight, None, 1.0), torch.zeros(3, 5))


# --- convolution ----------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": (1, 2)},
    "groups": {"groups": 2, "padding": 1},
    "dilation": {"dilation": (2, 1), "stride": (1, 3)},
    "same": {"padding": "same"},
    "same, even": {"padding": "same", "dilation": (3, 1)},
    "valid": {"padding": "valid"},
    "lists": {"padding": [1], "stride": [2, 1]},
}


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_conv2d(arguments: dict[str, Any], kernel: tuple[int, int], backend: Backend) -> None:
    groups = arguments.get("groups", 1)
    sizes = ((2, 4, 7, 8), (6, 4 // groups, *kernel), (6,))
    for shapes, with_bias in ((sizes, True), ((sizes[0][1:], *sizes[1:]), False)):
        tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
        ours = [t.to(backend.device).requires_grad_() for t in tensors]
        theirs = [t.to(backend.device).requires_grad_() for t in tensors]
        bias = ours[2] if with_bias else None
        y = F.drop_connect_conv2d(ours[0], ours[1], bias, p=0.4, seed=3, **arguments)
        bias = theirs[2] if with_bias else None
        wanted = nn.functional.conv2d(theirs[0], dropped(theirs[1], 0.4, 3), bias, **arguments)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        (y * y.detach()).sum().backward()
        (wanted * wanted.detach()).sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_conv2d_gradcheck_twice() -> None:
    inputs = tuple(
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 2, 4, 4), (2, 1, 2, 3), (2,))
    )

    def f(*t: Tensor) -> Tensor:
        return F.drop_connect_conv2d(*t, stride=(1, 2), padding=1, groups=2, p=0.4, seed=3)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)
    frozen = (inputs[0].detach(), *inputs[1:])
    assert torch.autograd.gradgradcheck(f, frozen)


def test_a_channels_last_convolution_has_the_mask_of_its_memory() -> None:
    weight = torch.randn(5, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    y = F.drop_connect_conv2d(x, weight, p=0.5, seed=3)
    mask = F.dropout(weight.detach(), 0.5, seed=3) != 0
    wanted = nn.functional.conv2d(x, torch.where(mask, 2 * weight.detach(), 0.0))
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad != 0, mask)


def test_the_dropped_weight_of_a_convolution_is_not_kept() -> None:
    layer, x = fusereg.nn.DropConnectConv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert set(kept) == {t.untyped_storage().data_ptr() for t in (x, layer.weight)}


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"], ids=str)
def test_conv2d_module(padding_mode: Any, padding: Any) -> None:
    arguments: dict[str, Any] = {"padding": padding, "padding_mode": padding_mode}
    layer = fusereg.nn.DropConnectConv2d(4, 6, (2, 3), groups=2, **arguments, keep_prob=0.75)
    plain = nn.Conv2d(4, 6, (2, 3), groups=2, **arguments)
    assert isinstance(layer, nn.Conv2d)
    assert repr(layer) == "DropConnect" + repr(plain)[:-1] + ", p=0.25)"
    x = torch.randn(3, 4, 6, 7)
    torch.manual_seed(1)
    y = layer(x)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(1)
    with torch.no_grad():
        plain.load_state_dict(layer.state_dict())
        plain.weight.copy_(F.dropout(layer.weight, 0.25))
    torch.testing.assert_close(y, plain(x))
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))


def test_conv2d_compile_func_and_autocast() -> None:
    layer, x = fusereg.nn.DropConnectConv2d(3, 4, 3, padding="same"), torch.randn(2, 3, 6, 6)

    def seeded(t: Tensor) -> Tensor:
        return F.drop_connect_conv2d(t, layer.weight, layer.bias, padding=1, p=0.5, seed=3)

    torch._dynamo.reset()
    compiled = torch.compile(seeded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), seeded(x))
    torch.testing.assert_close(torch.vmap(seeded)(x), seeded(x))
    torch._dynamo.reset()
    assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).shape == (2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_autocast_casts_what_torch_casts(dtype: torch.dtype) -> None:
    x, images = torch.randn(3, 4, dtype=dtype), torch.randn(1, 2, 5, 5, dtype=dtype)
    weight, kernel = torch.randn(5, 4, dtype=dtype), torch.randn(3, 2, 3, 3, dtype=dtype)
    for p in (0.0, 0.5):
        with torch.autocast("cpu", torch.bfloat16):
            wanted = (
                nn.functional.linear(x, weight).dtype,
                nn.functional.conv2d(images, kernel).dtype,
            )
            came = F.drop_connect_linear(x, weight, p=p), F.drop_connect_conv2d(images, kernel, p=p)
        assert tuple(y.dtype for y in came) == wanted


def test_bad_arguments_of_conv2d_are_named() -> None:
    x, weight = torch.ones(1, 3, 5, 5), torch.ones(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"drop_connect_conv2d: p must be within \[0, 1\]"):
        F.drop_connect_conv2d(x, weight, p=1.5)
    with pytest.raises(ValueError, match="weight must have 4 dimensions, got 3"):
        F.drop_connect_conv2d(x, weight[0])
    with pytest.raises(ValueError, match=r"stride must be one number or two, got \(1, 2, 3\)"):
        F.drop_connect_conv2d(x, weight, stride=(1, 2, 3))
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        F.drop_connect_conv2d(x, weight, stride=2, padding="same")
    with pytest.raises(ValueError, match="padding must be one number or two, got 'full'"):
        F.drop_connect_conv2d(x, weight, padding="full")
    assert torch.equal(F.drop_connect_conv2d(x, weight, p=1.0), torch.zeros(1, 4, 4, 4))
