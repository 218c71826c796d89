"""The networks of the benchmarks of whole training.

They consist of torch's layers only, and `fusereg.convert` converts them as they are. `ResNet` and
`ViT` are for small gray images (1 channel, some 14 to 32 pixels a side) if nothing else is asked.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.drop(out)
        out = self.conv2(out)
        out = self.bn2(out)
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        y: Tensor = self.relu(out)
        return y


class ResNet(nn.Module):
    """A residual network: a stage for each width, halving the image from the second on."""

    #: Parameters that are neither penalized nor decayed, beside biases and norms.
    no_decay: tuple[str, ...] = ()

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 64),
        depth: int = 1,
        dropout: float = 0.1,
        classes: int = 10,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(Block(inputs, width, stride, dropout))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.head(self.dropout(x))
        return logits


class Separable(nn.Module):
    """A network of depthwise and pointwise convolutions (Howard et al. 2017), for color images."""

    def __init__(self, width: int = 96, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        parts: list[nn.Module] = []
        for _ in range(depth):
            for conv in (
                nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False),
                nn.Conv2d(width, width, 1, bias=False),
            ):
                parts += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.parts = nn.Sequential(*parts)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.parts(self.stem(x)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return y


class Mlp(nn.Sequential):
    """Two linear layers, with GELU and dropout between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )


class Layer(nn.Module):
    """A transformer layer, normalized before attention and before its MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.drop1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, dropout)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.attention(self.norm1(x)))
        y: Tensor = x + self.drop2(self.mlp(self.norm2(x)))
        return y


class ViT(nn.Module):
    """A vision transformer whose patches are made by convolutions (Xiao et al. 2021).

    Two convolutions of stride 2, each with batch norm and ReLU: a token covers 4 x 4 pixels.
    """

    no_decay: tuple[str, ...] = ("position",)

    def __init__(
        self,
        image_size: int = 28,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        side = (image_size + 3) // 4
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.layers = nn.Sequential(*(Layer(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return logits


def encoder(width: int, depth: int, heads: int, dropout: float = 0.1) -> nn.Sequential:
    """Return a transformer encoder of inputs (N, tokens, width)."""
    return nn.Sequential(*(Layer(width, heads, dropout) for _ in range(depth)), nn.LayerNorm(width))


def tabular(
    inputs: int, width: int, depth: int = 4, dropout: float = 0.1, classes: int = 10
) -> nn.Sequential:
    """Return an MLP for tables: blocks of linear, batch norm, ReLU and dropout."""
    parts: list[nn.Module] = []
    for i in range(depth):
        parts += [
            nn.Linear(width if i else inputs, width),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*parts, nn.Linear(width, classes))


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015): each level halves the image on the way down."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        inputs = (3, *widths[:-1])
        self.down = nn.ModuleList(map(_two_convolutions, inputs, widths))
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, 2) for width, below in pairwise(widths)
        )
        self.up = nn.ModuleList(_two_convolutions(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if passed else x)
            passed.append(x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](torch.cat((passed[i], self.widen[i](x)), 1))
        scores: Tensor = self.head(x)
        return scores


def _two_convolutions(inputs: int, width: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels in (inputs, width):
        parts += [
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*parts)
