"""Refuses subinterpreters before torch is imported, which does not fail in one but may hang."""

from __future__ import annotations

import importlib


def _refuse_subinterpreters() -> None:
    for name in ("_interpreters", "_xxsubinterpreters"):  # of Python 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError("fusereg runs in the main interpreter alone, as torch does")
        return


_refuse_subinterpreters()
