"""Labels of samples that were mixed, which augmentation makes and losses take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
