"""Batch normalization with its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, random
from ..core.checks import SUPPORTED_DTYPES
from . import inplace as _batch_norm_inplace
from . import kernels
from . import op as _batch_norm_ops
from .kernels import Call, Running

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    out: Tensor | None = None,
    inplace: bool = False,
    negative_slope: float = 0.01,
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
    num_batches_tracked: Tensor | None = None,
    update_stats: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Batch normalization, and what often follows it, in one pass (Ioffe and Szegedy 2015).

    :math:`y = \mathrm{dropout}(\mathrm{act}(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma
    + \beta + r))` with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of each
    channel over the batch, or with the running statistics if not ``training``.

    Args:
        x: of shape (N, C) or (N, C, ...), float64, float32, float16 or bfloat16, in any layout;
            contiguous, channels_last and other dense layouts are read as they lie.
        running_mean: of shape (C,), or None. In training it becomes
            ``(1 - momentum) * running_mean + momentum * mean``.
        running_var: the same for the unbiased variance.
        weight: gamma, of shape (C,); 1 if not given. Parameters and running statistics may be
            float32 for 16-bit ``x``.
        bias: beta, of shape (C,); 0 if not given.
        training: whether to use the batch's statistics; also used without running ones.
        momentum: within [0, 1]; None for a cumulative average, 1 / ``num_batches_tracked``.
        eps: added to the variance, > 0.
        activation: None, "relu", "leaky_relu", "silu" or "gelu".
        residual: r, of x's shape and dtype; added before the activation.
        dropout: the probability of dropping an element of the result, in training.
        out: where to write the result, under ``torch.no_grad()``; may be ``x`` or ``residual``.
        inplace: write the result into ``x``, and for backward keep it in the place of ``x``
            (Rota Bulo, Porzi, Kontschieder 2018): with no activation or a leaky ReLU, without
            residual and dropout. See below.
        negative_slope: of leaky ReLU.
        mask: of shape (N, ...) without the channels, bool: where it is False, an element belongs to
            no statistic, and its result and gradient are 0 (padded sequences).
        virtual_batch_size: as many consecutive samples share statistics, in training (ghost batch
            normalization, Hoffer et al. 2017); the last group may be smaller. Running statistics
            are those of the whole batch.
        num_batches_tracked: an int64 tensor that is counted up in training.
        update_stats: whether running statistics and ``num_batches_tracked`` are updated at all. Off
            where a batch is seen again, as by activation checkpointing.
        seed: of dropout, as in :func:`dropout`.
        generator: of dropout, as in :func:`dropout`.

    Statistics are taken about a value near the mean and added in float64: the float32 result is
    right to 1e-6 of its scale for mean / std up to 1e5. Results are the same bits for any number of
    threads and any CPU instruction set. For backward x and the statistics are kept, and one bit an
    element for a ReLU or leaky ReLU after a residual (the residual itself for SiLU and GELU); a
    dropout mask is drawn again. An empty batch leaves the running statistics.

    With ``inplace`` backward takes leaky ReLU and the affine map back, for weights of either sign.
    Where that would lose digits, ``|weight|`` below 1/32 of ``|bias|`` (float16 1/8, bfloat16 1/4)
    or 0, the channel's x is kept; on CUDA the host waits for the device to say which these are.
    What x was made by must not need it (a convolution does not, an activation may): torch says so
    in its backward. Not differentiable twice. Under ``torch.compile`` ``x`` is written to all the
    same, and what is kept is the compiler's decision.

    Raises:
        TypeError: an argument is no tensor, number or name where one is wanted.
        ValueError: shapes, dtypes or devices do not fit; ``eps`` is not positive, ``momentum`` or
            ``dropout`` outside [0, 1]; training on one value per channel; ``inplace`` with what
            cannot be taken back, or with an ``x`` that must not be written to. Running statistics
            are then as they were.

    Example:
        >>> y = fusereg.functional.batch_norm(
        ...     x, mean, var, weight, bias, True, activation="relu", residual=shortcut
        ... )
    """
    op = "batch_norm"
    if inplace:
        if isinstance(x, Tensor):  # which the rest of the checks will say
            _check_inplace_tensors(x, residual, out, op)
        check_inplace(activation, negative_slope, dropout, f"fusereg.{op}")
    call, running = prepared(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual,
        dropout, out, negative_slope, mask, virtual_batch_size, num_batches_tracked, update_stats,
        seed, generator, op,
    )  # fmt: skip
    if inplace:
        return _batch_norm_inplace.normalize(call, x, mask, weight, bias, running)
    return _batch_norm_ops.normalize(call, x, residual, mask, weight, bias, None, running, out)


def check_inplace(activation: object, slope: float, dropout: float, where: str) -> None:
    """Raises unless the result of such a layer tells what came in."""
    if activation not in (None, "leaky_relu"):
        raise ValueError(
            f"{where}: inplace=True wants activation None or 'leaky_relu', whose input can be told "
            f"from its result, got {activation!r}"
        )
    if activation is not None and not 0.0 < slope < float("inf"):
        raise ValueError(f"{where}: inplace=True wants a negative_slope above 0, got {slope}")
    if dropout:
        raise ValueError(f"{where}: inplace=True supports no dropout, got dropout={dropout}")


def _check_inplace_tensors(x: Tensor, residual: object, out: object, op: str) -> None:
    for name, value in (("residual", residual), ("out", out)):
        if value is not None:
            raise ValueError(f"fusereg.{op}: inplace=True and {name} exclude each other")
    checks.check_in_place(x, op)


