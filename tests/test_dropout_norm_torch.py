"""Dropout + normalization inside torch: derivatives, memory, checkpoint, compile, func, modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dropout_norm_steps import EPS, SEED, fused, row_mask, unfused
from fusereg import functional as F
from fusereg import nn

HALVES = (torch.float16, torch.bfloat16)


# --- derivatives and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("p", "has_residual"), [(0.4, True), (0.4, False), (0.0, False)])
def test_gradcheck(rms: bool, p: float, has_residual: bool) -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, residual, weight, bias]

    def f(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = residual if has_residual else None
        return fused(rms, x, given, weight, bias, p, seed=5, return_sum=has_residual)

    def operator(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = (x, residual if has_residual else None, weight, None if rms else bias)
        pair = torch.tensor([5, 0]) if p else None
        y, s, _ = torch.ops.fusereg.dropout_norm(*given, pair, p, EPS, rms, 0, True)
        return (y, s) if has_residual else y

    names = {"allow_unused": True} if not has_residual or rms else {}
    used = inputs if not names else [t for t in inputs if t is not residual or has_residual]
    for function in (f, operator):

        def of_used(*arguments: Tensor, function: Callable[..., Any] = function) -> Any:
            given = list(arguments)
            if not has_residual:
                given.insert(1, residual.detach())
            return function(*given, *([bias.detach()] if rms else []))

        arguments = tuple(used[:-1] if rms else used)
        assert torch.autograd.gradcheck(of_used, arguments, check_forward_ad=function is f)
        assert torch.autograd.gradgradcheck(of_used, arguments)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_third_derivative(rms: bool) -> None:
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = row_mask((2, 4), 0.3)

    def derivatives(y: Tensor) -> list[Tensor]:
        found = [(y**3).sum()]
        for _ in range(3):
            found += torch.autograd.grad((found[-1] ** 2).sum(), x, create_graph=True)
        return found

    ours = fused(rms, x, x, None, None, 0.3, seed=SEED)
    theirs, _ = unfused(rms, x, x, None, None, 0.3, mask)
    for came, wanted in zip(derivatives(ours), derivatives(theirs), strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-9, atol=1e-9)


def kept_bytes(call: Callable[[], object], *alive: Tensor) -> int:
    """Storage that autograd keeps, other than that of tensors that are alive anyway."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result is not None
    for t in alive:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype: torch.dtype) -> None:
    """The sum and 12 or 4 bytes a row; nothing of the mask, of x or residual."""
    rows, length = 64, 100
    x = torch.randn(rows, length, dtype=dtype, requires_grad=True)
    weight = torch.ones(length, dtype=dtype, requires_grad=True)
    whole = rows * length * dtype.itemsize
    layer = kept_bytes(lambda: F.dropout_add_layer_norm(x, x, weight, None, 0.5), weight)
    assert layer == whole + 12 * rows
    rms = kept_bytes(lambda: F.dropout_add_rms_norm(x, x, weight, 0.5), weight)
    assert rms == whole + 4 * rows
    plain = kept_bytes(lambda: F.dropout_add_layer_norm(x, None, weight, None, 0.0), weight, x)
    assert plain == 12 * rows, "x itself is the sum"
    both = kept_bytes(
        lambda: F.dropout_add_layer_norm(x, x, weight, p=0.5, return_sum=True), weight
    )
    assert both == layer, "the sum is kept once, for the caller and for backward"
    steps = kept_bytes(
        lambda: torch.nn.functional.layer_norm(
            torch.nn.functional.dropout(x, 0.5) + x, (length,), weight
        ),
        weight,
    )
    assert steps > layer


# --- checkpoint, torch.library, compile -----------------------------------------------------------


_OPS = torch.ops.fusereg


