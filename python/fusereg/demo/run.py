"""Runs the demo: data, output folder, training with progress, table, files."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fusereg import _C
from fusereg.cli.errors import InputError
from fusereg.cli.machine import read_machine
from fusereg.demo import data as demo_data
from fusereg.demo import plots, report
from fusereg.demo.techniques import HIDDEN, Technique, choose
from fusereg.demo.train import BATCH, FUSED, LEARNING_RATE, PLAIN, Result, train_pair

QUICK_TRAIN, QUICK_TEST = 50, 20  # images of each label
_PROVIDER_NAMES = {FUSED: "fusereg", PLAIN: "PyTorch"}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    out: Path
    data: Sequence[Path] | None
    epochs: int
    only: Sequence[str] | None
    seed: int
    device: str
    threads: int
    quick: bool
    baseline: bool


class ProgressBar:
    """A bar on the terminal; where there is none, a line for each finished row, for logs."""

    def __init__(self, techniques: Sequence[Technique], epochs: int, baseline: bool) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._count = len(techniques)
        self._epochs = epochs
        self._per_row = [
            epochs * (2 if baseline and technique.plain is not None else 1)
            for technique in techniques
        ]
        self._rows = 0
        self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("row {task.fields[row]}"),
            TextColumn("[bold]{task.fields[label]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("epochs, loss {task.fields[loss]}, left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID = self._bar.add_task(
            "", total=sum(self._per_row), row=f"1/{self._count}", label="", loss="-"
        )

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def epoch(self, technique: Technique, provider: str, done: int, loss: float) -> None:
        """One epoch of one run is done."""
        self._bar.update(
            self._task,
            advance=1,
            row=f"{self._rows + 1}/{self._count}",
            label=f"{technique.name} ({_PROVIDER_NAMES.get(provider, provider)})",
            loss=f"{loss:.4f}",
        )

    def row_done(self, result: Result) -> None:
        """Both runs of a technique are done (earlier than planned, if one stopped early)."""
        self._rows += 1
        self._bar.update(self._task, completed=sum(self._per_row[: self._rows]))
        if not self._live:
            end, passed = result.fused.last, time.perf_counter() - self._started
            back = result.fused.restored
            left = passed / self._rows * (self._count - self._rows)
            print(
                f"row {self._rows}/{self._count} {result.technique.name}: "
                f"{len(result.fused.epochs)} epochs, loss {end.train_loss:.4f}, "
                f"train {end.train_accuracy:.1%}, test {end.test_accuracy:.1%}"
                + ("" if back is None else f", back at epoch {back + 1}")
                + "; "
                f"{passed:.0f} s passed, about {left:.0f} s left",
                flush=True,
            )


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA where torch and fusereg both have it.

    Raises:
        InputError: CUDA is asked for and is not there; says which part lacks.
    """
    if name == "cpu":
        return torch.device("cpu")
    lacking = None
    if not _C.build_info()["cuda"]:
        lacking = "this fusereg was built without CUDA"
    elif torch.version.cuda is None:
        lacking = "this torch was built without CUDA"
    elif not torch.cuda.is_available():
        lacking = "torch finds no CUDA device"
    if lacking is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise InputError(f"--device cuda: {lacking}; use --device cpu")
    return torch.device("cpu")


def _announce(data: demo_data.DataSet, settings: Settings, device: torch.device) -> None:
    print(f"data      {data.source}")
    print(
        f"images    {len(data.train_labels):,} for training, {len(data.test_labels):,} for "
        "testing, "
        f"{data.height} x {data.width} pixels"
    )
    print(
        f"network   {data.pixels}-{HIDDEN}-{demo_data.CLASSES}, ReLU, cross-entropy; SGD, "
        "learning rate "
        f"{LEARNING_RATE:g}, batches of {BATCH}, {settings.epochs} epochs, seed {settings.seed}"
    )
    where = (
        f"{_C.cpu_isa()} kernels, threads: {torch.get_num_threads()}"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device)
    )
    print(f"device    {device}, {where}", flush=True)


def _write(
    results: Sequence[Result],
    data: demo_data.DataSet,
    settings: Settings,
    device: torch.device,
    started: float,
) -> list[Path]:
    """Plots and JSON. Everything is made before the first file is written."""
    pictures = plots.make_all(results, data)
    described = {
        **asdict(settings),
        "out": str(settings.out),
        "data": [str(path) for path in settings.data] if settings.data is not None else None,
        "device": str(device),
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "hidden": HIDDEN,
        "techniques": [result.technique.name for result in results],
    }
    text = report.as_json(
        results,
        data,
        described,
        asdict(read_machine()),
        time.perf_counter() - started,
        sorted(pictures),
    )
    files = {**pictures, "results.json": text.encode()}
    written = []
    for name, content in files.items():
        path = settings.out / name
        report.write_atomically(path, content)
        written.append(path)
    return written


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    techniques: Sequence[Technique], data: demo_data.DataSet, settings: Settings
) -> list[Result]:
    results = []
    with ProgressBar(techniques, settings.epochs, settings.baseline) as progress:
        for technique in techniques:
            result = train_pair(
                technique,
                data,
                epochs=settings.epochs,
                seed=settings.seed,
                baseline=settings.baseline,
                on_epoch=progress.epoch,
            )
            results.append(result)
            progress.row_done(result)
    return results


def run_demo(settings: Settings) -> int:
    """Runs the whole demo; gives the exit code (1 if results are wrong, though written)."""
    started = time.perf_counter()
    techniques = choose(settings.only)
    device = choose_device(settings.device)
    data = demo_data.load(settings.data)
    if settings.quick:
        data = demo_data.first_of_each(data, QUICK_TRAIN, QUICK_TEST)
    report.prepare_folder(settings.out)
    with _threads(settings.threads):
        _announce(data, settings, device)
        data = data.to(device)
        results = _train(techniques, data, settings)
        written = _write(results, data, settings, device, started)
    width = None if sys.stdout.isatty() else 100
    Console(width=width, highlight=False).print("", report.table(results), "")
    for line in [*report.legend(results), "", *report.findings(results, data), ""]:
        print(textwrap.fill(line, width=100, subsequent_indent="  "))
    print(f"wrote {', '.join(path.name for path in written)}")
    print(f"to {settings.out} in {time.perf_counter() - started:.0f} s altogether", flush=True)
    found = report.problems(results)
    for problem in found:
        print(f"fusereg demo: {problem}", file=sys.stderr)
    return 1 if found else 0
