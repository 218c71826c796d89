"""Fused dropout inside torch: derivatives, memory, checkpoint, compile, func, autocast, modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg import functional as F
from ops import saved_by

_OPS = torch.ops.fusereg

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _activation(name: str) -> Callable[..., Tensor]:
    return lambda x, r, b, p=0.4, **k: F.activation_dropout(x, p, name, **k)


#: Each operation as a function of up to three tensors (x, residual, bias) and a seed.
KINDS: dict[str, Callable[..., Tensor]] = {
    "bias_dropout_add": lambda x, r, b, p=0.4, **k: F.bias_dropout_add(x, b, r, p, **k),
    "dropout_add": lambda x, r, b, p=0.4, **k: F.dropout_add(x, r, p, **k),
    "drop_path_add": lambda x, r, b, p=0.4, **k: F.drop_path_add(x, r, p, **k),
    **{a: _activation(a) for a in ACTIVATIONS},
}


def operands(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    shapes = ((4, 6), (4, 6), (6,))
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_of_some_operands_alone(wanted: int) -> None:
    tensors = operands(requires_grad=False)
    tensors[wanted].requires_grad_()
    x, residual, bias = tensors
    y = F.bias_dropout_add(x, bias, residual, 0.4, seed=5)
    grad = torch.randn(4, 6, dtype=torch.float64)
    (came,) = torch.autograd.grad(y, tensors[wanted], grad)
    masked = F.dropout(grad, 0.4, seed=5)
    assert torch.allclose(came, (masked, grad, masked.sum(0))[wanted])


def test_forward_mode_with_some_tangents() -> None:
    x, residual, bias = operands(requires_grad=False)
    tangent = torch.randn_like(bias)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, tangent)
        y = torch.autograd.forward_ad.unpack_dual(F.bias_dropout_add(x, dual, residual, seed=5))
        in_place = torch.autograd.forward_ad.make_dual(x.clone(), x) * 1
        z = torch.autograd.forward_ad.unpack_dual(
            F.activation_dropout(in_place, 0.4, "silu", inplace=True, seed=5)
        )
        w = torch.autograd.forward_ad.unpack_dual(
            F.dropout_add(
                torch.autograd.forward_ad.make_dual(x.clone(), x) * 1, x, inplace=True, seed=5
            )
        )
    assert torch.equal(y.tangent, F.dropout(tangent.expand(4, 6).contiguous(), seed=5))
    slope = torch.func.jvp(torch.nn.functional.silu, (x,), (x,))[1]
    assert torch.allclose(z.tangent, F.dropout(slope, 0.4, seed=5))
    assert torch.equal(w.tangent, F.dropout(x, seed=5))


def test_gradcheck_in_place() -> None:
    x, residual, _ = operands()
    for f in (
        lambda x, r: F.dropout_add(x * 1, r, 0.4, inplace=True, seed=5),
        lambda x, r: F.drop_path_add(x * 1, r, 0.4, inplace=True, seed=5),
        lambda x, r: F.activation_dropout(x * 1, 0.4, "relu", inplace=True, seed=5) + r,
    ):
        assert torch.autograd.gradcheck(f, (x, residual))
        assert torch.autograd.gradgradcheck(f, (x, residual))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bias_dropout_add", "dropout_add", "drop_path_add"])
def test_nothing_is_kept_for_backward(name: str) -> None:
    x, residual, bias = operands(torch.float32)
    y, kept = saved_by(lambda: KINDS[name](x, residual, bias))
    assert kept == []
    assert [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)] == []
    pair = torch.tensor([1, 0])
    _, kept = saved_by(lambda: _OPS.fused_dropout_add(x, bias, residual, pair, 0.5, 0, 0))
    assert [t.nbytes for t in kept] == [16], "the pair alone"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_keeps_one_tensor(activation: str) -> None:
    x = torch.randn(100, requires_grad=True)
    y, kept = saved_by(lambda: F.activation_dropout(x, 0.5, activation))
    (only,) = kept
    assert only.data_ptr() == (y if activation == "relu" else x).data_ptr()
    assert [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)] == []


def test_relu_in_place_keeps_its_result_alone() -> None:
    x = torch.randn(100, requires_grad=True) * 1
    pointer = x.data_ptr()
    y, kept = saved_by(lambda: F.activation_dropout(x, 0.5, "relu", inplace=True))
    assert [t.data_ptr() for t in kept] == [pointer]
    assert y is x


def test_the_residuals_gradient_is_the_gradient_itself() -> None:
    x, residual, bias = operands(torch.float32)
    y = F.bias_dropout_add(x, bias, residual)
    grad = torch.randn(4, 6)
    (came,) = torch.autograd.grad(y, residual, grad)
    assert came.data_ptr() == grad.data_ptr()


# --- torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_add(requires_grad: bool, p: float) -> None:
    x, residual, bias = operands(torch.float32, requires_grad)
    pair = torch.tensor([1, 0])
    torch.library.opcheck(_OPS.fused_dropout_add.default, (x, bias, residual, pair, p, 0, 3))
    torch.library.opcheck(
        _OPS.fused_dropout_add.default, (x.t(), None, residual.t(), pair, p, 1, 0)
    )


# --- compile, export, func, modes -----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.bias = nn.Parameter(torch.zeros(8))
        self.activation = fusereg.nn.ActivationDropout(0.5, "gelu")
        self.add = fusereg.nn.BiasDropoutAdd(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.add(self.down(self.activation(self.up(x))), self.bias, x)
        return result


def test_compile_in_place() -> None:
    def f(x: Tensor, residual: Tensor) -> Tensor:
        y = F.activation_dropout(x + 1, 0.5, "relu", inplace=True, seed=3)
        return F.dropout_add(y * 2, residual, 0.5, inplace=True, seed=4)

    x, residual, _ = operands(torch.float32)
    torch._dynamo.reset()
    came, wanted = (
        torch.compile(f, fullgraph=True, backend="aot_eager")(x, residual),
        f(x, residual),
    )
    assert torch.equal(came, wanted)
    assert torch.equal(*torch.autograd.grad(came.sum(), x), *torch.autograd.grad(wanted.sum(), x))


def test_autocast_takes_what_comes() -> None:
    linear = nn.Linear(6, 8, bias=False)
    bias, residual = nn.Parameter(torch.zeros(8)), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = linear(torch.randn(4, 6))
        assert x.dtype is torch.bfloat16
        y = F.bias_dropout_add(x, bias, residual)
        assert y.dtype is torch.float32
        assert F.activation_dropout(x, 0.5, "gelu").dtype is torch.bfloat16
        assert F.dropout_add(x.detach(), residual.detach(), inplace=True).dtype is torch.bfloat16
    y.sum().backward()
    for t in (linear.weight, bias, residual):
        assert t.grad is not None
        assert t.grad.dtype is torch.float32
    with pytest.raises(ValueError, match=r"residual must be torch\.bfloat16"):
        F.dropout_add(x, residual)


def test_no_grad_inference_and_subclasses() -> None:
    x, residual, bias = operands(torch.float32)
    with torch.no_grad():
        assert not F.bias_dropout_add(x, bias, residual).requires_grad
    with torch.inference_mode():
        y = F.activation_dropout(x.detach() * 1, 0.5, "relu", inplace=True)
        assert F.dropout_add(y, y, inplace=True).is_inference()
    assert F.bias_dropout_add(x.detach(), bias, residual.detach()).requires_grad

    class Tagged(Tensor):
        pass

    tagged = torch.randn(4, 6).as_subclass(Tagged)
    assert type(F.dropout_add(tagged, residual.detach())) is Tagged
    parameter = nn.Parameter(torch.randn(4, 6))
    F.dropout_add(parameter, parameter, 0.5, seed=1).sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, 1 + F.dropout(torch.ones(4, 6), 0.5, seed=1))


# --- modules --------------------------------------------------------------------------------------


def test_modules() -> None:
    x, residual, bias = operands(torch.float32, False)
    m = fusereg.nn
    pairs: list[tuple[nn.Module, str, tuple[Any, ...], Tensor]] = [
        (
            m.BiasDropoutAdd(0.25),
            "BiasDropoutAdd(p=0.25)",
            (x, bias, residual),
            x + bias + residual,
        ),
        (m.DropoutAdd(0.25), "DropoutAdd(p=0.25, inplace=False)", (x, residual), x + residual),
        (m.DropPathAdd(0.25), "DropPathAdd(p=0.25, inplace=False)", (x, residual), x + residual),
        (
            m.ActivationDropout(0.25, "silu"),
            "ActivationDropout(p=0.25, activation='silu', inplace=False)",
            (x,),
            torch.nn.functional.silu(x),
        ),
    ]
    for module, text, arguments, plain in pairs:
        assert repr(module) == text
        torch.manual_seed(5)
        y = module(*arguments)
        torch.manual_seed(5)
        assert torch.equal(module(*arguments), y)
        assert torch.allclose(module.eval()(*arguments), plain, atol=1e-6)
        kind = type(module)
        assert kind(keep_prob=0.75).p == 0.25
        assert kind().p == 0.5
        with pytest.raises(ValueError, match="p and keep_prob exclude each other"):
            kind(0.5, keep_prob=0.5)
        with pytest.raises(ValueError, match="p must be within"):
            kind(2.0)
    y = x.clone()
    assert m.DropoutAdd(0.5, inplace=True)(y, residual) is y
    assert m.DropPathAdd(0.5, inplace=True)(y, residual) is y
    assert m.ActivationDropout(0.5, inplace=True)(y) is y
    assert torch.equal(m.BiasDropoutAdd(0.5).eval()(x, None, residual), x + residual)
    with pytest.raises(ValueError, match="activation must be one of"):
        m.ActivationDropout(activation="tanh")


def test_a_transformers_sublayer_learns_as_the_unfused_one_does() -> None:
    points = torch.randn(256, 8)
    target = torch.sin(points.sum(1, keepdim=True)).expand(-1, 8)

    class Unfused(Block):
        def forward(self, x: Tensor) -> Tensor:
            f = nn.functional
            h = f.dropout(f.gelu(self.up(x)), 0.5, self.training)
            return x + f.dropout(self.down(h) + self.bias, 0.5, self.training)

    def train(kind: type[Block]) -> float:
        torch.manual_seed(0)
        net = kind()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(points), target).backward()
            optimizer.step()
        with torch.no_grad():
            return nn.functional.mse_loss(net.eval()(points), target).item()

    start = nn.functional.mse_loss(points, target).item()
    ours, theirs = train(Block), train(Unfused)
    assert theirs < 0.8 * start
    assert abs(ours - theirs) < 0.1 * theirs
