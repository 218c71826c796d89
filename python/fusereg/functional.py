"""Functions without state. All are differentiable unless they say otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import _drop_connect, _dropout_ops, _params, _penalty_ops
from ._params import Params, Strength

__all__ = [
    "alpha_dropout",
    "drop_connect_linear",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_mask",
    "elastic_net_penalty",
    "feature_alpha_dropout",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
]

_ARGUMENTS = """
    Args:
        params: a tensor, an iterable of tensors, or a module (its parameters). float64, float32,
            float16 and bfloat16 may be mixed, as may devices and layouts. A tensor that is listed
            more than once counts once. Empty tensors count nothing.
"""
_RETURNS = """
    Returns:
        A 0-d tensor on the first tensor's device, float32 (float64 if any input is); 0 for no
        tensors. Sums over more than 8 terms run in float64, whatever the dtype. NaN in gives NaN
        out, in the value and the gradient.

    Raises:
        TypeError: something in ``params`` is not a tensor.
        ValueError: a tensor is sparse, nested, complex, of another dtype or device; a strength is
            negative or not finite, or there are not as many as tensors.
"""


def l1_penalty(params: Params, strength: Strength) -> Tensor:
    r"""The L1 (lasso) penalty :math:`\lambda \sum_i |w_i|` (Tibshirani 1996).

    The gradient is :math:`\lambda\,\mathrm{sign}(w)`, with the subgradient 0 at 0. A step along it
    never gives exact zeros; :func:`fusereg.prox.l1_` does.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor. A tensor with strength 0 is
            left out, NaN and all.
    {returns}
    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l1_penalty(model, 1e-5)
    """
    op = "l1_penalty"
    tensors, s = _penalty_ops.collect(params, (strength, 0.0, 0.0), op, ("strength", "", ""))
    return _penalty_ops.penalty(op, tensors, s)


def l2_penalty(params: Params, strength: Strength, *, half: bool = False) -> Tensor:
    r"""The L2 (ridge) penalty :math:`\lambda \sum_i w_i^2`, or half of it (Hoerl and Kennard 1970).

    Two conventions are in use. ``half=False`` is Keras's, with gradient :math:`2 \lambda w`;
    ``half=True`` is :math:`\lambda/2 \sum w^2`, with gradient :math:`\lambda w`, as torch's
    ``weight_decay`` in plain SGD.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        half: whether the penalty carries the factor 1/2.
    {returns}
    Example:
        >>> loss = criterion(model(x), y) + fusereg.functional.l2_penalty(model, 1e-4, half=True)
    """
    op = "l2_penalty"
    tensors, s = _penalty_ops.collect(
        params, (0.0, strength, 0.0), op, ("", "strength", ""), l2_factor=1.0 if half else 2.0
    )
    return _penalty_ops.penalty(op, tensors, s)


def elastic_net_penalty(params: Params, l1: Strength, l2: Strength) -> Tensor:
    r"""The elastic net :math:`\lambda_1 \sum_i |w_i| + \tfrac{\lambda_2}{2} \sum_i w_i^2`
    (Zou and Hastie 2005, with the factor 1/2 of Friedman, Hastie, Tibshirani 2010).

    Both sums come from one pass over the weights, the gradient
    :math:`\lambda_1\,\mathrm{sign}(w) + \lambda_2 w` from another.
    :func:`fusereg.add_penalty_grad_` does both in one.
    {arguments}
        l1: :math:`\lambda_1 \ge 0`, one number or one per tensor.
        l2: :math:`\lambda_2 \ge 0`, one number or one per tensor.
    {returns}
    Example:
        >>> from fusereg import functional as F
        >>> loss = criterion(model(x), y) + F.elastic_net_penalty(model, 1e-5, 1e-4)
    """
    op = "elastic_net_penalty"
    tensors, s = _penalty_ops.collect(params, (l1, l2, 0.0), op)
    return _penalty_ops.penalty(op, tensors, s)


def group_lasso_penalty(params: Params, strength: Strength, dim: int = 0) -> Tensor:
    r"""The group lasso :math:`\lambda \sum_g \sqrt{n_g}\,\|w_g\|_2` (Yuan and Lin 2006).

    The groups of a tensor are its slices along ``dim``: with ``dim=0`` the rows of a linear layer
    (one output unit each) or the filters of a convolution, with ``dim=1`` their inputs. :math:`n_g`
    is the number of elements of a slice. The gradient of group g is :math:`\lambda \sqrt{n_g}\,w_g
    / \|w_g\|_2`, and 0 for an all-zero group. A 1-d tensor has groups of one element, for which
    this is the L1 penalty.
    {arguments}
        strength: :math:`\lambda \ge 0`, one number or one per tensor.
        dim: the dimension that counts the groups; negative counts from the end.
    {returns}
    Example:
        >>> from fusereg import functional as F
        >>> loss = criterion(model(x), y) + F.group_lasso_penalty(linear.weight, 1e-3)
    """
    op = "group_lasso_penalty"
    tensors, s = _penalty_ops.collect(params, (0.0, 0.0, strength), op, ("", "", "strength"))
    return _penalty_ops.penalty(op, tensors, s, _params.check_dim(dim, op))


# --- dropout --------------------------------------------------------------------------------------

_DROPOUT_ARGUMENTS = """
        p: the probability of dropping, within [0, 1]; 0 and ``training=False`` return ``x`` itself,
            1 gives zeros.
        training: whether to drop at all.
        inplace: write the result into ``x``.
        seed: an integer that determines the mask, or an int64 tensor (seed, offset) on x's device,
            which is read by the kernel. Default: a new pair from ``generator``.
        generator: the torch.Generator to draw from; torch's default one if not given.
        index_offset: what is added to every index, so that a shard of a larger tensor gets its part
            of the whole tensor's mask under one ``seed``.
