"""Real calls of every operation, compared with torch in float64: `fusereg info` and `verify`.

The operations are the rows that each technique declares in its file check.py (see
core/inventory.py). Every such file is found by itself.
"""

from ...core.inventory import TOLERANCES, Inputs, Operation, Pairs
from ._judge import CheckResult, run_check, worst
from ._places import Place, places, run_checks
from ._rows import OPERATIONS, TECHNIQUES

__all__ = [
    "OPERATIONS",
    "TECHNIQUES",
    "TOLERANCES",
    "CheckResult",
    "Inputs",
    "Operation",
    "Pairs",
    "Place",
    "places",
    "run_check",
    "run_checks",
    "worst",
]
