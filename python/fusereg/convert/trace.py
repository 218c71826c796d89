"""Traces which layers of a module follow each other in its forward, and rewrites the forward.

``torch.fx`` runs forward once with proxies for tensors and records what is done with them. It does
not see decisions that forward makes without tensors. So only straight-line code is rewritten, which
cannot take another path:

- it reads only layers, parameters and plain attributes of the module. Those are recorded, and
  checked for changes at every call (:class:`Plan`);
- it calls only layers, functions of torch, and functions that are straight-line code themselves;
- it stores nothing, makes no random decision, checks no types, enters no context.

Any other forward is left as it is, and the reason is reported.
"""

from __future__ import annotations

import builtins
import dis
import functools
import importlib
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import chain as _chain
from .chain import ADD, Follower

MAX_ARGUMENTS = 4


class NotStraightError(Exception):
    """A forward that cannot be rewritten safely, for the reason in the text."""


# --- straight-line code ---------------------------------------------------------------------------

TORCH = os.path.dirname(torch.__file__) + os.sep


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MODULES = ("torch", "torch.nn", "torch.nn.functional", "math", "operator")
_TORCH_FUNCTIONS = ("torch", "torch.functional", "torch.nn.functional")
_BUILTINS = _words(
    "abs enumerate float getattr int len list max min range reversed sum super tuple zip"
)
#: Modes, random decisions, and functions that run or compile other code.
_REFUSED = _words("""
    is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled
    is_tracing is_compiling is_dynamo_compiling is_exporting set_grad_enabled
    rand randn randint randperm bernoulli normal random initial_seed get_rng_state
    checkpoint checkpoint_sequential utils compile cond fork
    """)
_STORES = _words("""
    STORE_ATTR DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL STORE_SUBSCR DELETE_SUBSCR STORE_SLICE
    IMPORT_NAME
    """)
_CONTEXTS = frozenset(("BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL"))


def _check_global(name: str, namespace: dict[str, Any]) -> None:
    """Raise NotStraightError if a global could make forward take another path."""
    if name in _REFUSED:
        raise NotStraightError(f"it uses {name}")
    if name not in namespace:
        if name not in _BUILTINS or not hasattr(builtins, name):
            raise NotStraightError(f"it uses {name}")
        return
    value = namespace[name]
    if isinstance(value, types.ModuleType):
        allowed = value.__name__ in _MODULES
    elif isinstance(value, types.FunctionType):
        # One that is not torch's is checked when it is called.
        of_torch = value.__code__.co_filename.startswith(TORCH)
        allowed = not of_torch or value.__module__ in _TORCH_FUNCTIONS
    elif isinstance(value, type):
        allowed = issubclass(value, nn.Module)
    else:
        allowed = isinstance(value, types.BuiltinFunctionType)
    if not allowed:
        raise NotStraightError(f"it uses the global {name}")


def _check_code(code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Raise NotStraightError unless the code is straight-line."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        name, argument = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            _check_global(argument, namespace)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            # The module's own mode is recorded, that of its layers is not.
            of_self = (
                before.opname.startswith("LOAD_FAST") and before.argval in code.co_varnames[:1]
            )
            if argument in _REFUSED or (argument == "training" and not of_self):
                raise NotStraightError(f"it uses {argument}")
        elif name in _STORES:
            raise NotStraightError("it stores values")
        elif name in _CONTEXTS:
            raise NotStraightError("it enters a context")
        before = instruction


@contextmanager
def _watched(module: nn.Module, entry: types.CodeType) -> Iterator[None]:
    """Check each function that forward calls, directly or not, before it runs."""
    known = {entry}

    def watch(frame: types.FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_back is None or frame.f_code in known:
            return
        caller = frame.f_back.f_code
        if frame.f_code is not entry and caller not in known:
            return
        file = frame.f_code.co_filename
        if file == __file__:
            return
        if file.startswith(TORCH):
            if file.endswith(("_contextlib.py", "autocast_mode.py")):
                raise NotStraightError("it enters a context")
            return
        if not set(frame.f_code.co_freevars) <= {"__class__", *caller.co_cellvars}:
            raise NotStraightError(f"it calls {frame.f_code.co_name}, a closure")
        own = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:1]]
        if any(isinstance(value, nn.Module) and value is not module for value in own):
            raise NotStraightError(f"it calls {frame.f_code.co_name} of another module")
        _check_code(frame.f_code, frame.f_globals)
        known.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


