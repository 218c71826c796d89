"""Calls of the optimizers' kernels on any tensors.

The kernels take plain dense tensors of one device, each parameter's in one memory order. A list of
such goes to them as it is. Only if the binding declines (it has written nothing then) are the
tensors prepared one by one: states are laid out anew for good, odd parameters and gradients are
copied, devices separated, and a tensor that cannot be used is named in an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory
from ..core import params as _params
from ..penalty.kernels import DONE, NEEDS_PREPARATION, copy_into, must
from ..penalty.strengths import dimension_of
from .algorithms import ADAGRAD, FTRL, LAMB, SGD
from .options import Number

#: What the binding returns, besides the statuses of the penalties' kernels.
NEEDS_STATE = 3
#: The pass before LAMB's step that leaves the norms which the step needs.
_LAMB_NORMS = 8
#: Elements for which it writes two numbers.
_CHUNK = 16384

State: TypeAlias = dict[str, Any]

LOW_PRECISION = (torch.float16, torch.bfloat16)
#: States that are the weights once more: their float32 master, and their average.
COPIES = ("master_param", "ema_param")


def update_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def given(strength: Number) -> bool:
    """Return whether there is such a term: a tensor's value is not asked for."""
    return isinstance(strength, Tensor) or strength != 0.0


class Hyper(NamedTuple):
    """Hyperparameters of a param group: numbers, then options, in the order of the kernels.

    ``first``, ``second``, ``third`` and ``eps`` are an algorithm's own numbers.
    """

    lr: Number
    first: Number = 0.0
    second: Number = 0.0
    eps: Number = 0.0
    weight_decay: Number = 0.0
    l1: Number = 0.0
    l2: Number = 0.0
    group: Number = 0.0
    ema_decay: Number = 0.0
    third: Number = 0.0
    prox: int = 0
    maximize: bool = False
    amsgrad: bool = False
    nesterov: bool = False
    decoupled_decay: bool = False
    momentum: bool = False
    master_weights: bool = False
    average: bool = False
    centered: bool = False
    #: The kernels know groups along dimension 0 only.
    group_dim: int = 0

    def in_python(self) -> Hyper:
        """Return the same with numbers of Python in place of NumPy's."""
        if all(isinstance(x, (int, float, Tensor)) for x in self):
            return self
        values: list[Any] = [
            float(x) if not isinstance(x, (int, Tensor)) and hasattr(x, "__float__") else x
            for x in self
        ]
        return Hyper(*values)

    def penalized(self) -> bool:
        """Return whether there is a penalty."""
        return given(self.l1) or given(self.l2) or given(self.group)

    def dim_of(self, p: Tensor, op: str, i: int) -> int:
        """Return the dimension that the kernel is to take for dimension 0; of a vector, 0."""
        if not self.group_dim or not given(self.group) or p.dim() < 2:
            return 0
        return dimension_of(p, self.group_dim, f"fusereg.{op}: group_dim", f"params[{i}]")


class Call(NamedTuple):
    """One step: the arguments of ``_C.optimizer_step`` in their order.

    ``counts`` parameters belong to each of ``hypers`` in turn; ``grads=None`` means each
    parameter's ``.grad``; ``fresh`` are the indices of parameters whose states are new.
    """

    algorithm: int
    params: list[Tensor]
    grads: Sequence[Tensor | None] | None
    states: list[State]
    counts: tuple[int, ...]
    hypers: tuple[Hyper, ...]
    fresh: tuple[int, ...]
    value: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    norm: Tensor | None
    max_norm: float
    workspace: Tensor | None
    tables: _C._LaunchTables
    op: str
    norms: Tensor | None = None

    def hyper_of(self) -> list[Hyper]:
        """Return each parameter's hyperparameters."""
        return [h for h, n in zip(self.hypers, self.counts, strict=True) for _ in range(n)]

    def present(self) -> list[tuple[int, Tensor]]:
        """Return the indices and gradients of the parameters that have one."""
        grads = [p.grad for p in self.params] if self.grads is None else self.grads
        return [(i, g) for i, g in enumerate(grads) if g is not None]

    def part(self, indices: Sequence[int], **changed: Any) -> Call:
        """Return the same step for some of the parameters, but for what is ``changed``."""
        groups = [g for g, count in enumerate(self.counts) for _ in range(count)]
        counts = [0] * len(self.counts)
        for i in indices:
            counts[groups[i]] += 1
        fresh = set(self.fresh)
        return self._replace(
            states=[self.states[i] for i in indices],
            counts=tuple(counts),
            fresh=tuple(n for n, i in enumerate(indices) if i in fresh),
            **changed,
        )


