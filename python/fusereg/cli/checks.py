"""One real call of every kernel, held against torch in float64: the table in `fusereg info`.

A technique adds its kernels here: a function that takes a device, runs the kernel in float32 there,
and gives pairs (what came, what torch gives in float64), under the decorator `kernel_check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import fusereg
from fusereg import _C, augment, functional, optim, prox

Pairs = list[tuple[Tensor, Tensor]]

# Every result is rounded to float32 once, after a handful of float32 operations; errors are taken
# relative to the largest element. A wrong term, tail or group is off by 1e-3 or more.
TOLERANCE = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class KernelCheck:
    """A kernel's name, its formula, and how to call it."""

    name: str
    formula: str
    call: Callable[[torch.device], Pairs]


@dataclass(frozen=True)
class CheckResult:
    """What one kernel gave on one backend. `error` is None when the call itself failed."""

    kernel: str
    formula: str
    backend: str
    device: str
    ok: bool
    error: float | None
    tolerance: float
    message: str | None


CHECKS: list[KernelCheck] = []


def kernel_check(
    name: str, formula: str
) -> Callable[[Callable[[torch.device], Pairs]], Callable[[torch.device], Pairs]]:
    """Adds the function below it to the table."""

    def register(call: Callable[[torch.device], Pairs]) -> Callable[[torch.device], Pairs]:
        CHECKS.append(KernelCheck(name, formula, call))
        return call

    return register


L1, L2, GROUP = 0.3, 0.7, 0.05


def _weights(device: torch.device) -> list[Tensor]:
    """A matrix with odd sizes, a slice off alignment, a tiny tensor, one with an all-zero group."""
    generator = torch.Generator().manual_seed(20)
    matrix = torch.randn(37, 65, generator=generator)
    vector = torch.randn(2050, generator=generator)
    tiny = torch.randn(3, 1, generator=generator)
    with_zeros = torch.randn(8, 24, generator=generator)
    with_zeros[2] = 0.0
    return [matrix.to(device), vector.to(device)[1:], tiny.to(device), with_zeros.to(device)]


def _exact(tensors: list[Tensor]) -> list[Tensor]:
    return [w.detach().double().cpu() for w in tensors]


def _group_norms(w: Tensor) -> Tensor:
    """sqrt(n_g) * ||w_g||_2 for the slices along the first dimension."""
    rows = w.reshape(w.shape[0], -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return math.sqrt(rows.shape[1]) * norms


def _value_and_gradient(
    value: Callable[[list[Tensor]], Tensor],
    exact: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Pairs:
    weights = [w.requires_grad_() for w in _weights(device)]
    wanted = [w.requires_grad_() for w in _exact(weights)]
    result = value(weights)
    reference = torch.stack([exact(w) for w in wanted]).sum()
    gradients = torch.autograd.grad(result, weights)
    references = torch.autograd.grad(reference, wanted)
    return [(result, reference), *zip(gradients, references, strict=True)]


@kernel_check("l1_penalty", "l1 * sum |w|")
def _l1(device: torch.device) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l1_penalty(weights, L1),
        lambda w: L1 * w.abs().sum(),
        device,
    )


@kernel_check("l2_penalty", "l2 * sum w^2")
def _l2(device: torch.device) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l2_penalty(weights, L2),
        lambda w: L2 * w.square().sum(),
        device,
    )


@kernel_check("l2_penalty, half", "l2/2 * sum w^2")
def _l2_half(device: torch.device) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.l2_penalty(weights, L2, half=True),
        lambda w: L2 / 2 * w.square().sum(),
        device,
    )


@kernel_check("elastic_net_penalty", "l1 * sum |w| + l2/2 * sum w^2")
def _elastic_net(device: torch.device) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.elastic_net_penalty(weights, L1, L2),
        lambda w: L1 * w.abs().sum() + L2 / 2 * w.square().sum(),
        device,
    )


@kernel_check("group_lasso_penalty", "group * sum_g sqrt(n_g) * ||w_g||")
def _group_lasso(device: torch.device) -> Pairs:
    return _value_and_gradient(
        lambda weights: functional.group_lasso_penalty(weights, GROUP),
        lambda w: GROUP * _group_norms(w).sum(),
        device,
    )


