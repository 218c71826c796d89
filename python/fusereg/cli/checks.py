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
from fusereg import _C, functional, optim, prox

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


@kernel_check("alpha_dropout", "a * (keep ? x : alpha') + b")
def _alpha_dropout(device: torch.device) -> Pairs:
    x = _weights(device)[0]
    mask = fusereg.dropout_mask(x.shape, P, 5, device=device)
    limit = -1.7580993408473766

    def exact(t: Tensor, m: Tensor, keep: float) -> Tensor:
        a = math.sqrt(1 / (keep * (1 + (1 - keep) * limit**2)))
        return a * torch.where(m, t, limit) - a * (1 - keep) * limit

    return _masked(lambda t: functional.alpha_dropout(t, P, seed=5), mask, exact, x)


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
