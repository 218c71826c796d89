"""Param groups with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..core.arguments import check_type
from ..core.hints import explains
from ..core.modules import check_materialized
from ..core.params import Key, output_dim
from ..penalty.names import WORDS, named_parameters
from ..penalty.weight_penalty import WeightPenalty

__all__ = ["param_groups_weight_decay"]


@explains(
    "fusereg.optim.param_groups_weight_decay",
    {
        **dict.fromkeys(("no_weight_decay_list", "skip_list", "no_decay"), "did you mean exclude?"),
        "wd": "did you mean weight_decay?",
    },
)
def param_groups_weight_decay(
    model: nn.Module, weight_decay: float, *, exclude: Iterable[Key] | Key = WORDS, **options: Any
) -> list[dict[str, Any]]:
    r"""Return two param groups for an optimizer: with weight decay, and without (biases, norms).

    By default they are those of timm's function of this name, which also leaves out all parameters
    of one dimension and what the model's ``no_weight_decay()`` names; of models without this method
    position embeddings and class tokens, too.

    Args:
        model: the module whose parameters are listed; tied ones once, frozen ones not at all.
        weight_decay: of the first group; that of the second group is 0.
        exclude: parameters without decay, as in :class:`fusereg.WeightPenalty`: ``"bias"``,
            ``"norm"``, ``"layer_scale"``, ``"position_embedding"``, ``"no_weight_decay"``,
            ``"vector"``, name patterns, types of modules.
        options: further options of the first group. The second group shares them, but has 0 for
            ``l1``, ``l2`` and ``group``. With ``group`` and without ``group_dim``, layers whose
            outputs are indices of dimension 1 (transposed convolutions, transformers' Conv1D) get a
            group of their own, with ``group_dim=1``.

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
    where = "fusereg.optim.param_groups_weight_decay: model"
    check_type(model, nn.Module, where, "a torch.nn.Module")
    check_materialized(model, "fusereg.optim.param_groups_weight_decay")
    by_type = "group" in options and "group_dim" not in options
    found = WeightPenalty(model, l2=0.0, exclude=exclude)
    excluded = set(found.excluded)
    trained = [item for item in named_parameters(model) if item.param.requires_grad]
    kept_out = [item.param for item in trained if item.name in excluded]
    by_dim: dict[int, list[Tensor]] = {}
    for item in trained:
        if item.name not in excluded:
            first = output_dim(item.module) if item.param.dim() > 1 else 0
            by_dim.setdefault(first if by_type else 0, []).append(item.param)
    strengths = ("l1", "l2", "group")
    plain = {k: 0.0 if k in strengths else v for k, v in options.items()}
    groups: list[dict[str, Any]] = [
        *(
            {"params": own, "weight_decay": weight_decay, **options}
            | ({"group_dim": dim} if dim else {})
            for dim, own in sorted(by_dim.items())
        ),
        {"params": kept_out, "weight_decay": 0.0, **plain},
    ]
    return [g for g in groups if g["params"]]
