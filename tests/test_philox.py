"""Philox4x32: Random123's known answers, every implementation against plain Python, quality."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import philox_quality
import reference_philox
from conftest import Backend
from fusereg import _C
from fusereg.core import masks

M32, M64 = 2**32 - 1, 2**64 - 1

#: Rounds, counter, key and result, lowest word first: with 10, Random123's tests/kat_vectors.
KNOWN_ANSWERS = [
    (10, [0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [M32] * 4, [M32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        10,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # the digits of pi
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
    (7, [0, 0, 0, 0], [0, 0], [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
]


def join(low: int, high: int) -> int:
    return low | high << 32


@pytest.mark.parametrize(("rounds", "counter", "key", "wanted"), KNOWN_ANSWERS)
def test_known_answers(
    rounds: int, counter: list[int], key: list[int], wanted: list[int], backend: Backend
) -> None:
    assert list(reference_philox.philox(join(*key), (*counter,), rounds)) == wanted  # type: ignore[arg-type]
    for vector in (False, True):
        words = _C.philox_words(join(*key), join(*counter[:2]), join(*counter[2:]), vector, rounds)
        assert words[:4] == wanted


@given(
    key=st.integers(0, M64),
    low=st.integers(0, M64),
    high=st.integers(0, M64),
    rounds=st.sampled_from([7, 10]),
)
def test_scalar_and_vectors_agree_with_plain_python(
    key: int, low: int, high: int, rounds: int, backend: Backend
) -> None:
    wanted: list[int] = []
    words = _C.philox_words(key, low, high, True, rounds)
    chunks = [(high + chunk) & M64 for chunk in range(len(words) // 4)]
    for chunk in chunks:
        counter = low & M32, low >> 32, chunk & M32, chunk >> 32
        wanted += reference_philox.philox(key, counter, rounds)
    assert words == wanted, "also where the chunk's 64 bits wrap around"
    assert _C.philox_words(key, low, high, False, rounds) == wanted[:4]
    signed = torch.tensor([(chunk + 2**63) % 2**64 - 2**63 for chunk in chunks])
    assert masks.philox(key, low, signed, rounds).flatten().tolist() == wanted


def test_a_vector_call_serves_as_many_chunks_as_the_registers_have_lanes(backend: Backend) -> None:
    lanes = {"baseline": 2, "avx2": 4, "avx512": 8}
    if backend.on_host:
        pytest.skip("the host build of the CUDA kernels has no vectors")
    assert len(_C.philox_words(1, 2, 3, True, 7)) == 4 * lanes[_C.cpu_isa()]


def test_negative_numbers_wrap_and_others_are_refused() -> None:
    assert _C.philox_words(-1, -1, -1, False, 10) == KNOWN_ANSWERS[1][3]
    with pytest.raises(TypeError, match="key must be an integer, got float"):
        _C.philox_words(1.0, 0, 0, False, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds must be 7 or 10, got 6"):
        _C.philox_words(0, 0, 0, False, 6)


# Of 24,576 cells of random bits, the largest deviation is 4 to 4.7.
def test_every_bit_of_seed_offset_and_index_changes_half_the_bits_of_a_mask() -> None:
    assert philox_quality.avalanche(masks.MASK_ROUNDS, 2048).abs().max() < 5.5


def test_with_six_rounds_they_would_not() -> None:
    assert philox_quality.avalanche(6, 2048).abs().max() > 20


# Passed by random bits but for 1 time in 6000: there are 384 cells (bits of a counter) and 24.
@pytest.mark.parametrize(("p", "limit"), [(0.5, 5.06), (0.1, 4.5)])
def test_masks_of_neighboring_chunks_offsets_and_seeds_are_independent(
    p: float, limit: float
) -> None:
    assert philox_quality.neighbors(masks.MASK_ROUNDS, 2**15, p).abs().max() < limit
    assert philox_quality.neighbors(4, 2**15, p).abs().max() > 20, "what the test sees"
