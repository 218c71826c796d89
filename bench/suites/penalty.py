"""Benchmark of the penalties and proximal steps over lists of parameters.

The work is ``l1 * sum |w| + l2/2 * sum w^2`` over all tensors of a list, in three modes:

- ``value``: the value alone. By contract each element is read once: 4 bytes, or 2 in bfloat16.
- ``value+gradient``: the value, and the gradient ``l1 * sign(w) + l2 * w`` added into ``.grad``.
  The weight is read, the gradient read and written: 12 bytes, or 6.
- ``prox``: soft thresholding of the weights in place. Read and written: 8 bytes, or 4.

Each way to do it is written as a good user of it would:

- ``eager``: the obvious way. The loss from ``abs().sum()`` and ``pow(2).sum()`` of each tensor, and
  ``backward()``; for prox, ``softshrink`` of each tensor, copied back.
- ``formula``: for prox, sign(w) * max(|w| - t, 0) spelled out, which is what most code has.
- ``foreach``: ``torch._foreach_*`` over the lists, with the fewest passes known to the authors.
- ``torch.compile``: the formula written out (value and gradient together, without autograd, which
  costs further passes), the whole list in one graph. A graph of thousands of tensors takes
  minutes, so beyond 256 tensors one compiled function is called for each tensor.
- ``fusereg``: ``elastic_net_penalty``, ``add_penalty_grad_`` or ``prox.l1_``; and
  ``WeightPenalty.add_grad_``, which is the same kernel behind the interface for training code.

- ``group prox``: the proximal step of the group lasso over ResNet-50's channels, each with its
  slices in all tensors that write it: convolutions, scales and shifts, along the residual streams.
  By contract weights are read and written: 8 bytes; a channel's second reading is from cache.
  ``eager`` sums and scales tensor by tensor, ``by channel`` channel by channel; ``rows alone`` is
  ``prox.group_lasso_`` of the same tensors, whose groups are rows of one tensor.
  ``Torch-Pruning`` is ``GroupNormPruner.regularize`` of a ResNet-50: other work with the same aim,
  a ridge on the channels and on what reads them.

``host`` rows have lists of tensors with one element each: what remains is the cost of handling a
tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fusereg
from fusereg.core.groups import CoupledChannels, Groups, Member

from ..harness import EAGER, Accuracy, Call, Case, Options, Provider, Workload, largest
from ..harness.layers import compiled as by_compiler
from ..harness.layers import tolerances
from ..harness.shapes import Work, gpt2_small, list_cases, resnet50, resnet50_channels, works
from .augment import torchvision_transforms

PROVIDERS = (
    *(EAGER, "formula", "foreach", "torch.compile", "fusereg", "WeightPenalty"),
    *("rows alone", "by channel", "Torch-Pruning"),
)

L1 = 1e-5
L2 = 1e-4
# Weights are within 0.05, so thousands of calls on the same ones leave most of them nonzero. No
# provider's time depends on the values.
THRESHOLD = 1e-5

VALUE = "value"
VALUE_GRADIENT = "value+gradient"
PROX = "prox"
GROUP_PROX = "group prox"

# Name of the operation, and elements moved for each element of the list: see the module's text.
MODES = {VALUE: ("elastic net", 1), VALUE_GRADIENT: ("elastic net", 3), PROX: ("soft threshold", 2)}

WHOLE_LIST_GRAPH_LIMIT = 256

Tensors = list[torch.Tensor]


def cases(options: Options) -> list[Case]:
    """Return all cases: for each list and dtype the three modes."""
    large = [Work("64M", [(64 * 2**20,)]), Work("gpt2", gpt2_small())]
    by_channel = {GROUP_PROX: ("group lasso of channels", 2)}
    return [
        *list_cases(options, works(options.quick, large), MODES, _setup, _memory),
        *list_cases(options, [Work("resnet50", resnet50())], by_channel, _setup, _memory),
    ]


def _memory(work: Work, mode: str, size: int) -> int:
    """Bound the memory: weights, gradients, eager's temporaries, the check in float64."""
    return 7 * size + 12 * max(map(math.prod, work.shapes))


