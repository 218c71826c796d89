"""Batch normalization folded into the convolution before it, for inference."""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..core.layer import Layer
from .variants import FrozenBatchNorm

__all__ = ["fold_into_conv"]

_logger = logging.getLogger("fusereg")
_Module = TypeVar("_Module", bound=nn.Module)

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *_Transposed,
)


class Epilogue(Layer):
    """The activation and residual of a folded layer: activation(x + residual)."""

    def __init__(self, activation: str | None, negative_slope: float) -> None:
        super().__init__()
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the activation of the input, with the residual added if there is one."""
        z = input if residual is None else input + residual
        if self.activation == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope)
        if self.activation is None:
            return z
        y: Tensor = getattr(F, self.activation)(z)
        return y

    def extra_repr(self) -> str:
        """Return the activation as an argument."""
        return f"activation={self.activation!r}"


def fold_into_conv(model: _Module) -> _Module:
    r"""Return a copy of the model for inference, with batch norms folded into convolutions.

    :math:`W' = W \gamma / \sqrt{\sigma^2 + \epsilon}` (for each output channel) and
    :math:`b' = (b - \mu) \gamma / \sqrt{\sigma^2 + \epsilon} + \beta`, computed in float64. The
    results are the same up to rounding, and the normalization costs nothing more. Each folded layer
    leaves an identity in its place, or its fused activation and residual.

    Convolutions and transposed convolutions are folded with torch's batch norms, fusereg's and
    :class:`fusereg.nn.FrozenBatchNorm`, where the structure shows that the one's
    result is used by the other alone: in ``nn.Sequential``, and in whatever ``torch.fx`` can trace.
    What was folded, and what not and why, goes to the logger "fusereg".

    Args:
        model: in evaluation mode (``model.eval()``). It stays as it is.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm in it is in training mode.

    Example:
        >>> fast = fusereg.fold_into_conv(model.eval())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusereg.fold_into_conv: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            raise ValueError(
                f"fusereg.fold_into_conv: {name or 'the model'} is in training mode; "
                "call model.eval() first"
            )
    folded = copy.deepcopy(model)
    pairs: dict[str, str] = {}
    _find_pairs(folded, "", pairs)
    for norm_name, conv_name in pairs.items():
        _fold(folded, conv_name, norm_name)
        _logger.info("fold_into_conv: %s folded into %s", norm_name, conv_name)
    for name, layer in folded.named_modules():
        if isinstance(layer, (_BatchNorm, FrozenBatchNorm)):
            _logger.info("fold_into_conv: %s stays: no convolution is seen before it", name)
    return folded


def _is_norm(layer: object) -> bool:
    return isinstance(layer, (_BatchNorm, FrozenBatchNorm)) and layer.running_mean is not None


def _find_pairs(module: nn.Module, prefix: str, pairs: dict[str, str]) -> None:
    """Add the names of each batch norm and its convolution; search parts that trace alone."""
    if isinstance(module, (_BatchNorm, FrozenBatchNorm, *_CONVOLUTIONS)):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward does with a proxy
        _logger.debug("fold_into_conv: %s is not traced: %s", prefix or "the model", error)
        for name, child in module.named_children():
            _find_pairs(child, f"{prefix}{name}.", pairs)
        return
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    layers = dict(module.named_modules())
    for target, nodes in calls.items():
        # A layer that is called twice has two predecessors: it is left alone.
        if not _is_norm(layers[target]) or len(nodes) > 1 or not nodes[0].args:
            continue
        before = nodes[0].args[0]
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and isinstance(layers[str(before.target)], _CONVOLUTIONS)
            and len(before.users) == 1
            and len(calls[str(before.target)]) == 1
            and _can_fold(layers[str(before.target)], layers[target])
        ):
            pairs[prefix + target] = prefix + str(before.target)


class _Tracer(fx.Tracer):
    """Sees layers of torch and fusereg as one call each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            type(m).__module__.startswith("fusereg.")
            or isinstance(m, (_BatchNorm, *_CONVOLUTIONS))
            or super().is_leaf_module(m, module_qualified_name)
        )


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    plain = not any(
        getattr(m, hooks)
        for m in (conv, norm)
        for hooks in ("_forward_hooks", "_forward_pre_hooks")
    )
    parametrized = nn.utils.parametrize.is_parametrized(conv)
    return plain and not parametrized


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    weight, old_bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        scale = (var.double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
        if isinstance(norm.weight, Tensor):
            scale = scale * norm.weight.double()
        bias = -mean.double() * scale
        if isinstance(old_bias, Tensor):
            bias = bias + old_bias.double() * scale
        if isinstance(norm.bias, Tensor):
            bias = bias + norm.bias.double()
        per_output = _along_outputs(conv, weight, scale)
        conv.weight = nn.Parameter((weight.double() * per_output).to(weight.dtype))
        conv.bias = nn.Parameter(bias.to(weight.dtype))
    activation = getattr(norm, "activation", None)
    left: nn.Module
    if type(norm).__module__.startswith("fusereg."):
        left = Epilogue(activation, getattr(norm, "negative_slope", 0.01))
    else:
        left = nn.Identity()
    parent, _, name = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), name, left.eval())


def _along_outputs(conv: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the factors in the weight's shape; a transposed one is (in, out / groups, ...)."""
    if not isinstance(conv, _Transposed):
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = scale.reshape(conv.groups, 1, -1)
    rows = by_group.expand(-1, weight.shape[0] // conv.groups, -1).reshape(weight.shape[0], -1)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
