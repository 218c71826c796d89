"""Copies of what a model and its companions hold, in memory, and the way back.

A snapshot is built whole before it takes the place of the one before, so an interruption leaves the
old one. What several names share (tied weights) is copied once, and is one tensor again afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..core import distributed

_OP = "fusereg.EarlyStopping"

Place: TypeAlias = Literal["cpu", "device"]


@runtime_checkable
class Stateful(Protocol):
    """Optimizers, schedulers, gradient scalers, averaged models: whatever can tell its state."""

    def state_dict(self) -> Any:
        """The state, as a tree of dicts, lists, numbers and tensors."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Takes a state on."""
        ...


class RandomState:
    """torch's generators, on the CPU and on every CUDA device that is in use, as one state."""

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the generators."""
        torch.set_rng_state(state_dict["cpu"])
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state_dict["cuda"])


@dataclass(frozen=True)
class Held:
    """A tensor kept elsewhere than it belongs: from another device, or one rank's part of many.

    Attributes:
        local: the copy.
        device: where the original lies.
        sharding: mesh, placements, shape and stride, if the original is a DTensor.
    """

    local: Tensor
    device: torch.device
    sharding: tuple[Any, Any, torch.Size, tuple[int, ...]] | None = None

    def back(self) -> Tensor:
        """A new tensor where the original lies."""
        local = self.local.to(self.device, copy=True)
        if self.sharding is None:
            return local
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.sharding
        return cast(
            Tensor,
            DTensor.from_local(
                local, mesh, placements, run_check=False, shape=shape, stride=stride
            ),
        )


@dataclass(frozen=True)
class Snapshot:
    """The state at the best check.

    Attributes:
        epoch: of that check.
        value: of the metric, smoothed where there is smoothing.
        states: by name ("model", and those of ``also``), what ``state_dict()`` gave.
        buffers: by name, the buffers of modules that their ``state_dict()`` leaves out.
    """

    epoch: int
    value: float
    states: dict[str, Any] = field(repr=False)
    buffers: dict[str, dict[str, Any]] = field(repr=False)


def clone(tree: Any, place: Place, memo: dict[Any, Any]) -> Any:
    """A copy of a state's tree with tensors of its own, each shared one copied once."""
    if isinstance(tree, Tensor):
        key = _identity(tree)
        if key not in memo:
            memo[key] = _clone_tensor(tree, place)
        return memo[key]
    return _rebuild(tree, lambda item: clone(item, place, memo))


def release(tree: Any, memo: dict[int, Tensor], copying: bool) -> Any:
    """The tree to load from; with ``copying`` its tensors are new, as the receiver keeps them."""
    if isinstance(tree, Held):
        if tree.sharding is None and not copying:
            return tree.local
        if id(tree) not in memo:
            memo[id(tree)] = tree.back()
        return memo[id(tree)]
    if isinstance(tree, Tensor):
        if not copying:
            return tree
        if id(tree) not in memo:
            memo[id(tree)] = tree.clone()
        return memo[id(tree)]
    return _rebuild(tree, lambda item: release(item, memo, copying))


def gather(tree: Any, memo: dict[int, Tensor]) -> Any:
    """The tree with whole tensors, on the CPU, for parts. All ranks together."""
    if isinstance(tree, Held) and tree.sharding is not None:
        if id(tree) not in memo:
            memo[id(tree)] = cast(Any, tree.back()).full_tensor().to("cpu")
        return memo[id(tree)]
    if isinstance(tree, (Tensor, Held)):
        return tree
    return _rebuild(tree, lambda item: gather(item, memo))


