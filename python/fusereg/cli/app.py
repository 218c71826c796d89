"""Parses the command line, runs one command, and turns errors into one line and an exit code.

Exit codes: 0 all is well; 1 the command ran and something failed (a kernel's result is wrong, a
file cannot be written); 2 the command line or the input data are wrong; 130 interrupted.

A command is a module with a function `run(...) -> int`, whose parameters are its arguments, and a
line in COMMANDS. It imports nothing heavy at the top: all are loaded for `fusereg --help`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

import fusereg
from fusereg import cpu
from fusereg.cli.errors import InputError, one_line
from fusereg.core import interpreter

#: Commands and their modules, which are loaded by name: programs import this package, not it them.
COMMANDS = {
    "info": "cli.info",
    "verify": "cli.verify",
    "demo": "demo.command",
    "bench": "cli.bench",
}
#: Options whose value can be left out, and the value that they have then.
DEFAULT_VALUES = {"--json": "-", "--fail-on-slower": "0"}

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for a program that SIGINT ended

#: Click's, under whichever name this version of typer has it.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def _command(name: str) -> Any:
    return importlib.import_module(f"fusereg.{COMMANDS[name]}")


def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show an error's full traceback, for bug reports.")
    ] = False,
) -> None:
    """Regularization techniques for PyTorch as fused C++/CUDA kernels."""
    if version:
        print(f"fusereg {fusereg.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)


def build_app() -> typer.Typer:
    """Return the command line. Calling a command returns its name and the work that is to be done.

    The work is done outside of typer, which has its own way with interrupts and broken pipes.
    """
    app = typer.Typer(
        invoke_without_command=True,
        callback=_options,
        rich_markup_mode=None,
        epilog="Exit codes: 0 all is well, 1 something failed, 2 wrong usage or input data.",
    )

    def later(name: str, run: Callable[..., int]) -> Callable[..., object]:
        return functools.wraps(run)(lambda **given: (name, functools.partial(run, **given)))

    for name in COMMANDS:
        app.command(name)(later(name, _command(name).run))
    return app


def _complete(words: Sequence[str]) -> Iterator[str]:
    """Yield the words, and the values that options have when none was given."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        yield word
        if word in DEFAULT_VALUES and following.startswith("-") and following != "-":
            yield DEFAULT_VALUES[word]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fusereg` with these arguments (None: the process's own) and return its exit code."""
    interpreter.accept_interrupts()
    words = sys.argv[1:] if argv is None else argv
    try:
        parsed = get_command(build_app()).main(
            list(_complete(words)), prog_name="fusereg", standalone_mode=False
        )
    except (USAGE_ERROR, InputError) as error:
        where = " ".join(["fusereg", *[word for word in words if word in COMMANDS][:1]])
        text = one_line(error) if isinstance(error, InputError) else error.format_message()
        print(f"{where}: error: {' '.join(text.split())}", file=sys.stderr)
        return EXIT_USAGE
    if not isinstance(parsed, tuple):  # the help or the version has been printed
        return parsed or EXIT_OK
    command, work = parsed
    try:
        try:
            cpu.instruction_set()
        except ValueError as error:  # FUSEREG_CPU_ISA names one that is not there
            raise InputError(str(error)) from error
        code: int = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"fusereg {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`fusereg info | head`) has left. Python would complain once more when it
        # flushes stdout at exit, so give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if "--traceback" in words:
            traceback.print_exc()
        print(f"fusereg {command}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILED
