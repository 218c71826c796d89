"""Loaders: samples that carry their ids, and batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..core.hints import explains
from .inputs import image_tensor
from .tree import batch_tree, kind_of, plain, stack, wrap

__all__ = ["WithIds"]

#: Keys of the image in samples that are mappings.
_IMAGE_KEYS = ("image", "pixel_values", "img", "images", "video")


@explains()
class WithIds(Dataset[Any]):
    """A dataset whose samples carry their index, as sample id for :meth:`Augment.collate`.

    >>> loader = DataLoader(WithIds(dataset), 64, collate_fn=augment.collate, num_workers=4)

    A sample that occurs again in an epoch (repeated augmentation, weighted sampling) draws anew.
    Workers do not know what the others have; :meth:`sampler` counts for all of them:

    >>> sampler = WithIds.sampler(WeightedRandomSampler(weights, 1000))
    >>> loader = DataLoader(WithIds(dataset), 64, sampler=sampler, collate_fn=augment.collate)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> _SampleWithId:
        """Return a sample with its index."""
        view = index.view if isinstance(index, _Counted) else None
        number = int(index)
        return _SampleWithId(self.dataset[number], number, view, len(self))

    @staticmethod
    def sampler(sampler: Iterable[Any]) -> Sampler[Any]:
        """Return a sampler, or batch sampler, whose indices carry their occurrence."""
        return _CountingSampler(sampler)


class _Counted(int):
    """An index, and how often it occurred before in the epoch."""

    view: int

    def __new__(cls, index: int, view: int) -> _Counted:
        """Return the index."""
        made = super().__new__(cls, index)
        made.view = view
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Counted, (int(self), self.view)


class _CountingSampler(Sampler[Any]):
    """A sampler that counts the occurrences of each index."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        """Return the number of indices."""
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the sampler, such as its set_epoch."""
        if name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield the indices, or lists of them."""
        seen: dict[int, int] = {}

        def counted(index: Any) -> _Counted:
            number = int(index)
            view = seen.get(number, 0)
            seen[number] = view + 1
            return _Counted(number, view)

        for item in self.sampler:
            yield [counted(i) for i in item] if isinstance(item, (list, tuple)) else counted(item)


@dataclass(frozen=True)
class _SampleWithId:
    """A sample, its id, its occurrence if that was counted, and the size of the dataset."""

    sample: Any
    id: int
    view: int | None
    total: int


def collate(augment: Any, samples: Sequence[Any]) -> Any:
    """Stack the samples of a dataset and augment them."""
    op = augment._op
    keys: dict[str, Any] = {}
    if isinstance(samples, (Tensor, Mapping)) or not isinstance(samples, Sequence):
        raise TypeError(
            f"fusereg.{op}.collate: samples must be a list of samples, got "
            f"{type(samples).__name__}; call the transform itself with a batch"
        )
    if not samples:
        raise ValueError(f"fusereg.{op}.collate: samples must not be empty")
    if isinstance(samples[0], _SampleWithId):
        if not all(isinstance(s, _SampleWithId) for s in samples):
            raise TypeError(
                f"fusereg.{op}.collate: all samples must be of WithIds, or none; wrap the dataset "
                "of all, as WithIds(ConcatDataset([...]))"
            )
        ids = [s.id for s in samples]
        views = [s.view for s in samples]
        keys = {"sample_ids": ids}
        keys["view"] = augment._occurrences_in_epoch(ids, views, samples[0].total)
        samples = [s.sample for s in samples]
    images, targets, put = _parted(samples, op)
    moved = _augmented(augment, images, targets, keys)
    return put(*moved)


def _parted(samples: Sequence[Any], op: str) -> tuple[list[Tensor], list[Any] | None, Any]:
    """Return the images, the targets, and a function that puts the batch together."""
    first = samples[0]
    if isinstance(first, (Mapping, tuple, list)):
        _check_alike(samples, op)
    if isinstance(first, Mapping):
        key = next((k for k in _IMAGE_KEYS if k in first), None)
        if key is None:
            kinds = [k for k, v in first.items() if kind_of(v) in ("Image", "Video")]
            if len(kinds) != 1:
                raise TypeError(
                    f"fusereg.{op}.collate: a sample must have its image at one of the keys "
                    f"{', '.join(_IMAGE_KEYS)}, got {list(first)}"
                )
            key = kinds[0]
        images = [s[key] for s in samples]
        rest = [{k: v for k, v in s.items() if k != key} for s in samples]

        def whole(y: Tensor, targets: Any) -> Any:
            return {k: y if k == key else targets[k] for k in first}

        return _images(images, op), rest if rest[0] else None, whole
    if isinstance(first, tuple) or (isinstance(first, list) and first):
        images = [s[0] for s in samples]
        if len(first) < 2:
            return _images(images, op), None, lambda y, _: [y]
        pairs = [tuple(s[1:]) for s in samples]
        return _images(images, op), pairs, lambda y, targets: [y, *targets]
    return _images(list(samples), op), None, lambda y, _: y


def _check_alike(samples: Sequence[Any], op: str) -> None:
    """Check that samples have the same keys, or the same number of values."""
    forms = [
        set(s) if isinstance(s, Mapping) else len(s) if isinstance(s, (tuple, list)) else None
        for s in samples
    ]
    for i, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"fusereg.{op}.collate: samples must have the same keys or number of values, got "
                f"{forms[0]}, and {form} of sample {i}"
            )


def _images(images: list[Any], op: str) -> list[Tensor]:
    made = [image_tensor(image, op) for image in images]
    for image in made:
        clip = isinstance(image, Tensor) and kind_of(image) == "Video"
        if not isinstance(image, Tensor) or image.dim() != (4 if clip else 3):
            what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"fusereg.{op}.collate: images must be tensors (C, H, W), got {what}")
    first = made[0]
    for i, image in enumerate(made):
        # One scale for all: bytes are of [0, 255], other numbers of [0, 1].
        if image.dtype != first.dtype:
            raise ValueError(
                f"fusereg.{op}.collate: images must have one dtype, got {first.dtype}, and "
                f"{image.dtype} of sample {i}"
            )
        if image.dim() == 4 and len(image) != len(first):
            raise ValueError(
                f"fusereg.{op}.collate: clips must have one number of frames, got {len(first)}, "
                f"and {len(image)} of sample {i}"
            )
        if image.shape[-3] != first.shape[-3]:
            raise ValueError(
                f"fusereg.{op}.collate: images must have one number of channels, got "
                f"{first.shape[-3]}, and {image.shape[-3]} of sample {i} "
                "(for images of PIL: image.convert('RGB'))"
            )
    return made


def _augmented(
    augment: Any, images: list[Tensor], targets: list[Any] | None, keys: dict[str, Any]
) -> tuple[Any, Any]:
    if any(image.shape != images[0].shape for image in images):
        several: tuple[Any, Any] = augment.run_several(images, targets, **keys)
        return several
    x = wrap(torch.stack([plain(image) for image in images]), images[0])
    if targets is None:
        return augment(x, **keys), None
    y, moved = augment(x, batch_tree(stack(targets)), **keys)
    return y, moved
