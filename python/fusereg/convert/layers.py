"""What convert puts in place of what. Everything is done by changing the class of a module.

The module stays the same object, with its parameters, buffers, hooks, mode, device and place in the
model; optimizers, DDP and FSDP2 that know it notice nothing, and the way back is the old class.

Layers of torch, exactly of torch's type, become those of the same name in :mod:`fusereg.nn`. What
has more to it than these (timm's layers, modules whose forward is rewritten) gets a subclass of its
own class that is made here, has the same name, and is pickled as the original class and a word.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .. import nn as fused_nn
from ..core import dispatch
from . import chain as _chain
from .trace import Plan

# --- layers of torch ------------------------------------------------------------------------------

_NAMES = (
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
)

#: A layer of torch and the one that takes its place.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fused_nn, name) for name in _NAMES
}

#: On a converted layer: the class that it had.
ORIGINAL = "_fusereg_original"


def _extras(original: type[nn.Module]) -> dict[str, Any]:
    """The attributes that a layer of ours has and one of torch's has not, as they are at first."""
    if original not in _known_extras:
        _known_extras[original] = _find_extras(original)
    return _known_extras[original]


_known_extras: dict[type[nn.Module], dict[str, Any]] = {}


def _find_extras(original: type[nn.Module]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if issubclass(original, nn.modules.batchnorm._BatchNorm):
        arguments = {"num_features": 1, "device": "meta"}
    theirs, ours = original(**arguments), SWAPS[original](**arguments)
    return {name: value for name, value in vars(ours).items() if name not in vars(theirs)}


def swap(layer: nn.Module) -> None:
    """Gives a layer of torch our class."""
    original = type(layer)
    layer.__class__ = SWAPS[original]
    vars(layer).update(_extras(original))
    vars(layer)[ORIGINAL] = original


def swap_back(layer: nn.Module) -> str | None:
    """Gives it back its class; why not, where it does more by now than a layer of torch can."""
    original: type[nn.Module] = vars(layer)[ORIGINAL]
    if type(layer) is not SWAPS[original]:
        return f"it is a {type(layer).__name__} by now"
    extras = _extras(original)
    for name, value in extras.items():
        if (now := getattr(layer, name)) != value:
            return f"{original.__name__} has no {name}={now!r}"
    layer.__class__ = original
    for name in (*extras, ORIGINAL):
        del vars(layer)[name]
    return None


# --- classes that are made here -------------------------------------------------------------------


class Adapted:
    """Beside the original class, first among the bases of a class that is made here."""

    fusereg_original: type[nn.Module]
    fusereg_kind: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = tuple(super().__reduce_ex__(max(2, protocol)))
        return _new, (self.fusereg_kind, self.fusereg_original), *reduced[2:]


def _new(kind: str, original: type[nn.Module]) -> nn.Module:
    cls = adapted(kind, original)
    module: nn.Module = cls.__new__(cls)
    return module


_adapted: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def adapted(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the original class, of the same name, with the forward of this kind."""
    if (kind, original) not in _adapted:
        _adapted[kind, original] = _make_adapted(kind, original)
    return _adapted[kind, original]


def _make_adapted(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    bases, forward = _KINDS[kind]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "fusereg_original": original,
        "fusereg_kind": kind,
        "forward": forward(original),
    }
    return type(original.__name__, (Adapted, *bases, original), namespace)


def adapt(kind: str, module: nn.Module) -> None:
    if not isinstance(module, Adapted):
        module.__class__ = adapted(kind, type(module))


def adapt_back(module: Any) -> str | None:
    """Gives an adapted module back its class; why not, where something stands on it."""
    cls = type(module)
    vars(module).pop("fusereg_plans", None)
    if "fusereg_original" not in vars(cls):
        # Without a plan a rewritten forward is the original one; the others compute on.
        return f"it is a {cls.__name__} of {cls.__module__} by now"
    module.__class__ = cls.fusereg_original
    return None


class Planned:
    """A module with a rewritten forward."""

    fusereg_plans: tuple[Plan, ...] = ()


def _planned_forward(original: type[nn.Module]) -> Callable[..., Any]:
    written: Callable[..., Any] = original.forward

    @functools.wraps(written)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for plan in self.fusereg_plans:
            if plan.fits(self, args, kwargs):
                return plan.run(self, *args)
        return written(self, *args, **kwargs)

    return forward


class BatchNormAct2d(fused_nn.BatchNorm2d):
    """timm's batch norm with a dropout and an activation as children, in one pass if it can be."""

    update_stats = True
    dropout = 0.0
    inplace = False
    negative_slope = 0.01
    activation = None

    def extra_repr(self) -> str:
        text: str = nn.BatchNorm2d.extra_repr(self)
        return text


def _batch_norm_act_forward(original: type[nn.Module]) -> Callable[..., Any]:
    written: Callable[..., Tensor] = original.forward

    @functools.wraps(written)
    def forward(self: Any, x: Tensor) -> Tensor:
        act = self.act
        if type(self.drop) is nn.Identity and not (
            dispatch.hooked(self.drop) or dispatch.hooked(act)
        ):
            found = (None, 0.01) if type(act) is nn.Identity else _chain.activation_of(act)
            if found is not None:
                activation, slope = found
                return _chain.batch_norm(self, x, None, activation, slope, 0.0)
        return written(self, x)

    return forward


class DropPath(fused_nn.DropPath):
    """timm's stochastic depth, whose probability is called drop_prob and may be None."""

    inplace = False

    @property
    def p(self) -> float:  # type: ignore[override]
        probability: Any = self.drop_prob
        return float(probability or 0.0)

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.p, 3):0.3f}"


def _drop_path_forward(original: type[nn.Module]) -> Callable[..., Any]:
    written: Callable[..., Tensor] = original.forward

    @functools.wraps(written)
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.scale_by_keep:
            return F.drop_path(x, self.p, self.training)
        return written(self, x)

    return forward


_KINDS: dict[str, tuple[tuple[type, ...], Callable[[type[nn.Module]], Callable[..., Any]]]] = {
    "planned": ((Planned,), _planned_forward),
    "batch_norm_act": ((BatchNormAct2d,), _batch_norm_act_forward),
    "drop_path": ((DropPath,), _drop_path_forward),
}

_TIMM = {
    ("timm.layers.norm_act", "BatchNormAct2d"): ("batch_norm_act", ("act", "drop")),
    ("timm.layers.drop", "DropPath"): ("drop_path", ("drop_prob", "scale_by_keep")),
}


def timm_kind(module: nn.Module) -> str | None:
    """How a layer of timm is adapted, which is told by names: timm is not needed for that."""
    cls = type(module)
    kind, wanted = _TIMM.get((cls.__module__, cls.__qualname__), (None, ()))
    return kind if all(hasattr(module, name) for name in wanted) else None


def rewritable(cls: type[nn.Module]) -> str | None:
    """Why modules of this class cannot get a plan; None if they can."""
    if cls.__reduce_ex__ is not object.__reduce_ex__ and not issubclass(cls, Adapted):
        return "it has its own way of being pickled"
    if cls.__reduce__ is not object.__reduce__:
        return "it has its own way of being pickled"
    if not isinstance(cls.forward, types.FunctionType):
        return "its forward is no function"
    return None
