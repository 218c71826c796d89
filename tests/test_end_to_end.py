"""Converted networks where torch does something else than run them: compile, autocast, and so on.

The networks are those of the end-to-end benchmark, every chain of them fused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusereg
from fusereg.bench import models, twins
from fusereg.bench.twins import Fused, Plain, Recipe

CPU = torch.device("cpu")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": lambda dropout=0.0: models.ResNet((4, 8), dropout=dropout),
    "vit": lambda dropout=0.0: models.ViT(14, width=16, depth=2, heads=2, dropout=dropout),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def converted(network: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return fusereg.convert(NETWORKS[network](dropout=dropout))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(count, 1, 14, 14, generator=draw), torch.arange(count) % 10


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Of every parameter, after one backward through ``run`` (the model)."""
    x, y = batch()
    model.zero_grad()
    forward = model if run is None else run
    F.cross_entropy(forward(x).float(), y).backward()
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def close(actual: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_whole_it_is_the_same(network: str) -> None:
    """One graph of the network, in training and in evaluation."""
    model = converted(network)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        close(gradients(model, compiled), gradients(other))
    close(buffers(model), buffers(other))
    x, _ = batch()
    model.eval()
    close(compiled(x), other.eval()(x))


def test_compiled_dropout_follows_the_seed(network: str) -> None:
    model = converted(network, dropout=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def seeded(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return gradients(model, compiled)

    first = seeded(1)
    assert all(map(torch.equal, first, seeded(1)))
    assert not all(map(torch.equal, first, seeded(2)))


@pytest.mark.slow
def test_a_compiled_twin_takes_the_plain_ones_steps(network: str) -> None:
    """The whole step around the compiled network: penalty, AdamW, proximal step."""
    recipe = twins.without_chance(Recipe(network, side=14, l1=0.1, group=1e-3))
    plain, fused = Plain(recipe, CPU), Fused(recipe, CPU)
    fused.compile(backend="aot_eager")
    for twin in (plain, fused):
        twin.model.double()
    x, y = batch(16)
    for _ in range(3):
        losses = [t.train_step(x.double(), y, torch.arange(16), 0) for t in (plain, fused)]
        close(losses[1], losses[0], 1e-10)
    close(fused.model.state_dict(), dict(plain.model.state_dict()), 1e-8)


@pytest.mark.slow
def test_inductor() -> None:
    """Once, with its own code for everything between our kernels."""
    model = converted("resnet")
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    close(gradients(model, compiled), gradients(other), 1e-4)
    close(buffers(model), buffers(other), 1e-4)


# --- autocast -------------------------------------------------------------------------------------


def cast(run: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = run(x)
        return out

    return forward


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of all gradients together, relative."""
    off = torch.stack([(a - b).square().sum() for a, b in zip(found, exact, strict=True)])
    size = torch.stack([b.square().sum() for b in exact])
    return float((off.sum() / size.sum()).sqrt())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(network: str, compiled: bool) -> None:
    """bfloat16 where torch's layers have it; parameters, statistics and gradients stay float32."""
    plain = NETWORKS[network]()
    exact = gradients(copy.deepcopy(plain))
    model = fusereg.convert(copy.deepcopy(plain))
    run = cast(model)
    assert run(batch()[0]).dtype is torch.bfloat16
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, theirs = gradients(model, run), gradients(plain, cast(plain))
    assert {g.dtype for g in ours} == {torch.float32}
    assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
    # bfloat16 has 8 bits; what is fused is rounded less often, and no worse than torch's.
    assert error(ours, exact) < 1.5 * error(theirs, exact) + 1e-3
    assert error(ours, exact) < 0.1


# --- activation checkpointing ---------------------------------------------------------------------


def parts(model: nn.Module) -> nn.Sequential:
    """What is checkpointed, one by one."""
    found = model.blocks if isinstance(model, models.ResNet) else model.layers
    assert isinstance(found, nn.Sequential)
    return found


class Checkpointed(nn.Module):
    """A block that keeps its input only, and runs a second time in backward."""

    def __init__(self, block: nn.Module, keep_stats: bool) -> None:
        super().__init__()
        self.block = block
        self.keep_stats = keep_stats

    def contexts(self) -> tuple[Any, Any]:
        second = fusereg.nn.keep_stats(self.block) if self.keep_stats else contextlib.nullcontext()
        return contextlib.nullcontext(), second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False, context_fn=self.contexts)
        return y


def with_checkpoints(model: nn.Module, keep_stats: bool = True) -> nn.Module:
    """The same model, its stem too where that holds the batch norms."""
    model = copy.deepcopy(model)
    for i, block in enumerate(parts(model)):
        parts(model)[i] = Checkpointed(block, keep_stats)
    if isinstance(model, models.ViT):
        model.stem = Checkpointed(model.stem, keep_stats)  # type: ignore[assignment]
    return model


def test_checkpointed_it_is_the_same(network: str) -> None:
    """Gradients to the bit, the masks of dropout too; statistics are updated once a step."""
    model = converted(network, dropout=0.2)
    again = with_checkpoints(model)
    for seed in range(2):
        torch.manual_seed(seed)
        wanted = gradients(model)
        torch.manual_seed(seed)
        found = gradients(again)
        assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, again.buffers(), model.buffers()))
    assert all(m.update_stats for m in again.modules() if hasattr(m, "update_stats"))


def test_without_keep_stats_they_are_updated_twice(network: str) -> None:
    """As with torch's own layers: what keep_stats is for."""
    model = converted(network)
    again = with_checkpoints(model, keep_stats=False)
    gradients(model)
    gradients(again)
    counts = {int(b) for name, b in again.named_buffers() if name.endswith("tracked")}
    assert 2 in counts


def test_checkpoints_under_autocast(network: str) -> None:
    model = converted(network, dropout=0.2)
    again = with_checkpoints(model)
    found = []
    for each in (model, again):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(each))
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, again.buffers(), model.buffers()))


