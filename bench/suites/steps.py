"""Benchmark of whole training steps of what people train, on random inputs.

The step is forward, mean of squares, backward and AdamW (torch's fused one, or fusereg's). bfloat16
means autocast. The networks are a tabular MLP of four blocks of linear, batch norm, ReLU and
dropout; a transformer encoder; a network of depthwise convolutions; a residual network of 18
layers; a U-Net. Each consists of torch's layers.

- ``eager``: as it is.
- ``fusereg``: converted, with fusereg's optimizer.
- ``backend fusereg``: the network compiled with ``backend="fusereg"``, which also finds dropout,
  sum and norm in its graph; all that is not fused runs as in ``eager``. With fusereg's optimizer.
- ``inductor``: the network compiled with Inductor.
- ``fusereg, inductor``: the converted network compiled with Inductor, with fusereg's optimizer.
- ``backend fusereg, inductor``: the graph that the backend has rewritten, compiled with Inductor,
  and fusereg's optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusereg

from ..harness import Call, Case, Options, Workload
from ..harness.layers import training_case
from ..models import ResNet, Separable, UNet, encoder, tabular
from .backend import PROVIDERS as PROVIDERS
from .backend import Prepare, training_providers

_WIDTHS = (64, 128, 256, 512)


def _networks(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Return a name -> how to make the network, and the shape of its input."""
    if quick:
        return {
            "mlp": (lambda: tabular(8, 16), (4, 8)),
            "encoder": (lambda: encoder(16, 1, 2), (2, 4, 16)),
            "depthwise": (lambda: Separable(8, 1), (2, 3, 8, 8)),
            "resnet18": (lambda: ResNet((8, 16), dropout=0.0, channels=3), (2, 3, 8, 8)),
            "unet": (lambda: UNet((8, 16)), (2, 3, 8, 8)),
        }
    return {
        "mlp": (lambda: tabular(128, 512), (1024, 128)),
        "encoder": (lambda: encoder(512, 4, 8), (8, 128, 512)),
        "depthwise": (Separable, (16, 3, 32, 32)),
        "resnet18": (lambda: ResNet(_WIDTHS, depth=2, dropout=0.0, channels=3), (32, 3, 32, 32)),
        "unet": (UNet, (4, 3, 64, 64)),
    }


def cases(options: Options) -> list[Case]:
    """Return each network in each dtype."""
    return [
        _case(name, dtype, options) for name in _networks(options.quick) for dtype in options.dtypes
    ]


def _case(name: str, dtype: torch.dtype, options: Options) -> Case:
    make, shape = _networks(options.quick)[name]
    text, parameters = f"{name} {'x'.join(map(str, shape))}", list(make().parameters())
    return training_case(text, parameters, dtype, options, lambda: _setup(name, dtype, options))


def _setup(name: str, dtype: torch.dtype, options: Options) -> Workload:
    make, shape = _networks(options.quick)[name]
    network = make().to(options.device)
    x = torch.randn(shape).to(options.device)

    def step(prepare: Prepare, own: bool, fuses: bool) -> Callable[[], Call]:
        def prepared() -> Call:
            model = copy.deepcopy(network)
            run = prepare(model)
            # A learning rate of 0: the same work, and the weights stay what they were.
            optimizer: Any = (
                fusereg.optim.AdamW(model.parameters(), 0.0)
                if own
                else torch.optim.AdamW(model.parameters(), 0.0, fused=True)
            )
            return Step(run, optimizer, x, dtype)

        return prepared

    return Workload(training_providers(step))


class Step:
    """A training step; the call that is timed."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], optimizer: Any, x: Tensor, dtype: torch.dtype
    ) -> None:
        self.run, self.optimizer, self.x = run, optimizer, x
        self.autocast = torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32)

    def __call__(self) -> object:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = self.run(self.x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        return loss
