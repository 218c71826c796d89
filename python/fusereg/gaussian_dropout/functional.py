"""Gaussian dropout: multiplicative noise."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.hints import explains, refuse
from ..core.random import Source
from .op import OP, check_probability, noise


@explains()
def gaussian_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Apply Gaussian dropout: :math:`y_i = x_i (1 + \sqrt{p / (1-p)}\, n_i)`, :math:`n_i` normal.

    Multiplicative noise with the mean 1 and the variance of dropout's mask (Srivastava et al. 2014,
    section 10; Keras's GaussianDropout). Nothing is to be done at evaluation.

    Args:
        x: float64, float32, float16 or bfloat16, of any shape and layout; any tensor where it is
            returned as it is.
        p: the probability of dropping that has the same variance, within [0, 1); 0 and
            ``training=False`` return ``x`` itself.
        training: whether to add noise at all.
        inplace: write the result into ``x``.
        seed: determines the noise, as the mask in :func:`dropout`.
        generator: as in :func:`dropout`.
        index_offset: as in :func:`dropout`.

    Nothing is kept for backward but the seed: the noise is drawn again. (Tiny tensors keep their
    factors, as in :func:`dropout`.) It is a function of seed, offset and index (the position in
    memory, as for :func:`dropout`) alone, the same bits on every device, dtype, instruction set and
    thread count. It has the resolution of float32, in float64 too, and :math:`|n_i|` is at most
    6.67.

    Raises:
        TypeError: ``x`` is not a tensor, ``p`` not a number, or ``seed`` neither an integer nor a
            tensor.
        ValueError: ``p`` is outside [0, 1); noise is to be added, and ``x`` is of an integer,
            complex or other dtype, sparse or nested.

    Example:
        >>> y = fusereg.functional.gaussian_dropout(x, 0.1, training=model.training)
    """
    if unknown:
        refuse(gaussian_dropout, unknown)
    if (
        # What training loops call, with as few questions as possible.
        training
        and type(p) is float
        and 0.0 < p < 1.0
        and seed is None
        and generator is None
        and not (inplace or index_offset)
        and not dispatch.is_dynamo_compiling()
    ):
        y: Tensor | None = noise.draw_at_once((p, 0, OP), x)
        if y is not None:
            return y
    p = check_probability(p, OP)
    checks.check_tensor(x, OP)
    if not training or p == 0:
        return x
    checks.check_input(x, OP)
    if inplace:
        checks.check_in_place(x, OP)
    source = Source(seed, generator)
    return noise.draw(x, (p, index_offset), source, OP, x if inplace else None)
