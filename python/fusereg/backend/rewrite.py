"""Replaces chains of calls in Dynamo's graph by calls of this package.

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
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from .. import functional as F
from .nodes import DROPOUTS, Activation, Add, Drop, Norm, RowNorm, is_number, read

_ROW_NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": F.dropout_add_layer_norm,
    "rms_norm": F.dropout_add_rms_norm,
}
_EXACT_TYPES = (FakeTensor, Tensor, torch.nn.Parameter)


class NotFusedError(Exception):
    """A chain that cannot be one call, for the reason in the text."""


@dataclass
class Report:
    """What was fused, and what was left and why, with counts."""

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


def _kind(t: Tensor) -> tuple[str, ...]:
    """Return what code that reads a tensor can depend on; as text, for sizes may be symbolic."""
    sizes = [(str(n), str(s)) for n, s in zip(t.shape, t.stride(), strict=True)]
    strides = [s for n, s in sizes if n != "1"]
    return str(t.dtype), str(t.device), str([n for n, _ in sizes]), str(strides)


def _alike(a: Any, b: Any) -> bool:
    """Return whether two nodes are tensors of one shape, dtype and device."""
    return _plain(a) and _plain(b) and _kind(value(a))[:3] == _kind(value(b))[:3]


def _check_call(chain: Chain) -> Any:
    """Call the replacement on fake tensors; return its result.

    Raises:
        NotFusedError: it does not take them, or the result differs from the chain's.
    """
    kwargs = dict(chain.kwargs)  # such that nothing is written
    if chain.function is F.batch_norm:
        kwargs["update_stats"] = False
    if chain.function in DROPOUTS:
        kwargs["inplace"] = False
    args, kwargs = map_arg((chain.args, kwargs), value)
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
        if _kind(made) != _kind(value(node)):
            raise NotFusedError(
                f"its result is {_kind(made)} where torch's is {_kind(value(node))}"
            )
    return result


# --- order ----------------------------------------------------------------------------------------


def _check_order(nodes: Sequence[Node]) -> None:
    """Raise NotFusedError unless the nodes may all be run at the place of the last one."""
    reads: set[int] = set()
    writes: set[int] = set()
    node = nodes[0]
    while node is not nodes[-1]:
        if node in nodes:
            reads |= _storages(n for n in node.all_input_nodes if n not in nodes)
            writes |= _storages(_written(node) or ())
        elif node.op not in ("placeholder", "get_attr"):
            written = _written(node)
            if written is None:
                raise NotFusedError(f"{node.name} is called in between")
            if _storages(written) & (reads | writes) or _storages(node.all_input_nodes) & writes:
                raise NotFusedError(f"{node.name} in between uses the same memory")
        node = node.next


def _written(node: Node) -> tuple[Any, ...] | None:
    """Return the nodes whose values a node writes to; None if that is not known."""
    call = read(node)
    if call is None:
        return None
    written = tuple(n for n in call.written if isinstance(n, Node))
    return written if all(map(_plain, written)) else None


def _check_scratch(node: Any, chain: Sequence[Node]) -> None:
    """Raise NotFusedError unless nothing outside of the chain sees a write to a node's value."""
    if isinstance(node, Node) and node.op in ("call_function", "call_method"):
        memory = _storages([node])
        sharing = [n for n in node.graph.nodes if _storages([n]) & memory]
        if all(n is node or n in chain for n in sharing) and all(n in chain for n in node.users):
            return
    raise NotFusedError("it writes in place to a tensor that may be read elsewhere")


# --- finding chains -------------------------------------------------------------------------------


def _feeds(node: Any, user: Node) -> bool:
    """Return whether a node's value is read by this one alone."""
    return isinstance(node, Node) and list(node.users) == [user]


def _residual(add: Add, node: Node) -> Any:
    """Return what a sum adds to a node's value.

    Raises:
        NotFusedError: a kernel cannot add it.
    """
    if add.left is add.right:
        raise NotFusedError("both operands of the sum are one tensor")
    if add.inplace and add.left is not node:
        raise NotFusedError("the sum is written into the residual")
    residual = add.right if add.left is node else add.left
    if not _alike(node, residual):
        raise NotFusedError("the summands differ in kind, shape, dtype or device")
    return residual


def _norms(node: Node) -> Iterator[Chain]:
    """Yield a batch norm with its followers, the shortest chain first."""
    call = read(node)
    if not isinstance(call, Norm) or not call.plain:
        return
    given = call.arguments
    _check_numbers(given, "eps", "momentum")
    without = [given[name] is None for name in ("running_mean", "running_var")]
    if not isinstance(given["training"], bool) or any(without) != all(without):
        raise NotFusedError("its mode is computed by the graph")
    if any(without) and not given["training"]:
        raise NotFusedError("there are no running statistics")
    chain: Chain | None = Chain([node], "batch_norm", F.batch_norm, (call.x,), given)
    while chain is not None:
        if chain.nodes != [node] or node.target is not F.batch_norm:
            yield chain
        chain = _followed(chain)


def _followed(chain: Chain) -> Chain | None:
    """Return a batch norm's chain with the next node, if the kernel can compute what it does."""
    last = chain.nodes[-1]
    if len(last.users) != 1:
        return None
    (user,) = last.users
    more: dict[str, Any]
    given = chain.kwargs
    call = read(user)
    if given.get("dropout"):
        return None
    if isinstance(call, Add) and given.get("residual") is given.get("activation") is None:
        name, more = "add", {"residual": _residual(call, last)}
    elif isinstance(call, Activation) and given.get("activation") is None:
        if call.name == "gelu_tanh":
            return None
        name, more = call.name, {"activation": call.name, "negative_slope": call.slope}
    elif isinstance(call, Drop) and call.function is F.dropout and call.drops:
        if given["training"] is not True:
            return None
        name, more = "dropout", {"dropout": float(call.p)}
    else:
        return None
    return Chain(
        [*chain.nodes, user], f"{chain.name} + {name}", F.batch_norm, chain.args, {**given, **more}
    )


