"""Running statistics: given in part, in odd memory, and mapped over by vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

import fusereg
from fusereg import nn as fused_nn

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: fused_nn.BatchNorm2d(3),
    "with an activation": lambda: fused_nn.BatchNorm2d(3, activation="relu"),
    "SyncBatchNorm": lambda: fused_nn.SyncBatchNorm(3),
    "GhostBatchNorm": lambda: fused_nn.GhostBatchNorm(3, virtual_batch_size=2),
    "converted": lambda: fusereg.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())),
}


def _norm(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _as_torch(model: nn.Module) -> nn.Module:
    return nn.BatchNorm2d(3).train(model.training)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_one_of_the_running_statistics_alone_is_refused_as_by_torch(
    name: str, missing: str, training: bool
) -> None:
    model = LAYERS[name]().train(training)
    x = torch.randn(4, 3, 5, 5)
    for each in (model, _as_torch(model)):
        setattr(_norm(each), missing, None)
        with pytest.raises((ValueError, RuntimeError), match=r"running_mean|running_var"):
            each(x)
    other = "running_var" if missing == "running_mean" else "running_mean"
    assert torch.equal(getattr(_norm(model), other), getattr(nn.BatchNorm2d(3), other))
    assert _norm(model).num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_alone_is_refused_by_the_function(training: bool, compiled: bool) -> None:
    def call(x: Tensor, mean: Tensor) -> Tensor:
        return fusereg.functional.batch_norm(x, mean, None, training=training)

    function = torch.compile(call, backend="eager") if compiled else call
    with pytest.raises(Exception, match="must both be given, or neither, and running_var is None"):
        function(torch.randn(4, 3), torch.zeros(3))


@pytest.mark.parametrize("how", ["expanded", "strided", "reversed", "inference"])
def test_statistics_that_evaluation_reads_may_lie_in_any_memory(how: str) -> None:
    mean, var = torch.tensor([0.3, 0.3, 0.3]), torch.tensor([2.0, 2.0, 2.0])

    def laid(value: Tensor) -> Tensor:
        if how == "inference":
            with torch.inference_mode():
                return value.clone()
        return {
            "expanded": lambda: value[:1].expand(3),
            "strided": lambda: value.repeat_interleave(2)[::2],
            "reversed": lambda: value.flip(0),
        }[how]()

    x = torch.randn(2, 3, 4)
    weight = torch.ones(3, requires_grad=how != "inference")
    found = fusereg.functional.batch_norm(x, laid(mean), laid(var), weight, training=False)
    want = torch.nn.functional.batch_norm(x, mean, var, weight, training=False)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("outer", [False, True])
def test_vmap_over_a_layer_whose_statistics_it_does_not_map_over_is_refused(
    name: str, outer: bool
) -> None:
    model = LAYERS[name]()
    x = torch.randn(2, 5, 4, 3, 3, 3) if outer else torch.randn(5, 4, 3, 3, 3)
    call: Any = vmap(vmap(model)) if outer else vmap(model)
    with pytest.raises(RuntimeError, match=r"^fusereg\..*torch\.func\.vmap maps over the input"):
        call(x)
    norm = _norm(model)
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="maps over the input"):  # one gradient for each sample
        vmap(grad(lambda v: model(v).sum()))(torch.randn(5, 4, 3, 3, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_goes_on_where_nothing_would_be_lost(name: str) -> None:
    x = torch.randn(5, 4, 3, 3, 3)
    model = LAYERS[name]()
    stats = {k: v.expand(5, *v.shape).clone() for k, v in model.named_buffers()}
    found = vmap(lambda s, v: functional_call(model, s, (v,)))(stats, x)
    torch.testing.assert_close(found[1], LAYERS[name]()(x[1]))
    assert not torch.equal(*next(v for k, v in stats.items() if "mean" in k)[:2])
    vmap(lambda s: functional_call(model, s, (x[0],)))(stats)  # over the statistics alone
    _norm(model).update_stats = False
    torch.testing.assert_close(vmap(model)(x), found)
    model.eval()
    torch.testing.assert_close(vmap(model)(x)[2], model(x[2]))
    if name != "GhostBatchNorm":
        plain = LAYERS[name]()
        replace_all_batch_norm_modules_(plain)
        torch.testing.assert_close(vmap(plain)(x), found)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_layer_with_a_hook_of_any_kind_is_not_frozen(register: str) -> None:
    layer = nn.BatchNorm2d(3)
    getattr(layer, register)(lambda *_: None)
    with pytest.raises(ValueError, match="hooks, or a forward that is set on the object"):
        fused_nn.FrozenBatchNorm.from_batch_norm(layer)
