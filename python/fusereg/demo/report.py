"""Report of the demo's results: the table, a few sentences, and the JSON."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from fusereg.cli.errors import InputError
from fusereg.core import screen
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
    "fusereg\nms per\nepoch",
    "PyTorch\nms per\nepoch",
    "loss\ndiff.",  # in the first epoch
)
# Two ways of computing the same step round differently, by some 1e-7 in the loss. Training
# amplifies that from step to step: plain PyTorch against itself, the last bit of each initial
# weight flipped, ends up 1e-6 to 1e-1 apart after 6,000 steps. So correctness is judged by the
# first epoch, where a wrong gradient already shows.
LARGEST_FIRST_EPOCH_DIFFERENCE = 1e-3


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def row(result: Result) -> list[str]:
    """Return a technique's row, in the order of HEADER."""
    run, plain, difference = result.fused, result.plain, result.first_epoch_difference
    figures = ["diverged", "-", "-", "-", "-"]
    if not run.diverged:
        end = run.last
        figures = [_percent(x) for x in (end.train_accuracy, end.test_accuracy, run.gap)]
        figures += [f"{end.test_loss:.3f}", _percent(run.zeros)]
    times = [f"{1e3 * r.seconds_per_epoch:.1f}" if r else "-" for r in (run, plain)]
    shown = "-" if difference is None else f"{difference:.0e}" if difference else "0"
    return [result.technique.name, *figures, *times, shown]


def table(results: Sequence[Result]) -> Table:
    """Return the table that the demo prints."""
    return screen.table(HEADER, map(row, results), wrap=False, padding=0, show_edge=False)


def legend(results: Sequence[Result]) -> list[str]:
    """Return a line for each row: what it is, with which strengths."""
    lines = []
    for technique in (result.technique for result in results):
        settings = ", ".join(f"{name} = {value:g}" for name, value in technique.settings.items())
        text = f"{technique.name}: {technique.summary}"
        lines.append(f"{text}; {settings}" if settings else text)
    return lines


Converged = Mapping[str, Result]  # by name


def _overfitting(found: Converged, data: DataSet) -> str | None:
    others = [result for name, result in found.items() if name != "none"]
    if "none" not in found or not others:
        return None
    control, end = found["none"].fused, found["none"].fused.last
    narrow = min(others, key=lambda r: r.fused.gap)
    low = min(others, key=lambda r: r.fused.last.test_loss)
    best = max(others, key=lambda r: r.fused.last.test_accuracy)
    accuracy, count = best.fused.last.test_accuracy, len(data.test_labels)
    # Two standard errors of an accuracy measured on so many images.
    chance = 2 * math.sqrt(max(end.test_accuracy * (1 - end.test_accuracy), 0.0) / count)
    verb = "is" if abs(accuracy - end.test_accuracy) <= chance else "is not"
    return (
        f"Overfitting: without regularization {_percent(end.train_accuracy)} % of the training "
        f"images are classified correctly and {_percent(end.test_accuracy)} % of the test images, "
        f"a gap of {_percent(control.gap)} points. Narrowest gap: {narrow.technique.name} with "
        f"{_percent(narrow.fused.gap)}. Lowest test loss: {low.technique.name} with "
        f"{low.fused.last.test_loss:.3f} against {end.test_loss:.3f} without. Best test accuracy: "
        f"{best.technique.name} with {_percent(accuracy)} %; on {count:,} images chance alone "
        f"moves it by about {_percent(chance)} points, so the difference {verb} within chance."
    )


def _sparsity(found: Converged, data: DataSet) -> str | None:
    parts = []
    if "l1" in found and "l1_prox" in found:
        parts.append(
            f"the same L1 gives {_percent(found['l1_prox'].fused.zeros)} % exact zeros as a "
            f"proximal step and {_percent(found['l1'].fused.zeros)} % as an added gradient, which "
            "steps across zero and hardly ever lands on it"
        )
    if "group_lasso" in found:
        columns = linear_weights(found["group_lasso"].fused.model)[0].detach()
        dead = (columns == 0).all(dim=0)
        blank = (data.train_images == 0).all(dim=0)
        text = f"group lasso switched off {int(dead.sum())} of {data.pixels} input pixels"
        if dead.any():
            text += f", {int((dead & blank).sum())} of them blank in every training image"
        parts.append(text)
    return f"Zeros: {'; '.join(parts)}." if parts else None


