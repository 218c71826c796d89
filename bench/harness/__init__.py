"""The machinery of the benchmarks: timing, tables, plots, the report, the command."""

from .cases import (
    COPY,
    EAGER,
    OWN,
    Accuracy,
    Case,
    Facts,
    Options,
    Provider,
    Row,
    Settings,
    Workload,
    largest,
)
from .running import Interrupted, run_case, run_cases
from .timers import Call

__all__ = [
    "COPY",
    "EAGER",
    "OWN",
    "Accuracy",
    "Call",
    "Case",
    "Facts",
    "Interrupted",
    "Options",
    "Provider",
    "Row",
    "Settings",
    "Workload",
    "largest",
    "run_case",
    "run_cases",
]
