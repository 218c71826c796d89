"""Gaussian dropout: bits on every backend against plain numpy, the distribution, torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference_philox
from conftest import SEED, Backend, make
from fusereg import functional as F
from fusereg import nn

#: Around a pair, a group (8) and the vector blocks (8 to 32).
SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 33, 65, 203]


def words(first: int, count: int, seed: int, offset: int = 0) -> np.ndarray[Any, Any]:
    """Words first, first + 1, ... of the stream: 4 of each chunk."""
    low = (offset % 2**64) // 4
    found: list[int] = []
    for chunk in range(first // 4, (first + count + 3) // 4):
        high = chunk % 2**64
        counter = (low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32)
        found.extend(reference_philox.philox(seed % 2**64, counter))
    skip = first % 4
    return np.array(found, dtype=np.uint32)[skip : skip + count]


def normals(count: int, seed: int, offset: int = 0, index_offset: int = 0) -> Tensor:
    """The kernels' normals: float32, each operation rounded by itself, as numpy rounds."""
    start = index_offset // 2 * 2
    even = words(start, count + 4 + count % 2, seed, offset)
    first, second = even[0::2], even[1::2]
    f = np.float32

    def signed(w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return w.astype(np.uint32).view(np.int32).astype(f)

    u = (signed(first >> np.uint32(1)) + f(0.5)) * f(2**-31)
    fraction, exponent = np.frexp(u)
    small = fraction < f(0.70710677)
    m = np.where(small, fraction * f(2), fraction).astype(f) - f(1)
    e = (exponent - small).astype(f)
    p = m * f(0.08700360357761383) + f(-0.1426747739315033)
    for c in (
        0.1491478681564331,
        -0.165775865316391,
        0.19963061809539795,
        -0.2500133812427521,
        0.3333390951156616,
    ):
        p = p * m + f(c)
    square = m * m
    log = ((square * m) * p + square * f(-0.5)) + m + e * f(math.log(2))
    r = np.sqrt(log * f(-2))
    t = signed(second << np.uint32(2)) * f(2**-31)
    z = t * t
    s = z * f(-3.59504520019982e-05) + f(0.00249000103212893)
    for c in (-0.08074543625116348, 0.7853981852531433):
        s = s * z + f(c)
    s = (s * t) * r
    c0 = z * f(3.52876168108196e-06) + f(-0.0003259365039411932)
    for c in (0.015854323282837868, -0.3084251284599304, 1.0):
        c0 = c0 * z + f(c)
    c0 = c0 * r
    swap, minus = second >> 31 == 1, second >> 30 & 1 == 1
    pairs = np.stack([np.where(swap, s, c0), np.where(swap, c0, s)], 1)
    pairs = np.where(minus[:, None], -pairs, pairs).astype(f)
    return torch.from_numpy(pairs.reshape(-1)[index_offset - start :][:count])


def noisy(x: Tensor, n: Tensor, p: float) -> Tensor:
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    strength = torch.tensor(math.sqrt(p / (1 - p)), dtype=compute)
    factor = n.to(compute) * strength + 1
    return (x.to(compute) * factor.to(x.device).view(x.shape)).to(x.dtype)


# --- the normals ----------------------------------------------------------------------------------


def test_the_reference_is_box_and_muller() -> None:
    """In float64, with numpy's own functions, up to the exchange of the axes."""
    n = normals(2000, SEED).double().numpy().reshape(-1, 2)
    w = words(0, 2000, SEED).astype(np.float64).reshape(-1, 2)
    r = np.sqrt(-2 * np.log((np.floor(w[:, 0] / 2) + 0.5) / 2**31))
    w1 = w[:, 1].astype(np.uint32)
    angle = (w1 << np.uint32(2)).view(np.int32).astype(np.float64) / 2**31 * np.pi / 4
    c, s = r * np.cos(angle), r * np.sin(angle)
    swap, minus = w1 >> 31 == 1, np.where(w1 >> 30 & 1 == 1, -1.0, 1.0)
    wanted = np.stack([np.where(swap, s, c) * minus, np.where(swap, c, s) * minus], 1)
    assert np.abs(n - wanted).max() < 2e-6


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 1e-6])
def test_bits(p: float, dtype: torch.dtype, backend: Backend) -> None:
    for n in SIZES:
        x = make((n,), dtype, backend)
        assert torch.equal(F.gaussian_dropout(x, p, seed=SEED), noisy(x, normals(n, SEED), p))


