"""Which layers the forwards of a model call, and what else they do with them.

Each module's forward is traced by itself, with its children as single calls. Of a forward that
cannot be traced, the source is read: what it does with a child other than calling it is unknown, so
everything inside such a child counts as touched.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .known import is_timm_act, why_unknown

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
#: What a forward may read of itself without reaching its children.
_HARMLESS = frozenset(("training",))
_OF_MODULE = frozenset(dir(nn.Module())) - _HARMLESS


class Calls:
    """The calls of a model's modules, by the object that is called.

    Attributes:
        of: module -> (the module whose forward calls it, the node of its graph) for each call; a
            call by a forward without a graph is not among them.
        touched: module -> why something may use it that is not in ``of``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[nn.Module, list[tuple[nn.Module, fx.Node]]] = {}
        self.touched: dict[nn.Module, str] = {}
        twin = _without_tensors(model)
        for name, module in model.named_modules():
            if not module._modules or isinstance(module, _CONTAINERS) or is_timm_act(module):
                continue
            try:
                graph = _trace(twin.get_submodule(name))
            except Exception as error:  # whatever a forward does with a proxy
                self._read_source(name, module, error)
                continue
            for node in graph.nodes:
                if node.op == "call_module":
                    called = module.get_submodule(str(node.target))
                    self.of.setdefault(called, []).append((module, node))
                elif node.op == "get_attr":
                    owner = module.get_submodule(str(node.target).rpartition(".")[0])
                    if owner is not module:
                        self._touch(owner, f"{name or 'the model'} reads its parameters")

    def _touch(self, module: nn.Module, reason: str) -> None:
        for inside in module.modules():
            self.touched.setdefault(inside, reason)

    def _read_source(self, name: str, module: nn.Module, error: Exception) -> None:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        who = f"the forward of {name or 'the model'} ({type(module).__name__})"
        only_called = _only_called(module)
        for key, child in module._modules.items():
            if child is None:
                continue
            if key not in only_called:
                self._touch(child, f"{who}, which cannot be traced, may use it ({said})")
                continue
            for called in _elements(child):
                self.touched.setdefault(called, f"{who}, which calls it, cannot be traced ({said})")


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Return the module, or those in it if it is a container."""
    if isinstance(module, _CONTAINERS):
        for child in module.children():
            yield from _elements(child)
    else:
        yield module


# --- tracing --------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Sees each child as one call, and buffers as proxies, so that none is written to."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _without_tensors(model: nn.Module) -> nn.Module:
    """Return a copy that shares parameters and buffers, for forwards that change their module."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))


def _trace(module: nn.Module) -> fx.Graph:
    if "forward" in vars(module):
        raise TypeError("its forward is set on the object")
    with torch.random.fork_rng(devices=()):
        return _Tracer().trace(module)


# --- reading the source ---------------------------------------------------------------------------


def _only_called(module: nn.Module) -> set[str]:
    """Return the names of the children that a forward, by its source, does nothing with but calls.

    Children in a container count as called if its elements are.
    """
    cls = type(module)
    if cls.forward is nn.Sequential.forward:
        return set(module._modules)
    try:
        functions = _functions(cls)
    except (OSError, TypeError, SyntaxError):
        return set()
    found = set(module._modules)
    for function in functions:
        used = _used(module, function)
        if used is None:
            return set()
        found -= used
    return found


def _functions(cls: type) -> list[ast.FunctionDef]:
    """Return the forward of a class and the methods that it uses, as syntax trees."""
    found: dict[types.FunctionType, ast.FunctionDef] = {}
    names = ["forward"]
    seen = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            value: Any = vars(base).get(name)
            if base in (nn.Module, object) or value is None:
                continue
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            value = inspect.unwrap(value)
            if not isinstance(value, types.FunctionType):
                continue
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
            if not isinstance(tree, ast.FunctionDef):
                raise TypeError(f"{name} is not a method")
            found[value] = tree
            names += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return list(found.values())


def _used(module: nn.Module, function: ast.FunctionDef) -> set[str] | None:
    """Return the names of children that a method uses otherwise than by a call; None for all."""
    if not function.args.args:
        return None
    own = function.args.args[0].arg
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    used = set()
    for node in ast.walk(function):
        if not (isinstance(node, ast.Name) and node.id == own):
            continue
        read = _attribute(node, parents)
        if read is None:
            return None  # the module itself is handed on
        name, value = read
        child = module._modules.get(name)
        if child is not None:
            if not (
                _is_called(value, parents, function, isinstance(child, _CONTAINERS))
                or _reads_a_setting(value, parents, child)
            ):
                used.add(name)
        elif (name in _OF_MODULE and name != "forward") or _holds_modules(vars(module).get(name)):
            return None
    return used


def _attribute(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> tuple[str, ast.expr] | None:
    """Return the name of the attribute of a variable that is read, and the expression's node."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr, parent
    if (
        isinstance(parent, ast.Call)
        and isinstance(parent.func, ast.Name)
        and parent.func.id in ("getattr", "hasattr")
        and parent.args[0] is node
        and isinstance(parent.args[1], ast.Constant)
    ):
        return str(parent.args[1].value), parent
    return None


def _reads_a_setting(node: ast.expr, parents: dict[ast.AST, ast.AST], child: nn.Module) -> bool:
    """Return whether an expression is an attribute of a child that is a number, a text or None."""
    parent = parents[node]
    if not isinstance(parent, ast.Attribute) or why_unknown(child) is None:
        return False
    settings = (bool, int, float, str, type(None))
    return type(vars(child).get(parent.attr, child)) in settings


def _is_called(
    node: ast.expr, parents: dict[ast.AST, ast.AST], function: ast.FunctionDef, container: bool
) -> bool:
    """Return whether an expression, or if it is a container its elements, are only called."""
    parent = parents[node]
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if not container:
        return isinstance(parent, ast.Call) and parent.func is node
    if isinstance(parent, ast.Subscript) and parent.value is node:
        sliced = isinstance(parent.slice, ast.Slice)
        return _is_called(parent, parents, function, sliced)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        called = parent.func.id
        if called == "len":
            return True
        if called not in ("enumerate", "zip", "reversed") or not hasattr(builtins, called):
            return False
        position = parent.args.index(node) if node in parent.args else None
        if position is None:
            return False
        loop = parents[parent]
        place = {"reversed": None, "enumerate": 1, "zip": position}[called]
        return _elements_called(parent, loop, place, parents, function)
    return _elements_called(node, parent, None, parents, function)


def _elements_called(
    iterated: ast.expr,
    loop: ast.AST,
    place: int | None,
    parents: dict[ast.AST, ast.AST],
    function: ast.FunctionDef,
) -> bool:
    """Return whether the elements that a loop runs over are only called."""
    if not isinstance(loop, (ast.For, ast.comprehension)) or loop.iter is not iterated:
        return False
    target: ast.expr = loop.target
    if place is not None:
        if not isinstance(target, ast.Tuple):
            return False
        target = target.elts[place]
    if not isinstance(target, ast.Name):
        return False
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == target.id]
    return all(
        isinstance(n.ctx, ast.Store) or _is_called(n, parents, function, False) for n in uses
    )


def _holds_modules(value: object) -> bool:
    """Return whether an attribute that is not a registered child holds modules."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_modules, value))
    return isinstance(value, nn.Module)
