"""Paragraphs that the docstrings of several functions share, written once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def share_paragraphs(function: Callable[..., Any], **paragraphs: str) -> None:
    """Put each paragraph where the docstring has its name in braces, on a line of its own.

    A paragraph brings its own indentation.
    """
    text = function.__doc__ or ""
    for name, paragraph in paragraphs.items():
        escaped = paragraph.strip("\n").replace("\\", r"\\")
        text = re.sub(rf"^ *\{{{name}\}}", escaped, text, flags=re.M)
    function.__doc__ = text
