"""Conversion changes classes and nothing else, disturbs nobody, and says what it leaves."""

from __future__ import annotations

import copy
import cProfile
import pstats
import random
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg.convert import find as convert_find
from fusereg.convert import layers
from fusereg.convert import trace as convert_trace
from fusereg.core import trace
from plain_models import MODELS, BasicBlock, Maker, TimmAct, images, stir
from reading_models import LEFT, Base, agree, other_scaled_method

# --- the conversion changes classes and nothing else ----------------------------------------------


@pytest.mark.parametrize(("cls", "reason"), LEFT, ids=[cls.__name__ for cls, _ in LEFT])
def test_forwards_that_cannot_be_followed_are_left_alone_with_the_reason(
    cls: type[Base], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    plain = cls()
    with caplog.at_level("INFO", "fusereg"):
        converted = fusereg.convert(copy.deepcopy(plain))
    assert type(converted) is cls
    assert f"the model ({cls.__name__}) not fused: {reason}" in caplog.text
    for training in (True, True, False):
        plain.train(training)
        agree(plain, converted.train(training))
    for a, b in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def state(m: nn.Module) -> list[Any]:
    """Return all that a model holds, with the identity, version and bytes of tensors."""
    found: list[Any] = []
    for module in m.modules():
        for name, value in sorted(vars(module).items()):
            if name in ("_fusereg_original", "fusereg_plans") or name in EXTRA:
                continue
            found.append((id(module), name, id(value)))
            if isinstance(value, dict):
                found.append([(key, id(held)) for key, held in value.items()])
            else:
                found.append(repr(value))
    for tensor in (*m.parameters(), *m.buffers()):
        grad = None if not isinstance(tensor, nn.Parameter) else tensor.requires_grad
        found.append((id(tensor), tensor._version, tensor.data_ptr(), grad, tensor.tolist()))
    return found


#: Attributes that fusereg's batch norms have and torch's do not.
EXTRA = ("activation", "dropout", "negative_slope", "update_stats", "inplace")


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate()]


@pytest.mark.parametrize("make", [*MODELS, *(cls for cls, _ in LEFT)])
def test_conversion_changes_classes_and_nothing_else(make: Maker) -> None:
    m = make()
    stir(m)
    before, draws = state(m), random_states()
    names = [sorted(vars(module)) for module in m.modules()]
    classes = [type(module) for module in m.modules()]
    for _ in range(2):
        fusereg.convert(m)
        assert state(m) == before
        fusereg.revert(m)
        assert state(m) == before
        assert [sorted(vars(module)) for module in m.modules()] == names
        assert [type(module) for module in m.modules()] == classes
    assert random_states() == draws


# --- an error inside ------------------------------------------------------------------------------

