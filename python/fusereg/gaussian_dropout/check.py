"""Gaussian dropout: multiplication by normal noise."""

from __future__ import annotations

import math

import torch

from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.cli.checks._masks import SEED, P


@kernel_check("gaussian_dropout", "x * (1 + sqrt(p / (1 - p)) * n)")
def _gaussian_dropout(inputs: Inputs) -> Pairs:
    """Result and gradient have the same noise, and the noise has its moments.

    The noise is read in float64, where ones times it lose nothing.
    """
    x = inputs.normal(*inputs.matrix)
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    ones = torch.ones(x.shape, dtype=wide, device=inputs.device)
    noise = functional.gaussian_dropout(ones, P, seed=SEED).double().cpu()
    normals = (noise - 1.0) / math.sqrt(P / (1 - P))
    one = torch.ones((), dtype=torch.float64)
    # Of n numbers: means that are 15 standard errors off are no chance.
    bound = 15.0 / math.sqrt(x.numel())
    moments = [
        torch.where((normals.pow(power).mean() - wanted).abs() < scale * bound, one, math.inf)
        for power, wanted, scale in ((1, 0.0, 1.0), (2, 1.0, 1.5), (4, 3.0, 10.0))
    ]
    x.requires_grad_()
    y = functional.gaussian_dropout(x, P, seed=SEED)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return [(y, exact([x])[0] * noise), (gradient, noise), *((m, one) for m in moments)]
