"""Penalties, their gradients and proximal steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import fusereg
from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.penalty import prox

L1, L2, GROUP = 0.3, 0.7, 0.05


def _group_norms(w: Tensor) -> Tensor:
    """sqrt(n_g) * ||w_g||_2 for the slices along the first dimension."""
    rows = w.reshape(w.shape[0], -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return math.sqrt(rows.shape[1]) * norms


def _value_and_gradient(
    value: Callable[[list[Tensor]], Tensor],
    exact_value: Callable[[Tensor], Tensor],
    inputs: Inputs,
) -> Pairs:
    weights = [w.requires_grad_() for w in inputs.weights()]
    wanted = [w.requires_grad_() for w in exact(weights)]
    result = value(weights)
    reference = torch.stack([exact_value(w) for w in wanted]).sum()
    gradients = torch.autograd.grad(result, weights)
    references = torch.autograd.grad(reference, wanted)
    return [(result, reference), *zip(gradients, references, strict=True)]


@kernel_check("l1_penalty", "l1 * sum |w|")
def _l1(inputs: Inputs) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l1_penalty(weights, L1),
        lambda w: L1 * w.abs().sum(),
        inputs,
    )


@kernel_check("l2_penalty", "l2 * sum w^2")
def _l2(inputs: Inputs) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l2_penalty(weights, L2),
        lambda w: L2 * w.square().sum(),
        inputs,
    )


@kernel_check("l2_penalty, half", "l2/2 * sum w^2")
def _l2_half(inputs: Inputs) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l2_penalty(weights, L2, half=True),
        lambda w: L2 / 2 * w.square().sum(),
        inputs,
    )


@kernel_check("elastic_net_penalty", "l1 * sum |w| + l2/2 * sum w^2")
def _elastic_net(inputs: Inputs) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.elastic_net_penalty(weights, L1, L2),
        lambda w: L1 * w.abs().sum() + L2 / 2 * w.square().sum(),
        inputs,
    )


@kernel_check("group_lasso_penalty", "group * sum_g sqrt(n_g) * ||w_g||")
def _group_lasso(inputs: Inputs) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.group_lasso_penalty(weights, GROUP),
        lambda w: GROUP * _group_norms(w).sum(),
        inputs,
    )


@kernel_check("add_penalty_grad_", "value, and gradient added into .grad")
def _add_grad(inputs: Inputs) -> Pairs:
    weights = [w.requires_grad_() for w in inputs.weights()]
    for w in weights:
        w.grad = torch.ones_like(w)
    value = fusereg.add_penalty_grad_(weights, l1=L1, l2=L2, group=GROUP)
    wanted = [w.requires_grad_() for w in exact(weights)]
    reference = torch.stack(
        [
            L1 * w.abs().sum() + L2 / 2 * w.square().sum() + GROUP * _group_norms(w).sum()
            for w in wanted
        ]
    ).sum()
    references = torch.autograd.grad(reference, wanted)
    pairs = [(value, reference)]
    for w, gradient in zip(weights, references, strict=True):
        assert w.grad is not None
        pairs.append((w.grad, gradient + 1.0))
    return pairs


def _soft(w: Tensor, threshold: float) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp_min(0.0)


def _in_place(
    step: Callable[[list[Tensor]], None], wanted: Callable[[Tensor], Tensor], inputs: Inputs
) -> Pairs:
    weights = inputs.weights()
    references = [wanted(w) for w in exact(weights)]
    step(weights)
    return list(zip(weights, references, strict=True))


@kernel_check("prox.l1_", "sign(w) * max(|w| - t, 0)")
def _prox_l1(inputs: Inputs) -> Pairs:
    return _in_place(lambda weights: prox.l1_(weights, L1), lambda w: _soft(w, L1), inputs)


@kernel_check("prox.elastic_net_", "soft(w, l1) / (1 + l2)")
def _prox_elastic_net(inputs: Inputs) -> Pairs:
    return _in_place(
        lambda weights: prox.elastic_net_(weights, L1, L2),
        lambda w: _soft(w, L1) / (1.0 + L2),
        inputs,
    )


@kernel_check("prox.group_lasso_", "w_g * max(0, 1 - t * sqrt(n_g) / ||w_g||)")
def _prox_group_lasso(inputs: Inputs) -> Pairs:
    threshold = 0.6  # between the norms of the groups: some vanish, some only shrink

    def wanted(w: Tensor) -> Tensor:
        rows = w.reshape(w.shape[0], -1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        factor = 1.0 - threshold * math.sqrt(rows.shape[1]) / norms.clamp_min(1e-300)
        shrunk: Tensor = rows * factor.clamp_min(0.0)
        return shrunk.reshape(w.shape)

    return _in_place(lambda weights: prox.group_lasso_(weights, threshold), wanted, inputs)


@kernel_check("sparsity", "share of exact zeros")
def _sparsity(inputs: Inputs) -> Pairs:
    weights = inputs.weights()
    zeros = sum(int((w == 0).sum()) for w in weights)
    count = sum(w.numel() for w in weights)
    share = torch.tensor(fusereg.sparsity(weights), dtype=torch.float64)
    return [(share, torch.tensor(zeros / count, dtype=torch.float64))]
