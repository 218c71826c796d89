"""Batch normalization with its epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, random
from ..core.hints import explains, refuse
from ..core.random import Source
from . import inplace as in_place
from . import kernels, op
from .kernels import COMPUTE, CUMULATIVE, FIXED, Call, Inputs, constants_of

__all__ = ["batch_norm"]


class Settings(Protocol):
    """The settings of a layer, which is one of these itself, or of a call."""

    @property
    def training(self) -> bool: ...
    @property
    def momentum(self) -> float | None: ...
    @property
    def eps(self) -> float: ...
    @property
    def activation(self) -> str | None: ...
    @property
    def negative_slope(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def update_stats(self) -> bool: ...
    @property
    def inplace(self) -> bool: ...
    @property
    def virtual_batch_size(self) -> int | None: ...
    @property
    def num_features(self) -> int | None: ...


class Chosen(NamedTuple):
    """The settings of a call; in the order of :func:`batch_norm`'s parameters."""

    training: bool
    momentum: float | None
    eps: float
    activation: str | None = None
    dropout: float = 0.0
    inplace: bool = False
    negative_slope: float = 0.01
    virtual_batch_size: int | None = None
    update_stats: bool = True
    num_features: int | None = None


#: Those of them that are parameters of :func:`batch_norm`.
_OPTIONS = Chosen._fields[:-1]


@explains()
def batch_norm(
    input: Tensor,
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
    **unknown: NoReturn,
) -> Tensor:
    r"""Batch normalization, and what often follows it, in one pass (Ioffe and Szegedy 2015).

    :math:`y = \mathrm{dropout}(\mathrm{act}(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma
    + \beta + r))` with the mean :math:`\mu` and the biased variance :math:`\sigma^2` of each
    channel over the batch, or with the running statistics if not ``training``.

    Args:
        input: x, of shape (N, C) or (N, C, ...), float64, float32, float16 or bfloat16, in any
            layout; contiguous, channels_last and other dense layouts are read as they lie.
        running_mean: of shape (C,), or None. In training it becomes
            ``(1 - momentum) * running_mean + momentum * mean``.
        running_var: the same for the unbiased variance.
        weight: gamma, of shape (C,); 1 if not given. Parameters and running statistics may be
            float32 for 16-bit ``x``.
        bias: beta, of shape (C,); 0 if not given.
        training: whether to use the batch's statistics; also used without running ones.
        momentum: any number, as in torch, though only those within [0, 1] average; None for a
            cumulative average, 1 / ``num_batches_tracked``, which without a count leaves the
            running statistics, as torch's layers do.
        eps: added to the variance, > 0; in evaluation >= 0.
        activation: None, "relu", "leaky_relu", "silu" or "gelu".
        residual: r, of x's shape and dtype; added before the activation. Under autocast it may have
            another dtype; the result then has that of torch's sum.
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
        num_batches_tracked: a tensor that is counted up in training, of any dtype.
        update_stats: whether running statistics and ``num_batches_tracked`` are updated at all. Off
            where a batch is seen again, as by activation checkpointing.
        seed: of dropout, as in :func:`dropout`.
        generator: of dropout, as in :func:`dropout`.

    Statistics are taken about a value near the mean and added in float64: the float32 result is
    right to 1e-6 of its scale for mean / std up to 1e5. Results are the same bits for any number of
    threads and any CPU instruction set. For backward x and the statistics are kept, and one bit an
    element for a ReLU or leaky ReLU after a residual (the residual itself for SiLU and GELU); a
    dropout mask is drawn again. An empty batch leaves the running statistics. On the CPU the result
    is contiguous, or channels_last if x is, as torch's; on CUDA it lies as x does.

    With ``inplace`` backward takes leaky ReLU and the affine map back, for weights of either sign.
    Where that would lose digits, ``|weight|`` below 1/32 of ``|bias|`` (float16 1/8, bfloat16 1/4)
    or 0, the channel's x is kept; on CUDA the host waits for the device to say which these are.
    What x was made by must not need it (a convolution does not, an activation may): torch says so
    in its backward. Not differentiable twice. Under ``torch.compile`` ``x`` is written to all the
    same, and what is kept is the compiler's decision.

    Raises:
        TypeError: an argument is not a tensor, number or name where one is wanted.
        ValueError: shapes, dtypes or devices do not fit; ``eps`` is not positive, ``momentum`` not
            a number, ``dropout`` outside [0, 1]; training on one value per channel; ``inplace``
            with what cannot be taken back, or with an ``x`` that must not be written to. Running
            statistics are then as they were.
        RuntimeError: running statistics require a gradient, or in evaluation have one in forward
            mode.

    Example:
        >>> y = fusereg.functional.batch_norm(
        ...     x, mean, var, weight, bias, True, activation="relu", residual=shortcut
        ... )
    """
    if unknown:
        refuse(batch_norm, unknown)
    inputs = Inputs(input, residual, mask, weight, bias, None, running_mean, running_var)
    settings = Chosen(
        training,
        momentum,
        eps,
        activation,
        dropout,
        inplace,
        negative_slope,
        virtual_batch_size,
        update_stats,
    )
    source = Source(seed, generator)
    if seed is None and generator is None and out is None and not dispatch.is_dynamo_compiling():
        y = op.at_once(inputs, num_batches_tracked, settings, "batch_norm")
        if y is not None:
            return y
    return normalized(inputs, num_batches_tracked, settings, "batch_norm", source, out)


