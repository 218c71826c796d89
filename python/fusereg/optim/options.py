"""Arguments that all optimizers share: their types and their documentation."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from ..core.groups import Groups
from ..core.hints import check_names, public_class
from ..penalty.coupled import Weights

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Number: TypeAlias = float | Tensor


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer."""

    l1: Number
    l2: Number
    max_grad_norm: float | None
    master_weights: bool
    ema_decay: Number | None
    maximize: bool
    foreach: bool | None
    differentiable: bool
    fused: bool | None


class Options(CommonOptions, total=False):
    """Keyword arguments of every optimizer with a proximal step."""

    group: Number
    group_dim: int
    prox: bool | str
    groups: Groups | None
    group_weights: Weights


DEFAULTS: Options = {
    "l1": 0.0,
    "l2": 0.0,
    "group": 0.0,
    "group_dim": 0,
    "prox": True,
    "groups": None,
    "group_weights": "size",
    "max_grad_norm": None,
    "master_weights": False,
    "ema_decay": None,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}

#: Keys of a param group that torch's optimizers do not have, or not all of them.
OWN = ("l1", "l2", "group", "group_dim", "prox", "master_weights", "ema_decay", "fused")
#: Arguments of other optimizers, and what to do instead where one here does not have them.
ELSEWHERE = {
    "nesterov": "SGD has it, and NAdam is Adam with it",
    "momentum": "the first of betas is it, where there are betas",
    "amsgrad": "Adam and AdamW have it",
    "group": "a step with group has no closed form here; Adagrad takes one",
    "prox": "the step of FTRL is a proximal one",
    "use_ema": "give ema_decay",
    "clipvalue": "call fusereg.optim.clip_grad_value_ before the step",
    "bias_correction": "it is always on",
    "correct_bias": "it is always on",
}
#: What some call a strength or an option.
_OTHER_NAMES = {
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("regularization", "regularizer", "reg", "penalty"), "l1 or l2"),
    **dict.fromkeys(("strength", "lambda"), "l1 or l2"),
    **dict.fromkeys(("maxnorm", "maxgradnorm"), "max_grad_norm of the optimizer"),
    "elasticnet": "l1 and l2",
    "lasso": "l1",
    "ridge": "l2",
    "grouplasso": "group",
    "learningrate": "lr",
}


def meant(key: str, known: Iterable[str]) -> str | None:
    """Return what an unknown key of a param group seems to mean, None if it is another matter.

    Users and schedulers keep things of their own in param groups (``"name"``, ``"lr_scale"``,
    ``"initial_lr"``), which are let be.
    """
    plain = key.lower().replace("_", "").replace("-", "").strip()
    by_plain = {name.replace("_", ""): name for name in known}
    if plain in by_plain:
        return by_plain[plain]
    if plain in _OTHER_NAMES:
        return _OTHER_NAMES[plain]
    for name in ("l1", "l2"):
        if name in by_plain and plain.startswith(name):
            return name
    for prefix, what in (
        ("lambda", ""),
        ("group", "group"),
        ("weight", "weight_decay"),
        ("reg", ""),
    ):
        rest = plain.removeprefix(prefix)
        if rest in ("l1", "l2", "lasso", "strength", "lambda", "decay", "penalty", "reg"):
            return what or (rest if rest in by_plain else "l1 or l2")
    close = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.85)
    return by_plain[close[0]] if close else None


def of_torch(name: str) -> str:
    """Return the end of an error that says to take torch's optimizer, if torch has it."""
    return f"; use torch.optim.{name}" if hasattr(torch.optim, name) else ""


def check_options(
    optimizer: object,
    op: str,
    params: object,
    given: Mapping[str, Any],
    shared: Collection[str],
) -> None:
    """Raise TypeError for a model in place of parameters, or an option that there is not.

    And ValueError for one that does nothing without another.
    """
    if isinstance(params, (torch.nn.Module, Mapping)):
        group = isinstance(params, Mapping) and "params" in params
        hint = "it in a list" if group else "model.parameters()"
        raise TypeError(
            f"{op}: params must be parameters or param groups, in a list or another iterable, got "
            f"{type(params).__name__}; pass {hint}"
        )
    unknown = [name for name in given if name not in shared]
    if unknown:
        known = list(inspect.signature(public_class(optimizer)).parameters)
        near = {name: meant(name, known) for name in unknown}
        hints = {name: f"did you mean {of}?" for name, of in near.items() if of}
        check_names(op, unknown, known, {**hints, **ELSEWHERE})
    if "group_weights" in given and given.get("groups") is None:
        raise ValueError(f"{op}: group_weights are those of groups; pass groups= as well")


