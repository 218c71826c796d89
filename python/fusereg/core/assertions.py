"""Assertions in a forward that is traced, and the text of values in their messages.

A message such as ``f"4 dimensions wanted, got {x.dim()}"`` is the text of a value that is known at
the call alone. While tracing, a mark stands for the value, and the assertion becomes a node of the
graph that puts the values into the message. The mark may be read by nothing else: the bytecode must
make the text as the last argument of the assertion, with nothing that could take it in between.
"""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx


def asserted(condition: Any, message: str, *values: Any) -> None:
    """Raise AssertionError with the message, which the values are put into, unless it holds."""
    if not condition:
        raise AssertionError(message.format(*values))


fx.node.has_side_effect(asserted)

_MARK = re.compile("\ue000(\\d+)\ue000")

#: How many values the instructions that evaluate something like ``x.shape[1]`` or ``x.dim()`` take.
_TAKES = {
    name: count
    for count, names in enumerate(
        (
            "LOAD_CONST LOAD_FAST LOAD_FAST_BORROW LOAD_SMALL_INT LOAD_GLOBAL LOAD_DEREF PUSH_NULL "
            "PRECALL NOP",
            "LOAD_ATTR LOAD_METHOD FORMAT_VALUE FORMAT_SIMPLE",
            "BINARY_SUBSCR BINARY_OP CALL CALL_METHOD FORMAT_WITH_SPEC",
        )
    )
    for name in names.split()
}


class _Text(NamedTuple):
    """A value in the text of an f-string, and where this is made."""

    value: Any
    form: str
    frame: types.FrameType
    offset: int


class Texts:
    """The texts of values that a forward makes while it is traced.

    Attributes:
        open: the numbers of those that no assertion has taken.
    """

    def __init__(self) -> None:
        self._all: list[_Text] = []
        self.open: set[int] = set()

    def add(self, value: Any, form: str, frame: types.FrameType) -> str:
        """Return the mark that stands for the text of a value, in the f-string of a frame."""
        self.open.add(len(self._all))
        self._all.append(_Text(value, form, frame, frame.f_lasti))
        return f"\ue000{len(self._all) - 1}\ue000"

    def template(self, message: Any, frame: types.FrameType) -> tuple[Any, ...] | None:
        """Return the message for :func:`asserted`, and the values.

        None if the message is not a text, or if something but the assertion that a frame is calling
        may have read the marks in it.
        """
        if not isinstance(message, str):
            return None
        parts = _MARK.split(message)
        numbers = list(map(int, parts[1::2]))
        texts = [self._all[number] for number in numbers]
        if texts and not _is_made_there(texts, frame):
            return None
        self.open.difference_update(numbers)
        words = [part.replace("{", "{{").replace("}", "}}") for part in parts[::2]]
        forms = [f"{{:{text.form}}}" for text in texts]
        template = "".join(a + b for a, b in zip(words, [*forms, ""], strict=True))
        return template, *(text.value for text in texts)


def _is_made_there(texts: Sequence[_Text], frame: types.FrameType) -> bool:
    """Return whether texts are part of the last argument of the call that a frame is in.

    Nothing else has seen them then: no instruction in between takes them off the stack.
    """
    steps = [
        step
        for step in dis.get_instructions(frame.f_code)
        if texts[0].offset < step.offset <= frame.f_lasti
    ]
    if not steps or any(text.frame is not frame for text in texts):
        return False
    steps.pop()  # the call; a frame's last instruction is at this or in its cache
    if steps and steps[-1].opname == "PRECALL":
        steps.pop()
    height = above = 1
    for step in steps[:-1]:
        takes = _TAKES.get(step.opname, height)
        if step.opname == "FORMAT_VALUE":
            takes += bool((step.arg or 0) & 4)
        if (step.opname.startswith("CALL") and step.arg) or height - takes < above:
            return False
        height += dis.stack_effect(step.opcode, step.arg)
        if step.opname.startswith("FORMAT"):
            above = height
    return not steps or steps[-1].opname == "BUILD_STRING"
