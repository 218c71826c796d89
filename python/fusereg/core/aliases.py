"""Module paths of fusereg 0.1, which pickles and older imports may hold."""

from __future__ import annotations

import importlib
import sys

#: Path before a technique was one package -> path now.
MOVED = {
    "_convert_chain": "convert.chain",
    "_convert_layers": "convert.layers",
    "_convert_trace": "convert.trace",
    "_penalty_hook": "penalty.weight_penalty",
    "early_stopping.encoding": "core.encoding",
    "early_stopping.snapshot": "core.snapshot",
    "fold": "batch_norm.fold",
    "nn.batch_norm": "batch_norm.layers",
    "nn.batch_norm_variants": "batch_norm.variants",
    "nn.consistent_dropout": "dropout.consistent",
    "nn.drop_block": "drop_block.layers",
    "nn.drop_connect": "drop_connect.layers",
    "nn.dropout": "dropout.layers",
    "nn.dropout_norm": "dropout_norm.layers",
    "nn.fused_dropout": "fused_dropout.layers",
    "nn.gaussian_dropout": "gaussian_dropout.layers",
    "nn.statistics": "batch_norm.statistics",
    "nn.sync_batch_norm": "batch_norm.sync",
    "prox": "penalty.prox",
}


def install(package: str) -> None:
    """Make every old path import the module that is at the new one."""
    for old, new in MOVED.items():
        sys.modules[f"{package}.{old}"] = importlib.import_module(f"{package}.{new}")
