"""Dropout, addition and normalization of rows in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.cli.checks._masks import SEED, P, kept_share, mask


def _pairs(inputs: Inputs, rms: bool) -> Pairs:
    """y, the sum, and the gradients of x, residual, weight and bias."""
    rows, columns = (515, 259) if inputs.large else (9, 37)
    shapes = ((rows, columns), (rows, columns), (columns,), (columns,))
    tensors = [inputs.normal(*shape, seed=20 + i) for i, shape in enumerate(shapes)]
    tensors = tensors[:3] if rms else tensors
    wanted = [t.requires_grad_() for t in exact(tensors)]
    tensors = [t.requires_grad_() for t in tensors]
    s = wanted[1] + torch.where(mask((rows, columns)), wanted[0] / kept_share(P), 0.0)
    torch_norm: Callable[..., Tensor] = torch.nn.functional.layer_norm
    norm: Callable[..., tuple[Tensor, Tensor]] = functional.dropout_add_layer_norm
    if rms:
        torch_norm, norm = torch.nn.functional.rms_norm, functional.dropout_add_rms_norm
    y = torch_norm(s, (columns,), *wanted[2:], 1e-5)
    results = norm(*tensors, P, 1e-5, seed=SEED, return_sum=True)
    incoming = [inputs.normal(rows, columns, seed=30 + i) for i in range(2)]
    gradients = torch.autograd.grad(results, tensors, incoming)
    references = torch.autograd.grad([y, s], wanted, exact(incoming))
    return list(zip((*results, *gradients), (y, s, *references), strict=True))


@kernel_check("dropout_add_layer_norm", "(s - E[s]) / sqrt(Var[s] + eps) * w + b, s = r + dropout")
def _layer_norm(inputs: Inputs) -> Pairs:
    return _pairs(inputs, rms=False)


@kernel_check("dropout_add_rms_norm", "s / sqrt(E[s^2] + eps) * w, s = r + dropout(x)")
def _rms_norm(inputs: Inputs) -> Pairs:
    return _pairs(inputs, rms=True)
