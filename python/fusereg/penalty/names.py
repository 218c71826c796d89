"""Names of a model's parameters, and keys that select some of them.

Names are those of the model itself, inside the wrappers of torch.compile, DataParallel,
DistributedDataParallel, AveragedModel and activation checkpointing. Keys match the wrapped name
too, and that of the weight that a parametrization computes.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..core import checks, distributed
from ..core import params as _params
from ..core.modules import submodule
from ..core.params import Key

#: Keys of ``exclude`` that are words and no patterns; they need no match.
WORDS = ("bias", "norm", "layer_scale", "position_embedding", "no_weight_decay", "vector")
#: What has no penalty unless somebody asks for it; a vector may be the weight of a linear model.
SPARED = WORDS[:5]

#: Submodules by which wrappers hold what they wrap; looked up by name: to import torch._dynamo or
#: FSDP, for their types, takes seconds.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)
_PARAMETRIZED = re.compile(r"(?:(?P<layer>.*)\.)?parametrizations\.(?P<name>[^.]+)\.original\d*")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: Norm as a word of a class's name: LlamaRMSNorm, T5LayerNorm, BatchNorm2dOfMine, layer_norm.
_NORM_WORD = re.compile(r"Norm(?![a-z])|(?:^|_|batch|layer|group|instance|rms)norm(?:$|_|\d)")
_SCALE_WORD = re.compile(r"(?:^|_)layer_?scale|^(?:gamma(?:_?\d)?|lambda_\d)$")
_POSITION = re.compile(
    r"(?:^|_)(?:pos|positional|position)_(?:embed|embedding|embeddings|emb)(?:$|_)"
    r"|^(?:cls|class|dist|distillation|reg|register)_(?:token|tokens|embedding)$"
)


@dataclass
class Named:
    """A parameter under its first name, with the module that it belongs to."""

    name: str
    param: Tensor
    module: nn.Module
    #: Further names that keys match: with wrappers, and of the weight that is computed from it.
    others: tuple[str, ...] = ()
    #: Names of the same parameter elsewhere in the model, and the modules there.
    tied: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def own(self) -> str:
        """Return the last part of the name, of the computed weight where there is one."""
        computed = (
            self.others[-1] if self.others and _PARAMETRIZED.fullmatch(self.name) else self.name
        )
        return computed.rpartition(".")[2]


def named_parameters(model: nn.Module) -> list[Named]:
    """Return each parameter once, in torch's order."""
    found: dict[int, Named] = {}
    for raw, clean, module, name, param in _walk(model, "", "", ()):
        clean_name, raw_name = _joined(clean, name), _joined(raw, name)
        match = _PARAMETRIZED.fullmatch(clean_name)
        owner = module
        others = [raw_name] if raw_name != clean_name else []
        if match is not None and isinstance(module, ParametrizationList):
            layer = match["layer"] or ""
            owner = submodule(
                model, raw.removesuffix(f"parametrizations.{match['name']}").rstrip(".")
            )
            others.append(_joined(layer, match["name"]))
        if id(param) in found:
            found[id(param)].tied.append((clean_name, owner))
        else:
            found[id(param)] = Named(clean_name, param, owner, tuple(others))
    return list(found.values())


def _walk(
    module: nn.Module, raw: str, clean: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, str, nn.Module, str, Tensor]]:
    for name, param in module._parameters.items():
        if param is not None:
            yield raw, clean, module, name, param
    inside = _inside(module)
    for name, child in module._modules.items():
        if child is not None and not any(child is m for m in above):
            below = clean if name == inside else _joined(clean, name)
            yield from _walk(child, _joined(raw, name), below, (*above, module))


class Places:
    """The places of some parameters in a model, by which it is noticed that one was replaced."""

    def __init__(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        self._model = model
        self._params = list(params)
        self._on_path: tuple[Sequence[Any], ...] | None = None  # dicts, keys, what is there

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_on_path": None}

    def replaced(self) -> bool:
        """Return whether a parameter is no longer in the model."""
        if self._on_path is not None:
            dicts, keys, there = self._on_path
            if all(map(operator.is_, map(dict.get, dicts, keys), there)):
                return False
        present = {id(p): p for p in self._model.parameters()}
        # FSDP and torch.func put tensors of their own in the place of parameters for a while.
        if all(isinstance(p, nn.Parameter) for p in present.values()) and not any(
            type(m).__name__ == "FullyShardedDataParallel" for m in self._model.modules()
        ):
            if any(id(p) not in present and not distributed.is_dtensor(p) for p in self._params):
                return True
            # They may be in other modules now, of a wrapper or a parametrization.
            found = list(_on_path(self._model, {id(p) for p in self._params}, ()))
            self._on_path = tuple(zip(*found, strict=True)) if found else ((), (), ())
        return False


def _on_path(
    module: nn.Module, wanted: set[int], above: tuple[nn.Module, ...]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Return the modules' dicts in which parameters are, and the modules that lead to them."""
    for name, param in module._parameters.items():
        if id(param) in wanted:
            yield module._parameters, name, param
    for name, child in module._modules.items():
        if child is not None and not any(child is m for m in above):
            below = list(_on_path(child, wanted, (*above, module)))
            if below:
                yield module._modules, name, child
                yield from below


def _inside(module: nn.Module) -> str | None:
    """Return the name by which a wrapper holds what it wraps."""
    for name in _INSIDE:
        if name in module._modules:
            return name
    ema = any(base.__name__.startswith("ModelEma") for base in type(module).__mro__)  # timm's
    return "module" if isinstance(module, _WRAPPERS) or ema else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers."""
    while (name := _inside(model)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    return model


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# --- keys -----------------------------------------------------------------------------------------


class Keys:
    """Decides which of a model's parameters a key selects."""

    def __init__(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        #: Whether the model itself says what is not to decay, positions among it.
        self._says = callable(getattr(inner, "no_weight_decay", None))
        self._exact: set[str] = set()
        self._parts: list[tuple[str, str]] = []
        for prefix, module in inner.named_modules():
            for name in _asked(module, "no_weight_decay"):
                self._exact.add(_joined(prefix, name))
            for part in _asked(module, "no_weight_decay_keywords"):
                self._parts.append((f"{prefix}." if prefix else "", part))

    def match(self, key: Key, item: Named) -> bool:
        """Return whether a key selects a parameter."""
        if key == "bias":
            return _is_bias(item)
        if key == "norm":
            return is_norm(item.module)
        if key == "layer_scale":
            return _is_layer_scale(item)
        if key == "vector":
            return not nn.parameter.is_lazy(item.param) and item.param.dim() <= 1
        if key == "position_embedding":
            return not self._says and _POSITION.search(item.own) is not None
        if key == "no_weight_decay":
            return self._decays_not(item)
        return any(_params.matches(key, n, item.module) for n in (item.name, *item.others))

    def tied(self, key: Key, item: Named) -> str | None:
        """Return the name by which a key selects a parameter that counts under another."""
        for name, module in item.tied:
            if self.match(key, Named(name, item.param, module)):
                return name
        return None

    def _decays_not(self, item: Named) -> bool:
        names = (item.name, *item.others)
        return any(n in self._exact for n in names) or any(
            item.name.startswith(prefix) and part in item.name.removeprefix(prefix)
            for prefix, part in self._parts
        )


def _asked(module: nn.Module, method: str) -> Sequence[str]:
    """Return what a model's own method says, nothing if it has none."""
    ask = getattr(type(module), method, None)
    return [str(name) for name in getattr(module, method)()] if callable(ask) else []


def _is_bias(item: Named) -> bool:
    own = item.own
    words = own.split("_")  # bias_ih_l0 of recurrent layers, in_proj_bias of attention
    if own.endswith("bias") or "bias" in words or "biases" in words:
        return True
    # relative_attention_bias.weight: an embedding that is added to the scores of attention.
    holder = item.name.rpartition(".")[0].rpartition(".")[2]
    return isinstance(item.module, nn.Embedding) and "bias" in holder.split("_")


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a normalization layer: by type, or, of other libraries, by name.

    The name must have Norm as a word, and the parameters must be gains and offsets: a layer with
    normalized weights has matrices.
    """
    if isinstance(module, _NORMS):
        return True
    if not any(_NORM_WORD.search(base.__name__) for base in type(module).__mro__):
        return False
    own = [p for p in module._parameters.values() if p is not None]
    return all(nn.parameter.is_lazy(p) or _is_vector(p) for p in own)


def _is_layer_scale(item: Named) -> bool:
    """Return whether these are LayerScale's factors: by name, of one dimension but for ones."""
    named = _SCALE_WORD.search(item.own) or type(item.module).__name__.startswith("LayerScale")
    return bool(named) and not nn.parameter.is_lazy(item.param) and _is_vector(item.param)


def _is_vector(p: Tensor) -> bool:
    return p.dim() <= 1 or p.numel() == max(p.shape)


# --- parameters that have no penalty whatever is asked for ----------------------------------------


def unpenalizable(item: Named) -> str | None:
    """Return why a parameter can have no penalty, None if it can."""
    p = item.param
    if nn.parameter.is_lazy(p):
        return None
    if not p.requires_grad and p.device.type in ("cpu", "cuda"):
        if p.dtype not in checks.SUPPORTED_DTYPES:
            return f"frozen, of dtype {p.dtype}"
        if type(p) not in (Tensor, nn.Parameter) and not distributed.is_dtensor(p):
            try:
                checks.plain(p, "WeightPenalty", item.name)
            except (TypeError, ValueError, RuntimeError, NotImplementedError):
                return f"frozen, a {type(p).__name__}"
    return "zeros of it would make its layer's weight NaN" if divides(item) else None


def trained(op: str, params: _params.Params, zeros: bool = True) -> _params.Params:
    """Return a module's parameters that are not frozen; ``zeros``: nor divided by their norm."""
    if not isinstance(params, nn.Module):
        return params
    listed = {n: p for n, p in params.named_parameters() if p.requires_grad}
    if not listed and next(params.parameters(), None) is not None:
        raise ValueError(
            f"fusereg.{op}: params must have a parameter that is not frozen, got a "
            f"{type(params).__name__} whose parameters all are; its parameters() are changed as "
            "they are"
        )
    if not zeros or not any(
        "parametrizations." in n or n.endswith(("_v", "_orig")) for n in listed
    ):
        return listed.values()
    named = named_parameters(params)
    return [i.param for i in named if i.param.requires_grad and not divides(i)]


def divides(item: Named) -> bool:
    """Return whether a weight that is computed from this parameter is NaN where it is zero.

    Weight normalization and spectral normalization, the parametrizations and the older hooks, and
    any other parametrization that divides by a norm.
    """
    match = _PARAMETRIZED.fullmatch(item.name)
    if match is not None and hasattr(item.module, "parametrizations"):
        lists: Any = item.module.parametrizations
        return _nan_at_zero(lists[match["name"]], item.param)
    own = item.name.rpartition(".")[2]
    for hook in item.module._forward_pre_hooks.values():
        if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
            name = getattr(hook, "name", None)
            if own in (f"{name}_v", f"{name}_orig"):
                return True
    return False


def divided_by_name(names: Sequence[str]) -> list[str]:
    """Return the names that weight normalization gives to what it divides by its norm."""
    known = set(names)
    endings = (("original1", "original0"), ("_v", "_g"))
    return [
        name
        for name in names
        for own, other in endings
        if name.endswith(own) and name.removesuffix(own) + other in known
    ]


def _nan_at_zero(parametrizations: ParametrizationList, param: Tensor) -> bool:
    """Try it on a copy."""
    if distributed.is_dtensor(param) or param.device.type == "meta":
        return True  # not to be tried without all ranks
    names = [n for n, p in parametrizations.named_parameters(recurse=False) if p is param]
    try:
        with torch.no_grad():
            tried = copy.deepcopy(parametrizations).eval()
            getattr(tried, names[0]).zero_()
            return not bool(torch.isfinite(tried()).all())
    except (IndexError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return True
