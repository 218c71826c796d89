"""Param groups with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..penalty.weight_penalty import WeightPenalty

__all__ = ["param_groups_weight_decay"]


def param_groups_weight_decay(
    model: nn.Module,
    weight_decay: float,
    *,
    exclude: Iterable[str | type[nn.Module]] | str | type[nn.Module] = ("bias", "norm"),
    **options: Any,
) -> list[dict[str, Any]]:
    r"""Return two param groups for an optimizer: with weight decay, and without (biases, norms).

    Args:
        model: the module whose parameters are listed; tied ones once.
        weight_decay: of the first group; that of the second group is 0.
        exclude: parameters without decay, as in :class:`fusereg.WeightPenalty`: ``"bias"``,
            ``"norm"``, name patterns, types of modules.
        options: further options of the first group. The second group shares them, but has 0 for
            ``l1``, ``l2`` and ``group``.

    Returns:
        ``[{"params": ..., "weight_decay": weight_decay, ...}, {"params": ..., "weight_decay": 0.0,
        ...}]``, for torch's optimizers too; a group without parameters is left out.

    Raises:
        TypeError, ValueError: as :class:`fusereg.WeightPenalty`, also for a pattern that matches
            no parameter.

    Example:
        >>> groups = fusereg.optim.param_groups_weight_decay(model, 0.01, l1=1e-5)
        >>> optimizer = fusereg.optim.AdamW(groups, lr=1e-3)
    """
    found = WeightPenalty(model, exclude=exclude)
    excluded = set(found.excluded)
    kept_out = [p for name, p in model.named_parameters() if name in excluded]
    strengths = ("l1", "l2", "group")
    plain = {k: 0.0 if k in strengths else v for k, v in options.items()}
    groups: list[dict[str, Any]] = [
        {"params": list(found.groups[0].params), "weight_decay": weight_decay, **options},
        {"params": kept_out, "weight_decay": 0.0, **plain},
    ]
    return [g for g in groups if g["params"]]
