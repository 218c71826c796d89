"""DropBlock on every backend, against a mask made in plain Python and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
import reference_philox
from conftest import SEED, Backend
from conftest import make_nonzero as make
from fusereg import functional as F
from fusereg import nn

#: (N, C, H, W) and block size: one element, blocks of one element, even, as large as the image and
#: larger, odd sizes, more channels than a vector, rows longer than a word of bits.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 5, 7), 1),
    ((2, 3, 8, 6), 2),
    ((1, 2, 4, 4), 4),
    ((1, 2, 4, 5), 9),
    ((2, 37, 7, 9), 3),
    ((1, 3, 6, 75), 5),
]


def gamma(shape: tuple[int, ...], p: float, b: int) -> float:
    h, w = shape[2:]
    return min(1.0, p * (h * w) / (b * b * ((h - b + 1) * (w - b + 1))))


def kept(shape: tuple[int, ...], p: float, block_size: int, index_offset: int = 0) -> Tensor:
    n, c, h, w = shape
    b = min(block_size, h, w)
    drawn = reference_philox.mask(
        n * c * (h - b + 1) * (w - b + 1), gamma(shape, p, b), SEED, 0, index_offset
    )
    return spread(~drawn.view(n, c, h - b + 1, w - b + 1), b, shape)


def spread(corners: Tensor, b: int, shape: tuple[int, ...]) -> Tensor:
    """What blocks at these corners leave."""
    dropped = torch.zeros(shape, dtype=torch.bool)
    for n, c, i, j in corners.nonzero().tolist():
        dropped[n, c, i : i + b, j : j + b] = True
    return ~dropped


def assert_dropped(y: Tensor, x: Tensor, mask: Tensor) -> None:
    """Y is x scaled where the mask says so and +0.0 elsewhere, bit for bit."""
    mask = mask.to(x.device)
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    count = int(mask.sum())
    scale = torch.tensor(mask.numel() / count if count else 0.0, dtype=compute, device=x.device)
    wanted = torch.where(mask, (x.to(compute) * scale).to(x.dtype), torch.zeros_like(x))
    assert y.dtype is x.dtype
    assert torch.equal(y, wanted)
    assert not torch.signbit(y[~mask]).any()


# --- the mask and the values ----------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize(("shape", "block_size"), SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_mask_and_values(
    shape: tuple[int, ...], block_size: int, p: float, dtype: torch.dtype, backend: Backend
) -> None:
    mask = kept(shape, p, block_size)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = make(shape, dtype, backend).contiguous(memory_format=memory_format).requires_grad_()
        y = F.drop_block2d(x, p, block_size, seed=SEED)
        assert y.stride() == torch.empty_like(x).stride()
        assert_dropped(y.detach(), x.detach(), mask)
        y.backward(x.detach())
        assert x.grad is not None
        assert_dropped(x.grad, x.detach(), mask)


@pytest.mark.parametrize(
    ("p", "block_size", "bits"), [(0.5, 1, 1), (0.25, 1, 2), (0.75, 2, 16), (0.016, 2, 32)]
)
def test_draws_of_few_and_of_many_bits(
    p: float, block_size: int, bits: int, backend: Backend
) -> None:
    shape = (2, 11, 12, 11)
    assert reference_philox.threshold(gamma(shape, p, block_size))[0] == bits
    mask = kept(shape, p, block_size)
    assert 0 < mask.sum() < mask.numel()
    x = make(shape, torch.float32, backend)
    assert_dropped(F.drop_block2d(x, p, block_size, seed=SEED), x, mask)


@pytest.mark.parametrize("index_offset", [1, 8, 100, 2**32 - 3, 2**62])
def test_index_offset(index_offset: int, backend: Backend) -> None:
    shape = (2, 3, 9, 7)
    x = make(shape, torch.float32, backend)
    mask = kept(shape, 0.4, 3, index_offset)
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        assert_dropped(F.drop_block2d(t, 0.4, 3, seed=SEED, index_offset=index_offset), t, mask)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((1, 2, 300, 260), 7), ((3, 40, 40, 61), 5), ((1, 2, 3, 40_000), 2), ((1, 9, 700, 100), 80)],
    ids=str,
)
def test_images_of_several_tiles(
    shape: tuple[int, int, int, int], block_size: int, channels_last: bool, backend: Backend
) -> None:
    n, c, h, w = shape
    b = min(block_size, h, w)
    places = (n, c, h - b + 1, w - b + 1)
    drawn = fusereg.dropout_mask(places, gamma(shape, 0.1, b), SEED, device=backend.device)
    mask = spread(~drawn.cpu(), b, shape)
    assert 0 < mask.sum() < mask.numel()
    x = make(shape, torch.bfloat16, backend)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_dropped(F.drop_block2d(x, 0.1, block_size, seed=SEED), x, mask)


def test_the_share_that_is_dropped_and_the_sum() -> None:
    """Away from the border, a share of 1 - (1 - gamma)^(b^2) is dropped."""
    shape, p, b = (64, 64, 28, 28), 0.1, 5
    y = F.drop_block2d(torch.ones(shape), p, b, seed=3)
    assert abs(float(y.double().mean()) - 1.0) < 1e-6
    inside = y[:, :, b - 1 : 28 - b + 1, b - 1 : 28 - b + 1]
    wanted = 1 - (1 - gamma(shape, p, b)) ** (b * b)
    # 1.6M elements; those under a block count as one, and overlap.
    error = 6 * math.sqrt(wanted / (inside.numel() / b**2))
    assert abs(float((inside == 0).double().mean()) - wanted) < error


# --- the arguments --------------------------------------------------------------------------------


def test_nothing_kept_and_nothing_dropped(backend: Backend) -> None:
    x = make((2, 3, 4, 4), torch.float32, backend)
    assert F.drop_block2d(x, 0.0) is x
    assert F.drop_block2d(x, 0.5, training=False) is x
    # A block as large as the image and p = 1: each is dropped.
    assert torch.equal(F.drop_block2d(x, 1.0, 4), torch.zeros_like(x))
    tiny = F.drop_block2d(x, 1e-12, 2, seed=1)
    assert torch.equal(tiny, x)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        empty = torch.empty(shape, device=backend.device, requires_grad=True)
        y = F.drop_block2d(empty, 0.5)
        assert y.shape == shape
        y.sum().backward()


def test_dropped_inf_and_nan_become_zero(backend: Backend) -> None:
    x = torch.full((2, 3, 6, 6), math.nan, device=backend.device)
    y = F.drop_block2d(x, 0.4, 3, seed=SEED)
    assert torch.equal(y.isnan().cpu(), kept((2, 3, 6, 6), 0.4, 3))
    assert torch.equal(y.nan_to_num(0.0), torch.zeros_like(x))


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"fusereg\.drop_block2d: p must be within \[0, 1\]"):
        F.drop_block2d(x, 1.5)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions \(N, C, H, W\), got 3"):
        F.drop_block2d(x[0])
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        F.drop_block2d(x, 0.5, 0)
    with pytest.raises(TypeError, match="block_size must be an integer, got float"):
        F.drop_block2d(x, 0.5, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        F.drop_block2d(x.long())
    with pytest.raises(ValueError, match="x must be at most 65536 wide, got 65537"):
        F.drop_block2d(torch.ones(1, 1, 1, 65537))
    with pytest.raises(ValueError, match="index_offset must be an integer and not negative"):
        F.drop_block2d(x, index_offset=-1)
    with pytest.raises(ValueError, match="changed in place"):
        F.drop_block2d(x.requires_grad_(), inplace=True)


# --- inside torch ---------------------------------------------------------------------------------


def test_one_number_is_kept_for_backward() -> None:
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.untyped_storage().nbytes())
        return t

    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = F.drop_block2d(x, 0.3)
        torch.ops.fusereg.drop_block2d(x, torch.tensor([1, 0]), 0.3, 7, 0)
    node: Any = y.grad_fn
    held = [t.untyped_storage().nbytes() for t in node.saved_tensors]
    assert held == [8], "the count alone"
    assert saved == [8, 8, 16], "the count eagerly; the count and the Philox state by the operator"


def test_module() -> None:
    layer = nn.DropBlock2d()
    assert repr(layer) == "DropBlock2d(p=0.1, block_size=7, inplace=False)"
    assert nn.DropBlock2d(keep_prob=0.75, block_size=3).p == 0.25
    with pytest.raises(ValueError, match="p and keep_prob exclude each other"):
        nn.DropBlock2d(0.5, keep_prob=0.5)
    with pytest.raises(ValueError, match="DropBlock2d: block_size must be at least 1"):
        nn.DropBlock2d(0.5, 0)
    x = torch.randn(4, 8, 14, 14)
    y = layer(x)
    assert not torch.equal(y, x)
    assert layer.eval()(x) is x
    in_place = nn.DropBlock2d(0.5, 3, inplace=True)
    assert in_place(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.train()(x.bfloat16()).dtype is torch.bfloat16
