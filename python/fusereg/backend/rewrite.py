"""Replacement of chains of calls in Dynamo's graph by calls of this package.

A chain is replaced by one call at the place of its last node. That is equivalent if each value
inside has no reader but the next node, and if no node in between writes to what the chain reads, or
touches what it writes. Which tensors share memory is known: the graph's fake tensors share their
storage as the real ones do. Whether the new call takes these tensors, and gives the same kind of
tensor, is found by calling it on the fake ones. What does not fit is left to torch, with the
reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils import _pytree

from .. import functional as F
from .nodes import DROPOUTS, Call, is_computed, is_number, read

_ROW_NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": F.dropout_add_layer_norm,
    "rms_norm": F.dropout_add_rms_norm,
}
_EXACT_TYPES = (FakeTensor, Tensor, torch.nn.Parameter)


class NotFusedError(Exception):
    """A chain that cannot be one call, for the reason in the text."""


@dataclass
class Report:
    """Counts of what was fused, and of what was left and why."""

    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


@dataclass
class Chain:
    """Nodes that follow each other, and the call that replaces them.

    ``total``: the node of a sum that others read as well; the call then returns it as a second
    result.
    """

    nodes: list[Node]
    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    total: Node | None = None


# --- values ---------------------------------------------------------------------------------------


def value(node: Any) -> Any:
    """Return the fake tensor that stands for a node's value."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _plain(node: Any) -> bool:
    """Return whether a node's value is an ordinary dense tensor."""
    t = value(node)
    return type(t) in _EXACT_TYPES and t.layout is torch.strided and not t.is_nested


def _storages(nodes: Iterable[Any]) -> set[int]:
    """Return the memory in which the values of nodes lie."""
    found = set()
    for node in nodes:
        for t in _pytree.tree_leaves(value(node)):
            if isinstance(t, Tensor):
                dense = t.layout is torch.strided and not t.is_nested
                found.add(t.untyped_storage()._cdata if dense else id(t))
    return found


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether sizes are known to be equal; symbolic ones are not guarded."""
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def _alike(a: Any, b: Any) -> bool:
    """Return whether two nodes are tensors of one shape, dtype and device."""
    if not _plain(a) or not _plain(b):
        return False
    t, u = value(a), value(b)
    return t.dtype is u.dtype and t.device == u.device and _equal(t.shape, u.shape)


def _same_layout(t: Tensor, u: Tensor) -> bool:
    """Return whether code that reads a tensor could not tell it from another but by its values."""
    if t.dtype is not u.dtype or t.device != u.device or not _equal(t.shape, u.shape):
        return False
    count = [i for i, n in enumerate(u.shape) if not statically_known_true(n == 1)]
    return _equal([t.stride(i) for i in count], [u.stride(i) for i in count])


def _check_call(chain: Chain) -> Any:
    """Call the replacement on fake tensors; return its result.

    Raises:
        NotFusedError: it does not take them, or the result differs from the chain's.
    """
    kwargs = dict(chain.kwargs)
    if chain.function is F.batch_norm:
        kwargs["update_stats"] = False
    args, kwargs = map_arg(
        (chain.args, kwargs), lambda n: 0.5 if is_computed(n) else n.meta.get("example_value")
    )
    if chain.function in DROPOUTS:
        args = args[:3]  # not in place
    last = value(chain.nodes[-1])
    mode = last.fake_mode if isinstance(last, FakeTensor) else nullcontext()
    shapes = getattr(mode, "shape_env", None)
    try:
        with mode, torch.no_grad(), nullcontext() if shapes is None else shapes.suppress_guards():
            result = chain.function(*args, **kwargs)
    except Exception as error:
        raise NotFusedError((str(error).strip() or type(error).__name__).splitlines()[0]) from None
    results = result if chain.total is not None else (result,)
    for made, node in zip(results, (chain.nodes[-1], chain.total), strict=False):
        if not _same_layout(made, value(node)):
            raise NotFusedError("its result would differ from torch's in dtype, shape or strides")
    return result


def _name(node: Node) -> str:
    """Return the name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