@kernel_check("add_penalty_grad_", "value, and gradient added into .grad")
def _add_grad(device: torch.device) -> Pairs:
    weights = [w.requires_grad_() for w in _weights(device)]
    for w in weights:
        w.grad = torch.ones_like(w)
    value = fusereg.add_penalty_grad_(weights, l1=L1, l2=L2, group=GROUP)
    wanted = [w.requires_grad_() for w in _exact(weights)]
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
    step: Callable[[list[Tensor]], None], exact: Callable[[Tensor], Tensor], device: torch.device
) -> Pairs:
    weights = _weights(device)
    wanted = [exact(w) for w in _exact(weights)]
    step(weights)
    return list(zip(weights, wanted, strict=True))


@kernel_check("prox.l1_", "sign(w) * max(|w| - t, 0)")
def _prox_l1(device: torch.device) -> Pairs:
    return _in_place(lambda weights: prox.l1_(weights, L1), lambda w: _soft(w, L1), device)


@kernel_check("prox.elastic_net_", "soft(w, l1) / (1 + l2)")
def _prox_elastic_net(device: torch.device) -> Pairs:
    return _in_place(
        lambda weights: prox.elastic_net_(weights, L1, L2),
        lambda w: _soft(w, L1) / (1.0 + L2),
        device,
    )


