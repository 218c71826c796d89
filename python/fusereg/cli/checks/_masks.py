"""Dropout's masks by torch's own operations, and checks of kernels that drop by them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusereg import _C
from fusereg.cli.checks._base import Inputs, Pairs, exact

P = 0.3
SEED = 5

_M32 = 0xFFFFFFFF


def kept_share(p: float) -> float:
    """1 - p as the draws have it, a multiple of 2^-16 or 2^-32."""
    return _C.dropout_constants(p, False)[2]


def _philox(seed: int, counters: Tensor) -> Tensor:
    """The 4 words of Philox4x32-10 for each counter of 64 bits, a row each (Salmon et al. 2011).

    In int64: products wrap, and what is shifted is masked, so that they are those of 32-bit words.
    """
    k0, k1 = seed & _M32, seed >> 32
    c0, c1 = torch.zeros_like(counters), torch.zeros_like(counters)
    c2, c3 = counters & _M32, counters >> 32
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _M32) ^ c1 ^ k0,
            product1 & _M32,
            ((product0 >> 32) & _M32) ^ c3 ^ k1,
            product0 & _M32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return torch.stack((c0, c1, c2, c3), dim=1)


@functools.lru_cache(maxsize=64)
def mask(shape: tuple[int, ...], p: float = P, seed: int = SEED) -> Tensor:
    """Which elements are kept, on the CPU, drawn without fusereg."""
    count = math.prod(shape)
    limit = round((1.0 - p) * 2**16)
    if abs(limit - (1.0 - p) * 2**16) <= min(p, 1.0 - p) * 64:
        words = _philox(seed, torch.arange((count + 7) // 8))
        draws = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    else:
        limit = round((1.0 - p) * 2**32)
        draws = _philox(seed, torch.arange((count + 3) // 4))
    return (draws.flatten()[:count] < limit).reshape(shape)


def result_and_gradients(
    call: Callable[..., Tensor], wanted: Callable[..., Tensor], tensors: list[Tensor]
) -> Pairs:
    """The result, and the gradients of all tensors for a gradient that differs from 1."""
    leaves = [t.requires_grad_() for t in tensors]
    references = [t.requires_grad_() for t in exact(tensors)]
    y, reference = call(*leaves), wanted(*references)
    ramp = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, ramp.to(y.device))
    exact_gradients = torch.autograd.grad(reference, references, ramp.double())
    return [(y, reference), *zip(gradients, exact_gradients, strict=True)]


def masked(
    drop: Callable[[Tensor], Tensor], kept: Tensor, x: Tensor, share: float | None = None
) -> Pairs:
    """A kernel that gives keep ? x / share : 0."""
    scale = kept_share(P) if share is None else share
    return result_and_gradients(drop, lambda t: torch.where(kept, t / scale, 0.0), [x])


def images(inputs: Inputs) -> Tensor:
    """A batch of feature maps, sides odd."""
    shape = (5, 29, 21, 37) if inputs.large else (3, 8, 5, 7)
    return inputs.normal(*shape)
