"""Rows of the inventory: dropout of elements, channels and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.inventory import (
    ANY_SHAPE,
    IMAGES,
    SEQUENCES,
    VOLUMES,
    Inputs,
    Operation,
    Pairs,
    Shape,
)
from ..core.masks import SEED, P, dropped, kept_share, mask, mask_like, mask_of_rows
from . import functional
from .consistent import consistent_dropout

#: Alpha dropout replaces what is dropped by SELU's limit at minus infinity.
_LIMIT = -1.7580993408473766
#: A probability that draws of 16 bits would miss, and one for which two digits are enough.
_SMALL_P = 0.001
_ROUND_P = 0.75


def _masks(inputs: Inputs) -> Pairs:
    shape = ANY_SHAPE[inputs.size]
    pairs = []
    for p in (P, _SMALL_P, _ROUND_P, 0.5):
        came = functional.dropout_mask(shape, p, SEED, device=inputs.device)
        pairs.append((came.to(inputs.dtype), mask(shape, p).double()))
    return pairs


def _alpha(x: Tensor, kept: Tensor) -> Tensor:
    keep = kept_share()
    a = math.sqrt(1 / (keep * (1 + (1 - keep) * _LIMIT**2)))
    return a * torch.where(kept, x, _LIMIT) - a * (1 - keep) * _LIMIT


def _row(
    name: str,
    formula: str,
    kept: Callable[[Tensor], Tensor],
    shapes: Mapping[str, Shape] = ANY_SHAPE,
    result: Callable[[Tensor, Tensor], Tensor] = dropped,
    **options: Any,
) -> Operation:
    """Return the row of a function of ``input``: ``result(input, kept(input))``."""
    return Operation(
        name=name,
        formula=formula,
        function=getattr(functional, name.partition(",")[0]),
        arguments=("input",),
        shapes=shapes,
        options={"p": P, "seed": SEED, **options},
        reference=lambda x: result(x, kept(x)),
    )


def _of_rows(dims: int) -> Callable[[Tensor], Tensor]:
    return lambda x: mask_of_rows(x, dims)


OPERATIONS = [
    Operation(
        name="dropout_mask",
        formula="Philox4x32-7(seed, index) < keep",
        function=functional.dropout_mask,
        pairs=_masks,
    ),
    _row("dropout", "keep ? x / (1 - p) : 0", mask_like),
    _row(
        "dropout, draws of 32 bits",
        "the same for a p that 16 bits would miss",
        lambda x: mask_like(x, _SMALL_P),
        result=lambda x, kept: dropped(x, kept, _SMALL_P),
        p=_SMALL_P,
    ),
    _row(
        "dropout, draws of two digits",
        "the same for a p of which two binary digits say all",
        lambda x: mask_like(x, _ROUND_P),
        result=lambda x, kept: dropped(x, kept, _ROUND_P),
        p=_ROUND_P,
    ),
    _row("dropout1d", "the same, a draw for each channel", _of_rows(2), SEQUENCES),
    _row("dropout2d", "the same of images", _of_rows(2), IMAGES),
    _row("dropout3d", "the same of volumes", _of_rows(2), VOLUMES),
    _row(
        "drop_path",
        "the same, a draw for each sample",
        _of_rows(1),
        {k: v for k, v in ANY_SHAPE.items() if v},
    ),
    _row("alpha_dropout", "a * (keep ? x : alpha') + b", mask_like, result=_alpha, training=True),
    _row(
        "feature_alpha_dropout",
        "the same, a draw for each channel",
        _of_rows(2),
        IMAGES,
        _alpha,
        training=True,
    ),
    Operation(
        name="consistent_dropout",
        formula="a draw for all steps of a sequence",
        function=consistent_dropout,
        shapes=SEQUENCES,
        options={"p": P, "seed": SEED, "dim": 1},
        reference=lambda x: dropped(x, mask((x.shape[0], 1, x.shape[2]))),
    ),
]
