"""Batch normalization where torch's layers and functions stand: the same contract."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fusereg
from conftest import Backend
from fusereg import functional as F

#: Layer -> the torch layer whose contract it keeps, and a shape that it takes.
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (nn.BatchNorm1d, (6, 5, 7)),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 5, 3, 2)),
    "BatchNorm3d": (nn.BatchNorm3d, (3, 5, 2, 3, 2)),
    "SyncBatchNorm": (nn.BatchNorm2d, (4, 5, 3, 2)),
    "GhostBatchNorm": (nn.BatchNorm2d, (4, 5, 3, 2)),
    "BatchRenorm": (nn.BatchNorm2d, (4, 5, 3, 2)),
}
#: Those whose results are torch's.
PLAIN = [name for name in LAYERS if name != "BatchRenorm"]
Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def pair(name: str, **arguments: Any) -> Pair:
    """Return fusereg's layer, of virtual batches as large as the batch, and torch's, in float64."""
    theirs = LAYERS[name][0](5, dtype=torch.float64, **arguments)
    ours = getattr(fusereg.nn, name)(5, dtype=torch.float64, **arguments)
    if arguments.get("affine", True):
        nn.init.normal_(theirs.weight)
        if theirs.bias is not None:
            nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sample(name: str) -> Tensor:
    return torch.randn(LAYERS[name][1], dtype=torch.float64) * 2 + 1


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert that two layers have the same state."""
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(wanted)
    for key, value in wanted.items():
        assert state[key].dtype is value.dtype, key
        torch.testing.assert_close(state[key], value, msg=key)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_torchs_argument(name: str, bias: bool, affine: bool) -> None:
    ours, theirs = pair(name, bias=bias, affine=affine)
    assert (ours.bias is None) == (theirs.bias is None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = sample(name)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        if name in PLAIN:
            torch.testing.assert_close(ours(x), theirs(x))
            same(ours, theirs)
        twin = copy.deepcopy(ours)
        twin(x.clone().requires_grad_()).square().sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    ours.reset_parameters()
    theirs.reset_parameters()
    same(ours, theirs)
    with pytest.raises(TypeError, match="positional arguments"):
        getattr(fusereg.nn, name)(5, 1e-5, 0.1, True, True, None, None, None, bias)


def test_a_frozen_layer_without_bias_has_the_state_of_one_with_weight_alone() -> None:
    theirs = nn.BatchNorm2d(5, bias=False).eval()
    nn.init.normal_(theirs.weight)
    frozen = fusereg.nn.FrozenBatchNorm(5, bias=False)
    frozen.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(frozen(x), theirs(x))


def test_convert_keeps_a_layer_without_bias() -> None:
    theirs = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, bias=False), nn.ReLU())
    ours = fusereg.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    synchronized = fusereg.nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert synchronized[1].bias is None
    torch.testing.assert_close(synchronized(x), theirs(x))


