"""Arguments in every form that torchvision has for them, wherever they are taken."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_peers
import fusereg
from fusereg import augment
from fusereg.augment import (
    Augment,
    AugmentParams,
    ColorJitter,
    Compose,
    RandAugment,
    TimmAugment,
    TrivialAugmentWide,
    erase,
    recipes,
    resize,
)

#: The name, torchvision's constant, and PIL's number.
INTERPOLATIONS = [("nearest", "NEAREST", 0), ("bilinear", "BILINEAR", 2), ("bicubic", "BICUBIC", 3)]


def forms(name: str, constant: str, number: int) -> list[Any]:
    v2 = augment_peers.torchvision_module("torchvision.transforms.v2")
    image = importlib.import_module("PIL.Image")
    return [name, v2.InterpolationMode[constant], number, image.Resampling[constant]]


def photo() -> Tensor:
    x = torch.arange(2 * 3 * 20 * 24, dtype=torch.float32).reshape(2, 3, 20, 24)
    return (x * 37 % 251).to(torch.uint8)


def params() -> AugmentParams:
    chain = Augment((20, 24), degrees=(20, 20), crop="none", seed=0)
    return chain.sample_params(2, input_size=(20, 24), sample_ids=[0, 1])


def through(transform: Any, *targets: Any) -> Any:
    transform.set_epoch(0)
    return transform(photo(), *targets, sample_ids=[3, 4])


def depth() -> Any:
    tv = augment_peers.torchvision_module("torchvision.tv_tensors")
    return tv.Image(photo()), {"depth": tv.Image(photo().flip(0)), "soft": tv.Mask(photo() / 255)}


def rule(name: str, how: Any) -> Any:
    x, targets = depth()
    chain = Augment((20, 24), degrees=(20, 20), crop="none", seed=0, **{name: how})
    return chain(x, targets, sample_ids=[0, 1])[1]["soft" if "mask" in name else "depth"]


TURN = torch.tensor([[0.9, 0.2, 0.3], [-0.2, 0.9, 0.4]])
TILT = torch.cat([TURN, torch.tensor([[0.01, -0.005, 1.0]])])
#: A result by each argument of the package that is an interpolation.
ENTRIES: dict[str, Callable[[Any], Tensor]] = {
    "Augment": lambda how: through(Augment(16, degrees=20, interpolation=how, seed=0)),
    "RandomRotation": lambda how: through(augment.RandomRotation(20, how, seed=0)),
    "RandomPerspective": lambda how: through(augment.RandomPerspective(0.5, 1.0, how, seed=0)),
    "RandomAffine": lambda how: through(augment.RandomAffine(20, interpolation=how, seed=0)),
    "RandomResizedCrop": lambda how: through(
        augment.RandomResizedCrop(9, interpolation=how, seed=0)
    ),
    "RandAugment": lambda how: through(RandAugment(3, interpolation=how, seed=0)),
    "TrivialAugmentWide": lambda how: through(TrivialAugmentWide(interpolation=how, seed=0)),
    "TimmAugment": lambda how: through(TimmAugment("rand-m9-n6", how, seed=0)),
    "warp_affine": lambda how: augment.warp_affine(photo(), TURN, interpolation=how),
    "warp_perspective": lambda how: augment.warp_perspective(photo(), TILT, interpolation=how),
    "resize": lambda how: augment.resize(photo(), 9, interpolation=how, antialias=False),
    "AugmentParams.mask": lambda how: params().mask(photo() / 255, interpolation=how),
    "AugmentParams.warp": lambda how: params().warp(photo(), interpolation=how),
    "recipes.torchvision_classification": lambda how: through(
        recipes.torchvision_classification(9, policy="ra", interpolation=how, seed=0)
    ),
    "recipes.timm_imagenet": lambda how: through(
        recipes.timm_imagenet("rand-m9", 9, interpolation=how, seed=0)
    ),
    "Rules.mask_interpolation": lambda how: rule("mask_interpolation", how),
    "Rules.image_interpolation": lambda how: rule("image_interpolation", how),
}


def interpolations() -> Iterator[str]:
    """The public functions and classes that take an interpolation."""
    for prefix, holder in (("", augment), ("recipes.", recipes), ("AugmentParams.", AugmentParams)):
        names = getattr(holder, "__all__", None) or vars(holder)
        for name in names:
            value = getattr(holder, name)
            public = callable(value) and not name.startswith("_")
            if public and "interpolation" in inspect.signature(value).parameters:
                yield prefix + name
    for name in vars(fusereg.augment.rules.Rules)["__dataclass_fields__"]:
        if name.endswith("interpolation"):
            yield f"Rules.{name}"


def test_every_argument_that_is_an_interpolation_is_tried_here() -> None:
    assert set(interpolations()) == set(ENTRIES)


@pytest.mark.parametrize("which", INTERPOLATIONS, ids=[i[0] for i in INTERPOLATIONS])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_interpolation_is_a_name_an_enum_of_torchvision_or_a_number_of_pil(
    entry: str, which: tuple[str, str, int]
) -> None:
    wanted, *others = [ENTRIES[entry](form) for form in forms(*which)]
    assert all(torch.equal(wanted, other) for other in others)


@pytest.mark.parametrize("entry", ENTRIES)
def test_interpolations_that_are_not_known_are_named(entry: str) -> None:
    v2 = augment_peers.torchvision_module("torchvision.transforms.v2")
    for how in (v2.InterpolationMode.LANCZOS, 1, "lanczos"):
        with pytest.raises(ValueError, match=r"interpolation must be one of .*, got 'lanczos'"):
            ENTRIES[entry](how)
    for how in (7, True, None, 1.5):
        if how is None and entry in ("RandomRotation", "RandomAffine", "Rules.image_interpolation"):
            continue  # the default of its own
        with pytest.raises(ValueError, match=f"interpolation must be one of .*, got {how}"):
            ENTRIES[entry](how)


@pytest.mark.parametrize("entry", sorted(set(ENTRIES) - {"RandomResizedCrop"}))
def test_nearest_exact_is_the_pixel_at_the_center_as_nearest_is(entry: str) -> None:
    v2 = augment_peers.torchvision_module("torchvision.transforms.v2")
    if entry.startswith("recipes"):
        pytest.skip("their crop tells the two apart")
    results = [ENTRIES[entry](how) for how in ("nearest", v2.InterpolationMode.NEAREST_EXACT)]
    assert torch.equal(*results)


def test_formats_of_boxes_and_policies_are_enums_as_well() -> None:
    tv = augment_peers.torchvision_module("torchvision.tv_tensors")
    v2 = augment_peers.torchvision_module("torchvision.transforms.v2")
    boxes = torch.tensor([[[2.0, 3.0, 9.0, 8.0]]] * 2)
    for name in ("XYXY", "XYWH", "CXCYWH"):
        moved = [
            params().boxes(boxes, format=f) for f in (name.lower(), tv.BoundingBoxFormat[name])
        ]
        assert torch.equal(*moved)  # type: ignore[arg-type]
    results = [
        through(recipes.torchvision_classification(9, policy=p, seed=0))
        for p in ("imagenet", v2.AutoAugmentPolicy.IMAGENET)
    ]
    assert torch.equal(*results)


# --- channels ---


def v2_chain(name: str, *arguments: Any) -> Compose:
    v2 = augment_peers.torchvision_module("torchvision.transforms.v2")
    return Compose([getattr(v2, name)(*arguments)], seed=0)


#: What needs colors, with the operations that say so.
OF_COLORS: dict[str, tuple[Callable[[], Any], str]] = {
    "contrast": (lambda: ColorJitter(contrast=0.4, seed=0), "contrast"),
    "saturation": (lambda: ColorJitter(0.1, 0, 0.4, seed=0), "contrast, saturation"),
    "hue": (lambda: ColorJitter(hue=0.1, p=0.001, seed=0), "hue"),
    "RandAugment": (lambda: RandAugment(seed=0), "contrast, saturation"),
    "TrivialAugmentWide": (lambda: TrivialAugmentWide(seed=0), "contrast, saturation"),
    "TimmAugment": (lambda: TimmAugment("rand-m9", seed=0), "contrast, saturation"),
    "timm's original": (lambda: TimmAugment("original", seed=0), "contrast, saturation"),
    "torchvision's ColorJitter": (lambda: v2_chain("ColorJitter", 0.4, 0.4), "contrast"),
    "torchvision's AutoAugment": (lambda: v2_chain("AutoAugment"), "contrast, saturation"),
    "torchvision's RandomGrayscale": (lambda: v2_chain("RandomGrayscale", 0.001), "grayscale"),
}
#: What takes any number of channels.
OF_VALUES: dict[str, Callable[[], Any]] = {
    "brightness": lambda: ColorJitter(0.4, seed=0),
    "RandAugment of nothing": lambda: RandAugment(0, seed=0),
    "RandomEqualize": lambda: v2_chain("RandomEqualize", 1.0),
    "RandomAutocontrast": lambda: v2_chain("RandomAutocontrast", 1.0),
    "RandomInvert": lambda: v2_chain("RandomInvert", 1.0),
    "RandomPosterize": lambda: v2_chain("RandomPosterize", 3, 1.0),
    "RandomSolarize": lambda: v2_chain("RandomSolarize", 0.4, 1.0),
    "RandomAdjustSharpness": lambda: v2_chain("RandomAdjustSharpness", 2.0, 1.0),
    "GaussianBlur": lambda: v2_chain("GaussianBlur", 3, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("name", OF_COLORS)
def test_colors_of_other_than_1_or_3_channels_are_refused_at_once(
    name: str, dtype: torch.dtype
) -> None:
    make, named = OF_COLORS[name]
    for channels in (1, 2, 3, 4, 5):
        x = torch.rand(1, channels, 9, 11)
        x = x if dtype.is_floating_point else (x * 255).to(dtype)
        if channels in (1, 3):
            assert make()(x).shape == x.shape
            continue
        # The first image may have drawn none of them.
        with pytest.raises(
            ValueError, match=rf"x must have 1 or 3 channels for {named}, got .*join"
        ):
            make()(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("name", OF_VALUES)
def test_operations_of_values_take_any_channels_each_as_by_itself(
    name: str, dtype: torch.dtype
) -> None:
    for channels in (2, 4, 5):
        x = torch.rand(1, channels, 9, 11)
        x = x if dtype.is_floating_point else (x * 255).to(dtype)
        alone = [OF_VALUES[name]()(x[:, c : c + 1], sample_ids=[0]) for c in range(channels)]
        y = OF_VALUES[name]()(x, sample_ids=[0])
        assert torch.allclose(y.float(), torch.cat(alone, 1).float(), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 32, 32), torch.Size((3, 32, 32))])
def test_shapes_of_images_in_place_of_their_sides_are_named(shape: tuple[int, ...]) -> None:
    for chain in (Augment(8), augment.RandomCrop(8), Compose([augment.RandomCrop(8)])):
        with pytest.raises(ValueError, match=r"input_size must be .*got \d numbers; pass shape"):
            chain.sample_params(2, input_size=shape)


@pytest.mark.parametrize("make", [
    lambda: Augment(8, brightness=0.3), lambda: Augment(8, mean=0.5, std=0.5),
    lambda: ColorJitter(0.4), lambda: Compose([augment.Normalize(0.5, 0.5)]),
])  # fmt: skip
def test_floats_up_to_255_are_noticed_once(make: Callable[[], Any]) -> None:
    x = photo().float()
    chain = make()
    with pytest.warns(UserWarning, match=r"images are understood to be of \[0, 1\], and the first"):
        chain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(x)
        make()(x / 255)
        make()(photo())
        Augment(8, hflip=0.5)(x)  # nothing that reads the values


@pytest.mark.parametrize("result", [None, 3, [torch.zeros(2, 3, 8, 8)], (), torch.zeros(3, 8, 8)])
def test_a_function_that_gives_no_batch_is_named(result: Any) -> None:
    """As each other transform is that gives no image."""
    for x in (torch.rand(2, 3, 8, 8), [torch.rand(3, 8, 8), torch.rand(3, 9, 8)]):
        chain = Compose([lambda batch: result])
        with pytest.raises(TypeError, match=r"<lambda> is called with images \[\d, C, H, W\] and"):
            chain(x) if isinstance(x, Tensor) else chain.collate(x)
    if not isinstance(result, Tensor):
        tv = augment_peers.torchvision_module("torchvision.tv_tensors")
        each = augment_peers.torchvision_module("torchvision.transforms.v2").Lambda(
            lambda image: result, tv.Image
        )
        with pytest.raises(TypeError, match="Lambda must give an image"):
            Compose([each])(torch.rand(2, 3, 8, 8))


def test_one_image_where_a_batch_is_wanted_is_told_how_to_become_one() -> None:
    tv = augment_peers.torchvision_module("torchvision.tv_tensors")
    image, flip = torch.rand(3, 8, 8), Augment(8, hflip=1.0)
    for call in (flip, lambda x: resize(x, 4), lambda x: erase(x, torch.zeros(1, 4))):
        with pytest.raises(ValueError, match=r"got 3; x\[None\] is a batch of one image"):
            call(image)
    for target in (tv.Mask(image[0]), tv.Image(image), tv.Mask(image)):
        with pytest.raises(ValueError, match="for one image alone give a list of one"):
            flip(image[None], target)
        _, (moved,) = flip(image[None], [target])
        assert torch.equal(moved, target.flip(-1))
    box = tv.BoundingBoxes([[0.0, 0, 3, 3]], format="XYXY", canvas_size=(8, 8))
    assert flip(image[None], box)[1].tolist() == [[5, 0, 8, 3]]
