"""Layers: drop-in replacements for those of torch.nn, with the same arguments and the same repr."""

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .batch_norm_variants import BatchRenorm, FrozenBatchNorm, GhostBatchNorm
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
from .statistics import keep_stats
from .sync_batch_norm import SyncBatchNorm

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
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
    "FrozenBatchNorm",
    "GaussianDropout",
    "GhostBatchNorm",
    "SyncBatchNorm",
    "keep_stats",
]
