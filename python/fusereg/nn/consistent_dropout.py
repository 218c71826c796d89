"""Dropout with one mask for a whole episode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from .._random import device_pair
from .dropout import probability

__all__ = ["ConsistentDropout"]


class ConsistentDropout(nn.Module):
    """Dropout whose mask stays the same from call to call, until :meth:`reset`.

    For what is computed step by step: the states of a recurrent cell (variational dropout, Gal and
    Ghahramani 2016), a policy that acts through an episode, Monte Carlo dropout of one network from
    its posterior. Call ``reset()`` where the next sequence or episode begins.

    What is kept is no mask but ``pair``, the 16 bytes (seed, offset) that determine it, a buffer
    that moves with the module and is not part of ``state_dict()``: checkpoints are those of a model
    with nn.Dropout. To resume an episode later, begin it with ``reset(seed)``.

    Row n of a batch has the same mask for any batch size, and for any number of steps along
    ``dim``: rows and steps may come and go within an episode. Its features (the other dimensions)
    may not; that raises. The backward pass of an earlier call has that call's mask, whether or not
    there was a ``reset()`` in between. In evaluation mode the input is returned as it is.

    Args:
        p: the probability of dropping, 0.5 if not given.
        dim: a dimension of the input along which the mask is the same too, as in
            :func:`fusereg.functional.consistent_dropout`; None if there is none.
        keep_prob: 1 - p, in place of ``p``.
        device: where ``pair`` lies: where the inputs will.

    Raises:
        ValueError: ``p`` or ``keep_prob`` is outside [0, 1], or both are given.

    Example:
        >>> drop = fusereg.nn.ConsistentDropout(0.3)
        >>> for x in steps:
        ...     state = cell(drop(x), state)
        >>> drop.reset()
    """

    pair: Tensor

    def __init__(
        self,
        p: float | None = None,
        dim: int | None = None,
        *,
        keep_prob: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.p = probability(p, keep_prob, "ConsistentDropout")
        self.dim = dim
        pair = torch.empty(2, dtype=torch.int64, device=device)
        self.register_buffer("pair", pair, persistent=False)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Begins a new episode, with a new mask.

        Args:
            seed: an integer that determines the mask; by default a pair is drawn from torch's
                default generator of the buffer's device.
        """
        device = self.pair.device
        # A new tensor: backward of earlier calls, and graphs that hold the old one, still read it.
        if seed is None:
            self.pair = device_pair(device)
        else:
            signed = (seed + 2**63) % 2**64 - 2**63
            self.pair = torch.tensor([signed, 0], dtype=torch.int64, device=device)
        self._features: tuple[int, ...] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The input with the episode's elements dropped; itself in evaluation mode."""
        if self.training:
            shape = list(input.shape)
            if self.dim is not None and -len(shape) <= self.dim < len(shape):
                del shape[self.dim]
            features = tuple(shape[1:])
            if self._features is None:
                self._features = features
            elif self._features != features:
                raise ValueError(
                    f"fusereg.nn.ConsistentDropout: the episode began with features of shape "
                    f"{self._features}, got {features}; call reset() first"
                )
        return F.consistent_dropout(input, self.p, self.dim, self.training, seed=self.pair)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}" + ("" if self.dim is None else f", dim={self.dim}")
