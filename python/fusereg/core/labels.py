"""Labels of samples that were mixed, which augmentation makes and losses take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

_HINT = (
    "they are the labels of both samples of each pair; call labels.loss(criterion, prediction), "
    "fusereg.functional.cross_entropy or labels.soft(num_classes), or mix with num_classes="
)


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

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any) -> Any:
        """Refuse: a function of torch does not know what these labels are."""
        name = getattr(function, "__name__", "function")
        raise TypeError(f"fusereg.MixedLabels: torch's {name} does not take them: {_HINT}")

    def __getattr__(self, name: str) -> Any:
        """Say that these labels are no tensor."""
        raise AttributeError(f"fusereg.MixedLabels has no attribute {name!r}: {_HINT}")

    def soft(self, num_classes: int) -> Tensor:
        """Return [N, num_classes] float32: weight at a, 1 - weight at b."""
        result = self.weight.new_zeros(len(self.a), num_classes)
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
