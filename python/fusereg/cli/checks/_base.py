"""What a check is, what it is given, and how its result is judged."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: (what came, what torch gives in float64).
Pairs = list[tuple[Tensor, Tensor]]

#: Largest error relative to the largest magnitude of the reference: some units of the last place.
#: A wrong term, tail or group is off by much more. The tests use the same.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


@dataclass(frozen=True)
class Inputs:
    """Where, in which dtype and how large; makes the tensors that a kernel is called with.

    The same numbers each time, drawn in float64 and rounded, so that they are the same on every
    device. Small ones fit a chunk; large ones take several chunks and threads.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    large: bool = False

    def exact_normal(self, *shape: int, seed: int = 20) -> Tensor:
        """Normal numbers that the dtype can hold, in float64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(self.dtype).double()

    def normal(self, *shape: int, seed: int = 20) -> Tensor:
        """The same on the device."""
        return self.exact_normal(*shape, seed=seed).to(self.device, self.dtype)

    @property
    def matrix(self) -> tuple[int, int]:
        """A matrix's shape, both sizes odd."""
        return (519, 259) if self.large else (37, 65)

    def weights(self) -> list[Tensor]:
        """A matrix with odd sizes, a misaligned slice, a tiny one, one with an all-zero group."""
        with_zeros = self.normal(8, 24, seed=23)
        with_zeros[2] = 0.0
        vector = self.normal(60_001 if self.large else 2050, seed=21)
        return [self.normal(*self.matrix), vector[1:], self.normal(3, 1, seed=22), with_zeros]


Call = Callable[[Inputs], Pairs]


@dataclass(frozen=True)
class KernelCheck:
    """A kernel's technique and name, its formula, and how to call it."""

    technique: str
    name: str
    formula: str
    call: Call


@dataclass(frozen=True)
class CheckResult:
    """What one kernel gave on one backend.

    ``error`` and ``tolerance`` belong to the tensor that came nearest to its tolerance, or passed
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


CHECKS: list[KernelCheck] = []


def kernel_check(name: str, formula: str) -> Callable[[Call], Call]:
    """Adds the function below it to the checks of its file's technique."""

    def register(call: Call) -> Call:
        CHECKS.append(KernelCheck(call.__module__.split(".")[-2], name, formula, call))
        return call

    return register


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in float64 on the CPU."""
    return [w.detach().to("cpu", torch.float64, copy=True) for w in tensors]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def worst(pairs: Pairs) -> tuple[float, float]:
    """(error, tolerance) of the pair that is the worst against its tolerance. NaN is the worst.

    Errors are relative to the largest element of a tensor; the tolerance is that of its dtype.
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
    """Of the bits of all that came."""
    found = hashlib.blake2b(digest_size=12)
    for came, _ in pairs:
        values = came.detach().cpu().contiguous()
        found.update(ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()))
    return found.hexdigest()


def run_check(check: KernelCheck, inputs: Inputs, backend: str) -> CheckResult:
    """Calls one kernel. What it raises becomes its result's message."""
    error: float | None = None
    message: str | None = None
    bits: str | None = None
    tolerance = TOLERANCES[inputs.dtype]
    try:
        pairs = check.call(inputs)
        error, tolerance = worst(pairs)
        bits = digest(pairs)
    except Exception as problem:  # a kernel that throws is a row of the table, not the end of it
        message = " ".join(f"{type(problem).__name__}: {problem}".split())
    if error is not None and not math.isfinite(error):
        message = "the result is NaN" if math.isnan(error) else "the error is infinite"
        error = None
    return CheckResult(
        technique=check.technique,
        kernel=check.name,
        formula=check.formula,
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