@kernel_check("prox.group_lasso_", "w_g * max(0, 1 - t * sqrt(n_g) / ||w_g||)")
def _prox_group_lasso(device: torch.device) -> Pairs:
    threshold = 0.6  # between the norms of the groups: some vanish, some only shrink

    def exact(w: Tensor) -> Tensor:
        rows = w.reshape(w.shape[0], -1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        factor = 1.0 - threshold * math.sqrt(rows.shape[1]) / norms.clamp_min(1e-300)
        shrunk: Tensor = rows * factor.clamp_min(0.0)
        return shrunk.reshape(w.shape)

    return _in_place(lambda weights: prox.group_lasso_(weights, threshold), exact, device)


P = 0.3


def _masked(
    drop: Callable[[Tensor], Tensor],
    mask: Tensor,
    exact: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
) -> Pairs:
    """Result and gradient, on both sides with the mask that dropout_mask shows."""
    keep = fusereg._C.dropout_constants(P, False)[2]
    mask = mask.cpu()
    x.requires_grad_()
    wanted = x.detach().double().cpu().requires_grad_()
    y, reference = drop(x), exact(wanted, mask, keep)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (reference_gradient,) = torch.autograd.grad(reference.sum(), wanted)
    return [(y, reference), (gradient, reference_gradient)]


@kernel_check("dropout", "keep ? x / (1 - p) : 0")
def _dropout(device: torch.device) -> Pairs:
    x = _weights(device)[0]
    mask = fusereg.dropout_mask(x.shape, P, 5, device=device)
    return _masked(
        lambda t: functional.dropout(t, P, seed=5),
        mask,
        lambda t, m, keep: torch.where(m, t / keep, 0.0),
        x,
    )


@kernel_check("dropout2d", "the same, a draw for each channel")
def _dropout2d(device: torch.device) -> Pairs:
    x = torch.randn(3, 8, 5, 7, generator=torch.Generator().manual_seed(20)).to(device)
    mask = fusereg.dropout_mask((3, 8, 1, 1), P, 5, device=device).expand(x.shape)
    return _masked(
        lambda t: functional.dropout2d(t, P, seed=5),
        mask,
        lambda t, m, keep: torch.where(m, t / keep, 0.0),
        x,
    )


@kernel_check("consistent_dropout", "the same, a draw for all steps of a sequence")
def _consistent_dropout(device: torch.device) -> Pairs:
    x = torch.randn(3, 8, 37, generator=torch.Generator().manual_seed(20)).to(device)
    mask = fusereg.dropout_mask((3, 1, 37), P, 5, device=device).expand(x.shape)
    return _masked(
        lambda t: functional.consistent_dropout(t, P, 1, seed=5),
        mask,
        lambda t, m, keep: torch.where(m, t / keep, 0.0),
        x,
    )


@kernel_check("augment", "warped by M, then v * scale + shift")
def _augment(device: torch.device) -> Pairs:
    """A turned and zoomed batch in both layouts, and its gradient, against grid_sample."""
    x = torch.rand(2, 3, 11, 23, generator=torch.Generator().manual_seed(20)).to(device)
    x.requires_grad_()
    m = torch.tensor([[0.9, 0.3, -1.2], [-0.25, 1.1, 2.3]], dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(37.0), indexing="ij")
    at = torch.stack([columns, rows, torch.ones_like(rows)], -1).double() @ m.T
    grid = (2 * at + 1) / torch.tensor([23.0, 11.0]) - 1
    plain = x.detach().double().cpu().requires_grad_()
    wanted = torch.nn.functional.grid_sample(plain, grid.expand(2, -1, -1, -1), align_corners=False)
    (wanted - 0.5).square().sum().backward()
    pairs: Pairs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x.grad = None
        y = augment.warp_affine(x.contiguous(memory_format=layout), m, (9, 37), mean=0.5, std=1.0)
        y.square().sum().backward()
        assert x.grad is not None
        assert plain.grad is not None
        pairs += [(y, wanted - 0.5), (x.grad, plain.grad)]
    return pairs


@kernel_check("drop_block2d", "dropped ? 0 : x * numel / kept")
def _drop_block2d(device: torch.device) -> Pairs:
    x = torch.randn(3, 8, 9, 7, generator=torch.Generator().manual_seed(20)).to(device)
    gamma = P / 9 * (9 * 7) / (7 * 5)
    corners = ~fusereg.dropout_mask((3, 8, 7, 5), gamma, 5, device=device)
    padded = torch.nn.functional.pad(corners.float(), (2, 2, 2, 2))
    mask = torch.nn.functional.max_pool2d(padded, 3, 1) == 0
    return _masked(
        lambda t: functional.drop_block2d(t, P, 3, seed=5),
        mask,
        lambda t, m, _: torch.where(m, t * m.numel() / m.sum(), 0.0),
        x,
    )


@kernel_check("gaussian_dropout", "x * (1 + sqrt(p / (1 - p)) * n)")
def _gaussian_dropout(device: torch.device) -> Pairs:
    """Result and gradient have the same noise, and the noise has its standard deviation."""
    x = _weights(device)[0]
    noise = functional.gaussian_dropout(torch.ones_like(x), P, seed=5).double().cpu()
    normals = (noise - 1.0) / math.sqrt(P / (1 - P))
    spread = normals.square().mean().sqrt()
    ones = torch.ones((), dtype=torch.float64)
    # 2405 numbers: a standard deviation that is 15 errors off is no chance.
    plausible = torch.where((spread - 1.0).abs() < 0.2, ones, spread)
    x.requires_grad_()
    y = functional.gaussian_dropout(x, P, seed=5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return [(y, _exact([x])[0] * noise), (gradient, noise), (plausible, ones)]


@kernel_check("alpha_dropout", "a * (keep ? x : alpha') + b")
def _alpha_dropout(device: torch.device) -> Pairs:
    x = _weights(device)[0]
    mask = fusereg.dropout_mask(x.shape, P, 5, device=device)
    limit = -1.7580993408473766

    def exact(t: Tensor, m: Tensor, keep: float) -> Tensor:
        a = math.sqrt(1 / (keep * (1 + (1 - keep) * limit**2)))
        return a * torch.where(m, t, limit) - a * (1 - keep) * limit

    return _masked(lambda t: functional.alpha_dropout(t, P, seed=5), mask, exact, x)


def _dropout_norm(device: torch.device, rms: bool) -> Pairs:
    """y, the sum, and the gradients of x, residual, weight and bias."""
    generator = torch.Generator().manual_seed(20)
    shapes = ((9, 37), (9, 37), (37,), (37,))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    tensors = tensors[:3] if rms else tensors
    mask = fusereg.dropout_mask(shapes[0], P, 5, device=device).cpu()
    keep = fusereg._C.dropout_constants(P, False)[2]
    wanted = [t.requires_grad_() for t in _exact(tensors)]
    tensors = [t.requires_grad_() for t in tensors]
    s = wanted[1] + torch.where(mask, wanted[0] / keep, 0.0)
    torch_norm: Callable[..., Tensor] = torch.nn.functional.layer_norm
    norm: Callable[..., tuple[Tensor, Tensor]] = functional.dropout_add_layer_norm
    if rms:
        torch_norm, norm = torch.nn.functional.rms_norm, functional.dropout_add_rms_norm
    y = torch_norm(s, (37,), *wanted[2:], 1e-5)
    results = norm(*tensors, P, 1e-5, seed=5, return_sum=True)
    gradients = torch.autograd.grad([t.square().sum() for t in results], tensors)
    references = torch.autograd.grad([t.square().sum() for t in (y, s)], wanted)
    return list(zip((*results, *gradients), (y, s, *references), strict=True))


@kernel_check("dropout_add_layer_norm", "(s - E[s]) / sqrt(Var[s] + eps) * w + b, s = r + dropout")
def _dropout_add_layer_norm(device: torch.device) -> Pairs:
    return _dropout_norm(device, rms=False)


@kernel_check("dropout_add_rms_norm", "s / sqrt(E[s^2] + eps) * w, s = r + dropout(x)")
def _dropout_add_rms_norm(device: torch.device) -> Pairs:
    return _dropout_norm(device, rms=True)


def _fused(
    call: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    tensors: list[Tensor],
) -> Pairs:
    """Result and the gradients of all tensors; exact gets the kept share after them."""
    keep = fusereg._C.dropout_constants(P, False)[2]
    leaves = [t.requires_grad_() for t in tensors]
    wanted = [t.requires_grad_() for t in _exact(tensors)]
    y, reference = call(*leaves), exact(*wanted, keep)
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).reshape(y.shape)
    gradients = torch.autograd.grad(y, leaves, weights.float().to(y.device))
    references = torch.autograd.grad(reference, wanted, weights.float().double())
    return [(y, reference), *zip(gradients, references, strict=True)]


def _matrices(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20)
    shapes = ((37, 65), (37, 65), (65,))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@kernel_check("bias_dropout_add", "residual + dropout(x + bias)")
def _bias_dropout_add(device: torch.device) -> Pairs:
    mask = fusereg.dropout_mask((37, 65), P, 5, device=device).cpu()
    return _fused(
        lambda x, r, b: functional.bias_dropout_add(x, b, r, P, seed=5),
        lambda x, r, b, keep: r + torch.where(mask, (x + b) / keep, 0.0),
        _matrices(device),
    )


@kernel_check("dropout_add", "residual + dropout(x)")
def _dropout_add(device: torch.device) -> Pairs:
    mask = fusereg.dropout_mask((37, 65), P, 5, device=device).cpu()
    return _fused(
        lambda x, r: functional.dropout_add(x, r, P, seed=5),
        lambda x, r, keep: r + torch.where(mask, x / keep, 0.0),
        _matrices(device)[:2],
    )


@kernel_check("drop_path_add", "residual + x for each row kept")
def _drop_path_add(device: torch.device) -> Pairs:
    mask = fusereg.dropout_mask((37, 1), P, 5, device=device).cpu()
    return _fused(
        lambda x, r: functional.drop_path_add(x, r, P, seed=5),
        lambda x, r, keep: r + torch.where(mask, x / keep, 0.0),
        _matrices(device)[:2],
    )


def _activated(name: str, f: Callable[[Tensor], Tensor], device: torch.device) -> Pairs:
    mask = fusereg.dropout_mask((37, 65), P, 5, device=device).cpu()
    return _fused(
        lambda x: functional.activation_dropout(x, P, name, seed=5),
        lambda x, keep: torch.where(mask, f(x) / keep, 0.0),
        _matrices(device)[:1],
    )


@kernel_check("activation_dropout, relu", "dropout(max(x, 0))")
def _relu(device: torch.device) -> Pairs:
    return _activated("relu", torch.relu, device)


@kernel_check("activation_dropout, gelu", "dropout(x * Phi(x))")
def _gelu(device: torch.device) -> Pairs:
    return _activated("gelu", torch.nn.functional.gelu, device)


@kernel_check("activation_dropout, gelu_tanh", "the tanh form of it")
def _gelu_tanh(device: torch.device) -> Pairs:
    return _activated(
        "gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"), device
    )


