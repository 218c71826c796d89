"""Batch normalization's values on every backend, against float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusereg
from conftest import TOLERANCES, Backend
from fusereg import functional as F

#: (N, C, ...): one line shorter and longer than a block, more channels than a tile has, odd ones.
SHAPES = [
    (8, 64),
    (33, 5),
    (16, 5, 33),
    (4, 3, 5, 7),
    (3, 70, 4, 4),
    (5, 17, 1, 1),
    (3, 1, 6, 7),
    (2, 3, 3, 4, 5),
]

ACTIVATIONS = [None, "relu", "leaky_relu"]
SMOOTH = ["silu", "gelu"]
SLOPE = 0.2


class Case(NamedTuple):
    """Everything that a call takes, in the dtype that is tested."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    gradient: Tensor


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: Backend,
    channels_last: bool = False,
    residual: bool = False,
    parameters: torch.dtype | None = None,
) -> Case:
    """Random numbers, the same for each dtype but for rounding."""
    channels = shape[1]
    if parameters is None:
        parameters = torch.float64 if dtype is torch.float64 else torch.float32

    def laid_out(t: Tensor) -> Tensor:
        t = t.to(dtype).to(backend.device)
        if channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            t = t.contiguous(memory_format=formats[t.dim()])
        return t

    def elements() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def vector() -> Tensor:
        return torch.randn(channels, dtype=torch.float64).to(parameters).to(backend.device)

    return Case(
        laid_out(3 * elements() + torch.randn(channels).view(-1, *[1] * (len(shape) - 2))),
        laid_out(elements()) if residual else None,
        vector(),
        vector(),
        vector(),
        vector().abs() + 0.5,
        laid_out(elements()),
    )


def activate(z: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return z.relu()
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, SLOPE)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    return z


def exact(case: Case, training: bool, activation: str | None) -> dict[str, Tensor]:
    """Results and gradients in float64."""
    inputs = {
        name: getattr(case, name).detach().double().cpu().contiguous().requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if getattr(case, name) is not None
    }
    mean, var = (t.cpu().to(torch.float64, copy=True) for t in (case.mean, case.var))
    z = torch.nn.functional.batch_norm(
        inputs["x"], mean, var, inputs["weight"], inputs["bias"], training, 0.3, 1e-3
    )
    if "residual" in inputs:
        z = z + inputs["residual"]
    y = activate(z, activation)
    gradients = torch.autograd.grad(y, list(inputs.values()), case.gradient.double().cpu())
    found = {f"grad_{k}": g for k, g in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "mean": mean, "var": var, **found}


def ours(case: Case, training: bool, activation: str | None, **more: Any) -> dict[str, Tensor]:
    inputs = {
        name: getattr(case, name).detach().clone(memory_format=torch.preserve_format)
        for name in ("x", "weight", "bias", "residual")
        if getattr(case, name) is not None
    }
    for t in inputs.values():
        t.requires_grad_()
    mean, var = case.mean.clone(), case.var.clone()
    y = F.batch_norm(
        inputs["x"],
        mean,
        var,
        inputs["weight"],
        inputs["bias"],
        training,
        0.3,
        1e-3,
        activation=activation,
        residual=inputs.get("residual"),
        negative_slope=SLOPE,
        **more,
    )
    gradients = torch.autograd.grad(y, list(inputs.values()), case.gradient)
    found = {f"grad_{k}": g for k, g in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "mean": mean, "var": var, **found}


def assert_near(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, factor: float = 2.0
) -> None:
    """Relative to the largest element; sums over a channel to the root of their length as well."""
    length = wanted["y"].numel() / wanted["y"].shape[1]
    for name, t in found.items():
        limit = TOLERANCES[t.dtype if t.dtype is not torch.float64 else dtype] * factor
        reference = wanted[name]
        assert t.shape == reference.shape, name
        if reference.numel():
            scale = float(reference.abs().max())
            if name in ("grad_weight", "grad_bias"):
                scale = max(scale, length**0.5)
            error = float((t.double().cpu() - reference).abs().max()) / max(scale, 1e-30)
            assert error <= limit, (name, error, limit)


@pytest.mark.sanitizer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], training: bool, dtype: torch.dtype, backend: Backend
) -> None:
    layouts = [False, True] if len(shape) > 3 else [False]
    for channels_last, activation, residual in itertools.product(
        layouts, ACTIVATIONS, (False, True) if training else (True,)
    ):
        case = make(shape, dtype, backend, channels_last, residual)
        found = ours(case, training, activation)
        assert found["y"].dtype is dtype
        if case.x.is_cuda:
            assert found["y"].stride() == case.x.stride()
        else:
            theirs = torch.nn.functional.batch_norm(case.x, None, None, training=True)
            assert found["y"].stride() == theirs.stride()
        assert_near(found, exact(case, training, activation), dtype)


