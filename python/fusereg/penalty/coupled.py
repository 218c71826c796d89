"""Group lasso over channels whose slices lie in several tensors: layouts, kernels and gradient.

All channels of a model take two passes over the weights: the sums of each channel, then what they
scale. The sums of shards on other ranks are added between the two, as one vector. Where there are
none, a proximal step is one call of the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, distributed, memory
from ..core.arguments import check_type
from ..core.groups import CoupledChannels, Groups, Member
from ..core.params import by_device
from . import dtensor as _dtensor
from . import kernels as _kernels
from .strengths import NO_PENALTY, Strength, check_number

#: ``"size"``, ``"operations"``, or numbers: one for each set, or for each of its channels.
Weights: TypeAlias = str | Sequence[float | Sequence[float] | Tensor]


class _Index(NamedTuple):
    """The channels that the slices of some tensors belong to, as the kernels take them."""

    dims: list[int]
    slot_of: Tensor  # int32 [entries]
    starts: Tensor  # int32 [slots + 1]
    order: Tensor  # int32 [entries]: the entries by slot


class _Part(NamedTuple):
    """Tensors of one device whose shards lie on the same ranks."""

    where: _dtensor.Where
    at: Sequence[int]
    tensors: list[Tensor]
    layout: _Index


class Family:
    """Disjoint slices of many tensors, and the channels (slots) that they belong to.

    Args:
        op: the operation, for errors.
        members: each with the slot that is its channel 0, and the number of channels.
        slots: the number of channels.
    """

    def __init__(self, op: str, members: Sequence[tuple[int, int, Member]], slots: int) -> None:
        self.slots = slots
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.dims: list[int] = []
        self.slot_of: list[Tensor] = []
        places: dict[int, int] = {}
        self.sizes = torch.zeros(slots, dtype=torch.float64, device="cpu")
        for first, size, member in members:
            where = f"fusereg.{op}: {member.name}"
            channels = _checked(where, size, member)
            p, dim = member.parameter, member.dim % max(member.parameter.dim(), 1)
            # An empty tensor has nothing to add to a channel.
            none = channels < 0 if p.numel() else torch.ones_like(channels, dtype=torch.bool)
            slot = torch.where(none, -1, channels + first).to(torch.int32)
            at = places.setdefault(id(p), len(self.tensors))
            if at == len(self.tensors):
                self.names.append(member.name)
                self.tensors.append(p)
                self.dims.append(dim)
                self.slot_of.append(slot)
            elif self.dims[at] != dim:
                raise ValueError(
                    f"{where} is cut into channels along dimensions {self.dims[at]} and {dim}: "
                    "groups must not overlap"
                )
            elif ((self.slot_of[at] >= 0) & (slot >= 0)).any():
                raise ValueError(f"{where} has slices that belong to two channels")
            else:
                self.slot_of[at] = torch.maximum(self.slot_of[at], slot)
            if len(slot):
                here = slot[slot >= 0].long()
                each = torch.tensor(p.numel() // len(slot), dtype=torch.float64, device="cpu")
                self.sizes.index_put_((here,), each, accumulate=True)
        #: Of each tensor, whether some of its slices belong to no channel.
        self.leaves = [bool((slot < 0).any()) for slot in self.slot_of]
        self._whole: dict[torch.device, _Index] = {}
        self._of_parts: dict[Any, _Index] = {}

    def whole(self, device: torch.device) -> _Index:
        """Return the index of all tensors, on their device."""
        found = self._whole.get(device)
        if found is None:
            found = self._whole[device] = self._index(self.dims, self.slot_of, device)
        return found

    def parts(self, op: str, tensors: Sequence[Tensor]) -> list[_Part]:
        """Return tensors of any devices, layouts and placements as the kernels take them."""
        local, slot_of = [], []
        for name, t, dim, slot in zip(self.names, tensors, self.dims, self.slot_of, strict=True):
            own = checks.dense(checks.plain(_dtensor.local_part(t), op, name))
            slot = _local_slots(f"fusereg.{op}: {name}", t, dim, slot)
            slot_of.append(slot if own.numel() else torch.full_like(slot, -1))
            local.append(own)
        found = []
        for where, of_mesh in _dtensor.by_mesh(op, tensors, NO_PENALTY):
            for device, among in by_device([local[i] for i in of_mesh]).items():
                at = [of_mesh[n] for n in among]
                placed = tuple(getattr(tensors[i], "placements", None) for i in at)
                key = device, where, tuple(at), placed
                if key not in self._of_parts:
                    dims, slots = [self.dims[i] for i in at], [slot_of[i] for i in at]
                    self._of_parts[key] = self._index(dims, slots, device)
                found.append(_Part(where, at, [local[i] for i in at], self._of_parts[key]))
        return found

    def _index(self, dims: list[int], slot_of: list[Tensor], device: torch.device) -> _Index:
        slots = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *slot_of])
        order = torch.argsort(slots, stable=True)
        counts = torch.bincount(slots[slots >= 0].long(), minlength=self.slots)
        # Those of no slot come first in the order.
        starts = torch.zeros(self.slots + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=starts[1:])
        starts += int((slots < 0).sum())
        last = [t.to(device, torch.int32).contiguous() for t in (slots, starts, order)]
        return _Index(dims, *last)


class Plan(NamedTuple):
    """The writers of groups, and their readers if there are any."""

    writers: Family
    readers: Family | None

    def families(self) -> Iterator[Family]:
        """Yield the families, in the order in which steps take them."""
        yield self.writers
        if self.readers is not None:
            yield self.readers


_plans: WeakKeyDictionary[Groups, Plan] = WeakKeyDictionary()


def plan(op: str, groups: Groups) -> Plan:
    """Return what the groups come to, made once."""
    found = _plans.get(groups)
    if found is None:
        members: list[tuple[int, int, Member]] = []
        readers: list[tuple[int, int, Member]] = []
        first = 0
        for own in groups:
            members.extend((first, own.size, m) for m in own.members)
            readers.extend((first, own.size, m) for m in own.readers)
            first += own.size
        found = Plan(Family(op, members, first), Family(op, readers, first) if readers else None)
        _plans[groups] = found
    return found


def _checked(where: str, size: int, member: Member) -> Tensor:
    """Return the channels of a member on the CPU; raise if they do not go with its parameter."""
    p, dim, channels = member.parameter, member.dim, member.channels
    check_type(p, Tensor, where, "a tensor")
    if not -p.dim() <= dim < p.dim():
        raise ValueError(f"{where} has {p.dim()} dimensions, so none to cut along is {dim}")
    if channels.shape != (p.shape[dim],) or channels.is_floating_point():
        raise ValueError(
            f"{where}: channels must be {p.shape[dim]} integers, one for each slice along "
            f"dimension {dim}, got {channels.dtype} of shape {tuple(channels.shape)}"
        )
    channels = channels.detach().cpu()
    if (channels >= size).any():
        raise ValueError(f"{where}: channels must be below the size of their set, {size}")
    return channels


def _local_slots(where: str, t: Tensor, dim: int, slot_of: Tensor) -> Tensor:
    """Return the slots of the slices that this rank holds, or holds a part of."""
    if not distributed.is_dtensor(t):
        return slot_of
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor: Any = t
    for placement in tensor.placements:
        along = getattr(placement, "dim", None)
        if along is not None and along % t.dim() == dim and type(placement) is not Shard:
            raise ValueError(
                f"{where} is a DTensor with placement {placement} along its channels; "
                "redistribute it to Shard or Replicate first"
            )
    shape, offset = compute_local_shape_and_global_offset(
        t.shape, tensor.device_mesh, tensor.placements
    )
    return slot_of[offset[dim] : offset[dim] + shape[dim]]


# --- strengths ------------------------------------------------------------------------------------


def weights_of(op: str, groups: Groups, family: Family, weights: Weights) -> Tensor:
    """Return each channel's weight beside the strength, float64 [slots] on the CPU."""
    roots = family.sizes.sqrt()
    if isinstance(weights, str) and weights == "size":
        return roots
    if isinstance(weights, str):
        if weights != "operations":
            raise ValueError(
                f"fusereg.{op}: weights must be 'size', 'operations' or a sequence, got {weights!r}"
            )
        for own in groups:
            if own.operations is None:
                raise ValueError(
                    f"fusereg.{op}: weights='operations' needs the operations of each set, and "
                    f"{own.name} has none"
                )
        saved = [own.operations.double().cpu() for own in groups if own.operations is not None]
        operations = torch.cat([torch.zeros(0, dtype=torch.float64, device="cpu"), *saved])
        total = float(operations.sum())
        return operations * (float(roots.sum()) / total) if total else operations
    found = given_weights(op, groups, weights)
    return torch.cat([torch.zeros(0, dtype=torch.float64, device="cpu"), *found])


