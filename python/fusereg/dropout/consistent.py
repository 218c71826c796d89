"""Dropout with one mask for all steps of a sequence, or for a whole episode."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks, draws, random
from ..core.checks import probability
from ..core.draws import Kind
from ..core.hints import explains
from ..core.layer import Layer

#: Of (outer, inner, steps): a draw for each of the first two dimensions.
_STEPS = Kind("consistent_dropout", rows={3: 2})


@explains()
def consistent_dropout(
    x: Tensor,
    p: float = 0.5,
    dim: int | None = 1,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    index_offset: int = 0,
) -> Tensor:
    r"""Apply dropout whose mask is the same at each step along a dimension.

    :math:`y_{ntc} = x_{ntc} / (1-p)` for all t with probability :math:`1-p`, else 0 for all t: one
    draw for each (n, c), as variational dropout wants it for recurrent networks (Gal and Ghahramani
    2016, "A theoretically grounded application of dropout in recurrent neural networks"). For
    sequences that come step by step, see :class:`fusereg.nn.ConsistentDropout`.

    Args:
        x: float64, float32, float16 or bfloat16, of shape (N, T, C) or any other.
        p: the probability of dropping, within [0, 1]; 0 and ``training=False`` return ``x`` itself,
            1 gives zeros.
        dim: the dimension of the steps, along which the mask is the same. None: a draw for each
            element.
        training: whether to drop at all.
        seed: an integer that determines the mask, or an int64 tensor (seed, offset) on x's device.
            ``dropout_mask(shape, p, seed)`` is then the mask, with x's shape without ``dim``.
            Default: a new state from ``generator``.
        generator: the torch.Generator to draw from; torch's default one if not given.
        index_offset: what is added to every index.

    The index that is drawn for counts x's other dimensions in row-major order, whatever the layout:
    row n of the mask does not depend on how many rows or steps there are. Nothing is kept for
    backward but the seed. A tensor that is not contiguous is copied first.

    Raises:
        TypeError, ValueError: as :func:`dropout`; also if x has no such dimension.

    Example:
        >>> y = fusereg.functional.consistent_dropout(sequences, 0.3, dim=1)
    """
    op = "consistent_dropout"
    p = checks.check_probability(p, op)
    checks.check_tensor(x, op)
    dim = None if dim is None else _dimension(dim, x.dim(), op)
    if not training or p == 0:
        return x
    checks.check_input(x, op)
    rows = x.contiguous()
    if dim is not None:
        # As the kernels know it from channels_last images: the step is what the rows share.
        outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
        rows = rows.view(outer, x.shape[dim], inner).permute(0, 2, 1)
    kind = Kind(op) if dim is None else _STEPS
    y = draws.dropout(rows, p, True, False, seed, generator, index_offset, kind)
    return y if dim is None else y.permute(0, 2, 1).reshape(x.shape)


def _dimension(dim: object, dims: int, op: str) -> int:
    if not checks.is_integer(dim):
        raise TypeError(f"fusereg.{op}: dim must be an integer or None, got {type(dim).__name__}")
    if not -dims <= dim < dims:
        raise ValueError(f"fusereg.{op}: dim is {dim}, but x has {dims} dimensions")
    return dim % dims


class ConsistentDropout(Layer):
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
        self.p = probability(p, keep_prob, "nn.ConsistentDropout")
        self.dim = dim
        pair = torch.empty(2, dtype=torch.int64, device=device)
        self.register_buffer("pair", pair, persistent=False)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode, with a new mask.

        Args:
            seed: an integer that determines the mask; by default a pair is drawn from torch's
                default generator of the buffer's device.
        """
        device = self.pair.device
        # A new tensor: backward of earlier calls, and graphs that hold the old one, still read it.
        if seed is None:
            self.pair = random.device_state(device)
        else:
            self.pair = random.pair(seed, 0, device)
        self._features: tuple[int, ...] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with the episode's elements dropped; itself in evaluation mode."""
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
        return consistent_dropout(input, self.p, self.dim, self.training, seed=self.pair)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}" + ("" if self.dim is None else f", dim={self.dim}")
