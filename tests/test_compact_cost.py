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
    assert counts[0] == counts[1] <= 24


class Sometimes(Attention):
    """Attention that may count its heads by itself."""

    def __init__(self, fixed: bool) -> None:
        super().__init__("outer")
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        return Fixed.forward(self, x) if self.fixed else super().forward(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("fixed", [{2}, {0}, {4}, {0, 1, 2}, {1, 2, 4}, {0, 4}])
def test_heads_go_only_where_they_were_tried(fixed: set[int]) -> None:
    torch.manual_seed(0)
    model, x = Stack([Sometimes(i in fixed) for i in range(5)]), torch.randn(2, 6, 5)
    groups = fusereg.groups_of(model, x)
    found = {int(g.name.split(".")[1]) for g in groups if g.name.startswith("attentions.")}
    # What fails for the first and the last of a kind is not tried for those between.
    assert found == (set() if fixed == {0, 4} else set(range(5)) - fixed)
    assert {f"attentions.{i}.qkv" for i in set(range(5)) - found} <= groups.kept.keys()
    assert all(g.size == HEADS for g in groups if g.name.startswith("attentions."))


def test_a_line_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.groups_of(blocks(1), torch.randn(2, 3, 6, 6))
    assert "fusereg.groups_of: trying 3 sets of channels, in a dozen runs" in caplog.text