class _Data:
    """The parameters of one case and their gradients, shared by all its providers."""

    def __init__(self, work: Work, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        parameters = work.parameters(dtype, device)
        if mode == VALUE_GRADIENT:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.dtype = dtype
        self.parameters: Tensors = list(parameters)
        self.detached = [parameter.detach() for parameter in parameters]
        self.gradients = [p.grad for p in parameters if p.grad is not None]


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    data = _Data(work, mode, dtype, options.device)
    providers, check = {
        VALUE: (_value_providers, _check_value),
        VALUE_GRADIENT: (_value_gradient_providers, _check_value_gradient),
        PROX: (_prox_providers, _check_prox),
        GROUP_PROX: (_group_providers, _check_groups),
    }[mode]
    return Workload(providers(data), lambda call: check(data, call))


# --- providers ------------------------------------------------------------------------------------


def _calls(*calls: Call, **notes: str) -> list[Provider]:
    """Return providers by the names of functions, with their notes."""
    names = [
        getattr(call, "__name__", "").replace("own", "fusereg").replace("_", " ") for call in calls
    ]
    return [
        Provider(name, lambda call=call: call, note=notes.get(name, ""))  # type: ignore[misc]
        for name, call in zip(names, calls, strict=True)
    ]


def _value_providers(data: _Data) -> list[Provider]:
    parameters = data.parameters

    @torch.no_grad()
    def eager() -> object:
        l1_term = _total(p.abs().sum() for p in parameters)
        return L1 * l1_term + L2 / 2 * _total(p.pow(2).sum() for p in parameters)

    @torch.no_grad()
    def foreach() -> object:
        return _foreach_value(parameters)

    @torch.no_grad()
    def own() -> object:
        return fusereg.functional.elastic_net_penalty(parameters, L1, L2)

    return [*_calls(eager, foreach), _compiled(data.detached, [], _formula_value), *_calls(own)]


def _value_gradient_providers(data: _Data) -> list[Provider]:
    parameters, gradients = data.parameters, data.gradients

    def eager() -> object:
        l1_term = _total(p.abs().sum() for p in parameters)
        loss = L1 * l1_term + L2 / 2 * _total(p.pow(2).sum() for p in parameters)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def foreach() -> object:
        value = _foreach_value(parameters)
        torch._foreach_add_(gradients, parameters, alpha=L2)
        torch._foreach_add_(gradients, torch._foreach_sign(parameters), alpha=L1)
        return value

    def own() -> object:
        return fusereg.add_penalty_grad_(parameters, l1=L1, l2=L2)

    def weight_penalty() -> Call:
        module = torch.nn.Module()
        for index, parameter in enumerate(parameters):
            assert isinstance(parameter, torch.nn.Parameter)
            module.register_parameter(f"weight{index}", parameter)
        # exclude=(): the same elements as the others, biases and norms too.
        return fusereg.WeightPenalty(module, l1=L1, l2=L2, exclude=()).add_grad_

    return [
        *_calls(eager, foreach),
        _compiled(data.detached, gradients, _formula_value_gradient),
        *_calls(own),
        Provider("WeightPenalty", weight_penalty, note="fusereg.WeightPenalty(...).add_grad_()"),
    ]


def _prox_providers(data: _Data) -> list[Provider]:
    parameters = data.parameters

    @torch.no_grad()
    def eager() -> None:
        for p in parameters:
            p.copy_(torch.nn.functional.softshrink(p, THRESHOLD))

    @torch.no_grad()
    def formula() -> None:
        for p in parameters:
            p.copy_(p.sign() * (p.abs() - THRESHOLD).clamp(min=0))

    @torch.no_grad()
    def foreach() -> None:
        # w - clamp(w, -t, t) is soft thresholding, in three passes; the form with sign and abs
        # takes six.
        clamped = list(torch._foreach_clamp_max(parameters, THRESHOLD))
        torch._foreach_clamp_min_(clamped, -THRESHOLD)
        torch._foreach_sub_(parameters, clamped)

    def own() -> None:
        fusereg.prox.l1_(parameters, THRESHOLD)

    return [
        *_calls(
            *(eager, formula, foreach),
            eager="torch.nn.functional.softshrink and copy_",
            formula="sign(w) * clamp(|w| - t, min=0) and copy_",
        ),
        _compiled(data.detached, [], _formula_prox),
        *_calls(own),
    ]


def _groups(data: _Data) -> Groups:
    """Return ResNet-50's channels over the parameters."""
    sets = []
    for k, writers in enumerate(resnet50_channels()):
        size = data.parameters[writers[0]].shape[0]
        members = [Member(str(i), data.parameters[i], 0, torch.arange(size)) for i in writers]
        sets.append(CoupledChannels(str(k), size, tuple(members), (), None))
    return Groups(sets)


def _group_steps(tensors: Tensors, threshold: float, sets: list[list[int]]) -> None:
    """Take the step of sets of channels by torch's operations, tensor by tensor."""
    for writers in sets:
        own = [tensors[i] for i in writers]
        squares = torch.stack([w.flatten(1).square().sum(1) if w.dim() > 1 else w * w for w in own])
        size = sum(w.numel() // len(w) for w in own)
        factor = (1 - threshold * size**0.5 / squares.sum(0).sqrt()).clamp_min(0)
        for w in own:
            w.mul_(factor.view(-1, *(1,) * (w.dim() - 1)))


def _group_providers(data: _Data) -> list[Provider]:
    groups, parameters, sets = _groups(data), data.parameters, resnet50_channels()
    rows = [parameters[i] for writers in sets for i in writers]

    @torch.no_grad()
    def eager() -> None:
        _group_steps(parameters, THRESHOLD, sets)

    def own() -> None:
        fusereg.prox.group_lasso_(groups, THRESHOLD)

    def rows_alone() -> None:
        fusereg.prox.group_lasso_(rows, THRESHOLD)

    @torch.no_grad()
    def by_channel() -> None:
        for writers in sets:
            for rows in zip(*(parameters[i] for i in writers), strict=True):
                size = sum(row.numel() for row in rows)
                norm = torch.stack([row.square().sum() for row in rows]).sum().sqrt()
                factor = (1 - THRESHOLD * size**0.5 / norm).clamp_min(0)
                for row in rows:
                    row.mul_(factor)

    def regularize() -> Call:
        import torch_pruning as tp

        torchvision_transforms()  # or torchvision cannot be imported beside torch for the CPU
        import torchvision

        model = torchvision.models.resnet50().to(parameters[0].device, data.dtype)
        x = torch.zeros(1, 3, 64, 64, device=parameters[0].device, dtype=data.dtype)
        pruner = tp.pruner.GroupNormPruner(
            model, x, tp.importance.GroupMagnitudeImportance(), ignored_layers=[model.fc]
        )
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return _Regularize(pruner, model)

    note = {"rows alone": "groups within each tensor: other results"}
    theirs = Provider("Torch-Pruning", regularize, note="GroupNormPruner.regularize: other work")
    return [*_calls(eager, own, rows_alone, by_channel, **note), theirs]


class _Regularize:
    """Torch-Pruning's call, which adds to gradients."""

    def __init__(self, pruner: Any, model: torch.nn.Module) -> None:
        self.pruner, self.model = pruner, model

    def __call__(self) -> None:
        self.pruner.regularize(self.model)


def _total(values: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the built-in sum, typed as a tensor."""
    return torch.as_tensor(sum(values))


def _foreach_value(parameters: Tensors) -> torch.Tensor:
    l1_norms = torch._foreach_norm(parameters, 1)
    l2_norms = torch._foreach_norm(parameters, 2)
    return L1 * torch.stack(l1_norms).sum() + L2 / 2 * torch.stack(l2_norms).square().sum()


# The input of torch.compile. In float32 whatever the dtype is: that is free inside a fused loop.


def _formula_value(weights: Tensors, gradients: Tensors) -> torch.Tensor:
    values = []
    for weight in weights:
        w = weight.float()
        values.append((L1 * w.abs() + L2 / 2 * w * w).sum())
    return torch.stack(values).sum()


def _formula_value_gradient(weights: Tensors, gradients: Tensors) -> torch.Tensor:
    values = []
    for weight, gradient in zip(weights, gradients, strict=True):
        w = weight.float()
        values.append((L1 * w.abs() + L2 / 2 * w * w).sum())
        gradient.add_(L1 * w.sign() + L2 * w)
    return torch.stack(values).sum()


def _formula_prox(weights: Tensors, gradients: Tensors) -> None:
    for weight in weights:
        weight.copy_(weight - weight.clamp(-THRESHOLD, THRESHOLD))


Formula = Callable[[Tensors, Tensors], torch.Tensor | None]


def _compiled(weights: Tensors, grads: Tensors, formula: Formula) -> Provider:
    """Return torch.compile's provider: one graph of the whole list, or one for each tensor."""
    parts, note = [(weights, grads)], ""
    if len(weights) > WHOLE_LIST_GRAPH_LIMIT:
        parts = [(weights[i : i + 1], grads[i : i + 1]) for i in range(len(weights))]
        note = f"compiled for one tensor and called {len(weights)} times: one graph takes minutes"

    def make() -> Call:
        compiled = by_compiler(formula)
        failure: BaseException | None = None
        with _fresh_compiler_cache(), torch.no_grad():
            # An error that passes through torch's cache manager would make it leave its folder.
            try:
                compiled(*parts[0])
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

        @torch.no_grad()
        def call() -> object:
            values = [compiled(*part) for part in parts]
            return values[0] if len(values) == 1 or values[0] is None else torch.stack(values).sum()

        return call

    return Provider("torch.compile", make, compiles=True, note=note)


@contextlib.contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Compile anew, and stop the compiler's worker processes afterwards.

    They would use the cores that are being measured. Both are private to torch, so a version
    without them is fine.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor.async_compile import shutdown_compile_workers

            stack.callback(shutdown_compile_workers)
        yield


# --- checks ---------------------------------------------------------------------------------------

# Relative, for the elementwise results: some roundings of the dtype.
_ELEMENT_TOLERANCE = tolerances(1e-12, 1e-5, 5e-3, 3e-2)
# For the value, which eager gives in the weights' dtype: that dtype's rounding, and the sum's.
_VALUE_TOLERANCE = tolerances(1e-9, 1e-4, 3e-3, 1e-2)
# Float64 copies of whole tensors of 124 million elements are not needed to compare them.
_CHUNK = 1 << 22


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    return (flat[begin : begin + _CHUNK] for begin in range(0, flat.numel(), _CHUNK))


def _reference_value(data: _Data) -> float:
    total = 0.0
    for parameter in data.detached:
        for chunk in _chunks(parameter):
            w = chunk.double()
            total += float((L1 * w.abs() + L2 / 2 * w * w).sum())
    return total


def _value_error(value: object, expected: float) -> float:
    if not isinstance(value, torch.Tensor):
        return math.nan
    return abs(float(value) - expected) / max(abs(expected), 1e-30)


def _check_value(data: _Data, call: Call) -> Accuracy:
    tolerance = _VALUE_TOLERANCE[data.dtype]
    return Accuracy(_value_error(call(), _reference_value(data)), tolerance, "value")


def _check_value_gradient(data: _Data, call: Call) -> Accuracy:
    for gradient in data.gradients:
        gradient.zero_()
    value_error = _value_error(call(), _reference_value(data))
    differences, scale = [], L1 + L2 * 0.05
    for parameter, gradient in zip(data.detached, data.gradients, strict=True):
        for weights, gradients in zip(_chunks(parameter), _chunks(gradient), strict=True):
            w = weights.double()
            difference = (gradients.double() - (L1 * w.sign() + L2 * w)).abs().max()
            differences.append(float(difference) / scale)
    # The worse of the two by its own tolerance.
    dtype, worst = data.dtype, largest(differences)
    share = value_error / _VALUE_TOLERANCE[dtype]
    if math.isnan(worst) or share <= worst / _ELEMENT_TOLERANCE[dtype]:
        return Accuracy(worst, _ELEMENT_TOLERANCE[dtype], "gradient")
    return Accuracy(value_error, _VALUE_TOLERANCE[dtype], "value")


def _check_prox(data: _Data, call: Call) -> Accuracy:
    before = [parameter.clone() for parameter in data.detached]
    call()
    errors = []
    for old, new in zip(before, data.detached, strict=True):
        for was, now in zip(_chunks(old), _chunks(new), strict=True):
            w = was.double()
            expected = w.sign() * (w.abs() - THRESHOLD).clamp_min(0.0)
            # Relative to |w| + threshold: weights below the threshold then show a call that did
            # nothing even where the dtype is too coarse for the others to move.
            relative = (now.double() - expected).abs() / (w.abs() + THRESHOLD)
            errors.append(float(relative.max()))
    return Accuracy(largest(errors), _ELEMENT_TOLERANCE[data.dtype], "result")


def _check_groups(data: _Data, call: Call) -> Accuracy:
    if isinstance(call, _Regularize):
        call()
        grads = [p.grad for p in call.model.parameters() if p.grad is not None]
        return Accuracy(0.0 if all(g.isfinite().all() for g in grads) else 1.0, 0.5, "finite")
    wanted = [parameter.double() for parameter in data.detached]
    scale = max(float(w.abs().max()) for w in wanted)
    call()
    sets = resnet50_channels()
    if getattr(call, "__name__", "") == "rows_alone":
        sets = [[i] for writers in sets for i in writers]
    _group_steps(wanted, THRESHOLD, sets)
    found = [parameter.double() for parameter in data.detached]
    worst = largest((f - w).abs().max() for f, w in zip(found, wanted, strict=True))
    return Accuracy(worst / scale, _ELEMENT_TOLERANCE[data.dtype], "result")
