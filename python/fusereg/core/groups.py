"""Channels of a model that can only be removed together, as plain data.

:func:`fusereg.groups_of` finds them; penalties and optimizers take them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

from torch import Tensor, nn


class Member(NamedTuple):
    """The slices of one parameter, along one dimension, that belong to channels of a set."""

    name: str
    """The parameter's name in the model."""
    parameter: Tensor
    """The parameter itself."""
    dim: int
    """The dimension along which it is cut."""
    channels: Tensor
    """int64 [parameter.shape[dim]]: the channel that each slice belongs to, -1 for none."""


class CoupledChannels(NamedTuple):
    """A set of channels, each of which is written and read by several parameters."""

    name: str
    """The name of the first layer that writes the set."""
    size: int
    """The number of channels."""
    members: tuple[Member, ...]
    """The writers of the channels: if the slices of a channel are zero, the channel is zero."""
    readers: tuple[Member, ...]
    """The readers of the channels; empty unless they were asked for."""
    operations: Tensor | None
    """float64 [size]: multiply-adds of one example that removing each channel saves."""


class Groups(Sequence[CoupledChannels]):
    """The sets of coupled channels of a model. No two of them share a slice of a writer."""

    def __init__(
        self, sets: Iterable[CoupledChannels] = (), kept: Mapping[str, str] | None = None
    ) -> None:
        self._sets = tuple(sets)
        #: What cannot be removed, by the name of the layer, with the reason.
        self.kept: dict[str, str] = dict(kept or {})

    @overload
    def __getitem__(self, index: int) -> CoupledChannels: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[CoupledChannels, ...]: ...

    def __getitem__(self, index: int | slice) -> CoupledChannels | tuple[CoupledChannels, ...]:
        """Return one set, or a tuple of sets for a slice."""
        return self._sets[index]

    def __len__(self) -> int:
        """Return the number of sets."""
        return len(self._sets)

    def of(self, model: nn.Module) -> Groups:
        """Return the same groups over a model's parameters of the same names.

        For a model whose parameters are new: sharded by ``fully_shard``, loaded with
        ``assign=True``, or a copy.

        Raises:
            ValueError: the model lacks a name, or its parameter has another shape.
        """
        named = dict(model.named_parameters(remove_duplicate=False))

        def moved(member: Member) -> Member:
            p = named.get(member.name)
            if p is None or p.shape != member.parameter.shape:
                raise ValueError(
                    f"fusereg.Groups.of: the model must have a parameter {member.name} of shape "
                    f"{tuple(member.parameter.shape)}, got "
                    + ("none of this name" if p is None else f"shape {tuple(p.shape)}")
                )
            return member._replace(parameter=p)

        return Groups(
            (
                s._replace(
                    members=tuple(map(moved, s.members)), readers=tuple(map(moved, s.readers))
                )
                for s in self
            ),
            self.kept,
        )

    def __repr__(self) -> str:
        channels = sum(s.size for s in self)
        return f"Groups({len(self)} sets, {channels} channels, {len(self.kept)} layers kept)"
