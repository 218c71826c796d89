"""Targets move with the images, in every nesting and through every kind of list, or are refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import augment_peers
from fusereg.augment import (
    Augment,
    CenterCrop,
    Compose,
    Mix,
    RandomHorizontalFlip,
    Transform,
)
from target_cases import (
    EACH,
    FLIPS,
    H,
    N,
    Record,
    W,
    box,
    f,
    images,
    leaves,
    mask,
    masks,
    plain,
    points,
    sample,
    tv,
    types_of,
    v2,
)


@pytest.fixture(autouse=True)
def _types() -> None:
    augment_peers.torchvision_module("torchvision.transforms.v2")


@pytest.mark.parametrize("nesting", EACH)
@pytest.mark.parametrize("through", FLIPS)
def test_every_nesting_moves_through_every_list(nesting: str, through: str) -> None:
    a, b = [box(), box((20.0, 5, 30, 15), (0, 0, 1, 1))], [points(), points((9.0, 1), (0, 0))]
    tree = EACH[nesting](a, b)
    _, moved = FLIPS[through]()(images(), tree)
    assert types_of(moved) == types_of(tree)
    want = [f().horizontal_flip(leaf).tolist() for leaf in leaves(tree)]
    assert [leaf.tolist() for leaf in leaves(moved)] == want


@pytest.mark.parametrize("through", FLIPS)
def test_every_kind_moves_for_the_batch_and_for_each(through: str) -> None:
    flip = FLIPS[through]()
    depth = tv().Image(torch.rand(N, 1, H, W))
    clip = tv().Video(torch.rand(N, 3, 2, H, W))
    tree = {
        "mask": masks(),
        "both": (masks(), torch.arange(N)),
        "classes": tv().Mask(torch.rand(N, 5, H, W)),
        "depth map": depth,
        "clip": clip,
        "points": tv().KeyPoints(torch.rand(N, 4, 2) * 30, canvas_size=(H, W)),
        "each mask": [mask() for _ in range(N)],
        "each instance": [tv().Mask(torch.randint(0, 2, (k, H, W)).bool()) for k in (0, 3)],
        "each depth map": [],
        "photo": tv().Image(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8)),
        "depth in mm": tv().Image(torch.randint(0, 9999, (N, 1, H, W), dtype=torch.int32)),
        "no boxes": [
            box(),
            tv().BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(H, W)),
        ],
        "no points": [points(), tv().KeyPoints(torch.zeros(0, 2), canvas_size=(H, W))],
        "labels": torch.arange(N),
        "soft": torch.eye(3)[:N],
        "names": ["a", "b"],
        "number": 3,
        "nothing": None,
    }
    tree["each depth map"] = [tv().Image(d) for d in depth]
    _, moved = flip(images(), tree)
    assert types_of(moved) == types_of(tree)
    for given, got in zip(leaves(tree), leaves(moved), strict=True):
        if isinstance(given, Tensor) and type(given) is not Tensor:
            want = f().horizontal_flip(given)
            torch.testing.assert_close(got.as_subclass(Tensor), want.as_subclass(Tensor))
            assert got.dtype is given.dtype
        else:
            assert got is given or torch.equal(got, given)


def lists(**more: Any) -> dict[str, list[Any]]:
    t = v2()
    return {
        "Resize": [t.Resize((27, 31), **more)],
        "short side": [t.Resize(27, **more)],
        "long side": [t.Resize(30, max_size=31, **more)],
        "Pad": [t.Pad([1, 2, 3, 4], fill={tv().Image: 0, tv().Mask: 255, "others": 0})],
        "center": [t.CenterCrop((20, 30))],
        "then cropped": [t.Resize((57, 91), **more), t.CenterCrop((41, 33))],
    }


@pytest.mark.parametrize(
    "name", ["Resize", "short side", "long side", "Pad", "center", "then cropped"]
)
def test_targets_are_torchvisions_where_nothing_is_drawn(name: str) -> None:
    # A mask takes the pixel whose center is nearest, which is torchvision's NEAREST_EXACT.
    chain, exact = lists()[name], lists(interpolation=v2().InterpolationMode.NEAREST_EXACT)[name]
    x, m, b = images(), masks(), [box(), box((5.0, 7, 31, 22), (0, 0, 60, 40))]
    m[:, :2] = 0
    y, (mask_, boxes) = Compose(chain)(x, (m, b))
    for i in range(N):
        theirs = list(v2().Compose(chain)(tv().Image(x[i]), tv().Mask(m[i]), b[i]))
        theirs[1] = v2().Compose(exact)(tv().Mask(m[i]))
        assert y[i].shape == theirs[0].shape
        near = (y[i].float() - theirs[0].float()).abs()
        assert float((near > 2).float().mean()) < 0.01
        assert torch.equal(plain(mask_)[i], plain(theirs[1]))
        assert boxes[i].canvas_size == theirs[2].canvas_size
        torch.testing.assert_close(
            boxes[i].as_subclass(Tensor), theirs[2].as_subclass(Tensor), rtol=1e-5, atol=1e-3
        )


def test_masks_have_a_fill_of_their_own() -> None:
    x, m = images(), masks()
    fills = {tv().Image: 7, tv().Mask: 255, "others": 0}
    y, moved = Compose([v2().Pad(3, fill=fills)])(x, m)
    assert int(moved[0, 0, 0]) == 255
    assert int(y[0, 0, 0, 0]) == 7
    turn: dict[str, Any] = {"degrees": (45, 45), "crop": "none"}
    _, moved = Augment((H, W), mask_fill=255, **turn)(x, m)
    assert int(moved[0, 0, 0]) == 255
    _, moved = Augment((H, W), **turn)(x, m)
    assert int(moved[0, 0, 0]) == 0
    # Instances are filled with nothing: those beside boxes, and boolean masks.
    each = [{"boxes": box(), "masks": tv().Mask(torch.ones(1, H, W, dtype=torch.uint8))}] * N
    _, found = Augment((H, W), mask_fill=255, **turn)(x, each)
    assert found[0]["masks"].unique().tolist() == [0, 1]
    _, found = Augment((H, W), mask_fill=255, **turn)(x, tv().Mask(torch.ones(N, H, W).bool()))
    assert not bool(found[0, 0, 0])


@pytest.mark.parametrize("fill_mode", ["reflect", "symmetric", "border", "wrap"])
def test_masks_follow_the_fill_mode_of_the_images(fill_mode: str) -> None:
    m = tv().Mask((torch.rand(N, H, W) < 0.5).long())
    x = tv().Image((m.as_subclass(Tensor) * 255)[:, None].to(torch.uint8))
    augment = Augment(
        (H, W), degrees=(30, 30), crop="none", fill_mode=fill_mode, interpolation="nearest",
        out_dtype=torch.uint8,
    )  # fmt: skip
    y, moved = augment(x, m)
    assert torch.equal((y.as_subclass(Tensor)[:, 0] > 127).long(), moved.as_subclass(Tensor))
    chain = Compose([v2().RandomCrop((H, W), padding=20, padding_mode="reflect")])
    y, moved = chain(x, m)
    assert torch.equal((y.as_subclass(Tensor)[:, 0] > 127).long(), moved.as_subclass(Tensor))


def test_floating_masks_can_be_interpolated_and_a_second_image_has_its_own_interpolation() -> None:
    x, soft = images(), tv().Mask(torch.rand(N, 2, H, W))
    depth = tv().Image(torch.rand(N, 1, H, W))
    turn: dict[str, Any] = {"degrees": (9, 9), "crop": "none", "brightness": (0.2, 0.2)}
    augment = Augment((H, W), mask_interpolation="bilinear", image_interpolation="nearest", **turn)
    params = augment.sample_params(N, input_size=(H, W), sample_ids=range(N))
    _, (moved, map_) = augment(x, (soft, depth), params=params)
    torch.testing.assert_close(plain(moved), params.warp(plain(soft)))
    torch.testing.assert_close(plain(map_), params.warp(plain(depth), interpolation="nearest"))
    _, map_ = Augment((H, W), **turn)(x, depth, params=params)
    torch.testing.assert_close(plain(map_), params.warp(plain(depth)))


@pytest.mark.parametrize("count", [0, 1, 65, 200])
def test_any_number_of_instances(count: int) -> None:
    m = tv().Mask(torch.randint(0, 2, (count, H, W), dtype=torch.uint8))
    _, moved = FLIPS["Augment"]()(images(), [{"masks": m}, {"masks": m}])
    assert torch.equal(plain(moved[1]["masks"]), plain(m).flip(2))
    channels = tv().Mask(torch.randint(0, 2, (N, max(1, count), H, W), dtype=torch.uint8))
    _, moved = FLIPS["Augment"]()(images(), channels)
    assert torch.equal(plain(moved), plain(channels).flip(3))


# --- boxes and points ---


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_of_every_format_keep_it(form: str) -> None:
    corners = box((5.0, 6, 30, 20), (0, 0, 60, 40))
    given = f().convert_bounding_box_format(corners, new_format=form)
    _, moved = FLIPS["Augment"]()(images(), [given, given])
    assert moved[0].format == given.format
    back = f().convert_bounding_box_format(moved[1], new_format="XYXY")
    torch.testing.assert_close(plain(back), plain(f().horizontal_flip(corners)))


def test_rotated_boxes_move_by_their_corners_or_are_refused() -> None:
    given = box((10.0, 10, 30, 10, 30, 20, 10, 20), form="XYXYXYXY")
    _, moved = FLIPS["Augment"]()(images(), [given, given])
    assert sorted(plain(moved[0]).reshape(4, 2).tolist()) == [
        [30, 10],
        [30, 20],
        [50, 10],
        [50, 20],
    ]
    want = f().horizontal_flip(given)
    assert torch.equal(plain(moved[0]), plain(want)), "the corners' order stays clockwise"
    augment = Augment((H, W), degrees=(90, 90), crop="none", scale=(1, 1))
    params = augment.sample_params(N, input_size=(H, W))
    _, moved = augment(images(), [given, given], params=params)
    centers = plain(given).reshape(1, 4, 2).expand(N, 4, 2) - 0.5
    torch.testing.assert_close(plain(moved[0]).reshape(4, 2), params.keypoints(centers)[0] + 0.5)
    for form in ("XYWHR", "CXCYWHR"):
        tilted = box((10.0, 10, 20, 10, 15), form=form)
        with pytest.raises(ValueError, match=rf"targets\[0\] must be boxes .* got {form}"):
            FLIPS["Augment"]()(images(), [tilted, tilted])


def test_what_passes_through_is_left_alone_by_transforms_that_are_called() -> None:
    called = Compose([v2().RandomApply([v2().RandomHorizontalFlip(1.0)], 1.0)], passthrough=["m"])
    target = {"m": masks(), "each": [{"m": mask()}, {"m": mask()}], "other": masks()}
    _, moved = called(images(), target)
    assert moved["m"] is target["m"]
    assert moved["each"][1]["m"] is target["each"][1]["m"]
    assert torch.equal(plain(moved["other"]), plain(target["other"]).flip(2))


def test_targets_that_were_given_are_not_changed() -> None:
    call = v2().RandomApply([v2().RandomAffine(30)], 1.0)
    for chain in ([call], [v2().RandomRotation(40)], [v2().Resize(17), call]):
        given = [{"boxes": box((-9.0, 0, 30, 30)), "labels": torch.tensor([1])} for _ in range(N)]
        before = [(g["boxes"].clone(), g["boxes"].clamping_mode) for g in given]
        Compose(chain, min_visibility=0.9, min_area=3)(images(), given)
        for target, (boxes, mode) in zip(given, before, strict=True):
            assert torch.equal(plain(target["boxes"]), plain(boxes))
            assert target["boxes"].clamping_mode == mode
            assert target["labels"].tolist() == [1]


def test_mappings_that_cannot_be_written_come_back_as_dicts() -> None:
    _, moved = FLIPS["Augment"]()(images(), MappingProxyType({"m": masks()}))
    assert type(moved) is dict


def test_small_boxes_are_left_out_with_their_rows() -> None:
    crop = Compose([v2().CenterCrop((20, 30))], min_area=50, min_visibility=0.3)
    target = {
        "boxes": box((0.0, 0, 10, 9), (20, 12, 40, 28), (15, 10, 19, 14), (10, 10, 18, 38)),
        "labels": torch.tensor([1, 2, 3, 4]),
        "masks": tv().Mask(torch.arange(4)[:, None, None].expand(4, H, W).clone()),
        "mask": tv().Mask(torch.zeros(H, W)),
        "image_id": torch.tensor([7, 8, 9, 10]),
        "area": torch.tensor([1.0, 2, 3, 4]),
    }
    _, (moved, _) = crop(images(), [target, target])
    assert moved["labels"].tolist() == [2]
    assert moved["boxes"].shape == (1, 4)
    assert moved["masks"].shape == (1, 20, 30)
    assert int(moved["masks"].max()) == 1
    assert moved["mask"].shape == (20, 30)
    assert moved["area"].tolist() == [2]
    assert moved["image_id"].tolist() == [7, 8, 9, 10], "its key is none of rows="
    # All are kept where nothing is asked for.
    _, (moved, _) = Compose([v2().CenterCrop((20, 30))])(images(), [target, target])
    assert moved["labels"].tolist() == [1, 2, 3, 4]
    only = Compose([v2().CenterCrop((20, 30))], min_area=50, rows=["labels"])
    _, (moved, _) = only(images(), [target, target])
    assert moved["labels"].tolist() == [2, 4]
    assert len(moved["area"]) == 4
    _, moved = only(images(), [(target["boxes"], target["labels"])] * N)
    assert moved[0][1].tolist() == [2, 4], "a tuple's vector beside the boxes"
    columns = {"boxes": [target["boxes"]] * N, "labels": [target["labels"]] * N}
    _, moved = only(images(), columns)
    assert moved["labels"][1].tolist() == [2, 4]
    target["labels"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"\['labels'\] must have a row for each of the 4 boxes"):
        only(images(), [target, target])


def test_a_mask_with_as_many_rows_as_there_are_boxes_keeps_them() -> None:
    x = tv().Image(torch.zeros(1, 3, 4, 4))
    boxes = tv().BoundingBoxes(
        torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0]]),
        format="XYXY",
        canvas_size=(4, 4),
    )
    target = {"boxes": boxes, "masks": tv().Mask(torch.zeros(4, 4))}
    _, (moved,) = Compose([RandomHorizontalFlip()], min_area=1)(x, [target])
    assert len(moved["boxes"]) == 3
    assert moved["masks"].shape == (4, 4)


@pytest.mark.parametrize("through", ["fused", "called", "two passes"])
def test_visibility_is_of_the_whole_chain(through: str) -> None:
    """Two crops that each leave more than half of a box leave less than half together."""
    crops = [v2().CenterCrop((40, 40)), v2().CenterCrop((40, 20))]
    if through == "called":
        crops = [v2().RandomApply([c], p=1.0) for c in crops]
    if through == "two passes":
        crops.insert(1, v2().ColorJitter(0.1))
    target = {"boxes": box((0.0, 0, 30, 40), (20, 0, 40, 40)), "labels": torch.tensor([1, 2])}
    _, moved = Compose(crops, min_visibility=0.5)(images(), [target, target])
    assert moved[0]["labels"].tolist() == [2]
    assert moved[0]["boxes"].tolist() == [[0, 0, 20, 40]]


def test_points_follow_the_centers_of_pixels() -> None:
    """The point of a bright pixel is where that pixel has gone."""
    x = torch.zeros(N, 1, H, W)
    x[:, 0, 4, 3] = 1
    augment = Augment((H, W), degrees=(180, 180), crop="none")
    y, moved = augment(tv().Image(x), [points(), points()])
    assert moved[0].tolist() == [[56, 35]]
    assert float(plain(y)[0, 0, 35, 56]) == pytest.approx(1)


def test_pairs_of_points_change_places_and_points_that_left_are_not_visible() -> None:
    target = {
        "keypoints": points((3.0, 4), (50.0, 6), (30.0, 9)),
        "visibility": torch.tensor([2, 1, 2]),
    }
    flip = Augment((H, 30), hflip=1.0, crop="center", keypoint_pairs=[(0, 1)])
    _, (moved, _) = flip(images(), [target, target])
    assert moved["keypoints"].tolist() == [[59 - 50 - 15, 6], [59 - 3 - 15, 4], [59 - 30 - 15, 9]]
    assert moved["visibility"].tolist() == [0, 0, 2]
    assert moved["keypoints"].canvas_size == (H, 30)
    people = tv().KeyPoints(torch.rand(2, 3, 2) * 20, canvas_size=(H, W))
    _, moved = flip(images(), [people, people])
    want = torch.stack([59 - 15 - plain(people)[..., 0], plain(people)[..., 1]], -1)[:, [1, 0, 2]]
    torch.testing.assert_close(plain(moved[1]), want)
    with pytest.raises(ValueError, match=r"keypoint_pairs must be below the 1 points"):
        flip(images(), [points(), points()])
    seen = Augment((H, W), hflip=1.0).sample_params(1, input_size=(H, W))
    coco = seen.keypoints(torch.tensor([[[3.0, 4, 2], [-9.0, 0, 1]]]))
    assert coco.tolist() == [[[56, 4, 2], [68, 0, 0]]]


# --- what is not understood ---


class Holder:
    def __init__(self) -> None:
        self.boxes = torch.zeros(3, 4)


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = [box()]


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (lambda: torch.zeros(N, H, W), "targets"),
        (lambda: torch.zeros(N, 3, 4), "targets"),
        (lambda: torch.zeros(N, 5, 2), "targets"),
        (lambda: torch.tensor([[1.0, 2, 30, 40]] * N), "targets"),
        (lambda: torch.tensor([[1, 2, 30, 40]] * N), "targets"),
        (lambda: torch.tensor([[0.1, 0.2, 0.3, 0.9]] * N), "targets"),
        (lambda: torch.rand(N, 10) * 60, "targets"),
        (lambda: torch.zeros(N, H, W).numpy(), "targets"),
        (lambda: {"boxes": torch.zeros(N, 4)}, r"targets\['boxes'\]"),
        (lambda: [{"boxes": torch.zeros(3, 4), "labels": torch.zeros(3)}] * N, r"\['boxes'\]"),
        (lambda: [{"masks": torch.zeros(3, H, W)}] * N, r"targets\[0\]\['masks'\]"),
        (lambda: [{"bbox": [1.0, 2.0, 3.0, 4.0]}] * N, r"targets\[0\]\['bbox'\]\[0\]"),
        (lambda: [{"keypoints": torch.zeros(3)}] * N, r"\['keypoints'\]"),
        (lambda: Record([torch.full((3, 4), 7.0)] * N, 1), r"targets.first\[0\]"),
        (lambda: (masks(), torch.zeros(N, H, W)), r"targets\[1\]"),
        (lambda: [Holder()] * N, r"targets\[0\] is a Holder"),
        (lambda: [Slotted()] * N, r"targets\[0\] is a Slotted"),
        (lambda: deque([box(), box()]), "targets is a deque"),
        (lambda: {"x": SimpleNamespace(y={"boxes": box()})}, r"\['x'\] is a SimpleNamespace"),
        (lambda: [tv().TVTensor(torch.zeros(3, 4))] * N, r"targets\[0\] is a tv_tensor"),
    ],
)
@pytest.mark.parametrize("through", ["Augment", "Compose", "RandomApply"])
def test_what_would_have_to_move_is_an_error_that_names_it(
    through: str, target: Callable[[], Any], place: str
) -> None:
    with pytest.raises(ValueError, match=place):
        FLIPS[through]()(images(), target())


def test_what_cannot_move_is_let_through_where_that_is_asked_for() -> None:
    target = {"boxes": torch.zeros(N, 3, 4), "m": masks()}
    flip = [RandomHorizontalFlip(1.0)]
    _, moved = Compose(flip, passthrough=True)(images(), target)
    assert moved["boxes"] is target["boxes"]
    assert torch.equal(plain(moved["m"]), plain(target["m"]).flip(2))
    _, moved = Compose(flip, passthrough=["boxes", "m"])(images(), target)
    assert moved["m"] is target["m"]
    with pytest.raises(ValueError, match=r"\['boxes'\]"):
        Compose(flip, passthrough=["m"])(images(), target)
    # Nothing moves: nothing has to.
    still = Compose([v2().ColorJitter(0.5)])
    assert torch.equal(still(images(), target)[1]["boxes"], target["boxes"])
    assert Augment((H, W), brightness=0.5)(images(), target)[1]["boxes"] is target["boxes"]


@pytest.mark.parametrize(
    "labels",
    [
        lambda: torch.arange(N),
        lambda: torch.rand(N),
        lambda: torch.rand(N, 1) * 100,
        lambda: torch.eye(4)[:N],
        lambda: torch.tensor([[0.25, 0.25, 0.5, 0.0]] * N),
        lambda: torch.rand(N, 10),
        lambda: torch.randint(0, 2, (N, 4)),
        lambda: torch.randint(0, 9999, (N, 77)),
        lambda: ["a", "b"],
        lambda: (
            [{"labels": torch.arange(5), "image_id": torch.tensor([3]), "area": torch.rand(5)}] * N
        ),
        lambda: {"class": [1, 2], "box_labels": torch.arange(N)},
        lambda: {"input_ids": torch.randint(0, 99, (N, 7)), "attention_mask": torch.ones(N, 7)},
        lambda: {"checkbox": 3, "box_id": [1, 2]},
        lambda: object(),
        lambda: 3,
    ],
)
def test_labels_come_back_as_they_are(labels: Callable[[], Any]) -> None:
    given = labels()
    for through in FLIPS:
        _, got = FLIPS[through]()(images(), given)
        assert types_of(got) == types_of(given)
        for a, b in zip(leaves(got), leaves(given), strict=True):
            assert a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (lambda: tv().Mask(torch.zeros(N, H, W + 1)), r"targets, a Mask, must have shape \(2, \[K"),
        (lambda: [mask(), tv().Mask(torch.zeros(3, 3))], r"targets\[1\], a Mask, must have shape"),
        (lambda: tv().Mask(torch.zeros(H, W)), "targets, a Mask"),
        (lambda: {"x": [box()]}, r"targets\['x'\]\[0\] must be one tv_tensors\.BoundingBoxes"),
        (lambda: [points()] * 3, r"targets\[0\] must be KeyPoints \(2, ..., 2\) or one for each"),
        (lambda: tv().Image(torch.zeros(N, H, W)), "targets, a Image"),
        (lambda: (masks(), masks()), "targets may be 2 values of the whole batch or one for each"),
    ],
)
def test_targets_of_other_shapes_are_named(target: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FLIPS["Augment"]()(images(), target())


def test_a_function_of_the_images_alone_refuses_what_would_have_to_move() -> None:
    chain = Compose([lambda batch: batch.flip(-1)])
    with pytest.raises(ValueError, match="targets, Mask, would have to move with the images"):
        chain(images(), masks())
    assert chain(images(), torch.arange(N))[1].tolist() == [0, 1]
    values = Compose([v2().Lambda(lambda image: image // 2, tv().Image)])
    x, m = images(), masks()
    y, moved = values(x, m)
    assert torch.equal(plain(y), plain(x) // 2)
    assert torch.equal(plain(moved), plain(m))


@pytest.mark.parametrize("arguments", [
    {"mask_interpolation": "lanczos"}, {"min_area": -1}, {"min_visibility": 2.0},
    {"keypoint_pairs": [(1,)]}, {"keypoint_pairs": [(0, -1)]}, {"rows": "labels"},
    {"passthrough": 3}, {"mask_fill": "x"}, {"mask_filling": 3}, {"image_interpolation": 7},
])  # fmt: skip
def test_bad_rules(arguments: dict[str, Any]) -> None:
    for make in (lambda **k: Augment(8, **k), lambda **k: Compose([], **k)):
        with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
            make(**arguments)


# --- loaders ---


@pytest.mark.parametrize("through", FLIPS)
def test_collate_keeps_the_types_and_moves_them(through: str) -> None:
    collate = FLIPS[through]().collate
    m = [mask(), mask()]
    y, moved = collate([(sample(i), m[i]) for i in range(N)])
    assert type(moved) is tv().Mask
    assert torch.equal(plain(moved), torch.stack([plain(v) for v in m]).flip(2))
    y, boxes, labels = collate(
        [(sample(0), box(), 1), (sample(1), box((1.0, 2, 3, 4), (0, 0, 1, 1)), 2)]
    )
    assert type(y) is tv().Image
    assert boxes[0].tolist() == [[50, 0, 60, 10]]
    assert boxes[1].tolist() == [[57, 2, 59, 4], [59, 0, 60, 1]]
    assert list(labels) == [1, 2]
    y, target = collate(
        [(sample(i), {"boxes": box(), "labels": torch.tensor([i])}) for i in range(N)]
    )
    assert [b.tolist() for b in target["boxes"]] == [[[50, 0, 60, 10]]] * 2
    assert [t.tolist() for t in target["labels"]] == [[0], [1]]
    y, third, mask_ = collate([(sample(i), i, m[i]) for i in range(N)])
    assert torch.equal(plain(mask_), torch.stack([plain(v) for v in m]).flip(2))
    assert third.tolist() == [0, 1]
    (y,) = collate([(sample(0),), (sample(1),)])
    assert y.shape == (N, 3, H, W)


def test_collate_takes_samples_that_are_mappings() -> None:
    flip = FLIPS["Augment"]()
    given = [{"label": i, "image": sample(i), "mask": mask(), "name": f"n{i}"} for i in range(N)]
    batch = flip.collate(given)
    assert list(batch) == ["label", "image", "mask", "name"]
    assert batch["image"].shape == (N, 3, H, W)
    assert batch["label"].tolist() == [0, 1]
    assert torch.equal(plain(batch["mask"])[0], plain(given[0]["mask"]).flip(1))
    assert list(batch["name"]) == ["n0", "n1"]
    mixing = Augment((H, W), mix=Mix(mixup=1.0, num_classes=3))
    assert mixing.collate([{"pixel_values": sample(i), "labels": i} for i in range(N)])[
        "labels"
    ].shape == (N, 3)
    assert flip.collate([{"x": sample(i)} for i in range(N)])["x"].shape == (N, 3, H, W)
    with pytest.raises(TypeError, match="a sample must have its image at one of the keys"):
        flip.collate([{"x": 1}])


@pytest.mark.parametrize("through", [*FLIPS, "resized"])
def test_collate_moves_targets_of_images_of_several_sizes(through: str) -> None:
    resized: dict[str, Any] = {
        "resized": lambda: Compose([v2().RandomHorizontalFlip(1.0), v2().Resize((H, W))])
    }
    crop = Compose([v2().CenterCrop((20, 30)), FLIPS[through]()]) if through in (
        "a transform", "Compose", "Compose of torchvision's"
    ) else None  # fmt: skip
    chain = crop or {**FLIPS, **resized}[through]()
    if through in ("a nested v2.Compose", "RandomApply", "RandomChoice", "RandomOrder"):
        return  # these keep the size, and images of several sizes are no batch
    sizes = [(40, 60), (36, 70)]
    given = []
    for i, size in enumerate(sizes):
        b = tv().BoundingBoxes([[0.0, 0, size[1], size[0] / 2]], format="XYXY", canvas_size=size)
        given.append(
            (
                tv().Image(torch.zeros(3, *size)),
                {"boxes": b, "m": tv().Mask(torch.zeros(size)), "y": i},
            )
        )
    y, target = chain.collate(given)
    assert y.shape[-2:] == target["boxes"][0].canvas_size
    assert [m.shape for m in target["m"]] == [y.shape[-2:]] * 2
    assert [float(b[0, 2]) for b in target["boxes"]] == [y.shape[-1]] * 2
    assert [float(b[0, 3]) for b in target["boxes"]] == [y.shape[-2] / 2] * 2


def test_one_image_has_targets_of_its_own() -> None:
    flip: Transform = RandomHorizontalFlip(1.0)
    image, given = sample(1), {"boxes": box(), "label": 3}
    y, moved = flip(image, given)
    assert type(y) is tv().Image
    assert y.shape == (3, H, W)
    assert moved["boxes"].tolist() == [[50, 0, 60, 10]]
    assert moved["label"] == 3


# --- transforms that are called ---

MOVING: dict[str, Callable[[], Any]] = {
    "RandomPerspective": lambda: v2().RandomApply(
        [v2().RandomPerspective(0.5, p=1.0, fill=filling())], p=1.0
    ),
    "perspective, nearest": lambda: v2().RandomApply(
        [v2().RandomPerspective(0.3, p=1.0, interpolation=v2().InterpolationMode.NEAREST)], p=1.0
    ),
    "ElasticTransform": lambda: v2().ElasticTransform(30.0),
    "RandomZoomOut": lambda: v2().RandomZoomOut(filling(), p=1.0, side_range=(1.5, 1.5)),
    "RandomAffine": lambda: v2().RandomApply([v2().RandomAffine((20, 40))], p=1.0),
}


def filling() -> dict[Any, Any]:
    return {tv().Image: 5, tv().Mask: 255, "others": 0}


@pytest.mark.parametrize("name", MOVING)
def test_targets_of_a_transform_that_is_called_are_those_of_torchvision(name: str) -> None:
    """By the numbers of each sample, and other ones for each."""
    transform = MOVING[name]()
    chain = Compose([transform], seed=4)
    x, m = images(3), [mask() for _ in range(3)]
    target = [{"m": m[i], "b": box((9.0, 8, 30, 25)), "k": points((20.0, 11))} for i in range(3)]
    (params,) = chain.sample_params(3, input_size=(H, W), sample_ids=range(3))
    y, moved = chain(x, target, sample_ids=range(3))
    corners = set()
    for i, seed in enumerate(params.seeds.tolist()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            want, theirs = transform(tv().Image(x[i]), target[i])
        assert torch.equal(plain(y[i]), plain(want))
        for key, value in theirs.items():
            assert type(moved[i][key]) is type(value)
            assert torch.equal(plain(moved[i][key]), plain(value)), key
        assert not torch.equal(plain(moved[i]["b"]), plain(target[i]["b"]))
        assert not torch.equal(plain(moved[i]["m"]), plain(target[i]["m"]))
        corners.add(tuple(moved[i]["b"].flatten().tolist()))
    assert len(corners) == 3, "each sample has its own"


# --- plain tensors of one image, as single images, lists and images of several sizes have them ---


def corners(width: int, *rows: tuple[float, ...]) -> Any:
    return tv().BoundingBoxes(rows, format="XYXY", canvas_size=(H, width))


#: Places in an image of this width, which would have to move with it, and values that stay.
PLACES: dict[str, Callable[[int], Any]] = {
    "a mask": lambda w: torch.arange(H * w).reshape(H, w),
    "a mask of bytes": lambda w: torch.zeros(H, w, dtype=torch.uint8),
    "a map of numbers": lambda w: torch.rand(H, w),
    "masks": lambda w: torch.zeros(3, H, w, dtype=torch.bool),
    "a box": lambda w: torch.tensor([3.0, 4.0, 9.0, 8.0]),
    "boxes": lambda w: torch.tensor([[3.0, 4.0, 9.0, 8.0]] * 3),
    "a mask of NumPy": lambda w: np.zeros((H, w), dtype=np.int64),
    "a mask beside boxes": lambda w: {"b": corners(w, (1.0, 2, 3, 4)), "m": torch.zeros(H, w)},
    "a mask beside a mask": lambda w: {"a": tv().Mask(torch.zeros(H, w)), "m": torch.zeros(H, w)},
}
STAY: dict[str, Callable[[int], Any]] = {
    "an index": lambda w: torch.tensor(3),
    "one hot": lambda w: torch.eye(4)[1],
    "tokens": lambda w: torch.arange(77),
    "labels by their key": lambda w: {"labels": torch.tensor([1, 0])},
    "rows of boxes": lambda w: {
        "boxes": corners(w, (1.0, 2, 3, 4), (2.0, 3, 4, 5)),
        "labels": torch.tensor([3, 7]),
        "area": torch.tensor([4.0, 4.0]),
        "scores": torch.eye(5)[:2],
        "orig_size": torch.tensor([480, 640]),
    },
    "rows of masks": lambda w: {"m": tv().Mask(torch.zeros(2, H, w)), "kind": torch.eye(7)[:2]},
}


def through_each_way(target: Callable[[int], Any]) -> Iterator[Callable[[], Any]]:
    """A single image, a list of each image's, and images of several sizes in collate."""
    flip = Compose([RandomHorizontalFlip(1.0), CenterCrop((H, W))])
    first, wide = images(1)[0], torch.zeros(3, H, W + 1, dtype=torch.uint8)
    samples = [(first, target(W)), (wide, target(W + 1))]
    yield lambda: flip(first, target(W))
    yield lambda: flip(images(2), [target(W), target(W)])
    yield lambda: flip.collate(samples)
    yield lambda: Augment((H, W), hflip=1.0, crop="none").collate(samples)


@pytest.mark.parametrize("name", PLACES)
def test_places_in_one_image_are_refused_however_the_image_comes(name: str) -> None:
    for call in through_each_way(PLACES[name]):
        with pytest.raises(ValueError, match="is a plain tensor or array"):
            call()


@pytest.mark.parametrize("name", STAY)
def test_values_of_one_image_stay_however_the_image_comes(name: str) -> None:
    for call in through_each_way(STAY[name]):
        call()
