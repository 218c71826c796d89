"""Decorated forwards: the function inside is rewritten, and its decorators run as they are.

A decorator's function holds what it decorates in a cell of its closure. It is made again with the
rewritten function in this cell, and nothing else of it changes.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..core.proxies import refuse
from ..core.trace import CONTEXTS, TORCH

_Function = Callable[..., Any]

#: What the rewritten function has of the original one.
_KEPT = {*functools.WRAPPER_ASSIGNMENTS, "__wrapped__"}


def inner_of(forward: Any) -> tuple[Any, list[types.FunctionType]]:
    """Return the function inside of its decorators, and these, from the outside.

    Raises:
        UntraceableError: a decorator does more with what it decorates than to call it.
    """
    wrappers: list[types.FunctionType] = []
    while hasattr(forward, "__wrapped__"):
        _check(forward)
        wrappers.append(forward)
        forward = forward.__wrapped__
    return forward, wrappers


def _check(wrapper: Any) -> None:
    said = "its forward is decorated", "decorate a method that is not fused"
    if not isinstance(wrapper, types.FunctionType):
        refuse(*said)
    file = wrapper.__code__.co_filename
    if file.startswith(TORCH) and file.removeprefix(TORCH) not in CONTEXTS:
        refuse(*said)
    cells = zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
    held = {n: _content(cell) for n, cell in cells}
    names = {n for n, value in held.items() if value is wrapper.__wrapped__}  # type: ignore[attr-defined]
    itself = {n for n, value in held.items() if value is wrapper}
    if (
        not names
        or not _only_calls(wrapper.__code__, names)
        or not _only_compares(wrapper.__code__, itself)
    ):
        refuse(*said)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _only_calls(code: types.CodeType, names: set[str]) -> bool:
    """Return whether code does not tell a function under these names from another one."""
    steps = list(dis.get_instructions(code))
    for step, after, last in zip(steps, [*steps[1:], None], [*steps[2:], None, None], strict=True):
        if step.argval not in names or not step.opname.endswith("_DEREF"):
            continue
        reads = after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD")
        compares = any(s is not None and s.opname in ("IS_OP", "COMPARE_OP") for s in (after, last))
        if step.opname.startswith(("STORE", "DELETE")) or compares:
            return False
        if reads and after is not None and after.argval not in _KEPT:
            return False
    inside = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return all(_only_calls(c, names & {*c.co_freevars}) for c in inside)


def _only_compares(code: types.CodeType, names: set[str]) -> bool:
    """Return whether code uses functions under these names as ``... is name`` alone.

    Their attributes, or a call of theirs, would be those of a function that is made anew.
    """
    steps = list(dis.get_instructions(code))
    inside = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return all(
        after.opname == "IS_OP"
        for step, after in pairwise(steps)
        if step.argval in names and step.opname.endswith("_DEREF")
    ) and all(_only_compares(c, names & {*c.co_freevars}) for c in inside)


def decorated(
    function: _Function, wrappers: list[types.FunctionType], itself: _Function
) -> _Function:
    """Return a function with the decorators of another one; the outermost knows as ``itself``."""
    for wrapper in reversed(wrappers):
        own = types.CellType()
        cells = []
        for cell in wrapper.__closure__ or ():
            content = _content(cell)
            if content is wrapper.__wrapped__:  # type: ignore[attr-defined]
                cell = types.CellType(function)
            cells.append(own if content is wrapper else cell)
        made = types.FunctionType(
            wrapper.__code__,
            wrapper.__globals__,
            wrapper.__name__,
            wrapper.__defaults__,
            tuple(cells),
        )
        made.__kwdefaults__ = wrapper.__kwdefaults__
        made.__dict__.update(vars(wrapper), __wrapped__=function)
        own.cell_contents = itself if wrapper is wrappers[0] else made
        function = made
    return function
