"""Puts fusereg's layers into a model that is made of torch's, and takes them out again."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core import params as _params
from ..core.params import Key
from . import chain as _chain
from . import layers as _layers
from . import trace as _trace

__all__ = ["convert", "revert"]

_log = logging.getLogger("fusereg")

_Model = TypeVar("_Model", bound=nn.Module)
_Keys = Iterable[Key] | Key | None

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def convert(model: _Model, *, include: _Keys = None, exclude: _Keys = None) -> _Model:
    """Changes a model's dropout and batch-norm layers to fusereg's, and fuses what follows them.

    The model is changed in place: its layers stay the same objects and get the class of the same
    name in :mod:`fusereg.nn`. Parameters, buffers, ``state_dict``, hooks, device, dtype, training
    mode and ``requires_grad`` are not touched, so optimizers and DDP go on as they were.

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

    What follows a layer is read from forward's code with ``torch.fx``, as in the residual blocks of
    torchvision. Code whose course could depend on more than tensors and plain attributes of the
    module is left unfused. Nothing but speed depends on it: at every call, a chain is one kernel
    only if it would not show. A hook on one of its layers, a layer that was replaced, or one that
    was switched to evaluation alone has them called one after the other, and an attribute that
    has changed since brings the original forward back.

    Results in evaluation, and in training without dropout, are those of torch's layers up to
    rounding. Dropout draws other elements, with the same probability. What was changed, and what
    was not and why, goes to the logger ``fusereg``: a summary and the reasons as INFO, every change
    as DEBUG.

    Left alone: subclasses of torch's layers (lazy, quantized, parametrized, ... ones), whatever is
    inside parametrizations and ``ScriptModule``, layers whose ``forward`` is set on the object.
    Converting twice changes nothing more. Convert before ``fully_shard`` where it is applied to
    layers themselves; with DDP, and ``fully_shard`` of blocks, before or after.

    Args:
        model: the model. A layer that is used in several places is converted once for all.
        include: what is converted; everything if not given. Name patterns (``"layer4.*"``) or
            types. What is named includes everything inside it.
        exclude: what is left alone, in the same way. It outdoes ``include``.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is no module, or a key neither a pattern nor a type of modules.
        ValueError: a key matches nothing. Nothing has changed then.

    Example:
        >>> model = fusereg.convert(model, exclude=["head"])
        >>> fusereg.revert(model)
    """
    chosen = _choose(model, _keys(include, "include"), _keys(exclude, "exclude"))
    report = _Report()
    for name, module in chosen:
        _convert_layer(name, module, report)
    allowed = {id(module) for _, module in chosen}
    for name, module in _fusible(chosen, report):
        _fuse(name, module, allowed, report)
    report.log()
    return model


def revert(model: _Model) -> _Model:
    """Takes back what :func:`convert` did: every layer and forward has its original class again.

    Layers that were made as fusereg's stay. So does, with a warning to the logger ``fusereg``, a
    converted one that has been given since what torch's has not, such as an ``activation``.

    Args:
        model: the model, or a part of it.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is no module.
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
    _log.info("fusereg.revert: %d modules have their original class again", count)
    return model


# --- what is chosen -------------------------------------------------------------------------------


def _check_model(model: object, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fusereg.{op}: model must be a torch.nn.Module, got {type(model).__name__}"
        )


def _keys(keys: _Keys, argument: str) -> tuple[Key, ...] | None:
    if keys is None:
        return None
    found = (keys,) if isinstance(keys, (str, type)) else tuple(keys)
    for key in found:
        if not _params.is_key(key):
            raise TypeError(
                f"fusereg.convert: {argument} takes name patterns or module types, got {key!r}"
            )
    return found


def _choose(
    model: nn.Module, include: tuple[Key, ...] | None, exclude: tuple[Key, ...] | None
) -> list[tuple[str, nn.Module]]:
    """The modules that may be changed, each once, with the first of its names."""
    _check_model(model, "convert")
    keys = {*(include or ()), *(exclude or ())}
    without_match = set(keys)
    wanted: dict[str, bool] = {}
    unwanted: dict[str, bool] = {}
    modules: dict[int, tuple[str, nn.Module]] = {}
    out: set[int] = set()
    chosen: set[int] = set()
    # Under every name: a shared layer is left alone if one of its names says so.
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
            not matching.isdisjoint(exclude or ())
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
    if parent is None or name.rpartition(".")[2] != "parametrizations":
        return False
    return parametrize.is_parametrized(model.get_submodule(parent))


# --- what is done with it -------------------------------------------------------------------------


@dataclass
class _Report:
    layers: Counter[str] = field(default_factory=Counter)
    chains: int = 0
    skipped: int = 0

    def skip(self, name: str, what: str, reason: str) -> None:
        self.skipped += 1
        _log.info("fusereg.convert: %s %s: %s", name or "the model", what, reason)

    def log(self) -> None:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.layers.items()))
        _log.info(
            "fusereg.convert: %d layers converted%s, %d chains fused, %d modules left as they are",
            sum(self.layers.values()),
            f" ({kinds})" if kinds else "",
            self.chains,
            self.skipped,
        )


_OURS = tuple(_layers.SWAPS.values())
_THEIRS = tuple(_layers.SWAPS)


def _convert_layer(name: str, module: nn.Module, report: _Report) -> None:
    kind = _layers.timm_kind(module)
    if isinstance(module, (_layers.Adapted, *_OURS)):
        return
    if kind is None and not isinstance(module, _THEIRS):
        return
    what = type(module).__name__
    if kind is None and type(module) not in _layers.SWAPS:
        report.skip(name, "left alone", f"{what} is a subclass of torch's layer")
        return
    if "forward" in vars(module):
        report.skip(name, "left alone", "its forward is set on the object")
        return
    if kind is None:
        _layers.swap(module)
    else:
        _layers.adapt(kind, module)
    report.layers[what] += 1
    _log.debug("fusereg.convert: %s: %s", name or "the model", what)


def _fusible(
    chosen: list[tuple[str, nn.Module]], report: _Report
) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward calls layers that can begin a chain, as far as their place says."""
    for name, module in chosen:
        if isinstance(module, (*_CONTAINERS, torch.fx.GraphModule)) or "forward" in vars(module):
            continue
        forward = _forward_of(module)
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if not any(type(m) in _chain.NORMS or _chain.is_dropout(m) for m in _called(module)):
            continue
        of_torch = code is not None and code.co_filename.startswith(_trace.TORCH)
        if of_torch and forward is not nn.Sequential.forward:
            # They choose among ways of their own, of which not all call their layers.
            report.skip(name, f"({type(module).__name__}) not fused", "its forward is torch's own")
            continue
        yield name, module


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    cls = type(module)
    if isinstance(module, _layers.Adapted):
        cls = module.fusereg_original
    return cls.forward


def _called(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _called(child)
        else:
            yield child


def _fuse(name: str, module: nn.Module, allowed: set[int], report: _Report) -> None:
    reason = _layers.rewritable(type(module))
    try:
        if reason is not None:
            raise _trace.NotStraightError(reason)
        plans = _trace.make_plans(module, _forward_of(module), lambda m: id(m) in allowed)
    except _trace.NotStraightError as error:
        report.skip(name, f"({type(module).__name__}) not fused", str(error))
        return
    if not plans:
        return
    _layers.adapt("planned", module)
    vars(module)["fusereg_plans"] = plans
    chains = max((plan.chains for plan in plans), key=len)
    report.chains += len(chains)
    for chain in chains:
        _log.debug("fusereg.convert: %s: fused %s", name or "the model", chain)
