"""groups_of: the channels of a model that can be removed, and what writes and reads them."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import check_type
from ..core.groups import CoupledChannels, Groups, Member
from ..core.hints import explains
from .graph import Inputs, check_kind, inputs_of, plain_copy, sets_of
from .heads import advice, with_heads
from .parts import CONV, Part, Set, slice_channels
from .probe import checked, generator, randomize
from .ways import ways_of

_log = logging.getLogger("fusereg")


class Found(NamedTuple):
    """All that is known of a model's channels."""

    plain: nn.Module
    """A copy in float64 with torch's layers."""
    inputs: Inputs
    sets: list[Set]
    kept: dict[str, str]
    norms: dict[str, str]
    """The batch norm that alone reads the result of a layer, by the layer's name."""
    operations: dict[str, float]
    """Multiply-adds of one example, by layer."""


@explains()
def groups_of(
    model: nn.Module, example_inputs: object, readers: bool = False, scales: bool = False
) -> Groups:
    """Return the sets of channels of a model that can only be removed together.

    A channel is what convolutions and linear layers make. Where they are added (residual
    connections), concatenated, normalized, or convolved for each channel or group, several layers
    must lose it at once. For each such set, its *members* are what writes the channels: the rows of
    the weights, the biases, scale and shift of the normalizations between. An attention head is one
    channel. If the members' slices for a channel are zero, the channel is zero, and
    :func:`fusereg.compact` removes it. No two sets share a slice of a member. Frozen parameters are
    no members beside trained ones; a channel may then become a constant.

    The dependency graph is Torch-Pruning's (Fang et al. 2023, "DepGraph"), built on a copy of the
    model with torch's own layers, and each mapping in it is tried on that copy in float64 with
    random weights: silent channels must be read as constants, channels that are not read must not
    move the outputs, and the copy without them must compute the same. What fails is not in the
    result but in its ``kept``, with the reason: channels that are outputs of the model or that a
    layer normalization reads, halves of ``chunk``, slices at fixed places, and so on.

    Args:
        model: it is not changed, nor is its mode.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments for the
            model's forward, on its device. Only shapes and integers matter.
        readers: list what reads the channels as well, the columns of the weights behind. The same
            weight then occurs in two sets, by its rows and by its columns.
        scales: leave a layer out of the members where a batch norm alone reads its result, so that
            the norm's scale and shift stand for it (Liu et al. 2017, "Network Slimming", with the
            shift). The network does not change when such a layer's rows are scaled, so a penalty
            on them shrinks them for nothing, and a small row is turned far by the next steps. Not
            where the norm's parameters are frozen or missing.

    Returns:
        The sets, a sequence of ``CoupledChannels``: ``name`` (of the first layer that writes it),
        ``size``, ``members`` and ``readers`` (each a ``Member``: ``name``, ``parameter``, ``dim``,
        and ``channels``, the channel of each slice or -1), and ``operations``, the multiply-adds
        of one example that removing each channel saves.

    Raises:
        ImportError: Torch-Pruning is not installed (``pip install "fusereg[compact]"``).
        TypeError: ``model`` is no module, or ``example_inputs`` hold no tensor.
        ValueError: they are empty or on another device, or the model cannot be copied or traced.

    Example:
        >>> groups = fusereg.groups_of(model, torch.randn(2, 3, 32, 32))
        >>> [(g.name, g.size) for g in groups], groups.kept
    """
    found = find(model, example_inputs, "groups_of")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sets = (
        CoupledChannels(
            s.name,
            s.size,
            _members(
                found.plain, _scaled(found, s, parameters) if scales else s.writers, parameters
            ),
            _members(found.plain, s.readers, parameters) if readers else (),
            s.operations,
        )
        for s in found.sets
    )
    return Groups(sets, found.kept)


def _scaled(found: Found, s: Set, parameters: Mapping[str, Tensor]) -> list[Part]:
    """Return the writers of a set without the layers that a batch norm of the set stands for."""
    written = {p.module for p in s.writers}

    def stands(part: Part) -> bool:
        norm = found.norms.get(part.module)
        if norm is None or norm not in written:
            return False
        scale, shift = (parameters.get(f"{norm}.{key}") for key in ("weight", "bias"))
        return scale is not None and scale.requires_grad and (shift is None or shift.requires_grad)

    return [p for p in s.writers if not stands(p)]


