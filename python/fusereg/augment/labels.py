"""Labels of mixed samples, and the types that images have."""

from __future__ import annotations

import re
import warnings

import torch
from torch import Tensor

from ..core import memory
from ..core.hints import explains
from ..core.labels import MixedLabels
from .params import AugmentParams
from .tree import odd_form

__all__ = ["MixedLabels", "mix_labels"]

#: Keys of labels that are mixed with their images, and of values that stay those of the sample.
_MIXED = re.compile(
    r"(?:^|[^a-z])(?:labels?|class(?:es)?|categor(?:y|ies)|targets?|one_?hot|y)"
    r"(?:[^a-z]*|_?(?:ids?|idx|index)|_[a-z])$"
)
_KEPT = re.compile(r"(?:^|[^a-z])(?:ids?|idx|index|indices|names?|paths?|files?|urls?|keys?)$")


#: Words in the keys of plain values that are places in the image, whatever their shape.
_PLACES = re.compile(
    r"(?:^|[^a-z])(?:b?box(?:es)?|bndbox|keypoints?|kpts?|landmarks?|polygons?|polys?|contours?|joints"
    r"|segmentations?|rles?|rois?|quads?|centroids?|xyxy|c?xc?ywh|[xy]_?(?:min|max))(?:$|[^a-z])"
)
_LABELS = re.compile("label|class|categor|id|area|score|weight|count|num|visib|name")


def names_places(key: str) -> bool:
    """Return whether a key, in small letters, is that of places in the image."""
    return bool(_PLACES.search(key)) and not _LABELS.search(key)


def is_no_place(key: str) -> bool:
    """Return whether a key, in small letters, says that its values are no places."""
    return bool(_LABELS.search(key))


def is_named_as_label(key: str) -> bool | None:
    """Return whether a key says that its values are labels, or None where it says neither."""
    key = key.lower()
    if _MIXED.search(key):
        return True
    return False if _KEPT.search(key) else None


def notice_labels(op: str, targets: object, replayed: bool) -> None:
    """Warn where images are mixed without labels: what was mixed, and by how much, is lost."""
    if not (replayed or targets is not None or torch.compiler.is_compiling()):
        warnings.warn(
            f"fusereg.{op}: images are mixed, but no labels came with them: call it with "
            "(images, labels), or pass params= from sample_params to mix labels apart",
            stacklevel=6,
        )


@explains()
def mix_labels(
    labels: Tensor,
    params: AugmentParams,
    num_classes: int | None = None,
    op: str = "mix_labels",
    label_smoothing: float = 0.0,
) -> Tensor | MixedLabels:
    """Mix labels as ``params`` mixes the images.

    ``y_i = w_i l_i + (1 - w_i) l_partner(i)`` with ``w = params.weights``.

    Args:
        labels: [N] class indices, or [N, K] probabilities (such as one-hot rows).
        params: the parameters that mixed the images.
        num_classes: K, for class indices.
        op: for errors.
        label_smoothing: s, with which labels are first l (1 - s) + s / K; with ``num_classes``.

    Returns:
        [N, K] float32 (or the dtype of floating probabilities); for class indices without
        ``num_classes``: :class:`MixedLabels`.
    """
    n = len(params)
    if not isinstance(labels, Tensor):
        raise TypeError(f"fusereg.{op}: targets must be a tensor, got {type(labels).__name__}")
    if form := odd_form(labels):
        raise ValueError(f"fusereg.{op}: targets must be a dense tensor, got a {form} one")
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
        if labels.shape[1] == 1 and not labels.is_floating_point():
            raise TypeError(
                f"fusereg.{op}: targets of shape ({n}, 1) must be floating, got {labels.dtype}; "
                f"give class indices the shape ({n},), as by squeeze(1)"
            )
        soft = labels if labels.is_floating_point() else labels.float()
        w = weight.to(soft.dtype)[:, None]
        return _smooth(soft * w + soft[other] * (1 - w), label_smoothing)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(
            f"fusereg.{op}: class indices must be integers, got {labels.dtype} (give other values "
            "that are mixed, as of a regression, the shape (N, 1))"
        )
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
    return _smooth(pair.soft(num_classes), label_smoothing)


def _smooth(soft: Tensor, amount: float) -> Tensor:
    """Return probabilities of which all classes get a share alike; mixing first is the same."""
    return soft * (1 - amount) + amount / soft.shape[1] if amount else soft
