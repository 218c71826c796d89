"""Decisions: the channels that can be removed without changing what a model computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .find import Found
from .graph import Inputs
from .parts import CONV, Part, Set, slice_channels
from .probe import Range, constant_for, generator, norms_of, nowhere_flat, reading, zeros_alone


@dataclass
class Fold:
    """Constants that a layer reads, as they go into its bias or into another column."""

    part: Part
    values: Tensor
    """float64 [channels that the layer reads]: what goes into the bias, 0 elsewhere."""
    merged: Tensor
    """float64, likewise: what goes into the column ``into``."""
    into: int = -1


@dataclass
class Decision:
    """The channels of a set that go, and the constants that this leaves behind."""

    found: Set
    removed: Tensor
    folds: list[Fold]
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    """All its channels could be removed; one stays then."""


class Run(NamedTuple):
    """Some inputs, and what a model has made of them."""

    inputs: Inputs
    outputs: list[Tensor]


def columns(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the sums over the kernel and the largest sizes of a layer's weights [out, in]."""
    weight = layer.weight.detach()
    if isinstance(layer, CONV) and layer.transposed:
        weight = weight.transpose(0, 1)
    flat = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(-1)
    sums, sizes = flat.sum(-1), flat.abs().amax(-1)
    groups = layer.groups if isinstance(layer, CONV) else 1
    if groups == 1:
        return sums, sizes
    if layer.transposed:  # [out / groups, in]: enough to see which columns are zero
        return sums, sizes
    blocks = [torch.block_diag(*t.chunk(groups, 0)) for t in (sums, sizes)]
    return blocks[0], blocks[1]


def reads_no_zeros(layer: Any) -> bool:
    """Return whether a layer reads nothing but its input, no padding of zeros."""
    if isinstance(layer, nn.Linear):
        return True
    plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and (
        layer.padding_mode != "zeros"
        or layer.padding == "valid"
        or (layer.padding == "same" and max(layer.kernel_size) == 1)
        or (not isinstance(layer.padding, str) and not any(layer.padding))
    )


@torch.no_grad()
def decide(found: Found, round_to: int) -> tuple[list[Decision], list[Run]]:
    """Return what can be removed of each set, and the runs of the model that this took."""
    constant = constant_for(zeros_alone(found.plain, 2), found.sets, found.inputs, 3)
    with reading(found.plain, found.sets) as seen:
        both = found.inputs, found.inputs.other(generator(4))
        runs = [Run(inputs, inputs.call(found.plain)) for inputs in both]
    decisions = []
    for s in found.sets:
        decision = _decide(found.plain, s, constant, seen)
        _round(decision, round_to)
        decisions.append(decision)
    return decisions, runs


def _decide(
    model: nn.Module, found: Set, constant: dict[str, Tensor], seen: dict[str, Range]
) -> Decision:
    live, stuck = (torch.zeros(found.size, dtype=torch.bool, device="cpu") for _ in range(2))
    folds: list[Fold] = []
    states: list[tuple[Fold, Tensor]] = []
    moving = _moving(model, found, constant, seen)
    read = torch.zeros_like(live)
    for part in found.readers:
        layer, range_ = part.of(model), seen[part.module]
        mine = part.channels >= 0
        fixed = (constant[part.module] & range_.constant()).cpu()
        values = range_.low.cpu()
        scale = torch.maximum(range_.high.abs(), range_.low.abs()).max().cpu()
        zero = fixed & (values.abs() <= 1e-15 * scale)
        if part.slots:
            unread = (columns(layer)[1] == 0).all(0).cpu()
        else:  # an RMSNorm, where a constant is a part of the mean
            unread, fixed = torch.zeros_like(mine), zero
        nothing = unread | zero
        live[part.channels[mine & ~nothing & ~fixed]] = True
        read[part.channels[mine & ~unread]] = True
        feeds = mine & ~nothing & fixed
        fold = Fold(part, torch.where(feeds, values, 0.0), torch.zeros_like(values))
        if not reads_no_zeros(layer):
            stuck[part.channels[feeds]] = True
            fold.values, fold.merged = fold.merged, fold.values
        states.append((fold, torch.where(fixed, values, 0.0)))
        folds.append(fold)
    others = moving & read & ~live
    live |= others
    decision = Decision(found, ~live, folds)
    if others.any():
        decision.notes.append(
            f"{int(others.sum())} of its channels are constant, but in training they are another "
            "constant: their rows are zero before a normalization whose running mean is not what "
            "they give; make its scale and shift zero as well, or let it see some hundred batches"
        )
    if (stuck & ~live).any():
        _merge(model, decision, states, stuck & ~live)
    if (uneven := _silent(model, found) & live).any():
        decision.notes.append(
            f"{int(uneven.sum())} of its channels are zero where they are made, but not constant "
            "where they are read: padding of a pooling, for example"
        )
    decision.whole = bool(decision.removed.all())
    _keep(decision, decision.removed)
    return decision


