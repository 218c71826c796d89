"""The meaning of angles, scales and fills in each library.

=============  ===================  ==================  =============  ======================
``compat=``    rotation             affine's rotation   scale above 1  outside, interpolation
=============  ===================  ==================  =============  ======================
"fusereg"      counter-clockwise    counter-clockwise   zooms in       constant, bilinear
"torchvision"  counter-clockwise    clockwise           zooms in       constant, nearest
"kornia"       counter-clockwise    clockwise           zooms in       constant, bilinear
"keras"        counter-clockwise    counter-clockwise   zooms out      symmetric, bilinear
=============  ===================  ==================  =============  ======================

Each also accepts its library's names of fill modes: torchvision's "edge" is "border"; kornia's
"zeros" is "constant", its "reflection" is "reflect"; Keras's "reflect" is "symmetric" (the edge
pixel is repeated), its "nearest" is "border". torchvision's RandomAffine translates by whole
pixels, and its centers are counted from the image's corner, half a pixel from fusereg's.

Two details are not reproduced. torchvision applies a constant fill twice where bilinear weights are
partly outside (a constant image of 200 filled with 200 shows 150 there); fusereg applies it once.
kornia with ``align_corners=False`` works on a grid that is not that of the pixels; fusereg matches
its ``align_corners=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .arguments import FILL_MODES, one_of


@dataclass(frozen=True)
class Convention:
    """The convention of one library."""

    rotation_sign: float = 1.0
    affine_sign: float = 1.0
    zooms_out: bool = False
    whole_pixels: bool = False
    corner_origin: bool = False
    interpolation: str = "bilinear"
    fill_mode: str = "constant"
    fill_names: Mapping[str, str] = field(default_factory=dict)

    def mode(self, name: object, op: str, argument: str = "fill_mode") -> str:
        """Return fusereg's name of a fill mode."""
        if isinstance(name, str) and name in self.fill_names:
            return self.fill_names[name]
        return one_of(name, op, argument, [*FILL_MODES, *self.fill_names])


CONVENTIONS: Mapping[str, Convention] = {
    "fusereg": Convention(),
    "torchvision": Convention(
        affine_sign=-1.0,
        whole_pixels=True,
        corner_origin=True,
        interpolation="nearest",
        fill_names={"edge": "border"},
    ),
    "kornia": Convention(
        affine_sign=-1.0,
        fill_names={"zeros": "constant", "reflection": "reflect", "fill": "constant"},
    ),
    "keras": Convention(
        zooms_out=True,
        fill_mode="symmetric",
        fill_names={"reflect": "symmetric", "nearest": "border"},
    ),
}


def convention(name: object, op: str) -> Convention:
    """Return the convention of this name."""
    return CONVENTIONS[one_of(name, op, "compat", list(CONVENTIONS))]
