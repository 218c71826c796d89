"""``fusereg bench``: measure the kernels on this machine, beside other implementations."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

from fusereg.cli.output import add_json

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Measures the kernels against eager PyTorch, torch._foreach and torch.compile on this machine,
interleaved, and against a copy that moves as many bytes. Losses are shown like wins. Close other
programs first; a full run takes minutes, and Ctrl-C keeps what has been measured.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "bench", help="benchmark the kernels on this machine", description=_DESCRIPTION
    )
    parser.add_argument(
        "technique", nargs="*", help="only these, such as penalty dropout; default: all"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="the whole report: every technique on the CPU and CUDA in float32 and bfloat16, as "
        "JSON, HTML page and plots in the folder that --report names",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: CUDA if there"
    )
    parser.add_argument("--dtype", metavar="NAMES", help="such as float32,bfloat16")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument(
        "--only", metavar="PATTERN", help="only cases whose name contains this (* and ? allowed)"
    )
    parser.add_argument("--providers", metavar="NAMES", help="such as eager,fusereg; default: all")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: few rounds, small work, no torch.compile"
    )
    parser.add_argument(
        "--min-time", type=float, metavar="S", help="sampling time a provider and case (0.5)"
    )
    parser.add_argument(
        "--compile-limit",
        type=float,
        default=120.0,
        metavar="S",
        help="give up a torch.compile after so many seconds (120)",
    )
    add_json(parser, "rows, samples and machine")
    parser.add_argument("--plot", metavar="FILE.png", help="write percent of copy against bytes")
    parser.add_argument("--html", metavar="FILE.html", help="write a page with tables and plots")
    parser.add_argument(
        "--report", metavar="DIR", help="write JSON, page and rooflines (--all: bench-report)"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print a Markdown table instead of the wide one"
    )
    parser.add_argument(
        "--from",
        dest="read",
        metavar="FILE",
        help="measure nothing: show a file written by --json (with --markdown, --plot, --html)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD.json", "NEW.json"),
        help="measure nothing: show which times changed by more than the noise of both runs",
    )
    parser.add_argument(
        "--fail-on-slower",
        dest="slower",
        type=float,
        nargs="?",
        const=0.0,
        metavar="PERCENT",
        help="with --compare: exit code 1 if fusereg became slower beyond the noise (and by more "
        "than so many percent)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report; return the exit status."""
    # By name: the package is the repository's bench/, which the build puts here. Only now:
    # `fusereg --help` must not wait for it.
    command = importlib.import_module("fusereg.bench.harness.command")
    return int(command.run(args))
