"""Readers of the calls in Dynamo's graph: what each does, as far as a chain needs to know it.

The graph has torch's functions, with arguments as the caller wrote them. A reader has the signature
of such a function and returns the arguments by name; one that it does not know is a TypeError, and
the call is then not understood.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch.fx import Node
from torch.nn import functional as torch_F

from .. import functional as F

#: torch's dropouts and what computes them here.
_DROPOUTS: dict[Any, Callable[..., Any]] = {
    torch_F.dropout: F.dropout,
    torch_F.dropout1d: F.dropout1d,
    torch_F.dropout2d: F.dropout2d,
    torch_F.dropout3d: F.dropout3d,
    torch_F.alpha_dropout: F.alpha_dropout,
    torch_F.feature_alpha_dropout: F.feature_alpha_dropout,
}
DROPOUTS = tuple(_DROPOUTS.values())

#: Functions of this package that are one node each, in native layers and in what is rewritten.
LEAVES: tuple[Callable[..., Any], ...] = tuple(
    getattr(F, name) for name in F.__all__ if not name.endswith(("_penalty", "_mask"))
)


class Call(NamedTuple):
    """A call: "norm", "activation", "add", "dropout", "row_norm" or "other", and its arguments."""

    kind: str
    given: dict[str, Any]

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.given.get("input")

    @property
    def written(self) -> list[Node]:
        """The nodes whose values the call writes to."""
        names = ["out"]
        if self.given.get("inplace"):
            names.append("input")
        if self.kind == "norm" and self.given["training"] is not False:
            names += ["running_mean", "running_var", "num_batches_tracked"]
        return [n for name in names if isinstance(n := self.given.get(name), Node)]

    @property
    def p(self) -> Any:
        """The probability of a dropout: a number, or a node."""
        p = self.given.get("p")
        return float(p) if is_number(p) else p

    @property
    def drops(self) -> bool:
        """True for dropout of elements in training, with a probability that may be > 0."""
        if self.kind != "dropout" or self.given["function"] is not F.dropout:
            return False
        return self.given["training"] is True and (
            is_computed(self.p) or (is_number(self.p) and 0.0 < self.p <= 1.0)
        )


def is_number(value: object) -> TypeGuard[float]:
    """Return whether this is a plain number, not one that the graph computes."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_computed(value: object) -> bool:
    """Return whether this is a node that computes a number from a model's attribute.

    Dynamo makes a node of an attribute that has changed, such as a dropout's p.
    """
    return isinstance(value, Node) and isinstance(value.meta.get("example_value"), torch.SymFloat)


# --- readers --------------------------------------------------------------------------------------

_Arguments = dict[str, Any]


def _reader(parameters: str) -> Callable[..., _Arguments]:
    """Return the reader of a function of torch, whose parameters are given as Python writes them.

    What only concerns cuDNN is left out, and ``train`` gets the name that it has elsewhere.
    """
    written = eval(f"lambda {parameters}: locals()")

    def read(*args: Any, **kwargs: Any) -> _Arguments:
        found = written(*args, **kwargs)
        return {
            "training" if name == "train" else name: value
            for name, value in found.items()
            if not name.startswith("cudnn")
        }

    return read


_norm = _reader(
    "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,"
    " eps=1e-5"
)
_torch_norm = _reader(
    "input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled"
)
_layer_norm = _reader(
    "input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True"
)
_rms_norm = _reader("input, normalized_shape, weight=None, eps=None")
_dropout = _reader("input, p=0.5, training=True, inplace=False")
_torch_dropout = _reader("input, p, train")
_activation = _reader("input, inplace=False")
_leaky_relu = _reader("input, negative_slope=0.01, inplace=False")
_add = _reader("input, other, *, alpha=1")


def _gelu(input: Any, *, approximate: str = "none") -> _Arguments:
    return {"input": input, "activation": "gelu_tanh" if approximate == "tanh" else "gelu"}


def _own(function: Callable[..., Any]) -> Callable[..., _Arguments]:
    """Return the reader of a function of this package, whose first parameter is called x."""
    signature = inspect.signature(function)

    def read(*args: Any, **kwargs: Any) -> _Arguments:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {"input": bound.arguments.pop("x", None), **bound.arguments}

    return read


