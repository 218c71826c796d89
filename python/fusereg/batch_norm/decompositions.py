"""fusereg's operators as torch's, for programs that run without fusereg, and for Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels, op, reference
from .kernels import COMPUTE, GIVEN, Call

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return decompositions of fusereg's operators, for a program that is to run without fusereg.

    ``torch.export`` keeps batch normalization as one operator, ``torch.ops.fusereg.batch_norm``,
    which needs this package wherever the program is loaded. This table decomposes it into torch's
    operators. It is meant for evaluation: an operator with dropout stays as it is.
    ``torch.onnx.export`` of a model does not need it.

    Returns:
        A new table for ``torch.export.ExportedProgram.run_decompositions``.

    Example:
        >>> program = torch.export.export(model.eval(), (x,))
        >>> table = {**torch.export.default_decompositions(), **fusereg.decompositions()}
        >>> torch.export.save(program.run_decompositions(table), "model.pt2")
    """
    return {torch.ops.fusereg.batch_norm.default: _batch_norm}


def _batch_norm(x: Tensor, *args: Any) -> Any:
    call = op.call_of((x, *args[:8]), args[8:15])
    constants = call.constants
    if constants.p or constants.group_samples or constants.statistics == GIVEN:
        return NotImplemented
    y, moments = reference.of_torch(call)
    return y, moments if constants.statistics == COMPUTE else x.new_empty(0), x.new_empty(0)


# --- Inductor on CPUs -----------------------------------------------------------------------------
#
# Its code for batch norm moves as many bytes as the kernels, takes in what is around the norm, and
# keeps no layout apart from that of the convolutions. What it has no code for stays an operator.


def _left_to_inductor(call: Call) -> bool:
    x, constants = call.inputs.x, call.constants
    return (
        x.device.type == "cpu"
        and call.inputs.mask is None
        and not (constants.p or constants.group_samples or constants.statistics == GIVEN)
        and x.numel() > 0
        # Its sums depend on the number of threads.
        and not torch.are_deterministic_algorithms_enabled()
    )


def _for_inductor(*args: Any) -> Any:
    call, keep_bits = op.call_of(args[:9], args[9:16]), args[16]
    if keep_bits or not _left_to_inductor(call):
        return NotImplemented
    x = call.inputs.x
    y, moments = reference.generated(call)
    y = y.contiguous(memory_format=kernels.format_like(x))
    return y, x.new_empty(0) if moments is None else moments, x.new_empty(0)


def _backward_for_inductor(grad: Tensor, *args: Any) -> Any:
    bits, sums = args[9:11]
    call = op.call_of(args[:9], args[11:18])
    if bits is not None or sums is not None or not _left_to_inductor(call):
        return NotImplemented
    return reference.generated_gradients(call, grad)


op.batch_norm.decompose(_for_inductor)
op.backward.decompose(_backward_for_inductor)
