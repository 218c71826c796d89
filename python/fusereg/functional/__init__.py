"""Functions without state. All are differentiable unless they say otherwise."""

from ._batch_norm import batch_norm
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
from ._penalty import (
    elastic_net_penalty,
    group_lasso_penalty,
    l1_penalty,
    l2_penalty,
)

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "drop_connect_linear",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_mask",
    "elastic_net_penalty",
    "feature_alpha_dropout",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
]
