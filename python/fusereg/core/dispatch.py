"""The gate between eager calls and torch.library, and the compiled module's tie to torch.

Eager calls go straight to the kernels, inside an old-style ``torch.autograd.Function``: measured at
64 floats, forward + backward, that costs 25 us where ``torch.library`` operators cost 39 to 46.
Everything that wants to see an operator (``torch.compile``, export, fake tensors, ``make_fx``,
functorch transforms, tensor subclasses) goes through operators registered with ``torch.library``.

Private interfaces of torch that eager calls need are used in this file alone; the backend of
torch.compile uses Dynamo's in its own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_REQUIRED = "fusereg needs torch >= 2.10"
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"{_REQUIRED} (its DLPack exchange API); this is torch {torch.__version__}. "
        "Do: pip install --upgrade torch"
    )

# After torch, so that both use the one OpenMP runtime that torch has loaded.
from .. import _C  # noqa: E402

# The function below torch.autograd.graph.increment_version, which takes lists alone.
_C.bind_torch(torch.Tensor, torch.nn.Parameter, torch._C._increment_version)
if hasattr(torch._C, "_cuda_maybeExchangeDevice"):
    _C.set_restore_device(torch._C._cuda_maybeExchangeDevice)
if hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count"):
    _C.bind_owners(
        torch.Tensor._use_count,  # type: ignore[attr-defined]
        torch.Tensor.untyped_storage,
        torch._C._storage_Use_Count,
        weakref.getweakrefcount,
        torch.empty(1, device="cpu"),
    )


def functorch() -> bool:
    """Return whether a torch.func transform (grad, vmap, ...) is active, which wraps tensors.

    There an autograd function must have ``setup_context`` and a ``vmap`` rule (17 us instead of 6,
    so not used otherwise); operators of torch.library have neither.
    """
    return not torch.compiler.is_compiling() and _functorch_level() is not None


def escaped_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether this is a wrapper of a torch.func transform that has ended."""
    if torch.compiler.is_compiling() or _functorch_level() is not None:
        return False
    wrapped: bool = is_wrapped(tensor)
    return wrapped


def vmap_levels(tensor: torch.Tensor | None) -> set[int]:
    """Return the levels of the torch.func.vmap transforms that have a dimension of a tensor."""
    levels = set()
    functions = torch._C._functorch
    while tensor is not None and functions.is_functorch_wrapped_tensor(tensor):
        if functions.is_batchedtensor(tensor):
            levels.add(functions.maybe_get_level(tensor))
        tensor = functions.get_unwrapped(tensor)
    return levels


is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_forward_ad = torch.autograd.forward_ad
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_C.bind_gate(
    torch,
    # What torch.compiler.is_compiling() asks, but for Dynamo.
    torch.compiler,
    _forward_ad,
    (torch._C._len_torch_dispatch_stack, _functorch_level, _tracing_state),
)


def direct(*tensors: torch.Tensor | None) -> bool:
    """Return whether kernels may be called on these tensors at once.

    No compiler, tracer, dispatch mode or torch.func transform is active, and each tensor is exactly
    a Tensor or Parameter and has memory. Wrappers are not looked for: see :func:`wrapped`.
    ``torch.compiler.is_compiling()`` alone is wrong: it is False under FakeTensorMode and make_fx.
    """
    return not is_dynamo_compiling() and _C.direct(*tensors)


#: The same, of no tensors: whether nothing is tracing.
eager: Callable[[], bool] = direct


def wrapped(values: Sequence[object]) -> bool:
    """Return whether a tensor among these wraps another without showing it by its type.

    So do gradients under ``torch.autograd.grad(is_grads_batched=True)``, and what a torch.func
    transform leaves behind for a later backward.
    """
    return any(isinstance(t, torch.Tensor) and (_is_batched(t) or is_wrapped(t)) for t in values)


def with_values(jagged: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a nested tensor with the components of a jagged one, but other values."""
    nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(
        values,
        jagged.offsets(),  # type: ignore[attr-defined]
        jagged.lengths(),  # type: ignore[attr-defined]
        jagged._ragged_idx,  # type: ignore[attr-defined]
    )
    return nested


def for_other_programs() -> bool:
    """Return whether a model is being exported to a program without fusereg.

    So torch.onnx and torch.jit.trace do: only torch's own operators can be loaded there.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    # torch.onnx.is_in_onnx_export() asks the same, but imports the exporter: 0.2 s.
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return _tracing_state() is not None or (flags is not None and flags._is_onnx_exporting)


def forward_mode() -> bool:
    """Return whether tensors may carry tangents (torch.autograd.forward_ad.dual_level)."""
    return _forward_ad._current_level >= 0


def nested_jvp() -> bool:
    """Return whether a torch.func.jvp is active inside another."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def call_at_once(
    function: type[torch.autograd.Function], backward: Callable[..., tuple[object, ...]]
) -> None:
    """Have autograd call ``backward`` without torch's Python in between.

    That chooses between ``backward`` and ``vjp`` at each call, for half a microsecond.
    """
    function._backward_cls.apply = backward  # type: ignore[attr-defined]


_F = TypeVar("_F", bound=Callable[..., object])


def outside_graphs(function: _F) -> _F:
    """Return the function such that compiled code calls it without tracing it.

    ``torch.compiler.disable`` does the same, but imports the compiler at once; this waits for the
    first call, as torch's optimizers do.
    """
    wrapped: _F = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return wrapped


def whole_graph() -> bool:
    """Return whether a graph break is an error (``fullgraph=True``), while dynamo traces."""
    tracer = sys.modules.get("torch._dynamo.symbolic_convert")
    if tracer is None:
        return False
    try:
        root = tracer.InstructionTranslator.current_tx()
        return bool(root.one_graph or root.error_on_graph_break)
    except AttributeError:
        return False


# torch.compiler.assume_constant_result does this, but imports the compiler at once.
whole_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unscales_in_step(optimizer: object) -> bool:
    """Return whether the optimizer's step, not GradScaler, undoes the scale of the gradients."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def hooked(module: torch.nn.Module) -> bool:
    """Return whether the module has hooks or a forward of its own, which a call would run."""
    return bool(
        "forward" in module.__dict__
        # Dynamo guards what is read of a module, and not what its __dict__ lacks.
        or (torch.compiler.is_dynamo_compiling() and module.forward is None)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )
