"""Find the chains in the graph of a forward: a layer and those that follow it.

A chain is called where its last part was, so a norm's input is read later than before, and a
dropout's result, which may be its input, is not written into. That must not be observable. What is
assumed of the layers for that is recorded, and checked at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..batch_norm.known import activation_of
from ..core.modules import submodule
from ..core.standins import Found
from ..core.trace import Read
from . import chain as _chain
from .chain import ADD, ADD_IN_PLACE, SUMS, Follower

_Allowed = Callable[[str], bool]

#: Layers whose output shares no memory with anything.
_FRESH = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass
class Chain:
    """A chain in a graph: its nodes, and what those after the first do."""

    nodes: list[fx.Node]
    followers: list[Follower] = field(default_factory=list)
    head: Follower | None = None  # of a chain without a norm

    def text(self) -> str:
        """Return a description."""
        parts = [f if isinstance(f, str) else type(f).__name__ for f in self.followers]
        name = self.head if isinstance(self.head, str) else str(self.nodes[0].target)
        return " + ".join([name, *(part for part in parts if part != "Identity")])


def _function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _bare_name(node: fx.Node) -> str:
    """Return the name of a function without the underscore of its version in place."""
    return _function_name(node).removesuffix("_")


class Finder:
    """Finds the chains of a graph.

    Attributes:
        assumed: what a layer must still be at a call, besides what forward itself reads.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, allowed: _Allowed) -> None:
        self.module, self.graph, self.allowed = module, graph, allowed
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.assumed: list[Read] = []

    def chains(self) -> list[Chain]:
        """Return the chains of allowed layers."""
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in self.nodes:
            layer = self._layer(node)
            if layer is not None and type(layer) in _chain.NORMS:
                calls.setdefault(layer, []).append(node)
        found: list[Chain] = []
        taken: set[fx.Node] = set()
        for nodes in calls.values():
            # A norm that is called twice updates its statistics twice, in that order.
            if (
                len(nodes) != 1 or len(nodes[0].args) != 1 or nodes[0].kwargs
                or not self.allowed(str(nodes[0].target))
            ):  # fmt: skip
                continue
            chain = self._after_norm(nodes[0], taken)
            if chain.followers:
                found.append(chain)
                taken.update(chain.nodes)
        for node in self.nodes:
            if node in taken:
                continue
            pair = self._dropout_pair(node)
            if pair is not None and taken.isdisjoint(pair.nodes):
                found.append(pair)
                taken.update(pair.nodes)
        return found

    def lost(self, chains: list[Chain]) -> Iterator[str]:
        """Return what keeps layers from being chains: modules of other libraries between them."""
        taken = {node for chain in chains for node in chain.nodes[1:]}
        for node in self.nodes:
            layer = self._layer(node)
            if layer is None or node in taken or type(layer).__module__.startswith("torch.nn."):
                inner = type(layer) is nn.Sequential
                if not inner or node in taken:
                    continue
            if len(node.users) != 1 or len(node.all_input_nodes) != 1 or self._begins(layer):
                continue
            (user,) = node.users
            if user in taken or self._follower(user, node) is None:
                continue
            then = str(user.target) if user.op == "call_module" else _bare_name(user)
            said = f"{node.target} ({type(layer).__name__})"
            (source,) = node.all_input_nodes
            if self._begins(self._layer(source)) and len(source.users) == 1:
                yield f"{source.target} and {then} are not fused: {said} is between them"
            else:
                *_, last = layer.modules()  # type: ignore[union-attr]
                if last is not layer and self._begins(last):
                    yield f"{then} is not fused with the {type(last).__name__} inside {said}"

    def _begins(self, layer: nn.Module | None) -> bool:
        """Return whether a layer can begin a chain."""
        return layer is not None and (type(layer) in _chain.NORMS or _chain.is_dropout(layer))

    def _layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that a node calls, if any."""
        if node.op != "call_module":
            return None
        return submodule(self.module, str(node.target))

    def _follower(self, node: fx.Node, current: fx.Node) -> Follower | None:
        """Return what a node does with the current value; None if a chain cannot contain it."""
        layer = self._layer(node)
        if layer is not None:
            known = (
                _chain.is_identity(layer)
                or activation_of(layer) is not None
                or _chain.is_dropout(layer)
            )
            fits = node.args == (current,) and not node.kwargs and self.allowed(str(node.target))
            return layer if known and fits else None
        name = _bare_name(node)
        if name in ("add", "iadd"):
            if len(node.args) != 2 or node.kwargs:
                return None
            left, right = node.args
            other = right if left is current else left
            how = ADD_IN_PLACE if _function_name(node) in ("iadd", "add_") else ADD
            # Only the current value may be written into, as nothing else reads it.
            fits = left is not right and not (how is ADD_IN_PLACE and right is current)
            return how if fits and isinstance(other, fx.Node) else None
        fits = node.args == (current,) and set(node.kwargs) <= {"inplace"}
        return name if fits and name in _chain.FUNCTIONS else None

    def _after_norm(self, norm: fx.Node, taken: AbstractSet[fx.Node]) -> Chain:
        """Find as many followers of a norm as one kernel can compute.

        A sum of two norms belongs to one of them, that which is called first.
        """
        found = Chain([norm])
        while len(found.nodes[-1].users) == 1:
            current = found.nodes[-1]
            (node,) = current.users
            if node in taken:
                break
            if self.order[node] != self.order[current] + 1:
                moved = all(isinstance(f, nn.Identity) for f in found.followers)
                if not (moved and self._movable(norm, node)):
                    break
            follower = self._follower(node, current)
            sums = [f for f in (*found.followers, follower) if f in SUMS]
            if follower is None or len(sums) > 1:
                break
            found.nodes.append(node)
            found.followers.append(follower)
        while found.followers and isinstance(found.followers[-1], nn.Identity):
            found.nodes.pop()
            found.followers.pop()
        return found

    def _dropout_pair(self, first: fx.Node) -> Chain | None:
        """Return an activation and a dropout, or a dropout and a sum, that follow each other."""
        head = self._head(first)
        if head is None or len(first.users) != 1:
            return None
        (node,) = first.users
        adjacent = self.order[node] == self.order[first] + 1
        private = self._is_private(first)
        if not adjacent and not (private and self._movable(first, node)):
            return None
        follower = self._follower(node, first)
        if isinstance(head, nn.Module) and _chain.is_dropout(head):
            # In evaluation a dropout returns its input, which a sum in place would change.
            if follower not in SUMS:
                return None
            writes = follower == ADD_IN_PLACE
        elif isinstance(follower, nn.Module) and _chain.is_dropout(follower):
            writes = False
        else:
            return None
        if not private and (writes or self._writes(first)):
            return None
        return Chain([first, node], [follower], head)

    def _head(self, node: fx.Node) -> Follower | None:
        """Return the dropout, or activation that the dropout kernel can fuse, that a node calls."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        layer = self._layer(node)
        if layer is not None and activation_of(layer) is None:
            # A dropout, or GELU's tanh form, which batch norm's kernel cannot fuse.
            known = _chain.is_dropout(layer) or _chain.fused_activation(layer) is not None
            fits = node.args == (source,) and not node.kwargs and self.allowed(str(node.target))
            return layer if known and fits else None
        follower = self._follower(node, source)
        if follower is None or follower in SUMS:
            return None
        return follower if _chain.fused_activation(follower) is not None else None

    def _is_private(self, node: fx.Node) -> bool:
        """Return whether only this node reads its input, and nothing shares the input's memory.

        Reading it later, or writing into it, is unobservable then.
        """
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        layer = self._layer(source)
        if type(layer) not in _FRESH:
            return False
        self._assume(source, "__class__", type(layer))
        self._assume(source, "_forward_hooks", {})  # one may keep the result
        return True

    def _movable(self, first: fx.Node, last: fx.Node) -> bool:
        """Return whether a node's layer can as well be called just before another node."""
        if not self._is_private(first):
            return False
        layer = self._layer(first)
        for node in self.nodes[self.order[first] + 1 : self.order[last]]:
            between = self._layer(node)
            name = _function_name(node)
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place or name in ("iadd", "setitem") or node.kwargs.get("inplace"):
                return False
            if "out" in node.kwargs:
                return False
            # What updates or reads the norm's statistics must do so in the same order.
            if between is not None and any(m is layer for m in between.modules()):
                return False
            reads = (node, *node.all_input_nodes)
            if any(n.op == "get_attr" and not self._is_parameter(n) for n in reads):
                return False
        return True

    def _is_parameter(self, node: fx.Node) -> bool:
        path, _, name = str(node.target).rpartition(".")
        return name in submodule(self.module, path)._parameters

    def _writes(self, node: fx.Node) -> bool:
        """Return whether an activation or dropout writes into its argument."""
        layer = self._layer(node)
        if layer is None:
            return _function_name(node).endswith("_") or bool(node.kwargs.get("inplace", False))
        inplace = getattr(layer, "inplace", Found.NOTHING)
        self._assume(node, "inplace", inplace)
        return inplace not in (False, Found.NOTHING)

    def _assume(self, node: fx.Node, name: str, value: Any) -> None:
        self.assumed.append(Read(tuple(str(node.target).split(".")), name, value))


def rewrite(graph: fx.Graph, found: Chain) -> None:
    """Replace a chain by one call."""
    first, last = found.nodes[0], found.nodes[-1]
    residual = None
    run = _chain.chain if found.head is None else _chain.dropout_chain
    with graph.inserting_before(last):
        layers: list[Any] = [
            found.head if isinstance(found.head, str) else graph.get_attr(str(first.target))
        ]
        for before, node, follower in zip(
            found.nodes, found.nodes[1:], found.followers, strict=False
        ):
            is_layer = isinstance(follower, nn.Module)
            layers.append(graph.get_attr(str(node.target)) if is_layer else follower)
            if follower in SUMS:
                (residual,) = (value for value in node.args if value is not before)
        call = graph.call_function(run, (first.args[0], residual, *layers))
    last.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)
