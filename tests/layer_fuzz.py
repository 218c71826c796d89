"""Random calls of the layers, over layouts, modes and dtypes; test_layer_fuzz runs it.

    python tests/layer_fuzz.py --cases 10000 --seed 7
    python tests/layer_fuzz.py --seed 7 --only 381        # one case again, in words

Batch-norm layers are compared with the formula in float64: result, gradients, running statistics
and the count of batches. Layers that draw are compared with their input: the identity in
evaluation, and in training the input scaled, or nothing. Each case depends on nothing but the seed
and its number. Nothing may end the process, so this is the program to run under AddressSanitizer:
the number of the case is in the file --progress while it runs.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import conftest  # puts the module with the CUDA kernels on the host in place, if it is to be tested
import fusereg

DTYPES = list(conftest.TOLERANCES)
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 17, 33)
MOST_ELEMENTS = 600 if conftest.HOST_MODULE else 6000
#: Layer -> numbers of dimensions that it takes.
NORMS: dict[str, tuple[int, ...]] = {
    "BatchNorm1d": (2, 3),
    "BatchNorm2d": (4,),
    "BatchNorm3d": (5,),
    "SyncBatchNorm": (2, 3, 4, 5),
    "GhostBatchNorm": (2, 3, 4, 5, 6),
    "BatchRenorm": (2, 3, 4, 5),
    "FrozenBatchNorm": (2, 3, 4, 5),
}
DROPS: dict[str, tuple[int, ...]] = {
    "Dropout": (1, 2, 3, 4, 5),
    "Dropout1d": (2, 3),
    "Dropout2d": (3, 4),
    "Dropout3d": (4, 5),
    "AlphaDropout": (1, 2, 3, 4, 5),
    "FeatureAlphaDropout": (2, 3, 4, 5),
    "GaussianDropout": (1, 2, 3, 4, 5),
    "DropPath": (1, 2, 3, 4, 5),
}
ACTIVATIONS = (None, None, "relu", "leaky_relu", "silu", "gelu")


def keep_probability(p: float) -> float:
    """Return the probability of keeping an element, which has 16 or 32 bits."""
    kept: float = fusereg._C.dropout_constants(p, False)[2]
    return kept


class Failure(AssertionError):
    """A result that is wrong."""


class Case:
    """A call, by an instruction set and a number of threads."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.isa = rng.choice(fusereg._C.cpu_isas())
        self.threads = rng.choice((1, 1, 2, 3))

    def run(self) -> str:
        """Return how the call ended; raise Failure if it is wrong."""
        raise NotImplementedError


# --- tensors --------------------------------------------------------------------------------------


def laid_out(rng: random.Random, t: Tensor, writable: bool = False) -> Tensor:
    """Return the tensor's values in a random layout: any order of dimensions, strided, offset."""
    order = list(range(t.dim()))
    how = rng.randrange(8)
    if how < 4:
        rng.shuffle(order)
    elif how == 4 and t.dim() > 2:  # channels last
        order = [0, *order[2:], 1]
    elif how == 5 and t.dim() > 1:  # samples and channels exchanged
        order[0], order[1] = order[1], order[0]
    base = t.permute(order).contiguous()
    kind = rng.randrange(6)
    if kind == 0 and base.dim() and base.numel():  # every second element of something larger
        wide = torch.full((*base.shape[:-1], 2 * base.shape[-1] + 1), 7.0, dtype=t.dtype)
        base = wide[..., 1::2].copy_(base)
    elif kind == 1 and base.numel():  # not aligned
        flat = torch.full((base.numel() + 3,), 7.0, dtype=t.dtype)
        base = flat[3:].copy_(base.flatten()).view(base.shape)
    elif kind == 2 and not writable and base.dim() and base.shape[0]:
        base = base[:1].expand(base.shape)
    elif kind == 3 and not writable and base.is_floating_point():
        base = torch._neg_view(-base)
    return base.permute([order.index(d) for d in range(t.dim())])


