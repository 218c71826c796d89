"""Lists of parameters that are timed, among them those of well-known networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .cases import Case, Options, Workload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """A list of parameters; ``host``: so small that only the call itself costs."""

    name: str
    shapes: list[Shape]
    host: bool = False

    def parameters(self, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
        """Return the parameters without gradients, the same ones at each call."""
        generator = torch.Generator(device=device).manual_seed(0)
        return [
            torch.nn.Parameter(
                torch.empty(shape, dtype=dtype, device=device).uniform_(
                    -0.05, 0.05, generator=generator
                )
            )
            for shape in self.shapes
        ]


def works(quick: bool, large: Sequence[Work]) -> list[Work]:
    """Return the lists to time, the most telling first; ``large`` are left out if ``quick``."""
    if quick:
        return [
            Work("tiny 20x1000", [(1000,)] * 20),
            Work("resnet50", resnet50()),
            Work("host 100x1", [(1,)] * 100, host=True),
        ]
    return [
        Work("resnet50", resnet50()),
        Work("2000x512", [(512,)] * 2000),
        *large,
        Work("host 2000x1", [(1,)] * 2000, host=True),
    ]


def list_cases(
    options: Options,
    works: Sequence[Work],
    modes: Mapping[str, tuple[str, int]],
    setup: Callable[[Work, str, torch.dtype, Options], Workload],
    memory: Callable[[Work, str, int], int],
) -> list[Case]:
    """Return the cases of each list, dtype and mode.

    Args:
        modes: The operation's name, and the elements moved for each element of the list.
        setup: Makes the workload.
        memory: Given the list, the mode and the bytes of the list, returns a bound on the bytes
            that are alive at once, without the copy's.
    """
    found = []
    for work in works:
        elements = count(work.shapes)
        for dtype in options.dtypes[:1] if work.host else options.dtypes:
            size = elements * dtype.itemsize
            found += [
                Case(
                    op=op,
                    mode=mode,
                    shape=work.name,
                    dtype=dtype,
                    device=options.device,
                    tensors=len(work.shapes),
                    elements=elements,
                    bytes_moved=0 if work.host else moved * size,
                    memory=memory(work, mode, size) + moved * size,
                    setup=functools.partial(setup, work, mode, dtype, options),
                    host=work.host,
                )
                for mode, (op, moved) in modes.items()
            ]
    return found


def resnet50() -> list[Shape]:
    """Return ResNet-50's for 1000 classes (He et al., 2015): 161 tensors, 25,557,032 parameters.

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


def resnet50_channels() -> list[list[int]]:
    """Return the sets of channels of :func:`resnet50`: which tensors write each.

    The layers inside a block write channels of their own. The last layer of each block of a stage,
    and the projection, write into one residual stream. The classifier's outputs stay.
    """
    sets: list[list[int]] = []
    at = 0

    def written(into: list[int]) -> None:
        nonlocal at
        into.extend(range(at, at + 3))  # convolution, scale, shift
        at += 3

    sets.append([])
    written(sets[-1])
    for blocks in (3, 4, 6, 3):
        stream: list[int] = []
        for block in range(blocks):
            for _ in range(2):
                sets.append([])
                written(sets[-1])
            written(stream)
            if block == 0:
                written(stream)
        sets.append(stream)
    return sets


def gpt2_small() -> list[Shape]:
    """Return those of GPT-2 small (Radford et al., 2019): 148 tensors, 124,439,808 parameters.

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
    """Return the number of elements."""
    return sum(math.prod(shape) for shape in shapes)