def _moving(
    model: nn.Module, found: Set, constant: dict[str, Tensor], seen: dict[str, Range]
) -> Tensor:
    """Return which channels a norm with running statistics makes constant in evaluation alone.

    In training, it makes its shift of a constant.
    """
    moving = torch.zeros(found.size, dtype=torch.bool, device="cpu")
    for part in norms_of(model, found):
        layer, range_ = part.of(model), seen[part.module]
        off = (range_.low - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        if layer.weight is not None:
            off = off * layer.weight.detach()
        fixed = constant[part.module] & range_.constant() & (off.abs() > 1e-12)
        moving[part.channels[fixed.cpu() & (part.channels >= 0)]] = True
    return moving


def _silent(model: nn.Module, found: Set) -> Tensor:
    """Return which channels' rows are all zero, or some scale of a normalization."""
    rows, scale = (
        torch.ones(found.size, dtype=torch.bool, device="cpu"),
        torch.zeros(found.size, dtype=torch.bool, device="cpu"),
    )
    for part in found.writers:
        for member in (s for s in part.slots if s.key == "weight"):
            layer = part.of(model)
            weight = layer.weight.detach().movedim(member.dim, 0)
            channels = slice_channels(layer, part.role, member, part.channels)
            some = weight.flatten(1).any(1).cpu() if weight.dim() > 1 else (weight != 0).cpu()
            live = torch.zeros(found.size, dtype=torch.bool, device="cpu")
            live[channels[(channels >= 0) & some]] = True
            covered = torch.zeros(found.size, dtype=torch.bool, device="cpu")
            covered[channels[channels >= 0]] = True
            if part.role == "out":
                rows &= ~live
            else:
                scale |= covered & ~live
    return rows | scale


def _merge(
    model: nn.Module, decision: Decision, states: list[tuple[Fold, Tensor]], stuck: Tensor
) -> None:
    """Keep one of the constants that zero padding keeps from a bias, for all of them."""
    padded = [(fold, values) for fold, values in states if (fold.merged != 0).any()]
    reach = torch.full((len(stuck),), float("inf"), dtype=torch.float64, device="cpu")
    for fold, values in padded:
        here = torch.zeros_like(reach)
        mine = fold.part.channels >= 0
        here[fold.part.channels[mine]] = values[mine].abs()
        reach = torch.minimum(reach, here)
    reach[~stuck] = 0
    chosen = int(reach.argmax())
    one_group = all(getattr(f.part.of(model), "groups", 1) == 1 for f, _ in padded)
    transposed = any(getattr(f.part.of(model), "transposed", False) for f, _ in padded)
    count = int(stuck.sum())
    if count > 1 and reach[chosen] > 0 and one_group and not transposed:
        for fold, _ in padded:
            fold.into = int((fold.part.channels == chosen).nonzero()[0])
            values = fold.merged[fold.into]
            if values == 0:  # it is unread here so far
                values = next(v for f, v in states if f is fold)[fold.into]
            fold.merged = fold.merged / values
        stays = torch.zeros_like(stuck)
        stays[chosen] = True
        decision.notes.append(
            f"channel {chosen} stays for {count} constants, which zero padding keeps from a bias"
        )
    else:
        stays = stuck
        decision.notes.append(
            f"{count} of its channels are constant, but zero padding keeps them from a bias"
        )
    decision.removed = decision.removed & ~stays


def _keep(decision: Decision, removed: Tensor) -> None:
    """Remove only these channels; the constants of the others are not folded."""
    if removed.all():
        removed = removed.clone()
        removed[0] = False
    decision.removed = removed
    for fold in decision.folds:
        channels = fold.part.channels
        gone = removed[channels.clamp_min(0)] & (channels >= 0)
        fold.values = torch.where(gone, fold.values, 0.0)
        fold.merged = torch.where(gone, fold.merged, 0.0)


def _round(decision: Decision, round_to: int) -> None:
    """Keep more channels, up to a multiple."""
    stay = int((~decision.removed).sum())
    multiple = round_to // math.gcd(round_to, decision.found.width)
    missing = min(-stay % multiple, len(decision.removed) - stay)
    if missing:
        removed = decision.removed.clone()
        removed[removed.nonzero().flatten()[:missing]] = False
        _keep(decision, removed)
        decision.notes.append(f"{missing} zero channels stay to make a multiple of {multiple}")


# --- folding --------------------------------------------------------------------------------------


@torch.no_grad()
def fold(model: nn.Module, decisions: list[Decision], norms: dict[str, str]) -> list[str]:
    """Add the constants of channels that go to what reads them; return the biases that are new."""
    new = []
    for item in (f for d in decisions for f in d.folds):
        layer = item.part.of(model)
        if (item.merged != 0).any():
            extra = layer.weight * item.merged.to(layer.weight).view(
                1, -1, *[1] * (layer.weight.dim() - 2)
            )
            layer.weight[:, item.into] += extra.sum(1)
        if not (item.values != 0).any():
            continue
        added = columns(layer)[0] @ item.values.to(layer.weight)
        norm = norms.get(item.part.module)
        mean = None if norm is None else model.get_submodule(norm).running_mean
        if layer.bias is not None:
            layer.bias += added
        elif isinstance(mean, Tensor):
            mean -= added
        else:
            layer.bias = nn.Parameter(added, requires_grad=layer.weight.requires_grad)
            new.append(f"{item.part.module}.bias")
    return new


# --- dead branches --------------------------------------------------------------------------------


@torch.no_grad()
def identities(found: Found, decisions: list[Decision]) -> list[str]:
    """Return the outermost modules around wholly dead sets that return their input."""
    names: list[str] = []
    for decision in decisions:
        if decision.whole:
            parts = decision.found.name.split(".")
            names += [".".join(parts[:n]) for n in range(1, len(parts))]
    candidates = {
        n: m
        for n in dict.fromkeys(names)
        if not isinstance(m := found.plain.get_submodule(n), (nn.ModuleList, nn.ModuleDict))
    }
    if not candidates:
        return []
    passed = set(candidates)
    passed &= _unchanging(found.plain, passed, found.inputs)
    try:
        passed &= _unchanging(copy.deepcopy(found.plain).train(), passed, found.inputs)
    except Exception:  # batch norms want more examples
        return []
    probe = zeros_alone(found.plain, 5)
    with nowhere_flat(probe):
        passed &= _unchanging(probe, passed, found.inputs)
    return [n for n in candidates if n in passed and not _inside(n, passed)]


def _inside(name: str, others: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _unchanging(model: nn.Module, names: set[str], inputs: Inputs) -> set[str]:
    """Return which modules return just what they are given, one tensor, at each call."""
    same: dict[str, bool] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        given[module] = [a.clone() if isinstance(a, Tensor) else a for a in args]

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            (x,) = given.pop(module) if len(given[module]) == 1 else (None,)
            alike = isinstance(x, Tensor) and isinstance(out, Tensor) and torch.equal(x, out)
            if isinstance(x, Tensor):  # a block that clips lets through what is small
                large = (x * scale for scale in (1e2, 1e4, 1e8))
                alike = alike and all(torch.equal(module.forward(y), y) for y in large)
            same[name] = same.get(name, True) and alike

        return hook

    given: dict[nn.Module, list[Any]] = {}
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after(name)))
        inputs.call(model)
        inputs.other(generator(6)).call(model)
    return {name for name, alike in same.items() if alike}
