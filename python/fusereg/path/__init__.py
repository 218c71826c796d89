"""Regularization paths: one network trained over a range of strengths, and the choice of one.

``run`` trains along the path, ``budget`` finds where the strengths lie, ``measure`` what a network
costs, ``result`` holds the points with their tables and ``picture`` draws them.
"""

from .budget import shrink_budget
from .point import PathPoint
from .result import RegularizationPath
from .run import path

__all__ = ["PathPoint", "RegularizationPath", "path", "shrink_budget"]
