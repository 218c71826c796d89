"""Batch normalization, with what follows it in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusereg
from fusereg import functional
from fusereg.cli.checks._base import Inputs, Pairs, exact, kernel_check
from fusereg.cli.checks._masks import SEED, P, kept_share, mask


def _torch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool
) -> Tensor:
    return torch.nn.functional.batch_norm(x, mean, var, weight, bias, training)


@dataclass
class _Data:
    """Tensors of odd sizes, and their twins in float64 on the CPU.

    Parameters and statistics of 16-bit inputs are in float32, as under autocast.
    """

    inputs: Inputs
    channels_last: bool = False
    x: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    var: Tensor = field(init=False)

    def __post_init__(self) -> None:
        inputs = self.inputs
        shape = (9, 41, 19, 23) if inputs.large else (5, 37, 9, 11)
        elements = [inputs.exact_normal(*shape, seed=20 + i) for i in range(3)]
        # Far from zero, where squares lose digits; in float64 the reference would lose them too.
        far = 4.0 if inputs.dtype == torch.float64 else 100.0
        elements[0] = elements[0] + far
        if self.channels_last:
            elements = [t.contiguous(memory_format=torch.channels_last) for t in elements]
        self.x, self.residual, self.gradient = (t.to(inputs.device, inputs.dtype) for t in elements)
        wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        self.weight, self.bias = (inputs.normal(shape[1], seed=23 + i).to(wide) for i in range(2))
        self.mean = torch.full((shape[1],), far - 1.0, device=inputs.device, dtype=wide)
        self.var = torch.ones(shape[1], device=inputs.device, dtype=wide)

    def pairs(
        self,
        call: Callable[..., Tensor],
        wanted: Callable[..., Tensor],
        after: Callable[[Tensor], Tensor] = lambda z: z,
        with_residual: bool = False,
        corner: bool = False,
    ) -> Pairs:
        """Result, running statistics and gradients.

        ``call`` gets x, mean, var, weight, bias, residual; ``wanted`` the first five; ``after``
        what comes out of it. With ``corner``, no gradient comes in where the result of ``wanted``
        is so near to 0 that rounding could put it on the other side.
        """
        running = [self.mean, self.var]
        leaves = [self.x, self.weight, self.bias] + ([self.residual] if with_residual else [])
        references = [t.requires_grad_() for t in exact(leaves)]
        exact_running = exact(running)
        leaves = [t.requires_grad_() for t in leaves]
        y = call(self.x, *running, self.weight, self.bias, self.residual)
        z = wanted(references[0], *exact_running, *references[1:3])
        z = z + references[3] if with_residual else z
        incoming = exact([self.gradient])[0]
        if corner:
            incoming = torch.where(z.detach().abs() < 1e-4, 0.0, incoming)
        result = after(z)
        gradients = torch.autograd.grad(y, leaves, incoming.to(y.device, y.dtype))
        exact_gradients = torch.autograd.grad(result, references, incoming)
        return [
            (y, result),
            *zip(running, exact_running, strict=True),
            *zip(gradients, exact_gradients, strict=True),
        ]


def _plain(
    inputs: Inputs,
    channels_last: bool,
    training: bool,
    after: Callable[[Tensor], Tensor] = lambda z: z,
    with_residual: bool = False,
    corner: bool = False,
    **options: Any,
) -> Pairs:
    def call(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        residual = r if with_residual else None
        return functional.batch_norm(x, m, v, w, b, training, residual=residual, **options)

    return _Data(inputs, channels_last).pairs(
        call,
        lambda x, m, v, w, b: _torch_norm(x, m, v, w, b, training),
        after,
        with_residual,
        corner,
    )


@kernel_check("batch_norm", "(x - mean) / sqrt(var + eps) * weight + bias")
def _batch_norm(inputs: Inputs) -> Pairs:
    return _plain(inputs, False, True)


@kernel_check("batch_norm, channels_last, GELU", "gelu(batch_norm(x))")
def _channels_last(inputs: Inputs) -> Pairs:
    return _plain(inputs, True, True, torch.nn.functional.gelu, activation="gelu")


@kernel_check("batch_norm, evaluation, SiLU", "the same with running statistics")
def _evaluation(inputs: Inputs) -> Pairs:
    return _plain(inputs, False, False, torch.nn.functional.silu, activation="silu")


@kernel_check("batch_norm + add + ReLU", "max(0, batch_norm(x) + residual), channels_last")
def _add_relu(inputs: Inputs) -> Pairs:
    return _plain(inputs, True, True, torch.relu, True, True, activation="relu")


@kernel_check("batch_norm + leaky ReLU + dropout", "keep ? leaky(batch_norm(x)) / (1 - p) : 0")
def _leaky_dropout(inputs: Inputs) -> Pairs:
    keep = kept_share(P)

    def after(z: Tensor) -> Tensor:
        leaky = torch.nn.functional.leaky_relu(z, 0.1)
        return torch.where(mask(tuple(z.shape)), leaky / keep, 0.0)

    return _plain(
        inputs, False, True, after, corner=True,
        activation="leaky_relu", negative_slope=0.1, dropout=P, seed=SEED,
    )  # fmt: skip


@kernel_check("batch_norm, in place", "leaky(batch_norm(x)) over x; backward has y alone")
def _in_place(inputs: Inputs) -> Pairs:
    data = _Data(inputs)
    # Backward takes the affine map back: the less the bias weighs, the fewer digits that costs.
    data.weight, data.bias = data.weight.abs() + 1.0, data.bias / 16.0

    def call(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return functional.batch_norm(
            x.clone(), m, v, w, b, True, activation="leaky_relu", negative_slope=0.5, inplace=True
        )

    def after(z: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(z, 0.5)

    def wanted(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return _torch_norm(x, m, v, w, b, True)

    pairs = data.pairs(call, wanted, after, corner=True)
    # Gradients of the parameters are float32, but no more exact than y, which is all there is.
    return [(came.to(inputs.dtype), reference) for came, reference in pairs]


@kernel_check("batch_norm, virtual batches", "each 2 samples by their own statistics")
def _ghost(inputs: Inputs) -> Pairs:
    def wanted(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        _torch_norm(x.detach(), m, v, w.detach(), b.detach(), True)  # of the whole batch
        parts = [
            torch.nn.functional.batch_norm(part, None, None, w, b, True) for part in x.split(2)
        ]
        return torch.cat(parts)

    def call(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return functional.batch_norm(x, m, v, w, b, True, virtual_batch_size=2)

    return _Data(inputs).pairs(call, wanted)


@kernel_check("batch_norm, mask", "statistics of the elements that belong to the batch")
def _masked(inputs: Inputs) -> Pairs:
    data = _Data(inputs)
    n, _, h, w = data.x.shape
    valid = mask((n, h, w))

    def wanted(x: Tensor, m: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        z = _torch_norm(channels_last[valid], m, v, weight, bias, True)
        return torch.zeros_like(channels_last).masked_scatter(
            valid[..., None].expand_as(channels_last), z
        ).permute(0, 3, 1, 2)  # fmt: skip

    def call(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return functional.batch_norm(x, m, v, w, b, True, mask=valid.to(x.device))

    return data.pairs(call, wanted)


@kernel_check("nn.BatchRenorm", "((x - mean) / std * r + d) * weight + bias")
def _renorm(inputs: Inputs) -> Pairs:
    data = _Data(inputs)
    layer = fusereg.nn.BatchRenorm(data.x.shape[1], r_max=1.1, d_max=0.7)
    layer = layer.to(data.mean.device, data.mean.dtype)

    def wanted(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        std, running_std = (variance + layer.eps).sqrt(), (v + layer.eps).sqrt()
        r = (std / running_std).detach().clamp(1 / 1.1, 1.1)
        d = ((mean - m) / running_std).detach().clamp(-0.7, 0.7)
        x_hat = torch.nn.functional.batch_norm(x, m, v, None, None, True)
        shape = (1, -1, 1, 1)
        return (x_hat * r.view(shape) + d.view(shape)) * w.view(shape) + b.view(shape)

    def call(x: Tensor, m: Tensor, v: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        layer.running_mean, layer.running_var = m, v
        state = {"weight": w, "bias": b}
        result: Tensor = torch.func.functional_call(layer, state, (x,))
        return result

    return data.pairs(call, wanted)
