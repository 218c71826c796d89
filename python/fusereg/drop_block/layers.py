"""DropBlock as a layer."""

from __future__ import annotations

from torch import Tensor

from ..core.checks import probability
from ..core.layer import Layer
from . import functional as F
from . import op as _drop_block


class DropBlock2d(Layer):
    """:func:`fusereg.functional.drop_block2d`: squares of each channel of (N, C, H, W).

    Args:
        p: about the share of elements that is dropped, 0.1 if not given.
        block_size: the side of a block.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: ``p`` or ``keep_prob`` is outside [0, 1], or both are given; ``block_size`` is
            below 1.
    """

    def __init__(
        self,
        p: float | None = None,
        block_size: int = 7,
        inplace: bool = False,
        *,
        keep_prob: float | None = None,
    ) -> None:
        super().__init__()
        if p is None and keep_prob is None:
            p = 0.1
        self.p = probability(p, keep_prob, "nn.DropBlock2d")
        _drop_block.check_block_size(block_size, "nn.DropBlock2d")
        self.block_size = block_size
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with blocks dropped, or the input itself in evaluation mode."""
        return F.drop_block2d(input, self.p, self.block_size, self.training, self.inplace)

    def extra_repr(self) -> str:
        """Return the arguments as torch's dropout layers show them."""
        return f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}"
