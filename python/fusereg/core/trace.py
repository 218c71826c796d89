"""Record what a module's forward does with tensors, and every other value that it reads.

``torch.fx.Tracer`` runs forward on the module itself and patches ``nn.Module`` meanwhile, for all
threads. Here nothing is patched and the module is not touched: forward, and each Python function
that it calls, is made again from its code with globals and closures of our own, and runs on
stand-ins. The stand-in of a module gives proxies for parameters and buffers, stand-ins for layers,
and plain values as they are; a module of Python gives its functions.

What forward reads is a tensor, which the graph holds, or a value that is recorded here as a
:class:`Read`. Everything else raises :class:`UntraceableError`: objects that may change unseen,
functions that are not known to depend on their arguments alone, random numbers, modes of torch.
The graph is therefore forward's as long as all reads give what they gave.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import operator
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, EnumMeta
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from . import assertions, dispatch, failures
from .modules import forward_of, submodule
from .proxies import (
    Proxy,
    Recorder,
    UntraceableError,
    draws,
    may_be_none,
    refuse,
    unpacked,
    words,
)
from .standins import (
    GO_THROUGH,
    NO_TENSORS,
    PLAIN,
    Class,
    Found,
    Function,
    Module,
    Namespace,
    OfNumbers,
    Python,
    Settings,
    Super,
    attribute_of,
    has_settings,
    is_plain,
)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """One value that forward reads.

    Attributes:
        owner: the path of a module from the traced one, or the object itself (the globals of a
            module of Python, the defaults of a function, a class, a function).
        name: of the attribute, or of the global; an argument's, where :data:`ARGUMENT` is the
            owner and forward asks whether it is a tensor.
        value: what was found. Functions, classes and modules of Python are the same if identical,
            plain values if they are of the same type and equal.
        method: whether the attribute is a method, and the value its function.
        within: the attributes that lead from the owner, a module, to the object that is read.
    """

    owner: Any
    name: str
    value: Any
    method: bool = False
    within: tuple[str, ...] = ()


#: The owner of a read that asks whether an argument of forward is a tensor.
ARGUMENT = "argument"


@dataclass(frozen=True)
class Trace:
    """The graph of a forward, and the values that it depends on.

    Attributes:
        otherwise: what it does where a value is None that it asks about, and that may be.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    otherwise: tuple[Trace, ...] = ()


# --- what is known --------------------------------------------------------------------------------

TORCH = os.path.dirname(torch.__file__) + os.sep
#: Its files with decorators that run what they decorate in a context.
CONTEXTS = ("utils/_contextlib.py", "amp/autocast_mode.py")


_BUILTINS = words("""
    abs all any bool dict enumerate float getattr hasattr int isinstance len list map max min range
    reversed round set slice sorted str sum super tuple zip
    """)
#: Of these, what the tracer has methods of the same name for.
_WITH_STANDINS = words("getattr hasattr isinstance super")
#: Of these, what makes a number of a tensor.
_TO_NUMBERS = words("abs float int len round")
_REFUSED = {
    "STORE_ATTR": "it sets an attribute",
    "DELETE_ATTR": "it deletes an attribute",
    "STORE_GLOBAL": "it sets a global",
    "DELETE_GLOBAL": "it deletes a global",
    "PUSH_EXC_INFO": "it has a with or try statement",
    "SETUP_FINALLY": "it has a with or try statement",
    "SETUP_WITH": "it has a with or try statement",
    **dict.fromkeys(
        ("MATCH_CLASS", "MATCH_KEYS", "MATCH_MAPPING", "MATCH_SEQUENCE"),
        "it matches the type of a value",
    ),
}


@functools.cache
def _is_enumeration(cls: type) -> bool:
    """Return whether a class is an Enum of plain values, with nothing else of its own."""
    if not issubclass(cls, Enum) or type(cls) is not EnumMeta:
        return False
    written = [c for c in cls.__mro__ if c.__module__ not in ("enum", "builtins")]
    own = [(n, v) for c in written for n, v in vars(c).items() if n not in cls.__members__]
    return all(is_plain(member.value) for member in cls) and all(
        n[0] == n[-1] == "_" and getattr(v, "__module__", "") in ("enum", "builtins", None, "")
        if isinstance(v, types.FunctionType)
        else n[0] == "_"
        for n, v in own
    )


