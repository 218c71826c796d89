"""Runs the demo: data, output folder, training with progress, table, files."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from fusereg import _C
from fusereg.cli.errors import InputError
from fusereg.cli.machine import read_machine
from fusereg.cli.output import write_atomically, write_json
from fusereg.core import screen
from fusereg.demo import data as demo_data
from fusereg.demo import plots, report
from fusereg.demo.techniques import HIDDEN, Technique, choose
from fusereg.demo.train import BATCH, LEARNING_RATE, Result, train_pair

# Images of each label, for training and validation (a fifth), and for testing. So few for training
# that the network overfits within seconds.
TRAIN, TEST = 188, 100
QUICK_TRAIN, QUICK_TEST = 63, 20


@dataclass(frozen=True)
class Settings:
    """Settings from the command line."""

    out: Path
    data: Sequence[Path] | None
    epochs: int
    only: Sequence[str] | None
    seed: int
    device: str
    threads: int
    quick: bool
    baseline: bool
    json: str | None


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA where torch and fusereg both have it.

    Raises:
        InputError: CUDA is asked for and is not available; says which part is missing.
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


def _load(settings: Settings) -> demo_data.DataSet:
    """Return the images to train on: all of the user's own, a part of the bundled ones."""
    data = demo_data.load(settings.data)
    if settings.quick:
        data = demo_data.first_of_each(data, QUICK_TRAIN, QUICK_TEST)
    elif not settings.data:
        data = demo_data.first_of_each(data, TRAIN, TEST)
    return demo_data.hold_out(data)


def _announcement(data: demo_data.DataSet, settings: Settings, device: torch.device) -> str:
    if device.type == "cpu":
        where = f"{_C.cpu_isa()} kernels, threads: {torch.get_num_threads()}"
    else:
        where = torch.cuda.get_device_name(device)
    return (
        f"data      {data.source}\n"
        f"images    {len(data.train_labels):,} for training, {len(data.test_labels):,} for "
        f"testing, {len(data.validation_labels):,} for early stopping, "
        f"{data.height} x {data.width} pixels\n"
        f"network   {data.pixels}-{HIDDEN}-{demo_data.CLASSES}, ReLU, cross-entropy; SGD, learning "
        f"rate {LEARNING_RATE:g}, batches of {BATCH}, {settings.epochs} epochs, "
        f"seed {settings.seed}\n"
        f"device    {device}, {where}"
    )


def _train(
    techniques: Sequence[Technique], data: demo_data.DataSet, settings: Settings, console: Console
) -> list[Result]:
    """Train all techniques: a bar on a terminal, and a line for each finished technique."""
    results: list[Result] = []
    started = time.perf_counter()
    runs = [2 if settings.baseline and technique.plain else 1 for technique in techniques]
    with screen.progress(console, "epochs, left") as p:
        bar = p.add_task("", total=settings.epochs * sum(runs))

        def on_epoch(technique: Technique, provider: str, done: int, loss: float) -> None:
            p.update(bar, advance=1, description=f"{technique.name} ({provider}), loss {loss:.4f}")

        for number, technique in enumerate(techniques, start=1):
            result = train_pair(
                technique,
                data,
                epochs=settings.epochs,
                seed=settings.seed,
                baseline=settings.baseline,
                on_epoch=on_epoch,
            )
            results.append(result)
            # The planned epochs: early stopping may have left some out.
            p.update(bar, completed=settings.epochs * sum(runs[:number]))
            end, restored = result.fused.last, result.fused.restored
            passed = time.perf_counter() - started
            left = passed / number * (len(techniques) - number)
            console.print(
                f"{number}/{len(techniques)} {technique.name}: {len(result.fused.epochs)} epochs, "
                f"loss {end.train_loss:.4f}, train {end.train_accuracy:.1%}, test "
                f"{end.test_accuracy:.1%}"
                + ("" if restored is None else f", restored epoch {restored + 1}")
                + f"; {passed:.0f} s passed, about {left:.0f} s left",
                soft_wrap=True,
            )
    return results


def _write(content: dict[str, object], pictures: dict[str, bytes], settings: Settings) -> None:
    for name, picture in pictures.items():
        write_atomically(settings.out / name, picture)
    write_json(str(settings.out / "results.json"), content)
    if settings.json is not None:
        write_json(settings.json, content)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(settings: Settings) -> int:
    """Run the whole demo; return the exit code (1 if results are wrong, though written)."""
    started = time.perf_counter()
    techniques = choose(settings.only)
    device = choose_device(settings.device)
    data = _load(settings)
    report.prepare_folder(settings.out)
    # Where the JSON goes to standard output, everything else goes to standard error.
    console = Console(stderr=settings.json == "-", highlight=False)
    screen.at_least(console, 100)
    with _threads(settings.threads):
        console.print(_announcement(data, settings, device), soft_wrap=True)
        data = data.to(device)
        results = _train(techniques, data, settings, console)
        # Everything is made before the first file is written.
        pictures = plots.make_all(results, data)
        described = {
            **asdict(settings),
            "out": str(settings.out),
            "data": [str(path) for path in settings.data] if settings.data else None,
            "device": str(device),
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "hidden": HIDDEN,
            "techniques": [technique.name for technique in techniques],
        }
        seconds, machine = time.perf_counter() - started, asdict(read_machine())
        content = report.as_json(results, data, described, machine, seconds, sorted(pictures))
        _write(content, pictures, settings)
    console.print("", report.table(results), "")
    for line in [*report.legend(results), "", *report.findings(results, data), ""]:
        console.print(textwrap.fill(line, width=100, subsequent_indent="  "), soft_wrap=True)
    console.print(f"wrote {', '.join([*pictures, 'results.json'])}", soft_wrap=True)
    seconds = time.perf_counter() - started
    console.print(f"to {settings.out} in {seconds:.0f} s altogether", soft_wrap=True)
    found = report.problems(results)
    for problem in found:
        print(f"fusereg demo: {problem}", file=sys.stderr)
    return 1 if found else 0
