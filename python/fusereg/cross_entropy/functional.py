"""Cross-entropy with torch's signature."""

from __future__ import annotations

import warnings
from typing import NoReturn

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch
from ..core.arguments import check_integer
from ..core.hints import explains, refuse
from ..core.labels import MixedLabels
from ..core.operator import compute_dtype
from .op import OP, REDUCTIONS, class_dim, shape_of_rows
from .op import cross_entropy as _operator

_HALVES = (torch.float16, torch.bfloat16)


def check_smoothing(label_smoothing: float) -> None:
    """Raise torch's error unless this is a share of the probability."""
    checks.check_constant(label_smoothing, f"fusereg.{OP}: label_smoothing")
    if type(label_smoothing) is not float:
        label_smoothing = checks.as_number(label_smoothing, f"fusereg.{OP}: label_smoothing")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            f"fusereg.{OP}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )


@explains()
def cross_entropy(
    input: Tensor,
    target: Tensor | MixedLabels,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    r"""Return the cross-entropy of logits and labels, as torch.nn.functional.cross_entropy does.

    For one row of logits x, class weights w and smoothing e:

    .. math:: \ell = s \log \sum_c e^{x_c} - \sum_c q_c x_c, \quad
       q_c = w_c \left((1 - e) t_c + e / C\right), \quad s = \sum_c q_c

    with t the probabilities of the target, or 1 at its class index (Szegedy et al. 2016). For
    :class:`fusereg.augment.MixedLabels` q is ``share * q(a) + (1 - share) * q(b)`` of each sample
    (Zhang et al. 2018), in one pass over the logits. Forward keeps the logarithm of the sum of each
    row beside the logits, and backward computes the exponentials a second time: nothing else of the
    size of the logits is allocated but their gradient.

    Args:
        input: logits [N, C], [C] or [N, C, d1, ...], float64, float32, float16 or bfloat16.
        target: int64 class indices [N], [] or [N, d1, ...]; floating-point probabilities of the
            shape of ``input``; or the labels that MixUp and CutMix have mixed.
        weight: [C] weights of the classes.
        size_average: deprecated, as in torch.
        ignore_index: the class index of rows that do not count; not for probabilities.
        reduce: deprecated, as in torch.
        reduction: "mean" divides by the sum of the weights of the rows that count (for mixed labels
            each of the two parts by its own), for probabilities by their number; "sum"; "none".
        label_smoothing: e, within [0, 1].
        inplace_backward: let backward write the gradient over ``input``, whose logits are lost
            then: nothing of their size is allocated. Whoever needs them in a later backward gets
            torch's error. Only for logits that are no leaf, contiguous or channels last; under a
            compiler it changes nothing.

    Returns:
        The loss in the dtype of ``input``; in float32 under autocast, and for 16-bit logits with
        float32 probabilities, where no copy of the logits is made.

    A gradient for ``target`` (probabilities) or ``weight`` is computed by torch's function in place
    of this one. A class index out of range gives NaN on CUDA, where torch ends the process.

    Raises:
        TypeError: an argument is not a tensor where one is wanted, or of a wrong kind.
        ValueError: shapes, devices, the reduction or the smoothing do not fit.
        IndexError: a class index is out of range, on the CPU.

    Example:
        >>> images, labels = augment(images, labels)  # mixed by MixUp
        >>> loss = fusereg.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    """
    if unknown:
        refuse(cross_entropy, unknown)
    legacy = size_average is not None or reduce is not None
    unusual = legacy or inplace_backward or isinstance(label_smoothing, Tensor)
    if not (unusual or dispatch.is_dynamo_compiling()):
        # What it does, or None.
        options = (ignore_index, reduction, label_smoothing)
        loss = _C.cross_entropy_at_once(
            _operator.apply, MixedLabels, input, target, weight, *options
        )
        if loss is not None:
            return loss
    if legacy:
        reduction = _legacy(size_average, reduce)
    if reduction not in REDUCTIONS:
        raise ValueError(f"fusereg.{OP}: {reduction} is not a valid value for reduction")
    check_smoothing(label_smoothing)
    ignore_index = check_integer(ignore_index, -(2**63), f"fusereg.{OP}: ignore_index")
    checks.check_input(input, OP, "input")
    if input.dim() == 0:
        raise ValueError(f"fusereg.{OP}: input must have at least 1 dimension, got 0")
    other = share = None
    if isinstance(target, MixedLabels):
        target, other, share = _mixed(input, target)
    else:
        target = _target(input, target, "target")
    if weight is not None:
        _check_weight(input, weight)
    wide = (
        input.dtype in _HALVES
        and input.device.type in ("cpu", "cuda")
        and torch.is_autocast_enabled(input.device.type)
    )
    if target.is_floating_point():
        _check_probabilities(target, ignore_index)
        grad = target.requires_grad or (weight is not None and weight.requires_grad)
        if grad or (input.dim() > 1 and 0 in input.shape[1:]):
            return torch.nn.functional.cross_entropy(
                input, target, weight, reduction=reduction, label_smoothing=label_smoothing
            )
        common = torch.promote_types(input.dtype, target.dtype)
        if common is not input.dtype:
            if common is torch.float32:
                wide = True
            else:
                input = input.to(common)
        if target.dtype not in (input.dtype, compute_dtype(input.dtype)):
            target = target.to(input.dtype)
        if target.stride() != input.stride() and dispatch.direct(input, target):
            target = torch.empty_like(input, dtype=target.dtype).copy_(target)
    elif other is None and input.dim() > 2 and 0 in input.shape[2:]:
        return torch.nn.functional.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    elif weight is not None and weight.requires_grad:
        raise RuntimeError(
            f"fusereg.{OP}: weight has no derivative where target has class indices; detach it"
        )
    if weight is not None:
        weight = weight.to(compute_dtype(input.dtype)).contiguous()
    if inplace_backward and torch.is_grad_enabled():
        _check_overwritten(input)
    args = (input, target, other, share, weight, float(label_smoothing), ignore_index)
    result: Tensor = _operator(*args, REDUCTIONS[reduction], wide, inplace_backward)[0]
    return result


def _legacy(size_average: bool | None, reduce: bool | None) -> str:
    """Return the reduction that the deprecated arguments name, and warn as torch does."""
    mean = True if size_average is None else size_average
    reduced = True if reduce is None else reduce
    name = "none" if not reduced else "mean" if mean else "sum"
    warnings.warn(
        f"size_average and reduce args will be deprecated, please use reduction='{name}' instead.",
        stacklevel=3,
    )
    return name


def _check_device(x: Tensor, t: Tensor, name: str) -> None:
    if t.device != x.device:
        raise ValueError(f"fusereg.{OP}: {name} must be on {x.device}, got {t.device}")


def _target(x: Tensor, target: object, name: str) -> Tensor:
    """Return the target as the kernels take it: probabilities, or int64 class indices."""
    checks.check_strided(target, OP, name)
    assert isinstance(target, Tensor)
    _check_device(x, target, name)
    if target.shape == x.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"fusereg.{OP}: Expected floating point type for {name} with class probabilities, "
                f"got {target.dtype}"
            )
        return target
    return _indices(x, target, name)


