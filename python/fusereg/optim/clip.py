"""Norms of gradients and clipping by them: two launches for any number of tensors.

Compiled code sees the operators ``fusereg::grad_norm`` and ``fusereg::clip_grads_``; with DTensors
and with norms that torch computes it breaks the graph instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed, memory
from ..core import params as _params

__all__ = ["clip_grad_norm_", "get_total_norm"]

_DONE, _NEEDS_FLOAT64, _NEEDS_PREPARATION = 0, 1, 2
_NORMS = {1.0: 0, 2.0: 1, math.inf: 2}
#: Of these functions alone. Only sizes and dtypes are in it (the addresses of some 3800 tensors
#: travel with each launch), so that calls with the same model find it as they need it.
_tables = memory.launch_tables()


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""The norm of all elements of all tensors, as if they were one vector.

    As ``torch.nn.utils.get_total_norm``, in one launch that reads each element once. Sums run in
    float64, so 16-bit tensors neither overflow nor lose digits.

    Args:
        tensors: a tensor or an iterable of them, usually gradients; DTensors too.
        norm_type: 1, 2 and infinity have kernels; torch computes the other norms.
        error_if_nonfinite: raises RuntimeError if the norm is NaN or infinite; waits for the
            device.
        foreach: accepted for torch's sake.

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
    if _in_graph(op, listed, float(norm_type)):
        norm: Tensor = torch.ops.fusereg.grad_norm(listed, _NORMS[float(norm_type)])
    else:
        norm = total_norm(op, listed, float(norm_type))
    if error_if_nonfinite:
        _check_finite(norm, norm_type)
    return norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | torch.nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scales all gradients so that their total norm is at most ``max_norm``; gives the norm.

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

    Raises:
        TypeError, ValueError: as :func:`get_total_norm`; also if ``max_norm`` is negative, or
            gradients share memory.

    Example:
        >>> loss.backward()
        >>> norm = fusereg.optim.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    op = "optim.clip_grad_norm_"
    max_norm = float(max_norm)
    if not max_norm >= 0.0:
        raise ValueError(f"fusereg.{op}: max_norm must not be negative, got {max_norm}")
    listed = _params.as_list(parameters, op)
    norm_type = float(norm_type)
    if not dispatch.eager() and not error_if_nonfinite:
        grads = list({id(p): p.grad for p in listed if p.grad is not None}.values())
        if _in_graph(op, grads, norm_type):
            found: Tensor = torch.ops.fusereg.clip_grads_(grads, max_norm, _NORMS[norm_type])
            return found
    return _clip_parameters(op, listed, max_norm, norm_type, error_if_nonfinite)


@dispatch.outside_graphs
def _clip_parameters(
    op: str, listed: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    if listed and norm_type in _NORMS and not error_if_nonfinite:
        norm = _in_one_call(op, listed, True, _NORMS[norm_type], max_norm)
        if norm is not None:
            return norm
    repeated = set(_C.scan(listed)[1])
    grads = [p.grad for i, p in enumerate(listed) if p.grad is not None and i not in repeated]
    norm = total_norm(op, grads, norm_type)
    if error_if_nonfinite:
        _check_finite(norm, norm_type)
    _scale(grads, norm, max_norm)
    return norm


def _scale(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    factor = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        for g in grads:
            g.mul_(factor.to(g.device).to(g.dtype))


@dispatch.outside_graphs
def total_norm(op: str, tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm over all elements; DTensors count as a whole."""
    if not tensors:
        return torch.tensor(0.0)
    if norm_type not in _NORMS:
        return torch.nn.utils.get_total_norm(tensors, norm_type)
    kind = _NORMS[norm_type]
    if isinstance(tensors[0], Tensor) and not distributed.has_dtensor(tensors):
        norm = _in_one_call(op, tensors, False, kind, -1.0)
        if norm is not None:
            return norm
    elif distributed.has_dtensor(tensors):
        from . import dtensor as _dtensor

        return _dtensor.total_norm(op, tensors, norm_type)
    return combined([local_norm(op, tensors, kind)], norm_type).to(_result_dtype(tensors))


