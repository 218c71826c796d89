"""Layers that are known to compute batch normalization, and what they compute after it.

A subclass of torch's layer may compute anything, so layers are known by their exact class.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Batch norm, then the children ``drop`` and ``act``: by name, so as not to import timm.
_WITH_CHILDREN = (
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("fusereg.batch_norm.sync", "SyncBatchNormAct"),
)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, or the one that it had before :func:`fusereg.convert`."""
    cls: type[nn.Module] = vars(type(layer)).get("fusereg_original", type(layer))
    return cls


def is_timm_act(layer: nn.Module) -> bool:
    """Return whether this is timm's BatchNormAct2d, converted, synchronized or neither."""
    cls = original_class(layer)
    named = (cls.__module__, cls.__qualname__) in _WITH_CHILDREN
    return named and {"drop", "act"} <= layer._modules.keys()


def why_unknown(layer: nn.Module) -> str | None:
    """Return why a layer may compute something else than batch norm and its own epilogue."""
    cls = type(layer)
    if cls in _TORCH or cls.__module__.startswith("fusereg.batch_norm.") or is_timm_act(layer):
        return None
    return (
        f"{cls.__name__} is a class that fusereg does not know, and may compute more than "
        "batch normalization"
    )


_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}


#: The forwards that layers of these classes have, unless somebody replaces them.
_FORWARDS: dict[type, Any] = {cls: vars(cls)["forward"] for cls in (*_ACTIVATIONS, nn.Identity)}


def keeps_forward(layer: nn.Module) -> bool:
    """Return whether the forward of an activation's class is still torch's."""
    forward = _FORWARDS.get(type(layer))
    return forward is not None and forward is type(layer).forward


def activation_of(layer: nn.Module) -> tuple[str, float] | None:
    """Return batch norm's name of an activation and its slope; None if it cannot be fused."""
    name = _ACTIVATIONS.get(type(layer)) if keeps_forward(layer) else None
    if name == "leaky_relu":
        slope = layer.negative_slope
        return (name, slope) if isinstance(slope, float) and slope >= 0.0 else None
    if name is None or (name == "gelu" and layer.approximate != "none"):
        return None
    return name, 0.01


def epilogue_of(layer: nn.Module) -> tuple[str | None, float] | None:
    """Return the activation and slope of a known layer; None if they are others than fusereg's."""
    if not is_timm_act(layer):
        slope: float = getattr(layer, "negative_slope", 0.01)
        return getattr(layer, "activation", None), slope
    drop, act = layer._modules["drop"], layer._modules["act"]
    if type(drop) is not nn.Identity or act is None:
        return None
    return (None, 0.01) if type(act) is nn.Identity else activation_of(act)
