"""Philox4x32 and dropout's masks in plain Python: what every kernel must give, bit for bit."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF

#: Of masks; numbers have 10.
MASK_ROUNDS = 7


def philox(
    key: int, counter: tuple[int, int, int, int], rounds: int = 10
) -> tuple[int, int, int, int]:
    """The 4 words of a counter (its low word first) under a 64-bit key."""
    k0, k1 = key & _M32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _M32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _M32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


def threshold(p: float) -> tuple[int, int]:
    """(bits of a draw, threshold): an element is kept where its draw is below the threshold."""
    keep = 1.0 - p
    if keep == 0.0:
        return 16, 0
    if keep == 1.0:  # for a p of 1e-17
        return 32, 2**32 - 1
    for bits in (1, 2):
        if (keep * 2**bits).is_integer():
            return bits, int(keep * 2**bits)
    coarse = round(keep * 2**16)
    if abs(coarse - keep * 2**16) <= min(p, keep) * 64:
        return 16, coarse
    return 32, min(max(round(keep * 2**32), 1), 2**32 - 1)


def keep_probability(p: float) -> float:
    bits, limit = threshold(p)
    return math.ldexp(limit, -bits)


@functools.lru_cache(maxsize=64)
def _digits(seed: int, low: int, chunk: int, digit: int) -> int:
    """Digits of the draws of 128 elements, where a draw has one or two."""
    high = chunk + digit * 2**57
    counter = (low & _M32, low >> 32, high & _M32, high >> 32)
    words = philox(seed % 2**64, counter, MASK_ROUNDS)
    return ~sum(word << 32 * i for i, word in enumerate(words))


def _digit(seed: int, low: int, index: int, digit: int) -> int:
    return _digits(seed, low, index // 128, digit) >> index % 128 & 1


def mask(count: int, p: float, seed: int, offset: int, index_offset: int = 0) -> Tensor:
    """Whether each of the elements index_offset, index_offset + 1, ... is kept."""
    bits, limit = threshold(p)
    low = (offset % 2**64) // 4
    kept = []
    if bits <= 2:
        for index in range(index_offset, index_offset + count):
            draw = sum(_digit(seed, low, index, digit) << digit for digit in range(bits))
            kept.append(draw < limit)
        return torch.tensor(kept, dtype=torch.bool)
    per_chunk = 128 // bits
    chunk, words = -1, (0, 0, 0, 0)
    for index in range(index_offset, index_offset + count):
        if index // per_chunk != chunk:
            chunk = index // per_chunk
            high = chunk % 2**64
            counter = (low & _M32, low >> 32, high & _M32, high >> 32)
            words = philox(seed % 2**64, counter, MASK_ROUNDS)
        at = index % per_chunk
        draw = words[at] if bits == 32 else words[at // 2] >> 16 * (at % 2) & 0xFFFF
        kept.append(draw < limit)
    return torch.tensor(kept, dtype=torch.bool)
