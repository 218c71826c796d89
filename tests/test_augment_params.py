"""Parameters of augmentation: what is drawn, what it is keyed by, what it composes to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusereg
import reference_philox
from fusereg.augment import Augment, AugmentParams, Erase, Mix

ROTATION, SCALE, FLIP = 1, 2, 6


def words(
    seed: int, epoch: int, operation: int, id: int, occurrence: int = 0
) -> tuple[int, int, int, int]:
    """The words that augment_params.h says are drawn."""
    high = 1 << 31 | occurrence << 8 | operation
    id %= 2**64
    return reference_philox.philox(seed % 2**64, (epoch, high, id % 2**32, id >> 32))


def sample(
    augment: Augment, ids: Sequence[int], size: object = 32, epoch: int = 0
) -> AugmentParams:
    return augment.sample_params(len(ids), input_size=size, sample_ids=ids, epoch=epoch)  # type: ignore[arg-type]


def everything(seed: int = 3) -> Augment:
    return Augment(
        (20, 28),
        degrees=30,
        scale=(0.5, 2.0),
        translate=(0.1, 0.2),
        shear=(-10, 10, -5, 5),
        hflip=0.5,
        vflip=0.5,
        crop="resized",
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        erase=0.5,
        mix=Mix(mixup=0.4, cutmix=1.0, p=0.7),
        seed=seed,
    )


def same(a: AugmentParams, b: AugmentParams) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("records", "draws", "keys", "sample_ids")
    ) and (a.input_size, a.size) == (b.input_size, b.size)


# --- the functions that the composition is made of ---


def ulps(value: float, exact: float) -> float:
    return abs(value - exact) / math.ulp(exact)


def test_elementary_functions() -> None:
    elementary = fusereg._C.augment_elementary
    for x in np.random.default_rng(0).uniform(-720, 720, 2000).tolist():
        sine, cosine, _, _ = elementary(x)
        turn = math.fmod(x, 360)
        # Where it is small the reference loses digits to pi's rounding: absolute error there.
        assert abs(sine - math.sin(math.radians(turn))) < 1e-15
        assert abs(cosine - math.cos(math.radians(turn))) < 1e-15
        _, _, log, _ = elementary(abs(x) / 100)
        assert ulps(log, math.log(abs(x) / 100)) < 3 or abs(log) < 1e-3
        if x < 700:
            assert ulps(elementary(x)[3], math.exp(x)) < 3
    for quarter, want in enumerate([(0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)] * 2):
        assert elementary(90.0 * quarter)[:2] == want
        assert elementary(90.0 * quarter - 720)[:2] == want
    assert ulps(elementary(45.0)[0], math.sqrt(0.5)) <= 1
    assert ulps(elementary(30.0)[0], 0.5) <= 1


# --- keys ---


@pytest.mark.parametrize(("seed", "epoch", "id"), [(0, 0, 0), (-1, 2**32 - 1, -7), (9, 5, 2**62)])
def test_numbers_are_philox_of_seed_epoch_id_and_operation(seed: int, epoch: int, id: int) -> None:
    augment = Augment(8, degrees=(10, 50), scale=(1, 3, 2, 4), hflip=0.3, vflip=0.6, seed=seed)
    drawn = sample(augment, [id], epoch=epoch).drawn()
    angle = 10 + words(seed, epoch, ROTATION, id)[0] / 2**32 * 40
    assert float(drawn["angle"]) == angle
    x, y = words(seed, epoch, SCALE, id)[:2]
    assert float(drawn["scale_x"]) == pytest.approx(1 + x / 2**32 * 2, rel=1e-15)
    assert float(drawn["scale_y"]) == pytest.approx(2 + y / 2**32 * 2, rel=1e-15)
    x, y = words(seed, epoch, FLIP, id)[:2]
    assert bool(drawn["flip_x"]) == (x / 2**32 < 0.3)
    assert bool(drawn["flip_y"]) == (y / 2**32 < 0.6)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12, unique=True), st.data())
def test_a_sample_has_its_numbers_in_every_batch(ids: list[int], data: st.DataObject) -> None:
    augment = everything()
    whole = sample(augment, ids).without_mix()
    order = data.draw(st.permutations(range(len(ids))))
    shuffled = sample(augment, [ids[i] for i in order]).without_mix()
    assert same(shuffled, whole[order])
    cut = data.draw(st.integers(0, len(ids)))
    parts = [sample(augment, part).without_mix() for part in (ids[:cut], ids[cut:])]
    assert same(AugmentParams.cat(parts), whole)


def test_other_seeds_and_epochs_are_other_numbers() -> None:
    ids = range(50)
    base = sample(everything(), ids).matrices
    for other in (sample(everything(4), ids), sample(everything(), ids, epoch=1)):
        assert not (other.matrices == base).flatten(1).all(1).any()


def test_an_argument_does_not_change_what_others_draw() -> None:
    ids = range(20)
    plain = sample(Augment(8, degrees=30, hflip=0.5, seed=1), ids).drawn()
    more = sample(
        Augment(8, degrees=30, hflip=0.5, seed=1, scale=(1, 2), erase=1.0, mix="mixup", shear=3),
        ids,
    ).drawn()
    for name in ("angle", "flip_x", "window_x0", "window_y0"):
        assert torch.equal(plain[name], more[name])


def test_without_ids_samples_are_counted_and_the_count_is_state() -> None:
    augment = everything()
    first = augment.sample_params(4, input_size=32)
    state = augment.state_dict()
    second = augment.sample_params(3, input_size=32)
    assert first.sample_ids.tolist() == [0, 1, 2, 3]
    assert second.sample_ids.tolist() == [4, 5, 6]
    again = everything()
    again.load_state_dict(state)
    assert same(again.sample_params(3, input_size=32), second)


# --- geometry ---


def product(*maps: Sequence[Sequence[float]]) -> np.ndarray:
    result = np.eye(3)
    for m in maps:
        result = result @ np.array([*m, [0, 0, 1]])
    return result[:2]


def reference_matrix(drawn: dict[str, float], w: int, h: int, wo: int, ho: int) -> np.ndarray:
    """Flip, affine and resized crop, each inverted by numpy."""
    flip = [
        [-1, 0, w - 1] if drawn["flip_x"] else [1, 0, 0],
        [0, -1, h - 1] if drawn["flip_y"] else [0, 1, 0],
    ]
    a, sx, sy = (math.radians(drawn[k]) for k in ("angle", "shear_x", "shear_y"))
    rotation = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    scale = np.diag([drawn["scale_x"], drawn["scale_y"]])
    shear = np.array([[1, 0], [-math.tan(sy), 1]]) @ np.array([[1, -math.tan(sx)], [0, 1]])
    linear = rotation @ scale @ shear
    center = np.array([(w - 1) / 2, (h - 1) / 2])
    move = np.array([drawn["translate_x"], drawn["translate_y"]])
    forward = np.eye(3)
    forward[:2, :2] = linear
    forward[:2, 2] = center + move - linear @ center
    x0, y0, x1, y1 = (drawn[f"window_{k}"] for k in ("x0", "y0", "x1", "y1"))
    fx, fy = (x1 - x0) / wo, (y1 - y0) / ho
    crop = [[fx, 0, x0 + fx / 2 - 0.5], [0, fy, y0 + fy / 2 - 0.5]]
    return product(flip, np.linalg.inv(forward)[:2].tolist(), crop)


def test_the_matrix_is_the_product_of_the_inverse_steps() -> None:
    params = sample(everything(), range(40), (37, 51))
    for i in range(40):
        drawn = {k: float(v[i]) for k, v in params.drawn().items()}
        want = reference_matrix(drawn, 51, 37, 28, 20)
        np.testing.assert_allclose(params.matrices[i].numpy(), want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 7), (5, 9), (1, 1)])
def test_quarter_turns_flips_and_whole_pixels_are_exact(h: int, w: int) -> None:
    x = torch.arange(h * w, dtype=torch.float64).reshape(1, 1, h, w)
    for turns, flip_x, flip_y in itertools.product(range(-4, 5), (0, 1), (0, 1)):
        augment = Augment(
            (h, w), degrees=(90.0 * turns,) * 2, hflip=flip_x, vflip=flip_y, crop="center"
        )
        params = sample(augment, [0], (h, w))
        m = params.matrices[0]
        if turns % 2 == 0 or (h + w) % 2 == 0:
            assert torch.equal(m, m.round())
        if turns % 2 and h != w:
            continue
        want = torch.rot90(x.flip([d for d, on in ((3, flip_x), (2, flip_y)) if on]), turns, (2, 3))
        oy, ox = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ix = (m[0, 0] * ox + m[0, 1] * oy + m[0, 2]).long()
        iy = (m[1, 0] * ox + m[1, 1] * oy + m[1, 2]).long()
        assert torch.equal(x[0, 0][iy, ix], want[0, 0])


@pytest.mark.parametrize("crop", ["random", "center", "resized", "none"])
@pytest.mark.parametrize(("h", "w"), [(9, 14), (40, 11), (1, 1)])
def test_windows(crop: str, h: int, w: int) -> None:
    ho, wo = 12, 10
    augment = Augment((ho, wo), crop=crop)
    params = sample(augment, range(300), (h, w))
    drawn = params.drawn()
    x0, y0, x1, y1 = (drawn[f"window_{k}"] for k in ("x0", "y0", "x1", "y1"))
    if crop == "resized":
        assert bool(((x0 >= 0) & (y0 >= 0) & (x1 <= w) & (y1 <= h)).all())
        area = (x1 - x0) * (y1 - y0)
        assert bool((area > 0).all())
        assert params.size == (ho, wo)
        return
    if crop == "none":
        assert {(0.0, 0.0, w, h)} == set(zip(*(v.tolist() for v in (x0, y0, x1, y1)), strict=True))
        return
    assert set((x1 - x0).tolist()) == {wo}
    assert set((y1 - y0).tolist()) == {ho}
    if crop == "center":  # as torchvision: half to even, and rounded down where it is padded
        assert set(x0.tolist()) == {round((w - wo) / 2) if w >= wo else -((wo - w) // 2)}
        assert set(y0.tolist()) == {round((h - ho) / 2) if h >= ho else -((ho - h) // 2)}
    else:  # every place that there is
        assert set(x0.tolist()) == set(range(min(0, w - wo), max(0, w - wo) + 1))
        assert set(y0.tolist()) == set(range(min(0, h - ho), max(0, h - ho) + 1))


def test_resized_windows_have_the_shares_and_ratios_asked_for() -> None:
    augment = Augment(8, crop="resized", crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    drawn = sample(augment, range(2000), (400, 400)).drawn()
    width = drawn["window_x1"] - drawn["window_x0"]
    height = drawn["window_y1"] - drawn["window_y0"]
    share, ratio = width * height / 400**2, width / height
    assert 0.195 < float(share.min()) < 0.21
    assert 0.58 < float(share.max()) < 0.605
    assert abs(float(share.mean()) - 0.4) < 0.01
    assert abs(float(ratio.log().mean())) < 0.03
    assert float(ratio.min()) > 0.49
    assert float(ratio.max()) < 2.03
    # No window of that shape fits: the largest central one of an allowed shape.
    narrow = sample(augment, range(3), (400, 10)).drawn()
    assert set((narrow["window_y1"] - narrow["window_y0"]).tolist()) == {20.0}
    assert set(narrow["window_y0"].tolist()) == {190.0}


# --- boxes that are erased and mixed ---


def test_erased_boxes() -> None:
    augment = Augment(64, erase=Erase(0.75, (0.1, 0.3), (0.5, 2.0)))
    boxes = sample(augment, range(2000), 64).erase_boxes
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = width > 0
    assert abs(float(erased.double().mean()) - 0.75) < 0.04
    share = (width * height)[erased] / 64**2
    assert 0.09 < float(share.min()) < 0.11
    assert 0.28 < float(share.max()) < 0.31
    ratio = (height / width)[erased]
    assert float(ratio.min()) > 0.47
    assert float(ratio.max()) < 2.12
    assert int(boxes.min()) == 0
    assert int(boxes.max()) == 64
    assert len(set(sample(augment, range(50), 64).keys[:, 0].tolist())) == 50


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_weights_are_beta_variates(alpha: float) -> None:
    lam = sample(Augment(8, mix=Mix(mixup=alpha)), range(20000), 8).weights
    variance = 1 / (4 * (2 * alpha + 1))
    assert bool(((lam >= 0) & (lam <= 1)).all())
    assert abs(float(lam.mean()) - 0.5) < 4 * math.sqrt(variance / 20000)
    assert abs(float(lam.var()) / variance - 1) < 0.05
    # A quantile too: of the arc sine law for 1/2, of the uniform for 1.
    if alpha == 1.0:
        assert abs(float((lam < 0.25).double().mean()) - 0.25) < 0.015


def test_cutmix_boxes_and_weights() -> None:
    params = sample(Augment((24, 36), mix=Mix(cutmix=1.0, p=0.5)), range(1000), (24, 36))
    boxes, partners, weights = params.mix_boxes, params.partners, params.weights
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    mixed = partners >= 0
    assert 0.4 < float(mixed.double().mean()) < 0.55
    assert bool((area[mixed] > 0).all())
    assert bool((area[~mixed] == 0).all())
    assert torch.equal(weights, 1 - area.double() / (24 * 36))
    assert int(boxes.min()) >= 0
    assert bool((boxes <= torch.tensor([36, 24, 36, 24])).all())


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True), st.data())
def test_pairs_depend_on_the_set_of_samples_alone(ids: list[int], data: st.DataObject) -> None:
    augment = Augment(8, mix="mixup")
    partners = sample(augment, ids, 8).partners.tolist()
    if len(ids) == 1:
        assert partners == [-1]
        return
    assert sorted(partners) == list(range(len(ids)))
    assert all(p != i for i, p in enumerate(partners))
    pairs = {(ids[i], ids[p]) for i, p in enumerate(partners)}
    order = data.draw(st.permutations(ids))
    again = sample(augment, order, 8).partners.tolist()
    assert {(order[i], order[p]) for i, p in enumerate(again)} == pairs


# --- what one does with them ---


def test_selecting_follows_partners() -> None:
    params = sample(Augment(8, mix="mixup"), range(6), 8)
    i = 2
    j = int(params.partners[i])
    k = int(params.partners[j])
    with pytest.raises(ValueError, match="a selected sample's partner is not selected"):
        params[i]
    assert params.without_mix()[i].partners.tolist() == [-1]
    with pytest.raises(ValueError, match="partner"):
        params[[i, j]]
    order = [5, 4, 3, 2, 1, 0]
    turned = params[order]
    assert [order[p] for p in turned.partners.tolist()] == params.partners[order].tolist()
    assert k >= 0
    both = AugmentParams.cat([params, turned])
    assert both.partners.tolist() == [
        *params.partners.tolist(),
        *(6 + p for p in turned.partners.tolist()),
    ]
    assert len(both) == 12
    assert same(both[6:], turned)
    assert len(params[torch.zeros(6, dtype=torch.bool)]) == 0
    with pytest.raises(IndexError, match="index 6 is out of range for 6"):
        params.without_mix()[6]


def test_cat_refuses_other_sizes() -> None:
    a, b = sample(Augment(8), [0], 8), sample(Augment(8), [0], 9)
    with pytest.raises(ValueError, match=r"same sizes, got \(8, 8\) to \(8, 8\) and \(9, 9\)"):
        AugmentParams.cat([a, b])


def test_state_dict_and_pickle(tmp_path: object) -> None:
    params = sample(everything(), range(5))
    path = f"{tmp_path}/params.pt"
    torch.save(params.state_dict(), path)
    assert same(AugmentParams.from_state_dict(torch.load(path, weights_only=True)), params)
    with pytest.raises(ValueError, match="state lacks keys"):
        AugmentParams.from_state_dict({**{k: 0 for k in params.state_dict() if k != "keys"}})
    with pytest.raises(ValueError, match=r"draws must have shape \(5, 16\), got \(5, 3\)"):
        AugmentParams.from_state_dict({**params.state_dict(), "draws": torch.zeros(5, 3)})


def test_inverse_undoes_the_geometry() -> None:
    params = sample(everything(), range(10), (30, 44))
    back = params.inverse()
    assert (back.input_size, back.size) == ((20, 28), (30, 44))
    for i in range(10):
        there = np.vstack([params.matrices[i].numpy(), [0, 0, 1]])
        here = np.vstack([back.matrices[i].numpy(), [0, 0, 1]])
        np.testing.assert_allclose(there @ here, np.eye(3), atol=1e-11)
    points = torch.rand(10, 7, 2, dtype=torch.float64) * 20
    moved = params.keypoints(points)
    torch.testing.assert_close(back.keypoints(moved), points)
    exact = sample(Augment(8, degrees=(90, 90), hflip=1.0, crop="random"), range(4), 12)
    m = exact.inverse().matrices
    assert torch.equal(m, m.round())


def test_a_keypoint_follows_its_pixel() -> None:
    """A bright pixel, far from the edges, is found where its keypoint says."""
    augment = Augment(
        33, degrees=180, scale=(1.0, 1.6), hflip=0.5, vflip=0.5, crop="center", seed=5
    )
    points = torch.randint(14, 27, (12, 1, 2))
    x = torch.zeros(12, 1, 41, 41)
    for i, (px, py) in enumerate(points[:, 0].tolist()):
        x[i, 0, py, px] = 1
    y, params = augment(x, sample_ids=range(12)), sample(augment, range(12), 41)
    moved = params.keypoints(points)
    assert isinstance(moved, Tensor)
    total = y.sum((1, 2, 3))
    center_x = (y.sum((1, 2)) * torch.arange(33)).sum(1) / total
    center_y = (y.sum((1, 3)) * torch.arange(33)).sum(1) / total
    found = torch.stack([center_x, center_y], 1)
    assert bool((total > 0.5).all())
    # The centroid of the samples of a tent is within its width of the tip.
    assert float((found - moved[:, 0]).abs().max()) < 0.35


def test_boxes() -> None:
    turn = Augment(8, degrees=(90, 90), crop="center")
    params = sample(turn, [0, 1], 8)
    box = torch.tensor([[[1.0, 2.0, 4.0, 3.0]], [[0.0, 0.0, 8.0, 8.0]]])
    want = torch.tensor([[[2.0, 4.0, 3.0, 7.0]], [[0.0, 0.0, 8.0, 8.0]]])
    assert torch.equal(params.boxes(box), want)
    as_list = params.boxes([box[0], box[1]])
    assert torch.equal(torch.stack(as_list), want)  # type: ignore[arg-type]
    size = torch.tensor([[[1.0, 2.0, 3.0, 1.0]], [[0.0, 0.0, 8.0, 8.0]]])
    turned = torch.tensor([[[2.0, 4.0, 1.0, 3.0]], [[0.0, 0.0, 8.0, 8.0]]])
    assert torch.equal(params.boxes(size, format="xywh"), turned)
    center = torch.tensor([[[2.5, 2.5, 3.0, 1.0]], [[4.0, 4.0, 8.0, 8.0]]])
    back = torch.tensor([[[2.5, 5.5, 1.0, 3.0]], [[4.0, 4.0, 8.0, 8.0]]])
    assert torch.equal(params.boxes(center, format="cxcywh"), back)
    crop = sample(Augment(4, crop="center"), [0, 1], 8)
    assert torch.equal(crop.boxes(box), torch.tensor([[[0.0, 0, 2, 1]], [[0, 0, 4, 4]]]))
    assert crop.boxes(box, clip=False)[0].tolist() == [[-1, 0, 2, 1]]
    with pytest.raises(ValueError, match="format must be one of 'xyxy', 'xywh', 'cxcywh'"):
        params.boxes(box, format="yxyx")
    with pytest.raises(ValueError, match=r"boxes must have shape \(2, K, 4\), got \(1, 4\)"):
        params.boxes(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="got 3 tensors for 2 samples"):
        params.keypoints([torch.zeros(1, 2)] * 3)


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 0}, r"size must be positive, got \(0,\)"),
        ({"size": (3, 4, 5)}, r"size must be an integer or \(height, width\), got 3 numbers"),
        ({"size": 2.5}, "size must be an integer, got float"),
        ({"degrees": -3}, r"degrees as one number must be within \[0, inf\], got -3"),
        ({"degrees": (4, 2)}, r"degrees must be \(from, to\) with from <= to"),
        ({"degrees": "x"}, "degrees must be a number, got str"),
        ({"degrees": math.nan}, "degrees must be finite"),
        ({"scale": (0, 1)}, r"scale must be within \(0, inf\]"),
        ({"scale": 2}, r"scale must be \(from, to\), or .*, got int"),
        ({"translate": -0.1}, "translate must be within"),
        ({"translate": 5}, "translate must be within"),
        ({"translate": (0.1, 1.5)}, "translate must be within"),
        ({"shear": 90}, "shear must be below 90 degrees, got 90"),
        ({"hflip": 1.5}, r"hflip must be within \[0, 1\], got 1.5"),
        ({"vflip": True}, "vflip must be a number, got bool"),
        ({"crop": "middle"}, "crop must be one of 'random', 'center', 'resized', 'none'"),
        ({"interpolation": "lanczos"}, "interpolation must be one of 'nearest'"),
        ({"fill_mode": "zeros"}, "fill_mode must be one of 'constant'"),
        ({"fill": ()}, "fill must be a number or one for each channel, got none"),
        ({"antialias": 1}, "antialias must be True or False, got int"),
        ({"brightness": -1}, "brightness as one number must not be negative"),
        ({"erase": 2.0}, r"erase must be within \[0, 1\]"),
        ({"mix": "cutout"}, "mix must be one of 'mixup', 'cutmix', got 'cutout'"),
        ({"mean": 0.5, "std": (0.1, 0.0)}, "std must be positive"),
        ({"mean": 0.5, "std": 0.5, "out_dtype": torch.uint8}, "out_dtype must be floating"),
        ({"out_dtype": torch.int32}, "out_dtype must be uint8, float16"),
        ({"memory_format": torch.preserve_format}, "memory_format must be torch.contiguous_format"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be within \(0, 1\]"),
        ({"compat": "jax"}, "compat must be one of 'fusereg'"),
        ({"seed": 1.5}, "seed must be an integer, got float"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"fusereg\.Augment: {text}"):
        Augment(**{"size": 8, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Erase(p=-1), r"Erase: p must be within \[0, 1\]"),
        (lambda: Erase(scale=(0.5, 1.5)), r"Erase: scale must be within \[0, 1\]"),
        (lambda: Erase(ratio=(0, 1)), r"Erase: ratio must be within \(0, inf\]"),
        (lambda: Erase(value="noise"), "Erase: value must be a number, .* got 'noise'"),
        (lambda: Mix(), "Mix: mixup or cutmix must be positive"),
        (lambda: Mix(mixup=-1), "Mix: mixup must not be negative"),
        (lambda: Mix(mixup=1, num_classes=0), "Mix: num_classes must be positive"),
    ],
)
def test_bad_parts(make: object, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"fusereg.{text}"):
        make()  # type: ignore[operator]


def test_bad_ids_and_epochs() -> None:
    augment = Augment(8)
    for ids, text in (
        ([1, 2], r"sample_ids must have shape \(3,\), got \(2,\)"),
        ([1.0, 2.0, 3.0], "sample_ids must be an integer, got float"),
        (torch.zeros(3), "sample_ids must be integers, got torch.float32"),
        ("abc", "sample_ids must be a tensor or a sequence of integers, got str"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            augment.sample_params(3, input_size=8, sample_ids=ids)  # type: ignore[arg-type]
    for epoch in (-1, 2**32):
        with pytest.raises(ValueError, match=r"epoch must be within \[0, 2\^32\)"):
            augment.sample_params(1, input_size=8, epoch=epoch)
