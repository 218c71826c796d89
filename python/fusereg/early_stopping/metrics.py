"""The watched metrics: one, several by name, or the weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.arguments import check_choice, check_type
from ..core.checks import as_number, check_mapping
from .checks import OP
from .decision import Metric, Mode


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return the weights as plain numbers; raise ValueError unless all are finite."""
    if weights is None:
        return None
    check_mapping(weights, f"{OP}: weights", "from names of metrics to numbers")
    found = {k: as_number(weight, f'{OP}: weights["{k}"]') for k, weight in weights.items()}
    if not found or not all(map(math.isfinite, found.values())):
        raise ValueError(f"{OP}: weights must name metrics with finite weights, got {weights!r}")
    return found


def check_metrics(
    metrics: Mapping[str, Metric | Mode] | None, single: Metric, weighted: bool
) -> dict[str, Metric]:
    """Return the metrics to judge, by name; raise where the ways to specify them are mixed."""
    if metrics is None:
        return {"weighted sum" if weighted else "metric": single}
    if weighted:
        raise ValueError(f"{OP}: metrics and weights exclude each other")
    if single != Metric():
        raise ValueError(
            f"{OP}: mode, min_delta, delta_mode, baseline, target, divergence and smoothing are "
            "for a single metric; with metrics, give each a Metric(...) of its own"
        )
    check_mapping(metrics, f"{OP}: metrics", 'like {"loss": "min"}')
    found = {}
    for name, metric in metrics.items():
        if isinstance(metric, str):
            check_choice(metric, ("min", "max"), f'{OP}: metrics["{name}"]')
            metric = Metric(metric)
        check_type(metric, Metric, f'{OP}: metrics["{name}"]', '"min", "max" or a Metric')
        found[name] = metric
    return found


def number(value: Any, name: str) -> float:
    """Return a metric's value as a float, which may be non-finite."""
    wanted = f"{OP}.step: {name} must be a number or a tensor of one element"
    if isinstance(value, Tensor):
        if value.is_nested:
            raise ValueError(f"{wanted}, got a nested tensor")
        if value.numel() != 1:
            raise ValueError(f"{wanted}, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{OP}.step: {name} must be real, got dtype {value.dtype}")
        return float(value.detach())
    if not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except TypeError:  # an array of several elements
            pass
        except OverflowError:  # an integer beyond floating point
            return math.inf if value > 0 else -math.inf
    raise TypeError(f"{wanted}, got {type(value).__name__}")


def weighted_sum(weights: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Return the correctly rounded weighted sum, or a non-finite value where a term is so."""
    terms = [weight * values[name] for name, weight in weights.items()]
    if not all(math.isfinite(term) for term in terms):
        return math.nan
    try:
        return math.fsum(terms)
    except OverflowError:
        return math.inf
