"""Models to penalize, and the same penalty written the obvious way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusereg import WeightPenalty


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 4)
    )


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=11, dropout=0.0, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (7, 6)),
    "conv_bn": (conv_bn, (3, 2, 6, 6)),
    "transformer_layer": (transformer_layer, (3, 5, 8)),
}


class Net(nn.Module):
    """A body, a head, a normalization of its own make, and a parameter of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 2))
        self.body = nn.Sequential(nn.Linear(4, 5), MyRMSNorm(5), nn.Linear(5, 5))
        self.head = nn.Linear(5, 2)


class MyRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.decoder = nn.Linear(4, 10)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.embedding(x))  # type: ignore[no-any-return]


Strengths = dict[str, tuple[float, float, float]]


def strengths(penalty: WeightPenalty) -> Strengths:
    """Strengths by parameter name, as the groups show them."""
    found: Strengths = {}
    for group in penalty.groups:
        assert len(group.names) == len(group.params)
        for name in group.names:
            assert name not in found
            found[name] = (group.l1, group.l2, group.group)
    return found


def obvious(model: nn.Module, wanted: Strengths, *, half: bool = True) -> Tensor:
    named = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for name, (l1, l2, group) in wanted.items():
        w = named[name]
        total = total + l1 * w.abs().sum() + (l2 / 2 if half else l2) * w.square().sum()
        if group:
            rows = w.flatten(1) if w.dim() > 1 else w.reshape(-1, 1)
            total = total + group * math.sqrt(rows.shape[1]) * rows.norm(dim=1).sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(actual: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def assert_same_parameters(left: nn.Module, right: nn.Module, tolerance: float = 1e-12) -> None:
    """Check that two models have the same parameters, within an absolute tolerance."""
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=tolerance), name


def clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
