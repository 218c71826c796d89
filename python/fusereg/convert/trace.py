"""Forwards that are rewritten with fused chains, and the check that they are still equivalent.

A forward is traced (:mod:`fusereg.core.trace`), and every value that it read is compared at each
call, by a function that is generated for it. If one of them has changed, the original forward runs.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.proxies import UntraceableError
from ..core.standins import DISTINCT, Found, is_plain
from ..core.trace import ARGUMENT, Path, Read, Trace, trace
from .find import Finder, rewrite
from .wrappers import inner_of

_NAME = "<forward rewritten by fusereg.convert>"


def _same(a: object, b: object) -> bool:
    """Return whether two plain values are equal, and of the same types."""
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b and str(a) == str(b)  # 0.0 is not -0.0


class _Check:
    """Writes the function that compares what forward reads."""

    def __init__(self, arguments: list[str], others: Collection[str]) -> None:
        self.names: dict[str, Any] = {"Tensor": Tensor, "NOTHING": Found.NOTHING, "same": _same}
        self.modules: dict[Path, str] = {(): "self"}
        self.dictionaries: dict[Path, str] = {}
        self.objects: dict[Path, str] = {}
        self.lines = [f"def fits(self, {', '.join(arguments)}):"]
        for name in arguments:
            self.require(f"isinstance({name}, Tensor) is {name not in others}")

    def require(self, *conditions: str) -> None:
        """Add conditions."""
        self.lines += [f"    if not ({c}): return False" for c in conditions]

    def name(self, value: Any) -> str:
        """Return the name of a constant."""
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def children(self, path: Path) -> str:
        """Return the name of the dictionary of a module's children."""
        if path not in self.dictionaries:
            name = self.dictionaries[path] = f"d{len(self.dictionaries)}"
            self.lines.append(f"    {name} = {self.module(path)}._modules")
        return self.dictionaries[path]

    def module(self, path: Path) -> str:
        """Return the name of a module on the way from the traced one."""
        if path not in self.modules:
            children = self.children(path[:-1])
            name = self.modules[path] = f"m{len(self.modules)}"
            self.lines.append(f"    {name} = {children}.get({path[-1]!r})")
            self.require(f"{name} is not None")
        return self.modules[path]

    def settings(self, read: Read) -> str:
        """Return the name of the object that is read, on the way from its module."""
        name = self.module(read.owner)
        for i, attribute in enumerate(read.within):
            way = (*read.owner, *read.within[: i + 1])
            if way not in self.objects:
                self.objects[way] = f"o{len(self.objects)}"
                self.lines.append(
                    f"    {self.objects[way]} = getattr({name}, {attribute!r}, NOTHING)"
                )
            name = self.objects[way]
        return name

    def read(self, read: Read) -> None:
        """Require that a read still gives what it gave."""
        value, name = read.value, read.name
        if read.owner is ARGUMENT:
            return  # required at the beginning
        if isinstance(read.owner, dict):
            space = self.name(read.owner)
            if value is Found.NOTHING:
                self.require(f"{name!r} not in {space}")
                return
            now = f"{space}.get({name!r}, NOTHING)"
        else:
            if value is Found.MODULE:
                if (*read.owner, name) not in self.modules:
                    self.require(f"{self.children(read.owner)}.get({name!r}) is not None")
                return
            if name == "_modules":
                held = self.children(read.owner)
                # Dynamo guards values, not names.
                self.require(f"len([*{held}.values()]) == {len(value)}")
                self.require(f"[*{held}] == {list(value)!r}")
                return
            if name == "_forward_hooks":
                self.require(f"not {self.module(read.owner)}._forward_hooks")
                return
            if name == DISTINCT:
                held = self.children(read.owner)
                self.require(f"None not in {held}.values()")
                self.require(f"len({{*map(id, {held}.values())}}) == {value}")
                return
            at_module = isinstance(read.owner, tuple)
            on = self.settings(read) if at_module else self.name(read.owner)
            now = f"{on}.{name}" if name == "training" else f"getattr({on}, {name!r}, NOTHING)"
            if at_module and name.startswith("__"):
                now = f"type({on})"
                if name != "__class__":
                    now = f"getattr({now}, {name!r}, NOTHING)"
            if read.method:
                # The second, because Dynamo does not guard the first.
                code = self.name(value.__code__)
                self.require(f"{name!r} not in {on}.__dict__ and {on}.{name}.__code__ is {code}")
                now = f"getattr(type({on}), {name!r}, NOTHING)"
        if value is Found.TENSOR:
            self.require(f"isinstance({now}, Tensor)")
        elif value is None or isinstance(value, bool):
            self.require(f"{now} is {value}")
        elif is_plain(value) and name != "__defaults__":
            self.require(f"same({now}, {self.name(value)})")
        else:
            self.require(f"{now} is {'NOTHING' if value is Found.NOTHING else self.name(value)}")