def given_weights(op: str, groups: Groups, weights: Sequence[Any] | Tensor) -> list[Tensor]:
    """Return the weights of each set's channels, float64 [size] on the CPU, that a user gave."""
    wanted = f"{len(groups)} entries, one for each set"
    try:
        count = -1 if isinstance(weights, Mapping) else len(weights)
    except TypeError:  # also of a tensor without dimensions
        count = -1
    if count < 0:
        raise TypeError(
            f"fusereg.{op}: weights must be 'size', 'operations' or a sequence of {wanted}, "
            f"got {type(weights).__name__}"
        )
    if count != len(groups):
        raise ValueError(f"fusereg.{op}: weights must have {wanted}, got {count}")
    return [_of_set(op, own, w) for own, w in zip(groups, weights, strict=True)]


def _of_set(op: str, own: CoupledChannels, weight: float | Sequence[float] | Tensor) -> Tensor:
    try:
        given = torch.as_tensor(weight, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"fusereg.{op}: the weight of {own.name} must be one number or {own.size} of them, "
            f"got {type(weight).__name__}"
        ) from error
    if given.numel() not in (1, own.size) or given.dim() > 1:
        raise ValueError(
            f"fusereg.{op}: the weight of {own.name} must be one number or {own.size} of them, "
            f"got shape {tuple(given.shape)}"
        )
    if not ((given >= 0) & (given < math.inf)).all():
        raise ValueError(f"fusereg.{op}: the weights of {own.name} must be finite and not negative")
    return given.expand(own.size)


