"""fusereg's operators as torch's, for exported programs that are to run without fusereg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import op as _batch_norm_ops
from . import reference
from .kernels import COMPUTE, GIVEN, Running

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What stands for fusereg's operators in a program that is to run without fusereg.

    ``torch.export`` keeps batch normalization as one operator, ``torch.ops.fusereg.batch_norm``,
    which wants this package wherever the program is loaded. The table that this gives makes torch's
    operators of it. Evaluation alone is meant: a dropout that drops stays as it is.
    ``torch.onnx.export`` of a model needs none of this.

    Returns:
        A new table for ``torch.export.ExportedProgram.run_decompositions``.

    Example:
        >>> program = torch.export.export(model.eval(), (x,))
        >>> table = {**torch.export.default_decompositions(), **fusereg.decompositions()}
        >>> torch.export.save(program.run_decompositions(table), "model.pt2")
    """
    return {torch.ops.fusereg.batch_norm.default: _batch_norm}


def _batch_norm(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    *constants: Any,
) -> Any:
    *numbers, _ = constants
    call = _batch_norm_ops.call_of(tuple(numbers), seed)
    if call.p or call.group_samples or call.statistics == GIVEN:
        return NotImplemented
    y, new = reference.of_torch(
        call, x, residual, mask, weight, bias, moments, Running(running_mean, running_var)
    )
    return (
        y,
        new if call.statistics == COMPUTE else x.new_empty((0,), dtype=torch.float64),
        x.new_empty((0,), dtype=torch.uint8),
    )
