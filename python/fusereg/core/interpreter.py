"""Checks before torch is imported, which takes seconds and may hang."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from pathlib import Path


def _refuse_subinterpreters() -> None:
    """Raise ImportError in a subinterpreter, where importing torch does not fail but may hang."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # of Python 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError("fusereg runs in the main interpreter alone, as torch does")
        return


def _is_command() -> bool:
    """Return whether this process is `fusereg ...` or `python -m fusereg ...`."""
    if sys.argv[:1] == ["-m"]:  # so while `python -m` imports the package
        return "fusereg" in sys.orig_argv[1:]
    return bool(sys.argv) and Path(sys.argv[0]).name == "fusereg"


def _end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, without a traceback from the middle of an import."""
    if (
        _is_command()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def accept_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, and a scheduler's SIGTERM as well.

    The command can handle both now: it ends its processes and writes what it has.
    """
    if threading.current_thread() is threading.main_thread() and _is_command():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)


_refuse_subinterpreters()
_end_quietly_on_interrupt()
