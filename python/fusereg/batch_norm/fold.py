"""Batch normalization folded into the convolution or linear layer before it, for inference."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..core import dispatch, failures
from ..core.hints import explains
from ..core.layer import Layer
from .calls import Calls, Nodes
from .known import epilogue_of, is_timm_act, why_unknown
from .variants import FrozenBatchNorm

__all__ = ["fold_into_conv"]

_log = logging.getLogger("fusereg")
_Module = TypeVar("_Module", bound=nn.Module)

_BatchNorm = nn.modules.batchnorm._BatchNorm
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: A layer that a batch norm can be folded into -> the number of dimensions of its result.
_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    **{getattr(nn, f"Conv{n}d"): n + 2 for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): n + 2 for n in (1, 2, 3)},
}


class Epilogue(Layer):
    """The activation and residual of a folded layer: activation(x + residual)."""

    #: The number of dimensions that the input must have, if any.
    dim: int | None = None

    def __init__(
        self, activation: str | None, negative_slope: float, dim: int | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.negative_slope = negative_slope
        self.dim = dim

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the activation of the input, with the residual added if there is one."""
        if self.dim is not None and input.dim() != self.dim:
            raise ValueError(
                f"fusereg.fold_into_conv: the input of a batch norm that was folded must have "
                f"{self.dim} dimensions, got {input.dim()}"
            )
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


