"""Calls of a model's layers by its forwards, and what else the forwards do with them.

Each module's forward is traced by itself, with its children as single calls. Of a forward that
cannot be traced, the source is read: what it does with a child other than calling it is unknown, so
everything inside such a child counts as touched.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import itertools
import logging
import textwrap
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from ..core import failures
from ..core.modules import forward_of, submodule
from ..core.proxies import UntraceableError
from ..core.standins import STRUCTURE, Found, is_plain
from ..core.trace import ARGUMENT, CONTEXTS, TORCH, Trace, trace
from .known import is_timm_act, original_class, why_unknown

_ITERABLE = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OF_MODULE = frozenset(name for cls in (nn.Module, *_ITERABLE) for name in dir(cls())) - {
    "training"
}
#: Methods that give children, and where in a pair each stands.
_ITERATORS = {"children": None, "named_children": 1, "values": None, "items": 1}
#: An attribute that gives access to more objects is taken to give access to modules.
_MANY = 2000
#: Forwards with more arguments are not traced with and without each of them.
_MAX_ARGUMENTS = 4
#: Forwards that may go more ways, by the values of tensors, are not traced.
_MAX_WAYS = 64
#: What a forward raises that was not given an argument that it needs.
_NEEDS_ARGUMENT = (AttributeError, TypeError)

#: Module -> the nodes of a graph that call it.
Nodes: TypeAlias = dict[nn.Module, list[fx.Node]]


class Calls:
    """The calls of a model's modules, by the object that is called.

    Attributes:
        graphs: module -> the calls of its forward, for each set of arguments that it may get.
        callers: module -> the modules among ``graphs`` that call it.
        touched: module -> why something may use it that is not among ``graphs``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graphs: dict[nn.Module, list[Nodes]] = {}
        self.callers: dict[nn.Module, set[nn.Module]] = {}
        self.touched: dict[nn.Module, str] = {}
        names = {module: name for name, module in model.named_modules()}
        held = Counter(m for parent in names for m in parent._modules.values() if m is not None)

        self._repeated: set[nn.Module] = set()

        def leaf(module: nn.Module) -> bool:
            # A sequence that is used in one place is part of what calls it.
            sequence = forward_of(module) is nn.Sequential.forward and _is_usual(module)
            return not sequence or held[module] != 1 or module in self._repeated

        waiting, seen = [model], {model}
        while waiting:
            module = waiting.pop()
            if not module._modules or is_timm_act(module):
                continue
            who = f"{names[module] or 'the model'} ({type(module).__name__})"
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(map(_may_read_its_module, hooks)):
                for inside in module.modules():
                    self.touched.setdefault(inside, f"a hook of {who} may use it")
            who = f"the forward of {who}"
            try:
                called = self._follow(module, who, leaf)
            except Exception as error:
                known = isinstance(error, UntraceableError)
                reason = str(error) if known else failures.reason(error)
                called = self._read_source(module, f"{who}, which cannot be traced ({reason})")
            waiting += dict.fromkeys(m for m in called if m not in seen)
            seen.update(called)

    def count(self, layer: nn.Module) -> int:
        """Return how often a layer is called, at most, by forwards that could be traced."""
        return sum(
            max(len(nodes.get(layer, ())) for nodes in self.graphs[caller])
            for caller in self.callers.get(layer, ())
        )

    def _follow(
        self, module: nn.Module, who: str, leaf: Callable[[nn.Module], bool]
    ) -> list[nn.Module]:
        """Add the calls of a forward, and return the modules that it calls."""
        graphs: list[Nodes] = []
        found = list(_traces(module, leaf))
        while more := _repeated(module, found) - self._repeated:
            self._repeated |= more
            found = list(_traces(module, leaf))
        for traced in found:
            nodes: Nodes = {}
            for node in traced.graph.nodes:
                if node.op == "call_module":
                    called = submodule(module, str(node.target))
                    nodes.setdefault(called, []).append(node)
                elif node.op == "get_attr" and "." in str(node.target):
                    owner = submodule(module, str(node.target).rpartition(".")[0])
                    self.touched.setdefault(owner, f"{who} reads its parameters")
            graphs.append(nodes)
            for read in traced.reads:
                of_module = read.value is Found.MODULE or read.name in STRUCTURE
                if isinstance(read.owner, tuple) and read.owner and not of_module:
                    owner = submodule(module, ".".join(read.owner))
                    if not _is_setting(owner, read.name, read.value):
                        self.touched.setdefault(owner, f"{who} reads its {read.name}")
        self.graphs[module] = graphs
        called_here = [called for nodes in graphs for called in nodes]
        for called in called_here:
            self.callers.setdefault(called, set()).add(module)
        return called_here

    def _read_source(self, module: nn.Module, who: str) -> list[nn.Module]:
        """Add what the source of a forward may do, and return the modules that it may call."""
        children = {key: m for key, m in module._modules.items() if m is not None}
        try:
            only_called = _only_called(module)
            elements = {key: list(_elements(child)) for key, child in children.items()}
        except Exception as error:
            only_called, elements = set(), {}
            who = f"{who}, and whose source cannot be read ({failures.reason(error)})"
        for key, child in children.items():
            if key not in only_called:
                for inside in child.modules():
                    self.touched.setdefault(inside, f"{who}, may use it")
                continue
            for called in elements[key]:
                self.touched.setdefault(called, f"it is called by {who}")
        return [called for found in elements.values() for called in found]


