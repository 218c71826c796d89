"""Which CUDA kernels a batch normalization would run: a function of numbers, so on any machine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusereg import _C

#: (multiprocessors, shared memory of one, of a block).
H200 = (132, 228 * 1024, 227 * 1024)
SMALL = (4, 64 * 1024, 48 * 1024)
NOTHING = (4, 16 * 1024, 16 * 1024)

THREADS = 256
OCTET = 8
#: Static shared memory that the plan leaves room for, and what a block costs by itself.
STATIC = {False: 4 * 1024, True: 28 * 1024}
RESERVED = 1024


def plan(
    layout: tuple[int, int, int], dtype: str, device: tuple[int, int, int] = H200, **more: Any
) -> Any:
    outer, channels, inner = layout
    group_rows = more.pop("group_rows", max(outer, 1))
    backward = more.pop("backward", False)
    return _C.batch_norm_plan((outer, channels, inner, group_rows), dtype, backward, device, **more)


def octets_of_a_slab(layout: tuple[int, int, int], tiling: Any) -> int:
    return layout[0] * int(tiling["width"])


# ResNet-50's layers at N = 256 in bfloat16: blocks of a team, teams, octets that a thread keeps.
# By hand: half of a multiprocessor's 228 KB holds 27 octets of 16 bytes for each of 256 threads
# beside 4 KB of static memory, or 21 beside 28 KB; 264 blocks are resident.
NCHW = {
    (256, 64, 112 * 112): (66, 4, 24),
    (256, 64, 56 * 56): (16, 16, 25),
    (256, 256, 56 * 56): (16, 16, 25),
    (256, 512, 28 * 28): (4, 66, 25),
    (256, 1024, 14 * 14): (3, 88, 18),
    (256, 2048, 7 * 7): (3, 88, 18),
}


@pytest.mark.parametrize("layout", NCHW, ids=str)
def test_resnet_50_on_an_h200(layout: tuple[int, int, int]) -> None:
    p = plan(layout, "bfloat16")
    tiling = p["reduce"]
    assert p["kind"] == "resident"
    assert (tiling["splits"], p["teams"], p["steps"]) == NCHW[layout]
    assert tiling["wide"]
    # 14 x 14 and 7 x 7 are no multiples of 8: whole vectors over 2 and 8 channels.
    packs = {14 * 14: (True, 2, 49), 7 * 7: (True, 8, 49)}
    assert (tiling["columns"], tiling["pack"], tiling["width"]) == packs.get(
        layout[2], (False, 1, layout[2] // OCTET)
    )
    assert p["shared_bytes"] == p["steps"] * THREADS * OCTET * 2


def test_channels_last_on_an_h200() -> None:
    # A slab of 64 channels of 7 x 7 and 14 x 14 fits; of 28 x 28 one of 32 channels does (whole
    # 64-byte sectors); what is larger than all shared memory together does not.
    for side, channels, width in ((7, 2048, 8), (14, 1024, 8), (28, 512, 4), (56, 256, None)):
        p = plan((256 * side * side, channels, 1), "bfloat16")
        if width is None:
            assert p["kind"] == "streaming"
        else:
            assert p["kind"] == "resident"
            assert p["reduce"]["width"] == width
            assert p["reduce"]["pack"] == width * OCTET
            assert p["reduce"]["slabs"] == channels // (width * OCTET)
    # 4-byte elements keep whole sectors with fewer channels.
    assert plan((50_000, 1024, 1), "float32")["reduce"]["width"] == 8
    assert plan((200_000, 1024, 1), "float32")["reduce"]["width"] == 2


def test_backward_keeps_two_tensors() -> None:
    layout = (256, 512, 28 * 28)
    forward, backward = plan(layout, "bfloat16"), plan(layout, "bfloat16", backward=True)
    assert backward["kind"] == "resident"
    assert backward["reduce"]["splits"] >= 2 * forward["reduce"]["splits"] - 1
    assert backward["shared_bytes"] == backward["steps"] * THREADS * OCTET * 2 * 2


def test_small_devices() -> None:
    assert plan((256, 64, 112 * 112), "bfloat16", SMALL)["kind"] == "streaming"
    fits = plan((4, 64, 28 * 28), "bfloat16", SMALL)
    assert fits["kind"] == "resident"
    assert fits["teams"] * fits["reduce"]["splits"] <= 2 * SMALL[0] or fits["reduce"]["splits"] == 1
    for layout in ((4, 64, 28 * 28), (4, 64, 1), (1, 1, 8)):
        assert plan(layout, "float32", NOTHING)["kind"] == "streaming"


def test_what_resident_kernels_cannot_do() -> None:
    layout = (256, 512, 28 * 28)
    assert plan(layout, "bfloat16", resident=False)["kind"] == "streaming"
    assert plan(layout, "bfloat16", aligned=False)["kind"] == "streaming"
    assert plan(layout, "float64")["kind"] == "streaming"
    assert plan((256, 3, 1), "float32")["kind"] == "streaming"
    assert plan((0, 512, 28 * 28), "bfloat16")["kind"] == "streaming"


def test_lines_that_are_no_whole_octets() -> None:
    # Octets lie at multiples of 8 of memory: a line of 35 x 35 touches up to 154 or 155 of them.
    t = plan((8, 64, 35 * 35), "float16")["reduce"]
    assert (t["columns"], t["wide"], t["width"]) == (False, True, (35 * 35 + 14) // 8)
    # With bits, a line's bytes begin with the line; a mask needs lines of their own as well.
    t = plan((8, 64, 35 * 35), "float16", bits=True)["reduce"]
    assert (t["columns"], t["wide"], t["width"]) == (False, False, 154)
    t = plan((8, 64, 7 * 7), "float16", bits=True)["reduce"]
    assert (t["columns"], t["wide"], t["width"]) == (False, False, 7)
    t = plan((8, 64, 7 * 7), "float16", mask=True)["reduce"]
    assert (t["columns"], t["wide"]) == (False, True)
    # Rows that do not begin at multiples of 8 cannot be read in common octets.
    t = plan((8, 63, 7 * 7), "float16")["reduce"]
    assert (t["columns"], t["wide"]) == (False, True)


@given(
    outer=st.integers(0, 300_000),
    channels=st.integers(1, 5000),
    inner=st.sampled_from([1, 2, 4, 7, 16, 49, 64, 196, 289, 784, 1225, 3136]),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    groups=st.integers(1, 9),
    backward=st.booleans(),
    bits=st.booleans(),
    device=st.sampled_from([H200, SMALL, (1, 100 * 1024, 99 * 1024)]),
)
def test_every_plan_covers_x_and_fits_the_device(
    outer: int,
    channels: int,
    inner: int,
    dtype: str,
    groups: int,
    backward: bool,
    bits: bool,
    device: tuple[int, int, int],
) -> None:
    rows = max(-(-outer // groups), 1)
    p = plan((outer, channels, inner), dtype, device, group_rows=rows, backward=backward, bits=bits)
    size = {"float64": 8, "float32": 4}.get(dtype, 2)
    for tiling in (p["reduce"],) if p["kind"] == "resident" else (p["reduce"], p["apply"]):
        width, splits, share = tiling["width"], tiling["splits"], tiling["share"]
        in_group = min(rows, outer)
        units = in_group if tiling["columns"] else in_group * width
        assert (splits - 1) * share < max(units, 1) <= splits * share
        assert tiling["slabs"] * tiling["pack"] >= channels
        assert (tiling["slabs"] - 1) * tiling["pack"] < channels
        if tiling["columns"]:
            assert width * OCTET >= min(tiling["pack"], channels) * inner
            assert 1 <= tiling["rows_at_once"] * width <= THREADS
            assert share % tiling["rows_at_once"] == 0 or splits == 1
        elif tiling["wide"] and inner % OCTET:
            # A line that begins at the last element of an octet.
            assert width == -(-(inner + OCTET - 1) // OCTET)
        else:
            assert width == -(-inner // OCTET)
    if p["kind"] == "resident":
        t = p["reduce"]
        step = THREADS * OCTET * size * (2 if backward else 1)
        assert p["shared_bytes"] == p["steps"] * step
        per_block = p["shared_bytes"] + STATIC[t["columns"]] + RESERVED
        assert 2 * per_block <= device[1]
        assert p["shared_bytes"] <= device[2]
        threads = t["rows_at_once"] if t["columns"] else THREADS
        assert p["steps"] * threads >= t["share"]
        if t["splits"] > 1:
            assert 1 <= p["teams"] * t["splits"] <= 2 * device[0]
        else:
            assert p["teams"] == t["slabs"] * t["groups"]


def test_counters() -> None:
    # A counter for each slab, while there are 8000.
    assert plan((1, 8000, 8), "float32")["reduce"]["bundle"] == 1
    assert plan((1, 8001, 8), "float32")["reduce"]["bundle"] == 2
    assert plan((1, 80_000, 8), "float32")["reduce"]["bundle"] == 10
    assert plan((100, 500_000, 1), "float32")["reduce"]["bundle"] == 1
    with pytest.raises(ValueError, match="are too many"):
        plan((1, 1, 2**34), "float32")


def test_forced_kinds() -> None:
    layout = (4, 64, 28 * 28)
    try:
        _C.batch_norm_force("streaming")
        assert plan(layout, "float32")["kind"] == "streaming"
        _C.batch_norm_force("resident", 3)
        assert plan(layout, "float32")["reduce"]["splits"] == 3
    finally:
        _C.batch_norm_force("")
    with pytest.raises(ValueError, match=r'"streaming" or "resident", got "fast"'):
        _C.batch_norm_force("fast")
    with pytest.raises(ValueError, match="layout must hold sizes"):
        plan((4, 0, 1), "float32")
    with pytest.raises(ValueError, match="dtype must be a floating-point one, got int8"):
        plan(layout, "int8")