def arguments_of_the_operator(
    requires_grad: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    shapes = ((3, 4, 6), (3, 4, 6), (6,), (6,))
    return tuple(torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes)


@pytest.mark.slow  # a sample of it is in test_contract.py
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_opcheck_dropout_norm(rms: bool, requires_grad: bool) -> None:
    x, residual, weight, bias = arguments_of_the_operator(requires_grad)
    pair = torch.tensor([1, 0])
    calls: list[tuple[Any, ...]] = [
        (x, residual, weight, None if rms else bias, pair, 0.3, EPS, rms, 3, True),
        (x, None, None, None, None, 0.0, EPS, rms, 0, True),
    ]
    if not requires_grad:
        calls.append((x, residual, weight, None, pair, 0.3, EPS, rms, 0, False))
    for arguments in calls:
        torch.library.opcheck(_OPS.dropout_norm.default, arguments)


@pytest.mark.slow  # a sample of it is in test_contract.py
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("has_grad_sum", [False, True])
def test_opcheck_dropout_norm_backward(has_grad_sum: bool, rms: bool) -> None:
    grad, s, weight, _ = arguments_of_the_operator(True)
    statistics = torch.rand(3, 4, 1 if rms else 3) + 0.5
    if not rms:
        statistics[..., 0] = s.detach().mean(-1)
        statistics[..., 1] = 0.0
    grad_sum = torch.randn_like(s).requires_grad_() if has_grad_sum else None
    constants = (torch.tensor([1, 0]), 0.3, EPS, rms, 3)
    for wanted in ([True, True, True, not rms], [True, False, False, False]):
        torch.library.opcheck(
            _OPS.dropout_norm_backward.default,
            (grad, grad_sum, s, statistics, weight, *constants, wanted),
        )


def test_an_operator_that_kept_nothing_has_no_gradient() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    y, _, _ = _OPS.dropout_norm(x, None, None, None, None, 0.0, EPS, False, 0, False)
    with pytest.raises(RuntimeError, match="keep=False"):
        y.sum().backward()


def test_export_and_fake_tensors() -> None:
    layer = nn.DropoutAddRMSNorm(8, 0.5, return_sum=True)
    x = torch.randn(3, 8)
    program = torch.export.export(layer, (x, x))
    assert "fusereg.dropout_norm" in str(program.graph)
    y, s = program.module()(x, x)
    assert y.shape == s.shape == x.shape
    with FakeTensorMode():
        half = torch.empty(3, 8, dtype=torch.bfloat16)
        wide = torch.empty(3, 8)
        y, s = F.dropout_add_layer_norm(half, wide, return_sum=True)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert F.dropout_add_rms_norm(torch.empty(3, 8, device="meta"), None).is_meta


#: x, residual, and then y: those that the kernels do not take together without autocast.
PAIRS = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16, torch.float32),
]


@pytest.mark.parametrize("amp_dtype", HALVES)
def test_autocast_keeps_xs_dtype(amp_dtype: torch.dtype) -> None:
    linear, layer = torch.nn.Linear(6, 8), nn.DropoutAddLayerNorm(8, 0.5)
    residual = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=amp_dtype):
        y = layer(linear(torch.randn(4, 6)), residual)
        assert isinstance(y, Tensor)
        assert y.dtype is amp_dtype
        assert layer(residual, residual).dtype is torch.float32
    y.float().square().sum().backward()
    for parameter in (linear.weight, layer.weight, layer.bias):
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.any()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_autocast_takes_a_residual_of_any_dtype(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], rms: bool
) -> None:
    """As torch's sum and norm do, one after the other."""
    of_x, of_residual, of_y = dtypes
    f = F.dropout_add_rms_norm if rms else F.dropout_add_layer_norm
    x = torch.randn(4, 8, dtype=of_x, requires_grad=True)
    residual = torch.randn(4, 8, dtype=of_residual, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)
    call = functools.partial(f, p=0.0, weight=weight, return_sum=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, s = call(x, residual)
        again, _ = compiled(x, residual)
        assert (y.dtype, s.dtype) == (of_y, torch.promote_types(of_x, of_residual))
        assert torch.equal(s, x + residual)
        assert torch.equal(y, again)
    plain = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    torch.testing.assert_close(y, plain(s, (8,), weight))
    for grad, t in zip(torch.autograd.grad(y.sum(), (x, residual)), (x, residual), strict=True):
        assert grad.dtype is t.dtype
    with pytest.raises(ValueError, match="residual must be"):
        call(x, residual)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_are_torchs_norms_with_their_state(name: str) -> None:
    ours, theirs = getattr(nn, f"DropoutAdd{name}"), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    for shape in (12, (3, 4)):
        layer, plain = ours(shape, 0.5, eps=EPS), theirs(shape, eps=EPS)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.normal_()
        layer.load_state_dict(plain.state_dict())
        theirs(shape).load_state_dict(layer.state_dict())
        x, residual = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
        if shape == 12:
            x, residual = x.flatten(1), residual.flatten(1)
        wanted = plain(residual + x)
        torch.testing.assert_close(layer.eval()(x, residual), wanted)
        torch.testing.assert_close(copy.deepcopy(layer)(residual + x), wanted)
        torch.manual_seed(3)
        y = layer.train()(x, residual)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.5)
        torch.testing.assert_close(y, plain(residual + dropped))
        y, s = ours(shape, 0.5, return_sum=True)(x, residual)
        assert s.shape == y.shape == x.shape
    assert "p=0.5" in repr(layer)
    assert repr(layer).startswith(f"DropoutAdd{name}((3, 4), eps=1e-05, elementwise_affine=True")
    without = ours(12, 0.1, elementwise_affine=False)
    assert not list(without.parameters())
    assert without(torch.randn(2, 12)).shape == (2, 12)
    with pytest.raises(ValueError, match=r"p must be within"):
        ours(12, 1.5)
    with pytest.raises(ValueError, match=r"input must have shape|x must have shape"):
        layer(torch.randn(2, 5))


