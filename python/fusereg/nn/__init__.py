"""Layers: drop-in replacements for those of torch.nn, with the same arguments and the same repr."""

from .dropout import (
    AlphaDropout,
    DropConnectLinear,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from .dropout_norm import DropoutAddLayerNorm, DropoutAddRMSNorm

__all__ = [
    "AlphaDropout",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FeatureAlphaDropout",
]
