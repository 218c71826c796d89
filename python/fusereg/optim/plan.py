"""An optimizer's parameters and states as flat lists, and what tells that they have changed."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import Tensor

from ..core import distributed
from ..penalty.kernels import value_dtype
from .kernels import Hyper, State

NO_STATE: State = {}
#: Values of a param group that do not change while they are the same object. A tensor is read anew
#: in each step.
_FIXED = (int, float, str, tuple, type(None), Tensor)
#: What :meth:`RegularizedOptimizer._check_group` looks at, strengths first.
CHECKED = ("l1", "l2", "group", "group_dim", "prox", "momentum", "ema_decay")


def _counted(name: str) -> Any:
    """Return a method of ``defaultdict`` that also counts a change."""
    method = getattr(defaultdict, name)

    def counted(self: WatchedStates, *args: Any, **kwargs: Any) -> Any:
        self.version += 1
        return method(self, *args, **kwargs)

    return counted


class WatchedStates(defaultdict[Any, Any]):
    """torch's ``defaultdict(dict)`` of states with a version that counts changes of entries."""

    version = 0
    __setitem__, __delitem__, __ior__ = map(_counted, ("__setitem__", "__delitem__", "__ior__"))
    clear, pop, popitem = map(_counted, ("clear", "pop", "popitem"))
    setdefault, update = map(_counted, ("setdefault", "update"))


class Plan:
    """Parameters and states as flat lists, kept from step to step while they are unchanged."""

    def __init__(self, groups: list[dict[str, Any]], states: WatchedStates) -> None:
        self.parts: list[list[Tensor]] = [list(g["params"]) for g in groups]
        self.params: list[Tensor] = [p for part in self.parts for p in part]
        self.counts = tuple(len(part) for part in self.parts)
        self.watched = states
        self.states: list[State] = [states.get(p, NO_STATE) for p in self.params]
        self.version = states.version
        self.distributed = distributed.has_dtensor(self.params)
        self.value_dtype = value_dtype(self.params)
        #: Of each group the arguments that were checked last.
        self.checked: list[list[Any]] = [[self] * len(CHECKED) for _ in groups]
        #: Of each group what its hyperparameters were read from; empty where they may change in it.
        self.read: list[list[Any]] = [[] for _ in groups]
        self._hypers: list[Hyper] = [Hyper(0.0) for _ in groups]
        self._all: tuple[Hyper, ...] | None = None

    def set_hyper(self, i: int, hyper: Hyper, group: dict[str, Any], read: list[Any]) -> None:
        """Keep a group's hyperparameters for as long as it has the same objects."""
        values = (v for key, v in group.items() if key not in ("params", "param_names"))
        fixed = all(isinstance(v, _FIXED) for v in values)
        self._hypers[i], self._all, self.read[i] = hyper, None, read if fixed else []

    def all_hypers(self) -> tuple[Hyper, ...]:
        """Return the hyperparameters of all groups."""
        if self._all is None:
            self._all = tuple(self._hypers)
            self.penalized = any(h.penalized() for h in self._all)
            self.averaged = any(h.average for h in self._all)
        return self._all

    def holds(self, groups: list[dict[str, Any]], states: Any) -> bool:
        """Return whether parameters and states are still those of the optimizer."""
        if self.watched is not states or self.version != states.version:
            return False
        if len(groups) != len(self.parts):
            return False
        for part, group in zip(self.parts, groups, strict=True):
            params = group["params"]
            if len(part) != len(params) or not all(map(operator.is_, part, params)):
                return False
        return True
