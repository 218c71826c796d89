"""One point of a path: a network that was trained with one strength."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PathPoint:
    """A network of a path, trained with one strength.

    Attributes:
        strength: the strength.
        metrics: what ``evaluate`` returned, by name; the first is what is chosen by.
        standard_error: of the first metric, None if it is not known.
        zeros: the share of the network's weights that are exactly zero.
        used: for each penalized group in order, whether any of its weights is not zero; empty
            without ``penalized``.
        epochs: how many epochs were trained, if ``train`` yields after each.
        parameters, operations, milliseconds: of the network that ``smaller`` returned (else of
            the network itself): its number of parameters, floating-point operations of a forward
            pass (a multiplication and an addition are two), and median time of one; None without
            ``example_inputs``.
    """

    strength: float
    metrics: dict[str, float]
    standard_error: float | None = None
    zeros: float = 0.0
    used: list[bool] = field(default_factory=list, repr=False)
    epochs: int | None = None
    parameters: int | None = None
    operations: int | None = None
    milliseconds: float | None = None

    @property
    def value(self) -> float:
        """The metric that is chosen by."""
        return next(iter(self.metrics.values()))
