"""Dropout's values and masks on every backend, against plain Python and float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusereg
import reference_philox
from conftest import SEED, Backend
from conftest import make_nonzero as make
from fusereg import functional as F
from fusereg import nn

#: Around a chunk (8, or 128), around the vector blocks (16 to 128), around a vector of bits (1024),
#: more than one unit of work a thread.
SIZES = [0, 1, 7, 8, 9, 31, 33, 127, 129, 1003, 1025]

#: Draws of one and of two digits, of 16 bits, of 32 (too fine or too coarse for 16); nothing kept.
PROBABILITIES = [0.5, 0.25, 0.75, 0.1, 0.001, 0.9997, 1e-9, 1.0]


#: For which the product of some numbers of bfloat16 and the scale lies in the middle between two.
P_WITH_TIES = 15647 / 2**16


def scaled(x: Tensor, p: float) -> Tensor:
    """What a kept element becomes: rounded as the kernels round."""
    keep = reference_philox.keep_probability(p)
    if keep == 0.0:
        return torch.zeros_like(x)
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    return (x.to(compute) * torch.tensor(1.0 / keep, dtype=compute, device=x.device)).to(x.dtype)


def assert_dropped(y: Tensor, x: Tensor, mask: Tensor, p: float) -> None:
    """Y is x scaled where the mask says so and +0.0 elsewhere, bit for bit."""
    wanted = torch.where(mask.to(x.device), scaled(x, p), torch.zeros_like(x))
    assert y.dtype is x.dtype
    assert torch.equal(y, wanted)
    assert not torch.signbit(y[~mask.to(x.device)]).any()


# --- the mask -------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", PROBABILITIES)
def test_mask_and_values(p: float, dtype: torch.dtype, backend: Backend) -> None:
    for n in SIZES:
        x = make((n,), dtype, backend)
        mask = reference_philox.mask(n, p, SEED, 0)
        assert_dropped(F.dropout(x, p, seed=SEED), x, mask, p)


@pytest.mark.parametrize("p", [0.5, 0.75, 0.1, 0.001])
# Before 2**34 and 2**35 the number of a chunk, of 4 or of 8 elements, comes to 2**32.
@pytest.mark.parametrize(
    "index_offset", [1, 8, 100, 1000, 2**32 - 3, 2**34 - 90, 2**35 - 90, 2**40 + 5, 2**62]
)
def test_index_offset_gives_a_shard_its_part(p: float, index_offset: int, backend: Backend) -> None:
    x = make((201,), torch.float32, backend)
    y = F.dropout(x, p, seed=SEED, index_offset=index_offset)
    assert_dropped(y, x, reference_philox.mask(201, p, SEED, 0, index_offset), p)


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_shards_give_the_whole_mask(p: float, dtype: torch.dtype, backend: Backend) -> None:
    x = make((6, 77), dtype, backend)
    whole = F.dropout(x, p, seed=SEED)
    cuts = [0, 1, 3, 6]
    for a, b in itertools.pairwise(cuts):
        shard = F.dropout(x[a:b], p, seed=SEED, index_offset=77 * a)
        assert torch.equal(shard, whole[a:b])


def test_a_pair_read_by_pointer_is_the_pair(backend: Backend) -> None:
    x = make((100,), torch.float32, backend)
    for seed, offset in ((5, 0), (-7, 12), (2**62, -4)):
        pair = torch.tensor([seed, offset], device=backend.device)
        mask = reference_philox.mask(100, 0.5, seed, offset)
        assert_dropped(F.dropout(x, 0.5, seed=pair), x, mask, 0.5)


def test_dropout_mask(backend: Backend) -> None:
    mask = fusereg.dropout_mask((7, 11), 0.3, SEED, 8, index_offset=3, device=backend.device)
    assert mask.dtype is torch.bool
    assert torch.equal(mask.cpu().flatten(), reference_philox.mask(77, 0.3, SEED, 8, 3))
    assert fusereg.dropout_mask((5,), 0.0, 1).all()
    assert not fusereg.dropout_mask((5,), 1.0, 1).any()
    assert fusereg.dropout_mask((0, 3), 0.5, 1).shape == (0, 3)
    with pytest.raises(ValueError, match=r"fusereg.dropout_mask: shape .* got \(2, -1\)"):
        fusereg.dropout_mask((2, -1), 0.5, 1)


def test_the_effective_probability() -> None:
    some = (0.5, 0.25, 0.75, 0.125, 0.1, 0.3, 0.999, 1 - 1e-7, 1 - 1e-15, 1.0)
    for p in (*some, 1e-3, 1e-5, 1e-12, 1e-17, 5e-324, 2**-16):
        bits, limit, keep, *_ = fusereg._C.dropout_constants(p, False)
        assert (bits, limit) == reference_philox.threshold(p)
        assert keep == reference_philox.keep_probability(p)
        if 1e-9 < p < 1 - 1e-9:
            assert abs(keep - (1 - p)) <= min(p, 1 - p) / 1024 + 2**-33
    for p, bits in ((0.5, 1), (0.25, 2), (0.75, 2), (0.1, 16), (0.125, 16), (0.001, 32)):
        assert fusereg._C.dropout_constants(p, False)[0] == bits
    with pytest.raises(ValueError, match="p must be within"):
        fusereg._C.dropout_constants(0.0, False)


@pytest.mark.parametrize("p", [1e-16, 1e-17, 5e-324])
def test_a_p_that_1_minus_p_does_not_show_keeps_what_is_there(p: float, backend: Backend) -> None:
    x = make((2, 3, 8, 8), torch.float32, backend)
    for kind in (F.dropout, F.dropout2d, F.drop_path, F.alpha_dropout, F.feature_alpha_dropout):
        assert torch.equal(kind(x, p, True, seed=SEED), x)
    assert torch.equal(F.drop_block2d(x, p, 3, seed=SEED), x)
    added = F.bias_dropout_add(x, None, torch.zeros_like(x), p, seed=SEED)
    assert torch.equal(added, x)
    _, added = F.dropout_add_rms_norm(x, None, None, p, seed=SEED, return_sum=True)
    assert torch.equal(added, x)


def free_memory() -> int:
    """Bytes; 0 where nobody says."""
    try:
        with open("/proc/meminfo") as lines:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except OSError:
        return 0
    return found.get("MemAvailable", 0)


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 7 << 30, reason="needs 7 GB of free memory")
def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 1001
    x = torch.ones(n, dtype=torch.bfloat16)
    F.dropout(x, 0.5, inplace=True, seed=SEED)
    for at in (0, 2**31 - 500, n - 1000):
        mask = reference_philox.mask(1000, 0.5, SEED, 0, at)
        assert_dropped(x[at : at + 1000], torch.ones(1000, dtype=x.dtype), mask, 0.5)


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "sliced": lambda t: t[:, :, 1:, ::2],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "negated": lambda t: torch.complex(t, t).conj().imag if t.dtype is torch.float32 else -t,
}


#: What no vector fits is dropped in windows of 256 elements, which begin at a group of 8 draws.
WINDOWS = [1, 8, 250, 256, 263, 264, 519, 1031]


def misaligned(t: Tensor) -> Tensor:
    """A copy off a 16-byte boundary, with the same strides."""
    memory = t.new_empty(t.numel() + 1)[1:]
    return memory.as_strided(t.shape, t.stride(), 1).copy_(t)


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 0.001])
def test_misaligned_elements(p: float, dtype: torch.dtype, backend: Backend) -> None:
    for n in WINDOWS:
        for index_offset in (0, 3):
            x = misaligned(make((n,), dtype, backend))
            mask = reference_philox.mask(n, p, SEED, 0, index_offset)
            y = F.dropout(x, p, seed=SEED, index_offset=index_offset)
            assert_dropped(y, x, mask, p)
            F.dropout(x, p, seed=SEED, index_offset=index_offset, inplace=True)
            assert torch.equal(x, y)


def in_memory_order(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie."""
    return t.as_strided((t.numel(),), (1,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: Backend) -> None:
    x = LAYOUTS[layout](make((3, 5, 4, 6), dtype, backend))
    laid_out = torch.empty_like(x).copy_(x)
    mask = reference_philox.mask(x.numel(), 0.4, SEED, 0)
    y = F.dropout(x, 0.4, seed=SEED)
    assert y.stride() == torch.empty_like(x).stride()
    assert_dropped(in_memory_order(y), in_memory_order(laid_out), mask, 0.4)
    # Backward walks any gradient in the same order.
    for gradient in (torch.ones_like(y), torch.ones((), dtype=dtype).expand(x.shape)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        F.dropout(leaf, 0.4, seed=SEED).backward(gradient.to(x.device))
        assert leaf.grad is not None
        assert torch.equal(leaf.grad != 0, y != 0)


def test_backward_with_a_gradient_of_another_layout(backend: Backend) -> None:
    x = make((2, 3, 4, 5), torch.float32, backend).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = F.dropout(x, 0.5)
    gradient = make((2, 3, 4, 5), torch.float32, backend)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(y != 0, 2 * gradient, 0.0))


# --- rows -----------------------------------------------------------------------------------------

ROW_KINDS: list[tuple[Callable[..., Tensor], tuple[int, ...], int]] = [
    (F.dropout1d, (6, 5), 1),
    (F.dropout1d, (3, 5, 7), 2),
    (F.dropout2d, (3, 5, 7), 2),
    (F.dropout2d, (3, 8, 4, 6), 2),
    (F.dropout2d, (2, 5, 1, 1), 2),
    (F.dropout3d, (5, 2, 3, 4), 1),
    (F.dropout3d, (3, 5, 2, 3, 4), 2),
    (F.drop_path, (9, 33), 1),
    (F.drop_path, (9,), 1),
    (F.drop_path, (3, 5, 4, 6), 1),
    (F.dropout2d, (0, 5, 2, 2), 2),
    (F.dropout2d, (2, 5, 0, 2), 2),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("kind", "shape", "dims"), ROW_KINDS, ids=lambda v: getattr(v, "__name__", str(v))
)
@pytest.mark.parametrize("p", [0.4, 0.9997])
def test_rows(
    kind: Callable[..., Tensor],
    shape: tuple[int, ...],
    dims: int,
    p: float,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    rows = math.prod(shape[:dims])
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if len(shape) == 4 else []
    formats += [torch.channels_last_3d] if len(shape) == 5 else []
    for index_offset in (0, 8, 13):
        mask = reference_philox.mask(rows, p, SEED, 0, index_offset)
        mask = mask.view(*shape[:dims], *[1] * (len(shape) - dims)).expand(shape)
        for memory_format in formats:
            x = make(shape, dtype, backend).contiguous(memory_format=memory_format)
            x.requires_grad_()
            y = kind(x, p, seed=SEED, index_offset=index_offset)
            assert y.stride() == torch.empty_like(x).stride()
            assert_dropped(y.detach(), x.detach(), mask, p)
            y.backward(x.detach())
            assert x.grad is not None
            assert_dropped(x.grad, x.detach(), mask, p)


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.4, 0.5, 0.001])
@pytest.mark.parametrize(
    ("kind", "shape", "dims"),
    [
        (F.drop_path, (9, 61), 1),
        (F.drop_path, (300, 3), 1),
        (F.dropout2d, (3, 5, 9, 13), 2),
        (F.dropout2d, (2, 11, 7, 7), 2),
        (F.dropout2d, (2, 300, 2, 1), 2),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_misaligned_rows(
    kind: Callable[..., Tensor],
    shape: tuple[int, ...],
    dims: int,
    p: float,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    check_rows(kind, shape, dims, p, backend, dtype, misaligned)


# More elements than a grid takes at once, on a device of up to four multiprocessors.
@pytest.mark.parametrize("move", [lambda t: t, misaligned], ids=["aligned", "misaligned"])
def test_many_ragged_rows(move: Callable[[Tensor], Tensor], backend: Backend) -> None:
    for shape in ((1, 53, 71, 73), (531, 3, 13, 13)):
        check_rows(F.dropout2d, shape, 2, 0.5, backend, torch.bfloat16, move)


def check_rows(
    kind: Callable[..., Tensor],
    shape: tuple[int, ...],
    dims: int,
    p: float,
    backend: Backend,
    dtype: torch.dtype,
    move: Callable[[Tensor], Tensor],
) -> None:
    mask = reference_philox.mask(math.prod(shape[:dims]), p, SEED, 0, 13)
    mask = mask.view(*shape[:dims], *[1] * (len(shape) - dims)).expand(shape)
    formats = [torch.contiguous_format, *[torch.channels_last] * (len(shape) == 4)]
    for memory_format in formats:
        x = move(make(shape, dtype, backend).contiguous(memory_format=memory_format))
        assert_dropped(kind(x, p, seed=SEED, index_offset=13), x, mask, p)


def test_rows_in_other_layouts(backend: Backend) -> None:
    x = make((4, 6, 3, 5), torch.float32, backend)
    wanted = F.dropout2d(x, 0.4, seed=SEED)
    others = [
        x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        torch.cat([x, x], 3)[..., :5],
        x[:, :1].expand(4, 6, 3, 5),
    ]
    for other in others[:2]:
        assert torch.equal(F.dropout2d(other, 0.4, seed=SEED), wanted)
    assert torch.equal(F.dropout2d(others[2], 0.4, seed=SEED) != 0, wanted != 0)


@pytest.mark.parametrize("shape", [(2, 600, 9), (3, 40_000), (1, 5, 33_000)], ids=str)
def test_rows_larger_than_a_task(shape: tuple[int, ...], backend: Backend) -> None:
    if backend.on_host:
        shape = (*shape[:-1], shape[-1] // 50 + 1)
    x = make(shape, torch.bfloat16, backend)
    y = F.drop_path(x, 0.5, seed=3)
    mask = reference_philox.mask(shape[0], 0.5, 3, 0).view(-1, *[1] * (len(shape) - 1))
    assert_dropped(y, x, mask.expand(shape), 0.5)
    if len(shape) == 3:
        last = x[:, :, None].contiguous(memory_format=torch.channels_last)
        y = F.dropout2d(last, 0.5, seed=3)
        mask = reference_philox.mask(shape[0] * shape[1], 0.5, 3, 0).view(*shape[:2], 1, 1)
        assert_dropped(y, last, mask.expand(last.shape), 0.5)


# --- alpha ----------------------------------------------------------------------------------------

ALPHA = -1.7580993408473766


def alpha_reference(x: Tensor, mask: Tensor, p: float) -> Tensor:
    if p == 1.0:
        return torch.zeros_like(x, dtype=torch.float64)
    q = reference_philox.keep_probability(p)
    a = (q * (1 + (1 - q) * ALPHA**2)) ** -0.5
    b = -a * (1 - q) * ALPHA
    return a * torch.where(mask.to(x.device), x.double(), ALPHA) + b


@pytest.mark.sanitizer
@pytest.mark.parametrize("p", [0.5, 0.75, 0.1, 0.001, 1.0])
@pytest.mark.parametrize("feature", [False, True])
def test_alpha(feature: bool, p: float, dtype: torch.dtype, backend: Backend) -> None:
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)
    shape = (5, 8, 3, 4)
    x = make(shape, dtype, backend).requires_grad_()
    if feature:
        mask = reference_philox.mask(40, p, SEED, 0).view(5, 8, 1, 1).expand(shape)
        y = F.feature_alpha_dropout(x, p, True, seed=SEED)
    else:
        mask = reference_philox.mask(x.numel(), p, SEED, 0).view(shape)
        y = F.alpha_dropout(x, p, True, seed=SEED)
    wanted = alpha_reference(x.detach(), mask, p)
    assert y.dtype is dtype
    assert torch.allclose(y.double(), wanted, rtol=tolerance, atol=tolerance)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad != 0, mask.to(x.device) & (p < 1))


def test_alpha_bits_are_the_same_everywhere(dtype: torch.dtype, backend: Backend) -> None:
    """One multiplication and one addition, each rounded: on every backend."""
    x = make((1000,), dtype, backend)
    q = reference_philox.keep_probability(0.3)
    _, _, keep, a, b, c = fusereg._C.dropout_constants(0.3, True)
    assert keep == q
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    a, b, c = (torch.tensor(v, dtype=compute, device=x.device) for v in (a, b, c))  # type: ignore[assignment]
    mask = reference_philox.mask(1000, 0.3, SEED, 0).to(x.device)
    wanted = torch.where(mask, x.to(compute) * a + b, c).to(dtype)  # type: ignore[arg-type]
    assert torch.equal(F.alpha_dropout(x, 0.3, True, seed=SEED), wanted)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_alpha_keeps_mean_and_variance(p: float) -> None:
    x = torch.randn(1 << 20, dtype=torch.float64)
    y = F.alpha_dropout(x, p, True, seed=1)
    # Standard errors: 1e-3 of the mean, some 3e-3 of the variance (heavier tails than normal).
    assert abs(y.mean()) < 6e-3
    assert abs(y.var() - 1) < 2e-2


# --- the arguments --------------------------------------------------------------------------------


def test_no_dropping_returns_the_tensor_itself(backend: Backend) -> None:
    x = make((2, 3, 4), torch.float32, backend)
    for kind in (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout):
        assert kind(x, 0.0) is x
        assert kind(x, 0) is x
        assert kind(x, 0.5, training=False) is x
        assert kind(x, 1.0, False) is x


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_dropped_inf_and_nan_become_zero(bad: float, dtype: torch.dtype, backend: Backend) -> None:
    x = torch.full((100,), bad, dtype=dtype, device=backend.device)
    mask = reference_philox.mask(100, 0.5, SEED, 0).to(x.device)
    y = F.dropout(x, 0.5, seed=SEED)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert torch.equal(y[mask].isnan(), x[mask].isnan())
    assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
    rows = F.drop_path(x, 0.5, seed=SEED)
    assert torch.equal(rows == 0, ~mask)


@pytest.mark.parametrize("p", [0.5, 0.3, P_WITH_TIES])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("half", "quiet"), [(torch.bfloat16, 0x40), (torch.float16, 0x200)])
def test_every_number_of_16_bits(
    half: torch.dtype, quiet: int, rows: bool, p: float, backend: Backend
) -> None:
    """All 65536 of them: also subnormal ones, and NaN, which becomes quiet and keeps its bits."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).view(256, 256).to(backend.device)
    keep = fusereg.dropout_mask((256, 1 if rows else 256), p, SEED, device=backend.device)
    y = (F.drop_path if rows else F.dropout)(x, p, seed=SEED)
    wanted = torch.where(keep, scaled(x, p), torch.zeros_like(x)).view(torch.int16)
    nan = keep & x.isnan()
    assert torch.equal(y.isnan(), nan)
    if backend.name == "cuda" and not backend.on_host:
        wanted[nan] = 0x7FFF
    else:
        wanted[nan] = (x.view(torch.int16) | quiet)[nan]
    assert torch.equal(y.view(torch.int16), wanted)


@pytest.mark.parametrize("p", [0.5, 0.3, 720 / 2**16])  # the last has ties
def test_every_gradient_of_alpha_dropout_in_bfloat16(p: float, backend: Backend) -> None:
    """By scales below 1."""
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(backend.device)
    x = torch.zeros_like(grad).requires_grad_()
    (found,) = torch.autograd.grad(F.alpha_dropout(x, p, True, seed=SEED), x, grad)
    keep = fusereg.dropout_mask((2**16,), p, SEED, device=backend.device)
    scale = torch.tensor(fusereg._C.dropout_constants(p, True)[3]).to(backend.device)
    wanted = torch.where(keep, (grad.float() * scale).bfloat16(), torch.zeros_like(grad))
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(found[number].view(torch.int16), wanted[number].view(torch.int16))


def test_in_place_of_a_slice_leaves_the_rest_alone(backend: Backend) -> None:
    whole = make((6, 8), torch.float32, backend)
    before = whole.clone()
    y = F.dropout(whole[:, ::2], 0.5, inplace=True, seed=SEED)
    mask = reference_philox.mask(24, 0.5, SEED, 0).view(6, 4)
    assert_dropped(y, before[:, ::2], mask, 0.5)
    assert torch.equal(whole[:, ::2], y)
    assert torch.equal(whole[:, 1::2], before[:, 1::2])


def test_out_and_in_place_that_cannot_be() -> None:
    x = torch.randn(8)
    parameter = torch.nn.Parameter(torch.randn(8))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"out": torch.empty(7)}, ValueError, r"out must be torch.float32 of shape \(8,\)"),
        ({"out": torch.empty(8).double()}, ValueError, "out must be torch.float32"),
        ({"out": 3}, TypeError, "out must be a torch.Tensor, got int"),
        ({"out": torch.empty(1).expand(8)}, ValueError, "out has several elements"),
        ({"out": x, "inplace": True}, ValueError, "inplace and out exclude each other"),
        ({"out": parameter}, ValueError, "out= supports no gradients"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"seed": 1.5}, TypeError, "seed must be an integer or an int64 tensor"),
        ({"seed": True}, TypeError, "seed must be an integer or an int64 tensor"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"int64 tensor of shape \(2,\)"),
        ({"seed": torch.zeros(2)}, ValueError, "int64 tensor of shape"),
        ({"index_offset": -1}, ValueError, "index_offset must be an integer and not negative"),
        ({"index_offset": 1.0}, ValueError, "index_offset must be an integer and not negative"),
    ]
    for arguments, kind, text in cases:
        with pytest.raises(kind, match=f"fusereg.dropout: {text}|fusereg.dropout: .*{text}"):
            F.dropout(x, **arguments)
    whole = torch.randn(16)
    with pytest.raises(ValueError, match="overlap in memory"):
        F.dropout(whole[:8], out=whole[4:12])
    with pytest.raises(ValueError, match="leaf that requires a gradient"):
        F.dropout(parameter, inplace=True)
    with pytest.raises(ValueError, match="input has several elements"):
        F.dropout(torch.randn(1).expand(8), inplace=True)


@pytest.mark.parametrize("p", [-0.1, 1.0000001, math.nan, math.inf, 2])
def test_probabilities_outside_0_and_1_are_refused(p: float) -> None:
    for kind in (F.dropout, F.dropout1d, F.alpha_dropout, F.drop_path):
        for training in (True, False):
            with pytest.raises(ValueError, match=rf"{kind.__name__}: p must be within \[0, 1\]"):
                kind(torch.ones(2, 3), p, training)
    with pytest.raises(ValueError, match="p must be within"):
        nn.Dropout(p)
    with pytest.raises(ValueError, match="keep_prob must be within"):
        nn.Dropout(keep_prob=p)
    with pytest.raises(ValueError, match="p must be within"):
        fusereg.dropout_mask((3,), p, 1)


def test_other_inputs_are_refused_by_name() -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"fusereg.dropout: input (has dtype|is complex \()"):
            F.dropout(torch.ones(3).to(dtype))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got list"):
        F.dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got float"):
        F.dropout2d(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="p must be a number, got str"):
        F.dropout(torch.ones(3), "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparse"):
        F.dropout(torch.eye(3).to_sparse())
    with (
        pytest.warns(UserWarning, match="dropout2d: an input of 1 dimensions is deprecated"),
        pytest.raises(ValueError, match="dropout2d: input must have at least 2 dimensions, got 1"),
    ):
        F.dropout2d(torch.ones(3))
    with pytest.raises(ValueError, match="dropout1d: input must have 2 or 3 dimensions, got 4"):
        F.dropout1d(torch.ones(3, 3, 3, 3))
    with (
        pytest.warns(UserWarning, match="dropout3d: an input of 0 dimensions is deprecated"),
        pytest.raises(ValueError, match="dropout3d: input must have at least 1 dimensions, got 0"),
    ):
        F.dropout3d(torch.ones(()))
    with pytest.raises(ValueError, match="must have at least 2 dimensions, got 1"):
        F.feature_alpha_dropout(torch.ones(3), training=True)


# --- chance ---------------------------------------------------------------------------------------


def chi_squared_limit(degrees: int, z: float = 4.75) -> float:
    """Wilson and Hilferty: exceeded by chance in one of a million tests (z = 4.75)."""
    h = 2 / (9 * degrees)
    return degrees * (1 - h + z * math.sqrt(h)) ** 3


def assert_fair(counts: Tensor, probabilities: Tensor) -> None:
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < chi_squared_limit(counts.numel() - 1)


@pytest.mark.parametrize("p", [0.5, 0.25, 0.75, 0.1, 0.003])
def test_keep_rate_and_independence(p: float) -> None:
    """Chi-squared over many seeds, each test with a false-alarm rate of one in a million."""
    keep = reference_philox.keep_probability(p)
    n, seeds = 4096, 300
    masks = torch.stack([fusereg.dropout_mask((n,), p, s) for s in range(seeds)]).long()
    rates = torch.tensor([1 - keep, keep])
    assert_fair(torch.bincount(masks.flatten(), minlength=2), rates)
    # Lane by lane: each of 128 positions keeps as many as any other.
    kept = masks.view(seeds, -1, 128).sum((0, 1)).double()
    trials = masks.numel() // 128
    lanes = ((kept - trials * keep) ** 2 / (trials * keep * (1 - keep))).sum().item()
    assert lanes < chi_squared_limit(128)
    # Pairs: neighbors, lanes of a chunk, chunks, blocks, calls.
    joint = torch.outer(rates, rates).flatten()
    for lag in (1, 2, 4, 7, 8, 16, 64, 128, 1024):
        pairs = 2 * masks[:, :-lag] + masks[:, lag:]
        assert_fair(torch.bincount(pairs.flatten(), minlength=4), joint)
    assert_fair(torch.bincount((2 * masks[:-1] + masks[1:]).flatten(), minlength=4), joint)
    offsets = torch.stack([fusereg.dropout_mask((n,), p, 1, 4 * i) for i in range(seeds)]).long()
    assert_fair(torch.bincount((2 * offsets[:-1] + offsets[1:]).flatten(), minlength=4), joint)


def test_the_chi_squared_test_sees_a_bias() -> None:
    biased = (torch.rand(4096 * 300) < 0.905).long()
    with pytest.raises(AssertionError):
        assert_fair(torch.bincount(biased, minlength=2), torch.tensor([0.1, 0.9]))
    assert chi_squared_limit(10) == pytest.approx(46.8, rel=0.03)  # the quantile itself


def test_the_mean_is_kept(dtype: torch.dtype) -> None:
    for p in (0.1, 0.5, 0.003):
        y = F.dropout(torch.ones(1 << 20, dtype=dtype), p, seed=1).double()
        keep = reference_philox.keep_probability(p)
        error = math.sqrt((1 - keep) / keep / (1 << 20))
        rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-7)
        assert abs(y.mean() - 1) < 5 * error + rounding