@explains()
def fold_into_conv(model: _Module) -> _Module:
    r"""Return a copy of the model for inference, with batch norms folded into convolutions.

    :math:`W' = W \gamma / \sqrt{\sigma^2 + \epsilon}` (for each output channel) and
    :math:`b' = (b - \mu) \gamma / \sqrt{\sigma^2 + \epsilon} + \beta`, computed in float64. The
    results are the same up to rounding, and the normalization costs nothing more. Each folded layer
    leaves an identity in its place, or its activation and residual. Parameters that do not require
    gradients still do not.

    Folded are the batch norms of torch and fusereg, :class:`fusereg.nn.FrozenBatchNorm`, timm's
    ``BatchNormAct2d``, and those that :func:`fusereg.convert` made of them, into torch's
    convolutions, transposed convolutions and linear layers. Other subclasses stay, for they may
    compute something else. A batch norm is folded where the forward that calls both shows that it
    reads the convolution's result and nothing else does, each is called once in the whole model,
    and neither has hooks or parametrizations. The logger "fusereg" reports at level INFO what was
    folded, and what was not and why.

    What a forward does is found by tracing it as it is now, in evaluation. Fold again if you change
    attributes that it reads. Where it decides by values of tensors, it is traced on every way that
    it may go, and so is a decorated one whose decorators only hand the module on. Of a forward that
    cannot be traced, its source is read: modules that it only calls are searched, and others are
    left as they are.

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
    calls = Calls(folded)
    names = {layer: name for name, layer in folded.named_modules()}
    folded_parts: dict[nn.Module, tuple[nn.Module, dict[str, nn.Parameter], nn.Module]] = {}
    for layer, name in names.items():
        if not isinstance(layer, (_BatchNorm, FrozenBatchNorm)):
            continue
        try:
            found = _find(layer, calls)
            if not isinstance(found, str):
                folded_parts[layer] = (found, _folded(layer, found), _left(layer, found))
                continue
        except Exception as error:
            found = failures.reason(error)
        _log.info("fusereg.fold_into_conv: %s stays: %s", name or "the model", found)
    for norm, (source, parameters, left) in folded_parts.items():
        source._parameters.update(parameters)
        for parent in names:
            for key, child in parent._modules.items():
                if child is norm:
                    parent._modules[key] = left
        _log.info("fusereg.fold_into_conv: %s folded into %s", names[norm], names[source])
    return folded


# --- what can be folded ---------------------------------------------------------------------------


def _find(norm: Any, calls: Calls) -> nn.Module | str:
    """Return the layer to fold a batch norm into, or the reason why there is none."""
    reason = why_unknown(norm) or _why_not_alone(norm, calls)
    if reason is not None:
        return reason
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    (module,) = calls.callers[norm]
    found: set[nn.Module] = set()
    for nodes in calls.graphs[module]:
        for node in nodes.get(norm, ()):
            source = _before(norm, node, nodes)
            if isinstance(source, str):
                return source
            found.add(source)
    source = found.pop()
    reason = _why_not_alone(source, calls)
    if reason is None and any((norm in n) != (source in n) for n in calls.graphs[module]):
        reason = "it is called with and without this batch norm, depending on arguments"
    if reason is not None or found:
        return f"the {type(source).__name__} before it: {reason or 'it is one of several'}"
    return _why_not_matching(norm, source) or source


def _before(norm: Any, node: fx.Node, nodes: Nodes) -> nn.Module | str:
    """Return the layer whose result a batch norm is called with, or the reason for none."""
    before = given = node.args[0] if node.args else None
    if isinstance(given, fx.Node) and _flattens_to_rows(given):
        before = given.args[0]
    called = [layer for layer, calls in nodes.items() if before in calls]
    if not called or not isinstance(called[0], tuple(_DIMENSIONS)):
        return "no convolution or linear layer is seen before it"
    source, name = called[0], type(called[0]).__name__
    assert isinstance(before, fx.Node)
    assert isinstance(given, fx.Node)
    if given is not before and not isinstance(source, nn.Linear):
        return f"the result of the {name} before it is reshaped"
    if type(source) not in _DIMENSIONS:
        return f"what is before it, a {name}, is a subclass of torch's layer"
    if sum(not _reads_shape(user, before) for user in before.users) != 1 or len(given.users) != 1:
        return f"the result of the {name} before it is used elsewhere too"
    # fusereg's layers add a residual, as what they leave does.
    ours = type(norm).__module__.startswith("fusereg.") and not is_timm_act(norm)
    more_args = ("residual",) if ours else ()
    if len(node.args) > 1 + len(more_args) or not set(node.kwargs) <= set(more_args):
        more = ", ".join(node.kwargs) or f"{len(node.args)} arguments"
        return f"it is called with {more}"
    if given in node.args[1:] or given in node.kwargs.values():
        return f"the result of the {name} before it is its residual as well"
    return source


def _flattens_to_rows(node: fx.Node) -> bool:
    """Return whether a node is ``x.flatten(0, 1)``, which of (N, L, C) keeps the channels last."""
    if (node.op, node.target) not in (("call_method", "flatten"), ("call_function", torch.flatten)):
        return False
    return node.args[1:] in ((0, 1), (0, -2)) and not node.kwargs


def _reads_shape(node: fx.Node, argument: fx.Node) -> bool:
    """Return whether a node asks an argument for its shape and nothing else."""
    if node.op == "call_method" and node.target in ("reshape_as", "view_as", "expand_as"):
        return node.args[0] is not argument
    if node.target == "size":
        return node.op == "call_method"
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def _why_not_alone(layer: nn.Module, calls: Calls) -> str | None:
    """Return why calling this layer may be more than its forward, or not its only use."""
    if dispatch.hooked(layer):
        return "it has hooks, or a forward that is set on the object"
    if layer in calls.touched:
        return calls.touched[layer]
    count = calls.count(layer)
    if count != 1:
        return f"it is called {count} times" if count else "no forward that calls it is known"
    return None


def _why_not_matching(norm: Any, source: Any) -> str | None:
    """Return why the parameters and shapes of a pair do not fit each other."""
    weight, bias = source._parameters.get("weight"), source._parameters.get("bias")
    own = [norm._parameters.get(n, norm._buffers.get(n)) for n in ("weight", "bias")]
    for value in (weight, bias, *own, norm.running_mean, norm.running_var):
        plain = type(value) in (Tensor, nn.Parameter, type(None))
        if not plain or (value is not None and not value.is_floating_point()):
            return f"it holds a {type(value).__name__}, which is no plain floating-point tensor"
        if value is not None and weight is not None and value.device != weight.device:
            return "it is on another device than the layer before it"
    if weight is None:
        return f"the {type(source).__name__} before it has no plain weight"
    dim = _DIMENSIONS[type(source)]
    takes = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
    for cls, dims in takes.items():
        if isinstance(norm, cls) and dim not in dims:
            return f"it does not take what the {type(source).__name__} before it returns"
    channels = getattr(source, "out_channels", None) or source.out_features
    if channels != norm.num_features:
        return f"it has {norm.num_features} channels, the layer before it {channels}"
    return None


# --- folding --------------------------------------------------------------------------------------


def _folded(norm: Any, source: Any) -> dict[str, nn.Parameter]:
    """Return the weight and bias of a layer that make the batch norm after it unnecessary."""
    weight, old_bias = source.weight, source.bias
    with torch.no_grad():
        scale = (norm.running_var.double() + float(norm.eps)).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double() * scale
        if old_bias is not None:
            bias = bias + old_bias.double() * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        per_output = _along_outputs(source, weight, scale)
        new_weight = (weight.double() * per_output).to(weight.dtype)
    trained = norm.bias if old_bias is None else old_bias
    learns = trained is not None and trained.requires_grad
    return {
        "weight": nn.Parameter(new_weight, weight.requires_grad),
        "bias": nn.Parameter(bias.to(weight.dtype), learns),
    }


def _along_outputs(source: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the factors in the weight's shape; a transposed one is (in, out / groups, ...)."""
    if not isinstance(source, _TRANSPOSED):
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = scale.reshape(source.groups, 1, -1)
    rows = by_group.expand(-1, weight.shape[0] // source.groups, -1).reshape(weight.shape[0], -1)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _left(norm: Any, source: nn.Module) -> nn.Module:
    """Return what a folded batch norm leaves in its place."""
    left: nn.Module
    if is_timm_act(norm):
        parts = OrderedDict(drop=norm.drop, act=norm.act)
        if not isinstance(norm, nn.BatchNorm2d):
            parts = OrderedDict(norm=Epilogue(None, 0.01, _DIMENSIONS[type(source)]), **parts)
        left = nn.Sequential(parts)
    elif type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d):
        left = nn.Identity()
    else:
        # Others take several shapes, among which is one whose channels are not where these are.
        activation, slope = epilogue_of(norm) or (None, 0.01)
        left = Epilogue(activation, slope, _DIMENSIONS[type(source)])
    left.training = False
    return left
