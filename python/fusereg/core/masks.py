"""Dropout masks computed with torch alone: the reference for every kernel that drops."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _C

P = 0.3
SEED = 5

#: Philox's rounds where a draw only decides whether an element is kept.
MASK_ROUNDS = 7

_M32 = 0xFFFFFFFF


def kept_share(p: float = P) -> float:
    """Return 1 - p as the kernels round it: a multiple of 2^-16 or 2^-32."""
    return _C.dropout_constants(p, False)[2]


def philox(
    seed: int | Tensor, low: int | Tensor, high: Tensor, rounds: int = MASK_ROUNDS
) -> Tensor:
    """Return the 4 words of Philox4x32 for each counter (low, high), one row each.

    See Salmon et al. 2011. The words are int64: products wrap, and what is shifted is masked, so
    that they equal those of 32-bit words.
    """
    zeros = torch.zeros_like(high)
    k0, k1 = seed & _M32, seed >> 32 & _M32
    c0, c1 = zeros + (low & _M32), zeros + (low >> 32 & _M32)
    c2, c3 = high & _M32, high >> 32 & _M32
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _M32) ^ c1 ^ k0,
            product1 & _M32,
            ((product0 >> 32) & _M32) ^ c3 ^ k1,
            product0 & _M32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return torch.stack((c0, c1, c2, c3), dim=1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be used outside of it
def mask(shape: tuple[int, ...], p: float = P, seed: int = SEED) -> Tensor:
    """Return which elements of a contiguous tensor are kept, on the CPU."""
    count = math.prod(shape)
    keep = 1.0 - p
    for digits in (1, 2):
        m = keep * 2**digits
        if 0.0 < m < 2**digits and m.is_integer():
            return _mask_of_digits(count, digits, int(m), seed).reshape(shape)
    limit = round((1.0 - p) * 2**16)
    if abs(limit - (1.0 - p) * 2**16) <= min(p, 1.0 - p) * 64:
        words = philox(seed, 0, torch.arange((count + 7) // 8, device="cpu"))
        draws = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    else:
        limit = round((1.0 - p) * 2**32)
        draws = philox(seed, 0, torch.arange((count + 3) // 4, device="cpu"))
    return (draws.flatten()[:count] < limit).reshape(shape)


def _mask_of_digits(count: int, digits: int, limit: int, seed: int) -> Tensor:
    """Return a mask of draws with so many digits, each the complement of a bit of Philox."""
    chunks = torch.arange((count + 127) // 128, device="cpu")
    draws = torch.zeros(1, dtype=torch.int64, device="cpu")
    for digit in range(digits):
        words = philox(seed, 0, chunks + (digit << 57))
        bits = words.unsqueeze(2) >> torch.arange(32, device="cpu") & 1
        draws = draws + (1 - bits.flatten() << digit)
    return draws[:count] < limit


def mask_like(x: Tensor, p: float = P, seed: int = SEED) -> Tensor:
    """Return which elements of x are kept where they are counted in memory order."""
    return mask((x.numel(),), p, seed).as_strided(x.shape, torch.empty_like(x).stride())


def mask_of_rows(x: Tensor, dims: int, p: float = P, seed: int = SEED) -> Tensor:
    """Return which rows are kept, one for each index of the first dimensions; broadcasts to x."""
    return mask((*x.shape[:dims], *(1,) * (x.dim() - dims)), p, seed)


def dropped(x: Tensor, kept: Tensor, p: float = P) -> Tensor:
    """Return x / (1 - p) where it is kept and 0 elsewhere."""
    return torch.where(kept, x / kept_share(p), 0.0)
