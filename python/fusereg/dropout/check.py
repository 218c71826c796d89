"""Rows of the inventory: dropout of elements, channels and samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.inventory import ANY_SHAPE, IMAGES, SEQUENCES, VOLUMES, Inputs, Operation, Pairs
from ..core.masks import SEED, P, dropped, kept_share, mask, mask_like, mask_of_rows
from . import functional
from .consistent import consistent_dropout

#: Alpha dropout replaces what is dropped by SELU's limit at minus infinity.
_LIMIT = -1.7580993408473766
#: A probability that draws of 16 bits would miss.
_SMALL_P = 0.001


def _masks(inputs: Inputs) -> Pairs:
    shape = ANY_SHAPE[inputs.size]
    pairs = []
    for p in (P, _SMALL_P):
        came = functional.dropout_mask(shape, p, SEED, device=inputs.device)
        pairs.append((came.to(inputs.dtype), mask(shape, p).double()))
    return pairs


def _alpha(x: Tensor, kept: Tensor) -> Tensor:
    keep = kept_share()
    a = math.sqrt(1 / (keep * (1 + (1 - keep) * _LIMIT**2)))
    return a * torch.where(kept, x, _LIMIT) - a * (1 - keep) * _LIMIT


_SEEDED = {"p": P, "seed": SEED}

OPERATIONS = [
    Operation(
        name="dropout_mask",
        formula="Philox4x32-7(seed, index) < keep",
        function=functional.dropout_mask,
        pairs=_masks,
    ),
    Operation(
        name="dropout",
        formula="keep ? x / (1 - p) : 0",
        function=functional.dropout,
        arguments=("input",),
        options=_SEEDED,
        reference=lambda x: dropped(x, mask_like(x)),
    ),
    Operation(
        name="dropout, draws of 32 bits",
        formula="the same for a p that 16 bits would miss",
        function=functional.dropout,
        arguments=("input",),
        options={"p": _SMALL_P, "seed": SEED},
        reference=lambda x: dropped(x, mask_like(x, _SMALL_P), _SMALL_P),
    ),
    Operation(
        name="dropout1d",
        formula="the same, a draw for each channel",
        function=functional.dropout1d,
        arguments=("input",),
        shapes=SEQUENCES,
        options=_SEEDED,
        reference=lambda x: dropped(x, mask_of_rows(x, 2)),
    ),
    Operation(
        name="dropout2d",
        formula="the same of images",
        function=functional.dropout2d,
        arguments=("input",),
        shapes=IMAGES,
        options=_SEEDED,
        reference=lambda x: dropped(x, mask_of_rows(x, 2)),
    ),
    Operation(
        name="dropout3d",
        formula="the same of volumes",
        function=functional.dropout3d,
        arguments=("input",),
        shapes=VOLUMES,
        options=_SEEDED,
        reference=lambda x: dropped(x, mask_of_rows(x, 2)),
    ),
    Operation(
        name="drop_path",
        formula="the same, a draw for each sample",
        function=functional.drop_path,
        arguments=("input",),
        shapes={k: v for k, v in ANY_SHAPE.items() if v},
        options=_SEEDED,
        reference=lambda x: dropped(x, mask_of_rows(x, 1)),
    ),
    Operation(
        name="alpha_dropout",
        formula="a * (keep ? x : alpha') + b",
        function=functional.alpha_dropout,
        arguments=("input",),
        options={**_SEEDED, "training": True},
        reference=lambda x: _alpha(x, mask_like(x)),
    ),
    Operation(
        name="feature_alpha_dropout",
        formula="the same, a draw for each channel",
        function=functional.feature_alpha_dropout,
        arguments=("input",),
        shapes=IMAGES,
        options={**_SEEDED, "training": True},
        reference=lambda x: _alpha(x, mask_of_rows(x, 2)),
    ),
    Operation(
        name="consistent_dropout",
        formula="a draw for all steps of a sequence",
        function=consistent_dropout,
        shapes=SEQUENCES,
        options={**_SEEDED, "dim": 1},
        reference=lambda x: dropped(x, mask((x.shape[0], 1, x.shape[2]))),
    ),
]
