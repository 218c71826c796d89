"""Calls of the optimizers' kernels, on whatever tensors there are.

The kernels take plain dense tensors of one device, each parameter's in one memory order. A list of
such goes to them as it is. Only if the binding declines (it has written nothing then) are the
tensors looked at one by one: states are laid out anew for good, odd parameters and gradients are
copied, devices separated, and what cannot be is named in an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, memory
from ..core import params as _params

DONE, NEEDS_PREPARATION, NEEDS_STATE = 0, 2, 3

State: TypeAlias = dict[str, Any]
Hyper: TypeAlias = tuple[Any, ...]


class Call(NamedTuple):
    """The arguments of one step; ``counts`` parameters belong to each of ``hypers`` in turn."""

    op: str
    algorithm: int
    params: list[Tensor]
    states: list[State]
    counts: tuple[int, ...]
    hypers: tuple[Hyper, ...]
    fresh: tuple[int, ...]
    value: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    norm: Tensor | None
    max_norm: float
    tables: _C._LaunchTables

    def group_of(self) -> list[int]:
        return [g for g, count in enumerate(self.counts) for _ in range(count)]

    def part(self, indices: Sequence[int], device: torch.device, value: Tensor | None) -> Call:
        """The same step for some of the parameters, with its scalars on their device."""
        groups = self.group_of()
        counts = [0] * len(self.counts)
        for i in indices:
            counts[groups[i]] += 1
        fresh = set(self.fresh)
        return self._replace(
            params=[self.params[i] for i in indices],
            states=[self.states[i] for i in indices],
            counts=tuple(counts),
            hypers=tuple(tuple(_on(device, x) for x in h) for h in self.hypers),
            fresh=tuple(n for n, i in enumerate(indices) if i in fresh),
            value=value,
            grad_scale=_on(device, self.grad_scale),
            found_inf=_on(device, self.found_inf),
            norm=_on(device, self.norm),
        )


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def run(call: Call, grads: Sequence[Tensor | None] | None = None) -> int:
    """The kernel's status: DONE, NEEDS_PREPARATION or NEEDS_STATE."""
    device = call.params[0].device
    if device.type not in ("cpu", "cuda"):
        return NEEDS_PREPARATION
    return _C.optimizer_step(
        call.algorithm,
        call.params,
        grads,
        call.states,
        call.counts,
        call.hypers,
        call.fresh,
        call.value,
        call.grad_scale,
        call.found_inf,
        call.norm,
        call.max_norm,
        memory.workspace(device),
        call.tables,
        call.op,
    )


def run_prepared(
    call: Call, keys: tuple[str, ...], grads: list[Tensor | None] | None = None
) -> None:
    """The step for tensors that the kernels do not take as they are."""
    if grads is None:
        grads = [p.grad for p in call.params]
    indices = [i for i, g in enumerate(grads) if g is not None]
    plain: list[Tensor] = []
    for i in indices:
        p = call.params[i]
        plain.append(checks.plain(p, call.op, f"params[{i}]"))
        checks.check_writable(p, call.op, f"params[{i}]")
    checks.check_apart([call.params[i] for i in indices], call.op, "params[{}]")
    groups = call.group_of()
    ready: list[Tensor] = []
    ready_grads: list[Tensor] = []
    for i, p in zip(indices, plain, strict=True):
        grad = grads[i]
        assert grad is not None
        g = _plain_grad(call, i, p, grad)
        rows = call.hypers[groups[i]][7]
        target = _target(p, isinstance(rows, Tensor) or rows != 0.0)
        ready.append(target)
        ready_grads.append(g if g.stride() == target.stride() else _in_layout(target, g))
        _lay_out_state(call, call.states[i], target, keys)
    parts = []
    for device, own in _params.by_device(ready).items():
        value = None if call.value is None else torch.zeros_like(call.value, device=device)
        part = call.part([indices[n] for n in own], device, value)
        part = part._replace(params=[ready[n] for n in own])
        if run(part, [ready_grads[n] for n in own]) != DONE:
            raise RuntimeError(
                f"fusereg.{call.op}: the kernel refused prepared tensors; please report this"
            )
        if value is not None:
            parts.append(value)
    if call.value is not None:
        call.value.zero_()
        for value in parts:
            call.value.add_(value.to(call.value.device))
    for i, p, r in zip(indices, plain, ready, strict=True):
        target = call.params[i]
        if r is not p or target.is_neg():
            with torch.inference_mode() if target.is_inference() else torch.no_grad():
                target.copy_(r)


def _plain_grad(call: Call, i: int, p: Tensor, grad: Tensor) -> Tensor:
    name = f"params[{i}].grad"
    if grad.layout is torch.sparse_coo and grad.dtype in checks.SUPPORTED_DTYPES:
        if call.algorithm == 1:
            raise RuntimeError(
                f"fusereg.{call.op}: {name} is sparse, and Adam's states decay where a gradient is "
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


def _target(p: Tensor, rows: bool) -> Tensor:
    """The parameter itself if the kernel can walk it, else a copy that it can."""
    if not _C.inspect(p)[1]:
        return p.contiguous()
    in_order = p.dim() == 0 or p.numel() in (0, p.shape[0]) or p.shape[0] == 1
    in_order = in_order or p.stride(0) * p.shape[0] == p.numel()
    return p if in_order or not rows else p.contiguous()


def _in_layout(target: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(target, dtype=source.dtype).copy_(source)


def _lay_out_state(call: Call, state: State, target: Tensor, keys: tuple[str, ...]) -> None:
    """Puts states into the parameter's memory order, and onto its device, for good."""
    for key in (*keys, "master_param"):
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
    step = state.get("step")
    if isinstance(step, Tensor):
        state["step"] = step.to(target.device, torch.float32)


def norm_of_grads(call: Call, distributed: bool, tables: _C._LaunchTables) -> Tensor:
    """The 2-norm of all gradients as they are; ``tables`` are for such calls alone."""
    from . import clip

    if not distributed:
        device = call.params[0].device
        if device.type in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.float64):
                out = torch.empty((), dtype=dtype, device=device)
                work = memory.workspace(device)
                status = _C.grad_norm(call.params, True, out, 1, -1.0, work, tables, call.op)
                if status == DONE:
                    return out
                if status == NEEDS_PREPARATION:
                    break
    return clip.total_norm(call.op, [p.grad for p in call.params if p.grad is not None], 2.0)
