"""When the host waits for the device: at no operation but those that say so.

A wait is a synchronization, a copy with memory that is not pinned, or an operator of torch's whose
result has a shape that only the device knows.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import augment_peers
import fusereg
from fusereg import augment
from fusereg.batch_norm import sync_op
from fusereg.batch_norm.kernels import Call, Constants
from fusereg.batch_norm.kernels import Inputs as BatchNormInputs
from fusereg.core.groups import CoupledChannels, Groups, Member
from fusereg.core.inventory import Inputs, Operation
from layers import LAYERS
from ops import FUNCTIONS, differentiated, named
from standin_device import device

CUDA = torch.device("cuda", 0)


def waits_of(call: Callable[[], object]) -> list[device.Wait]:
    """Return the waits of a second call: the first makes memory and tables."""
    call()
    with device.waits() as found:
        call()
    return found


def images(*shape: int) -> Tensor:
    return torch.rand(shape or (4, 3, 5, 5)).to(CUDA)


# Rows that make a layer move it to the device; the layers are below.
@named([operation for operation in FUNCTIONS if not operation.name.startswith("nn.")])
def test_no_operation_waits(operation: Operation) -> None:
    tensors = operation.sample(Inputs(CUDA))
    assert waits_of(lambda: differentiated(operation, tensors)) == []


def _on_device(values: tuple[Any, ...]) -> list[Tensor]:
    return [t.to(CUDA) for t in values]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_no_layer_waits_in_training(layer: type[torch.nn.Module]) -> None:
    arguments, inputs = LAYERS[layer]
    module = layer(**arguments).to(CUDA)
    given = _on_device(inputs())

    def step() -> None:
        x = given[0].clone().requires_grad_()
        y = module(x, *given[1:])
        y = y[0] if isinstance(y, tuple) else y
        if y.requires_grad:
            y.sum().backward()

    assert waits_of(step) == []


#: All that one may ask of a step, where the optimizer has it.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "l1": 0.01, "group": 0.01, "prox": True},
    "Adam": {"amsgrad": True, "l2": 0.01, "max_grad_norm": 1.0},
    "AdamW": {"l1": 0.01, "group": 0.01, "prox": True, "max_grad_norm": 1.0},
    "Adagrad": {"l1": 0.01},
    "FTRL": {"l1": 0.01},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "NAdam": {},
    "Lion": {"l1": 0.01},
    "LAMB": {"max_grad_norm": 1.0},
}


@pytest.mark.parametrize("skipped", [None, 0.0, 1.0], ids=["", "no overflow", "overflow"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_optimizer_waits(name: str, skipped: float | None) -> None:
    """With numbers on the device, masters and averages, from the second step on."""
    params = [torch.nn.Parameter(images(5, 7)) for _ in range(3)]
    params.append(torch.nn.Parameter(images(9).bfloat16()))
    optimizer = getattr(fusereg.optim, name)(
        params,
        lr=torch.tensor(0.1).to(CUDA),
        master_weights=True,
        ema_decay=torch.tensor(0.5).to(CUDA),
        **OPTIONS[name],
    )
    if skipped is not None:
        optimizer.grad_scale = torch.ones((), device=CUDA)

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    if skipped is not None:
        optimizer.found_inf = torch.full((), skipped, device=CUDA)
    assert waits_of(step) == []


#: Of these a skipped first step has to be a first step again, which the host must know of.
UNDONE: dict[str, dict[str, Any]] = {
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "averages": {"ema_decay": 0.5},
}


@pytest.mark.parametrize("options", [{}, *UNDONE.values()], ids=["", *UNDONE])
@pytest.mark.parametrize("overflow", [None, False, True], ids=["unscaled", "scaled", "overflow"])
def test_first_steps_that_may_be_undone_wait(
    overflow: bool | None, options: dict[str, Any]
) -> None:
    """Under a GradScaler, once; no other first step waits."""
    params = [torch.nn.Parameter(images(5, 7)) for _ in range(3)]
    optimizer = fusereg.optim.SGD(params, lr=0.1, **{"momentum": 0.9, **options})
    if overflow is not None:
        optimizer.grad_scale = torch.ones((), device=CUDA)
    counts = []
    for overflows in (overflow, False, False):
        if overflow is not None:
            optimizer.found_inf = torch.full((), float(overflows or 0), device=CUDA)
        for p in params:
            p.grad = torch.ones_like(p)
        with device.waits() as found:
            optimizer.step()
        counts.append(len(found))
    first = int(bool(options) and overflow is not None)
    assert counts == [first, first if overflow else 0, 0]


@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_after_loading_waits(name: str) -> None:
    """Also where the states were loaded to the CPU."""
    params = [torch.nn.Parameter(images(5, 7)), torch.nn.Parameter(images(9).bfloat16())]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded, kept = (
        getattr(fusereg.optim, name)(own, lr=0.1, master_weights=True, **OPTIONS[name])
        for own in (copies, params)
    )

    def step(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    step(kept)
    with torch.no_grad():
        for copied, p in zip(copies, params, strict=True):
            copied.copy_(p)
    written = io.BytesIO()
    torch.save(kept.state_dict(), written)
    written.seek(0)
    loaded.load_state_dict(torch.load(written, map_location="cpu", weights_only=True))
    with device.waits() as found:
        step(loaded)
    step(kept)
    assert found == []
    for copied, p in zip(copies, params, strict=True):
        assert torch.equal(copied, p)


def _model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)).to(CUDA)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def penalties_and_clipping() -> dict[str, Callable[[], object]]:
    model = _model()
    params = list(model.parameters())
    grads = [p.grad for p in params if p.grad is not None]
    penalty = fusereg.WeightPenalty(model, l1=0.1, l2=0.1, group=0.1)
    attached = fusereg.WeightPenalty(model, l1=0.1)
    optimizer = torch.optim.SGD(params, lr=0.1)
    attached.attach(optimizer)
    return {
        "WeightPenalty.penalty": lambda: penalty.penalty().backward(),
        "WeightPenalty.add_grad_": penalty.add_grad_,
        "WeightPenalty.attach": optimizer.step,
        "add_penalty_grad_": lambda: fusereg.add_penalty_grad_(params, l1=0.1),
        "prox.elastic_net_": lambda: fusereg.prox.elastic_net_(params, 0.1, 0.1),
        "get_total_norm": lambda: fusereg.optim.get_total_norm(grads),
        "clip_grad_norm_": lambda: fusereg.optim.clip_grad_norm_(params, 1.0),
        "clip_grad_value_": lambda: fusereg.optim.clip_grad_value_(params, 1.0),
        "adaptive_clip_grad_": lambda: fusereg.optim.adaptive_clip_grad_(params, 0.01),
    }


def coupled() -> Groups:
    """Return the channels between two layers of a model on the device."""
    first, _, second = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).to(CUDA)
    channels = torch.arange(6)
    members = tuple(
        Member(name, p, dim, channels)
        for name, p, dim in (
            ("w", first.weight, 0),
            ("b", first.bias, 0),
            ("next", second.weight, 1),
        )
    )
    for member in members:
        member.parameter.grad = torch.ones_like(member.parameter)
    return Groups([CoupledChannels("hidden", 6, members, (), torch.ones(6, dtype=torch.float64))])


def of_coupled_channels() -> dict[str, Callable[[], object]]:
    groups = coupled()
    params = [m.parameter for own in groups for m in own.members]

    def scaled(optimizer: Any) -> Callable[[], object]:
        optimizer.step()
        optimizer.grad_scale = torch.ones((), device=CUDA)
        optimizer.found_inf = torch.zeros((), device=CUDA)
        return optimizer.step  # type: ignore[no-any-return]

    options: dict[str, Any] = {"lr": 0.1, "groups": groups, "group": 0.1, "l1": 0.01}
    return {
        "group_lasso_penalty": lambda: fusereg.functional.group_lasso_penalty(
            groups, 0.3, l1=0.1
        ).backward(),
        "prox.group_lasso_": lambda: fusereg.prox.group_lasso_(groups, 0.3, l1=0.1),
        "SGD": fusereg.optim.SGD(params, momentum=0.9, **options).step,
        "AdamW": fusereg.optim.AdamW(params, **options).step,
        "SGD, scaled": scaled(fusereg.optim.SGD(params, **options)),
    }


@pytest.mark.parametrize("name", of_coupled_channels())
def test_nothing_of_coupled_channels_waits(name: str) -> None:
    assert waits_of(of_coupled_channels()[name]) == []


@pytest.mark.parametrize("name", penalties_and_clipping())
def test_no_penalty_and_no_clipping_waits(name: str) -> None:
    assert waits_of(penalties_and_clipping()[name]) == []


def test_mixing_labels_on_the_device_does_not_wait() -> None:
    mix = augment.Augment(size=4, mix=augment.Mix(mixup=0.4, cutmix=1.0, num_classes=5))
    x, labels = images(), torch.tensor([0, 1, 4, 2]).to(CUDA)
    assert waits_of(lambda: mix(x, labels)) == []


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_boxes_points_and_masks_on_the_device_do_not_wait(place: str) -> None:
    params = augment.Augment(size=4, hflip=0.5).sample_params(4, input_size=(5, 5)).to(place)
    points, boxes, mask = images(4, 2, 3), images(4, 2, 4), images(4, 5, 5) > 0.5
    x = images()
    for call in (
        lambda: params.keypoints(points),
        lambda: params.keypoints(points[..., :2]),
        *(
            functools.partial(params.boxes, boxes, format=form)
            for form in ("xyxy", "xywh", "cxcywh")
        ),
        lambda: params.boxes(boxes, clip=False),
        lambda: params.mask(mask),
        lambda: params.warp(x),
        lambda: params.inverse().warp(x[..., :4, :4]),
    ):
        assert waits_of(call) == []


#: Of torchvision's types on the device: the shape of a value, and the arguments of its type.
TARGETS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Mask": ((2, 5, 5), {}),
    "KeyPoints": ((2, 2), {"canvas_size": (5, 5)}),
    **{
        f"BoundingBoxes {form}": (
            (2, 8 if form == "XYXYXYXY" else 4),
            {"canvas_size": (5, 5), "format": form},
        )
        for form in ("XYXY", "XYWH", "CXCYWH", "XYXYXYXY")
    },
}


def labeled_images(name: str, **rules: Any) -> Callable[[], object]:
    """Return a call with a target of torchvision's for each image."""
    tv_tensors = augment_peers.torchvision_module("torchvision.tv_tensors")
    kind, (shape, arguments) = name.split()[0], TARGETS[name]
    values = [getattr(tv_tensors, kind)(images(*shape) * 4, **arguments) for _ in range(4)]
    chain = augment.Augment(size=4, hflip=0.5, **rules)
    x = images()
    return lambda: chain(x, [{"value": v} for v in values])


