"""What is watched: one metric, several by name, or the weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .decision import Metric, Mode, choice

_OP = "fusereg.EarlyStopping"
SINGLE = "metric"
WEIGHTED = "weighted sum"


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float] | None:
    """The weights as plain numbers; ValueError unless all are finite."""
    if weights is None:
        return None
    if not weights or not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"{_OP}: weights must name metrics with finite weights, got {weights!r}")
    return {name: float(weight) for name, weight in weights.items()}


def check_metrics(
    metrics: Mapping[str, Metric | Mode] | None,
    single: Metric,
    weights: Mapping[str, float] | None,
) -> dict[str, Metric]:
    """The metrics that are judged, by name; raises where the ways to say so are mixed."""
    if metrics is None:
        return {SINGLE if weights is None else WEIGHTED: single}
    if weights is not None:
        raise ValueError(f"{_OP}: metrics and weights exclude each other")
    if single != Metric():
        raise ValueError(
            f"{_OP}: mode, min_delta, delta_mode, baseline, target, divergence and smoothing are "
            "for a single metric; with metrics, give each a Metric(...) of its own"
        )
    found = {}
    for name, metric in metrics.items():
        if isinstance(metric, str):
            choice(f'metrics["{name}"]', metric, ("min", "max"))
            metric = Metric(metric)
        if not isinstance(metric, Metric):
            raise TypeError(
                f'{_OP}: metrics["{name}"] must be "min", "max" or a Metric, '
                f"got {type(metric).__name__}"
            )
        found[name] = metric
    return found


def number(value: Any, name: str) -> float:
    """What a user gave as a metric, as a float; it may be non-finite."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{_OP}.step: {name} must be a number or a tensor of one element, "
                f"got shape {tuple(value.shape)}"
            )
        if value.is_complex():
            raise TypeError(f"{_OP}.step: {name} must be real, got dtype {value.dtype}")
        return float(value.detach())
    if not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except TypeError:  # an array of several elements
            pass
        except OverflowError:  # an integer beyond floating point
            return math.inf if value > 0 else -math.inf
    raise TypeError(
        f"{_OP}.step: {name} must be a number or a tensor of one element, "
        f"got {type(value).__name__}"
    )


def weighted_sum(weights: list[float], values: list[float]) -> float:
    """Correctly rounded; not finite where a term is not."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True)]
    if not all(math.isfinite(term) for term in terms):
        return math.nan
    try:
        return math.fsum(terms)
    except OverflowError:
        return math.inf
