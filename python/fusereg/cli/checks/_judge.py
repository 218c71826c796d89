"""Calls an operation of the inventory and judges what came."""

from __future__ import annotations

import ctypes
import hashlib
import math
from dataclasses import dataclass

import torch

from ...core.inventory import TOLERANCES, Inputs, Operation, Pairs


@dataclass(frozen=True)
class CheckResult:
    """The result of one operation on one backend.

    ``error`` and ``tolerance`` belong to the tensor that came nearest to its tolerance, or exceeded
    it; ``error`` is None when the call itself failed, and ``message`` then says how. ``bits`` is a
    digest of the results, the same wherever the results are the same to the last bit.
    """

    technique: str
    kernel: str
    formula: str
    backend: str
    device: str
    dtype: str
    large: bool
    ok: bool
    error: float | None
    tolerance: float
    message: str | None
    bits: str | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def worst(pairs: Pairs) -> tuple[float, float]:
    """Return (error, tolerance) of the pair that is the worst relative to its tolerance.

    Errors are relative to the largest element of a tensor; the tolerance is that of its dtype. NaN
    is the worst of all.
    """
    found = (0.0, min(TOLERANCES[came.dtype] for came, _ in pairs))
    for came, wanted in pairs:
        if came.shape != wanted.shape:
            raise ValueError(f"shape {tuple(came.shape)} came, {tuple(wanted.shape)} was wanted")
        if not wanted.numel():
            continue
        reference = wanted.detach().double().cpu()
        difference = float((came.detach().double().cpu() - reference).abs().max())
        error = difference / max(float(reference.abs().max()), 1e-30)
        tolerance = TOLERANCES[came.dtype]
        if math.isnan(error):
            return error, tolerance
        if error / tolerance > found[0] / found[1]:
            found = (error, tolerance)
    return found


def digest(pairs: Pairs) -> str:
    """Return a digest of the bits of all results."""
    found = hashlib.blake2b(digest_size=12)
    for came, _ in pairs:
        values = came.detach().cpu().contiguous()
        found.update(ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()))
    return found.hexdigest()


def run_check(operation: Operation, inputs: Inputs, backend: str) -> CheckResult:
    """Call one operation. An exception becomes its result's message."""
    error: float | None = None
    message: str | None = None
    bits: str | None = None
    tolerance = TOLERANCES[inputs.dtype]
    try:
        pairs = operation.check(inputs)
        error, tolerance = worst(pairs)
        bits = digest(pairs)
    except Exception as problem:  # a kernel that raises is a row of the table, not the end of it
        message = " ".join(f"{type(problem).__name__}: {problem}".split())
    if error is not None and not math.isfinite(error):
        message = "the result is NaN" if math.isnan(error) else "the error is infinite"
        error = None
    return CheckResult(
        technique=operation.technique,
        kernel=operation.name,
        formula=operation.formula,
        backend=backend,
        device=str(inputs.device),
        dtype=dtype_name(inputs.dtype),
        large=inputs.large,
        ok=error is not None and error <= tolerance,
        error=error,
        tolerance=tolerance,
        message=message,
        bits=bits,
    )
