"""Batch norm under Inductor: on CPUs it generates code in place of the operators that it can."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg.functional as F
from fusereg import nn as fnn

_ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generated(step: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what a step that is compiled computes, and the codes, without the use of caches."""
    from torch._inductor.utils import run_and_get_code

    with torch._inductor.config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(step)
    assert codes
    return result, codes


def operators(codes: list[str]) -> set[str]:
    return {name for code in codes for name in re.findall(r"torch\.ops\.fusereg\.(\w+)", code)}


class Norms(nn.Module):
    """Each form that a layer has, with and without a residual; the results are stacked."""

    def __init__(self) -> None:
        super().__init__()
        options: list[dict[str, Any]] = [
            *({"activation": a, "negative_slope": 0.2} for a in _ACTIVATIONS),
            {"affine": False, "activation": "relu"},
            {"bias": False, "activation": "silu"},
            {"track_running_stats": False},
            {"update_stats": False},
            {"momentum": 0.3, "eps": 1e-2, "activation": "relu"},
            {"momentum": None},
        ]
        self.norms = nn.ModuleList(fnn.BatchNorm2d(4, **each) for each in options)
        self.frozen = fnn.FrozenBatchNorm(4, activation="relu")
        for tensor in self.parameters():
            nn.init.uniform_(tensor, -1.0, 1.0)
        for name, tensor in self.frozen.named_buffers():
            tensor.copy_(torch.rand(tensor.shape) + ("var" in name))

    def forward(self, x: Tensor) -> Tensor:
        results = [norm(x) for norm in self.norms]
        results += [norm(x, residual=0.5 * x.flip(0)) for norm in self.norms]
        return torch.stack([*results, self.frozen(x)])


@pytest.mark.slow
def test_each_form_of_the_layer_computes_the_same_without_an_operator() -> None:
    torch.manual_seed(0)
    model = Norms().double()
    twin = copy.deepcopy(model)
    run = torch.compile(twin, fullgraph=True, dynamic=True)
    for training, batch in ((True, 3), (True, 4), (False, 4)):
        model.train(training)
        twin.train(training)
        x = torch.randn(batch, 4, 5, 6, dtype=torch.float64)
        grad = None

        def step(called: Any, module: nn.Module, x: Tensor = x) -> list[Tensor]:
            nonlocal grad
            given = [x.clone().requires_grad_(), *module.parameters()]
            y = called(given[0])
            grad = torch.randn_like(y) if grad is None else grad
            return [y.detach(), *torch.autograd.grad(y, given, grad)]

        compiles = batch == 3 or not training
        if compiles:
            found, codes = generated(lambda step=step: step(run, twin))
            assert operators(codes) == set()
        else:
            found = step(run, twin)
        for got, wanted in zip(found, step(model, model), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        states = zip(twin.state_dict().values(), model.state_dict().values(), strict=True)
        for got, wanted in states:
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
def test_results_have_the_dtype_and_strides_of_eager_calls(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 10)
    x = {
        "contiguous": lambda: x,
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "permuted": lambda: x.transpose(2, 3),
        "strided": lambda: x[..., ::2],
    }[layout]().to(dtype)
    weight = torch.rand(8) + 0.5

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, None, True, activation="relu")

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        given = [x.detach().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y.sum(), given)]

    found, codes = generated(lambda: results(torch.compile(block)))
    assert operators(codes) == set()
    for got, wanted in zip(found, results(block), strict=True):
        assert got.dtype is wanted.dtype
        assert got.stride() == wanted.stride()
        rough = 1e-1 if dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(got, wanted, rtol=rough, atol=rough)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dropout", "mask", "groups", "deterministic", "negative slope"])
def test_what_inductor_has_no_code_for_stays_an_operator(what: str) -> None:
    torch.manual_seed(0)
    x, more = torch.randn(6, 4, 5), dict[str, Any](activation="relu")
    if what == "dropout":
        more.update(dropout=0.5, seed=torch.tensor([3, 0]))
    elif what == "mask":
        more["mask"] = torch.rand(6, 5) > 0.3
    elif what == "groups":
        more["virtual_batch_size"] = 3
    elif what == "negative slope":
        more.update(activation="leaky_relu", negative_slope=-0.5, residual=x.flip(0))

    def block(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True, **more)

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = function(given)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), given)]

    torch.use_deterministic_algorithms(what == "deterministic")
    try:
        found, codes = generated(lambda: results(torch.compile(block)))
        assert operators(codes) == {"batch_norm", "batch_norm_backward"}
        for got, wanted in zip(found, results(block), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_compilers_keep_the_operators() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    select_decomp_table()  # of something that was compiled before
    targets: list[str] = []

    def noted(module: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = torch.randn(4, 3, 2, requires_grad=True)
    layer = fnn.BatchNorm1d(3)
    torch.compile(layer, backend=aot_autograd(fw_compiler=noted))(x).sum().backward()
    assert "fusereg.batch_norm.default" in targets
    assert "fusereg.batch_norm_backward.default" in targets
    for name in ("batch_norm", "batch_norm_backward"):
        operator = getattr(torch.ops.fusereg, name)
        assert operator.default in select_decomp_table()
        assert operator.exact not in select_decomp_table()
