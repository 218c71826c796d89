"""In-memory copies of the states of a model and other objects, and how to restore them.

A snapshot is complete before it replaces the previous one, so an interruption leaves the old one.
Tensors that are shared (tied weights) are copied once, and are shared again after restoring.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from . import distributed
from .modules import check_materialized

Place: TypeAlias = Literal["cpu", "device"]


@runtime_checkable
class Stateful(Protocol):
    """An object with a state, such as an optimizer, a scheduler, a scaler or an averaged model."""

    def state_dict(self) -> Any:
        """Return the state, as a tree of dicts, lists, numbers and tensors."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Load a state that ``state_dict`` returned."""
        ...


class GeneratorState:
    """A torch.Generator as an object with ``state_dict``."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"state": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generator's state."""
        self._generator.set_state(state_dict["state"])


class RandomState:
    """torch's default generators, on the CPU and on the CUDA devices if CUDA is in use."""

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generators' states."""
        torch.set_rng_state(state_dict["cpu"])
        if "cuda" in state_dict and torch.cuda.is_available():
            for index, state in enumerate(state_dict["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, index)


@dataclass(frozen=True)
class Held:
    """The copy of a tensor of another device, or of this rank's part of a DTensor.

    Attributes:
        local: the copy.
        device: the original's device.
        sharding: mesh, placements, shape and stride, if the original is a DTensor.
    """

    local: Tensor
    device: torch.device
    sharding: tuple[Any, Any, torch.Size, tuple[int, ...]] | None = None

    def restored(self) -> Tensor:
        """Return a new tensor like the original, on its device."""
        local = self.local.to(self.device, copy=True)
        if self.sharding is None:
            return local
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.sharding
        whole = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return cast(Tensor, whole)


@dataclass(frozen=True)
class Snapshot:
    """The state at the best check.

    Attributes:
        epoch: the epoch of that check.
        value: the metric's value, smoothed with ``smoothing``.
        states: by name ("model", and those of ``also``), what ``state_dict()`` returned.
        buffers: by name, the buffers of modules, and parameters in training, that are not in their
            ``state_dict()``.
    """

    epoch: int
    value: float
    states: dict[str, Any] = field(repr=False)
    buffers: dict[str, dict[str, Any]] = field(repr=False)


Memo: TypeAlias = dict[Any, Any]


def map_tensors(tree: Any, function: Callable[[Any], Any], memo: Memo) -> Any:
    """Return a copy of a state with ``function`` applied once to each Tensor and Held in it."""
    if isinstance(tree, (Tensor, Held)):
        key = _identity(tree)
        if key not in memo:
            memo[key] = function(tree)
        return memo[key]

    def each(item: Any) -> Any:
        return map_tensors(item, function, memo)

    if isinstance(tree, Mapping):
        try:
            # A copy keeps the type (OrderedDict, Counter, defaultdict), and the modules' versions
            # that Module.state_dict() adds as an attribute.
            made = copy.copy(tree)
            for key in tree:
                made[key] = each(tree[key])  # type: ignore[index]
        except TypeError:  # the mapping is read-only
            return {key: each(value) for key, value in tree.items()}
        return made
    if isinstance(tree, list):
        return [each(item) for item in tree]
    if isinstance(tree, tuple):
        items = [each(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return copy.deepcopy(tree)


def _identity(tensor: Tensor | Held) -> Any:
    """Return a key that is equal for two tensors that are the same view of the same memory."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor)
    assert isinstance(tensor, Tensor)
    if tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    address = (str(tensor.device), tensor.data_ptr(), tensor.dtype)
    return (*address, tuple(tensor.shape), tensor.stride())


def clone(tree: Any, place: Place, memo: Memo) -> Any:
    """Return a copy of a state with tensors of its own, on the CPU or on the originals' device."""
    return map_tensors(tree, lambda tensor: _clone_tensor(tensor, place), memo)


def _clone_tensor(tensor: Tensor, place: Place) -> Tensor | Held:
    """Copy a tensor, of a DTensor this rank's part."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise ValueError("fusereg: a tensor on the meta device has no values to keep")
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


def release(tree: Any, memo: Memo, copying: bool) -> Any:
    """Return the state to load; with ``copying``, its tensors are new, as the receiver keeps them.

    Without, a tensor that was moved to the CPU stays there.
    """

    def released(tensor: Tensor | Held) -> Tensor:
        if isinstance(tensor, Tensor):
            return tensor.clone() if copying else tensor
        return tensor.local if tensor.sharding is None and not copying else tensor.restored()

    return map_tensors(tree, released, memo)


def gather(tree: Any, memo: Memo) -> Any:
    """Return the state with sharded tensors gathered on the CPU. All ranks must call it."""

    def gathered(tensor: Tensor | Held) -> Tensor | Held:
        if isinstance(tensor, Held) and tensor.sharding is not None:
            return cast(Tensor, cast(Any, tensor.restored()).full_tensor().to("cpu"))
        return tensor

    return map_tensors(tree, gathered, memo)


def _shard_like(whole: Any, like: Any) -> Any:
    """Return this rank's part of a whole tensor, sharded as ``like``, without communication."""
    if not (isinstance(whole, Tensor) and distributed.is_dtensor(like)):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def _shard(thing: Stateful, state: Any) -> Any:
    """Return a module's or optimizer's state of whole tensors, sharded as the object's own."""
    if isinstance(thing, nn.Module):
        made = copy.copy(state)
        for name, like in thing.state_dict().items():
            if name in made:
                made[name] = _shard_like(made[name], like)
        return made
    if not isinstance(thing, torch.optim.Optimizer):
        return state
    names = [i for group in state["param_groups"] for i in group["params"]]
    entries = dict(state["state"])
    for name, p in zip(names, _parameters(thing), strict=False):  # load_state_dict reports misfits
        if name in entries and isinstance(entries[name], Mapping):
            entries[name] = {
                key: _shard_like(value, p) if getattr(value, "shape", None) == p.shape else value
                for key, value in entries[name].items()
            }
    return {**state, "state": entries}


class Sources:
    """The objects whose states a snapshot holds.

    Args:
        op: the name that begins error messages.
        objects: the objects by name.
        place: where the objects come from, with {} for the name, for error messages.
    """

    def __init__(self, op: str, objects: Mapping[str, Any], place: str = "{}") -> None:
        self._op = op
        self._objects: dict[str, Stateful] = {}
        for name, thing in objects.items():
            if isinstance(thing, torch.Generator):
                thing = GeneratorState(thing)
            if isinstance(thing, type) or not isinstance(thing, Stateful):
                raise TypeError(
                    f"{op}: {place.format(name)} must have state_dict and load_state_dict, "
                    f"got {type(thing).__name__}"
                )
            self._objects[name] = thing

    def __iter__(self) -> Iterator[Stateful]:
        return iter(self._objects.values())

    def names(self) -> list[str]:
        """Return the objects' names."""
        return list(self._objects)

    def states(self) -> dict[str, Any]:
        """Return what each object's ``state_dict()`` returns now."""
        return self._states_of(self._current())

    def _states_of(self, objects: Mapping[str, Stateful]) -> dict[str, Any]:
        for name, thing in objects.items():
            if isinstance(thing, nn.Module):
                check_materialized(thing, f"{self._op}: {name}")
        return {name: thing.state_dict() for name, thing in objects.items()}

    def __bool__(self) -> bool:
        return bool(self._objects)

    def module(self, name: str) -> nn.Module | None:
        """Return the module of this name, without its wrappers."""
        thing = self._objects.get(name)
        return distributed.unwrapped(thing) if isinstance(thing, nn.Module) else None

    def _current(self) -> dict[str, Stateful]:
        """Return the objects, modules without their wrappers."""
        return {
            name: distributed.unwrapped(thing) if isinstance(thing, nn.Module) else thing
            for name, thing in self._objects.items()
        }

    def sharded(self) -> bool:
        """Return whether any parameter is a DTensor."""
        return any(map(distributed.has_dtensor, map(_parameters, self._current().values())))

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """Gather the sharded tensors of a snapshot. All ranks must call it.

        Only those of modules and optimizers, which ``part_of`` can shard again.
        """
        objects = self._current()
        memo: Memo = {}
        with _normal_tensors():
            states = {
                name: gather(state, memo) if _parameters(objects[name]) else state
                for name, state in snapshot.states.items()
            }
            return replace(snapshot, states=states)

    def part_of(self, snapshot: Snapshot, place: Place) -> Snapshot:
        """Return this rank's part of a snapshot of whole tensors, without communication."""
        objects = self._current()
        with _normal_tensors():
            states = {
                name: _shard(objects[name], state) if name in objects else state
                for name, state in snapshot.states.items()
            }
            return replace(snapshot, states=clone(states, place, {}))

    def capture(self, epoch: int, value: float, place: Place) -> Snapshot:
        """Take a snapshot."""
        objects = self._current()
        memo: Memo = {}
        with _normal_tensors():
            states = self._states_of(objects)
            buffers = {
                name: _outside(thing, states[name])
                for name, thing in objects.items()
                if isinstance(thing, nn.Module)
            }
            # One memo for all, and the originals alive until the end: a tensor that an average
            # shares with the model is copied once.
            return Snapshot(epoch, value, clone(states, place, memo), clone(buffers, place, memo))

    def restore(self, snapshot: Snapshot) -> None:
        """Load a snapshot into the objects, in place into modules.

        Raises:
            ValueError: as :meth:`check`, or a module whose own hooks know other names refuses its
                state. Nothing has changed then, nor if an object that is no module raises.
        """
        self.check(snapshot)
        objects = self._current()
        modules = {name: t for name, t in objects.items() if isinstance(t, nn.Module)}
        states = snapshot.states
        unlike = [
            name for name, m in modules.items() if m.state_dict().keys() != states[name].keys()
        ]
        shared: Memo = {}
        copies: Memo = {}
        before: list[tuple[Stateful, Any]] = []
        with _normal_tensors():
            # A module copies into its own tensors, so it comes last. Others keep what they are
            # given, and would go on training inside the snapshot.
            try:
                for name, thing in objects.items():
                    if name not in modules:
                        before.append((thing, thing.state_dict()))
                        thing.load_state_dict(release(snapshot.states[name], copies, copying=True))
                for name, module in modules.items():
                    if unlike:  # torch copies what fits before it says what does not
                        own = clone(module.state_dict(), "device", {})
                        before.append((module, release(own, {}, copying=False)))
                    module.load_state_dict(release(snapshot.states[name], shared, copying=False))
            except BaseException as error:
                for thing, state in before:
                    with suppress(Exception):  # the one that refused has taken nothing
                        thing.load_state_dict(state)
                if name in unlike and isinstance(error, RuntimeError):
                    raise ValueError(
                        f"{self._op}: the state of epoch {snapshot.epoch} is of another model than "
                        f"{name}: {' '.join(str(error).split())}"
                    ) from error
                raise
            for name, module in modules.items():
                buffers = release(snapshot.buffers.get(name, {}), shared, copying=False)
                _restore_buffers(module, buffers)

    def check(self, snapshot: Snapshot) -> None:
        """Raise ValueError if a snapshot lacks an object, or a module has other tensors."""
        objects = self._current()
        where = f"{self._op}: the state of epoch {snapshot.epoch}"
        missing = [name for name in objects if name not in snapshot.states]
        if missing:
            raise ValueError(
                f"{where} holds nothing for {', '.join(missing)}; it has "
                + (", ".join(snapshot.states) or "none of the objects that were given")
            )
        for name, module in objects.items():
            if isinstance(module, nn.Module):
                _check_fit(module, snapshot.states[name], where, name)


def _check_fit(module: nn.Module, state: Mapping[str, Any], where: str, name: str) -> None:
    """Raise ValueError if a module and its state differ in the names or shapes of tensors."""
    present = module.state_dict()
    keys = {
        "lacks": [key for key in present if key not in state],
        "also has": [key for key in state if key not in present],
    }
    if any(keys.values()) and not _takes(module, state):
        parts = [
            f"{verb} {', '.join(k[:3])}{', ...' * (len(k) > 3)}" for verb, k in keys.items() if k
        ]
        raise ValueError(
            f"{where} {' and '.join(parts)} of {name}; is it that of another architecture?"
        )
    for key, own in present.items():
        kept = state.get(key)
        if isinstance(kept, Held):
            kept = kept.local if kept.sharding is None else None
        if not isinstance(own, Tensor) or not isinstance(kept, Tensor):
            continue
        if not nn.parameter.is_lazy(own) and own.shape != kept.shape:
            raise ValueError(
                f"{where} has {name}'s {key} with shape {tuple(kept.shape)}, wanted "
                f"{tuple(own.shape)}"
            )
    first: dict[int, str] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), key)
        a, b = state.get(other), state.get(key)
        if a is not b and isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b):
            raise ValueError(
                f"{where} has two weights as {other} and {key} of {name}, which are tied now"
            )


def _takes(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Return whether a module takes a state that has other names than its own."""
    own_way = any(
        m._load_state_dict_pre_hooks
        or type(m).load_state_dict is not nn.Module.load_state_dict
        or not type(m)._load_from_state_dict.__module__.startswith(("torch.nn.", "fusereg."))
        for m in module.modules()
    )
    if not own_way:
        return False
    try:
        probe = copy.deepcopy(module)  # as a module that refuses a state may have taken a part
    except Exception:
        return True  # its own load_state_dict tells what is wrong
    try:
        probe.load_state_dict(release(state, {}, copying=False))
    except RuntimeError:
        return False
    return True


def fingerprint(module: nn.Module) -> str:
    """Return a hash of the first few numbers of each tensor, by which weights are known again."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if known and tensor.numel() and tensor.is_floating_point() and not tensor.is_meta:
            row = tensor.detach()[(0,) * (tensor.ndim - 1)] if tensor.ndim else tensor.detach()
            by_device.setdefault(tensor.device, []).append(row.reshape(-1)[:4].double())
    digest = hashlib.sha256()
    for parts in by_device.values():
        digest.update(repr(torch.cat(parts).tolist()).encode())
    return digest.hexdigest()[:16]


def _parameters(thing: Stateful) -> list[Tensor]:
    """Return the parameters of an optimizer, or all tensors in the state of a module."""
    if isinstance(thing, nn.Module):
        # Not parameters(): FSDP2 may have gathered those since the last forward.
        return [value for value in thing.state_dict().values() if isinstance(value, Tensor)]
    if isinstance(thing, torch.optim.Optimizer):
        return [p for group in thing.param_groups for p in group["params"]]
    return []


@contextmanager
def _normal_tensors() -> Iterator[None]:
    """Leave the caller's inference mode: an optimizer could not train on inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _outside(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the buffers, and the parameters in training, that a module's state leaves out.

    Under another name they are in it. Sharded ones are not looked at: only a state can be gathered.
    """
    found = {k: b for k, b in module.named_buffers() if k not in state}
    missing = {
        k: p
        for k, p in module.named_parameters()
        if k not in state
        and p.requires_grad
        and not nn.parameter.is_lazy(p)
        and not (distributed.is_dtensor(p) or "_flat_param" in k)
    }
    if missing:
        held = {_identity(t.detach()) for t in state.values() if isinstance(t, Tensor)}
        found.update((k, p) for k, p in missing.items() if _identity(p.detach()) not in held)
    return found


def _restore_buffers(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Restore buffers and parameters that are not in the module's ``state_dict()``."""
    present = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in kept.items():
        buffer = present.get(name)
        if buffer is not None and buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            like = buffer if buffer is not None else next(module.parameters(), value)
            setattr(module.get_submodule(path), leaf, value.to(like.device, copy=True))
