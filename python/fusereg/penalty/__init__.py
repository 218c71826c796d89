"""Penalties on weights, their gradients and their proximal operators."""

from .weight_penalty import (
    AttachedPenalty,
    PenaltyGroup,
    WeightPenalty,
    add_penalty_grad_,
    sparsity,
)

__all__ = ["AttachedPenalty", "PenaltyGroup", "WeightPenalty", "add_penalty_grad_", "sparsity"]
