"""How random Philox's words are at the counters that masks use, for a number of rounds.

``python tests/philox_quality.py [log2 of the counters]`` prints the table of
docs/random-numbers.md: where 2^18 counters take minutes, the tests take few.

avalanche
    One of the 192 bits of (seed, offset / 4, chunk) changes. How often does each of the 128 bits of
    the result change? Of random bits, half the time.
neighbors
    Is an element kept more (or less) often where the same element of the next chunk, the next
    offset or the next seed is kept?

Both return deviations in standard deviations of independent random bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fusereg.core.masks import philox

_INPUT_BITS = 192
_SEED = 20_261_129


def _counters(count: int) -> list[Tensor]:
    """Seeds, offsets / 4 and chunks, as a training run has them: small and consecutive numbers."""
    at = torch.arange(count)
    ones = at
    for shift in (16, 8, 4, 2, 1):
        ones = ones ^ ones >> shift
    # With an even number of ones: changing a bit of one never gives another, a pair counts once.
    return [torch.full_like(at, _SEED), at // 1024, at % 1024 * 2 + ones % 2]


def _words(inputs: list[Tensor], rounds: int) -> Tensor:
    seed, low, chunk = inputs
    return philox(seed, low, chunk, rounds)


def avalanche(rounds: int, count: int) -> Tensor:
    """Deviations of how often a bit of the result changes, (192, 128)."""
    inputs = _counters(count)
    before = _words(inputs, rounds)
    deviations = torch.empty(_INPUT_BITS, 128)
    for bit in range(_INPUT_BITS):
        changed = list(inputs)
        # The last bit of 64 is the sign.
        changed[bit // 64] = changed[bit // 64] ^ ((1 << bit % 64) - (bit % 64 == 63) * 2**64)
        flips = before ^ _words(changed, rounds)
        changes = torch.stack([(flips >> b & 1).sum(0) for b in range(32)], dim=1)
        deviations[bit] = (changes.flatten() - count / 2) / (count**0.5 / 2)
    return deviations


def neighbors(rounds: int, count: int, p: float) -> Tensor:
    """Deviations of the correlations with the next chunk, offset and seed, a row each."""
    threshold = round((1.0 - p) * 2**16)
    keep = threshold / 2**16

    def kept(inputs: list[Tensor]) -> Tensor:
        words = _words(inputs, rounds)
        if p == 0.5:  # a bit an element
            return (words.unsqueeze(2) >> torch.arange(32) & 1).flatten(1).double() - keep
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten(1)
        return (halves < threshold).double() - keep

    inputs = _counters(count)
    here = kept(inputs)
    rows = []
    for changed in (2, 1, 0):
        there = kept([x + (i == changed) for i, x in enumerate(inputs)])
        rows.append((here * there).sum(0) / (count**0.5 * keep * (1.0 - keep)))
    return torch.stack(rows)


def main(log2_count: int) -> None:
    """Print the table."""
    count = 2**log2_count
    print(f"2^{log2_count} counters; rounds: avalanche, cells over 5; neighbors p = 0.5, 0.1")
    for rounds in (4, 5, 6, 7, 8, 10):
        cells = avalanche(rounds, count).abs()
        pairs = [neighbors(rounds, count, p).abs().max().item() for p in (0.5, 0.1)]
        most, many = cells.max().item(), int((cells > 5).sum())
        print(f"{rounds}: {most:.1f}, {many}; {pairs[0]:.1f}, {pairs[1]:.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 18)