def shape_of(rng: random.Random, dims: int) -> tuple[int, ...]:
    shape = [rng.choice(SIZES) for _ in range(dims)]
    while torch.Size(shape).numel() > MOST_ELEMENTS:
        largest = max(range(dims), key=lambda d: shape[d])
        shape[largest] = (shape[largest] + 1) // 2
    return tuple(shape)


# --- batch norm in float64 ------------------------------------------------------------------------


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.double().view(1, -1, *[1] * (x.dim() - 2))


class Norm(Case):
    """A call of a batch-norm layer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.kind = rng.choice(list(NORMS))
        self.dtype = rng.choice(DTYPES)
        self.shape = shape_of(rng, rng.choice(NORMS[self.kind]))
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        arguments: dict[str, Any] = {
            "eps": rng.choice((1e-5, 1e-3, 0.1)),
            "dtype": rng.choice((wide, self.dtype)),
            "bias": rng.random() < 0.8,
            "activation": rng.choice(ACTIVATIONS),
            "negative_slope": 0.2,
        }
        frozen = self.kind == "FrozenBatchNorm"
        if not frozen:
            arguments |= {
                "affine": rng.random() < 0.8,
                "momentum": rng.choice((0.1, 0.3, 1.0, 0.0, 1.5, -0.5, None)),
                "dropout": rng.choice((0.0, 0.0, 0.25, 1.0)),
                "update_stats": rng.random() < 0.8,
                "track_running_stats": self.kind == "BatchRenorm" or rng.random() < 0.8,
            }
        if self.kind == "GhostBatchNorm":
            arguments["virtual_batch_size"] = rng.choice((1, 2, 3, 4, 8))
        if self.kind == "BatchRenorm":
            arguments |= {"r_max": 1.1, "d_max": 0.5}
        self.inplace = not frozen and self.kind.startswith("BatchNorm") and rng.random() < 0.2
        if self.inplace:
            arguments |= {"inplace": True, "dropout": 0.0}
            arguments["activation"] = rng.choice((None, "leaky_relu"))
        self.arguments = arguments
        self.layer: Any = getattr(fusereg.nn, self.kind)(self.shape[1], **arguments)
        with torch.no_grad():
            for name, t in (*self.layer.named_parameters(), *self.layer.named_buffers()):
                if name == "running_var":
                    t.uniform_(0.5, 2.0)
                elif name != "num_batches_tracked":
                    t.copy_(torch.randn(t.shape) + 0.1)
        self.training = rng.random() < 0.7
        self.layer.train(self.training)
        if not frozen and self.kind != "BatchRenorm" and rng.random() < 0.15:
            self.layer.track_running_stats = not self.layer.track_running_stats
        if not frozen and rng.random() < 0.15 and self.layer.num_batches_tracked is not None:
            count = rng.choice((torch.float32, torch.int32, None))
            now = self.layer.num_batches_tracked
            self.layer.num_batches_tracked = None if count is None else now.to(count)
        if not self.use_batch() and rng.random() < 0.2:
            self.layer.eps = 0.0
        self.x = laid_out(rng, (torch.randn(self.shape) * 2 + 1).to(self.dtype), self.inplace)
        self.residual = self.mask = None
        if not self.inplace and rng.random() < 0.3:
            self.residual = laid_out(rng, torch.randn(self.shape).to(self.dtype))
        if not frozen and rng.random() < 0.3:
            flags = torch.rand(self.shape[0], *self.shape[2:]) < 0.7
            self.mask = laid_out(rng, flags)
        self.grads = rng.random() < 0.6

    def __str__(self) -> str:
        def lies(t: Tensor | None) -> str:
            return "none" if t is None else f"{tuple(t.shape)} {t.stride()}"

        return (
            f"{self.layer!r} {'training' if self.training else 'evaluation'}, {self.arguments}, "
            f"x {self.dtype} {lies(self.x)}, residual {lies(self.residual)}, mask {lies(self.mask)}"
        )

    # --- what is right ---

    def use_batch(self) -> bool:
        if self.kind == "FrozenBatchNorm":
            return False
        return self.training or self.layer.running_mean is None

    def refused(self) -> bool:
        """Whether the call must raise ValueError: one value per channel."""
        n, channels = self.shape[:2]
        if not self.use_batch() or not channels or not self.x.numel():
            return False
        each = self.x.numel() // n // channels
        if n * each == 1:
            return True
        size = (self.layer.virtual_batch_size if self.training else None) or n
        if (n % size or min(size, n)) * each == 1:
            return True
        return self.mask is not None and int(self.mask.sum()) == 1

    def normalized(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalize by the statistics of each group."""
        layer, dims = self.layer, [0, *range(2, x.dim())]
        if not self.use_batch():
            mean, var = per_channel(layer.running_mean, x), per_channel(layer.running_var, x)
            return (x - mean) / (var + layer.eps).sqrt()
        size = getattr(layer, "virtual_batch_size", None) if self.training else None
        parts = []
        size = size or max(len(x), 1)
        for part, valid in zip(x.split(size), mask.split(size), strict=True):
            count = valid[:, :1].sum().clamp_min(1)
            mean = (part * valid).sum(dims, keepdim=True) / count
            var = ((part - mean).square() * valid).sum(dims, keepdim=True) / count
            z = (part - mean) / (var + layer.eps).sqrt()
            if self.kind == "BatchRenorm" and self.training:
                running = (per_channel(layer.running_var, x) + layer.eps).sqrt()
                r = ((var + layer.eps).sqrt() / running).clamp(1 / 1.1, 1.1).detach()
                d = (mean - per_channel(layer.running_mean, x)) / running
                z = z * r + d.clamp(-0.5, 0.5).detach()
            parts.append(z)
        return torch.cat(parts) if parts else x

    def running(self) -> dict[str, Tensor]:
        """Return the buffers as they must be after the call."""
        layer = self.layer
        state = {n: b.detach().double() for n, b in layer.named_buffers()}
        updates = self.training and self.kind != "FrozenBatchNorm"
        if not (updates and layer.update_stats and layer.track_running_stats):
            return state
        count = state.get("num_batches_tracked")
        if count is not None:
            count = state["num_batches_tracked"] = count + 1
        momentum = layer.momentum
        if momentum is None:
            momentum = 0.0 if count is None else 1.0 / float(count)
        if "running_mean" not in state or not self.shape[1]:
            return state
        x = self.x.double().transpose(0, 1)
        values = x.flatten(1)
        if self.mask is not None:
            values = values[:, self.mask.flatten()]
        n = values.shape[1]
        if n > 0:
            state["running_mean"] = (1 - momentum) * state["running_mean"] + momentum * values.mean(
                1
            )
        if n > 1:
            state["running_var"] = (1 - momentum) * state["running_var"] + momentum * values.var(1)
        return state

    # --- the call ---

    def run(self) -> str:
        layer, rng = self.layer, self.rng
        x = self.x.detach()
        wanted_x = x.double().contiguous().requires_grad_(self.grads)
        parameters = {n: p.detach().double() for n, p in layer.named_parameters()}
        if self.kind == "FrozenBatchNorm":
            parameters = {
                n: b.double() for n, b in layer.named_buffers() if n in ("weight", "bias")
            }
        for p in parameters.values():
            p.requires_grad_()
        mask = torch.ones(self.shape[0], 1, *self.shape[2:], dtype=torch.bool)
        if self.mask is not None:
            mask = self.mask.contiguous().unsqueeze(1)
        z = self.normalized(wanted_x, mask)
        scale = z.detach() - z.detach() + 1.0
        if "weight" in parameters:
            z = z * per_channel(parameters["weight"], z)
        if "bias" in parameters:
            z = z + per_channel(parameters["bias"], z)
        if self.residual is not None:
            z = z + self.residual.double()
        y = {
            None: lambda t: t,
            "relu": torch.relu,
            "leaky_relu": lambda t: nn.functional.leaky_relu(t, 0.2),
            "silu": nn.functional.silu,
            "gelu": nn.functional.gelu,
        }[layer.activation](z)
        wanted = torch.where(mask, y, 0.0)
        running = self.running()
        more = {} if self.kind == "FrozenBatchNorm" else {"mask": self.mask}
        given = x.clone(memory_format=torch.preserve_format) if self.inplace else x
        leaf = given.requires_grad_(self.grads)
        into = leaf.clone(memory_format=torch.preserve_format) if self.inplace else leaf
        arguments = (into,) if self.residual is None else (into, self.residual)
        try:
            result = layer(*arguments, **more)
        except ValueError:
            if self.refused():
                return "refused"
            raise
        if self.refused():
            raise Failure("the call was not refused")
        if result.shape != wanted.shape or result.dtype is not self.dtype:
            raise Failure(f"the result is {result.dtype} of shape {tuple(result.shape)}")
        p = layer.dropout if self.training and self.kind != "FrozenBatchNorm" else 0.0
        if p:
            kept = keep_probability(p)
            dropped = (result.detach() == 0) & (wanted != 0)
            wanted = torch.where(dropped, 0.0, wanted / kept if kept else 0.0)
            # Of an element that is 0 either way nobody can tell, and these have no gradient.
        near("result", result, wanted, scale, self.dtype)
        for name, b in layer.named_buffers():
            near(name, b, running[name], torch.ones_like(running[name]), b.dtype)
        if not self.grads or p:
            return "right"
        self.compare_gradients(result, wanted, leaf, wanted_x, parameters, rng)
        return "right, with gradients"

    def compare_gradients(
        self,
        result: Tensor,
        wanted: Tensor,
        x: Tensor,
        wanted_x: Tensor,
        parameters: dict[str, Tensor],
        rng: random.Random,
    ) -> None:
        layer = self.layer
        grad = laid_out(rng, torch.randn(self.shape).to(self.dtype))
        ours = [x, *layer.parameters()]
        theirs = [wanted_x, *(parameters[n] for n, _ in layer.named_parameters())]
        found = torch.autograd.grad(result, ours, grad, allow_unused=True)
        right = torch.autograd.grad(
            wanted, theirs, grad.double().contiguous(), allow_unused=True, materialize_grads=True
        )
        length = max(1.0, wanted.numel() / max(1, self.shape[1])) ** 0.5
        loss = 40.0 if self.inplace else 1.0
        for i, (g, r) in enumerate(zip(found, right, strict=True)):
            if g is None:
                raise Failure("a gradient is missing")
            # Differences of terms as large as 1 / sqrt(eps), or sums of many.
            size = loss * (length if i else self.steepness())
            near(f"gradient {i}", g, r, torch.full_like(r, size), self.dtype, g.dtype)

    def steepness(self) -> float:
        """Return the largest factor between a gradient of the result and one of x, about."""
        layer, x = self.layer, self.x.detach().double()
        weight = getattr(layer, "weight", None)
        size = 1.0 if weight is None or not weight.numel() else float(weight.detach().abs().max())
        return 4.0 * max(1.0, size) * (float(layer.eps) + 1e-2) ** -0.5 if x.numel() else 1.0


