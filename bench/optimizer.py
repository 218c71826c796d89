"""Benchmark of the optimizers over lists of parameters.

The work is one step of AdamW with an elastic net, ``l1 * sum |w| + l2/2 * sum w^2``, as a proximal
step after the update: parameter, gradient and two states are read, parameter and states written, 28
bytes an element in float32. And ``clip``: the norm of all gradients, and their scaling where it is
too large: read, and here not written, for the norm stays below the limit; 4 bytes an element.

Each way to do it is written as a good user of it would:

- ``eager``: ``torch.optim.AdamW(foreach=False)``, and ``softshrink`` of each parameter.
- ``foreach``: ``torch.optim.AdamW(foreach=True)``, and the proximal step by ``torch._foreach_*``.
- ``fused + foreach prox``: ``torch.optim.AdamW(fused=True)``, and the same proximal step.
- ``fused AdamW alone``: without any penalty: what fusereg's step is to cost no more than.
- ``fusereg``: ``fusereg.optim.AdamW`` with ``l1`` and ``l2``; ``max_grad_norm`` clips as well.

For ``clip``: ``torch.nn.utils.clip_grad_norm_`` with and without foreach, and
``fusereg.optim.clip_grad_norm_``.

``host`` rows have lists of tensors with one element each: what remains is the cost of handling a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import shapes
from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .shapes import Work
from .timers import Call

LR = 1e-3
# Thousands of steps on the same weights leave most of them nonzero. No provider's time depends on
# the values.
L1 = 1e-5
L2 = 1e-4
NO_LIMIT = 1e9

STEP = "step"
CLIP = "clip"
# Elements of the parameters' dtype moved for each element of the list: see the module's text.
MOVED = {STEP: 7, CLIP: 1}
OPS = {STEP: "AdamW elastic net", CLIP: "clip_grad_norm_"}


def works(quick: bool) -> list[Work]:
    """The lists of parameters, the most telling first; ``quick``: a tiny one and a real one."""
    if quick:
        return shapes.quick_works()
    return [
        Work("resnet50", shapes.resnet50()),
        Work("2000x512", [(512,)] * 2000),
        Work("16M", [(16 * 2**20,)]),
        Work("host 2000x1", [(1,)] * 2000, host=True),
    ]


def cases(options: Options) -> list[Case]:
    """All cases: for each list and dtype the step and the clipping."""
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
    # Each of five providers has weights, gradients and states of its own (states of 16-bit weights
    # are float32), the copy two buffers, foreach and the check some temporaries.
    memory = (5 * (2 * size + 8 * elements) if mode == STEP else size) + moved + 6 * size
    return Case(
        suite="optimizer",
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


def _parameters(work: Work, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """The same ones at each call."""
    generator = torch.Generator(device=device).manual_seed(0)
    found = []
    for shape in work.shapes:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        parameter = torch.nn.Parameter(tensor.uniform_(-0.05, 0.05, generator=generator))
        parameter.grad = torch.empty_like(tensor).uniform_(-1.0, 1.0, generator=generator)
        found.append(parameter)
    return found


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    if mode == CLIP:
        return _clip_workload(_parameters(work, dtype, options.device))
    providers = _step_providers(lambda: _parameters(work, dtype, options.device))
    return Workload(providers, None if dtype.itemsize < 4 else _check_step)


# What a provider's call is checked by goes with it.
class _Step:
    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        after: Callable[[list[torch.nn.Parameter]], None] | None,
        penalized: bool = True,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.after = after
        self.penalized = penalized

    def __call__(self) -> object:
        self.optimizer.step()
        if self.after is not None:
            with torch.no_grad():
                self.after(self.parameters)
        return None


def _check_step(call: Call) -> Accuracy:
    """The step that this very provider has just made, against one in float64."""
    assert isinstance(call, _Step)
    parameter = call.parameters[0]
    assert parameter.grad is not None
    state = call.optimizer.state.get(parameter, {})
    zero = torch.zeros_like(parameter)
    t = float(state.get("step", 0.0)) + 1
    g = parameter.grad.double()
    m = 0.9 * state.get("exp_avg", zero).double() + 0.1 * g
    v = 0.999 * state.get("exp_avg_sq", zero).double() + 0.001 * g * g
    update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    wanted = parameter.detach().double() * (1 - LR * 0.01) - LR * update
    if call.penalized:
        wanted = wanted.sign() * (wanted.abs() - LR * L1).clamp_min(0.0) / (1 + LR * L2)
    call()
    # Relative to the step: an error of the proximal step shows beside weights a thousand times it.
    error = float((parameter.detach().double() - wanted).abs().max()) / LR
    return Accuracy(error, 1e-4, "step")


def _step_providers(new: Callable[[], list[torch.nn.Parameter]]) -> list[Provider]:
    import fusereg

    def eager() -> Call:
        p = new()
        return _Step(p, torch.optim.AdamW(p, lr=LR, foreach=False), _eager_prox)

    def foreach() -> Call:
        p = new()
        return _Step(p, torch.optim.AdamW(p, lr=LR, foreach=True), _foreach_prox)

    def fused() -> Call:
        p = new()
        return _Step(p, torch.optim.AdamW(p, lr=LR, fused=True), _foreach_prox)

    def alone() -> Call:
        p = new()
        return _Step(p, torch.optim.AdamW(p, lr=LR, fused=True), None, penalized=False)

    def own() -> Call:
        p = new()
        return _Step(p, fusereg.optim.AdamW(p, lr=LR, l1=L1, l2=L2), None)

    return [
        Provider(EAGER, eager, note="torch.optim.AdamW(foreach=False), softshrink and mul_"),
        Provider("foreach", foreach, note="torch.optim.AdamW(foreach=True), torch._foreach_* prox"),
        Provider(
            "fused + foreach prox", fused, note="torch.optim.AdamW(fused=True), the same prox"
        ),
        Provider("fused AdamW alone", alone, note="torch.optim.AdamW(fused=True), no penalty"),
        Provider("fusereg", own, note="fusereg.optim.AdamW(l1=, l2=)"),
    ]


def _eager_prox(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        p.copy_(torch.nn.functional.softshrink(p, LR * L1)).mul_(1 / (1 + LR * L2))


def _foreach_prox(parameters: list[torch.nn.Parameter]) -> None:
    # w - clamp(w, -t, t) is soft thresholding, in the fewest passes.
    weights: list[torch.Tensor] = list(parameters)
    clamped = list(torch._foreach_clamp_max(weights, LR * L1))
    torch._foreach_clamp_min_(clamped, -LR * L1)
    torch._foreach_sub_(weights, clamped)
    torch._foreach_mul_(weights, 1 / (1 + LR * L2))


def _clip_workload(parameters: list[torch.nn.Parameter]) -> Workload:
    import fusereg

    def eager() -> object:
        return torch.nn.utils.clip_grad_norm_(parameters, NO_LIMIT, foreach=False)

    def foreach() -> object:
        return torch.nn.utils.clip_grad_norm_(parameters, NO_LIMIT, foreach=True)

    def own() -> object:
        return fusereg.optim.clip_grad_norm_(parameters, NO_LIMIT)

    def check(call: Call) -> Accuracy:
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        wanted = math.sqrt(float(torch.stack(squares).sum()))
        norm = call()
        came = float(norm) if isinstance(norm, torch.Tensor) else math.nan
        low = parameters[0].dtype.itemsize < 4
        return Accuracy(abs(came - wanted) / wanted, 1e-2 if low else 1e-4, "norm")

    return Workload(
        [
            Provider(EAGER, lambda: eager, note="torch.nn.utils.clip_grad_norm_(foreach=False)"),
            Provider("foreach", lambda: foreach, note="torch.nn.utils.clip_grad_norm_"),
            Provider("fusereg", lambda: own, note="fusereg.optim.clip_grad_norm_"),
        ],
        check,
    )
