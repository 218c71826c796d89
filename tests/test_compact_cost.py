"""What finding the channels takes: runs of the model, whatever its depth."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import fusereg
from test_compact import Block
from test_compact import double as double  # in float64 from one seed
from test_compact_heads import HEADS, WIDTH, Attention, Fixed

pytest.importorskip("torch_pruning")

from fusereg.compact.graph import Inputs
from fusereg.compact.parts import Part, Set
from fusereg.compact.probe import _largest


class Stack(nn.Module):
    """Attentions, one after the other."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in attentions)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)  # type: ignore[no-any-return]


def blocks(depth: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), *(Block(8) for _ in range(depth))),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def test_a_deeper_model_is_not_run_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Inputs.run
    monkeypatch.setattr(Inputs, "run", lambda *args: runs.append(args) or run(*args))
    counts = []
    for depth in (1, 6):
        runs.clear()
        fusereg.compact(blocks(depth).eval(), torch.randn(2, 3, 6, 6))
        counts.append(len(runs))
    assert counts == [22, 22]  # as docs/compact.md says


def test_sets_that_fail_alike_are_tried_side_by_side() -> None:
    """Of a transformer, single channels of heads and hidden units in turn."""
    sets = []
    for i in range(8):
        for name, size in (("qkv", 24), ("up", 8)):
            part = Part(f"blocks.{i}.{name}", "out", (), torch.arange(size))
            sets.append(Set(part.module, size, [part]))
    tried = []

    def fails(some: list[Set]) -> str | None:
        tried.append(len(some))
        return "heads" if any("qkv" in s.name for s in some) else None

    kept: dict[str, str] = {}
    passed = _largest(sets, fails, kept)
    assert [s.name for s in passed] == [f"blocks.{i}.up" for i in range(8)]
    assert kept == {f"blocks.{i}.qkv": "heads" for i in range(8)}
    # All, a half for each kind, and the halves of that which fails; what passes once more.
    assert tried.count(1) == 8
    assert len(tried) == 1 + 1 + (2 * 8 - 1) + 1


class Sometimes(Attention):
    """Attention that may count its heads by itself."""

    def __init__(self, fixed: bool) -> None:
        super().__init__("outer")
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        return Fixed.forward(self, x) if self.fixed else super().forward(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("fixed", [set(), {2}, {0, 1, 2}, {1, 4}])
def test_heads_go_where_they_can_beside_others_that_cannot(fixed: set[int]) -> None:
    torch.manual_seed(0)
    model, x = Stack([Sometimes(i in fixed) for i in range(5)]), torch.randn(2, 6, 5)
    groups = fusereg.groups_of(model, x)
    found = {int(g.name.split(".")[1]) for g in groups if g.name.startswith("attentions.")}
    assert found == set(range(5)) - fixed
    assert {f"attentions.{i}.qkv" for i in set(range(5)) - found} <= groups.kept.keys()
    assert all(g.size == HEADS for g in groups if g.name.startswith("attentions."))


def test_a_line_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.groups_of(blocks(1), torch.randn(2, 3, 6, 6))
    assert "fusereg.groups_of: trying 3 sets of channels, in a dozen runs" in caplog.text
