"""Batch normalization's kernels on whatever tensors there are; no autograd.

``forward`` and ``backward`` allocate the results, call the kernel, and where it does not take a
tensor as it is, prepare one and call it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory

#: What a call is to do with the statistics (batch_norm.h).
COMPUTE, GIVEN, FIXED = 0, 1, 2

ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
#: Those whose derivative is known from the sign of what they are applied to.
RECTIFIERS = (1, 2)


class Call(NamedTuple):
    """A call's constants, in the order in which the kernels take them at the end."""

    statistics: int
    eps: float
    group_samples: int
    activation: int
    slope: float
    p: float
    seed: int | Tensor
    offset: int
    index_offset: int
    op: str


def statistics_call(group_samples: int, op: str = "batch_norm") -> Call:
    """The constants of a call for nothing but moments."""
    return Call(COMPUTE, 1.0, group_samples, 0, 0.0, 0.0, 0, 0, 0, op)


class Running(NamedTuple):
    """Running statistics and the count of batches; each may be missing."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float = 0.1


NO_RUNNING = Running()


class Results(NamedTuple):
    """What forward gives."""

    y: Tensor
    moments: Tensor | None
    bits: Tensor | None


class Gradients(NamedTuple):
    """What backward gives; those that were not asked for are None."""

    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    sums: Tensor | None


def statistics_shape(x: Tensor, call: Call) -> int:
    """How many statistics of each kind there are."""
    channels, samples = x.shape[1], x.shape[0]
    if call.group_samples and samples > call.group_samples and x.numel():
        return channels * -(-samples // call.group_samples)
    return channels


def keeps_bits(call: Call, residual: Tensor | None) -> bool:
    return residual is not None and call.activation in RECTIFIERS


def _new_bits(x: Tensor, call: Call, masked: bool) -> Tensor | None:
    layout = _C.batch_norm_layout(x, call.group_samples, masked)
    if layout is None:
        return None
    return torch.empty(layout[4], dtype=torch.uint8, device=x.device)


def forward(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running = NO_RUNNING,
    keep_bits: bool = False,
    out: Tensor | None = None,
) -> Results:
    """y, the moments (new ones unless given), and the bits if asked for and of any use."""
    if moments is None and call.statistics == COMPUTE:
        count = statistics_shape(x, call) if call.group_samples else x.shape[1]
        # Sizes one by one, and no device where none is needed: a third of the call's time.
        moments = (
            torch.empty(3, count, dtype=torch.float64)
            if x.is_cpu
            else torch.empty(3, count, dtype=torch.float64, device=x.device)
        )
    y = torch.empty_like(x) if out is None else out
    bits = None
    if keep_bits and keeps_bits(call, residual):
        bits = _new_bits(x, call, mask is not None)
        if bits is None:
            return _forward_prepared(
                call, x, residual, mask, weight, bias, moments, running, True, y
            )
    mean, var, batches, momentum = running
    scratch, semaphores = (None, None) if x.is_cpu else memory.scratch(x.device, 0)
    status = 2
    while status:
        status = _C.batch_norm_forward(
            y, moments, bits, x, residual, mask, weight, bias, mean, var, batches,
            scratch, semaphores, momentum, *call,
        )  # fmt: skip
        if status == 0:
            break
        if status > 0:
            return _forward_prepared(
                call, x, residual, mask, weight, bias, moments, running, keep_bits, y
            )
        scratch, semaphores = memory.scratch(x.device, -status)
    return Results(y, moments, bits)


def moments_of(call: Call, x: Tensor, mask: Tensor | None) -> Tensor:
    """The moments alone: float64 [3, statistics]."""
    x = ready(x, call, mask)
    shape = (3, statistics_shape(x, call))
    moments = torch.empty(shape, dtype=torch.float64, device=x.device)
    scratch, semaphores = memory.scratch(x.device, 0)
    status = -1
    while status:
        status = _C.batch_norm_forward(
            None, moments, None, x, None, mask, None, None, None, None, None,
            scratch, semaphores, 0.0, *call,
        )  # fmt: skip
        if status > 0:
            _refused(call.op)
        if status < 0:
            scratch, semaphores = memory.scratch(x.device, -status)
    return moments


def _refused(op: str) -> None:
    raise RuntimeError(f"fusereg.{op}: the kernel refused a prepared tensor; please report this")


def ready(x: Tensor, call: Call, mask: Tensor | None) -> Tensor:
    """x itself where the kernels take it as it is, else a copy that they take."""
    masked = mask is not None
    plain = checks.plain(x, call.op, "x")
    if _C.batch_norm_layout(plain, call.group_samples, masked) is not None:
        return plain
    dense = torch.empty_like(plain)
    if _C.batch_norm_layout(dense, call.group_samples, masked) is None:
        dense = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
    return dense.copy_(plain)


def _as(x: Tensor, tensor: Tensor | None) -> Tensor | None:
    """The tensor in x's layout."""
    if tensor is None:
        return None
    if tensor.stride() == x.stride() and _C.inspect(tensor) == (0, True):
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _plain(tensor: Tensor | None, op: str, name: str) -> Tensor | None:
    return None if tensor is None else checks.plain(tensor, op, name).contiguous()


