"""Batch normalization's values on every backend, against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusereg
from conftest import TOLERANCES, Backend
from fusereg import functional as F

#: (N, C, ...): one line shorter and longer than a block, more channels than a tile has, odd ones.
SHAPES = [
    (8, 64),
    (33, 5),
    (16, 5, 33),
    (4, 3, 5, 7),
    (3, 70, 4, 4),
    (5, 17, 1, 1),
    (3, 1, 6, 7),
    (2, 3, 3, 4, 5),
]

ACTIVATIONS = [None, "relu", "leaky_relu"]
SLOPE = 0.2


class Case(NamedTuple):
    """Everything that a call takes, in the dtype that is tested."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    gradient: Tensor


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: Backend,
    channels_last: bool = False,
    residual: bool = False,
    parameters: torch.dtype | None = None,
) -> Case:
    """Random numbers, the same for each dtype but for rounding."""
    channels = shape[1]
    if parameters is None:
        parameters = torch.float64 if dtype is torch.float64 else torch.float32

    def laid_out(t: Tensor) -> Tensor:
        t = t.to(dtype).to(backend.device)
        if channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            t = t.contiguous(memory_format=formats[t.dim()])
        return t

    def elements() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def vector() -> Tensor:
        return torch.randn(channels, dtype=torch.float64).to(parameters).to(backend.device)

    return Case(
        laid_out(3 * elements() + torch.randn(channels).view(-1, *[1] * (len(shape) - 2))),
        laid_out(elements()) if residual else None,
        vector(),
        vector(),
        vector(),
        vector().abs() + 0.5,
        laid_out(elements()),
    )


def activate(z: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return z.relu()
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, SLOPE)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    return z


def exact(case: Case, training: bool, activation: str | None) -> dict[str, Tensor]:
    """Results and gradients in float64."""
    inputs = {
        name: getattr(case, name).detach().double().cpu().contiguous().requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if getattr(case, name) is not None
    }
    mean, var = case.mean.double().cpu(), case.var.double().cpu()
    z = torch.nn.functional.batch_norm(
        inputs["x"], mean, var, inputs["weight"], inputs["bias"], training, 0.3, 1e-3
    )
    if "residual" in inputs:
        z = z + inputs["residual"]
    y = activate(z, activation)
    gradients = torch.autograd.grad(y, list(inputs.values()), case.gradient.double().cpu())
    found = {f"grad_{k}": g for k, g in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "mean": mean, "var": var, **found}


def ours(case: Case, training: bool, activation: str | None, **more: Any) -> dict[str, Tensor]:
    inputs = {
        name: getattr(case, name).detach().clone(memory_format=torch.preserve_format)
        for name in ("x", "weight", "bias", "residual")
        if getattr(case, name) is not None
    }
    for t in inputs.values():
        t.requires_grad_()
    mean, var = case.mean.clone(), case.var.clone()
    y = F.batch_norm(
        inputs["x"],
        mean,
        var,
        inputs["weight"],
        inputs["bias"],
        training,
        0.3,
        1e-3,
        activation=activation,
        residual=inputs.get("residual"),
        negative_slope=SLOPE,
        **more,
    )
    gradients = torch.autograd.grad(y, list(inputs.values()), case.gradient)
    found = {f"grad_{k}": g for k, g in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "mean": mean, "var": var, **found}


def assert_near(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, factor: float = 2.0
) -> None:
    """Relative to the largest element; sums over a channel to the root of their length as well."""
    length = wanted["y"].numel() / wanted["y"].shape[1]
    for name, t in found.items():
        limit = TOLERANCES[t.dtype if t.dtype is not torch.float64 else dtype] * factor
        reference = wanted[name]
        assert t.shape == reference.shape, name
        if reference.numel():
            scale = float(reference.abs().max())
            if name in ("grad_weight", "grad_bias"):
                scale = max(scale, length**0.5)
            error = float((t.double().cpu() - reference).abs().max()) / max(scale, 1e-30)
            assert error <= limit, (name, error, limit)


@pytest.mark.sanitizer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], training: bool, dtype: torch.dtype, backend: Backend
) -> None:
    layouts = [False, True] if len(shape) > 3 else [False]
    for channels_last, activation, residual in itertools.product(
        layouts, ACTIVATIONS, (False, True)
    ):
        case = make(shape, dtype, backend, channels_last, residual)
        found = ours(case, training, activation)
        assert found["y"].dtype is dtype
        assert found["y"].stride() == case.x.stride()
        assert_near(found, exact(case, training, activation), dtype)


def test_threads_and_instruction_sets_do_not_change_a_bit(backend: Backend) -> None:
    shapes = (
        [(6, 3, 40, 41), (9, 70, 7, 7)] if backend.on_host else [(40, 3, 90, 91), (64, 70, 14, 14)]
    )
    before = torch.get_num_threads()
    for shape, channels_last in itertools.product(shapes, (False, True)):
        case = make(shape, torch.float32, backend, channels_last, True)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ours(case, True, "relu"))
        torch.set_num_threads(before)
        if backend.isa is not None:
            fusereg._C.set_cpu_isa("baseline")
            results.append(ours(case, True, "relu"))
            fusereg._C.set_cpu_isa(backend.isa)
        for other in results[1:]:
            for name, t in results[0].items():
                assert torch.equal(t, other[name]), (name, shape, channels_last)
