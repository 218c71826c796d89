"""What Inductor generates around batch norm: no copy of an activation, in any layout."""

from __future__ import annotations

import copy
import re
from collections import Counter
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


def _sources(step: Callable[[], object]) -> list[str]:
    """Return the codes of forward and backward, without the use of caches."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    assert len(codes) == 2, "one graph forward, one backward"
    return list(codes)


def _generated(step: Callable[[], object]) -> list[str]:
    """Return the wrapper codes of forward and backward."""
    return [code[code.index("def call(") :] for code in _sources(step)]


def _kernels_and_activations(code: str) -> tuple[int, list[str]]:
    """Return the number of generated kernels, and the memory that is allocated for activations."""
    assert "torch.ops.fusereg" not in code
    allocated = re.findall(r"empty_strided_cpu\((\(\d+, \d+, \d+, \d+\), \([\d, ]+\))", code)
    return len(re.findall(r"cpp_fused\w*\(", code)), sorted(allocated)


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


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.bn, self.relu = nn.BatchNorm2d(32), nn.ReLU()
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.relu(self.bn(self.conv(x)) + x))
        return y


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3),
        *(nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.SiLU()),
        *(nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Conv2d(32, 4, 1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [_depthwise, _Residual])
@pytest.mark.parametrize("layout", [ROWS, CHANNELS])
def test_a_converted_network_has_no_more_kernels_and_activations_than_torchs(
    make: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    net: Any = make()
    net = net.to(memory_format=layout)
    x = torch.randn(2, 16, 12, 12).to(memory_format=layout)
    found = []
    for model in (net, fusereg.convert(copy.deepcopy(net))):
        compiled = torch.compile(model)
        codes = _generated(lambda compiled=compiled: compiled(x).square().sum().backward())
        found.append([_kernels_and_activations(code) for code in codes])
    for (own_kernels, own), (kernels, activations) in zip(found[1], found[0], strict=True):
        assert 0 < own_kernels <= kernels
        assert Counter(own) <= Counter(activations)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ROWS, CHANNELS])
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.Identity])
def test_backward_reads_no_activations_but_the_gradient_and_x(
    activation: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    parts = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), activation(), nn.Conv2d(32, 16, 1)
    net: Any = nn.Sequential(*parts).to(memory_format=layout)
    x = torch.randn(2, 16, 12, 12).to(memory_format=layout)
    compiled = torch.compile(fusereg.convert(net))
    loss = torch.randn(2, 16, 12, 12).to(memory_format=layout)
    code = _sources(lambda: (compiled(x) * loss).sum().backward())[1]
    (kernel,) = re.findall(r"\ncpp_fused\w*batch_norm_backward\w* = (.*?)\n'''\)", code, re.DOTALL)
    names = dict(re.findall(r"auto (in_ptr\d+) = (in_out_ptr\d+);", kernel))
    loads = re.findall(r"loadu\((\w+) \+ static_cast<int64_t>\(([^()]*)\)", kernel)
    # By elements, not by channels alone.
    read = {names.get(pointer, pointer) for pointer, at in loads if "x0" in at and "x1" in at}
    assert len(read) == 2


@pytest.mark.slow
def test_with_dropout_no_activation_is_copied_in_channels_last() -> None:
    parts = nn.Conv2d(16, 32, 3), fnn.BatchNorm2d(32, activation="relu", dropout=0.5)
    net = nn.Sequential(*parts, nn.Conv2d(32, 16, 1)).to(memory_format=CHANNELS)
    x = torch.randn(2, 16, 8, 8).to(memory_format=CHANNELS)
    compiled = torch.compile(net)
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        assert _touched_by_generated_kernels(code) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["option", "backend", "not asked for"])
def test_no_activation_of_a_depthwise_network_changes_its_layout(way: str) -> None:
    net, x = _depthwise(), torch.randn(2, 16, 12, 12)
    compiled: Any
    if way == "option":  # of Inductor's
        options = {"force_layout_optimization": True}
        compiled = torch.compile(fusereg.convert(net), options=options)
    else:
        options = {"then": "inductor", **({} if way == "backend" else {"channels_last": False})}
        compiled = torch.compile(net, backend=fusereg_backend, options=options)
    made = re.compile(r"empty_strided_cpu\(\(2, 32, \d+, \d+\), \(\d+, (\d+), \d+, \d+\)")
    strides = set()
    for code in _generated(lambda: compiled(x).square().sum().backward()):
        strides.update(made.findall(code))
    # Without the option Inductor itself copies some, which shows that the test would see it.
    assert (strides == {"1"}) == (way != "not asked for")
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
