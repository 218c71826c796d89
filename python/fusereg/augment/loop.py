"""Transforms without a kernel: called for each sample, under a generator keyed by the sample."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import image_tensor, pil_image
from .params import BOX_FORMATS, Drawn, of_corners
from .seeded import ONE_AT_A_TIME, mix_bits
from .targets import Targets
from .tree import area, cut_corners, hulls_of, kind_of, leaves_of, plain, tv_tensors

#: torchvision's transforms that change values alone.
_VALUES_ONLY = {
    *("ToDtype", "ConvertImageDtype", "Grayscale", "RandomGrayscale", "RGB", "ColorJitter"),
    *("RandomChannelPermutation", "RandomPhotometricDistort", "RandomEqualize", "RandomInvert"),
    *("RandomPosterize", "RandomSolarize", "RandomAutocontrast", "RandomAdjustSharpness"),
    *("GaussianBlur", "GaussianNoise", "JPEG", "Normalize", "LinearTransformation", "Identity"),
    *("ToImage", "ToPureTensor", "ClampBoundingBoxes", "ConvertBoundingBoxFormat"),
    *("SanitizeBoundingBoxes", "SanitizeKeyPoints", "ClampKeyPoints", "SetClampingMode"),
    "RandomErasing",
}
#: And those that move pixels, and keep the image's size.
_KEEP_SIZE = {
    *("RandAugment", "TrivialAugmentWide", "AutoAugment", "RandomPerspective", "RandomAffine"),
    *("RandomHorizontalFlip", "RandomVerticalFlip", "ElasticTransform", "AugMix"),
}


#: Transforms of other libraries that need several samples.
_OF_BATCHES = re.compile("Mix|Mosaic|Jigsaw|Sequential")


#: What calling a transform runs, and whose functions these are unless somebody replaces them.
_METHODS = ("forward", "transform", "make_params", "get_params", "__call__")
_AUTHORS = ("torchvision.", "torch.", "fusereg.", "timm.")


def why_called(item: Any) -> str:
    """Return what calling a transform does beside what its arguments say, or an empty string."""
    kind = type(item)
    own = getattr(item, "__dict__", {})
    if own.get("_forward_hooks") or own.get("_forward_pre_hooks"):
        return "it has hooks"
    replaced = [k for k, v in own.items() if callable(v) and callable(getattr(kind, k, None))]
    for name in () if replaced else _METHODS:
        module = getattr(getattr(kind, name, None), "__module__", None)
        if module is not None and not module.startswith(_AUTHORS):
            replaced.append(name)
    return f"it has a {replaced[0]} of its own" if replaced else ""


@dataclass(frozen=True)
class Called:
    """A transform that is called.

    Attributes:
        name: for the plan.
        function: what is called.
        each: with one sample after the other, each under a generator of its own; otherwise with the
            whole batch.
        targets: it takes the image's targets as well.
        reason: why it is called, for the plan.
        moves: it may move pixels.
        resizes: it may change the size.
        form: what it takes with ``each``: an "image" (C, H, W), one of "pil", or a "batch" of one.
    """

    name: str
    function: Callable[..., Any]
    each: bool = False
    targets: bool = False
    reason: str = "fusereg does not know it"
    moves: bool = True
    resizes: bool = True
    form: str = "image"

    def one(self, image: Tensor, op: str) -> Any:
        """Call it with one image or clip, in the form that it takes."""
        if self.form == "batch":
            return self.function(plain(image)[None])[0]
        if self.form == "pil":
            return image_tensor(self.function(pil_image(plain(image))), op)
        return self.function(image)

    @staticmethod
    def of(item: Callable[..., Any], reason: str = "") -> Called:
        """Return how an unknown transform is called."""
        kind = type(item)
        name = getattr(item, "__name__", kind.__name__)
        modules = [base.__module__ for base in kind.__mro__]
        takes_targets = any(m.startswith("torchvision.transforms.v2") for m in modules)
        if modules[0].startswith("timm.data") and not _OF_BATCHES.search(name):
            form = "image" if name == "RandomErasing" else "pil"
            return Called(name, item, True, reason="it is timm's", form=form)
        if modules[0].startswith("kornia.augmentation") and not _OF_BATCHES.search(name):
            return Called(name, item, True, reason="it is kornia's", form="batch")
        if not takes_targets and not modules[0].startswith("torchvision.transforms"):
            return Called(name, item)
        parts = _parts(item) or [item]
        ours = all(type(p).__module__.startswith("torchvision.transforms") for p in parts)
        names = {type(p).__name__ for p in parts}
        return Called(
            name,
            item,
            each=True,
            targets=takes_targets,
            reason=reason or "there is no kernel for it",
            moves=not (ours and names <= _VALUES_ONLY),
            resizes=not (ours and names <= _VALUES_ONLY | _KEEP_SIZE),
        )


def _parts(item: Any) -> list[Any]:
    """Return the transforms within one of torchvision's containers."""
    if type(item).__name__ not in ("Compose", "RandomApply", "RandomChoice", "RandomOrder"):
        return []
    return [p for inner in item.transforms for p in _parts(inner) or [inner]]


