"""Benchmark of whole training: a residual network and a vision transformer, on handwritten digits.

The work is one training step with everything at once (see :mod:`.twins`): augmentation, forward
with batch norm and dropout, cross-entropy and a group lasso, backward, AdamW and its proximal step.
bfloat16 means autocast.

- ``eager``: plain torch, written with care.
- ``torch.compile``: the same, with the network compiled.
- ``fusereg``: the network converted, all else by fusereg.
- ``fusereg + compile``: the same, with the network compiled.
- ``eager, CUDA graph`` and ``fusereg, CUDA graph``: the whole step captured once and replayed.

Times are those of a step. Its learning rate is 0: the work is the same, and the weights stay what
they were, which some kernels' time depends on (torch's attention in bfloat16). Then two facts are
measured for each: the peak of torch's memory in the first two steps from an empty start, so that it
includes weights, gradients, the optimizer's states and the batch; and, for the two twins, the
accuracy on 1,000 test digits after training to the end, early stopping included (what is compiled
or captured trains likewise).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusereg.demo.data import first_of_each, load_bundled

from .. import twins
from ..harness import EAGER, Call, Case, Facts, Options, Provider, Workload
from ..harness.layers import training_case

FUSED = "fusereg"
COMPILED, FUSED_COMPILED = "torch.compile", "fusereg + compile"
CAPTURED, FUSED_CAPTURED = "eager, CUDA graph", "fusereg, CUDA graph"
PROVIDERS = (EAGER, FUSED, COMPILED, FUSED_COMPILED, CAPTURED, FUSED_CAPTURED)
#: How many images of each label --quick trains and tests on.
QUICK_TRAIN, QUICK_TEST = 24, 10


def recipes(quick: bool) -> list[twins.Recipe]:
    """Return what is trained; ``quick``: tiny images, one epoch."""
    if quick:
        return [twins.Recipe(name, side=14, batch=32, epochs=1) for name in twins.NETWORKS]
    return [
        twins.Recipe("resnet", l1=3e-2, epochs=8),
        twins.Recipe("vit", dropout=0.05, batch=32, epochs=12),
    ]


def cases(options: Options) -> list[Case]:
    """Return each network in each dtype."""
    return [
        _case(replace(recipe, dtype=dtype), options)
        for recipe in recipes(options.quick)
        for dtype in options.dtypes
    ]


def _case(recipe: twins.Recipe, options: Options) -> Case:
    return training_case(
        f"{recipe.network} {recipe.batch}x{recipe.side}x{recipe.side}",
        list(recipe.make().parameters()),
        recipe.dtype,
        options,
        lambda: _setup(recipe, options),
        memory=10**9,  # some six networks of less than 100 MB each while they train
    )


class Step:
    """A twin's training step on one batch; the call that is timed."""

    def __init__(self, twin: twins.Twin, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        self.twin = twin
        self.batch = batch
        self.epoch = 0

    def __call__(self) -> object:
        # Each step is another epoch: an image is never augmented twice in the same way.
        self.epoch += 1
        return self.twin.train_step(*self.batch, self.epoch)


class Replay:
    """A twin's training step, captured in a CUDA graph once and replayed."""

    def __init__(self, twin: twins.Twin, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        self.images, labels, self.ids = batch
        self.twin = twin
        self.epoch = 0
        twin.prepare(self.images, self.ids, 0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # allocates states, gradients and workspaces
                twin.step(twin.prepared(self.images), labels)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = twin.step(twin.prepared(self.images), labels)

    def __call__(self) -> object:
        self.epoch += 1
        self.twin.prepare(self.images, self.ids, self.epoch)
        self.graph.replay()
        return self.loss


def _setup(recipe: twins.Recipe, options: Options) -> Workload:
    loaded = load_bundled()
    if options.quick:
        loaded = first_of_each(loaded, QUICK_TRAIN, QUICK_TEST)
    device = options.device
    data = twins.Digits.of(loaded, recipe.side).to(device)
    ids = torch.arange(recipe.batch)
    batch = (data.train[0][: recipe.batch], data.train[1][: recipe.batch], ids)
    timed = replace(recipe, lr=0.0)

    def step(kind: type[twins.Twin], compiled: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            twin = kind(timed, device)
            if compiled:
                twin.compile()
            return Step(twin, batch)

        return make

    def replay(kind: type[twins.Twin]) -> Callable[[], Call]:
        return lambda: Replay(kind(timed, device, capturable=True), batch)

    providers = [
        Provider(EAGER, step(twins.Plain)),
        Provider(FUSED, step(twins.Fused)),
        Provider(COMPILED, step(twins.Plain, True), compiles=True),
        Provider(FUSED_COMPILED, step(twins.Fused, True), compiles=True),
    ]
    if device.type == "cuda":
        providers += [
            Provider(CAPTURED, replay(twins.Plain)),
            Provider(FUSED_CAPTURED, replay(twins.Fused)),
        ]

    def facts(call: Call) -> Facts:
        if not isinstance(call, Step) or call.twin.compiled:
            return Facts()
        kind = type(call.twin)
        torch.manual_seed(0)
        return Facts(
            peak_bytes=peak_memory(step(kind), device),
            test_accuracy=kind(recipe, device).train(data).accuracy,
        )

    return Workload(providers, facts=facts)


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(make: Callable[[], Call], device: torch.device, calls: int = 2) -> int:
    """Return the peak of torch's memory while ``make`` runs and its call is called."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _make_and_call(make, calls)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's own log would go to the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        _make_and_call(make, calls)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), number, event.nbytes())
        for number, event in enumerate(events)
        if event.name() == "[memory]"
    ]
    held = highest = 0
    for _, _, change in sorted(changes):
        held += change
        highest = max(highest, held)
    return highest


def _make_and_call(make: Callable[[], Call], calls: int) -> None:
    call = make()
    for _ in range(calls):
        call()
