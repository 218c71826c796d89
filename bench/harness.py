"""The harness: how every benchmark of fusereg is timed and what its figures mean.

**Providers** are ways to do the same work (fusereg, eager torch, ...). All providers of a case are
prepared first, then sampled in turn, one sample each in every round, and the order is rotated from
round to round: what disturbs the machine for a while disturbs all of them, and nobody always runs
after the same predecessor. A ratio of two providers is the median of the ratios within each round.

**A sample** is the mean of back-to-back calls, as many as make it far longer than the timer's
resolution (one call where a call is long already). On the CPU a short call is made once untimed
before the clock starts, so that no provider inherits the caches of its predecessor; work that fits
the caches is therefore measured in the caches. On CUDA, see :class:`.timers.CudaTimer`.

**Bytes** are those of the contract: what the operation must move if each element is read once and
each result written once, no matter what a provider really moves. GB/s is these bytes over the
median time, so a provider that makes five passes shows a fifth of the bandwidth.

**The copy** is always among the providers: ``dst.copy_(src)`` of torch with as many bytes moved as
the case has by contract, that is, two buffers of half of them each, one read and one written.
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
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .timers import (
    Call,
    CompileTimeLimitError,
    CpuTimer,
    CudaTimer,
    HostTimer,
    Timer,
    choose_repeats,
    time_limit,
)

COPY = "copy"
EAGER = "eager"
#: The providers that are fusereg's, the one that ratios are about first.
OWN = ("fusereg", "WeightPenalty")


# ---------------------------------------------------------------- what a benchmark module provides


@dataclass(frozen=True)
class Options:
    """What the user chose; a benchmark module turns it into cases."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    quick: bool = False


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        name: What the table calls it.
        make: Prepares it and returns the call that is timed. What it raises becomes the reason in
            this provider's row.
        compiles: Whether preparing and the first call include a compilation: their time is then
            reported as the time to compile, under the time limit.
        note: Shown under the table, for example how the provider is written.
    """

    name: str
    make: Callable[[], Call]
    compiles: bool = False
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """How far one call's result is from a reference: ``error`` is relative, 0 is exact."""

    error: float
    tolerance: float
    what: str = "result"


@dataclass(frozen=True)
class Facts:
    """What else there is to say about a provider that trains a network.

    Attributes:
        peak_bytes: The most memory that torch held at once, from an empty start.
        test_accuracy: Share of test images that the trained network names rightly.
    """

    peak_bytes: int | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True)
class Workload:
    """A case's data, made when its turn comes and dropped before the next case.

    Attributes:
        providers: The ways to do the work, all on the same data.
        check: Makes one call and compares what it did with a reference, or None.
        facts: Finds out what is no time, given a provider's call; after all times are taken.
    """

    providers: Sequence[Provider]
    check: Callable[[Call], Accuracy] | None = None
    facts: Callable[[Call], Facts] | None = None


@dataclass(frozen=True)
class Case:
    """One operation, mode, shape and dtype.

    Attributes:
        op, mode, shape: Names for the table.
        dtype: Of the elements.
        device: Where the data lie.
        tensors, elements: How much data.
        bytes_moved: By contract, in all; 0 where bandwidth means nothing (host overhead).
        memory: A bound on the bytes that are alive at once; the case is skipped where less is free.
        setup: Makes the workload.
        host: Whether what counts is the host's time per tensor.
    """

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    tensors: int
    elements: int
    bytes_moved: int
    memory: int
    setup: Callable[[], Workload]
    host: bool = False
    suite: str = ""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """What ``--only`` is matched to, such as ``penalty/elastic-net/value/gpt2/float32``."""
        parts = (self.suite, self.op, self.mode, self.shape, self.dtype_name)
        return "/".join(part.replace(" ", "-").lower() for part in parts if part)


# ---------------------------------------------------------------------------------------- results


