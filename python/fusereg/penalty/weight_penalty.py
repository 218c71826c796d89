"""Penalties of a whole model, by rules, for training loops."""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import checks
from ..core import params as _params
from ..core.arguments import check_type
from ..core.hints import explains
from ..core.params import Key
from .functional import add_grads, evaluate
from .kernels import sum_on_first
from .names import SPARED, WORDS, Keys, Named, Places, named_parameters, unpenalizable
from .strengths import UNSET, Listed, Strengths, check_number, dimension_of, factor_at, listed

__all__ = ["AttachedPenalty", "PenaltyGroup", "WeightPenalty"]


@dataclass
class PenaltyGroup:
    """Parameters of a model that share strengths; ``l1``, ``l2`` and ``group`` may be changed.

    ``group_dim``: the dimension whose indices are the groups of each parameter.
    """

    label: str
    names: list[str]
    params: list[Tensor] = field(repr=False)
    l1: float = 0.0
    l2: float = 0.0
    group: float = 0.0
    group_dim: list[int] = field(default_factory=list, repr=False)


Rule = Mapping[str, float | int | None] | None

OP = "fusereg.WeightPenalty"
_STRENGTHS = ("l1", "l2", "group")
_log = logging.getLogger("fusereg")

#: Names of its arguments elsewhere.
ELSEWHERE = {
    "weight_decay": "it is l2 here, whose term has the factor 1/2",
    "strength": "give l1, l2 or group",
    "l1_strength": "it is l1 here",
    "l2_strength": "it is l2 here",
    "optimizer": "call attach(optimizer)",
}


def _of_default(name: str, what: str) -> property:
    """Return the property of a strength of the default group."""

    def get(penalty: WeightPenalty) -> float:
        return float(getattr(penalty.groups[0], name))

    def put(penalty: WeightPenalty, strength: float) -> None:
        setattr(penalty.groups[0], name, _check_strengths({name: strength}, OP)[name])

    get.__doc__ = f"{what} strength of all parameters that no rule matches."
    return property(get, put)


class WeightPenalty:
    r"""A penalty on the weights of a model, with strengths by parameter name or module type.

    .. math:: R = \sum_w l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2
                  + group \sum_g \sqrt{n_g}\,\|w_g\|_2

    with :math:`l_2 \sum w_i^2` as the second term if ``half=False``. The groups are the weights of
    one output of a layer, unless ``group_dim`` says otherwise.
    Use one of::

        loss = criterion(model(x), y) + penalty.penalty()      # a term in the loss, or
        loss.backward(); penalty.add_grad_()                   # after backward: one pass, faster
        penalty.attach(optimizer)                              # the same, in any training loop

    Args:
        model: the module whose parameters are penalized. Parameters are looked up now; after
            replacing some (``fully_shard``, ``load_state_dict(assign=True)``, other layers), call
            :meth:`refresh`; until then using the penalty is an error. Layers that are added are
            penalized from the next ``refresh`` on. Tied parameters count once, under the first of
            their names. Names are those inside ``torch.compile``,
            ``DistributedDataParallel``, ``DataParallel`` and ``AveragedModel``; patterns match the
            names with them, too, and for a parametrized layer the name of the weight that is
            computed.
        l1, l2, group: strengths >= 0, one of them, or a rule's, must be given (0 is one).
        group_dim: the dimension whose indices are the groups. None: by the type of the layer, its
            outputs: dimension 1 of transposed convolutions (dimension 0, their inputs, where they
            have groups) and of transformers' Conv1D, and dimension 0 of all others. 1 makes groups
            of the inputs of a linear layer or a convolution. It must be one of a parameter.
        half: whether the L2 term has the factor 1/2 (so that its gradient is ``l2 * w``).
        exclude: parameters without a penalty: ``"bias"`` (by name: ``bias``, ``in_proj_bias``,
            ``bias_ih_l0``), ``"norm"`` (parameters of normalization layers), ``"layer_scale"``
            (LayerScale's factors), ``"position_embedding"`` (these and class tokens, where they are
            parameters of a module and the model has no method ``no_weight_decay``),
            ``"no_weight_decay"`` (what this method of the model, or of a part of it, returns, as
            timm's do), ``"vector"`` (all of at most one dimension), name patterns (``"head.*"``),
            or types of the modules that hold the parameters. Never penalized are frozen parameters
            that kernels cannot read (quantized ones), and those that a parametrization divides by
            their norm (``weight_norm``, ``spectral_norm``): of zeros it makes NaN.
        rules: other strengths for some parameters: a mapping from patterns or types, as in
            ``exclude``, to a mapping with ``l1``, ``l2``, ``group``, ``group_dim`` (missing ones
            keep the default) or to None for no penalty. The last match wins, after ``exclude``. A
            pattern that matches no parameter is an error.
        schedule: a function that returns a factor of all strengths for the number of :meth:`step`
            calls so far, e.g. ``lambda t: min(1.0, t / 1000)`` for a warm-up.

    Attributes:
        groups: list of :class:`PenaltyGroup`: the default group, then one per rule. Their
            strengths may be changed between steps. ``l1``, ``l2``, ``group`` of the penalty itself
            are those of the default group.

    Example:
        >>> penalty = fusereg.WeightPenalty(model, l1=1e-5, l2=1e-4, rules={"head.*": {"l1": 0.0}})
        >>> loss.backward()
        >>> value = penalty.add_grad_()
        >>> optimizer.step()
    """

    _DEFAULT = "default"
    _places: Places | None = None  # of pickles of before

    @explains(OP, ELSEWHERE)
    def __init__(
        self,
        model: nn.Module,
        *,
        l1: float = UNSET,
        l2: float = UNSET,
        group: float = UNSET,
        group_dim: int | None = None,
        half: bool = True,
        exclude: Iterable[Key] | Key = SPARED,
        rules: Mapping[Key, Rule] | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        check_type(model, nn.Module, f"{OP}: model", "a torch.nn.Module")
        if isinstance(exclude, (str, type)):
            exclude = (exclude,)
        wanted = "a function of the step that returns a factor"
        check_type(schedule, (Callable, type(None)), f"{OP}: schedule", wanted)
        self.half = half
        self.schedule = schedule
        self.steps = 0
        self._model = model
        check_type(exclude, Iterable, f"{OP}: exclude", "name patterns or module types")
        self._exclude = tuple(exclude)
        if rules is not None:
            checks.check_mapping(rules, f"{OP}: rules", 'like {"head.*": {"l1": 1e-4}}')
        self._rules = dict(rules or {})
        self._check_keys()
        check_given((l1, l2, group), self._rules)
        defaults: dict[str, Any] = _check_strengths({"l1": l1, "l2": l2, "group": group}, OP)
        groups = [PenaltyGroup(self._DEFAULT, [], [], **defaults)]
        self._group_dims = {self._DEFAULT: _check_group_dim(group_dim, OP)}
        for key, label in self._labels().items():
            if (rule := self._rules[key]) is not None:
                where, own = f"{OP}: the rule for {label}", dict(rule)
                dim = _check_group_dim(own.pop("group_dim", group_dim), where)
                self._group_dims[label] = dim
                strengths: dict[str, Any] = {**defaults, **_check_strengths(own, where)}
                groups.append(PenaltyGroup(label, [], [], **strengths))
        self.groups = groups
        self.excluded: list[str] = []
        self.refresh()
        if not any(g.params for g in self.groups):
            warnings.warn(
                f"{OP}: no parameter of the model is penalized; biases and "
                "normalizations are left out unless a rule names them",
                stacklevel=3,
            )

    # -- what is penalized --

    def _check_keys(self) -> None:
        for key in (*self._exclude, *self._rules):
            if not _params.is_key(key):
                raise TypeError(
                    f"{OP}: exclude and rules take name patterns or module types, got {key!r}"
                )
        for key, rule in self._rules.items():
            if rule is not None and not isinstance(rule, Mapping):
                raise TypeError(
                    f"{OP}: the rule for {_label(key)} must be a mapping like "
                    f'{{"l1": 1e-4}} or None, got {rule!r}'
                )

    def _labels(self) -> dict[Key, str]:
        """Return a distinct name for each rule, also where two types have the same name."""
        labels: dict[Key, str] = {}
        for key in self._rules:
            label, n = _label(key), 1
            while label == self._DEFAULT or label in labels.values():
                n += 1
                label = f"{_label(key)} ({n})"
            labels[key] = label
        return labels

    def refresh(self) -> None:
        """Look up the model's parameters again, keeping the groups and their strengths.

        Raises:
            ValueError: a pattern matches no parameter. Nothing is changed then.
        """
        labels = self._labels()
        members: dict[str, list[tuple[str, Tensor, int]]] = {g.label: [] for g in self.groups}
        excluded = []
        without_match = {k for k in self._exclude if k not in WORDS}
        without_effect = set(self._rules)
        keys, items = Keys(self._model), named_parameters(self._model)
        reasons: dict[str, str] = {}
        for item in items:
            out = [k for k in self._exclude if keys.match(k, item)]
            found = [k for k in self._rules if keys.match(k, item)]
            reason = unpenalizable(item)
            if reason is None and out:
                reason = f"excluded by {_label(out[0])!r}"
            elif reason is not None:
                _log.info("fusereg.WeightPenalty: %s has no penalty: %s", item.name, reason)
            without_match.difference_update(out)
            # To leave out what fusereg leaves out of itself is no mistake.
            plainly = any(k not in WORDS[2:] for k in out)
            without_effect.difference_update(
                k for k in found if reason is None or (self._rules[k] is None and not plainly)
            )
            if reason is not None or (found and self._rules[found[-1]] is None):
                excluded.append(item.name)
                if reason is not None:
                    reasons[item.name] = reason
            else:
                label = labels[found[-1]] if found else self._DEFAULT
                dim = _group_dim(self._group_dims[label], item.name, item.param, item.module)
                members[label].append((item.name, item.param, dim))
        if without_match or without_effect:
            unmatched = without_match | without_effect
            patterns = ", ".join(sorted(_label(k) for k in unmatched))
            raise ValueError(
                f"{OP}: {_hints(keys, unmatched, items, reasons)}no parameter "
                f"(that is not excluded) matches {patterns}"
            )
        for g in self.groups:
            g.names = [name for name, _, _ in members[g.label]]
            g.params = [param for _, param, _ in members[g.label]]
            g.group_dim = [dim for _, _, dim in members[g.label]]
        self._places = Places(self._model, [p for g in self.groups for p in g.params])
        self.excluded = excluded
        self._wrapped = {other: item.name for item in items for other in item.others}
        self._tied = [f"{name} is {item.name}" for item in items for name, _ in item.tied]

    l1 = _of_default("l1", "L1")
    l2 = _of_default("l2", "L2")
    group = _of_default("group", "Group-lasso")

    @property
    def factor(self) -> float:
        """Factor of all strengths at the present step of the schedule; 1 without a schedule."""
        if self.schedule is None:
            return 1.0
        return factor_at(self.schedule, self.steps, f"{OP}: schedule")

    def step(self) -> None:
        """Advance the schedule by one step.

        Raises:
            ValueError: the penalty is attached to an optimizer whose steps are counted.
        """
        if not torch.compiler.is_compiling() and any(a._count_steps for a, _ in _attached_to(self)):
            raise ValueError(
                f"{OP}.step: the penalty is attached to an optimizer and counts its steps, so that "
                "this one would count twice; leave this call out, or attach with count_steps=False"
            )
        self.steps += 1

    def _check_current(self) -> None:
        """Raise ValueError if parameters of the model have been replaced since :meth:`refresh`."""
        if self._places and not torch.compiler.is_compiling() and self._places.replaced():
            raise ValueError(
                f"{OP}: parameters of the model have been replaced since they were "
                "looked up, by load_state_dict(assign=True), a new layer or the like; call "
                "refresh(), and make the optimizer of the new parameters"
            )

    # -- the calls --

    def _listed(self, only: Iterable[Tensor] | None = None) -> list[Listed]:
        """Return the parameters with their strengths, those with one dimension of groups together.

        Without a group term the dimension does not matter.
        """
        self._check_current()
        factor = self.factor
        half = 1.0 if self.half else 2.0
        wanted = None if only is None else {id(p) for p in only}
        found: dict[int, tuple[list[Tensor], list[float], list[float], list[float]]] = {}
        for g in self.groups:
            strengths = (g.l1 * factor, g.l2 * factor * half, g.group * factor)
            for dim in dict.fromkeys(g.group_dim) if g.group else (0,):
                own = g.params
                if g.group:
                    own = [p for p, d in zip(own, g.group_dim, strict=True) if d == dim]
                if wanted is not None:
                    own = [p for p in own if id(p) in wanted]
                if own:
                    lists = found.setdefault(dim, ([], [], [], []))
                    lists[0].extend(own)
                    for values, strength in zip(lists[1:], strengths, strict=True):
                        values.extend([strength] * len(own))
        if not found:
            return [listed([], Strengths([], [], []))]
        return [
            listed(params, Strengths(l1, l2, group, dim))
            for dim, (params, l1, l2, group) in found.items()
        ]

    def penalty(self) -> Tensor:
        """Return R as a differentiable 0-d tensor, to add to the loss."""
        return self._sum_of(evaluate, self._listed())

    def add_grad_(
        self, *, grad_scale: Tensor | float | None = None, only: Iterable[Tensor] | None = None
    ) -> Tensor:
        """Add R's gradient into the parameters' ``.grad`` and return R, in one pass.

        See :func:`fusereg.add_penalty_grad_`.

        Args:
            grad_scale: factor of the gradient that is added.
            only: restrict gradient and R to these parameters. Where several optimizers take turns,
                pass the parameters of the one that steps.

        Raises:
            ValueError: as there; or the penalty is attached to an optimizer that holds some of the
                parameters, so that its next step would add their gradient once more.
        """
        chosen = None if only is None else list(only)
        parts = self._listed(chosen)
        # torch.compile cannot trace weak references.
        if not torch.compiler.is_compiling():
            _check_not_attached(self, chosen)
        return self._sum_of(add_grads, parts, grad_scale)

    def _sum_of(self, call: Callable[..., Tensor], parts: Iterable[Listed], *args: Any) -> Tensor:
        """Return the sum of calls for parts, which call parameters by their names in errors."""
        values: list[Tensor] = []
        for part in parts:
            try:
                values.append(call("WeightPenalty", part, *args))
            except (TypeError, ValueError) as error:
                raise type(error)(self._with_names(str(error), part.tensors)) from error
        return sum_on_first(values)

    def _with_names(self, text: str, tensors: Sequence[Tensor]) -> str:
        """Return an error's text with names in place of the indices of parameters."""
        names = {id(p): n for g in self.groups for n, p in zip(g.names, g.params, strict=True)}
        return re.sub(r"params\[(\d+)\]", lambda m: names[id(tensors[int(m[1])])], text)

    def attach(
        self, optimizer: torch.optim.Optimizer, *, count_steps: bool = True
    ) -> AttachedPenalty:
        """Add the gradient before each step of an optimizer, for the optimizer's parameters.

        For training loops of other libraries: every call of ``optimizer.step()`` includes the
        penalty. It is added once a step, after the last micro-batch, after the averaging over
        ranks and after gradient clipping. A ``GradScaler``'s scale is respected, whether or not
        the gradients were unscaled before. If no parameter has a gradient, nothing is added. With
        a closure, the gradient is added after each call of the closure, and the value to the loss
        that the closure returns.

        Args:
            optimizer: a ``torch.optim.Optimizer``, or a wrapper such as Accelerate's around one.
            count_steps: call :meth:`step` after each step; with several optimizers, set it for one
                of them only. Of an optimizer that a ``GradScaler`` lets skip steps by itself
                (``fused=True``), each step then waits for the device, to count what it did not
                skip.

        Returns:
            An object with ``remove()``, which detaches the penalty, and ``value``, the penalty at
            the last step.

        Raises:
            TypeError: ``optimizer`` is not an optimizer.
            ValueError: it holds no parameter that is penalized, and some are.

        Example:
            >>> attached = penalty.attach(optimizer)
            >>> train(model, optimizer)
            >>> attached.value, attached.remove()
        """
        return AttachedPenalty(self, optimizer, count_steps)

    # -- state --

    def state_dict(self) -> dict[str, Any]:
        """Return strengths, names and dimensions of groups, and step count, without parameters."""
        return {
            "version": 1,
            "steps": self.steps,
            "half": self.half,
            "groups": {
                g.label: {
                    "l1": g.l1,
                    "l2": g.l2,
                    "group": g.group,
                    "names": list(g.names),
                    "group_dim": list(g.group_dim),
                }
                for g in self.groups
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load strengths and step count. Nothing is changed if the state is of another model.

        Raises:
            ValueError: ``state`` is not a WeightPenalty's, or its groups, parameter names or (with
                a group term) dimensions of groups are not those of this penalty, or a strength is
                negative or not finite.
        """
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']}")
            saved = dict(state["groups"])
            names = {label: list(g["names"]) for label, g in saved.items()}
            strengths = {k: {n: g[n] for n in _STRENGTHS} for k, g in saved.items()}
            dims = {label: g.get("group_dim") for label, g in saved.items()}
            steps, half = int(state["steps"]), bool(state["half"])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{OP}: this is no state of a WeightPenalty (version 1): {error!r}"
            ) from error
        here = {g.label: g for g in self.groups}
        if set(saved) != set(here):
            raise ValueError(
                f"{OP}: the state has groups {sorted(saved)}, this penalty has {sorted(here)}"
            )
        for label, g in here.items():
            if [self._wrapped.get(name, name) for name in names[label]] != g.names:
                raise ValueError(f"{OP}: group '{label}' of the state names other parameters")
            _check_strengths(strengths[label], f"{OP}.load_state_dict")
            # States of before do not have them.
            if strengths[label]["group"] and dims[label] not in (None, g.group_dim):
                raise ValueError(
                    f"{OP}: group '{label}' of the state has groups along "
                    f"dimensions {dims[label]} of its parameters, this penalty has {g.group_dim}"
                )
        for label, g in here.items():
            g.l1, g.l2, g.group = (float(s) for s in strengths[label].values())
        self.steps, self.half = steps, half

    def __repr__(self) -> str:
        lines = [f"WeightPenalty(half={self.half}"]
        if self.schedule is not None:
            lines[0] += f", step {self.steps}, factor {self.factor:g}"
        for g in self.groups:
            if not g.names:
                continue
            # A parameter of a lazy module has no size before the first forward.
            numel = sum(0 if nn.parameter.is_lazy(p) else p.numel() for p in g.params)
            lines.append(
                f"  {g.label}: l1={g.l1:g}, l2={g.l2:g}, group={g.group:g} on "
                f"{len(g.names)} tensors, {numel:,} elements: {_shortened(g.names)}"
            )
        if self.excluded:
            lines.append(f"  not penalized: {_shortened(self.excluded)}")
        if self._tied:
            lines.append(f"  tied: {_shortened(self._tied)}")
        return "\n".join(lines) + "\n)"


class AttachedPenalty:
    """A penalty that is added before each step of an optimizer, until :meth:`remove`.

    Returned by :meth:`fusereg.WeightPenalty.attach`.

    Attributes:
        value: the penalty of the optimizer's parameters at the last step: a 0-d tensor on their
            device; None before the first step that added a gradient.
    """

    def __init__(
        self, penalty: WeightPenalty, optimizer: torch.optim.Optimizer, count_steps: bool
    ) -> None:
        self.value: Tensor | None = None
        self._penalty = penalty
        self._count_steps = count_steps
        inner = innermost(optimizer, f"{OP}.attach", "a torch.optim.Optimizer")
        penalized = {id(p) for g in penalty.groups for p in g.params}
        if penalized and not any(id(p) in penalized for p in _held(inner)):
            raise ValueError(
                f"{OP}.attach: optimizer holds no parameter that is penalized; is "
                "it another model's? After parameters were replaced, call refresh()"
            )
        hooks = inner._optimizer_step_pre_hooks.values()
        if any(getattr(getattr(h, "__self__", None), "_penalty", None) is penalty for h in hooks):
            raise ValueError(
                f"{OP}.attach: the penalty is attached to this optimizer already, "
                "and would count twice; call remove() of what attach() returned first"
            )
        own = {id(p) for p in _held(inner)} & penalized
        for _, other in _attached_to(penalty):
            if any(id(p) in own for p in _held(other)):
                warnings.warn(
                    f"{OP}.attach: the penalty is attached to another optimizer of some of these "
                    "parameters, and counts twice where both step with the same gradients; call "
                    "remove() of what attach() returned for the one that no longer steps",
                    stacklevel=3,
                )
        self._handles = (
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(self._after),
        )
        self._optimizer = weakref.ref(inner)
        _attached.add(self)

    def remove(self) -> None:
        """Detach the penalty from the optimizer. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        _attached.discard(self)

    def _before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if given is None:
            self._add(optimizer)
            return None
        # The closure computes the gradients, perhaps several times in one step.
        closure = self._around(optimizer, given)
        if len(args) > 1:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def _around(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        def with_penalty() -> Any:
            loss = closure()
            if not self._add(optimizer) or loss is None or self.value is None:
                return loss
            value = self.value
            return loss + (value.to(loss.device) if isinstance(loss, Tensor) else float(value))

        return with_penalty

    def _add(self, optimizer: Any) -> bool:
        scale = getattr(optimizer, "grad_scale", None)
        added = add_for(self._penalty, optimizer, scale)
        if added is not None:
            self.value = added
        return added is not None

    def _after(self, optimizer: Any, *_: Any) -> None:
        if self._count_steps and not skips_step(optimizer):
            self._penalty.steps += 1


#: All that are attached.
_attached: weakref.WeakSet[AttachedPenalty] = weakref.WeakSet()


def _attached_to(penalty: WeightPenalty) -> list[tuple[AttachedPenalty, Any]]:
    """Return what attaches a penalty, each with its optimizer, while that exists."""
    found = [(a, a._optimizer()) for a in _attached if a._penalty is penalty]
    return [(attached, optimizer) for attached, optimizer in found if optimizer is not None]


def _check_not_attached(penalty: WeightPenalty, only: list[Tensor] | None) -> None:
    """Raise if the next step of an optimizer adds the gradient of some of the parameters, too."""
    for _, optimizer in _attached_to(penalty):
        held = {id(p) for p in _held(optimizer)}
        chosen = (p for g in penalty.groups for p in g.params) if only is None else only
        if any(id(p) in held for p in chosen):
            raise ValueError(
                f"{OP}.add_grad_: the penalty is attached to an optimizer, whose step adds the "
                "gradient, so that it would count twice; leave this call out, or call remove() of "
                "what attach() returned first. penalty.penalty() returns the value"
            )


def skips_step(optimizer: Any) -> bool:
    """Return whether a GradScaler's overflow makes a step that runs on the device change nothing.

    The scaler does not call the step of other optimizers then, and waits for the device as this
    does.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0.0


def add_for(penalty: WeightPenalty, optimizer: Any, grad_scale: Tensor | None) -> Tensor | None:
    """Add the gradient for the optimizer's parameters; return None if none of them has a gradient.

    A step without any gradient is a skipped step, which the penalty must not turn into a real one.
    """
    own = _held(optimizer)
    if all(p.grad is None for p in own):
        penalty._check_current()  # as those that have gradients now may be new ones
        return None
    return penalty._sum_of(add_grads, penalty._listed(own), grad_scale)


def _held(optimizer: Any) -> list[Tensor]:
    """Return an optimizer's parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def innermost(optimizer: Any, where: str, wanted: str) -> torch.optim.Optimizer:
    """Return the optimizer inside wrappers such as Accelerate's; raise unless it is one."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    check_type(optimizer, torch.optim.Optimizer, f"{where}: optimizer", wanted)
    return cast(torch.optim.Optimizer, optimizer)


def check_given(strengths: Iterable[object], rules: Mapping[Key, Rule] | None) -> None:
    """Raise if a penalty has no strength at all: it would do nothing."""
    if all(s is UNSET for s in strengths) and not any((rules or {}).values()):
        raise ValueError(f"{OP}: no strength is given; pass l1, l2 or group, or rules with some")


def _check_strengths(values: Mapping[str, Any], where: str) -> dict[str, float]:
    checked = {}
    for name, strength in values.items():
        if name not in _STRENGTHS:
            raise ValueError(f"{where}: unknown strength '{name}'; known: l1, l2, group")
        checked[name] = check_number(strength, f"{where}: {name}")
    return checked


def _check_group_dim(dim: Any, where: str) -> int | None:
    if dim is not None and not checks.is_integer(dim):
        raise TypeError(f"{where}: group_dim must be an int or None, got {type(dim).__name__}")
    return dim


def _group_dim(given: int | None, name: str, param: Tensor, module: nn.Module) -> int:
    """Return the dimension of a parameter's groups, not negative: the given one, or the outputs."""
    lazy = nn.parameter.is_lazy(param)
    if given is None:
        return _params.output_dim(module) if lazy or param.dim() > 1 else 0
    if lazy:
        return given
    return dimension_of(param, given, f"{OP}: group_dim", name)


def _label(key: Key) -> str:
    return key if isinstance(key, str) else key.__name__


def _hints(
    keys: Keys, unmatched: Iterable[Key], items: Sequence[Named], reasons: Mapping[str, str]
) -> str:
    """Say why parameters that a key selects do not count under it."""
    hints = []
    for key in sorted(unmatched, key=_label):
        for item in items:
            if (tied := keys.tied(key, item)) is not None:
                hints.append(f"{tied} is tied to {item.name}, under which it counts")
            elif item.name in reasons and keys.match(key, item):
                hints.append(f"{item.name} is {reasons[item.name]}")
    return f"{_shortened(hints, 3)}; " if hints else ""


def _shortened(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
