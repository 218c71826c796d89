"""The gate between eager calls and torch.library, and the compiled module's tie to torch.

Eager calls go straight to the kernels, inside an old-style ``torch.autograd.Function``: measured at
64 floats, forward + backward, that costs 25 us where ``torch.library`` operators cost 39 to 46.
Everything that wants to see an operator (``torch.compile``, export, fake tensors, ``make_fx``,
functorch transforms, tensor subclasses) goes through operators registered with ``torch.library``.

This is the only file that touches private torch interfaces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_REQUIRED = "fusereg needs torch >= 2.10"
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"{_REQUIRED} (its DLPack exchange API); this is torch {torch.__version__}. "
        "Do: pip install --upgrade torch"
    )

# After torch, so that both use the one OpenMP runtime that torch has loaded.
from . import _C  # noqa: E402

_C.bind_torch(torch.Tensor, torch.nn.Parameter, torch.autograd.graph.increment_version)

#: Operators are defined here, each with a fake kernel and an autograd formula.
library = torch.library.Library("fusereg", "DEF")


def functorch() -> bool:
    """True inside torch.func transforms (grad, vmap, ...), whose tensors are wrapped.

    There an autograd function must have ``setup_context`` and a ``vmap`` rule (17 us instead of 6,
    so not used otherwise); operators with ``torch.library.register_autograd`` have neither.
    """
    return not torch.compiler.is_compiling() and _functorch_level() is not None


def escaped_wrapper(tensor: torch.Tensor) -> bool:
    """Whether this is a functorch wrapper that outlived its transform: it answers no question."""
    if torch.compiler.is_compiling() or _functorch_level() is not None:
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


def eager() -> bool:
    """True if nothing is watching: no compiler, tracer, dispatch mode or functorch transform.

    ``torch.compiler.is_compiling()`` alone is wrong: it is False under FakeTensorMode and make_fx.
    """
    return (
        not torch.compiler.is_compiling()
        and _dispatch_modes() == 0
        and _functorch_level() is None
        and _tracing_state() is None
    )


def for_other_programs() -> bool:
    """True while a model is written down for a program without fusereg: ONNX, torch.jit.trace.

    What then is no operator of torch's is lost.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    # torch.onnx.is_in_onnx_export() asks the same, but imports the exporter: 0.2 s.
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return _tracing_state() is not None or (flags is not None and flags._is_onnx_exporting)


def forward_mode() -> bool:
    """True inside torch.autograd.forward_ad.dual_level(): a tensor may carry a tangent unseen."""
    return torch.autograd.forward_ad._current_level >= 0


_F = TypeVar("_F", bound=Callable[..., object])


def outside_graphs(function: _F) -> _F:
    """The function, called as it is from compiled code. ``torch.compiler.disable`` does the same,
    but imports the compiler at once; this waits for the first call, as torch's optimizers do."""
    wrapped: _F = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return wrapped


def whole_graph() -> bool:
    """While dynamo traces: whether a graph that breaks is an error (``fullgraph=True``)."""
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


_Memory = TypeVar("_Memory")
#: Memory that kernels work in, for each purpose and stream: those of two streams may run at once.
_kept: dict[tuple[object, int, int], Any] = {}


def _of_stream(
    purpose: object,
    device: torch.device,
    make: Callable[[], _Memory],
    fits: Callable[[_Memory], bool] = lambda _: True,
) -> _Memory:
    """What ``make`` gives, kept for the present stream while it fits.

    While a CUDA graph is being captured it is a fresh one, which belongs to the graph's own memory.
    """
    index, handle = -1, 0  # of CUDA kernels that run on the host
    if device.type != "cpu":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device)
        index, handle = stream.device.index, stream.cuda_stream
    key = (purpose, index, handle)
    found: _Memory | None = _kept.get(key)
    if found is None or not fits(found):
        with torch.inference_mode(False):
            found = _kept[key] = make()
    return found


def _without_kernels(device: torch.device) -> bool:
    """Whether no CUDA kernel serves this device, so that there is nothing to keep."""
    return device.type == "cpu" and not _C.CUDA_ON_HOST


def workspace(device: torch.device, size: int = _C.PENALTY_WORKSPACE_BYTES) -> torch.Tensor | None:
    """So many bytes that CUDA reductions leave zeroed as they found them; None on the CPU."""
    if _without_kernels(device):
        return None
    return _of_stream(
        size, device, lambda: torch.zeros(size // 8, dtype=torch.float64, device=device)
    )


def barrier(device: torch.device) -> torch.Tensor | None:
    """The word at which the blocks of a cooperative CUDA launch meet; None on the CPU."""
    if _without_kernels(device):
        return None
    return _of_stream("barrier", device, lambda: torch.zeros(1, dtype=torch.int32, device=device))


def scratch(device: torch.device, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scratch of at least ``size`` bytes, and zeroed semaphores; None for CPU kernels."""
    if _without_kernels(device):
        return None, None
    # Whole kilobytes, at least what small shapes want, so that few sizes are ever asked for.
    size = max(64 * 1024, -(-size // 1024) * 1024)
    return _of_stream(
        "scratch",
        device,
        lambda: (
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.zeros(_C.BATCH_NORM_SEMAPHORE_BYTES, dtype=torch.uint8, device=device),
        ),
        lambda found: found[0].numel() >= size,
    )


def _table_memory(device: int, size: int) -> torch.Tensor:
    where = torch.device("cpu") if _C.CUDA_ON_HOST else torch.device("cuda", device)
    return torch.empty(size, dtype=torch.uint8, device=where)


def launch_tables() -> _C._LaunchTables:
    """Where CUDA launches over long lists of tensors keep their tables, for one owner of lists.

    The memory is made when a list first wants it, and belongs to the owner. The addresses in it are
    written again only when they have changed.
    """
    return _C.launch_tables(_table_memory)


def is_dtensor(tensor: object) -> bool:
    """Whether this is a torch.distributed DTensor, without importing that package for nothing."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def has_dtensor(tensors: Sequence[torch.Tensor]) -> bool:
    only_plain, _ = _C.scan(tensors)  # a few nanoseconds a tensor
    return not only_plain and any(is_dtensor(t) for t in tensors)


def all_gather(tensor: torch.Tensor, group: object) -> torch.Tensor:
    """[processes, *shape]: every process's tensor, in the order of ranks."""
    world: int = torch.distributed.get_world_size(group)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        flat = functional.all_gather_tensor(tensor.flatten(), 0, group)  # type: ignore[arg-type]
        return flat.view(world, *tensor.shape)
    result = tensor.new_empty((world, *tensor.shape))
    # Its name since 2.13, where the old one warns.
    gather = getattr(torch.distributed, "all_gather_single", None)
    if gather is None:
        gather = torch.distributed.all_gather_into_tensor
    gather(result.view(-1), tensor.contiguous().view(-1), group=group)
    return result


def all_reduce(tensor: torch.Tensor, group: object) -> torch.Tensor:
    """The sum of every process's tensor; ``tensor`` itself may be written to."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        result: torch.Tensor = functional.all_reduce(tensor, "sum", group)  # type: ignore[arg-type]
        return result
    torch.distributed.all_reduce(tensor, group=group)
    return tensor


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        # Looked up by name: to import torch._dynamo, for its type, takes seconds.
        compiled = getattr(module, "_orig_mod", None)
        if isinstance(compiled, torch.nn.Module):
            module = compiled
        elif torch.distributed.is_available() and isinstance(
            module, torch.nn.parallel.DistributedDataParallel
        ):
            module = module.module
        else:
            return module


def unscales_in_step(optimizer: object) -> bool:
    """Whether a GradScaler leaves it to the optimizer's step to undo the scale of its gradients."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of the module is not just its class's forward: a hook would see it."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )
