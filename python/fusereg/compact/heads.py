"""Attention heads as channels: forward cuts the width into them, so they only go whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from .graph import Inputs, Traced
from .parts import Number, Part, Set, slots_of
from .probe import checked
from .ways import Way

_SIZES = ("dim", "size", "width", "features", "channels")


def with_heads(
    model: nn.Module, traced: Traced, sets: list[Set], inputs: Inputs
) -> tuple[list[Set], Inputs]:
    """Return the sets, those of attention heads of other layers that pass the probes, and inputs.

    How a layer's rows are cut into heads is no part of a model's graph, so the ways that the sizes
    kept in its attention module allow are tried one after the other. They are tried in training as
    well, which may depend on the number of heads where evaluation does not.
    """
    waiting: dict[str, list[Set]] = {}
    for found in (*traced.sets, *_in_attention(model)):
        waiting.setdefault(found.name, []).extend(_candidates(model, found))
    if not any(waiting.values()):
        return sets, inputs
    plain, inputs = inputs, _in_training(model, inputs)
    while True:
        taken = {p.module for s in sets for p in s.writers}
        round_ = []
        for ways in waiting.values():
            if ways and taken.isdisjoint(p.module for p in ways[0].writers):
                round_.append(ways.pop(0))
                taken |= {p.module for p in round_[-1].writers}
        if not round_:
            return sets, inputs if any(s.numbers for s in sets) else plain
        passed, _ = checked(model, round_, inputs)
        sets = sets + checked(model, passed, inputs, first=True)[0]


@torch.no_grad()
def _in_training(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return inputs that run the model in training too, if it can be run so."""
    if any(way.training for way in inputs.ways):
        return inputs
    both = inputs._replace(ways=(*inputs.ways, Way(True)))
    try:
        both.call(model)
    except RuntimeError:
        return inputs
    return both


def _in_attention(model: nn.Module) -> Iterator[Set]:
    """Return the linear layers of each attention module: the last one reads what others write."""
    names = {id(m): name for name, m in model.named_modules()}
    for _, module in model.named_modules():
        layers = [(names[id(m)], m) for m in module.children() if type(m) is nn.Linear]
        if len(layers) > 1 and _numbers(module):
            *writers, reader = layers
            parts = [_part(name, "out", layer) for name, layer in writers]
            yield Set(writers[0][0], 0, [*parts, _part(reader[0], "in", reader[1])])


def _part(name: str, role: Any, layer: Any) -> Part:
    size = layer.in_features if role == "in" else layer.out_features
    return Part(name, role, slots_of(layer, role) or (), torch.arange(size, device="cpu"))


def _candidates(model: nn.Module, found: Set) -> Iterator[Set]:
    """Return the sets of heads that the layers of a set may have."""
    layers = [p.of(model) for p in found.parts]
    widths = {len(p.channels) for p in found.readers}
    if not all(isinstance(layer, nn.Linear) for layer in layers) or len(widths) != 1:
        return
    (width,) = widths
    owner, module = _attention(model, [p.module for p in found.writers])
    rows = [len(p.channels) for p in found.writers]
    fused = rows == [3 * width]
    for each in dict.fromkeys(_head_sizes(module, width)):
        if any(n % each for n in rows) or (not fused and max(rows) > width):
            continue
        size = (width if fused else min(*rows, width)) // each
        if size < 2 or any(n % size for n in (*rows, width)):
            continue
        for numbers in _changing(owner, module, size, each, {*rows, width}):
            for outer in (3, 1) if fused else (1,):
                parts = [
                    p._replace(channels=_heads(len(p.channels), size, outer * (p.role == "out")))
                    for p in found.parts
                ]
                yield Set(found.name, size, parts, numbers=numbers, width=each)


def _heads(count: int, size: int, outer: int) -> torch.Tensor:
    """Return the head of each row: all of a head's together, within each of ``outer`` parts."""
    each = count // max(outer, 1)
    return torch.arange(count, device="cpu") % each * size // each


def _attention(model: nn.Module, writers: Collection[str]) -> tuple[str, nn.Module]:
    """Return the innermost module around the layers that knows of heads."""
    above = zip(*(name.split(".")[:-1] for name in writers), strict=False)
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, above)]
    while shared and not _numbers(model.get_submodule(".".join(shared))):
        shared.pop()
    name = ".".join(shared)
    return name, model.get_submodule(name)


def _integers(module: nn.Module) -> dict[str, int]:
    return {k: v for k, v in vars(module).items() if type(v) is int and v > 0}


def _numbers(module: nn.Module) -> dict[str, int]:
    """Return what a module keeps about heads: how many there are, or how large."""
    return {k: v for k, v in _integers(module).items() if "head" in k}


def _head_sizes(module: nn.Module, width: int) -> Iterator[int]:
    for key, value in _numbers(module).items():
        if width % value == 0:
            yield value if any(word in key for word in _SIZES) else width // value


def _changing(
    owner: str, module: nn.Module, size: int, each: int, rows: Collection[int]
) -> Iterator[tuple[Number, ...]]:
    """Return which numbers of a module may have to change with the heads: widths or none."""
    counts = {n // each for n in rows} | {size}
    heads, widths = [], []
    for key, value in _integers(module).items():
        wide = any(word in key for word in _SIZES)
        if not wide and "head" in key and value in counts and value % size == 0:
            heads.append(Number(owner, key, value // size))
        elif wide and value in rows and value != each:
            widths.append(Number(owner, key, value // size))
    yield (*heads, *widths)
    if widths:
        yield tuple(heads)


def advice(model: nn.Module, name: str) -> str:
    """Return what to change so that heads can go, for a layer that seems to write such; else ""."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    layers = {n: m for n, m in module.named_children() if type(m) is nn.Linear}
    if len(layers) < 3 or own not in list(layers)[:-1]:
        return ""
    numbers = _numbers(module)
    where = owner or "the model"
    if not numbers:
        return (
            f"; if forward cuts them into heads, keep their number or size in {where} as an "
            'integer with "head" in its name'
        )
    *_, reader = layers.values()
    wide = [n for n, m in layers.items() if m.out_features > reader.in_features]
    if wide and len(layers) < 4:
        return f"; heads can go if keys and values have a layer each, and not {wide[0]} for both"
    counts = {reader.in_features // each for each in _head_sizes(module, reader.in_features)}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    by_head = [
        n for n, t in tensors.items() if n.split(".")[0] not in layers and counts & set(t.shape)
    ]
    if by_head:
        return f"; {by_head[0]} of {where} has an element for each head, so that the heads stay"
    own = f"{owner}.{next(iter(numbers))}".lstrip(".")
    return f"; heads can go if forward reads their number from {own} alone"