def _repeated(module: nn.Module, found: list[Trace]) -> set[nn.Module]:
    """Return the sequences of which a layer is called more than once by a forward."""
    paths = (
        path
        for traced in found
        for path, n in Counter(
            str(node.target) for node in traced.graph.nodes if node.op == "call_module"
        ).items()
        if n > 1
    )
    around = {path[:i] for path in paths for i, c in enumerate(path) if c == "."}
    inside = (submodule(module, path) for path in around)
    return {part for part in inside if forward_of(part) is nn.Sequential.forward}


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Return the module, or those in it if it is a list of modules, which is never called."""
    if _is_list(module):
        for child in module.children():
            yield from _elements(child)
    else:
        yield module


def _is_list(module: nn.Module) -> bool:
    return forward_of(module) is nn.Module.forward


# --- tracing --------------------------------------------------------------------------------------


def _traces(module: nn.Module, leaf: Callable[[nn.Module], bool]) -> Iterator[Trace]:
    """Return a forward's traces with all its arguments, and with None for each but the first.

    Raises:
        UntraceableError: one of them cannot be traced, for the reason in the text.
    """
    if isinstance(module, fx.GraphModule):
        yield Trace(module.graph, ())
        return
    if not _is_usual(module):
        raise UntraceableError("it has its own way of being called")
    forward: Any = _inside(module, original_class(module).forward)
    if not isinstance(forward, types.FunctionType):
        raise UntraceableError("it is not a function")
    code = forward.__code__
    if code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        raise UntraceableError("it takes any number of arguments")
    count = code.co_argcount
    names = code.co_varnames[1:count]
    keywords = code.co_varnames[count : count + code.co_kwonlyargcount]
    if not names or len(names) + len(keywords) > _MAX_ARGUMENTS:
        raise UntraceableError(f"it does not take 1 to {_MAX_ARGUMENTS} arguments")
    others = (*names[1:], *keywords)
    if not others:
        yield from _of_types(module, forward, leaf)
        return
    for given in itertools.product((True, False), repeat=len(others)):
        kept = {name for name, is_given in zip(others, given, strict=True) if is_given}
        passed = [f"{k}={k if k in kept else None}" for k in keywords]
        passed = [n if n in (names[0], *kept) else "None" for n in names] + passed
        parameters = ", ".join(n for n in (*names, *keywords) if n in (names[0], *kept))
        source = f"lambda self, {parameters}: __written(self, {', '.join(passed)})"
        try:
            errors = () if all(given) else _NEEDS_ARGUMENT
            yield from _of_types(module, eval(source, {"__written": forward}), leaf, errors)
        except UntraceableError as error:
            # That it raises an error without this argument means that it needs the argument.
            if all(given) or not isinstance(error.__cause__, _NEEDS_ARGUMENT):
                raise


def _of_types(
    module: nn.Module,
    forward: Any,
    leaf: Callable[[nn.Module], bool],
    errors: tuple[type[Exception], ...] = (),
) -> Iterator[Trace]:
    """Return the traces with tensors and, if the forward asks for one's type, without."""
    found = list(_ways(module, errors, forward=forward, leaf=leaf))
    yield from found
    asked = {r.name for traced in found for r in traced.reads if r.owner is ARGUMENT}
    if len(asked) > 1:
        raise UntraceableError("it asks for the types of several arguments")
    if asked:
        yield from _ways(module, errors, forward=forward, leaf=leaf, tensors=False)