# --- order ----------------------------------------------------------------------------------------


def _check_order(nodes: Sequence[Node]) -> None:
    """Raise NotFusedError unless the nodes may all be run at the place of the last one."""
    reads: set[int] = set()
    writes: set[int] = set()
    node = nodes[0]
    while node is not nodes[-1].next:
        written = _written(node)
        if node in nodes:
            inputs = _storages(n for n in node.all_input_nodes if n not in nodes)
            if inputs & writes:
                raise NotFusedError(f"{_name(node)} reads what an earlier part of it writes")
            reads |= inputs
            writes |= _storages(written or ())
        elif written is None:
            raise NotFusedError(f"{_name(node)} is called in between")
        elif _storages(written) & (reads | writes) or _storages(node.all_input_nodes) & writes:
            raise NotFusedError(f"{_name(node)} in between uses the same memory")
        node = node.next


def _written(node: Node) -> list[Node] | None:
    """Return the nodes whose values a node writes to; None if that is not known."""
    call = read(node)
    if call is None:
        return [] if node.op in ("placeholder", "get_attr") else None
    return call.written if all(map(_plain, call.written)) else None


def _check_writes(nodes: Sequence[Node]) -> None:
    """Raise NotFusedError if something outside of a chain sees that its input is written to.

    The kernels do not write in place. Running statistics are written by both.
    """
    for node in nodes:
        call = read(node)
        x: Any = None if call is None else call.x
        if call is None or not call.given.get("inplace") or x in nodes or len(nodes) == 1:
            continue
        memory = _storages([x])
        sharing = [n for n in node.graph.nodes if _storages([n]) & memory]
        made = isinstance(x, Node) and x.op in ("call_function", "call_method")
        if (
            not made
            or list(x.users) != [node]
            or any(n is not x and n not in nodes for n in sharing)
        ):
            raise NotFusedError("it writes in place to a tensor that may be read elsewhere")


# --- finding chains -------------------------------------------------------------------------------

#: Arguments of batch_norm with which it is more than the normalization.
_EPILOGUE = ("activation", "residual", "dropout", "out", "inplace", "mask", "virtual_batch_size")


def _is(node: Any, kind: str) -> Call | None:
    """Return what a node does, if it is of this kind."""
    call = read(node)
    return call if call is not None and call.kind == kind else None


def _feeds(node: Any, user: Node) -> bool:
    """Return whether a node's value is read by this one alone."""
    return isinstance(node, Node) and list(node.users) == [user]


def _residual(add: Call, node: Node) -> Any:
    """Return what a sum adds to a node's value.

    Raises:
        NotFusedError: a kernel cannot add it.
    """
    left, right = add.x, add.given["other"]
    if left is right:
        raise NotFusedError("both operands of the sum are one tensor")
    if add.given.get("inplace") and left is not node:
        raise NotFusedError("the sum is written into the residual")
    residual = right if left is node else left
    alpha = add.given["alpha"]
    if not (is_number(alpha) and alpha == 1) or not _alike(node, residual):
        raise NotFusedError("the summands differ in kind, shape, dtype, device or factor")
    return residual


def _check_numbers(given: dict[str, Any], *names: str) -> None:
    """Raise NotFusedError unless these arguments are numbers, and the mode is a constant."""
    for name in names:
        if not is_number(given[name]) and not (name == "p" and is_computed(given[name])):
            raise NotFusedError(f"{name} is not a constant number")
    if not isinstance(given.get("training", True), bool):
        raise NotFusedError("its mode is computed by the graph")


def _norms(node: Node) -> Iterator[Chain]:
    """Yield a batch norm with its followers, the shortest chain first."""
    call = _is(node, "norm")
    if call is None or any(call.given.get(name) for name in _EPILOGUE):
        return
    native = node.target is F.batch_norm
    if not native:
        _check_numbers(call.given, "eps", "momentum")
        without = [call.given[name] is None for name in ("running_mean", "running_var")]
        if any(without) and not (all(without) and call.given["training"]):
            raise NotFusedError("there are no running statistics")
    kwargs = {name: v for name, v in call.given.items() if name != "input"}
    chain: Chain | None = Chain([node], "batch_norm", F.batch_norm, (call.x,), kwargs)
    while chain is not None:
        if not native or len(chain.nodes) > 1:
            yield chain
        chain = _followed(chain)