@dataclass(eq=False, repr=False)
class Plan:
    """A rewritten forward, and the condition under which it is equivalent to the original one.

    Attributes:
        chains: a description of each fused chain.
        lost: what keeps other layers from being chains.
        allowed: the targets of the layers that may be part of a chain.
        count: the number of tensors that forward takes.
        optional: the arguments that may follow, with the defaults that were traced.
        fits: whether the original forward would do what was traced.
        run: the rewritten forward.
    """

    chains: list[str]
    lost: list[str]
    allowed: frozenset[str]
    count: int
    optional: dict[str, Any]
    fits: Callable[..., bool]
    run: Callable[..., Any]

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether all arguments but the tensors are what was traced, their defaults."""
        if len(args) == self.count:
            given = kwargs
        elif kwargs or not 0 < len(args) - self.count <= len(self.optional):
            return False
        else:
            given = dict(zip(self.optional, args[self.count :], strict=False))
        return all(self.optional.get(k, Found.NOTHING) is v for k, v in given.items())

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # it refers to layers by their names

    def __reduce__(self) -> tuple[Any, ...]:
        # It is made again when unpickling: the code of the model may be another one by then.
        return Again, (self.allowed,)


@dataclass(frozen=True)
class Again:
    """Stands for a plan in a pickle."""

    allowed: frozenset[str] | None


def _restored(*_: Any) -> Again:
    """Take a plan from a pickle of fusereg 0.1."""
    return Again(None)


def _compiled(lines: str, names: dict[str, Any], name: str) -> Any:
    namespace = dict(names)
    try:
        exec(compile(lines, _NAME, "exec"), namespace)
    except SyntaxError as error:
        reason = "a name of a layer cannot be written in Python code; rename it"
        raise UntraceableError(reason) from error
    return namespace[name]


def make_plans(
    module: nn.Module, forward: Callable[..., Any], allowed: Callable[[str], bool]
) -> tuple[Plan, ...]:
    """Return a plan for a module, or several.

    One for each mode if it reads its mode, and one for an argument that is not a tensor if it asks
    for that.

    Plans without chains say what was lost.

    Args:
        module: the module, which is not changed.
        forward: its original forward.
        allowed: whether the layer of this name may be part of a chain.

    Raises:
        UntraceableError: the forward cannot be followed, for the reason in the text.
    """
    plans = []
    original = getattr(type(module), "fusereg_original", type(module))
    own = Read(original, "forward", forward)
    inner, _ = inner_of(forward)
    optional = _optional(inner)
    for training in (module.training, not module.training):
        traced = trace(module, forward=inner, training=training)
        plans.append(_make_plan(module, traced, own, allowed, optional))
        others = {read.name for read in traced.reads if read.owner is ARGUMENT}
        if others:
            with contextlib.suppress(UntraceableError):
                other = trace(module, forward=inner, training=training, tensors=False)
                plans.append(_make_plan(module, other, own, allowed, optional, others))
        if not any(read.owner == () and read.name == "training" for read in traced.reads):
            break
    return tuple(plans)


def _make_plan(
    module: nn.Module,
    traced: Trace,
    own: Read,
    allowed: Callable[[str], bool],
    optional: dict[str, Any],
    others: Collection[str] = (),
) -> Plan:
    """Return the plan of a trace; ``others`` are the arguments that are no tensors."""
    graph: Any = traced.graph
    arguments = [node.name for node in graph.nodes if node.op == "placeholder"]
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    finder = Finder(module, graph, allowed)
    chains = finder.chains()
    lost = list(finder.lost(chains))
    texts = [chain.text() for chain in chains]
    for chain in chains:
        rewrite(graph, chain)
    check = _Check(arguments, others)
    # The mode first, because it decides between two plans.
    for read in sorted([own, *traced.reads, *finder.assumed], key=lambda r: r.name != "training"):
        check.read(read)
    fits = "\n".join([*check.lines, "    return True"])
    code = graph.python_code("self")
    return Plan(
        texts,
        lost,
        frozenset(filter(allowed, targets)),
        len(arguments),
        optional,
        _compiled(fits, check.names, "fits"),
        _compiled(code.src, code.globals, "forward"),
    )


def _optional(forward: Any) -> dict[str, Any]:
    """Return the arguments of a forward that have defaults, and these, in their order."""
    if not isinstance(forward, types.FunctionType):
        return {}
    code, defaults = forward.__code__, forward.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return dict(zip(names, defaults, strict=True))


def renewed(plans: tuple[Any, ...], module: nn.Module, forward: Any) -> tuple[Plan, ...]:
    """Return plans, made again if they come out of a pickle."""
    if not plans or isinstance(plans[0], Plan):
        return plans
    wanted = plans[0].allowed
    return make_plans(module, forward, lambda name: wanted is None or name in wanted)