def _members(
    plain: nn.Module, parts: Iterable[Part], parameters: Mapping[str, Tensor]
) -> tuple[Member, ...]:
    """Return the parameters among the slots of parts."""
    members = []
    for part in parts:
        for slot in part.slots:
            name = f"{part.module}.{slot.key}" if part.module else slot.key
            if name in parameters:
                channels = slice_channels(part.of(plain), part.role, slot, part.channels)
                members.append(Member(name, parameters[name], slot.dim, channels.clone()))
    trained = [m for m in members if m.parameter.requires_grad]
    return tuple(trained or members)


def find(model: nn.Module, example_inputs: object, op: str) -> Found:
    """Return the sets of coupled channels of a model that pass the probes."""
    check_type(model, nn.Module, f"fusereg.{op}: model", "a torch.nn.Module")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"fusereg.{op}: gradients show what depends on what, and torch.inference_mode() has "
            "none; call it outside"
        )
    check_kind(model, op)
    inputs = inputs_of(model, example_inputs, op)
    plain = plain_copy(model, op)
    inputs = _with_ways(plain, inputs.double(), op)
    traced = sets_of(plain, inputs, op)
    start = time.perf_counter()
    operations = _operations(plain, inputs)
    _log.info(
        "fusereg.%s: trying %d sets of channels, in a dozen runs of the model or more of %.2g s",
        *(op, len(traced.sets), len(inputs.ways) * (time.perf_counter() - start)),
    )
    plain.requires_grad_(False)
    sets, failed = checked(plain, traced.sets, inputs)
    for one in traced.sets:
        if (why := failed.get(one.name)) is not None:
            failed |= {p.module: why for p in one.writers if p.role == "out"}
    order = {name: i for i, (name, _) in enumerate(plain.named_modules())}
    sets, inputs = with_heads(plain, traced, sets, inputs)
    sets.sort(key=lambda s: order[s.name])
    written = {p.module for s in sets for p in s.writers}
    kept = {
        n: why + advice(plain, n) for n, why in (traced.kept | failed).items() if n not in written
    }
    for found in sets:
        found.operations = _saved(plain, found, operations)
    return Found(plain, inputs, sets, kept, traced.norms, operations)


@torch.no_grad()
def _with_ways(plain: nn.Module, inputs: Inputs, op: str) -> Inputs:
    """Return the inputs with the ways in which the model runs differently."""
    probe, other = copy.deepcopy(plain), inputs.other(generator(0))
    randomize(probe, 0)
    try:
        ways, why_not = ways_of(lambda way: other.run(probe, way))
    except Exception:  # not even in evaluation: tracing says so
        return inputs
    if why_not is not None:
        _log.warning(
            "fusereg.%s: forward was tried in evaluation alone, for it fails in training with "
            "these example_inputs (%s); branches that only training takes may break",
            *(op, why_not),
        )
    return inputs._replace(ways=ways)


@torch.no_grad()
def _operations(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the multiply-adds of each convolution and linear layer for one example."""
    counts: dict[str, float] = {}
    tensors = [x for x in (*inputs.args, *inputs.kwargs.values()) if isinstance(x, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 1

    def hook(name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def count(layer: Any, args: tuple[Any, ...], out: Any) -> None:
            # Each element of the result (of the input, if transposed) meets a row of the weight.
            made = args[0] if isinstance(layer, CONV) and layer.transposed else out
            each = layer.weight.numel() / layer.weight.shape[0]
            lone = out.dim() < (layer.weight.dim() if isinstance(layer, CONV) else 2)
            counts[name] = counts.get(name, 0.0) + made.numel() * each / (1 if lone else batch)

        return count

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, (CONV, nn.Linear)):
                hooks.enter_context(layer.register_forward_hook(hook(name)))
        inputs.run(model, inputs.ways[0])
    return counts


def _saved(model: nn.Module, found: Set, operations: dict[str, float]) -> Tensor:
    """Return the multiply-adds that each channel's removal saves if it is the only one."""
    saved = torch.zeros(found.size, dtype=torch.float64, device="cpu")
    for part in found.parts:
        if part.module in operations:
            share = operations[part.module] / len(part.channels)
            inside = part.channels[part.channels >= 0]
            saved += share * torch.bincount(inside, minlength=found.size)
    return saved
