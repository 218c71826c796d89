"""What fusereg's optimizers share: param groups and states as torch has them, one call a step.

Layers, from the kernel outwards:

``_C.optimizer_step``
    the kernels: all parameters in one call.
``_kernels``
    the same for whatever tensors there are: odd layouts, several devices, sparse gradients.
``_distributed``
    the same for DTensors.
``_graphs``
    the step as an operator, in compiled code.
``RegularizedOptimizer.step``
    the entry.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import dispatch, distributed, memory
from . import graphs as _graphs
from . import kernels as _kernels
from .kernels import Call, Hyper, State

__all__ = ["RegularizedOptimizer"]

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_PROX = {False: 0, True: 1, "decoupled": 1, "preconditioned": 2}
_OWN = ("l1", "l2", "group", "prox", "master_weights")
_NO_STATE: State = {}


class _WatchedStates(defaultdict[Any, Any]):
    """torch's ``defaultdict(dict)`` of states, which also tells when an entry was replaced."""

    def __init__(self, *args: Any) -> None:
        self.version = 0
        super().__init__(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.version += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.version += 1
        super().__delitem__(key)

    def clear(self) -> None:
        self.version += 1
        super().clear()

    def pop(self, *args: Any) -> Any:
        self.version += 1
        return super().pop(*args)

    def popitem(self) -> Any:
        self.version += 1
        return super().popitem()

    def setdefault(self, *args: Any) -> Any:
        self.version += 1
        return super().setdefault(*args)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.version += 1
        super().update(*args, **kwargs)


class _Plan:
    """The parameters and their states as flat lists, kept from step to step while they hold."""

    def __init__(self, groups: list[dict[str, Any]], states: _WatchedStates) -> None:
        self.parts: list[list[Tensor]] = [list(g["params"]) for g in groups]
        self.params: list[Tensor] = [p for part in self.parts for p in part]
        self.counts = tuple(len(part) for part in self.parts)
        self.watched = states
        self.states: list[State] = [states.get(p, _NO_STATE) for p in self.params]
        self.version = states.version
        self.distributed = distributed.has_dtensor(self.params)
        float64 = any(p.dtype is torch.float64 for p in self.params)
        self.value_dtype = torch.float64 if float64 else torch.float32

    def holds(self, groups: list[dict[str, Any]], states: Any) -> bool:
        if self.watched is not states or self.version != states.version:
            return False
        if len(self.parts) != len(groups):
            return False
        for part, group in zip(self.parts, groups, strict=True):
            params = group["params"]
            if len(part) != len(params) or not all(map(operator.is_, part, params)):
                return False
        return True


class RegularizedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step includes a penalty; see the subclasses.

    Attributes:
        penalty_value: the penalty R of the weights that the last step began with, over those that
            had a gradient: a 0-d tensor on their device, float32 (float64 if a parameter is).
        max_grad_norm: may be changed between steps.
    """

    _algorithm: int
    _name: str
    #: Keys of the states that have the parameter's shape, in the kernels' order.
    _keys: tuple[str, ...]
    _has_step = False
    _supports_group = True

    #: GradScaler may hand over its scale and its finding; the kernels read them on the device.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], max_grad_norm: float | None
    ) -> None:
        self.max_grad_norm = _check_max_norm(max_grad_norm, self._name)
        self.penalty_value: Tensor = torch.zeros(())
        self._norm: Tensor | None = None
        self._norm_scale: Tensor | None = None
        self._plan: _Plan | None = None
        self._new_tables()
        if defaults.get("differentiable"):
            raise ValueError(
                f"fusereg.optim.{self._name}: differentiable=True is not supported: the step is a "
                f"kernel that autograd does not record; use torch.optim.{self._name}"
            )
        if defaults.get("fused") and defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(params, defaults)
        self.state = _WatchedStates(dict, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own ``l1``, ``l2``, ``group`` and ``prox``."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self.__dict__.setdefault("max_grad_norm", None)
        self.__dict__.setdefault("penalty_value", torch.zeros(()))
        self.__dict__.setdefault("_norm", None)
        self.__dict__.setdefault("_norm_scale", None)
        self._plan = None
        self._new_tables()
        for i, group in enumerate(self.param_groups):
            # A state dict of torch's optimizer knows nothing of penalties: ours stay as they are.
            source = before[i] if before is not None and i < len(before) else self.defaults
            for key, default in self.defaults.items():
                group.setdefault(key, source.get(key, default))
        self.state = _WatchedStates(dict, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of torch's of the same name.

        torch would round the float32 states of 16-bit parameters to the parameters' dtype; here
        they keep their bits.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for i, p in zip(ids, params, strict=True):
                if p.dtype not in (torch.float16, torch.bfloat16) or i not in saved:
                    continue
                for key in (*self._keys, "master_param"):
                    value = saved[i].get(key)
                    if isinstance(value, Tensor):
                        exact = value.detach().to(p.device, torch.float32)
                        self.state[p][key] = exact.clone() if exact is value.detach() else exact

    def _new_tables(self) -> None:
        """Memory for CUDA launches over many parameters; a copy of this has its own."""
        self._step_tables = memory.launch_tables()
        self._norm_tables = memory.launch_tables()

    # -- what a subclass says --

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, Any, Any]:
        """``first``, ``second`` and ``eps`` of the kernels."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
        """``amsgrad``, ``nesterov``, ``decoupled_decay``, ``momentum`` of the kernels."""
        return False, False, False, False

    def _wanted_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._keys

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        """A state before the first step; float32 for 16-bit parameters."""
        dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _forgets(self, call: Call) -> bool:
        """Whether states that were made for this step must go again."""
        return False

    # -- the step --

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``max_grad_norm``: the norm of all gradients at the last step, unscaled; else None.

        A 0-d tensor on their device.
        """
        if self._norm is None or self._norm_scale is None:
            return self._norm
        return self._norm / self._norm_scale

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("l1", "l2", "group"):
            _check_strength(group[name], f"fusereg.optim.{self._name}: {name}")
        prox = group["prox"]
        if not isinstance(prox, (bool, str)) or prox not in _PROX:
            raise ValueError(
                f"fusereg.optim.{self._name}: prox must be True, False, 'decoupled' or "
                f"'preconditioned', got {prox!r}"
            )
        if _given(group["group"]):
            if not self._supports_group:
                raise ValueError(
                    f"fusereg.optim.{self._name}: group is not supported: with a metric of its own "
                    "for each coordinate the group's step has no closed form"
                )
            if prox == "preconditioned" and self._algorithm != 0:
                raise ValueError(
                    f"fusereg.optim.{self._name}: group cannot go with prox='preconditioned': with "
                    "a metric of its own for each coordinate the group's step has no closed form; "
                    "use prox='decoupled'"
                )

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        l1, l2, row = group["l1"], group["l2"], group["group"]
        penalized = _given(l1) or _given(l2) or _given(row)
        if penalized:
            self._check_group(group)
        prox = _PROX[group["prox"]] if penalized else 0
        first, second, eps = self._numbers(group)
        amsgrad, nesterov, decoupled, momentum = self._options(group)
        return (
            *(group["lr"], first, second, eps, group["weight_decay"], l1, l2, row, prox),
            *(bool(group["maximize"]), amsgrad, nesterov, decoupled, momentum),
            bool(group["master_weights"]),
        )

    @dispatch.outside_graphs
    def _run(self) -> None:
        groups = self.param_groups
        plan = self._plan
        if plan is None or not plan.holds(groups, self.state):
            plan = self._new_plan()
        if not plan.params:
            return
        hypers = tuple([self._hyper(g) for g in groups])
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        value: Tensor | None = None
        if any(_given(h[5]) or _given(h[6]) or _given(h[7]) for h in hypers):
            value = torch.zeros((), dtype=plan.value_dtype, device=plan.params[0].device)
        op = f"optim.{self._name}"
        call = Call(
            op,
            self._algorithm,
            plan.params,
            plan.states,
            plan.counts,
            hypers,
            (),
            value,
            scale,
            found_inf,
            None,
            0.0,
            self._step_tables,
        )
        if self.max_grad_norm is not None:
            self._norm = _kernels.norm_of_grads(call, plan.distributed, self._norm_tables)
            self._norm_scale = scale
            call = call._replace(norm=self._norm, max_norm=self.max_grad_norm)
        if not plan.distributed:
            status = _kernels.run(call)
            if status == _kernels.NEEDS_STATE:
                call = self._with_states(call)
                status = _kernels.run(call)
            if status != _kernels.DONE:
                call = self._with_states(call)
                _kernels.run_prepared(call, self._keys)
        else:
            from . import dtensor as _dtensor

            call = self._with_states(call)
            _dtensor.run(call, self._keys)
        if value is not None:
            self.penalty_value = value
        if call.fresh and self._forgets(call):
            for i in call.fresh:
                for key in self._keys:
                    del self.state[plan.params[i]][key]

    def _new_plan(self) -> _Plan:
        states: Any = self.state
        if type(states) is not _WatchedStates:
            self.state = states = _WatchedStates(dict, states)
        self._plan = plan = _Plan(self.param_groups, states)
        return plan

    def _with_states(self, call: Call) -> Call:
        """The call after states were made for the parameters that have a gradient but none yet."""
        fresh = list(call.fresh)
        index = 0
        with torch.no_grad():
            for group in self.param_groups:
                keys = self._wanted_keys(group)
                for p in group["params"]:
                    if p.grad is not None and self._add_missing(p, keys, group):
                        fresh.append(index)
                    index += 1
        plan = self._new_plan()
        return call._replace(states=plan.states, fresh=tuple(fresh))

    def _add_missing(self, p: Tensor, keys: tuple[str, ...], group: dict[str, Any]) -> bool:
        """Whether one of the states in ``keys`` was made."""
        if p.is_complex():
            raise ValueError(
                f"fusereg.optim.{self._name}: complex parameters ({p.dtype}) are not supported; "
                f"use torch.optim.{self._name} for them"
            )
        state = self.state[p]
        if self._has_step and not isinstance(state.get("step"), Tensor):
            start = float(state.get("step", 0.0))
            state["step"] = torch.full((), start, dtype=torch.float32, device=p.device)
        made = False
        for key in keys:
            if state.get(key) is None:
                state[key] = self._new_state(key, p, group)
                made = True
        if (
            group["master_weights"]
            and p.dtype in (torch.float16, torch.bfloat16)
            and state.get("master_param") is None
        ):
            state["master_param"] = p.detach().to(torch.float32, copy=True)
        return made

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fills the lists with what a compiled step works on; False if it cannot be compiled.

        Dynamo knows this name of torch's optimizers: it calls the method as it is while it traces
        ``step``, so that states may be made, and guards what the lists were filled from.
        """
        return _graphs.collect(self, group, *lists)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again; its result (None too) is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (
            torch.compiler.is_dynamo_compiling() and dispatch.whole_graph() and _graphs.step(self)
        ):
            self._run()
        return loss


def _given(strength: Any) -> bool:
    """Whether a term is there: a tensor's value is not asked for."""
    return isinstance(strength, Tensor) or strength != 0.0


def _check_strength(value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{where} must be one number, got a tensor of {value.numel()}")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{where} must be a number or a tensor, got {type(value).__name__}")
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{where} must be finite and not negative, got {value}")


def _check_max_norm(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not value > 0.0:
        raise ValueError(f"fusereg.optim.{name}: max_grad_norm must be > 0 or None, got {value!r}")
    return float(value)


def check_numbers(name: str, **limits: tuple[Any, float]) -> None:
    """Raises for a number that is negative, or not below its upper limit."""
    for argument, (value, limit) in limits.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"fusereg.optim.{name}: {argument} must be one number, "
                    f"got a tensor of {value.numel()}"
                )
            continue
        if not 0.0 <= value < limit:
            wanted = "not negative" if limit == math.inf else f"in [0, {limit})"
            raise ValueError(f"fusereg.optim.{name}: {argument} must be {wanted}, got {value}")


def own_defaults(
    l1: Any, l2: Any, group: Any, prox: bool | str, master_weights: bool
) -> dict[str, Any]:
    return dict(zip(_OWN, (l1, l2, group, prox, master_weights), strict=True))
