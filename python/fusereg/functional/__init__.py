"""Functions without state. All are differentiable unless they say otherwise."""

from ..batch_norm.functional import batch_norm
from ..cross_entropy.functional import cross_entropy
from ..drop_block.functional import drop_block2d
from ..drop_connect.functional import drop_connect_conv2d, drop_connect_linear
from ..dropout.consistent import consistent_dropout
from ..dropout.functional import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_mask,
    feature_alpha_dropout,
)
from ..dropout_norm.functional import dropout_add_layer_norm, dropout_add_rms_norm
from ..fused_dropout.functional import (
    activation_dropout,
    bias_dropout_add,
    drop_path_add,
    dropout_add,
)
from ..gaussian_dropout.functional import gaussian_dropout
from ..penalty.functional import elastic_net_penalty, group_lasso_penalty, l1_penalty, l2_penalty
from ..penalty.others import activity_penalty, orthogonality_penalty, spectral_norm_penalty

__all__ = [
    "activation_dropout",
    "activity_penalty",
    "alpha_dropout",
    "batch_norm",
    "bias_dropout_add",
    "consistent_dropout",
    "cross_entropy",
    "drop_block2d",
    "drop_connect_conv2d",
    "drop_connect_linear",
    "drop_path",
    "drop_path_add",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_mask",
    "elastic_net_penalty",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
    "orthogonality_penalty",
    "spectral_norm_penalty",
]
