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

``host`` rows have lists of tensors with one element each: what remains is the cost of handling a
tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from . import calls, shapes
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .shapes import Work
from .timers import Call

L1 = 1e-5
L2 = 1e-4
# Weights are within 0.05, so thousands of calls on the same ones leave most of them nonzero. No
# provider's time depends on the values.
THRESHOLD = 1e-5

VALUE = "value"
VALUE_GRADIENT = "value+gradient"
PROX = "prox"

# Elements moved for each element of the list: see the module's text.
MOVED = {VALUE: 1, VALUE_GRADIENT: 3, PROX: 2}
OPS = {VALUE: "elastic net", VALUE_GRADIENT: "elastic net", PROX: "soft threshold"}

WHOLE_LIST_GRAPH_LIMIT = 256


def works(quick: bool) -> list[Work]:
    """The lists of parameters, the most telling first; ``quick``: a tiny one and a real one."""
    if quick:
        return shapes.quick_works()
    return [
        Work("resnet50", shapes.resnet50()),
        Work("2000x512", [(512,)] * 2000),
        Work("64M", [(64 * 2**20,)]),
        Work("gpt2", shapes.gpt2_small()),
        Work("host 2000x1", [(1,)] * 2000, host=True),
    ]


def cases(options: Options) -> list[Case]:
    """All cases: for each list and dtype the three modes."""
    return [
        _case(work, mode, dtype, options)
        for work in works(options.quick)
        for dtype in (options.dtypes[:1] if work.host else options.dtypes)
        for mode in MOVED
    ]