@kernel_check("activation_dropout, silu", "dropout(x / (1 + exp(-x)))")
def _silu(device: torch.device) -> Pairs:
    return _activated("silu", torch.nn.functional.silu, device)


def _images(device: torch.device, channels_last: bool) -> list[Tensor]:
    """x, residual, gradient of odd sizes, far from zero; weight and bias."""
    generator = torch.Generator().manual_seed(20)
    shape = (5, 37, 9, 11)
    elements = [torch.randn(shape, generator=generator) for _ in range(3)]
    elements[0] = elements[0] + 100.0
    if channels_last:
        elements = [t.contiguous(memory_format=torch.channels_last) for t in elements]
    vectors = [torch.randn(37, generator=generator) for _ in range(2)]
    return [t.to(device) for t in elements + vectors]


def _batch_norm_pairs(
    device: torch.device,
    channels_last: bool,
    training: bool,
    activation: str | None,
    exact: Callable[[Tensor], Tensor],
    with_residual: bool,
) -> Pairs:
    """Result, running statistics and gradients."""
    x, residual, gradient, weight, bias = _images(device, channels_last)
    inputs = [x, weight, bias] + ([residual] if with_residual else [])
    wanted = [t.requires_grad_() for t in _exact(inputs)]
    mean, var = torch.full((37,), 99.0, device=device), torch.ones(37, device=device)
    exact_mean, exact_var = _exact([mean, var])
    for t in inputs:
        t.requires_grad_()
    y = functional.batch_norm(
        x, mean, var, weight, bias, training, activation=activation,
        residual=residual if with_residual else None,
    )  # fmt: skip
    z = torch.nn.functional.batch_norm(
        wanted[0], exact_mean, exact_var, wanted[1], wanted[2], training
    )
    reference = exact(z + wanted[3] if with_residual else z)
    gradients = torch.autograd.grad(y, inputs, gradient)
    references = torch.autograd.grad(reference, wanted, _exact([gradient])[0])
    return [
        (y, reference),
        (mean, exact_mean),
        (var, exact_var),
        *zip(gradients, references, strict=True),
    ]


@kernel_check("batch_norm", "(x - mean) / sqrt(var + eps) * weight + bias")
def _batch_norm(device: torch.device) -> Pairs:
    return _batch_norm_pairs(device, False, True, None, lambda z: z, False)


@kernel_check("batch_norm, evaluation, SiLU", "the same with running statistics")
def _batch_norm_evaluation(device: torch.device) -> Pairs:
    return _batch_norm_pairs(device, False, False, "silu", torch.nn.functional.silu, False)


@kernel_check("batch_norm + add + ReLU", "max(0, batch_norm(x) + residual), channels_last")
def _batch_norm_add_relu(device: torch.device) -> Pairs:
    return _batch_norm_pairs(device, True, True, "relu", torch.relu, True)


def _step(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    exact: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Pairs:
    """The first step from gradients that are half the weights and 0.1."""
    weights = [w.requires_grad_() for w in _weights(device)]
    pairs = []
    for w in weights:
        w.grad = w.detach() / 2 + 0.1
        pairs.append((w, exact(w.detach().double().cpu(), w.grad.double().cpu())))
    make(weights).step()
    return pairs


@kernel_check("optim.SGD, group lasso", "prox of lr * R after the step")
def _sgd(device: torch.device) -> Pairs:
    def exact(w: Tensor, g: Tensor) -> Tensor:
        v = w - 0.1 * g
        if v.dim() < 2 or v.shape[1] == 1:
            return _soft(v, 0.1 * L1 + 0.1 * GROUP)  # a group of one element is one of l1
        v = _soft(v, 0.1 * L1)
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)
        shrunk: Tensor = v * (1 - 0.1 * GROUP * math.sqrt(v.shape[1]) / norms).clamp_min(0.0)
        return shrunk

    return _step(lambda p: optim.SGD(p, lr=0.1, l1=L1, group=GROUP), exact, device)


@kernel_check("optim.AdamW, elastic net", "prox of lr * R after the step")
def _adamw(device: torch.device) -> Pairs:
    def exact(w: Tensor, g: Tensor) -> Tensor:
        v = w * (1 - 0.1 * 0.01) - 0.1 * g / (g.abs() + 1e-8)
        return _soft(v, 0.1 * L1) / (1 + 0.1 * L2)

    return _step(lambda p: optim.AdamW(p, lr=0.1, l1=L1, l2=L2), exact, device)


