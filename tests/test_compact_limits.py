"""Compaction where it is easily wrong: clipping blocks, layers that change in training, states."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg

pytest.importorskip("torch_pruning")

from fusereg.compact.graph import _numbers
from fusereg.compact.probe import Range


class Block(nn.Module):
    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.last = last
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        for parameter in self.b.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("last", "identity"),
    [
        (torch.relu, True),
        (nn.functional.relu6, False),
        (lambda z: z.clamp(-10, 10), False),
        (lambda z: z.clamp(max=1e4), False),
        (lambda z: torch.where(z < 50, z, 0.1 * z), False),
    ],
    ids=["relu", "relu6", "clamp", "a large limit", "where"],
)
def test_a_block_that_clips_large_inputs_is_no_identity(
    last: Callable[[Tensor], Tensor], identity: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(last), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = fusereg.compact(net, x)
    assert isinstance(small[2], nn.Identity) is identity  # type: ignore[index]
    for scale in (1.0, 30.0, 1e6):
        torch.testing.assert_close(small(scale * x), net(scale * x))


def mlp() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, torch.randn(4, 6)


@torch.no_grad()
def kill(layer: nn.Linear) -> None:
    layer.weight[:3] = 0
    layer.bias[:3] = 0


def test_layers_that_change_in_training_are_copied_as_they_are() -> None:
    net, x = mlp()
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    with torch.no_grad():
        spectral.parametrizations.weight.original.add_(torch.randn(6, 6))  # type: ignore[union-attr]
    kill(net[0])  # type: ignore[arg-type]
    whole = nn.Sequential(spectral, nn.ReLU(), net).double()
    x = x.double()
    small = fusereg.compact(whole, x)
    assert [m.training for m in small.modules()] == [True] * len(list(small.modules()))
    torch.testing.assert_close(small.eval()(x), whole.eval()(x), rtol=1e-12, atol=1e-12)


def test_an_optimizer_with_groups_trains_on() -> None:
    net, x = mlp()
    options = {"groups": fusereg.groups_of(net, x), "group": 1e-3}
    optimizer = fusereg.optim.AdamW(net.parameters(), lr=0.01, **options)
    net(x).square().mean().backward()
    optimizer.step()
    kill(net[0])  # type: ignore[arg-type]
    small = fusereg.compact(net, x, optimizer=optimizer)
    before = [p.clone() for p in small.parameters()]
    small(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(small.parameters(), before, strict=True))
    assert optimizer.groups is not None
    assert optimizer.groups[0].size == 5


def test_what_cannot_be_carried_is_refused_in_words() -> None:
    net, x = mlp()
    kill(net[0])  # type: ignore[arg-type]
    other = torch.optim.SGD(mlp()[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer holds no parameter of the model"):
        fusereg.compact(net, x, optimizer=other)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) has none"):
        fusereg.groups_of(net, x)


class Masked(nn.Module):
    """A network with a score that a mask has taken out; it may read a channel in a hidden way."""

    def __init__(self, masked: float, hidden: bool) -> None:
        super().__init__()
        net, self.x = mlp()
        self.first, self.last = net[0], net[2]
        kill(self.first)
        self.masked, self.hidden = masked, hidden

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.first(x))
        scores = self.last(features)
        if self.hidden:
            scores = scores + float(features.detach()[:, 5].sum())
        return torch.cat([scores, torch.full_like(scores[:, :1], self.masked)], 1)


@pytest.mark.parametrize("masked", [float("-inf"), float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("hidden", [False, True])
def test_outputs_that_are_not_finite_hide_no_difference_of_the_others(
    masked: float, hidden: bool
) -> None:
    net = Masked(masked, hidden)
    small = fusereg.compact(net, net.x)
    assert small.first.out_features == (8 if hidden else 5)
    torch.testing.assert_close(small(net.x), net(net.x), equal_nan=True)


@pytest.mark.parametrize(
    ("result", "width"),
    [
        (lambda scores, features: features.argmax(1), 8),
        (lambda scores, features: features > 0, 8),
        (lambda scores, features: torch.complex(features, features), 8),
        (lambda scores, features: features.shape[1], 8),
        (lambda scores, features: {"size": torch.tensor(features.shape[1])}, 8),
        (lambda scores, features: SimpleNamespace(features=[features]), 8),
        (lambda scores, features: SimpleNamespace(scores=[scores], name="net"), 5),
        (lambda scores, features: (features > 0).sum(1), 8),
        (lambda scores, features: scores.argmax(1), 5),
        (lambda scores, features: torch.complex(scores, scores), 5),
        (lambda scores, features: len(scores), 5),
    ],
)
def test_results_that_are_no_real_numbers_stay_as_they_are(
    result: Callable[[Tensor, Tensor], Any], width: int
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net, self.x = mlp()
            self.first, self.last = net[0], net[2]

        def forward(self, x: Tensor) -> Any:
            features = torch.relu(self.first(x))
            scores = self.last(features)
            return scores, result(scores, features)

    net = Net()
    kill(net.first)  # type: ignore[arg-type]
    small = fusereg.compact(net, net.x)
    assert small.first.out_features == width
    wanted, got = (list(_numbers(model(net.x))) for model in (net, small))
    torch.testing.assert_close(got, wanted)


def test_a_channel_that_is_infinite_at_times_is_not_constant() -> None:
    inf = float("inf")
    low, high = torch.tensor([-inf, 1.0, 1.0, inf, 2.0]), torch.tensor([5.0, inf, 1.0, inf, 3.0])
    assert Range(low, high).constant().tolist() == [False, False, True, False, False]


def test_rich_shows_the_table() -> None:
    console = pytest.importorskip("rich.console").Console(width=100)
    net, x = mlp()
    kill(net[0])  # type: ignore[arg-type]
    table = fusereg.compact(net, x, dry_run=True)
    with console.capture() as captured:
        console.print(table)
    shown = captured.get()
    assert "8 -> 5" in shown
    assert "of the operations" in shown
