"""Common parts of the suites of layers: cases, data, providers and the check of a mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cases import EAGER, Accuracy, Case, Options, Provider, Workload, largest
from .timers import Call

FORWARD = "forward"
OUT = "forward out"
BOTH = "forward+backward"

#: The names of :func:`providers`.
PROVIDERS = (EAGER, "torch.compile", "clone", "fusereg")

P = 0.1
"""Drop probability of every suite."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Function = Callable[..., Tensor]


def tolerances(*values: float) -> dict[torch.dtype, float]:
    """Return the tolerance of each of DTYPES."""
    return dict(zip(DTYPES, values, strict=True))


class Work(NamedTuple):
    """One tensor that an operation works on.

    Attributes:
        op: The operation.
        shape: The tensor's.
        modes: In which it is measured; by default all.
        name: Of the shape; by default its sizes.
        host: Whether only the cost of a call counts; then in the first dtype alone.
        layout: The tensor's.
    """

    op: str
    shape: tuple[int, ...]
    modes: tuple[str, ...] = ()
    name: str = ""
    host: bool = False
    layout: torch.memory_format = torch.contiguous_format


Setup = Callable[[Work, str, torch.dtype, Options], Workload]


def layer_cases(
    options: Options,
    works: Sequence[Work],
    moved: Mapping[str, int] | Callable[[str, str], int],
    setup: Setup,
) -> list[Case]:
    """Return the cases of each tensor, dtype and mode.

    Args:
        options: The user's choices.
        works: The tensors.
        moved: By mode, or as a function of operation and mode: the elements moved by contract for
            each element of the tensor.
        setup: Makes the workload.
    """
    found = []
    for work in works:
        elements = math.prod(work.shape)
        name = work.name or "x".join(map(str, work.shape))
        modes = work.modes or (tuple(moved) if isinstance(moved, Mapping) else ())
        for dtype in options.dtypes[:1] if work.host else options.dtypes:
            size = elements * dtype.itemsize
            for mode in modes:
                each = moved[mode] if isinstance(moved, Mapping) else moved(work.op, mode)
                found.append(
                    Case(
                        op=work.op,
                        mode=mode,
                        shape=f"host {name}" if work.host else name,
                        dtype=dtype,
                        device=options.device,
                        tensors=1,
                        elements=elements,
                        bytes_moved=0 if work.host else each * size,
                        # Inputs, gradients, results and what eager torch keeps; the copy; the
                        # check in float64.
                        memory=(16 + each) * size + 80 * elements,
                        setup=functools.partial(setup, work, mode, dtype, options),
                        host=work.host,
                    )
                )
    return found


def training_case(
    shape: str,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    options: Options,
    setup: Callable[[], Workload],
    *,
    op: str = "training",
    mode: str = "step",
    memory: int = 2 * 10**9,
) -> Case:
    """Return the case of a network with these parameters, as a rule of a training step."""
    return Case(
        op=op,
        mode=mode,
        shape=shape,
        dtype=dtype,
        device=options.device,
        tensors=len(parameters),
        elements=sum(p.numel() for p in parameters),
        bytes_moved=0,
        memory=memory,
        setup=setup,
    )


