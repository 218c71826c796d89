"""Dropout together with a bias, a residual or an activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, kernel_check
from fusereg.cli.checks._masks import SEED, P, kept_share, mask, result_and_gradients


def _matrices(inputs: Inputs) -> list[Tensor]:
    return [inputs.normal(*inputs.matrix, seed=20 + i) for i in range(2)]


@kernel_check("bias_dropout_add", "residual + dropout(x + bias)")
def _bias_dropout_add(inputs: Inputs) -> Pairs:
    kept, keep = mask(inputs.matrix), kept_share(P)
    return result_and_gradients(
        lambda x, r, b: functional.bias_dropout_add(x, b, r, P, seed=SEED),
        lambda x, r, b: r + torch.where(kept, (x + b) / keep, 0.0),
        [*_matrices(inputs), inputs.normal(inputs.matrix[1], seed=22)],
    )


@kernel_check("dropout_add", "residual + dropout(x)")
def _dropout_add(inputs: Inputs) -> Pairs:
    kept, keep = mask(inputs.matrix), kept_share(P)
    return result_and_gradients(
        lambda x, r: functional.dropout_add(x, r, P, seed=SEED),
        lambda x, r: r + torch.where(kept, x / keep, 0.0),
        _matrices(inputs),
    )


@kernel_check("drop_path_add", "residual + x for each row kept")
def _drop_path_add(inputs: Inputs) -> Pairs:
    kept, keep = mask((inputs.matrix[0], 1)), kept_share(P)
    return result_and_gradients(
        lambda x, r: functional.drop_path_add(x, r, P, seed=SEED),
        lambda x, r: r + torch.where(kept, x / keep, 0.0),
        _matrices(inputs),
    )


def _activated(name: str, f: Callable[[Tensor], Tensor], inputs: Inputs) -> Pairs:
    kept, keep = mask(inputs.matrix), kept_share(P)
    return result_and_gradients(
        lambda x: functional.activation_dropout(x, P, name, seed=SEED),
        lambda x: torch.where(kept, f(x) / keep, 0.0),
        _matrices(inputs)[:1],
    )


@kernel_check("activation_dropout, relu", "dropout(max(x, 0))")
def _relu(inputs: Inputs) -> Pairs:
    return _activated("relu", torch.relu, inputs)


@kernel_check("activation_dropout, gelu", "dropout(x * Phi(x))")
def _gelu(inputs: Inputs) -> Pairs:
    return _activated("gelu", torch.nn.functional.gelu, inputs)


@kernel_check("activation_dropout, gelu_tanh", "the tanh form of it")
def _gelu_tanh(inputs: Inputs) -> Pairs:
    return _activated(
        "gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"), inputs
    )


@kernel_check("activation_dropout, silu", "dropout(x / (1 + exp(-x)))")
def _silu(inputs: Inputs) -> Pairs:
    return _activated("silu", torch.nn.functional.silu, inputs)
