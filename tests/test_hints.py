"""Every public function and class says what is meant by an argument that it does not have."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import fusereg
import other_libraries  # noqa: F401  # repairs torchvision
from fusereg import augment, functional, optim
from fusereg.augment.rules import RULES, Rules
from fusereg.core.hints import SYNONYMS, explains

#: What fusereg returns and users do not make, and what Python makes.
RECORDS = {
    "AttachedPenalty",
    "AugmentParams",
    "CallParams",
    "CheckpointError",
    "Decision",
    "MixedLabels",
    "PathPoint",
    "PenaltyGroup",
    "Plan",
    "ProgramParams",
    "RegularizationPath",
    "Snapshot",
    "Transform",
}
FACES = (
    *("", "nn", "functional", "optim", "augment", "augment.recipes", "prox"),
    *("early_stopping", "integrations.lightning", "integrations.transformers"),
    "integrations.ignite",
)
WEIGHT = nn.Parameter(torch.ones(1))
COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def public() -> dict[str, Callable[..., Any]]:
    """Return every function and class of the faces, by the name of its place."""
    found: dict[int, tuple[str, Callable[..., Any]]] = {}
    for name in FACES:
        if name.startswith("integrations.") and find_spec(name.partition(".")[2]) is None:
            continue  # a library of an extra
        face = importlib.import_module(f"fusereg.{name}".rstrip("."))
        for own in face.__all__:
            thing = getattr(face, own)
            if callable(thing) and own not in RECORDS:
                found.setdefault(id(thing), (f"{name}.{own}".lstrip("."), thing))
    return dict(found.values())


PUBLIC = public()


def test_a_name_tells_which_function_or_class_it_is() -> None:
    """Errors begin with ``fusereg.`` and the name alone, without the module that exports it."""
    # The same callbacks for other trainers are told apart by the trainer.
    names = [p.rpartition(".")[2] for p in PUBLIC if not p.startswith("integrations.")]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


def names_of(thing: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.kind not in COLLECTING]


def call(thing: Callable[..., Any], without: str = "", **given: Any) -> Any:
    """Call with what must be given, but for one argument; names are looked at before values."""
    parameters = inspect.signature(thing).parameters
    values = {"params": [WEIGHT], "monitor": "loss", "patience": 1, "folder": "never"}
    must = [p.name for p in parameters.values() if p.default is p.empty]
    must += ["monitor"] * ("monitor" in parameters)
    named = {n: values.get(n) for n in must if parameters[n].kind not in COLLECTING}
    named.pop(without, None)
    return thing(**{**named, **given})


def misspelled(name: str) -> str:
    return name[: len(name) // 2] + name[len(name) // 2 + 1 :]


def test_the_public_functions_are_found() -> None:
    assert len(PUBLIC) > 100
    for name in ("nn.Dropout", "compact", "prox.l1_"):
        assert name in PUBLIC


@pytest.mark.parametrize("place", PUBLIC)
def test_a_misspelled_argument_is_named(place: str) -> None:
    thing = PUBLIC[place]
    names = names_of(thing)
    for name in names:
        wrong = misspelled(name)
        if len(name) > 4 and wrong not in names:
            with pytest.raises(TypeError) as error:
                call(thing, without=name, **{wrong: 1})
            said = str(error.value)
            # Python names what is missing; some functions leave that to it.
            if "missing" not in said or repr(name) not in said:
                assert said.startswith("fusereg."), said
                assert said.endswith(f": unknown argument '{wrong}'; did you mean {name}?"), said


@pytest.mark.parametrize("place", PUBLIC)
def test_a_name_like_no_other_gets_those_that_there_are(place: str) -> None:
    thing = PUBLIC[place]
    if thing is optim.param_groups_weight_decay:  # its ** are a group's own keys
        assert call(thing, model=nn.Linear(1, 1), weight_decay=0.0, q_q=1)[0]["q_q"] == 1
    elif names := [name for name in names_of(thing) if name != "args"]:
        with pytest.raises(TypeError, match=r"unknown argument 'q_q'; it takes ") as error:
            call(thing, q_q=1)
        assert set(names) <= set(str(error.value).split("; it takes ")[1].split(", "))


def test_each_row_of_the_synonyms_is_of_an_argument() -> None:
    used = {*RULES, *(name for thing in PUBLIC.values() for name in names_of(thing))}
    assert SYNONYMS.keys() <= used
    for name, others in SYNONYMS.items():
        assert name not in others


#: (function or class, a name that it has elsewhere, what is said)
ELSEWHERE: list[tuple[Callable[..., Any], str, str]] = [
    (fusereg.nn.Dropout, "drop_prob", "did you mean p?"),
    (functional.dropout, "rate", "did you mean p?"),
    (functional.drop_path, "drop_prob", "did you mean p?"),
    (functional.drop_path, "keep_prob", "it takes input, p, "),
    (functional.cross_entropy, "ignore_idx", "did you mean ignore_index?"),
    (functional.cross_entropy, "label_smooth", "did you mean label_smoothing?"),
    (functional.cross_entropy, "smoothing", "did you mean label_smoothing?"),
    (functional.cross_entropy, "class_weights", "did you mean weight?"),
    (functional.batch_norm, "epsilon", "did you mean eps?"),
    (fusereg.nn.CrossEntropyLoss, "smoothing", "did you mean label_smoothing?"),
    (fusereg.nn.DropoutAddLayerNorm, "hidden_size", "did you mean normalized_shape?"),
    (fusereg.WeightPenalty, "weight_decay", "it is l2 here"),
    (fusereg.WeightPenalty, "lambda1", "did you mean l1?"),
    (fusereg.WeightPenalty, "lr", "it takes model, l1, "),
    (fusereg.compact, "input_shape", "did you mean example_inputs?"),
    (fusereg.compact, "divisor", "did you mean round_to?"),
    (fusereg.convert, "skip", "did you mean exclude?"),
    (fusereg.path, "lambdas", "did you mean strengths?"),
    (fusereg.EarlyStopping, "min_dleta", "did you mean min_delta?"),
    (optim.AdamW, "learning_rate", "did you mean lr?"),
    (optim.AdamW, "beta_1", "did you mean betas?"),
    (optim.AdamW, "nesterov", "NAdam is Adam with it"),
    (optim.Adam, "momentum", "the first of betas"),
    (optim.SGD, "wd", "did you mean weight_decay?"),
    (optim.SGD, "clipnorm", "did you mean max_grad_norm?"),
    (optim.SGD, "lambda_l1", "did you mean l1?"),
    (optim.FTRL, "l1_regularization_strength", "did you mean l1?"),
    (optim.FTRL, "prox", "is a proximal one"),
    (optim.clip_grad_norm_, "grad_clip", "did you mean max_norm?"),
    (optim.param_groups_weight_decay, "no_weight_decay_list", "did you mean exclude?"),
    (augment.Augment, "p", "a probability of its own: hflip"),
    (augment.Augment, "rotation_range", "did you mean degrees?"),
    (augment.Augment, "horizontal_flip", "did you mean hflip?"),
    (augment.Augment, "image_size", "did you mean size?"),
    (augment.Augment, "same_on_batch", "each sample has draws of its own"),
    (augment.Compose, "p", "it takes transforms, "),
    (augment.Compose, "bbox_params", "BoundingBoxes"),
    (augment.RandomCrop, "height", "did you mean size?"),
    (augment.RandomAffine, "resample", "did you mean interpolation?"),
    (augment.RandomErasing, "probability", "did you mean p?"),
    (augment.Mix, "mixup_alpha", "did you mean mixup?"),
    (augment.recipes.timm_imagenet, "auto_augment", "did you mean policy?"),
    (augment.recipes.timm_imagenet, "re_prob", "did you mean reprob?"),
    (augment.recipes.segmentation, "base_size", "did you mean base?"),
]


@pytest.mark.parametrize(
    ("thing", "name", "said"), ELSEWHERE, ids=[f"{t.__name__}({n}=)" for t, n, _ in ELSEWHERE]
)
def test_a_name_of_another_library_is_told_by_that_here(
    thing: Callable[..., Any], name: str, said: str
) -> None:
    with pytest.raises(TypeError, match=rf"^fusereg\.\S+: unknown argument '{name}'; ") as error:
        call(thing, **{name: 1})
    assert said in str(error.value)


def test_users_classes_are_told_by_ours_that_they_are_made_from() -> None:
    class Flip(augment.RandomHorizontalFlip):
        """A user's."""

    class Own(optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)

    with pytest.raises(TypeError, match=r"^fusereg.RandomHorizontalFlip: .*; did you mean p\?$"):
        Flip(prob=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^fusereg.optim.AdamW: .*; did you mean weight_decay\?$"):
        Own([WEIGHT], weightdecay=0.1)


def test_what_fits_is_handed_on_and_other_errors_come_through() -> None:
    @explains()
    def ratio(a: float, *, by: float = 1.0) -> float:
        """Divide."""
        return a / by

    assert (ratio.__name__, ratio.__doc__) == ("ratio", "Divide.")
    assert ratio(3.0, by=2.0) == ratio(a=3.0, by=2.0) == 1.5
    with pytest.raises(TypeError, match=r"ratio\(\) missing 1 required positional argument: 'a'"):
        ratio(by=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unsupported operand"):
        ratio("3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^fusereg.ratio: unknown argument 'bye'; did you mean by"):
        ratio(3.0, bye=2.0)  # type: ignore[call-arg]


def test_rules_of_transforms_are_taken() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Rules)}
    assert tuple(defaults) == RULES
    for name, value in defaults.items():
        augment.Augment(8, **{name: value})
        augment.Compose([], **{name: value})
        augment.recipes.segmentation(8, **{name: value})


def test_compiled_code_takes_the_arguments_by_name() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(input=x, p=0.0, training=True) * 2

    x = torch.ones(3)
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="eager")(x), 2 * x)