# --- tracing --------------------------------------------------------------------------------------

_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul"


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as such; torch.fx records ``x + y``, which leaves x as is."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Return the proxies' method of an operator in place."""
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        result: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return result

    return method


for _name in _IN_PLACE.split():
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """A tracer that enters no layer, and refuses tensors that depend on no input."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.tensor_attrs and not isinstance(a, nn.Parameter):
            raise NotStraightError("it makes a tensor that depends on no input")
        return super().create_arg(a)


_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN or isinstance(
        value, (types.FunctionType, types.BuiltinFunctionType, type)
    )


def _recorder(
    module: nn.Module, forward: Callable[..., Any], count: int, seen: dict[str, Any]
) -> type:
    """Return a class to trace with: forward takes ``count`` tensors, and reads are recorded."""
    cls = type(module)

    def read(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name not in _INTERNAL and name in nn.Module.__getattribute__(self, "__dict__"):
            if not _is_plain(value):
                raise NotStraightError(f"it reads self.{name}, a {type(value).__name__}")
            seen[name] = value
        return value

    names = ", ".join(f"x{i}" for i in range(count))
    entry = eval(f"lambda self, {names}: forward(self, {names})", {"forward": forward})
    return type(cls.__name__, (cls,), {"forward": entry, "__getattribute__": read})


def _required(forward: types.FunctionType) -> int:
    """Return how many tensors forward requires; other arguments keep their defaults."""
    code = forward.__code__
    count = code.co_argcount - len(forward.__defaults__ or ()) - 1
    without_default = set(
        code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    ) - set(forward.__kwdefaults__ or ())
    if without_default or not 1 <= count <= MAX_ARGUMENTS:
        raise NotStraightError(f"it does not take 1 to {MAX_ARGUMENTS} tensors")
    return count


def _trace(
    module: nn.Module, forward: types.FunctionType, count: int
) -> tuple[fx.Graph, dict[str, Any]]:
    """Return the graph of a forward, and the attributes that it reads."""
    seen: dict[str, Any] = {}
    cls = type(module)
    _check_code(forward.__code__, forward.__globals__)
    module.__class__ = _recorder(module, forward, count, seen)
    try:
        with _watched(module, forward.__code__):
            graph = _Tracer().trace(module)
    finally:
        module.__class__ = cls
    return graph, seen


# --- chains in a graph ----------------------------------------------------------------------------

#: Layers whose output shares no memory with anything.
_FRESH = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def _target(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls, if any."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, without a last underscore."""
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    if node.op == "call_function":
        return getattr(node.target, "__name__", "").removesuffix("_")
    return ""


def _follower(
    module: nn.Module, node: fx.Node, current: fx.Node, allowed: Callable[[nn.Module], bool]
) -> Follower | None:
    """Return what this node does with the current value; None if a chain cannot contain it."""
    layer = _target(module, node)
    if layer is not None:
        known = (
            type(layer) is nn.Identity
            or _chain.activation_of(layer) is not None
            or _chain.is_dropout(layer)
        )
        fits = node.args == (current,) and not node.kwargs and allowed(layer)
        return layer if known and fits else None
    name = _function_name(node)
    if name in ("add", "iadd"):
        if len(node.args) == 2 and not node.kwargs:
            left, right = node.args
            other = right if left is current else left
            in_place = (
                name == "iadd" or str(getattr(node.target, "__name__", node.target)) == "add_"
            )
            # Only the current value may be written into, as nothing else reads it.
            fits = left is not right and not (in_place and right is current)
            if fits and isinstance(other, fx.Node):
                return ADD
        return None
    if name in _chain.FUNCTIONS and node.args == (current,) and set(node.kwargs) <= {"inplace"}:
        return name
    return None


@dataclass
class _Found:
    """A chain in a graph: its nodes, and what those after the first do."""

    nodes: list[fx.Node]
    followers: list[Follower] = field(default_factory=list)
    head: Follower | None = None  # of a chain without a norm


def _find(
    module: nn.Module, norm: fx.Node, order: dict[fx.Node, int], allowed: Callable[..., bool]
) -> _Found:
    """Find as many followers of a norm as one kernel can compute."""
    found = _Found([norm])
    private = _is_private(module, norm)
    while len(found.nodes[-1].users) == 1:
        current = found.nodes[-1]
        (node,) = current.users
        moved = all(isinstance(f, nn.Identity) for f in found.followers)
        if order[node] != order[current] + 1 and not (private and moved):
            break
        follower = _follower(module, node, current, allowed)
        if follower is None or (follower is ADD and ADD in found.followers):
            break
        found.nodes.append(node)
        found.followers.append(follower)
    while found.followers and isinstance(found.followers[-1], nn.Identity):
        found.nodes.pop()
        found.followers.pop()
    return found