def called(inputs: Inputs, batches: Tensor | None, settings: Settings) -> Tensor:
    """Call :func:`batch_norm` with a layer's settings; a compiler may keep it as one call."""
    x, residual, mask, weight, bias, _, mean, var, _ = inputs
    options: Any = {name: getattr(settings, name) for name in _OPTIONS}
    options |= {"residual": residual, "mask": mask, "num_batches_tracked": batches}
    return batch_norm(x, mean, var, weight, bias, **options)


def normalized(
    inputs: Inputs,
    batches: Tensor | None,
    settings: Settings,
    name: str,
    source: Source | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Check the arguments and compute the result, in place if the settings say so."""
    if not settings.inplace:
        return op.normalize(prepared(inputs, batches, settings, name, source, out), out)
    if isinstance(inputs.x, Tensor):  # the other checks refuse what is not a tensor
        for what, value in (("residual", inputs.residual), ("out", out)):
            if value is not None:
                raise ValueError(f"fusereg.{name}: inplace=True and {what} exclude each other")
        checks.check_in_place(inputs.x, name, "input")
    check_inplace(settings.activation, settings.negative_slope, settings.dropout, name)
    return in_place.normalize(prepared(inputs, batches, settings, name, source))


def prepared(
    inputs: Inputs,
    batches: Tensor | None,
    settings: Settings,
    name: str,
    source: Source | None = None,
    out: Tensor | None = None,
    single_values: bool = False,
) -> Call:
    """Return the call for checked arguments; nothing is written.

    ``single_values``: whether one value per channel will do, because other processes have more.
    """
    x, residual, mask, weight, bias, _, mean, var, seed = inputs
    training, momentum, eps = settings.training, settings.momentum, settings.eps
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(
            f"fusereg.{name}: running_mean and running_var must both be given, or neither, and "
            f"{missing} is None"
        )
    use_batch = training or mean is None
    # Tensors that fit are plain ones with memory; the gate need not look at them again.
    if dispatch.eager() and _C.batch_norm_fits(x, mean, var, weight, bias):
        direct = residual is None or dispatch.direct(residual)
    else:
        _check_tensors(inputs, settings, name)
        direct = dispatch.direct(x, residual, weight, bias)
    if use_batch and x.numel() == x.shape[1] and x.shape[1] and not single_values:
        raise ValueError(
            f"fusereg.{name}: training wants more than 1 value per channel, "
            f"got input of shape {tuple(x.shape)}"
        )
    if type(eps) is not float:
        eps = checks.as_number(eps, f"fusereg.{name}: eps")
    if not eps > 0.0 and (training or eps != 0.0):
        wanted = "positive in training" if training else "at least 0"
        raise ValueError(f"fusereg.{name}: eps must be {wanted}, got {eps}")
    if residual is not None:
        x, added = checks.promoted(x, residual)
        if x is not inputs.x or added is not residual:
            residual = added
            inputs = inputs._replace(x=x, residual=residual)
        checks.check_like(x, added, x.shape, name, "residual")
    if out is not None:
        _check_out(out, inputs, name)
    if mask is not None:
        _check_mask(x, mask, name)
    try:
        activation = kernels.ACTIVATIONS[settings.activation]
    except (KeyError, TypeError):
        raise unknown_activation(settings.activation, name) from None
    group = 0
    if settings.virtual_batch_size is not None:
        group = _group_samples(x, settings.virtual_batch_size, use_batch, name)
    if mask is not None and use_batch and x.shape[1] and not single_values:
        _check_count(mask, name)
    slope, p = settings.negative_slope, settings.dropout
    if type(slope) is not float:
        slope = checks.as_number(slope, f"fusereg.{name}: negative_slope")
    if type(p) is not float or p:
        p = checks.check_probability(p, name, "dropout")
        p = p if training else 0.0
        if p:
            draw = random.eager_state if direct else random.traced_state
            seed = draw(x, source or Source(), name)
    statistics = COMPUTE if use_batch else FIXED
    if training and settings.update_stats:
        if momentum is None:
            momentum = CUMULATIVE
        else:
            if type(momentum) is not float:
                momentum = checks.as_number(momentum, f"fusereg.{name}: momentum")
            if not momentum > CUMULATIVE:
                raise ValueError(
                    f"fusereg.{name}: momentum must be a number or None, got {momentum}"
                )
        if batches is not None and not isinstance(batches, Tensor):
            raise TypeError(
                f"fusereg.{name}: num_batches_tracked must be a torch.Tensor or None, "
                f"got {type(batches).__name__}"
            )
    else:
        batches = None
        if use_batch:
            mean = var = None
    if p or mean is not inputs.running_mean or var is not inputs.running_var:
        inputs = Inputs(x, residual, mask, weight, bias, None, mean, var, seed)
    return Call(
        inputs,
        constants_of((statistics, eps, group, activation, slope, p, 0)),
        name,
        batches,
        0.0 if momentum is None else momentum,
        direct,
    )


def unknown_activation(activation: object, name: str) -> ValueError:
    """Return the error for an activation that the kernels do not have."""
    names = ", ".join(repr(known) for known in kernels.ACTIVATIONS)
    return ValueError(f"fusereg.{name}: activation must be one of {names}, got {activation!r}")


def check_activation(activation: object, name: str) -> None:
    """Raise unless this is None or the name of an activation."""
    if activation is not None and activation not in tuple(kernels.ACTIVATIONS):
        raise unknown_activation(activation, name)


def check_inplace(activation: object, slope: float, dropout: float, name: str) -> None:
    """Raise unless the result of such a call determines its input."""
    where = f"fusereg.{name}: inplace=True"
    if activation not in (None, "leaky_relu"):
        raise ValueError(
            f"{where} wants activation None or 'leaky_relu', whose input can be told "
            f"from its result, got {activation!r}"
        )
    if activation is not None and not 0.0 < slope < float("inf"):
        raise ValueError(f"{where} wants a negative_slope above 0, got {slope}")
    if dropout:
        raise ValueError(f"{where} supports no dropout, got dropout={dropout}")


def _check_tensors(inputs: Inputs, settings: Settings, name: str) -> None:
    """Raise unless x has channels, and each vector an element for each of them."""
    x = inputs.x
    checks.check_input(x, name, "input")
    if x.dim() < 2:
        raise ValueError(
            f"fusereg.{name}: input must have at least 2 dimensions (N, C, ...), got {x.dim()}"
        )
    channels = x.shape[1]
    expected = settings.num_features
    if expected is not None and channels != expected:
        raise ValueError(f"fusereg.{name}: input has {channels} channels, this layer {expected}")
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = {n: getattr(inputs, n) for n in names if getattr(inputs, n) is not None}
    for which, vector in vectors.items():
        where = f"fusereg.{name}: {which}"
        if not isinstance(vector, Tensor):
            raise TypeError(f"{where} must be a torch.Tensor or None, got {type(vector).__name__}")
        checks.check_strided(vector, name, which)
        if vector.device != x.device:
            raise ValueError(f"{where} must be on {x.device} as input, got {vector.device}")
        if which in names[:2] and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{where} has no derivative, and must not require a gradient")
        if vector.shape == (channels,):
            continue
        if vector.dim() == 1 and not any(
            isinstance(t, Tensor) and t.shape == (channels,) for t in vectors.values()
        ):
            raise ValueError(
                f"fusereg.{name}: input has {channels} channels, but {which} has {vector.shape[0]}"
            )
        raise ValueError(f"{where} must have shape ({channels},), got {tuple(vector.shape)}")


def check_group_size(size: object, name: str, wanted: str = "an integer") -> None:
    """Raise unless this is a number of samples."""
    where = f"fusereg.{name}: virtual_batch_size"
    if not checks.is_integer(size):
        raise TypeError(f"{where} must be {wanted}, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{where} must be positive, got {size}")


def _group_samples(x: Tensor, size: int, use_batch: bool, name: str) -> int:
    """Return how many samples share statistics; 0 where all do."""
    check_group_size(size, name, "an integer or None")
    if not use_batch:
        return 0
    samples, channels = x.shape[0], x.shape[1]
    if samples and channels and x.numel():
        values = x.numel() // (samples * channels)
        smallest = samples % size or min(size, samples)
        if smallest * values == 1:
            raise ValueError(
                f"fusereg.{name}: training wants more than 1 value per channel in each virtual "
                f"batch, and a batch of {samples} in parts of {size} leaves one with 1"
            )
    return size


def _check_out(out: object, inputs: Inputs, name: str) -> None:
    checks.check_target(inputs.x, out, name, name="input")
    others = (inputs.weight, inputs.bias, inputs.residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        raise ValueError(
            f"fusereg.{name}: out= supports no gradients, and an argument requires one; "
            "leave out= away, or call under torch.no_grad()"
        )


def _check_count(mask: Tensor, name: str) -> None:
    """Raise if a mask leaves one value per channel, where knowing that waits for no device."""
    known = dispatch.direct(mask) and mask.device.type == "cpu"
    if known and int(torch.count_nonzero(mask)) == 1:
        raise ValueError(
            f"fusereg.{name}: training wants more than 1 value per channel, and mask leaves 1"
        )


def _check_mask(x: Tensor, mask: object, name: str) -> None:
    wanted = (x.shape[0], *x.shape[2:])
    checks.check_strided(mask, name, "mask")
    assert isinstance(mask, Tensor)
    if mask.dtype is not torch.bool or tuple(mask.shape) != wanted or mask.device != x.device:
        raise ValueError(
            f"fusereg.{name}: mask must be torch.bool of shape {wanted} on {x.device}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )
