"""Batch normalization as torch operations.

``normalize`` picks between

- the kernels: eager calls;
- ``torch.ops.fusereg.batch_norm``: torch.compile, export, fake tensors. It is a pure function;
  running statistics are then updated by torch's own operations. It takes any layout, so that
  Inductor copies no activation; its overload ``exact``, for dropout, keeps the traced one. On CPUs
  Inductor generates code of its own in its place (decompositions.py);
- torch's operations (reference.py): torch.func transforms, forward mode, other programs.

Second derivatives are composed of torch's operations too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..core import dispatch, operator, random
from ..core.operator import Operator
from . import kernels, reference
from .kernels import (
    COMPUTE,
    CUMULATIVE,
    FIXED,
    RECTIFIERS,
    Call,
    Constants,
    Inputs,
    constants_of,
    inputs_of,
)

_TENSORS = (
    "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor? moments,"
    " Tensor? running_mean, Tensor? running_var, Tensor? seed"
)
_CONSTANTS = (
    "int statistics, float eps, int group_samples, int activation, float slope, float p,"
    " SymInt index_offset"
)


# --- forward --------------------------------------------------------------------------------------


def call_of(inputs: tuple[Any, ...], constants: tuple[Any, ...]) -> Call:
    """Return the call of an operator's arguments, which updates nothing."""
    call = Call(Inputs(*inputs), Constants(*constants))
    if call.constants.statistics != FIXED:
        call.inputs = call.inputs._replace(running_mean=None, running_var=None)
    call.moments = call.inputs.moments
    return call