@pytest.mark.parametrize("index_offset", [1, 2, 8, 101, 2**32 - 3, 2**40 + 5, 2**62])
def test_index_offset_gives_a_shard_its_part(index_offset: int, backend: Backend) -> None:
    x = make((101,), torch.float32, backend)
    y = F.gaussian_dropout(x, 0.5, seed=SEED, index_offset=index_offset)
    assert torch.equal(y, noisy(x, normals(101, SEED, 0, index_offset), 0.5))


def test_shards_and_pairs(dtype: torch.dtype, backend: Backend) -> None:
    x = make((6, 77), dtype, backend)
    whole = F.gaussian_dropout(x, 0.3, seed=SEED)
    for a, b in ((0, 1), (1, 3), (3, 6)):
        shard = F.gaussian_dropout(x[a:b], 0.3, seed=SEED, index_offset=77 * a)
        assert torch.equal(shard, whole[a:b])
    for seed, offset in ((5, 0), (-7, 12), (2**62, -4)):
        pair = torch.tensor([seed, offset], device=backend.device)
        wanted = noisy(x, normals(x.numel(), seed, offset), 0.3)
        assert torch.equal(F.gaussian_dropout(x, 0.3, seed=pair), wanted)


@pytest.mark.sanitizer
def test_16_bits_have_the_factors_of_float32(backend: Backend) -> None:
    """With two blocks a multiprocessor, threads of the CUDA kernel take four groups at once."""
    device, count = backend.device, 4
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    # Four groups of 8 elements for each thread; and two, three, or two and a part.
    n = 8 * (1024 * 2 * count + 519) + 3
    for dtype in (torch.bfloat16, torch.float16):
        x = make((n,), dtype, backend)
        wide = F.gaussian_dropout(x.float(), 0.5, seed=SEED)
        assert torch.equal(F.gaussian_dropout(x, 0.5, seed=SEED), wide.to(dtype))


# --- the distribution -----------------------------------------------------------------------------


def drawn(count: int, seed: int) -> Tensor:
    return F.gaussian_dropout(torch.ones(count, dtype=torch.float64), 0.5, seed=seed) - 1


def test_kolmogorov_smirnov_and_moments() -> None:
    """Each with a false alarm in a million at most, if the seed were a random one."""
    count = 500_000
    for seed in (1, 2, 3):
        n = drawn(count, seed).sort().values
        cdf = torch.special.ndtr(n)
        ranks = torch.arange(count + 1, dtype=torch.float64) / count
        distance = torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max()
        assert distance * math.sqrt(count) < math.sqrt(math.log(2e6) / 2)
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            error = n.pow(power).mean() - moment
            assert abs(error) < 5.5 * math.sqrt(variance / count)


def test_neighbors_pairs_and_calls_are_independent() -> None:
    count = 500_000
    n, other = drawn(count, 1), drawn(count, 2)
    lags = [(n[lag:], n[:-lag]) for lag in (1, 2, 3, 4, 16)]
    for a, b in [*lags, (n, other)]:
        for f in (lambda t: t, torch.abs, torch.sign):
            u, v = f(a) - f(n).mean(), f(b) - f(n).mean()
            correlation = (u * v).mean() / f(n).var()
            assert abs(correlation) < 5.5 / math.sqrt(count)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance_are_dropouts(p: float) -> None:
    x = torch.full((1 << 20,), 3.0)
    gaussian, plain = F.gaussian_dropout(x, p, seed=1), F.dropout(x, p, seed=1)
    deviation = 3 * math.sqrt(p / (1 - p))
    assert abs(float(gaussian.double().mean()) - 3) < 6 * deviation / 1024
    assert abs(float(gaussian.double().std() / plain.double().std()) - 1) < 0.01


