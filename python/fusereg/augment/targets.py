"""Targets that move with the images: one walk over any nesting of them.

Masks, boxes, points, further images and videos are torchvision's tv_tensors; torchvision is never
imported. Plain tensors are labels. What is neither, and would have to move, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import memory
from .arguments import Interpolation
from .labels import MixedLabels, is_named_as_label, is_no_place, mix_labels, names_places
from .params import AugmentParams
from .render import Settings
from .rules import ROWS, Rules
from .tree import (
    Columns,
    Node,
    are_probabilities,
    are_rows_of_numbers,
    area,
    batch_tree,
    cut_corners,
    hides_tensors,
    hulls_of,
    items_of,
    kind_of,
    odd_form,
    one_each,
    plain,
    stack,
    values_of,
    wrap,
)


class Leaf:
    """A value in the targets.

    Attributes:
        path: where it is, for errors.
        key: the nearest name above it.
        group: the place of the mapping, tuple or record that it is in, and the sample.
        value: what is there now.
        sample: the index of its sample, or None for the whole batch.
        mixable: a label that is mixed with its image.
        placed: it is, by a name above it, a place in the image.
    """

    def __init__(
        self,
        path: str,
        key: str,
        group: object,
        value: Any,
        sample: int | None,
        mixable: bool,
        placed: bool,
    ) -> None:
        self.path, self.key, self.group, self.value = path, key, group, value
        self.sample, self.mixable = sample, mixable
        self.placed = placed and not is_no_place(key.lower())

    @property
    def kind(self) -> str:
        """Return "Mask", "BoundingBoxes", "KeyPoints", "Image", "Video", "Tensor" or ""."""
        return kind_of(self.value)


class Targets:
    """The targets of a batch of n images, or of one sample (``single``).

    A mapping, a record (named tuple or dataclass) and a tuple of unlike things hold values of the
    whole batch; a list or tuple of n like things has one for each sample.
    """

    def __init__(
        self, tree: Any, n: int, size: tuple[int, int], rules: Rules, op: str, mixed: bool
    ) -> None:
        self.n, self.size, self.rules, self.op, self.mixed = n, size, rules, op, mixed
        self.leaves: list[Leaf] = []
        self._rows: list[tuple[str, str]] = []  # lists of lists of numbers
        self._tree = self._walk(tree, "targets", "", (), None, True)
        for leaf in self.leaves:
            self._check(leaf)

    def _walk(
        self,
        tree: Any,
        path: str,
        key: str,
        group: object,
        sample: int | None,
        mixable: bool,
        placed: bool = False,
    ) -> Any:
        if isinstance(tree, Columns):
            own = (path, id(tree))
            parts = [
                self._walk(v, f"{path}[{i}]", "", own, None, i == 0)
                for i, v in enumerate(tree.values)
            ]
            return Node(tree, dict(enumerate(parts)))
        items = items_of(tree)
        if items is None or isinstance(tree, MixedLabels):
            leaf = Leaf(path, key, (group, sample), tree, sample, mixable, placed)
            self.leaves.append(leaf)
            return leaf
        indexed = isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields")
        each = indexed and sample is None and one_each(tree, self.n)
        if each:
            each = self._is_each(tree, path)
        of_batch = mixable and indexed and sample is None
        if self.mixed and of_batch and items and all(isinstance(v, (int, float)) for v in tree):
            raise TypeError(
                f"fusereg.{self.op}: {path} must be a tensor, got {type(tree).__name__}"
            )
        if indexed and not each and are_rows_of_numbers(tree):
            self._rows.append((path, key))
        made = {}
        # A list keeps the name and the group of what it is in; other containers have their own.
        inner_group = group if indexed and (each or isinstance(tree, list)) else (path, id(tree))
        for name, value in items.items():
            where = (
                f"{path}[{name!r}]" if indexed or isinstance(tree, Mapping) else f"{path}.{name}"
            )
            made[name] = self._walk(
                value,
                where,
                key if indexed else str(name),
                inner_group,
                name if each else sample,
                mixable,
                placed or (not indexed and names_places(str(name).lower())),
            )
        return Node(tree, made, each)

    def _is_each(self, tree: Any, path: str) -> bool:
        """Return whether n like things are of one sample each, and not all of the batch."""
        kinds = {kind_of(v) for v in tree}
        if kinds == {"Tensor"} and self.mixed:
            return False  # only labels of the batch can be mixed
        rows = kinds in ({"Mask"}, {"KeyPoints"})
        alike = rows and all(v.dim() == 3 and len(v) == self.n for v in tree)
        if isinstance(tree, tuple) and self.n > 1 and alike:
            raise ValueError(
                f"fusereg.{self.op}: {path} may be {self.n} values of the whole batch or one for "
                f"each of {self.n} samples, with {self.n} rows; give names to the former in a "
                "mapping, or the latter in a list"
            )
        return True

    def _left_alone(self, leaf: Leaf) -> bool:
        keys = self.rules.passthrough
        return not isinstance(keys, bool) and leaf.key in keys

    def _check(self, leaf: Leaf) -> None:
        """Check the shape of what moves."""
        kind, value = leaf.kind, leaf.value
        if kind in ("", "Tensor", "TVTensor") or self._left_alone(leaf):
            return
        if kind in ("BoundingBoxes", "KeyPoints") and tuple(value.canvas_size) != self.size:
            raise ValueError(
                f"fusereg.{self.op}: {leaf.path}, {kind}, must have the canvas_size {self.size} of "
                f"the images, got {tuple(value.canvas_size)}"
            )
        if kind == "BoundingBoxes":
            if leaf.sample is None and self.n != 1:
                raise ValueError(
                    f"fusereg.{self.op}: {leaf.path} must be one tv_tensors.BoundingBoxes for each "
                    f"of the {self.n} samples, got 1"
                )
            leaf.sample = leaf.sample or 0
            name = str(value.format.value)
            if name in ("XYWHR", "CXCYWHR"):
                raise ValueError(
                    f"fusereg.{self.op}: {leaf.path} must be boxes in one of XYXY, XYWH, CXCYWH "
                    f"and XYXYXYXY, got {name}: a rotated box is no rectangle after a shear; give "
                    "its corners, by convert_bounding_box_format"
                )
        elif kind == "KeyPoints":
            if leaf.sample is None and (value.dim() < 3 or value.shape[0] != self.n):
                if self.n != 1:
                    raise ValueError(
                        f"fusereg.{self.op}: {leaf.path} must be KeyPoints ({self.n}, ..., 2) or "
                        f"one for each of the {self.n} samples, got shape {tuple(value.shape)}"
                    )
                leaf.sample = 0
        else:
            self._check_planes(leaf)

    def _check_planes(self, leaf: Leaf) -> None:
        kind, shape = leaf.kind, tuple(leaf.value.shape)
        most = {"Mask": 3, "Image": 3, "Video": 4}[kind]
        least = 2 if kind == "Mask" else most
        batched = leaf.sample is None
        first = () if not batched else (self.n,)
        good = least <= len(shape) - batched <= most and shape[: len(first)] == first
        if not good or shape[-2:] != self.size:
            names = {"Mask": "[K,] H, W", "Image": "C, H, W", "Video": "T, C, H, W"}[kind]
            one = "" if not batched else f"{self.n}, "
            names = names.replace("H, W", f"{self.size[0]}, {self.size[1]}")
            remedy = ""
            if batched and least <= len(shape) <= most and shape[-2:] == self.size:
                remedy = "; for one image alone give a list of one, for several one for each"
            raise ValueError(
                f"fusereg.{self.op}: {leaf.path}, a {kind}, must have shape ({one}{names}) as the "
                f"images, got {shape}{remedy}"
            )

    # --- what is not understood ---

    def any_types(self) -> bool:
        """Return whether there is anything of torchvision's types."""
        return any(leaf.kind not in ("", "Tensor") for leaf in self.leaves)

    def check_all_move(self, who: str, params: AugmentParams | None = None) -> None:
        """Raise an error that names what would have to move with the images, and cannot.

        ``params`` may turn out to move nothing.
        """
        if self.rules.passthrough is True:
            return
        reasons = [(x.path, "" if self._left_alone(x) else self._place(x)) for x in self.leaves]
        kept = self.rules.passthrough or ()
        reasons += [
            (path, "is a list of lists of numbers")
            for path, key in self._rows
            if not (key in kept or is_no_place(key.lower()))
        ]
        for path, reason in reasons:
            if reason and (params is None or params.moves):
                raise ValueError(
                    f"fusereg.{self.op}: {path} {reason}, and {who} moves the images. Give a "
                    "torchvision tv_tensor (Mask, BoundingBoxes, KeyPoints, Image), which moves "
                    "with them, or name the key in passthrough= if it must stay as it is"
                )

    def _place(self, leaf: Leaf) -> str:
        """Return why a value may be a place in the image, or an empty string if it is none."""
        value = leaf.value
        if value is None or isinstance(value, (str, bytes, MixedLabels)):
            return ""
        kind = leaf.kind
        if form := odd_form(value):
            return f"is a {form} tensor, which fusereg does not read"
        if kind not in ("", "Tensor"):
            return "is a tv_tensor that fusereg does not know" if kind == "TVTensor" else ""
        named = leaf.placed
        shape = getattr(value, "shape", None)
        if shape is None:
            if isinstance(value, (int, float)):
                return "is a number of a place, by its key" if named else ""
            if type(value).__module__.partition(".")[0] == "PIL":
                return "is an image of PIL"
            if hides_tensors(value):
                return f"is a {type(value).__name__}, which fusereg does not go through"
            return ""
        if named:
            return "is a plain tensor or array of places, by its key"
        rest = tuple(shape) if self._is_of_one(leaf, shape) else tuple(shape[1:])
        if len(rest) > 1:
            return f"is a plain tensor or array of shape {tuple(shape)}"
        if len(rest) == 1 and rest[0] > 1 and not are_probabilities(value, rest[0]):
            return f"is a plain tensor or array of shape {tuple(shape)}, and no probabilities"
        return ""

    def _is_of_one(self, leaf: Leaf, shape: Sequence[int]) -> bool:
        """Return whether a value is of one image as a whole, and has no rows of samples or boxes.

        Vectors of numbers beside boxes, or of labels by their key, are taken for rows.
        """
        if leaf.sample is None:
            return False
        beside = [
            x.value
            for x in self.leaves
            if x.group == leaf.group and x.kind in ("BoundingBoxes", "KeyPoints", "Mask")
        ]
        if len(shape) < 2:
            named = leaf.key in self.rules.rows or is_named_as_label(leaf.key) is not None
            return not (beside or named)
        return shape[0] not in {len(v) for v in beside if v.dim() > 2 or kind_of(v) != "Mask"}

    # --- a pass ---

    def move(self, params: AugmentParams, settings: Settings, moves: bool = True) -> None:
        """Move the targets as the images of a pass that fusereg computes, which may move pixels."""
        if moves:
            self.check_all_move("the augmentation", params)
        if settings.mixed:
            for leaf in self.leaves:
                self._mix(leaf, params, settings)
        if not moves or not self.any_types():
            self.size = params.size
            return
        alone = params.without_mix()
        by_kind: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            if not self._left_alone(leaf):
                by_kind.setdefault(leaf.kind, []).append(leaf)
        if not settings.mixed:  # or else they have been moved as well
            self._move_planes(by_kind.get("Mask", []), alone, self._mask_sampling(settings), True)
        interpolation = self.rules.image_interpolation or settings.interpolation
        antialias = settings.antialias and interpolation != "nearest"
        sampling = (interpolation, antialias, settings.fill_mode_of_targets, 0.0)
        for kind in ("Image", "Video"):
            self._move_planes(by_kind.get(kind, []), alone, lambda _: sampling, False)
        self._move_boxes(by_kind.get("BoundingBoxes", []), alone)
        self._move_points(by_kind.get("KeyPoints", []), alone)
        self.size = params.size

    def _mask_sampling(
        self, settings: Settings
    ) -> Callable[[Leaf], tuple[Interpolation, bool, str, float]]:
        fill = (
            self.rules.mask_fill if self.rules.mask_fill is not None else settings.mask_fill or 0.0
        )
        with_boxes = {leaf.group for leaf in self.leaves if leaf.kind == "BoundingBoxes"}

        def sampling(leaf: Leaf) -> tuple[Interpolation, bool, str, float]:
            value = leaf.value
            instances = leaf.group in with_boxes or value.dtype is torch.bool
            floating = value.is_floating_point()
            mode = self.rules.mask_interpolation if floating else "nearest"
            # The fill of floating images, which torchvision makes an integer.
            lost = self.rules.mask_fill is None and not floating and abs(fill) < 1
            return mode, False, settings.fill_mode_of_targets, 0.0 if instances or lost else fill

        return sampling

    def _mix(self, leaf: Leaf, params: AugmentParams, settings: Settings) -> None:
        """Mix a label or the masks of the batch; refuse what cannot be mixed."""
        value, kind, op = leaf.value, leaf.kind, self.op
        if value is None or self._left_alone(leaf):
            return
        is_text = isinstance(value, (str, bytes))
        if leaf.mixable and (is_text or (leaf.sample is None and isinstance(value, (int, float)))):
            self._refuse_plain_label(leaf)
        if is_text:
            return
        moves = kind not in ("", "Tensor")
        is_number = isinstance(value, (int, float))
        if kind == "Mask" and leaf.sample is None:
            leaf.value = self._mix_mask(leaf, params, settings)
        elif leaf.sample is not None and (moves or (leaf.mixable and (kind or is_number))):
            raise ValueError(
                f"fusereg.{op}: targets of single samples cannot be mixed; leave mix out, or pass "
                f"labels of the whole batch (at {leaf.path})"
            )
        elif moves:
            raise ValueError(
                f"fusereg.{op}: {leaf.path}, {kind}, cannot be mixed as images are; leave mix out"
            )
        elif leaf.mixable and not is_number and self._is_label(leaf):
            leaf.value = mix_labels(
                value, params, settings.num_classes, op, settings.label_smoothing
            )

    def _refuse_plain_label(self, leaf: Leaf) -> None:
        """Raise an error for text or a number that is a label: it cannot be mixed."""
        key, labels, tensors = leaf.key, self.rules.labels, [x for x in self.leaves if x.mixable]
        alone = self.rules.passthrough is not True and not any(
            x.kind or isinstance(x.value, MixedLabels) for x in tensors
        )
        named = key in labels if labels is not None else is_named_as_label(key) if key else alone
        if named:
            raise TypeError(
                f"fusereg.{self.op}: labels must be a tensor to be mixed with their images, got "
                f"{type(leaf.value).__name__} at {leaf.path}; name the key in passthrough= if it "
                "must stay as it is"
            )

    def _is_label(self, leaf: Leaf) -> bool:
        """Return whether a value is a label, by its key; raise an error where that says neither."""
        key, rules = leaf.key, self.rules
        if rules.labels is not None:
            return key in rules.labels
        named = is_named_as_label(key)
        if named is not None:
            return named
        if rules.passthrough is True and not leaf.kind:
            return False
        if not key and not any(
            other is not leaf and other.mixable and other.kind == "Tensor" and not other.key
            for other in self.leaves
        ):
            return True
        raise ValueError(
            f"fusereg.{self.op}: {leaf.path} may be a label, which is mixed as its image, or "
            "anything else. Name the keys of labels in labels=, or this key in passthrough= if it "
            "must stay as it is"
            + ("" if key else "; a mapping gives keys to the values of a tuple")
        )

    def _mix_mask(self, leaf: Leaf, params: AugmentParams, settings: Settings) -> Any:
        """Paste CutMix's boxes; MixUp mixes probabilities, which one-hot masks are as well."""
        mask = plain(leaf.value)
        paired = params.records[:, 14] >= 0
        blended = bool((paired & (params.records[:, 15] != 0)).any())
        mode, antialias, fill_mode, fill = self._mask_sampling(settings)(leaf)
        if not blended:
            moved = params.mask(mask, fill=fill, fill_mode=fill_mode, interpolation=mode)
            return wrap(moved, leaf.value)
        if mask.dim() != 4 or (mask.shape[1] < 2 and not mask.is_floating_point()):
            raise ValueError(
                f"fusereg.{self.op}: {leaf.path} must be one-hot or probabilities "
                f"({self.n}, K, H, W) to be mixed by MixUp, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        soft = mask if mask.is_floating_point() else mask.float()
        sampling = (mode, antialias, fill_mode, fill)
        return wrap(params.planes(soft, self.op, sampling, True), leaf.value)

    def _move_planes(
        self,
        leaves: list[Leaf],
        alone: AugmentParams,
        sampling: Callable[[Leaf], tuple[Interpolation, bool, str, float]],
        masks: bool,
    ) -> None:
        """Warp masks, images and videos: all alike in one call."""
        alike: dict[tuple[Any, torch.dtype, torch.device, int], list[Leaf]] = {}
        for leaf in leaves:
            value = leaf.value
            channels = 1 if masks else value.shape[-3]
            alike.setdefault((sampling(leaf), value.dtype, value.device, channels), []).append(leaf)
        for (how, dtype, _, channels), group in alike.items():
            stacks, rows = [], []
            for leaf in group:
                flat = plain(leaf.value)
                samples = range(self.n) if leaf.sample is None else [leaf.sample]
                shape = (channels, *flat.shape[-2:])
                stacks.append(
                    flat.reshape(-1, *shape) if flat.numel() else flat.new_empty(0, *shape)
                )
                each = len(stacks[-1]) // max(1, len(samples))
                ids = torch.tensor(samples, dtype=torch.int64, device="cpu")
                rows.append(ids.repeat_interleave(each))
            x = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
            if not masks and not dtype.is_floating_point and dtype is not torch.uint8:
                x = x.double()
            y = alone[torch.cat(rows)].planes(x, self.op, how)
            y = (y if dtype.is_floating_point or masks else y.round()).to(dtype)
            for leaf, part in zip(group, y.split([len(s) for s in stacks]), strict=True):
                leaf.value = wrap(part.reshape(*leaf.value.shape[:-2], *alone.size), leaf.value)

    def _move_boxes(self, leaves: list[Leaf], alone: AugmentParams) -> None:
        """Move boxes to boxes around them, cut unless clamping_mode is None; or their corners."""
        alike: dict[tuple[str, bool, torch.dtype, torch.device], list[Leaf]] = {}
        for leaf in leaves:
            # Older torchvisions have no clamping_mode, and always cut.
            clip = getattr(leaf.value, "clamping_mode", "soft") is not None
            kind = (str(leaf.value.format.value), clip, leaf.value.dtype, leaf.value.device)
            alike.setdefault(kind, []).append(leaf)
        for (name, clip, *_), group in alike.items():
            counts = [len(leaf.value) for leaf in group]
            rows = torch.tensor([leaf.sample for leaf in group], device="cpu").repeat_interleave(
                torch.tensor(counts, device="cpu")
            )
            b = torch.cat([plain(leaf.value) for leaf in group])
            own = alone[rows]
            if name == "XYXYXYXY":
                places: Any = own.keypoints(b.reshape(-1, 4, 2) - 0.5)
                moved = places + 0.5
                mirrored = memory.to_device(own.mirrored, b.device, self.op)
                turned = moved.unflatten(1, (2, 2)).flip(2).flatten(1, 2)  # clockwise still
                moved = torch.where(mirrored[:, None, None], turned, moved).flatten(1)
            else:
                form = name.lower()
                moved = own.boxes(b[:, None], format=form, clip=clip)[:, 0]  # type: ignore[call-overload]
            if self.rules.min_visibility:
                hull = hulls_of(b, name)[:, None]
                cut, full = (own.boxes(hull, clip=c)[:, 0] for c in (True, False))  # type: ignore[call-overload]
                left = area(cut) / area(full).clamp(min=1e-12)
            at = 0
            for leaf, count in zip(group, counts, strict=True):
                part, before = moved[at : at + count], leaf.value
                leaf.value = wrap(part, before, canvas_size=alone.size)
                if self.rules.min_visibility:
                    kept = getattr(before, "fusereg_visible", torch.ones((), device=b.device))
                    now = left[at : at + count]
                    # What is left of a box that is not cut is of the whole box already.
                    leaf.value.fusereg_visible = kept * now if clip else now.minimum(kept)
                at += count

    def _move_points(self, leaves: list[Leaf], alone: AugmentParams) -> None:
        """Move points; those of a pair change places in a mirrored image."""
        mirrored = alone.mirrored
        for leaf in leaves:
            value = plain(leaf.value)
            flat = value[None] if leaf.sample is not None else value
            own = alone if leaf.sample is None else alone[[leaf.sample]]
            flipped = mirrored if leaf.sample is None else mirrored[leaf.sample, None]
            moved = own.keypoints(flat.reshape(len(flat), flat[:1].numel() // 2, 2))
            assert isinstance(moved, Tensor)
            seen = own.inside(moved).reshape(flat.shape[:-1])
            moved = moved.reshape(flat.shape)
            if self.rules.keypoint_pairs and flat.dim() > 4:
                raise ValueError(
                    f"fusereg.{self.op}: keypoint_pairs are of points (K, 2) or (I, K, 2), and "
                    f"{leaf.path} has shape {tuple(leaf.value.shape)}"
                )
            order = self._order(leaf, flat.shape[-2])
            moved = self._swapped(moved, flipped, order, -2)
            leaf.value = wrap(
                moved[0] if leaf.sample is not None else moved,
                leaf.value,
                canvas_size=alone.size,
            )
            for other in self.leaves:
                if other.group == leaf.group and "visib" in other.key and other.kind == "Tensor":
                    self._move_visibility(other, leaf, seen, flipped, order)

    def _order(self, leaf: Leaf, points: int) -> list[int]:
        order = list(range(points))
        for a, b in self.rules.keypoint_pairs:
            if max(a, b) >= points:
                raise ValueError(
                    f"fusereg.{self.op}: keypoint_pairs must be below the {points} points of "
                    f"{leaf.path}, got ({a}, {b})"
                )
            order[a], order[b] = order[b], order[a]
        return order

    def _swapped(self, x: Tensor, flipped: Tensor, order: list[int], dim: int) -> Tensor:
        if order == sorted(order):
            return x
        places = memory.to_device(torch.tensor(order, device="cpu"), x.device, self.op)
        flipped = memory.to_device(flipped, x.device, self.op)
        return torch.where(
            flipped.reshape(-1, *[1] * (x.dim() - 1)), x.index_select(dim, places), x
        )

    def _move_visibility(
        self, leaf: Leaf, points: Leaf, seen: Tensor, flipped: Tensor, order: list[int]
    ) -> None:
        wanted = points.value.shape[:-1]
        if leaf.value.shape != wanted:
            raise ValueError(
                f"fusereg.{self.op}: {leaf.path} must have shape {tuple(wanted)} as the points, "
                f"got {tuple(leaf.value.shape)}"
            )
        value = leaf.value if points.sample is None else leaf.value[None]
        inside = self._swapped(seen, flipped, order, -1)
        value = self._swapped(value, flipped, order, -1)
        value = value * inside.to(value.device, value.dtype)
        leaf.value = value if points.sample is None else value[0]

    # --- one sample after the other ---

    def split(self, plainly: bool) -> list[Any]:
        """Return the targets of each sample; ``plainly``: in containers that torchvision knows."""
        return [self._of(self._tree, i, plainly) for i in range(self.n)]

    def whole(self) -> Any:
        """Return the targets as they are now."""
        return self._of(self._tree, None)

    def _has_rows(self, leaf: Leaf) -> bool:
        """Return whether a value is a tensor with a row for each sample."""
        value = leaf.value
        tensor = leaf.sample is None and isinstance(value, Tensor) and not odd_form(value)
        return tensor and value.dim() > 0 and len(value) == self.n

    def _of(self, node: Any, sample: int | None, plainly: bool = False) -> Any:
        """Return the values of a sample, or of all."""
        if isinstance(node, Leaf):
            value = node.value
            rows = sample is not None and self._has_rows(node)
            return wrap(plain(value)[sample], value) if rows else value
        if node.each and sample is not None:
            return self._of(node.items[sample], None, plainly)
        return node.build([self._of(v, sample, plainly) for v in node.items.values()], plainly)

    def joined(self, trees: list[Any], size: tuple[int, int]) -> Targets:
        """Return the targets of the batch from those of each sample, as split gives them."""
        tree = self._join(self._tree, trees)
        return Targets(tree, self.n, size, self.rules, self.op, self.mixed)

    def of_one(self, tree: Any, size: tuple[int, int]) -> Targets:
        """Return the targets of one sample as those of a batch of one: a list of one tree."""
        return Targets([tree], 1, size, self.rules, self.op, False)

    def _join(self, node: Any, results: list[Any]) -> Any:
        """Return the results of each sample in the containers that the targets came in."""
        if isinstance(node, Leaf):
            if self._left_alone(node):
                return node.value
            return stack(results) if self._has_rows(node) else results[0]
        # Where there is an item for each sample, its result is that of a batch of its own.
        parts = [[r] for r in results] if node.each else zip(*map(values_of, results), strict=True)
        pairs = zip(node.items.values(), parts, strict=True)
        joined = [self._join(inner, list(part)) for inner, part in pairs]
        return Columns(joined) if isinstance(node.like, Columns) else node.build(joined)

    # --- the end ---

    def finish(self, pure: bool = False, cast: Callable[[Any], Any] | None = None) -> Any:
        """Return the targets, without the boxes that are filtered out."""
        if self.rules.min_area or self.rules.min_visibility:
            for leaf in self.leaves:
                if leaf.kind == "BoundingBoxes":
                    self._filter(leaf)
        for leaf in self.leaves:
            if cast is not None:
                leaf.value = cast(leaf.value)
            if isinstance(leaf.value, Tensor):
                leaf.value.__dict__.pop("fusereg_visible", None)
            if pure and leaf.kind not in ("", "Tensor"):
                leaf.value = plain(leaf.value)
        return self.whole()

    def _filter(self, boxes: Leaf) -> None:
        """Leave out boxes that are too small, with the rows of the keys beside them."""
        value, rules, beside = boxes.value, self.rules, self._beside(boxes)
        kept = area(cut_corners(value)) >= rules.min_area
        if rules.min_visibility:
            kept &= getattr(value, "fusereg_visible", kept.double()) >= rules.min_visibility
        if bool(kept.all()):
            return
        boxes.value = wrap(plain(value)[kept], value)
        for leaf, named in beside:
            rows = leaf.value
            if not named:
                continue
            if not isinstance(rows, Tensor) or rows.shape[:1] != kept.shape:
                raise ValueError(
                    f"fusereg.{self.op}: {leaf.path} must have a row for each of the {len(kept)} "
                    "boxes beside it, to be filtered with them; name the keys that have in rows="
                )
            leaf.value = wrap(plain(rows)[kept.to(rows.device)], rows)

    def _beside(self, boxes: Leaf) -> list[tuple[Leaf, bool]]:
        """Return what is beside boxes, and whether it has their rows: its key says so."""
        count, rules = len(boxes.value), self.rules
        beside = [x for x in self.leaves if x is not boxes and x.group == boxes.group]
        found = []
        for leaf in beside:
            kind, value = leaf.kind, leaf.value
            # A tuple has no keys: its vector beside the boxes has their labels.
            named = leaf.key in rules.rows if leaf.key else kind == "Tensor" and value.dim() == 1
            if kind == "Mask" and value.dim() < 3:  # of all pixels, not of instances
                named = False
            listed = bool(re.search(r"\[\d+\]$", leaf.path)) and leaf.key
            if listed:
                rows = sum(x.key == leaf.key for x in beside)
            else:
                rows = len(value) if kind and value.dim() else -1
            unsaid = not named and rules.rows == ROWS
            if unsaid and rows == count and not self._is_of_image(leaf):
                raise ValueError(
                    f"fusereg.{self.op}: {leaf.path} may have a row for each of the {count} boxes "
                    "beside it, which are filtered, or none; name its key in rows= or in "
                    "passthrough="
                )
            found.append((leaf, named))
        return found

    def _is_of_image(self, leaf: Leaf) -> bool:
        """Return whether a value beside boxes is of the image, by its type or its key."""
        kept = self.rules.passthrough
        key = leaf.key.lower()
        whole = leaf.kind in ("Image", "Video", "BoundingBoxes") or (
            leaf.kind == "Mask" and leaf.value.dim() < 3
        )
        named = key in ("", "size", "orig_size", "original_size", "image_size", "image_id", "id")
        return whole or named or kept is True or self._left_alone(leaf)


class Unstacked(Targets):
    """The targets of samples whose images differ in size, until these have one."""

    def __init__(self, n: int, rules: Rules, op: str, mixed: bool) -> None:
        super().__init__([], n, (0, 0), rules, op, mixed)

    def joined(self, trees: list[Any], size: tuple[int, int]) -> Targets:
        """Return the targets of the batch."""
        tree = batch_tree(stack(trees))
        return Targets(tree, self.n, size, self.rules, self.op, self.mixed)
