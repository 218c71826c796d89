"""Paragraphs of the optimizers' docstrings that they share."""

from __future__ import annotations

from ..core.docs import share_paragraphs

_PENALTY = r"""
        l1, l2, group: strengths >= 0 of the penalty
            :math:`R(w) = l_1 \sum |w_i| + \tfrac{l_2}{2} \sum w_i^2 + group \sum_r \sqrt{n_r}
            \|w_r\|_2`, r over the slices along dimension 0. Numbers or 0-d tensors; each param
            group may have its own, and they may be changed between steps.
        prox: ``True`` or ``"decoupled"``: after the update the proximal step of
            :math:`lr \cdot R`, which gives weights that are exactly zero. ``"preconditioned"``: the
            proximal step in the metric of the update. ``False``: the (sub)gradient of R is added to
            the gradient.
        max_grad_norm: clips the 2-norm of all gradients to this inside the step, as
            :func:`clip_grad_norm_` would before it; the gradients themselves stay as they are. The
            norm found is in :attr:`grad_norm`.
        master_weights: float16 and bfloat16 parameters get a float32 copy in the state
            (``"master_param"``) that is updated instead and rounded to the parameter.
        foreach, fused, differentiable: accepted for torch's sake. There is one way to
            run, and it is fused; ``differentiable=True`` is refused."""

_NOTES = r"""
    All parameters are updated in one call that reads parameter, gradient and state once and writes
    parameter and state once, penalty included. Any mix of float64, float32, float16, bfloat16
    (gradients may have another dtype than their parameter; states of 16-bit parameters are
    float32), devices and layouts. DTensors are updated shard by shard. Results do not depend on the
    number of threads.

    ``lr``, ``weight_decay`` and the strengths may be tensors on the parameters' device: the kernel
    reads them there, so that a captured CUDA graph follows their changes. A ``GradScaler``'s scale
    and overflow flag are also read on the device; gradients are not unscaled in memory.

    ``state_dict()`` has torch's keys; each of this optimizer and ``torch.optim``'s of the same name
    loads the other's, through ``torch.distributed.checkpoint`` too.

    Code that ``torch.compile`` compiles is cut in two at the step, which is one call as it is:
    there is nothing to fuse. With ``fullgraph=True`` the step is one operator in the graph, as
    :func:`clip_grad_norm_` always is, and :attr:`penalty_value` and :attr:`grad_norm` are written
    where they are; numbers that change should be tensors then, for torch compiles again for each
    new one. It refuses a step that needs more than the kernels: the first one with momentum, sparse
    or oddly laid out gradients, several devices, DTensors, a ``GradScaler``.

    Raises:
        TypeError, ValueError: an argument is out of its range, or at a step a parameter or gradient
            is complex, of an unsupported dtype, or shares memory with another. Nothing is changed
            then."""


def share(optimizer: type) -> None:
    share_paragraphs(optimizer, penalty=_PENALTY, notes=_NOTES)
