"""Slices of layers' tensors by the channels that they belong to, and how to cut them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

CONV: TypeAlias = nn.modules.conv._ConvNd
BATCH_NORM: TypeAlias = nn.modules.batchnorm._BatchNorm
INSTANCE_NORM: TypeAlias = nn.modules.instancenorm._InstanceNorm

#: What a part does to the channels: it makes them, keeps them apart from each other, or reads them.
Role: TypeAlias = Literal["out", "through", "in"]


class Slot(NamedTuple):
    """A parameter or buffer of a module, and the dimension along which its channels lie."""

    key: str
    dim: int


class Part(NamedTuple):
    """A module that writes, normalizes or reads the channels of a set."""

    module: str
    """The module's name, or a parameter's that belongs to no layer."""
    role: Role
    slots: tuple[Slot, ...]
    channels: Tensor
    """int64 [channels of the module in this role]: the channel of the set, -1 for none."""

    def of(self, model: nn.Module) -> Any:
        """Return the module that holds the slots."""
        return model.get_submodule(self.module)


class Number(NamedTuple):
    """A number that a module keeps of a set's channels: so many for each."""

    module: str
    key: str
    each: int


@dataclass
class Set:
    """A set of coupled channels."""

    name: str
    size: int
    parts: list[Part]
    operations: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu")
    )
    numbers: tuple[Number, ...] = ()
    width: int = 1
    """Slices of a reader for each channel: an attention head has several."""

    @property
    def writers(self) -> list[Part]:
        """Return the parts whose slices must be zero for a channel to be zero."""
        return [p for p in self.parts if p.role != "in"]

    @property
    def readers(self) -> list[Part]:
        """Return the parts that read the channels."""
        return [p for p in self.parts if p.role == "in"]


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a convolution treats each channel by itself."""
    return isinstance(layer, CONV) and layer.groups == layer.out_channels == layer.in_channels > 1


def slots_of(layer: nn.Module, role: Role) -> tuple[Slot, ...] | None:
    """Return the tensors of a layer that have a slice for each channel; None if unknown."""
    if isinstance(layer, CONV):
        writes, reads = (1, 0) if layer.transposed else (0, 1)
        if role == "in":
            found = [Slot("weight", reads)]
        else:
            dim = 0 if is_depthwise(layer) else writes
            found = [Slot("weight", dim), Slot("bias", 0)]
    elif isinstance(layer, nn.Linear):
        found = [Slot("weight", 1)] if role == "in" else [Slot("weight", 0), Slot("bias", 0)]
    elif isinstance(layer, nn.Embedding):
        found = [Slot("weight", 1)]
    elif isinstance(layer, (BATCH_NORM, INSTANCE_NORM, nn.GroupNorm, nn.PReLU)):
        found = [Slot(k, 0) for k in ("weight", "bias", "running_mean", "running_var")]
    else:
        return None
    return tuple(s for s in found if isinstance(getattr(layer, s.key, None), Tensor))


def slice_channels(layer: nn.Module, role: Role, slot: Slot, channels: Tensor) -> Tensor:
    """Return the channel of each slice of a slot, from those of the module's channels.

    A grouped convolution's slices of columns (of rows, if it is transposed) serve all its groups.
    """
    size = getattr(layer, slot.key).shape[slot.dim] if slot.key else len(channels)
    if size == len(channels):
        return channels
    return channels[:size]


def couplings(layer: nn.Module, role: Role) -> Iterator[list[int]]:
    """Return the channels of a layer that can only be removed together."""
    if isinstance(layer, CONV) and layer.groups > 1 and not is_depthwise(layer):
        n = layer.in_channels if role == "in" else layer.out_channels
        each = n // layer.groups
        for i in range(each):
            yield list(range(i, n, each))
    elif isinstance(layer, nn.GroupNorm):
        each = layer.num_channels // layer.num_groups
        for i in range(0, layer.num_channels, each):
            yield list(range(i, i + each))


@torch.no_grad()
def epsilon_of(norm: nn.Module) -> str | None:
    """Return where a module keeps its epsilon if it computes w x / sqrt(mean(x^2) + epsilon)."""
    weight = norm._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(list(norm.parameters())) != 1:
        return None
    for key in ("eps", "variance_epsilon"):
        epsilon = getattr(norm, key, None)
        if isinstance(epsilon, float):
            x = torch.linspace(-1, 2, 2 * len(weight), dtype=weight.dtype, device=weight.device)
            x = x.view(2, -1)
            try:
                made = norm(x)
            except Exception:  # it is no function of one tensor of these channels
                return None
            wanted = weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            alike = isinstance(made, Tensor) and made.shape == x.shape
            return key if alike and torch.allclose(made.to(x), wanted, 1e-3, 1e-5) else None
    return None


def name_epsilons(model: nn.Module) -> list[nn.RMSNorm]:
    """Give RMSNorms that take epsilon from the type of their numbers that of their weight's type.

    Returns:
        Those that had none.
    """
    found = [
        m
        for m in model.modules()
        if isinstance(m, nn.RMSNorm) and m.eps is None and isinstance(m.weight, Tensor)
    ]
    for norm in found:
        norm.eps = torch.finfo(norm.weight.dtype).eps
    return found


# --- cutting --------------------------------------------------------------------------------------

#: For each tensor of a model, by name: the indices that stay, for each dimension that is cut.
Cuts: TypeAlias = dict[str, dict[int, Tensor]]


def cuts_of(model: nn.Module, sets: Iterable[tuple[Set, Tensor]]) -> Cuts:
    """Return what stays of each tensor if the channels given by a mask are removed."""
    keep: dict[tuple[str, int], Tensor] = {}
    for found, removed in sets:
        if not removed.any():
            continue
        for part in found.parts:
            layer = part.of(model)
            for slot in part.slots:
                channels = slice_channels(layer, part.role, slot, part.channels)
                gone = removed[channels.clamp_min(0)] & (channels >= 0)
                name = f"{part.module}.{slot.key}" if part.module else slot.key
                at = (name, slot.dim)
                keep[at] = keep.get(at, torch.ones_like(gone)) & ~gone
    cuts: Cuts = {}
    for (name, dim), mask in keep.items():
        if not mask.all():
            cuts.setdefault(name, {})[dim] = mask.nonzero().flatten()
    return cuts


def shortened(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of a tensor without the slices that are cut, in the same memory format."""
    short = tensor
    for dim, index in cuts.items():
        short = short.index_select(dim, index.to(tensor.device))
    # Of dimensions with the same stride, all but one have a single slice: they lie inside of it.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], tensor.shape[d] == 1))
    made = torch.empty_permuted(short.shape, order, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(short)


def scales_of(model: nn.Module, cuts: Cuts) -> dict[str, float]:
    """Return the factor of each RMSNorm's weight that is cut.

    A mean over C' of C channels, where the others are zero, is C / C' times as large. With sqrt(C /
    C') in the weight and C / C' in epsilon, the result is the same.
    """
    found = {}
    for name, by_dim in cuts.items():
        owner, _, key = name.rpartition(".")
        norm = model.get_submodule(owner)
        if key == "weight" and epsilon_of(norm) is not None:
            found[name] = (len(norm.weight) / len(by_dim[0])) ** 0.5  # type: ignore[arg-type]
    return found


@torch.no_grad()
def cut(model: nn.Module, sets: Iterable[tuple[Set, Tensor]]) -> Cuts:
    """Remove the channels given by a mask from a model in place; return what stays of its tensors.

    The sizes that layers keep beside their tensors are set as well.
    """
    sets = list(sets)
    cuts = cuts_of(model, sets)
    new: dict[int, Tensor] = {}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name, scale in scales_of(model, cuts).items():
        norm = modules[name.rpartition(".")[0]]
        norm.weight.mul_(scale)
        key = epsilon_of(norm) or ""
        setattr(norm, key, getattr(norm, key) * scale**2)
    for name, by_dim in cuts.items():
        owner, _, key = name.rpartition(".")
        tensor = getattr(modules[owner], key)
        short = shortened(tensor.detach(), by_dim)
        if isinstance(tensor, nn.Parameter):
            short = nn.Parameter(short, requires_grad=tensor.requires_grad)
        new[id(tensor)] = short
    for module in modules.values():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and id(tensor) in new:
                    tensors[key] = new[id(tensor)]
    for owner in {name.rpartition(".")[0] for name in cuts}:
        _set_sizes(modules[owner])
    bare: dict[str, Tensor] = {}  # norms without tensors, which torch's layers keep a size of
    for found, removed in sets:
        for number in found.numbers:
            setattr(modules[number.module], number.key, number.each * int((~removed).sum()))
        for part in found.parts:
            if not part.slots and isinstance(part.of(model), (BATCH_NORM, INSTANCE_NORM)):
                gone = removed[part.channels.clamp_min(0)] & (part.channels >= 0)
                bare[part.module] = bare.get(part.module, torch.ones_like(gone)) & ~gone
    for name, stay in bare.items():
        modules[name].num_features = int(stay.sum())
    return cuts


def _set_sizes(module: Any) -> None:
    """Set a layer's numbers of channels to those of its tensors."""
    if isinstance(module, CONV) and isinstance(module.weight, Tensor):
        writes, reads = (1, 0) if module.transposed else (0, 1)
        if is_depthwise(module):
            module.groups = module.out_channels = module.in_channels = module.weight.shape[0]
        else:
            outer = module.groups if module.transposed else 1
            module.out_channels = module.weight.shape[writes] * outer
            module.in_channels = module.weight.shape[reads] * (
                1 if module.transposed else module.groups
            )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.RMSNorm) and isinstance(module.weight, Tensor):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, (BATCH_NORM, INSTANCE_NORM)):
        for key in ("weight", "running_mean"):
            if isinstance(getattr(module, key), Tensor):
                module.num_features = len(getattr(module, key))
    elif isinstance(module, nn.GroupNorm) and isinstance(module.weight, Tensor):
        each = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        module.num_groups = module.num_channels // each