def test_threads_and_instruction_sets_do_not_change_a_bit(backend: Backend) -> None:
    shapes = (
        [(6, 3, 40, 41), (9, 70, 7, 7)]
        if backend.on_host
        else [(40, 3, 90, 91), (64, 70, 14, 14), (64, 64, 12, 14)]
    )
    before = torch.get_num_threads()
    for shape, channels_last in itertools.product(shapes, (False, True)):
        case = make(shape, torch.float32, backend, channels_last, True)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ours(case, True, "relu"))
        torch.set_num_threads(before)
        if backend.isa is not None:
            fusereg._C.set_cpu_isa("baseline")
            results.append(ours(case, True, "relu"))
            fusereg._C.set_cpu_isa(backend.isa)
        for other in results[1:]:
            for name, t in results[0].items():
                assert torch.equal(t, other[name]), (name, shape, channels_last)


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations(activation: str, dtype: torch.dtype, backend: Backend) -> None:
    for shape, residual in itertools.product([(9, 40), (4, 3, 5, 7)], (False, True)):
        case = make(shape, dtype, backend, residual=residual)
        assert_near(ours(case, True, activation), exact(case, True, activation), dtype)


def test_many_channels_and_long_lines(backend: Backend) -> None:
    """More than a tile of channels, more than a strip of a line, more than one tile of rows."""
    shapes = [(3, 1100), (2, 3, 1500), (70, 2, 300)]
    if not backend.on_host:
        shapes += [(2500, 33), (40, 600, 9), (9, 3, 20_000)]
    for shape in shapes:
        case = make(shape, torch.float32, backend, residual=True)
        assert_near(ours(case, True, "relu"), exact(case, True, "relu"), torch.float32)


#: Elements of a line; rows and channels: lines of several channels are one for the CPU's kernels,
#: of whole lines of the cache or not, in one tile or several, with a last group of few rows.
SHORT = [2, 9, 16, 31, 36, 49, 100, 196, 257, 784]


@pytest.mark.parametrize("inner", SHORT)
def test_short_lines_of_several_channels(inner: int, dtype: torch.dtype, backend: Backend) -> None:
    shapes = [(31, 19), (32, 70), (90, 35), *([(33, 300)] if inner == 9 else [])]
    if backend.on_host or inner > 257:
        shapes = [(6, 3), (33, 19)]
    ways = [(None, False), ("relu", False), ("relu", True)]
    for (rows, channels), (activation, residual) in itertools.product(shapes, ways):
        case = make((rows, channels, inner), dtype, backend, residual=residual)
        # Among so many elements there is one whose z is 0 but for its rounding.
        near_zero = exact(case, True, None)["y"].abs() < 1e-4
        case.gradient.masked_fill_(near_zero.to(case.gradient.device), 0)
        found = ours(case, True, activation)
        assert_near(found, exact(case, True, activation), dtype)
        if backend.isa in (None, "baseline"):
            continue
        fusereg._C.set_cpu_isa("baseline")
        for name, t in ours(case, True, activation).items():
            assert torch.equal(t, found[name]), (name, rows, channels, activation)
        fusereg._C.set_cpu_isa(backend.isa)