def _bit_bytes(x: Tensor) -> Any:
    """Return how many bytes the bits of a tensor in x's layout take at most."""
    if x.numel() == 0:
        return 0
    samples, channels = x.shape[0], x.shape[1]
    inner = x.numel() // samples // channels
    if x.is_contiguous():
        if inner == 1:
            return samples * ((channels + 7) // 8)
        return samples * channels * ((inner + 7) // 8)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return samples * inner * ((channels + 7) // 8)
    return x.numel()  # in other layouts they depend on how the kernels divide them


def _forward(*args: Any) -> Any:
    """Compute y, new moments and bits; for an eager call, which is the last argument, y alone."""
    call = args[-1]
    if type(call) is Call:
        return kernels.forward(call, keep_bits=True)
    x, given = args[0], args[5]
    call = call_of(args[:9], args[9:16])
    if args[16] and call.keeps_bits():
        call.bits = torch.empty(_bit_bytes(x), dtype=torch.uint8, device=x.device)
    y = kernels.forward(call, args[16])
    return y, call.moments if given is None else None, call.bits


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    call, keep_bits = call_of(args[:9], args[9:16]), args[16]
    x = call.inputs.x
    moments = bits = None
    if call.moments is None and call.constants.statistics == COMPUTE:
        count = kernels.statistics_shape(x, call.constants.group_samples)
        moments = x.new_empty((3, count), dtype=torch.float64)
    if keep_bits and call.keeps_bits():
        bits = x.new_empty((_bit_bytes(x),), dtype=torch.uint8)
    return kernels.result_like(x), moments, bits


def _save(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
    call, by_result = args[-1], False
    if type(call) is not Call:
        call = call_of(args[:9], args[9:16])
        _, moments, bits = output
        ctx.mark_non_differentiable(moments, bits)
        if call.moments is None and call.constants.statistics == COMPUTE:
            call.moments = moments
        # Where the order in memory may not matter, y tells the sign.
        by_result = call.keeps_bits() and not args[16]
        call.bits = bits if call.keeps_bits() and not by_result else None
    x, residual, mask, weight, bias, _, mean, var, seed = call.inputs
    constants, moments = call.constants, call.moments
    state = None
    if type(seed) is tuple:
        state, seed = seed, None
    ctx.rest = (constants, call.op, residual is not None, state, None)
    if residual is not None and not call.keeps_residual():
        residual = output[0] if by_result else None
    if constants.statistics != FIXED or moments is not None:
        mean = var = None
    ctx.save_for_backward(x, residual, mask, weight, bias, moments, mean, var, seed, call.bits)


def _after_activation(grad: Tensor, y: Tensor, constants: Constants) -> Tensor:
    """Return the gradient of what a rectifier was applied to, from the sign of its result."""
    if constants.activation == RECTIFIERS[0]:
        return torch.where(y <= 0, 0.0, grad)  # as torch: the gradient passes where y is NaN
    return torch.where(y > 0, grad, grad * constants.slope)


def _use_gradient_of_sum(call: Call) -> None:
    """Prepare a call whose gradient is past the activation: it stands in the residual's place too.

    The kernel computes as for all bits set, which gives the eager call's digits.
    """
    if call.inputs.residual is None or call.keeps_residual():
        return
    x = kernels.supported(call.inputs.x, call)
    call.inputs = call.inputs._replace(x=x, residual=None)
    bits = kernels.new_bits(call.inputs, call.constants)
    assert bits is not None
    call.bits = bits.fill_(255)


def _gradient(ctx: Any, grad: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
    tensors = operator.unpacked(ctx, given)
    constants, op, has_residual, state, memory = ctx.rest
    _, kept, *_, moments, _, _, seed, bits = tensors
    if memory is not None:  # of a compiled forward
        moments = torch.frombuffer(memory, dtype=torch.float64).view(3, -1)
    inputs = inputs_of((*tensors[:8], seed if state is None else state))
    call = Call(inputs, constants_of(constants), op, moments=moments, bits=bits)
    by_result = kept is not None and not call.keeps_residual()  # it is y
    if by_result:
        grad = _after_activation(grad, kept, call.constants)
        call.inputs = call.inputs._replace(residual=grad)
    of_x, of_residual, _, of_weight, of_bias = ctx.needs_input_grad[:5]
    wanted = (of_x, of_residual, of_weight, of_bias)
    found: tuple[Tensor | None, ...]
    differentiated = torch.is_grad_enabled() or dispatch.forward_mode()
    if differentiated and not torch.compiler.is_compiling():
        found = _differentiable_gradients(call, grad, has_residual, by_result)
    elif dispatch.direct(grad):
        if by_result:
            _use_gradient_of_sum(call)
        try:
            found = kernels.backward(call, grad, wanted)
        except RuntimeError:  # before it wrote; batched gradients are not looked for sooner
            if not dispatch.wrapped((grad,)):
                raise
            found = _traced_gradients(call, grad, wanted)
    else:
        found = _traced_gradients(call, grad, wanted)
    return found[0], found[1], None, found[2], found[3]


def _traced_gradients(
    call: Call, grad: Tensor, wanted: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    reduce = call.constants.statistics != FIXED or wanted[2] or wanted[3]
    exact = call.constants.p > 0.0 or call.bits is not None
    found = backward.traced(*arguments(call, grad), list(wanted), reduce, exact=exact)
    return tuple(t if want else None for t, want in zip(found[:4], wanted, strict=True))


# --- backward -------------------------------------------------------------------------------------


def arguments(call: Call, grad: Tensor, sums: Tensor | None = None) -> tuple[Any, ...]:
    """Return the arguments of ``backward`` before ``wanted``."""
    inputs = call.inputs._replace(moments=call.moments)
    return (grad, *inputs, call.bits, sums, *call.constants)


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    bits, sums, wanted, reduce = args[9], args[10], args[18], args[19]
    call = call_of(args[:9], args[11:18])
    call.bits = bits
    _use_gradient_of_sum(call)
    found = kernels.backward(call, grad, tuple(wanted), reduce=reduce, sums=sums, keep_sums=reduce)
    strides = operator.strides_of_result(args[0])
    of_elements = (None if t is None else operator.in_strides(t, strides) for t in found[:2])
    return *of_elements, *found[2:4], found.sums if reduce and sums is None else None


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    x, _, _, weight, bias, *_ = args[:9]
    sums, constants, wanted, reduce = args[10], Constants(*args[11:18]), args[18], args[19]
    made = (
        torch.empty_like(t) if want and t is not None else None
        for t, want in zip((x, x, weight, bias), wanted, strict=True)
    )
    shape = (2, kernels.statistics_shape(x, constants.group_samples))
    new_sums = x.new_empty(shape, dtype=torch.float64) if reduce and sums is None else None
    return *made, new_sums


def _no_second_derivative(ctx: Any, *_: Any) -> tuple[()]:
    raise RuntimeError(
        "fusereg::batch_norm_backward has no gradient; "
        "compute second derivatives outside of compiled code"
    )


def derivative_after_sum(call: Call) -> Tensor:
    """Return the derivative of all that follows z, for an activation without curvature."""
    constants, ones = call.constants._replace(statistics=FIXED), torch.ones_like(call.inputs.x)
    fixed = Call(call.inputs, constants, call.op, moments=call.moments, bits=call.bits)
    with torch.no_grad():
        factor = kernels.backward(fixed, ones, (False, True, False, False), reduce=False).residual
    assert factor is not None
    return factor


def _differentiable_gradients(
    call: Call, grad: Tensor, has_residual: bool, after_sum: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual, weight and bias as functions of all they depend on.

    ``after_sum``: ``grad`` is that of the sum already, before the activation.
    """
    constants, inputs, piecewise_linear = call.constants, call.inputs, not call.keeps_residual()
    if piecewise_linear:
        inputs = inputs._replace(residual=None)
        if not after_sum:
            grad = grad * derivative_after_sum(call)
        constants = constants._replace(activation=0, p=0.0)
        # What is constant in x and bias, a rectifier's slope or all of evaluation, has derivative 0
        # as in torch, rather than none.
        for t in (inputs.x, inputs.bias):
            if t is not None and t.requires_grad:
                like = t if t is inputs.x else reference.per_channel(t, grad)
                grad = torch.where(
                    torch.ones_like(grad, dtype=torch.bool), grad, like.to(grad.dtype)
                )

    def formula(x: Tensor, residual: Any, weight: Any, bias: Any) -> Tensor:
        given = inputs._replace(x=x, residual=residual, weight=weight, bias=bias)
        return reference.normalized(given, constants, call.op)[0]

    tensors = (inputs.x, inputs.residual, inputs.weight, inputs.bias)
    found = operator.gradients(formula, tensors, [grad], of_all=False)
    if piecewise_linear and has_residual:
        found[1] = grad
    return tuple(found)


batch_norm = Operator(
    f"batch_norm({_TENSORS}, {_CONSTANTS}, bool keep_bits) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    save=_save,
    gradient=_gradient,
    flexible=True,
)
batch_norm.compile(_C.batch_norm_functions)
#: (grad, *Inputs, bits, sums, *Constants, wanted, reduce): the gradients and, if ``reduce`` and
#: ``sums`` are not given, the sums.
backward = Operator(
    f"batch_norm_backward(Tensor grad, {_TENSORS}, Tensor? bits, Tensor? sums, {_CONSTANTS},"
    " bool[] wanted, bool reduce) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    save=lambda *_: None,
    gradient=_no_second_derivative,
    flexible=True,
)
_statistics = Operator(
    "batch_norm_statistics(Tensor x, Tensor? mask, int group_samples) -> Tensor",
    kernels.moments_of,
    fake=lambda x, _, group_samples: x.new_empty(
        (3, kernels.statistics_shape(x, group_samples)), dtype=torch.float64
    ),
    flexible=True,
)


# --- the entries ----------------------------------------------------------------------------------


def statistics(x: Tensor, mask: Tensor | None = None, group_samples: int = 0) -> Tensor:
    """Return the moments of x: float64 [3, statistics], mean, biased variance, count; no gradient.

    ``group_samples``: of each group of so many samples (0: of all), group after group.
    """
    compute = kernels.moments_of if dispatch.direct(x) else _statistics.overload
    moments: Tensor = compute(x.detach(), mask, group_samples)
    return moments


def update_running(call: Call, moments: Tensor) -> None:
    """Update the running statistics by torch's operations, which compilers and transforms see."""
    mean, var, batches = call.inputs.running_mean, call.inputs.running_var, call.batches
    if batches is not None:
        batches.add_(1)
    channels = call.inputs.x.shape[1]
    if mean is None or var is None or channels == 0:
        return
    # Those that a compiler computes have more rows.
    of_group, square_of_group, count = moments.detach()[:3].reshape(3, -1, channels).unbind(0)
    total = count.sum(0)
    whole = total.clamp_min(1.0)
    center = (of_group * count).sum(0) / whole
    square = ((square_of_group + (of_group - center).square()) * count).sum(0)
    factor: Any = call.momentum
    if factor == CUMULATIVE:
        factor = 0.0 if batches is None else 1.0 / batches.to(torch.float64)
    for old, new, changes in (
        (mean, center, total > 0.0),
        (var, square / (total - 1.0).clamp_min(1.0), total > 1.0),
    ):
        before = old.to(torch.float64)
        after = torch.where(changes, (1.0 - factor) * before + factor * new, before)
        old.copy_(after.to(old.dtype))


def at_once(inputs: Inputs, batches: Tensor | None, settings: object, name: str) -> Tensor | None:
    """Return y where nothing is unusual; None: prepare the call. Not asked while Dynamo traces."""
    return _C.batch_norm_at_once(
        batch_norm.apply, random.new_state, inputs, batches, settings, name
    )


def normalize(call: Call, out: Tensor | None = None) -> Tensor:
    """Return y by whatever path fits; the arguments have been checked.

    The call's statistics are COMPUTE (no moments given); GIVEN (moments of the batch, whoever
    computed them); FIXED (constants: the moments or, without these, the running statistics).
    """
    if call.direct:
        if out is not None:
            return operator.written(kernels.forward(call, out=out))
        if not dispatch.forward_mode():
            x, residual, _, weight, bias, *_ = call.inputs
            if torch.is_grad_enabled() and (
                x.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                y: Tensor = batch_norm.apply(*call.inputs[:-1], (call,))
                return y
            return kernels.forward(call)
    y, moments = _traced(call)
    if call.constants.statistics != FIXED and moments is not None:
        update_running(call, moments)
    return y if out is None else out.copy_(y)


def _check_running(call: Call) -> None:
    """Raise where a forward-mode derivative by the running statistics would be needed."""

    def has_tangent(*tensors: Tensor | None) -> bool:
        unpack: Any = torch.autograd.forward_ad.unpack_dual
        return any(t is not None and unpack(t).tangent is not None for t in tensors)

    if call.constants.statistics == FIXED and dispatch.forward_mode():
        x, residual, _, weight, bias, _, mean, var, _ = call.inputs
        if has_tangent(mean, var) and has_tangent(x, residual, weight, bias):
            raise RuntimeError(
                f"fusereg.{call.op}: running_mean and running_var have no derivative, "
                "and must not have a forward gradient"
            )


def _check_levels(call: Call) -> None:
    """Raise where torch.func.vmap maps over the input and not over the running statistics."""
    x, _, mask, *_, mean, var, _ = call.inputs
    if call.constants.statistics == FIXED or mean is None or var is None:
        return
    mapped = dispatch.vmap_levels(x) | dispatch.vmap_levels(mask)
    if not mapped <= dispatch.vmap_levels(mean) & dispatch.vmap_levels(var):
        raise RuntimeError(
            f"fusereg.{call.op}: running_mean and running_var are updated, and torch.func.vmap "
            "maps over the input but not over them: map over them too (torch.func."
            "stack_module_state), or leave them out by track_running_stats=False or "
            "torch.func.replace_all_batch_norm_modules_(model)"
        )


def _traced(call: Call) -> tuple[Tensor, Tensor | None]:
    """Return y and the moments, under a compiler, a mode or a transform, and for subclasses."""
    if dispatch.for_other_programs():
        return reference.of_torch(call)
    if dispatch.functorch() or (not torch.compiler.is_compiling() and dispatch.forward_mode()):
        _check_running(call)
        _check_levels(call)
        return reference.composed(call)
    inputs = call.inputs
    statistics = call.constants.statistics
    if statistics != FIXED or inputs.moments is not None:
        inputs = inputs._replace(running_mean=None, running_var=None)
    # Draws and bits belong to elements in the order of memory, which must stay as it is for them.
    exact = call.constants.p > 0.0 or (call.keeps_bits() and call.constants.slope < 0.0)
    y, new, _ = batch_norm.traced(*inputs, *call.constants, exact, exact=exact)
    return y, new if statistics == COMPUTE else inputs.moments
