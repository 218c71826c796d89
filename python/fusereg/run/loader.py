"""The position in a data loader, and the random generators, from which a run goes on exactly.

A loader's order depends on generators as they were before ``iter()``, and its data may draw from
the global ones. So both are kept as they were before the epoch's ``iter()`` and as they are now; a
resumed run sets the former, reads as many batches as were trained, and then sets the latter.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..core.snapshot import RandomState, Stateful
from .checkpoint import OP


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators of a data loader and its samplers, each once."""
    samplers = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = [getattr(thing, "generator", None) for thing in samplers]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class Randomness:
    """The global generators of torch, NumPy and Python, and those of a loader."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = list(generators)

    def state(self) -> dict[str, Any]:
        """Return the generators' states."""
        import numpy as np

        return {
            "torch": RandomState().state_dict(),
            "numpy": np.random.get_state(),  # noqa: NPY002  # what others draw from
            "python": random.getstate(),
            "loader": [generator.get_state() for generator in self._generators],
        }

    def set(self, state: Mapping[str, Any]) -> None:
        """Set the generators' states."""
        import numpy as np

        self.set_loaders(state)
        RandomState().load_state_dict(state["torch"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        random.setstate(state["python"])

    def set_loaders(self, state: Mapping[str, Any]) -> None:
        """Set the states of the loader's generators, if it has as many as then."""
        if self._generators and len(state["loader"]) == len(self._generators):
            for generator, own in zip(self._generators, state["loader"], strict=True):
                generator.set_state(own)


def _has_started(loader: Any) -> bool:
    """Return whether a data loader has started its persistent workers."""
    return getattr(loader, "_iterator", None) is not None


def _sizes(loader: Any) -> list[int | None]:
    """Return the number of batches and the batch size, where a loader knows them."""
    count = None
    # Of a stream, len() would have the loader warn of each batch beyond it.
    if not isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        try:
            count = len(loader)
        except Exception:  # a sampler's own; a checkpoint must not fail for it
            count = None
    size = getattr(loader, "batch_size", None)
    return [count, size if isinstance(size, int) else None]


def _shown(sizes: list[int | None]) -> str:
    count, size = sizes
    batches = "an unknown number of batches" if count is None else f"{count} batches"
    return batches if size is None else f"{batches} of size {size}"


class Position:
    """The position in the epoch's batches, from which a resumed run goes on."""

    def __init__(self) -> None:
        self._randomness = Randomness()
        self._before: dict[str, Any] | None = None  # as the generators were before iter()
        self._again = False  # whether persistent workers had been started before
        self._loader: Any = None
        self._resumed: Mapping[str, Any] | None = None

    def state(self, batch: int) -> dict[str, Any]:
        """Return what a run needs to go on from here, after ``batch`` batches of the epoch."""
        own = self._loader.state_dict() if isinstance(self._loader, Stateful) else None
        before = self._before if batch and own is None else None
        again = self._again if batch else _has_started(self._loader)
        now = self._randomness.state()
        sizes = _sizes(self._loader)
        return {"now": now, "before": before, "loader": own, "again": again, "sizes": sizes}

    @property
    def resuming(self) -> bool:
        """Return whether the next loop over batches goes on from a checkpoint."""
        return self._resumed is not None

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from this state, at the next loop over batches."""
        self._resumed = state

    def set_generators(self) -> None:
        """Set the global generators of a resumed run, when its loop begins."""
        if self._resumed is not None:
            self._randomness.set(self._resumed["now"])

    def iterator(self, loader: Any, skip: int) -> Iterator[Any]:
        """Return the iterator over the epoch's batches, after the first ``skip`` ones."""
        own: Iterable[Any] = loader  # by this name also where it is known to be stateful
        state, self._resumed = self._resumed, None
        self._loader, self._randomness = loader, Randomness(generators_of(loader))
        self._again = _has_started(loader)
        if state is None:
            self._before = self._randomness.state()
            return iter(own)
        if getattr(loader, "persistent_workers", False):
            warnings.warn(
                f"{OP}: the loader's persistent workers keep random numbers from epoch to epoch, "
                "which cannot be restored: the resumed run may draw others in them",
                RuntimeWarning,
                stacklevel=4,
            )
        if state["loader"] is not None and isinstance(loader, Stateful):
            loader.load_state_dict(state["loader"])
            iterator = iter(own)
            if skip:
                self._randomness.set(state["now"])
                return iterator
            # Its state after the last batch may be that of an iteration which is about to end.
            first = next(iterator, None)
            return iter(own) if first is None else itertools.chain([first], iterator)
        sizes = _sizes(loader)
        saved = state.get("sizes", sizes)  # states of before do not have them
        if skip and saved != sizes:
            if saved[0] == skip:  # the epoch was complete
                self._randomness.set(state["now"])
                return iter(())
            warnings.warn(
                f"{OP}: the loader has {_shown(sizes)}, and had {_shown(saved)} when the "
                f"checkpoint was saved, after {skip} batches of this epoch: the run goes on after "
                "as many, and samples may be left out or trained twice in this epoch",
                RuntimeWarning,
                stacklevel=4,
            )
        if state.get("again") and not self._again:
            # Starting workers draws a number, which the epoch that is resumed did not.
            now = self._randomness.state()
            iter(own)
            self._randomness.set(now)
            self._again = True
        if state["before"] is None:
            self._randomness.set_loaders(state["now"])
        else:
            self._randomness.set(state["before"])
        self._before = self._randomness.state()
        iterator = iter(own)
        for done in range(skip):
            try:
                next(iterator)
            except StopIteration:
                raise ValueError(
                    f"{OP}: the loader has only {done} batches, and the checkpoint was saved after "
                    f"{skip} of this epoch; is it another data set or batch size?"
                ) from None
        if skip:
            self._randomness.set(state["now"])
        return iterator
