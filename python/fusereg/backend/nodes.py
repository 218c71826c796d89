"""What a call in Dynamo's graph does, as far as a chain needs to know it.

The graph has torch's functions, with arguments as the caller wrote them. A reader has the signature
of such a function and returns what a call of it does; an argument that it does not know is a
TypeError, and the call is then not understood.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.fx import Node
from torch.nn import functional as torch_F

from .. import functional as F

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: Arguments of batch_norm that say what is done after the normalization, or otherwise.
_EPILOGUE = ("activation", "residual", "dropout", "out", "inplace", "mask", "virtual_batch_size")


class Norm(NamedTuple):
    """Batch normalization: the arguments of :func:`fusereg.functional.batch_norm`."""

    x: Any
    arguments: dict[str, Any]

    @property
    def written(self) -> tuple[Any, ...]:
        """What a call writes to."""
        names = (*_STATISTICS, "out") if self.arguments["training"] is not False else ("out",)
        written = tuple(self.arguments.get(name) for name in names)
        return (*written, self.x) if self.arguments.get("inplace") else written

    @property
    def plain(self) -> bool:
        """Whether a call normalizes and nothing else."""
        return not any(self.arguments.get(name) for name in _EPILOGUE)


class Activation(NamedTuple):
    """An activation that a kernel can compute."""

    x: Any
    name: str
    slope: float
    inplace: bool

    @property
    def written(self) -> tuple[Any, ...]:
        """What a call writes to."""
        return (self.x,) if self.inplace else ()


class Add(NamedTuple):
    """A sum, which may be written into its left operand."""

    left: Any
    right: Any
    inplace: bool

    @property
    def written(self) -> tuple[Any, ...]:
        """What a call writes to."""
        return (self.left,) if self.inplace else ()


class Drop(NamedTuple):
    """A dropout, and the function of this package that computes it."""

    x: Any
    p: Any
    training: Any
    inplace: bool
    function: Callable[..., Any]

    @property
    def written(self) -> tuple[Any, ...]:
        """What a call writes to."""
        return (self.x,) if self.inplace else ()

    @property
    def drops(self) -> bool:
        """Whether elements are certain to be dropped, so that the result is a new tensor."""
        return self.training is True and is_number(self.p) and 0.0 < self.p <= 1.0


class RowNorm(NamedTuple):
    """Layer or RMS normalization of the last dimension."""

    x: Any
    name: str
    arguments: dict[str, Any]

    @property
    def written(self) -> tuple[Any, ...]:
        """What a call writes to."""
        return ()


class Other(NamedTuple):
    """Any other call whose effects are known."""

    written: tuple[Any, ...]


Call: TypeAlias = Norm | Activation | Add | Drop | RowNorm | Other


def is_number(value: object) -> bool:
    """Return whether this is a plain number, not one that the graph computes."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- readers --------------------------------------------------------------------------------------
# The names of their parameters are those of torch.


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Norm:
    return Norm(
        input,
        {
            "running_mean": running_mean,
            "running_var": running_var,
            "weight": weight,
            "bias": bias,
            "training": training,
            "momentum": momentum,
            "eps": eps,
        },
    )


def _torch_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any,
) -> Norm:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _activation(name: str, inplace: bool = False) -> Callable[..., Activation]:
    """Return the reader of an activation, or of its variant in place."""
    in_place = inplace

    def read(input: Any, inplace: bool = in_place) -> Activation:
        return Activation(input, name, 0.01, inplace)

    return read


def _leaky_relu(
    input: Any, negative_slope: Any = 0.01, inplace: bool = False
) -> Activation | Other:
    call = Activation(input, "leaky_relu", negative_slope, inplace)
    known = is_number(negative_slope) and negative_slope >= 0.0
    return call if known else Other(call.written)


def _leaky_relu_(input: Any, negative_slope: Any = 0.01) -> Activation | Other:
    return _leaky_relu(input, negative_slope, True)


def _gelu(input: Any, approximate: str = "none") -> Activation:
    return Activation(input, "gelu_tanh" if approximate == "tanh" else "gelu", 0.01, False)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Add | Other:
    return Add(input, other, False) if is_number(alpha) and alpha == 1 else Other(())


def _add_(input: Any, other: Any, *, alpha: Any = 1) -> Add | Other:
    return Add(input, other, True) if is_number(alpha) and alpha == 1 else Other((input,))


def _dropout(function: Callable[..., Any]) -> Callable[..., Drop]:
    """Return the reader of a dropout of torch.nn.functional."""

    def read(input: Any, p: Any = 0.5, training: Any = True, inplace: bool = False) -> Drop:
        return Drop(input, p, training, inplace, function)

    return read


def _torch_dropout(function: Callable[..., Any], inplace: bool = False) -> Callable[..., Drop]:
    """Return the reader of a dropout of torch itself."""

    def read(input: Any, p: Any, train: Any) -> Drop:
        return Drop(input, p, train, inplace, function)

    return read


def _layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 1e-5,
    cudnn_enable: Any = True,
) -> RowNorm | Other:
    call = RowNorm(input, "layer_norm", {"weight": weight, "bias": bias, "eps": eps})
    return call if len(normalized_shape) == 1 else Other(())