def _case(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Case:
    elements = shapes.count(work.shapes)
    size = elements * dtype.itemsize
    moved = MOVED[mode] * size
    # Weights and gradients, the copy's two buffers, up to four lists of temporaries (eager), and
    # what the check keeps in float32 and float64.
    memory = 2 * size + moved + 4 * size + 12 * max(map(math.prod, work.shapes)) + size
    return Case(
        suite="penalty",
        op=OPS[mode],
        mode=mode,
        shape=work.name,
        dtype=dtype,
        device=options.device,
        tensors=len(work.shapes),
        elements=elements,
        bytes_moved=0 if work.host else moved,
        memory=memory,
        setup=lambda: _setup(work, mode, dtype, options),
        host=work.host,
    )


# ------------------------------------------------------------------------------------------- data


class _Data:
    """The parameters of one case and their gradients, shared by all its providers."""

    def __init__(self, work: Work, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self.parameters: list[torch.nn.Parameter] = []
        for shape in work.shapes:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            tensor.uniform_(-0.05, 0.05, generator=generator)
            parameter = torch.nn.Parameter(tensor)
            if mode == VALUE_GRADIENT:
                parameter.grad = torch.zeros_like(tensor)
            self.parameters.append(parameter)

    @property
    def as_tensors(self) -> list[torch.Tensor]:
        """The parameters; a list of Parameter is not a list of Tensor to a type checker."""
        return list(self.parameters)

    @property
    def plain(self) -> list[torch.Tensor]:
        """The same memory without the need for a gradient."""
        return [parameter.detach() for parameter in self.parameters]

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    data = _Data(work, mode, dtype, options.device)
    makers: dict[str, Callable[[_Data], list[Provider]]] = {
        VALUE: _value_providers,
        VALUE_GRADIENT: _value_gradient_providers,
        PROX: _prox_providers,
    }
    checks: dict[str, Callable[[_Data, Call], Accuracy]] = {
        VALUE: _check_value,
        VALUE_GRADIENT: _check_value_gradient,
        PROX: _check_prox,
    }
    providers = makers[mode](data)
    check = checks[mode]
    return Workload(calls.affordable(providers, options), lambda call: check(data, call))


# -------------------------------------------------------------------------------------- providers


def _value_providers(data: _Data) -> list[Provider]:
    import fusereg

    parameters = data.as_tensors

    def eager() -> object:
        with torch.no_grad():
            return L1 * _total(p.abs().sum() for p in parameters) + L2 / 2 * _total(
                p.pow(2).sum() for p in parameters
            )

    def foreach() -> object:
        with torch.no_grad():
            return _foreach_value(parameters)

    def own() -> object:
        with torch.no_grad():
            return fusereg.functional.elastic_net_penalty(parameters, L1, L2)

    return [
        Provider(EAGER, lambda: eager),
        Provider("foreach", lambda: foreach),
        _compiled(data.plain, None, _formula_value),
        Provider("fusereg", lambda: own),
    ]


def _value_gradient_providers(data: _Data) -> list[Provider]:
    import fusereg

    parameters, gradients = data.as_tensors, data.gradients

    def eager() -> object:
        l1_term = _total(p.abs().sum() for p in parameters)
        l2_term = _total(p.pow(2).sum() for p in parameters)
        loss = L1 * l1_term + L2 / 2 * l2_term
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def foreach() -> object:
        with torch.no_grad():
            value = _foreach_value(parameters)
            torch._foreach_add_(gradients, parameters, alpha=L2)
            torch._foreach_add_(gradients, torch._foreach_sign(parameters), alpha=L1)
            return value

    def own() -> object:
        return fusereg.add_penalty_grad_(parameters, l1=L1, l2=L2)

    def weight_penalty() -> Call:
        module = torch.nn.Module()
        for index, parameter in enumerate(data.parameters):
            module.register_parameter(f"weight{index}", parameter)
        # exclude=(): the same elements as the others, biases and norms too.
        penalty = fusereg.WeightPenalty(module, l1=L1, l2=L2, exclude=())
        return penalty.add_grad_

    return [
        Provider(EAGER, lambda: eager),
        Provider("foreach", lambda: foreach),
        _compiled(data.plain, gradients, _formula_value_gradient),
        Provider("fusereg", lambda: own),
        Provider("WeightPenalty", weight_penalty, note="fusereg.WeightPenalty(...).add_grad_()"),
    ]


def _prox_providers(data: _Data) -> list[Provider]:
    import fusereg

    parameters = data.as_tensors

    def eager() -> object:
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.nn.functional.softshrink(p, THRESHOLD))
        return None

    def formula() -> object:
        with torch.no_grad():
            for p in parameters:
                p.copy_(p.sign() * (p.abs() - THRESHOLD).clamp(min=0))
        return None

    def foreach() -> object:
        # w - clamp(w, -t, t) is soft thresholding, in three passes; the form with sign and abs
        # takes six.
        with torch.no_grad():
            clamped = list(torch._foreach_clamp_max(parameters, THRESHOLD))
            torch._foreach_clamp_min_(clamped, -THRESHOLD)
            torch._foreach_sub_(parameters, clamped)
        return None

    def own() -> object:
        fusereg.prox.l1_(parameters, THRESHOLD)
        return None

    return [
        Provider(EAGER, lambda: eager, note="torch.nn.functional.softshrink and copy_"),
        Provider("formula", lambda: formula, note="sign(w) * clamp(|w| - t, min=0) and copy_"),
        Provider("foreach", lambda: foreach),
        _compiled(data.plain, None, _formula_prox),
        Provider("fusereg", lambda: own),
    ]


def _total(values: Iterator[torch.Tensor]) -> torch.Tensor:
    """What the built-in sum does, with a type that says so."""
    return torch.as_tensor(sum(values))


def _foreach_value(parameters: list[torch.Tensor]) -> torch.Tensor:
    l1_norms = torch._foreach_norm(parameters, 1)
    l2_norms = torch._foreach_norm(parameters, 2)
    return L1 * torch.stack(l1_norms).sum() + L2 / 2 * torch.stack(l2_norms).square().sum()


# What torch.compile is given. In float32 whatever the dtype is: that is free inside a fused loop.

Tensors = list[torch.Tensor]


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


def _compiled(weights: Tensors, gradients: Tensors | None, formula: Formula) -> Provider:
    grads = gradients if gradients is not None else []
    per_tensor = len(weights) > WHOLE_LIST_GRAPH_LIMIT

    def make() -> Call:
        compiled = calls.compiled(formula)
        failure: BaseException | None = None
        with _fresh_compiler_cache(), torch.no_grad():
            # An error that passes through torch's cache manager would make it leave its folder.
            try:
                if per_tensor:
                    compiled(weights[:1], grads[:1])
                else:
                    compiled(weights, grads)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

        def whole() -> object:
            with torch.no_grad():
                return compiled(weights, grads)

        singles = [(weights[i : i + 1], grads[i : i + 1]) for i in range(len(weights))]

        def each() -> object:
            with torch.no_grad():
                values = [compiled(weight, grad) for weight, grad in singles]
                return None if values[0] is None else torch.stack(values).sum()

        return each if per_tensor else whole

    note = ""
    if per_tensor:
        note = f"compiled for one tensor and called {len(weights)} times: one graph takes minutes"
    return Provider("torch.compile", make, compiles=True, note=note)


@contextlib.contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Compiles anew, and stops the compiler's worker processes afterwards: they would use the
    cores that are being measured. Both are private to torch, so a version without them is fine."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor.utils import fresh_cache

            stack.enter_context(fresh_cache())
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor.async_compile import shutdown_compile_workers

            stack.callback(shutdown_compile_workers)
        yield


# ------------------------------------------------------------------------------------------ checks

# Relative, for the elementwise results: some roundings of the dtype.
_ELEMENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
# For the value, which eager gives in the weights' dtype: that dtype's rounding, and the sum's.
_VALUE_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 1e-2,
}
# Float64 copies of whole tensors of 124 million elements are not needed to compare them.
_CHUNK = 1 << 22


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    return (flat[begin : begin + _CHUNK] for begin in range(0, flat.numel(), _CHUNK))


