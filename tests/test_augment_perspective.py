"""Perspective: torchvision's RandomPerspective in the kernel, with its targets and its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import augment_reference as reference
from conftest import Backend
from fusereg import augment as A
from fusereg.augment import (
    Augment,
    AugmentParams,
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomRotation,
)
from target_cases import f, tv, v2

H, W = 37, 52


def drawn(n: int, size: tuple[int, int] = (H, W), distortion: float = 0.5) -> AugmentParams:
    chain = RandomPerspective(distortion, 1.0, seed=5)
    (params,) = chain.sample_params(n, input_size=size, sample_ids=range(n))
    assert isinstance(params, AugmentParams)
    return params


def from_corners(params: AugmentParams) -> Tensor:
    """The maps [N, 3, 3] in torchvision's coordinates: a pixel's corner is where its index says."""
    half = torch.eye(3, dtype=torch.float64)
    half[:2, 2] = 0.5
    h = half @ params.homographies @ torch.linalg.inv(half)
    return h / h[:, 2:, 2:]


def coefficients(params: AugmentParams) -> list[list[float]]:
    return [h.flatten()[:8].tolist() for h in from_corners(params)]


def smooth(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    coarse = torch.rand(n, 3, 5, 6, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().to(dtype) if dtype is torch.uint8 else fine.to(dtype)


# --- the kernel; test_augment.py has perspectives among its records as well ---


def test_a_perspective_without_one_is_the_affine_map(backend: Backend) -> None:
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64).to(backend.device)
    m = torch.tensor([[0.9, 0.2, 0.3], [-0.1, 1.1, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for scale in (1.0, -4.0):  # a map is the same times any number
        assert torch.equal(A.warp_perspective(x, m * scale), A.warp_affine(x, m[:2]))


@pytest.mark.sanitizer
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_values_and_gradients_are_those_of_the_reference(
    interpolation: str, backend: Backend
) -> None:
    # The second one's horizon crosses the result.
    tilts = torch.tensor([[0.013, -0.008], [-0.06, 0.011]], dtype=torch.float64)
    for fill_mode in reference.FILL_MODES:
        x = torch.rand(2, 2, 7, 9, dtype=torch.float64)
        records = reference.identity_records(2, torch.eye(2, 3) + 0.2 * torch.randn(2, 2, 3))
        records[:, reference.PERSPECTIVE :] = tilts
        matrix = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
        matrix[:, :2] = records[:, :6].reshape(2, 2, 3)
        matrix[:, 2, :2] = tilts
        options = {"interpolation": interpolation, "fill_mode": fill_mode}
        own, theirs = (t.requires_grad_() for t in (x.clone().to(backend.device), x.clone()))
        y = A.warp_perspective(own, matrix, (8, 20), fill=0.3, **options)
        wanted = reference.augment(
            theirs, records, size=(8, 20), fill=[0.3] * 2, scale=[1.0] * 2, shift=[0.0] * 2,
            erase=[0.0] * 2, antialias=False, color=False, **options,
        )  # fmt: skip
        assert torch.allclose(y.cpu(), wanted, atol=1e-10)
        g = torch.randn(wanted.shape, dtype=torch.float64)
        y.backward(g.to(y.device))
        wanted.backward(g)
        assert own.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(own.grad.cpu(), theirs.grad, atol=1e-9)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (torch.eye(3)[:2], ValueError, r"shape \(1, 3, 3\) or \(3, 3\)"),
        (torch.eye(3).long(), ValueError, "floating-point"),
        (torch.eye(3).fliplr(), ValueError, "last element that is not zero"),
        ([[1.0]], TypeError, "matrix must be a torch.Tensor"),
        (torch.eye(3).requires_grad_(), ValueError, "gets no gradient"),
    ],
)
def test_bad_matrices_are_named(matrix: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        A.warp_perspective(torch.rand(1, 3, 4, 4), matrix)


# --- torchvision's ---


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_images_are_those_of_torchvision(interpolation: str, dtype: torch.dtype) -> None:
    x = smooth(8, dtype)
    params = drawn(8)
    y = params.warp(x, interpolation=interpolation)
    mode = v2().InterpolationMode(interpolation)
    limit = 1.0 if dtype is torch.uint8 else 2e-3
    for image, mine, c in zip(x, y, coefficients(params), strict=True):
        theirs = f().perspective(image, None, None, interpolation=mode, coefficients=c)
        # Its grid is of float32; at the rim it blends with the fill twice.
        far = (mine.double() - theirs.double()).abs() > limit
        share = 0.06 if interpolation == "bilinear" else 0.002
        assert float(far.double().mean()) < share
        inside = f().perspective(torch.ones_like(image) * 100, None, None, coefficients=c) == 100
        assert not bool((far & inside).any()) or interpolation == "nearest"


def test_masks_boxes_and_points_are_those_of_torchvision() -> None:
    boxes = torch.tensor([[3.0, 4, 20, 15], [30, 20, 50, 36], [0, 0, 52, 37]])
    points = torch.tensor([[3.0, 4.0], [30.0, 20.0], [51.0, 36.0]])
    params = drawn(6)
    labels = torch.randint(0, 9, (6, 3, 4)).repeat_interleave(13, 1).repeat_interleave(13, 2)
    labels = labels[:, :H, :W].contiguous()
    targets = {
        "mask": tv().Mask(labels),
        "boxes": [tv().BoundingBoxes(boxes, format="XYXY", canvas_size=(H, W))] * 6,
        "points": [tv().KeyPoints(points, canvas_size=(H, W))] * 6,
    }
    chain = Compose([v2().RandomPerspective(0.5, p=1.0, fill={tv().Image: 3, tv().Mask: 7})])
    x = tv().Image(smooth(6, torch.uint8))
    _, moved = chain(x, targets, params=[params])
    for i, c in enumerate(coefficients(params)):
        mask = f().perspective_mask(labels[i], None, None, fill=7, coefficients=c)
        assert float((torch.as_tensor(moved["mask"][i]) != mask).double().mean()) < 0.004
        theirs = f().perspective_bounding_boxes(
            boxes, tv().BoundingBoxFormat.XYXY, (H, W), None, None, coefficients=c
        )
        assert torch.allclose(torch.as_tensor(moved["boxes"][i]), theirs, atol=2e-3)
        # Points are at the centers of pixels, torchvision's at their corners.
        corners = f().perspective_keypoints(points + 0.5, (H, W), None, None, coefficients=c)
        inside = ((corners >= 0) & (corners <= torch.tensor([W, H]))).all(1)  # it cuts the others
        near = (torch.as_tensor(moved["points"][i]) + 0.5 - corners).abs() < 2e-3
        assert bool(near[inside].all())


@pytest.mark.parametrize(("size", "distortion"), [((16, 20), 0.5), ((15, 9), 0.7)])
def test_corners_are_drawn_as_those_of_torchvision(
    size: tuple[int, int], distortion: float
) -> None:
    (h, w), n = size, 4000
    params = drawn(n, size, distortion)
    ends = torch.tensor([[0.0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]], dtype=torch.float64)
    back = torch.linalg.inv(from_corners(params))
    at = torch.cat([ends, torch.ones(4, 1, dtype=torch.float64)], 1) @ back.transpose(1, 2)
    corners = at[..., :2] / at[..., 2:]
    moved = torch.stack([corners[:, [0, 3], 0], w - 1 - corners[:, [1, 2], 0]], 1).flatten(1)
    whole = moved.round()
    assert float((moved - whole).abs().max()) < 1e-6
    most = int(distortion * (w // 2))
    assert (int(whole.min()), int(whole.max())) == (0, most)
    share = torch.stack([(whole == k).double().mean(0) for k in range(most + 1)])
    # Six standard deviations.
    assert float((share - 1 / (most + 1)).abs().max()) < 6 * (1 / (most + 1) / n) ** 0.5
    correlation = torch.corrcoef(whole.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 6 / n**0.5


def test_samples_are_changed_with_their_probability_by_their_ids() -> None:
    chain = RandomPerspective(p=0.3, seed=2)
    (params,) = chain.sample_params(3000, input_size=(H, W), sample_ids=range(3000))
    tilted = (params.records[:, 28:] != 0).any(1)
    assert abs(float(tilted.double().mean()) - 0.3) < 6 * (0.21 / 3000) ** 0.5
    x = smooth(5)
    y = chain(x, sample_ids=[7, 1, 5, 3, 9])
    assert torch.equal(chain(x.flip(0), sample_ids=[9, 3, 5, 1, 7]).flip(0), y)


def test_images_too_small_to_tilt_stay() -> None:
    for size in ((1, 1), (1, 8), (2, 2)):
        x = torch.rand(4, 3, *size)
        assert (
            torch.equal(RandomPerspective(0.4, 1.0, seed=0)(x)[:, :, :1], x[:, :, :1])
            or size[0] > 1
        )
        assert bool(RandomPerspective(1.0, 1.0, seed=0)(x).isfinite().all())
    params = drawn(500, (9, 9), 1.0)
    flat = torch.linalg.det(params.homographies).abs()
    assert float(flat.min()) > 1e-9
    assert 0 < int((params.records[:, 28:] == 0).all(1).sum()) < 100


# --- in chains ---


def test_a_perspective_is_part_of_one_pass() -> None:
    chain = Compose(
        [RandomHorizontalFlip(0.5), RandomPerspective(0.4, 1.0), RandomRotation(20, "bilinear"),
         CenterCrop((20, 30)), Normalize(0.5, 0.25)], seed=3, merge=True,
    )  # fmt: skip
    assert len(chain.plan().passes) == 1
    x = smooth(4)
    (params,) = chain.sample_params(4, input_size=(H, W), sample_ids=range(4))
    assert isinstance(params, AugmentParams)
    y = chain(x, params=[params])
    # Place by place: the maps one after the other.
    points = torch.tensor([[10.0, 12.0], [25.0, 20.0], [40.0, 30.0]], dtype=torch.float64)
    moved = params.keypoints(points.expand(4, 3, 2))
    assert isinstance(moved, Tensor)
    back = params.inverse().keypoints(moved)
    assert isinstance(back, Tensor)
    assert torch.allclose(back, points.expand(4, 3, 2), atol=1e-9)
    # A point's place shows the point's value.
    for i in range(4):
        for (px, py), (mx, my) in zip(points.tolist(), moved[i].tolist(), strict=True):
            if not (1 <= mx < 28 and 1 <= my < 18):
                continue
            grid = torch.tensor([[[[2 * (mx + 0.5) / 30 - 1, 2 * (my + 0.5) / 20 - 1]]]]).double()
            shown = torch.nn.functional.grid_sample(y[i : i + 1], grid, align_corners=False)
            wanted = (x[i, :, int(py), int(px)] - 0.5) / 0.25
            assert torch.allclose(shown.flatten(), wanted, atol=0.15)


def test_a_filter_and_a_perspective_are_passes_of_their_own_and_the_plan_says_why() -> None:
    for chain in (
        Compose([RandomResizedCrop(20), RandomPerspective()]),
        Compose([RandomPerspective(), RandomResizedCrop(20)]),
    ):
        assert len(chain.plan().passes) == 2
        assert "is interpolated at points, and RandomResizedCrop filters" in str(chain.plan())
    whole = Compose([RandomPerspective(), RandomResizedCrop(20, antialias=False)], merge=True)
    assert len(whole.plan().passes) == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "turn",
    [
        RandomRotation(20, "bilinear", fill=3),
        A.RandomAffine(0, shear=20, interpolation="bilinear"),
        RandomPerspective(0.5, 1.0),
    ],
    ids=["rotation", "shear", "perspective"],
)
def test_a_filtered_resize_and_a_turn_are_one_after_the_other(turn: Any, first: bool) -> None:
    crop = RandomResizedCrop(20)
    x = smooth(4, torch.uint8)
    chain = Compose([turn, crop] if first else [crop, turn], seed=4)
    assert len(chain.plan().passes) == 2
    params = chain.sample_params(4, input_size=(H, W), sample_ids=range(4))
    y = x
    for transform, own in zip(chain.transforms, params, strict=True):
        y = transform(y, params=[own])
    assert torch.equal(chain(x, params=params), y)
    # What stays along the axes can be merged: filtered, and as fast.
    zoom = A.RandomAffine(0, translate=(0.1, 0.1), scale=(0.8, 1.2), interpolation="bilinear")
    assert len(Compose([zoom, crop], merge=True).plan().passes) == 1


def test_states_of_before_there_was_a_perspective_are_read() -> None:
    params = Augment((H, W), degrees=10, crop="none", seed=0).sample_params(3, input_size=(H, W))
    state = params.state_dict()
    old = {**state, "records": state["records"][:, :28]}
    read = AugmentParams.from_state_dict(old)
    assert torch.equal(read.records, params.records)
    state = drawn(3).state_dict()
    assert torch.equal(AugmentParams.from_state_dict(state).records, drawn(3).records)
    assert drawn(3).moves


def test_mirrored_points_of_a_pair_change_places_under_a_perspective() -> None:
    chain = Compose(
        [RandomPerspective(0.5, 1.0), RandomHorizontalFlip(1.0)], seed=1, keypoint_pairs=[(0, 1)]
    )
    x = tv().Image(smooth(1, torch.uint8))
    points = tv().KeyPoints(torch.tensor([[20.0, 18.0], [30.0, 18.0]]), canvas_size=(H, W))
    moved = torch.as_tensor(chain(x, [points])[1][0])
    # The left eye is on the left again.
    assert float(moved[0, 0]) < float(moved[1, 0])
