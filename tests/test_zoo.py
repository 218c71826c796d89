"""Models of timm, torchvision and transformers compute the same converted, reverted and folded.

All run with ``-m slow``; one of each kind runs always. See zoo.py for the models.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import zoo
from zoo import Entry

#: These are not slow: each has something that the others have not.
SAMPLE = (
    "timm-test_resnet",  # batch norms, residuals, DropPath, and folding into convolutions
    "timm-test_efficientnet",  # BatchNormAct2d
    "timm-levit_128s",  # batch norms after linear layers
    "timm-vit_tiny_patch16_224",
    "torchvision-densenet",
    "torchvision-swin",
    "transformers-ResNetForImageClassification",
    "transformers-BertForSequenceClassification",
)
_OF_TORCH = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.FeatureAlphaDropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)


def close(found: Tensor, wanted: Tensor, size: float, tolerance: float, what: str) -> None:
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    # A difference that is not a number is not at most the tolerance either.
    assert error <= tolerance * size, f"{what}: {error / size:.1e} of the largest value"


def largest(*tensors: Tensor) -> float:
    return max([float(t.abs().max()) for t in tensors if t.numel()], default=1.0)


def all_close(found: list[Tensor], wanted: list[Tensor], tolerance: float, what: str) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        close(a, b, largest(b), tolerance, what)
    assert largest(*wanted) > 0.0, f"{what}: nothing but zeros, which proves nothing"


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a module holds beside its children, buffers that are not saved included."""
    found = {}
    for name, module in model.named_modules():
        values = {**vars(module), **module._parameters, **module._buffers}
        for key, value in values.items():
            if isinstance(value, (Tensor, bool, int, float, str, tuple)):
                found[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    assert wanted.keys() <= found.keys()
    for key, value in wanted.items():
        equal = torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value
        assert equal, f"{what} changed {key}"


def slow_ones() -> list[Any]:
    marks = {entry.id: () if entry.id in SAMPLE else pytest.mark.slow for entry in zoo.ENTRIES}
    return [pytest.param(entry, id=entry.id, marks=marks[entry.id]) for entry in zoo.ENTRIES]


def test_the_zoo_has_what_it_is_to_have() -> None:
    count = {name: sum(e.library == name for e in zoo.ENTRIES) for name in zoo.LIBRARIES}
    assert count["timm"] >= 60
    assert count["torchvision"] >= 20
    assert count["transformers"] >= 12
    assert len({e.id for e in zoo.ENTRIES}) == len(zoo.ENTRIES)
    assert {e.id for e in zoo.ENTRIES} >= set(SAMPLE)


@pytest.mark.parametrize("entry", slow_ones())
def test_converted_reverted_and_folded_it_computes_the_same(entry: Entry) -> None:
    importlib.import_module("other_libraries")  # all import torchvision
    pytest.importorskip(entry.library)
    plain = entry.build()
    torch.manual_seed(1)
    inputs = entry.inputs()
    with torch.no_grad():
        evaluated = zoo.tensors(entry.call(plain.eval(), inputs))
        model = copy.deepcopy(plain)
        before, kinds = state(model), classes(model)
        with zoo.log() as converting:
            fusereg.convert(model)
        same(state(model), before, "convert")
        left = [n for n, kind in classes(model) if kind in _OF_TORCH]
        assert not left, f"these were not converted: {left}"

        foldings = []
        for each in (plain, model):
            with zoo.log() as folding:
                folded = fusereg.fold_into_conv(each)
            all_close(zoo.tensors(entry.call(folded, inputs)), evaluated, 1e-9, "folded")
            foldings.append(sorted(folding))
            del folded
        same(state(plain), before, "fold_into_conv")
        # A converted sequence is a part of its own, across whose end nothing is folded: of the
        # models here r2plus1d has most of such pairs, 8 of 21.
        folds = [sum("folded into" in line for line in lines) for lines in foldings]
        assert folds[0] >= folds[1] >= 0.6 * folds[0] - 1

    wanted = zoo.step(entry, plain, inputs)
    found = zoo.step(entry, model, inputs)
    all_close(found.outputs, wanted.outputs, 1e-9, "the result in training")
    assert found.gradients.keys() == wanted.gradients.keys()
    size = largest(*wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        close(found.gradients[name], gradient, size, 1e-8, f"the gradient of {name}")
    assert found.state.keys() == wanted.state.keys()
    for name, value in wanted.state.items():
        close(found.state[name], value, max(largest(value), 1e-3), 1e-8, f"{name} after the step")
    all_close(found.evaluated, wanted.evaluated, 1e-8, "the result in evaluation")

    trained = state(model)
    fusereg.revert(model)
    assert state(model).keys() == state(plain).keys()
    same(state(model), {key: trained[key] for key in state(plain)}, "revert")
    assert classes(model) == kinds
    with torch.no_grad():
        reverted = zoo.tensors(entry.call(model.eval(), inputs))
    all_close(reverted, wanted.evaluated, 1e-8, "the result after revert")
    _is_on_the_page(entry, zoo.outcome(plain, converting, foldings[0]))


def _is_on_the_page(entry: Entry, found: zoo.Outcome) -> None:
    if not zoo.PAGE.is_file():
        pytest.skip("no documents beside these tests")
    for library in zoo.LIBRARIES:  # the page names the versions of all
        pytest.importorskip(library)
    page = zoo.PAGE.read_text(encoding="utf-8")
    if zoo.versions() in page:  # other versions may have other layers
        assert zoo.row(entry, found) in page, "docs/zoo.md is out of date: docs/scripts/zoo.py"
