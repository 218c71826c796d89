"""Benchmark of torch.compile's backend: a training step of two convolutional networks.

The step is forward, mean and backward, without an optimizer, on random images. The networks are a
residual network of 18 layers and a depthwise-separable network of 96 channels. One more case is the
forward alone, without autograd, of a ResNet-18 so small that the host's time is what counts:
Dynamo's guards, or the calls of modules.

- ``eager``: torch's layers.
- ``fusereg``: the same network, converted.
- ``backend fusereg``: the same network, compiled with ``backend="fusereg"``; all that is not fused
  runs as in ``eager``.
- ``inductor``: the same network, compiled with Inductor.
- ``fusereg, inductor``: the converted network, compiled with Inductor.
- ``backend fusereg, inductor``: the graph that the backend has rewritten, compiled with Inductor.

What claims to be compiled by the backend is checked: it counts the batch norms that it has fused,
or left to Inductor.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusereg

from ..harness import EAGER, Call, Case, Options, Provider, Workload
from ..harness.layers import FORWARD, training_case
from ..models import ResNet, Separable

FUSED = "fusereg"
BACKEND, INDUCTOR, BOTH = "backend fusereg", "inductor", "backend fusereg, inductor"
CONVERTED = "fusereg, inductor"
PROVIDERS = (EAGER, FUSED, BACKEND, INDUCTOR, CONVERTED, BOTH)

_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def _networks(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """Return a name -> how to make the network, the size of a batch, and that of an image."""
    if quick:
        return {"separable": (lambda: Separable(8, 1), 2, 8)}
    widths = (64, 128, 256, 512)
    return {
        "separable": (Separable, 16, 32),
        "resnet18": (lambda: ResNet(widths, depth=2, dropout=0.0, channels=3), 8, 32),
    }


def cases(options: Options) -> list[Case]:
    """Return each network in each layout and dtype, and the one for the host's time."""
    found = [
        _case(name, layout, dtype, options)
        for name in _networks(options.quick)
        for layout in _LAYOUTS
        for dtype in options.dtypes
    ]
    host = Case(
        op="call",
        mode=FORWARD,
        shape="host resnet18 2x8x8",
        dtype=options.dtypes[0],
        device=options.device,
        tensors=1,
        elements=sum(p.numel() for p in _small().parameters()),
        bytes_moved=0,
        memory=10**8,
        setup=functools.partial(_setup_host, options),
        host=True,
    )
    return [*found, host]


def _case(name: str, layout: str, dtype: torch.dtype, options: Options) -> Case:
    make, batch, side = _networks(options.quick)[name]
    shape, parameters = f"{name} {batch}x{side}x{side} {layout}", list(make().parameters())
    setup = functools.partial(_setup, name, layout, dtype, options)
    return training_case(shape, parameters, dtype, options, setup)


def _setup(name: str, layout: str, dtype: torch.dtype, options: Options) -> Workload:
    make, batch, side = _networks(options.quick)[name]
    network: Any = make()
    network = network.to(options.device, dtype, memory_format=_LAYOUTS[layout])
    x = torch.randn(batch, 3, side, side).to(options.device, dtype, memory_format=_LAYOUTS[layout])

    def step(prepare: Prepare, own: bool, fuses: bool) -> Callable[[], Call]:
        def prepared() -> Call:
            model = copy.deepcopy(network)
            call = Step(prepare(model), model, x)
            if fuses:
                call.check()
            return call

        return prepared

    return Workload(training_providers(step, fullgraph=True))


def _small() -> ResNet:
    return ResNet((4, 4, 4, 4), depth=2, dropout=0.0, channels=3)


def _setup_host(options: Options) -> Workload:
    network = _small().to(options.device, options.dtypes[0])
    x = torch.randn(2, 3, 8, 8).to(options.device, options.dtypes[0])

    def prepared(prepare: Prepare) -> Callable[[], Call]:
        def make() -> Call:
            model = prepare(copy.deepcopy(network))
            return torch.no_grad()(lambda: model(x))

        return make

    def by_backend(model: nn.Module) -> Any:
        importlib.import_module("fusereg.backend")
        torch._dynamo.reset()
        return torch.compile(model, backend="fusereg", fullgraph=True)

    return Workload(
        [
            Provider(EAGER, prepared(lambda model: model)),
            Provider(FUSED, prepared(fusereg.convert)),
            Provider(BACKEND, prepared(by_backend), compiles=True),
        ]
    )


Prepare = Callable[[nn.Module], Any]


def training_providers(
    step: Callable[[Prepare, bool, bool], Callable[[], Call]], **options: Any
) -> list[Provider]:
    """Return the ways to train a network.

    Args:
        step: Makes the maker of a training step, given what prepares the network, whether that is
            fusereg's work, and whether the backend must fuse.
        options: Of torch.compile.
    """
    torch._dynamo.reset()
    importlib.import_module("fusereg.backend")  # only here: it imports torch's compiler

    def by_backend(model: nn.Module, **more: Any) -> Any:
        return torch.compile(model, backend="fusereg", options=more or None, **options)

    def by_inductor(model: nn.Module) -> Any:
        return torch.compile(model, **options)

    def converted(model: nn.Module) -> Any:
        return by_inductor(fusereg.convert(model))

    def both(model: nn.Module) -> Any:
        return by_backend(model, then="inductor")

    return [
        Provider(EAGER, step(lambda model: model, False, False)),
        Provider(FUSED, step(fusereg.convert, True, False)),
        Provider(BACKEND, step(by_backend, True, True), compiles=True),
        Provider(INDUCTOR, step(by_inductor, False, False), compiles=True),
        Provider(CONVERTED, step(converted, True, False), compiles=True),
        Provider(BOTH, step(both, True, True), compiles=True),
    ]


class Step:
    """A training step; the call that is timed."""

    def __init__(self, run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
        self.run, self.model, self.x = run, model, x

    def __call__(self) -> object:
        self.model.zero_grad(set_to_none=True)
        loss = self.run(self.x).square().mean()
        loss.backward()
        return loss

    def check(self) -> None:
        """Compile, and raise RuntimeError unless the backend has found every batch norm."""
        from torch._dynamo.utils import counters

        counters.clear()
        self()
        counted = counters["fusereg"] + counters["fusereg left"]
        found = sum(n for what, n in counted.items() if what.startswith("batch_norm"))
        wanted = sum(isinstance(m, nn.BatchNorm2d) for m in self.model.modules())
        if counted["graphs"] != 1 or found != wanted:
            raise RuntimeError(f"the backend found {found} of {wanted} batch norms: {counted}")
