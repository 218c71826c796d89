"""Batch normalization with the statistics of all processes."""

from __future__ import annotations

import logging
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import dispatch
from . import functional, known, op, sync_op
from .layers import AnyDimension, BatchNorm1d, BatchNorm2d, BatchNorm3d, _Fused

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Module = TypeVar("_Module", bound=nn.Module)

_log = logging.getLogger("fusereg")

#: What convert_sync_batchnorm takes, and what revert_sync_batchnorm makes of it again.
_CONVERTED: tuple[type[_BatchNorm], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    nn.SyncBatchNorm,
)


class SyncBatchNorm(AnyDimension):
    """Batch normalization with the statistics of all processes' batches (``torch.distributed``).

    Has the arguments, parameters, buffers and state_dict of torch's, and the epilogue of
    :class:`BatchNorm2d`: a residual, an activation, dropout. It works on the CPU too (gloo), with
    batches of different sizes and with none at all on some processes, waits for no device, and can
    be compiled with ``fullgraph=True``. Without a process group of more than one process, and in
    evaluation, it is plain batch normalization. Takes (N, C) and (N, C, ...). It is no subclass of
    torch's, because DistributedDataParallel refuses those on the CPU.

    A call sends 24 bytes a channel to every process in forward (one all-gather) and sums 16 bytes a
    channel in backward (one all-reduce). The gradients of weight and bias are those of this
    process's batch, which DDP then averages, as with torch's. A second derivative (a gradient
    penalty) takes two more all-reduces forward and backward, on all processes alike.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, process_group, device, dtype, bias: as torch's.
        activation, dropout, negative_slope, update_stats: as in :class:`BatchNorm2d`.

    Example:
        >>> model = fusereg.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        >>> model = torch.nn.parallel.DistributedDataParallel(model)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **more
        )
        if self.inplace:
            raise ValueError("fusereg.nn.SyncBatchNorm: inplace=True is not supported")
        self.process_group = process_group

    def _process_group(self) -> Any:
        """Return the group to synchronize over; None where there is nothing to synchronize."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _normalized(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: functional.Settings,
    ) -> Tensor:
        group = self._process_group() if self.training else None
        inputs, batches = self._inputs(input, residual, mask)
        if group is None and dispatch.is_dynamo_compiling():
            return functional.called(inputs, batches, settings)
        call = functional.prepared(
            inputs, batches, settings, "sync_batch_norm", single_values=group is not None
        )
        return op.normalize(call) if group is None else sync_op.synchronized(call, group)

    @classmethod
    def convert_sync_batchnorm(cls, module: _Module, process_group: Any = None) -> Any:
        """Return the module with its batch-norm layers synchronized.

        Converted are torch's and fusereg's ``BatchNorm1d/2d/3d`` and ``SyncBatchNorm``, and timm's
        ``BatchNormAct2d``, each before and after :func:`fusereg.convert`. Parameters, buffers,
        hooks and training mode are kept, and an activation and a dropout as well (torch's own
        method loses them). Other subclasses may compute something else, so they stay as they are;
        a warning of the logger "fusereg" names them and the reason.

        Args:
            module: changed in place; a batch-norm layer itself gives a new layer.
            process_group: of the new layers; all processes if not given.
        """
        return _converted(module, lambda name, layer: _to_sync(cls, name, layer, process_group))

    @classmethod
    def revert_sync_batchnorm(cls, module: _Module) -> Any:
        """Return the module with the layers of :meth:`convert_sync_batchnorm` converted back.

        A layer that was made as a SyncBatchNorm becomes a BatchNorm2d.
        """
        return _converted(module, _from_sync)


class SyncBatchNormAct(SyncBatchNorm):
    """A synchronized BatchNormAct2d of timm: its children ``drop`` and ``act`` follow."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize the input, and call the children."""
        y: Tensor = self.act(self.drop(super().forward(input, residual, mask=mask)))
        return y


def _converted(module: nn.Module, replace: Any) -> nn.Module:
    """Return the module with what ``replace`` returns for its layers; shared ones stay shared."""
    made: dict[nn.Module, nn.Module] = {}

    def visit(name: str, layer: nn.Module) -> nn.Module:
        if layer not in made:
            made[layer] = replace(name, layer) or layer
            if made[layer] is layer:
                for key, child in list(layer._modules.items()):
                    if child is not None:
                        new = visit(f"{name}.{key}" if name else key, child)
                        layer._modules[key] = new
        return made[layer]

    converted = visit("", module)
    made = {old: new for old, new in made.items() if old is not new}
    for part in [*converted.modules()] if made else ():
        for name, value in vars(part).items():
            if name not in _OF_MODULE:
                vars(part)[name] = _exchanged(value, made)
    return converted


#: What every module holds.
_OF_MODULE = frozenset(vars(nn.Module()))


def _exchanged(value: Any, made: dict[nn.Module, nn.Module]) -> Any:
    """Return what an attribute holds beside the model's tree, with layers replaced."""
    if isinstance(value, nn.Module):
        return made.get(value, value)
    if type(value) is weakref.ref and (held := value()) in made:
        return weakref.ref(made[held])
    if type(value) is list:
        value[:] = [_exchanged(each, made) for each in value]
    elif type(value) is dict:
        value.update({key: _exchanged(each, made) for key, each in value.items()})
    elif type(value) is tuple:
        parts = tuple(_exchanged(each, made) for each in value)
        if any(a is not b for a, b in zip(parts, value, strict=True)):
            return parts
    return value


def _to_sync(cls: type[SyncBatchNorm], name: str, layer: nn.Module, group: Any) -> nn.Module | None:
    if not isinstance(layer, _BatchNorm) or isinstance(layer, SyncBatchNorm):
        return None
    act = known.is_timm_act(layer)
    reason = known.why_unknown(layer)
    if reason is None and not act and type(layer) not in _CONVERTED:
        reason = f"{type(layer).__name__} has statistics of its own, which are not synchronized"
    if reason is None and "forward" in vars(layer):
        reason = "its forward is set on the object"
    if reason is None and getattr(layer, "inplace", False):
        reason = "a synchronized layer does not work in place"
    if reason is not None:
        _log.warning(
            "fusereg.nn.SyncBatchNorm: %s is not synchronized: %s", name or "the layer", reason
        )
        return None
    if isinstance(layer, nn.SyncBatchNorm) and group is None:
        group = layer.process_group
    made = _twin(SyncBatchNormAct if act else cls, layer, process_group=group)
    made.__dict__["converted_from"] = known.original_class(layer)
    return made


def _from_sync(name: str, layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, _BatchNorm) or type(layer) not in (SyncBatchNorm, SyncBatchNormAct):
        return None
    made = layer.__dict__.get("converted_from", BatchNorm2d)
    if made is nn.SyncBatchNorm:
        return _twin(made, layer, process_group=layer.process_group)
    return _twin(made, layer)


def _twin(made: type[_BatchNorm], layer: _BatchNorm, **extra: Any) -> _BatchNorm:
    """Return a layer of another class with this one's parameters, buffers, hooks and settings."""
    if issubclass(made, _Fused):
        for name in ("activation", "dropout", "negative_slope", "update_stats"):
            if hasattr(layer, name):
                extra[name] = getattr(layer, name)
    elif getattr(layer, "activation", None) is not None or getattr(layer, "dropout", False):
        raise ValueError(
            f"fusereg.nn.SyncBatchNorm: a layer with a fused activation or dropout cannot become "
            f"a {made.__module__}.{made.__name__}, which has none"
        )
    new = made(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        device="meta",
        **extra,
    )
    for state in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        setattr(new, state, getattr(layer, state))
    for name, value in vars(layer).items():
        # What fusereg.convert remembers is kept as well, so that fusereg.revert works afterwards.
        if "hook" in name or name.startswith("_fusereg"):
            new.__dict__[name] = value
    for hook in vars(new)["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False):  # torch's wrapper of those that want the module
            hook.module = weakref.ref(new)
    return new.train(layer.training)
