"""The base of all optimizers: torch's param groups and states, one call of a kernel a step."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..core import checks, dispatch, memory
from ..core.arguments import check_type
from ..core.docs import share_paragraphs
from ..core.groups import Groups
from ..penalty.coupled import Weights
from ..penalty.kernels import DONE, value_dtype
from ..penalty.names import divided_by_name
from ..penalty.strengths import check_dim, check_number
from . import dtensor as _sharded
from . import kernels as _kernels
from . import op as _op
from .algorithms import SGD, STATES, Algorithm
from .averages import KEY, Averages
from .coupled import GroupStep
from .kernels import COPIES, LOW_PRECISION, Call, Hyper, State, given, update_dtype
from .norms import norm_of_grads
from .op import Lists
from .options import (
    DEFAULTS,
    NOTES,
    PENALTY,
    CommonOptions,
    Number,
    Options,
    ParamsT,
    check_options,
    meant,
    of_torch,
)
from .plan import CHECKED, Plan, WatchedStates

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RegularizedOptimizer"]

_PROX = {False: 0, True: 3, "decoupled": 1, "preconditioned": 2, "capped": 3}
_WatchedStates = WatchedStates  # pickles of before name it so
#: Dtypes of the count of steps.
_COUNTS = {torch.float32, torch.float64}
#: Keys of param groups that optimizers without a proximal step take no notice of.
_NOT_GIVEN = ("group", "group_dim", "prox")
#: What belongs to the optimizer, not to its param groups.
_OWN = ("max_grad_norm", "groups", "group_weights")
#: Arguments that must not be negative.
_NOT_NEGATIVE = (
    *("lr", "momentum", "eps", "beta", "lr_decay", "alpha", "momentum_decay", "weight_decay"),
    "initial_accumulator_value",
)


class RegularizedOptimizer(Averages):
    """A torch optimizer whose step includes a penalty; see the subclasses.

    Attributes:
        penalty_value: the penalty R of the weights that the last step began with, over those that
            had a gradient: a 0-d tensor on their device, float32 (float64 if a parameter is). The
            term of ``groups`` is that of the weights after the update, before its proximal step.
        max_grad_norm: may be changed between steps.
        groups: may be changed between steps, as may ``group_weights``.
    """

    _algorithm: Algorithm
    _number: int  # of the algorithm, as the keys
    _keys: tuple[str, ...]
    _name: str
    _supports_group = True
    #: Whether a group's proximal step may be in the metric of the update.
    _has_group_step = True

    #: A GradScaler passes its scale and overflow flag on; the kernels read them on the device.
    _step_supports_amp_scaling = True

    max_grad_norm: float | None = None
    groups: Groups | None = None
    group_weights: Weights = "size"
    _group_step: GroupStep | None = None
    _norm: Tensor | None = None
    _norm_scale: Tensor | None = None
    _plan: Plan | None = None
    _penalized = False

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        where = f"fusereg.optim.{self._name}"
        check_options(self, where, params, options, self._options())
        shared: dict[str, Any] = {**DEFAULTS, **options}
        for i, beta in enumerate(defaults.get("betas", ())):
            self._check_number(f"betas[{i}]", beta, 1.0)
        self.max_grad_norm, self.groups, self.group_weights = (shared.pop(name) for name in _OWN)
        norm, groups = self.max_grad_norm, self.groups
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0.0):
            raise ValueError(f"{where}: max_grad_norm must be > 0 or None, got {norm!r}")
        wanted = "what fusereg.groups_of returns"
        check_type(groups, (Groups, type(None)), f"{where}: groups", wanted)
        if groups is not None and shared["group_dim"] != DEFAULTS["group_dim"]:
            raise ValueError(f"{where}: group_dim must be left out with groups")
        if shared["differentiable"]:
            raise ValueError(
                f"{where}: differentiable=True is not supported: the step is a kernel that "
                f"autograd does not record{of_torch(self._name)}"
            )
        if shared["fused"] and shared["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self._begin()
        super().__init__(params, {**defaults, **shared})
        self.state = WatchedStates(dict, self.state)
        self._groups_of_step(f"optim.{self._name}", list(map(self._hyper, self.param_groups)))
        strengths = (group["group"] for group in self.param_groups)
        if groups and "group" not in options and not any(map(given, strengths)):
            text = "groups do nothing without a strength; pass group= here or in param groups"
            warnings.warn(f"{where}: {text}", stacklevel=3)

    def _begin(self) -> None:
        """Make what steps keep: memory for CUDA launches, of which a copy has its own."""
        if "penalty_value" not in self.__dict__:
            self.penalty_value: Tensor = torch.zeros((), dtype=torch.float32, device="cpu")
        self._plan = self._group_step = None
        self._beginning = []
        self._step_tables = memory.launch_tables()
        self._norm_tables = memory.launch_tables()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, which may have its own ``l1``, ``l2``, ``group`` and ``prox``.

        Raises:
            ValueError: a parameter has no dimension ``group_dim``; or the group has names, by which
                it is seen that ``weight_norm`` divides one of its parameters by its norm, and a
                penalty that would make it zero.
        """
        if isinstance(param_group, dict):  # else torch says so
            self._check_keys(param_group)
            self._check_group({**self.defaults, **param_group})
            if "betas" in self.defaults and "betas" in param_group:
                self._pair(param_group["betas"])
        super().add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_params(self, group: dict[str, Any]) -> None:
        """Raise if parameters of the last group cannot have its penalty."""
        before = sum(len(g["params"]) for g in self.param_groups[:-1])
        hyper = self._hyper(group)
        for i, p in enumerate(group["params"], before):
            if not torch.nn.parameter.is_lazy(p):
                hyper.dim_of(p, f"optim.{self._name}", i)
        divided = divided_by_name(group.get("param_names", ()))
        if divided and group["prox"] and (given(group["l1"]) or given(group["group"])):
            raise ValueError(
                f"fusereg.optim.{self._name}: {divided[0]} must have no l1 and group: weight_norm "
                "divides by its norm, and zeros of it become NaN; take the param groups from "
                "fusereg.optim.param_groups_weight_decay(model, ...), which leaves it out"
            )

    def _check_keys(self, param_group: dict[str, Any]) -> None:
        """Raise if a key seems to be a misspelled argument: its strength would be lost."""
        known = [key for key in self.defaults if self._supports_group or key not in _NOT_GIVEN]
        for key in param_group:
            if key in self.defaults or key in ("params", "param_names") or not isinstance(key, str):
                continue
            wanted = meant(key, known)
            if wanted is not None:
                raise ValueError(
                    f"fusereg.optim.{self._name}: a param group has the unknown key {key!r}; "
                    f"did you mean {wanted}?"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._begin()
        for i, group in enumerate(self.param_groups):
            # A state dict of torch's optimizer has no penalty: the present one stays.
            source = before[i] if before is not None and i < len(before) else self.defaults
            for key, default in self.defaults.items():
                group.setdefault(key, source.get(key, default))
        self.state = WatchedStates(dict, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of torch's of the same name.

        torch would round the float32 states of 16-bit parameters to the parameters' dtype; here
        they keep their bits. Hooks see and may change what torch shows them: the state dict before,
        the optimizer's states after.

        Raises:
            ValueError: it has the states of another kind of optimizer, or does not fit the param
                groups. Nothing has changed then.
        """
        where = f"fusereg.optim.{self._name}.load_state_dict: state_dict"
        checks.check_mapping(state_dict, where, "as state_dict() returns it")
        # The last hook before and the first one after.
        loaded: list[dict[str, Any]] = []

        def check(_: Any, state: dict[str, Any]) -> None:
            self._check_states(state["state"])
            loaded.append(state)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(
            lambda _: self._keep_bits(loaded[-1]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_states(self, states: Mapping[Any, Any]) -> None:
        """Raise if states are those of another kind of optimizer, which lack what this one needs.

        It would begin them anew with the other's count of steps, and its first steps be far off.
        """
        for of, state in states.items():
            given = sorted(key for key in STATES if state.get(key) is not None)
            missing = [key for key in self._algorithm.needed if state.get(key) is None]
            if given and missing:
                raise ValueError(
                    f"fusereg.optim.{self._name}.load_state_dict: the state of parameter {of} has "
                    f"{', '.join(given)}, but no {', '.join(missing)}; is it another kind of "
                    "optimizer's?"
                )

    def _keep_bits(self, state_dict: dict[str, Any]) -> None:
        """Take the states of 16-bit parameters from a state dict as they are."""
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for i, p in zip(ids, params, strict=True):
                if p.dtype not in LOW_PRECISION or i not in saved:
                    continue
                for key in (*self._keys, *COPIES, "last", "mu_product"):
                    value = saved[i].get(key)
                    if isinstance(value, Tensor):
                        exact = value.detach().to(p.device, torch.float32)
                        self.state[p][key] = exact.clone() if exact is value.detach() else exact

    # -- for subclasses to define --

    def _specific(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the algorithm's own fields of a :class:`Hyper`."""
        raise NotImplementedError

    def _new_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a state before the first step; float32 for 16-bit parameters."""
        dtype = torch.float32 if p.dtype in LOW_PRECISION else p.dtype
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _forgets(self, call: Call) -> bool:
        """Return whether states that were made for this step must be deleted again."""
        return False

    # -- arguments --

    @classmethod
    def _options(cls) -> dict[str, tuple[Any, Any]]:
        """Return the defaults and types of the shared arguments that this optimizer takes."""
        types = get_type_hints(Options if cls._supports_group else CommonOptions)
        return {name: (default, types[name]) for name, default in DEFAULTS.items() if name in types}

    def _pair(self, betas: Any) -> tuple[Number, Number]:
        """Return both betas; raise TypeError unless there are two."""
        try:
            first, second = betas
        except (TypeError, ValueError):
            raise TypeError(
                f"fusereg.optim.{self._name}: betas must be two numbers, got {betas!r}"
            ) from None
        return first, second

    def _check_number(self, name: str, value: Any, limit: float = math.inf) -> None:
        """Raise for a number that is negative or not below its limit; of a tensor, on the CPU."""
        where = f"fusereg.optim.{self._name}: {name}"
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{where} must be one number, got a tensor of {value.numel()}")
        if isinstance(value, Tensor) and not (value.is_cpu and dispatch.eager()):
            return  # asking would wait for the device
        if not 0.0 <= checks.as_number(value, where) < limit:
            wanted = "not negative" if limit == math.inf else f"in [0, {limit})"
            raise ValueError(f"{where} must be {wanted}, got {value}")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if a group's numbers are out of range, or do not go with its ``prox``."""
        where = f"fusereg.optim.{self._name}: "
        for name in filter(self.defaults.__contains__, _NOT_NEGATIVE):
            self._check_number(name, group[name])
        for name in ("l1", "l2", "group"):
            if isinstance(group[name], Tensor):
                self._check_number(name, group[name])
            else:
                check_number(group[name], where + name, "a number or a tensor")
        if group.get("ema_decay") is not None:
            self._check_number("ema_decay", group["ema_decay"], 1.0)
        check_dim(f"optim.{self._name}", group["group_dim"], "group_dim")
        prox = group["prox"]
        if not isinstance(prox, (bool, str)) or prox not in _PROX:
            raise ValueError(
                f"{where}prox must be True, False, 'capped', 'decoupled' or 'preconditioned', "
                f"got {prox!r}"
            )
        # Momentum amplifies a gradient that stays by 1 / (1 - momentum), so the step is, too.
        amplified = prox == "preconditioned" or (
            prox in (True, "capped") and any(given(group[k]) for k in ("l1", "l2", "group"))
        )
        if amplified and not group.get("momentum", 0.0) < 1.0:
            raise ValueError(
                f"{where}prox={prox!r} needs momentum < 1, got {group['momentum']}; "
                "use prox='decoupled'"
            )
        if not given(group["group"]):
            return
        in_metric = prox in ("preconditioned", "capped")
        if not self._supports_group:
            raise ValueError(f"{where}a step with group has no closed form; use Adagrad")
        if self.groups is not None and prox is False:
            raise ValueError(
                f"{where}groups make a proximal step, which prox=False does not take; add "
                "fusereg.functional.group_lasso_penalty(groups, strength) to the loss instead"
            )
        if self.groups is not None and in_metric and self._algorithm is not SGD:
            raise ValueError(
                f"{where}groups take the decoupled step; use prox='decoupled' or True, got {prox!r}"
            )
        if in_metric and not self._has_group_step:
            raise ValueError(
                f"{where}group cannot go with prox={prox!r}: a step of one size has no metric; "
                "use prox='decoupled'"
            )

    def _hypers(self, plan: Plan) -> tuple[Hyper, ...]:
        """Return what the groups say; those that have changed since the last step are checked."""
        for i, group in enumerate(self.param_groups):
            own: list[Any] = [self.groups, *group, *group.values()]
            before = plan.read[i]
            if len(own) == len(before) and all(map(operator.is_, own, before)):
                continue
            checked: list[Any] = [group.get(key) for key in CHECKED]
            if not all(map(operator.is_, checked, plan.checked[i])):
                if any(map(given, checked[:3])) or checked[-1] is not None:
                    self._check_group(group)
                plan.checked[i] = checked
            plan.set_hyper(i, self._hyper(group).in_python(), group, own)
        return plan.all_hypers()

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        by_groups = given(group["group"])
        penalized = by_groups or given(group["l1"]) or given(group["l2"])
        prox = _PROX[group["prox"]] if penalized else 0
        spans = self.groups is not None
        # Channels that span tensors have no step in a metric.
        no_step = not self._has_group_step or (spans and self._algorithm is not SGD)
        if by_groups and group["prox"] is True and no_step:
            prox = _PROX["decoupled"]
        decay = group.get("ema_decay")
        return Hyper(
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            l1=group["l1"],
            l2=group["l2"],
            group=0.0 if spans else group["group"],
            ema_decay=0.0 if decay is None else decay,
            average=decay is not None and not spans,
            prox=prox,
            maximize=bool(group["maximize"]),
            master_weights=bool(group["master_weights"]),
            group_dim=group["group_dim"] if by_groups and not spans else 0,
            **self._specific(group),
        )

    # -- the step --

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last step, unscaled, if there is a ``max_grad_norm``.

        A 0-d tensor on the gradients' device, or None.
        """
        if self._norm is None or self._norm_scale is None:
            return self._norm
        return self._norm / self._norm_scale

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again; its result (None too) is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (
            torch.compiler.is_dynamo_compiling() and dispatch.whole_graph() and self._run_in_graph()
        ):
            self._run()
        return loss

    @dispatch.outside_graphs
    def _run(self) -> None:
        self._check_raw("step")
        groups = self.param_groups
        plan = self._plan
        if plan is None or not plan.holds(groups, self.state):
            plan = self._new_plan()
        if not plan.params:
            return
        hypers = self._hypers(plan)
        value: Tensor | None = None
        if plan.penalized:
            value = torch.zeros((), dtype=plan.value_dtype, device=plan.params[0].device)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        op = f"optim.{self._name}"
        by_groups = self._groups_of_step(op, hypers)
        norm, max_norm = None, 0.0
        if self.max_grad_norm is not None:
            norm, max_norm = norm_of_grads(op, plan.params, self._norm_tables), self.max_grad_norm
            self._norm, self._norm_scale = norm, scale
        call = Call(
            algorithm=self._number,
            params=plan.params,
            grads=None,
            states=plan.states,
            counts=plan.counts,
            hypers=hypers,
            fresh=(),
            value=value,
            grad_scale=scale,
            found_inf=getattr(self, "found_inf", None),
            norm=norm,
            max_norm=max_norm,
            workspace=None,
            tables=self._step_tables,
            op=op,
        )
        try:
            if plan.distributed:
                call = self._with_states(call)
                _sharded.run(call, self._keys)
            else:
                status = _kernels.run(call)
                if status == _kernels.NEEDS_STATE:
                    call = self._with_states(call)
                    status = _kernels.run(call)
                if status != DONE:
                    call = self._with_states(call)
                    _kernels.run_prepared(call, self._keys)
        except BaseException:
            self._forget(call)  # the next step is a first step still
            raise
        if by_groups is not None:
            value = self._step_of_groups(by_groups, hypers, plan, value)
        if value is not None or self._penalized:
            # When the strengths have become zero, so does the value.
            self.penalty_value = torch.zeros_like(self.penalty_value) if value is None else value
            self._penalized = value is not None
        if plan.averaged or self._beginning:
            self._average_others()
        if call.fresh and self._forgets(call):
            self._forget(call)

    def _forget(self, call: Call) -> None:
        """Delete the states that were made for a step that did not take place."""
        for i in call.fresh:
            for key in self._keys:
                call.states[i].pop(key, None)

    def _groups_of_step(self, op: str, hypers: Sequence[Hyper]) -> GroupStep | None:
        """Return what takes the step of ``groups``, checked; None without any."""
        if self.groups is None:
            return None
        step, parts = self._group_step, [group["params"] for group in self.param_groups]
        if step is None or not step.fits(self.groups, self.group_weights, parts):
            step = self._group_step = GroupStep(op, self.groups, self.group_weights, parts)
        step.check(self.param_groups, hypers)
        return step

    def _step_of_groups(
        self, step: GroupStep, hypers: tuple[Hyper, ...], plan: Plan, value: Tensor | None
    ) -> Tensor | None:
        """Take the proximal step of ``groups``; return the whole penalty's value."""
        found_inf = getattr(self, "found_inf", None)
        if any(given(group["group"]) for group in self.param_groups):
            own = step.run(self.param_groups, hypers, self.state, found_inf)
            if own is not None:
                before = 0.0 if value is None else value
                value = (before + own).to(plan.params[0].device, plan.value_dtype)
        # Averages are those of the weights after this step.
        with torch.no_grad():
            for group in self.param_groups:
                if group.get("ema_decay") is None:
                    continue
                for p in group["params"]:
                    if p.grad is not None and KEY in self._state_of(p):
                        if not any(p is begun for begun in self._beginning):
                            self._approach(p, 1.0 - group["ema_decay"])
                    elif p.grad is not None:
                        self._begin_average(p, group)
        return value

    def _new_plan(self) -> Plan:
        states: Any = self.state
        if type(states) is not WatchedStates:
            self.state = states = WatchedStates(dict, states)
        self._plan = plan = Plan(self.param_groups, states)
        return plan

    def _with_states(self, call: Call) -> Call:
        """Return the call after making the states of parameters that have a gradient but none."""
        fresh = list(call.fresh)
        index = 0
        with torch.no_grad():
            for group in self.param_groups:
                keys = self._algorithm.keys_of(self._hyper(group))
                for p in group["params"]:
                    if p.grad is not None:
                        self._begin_average(p, group)
                        if self._add_missing(p, keys, group):
                            fresh.append(index)
                    index += 1
        plan = self._new_plan()
        return call._replace(states=plan.states, fresh=tuple(fresh))

    def _add_missing(self, p: Tensor, keys: tuple[str, ...], group: dict[str, Any]) -> bool:
        """Make the states that do not exist; return whether one in ``keys`` was made."""
        if p.is_complex():
            raise ValueError(
                f"fusereg.optim.{self._name}: complex parameters ({p.dtype}) are not supported"
                f"{of_torch(self._name)}"
            )
        state = self.state[p]
        if self._algorithm.steps:
            self._add_step(p, state, group)
        missing = [key for key in keys if state.get(key) is None]
        for key in missing:
            state[key] = self._new_state(key, p, group)
        if _wants_master(p, group) and state.get("master_param") is None:
            state["master_param"] = p.detach().to(torch.float32, copy=True)
        return bool(missing)

    def _add_step(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Make the count of steps, as a tensor."""
        if not isinstance(state.get("step"), Tensor):
            start = float(state.get("step", 0.0))
            # As torch counts.
            wide = torch.get_default_dtype() is torch.float64
            dtype = torch.float64 if wide else torch.float32
            state["step"] = torch.full((), start, dtype=dtype, device=p.device)

    # -- the step in a graph that must not break --

    def _run_in_graph(self) -> bool:
        """Run the step as one operator while dynamo traces; return False if it cannot be one.

        What dynamo lets an optimizer's method assign to attributes is lost: the value and the norm
        are written to the tensors that are there.
        """
        for name in ("grad_scale", "found_inf", "_norm_scale"):
            if getattr(self, name, None) is not None:
                return False
        if self.groups is not None:
            return False
        self._check_raw("step")
        lists = Lists([], [], [], [], [], [])
        counts: list[int] = []
        hypers: list[Hyper] = []
        for group in self.param_groups:
            own = Lists([], [], [], [], [], [])
            if not self._init_group(group, *own):
                return False
            for whole, part in zip(lists, own, strict=True):
                whole.extend(part)
            counts.append(len(own.params))
            hypers.append(self._hyper(group))
        value = self.penalty_value if any(h.penalized() for h in hypers) else None
        norm = self._norm if self.max_grad_norm is not None else None
        with torch.no_grad():
            if lists.params:
                max_norm = self.max_grad_norm or 0.0
                _op.step(self._number, lists, counts, hypers, (value, norm), max_norm)
            else:
                for result in (value, norm):
                    if result is not None:
                        result.zero_()
        return True

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists with what the operator works on; return False if it cannot take it.

        Dynamo knows this name of torch's optimizers: it calls the method as it is while it traces
        ``step``, so that states may be made, and guards what the lists were filled from.
        """
        into = Lists(*lists)
        everything = [p for g in self.param_groups for p in g["params"]]
        if not everything:
            return True
        if given(group["l1"]) or given(group["l2"]) or given(group["group"]):
            self._check_group(group)
        device = everything[0].device
        keys = self._algorithm.keys_of(self._hyper(group))
        own = [p for p in group["params"] if p.grad is not None]
        for p in own:
            rows = given(group["group"])
            first = group["group_dim"] if rows and p.dim() > 1 else 0
            moved = p.movedim(first, 0) if first else p
            in_order = _op.takes(p) and _kernels.laid_out(moved, rows) is moved
            if p.device != device or not in_order:
                return False
            # The first gradient enters a momentum buffer in another way than those that follow.
            if self._algorithm is SGD and any(self.state.get(p, {}).get(k) is None for k in keys):
                return False
        averaged = group.get("ema_decay") is not None
        # The kernel goes on with averages, of parameters that have a gradient.
        begun = [KEY in self.state.get(p, {}) for p in group["params"]]
        if averaged and begun != [p.grad is not None for p in group["params"]]:
            return False
        with torch.no_grad():
            for p in own:
                self._add_missing(p, keys, group)
        for p in own:
            state = self.state[p]
            values = [state[k] for k in keys]
            master = state.get("master_param")
            if (master is not None) != _wants_master(p, group):
                return False
            masters = [] if master is None else [master]
            averages = [state[KEY]] if averaged else []
            beside = [p.grad, *values, *masters, *averages]
            if any(not _op.takes(t) or t.device != device for t in beside):
                return False
            if any(t.stride() != p.stride() or t.shape != p.shape for t in beside):
                return False
            if len({t.dtype for t in values}) > 1:
                return False
            into.params.append(p)
            into.grads.append(p.grad)
            into.states.extend(values)
            into.masters.extend(masters)
            into.averages.extend(averages)
            steps = [state[key] for key in self._algorithm.steps]
            wide = {update_dtype(p)} if "last" in self._algorithm.steps else _COUNTS
            if any(s.device != device or s.dtype not in wide for s in steps):
                return False
            into.steps.extend(steps)
        grads = [p.grad for p in everything if p.grad is not None]
        dtype = value_dtype([*everything, *grads])
        self.penalty_value = _op.result_on(device, dtype, self.penalty_value)
        if self.max_grad_norm is not None:
            self._norm = _op.result_on(device, dtype, self._norm)
        return True


_Optimizer = TypeVar("_Optimizer", bound=type[RegularizedOptimizer])


def documented(optimizer: _Optimizer) -> _Optimizer:
    """Fill in what the optimizers share: names, paragraphs and arguments.

    A class decorator. ``help()`` and ``inspect.signature()`` then show all keyword arguments by
    name, as type checkers and editors do.
    """
    optimizer._number, _, optimizer._keys, *_ = optimizer._algorithm
    optimizer._name = optimizer.__name__
    share_paragraphs(optimizer, penalty=PENALTY, notes=NOTES)
    function: Any = vars(optimizer)["__init__"]
    signature = inspect.signature(function)
    own = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (default, kind) in optimizer._options().items()
        if name not in own
    ]
    function.__signature__ = signature.replace(parameters=[*own.values(), *shared])
    return optimizer


def _wants_master(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["master_weights"]) and p.dtype in LOW_PRECISION