@dataclass(frozen=True, eq=False)
class CallParams(Drawn):
    """The seeds that a transform without a kernel draws by, as ``sample_params`` gives them.

    Attributes:
        seeds: [N] int64: of the generators that it runs under.
        sample_ids: [N] int64.
    """

    seeds: Tensor
    sample_ids: Tensor


@contextmanager
def numbers_of(x: Any) -> Iterator[Callable[[int], None]]:
    """Give a function that seeds all generators, and put their states back in the end.

    Those of torch (of x's device as well), of Python and of NumPy: the process has one of each, so
    threads take turns.
    """
    generators = [torch.default_generator]
    if isinstance(x, Tensor) and x.device.type == "cuda":
        index = torch.cuda.current_device() if x.device.index is None else x.device.index
        generators.append(torch.cuda.default_generators[index])
    numpy = sys.modules.get("numpy")

    def seed(value: int) -> None:
        for generator in generators:
            generator.manual_seed(value)
        random.seed(value)
        if numpy is not None:
            numpy.random.seed(value % 2**32)

    with ONE_AT_A_TIME:
        states = [g.get_state() for g in generators]
        python = random.getstate()
        array = None if numpy is None else numpy.random.get_state()
        try:
            yield seed
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(array)


Images = Tensor | list[Tensor]


def call(
    called: Called, x: Tensor, params: CallParams, found: Targets | None, op: str, frames: int
) -> tuple[Images, list[Any] | None]:
    """Call a transform with a batch: the images, in a list if their sizes differ, and the targets.

    Those are a tree for each sample, or None where the transform does not take them.

    ``x`` is [N * frames, C, H, W]; a clip is called as one.
    """
    n = len(x) // frames
    if len(params) != n:
        raise ValueError(
            f"fusereg.{op}: params of {called.name} must be of {n} samples, got {len(params)}"
        )
    if found is not None and called.moves:
        found.check_all_move(called.name)
        if not called.targets:
            alone = (
                f"{called.name} is called with the images alone. If it changes values only, wrap "
                "it in torchvision.transforms.v2.Lambda(function, tv_tensors.Image)"
            )
            refuse_types(found, op, alone)
    if not called.each:
        with numbers_of(x) as seed:
            seed(mix_bits(*params.seeds.tolist()))
            y = called.function(x)
        if not isinstance(y, Tensor) or y.dim() != 4 or len(y) != len(x):
            what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"fusereg.{op}: {called.name} is called with images [{len(x)}, C, H, W] and must "
                f"give as many, got {what}"
            )
        return y, None
    clips = x.reshape(-1, frames, *x.shape[1:]) if frames > 1 else x
    takes = found is not None and called.targets and found.any_types()
    trees = found.split(True) if found is not None and takes else None
    results: list[Tensor] = []
    with numbers_of(x) as seed:
        for i, value in enumerate(params.seeds.tolist()):
            seed(value)
            image = _typed(clips[i], frames)
            if found is None or trees is None:
                y = called.one(image, op)
            else:
                y, trees[i] = _with_targets(called, image, trees[i], found.rules.min_visibility > 0)
                if isinstance(y, Tensor):
                    _same_canvas(trees[i], (y.shape[-2], y.shape[-1]))
            if not isinstance(y, Tensor) or y.dim() != clips.dim() - 1:
                what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise TypeError(
                    f"fusereg.{op}: {called.name} must give an image (C, H, W) for each, got {what}"
                )
            results.append(plain(y))
    if all(_is_same(y, clip) for y, clip in zip(results, clips, strict=True)):
        return x, trees  # what a transform of boxes alone gives
    if len({y.shape for y in results}) > 1:
        return results, trees
    return (torch.cat if frames > 1 else torch.stack)(results), trees


