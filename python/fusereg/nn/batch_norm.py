"""Batch normalization layers: torch's, with what often follows them in the same pass.

Each is a subclass of torch's of the same name, with the same parameters, buffers and state_dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _batch_norm_kernels as kernels
from .. import _dropout_ops
from .. import functional as F
from .._docs import share_paragraphs

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _Fused(nn.modules.batchnorm._BatchNorm):
    """What the layers have in common."""

    if TYPE_CHECKING:

        def _check_input_dim(self, input: Tensor) -> None: ...

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        dropout: float = 0.0,
        negative_slope: float = 0.01,
        update_stats: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if activation not in kernels.ACTIVATIONS:
            names = ", ".join(repr(name) for name in kernels.ACTIVATIONS)
            raise ValueError(
                f"fusereg.nn.{type(self).__name__}: activation must be one of {names}, "
                f"got {activation!r}"
            )
        _dropout_ops.check_probability(dropout, f"nn.{type(self).__name__}", "dropout")
        self.activation = activation
        self.dropout = dropout
        self.negative_slope = negative_slope
        self.update_stats = update_stats

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """The input normalized, the residual added, activated, dropped."""
        self._check_input_dim(input)
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            dropout=self.dropout,
            negative_slope=self.negative_slope,
            mask=mask,
            num_batches_tracked=self.num_batches_tracked,
            update_stats=self.update_stats,
        )

    def extra_repr(self) -> str:
        """As torch's, and what is fused."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation!r}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        if not self.update_stats:
            text += ", update_stats=False"
        return text


_ARGUMENTS = """
    Args:
        num_features: C.
        eps: added to the variance, > 0.
        momentum: the weight of a batch in the running statistics, within [0, 1]; None for a
            cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them evaluation uses the
            batch's as well.
        device: where parameters and buffers lie.
        dtype: of the parameters and buffers.
        activation: None, "relu", "leaky_relu", "silu" or "gelu", after normalization and residual.
        dropout: the probability of dropping an element of the result, in training.
        negative_slope: of leaky ReLU.
        update_stats: whether training updates the running statistics; switch it off while a batch
            is seen a second time, as activation checkpointing sees it.
"""


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """:func:`fusereg.functional.batch_norm` of (N, C) or (N, C, L).

    {arguments}

    Example:
        >>> layer = fusereg.nn.BatchNorm1d(64, activation="relu", dropout=0.1)
    """


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """:func:`fusereg.functional.batch_norm` of (N, C, H, W).

    {arguments}

    Example:
        >>> layer = fusereg.nn.BatchNorm2d(64, activation="relu")
        >>> y = layer(x, residual=shortcut)
    """


class BatchNorm3d(_Fused, nn.BatchNorm3d):
    """:func:`fusereg.functional.batch_norm` of (N, C, D, H, W).

    {arguments}
    """


for _layer in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    share_paragraphs(_layer, arguments=_ARGUMENTS)
