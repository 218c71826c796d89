"""Boxes beyond the image, fills of masks, samples in other forms: torchvision's conventions."""

from __future__ import annotations

import pytest
import torch

from fusereg.augment import Augment, Compose, RandomHorizontalFlip
from fusereg.augment.tree import plain
from target_cases import H, W, box, f, images, points, tv, v2


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
@pytest.mark.parametrize("mode", ["soft", "hard", None])
def test_boxes_beyond_the_image_are_cut_unless_their_clamping_mode_is_none(
    form: str, mode: str | None
) -> None:
    corners = torch.tensor([[-5.0, -6, 3, 4], [50, 30, 80, 90], [5, 6, 7, 8]])
    boxes = tv().BoundingBoxes(corners, format="XYXY", canvas_size=(H, W), clamping_mode=mode)
    boxes = f().convert_bounding_box_format(boxes, new_format=tv().BoundingBoxFormat[form])
    chain = Compose([v2().RandomHorizontalFlip(1.0), v2().RandomCrop((30, 60))], seed=0)
    params = chain.sample_params(1, input_size=(H, W), sample_ids=[0])
    top = float(params[0].records[0, 5])
    moved = chain(images(1), [boxes], params=params)[1][0]
    assert moved.clamping_mode == mode
    wanted = torch.stack([60 - corners[:, 2], corners[:, 1] - top,
                          60 - corners[:, 0], corners[:, 3] - top], 1)  # fmt: skip
    if mode is not None:
        wanted = wanted.clamp(min=0).minimum(torch.tensor([60.0, 30, 60, 30]))
    got = f().convert_bounding_box_format(moved, new_format=tv().BoundingBoxFormat.XYXY)
    assert torch.allclose(plain(got), wanted)


def test_boxes_that_are_not_cut_are_measured_as_they_are_seen() -> None:
    def left(mode: str | None, **rules: float) -> list[int]:
        boxes = tv().BoundingBoxes(
            torch.tensor([[0.0, 0, 20, 20], [30, 0, 50, 20], [52, 0, 60, 20]]),
            format="XYXY", canvas_size=(H, W), clamping_mode=mode,
        )  # fmt: skip
        chain = Compose([v2().CenterCrop((40, 30)), v2().CenterCrop((40, 28))], **rules)
        target = chain(images(1), [{"boxes": boxes, "labels": torch.arange(3)}])[1][0]
        return target["labels"].tolist()  # type: ignore[no-any-return]

    # Of the middle 28 columns, 16 to 44: the first has 4 of 20, the second 14 of 20 columns.
    for mode in ("soft", None):
        assert left(mode, min_area=1.0) == [0, 1]
        assert left(mode, min_area=100.0) == [1]
        assert left(mode, min_visibility=0.19) == [0, 1]
        assert left(mode, min_visibility=0.21) == [1]
        assert left(mode, min_visibility=0.71) == []


@pytest.mark.parametrize("angle", [10, 24, 45, 73])
def test_boxes_and_points_follow_a_rotation_that_expands(angle: int) -> None:
    # torchvision gives them a canvas that is a pixel less than the image.
    turn = v2().RandomRotation((angle, angle), expand=True)
    x, boxes, corner = images(1), box((0.0, 0, 10, 10)), points((3.0, 4.0))
    y, target = Compose([turn])(x, [{"boxes": boxes, "points": corner}])
    image, wanted, place = turn(x[0], boxes, corner)
    assert torch.equal(plain(y[0]), plain(image))
    assert torch.equal(plain(target[0]["boxes"]), plain(wanted))
    assert torch.equal(plain(target[0]["points"]), plain(place))
    assert target[0]["boxes"].canvas_size == target[0]["points"].canvas_size == y.shape[-2:]
    Compose([turn, v2().Resize((30, 30))])(x, [boxes])


INTEGERS = {torch.bool: (0, 1), torch.uint8: (0, 255), torch.int8: (-128, 127),
            torch.int16: (-32768, 32767), torch.int64: (-100, 2**40)}  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("through", ["targets", "params"])
