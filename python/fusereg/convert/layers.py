"""The classes that convert gives to modules.

Converting a module changes only its class: it stays the same object, with its parameters, buffers,
hooks, mode, device and place in the model. Optimizers, DDP and FSDP2 that hold it do not notice,
and reverting restores the class.

A layer of torch gets the class of the same name in :mod:`fusereg.nn`, unless it is of a subclass.
Other modules (timm's layers, modules whose forward is rewritten) get a subclass of their own class,
created here, which has the same name and is pickled as the original class and a kind.
"""

from __future__ import annotations

import abc
import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import nn as fused_nn
from ..batch_norm.known import activation_of
from ..core import dispatch, failures
from ..core.layer import Layer, name_module, refuse, refuse_script
from ..core.proxies import UntraceableError
from ..core.trace import TORCH
from . import chain as _chain
from .trace import Plan, renewed
from .wrappers import decorated, inner_of

_log = logging.getLogger("fusereg")

# --- layers of torch ------------------------------------------------------------------------------

_NAMES = (
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
)

#: A layer of torch -> the one that replaces it.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fused_nn, name) for name in _NAMES
}


def _not_fused(is_qat: bool, *layers: nn.Module) -> NoReturn:
    """Raise RuntimeError in the place of one of torch's functions that fuse layers."""
    layer = next(layer for layer in layers if type(layer) in SWAPS.values())
    refuse(layer, "torch.ao.quantization.fuse_modules cannot fuse", "use torch.nn's layer")


class _NotQuantized:
    """Stands for the quantized layer of one of fusereg's, which there is none of."""

    @staticmethod
    def from_float(layer: nn.Module) -> NoReturn:
        """Raise RuntimeError."""
        refuse(layer, "torch.ao.quantization.convert cannot quantize", "use torch.nn's layer")


def _torchs(module: str, name: str) -> dict[Any, Any]:
    """Return one of the tables of torch's quantization, which go by the exact classes of layers."""
    table: dict[Any, Any] = getattr(sys.modules.get(f"torch.ao.quantization.{module}"), name, {})
    return table


_fusers = _torchs("fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD")
for _classes in list(_fusers):
    _fusers.setdefault(tuple(SWAPS.get(cls, cls) for cls in _classes), _not_fused)
_quantized = _torchs("quantization_mappings", "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS")
for _class in SWAPS.keys() & _quantized.keys() - {nn.Dropout}:  # which is never observed
    _quantized.setdefault(SWAPS[_class], _NotQuantized)

#: The attribute of a converted layer that holds its original class.
ORIGINAL = "_fusereg_original"


@functools.cache
def _extras(original: type[nn.Module]) -> dict[str, Any]:
    """Return the attributes, with defaults, that only fusereg's layer of this name has."""
    arguments: dict[str, Any] = {}
    if issubclass(original, nn.modules.batchnorm._BatchNorm):
        arguments = {"num_features": 1, "device": "meta"}
    theirs, ours = original(**arguments), SWAPS[original](**arguments)
    return {name: value for name, value in vars(ours).items() if name not in vars(theirs)}


#: Where fusereg's layers compute, and with parameters of which types.
_DEVICES = ("cpu", "cuda", "meta")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_convertible(layer: nn.Module) -> str | None:
    """Return why a layer of torch or timm stays as it is; None if it can be converted."""
    cls: Any = type(layer)
    if "forward" in vars(layer):
        return "its forward is set on the object"
    if cls in SWAPS and not cls.forward.__code__.co_filename.startswith(TORCH):
        return f"{cls.__name__}.forward is not torch's any more"
    names = [] if cls not in SWAPS else [name for name in _extras(cls) if name in vars(layer)]
    if names:
        return f"fusereg's layer has an attribute {names[0]} for something else; rename this one"
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is None or name == "num_batches_tracked":
            continue
        if tensor.dtype not in _DTYPES or tensor.device.type not in _DEVICES:
            return (
                f"its {name} is of {tensor.dtype} on {tensor.device}, which fusereg does not have"
            )
    return None


