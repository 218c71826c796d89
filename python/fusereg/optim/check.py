"""Rows of the inventory: optimizers with the penalty in their step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.inventory import Inputs, Operation, Pairs, exact
from ..penalty.check import GROUP, L1, L2, soft
from . import clip, clip_others
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .ftrl import FTRL
from .lamb import LAMB
from .lion import Lion
from .nadam import NAdam
from .rmsprop import RMSprop
from .sgd import SGD

LR = 0.1


def _with_gradients(inputs: Inputs, gradient: Callable[[Tensor], Tensor]) -> list[Tensor]:
    weights = [w.requires_grad_() for w in inputs.weights()]
    for w in weights:
        w.grad = gradient(w.detach())
    return weights


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [w.grad for w in weights if w.grad is not None]


def _some(w: Tensor) -> Tensor:
    return w / 2 + 0.1


def _first_step(
    kind: Any, wanted: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, **options: Any
) -> Pairs:
    """Compare the weights after the first step."""
    weights = _with_gradients(inputs, _some)
    gradients = exact(_gradients(weights))
    references = [wanted(w, g) for w, g in zip(exact(weights), gradients, strict=True)]
    kind(weights, lr=LR, **options).step()
    return list(zip(weights, references, strict=True))


def _as_torchs(kind: Any, inputs: Inputs, **options: Any) -> Pairs:
    """Compare steps without a penalty with torch's own optimizer in float64.

    Three steps; one in 16 bits, because the second would start from weights that were rounded.
    """
    weights = _with_gradients(inputs, _some)
    references = [w.requires_grad_() for w in exact(weights)]
    for reference, gradient in zip(references, exact(_gradients(weights)), strict=True):
        reference.grad = gradient
    own = kind(weights, LR, **options)
    other = getattr(torch.optim, kind.__name__)(references, LR, **options)
    for _ in range(1 if inputs.dtype.itemsize == 2 else 3):
        own.step()
        other.step()
    return list(zip(weights, references, strict=True))


def _sgd(w: Tensor, g: Tensor) -> Tensor:
    v = w - LR * g
    if v.dim() < 2 or v.shape[1] == 1:
        return soft(v, LR * L1 + LR * GROUP)  # a group of one element is one of l1
    v = soft(v, LR * L1)
    norms = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)
    shrunk: Tensor = v * (1 - LR * GROUP * math.sqrt(v.shape[1]) / norms).clamp_min(0.0)
    return shrunk


def _adamw(w: Tensor, g: Tensor) -> Tensor:
    metric = g.abs() + 1e-8
    v = w * (1 - LR * 0.01) - LR * g / metric
    metric = torch.maximum(metric, (L1 + L2 * v.abs()) / 2)
    return torch.where(g == 0, v, soft(v, LR * L1 / metric) / (1 + LR * L2 / metric))


def _adagrad(w: Tensor, g: Tensor) -> Tensor:
    metric = (g.square() + 0.5).sqrt()
    return soft(w - LR * g / metric, LR * L1 / metric) / (1 + LR * L2 / metric)


def _ftrl(w: Tensor, g: Tensor) -> Tensor:
    z = -w / LR + g - g.abs() / LR * w
    return -soft(z, L1) / ((1 + g.abs()) / LR + L2)


def _lion(w: Tensor, g: Tensor) -> Tensor:
    return soft(w * (1 - LR * 0.1) - LR * g.sign(), LR * L1)


def _lamb(w: Tensor, g: Tensor) -> Tensor:
    u = g / (g.abs() + 1e-6) + 0.1 * w
    norms = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
    rate = LR * (norms[0] / norms[1] if float(norms[0] * norms[1]) > 0 else 1.0)
    return soft(w - rate * u, rate * L1)


def _clip_value(inputs: Inputs) -> Pairs:
    weights = _with_gradients(inputs, torch.clone)
    wanted = [w.clamp(-0.5, 0.5) for w in exact(weights)]
    clip_others.clip_grad_value_(weights, 0.5)
    return list(zip(_gradients(weights), wanted, strict=True))


def _clip_rows(inputs: Inputs) -> Pairs:
    weights = _with_gradients(inputs, torch.clone)
    wanted = []
    for e in exact(weights):
        rows = e.flatten(1) if e.dim() > 1 else e.reshape(1, -1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        limit = 0.3 * norms.clamp_min(1e-3)
        factor = torch.where(norms < limit, 1.0, limit / norms.clamp_min(1e-6))
        wanted.append((rows * factor).reshape(e.shape))
    clip_others.adaptive_clip_grad_(weights, 0.3)
    return list(zip(_gradients(weights), wanted, strict=True))


def _clip(inputs: Inputs) -> Pairs:
    weights = _with_gradients(inputs, torch.clone)
    wanted = exact(weights)
    total = torch.cat([w.flatten() for w in wanted]).norm()
    norm = clip.clip_grad_norm_(weights, 2.0)
    clipped = [w * 2.0 / (total + 1e-6) for w in wanted]
    return [(norm, total), *zip(_gradients(weights), clipped, strict=True)]


def _norms(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    flat = torch.cat([w.flatten() for w in exact(weights)])
    return [
        (clip.get_total_norm(weights), flat.norm()),
        (clip.get_total_norm(weights, math.inf), flat.abs().max()),
    ]


def _row(
    name: str, formula: str, function: Any, pairs: Callable[..., Pairs], *args: Any, **options: Any
) -> Operation:
    given = (function, *args) if isinstance(function, type) else ()
    return Operation(
        name=f"optim.{name}", formula=formula, function=function,
        pairs=lambda inputs: pairs(*given, inputs, **options),
    )  # fmt: skip


_DECAY, _METRIC = {"weight_decay": 0.1}, "prox in the metric of the step"
_ELASTIC = {"l1": L1, "l2": L2}
_ONE_PROX = {**_DECAY, "l1": L1, "prox": "decoupled"}
OPERATIONS = [
    _row("SGD, momentum, Nesterov", "torch.optim.SGD", SGD, _as_torchs,
         momentum=0.9, nesterov=True, **_DECAY),
    _row("SGD, group lasso", "prox of lr * R after the step", SGD, _first_step, _sgd,
         l1=L1, group=GROUP),
    _row("Adam, AMSGrad", "torch.optim.Adam", Adam, _as_torchs, amsgrad=True, **_DECAY),
    _row("AdamW, elastic net", _METRIC, AdamW, _first_step, _adamw, **_ELASTIC),
    _row("Adagrad, preconditioned", _METRIC, Adagrad, _first_step, _adagrad,
         initial_accumulator_value=0.5, eps=0.0, prox="preconditioned", **_ELASTIC),
    _row("FTRL", "-soft(z, l1) / ((beta + sqrt(n)) / lr + l2)", FTRL, _first_step, _ftrl,
         **_ELASTIC),
    _row("RMSprop, centered", "torch.optim.RMSprop", RMSprop, _as_torchs,
         momentum=0.9, centered=True, eps=0.1),
    _row("NAdam", "torch.optim.NAdam", NAdam, _as_torchs, **_DECAY),
    _row("Lion", "prox of lr * R after Lion's step", Lion, _first_step, _lion, **_ONE_PROX),
    _row("LAMB", "prox of lr * ||p|| / ||u|| * R after LAMB's step", LAMB, _first_step, _lamb,
         **_ONE_PROX),
    _row("clip_grad_value_", "min(max(g, -v), v)", clip_others.clip_grad_value_, _clip_value),
    _row("adaptive_clip_grad_", "g * min(1, c * max(||w||, eps) / ||g||)",
         clip_others.adaptive_clip_grad_, _clip_rows),
    _row("clip_grad_norm_", "g * min(1, max_norm / ||g||)", clip.clip_grad_norm_, _clip),
    _row("get_total_norm", "||g||_2 and max |g|", clip.get_total_norm, _norms),
]  # fmt: skip
