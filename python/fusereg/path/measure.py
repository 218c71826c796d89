"""Costs of a network: parameters, operations, and the time of a forward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_SECONDS = 0.2
_LEAST, _MOST = 5, 200


def cost(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return parameters, operations and milliseconds of a forward pass in eval mode."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                model(*inputs)
            seconds = _seconds(model, inputs)
    finally:
        for module, mode in training:
            module.training = mode
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "operations": int(counter.get_total_flops()),
        "milliseconds": 1e3 * statistics.median(seconds),
    }


def _seconds(model: nn.Module, inputs: tuple[Any, ...]) -> list[float]:
    on_device = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    found: list[float] = []
    begin = time.perf_counter()
    model(*inputs)
    while len(found) < _LEAST or (len(found) < _MOST and time.perf_counter() - begin < _SECONDS):
        if on_device:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(*inputs)
        if on_device:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found
