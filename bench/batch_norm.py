"""Benchmark of batch normalization in training, on ResNet-50's shapes, against torch's.

Layers (``op``): ``bn``; ``bn+relu``; ``bn+add+relu``, the end of a residual block. Modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward out``: into memory that is there already (``out=``; what is compiled copies its result
  there, which the compiler makes one with the rest; eager torch has no such argument and does what
  it does above).
- ``forward+backward``: the result, and the gradients of input, residual, weight and bias.

By contract a forward reads x (and the residual) and writes y once; a backward reads the gradient
and x and writes x's gradient (and the residual's). What does not fit the caches between the two
passes over it must be read twice, which the contract does not count. Providers:

- ``eager``: ``torch.nn.functional.batch_norm`` and torch's ReLU and addition.
- ``torch.compile``: the same, compiled.
- ``fusereg``: ``fusereg.functional.batch_norm``.

Shapes are those of ResNet-50 at 8 images: their results stay below 32 MB, above which fresh memory
page-faults and hides the rest on all sides; ``N=32`` rows show that, fresh and with ``out=``. The
``host`` rows normalize (32, 64): what remains is the cost of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .harness import EAGER, Accuracy, Case, Options, Provider, Workload
from .timers import Call

FORWARD = "forward"
OUT = "forward out"
BOTH = "forward+backward"

LAYERS = ("bn", "bn+relu", "bn+add+relu")
# Elements moved for each element of the input: (layer adds, mode).
MOVED = {
    (False, FORWARD): 2,
    (False, OUT): 2,
    (False, BOTH): 5,
    (True, FORWARD): 3,
    (True, OUT): 3,
    (True, BOTH): 7,
}
#: Channels and height of the layers' outputs.
RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))

_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3.2e-2,
}


class Inputs(NamedTuple):
    """What a layer takes."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def cases(options: Options) -> list[Case]:
    """Each shape in both layouts; all layers at 8 images, one with 32; then a tiny one."""
    shapes = RESNET50[3:4] if options.quick else RESNET50
    found = []
    for dtype in options.dtypes:
        for channels_last in (False, True):
            for channels, size in shapes:
                shape = (2 if options.quick else 8, channels, size, size)
                for layer in LAYERS:
                    modes = (FORWARD, OUT, BOTH) if layer == "bn" else (BOTH,)
                    found += [
                        _case(layer, mode, shape, channels_last, dtype, options) for mode in modes
                    ]
            if not options.quick:
                shape = (32, *RESNET50[1], RESNET50[1][1])
                found += [
                    _case("bn", mode, shape, channels_last, dtype, options)
                    for mode in (FORWARD, OUT)
                ]
    found += [
        _case("bn", mode, (32, 64), False, options.dtypes[0], options, host=True)
        for mode in (FORWARD, BOTH)
    ]
    return found


def _case(
    layer: str,
    mode: str,
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    options: Options,
    host: bool = False,
) -> Case:
    elements = 1
    for n in shape:
        elements *= n
    size = elements * dtype.itemsize
    moved = MOVED["add" in layer, mode] * size
    name = "x".join(str(n) for n in shape)
    return Case(
        suite="batch_norm",
        op=layer,
        mode=mode,
        shape=f"host {name}" if host else f"{name} NHWC" if channels_last else name,
        dtype=dtype,
        device=options.device,
        tensors=1,
        elements=elements,
        bytes_moved=0 if host else moved,
        # Inputs, gradients, torch's results in between; the copy's buffers; the check in float64.
        memory=12 * size + moved + 64 * elements,
        setup=lambda: _setup(layer, mode, shape, channels_last, dtype, options),
        host=host,
    )


