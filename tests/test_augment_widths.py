"""Rows of every length: what loads vectors has the bits of single pixels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import augment_reference as reference
from augment_reference import FILL_MODES, LAM, MIX, PARTNER
from conftest import Backend
from test_augment import ALL_DTYPES, FORMATS, images, numbers, run

LAID = ((3, 0), (3, 1), (1, 0), (4, 0), (4, 1), (5, 0))
OUT = (9, 37)


def at_offset(x: Tensor, offset: int) -> Tensor:
    """The same image, ``offset`` elements behind a boundary."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    return room[offset:].as_strided(x.shape, x.stride()).copy_(x)


def matrices(kind: str, w: int, h: int) -> Tensor:
    """The whole image mirrored and a crop, in ``kind``; some of both outside of the image."""
    across, down = w / OUT[1], h / OUT[0]
    whole = torch.tensor([[-across * 1.1, 0, w - 0.3], [0, down, 0.2]], dtype=torch.float64)
    crop = torch.tensor([[across / 2, 0, w / 3], [0, -down * 1.3, h - 1.0]], dtype=torch.float64)
    found = torch.stack([whole, crop])
    if kind == "turned":
        found[:, 0, 1] = torch.tensor([0.4, -2.0])
        found[:, 1, 0] = torch.tensor([-0.1, 1.5])
        found[1] *= 1.7
    elif kind == "wide":  # more taps than a tile has room for
        found[:, :, :2] *= 8.0
        found[1, 0, 1] = 7.0
    return found


@pytest.mark.parametrize("kind", ["along the axes", "turned", "wide", "at points"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_rows_of_every_length_have_the_bits_of_single_pixels(
    dtype: torch.dtype, kind: str, backend: Backend
) -> None:
    """A batch is filtered by tiles; the pixels of a list one by one."""
    how = ("bilinear", "bicubic") if kind != "at points" else ("nearest", "bilinear", "bicubic")
    cases = itertools.cycle(itertools.product(LAID, FILL_MODES, (0, 1, 3), how))
    for w in range(1, 41):
        # No number of values has a factor in common with this step, so that all are met.
        for _ in range(7):
            (c, laid), fill_mode, offset, interpolation = next(cases)
        for width, shift in ((w, offset), (4 * w, 0)) if w <= 10 else ((w, offset),):
            h = 1 + 11 * w % 36
            x = images((2, c, h, width), dtype, backend)
            x = at_offset(x.contiguous(memory_format=FORMATS[laid]), shift)
            if dtype is not torch.uint8:
                x[0, 0, h // 2, width // 2] = float("nan")
            records = reference.identity_records(2, matrices(kind, width, h))
            records[0, PARTNER], records[0, LAM] = 1.0, 0.25
            records[0, MIX : MIX + 4] = torch.tensor([3.0, 1.0, 20.0, 8.0])
            options = {"antialias": kind != "at points", "color": w % 2 == 0, **numbers(c, dtype)}
            y = run(x, records, OUT, interpolation, fill_mode, **options)
            one_by_one = list(x.cpu().split(1))
            wanted = run(
                x.cpu(), records, OUT, interpolation, fill_mode, several=one_by_one, **options
            )
            assert torch.equal(y.cpu().nan_to_num(7e4), wanted.nan_to_num(7e4)), (width, c, laid)