@kernel_check("optim.Adagrad, preconditioned", "prox in the metric of the step")
def _adagrad(device: torch.device) -> Pairs:
    def exact(w: Tensor, g: Tensor) -> Tensor:
        metric = (g.square() + 0.5).sqrt()
        v = w - 0.1 * g / metric
        return v.sign() * (v.abs() - 0.1 * L1 / metric).clamp_min(0.0) / (1 + 0.1 * L2 / metric)

    def make(p: list[Tensor]) -> torch.optim.Optimizer:
        return optim.Adagrad(p, 0.1, 0.0, 0.0, 0.5, 0.0, l1=L1, l2=L2, prox="preconditioned")

    return _step(make, exact, device)


@kernel_check("optim.FTRL", "-soft(z, l1) / ((beta + sqrt(n)) / lr + l2)")
def _ftrl(device: torch.device) -> Pairs:
    def exact(w: Tensor, g: Tensor) -> Tensor:
        z = -w / 0.1 + g - g.abs() / 0.1 * w
        return -_soft(z, L1) / ((1 + g.abs()) / 0.1 + L2)

    return _step(lambda p: optim.FTRL(p, lr=0.1, l1=L1, l2=L2), exact, device)


@kernel_check("optim.clip_grad_norm_", "g * min(1, max_norm / ||g||)")
def _clip(device: torch.device) -> Pairs:
    weights = _weights(device)
    for w in weights:
        w.grad = w.clone()
    wanted = _exact(weights)
    total = torch.cat([w.flatten() for w in wanted]).norm()
    norm = optim.clip_grad_norm_(weights, 2.0)
    pairs = [(norm, total)]
    for w, exact in zip(weights, wanted, strict=True):
        assert w.grad is not None
        pairs.append((w.grad, exact * 2.0 / (total + 1e-6)))
    return pairs


@kernel_check("sparsity", "share of exact zeros")
def _sparsity(device: torch.device) -> Pairs:
    weights = _weights(device)
    zeros = sum(int((w == 0).sum()) for w in weights)
    count = sum(w.numel() for w in weights)
    share = torch.tensor(fusereg.sparsity(weights), dtype=torch.float64)
    return [(share, torch.tensor(zeros / count, dtype=torch.float64))]


def _error(pairs: Pairs) -> float:
    """The greatest difference, relative to the largest element of its tensor. NaN stays NaN."""
    errors = [0.0]
    for came, wanted in pairs:
        if came.shape != wanted.shape:
            raise ValueError(f"shape {tuple(came.shape)} came, {tuple(wanted.shape)} was wanted")
        if wanted.numel():
            exact = wanted.detach().double().cpu()
            difference = (came.detach().double().cpu() - exact).abs().max()
            errors.append(float(difference) / max(float(exact.abs().max()), 1e-30))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def backends() -> list[tuple[str, torch.device, str | None]]:
    """(name, device, instruction set) of everything that can run a kernel here."""
    found: list[tuple[str, torch.device, str | None]] = [
        (f"cpu {isa}", torch.device("cpu"), isa) for isa in _C.cpu_isas()
    ]
    if _C.build_info()["cuda"] and torch.version.hip is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append((f"cuda:{index}", torch.device("cuda", index), None))
    return found


def _run_one(check: KernelCheck, backend: str, device: torch.device) -> CheckResult:
    error: float | None = None
    message: str | None = None
    try:
        error = _error(check.call(device))
    except Exception as problem:  # a kernel that throws is a row of the table, not the end of it
        message = " ".join(f"{type(problem).__name__}: {problem}".split())
    else:
        if math.isnan(error):
            error, message = None, "the result is NaN"
    ok = error is not None and error <= TOLERANCE
    return CheckResult(
        check.name, check.formula, backend, str(device), ok, error, TOLERANCE, message
    )


def run_checks() -> list[CheckResult]:
    """Calls every kernel on every backend."""
    results = []
    for backend, device, isa in backends():
        for check in CHECKS:
            if isa is None:
                results.append(_run_one(check, backend, device))
            else:
                with _instruction_set(isa):
                    results.append(_run_one(check, backend, device))
    return results