def _setup(
    layer: str,
    mode: str,
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    options: Options,
) -> Workload:
    generator = torch.Generator(device=options.device).manual_seed(0)
    device = options.device

    def normal(*size: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        t = torch.empty(size, dtype=of, device=device).normal_(generator=generator)
        if channels_last and len(size) == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        return t

    channels = shape[1]
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    inputs = Inputs(
        normal(*shape, of=dtype),
        normal(*shape, of=dtype) if "add" in layer else None,
        normal(channels, of=parameters),
        normal(channels, of=parameters),
        torch.zeros(channels, dtype=parameters, device=device),
        torch.ones(channels, dtype=parameters, device=device),
    )
    gradient = normal(*shape, of=dtype)
    relu = "relu" in layer
    providers = [
        Provider(EAGER, lambda: _call(_torch(relu), inputs, gradient, mode)),
        Provider(
            "torch.compile",
            lambda: _call(_compiled(relu, mode, inputs), inputs, gradient, mode),
            compiles=True,
        ),
        Provider("fusereg", lambda: _call(_fusereg(relu, mode, inputs), inputs, gradient, mode)),
    ]
    if options.quick:
        providers = [provider for provider in providers if not provider.compiles]
    return Workload(providers, lambda call: _check(call, inputs, gradient, relu, mode))


# -------------------------------------------------------------------------------------- providers


def _torch(relu: bool) -> Callable[[Inputs], torch.Tensor]:
    def layer(i: Inputs) -> torch.Tensor:
        y = torch.nn.functional.batch_norm(i.x, i.mean, i.var, i.weight, i.bias, True)
        if i.residual is not None:
            y = y + i.residual
        return y.relu() if relu else y

    return layer


def _compiled(relu: bool, mode: str, inputs: Inputs) -> Any:
    # Whatever an earlier case compiled must not make this one's compilation look short.
    torch._dynamo.reset()
    layer = _torch(relu)
    if mode != OUT:
        return torch.compile(layer, fullgraph=True, dynamic=False)
    out = torch.zeros_like(inputs.x)

    def into(i: Inputs) -> torch.Tensor:
        return out.copy_(layer(i))

    return torch.compile(into, fullgraph=True, dynamic=False)


def _fusereg(relu: bool, mode: str, inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    from fusereg import functional

    out = torch.zeros_like(inputs.x) if mode == OUT else None
    activation = "relu" if relu else None

    def layer(i: Inputs) -> torch.Tensor:
        return functional.batch_norm(
            i.x, i.mean, i.var, i.weight, i.bias, True,
            activation=activation, residual=i.residual, out=out,
        )  # fmt: skip

    return layer


def _call(
    layer: Callable[[Inputs], torch.Tensor], inputs: Inputs, gradient: torch.Tensor, mode: str
) -> Call:
    # Running statistics of its own: each provider updates them.
    inputs = inputs._replace(mean=inputs.mean.clone(), var=inputs.var.clone())
    if mode != BOTH:

        def forward() -> object:
            with torch.no_grad():
                return layer(inputs)

        return forward
    names = [n for n in ("x", "residual", "weight", "bias") if getattr(inputs, n) is not None]
    leaves = {n: getattr(inputs, n).detach().requires_grad_() for n in names}
    inputs = inputs._replace(**leaves)

    def both() -> object:
        y = layer(inputs)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), gradient)

    return both


# ------------------------------------------------------------------------------------------ checks


def _check(call: Call, inputs: Inputs, gradient: torch.Tensor, relu: bool, mode: str) -> Accuracy:
    """The result, and the gradients of the elements, against torch in float64."""
    result: Any = call()
    exact = Inputs(*(None if t is None else t.double() for t in inputs))
    reference: Any = _call(_torch(relu), exact, gradient.double(), mode)()
    found, wanted = ((result,), (reference,)) if mode != BOTH else (result[:2], reference[:2])
    error = 0.0
    for f, w in zip(found, wanted, strict=True):
        error = max(error, float((f.double() - w).abs().max() / w.abs().max()))
    return Accuracy(error, _TOLERANCE[inputs.x.dtype])
