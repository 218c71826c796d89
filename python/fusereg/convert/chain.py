"""Chains: a layer and those that follow it, called as one kernel where that is equivalent.

Whether it is, is checked at every call, because models change: hooks are added and removed, layers
are replaced, frozen, or switched to evaluation one by one. Where fusing would be observable, the
layers are called one after the other, as the model's own code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as torch_F

from .. import functional as F
from .. import nn as fused_nn
from ..batch_norm.known import activation_of, keeps_forward
from ..core import dispatch

#: The followers that add the residual: as a new tensor, or in place, which keeps dtype and shape.
ADD, ADD_IN_PLACE = SUMS = ("add", "add_")

#: A layer, one of SUMS, or the name of an activation that the model calls as a function.
Follower: TypeAlias = nn.Module | str

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch_F.relu,
    "silu": torch_F.silu,
    "gelu": torch_F.gelu,
}

#: The forwards that these classes have, unless somebody replaces them.
_DROPOUTS: dict[type, Any] = {cls: cls.forward for cls in (nn.Dropout, fused_nn.Dropout)}


def is_dropout(layer: nn.Module) -> bool:
    """Return whether this drops single elements, as the kernels' epilogue does."""
    forward = _DROPOUTS.get(type(layer))
    return forward is not None and forward is type(layer).forward


def is_identity(layer: nn.Module) -> bool:
    """Return whether calling this returns its argument."""
    return type(layer) is nn.Identity and keeps_forward(layer)


#: Layers that can begin a chain.
NORMS = (
    *(fused_nn.BatchNorm1d, fused_nn.BatchNorm2d, fused_nn.BatchNorm3d),
    fused_nn.SyncBatchNorm,
)


def fused_activation(follower: Follower) -> str | None:
    """Return ``activation_dropout``'s name of an activation; None if it cannot be fused."""
    if isinstance(follower, str):
        return follower
    if type(follower) is nn.GELU and follower.approximate == "tanh" and keeps_forward(follower):
        return "gelu_tanh"
    found = activation_of(follower)
    return None if found is None or found[0] == "leaky_relu" else found[0]


def _drops(follower: Any) -> bool:
    """Return whether calling this drops single elements and nothing else."""
    return is_dropout(follower) and follower.training is True and not dispatch.hooked(follower)


def dropout_chain(x: Tensor, residual: Any, first: Any, second: Any) -> Tensor:
    """Call an activation and a dropout, or a dropout and a sum, as one kernel if equivalent.

    Args:
        x: the input of the first.
        residual: a tensor, or anything that can be added, if the second is one of SUMS.
        first: a :data:`Follower`, an activation or a dropout.
        second: a dropout or one of SUMS.
    """
    if second in SUMS:
        if _drops(first) and _alike(x, residual):
            return F.dropout_add(x, residual, first.p, True)
    elif _drops(second) and (isinstance(first, str) or not dispatch.hooked(first)):
        activation = fused_activation(first)
        if activation is not None:
            return F.activation_dropout(x, second.p, activation, True)
    y: Tensor = FUNCTIONS[first](x) if isinstance(first, str) else first(x)
    return _sum(y, residual, second) if second in SUMS else second(y)


def chain(x: Tensor, residual: Any, norm: Any, *followers: Any) -> Tensor:
    """Call a norm and its followers, as many of them as possible in the norm's kernel.

    Args:
        x: the norm's input.
        residual: a tensor, or anything that can be added, if one of SUMS is among the followers.
        norm: a layer.
        followers: each a :data:`Follower`.
    """
    done = 0
    y: Tensor
    if type(norm) not in NORMS or not _has_no_epilogue(norm):
        y = norm(x)
    else:
        added: Tensor | None = None
        activation, slope, dropout = None, 0.01, 0.0
        for follower in followers:
            if dropout:
                break
            if follower in SUMS:
                if activation is not None or added is not None or not _alike(x, residual):
                    break
                added = residual
            elif isinstance(follower, str):
                if activation is not None:
                    break
                activation = follower
            elif dispatch.hooked(follower):
                break
            elif is_dropout(follower):
                # A dropout may be in training mode after a norm that is frozen in evaluation mode.
                if follower.training is not norm.training:
                    break
                dropout = follower.p
            elif not is_identity(follower):
                found = activation_of(follower)
                if found is None or activation is not None:
                    break
                activation, slope = found
            done += 1
        y = norm.with_epilogue(x, added, None, activation, slope, dropout)
    for follower in followers[done:]:
        if follower in SUMS:
            y = _sum(y, residual, follower)
        elif isinstance(follower, str):
            y = FUNCTIONS[follower](y)
        else:
            y = follower(y)
    return y


def _sum(y: Tensor, residual: Any, how: Follower) -> Tensor:
    if how == ADD_IN_PLACE:
        y += residual
        return y
    return y + residual  # type: ignore[no-any-return]


def _has_no_epilogue(norm: Any) -> bool:
    """Return whether calling the layer is batch normalization and nothing else."""
    fuses = norm.activation is not None or norm.dropout or norm.inplace
    return not fuses and not dispatch.hooked(norm)


def _alike(x: Tensor, residual: object) -> bool:
    """Return whether the kernels can add the residual to x."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
