"""Functions without state. All are differentiable unless they say otherwise."""

from ._dropout import (
    alpha_dropout,
    drop_connect_linear,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_mask,
    feature_alpha_dropout,
)
from ._dropout_norm import dropout_add_layer_norm, dropout_add_rms_norm
from ._penalty import (
    elastic_net_penalty,
    group_lasso_penalty,
    l1_penalty,
    l2_penalty,
)

__all__ = [
    "alpha_dropout",
    "drop_connect_linear",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_mask",
    "elastic_net_penalty",
    "feature_alpha_dropout",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
]
