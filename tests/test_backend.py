"""The backend of torch.compile: what it fuses, what it leaves, and that results are torch's."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusereg
from compiled_models import compiled, fresh, fused  # noqa: F401
from fusereg.backend import compiler, fusereg_backend, rewrite
from plain_models import MODELS, Volumes, basic, close, images, same_state, stir, without_dropout

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[[], nn.Module]


def step(model: Any, x: Tensor) -> list[Tensor]:
    """Return output and gradients of a training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y, x.grad]


def compare(model: nn.Module, *inputs: Tensor, **options: Any) -> nn.Module:
    """Train and evaluate a model and its compiled copy; all must stay equal. Return the copy."""
    twin = copy.deepcopy(model)
    run = compiled(twin, **options)
    for x in inputs:
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                close(p.grad, q.grad)  # type: ignore[arg-type]
        same_state(twin, model)
    model.eval()
    twin.eval()
    with torch.no_grad():
        close(run(inputs[0]), model(inputs[0]))
    model.train()
    twin.train()
    assert counters["fusereg"]["graphs"], "the backend was not called"
    return twin


# --- an error inside ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_fuse_at", "_check_writes", "_check_call", "_replace"])
def test_a_graph_that_an_error_befalls_is_left_as_it_was(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stir(without_dropout(basic())).double()
    done, count = getattr(rewrite, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = done(*args, **kwargs)
        if count == 3:
            raise RuntimeError("an error inside")
        return result

    monkeypatch.setattr(rewrite, name, failing)
    with pytest.raises(Exception, match="an error inside"):
        compiled(model)(images(3))
    torch._dynamo.reset()
    monkeypatch.delenv("FUSEREG_RAISE")
    count = 0
    twin, x = copy.deepcopy(model), images(3)
    with caplog.at_level("INFO", "fusereg"):
        run = compiled(twin)
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
    same_state(twin, model)
    assert "fused nothing; left: 1 all: fusereg failed on it (RuntimeError: an error" in caplog.text


# --- whole models ---------------------------------------------------------------------------------


class Separable(nn.Module):
    """A depthwise-separable network."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for _ in range(depth):
            parts += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(inplace=True),
            ]
        self.parts = nn.Sequential(*parts)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.parts(self.stem(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("make", "then"),
    [
        (basic, "eager"),
        (Separable, "eager"),
        pytest.param(Separable, "aot_eager", marks=pytest.mark.slow),
        pytest.param(basic, "aot_eager", marks=pytest.mark.slow),
        pytest.param(basic, "inductor", marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_equal_torch_over_three_batch_sizes(make: Make, then: str) -> None:
    model = stir(without_dropout(make())).double()
    compare(model, images(6), images(4), images(3), then=then)
    expected = (
        {"batch_norm + relu": 5, "batch_norm + add + relu": 4, "batch_norm": 1}
        if make is basic
        else {"batch_norm + relu": 2, "batch_norm + silu": 2}
    )
    # Training, training with any batch size, and evaluation.
    assert fused() == {what: 3 * n for what, n in expected.items()}
    assert counters["fusereg"]["graphs"] == 3


SLOW = ("bottleneck", "convolutions")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(m, marks=pytest.mark.slow) if m.__name__ in SLOW else m
        for m in MODELS
        if m is not basic
    ],
)
def test_models_of_many_styles_equal_torch(make: Make) -> None:
    x = torch.randn(6, 4, 4, 12, dtype=torch.float64)
    x = x if make is Volumes else x[:, :1] if make.__name__ == "Encoder" else images()
    model = stir(without_dropout(make())).double()
    if make.__name__ == "convolutions":
        model[5].momentum = 0.1  # torch itself breaks the graph for a cumulative average
    compare(model, x, x[:4])
    assert fused()


def test_a_change_of_the_batch_size_is_compiled_once_more_and_then_never() -> None:
    counter = CompileCounterWithBackend(fusereg_backend)
    model = torch.compile(Separable(), backend=counter)
    for count in (8, 6, 5, 3, 11):
        model(torch.randn(count, 3, 8, 8))
    assert counter.frame_count == 2
    assert fused() == {"batch_norm + relu": 4, "batch_norm + silu": 4}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_layout_that_torch_gives(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = model.to(memory_format=memory_format)
    x = torch.randn(4, 3, 9, 9).to(memory_format=memory_format)
    assert compiled(model)(x).stride() == model(x).stride()
    assert fused() == {"batch_norm + relu": 1}


# --- graphs within the graph ----------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(torch.relu(self.norm(self.linear(x))))
        return y


class Checkpointed(nn.Module):
    def __init__(self, p: float, context: Any = None) -> None:
        super().__init__()
        self.body = Body(p)
        self.more = {} if context is None else {"context_fn": context}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False, **self.more)
        return y


def test_a_checkpoint_in_compiled_code_has_the_gradient_of_its_own_mask() -> None:
    model = Checkpointed(0.5).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    uncompiled = copy.deepcopy(model)
    fusereg.convert(uncompiled)
    torch.manual_seed(1)
    wanted = step(uncompiled, x)
    torch.manual_seed(1)
    got = step(compiled(model), x)
    assert fused() == {"batch_norm + relu + dropout": 1}
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
    for p, q in zip(model.parameters(), uncompiled.parameters(), strict=True):
        close(p.grad, q.grad)  # type: ignore[arg-type]
    same_state(model, uncompiled)  # both count the batch twice, as torch's eager checkpoint does


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_a_checkpoint_equals_torch_without_dropout(then: str) -> None:
    model = Checkpointed(0.0).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for got, wanted in zip(step(compiled(twin, then=then), x), step(model, x), strict=True):
        close(got, wanted)
    assert fused() == {"batch_norm + relu": 1}


def test_a_selective_checkpoint_keeps_its_policy() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    asked: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def context() -> Any:
        return create_selective_checkpoint_contexts(policy)

    x = torch.randn(8, 6, dtype=torch.float64)
    model = Checkpointed(0.0, context).double()
    wanted = step(Checkpointed(0.0).double().requires_grad_(True), x)[0].shape
    assert step(compiled(model), x)[0].shape == wanted
    assert any("addmm" in name for name in asked)
    assert fused() == {"batch_norm + relu": 1}


def test_branches_of_a_cond_are_rewritten() -> None:
    mean, var = torch.zeros(3), torch.ones(3)

    def f(x: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, mean, var))

        def twice(x: Tensor) -> Tensor:
            return F.silu(F.batch_norm(x * 2.0, mean, var))

        return torch.cond(x.sum() > 0.0, norm, twice, (x,))  # type: ignore[no-any-return]

    run = compiled(f)
    for x in (torch.rand(4, 3), -torch.rand(4, 3)):
        close(run(x), f(x), 1e-5)
    assert fused() == {"batch_norm + relu": 1, "batch_norm + silu": 1}


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_equals_torch_inside_and_outside_of_the_compiled_code(outside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def inside(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return f

    twin = copy.deepcopy(model)
    run = inside(compiled(twin)) if outside else compiled(inside(twin))
    x = torch.randn(4, 3, 8, 8)
    for got, wanted in zip(step(run, x), step(inside(model), x), strict=True):
        assert got.dtype is wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    same_state(twin, model, 0.02)
    assert fused() == {"batch_norm + relu": 1}


def test_double_backward_works_with_an_eager_rest() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 1)).double()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (model, compiled(copy.deepcopy(model))):
        (g,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    close(found[1], found[0])
    assert fused() == {"batch_norm + silu": 1}


# --- fusereg's own layers -------------------------------------------------------------------------


def native_layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    L = fusereg.nn
    return [
        (L.BatchNorm2d(4, activation="relu"), (4, 4, 3, 3)),
        (L.SyncBatchNorm(4), (4, 4, 3, 3)),
        (L.GhostBatchNorm(4, virtual_batch_size=2), (4, 4, 3, 3)),
        (L.FrozenBatchNorm(4), (4, 4, 3, 3)),
        (L.Dropout(1.0), (4, 4)),
        (L.DropPath(1.0), (4, 4)),
        (L.ActivationDropout(1.0), (4, 4)),
        (L.GaussianDropout(0.0), (4, 4)),
        (L.DropoutAddLayerNorm(4, p=1.0), (4, 4)),
        (fusereg.convert(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(1.0))), (4, 4)),
    ]


@pytest.mark.parametrize(
    ("layer", "shape"), native_layers(), ids=[type(m).__name__ for m, _ in native_layers()]
)
def test_a_layer_of_fusereg_is_one_node(layer: nn.Module, shape: tuple[int, ...]) -> None:
    nodes: list[Any] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        run = fusereg_backend(module, inputs)
        nodes.extend(n for n in module.graph.nodes if n.op.startswith("call"))
        return run

    twin, x = copy.deepcopy(layer), torch.randn(shape)
    y = torch.compile(twin, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    same_state(twin, layer, 1e-6)
    assert len(nodes) == 1, nodes


def test_a_layer_of_fusereg_takes_what_follows_it() -> None:
    model = nn.Sequential(fusereg.nn.BatchNorm1d(4), nn.ReLU(), fusereg.nn.Dropout(1.0)).double()
    compare(model, torch.randn(8, 4, dtype=torch.float64))
    assert fused()["batch_norm + relu + dropout"] == 1


@pytest.mark.all_cases("host")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_other_backends_see_through_layers_of_fusereg_as_before(backend: str) -> None:
    """Keeping a call whole must not hide what it writes, nor its generator, from them."""
    model = fusereg.convert(stir(Separable(depth=1)).double())
    twin = copy.deepcopy(model)
    run = torch.compile(twin, backend=backend, fullgraph=True)
    for x in (images(6), images(4)):
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
    same_state(twin, model)
    assert counters["fusereg"] == {}
    torch._dynamo.reset()

    def drawn(x: Tensor, generator: torch.Generator) -> Tensor:
        return fusereg.functional.dropout(x, 0.5, generator=generator) + 1.0

    x = torch.ones(64)
    again = torch.compile(drawn, backend=backend)(x, torch.Generator().manual_seed(3))
    assert torch.equal(again, drawn(x, torch.Generator().manual_seed(3)))


# --- Dynamo's guards ------------------------------------------------------------------------------


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).double()


def test_a_change_of_the_model_is_seen() -> None:
    model = small()
    run = compiled(model, fullgraph=False)
    x = torch.randn(8, 4, dtype=torch.float64)
    for change in (
        lambda: None,
        lambda: model[1].eval(),
        lambda: model[1].train(),
        lambda: model.__setitem__(2, nn.SiLU()),
        lambda: setattr(model[2], "forward", torch.tanh),
        lambda: setattr(model[1], "momentum", 0.5),  # a number of the graph from now on
        lambda: setattr(model[1], "eps", 1e-2),
    ):
        change()
        twin = copy.deepcopy(model)
        close(run(x), twin(x))
        same_state(model, twin)
    assert set(fused()) == {"batch_norm + relu", "batch_norm + silu", "batch_norm"}


def test_hooks_added_after_the_first_call_are_seen_only_if_dynamo_guards_them() -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    for guarded in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
            model = small()
            run = compiled(model, fullgraph=False)
            first = run(x)
            model[2].register_forward_hook(lambda module, args, y: y + 1.0)
            seen = torch.equal(run(x), first + 1.0)
        assert seen is guarded


def test_the_other_holes_of_dynamos_guards_are_as_documented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    run = compiled(small(), fullgraph=False)
    first = run(x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x + 1.0)
    assert torch.equal(run(x), first)

    class ReadsDictionary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * vars(self).get("factor", 1.0) * self.__dict__.get("other", 1.0)

    model = ReadsDictionary()
    run = compiled(model, fullgraph=False)
    run(x)
    vars(model).update(factor=3.0, other=3.0)
    assert torch.equal(run(x), x)

    def f(x: Tensor) -> Tensor:
        return x + 1.0 if torch.distributed.is_initialized() else x * 2.0

    run = compiled(f)
    run(x)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        assert torch.equal(run(x), x * 2.0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_schedule_that_compiles_at_every_step_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    run = compiled(model, fullgraph=False)
    with caplog.at_level(logging.WARNING, logger="fusereg"):
        for count in range(7):
            model[1].p = 0.1 + 0.01 * count
            torch.manual_seed(count)
            y = run(torch.ones(8, 4))
            torch.manual_seed(count)
            z = fusereg.functional.dropout(model[0](torch.ones(8, 4)), model[1].p)
            torch.testing.assert_close(y, z)
    assert fused() == {"dropout": 7}
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fusereg"]
    assert "recompile_limit" in line
    assert "once an epoch" in line


# --- the entry point, its options and reports -----------------------------------------------------


def test_the_backend_is_registered_by_name() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[project.entry-points.torch_dynamo_backends\]\n(.*)$", text, re.M)
    assert found is not None
    assert found[1] == 'fusereg = "fusereg.backend:fusereg_backend"'
    try:
        version = importlib.metadata.distribution("fusereg")
    except importlib.metadata.PackageNotFoundError:
        return
    if version.entry_points.select(group="torch_dynamo_backends"):
        assert "fusereg" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        (None, {"them": "eager"}, "options must be among"),
        (None, {"then": "tensorrt"}, "'then' must be one of"),
        ("max-autotune", None, "is Inductor's"),
        (None, {"mode": "max-autotune"}, "is Inductor's"),
        (None, {"then": "inductor", "mode": "fastest"}, "Unrecognized mode"),
        (None, {"channels_last": True}, "'channels_last' must be True or False, with"),
        (None, {"then": "inductor", "channels_last": 1}, "must be True or False, .* got 1 with"),
    ],
)
def test_an_unknown_option_or_mode_is_an_error(mode: Any, options: Any, words: str) -> None:
    module = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match=words):
        fusereg_backend(module, [], mode=mode, options=options)


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [Separable, basic, Volumes], ids=["depthwise", "2d", "3d"])
def test_inductor_is_told_the_layout_of_convolutions(
    make: Make,
    layout: torch.memory_format,
    given: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []

    def inductor(module: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr(compiler, "lookup_backend", lambda name: inductor)
    options = {"then": "inductor", **({} if given is None else {"channels_last": given})}
    model: Any = make().float()
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    if make is not Volumes:  # whose convolutions have no such layout
        model = model.to(memory_format=layout)
    torch.compile(model, backend=fusereg_backend, options=options)(x)
    wanted: dict[str, bool] = {}
    if given is not False and torch.backends.mkldnn.is_available():
        if make is Separable:
            wanted = {"force_layout_optimization": True}
        elif make is basic and layout is torch.contiguous_format and given is None:
            wanted = {"layout_optimization": False}
    assert seen == [wanted]


class Norms(nn.Module):
    """Batch norms of fusereg in each form that a layer or a call can have."""

    def __init__(self, momentum: float | None = 0.1, **options: Any) -> None:
        super().__init__()
        activations = (None, "relu", "leaky_relu", "silu", "gelu")
        self.norms = nn.ModuleList(
            fusereg.nn.BatchNorm2d(
                3, momentum=momentum, activation=a, negative_slope=0.2, **options
            )
            for a in activations
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x, residual=x * 0.5) + norm(x)
        return x


def through_inductor(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[torch.fx.Graph]]:
    """Return the model compiled, and the graphs that Inductor got; they are run as they are."""
    graphs: list[torch.fx.Graph] = []

    def inductor(module: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    monkeypatch.setattr(compiler, "lookup_backend", lambda name: inductor)
    return compiled(model, then="inductor"), graphs


@pytest.mark.parametrize(
    "make",
    [
        basic,
        lambda: fusereg.convert(basic()),
        Norms,
        *(lambda option=option: Norms(**{option: False}) for option in (
            "affine", "bias", "track_running_stats", "update_stats",
        )),
    ],
    ids=["torch", "converted", "native", "no affine", "no bias", "no tracking", "no updates"],
)  # fmt: skip
def test_inductor_gets_a_batch_norm_with_what_follows_as_one_call(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stir(without_dropout(make())).double()
    twin = copy.deepcopy(model)
    run, graphs = through_inductor(twin, monkeypatch)
    for training in (True, True, False):
        model.train(training)
        twin.train(training)
        x = images(5)
        for got, wanted in zip(step(run, x), step(model, x), strict=True):
            close(got, wanted)
        same_state(twin, model)
    assert len(graphs) == 2
    for graph in graphs:
        called = {node.target for node in graph.nodes}
        assert fusereg.functional.batch_norm in called
        assert F.batch_norm not in called


def test_a_graph_is_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fusereg"):
        compiled(Separable())(torch.randn(2, 3, 8, 8))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fusereg"]
    assert "Separable" in line
    assert "fused 2 batch_norm + relu, 2 batch_norm + silu; left: nothing" in line


def test_compiling_a_container_in_place_compiles_nothing_as_documented() -> None:
    """torch.nn's own forward is no root of a graph: m.compile() of a Sequential does nothing."""
    model = small()
    model.compile(backend=fusereg_backend)
    model(torch.randn(8, 4, dtype=torch.float64))
    assert counters["fusereg"] == {}


def test_compiling_a_module_in_place_keeps_its_state_dict() -> None:
    model = Separable()
    names = list(model.state_dict())
    model.compile(backend=fusereg_backend)
    model(torch.randn(2, 3, 8, 8))
    assert list(model.state_dict()) == names
    assert counters["fusereg"]["graphs"] == 1


def test_inductor_may_cache_what_the_rewritten_graph_becomes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._functorch._aot_autograd.autograd_cache import check_node_safe

    patches: list[Any] = []

    def inductor(module: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        for node in module.graph.nodes:
            check_node_safe(node)  # raises what makes AOTAutograd pass its cache by
        patches.append(config_patches)
        return module.forward

    monkeypatch.setattr("fusereg.backend.compiler.lookup_backend", lambda name: inductor)
    model = nn.Sequential(Separable(), nn.Dropout(0.5))
    compiled(model, then="inductor", mode="max-autotune-no-cudagraphs")(images().float())
    assert fused() == {"dropout": 1, "batch_norm + relu": 2, "batch_norm + silu": 2}
    assert patches[0]["max_autotune"] is True


@pytest.mark.slow
def test_code_that_torch_has_cached_is_not_that_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import fresh_cache

    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.py").write_text(text, encoding="utf-8")
    a, b, c = (compiler._digest(tmp_path / name) for name in "abc")
    assert a == b != c
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(8, 4)

    def hits() -> int:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="fusereg", options={"then": "inductor"})
        compiled(x).sum().backward()
        return int(counters["aot_autograd"]["autograd_cache_hit"])

    with fresh_cache():
        assert [hits(), hits()] == [0, 1]
        other = dict.fromkeys(compiler._CACHEABLE, f"{c} of other code")
        monkeypatch.setattr(compiler, "_CACHEABLE", other)
        assert [hits(), hits()] == [0, 1]
