"""Masks of every dtype: their pixels are copied, bit for bit, by the kernel that copies words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import augment_reference as reference
from augment_reference import ERASE, FILL_MODES, LAM, MIX, PARTNER, PERSPECTIVE
from conftest import Backend
from fusereg.augment import AugmentParams

MASK_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
SIZE, OUT = (13, 37), (11, 41)  # of the result two whole blocks of 16 and a part of one


def geometry(n: int) -> AugmentParams:
    """A turn, flips, whole-pixel shifts, a crop that is resized, a perspective; CutMix of some."""
    m = torch.eye(2, 3, dtype=torch.float64).repeat(n, 1, 1)
    m[0] += 0.3 * torch.randn(2, 3, dtype=torch.float64)
    m[1] = torch.tensor([[-1.0, 0.0, 36.0], [0.0, 1.0, 2.0]])
    m[2] = torch.tensor([[0.61, 0.0, 3.3], [0.0, 1.71, -4.2]])
    m[3] = torch.tensor([[1.0, 0.0, -7.0], [0.0, 1.0, 0.0]])
    records = reference.identity_records(n, m)
    records[4, PERSPECTIVE:] = 0.01
    records[:, ERASE : ERASE + 4] = torch.tensor([3.0, 2.0, 20.0, 5.0])
    records[0, PARTNER], records[3, PARTNER] = 2.0, 4.0
    records[[0, 3], LAM] = 0.0
    records[[0, 3], MIX : MIX + 4] = torch.tensor([5.0, 1.0, 29.0, 9.0], dtype=torch.float64)
    drawn = torch.zeros(n, 16, dtype=torch.float64), torch.zeros(n, 2, dtype=torch.int64)
    return AugmentParams(records, *drawn, torch.arange(n), SIZE, OUT)


def places(params: AugmentParams, fill_mode: str, backend: Backend) -> Tensor:
    """Which pixel of the batch each pixel of the result is, by the kernel of floats; -1: filled."""
    n = len(params)
    numbers = torch.arange(n * SIZE[0] * SIZE[1], dtype=torch.float32).reshape(n, *SIZE)
    numbers = numbers.to(backend.device).requires_grad_()
    return params.mask(numbers, fill=-1, fill_mode=fill_mode).detach().cpu().long()


@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_pixels_of_every_dtype_are_copied_bit_for_bit(
    dtype: torch.dtype, fill_mode: str, backend: Backend
) -> None:
    params = geometry(5)
    if dtype is torch.bool:
        mask = torch.rand(5, *SIZE) < 0.5
    else:  # any bits: NaN of every kind, integers beyond 2^53
        width = torch.empty((), dtype=dtype).element_size()
        mask = torch.randint(0, 256, (5, SIZE[0], SIZE[1] * width), dtype=torch.uint8).view(dtype)
    fill = 1 if dtype is torch.bool else 3
    moved = params.mask(mask.to(backend.device), fill=fill, fill_mode=fill_mode).cpu()
    index = places(params, fill_mode, backend)
    last = torch.full((1,), fill, dtype=dtype).view(torch.uint8)
    table = torch.cat([mask.reshape(-1, 1).view(torch.uint8), last[None]])
    assert moved.dtype is dtype
    assert moved.shape == (5, *OUT)
    assert torch.equal(moved.unsqueeze(-1).view(torch.uint8), table[index])
    # As a channel of several, and in another layout.
    several = torch.stack([mask, mask], 1).to(backend.device)
    channels = params.mask(several, fill=fill, fill_mode=fill_mode).cpu()
    assert torch.equal(channels[:, 1].contiguous().view(torch.uint8), moved.view(torch.uint8))
    strided = mask.transpose(1, 2).contiguous().transpose(1, 2).to(backend.device)
    again = params.mask(strided, fill=fill, fill_mode=fill_mode).cpu()
    assert torch.equal(again.view(torch.uint8), moved.view(torch.uint8))
