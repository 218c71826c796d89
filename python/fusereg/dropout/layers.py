"""Dropout layers. Each is a subclass of torch's of the same name and computes on fusereg's kernels.

``keep_prob``, in place of ``p``, is for those whose formula says h/p with probability p: 1 - p.
"""

from __future__ import annotations

from torch import nn

from ..core.docs import share_paragraphs
from ..core.layer import DropInput
from . import functional as F

_ARGUMENTS = """
    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the input.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: ``p`` or ``keep_prob`` is outside [0, 1], or both are given.
"""


class Dropout(DropInput, nn.Dropout):
    """:func:`fusereg.functional.dropout` of every element, in training mode.

    {arguments}
    """

    _function = staticmethod(F.dropout)


class Dropout1d(DropInput, nn.Dropout1d):
    """:func:`fusereg.functional.dropout1d`: whole channels of (N, C, L) or (C, L).

    {arguments}
    """

    _function = staticmethod(F.dropout1d)


class Dropout2d(DropInput, nn.Dropout2d):
    """:func:`fusereg.functional.dropout2d`: whole channels of (N, C, H, W).

    {arguments}
    """

    _function = staticmethod(F.dropout2d)


class Dropout3d(DropInput, nn.Dropout3d):
    """:func:`fusereg.functional.dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W).

    {arguments}
    """

    _function = staticmethod(F.dropout3d)


class AlphaDropout(DropInput, nn.AlphaDropout):
    """:func:`fusereg.functional.alpha_dropout`, which keeps the mean and variance of SELU networks.

    {arguments}
    """

    _function = staticmethod(F.alpha_dropout)


class FeatureAlphaDropout(DropInput, nn.FeatureAlphaDropout):
    """:func:`fusereg.functional.feature_alpha_dropout`: alpha dropout of whole channels.

    {arguments}
    """

    _function = staticmethod(F.feature_alpha_dropout)


class DropPath(DropInput):
    """:func:`fusereg.functional.drop_path`: stochastic depth, whole samples of (N, ...).

    {arguments}
    """

    _function = staticmethod(F.drop_path)


for _layer in (
    *(Dropout, Dropout1d, Dropout2d, Dropout3d),
    *(AlphaDropout, FeatureAlphaDropout, DropPath),
):
    share_paragraphs(_layer, arguments=_ARGUMENTS)
