"""Dropout inside torch: generators, derivatives, memory, checkpoint, compile, func, modules."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusereg
import reference_philox
from fusereg import functional as F

KINDS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "dropout": (F.dropout, (4, 6)),
    "dropout1d": (F.dropout1d, (2, 3, 4)),
    "dropout2d": (F.dropout2d, (2, 3, 2, 2)),
    "dropout3d": (F.dropout3d, (2, 3, 2, 2, 1)),
    "alpha_dropout": (partial(F.alpha_dropout, training=True), (4, 6)),
    "feature_alpha_dropout": (partial(F.feature_alpha_dropout, training=True), (3, 4, 2)),
    "drop_path": (F.drop_path, (6, 4)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[int, ...]]:
    return KINDS[request.param]


# --- where the numbers come from ------------------------------------------------------------------


def test_a_generator_reproduces_and_leaves_the_default_one_alone() -> None:
    x = torch.ones(1000)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = F.dropout(x, generator=generator), F.dropout(x, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(F.dropout(x, generator=generator), first)
    for arguments in ({"seed": 5}, {"training": False}, {"p": 0.0}):
        F.dropout(x, **arguments)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_draw_numbers_of_their_own() -> None:
    x = torch.ones(256)
    results: list[Tensor] = []

    def work() -> None:
        results.extend(F.dropout(x) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len({tuple(r.tolist()) for r in results}) == 200


def test_the_first_call_may_be_in_inference_mode() -> None:
    done: list[Tensor] = []

    def work() -> None:
        with torch.inference_mode():
            done.append(F.dropout(torch.ones(8)))
        done.append(F.dropout(torch.ones(8, requires_grad=True)))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert len(done) == 2


def test_the_callers_pair_may_change_before_backward() -> None:
    x = torch.ones(100, requires_grad=True)
    pair = torch.tensor([1, 0])
    y = F.dropout(x, seed=pair)
    pair.fill_(9)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)


@pytest.mark.gpu
def test_cuda_generator_moves_on_by_one_step() -> None:
    x = torch.ones(1000, device="cuda")
    generator = torch.cuda.default_generators[x.device.index or 0]
    before = generator.get_offset()
    y = F.dropout(x)
    assert generator.get_offset() == before + 4
    mask = reference_philox.mask(1000, 0.5, generator.initial_seed(), before)
    assert torch.equal((y != 0).cpu(), mask)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "drop_block2d", "gaussian_dropout"])
def test_cuda_graph_replays_draw_anew(name: str) -> None:
    function = getattr(F, name)
    x = torch.ones(4, 8, 16, 16, device="cuda", requires_grad=True)
    function(x, 0.3).sum().backward()
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        y = function(x, 0.3)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(gradient, y)
        masks.append(y.detach().clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


# --- derivatives and memory -----------------------------------------------------------------------


def test_forward_mode_in_place() -> None:
    x, tangent = torch.randn(100), torch.randn(100)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent) * 1
        y = torch.autograd.forward_ad.unpack_dual(F.dropout(dual, 0.5, inplace=True, seed=5))
    assert y.tangent is not None
    assert torch.equal(y.primal, F.dropout(x, 0.5, seed=5))
    assert torch.equal(y.tangent, F.dropout(tangent, 0.5, seed=5))


def test_gradcheck_in_place() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: F.dropout(t * 1, 0.4, inplace=True, seed=5), (x,))
    assert torch.autograd.gradgradcheck(lambda t: F.dropout(t * 1, 0.4, inplace=True, seed=5), (x,))


def test_nothing_is_kept_for_backward(kind: tuple[Callable[..., Tensor], tuple[int, ...]]) -> None:
    function, shape = kind
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    x = torch.randn(1 << 12, *shape[1:], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x, 0.5)
    assert kept == []
    node: Any = y.grad_fn
    held = [v for v in vars(node).values() if isinstance(v, Tensor)]
    assert held == []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.ops.fusereg.dropout(x, torch.tensor([1, 0]), 0.5, False, 0, 0)
    assert sum(kept) == 16, "the pair alone"


# --- torch.library --------------------------------------------------------------------------------

_OPS = torch.ops.fusereg


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_opcheck_dropout_at_the_ends(p: float) -> None:
    x = torch.randn(3, 4, requires_grad=True).t()
    torch.library.opcheck(_OPS.dropout.default, (x, torch.tensor([1, 0]), p, False, 0, 0))


# --- compile, export ------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.drop = fusereg.nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.drop(torch.relu(self.linear(x)) + 1)
        return result


def assert_gradient_has_the_mask(y: Tensor, model: Model) -> None:
    """The bias's gradient counts, for each unit not cut off, the elements that were kept."""
    model.zero_grad()
    y.sum().backward()
    gradient = model.linear.bias.grad
    assert gradient is not None
    with torch.no_grad():
        active = y > 2.0  # more than the 1 that was added, twice: kept, and relu not cut off
    assert torch.equal(gradient, 2.0 * active.sum(0))


