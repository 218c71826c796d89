"""What the demo says about its results: the table, a few sentences, and the JSON."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fusereg.cli.errors import InputError
from fusereg.demo.data import DataSet
from fusereg.demo.techniques import linear_weights
from fusereg.demo.train import Result, Run

SCHEMA = 1
HEADER = (
    "technique",
    "train\n%",
    "test\n%",
    "gap\npts",
    "test\nloss",
    "zeros\n%",
    "fusereg\ns/epoch",
    "PyTorch\ns/epoch",
    "largest\nloss\ndiff.",
)
# Two ways of computing the same step round differently, by some 1e-7 in the loss. Training
# amplifies that from step to step: plain PyTorch against itself, the last bit of each starting
# weight flipped, ends up 1e-6 to 1e-1 apart after 6,000 steps. So right or wrong is judged by the
# first epoch, where a wrong gradient already shows.
LARGEST_FIRST_EPOCH_DIFFERENCE = 1e-3


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def row(result: Result) -> list[str]:
    """A technique's row, in the order of HEADER."""
    run, plain, difference = result.fused, result.plain, result.max_loss_difference
    times = [f"{run.seconds_per_epoch:.4f}", f"{plain.seconds_per_epoch:.4f}" if plain else "-"]
    shown = "-" if difference is None else f"{difference:.1e}" if difference else "0"
    if run.diverged:
        return [result.technique.name, "diverged", "-", "-", "-", "-", *times, shown]
    return [
        result.technique.name,
        _percent(run.last.train_accuracy),
        _percent(run.last.test_accuracy),
        _percent(run.gap),
        f"{run.last.test_loss:.3f}",
        _percent(run.zeros),
        *times,
        shown,
    ]


def table(results: Sequence[Result]) -> Table:
    """The table that the demo prints."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for index, title in enumerate(HEADER):
        made.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for result in results:
        made.add_row(*row(result))
    return made


def legend(results: Sequence[Result]) -> list[str]:
    """A line for each row: what it is, with which strengths."""
    lines = []
    for result in results:
        technique = result.technique
        settings = ", ".join(f"{name} = {value:g}" for name, value in technique.settings.items())
        lines.append(
            f"{technique.name}: {technique.summary}" + (f"; {settings}" if settings else "")
        )
    return lines


def text_table(results: Sequence[Result], width: int = 100) -> str:
    """The table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table(results))
    return buffer.getvalue()


def _find(results: Sequence[Result], name: str) -> Result | None:
    return next((result for result in results if result.technique.name == name), None)


def _overfitting(results: Sequence[Result], data: DataSet) -> str | None:
    control = _find(results, "none")
    others = [r for r in results if r is not control and not r.fused.diverged]
    if control is None or control.fused.diverged or not others:
        return None
    end = control.fused.last
    narrow = min(others, key=lambda r: r.fused.gap)
    low = min(others, key=lambda r: r.fused.last.test_loss)
    count = len(data.test_labels)
    # Standard error of an accuracy measured on so many images.
    chance = math.sqrt(max(end.test_accuracy * (1 - end.test_accuracy), 0.0) / count)
    lowest = low.fused.last
    best = max(r.fused.last.test_accuracy for r in others)
    verb = "is" if abs(best - end.test_accuracy) <= 2 * chance else "is not"
    return (
        f"Overfitting: without a penalty {_percent(end.train_accuracy)} % of the training "
        "images are right "
        f"and {_percent(end.test_accuracy)} % of the test images, a gap of "
        f"{_percent(control.fused.gap)} points. Narrowest gap: {narrow.technique.name} with "
        f"{_percent(narrow.fused.gap)}. Lowest test loss: {low.technique.name} with "
        f"{lowest.test_loss:.3f} against {end.test_loss:.3f} without a penalty. The best test "
        "accuracy with a "
        f"penalty is {_percent(best)} %; on {count:,} images chance alone moves it by about "
        f"{_percent(2 * chance)} points, so the difference {verb} within chance."
    )


def _sparsity(results: Sequence[Result], data: DataSet) -> str | None:
    parts = []
    added, prox = _find(results, "l1"), _find(results, "l1_prox")
    if added and prox and not (added.fused.diverged or prox.fused.diverged):
        parts.append(
            f"the same L1 gives {_percent(prox.fused.zeros)} % exact zeros as a proximal step and "
            f"{_percent(added.fused.zeros)} % as an added gradient, which steps across zero and "
            "hardly ever lands on it"
        )
    group = _find(results, "group_lasso")
    if group is not None and not group.fused.diverged:
        columns = linear_weights(group.fused.model)[0].detach()
        dead = (columns == 0).all(dim=0)
        blank = (data.train_images == 0).all(dim=0)
        text = f"group lasso switched off {int(dead.sum())} of {data.pixels} input pixels"
        if dead.any():
            text += f", {int((dead & blank).sum())} of them blank in every training image"
        parts.append(text)
    return f"Zeros: {'; '.join(parts)}." if parts else None


def _augmentation(results: Sequence[Result]) -> str | None:
    augmented, control = _find(results, "augmentation"), _find(results, "none")
    if augmented is None or control is None or augmented.fused.diverged or control.fused.diverged:
        return None
    before, after = control.fused.last, augmented.fused.last
    gain = 100 * (after.test_accuracy - before.test_accuracy)
    verb = "gains" if gain >= 0 else "loses"
    return (
        f"Augmentation: {verb} {abs(gain):.1f} points of test accuracy "
        f"({_percent(after.test_accuracy)} % against {_percent(before.test_accuracy)} %) and "
        f"brings the gap between training and test from {100 * control.fused.gap:.1f} to "
        f"{100 * augmented.fused.gap:.1f} points."
    )


