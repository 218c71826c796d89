"""Batch normalization as torch operations: autograd, torch.library, torch.func.

``_BatchNorm``
    the eager autograd function: x, the moments and the parameters are kept, and the residual or one
    bit an element where x alone does not tell the activation's derivative.
``torch.ops.fusereg.batch_norm``, ``torch.ops.fusereg.batch_norm_backward``
    the same as pure functions, for torch.compile, export, fake tensors; running statistics are then
    updated by torch's own operations.
``_Synchronized``
    with a ``reduce_sums`` between the two steps of backward, for several processes.
``batch_norm``
    the entry: picks between them. torch.func transforms, forward-mode derivatives and second
    derivatives are composed of torch's operations (_batch_norm_reference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import dispatch, operator
from . import kernels, reference
from .kernels import FIXED, RECTIFIERS, Call, Running

ReduceSums = Callable[[Tensor], Tensor]

_increment_version: Callable[[Any], None] = torch.autograd.graph.increment_version


def mark_written(running: Running) -> None:
    # Inference tensors have no version, and nobody minds.
    written = [t for t in running[:3] if t is not None]
    if written:
        _increment_version(written)


def _keeps_residual(call: Call) -> bool:
    """Whether backward has to add the residual again: neither x nor its sign bit tell z."""
    return call.activation not in (0, *RECTIFIERS)


# --- eager autograd -------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        mask: Tensor | None,
        moments: Tensor | None,
        running: Running,
    ) -> Tensor:
        y, moments, bits = kernels.forward(
            call, x, residual, mask, weight, bias, moments, running, keep_bits=True
        )
        fixed = call.statistics == FIXED
        if not fixed:
            mark_written(running)
        kept = residual if residual is not None and _keeps_residual(call) else None
        if fixed and moments is None:
            ctx.save_for_backward(x, weight, bias, kept, mask, bits, None, running[0], running[1])
        else:
            ctx.save_for_backward(x, weight, bias, kept, mask, bits, moments)
        ctx.call = call
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        x, weight, bias, residual, mask, bits, moments, *fixed = ctx.saved_tensors
        running = Running(*fixed) if fixed else kernels.NO_RUNNING
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            gx, gw, gb, gr = _differentiable_backward(
                ctx, grad, x, weight, bias, residual, mask, bits, moments, running
            )
            return gx, gw, gb, gr, None, None, None, None
        g = kernels.backward(
            call,
            grad,
            x,
            residual,
            mask,
            bits,
            moments,
            weight,
            bias,
            running,
            (need[0], need[3], need[1], need[2]),
        )
        return g.x, g.weight, g.bias, g.residual, None, None, None, None


def _differentiable_backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and residual as functions of all they depend on."""
    call: Call = ctx.call
    fixed = None
    if call.statistics == FIXED:
        fixed = (running[0], running[1]) if moments is None else (moments[0], moments[1])
    inputs = {"x": x, "weight": weight, "bias": bias}
    piecewise_linear = call.activation in (0, *RECTIFIERS)
    if piecewise_linear:
        # The derivative of all that follows z is constant: that of ones.
        with torch.no_grad():
            factor = kernels.backward(
                call._replace(statistics=FIXED), torch.ones_like(x), x, residual, mask, bits,
                moments, weight, bias, running, (False, True, False, False), reduce=False,
            ).residual  # fmt: skip
        assert factor is not None
        grad = grad * factor
        y, _ = reference.normalized(
            call._replace(activation=0, p=0.0), x, None, mask, weight, bias, fixed
        )
    else:
        if ctx.has_residual:
            inputs["residual"] = residual
        y, _ = reference.normalized(call, x, residual, mask, weight, bias, fixed)
    asked = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    found: dict[str, Tensor | None] = {}
    if asked:
        found = dict(
            zip(
                asked,
                torch.autograd.grad(
                    y, list(asked.values()), grad, create_graph=True, materialize_grads=True
                ),
                strict=True,
            )
        )
    grad_residual = found.get("residual")
    if piecewise_linear and ctx.has_residual:
        grad_residual = grad
    return found.get("x"), found.get("weight"), found.get("bias"), grad_residual


#: _BatchNorm.apply without its question for functorch, which the gate has answered.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _BatchNorm).apply


# --- torch.library --------------------------------------------------------------------------------