# --- layouts and arguments ------------------------------------------------------------------------


def test_layouts(dtype: torch.dtype, backend: Backend) -> None:
    t = make((3, 5, 4, 6), dtype, backend)
    layouts = [
        t,
        torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        t.contiguous(memory_format=torch.channels_last),
        t.permute(3, 1, 0, 2),
        t[:, :, 1:, ::2],
        t[:, :1].expand(t.shape),
    ]
    for x in layouts:
        laid_out = torch.empty_like(x).copy_(x)
        y = F.gaussian_dropout(x, 0.4, seed=SEED)
        assert y.stride() == laid_out.stride()
        flat = laid_out.as_strided((x.numel(),), (1,))
        wanted = noisy(flat, normals(x.numel(), SEED), 0.4)
        assert torch.equal(y.as_strided((x.numel(),), (1,)), wanted)
        leaf = torch.ones_like(laid_out).requires_grad_()
        F.gaussian_dropout(leaf, 0.4, seed=SEED).backward(x)  # in the order of forward
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, y)


@pytest.mark.sanitizer
def test_misaligned_elements(dtype: torch.dtype, backend: Backend) -> None:
    # Around windows of 256 elements, which begin at a group of 8.
    for n in (1, 8, 250, 256, 263, 264, 519, 1031):
        for index_offset in (0, 3):
            t = make((n,), dtype, backend)
            x = torch.cat([t[:1], t])[1:]
            y = F.gaussian_dropout(x, 0.4, seed=SEED, index_offset=index_offset)
            assert torch.equal(y, noisy(x, normals(n, SEED, 0, index_offset), 0.4))


def test_arguments() -> None:
    x = torch.ones(2, 3)
    assert F.gaussian_dropout(x, 0.0) is x
    assert F.gaussian_dropout(x, 0.5, training=False) is x
    with pytest.raises(ValueError, match=r"gaussian_dropout: p must be below 1"):
        F.gaussian_dropout(x, 1.0)
    with pytest.raises(ValueError, match=r"gaussian_dropout: p must be within \[0, 1\]"):
        F.gaussian_dropout(x, -0.1)
    with pytest.raises(ValueError, match=r"gaussian_dropout: x has dtype torch\.int64"):
        F.gaussian_dropout(x.long())
    with pytest.raises(ValueError, match="index_offset must be an integer and not negative"):
        F.gaussian_dropout(x, index_offset=-1)
    with pytest.raises(ValueError, match="changed in place"):
        F.gaussian_dropout(x.requires_grad_(), inplace=True)


# --- inside torch ---------------------------------------------------------------------------------


def test_nothing_is_kept_for_backward() -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    x = torch.randn(2000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = F.gaussian_dropout(x)
    node: Any = y.grad_fn
    assert kept == []
    assert [v for v in vars(node).values() if isinstance(v, Tensor)] == []


def test_module() -> None:
    layer = nn.GaussianDropout(0.25)
    assert repr(layer) == "GaussianDropout(p=0.25, inplace=False)"
    assert nn.GaussianDropout(keep_prob=0.75).p == 0.25
    for arguments in ({"p": 1.0}, {"keep_prob": 0.0}, {"p": 0.5, "keep_prob": 0.5}):
        with pytest.raises(ValueError, match="GaussianDropout: p"):
            nn.GaussianDropout(**arguments)
    x = torch.randn(4, 6)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert layer.eval()(x) is x
    assert nn.GaussianDropout(0.5, True)(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.train()(x.bfloat16()).dtype is torch.bfloat16
