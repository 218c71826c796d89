"""The step in code that ``torch.compile`` compiles: the operator ``fusereg::optimizer_step_``.

It is for graphs that must not break. Where they may, they are cut at the step, which then runs as
it does without a compiler: that is quicker, for a graph checks every tensor and every number of the
optimizer before it runs, and is compiled again when a number has changed.

The operator takes what the kernels take as it is: plain dense tensors of one device whose states
are there. ``collect`` says whether that is so; if not, the graph breaks after all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from ..core import dispatch, memory
from . import clip
from . import kernels as _kernels
from .kernels import Call, Hyper, State

if TYPE_CHECKING:
    from .optimizer import RegularizedOptimizer

#: Of each algorithm of the kernels.
_NAMES = ("SGD", "Adam", "Adagrad", "FTRL")
_KEYS = (
    ("momentum_buffer",),
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ("sum",),
    ("linear", "sum"),
)
_NUMBERS = 8  # of a Hyper, before its options
_OPTIONS = 7

_LOW = (torch.float16, torch.bfloat16)
#: All compiled steps share them: of several models with more than some 330 parameters each, every
#: step writes its own anew.
_tables = memory.launch_tables()


def collect(
    optimizer: RegularizedOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
) -> bool:
    """Fills the lists from the group; False if the operator cannot take it, or not yet."""
    everything = [p for g in optimizer.param_groups for p in g["params"]]
    if not everything:
        return True
    device = everything[0].device
    keys = optimizer._wanted_keys(group)
    rows = isinstance(group["group"], Tensor) or group["group"] != 0.0
    own = [p for p in group["params"] if p.grad is not None]
    for p in own:
        if p.device != device or not _taken(p) or _kernels._target(p, rows) is not p:
            return False
        state = optimizer.state.get(p, {})
        # The first gradient enters a momentum buffer in another way than those that follow.
        if optimizer._algorithm == 0 and any(state.get(k) is None for k in keys):
            return False
    with torch.no_grad():
        for p in own:
            optimizer._add_missing(p, keys, group)
    for p in own:
        state = optimizer.state[p]
        values = [state[k] for k in keys]
        master = state.get("master_param")
        if (master is not None) != (group["master_weights"] and p.dtype in _LOW):
            return False
        beside = [p.grad, *values] + ([] if master is None else [master])
        if any(not _taken(t) or t.device != device or t.stride() != p.stride() for t in beside):
            return False
        if len({t.dtype for t in values}) > 1 or any(t.shape != p.shape for t in beside):
            return False
        params.append(p)
        grads.append(p.grad)
        states.extend(values)
        if optimizer._has_step:
            if state["step"].device != device or state["step"].dtype is not torch.float32:
                return False
            steps.append(state["step"])
        masters.extend([] if master is None else [master])
    wide = any(torch.float64 in (p.dtype, p.grad is not None and p.grad.dtype) for p in everything)
    dtype = torch.float64 if wide else torch.float32
    _make_room(optimizer, "penalty_value", device, dtype)
    if optimizer.max_grad_norm is not None:
        _make_room(optimizer, "_norm", device, dtype)
    return True


def _taken(t: object) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and _C.inspect(t) == (0, True)


def _make_room(
    optimizer: RegularizedOptimizer, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    there: Tensor | None = getattr(optimizer, name)
    if there is None or there.device != device or there.dtype is not dtype:
        setattr(optimizer, name, torch.zeros((), dtype=dtype, device=device))


def step(optimizer: RegularizedOptimizer) -> bool:
    """The step as one operator, seen by dynamo; False if it must run outside the graph.

    What dynamo lets an optimizer's method assign to attributes is lost: the value and the norm are
    written to the tensors that are there.
    """
    for name in ("grad_scale", "found_inf", "_norm_scale"):
        if getattr(optimizer, name, None) is not None:
            return False
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    steps: list[Tensor] = []
    masters: list[Tensor] = []
    counts: list[int] = []
    numbers: list[float] = []
    live: list[Tensor] = []
    live_at: list[int] = []
    options: list[int] = []
    penalized = False
    for group in optimizer.param_groups:
        p: list[Tensor] = []
        g: list[Tensor] = []
        s: list[Tensor] = []
        t: list[Tensor] = []
        m: list[Tensor] = []
        if not optimizer._init_group(group, p, g, s, t, m):
            return False
        params.extend(p)
        grads.extend(g)
        states.extend(s)
        steps.extend(t)
        masters.extend(m)
        counts.append(len(p))
        hyper = optimizer._hyper(group)
        for x in hyper[:_NUMBERS]:
            if isinstance(x, Tensor):
                live.append(x)
                live_at.append(len(numbers))
                numbers.append(0.0)
            else:
                numbers.append(float(x))
        options.extend([int(x) for x in hyper[_NUMBERS:]])
        for x in hyper[5:8]:
            penalized = penalized or isinstance(x, Tensor) or x != 0.0
    value = optimizer.penalty_value if penalized else None
    norm = optimizer._norm if optimizer.max_grad_norm is not None else None
    with torch.no_grad():
        if not params:
            for result in (value, norm):
                if result is not None:
                    result.zero_()
            return True
        torch.ops.fusereg.optimizer_step_(
            optimizer._algorithm,
            params,
            grads,
            states,
            steps,
            masters,
            counts,
            numbers,
            live,
            live_at,
            options,
            value,
            norm,
            optimizer.max_grad_norm or 0.0,
        )
    return True


dispatch.library.define(
    "optimizer_step_(int algorithm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] steps, Tensor(d!)[] masters, int[] counts, float[] numbers, Tensor[] live, "
    "int[] live_at, int[] options, Tensor(e!)? value, Tensor(f!)? norm, float max_norm) -> ()"
)


def _op_step_(
    algorithm: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    counts: list[int],
    numbers: list[float],
    live: list[Tensor],
    live_at: list[int],
    options: list[int],
    value: Tensor | None,
    norm: Tensor | None,
    max_norm: float,
) -> None:
    """As ``step`` lays it out: states of one parameter lie together, numbers of one group too."""
    op = f"optim.{_NAMES[algorithm]}"
    values: list[Any] = list(numbers)
    for at, x in zip(live_at, live, strict=True):
        values[at] = x
    hypers: list[Hyper] = []
    dicts: list[State] = []
    left, left_steps, left_masters = iter(states), iter(steps), iter(masters)
    for i, count in enumerate(counts):
        chosen = options[i * _OPTIONS : (i + 1) * _OPTIONS]
        flags = [chosen[0], *(bool(x) for x in chosen[1:])]
        hypers.append((*values[i * _NUMBERS : (i + 1) * _NUMBERS], *flags))
        keys = _wanted(algorithm, hypers[-1])
        for p in params[len(dicts) : len(dicts) + count]:
            state: State = {key: next(left) for key in keys}
            if steps:
                state["step"] = next(left_steps)
            if flags[-1] and p.dtype in _LOW:
                state["master_param"] = next(left_masters)
            dicts.append(state)
    device = params[0].device
    if norm is not None:
        work = memory.workspace(device)
        if _C.grad_norm(grads, False, norm, 1, -1.0, work, clip._tables, op) != _kernels.DONE:
            norm.copy_(clip.total_norm(op, grads, 2.0))
    call = Call(
        op,
        algorithm,
        params,
        dicts,
        tuple(counts),
        tuple(hypers),
        (),
        value,
        None,
        None,
        norm,
        max_norm,
        _tables,
    )
    if _kernels.run(call, grads) == _kernels.DONE:
        return
    before = [dict(state) for state in dicts]
    _kernels.run_prepared(call, _KEYS[algorithm], list(grads))
    for old, new in zip(before, dicts, strict=True):
        for key, tensor in old.items():
            if new[key] is not tensor:
                tensor.copy_(new[key])


def _wanted(algorithm: int, hyper: Hyper) -> tuple[str, ...]:
    amsgrad, momentum = hyper[10], hyper[13]
    count = (int(momentum), 2 + int(amsgrad), 1, 2)[algorithm]
    return _KEYS[algorithm][:count]


for _key in ("CPU", "CUDA"):
    dispatch.library.impl("optimizer_step_", _op_step_, _key)

torch.library.register_fake("fusereg::optimizer_step_", lambda *args: None, lib=dispatch.library)
