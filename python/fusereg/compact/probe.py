"""Float64 probes of a model: what a mapping of channels claims is tried before it is believed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Inputs
from .parts import BATCH_NORM, CONV, INSTANCE_NORM, Part, Set, cut, slice_channels

_ATEN = torch.ops.aten
#: Activations that are flat somewhere: a channel may look constant for the numbers at hand alone.
_FLAT = {
    getattr(_ATEN, name + end)
    for name in ("relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "clamp", "clamp_min")
    for end in ("", "_")
    if hasattr(_ATEN, name + end)
}


class _NowhereFlat(TorchDispatchMode):
    """Compute activations that are flat somewhere as the identity."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the input of such an activation, the result of everything else."""
        if func.overloadpacket in _FLAT:
            return args[0] if func.overloadpacket.__name__.endswith("_") else args[0].clone()
        return func(*args, **(kwargs or {}))


def _random(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Return random numbers in float64 of mean 0 and variance 1; normal ones take 5x as long."""
    return (
        torch.rand(tuple(shape), dtype=torch.float64, device="cpu", generator=draw)
        .mul_(12**0.5)
        .sub_(3**0.5)
    )


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator with a seed, so that every answer is the same each time."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomize(model: nn.Module, seed: int, keep_zeros: bool = False) -> None:
    """Give the parameters and running statistics random values of the usual sizes.

    Args:
        model: in float64.
        seed: of the numbers.
        keep_zeros: weights that are zero stay zero.
    """
    draw = generator(seed)
    done: set[int] = set()
    for module in model.modules():
        matrices = isinstance(module, (CONV, nn.Linear, nn.Embedding))
        norms = isinstance(module, (BATCH_NORM, INSTANCE_NORM, nn.GroupNorm, nn.LayerNorm))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in done or not tensor.is_floating_point():
                continue
            if key not in module._parameters and not norms:
                continue
            done.add(id(tensor))
            new = _random(tensor.shape, draw).to(tensor.device)
            if key == "running_var" or (norms and key == "weight"):
                new = 1 + 0.5 * new.tanh()
            elif matrices and key == "weight":
                new *= (2 / max(1, tensor[0].numel())) ** 0.5
            elif matrices or norms:
                new *= 0.2
            else:  # of no known meaning: near what it was
                new = tensor + 0.1 * new
            tensor.copy_(torch.where(tensor == 0, 0.0, new) if keep_zeros else new)


class Range(NamedTuple):
    """The smallest and largest value of each channel that a layer has read."""

    low: Tensor
    high: Tensor

    def constant(self) -> Tensor:
        """Return which channels had one finite value only, up to rounding."""
        spread = self.high - self.low
        same = spread <= 1e-13 * (self.high.abs() + self.low.abs() + 1e-100)
        return same & spread.isfinite()


def norms_of(model: nn.Module, found: Set) -> list[Part]:
    """Return the normalizations of a set that keep running statistics."""
    return [
        p
        for p in found.writers
        if isinstance(layer := p.of(model), (BATCH_NORM, INSTANCE_NORM))
        and isinstance(layer.running_mean, Tensor)
    ]


def _axis(module: Any, x: Tensor) -> int:
    """Return along which dimension of its input the channels of a module lie."""
    if isinstance(module, (BATCH_NORM, INSTANCE_NORM)):
        return 1
    return x.dim() - (module.weight.dim() - 1 if isinstance(module, CONV) else 1)


@contextmanager
def reading(model: nn.Module, sets: Iterable[Set]) -> Iterator[dict[str, Range]]:
    """Return, once the model is run, what each reader and norm of the sets has read, by name."""
    seen: dict[str, Range] = {}

    def note(name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0].detach()
            axis = _axis(module, x)
            flat = x.movedim(axis, 0).reshape(x.shape[axis], -1)
            low, high = flat.amin(1), flat.amax(1)
            if name in seen:
                low, high = torch.minimum(low, seen[name].low), torch.maximum(high, seen[name].high)
            seen[name] = Range(low, high)

        return hook

    names = {p.module for s in sets for p in (*s.readers, *norms_of(model, s))}
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(note(name), with_kwargs=True))
        yield seen


@contextmanager
def nowhere_flat(model: nn.Module) -> Iterator[None]:
    """Let no activation be flat anywhere, neither torch's nor those in fusereg's batch norms."""
    fused = [m for m in model.modules() if isinstance(getattr(m, "activation", None), str)]
    before: list[Any] = [m.activation for m in fused]
    for module in fused:
        module.activation = None  # type: ignore[assignment]
    try:
        with torch.no_grad(), _NowhereFlat():  # type: ignore[no-untyped-call]
            yield
    finally:
        for module, activation in zip(fused, before, strict=True):
            module.activation = activation


def zeros_alone(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with random weights, but for those that are zero.

    What is constant in it is so because of them, and not because of the numbers at hand.
    """
    probe = copy.deepcopy(model)
    randomize(probe, seed, keep_zeros=True)
    return probe


def constant_for(
    model: nn.Module, sets: Sequence[Set], inputs: Inputs, seed: int
) -> dict[str, Tensor]:
    """Return for each reader which of its channels do not depend on the model's input."""
    with nowhere_flat(model), reading(model, sets) as seen:
        for i in range(2):
            inputs.other(generator(seed + i)).call(model)
    return {name: found.constant() for name, found in seen.items()}


def at_channels(
    model: nn.Module, part: Part, removed: Tensor
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Return the tensors of a part with the dimension and the slices of the given channels."""
    layer = part.of(model)
    for slot in part.slots:
        channels = slice_channels(layer, part.role, slot, part.channels)
        slices = (removed[channels.clamp_min(0)] & (channels >= 0)).nonzero().flatten()
        yield getattr(layer, slot.key), slot.dim, slices


@torch.no_grad()
def silence(model: nn.Module, parts: Iterable[Part], removed: Tensor) -> None:
    """Set what the parts have for the given channels to zero; running statistics stay."""
    for part in parts:
        for tensor, dim, slices in at_channels(model, part, removed):
            if isinstance(tensor, nn.Parameter):
                tensor.index_fill_(dim, slices.to(tensor.device), 0)


def hide(model: nn.Module, parts: Iterable[Part], removed: Tensor) -> None:
    """Let readers read zeros for the given channels."""

    def masking(zero: Tensor) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, *others = (*args, *kwargs.values())
            shape = [1] * x.dim()
            shape[_axis(module, x)] = len(zero)
            x = x.masked_fill(zero.view(shape).to(x.device), 0)
            values = (x, *others)
            return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))

        return hook

    for part in parts:
        zero = removed[part.channels.clamp_min(0)] & (part.channels >= 0)
        part.of(model).register_forward_pre_hook(masking(zero), with_kwargs=True)


@torch.no_grad()
def scramble(model: nn.Module, parts: Iterable[Part], removed: Tensor, seed: int) -> None:
    """Set what the parts have for the given channels to random numbers."""
    draw = generator(seed)
    for part in parts:
        for tensor, dim, slices in at_channels(model, part, removed):
            if isinstance(tensor, nn.Parameter):
                shape = list(tensor.shape)
                shape[dim] = len(slices)
                new = _random(shape, draw).to(tensor.device)
                tensor.index_copy_(dim, slices.to(tensor.device), new)


def differ(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> float | None:
    """Return the largest difference relative to the size if it is above the tolerance.

    Infinities and NaN, such as the logits of a mask, differ from all but their like, and have no
    part in the size.
    """
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    worst = 0.0
    for x, y in zip(got, wanted, strict=True):
        if x.numel():
            alike = (x == y) | (x.isnan() & y.isnan())
            off = (x - y).abs().nan_to_num(float("inf")).masked_fill(alike, 0.0).max()
            size = torch.where(y.isfinite(), y, 0.0).abs().max().clamp_min(1e-300)
            worst = max(worst, float(off / size))
    return worst if worst > tolerance else None


# --- the mapping ----------------------------------------------------------------------------------

#: Rounding of two different orders of summation in a deep network, and far below any real effect.
_TOLERANCE = 1e-8


def checked(
    model: nn.Module, sets: list[Set], inputs: Inputs, first: bool = False
) -> tuple[list[Set], dict[str, str]]:
    """Return the sets that pass the probes, and the reason why the others do not.

    Of a random half of each set's channels (of the first one), and then of the others:

    1. If what writes them is zero, the readers read constants at their columns.
    2. If the readers read zeros there, neither what writes them nor the columns move the outputs.
    3. If both are zero, the model without them has the same outputs.
    """
    model = copy.deepcopy(model)
    randomize(model, 0)
    inputs = inputs.other(generator(0))
    kept: dict[str, str] = {}
    halves = {
        s.name: torch.arange(s.size, device="cpu") < 1 if first else _half(s, i)
        for i, s in enumerate(sets)
    }
    for flip in (False, True):
        chosen = {name: half ^ flip for name, half in halves.items()}
        sets = _unread(model, sets, chosen, inputs, kept, flip)
        for check in (_moves, _cannot_be_cut):
            sets = _largest(sets, partial(check, model, chosen, inputs), kept)
    return sets, kept


def _half(found: Set, seed: int) -> Tensor:
    """Return a random mask with some channels, but not all."""
    order = torch.randperm(found.size, device="cpu", generator=generator(seed))
    return order < max(1, found.size // 2 - (found.size > 4))


def _unread(
    model: nn.Module,
    sets: list[Set],
    chosen: dict[str, Tensor],
    inputs: Inputs,
    kept: dict[str, str],
    flip: bool,
) -> list[Set]:
    """Return the sets whose readers read constants if the channels' writers are silent."""
    if not sets:
        return sets
    probe = copy.deepcopy(model)
    for found in sets:
        silence(probe, found.writers, chosen[found.name])
    constant = constant_for(probe, sets, inputs, 7 + flip)
    passed = []
    for found in sets:
        if not found.readers:
            kept[found.name] = "its channels are outputs of the model, or no layer reads them"
            continue
        wrong = [p.module for p in found.readers if not _all_constant(p, chosen, constant, found)]
        if wrong:
            kept[found.name] = (
                f"{wrong[0]} reads them elsewhere than the dependency graph says, "
                "or what is between adds to a zero"
            )
        else:
            passed.append(found)
    return passed


def _all_constant(
    part: Part, chosen: dict[str, Tensor], constant: dict[str, Tensor], found: Set
) -> bool:
    mask = chosen[found.name][part.channels.clamp_min(0)] & (part.channels >= 0)
    seen = constant.get(part.module)
    return seen is not None and len(seen) == len(mask) and bool(seen.cpu()[mask].all())


def _moves(
    model: nn.Module, chosen: dict[str, Tensor], inputs: Inputs, sets: list[Set]
) -> str | None:
    """Return why something besides the readers must read the sets' channels; None if not."""
    probe = copy.deepcopy(model)
    for found in sets:
        hide(probe, found.readers, chosen[found.name])

    def change() -> None:
        for i, found in enumerate(sets):
            scramble(probe, found.parts, chosen[found.name], 11 + i)

    return _changes(
        probe,
        inputs,
        change,
        "the model fails with other weights",
        "its channels are outputs of the model, or something besides the layers found reads them "
        "or these layers' weights for them",
    )


def _cannot_be_cut(
    model: nn.Module, chosen: dict[str, Tensor], inputs: Inputs, sets: list[Set]
) -> str | None:
    """Return why the sets' channels cannot be removed from the model; None if they can."""
    probe = copy.deepcopy(model)
    for found in sets:
        silence(probe, found.parts, chosen[found.name])
    return _changes(
        probe,
        inputs,
        lambda: cut(probe, [(s, chosen[s.name]) for s in sets]),
        "forward does not work with fewer channels",
        "forward computes something else with fewer channels",
    )


def _changes(
    probe: nn.Module, inputs: Inputs, change: Callable[[], object], fails: str, differs: str
) -> str | None:
    """Return what is wrong if the outputs are others after a change; None if they are not."""
    before = _outputs(probe, inputs)
    change()
    after = _outputs(probe, inputs)
    for found in (before, after):
        if isinstance(found, str):
            return f"{fails}: {found}"
    return None if differ(after, before, _TOLERANCE) is None else differs  # type: ignore[arg-type]


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor] | str:
    """Return the model's outputs, or what it raises."""
    try:
        with torch.no_grad():
            return inputs.call(model)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _likeness(found: Set) -> str:
    """Return a key by which sets are neighbors that probably fail, or pass, together."""
    parts = ((p.role, p.module.rpartition(".")[2], len(p.channels)) for p in found.parts)
    return str([found.size, *parts])


def _largest(
    sets: list[Set], fails: Callable[[list[Set]], str | None], kept: dict[str, str]
) -> list[Set]:
    """Return the sets that pass a check together; note the reason of the others."""

    def culprits(some: list[Set]) -> dict[str, str]:
        reason = fails(some) if some else None
        if reason is None:
            return {}
        if len(some) == 1:
            return {some[0].name: reason}
        half = len(some) // 2
        return culprits(some[:half]) | culprits(some[half:])

    bad = culprits(sorted(sets, key=_likeness))
    passed = [s for s in sets if s.name not in bad]
    if bad and passed and (reason := fails(passed)) is not None:  # only together with others
        alone: list[Set] = []
        for found in passed:
            if fails([*alone, found]) is None:
                alone.append(found)
            else:
                bad[found.name] = reason
        passed = alone
    kept.update(bad)
    return passed
