"""Dropout layers. Each is a subclass of torch's of the same name and computes on fusereg's kernels.

``keep_prob``, in place of ``p``, is for those whose formula says h/p with probability p: 1 - p.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.checks import probability
from ..core.layer import DropLayer, Layer
from . import functional as F

__all__ = [
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
]


class _Layer(Layer):
    """The constructor that the subclasses of torch's layers share."""

    def __init__(
        self, p: float | None = None, inplace: bool = False, *, keep_prob: float | None = None
    ) -> None:
        super().__init__(probability(p, keep_prob, f"nn.{type(self).__name__}"), inplace)


class Dropout(_Layer, nn.Dropout):
    """:func:`fusereg.functional.dropout` of every element, in training mode.

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: ``p`` or ``keep_prob`` is outside [0, 1], or both are given.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements dropped, or the input itself in evaluation mode."""
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(_Layer, nn.Dropout1d):
    """:func:`fusereg.functional.dropout1d`: whole channels of (N, C, L) or (C, L).

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with channels dropped, or the input itself in evaluation mode."""
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_Layer, nn.Dropout2d):
    """:func:`fusereg.functional.dropout2d`: whole channels of (N, C, H, W).

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with channels dropped, or the input itself in evaluation mode."""
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_Layer, nn.Dropout3d):
    """:func:`fusereg.functional.dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W).

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with channels dropped, or the input itself in evaluation mode."""
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(_Layer, nn.AlphaDropout):
    """:func:`fusereg.functional.alpha_dropout`, which keeps the mean and variance of SELU networks.

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements at SELU's limit; itself in evaluation mode."""
        return F.alpha_dropout(input, self.p, self.training, self.inplace)


class FeatureAlphaDropout(_Layer, nn.FeatureAlphaDropout):
    """:func:`fusereg.functional.feature_alpha_dropout`: alpha dropout of whole channels.

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with channels at SELU's limit; itself in evaluation mode."""
        return F.feature_alpha_dropout(input, self.p, self.training, self.inplace)


class DropPath(DropLayer):
    """:func:`fusereg.functional.drop_path`: stochastic depth, whole samples of (N, ...).

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with samples dropped, or the input itself in evaluation mode."""
        return F.drop_path(input, self.p, self.training, self.inplace)
