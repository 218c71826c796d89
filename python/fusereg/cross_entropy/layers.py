"""Cross-entropy as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.labels import MixedLabels
from ..core.layer import Layer
from . import functional as F


class CrossEntropyLoss(Layer, nn.CrossEntropyLoss):
    """:func:`fusereg.functional.cross_entropy` with torch's arguments, a subclass of torch's layer.

    Args:
        weight: [C] weights of the classes.
        size_average: deprecated, as in torch.
        ignore_index: the class index of rows that do not count.
        reduce: deprecated, as in torch.
        reduction: "mean", "sum" or "none".
        label_smoothing: within [0, 1], else RuntimeError.
        inplace_backward: let backward write the gradient over the logits.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        F.check_smoothing(label_smoothing)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor | MixedLabels) -> Tensor:
        """Return the loss of logits and labels, which MixUp or CutMix may have mixed."""
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
        )