def test_layer_norm_without_bias_and_rms_default_eps() -> None:
    layer = nn.DropoutAddLayerNorm(6, 0.0, bias=False)
    assert set(layer.state_dict()) == {"weight"}
    x = torch.randn(3, 6) * 1e-4
    torch.testing.assert_close(
        nn.DropoutAddRMSNorm(6, 0.0)(x), torch.nn.functional.rms_norm(x, (6,))
    )


# --- errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_change_nothing() -> None:
    x, weight = torch.randn(3, 6), torch.ones(6)
    state = torch.get_rng_state()
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "p must be within", lambda: F.dropout_add_layer_norm(x, x, p=1.5)),
        (TypeError, "p must be a number", lambda: F.dropout_add_layer_norm(x, x, p="a")),  # type: ignore[call-overload]
        (ValueError, "eps must not be neg", lambda: F.dropout_add_rms_norm(x, x, eps=-1.0)),
        (TypeError, "eps must be a number", lambda: F.dropout_add_layer_norm(x, x, eps="a")),  # type: ignore[call-overload]
        (ValueError, "x has dtype", lambda: F.dropout_add_rms_norm(x.long(), None)),
        (TypeError, "x must be a torch.Tensor", lambda: F.dropout_add_layer_norm([1.0], None)),  # type: ignore[call-overload]
        (TypeError, "x must be a torch.Tensor", lambda: F.dropout_add_rms_norm([1.0], None)),  # type: ignore[call-overload]
        (ValueError, "at least 1 dimension", lambda: F.dropout_add_layer_norm(x[0, 0], None)),
        (
            ValueError,
            r"residual must have shape \(3, 6\), got \(6,\)",
            lambda: F.dropout_add_layer_norm(x, weight),
        ),
        (
            ValueError,
            r"weight must have shape \(6,\), got \(3,\)",
            lambda: F.dropout_add_rms_norm(x, None, torch.ones(3)),
        ),
        (
            ValueError,
            "residual must be torch.float32 on cpu as x is, got torch.bfloat16",
            lambda: F.dropout_add_layer_norm(x, x.bfloat16()),
        ),
        (
            ValueError,
            "weight must be torch.bfloat16 or torch.float32 on cpu as x is, got torch.float64",
            lambda: F.dropout_add_layer_norm(x.bfloat16(), None, weight.double()),
        ),
        (
            ValueError,
            r"bias must have weight's dtype",
            lambda: F.dropout_add_layer_norm(x.bfloat16(), None, weight, weight.bfloat16()),
        ),
        (
            ValueError,
            "index_offset must be",
            lambda: F.dropout_add_layer_norm(x, x, index_offset=-1),
        ),
        (TypeError, "seed must be", lambda: F.dropout_add_layer_norm(x, x, seed="a")),  # type: ignore[call-overload]
    ]
    for error, text, call in wrong:
        with pytest.raises(error, match=text) as caught:
            call()
        assert str(caught.value).startswith("fusereg.dropout_add_")
    assert torch.equal(torch.get_rng_state(), state)
