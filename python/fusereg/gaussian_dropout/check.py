"""Rows of the inventory: Gaussian dropout, multiplication by normal noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.inventory import Inputs, Operation, Pairs
from ..core.masks import SEED, P
from . import functional


def _noise(x: Tensor) -> Tensor:
    """Return the noise for a tensor, which float64 holds without rounding."""
    ones = torch.ones_like(x, requires_grad=False)
    return functional.gaussian_dropout(ones, P, seed=SEED)


def _pairs(inputs: Inputs) -> Pairs:
    """Compare result and gradient with the noise times x, and the noise with its moments."""
    (x,) = _ROW.sample(inputs)
    normals = (_noise(x.to(inputs.wide)).double().cpu() - 1.0) / math.sqrt(P / (1 - P))
    one = torch.ones((), dtype=torch.float64)
    # The mean of n numbers is 15 standard errors off only if something is wrong.
    bound = 15.0 / math.sqrt(x.numel())
    moments = [
        torch.where((normals.pow(power).mean() - wanted).abs() < scale * bound, one, math.inf)
        for power, wanted, scale in ((1, 0.0, 1.0), (2, 1.0, 1.5), (4, 3.0, 10.0))
    ]
    return [*_ROW.compare([x]), *((moment, one) for moment in moments)]


_ROW = Operation(
    name="gaussian_dropout",
    formula="x * (1 + sqrt(p / (1 - p)) * n)",
    function=functional.gaussian_dropout,
    options={"p": P, "seed": SEED},
    reference=lambda x: x * _noise(x),
    pairs=_pairs,
)
OPERATIONS = [_ROW]