def _part_like(whole: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, for one that is sharded as ``like``; asks no rank."""
    if not (isinstance(whole, Tensor) and distributed.is_dtensor(like)):
        return whole
    from torch.distributed.tensor import distribute_tensor

    target = cast(Any, like)
    return distribute_tensor(
        whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def _parts_of(thing: Stateful, state: Any) -> Any:
    """A state of whole tensors as this rank holds it: a module's, or an optimizer's."""
    if isinstance(thing, nn.Module):
        made = copy.copy(state)
        for name, like in thing.state_dict().items():
            if name in made:
                made[name] = _part_like(made[name], like)
        return made
    if not isinstance(thing, torch.optim.Optimizer):
        return state
    names = [i for group in state["param_groups"] for i in group["params"]]
    params = [p for group in thing.param_groups for p in group["params"]]
    entries = dict(state["state"])
    for name, p in zip(names, params, strict=False):  # load_state_dict says what does not fit
        if name in entries and isinstance(entries[name], Mapping):
            entries[name] = {
                key: _part_like(value, p) if getattr(value, "shape", None) == p.shape else value
                for key, value in entries[name].items()
            }
    return {**state, "state": entries}


def _rebuild(tree: Any, each: Any) -> Any:
    if isinstance(tree, Mapping):
        try:
            # Keeps the type (OrderedDict, Counter, defaultdict), and the modules' versions that
            # Module.state_dict() hangs on it.
            made = copy.copy(tree)
            for key in tree:
                made[key] = each(tree[key])  # type: ignore[index]
        except TypeError:  # a mapping that cannot be written to
            return {key: each(value) for key, value in tree.items()}
        return made
    if isinstance(tree, list):
        return [each(item) for item in tree]
    if isinstance(tree, tuple):
        items = [each(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return copy.deepcopy(tree)


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same view of the same memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return id(tensor)
    where = (str(tensor.device), tensor.data_ptr(), tensor.dtype)
    return (*where, tuple(tensor.shape), tensor.stride()) if tensor.numel() else id(tensor)


def _clone_tensor(tensor: Tensor, place: Place) -> Tensor | Held:
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise ValueError(f"{_OP}: a tensor on the meta device has no values to keep")
    device = tensor.device
    sharding = None
    if distributed.is_dtensor(tensor):
        whole = cast(Any, tensor)
        sharding = (whole.device_mesh, whole.placements, whole.shape, whole.stride())
        tensor = whole.to_local().detach()
    if place == "cpu" and device.type != "cpu":
        return Held(tensor.to("cpu"), device, sharding)
    kept = tensor.clone(memory_format=torch.preserve_format)
    return kept if sharding is None else Held(kept, device, sharding)


class Sources:
    """The objects whose states a snapshot holds: the model and what goes with it.

    Args:
        model: the module, or None. Wrappers (DistributedDataParallel, torch.compile) do not count.
        also: further objects by name.
        rng: whether torch's generators belong to it, under the name "rng".

    Raises:
        TypeError: the model is no module, or an object has no state_dict and load_state_dict.
        ValueError: a name is taken.
    """

    def __init__(
        self, model: nn.Module | None, also: Mapping[str, Stateful] | None, rng: bool
    ) -> None:
        objects: dict[str, Stateful] = {}
        if model is not None:
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"{_OP}: model must be a torch.nn.Module or None, got {type(model).__name__}"
                )
            objects["model"] = model
        for name, thing in (also or {}).items():
            if name in ("model", "rng"):
                raise ValueError(f'{_OP}: also: the name "{name}" is taken, choose another')
            if not isinstance(thing, Stateful):
                raise TypeError(
                    f'{_OP}: also["{name}"] must have state_dict and load_state_dict, '
                    f"got {type(thing).__name__}"
                )
            objects[name] = thing
        if rng:
            objects["rng"] = RandomState()
        self._objects = objects

    def __bool__(self) -> bool:
        return bool(self._objects)

    def _current(self) -> dict[str, Stateful]:
        return {
            name: distributed.unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in self._objects.items()
        }

    def sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return any(
            distributed.has_dtensor(_parameters(thing)) for thing in self._current().values()
        )

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with whole tensors in place of parts. All ranks together.

        Only of what ``part_of`` knows how to take apart again: modules and optimizers.
        """
        objects = self._current()
        memo: dict[int, Tensor] = {}
        with _plain_tensors():
            states = {
                name: gather(state, memo) if _parameters(objects[name]) else state
                for name, state in snapshot.states.items()
            }
            return replace(snapshot, states=states)

    def part_of(self, snapshot: Snapshot, place: Place) -> Snapshot:
        """This rank's part of a snapshot of whole tensors; asks no other rank."""
        objects = self._current()
        memo: dict[Any, Any] = {}
        with _plain_tensors():
            states = {
                name: _parts_of(objects[name], state) if name in objects else state
                for name, state in snapshot.states.items()
            }
            return replace(snapshot, states=clone(states, place, memo))

    def capture(self, epoch: int, value: float, place: Place) -> Snapshot:
        """Copies everything."""
        objects = self._current()
        memo: dict[Any, Any] = {}
        with _plain_tensors():
            states = {name: thing.state_dict() for name, thing in objects.items()}
            buffers = {
                name: _left_out(thing, states[name])
                for name, thing in objects.items()
                if isinstance(thing, nn.Module)
            }
            # One memo for all, and the originals alive until the end: a tensor that an average
            # shares with the model is copied once.
            return Snapshot(epoch, value, clone(states, place, memo), clone(buffers, place, memo))

    def restore(self, snapshot: Snapshot) -> None:
        """Loads everything back, modules in place.

        Raises:
            ValueError: the snapshot lacks an object's state.
        """
        objects = self._current()
        missing = [name for name in objects if name not in snapshot.states]
        if missing:
            raise ValueError(
                f"{_OP}: the state of epoch {snapshot.epoch} holds nothing for "
                f"{', '.join(missing)}; it has {', '.join(snapshot.states)}"
            )
        memo: dict[int, Tensor] = {}
        with _plain_tensors():
            for name, thing in objects.items():
                # A module copies into its own tensors; an optimizer keeps what it is given, and
                # would train on inside the snapshot.
                module = isinstance(thing, nn.Module)
                thing.load_state_dict(release(snapshot.states[name], memo, copying=not module))
                if isinstance(thing, nn.Module):
                    _put_back(thing, release(snapshot.buffers.get(name, {}), memo, copying=False))


def _parameters(thing: Stateful) -> list[Tensor]:
    if isinstance(thing, nn.Module):
        # Not parameters(): FSDP2 may have whole ones there since the last forward.
        return [value for value in thing.state_dict().values() if isinstance(value, Tensor)]
    if isinstance(thing, torch.optim.Optimizer):
        return [p for group in thing.param_groups for p in group["params"]]
    return []


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Under a caller's inference_mode too: an optimizer could not train on inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _left_out(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if name not in state}


def _put_back(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    present = dict(module.named_buffers())
    for name, value in kept.items():
        buffer = present.get(name)
        if buffer is not None and buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            like = buffer if buffer is not None else next(module.parameters(), value)
            setattr(module.get_submodule(path), leaf, value.to(like.device, copy=True))
