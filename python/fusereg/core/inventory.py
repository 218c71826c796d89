"""The inventory of operations.

It says what each public function computes, on which tensors, and how it is compared with torch in
float64.

Each technique declares its rows in its file check.py, as a list ``OPERATIONS``. ``fusereg verify``,
the tests and the documents' tables of what is supported all read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: (result, the same in float64 on the CPU).
Pairs = list[tuple[Tensor, Tensor]]
Shape = tuple[int, ...]

#: Largest error relative to the largest magnitude of the reference: some units of the last place.
#: A wrong term, tail or group is off by much more. The tests use the same.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

#: Shapes by size. Sides are odd; "small" fits a chunk, "large" takes several chunks and threads,
#: "tiny" is for derivatives by finite differences; the others are edge cases.
MATRICES: dict[str, Shape] = {
    "tiny": (3, 4),
    "small": (37, 65),
    "large": (519, 259),
    "empty": (0, 4),
    "one element": (1, 1),
}
ANY_SHAPE: dict[str, Shape] = {**MATRICES, "0-d": ()}
IMAGES: dict[str, Shape] = {
    "tiny": (2, 2, 3, 2),
    "small": (3, 8, 5, 7),
    "large": (5, 29, 21, 37),
    "empty": (0, 8, 5, 7),
    "one element": (1, 1, 1, 1),
}
SEQUENCES: dict[str, Shape] = {
    "tiny": (2, 3, 2),
    "small": (3, 8, 37),
    "large": (17, 41, 129),
    "empty": (0, 8, 37),
    "one element": (1, 1, 1),
}
VOLUMES: dict[str, Shape] = {
    "tiny": (2, 2, 2, 1, 2),
    "small": (3, 4, 3, 5, 7),
    "large": (5, 13, 3, 21, 37),
    "empty": (0, 4, 3, 5, 7),
    "one element": (1, 1, 1, 1, 1),
}


@dataclass(frozen=True)
class Inputs:
    """The device, the dtype and the size of the tensors that an operation is called with.

    The numbers are drawn in float64 and rounded, so they are the same in each run and on every
    device.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    size: str = "small"

    @property
    def large(self) -> bool:
        """Return whether the tensors take several chunks and threads."""
        return self.size == "large"

    @property
    def wide(self) -> torch.dtype:
        """The dtype of parameters and statistics under autocast: float32 for 16-bit inputs."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def exact_normal(self, *shape: int, seed: int = 20) -> Tensor:
        """Return normal numbers that the dtype can hold, in float64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        # torch rounds float64 to float16 at once on 64-bit Arm, elsewhere by way of float32.
        through = numbers if self.dtype is torch.float64 else numbers.float()
        return through.to(self.dtype).double()

    def normal(self, *shape: int, seed: int = 20) -> Tensor:
        """Return the same numbers on the device, in the dtype."""
        return self.exact_normal(*shape, seed=seed).to(self.device, self.dtype)

    def weights(self) -> list[Tensor]:
        """Return a matrix with odd sizes, a misaligned slice, a tiny one, one with a zero row."""
        tiny = self.size == "tiny"
        with_zeros = self.normal(3, 2) if tiny else self.normal(8, 24, seed=23)
        if not tiny:  # where finite differences are taken, no corner
            with_zeros[2] = 0.0
        vector = self.normal({"tiny": 4, "large": 60_001}.get(self.size, 2050), seed=21)
        matrix = self.normal(*MATRICES[self.size])
        return [matrix, vector[1:], self.normal(3, 1, seed=22), with_zeros]