_define: Callable[[str], object] = dispatch.library.define
_implement: Callable[[str, Callable[..., Any], str], object] = dispatch.library.impl
_CONSTANTS = (
    "int statistics, float eps, int group_samples, int activation, float slope, float p,"
    " SymInt index_offset"
)
_define(
    "batch_norm(Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias,"
    " Tensor? moments, Tensor? running_mean, Tensor? running_var, Tensor? seed,"
    f" {_CONSTANTS}, bool keep_bits) -> (Tensor, Tensor, Tensor)"
)
_define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? mask, Tensor? bits,"
    " Tensor? moments, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " Tensor? seed, Tensor? sums,"
    f" {_CONSTANTS}, bool[] wanted, bool reduce) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_define("batch_norm_statistics(Tensor x, Tensor? mask, int group_samples) -> Tensor")

#: (statistics, eps, group_samples, activation, slope, p, index_offset)
_Constants = tuple[int, float, int, int, float, float, int]


def call_of(constants: _Constants, seed: Tensor | None) -> Call:
    return Call(*constants[:6], 0 if seed is None else seed, 0, constants[6], "batch_norm")


def _constants_of(call: Call) -> _Constants:
    return (*call[:6], call.index_offset)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which operators see x: channels_last where x is that, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _bit_bytes(x: Tensor, in_format: torch.memory_format) -> Any:
    """Layout::bit_bytes() for x in this format."""
    if x.numel() == 0:
        return 0
    samples, channels = x.shape[0], x.shape[1]
    inner = x.numel() // samples // channels
    if channels > 1 and in_format is not torch.contiguous_format:
        return samples * inner * ((channels + 7) // 8)
    if inner == 1:
        return samples * ((channels + 7) // 8)
    return samples * channels * ((inner + 7) // 8)


def _op_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, keep_bits = constants
    call = call_of(tuple(numbers), seed)
    x = x.contiguous(memory_format=memory_format(x))
    results = kernels.forward(
        call, x, residual, mask, weight, bias, moments,
        Running(running_mean, running_var), keep_bits,
    )  # fmt: skip
    new = results.moments if moments is None else None
    return (
        results.y,
        x.new_empty((0,), dtype=torch.float64) if new is None else new,
        x.new_empty((0,), dtype=torch.uint8) if results.bits is None else results.bits,
    )


def _fake_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, keep_bits = constants
    call = call_of(tuple(numbers), seed)
    in_format = memory_format(x)
    computes = moments is None and call.statistics == kernels.COMPUTE
    shape = (3, kernels.statistics_shape(x, call)) if computes else (0,)
    bits = _bit_bytes(x, in_format) if keep_bits and kernels.keeps_bits(call, residual) else 0
    return (
        torch.empty_like(x, memory_format=in_format),
        x.new_empty(shape, dtype=torch.float64),
        x.new_empty((bits,), dtype=torch.uint8),
    )


def _op_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    sums: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *numbers, wanted, reduce = constants
    call = call_of(tuple(numbers), seed)
    x = x.contiguous(memory_format=memory_format(x))
    g = kernels.backward(
        call, grad, x, residual, mask, bits, moments, weight, bias,
        Running(running_mean, running_var), tuple(wanted), reduce, sums, reduce,
    )  # fmt: skip
    new_sums = None if sums is not None else g.sums
    nothing = (x.new_empty((0,)) for _ in range(4))
    return (
        *(n if t is None else t for t, n in zip(g[:4], nothing, strict=True)),
        x.new_empty((0,), dtype=torch.float64) if new_sums is None else new_sums,
    )  # type: ignore[return-value]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    sums: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *numbers, wanted, reduce = constants
    call = call_of(tuple(numbers), seed)
    in_format = memory_format(x)
    likes = (x, x, weight, bias)
    made = [
        x.new_empty((0,))
        if not want or like is None
        else torch.empty_like(like, memory_format=in_format if like is x else None)
        for want, like in zip(wanted, likes, strict=True)
    ]
    shape = (2, kernels.statistics_shape(x, call)) if reduce and sums is None else (0,)
    return (*made, x.new_empty(shape, dtype=torch.float64))  # type: ignore[return-value]


def _op_statistics(x: Tensor, mask: Tensor | None, group_samples: int) -> Tensor:
    return kernels.moments_of(kernels.statistics_call(group_samples), x, mask)


def _fake_statistics(x: Tensor, mask: Tensor | None, group_samples: int) -> Tensor:
    call = kernels.statistics_call(group_samples)
    return x.new_empty((3, kernels.statistics_shape(x, call)), dtype=torch.float64)


for _key in ("CPU", "CUDA"):
    _implement("batch_norm_statistics", _op_statistics, _key)
    _implement("batch_norm", _op_batch_norm, _key)
    _implement("batch_norm_backward", _op_backward, _key)
torch.library.register_fake(
    "fusereg::batch_norm_statistics", _fake_statistics, lib=dispatch.library
)
torch.library.register_fake("fusereg::batch_norm", _fake_batch_norm, lib=dispatch.library)
torch.library.register_fake("fusereg::batch_norm_backward", _fake_backward, lib=dispatch.library)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, mask, weight, bias, moments, mean, var, seed, *constants, _ = inputs
    _, new_moments, bits = output
    call = call_of(tuple(constants), seed)
    ctx.call = call
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(new_moments, bits)
    if not _keeps_residual(call):
        residual = None
    if moments is None and call.statistics == kernels.COMPUTE:
        moments = new_moments
    if not kernels.keeps_bits(call, x if ctx.has_residual else None):
        bits = None
    if call.statistics != FIXED or moments is not None:
        mean = var = None
    ctx.save_for_backward(x, residual, mask, bits, moments, weight, bias, mean, var, seed)


def _op_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, residual, mask, bits, moments, weight, bias, mean, var, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[0], need[1], need[3], need[4]]
    g: tuple[Tensor | None, ...]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x_, weight_, bias_, residual_ = _differentiable_backward(
            ctx, grad, x, weight, bias, residual, mask, bits, moments, Running(mean, var)
        )
        g = (x_, residual_, weight_, bias_)
    else:
        g = torch.ops.fusereg.batch_norm_backward(
            grad, x, residual, mask, bits, moments, weight, bias, mean, var, seed, None,
            *_constants_of(ctx.call), wanted, not (ctx.call.statistics == FIXED
                                                  and not any(wanted[2:])),
        )  # fmt: skip
    gx, gr, gw, gb = (t if want else None for t, want in zip(g[:4], wanted, strict=True))
    return gx, gr, None, gw, gb, *[None] * 12


torch.library.register_autograd(
    "fusereg::batch_norm", _op_gradient, setup_context=_save_for_op, lib=dispatch.library
)


# --- several processes ----------------------------------------------------------------------------


class _Synchronized(torch.autograd.Function):
    """With ``reduce_sums`` between the two steps of backward; traced by torch.compile as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        moments: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        constants: _Constants,
        reduce_sums: ReduceSums,
    ) -> Tensor:
        y, _, bits = torch.ops.fusereg.batch_norm(
            x, residual, mask, weight, bias, moments, None, None, seed, *constants, True
        )
        call = call_of(constants, None)
        ctx.bits_kept = kernels.keeps_bits(call, residual)
        ctx.has_residual = residual is not None
        kept = residual if _keeps_residual(call) else None
        ctx.save_for_backward(x, weight, bias, kept, moments, mask, seed, bits)
        ctx.constants = constants
        ctx.reduce_sums = reduce_sums
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, moments, mask, seed, bits = ctx.saved_tensors
        bits = bits if ctx.bits_kept else None
        has = (True, ctx.has_residual, weight is not None, bias is not None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _synchronized_gradients(ctx, grad, has)
        common = (x, residual, mask, bits, moments, weight, bias, None, None, seed)
        *_, gw, gb, sums = torch.ops.fusereg.batch_norm_backward(
            grad, *common, None, *ctx.constants, [False, False, *has[2:]], True
        )
        sums = ctx.reduce_sums(sums)
        gx, gr, *_ = torch.ops.fusereg.batch_norm_backward(
            grad, *common, sums, *ctx.constants, [*has[:2], False, False], False
        )
        return (
            gx,
            gw if has[2] else None,
            gb if has[3] else None,
            gr if has[1] else None,
            *[None] * 5,
        )


def _synchronized_gradients(
    ctx: Any, grad: Tensor, has: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of all that they depend on, in all processes."""
    x, weight, bias, residual, moments, mask, seed, bits = ctx.saved_tensors
    call = call_of(ctx.constants, seed)
    if ctx.bits_kept:
        # Of the activation after a residual its sign is what is known, and a constant.
        with torch.no_grad():
            factor = kernels.backward(
                call._replace(statistics=FIXED), torch.ones_like(x), x, None, mask, bits, moments,
                weight, bias, kernels.NO_RUNNING, (False, True, False, False), reduce=False,
            ).residual  # fmt: skip
        assert factor is not None
        grad = grad * factor
        call = call._replace(activation=0, p=0.0)
    gx, gw, gb, gr = reference.gradients(
        call, grad, x, residual, mask, weight, bias, moments, ctx.reduce_sums
    )
    return (
        gx,
        None if weight is None else gw.to(weight.dtype),
        None if bias is None else gb.to(bias.dtype),
        gr if has[1] else None,
        *[None] * 5,
    )


def statistics(x: Tensor, mask: Tensor | None = None, group_samples: int = 0) -> Tensor:
    """The moments of x: float64 [3, statistics], mean, biased variance, count; no gradient.

    ``group_samples``: of each group of so many samples (0: of all), group after group.
    """
    x = x.detach()
    if dispatch.eager() and plain_types(x):
        return kernels.moments_of(kernels.statistics_call(group_samples), x, mask)
    moments: Tensor = torch.ops.fusereg.batch_norm_statistics(x, mask, group_samples)
    return moments


# --- running statistics by torch's operations -----------------------------------------------------


def update_running(running: Running, moments: Tensor, channels: int) -> None:
    """What the kernels do after forward, where compilers and transforms are to see it."""
    if running.batches is not None:
        running.batches.add_(1)
    if running.mean is None or running.var is None:
        return
    mean, var, count = moments.detach().reshape(3, -1, channels).unbind(0)
    total = count.sum(0)
    whole = total.clamp_min(1.0)
    center = (mean * count).sum(0) / whole
    square = ((var + (mean - center).square()) * count).sum(0)
    factor: Any = running.momentum
    if factor < 0.0:
        factor = 1.0 if running.batches is None else 1.0 / running.batches.to(torch.float64)
    for old, new, changes in (
        (running.mean, center, total > 0.0),
        (running.var, square / (total - 1.0).clamp_min(1.0), total > 1.0),
    ):
        before = old.to(torch.float64)
        after = torch.where(changes, (1.0 - factor) * before + factor * new, before)
        old.copy_(after.to(old.dtype))


# --- the entry ------------------------------------------------------------------------------------


def normalize(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
    out: Tensor | None = None,
    reduce_sums: ReduceSums | None = None,
) -> Tensor:
    """y by whatever path fits; the arguments have been checked.

    call.statistics: COMPUTE (moments None); GIVEN (the batch's moments, whoever computed them);
    FIXED (constants: the moments or, without these, the running statistics). The running
    statistics are updated unless they are the constants. ``reduce_sums``: with GIVEN moments of
    several processes, what adds backward's sums (float64 [2, statistics]) over these; then there is
    no second derivative, and the seed must be a tensor.
    """
    if reduce_sums is not None and moments is not None:
        seed = call.seed if isinstance(call.seed, Tensor) else None
        y = operator.applied(
            _Synchronized, x, weight, bias, residual, moments, mask, seed, _constants_of(call),
            reduce_sums,
        )  # fmt: skip
        update_running(running, moments, x.shape[1])
        return y if out is None else out.copy_(y)
    if dispatch.eager() and plain_types(x, residual, weight, bias):
        if out is not None:
            return _into(out, call, x, residual, mask, weight, bias, moments, running)
        if not dispatch.forward_mode():
            if torch.is_grad_enabled() and any_requires_grad(x, weight, bias, residual):
                return _apply(x, weight, bias, residual, call, mask, moments, running)
            y = kernels.forward(call, x, residual, mask, weight, bias, moments, running).y
            if call.statistics != FIXED:
                mark_written(running)
            return y
    y, moments = _observed(call, x, residual, mask, weight, bias, moments, running)
    if call.statistics != FIXED and moments is not None:
        update_running(running, moments, x.shape[1])
    return y if out is None else out.copy_(y)


def plain_types(*tensors: Tensor | None) -> bool:
    for t in tensors:  # a third of what all() with a generator takes
        if t is None:
            continue
        if not (type(t) is Tensor or type(t) is torch.nn.Parameter) or t.is_meta:
            return False
    return True


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any([t is not None and t.requires_grad for t in tensors])  # noqa: C419 - a list is faster


def _into(
    out: Tensor,
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> Tensor:
    kernels.forward(call, x, residual, mask, weight, bias, moments, running, out=out)
    if call.statistics != FIXED:
        mark_written(running)
    if not out.is_inference():
        _increment_version(out)
    return out


def _observed(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running: Running,
) -> tuple[Tensor, Tensor | None]:
    """y and the moments, under a compiler, a mode or a transform, and for subclasses."""
    if dispatch.for_other_programs():
        return reference.of_torch(call, x, residual, mask, weight, bias, moments, running)
    if dispatch.functorch() or (not torch.compiler.is_compiling() and dispatch.forward_mode()):
        return reference.composed(call, x, residual, mask, weight, bias, moments, running)
    seed = call.seed if isinstance(call.seed, Tensor) else None
    fixed = running[:2] if call.statistics == FIXED and moments is None else (None, None)
    y, new, _ = torch.ops.fusereg.batch_norm(
        x, residual, mask, weight, bias, moments, *fixed, seed, *_constants_of(call), True
    )
    return y, new if call.statistics == kernels.COMPUTE else moments