@pytest.mark.parametrize("name", TARGETS)
def test_targets_on_the_device_do_not_wait(name: str) -> None:
    rules = {"keypoint_pairs": [(0, 1)]} if name == "KeyPoints" else {}
    assert waits_of(labeled_images(name, **rules)) == []


@pytest.mark.parametrize(
    "layer",
    [
        c
        for c in LAYERS
        if c.__module__.startswith("fusereg.augment") and c is not augment.Normalize
    ],
    ids=lambda layer: layer.__name__,
)
def test_no_transform_of_whole_numbers_waits(layer: type[torch.nn.Module]) -> None:
    arguments, inputs = LAYERS[layer]
    x, *labels = _on_device(inputs())
    transform, x = layer(**arguments), (x * 60 + 128).to(torch.uint8)
    assert waits_of(lambda: transform(x, *labels)) == []


def test_programs_of_floating_images_do_not_wait() -> None:
    transform, x = augment.TimmAugment("rand-n30-m9"), images(4, 3, 8, 8)
    assert waits_of(lambda: transform(x)) == []


def test_a_given_seed_does_not_wait() -> None:
    x = images(8, 8)
    assert waits_of(lambda: fusereg.functional.dropout(x, 0.5, seed=2**63 + 5)) == []
    call = torch.func.vmap(
        lambda row: fusereg.functional.dropout(row, 0.5, seed=7), randomness="same"
    )
    assert waits_of(lambda: call(x)) == []