def test_keep_stats_puts_back_what_it_found() -> None:
    norms = nn.Sequential(fusereg.nn.BatchNorm1d(3), fusereg.nn.BatchNorm1d(3, update_stats=False))
    x = torch.randn(5, 3)
    bad = torch.randn(5, 4)
    with fusereg.nn.keep_stats(norms):
        norms(x)
    with (
        pytest.raises(ValueError, match="input has 4 channels, this layer 3"),
        fusereg.nn.keep_stats(norms),
    ):
        norms(bad)
    assert [norm.update_stats for norm in norms] == [True, False]
    assert int(norms[0].num_batches_tracked) == 0
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got int"):
        fusereg.nn.keep_stats(3).__enter__()  # type: ignore[arg-type]


# --- export ---------------------------------------------------------------------------------------


def test_exported_for_evaluation(network: str) -> None:
    """For any batch size."""
    model = converted(network, dropout=0.2)
    gradients(model)  # statistics that are not those of the start
    model.eval()
    count = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model, (batch(6)[0],), dynamic_shapes=({0: count},))
    for size in (6, 11):
        x, _ = batch(size)
        close(program.module()(x), model(x))


def test_exported_for_training(network: str) -> None:
    """Backward through the exported program, and its running statistics."""
    model = converted(network)
    program = torch.export.export(model, (batch()[0],))
    exported = program.module()
    for _ in range(2):
        found, wanted = gradients(exported), gradients(model)
        # The program lists parameters in an order of its own.
        by_name = dict(zip((n for n, _ in model.named_parameters()), wanted, strict=True))
        for (name, _), gradient in zip(exported.named_parameters(), found, strict=True):
            close(gradient, by_name[name])
    theirs = dict(exported.named_buffers())
    for name, value in model.named_buffers():
        close(theirs[name], value)


def test_exported_dropout_follows_the_seed(network: str) -> None:
    exported = torch.export.export(converted(network, dropout=0.3), (batch()[0],)).module()

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = exported(batch()[0])
        return out

    first = seeded(1)
    close(seeded(1), first, 0.0)
    assert not torch.equal(seeded(2), first)


def test_an_exported_program_runs_without_fusereg(network: str) -> None:
    """Its decompositions are torch's operations."""
    model = converted(network).eval()
    program = torch.export.export(model, (batch()[0],))
    program = program.run_decompositions(fusereg.decompositions())
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("fusereg") for name in names)
    close(program.module()(batch()[0]), model(batch()[0]))
