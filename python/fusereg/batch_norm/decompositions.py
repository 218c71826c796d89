"""fusereg's operators as torch's, for exported programs that are to run without fusereg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import op, reference
from .kernels import COMPUTE, GIVEN

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