PENALTY = r"""
        l1, l2, group: strengths >= 0 of the penalty :math:`R(w) = l_1 \sum |w_i| +`
            :math:`\tfrac{l_2}{2} \sum w_i^2 +` :math:`group \sum_r \sqrt{n_r} \|w_r\|_2`, r over
            the slices along dimension ``group_dim``. Numbers or 0-d tensors; each param group may
            have its own, and they may be changed between steps.
        group_dim: the dimension of the parameters whose indices are the groups; of a vector it is
            always 0. 0 are the outputs of linear layers and convolutions, 1 their inputs, and the
            outputs of transposed convolutions and of transformers' Conv1D. Each param group may
            have its own, as :func:`param_groups_weight_decay` gives it. With another than 0,
            parameters and gradients are copied for the step where their memory is not in that
            order.
        prox: ``True`` or ``"capped"``: after the update a proximal step in its metric, which gives
            weights that are exactly zero, the zeros of ``loss + R``, and spares weights that no
            gradient has reached yet; of Lion, param groups with a ``group`` term take the decoupled
            step with ``True``. ``"preconditioned"``: the same without sparing any.
            ``"decoupled"``: the proximal step of :math:`lr \cdot R`. ``False``: the (sub)gradient
            of R is added to the gradient.
        groups: what :func:`fusereg.groups_of` returns. The group term then goes over the model's
            channels, with their slices in all tensors, and ``group`` is its strength: after the
            update, and the soft-thresholding by ``l1``, follows the proximal step of
            :func:`fusereg.prox.group_lasso_` with :math:`lr \cdot group` (in SGD as ``prox`` says),
            which makes whole channels exactly zero. Where readers were asked for, the steps of
            writers and readers alternate. Param groups that share channels need the same lr,
            ``group``, ``l2`` and ``prox``; channels of which a tensor has no gradient stay.
        group_weights: with ``groups``, each channel's factor beside the strength, as ``weights`` of
            :func:`fusereg.functional.group_lasso_penalty`.
        max_grad_norm: clip the 2-norm of all gradients to this inside the step, as
            :func:`clip_grad_norm_` does before it; the gradients themselves stay as they are. The
            norm before clipping is in :attr:`grad_norm`.
        master_weights: keep a float32 copy of each float16 and bfloat16 parameter in the state
            (``"master_param"``), update the copy, and round it to the parameter. An element that
            was changed outside of the step is taken from the parameter.
        ema_decay: keep an exponential moving average of the weights in the state
            (``"ema_param"``, float32, float64 for float64 parameters), updated inside the step; see
            :meth:`averaged`. A number in [0, 1) or a 0-d tensor, which may be changed between
            steps; each param group may have its own. None: no average.
        foreach, fused, differentiable: accepted for compatibility, ignored; but
            ``differentiable=True`` is an error."""

NOTES = r"""
    All parameters are updated in one call that reads parameter, gradient and state once and writes
    parameter and state once, penalty included. Any mix of float64, float32, float16, bfloat16
    (gradients may have another dtype than their parameter; states of 16-bit parameters are
    float32), devices and layouts. DTensors are updated shard by shard. Results do not depend on the
    number of threads.

    ``lr``, ``weight_decay`` and the strengths may be tensors on the parameters' device: the kernel
    reads them there, so that a captured CUDA graph follows their changes. A ``GradScaler``'s scale
    and overflow flag are also read on the device; gradients are not unscaled in memory.

    ``state_dict()`` has torch's keys; this optimizer and ``torch.optim``'s of the same name load
    each other's. So they do through ``torch.distributed.checkpoint``, which needs
    ``planner=fusereg.optim.load_planner()`` to load a checkpoint of torch's here.

    ``torch.compile`` breaks the graph at the step, which then runs as it does without a compiler:
    there is nothing to fuse. With ``fullgraph=True`` the step is one operator in the graph, as
    :func:`clip_grad_norm_` always is, and :attr:`penalty_value` and :attr:`grad_norm` are written
    in place; make numbers that change tensors then, for torch compiles again for each new number.
    A step that the operator does not support is an error then: the first one with momentum, sparse
    gradients, gradients or states in another layout than their parameter, several devices,
    DTensors, a ``GradScaler``.

    Raises:
        TypeError, ValueError: an argument is out of its range, or at a step a parameter or gradient
            is complex, of an unsupported dtype, or shares memory with another. Nothing is changed
            then."""
