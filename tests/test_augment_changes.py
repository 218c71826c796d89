"""Transforms in a list that do more than their arguments say, or are changed later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import augment_peers
from fusereg.augment import Augment, Compose, Normalize, RandomHorizontalFlip
from target_cases import H, W, box, images, points, v2

STAYS: Callable[[], Any] = lambda: v2().RandomHorizontalFlip(0.0)  # noqa: E731
FLIPS: Callable[[], Any] = lambda: v2().RandomHorizontalFlip(1.0)  # noqa: E731


class FlipsAfter(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(-1)


def hooked(item: Any) -> Any:
    item.register_forward_hook(lambda module, given, result: result.flip(-1))
    return item


def pre_hooked(item: Any) -> Any:
    item.register_forward_pre_hook(lambda module, given: (given[0].flip(-1),))
    return item


def patched(item: Any, name: str) -> Any:
    setattr(item, name, lambda x, *_: x.flip(-1))
    return item


def own_class(name: str) -> Any:
    base = type(STAYS())
    return type(base.__name__, (base,), {name: lambda self, x, *_: x.flip(-1)})(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(STAYS()),
        lambda: pre_hooked(STAYS()),
        lambda: patched(STAYS(), "forward"),
        lambda: patched(FLIPS(), "transform"),
        lambda: hooked(v2().Compose([STAYS()])),
        lambda: hooked(v2().RandomApply([STAYS()], p=1.0)),
        lambda: v2().RandomApply([hooked(STAYS())], p=1.0),
        lambda: v2().Compose([hooked(STAYS())]),
        lambda: hooked(v2().CenterCrop((H, W))),
        lambda: hooked(v2().ColorJitter(0.0)),
        lambda: hooked(nn.Sequential(STAYS())),
        lambda: FlipsAfter(STAYS()),
        lambda: own_class("transform"),
        lambda: own_class("forward"),
    ],
)
def test_what_hooks_and_methods_of_its_own_do_to_a_transform_is_done(make: Any) -> None:
    x = torch.randint(0, 256, (2, 3, H, W), dtype=torch.uint8)
    assert torch.equal(Compose([make()])(x), x.flip(-1))
    assert torch.equal(Compose([make(), FLIPS()])(x), x)


def test_a_method_that_is_replaced_in_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, H, W)
    monkeypatch.setattr(v2().RandomHorizontalFlip, "transform", lambda self, x, params: x * 0)
    assert not Compose([STAYS(), FLIPS()])(x).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(RandomHorizontalFlip(0.0)),
        lambda: patched(RandomHorizontalFlip(0.0), "forward"),
        lambda: hooked(Compose([RandomHorizontalFlip(0.0)])),
    ],
)
def test_transforms_of_this_package_with_hooks_are_refused_in_a_list(make: Any) -> None:
    with pytest.raises(TypeError, match=r"it has .*, which fusing would lose; call it before or"):
        Compose([make()])


def test_a_mix_that_does_more_than_its_arguments_say_is_refused() -> None:
    for mix in (v2().MixUp, v2().CutMix):
        made = mix(num_classes=3, labels_getter=lambda batch: batch[1]["other"])
        other = v2().CutMix if mix is v2().MixUp else v2().MixUp
        for item in (made, v2().RandomChoice([made, other(num_classes=3)])):
            with pytest.raises(ValueError, match=r"must have no labels_getter; .* labels="):
                Compose([item])
        with pytest.raises(ValueError, match="is not called but read, and it has hooks"):
            Compose([hooked(mix(num_classes=3))])


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda chain: setattr(chain.transforms[0], name, value)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "an argument": (STAYS, _set("p", 1.0)),
    "the list": (STAYS, lambda chain: chain.transforms.append(FLIPS())),
    "another list": (STAYS, lambda chain: setattr(chain, "transforms", [FLIPS()])),
    "an inner list": (
        lambda: v2().Compose([STAYS()]),
        lambda chain: chain.transforms[0].transforms.append(FLIPS()),
    ),
    "an inner argument": (
        lambda: v2().Compose([STAYS()]),
        lambda chain: setattr(chain.transforms[0].transforms[0], "p", 1.0),
    ),
    "a module of a sequence": (
        lambda: nn.Sequential(STAYS()),
        lambda chain: chain.transforms[0].append(FLIPS()),
    ),
    "a hook": (STAYS, lambda chain: hooked(chain.transforms[0])),
    "a method": (STAYS, lambda chain: patched(chain.transforms[0], "forward")),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("how", ["called", "copied", "pickled", "evaluation", "collate"])
def test_what_changes_in_a_list_is_seen(name: str, how: str) -> None:
    x = torch.randint(0, 256, (2, 3, H, W), dtype=torch.uint8)
    make, change = CHANGES[name]
    chain: Any = Compose([make()], seed=1)
    assert torch.equal(chain(x), x)
    if how == "copied":
        chain = copy.deepcopy(chain)
    elif how == "pickled":
        chain = pickle.loads(pickle.dumps(chain))
    elif how == "evaluation":
        item = make()
        chain = Compose([STAYS()], evaluation=[item], seed=1).eval()
        if name in ("the list", "another list"):
            return  # that of evaluation is not an attribute
        change(type("Holder", (), {"transforms": [item]}))
        assert torch.equal(chain(x), x.flip(-1))
        return
    assert torch.equal(chain(x), x)
    before = chain._training
    assert torch.equal(chain(x), x)
    assert chain._training is before  # read once
    change(chain)
    if how == "collate":
        assert torch.equal(chain.collate(list(x)), x.flip(-1))
    else:
        assert torch.equal(chain(x), x.flip(-1))
        assert torch.equal(chain(x), x.flip(-1))


def v1() -> Any:
    return augment_peers.torchvision_module("torchvision.transforms")


def _normal(v: Any) -> Any:
    return v.Normalize(torch.full((3,), 0.5), torch.full((3,), 0.2))


#: A transform, and a change within one of its attributes.
WITHIN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a tensor, in place": (lambda: _normal(v1()), lambda t: t.mean.add_(0.2)),
    "a list of tensors, in place": (lambda: _normal(v2()), lambda t: t.mean[1].add_(0.2)),
    "another tensor": (
        lambda: _normal(v1()),
        lambda t: setattr(t, "mean", torch.tensor([0.1, 0.2, 0.3])),
    ),
    "an array": (
        lambda: v1().Normalize(torch.full((3,), 0.5).numpy(), torch.full((3,), 0.2).numpy()),
        lambda t: setattr(t, "std", torch.tensor([0.1, 0.2, 0.3]).numpy()),
    ),
    "a list in a dict": (
        lambda: v2().RandomCrop((H + 4, W), (0, 4), fill={type(images()): [1.0, 2.0, 3.0]}),
        lambda t: next(iter(t.fill.values())).__setitem__(0, 200.0),
    ),
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_changes_within_an_attribute_is_seen(name: str) -> None:
    make, change = WITHIN[name]
    x, item = torch.rand(2, 3, H, W), make()
    chain = Compose([Compose([item])], seed=1)
    first = chain(x, sample_ids=[1, 2])
    change(item)
    fresh = Compose([item], seed=1)(x, sample_ids=[1, 2])
    assert not torch.equal(first, fresh)
    assert torch.equal(chain(x, sample_ids=[1, 2]), fresh)


def test_parameters_and_plans_are_of_the_list_as_it_is() -> None:
    chain: Any = Compose([STAYS()], seed=1)
    chain.transforms.append(Normalize(0.5, 0.5))
    assert "Normalize" in str(chain.plan())
    chain.transforms[0].p = 1.0
    (params,) = chain.sample_params(2, input_size=(H, W))
    x = torch.rand(2, 3, H, W)
    torch.testing.assert_close(chain(x, params=[params]), (x.flip(-1) - 0.5) / 0.5)


@pytest.mark.parametrize("form", ["tensor", "array", "float", "list", "dict", "nested", "collate"])
@pytest.mark.parametrize("through", ["Augment", "Compose", "called"])
def test_a_plain_mask_of_the_images_size_is_refused_for_each_sample_too(
    form: str, through: str
) -> None:
    chain: Any = {
        "Augment": lambda: Augment((H, W), hflip=1.0, crop="none"),
        "Compose": lambda: Compose([FLIPS()]),
        "called": lambda: Compose([v2().ElasticTransform()]),
    }[through]()
    mask = torch.zeros(H, W, dtype=torch.uint8)
    x = images()
    ones = {"tensor": mask, "array": mask.numpy(), "float": mask.float()}
    targets = {"dict": {"m": [mask, mask]}, "nested": [{"a": {"b": mask}}] * 2}
    call: Callable[[], Any] = lambda: chain(x, targets.get(form, [mask, mask]))  # noqa: E731
    if form in ones and through != "Augment":
        call = lambda: chain(x[0], ones[form])  # noqa: E731
    elif form == "collate":
        call = lambda: chain.collate([(x[i], {"m": mask}) for i in range(2)])  # noqa: E731
    with pytest.raises(ValueError, match=r"is a plain tensor or array of shape \((2, )?40, 60\)"):
        call()


@pytest.mark.parametrize("name", ["rotation", "resize", "pad", "zoom"])
def test_an_image_without_boxes_and_points_goes_on(name: str) -> None:
    make = {
        "rotation": lambda: v2().RandomRotation((90, 90), expand=True),
        "resize": lambda: v2().Resize((20, 30)),
        "pad": lambda: v2().Pad(3),
        "zoom": lambda: v2().RandomZoomOut(p=1.0),
    }[name]
    empty = {"boxes": type(box())(torch.zeros(0, 4), format="XYXY", canvas_size=(H, W))}
    empty["points"] = type(points())(torch.zeros(0, 2), canvas_size=(H, W))
    x = images()
    y, moved = Compose([make(), v2().Resize((10, 12))])(x, [empty, dict(empty)])
    assert y.shape[-2:] == (10, 12)
    for of_sample in moved:
        assert of_sample["boxes"].shape == (0, 4)
        assert tuple(of_sample["boxes"].canvas_size) == (10, 12)
        assert tuple(of_sample["points"].canvas_size) == (10, 12)
