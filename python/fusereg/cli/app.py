"""Parses the command line, runs one command, and turns errors into one line and an exit code.

Exit codes: 0 all is well; 1 the command ran and something failed (a kernel's result is wrong, a
file cannot be written); 2 the command line or the input data are wrong.

A command is a module with `add_parser(subparsers)` and `run(args) -> int`, and a line in COMMANDS.
It imports nothing heavy at the top: all are loaded for `fusereg --help`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol, cast

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

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for a program that SIGINT ended


class Command(Protocol):
    """A command's module."""

    def add_parser(self, subparsers: argparse._SubParsersAction[Any]) -> object:
        """Add the command and its arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return its exit code."""


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"fusereg.{COMMANDS[name]}"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fusereg",
        description="Regularization techniques for PyTorch as fused C++/CUDA kernels.",
        epilog="Exit codes: 0 all is well, 1 something failed, 2 wrong usage or input data.",
    )
    parser.add_argument("--version", action="version", version=f"fusereg {fusereg.__version__}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show the full traceback of an error, for bug reports",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        _command(name).add_parser(subparsers)
    return parser


def _check_environment() -> None:
    try:
        cpu.instruction_set()
    except ValueError as error:  # FUSEREG_CPU_ISA names one that is not there
        raise InputError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fusereg` with these arguments (None: the process's own) and return its exit code."""
    interpreter.accept_interrupts()
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has already printed its line, or the help
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    if args.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    try:
        _check_environment()
        code = _command(args.command).run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"fusereg {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`fusereg info | head`) has left. Python would complain once more when it
        # flushes stdout at exit, so give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        print(f"fusereg {args.command}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILED
