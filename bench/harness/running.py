"""Timing of benchmarks, and the meaning of their figures.

**Providers** are ways to do the same work (fusereg, eager torch, ...). All providers of a case are
prepared first, then sampled in turn, one sample each in every round, in an order that is rotated
from round to round: a disturbance of the machine affects all of them alike, and none always runs
after the same predecessor. A ratio of two providers is the median of the ratios of each round.

**A sample** is the mean of back-to-back calls, as many as make it far longer than the timer's
resolution (one call where a call is long already). On the CPU a short call is made once untimed
before the clock starts, so that no provider inherits the caches of its predecessor; work that fits
the caches is therefore measured in the caches. On CUDA, see :class:`.timers.CudaTimer`.

**Bytes** are those of the contract: what the operation must move if each element is read once and
each result written once, no matter what a provider really moves. GB/s is these bytes over the
median time, so a provider that makes five passes shows a fifth of the bandwidth.

**The copy** is measured beside the providers: torch's ``dst.copy_(src)`` with as many bytes moved
as the case has by contract, that is, two buffers of half of them each, one read and one written.
"% of copy" is the median, over the rounds, of the copy's time over the provider's. A copy is half
reads, half writes, and a write to memory usually costs a CPU an extra read of the line; an
operation that mostly reads, or writes only lines that it has just read, can therefore pass 100 %.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cases import (
    COPY,
    EAGER,
    Accuracy,
    Case,
    Facts,
    Provider,
    Row,
    Settings,
    Workload,
    quantile,
    ratio,
)
from .machine import memory_bytes
from .timers import Call, CompileTimeLimitError, Timer, choose_repeats, make_timer, time_limit

MIN_ROUNDS_TO_KEEP = 3

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) while a case runs; total 0: not known yet."""


def _no_progress(what: str, done: int, total: int) -> None:
    return None