def test_signs_kept_of_short_lines_are_read_by_every_kernel(backend: Backend) -> None:
    """The gradient of the residual alone is another kernel's, from the same bits."""
    for inner in (36, 49, 64, 100):
        case = make((40, 37, inner), torch.float32, backend, residual=True)
        assert case.residual is not None
        residual = case.residual.clone().requires_grad_()
        y = F.batch_norm(
            case.x, None, None, case.weight, case.bias, True, activation="relu", residual=residual
        )
        (alone,) = torch.autograd.grad(y, [residual], case.gradient)
        assert torch.equal(alone, case.gradient * (y > 0))


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1e1, 1e3, 1e5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_far_from_zero(ratio: float, channels_last: bool, backend: Backend) -> None:
    """Mean / std up to 1e5: the deviation is as exact as x itself allows."""
    shape = (4, 3, 9, 11) if backend.on_host else (16, 3, 33, 35)
    case = make(shape, torch.float32, backend, channels_last)
    case = case._replace(x=(case.x * 0.3 + 0.3 * ratio).to(torch.float32))
    for mean_factor in (1.0, 0.0):  # the running mean: near the mean, and far from it
        case = case._replace(mean=case.mean * mean_factor)
        wanted = exact(case, True, None)
        found = ours(case, True, None)
        assert_near({k: found[k] for k in ("y", "grad_x", "mean", "var")}, wanted, torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_first_element_far_from_the_others(channels_last: bool, backend: Backend) -> None:
    """What the sums are taken about comes from a few elements: they may mislead."""
    case = make((6, 3, 20, 21), torch.float32, backend, channels_last)
    case.x[0, :, :2] += 1e4
    case.x[0, 1, 0, 0] = 3e7
    assert_near(ours(case, True, "relu"), exact(case, True, "relu"), torch.float32)


def test_constant_channels_and_huge_values(backend: Backend) -> None:
    x = torch.full((5, 3, 4), 1234.56, device=backend.device)
    y = F.batch_norm(x, None, None)
    assert torch.equal(y, torch.zeros_like(y))
    huge = torch.randn(50, 2, 3, dtype=torch.float64) * 1e25
    y = F.batch_norm(huge.float().to(backend.device), None, None)
    wanted = torch.nn.functional.batch_norm(huge.float().double(), None, None, training=True)
    assert torch.allclose(y.double().cpu(), wanted, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_inf_stay_in_their_channel(
    bad: float, channels_last: bool, backend: Backend
) -> None:
    case = make((4, 5, 6, 7), torch.float32, backend, channels_last)
    clean = ours(case, True, "relu")
    x = case.x.clone(memory_format=torch.preserve_format)
    x[1, 2, 3, 3] = bad
    dirty = ours(case._replace(x=x), True, "relu")
    others = [0, 1, 3, 4]
    for name in ("y", "grad_x"):
        assert torch.equal(dirty[name][:, others], clean[name][:, others]), name
    for name in ("mean", "var", "grad_weight", "grad_bias"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
    assert dirty["y"][:, 2].isnan().any()
    assert dirty["var"][2].isnan()


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(33, 5), (3, 5, 70), (4, 19, 5, 7)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", *SMOOTH])
def test_the_gradient_passes_a_nan_as_in_torch(
    activation: str, residual: bool, shape: tuple[int, ...], dtype: torch.dtype, backend: Backend
) -> None:
    """A ReLU passes it on whole, a leaky ReLU times the slope, smooth ones make it NaN."""
    for training, channels_last in itertools.product((False, True), (False, len(shape) == 4)):
        case = make(shape, dtype, backend, channels_last, residual)
        dirty = case.x if case.residual is None else case.residual
        lines = dirty.transpose(0, 1).flatten(1)  # a copy
        for channel, element in ((0, 0), (1, 7), (3, -1), (4, 11)):
            lines[channel, element] = float("nan")
        dirty.copy_(lines.view(dirty.transpose(0, 1).shape).transpose(0, 1))
        found, wanted = ours(case, training, activation), exact(case, training, activation)
        assert wanted["grad_bias"].isnan().any() == (activation in SMOOTH)
        if not backend.name.startswith("cuda"):
            # In evaluation a NaN of x has no gradient on the CPU, which docs/migration.md says.
            wanted["grad_x"] = torch.where(case.x.cpu().isnan(), torch.nan, wanted["grad_x"])
        for name, t in wanted.items():
            assert torch.equal(found[name].cpu().isnan(), t.isnan()), name
        finite = [{k: t.nan_to_num() for k, t in of.items()} for of in (found, wanted)]
        assert_near(finite[0], finite[1], dtype)


# --- dropout, masks, layouts ----------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.75, 0.001, 1.0])
def test_dropout_is_dropout_of_the_result(
    p: float, activation: str | None, dtype: torch.dtype, backend: Backend
) -> None:
    for shape, channels_last, residual in (
        ((3, 5, 6, 7), False, True),
        ((3, 5, 6, 7), True, True),
        ((2, 3, 600), False, False),
        ((9, 40), False, False),
    ):
        case = make(shape, dtype, backend, channels_last, residual)
        found = ours(case, True, activation, dropout=p, seed=7)
        # The gradient of what is dropped is dropped.
        dropped = F.dropout(case.gradient.double(), p, seed=7)
        wanted = exact(case._replace(gradient=dropped), True, activation)
        factors = F.dropout(torch.ones_like(case.x, dtype=torch.float64), p, seed=7)
        wanted["y"] = wanted["y"] * factors.cpu()
        assert_near(found, wanted, dtype)
        assert torch.equal(found["y"][factors == 0], torch.zeros_like(found["y"][factors == 0]))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_masked_elements_belong_to_nothing(activation: str | None, backend: Backend) -> None:
    for shape, channels_last in (((4, 3, 40), False), ((4, 3, 6, 7), True), ((5, 2, 300), False)):
        case = make(shape, torch.float32, backend, channels_last, True)
        keep = torch.rand(shape[0], *shape[2:]) > 0.4
        every = keep.unsqueeze(1).expand(shape).to(case.x.device)
        rubbish = case.x.masked_fill(~every, float("nan"))
        found = ours(
            case._replace(x=rubbish, residual=case.residual.masked_fill(~every, float("inf"))),  # type: ignore[union-attr]
            True,
            activation,
            mask=keep.to(case.x.device),
        )

        def packed(t: Tensor, keep: Tensor = keep) -> Tensor:
            return t.movedim(1, -1)[keep.to(t.device)]

        alone = Case(
            *(None if t is None else packed(t) for t in case[:2]), *case[2:6], packed(case.gradient)
        )  # type: ignore[arg-type]
        wanted = exact(alone, True, activation)
        for name in ("y", "grad_x", "grad_residual"):
            assert not found[name][~every].any(), name
            found[name] = packed(found[name])
        assert_near(found, wanted, torch.float32, 4.0)


LAYOUTS = {
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "permuted": lambda t: t.permute(2, 1, 3, 0),
    "swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: t[:, :, 1:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "negated": lambda t: torch.complex(t, t).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: Backend) -> None:
    base = make((4, 5, 6, 7), torch.float32, backend)
    x = LAYOUTS[layout](base.x)
    residual = torch.randn(x.shape, device=x.device)
    case = base._replace(x=x, residual=residual, gradient=torch.randn(x.shape, device=x.device))
    for gradient in (case.gradient, torch.ones((), device=x.device).expand(x.shape)):
        case = case._replace(gradient=gradient)
        for activation in ("relu", "silu"):
            found = ours(case, True, activation)
            assert_near(found, exact(case, True, activation), torch.float32)


def test_out_may_be_the_input_or_the_residual(backend: Backend) -> None:
    for channels_last in (False, True):
        case = make((3, 5, 6, 7), torch.float32, backend, channels_last, True)
        wanted = F.batch_norm(case.x, None, None, residual=case.residual, activation="relu")
        for target in ("new", "x", "residual"):
            x, residual = case.x.clone(), case.residual.clone()  # type: ignore[union-attr]
            out = {"new": torch.empty_like(x), "x": x, "residual": residual}[target]
            y = F.batch_norm(x, None, None, residual=residual, activation="relu", out=out)
            assert y is out
            assert torch.equal(y, wanted)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(4)}, ValueError, "input must have at least 2 dimensions"),
        (
            {"input": torch.zeros(4, 3, dtype=torch.int32)},
            ValueError,
            "input has dtype torch.int32",
        ),
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
        ({"input": torch.zeros(1, 3)}, ValueError, "more than 1 value per channel"),
        ({"input": torch.zeros(4, 2)}, ValueError, "input has 2 channels, but running_mean has 3"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight must have shape \(3,\), got \(3, 1\)"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3,\), got \(2,\)"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor or None, got float"),
        ({"weight": torch.ones(3).double()}, ValueError, "weight must be float32 for float32 x"),
        (
            {"bias": torch.ones(3, device="meta")},
            ValueError,
            "bias must be on cpu as input, got meta",
        ),
        ({"running_var": torch.ones(3).half()}, ValueError, None),
        ({"eps": 0.0}, ValueError, "eps must be positive in training, got 0.0"),
        ({"eps": -1.0, "training": False}, ValueError, "eps must be at least 0, got -1.0"),
        ({"momentum": float("nan")}, ValueError, "momentum must be a number or None, got nan"),
        ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
        ({"dropout": 2.0}, ValueError, r"dropout must be within \[0, 1\], got 2.0"),
        ({"residual": torch.zeros(4, 3).double()}, ValueError, "residual must be torch.float32"),
        (
            {"residual": torch.zeros(4, 2)},
            ValueError,
            r"residual must have shape \(4, 3\), got \(4, 2\)",
        ),
        ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor, got float"),
        ({"mask": torch.ones(4)}, ValueError, r"mask must be torch.bool of shape \(4,\)"),
        ({"num_batches_tracked": 3}, TypeError, "num_batches_tracked must be a torch.Tensor"),
    ],
    ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
)
def test_errors_are_named_and_write_nothing(
    change: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(4, 3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        **change,
    }
    with pytest.raises(error, match=r"fusereg\.batch_norm: .*" + (message or "running_var")):
        F.batch_norm(**arguments)
    assert torch.equal(arguments["running_mean"], torch.zeros(3))
    assert torch.equal(arguments["running_var"].float(), torch.ones(3))


def test_a_layer_blames_its_input_for_its_channels() -> None:
    kinds = ("BatchNorm1d", "GhostBatchNorm", "BatchRenorm", "FrozenBatchNorm", "SyncBatchNorm")
    for kind in kinds:
        with pytest.raises(ValueError, match="input has 4 channels, this layer 8"):
            getattr(fusereg.nn, kind)(8)(torch.randn(2, 4, 3))
