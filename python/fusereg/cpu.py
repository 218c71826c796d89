"""Instruction sets of the CPU kernels: which there are, and which is used.

All give the same bits, so choosing one is for measuring and for finding faults.

Example:
    >>> fusereg.cpu.instruction_sets()
    ['baseline', 'avx2', 'avx512']
    >>> fusereg.cpu.set_instruction_set("avx2")
"""

from __future__ import annotations

from . import _C

__all__ = ["instruction_set", "instruction_sets", "set_instruction_set"]


def instruction_sets() -> list[str]:
    """Return the names of the instruction sets that this build has and this processor runs."""
    return _C.cpu_isas()


def instruction_set() -> str:
    """Return the name of the instruction set that CPU kernels use now.

    It is the best that the processor runs, unless ``FUSEREG_CPU_ISA`` in the environment or
    :func:`set_instruction_set` names another.
    """
    return _C.cpu_isa()


def set_instruction_set(name: str) -> None:
    """Use the kernels of this instruction set from now on, in all threads.

    Args:
        name: one of :func:`instruction_sets`.

    Raises:
        ValueError: this build does not have it, or this processor does not run it.
    """
    _C.set_cpu_isa(name)
