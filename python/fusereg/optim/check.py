"""Rows of the inventory: optimizers with the penalty in their step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.inventory import Inputs, Operation, Pairs, exact
from . import clip, clip_others
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .ftrl import FTRL
from .lamb import LAMB
from .lion import Lion
from .nadam import NAdam
from .rmsprop import RMSprop
from .sgd import SGD

L1, L2, GROUP = 0.3, 0.7, 0.05
LR = 0.1

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def _soft(w: Tensor, threshold: Tensor | float) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp_min(0.0)


def _weights_and_gradients(inputs: Inputs) -> list[Tensor]:
    weights = [w.requires_grad_() for w in inputs.weights()]
    for w in weights:
        w.grad = w.detach() / 2 + 0.1
    return weights


def _step(make: Make, wanted: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Pairs:
    """Compare the weights after the first step."""
    weights = _weights_and_gradients(inputs)
    references = []
    for w in weights:
        assert w.grad is not None
        references.append(wanted(exact([w])[0], exact([w.grad])[0]))
    make(weights).step()
    return list(zip(weights, references, strict=True))


def _against_torch(make: Make, torchs: Make, inputs: Inputs) -> Pairs:
    """Compare steps without a penalty with torch's own optimizer in float64.

    Three steps; one in 16 bits, because the second would start from weights that were rounded.
    """
    weights = _weights_and_gradients(inputs)
    references = [w.requires_grad_() for w in exact(weights)]
    for w, reference in zip(weights, references, strict=True):
        assert w.grad is not None
        reference.grad = exact([w.grad])[0]
    own, other = make(weights), torchs(references)
    for _ in range(1 if inputs.dtype.itemsize == 2 else 3):
        own.step()
        other.step()
    return list(zip(weights, references, strict=True))


def _momentum(inputs: Inputs) -> Pairs:
    return _against_torch(
        lambda p: SGD(p, LR, 0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.SGD(p, LR, 0.9, weight_decay=0.1, nesterov=True),
        inputs,
    )


def _sgd(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        v = w - LR * g
        if v.dim() < 2 or v.shape[1] == 1:
            return _soft(v, LR * L1 + LR * GROUP)  # a group of one element is one of l1
        v = _soft(v, LR * L1)
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)
        shrunk: Tensor = v * (1 - LR * GROUP * math.sqrt(v.shape[1]) / norms).clamp_min(0.0)
        return shrunk

    return _step(lambda p: SGD(p, lr=LR, l1=L1, group=GROUP), wanted, inputs)


def _adam(inputs: Inputs) -> Pairs:
    return _against_torch(
        lambda p: Adam(p, LR, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, LR, weight_decay=0.1, amsgrad=True),
        inputs,
    )


def _adamw(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        metric = g.abs() + 1e-8
        v = w * (1 - LR * 0.01) - LR * g / metric
        metric = torch.maximum(metric, (L1 + L2 * v.abs()) / 2)
        shrunk: Tensor = _soft(v, LR * L1 / metric) / (1 + LR * L2 / metric)
        return torch.where(g == 0, v, shrunk)

    return _step(lambda p: AdamW(p, lr=LR, l1=L1, l2=L2), wanted, inputs)


def _adagrad(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        metric = (g.square() + 0.5).sqrt()
        v = w - LR * g / metric
        return _soft(v, LR * L1 / metric) / (1 + LR * L2 / metric)

    def make(p: list[Tensor]) -> torch.optim.Optimizer:
        return Adagrad(p, LR, 0.0, 0.0, 0.5, 0.0, l1=L1, l2=L2, prox="preconditioned")

    return _step(make, wanted, inputs)


def _ftrl(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        z = -w / LR + g - g.abs() / LR * w
        return -_soft(z, L1) / ((1 + g.abs()) / LR + L2)

    return _step(lambda p: FTRL(p, lr=LR, l1=L1, l2=L2), wanted, inputs)


def _rmsprop(inputs: Inputs) -> Pairs:
    return _against_torch(
        lambda p: RMSprop(p, LR, momentum=0.9, centered=True, eps=0.1),
        lambda p: torch.optim.RMSprop(p, LR, momentum=0.9, centered=True, eps=0.1),
        inputs,
    )


def _nadam(inputs: Inputs) -> Pairs:
    return _against_torch(
        lambda p: NAdam(p, LR, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, LR, weight_decay=0.1),
        inputs,
    )


def _lion(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        return _soft(w * (1 - LR * 0.1) - LR * g.sign(), LR * L1)

    def make(p: list[Tensor]) -> torch.optim.Optimizer:
        return Lion(p, LR, weight_decay=0.1, l1=L1, prox="decoupled")

    return _step(make, wanted, inputs)


def _lamb(inputs: Inputs) -> Pairs:
    def wanted(w: Tensor, g: Tensor) -> Tensor:
        u = g / (g.abs() + 1e-6) + 0.1 * w
        norms = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
        rate = LR * (norms[0] / norms[1] if float(norms[0] * norms[1]) > 0 else 1.0)
        return _soft(w - rate * u, rate * L1)

    def make(p: list[Tensor]) -> torch.optim.Optimizer:
        return LAMB(p, LR, weight_decay=0.1, l1=L1, prox="decoupled")

    return _step(make, wanted, inputs)


def _clip_value(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    for w in weights:
        w.grad = w.clone()
    wanted = [w.clamp(-0.5, 0.5) for w in exact(weights)]
    clip_others.clip_grad_value_(weights, 0.5)
    return [(w.grad, e) for w, e in zip(weights, wanted, strict=True) if w.grad is not None]


def _clip_rows(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    wanted = []
    for w in weights:
        w.grad = w.clone()
        (e,) = exact([w])
        rows = e.flatten(1) if e.dim() > 1 else e.reshape(1, -1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        limit = 0.3 * norms.clamp_min(1e-3)
        factor = torch.where(norms < limit, 1.0, limit / norms.clamp_min(1e-6))
        wanted.append((rows * factor).reshape(e.shape))
    clip_others.adaptive_clip_grad_(weights, 0.3)
    return [(w.grad, e) for w, e in zip(weights, wanted, strict=True) if w.grad is not None]


def _clip(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    for w in weights:
        w.grad = w.clone()
    wanted = exact(weights)
    total = torch.cat([w.flatten() for w in wanted]).norm()
    norm = clip.clip_grad_norm_(weights, 2.0)
    pairs = [(norm, total)]
    for w, reference in zip(weights, wanted, strict=True):
        assert w.grad is not None
        pairs.append((w.grad, reference * 2.0 / (total + 1e-6)))
    return pairs


def _norms(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    flat = torch.cat([w.flatten() for w in exact(weights)])
    return [
        (clip.get_total_norm(weights), flat.norm()),
        (clip.get_total_norm(weights, math.inf), flat.abs().max()),
    ]


OPERATIONS = [
    Operation(name=name, formula=formula, function=function, pairs=pairs)
    for name, formula, function, pairs in (
        ("optim.SGD, momentum, Nesterov", "torch.optim.SGD", SGD, _momentum),
        ("optim.SGD, group lasso", "prox of lr * R after the step", SGD, _sgd),
        ("optim.Adam, AMSGrad", "torch.optim.Adam", Adam, _adam),
        ("optim.AdamW, elastic net", "prox in the metric of the step", AdamW, _adamw),
        ("optim.Adagrad, preconditioned", "prox in the metric of the step", Adagrad, _adagrad),
        ("optim.FTRL", "-soft(z, l1) / ((beta + sqrt(n)) / lr + l2)", FTRL, _ftrl),
        ("optim.RMSprop, centered", "torch.optim.RMSprop", RMSprop, _rmsprop),
        ("optim.NAdam", "torch.optim.NAdam", NAdam, _nadam),
        ("optim.Lion", "prox of lr * R after Lion's step", Lion, _lion),
        ("optim.LAMB", "prox of lr * ||p|| / ||u|| * R after LAMB's step", LAMB, _lamb),
        (
            "optim.clip_grad_value_",
            "min(max(g, -v), v)",
            clip_others.clip_grad_value_,
            _clip_value,
        ),
        (
            "optim.adaptive_clip_grad_",
            "g * min(1, c * max(||w||, eps) / ||g||)",
            clip_others.adaptive_clip_grad_,
            _clip_rows,
        ),
        ("optim.clip_grad_norm_", "g * min(1, max_norm / ||g||)", clip.clip_grad_norm_, _clip),
        ("optim.get_total_norm", "||g||_2 and max |g|", clip.get_total_norm, _norms),
    )
]