@functools.cache
def _known() -> dict[int, Any]:
    """Return, by id, torch's functions of tensors: those that a subclass of Tensor can override.

    The others make tensors, draw random numbers, or ask for modes.
    """
    known = torch.overrides.get_overridable_functions()
    spaces = (torch, torch.functional, F, torch.linalg, torch.fft, torch.special)
    functions = [f for space in spaces for f in known[space]]
    functions += [f for f in vars(F).values() if getattr(f, "__module__", "") == F.__name__]
    names = {getattr(f, "__name__", "") for f in functions}
    functions += [getattr(torch, f"{name}_") for name in names if hasattr(torch, f"{name}_")]
    return {
        id(f): f
        for f in functions
        if not isinstance(f, type)
        and not getattr(f, "__name__", "_").startswith(("_", "is_", "get_", "set_", "has_"))
        and not draws(getattr(f, "__name__", ""))
    }


_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]
_NUMBERS = {
    id(f)
    for m in (math, operator)
    for n, f in vars(m).items()
    if callable(f) and n[0] != "_" and n not in ("is_", "is_not")
}


def _asks_torch(value: Any) -> bool:
    """Return whether a function of torch answers a question and does nothing else."""
    name = getattr(value, "__name__", "")
    of_torch = str(getattr(value, "__module__", "")).split(".")[0] == "torch"
    return of_torch and callable(value) and name.startswith(("is_", "are_"))


def _said(value: object) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return str(name) if name and callable(value) else f"a {type(value).__name__}"