#: What convert does to a module: where the function is, and its name.
STAGES: list[tuple[Any, str]] = [
    *((layers, name) for name in ("timm_kind", "why_not_convertible", "swap", "_extras")),
    *((layers, name) for name in ("why_not_rewritable", "adapted", "adapt")),
    *((convert_trace, name) for name in ("make_plans", "trace", "rewrite", "_compiled", "Plan")),
    *((convert_find.Finder, name) for name in ("__init__", "chains", "lost", "_layer")),
    *((convert_trace._Check, name) for name in ("__init__", "read")),
    *((trace.Recorder, name) for name in ("__init__", "create_arg")),
    *((trace._Tracer, name) for name in ("attribute", "call", "function")),
    (torch.fx.Graph, "python_code"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("where", "name"), STAGES, ids=[name for _, name in STAGES])
def test_an_error_of_any_stage_leaves_that_module_alone_and_no_other(
    where: Any,
    name: str,
    after: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = [BasicBlock(3, 3), TimmAct(3), BasicBlock(3, 3), BasicBlock(3, 3), nn.Dropout(0.0)]
    m = nn.Sequential(*blocks)
    stir(m)
    plain, before = copy.deepcopy(m), state(m)
    done, count = getattr(where, name), 0
    layers._extras.cache_clear()
    layers.adapted.cache_clear()

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = done(*args, **kwargs) if after or count != 1 else None
        if count == 1:
            raise RuntimeError("an error inside")
        return result

    monkeypatch.setattr(where, name, failing)
    monkeypatch.setenv("FUSEREG_RAISE", "1")
    if where not in (trace._Tracer, trace.Recorder) or name == "__init__":
        with pytest.raises(RuntimeError, match="an error inside"):
            fusereg.convert(copy.deepcopy(m))
        count = 0
    monkeypatch.delenv("FUSEREG_RAISE")
    with caplog.at_level("DEBUG", "fusereg"):
        fusereg.convert(m)
    assert count > 1
    told = [r.getMessage() for r in caplog.records if "an error inside" in r.getMessage()]
    assert len(told) == 1
    assert re.match(r"fusereg\.convert: (the model|[0-4]\S*) .*(left alone|not fused): ", told[0])
    assert "Traceback" in caplog.text
    assert state(m) == before
    kept = sum(type(a) is type(b) for a, b in zip(m.modules(), plain.modules(), strict=True))
    whole = fusereg.convert(copy.deepcopy(plain))
    least = sum(type(a) is type(b) for a, b in zip(whole.modules(), plain.modules(), strict=True))
    assert kept - least in (0, 1, 2)
    for training in (True, False):
        agree(plain.train(training), m.train(training))
    fusereg.revert(m)
    assert [type(module) for module in m.modules()] == [type(module) for module in plain.modules()]


# --- threads and profilers ------------------------------------------------------------------------


def forwards(m: nn.Module) -> list[str]:
    return [
        getattr(module, "fusereg_plans", ((),))[0].run.__code__.co_code.hex()
        if getattr(module, "fusereg_plans", ())
        else type(module).__name__
        for module in m.modules()
    ]


def test_threads_convert_at_once_and_disturb_no_other_thread() -> None:
    models: list[nn.Module] = [
        nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 6, 2)) for _ in range(16)
    ]
    wanted = forwards(fusereg.convert(copy.deepcopy(models[0])))
    assert sum(len(code) > 50 for code in wanted) == 2
    served, failed, done = [0], [], threading.Event()

    def serve() -> None:
        other, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
        while not done.is_set() or not served[0]:
            try:
                other(x)
                served[0] += 1
            except Exception as error:
                failed.append(error)

    server = threading.Thread(target=serve)
    server.start()
    barrier = threading.Barrier(len(models))

    def convert(m: nn.Module) -> None:
        barrier.wait()
        fusereg.convert(m)

    threads = [threading.Thread(target=convert, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    server.join()
    assert not failed
    assert served[0] > 0
    assert all(forwards(m) == wanted for m in models)


def test_one_model_can_be_run_by_a_thread_while_another_converts_it() -> None:
    m = nn.Sequential(*(BasicBlock(3, 3) for _ in range(6))).eval()
    x = images(2).float()
    wanted = m(x)
    for _ in range(5):
        got: list[Tensor] = []
        done = threading.Event()

        def serve(got: list[Tensor] = got, done: threading.Event = done) -> None:
            while not done.is_set() or not got:
                got.append(m(x))

        server = threading.Thread(target=serve)
        server.start()
        fusereg.convert(m)
        done.set()
        server.join()
        assert got  # also fails if the thread did
        for y in got:
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        fusereg.revert(m)


def after_the_conversion() -> None:
    """Appear in the profile."""


def test_under_a_profiler_all_chains_are_fused_and_the_profile_goes_on() -> None:
    wanted = forwards(fusereg.convert(BasicBlock(3, 6, 2)))
    m = BasicBlock(3, 6, 2)
    profile = cProfile.Profile()
    profile.enable()
    fusereg.convert(m)
    after_the_conversion()
    profile.disable()
    assert forwards(m) == wanted
    called = {name for _, _, name in pstats.Stats(profile).stats}  # type: ignore[attr-defined]
    assert "after_the_conversion" in called


# --- other tools ----------------------------------------------------------------------------------


def test_converted_models_are_traced_by_torch_fx_as_the_original_ones() -> None:
    plain = BasicBlock(3, 6, 2)
    converted = fusereg.convert(copy.deepcopy(plain))
    graphs = [torch.fx.symbolic_trace(m) for m in (plain, converted)]
    ours, theirs = ([(n.op, str(n.target)) for n in g.graph.nodes] for g in graphs)
    assert ours == theirs
    agree(plain, graphs[1])
    whole = torch.fx.symbolic_trace(nn.Sequential(converted, nn.Sequential(converted)))
    assert sum(n.op == "call_module" for n in whole.graph.nodes) == 2 * sum(
        n.op == "call_module" for n in graphs[0].graph.nodes
    )


def test_scripting_says_in_one_sentence_what_to_do() -> None:
    m = nn.Sequential(BasicBlock(3, 3), nn.Dropout(0.5)).eval()
    fusereg.convert(m)
    for part in (m, m[0], m[1]):
        with pytest.raises(RuntimeError, match=r"call fusereg\.revert\(model\) first"):
            torch.jit.script(part)
    with pytest.raises(RuntimeError, match=r"cannot compile fusereg's Dropout; use torch\.compile"):
        torch.jit.script(fusereg.nn.Dropout(0.5))
    fusereg.revert(m)
    x = images(2).float()
    torch.testing.assert_close(torch.jit.script(m)(x), m(x))


FUSED = [
    [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)],
    [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
    [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()],
    [nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)],
    [nn.Linear(3, 4), nn.BatchNorm1d(4)],
    [nn.BatchNorm2d(3), nn.ReLU()],
]


@pytest.mark.parametrize(
    "parts", FUSED, ids=lambda parts: "-".join(type(m).__name__ for m in parts)
)
@pytest.mark.parametrize("inplace", [False, True])
def test_eager_quantization_says_in_one_sentence_what_to_do(
    parts: list[nn.Module], inplace: bool
) -> None:
    quantization = torch.ao.quantization
    names = [str(i) for i in range(len(parts))]
    plain = stir(nn.Sequential(*copy.deepcopy(parts))).eval()
    m = fusereg.convert(copy.deepcopy(plain))
    fuses = [quantization.fuse_modules]
    if not isinstance(parts[0], nn.ConvTranspose2d):
        fuses.append(quantization.fuse_modules_qat)
    for fuse in fuses:
        train = fuse is not quantization.fuse_modules
        with pytest.raises(
            RuntimeError,
            match=r"fuse_modules cannot fuse fusereg's BatchNorm.d; "
            r"call fusereg\.revert\(model\) first",
        ):
            fuse(m.train(train), [names], inplace=inplace)
        wanted = fuse(copy.deepcopy(plain).train(train), [names])
        got = fuse(fusereg.revert(copy.deepcopy(m)).train(train), [names])
        for a, b in zip(got.modules(), wanted.modules(), strict=True):
            assert type(a) is type(b)
    norm = getattr(fusereg.nn, type(parts[-1 if len(parts) == 2 else 1]).__name__, None)
    if norm is not None:
        own = nn.Sequential(copy.deepcopy(parts[0]), norm(4)).eval()
        with pytest.raises(RuntimeError, match=r"fuse fusereg's BatchNorm.d; use torch.nn's layer"):
            quantization.fuse_modules(own, [["0", "1"]], inplace=inplace)


def observed(m: nn.Module) -> list[str]:
    return [name for name, _ in m.named_modules() if "activation_post_process" in name]


@pytest.mark.parametrize("train", [True, False])
def test_eager_quantization_observes_the_layers_that_it_observes_of_torchs(train: bool) -> None:
    quantization = torch.ao.quantization
    blocks = nn.Sequential(BasicBlock(3, 3), nn.BatchNorm2d(3), nn.Dropout(0.0))
    plain = nn.Sequential(quantization.QuantStub(), stir(blocks), quantization.DeQuantStub())
    plain = plain.float().train(train)
    converted = fusereg.convert(copy.deepcopy(plain))
    assert observed(converted) == []
    prepare = quantization.prepare_qat if train else quantization.prepare
    for m in (plain, converted):
        m.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        prepare(m, inplace=True)
        m.apply(quantization.disable_fake_quant)  # which would enlarge differences of rounding
    assert observed(converted) == observed(plain)
    assert {f"1.{i}.activation_post_process" for i in (0, 1)} & {*observed(converted)}
    agree(plain, converted)
    with pytest.raises(
        RuntimeError, match=r"cannot quantize fusereg's .*; call fusereg\.revert\(model\) first"
    ):
        quantization.convert(converted.eval())
    fusereg.revert(converted)
    wanted, got = (quantization.convert(m.eval()) for m in (plain, converted))
    assert [type(m) for m in got.modules()] == [type(m) for m in wanted.modules()]


# --- what is lost, and layers that stay -----------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class WithPath(Base):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.path = between

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self.bn(self.conv(x))) + x


