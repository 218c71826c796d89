"""The sets of coupled channels of a model, from Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..convert.layers import ORIGINAL, Adapted, adapt_back, swap_back
from ..core import distributed
from ..core.modules import check_materialized
from .parts import (
    BATCH_NORM,
    CONV,
    Part,
    Role,
    Set,
    Slot,
    couplings,
    epsilon_of,
    is_depthwise,
    name_epsilons,
    slice_channels,
    slots_of,
)
from .ways import Running, Way, running


class Inputs(NamedTuple):
    """The arguments of a model's forward, and the ways in which to run it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ways: tuple[Way, ...] = (Way(),)

    def call(self, model: nn.Module) -> list[Tensor]:
        """Return the numbers of the model's results, in all ways.

        Raises:
            RuntimeError: forward fails in training.
        """
        found: list[Tensor] = []
        for way in self.ways:
            try:
                found += self.run(model, way)[0]
            except Exception as error:
                if not way.training:
                    raise
                raise RuntimeError(f"in training, {type(error).__name__}: {error}") from error
        return found

    def run(self, model: nn.Module, way: Way) -> tuple[list[Tensor], Running]:
        """Return the numbers of the model's result in one way, and how it ran."""
        own = self.map(torch.clone)  # forward may write to its arguments
        with running(model, way) as ran:
            found = list(_numbers(model(*own.args, **own.kwargs)))
        return found, ran

    def map(self, change: Any) -> Inputs:
        """Return the arguments with a function applied to each tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return self._replace(args=args, kwargs=kwargs)

    def double(self) -> Inputs:
        """Return the arguments with floating-point tensors in float64."""
        return self.map(lambda x: x.detach().double() if x.is_floating_point() else x)

    def other(self, generator: torch.Generator) -> Inputs:
        """Return other arguments of the same shapes: random numbers, or the same ones shuffled."""

        def change(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return torch.randn(x.shape, dtype=x.dtype, device="cpu", generator=generator).to(
                    x.device
                )
            order = torch.randperm(x.numel(), device="cpu", generator=generator).to(x.device)
            return x.flatten()[order].view(x.shape)

        return self.map(change)


def _numbers(result: Any, depth: int = 3) -> Iterator[Tensor]:
    """Return all in a result as floating-point numbers: indices, masks, spectra, sizes too.

    Mappings and objects are looked into, such as ModelOutput of transformers and dataclasses.
    """
    for leaf in pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result):
        if isinstance(leaf, Tensor):
            plain = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf
            yield plain if plain.is_floating_point() else plain.double()
        elif isinstance(leaf, (bool, int, float)):
            yield torch.tensor(float(leaf), dtype=torch.float64, device="cpu")
        elif depth and not isinstance(leaf, (nn.Module, ModuleType, type)):
            inside = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            yield from _numbers(dict(inside), depth - 1)


def inputs_of(model: nn.Module, example_inputs: object, op: str) -> Inputs:
    """Return the example inputs as arguments; they are checked.

    Raises:
        TypeError: they are no tensor, tuple, list or dict, or hold no tensor.
        ValueError: they are empty, or on another device than the model.
    """
    if isinstance(example_inputs, Tensor):
        inputs = Inputs((example_inputs,), {})
    elif isinstance(example_inputs, (tuple, list)):
        inputs = Inputs(tuple(example_inputs), {})
    elif isinstance(example_inputs, Mapping):
        inputs = Inputs((), {str(k): v for k, v in example_inputs.items()})
    else:
        inputs = Inputs((), {})
    tensors = [x for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
    if not tensors:
        raise TypeError(
            f"fusereg.{op}: example_inputs must be a tensor, or a tuple or dict of arguments with "
            f"a tensor among them, got {type(example_inputs).__name__}"
        )
    for x in tensors:
        if not x.numel():
            raise ValueError(
                f"fusereg.{op}: example_inputs must hold no empty tensor, got one of shape "
                f"{tuple(x.shape)}"
            )
    devices = {p.device for p in model.parameters()}
    for x in tensors:
        if devices and x.device not in devices:
            said = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"fusereg.{op}: example_inputs must be on the model's device ({said}), "
                f"got a tensor on {x.device}"
            )
    return inputs


def check_kind(model: nn.Module, op: str) -> None:
    """Raise ValueError for a model whose copy could not be cut, or would not train."""
    check_materialized(model, f"fusereg.{op}")
    for name, module in model.named_modules():
        what = f"fusereg.{op}: {name or 'the model'} is"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{what} a script, which cannot be cut; script the smaller model")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{what} wrapped in DistributedDataParallel, which holds its parameters; give the "
                "module inside, and wrap the smaller model"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"fusereg.{op}: {name} is on the meta device, where it has no values")
        if distributed.is_dtensor(tensor):
            raise ValueError(f"fusereg.{op}: {name} is a DTensor; shard the smaller model instead")


def plain_copy(model: nn.Module, op: str) -> nn.Module:
    """Return a copy in float64 and evaluation, with the classes that layers had before convert."""
    try:
        found = copy.deepcopy(model)
    except Exception as error:
        why = str(error)
        if "graph leaves" in why:
            why = (
                "it keeps a weight that was computed from other parameters, with its graph; call "
                "torch.nn.utils.prune.remove or remove_weight_norm first"
            )
        raise ValueError(f"fusereg.{op}: the model cannot be copied: {why}") from error
    for module in list(found.modules()):
        if isinstance(module, Adapted):
            adapt_back(module)
        elif ORIGINAL in vars(module):
            swap_back(module)
    name_epsilons(found)
    return found.double().eval().requires_grad_(True)


#: How many times each node of the graph is visited on the mean, and each of so many channels as
#: the widest layer has is mapped, before the search for a group is given up.
_VISITS, _MAPPED = 50, 200


class Traced(NamedTuple):
    """The sets of a dependency graph, before they are checked."""

    sets: list[Set]
    kept: dict[str, str]
    """Layers that have no set, with the reason."""
    norms: dict[str, str]
    """The batch norm that alone reads the result of a layer, by the layer's name."""


def sets_of(model: nn.Module, inputs: Inputs, op: str) -> Traced:
    """Return the sets that the dependency graph finds, and why other layers have none."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ImportError(
            f"fusereg.{op} needs Torch-Pruning: pip install 'fusereg[compact]'"
        ) from error
    names = {id(m): name for name, m in model.named_modules()}
    names |= {id(p): name for name, p in model.named_parameters()}
    graph = tp.DependencyGraph()
    way = _of_most_layers(model, inputs)
    what = "the model cannot be traced with these example_inputs"

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        nonlocal what
        made = inputs.run(model, way)[0]
        what = "Torch-Pruning's dependency graph fails for this model"
        return [y for y in made if y.grad_fn is not None]

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model, (inputs.args, inputs.kwargs), forward_fn=forward, verbose=False
            )
        except Exception as error:
            raise ValueError(
                f"fusereg.{op}: {what}: {type(error).__name__}: {error}{_in_float64(error)}"
            ) from error
        model.eval()
        builder = _Builder(model, graph, names)
        for layer in list(graph.module2node):
            writes = isinstance(layer, (CONV, nn.Linear)) and not is_depthwise(layer)
            if writes and id(layer) not in builder.seen:
                builder.add(layer)
    reached = {id(m) for m in graph.module2node}
    for name, layer in model.named_modules():
        if isinstance(layer, (CONV, nn.Linear)) and id(layer) not in reached:
            around = model.get_submodule(name.rpartition(".")[0])
            builder.kept.setdefault(
                name,
                "nn.MultiheadAttention does not call it as a layer; heads go from attention "
                "that is written with linear layers of its own"
                if isinstance(around, nn.MultiheadAttention)
                else "it is not called as a layer, or no gradient of the outputs reaches it",
            )
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for found in builder.sets:
        writers = [p.module for p in found.parts if p.role == "out"]
        found.name = min(writers, key=lambda name: order.get(name, 0))
    builder.sets.sort(key=lambda s: order.get(s.name, 0))
    return Traced(builder.sets, builder.kept, dict(_norms(graph, names)))


def _in_float64(error: Exception) -> str:
    """Return what to do about an error of mixed types."""
    if not any(word in str(error).lower() for word in ("dtype", "scalar type", "double")):
        return ""
    return (
        " (it is tried in float64; make tensors in forward with the dtype of the input or of a "
        "parameter)"
    )


@torch.no_grad()
def _of_most_layers(model: nn.Module, inputs: Inputs) -> Way:
    """Return the way in which all layers are called that any way calls; evaluation if none is."""
    if len(inputs.ways) == 1:
        return inputs.ways[0]
    called: list[set[str]] = []

    def hook(name: str) -> Any:
        return lambda *_: called[-1].add(name)

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, (CONV, nn.Linear)):
                hooks.enter_context(layer.register_forward_hook(hook(name)))
        for way in inputs.ways:
            called.append(set())
            inputs.run(model, way)
    everything = set().union(*called)
    return next(
        (w for w, c in zip(inputs.ways, called, strict=True) if c == everything), inputs.ways[0]
    )


class _Budget:
    """Budget of the search for a group, whose channels go around in some models forever."""

    def __init__(self) -> None:
        self.visits = self.indices = 0

    def spend(self, visits: int, indices: int) -> None:
        """Count visits of nodes and indices of channels.

        Raises:
            _Unknown: there were too many.
        """
        self.visits -= visits
        self.indices -= indices
        if self.visits < 0 or self.indices < 0:
            raise _Unknown(
                "the dependency graph does not come to an end here: products over positions, for "
                "example"
            )


class _Dependencies(list[Any]):
    """The dependencies of a node of the graph, which are counted when they are followed."""

    def __init__(self, items: Any, budget: _Budget) -> None:
        super().__init__(items)
        self._budget = budget
        for dep in items:
            dep.index_mapping = _Mappings(dep.index_mapping, budget)

    def __iter__(self) -> Iterator[Any]:
        """Count, and return the dependencies."""
        self._budget.spend(1, 0)
        return super().__iter__()


class _Mappings(list[Any]):
    """The mappings of a dependency, whose work is counted."""

    def __init__(self, items: Any, budget: _Budget) -> None:
        super().__init__(items)
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        """Return the mappings, each of which counts before it works."""

        def counted(mapping: Any) -> Any:
            def mapped(indices: Any) -> Any:
                grows = 1 if getattr(mapping, "reverse", True) else getattr(mapping, "_stride", 1)
                self._budget.spend(0, len(indices) * grows)
                return mapping(indices)

            return mapped

        return iter([None if m is None else counted(m) for m in super().__iter__()])


def _limited(graph: Any) -> _Budget:
    """Return the budget of the searches in a graph."""
    budget = _Budget()
    for node in graph.module2node.values():
        node.dependencies = _Dependencies(node.dependencies, budget)
    return budget


def _norms(graph: Any, names: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Return the layers whose result is read by one batch norm alone, which reads nothing else."""
    for layer, node in graph.module2node.items():
        after = {id(n.module): n for n in node.outputs}
        if isinstance(layer, (CONV, nn.Linear)) and len(after) == 1:
            (following,) = after.values()
            if isinstance(following.module, BATCH_NORM) and len(following.inputs) == 1:
                yield names[id(layer)], names[id(following.module)]