_IN_PLACE = {"inplace": True}
#: Function or method -> kind, reader, and what is known of each call of it.
_READERS: dict[Any, tuple[str, Callable[..., _Arguments], _Arguments]] = {
    torch_F.batch_norm: ("norm", _norm, {}),
    torch.batch_norm: ("norm", _torch_norm, {}),
    torch_F.layer_norm: ("row_norm", _layer_norm, {}),
    torch.layer_norm: ("row_norm", _layer_norm, {}),
    torch_F.rms_norm: ("row_norm", _rms_norm, {}),
    torch.rms_norm: ("row_norm", _rms_norm, {}),
    **{f: ("activation", _activation, {"activation": "relu"}) for f in (torch_F.relu, torch.relu)},
    "relu": ("activation", _activation, {"activation": "relu"}),
    torch.relu_: ("activation", _activation, {"activation": "relu", **_IN_PLACE}),
    "relu_": ("activation", _activation, {"activation": "relu", **_IN_PLACE}),
    torch_F.silu: ("activation", _activation, {"activation": "silu"}),
    torch_F.leaky_relu: ("activation", _leaky_relu, {"activation": "leaky_relu"}),
    torch._C._nn.leaky_relu_: (
        "activation",
        _leaky_relu,
        {"activation": "leaky_relu", **_IN_PLACE},
    ),
    torch._C._nn.gelu: ("activation", _gelu, {}),
    **{f: ("add", _add, {}) for f in (operator.add, torch.add, "add")},
    **dict.fromkeys((operator.iadd, "add_"), ("add", _add, _IN_PLACE)),
    **{theirs: ("dropout", _dropout, {"function": f}) for theirs, f in _DROPOUTS.items()},
    torch.dropout: ("dropout", _torch_dropout, {"function": F.dropout}),
    torch.dropout_: ("dropout", _torch_dropout, {"function": F.dropout, **_IN_PLACE}),
    torch.alpha_dropout: ("dropout", _torch_dropout, {"function": F.alpha_dropout}),
    **{f: ("other", _own(f), {}) for f in LEAVES},
    **{f: ("dropout", _own(f), {"function": f}) for f in DROPOUTS},
    F.batch_norm: ("norm", _own(F.batch_norm), {}),
}

CONVOLUTIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)

#: Calls that write to nothing, whatever their arguments but ``out``, and enter no mode.
_PURE: frozenset[Any] = frozenset(
    (
        *(*CONVOLUTIONS, torch._C._nn.linear, torch.matmul, torch.cat),
        *(torch_F.max_pool1d, torch_F.max_pool2d, torch_F.max_pool3d, torch_F.softmax),
        *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.sigmoid, torch.tanh),
        *(torch.avg_pool1d, torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d),
        *(torch_F.adaptive_avg_pool1d, torch_F.adaptive_avg_pool2d, torch_F.adaptive_avg_pool3d),
        *(torch_F.interpolate, torch_F.pad, torch._C._nn.pad, torch_F.group_norm),
        *(torch_F.scaled_dot_product_attention, torch.flatten, torch.reshape, torch.mean),
        *(operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
        *(operator.neg, operator.matmul, operator.pow, operator.getitem, getattr),
        *(torch.sub, torch.mul, torch.div, torch.transpose, torch.permute),
        *("sub", "mul", "div", "transpose", "permute", "mean", "size", "flatten", "reshape"),
        *("view", "contiguous", "unsqueeze", "squeeze", "expand", "chunk", "split", "unbind"),
        *("matmul", "sigmoid", "tanh", "softmax", "to", "float", "sum", "dim", "numel", "item"),
    )
)


def read(node: Any) -> Call | None:
    """Return what a node does; None if it is not known."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target in _PURE and node.kwargs.get("out") is None:
        return Call("other", {})
    if node.target not in _READERS:
        return None
    kind, reader, known = _READERS[node.target]
    try:
        return Call(kind, {**reader(*node.args, **node.kwargs), **known})
    except TypeError:
        return None
