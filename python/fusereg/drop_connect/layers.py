"""Layers that drop weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.checks import probability
from ..core.layer import Layer
from . import functional as F
from .op import sides


class DropConnectLinear(Layer, nn.Linear):
    """:func:`fusereg.functional.drop_connect_linear`: a linear layer that drops weights.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether there is one; it is not dropped.
        device: where the parameters lie.
        dtype: of the parameters.
        p: the probability of dropping a weight, 0.5 if not given.
        keep_prob: 1 - p, in place of ``p``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float | None = None,
        keep_prob: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = probability(p, keep_prob, "nn.DropConnectLinear")

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, with weights dropped in training mode."""
        return F.drop_connect_linear(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.Linear shows them, and p."""
        return f"{super().extra_repr()}, p={self.p}"


class DropConnectConv2d(Layer, nn.Conv2d):
    """:func:`fusereg.functional.drop_connect_conv2d`: a convolution that drops weights.

    Args:
        in_channels: as for torch.nn.Conv2d, like all up to ``dtype``.
        out_channels: of the result.
        kernel_size: of the weight, one number or two.
        stride: one number or two.
        padding: one number, two, "valid" or "same".
        dilation: one number or two.
        groups: of channels that are convolved apart.
        bias: whether there is one; it is not dropped.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters lie.
        dtype: of the parameters.
        p: the probability of dropping a weight, 0.5 if not given.
        keep_prob: 1 - p, in place of ``p``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float | None = None,
        keep_prob: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.p = probability(p, keep_prob, "nn.DropConnectConv2d")

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, with weights dropped in training mode."""
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            top, bottom, left, right = sides(
                padding, self.dilation, self.kernel_size, "drop_connect_conv2d"
            )
            input = nn.functional.pad(input, (left, right, top, bottom), mode=self.padding_mode)
            padding = 0
        return F.drop_connect_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.p,
            self.training,
        )

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.Conv2d shows them, and p."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, p={self.p}"
