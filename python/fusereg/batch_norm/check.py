"""Rows of the inventory: batch normalization, with what follows it in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, leaky_relu, silu

from ..core.inventory import IMAGES, Inputs, Operation, Pairs, Shape
from ..core.masks import SEED, P, dropped, mask, mask_like
from .functional import batch_norm
from .variants import BatchRenorm

_SHAPES: dict[str, Shape] = {
    **{size: IMAGES[size] for size in ("tiny", "empty")},
    "small": (5, 37, 9, 11),
    "large": (9, 41, 19, 23),
}
_torch_norm: Any = torch.nn.functional.batch_norm
_AFFINE = ("input", "weight", "bias")
_ALL = ("input", "running_mean", "running_var", "weight", "bias")
_RUNNING = _ALL[1:3]
_BATCH_ALONE = {"running_mean": None, "running_var": None, "training": True}


def _tensors(inputs: Inputs, shape: Shape, *names: str, channels_last: bool = False) -> Any:
    """Return the arguments of these names; parameters and statistics are at least float32."""
    # Far from zero, where squares lose digits; in float64 the reference would lose them too.
    far = 4.0 if inputs.dtype == torch.float64 else 100.0
    x, residual = (inputs.exact_normal(*shape, seed=20 + i) for i in range(2))
    elements = [(t.to(inputs.device, inputs.dtype)) for t in (x + far, residual)]
    if channels_last:
        elements = [t.contiguous(memory_format=torch.channels_last) for t in elements]
    weight, bias = (inputs.normal(shape[1], seed=23 + i).to(inputs.wide) for i in range(2))
    return [
        {
            "input": elements[0],
            "residual": elements[1],
            "weight": weight,
            "bias": bias,
            "running_mean": torch.full_like(weight, far - 1.0),
            "running_var": torch.ones_like(weight),
            "mask": mask((shape[0], *shape[2:])).to(inputs.device),
        }[name]
        for name in names
    ]


def _row(
    name: str,
    formula: str,
    arguments: tuple[str, ...],
    reference: Callable[..., Tensor],
    channels_last: bool = False,
    **fields: Any,
) -> Operation:
    return Operation(
        name=name,
        formula=formula,
        function=batch_norm,
        shapes=_SHAPES,
        tensors=lambda inputs, shape: _tensors(
            inputs, shape, *arguments, channels_last=channels_last
        ),
        arguments=arguments,
        reference=reference,
        **fields,
    )


def _trained(x: Tensor, *rest: Tensor) -> Tensor:
    """Batch normalization in training, of (x, weight, bias) or with running statistics."""
    running = rest[:-2] if len(rest) == 4 else (None, None)
    if not x.numel():
        return x * rest[-2].view(1, -1, *(1,) * (x.dim() - 2)) + 0 * rest[-1].sum()
    result: Tensor = _torch_norm(x, *running, *rest[-2:], training=True)
    return result


def _masked(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    channels_last = x.movedim(1, -1)
    z = _torch_norm(channels_last[valid], m, v, w, b, True)
    every = valid[..., None].expand_as(channels_last)
    return torch.zeros_like(channels_last).masked_scatter(every, z).movedim(-1, 1)


def _virtual(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
    _torch_norm(x.detach(), m, v, w.detach(), b.detach(), True)  # of the whole batch
    return torch.cat([_torch_norm(part, None, None, w, b, True) for part in x.split(2)])


# --- in place -------------------------------------------------------------------------------------


_LEAKY: Any = {"training": True, "activation": "leaky_relu", "negative_slope": 0.5, "inplace": True}


def _in_place_tensors(inputs: Inputs, shape: Shape) -> list[Tensor]:
    """Backward inverts the affine map: the less the bias weighs, the fewer digits that costs."""
    *rest, weight, bias = _tensors(inputs, shape, *_ALL)
    return [*rest, weight.abs() + 1.0, bias / 16.0]


def _in_place(inputs: Inputs) -> Pairs:
    tensors = _in_place_tensors(inputs, _SHAPES[inputs.size])
    operation = _row(
        "batch_norm, in place",
        "",
        _ALL,
        lambda *t: leaky_relu(_trained(*t), 0.5),
        written=_RUNNING,
        kink=lambda x, m, v, w, b: _trained(x, w, b),
    )

    def call(x: Tensor, *rest: Any) -> Tensor:
        return batch_norm(x.clone(), *rest, **_LEAKY)

    # Gradients of the parameters are float32, but no more exact than the result, which is all that
    # backward has.
    return [(came.to(inputs.dtype), wanted) for came, wanted in operation.compare(tensors, call)]


# --- BatchRenorm ----------------------------------------------------------------------------------


def _renorm(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
    layer = BatchRenorm(x.shape[1], r_max=1.1, d_max=0.7).to(m.device, m.dtype)
    layer.running_mean, layer.running_var = m, v
    result: Tensor = torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))
    return result


def _renorm_reference(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    std, running_std = (variance + 1e-5).sqrt(), (v + 1e-5).sqrt()
    r = (std / running_std).detach().clamp(1 / 1.1, 1.1)
    d = ((mean - m) / running_std).detach().clamp(-0.7, 0.7)
    x_hat: Tensor = _torch_norm(x, m, v, None, None, True)
    shape = (1, -1, 1, 1)
    return (x_hat * r.view(shape) + d.view(shape)) * w.view(shape) + b.view(shape)


def _with_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return _trained(x, w, b) + r


OPERATIONS = [
    _row(
        "batch_norm",
        "(x - mean) / sqrt(var + eps) * weight + bias",
        _AFFINE,
        _trained,
        options=_BATCH_ALONE,
    ),
    _row(
        "batch_norm, running statistics",
        "the same, and (1 - momentum) * running + momentum * of the batch",
        _ALL,
        _trained,
        options={"training": True},
        written=_RUNNING,
    ),
    _row(
        "batch_norm, channels_last, GELU",
        "gelu(batch_norm(x))",
        _ALL,
        lambda *t: gelu(_trained(*t)),
        channels_last=True,
        options={"training": True, "activation": "gelu"},
        written=_RUNNING,
        refuses={"in place": "wants activation None or 'leaky_relu'"},
    ),
    _row(
        "batch_norm, evaluation",
        "silu of the same with running statistics",
        _ALL,
        lambda *t: silu(_torch_norm(*t)),
        options={"training": False, "activation": "silu"},
        constants=_RUNNING,
        refuses={"in place": "wants activation None or 'leaky_relu'"},
    ),
    _row(
        "batch_norm, activation and residual",
        "max(0, batch_norm(x) + residual), channels_last",
        (*_AFFINE, "residual"),
        lambda *t: _with_residual(*t).relu(),
        channels_last=True,
        options={**_BATCH_ALONE, "activation": "relu"},
        kink=_with_residual,
        refuses={"in place": "and residual exclude each other"},
    ),
    _row(
        "batch_norm, dropout",
        "keep ? leaky(batch_norm(x)) / (1 - p) : 0",
        _AFFINE,
        lambda *t: dropped(leaky_relu(_trained(*t), 0.1), mask_like(t[0])),
        options={
            **_BATCH_ALONE,
            "activation": "leaky_relu",
            "negative_slope": 0.1,
            "dropout": P,
            "seed": SEED,
        },
        kink=_trained,
        refuses={"in place": "supports no dropout"},
    ),
    _row(
        "batch_norm, virtual batches",
        "each 2 samples by their own statistics",
        _ALL,
        _virtual,
        options={"training": True, "virtual_batch_size": 2},
        written=_RUNNING,
    ),
    _row(
        "batch_norm, mask",
        "statistics of the elements that belong to the batch",
        (*_ALL, "mask"),
        _masked,
        options={"training": True},
        written=_RUNNING,
    ),
    Operation(
        name="batch_norm, in place",
        formula="leaky(batch_norm(x)) over x; backward has y alone",
        function=batch_norm,
        shapes=_SHAPES,
        pairs=_in_place,
    ),
    Operation(
        name="nn.BatchRenorm",
        formula="((x - mean) / std * r + d) * weight + bias",
        function=_renorm,
        shapes=_SHAPES,
        tensors=lambda inputs, shape: _tensors(inputs, shape, *_ALL),
        arguments=("x", "m", "v", "w", "b"),
        reference=_renorm_reference,
        written=("m", "v"),
    ),
]
