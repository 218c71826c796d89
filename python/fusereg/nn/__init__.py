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
from .dropout_norm import DropoutAddLayerNorm, DropoutAddRMSNorm
from .fused_dropout import ActivationDropout, BiasDropoutAdd, DropoutAdd, DropPathAdd
from .gaussian_dropout import GaussianDropout

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "BiasDropoutAdd",
    "ConsistentDropout",
    "DropBlock2d",
    "DropConnectConv2d",
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
    "GaussianDropout",
]
