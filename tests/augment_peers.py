"""Other libraries of augmentation, where they can be imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import other_libraries  # noqa: F401  # makes a torchvision importable that does not fit this torch
from fusereg import _C
from fusereg.augment import program as P


def torchvision_module(name: str) -> Any:
    """A module of torchvision; the test is skipped where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module(name)
    except (RuntimeError, ImportError, AttributeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


class Torch:
    """torch for a module of torchvision, with given random numbers."""

    def __init__(self, numbers: P.Numbers) -> None:
        self.numbers = numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def rand(self, *_: Any) -> Tensor:
        return torch.tensor(self.numbers.uniform(), dtype=torch.float64)

    def randint(self, *args: Any, low: int = 0, high: int = 0, size: Any = ()) -> Tensor:
        count = args[0] if args else high - low
        return torch.tensor(low + self.numbers.below(count))

    def randperm(self, count: int) -> Tensor:
        places = [self.numbers.uniform() for _ in range(count)]
        return torch.tensor(sorted(range(count), key=places.__getitem__))


def numbers_of(seed: int, sample: int, columns: int, occurrence: int = 0) -> P.Numbers:
    values = torch.empty(1, columns, dtype=torch.float64)
    ids = torch.tensor([sample])
    _C.augment_numbers(values, ids, seed, 0, occurrence, columns, 0, "test")
    return P.Numbers(values[0].tolist(), 0)


def by_torchvision(
    transform: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, seed: int, columns: int
) -> Tensor:
    """What torchvision's own transform gives of each image with the numbers of its id."""
    results = []
    module = __import__(type(transform).__module__, fromlist=["torch"])
    for i, image in enumerate(x):
        numbers = numbers_of(seed, i, columns)
        with monkeypatch.context() as patched:
            patched.setattr(module, "torch", Torch(numbers))
            results.append(transform(image))
    return torch.stack(results)


#: Whose photographs tests are run with: scikit-image's are in its package, and read without it.
SOURCES = ("scikit-learn", "scikit-image")


@functools.cache
def photographs(source: str = SOURCES[0]) -> list[Tensor]:
    """Two photographs [3, 427, 640], and parts of these or others of other sizes."""
    if source == "scikit-learn":
        datasets = pytest.importorskip("sklearn.datasets")
        china, flower = map(_first, datasets.load_sample_images().images)
        parts = [china, flower, china[:, 40:390, 100:500], flower[:, :301, 200:]]
        parts.append(china[:, 100:, :333])
    else:
        found = importlib.util.find_spec("skimage")
        if found is None or found.origin is None:
            pytest.skip("scikit-image is not installed")
        pil = pytest.importorskip("PIL.Image")
        folder = Path(found.origin).parent / "data"
        names = (
            "rocket.jpg",
            "hubble_deep_field.jpg",
            "astronaut.png",
            "coffee.png",
            "chelsea.png",
        )
        rocket, sky, portrait, cup, cat = (
            _first(np.asarray(pil.open(folder / name).convert("RGB"))) for name in names
        )
        parts = [rocket, sky[:, 200:627, 200:840], portrait[:, 40:390, 100:500]]
        parts += [cup[:, :301, 200:], cat[:, :, :333]]
    return [part.contiguous() for part in parts]


def _first(image: Any) -> Tensor:
    return torch.tensor(image).permute(2, 0, 1)
