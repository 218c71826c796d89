"""compact: a smaller model without the channels that are zero."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..core.arguments import check_integer, check_type
from ..core.groups import Groups, Member
from ..core.hints import explains
from ..early_stopping import EarlyStopping
from ..optim.optimizer import RegularizedOptimizer
from ..penalty.coupled import given_weights
from .carry import Change, carry_optimizer, check_optimizer
from .find import Found, find, groups_of
from .graph import plain_copy
from .parts import Cuts, Set, Slot, cut, cuts_of, name_epsilons, scales_of
from .plan import Decision, Run, decide, fold, identities
from .probe import differ, generator
from .table import Table, make_table

_log = logging.getLogger("fusereg")
_Model = TypeVar("_Model", bound=nn.Module)
_OP = "fusereg.compact"
#: The largest difference of the outputs in float64, relative to their size.
TOLERANCE = 1e-12


@overload
def compact(
    model: _Model,
    example_inputs: object,
    round_to: int = 1,
    dry_run: Literal[False] = False,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: AveragedModel | Iterable[AveragedModel] = (),
    stopper: EarlyStopping | None = None,
) -> _Model: ...


@overload
def compact(
    model: nn.Module,
    example_inputs: object,
    round_to: int = 1,
    *,
    dry_run: Literal[True],
    optimizer: torch.optim.Optimizer | None = None,
    averaged: AveragedModel | Iterable[AveragedModel] = (),
    stopper: EarlyStopping | None = None,
) -> Table: ...


@explains()
def compact(
    model: nn.Module,
    example_inputs: object,
    round_to: int = 1,
    dry_run: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: AveragedModel | Iterable[AveragedModel] = (),
    stopper: EarlyStopping | None = None,
) -> nn.Module | Table:
    """Return a smaller model that computes the same, without the channels that are zero.

    A channel is removed if every layer that reads it reads a zero, reads it with weights of zero,
    or reads a constant that can be computed in advance. A constant goes into the bias of the layer
    that reads it, or into the running mean of the batch norm behind that; where zero padding makes
    it differ at the borders, one constant channel stays for all of a set. What is constant is found
    from the weights that are zero, never from what some inputs happen to give. Which channels must
    go together is found by :func:`fusereg.groups_of`, with all its checks.

    If a whole branch of a residual block is zero, the block becomes ``nn.Identity``. A layer whose
    channels could all go keeps one elsewhere, and a model whose outputs would not depend on its
    input is refused.

    The outputs in evaluation are compared once more in float64, and agree within 1e-12 of their
    size. Training goes on as it would have with the zeros, as long as those stay zero there: behind
    ReLU they do by themselves, behind GELU or SiLU they do with a proximal step. Folded constants
    no longer train, and dropout draws other masks.

    Args:
        model: it is not changed, nor is its mode.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments for the
            model's forward, on its device.
        round_to: keep so many channels of each set that their number is a multiple of this, if
            there are as many: kernels are fastest with multiples of 8 or 16.
        dry_run: return a table of what would change instead of the model.
        optimizer: an optimizer of the model's parameters, which gets those of the smaller model,
            with its states cut likewise; one with ``groups`` gets those of the smaller model, with
            the ``group_weights`` of the channels that stay. Schedulers that hold it remain valid.
        averaged: an average of the model or several, whose ``module`` is cut at the same channels,
            whether they are zero in the average or not.
        stopper: an :class:`fusereg.EarlyStopping` of the model, which watches the smaller model
            from now on. Its best state is cut at the same channels, whether they were zero at that
            time or not.

    Returns:
        The smaller model, in the mode of ``model``, with parameters of its own. With ``dry_run``, a
        table: a row for each convolution and linear layer with channels, parameters and
        multiply-adds before and after, and why channels stay.

    Raises:
        ImportError: Torch-Pruning is not installed (``pip install "fusereg[compact]"``).
        TypeError: an argument is of another type than these.
        ValueError: ``round_to`` is below 1, the inputs are on another device, the model cannot be
            copied or traced, its outputs do not depend on its input, the optimizer keeps
            parameters outside of its param groups, the stopper watches another model, or a state of
            either cannot be cut.
        RuntimeError: the smaller model does not compute the same; nothing is changed.

    Example:
        >>> print(fusereg.compact(model, x, dry_run=True))
        >>> model = fusereg.compact(model, x, round_to=8, optimizer=optimizer)
    """
    check_integer(round_to, 1, f"{_OP}: round_to")
    wanted = "torch.optim.swa_utils.AveragedModel"
    check_type(averaged, (AveragedModel, Iterable), f"{_OP}: averaged", f"a {wanted} or several")
    averages = (averaged,) if isinstance(averaged, AveragedModel) else tuple(averaged)
    for one in averages:
        check_type(one, AveragedModel, f"{_OP}: what averaged holds", f"a {wanted}")
    if stopper is not None:
        check_type(stopper, EarlyStopping, f"{_OP}: stopper", "a fusereg.EarlyStopping")
        if (reason := stopper.why_not_movable()) is not None:
            raise ValueError(f"{_OP}: stopper cannot go on with another model: {reason}")
        if not stopper.watches(model):
            raise ValueError(f"{_OP}: stopper watches another model, or none")
    start = time.perf_counter()
    found = find(model, example_inputs, "compact")
    decisions, runs = decide(found, round_to)
    gone = identities(found, decisions)
    _explain_whole(found, decisions, gone)
    small, change, notes = _apply(model, found, decisions, gone)
    _compare(small, runs)
    table = make_table(found, small, decisions, time.perf_counter() - start, notes)
    if optimizer is not None:
        check_optimizer(optimizer, model, change.cuts)
    if dry_run:
        return table
    smaller_averages = [_apply(a.module, found, decisions, gone)[0] for a in averages]
    _restore(small, model)
    of_optimizer: dict[str, Any] = {}
    if isinstance(optimizer, RegularizedOptimizer) and (groups := optimizer.groups) is not None:
        again = of_optimizer["groups"] = _as_before(small, example_inputs, groups, model)
        if not isinstance(weights := optimizer.group_weights, str):
            known = given_weights("compact", groups, weights)
            of_optimizer["group_weights"] = _weights(again, groups, known, model, change.cuts)
    for average, smaller in zip(averages, smaller_averages, strict=True):
        _restore(smaller, average.module)
        average.module = smaller
    if stopper is not None:

        def of_best(state: dict[str, Any]) -> dict[str, Any]:
            best = copy.deepcopy(model)
            best.load_state_dict(state)
            smaller = _apply(best, found, decisions, gone)[0]
            _restore(smaller, best)
            return smaller.state_dict()

        stopper.move(small, of_best)
    if optimizer is not None:
        carry_optimizer(optimizer, model, small, change)
        for key, value in of_optimizer.items():
            setattr(optimizer, key, value)
    _log.info("%s: %s", _OP, table._last())
    return small


def _as_before(small: nn.Module, example_inputs: Any, old: Groups, model: nn.Module) -> Groups:
    """Return of the groups of the smaller model what the old ones hold of the model.

    Biases that are new belong to the members of their layers, and parameters that were frozen since
    stay members.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    known = {n for of_one in names.values() for n in of_one}
    of_old = {n for s in old for m in (*s.members, *s.readers) for n in names[id(m.parameter)]}
    frozen = [p for n, p in small.named_parameters() if n in of_old and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        groups = groups_of(small, example_inputs, any(s.readers for s in old))
    finally:
        for p in frozen:
            p.requires_grad_(False)

    def held(members: Iterable[Member], before: Iterable[Member]) -> tuple[Member, ...]:
        places = {(n, m.dim) for m in before for n in names.get(id(m.parameter), ())}
        layers = {n.rpartition(".")[0] for n, _ in places}
        return tuple(
            m
            for m in members
            if (m.name, m.dim) in places
            or (m.name not in known and m.name.rpartition(".")[0] in layers)
        )

    writers = [m for s in old for m in s.members]
    readers = [m for s in old for m in s.readers]
    sets = (
        s._replace(members=held(s.members, writers), readers=held(s.readers, readers))
        for s in groups
    )
    return Groups((s for s in sets if s.members), groups.kept)


def _weights(
    groups: Groups, old: Groups, weights: Iterable[Tensor], model: nn.Module, cuts: Cuts
) -> list[Tensor]:
    """Return the weights that channels of the smaller model had, by the slices that they hold."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    before: dict[tuple[int, int], Tensor] = {}  # of each slice; NaN: of no channel
    for own, given in zip(old, weights, strict=True):
        for m in own.members:
            slices = before.setdefault(
                (id(m.parameter), m.dim),
                torch.full(m.channels.shape, math.nan, dtype=torch.float64, device="cpu"),
            )
            channels = m.channels.cpu()
            slices[channels >= 0] = given[channels[channels >= 0]]
    found = []
    for own in groups:
        total = torch.zeros(own.size, dtype=torch.float64, device="cpu")
        for m in own.members:
            p = named.get(m.name)
            if p is None or (id(p), m.dim) not in before:  # a bias that is new
                continue
            slices = before[id(p), m.dim]
            if (index := cuts.get(first[id(p)], {}).get(m.dim)) is not None:
                slices = slices[index.cpu()]
            channels = m.channels.cpu()
            held = (channels >= 0) & ~slices.isnan()
            total[channels[held]] = slices[held]
        found.append(total)
    return found


def _explain_whole(found: Found, decisions: list[Decision], gone: list[str]) -> None:
    """Note which layers keep a channel though all could go; refuse a model that is constant.

    Raises:
        ValueError: the outputs do not depend on the input.
    """
    whole = [d for d in decisions if d.whole]
    if not whole:
        return
    with torch.no_grad():
        a, b = (found.inputs.other(generator(i)).call(found.plain) for i in (8, 9))
    if differ(a, b, 0.0) is None:
        raise ValueError(
            f"{_OP}: all {whole[0].found.size} channels of {whole[0].found.name} are dead, and the "
            "model's outputs do not depend on its input any more"
        )
    for decision in whole:
        name = decision.found.name
        if not any(name.startswith(f"{g}.") for g in gone):
            decision.notes.append("all its channels are dead; one stays, for a layer needs one")


def _apply(
    model: nn.Module, found: Found, decisions: list[Decision], gone: list[str]
) -> tuple[nn.Module, Change, list[str]]:
    """Return a smaller copy of a model, in float64, and what was done."""
    # In evaluation no layer changes while it is looked at, as spectral_norm does in training.
    small = copy.deepcopy(model)
    of_their_type = name_epsilons(small)
    small.double().eval()
    before = dict(small.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in small.named_parameters()}
    alias = {n: first[id(p)] for n, p in before.items()}  # of tied ones, all names but the first
    changed = {
        f"{f.part.module}.{key}" for d in decisions for f in d.folds for key in ("weight", "bias")
    }
    old = {n: p.detach().clone() for n, p in before.items() if n in changed}
    new = fold(small, decisions, found.norms)
    added = {n: before[n].detach() - p for n, p in old.items()}
    chosen = [(_with_biases(d.found, new), d.removed) for d in decisions]
    scales = scales_of(small, cuts_of(small, chosen))
    cuts = cut(small, chosen)
    scaled = {id(small.get_submodule(name.rpartition(".")[0])) for name in scales}
    for norm in of_their_type:
        if id(norm) not in scaled:
            norm.eps = None
    notes = [f"{name}: nn.Identity, for its branch is zero" for name in gone]
    for name in gone:
        owner, _, key = name.rpartition(".")
        small.get_submodule(owner)._modules[key] = nn.Identity()
    names = dict(small.named_parameters())
    new = [n for n in new if n in names]
    notes += [f"{name}: new, for the constants that its layer reads" for name in new]
    weights = {n: f"{n.rpartition('.')[0]}.weight" for n in new}
    change = Change(
        {alias.get(n, n): c for n, c in cuts.items()},
        {alias[n]: a for n, a in added.items() if a.any()},
        {n: alias[w] for n, w in weights.items()},
        {alias[n]: s for n, s in scales.items()},
    )
    return small, change, notes


def _with_biases(found: Set, new: Collection[str]) -> Set:
    """Return a set with the biases that its layers have got."""
    parts = [
        p._replace(slots=(*p.slots, Slot("bias", 0)))
        if p.role != "in" and f"{p.module}.bias" in new
        else p
        for p in found.parts
    ]
    return replace(found, parts=parts)


@torch.no_grad()
def _compare(small: nn.Module, runs: Iterable[Run]) -> None:
    """Compare the outputs of the smaller model with those of the original in float64.

    Raises:
        RuntimeError: they differ, or it cannot be run.
    """
    probe = plain_copy(small, "compact")
    for inputs, wanted in runs:
        try:
            got = inputs.call(probe)
        except Exception as error:
            raise RuntimeError(f"{_OP}: the smaller model cannot be run: {error}") from error
        off = differ(got, wanted, TOLERANCE)
        if off is not None:
            raise RuntimeError(
                f"{_OP}: the smaller model's outputs differ by {off:.1e} of their size; "
                "the model is unchanged"
            )


def _restore(small: Any, model: nn.Module) -> None:
    """Give the smaller model the original's modes, and its tensors the original's types."""
    modes = {n: m.training for n, m in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    tensors_of = (model.named_parameters, model.named_buffers)
    types = {n: t.dtype for all_of in tensors_of for n, t in all_of(remove_duplicate=False)}
    for module_name, module in small.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                name = f"{module_name}.{key}" if module_name else key
                if tensor is not None and tensor.is_floating_point():
                    like = types.get(name) or types.get(f"{module_name}.weight", tensor.dtype)
                    tensor.data = tensor.data.to(like)
