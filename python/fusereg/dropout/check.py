"""Dropout of elements, channels and samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fusereg
from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.cli.checks._masks import (
    SEED,
    P,
    images,
    kept_share,
    mask,
    masked,
    result_and_gradients,
)

#: Of alpha dropout: what is dropped becomes SELU's limit at minus infinity.
_LIMIT = -1.7580993408473766


@kernel_check("dropout_mask", "Philox4x32-10(seed, index) < keep")
def _mask(inputs: Inputs) -> Pairs:
    pairs = []
    for p in (P, 0.001):  # draws of 16 bits, and of 32
        came = fusereg.dropout_mask(inputs.matrix, p, SEED, device=inputs.device)
        pairs.append((came.to(inputs.dtype), mask(inputs.matrix, p).double()))
    return pairs


@kernel_check("dropout", "keep ? x / (1 - p) : 0")
def _dropout(inputs: Inputs) -> Pairs:
    x = inputs.normal(*inputs.matrix)
    return masked(lambda t: functional.dropout(t, P, seed=SEED), mask(tuple(x.shape)), x)


@kernel_check("dropout, draws of 32 bits", "the same for a p that 16 bits would miss")
def _dropout32(inputs: Inputs) -> Pairs:
    x = inputs.normal(*inputs.matrix)
    p = 0.001
    return masked(
        lambda t: functional.dropout(t, p, seed=SEED), mask(tuple(x.shape), p), x, kept_share(p)
    )


@kernel_check("dropout2d", "the same, a draw for each channel")
def _dropout2d(inputs: Inputs) -> Pairs:
    x = images(inputs)
    kept = mask((*x.shape[:2], 1, 1)).expand(x.shape)
    return masked(lambda t: functional.dropout2d(t, P, seed=SEED), kept, x)


@kernel_check("drop_path", "the same, a draw for each sample")
def _drop_path(inputs: Inputs) -> Pairs:
    x = inputs.normal(*inputs.matrix)
    kept = mask((x.shape[0], 1)).expand(x.shape)
    return masked(lambda t: functional.drop_path(t, P, seed=SEED), kept, x)


def _alpha(kept: Tensor) -> tuple[float, float, Tensor]:
    keep = kept_share(P)
    a = math.sqrt(1 / (keep * (1 + (1 - keep) * _LIMIT**2)))
    return a, -a * (1 - keep) * _LIMIT, kept


@kernel_check("alpha_dropout", "a * (keep ? x : alpha') + b")
def _alpha_dropout(inputs: Inputs) -> Pairs:
    x = inputs.normal(*inputs.matrix)
    a, b, kept = _alpha(mask(tuple(x.shape)))
    return result_and_gradients(
        lambda t: functional.alpha_dropout(t, P, seed=SEED),
        lambda t: a * torch.where(kept, t, _LIMIT) + b,
        [x],
    )


@kernel_check("feature_alpha_dropout", "the same, a draw for each channel")
def _feature_alpha_dropout(inputs: Inputs) -> Pairs:
    x = images(inputs)
    a, b, kept = _alpha(mask((*x.shape[:2], 1, 1)).expand(x.shape))
    return result_and_gradients(
        lambda t: functional.feature_alpha_dropout(t, P, seed=SEED),
        lambda t: a * torch.where(kept, t, _LIMIT) + b,
        [x],
    )


@kernel_check("consistent_dropout", "a draw for all steps of a sequence")
def _consistent_dropout(inputs: Inputs) -> Pairs:
    x = inputs.normal(*((17, 41, 129) if inputs.large else (3, 8, 37)))
    kept = mask((x.shape[0], 1, x.shape[2])).expand(x.shape)
    return masked(lambda t: functional.consistent_dropout(t, P, 1, seed=SEED), kept, x)


@kernel_check("drop_connect_linear", "x (keep ? W / (1 - p) : 0)^T + b")
def _drop_connect_linear(inputs: Inputs) -> Pairs:
    """Rows of x are unit vectors: torch's product is then exact, and shows the kernel's weights."""
    rows, columns = inputs.matrix
    weight, bias = inputs.normal(rows, columns), inputs.normal(rows, seed=21)
    x = torch.eye(columns, device=inputs.device, dtype=inputs.dtype)
    kept, keep = mask(tuple(weight.shape)), kept_share(P)
    zeros = torch.zeros_like(x[:1])
    only_bias = functional.drop_connect_linear(zeros, weight, bias, P, seed=SEED)
    pairs = result_and_gradients(
        lambda w: functional.drop_connect_linear(x, w, None, P, seed=SEED),
        lambda w: torch.where(kept, w / keep, 0.0).t(),
        [weight],
    )
    return [*pairs, (only_bias, exact([bias])[0][None])]


@kernel_check("drop_connect_conv2d", "conv2d(x, keep ? W / (1 - p) : 0)")
def _drop_connect_conv2d(inputs: Inputs) -> Pairs:
    """An image that is 1 at one place: the convolution shows the kernel's weights, mirrored."""
    outputs, channels = (61, 43) if inputs.large else (9, 5)
    weight = inputs.normal(outputs, channels, 3, 3)
    x = torch.zeros(channels, channels, 5, 5, device=inputs.device, dtype=inputs.dtype)
    x[range(channels), range(channels), 2, 2] = 1.0
    kept, keep = mask(tuple(weight.shape)), kept_share(P)
    return result_and_gradients(
        lambda w: functional.drop_connect_conv2d(x, w, p=P, seed=SEED),
        lambda w: torch.where(kept, w / keep, 0.0).flip(2, 3).transpose(0, 1),
        [weight],
    )