@dataclass
class _Entry:
    """A provider while its case runs."""

    provider: Provider
    call: Call | None = None
    repeats: int = 1
    prime: bool = False
    compile_s: float | None = None
    accuracy: Accuracy | None = None
    facts: Facts = field(default_factory=Facts)
    failed: str = ""
    samples: list[float | None] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Take the provider out of the case."""
        self.failed = reason
        self.call = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C within a case; carries the rows that were measured in full before it."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def copy_provider(case: Case) -> Provider:
    """Return ``dst.copy_(src)`` that moves the case's bytes, half read and half written."""

    def make() -> Call:
        count = max(1, case.bytes_moved // (2 * case.dtype.itemsize))
        source = torch.ones(count, dtype=case.dtype, device=case.device)
        destination = torch.zeros_like(source)
        return lambda: destination.copy_(source)

    return Provider(COPY, make)


def reason(error: BaseException, limit: int = 160) -> str:
    """Return one line that says why a provider failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    name = type(error).__name__
    # torch's compilers wrap the cause: "backend='inductor' raised:", the cause on the next line.
    if text.endswith("raised:") and len(lines) > 1:
        text = lines[1]
    line = text if text.startswith(name) else f"{name}: {text}" if text else name
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --- one case -------------------------------------------------------------------------------------


def run_case(
    case: Case,
    settings: Settings,
    timer: Timer | None = None,
    progress: Progress = _no_progress,
    include: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """Measure all providers of a case.

    Args:
        case: The case.
        settings: How long and how often.
        timer: Replaces the device's timer.
        progress: Called as the case proceeds.
        include: Which providers to measure, by name; the copy is always measured beside them.

    Returns:
        A row for each provider, in the order of the workload, the copy first. One that failed has
        its reason in ``Row.failed``. Empty if ``include`` leaves none.

    Raises:
        Interrupted: On Ctrl-C, with the rows measured up to then.
    """
    free = free_memory(case.device)
    if free is not None and case.memory > free:
        skipped = f"skipped: needs about {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [_failed_case(case, skipped)]
    entries: list[_Entry] = []
    try:
        workload = case.setup()
        providers = [provider for provider in workload.providers if include(provider.name)]
        if not providers and not include(COPY):
            return []
        if case.bytes_moved > 0:
            providers.insert(0, copy_provider(case))
        clock = timer if timer is not None else make_timer(case.device, case.host)
        for number, provider in enumerate(providers):
            progress(f"prepare {provider.name}", number, len(providers))
            entries.append(_Entry(provider))
            check = None if provider.name == COPY else workload.check
            _prepare(entries[-1], check, clock, settings)
        _sample(entries, clock, settings, progress)
        _measure_facts(entries, workload, progress)
    except KeyboardInterrupt as interrupt:
        kept = [e for e in entries if len(e.samples) - e.samples.count(None) >= MIN_ROUNDS_TO_KEEP]
        raise Interrupted(_rows(case, kept)) from interrupt
    except Exception as error:
        # The data could not be made (memory, most likely): the case's row says so.
        return [_failed_case(case, reason(error))]
    return _rows(case, entries)


def _failed_case(case: Case, text: str) -> Row:
    """Return the row of a case that did not run."""

    def never() -> Call:
        raise AssertionError("this provider stands for a case that did not run")

    return _finish(case, _Entry(Provider("all", never), failed=text), {})


def _prepare(
    entry: _Entry, check: Callable[[Call], Accuracy] | None, timer: Timer, settings: Settings
) -> None:
    """Make the provider's call, check its result, and choose the calls of a sample."""
    provider = entry.provider
    try:
        start = timer.now()
        with time_limit(settings.compile_limit_s if provider.compiles else 0.0):
            entry.call = provider.make()
            entry.call()
            timer.synchronize()
        if provider.compiles:
            entry.compile_s = timer.now() - start
        if check is not None:
            entry.accuracy = check(entry.call)
        entry.call()
        timer.synchronize()
        entry.repeats, seconds = choose_repeats(timer, entry.call, settings.min_sample_s)
        entry.prime = seconds < settings.prime_below_s
    except CompileTimeLimitError:
        entry.fail(f"not compiled after {settings.compile_limit_s:.0f} s, given up")
    except Exception as error:
        entry.fail(reason(error))


def rotated(count: int, turn: int) -> list[int]:
    """Return the order of round ``turn``: 0 1 2, then 1 2 0, then 2 0 1, ..."""
    return [(turn + index) % count for index in range(count)]


def _sample(entries: list[_Entry], timer: Timer, settings: Settings, progress: Progress) -> None:
    """Sample all providers in turn until the settings say enough."""
    live = [entry for entry in entries if entry.call is not None]
    if not live:
        return
    budget = settings.min_time_s * len(live)
    start = timer.now()
    collecting = gc.isenabled()
    # A collection that falls into one provider's sample would be charged to it.
    gc.collect()
    gc.disable()
    try:
        for turn in range(settings.max_rounds):
            # A round counts for ratios only as a whole, so its slots are filled before it starts.
            for entry in live:
                entry.samples.append(None)
            for index in rotated(len(live), turn):
                entry = live[index]
                if entry.call is None:
                    continue
                try:
                    entry.samples[-1] = timer.sample(entry.call, entry.repeats, entry.prime)
                except Exception as error:
                    entry.fail(reason(error))
            elapsed = timer.now() - start
            progress("measure", min(turn + 1, settings.min_rounds), settings.min_rounds)
            if elapsed >= budget and turn + 1 >= settings.min_rounds:
                break
            if elapsed >= settings.max_case_s and turn + 1 >= MIN_ROUNDS_TO_KEEP:
                break
    finally:
        if collecting:
            gc.enable()


def _measure_facts(entries: Sequence[_Entry], workload: Workload, progress: Progress) -> None:
    """Measure what is not a time."""
    if workload.facts is None:
        return
    live = [entry for entry in entries if entry.call is not None and entry.provider.name != COPY]
    for number, entry in enumerate(live):
        assert entry.call is not None
        progress(f"train {entry.provider.name}", number, len(live))
        try:
            entry.facts = workload.facts(entry.call)
        except Exception as error:
            entry.failed = reason(error)


# --- rows -----------------------------------------------------------------------------------------


def _rows(case: Case, entries: Sequence[_Entry]) -> list[Row]:
    samples = {entry.provider.name: entry.samples for entry in entries if not entry.failed}
    return [_finish(case, entry, samples) for entry in entries]


def _finish(case: Case, entry: _Entry, all_samples: Mapping[str, list[float | None]]) -> Row:
    """Return a provider's row; ``all_samples`` are those of the case, by provider."""
    row = Row(
        suite=case.suite,
        op=case.op,
        provider=entry.provider.name,
        mode=case.mode,
        shape=case.shape,
        dtype=case.dtype_name,
        device=case.device.type,
        tensors=case.tensors,
        elements=case.elements,
        bytes=case.bytes_moved,
        host=case.host,
        compile_s=entry.compile_s,
        note=entry.provider.note,
        failed=entry.failed,
        peak_bytes=entry.facts.peak_bytes,
        test_accuracy=entry.facts.test_accuracy,
    )
    if entry.accuracy is not None:
        error, tolerance = entry.accuracy.error, entry.accuracy.tolerance
        row.relative_error = error if math.isfinite(error) else None
        if not error <= tolerance:  # so written that NaN is caught too
            off = f"{entry.accuracy.what} off by {100 * error:.2g} % of the float64 reference"
            row.note = f"{row.note}; {off}" if row.note else off
    measured = [value for value in entry.samples if value is not None]
    if entry.failed or not measured:
        return row
    row.rounds = len(measured)
    row.repeats = entry.repeats
    row.samples_us = [None if value is None else round(1e6 * value, 4) for value in entry.samples]
    row.p20_us, row.p50_us, row.p80_us = (1e6 * quantile(measured, q) for q in (0.2, 0.5, 0.8))
    if case.bytes_moved > 0 and row.p50_us > 0:
        row.gb_per_s = case.bytes_moved / row.p50_us * 1e-3
        copied = all_samples.get(COPY)
        if copied is not None:
            share = ratio(copied, entry.samples)
            row.percent_of_copy = None if share is None else 100.0 * share
    if EAGER in all_samples and entry.provider.name != COPY:
        row.vs_eager = ratio(all_samples[EAGER], entry.samples)
    if case.host and case.tensors > 0:
        row.us_per_tensor = row.p50_us / case.tensors
    return row


# --- all cases ------------------------------------------------------------------------------------


def run_cases(
    cases: Sequence[Case],
    settings: Settings,
    progress: Progress = _no_progress,
    include: Callable[[str], bool] = lambda name: True,
    on_case: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> tuple[list[Row], bool]:
    """Measure cases one after the other, memory freed in between.

    Returns:
        The rows, and whether Ctrl-C ended the run early (the rows are then those up to it).
    """
    rows: list[Row] = []
    for case in cases:
        try:
            measured = run_case(case, settings, progress=progress, include=include)
            rows.extend(measured)
            on_case(case, measured)
            release_memory(case.device)
        except Interrupted as interrupted:
            rows.extend(interrupted.rows)
            return rows, True
        except KeyboardInterrupt:
            return rows, True
    return rows, False


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on the device, or None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory_bytes("MemAvailable")


def release_memory(device: torch.device) -> None:
    """Free what the last case left: reference cycles, torch's cache, the C heap's free pages."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # Only glibc has malloc_trim; elsewhere there is nothing to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