def _early_stopping(results: Sequence[Result]) -> str | None:
    stopped = _find(results, "early_stopping")
    if stopped is None or stopped.fused.restored is None or stopped.fused.diverged:
        return None
    run, back, ended = stopped.fused, stopped.fused.restored + 1, len(stopped.fused.epochs)
    how = f"stopped after epoch {ended}" if run.stopped else f"no reason to stop in {ended} epochs"
    text = (
        f"Early stopping: {how}; restored epoch {back}, with a test loss of "
        f"{run.last.test_loss:.3f} against {run.epochs[-1].test_loss:.3f} after its last epoch"
    )
    control = _find(results, "none")
    if control is not None and not control.fused.diverged:
        text += (
            f" and {control.fused.last.test_loss:.3f} after epoch {len(control.fused.epochs)} of "
            "the same training without it"
        )
    return text + "."


def _speed(results: Sequence[Result]) -> str | None:
    ratios = {
        r.technique.name: r.plain.seconds_per_epoch / r.fused.seconds_per_epoch
        for r in results
        if r.plain is not None
    }
    control = ratios.pop("none", None)
    if not ratios:
        return None
    each = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
    text = (
        f"Speed: PyTorch's epoch takes {statistics.median(ratios.values()):.2f} times as long "
        "as fusereg's in "
        f"the median ({each})"
    )
    slower = [name for name, ratio in ratios.items() if ratio < 1]
    if slower:
        text += f"; fusereg is the slower one for {', '.join(slower)}"
    if control is not None:
        text += f"; both columns of none run the same code, and differ by {abs(control - 1):.0%}"
    return (
        text + ". Most of an epoch is the network itself; `fusereg bench` times the kernels alone."
    )


def _agreement(results: Sequence[Result]) -> str | None:
    first = [r.first_epoch_difference for r in results]
    later = [r.max_loss_difference for r in results]
    at_first = [value for value in first if value is not None]
    overall = [value for value in later if value is not None]
    if not overall:
        return None
    steps = max(len(r.fused.losses) for r in results)
    text = (
        f"Agreement: the losses of fusereg and of PyTorch differ by at most {max(at_first):.0e} "
        "in the first "
        f"epoch and {max(overall):.0e} over all {steps:,} steps"
    )
    if max(overall) > 1e-5 and max(at_first) <= LARGEST_FIRST_EPOCH_DIFFERENCE:
        text += " (both round differently, and training amplifies that from step to step)"
    return text + "."


def findings(results: Sequence[Result], data: DataSet) -> list[str]:
    """Two to six sentences that say what the table shows, worked out from its figures."""
    found = [
        _overfitting(results, data),
        _sparsity(results, data),
        _augmentation(results),
        _early_stopping(results),
        _speed(results),
        _agreement(results),
    ]
    return [text for text in found if text is not None]


def problems(results: Sequence[Result]) -> list[str]:
    """What is wrong with the results, if anything: the demo ends with exit code 1 then."""
    found = []
    for result in results:
        name, difference = result.technique.name, result.first_epoch_difference
        found += [
            f"{name}: training by {run.provider} diverged (a loss is not finite)"
            for run in (result.fused, result.plain)
            if run is not None and run.diverged
        ]
        if difference is not None and not difference <= LARGEST_FIRST_EPOCH_DIFFERENCE:
            found.append(
                f"{name}: the losses of fusereg and PyTorch differ by {difference:.2g} in the "
                "first epoch, "
                f"more than rounding explains ({LARGEST_FIRST_EPOCH_DIFFERENCE:g})"
            )
        if result.max_loss_difference == 0 and result.plain is not None:
            ours, theirs = ((len(run.epochs), run.restored) for run in (result.fused, result.plain))
            if ours != theirs:
                found.append(
                    f"{name}: the same losses, but fusereg and PyTorch ended with different epochs"
                )
    return found


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _run_json(run: Run) -> dict[str, object]:
    end = run.last
    return {
        "train_accuracy": end.train_accuracy,
        "test_accuracy": end.test_accuracy,
        "gap": run.gap,
        "zeros": run.zeros,
        "train_loss": _finite(end.train_loss),
        "test_loss": _finite(end.test_loss),
        "seconds_per_epoch": run.seconds_per_epoch,
        "diverged": run.diverged,
        "stopped_epoch": len(run.epochs) if run.stopped else None,
        "restored_epoch": None if run.restored is None else run.restored + 1,
        "epochs": [
            {key: _finite(value) for key, value in asdict(epoch).items()} for epoch in run.epochs
        ],
    }


def as_json(
    results: Sequence[Result],
    data: DataSet,
    settings: Mapping[str, object],
    machine: Mapping[str, object],
    seconds: float,
    plots: Sequence[str],
) -> str:
    """Everything that came out, with what it came from."""
    content = {
        "schema": SCHEMA,
        "settings": dict(settings),
        "data": {
            "source": data.source,
            "height": data.height,
            "width": data.width,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
        },
        "machine": dict(machine),
        "techniques": [
            {
                "name": result.technique.name,
                "summary": result.technique.summary,
                "settings": dict(result.technique.settings),
                "fusereg": _run_json(result.fused),
                "pytorch": _run_json(result.plain) if result.plain else None,
                "max_loss_difference": _finite(result.max_loss_difference),
                "first_epoch_loss_difference": _finite(result.first_epoch_difference),
            }
            for result in results
        ],
        "findings": findings(results, data),
        "problems": problems(results),
        "seconds": seconds,
        "plots": list(plots),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and tries to write there: better now than after the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {folder}: cannot write there: {reason}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the whole new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
