"""The proximal step of channels that span tensors, after the update of the elements."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.groups import Groups
from ..penalty import coupled as _coupled
from .kernels import Hyper, State
from .options import Number

#: Of a param group, what its threshold is made of.
_Terms = tuple[Number, Number, Number, Number, Number]


class GroupStep:
    """Groups over the parameters of an optimizer, as long as these stay the same.

    Args:
        op: the operation, for errors.
        groups: over parameters of the optimizer alone.
        weights: of each channel, beside the strength.
        parts: the parameters of each param group.
    """

    def __init__(
        self, op: str, groups: Groups, weights: _coupled.Weights, parts: Sequence[Sequence[Tensor]]
    ) -> None:
        self.op = op
        self._made_of = groups, weights, [list(part) for part in parts]
        group_of = {id(p): k for k, part in enumerate(parts) for p in part}
        self.families: list[_Family] = []
        for family in _coupled.plan(op, groups).families():
            for name, p in zip(family.names, family.tensors, strict=True):
                if id(p) not in group_of:
                    raise ValueError(
                        f"fusereg.{op}: groups hold {name}, which is not among the parameters "
                        "(a model that was sharded or loaded with assign=True has new ones: "
                        "groups.of(model) finds them by their names; after freezing some, call "
                        "groups_of again, which leaves them out; with add_param_group set "
                        "optimizer.groups after it)"
                    )
            own = [group_of[id(p)] for p in family.tensors]
            own_weights = _coupled.weights_of(op, groups, family, weights)
            self.families.append(_Family(family, own, own_weights, len(parts)))

    def fits(
        self, groups: Groups, weights: _coupled.Weights, parts: Sequence[Sequence[Tensor]]
    ) -> bool:
        """Return whether this was made of these arguments."""
        own_groups, own_weights, own_parts = self._made_of
        return own_groups is groups and own_weights is weights and same_tensors(own_parts, parts)

    def check(self, param_groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper]) -> None:
        """Raise where the steps of param groups that share channels would differ."""
        for a, b in {pair for f in self.families for pair in f.mixed}:
            own, other = (_terms(param_groups[k], hypers[k]) for k in (a, b))
            if not all(x is y or _equal(x, y) for x, y in zip(own, other, strict=True)):
                raise ValueError(
                    f"fusereg.{self.op}: param groups {a} and {b} hold slices of the same "
                    "channels, so their lr, group, l2, prox and momentum must be the same; give "
                    "group to the optimizer, not to some of its param groups"
                )

    def run(
        self,
        param_groups: Sequence[dict[str, Any]],
        hypers: Sequence[Hyper],
        states: dict[Tensor, State],
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Take the step; return the penalty of the weights that it begins with."""
        terms = [_terms(g, h) for g, h in zip(param_groups, hypers, strict=True)]
        total: Tensor | None = None
        for f in self.families:
            params = f.family.tensors
            masters = [states.get(p, {}).get("master_param") for p in params]
            tensors = [
                p if m is None or not hypers[k].master_weights else m
                for p, m, k in zip(params, masters, f.group_of, strict=True)
            ]
            device = params[0].device
            strengths = f.weights([t[1] for t in terms], device)
            limits = f.weights([_threshold(*t) for t in terms], device)
            if not all(p.grad is not None for p in params):
                # Channels that have members without a gradient stay as they are, as these do.
                limits = limits * f.with_gradients().to(device)
            if found_inf is not None:
                limits = limits * (found_inf.to(device) == 0)
            squares = _coupled.prox_(self.op, f.family, tensors, limits)
            with torch.no_grad():
                for p, t in zip(params, tensors, strict=True):
                    if t is not p:
                        p.copy_(t)
                if squares is not None:
                    value = torch.dot(strengths, squares.to(device).sqrt())
                    total = value if total is None else total + value.to(total.device)
        return total


def same_tensors(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether two lists of lists hold the same tensors."""
    return len(a) == len(b) and all(
        len(x) == len(y) and all(map(operator.is_, x, y)) for x, y in zip(a, b, strict=True)
    )


class _Family:
    """Disjoint channels, and the param groups that they lie in."""

    def __init__(
        self, family: _coupled.Family, group_of: list[int], weights: Tensor, count: int
    ) -> None:
        self.family = family
        self.group_of = group_of
        self._weights = [torch.zeros_like(weights) for _ in range(count)]
        seen: list[set[int]] = [set() for _ in range(family.slots)]
        for k, slot_of in zip(group_of, family.slot_of, strict=True):
            for slot in set(slot_of[slot_of >= 0].tolist()):
                seen[slot].add(k)
        #: Pairs of param groups that share channels.
        self.mixed = {pair for s in seen for pair in itertools.combinations(sorted(s), 2)}
        for slot, own in enumerate(seen):
            if own:
                self._weights[min(own)][slot] = weights[slot]
        self._used = [k for k in range(count) if k in set(group_of)]

    def weights(self, factors: Sequence[Number], device: torch.device) -> Tensor:
        """Return each channel's weight times the factor of its param group, on a device."""
        total: Tensor | None = None
        for k in self._used:
            if self._weights[k].device != device:
                self._weights[k] = self._weights[k].to(device)
            factor = factors[k]
            if isinstance(factor, Tensor):
                factor = factor.detach().reshape(()).to(device, torch.float64)
            term = self._weights[k] * factor
            total = term if total is None else total + term
        return (
            torch.zeros(self.family.slots, dtype=torch.float64, device="cpu")
            if total is None
            else total
        )

    def with_gradients(self) -> Tensor:
        """Return for each channel whether all its members have a gradient."""
        found = torch.ones(self.family.slots, dtype=torch.float64, device="cpu")
        for p, slot_of in zip(self.family.tensors, self.family.slot_of, strict=True):
            if p.grad is None:
                found[slot_of[slot_of >= 0].long()] = 0.0
        return found


def _terms(group: dict[str, Any], hyper: Hyper) -> _Terms:
    """Return lr, the strength, l2 of the proximal step, and what momentum amplifies it by."""
    momentum = group.get("momentum", 0.0)
    amplified = hyper.momentum and group["prox"] != "decoupled" and "dampening" in group
    gain = (1.0 - group["dampening"]) / (1.0 - momentum) if amplified else 1.0
    return hyper.lr, group["group"], hyper.l2, gain, hyper.prox


def _threshold(lr: Number, strength: Number, l2: Number, gain: Number, _: Number) -> Number:
    """Return the threshold of the step that follows soft-thresholding and division by 1 + lr l2."""
    rate = lr * gain
    return rate * strength / (1.0 + rate * l2)


def _equal(a: Number, b: Number) -> bool:
    # The value of an accelerator's tensor is not asked for: that would wait for it.
    known = all(not isinstance(x, Tensor) or x.device.type == "cpu" for x in (a, b))
    return known and float(a) == float(b)
