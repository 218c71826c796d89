"""Batch normalization with the statistics of several processes.

Forward is one all-gather of 3 numbers a channel, backward one all-reduce of 2, all float64; their
sizes do not depend on the batch, so processes may have different numbers of samples, or none.
Nothing waits for the device on the host, and torch.compile traces it as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import distributed, random
from . import op as _batch_norm_ops
from .kernels import GIVEN, Call, Running


def combined(parts: Tensor) -> Tensor:
    """The moments [3, C] of what parts [P, 3, C] are the moments of (Chan et al. 1979), in order.

    A part without elements counts nothing, whatever its mean is.
    """
    mean, var, count = parts.unbind(1)
    mean, var = torch.where(count > 0.0, mean, 0.0), torch.where(count > 0.0, var, 0.0)
    total = count.sum(0)
    whole = total.clamp_min(1.0)
    # About the first part's mean, so that a large common mean does not drown the differences.
    origin = mean[0]
    center = origin + ((mean - origin) * count).sum(0) / whole
    square = ((var + (mean - center).square()) * count).sum(0)
    return torch.stack([center, square / whole, total])


def synchronized(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    group: Any,
    running: Running,
) -> Tensor:
    """y with the statistics of all processes of the group; the arguments have been checked."""
    own = _batch_norm_ops.statistics(x, mask)
    everyone = combined(distributed.all_gather(own, group))
    call = call._replace(statistics=GIVEN)
    if call.p and not isinstance(call.seed, Tensor):
        pair = torch.tensor([random.signed(call.seed), random.signed(call.offset)])
        call = call._replace(seed=pair.to(x.device), offset=0)
    return _batch_norm_ops.normalize(
        call,
        x,
        residual,
        mask,
        weight,
        bias,
        everyone,
        running,
        reduce_sums=lambda sums: distributed.all_reduce(sums, group),
    )
