"""The rules by which targets move with the images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arguments import Interpolation, integer, interpolation_name, is_sequence, number, within

#: Keys whose values have a row for each box, and are filtered with the boxes.
ROWS = (
    *("labels", "class_labels", "category_ids", "track_ids", "masks", "keypoints", "visibility"),
    *("area", "iscrowd", "difficult", "scores"),
)


@dataclass(frozen=True)
class Rules:
    """The rules by which targets move.

    Args:
        mask_fill: the label outside the image, such as 255. Default: what a transform of
            torchvision has as the fill of masks, else 0. Masks beside boxes (one for each) and
            boolean masks are filled with 0.
        mask_interpolation: of floating masks; masks of integers take the nearest pixel.
        image_interpolation: of a second image, such as depth; default: that of the images.
        keypoint_pairs: pairs of indices, such as left and right eye, that change places where an
            image is mirrored.
        min_area: boxes with a smaller area (in pixels, cut to the image) are left out, with their
            rows.
        min_visibility: boxes of which a smaller share is left, likewise.
        rows: the keys beside boxes whose values have a row for each box. Where boxes are left out,
            others that have as many rows are an error, unless ``passthrough`` names them.
        labels: the keys whose values MixUp and CutMix mix. Default: those that say so, such as
            "label", "labels_a", "class", "category_id", "target" and "y"; "image_id", "index",
            "name" and the like stay, and any other tensor is refused.
        passthrough: True to leave what is not understood as it is, or the keys to leave alone.
    """

    mask_fill: float | None = None
    mask_interpolation: Interpolation = "nearest"
    image_interpolation: Interpolation | None = None
    keypoint_pairs: Sequence[tuple[int, int]] = ()
    min_area: float = 0.0
    min_visibility: float = 0.0
    rows: Sequence[str] = ROWS
    labels: Sequence[str] | None = None
    passthrough: bool | Sequence[str] = False

    def check(self, op: str) -> Rules:
        """Check the arguments, and return them with names for interpolations."""
        if self.mask_fill is not None:
            number(self.mask_fill, op, "mask_fill")
        names = {
            "mask_interpolation": interpolation_name(
                self.mask_interpolation, op, "mask_interpolation"
            )
        }
        if self.image_interpolation is not None:
            names["image_interpolation"] = interpolation_name(
                self.image_interpolation, op, "image_interpolation"
            )
        for pair in self.keypoint_pairs:
            if not is_sequence(pair) or len(pair) != 2:
                raise ValueError(f"fusereg.{op}: keypoint_pairs must be pairs, got {pair!r}")
            for i in pair:
                integer(i, op, "keypoint_pairs", least=0)
        within(self.min_area, op, "min_area", 0, math.inf)
        within(self.min_visibility, op, "min_visibility", 0, 1)
        for name in ("rows", "labels", "passthrough"):
            keys = getattr(self, name)
            if (name, keys) in (("labels", None), ("passthrough", True), ("passthrough", False)):
                continue
            if not is_sequence(keys) or not all(isinstance(k, str) for k in keys):
                raise TypeError(f"fusereg.{op}: {name} must be a sequence of keys, got {keys!r}")
        return replace(self, **names)  # type: ignore[arg-type]


#: What ``rules`` of transforms take by name.
RULES = tuple(f.name for f in dataclasses.fields(Rules))


def rules_of(op: str, options: Mapping[str, Any]) -> Rules:
    """Return the rules that arguments of a transform name."""
    return Rules(**options).check(op)