def _reference_value(data: _Data) -> float:
    total = 0.0
    for parameter in data.plain:
        for chunk in _chunks(parameter):
            w = chunk.double()
            total += float((L1 * w.abs() + L2 / 2 * w * w).sum())
    return total


def _value_error(value: object, expected: float) -> float:
    if not isinstance(value, torch.Tensor):
        return math.nan
    return abs(float(value) - expected) / max(abs(expected), 1e-30)


def _check_value(data: _Data, call: Call) -> Accuracy:
    tolerance = _VALUE_TOLERANCE[data.parameters[0].dtype]
    return Accuracy(_value_error(call(), _reference_value(data)), tolerance, "value")


def _check_value_gradient(data: _Data, call: Call) -> Accuracy:
    for gradient in data.gradients:
        gradient.zero_()
    value_error = _value_error(call(), _reference_value(data))
    worst, scale = 0.0, L1 + L2 * 0.05
    for parameter, gradient in zip(data.plain, data.gradients, strict=True):
        for weights, gradients in zip(_chunks(parameter), _chunks(gradient), strict=True):
            w = weights.double()
            difference = (gradients.double() - (L1 * w.sign() + L2 * w)).abs().max()
            worst = max(worst, float(difference) / scale)
    # The worse of the two by its own tolerance.
    dtype = data.parameters[0].dtype
    if not value_error / _VALUE_TOLERANCE[dtype] <= worst / _ELEMENT_TOLERANCE[dtype]:
        return Accuracy(value_error, _VALUE_TOLERANCE[dtype], "value")
    return Accuracy(worst, _ELEMENT_TOLERANCE[dtype], "gradient")


def _check_prox(data: _Data, call: Call) -> Accuracy:
    before = [parameter.clone() for parameter in data.plain]
    call()
    worst = 0.0
    for old, new in zip(before, data.plain, strict=True):
        for was, now in zip(_chunks(old), _chunks(new), strict=True):
            w = was.double()
            expected = w.sign() * (w.abs() - THRESHOLD).clamp_min(0.0)
            # Relative to |w| + threshold: weights below the threshold then show a call that did
            # nothing even where the dtype is too coarse for the others to move.
            relative = (now.double() - expected).abs() / (w.abs() + THRESHOLD)
            worst = max(worst, float(relative.max()))
    return Accuracy(worst, _ELEMENT_TOLERANCE[data.parameters[0].dtype], "result")
