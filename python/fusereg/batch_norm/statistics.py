"""Running statistics left alone for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..core.hints import explains


@explains()
@contextlib.contextmanager
def keep_stats(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of the module's batch-norm layers within a block.

    They go on normalizing by their batch. This is for a forward that is run a second time, as
    activation checkpointing does in backward: without it the statistics are updated twice.

    Args:
        module: the module; layers of this package inside it, and converted ones, are concerned.
            torch's own know no such thing and are left as they are.

    Raises:
        TypeError: ``module`` is no module.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> y = checkpoint(
        ...     block, x, use_reentrant=False,
        ...     context_fn=lambda: (contextlib.nullcontext(), fusereg.nn.keep_stats(block)))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"fusereg.nn.keep_stats: module must be a torch.nn.Module, got {type(module).__name__}"
        )
    # Read again here, not when the block was made: the second pass may be much later.
    layers: list[Any] = [m for m in module.modules() if getattr(m, "update_stats", False) is True]
    try:
        for layer in layers:
            layer.update_stats = False
        yield
    finally:
        for layer in layers:
            layer.update_stats = True