def test_a_fill_that_a_mask_would_turn_into_another_label_is_refused(
    dtype: torch.dtype, through: str
) -> None:
    flat = torch.zeros(1, H, W, dtype=dtype)

    def labels(fill: float) -> set[int]:
        if through == "params":
            chain = Augment((H, W), degrees=(45, 45), crop="none")
            params = chain.sample_params(1, input_size=(H, W))
            return set(params.mask(flat, fill=fill).long().unique().tolist())
        chain = Augment((H, W), degrees=(45, 45), crop="none", mask_fill=fill)
        return set(plain(chain(images(1), tv().Mask(flat))[1]).long().unique().tolist())

    low, high = INTEGERS[dtype]
    if through == "targets" and dtype is torch.bool:
        assert labels(255) == {0}  # boolean masks are filled with False
        return
    for fill in (low, high, float(high)):
        assert labels(fill) == {0, int(fill)}
    for fill in (0.5, *((low - 1, high + 1) if dtype is not torch.int64 else ())):
        with pytest.raises(ValueError, match="fill must be an integer from"):
            labels(fill)


def test_a_fill_of_floating_images_is_zero_in_masks_of_integers_as_in_torchvision() -> None:
    turn = v2().RandomRotation((45, 45), fill=0.5)
    x, flat = tv().Image(torch.rand(1, 3, H, W)), tv().Mask(torch.ones(1, H, W, dtype=torch.int64))
    moved = Compose([turn])(x, flat)[1]
    assert set(moved.unique().tolist()) == set(turn(flat).unique().tolist()) == {0, 1}


def test_samples_in_other_forms_are_told_where_they_go() -> None:
    flip = Compose([RandomHorizontalFlip(1.0)])
    x = torch.zeros(3, H, W)
    with pytest.raises(TypeError, match=r"got dict; call it with \(images, targets\)"):
        flip({"image": x})
    with pytest.raises(TypeError, match=r"got tuple; call it with \(images, targets\)"):
        flip((x, 1))
    with pytest.raises(TypeError, match=r"got ndarray; give torch.from_numpy"):
        Augment(8)(x.permute(1, 2, 0)[None].numpy())
    clips = [(tv().Video(torch.zeros(t, 3, H, W)), t) for t in (3, 4)]
    with pytest.raises(ValueError, match="one number of frames, got 3, and 4 of sample 1"):
        flip.collate(clips)


def test_boxes_keep_their_dtype_whatever_the_others_of_the_batch_have() -> None:
    dtypes = (torch.float32, torch.float64, torch.float16)
    boxes = [
        tv().BoundingBoxes([[1.0, 2, 5, 6]], format="XYXY", canvas_size=(H, W), dtype=dtype)
        for dtype in dtypes
    ]
    moved = Compose([RandomHorizontalFlip(1.0)])(images(3), boxes)[1]
    assert [b.dtype for b in moved] == list(dtypes)
    assert all(b.tolist() == [[W - 5, 2, W - 1, 6]] for b in moved)


def test_boxes_that_are_not_to_be_cut_are_not_cut_by_a_transform_that_is_called() -> None:
    for mode in ("soft", None):
        boxes = tv().BoundingBoxes(
            [[-4.0, 2, 5, 6]], format="XYXY", canvas_size=(H, W), clamping_mode=mode
        )
        chain = Compose([v2().RandomApply([v2().RandomAffine(0)], p=1.0)], min_visibility=0.1)
        assert "sample by sample" in str(chain.plan())
        (moved,) = chain(images(1), [boxes])[1]
        assert moved.clamping_mode == mode
        assert moved.tolist() == [[-4.0 if mode is None else 0.0, 2, 5, 6]]


def test_samples_that_differ_in_their_keys_or_number_of_values_are_refused() -> None:
    image = torch.zeros(3, 8, 8)
    for first, second in (
        ((image, 1, 2), (image, 1)),
        ((image, 1), (image, 1, 2)),
        ((image, 1), image),
        ({"image": image, "label": 1}, {"image": image, "label": 1, "id": 3}),
        ({"image": image, "label": 1}, {"image": image}),
    ):
        for other in (
            second,
            {**second, "image": image[:, 1:]} if isinstance(second, dict) else second,
        ):
            with pytest.raises(ValueError, match="samples must have the same keys or number of"):
                Augment(8).collate([first, other])
