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
from .fused_dropout import ActivationDropout, BiasDropoutAdd, DropoutAdd, DropPathAdd

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "BiasDropoutAdd",
    "DropConnectLinear",
    "DropPath",
    "DropPathAdd",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FeatureAlphaDropout",
]