@dispatch.outside_graphs
def strengths(
    op: str,
    groups: Groups,
    strength: Strength,
    name: str,
    *,
    dim: int = 0,
    l1: Strength = 0.0,
    weights: Weights = "size",
) -> tuple[float, list[tuple[Family, Tensor]]]:
    """Return l1, and each family with its channels' strengths, float64 on the CPU; checked."""
    if dim != 0:
        raise ValueError(f"fusereg.{op}: dim must be left out with groups, got {dim}")
    wanted = "one number with groups"
    of_elements = check_number(l1, f"fusereg.{op}: l1", wanted)
    of_groups = check_number(strength, f"fusereg.{op}: {name}", wanted)
    families = plan(op, groups).families()
    return of_elements, [(f, of_groups * weights_of(op, groups, f, weights)) for f in families]


def alone(name: str, l1: Strength) -> str | None:
    """Return what errors call the strengths of a call: its one strength, or each by its name."""
    return name if isinstance(l1, (int, float)) and l1 == 0 else None


def only_with_groups(op: str, weights: Weights) -> None:
    """Raise if there are weights, but no groups that they could be for."""
    if not isinstance(weights, str) or weights != "size":
        raise ValueError(f"fusereg.{op}: weights go with groups of channels only, got {weights!r}")


# --- the two passes -------------------------------------------------------------------------------


