"""The penalties inside torch: derivatives, torch.library, compile, export, func, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusereg
import reference
from fusereg import functional as F

PENALTIES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "l1": (lambda p: F.l1_penalty(p, 0.3), {"l1": 0.3}),
    "l2": (lambda p: F.l2_penalty(p, 0.7), {"l2": 1.4}),
    "elastic_net": (lambda p: F.elastic_net_penalty(p, 0.3, 0.7), {"l1": 0.3, "l2": 0.7}),
    "group": (lambda p: F.group_lasso_penalty(p, 0.5), {"group": 0.5}),
    "group_dim1": (lambda p: F.group_lasso_penalty(p, 0.5, 1), {"group": 0.5, "dim": 1}),
}


@pytest.fixture(params=PENALTIES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], dict[str, float]]:
    return PENALTIES[request.param]


def matrices(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(4, 3, dtype=dtype), torch.randn(2, 5, dtype=dtype)]


# --- derivatives ----------------------------------------------------------------------------------


def test_third_derivatives(case: tuple[Callable[..., Tensor], dict[str, float]]) -> None:
    penalty, _ = case

    def gradient(w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(penalty([w]), w, create_graph=True)
        return g

    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(gradient, w)


def test_batched_gradients(case: tuple[Callable[..., Tensor], dict[str, float]]) -> None:
    penalty, _ = case
    params = [torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.bfloat16)]
    params = [p.requires_grad_() for p in params]
    frozen = torch.randn(2, 2)
    value = penalty([params[0], frozen, params[1]])
    out = torch.randn(3, dtype=value.dtype)
    batched = torch.autograd.grad(value, params, out, retain_graph=True, is_grads_batched=True)
    for i, one in enumerate(out):
        wanted = torch.autograd.grad(value, params, one, retain_graph=True)
        for a, b in zip(batched, wanted, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians_and_hessians(
    case: tuple[Callable[..., Tensor], dict[str, float]], strategy: str
) -> None:
    penalty, _ = case
    w = torch.randn(4, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(penalty, w, vectorize=True, strategy=strategy)
    assert torch.allclose(jacobian, torch.autograd.functional.jacobian(penalty, w))
    hessian = torch.autograd.functional.hessian(
        penalty, w, vectorize=True, outer_jacobian_strategy=strategy
    )
    assert torch.allclose(hessian, torch.autograd.functional.hessian(penalty, w))


def test_forward_mode_of_one_among_several() -> None:
    a, b = matrices()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(b, torch.ones_like(b))
        value = F.elastic_net_penalty([a, dual], [0.1, 0.3], 0.7)
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    assert torch.allclose(tangent, reference.gradient(b, l1=0.3, l2=0.7).sum())


def test_second_derivative_of_zero_groups_and_zero_weights_is_finite() -> None:
    w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    for penalty, _ in PENALTIES.values():
        (g,) = torch.autograd.grad(penalty(w), w, create_graph=True)
        assert torch.equal(g, torch.zeros_like(w))
        (second,) = torch.autograd.grad(g.sum(), w)
        assert second.isfinite().all()


def test_gradient_penalty_of_a_penalized_loss() -> None:
    """A loss that differentiates a gradient which holds a penalty (as in meta-learning)."""
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def outer(penalty: Callable[[Tensor], Tensor]) -> Tensor:
        inner = (w**3).sum() + penalty(w)
        (g,) = torch.autograd.grad(inner, w, create_graph=True)
        (result,) = torch.autograd.grad((w - 0.1 * g).square().sum(), w)
        return result

    ours = outer(lambda p: F.l2_penalty(p, 0.7) + F.l1_penalty(p, 0.1))
    plain = outer(lambda p: 0.7 * p.square().sum() + 0.1 * p.abs().sum())
    assert torch.allclose(ours, plain, rtol=1e-12)


def test_only_wanted_gradients_are_computed() -> None:
    a, b = matrices()
    a.requires_grad_()
    F.elastic_net_penalty([a, b], 0.3, 0.7).backward()
    assert a.grad is not None
    assert b.grad is None


def test_intermediate_tensors_may_be_penalized() -> None:
    """An activity penalty: the tensor is a result, not a leaf."""
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    F.l1_penalty(torch.tanh(w), 0.5).backward()
    ours = w.grad
    w.grad = None
    (0.5 * torch.tanh(w).abs().sum()).backward()
    assert ours is not None
    assert w.grad is not None
    assert torch.allclose(ours, w.grad, rtol=1e-12)


# --- torch.library --------------------------------------------------------------------------------

_OPS = torch.ops.fusereg


def test_operators_take_one_strength_for_all() -> None:
    params = matrices()
    one = _OPS.penalty(params, [0.3], [0.7, 0.7], [0.2], 1)
    assert torch.equal(one, _OPS.penalty(params, [0.3, 0.3], [0.7], [0.2, 0.2], 1))


def test_opcheck_penalty_in_mixed_dtypes() -> None:
    params = [torch.randn(4, 3, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    torch.library.opcheck(_OPS.penalty.default, (params, [0.3] * 3, [0.7] * 3, [0.0] * 3, 0))


# --- compile, export ------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight
        loss: Tensor = self.linear(x).square().mean()
        # A list with one tensor twice: it counts once, compiled or not.
        return loss + F.elastic_net_penalty(self, 0.1, 0.2) + F.group_lasso_penalty([w, w], 0.1)


def test_compile_fullgraph_gives_the_same_loss_and_gradients() -> None:
    model, x = Model(), torch.randn(5, 3, dtype=torch.float64)
    eager = model(x)
    eager.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    compiled.backward()
    assert torch.allclose(compiled, eager, rtol=1e-13)
    for p, w in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, w, rtol=1e-12)


def test_compile_add_penalty_grad_and_prox() -> None:
    model = Model()
    penalty = fusereg.WeightPenalty(model, l1=0.1, l2=0.2, group=0.05)
    step = torch.compile(lambda: penalty.add_grad_(), fullgraph=True, backend="aot_eager")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    value = step()
    after = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g
    assert torch.equal(penalty.add_grad_(), value)
    for p, g in zip(model.parameters(), after, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)

    wanted = reference.prox(model.linear.weight, l1=0.2)

    def shrink() -> None:
        fusereg.prox.l1_(model, 0.2)

    torch.compile(shrink, fullgraph=True, backend="aot_eager")()
    assert torch.allclose(model.linear.weight, wanted, rtol=1e-13)


# --- torch.func -----------------------------------------------------------------------------------


def test_func_grad_and_vmap_and_hessian(
    case: tuple[Callable[..., Tensor], dict[str, float]],
) -> None:
    penalty, strengths = case
    w = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(torch.func.grad(penalty)(w), reference.gradient(w, **strengths))
    batch = torch.randn(5, 4, 3, dtype=torch.float64)
    one_by_one = torch.stack([reference.penalty(b, **strengths) for b in batch])
    assert torch.allclose(torch.vmap(penalty)(batch), one_by_one)
    gradients = torch.stack([reference.gradient(b, **strengths) for b in batch])
    assert torch.allclose(torch.vmap(torch.func.grad(penalty))(batch), gradients)
    jacobian = torch.func.jacrev(torch.func.grad(penalty))(w)
    assert torch.allclose(torch.func.hessian(penalty)(w), jacobian)
    by_hand = torch.autograd.functional.hessian(penalty, w)
    assert torch.allclose(jacobian, by_hand)


def test_vmap_over_another_dimension_and_an_unbatched_tensor() -> None:
    batch, shared = torch.randn(4, 5, 3), torch.randn(2, 2)
    ours = torch.vmap(lambda b: F.l1_penalty([b, shared], 0.5), in_dims=1)(batch)
    wanted = 0.5 * (batch.abs().sum((0, 2)) + shared.abs().sum())
    assert torch.allclose(ours, wanted)


# --- modes ----------------------------------------------------------------------------------------


def test_checkpointed_penalty() -> None:
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for reentrant in (False, True):
        w.grad = None
        torch.utils.checkpoint.checkpoint(
            lambda p: F.l1_penalty(p * 2, 0.5), w, use_reentrant=reentrant
        ).backward()
        assert w.grad is not None
        assert torch.allclose(w.grad, w.sign())