@dataclass
class Row:
    """One provider of one case. Times are in microseconds a call; None is "not measured"."""

    suite: str
    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    device: str
    tensors: int
    elements: int
    bytes: int
    host: bool = False
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    vs_eager: float | None = None
    us_per_tensor: float | None = None
    compile_s: float | None = None
    relative_error: float | None = None
    peak_bytes: int | None = None
    test_accuracy: float | None = None
    rounds: int = 0
    repeats: int = 0
    note: str = ""
    failed: str = ""
    samples_us: list[float | None] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether this is whole training, where bandwidth means nothing."""
        return self.bytes == 0 and not self.host

    @property
    def case(self) -> tuple[str, str, str, str, str, str]:
        return (self.suite, self.op, self.mode, self.shape, self.dtype, self.device)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of :meth:`to_json`; keys of a later version are passed over."""
        known = cls.__dataclass_fields__
        return cls(**{key: value for key, value in data.items() if key in known})


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1), linear between the two nearest of the sorted values."""
    if not values:
        raise ValueError("quantile: no values")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile: q must be within [0, 1], got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> float | None:
    """Median of numerator / denominator over the rounds in which both were measured."""
    ratios = [
        a / b
        for a, b in zip(numerator, denominator, strict=False)
        if a is not None and b is not None and b > 0
    ]
    return quantile(ratios, 0.5) if ratios else None


def make_timer(case: Case) -> Timer:
    if case.host:
        return HostTimer(case.device)
    if case.device.type == "cuda":
        return CudaTimer(case.device)
    return CpuTimer()


# --------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """How long and how often.

    Attributes:
        min_time_s: Sampling goes on until this much time per provider has passed, if ...
        min_rounds: ... at least so many rounds are done, but ...
        max_rounds: ... never more than so many.
        min_sample_s: A sample lasts at least this long: 1 ms is 10,000 times what reading the clock
            costs (some 50 ns), and 1,000 times a CUDA event's resolution.
        max_case_s: After this much sampling a case ends with the rounds it has, at least 3.
        prime_below_s: On the CPU, calls shorter than this get an untimed call before each sample.
        compile_limit_s: Time limit for a provider that compiles.
    """

    min_time_s: float = 0.5
    min_rounds: int = 11
    max_rounds: int = 201
    min_sample_s: float = 1e-3
    max_case_s: float = 60.0
    prime_below_s: float = 0.05
    compile_limit_s: float = 120.0


MIN_ROUNDS_TO_KEEP = 3


def reason(error: BaseException, limit: int = 160) -> str:
    """One line that says why a provider failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    name = type(error).__name__
    # torch's compilers wrap the cause: "backend='inductor' raised:", the cause on the next line.
    if text.endswith("raised:") and len(lines) > 1:
        text = lines[1]
    line = text if text.startswith(name) else f"{name}: {text}" if text else name
    return line if len(line) <= limit else line[: limit - 3] + "..."


# ---------------------------------------------------------------------------------------- running


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C within a case; carries the rows that were measured in full before it."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) while a case runs; total 0: not known yet."""


def _no_progress(what: str, done: int, total: int) -> None:
    return None