def _sums(
    op: str,
    part: _Part,
    slots: int,
    l1: float,
    thresholded: bool,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Return the sums of |v| and v^2 of each slot over one part, and the kernel's status.

    With thresholds, the proximal step is taken as well.
    """
    index = part.layout
    device = index.slot_of.device
    sums = torch.empty((2, slots), dtype=torch.float64, device=device)
    partial = torch.empty(2 * len(index.slot_of), dtype=torch.float64, device=device)
    last = thresholded, thresholds, op
    return sums, _C.coupled_sums(part.tensors, *index, partial, sums, l1, *last)


def _undivided(family: Family, tensors: list[Tensor]) -> _Part | None:
    """Return all tensors as one part, where one device holds them; None elsewhere."""
    device = tensors[0].device
    if device.type not in ("cpu", "cuda") or distributed.has_dtensor(tensors):
        return None
    return _Part(None, range(len(tensors)), tensors, family.whole(device))


def _in_parts(
    op: str, family: Family, tensors: list[Tensor], l1: float, thresholded: bool
) -> tuple[list[_Part], Tensor]:
    """Return the tensors as the kernels take them, and each slot's sums over all ranks."""
    whole = _undivided(family, tensors)
    if whole is not None:
        sums, status = _sums(op, whole, family.slots, l1, thresholded)
        if status == _kernels.DONE:
            return [whole], sums
    parts = family.parts(op, tensors)
    found = []
    for part in parts:
        sums, status = _sums(op, part, family.slots, l1, thresholded)
        _kernels.must(op, status)
        found.append(_dtensor.sum_over_ranks(sums, part.where))
    return parts, _kernels.sum_on_first(found)


@dispatch.outside_graphs
def prox_(
    op: str, family: Family, tensors: list[Tensor], thresholds: Tensor, l1: float = 0.0
) -> Tensor | None:
    """Apply the proximal step in place; return each slot's sum of squares before, after the l1.

    Args:
        op: the operation, for errors.
        family: the channels.
        tensors: in the place of the family's own, float32 masters for example.
        thresholds: of each slot, float64.
        l1: the threshold of each element.
    """
    if not tensors or not family.slots:
        return None
    with torch.no_grad():
        whole = _undivided(family, tensors)
        if whole is not None:
            limits = memory.to_device(thresholds, tensors[0].device, op, "weights")
            sums, status = _sums(op, whole, family.slots, l1, l1 != 0.0, limits)
            if status == _kernels.DONE:
                return sums[1]
        parts, sums = _in_parts(op, family, tensors, l1, l1 != 0.0)
        if parts[0].tensors is not tensors:  # the kernels decline these too, without their names
            local = [_dtensor.local_part(t) for t in tensors]
            for name, t in zip(family.names, local, strict=True):
                checks.check_writable(t, op, name)
            checks.check_apart(local, op, "params[{}]")
        for part in parts:
            device = part.layout.slot_of.device
            limits, squares = (
                memory.to_device(thresholds, device, op, "weights"),
                sums[1].to(device),
            )
            dims, slot_of = part.layout[:2]
            status = _C.coupled_prox_(part.tensors, dims, slot_of, l1, limits, squares, op)
            _kernels.must(op, status)
            for i, ready in zip(part.at, part.tensors, strict=True):
                target = _dtensor.local_part(tensors[i])
                if ready.data_ptr() != target.data_ptr() or target.is_neg():
                    _kernels.copy_into(target, ready)
    _dtensor.mark_written(tensors)
    return sums[1]


# --- value and gradient ---------------------------------------------------------------------------


@dispatch.outside_graphs
def value(op: str, family: Family, weights: Tensor, l1: float) -> Tensor:
    """Return sum_s weights[s] * ||w_s|| + l1 * sum |w|, differentiable."""
    tensors = family.tensors
    if not tensors or not family.slots:
        return torch.zeros(())
    for name, t in zip(family.names, tensors, strict=True):
        checks.check(t, op, name)
    if not dispatch.eager():
        return _formula(family, tensors, weights, l1)
    local = [_dtensor.local_part(t) for t in tensors]
    result: Tensor = _Value.apply(op, family, weights, l1, *local)  # type: ignore[no-untyped-call]
    return result


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, family: Family, weights: Tensor, l1: float, *local: Any) -> Any:
        sharded = distributed.has_dtensor(family.tensors)
        tensors = family.tensors if sharded else list(local)
        parts, sums = _in_parts(op, family, tensors, l1, False)
        weights = memory.to_device(weights, sums.device, op, "weights")
        norms = sums[1].sqrt()
        zero = norms == 0
        ctx.arguments = op, family, weights, l1, parts, sharded
        ctx.save_for_backward(torch.where(zero, 0.0, weights / norms), *local)
        total = torch.dot(weights, norms)
        if l1:
            total += l1 * sums[0].sum()
        return total.to(_kernels.value_dtype(local))

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        op, family, weights, l1, parts, sharded = ctx.arguments
        factors, *local = ctx.saved_tensors
        if torch.is_grad_enabled():
            if sharded:
                raise RuntimeError(f"fusereg.{op}: DTensors have no second derivatives of groups")
            # Tensors of their own: one may have been computed from another.
            apart = [t.view_as(t) for t in local]
            again = _formula(family, apart, weights, l1)
            wanted = [t for t in apart if t.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, scale, create_graph=True))
            return (None,) * 4 + tuple(next(found) if t.requires_grad else None for t in local)
        scale = scale.detach().double()
        grads: list[Tensor | None] = [None] * len(local)
        for part in parts:
            device = part.layout.slot_of.device
            own = scale.to(device)
            first = l1 * own if l1 else None
            # Kernels leave slices of no channel alone.
            targets = [
                torch.zeros_like(t) if family.leaves[i] else torch.empty_like(t)
                for i, t in zip(part.at, part.tensors, strict=True)
            ]
            dims, slot_of = part.layout[:2]
            scaled = factors.to(device) * own
            status = _C.coupled_backward(part.tensors, targets, dims, slot_of, first, scaled, op)
            _kernels.must(op, status)
            for i, g in zip(part.at, targets, strict=True):
                grads[i] = g
        return (None,) * 4 + tuple(grads)


