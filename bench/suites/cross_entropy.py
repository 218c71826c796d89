"""Benchmark of cross-entropy against torch's, forward and backward.

The work is the mean loss of logits [N, C] and its gradient, in three forms: ``hard`` class indices,
``smoothed`` ones (0.1), and ``mixed`` ones, of two smoothed indices a row as MixUp makes them.

By contract forward reads the logits, and backward reads them and writes the gradient: 3 elements
moved for each. Eager torch keeps the logarithms of the softmax and makes 3 (hard), 4 (smoothed) or
8 (mixed) tensors of the size of the logits.

Providers:

- ``eager``: torch.nn.functional.cross_entropy; for mixed labels two of them, weighted.
- ``torch.compile``: the same, compiled.
- ``fusereg``: ``fusereg.functional.cross_entropy``.

The ``host`` rows have 4 rows of 16 classes: what remains is the cost of a call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fusereg import functional as F
from fusereg.augment import MixedLabels

from ..harness import Accuracy, Call, Case, Options, Workload, largest
from ..harness.layers import BOTH, Work, layer_cases, providers, results, timed

SMOOTHING = 0.1
SHARE = 0.3
FORMS = ("hard", "smoothed", "mixed")
#: Logits that are checked.
_CHECKED = 1 << 22

Loss = Callable[[Tensor], Tensor]


def cases(options: Options) -> list[Case]:
    """Return a classifier's and a language model's size in each dtype and form, and a tiny one."""
    sizes = [(256, 1000)] if options.quick else [(256, 1000), (4096, 50257)]
    ops = [f"cross_entropy {form}" for form in FORMS]
    works = [Work(op, shape) for shape in sizes for op in ops]
    works += [Work(op, (4, 16), host=True) for op in ops]
    # Eager torch's tensors; the check in float64 is made of small logits only.
    return [
        dataclasses.replace(case, memory=(12 * case.dtype.itemsize) * case.elements)
        for case in layer_cases(options, works, {BOTH: 3}, _setup)
    ]


def losses(form: str, shape: tuple[int, ...], device: torch.device) -> tuple[Loss, Loss]:
    """Return torch's loss and fusereg's as functions of the logits."""
    rows, classes = shape
    first = torch.arange(rows, device=device) * 7 % classes
    second = first.flip(0)
    torch_loss = torch.nn.functional.cross_entropy
    e = 0.0 if form == "hard" else SMOOTHING
    if form != "mixed":
        return (
            lambda x: torch_loss(x, first, label_smoothing=e),
            lambda x: F.cross_entropy(x, first, label_smoothing=e),
        )
    labels = MixedLabels(first, second, torch.full((rows,), SHARE, device=device))

    def both(x: Tensor) -> Tensor:
        mine, others = (torch_loss(x, t, label_smoothing=e) for t in (first, second))
        return SHARE * mine + (1 - SHARE) * others

    return both, lambda x: F.cross_entropy(x, labels, label_smoothing=e)


def _setup(work: Work, mode: str, dtype: torch.dtype, options: Options) -> Workload:
    form, shape = work.op.rpartition(" ")[2], work.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(options.device, dtype)
    eager, fused = losses(form, shape, options.device)
    wanted, _ = losses(form, shape, options.device)
    return Workload(
        providers(
            eager, fused, timed(BOTH, x, gradient=torch.ones((), dtype=dtype, device=x.device))
        ),
        functools.partial(_check, x, wanted),
    )


def _check(x: Tensor, loss: Loss, call: Call) -> Accuracy:
    """Compare loss and gradient with float64, where the logits are not too many for it."""
    y, *gradients = results(call)
    tolerance = 1e-5 if x.dtype is torch.float32 else 2e-2
    if x.numel() > _CHECKED:
        return Accuracy(0.0 if torch.isfinite(y).all() else 1.0, tolerance, "finite")
    exact = x.double()
    exact.requires_grad_()
    reference = loss(exact)
    error = abs(float(y.detach()) - float(reference.detach())) / abs(float(reference.detach()))
    if gradients:
        (wanted,) = torch.autograd.grad(reference, exact)
        worst = (gradients[0].double() - wanted).abs().max() / wanted.abs().max()
        error = largest([error, worst])
    return Accuracy(error, tolerance, "loss and gradient")