class OfWrapper(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Wrapper(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.relu(self.inner(self.conv(x))))


def test_layers_between_that_cost_a_chain_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fusereg"):
        fusereg.convert(WithPath(fusereg.nn.DropPath(0.1)))
        fusereg.convert(WithPath(fusereg.nn.DropBlock2d(0.1, 3)))
        fusereg.convert(WithPath(Wrapper(nn.Identity())))
        fusereg.convert(OfWrapper())
    for name in ("DropPath", "DropBlock2d", "Wrapper"):
        assert f"the model: bn and add are not fused: path ({name}) is between them" in caplog.text
    said = "the model: relu is not fused with the BatchNorm2d inside inner (Wrapper)"
    assert said in caplog.text


def test_layers_that_fusereg_cannot_replace_stay_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3, dtype=torch.complex64)
    norm.activation = "mine"
    with caplog.at_level("INFO", "fusereg"):
        m = fusereg.convert(nn.ModuleList([norm, other]))
    assert [type(layer) for layer in m] == [nn.BatchNorm2d] * 2
    assert norm.activation == "mine"
    assert "0 left alone: fusereg's layer has an attribute activation" in caplog.text
    assert "1 left alone: its weight is of torch.complex64 on cpu" in caplog.text
    monkeypatch.setattr(nn.Dropout, "forward", other_scaled_method)
    with caplog.at_level("INFO", "fusereg"):
        fusereg.convert(nn.Sequential(nn.Dropout(0.5)))
    assert "0 left alone: Dropout.forward is not torch's any more" in caplog.text


@pytest.mark.parametrize("first", [nn.BatchNorm1d(4), nn.ReLU()], ids=lambda m: type(m).__name__)
def test_a_chain_sees_that_the_forward_of_fuseregs_dropout_is_replaced(
    first: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = fusereg.convert(nn.Sequential(copy.deepcopy(first), nn.Dropout(1.0)))
    x = torch.rand(6, 4) + 0.5
    assert not m(x).any()
    monkeypatch.setattr(fusereg.nn.Dropout, "forward", other_scaled_method)
    torch.testing.assert_close(m(x), 3.0 * first(x))