def _row_norms(node: Node) -> Iterator[Chain]:
    """Yield a dropout, a sum and a layer or RMS norm."""
    call = read(node)
    add = read(call.x) if isinstance(call, RowNorm) else None
    if not isinstance(call, RowNorm) or not isinstance(add, Add):
        return
    total: Node = call.x
    for dropped in (add.left, add.right):
        drop = read(dropped)
        if not _is_dropout(drop) or not _feeds(dropped, total):
            continue
        if add.inplace and not drop.drops:
            raise NotFusedError("the sum is written into the input of a dropout that drops nothing")
        nodes = [dropped, total, node]
        _check_drop(drop, nodes)
        if call.arguments["eps"] is not None:
            _check_numbers(call.arguments, "eps")
        order = list(node.graph.nodes)
        others = [user for user in total.users if user is not node]
        if any(order.index(user) < order.index(node) for user in others):
            raise NotFusedError("the sum is read before it is normalized")
        arguments = {"p": float(drop.p) if drop.drops else 0.0, "return_sum": bool(others)}
        yield Chain(
            nodes,
            f"dropout + add + {call.name}",
            _ROW_NORMS[call.name],
            (drop.x, _residual(add, dropped)),
            {**call.arguments, **arguments},
            total if others else None,
        )


def _sums(node: Node) -> Iterator[Chain]:
    """Yield a dropout and a sum, and the same with a bias that is added before."""
    add = read(node)
    if not isinstance(add, Add):
        return
    for dropped in (add.left, add.right):
        drop = read(dropped)
        if not _is_dropout(drop) or not drop.drops or not _feeds(dropped, node):
            continue
        nodes, residual, p = [dropped, node], _residual(add, dropped), float(drop.p)
        _check_drop(drop, nodes)
        yield Chain(nodes, "dropout + add", F.dropout_add, (drop.x, residual, p), {})
        biased = read(drop.x)
        if isinstance(biased, Add) and _feeds(drop.x, dropped):
            x, bias = biased.left, biased.right
            if not _is_bias(bias, x):
                x, bias = bias, x
            if _is_bias(bias, x) and not (biased.inplace and x is not biased.left):
                nodes = [drop.x, *nodes]
                if biased.inplace:
                    _check_scratch(x, nodes)
                name = "bias + dropout + add"
                yield Chain(nodes, name, F.bias_dropout_add, (x, bias, residual, p), {})


def _is_bias(bias: Any, x: Any) -> bool:
    """Return whether a node is a vector that is added to each row of another."""
    if not _plain(bias) or not _plain(x) or value(bias).dim() != 1 or value(x).dim() < 2:
        return False
    return str(value(bias).shape[-1]) == str(value(x).shape[-1])


def _drops(node: Node) -> Iterator[Chain]:
    """Yield a dropout alone, and with the activation before it."""
    call = read(node)
    if not isinstance(call, Drop) or call.training is False or call.p == 0:
        return
    if call.training is not True or not is_number(call.p):
        raise NotFusedError("p or its mode is computed by the graph")
    p = float(call.p)
    if node.target not in DROPOUTS:
        kwargs = {"training": True, "inplace": call.inplace}
        yield Chain([node], call.function.__name__, call.function, (call.x, p), kwargs)
    before = read(call.x)
    if _is_dropout(call) and isinstance(before, Activation) and _feeds(call.x, node):
        nodes = [call.x, node]
        if before.name == "leaky_relu":
            return
        if before.inplace:
            _check_scratch(before.x, nodes)
        name = f"{before.name} + dropout"
        yield Chain(nodes, name, F.activation_dropout, (before.x, p, before.name), {})


def _is_dropout(call: Any) -> TypeGuard[Drop]:
    """Return whether a call is dropout of single elements."""
    return isinstance(call, Drop) and call.function is F.dropout


def _check_drop(drop: Drop, nodes: Sequence[Node]) -> None:
    """Raise NotFusedError unless a dropout at the begin of these nodes may be part of a kernel."""
    if not isinstance(drop.training, bool) or not is_number(drop.p):
        raise NotFusedError("p or its mode is computed by the graph")
    if drop.inplace:
        _check_scratch(drop.x, nodes)


def _check_numbers(arguments: dict[str, Any], *names: str) -> None:
    """Raise NotFusedError unless these arguments are numbers, or left away."""
    for name in names:
        if not is_number(arguments.get(name, 0.1)):
            raise NotFusedError(f"{name} is computed by the graph")


# --- replacing them -------------------------------------------------------------------------------


def fuse(graph: Graph, report: Report) -> None:
    """Replace every chain of a graph, and report what was done."""
    if any("functorch" in str(getattr(n.target, "__module__", "")) for n in graph.nodes):
        report.left["all: a torch.func transform is called"] += 1
        return
    for find in (_norms, _row_norms, _sums, _drops):
        gone: set[Node] = set()
        for node in list(graph.nodes):
            if node not in gone:
                gone.update(_fuse_at(node, find, report))
    graph.lint()


def _fuse_at(node: Node, find: Callable[[Node], Iterator[Chain]], report: Report) -> Sequence[Node]:
    """Replace the longest chain that is found at a node; return the nodes that are gone."""
    name = str(getattr(node.target, "__name__", node.target))
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
            _check_order(chain.nodes)
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
