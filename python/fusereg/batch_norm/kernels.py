"""Batch normalization's kernels on tensors of any layout; no autograd.

``forward`` and ``backward`` allocate the results and call the kernel. Where it does not support the
layout of a tensor, they call it a second time with copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory
from ..core.operator import refused
from ..core.random import State

#: Where the statistics come from (batch_norm.h): from x, from the caller as those of this batch,
#: or from the caller as constants.
COMPUTE, GIVEN, FIXED = 0, 1, 2

ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
#: Those whose derivative is known from the sign of their argument.
RECTIFIERS = (1, 2)

#: The momentum of a cumulative average; every finite number is one of its own.
CUMULATIVE = float("-inf")

_increment_version: Callable[[Any], None] = torch.autograd.graph.increment_version


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the operator's schema."""

    x: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    moments: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    #: The Philox state of dropout.
    seed: State | Tensor | None = None


class Constants(NamedTuple):
    """The numbers of a call, in the order of the operator's schema."""

    statistics: int = COMPUTE
    eps: float = 1e-5
    group_samples: int = 0
    activation: int = 0
    slope: float = 0.01
    p: float = 0.0
    index_offset: int = 0


#: Make these of a tuple of all fields, without a call of a Python function: 0.5 us less.
inputs_of: Callable[[tuple[Any, ...]], Inputs] = partial(tuple.__new__, Inputs)
constants_of: Callable[[tuple[Any, ...]], Constants] = partial(tuple.__new__, Constants)
_DEFAULTS = Constants()


@dataclass(slots=True)
class Call:
    """A call: its inputs and constants, and what an eager call has beside the operator's arguments.

    Running statistics among the inputs are updated, except with FIXED statistics. Forward leaves
    ``moments`` and ``bits`` here: an autograd function with three results takes 2 us more.
    """

    inputs: Inputs
    constants: Constants = _DEFAULTS
    #: The name under which errors show the operation.
    op: str = "batch_norm"
    #: The count of batches, which is updated with the running statistics.
    batches: Tensor | None = None
    #: CUMULATIVE for a cumulative average.
    momentum: float = 0.0
    #: Whether kernels may be called at once (dispatch.direct).
    direct: bool = True
    #: float64 [3, statistics]: mean, biased variance, count.
    moments: Tensor | None = None
    #: One bit an element: the sign of what the activation was applied to.
    bits: Tensor | None = None

    def keeps_bits(self) -> bool:
        """Return whether backward needs the bits."""
        return self.inputs.residual is not None and self.constants.activation in RECTIFIERS

    def keeps_residual(self) -> bool:
        """Return whether backward needs the residual: for a derivative that no sign determines."""
        return self.constants.activation not in (0, *RECTIFIERS)


class Gradients(NamedTuple):
    """The results of backward; None where one was not asked for."""

    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    #: float64 [2, statistics]: the sums over each channel that the gradient of x depends on.
    sums: Tensor | None


def result_like(x: Tensor) -> Tensor:
    """Return memory for y with the strides of torch's own result."""
    return torch.empty_like(x, memory_format=format_like(x))


def format_like(x: Tensor) -> torch.memory_format:
    """Return the memory format of torch's own result.

    On the CPU it is contiguous, or channels_last where x is, whole or a part of such a tensor; on
    CUDA the result lies as x does.
    """
    if x.is_cuda:
        return torch.preserve_format
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or not (x.is_contiguous(memory_format=last) or _channels_innermost(x)):
        return torch.contiguous_format
    return last


def _channels_innermost(x: Tensor) -> bool:
    shape, strides = x.shape, x.stride()
    span = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[d] < span or (d == 0 and strides[1] == span):
            return False
        span = strides[d] * max(shape[d], 1)
    return True


