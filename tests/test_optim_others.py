"""Optimizers that torch does not have, and other kinds of clipping, against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Backend
from fusereg import optim


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_grads(*lists: list[nn.Parameter]) -> None:
    for together in zip(*lists, strict=True):
        g = torch.randn(together[0].shape).to(together[0].dtype)
        for p in together:
            p.grad = g.to(p.device, copy=True)


@pytest.fixture(scope="module")
def timm_optim() -> Any:
    pytest.importorskip("other_libraries")
    return pytest.importorskip("timm.optim")


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.7)])
def test_lion_is_timms_step_for_step(timm_optim: Any, weight_decay: float, betas: Any) -> None:
    ours = parameters((5, 7), (33,), (2, 3, 4))
    theirs = copies(ours)
    options: dict[str, Any] = {"lr": 0.01, "betas": betas, "weight_decay": weight_decay}
    own, other = optim.Lion(ours, **options), timm_optim.Lion(theirs, **options)
    for _ in range(6):
        give_grads(ours, theirs)
        own.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(own.state[p]["exp_avg"], other.state[q]["exp_avg"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "always_adapt": True, "trust_clip": True},
        {"weight_decay": 0.3, "betas": (0.5, 0.7), "max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_lamb_is_timms_step_for_step(timm_optim: Any, options: dict[str, Any]) -> None:
    ours = parameters((5, 7), (33,), (2, 3, 4), (150, 200), (4,))  # more than a chunk
    with torch.no_grad():
        ours[4].zero_()  # without a norm
    theirs = copies(ours)
    own = optim.LAMB(ours, lr=0.05, **options)
    other = timm_optim.Lamb(theirs, lr=0.05, **{"max_grad_norm": None, **options})
    for _ in range(6):
        give_grads(ours, theirs)
        own.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(own.state[p][key], other.state[q][key])


def test_a_step_of_lamb_that_overflowed_changes_nothing(backend: Backend) -> None:
    p = torch.randn(300, device=backend.device).requires_grad_()
    optimizer = optim.LAMB([p], lr=0.1, l1=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())]
    optimizer.found_inf = torch.ones((), device=backend.device)  # type: ignore[attr-defined]
    optimizer.step()
    for x, y in zip(before, [p.detach(), *optimizer.state[p].values()], strict=True):
        assert torch.equal(x, y)
    assert float(optimizer.penalty_value) == pytest.approx(0.1 * float(p.detach().abs().sum()))


def test_lamb_refuses_the_gradient_of_groups() -> None:
    with pytest.raises(ValueError, match="LAMB: group cannot go with prox=False"):
        optim.LAMB(parameters((2, 3)), group=0.1, prox=False)


# --- groups along another dimension ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "NAdam", "Lion", "LAMB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_along_dimension_1_are_those_of_the_transposed(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    """Bit for bit, with all that a step may contain; a bias in the same group is left as it is."""
    options: dict[str, Any] = {"lr": 0.01, "group": 0.5, "l1": 0.1, "ema_decay": 0.9}
    options |= {"master_weights": True, "max_grad_norm": 3.0}
    start = [p.to(backend.device) for p in parameters((6, 5), (3, 7, 2, 2), (7,), dtype=dtype)]
    ours = [nn.Parameter(p.detach().clone()) for p in start]
    ours[1] = nn.Parameter(ours[1].detach().to(memory_format=torch.channels_last))
    turned = [nn.Parameter(turn(p.detach()).contiguous()) for p in start]
    make = getattr(optim, name)
    own, other = make(ours, group_dim=1, **options), make(turned, **options)
    for _ in range(3):
        for p, q in zip(ours, turned, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = turn(p.grad).contiguous()
        own.step()
        other.step()
    assert torch.equal(own.penalty_value, other.penalty_value)
    for p, q in zip(ours, turned, strict=True):
        assert torch.equal(turn(p.detach()), q.detach())
        for key in ("ema_param", *own._keys):
            if key in other.state[q]:
                assert own.state[p][key].shape == p.shape
                assert torch.equal(turn(own.state[p][key]), other.state[q][key])


def test_states_are_laid_out_along_the_groups_for_good() -> None:
    p = nn.Parameter(torch.randn(6, 5))
    optimizer = optim.AdamW([p], group=0.1, group_dim=1, ema_decay=0.9, amsgrad=True)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema_param"):
            assert optimizer.state[p][key].stride() == (1, 6), key
    assert p.stride() == (5, 1)


def turn(p: Tensor) -> Tensor:
    return p.transpose(0, 1) if p.dim() > 1 else p


@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        (2, ValueError, r"group_dim must be a dimension of params\[0\], whose shape is \(6, 5\)"),
        ("rows", TypeError, "SGD: group_dim must be an int, got str"),
    ],
)
def test_a_group_dim_that_is_none_is_refused_before_anything_is_written(
    dim: Any, error: type[Exception], message: str
) -> None:
    (p,) = parameters((6, 5))
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    with pytest.raises(error, match=message):
        optim.SGD([p], lr=0.1, group=0.1, group_dim=dim).step()
    assert torch.equal(p, before)


def test_lion_stops_at_zero_and_leaves_it_only_for_a_gradient_above_l1() -> None:
    p = nn.Parameter(torch.tensor([0.005, -0.005, 0.0, 0.0, 0.5]))
    optimizer = optim.Lion([p], lr=0.01, l1=0.1)
    p.grad = torch.tensor([10.0, -10.0, 0.9, 1.1, 0.5])  # c is a tenth of it
    optimizer.step()
    assert p.tolist() == pytest.approx([0.0, 0.0, 0.0, -0.01, 0.49])


def test_lion_finds_the_zeros_of_a_lasso() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, dtype=torch.float64, generator=generator)
    y = x[:, :4] @ torch.tensor([2.0, -1.5, 1.0, -1.0], dtype=torch.float64)
    w = nn.Parameter(torch.randn(20, dtype=torch.float64, generator=generator))
    optimizer = optim.Lion([w], lr=0.02, l1=0.2)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 700)
        optimizer.zero_grad()
        (0.5 * (x @ w - y).square().mean()).backward()
        optimizer.step()
    linear_model = pytest.importorskip("sklearn.linear_model")
    theirs = linear_model.Lasso(alpha=0.2, fit_intercept=False, tol=1e-12)
    wanted = torch.from_numpy(theirs.fit(x.numpy(), y.numpy()).coef_)
    assert torch.equal(w == 0, wanted == 0)
    torch.testing.assert_close(w.detach(), wanted, rtol=0.0, atol=1e-3)


# --- clipping by value, adaptive clipping ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.0, 0.3, 6e4])
def test_clip_grad_value_is_torchs(backend: Backend, dtype: torch.dtype, limit: float) -> None:
    ours = [
        nn.Parameter(p.to(backend.device)) for p in parameters((5, 7), (33,), (0,), dtype=dtype)
    ]
    theirs = copies(ours)
    give_grads(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        if p.numel():
            for grad in (p.grad, q.grad):
                grad.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    ours.append(nn.Parameter(torch.ones(2)))  # without a gradient
    optim.clip_grad_value_(ours, limit)
    torch.nn.utils.clip_grad_value_(theirs, limit)
    for p, q in zip(ours[:3], theirs, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad.nan_to_num(7.0), q.grad.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.01, 0.3, 10.0])
def test_adaptive_clipping_is_timms(timm_optim: Any, dtype: torch.dtype, factor: float) -> None:
    from timm.utils.agc import adaptive_clip_grad

    shapes: list[tuple[int, ...]] = [(5, 7), (33,), (4, 3, 2, 2), (6, 1), (3, 5000)]
    ours = parameters(*shapes, dtype=dtype)
    with torch.no_grad():
        ours[0][2] = 0.0  # a row of zeros has the least limit
        ours[2][1] *= 1e-5
    theirs = copies(ours)
    give_grads(ours, theirs)
    assert theirs[0].grad is not None
    wanted = [p.grad.double() for p in copies_with_grads(theirs)]
    optim.adaptive_clip_grad_(ours, factor)
    double = [nn.Parameter(p.detach().double()) for p in theirs]
    for p, g in zip(double, wanted, strict=True):
        p.grad = g
    adaptive_clip_grad(double, clip_factor=factor)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for p, q in zip(ours, double, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=tolerance, atol=tolerance)


def copies_with_grads(params: list[nn.Parameter]) -> list[Any]:
    found = copies(params)
    for p, q in zip(found, params, strict=True):
        assert q.grad is not None
        p.grad = q.grad.clone()
    return found


def test_units_are_those_of_the_layer_where_a_module_is_passed() -> None:
    conv, turned = nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 3, 2)
    with torch.no_grad():
        turned.weight.copy_(conv.weight.transpose(0, 1).reshape(4, 3, 2, 2))
        turned.weight.copy_(torch.arange(48.0).reshape(4, 3, 2, 2))
    turned.weight.grad = torch.ones_like(turned.weight)
    optim.adaptive_clip_grad_(turned, 0.01)
    grad: Tensor = turned.weight.grad
    # An output of a transposed convolution is an index of dimension 1.
    limit = 0.01 * turned.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(grad.transpose(0, 1).flatten(1).norm(dim=1), limit)


CLIPS: dict[str, Any] = {
    "norm": lambda p: optim.clip_grad_norm_(p, 0.1),
    "another norm": lambda p: optim.clip_grad_norm_(p, 0.1, 3.0),
    "a norm that is checked": lambda p: optim.clip_grad_norm_(p, 0.1, error_if_nonfinite=True),
    "value": lambda p: optim.clip_grad_value_(p, 0.1),
    "units": lambda p: optim.adaptive_clip_grad_(p, 0.01),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("how", ["overlapping", "the same", "turned"])
def test_gradients_that_share_memory_are_not_clipped_twice(clip: str, how: str) -> None:
    memory = torch.arange(1.0, 17.0)
    first, *others = parameters((4,), (4,), (4, 4))
    first.grad = torch.ones(4)
    if how == "turned":
        others[0] = nn.Parameter(torch.ones(4, 4))
        others[0].grad, others[1].grad = memory.view(4, 4), memory.view(4, 4).t()
    else:
        others[1] = nn.Parameter(torch.ones(4))
        others[0].grad = memory[:4]
        others[1].grad = memory[2:6] if how == "overlapping" else memory[:4]
    before = memory.clone()
    match = r"parameters\[1\]\.grad and parameters\[2\]\.grad share memory"
    with pytest.raises(ValueError, match=match):
        CLIPS[clip]([first, *others])
    assert torch.equal(memory, before)
    assert torch.equal(first.grad, torch.ones(4))
    CLIPS[clip]([first, others[0], others[0]])  # listed twice, and once in memory
    assert not torch.equal(memory, before)


def test_nor_are_they_in_the_operator_of_compiled_code() -> None:
    memory = torch.arange(1.0, 7.0)
    before = memory.clone()
    with pytest.raises(ValueError, match="gradient 0 and gradient 1 share memory"):
        torch.ops.fusereg.clip_grads_([memory[:4], memory[2:]], 0.1, 1)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("clip", ["value", "units"])
def test_no_gradient_is_clipped_where_one_is_refused(clip: str) -> None:
    params = parameters((4,), (4,))
    params[1] = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="complex"):
        CLIPS[clip](params)
    assert torch.equal(params[0].grad, torch.ones(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.clip_grad_value_(p, -1.0), "clip_value must not be negative, got -1.0"),
        (lambda p: optim.adaptive_clip_grad_(p, -1.0), "clip_factor must not be negative"),
        (lambda p: optim.adaptive_clip_grad_(p, 0.1, eps=-1.0), "eps must not be negative"),
        (lambda _: optim.clip_grad_value_(3, 1.0), "params must be a Tensor"),
    ],
)
def test_what_clipping_refuses(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(parameters((2,)))