def _is_private(module: nn.Module, node: fx.Node) -> bool:
    """Return whether only this node reads its input, and nothing shares the input's memory.

    Reading it later, or writing into it, is unobservable then.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return False
    return type(_target(module, source)) in _FRESH


def _writes(module: nn.Module, node: fx.Node) -> bool:
    """Return whether an activation, dropout or sum writes into its first argument."""
    layer = _target(module, node)
    if layer is not None:
        return bool(getattr(layer, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") or name == "iadd" or bool(node.kwargs.get("inplace", False))


def _head(
    module: nn.Module, node: fx.Node, allowed: Callable[[nn.Module], bool]
) -> Follower | None:
    """Return the dropout, or activation that the dropout kernel can fuse, that a node calls."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    layer = _target(module, node)
    if layer is not None and _chain.activation_of(layer) is None and not _chain.is_dropout(layer):
        # GELU's tanh form, which the dropout kernel can fuse and batch norm's cannot.
        fits = node.args == (source,) and not node.kwargs and allowed(layer)
        return layer if fits and _chain.fused_activation(layer) is not None else None
    follower = _follower(module, node, source, allowed)
    if follower is None or follower is ADD:
        return None
    known = isinstance(follower, nn.Module) and _chain.is_dropout(follower)
    return follower if known or _chain.fused_activation(follower) is not None else None


def _find_dropout(
    module: nn.Module, first: fx.Node, order: dict[fx.Node, int], allowed: Callable[..., bool]
) -> _Found | None:
    """Find an activation and a dropout, or a dropout and a sum, that follow each other."""
    head = _head(module, first, allowed)
    if head is None or len(first.users) != 1:
        return None
    (node,) = first.users
    private = _is_private(module, first)
    if order[node] != order[first] + 1 and not private:
        return None
    drops = isinstance(head, nn.Module) and _chain.is_dropout(head)
    follower = _follower(module, node, first, allowed)
    if drops:
        # In evaluation a dropout returns its input, which a sum in place would change.
        fits = follower is ADD and (
            private or not (_writes(module, first) or _writes(module, node))
        )
    else:
        fits = (
            isinstance(follower, nn.Module)
            and _chain.is_dropout(follower)
            and (private or not _writes(module, first))
        )
    if not fits or follower is None:
        return None
    return _Found([first, node], [follower], head)


def _chains(
    module: nn.Module, graph: fx.Graph, allowed: Callable[[nn.Module], bool]
) -> list[_Found]:
    """Find the chains of allowed layers in a graph."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        layer = _target(module, node)
        fits = len(node.args) == 1 and not node.kwargs
        if layer is not None and type(layer) in _chain.NORMS and fits:
            calls.setdefault(layer, []).append(node)
    found = [
        _find(module, nodes[0], order, allowed)
        for layer, nodes in calls.items()
        # A norm that is called twice updates its statistics twice, and must do so in that order.
        if len(nodes) == 1 and allowed(layer)
    ]
    found = [f for f in found if f.followers]
    taken = {node for f in found for node in f.nodes}
    for node in graph.nodes:
        if node in taken:
            continue
        pair = _find_dropout(module, node, order, allowed)
        if pair is not None and taken.isdisjoint(pair.nodes):
            found.append(pair)
            taken.update(pair.nodes)
    return found


def _rewrite(graph: fx.Graph, found: _Found) -> str:
    """Replace a chain by one call; return the chain's description."""
    first, last = found.nodes[0], found.nodes[-1]
    residual = None
    run = _chain.chain if found.head is None else _chain.dropout_chain
    by_name = isinstance(found.head, str)
    with graph.inserting_before(last):
        layers: list[Any] = [found.head if by_name else graph.get_attr(str(first.target))]
        for before, node, follower in zip(
            found.nodes, found.nodes[1:], found.followers, strict=False
        ):
            is_layer = isinstance(follower, nn.Module)
            layers.append(graph.get_attr(str(node.target)) if is_layer else follower)
            if follower is ADD:
                (residual,) = (value for value in node.args if value is not before)
        call = graph.call_function(run, (first.args[0], residual, *layers))
    last.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)
    names = [f if isinstance(f, str) else type(f).__name__ for f in found.followers]
    name = str(found.head if by_name else first.target)
    return " + ".join([name, *(n for n in names if n != "Identity")])