def _formula(family: Family, tensors: Sequence[Tensor], weights: Tensor, l1: float) -> Tensor:
    """Return the value from torch's operations: for derivatives of any order, and in graphs."""
    dtype = _kernels.value_dtype(tensors)
    device = tensors[0].device
    squares = torch.zeros(family.slots + 1, dtype=torch.float64, device=device)
    absolute = torch.zeros((), dtype=torch.float64, device=device)
    for t, dim, slot_of in zip(tensors, family.dims, family.slot_of, strict=True):
        # Those of no slot go to one behind the last.
        slots = torch.where(slot_of < 0, family.slots, slot_of).long().to(t.device)
        rows = t.movedim(dim, 0).flatten(1) if t.dim() > 1 else t.unsqueeze(1)
        rows = rows.to(dtype)
        squares = squares.index_add(0, slots.to(device), rows.square().sum(1).double().to(device))
        if l1:
            there = (slots < family.slots).to(dtype)
            absolute = absolute + (rows.abs().sum(1) * there).sum().double().to(device)
    squares = squares[:-1]
    zero = squares == 0
    norms = torch.where(zero, torch.ones_like(squares), squares).sqrt()
    norms = torch.where(zero, torch.zeros_like(norms), norms)
    return (torch.dot(weights.to(device), norms) + l1 * absolute).to(dtype)
