"""Loading checkpoints of torch's optimizers by torch.distributed.checkpoint."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..core.hints import check_names
from .options import OWN

if TYPE_CHECKING:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

__all__ = ["load_planner"]


def load_planner(**options: Any) -> DefaultLoadPlanner:
    """Return a planner that loads a checkpoint of torch's optimizer, or of an older fusereg's.

    ``torch.distributed.checkpoint`` refuses a checkpoint that lacks a key. This planner lets the
    arguments be missing that only fusereg's optimizers have (``l1``, ``l2``, ``group``, ``prox``,
    ...): they keep their present values. Any other missing key is an error as before. Checkpoints
    of fusereg's optimizers load as without it, and those of older versions, which lack arguments
    that were added since, load by it.

    Args:
        options: arguments of ``torch.distributed.checkpoint.DefaultLoadPlanner``.

    Example:
        >>> states = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        >>> dcp.load(states, checkpoint_id="step-1000", planner=fusereg.optim.load_planner())
        >>> set_optimizer_state_dict(model, optimizer, states["optimizer"])
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    check_names(
        "fusereg.optim.load_planner", options, inspect.signature(DefaultLoadPlanner).parameters
    )

    class Planner(DefaultLoadPlanner):
        def set_up_planner(
            self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
        ) -> None:
            super().set_up_planner(state_dict, metadata, is_coordinator)
            saved = {} if metadata is None else metadata.state_dict_metadata
            self.state_dict = {
                key: value
                for key, value in self.state_dict.items()
                if key in saved or not _is_own(key)
            }

    return Planner(**options)


def _is_own(key: str) -> bool:
    """Return whether a flat key is that of an argument of fusereg's in a param group."""
    return "param_groups." in key and key.rpartition(".")[2] in OWN