def _compaction(found: Converged) -> str | None:
    if "compact" not in found or (made := found["compact"].fused.compacted) is None:
        return None
    parameters, operations = (
        f"{after:,} of {before:,}" for before, after in (made.parameters, made.operations)
    )
    (dense, small), (before, after) = made.milliseconds, made.test_accuracy
    text = "as before" if before == after else f"{_percent(before)} % before"
    control = (
        ""
        if "none" not in found
        else (f", {_percent(found['none'].fused.last.test_accuracy)} % without the penalty")
    )
    return (
        f"Compaction: without the hidden units that are zero, the network has {parameters} "
        f"parameters and {operations} multiply-adds for an image; a batch of {made.batch:,} takes "
        f"{small:.2f} ms instead of {dense:.2f} ms, and {_percent(after)} % of the test images are "
        f"classified correctly ({text}{control})."
    )


def _augmentation(found: Converged) -> str | None:
    if "augmentation" not in found or "none" not in found:
        return None
    control, augmented = found["none"].fused, found["augmentation"].fused
    before, after = control.last.test_accuracy, augmented.last.test_accuracy
    return (
        f"Augmentation: {'gains' if after >= before else 'loses'} {_percent(abs(after - before))} "
        f"points of test accuracy ({_percent(after)} % against {_percent(before)} %) and changes "
        f"the gap between training and test from {_percent(control.gap)} to "
        f"{_percent(augmented.gap)} points."
    )


def _early_stopping(found: Converged) -> str | None:
    if "early_stopping" not in found or found["early_stopping"].fused.restored is None:
        return None
    run = found["early_stopping"].fused
    assert run.restored is not None
    ended = len(run.epochs)
    how = f"stopped after epoch {ended}" if run.stopped else f"no reason to stop in {ended} epochs"
    text = (
        f"Early stopping: by the loss on the validation images, {how}; restored epoch "
        f"{run.restored + 1}, with a test loss of "
        f"{run.last.test_loss:.3f} against {run.epochs[-1].test_loss:.3f} after its last epoch"
    )
    if "none" in found:
        control = found["none"].fused
        text += (
            f" and {control.last.test_loss:.3f} after epoch {len(control.epochs)} of the same "
            "training without it"
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
        f"Speed: PyTorch's epoch takes {statistics.median(ratios.values()):.2f} times as long as "
        f"fusereg's in the median ({each})"
    )
    slower = [name for name, ratio in ratios.items() if ratio < 1]
    if slower:
        text += f"; fusereg is slower for {', '.join(slower)}"
    if control is not None:
        text += f"; both columns of none run the same code, and differ by {abs(control - 1):.0%}"
    return f"{text}. Most of an epoch is the network itself; `fusereg bench` times the kernels."


def _agreement(results: Sequence[Result]) -> str | None:
    first = [d for r in results if (d := r.first_epoch_difference) is not None]
    ends = [
        abs(r.fused.last.test_accuracy - r.plain.last.test_accuracy)
        for r in results
        if r.plain is not None and r.technique.same_steps
    ]
    if not first:
        return None
    return (
        f"Agreement: where fusereg and PyTorch take the same steps ({len(first)} of "
        f"{len(results)} techniques; the others draw different random numbers), the losses of the "
        f"first epoch differ by at most {max(first):.0e}, as rounding does; training amplifies "
        f"rounding, and the final test accuracies differ by at most {_percent(max(ends))} points."
    )


def findings(results: Sequence[Result], data: DataSet) -> list[str]:
    """Return up to seven sentences that say what the table shows, computed from its figures."""
    found = {r.technique.name: r for r in results if not r.fused.diverged}
    texts = [
        _overfitting(found, data),
        _sparsity(found, data),
        _compaction(found),
        _augmentation(found),
        _early_stopping(found),
        _speed(results),
        _agreement(results),
    ]
    return [text for text in texts if text is not None]


def problems(results: Sequence[Result]) -> list[str]:
    """Return what is wrong with the results, if anything; the demo then ends with exit code 1."""
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
                f"first epoch, more than rounding explains ({LARGEST_FIRST_EPOCH_DIFFERENCE:g})"
            )
        if result.max_loss_difference == 0 and result.plain is not None:
            ours, theirs = ((len(run.epochs), run.restored) for run in (result.fused, result.plain))
            if ours != theirs:
                found.append(
                    f"{name}: the same losses, but fusereg and PyTorch ended with different epochs"
                )
    return found


def _finite(value: float | None) -> float | None:
    """Return the value, or None for what JSON does not know: NaN and infinity."""
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
        "compact": None if run.compacted is None else asdict(run.compacted),
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
) -> dict[str, object]:
    """Return all results, with what they came from, as JSON content."""
    return {
        "schema": SCHEMA,
        "settings": dict(settings),
        "data": {
            "source": data.source,
            "height": data.height,
            "width": data.width,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "validation_images": len(data.validation_labels),
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


def prepare_folder(folder: Path) -> None:
    """Make the output folder and try to write there: better now than after the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {folder}: cannot write there: {reason}") from error
