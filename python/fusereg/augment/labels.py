"""Labels of mixed samples, and targets that move with the image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import memory
from .params import AugmentParams

__all__ = ["MixedLabels", "mix_labels"]


class MixedLabels(NamedTuple):
    """Class indices of both samples of each pair, and the share of the first.

    Attributes:
        a: [N] the samples' own labels.
        b: [N] their partners' (their own where there is none).
        weight: [N] float32, the share of ``a``.
    """

    a: Tensor
    b: Tensor
    weight: Tensor

    def soft(self, num_classes: int) -> Tensor:
        """Return [N, num_classes] float32: weight at a, 1 - weight at b."""
        result = torch.zeros(len(self.a), num_classes, device=self.a.device)
        weight = self.weight[:, None]
        return result.scatter_add_(1, self.a[:, None], weight).scatter_add_(
            1, self.b[:, None], 1 - weight
        )

    def loss(self, criterion: Callable[[Any, Tensor], Tensor], prediction: Any) -> Tensor:
        """Return mean(weight * criterion(prediction, a) + (1 - weight) * criterion(prediction, b)).

        ``criterion`` returns a loss for each sample (``reduction="none"``).
        """
        own, other = criterion(prediction, self.a), criterion(prediction, self.b)
        if own.shape != self.weight.shape:
            raise ValueError(
                f"fusereg.MixedLabels.loss: criterion must give a loss for each of the "
                f"{len(self.a)} samples (reduction='none'), got shape {tuple(own.shape)}"
            )
        return (self.weight * own + (1 - self.weight) * other).mean()


def mix_labels(
    labels: Tensor, params: AugmentParams, num_classes: int | None = None, op: str = "mix_labels"
) -> Tensor | MixedLabels:
    """Mix labels as ``params`` mixes the images.

    ``y_i = w_i l_i + (1 - w_i) l_partner(i)`` with ``w = params.weights``.

    Args:
        labels: [N] class indices, or [N, K] probabilities (such as one-hot rows).
        params: the parameters that mixed the images.
        num_classes: K, for class indices.

    Returns:
        [N, K] float32 (or the dtype of floating probabilities); for class indices without
        ``num_classes``: :class:`MixedLabels`.
    """
    n = len(params)
    if not isinstance(labels, Tensor):
        raise TypeError(f"fusereg.{op}: targets must be a tensor, got {type(labels).__name__}")
    if labels.dim() not in (1, 2) or labels.shape[0] != n:
        raise ValueError(
            f"fusereg.{op}: targets must be class indices ({n},) or probabilities ({n}, K), "
            f"got shape {tuple(labels.shape)}"
        )
    partners = memory.to_device(params.partners, labels.device, op)
    other = torch.where(partners >= 0, partners, torch.arange(n, device=labels.device))
    weight = memory.to_device(params.weights, labels.device, op)
    if labels.dim() == 2:
        if num_classes is not None and labels.shape[1] != num_classes:
            raise ValueError(
                f"fusereg.{op}: targets must have {num_classes} columns, got {labels.shape[1]}"
            )
        soft = labels if labels.is_floating_point() else labels.float()
        w = weight.to(soft.dtype)[:, None]
        return soft * w + soft[other] * (1 - w)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(f"fusereg.{op}: class indices must be integers, got {labels.dtype}")
    a = labels.long()
    pair = MixedLabels(a, a[other], weight.float())
    if num_classes is None:
        return pair
    # Of a GPU's labels the host would wait for the answer; scatter_add_ refuses others there.
    if n and a.is_cpu and not (int(a.min()) >= 0 and int(a.max()) < num_classes):
        raise ValueError(
            f"fusereg.{op}: class indices must be within [0, {num_classes}), "
            f"got {int(a.min())} to {int(a.max())}"
        )
    return pair.soft(num_classes)


# --- torchvision's tv_tensors, where they are in use ---


def _tv_tensors() -> Any:
    """Return the module if it has been imported; without it no tensor has its types."""
    return sys.modules.get("torchvision.tv_tensors")


def unwrap(x: Tensor) -> Tensor:
    """Return a tv_tensors.Image as a Tensor, and other tensors as they are."""
    tv = _tv_tensors()
    return x.as_subclass(Tensor) if tv is not None and isinstance(x, tv.Image) else x


def rewrap(y: Tensor, like: Tensor) -> Tensor:
    """Return y as a tv_tensors.Image if ``like`` is one."""
    tv = _tv_tensors()
    if tv is None or not isinstance(like, tv.Image):
        return y
    wrapped: Tensor = tv.wrap(y, like=like)
    return wrapped


def transform_targets(
    targets: Any, params: AugmentParams, mixed: bool, num_classes: int | None, op: str
) -> Any:
    """Transform the targets of a batch: labels are mixed if images are; tv_tensors move with them.

    The values of mappings are transformed each; a list of N bounding boxes or masks has one for
    each sample.
    """
    if targets is None:
        return None
    tv = _tv_tensors()
    if tv is not None:
        if isinstance(targets, tv.Mask):
            return tv.wrap(params.mask(targets.as_subclass(Tensor)), like=targets)
        if isinstance(targets, tv.BoundingBoxes):
            return tv_boxes([targets], params, op)[0]
        if isinstance(targets, list) and targets:
            if all(isinstance(t, tv.BoundingBoxes) for t in targets):
                return tv_boxes(targets, params, op)
            if all(isinstance(t, Mapping) for t in targets) and len(targets) == len(params):
                return _for_each_sample(targets, params, mixed, op)
            if all(isinstance(t, tv.Mask) for t in targets) and len(targets) == len(params):
                alone = params.without_mix()
                return [_move(t, alone[i], op) for i, t in enumerate(targets)]
    if isinstance(targets, Mapping):
        return {k: transform_targets(v, params, mixed, num_classes, op) for k, v in targets.items()}
    if not mixed:
        return targets
    return mix_labels(targets, params, num_classes, op)


def _for_each_sample(targets: list[Any], params: AugmentParams, mixed: bool, op: str) -> list[Any]:
    """Transform detection targets: a mapping of boxes, masks and labels for each sample."""
    if mixed:
        raise ValueError(
            f"fusereg.{op}: targets of single samples cannot be mixed; leave mix out, or "
            "pass labels of the whole batch"
        )
    return [
        {name: _move(value, params[i], op) for name, value in target.items()}
        for i, target in enumerate(targets)
    ]


def _move(value: Any, params: AugmentParams, op: str) -> Any:
    """Move the boxes, the mask [H, W] or the masks [K, H, W] of one sample with its image."""
    tv = _tv_tensors()
    if isinstance(value, tv.BoundingBoxes):
        return tv_boxes([value], params, op)[0]
    if isinstance(value, tv.Mask):
        return tv.wrap(params.mask(value.as_subclass(Tensor)[None])[0], like=value)
    return value


def tv_boxes(boxes: list[Any], params: AugmentParams, op: str) -> list[Any]:
    """Move one BoundingBoxes [K, 4] for each sample; formats stay, the canvas is the new one."""
    tv = _tv_tensors()
    if len(boxes) != len(params):
        raise ValueError(
            f"fusereg.{op}: targets must be one tv_tensors.BoundingBoxes for each of the "
            f"{len(params)} samples, got {len(boxes)}"
        )
    alone = params.without_mix()
    results = []
    for i, box in enumerate(boxes):
        name = str(box.format.value).lower()
        moved = alone[i].boxes(box.as_subclass(Tensor)[None], format=name)
        results.append(tv.BoundingBoxes(moved[0], format=box.format, canvas_size=params.size))
    return results
