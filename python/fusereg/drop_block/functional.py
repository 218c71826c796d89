"""DropBlock: dropout of square regions of feature maps."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..core import checks, dispatch, distributed, random
from ..core.hints import explains, refuse
from ..core.random import Source
from .op import OP, check_block_size, drop


@explains()
def drop_block2d(
    x: Tensor,
    p: float = 0.1,
    block_size: int = 7,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    r"""Drop squares of b x b elements of each channel of (N, C, H, W): DropBlock.

    Ghiasi, Lin and Le 2018, "DropBlock: a regularization method for convolutional networks". With
    :math:`b = \min(\mathrm{block\_size}, H, W)`, each of the :math:`(H-b+1)(W-b+1)` places at which
    a block fits into a channel of a sample is taken with probability

    .. math:: \gamma = \min\!\left(1, \frac{p}{b^2} \frac{H W}{(H-b+1)(W-b+1)}\right)

    and all elements under a block that is there become 0. The others are multiplied by the number
    of elements over the number of those that are kept, both counted over the whole tensor, as in
    the paper: a mean over the batch, in which one sample's scale depends on the others. Where
    nothing is kept, the result is zeros. Blocks overlap, so less than p is dropped where p is
    large; p = 1 drops all only where :math:`\gamma = 1`.

    Args:
        x: float64, float32, float16 or bfloat16, of shape (N, C, H, W), W at most 65536; any
            tensor where it is returned as it is.
        p: about the share of elements that is dropped, within [0, 1]; 0 and ``training=False``
            return ``x`` itself.
        block_size: the side of a block; one that is larger than the image is cut to its size.
        training: whether to drop at all.
        inplace: write the result into ``x``.
        seed: an integer that determines the mask, or an int64 tensor (seed, offset) on x's device.
            ``~dropout_mask((N, C, H-b+1, W-b+1), gamma, seed)`` are then the blocks' upper left
            corners, for contiguous and channels_last tensors alike. Default: a new pair from
            ``generator``.
        generator: the torch.Generator to draw from; torch's default one if not given.
        index_offset: what is added to every corner's index. A shard of a batch gets its part of the
            whole mask with it, but is scaled by its own count.

    Nothing is kept for backward but the seed and the count: the mask is drawn again. It is the same
    bits on every device, dtype, instruction set and thread count. A dropped inf or NaN becomes 0.

    Raises:
        TypeError: ``x`` is not a tensor, ``p`` not a number, or ``block_size`` not an integer.
        ValueError: ``p`` is outside [0, 1], ``block_size`` below 1, or blocks are to be
            dropped, and ``x`` has not 4 dimensions or is of another dtype.

    Example:
        >>> y = fusereg.functional.drop_block2d(x, 0.1, 7, training=model.training)
    """
    if unknown:
        refuse(drop_block2d, unknown)
    p = checks.check_probability(p, OP)
    checks.check_tensor(x, OP)
    check_block_size(block_size, OP)
    if not training or p == 0:
        return x
    checks.check_input(x, OP)
    if x.dim() != 4:
        raise ValueError(f"fusereg.{OP}: x must have 4 dimensions (N, C, H, W), got {x.dim()}")
    if distributed.is_dtensor(x):
        raise ValueError(
            f"fusereg.{OP}: x is a DTensor, and its scale would need a count over all ranks; "
            "call it on x.to_local(), which is scaled by its own count"
        )
    if inplace:
        checks.check_in_place(x, OP)
    checks.check_index_offset(index_offset, OP)
    source = Source(seed, generator)
    constants = (p, block_size, index_offset)
    if not dispatch.direct(x):
        y: Tensor = drop.traced(x, random.traced_state(x, source, OP), *constants)[0]
        return x.copy_(y) if inplace else y
    args = (x, random.eager_state(x, source, OP), *constants)
    if inplace:
        return drop.in_place(*args)
    result: Tensor = drop.eager(*args)[0]
    return result
