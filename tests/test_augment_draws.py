"""The keys of random numbers: seeds, ranks, occurrences, epochs; the forms that images come in."""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import augment_peers
from fusereg.augment import (
    Augment,
    AugmentParams,
    CallParams,
    Compose,
    CutMix,
    Mix,
    Normalize,
    ProgramParams,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    WithIds,
)
from fusereg.augment import seeded as seeded_module


def turning(seed: int | None = 3, **more: Any) -> Augment:
    return Augment(12, degrees=180, crop="resized", seed=seed, **more)


def records(augment: Augment, ids: Any, **more: Any) -> Tensor:
    return augment.sample_params(len(ids), input_size=12, sample_ids=ids, **more).records


def distinct(x: Tensor) -> int:
    return len({tuple(row) for row in x.flatten(1).tolist()})


# --- threads ---


def test_threads_take_turns_with_the_generators_and_leave_them_as_they_were() -> None:
    """A transform without a kernel draws from the process's generators."""
    x = torch.rand(2, 3, 8, 8)
    compose = Compose([lambda image: image + torch.rand(()) + random.random()], seed=5)

    def call(i: int) -> Tensor:
        found: Tensor = compose(x, sample_ids=range(2 * i, 2 * i + 2), epoch=0)
        return found

    alone = [call(i) for i in range(40)]
    before = torch.get_rng_state(), random.getstate()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, range(40)))
    assert all(map(torch.equal, alone, together))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_threads_get_different_ids() -> None:
    flip = RandomHorizontalFlip()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            keys = list(pool.map(lambda _: flip._keys(1, None, None, None), range(4000)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(int(k.ids) for k in keys) == list(range(4000))


# --- seeds and ranks ---


@pytest.mark.parametrize("make", [lambda: turning(None), lambda: Compose([RandomRotation(180)])])
def test_without_a_seed_draws_follow_torchs_generator(make: Any) -> None:
    x = torch.rand(4, 3, 12, 12)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(make()(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    a, b = make(), make()
    assert a.seed != b.seed
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x)), "a run that is resumed draws the same"


def test_a_seed_that_was_given_stays() -> None:
    a, b = turning(1), turning(2)
    b.load_state_dict(a.state_dict())
    assert b.seed == 2


def at_rank(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", str(number))


def test_ranks_differ_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [5, 6, 7]
    drawn: dict[str, list[Tensor]] = {"counted": [], "ids": [], "ids and seed": []}
    for number in (0, 1, 3):
        at_rank(number, monkeypatch)
        torch.manual_seed(0)
        drawn["counted"].append(turning(1).sample_params(3, input_size=12).records)
        drawn["ids"].append(records(turning(None), ids))
        drawn["ids and seed"].append(records(turning(1), ids))
    for name in ("counted", "ids"):
        assert distinct(torch.cat(drawn[name])) == 9, name
    # A seed that is given makes a sample's numbers those of every rank.
    assert torch.equal(drawn["ids and seed"][0], drawn["ids and seed"][2])


def test_the_rank_goes_to_spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    at_rank(2, monkeypatch)
    augment = turning(None)
    own = records(augment, [1, 2])
    sent = pickle.dumps(augment)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    class Worker:
        num_workers, id, seed = 1, 0, 17

    monkeypatch.setattr(seeded_module, "get_worker_info", Worker)
    assert torch.equal(records(pickle.loads(sent), [1, 2]), own)


# --- occurrences ---


def test_an_id_that_occurs_again_draws_anew_and_view_names_it() -> None:
    augment = turning()
    three = records(augment, [5, 5, 9, 5])
    assert distinct(three) == 4
    assert torch.equal(three[:1], records(augment, [5]))
    assert torch.equal(three[2:3], records(augment, [9]))
    assert torch.equal(records(augment, [5, 5, 9, 5], view=[0, 1, 0, 2]), three)
    assert torch.equal(records(augment, [5, 9], view=[2, 0]), three[[3, 2]])
    assert distinct(records(augment, [5, 5, 5], view=0)) == 1
    assert torch.equal(records(augment, np.array([5]), view=torch.tensor([1])), three[1:2])
    params = augment.sample_params(3, input_size=12, sample_ids=[5, 5, 5])
    assert params.sample_ids.tolist() == [5, 5, 5]
    for view, text in ((-1, "view must not be negative"), ([0], r"view must have shape \(3,\)")):
        with pytest.raises(ValueError, match=text):
            records(augment, [1, 2, 3], view=view)
    with pytest.raises(ValueError, match="view is of samples"):
        augment.sample_params(2, input_size=12, view=1)


def test_two_views_and_partners_of_a_repeated_sample() -> None:
    x = torch.rand(2, 3, 12, 12)
    augment = turning()
    first, second = (augment(x, sample_ids=[1, 2], view=v) for v in (0, 1))
    assert not torch.equal(first, second)
    mixing = Augment(12, mix="mixup", seed=1)
    ids = torch.arange(40).repeat_interleave(3)
    partners = mixing.sample_params(120, input_size=12, sample_ids=ids).partners
    itself = (ids[partners] == ids).double().mean()
    assert float(itself) < 0.15, "of 120 in a hashed order, where all were beside their own before"


def images_of(loader: DataLoader[Any]) -> list[tuple[int, Tensor]]:
    return [(int(i), x) for xs, ids in loader for x, i in zip(xs, ids, strict=True)]


def dataset(n: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 3, 12, 12, generator=generator), torch.arange(n))


@pytest.mark.parametrize(("workers", "batch"), [(0, 4), (0, 7), (2, 3)])
def test_a_sampler_that_repeats_draws_anew_whatever_the_workers(workers: int, batch: int) -> None:
    weights = torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(4)
    order = list(WeightedRandomSampler(weights, 30, generator=generator))
    found = {}
    for sampler in (WithIds.sampler(order), WithIds.sampler(BatchSampler(order, batch, False))):
        by_batch = isinstance(sampler.sampler, BatchSampler)  # type: ignore[attr-defined]
        how: dict[str, Any] = {"batch_sampler": sampler} if by_batch else {
            "sampler": sampler, "batch_size": batch
        }  # fmt: skip
        loader = DataLoader(
            WithIds(dataset()), num_workers=workers, collate_fn=turning().collate, **how
        )
        found[by_batch] = images_of(loader)
    assert [i for i, _ in found[True]] == [int(i) for i in order]
    for a, b in zip(found[True], found[False], strict=True):
        assert torch.equal(a[1], b[1])
    again = images_of(
        DataLoader(WithIds(dataset()), 30, sampler=order, collate_fn=turning().collate)
    )
    for a, b in zip(found[True], again, strict=True):
        assert torch.equal(a[1], b[1]), "one process counts for itself"
    assert distinct(torch.stack([x for _, x in found[True]])) == 30


def test_occurrences_are_counted_over_an_epoch_and_begin_anew_with_the_next() -> None:
    augment = turning()
    loader = DataLoader(WithIds(dataset()), 2, sampler=[1, 2, 1, 3, 1], collate_fn=augment.collate)
    epochs = []
    for epoch in (0, 1, 0):
        augment.set_epoch(epoch)
        epochs.append(torch.stack([x for _, x in images_of(loader)]))
    assert torch.equal(epochs[0], epochs[2])
    assert distinct(torch.cat(epochs[:2])) == 10


# --- a forgotten set_epoch ---


def warned(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "set_epoch" in str(w.message)]


def test_a_forgotten_set_epoch_is_warned_of_once() -> None:
    x = torch.rand(2, 3, 12, 12)
    augment = turning()

    def epoch(**more: Any) -> None:
        for ids in ([0, 1], [2, 3], [4, 5]):
            augment(x, sample_ids=ids, **more)

    assert warned(epoch) == []
    assert warned(lambda: augment(x, sample_ids=[4, 5])) == [], "a second view of a batch"
    assert len(warned(lambda: (epoch(), epoch()))) == 1
    other = turning()
    assert (
        warned(lambda: [other.set_epoch(e) or other(x, sample_ids=[0, 1]) for e in range(4)]) == []
    )
    augment = turning()
    assert warned(lambda: [epoch(epoch=e) for e in (0, 1, 1)]) == [], "the caller's own epochs"


def test_a_forgotten_set_epoch_is_warned_of_in_loaders(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = turning()
    loader = DataLoader(WithIds(dataset()), 2, collate_fn=augment.collate)
    assert warned(lambda: list(loader)) == []
    assert len(warned(lambda: (list(loader), list(loader)))) == 1
    augment = turning()
    # A worker's warnings go to the error output, but for those that pytest collects.
    monkeypatch.setattr(warnings, "showwarning", lambda text, *_: os.write(2, str(text).encode()))
    loader = DataLoader(WithIds(dataset()), 2, num_workers=1, collate_fn=augment.collate)
    for e in (0, 1):
        augment.set_epoch(e)
        list(loader)
    assert "set_epoch" not in capfd.readouterr().err
    list(loader)
    list(loader)
    assert capfd.readouterr().err.count("call set_epoch(epoch)") == 1


# --- every list is keyed ---


def v2() -> Any:
    return augment_peers.torchvision_module("torchvision.transforms.v2")


def tv() -> Any:
    return augment_peers.torchvision_module("torchvision.tv_tensors")


PROGRAMS: dict[str, Any] = {
    "ColorJitter": lambda: v2().ColorJitter(0.5, 0.5, 0.5, 0.2),
    "ColorJitter with p": lambda: v2().RandomApply([v2().ColorJitter(0.5)], p=0.8),
    "RandomGrayscale": lambda: v2().RandomGrayscale(0.5),
    "TrivialAugmentWide": lambda: v2().TrivialAugmentWide(),
    "RandAugment": lambda: v2().RandAugment(),
    "AugMix": lambda: v2().AugMix(),
    "GaussianBlur": lambda: v2().GaussianBlur(3),
    "blur with p": lambda: v2().RandomApply([v2().GaussianBlur((3, 5))], p=0.5),
}
CALLED: dict[str, Any] = {
    "RandomPerspective": lambda: v2().RandomApply([v2().RandomPerspective(p=1.0)], p=1.0),
    "RandomChoice": lambda: v2().RandomChoice(
        [v2().RandomInvert(1.0), v2().RandomSolarize(9, 1.0)]
    ),
    "RandomOrder": lambda: v2().RandomOrder([v2().RandomInvert(0.5), v2().RandomSolarize(99, 0.5)]),
    "AugMix of another alpha": lambda: v2().AugMix(alpha=0.5),
    "expand": lambda: v2().RandomRotation((3, 3.0001), expand=True),
    "Lambda": lambda: v2().Lambda(lambda x: x + torch.randint(0, 9, ()), tv().Image),
}


def chain(name: str, seed: int = 5) -> Compose:
    return Compose([v2().RandomHorizontalFlip(), {**CALLED, **PROGRAMS}[name]()], seed=seed)


@pytest.mark.parametrize("name", [*CALLED, *PROGRAMS])
def test_whatever_is_in_a_list_is_drawn_for_each_sample_by_its_id(name: str) -> None:
    one = torch.randint(0, 256, (1, 3, 24, 30), dtype=torch.uint8)
    x = one.expand(12, -1, -1, -1)
    fused = chain(name)
    state = torch.get_rng_state()
    y = fused(x, sample_ids=range(12))
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    torch.rand(5)
    assert torch.equal(fused(x, sample_ids=range(12)), y)
    order = [3, 11, 0]
    assert torch.equal(fused(x[:3], sample_ids=order), y[order])
    params = fused.sample_params(12, input_size=(24, 30), sample_ids=range(12))
    own = ProgramParams if name in PROGRAMS else CallParams
    assert [type(p) for p in params] == [AugmentParams, own]
    assert torch.equal(fused(x, params=params), y)
    if name != "expand":
        assert distinct(y.float()) > 1
    assert not torch.equal(fused(x, sample_ids=range(12), epoch=1), y)
    text = str(fused.plan())
    if name in PROGRAMS:
        assert "runs as a program of each image" in text
        assert "called" not in text
        return
    assert "(sample by sample)" in text
    assert "called for each sample, under a generator keyed by its id: " in text


def test_transforms_of_timm_and_kornia_are_drawn_for_each_sample() -> None:
    x = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8).expand(6, -1, -1, -1)
    timm = pytest.importorskip("timm.data")
    listed = timm.create_transform(
        24, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel"
    )
    kornia = pytest.importorskip("kornia.augmentation")
    jitter = [v2().ToDtype(torch.float32, True), kornia.ColorJiggle(0.3, 0.3, 0.3, 0.3)]
    for transforms in (listed.transforms, jitter):
        chain = Compose(transforms, seed=2)
        y = chain(x, sample_ids=range(6))
        assert y.dtype is torch.float32
        assert distinct(y) == 6
        assert torch.equal(chain(x[:2], sample_ids=[4, 1]), y[[4, 1]])
        params = chain.sample_params(6, input_size=(40, 50), sample_ids=range(6))
        assert torch.equal(chain(x, params=params), y)
        assert "called for each sample" in str(chain.plan())
    mask = tv().Mask(torch.zeros(6, 40, 50))
    with pytest.raises(ValueError, match="Mask, would have to move with the images, and RandomRes"):
        Compose(listed.transforms)(x, mask)


def test_grayscale_is_mixed_within_batches() -> None:
    x = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    y = Compose([v2().RandomGrayscale(0.5)])(x)
    gray = (y[:, 0] == y[:, 1]).flatten(1).all(1)
    assert 15 < int(gray.sum()) < 49


def test_images_of_several_sizes_within_a_list_become_one_batch() -> None:
    x = tv().Image(torch.randint(0, 256, (6, 3, 40, 50), dtype=torch.uint8))
    m = tv().Mask(torch.zeros(6, 40, 50, dtype=torch.int64))
    fills = {tv().Image: 0, tv().Mask: 255, "others": 0}
    reference = [
        v2().RandomResize(20, 60),
        v2().RandomHorizontalFlip(),
        v2().RandomCrop((32, 36), pad_if_needed=True, fill=fills),
        v2().ToDtype({tv().Image: torch.float32, tv().Mask: torch.int32, "others": None}, True),
        v2().Normalize([0.5] * 3, [0.2] * 3),
        v2().ToPureTensor(),
    ]
    fused = Compose(reference, seed=1)
    y, moved = fused(x, (m, torch.arange(6)), sample_ids=range(6))
    assert type(y) is Tensor
    assert type(moved[0]) is Tensor
    assert (y.shape, y.dtype) == ((6, 3, 32, 36), torch.float32)
    assert (moved[0].shape, moved[0].dtype) == ((6, 32, 36), torch.int32)
    assert set(moved[0].unique().tolist()) == {0, 255}
    outside = moved[0] == 255
    assert float(y.amax(1)[outside].max()) == pytest.approx(-2.5), "black, normalized"
    params = fused.sample_params(6, input_size=(40, 50), sample_ids=range(6))
    assert torch.equal(fused(x, params=params), y)
    part, _ = fused(x[2:4], (tv().Mask(m[2:4]), torch.arange(2)), sample_ids=[2, 3])
    assert torch.equal(part, y[2:4])
    with pytest.raises(ValueError, match="images must be of one size in the end"):
        Compose(reference[:1], seed=1)(x)
    mixed = Compose([*reference, CutMix(num_classes=6)], seed=1)
    _, (masks, soft) = mixed(x, (m, torch.arange(6)))
    assert soft.shape == (6, 6)
    assert masks.shape == (6, 32, 36)


def test_torchvisions_lists_are_one_pass() -> None:
    t = v2()
    x = torch.randint(0, 256, (5, 3, 40, 50), dtype=torch.uint8)
    classification = [
        t.ToImage(), t.RandomResizedCrop(24, interpolation=3), t.RandomHorizontalFlip(),
        t.Identity(), t.Compose([t.ToDtype(torch.float32, scale=True)]),
        t.Normalize(torch.tensor([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])),
        t.RandomErasing(1.0), t.ToPureTensor(),
        t.RandomChoice([t.MixUp(num_classes=5), t.CutMix(num_classes=5)], p=[0.25, 0.75]),
    ]  # fmt: skip
    fused = Compose(classification, seed=1)
    (only,) = fused.plan().passes
    assert only.names[-1] == "MixUp or CutMix"
    (params,) = fused.sample_params(400, input_size=(40, 50))
    cut = float((params.records[:, 15] == 0).double().mean())
    assert 0.68 < cut < 0.82
    y, labels = fused(x, torch.arange(5))
    assert (y.dtype, labels.shape) == (torch.float32, (5, 5))
    evaluation = [t.Resize(28), t.CenterCrop(24), t.ToDtype(torch.float32, scale=True)]
    evaluation.append(t.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    fused = Compose(evaluation)
    assert len(fused.plan().passes) == 1
    for size in ((40, 50), (50, 40), (28, 28)):
        z = x[:, :, :28, :28] if size == (28, 28) else x.reshape(5, 3, *size)
        want = torch.stack([t.Compose(evaluation)(image) for image in z])
        assert float((fused(z) - want).abs().max()) < 0.03, "one level of 255, normalized"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_change_of_dtype_keeps_the_units_of_fills(dtype: torch.dtype) -> None:
    t = v2()
    x = torch.full((3, 3, 20, 20), 51, dtype=torch.uint8)
    fill = t.RandomAffine(0, translate=(0.3, 0.3), fill=0.5)
    y = Compose([t.ToDtype(dtype, scale=True), fill], seed=1)(x)
    assert y.dtype is dtype
    assert sorted({round(v, 3) for v in y.unique().tolist()}) == [0.2, 0.5]
    steps = [t.ToDtype(dtype, scale=True), fill, t.Normalize([0.5] * 3, [0.1] * 3)]
    fused = Compose(steps, seed=1)
    assert len(fused.plan().passes) == 2
    assert sorted({round(v, 1) for v in fused(x).unique().tolist()}) == [-3.0, 0.0]
    erase = [steps[0], RandomErasing(1.0, value=0.25), steps[2]]
    values = {round(v, 1) for v in Compose(erase, seed=1)(x).unique().tolist()}
    assert values == {-3.0, -2.5}
    zero = [steps[0], t.RandomAffine(0, translate=(0.3, 0.3)), steps[2]]
    fused = Compose(zero, seed=1)
    assert len(fused.plan().passes) == 1
    assert sorted({round(v, 1) for v in fused(x).unique().tolist()}) == [-5.0, -3.0]


def test_arguments_that_fusereg_does_not_have_are_called_and_the_plan_says_why() -> None:
    t = v2()
    x = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8)
    for item, why in (
        (t.RandomResizedCrop(20, scale=(0.5, 2.0)), r"scale must be within"),
        (t.RandomRotation(10, expand=True), "it expands the canvas for the angle that it draws"),
        (t.Normalize([0.5] * 3, [0.2] * 3, inplace=True), "it writes into its input"),
        (t.ToDtype(torch.int32), "it converts values without scaling"),
        (t.Grayscale(), "it changes the number of channels"),
        (t.RandomSolarize(300, p=0.0), "its threshold is not within 0 and 255"),
    ):
        fused = Compose([item])
        assert why in str(fused.plan())
        if type(item).__name__ not in ("RandomRotation", "Normalize"):
            assert len(fused(x)) == 3
    params = RandomHorizontalFlip().sample_params(3, input_size=(40, 50))
    jitter = Compose([t.ColorJitter(0.5)])
    with pytest.raises(TypeError, match="params of a program must be ProgramParams, got Augment"):
        jitter(x, params=params)


def test_a_filter_that_is_not_known_is_called_and_ids_may_be_an_array() -> None:
    how = v2().InterpolationMode.LANCZOS
    for item in (v2().RandomResizedCrop(20, interpolation=how), v2().Resize(20, how)):
        assert "(sample by sample)" in str(Compose([item]).plan())
    x = torch.rand(4, 3, 8, 8)
    flip = Compose([RandomHorizontalFlip()], seed=1)
    want = flip(x, sample_ids=range(4), epoch=0)
    for ids in (np.arange(4), np.arange(4, dtype=np.int32), torch.arange(4), [0, 1, 2, 3]):
        assert torch.equal(flip(x, sample_ids=ids, epoch=0), want)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool])