def statistics_shape(x: Tensor, group_samples: int) -> int:
    """Return how many statistics of each kind there are."""
    channels, samples = x.shape[1], x.shape[0]
    if group_samples and samples > group_samples and x.numel():
        return channels * -(-samples // group_samples)
    return channels


def new_bits(inputs: Inputs, constants: Constants) -> Tensor | None:
    """Return memory for the bits; None where the kernel does not support x's layout."""
    x = inputs.x
    layout = _C.batch_norm_layout(x, constants.group_samples, inputs.mask is not None)
    if layout is None:
        return None
    return torch.empty(layout[4], dtype=torch.uint8, device=x.device)


def _launch(
    kernel: Callable[..., int], call: Call, tensors: tuple[Any, ...], *numbers: float
) -> bool:
    """Run a kernel with the scratch memory it asks for; False where it refuses a layout."""
    x, seed, constants = call.inputs.x, call.inputs.seed, call.constants
    state = seed if type(seed) is tuple else (0 if seed is None else seed, 0)
    last = (*numbers, *constants[:6], *state, constants.index_offset, call.op)
    scratch, semaphores = (None, None) if x.is_cpu else memory.scratch(x.device, 0)
    while (status := kernel(*tensors, scratch, semaphores, *last)) < 0:
        scratch, semaphores = memory.scratch(x.device, -status)
    return status == 0


def forward(call: Call, keep_bits: bool = False, out: Tensor | None = None) -> Tensor:
    """Return y; moments, and bits if they are asked for and needed, are left in the call."""
    x, residual, mask, weight, bias, moments, mean, var, _ = inputs = call.inputs
    statistics, _, group_samples, *_ = call.constants
    if moments is None and statistics == COMPUTE:
        count = statistics_shape(x, group_samples) if group_samples else x.shape[1]
        moments = torch.empty((3, count), dtype=torch.float64, device=x.device)
    call.moments = moments
    y = result_like(x) if out is None else out
    keep_bits = keep_bits and residual is not None and call.keeps_bits()
    bits = call.bits  # as operators give it, whose results have a size that shapes tell
    if keep_bits and bits is None:
        bits = new_bits(inputs, call.constants)
    kernel, batches, momentum = _C.batch_norm_forward, call.batches, call.momentum
    tensors = (y, moments, bits, x, residual, mask, weight, bias, mean, var, batches)
    if (keep_bits and bits is None) or not _launch(kernel, call, tensors, momentum):
        x, residual, mask, weight, bias, _, used_mean, used_var, _ = copies = _supported(call)
        result = y
        if y.stride() != x.stride() or y.data_ptr() == x.data_ptr() or _C.inspect(y) != (0, True):
            result = torch.empty_like(x)
        if keep_bits and bits is None:
            bits = new_bits(copies, call.constants)
        counted = batches
        if batches is not None and not _counts(batches, x):
            counted = None
            if momentum == CUMULATIVE:
                momentum = 1.0 / float(batches + 1)
        first = (result, moments, bits, x, residual, mask, weight, bias)
        if not _launch(kernel, call, (*first, used_mean, used_var, counted), momentum):
            raise refused(call.op)
        if batches is not None and counted is None:
            batches.add_(1)
        updated = () if statistics == FIXED else ((mean, used_mean), (var, used_var))
        for given, used in updated:
            if given is not None and used is not None and used.data_ptr() != given.data_ptr():
                given.copy_(used)
        if result is not y:
            y.copy_(result)
    call.bits = bits
    if statistics != FIXED and (mean is not None or var is not None or batches is not None):
        # torch takes inference tensors here, which have no version, and ignores them.
        _increment_version([t for t in (mean, var, batches) if t is not None])
    return y


def moments_of(x: Tensor, mask: Tensor | None = None, group_samples: int = 0) -> Tensor:
    """Return the moments of x alone: float64 [3, statistics]."""
    call = Call(Inputs(x, mask=mask), Constants(COMPUTE, 1.0, group_samples))
    x = supported(x, call)
    if mask is not None:
        mask = mask.contiguous()
    count = statistics_shape(x, group_samples)
    moments = torch.empty((3, count), dtype=torch.float64, device=x.device)
    tensors = (None, moments, None, x, None, mask, None, None, None, None, None)
    if not _launch(_C.batch_norm_forward, call, tensors, 0.0):
        raise refused(call.op)
    return moments


def supported(x: Tensor, call: Call) -> Tensor:
    """Return x itself where the kernels support its layout, else a copy in one that they do."""
    masked, group_samples = call.inputs.mask is not None, call.constants.group_samples
    x = checks.plain(x, call.op, "input")
    if _C.batch_norm_layout(x, group_samples, masked) is not None:
        return x
    copy = torch.empty_like(x)
    if _C.batch_norm_layout(copy, group_samples, masked) is None:
        copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _counts(batches: Tensor, x: Tensor) -> bool:
    """Return whether the kernels can count up this tensor; torch's layers take any."""
    whole = batches.dtype is torch.int64 and batches.numel() == 1
    return whole and batches.device == x.device and type(batches) is Tensor


def _supported(call: Call) -> Inputs:
    """Return the inputs in layouts that the kernels support, copied where they must be."""
    inputs = call.inputs
    x, residual, mask = supported(inputs.x, call), inputs.residual, inputs.mask
    if mask is not None:
        mask = mask.contiguous()
    if residual is not None and (
        residual.stride() != x.stride() or _C.inspect(residual) != (0, True)
    ):
        residual = torch.empty_like(x).copy_(residual)
    vectors: dict[str, Any] = {
        name: checks.plain(t, call.op, name).contiguous()
        for name in ("weight", "bias", "running_mean", "running_var")
        if (t := getattr(inputs, name)) is not None
    }
    return inputs._replace(x=x, residual=residual, mask=mask, **vectors)


def backward(
    call: Call,
    grad: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    *,
    reduce: bool = True,
    sums: Tensor | None = None,
    keep_sums: bool = False,
    from_y: bool = False,
) -> Gradients:
    """Return the gradients of x, residual, weight and bias that are wanted.

    Args:
        call: with the moments and bits of forward.
        grad: of y.
        wanted: which gradients.
        reduce: whether to compute the sums. Alone (only the parameters' gradients wanted, with
            ``keep_sums``) this is the first of two steps; the second takes ``sums``, does not
            reduce, and computes the gradients of x and residual.
        sums: those of the first step.
        keep_sums: whether the sums are a result.
        from_y: whether x is y, which was written over it.

    Raises:
        RuntimeError: a kernel refused a copy in a layout that it should support.
    """
    inputs, constants = call.inputs, call.constants
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    want_x, want_residual, want_weight, want_bias = wanted
    want_weight, want_bias = want_weight and weight is not None, want_bias and bias is not None
    if constants.statistics == FIXED and not (want_weight or want_bias or keep_sums):
        reduce = False
    if sums is None and (keep_sums or not x.is_cpu or _C.CUDA_ON_HOST):
        shape = (2, statistics_shape(x, constants.group_samples))
        sums = torch.empty(shape, dtype=torch.float64, device=x.device)
    for attempt in (0, 1):
        x, residual, mask, weight, bias, _, mean, var, _ = inputs
        results = (
            torch.empty_like(x) if want_x else None,
            torch.empty_like(x) if want_residual else None,
            torch.empty_like(weight) if want_weight and weight is not None else None,
            torch.empty_like(bias) if want_bias and bias is not None else None,
            sums,
        )
        given = (grad, x, residual, mask, call.bits, call.moments, weight, bias, mean, var)
        if _launch(_C.batch_norm_backward, call, (*results, *given), reduce, from_y):
            return Gradients(*results)
        if attempt == 0:
            inputs = _supported(call)
            grad = torch.empty_like(inputs.x).copy_(grad)
    raise refused(call.op)