def _followed(chain: Chain) -> Chain | None:
    """Return a batch norm's chain with the next node, if the kernel can compute what it does."""
    last, given = chain.nodes[-1], chain.kwargs
    user = next(iter(last.users)) if len(last.users) == 1 else None
    call = read(user)
    if user is None or call is None or given.get("dropout"):
        return None
    activated = given.get("activation") is not None
    more: dict[str, Any]
    if call.kind == "add" and not activated and given.get("residual") is None:
        name, more = "add", {"residual": _residual(call, last)}
    elif call.kind == "activation" and not activated and call.given["activation"] != "gelu_tanh":
        name, slope = call.given["activation"], call.given.get("negative_slope", 0.01)
        if not is_number(slope) or slope < 0.0:
            return None
        more = {"activation": name, "negative_slope": slope}
    elif call.drops and given["training"] is True:
        name, more = "dropout", {"dropout": call.p}
    else:
        return None
    name = f"{chain.name} + {name}"
    return Chain([*chain.nodes, user], name, F.batch_norm, chain.args, {**given, **more})


def _check_statistics(chain: Chain) -> None:
    """Raise if another norm updates the same running statistics, and must be left to torch.

    torch's norm keeps them for backward, where it would find that a kernel has written to them.
    """
    mean = chain.kwargs.get("running_mean")
    for other in mean.users if isinstance(mean, Node) else ():
        if other not in chain.nodes and other.target is not F.batch_norm and _is(other, "norm"):
            alone = next(_norms(other))
            if not _plain(other) or not _plain(alone.args[0]):
                raise NotFusedError("a norm of the same running statistics is left")
            _check_call(alone)


def _row_norms(node: Node) -> Iterator[Chain]:
    """Yield a dropout, a sum and a layer or RMS norm."""
    call = _is(node, "row_norm")
    add = None if call is None else _is(call.x, "add")
    if call is None or add is None or len(call.given["normalized_shape"]) != 1:
        return
    total: Node = call.x
    for dropped in (add.x, add.given["other"]):
        drop = _dropout_before(dropped, add, total)
        if drop is None:
            continue
        order = list(node.graph.nodes)
        others = [user for user in total.users if user is not node]
        if any(order.index(user) < order.index(node) for user in others):
            raise NotFusedError("the sum is read before it is normalized")
        kept = ("weight", "bias", "eps")
        kwargs = {name: given for name, given in call.given.items() if name in kept}
        if kwargs["eps"] is not None:
            _check_numbers(kwargs, "eps")
        kwargs["p"] = drop.p if drop.drops else 0.0
        kwargs["return_sum"] = bool(others)
        norm = "layer_norm" if "bias" in kwargs else "rms_norm"
        yield Chain(
            [dropped, total, node],
            f"dropout + add + {norm}",
            _ROW_NORMS[norm],
            (drop.x, _residual(add, dropped)),
            kwargs,
            total if others else None,
        )


def _dropout_before(node: Any, add: Call, user: Node) -> Call | None:
    """Return the dropout of elements whose result this sum alone reads, if it is one."""
    drop = _is(node, "dropout")
    if drop is None or drop.given["function"] is not F.dropout or not _feeds(node, user):
        return None
    _check_numbers(drop.given, "p")
    if add.given.get("inplace") and not (drop.drops and is_number(drop.p)):
        raise NotFusedError("the sum is written into the input of a dropout that drops nothing")
    return drop


