"""Layers that add a dropped branch to a residual and normalize: torch's norm layers with a p.

Their parameters are those of torch.nn.LayerNorm and torch.nn.RMSNorm, so state dicts load both
ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.layer import Layer
from . import functional as F


class _Norm(Layer):
    """The base of both layers, whose parameters may have several dimensions."""

    def _call(
        self: Any,
        function: Callable[..., Any],
        name: str,
        x: Tensor,
        residual: Tensor | None,
        *parameters: Tensor | None,
    ) -> Any:
        shape = tuple(self.normalized_shape)
        for which, t in ((name, x), ("residual", residual)):
            if t is not None and tuple(t.shape[-len(shape) :]) != shape:
                raise ValueError(
                    f"fusereg.nn.{type(self).__name__}: {which} must have shape (..., "
                    f"{', '.join(map(str, shape))}), got {tuple(t.shape)}"
                )
        options = (self.p, self.eps, self.training)
        tensors: Any = (x, residual, *parameters)
        if len(shape) > 1:
            tensors = [None if t is None else t.flatten(-len(shape)) for t in tensors]
        result = function(*tensors, *options, return_sum=self.return_sum)
        if len(shape) == 1:
            return result
        return tuple(t.view(x.shape) for t in result) if self.return_sum else result.view(x.shape)

    def extra_repr(self) -> str:
        """Return the arguments as torch's layer shows them, and this one's."""
        return f"{super().extra_repr()}, p={self.p}, return_sum={self.return_sum}"


class DropoutAddLayerNorm(_Norm, nn.LayerNorm):
    """:func:`fusereg.functional.dropout_add_layer_norm` with its weight and bias.

    Args:
        normalized_shape: sizes of the last dimensions, over which is normalized.
        p: the probability of dropping.
        eps: what is added to the variance.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias, too.
        device: where the parameters lie.
        dtype: of the parameters.
        return_sum: whether forward returns (y, s), for networks that normalize first.

    Raises:
        ValueError: ``p`` is outside [0, 1].

    Example:
        >>> norm = fusereg.nn.DropoutAddLayerNorm(768, p=0.1)
        >>> x = norm(attention(x), x)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 0.5,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        return_sum: bool = False,
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.p = checks.check_probability(p, "nn.DropoutAddLayerNorm")
        self.return_sum = return_sum

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalized sum; nothing is dropped in evaluation mode."""
        function, vectors = F.dropout_add_layer_norm, (self.weight, self.bias)
        return self._call(function, "input", input, residual, *vectors)  # type: ignore[no-any-return]


class DropoutAddRMSNorm(_Norm, nn.RMSNorm):
    """:func:`fusereg.functional.dropout_add_rms_norm` with its weight.

    Args:
        normalized_shape: sizes of the last dimensions, over which is normalized.
        p: the probability of dropping.
        eps: what is added to the mean square; None is the machine epsilon.
        elementwise_affine: whether there is a weight.
        device: where it lies.
        dtype: of the weight.
        return_sum: whether forward returns (y, s), for networks that normalize first.

    Raises:
        ValueError: ``p`` is outside [0, 1].

    Example:
        >>> norm = fusereg.nn.DropoutAddRMSNorm(4096, p=0.1, return_sum=True)
        >>> y, x = norm(mlp(y), x)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 0.5,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        return_sum: bool = False,
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.p = checks.check_probability(p, "nn.DropoutAddRMSNorm")
        self.return_sum = return_sum

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalized sum; nothing is dropped in evaluation mode."""
        function = F.dropout_add_rms_norm
        return self._call(function, "x", x, residual, self.weight)  # type: ignore[no-any-return]
