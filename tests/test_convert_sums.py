"""Sums of branches that end in norms: each part belongs to one chain, and results stay the same."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusereg

#: What a branch does with x; {0} is its number.
BRANCHES = {
    "identity": "x",
    "norm": "self.norm{0}(x)",
    "convolution": "self.norm{0}(self.conv{0}(x))",
    "activation": "F.relu(self.norm{0}(self.conv{0}(x)))",
    "dropout": "self.drop(self.norm{0}(self.conv{0}(x)))",
}
SUMS = {
    "a + b": "y = a + b",
    "b + a": "y = b + a",
    "add": "y = torch.add(a, b)",
    "relu": "y = F.relu(a + b)",
    "silu": "y = F.silu(a + b)",
    "in place": "y = a * 1.0\n    y += b\n    y = F.relu(y)",
    "again": "y = a + b + a",
    "three": "y = F.relu(a + b + self.norm2(self.conv2(x)))",
    "b first": "y = self.norm2(b) + a",
}


class Branches(nn.Module):
    """Layers for branches; ``forward`` is a function of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            norm = nn.BatchNorm2d(4)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            self.add_module(f"conv{i}", nn.Conv2d(4, 4, 1))
            self.add_module(f"norm{i}", norm)
        self.drop = nn.Dropout(0.0)


def model_of(kinds: tuple[str, ...], sums: str) -> nn.Module:
    a, b = (BRANCHES[kind].format(i) for i, kind in enumerate(kinds))
    names: dict[str, Any] = {"F": F, "torch": torch}
    body = f"def forward(self, x):\n    a = {a}\n    b = {b}\n    {SUMS[sums]}\n    return y\n"
    exec(body, names)
    made: nn.Module = type("Sum", (Branches,), {"forward": names["forward"]})()
    return made


@pytest.mark.all_cases
@pytest.mark.parametrize("sums", SUMS)
def test_every_pair_of_branches_computes_the_same(sums: str) -> None:
    for kinds in itertools.product(BRANCHES, repeat=2):
        torch.manual_seed(0)
        model = model_of(kinds, sums).double()
        mine = fusereg.convert(copy.deepcopy(model))
        for training in (True, False):
            results = []
            for net in (model, mine):
                net.train(training).zero_grad()
                x = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.manual_seed(1))
                x.requires_grad_()
                y = net(x)
                y.pow(3).sum().backward()
                results.append([y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
            for want, got in zip(*results, strict=True):
                assert (want is None) == (got is None), kinds
                if want is not None and got is not None:
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=str(kinds))


@pytest.mark.parametrize(
    ("kinds", "chains"),
    [
        (("convolution", "norm"), "1 chain "),
        (("norm", "convolution"), "1 chain "),
        (("activation", "norm"), "2 chains "),
        (("activation", "activation"), "2 chains "),
    ],
    ids=str,
)
def test_a_sum_belongs_to_one_norm(
    kinds: tuple[str, ...], chains: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.convert(model_of(kinds, "relu"))
    assert f"{chains}fused" in caplog.text


#: What is added to, and how.
ADDED_TO = {
    "norm": "self.norm0(x)",
    "layer and norm": "self.norm0(self.conv0(x))",
    "dropout": "self.drop(self.conv0(x))",
    "silent dropout": "self.still(self.conv0(x))",
}
HOW = {"+": "a = a + r", "+=": "a += r", "add_": "a.add_(r)", "relu": "a += r\n    a = F.relu(a)"}
#: (shape, dtype) of x and of what is added to it.
TERMS = (
    ((2, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.float64),
    ((2, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.bfloat16),
    ((2, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.float32),
    ((2, 4, 3, 3), torch.float32, (4, 1, 1), torch.float32),
    ((1, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.float32),
    ((2, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.complex64),
    ((2, 4, 3, 3), torch.float32, (2, 4, 3, 3), torch.int64),
)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("to", ADDED_TO)
def test_sums_have_the_dtype_shape_and_errors_that_they_had(to: str, how: str) -> None:
    """A sum in place keeps those of what it is added to; another takes those of both."""
    names: dict[str, Any] = {"F": F, "torch": torch}
    exec(f"def forward(self, x, r):\n    a = {ADDED_TO[to]}\n    {HOW[how]}\n    return a\n", names)
    model = type("Sum", (Branches,), {"forward": names["forward"]})()
    model.still = nn.Dropout(0.5)
    model.drop.p = 1e-9  # drops nothing, and is no identity
    model.still.eval()
    mine = fusereg.convert(copy.deepcopy(model))
    for autocast, (shape, dtype, other_shape, other) in itertools.product((False, True), TERMS):
        x = torch.randn(shape, dtype=dtype)
        r = torch.randn(other_shape).mul(4).to(other)
        results: list[Any] = []
        for net in (model, mine):
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    results.append(net(x.clone(), r.clone()))
            except RuntimeError as error:
                results.append(str(error))
        want, got = results
        if isinstance(want, str):
            assert got == want
        else:
            off = 0.1 if autocast else 1e-5
            torch.testing.assert_close(got, want, rtol=off / 10, atol=off)