def _sums(node: Node) -> Iterator[Chain]:
    """Yield a dropout and a sum, and the same with a bias that is added before."""
    add = _is(node, "add")
    if add is None:
        return
    for dropped in (add.x, add.given["other"]):
        drop = _dropout_before(dropped, add, node)
        if drop is None or not drop.drops:
            continue
        nodes, residual, p = [dropped, node], _residual(add, dropped), drop.p
        yield Chain(nodes, "dropout + add", F.dropout_add, (drop.x, residual, p), {})
        biased = _is(drop.x, "add")
        if biased is not None and _feeds(drop.x, dropped) and biased.given["alpha"] == 1:
            x, bias = biased.x, biased.given["other"]
            if not biased.given.get("inplace") and not _is_bias(bias, x):
                x, bias = bias, x
            if _is_bias(bias, x):
                args, name = (x, bias, residual, p), "bias + dropout + add"
                yield Chain([drop.x, *nodes], name, F.bias_dropout_add, args, {})


def _is_bias(bias: Any, x: Any) -> bool:
    """Return whether a node is a vector that is added to each row of another."""
    if not _plain(bias) or not _plain(x) or value(bias).dim() != 1 or value(x).dim() < 2:
        return False
    return _equal(value(bias).shape, value(x).shape[-1:])


def _drops(node: Node) -> Iterator[Chain]:
    """Yield a dropout alone, and with the activation before it."""
    call = _is(node, "dropout")
    if call is None or call.given["training"] is False or call.p == 0.0:
        return
    if node.target not in DROPOUTS:
        _check_numbers(call.given, "p")
        function, inplace = call.given["function"], bool(call.given.get("inplace"))
        args: tuple[Any, ...] = (call.x, call.p, True, inplace)
        yield Chain([node], function.__name__, function, args, {})
    before = _is(call.x, "activation")
    if before is not None and call.drops and _feeds(call.x, node):
        activation, p = before.given["activation"], call.p
        if activation != "leaky_relu":
            name, args = f"{activation} + dropout", (before.x, p, activation)
            yield Chain([call.x, node], name, F.activation_dropout, args, {})


# --- replacing them -------------------------------------------------------------------------------


def fuse(graph: Graph, report: Report, *, eager: bool) -> None:
    """Replace every chain of a graph, and report what was done.

    ``eager``: it will be run as it is, so that numbers that it computes are plain ones.
    """
    if any("functorch" in str(getattr(n.target, "__module__", "")) for n in graph.nodes):
        report.left["all: a torch.func transform is called"] += 1
        return
    for find in (_norms, _row_norms, _sums, _drops):
        gone: set[Node] = set()
        for node in list(graph.nodes):
            if node not in gone:
                gone.update(_fuse_at(node, find, report, eager))
    graph.lint()


def _fuse_at(
    node: Node, find: Callable[[Node], Iterator[Chain]], report: Report, eager: bool
) -> Sequence[Node]:
    """Replace the longest chain that is found at a node; return the nodes that are gone."""
    name = _name(node)
    chains: list[Chain] = []
    try:
        for chain in find(node):
            chains.append(chain)
    except NotFusedError as reason:
        name = f"what follows {chains[-1].name}" if chains else name
        report.left[f"{name}: {reason}"] += 1
    for chain in reversed(chains):
        try:
            if not all(_plain(n) for n in (*chain.nodes, *chain.args[:1])):
                raise NotFusedError("it is not called on ordinary dense tensors")
            if not eager and any(map(is_computed, (*chain.args, *chain.kwargs.values()))):
                raise NotFusedError("p is not a constant number")
            _check_order(chain.nodes)
            _check_writes(chain.nodes)
            _check_statistics(chain)
            _replace(graph=node.graph, chain=chain, result=_check_call(chain))
        except NotFusedError as reason:
            report.left[f"{chain.name}: {reason}"] += 1
        else:
            report.fused[chain.name] += 1
            return chain.nodes
    return ()


def _replace(graph: Graph, chain: Chain, result: Any) -> None:
    """Put the call of a chain at the place of its last node."""
    last = chain.nodes[-1]
    with graph.inserting_before(last):
        call = graph.call_function(chain.function, chain.args, chain.kwargs)
        made = call
        if chain.total is not None:
            call.meta = {**last.meta, "example_value": result}
            made = graph.call_function(operator.getitem, (call, 0))
            total = graph.call_function(operator.getitem, (call, 1))
            total.meta = dict(chain.total.meta)
            chain.total.replace_all_uses_with(total)
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