def _ways(
    module: nn.Module, errors: tuple[type[Exception], ...], **options: Any
) -> Iterator[Trace]:
    """Return a forward's traces, one for each way that the values of tensors may lead it.

    Ways that end in a failed assertion, or in one of the errors, are left out.
    """
    answers: list[bool] = []
    found, raised = False, None
    for _ in range(_MAX_WAYS):
        try:
            traced = trace(module, answers=answers, **options)
            yield traced
            yield from traced.otherwise
            found = True
        except UntraceableError as error:
            ends = (*errors, AssertionError) if answers else errors
            if not isinstance(error.__cause__, ends):
                raise
            raised = error
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            break
        answers[-1] = False
    else:
        raise UntraceableError("it decides by the values of many tensors")
    if raised is not None and not found:
        raise raised


def _is_usual(module: nn.Module) -> bool:
    """Return whether calling a module calls the forward of its class, and reads are nn.Module's."""
    cls = type(module)
    return (
        "forward" not in vars(module)
        and cls.__call__ is nn.Module.__call__
        and cls.__getattr__ is nn.Module.__getattr__
        and cls.__getattribute__ is nn.Module.__getattribute__
    )


# --- decorators -----------------------------------------------------------------------------------


def _inside(module: nn.Module, function: Any) -> Any:
    """Return the function inside of its decorators.

    Raises:
        UntraceableError: a decorator may use layers of the module itself.
    """
    while hasattr(function, "__wrapped__"):
        if not _hands_on(module, function):
            raise UntraceableError("a decorator of it may use its layers")
        function = function.__wrapped__
    return function


def _hands_on(module: nn.Module, wrapper: Any) -> bool:
    """Return whether a decorator's function gives the module to what it decorates, and no other."""
    if not isinstance(wrapper, types.FunctionType) or _holds_modules(wrapper):
        return False
    code, inside = wrapper.__code__, wrapper.__wrapped__  # type: ignore[attr-defined]
    if code.co_filename.removeprefix(TORCH) in CONTEXTS:
        return True
    cells = zip(code.co_freevars, wrapper.__closure__ or (), strict=True)
    names = {name for name, cell in cells if cell.cell_contents is inside}
    tree = _tree(code)
    if tree is None or any(_holds_modules(wrapper.__globals__.get(name)) for name in code.co_names):
        return False
    # The module is the first argument, or else the first of *args.
    args = [*tree.args.posonlyargs, *tree.args.args]
    own = args[0].arg if args else getattr(tree.args.vararg, "arg", None)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == own]
    return all(_is_handed_on(module, node, parents, names) for node in uses)


def _is_handed_on(
    module: nn.Module, node: ast.AST, parents: dict[ast.AST, ast.AST], names: set[str]
) -> bool:
    """Return whether the module goes into a call of these functions, or a setting of it is read."""
    parent = parents[node]
    if isinstance(parent, ast.Starred):
        parent, node = parents[parent], parent
    if isinstance(parent, ast.Call) and node in parent.args and isinstance(parent.func, ast.Name):
        called = parent.func.id, *(a.id for a in parent.args[:1] if isinstance(a, ast.Name))
        return (
            called[0] in names or called[0] == "type" or called in {("partial", n) for n in names}
        )
    if not isinstance(parent, ast.Attribute) or not isinstance(parent.ctx, ast.Load):
        return False
    name = parent.attr
    own = inspect.getattr_static(type(module), name, None)
    if name in ("training", "__class__"):
        return True
    return not (
        name in module._modules
        or name in _OF_MODULE
        or hasattr(type(own), "__get__")
        or _holds_modules(vars(module).get(name, own))
    )