# --- plans ----------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Plan:
    """A rewritten forward, and the conditions under which it is equivalent to the original one.

    Attributes:
        chains: a description of each fused chain.
        source: the rewritten forward as Python code.
        names: the globals of that code.
        count: the number of tensors that forward takes.
        values: the attributes that forward reads, and their values.
        children: paths of modules whose children forward calls, and those children's names.
        run: the rewritten forward.
    """

    chains: list[str]
    source: str
    names: dict[str, Any]
    count: int
    values: tuple[tuple[str, Any], ...]
    children: tuple[tuple[tuple[str, ...], list[str]], ...]
    run: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        namespace = dict(self.names)
        exec(compile(self.source, "<forward rewritten by fusereg.convert>", "exec"), namespace)
        self.run = namespace["forward"]

    def fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the original forward would do what was traced."""
        if kwargs or len(args) != self.count:
            return False
        for argument in args:
            if not isinstance(argument, Tensor):
                return False
        for name, value in self.values:
            now = getattr(module, name, self)
            if type(now) is not type(value) or now != value:
                return False
        for path, names in self.children:
            parent: nn.Module | None = module
            for part in path:
                parent = None if parent is None else parent._modules.get(part)
            if parent is None or _present(parent) != names:
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        found = {k: v.__name__ for k, v in self.names.items() if isinstance(v, types.ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in found}
        arguments = (self.count, self.values, self.children)
        return _restored, (self.chains, self.source, found, others, *arguments)


def _restored(
    chains: list[str], source: str, modules: dict[str, str], others: dict[str, Any], *rest: Any
) -> Plan:
    """Rebuild a plan when unpickling."""
    names = {name: importlib.import_module(module) for name, module in modules.items()}
    return Plan(chains, source, {**names, **others}, *rest)


def _present(module: nn.Module) -> list[str]:
    """Return the names of a module's children, without those that are None."""
    return [name for name, child in module._modules.items() if child is not None]


def _parents(graph: fx.Graph) -> list[tuple[str, ...]]:
    """Return the paths, from the traced module, of the modules whose children it calls."""
    paths = {tuple(str(n.target).split(".")[:-1]) for n in graph.nodes if n.op == "call_module"}
    return sorted({path[:length] for path in paths for length in range(len(path) + 1)})


def make_plans(
    module: nn.Module, forward: Callable[..., Any], allowed: Callable[[nn.Module], bool]
) -> tuple[Plan, ...]:
    """Return a plan for a module, or one per mode if it reads its mode; none without chains.

    Args:
        module: the module, whose class is changed while it is traced.
        forward: its original forward.
        allowed: whether a layer may be part of a chain.

    Raises:
        NotStraightError: the forward cannot be rewritten, for the reason in the text.
    """
    plans = []
    mode = module.training
    try:
        for training in (mode, not mode):
            module.training = training
            plan, reads_mode = _make_plan(module, forward, allowed)
            plans += [] if plan is None else [plan]
            if not reads_mode:
                break
    finally:
        module.training = mode
    return tuple(plans)


def _make_plan(
    module: nn.Module, forward: Callable[..., Any], allowed: Callable[[nn.Module], bool]
) -> tuple[Plan | None, bool]:
    """Return a plan for the module's current mode, and whether forward reads the mode."""
    if not isinstance(forward, types.FunctionType):
        raise NotStraightError("its forward is not a function")
    if hasattr(forward, "__wrapped__") or not set(forward.__code__.co_freevars) <= {"__class__"}:
        raise NotStraightError("it is decorated")
    count = _required(forward)
    try:
        graph, seen = _trace(module, forward, count)
    except NotStraightError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotStraightError(f"torch.fx cannot follow it: {first}") from error
    children = tuple(
        (path, _present(functools.reduce(lambda m, part: m.get_submodule(part), path, module)))
        for path in _parents(graph)
    )
    chains = _chains(module, graph, allowed)
    reads_mode = "training" in seen
    if not chains:
        return None, reads_mode
    descriptions = [_rewrite(graph, found) for found in chains]
    code = graph.python_code("self")
    return Plan(
        descriptions, code.src, code.globals, count, tuple(seen.items()), children
    ), reads_mode