def _indices(x: Tensor, target: Tensor, name: str) -> Tensor:
    if list(target.shape) != shape_of_rows(x):
        kind = RuntimeError if target.dim() == x.dim() - 1 and x.dim() > 2 else ValueError
        raise kind(
            f"fusereg.{OP}: {name} must have class indices of shape {tuple(shape_of_rows(x))} "
            f"or probabilities of shape {tuple(x.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype is torch.int64:
        return target if target.is_contiguous() else target.contiguous()
    if target.dtype is torch.uint8:
        return target.long()
    raise RuntimeError(
        f"fusereg.{OP}: {name} must have class indices of dtype torch.int64 or torch.uint8, "
        f"got {target.dtype}"
    )


def _mixed(x: Tensor, labels: MixedLabels) -> tuple[Tensor, Tensor, Tensor]:
    """Return both samples' class indices, and the share of the first."""
    parts = []
    for name, t in zip(labels._fields, labels, strict=True):
        checks.check_tensor(t, OP, f"target.{name}")
        _check_device(x, t, f"target.{name}")
        parts.append(t)
    a, b, share = parts
    if x.dim() == 1 or share.shape != x.shape[:1]:
        raise ValueError(
            f"fusereg.{OP}: target.weight must have a share for each sample of input, whose shape "
            f"is {tuple(x.shape)}, got shape {tuple(share.shape)}"
        )
    if share.requires_grad:
        raise ValueError(f"fusereg.{OP}: target.weight must not require a gradient")
    a, b = _indices(x, a, "target.a"), _indices(x, b, "target.b")
    return a, b, share.to(torch.float32).contiguous()


def _check_weight(x: Tensor, weight: object) -> None:
    checks.check_strided(weight, OP, "weight")
    assert isinstance(weight, Tensor)
    _check_device(x, weight, "weight")
    classes = x.shape[class_dim(x)]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"fusereg.{OP}: weight tensor should be defined either for all {classes} classes or no "
            f"classes but got weight tensor of shape: {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise RuntimeError(f"fusereg.{OP}: weight must be floating-point, got {weight.dtype}")


def _check_probabilities(target: Tensor, ignore_index: int) -> None:
    checks.check_input(target, OP, "target")
    if ignore_index >= 0:
        raise RuntimeError(f"fusereg.{OP}: ignore_index is not supported for floating point target")


def _check_overwritten(x: Tensor) -> None:
    """Raise unless backward may write over the logits."""
    checks.check_in_place(x, OP, "input")
    dense = x.is_contiguous() or x.movedim(class_dim(x), -1).is_contiguous()
    if not dense:
        raise ValueError(
            f"fusereg.{OP}: inplace_backward needs logits that are contiguous or channels last, "
            f"got strides {x.stride()}"
        )