def test_synchronized_batch_norm_with_dropout_does_not_wait() -> None:
    x = images()
    moments = torch.ones(3, 3, dtype=torch.float64).to(CUDA)

    def call() -> None:
        given = Call(BatchNormInputs(x, seed=(3, 4)), Constants(p=0.5))
        sync_op.normalize(given, moments, lambda sums: sums)

    assert waits_of(call) == []


def attached_step() -> None:
    """Take a step that the optimizer skips or not, with a penalty that counts steps."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    fusereg.WeightPenalty(model, l1=0.1).attach(optimizer)
    optimizer.grad_scale = torch.ones((), device=CUDA)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=CUDA)  # type: ignore[attr-defined]
    optimizer.step()


#: Public calls for which the host waits, and what of them says so.
DOCUMENTED: dict[str, tuple[Callable[[], object], Any]] = {
    "sparsity": (lambda: fusereg.sparsity([images(5, 5)]), fusereg.sparsity),
    "batch_norm in place": (
        lambda: fusereg.functional.batch_norm(
            images() * 1,
            None,
            None,
            torch.ones(3).to(CUDA).requires_grad_(),
            training=True,
            inplace=True,
        ),
        fusereg.functional.batch_norm,
    ),
    "get_total_norm": (
        lambda: fusereg.optim.get_total_norm([images(3)], error_if_nonfinite=True),
        fusereg.optim.get_total_norm,
    ),
    "Augment of numbers on the device": (
        lambda: augment.Augment(size=4)(images(), sample_ids=torch.arange(4).to(CUDA)),
        augment.Augment.forward,
    ),
    "Augment of probabilities on the device": (
        lambda: augment.Augment(size=4, mix="mixup")(images(), torch.eye(5)[:4].to(CUDA)),
        augment.Augment.forward,
    ),
    "AugmentParams on the device, selected": (
        lambda: augment.Augment(size=4).sample_params(4, input_size=(5, 5)).to(CUDA)[1:3],
        augment.AugmentParams,
    ),
    "AugmentParams on the device, asked": (
        lambda: augment.Augment(size=4).sample_params(4, input_size=(5, 5)).to(CUDA).moves,
        augment.AugmentParams,
    ),
    "WeightPenalty.attach to a scaled optimizer": (
        attached_step,
        fusereg.WeightPenalty.attach,
    ),
    "EarlyStopping.step": (
        lambda: fusereg.EarlyStopping(_model(), patience=1).step(images(1).sum(), epoch=0),
        fusereg.EarlyStopping.step,
    ),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_waits_says_so(name: str) -> None:
    call, documented = DOCUMENTED[name]
    with device.waits() as found:
        call()
    assert [w for w in found if "/fusereg/" in w.where[0] + "".join(w.where[1:4])]
    assert "wait" in documented.__doc__.lower()


@pytest.mark.parametrize("rule", ["min_area", "min_visibility"])
def test_boxes_that_are_left_out_wait(rule: str) -> None:
    """How many are left is for the host to know."""
    call = labeled_images("BoundingBoxes XYXY", **{rule: 0.5})
    assert waits_of(call)
    assert f"``{rule}``" in augment.Augment.__doc__.split("waits for a GPU")[0]  # type: ignore[union-attr]
