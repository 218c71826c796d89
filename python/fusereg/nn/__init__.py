"""Layers: drop-in replacements for those of torch.nn, with the same arguments and the same repr."""

from ..batch_norm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..batch_norm.statistics import keep_stats
from ..batch_norm.sync import SyncBatchNorm
from ..batch_norm.variants import BatchRenorm, FrozenBatchNorm, GhostBatchNorm
from ..cross_entropy.layers import CrossEntropyLoss
from ..drop_block.layers import DropBlock2d
from ..drop_connect.layers import DropConnectConv2d, DropConnectLinear
from ..dropout.consistent import ConsistentDropout
from ..dropout.layers import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from ..dropout_norm.layers import DropoutAddLayerNorm, DropoutAddRMSNorm
from ..fused_dropout.layers import ActivationDropout, BiasDropoutAdd, DropoutAdd, DropPathAdd
from ..gaussian_dropout.layers import GaussianDropout

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BiasDropoutAdd",
    "ConsistentDropout",
    "CrossEntropyLoss",
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
