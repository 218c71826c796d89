"""Parameter shapes of well-known networks, worked out from their architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """A list of parameters that is timed; ``host``: so small that only the call itself costs."""

    name: str
    shapes: list[Shape]
    host: bool = False


def quick_works() -> list[Work]:
    """For ``--quick``: a tiny list, a real one, and one of the host's time."""
    return [
        Work("tiny 20x1000", [(1000,)] * 20),
        Work("resnet50", resnet50()),
        Work("host 100x1", [(1,)] * 100, host=True),
    ]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1000 classes (He et al., 2015): 161 tensors, 25,557,032 parameters.

    A 7x7 stem; four stages of 3, 4, 6, 3 bottleneck blocks (1x1, 3x3, 1x1 with 4 times the width),
    the first block of a stage with a 1x1 projection on its shortcut; a batch normalization (weight
    and bias) after every convolution, which have no bias themselves; a linear classifier.
    """
    shapes: list[Shape] = []

    def convolution(outputs: int, inputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    shapes.extend([(1000, inputs), (1000,)])
    return shapes


def gpt2_small() -> list[Shape]:
    """GPT-2 small (Radford et al., 2019): 148 tensors, 124,439,808 parameters.

    50257 tokens and 1024 positions of width 768; 12 blocks of layer norm, attention (query, key and
    value in one projection), layer norm, and a perceptron of 4 times the width; a last layer norm.
    The output projection is the token embedding itself, so it counts once.
    """
    width = 768
    shapes: list[Shape] = [(50257, width), (1024, width)]
    norm: list[Shape] = [(width,), (width,)]
    for _ in range(12):
        shapes.extend(norm)
        shapes.extend([(width, 3 * width), (3 * width,), (width, width), (width,)])
        shapes.extend(norm)
        shapes.extend([(width, 4 * width), (4 * width,), (4 * width, width), (width,)])
    shapes.extend(norm)
    return shapes


def count(shapes: list[Shape]) -> int:
    """Parameters in all."""
    return sum(math.prod(shape) for shape in shapes)
