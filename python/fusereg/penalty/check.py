"""Rows of the inventory: penalties, their gradients and proximal steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.groups import CoupledChannels, Groups, Member
from ..core.inventory import MATRICES, Inputs, Operation, Pairs, exact
from . import functional, prox
from .functional import add_penalty_grad_, sparsity
from .others import activity_penalty

L1, L2, GROUP = 0.3, 0.7, 0.05
#: Between the norms of the groups: some vanish, some only shrink.
THRESHOLD = 0.6
_NO_META = {"meta": "is on device 'meta'"}


def _group_norms(w: Tensor, dim: int = 0) -> Tensor:
    """Return sqrt(n_g) * ||w_g||_2 for the slices along a dimension."""
    w = w.movedim(dim, 0)
    rows = w.reshape(w.shape[0], -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return math.sqrt(rows.shape[1]) * norms


def _elastic_net(w: Tensor) -> Tensor:
    return L1 * w.abs().sum() + L2 / 2 * w.square().sum()


def soft(w: Tensor, threshold: Tensor | float) -> Tensor:
    """Return w after soft-thresholding."""
    return w.sign() * (w.abs() - threshold).clamp_min(0.0)


def _shrunk_groups(w: Tensor) -> Tensor:
    rows = w.reshape(w.shape[0], -1)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    factor = 1.0 - THRESHOLD * math.sqrt(rows.shape[1]) / norms.clamp_min(1e-300)
    shrunk: Tensor = rows * factor.clamp_min(0.0)
    return shrunk.reshape(w.shape)


def _summed(f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *weights: torch.stack([f(w) for w in weights]).sum()


def _changed(f: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def step(*weights: Tensor) -> None:
        for w in weights:
            w.copy_(f(w))

    return step


def _added(inputs: Inputs) -> Pairs:
    weights = [w.requires_grad_() for w in inputs.weights()]
    for w in weights:
        w.grad = torch.ones_like(w)
    value = add_penalty_grad_(weights, l1=L1, l2=L2, group=GROUP)
    wanted = [w.requires_grad_() for w in exact(weights)]
    reference = torch.stack([_elastic_net(w) + GROUP * _group_norms(w).sum() for w in wanted]).sum()
    pairs = [(value, reference)]
    for w, gradient in zip(weights, torch.autograd.grad(reference, wanted), strict=True):
        assert w.grad is not None
        pairs.append((w.grad, gradient + 1.0))
    return pairs


def _of_channels(inputs: Inputs) -> Pairs:
    """Return value, gradients and steps of channels: rows of one matrix and columns of another."""
    large = 30 if inputs.large else 1
    rows, columns = inputs.normal(9, 40 * large), inputs.normal(70 * large, 8, seed=21)
    rows[2] *= 0.01
    columns[:, 1] *= 0.01
    weights = [w.requires_grad_() for w in (rows, columns)]
    of_rows = torch.tensor([0, -1, *range(1, 8)])
    members = (Member("rows", rows, 0, of_rows), Member("columns", columns, 1, torch.arange(8)))
    groups = Groups([CoupledChannels("channels", 8, members, (), None)])
    # Tensors with gaps go another way.
    gapped = [torch.stack([w.detach(), w.detach()], -1)[..., 0] for w in weights]
    others = tuple(m._replace(parameter=w) for m, w in zip(members, gapped, strict=True))
    first, second = (w.detach().requires_grad_() for w in exact(weights))
    squares = first[of_rows >= 0].square().sum(1) + second.square().sum(0)
    root = math.sqrt(first.shape[1] + len(second))
    expected = GROUP * root * squares.sqrt().sum()
    value = functional.group_lasso_penalty(groups, GROUP)
    pairs = [(value.detach(), expected.detach())]
    gradients = torch.autograd.grad(value, weights)
    pairs += zip(gradients, torch.autograd.grad(expected, [first, second]), strict=True)
    with torch.no_grad():
        factor = (1.0 - THRESHOLD * root / squares.sqrt()).clamp_min(0.0)
        first[of_rows >= 0] *= factor[:, None]
        second *= factor
        prox.group_lasso_(groups, THRESHOLD)
        prox.group_lasso_(Groups([CoupledChannels("channels", 8, others, (), None)]), THRESHOLD)
    wanted = [first.detach(), second.detach()]
    pairs += zip([w.detach() for w in weights], wanted, strict=True)
    return [*pairs, *zip(gapped, wanted, strict=True)]


def _sparsity(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    zeros = sum(int((w == 0).sum()) for w in weights)
    count = sum(w.numel() for w in weights)
    share = torch.tensor(sparsity(weights), dtype=torch.float64)
    return [(share, torch.tensor(zeros / count, dtype=torch.float64))]


def _row(
    module: Any, name: str, formula: str, f: Callable[[Tensor], Tensor], **options: Any
) -> Operation:
    """Return the row of a function of a list, from what it does to or makes of one tensor."""
    steps = module is prox
    return Operation(
        name=f"prox.{name}" if steps else name,
        formula=formula,
        function=getattr(module, name.partition(",")[0]),
        tensors=lambda inputs, shape: inputs.weights(),
        arguments=("params",),
        as_list=True,
        options=options,
        reference=(_changed if steps else _summed)(f),
        written=("params",) if steps else (),
        refuses=_NO_META,
    )


OPERATIONS = [
    _row(functional, "l1_penalty", "l1 * sum |w|", lambda w: L1 * w.abs().sum(), strength=L1),
    _row(functional, "l2_penalty", "l2 * sum w^2", lambda w: L2 * w.square().sum(), strength=L2),
    _row(functional, "l2_penalty, half", "l2/2 * sum w^2", lambda w: L2 / 2 * w.square().sum(),
         strength=L2, half=True),
    _row(functional, "elastic_net_penalty", "l1 * sum |w| + l2/2 * sum w^2", _elastic_net,
         l1=L1, l2=L2),
    _row(functional, "group_lasso_penalty", "group * sum_g sqrt(n_g) * ||w_g||",
         lambda w: GROUP * _group_norms(w).sum(), strength=GROUP),
    _row(functional, "group_lasso_penalty, last dimension",
         "the same of slices along the last dimension",
         lambda w: GROUP * _group_norms(w, -1).sum(), strength=GROUP, dim=-1),
    Operation(
        name="add_penalty_grad_",
        formula="value, and gradient added into .grad",
        function=add_penalty_grad_,
        pairs=_added,
    ),
    _row(prox, "l1_", "sign(w) * max(|w| - t, 0)", lambda w: soft(w, L1), threshold=L1),
    _row(prox, "elastic_net_", "soft(w, l1) / (1 + l2)", lambda w: soft(w, L1) / (1.0 + L2),
         l1=L1, l2=L2),
    _row(prox, "group_lasso_", "w_g * max(0, 1 - t * sqrt(n_g) / ||w_g||)", _shrunk_groups,
         threshold=THRESHOLD),
    Operation(
        name="prox.group_lasso_, channels",
        formula="the same of channels that span tensors",
        function=prox.group_lasso_,
        pairs=_of_channels,
    ),
    Operation(
        name="activity_penalty",
        formula="(l1 * sum |x| + l2 * sum x^2) / N",
        function=activity_penalty,
        shapes=MATRICES,
        options={"l1": L1, "l2": L2},
        reference=lambda x: (L1 * x.abs().sum() + L2 * x.square().sum()) / max(len(x), 1),
        refuses=_NO_META,
    ),
    Operation(name="sparsity", formula="share of exact zeros", function=sparsity, pairs=_sparsity),
]  # fmt: skip