def _tree(code: types.CodeType) -> ast.FunctionDef | None:
    """Return the syntax tree of a function, if its source is that of one."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


# --- reading the source ---------------------------------------------------------------------------


def _only_called(module: nn.Module) -> set[str]:
    """Return the names of the children that a forward, by its source, does nothing with but calls.

    Children in a container count as called if its elements are.
    """
    cls = original_class(module)
    if not _is_usual(module):
        return set()
    if cls.forward is nn.Sequential.forward:
        return set(module._modules)
    found = set(module._modules)
    try:
        for function in _functions(module, cls):
            used = _used(module, function)
            if used is None:
                return set()
            found -= used
    except UntraceableError:
        return set()
    return found


def _functions(module: nn.Module, cls: type) -> list[ast.FunctionDef]:
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
            if base in (nn.Module, object, *_ITERABLE) or value is None:
                continue
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            value = _inside(module, value)
            if not isinstance(value, types.FunctionType):
                continue
            tree = _tree(value.__code__)
            if tree is None:  # or it is written in a way that is not understood
                raise UntraceableError("its source cannot be read")
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
        if _is_called(node, parents, function, True):
            continue
        if read is None:
            return None  # the module itself is handed on
        name, value = read
        child = module._modules.get(name)
        if child is not None:
            if not (
                _is_called(value, parents, function, _is_list(child))
                or _reads_a_setting(value, parents, child)
                or _asks_whether_it_is(value, parents, child)
            ):
                used.add(name)
        elif (name in _OF_MODULE and name != "forward") or _holds_modules(_other(module, name)):
            return None
    return used


def _other(module: nn.Module, name: str) -> Any:
    """Return an attribute that is no child: of the object, or of its class unless it is read."""
    own = inspect.getattr_static(type(module), name, None)
    read = isinstance(own, (types.FunctionType, property, staticmethod, classmethod))
    return vars(module).get(name, None if read else own)


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
    """Return whether an expression is an attribute of a child that folding does not change."""
    parent = parents[node]
    return isinstance(parent, ast.Attribute) and _is_setting(
        child, parent.attr, vars(child).get(parent.attr, child)
    )


def _asks_whether_it_is(node: ast.expr, parents: dict[ast.AST, ast.AST], child: nn.Module) -> bool:
    """Return whether an expression decides by the truth of a child, which is its presence."""
    parent = parents[node]
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        node, parent = parent, parents[parent]
    decides = isinstance(parent, (ast.If, ast.IfExp)) and parent.test is node
    return decides and not (hasattr(type(child), "__bool__") or hasattr(type(child), "__len__"))


def _is_setting(layer: nn.Module, name: str, value: Any) -> bool:
    """Return whether an attribute is a value that is the same after the layer has been folded."""
    return is_plain(value) and name not in layer._parameters and why_unknown(layer) is not None


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
    if isinstance(parent, ast.Attribute) and parent.attr in _ITERATORS:
        call, place = parents[parent], _ITERATORS[parent.attr]
        if not isinstance(call, ast.Call) or call.func is not parent:
            return False
        return _elements_called(call, parents[call], place, parents, function)
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


def _held_by(value: Any) -> list[Any]:
    """Return what an object that is no module gives access to."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, Set, deque)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    if isinstance(value, types.CellType):
        return [value.cell_contents]
    slots = [s for base in type(value).__mro__ for s in getattr(base, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, s, None) for s in slots)]


def _holds_modules(value: object) -> bool:
    """Return whether an attribute that is not a registered child gives access to modules."""
    waiting, seen = [value], {id(value)}
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            return True
        if is_plain(value) or isinstance(value, (Tensor, type, types.ModuleType, logging.Logger)):
            continue
        try:
            held = [v for v in _held_by(value) if id(v) not in seen]
        except Exception:  # of the object's own
            return True
        seen.update(map(id, held))
        waiting += held
        if len(seen) > _MANY:
            return True
    return False


def _may_read_its_module(hook: Any) -> bool:
    """Return whether a hook does something with the module that it is called for, or another."""
    function: Any = hook
    place = 0
    while isinstance(function, functools.partial):
        function, place = function.func, place + len(function.args)
    if isinstance(function, types.MethodType):
        function, place = function.__func__, place + 1
    if not isinstance(function, types.FunctionType):
        return True
    code = function.__code__
    if place >= code.co_argcount:  # it is among *args
        place = code.co_argcount + code.co_kwonlyargcount
    name = code.co_varnames[place] if place < len(code.co_varnames) else None
    read = {v for step in dis.get_instructions(code) for v in _names_in(step.argval)}
    return name is None or name in read or _holds_modules(hook)


def _names_in(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)
