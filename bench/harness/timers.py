"""Timers for each device, the number of calls of a sample, and a time limit for compilation."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

import torch

Call = Callable[[], object]

MAX_REPEATS = 1 << 20


class Timer(Protocol):
    """Times calls; the only way to the device's clock, so that tests can replace it."""

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        """Return the mean seconds of ``repeats`` calls; ``prime``: make an untimed call first."""

    def now(self) -> float:
        """Return wall-clock seconds since some moment."""

    def synchronize(self) -> None:
        """Wait until the calls made so far are complete."""


class CpuTimer:
    """Wall-clock time of the calling thread's calls; CPU kernels are done when they return."""

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        if prime:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        return None


class CudaTimer:
    """Device time between two events on the current stream, around each call.

    Before each call, outside its events, twice the L2 cache's size is overwritten, so that every
    call starts with its data in memory, not in the cache. While that write runs, the host already
    queues the call; what the host needs beyond that is part of the time, as it is in training. The
    device is synchronized once after a sample, never between a call's events; calls must not
    synchronize by themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        del prime  # the flush already gives every provider the same start
        stream = torch.cuda.current_stream(self._device)
        pairs = []
        for _ in range(repeats):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record(stream)
            call()
            end.record(stream)
            pairs.append((begin, end))
        torch.cuda.synchronize(self._device)
        milliseconds = sum(float(begin.elapsed_time(end)) for begin, end in pairs)
        return milliseconds * 1e-3 / repeats

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class HostTimer(CpuTimer):
    """The host's time until calls return; the device is synchronized outside the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sample(self, call: Call, repeats: int, prime: bool) -> float:
        self.synchronize()
        seconds = super().sample(call, repeats, prime)
        self.synchronize()
        return seconds

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def make_timer(device: torch.device, host: bool) -> Timer:
    """Return the device's timer, or that of the host's overhead."""
    if host:
        return HostTimer(device)
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def choose_repeats(timer: Timer, call: Call, min_sample_s: float) -> tuple[int, float]:
    """Return how many calls last ``min_sample_s``, and the seconds a call that were seen."""
    repeats = 1
    while True:
        seconds = timer.sample(call, repeats, False)
        if seconds * repeats >= min_sample_s or repeats >= MAX_REPEATS:
            return repeats, seconds
        # At least double; aim 20 % beyond so that noise does not cost another turn, and at most
        # 16-fold, because the first, slowest call is a bad guide.
        wanted = 1.2 * min_sample_s / max(seconds, 1e-9)
        repeats = min(MAX_REPEATS, max(2 * repeats, min(16 * repeats, math.ceil(wanted))))


class CompileTimeLimitError(BaseException):
    """A compilation took too long. Not an Exception: compilers catch and swallow those."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`CompileTimeLimitError` in the block after ``seconds``.

    Needs SIGALRM and the main thread; elsewhere the block runs without a limit.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds <= 0 or not in_main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise CompileTimeLimitError

    previous = signal.signal(signal.SIGALRM, on_alarm)
    # Again every 5 s: an exception raised while Python runs a destructor is dropped.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
