"""Conversion of a model of torch's layers to fusereg's, and back."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core import failures
from ..core import params as _params
from ..core.hints import explains
from ..core.modules import forward_of, submodule
from ..core.params import Key
from ..core.proxies import UntraceableError
from . import chain as _chain
from . import layers as _layers
from . import trace as _trace

__all__ = ["convert", "revert"]

_log = logging.getLogger("fusereg")

_Model = TypeVar("_Model", bound=nn.Module)
_Keys = Iterable[Key] | Key | None

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@explains()
def convert(model: _Model, *, include: _Keys = None, exclude: _Keys = None) -> _Model:
    """Change a model's dropout and batch-norm layers to fusereg's, and fuse what follows them.

    The model is changed in place: its layers stay the same objects and get the class of the same
    name in :mod:`fusereg.nn`. Parameters, buffers, ``state_dict``, hooks, device, dtype, training
    mode and ``requires_grad`` are not changed, so optimizers and DDP remain valid.

    ==============================================================  ===============================
    ``Dropout``, ``Dropout1d/2d/3d``, ``AlphaDropout``,              the same of ``fusereg.nn``
    ``FeatureAlphaDropout``, ``BatchNorm1d/2d/3d`` of torch
    ``BatchNormAct2d``, ``DropPath`` of timm                         a subclass of both libraries'
    batch norm, then ReLU, LeakyReLU, SiLU or GELU, then Dropout,    one kernel
    in ``nn.Sequential`` or in a forward
    the same with a residual, ``relu(bn(x) + shortcut)``             one kernel
    ReLU, SiLU or GELU, then Dropout, as in an MLP                   one kernel
    Dropout, then a residual, ``x + dropout(f(x))``                  one kernel
    ==============================================================  ===============================

    Which layers follow each other is found by following forward on stand-ins, as in the residual
    blocks of torchvision. Nothing is run on tensors, and nothing but classes is changed, so other
    threads may run models meanwhile. What forward reads and is not a tensor is compared at each
    call, and the original forward runs if it has changed. A forward that could depend on more than
    can be compared is left unfused: one that decides by values of tensors, changes buffers, draws
    random numbers, or asks for modes of torch. A chain is one kernel only if the result is the
    same: with a hook on one of its layers, a replaced layer, or one that alone was switched to
    evaluation, its layers are called one after the other.

    Results in evaluation, and in training without dropout, are those of torch's layers up to
    rounding. Dropout drops different elements, with the same probability. The logger ``fusereg``
    reports what was changed, and what was not and why: a summary and the reasons at level INFO,
    every change at level DEBUG.

    Not converted: subclasses of torch's layers (lazy, quantized, parametrized, ... ones), modules
    inside parametrizations and ``ScriptModule``, layers whose ``forward`` is set on the object.
    Converting again changes nothing. Convert before ``fully_shard`` if that is applied to the
    layers themselves; with DDP, and ``fully_shard`` of blocks, before or after.

    Args:
        model: the model. A layer that is used in several places is converted once.
        include: the modules to convert, with everything inside them, by name patterns
            (``"layer4.*"``) or types; all if not given.
        exclude: the modules to leave alone, given likewise; takes precedence over ``include``.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a module, or a key is neither a pattern nor a module type.
        ValueError: a key matches nothing; the model is unchanged then.

    Example:
        >>> model = fusereg.convert(model, exclude=["head"])
        >>> fusereg.revert(model)
    """
    _check_model(model, "convert")
    included = None if include is None else _keys(include, "include")
    chosen = _choose(model, included, _keys(exclude, "exclude"))
    report = _Report()
    for name, module in chosen:
        with _or_left_alone(name, module, "left alone", report):
            _convert_layer(name, module, report)
    allowed = {id(module) for _, module in chosen}
    for name, module in chosen:
        what = f"({type(module).__name__}) not fused"
        with _or_left_alone(name, module, what, report):
            if _is_fusible(module):
                _fuse(name, module, what, allowed, report)
    report.log()
    return model


@explains()
def revert(model: _Model) -> _Model:
    """Undo :func:`convert`: restore the original class of every module.

    Layers that were created as fusereg's stay. So do, with a warning to the logger ``fusereg``,
    converted layers that have since been given what torch's cannot do, such as an ``activation``.
    No other thread may run the model meanwhile: a forward that has begun would miss its class.

    Args:
        model: the model, or a part of it.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model, "revert")
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, _layers.Adapted):
            reason = _layers.adapt_back(module)
        elif _layers.ORIGINAL in vars(module):
            reason = _layers.swap_back(module)
        else:
            continue
        if reason is None:
            count += 1
        else:
            _log.warning("fusereg.revert: %s stays: %s", name or "the model", reason)
    verb = "has its" if count == 1 else "have their"
    _log.info("fusereg.revert: %s %s original class again", _counted(count, "module"), verb)
    return model


# --- choosing modules -----------------------------------------------------------------------------