def _one_tensor(inputs: Inputs, shape: Shape) -> list[Tensor]:
    return [inputs.normal(*shape)]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One way to call a public function, and what it must give.

    Attributes:
        name: of the function as users write it after ``fusereg.`` (``functional.`` is left out);
            what follows a comma tells variants apart.
        formula: what is computed.
        function: the public function.
        shapes: by size, see ``MATRICES``; as a rule those of the first tensor.
        tensors: makes the tensor arguments for one of these shapes.
        arguments: names of the tensor arguments.
        as_list: whether the function takes its tensors as one list.
        options: all other arguments.
        reference: the same computation with torch, of the same tensors in float64 on the CPU; it
            writes to the same arguments. None if ``pairs`` has its own.
        written: names of arguments that are changed in place.
        constants: names of arguments that have no gradient.
        kink: values whose sign decides where the function is not smooth, of the same tensors: no
            gradient is sent in where rounding could change that sign.
        pairs: compares with float64 in its own way.
        refuses: what is refused with an error, such as "in place", and a part of that error.
        technique: the name of the package; filled in by whoever collects the rows.
    """

    name: str
    formula: str
    function: Callable[..., Any]
    shapes: Mapping[str, Shape] = field(default_factory=lambda: ANY_SHAPE)
    tensors: Callable[[Inputs, Shape], list[Tensor]] = _one_tensor
    arguments: tuple[str, ...] = ("x",)
    as_list: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    written: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    kink: Callable[..., Tensor] | None = None
    pairs: Callable[[Inputs], Pairs] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    technique: str = ""

    @property
    def op(self) -> str:
        """The name that errors begin with, after "fusereg."."""
        return self.name.partition(",")[0].removeprefix("augment.")

    @property
    def main(self) -> int:
        """The position of the first argument that the function computes with by itself."""
        names = [] if self.as_list else list(self.arguments)
        return next((i for i, name in enumerate(names) if name not in self.constants), 0)

    def takes(self, option: str) -> bool:
        """Return whether the function has a parameter of this name."""
        return option in inspect.signature(self.function).parameters

    def sample(self, inputs: Inputs) -> list[Tensor]:
        """Return the tensor arguments."""
        return self.tensors(inputs, self.shapes[inputs.size])

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        """Call the function; ``options`` take precedence over the row's own."""
        options = {**self.options, **options}
        if self.as_list:
            return self.function(list(tensors), **options)
        return self.function(**dict(zip(self.arguments, tensors, strict=True)), **options)

    def select(self, tensors: list[Tensor], names: tuple[str, ...]) -> list[Tensor]:
        """Return the tensors of these arguments; all of a list that the function writes to."""
        if self.as_list:
            return tensors if names else []
        return [t for name, t in zip(self.arguments, tensors, strict=True) if name in names]

    def differentiable(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors that have a gradient."""
        if self.as_list:
            return [] if self.written or self.constants else tensors
        none = {*self.written, *self.constants}
        names = tuple(name for name in self.arguments if name not in none)
        return [t for t in self.select(tensors, names) if t.is_floating_point()]

    def as_function(
        self, tensors: list[Tensor], **options: Any
    ) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """Return the operation as a function of its differentiable tensors alone, and these.

        What it writes to is copied before each call. An operation without a differentiable tensor
        is a function of all.
        """
        leaves = self.differentiable(tensors) or tensors
        at = [next(i for i, t in enumerate(tensors) if t is leaf) for leaf in leaves]
        written = self.select(tensors, self.written)

        def call(*given: Tensor) -> Any:
            arguments = [t.clone() if any(t is w for w in written) else t for t in tensors]
            for i, t in zip(at, given, strict=True):
                arguments[i] = t
            return self(*arguments, **options)

        return call, tuple(leaves)

    def check(self, inputs: Inputs) -> Pairs:
        """Return the pairs that `fusereg verify` compares."""
        return self.compare(self.sample(inputs)) if self.pairs is None else self.pairs(inputs)

    def compare(self, tensors: list[Tensor], call: Callable[..., Any] | None = None) -> Pairs:
        """Return results, written arguments and gradients with their references.

        The incoming gradients are normal numbers. ``call`` takes the place of the operation itself:
        a compiled version of it, for example.
        """
        assert self.reference is not None
        exacts = exact(tensors)
        wanted, wanted_leaves = _with_gradient(self, exacts, self.reference)
        came, leaves = _with_gradient(self, tensors, self if call is None else call)
        pairs = list(zip(came, wanted, strict=True))
        pairs += zip(
            self.select(tensors, self.written), self.select(exacts, self.written), strict=True
        )
        results = [(y, reference) for y, reference in pairs if y.requires_grad]
        if not leaves or not results:
            return pairs
        incoming = [
            Inputs(torch.device("cpu"), y.dtype).exact_normal(*y.shape, seed=30 + i)
            for i, (y, _) in enumerate(results)
        ]
        if self.kink is not None:
            near = self.kink(*exacts).detach().abs() < 1e-4
            incoming = [torch.where(near, 0.0, g) for g in incoming]
        gradients = torch.autograd.grad(
            [y for y, _ in results],
            leaves,
            [g.to(y.device, y.dtype) for g, (y, _) in zip(incoming, results, strict=True)],
        )
        references = torch.autograd.grad([r for _, r in results], wanted_leaves, incoming)
        return [*pairs, *zip(gradients, references, strict=True)]


def _with_gradient(
    operation: Operation, tensors: list[Tensor], call: Callable[..., Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Call on tensors that require gradients; return the results as a list, and these tensors."""
    leaves = [t.requires_grad_() for t in operation.differentiable(tensors)]
    return as_tuple(call(*tensors)), leaves


def as_tuple(result: Any) -> list[Tensor]:
    """Return the tensors of a result: none, one or several."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies on the CPU, in float64 unless they are integers or Booleans."""
    return [
        w.detach().to("cpu", torch.float64 if w.is_floating_point() else w.dtype, copy=True)
        for w in tensors
    ]
