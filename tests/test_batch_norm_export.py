"""Models with fusereg's layers in programs that know nothing of it: ONNX, decomposed, traced."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg

#: Names of torch's in what torch's exporters say about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    """Every kind of layer that is something in evaluation, and those that are nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.plain = fusereg.nn.BatchNorm2d(6)
        self.relu = fusereg.nn.BatchNorm2d(6, activation="relu", dropout=0.2)
        self.leaky = fusereg.nn.BatchNorm2d(6, activation="leaky_relu", negative_slope=0.2)
        self.inplace = fusereg.nn.BatchNorm2d(6, activation="leaky_relu", inplace=True)
        self.silu = fusereg.nn.GhostBatchNorm(6, activation="silu")
        self.gelu = fusereg.nn.FrozenBatchNorm(6, activation="gelu")
        self.renorm = fusereg.nn.BatchRenorm(6)
        self.sync = fusereg.nn.SyncBatchNorm(6, affine=False)
        self.flat = fusereg.nn.BatchNorm1d(6, eps=1e-3)
        self.dropout = nn.Sequential(
            fusereg.nn.Dropout(0.3), fusereg.nn.Dropout2d(0.3), fusereg.nn.DropPath(0.2)
        )
        self.act = fusereg.nn.ActivationDropout(0.3, "relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.conv(x))
        x = self.relu(x, residual=x)
        x = self.leaky(x) + self.inplace(x * 2)
        x = self.silu(self.dropout(x), residual=x)
        x = self.sync(self.renorm(self.gelu(x)))
        result: Tensor = self.act(self.flat(x.mean((2, 3))))
        return result


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(getattr(layer, "running_mean", None), Tensor):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                if layer.weight is not None:
                    layer.weight.normal_()
                    layer.bias.normal_()
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 5, 4)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)


def run(model: str | bytes, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def exported(model: Any, x: Tensor, **arguments: Any) -> Any:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model, (x,), dynamo=True, verbose=False, **arguments)


@pytest.mark.slow
def test_onnx_has_standard_operators_and_the_same_results(
    net: Net, x: Tensor, tmp_path: Path
) -> None:
    batch = torch.export.Dim("batch")
    program = exported(net, x, dynamic_shapes=({0: batch},))
    operators = [node.op_type for node in program.model.graph]
    assert {node.domain for node in program.model.graph} == {""}
    assert operators.count("BatchNormalization") >= 7
    assert "Dropout" not in operators
    program.save(tmp_path / "net.onnx")
    for given in (x, torch.randn(7, 2, 5, 4)):
        near(run(str(tmp_path / "net.onnx"), given), net(given))


@pytest.mark.slow
def test_onnx_of_converted_layers(tmp_path: Path, x: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4)
    )
    nn.init.normal_(model[1].weight)
    model.eval()
    wanted = model(x)
    program = exported(fusereg.convert(model), x)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "net.onnx")
    near(run(str(tmp_path / "net.onnx"), x), wanted)


def test_onnx_of_the_older_exporter(net: Net, x: Tensor) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False)
    near(run(file.getvalue(), x), net(x))


@pytest.mark.slow
def test_an_exported_program_with_and_without_fusereg_s_operator(net: Net, x: Tensor) -> None:
    program = torch.export.export(net, (x,))

    def ours(program: Any) -> int:
        return sum("fusereg" in str(node.target) for node in program.graph.nodes)

    assert ours(program) == 9
    kept = program.run_decompositions()
    assert ours(kept) == 9
    table = {**torch.export.default_decompositions(), **fusereg.decompositions()}
    free = program.run_decompositions(table)
    assert ours(free) == 0
    for each in (program, kept, free):
        near(each.module()(x), net(x))


@pytest.mark.slow
def test_onnx_of_a_decomposed_program(tmp_path: Path, x: Tensor) -> None:
    layer = fusereg.nn.BatchNorm2d(2, activation="relu").eval()
    program = torch.export.export(layer, (x,)).run_decompositions(fusereg.decompositions())
    exported(program, x).save(tmp_path / "layer.onnx")
    near(run(str(tmp_path / "layer.onnx"), x), x.relu())


def test_decompositions_in_training() -> None:
    """Without dropout the batch's statistics are torch's operations too; with it, ours stays."""
    x = torch.randn(8, 6)
    for dropout, left in ((0.0, 0), (0.5, 1)):
        layer = fusereg.nn.BatchNorm1d(6, activation="silu", dropout=dropout)
        program = torch.export.export(layer, (x,))
        free = program.run_decompositions(fusereg.decompositions())
        found = [n for n in free.graph.nodes if "fusereg.batch_norm" in str(n.target)]
        assert len(found) == left
        if not dropout:
            near(
                free.module()(x),
                nn.functional.silu(nn.functional.batch_norm(x, None, None, training=True)),
            )


def test_jit_trace_sees_batch_norm(net: Net, x: Tensor) -> None:
    """A kernel that the tracer does not see would leave its result in the program as a constant."""
    traced = torch.jit.trace(net, x, check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    other = torch.randn(4, 2, 5, 4)
    near(traced(other), net(other))
