"""Benchmark of the optimizers over lists of parameters.

The work is one step of AdamW with an elastic net, ``l1 * sum |w| + l2/2 * sum w^2``, as a proximal
step after the update: parameter, gradient and two states are read, parameter and states written, 28
bytes an element in float32. ``average``: a step of AdamW without a penalty, and an exponential
moving average of the weights: one more state, 36 bytes. ``clip``: the norm of all gradients, and
their scaling where it is too large: read, and here not written, for the norm stays below the limit;
4 bytes an element.

Each way to do it is written as a good user of it would:

- ``eager``: ``torch.optim.AdamW(foreach=False)``, and ``softshrink`` of each parameter.
- ``foreach``: ``torch.optim.AdamW(foreach=True)``, and the proximal step by ``torch._foreach_*``.
- ``fused + foreach prox``: ``torch.optim.AdamW(fused=True)``, and the same proximal step.
- ``fused AdamW alone``: without any penalty: what fusereg's step is to cost no more than.
- ``fusereg``: ``fusereg.optim.AdamW`` with ``l1`` and ``l2``; ``max_grad_norm`` clips as well.

For ``average``: torch's AdamW and ``lerp_`` of each average or ``torch._foreach_lerp_`` of all, as
``AveragedModel`` takes it; ``fusereg.optim.AdamW`` with ``ema_decay``.

For ``clip``: ``torch.nn.utils.clip_grad_norm_`` with and without foreach, and
``fusereg.optim.clip_grad_norm_``.

``host`` rows have lists of tensors with one element each: what remains is the cost of handling a
tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import fusereg

from ..harness import EAGER, Accuracy, Call, Case, Options, Provider, Workload
from ..harness.shapes import Work, count, list_cases, works

FUSED_PROX, FUSED_ALONE = "fused + foreach prox", "fused AdamW alone"
FUSED_AVERAGE = "fused + foreach average"
PROVIDERS = (EAGER, "foreach", FUSED_PROX, FUSED_AVERAGE, FUSED_ALONE, "fusereg")

LR = 1e-3
# Thousands of steps on the same weights leave most of them nonzero. No provider's time depends on
# the values.
L1 = 1e-5
L2 = 1e-4
NO_LIMIT = 1e9
DECAY = 0.999

STEP = "step"
AVERAGE = "average"
CLIP = "clip"
# Name of the operation, and elements of the parameters' dtype moved for each element of the list:
# see the module's text.
MODES = {
    STEP: ("AdamW elastic net", 7),
    AVERAGE: ("AdamW and average", 9),
    CLIP: ("clip_grad_norm_", 1),
}

Parameters = list[torch.nn.Parameter]


def cases(options: Options) -> list[Case]:
    """Return all cases: for each list and dtype the step and the clipping."""
    large = [Work("16M", [(16 * 2**20,)])]
    return list_cases(options, works(options.quick, large), MODES, _setup, _memory)


def _memory(work: Work, mode: str, size: int) -> int:
    """Bound the memory: five providers' weights, gradients and states, and some temporaries."""
    # States of 16-bit weights are float32.
    providers = size if mode == CLIP else 5 * (2 * size + 12 * count(work.shapes))
    return 6 * size + providers


