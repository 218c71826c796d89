"""``fusereg bench``: measure the kernels on this machine, beside other implementations."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Annotated, Literal

from typer import Option

from fusereg.cli.options import Dtypes, Json, Techniques


def run(
    technique: Techniques = None,
    everything: Annotated[
        bool,
        Option(
            "--all",
            help="The whole report: every technique on the CPU and CUDA in float32 and bfloat16, "
            "as JSON, HTML page and plots in the folder that --report names (bench-report).",
        ),
    ] = False,
    device: Annotated[
        Literal["cpu", "cuda", "auto"], Option(help="auto: CUDA if it is there.")
    ] = "auto",
    dtype: Dtypes = None,
    threads: Annotated[
        int | None, Option(metavar="N", min=1, help="CPU threads; default: torch's.")
    ] = None,
    only: Annotated[
        str | None,
        Option(metavar="PATTERN", help="Only cases whose name contains this (* and ? allowed)."),
    ] = None,
    providers: Annotated[
        str | None, Option(metavar="NAMES", help="Such as eager,fusereg; default: all.")
    ] = None,
    show: Annotated[bool, Option("--list", help="Print the cases' names and stop.")] = False,
    quick: Annotated[
        bool, Option("--quick", help="Seconds: few rounds, small work, no torch.compile.")
    ] = False,
    min_time: Annotated[
        float | None, Option(metavar="S", min=0, help="Sampling time a provider and case (0.5).")
    ] = None,
    compile_limit: Annotated[
        float, Option(metavar="S", help="Give up a torch.compile after so many seconds.")
    ] = 120.0,
    json: Json = None,
    plot: Annotated[
        str | None, Option(metavar="FILE.png", help="Write percent of copy against bytes.")
    ] = None,
    html: Annotated[
        str | None, Option(metavar="FILE.html", help="Write a page with tables and charts.")
    ] = None,
    report: Annotated[
        str | None, Option(metavar="DIR", help="Write JSON and page into it.")
    ] = None,
    markdown: Annotated[
        bool, Option("--markdown", help="Print a Markdown table instead of the wide one.")
    ] = False,
    read: Annotated[
        str | None,
        Option(
            "--from",
            metavar="FILE",
            help="Measure nothing: show a file of --json (with --markdown, --plot, --html, "
            "--report).",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        Option(
            metavar="OLD.json NEW.json",
            help="Measure nothing: show which times changed by more than the noise of both runs.",
        ),
    ] = None,
    slower: Annotated[
        float | None,
        Option(
            "--fail-on-slower",
            metavar="[PERCENT]",
            help="With --compare: exit code 1 if fusereg became slower beyond the noise (and by "
            "more than so many percent).",
        ),
    ] = None,
) -> int:
    """Measure the kernels on this machine, beside other implementations.

    Those are eager PyTorch, torch._foreach and torch.compile, interleaved, and a copy that moves as
    many bytes. Losses are shown like wins. Close other programs first; a full run takes minutes,
    and Ctrl-C keeps what has been measured.
    """
    args = SimpleNamespace(**locals())
    # By name: the package is the repository's bench/, which the build puts here. Only now:
    # `fusereg --help` must not wait for it.
    return int(importlib.import_module("fusereg.bench.harness.command").run(args))