def test_images_of_other_integers_are_refused_and_become_floats_by_to_dtype(dtype: Any) -> None:
    x = torch.ones(2, 3, 8, 8, dtype=dtype)
    for chain in (Augment(8), Compose([RandomHorizontalFlip()]), Compose([v2().Resize(4)])):
        with pytest.raises((TypeError, ValueError), match="wanted uint8, float64"):
            chain(x)
    assert Compose([RandomHorizontalFlip()])(x.float()).dtype is torch.float32


def test_numbers_of_a_regression_are_mixed_as_a_column() -> None:
    mix = Compose([v2().MixUp()], seed=1)
    x = torch.rand(4, 3, 8, 8)
    (params,) = mix.sample_params(4, input_size=(8, 8), sample_ids=range(4))
    value = torch.rand(4)
    _, mixed = mix(x, value[:, None], params=[params])
    w = params.weights.float()
    torch.testing.assert_close(mixed[:, 0], value * w + value[params.partners] * (1 - w))
    with pytest.raises(TypeError, match=r"give other values .* the shape \(N, 1\)"):
        mix(x, value, params=[params])


def test_a_sequence_of_modules_is_a_list_and_a_chain_within_a_list_is_refused() -> None:
    inner = torch.nn.Sequential(v2().RandomHorizontalFlip(), v2().CenterCrop(3))
    (only,) = Compose([inner, v2().Normalize([0.5], [0.5])]).plan().passes
    assert only.names == ["RandomHorizontalFlip", "CenterCrop", "Normalize"]
    with pytest.raises(TypeError, match="got Augment, which draws by ids of its own"):
        Compose([Augment(8)])


