"""Dropout with one mask for a sequence or an episode."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import reference_philox
from conftest import Backend
from fusereg import functional as F
from fusereg import nn

SEED = 77


def wanted(x: Tensor, p: float, dim: int | None, index_offset: int = 0) -> Tensor:
    shape = list(x.shape)
    if dim is not None:
        shape[dim] = 1
    mask = reference_philox.mask(math.prod(shape), p, SEED, 0, index_offset)
    keep = reference_philox.keep_probability(p)
    kept = mask.view(shape).expand(x.shape).to(x.device)
    scale = torch.tensor(1 / keep if keep else 0.0).to(x.dtype).to(x.device)
    return torch.where(kept, x * scale, torch.zeros_like(x))


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.4, 0.999, 1.0])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((3, 5, 8), 1),
        ((3, 5, 7), 0),
        ((3, 5, 7), -1),
        ((4, 1, 9), 1),
        ((4, 9, 1), 1),
        ((6,), 0),
        ((2, 3, 4, 5), 2),
        ((2, 0, 5), 1),
        ((3, 11), None),
        ((2, 9, 600), 1),
    ],
    ids=str,
)
def test_values_and_gradient(
    shape: tuple[int, ...], dim: int | None, p: float, backend: Backend
) -> None:
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    y = F.consistent_dropout(x, p, dim, seed=SEED, index_offset=3)
    assert torch.equal(y, wanted(x, p, dim, 3))
    y.backward(x.detach())
    assert x.grad is not None
    assert torch.equal(x.grad, y)


def test_no_dropping_and_bad_arguments() -> None:
    x = torch.ones(2, 3, 4)
    assert F.consistent_dropout(x, 0.0) is x
    assert F.consistent_dropout(x, 0.5, training=False) is x
    with pytest.raises(ValueError, match=r"consistent_dropout: dim is 3, but x has 3 dimensions"):
        F.consistent_dropout(x, 0.5, 3)
    with pytest.raises(TypeError, match="dim must be an integer or None, got float"):
        F.consistent_dropout(x, 0.5, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"consistent_dropout: p must be within \[0, 1\]"):
        F.consistent_dropout(x, -0.5)
    with pytest.raises(ValueError, match=r"consistent_dropout: x has dtype torch\.int64"):
        F.consistent_dropout(x.long())


def test_nothing_is_kept_for_backward() -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    x = torch.randn(8, 16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.consistent_dropout(x)
    assert kept == []


# --- the module -----------------------------------------------------------------------------------


def test_one_mask_until_reset(backend: Backend) -> None:
    layer = nn.ConsistentDropout(0.5, device=backend.device)
    x = torch.randn(6, 40, device=backend.device)
    y = layer(x)
    assert 0 < int((y == 0).sum()) < 240
    assert torch.equal(layer(x), y)
    assert torch.equal(layer(2 * x), 2 * y)
    layer.reset()
    assert not torch.equal(layer(x), y)
    layer.reset(SEED)
    assert torch.equal(layer(x), wanted(x, 0.5, None))
    layer.reset(-SEED)
    layer.reset(2**63 + SEED)
    assert layer(x).shape == x.shape


def test_rows_and_steps_may_come_and_go() -> None:
    layer = nn.ConsistentDropout(0.5)
    x = torch.randn(8, 16)
    y = layer(x)
    assert torch.equal(layer(x[:3]), y[:3])
    assert torch.equal(layer(torch.cat([x, x]))[:8], y)
    with pytest.raises(ValueError, match=r"began with features of shape \(16,\), got \(15,\)"):
        layer(x[:, :15])
    layer.eval()
    assert layer(x[:, :15]).shape == (8, 15)
    layer.train().reset()
    assert layer(x[:, :15]).shape == (8, 15)

    sequences = nn.ConsistentDropout(0.5, dim=1)
    z = torch.randn(4, 10, 16)
    y = sequences(z)
    assert torch.equal(sequences(z[:2, :7]), y[:2, :7])
    single = (y != 0).any(1, keepdim=True).expand_as(z)
    assert torch.equal(y != 0, single)
    first = nn.ConsistentDropout(0.5, dim=0)
    time_first = z.transpose(0, 1).contiguous()
    assert torch.equal(first(time_first)[:, :2], first(time_first[:, :2]))


def test_backward_has_the_mask_of_its_call() -> None:
    layer = nn.ConsistentDropout(0.5)
    x = torch.randn(50, requires_grad=True)
    first = layer(x)
    layer.reset()
    second = layer(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient != 0, first != 0)
    (gradient,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(gradient != 0, second != 0)
    layer.reset(4)
    y = checkpoint(lambda t: layer(t * 2).square(), x, use_reentrant=False)
    assert isinstance(y, Tensor)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, y != 0)


def test_its_state() -> None:
    layer = nn.ConsistentDropout(0.5)
    x = torch.randn(9, 9)
    y = layer(x)
    assert layer.state_dict() == {}
    assert [tuple(b.shape) for b in layer.buffers()] == [(2,)]
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer.double()(x.double()) != 0, y != 0)
    assert layer.eval()(x) is x
    assert torch.equal(layer.train()(x), y)
    assert layer.to("meta")(x.to("meta")).is_meta
    torch.manual_seed(4)
    a = nn.ConsistentDropout()
    torch.manual_seed(4)
    assert torch.equal(nn.ConsistentDropout().pair, a.pair)
    assert repr(a) == "ConsistentDropout(p=0.5)"
    assert repr(nn.ConsistentDropout(keep_prob=0.75, dim=1)) == "ConsistentDropout(p=0.25, dim=1)"
    with pytest.raises(ValueError, match="p and keep_prob exclude each other"):
        nn.ConsistentDropout(0.5, keep_prob=0.5)


def test_a_compiled_cell() -> None:
    layer = nn.ConsistentDropout(0.5)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 30, requires_grad=True)
    for _ in range(4):  # episodes
        y = compiled(x)
        assert torch.equal(compiled(x), y)
        assert torch.equal(layer(x), y)
        layer.reset()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient != 0, y != 0)
    assert not torch.equal(compiled(x), y)
