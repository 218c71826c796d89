"""What a converted model runs where a layer and its followers are one kernel.

Whether they can be is asked anew at every call, because models change: hooks come and go, layers
are replaced, frozen, or switched to evaluation one by one. Where fusing would show, the layers are
called one after the other, as the model's own code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as torch_F

from .. import functional as F
from .. import nn as fused_nn
from ..core import dispatch

#: Stands among the followers for the addition of the residual.
ADD = "add"

#: A layer, ADD, or the name of an activation that the model calls as a function.
Follower: TypeAlias = nn.Module | str

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch_F.relu,
    "silu": torch_F.silu,
    "gelu": torch_F.gelu,
}

_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}

_DROPOUTS = (nn.Dropout, fused_nn.Dropout)


def activation_of(layer: nn.Module) -> tuple[str, float] | None:
    """What the kernels call this activation and the slope of a leaky one; None if they have not."""
    name = _ACTIVATIONS.get(type(layer))
    if name == "leaky_relu":
        slope = layer.negative_slope
        return (name, slope) if isinstance(slope, float) and slope >= 0.0 else None
    if name is None or (name == "gelu" and layer.approximate != "none"):
        return None
    return name, 0.01


def is_dropout(layer: nn.Module) -> bool:
    """Whether this drops single elements, as the kernels' epilogue does."""
    return type(layer) in _DROPOUTS


def batch_norm(
    layer: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
    dropout: float,
) -> Tensor:
    layer._check_input_dim(x)
    return F.batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        layer.training,
        layer.momentum,
        layer.eps,
        activation=activation,
        residual=residual,
        dropout=dropout,
        negative_slope=slope,
        num_batches_tracked=layer.num_batches_tracked,
        update_stats=layer.update_stats,
    )


def sync_batch_norm(
    layer: fused_nn.SyncBatchNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
    dropout: float,
) -> Tensor:
    return layer.with_epilogue(x, residual, None, activation, slope, dropout)


#: Layers that can begin a chain, and the call that computes them with an epilogue.
NORMS: dict[type, Callable[..., Tensor]] = {
    fused_nn.BatchNorm1d: batch_norm,
    fused_nn.BatchNorm2d: batch_norm,
    fused_nn.BatchNorm3d: batch_norm,
    fused_nn.SyncBatchNorm: sync_batch_norm,
}


def fused_activation(follower: Follower) -> str | None:
    """What the kernel that also drops calls this activation; None if it has none of the kind."""
    if isinstance(follower, str):
        return follower
    if type(follower) is nn.GELU and follower.approximate == "tanh":
        return "gelu_tanh"
    found = activation_of(follower)
    return None if found is None or found[0] == "leaky_relu" else found[0]


def _drops(follower: Any) -> bool:
    return is_dropout(follower) and follower.training is True and not dispatch.hooked(follower)


def dropout_chain(x: Tensor, residual: Any, first: Any, second: Any) -> Tensor:
    """An activation and a dropout, or a dropout and ADD: one kernel where it would not show.

    Args:
        x: what the first takes.
        residual: a tensor, or anything that can be added, if the second is ADD.
        first: a :data:`Follower`, an activation or a dropout.
        second: a dropout or ADD.
    """
    if second is ADD:
        if _drops(first) and _alike(x, residual):
            return F.dropout_add(x, residual, first.p, True)
    elif _drops(second) and (isinstance(first, str) or not dispatch.hooked(first)):
        activation = fused_activation(first)
        if activation is not None:
            return F.activation_dropout(x, second.p, activation, True)
    y: Tensor = FUNCTIONS[first](x) if isinstance(first, str) else first(x)
    return y + residual if second is ADD else second(y)  # type: ignore[no-any-return]


def chain(x: Tensor, residual: Any, norm: Any, *followers: Any) -> Tensor:
    """The followers, one after the other, of ``norm(x)``; as many as possible in its kernel.

    Args:
        x: what the norm takes.
        residual: a tensor, or anything that can be added, if ADD is among the followers.
        norm: a layer.
        followers: each a :data:`Follower`.
    """
    kernel = NORMS.get(type(norm))
    done = 0
    y: Tensor
    if kernel is None or not _is_plain(norm):
        y = norm(x)
    else:
        added: Tensor | None = None
        activation, slope, dropout = None, 0.01, 0.0
        for follower in followers:
            if dropout:
                break
            if follower is ADD:
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
                # Layers that are frozen in evaluation mode may have a dropout that is not.
                if follower.training is not norm.training:
                    break
                dropout = follower.p
            elif type(follower) is not nn.Identity:
                found = activation_of(follower)
                if found is None or activation is not None:
                    break
                activation, slope = found
            done += 1
        y = kernel(norm, x, added, activation, slope, dropout)
    for follower in followers[done:]:
        if follower is ADD:
            y = y + residual
        elif isinstance(follower, str):
            y = FUNCTIONS[follower](y)
        else:
            y = follower(y)
    return y


def _is_plain(norm: Any) -> bool:
    return (
        not dispatch.hooked(norm) and norm.activation is None and not (norm.dropout or norm.inplace)
    )


def _alike(x: Tensor, residual: object) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


__all__ = [
    "ADD",
    "FUNCTIONS",
    "NORMS",
    "Follower",
    "activation_of",
    "chain",
    "dropout_chain",
    "fused_activation",
    "is_dropout",
]
