"""Synchronized batch normalization: several processes give what one gives on the whole batch.

Each check is a function of the ``Ranks`` that runs on gloo processes; see ranks.py.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fusereg
from fusereg import dropout_mask
from fusereg.batch_norm.op import statistics
from fusereg.batch_norm.sync_op import combined
from fusereg.nn import (
    BatchNorm2d,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
)
from plain_models import TimmAct
from ranks import Ranks, collect, on

CHANNELS = 5


def batch(samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, CHANNELS, 4, 3, dtype=torch.float64).add(2.0).to(dtype)


def layers(**arguments: Any) -> tuple[SyncBatchNorm, BatchNorm2d]:
    """A synchronized layer, and its twin in float64 for the whole batch."""
    one = SyncBatchNorm(CHANNELS, **arguments)
    with torch.no_grad():
        one.weight.copy_(torch.randn(CHANNELS))
        one.bias.copy_(torch.randn(CHANNELS))
    whole = BatchNorm2d(CHANNELS, dtype=torch.float64, **arguments)
    whole.load_state_dict(one.state_dict())
    return one, whole


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance * scale, rtol=0.0)


def compare(ranks: Ranks, parts: list[int], form: torch.memory_format, **arguments: Any) -> None:
    layer, twin = layers(**arguments)
    x, residual, grad = (batch(sum(parts)).contiguous(memory_format=form) for _ in range(3))
    if "activation" not in arguments:
        residual = None
    begin = sum(parts[: ranks.rank])
    mine = slice(begin, begin + parts[ranks.rank])
    own = x[mine].requires_grad_()
    own_residual = None if residual is None else residual[mine].requires_grad_()
    whole = x.double().requires_grad_()
    whole_residual = None if residual is None else residual.double().requires_grad_()
    y, wanted = layer(own, own_residual), twin(whole, whole_residual)
    y.backward(grad[mine])
    wanted.backward(grad.double())
    close(y.detach(), wanted.detach()[mine])
    assert own.grad is not None
    assert whole.grad is not None
    close(own.grad, whole.grad[mine])
    if own_residual is not None and whole_residual is not None:
        close(own_residual.grad, whole_residual.grad[mine])
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        # Each process has its own part of the parameters' gradients, which DDP averages.
        total = p.grad.double().clone()
        dist.all_reduce(total)
        close(total, q.grad, 5e-6)
    for (name, a), b in zip(layer.named_buffers(), twin.buffers(), strict=True):
        assert a.dtype is (torch.int64 if "num" in name else torch.float32)
        close(a, b)


@on(2, 3)
def as_one_process_on_the_whole_batch(ranks: Ranks) -> None:
    for form in (torch.contiguous_format, torch.channels_last):
        compare(ranks, [3] * ranks.world, form)


@on(2, 3)
def uneven_batches(ranks: Ranks) -> None:
    compare(ranks, [1, 4, 2][: ranks.world], torch.contiguous_format)


@on(2, 3)
def empty_batches(ranks: Ranks) -> None:
    compare(ranks, [0, 4, 1][: ranks.world], torch.contiguous_format)
    compare(ranks, [3, 0, 0][: ranks.world], torch.contiguous_format, activation="relu")


@on(2)
def epilogues(ranks: Ranks) -> None:
    for activation in ("relu", "leaky_relu", "silu", "gelu"):
        compare(ranks, [2, 3], torch.contiguous_format, activation=activation)


@on(2)
def dropout_draws_a_mask_of_each_process_s_own(ranks: Ranks) -> None:
    layer, _ = layers(dropout=0.5)
    x = batch(40)[20 * ranks.rank : 20 * ranks.rank + 20].requires_grad_()
    torch.manual_seed(ranks.rank)
    y = layer(x)
    kept = y != 0
    assert 0.4 < kept.double().mean().item() < 0.6
    both = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(both, kept)
    assert not torch.equal(*both)
    y.sum().backward()
    torch.manual_seed(ranks.rank)
    plain = dropout_mask(x.shape, 0.5, *torch.empty(2, dtype=torch.int64).random_().tolist())
    assert torch.equal(plain, kept)


@on(2)
def cumulative_momentum(ranks: Ranks) -> None:
    compare(ranks, [2, 3], torch.contiguous_format, momentum=None)


@on(2)
def one_value_per_channel_on_each_process(ranks: Ranks) -> None:
    layer = SyncBatchNorm(3)
    y = layer(torch.full((1, 3), float(ranks.rank)))
    close(y, torch.full((1, 3), 2.0 * ranks.rank - 1.0), 1e-4)


@on(2)
def a_large_mean(ranks: Ranks) -> None:
    layer = SyncBatchNorm(CHANNELS, affine=False)
    x = batch(8) + 1e4
    y = layer(x[4 * ranks.rank : 4 * ranks.rank + 4])
    wanted = nn.functional.batch_norm(x.double(), None, None, training=True)
    close(y, wanted[4 * ranks.rank : 4 * ranks.rank + 4], 2e-6)


@on(2)
def evaluation_synchronizes_nothing(ranks: Ranks) -> None:
    layer, twin = layers()
    layer.eval()
    twin.eval()
    if ranks.rank == 0:  # the other takes no part
        x = batch(2)
        close(layer(x), twin(x.double()))


@on(2)
def a_group_of_one_process(ranks: Ranks) -> None:
    groups = [dist.new_group([rank]) for rank in range(ranks.world)]
    layer, twin = layers()
    layer.process_group = groups[ranks.rank]
    x = batch(2) + ranks.rank
    close(layer(x), twin(x.double()))


@on(2)
def compiled_whole(ranks: Ranks) -> None:
    layer, _ = layers(activation="relu")
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = batch(4)[2 * ranks.rank : 2 * ranks.rank + 2]
    own, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = compiled(own), plain(twin)
    y.square().sum().backward()
    wanted.square().sum().backward()
    close(y.detach(), wanted.detach())
    close(own.grad, twin.grad)
    close(layer.weight.grad, plain.weight.grad)
    close(layer.running_var, plain.running_var)
    assert int(layer.num_batches_tracked) == 1


class _HostReads(TorchDispatchMode):
    """Notes the operations that wait for a device to say what is in a tensor, or to copy it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        name = func.name()
        moves = name.startswith("aten::_to_copy") and (kwargs or {}).get("device") is not None
        if moves or name.partition(".")[0] in (
            "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
            "aten::unique_dim", "aten::_unique2", "aten::masked_select",
        ):  # fmt: skip
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@on(2)
def the_host_never_waits_for_a_device(ranks: Ranks) -> None:
    """On a CPU nothing waits, so what would wait on another device is made to raise or is noted."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host asked for a tensor's contents")

    asking = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__",
              "__index__", "__array__")  # fmt: skip
    for form in (torch.contiguous_format, torch.channels_last):
        for arguments in ({}, {"momentum": None, "activation": "relu"}):
            layer, _ = layers(**arguments)
            x, grad = (batch(3).contiguous(memory_format=form) for _ in range(2))
            residual = batch(3) if arguments else None
            x.requires_grad_()
            reads = _HostReads()
            kept = {name: getattr(Tensor, name) for name in asking}
            for observed in (True, False):
                for name in asking:
                    setattr(Tensor, name, refuse)
                try:
                    with reads if observed else nullcontext():
                        layer(x, residual).backward(grad)
                finally:
                    for name, method in kept.items():
                        setattr(Tensor, name, method)
            assert reads.calls > 5
            assert not reads.seen, reads.seen
            assert int(layer.num_batches_tracked) == 2
    with _HostReads() as reads:  # and what it is to notice, it notices
        x.detach().sum().item()
    assert reads.seen == ["aten::_local_scalar_dense"]


@on(2)
def a_converted_model_under_ddp(ranks: Ranks) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3), BatchNorm2d(4, activation="relu"), nn.Flatten(), nn.Linear(8, 2)
    )
    whole = copy.deepcopy(model)
    ours = SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(ours[1]) is SyncBatchNorm
    assert ours[1].activation == "relu"
    parallel = nn.parallel.DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, whole)]
    for _ in range(3):
        x = batch(4)
        for optimizer in optimizers:
            optimizer.zero_grad()
        parallel(x[2 * ranks.rank : 2 * ranks.rank + 2]).square().mean().backward()
        whole(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours.state_dict().values(), whole.state_dict().values(), strict=True):
        close(p, q, 2e-5)


@on(2)
def a_batch_norm_with_activation_of_timm(ranks: Ranks) -> None:
    torch.manual_seed(1)
    whole = TimmAct(CHANNELS, act=nn.Hardswish())
    layer = SyncBatchNorm.convert_sync_batchnorm(fusereg.convert(copy.deepcopy(whole)))
    x = batch(4)
    close(layer(x[2 * ranks.rank : 2 * ranks.rank + 2]), whole(x)[2 * ranks.rank :][:2])
    for a, b in zip(layer.buffers(), whole.buffers(), strict=True):
        close(a, b)


@on(2)
def second_derivatives(ranks: Ranks) -> None:
    """Of each input, through the gradient of each input, in float64."""
    parts = [2, 3]
    mine = slice(2 * ranks.rank, 2 + 3 * ranks.rank)
    for activation in (None, "relu", "leaky_relu", "silu", "gelu"):
        for with_residual in (False, True):
            layer, twin = layers(activation=activation)
            layer = layer.double()
            x, residual, grad = (batch(sum(parts), torch.float64) for _ in range(3))
            found = []
            for each, part in ((layer, mine), (twin, slice(None))):
                leaves = [x[part].clone().requires_grad_()]
                if with_residual:
                    leaves.append(residual[part].clone().requires_grad_())
                g = grad[part].clone().requires_grad_()
                y = each(*leaves)
                inputs = [*leaves, each.weight, each.bias]
                first = torch.autograd.grad(y, inputs, g, create_graph=True)
                # The gradients of parameters are of this process's batch alone: linear in these.
                weights = torch.linspace(0.5, 1.5, CHANNELS, dtype=torch.float64)
                loss = sum(((t**2).sum() for t in first[: len(leaves)]), torch.zeros(()).double())
                loss = loss + ((first[-2] + first[-1]) * weights).sum()
                second = torch.autograd.grad(loss, [*inputs, g], allow_unused=True)
                found.append([torch.zeros(()) if t is None else t for t in second])
            own, whole = found
            for i, (a, b) in enumerate(zip(own, whole, strict=True)):
                if i in (len(own) - 3, len(own) - 2):  # the parameters: summed over the processes
                    a = a.expand(CHANNELS).double().clone()
                    dist.all_reduce(a)
                    close(a, b.expand(CHANNELS), 1e-9)
                else:
                    close(a, b if b.dim() == 0 else b[mine], 1e-9)


@on(2)
def a_gradient_penalty_as_one_process_with_the_whole_batch(ranks: Ranks) -> None:
    """WGAN-GP: the norm of the critic's gradient is trained on; with one process's batch empty."""
    for parts in ([3, 2], [5, 0]):
        torch.manual_seed(3)
        critic = nn.Sequential(
            nn.Conv2d(CHANNELS, 4, 3, padding=1),
            BatchNorm2d(4, activation="leaky_relu"),
            nn.Conv2d(4, 6, 3, padding=1),
            BatchNorm2d(6, activation="silu"),
            nn.Flatten(),
            nn.Linear(6 * 12, 1),
        ).double()
        own = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(critic))
        x = batch(5, torch.float64)
        begin = sum(parts[: ranks.rank])
        for model, given in ((own, x[begin : begin + parts[ranks.rank]]), (critic, x)):
            given = given.clone().requires_grad_()
            score = model(given)
            (gradient,) = torch.autograd.grad(score.sum(), given, create_graph=True)
            penalty = (gradient.flatten(1).norm(dim=1) - 1.0).square().sum()
            (score.sum() + 10.0 * penalty).backward()
        for p, q in zip(own.parameters(), critic.parameters(), strict=True):
            assert p.grad is not None
            total = p.grad.clone()
            dist.all_reduce(total)
            close(total, q.grad, 1e-9)


test_ranks = collect(__name__)


# --- one process ----------------------------------------------------------------------------------


def test_without_processes_it_is_batch_norm() -> None:
    layer, twin = layers(activation="silu")
    x = batch(3)
    close(layer(x), twin(x.double()))
    close(layer.running_mean, twin.running_mean)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = batch(7, torch.float64) + 1e6
    parts = [x[:2], x[2:2], x[2:3], x[3:]]
    moments = torch.stack([statistics(part) for part in parts])
    mean, var, count = combined(moments)
    flat = x.transpose(0, 1).flatten(1)
    close(mean, flat.mean(1), 1e-15)
    torch.testing.assert_close(var, flat.var(1, correction=0), atol=0.0, rtol=1e-9)
    assert count.tolist() == [7 * 12.0] * CHANNELS


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, BatchNorm2d, nn.SyncBatchNorm])
def test_converting_and_back(kind: type[nn.Module]) -> None:
    fused = {"activation": "relu", "dropout": 0.25} if kind is BatchNorm2d else {}
    layer = kind(4, momentum=0.3, **fused)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    model = nn.Sequential(nn.Sequential(layer), nn.Identity(), layer)
    weight, keys = layer.weight, list(model.state_dict())
    made = SyncBatchNorm.convert_sync_batchnorm(model.eval())
    assert made is model
    assert made[2] is made[0][0], "a shared layer stays shared"
    assert type(made[2]) is SyncBatchNorm
    assert made[2].weight is weight
    assert not made[2].training
    assert made[2].momentum == 0.3
    assert list(made.state_dict()) == keys
    shape = (2, 4, 3, 3, 3) if kind is nn.BatchNorm3d else (2, 4)
    made(torch.ones(shape))
    assert calls == ["called", "called"]
    if fused:
        assert made[2].activation == "relu"
        assert made[2].dropout == 0.25
    back = SyncBatchNorm.revert_sync_batchnorm(made)
    assert type(back[2]) is kind
    assert back[2].weight is weight
    assert repr(back[2]) == repr(layer)
    assert list(back.state_dict()) == keys


def subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of a user's, which adds a ReLU."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return torch.relu(cls.forward(self, input))

    return type(f"My{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def with_own_forward() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    plain = layer.forward
    layer.forward = lambda x: torch.relu(plain(x))  # type: ignore[method-assign]
    return layer


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{
        cls.__name__: (lambda cls=cls: subclass(cls)(4), f"My{cls.__name__} is a class that fuse")
        for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, TimmAct)
    },
    "ours": (lambda: subclass(BatchNorm2d)(4), "MyBatchNorm2d is a class that fusereg does not"),
    "lazy": (nn.LazyBatchNorm2d, "LazyBatchNorm2d is a class that fusereg does not know"),
    "ghost": (lambda: GhostBatchNorm(4), "GhostBatchNorm has statistics of its own"),
    "renorm": (lambda: BatchRenorm(4), "BatchRenorm has statistics of its own"),
    "in place": (lambda: BatchNorm2d(4, inplace=True), "does not work in place"),
    "forward": (with_own_forward, "its forward is set on the object"),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Identity()),
        "ParametrizedBatchNorm2d is a class that fusereg does not know",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_stays_with_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = UNKNOWN[name]
    layer = make()
    model = nn.Sequential(nn.Sequential(layer), nn.BatchNorm2d(4))
    made = SyncBatchNorm.convert_sync_batchnorm(model)
    assert made[0][0] is layer
    assert type(made[1]) is SyncBatchNorm
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith("fusereg.nn.SyncBatchNorm: 0.0 is not synchronized: ")
    assert reason in said


def test_what_has_nothing_to_synchronize_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    layers = [FrozenBatchNorm(4), SyncBatchNorm(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)]
    made = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*layers))
    assert list(made) == layers
    assert not caplog.records


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardswish(), nn.PReLU(), nn.Identity()], ids=repr)
def test_timm_s_layer_keeps_its_activation(act: nn.Module, converted: bool) -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 1), TimmAct(4, act=copy.deepcopy(act), drop=nn.Dropout2d(0.0))
    )
    keys = list(plain.state_dict())
    model = copy.deepcopy(plain)
    if converted:
        fusereg.convert(model)
    classes = [type(m) for m in model.modules()]
    made = SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(made[1], SyncBatchNorm)
    x = torch.randn(5, 3, 2, 2)
    for _ in range(2):
        close(made(x), plain(x))
    for name, value in plain.state_dict().items():
        close(made.state_dict()[name], value)
    assert list(made.state_dict()) == keys
    SyncBatchNorm.revert_sync_batchnorm(made)
    assert type(made[1]) is TimmAct, "also of a converted one"
    if not converted:
        assert [type(m) for m in made.modules()] == classes
    close(made(x), plain(x))


def test_a_synchronized_layer_of_timm_is_pickled() -> None:
    importlib.import_module("other_libraries")
    layer = pytest.importorskip("timm.layers").BatchNormAct2d(4)
    made = SyncBatchNorm.convert_sync_batchnorm(fusereg.convert(layer))
    loaded = pickle.loads(pickle.dumps(made))
    x = torch.randn(5, 4, 2, 2)
    assert torch.equal(loaded(x), made(x))
    assert type(SyncBatchNorm.revert_sync_batchnorm(loaded)) is type(fusereg.revert(layer))


@pytest.mark.parametrize("library", ["torch", "timm", "lightning"])
def test_the_libraries_own_conversion_of_a_converted_model(library: str) -> None:
    importlib.import_module("other_libraries")
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    if library == "timm":
        norm_act = pytest.importorskip("timm.layers").BatchNormAct2d
        plain.append(norm_act(4, act_layer=nn.SiLU))
        convert: Any = importlib.import_module("timm.layers").convert_sync_batchnorm
    elif library == "lightning":
        convert = pytest.importorskip("lightning.pytorch.plugins").TorchSyncBatchNorm().apply
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model = fusereg.convert(copy.deepcopy(plain))
    made = convert(model)
    x = torch.randn(5, 3, 2, 2)
    for each in (made.train(), made.eval()):
        wanted = plain.train(each.training)(x)
        close(each(x), wanted)
    for name, value in plain.state_dict().items():
        close(made.state_dict()[name], value)
    kinds = [isinstance(m, nn.SyncBatchNorm) for m in made]
    assert sum(kinds) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain)
    fusereg.revert(made)
    close(made(x), plain(x))


def test_revert_works_after_synchronizing_and_back(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    made = SyncBatchNorm.convert_sync_batchnorm(fusereg.convert(model))
    fusereg.revert(made)
    assert "1 stays: it is a SyncBatchNorm by now" in caplog.text
    fusereg.revert(SyncBatchNorm.revert_sync_batchnorm(made))
    assert [type(m) for m in made] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_hooks_of_state_dicts_get_the_new_layer() -> None:
    layer, seen = nn.BatchNorm1d(3), []
    layer.register_state_dict_pre_hook(lambda module, *_: seen.append(("saves", module)))
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("loads", module)))
    layer.register_load_state_dict_post_hook(lambda module, _: seen.append(("loaded", module)))
    model = nn.Sequential(layer)
    del layer
    for change in (SyncBatchNorm.convert_sync_batchnorm, SyncBatchNorm.revert_sync_batchnorm):
        change(model)
        seen.clear()
        model.load_state_dict(model.state_dict())
        assert seen == [(what, model[0]) for what in ("saves", "loads", "loaded")]


def test_torch_s_layer_cannot_take_a_fused_activation() -> None:
    layer = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))
    layer.activation = "relu"
    with pytest.raises(ValueError, match=r"cannot become a torch.nn.modules.batchnorm.BatchNorm2d"):
        SyncBatchNorm.revert_sync_batchnorm(layer)


def test_a_state_dict_goes_both_ways() -> None:
    ours, torchs = SyncBatchNorm(4), nn.SyncBatchNorm(4)
    torchs.running_mean.fill_(3.0)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert ours.running_mean.tolist() == [3.0] * 4
    with pytest.raises(ValueError, match="sync_batch_norm: input has 5 channels, this layer 4"):
        ours(torch.randn(3, 5))
