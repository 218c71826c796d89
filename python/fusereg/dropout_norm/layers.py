"""Layers that add a dropped branch to a residual and normalize: torch's norm layers with a p.

Their parameters are those of torch.nn.LayerNorm and torch.nn.RMSNorm, so state dicts load both
ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.layer import Layer
from . import functional as F

__all__ = ["DropoutAddLayerNorm", "DropoutAddRMSNorm"]


def _rows(t: Any, dims: int) -> Any:
    """Return a view with the last ``dims`` dimensions as one; None for None."""
    return t if dims == 1 or t is None else t.flatten(-dims)


def _split(
    result: Tensor | tuple[Tensor, Tensor], shape: torch.Size
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(result, tuple):
        return result[0].view(shape), result[1].view(shape)
    return result.view(shape)


def _check_shape(
    input: Tensor, residual: Tensor | None, normalized_shape: tuple[int, ...], op: str
) -> None:
    for name, t in (("input", input), ("residual", residual)):
        if t is not None and tuple(t.shape[-len(normalized_shape) :]) != normalized_shape:
            raise ValueError(
                f"fusereg.nn.{op}: {name} must have shape (..., "
                f"{', '.join(map(str, normalized_shape))}), got {tuple(t.shape)}"
            )


class DropoutAddLayerNorm(Layer, nn.LayerNorm):
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
        shape = tuple(self.normalized_shape)
        _check_shape(input, residual, shape, "DropoutAddLayerNorm")
        dims = len(shape)
        result = F.dropout_add_layer_norm(
            _rows(input, dims),
            _rows(residual, dims),
            _rows(self.weight, dims),
            _rows(self.bias, dims),
            self.p,
            self.eps,
            self.training,
            return_sum=self.return_sum,
        )
        return result if dims == 1 else _split(result, input.shape)

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.LayerNorm shows them, and p."""
        return f"{super().extra_repr()}, p={self.p}, return_sum={self.return_sum}"


class DropoutAddRMSNorm(Layer, nn.RMSNorm):
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
        shape = tuple(self.normalized_shape)
        _check_shape(x, residual, shape, "DropoutAddRMSNorm")
        dims = len(shape)
        result = F.dropout_add_rms_norm(
            _rows(x, dims),
            _rows(residual, dims),
            _rows(self.weight, dims),
            self.p,
            self.eps,
            self.training,
            return_sum=self.return_sum,
        )
        return result if dims == 1 else _split(result, x.shape)

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.RMSNorm shows them, and p."""
        return f"{super().extra_repr()}, p={self.p}, return_sum={self.return_sum}"
