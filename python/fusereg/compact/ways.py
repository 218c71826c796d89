"""The ways in which a model runs: in evaluation, and where training takes other branches."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .parts import BATCH_NORM

_ATEN = torch.ops.aten
_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_UNIFORM = {_ATEN.rand, _ATEN.rand_like, _ATEN.uniform, _ATEN.uniform_}
_NORMAL = {_ATEN.randn, _ATEN.randn_like, _ATEN.normal_}
_COIN = {_ATEN.bernoulli, _ATEN.bernoulli_}
_DRAWN = _UNIFORM | _NORMAL | _COIN
#: So many draws of a single number are tried at both ends, and so many seeds of other generators.
_DRAWS, _SEEDS = 64, 8


class Way(NamedTuple):
    """A way to run a model."""

    training: bool = False
    #: Which draw of a single number is at an end of its range, and whether at the upper; -1: none.
    draw: int = -1
    high: bool = False
    #: Of what draws elsewhere than in torch.
    seed: int = 0


class Running(TorchDispatchMode):
    """Run a model in float64 throughout, and draw nothing.

    Casts to another floating-point type, of which a model in float64 would fail or lose what the
    probes look for, lead to float64. Every draw is its mean, so that dropout is the identity, and
    a draw of a single number, by which a model chooses a branch, is at an end of its range where
    the way says so.
    """

    def __init__(self, way: Way) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.way = way
        #: How many single numbers were drawn, and whether some were drawn elsewhere than in torch.
        self.draws, self.elsewhere = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return what the operator returns, or what stands for a draw."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _LOWER:
            kwargs = {**kwargs, "dtype": torch.float64}
        packet = func.overloadpacket
        if packet is _ATEN.native_dropout:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        made = func(*args, **kwargs)
        if packet in _DRAWN:
            self._replace(packet, made, args, kwargs)
        return made

    def _replace(self, packet: Any, made: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        """Write what stands for a draw into the result."""
        single = made.numel() == 1 and made.dim() <= 1
        flipped = single and self.draws == self.way.draw
        self.draws += single
        if packet in _NORMAL:
            of = args[1] if packet is _ATEN.normal_ and len(args) > 1 else kwargs.get("mean", 0.0)
            made.fill_(of)
        elif packet in _UNIFORM:
            low, high = 0.0, 1.0
            if packet in (_ATEN.uniform, _ATEN.uniform_):
                low = args[1] if len(args) > 1 else low
                high = args[2] if len(args) > 2 else high
            last = high - (high - low) * 2.0**-24  # the upper end is not among the numbers
            made.fill_((low + high) / 2 if not flipped else last if self.way.high else low)
        elif single:
            made.fill_(float(not flipped or self.way.high))
        else:
            p = args[0] if packet is _ATEN.bernoulli else 0.5
            p = args[1] if len(args) > 1 else kwargs.get("p", p)
            made.copy_(p) if isinstance(p, Tensor) else made.fill_(p)


def _trains(module: nn.Module) -> bool:
    """Return whether a module is set to training in a probe.

    Layers of torch and of this package are not: what they do differently in training is known, and
    the statistics of few random examples would hide what is looked for.
    """
    layer = type(module).__module__.startswith(("torch.nn.", "torch.ao.", "fusereg."))
    return not layer and not isinstance(module, BATCH_NORM)


def _elsewhere() -> tuple[Any, Any]:
    """Return the states of Python's and numpy's generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)


@contextmanager
def running(model: nn.Module, way: Way) -> Iterator[Running]:
    """Let a model run in a way; afterwards its modes, buffers and all generators are as before."""
    if not way.training:
        with Running(way) as mode:
            yield mode
        return
    modules = [m for m in model.modules() if _trains(m) and not m.training]
    buffers = [(b, b.clone()) for b in model.buffers()]
    states = _elsewhere()
    numpy = sys.modules.get("numpy")
    random.seed(way.seed)
    if numpy is not None:
        numpy.random.seed(way.seed)
    seeded = str(_elsewhere())
    devices = {p.device for p in model.parameters() if p.is_cuda}
    for module in modules:
        module.training = True
    try:
        with torch.random.fork_rng(devices=list(devices)), Running(way) as mode:
            yield mode
        mode.elsewhere = str(_elsewhere()) != seeded
    finally:
        for module in modules:
            module.training = False
        with torch.no_grad():
            for buffer, old in buffers:
                if not torch.equal(buffer, old):
                    buffer.copy_(old)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


Run = Callable[[Way], tuple[list[Tensor], Running]]


def ways_of(run: Run) -> tuple[tuple[Way, ...], str | None]:
    """Return the ways that differ, and why training could not be looked at, if it could not.

    Args:
        run: a function of a way that returns the model's tensors, and how it ran.
    """
    ways, results = [Way()], [run(Way())[0]]

    def note(way: Way) -> Running:
        made, ran = run(way)
        if not any(_same(made, other) for other in results):
            ways.append(way)
            results.append(made)
        return ran

    try:
        ran = note(Way(True))
        for number in range(min(ran.draws, _DRAWS)):
            for high in (False, True):
                note(Way(True, number, high))
        for seed in range(1, _SEEDS if ran.elsewhere else 1):
            note(Way(True, seed=seed))
    except Exception as error:
        text = str(error).splitlines()
        return (Way(),), f"{type(error).__name__}: {text[0] if text else ''}"
    return tuple(ways), None


def _same(made: list[Tensor], other: list[Tensor]) -> bool:
    return len(made) == len(other) and all(map(torch.equal, made, other))
