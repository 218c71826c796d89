"""What holds for every layer of every technique: torch.fx, pickles, construction."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fusereg
from fusereg.batch_norm.fold import Epilogue
from layers import LAYERS, public_layers

Layer = type[nn.Module]

layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.__name__)


def made(layer: Layer) -> nn.Module:
    torch.manual_seed(1)
    return layer(**LAYERS[layer][0])


def computed(module: nn.Module, layer: Layer) -> list[Tensor]:
    torch.manual_seed(2)
    found = module(*LAYERS[layer][1]())
    return list(found) if isinstance(found, tuple) else [found]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_the_list_of_layers_is_whole() -> None:
    assert set(LAYERS) - {Epilogue} == public_layers()


# --- torch.fx -------------------------------------------------------------------------------------


class Around(nn.Module):
    """A model around one layer, with torch's layers before and after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Hardtanh(), layer, nn.Identity()

    def forward(self, *x: Tensor) -> Any:
        first, *others = x
        return self.after(self.layer(self.before(first), *others))


def around(layer: Layer) -> nn.Module:
    return Around(made(layer))


def traced_with(tracer: fx.Tracer, model: nn.Module, inputs: int) -> fx.GraphModule:
    """Return what the tracer makes of a model that is called with so many tensors."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    names = ", ".join(f"x{i}" for i in range(inputs))
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {names}): return self.model({names})", scope)
    Fixed.forward = scope["forward"]  # type: ignore[method-assign]
    root = Fixed()
    return fx.GraphModule(root, tracer.trace(root))


@layers
def test_torch_fx_records_the_layer_as_one_call(layer: Layer) -> None:
    for training in (True, False):
        model = around(layer).train(training)
        traced = traced_with(fx.Tracer(), model, len(LAYERS[layer][1]()))
        targets = [n.target for n in traced.graph.nodes if n.op == "call_module"]
        assert targets == ["model.before", "model.layer", "model.after"]
        assert_same(computed(copy.deepcopy(traced), layer), computed(model, layer))


@layers
def test_a_subclass_is_one_call_too(layer: Layer) -> None:
    mine = type("Mine", (layer,), {})
    assert mine.__module__ == __name__
    model = nn.Sequential(mine(**LAYERS[layer][0]))
    graph = fx.Tracer().trace(model)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0"]


@pytest.mark.parametrize("name", [n for n in fusereg.nn.__all__ if "Drop" in n and hasattr(nn, n)])
def test_torch_fx_looks_into_a_layer_that_is_itself_traced(name: str) -> None:
    """As into torch's: what is recorded is the function, with the layer's probability."""
    layer = getattr(fusereg.nn, name)
    module = layer(0.25)
    traced = fx.symbolic_trace(module)
    (call,) = [n for n in traced.graph.nodes if n.op == "call_function"]
    assert call.target.__module__ == "fusereg.dropout.functional"
    assert call.kwargs["p"] == 0.25
    assert_same(computed(traced, layer), computed(module, layer))


def test_torch_fx_records_functions_that_drop() -> None:
    def model(x: Tensor) -> Tensor:
        y = fusereg.functional.dropout(x + 1, 0.5, training=True, seed=3)
        return fusereg.functional.drop_path(y, 0.5, seed=4)

    x = torch.ones(8, 8)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_other_functions_say_how_torch_fx_can_record_them() -> None:
    with pytest.raises(TypeError, match=r"got Proxy; .* torch\.fx\.wrap"):
        fx.symbolic_trace(lambda x: fusereg.functional.gaussian_dropout(x, 0.5))


@layers
def test_the_class_keeps_its_module(layer: Layer) -> None:
    """The name under torch.nn is seen on instances alone."""
    module = made(layer)
    assert layer.__module__.startswith("fusereg.")
    assert type(module).__module__ == layer.__module__
    assert "__module__" not in vars(module)
    assert module.__module__.startswith("torch.nn")
    # By these torch.compile knows the layers that are built into torch, which it guards less.
    assert not module.__module__.startswith(("torch.nn.", "torch.ao."))
    assert repr(module).startswith(f"{layer.__name__}(")
    assert f"{layer.__module__}.{layer.__name__}" in repr(layer)


@layers
def test_pickles_and_copies(layer: Layer) -> None:
    module = made(layer)
    copies = [pickle.loads(pickle.dumps(module, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies += [copy.deepcopy(module), torch.load(file, weights_only=False)]
    wanted = computed(module, layer)
    for found in copies:
        assert type(found) is layer
        assert found.state_dict().keys() == module.state_dict().keys()
    # Statistics have moved in the first, and numbers been drawn.
    if not list(module.buffers()) and not hasattr(module, "seed"):
        for found in copies:
            assert_same(computed(found, layer), wanted)


def test_prepare_fx_and_feature_extractors_take_a_converted_model() -> None:
    importlib.import_module("other_libraries")
    pytest.importorskip("torchvision")
    from torch.ao.quantization import QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_fx
    from torchvision.models.feature_extraction import create_feature_extractor

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
        )

    x = torch.randn(2, 3, 8, 8)
    wanted = model().eval()(x)
    converted = fusereg.convert(model()).eval()
    extractor = create_feature_extractor(converted, {"2": "relu", "4": "last"})
    found = extractor(x)
    assert set(found) == {"relu", "last"}
    torch.testing.assert_close(found["last"], wanted)
    prepared = prepare_fx(converted, QConfigMapping(), (x,))
    torch.testing.assert_close(prepared(x), wanted)


# --- construction ---------------------------------------------------------------------------------


@layers
def test_a_layer_with_parameters_is_made_without_initializing_them(layer: Layer) -> None:
    arguments = LAYERS[layer][0]
    if list(made(layer).parameters()):
        module = torch.nn.utils.skip_init(layer, **arguments, dtype=torch.float64)
        assert type(module) is layer
        assert all(p.dtype is torch.float64 and not p.is_meta for p in module.parameters())
        assert all(p.is_meta for p in layer(**arguments, device="meta").parameters())


@pytest.mark.parametrize(
    "layer", [c for c in LAYERS if c.__name__ in fusereg.nn.__all__], ids=lambda c: c.__name__
)
def test_arguments_that_do_not_fit_name_the_layer_that_was_called(layer: Layer) -> None:
    arguments = LAYERS[layer][0]
    name = rf"fusereg\.nn\.{layer.__name__}"
    known = inspect.signature(layer).parameters.values()
    for parameter in known:
        if len(parameter.name) > 4 and parameter.kind is not parameter.VAR_KEYWORD:
            misspelled: dict[str, Any] = {parameter.name[:-1] + "_": 1}
            meant = f"unknown argument '{parameter.name[:-1]}_'; did you mean {parameter.name}\\?$"
            with pytest.raises(TypeError, match=f"^{name}: {meant}"):
                layer(**arguments, **misspelled)
    with pytest.raises(TypeError, match=f"^{name}: unknown argument 'zebra'; it takes "):
        layer(**arguments, zebra=1)
    with pytest.raises(TypeError, match=f"^{name}: too many positional arguments($|; by name go )"):
        layer(*[1] * 40)
    if "keep_prob" in inspect.signature(layer).parameters:
        with pytest.raises(ValueError, match=f"^{name}: p and keep_prob exclude each other"):
            layer(**{**arguments, "p": 0.5, "keep_prob": 0.5})


def test_arguments_of_other_libraries_are_told_by_their_names_here() -> None:
    class Own(fusereg.nn.Dropout):
        """A user's."""

    for layer, arguments, right in (
        (fusereg.nn.Dropout, {"prob": 0.5}, "p"),
        (Own, {"rate": 0.5}, "p"),
        (fusereg.nn.BatchNorm2d, {"channels": 64}, "num_features"),
        (fusereg.nn.GhostBatchNorm, {"num_features": 8, "act_layer": "relu"}, "activation"),
    ):
        with pytest.raises(TypeError, match=rf"fusereg\.nn\.\w+: .*; did you mean {right}\?$"):
            layer(**arguments)
    with pytest.raises(TypeError, match=r"^fusereg\.nn\.BatchNorm2d: missing a required argument"):
        fusereg.nn.BatchNorm2d()  # type: ignore[call-arg]
