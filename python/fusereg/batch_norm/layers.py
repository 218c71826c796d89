"""Batch normalization layers: torch's, with what often follows them in the same pass.

Each is a subclass of torch's of the same name, with the same parameters, buffers and state_dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core import checks, dispatch
from ..core.docs import share_paragraphs
from ..core.layer import Layer
from . import functional, op
from .kernels import Inputs, inputs_of


class _Fused(Layer, nn.modules.batchnorm._BatchNorm):
    """The base of all layers, which are the settings of their calls (functional.Settings)."""

    #: Set by GhostBatchNorm.
    virtual_batch_size: int | None = None

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
        bias: bool = True,
        activation: str | None = None,
        dropout: float = 0.0,
        negative_slope: float = 0.01,
        update_stats: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # torch before 2.13 has no such argument
            self.register_parameter("bias", None)
        name = f"nn.{type(self).__name__}"
        functional.check_activation(activation, name)
        checks.check_probability(dropout, name, "dropout")
        if inplace:
            functional.check_inplace(activation, negative_slope, dropout, name)
        self.activation = activation
        self.dropout = dropout
        self.negative_slope = negative_slope
        self.update_stats = update_stats
        self.inplace = inplace

    def reset_parameters(self) -> None:
        """Set weight, bias and running statistics, where there are any, as they were at first."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize the input, add the residual, apply activation and dropout."""
        return self._normalized(input, residual, mask, self)

    def with_epilogue(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str | None,
        negative_slope: float,
        dropout: float,
    ) -> Tensor:
        """Compute ``forward`` with another epilogue than the layer's own."""
        settings = functional.Chosen(
            self.training,
            self.momentum,
            self.eps,
            activation,
            dropout,
            self.inplace,
            negative_slope,
            self.virtual_batch_size if self.training else None,
            self.update_stats,
            self.num_features,
        )
        return self._normalized(input, residual, mask, settings)

    def _normalized(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: functional.Settings,
    ) -> Tensor:
        inputs, batches = self._inputs(input, residual, mask)
        if dispatch.is_dynamo_compiling():
            return functional.called(inputs, batches, settings)
        y = op.at_once(inputs, batches, settings, "batch_norm")
        return functional.normalized(inputs, batches, settings, "batch_norm") if y is None else y

    def _inputs(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Inputs, Tensor | None]:
        """Return the tensors of a call, and the count of batches."""
        self._check_input_dim(input)
        # nn.Module takes half a microsecond for each attribute that is a parameter or a buffer.
        buffers, parameters = self._buffers, self._parameters
        try:
            mean, var = buffers["running_mean"], buffers["running_var"]
            batches = buffers["num_batches_tracked"]
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, or replaced by something that is neither
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
            weight, bias = self.weight, self.bias
        if self.training and not self.track_running_stats:  # an attribute that may be switched
            mean = var = batches = None
        return inputs_of((input, residual, mask, weight, bias, None, mean, var, None)), batches

    def extra_repr(self) -> str:
        """Return torch's text, and what is fused."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation!r}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        if not self.update_stats:
            text += ", update_stats=False"
        if self.inplace:
            text += ", inplace=True"
        return text


_ARGUMENTS = """
    Args:
        num_features: C.
        eps: added to the variance, > 0; in evaluation >= 0.
        momentum: the weight of a batch in the running statistics; None for a cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them evaluation uses the
            batch's as well. As an attribute it can be switched: while it is False, training leaves
            the running statistics and evaluation uses them.
        device: where parameters and buffers lie.
        dtype: of the parameters and buffers.
        bias: whether there is a bias beside the weight.
        activation: None, "relu", "leaky_relu", "silu" or "gelu", after normalization and residual.
        dropout: the probability of dropping an element of the result, in training.
        negative_slope: of leaky ReLU.
        update_stats: whether training updates the running statistics; switch it off while a batch
            is seen a second time, as activation checkpointing sees it.
        inplace: write the result into the input and keep it in the input's place for backward;
            with ``activation`` None or "leaky_relu", without dropout and residual. See
            :func:`fusereg.functional.batch_norm`.

    Raises:
        ValueError: ``activation`` or ``dropout`` is out of range, or cannot be in place.
"""


class AnyDimension(_Fused):
    """A layer for (N, C) and (N, C, ...) of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept all: the call itself asks for two dimensions."""


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
