"""Types that a suite provides (cases, workloads, providers) and that measuring it gives (rows)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fusereg.cli.errors import RENAMED

from .timers import Call

COPY = "copy"
EAGER = "eager"
#: The providers that are fusereg's, the one that ratios are about first.
OWN = ("fusereg", "WeightPenalty")

# --- what a suite provides ------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The user's choices, which a suite turns into cases."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    quick: bool = False


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        name: Its name in the tables, one of :func:`fusereg.bench.provider_names`.
        make: Prepares it and returns the call that is timed. What it raises becomes the reason in
            this provider's row.
        compiles: Whether preparing and the first call include a compilation: their time is then
            reported as the time to compile, under the time limit.
        note: Shown under the table, for example how the provider is written.
    """

    name: str
    make: Callable[[], Call]
    compiles: bool = False
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """Distance of a result from a reference: ``error`` is relative, 0 is exact."""

    error: float
    tolerance: float
    what: str = "result"


def largest(values: Iterable[Any]) -> float:
    """Return the largest of these numbers or 0-d tensors; NaN, which max() may pass over, if any.

    0 without numbers.
    """
    found = [float(value) for value in values]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


@dataclass(frozen=True)
class Facts:
    """Measurements of a provider that trains a network, beside its time.

    Attributes:
        peak_bytes: The most memory that torch held at once, from an empty start.
        test_accuracy: Share of test images that the trained network classifies correctly.
    """

    peak_bytes: int | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True)
class Workload:
    """A case's data, made when its turn comes and dropped before the next case.

    Attributes:
        providers: The ways to do the work, all on the same data.
        check: Makes one call and compares what it did with a reference, or None.
        facts: Measures what is not a time, given a provider's call; after all times are taken.
    """

    providers: Sequence[Provider]
    check: Callable[[Call], Accuracy] | None = None
    facts: Callable[[Call], Facts] | None = None


@dataclass(frozen=True)
class Case:
    """One operation, mode, shape and dtype.

    Attributes:
        op, mode, shape: Names for the table.
        dtype: Data type of the elements.
        device: Device of the data.
        tensors, elements: Numbers of both.
        bytes_moved: By contract, in all; 0 where bandwidth means nothing (host overhead).
        memory: A bound on the bytes that are alive at once; the case is skipped where less is free.
        setup: Makes the workload.
        host: Whether the host's time per tensor is what counts.
        suite: The technique; ``collect_cases`` fills it in.
    """

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    tensors: int
    elements: int
    bytes_moved: int
    memory: int
    setup: Callable[[], Workload]
    host: bool = False
    suite: str = ""

    @property
    def dtype_name(self) -> str:
        """Return the dtype's name without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """Return what ``--only`` is matched to: ``penalty/elastic-net/value/gpt2/float32``."""
        return case_id(self.suite, self.op, self.mode, self.shape, self.dtype_name)


def case_id(*parts: str) -> str:
    """Return the name of a case: its technique, op, mode, shape and dtype."""
    return "/".join(part.replace(" ", "-").lower() for part in parts if part)


@dataclass(frozen=True)
class Settings:
    """Settings of how long and how often a case is sampled.

    Attributes:
        min_time_s: Sampling goes on until this much time per provider has passed, if ...
        min_rounds: ... at least so many rounds are done, but ...
        max_rounds: ... never more than so many.
        min_sample_s: A sample lasts at least this long: 1 ms is 10,000 times what reading the clock
            costs (some 50 ns), and 1,000 times a CUDA event's resolution.
        max_case_s: After this much sampling a case ends with the rounds it has, at least 3.
        prime_below_s: On the CPU, calls shorter than this get an untimed call before each sample.
        compile_limit_s: Time limit for a provider that compiles.
    """

    min_time_s: float = 0.5
    min_rounds: int = 11
    max_rounds: int = 201
    min_sample_s: float = 1e-3
    max_case_s: float = 60.0
    prime_below_s: float = 0.05
    compile_limit_s: float = 120.0


# --- results --------------------------------------------------------------------------------------


@dataclass
class Row:
    """One provider of one case. Times are in microseconds a call; None is "not measured"."""

    suite: str
    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    device: str
    tensors: int
    elements: int
    bytes: int
    host: bool = False
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    vs_eager: float | None = None
    us_per_tensor: float | None = None
    compile_s: float | None = None
    relative_error: float | None = None
    peak_bytes: int | None = None
    test_accuracy: float | None = None
    rounds: int = 0
    repeats: int = 0
    note: str = ""
    failed: str = ""
    samples_us: list[float | None] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Return whether this is a whole training step, for which bandwidth means nothing."""
        return self.bytes == 0 and not self.host

    @property
    def case(self) -> tuple[str, str, str, str, str, str]:
        """Return what rows of the same case have in common."""
        return (self.suite, self.op, self.mode, self.shape, self.dtype, self.device)

    @property
    def name(self) -> str:
        """Return the case's name for people."""
        return f"{self.op}, {self.mode}, {self.shape}, {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Return the row of a JSON object; keys of later versions are ignored.

        Raises:
            TypeError, ValueError: A key is missing, or has no value of its kind.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a row must be an object, got {type(data).__name__}")
        values = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        for key, value in values.items():
            kind = str(cls.__dataclass_fields__[key].type)
            listed = kind.startswith("list")
            each = value if listed and isinstance(value, list) else [value]
            if listed is not isinstance(value, list) or not all(
                _is_of_kind(v, kind, positive=key.endswith("_us")) for v in each
            ):
                raise ValueError(f"{key} must be {kind}, got {value!r:.50}")
        row = cls(**values)
        row.suite = RENAMED.get(row.suite, row.suite)
        return row


def _is_of_kind(value: object, kind: str, positive: bool) -> bool:
    """Return whether a value has the type that a field's annotation names, and is finite."""
    if value is None:
        return "None" in kind
    if "float" in kind or "int" in kind:
        number = isinstance(value, (int, float) if "float" in kind else int)
        if not number or isinstance(value, bool):
            return False
        size = float(value)  # type: ignore[arg-type]
        return math.isfinite(size) and (size > 0 or not positive)
    return isinstance(value, bool if kind == "bool" else str)


def cases_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows by case, in order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return list(groups.values())


def own_row(case: Sequence[Row]) -> Row | None:
    """Return fusereg's row of a case."""
    return next((row for name in OWN for row in case if row.provider == name), None)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile (0 <= q <= 1), linear between the two nearest sorted values."""
    if not values:
        raise ValueError("quantile: no values")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile: q must be within [0, 1], got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> float | None:
    """Return the median of numerator / denominator over the rounds that measured both."""
    ratios = [
        a / b
        for a, b in zip(numerator, denominator, strict=False)
        if a is not None and b is not None and b > 0
    ]
    return quantile(ratios, 0.5) if ratios else None
