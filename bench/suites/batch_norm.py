"""Benchmark of batch normalization in training, on ResNet-50's shapes, against torch's.

Layers (``op``): ``bn``; ``bn+relu``; ``bn+add+relu``, the end of a residual block. Modes:

- ``forward``: into memory that is allocated at each call, as in training.
- ``forward out``: into memory that exists already (``out=``; what is compiled copies its result
  there, which the compiler fuses with the rest; eager torch has no such argument and does what it
  does above).
- ``forward+backward``: the result, and the gradients of input, residual, weight and bias.

By contract a forward reads x (and the residual) and writes y once; a backward reads the gradient
and x and writes x's gradient (and the residual's). What does not fit the caches between the two
passes over it must be read twice, which the contract does not count. Providers:

- ``eager``: ``torch.nn.functional.batch_norm`` and torch's ReLU and addition.
- ``torch.compile``: the same, compiled.
- ``fusereg``: ``fusereg.functional.batch_norm``.

Shapes are those of ResNet-50 at 8 images: their results stay below 32 MB, above which fresh memory
page-faults and hides the rest for all providers; ``N=32`` rows show that, fresh and with ``out=``.
The ``host`` rows normalize (32, 64): what remains is the cost of a call, of the function and of the
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as torch_F

from fusereg import functional as F
from fusereg.nn import BatchNorm1d

from ..harness import Accuracy, Call, Case, Options, Workload
from ..harness.layers import (
    BOTH,
    FORWARD,
    OUT,
    Data,
    Function,
    Work,
    layer_cases,
    providers,
    relative_error,
    results,
    timed,
    tolerances,
)

LAYERS = ("bn", "bn+relu", "bn+add+relu")
MODULE = "nn.BatchNorm1d"
#: Channels and height of the layers' outputs.
RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))

_TOLERANCE = tolerances(1e-12, 4e-6, 4e-3, 3.2e-2)


def _moved(layer: str, mode: str) -> int:
    """Return the elements moved by contract for each element of the input."""
    if "add" in layer:
        return 7 if mode == BOTH else 3
    return 5 if mode == BOTH else 2


def cases(options: Options) -> list[Case]:
    """Return each shape in both layouts; all layers at 8 images, one at 32; then a tiny one."""
    shapes = RESNET50[3:4] if options.quick else RESNET50
    batch = 2 if options.quick else 8
    wanted: list[tuple[tuple[int, ...], str, tuple[str, ...]]] = [
        ((batch, channels, size, size), layer, (FORWARD, OUT, BOTH) if layer == "bn" else (BOTH,))
        for channels, size in shapes
        for layer in LAYERS
    ]
    if not options.quick:
        wanted.append(((32, *RESNET50[1], RESNET50[1][1]), "bn", (FORWARD, OUT)))
    works = [
        Work(layer, shape, modes, "x".join(map(str, shape)) + name, layout=layout)
        for name, layout in (("", torch.contiguous_format), (" NHWC", torch.channels_last))
        for shape, layer, modes in wanted
    ]
    works += [Work(layer, (32, 64), (FORWARD, BOTH), host=True) for layer in ("bn", MODULE)]
    return layer_cases(options, works, _moved, _setup)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    layer, shape, data = work.op, work.shape, Data(dtype, options)
    x, residual, gradient = (data.normal(*shape, layout=work.layout) for _ in range(3))
    wide = Data(torch.float64 if dtype is torch.float64 else torch.float32, options)
    weight, bias = wide.normal(shape[1]), wide.normal(shape[1])
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    relu = "relu" in layer
    if layer == MODULE:
        theirs, ours = (kind(shape[1], device=x.device) for kind in (nn.BatchNorm1d, BatchNorm1d))
        return Workload(providers(theirs, ours, timed(mode, x, gradient=gradient)))
    inputs = [x, weight, bias] + ([residual] if "add" in layer else [])
    out = torch.empty_like(x) if mode == OUT else None
    eager = _torch(relu, mean, var)

    def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.batch_norm(
            x, mean, var, weight, bias, True,
            activation="relu" if relu else None, residual=residual, out=out,
        )  # fmt: skip

    def into_out(*tensors: Tensor) -> Tensor:
        assert out is not None
        return out.copy_(eager(*tensors))

    make = timed(mode, *inputs, gradient=gradient)
    return Workload(
        providers(eager, fused, make, to_compile=into_out if mode == OUT else None),
        lambda call: _check(call, inputs, gradient, relu, mode),
    )


def _torch(relu: bool, mean: Tensor | None = None, var: Tensor | None = None) -> Function:
    """Return the layer in plain torch, of (x, weight, bias) and maybe a residual."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch_F.batch_norm(x, mean, var, weight, bias, True)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    return layer


def _check(call: Call, inputs: list[Tensor], gradient: Tensor, relu: bool, mode: str) -> Accuracy:
    """Check the result and the gradient of x against torch in float64."""
    exact = timed(mode, *(t.double() for t in inputs), gradient=gradient.double())
    wanted = results(exact(_torch(relu)))
    error = relative_error(results(call)[:2], wanted[:2])
    return Accuracy(error, _TOLERANCE[inputs[0].dtype])
