"""Fused dropout inside torch: derivatives, memory, checkpoint, compile, func, autocast, modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fusereg
from fusereg import functional as F

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


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return KINDS[request.param]


def operands(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    shapes = ((4, 6), (4, 6), (6,))
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


# --- derivatives ----------------------------------------------------------------------------------


def test_gradcheck(kind: Callable[..., Tensor]) -> None:
    tensors = operands()

    def f(*t: Tensor) -> Tensor:
        return kind(*t, seed=5) + 0 * sum(s.sum() for s in t)  # every operand has a gradient

    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, tensors)


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


def test_gradcheck_through_the_operators() -> None:
    x, residual, bias = operands()
    pair = torch.tensor([3, 0])
    for row_dims, b in ((0, bias), (0, None), (1, None)):

        def add(x: Tensor, r: Tensor, row_dims: int = row_dims, b: Tensor | None = b) -> Tensor:
            result: Tensor = _OPS.fused_dropout_add(x, b, r, pair, 0.4, row_dims, 2)
            return result

        assert torch.autograd.gradcheck(add, (x, residual))
        assert torch.autograd.gradgradcheck(add, (x, residual))

    def of_bias(b: Tensor) -> Tensor:
        result: Tensor = _OPS.fused_dropout_add(x.detach(), b, residual.detach(), pair, 0.4, 0, 2)
        return result

    assert torch.autograd.gradcheck(of_bias, (bias,))
    for activation in ACTIVATIONS:

        def activate(x: Tensor, activation: str = activation) -> Tensor:
            result: Tensor = _OPS.activation_dropout(x, pair, 0.4, activation, 2)
            return result

        assert torch.autograd.gradcheck(activate, (x,))
        assert torch.autograd.gradgradcheck(activate, (x,))


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


def saved_by(f: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and the tensors that autograd keeps for it."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return f(), kept


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


# --- numbers, checkpoint --------------------------------------------------------------------------


def test_manual_seed_and_generators_reproduce(kind: Callable[..., Tensor]) -> None:
    tensors = [torch.randn(64, 6), torch.randn(64, 6), torch.randn(6)]
    generator = torch.Generator()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        generator.manual_seed(3)
        results.append([kind(*tensors), kind(*tensors), kind(*tensors, generator=generator)])
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(reentrant: bool) -> None:
    x, residual, bias = [torch.randn(s, requires_grad=True) for s in ((50, 8), (50, 8), (8,))]
    masks: list[Tensor] = []

    def block(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        h = F.activation_dropout(x, 0.5, "gelu")
        y = F.bias_dropout_add(h, bias, residual, 0.5)
        masks.append(y.detach())
        return y.square()  # keeps y, so there is something to do again

    y = checkpoint(block, x, residual, bias, use_reentrant=reentrant)
    F.dropout(torch.ones(8))  # somebody draws in between
    y.sum().backward()
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])


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


def test_opcheck_bias_backward() -> None:
    grad = torch.randn(3, 4, 5, requires_grad=True)
    pair = torch.tensor([1, 0])
    for stride in ([20, 5, 1], [1, 15, 3]):
        torch.library.opcheck(
            _OPS.fused_dropout_bias_backward.default, (grad, pair, 0.3, 2, stride)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_activation(activation: str) -> None:
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    pair = torch.tensor([1, 0])
    torch.library.opcheck(_OPS.activation_dropout.default, (x, pair, 0.3, activation, 3))
    torch.library.opcheck(
        _OPS.activation_dropout_backward.default,
        (grad, x, pair, 0.3, activation, 3, [1, 3]),
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


def compiles(backend: str) -> None:
    model, x = Block(), torch.randn(32, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    compiled(x).sum().backward()
    assert model.bias.grad is not None
    # Each column counts its kept elements, twice for p = 0.5.
    assert set((model.bias.grad % 2).tolist()) == {0.0}
    assert 16 < model.bias.grad.mean() < 48
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_compile_fullgraph() -> None:
    compiles("aot_eager")


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    compiles("inductor")


def test_compile_with_a_seed_gives_the_eager_result(kind: Callable[..., Tensor]) -> None:
    tensors = operands(torch.float32)

    def f(*t: Tensor) -> Tensor:
        return kind(*t, seed=5, index_offset=3)

    torch._dynamo.reset()
    came, wanted = torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), f(*tensors)
    assert torch.equal(came, wanted)
    inputs = [tensors[0]]
    assert torch.equal(
        *torch.autograd.grad(came.sum(), inputs), *torch.autograd.grad(wanted.sum(), inputs)
    )


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


def test_export_and_fake_tensors() -> None:
    program = torch.export.export(Block(), (torch.randn(32, 8),))
    assert "fusereg.fused_dropout_add" in str(program.graph)
    assert "fusereg.activation_dropout" in str(program.graph)
    assert program.module()(torch.randn(32, 8)).shape == (32, 8)
    with FakeTensorMode():
        x = torch.empty(2, 3, dtype=torch.bfloat16, requires_grad=True)
        y = F.bias_dropout_add(x, torch.empty(3, dtype=torch.bfloat16), x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        y.sum().backward()
        assert x.grad is not None
    assert F.activation_dropout(torch.empty(3, device="meta"), 0.5, "silu").is_meta
    meta = torch.empty(3, 4, device="meta")
    assert F.dropout_add(meta, meta).is_meta


def test_vmap_different_and_same(kind: Callable[..., Tensor]) -> None:
    x = torch.rand(6, 40, 5) + 0.5
    bias = torch.ones(5)

    def f(t: Tensor) -> Tensor:
        return kind(t, t, bias)

    different = torch.vmap(f, randomness="different")(x[:1].expand(6, 40, 5))
    assert len({tuple(r.flatten().tolist()) for r in different}) == 6
    same = torch.vmap(f, randomness="same")(x[:1].expand(6, 40, 5))
    assert len({tuple(r.flatten().tolist()) for r in same}) == 1
    seeded = torch.vmap(lambda t: kind(t, t, bias, seed=4))(x)
    assert torch.allclose(seeded, torch.stack([kind(t, t, bias, seed=4) for t in x]))


def test_func_grad_of_every_kind(kind: Callable[..., Tensor]) -> None:
    x, residual, bias = operands(requires_grad=False)

    def loss(*t: Tensor) -> Tensor:
        return (kind(*t, seed=4) ** 2).sum()

    came = torch.func.grad(loss, argnums=(0, 1, 2))(x, residual, bias)
    leaves = [t.clone().requires_grad_() for t in (x, residual, bias)]
    wanted = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    for a, b in zip(came, wanted, strict=True):
        assert torch.allclose(a, b)


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