def test_a_function_of_the_batch_is_replayed_by_its_ids() -> None:
    fused = Compose([lambda x: x + torch.rand(())])
    x = torch.zeros(2, 1, 3, 3)
    y = fused(x, sample_ids=[1, 2])
    assert torch.equal(fused(x, sample_ids=[1, 2]), y)
    assert not torch.equal(fused(x, sample_ids=[1, 3]), y)
    assert "(called as it is)" in str(fused.plan())


# --- clips, PIL, NumPy, wrong forms ---


@pytest.mark.parametrize("through", ["Augment", "Compose", "RandomAffine of torchvision, called"])
def test_a_clip_has_one_draw(through: str) -> None:
    frame = torch.rand(3, 1, 3, 16, 20)
    x = tv().Video(frame.expand(3, 5, 3, 16, 20).clone())
    make: dict[str, Any] = {
        "Augment": lambda: Augment(
            14, degrees=90, erase=1.0, mix=Mix(mixup=1.0, cutmix=1.0), seed=1
        ),
        "Compose": lambda: Compose(
            [RandomRotation(90), RandomErasing(1.0, value="random")], seed=1
        ),
        "RandomAffine of torchvision, called": lambda: Compose(
            [v2().RandomApply([v2().RandomAffine(90)], p=1.0)], seed=1
        ),
    }
    chain = make[through]()
    y = chain(x, sample_ids=range(3))
    assert type(y) is tv().Video
    assert y.shape[:3] == (3, 5, 3)
    assert torch.equal(y, y[:, :1].expand_as(y)), "all frames of a clip alike"
    assert distinct(y[:, 0]) == 3
    flat = chain(frame[:, 0], sample_ids=range(3))
    assert torch.equal(flat, y[:, 0].as_subclass(Tensor)), "as an image of the same id"
    assert torch.equal(chain(x.as_subclass(Tensor), sample_ids=range(3)), y.as_subclass(Tensor))
    if through != "Augment":
        alone = chain(tv().Video(x[1]), sample_ids=[1])
        assert alone.shape == y[1].shape
        assert torch.equal(alone.as_subclass(Tensor), y[1].as_subclass(Tensor))


