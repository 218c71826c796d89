"""The nodes of a graph that is recorded, and the proxies that stand for their values."""

from __future__ import annotations

import cmath
import dis
import functools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.graph import inplace_methods, magic_methods
from torch.fx.proxy import Attribute, Scope

from . import assertions


class UntraceableError(Exception):
    """A forward that cannot be followed, for the reason in the text."""


def refuse(reason: str, remedy: str = "move that part into a layer of its own") -> NoReturn:
    """Raise UntraceableError for a reason, with what to change in forward."""
    raise UntraceableError(f"{reason}; {remedy}")


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


#: They draw random numbers, like whatever torch tags so, but are layers' own functions.
_DROPOUTS = words("""
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
    scaled_dot_product_attention
    """)


@functools.cache
def draws(name: str) -> bool:
    """Return whether the function or method of torch of this name draws random numbers."""
    packet = None if name in _DROPOUTS else getattr(torch.ops.aten, name, None)
    seeded = torch.Tag.nondeterministic_seeded
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return any(seeded in getattr(packet, overload).tags for overload in overloads)


def unpacked(values: Any, count: int) -> tuple[Any, ...]:
    """Return the items of ``a, b = values``, of which there must be so many."""
    items = tuple(values)
    if len(items) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(items) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(items)})")
    return items


class Standin:
    """The base of what stands for an object other than a tensor."""

    __slots__ = ()


_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul"


class Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as such (torch.fx: ``x + y``), and gives out no number."""

    def __getattribute__(self, name: str) -> Any:
        # Globals of another type than a dictionary are those of code that is followed.
        if name in _OWN and type(sys._getframe(1).f_globals) is not dict:
            return Proxy.__getattr__(self, name)
        return super().__getattribute__(name)

    def __hash__(self) -> int:
        refuse("it compares objects by identity")

    def __getattr__(self, name: str) -> Attribute:
        if draws(name):
            refuse(f"it calls {name}, which draws random numbers")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and self.node.op == "get_attr":
            refuse(f"it changes {self.node.target} in place")
        attribute = _Attribute(self, name)
        recorder: Any = self.tracer
        return recorder.or_none(attribute) if may_be_none(name) else attribute

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        steps = dis.get_instructions(frame.f_code)
        step = next((step for step in steps if step.offset == frame.f_lasti), None)
        if step is None or step.opname != "UNPACK_SEQUENCE":
            refuse("it iterates over a tensor")
        call: Any = self.tracer.create_proxy("call_function", unpacked, (self, step.argval), {})
        return iter([call[i] for i in range(step.argval)])

    def _number(self, *_: Any) -> NoReturn:
        refuse("it takes a number or text out of a tensor")

    __float__ = __int__ = __index__ = __complex__ = __len__ = _number
    __str__ = __repr__ = __array__ = _number

    def __format__(self, form: str) -> str:
        texts: assertions.Texts = self.tracer.texts  # type: ignore[attr-defined]
        return texts.add(self, form, sys._getframe(1))


class _Attribute(Attribute, Proxy):
    """An attribute of a proxy, or its method."""

    optional: int | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that reads the attribute."""
        node: fx.Node = super().node
        node.meta["optional"] = self.optional
        return node


#: The attributes that a proxy has itself, other than operators: forward means the value's.
_OWN = {*dir(_Attribute), "node", "tracer", "root", "attr", "_node"} - {
    f"__{name}__" for operators in (magic_methods, inplace_methods) for name in operators
}


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Return the proxies' method of an operator in place."""
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        if self.node.op == "get_attr":
            refuse(f"it changes {self.node.target} in place")
        result: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return result

    return method


for _name in _IN_PLACE.split():
    setattr(Proxy, f"__{_name}__", _in_place(_name))


def may_be_none(attribute: str) -> bool:
    """Return whether an attribute or method of a value may be None, or return it."""
    return not hasattr(Tensor, attribute) or attribute in ("grad", "grad_fn", "_base", "_grad")


#: A forward that asks for more values that are not known before the call is not followed.
_MAX_ANSWERS = 8


class Recorder(fx.proxy.TracerBase):
    """Makes the nodes of the graph.

    Args:
        answers: what values that are not known before the call are taken to be where forward
            decides by them, in their order; ``True`` is added for what is asked beyond. None: such
            forwards are refused.
        none: the number of the value that is None, of those that may be. A proxy is not None, and
            Python lets nothing notice that forward asks.

    Attributes:
        optional: how many values may be None: those that a layer, or an object that may be no
            tensor, returns, and arguments. The ``meta`` of their nodes has their numbers.
    """

    def __init__(self, answers: list[bool] | None = None, none: int | None = None) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0
        self.none, self.optional = none, 0
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self.node_name_to_scope: dict[str, tuple[str, type]] = {}
        self.texts = assertions.Texts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the proxy of a new node; None, if its value is taken to be None."""
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        optional = (
            kind in ("call_module", "placeholder")
            or target is operator.getitem
            or (kind == "call_method" and may_be_none(target))
        )
        return self.or_none(proxy) if optional else proxy

    def or_none(self, value: Any) -> Any:
        """Return a value that may be None, or None if it is taken to be."""
        number = self.optional
        self.optional += 1
        if type(value) is _Attribute:
            value.optional = number
        else:
            value.node.meta["optional"] = number
        return None if number == self.none else value

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; refuse what a graph cannot hold."""
        if isinstance(a, Tensor):
            refuse("it makes a tensor that depends on no input")
        if issubclass(type(a), Standin):
            refuse("it gives a layer or a function to a function")
        if isinstance(a, Enum):
            refuse("it gives a member of an Enum to a function or returns one", "give its value")
        if isinstance(a, complex) and not cmath.isfinite(a):
            refuse("it has a complex number that is not finite")
        return super().create_arg(a)

    def answer(self, reason: str) -> bool:
        """Return the next answer, or refuse for this reason if there is none."""
        if self.answers is None or self.asked == _MAX_ANSWERS:
            refuse(reason)
        self.asked += 1
        if self.asked > len(self.answers):
            self.answers.append(True)
        return self.answers[self.asked - 1]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer ``bool(proxy)``."""
        return self.answer("it decides by the value of a tensor")

    def iter(self, obj: fx.Proxy) -> NoReturn:
        """Refuse ``iter(proxy)``."""
        refuse("it iterates over a tensor")

    def keys(self, obj: fx.Proxy) -> Any:
        """Refuse ``**proxy``."""
        refuse("it iterates over a tensor")