def _check_model(model: object, op: str) -> None:
    """Raise TypeError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusereg.{op}: model must be a torch.nn.Module, got {type(model).__name__}"
        )


def _keys(keys: _Keys, argument: str) -> tuple[Key, ...]:
    """Return include or exclude as a tuple of keys."""
    found = (keys,) if isinstance(keys, (str, type)) else tuple(keys or ())
    for key in found:
        if not _params.is_key(key):
            raise TypeError(
                f"fusereg.convert: {argument} takes name patterns or module types, got {key!r}"
            )
    return found


def _choose(
    model: nn.Module, include: tuple[Key, ...] | None, exclude: tuple[Key, ...]
) -> list[tuple[str, nn.Module]]:
    """Return the modules that may be changed, each once, with the first of its names."""
    keys = {*(include or ()), *exclude}
    without_match = set(keys)
    wanted: dict[str, bool] = {}
    unwanted: dict[str, bool] = {}
    modules: dict[int, tuple[str, nn.Module]] = {}
    out: set[int] = set()
    chosen: set[int] = set()
    # Under every name: a shared layer is left alone if one of its names is excluded.
    for name, module in model.named_modules(remove_duplicate=False):
        parent = name.rpartition(".")[0] if name else None
        matching = {key for key in keys if _params.matches(key, name, module)}
        without_match -= matching
        wanted[name] = (
            include is None
            or not matching.isdisjoint(include)
            or (parent is not None and wanted[parent])
        )
        unwanted[name] = (
            not matching.isdisjoint(exclude)
            or (parent is not None and unwanted[parent])
            or isinstance(module, torch.jit.ScriptModule)
            or _is_parametrizations(model, name, parent)
        )
        modules.setdefault(id(module), (name, module))
        if wanted[name]:
            chosen.add(id(module))
        if unwanted[name]:
            out.add(id(module))
    if without_match:
        said = ", ".join(sorted(k if isinstance(k, str) else k.__name__ for k in without_match))
        raise ValueError(f"fusereg.convert: no module matches {said}")
    return [modules[i] for i in modules if i in chosen - out]


def _is_parametrizations(model: nn.Module, name: str, parent: str | None) -> bool:
    """Return whether a module is the container of parametrizations of its parent."""
    if parent is None or name.rpartition(".")[2] != "parametrizations":
        return False
    return parametrize.is_parametrized(submodule(model, parent))


# --- converting them ------------------------------------------------------------------------------


def _counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclass
class _Report:
    """Counts of what was changed, for the log."""

    layers: Counter[str] = field(default_factory=Counter)
    chains: int = 0
    skipped: int = 0

    def skip(self, name: str, what: str, reason: str) -> None:
        """Log why a module was left as it is."""
        self.skipped += 1
        _log.info("fusereg.convert: %s %s: %s", name or "the model", what, reason)

    def log(self) -> None:
        """Log the summary."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.layers.items()))
        _log.info(
            "fusereg.convert: %s converted%s, %s fused, %s left as %s",
            _counted(self.layers.total(), "layer"),
            f" ({kinds})" if kinds else "",
            _counted(self.chains, "chain"),
            _counted(self.skipped, "module"),
            "it is" if self.skipped == 1 else "they are",
        )


@contextlib.contextmanager
def _or_left_alone(name: str, module: Any, what: str, report: _Report) -> Iterator[None]:
    """Undo what was done to a module if an error is raised, and log it in place of raising it."""
    cls, held = type(module), dict(vars(module))
    try:
        yield
    except Exception as error:
        object.__setattr__(module, "__class__", cls)
        for name_of_attribute in vars(module).keys() - held.keys():
            del vars(module)[name_of_attribute]
        vars(module).update(held)
        report.skip(name, what, failures.reason(error))


def _convert_layer(name: str, module: nn.Module, report: _Report) -> None:
    """Convert a module if it is a layer of torch or timm that fusereg has."""
    kind = _layers.timm_kind(module)
    if isinstance(module, (_layers.Adapted, *_layers.SWAPS.values())):
        return
    if kind is None and not isinstance(module, tuple(_layers.SWAPS)):
        return
    what = type(module).__name__
    if kind is None and type(module) not in _layers.SWAPS:
        report.skip(name, "left alone", f"{what} is a subclass of torch's layer")
        return
    reason = _layers.why_not_convertible(module)
    if reason is not None:
        report.skip(name, "left alone", reason)
        return
    if kind is None:
        _layers.swap(module)
    else:
        _layers.adapt(kind, module)
    report.layers[what] += 1
    _log.debug("fusereg.convert: %s: %s", name or "the model", what)


def _is_fusible(module: nn.Module) -> bool:
    """Return whether a module has children that can begin a chain, which its forward may call."""
    if isinstance(module, (*_CONTAINERS, torch.fx.GraphModule)) or "forward" in vars(module):
        return False
    return any(type(m) in _chain.NORMS or _chain.is_dropout(m) for m in _called(module))


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return the original forward of a module's class."""
    if isinstance(module, _layers.Adapted):
        return module.fusereg_original.forward
    forward: Callable[..., Any] = forward_of(module)
    return forward


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Return the children that a forward may call: containers' children, not the containers."""
    for child in module._modules.values():
        if isinstance(child, _CONTAINERS):
            yield from _called(child)
        elif child is not None:
            yield child


def _fuse(name: str, module: nn.Module, what: str, allowed: set[int], report: _Report) -> None:
    """Rewrite a module's forward with the chains of allowed layers that it calls."""
    forward = _forward_of(module)
    try:
        reason = _layers.why_not_rewritable(type(module), forward)
        if reason is not None:
            raise UntraceableError(reason)
        plans = _trace.make_plans(module, forward, lambda n: id(submodule(module, n)) in allowed)
    except UntraceableError as error:
        report.skip(name, what, str(error))
        return
    said = name or "the model"
    for reason in dict.fromkeys(reason for plan in plans for reason in plan.lost):
        _log.info("fusereg.convert: %s: %s", said, reason)
    plans = tuple(plan for plan in plans if plan.chains)
    if not plans:
        return
    _layers.adapt("planned", module)
    vars(module)["fusereg_plans"] = plans
    chains = max((plan.chains for plan in plans), key=len)
    report.chains += len(chains)
    for chain in chains:
        _log.debug("fusereg.convert: %s: fused %s", said, chain)
