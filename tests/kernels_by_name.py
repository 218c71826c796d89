"""Dropout's autograd functions with their kernels looked up in _C at each call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from fusereg.core import draws
from fusereg.gaussian_dropout.op import noise


@contextmanager
def kernels_by_name() -> Iterator[None]:
    """Have them go the way of unusual tensors, so that a kernel replaced in _C is called."""
    with ExitStack() as stack:
        for drawn in (draws.mask, noise):
            forward, backward = drawn.general
            function = drawn._function
            stack.enter_context(mock.patch.object(function, "forward", staticmethod(forward)))
            stack.enter_context(mock.patch.object(function._backward_cls, "apply", backward))
        yield