def test_clips_move_their_targets_and_collate() -> None:
    flip = Augment((16, 20), hflip=1.0, crop="none")
    clip = tv().Video(torch.rand(4, 3, 16, 20))
    box = tv().BoundingBoxes([[0.0, 0, 5, 5]], format="XYXY", canvas_size=(16, 20))
    y, boxes, _labels = flip.collate([(clip, box, 1), (clip, box, 0)])
    assert type(y) is tv().Video
    torch.testing.assert_close(y[0], tv().Video(clip.flip(-1)))
    assert boxes[1].tolist() == [[15, 0, 20, 5]]


def test_images_of_pil_and_numpy() -> None:
    Image = pytest.importorskip("PIL.Image")
    data = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    want = torch.from_numpy(data).permute(2, 0, 1).flip(-1)
    flip = Compose([RandomHorizontalFlip(1.0)])
    turned = flip(Image.fromarray(data))
    assert isinstance(turned, Image.Image)
    assert np.array_equal(np.asarray(turned), data[:, ::-1])
    assert torch.equal(flip(data), want)
    gray = flip(Image.fromarray(data[..., 0]))
    assert np.array_equal(np.asarray(gray), data[:, ::-1, 0])
    v1 = augment_peers.torchvision_module("torchvision.transforms")
    to_image = Compose([v2().ToImage(), RandomHorizontalFlip(1.0)])(Image.fromarray(data))
    assert type(to_image) is tv().Image
    assert torch.equal(to_image.as_subclass(Tensor), want)
    tensor = Compose([v1.ToTensor(), RandomHorizontalFlip(1.0)])(Image.fromarray(data))
    torch.testing.assert_close(tensor, want / 255)
    augment = Augment((16, 20), hflip=1.0, crop="none", out_dtype=torch.uint8)
    y, _labels = augment.collate([(Image.fromarray(data), 0), (data, 1)])
    assert torch.equal(y[0], want)
    assert torch.equal(y[1], want)
    with pytest.raises(ValueError, match="must have mode L, LA, RGB or RGBA, got 'P'"):
        flip(Image.fromarray(data).convert("P"))
    with pytest.raises(ValueError, match=r"must be \(H, W\) or \(\[N,\] H, W, C\) with channels"):
        flip(data.transpose(2, 0, 1))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got Image; give"):
        augment(Image.fromarray(data))


