"""The command ``fusereg bench``, given its parsed arguments."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from fusereg.cli.errors import InputError, choose, require_packages
from fusereg.cli.output import check_writable, write_atomically, write_json

from .. import SUITES, collect_cases, provider_names
from . import compare as comparison
from . import machine, report
from .cases import COPY, Case, Options, Row, Settings, cases_of
from .running import run_cases

ALL_DTYPES = (torch.float32, torch.bfloat16)
DEFAULT_REPORT = "bench-report"
INTERRUPTED = 130  # as shells report a program that Ctrl-C ended


@dataclass(frozen=True)
class Outputs:
    """The files to write; ``printed``: JSON on standard output, where nothing else goes then."""

    json: Path | None
    plot: Path | None
    html: Path | None
    printed: bool = False


def choose_outputs(args: SimpleNamespace, errors: Console) -> Outputs:
    """Return the files to write.

    They are checked before the measurement: no run of an hour is lost to a wrong folder.

    Raises:
        InputError: If one of the files cannot be written.
    """

    def path(text: str | None, name: str) -> Path | None:
        return Path(text) if text else Path(args.report) / name if args.report else None

    if args.everything and not args.report:
        args.report = DEFAULT_REPORT
    file = None if args.json == "-" else args.json
    outputs = Outputs(
        json=None if args.read and not args.json else path(file, "report.json"),
        plot=Path(args.plot) if args.plot else None,
        html=path(args.html, "report.html"),
        printed=args.json == "-",
    )
    if args.plot:
        require_packages("bench --plot", "bench", "matplotlib")
    if args.html:
        require_packages("bench --html", "bench", "plotly")
    if outputs.html and importlib.util.find_spec("plotly") is None:
        errors.print("the report is its JSON only: its page needs plotly", markup=False)
        outputs = replace(outputs, html=None)
    for option, target in (
        ("--json", outputs.json),
        ("--plot", outputs.plot),
        ("--html", outputs.html),
    ):
        if target:
            check_writable(option, target)
    return outputs


def run(args: SimpleNamespace) -> int:
    """Run the command; return the exit status."""
    # Tables go to standard output, progress to standard error: --markdown can be redirected.
    console, errors = Console(), Console(stderr=True)
    if args.compare:
        return _compare(args, console)
    if args.slower is not None:
        raise InputError("--fail-on-slower goes with --compare")
    if args.show:
        for case in _cases(args):
            console.print(case.id, markup=False, highlight=False, soft_wrap=True)
        return 0
    outputs = choose_outputs(args, errors)
    if args.read:
        rows, data = report.read_json(args.read)
        return _show(args, console, errors, outputs, rows, data)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    include = chooser(args.providers, suites_of(args))
    cases = _cases(args)
    settings = choose_settings(args)
    facts = machine.describe(cases[-1].device if cases else torch.device("cpu"))
    others = machine.OthersMeter()

    def save(so_far: list[Row], interrupted: bool) -> dict[str, Any]:
        facts["others_cpu_share"] = others.share()
        document = report.document(so_far, facts, settings, interrupted)
        if outputs.json:
            report.write_json(outputs.json, document)
        return document

    rows, interrupted = measure(cases, settings, include, errors, save)
    if interrupted:
        done = len(cases_of(rows))
        errors.print(
            f"interrupted: what was measured until then, {done} of {len(cases)} cases, follows",
            style="yellow",
        )
    elif not rows:
        raise InputError(f"--providers {args.providers}: no chosen case can run them here")
    status = _show(args, console, errors, outputs, rows, save(rows, interrupted))
    return INTERRUPTED if interrupted else status


def suites_of(args: SimpleNamespace) -> list[str]:
    """Return the chosen techniques."""
    return choose(args.technique, SUITES, "no benchmark")


def _cases(args: SimpleNamespace) -> list[Case]:
    devices = choose_devices(args.device, args.everything)
    dtypes = choose_dtypes(args.dtype, args.everything)
    found = [
        case
        for device in devices
        for suite in suites_of(args)
        for case in collect_cases(suite, Options(device, dtypes, args.quick))
    ]
    return select(found, args.only)


def _show(
    args: SimpleNamespace,
    console: Console,
    errors: Console,
    outputs: Outputs,
    rows: list[Row],
    document: dict[str, Any],
) -> int:
    facts, interrupted = document["machine"], document["interrupted"]
    if outputs.printed:
        write_json("-", document)
    elif args.markdown:
        sys.stdout.write(report.markdown(rows, facts))
    elif args.everything:
        report.print_overview(console, rows)
    else:
        report.print_tables(console, rows, facts)
    written = [] if outputs.json is None else [outputs.json]
    measured = any(row.p50_us is not None for row in rows)
    if outputs.plot and measured:
        from . import figures

        figures.write_plot(outputs.plot, rows, facts)
        written.append(outputs.plot)
    if outputs.html and measured:
        from . import page

        write_atomically(outputs.html, page.report(rows, facts, interrupted).encode())
        written.append(outputs.html)
    if written:
        errors.print(f"wrote {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    # A provider that cannot run here is a finding; nothing measured at all is a failure.
    return 0 if measured else 1


def _compare(args: SimpleNamespace, console: Console) -> int:
    """Compare two files; return 1 if --fail-on-slower says so."""
    (old_rows, old), (new_rows, new) = (report.read_json(name) for name in args.compare)
    found = comparison.compare(old_rows, new_rows)
    if not found.changes:
        raise InputError("--compare: the two runs have no case in common")
    if args.slower is not None and (text := comparison.unfit(old["machine"], new["machine"])):
        raise InputError(f"--fail-on-slower: {text}")
    comparison.print_comparison(console, found, old["machine"], new["machine"])
    if args.html:
        from . import page

        target = Path(args.html)
        check_writable("--html", target)
        text = page.changes(found, old["machine"], new["machine"])
        write_atomically(target, text.encode())
    return 1 if args.slower is not None and found.slower(args.slower) else 0


def choose_devices(name: str, everything: bool) -> list[torch.device]:
    """Return the devices to measure on: with --all every one, else CUDA where there is a GPU."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise InputError("--device cuda: torch finds no CUDA device here")
    names = ["cpu", "cuda"] if everything and has_cuda else ["cuda" if has_cuda else "cpu"]
    return [torch.device(each) for each in (names if name == "auto" else [name])]