def copy_provider(case: Case) -> Provider:
    """``dst.copy_(src)`` that moves the case's bytes: half of them read, half of them written."""

    def make() -> Call:
        count = max(1, case.bytes_moved // (2 * case.dtype.itemsize))
        source = torch.ones(count, dtype=case.dtype, device=case.device)
        destination = torch.zeros_like(source)
        return lambda: destination.copy_(source)

    return Provider(COPY, make)


def run_case(
    case: Case,
    settings: Settings,
    timer: Timer | None = None,
    progress: Progress = _no_progress,
    include: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """Measures all providers of a case.

    Args:
        case: The case.
        settings: How long and how often.
        timer: Replaces the device's timer.
        progress: Told how far the case is.
        include: Which providers to measure, by name; the copy is always measured.

    Returns:
        A row for each provider, in the order of the workload, the copy first. One that failed has
        its reason in ``Row.failed``.

    Raises:
        Interrupted: On Ctrl-C, with the rows measured up to then.
    """
    free = free_memory(case.device)
    if free is not None and case.memory > free:
        skipped = f"skipped: needs about {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [_finish(case, _Entry(Provider("all", _never), failed=skipped), {})]
    entries: list[_Entry] = []
    try:
        workload = case.setup()
        providers = [provider for provider in workload.providers if include(provider.name)]
        if case.bytes_moved > 0:
            providers.insert(0, copy_provider(case))
        clock = timer if timer is not None else make_timer(case)
        for number, provider in enumerate(providers):
            progress(f"prepare {provider.name}", number, len(providers))
            entry = _Entry(provider)
            entries.append(entry)
            check = None if provider.name == COPY else workload.check
            _prepare(entry, check, clock, settings)
        _sample(entries, clock, settings, progress)
        if workload.facts is not None:
            _find_facts(entries, workload.facts, progress)
    except KeyboardInterrupt as interrupt:
        kept = [entry for entry in entries if _count(entry) >= MIN_ROUNDS_TO_KEEP]
        raise Interrupted(_rows(case, kept)) from interrupt
    except Exception as error:
        # The data could not be made (memory, most likely): the case's row says so.
        return [_finish(case, _Entry(Provider("all", _never), failed=reason(error)), {})]
    return _rows(case, entries)


def _count(entry: _Entry) -> int:
    return sum(value is not None for value in entry.samples)


def _never() -> Call:
    raise RuntimeError("this provider stands for a case that did not run")


def _prepare(
    entry: _Entry, check: Callable[[Call], Accuracy] | None, timer: Timer, settings: Settings
) -> None:
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
        entry.failed = f"not compiled after {settings.compile_limit_s:.0f} s, given up"
        entry.call = None
    except Exception as error:
        entry.failed = reason(error)
        entry.call = None


def rotated(count: int, turn: int) -> list[int]:
    """The order of round ``turn``: 0 1 2, then 1 2 0, then 2 0 1, ..."""
    return [(turn + index) % count for index in range(count)]


def _sample(entries: list[_Entry], timer: Timer, settings: Settings, progress: Progress) -> None:
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
                    entry.failed = reason(error)
                    entry.call = None
            elapsed = timer.now() - start
            progress("measure", min(turn + 1, settings.min_rounds), settings.min_rounds)
            if elapsed >= budget and turn + 1 >= settings.min_rounds:
                break
            if elapsed >= settings.max_case_s and turn + 1 >= MIN_ROUNDS_TO_KEEP:
                break
    finally:
        if collecting:
            gc.enable()


def _find_facts(
    entries: Sequence[_Entry], facts: Callable[[Call], Facts], progress: Progress
) -> None:
    live = [entry for entry in entries if entry.call is not None and entry.provider.name != COPY]
    for number, entry in enumerate(live):
        assert entry.call is not None
        progress(f"train {entry.provider.name}", number, len(live))
        try:
            entry.facts = facts(entry.call)
        except Exception as error:
            entry.failed = reason(error)


def _rows(case: Case, entries: Sequence[_Entry]) -> list[Row]:
    samples = {entry.provider.name: entry.samples for entry in entries if not entry.failed}
    return [_finish(case, entry, samples) for entry in entries]


def _finish(case: Case, entry: _Entry, all_samples: Mapping[str, list[float | None]]) -> Row:
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


def run_cases(
    cases: Sequence[Case],
    settings: Settings,
    progress: Progress = _no_progress,
    include: Callable[[str], bool] = lambda name: True,
    on_case: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> tuple[list[Row], bool]:
    """Measures cases one after the other, memory freed in between.

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


# ----------------------------------------------------------------------------------------- memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def release_memory(device: torch.device) -> None:
    """Gives back what the last case left: cycles, torch's cache, the C heap's free pages."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # Only glibc has malloc_trim; elsewhere there is nothing to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