def local_norm(op: str, tensors: list[Tensor], kind: int) -> Tensor:
    """In float64, over tensors that are prepared one by one."""
    plain = [
        checks.dense(checks.plain(_densified(t), op, f"tensors[{i}]"))
        for i, t in enumerate(tensors)
    ]
    parts = []
    for device, indices in _params.by_device(plain).items():
        out = torch.empty((), dtype=torch.float64, device=device)
        own = [plain[i] for i in indices]
        work = memory.workspace(device)
        if _C.grad_norm(own, False, out, kind, -1.0, work, _tables, op) != _DONE:
            raise RuntimeError(f"fusereg.{op}: the kernel refused prepared tensors; please report")
        parts.append(out)
    return combined(parts, {v: k for k, v in _NORMS.items()}[kind])


def combined(norms: list[Tensor], norm_type: float) -> Tensor:
    """The norm of the whole from those of its parts, on the first one's device."""
    if len(norms) == 1:
        return norms[0]
    together = torch.stack([n.to(norms[0].device, torch.float64) for n in norms])
    norm: Tensor = torch.linalg.vector_norm(together, norm_type)
    return norm


def _densified(t: object) -> Tensor:
    if isinstance(t, Tensor) and t.layout is torch.sparse_coo:
        return t.coalesce().values()
    return t  # type: ignore[return-value]


def _result_dtype(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def _in_one_call(
    op: str, tensors: list[Tensor], of_params: bool, kind: int, clip: float
) -> Tensor | None:
    """None: something must be prepared first; nothing was written."""
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        return None
    for dtype in (torch.float32, torch.float64):
        out = torch.empty((), dtype=dtype, device=device)
        work = memory.workspace(device)
        status = _C.grad_norm(tensors, of_params, out, kind, clip, work, _tables, op)
        if status == _DONE:
            return out
        if status == _NEEDS_PREPARATION:
            return None
    return None


# --- torch.library --------------------------------------------------------------------------------


def _in_graph(op: str, tensors: list[Tensor], norm_type: float) -> bool:
    """Whether this call is one for the operators."""
    if dispatch.eager() or not tensors or norm_type not in _NORMS:
        return False
    for i, t in enumerate(tensors):
        if distributed.is_dtensor(t):
            return False
        checks.check(t, op, f"tensors[{i}]")
    return True


dispatch.library.define("grad_norm(Tensor[] tensors, int kind) -> Tensor")
dispatch.library.define("clip_grads_(Tensor(a!)[] grads, float max_norm, int kind) -> Tensor")
_NORM_TYPES = {kind: norm_type for norm_type, kind in _NORMS.items()}


def _op_grad_norm(tensors: list[Tensor], kind: int) -> Tensor:
    return total_norm("optim.get_total_norm", list(tensors), _NORM_TYPES[kind])


def _op_clip_grads_(grads: list[Tensor], max_norm: float, kind: int) -> Tensor:
    op = "optim.clip_grad_norm_"
    norm = _in_one_call(op, list(grads), False, kind, max_norm)
    if norm is None:
        norm = total_norm(op, list(grads), _NORM_TYPES[kind])
        _scale(grads, norm, max_norm)
    return norm


def _fake_norm(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=_result_dtype(tensors))


for _key in ("CPU", "CUDA"):
    dispatch.library.impl("grad_norm", _op_grad_norm, _key)
    dispatch.library.impl("clip_grads_", _op_clip_grads_, _key)

torch.library.register_fake(
    "fusereg::grad_norm", lambda tensors, kind: _fake_norm(tensors), lib=dispatch.library
)
torch.library.register_fake(
    "fusereg::clip_grads_",
    lambda grads, max_norm, kind: _fake_norm(grads),
    lib=dispatch.library,
)


def _check_finite(norm: Tensor, norm_type: float) -> None:
    if not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
