"""Dropout as an operation, on which the whole family builds.

All kinds are one form, y = keep ? a * x + b : c, whose mask is drawn a second time in backward;
``rows`` > 0 means one draw for each index of that many leading dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .drawn import DrawnOperator
from .operator import compute_dtype
from .random import Source


def _supported(x: Tensor, p: float, alpha: bool, rows: int, *_: object) -> Tensor:
    like = torch.empty_like(x)
    if rows and not _rows_fit(like):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return like


def _rows_fit(x: Tensor) -> bool:
    """Return whether the kernels can tell the rows of x: it is contiguous or channels_last."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


#: (x, state, p, alpha, rows, index_offset): the mask applied to x.
mask = DrawnOperator(
    "dropout",
    "float p, bool alpha, int row_dims, SymInt index_offset",
    supported=_supported,
)


#: The public functions, which stand for a call in the graphs of torch.fx.
public: dict[str, Callable[..., Tensor]] = {}


class Kind(NamedTuple):
    """A kind of dropout: its name, whether it is alpha dropout, and what has a draw of its own.

    ``rows`` gives for each number of dimensions of the input how many leading ones are counted by
    draws; None: every element is. ``expected`` are the numbers of dimensions that torch does not
    warn of (None: all), ``strict`` says that an input that is returned as it is must fit as well.
    """

    op: str
    alpha: bool = False
    rows: Mapping[int, int] | None = None
    expected: tuple[int, ...] | None = None
    strict: bool = False

    def rows_of(self, x: Tensor, identity: bool = False) -> int:
        """Return how many leading dimensions of x are counted by draws; 0 for every element."""
        if self.rows is None:
            return 0
        dims = x.dim()
        found = self.rows.get(dims, 0)
        if self.expected is not None and dims not in self.expected:
            self._warn(dims)
        if not found and (self.strict or not identity):
            few = len(self.rows) < 4
            wanted = " or ".join(map(str, self.rows)) if few else f"at least {min(self.rows)}"
            raise ValueError(f"fusereg.{self.op}: input must have {wanted} dimensions, got {dims}")
        return found

    def _warn(self, dims: int) -> None:
        """Warn of an input that torch warns of."""
        taken = "is deprecated in torch; use dropout instead"
        if self.op == "dropout2d" and dims == 3:
            taken = "is taken as (N, C, L), as torch does for now; use dropout1d instead"
        warnings.warn(f"fusereg.{self.op}: an input of {dims} dimensions {taken}", stacklevel=5)


def dropout(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    index_offset: int,
    kind: Kind,
    out: Tensor | None = None,
) -> Tensor:
    """Apply a kind of dropout; the public functions document the arguments."""
    op, alpha, counted, _, _ = kind
    rows = None if counted else 0
    if type(p) is not float:
        p = checks.check_probability(p, op)
    if (
        # What training loops call, with as few questions as possible.
        training
        and 0.0 < p <= 1.0
        and not (inplace or index_offset)
        and out is None
        and seed is None
        and generator is None
        and not dispatch.is_dynamo_compiling()
        and (counted is None or isinstance(x, Tensor))
    ):
        if rows is None:
            rows = kind.rows_of(x)
        y: Tensor | None = mask.draw_at_once((p, alpha, rows, 0, op), x)
        if y is not None:
            return y

    checks.check_probability(p, op)
    if not isinstance(x, Tensor) and op in public and hasattr(x, "__torch_function__"):
        options = {"p": p, "training": training, "inplace": inplace, "seed": seed}
        options |= {"generator": generator, "index_offset": index_offset}
        if out is not None:
            options["out"] = out
        found: Tensor = torch.overrides.handle_torch_function(public[op], (x,), x, **options)
        return found
    checks.check_tensor(x, op, "input")
    identity = not training or p == 0
    if rows is None:
        rows = kind.rows_of(x, identity)
    if out is not None:
        if inplace:
            raise ValueError(f"fusereg.{op}: inplace and out exclude each other")
        checks.check_input(x, op, "input")
        checks.check_target(x, out, op, name="input")
    if identity:
        return x if out is None or out is x else out.copy_(x)
    if x.layout is torch.jagged and counted is None and not inplace:
        values = dropout(x.values(), p, True, False, seed, generator, index_offset, kind)
        return dispatch.with_values(x, values)
    checks.check_input(x, op, "input")
    if inplace:
        checks.check_in_place(x, op, "input")
    constants = (p, alpha, rows, index_offset)
    return mask.draw(x, constants, Source(seed, generator), op, x if inplace else out, rows)


def keep_factors(x: Tensor, seed: object, p: float, index_offset: int, *op: str) -> Tensor:
    """Return 1 / (1 - p) where dropout keeps an element of x, else 0; in float32 at least."""
    ones = torch.ones_like(x, dtype=compute_dtype(x.dtype)).detach()
    factors: Tensor = mask(ones, seed, p, False, 0, index_offset, *op)
    return factors