VARIANTS = [*LAYERS, "FrozenBatchNorm"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_takes_a_device_and_a_dtype_and_skips_initialization(variant: str) -> None:
    kind = getattr(fusereg.nn, variant)
    layer = kind(4, device="meta", dtype=torch.bfloat16)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors} <= {torch.bfloat16, torch.int64}
    made = nn.utils.skip_init(kind, 4, dtype=torch.float64)
    assert all(t.device.type == "cpu" for t in (*made.parameters(), *made.buffers()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_functions_take_input_by_its_name(variant: str) -> None:
    x = (
        torch.randn(4, 5, 3)
        if variant == "BatchNorm1d"
        else torch.randn(LAYERS.get(variant, LAYERS["BatchNorm2d"])[1])
    )
    layer = getattr(fusereg.nn, variant)(5).eval()
    assert torch.equal(layer(input=x), layer(x))
    by_name = F.batch_norm(input=x, running_mean=torch.zeros(5), running_var=torch.ones(5))
    theirs = nn.functional.batch_norm(
        input=x, running_mean=torch.zeros(5), running_var=torch.ones(5)
    )
    torch.testing.assert_close(by_name, theirs)


@pytest.mark.parametrize("momentum", [-1.0, -0.25, 0.0, 0.3, 1.0, 1.00001, 2.0, 3, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_any_momentum_is_torchs(momentum: float | None, compiled: bool) -> None:
    ours, theirs = pair("BatchNorm1d", momentum=momentum)
    torch._dynamo.reset()
    call = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for step in range(3):
        x = sample("BatchNorm1d") + step
        torch.testing.assert_close(call(x), theirs(x))
        same(ours, theirs)


def test_any_momentum_on_every_backend(backend: Backend) -> None:
    x = torch.randn(6, 5, 7)
    for momentum in (-1.0, 1.5, 2.0):
        ours = fusereg.nn.BatchNorm1d(5, momentum=momentum).to(backend.device)
        theirs = nn.BatchNorm1d(5, momentum=momentum)
        for step in range(3):
            ours((x + step).to(backend.device))
            theirs(x + step)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key].cpu(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_eps_may_be_zero_in_evaluation(eps: float, backend: Backend) -> None:
    for variant, (kind, shape) in LAYERS.items():
        theirs = kind(5, eps=eps).eval()
        ours = getattr(fusereg.nn, variant)(5, eps=eps).to(backend.device).eval()
        x = torch.randn(shape, requires_grad=True)
        # torch's layers refuse an eps of zero up to 2.11; its operator never does.
        affine = theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var
        wanted = torch.batch_norm(x, *affine, False, 0.1, eps, False)
        y = ours(x.to(backend.device))
        torch.testing.assert_close(y.cpu(), wanted)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (right,) = torch.autograd.grad(wanted.square().sum(), x)
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)
    frozen = fusereg.nn.FrozenBatchNorm(5, eps=eps).to(backend.device)
    torch.testing.assert_close(frozen(x.to(backend.device)).cpu(), wanted)
    if eps == 0.0:
        for layer in (nn.BatchNorm1d(5, eps=eps), fusereg.nn.BatchNorm1d(5, eps=eps)):
            with pytest.raises(ValueError, match="eps must be positive"):
                layer(torch.randn(6, 5))


# --- track_running_stats --------------------------------------------------------------------------


def _activated(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU())


def _converted(layer: nn.Module) -> nn.Module:
    return fusereg.convert(_activated(layer))


def _synchronized(layer: nn.Module) -> nn.Module:
    result: nn.Module = fusereg.nn.SyncBatchNorm.convert_sync_batchnorm(_activated(layer))
    return result


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted": _converted,
    "converted and synchronized": lambda layer: _synchronized(_converted(layer)[0]),
    "compiled": lambda layer: torch.compile(_converted(layer), fullgraph=True, backend="aot_eager"),
}


def switched(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Go through a training in which the statistics are switched off and on, and evaluation."""
    of_ours = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    of_theirs = [m for m in theirs.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(of_ours) == len(of_theirs) == 1
    for training, tracks in ((True, True), (True, False), (False, False), (True, True)):
        for layer in (*of_ours, *of_theirs):
            layer.track_running_stats = tracks
        ours.train(training)
        theirs.train(training)
        before = copy.deepcopy(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        same(of_ours[0], of_theirs[0])
        kept = all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())
        assert kept != (training and tracks)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("plain", PLAIN)
def test_track_running_stats_is_switched_on_every_layer(plain: str, momentum: float | None) -> None:
    ours, theirs = pair(plain, momentum=momentum)
    switched(ours, theirs, sample(plain))


@pytest.mark.parametrize("way", WAYS)
def test_track_running_stats_is_switched_in_a_chain(way: str) -> None:
    torch._dynamo.reset()
    layer = nn.BatchNorm2d(5, dtype=torch.float64)
    switched(WAYS[way](copy.deepcopy(layer)), _activated(layer), sample("BatchNorm2d"))


def test_a_renormalizing_layer_that_does_not_track_still_renormalizes() -> None:
    layer = fusereg.nn.BatchRenorm(5)
    layer(torch.randn(4, 5, 3) + 2)
    twin = copy.deepcopy(layer)
    layer.track_running_stats = False
    x = torch.randn(4, 5, 3)
    assert torch.equal(layer(x), twin(x))
    assert int(layer.num_batches_tracked) == 1
    assert int(twin.num_batches_tracked) == 2
    assert not torch.equal(layer.running_mean, twin.running_mean)


def test_virtual_adversarial_training_toggles_the_flag() -> None:
    """The recipe: ``m.track_running_stats ^= True`` around a pass that must leave no trace."""
    model = fusereg.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    before = copy.deepcopy(model.state_dict())

    def toggle() -> None:
        for m in model.modules():
            if hasattr(m, "track_running_stats"):
                m.track_running_stats ^= True

    toggle()
    model(torch.randn(8, 3))
    toggle()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(torch.randn(8, 3))
    assert int(model[1].num_batches_tracked) == 1


# --- the count of batches -------------------------------------------------------------------------

COUNTS = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, None]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_a_count_of_any_dtype_is_kept(
    count: torch.dtype | None, momentum: float | None, backend: Backend
) -> None:
    ours, theirs = pair("BatchNorm2d", momentum=momentum)
    ours.to(backend.device)
    for layer in (ours, theirs):
        now = layer.num_batches_tracked
        layer.num_batches_tracked = None if count is None else now.to(count)
    for step in range(4):
        x = sample("BatchNorm2d") + step
        ours.train(step < 3)
        theirs.train(step < 3)
        torch.testing.assert_close(ours(x.to(backend.device)).cpu(), theirs(x))
        for key, value in theirs.state_dict().items():
            assert ours.state_dict()[key].dtype is value.dtype
            torch.testing.assert_close(ours.state_dict()[key].cpu(), value)


def test_a_mean_teacher_averages_all_buffers() -> None:
    """Averaging ``b.data`` of every buffer makes the count of batches a float32 tensor."""

    def trained(model: nn.Module) -> list[Tensor]:
        average, results = copy.deepcopy(model), []
        torch.manual_seed(0)
        for _ in range(3):
            x = torch.randn(4, 3, 4, 4)
            results.append(model(x))
            for a, b in zip(average.buffers(), model.buffers(), strict=True):
                a.data = a.data * 0.9 + b.data * 0.1
            results.append(average(x))
            results.append(average.eval()(x))
            average.train()
        whole = copy.deepcopy(model).type(torch.float64)
        results.append(whole(x.double()).float())
        assigned = copy.deepcopy(model)
        assigned.load_state_dict(average.state_dict(), assign=True)
        return [*results, assigned(x), *average.buffers()]

    theirs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    ours = fusereg.convert(copy.deepcopy(theirs))
    for found, wanted in zip(trained(ours), trained(theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_count_on_another_device_or_of_several_elements_is_counted_by_torch() -> None:
    mean, var, count = torch.zeros(3), torch.ones(3), torch.zeros(2, dtype=torch.int64)
    F.batch_norm(torch.randn(4, 3), mean, var, training=True, num_batches_tracked=count)
    assert count.tolist() == [1, 1]


# --- strides --------------------------------------------------------------------------------------

_LAST, _LAST_3D = torch.channels_last, torch.channels_last_3d
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "NC": lambda: torch.randn(6, 5),
    "NC, transposed": lambda: torch.randn(5, 6).t(),
    "NCL": lambda: torch.randn(4, 5, 7),
    "NLC": lambda: torch.randn(4, 7, 5).transpose(1, 2),
    "LNC": lambda: torch.randn(7, 4, 5).permute(1, 2, 0),
    "CNL": lambda: torch.randn(5, 4, 7).transpose(0, 1),
    "NCHW": lambda: torch.randn(4, 5, 6, 7),
    "NHWC": lambda: torch.randn(4, 5, 6, 7).to(memory_format=_LAST),
    "NCWH": lambda: torch.randn(4, 5, 7, 6).transpose(2, 3),
    "NHCW": lambda: torch.randn(4, 6, 5, 7).transpose(1, 2),
    "WHCN": lambda: torch.randn(7, 6, 5, 4).permute(3, 2, 1, 0),
    "CNHW": lambda: torch.randn(5, 4, 6, 7).transpose(0, 1),
    "N1HW": lambda: torch.randn(4, 1, 6, 7).to(memory_format=_LAST),
    "NC11": lambda: torch.randn(4, 5, 1, 1).to(memory_format=_LAST),
    "1CHW": lambda: torch.randn(1, 5, 6, 7).to(memory_format=_LAST),
    "NCDHW": lambda: torch.randn(2, 5, 3, 4, 5),
    "NDHWC": lambda: torch.randn(2, 5, 3, 4, 5).to(memory_format=_LAST_3D),
    "WHDCN": lambda: torch.randn(5, 4, 3, 5, 2).permute(4, 3, 2, 1, 0),
    "6 dimensions": lambda: torch.randn(2, 2, 2, 2, 2, 3).movedim(-1, 1),
    "sliced": lambda: torch.randn(4, 5, 7, 9)[:, :, 1:, ::2],
    "NHWC, sliced": lambda: torch.randn(4, 5, 7, 9).to(memory_format=_LAST)[:, :, 1:, ::2],
    "NHWC, some channels": lambda: torch.randn(4, 8, 6, 7).to(memory_format=_LAST)[:, :5],
    "samples expanded": lambda: torch.randn(1, 5, 6, 7).expand(4, 5, 6, 7),
    "channels expanded": lambda: torch.randn(4, 1, 6, 7).expand(4, 5, 6, 7),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "training": {"training": True},
    "evaluation": {},
    "activation": {"training": True, "activation": "relu"},
    "residual": {"training": True, "activation": "relu", "residual": "x"},
    "dropout": {"training": True, "dropout": 0.5},
    "virtual batches": {"training": True, "virtual_batch_size": 2},
    "mask": {"training": True, "mask": "mask"},
}


def call_of(x: Tensor, option: str) -> Tensor:
    """Call batch_norm with what the option says."""
    options = dict(OPTIONS[option])
    if "residual" in options:
        options["residual"] = torch.ones_like(x, memory_format=torch.contiguous_format)
    if "mask" in options:
        first = x.select(1, 0)
        options["mask"] = first > first.amin()
    channels = x.shape[1]
    statistics = (torch.zeros(channels), torch.ones(channels), torch.ones(channels))
    return F.batch_norm(x, *(t.to(x.device) for t in statistics), **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_results_are_torchs(layout: str, option: str) -> None:
    if (layout, option) == ("1CHW", "virtual batches"):
        pytest.skip("one sample has no virtual batches")
    x = LAYOUTS[layout]()
    wanted = nn.functional.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])).stride()
    assert call_of(x, option).stride() == wanted
    x.requires_grad_()
    y = call_of(x, option)
    assert y.stride() == wanted
    x = x.detach()
    with FakeTensorMode() as mode:
        fake = call_of(mode.from_tensor(x), option)
    assert fake.stride() == wanted, "compiled code expects other strides"
    constants = (0, 1e-5, 0, 0, 0.01, 0.0, 0, True)
    y, *_ = torch.ops.fusereg.batch_norm(x, *(None,) * 8, *constants)
    assert y.stride() == wanted, "compiled code gets other strides"


@pytest.mark.parametrize("layout", ["NLC", "WHCN", "NHWC", "NHWC, sliced"])
def test_compiled_code_has_the_strides_of_eager_calls(layout: str) -> None:
    x = LAYOUTS[layout]()
    dims = x.dim() - 2
    ours = getattr(fusereg.nn, f"BatchNorm{dims}d")(5, activation="relu")
    theirs = nn.Sequential(getattr(nn, f"BatchNorm{dims}d")(5), nn.ReLU())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for _ in range(2)]
    results = [ours(leaves[0]), compiled(leaves[1])]
    assert {y.stride() for y in results} == {theirs(x).stride()}
    grads = [torch.autograd.grad(y.sum(), t)[0] for y, t in zip(results, leaves, strict=True)]
    assert grads[0].stride() == grads[1].stride()


def test_the_result_of_a_transposed_input_can_be_viewed() -> None:
    x = torch.randn(4, 7, 16).transpose(1, 2)
    layer = fusereg.nn.BatchNorm1d(16)
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        assert call(x).view(4, -1).shape == (4, 112)


# --- every layout and every empty shape -----------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    **{k: v for k, v in OPTIONS.items() if k not in ("residual", "mask")},
    "in place": {"training": True, "inplace": True, "activation": "leaky_relu"},
    "in place, virtual batches": {"training": True, "inplace": True, "virtual_batch_size": 2},
}


def reference(x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Return the result in float64, of contiguous memory, without dropout."""
    x = x.double().contiguous()
    size = options.get("virtual_batch_size", max(len(x), 1)) if options.get("training") else 1
    parts = []
    mask = torch.ones(len(x), *x.shape[2:], dtype=torch.bool) if mask is None else mask
    for part, valid in zip(x.split(size), mask.split(size), strict=True):
        if options.get("training"):
            flat = part.movedim(1, -1)[valid]
            mean, var = flat.mean(0), flat.var(0, correction=0)
        else:
            mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (part - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        parts.append(z * valid.unsqueeze(1))
    z = torch.cat(parts)
    if options.get("activation") == "relu":
        return z.relu()
    return nn.functional.leaky_relu(z, 0.01) if options.get("activation") else z


def permutations() -> Iterator[tuple[int, ...]]:
    for dims in (2, 3, 4):
        yield from itertools.permutations(range(dims))


@pytest.mark.all_cases("host")
@pytest.mark.sanitizer
@pytest.mark.parametrize("mode", MODES)
def test_every_order_of_dimensions_in_every_mode(mode: str, backend: Backend) -> None:
    """With a mask and without, forward and backward, with ``out``, gradients in another order."""
    for order in permutations():
        shape = (6, 3, 4, 5)[: len(order)]
        base = torch.randn([shape[d] for d in order])
        x = base.permute([order.index(d) for d in range(len(order))]).to(backend.device)
        for masked in (False, True):
            options = dict(MODES[mode])
            mask = None
            if masked:
                mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
                mask.view(-1)[::5] = False
                options["mask"] = mask.to(backend.device)
            if options.get("dropout"):
                options["seed"] = 3
            wanted = reference(x.cpu(), mask, options)
            running = torch.zeros(3, device=backend.device), torch.ones(3, device=backend.device)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            given = leaf * 1.0 if options.get("inplace") else leaf
            y = F.batch_norm(given, *running, **options)
            y.backward(torch.randn(y.shape, device=y.device).mT.contiguous().mT)
            assert leaf.grad is not None
            found = y.detach().cpu().double()
            if options.get("dropout"):
                wanted = torch.where(found == 0.0, 0.0, 2 * wanted)
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)
            if not options.get("inplace"):
                out = torch.empty_like(x)
                constants = running if mode == "evaluation" else (None, None)
                F.batch_norm(x, *constants, out=out, **options)
                assert torch.equal(out, y.detach())


EMPTY = [(2, 0), (0, 0), (0, 3), (2, 0, 3), (0, 0, 2), (2, 0, 0), (0, 3, 2), (2, 3, 0)]
EMPTY += [(2, 0, 4, 4), (0, 3, 4, 4), (2, 3, 0, 4), (0, 0, 0, 0), (1, 0, 1, 1), (2, 0, 2, 2, 2)]


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_every_empty_shape_in_every_mode(shape: tuple[int, ...], backend: Backend) -> None:
    channels = shape[1]
    for mode, masked, last in itertools.product(MODES, (False, True), (False, True)):
        options = dict(MODES[mode])
        x = torch.randn(shape, device=backend.device)
        if last and len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        elif last:
            x = x.mT.contiguous().mT
        if masked:
            options["mask"] = torch.ones(shape[0], *shape[2:], dtype=torch.bool, device=x.device)
        mean, var = (torch.zeros(channels, device=x.device) for _ in range(2))
        count = torch.zeros((), dtype=torch.int64, device=x.device)
        weight, bias = (torch.ones(channels, device=x.device).requires_grad_() for _ in range(2))
        leaf = x.clone().requires_grad_()
        given = leaf * 1.0 if options.get("inplace") else leaf
        y = F.batch_norm(
            given, mean, var, weight, bias, num_batches_tracked=count, momentum=None, **options
        )
        assert y.shape == shape
        y.sum().backward()
        assert leaf.grad is not None
        for p in (weight, bias):
            assert p.grad is not None
            assert not p.grad.any()
        assert not mean.any()
        assert int(count) == int(options.get("training", False)), mode
        if not options.get("inplace"):
            F.batch_norm(x, None, None, residual=torch.zeros_like(x), out=x, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_takes_no_channels(variant: str, backend: Backend) -> None:
    dims = {"BatchNorm1d": 3, "BatchNorm3d": 5}.get(variant, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = getattr(fusereg.nn, variant)(0, activation="relu").to(backend.device)
    for training in (True, False):
        layer.train(training)
        x = torch.empty(2, 0, *[4] * (dims - 2), device=backend.device, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
    if variant != "FrozenBatchNorm":
        assert int(layer.num_batches_tracked) == 1


def test_a_converted_and_a_compiled_model_take_no_channels() -> None:
    model = fusereg.convert(nn.Sequential(nn.BatchNorm2d(0), nn.ReLU()))
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for training in (True, False):
            model.train(training)
            assert call(torch.empty(2, 0, 4, 4)).shape == (2, 0, 4, 4)
    assert int(model[0].num_batches_tracked) == 2


def test_a_mask_may_lie_in_any_way(backend: Backend) -> None:
    x = torch.randn(4, 3, 5, 6, device=backend.device)
    masks = {
        "transposed": (torch.rand(4, 6, 5) < 0.7).transpose(1, 2),
        "sliced": (torch.rand(4, 5, 12) < 0.7)[..., ::2],
        "expanded": (torch.rand(4, 5, 1) < 0.7).expand(4, 5, 6),
    }
    for layout, mask in masks.items():
        mask = mask.to(backend.device)
        for size in (None, 2):
            options: dict[str, Any] = {"training": True, "virtual_batch_size": size}
            for layer in (fusereg.nn.BatchNorm2d(3), fusereg.nn.BatchRenorm(3)):
                layer.to(backend.device)
                twin = copy.deepcopy(layer)
                assert torch.equal(layer(x, mask=mask), twin(x, mask=mask.contiguous())), layout
            found = F.batch_norm(x, None, None, mask=mask, **options)
            assert torch.equal(
                found, F.batch_norm(x, None, None, mask=mask.contiguous(), **options)
            )


MASKED: dict[str, Callable[[], nn.Module]] = {
    **{
        f"BatchNorm{d}d": functools.partial(getattr(fusereg.nn, f"BatchNorm{d}d"), 3)
        for d in (1, 2, 3)
    },
    **{n: functools.partial(getattr(fusereg.nn, n), 3) for n in ("SyncBatchNorm", "BatchRenorm")},
    "in place": lambda: fusereg.nn.BatchNorm2d(3, inplace=True),
    "virtual": lambda: fusereg.nn.GhostBatchNorm(3, virtual_batch_size=2),
}


@pytest.mark.parametrize("name", MASKED)
def test_one_value_that_a_mask_leaves_is_an_error_as_a_batch_of_one_is(name: str) -> None:
    layer = MASKED[name]()
    x = torch.randn(4, 3, *(5,) * {"BatchNorm1d": 1, "BatchNorm3d": 3}.get(name, 2))
    none, one, enough = (torch.zeros(4, *x.shape[2:], dtype=torch.bool) for _ in range(3))
    one.view(-1)[7] = True
    enough[1] = True
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x.clone(), mask=one)
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
    assert layer.eval()(x.clone(), mask=one).shape == x.shape
    layer.train()
    for mask in (enough, none):
        assert layer(x.clone(), mask=mask).shape == x.shape
    assert F.batch_norm(x[:, :0], None, None, training=True, mask=one).numel() == 0


# --- what is refused, and what is said ------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_running_statistics_have_no_derivative(which: str, training: bool) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    for function in (nn.functional.batch_norm, F.batch_norm):
        running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        running[which].requires_grad_()
        with pytest.raises(RuntimeError, match=which):
            function(x, **running, training=training)
        with forward_ad.dual_level():
            running[which] = forward_ad.make_dual(running[which].detach(), torch.ones(3))
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            assert function(x.detach(), **running, training=training).shape == x.shape
            if training:  # where they are results, and torch leaves their tangents alone
                assert function(dual, **running, training=True).shape == x.shape
            else:
                with pytest.raises(RuntimeError, match="forward grad"):
                    function(dual, **running)


def test_an_empty_float64_input_takes_float32_parameters() -> None:
    for function in (nn.functional.batch_norm, F.batch_norm):
        for training in (True, False):
            x = torch.empty(0, 3, dtype=torch.float64, requires_grad=True)
            weight = torch.ones(3, requires_grad=True)
            y = function(x, torch.zeros(3), torch.ones(3), weight, torch.zeros(3), training)
            assert y.dtype is torch.float64
            y.sum().backward()
            assert torch.equal(weight.grad, torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"bias": False}])
def test_nothing_is_warned_of_where_torch_does_not(name: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in pair(name, **options):
            x = sample(name).requires_grad_()
            layer(x).sum().backward()
            layer.eval()(x).sum().backward()
            layer(x[:0])