def _forward_prepared(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
    keep_bits: bool,
    y: Tensor,
) -> Results:
    x = ready(x, call, mask)
    residual = _as(x, residual)
    weight, bias = _plain(weight, call.op, "weight"), _plain(bias, call.op, "bias")
    result = y if y.stride() == x.stride() and y.data_ptr() != x.data_ptr() else None
    if result is None or _C.inspect(result) != (0, True):
        result = torch.empty_like(x)
    bits = (
        _new_bits(x, call, mask is not None) if keep_bits and keeps_bits(call, residual) else None
    )
    mean = _plain(running.mean, call.op, "running_mean")
    var = _plain(running.var, call.op, "running_var")
    batches = running.batches
    scratch, semaphores = memory.scratch(x.device, 0)
    status = -1
    while status:
        status = _C.batch_norm_forward(
            result, moments, bits, x, residual, mask, weight, bias, mean, var, batches,
            scratch, semaphores, running.momentum, *call,
        )  # fmt: skip
        if status > 0:
            _refused(call.op)
        if status < 0:
            scratch, semaphores = memory.scratch(x.device, -status)
    for given, used in ((running.mean, mean), (running.var, var)):
        if given is not None and used is not None and used.data_ptr() != given.data_ptr():
            given.copy_(used)
    return Results(result if result is y else y.copy_(result), moments, bits)


def backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    wanted: tuple[bool, bool, bool, bool],
    reduce: bool = True,
    sums: Tensor | None = None,
    keep_sums: bool = False,
    from_y: bool = False,
) -> Gradients:
    """The gradients of x, residual, weight and bias that are wanted.

    ``from_y``: x is y, which was written over it.

    Two steps, if asked for one by one: ``reduce`` alone (wanted without x and residual, keep_sums)
    gives the sums and the gradients of the parameters; ``reduce=False`` takes the sums and gives
    the gradients of x and residual.
    """
    want_x, want_residual, want_weight, want_bias = wanted
    grad_x = torch.empty_like(x) if want_x else None
    grad_residual = torch.empty_like(x) if want_residual else None
    grad_weight = torch.empty_like(weight) if want_weight and weight is not None else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    if call.statistics == FIXED and grad_weight is None and grad_bias is None and not keep_sums:
        reduce = False
    if sums is None and (keep_sums or not x.is_cpu or _C.CUDA_ON_HOST):
        shape = (2, statistics_shape(x, call))
        sums = torch.empty(shape, dtype=torch.float64, device=x.device)
    scratch, semaphores = (None, None) if x.is_cpu else memory.scratch(x.device, 0)
    prepared = False
    status = 2
    while status:
        status = _C.batch_norm_backward(
            grad_x, grad_residual, grad_weight, grad_bias, sums, grad, x, residual, mask, bits,
            moments, weight, bias, running[0], running[1], scratch, semaphores, reduce, from_y,
            *call,
        )  # fmt: skip
        if status < 0:
            scratch, semaphores = memory.scratch(x.device, -status)
        elif status > 0:
            if prepared:
                _refused(call.op)
            prepared = True
            x = ready(x, call, mask)
            grad = torch.empty_like(x).copy_(grad)
            residual = _as(x, residual)
            weight, bias = _plain(weight, call.op, "weight"), _plain(bias, call.op, "bias")
            running = Running(
                _plain(running.mean, call.op, "running_mean"),
                _plain(running.var, call.op, "running_var"),
            )
            grad_x = torch.empty_like(x) if want_x else None
            grad_residual = torch.empty_like(x) if want_residual else None
            if grad_weight is not None and weight is not None:
                grad_weight = torch.empty_like(weight)
            if grad_bias is not None and bias is not None:
                grad_bias = torch.empty_like(bias)
    return Gradients(grad_x, grad_residual, grad_weight, grad_bias, sums)