def compiles(backend: str) -> None:
    model, x = Model(), torch.randn(32, 8)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert 0.35 < (first == 0).float().mean() < 0.65
    assert_gradient_has_the_mask(compiled(x), model)
    model.eval()
    assert torch.equal(compiled(x), model(x))


def test_compile_fullgraph() -> None:
    compiles("aot_eager")


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    compiles("inductor")


def test_compile_with_a_generator() -> None:
    """The graph breaks at the generator; a pair drawn from it outside does not break it."""
    generator, x = torch.Generator().manual_seed(3), torch.ones(100)

    def f(t: Tensor) -> Tensor:
        return F.dropout(t * 1, generator=generator) + 1

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(compiled(x), first)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Generator"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    whole = torch.compile(lambda t, s: F.dropout(t, seed=s), backend="aot_eager", fullgraph=True)
    pairs = torch.randint(2**63 - 1, (2, 2), generator=generator)
    for pair in pairs:
        assert torch.equal(whole(x, pair), F.dropout(x, seed=pair))


def test_compile_in_place_and_checkpoint() -> None:
    def f(t: Tensor) -> Tensor:
        y = checkpoint(lambda s: F.dropout(s * 2, 0.5), t, use_reentrant=False)
        assert isinstance(y, Tensor)
        return F.dropout(y + 1, 0.5, inplace=True)

    x = torch.ones(64, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert x.grad is not None
    # y = 2 (4 m + 1) n: 10 where both are kept, 2 where only the second is.
    assert set(y.tolist()) <= {0.0, 2.0, 10.0}
    assert torch.equal(x.grad, torch.where(y == 10, 8.0, 0.0))


# --- modes and subclasses -------------------------------------------------------------------------


class Tagged(Tensor):
    pass


def test_subclasses_and_parameters() -> None:
    assert type(F.dropout(torch.ones(5).as_subclass(Tagged))) is Tagged
    parameter = nn.Parameter(torch.ones(5))
    y = F.dropout(parameter, seed=1)
    assert type(y) is Tensor
    y.sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, y)


# --- modules --------------------------------------------------------------------------------------

MODULES: dict[str, tuple[int, ...]] = {
    "Dropout": (4, 6),
    "Dropout1d": (4, 6, 3),
    "Dropout2d": (4, 6, 3, 2),
    "Dropout3d": (4, 6, 3, 2, 2),
    "AlphaDropout": (4, 6),
    "FeatureAlphaDropout": (4, 6, 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs_with_the_same_repr(name: str) -> None:
    ours, theirs = getattr(fusereg.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for arguments in ((), (0.3,), (0.3, True)):
        assert repr(ours(*arguments)) == repr(theirs(*arguments))
    assert ours(p=0.2, inplace=True).p == 0.2
    assert ours(keep_prob=0.75).p == 0.25
    with pytest.raises(ValueError, match="p and keep_prob exclude each other"):
        ours(0.5, keep_prob=0.5)
    x = torch.randn(MODULES[name])
    layer = ours(0.5)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert not torch.equal(y, x)
    assert layer.eval()(x) is x
    in_place = ours(0.5, True)
    assert in_place(x) is x


def test_drop_path_module() -> None:
    layer = fusereg.nn.DropPath(0.25)
    assert repr(layer) == "DropPath(p=0.25, inplace=False)"
    y = layer(torch.ones(200, 3))
    assert set(y[:, 0].tolist()) == {0.0, 4.0 / 3.0} or y[:, 0].unique().numel() == 2
    assert torch.equal(y[:, :1].expand(-1, 3), y)
    assert layer.eval()(y) is y


@pytest.mark.slow
def test_a_network_learns_as_with_torchs_dropout() -> None:
    """Digits-like blobs: both reach the same loss; the masks differ, so not bit for bit."""
    centers = 3 * torch.randn(10, 20)
    labels = torch.randint(0, 10, (2000,))
    points = centers[labels] + torch.randn(2000, 20)

    def train(dropout: Callable[[float], nn.Module]) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(20, 64),
            nn.ReLU(),
            dropout(0.3),
            nn.Linear(64, 64),
            nn.ReLU(),
            dropout(0.3),
            nn.Linear(64, 10),
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(points), labels).backward()
            optimizer.step()
        with torch.no_grad():
            return nn.functional.cross_entropy(net.eval()(points), labels).item()

    ours, theirs = train(fusereg.nn.Dropout), train(nn.Dropout)
    assert theirs < 0.3
    assert abs(ours - theirs) < 0.25 * theirs + 0.02