def run(call: Call, over_ranks: Callable[[Tensor], Tensor] | None = None) -> int:
    """Return the kernel's status: DONE, NEEDS_PREPARATION or NEEDS_STATE.

    ``over_ranks`` adds squares of norms over the shards of other ranks.
    """
    device = call.params[0].device
    if device.type not in ("cpu", "cuda"):
        return NEEDS_PREPARATION
    workspace = memory.workspace(device)
    if workspace is not None:
        call = call._replace(workspace=workspace)
    if call.algorithm == LAMB.number:
        size = sum(2 + 2 * -(-p.numel() // _CHUNK) for p in call.params)
        norms = torch.empty(size, dtype=torch.float64, device=device)
        call = call._replace(norms=norms)
        status = _C.optimizer_step(*call._replace(algorithm=_LAMB_NORMS, value=None))
        if status != DONE:
            return status
        if over_ranks is not None:
            own = norms[: 2 * len(call.params)]
            own.copy_(over_ranks(own))
    return _C.optimizer_step(*call)


def run_prepared(
    call: Call, keys: tuple[str, ...], over_ranks: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Run the step for tensors that the kernels do not take as they are."""
    hypers = call.hyper_of()
    present = call.present()
    plain: list[Tensor] = []
    for i, _ in present:
        p = call.params[i]
        plain.append(checks.plain(p, call.op, f"params[{i}]"))
        checks.check_writable(p, call.op, f"params[{i}]")
    checks.check_apart([call.params[i] for i, _ in present], call.op, "params[{}]")
    dims = [hypers[i].dim_of(p, call.op, i) for (i, _), p in zip(present, plain, strict=True)]
    plain = [p.movedim(dim, 0) if dim else p for p, dim in zip(plain, dims, strict=True)]
    ready: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[State] = []
    for (i, grad), p, dim in zip(present, plain, dims, strict=True):
        g = _plain_grad(call, i, p.movedim(0, dim) if dim else p, grad)
        g = g.movedim(dim, 0) if dim else g
        target = laid_out(p, given(hypers[i].group))
        ready.append(target)
        grads.append(g if g.stride() == target.stride() else _in_layout(target, g))
        state = call.states[i]
        _lay_out_state(call, state, target.movedim(0, dim) if dim else target, keys)
        moved = {k: state[k].movedim(dim, 0) for k in (*keys, *COPIES) if dim and k in state}
        states.append({**state, **moved} if moved else state)
    parts = []
    for device, own in _params.by_device(ready).items():
        value = None if call.value is None else torch.zeros_like(call.value, device=device)
        part = call.part(
            [present[n][0] for n in own],
            params=[ready[n] for n in own],
            grads=[grads[n] for n in own],
            hypers=tuple(
                Hyper(*(_on(device, x, call.op) for x in h))._replace(group_dim=0)
                for h in call.hypers
            ),
            value=value,
            grad_scale=_on(device, call.grad_scale, call.op),
            found_inf=_on(device, call.found_inf, call.op),
            norm=_on(device, call.norm, call.op),
        )._replace(states=[states[n] for n in own])
        must(call.op, run(part, over_ranks))
        if value is not None:
            parts.append(value)
    if call.value is not None:
        call.value.zero_()
        for value in parts:
            call.value.add_(value.to(call.value.device))
    for (i, _), p, r, dim in zip(present, plain, ready, dims, strict=True):
        target = call.params[i]
        if r is not p or target.is_neg():
            copy_into(target, r.movedim(0, dim) if dim else r)


def run_in_place(
    call: Call, keys: tuple[str, ...], over_ranks: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Run the step as run_prepared, but write states to the tensors that are there."""
    before = [dict(state) for state in call.states]
    run_prepared(call, keys, over_ranks)
    for old, new in zip(before, call.states, strict=True):
        for key, tensor in old.items():
            if new[key] is not tensor:
                tensor.copy_(new[key])


def laid_out(p: Tensor, rows: bool) -> Tensor:
    """Return the parameter itself if a kernel can walk it (in rows), else a copy that it can."""
    if not _C.inspect(p)[1]:
        return p.contiguous()
    in_order = p.dim() == 0 or p.numel() in (0, p.shape[0]) or p.shape[0] == 1
    in_order = in_order or p.stride(0) * p.shape[0] == p.numel()
    return p if in_order or not rows else p.contiguous()


def _on(device: torch.device, value: Any, op: str) -> Any:
    return memory.to_device(value, device, op) if isinstance(value, Tensor) else value


def _plain_grad(call: Call, i: int, p: Tensor, grad: Tensor) -> Tensor:
    name = f"params[{i}].grad"
    if grad.layout is torch.sparse_coo and grad.dtype in checks.SUPPORTED_DTYPES:
        if call.algorithm not in (SGD.number, ADAGRAD.number, FTRL.number):
            raise RuntimeError(
                f"fusereg.{call.op}: {name} is sparse, and states decay where a gradient is "
                "zero; use torch.optim.SparseAdam, or SGD, Adagrad or FTRL here"
            )
        # Rows without a gradient get a zero one: the updates are torch's sparse ones, and the
        # penalty concerns all rows.
        grad = grad.to_dense()
    g = checks.plain(grad, call.op, name)
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(
            f"fusereg.{call.op}: {name} must have shape {tuple(p.shape)} on {p.device}, "
            f"got {tuple(g.shape)} on {g.device}"
        )
    return g


def _in_layout(target: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(target, dtype=source.dtype).copy_(source)


def _lay_out_state(call: Call, state: State, target: Tensor, keys: tuple[str, ...]) -> None:
    """Put states into the parameter's memory order, and onto its device, for good."""
    for key in (*keys, *COPIES):
        s = state.get(key)
        if not isinstance(s, Tensor):
            continue
        s = s.detach()
        if s.shape != target.shape:
            raise ValueError(
                f"fusereg.{call.op}: the state {key} must have its parameter's shape "
                f"{tuple(target.shape)}, got {tuple(s.shape)}"
            )
        if s.device != target.device or s.stride() != target.stride() or s.is_neg():
            state[key] = _in_layout(target, s)
    # One dtype for all states of a parameter.
    own = [state[k] for k in keys if isinstance(state.get(k), Tensor)]
    if len({s.dtype for s in own}) > 1:
        for key in keys:
            if isinstance(state.get(key), Tensor):
                state[key] = state[key].to(torch.float32)
    wide = update_dtype(target)
    step, last, average = state.get("step"), state.get("last"), state.get("ema_param")
    if isinstance(step, Tensor):
        counts = step.dtype if step.dtype is torch.float64 else torch.float32
        for key in ("step", "mu_product"):
            if isinstance(state.get(key), Tensor):
                moved = memory.to_device(state[key], target.device, call.op)
                state[key] = moved.to(target.device, counts)
    if isinstance(last, Tensor):
        state["last"] = last.to(target.device, wide).contiguous()
    if isinstance(average, Tensor):
        state["ema_param"] = state["ema_param"].to(wide)
