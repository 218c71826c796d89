"""Models whose weights say which epoch they are of, for tests of early stopping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fusereg import EarlyStopping


class Odd(nn.Module):
    """Tied weights, running statistics, a buffer outside state_dict, extra state, odd strides."""

    extra = 0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(4)
        self.few = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.cache: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    if isinstance(model, Odd):
        model.extra = int(value)


def holds(model: nn.Module, value: float) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return (
        all(bool((t == value).all()) for t in tensors) and getattr(model, "extra", value) == value
    )


def train(stopper: EarlyStopping, model: nn.Module, values: list[float]) -> Iterator[int]:
    """Train epochs that fill the model with their number; the best has the least value."""
    for epoch in stopper.epochs(len(values)):
        fill(model, epoch)
        stopper.step(values[epoch], epoch=epoch)
        yield epoch


class Partial(nn.Module):
    """A state_dict that leaves out a trained parameter, a frozen one, and renames a third."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(3))
        self.left_out = nn.Parameter(torch.zeros(5))
        self.renamed = nn.Parameter(torch.zeros(7))
        self.frozen = nn.Parameter(torch.zeros(11), requires_grad=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        del state["left_out"], state["frozen"]
        state["another.name"] = state.pop("renamed")
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        state = dict(state_dict)
        state["renamed"] = state.pop("another.name")
        return super().load_state_dict(state, strict=False)