def _parameters(work: Work, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Return the parameters with gradients, the same ones at each call."""
    generator = torch.Generator(device=device).manual_seed(1)
    found = work.parameters(dtype, device)
    for parameter in found:
        parameter.grad = torch.empty_like(parameter).uniform_(-1.0, 1.0, generator=generator)
    return found


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    def new() -> Parameters:
        return _parameters(work, dtype, options.device)

    if mode == CLIP:
        return _clip_workload(new())
    providers = _step_providers if mode == STEP else _average_providers
    return Workload(providers(new), None if dtype.itemsize < 4 else _check_step)


class _Step:
    """A provider's call, with the parameters and the optimizer by which it is checked."""

    def __init__(
        self,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
        after: Callable[[Parameters], None] | None,
        penalized: bool = False,
        averages: list[torch.Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.after = after
        self.penalized = penalized
        self.averages = averages

    def average(self) -> torch.Tensor | None:
        """Return the first parameter's average, where there is one."""
        own = self.optimizer.state[self.parameters[0]].get("ema_param")
        return own if self.averages is None else self.averages[0]

    def __call__(self) -> object:
        self.optimizer.step()
        if self.after is not None:
            with torch.no_grad():
                self.after(self.parameters)
        return None


def _check_step(call: Call) -> Accuracy:
    """Check the provider's next step against one in float64."""
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
    before = call.average()
    average = None if before is None else before.double()
    call()
    error = 0.0
    if average is not None and (after := call.average()) is not None:
        way = (1 - DECAY) * (wanted - average)
        # A thousandth of the way of the weights: two digits of it in float32.
        error = 1e-2 * float((after.double() - average - way).abs().max() / way.abs().max())
    # Relative to the step: an error of the proximal step shows beside weights a thousand times it.
    error = max(error, float((parameter.detach().double() - wanted).abs().max()) / LR)
    return Accuracy(error, 1e-4, "step")


def _step_providers(new: Callable[[], Parameters]) -> list[Provider]:
    def torchs(
        name: str, after: Callable[[Parameters], None] | None, note: str, **kind: Any
    ) -> Provider:
        def make() -> Call:
            p = new()
            return _Step(p, torch.optim.AdamW(p, lr=LR, **kind), after, after is not None)

        shown = ", ".join(f"{key}={value}" for key, value in kind.items())
        return Provider(name, make, note=f"torch.optim.AdamW({shown}), {note}")

    def own() -> Call:
        p = new()
        # The proximal step that the others can take: torch's AdamW hides its metric.
        optimizer = fusereg.optim.AdamW(p, lr=LR, l1=L1, l2=L2, prox="decoupled")
        return _Step(p, optimizer, None, penalized=True)

    return [
        torchs(EAGER, _eager_prox, "softshrink and mul_", foreach=False),
        torchs("foreach", _foreach_prox, "torch._foreach_* prox", foreach=True),
        torchs(FUSED_PROX, _foreach_prox, "the same prox", fused=True),
        torchs(FUSED_ALONE, None, "no penalty", fused=True),
        Provider("fusereg", own, note='fusereg.optim.AdamW(l1=, l2=, prox="decoupled")'),
    ]


def _average_providers(new: Callable[[], Parameters]) -> list[Provider]:
    def eager(averages: list[torch.Tensor], weights: Parameters) -> None:
        for a, p in zip(averages, weights, strict=True):
            a.lerp_(p, 1 - DECAY)

    def foreach(averages: list[torch.Tensor], weights: Parameters) -> None:
        torch._foreach_lerp_(averages, list[torch.Tensor](weights), 1 - DECAY)

    def torchs(name: str, average: Callable[..., None] | None, **kind: Any) -> Provider:
        def make() -> Call:
            p = new()
            averages = [w.detach().clone() for w in p] if average is not None else None
            after = None if average is None else functools.partial(average, averages)
            return _Step(p, torch.optim.AdamW(p, lr=LR, **kind), after, averages=averages)

        shown = ", ".join(f"{key}={value}" for key, value in kind.items())
        what = "no average" if average is None else "lerp_ of the averages"
        return Provider(name, make, note=f"torch.optim.AdamW({shown}), {what}")

    def own() -> Call:
        p = new()
        return _Step(p, fusereg.optim.AdamW(p, lr=LR, ema_decay=DECAY), None)

    return [
        torchs(EAGER, eager, foreach=False),
        torchs("foreach", foreach, foreach=True),
        torchs(FUSED_AVERAGE, foreach, fused=True),
        torchs(FUSED_ALONE, None, fused=True),
        Provider("fusereg", own, note="fusereg.optim.AdamW(ema_decay=)"),
    ]


def _eager_prox(parameters: Parameters) -> None:
    for p in parameters:
        p.copy_(torch.nn.functional.softshrink(p, LR * L1)).mul_(1 / (1 + LR * L2))


def _foreach_prox(parameters: Parameters) -> None:
    # w - clamp(w, -t, t) is soft thresholding, in the fewest passes.
    weights: list[torch.Tensor] = list(parameters)
    clamped = list(torch._foreach_clamp_max(weights, LR * L1))
    torch._foreach_clamp_min_(clamped, -LR * L1)
    torch._foreach_sub_(weights, clamped)
    torch._foreach_mul_(weights, 1 / (1 + LR * L2))


def _clip_workload(parameters: Parameters) -> Workload:
    def check(call: Call) -> Accuracy:
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        wanted = math.sqrt(float(torch.stack(squares).sum()))
        norm = call()
        came = float(norm) if isinstance(norm, torch.Tensor) else math.nan
        low = parameters[0].dtype.itemsize < 4
        return Accuracy(abs(came - wanted) / wanted, 1e-2 if low else 1e-4, "norm")

    def clipping(clip: Callable[..., object], note: str, name: str, **kind: Any) -> Provider:
        return Provider(name, lambda: lambda: clip(parameters, NO_LIMIT, **kind), note=note)

    torchs, note = torch.nn.utils.clip_grad_norm_, "torch.nn.utils.clip_grad_norm_"
    return Workload(
        [
            clipping(torchs, f"{note}(foreach=False)", EAGER, foreach=False),
            clipping(torchs, note, "foreach", foreach=True),
            clipping(fusereg.optim.clip_grad_norm_, "fusereg.optim.clip_grad_norm_", "fusereg"),
        ],
        check,
    )
