"""What ``fusereg bench`` does with its arguments."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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

from . import SUITES, collect_cases, machine, report
from .harness import Case, Options, Row, Settings, run_cases

ALL_DTYPES = ("float32", "bfloat16")
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class UsageError(Exception):
    """The user asked for what cannot be; its text is one line for them."""


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    # Tables go to standard output, all that moves to standard error: --markdown can be redirected.
    errors = Console(stderr=True)
    try:
        return _run(args, Console(), errors)
    except (UsageError, ValueError, OSError) as error:
        text = str(error)
        errors.print(text if text.startswith("fusereg") else f"fusereg bench: {text}", markup=False)
        return 2


def _run(args: argparse.Namespace, console: Console, errors: Console) -> int:
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        # Before the measurement, not after it.
        raise UsageError("--plot needs matplotlib: pip install 'fusereg[bench]' brings it")
    for option, target in (("--json", args.json), ("--plot", args.plot)):
        if target:
            check_writable(option, Path(target))
    if args.read:
        rows, data = report.read_json(args.read)
        return _show(args, console, rows, data["machine"])
    device = choose_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    options = Options(
        device=device,
        dtypes=choose_dtypes(args.dtype, args.all),
        quick=args.quick,
    )
    suites = [args.technique] if args.technique else list(SUITES)
    cases = select([case for suite in suites for case in collect_cases(suite, options)], args.only)
    if args.list:
        for case in cases:
            console.print(case.id, markup=False, highlight=False, soft_wrap=True)
        return 0
    settings = choose_settings(args)
    facts = machine.describe(device)
    others = machine.OthersMeter()

    def save(so_far: list[Row], interrupted: bool) -> None:
        facts["others_cpu_share"] = others.share()
        if args.json:
            report.write_json(args.json, report.document(so_far, facts, settings, interrupted))

    rows, interrupted = measure(cases, settings, chooser(args.providers), errors, save)
    if interrupted:
        errors.print("interrupted: what was measured until then follows", style="yellow")
    save(rows, interrupted)
    status = _show(args, console, rows, facts)
    return INTERRUPTED if interrupted else status


def _show(
    args: argparse.Namespace, console: Console, rows: list[Row], facts: dict[str, object]
) -> int:
    if args.markdown:
        sys.stdout.write(report.markdown(rows, facts))
    else:
        report.print_tables(console, rows, facts)
    if args.plot:
        from . import plot

        plot.write_plot(args.plot, rows, facts)
    # A provider that cannot run here is a finding; nothing measured at all is a failure.
    return 0 if any(row.p50_us is not None for row in rows) else 1


def check_writable(option: str, target: Path) -> None:
    """Before the measurement, so that an hour's figures are not lost for a wrong folder."""
    folder = target.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if target.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {target}: cannot be written")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)


def choose_dtypes(text: str | None, everything: bool) -> tuple[torch.dtype, ...]:
    names = text.split(",") if text else (ALL_DTYPES if everything else ALL_DTYPES[:1])
    dtypes = []
    for name in names:
        dtype = getattr(torch, name.strip(), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UsageError(f"--dtype: {name.strip()!r} is not a floating-point dtype of torch")
        dtypes.append(dtype)
    return tuple(dtypes)


def choose_settings(args: argparse.Namespace) -> Settings:
    settings = (
        Settings(min_time_s=0.05, min_rounds=3, max_rounds=51, max_case_s=10.0)
        if args.quick
        else Settings()
    )
    min_time = settings.min_time_s if args.min_time is None else args.min_time
    if min_time < 0:
        raise UsageError(f"--min-time must not be negative, got {min_time}")
    return Settings(
        min_time_s=min_time,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        # Who asks for long measurements gets them.
        max_case_s=max(settings.max_case_s, 10 * min_time),
        compile_limit_s=args.compile_limit,
    )


def select(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """The cases whose id holds the pattern; with * or ?, those whose whole id matches it."""
    if not pattern:
        return list(cases)
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    chosen = [case for case in cases if fnmatch.fnmatchcase(case.id, glob.lower())]
    if not chosen:
        raise UsageError(f"--only {pattern}: no case matches; --list shows them")
    return chosen


def chooser(names: str | None) -> Callable[[str], bool]:
    if not names:
        return lambda name: True
    wanted = {name.strip() for name in names.split(",")}
    return lambda name: name in wanted


def measure(
    cases: Sequence[Case],
    settings: Settings,
    include: Callable[[str], bool],
    console: Console,
    save: Callable[[list[Row], bool], None] = lambda rows, interrupted: None,
) -> tuple[list[Row], bool]:
    """Runs the cases, with a bar on a terminal and a line for each case elsewhere.

    ``save`` gets all rows after every case, marked as interrupted: if the process is killed
    (memory, a time limit), the file then says that it is not the whole run.
    """
    so_far: list[Row] = []
    done = 0

    def keep(rows: list[Row]) -> str:
        nonlocal done
        done += 1
        so_far.extend(rows)
        save(so_far, True)
        return report.case_line(rows, done, len(cases))

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
