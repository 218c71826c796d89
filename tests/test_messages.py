"""What users are told who make a common mistake, or come from another library."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fusereg
import other_libraries  # noqa: F401  # repairs torchvision
from fusereg import EarlyStopping, TrainingRun, WeightPenalty, augment, functional, optim
from fusereg.augment import MixedLabels, recipes
from fusereg.core.layer import Layer

IMAGES = torch.zeros(2, 3, 16, 16)
LINEAR = nn.Linear(3, 3)
LABELS = MixedLabels(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))

Call = Callable[[], object]


def stopper(**arguments: Any) -> Call:
    return lambda: EarlyStopping(LINEAR, patience=3, **arguments)


def recipe(channels: int) -> Call:
    images = torch.zeros(2, channels, 16, 16, dtype=torch.uint8)
    return lambda: recipes.torchvision_classification(8)(images)


#: (what is done, the error's type, parts of its text)
MISTAKES: dict[str, tuple[Call, type[Exception], list[str]]] = {
    "a layer of other channels": (
        lambda: fusereg.nn.BatchNorm2d(8)(torch.zeros(2, 4, 8, 8)),
        ValueError,
        ["input has 4 channels, this layer 8"],
    ),
    "groups of a list": (
        lambda: optim.param_groups_weight_decay([LINEAR.weight], 0.1),
        TypeError,
        ["fusereg.optim.param_groups_weight_decay: model must be a torch.nn.Module, got list"],
    ),
    "an activation's class": (
        lambda: fusereg.nn.BatchNorm2d(4, activation=nn.ReLU),
        ValueError,
        ["activation must be one of None, 'relu'", "got <class"],
    ),
    "a percentage": (
        lambda: fusereg.nn.Dropout(10),
        ValueError,
        ["fusereg.nn.Dropout: p must be within [0, 1], got 10"],
    ),
    "always": (
        lambda: augment.Augment(8, hflip=True),
        TypeError,
        ["hflip must be a number, got bool; 1.0 is True"],
    ),
    "never": (
        lambda: augment.RandomVerticalFlip(False),
        TypeError,
        ["p must be a number, got bool; 0.0 is False"],
    ),
    "no strength": (
        lambda: fusereg.WeightPenalty(LINEAR),
        ValueError,
        ["no strength is given; pass l1, l2 or group"],
    ),
    "a strength's name": (
        lambda: optim.AdamW([{"params": LINEAR.parameters(), "l1_strength": 3}], lr=1e-3),
        ValueError,
        ["unknown key 'l1_strength'; did you mean l1?"],
    ),
    "fused and foreach": (
        lambda: optim.Adam(LINEAR.parameters(), fused=True, foreach=True),
        RuntimeError,
        ["`fused` and `foreach` cannot be `True` together"],
    ),
    # early stopping of Keras, Lightning, transformers
    "monitor": (stopper(monitor="val_loss"), TypeError, ["'monitor'", "step(value)", "metrics="]),
    "restore": (stopper(restore_best_weights=True), TypeError, ["restore_best=True"]),
    "verbose": (stopper(verbose=True), TypeError, ["explain()"]),
    "check_finite": (stopper(check_finite=True), TypeError, ['nan="stop"']),
    "threshold": (stopper(stopping_threshold=0.1), TypeError, ["it is target here"]),
    "a letter swapped": (stopper(min_dleta=0.1), TypeError, ["did you mean min_delta?"]),
    "another word": (stopper(zebra=1), TypeError, ["EarlyStopping: unknown argument 'zebra'"]),
    "mode": (stopper(mode="maximum"), ValueError, ['one of "min", "max", got \'maximum\'']),
    # names of torch
    "a layer of torch": (
        lambda: fusereg.nn.LayerNorm,
        AttributeError,
        ["'fusereg.nn' has no attribute 'LayerNorm'; use torch.nn.LayerNorm"],
    ),
    "a function of torch": (
        lambda: functional.softmax,
        AttributeError,
        ["use torch.nn.functional.softmax"],
    ),
    "an optimizer of torch": (lambda: optim.LBFGS, AttributeError, ["use torch.optim.LBFGS"]),
    "an optimizer's letters": (lambda: optim.Lamb, AttributeError, ["did you mean LAMB?"]),
    "a layer's letters": (lambda: fusereg.nn.Droput, AttributeError, ["did you mean Dropout?"]),
    "nothing like it": (lambda: optim.Zebra, AttributeError, ["has no attribute 'Zebra'"]),
    # images
    "an array": (
        lambda: augment.Augment(8)(np.zeros((8, 8, 3), np.uint8)),
        TypeError,
        ["x must be a torch.Tensor, got ndarray"],
    ),
    "channels last": (
        lambda: augment.Augment(8)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)),
        ValueError,
        ["looks like (N, H, W, C); call x.permute(0, 3, 1, 2)"],
    ),
    "gray images": (recipe(1), ValueError, ["mean must have 1 number for images of 1 channel"]),
    "2 channels": (recipe(2), ValueError, ["mean must have 1 or 2 numbers", "got 3", "RGB"]),
    "4 channels": (recipe(4), ValueError, ["mean must have 1 or 4 numbers", "got 3", "RGB"]),
    "5 channels": (recipe(5), ValueError, ["mean must have 1 or 5 numbers", "got 3", "RGB"]),
    "a shape as a size": (
        lambda: augment.Augment(8).sample_params(2, input_size=IMAGES.shape[1:]),
        ValueError,
        ["input_size must be an integer or (height, width), got 3 numbers; pass shape[-2:]"],
    ),
    "a shape as a list's size": (
        lambda: augment.Compose([augment.RandomCrop(8)]).sample_params(2, input_size=(2, 3, 9, 9)),
        ValueError,
        ["input_size must be an integer or (height, width), got 4 numbers; pass shape[-2:]"],
    ),
    "a crop larger than padded images": (
        lambda: augment.RandomCrop(64, padding=4)(IMAGES),
        ValueError,
        ["size (64, 64) is larger than the image with its padding, (24, 24)"],
    ),
    # labels
    "the loss of mixed labels": (
        lambda: nn.functional.cross_entropy(torch.zeros(2, 3), LABELS),
        TypeError,
        ["torch's cross_entropy does not take them", "labels.loss(", "num_classes="],
    ),
    "the class of mixed labels": (
        lambda: LABELS.argmax(1),
        AttributeError,
        ["MixedLabels has no attribute 'argmax'", "labels.soft("],
    ),
    "a function as the number of classes": (
        lambda: augment.Mix(mixup=1.0, num_classes=len),
        TypeError,
        ["fusereg.Mix: num_classes must be an integer, got builtin_function_or_method"],
    ),
    # training
    "a strength that is none": (
        lambda: WeightPenalty(nn.Linear(1, 1), l1_strength=0.1),  # type: ignore[call-arg]
        TypeError,
        ["fusereg.WeightPenalty: unknown argument 'l1_strength'", "it is l1 here"],
    ),
    "a model for its parameters": (
        lambda: optim.AdamW(LINEAR, lr=0.1),  # type: ignore[arg-type]
        TypeError,
        ["fusereg.optim.AdamW: params must be parameters", "got Linear; pass model.parameters()"],
    ),
    "a dictionary for parameters": (
        lambda: optim.FTRL(LINEAR.state_dict(), lr=0.1),  # type: ignore[arg-type]
        TypeError,
        ["fusereg.optim.FTRL: params must be", "got OrderedDict; pass model.parameters()"],
    ),
    "one group for a list of them": (
        lambda: optim.SGD({"params": [LINEAR.weight]}, lr=0.1),  # type: ignore[arg-type]
        TypeError,
        ["got dict; pass it in a list"],
    ),
    "an option of an optimizer": (
        lambda: fusereg.optim.AdamW([nn.Parameter(torch.ones(1))], weightdecay=0.1),
        TypeError,
        ["fusereg.optim.AdamW: unknown argument 'weightdecay'; did you mean weight_decay?"],
    ),
    "an option of a run": (
        lambda: TrainingRun("never", model=nn.Linear(1, 1), keep_bset=3),  # type: ignore[arg-type]
        TypeError,
        ["fusereg.TrainingRun: unknown argument 'keep_bset'; did you mean keep_best?"],
    ),
    "an option of a run elsewhere": (
        lambda: TrainingRun("never", model=nn.Linear(1, 1), monitor="loss"),  # type: ignore[arg-type]
        TypeError,
        ["unknown argument 'monitor'; give the monitored value to save(metric=value)"],
    ),
    "an optimizer of early stopping": (
        lambda: EarlyStopping(nn.Linear(1, 1), patience=1, optimizer=None),  # type: ignore[call-arg]
        TypeError,
        ["unknown argument 'optimizer'", 'also={"optimizer": optimizer}'],
    ),
    "a strength by position": (
        lambda: WeightPenalty(LINEAR, 1e-3),  # type: ignore[misc]
        TypeError,
        ["too many positional arguments; by name go l1, l2, group"],
    ),
    # recipes
    "the size first": (
        lambda: recipes.timm_imagenet(224),
        TypeError,
        ["policy must be a name, a transform or None, got 224; size is another argument"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str) -> None:
    call, kind, parts = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)


def test_a_layer_names_itself_as_users_reach_it() -> None:
    seen = 0
    for name in fusereg.nn.__all__:
        layer = getattr(fusereg.nn, name)
        parameters = inspect.signature(layer).parameters
        if "p" in parameters:
            wanted = [p.name for p in parameters.values() if p.default is p.empty and p.kind != 4]
            with pytest.raises(ValueError, match=f"^fusereg.nn.{name}: p must be") as caught:
                layer(**{**dict.fromkeys(wanted, 3), "p": 10})
            seen += caught.type is ValueError
    assert seen > 10


@pytest.mark.parametrize("policy", ["foo-m9", "rand-x9", "augmix-q3", "orginal", "ra_wide"])
def test_an_unknown_policy_is_a_sentence(policy: str) -> None:
    pytest.importorskip("timm")
    for make in (recipes.timm_imagenet, recipes.torchvision_classification):
        with pytest.raises(ValueError, match=f"policy must be 'ra', .* timm reads.*got '{policy}'"):
            make(policy=policy)


def test_boxes_need_no_labels() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")

    found = [[1.0, 2.0, 9.0, 9.0], [3.0, 3.0, 3.0, 3.0]]
    boxes = tv_tensors.BoundingBoxes(found, format="XYXY", canvas_size=(16, 16))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    alone = recipes.detection(hflip=0.0)(image, {"boxes": boxes})[1]
    assert alone["boxes"].tolist() == found[:1], "the empty box goes"
    both = recipes.detection(hflip=0.0)(image, {"boxes": boxes, "labels": torch.tensor([4, 5])})[1]
    assert both["labels"].tolist() == [4]


def test_mixed_labels_are_a_tuple_as_before() -> None:
    again = pickle.loads(pickle.dumps(LABELS))
    assert [part.tolist() for part in again] == [part.tolist() for part in LABELS]
    assert not hasattr(LABELS, "shape")
    loss = functional.cross_entropy(torch.zeros(2, 3), LABELS)
    assert loss.item() == pytest.approx(np.log(3))

    def both(labels: MixedLabels) -> torch.Tensor:
        return labels.a + labels.b

    assert torch.compile(both, backend="eager", fullgraph=True)(LABELS).tolist() == [1, 1]


def test_the_explained_arguments_are_those_of_the_signature() -> None:
    assert list(inspect.signature(EarlyStopping).parameters)[:2] == ["model", "patience"]
    for name in ("nn", "functional", "optim"):
        module = importlib.import_module(f"fusereg.{name}")
        assert getattr(module, "_no_such_name", None) is None
        assert "__getattr__" not in module.__all__


@pytest.mark.parametrize("of", [EarlyStopping, TrainingRun, WeightPenalty])
def test_names_of_other_libraries_are_not_ours(of: type) -> None:
    """Or else the hint would tell users to leave out what exists."""
    source = Path(inspect.getfile(of)).read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "ELSEWHERE":
            names = ast.literal_eval(statement.value)
            assert not names.keys() & inspect.signature(of).parameters.keys()
            return
    raise AssertionError("the table of names has gone")


LAYERS = [name for name in fusereg.nn.__all__ if isinstance(getattr(fusereg.nn, name), type)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_names_itself_where_an_argument_is_unknown(name: str) -> None:
    """And no private base class; a layer of the user's own is Python's matter."""
    layer: Any = getattr(fusereg.nn, name)
    if not issubclass(layer, Layer):
        return
    with pytest.raises(TypeError, match=rf"^fusereg.nn.{name}: unknown argument 'inplce'"):
        layer(0.5, inplce=True)

    class Own(layer):
        def __init__(self, rate: float) -> None:
            self.rate = rate

    with pytest.raises(TypeError, match=r"Own.__init__\(\) got an unexpected keyword"):
        Own(rte=0.5)  # type: ignore[call-arg]
    assert Own(rate=0.5).rate == 0.5
