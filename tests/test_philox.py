"""Philox4x32-10: Random123's known answers, and every implementation against plain Python."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference_philox
from conftest import Backend
from fusereg import _C

M32, M64 = 2**32 - 1, 2**64 - 1

#: Counter, key and result, lowest word first: Random123's tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([M32] * 4, [M32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # the digits of pi
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def join(low: int, high: int) -> int:
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_known_answers(
    counter: list[int], key: list[int], wanted: list[int], backend: Backend
) -> None:
    assert list(reference_philox.philox(join(*key), (*counter,))) == wanted  # type: ignore[arg-type]
    for vector in (False, True):
        words = _C.philox_words(join(*key), join(*counter[:2]), join(*counter[2:]), vector)
        assert words[:4] == wanted


@given(key=st.integers(0, M64), low=st.integers(0, M64), high=st.integers(0, M64))
def test_scalar_and_vectors_agree_with_plain_python(
    key: int, low: int, high: int, backend: Backend
) -> None:
    wanted: list[int] = []
    words = _C.philox_words(key, low, high, True)
    for chunk in range(len(words) // 4):
        counter = join(low, 0), (high + chunk) & M64
        c = (counter[0] & M32, low >> 32, counter[1] & M32, counter[1] >> 32)
        wanted += reference_philox.philox(key, c)
    assert words == wanted, "also where the chunk's 64 bits wrap around"
    assert _C.philox_words(key, low, high, False) == wanted[:4]


def test_a_vector_call_serves_as_many_chunks_as_the_registers_have_lanes(backend: Backend) -> None:
    lanes = {"baseline": 2, "avx2": 4, "avx512": 8}
    if backend.on_host:
        pytest.skip("the host build of the CUDA kernels has no vectors")
    assert len(_C.philox_words(1, 2, 3, True)) == 4 * lanes[_C.cpu_isa()]


def test_negative_numbers_wrap_and_others_are_refused() -> None:
    assert _C.philox_words(-1, -1, -1, False) == KNOWN_ANSWERS[1][2]
    with pytest.raises(TypeError, match="key must be an integer, got float"):
        _C.philox_words(1.0, 0, 0, False)  # type: ignore[arg-type]