@pytest.mark.parametrize("shape", [(2, 16, 20, 3), (2, 224, 224, 1), (2, 100, 90, 4)])
def test_channels_that_come_last_are_noticed(shape: tuple[int, ...]) -> None:
    for chain in (Augment(8), Compose([RandomHorizontalFlip()])):
        with pytest.raises(ValueError, match="channels come first"):
            chain(torch.zeros(shape))
    with pytest.raises(ValueError, match="channels come first"):
        Compose([RandomHorizontalFlip()])(torch.zeros(shape[1:]))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), (127.5, 127.5), (0.0, 255.0)],
)
def test_statistics_of_values_up_to_255_are_noticed(mean: Any, std: Any) -> None:
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for chain in (Augment(8, mean=mean, std=std), Compose([Normalize(mean, std)])):
        with pytest.raises(ValueError, match=r"mean and std are of images in \[0, 1\]"):
            chain(x)
        assert chain(x.float()).shape == (1, 3, 8, 8)
    Compose([Normalize((0.5, 0.25, -0.125), (0.5, 2.0, 0.75))])(x)


def test_copies_have_occurrences_of_their_own() -> None:
    augment = turning()
    loader = DataLoader(WithIds(dataset()), 3, collate_fn=augment.collate)
    first = images_of(loader)
    twin = copy.deepcopy(augment)
    twin.set_epoch(0)
    again = images_of(DataLoader(WithIds(dataset()), 3, collate_fn=twin.collate))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert isinstance(SequentialSampler(dataset()), SequentialSampler)


def test_torchvision_is_not_imported() -> None:
    folder = Path(sys.modules["fusereg.augment"].__file__ or "").parent
    for path in folder.glob("*.py"):
        assert "import torchvision" not in path.read_text("utf-8").replace("from . import", "")