def _is_same(y: Tensor, x: Tensor) -> bool:
    """Return whether a tensor is another one's memory, read in the same way."""
    form = (y.dtype, y.shape, y.stride())
    return y.data_ptr() == x.data_ptr() and form == (x.dtype, x.shape, x.stride())


def _typed(image: Tensor, frames: int) -> Tensor:
    """Return an image or a clip in the type by which torchvision tells it from its targets."""
    tv = tv_tensors()
    if tv is None:
        return image
    typed: Tensor = (tv.Video if frames > 1 else tv.Image)(plain(image))
    return typed


def _with_targets(called: Called, image: Tensor, tree: Any, counted: bool) -> tuple[Any, Any]:
    """Call a transform with an image and its targets.

    ``counted``: keep count of what is left of each box.
    """
    if isinstance(tree, list) and len(tree) == 1:  # the rest of a sample (image, target)
        y, moved = _with_targets(called, image, tree[0], counted)
        return y, [moved]
    boxes = [leaf for leaf in leaves_of(tree) if counted and kind_of(leaf) == "BoundingBoxes"]
    modes = [b.clamping_mode for b in boxes]
    for b in boxes:
        b.clamping_mode = None
    y, moved = called.function(image, tree)
    after = [leaf for leaf in leaves_of(moved) if counted and kind_of(leaf) == "BoundingBoxes"]
    for old, mode in zip(boxes, modes, strict=True):
        old.clamping_mode = mode
    if len(after) != len(boxes):
        return y, moved
    for old, new, mode in zip(boxes, after, modes, strict=True):
        new.clamping_mode = mode
        if new is old or len(old) != len(new):
            continue  # unchanged, or filtered by the transform itself
        form = str(new.format.value)
        whole, cut = hulls_of(plain(new), form), cut_corners(new)
        left = area(cut) / area(whole).clamp(min=1e-12)
        new.fusereg_visible = left * getattr(old, "fusereg_visible", 1.0)
        if mode is not None and form.lower() in BOX_FORMATS:
            plain(new).copy_(of_corners(cut, form.lower()))
    return y, moved


def _same_canvas(tree: Any, size: tuple[int, int]) -> None:
    """Give boxes and points the image's size where a rotation of torchvision's left another.

    One that expands rounds theirs to another pixel, and leaves that of no boxes as it was.
    """
    for leaf in leaves_of(tree):
        if kind_of(leaf) in ("BoundingBoxes", "KeyPoints"):
            apart = [abs(a - b) for a, b in zip(leaf.canvas_size, size, strict=True)]
            if max(apart) == 1 or not leaf.numel():
                leaf.canvas_size = size


def refuse_types(found: Targets, op: str, why: str) -> None:
    """Raise an error if there are targets that would have to move with the images."""
    for leaf in found.leaves:
        if leaf.kind not in ("", "Tensor") and found.rules.passthrough is not True:
            raise ValueError(
                f"fusereg.{op}: {leaf.path}, {leaf.kind}, would have to move with the images, and "
                f"{why}"
            )


def size_after(
    called: Called, size: tuple[int, int], dtype: torch.dtype, seed_value: int
) -> tuple[int, int]:
    """Return the size that a transform gives an image of this size, from its numbers."""
    image = torch.zeros(3, *size, dtype=dtype, device="cpu")
    with numbers_of(image) as seed:
        seed(seed_value)
        one = _typed(image, 1) if called.form == "image" else image
        y = called.one(one, "Compose") if called.each else called.function(image[None])
    return int(y.shape[-2]), int(y.shape[-1])
