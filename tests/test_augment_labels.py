"""MixUp and CutMix mix labels and masks, and refuse what cannot be mixed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_peers
from fusereg.augment import (
    Augment,
    Compose,
    Mix,
    MixedLabels,
    MixUp,
    RandomHorizontalFlip,
)
from target_cases import (
    H,
    N,
    Pair,
    Record,
    W,
    box,
    images,
    mask,
    masks,
    plain,
    points,
    sample,
    tv,
    v2,
)


@pytest.fixture(autouse=True)
def _types() -> None:
    augment_peers.torchvision_module("torchvision.transforms.v2")


def test_cutmix_pastes_masks_and_mixup_mixes_probabilities() -> None:
    x = images()
    hard = masks()
    cut = Compose([v2().CutMix(num_classes=9)], seed=2)
    (params,) = cut.sample_params(N, input_size=(H, W), sample_ids=range(N))
    _, tree = cut(x, {"m": hard, "y": torch.arange(N), "name": ["a", "b"]}, params=[params])
    assert torch.equal(plain(tree["m"]), params.mask(plain(hard)))
    assert tree["y"].shape == (N, 9)
    assert tree["name"] == ["a", "b"]
    mix = Augment((H, W), mix=Mix(mixup=1.0), seed=2)
    params = mix.sample_params(N, input_size=(H, W), sample_ids=range(N))
    one_hot = tv().Mask(torch.nn.functional.one_hot(plain(hard), 9).permute(0, 3, 1, 2).bool())
    _y, soft = mix(x, one_hot, params=params)
    w = params.weights[:, None, None, None].float()
    want = one_hot.float() * w + one_hot.float()[params.partners] * (1 - w)
    torch.testing.assert_close(plain(soft), plain(want))
    assert type(soft) is tv().Mask
    with pytest.raises(ValueError, match=r"targets must be one-hot or probabilities \(2, K, H"):
        mix(x, hard, params=params)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_what_cannot_be_mixed_is_refused(kind: str) -> None:
    mix = Augment((H, W), mix=kind)
    for target in (
        [box(), box()],
        {"b": [box(), box()]},
        [points()] * N,
        [mask(), mask()],
        [{"labels": torch.arange(2)}] * N,
        tv().Image(torch.zeros(N, 1, H, W)),
        tv().KeyPoints(torch.rand(N, 2, 2), canvas_size=(H, W)),
    ):
        with pytest.raises(ValueError, match="cannot be mixed"):
            mix(images(), target)
    _, pair = mix(images(), {"y": torch.arange(N), "names": ["a", "b"]})
    assert isinstance(pair["y"], MixedLabels)
    assert mix.eval()(images(), [box(), box()])[1][0].shape == (1, 4)


LABEL_KEYS = ["label", "labels", "labels_a", "fine_label", "label2", "class", "class_id", "Target",
              "category_id", "one_hot", "y"]  # fmt: skip
OTHER_KEYS = ["id", "image_id", "ids", "index", "idx", "name", "file_name", "path"]
UNCLEAR_KEYS = ["length", "label_length", "num", "weight", "digit", "orig_size", "imageid", "x"]
#: What a row of integers, or of numbers for each class, looks like.
VECTORS: dict[str, Callable[[], Tensor]] = {
    "indices": lambda: torch.arange(N),
    "bytes": lambda: torch.arange(N, dtype=torch.uint8),
    "rows": lambda: torch.eye(N),
}


def _is_mixed(value: Any) -> bool:
    return isinstance(value, MixedLabels) or not torch.equal(value, torch.eye(N))


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("through", ["Augment", "Compose", "collate"])
def test_only_what_its_key_calls_a_label_is_mixed(through: str, vector: str) -> None:
    made = {"mix": Mix(mixup=1.0)} if through == "Augment" else {}

    def mixed(tree: dict[str, Any], **rules: Any) -> Any:
        if through == "Augment":
            return Augment((H, W), seed=3, **made, **rules)(images(), tree)[1]
        chain = Compose([MixUp()], seed=3, **rules)
        if through == "Compose":
            return chain(images(), tree)[1]
        rows = [{"image": sample(i), **{k: v[i] for k, v in tree.items()}} for i in range(N)]
        return {k: v for k, v in chain.collate(rows).items() if k != "image"}

    value = VECTORS[vector]()
    for key in LABEL_KEYS:
        assert _is_mixed(mixed({key: value})[key]), key
    for key in OTHER_KEYS:
        found = mixed({key: value, "label": value})
        assert torch.equal(found[key], value), key
        assert _is_mixed(found["label"])
    for key in UNCLEAR_KEYS:
        with pytest.raises(ValueError, match=rf"\['{key}'\] may be a label"):
            mixed({key: value, "label": value})
        assert torch.equal(mixed({key: value, "label": value}, passthrough=[key])[key], value)
        assert _is_mixed(mixed({key: value, "label": value}, labels=[key])[key])
        found = mixed({key: value, "label": value}, labels=["label"])
        assert torch.equal(found[key], value)
        assert _is_mixed(found["label"])


def test_two_vectors_of_a_tuple_are_refused_and_keys_tell_them_apart() -> None:
    mix = Augment((H, W), mix="mixup")
    ids = torch.arange(N)
    for tree in ((ids, ids + 7), Pair(ids, ids + 7), Record(ids, ids + 7)):
        with pytest.raises(ValueError, match="may be a label"):
            mix(images(), tree)
    _, moved = mix(images(), (ids,))
    assert isinstance(moved[0], MixedLabels)
    with pytest.raises(TypeError, match="labels must be a sequence of keys"):
        Augment((H, W), labels="label")


@pytest.mark.parametrize("through", ["Augment", "Compose", "collate"])
def test_mixing_without_labels_warns(through: str) -> None:
    augment = Augment((H, W), mix="cutmix")
    chain = Compose([MixUp()])

    def call(*labels: Any) -> Any:
        if through == "collate":
            return chain.collate([(sample(i), *(y[i] for y in labels)) for i in range(N)])
        return (augment if through == "Augment" else chain)(images(), *labels)

    with pytest.warns(UserWarning, match="images are mixed, but no labels came with them"):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.arange(N))
        augment.eval()(images())
        params = augment.train().sample_params(N, input_size=(H, W))
        augment(images(), params=params)


@pytest.mark.parametrize("make", [Augment, lambda size: Compose([RandomHorizontalFlip()])])
def test_boxes_and_points_of_another_canvas_are_refused(make: Callable[..., Any]) -> None:
    wrong = (H + 1, W)
    boxes = [box() for _ in range(N)]
    augment = make((H, W))
    augment(images(), {"boxes": boxes})
    points = tv().KeyPoints(torch.rand(N, 2, 2), canvas_size=wrong)
    boxes[1] = tv().BoundingBoxes([[0.0, 0, 5, 5]], format="XYXY", canvas_size=wrong)
    for tree in ({"boxes": boxes}, {"points": points}):
        with pytest.raises(ValueError, match=rf"canvas_size \({H}, {W}\) .* got \({H + 1}, {W}\)"):
            augment(images(), tree)


@pytest.mark.parametrize("make", [lambda: Augment((H, W), mix="mixup"), lambda: Compose([MixUp()])])
def test_labels_that_are_no_tensor_are_refused_where_images_are_mixed(
    make: Callable[[], Any],
) -> None:
    augment, names = make(), ["cat"] * N
    for value in (names, tuple(names), "cat", 3, 0.5, ["cat", "dog"]):
        for tree in ({"label": value}, {"file_name": names, "target": value}, value):
            with pytest.raises(TypeError, match="must be a tensor"):
                augment(images(), tree)
    for key in ("name", "file_name", "path", "image_id"):
        tree = {key: names, "label": torch.arange(N)}
        assert augment(images(), tree)[1][key] == names


def test_integers_of_one_column_are_refused_where_they_would_be_blended() -> None:
    augment = Augment((H, W), mix="mixup")
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        column = torch.ones(N, 1, dtype=dtype)
        with pytest.raises(TypeError, match=r"squeeze\(1\)"):
            augment(images(), column)
        assert augment(images(), column.expand(N, 3))[1].dtype == torch.float32
    assert augment(images(), torch.rand(N, 1))[1].shape == (N, 1)