@functools.cache
def _check_code(code: types.CodeType) -> None:
    """Raise UntraceableError if running the code could do more than its values can tell."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _REFUSED:
            refuse(_REFUSED[name])
        if name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            refuse("it compares objects by identity")
        before = instruction
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _check_code(constant)


def _const(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@functools.cache
def _asks_for_none(code: types.CodeType) -> bool:
    """Return whether a function asks whether something is None, other than an attribute of self."""
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        asks = step.opname == "IS_OP" or step.opname.endswith(("IF_NONE", "IF_NOT_NONE"))
        if asks and step.opname == "IS_OP":
            i -= 1  # LOAD_CONST None
        owner, attribute = (s.opname for s in steps[i - 2 : i]) if i > 1 else ("", "")
        of_self = steps[i - 2].argval == (*code.co_varnames, None)[0]
        if asks and not (owner.startswith("LOAD_FAST") and attribute == "LOAD_ATTR" and of_self):
            return True
    return any(_asks_for_none(c) for c in code.co_consts if isinstance(c, types.CodeType))


# --- the tracer -----------------------------------------------------------------------------------


class _Tracer:
    """Follows one forward."""

    def __init__(
        self,
        module: nn.Module,
        leaf: Callable[[nn.Module], bool],
        mode: bool,
        tensors: bool,
        answers: list[bool] | None,
        none: int | None = None,
    ) -> None:
        self.recorder = Recorder(answers, none)
        self.asks_for_none = False
        self.leaf, self.mode, self.tensors = leaf, mode, tensors
        self.reads: dict[tuple[Any, tuple[str, ...], str], Read] = {}
        self.root = module
        self.modules: dict[Path, Module] = {}
        self.namespaces: dict[int, Namespace] = {}

    def follow(self, forward: types.FunctionType) -> fx.Graph:
        """Return the graph of the forward."""
        recorder = self.recorder
        count = _count_tensors(forward)
        try:
            made = self.function(forward)
            proxies = [
                recorder.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(count)
            ]
            result = made(self.module(self.root, ()), *proxies)
            recorder.create_node("output", "output", (recorder.create_arg(result),), {})
            if recorder.texts.open:
                refuse("it takes a number or text out of a tensor")
        except UntraceableError:
            raise
        except Exception as error:
            # Forward's own, for it was written for tensors; or one of this package.
            raise UntraceableError(f"it cannot be followed: {failures.logged(error)}") from error
        return recorder.graph

    def read(
        self,
        owner: Any,
        name: str,
        value: Any,
        method: bool = False,
        within: tuple[str, ...] = (),
    ) -> None:
        """Record what was read."""
        key = (owner if isinstance(owner, tuple) else id(owner), within, name)
        self.reads.setdefault(key, Read(owner, name, value, method, within))

    def settings(self, value: Any, path: Path, within: tuple[str, ...]) -> Settings:
        """Return what stands for an object of which only attributes are read, and recorded."""
        self.read(path, "__class__", type(value), within=within)
        return Settings(self, (value, path, within))

    def module(self, module: nn.Module, path: Path) -> Module:
        """Return the stand-in of a module."""
        if path not in self.modules:
            self.modules[path] = Module(self, (module, path))
        return self.modules[path]

    def admit(self, value: Any, said: str) -> Any:
        """Return what stands for a value that was read and recorded."""
        if is_plain(value) or _is_enumeration(value if isinstance(value, type) else type(value)):
            return value
        if isinstance(value, types.ModuleType):
            return Python(self, value)
        known = _known().get(id(value))
        if known is not None:
            return self.recorded(known)
        if value is _is_scripting:
            return Function(self, _const(False))  # a script is compiled from the original forward
        if id(value) in _NUMBERS:
            return self.of_numbers(value)
        if isinstance(value, type) and issubclass(value, nn.Module | Tensor):
            return Class(self, value)
        if value is torch._assert:
            return self.asserted
        if isinstance(value, types.FunctionType) and not _of_torch(value):
            return Function(self, self.function(value))
        if self.recorder.answers is not None and _asks_torch(value):
            return self.recorded(value)
        if callable(value):
            refuse(f"it uses {said}, which may depend on more than its arguments")
        kind = _said(value)
        mutable = type(value) in (list, dict, set)
        remedy = "make it a tuple, or several attributes" if mutable else "make it a plain value"
        return refuse(f"it reads {said}, {kind}, which may change unseen", remedy)

    def recorded(self, function: Callable[..., Any]) -> Function:
        """Return a function that records calls of torch's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.recorder.create_proxy("call_function", function, args, kwargs)

        return Function(self, call)

    def global_(self, space: dict[str, Any], name: str, *, builtin: bool) -> Any:
        """Return what stands for a global, or for a builtin of that name."""
        value = space.get(name, Found.NOTHING)
        self.read(space, name, value)
        if value is not Found.NOTHING:
            return self.admit(value, name)
        if name in _WITH_STANDINS and builtin:
            return getattr(self, name)
        if name not in _BUILTINS or not builtin:
            refuse(f"it uses {name}, which may depend on more than its arguments")
        function = getattr(builtins, name)
        return self.of_numbers(function) if name in _TO_NUMBERS else function

    def of_numbers(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of numbers, which may be a tensor's if they need not be known."""
        return function if self.recorder.answers is None else OfNumbers(self, function)

    def super(self, *args: Any) -> Super:
        """Stand for the builtin ``super``."""
        if not args:
            frame = sys._getframe(1)
            first = frame.f_code.co_varnames[:1]
            args = tuple(frame.f_locals.get(name) for name in ("__class__", *first))
        cls, module = args
        if type(cls) is not Class or type(module) is not Module:
            refuse("it uses super in a way that is not supported")
        return Super(self, (module, attribute_of(cls, "_of")))

    def hasattr(self, value: Any, name: str) -> bool:
        """Stand for the builtin ``hasattr``: whether a tensor has an attribute is not known."""
        if issubclass(type(value), Proxy):  # not isinstance, which would ask a stand-in
            return self.recorder.answer("it asks whether a value has an attribute")
        return hasattr(value, name)

    def getattr(self, value: Any, name: str, *default: Any) -> Any:
        """Stand for the builtin ``getattr``."""
        if not issubclass(type(value), Proxy):
            return getattr(value, name, *default)
        if default and not self.hasattr(value, name):
            return default[0]
        return Proxy.__getattr__(value, name)  # not by getattr, from code that is not followed

    def isinstance(self, value: Any, kinds: Any) -> bool:
        """Stand for the builtin ``isinstance``, where the answer is known or can be checked."""
        of: list[Any] = [
            attribute_of(kind, "_of") if type(kind) in (Class, OfNumbers) else kind
            for kind in (kinds if type(kinds) is tuple else (kinds,))
        ]
        if type(value) is Module and all(type(kind) is type for kind in of):
            module, path = attribute_of(value, "_of")
            self.read(path, "__class__", type(module))
            return isinstance(module, tuple(of))
        if all(kind is Tensor or kind in NO_TENSORS for kind in of):
            if not isinstance(value, fx.Proxy) and type(value) in (*PLAIN, *NO_TENSORS):
                return isinstance(value, tuple(of))
            if isinstance(value, Proxy) and value.node.op == "get_attr":
                return Tensor in of
            if isinstance(value, Proxy) and value.node.op == "placeholder":
                self.read(ARGUMENT, value.node.name, Found.TENSOR)
                if self.tensors or of == [Tensor]:
                    return self.tensors and Tensor in of
        reason = "it asks for the type of a value, which is not known before the call"
        return self.recorder.answer(reason) if isinstance(value, Proxy) else refuse(reason)

    def asserted(self, condition: Any, message: Any = "") -> None:
        """Stand for ``torch._assert``: it becomes part of the graph."""
        made = self.recorder.texts.template(message, sys._getframe(1))
        if made is None:
            refuse("it takes a number or text out of a tensor")
        if isinstance(condition, fx.Proxy):
            call = self.recorder.create_proxy
            call("call_function", assertions.asserted, (condition, *made), {})
        elif condition is not True:
            refuse("what it asserts does not hold")

    def attribute(self, standin: Module, name: str) -> Any:
        """Return what stands for an attribute of a module."""
        module, path = attribute_of(standin, "_of")
        cls: Any = type(module)
        said = ".".join(("self", *path, name))
        if (
            cls.__getattribute__ is not object.__getattribute__
            or cls.__getattr__ is not nn.Module.__getattr__
        ):
            refuse(f"{cls.__name__} has its own way of reading attributes")
        own = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), Found.NOTHING)
        if hasattr(type(own), "__set__"):
            refuse(f"it reads {said}, a property", "set an attribute in __init__")
        value = vars(module).get(name, own)
        if name == "training":
            if path and self.leaf(module):
                refuse(f"it reads {said}, the mode of another layer")
            value = value if path else self.mode
        if value is own and isinstance(own, types.FunctionType) and own in GO_THROUGH:
            self.read(path, name, own, method=True)
            return Function(self, functools.partial(GO_THROUGH[own], standin))
        if value is own and own is not Found.NOTHING and not is_plain(own):
            if path and self.leaf(module):
                refuse(f"it uses {said}, of another layer")
            return self.method(standin, path, name, own)
        for held in (module._parameters, module._buffers, module._modules):
            if value is Found.NOTHING and name in held:
                value = held[name]
                if isinstance(value, nn.Module):
                    self.read(path, name, Found.MODULE)
                    return self.module(value, (*path, name))
                if value is not None:
                    self.read(path, name, Found.TENSOR)
                    target = ".".join((*path, name))
                    return self.recorder.create_proxy("get_attr", target, (), {})
        if has_settings(value):
            return self.settings(value, path, (name,))
        self.read(path, name, value)
        if value is Found.NOTHING:
            raise AttributeError(f"{cls.__name__} has no attribute {name}")
        return self.admit(value, said)

    def method(self, standin: Module, owner: Any, name: str, value: Any) -> Any:
        """Return what stands for a function of a class, bound to a module."""
        static = isinstance(value, staticmethod)
        function = value.__func__ if static else value
        if not isinstance(function, types.FunctionType):
            refuse(f"it reads {name}, {_said(value)}, which may change unseen")
        if _of_torch(function) and function is not nn.Sequential.forward:
            refuse(f"it calls {name} of {function.__qualname__.split('.')[0]}, which is torch's")
        self.read(owner, name, function, method=isinstance(owner, tuple) and not static)
        made = self.function(function)
        return Function(self, made if static else functools.partial(made, standin))

    def function(self, function: types.FunctionType) -> Callable[..., Any]:
        """Return the function made again, such that it sees stand-ins alone."""
        code = function.__code__
        _check_code(code)
        self.asks_for_none |= _asks_for_none(code)
        if not _of_torch(function):
            for name in ("__code__", "__defaults__", "__kwdefaults__"):
                self.read(function, name, getattr(function, name))
        cells = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                refuse(f"it reads {name} of the function around it", "make it an attribute")
            cells.append(types.CellType(Class(self, cell.cell_contents)))
        space = function.__globals__
        if id(space) not in self.namespaces:
            self.namespaces[id(space)] = Namespace(self, space)
        defaults = tuple(self.admit(v, "a default") for v in function.__defaults__ or ())
        made = types.FunctionType(
            code, self.namespaces[id(space)], function.__name__, defaults, tuple(cells)
        )
        keywords = function.__kwdefaults__ or {}
        for name, value in keywords.items():
            self.read(keywords, name, value)
        made.__kwdefaults__ = {k: self.admit(v, k) for k, v in keywords.items()}
        return made

    def call(self, standin: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer: as one node, or by following its forward if it is no leaf."""
        module, path = attribute_of(standin, "_of")
        if not path:
            refuse("it calls itself")
        forward = forward_of(module)
        if forward is nn.Module.forward:
            refuse(f"it calls {'.'.join(path)}, a {type(module).__name__}", "call the layers in it")
        before, texts = list(self.recorder.graph.nodes), self.recorder.texts.open.copy()
        if not self.leaf(module) and not dispatch.hooked(module):
            try:
                return self.method(standin, path, "forward", forward)(*args, **kwargs)
            except UntraceableError:
                for node in reversed(list(self.recorder.graph.nodes)[len(before) :]):
                    self.recorder.graph.erase_node(node)
                self.recorder.texts.open = texts
        return self.recorder.create_proxy("call_module", ".".join(path), args, kwargs)


def _of_torch(function: types.FunctionType) -> bool:
    return function.__code__.co_filename.startswith(TORCH)


def _count_tensors(forward: types.FunctionType) -> int:
    """Return how many tensors forward requires; other arguments keep their defaults."""
    code = forward.__code__
    count = code.co_argcount - len(forward.__defaults__ or ())
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    if count < 2 or not set(keywords) <= set(forward.__kwdefaults__ or ()):
        refuse("it does not take a fixed number of tensors", "name them as arguments")
    return count - 1


def trace(
    module: nn.Module,
    *,
    forward: Any = None,
    leaf: Callable[[nn.Module], bool] = lambda module: True,
    training: bool | None = None,
    tensors: bool = True,
    answers: list[bool] | None = None,
) -> Trace:
    """Return the graph of a module's forward, and the values that it depends on.

    Nothing is run on tensors, and nothing is changed, neither the module nor torch: other threads
    may run the same module and trace others meanwhile.

    Args:
        module: the module. It is not called, so hooks play no part.
        forward: its function, if not that of its class.
        leaf: whether a layer is one node. A layer that cannot be followed is one node, too.
        training: the mode to assume, if not the module's own.
        tensors: whether the arguments are tensors. A forward that asks has reads of
            :data:`ARGUMENT`.
        answers: what forward is told where it decides by values that are not known before the
            call, see :class:`Recorder`; None: it cannot be followed then.

    Raises:
        UntraceableError: forward cannot be followed, for the reason in the text.
    """
    forward = type(module).forward if forward is None else forward
    if not isinstance(forward, types.FunctionType):
        refuse("its forward is not a function", "write it as a method")
    if hasattr(forward, "__wrapped__"):
        refuse("its forward is decorated", "decorate a method that is not fused")
    mode = module.training if training is None else training
    tracer = _Tracer(module, leaf, mode, tensors, answers)
    graph = tracer.follow(forward)
    otherwise = []
    for number in _may_be_none(tracer) if tracer.asks_for_none else ():
        copied = None if answers is None else [*answers]
        other, found = _Tracer(module, leaf, mode, tensors, copied, number), None
        try:
            found = other.follow(forward)
        except UntraceableError as error:
            if error.__cause__ is not None:
                continue  # forward needs the value
        if found is None or _rows(found, number) != _rows(graph, number):
            if found is None or answers is None:
                refuse("it asks whether a value is None, which is not known before the call")
            otherwise.append(Trace(found, tuple(other.reads.values())))
    return Trace(graph, tuple(tracer.reads.values()), tuple(otherwise))


def _may_be_none(tracer: _Tracer) -> list[int]:
    """Return the numbers of the values that may be None."""
    asked = {read.name for read in tracer.reads.values() if read.owner is ARGUMENT}
    known: set[fx.Node] = set()  # that neither they nor what they hold is None
    for node in tracer.recorder.graph.nodes:
        held = bool(node.args) and node.args[0] in known
        if node.op == "placeholder":
            is_known = tracer.tensors or node.name not in asked
        elif node.op == "call_module":
            is_known = _gives_tensors(submodule(tracer.root, str(node.target)), held)
        elif node.target in (operator.getitem, unpacked):
            is_known = held
        elif node.op == "call_method" or node.target is getattr:
            name = node.target if node.op == "call_method" else node.args[1]
            is_known = held and not may_be_none(str(name))
        else:
            is_known = node.target is not F.multi_head_attention_forward
        if is_known:
            known.add(node)
    numbers = {node.meta.get("optional") for node in known}
    return [number for number in range(tracer.recorder.optional) if number not in numbers]


def _gives_tensors(layer: nn.Module | None, of_tensors: bool) -> bool:
    """Return whether a layer's result is a tensor, or holds tensors alone."""
    while isinstance(layer, nn.Sequential) and layer._modules:
        *before, last = layer._modules.values()
        identities = [type(m) is nn.Identity for m in (*before, last)]
        if identities[-1] and not all(identities):
            last = next(m for m in reversed(before) if type(m) is not nn.Identity)
        layer = last
    if type(layer) is nn.Identity:
        return of_tensors
    of_torch = type(layer).__module__.startswith(("torch.nn.", "fusereg."))
    return of_torch and not isinstance(layer, nn.MultiheadAttention | nn.Sequential)


def _rows(graph: fx.Graph, none: int) -> list[Any]:
    """Return what a graph computes, in a form that can be compared, where one value is None."""
    rows: list[Any] = []
    numbers: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        numbers[node] = None if node.meta.get("optional") == none else ("node", len(rows))
        if numbers[node] is not None:
            given = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
            rows.append((node.op, node.target, given))
    return rows
