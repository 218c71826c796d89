"""Penalties on weights, their gradients and their proximal operators."""

from .functional import add_penalty_grad_, sparsity
from .weight_penalty import AttachedPenalty, PenaltyGroup, WeightPenalty

__all__ = ["AttachedPenalty", "PenaltyGroup", "WeightPenalty", "add_penalty_grad_", "sparsity"]