def swap(layer: nn.Module) -> None:
    """Give a layer of torch the class of fusereg."""
    original: Any = type(layer)
    # The class last: another thread may be calling the layer.
    vars(layer).update({**_extras(original), ORIGINAL: original})
    object.__setattr__(layer, "__class__", SWAPS[original])


def swap_back(layer: nn.Module) -> str | None:
    """Restore the original class; return the reason if impossible, else None."""
    original: Any = vars(layer)[ORIGINAL]
    if type(layer) is not SWAPS[original]:
        return f"it is a {type(layer).__name__} by now"
    extras = _extras(original)
    for name, value in extras.items():
        if (now := getattr(layer, name)) != value:
            return f"{original.__name__} has no {name}={now!r}"
    object.__setattr__(layer, "__class__", original)
    for name in (*extras, ORIGINAL):
        del vars(layer)[name]
    return None


# --- created classes ------------------------------------------------------------------------------


_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Adapted:
    """Mixin of the created subclasses, which pickles their modules by the original class."""

    fusereg_original: type[nn.Module]
    fusereg_kind: str

    def __init_subclass__(cls) -> None:
        """Keep the class from the original's ``__init_subclass__``, which may list its classes."""

    def __prepare_scriptable__(self) -> NoReturn:
        module: Any = self
        refuse_script(module)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        make, (_, *given), *rest = reduced
        # What a __getnewargs__ of the class returns, or a __getnewargs_ex__.
        args, names = given if make.__name__ == "__newobj_ex__" else (given, {})
        return _new, (self.fusereg_kind, self.fusereg_original, tuple(args), names), *rest


def _new(
    kind: str, original: Any, args: tuple[Any, ...] = (), names: Mapping[str, Any] = _NOTHING
) -> nn.Module:
    """Make an empty module when unpickling."""
    cls = adapted(kind, original)
    module: nn.Module = cls.__new__(cls, *args, **names)
    return module


