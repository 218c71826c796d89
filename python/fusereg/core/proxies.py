"""The nodes of a graph that is recorded, and the proxies that stand for their values."""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
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

    def __getattr__(self, name: str) -> Attribute:
        if draws(name):
            refuse(f"it calls {name}, which draws random numbers")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and self.node.op == "get_attr":
            refuse(f"it changes {self.node.target} in place")
        return _Attribute(self, name)

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


#: A forward that asks for more values that are not known before the call is not followed.
_MAX_ANSWERS = 8


class Recorder(fx.proxy.TracerBase):
    """Makes the nodes of the graph.

    Args:
        answers: what values that are not known before the call are taken to be where forward
            decides by them, in their order; ``True`` is added for what is asked beyond. None: such
            forwards are refused.
    """

    def __init__(self, answers: list[bool] | None = None) -> None:
        super().__init__()
        self.answers, self.asked = answers, 0
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self.node_name_to_scope: dict[str, tuple[str, type]] = {}
        self.texts = assertions.Texts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; refuse what a graph cannot hold."""
        if isinstance(a, Tensor):
            refuse("it makes a tensor that depends on no input")
        if issubclass(type(a), Standin):
            refuse("it gives a layer to a function that is not a layer")
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