"""
_DROPOUT_RETURNS = """
    Nothing is kept for backward but the seed: the mask is drawn again. It is a function of seed,
    offset and index alone, the same bits on every device, dtype, instruction set and thread count.
    The effective probability is a multiple of 2^-16 (2^-32 where that would miss p or 1 - p by more
    than 1 part in 1024), and the scale is made from it, so the mean is unbiased. A dropped inf or
    NaN becomes 0, where torch gives NaN.

    Raises:
        TypeError: ``x`` is no tensor, ``p`` no number, ``seed`` no integer or tensor.
        ValueError: ``p`` is outside [0, 1]; ``x`` is of an integer, complex or other dtype, sparse
            or nested, or has a shape that this kind does not take; ``out`` does not fit.
"""


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Dropout: :math:`y_i = x_i / (1-p)` with probability :math:`1-p`, else 0.

    This is inverted dropout (Srivastava et al. 2014): nothing is to be done at evaluation.

    Args:
        x: float64, float32, float16 or bfloat16, of any shape and layout.
    {dropout_arguments}
        out: where to write the result, under ``torch.no_grad()``.

    The index of an element is its position in memory: for a contiguous tensor that is row-major
    order, for a channels_last or permuted one the order in which it lies (a tensor with gaps, or an
    expanded one, is taken as ``torch.empty_like`` would lay it out; under ``torch.func`` transforms
    the order is always row-major). :func:`fusereg.dropout_mask` shows the mask.
    {dropout_returns}
    Example:
        >>> y = fusereg.functional.dropout(x, 0.1, training=model.training)
    """
    return _dropout_ops.dropout(
        x, p, training, inplace, seed, generator, index_offset, out, False, 0, "dropout"
    )


def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: int,
    offset: int = 0,
    *,
    index_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of dropout: True where a contiguous tensor of this shape keeps its element.

    ``dropout(x, p, seed=seed)`` keeps what ``dropout_mask(x.shape, p, seed)`` says; rows of channel
    dropout have the mask of shape (N, C).

    Args:
        shape: of the tensor.
        p: the probability of dropping, within [0, 1].
        seed: the key of Philox4x32-10; 64 bits count.
        offset: a multiple of 4; offset / 4 is the low half of the counter.
        index_offset: the index of the first element.
        device: where the mask is wanted; the bits are the same everywhere.

    Raises:
        TypeError, ValueError: ``p`` is no number within [0, 1]; ``seed`` or ``offset`` no integer.

    Example:
        >>> fusereg.dropout_mask((2, 8), 0.5, seed=1).float().mean()
    """
    return _dropout_ops.mask(shape, p, seed, offset, index_offset, device)


def _channel_dropout(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    row_dims: Mapping[int, int],
    op: str,
    alpha: bool = False,
) -> Tensor:
    """Rows are counted by as many leading dimensions as ``row_dims`` has for x's number of them."""
    rows = row_dims.get(x.dim()) if isinstance(x, Tensor) else 0
    if rows is None:
        few = len(row_dims) < 4
        wanted = " or ".join(str(n) for n in row_dims) if few else f"at least {min(row_dims)}"
        raise ValueError(f"fusereg.{op}: x must have {wanted} dimensions, got {x.dim()}")
    return _dropout_ops.dropout(
        x, p, training, inplace, seed, generator, index_offset, None, alpha, rows, op
    )