@functools.cache
def adapted(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of the original class, of the same name, with the forward of this kind."""
    base, forward = _KINDS[kind]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "fusereg_original": original,
        "fusereg_kind": kind,
        "forward": forward(original),
    }
    made: Any = type(original.__name__, (Adapted, base, original), namespace)
    if issubclass(made, Layer):
        name_module(made)
    return made  # type: ignore[no-any-return]


def adapt(kind: str, module: Any) -> None:
    """Give a module the subclass of its class that is of this kind."""
    if not isinstance(module, Adapted):
        original: Any = type(module)
        object.__setattr__(module, "__class__", adapted(kind, original))


def adapt_back(module: Any) -> str | None:
    """Restore the original class; return the reason if impossible, else None."""
    cls = type(module)
    vars(module).pop("fusereg_plans", None)
    if "fusereg_original" not in vars(cls):
        # It works all the same: without a plan, a rewritten forward calls the original one.
        return f"it is a {cls.__name__} of {cls.__module__} by now"
    object.__setattr__(module, "__class__", cls.fusereg_original)
    return None


class Planned:
    """A module with a rewritten forward."""

    fusereg_plans: tuple[Plan, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        module: Any = self
        try:
            forward = type(module).fusereg_original.forward
            plans = renewed(self.fusereg_plans, module, forward)
        except UntraceableError:
            plans = ()
        except Exception as error:
            plans, name = (), type(module).__name__
            _log.info("fusereg.convert: %s, unpickled, not fused: %s", name, failures.reason(error))
        vars(module)["fusereg_plans"] = plans


def _planned_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that runs the first plan that fits, or else the original one."""
    written = original.forward
    try:
        inner, wrappers = inner_of(written)
    except UntraceableError:  # of a class that has changed since its module was pickled
        inner, wrappers = written, []

    @functools.wraps(inner)
    def planned(self: Any, *args: Any, **kwargs: Any) -> Any:
        for plan in self.fusereg_plans:
            tensors = args
            if kwargs or len(args) != plan.count:
                if not plan.takes(args, kwargs):
                    continue
                tensors = args[: plan.count]
            if plan.fits(self, *tensors):
                return plan.run(self, *tensors)
        return (inner if wrappers else original.forward)(self, *args, **kwargs)

    if not wrappers:
        return planned

    @functools.wraps(written)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced = original.forward is not written
        return (original.forward if replaced else outermost)(self, *args, **kwargs)

    outermost = decorated(planned, wrappers, forward)
    return forward


class BatchNormAct2d(fused_nn.BatchNorm2d):
    """timm's batch norm, whose children, a dropout and an activation, are fused if possible."""

    update_stats = True
    dropout = 0.0
    inplace = False
    negative_slope = 0.01
    activation = None

    def extra_repr(self) -> str:
        """Return torch's text, as timm's layer does."""
        text: str = nn.BatchNorm2d.extra_repr(self)
        return text


def _batch_norm_act_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward of timm's BatchNormAct2d that is one kernel if possible."""
    written = original.forward

    @functools.wraps(written)
    def forward(self: Any, x: Tensor) -> Tensor:
        act = self.act
        if (
            isinstance(x, Tensor)
            and original.forward is written
            and _chain.is_identity(self.drop)
            and not (dispatch.hooked(self.drop) or dispatch.hooked(act))
        ):
            found = (None, 0.01) if _chain.is_identity(act) else activation_of(act)
            if found is not None:
                activation, slope = found
                y: Tensor = self.with_epilogue(x, None, None, activation, slope, 0.0)
                return y
        result: Tensor = original.forward(self, x)
        return result

    return forward


class DropPath(fused_nn.DropPath):
    """timm's stochastic depth, whose probability is named drop_prob and may be None."""

    inplace = False

    @property
    def p(self) -> float:  # type: ignore[override]
        """The drop probability."""
        probability: Any = self.drop_prob
        return float(probability or 0.0)

    def extra_repr(self) -> str:
        """Return timm's text."""
        return f"drop_prob={round(self.p, 3):0.3f}"


def _drop_path_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward of timm's DropPath that calls fusereg's."""
    written = original.forward

    @functools.wraps(written)
    def forward(self: Any, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and self.scale_by_keep and original.forward is written:
            return F.drop_path(x, self.p, self.training)
        result: Tensor = original.forward(self, x)
        return result

    return forward


#: Kind -> a base class, and what makes the forward from the original one.
_KINDS: dict[str, tuple[type, Callable[[type[nn.Module]], Callable[..., Any]]]] = {
    "planned": (Planned, _planned_forward),
    "batch_norm_act": (BatchNormAct2d, _batch_norm_act_forward),
    "drop_path": (DropPath, _drop_path_forward),
}

_TIMM = {
    ("timm.layers.norm_act", "BatchNormAct2d"): ("batch_norm_act", ("act", "drop")),
    ("timm.layers.drop", "DropPath"): ("drop_path", ("drop_prob", "scale_by_keep")),
}


def timm_kind(module: nn.Module) -> str | None:
    """Return the kind of a layer of timm, recognized by name so as not to import timm."""
    cls = type(module)
    kind, wanted = _TIMM.get((cls.__module__, cls.__qualname__), (None, ()))
    return kind if all(hasattr(module, name) for name in wanted) else None


def why_not_rewritable(cls: type[nn.Module], forward: Any) -> str | None:
    """Return why modules of this class, with this forward, cannot get a plan; None if they can."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    of_torch = code is not None and code.co_filename.startswith(TORCH)
    if of_torch and forward is not nn.Sequential.forward:
        # These have fast paths, not all of which call their layers.
        return "its forward is torch's own"
    if type(cls) not in (type, abc.ABCMeta):
        return f"its class is made by {type(cls).__name__}, which would make another one"
    own_reduce_ex = cls.__reduce_ex__ is not object.__reduce_ex__ and not issubclass(cls, Adapted)
    if own_reduce_ex or cls.__reduce__ is not object.__reduce__:
        return "it has its own way of being pickled"
    if not isinstance(cls.forward, types.FunctionType):
        return "its forward is not a function"
    return None