def choose_dtypes(text: str | None, everything: bool) -> tuple[torch.dtype, ...]:
    """Return the dtypes to measure."""
    if text is None:
        return ALL_DTYPES if everything else ALL_DTYPES[:1]
    dtypes = {name: each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
    known = [name for name, each in dtypes.items() if each.is_floating_point]
    chosen = choose(text, known, "--dtype: no floating-point dtype")
    return tuple(dict.fromkeys(dtypes[name] for name in chosen))


def choose_settings(args: SimpleNamespace) -> Settings:
    """Return how long and how often to measure."""
    settings = (
        Settings(min_time_s=0.05, min_rounds=3, max_rounds=51, max_case_s=10.0)
        if args.quick
        else Settings()
    )
    min_time = settings.min_time_s if args.min_time is None else args.min_time
    return replace(
        settings,
        min_time_s=min_time,
        # Long measurements that are asked for are not cut short.
        max_case_s=max(settings.max_case_s, 10 * min_time),
        compile_limit_s=args.compile_limit,
    )


def select(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """Return the cases whose id contains the pattern; with * or ?, those whose id matches it."""
    if not pattern:
        return list(cases)
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    chosen = [case for case in cases if fnmatch.fnmatchcase(case.id, glob.lower())]
    if not chosen:
        known = {part for case in cases for part in (case.id, *case.id.split("/"))}
        close = difflib.get_close_matches(pattern.lower(), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; --list shows them"
        raise InputError(f"--only {pattern}: no case matches{hint}")
    return chosen


def chooser(names: str | None, suites: Sequence[str]) -> Callable[[str], bool]:
    """Return whether to measure a provider, given the names that the user chose.

    Raises:
        InputError: If no provider of these techniques has one of the names.
    """
    known = dict.fromkeys([COPY, *(name for suite in suites for name in provider_names(suite))])
    wanted = choose(names, known, "--providers: no provider")
    return lambda name: name in wanted


def time_left(elapsed: float, done: int, total: int) -> str:
    """Return how long the remaining cases will take; nothing below a minute."""
    left = elapsed / done * (total - done)
    return f" (about {left / 60:.0f} min left)" if left >= 60 else ""


def measure(
    cases: Sequence[Case],
    settings: Settings,
    include: Callable[[str], bool],
    console: Console,
    save: Callable[[list[Row], bool], object] = lambda rows, interrupted: None,
) -> tuple[list[Row], bool]:
    """Run the cases, with a progress bar on a terminal and a line for each case elsewhere.

    ``save`` gets all rows after every case, marked as interrupted: if the process is killed
    (memory, a time limit), the file then says that it is not the whole run.
    """
    so_far: list[Row] = []
    done = 0
    start = time.monotonic()

    def keep(rows: list[Row]) -> str:
        nonlocal done
        done += 1
        so_far.extend(rows)
        save(so_far, True)
        left = time_left(time.monotonic() - start, done, len(cases))
        text = report.case_line(rows) if rows else f"{cases[done - 1].id}: none of the providers"
        return f"[{done}/{len(cases)}] {text}{left}"

    if not console.is_terminal:

        def on_case(case: Case, rows: list[Row]) -> None:
            console.print(keep(rows), markup=False, highlight=False, soft_wrap=True)

        return run_cases(cases, settings, include=include, on_case=on_case)

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Redrawing in a thread would take processor time from what is measured, so it is drawn only
    # between rounds.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        overall = bar.add_task("cases", total=len(cases))
        inner = bar.add_task("", total=None)

        def progress(what: str, now: int, total: int) -> None:
            name = f"{cases[done].shape} {cases[done].mode} {cases[done].dtype_name}: {what}"
            bar.update(inner, description=name, completed=now, total=total or None)
            bar.refresh()

        def on_terminal_case(case: Case, rows: list[Row]) -> None:
            bar.console.print(keep(rows), markup=False, highlight=False)
            bar.update(overall, completed=done)

        return run_cases(cases, settings, progress, include, on_terminal_case)
