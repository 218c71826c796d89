"""Models of convolutions and batch norms, and what all folded models must be."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg.nn import BatchNorm2d, FrozenBatchNorm

_Norm = nn.modules.batchnorm._BatchNorm
Make = Callable[[], nn.Module]

#: A forward that enters a context is not traced, and its source is read.
untraceable = contextlib.nullcontext()


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation, with random parameters and statistics."""
    model.double().eval()
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            if values.is_floating_point():
                values.copy_(torch.rand_like(values) + (0.5 if "var" in name else -0.4))
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, (_Norm, FrozenBatchNorm)) for m in model.modules())


def folded(model: nn.Module, *inputs: Any, caplog: pytest.LogCaptureFixture) -> nn.Module:
    """The folded copy, which computes what the model does, and left the model as it was."""
    inputs = inputs or (torch.randn(2, 6, 7, 5, dtype=torch.float64),)
    with torch.no_grad():
        wanted = model(*inputs)
    state = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    caplog.set_level(logging.INFO, "fusereg")
    caplog.clear()
    copied = fusereg.fold_into_conv(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        found = copied(*inputs)
    wanted, found = (t if isinstance(t, (tuple, list)) else (t,) for t in (wanted, found))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, float(b.abs().max())), rtol=0.0)
    stays = [r.message for r in caplog.records if " stays: " in r.message]
    said = sum("folded into" in r.message for r in caplog.records)
    assert len(stays) == norms(copied)
    assert said == norms(model) - norms(copied)
    return copied


def convolution() -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, padding=1)


def sequence(norm: Any = nn.BatchNorm2d, conv: Any = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1) if conv is None else conv, norm(6, **options), nn.ReLU()
    )


class Residual(nn.Module):
    """A residual block whose structure only its forward tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn2 = BatchNorm2d(6, activation="relu")
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.bn3 = BatchNorm2d(6, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))), x)
        return self.bn3(self.conv3(y), residual=x)


class Pair(nn.Module):
    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = convolution() if conv is None else conv
        self.bn = nn.BatchNorm2d(6) if norm is None else norm

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.bn(self.conv(x)))


class Asserts(Pair):
    # Not in a file of tests, whose assertions pytest rewrites.

    def forward(self, x: Tensor) -> Any:
        assert x.shape[1] == 6, "wanted 6 channels"
        return self.bn(self.conv(x))


class Untraceable(nn.Module):
    """Calls its part in a context, which is not followed."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        with untraceable:
            return self.part(*inputs)