def prepared(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    dropout: float,
    out: Tensor | None,
    negative_slope: float,
    mask: Tensor | None,
    virtual_batch_size: int | None,
    num_batches_tracked: Tensor | None,
    update_stats: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    op: str,
    single_values: bool = False,
) -> tuple[Call, Running]:
    """The checked arguments as the operations take them.

    ``single_values``: whether one value per channel will do, because other processes have more.
    """
    use_batch = training or running_mean is None or running_var is None
    _check(
        x, running_mean, running_var, weight, bias, use_batch, momentum, eps, residual, out, mask,
        num_batches_tracked, single_values, op,
    )  # fmt: skip
    try:
        number = kernels.ACTIVATIONS[activation]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in kernels.ACTIVATIONS)
        raise ValueError(
            f"fusereg.{op}: activation must be one of {names}, got {activation!r}"
        ) from None
    group = 0
    if virtual_batch_size is not None:
        group = _group_samples(x, virtual_batch_size, use_batch, op)
    p = 0.0
    key: int | Tensor = 0
    offset = 0
    if dropout:
        checks.check_probability(dropout, op, "dropout")
        if training:
            p = float(dropout)
            if dispatch.eager():
                key, offset = random.eager_state(x, random.Source(seed, generator), op)
            else:
                key = random.traced_state(x, random.Source(seed, generator), op)
    if use_batch:
        statistics = kernels.COMPUTE
        if training and update_stats:
            running = Running(
                running_mean,
                running_var,
                num_batches_tracked,
                -1.0 if momentum is None else momentum,
            )
        else:
            running = kernels.NO_RUNNING
    else:
        statistics = kernels.FIXED
        running = Running(running_mean, running_var)
    call = Call(statistics, eps, group, number, negative_slope, p, key, offset, 0, op)
    return call, running


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor | None,
    mask: Tensor | None,
    num_batches_tracked: Tensor | None,
    single_values: bool,
    op: str,
) -> None:
    """Raises, before anything is written, where an argument is wrong."""
    if not (dispatch.eager() and _C.batch_norm_fits(x, running_mean, running_var, weight, bias)):
        _check_shapes(x, running_mean, running_var, weight, bias, op)
    shape = x.shape
    channels = shape[1]
    if use_batch:
        if momentum is not None and not 0.0 <= momentum <= 1.0:
            raise ValueError(
                f"fusereg.{op}: momentum must be within [0, 1] or None, got {momentum}"
            )
        if x.numel() == channels and channels and not single_values:
            raise ValueError(
                f"fusereg.{op}: training wants more than 1 value per channel, "
                f"got x of shape {tuple(shape)}"
            )
    if not eps > 0.0:
        raise ValueError(f"fusereg.{op}: eps must be positive, got {eps}")
    if residual is not None:
        _check_like(x, residual, "residual", op)
    if out is not None:
        _check_out(x, out, (weight, bias, residual), op)
    if mask is not None:
        _check_mask(x, mask, op)
    if num_batches_tracked is not None and (
        not isinstance(num_batches_tracked, Tensor)
        or num_batches_tracked.dtype is not torch.int64
        or num_batches_tracked.numel() != 1
    ):
        raise ValueError(
            f"fusereg.{op}: num_batches_tracked must be an int64 tensor of one element, "
            f"got {num_batches_tracked!r}"
        )


def _check_shapes(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    op: str,
) -> None:
    if type(x) is not Tensor or x.dtype not in SUPPORTED_DTYPES or x.layout is not torch.strided:
        checks.check_input(x, op)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(
            f"fusereg.{op}: x must have at least 2 dimensions (N, C, ...), got {len(shape)}"
        )
    device = x.device
    channels = shape[1]
    for name, values in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if values is not None and (
            not isinstance(values, Tensor)
            or values.dim() != 1
            or values.shape[0] != channels
            or values.device != device
        ):
            _wrong_vector(name, values, channels, device, op)


def _group_samples(x: Tensor, size: object, use_batch: bool, op: str) -> int:
    where = f"fusereg.{op}: virtual_batch_size"
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{where} must be an integer or None, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{where} must be positive, got {size}")
    if not use_batch:
        return 0
    samples, channels = x.shape[0], x.shape[1]
    if samples and channels and x.numel():
        values = x.numel() // (samples * channels)
        smallest = samples % size or min(size, samples)
        if smallest * values == 1:
            raise ValueError(
                f"fusereg.{op}: training wants more than 1 value per channel in each virtual "
                f"batch, and a batch of {samples} in parts of {size} leaves one with 1"
            )
    return size


def _wrong_vector(name: str, values: object, channels: int, device: torch.device, op: str) -> None:
    where = f"fusereg.{op}: {name}"
    if not isinstance(values, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor or None, got {type(values).__name__}")
    if values.device != device:
        raise ValueError(f"{where} must be on {device} as x, got {values.device}")
    raise ValueError(f"{where} must have shape ({channels},), got {tuple(values.shape)}")


def _check_like(x: Tensor, other: object, name: str, op: str) -> None:
    where = f"fusereg.{op}: {name}"
    if not isinstance(other, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {type(other).__name__}")
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        raise ValueError(
            f"{where} must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {other.dtype} of shape {tuple(other.shape)} on {other.device}"
        )


def _check_out(x: Tensor, out: object, inputs: tuple[Tensor | None, ...], op: str) -> None:
    checks.check_target(x, out, op)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(
            f"fusereg.{op}: out= supports no gradients, and an argument requires one; "
            "leave out= away, or call under torch.no_grad()"
        )


def _check_mask(x: Tensor, mask: object, op: str) -> None:
    wanted = (x.shape[0], *x.shape[2:])
    if not isinstance(mask, Tensor):
        raise TypeError(f"fusereg.{op}: mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool or tuple(mask.shape) != wanted or mask.device != x.device:
        raise ValueError(
            f"fusereg.{op}: mask must be torch.bool of shape {wanted} on {x.device}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )
