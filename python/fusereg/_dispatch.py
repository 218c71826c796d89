"""The gate between eager calls and torch.library, and the compiled module's tie to torch.

Eager calls go straight to the kernels, inside an old-style ``torch.autograd.Function``: measured at
64 floats, forward + backward, that costs 25 us where ``torch.library`` operators cost 39 to 46.
Everything that wants to see an operator (``torch.compile``, export, fake tensors, ``make_fx``,
functorch transforms, tensor subclasses) goes through operators registered with ``torch.library``.

This is the only file that touches private torch interfaces.
"""

from __future__ import annotations

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
_functorch_level = torch._C._functorch.peek_interpreter_stack


def eager() -> bool:
    """True if nothing is watching: no compiler, no dispatch mode, no functorch transform.

    ``torch.compiler.is_compiling()`` alone is wrong: it is False under FakeTensorMode and make_fx.
    """
    return (
        not torch.compiler.is_compiling() and _dispatch_modes() == 0 and _functorch_level() is None
    )


def forward_mode() -> bool:
    """True inside torch.autograd.forward_ad.dual_level(): a tensor may carry a tangent unseen."""
    return torch.autograd.forward_ad._current_level >= 0


_F = TypeVar("_F", bound=Callable[..., object])


def outside_graphs(function: _F) -> _F:
    """The function, called as it is from compiled code. ``torch.compiler.disable`` does the same,
    but imports the compiler at once; this waits for the first call, as torch's optimizers do."""
    wrapped: _F = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return wrapped


_workspaces: dict[tuple[int, int], torch.Tensor] = {}


def workspace(device: torch.device) -> torch.Tensor | None:
    """Scratch memory that CUDA reductions leave zeroed as they found it; None on the CPU.

    One for each device and stream, because kernels on two streams may run at once. While a CUDA
    graph is being captured it is a fresh one, which belongs to the graph's own memory.
    """
    if device.type == "cpu":
        if not _C.CUDA_ON_HOST:
            return None
        key = (-1, 0)
    else:
        if torch.cuda.is_current_stream_capturing():
            return _new_workspace(device)
        stream = torch.cuda.current_stream(device)
        key = (stream.device.index, stream.cuda_stream)
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = _new_workspace(device)
    return found


def _new_workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_C.PENALTY_WORKSPACE_BYTES // 8, dtype=torch.float64, device=device)


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
