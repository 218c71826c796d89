"""Gaussian dropout as a layer."""

from __future__ import annotations

from ..core.layer import DropInput
from . import functional as F
from . import op as _gaussian_dropout


class GaussianDropout(DropInput):
    """:func:`fusereg.functional.gaussian_dropout`: multiplicative noise, in training mode.

    Args:
        p: the probability of dropping that has the same variance, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: ``p`` is outside [0, 1), or both are given.
    """

    _function = staticmethod(F.gaussian_dropout)

    def __init__(
        self, p: float | None = None, inplace: bool = False, *, keep_prob: float | None = None
    ) -> None:
        super().__init__(p, inplace, keep_prob=keep_prob)
        _gaussian_dropout.check_probability(self.p, "nn.GaussianDropout")
