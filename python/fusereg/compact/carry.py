"""States of optimizers and of other copies of the weights, carried over to a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.arguments import check_type
from ..optim.kernels import COPIES
from ..optim.optimizer import RegularizedOptimizer
from .parts import Cuts, shortened

#: States that are weights: of fusereg's optimizers, and the average of torch's ASGD.
_COPIES = (*COPIES, "ax")


class Change(NamedTuple):
    """The way from the parameters of a model to those of a smaller one."""

    cuts: Cuts
    added: dict[str, Tensor]
    """float64, of the parameters' old shapes: what was folded into them."""
    new: dict[str, str]
    """A new bias -> the weight of the same layer."""
    scales: dict[str, float]
    """A weight of an RMSNorm -> what it was multiplied by."""


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, cuts: Cuts) -> None:
    """Raise unless every state of a parameter that is cut can be cut as well.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it is another model's, it keeps parameters in a place of its own, or a state
            has another shape than its parameter.
    """
    wanted = "a torch.optim.Optimizer"
    check_type(optimizer, torch.optim.Optimizer, "fusereg.compact: optimizer", wanted)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError("fusereg.compact: optimizer holds no parameter of the model")
    own = isinstance(optimizer, RegularizedOptimizer)
    for place, value in vars(optimizer).items():
        if own or place in ("param_groups", "state"):
            continue
        for kept in pytree.tree_leaves(value):
            if id(kept) in held or isinstance(kept, torch.optim.Optimizer):
                raise ValueError(
                    f"fusereg.compact: optimizer ({type(optimizer).__name__}) keeps parameters in "
                    f"{place}, which would remain those of the larger model; make a new one for "
                    "the smaller model"
                )
    whole = _whole_keys(optimizer)
    for name, p in model.named_parameters():
        if name not in cuts:
            continue
        for key, value in optimizer.state.get(p, {}).items():
            for kept in () if key in whole else pytree.tree_leaves(value):
                if not isinstance(kept, Tensor) or kept.numel() == 1:
                    continue
                if kept is not value or kept.shape != p.shape:
                    raise ValueError(
                        f"fusereg.compact: optimizer keeps {key} of shape {tuple(kept.shape)} for "
                        f"{name} of shape {tuple(p.shape)}, which cannot be cut with it"
                    )


def _whole_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the states that are of the whole tensor, whatever their shape: FTRL's last rates."""
    return optimizer._algorithm.steps if isinstance(optimizer, RegularizedOptimizer) else ()


@torch.no_grad()
def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, change: Change
) -> None:
    """Give an optimizer the parameters of the smaller model, with the states of the old ones."""
    after = dict(small.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in model.named_parameters()}
    new = {
        id(p): after[name]
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in after
    }
    extra: dict[str, list[Tensor]] = {}
    for bias, weight in change.new.items():
        extra.setdefault(weight, []).append(after[bias])
    states = {}
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for p in group["params"]:
            name = names.get(id(p))
            if name is None:  # of another model
                params.append(p)
                if p in optimizer.state:
                    states[p] = optimizer.state[p]
                continue
            if id(p) not in new:  # of a module that became an identity
                continue
            params += [new[id(p)], *extra.get(name, ())]
            if p in optimizer.state:
                whole = _whole_keys(optimizer)
                states[new[id(p)]] = _state(optimizer.state[p], p, name, change, whole)
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update(states)
    optimizer.__setstate__(optimizer.__getstate__())  # makes what it keeps beside them anew


def _state(
    state: Mapping[str, Any], p: Tensor, name: str, change: Change, whole: tuple[str, ...]
) -> dict[str, Any]:
    """Return the state of a parameter, cut as it was."""
    made: dict[str, Any] = {}
    for key, value in state.items():
        if key in whole:
            made[key] = copy.deepcopy(value)
        elif isinstance(value, Tensor) and value.shape == p.shape and value.dim():
            if key in _COPIES and (name in change.added or name in change.scales):
                new = value.double() * change.scales.get(name, 1.0) + change.added.get(name, 0.0)
                value = new.to(value.dtype)
            made[key] = shortened(value, change.cuts.get(name, {}))
        else:
            made[key] = copy.deepcopy(value)
    return made
