"""Rows of the inventory: cross-entropy, for indices, probabilities and mixed labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.inventory import MATRICES, Inputs, Operation, Shape
from ..core.labels import MixedLabels
from . import functional
from .op import class_dim, shape_of_rows

SMOOTHING = 0.1
_torch = torch.nn.functional.cross_entropy

#: Classes that are neighbors in memory, and such that are not.
_SHAPES: dict[str, Shape] = {
    **{size: shape for size, shape in MATRICES.items() if size != "empty"},
    "many classes": (3, 4099),
    "classes apart": (2, 5, 3, 13),
    "unbatched": (7,),
}


def _indices(inputs: Inputs, x: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes = x.shape[class_dim(x)]
    index = torch.randint(classes, shape_of_rows(x), generator=generator)
    if index.numel() > 2:
        index.view(-1)[1] = -100
    return index.to(inputs.device)


def _with_weights(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x = inputs.normal(*shape)
    weight = inputs.normal(x.shape[class_dim(x)], seed=21).abs() + 0.5
    return [x, _indices(inputs, x), weight]


def _with_indices(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x = inputs.normal(*shape)
    return [x, _indices(inputs, x)]


def _with_probabilities(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x = inputs.normal(*shape)
    target = inputs.normal(*shape, seed=22).abs()
    return [x, target]


def _with_pairs(inputs: Inputs, shape: Shape) -> list[Tensor]:
    x = inputs.normal(*shape)
    generator = torch.Generator().manual_seed(5)
    share = torch.rand(shape[0], generator=generator).to(inputs.device)
    return [x, _indices(inputs, x), _indices(inputs, x, 2), share]


def _mixed(x: Tensor, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Return the loss of mixed labels."""
    return functional.cross_entropy(x, MixedLabels(a, b, share), label_smoothing=SMOOTHING)


def _mixed_by_torch(x: Tensor, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Return the same of two losses, each divided by the number of the rows that count for it."""
    total = x.new_zeros(())
    for index, part in ((a, share), (b, 1 - share)):
        each = _torch(x, index, reduction="none", label_smoothing=SMOOTHING)
        part = part.view(-1, *[1] * (each.dim() - 1))
        total = total + (part * each).sum() / (index != -100).sum()
    return total


OPERATIONS = [
    Operation(
        name="cross_entropy",
        formula="sum(q) * logsumexp(x) - sum(q * x), q smoothed and weighted",
        function=functional.cross_entropy,
        shapes=_SHAPES,
        tensors=_with_weights,
        arguments=("input", "target", "weight"),
        options={"label_smoothing": SMOOTHING},
        reference=lambda x, target, weight: _torch(x, target, weight, label_smoothing=SMOOTHING),
        constants=("target", "weight"),
    ),
    Operation(
        name="cross_entropy, each row",
        formula="logsumexp(x) - x[target]",
        function=functional.cross_entropy,
        shapes={**_SHAPES, "empty": (0, 4)},
        tensors=_with_indices,
        arguments=("input", "target"),
        options={"reduction": "none"},
        reference=lambda x, target: _torch(x, target, reduction="none"),
        constants=("target",),
    ),
    Operation(
        name="cross_entropy, probabilities",
        formula="sum(q) * logsumexp(x) - sum(q * x), q smoothed probabilities",
        function=functional.cross_entropy,
        shapes=_SHAPES,
        tensors=_with_probabilities,
        arguments=("input", "target"),
        options={"label_smoothing": SMOOTHING},
        reference=lambda x, target: _torch(x, target, label_smoothing=SMOOTHING),
        constants=("target",),
    ),
    Operation(
        name="cross_entropy_of_mixed_labels",
        formula="share * loss(x, a) + (1 - share) * loss(x, b)",
        function=_mixed,
        shapes={size: shape for size, shape in _SHAPES.items() if size != "unbatched"},
        tensors=_with_pairs,
        arguments=("x", "a", "b", "share"),
        reference=_mixed_by_torch,
        constants=("a", "b", "share"),
    ),
]
