"""Layers: drop-in replacements for those of torch.nn, with the same arguments and the same repr."""

from .consistent_dropout import ConsistentDropout
from .drop_block import DropBlock2d
from .drop_connect import DropConnectConv2d, DropConnectLinear
from .dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from .gaussian_dropout import GaussianDropout

__all__ = [
    "AlphaDropout",
    "ConsistentDropout",
    "DropBlock2d",
    "DropConnectConv2d",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
]
