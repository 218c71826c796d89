"""Rows of the inventory: dropout, addition and normalization of rows in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from ..core.inventory import Inputs, Operation, Shape
from ..core.masks import SEED, P, dropped, mask
from . import functional

_SHAPES: dict[str, Shape] = {
    "tiny": (3, 4),
    "small": (9, 37),
    "large": (515, 259),
    "empty": (0, 37),
    "one row": (1, 5),
}
_OPTIONS = {"p": P, "eps": 1e-5, "seed": SEED, "return_sum": True}


def _tensors(inputs: Inputs, shape: Shape) -> list[Tensor]:
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return [inputs.normal(*s, seed=20 + i) for i, s in enumerate(shapes)]


def _reference(norm: Any, x: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor]:
    s = residual + dropped(x, mask(tuple(x.shape)))
    return norm(s, x.shape[-1:], *affine, eps=1e-5), s


OPERATIONS = [
    Operation(
        name="dropout_add_layer_norm",
        formula="(s - E[s]) / sqrt(Var[s] + eps) * w + b, s = r + dropout",
        function=functional.dropout_add_layer_norm,
        shapes=_SHAPES,
        tensors=_tensors,
        arguments=("x", "residual", "weight", "bias"),
        options=_OPTIONS,
        reference=lambda *tensors: _reference(layer_norm, *tensors),
    ),
    Operation(
        name="dropout_add_rms_norm",
        formula="s / sqrt(E[s^2] + eps) * w, s = r + dropout(x)",
        function=functional.dropout_add_rms_norm,
        shapes=_SHAPES,
        tensors=lambda inputs, shape: _tensors(inputs, shape)[:3],
        arguments=("x", "residual", "weight"),
        options=_OPTIONS,
        reference=lambda *tensors: _reference(rms_norm, *tensors),
    ),
]