def near(
    name: str,
    found: Tensor,
    wanted: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    own: torch.dtype | None = None,
) -> None:
    """Raise if a tensor is far from what it should be, compared with the largest numbers in it."""
    found = found.detach().double()
    wanted = wanted.detach().double()
    if found.shape != wanted.shape:
        raise Failure(f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if not found.numel():
        return
    tolerance = max(conftest.TOLERANCES.get(d, 0.0) for d in (dtype, own or dtype))
    size = max(1.0, float(wanted.abs().max()), float(scale.abs().max()))
    error = float((found - wanted).abs().max())
    if not error <= 8.0 * tolerance * size:
        raise Failure(
            f"{name} is off by {error:.3g}, where {8.0 * tolerance * size:.3g} is allowed"
        )


# --- layers that draw -----------------------------------------------------------------------------


class Drop(Case):
    """A call of a layer that drops."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.kind = rng.choice(list(DROPS))
        self.dtype = rng.choice(DTYPES)
        self.shape = shape_of(rng, rng.choice(DROPS[self.kind]))
        self.p = rng.choice((0.0, 0.001, 0.25, 0.5, 0.9))
        self.layer: Any = getattr(fusereg.nn, self.kind)(self.p)
        self.training = rng.random() < 0.7
        self.layer.train(self.training)
        self.x = laid_out(rng, (torch.rand(self.shape) + 0.5).to(self.dtype))
        self.grad = laid_out(rng, torch.randn(self.shape).to(self.dtype))

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"{self.layer!r} {mode}, x {self.dtype} {self.shape} {self.x.stride()}"

    def run(self) -> str:
        x = self.x.detach().requires_grad_()
        y = self.layer(x)
        if y.shape != x.shape or y.dtype is not x.dtype:
            raise Failure(f"the result is {y.dtype} of shape {tuple(y.shape)}")
        (grad,) = torch.autograd.grad(y, x, self.grad)
        if not self.training or self.p == 0.0:
            if not torch.equal(y, x) or not torch.equal(grad, self.grad):
                raise Failure("the identity changes something")
            return "the identity"
        if not (y.isfinite().all() and grad.isfinite().all()):
            raise Failure("a number is not finite")
        if "Alpha" not in self.kind and self.kind != "GaussianDropout":
            kept = y != 0
            scaled = x.detach().double() / keep_probability(self.p)
            near("result", y, torch.where(kept, scaled, 0.0), torch.ones(1), self.dtype)
            scaled = self.grad.double() / keep_probability(self.p)
            near("gradient", grad, torch.where(kept, scaled, 0.0), torch.ones(1), self.dtype)
        return "dropped"


# --- running them ---------------------------------------------------------------------------------


def case_of(seed: int, index: int) -> Case:
    """Return the case of this number."""
    rng = random.Random(f"{seed}:{index}")
    torch.manual_seed(rng.getrandbits(32))
    return Norm(rng) if rng.random() < 0.75 else Drop(rng)


def run(
    seed: int, indices: range, progress: Path | None = None
) -> tuple[dict[str, int], list[str]]:
    """Run the cases of these numbers; return how they ended, and what failed."""
    ends: dict[str, int] = {}
    failures = []
    threads, isa = torch.get_num_threads(), fusereg._C.cpu_isa()
    file = None if progress is None else os.open(progress, os.O_WRONLY | os.O_CREAT)
    try:
        for index in indices:
            if file is not None:
                os.pwrite(file, str(index).ljust(20).encode(), 0)
            case = case_of(seed, index)
            fusereg._C.set_cpu_isa(case.isa)
            torch.set_num_threads(case.threads)
            try:
                end = case.run()
            except Exception as error:
                failures.append(f"--- {index} {type(error).__name__}: {error}\n{case}")
                end = "failed"
            ends[end] = ends.get(end, 0) + 1
    finally:
        torch.set_num_threads(threads)
        fusereg._C.set_cpu_isa(isa)
    return ends, failures


def main() -> int:
    parse = argparse.ArgumentParser()
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--cases", type=int, default=1000)
    parse.add_argument("--only", type=int, help="the number of one case, to see it in words")
    parse.add_argument("--progress", type=Path)
    options = parse.parse_args()
    faulthandler.enable()
    if options.only is not None:
        print(case_of(options.seed, options.only), flush=True)
        indices = range(options.only, options.only + 1)
    else:
        indices = range(options.cases)
    ends, failures = run(options.seed, indices, options.progress)
    print(*failures, sep="\n")
    print(ends)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