class _Unknown(Exception):
    """A group that has no set, with the reason."""


class _Builder:
    """Collects the sets of a graph."""

    def __init__(self, model: nn.Module, graph: Any, names: dict[int, str]) -> None:
        self.model, self.graph, self.names = model, graph, names
        self.budget = _limited(graph)
        layers = (m for m in graph.module2node if isinstance(m, (CONV, nn.Linear)))
        self.widest = max((max(m.weight.shape[:2]) for m in layers), default=0)
        self.sets: list[Set] = []
        self.kept: dict[str, str] = {}
        self.seen: set[int] = set()
        self._claimed: dict[tuple[str, str, int], Tensor] = {}

    def add(self, layer: Any) -> None:
        """Add the set of channels that a layer writes, or the reason why it has none."""
        before = set(self.seen)
        self.seen.add(id(layer))
        name = self.names[id(layer)]
        try:
            pruner = self.graph.get_pruner_of_module(layer)
            count = pruner.get_out_channels(layer)
            self.budget.visits = _VISITS * len(self.graph.module2node)
            self.budget.indices = _MAPPED * max(self.widest, 512)
            group = self.graph.get_pruning_group(
                layer, pruner.prune_out_channels, list(range(count))
            )
            found = self._set(name, count, list(group))
            self._claim(found)
        except Exception as error:
            reason = str(error)
            if not isinstance(error, _Unknown):
                reason = f"the dependency graph fails here: {type(error).__name__}: {reason}"
            self.kept |= {self.names[i]: reason for i in self.seen - before if i in self.names}
        else:
            self.sets.append(found)

    def _set(self, name: str, count: int, group: list[Any]) -> Set:
        """Return the set of a group of the graph."""
        maps: list[tuple[Any, Role, Tensor]] = []
        joined = _Classes(count)
        for item in group:
            module = item.dep.target.module
            role = self._role(item.dep)
            size = self._size(module, role)
            if size is None:
                continue
            if role == "out":
                self.seen.add(id(module))
            roots = item.root_idxs
            if roots is None or any(r is None for r in roots):
                raise _Unknown("the dependency graph cannot tell its channels apart")
            channels = torch.full((size,), -1, dtype=torch.int64, device="cpu")
            for i, root in zip(item.idxs, roots, strict=True):
                if not 0 <= i < size:
                    raise _Unknown(
                        f"the dependency graph takes {self.names.get(id(module), 'an operation')}, "
                        f"which has {size} slices, for one with a slice for each channel"
                    )
                if channels[i] >= 0:
                    joined.join(int(channels[i]), int(root))
                channels[i] = int(root)
            maps.append((module, role, channels))
        for module, role, channels in maps:
            for together in couplings(module, role):
                present = [int(c) for c in channels[together] if c >= 0]
                if present and len(present) < len(together):
                    raise _Unknown(
                        f"some groups of {self.names[id(module)]} hold channels of other layers"
                    )
                for c in present[1:]:
                    joined.join(present[0], c)
        number = joined.numbers()
        size = int(number.max()) + 1
        if size < 2:
            raise _Unknown("its channels can only be removed all together")
        parts = []
        for module, role, channels in maps:
            classes = torch.where(channels >= 0, number[channels.clamp_min(0)], channels)
            parts.append(self._part(module, role, classes))
            owner = parts[-1].of(self.model)
            if isinstance(module, nn.Parameter) and epsilon_of(owner) is not None:
                parts.append(Part(parts[-1].module, "in", (), classes))
        return Set(name, size, parts)

    def _role(self, dep: Any) -> Role:
        module = dep.target.module
        if isinstance(module, (CONV, nn.Linear)) and not is_depthwise(module):
            return "out" if self.graph.is_out_channel_pruning_fn(dep.handler) else "in"
        return "out" if isinstance(module, nn.Embedding) else "through"

    def _size(self, module: Any, role: Role) -> int | None:
        """Return the number of channels of a module in this role; None for operations."""
        if isinstance(module, nn.Parameter):
            return int(module.shape[self.graph.module2node[module].pruning_dim])
        if isinstance(module, nn.LayerNorm):
            raise _Unknown(
                f"{self.names[id(module)]} normalizes over its channels: none can be removed "
                "from a layer normalization without changing the others"
            )
        if id(module) not in self.names:
            return None
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return None
        if isinstance(module, CONV) and not is_depthwise(module):
            if module.groups == module.out_channels > 1:
                raise _Unknown(f"{self.names[id(module)]} has one output for each group")
            return module.in_channels if role == "in" else module.out_channels
        if isinstance(module, nn.GroupNorm) and not module.affine:
            raise _Unknown(f"{self.names[id(module)]} is a group normalization without weights")
        pruner = self.graph.get_pruner_of_module(module)
        size = (pruner.get_in_channels if role == "in" else pruner.get_out_channels)(module)
        return None if size is None else int(size)

    def _part(self, module: Any, role: Role, channels: Tensor) -> Part:
        name = self.names[id(module)]
        if isinstance(module, nn.Parameter):
            owner, _, key = name.rpartition(".")
            dim = self.graph.module2node[module].pruning_dim % module.dim()
            return Part(owner, role, (Slot(key, dim),), channels)
        slots = slots_of(module, role)
        if slots is None:
            raise _Unknown(f"{name} ({type(module).__name__}) mixes its channels")
        for slot in slots:
            if slot.key in ("weight", "bias") and slot.key not in module._parameters:
                raise _Unknown(f"{slot.key} of {name} is computed from other parameters")
        return Part(name, role, slots, channels)

    def _claim(self, found: Set) -> None:
        """Check that no other set has the same slices, and note them as this set's."""
        claims = []
        for part in found.parts:
            for slot in part.slots:
                layer = part.of(self.model)
                mine = slice_channels(layer, part.role, slot, part.channels) >= 0
                at = (part.module, slot.key, slot.dim)
                taken = self._claimed.get(at, torch.zeros_like(mine))
                if (mine & taken).any():
                    raise _Unknown(f"{part.module} has channels that another set has too")
                claims.append((at, mine | taken))
        self._claimed.update(claims)


class _Classes:
    """Channels that are joined until only those remain that can be removed separately."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, i: int) -> int:
        """Return the first channel of a class."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, a: int, b: int) -> None:
        """Put two channels into one class."""
        a, b = sorted((self.root(a), self.root(b)))
        self._parent[b] = a

    def numbers(self) -> Tensor:
        """Return the number of each channel's class, in the order of their first channels."""
        roots = [self.root(i) for i in range(len(self._parent))]
        order = {r: n for n, r in enumerate(sorted(set(roots)))}
        return torch.tensor([order[r] for r in roots], device="cpu")
