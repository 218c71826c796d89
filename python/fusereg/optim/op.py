"""The step as one operator, ``fusereg::optimizer_step_``, for graphs that must not break.

Where a graph may break it is cut at the step, which then runs as it does without a compiler: that
is quicker, for a graph checks every tensor and every number of the optimizer before it runs, and is
compiled again when a number has changed.

The operator takes what the kernels take as it is: plain dense tensors of one device whose states
exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..core import memory
from ..core.operator import Operator
from ..penalty.kernels import DONE
from . import norms
from .algorithms import ALGORITHMS
from .kernels import LOW_PRECISION, Call, Hyper, State, run, run_in_place

_NUMBERS = Hyper._fields.index("prox")  # of a Hyper, before its options
_OPTIONS = len(Hyper._fields) - _NUMBERS

#: All compiled steps share them: of several models with more than some 300 parameters each, every
#: step writes its own anew.
_tables = memory.launch_tables()


class Lists(NamedTuple):
    """Tensors of a step; the states of one parameter lie together."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    averages: list[Tensor]


class _Arguments(NamedTuple):
    """The operator's arguments: a :class:`Lists`, and the numbers of one param group together."""

    algorithm: int
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    averages: list[Tensor]
    counts: list[int]
    numbers: list[float]
    live: list[Tensor]
    live_at: list[int]
    options: list[int]
    value: Tensor | None
    norm: Tensor | None
    max_norm: float


def step(
    algorithm: int,
    lists: Lists,
    counts: list[int],
    hypers: Sequence[Hyper],
    results: tuple[Tensor | None, Tensor | None],
    max_norm: float,
) -> None:
    """Run the step in a graph; ``results`` are where the penalty and the norm are written."""
    everything = [x for hyper in hypers for x in hyper[:_NUMBERS]]
    live_at = [i for i, x in enumerate(everything) if isinstance(x, Tensor)]
    live = [everything[i] for i in live_at]
    numbers = [0.0 if isinstance(x, Tensor) else float(x) for x in everything]
    options = [int(x) for hyper in hypers for x in hyper[_NUMBERS:]]
    packed = (numbers, live, live_at, options)
    _step.overload(algorithm, *lists, counts, *packed, *results, max_norm)


def takes(t: object) -> bool:
    """Return whether the operator takes a tensor as it is."""
    return type(t) in (Tensor, torch.nn.Parameter) and _C.inspect(t) == (0, True)


def result_on(device: torch.device, dtype: torch.dtype, result: Tensor | None) -> Tensor:
    """Return the tensor that a graph writes a result to: the one that is there, if it fits."""
    if result is None or result.device != device or result.dtype is not dtype:
        return torch.zeros((), dtype=dtype, device=device)
    return result


def _run(*args: Any) -> None:
    a = _Arguments(*args)
    algorithm = ALGORITHMS[a.algorithm]
    op = f"optim.{algorithm.name}"
    hypers = _hypers(a)
    states = _states(a, hypers)
    norm = None
    if a.norm is not None:
        norm = a.norm.copy_(norms.total_norm(op, a.grads, 2.0))
    call = Call(
        algorithm=a.algorithm,
        params=a.params,
        grads=a.grads,
        states=states,
        counts=tuple(a.counts),
        hypers=hypers,
        fresh=(),
        value=a.value,
        grad_scale=None,
        found_inf=None,
        norm=norm,
        max_norm=a.max_norm,
        workspace=None,
        tables=_tables,
        op=op,
    )
    if run(call) != DONE:
        run_in_place(call, algorithm.keys)


def _hypers(a: _Arguments) -> tuple[Hyper, ...]:
    values: list[Any] = list(a.numbers)
    for at, x in zip(a.live_at, a.live, strict=True):
        values[at] = x
    found = []
    for i in range(len(a.counts)):
        prox, *flags, dim = a.options[i * _OPTIONS : (i + 1) * _OPTIONS]
        own = values[i * _NUMBERS : (i + 1) * _NUMBERS]
        found.append(Hyper._make((*own, prox, *map(bool, flags), dim)))
    return tuple(found)


def _states(a: _Arguments, hypers: Sequence[Hyper]) -> list[State]:
    algorithm = ALGORITHMS[a.algorithm]
    states, steps, masters, averages = map(iter, (a.states, a.steps, a.masters, a.averages))
    each = (hyper for hyper, count in zip(hypers, a.counts, strict=True) for _ in range(count))
    found: list[State] = []
    for p, hyper in zip(a.params, each, strict=True):
        state: State = {key: next(states) for key in algorithm.keys_of(hyper)}
        state.update({key: next(steps) for key in algorithm.steps})
        if hyper.master_weights and p.dtype in LOW_PRECISION:
            state["master_param"] = next(masters)
        if hyper.average:
            state["ema_param"] = next(averages)
        found.append(state)
    return found


_step = Operator(
    "optimizer_step_(int algorithm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] steps, Tensor(d!)[] masters, Tensor(e!)[] averages, int[] counts, "
    "float[] numbers, Tensor[] live, int[] live_at, int[] options, Tensor(f!)? value, "
    "Tensor(g!)? norm, float max_norm) -> ()",
    _run,
    fake=lambda *_: None,
)