class Data:
    """Makes the tensors of a case, the same ones for each case."""

    def __init__(self, dtype: torch.dtype, options: Options) -> None:
        self.dtype, self.device = dtype, options.device
        self._generator = torch.Generator(device=self.device).manual_seed(0)

    def _empty(self, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
        return torch.empty(tuple(shape), dtype=self.dtype, device=self.device, memory_format=layout)

    def uniform(self, *shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Return numbers in [0.5, 1.5]: without zeros, dropped elements are seen."""
        return self._empty(shape, layout).uniform_(0.5, 1.5, generator=self._generator)

    def normal(self, *shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Return normally distributed numbers."""
        return self._empty(shape, layout).normal_(generator=self._generator)


# --- providers ------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function, without what earlier cases compiled, which would shorten it."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def timed(
    mode: str, *inputs: Tensor, wanted: Sequence[int] | None = None, gradient: Tensor | None = None
) -> Callable[[Function], Call]:
    """Return what makes a function's timed call.

    Args:
        mode: FORWARD or OUT: without autograd; BOTH: the result, and the gradients of the inputs
            and of a module's parameters.
        inputs: The function's arguments.
        wanted: Indices of the inputs whose gradients are computed; by default all.
        gradient: The gradient of the result; by default ones.
    """

    def forward(function: Function) -> Call:
        def call() -> object:
            with torch.no_grad():
                return function(*inputs)

        return call

    def forward_backward(function: Function) -> Call:
        leaves = [t.detach().requires_grad_() for t in inputs]
        chosen = leaves if wanted is None else [leaves[i] for i in wanted]
        if isinstance(function, nn.Module):
            chosen = [*chosen, *function.parameters()]
        upstream = torch.ones_like(leaves[0]) if gradient is None else gradient

        def call() -> object:
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, chosen, upstream)

        return call

    return forward_backward if mode == BOTH else forward


def providers(
    eager: Function,
    fused: Function,
    make: Callable[[Function], Call],
    *,
    to_compile: Function | None = None,
    clone: str = "",
) -> list[Provider]:
    """Return the usual providers of a layer.

    Args:
        eager: The work in plain torch.
        fused: The work by fusereg.
        make: Makes a function's timed call; see :func:`timed`.
        to_compile: What torch.compile is given, if not ``eager``.
        clone: What a copy of the input fails to do; it is measured as a yardstick if given.
    """
    source = to_compile or eager
    found = [
        Provider(EAGER, lambda: make(eager)),
        Provider("torch.compile", lambda: make(compiled(source)), compiles=True),
    ]
    if clone:
        found.append(Provider("clone", lambda: make(torch.clone), note=f"a yardstick: {clone}"))
    return [*found, Provider("fusereg", lambda: make(fused))]


# --- checks ---------------------------------------------------------------------------------------


def results(call: Call) -> tuple[Tensor, ...]:
    """Return the result of a call and, if it computes them, the gradients."""
    value: Any = call()
    return value if isinstance(value, tuple) else (value,)


def is_keep_rate(kept: Tensor, p: float = P) -> bool:
    """Return whether about a share 1 - p of the mask is kept."""
    n = kept.numel()
    deviation = abs(float(kept.double().mean()) - (1 - p)) / math.sqrt(p * (1 - p) / n)
    # Off by chance once in a billion; p itself is 1e-5 off where draws have 16 bits.
    return deviation <= 6 + 1e-5 * math.sqrt(n / (p * (1 - p)))


def check_kept(
    x: Tensor, call: Call, tolerance: float, keep: Callable[[Tensor], float | None]
) -> Accuracy:
    """Check the kept elements, their number, and that the gradient has the result's mask.

    Args:
        x: The input, without zeros.
        call: What is checked.
        tolerance: Relative, of the elements.
        keep: Given the mask, returns what the kept elements are divided by, or None if too few or
            too many are kept.
    """
    y, *gradients = results(call)
    if torch.equal(y, x):
        return Accuracy(0.0, tolerance, "copy")
    kept = y != 0
    divisor = keep(kept)
    if divisor is None:
        return Accuracy(math.inf, tolerance, "keep rate")
    if gradients and not torch.equal(gradients[0] != 0, kept):
        return Accuracy(math.inf, tolerance, "gradient's mask")
    exact = x[kept].double() / divisor
    return Accuracy(float(((y[kept] - exact) / exact).abs().max()), tolerance, "kept elements")


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of any pair, relative to the largest wanted element."""
    pairs = zip(found, wanted, strict=True)
    return largest((f.double() - w).abs().max() / w.abs().max() for f, w in pairs)
