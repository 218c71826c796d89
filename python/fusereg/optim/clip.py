"""Norms of gradients and clipping by them: two launches for any number of tensors.

Compiled code sees the operators ``fusereg::grad_norm`` and ``fusereg::clip_grads_``; with DTensors
and with norms that torch computes it breaks the graph instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed
from ..core import params as _params
from ..core.hints import explains
from ..core.operator import Operator
from ..penalty import dtensor as _sharded
from ..penalty.kernels import value_dtype
from .norms import KINDS, in_one_call, total_norm

__all__ = ["clip_grad_norm_", "get_total_norm"]


@explains("fusereg.optim.get_total_norm")
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Return the norm of all elements of all tensors, as if they were one vector.

    As ``torch.nn.utils.get_total_norm``, in one launch that reads each element once. Sums run in
    float64, so 16-bit tensors neither overflow nor lose digits.

    Args:
        tensors: a tensor or an iterable of them, usually gradients; DTensors too.
        norm_type: 1, 2 and infinity have kernels; torch computes the other norms.
        error_if_nonfinite: raise RuntimeError if the norm is NaN or infinite, which waits for
            the device.
        foreach: accepted for compatibility, ignored.

    Returns:
        0-d, on the first tensor's device, float32 (float64 if a tensor is). The same on every rank
        for DTensors. 0.0 for no tensors.

    Raises:
        TypeError, ValueError: a tensor that kernels cannot read; named by its index.

    Example:
        >>> norm = fusereg.optim.get_total_norm([p.grad for p in model.parameters()])
    """
    op = "optim.get_total_norm"
    listed = _params.as_list(tensors, op)
    norm_type = _order(norm_type, op)
    if _in_graph(op, listed, norm_type):
        norm: Tensor = _norm.overload(listed, KINDS[norm_type])
    else:
        norm = total_norm(op, listed, norm_type)
    if error_if_nonfinite:
        _check_finite(norm, norm_type)
    return norm


@explains("fusereg.optim.clip_grad_norm_")
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | torch.nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale all gradients so that their total norm is at most ``max_norm``, and return the norm.

    As ``torch.nn.utils.clip_grad_norm_``: :math:`g \leftarrow g \min(1, max\_norm / (\|g\| +
    10^{-6}))`, in two launches and without waiting for the device. An optimizer's
    ``max_grad_norm`` does the same inside its step, without writing the gradients.

    Args:
        parameters: a tensor, an iterable of tensors, or a module; those without ``.grad`` do not
            count.
        max_norm: >= 0.
        norm_type, error_if_nonfinite, foreach: as in :func:`get_total_norm`. With
            ``error_if_nonfinite`` nothing is scaled before the check.

    Returns:
        The norm before clipping, as :func:`get_total_norm`.

    A generator without elements, such as ``model.parameters()`` after a loop over it, is warned of.

    Raises:
        TypeError, ValueError: as :func:`get_total_norm`; also if ``max_norm`` is negative, or
            gradients share memory.

    Example:
        >>> loss.backward()
        >>> norm = fusereg.optim.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    op = "optim.clip_grad_norm_"
    max_norm = not_negative(max_norm, op, "max_norm")
    listed = _params.as_list(parameters, op)
    norm_type = _order(norm_type, op)
    if not dispatch.eager() and not error_if_nonfinite:
        grads = list({id(p): p.grad for p in listed if p.grad is not None}.values())
        if _in_graph(op, grads, norm_type):
            found: Tensor = _clip.overload(grads, max_norm, KINDS[norm_type])
            return found
    return _clip_parameters(op, listed, max_norm, norm_type, error_if_nonfinite)


@dispatch.outside_graphs
def _clip_parameters(
    op: str, listed: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    if listed and norm_type in KINDS and not error_if_nonfinite:
        norm = in_one_call(op, listed, norm_type, of_params=True, max_norm=max_norm)
        if norm is not None:
            return norm
    repeated = set(_C.scan(listed)[1])
    own = [None if i in repeated else p.grad for i, p in enumerate(listed)]
    grads = [g for g in own if g is not None]
    norm = total_norm(op, grads, norm_type)
    if error_if_nonfinite:
        _check_finite(norm, norm_type)
    checks.check_apart(list(map(_memory, own)), op, "parameters[{}].grad")
    _scale(grads, norm, max_norm)
    return norm


def _memory(grad: Tensor | None) -> Tensor | None:
    """Return this rank's part of a gradient, if it lies in memory of its own."""
    if grad is None or grad.layout is not torch.strided:
        return None
    return _sharded.local_part(grad) if distributed.is_dtensor(grad) else grad


def _scale(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    factor = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        for g in grads:
            g.mul_(factor.to(g.device).to(g.dtype))


def not_negative(value: float, op: str, name: str) -> float:
    """Return a number as a float; raise unless it is >= 0, and for NaN."""
    value = checks.as_number(value, f"fusereg.{op}: {name}")
    if not value >= 0.0:
        raise ValueError(f"fusereg.{op}: {name} must not be negative, got {value}")
    return value


def _order(norm_type: object, op: str) -> float:
    """Return the order of a norm; torch takes "inf" too."""
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):
        return float(norm_type)
    return checks.as_number(norm_type, f"fusereg.{op}: norm_type")


def _check_finite(norm: Tensor, norm_type: float) -> None:
    if not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )


# --- in graphs ------------------------------------------------------------------------------------


def _in_graph(op: str, tensors: list[Tensor], norm_type: float) -> bool:
    """Return whether this call is one for the operators."""
    if dispatch.eager() or not tensors or norm_type not in KINDS:
        return False
    for i, t in enumerate(tensors):
        if distributed.is_dtensor(t) or t.is_complex():
            return False
        checks.check(t, op, f"tensors[{i}]")
    return True


_NORM_TYPES = {kind: norm_type for norm_type, kind in KINDS.items()}


def _clip_grads_(grads: list[Tensor], max_norm: float, kind: int) -> Tensor:
    op, norm_type = "optim.clip_grad_norm_", _NORM_TYPES[kind]
    norm = in_one_call(op, grads, norm_type, max_norm=max_norm)
    if norm is None:
        norm = total_norm(op, grads, norm_type)
        checks.check_apart(list(map(_memory, grads)), op, "gradient {}")
        _scale(grads, norm, max_norm)
    return norm


def _fake_norm(tensors: list[Tensor], *_: Any) -> Tensor:
    return tensors[0].new_empty((), dtype=value_dtype(tensors))


_norm = Operator(
    "grad_norm(Tensor[] tensors, int kind) -> Tensor",
    lambda tensors, kind: total_norm("optim.get_total_norm", tensors, _NORM_TYPES[kind]),
    fake=_fake_norm,
)
_clip = Operator(
    "clip_grads_(Tensor(a!)[] grads, float max_norm, int kind) -> Tensor",
    _clip_grads_,
    fake=_fake_norm,
)