def _rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> RowNorm | Other:
    call = RowNorm(input, "rms_norm", {"weight": weight, "eps": eps})
    return call if len(normalized_shape) == 1 else Other(())


def _own(function: Callable[..., Any]) -> Callable[..., Call]:
    """Return the reader of a function of this package."""
    signature = inspect.signature(function)

    def read(*args: Any, **kwargs: Any) -> Call:
        given = signature.bind(*args, **kwargs).arguments
        if function is F.batch_norm:
            x = given.pop("x")
            return Norm(x, {"training": False, **given})
        if function in DROPOUTS and set(given) <= {"x", "p", "training", "inplace"}:
            return Drop(
                **{"p": 0.5, "training": True, "inplace": False, **given}, function=function
            )
        return Other((given["x"] if given.get("inplace") else None, given.get("out")))

    return read


#: torch's dropouts and what computes them here.
_TORCH_DROPOUTS: dict[Any, Callable[..., Any]] = {
    torch_F.dropout: F.dropout,
    torch_F.dropout1d: F.dropout1d,
    torch_F.dropout2d: F.dropout2d,
    torch_F.dropout3d: F.dropout3d,
    torch_F.alpha_dropout: F.alpha_dropout,
    torch_F.feature_alpha_dropout: F.feature_alpha_dropout,
}
DROPOUTS = frozenset(_TORCH_DROPOUTS.values())

#: Functions of this package that are one node each, in native layers and in what is rewritten.
LEAVES: tuple[Callable[..., Any], ...] = (
    *(F.batch_norm, *sorted(DROPOUTS, key=lambda f: f.__name__), F.drop_path),
    *(F.activation_dropout, F.bias_dropout_add, F.drop_path_add, F.dropout_add),
    *(F.dropout_add_layer_norm, F.dropout_add_rms_norm, F.gaussian_dropout, F.drop_block2d),
    *(F.consistent_dropout, F.drop_connect_linear, F.drop_connect_conv2d),
)

_READERS: dict[Any, Callable[..., Call]] = {
    torch_F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch_F.relu: _activation("relu"),
    torch.relu: _activation("relu"),
    "relu": _activation("relu"),
    torch.relu_: _activation("relu", True),
    "relu_": _activation("relu", True),
    torch_F.silu: _activation("silu"),
    torch_F.leaky_relu: _leaky_relu,
    torch._C._nn.leaky_relu_: _leaky_relu_,
    torch._C._nn.gelu: _gelu,
    **dict.fromkeys((operator.add, torch.add, "add"), _add),
    **dict.fromkeys((operator.iadd, "add_"), _add_),
    **{theirs: _dropout(ours) for theirs, ours in _TORCH_DROPOUTS.items()},
    torch.dropout: _torch_dropout(F.dropout),
    torch.dropout_: _torch_dropout(F.dropout, True),
    torch.alpha_dropout: _torch_dropout(F.alpha_dropout),
    torch.alpha_dropout_: _torch_dropout(F.alpha_dropout, True),
    torch.feature_alpha_dropout: _torch_dropout(F.feature_alpha_dropout),
    torch.feature_alpha_dropout_: _torch_dropout(F.feature_alpha_dropout, True),
    torch_F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch_F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    **{function: _own(function) for function in LEAVES},
}

#: Calls that write to nothing, whatever their arguments but ``out``, and enter no mode.
_PURE: frozenset[Any] = frozenset(
    (
        *(torch.conv1d, torch.conv2d, torch.conv3d, torch._C._nn.linear, torch.matmul, torch.cat),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        *(torch_F.max_pool1d, torch_F.max_pool2d, torch_F.max_pool3d, torch_F.softmax),
        *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.sigmoid, torch.tanh),
        *(torch.avg_pool1d, torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d),
        *(torch_F.adaptive_avg_pool1d, torch_F.adaptive_avg_pool2d, torch_F.adaptive_avg_pool3d),
        *(torch_F.adaptive_max_pool2d, torch_F.interpolate, torch_F.pad, torch._C._nn.pad),
        *(torch_F.group_norm, torch_F.scaled_dot_product_attention, torch.flatten, torch.reshape),
        *(operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
        *(operator.neg, operator.matmul, operator.pow, operator.getitem, getattr),
        *(torch.sub, torch.mul, torch.div, torch.transpose, torch.permute, torch.mean),
        *("sub", "mul", "div", "transpose", "permute", "mean", "size", "flatten", "reshape"),
        *("view", "contiguous", "unsqueeze", "squeeze", "expand", "chunk", "split", "unbind"),
        *("matmul", "sigmoid", "tanh", "softmax", "to", "float", "sum", "dim", "numel"),
    )
)


def read(node: Any) -> Call | None:
    """Return what a node does; None if it is not known."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    reader = _READERS.get(node.target)
    if reader is None:
        pure = node.target in _PURE and node.kwargs.get("out") is None
        return Other(()) if pure else None
    try:
        return reader(*node.args, **node.kwargs)
    except TypeError:
        return None