def dropout1d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Drops whole channels of (N, C, L) or (C, L): one draw for each (n, c) (Tompson et al. 2015).

    Args:
        x: as in :func:`dropout`.
    {dropout_arguments}
    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}"""
    return _channel_dropout(
        x, p, training, inplace, seed, generator, index_offset, {2: 1, 3: 2}, "dropout1d"
    )


def dropout2d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Drops whole channels of (N, C, H, W): one draw for each (n, c) (Tompson et al. 2015).

    Three dimensions are taken as (N, C, L), as torch does.

    Args:
        x: as in :func:`dropout`.
    {dropout_arguments}
    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}"""
    return _channel_dropout(
        x, p, training, inplace, seed, generator, index_offset, {3: 2, 4: 2}, "dropout2d"
    )


def dropout3d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Drops whole channels of (N, C, D, H, W) or (C, D, H, W) (Tompson et al. 2015).

    Args:
        x: as in :func:`dropout`.
    {dropout_arguments}
    The index that is drawn for is :math:`n C + c`, for contiguous and channels_last tensors alike.
    {dropout_returns}"""
    return _channel_dropout(
        x, p, training, inplace, seed, generator, index_offset, {4: 1, 5: 2}, "dropout3d"
    )


def alpha_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Alpha dropout, for networks of SELU: keeps mean 0 and variance 1 (Klambauer et al. 2017).

    :math:`y = a (m x + (1 - m) s) + b` with :math:`s = -1.7581`, the limit of SELU,
    :math:`a = (q (1 + (1-q) s^2))^{-1/2}` and :math:`b = -a (1-q) s`, where :math:`q = 1-p` is the
    probability that :math:`m` is 1. ``p=1`` gives zeros.

    Args:
        x: as in :func:`dropout`.
    {dropout_arguments}{dropout_returns}"""
    return _dropout_ops.dropout(
        x, p, training, inplace, seed, generator, index_offset, None, True, 0, "alpha_dropout"
    )


def feature_alpha_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Alpha dropout of whole channels: one draw for each (n, c) of (N, C, ...).

    Args:
        x: as in :func:`dropout`, of at least two dimensions.
    {dropout_arguments}
    The formula is that of :func:`alpha_dropout`, the index :math:`n C + c`.
    {dropout_returns}"""
    return _channel_dropout(
        x,
        p,
        training,
        inplace,
        seed,
        generator,
        index_offset,
        dict.fromkeys(range(2, 65), 2),
        "feature_alpha_dropout",
        alpha=True,
    )


def drop_path(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Stochastic depth: drops whole samples of (N, ...), one draw for each n (Huang et al. 2016).

    :math:`y_n = x_n / (1-p)` with probability :math:`1-p`, else 0. A dropped sample is not read.

    Args:
        x: as in :func:`dropout`, of at least one dimension.
    {dropout_arguments}{dropout_returns}
    Example:
        >>> x = x + fusereg.functional.drop_path(block(x), 0.1, model.training)
    """
    return _channel_dropout(
        x,
        p,
        training,
        inplace,
        seed,
        generator,
        index_offset,
        dict.fromkeys(range(1, 65), 1),
        "drop_path",
    )


def drop_connect_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Linear layer with DropConnect, :math:`y = x\, (m \odot W / (1-p))^T + b` (Wan et al. 2013).

    One mask for the whole batch. In eager mode the dropped weight is not kept for backward: it is
    drawn again.

    Args:
        x: of shape (..., in_features).
        weight: of shape (out_features, in_features), float64, float32, float16 or bfloat16.
        bias: of shape (out_features,), or None. It is not dropped.
        p: the probability of dropping a weight, within [0, 1].
        training: whether to drop at all.
        seed: as in :func:`dropout`; ``dropout_mask(weight.shape, p, seed)`` is then the mask.
        generator: as in :func:`dropout`.

    Raises:
        TypeError, ValueError: as :func:`dropout`, of the weight; also if it has not 2 dimensions.
    """
    return _drop_connect.linear(
        x, weight, bias, p, training, seed, generator, "drop_connect_linear"
    )


for _function in (
    l1_penalty,
    l2_penalty,
    elastic_net_penalty,
    group_lasso_penalty,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    alpha_dropout,
    feature_alpha_dropout,
    drop_path,
):
    # The paragraphs that several functions share are written once.
    _function.__doc__ = (
        (_function.__doc__ or "")
        .replace("{arguments}", _ARGUMENTS.strip("\n").lstrip())
        .replace("{returns}", _RETURNS.strip("\n").lstrip())
        .replace("    {dropout_arguments}", _DROPOUT_ARGUMENTS.strip("\n") + "\n")
        .replace("{dropout_returns}", _DROPOUT_RETURNS.strip("\n").lstrip())
    )
