"""Every public layer, made with its shortest arguments, and inputs for a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusereg
from fusereg import augment
from fusereg.batch_norm.fold import Epilogue


def _values(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.linspace(-2.0, 2.0, torch.Size(shape).numel()).view(shape),)


def _images(count: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _values(4, 3, 5, 5)() * count


def _labeled() -> tuple[Tensor, ...]:
    return (*_images()(), torch.tensor([0, 1, 1, 0]))


#: Class -> (arguments of the constructor, inputs of a call).
LAYERS: dict[type[nn.Module], tuple[dict[str, Any], Callable[[], tuple[Tensor, ...]]]] = {
    **{
        getattr(fusereg.nn, name): ({}, _images())
        for name in (
            *("ActivationDropout", "AlphaDropout", "ConsistentDropout", "DropBlock2d", "DropPath"),
            *("Dropout", "Dropout2d", "FeatureAlphaDropout", "GaussianDropout"),
        )
    },
    fusereg.nn.Dropout1d: ({}, _values(4, 3, 5)),
    fusereg.nn.Dropout3d: ({}, _values(4, 3, 2, 2, 2)),
    fusereg.nn.BiasDropoutAdd: ({}, lambda: (*_values(4, 3)(), torch.ones(3), torch.ones(4, 3))),
    fusereg.nn.DropoutAdd: ({}, _images(2)),
    fusereg.nn.DropPathAdd: ({}, _images(2)),
    fusereg.nn.DropoutAddLayerNorm: ({"normalized_shape": 5}, _images(2)),
    fusereg.nn.DropoutAddRMSNorm: ({"normalized_shape": 5}, _images(2)),
    fusereg.nn.DropConnectLinear: ({"in_features": 5, "out_features": 2}, _images()),
    fusereg.nn.DropConnectConv2d: (
        {"in_channels": 3, "out_channels": 2, "kernel_size": 3},
        _images(),
    ),
    fusereg.nn.BatchNorm1d: ({"num_features": 3}, _values(4, 3)),
    fusereg.nn.BatchNorm2d: ({"num_features": 3}, _images()),
    fusereg.nn.BatchNorm3d: ({"num_features": 3}, _values(4, 3, 2, 2, 2)),
    fusereg.nn.BatchRenorm: ({"num_features": 3}, _images()),
    fusereg.nn.FrozenBatchNorm: ({"num_features": 3}, _images()),
    fusereg.nn.GhostBatchNorm: ({"num_features": 3}, _images()),
    fusereg.nn.SyncBatchNorm: ({"num_features": 3}, _images()),
    fusereg.nn.CrossEntropyLoss: ({}, lambda: (*_values(4, 3)(), torch.tensor([0, 2, 1, 0]))),
    Epilogue: ({"activation": "relu", "negative_slope": 0.01}, _images()),
    augment.Augment: ({"size": 4}, _images()),
    augment.CenterCrop: ({"size": 4}, _images()),
    augment.ColorJitter: ({"brightness": 0.5, "hue": 0.1}, _images()),
    augment.CutMix: ({"num_classes": 2}, _labeled),
    augment.MixUp: ({"num_classes": 2}, _labeled),
    augment.Normalize: ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, _images()),
    augment.RandAugment: ({}, _images()),
    augment.RandomAffine: ({"degrees": 9}, _images()),
    augment.RandomCrop: ({"size": 4}, _images()),
    augment.RandomErasing: ({}, _images()),
    augment.RandomHorizontalFlip: ({}, _images()),
    augment.RandomResizedCrop: ({"size": 4}, _images()),
    augment.RandomPerspective: ({"p": 1.0}, _images()),
    augment.RandomRotation: ({"degrees": 9}, _images()),
    augment.RandomVerticalFlip: ({}, _images()),
    augment.TimmAugment: ({"config": "rand-m9-mstd0.5-inc1"}, _images()),
    augment.TrivialAugmentWide: ({}, _images()),
    augment.Compose: ({"transforms": [augment.RandomHorizontalFlip()]}, _images()),
}


def public_layers() -> set[type[nn.Module]]:
    """Return every class of modules that the faces name."""
    found = set()
    for face in (fusereg, fusereg.nn, augment):
        for name in face.__all__:
            value = getattr(face, name)
            if isinstance(value, type) and issubclass(value, nn.Module):
                found.add(value)
    return found - {augment.Transform}  # a base
