"""What Inductor generates around batch norm: no copy of an activation, in any layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import fusereg.functional as F
from fusereg import nn as fnn
from fusereg.backend import fusereg_backend

ROWS, CHANNELS = torch.contiguous_format, torch.channels_last


def _net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        fnn.BatchNorm2d(32, activation="relu", dropout=dropout),
        nn.Conv2d(32, 32, 3, padding=1),
        fnn.BatchNorm2d(32, activation="relu"),
        nn.Conv2d(32, 16, 1),
    )


def _generated(step: Callable[[], object]) -> list[str]:
    """Return the wrapper codes of forward and backward, without the use of caches."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    assert len(codes) == 2, "one graph forward, one backward"
    return [code[code.index("def call(") :] for code in codes]


def _touched_by_generated_kernels(code: str) -> list[str]:
    """Return the activations of our operators that a generated kernel reads or writes."""
    found = []
    activations: set[str] = set()
    calls = list(re.finditer(r"(buf\d+) = torch\.ops\.fusereg\.\w+\.\w+\(([^\n]*)\)", code))
    for call in calls:
        inputs = call.group(2).split(", ")
        backward = "batch_norm_backward" in call.group(0)
        activations.update(inputs[: 2 if backward else 1])
        activations.update(re.findall(rf"(buf\d+) = {call.group(1)}\[0\]", code))
    for kernel in re.finditer(r"(cpp_fused\w*)\(([^\n]*)\)", code):
        found += [
            f"{kernel.group(1)}: {a}" for a in kernel.group(2).split(", ") if a in activations
        ]
    assert calls
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ROWS, CHANNELS])
def test_no_activation_is_copied_around_batch_norm(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = _net().to(memory_format=layout)
    x = torch.randn(2, 16, 8, 8).to(memory_format=layout)
    compiled = torch.compile(net)
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        assert _touched_by_generated_kernels(code) == []


@pytest.mark.slow
def test_with_dropout_no_activation_is_copied_in_channels_last() -> None:
    net = _net(0.5).to(memory_format=CHANNELS)
    x = torch.randn(2, 16, 8, 8).to(memory_format=CHANNELS)
    compiled = torch.compile(net)
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        assert _touched_by_generated_kernels(code) == []


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 4, 1),
    )


@pytest.mark.slow
def test_with_inductors_option_a_converted_depthwise_network_copies_no_activation() -> None:
    net, x = fusereg.convert(_depthwise()), torch.randn(2, 3, 12, 12)
    compiled = torch.compile(net, options={"force_layout_optimization": True})
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        assert _touched_by_generated_kernels(code) == []


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
def test_behind_fuseregs_backend_no_activation_of_a_depthwise_network_changes_its_layout(
    channels_last: bool,
) -> None:
    net, x = _depthwise(), torch.randn(2, 3, 12, 12)
    options = {"then": "inductor", "channels_last": channels_last}
    compiled: Any = torch.compile(net, backend=fusereg_backend, options=options)
    made = re.compile(r"empty_strided_cpu\(\(2, 16, \d+, \d+\), \(\d+, (\d+), \d+, \d+\)")
    strides = set()
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        strides.update(made.findall(code))
    # Without the option Inductor itself copies some, which shows that the test would see it.
    assert (strides == {"1"}) == channels_last
    assert "1" in strides


@pytest.mark.all_cases("host")
@pytest.mark.parametrize(
    ("activation", "slope", "p"),
    [
        ("relu", 0.01, 0.0),
        ("leaky_relu", 0.1, 0.0),
        ("leaky_relu", -0.5, 0.0),
        ("silu", 0.1, 0.0),
        ("relu", 0.01, 0.3),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_behind_a_convolution_compiled_is_eager(
    activation: str, slope: float, p: float, masked: bool, backend: str
) -> None:
    # A convolution's result is channels_last in Inductor's code: draws, signs must not follow it.
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1)
    x, residual = torch.randn(2, 16, 6, 5), torch.randn(2, 32, 6, 5)
    weight, grad = torch.rand(32), torch.randn(2, 32, 6, 5)
    mask = torch.rand(2, 6, 5) > 0.3 if masked else None
    seed = torch.tensor([7, 0])

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return F.batch_norm(
            conv(x), None, None, weight, None, True, activation=activation, residual=residual,
            dropout=p, negative_slope=slope, seed=seed if p else None, mask=mask,
        )  # fmt: skip

    def results(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (x, residual)]
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    torch._dynamo.reset()
    compiled, eager = results(torch.compile(block, backend=backend)), results(block)
    assert compiled[0].stride() == eager[0].stride()  # those of gradients are the convolution's
    for got, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
