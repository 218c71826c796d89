"""Batch normalization with other statistics: of virtual batches, renormalized, frozen.

All take (N, C) and (N, C, ...) of any number of dimensions, and the epilogue of
:class:`fusereg.nn.BatchNorm2d`: a residual, an activation, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import dispatch
from ..core.layer import Layer
from . import functional, known, op
from .kernels import GIVEN, Inputs
from .layers import AnyDimension


class GhostBatchNorm(AnyDimension):
    """Batch normalization of virtual batches, in one pass over all (Hoffer et al. 2017).

    In training, each ``virtual_batch_size`` consecutive samples are normalized by their own
    statistics; the last ones may be fewer. The running statistics are those of the whole batch, and
    are what evaluation uses.

    Args:
        num_features: C.
        virtual_batch_size: samples that share statistics.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch's BatchNorm.
        activation, dropout, negative_slope, update_stats, inplace: as in :class:`BatchNorm2d`.

    Raises:
        TypeError, ValueError: ``virtual_batch_size`` is no positive integer.

    Example:
        >>> layer = fusereg.nn.GhostBatchNorm(64, virtual_batch_size=32)
    """

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
        virtual_batch_size: int = 128,
        **more: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **more
        )
        functional.check_group_size(virtual_batch_size, "nn.GhostBatchNorm")
        self.virtual_batch_size = virtual_batch_size

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize the input group by group, add the residual, apply activation and dropout."""
        if self.training:
            return self._normalized(input, residual, mask, self)
        return self.with_epilogue(
            input, residual, mask, self.activation, self.negative_slope, self.dropout
        )

    def extra_repr(self) -> str:
        """Return torch's text, and the size of the virtual batches."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class BatchRenorm(AnyDimension):
    r"""Batch renormalization (Ioffe 2017): training sees what evaluation will see.

    :math:`y = \left(\frac{x - \mu}{\sigma}\, r + d\right) \gamma + \beta` with
    :math:`r = \mathrm{clip}(\sigma / \sigma_\mathrm{run},\, 1/r_\max,\, r_\max)` and
    :math:`d = \mathrm{clip}((\mu - \mu_\mathrm{run}) / \sigma_\mathrm{run},\, -d_\max,\, d_\max)`,
    both constants for the gradient, where :math:`\sigma = \sqrt{\sigma^2 + \epsilon}`. With
    ``r_max=1`` and ``d_max=0`` this is batch normalization, which the paper begins with: it widens
    them to 3 and 5 in the course of training. Both are attributes and may be set at any time.

    Args:
        num_features: C.
        r_max: >= 1.
        d_max: >= 0.
        eps, momentum, affine, device, dtype, bias: as in torch's BatchNorm.
        activation, dropout, negative_slope, update_stats: as in :class:`BatchNorm2d`.

    Raises:
        ValueError: ``r_max`` or ``d_max`` is out of range, or there are to be no running
            statistics, which it cannot do without.

    Example:
        >>> layer = fusereg.nn.BatchRenorm(64, r_max=1.0, d_max=0.0)
        >>> layer.r_max = 1.5
    """

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
        r_max: float = 3.0,
        d_max: float = 5.0,
        **more: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **more
        )
        if not self.track_running_stats:
            raise ValueError("fusereg.nn.BatchRenorm: track_running_stats must be True")
        if self.inplace:
            raise ValueError("fusereg.nn.BatchRenorm: inplace=True is not supported")
        self.r_max = r_max
        self.d_max = d_max
        self._check_limits()

    def _check_limits(self) -> None:
        if not self.r_max >= 1.0:
            raise ValueError(f"fusereg.nn.BatchRenorm: r_max must be at least 1, got {self.r_max}")
        if not self.d_max >= 0.0:
            raise ValueError(f"fusereg.nn.BatchRenorm: d_max must be at least 0, got {self.d_max}")

    def _normalized(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: functional.Settings,
    ) -> Tensor:
        if not self.training:
            return super()._normalized(input, residual, mask, settings)
        self._check_limits()
        inputs, batches = self._inputs(input, residual, mask)
        call = functional.prepared(inputs, batches, settings, "batch_renorm")
        mean_before, var_before = self.running_mean, self.running_var
        assert mean_before is not None
        assert var_before is not None
        with torch.no_grad():
            moments = op.statistics(input, mask)
            mean, var, _ = moments.unbind(0)
            running_std = (var_before.double() + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / running_std).clamp(1.0 / self.r_max, self.r_max)
            d = ((mean - mean_before.double()) / running_std).clamp(-self.d_max, self.d_max)
            dtype = mean_before.dtype
            r, d = r.to(dtype), d.to(dtype)
        weight, bias = r, d
        if self.weight is not None:
            weight, bias = self.weight * r, self.weight * d
        if self.bias is not None:
            bias = self.bias + bias
        call.inputs = call.inputs._replace(weight=weight, bias=bias, moments=moments)
        call.constants = call.constants._replace(statistics=GIVEN)
        return op.normalize(call)

    def extra_repr(self) -> str:
        """Return torch's text, and the limits."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class FrozenBatchNorm(Layer):
    r"""Batch normalization with statistics and parameters that never change.

    :math:`y = \mathrm{act}((x - \mu_\mathrm{run}) \gamma / \sqrt{\sigma^2_\mathrm{run} + \epsilon}
    + \beta + r)`, in training and evaluation alike: ``weight``, ``bias``, ``running_mean`` and
    ``running_var`` are buffers. Its state_dict is that of torchvision's FrozenBatchNorm2d; that of
    a BatchNorm fits as well.

    Args:
        num_features: C.
        eps: added to the variance, >= 0.
        device: where the buffers lie.
        dtype: of the buffers.
        bias: whether there is a bias beside the weight.
        activation: None, "relu", "leaky_relu", "silu" or "gelu".
        negative_slope: of leaky ReLU.

    Example:
        >>> backbone.bn1 = fusereg.nn.FrozenBatchNorm.from_batch_norm(backbone.bn1)
    """

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        functional.check_activation(activation, "nn.FrozenBatchNorm")
        self.num_features = num_features
        self.eps = eps
        self.activation = activation
        self.negative_slope = negative_slope
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0 if bias else None),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(
                name,
                None
                if value is None
                else torch.full((num_features,), value, device=device, dtype=dtype),
            )

    @classmethod
    def from_batch_norm(cls, layer: nn.modules.batchnorm._BatchNorm) -> FrozenBatchNorm:
        """Return a frozen copy of a batch-norm layer: torch's, fusereg's, or timm's BatchNormAct2d.

        Its activation is kept.

        Raises:
            TypeError: the layer is of another class, which may compute something else.
            ValueError: the layer has no running statistics; or it has what the copy has not: hooks,
                a dropout, or an activation that this class does not know.
        """
        reason = known.why_unknown(layer)
        if reason is not None:
            raise TypeError(f"fusereg.nn.FrozenBatchNorm: {reason}")
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None:
            raise ValueError(
                "fusereg.nn.FrozenBatchNorm: the layer has no running statistics to freeze"
            )
        epilogue = known.epilogue_of(layer)
        hooks = (layer._forward_hooks, layer._forward_pre_hooks)
        if any((*hooks, layer._backward_hooks, layer._backward_pre_hooks)) or "forward" in vars(
            layer
        ):
            reason = "hooks, or a forward that is set on the object"
        elif epilogue is None:
            reason = f"an activation or a dropout of its own ({layer.drop}, {layer.act})"
        elif getattr(layer, "dropout", 0.0):
            reason = f"dropout={layer.dropout}"
        if reason is not None or epilogue is None:
            raise ValueError(
                f"fusereg.nn.FrozenBatchNorm: the layer has {reason}, which would be lost"
            )
        activation, slope = epilogue
        frozen = cls(
            layer.num_features,
            layer.eps,
            mean.device,
            mean.dtype,
            activation=activation,
            negative_slope=slope,
        )
        frozen.running_mean.copy_(mean)
        frozen.running_var.copy_(var)
        if layer.weight is not None:
            frozen.weight.copy_(layer.weight.detach())
        if layer.bias is not None and frozen.bias is not None:
            frozen.bias.copy_(layer.bias.detach())
        return frozen.train(layer.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize the input by the frozen statistics, add the residual, apply the activation."""
        inputs = Inputs(
            input,
            residual,
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
        )
        settings = functional.Chosen(
            False,
            None,
            self.eps,
            self.activation,
            negative_slope=self.negative_slope,
            num_features=self.num_features,
        )
        if dispatch.is_dynamo_compiling():
            return functional.called(inputs, None, settings)
        return functional.normalized(inputs, None, settings, "batch_norm")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A BatchNorm counts its batches; nothing is to be counted here.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what torch's batch-norm layers show."""
        text = f"{self.num_features}, eps={self.eps}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
