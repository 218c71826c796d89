"""Layers: drop-in replacements for those of torch.nn, with the same arguments and the same repr."""

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .batch_norm_variants import BatchRenorm, FrozenBatchNorm, GhostBatchNorm
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
from .sync_batch_norm import SyncBatchNorm

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "SyncBatchNorm",
]
