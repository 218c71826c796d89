"""Layers that compute dropout together with its neighbors, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from ..core.checks import probability
from ..core.layer import DropLayer, Layer
from . import functional as F


class BiasDropoutAdd(Layer):
    """:func:`fusereg.functional.bias_dropout_add`: residual + dropout(x + bias).

    The bias is an argument of the call, for it belongs to the layer before.

    Args:
        p: the probability of dropping, 0.5 if not given.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: ``p`` or ``keep_prob`` is outside [0, 1], or both are given.
    """

    def __init__(self, p: float | None = None, *, keep_prob: float | None = None) -> None:
        super().__init__()
        self.p = probability(p, keep_prob, "nn.BiasDropoutAdd")

    def forward(self, input: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return the sum of all three, with elements of the first two dropped in training mode."""
        return F.bias_dropout_add(input, bias, residual, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the argument as torch's dropout layers show it."""
        return f"p={self.p}"


class DropoutAdd(DropLayer):
    """:func:`fusereg.functional.dropout_add`: residual + dropout(x).

    Args:
        p: the probability of dropping, 0.5 if not given.
        inplace: whether to write into the first input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of both, with elements of the first dropped in training mode."""
        return F.dropout_add(input, residual, self.p, self.training, self.inplace)


class DropPathAdd(DropLayer):
    """:func:`fusereg.functional.drop_path_add`: residual + x for the samples that are kept.

    Args:
        p: the probability of dropping a sample, 0.5 if not given.
        inplace: whether to write into the first input.
        keep_prob: 1 - p, in place of ``p``.
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of both, with samples of the first dropped in training mode."""
        return F.drop_path_add(input, residual, self.p, self.training, self.inplace)


class ActivationDropout(Layer):
    """:func:`fusereg.functional.activation_dropout`: dropout(f(x)).

    Args:
        p: the probability of dropping, 0.5 if not given.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        inplace: whether to write into the input; in training for relu alone.
        keep_prob: 1 - p, in place of ``p``.

    Raises:
        ValueError: the activation is unknown, ``p`` or ``keep_prob`` outside [0, 1], or both given.
    """

    def __init__(
        self,
        p: float | None = None,
        activation: str = "relu",
        inplace: bool = False,
        *,
        keep_prob: float | None = None,
    ) -> None:
        super().__init__()
        self.p = probability(p, keep_prob, "nn.ActivationDropout")
        F.check_activation(activation, "nn.ActivationDropout")
        self.activation = activation
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of the input, with elements dropped in training mode."""
        return F.activation_dropout(input, self.p, self.activation, self.training, self.inplace)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}, activation={self.activation!r}, inplace={self.inplace}"
