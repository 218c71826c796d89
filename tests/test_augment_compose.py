"""Compose: fused transforms give what they give one after the other, or the plan says why not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from augment_peers import torchvision_module
from fusereg.augment import (
    Augment,
    AugmentParams,
    CallParams,
    CenterCrop,
    ColorJitter,
    Compose,
    CutMix,
    MixUp,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    Transform,
)

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def rotation(degrees: Any = 30, **more: Any) -> RandomRotation:
    return RandomRotation(degrees, "bilinear", **more)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 3, 24, 30, dtype=torch.float64)


def one_by_one(
    transforms: Sequence[Transform], x: Tensor, seed: int, targets: Tensor | None = None
) -> Any:
    """Each transform as a pass of its own, with the numbers that the list draws."""
    counts: dict[str, int] = {}
    result: Any = x if targets is None else (x, targets)
    for transform in transforms:
        # Steps that draw the same things are told apart by their number in the list.
        fillers: list[Any] = []
        for step in transform.stage.steps:
            fillers += [None] * counts.get(step.group, 0)
            counts[step.group] = counts.get(step.group, 0) + 1
        alone = Compose([transform], seed=seed)
        (unit,) = alone._training.units
        steps = [(kind, len(fillers), values) for kind, _, values in unit.steps]
        alone._training = replace(alone._training, units=[replace(unit, steps=steps)])
        arguments = (result,) if targets is None else result
        result = alone(*arguments, sample_ids=range(len(x)))
    return result


def check(
    transforms: list[Transform], x: Tensor, passes: int = 1, tolerance: float = 1e-12
) -> Compose:
    fused = Compose(transforms, seed=3)
    assert len(fused.plan().passes) == passes, str(fused.plan())
    y = fused(x, sample_ids=range(len(x)))
    want = one_by_one(transforms, x, 3)
    assert y.dtype is want.dtype
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    return fused


# --- the same as one after the other ---


@pytest.mark.parametrize("flip", [RandomHorizontalFlip, RandomVerticalFlip])
def test_turn_then_crop_then_flip(flip: type[Transform], x: Tensor) -> None:
    fused = check([rotation(), RandomCrop((16, 20)), flip()], x)  # type: ignore[call-arg]
    assert not fused.plan().passes[0].notes
    chain: list[Transform] = [rotation(), RandomCrop(18), CenterCrop((16, 17)), flip()]  # type: ignore[call-arg]
    check([*chain, RandomCrop(9)], x)


def test_flip_then_turn(x: Tensor) -> None:
    check([RandomHorizontalFlip(), rotation(fill=0.5), RandomVerticalFlip()], x)


def test_padded_crop_flip_normalize_erase(x: Tensor) -> None:
    chain: list[Transform] = [
        RandomCrop((24, 30), padding=4, fill=[0.1, 0.2, 0.3]),
        RandomHorizontalFlip(),
        Normalize(MEAN, STD),
        RandomErasing(1.0, value=[1.0, 2.0, 3.0]),
    ]
    check(chain, x)
    chain[0] = RandomCrop((24, 30), padding=4, fill=[10, 20, 30])
    check(chain, (x * 255).to(torch.uint8), tolerance=1e-5)


def test_resize_crop_then_flip_normalize_mix(x: Tensor) -> None:
    chain: list[Transform] = [
        RandomResizedCrop(12),
        RandomHorizontalFlip(),
        Normalize(MEAN, STD),
        RandomErasing(0.5, value="random"),
        CutMix(num_classes=3),
    ]
    labels = torch.tensor([0, 1, 2, 0, 1])
    fused = Compose(chain, seed=3)
    assert len(fused.plan().passes) == 1
    y, soft = fused(x, labels, sample_ids=range(5))
    want, want_soft = one_by_one(chain, x, 3, labels)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(soft, want_soft)


def test_normalize_before_geometry_erasing_and_after_mixing(x: Tensor) -> None:
    # The fill is in normalized units; so is the erased value, wherever Normalize comes.
    check([Normalize(MEAN, STD), rotation(fill=[1.0, -1.0, 0.5])], x)
    check([Normalize(MEAN, STD), RandomCrop((30, 32), padding=5, fill=2.0)], x)
    check([RandomErasing(1.0, value=0.25), Normalize(MEAN, STD)], x)
    chain: list[Transform] = [MixUp(), Normalize(MEAN, STD)]
    check(chain, x)


def test_uint8_stays_and_is_rounded_once(x: Tensor) -> None:
    u = (x * 255).to(torch.uint8)
    fused = Compose([rotation(), RandomCrop(16)], seed=3)
    y = fused(u, sample_ids=range(5))
    assert y.dtype is torch.uint8
    as_float = Compose([rotation(), RandomCrop(16)], seed=3, out_dtype=torch.float64)
    exact = as_float(u, sample_ids=range(5)) * 255
    assert float((y.double() - exact).abs().max()) <= 0.5 + 1e-4


# --- what differs, and says so ---


def test_two_resamples_are_one_and_sharper(x: Tensor) -> None:
    stripes = (torch.arange(64)[None, None, None, :] % 2).expand(4, 1, 64, 64).double()
    chain: list[Transform] = [rotation((3, 3)), RandomAffine((3, 3), interpolation="bilinear")]
    fused = Compose(chain, merge=True)
    (only,) = fused.plan().passes
    assert "resample once instead of twice: sharper" in only.notes[0]
    assert "sees the images' own pixels where RandomRotation had removed them" in only.notes[1]
    inner = slice(20, 44)
    y = fused(stripes)[..., inner, inner]
    twice = one_by_one(chain, stripes, 0)[..., inner, inner]
    assert float(y.var()) > 1.3 * float(twice.var())
    # 3 degrees one way and 3 the other: the fused ones are the image itself.
    torch.testing.assert_close(y, stripes[..., inner, inner], rtol=0, atol=1e-12)


def test_a_turned_crop_shows_the_image_in_its_corners(x: Tensor) -> None:
    chain: list[Transform] = [CenterCrop(12), rotation((45, 45))]
    ones = torch.ones_like(x)
    merged = Compose(chain, merge=True)
    (only,) = merged.plan().passes
    assert "sees the images' own pixels where CenterCrop had removed them" in only.notes[0]
    assert float(merged(ones).min()) == pytest.approx(1)
    assert float(Compose(chain)(ones)[0, 0, 0, 0]) == 0


def test_what_would_differ_is_a_pass_of_its_own_and_the_plan_says_so(x: Tensor) -> None:
    chain: list[Transform] = [
        RandomHorizontalFlip(),
        rotation(),
        RandomCrop(20),
        rotation(5),
        RandomCrop(22, padding=2),
    ]
    in_turn = check(chain, x, passes=3)
    assert [p.names for p in in_turn.plan().passes] == [
        ["RandomHorizontalFlip", "RandomRotation", "RandomCrop"],
        ["RandomRotation"],
        ["RandomCrop"],
    ]
    assert [p.reason for p in in_turn.plan().passes] == [
        "",
        "RandomRotation and RandomRotation both resample (merge=True joins them)",
        "RandomCrop would see what RandomRotation removed (merge=True joins them)",
    ]
    merged = Compose(chain, merge=True)
    assert len(merged.plan().passes) == 1
    chain.append(RandomHorizontalFlip())
    merged.transforms = chain  # read anew, and merged still
    assert len(merged.plan().passes) == 1


def test_what_two_merged_resamplings_show_of_the_rim() -> None:
    turns: list[Transform] = [
        rotation((25, 25)),
        RandomAffine(0, shear=(17, 17), interpolation="bilinear"),
    ]
    ones = torch.ones(1, 1, 224, 224)
    seen = [Compose(turns, merge=merge)(ones) > 0.5 for merge in (False, True)]
    back, gone = (float((a & ~b).double().mean()) for a, b in (seen[::-1], seen))
    assert back > 10 * gone, "what left the image comes back"
    assert 0.02 < float((seen[0] != seen[1]).float().mean()) < 0.04


# --- what cannot be fused ---


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (
            [rotation(), RandomRotation(3, "nearest")],
            "RandomRotation reads by nearest, RandomRotation by bilinear",
        ),
        (
            [rotation(fill=1.0), RandomCrop(30, padding=9)],
            "RandomCrop fills by constant 0.0, RandomRotation by constant 1.0",
        ),
        (
            [RandomCrop(40, padding=20, padding_mode="reflect"), rotation(fill=0.5)],
            "RandomRotation fills by constant 0.5, RandomCrop by reflect",
        ),
        (
            [rotation(), Normalize(MEAN, STD), RandomCrop(30, padding=9)],
            "the images are normalized between the fills of RandomRotation and RandomCrop",
        ),
        (
            [RandomErasing(1.0), RandomHorizontalFlip()],
            "RandomHorizontalFlip would move the boxes of RandomErasing",
        ),
        (
            [RandomErasing(1.0), RandomErasing(1.0, value=1.0)],
            "a pass erases one box and mixes last, and RandomErasing comes first",
        ),
        ([MixUp(), RandomErasing(1.0)], "a pass erases one box and mixes last, and MixUp comes"),
        ([MixUp(), CutMix()], "a pass mixes once, and MixUp has"),
        (
            [Normalize(MEAN, STD), Normalize(MEAN, STD)],
            "a pass normalizes once, and Normalize has",
        ),
        (
            [RandomErasing(1.0, value="random"), Normalize(MEAN, STD)],
            "Normalize would normalize the noise of RandomErasing",
        ),
    ],
    ids=lambda v: None if isinstance(v, list) else v.split(" ")[0],
)
def test_passes_of_their_own(chain: list[Transform], reason: str, x: Tensor) -> None:
    fused = check(chain, x, passes=2)
    second = fused.plan().passes[1]
    assert second.reason.startswith(reason)
    assert f"2. {chain[-1]._op}\n  a pass of its own: {reason}" in str(fused.plan())


def test_crops_without_a_fill_of_their_own_must_fit(x: Tensor) -> None:
    for chain in (
        [rotation(fill=1.0), CenterCrop(20)],
        [CenterCrop(20), rotation(fill=1.0)],
        [rotation(fill=1.0), RandomCrop(20, pad_if_needed=True)],
    ):
        fused = Compose(chain, merge=True)
        (only,) = fused.plan().passes
        assert any("must not be larger than the images" in note for note in only.notes)
        assert fused(x).shape == (5, 3, 20, 20)
        with pytest.raises(ValueError, match=r"size \(20, 20\) is larger than the image"):
            fused(x[..., :15])
        assert Compose(chain)(x[..., :15]).shape == (5, 3, 20, 20), "in turn, they are padded"
    assert Compose([rotation(), CenterCrop(20)], merge=True)(x[..., :15]).shape == (5, 3, 20, 20)


def test_crops_that_are_known_to_fit_or_meet_a_repeated_edge(x: Tensor) -> None:
    known = Compose([rotation(fill=1.0), RandomCrop(20), CenterCrop(16)])
    assert known.plan().passes[0].notes == []
    ones = torch.ones_like(x)
    resized = RandomResizedCrop(40, (1, 1), (5 / 4, 5 / 4), antialias=False)
    for chain in ([resized, CenterCrop(40)], [CenterCrop((24, 30)), resized]):
        fused = Compose(chain, merge=True)
        assert float(fused(ones).min()) == pytest.approx(1), "no fill at the edges"
    with pytest.raises(ValueError, match="is larger than the image"):
        Compose([CenterCrop(32), resized], merge=True)(ones)
    assert float(Compose([CenterCrop(32), resized])(ones).min()) == 0
    # Known to be larger: it fills, so it is a pass of its own where another fills otherwise.
    larger = Compose([rotation(fill=1.0), RandomCrop(20), CenterCrop(26)])
    assert larger.plan().passes[1].names == ["CenterCrop"]
    assert larger(ones)[0, 0, 0, 0] == 0
    assert Compose([CenterCrop(40)])(ones).shape == (5, 3, 40, 40)


def test_a_function_is_called_as_it_is(x: Tensor) -> None:
    def double(batch: Tensor) -> Tensor:
        return 2 * batch

    fused = Compose([RandomHorizontalFlip(1.0), double, RandomVerticalFlip(1.0)])
    assert [p.names for p in fused.plan().passes] == [
        ["RandomHorizontalFlip"],
        ["double"],
        ["RandomVerticalFlip"],
    ]
    assert torch.equal(fused(x), 2 * x.flip(2, 3))
    text = str(fused.plan())
    assert "double (called as it is)\n  a pass of its own: fusereg does not know it" in text
    assert "3. RandomVerticalFlip\n  a pass of its own: double is called as it is" in text
    params = fused.sample_params(5, input_size=(24, 30))
    assert [type(p) for p in params] == [AugmentParams, CallParams, AugmentParams]
    assert torch.equal(fused(x, params=params), 2 * x.flip(2, 3))


# --- the module ---


def test_lists_within_lists_parameters_and_out(x: Tensor) -> None:
    inner = Compose([RandomCrop(16), RandomHorizontalFlip()], seed=99)
    fused = Compose([rotation(), inner, MixUp(), CutMix()], seed=5)
    assert [p.names for p in fused.plan().passes] == [
        ["RandomRotation", "RandomCrop", "RandomHorizontalFlip", "MixUp"],
        ["CutMix"],
    ]
    params = fused.sample_params(5, input_size=(24, 30), sample_ids=range(5), epoch=2)
    assert [type(p) for p in params] == [AugmentParams] * 2
    y = fused(x, sample_ids=range(5), epoch=2)
    assert torch.equal(fused(x, params=params), y)
    out = torch.empty(5, 3, 16, 16, dtype=torch.float32)
    as_float = Compose(fused.transforms, seed=5, out_dtype=torch.float32)
    assert as_float(x, sample_ids=range(5), epoch=2, out=out) is out
    torch.testing.assert_close(out, y.float())
    with pytest.raises(ValueError, match="one AugmentParams for each of 2 passes, got 1"):
        fused(x, params=params[:1])
    with pytest.raises(ValueError, match="params exclude sample_ids and epoch"):
        fused(x, params=params, epoch=1)


def test_two_of_a_kind_draw_their_own(x: Tensor) -> None:
    fused = Compose([RandomHorizontalFlip(), RandomHorizontalFlip()], seed=1)
    y = fused(x.expand(5, 3, 24, 30).repeat(20, 1, 1, 1), sample_ids=range(100))
    same = (y == x.repeat(20, 1, 1, 1)).flatten(1).all(1)
    assert 30 < int(same.sum()) < 70, "twice the same flip would be none at all"


def test_an_empty_list_gives_back(x: Tensor) -> None:
    assert Compose([])(x) is x
    assert len(Compose([]).plan().passes) == 0


def test_evaluation_mode_has_a_list_of_its_own_or_says_that_it_goes_on_drawing(x: Tensor) -> None:
    chain = Compose([RandomHorizontalFlip(1.0)], evaluation=[CenterCrop(5)])
    model = torch.nn.Sequential(chain).eval()
    assert torch.equal(model(x), CenterCrop(5)(x))
    assert torch.equal(model.train()(x), x.flip(3))
    with pytest.raises(TypeError, match="evaluation must be a sequence"):
        Compose([], evaluation=CenterCrop(5))  # type: ignore[arg-type]
    for drawing in (
        Compose([RandomHorizontalFlip(1.0)]),
        RandomHorizontalFlip(1.0),
        Compose([chain]),
        MixUp(),
    ):
        drawing.eval()
        labels = torch.arange(len(x))
        with pytest.warns(UserWarning, match="goes on drawing in evaluation mode"):
            drawing(x, labels)
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error")
            drawing(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for still in (Compose([CenterCrop(5), Normalize(0.5, 0.2)]), CenterCrop(5)):
            still.eval()(x)


def test_what_is_no_transform() -> None:
    with pytest.raises(TypeError, match="Compose: transforms must be transforms or functions, got"):
        Compose([3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="Compose: transforms must be a sequence, got"):
        Compose(RandomHorizontalFlip())  # type: ignore[arg-type]


# --- the end of a list, parameters that are given, images of several sizes ---


def brighter(batch: Tensor) -> Tensor:
    return batch * 0.5


@pytest.mark.parametrize(
    "last",
    [
        [RandomHorizontalFlip(1.0)],
        [RandomHorizontalFlip(1.0), brighter],
        [brighter, torch.nn.Sequential()],
        [ColorJitter(0.3)],
        [],
    ],
    ids=["a kernel", "a function", "a function and nothing", "a program", "nothing"],
)
def test_the_result_is_as_asked_for_whatever_the_last_pass_is(last: list[Any]) -> None:
    x = torch.rand(4, 3, 8, 10)
    plain = Compose(last, seed=1)(x, sample_ids=range(4))
    half = Compose(last, seed=1, out_dtype=torch.float16, memory_format=torch.channels_last)
    y = half(x, sample_ids=range(4))
    assert y.dtype is torch.float16
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain.half(), rtol=2e-3, atol=2e-3)
    for dtype in (torch.float32, torch.float16):
        out = torch.empty(4, 3, 8, 10, dtype=dtype)
        Compose(last, seed=1)(x, sample_ids=range(4), out=out)
        torch.testing.assert_close(out, plain.to(dtype), rtol=2e-3, atol=2e-3)
    for wrong in (torch.empty(4, 3, 8, 9), torch.empty(5, 3, 8, 10), torch.empty(4, 4, 8, 10)):
        with pytest.raises(
            ValueError, match=r"out must be torch\.float32 of shape \(4, 3, 8, 10\)"
        ):
            Compose(last, seed=1)(x, out=wrong)


def test_parameters_of_another_kind_or_number_are_refused(x: Tensor) -> None:
    kinds: list[tuple[Any, str]] = [
        (RandomHorizontalFlip(), "a pass must be AugmentParams"),
        (ColorJitter(0.3), "a program must be ProgramParams"),
        (brighter, "brighter must be CallParams"),
    ]
    chains = [Compose([item], seed=1) for item, _ in kinds]
    drawn = [chain.sample_params(5, input_size=(24, 30)) for chain in chains]
    for i, (chain, (_, text)) in enumerate(zip(chains, kinds, strict=True)):
        for j, params in enumerate(drawn):
            if i == j:
                chain(x, params=params)
            else:
                with pytest.raises(TypeError, match=f"params of {text}, got"):
                    chain(x, params=params)
        with pytest.raises(ValueError, match=r"must be of 5 samples|must have (shape )?.* as its"):
            chain(x, params=[drawn[i][0][:3]])
    with pytest.raises(TypeError, match="params of a pass must be AugmentParams, got str"):
        Augment(8)(x, params="drawn")  # type: ignore[arg-type]
    for params in (d[0] for d in drawn):
        assert torch.equal(params[-1].sample_ids, params.sample_ids[-1:])
        with pytest.raises(IndexError):
            params[5]


def test_clips_of_several_sizes_come_back_as_clips() -> None:
    tv = torchvision_module("torchvision.tv_tensors")
    clips = [tv.Video(torch.rand(4, 3, 9 + i, 12 - i)) for i in range(3)]
    for chain in (Augment(8, hflip=1.0, crop="center"), Compose([CenterCrop(8)])):
        y = chain.collate(clips)
        assert type(y) is tv.Video
        assert y.shape == (3, 4, 3, 8, 8)
        assert torch.equal(y[1], chain(clips[1][None])[0])


@pytest.mark.parametrize("merge", [False, True])
def test_a_pad_sees_what_each_image_has_become(merge: bool) -> None:
    v2 = torchvision_module("torchvision.transforms.v2")
    steps = [v2.RandomResize(20, 40), v2.Pad([1, 2, 3, 4], fill=0.5), v2.CenterCrop(25)]
    x = torch.rand(6, 3, 24, 30)
    fused = Compose(steps, merge=merge, seed=3)
    assert len(fused.plan().passes) == (1 if merge else 2)
    together = fused(x, sample_ids=range(6))
    out = torch.empty_like(together)
    assert fused(x, sample_ids=range(6), out=out) is out
    assert torch.equal(out, together)
    params = fused.sample_params(6, input_size=(24, 30), sample_ids=range(6))
    assert torch.equal(fused(x, params=params), together)
    resized = Compose(steps[:1], seed=3)
    shapes = set()
    for i, image in enumerate(x):
        alone = resized(image, sample_ids=[i])
        shapes.add(alone.shape)
        torch.testing.assert_close(together[i], steps[2](steps[1](alone)), rtol=0, atol=1e-5)
    assert len(shapes) > 2
    sizes = [(24, 30), (40, 33), (31, 31)]
    images = [torch.rand(3, *size) for size in sizes]
    pad = Compose([v2.Pad([1, 2, 3, 4]), v2.RandomCrop(16)], seed=3)
    together = pad.run_several(images, None, [4, 5, 6])[0]
    for i, image in enumerate(images):
        assert torch.equal(together[i], pad(image, sample_ids=[4 + i]))


def test_arrays_as_mean_are_shown() -> None:
    mean = np.array([0.5, 0.4, 0.3])
    assert "mean=array([0.5, 0.4, 0.3])" in repr(Augment(8, mean=mean, std=mean))
    assert "mean=array([0.5, 0.4, 0.3])" in repr(Normalize(mean, mean))
