"""Models of torch's layers, in common styles, for the tests of conversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.batch_norm.layers import _Fused as Fused

Maker: TypeAlias = Callable[[], nn.Module]


class TimmAct(nn.BatchNorm2d):
    """A stand-in for timm's BatchNormAct2d, in case that timm is not installed."""

    __module__ = "timm.layers.norm_act"
    __qualname__ = "BatchNormAct2d"

    def __init__(
        self, *args: Any, act: nn.Module | None = None, drop: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class BasicBlock(nn.Module):
    """Two convolutions, as in residual networks of 18 and 34 layers."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Three convolutions, as in residual networks of 50 layers and more."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A small residual network, its forward in a helper as in torchvision."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        widths: Sequence[int] = (4, 8),
        depth: int = 2,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        layers: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for i in range(depth):
                layers.append(block(inputs, width, 2 if i == 0 and stage else 1))
                inputs = width * block.expansion
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(inputs, classes)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1)
        return self.fc(self.dropout(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def basic() -> nn.Module:
    return ResNet(BasicBlock)


def bottleneck() -> nn.Module:
    return ResNet(Bottleneck, depth=1)


def convolutions() -> nn.Module:
    """Return a Sequential with all fusible activations, one that is not, and dropouts."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.SiLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GELU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3),
        nn.Hardtanh(),
        nn.Flatten(),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 12 * 12, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 8),
        nn.AlphaDropout(0.1),
        nn.Sequential(nn.BatchNorm1d(8), nn.Identity(), nn.SiLU()),
    )


class Encoder(nn.Module):
    """torch's own transformer layer, whose forward is not rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2))


class Volumes(nn.Module):
    """Layers in lists, activations as functions, and a residual that must not be broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 3, padding=1)])
        self.norms = nn.ModuleList([nn.BatchNorm3d(2), nn.BatchNorm3d(2)])
        self.last = nn.BatchNorm3d(2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        wide = F.gelu(self.last(x).add(x))
        return wide + F.silu(self.last.weight.sum() * self.scale)


MODELS = [basic, bottleneck, convolutions, mlp, Encoder, Volumes]


def without_dropout(model: nn.Module) -> nn.Module:
    """Set probabilities to 0, so that training can be compared number by number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def stir(model: nn.Module) -> nn.Module:
    """Give parameters and buffers values that are neither 0 nor 1; negative weights too."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() <= 1:
                tensor.uniform_(0.5, math.e) if tensor.min() >= 0 else tensor.normal_()
    return model


# --- what the tests share -------------------------------------------------------------------------


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64)


def twins(make: Maker) -> tuple[nn.Module, nn.Module]:
    """Return a model and its converted copy, in double precision, without dropout."""
    model = stir(without_dropout(make())).double()
    return model, fusereg.convert(copy.deepcopy(model))


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def same_state(a: nn.Module, b: nn.Module, tolerance: float = 1e-11) -> None:
    wanted = b.state_dict()
    assert list(a.state_dict()) == list(wanted)
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


Calls: TypeAlias = list[tuple[str | None, bool, float]]


def watched_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what the batch-norm kernels fuse: activation, residual or not, dropout."""
    seen: Calls = []
    original = Fused._normalized

    def normalized(
        layer: Any, x: Tensor, residual: Tensor | None, mask: Tensor | None, settings: Any
    ) -> Tensor:
        seen.append((settings.activation, residual is not None, settings.dropout))
        return original(layer, x, residual, mask, settings)

    monkeypatch.setattr(Fused, "_normalized", normalized)
    return seen
