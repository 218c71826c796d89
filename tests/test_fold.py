"""Folding batch norms into what is before them: what is folded is the same, the rest stays."""

from __future__ import annotations

import copy
import importlib
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusereg
from fold_models import (
    Make,
    Pair,
    Residual,
    Untraceable,
    convolution,
    folded,
    norms,
    randomized,
    sequence,
    untraceable,
)
from fusereg.batch_norm import calls, fold
from fusereg.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
)
from plain_models import TimmAct

# --- what is folded -------------------------------------------------------------------------------


class UntraceableLoop(nn.Module):
    """Calls the elements of lists, in the ways in which one writes that."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(sequence() for _ in range(3))
        self.more = nn.ModuleList(sequence() for _ in range(2))
        self.last = nn.ModuleDict({"a": sequence(), "b": sequence()})

    def forward(self, x: Tensor) -> Tensor:
        with untraceable:
            pass
        for part in self.parts:
            x = part(x)
        for i, part in enumerate(self.more):
            x = part(x) + i
        for _, part in self.last.items():
            x = part(x)
        for part in self.last.values():
            x = part(x)
        return self.last["a"](x) * len(self.parts)


class UntraceableDict(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        with untraceable:
            pass
        for name, part in self.items():
            x = part(x) + len(name)
        for part in self.values():
            x = part(x)
        return x


class UntraceableList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        with untraceable:
            pass
        for part in self:
            x = part(x)
        for i, part in enumerate(self):
            x = part(x) * i
        return x


class UntraceableChildren(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        with untraceable:
            pass
        for part in self.children():
            x = part(x)
        for _, part in self.named_children():
            x = part(x)
        return x


class CallsItsChildren(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, f"wanted 4 dimensions, got {x.dim()}")
        for part in self.children():
            x = part(x)
        return x


class TakesTensorsOrLists(Pair):
    def forward(self, x: Any) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.bn(self.conv(torch.cat(parts, 1)))


class CallsItWithLists(nn.ModuleDict):
    """As the dense blocks of torchvision do."""

    def __init__(self) -> None:
        super().__init__({str(i): TakesTensorsOrLists(nn.Conv2d(6 * i, 6, 1)) for i in (1, 2)})

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for _, part in self.items():
            found.append(part(found))
        return torch.cat(found, 1)


FOLDED: dict[str, tuple[Make, int]] = {
    "children, one by one": (
        lambda: CallsItsChildren({"a": convolution(), "b": nn.BatchNorm2d(6), "c": sequence()}),
        0,
    ),
    "tensors or lists": (CallsItWithLists, 0),
    "sequence": (sequence, 0),
    "leaky": (lambda: sequence(BatchNorm2d, activation="leaky_relu", negative_slope=0.2), 0),
    "dropout, which does nothing": (lambda: sequence(BatchNorm2d, dropout=0.5), 0),
    "frozen": (lambda: sequence(FrozenBatchNorm, activation="relu"), 0),
    "ghost": (lambda: sequence(GhostBatchNorm, virtual_batch_size=2), 0),
    "renorm": (lambda: sequence(BatchRenorm), 0),
    "synchronized": (lambda: sequence(SyncBatchNorm), 0),
    "torch's synchronized": (lambda: sequence(nn.SyncBatchNorm), 0),
    "not affine": (lambda: sequence(affine=False), 0),
    "transposed": (lambda: sequence(conv=nn.ConvTranspose2d(6, 6, 3, groups=2, padding=1)), 0),
    "reflected": (lambda: sequence(conv=nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")), 0),
    "depthwise": (lambda: sequence(conv=nn.Conv2d(6, 6, 3, groups=6, bias=False, padding=1)), 0),
    "residual": (Residual, 0),
    "a sequence in a sequence": (
        lambda: nn.Sequential(
            nn.Sequential(nn.ReLU(), convolution()), nn.BatchNorm2d(6), sequence()
        ),
        0,
    ),
    "of an untraceable module": (lambda: Untraceable(nn.Sequential(Residual(), sequence())), 0),
    "of two": (lambda: Untraceable(Untraceable(sequence())), 0),
    "of a sequence with such": (lambda: nn.Sequential(Untraceable(sequence()), sequence()), 0),
    "in lists": (UntraceableLoop, 0),
    "in a dict that is called": (
        lambda: nn.Sequential(UntraceableDict({"a": sequence(), "b": sequence()})),
        0,
    ),
    "children": (lambda: UntraceableChildren(a=sequence(), b=sequence()), 0),
    "children that are layers": (
        lambda: UntraceableChildren(a=convolution(), b=nn.BatchNorm2d(6), c=sequence()),
        1,
    ),
    "in a list that is called": (lambda: UntraceableList([sequence(), sequence()]), 0),
    "items of a dict that is called": (
        lambda: UntraceableDict({"a": convolution(), "b": nn.BatchNorm2d(6), "c": sequence()}),
        1,
    ),
    "converted": (lambda: fusereg.convert(nn.Sequential(sequence(), Residual()).train()), 0),
    "nothing before": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), 1),
    "a batch norm alone": (lambda: nn.BatchNorm2d(6), 1),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_plain_is_folded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, left = FOLDED[name]
    assert norms(folded(randomized(make()), caplog=caplog)) == left


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_convolution(n: int, kind: str, bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    for ours in (False, True):
        norm = [(nn.BatchNorm1d, BatchNorm1d), (nn.BatchNorm2d, BatchNorm2d),
                (nn.BatchNorm3d, BatchNorm3d)][n - 1][ours]  # fmt: skip
        conv = getattr(nn, f"{kind}{n}d")(4, 6, 3, stride=2, groups=2, bias=bias)
        x = torch.randn(2, 4, *[6, 5, 7][:n], dtype=torch.float64)
        model = randomized(nn.Sequential(conv, norm(6)))
        assert norms(folded(model, x, caplog=caplog)) == 0


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d, FrozenBatchNorm, SyncBatchNorm])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(norm: Any, bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 6, bias=bias), norm(6)))
    copied = folded(model, torch.randn(3, 4, dtype=torch.float64), caplog=caplog)
    assert norms(copied) == 0
    # (N, L, C) from the linear layer is (N, C, L) for the batch norm.
    with pytest.raises(ValueError, match="must have 2 dimensions, got 3"):
        copied(torch.randn(3, 6, 4, dtype=torch.float64))


class Rows(nn.Module):
    """A linear layer of (N, L, C), whose batch norm takes the rows of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.rows(x)


class ByMethod(Rows):
    def rows(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class ByFunction(Rows):
    def rows(self, x: Tensor) -> Tensor:
        return self.bn(torch.flatten(x, 0, -2)).view(x.size(0), x.shape[1], 4)


class UsedTwice(Rows):
    def rows(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(0, 1)).reshape_as(x) + x


class RowsUsedTwice(Rows):
    def rows(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)
        return self.bn(y) + y


class OtherRows(Rows):
    def rows(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(1)[:, :4])


class GivesItsValues(Rows):
    def rows(self, x: Tensor) -> Tensor:
        return x.reshape_as(self.bn(x.flatten(0, 1)).reshape_as(x))


@pytest.mark.parametrize("cls", [ByMethod, ByFunction])
def test_a_linear_layer_of_rows_takes_the_batch_norm(
    cls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(cls())
    assert norms(folded(model, torch.randn(2, 5, 6).double(), caplog=caplog)) == 0
    # Another number of dimensions is an error, not another result.
    for shape in ((5, 6), (2, 4, 4, 6)):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            fusereg.fold_into_conv(model)(torch.randn(shape).double())


@pytest.mark.parametrize("cls", [UsedTwice, RowsUsedTwice, OtherRows, GivesItsValues])
def test_a_linear_layer_whose_rows_are_used_otherwise_stays(
    cls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(cls())
    assert norms(folded(model, torch.randn(2, 5, 6).double(), caplog=caplog)) == 1


def test_flattened_images_stay(caplog: pytest.LogCaptureFixture) -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(6, 4, 1), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Any:
            return self.bn(self.conv(x).flatten(0, 1))

    model = randomized(Flattens())
    assert norms(folded(model, torch.randn(2, 6, 7).double(), caplog=caplog)) == 1


def test_an_unbatched_input_is_not_taken_for_a_batch() -> None:
    folds = fusereg.fold_into_conv(randomized(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6))))
    with pytest.raises(ValueError, match="must have 3 dimensions, got 2"):
        folds(torch.randn(4, 8, dtype=torch.float64))


def test_each_block_of_a_shared_one_is_folded_once(caplog: pytest.LogCaptureFixture) -> None:
    block = sequence()
    for model in (
        nn.Sequential(nn.Sequential(block), nn.Sequential(block, nn.Tanh()), block),
        nn.Sequential(Untraceable(block), Untraceable(block)),
    ):
        assert norms(folded(randomized(model), caplog=caplog)) == 0


def test_a_block_under_two_names_is_folded_under_both(caplog: pytest.LogCaptureFixture) -> None:
    model = Residual()
    model.again = model.bn1
    copied: Any = folded(randomized(model), caplog=caplog)
    assert norms(copied) == 0
    assert copied.again is copied.bn1


# --- activations of timm --------------------------------------------------------------------------


def timm_act(act: nn.Module) -> nn.Module:
    importlib.import_module("other_libraries")
    layer: nn.Module = pytest.importorskip("timm.layers").BatchNormAct2d(6)
    layer.act = act
    return layer


@pytest.mark.parametrize(
    "make", [timm_act, lambda act: TimmAct(6, act=act)], ids=["timm", "stand-in"]
)
@pytest.mark.parametrize(
    "act",
    [nn.Identity(), nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.PReLU(), nn.GELU("tanh")],
    ids=lambda a: type(a).__name__,
)
def test_timm_s_layer_keeps_its_activation(
    make: Any, act: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make(copy.deepcopy(act))
    model = nn.Sequential(nn.Conv2d(6, 6, 3), layer)
    for made in (lambda m: m, fusereg.convert, SyncBatchNorm.convert_sync_batchnorm):
        copied: Any = folded(randomized(made(model)), caplog=caplog)
        assert norms(copied) == 0
        assert type(copied[1].act) is type(act)
        assert {"act.weight"} & {*copied[1].state_dict()} == {"act.weight"} & {*layer.state_dict()}


# --- what stays: classes that are not known -------------------------------------------------------


class WithReLU(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.relu(super().forward(*args, **kwargs))


def subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of a user's that adds a ReLU."""
    return type(f"My{cls.__name__}", (WithReLU, cls), {"__module__": __name__})


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized in every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(6, 3), subclass(nn.BatchNorm2d)(6))
    model(torch.randn(2, 6, 5, 5))
    return model


ANY_NORM = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, SyncBatchNorm, GhostBatchNorm,
            BatchRenorm, FrozenBatchNorm, TimmAct)  # fmt: skip
UNKNOWN: dict[str, tuple[Make, str]] = {
    **{
        f"{cls.__module__.split('.')[0]} {cls.__name__}": (
            lambda cls=cls: sequence(subclass(cls)), f"My{cls.__name__} is a class that fusereg"
        )
        for cls in ANY_NORM
    },
    "standardized": (lambda: sequence(conv=Standardized(6, 6, 3)), "Standardized, is a subclass"),
    "conv": (lambda: sequence(conv=subclass(nn.Conv2d)(6, 6, 3)), "MyConv2d, is a subclass"),
    "transposed": (
        lambda: sequence(conv=subclass(nn.ConvTranspose2d)(6, 6, 3)), "MyConvTranspose2d, is a sub"
    ),
    "lazy": (lazy, "MyBatchNorm2d is a class"),
    "weight norm": (
        lambda: sequence(conv=parametrizations.weight_norm(convolution())), "ParametrizedConv2d"
    ),
    "old weight norm": (lambda: sequence(conv=nn.utils.weight_norm(convolution())), "it has hooks"),
    "spectral norm": (lambda: sequence(conv=nn.utils.spectral_norm(convolution())), "it has hooks"),
    "pruned": (lambda: sequence(conv=prune.identity(convolution(), "weight")), "it has hooks"),
    "parametrized": (lambda: sequence(lambda c: parametrized(nn.BatchNorm2d(c))), "ParametrizedBa"),
    "no statistics": (lambda: sequence(track_running_stats=False), "no running statistics"),
    "layer norm's like": (
        lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm2d(6)), "does not take what the Linear"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_what_is_not_known_stays(name: str, traced: bool, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = UNKNOWN[name]
    model = make()
    copied = folded(randomized(model if traced else Untraceable(model)), caplog=caplog)
    assert norms(copied) == 1
    assert reason in caplog.text


def test_a_linear_layer_of_a_subclass_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = randomized(nn.Sequential(subclass(nn.Linear)(4, 6), nn.BatchNorm1d(6)))
    assert norms(folded(model, torch.randn(3, 4).double(), caplog=caplog)) == 1


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "forward",
    ],
)
def test_a_layer_with_a_hook_stays(which: int, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    model = randomized(sequence())
    if hook == "forward":
        plain = model[which].forward
        model[which].forward = lambda x: plain(x) * 2.0
        # A deep copy has the forward of the original layer: nothing to do with folding.
        assert norms(fusereg.fold_into_conv(model)) == 1
        return
    result = {"register_forward_hook": lambda m, args, y: y * 2.0,
              "register_forward_pre_hook": lambda m, args: (args[0] * 2.0,)}  # fmt: skip
    getattr(model[which], hook)(result.get(hook, lambda *_: None))
    assert norms(folded(model, caplog=caplog)) == 1
    assert "has hooks" in caplog.text


# --- the copy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["all", "weight", "none"])
def test_frozen_parameters_stay_frozen(trained: str) -> None:
    for bias in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4)).eval()
        model.requires_grad_(trained == "all")
        model[0].weight.requires_grad_(trained != "none")
        conv: Any = fusereg.fold_into_conv(model)[0]
        assert conv.weight.requires_grad is (trained != "none")
        assert conv.bias.requires_grad is (trained == "all")


class Counts(Pair):
    """Changes itself in forward, in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0
        self.free = torch.zeros(2)

    def forward(self, x: Tensor) -> Any:
        self.steps.add_(1)
        self.steps += 1
        self.mean.mul_(0.9)
        self.calls += 1
        self.free.add_(1.0)
        torch.rand(3)
        return super().forward(x)


def test_folding_runs_no_side_effects_of_forward() -> None:
    for wrap in (lambda m: m, nn.Sequential, Untraceable):
        model = wrap(Counts()).eval()
        generator = torch.get_rng_state()
        copied = fusereg.fold_into_conv(model)
        assert torch.equal(torch.get_rng_state(), generator)
        for each in (model, copied):
            (counts,) = (m for m in each.modules() if isinstance(m, Counts))
            assert int(counts.steps) == counts.calls == 0
            assert not counts.free.any()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *((calls, name) for name in ("_traces", "_elements", "_only_called")),
        (calls.Calls, "_follow"),
        *((fold, name) for name in ("_find", "why_unknown", "_why_not_alone")),
        *((fold, name) for name in ("_why_not_matching", "_folded", "_left")),
    ],
)
def test_an_error_of_any_stage_leaves_that_pair_alone_and_no_other(
    where: Any, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (Residual(), Untraceable(sequence()), sequence(), Untraceable(sequence()))
    model = randomized(nn.Sequential(*parts))
    done, count = getattr(where, name), 0
    (whole,) = {norms(fusereg.fold_into_conv(model))}

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("an error inside")
        return done(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)
    with pytest.raises(RuntimeError, match="an error inside"):
        fusereg.fold_into_conv(model)
    monkeypatch.delenv("FUSEREG_RAISE")
    count = 0
    with caplog.at_level("INFO", "fusereg"):
        copied = folded(model, caplog=caplog)
    assert count >= 2
    assert whole <= norms(copied) < norms(model)
    # What cannot be traced may still be read.
    assert "an error inside" in caplog.text or norms(copied) == whole


def test_the_copy_is_saved_and_loaded() -> None:
    model = randomized(nn.Sequential(Residual(), sequence()))
    copied = fusereg.fold_into_conv(model)
    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert torch.equal(torch.load(file, weights_only=False)(x), copied(x))


def test_old_paths_lead_to_it() -> None:
    for path in ("fusereg.fold", "fusereg.batch_norm.fold"):
        module = importlib.import_module(path)
        assert module.fold_into_conv is fusereg.fold_into_conv
        assert issubclass(module.Epilogue, nn.Module)


def test_it_wants_evaluation_mode() -> None:
    with pytest.raises(ValueError, match=r"1 is in training mode; call model.eval\(\) first"):
        fusereg.fold_into_conv(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        fusereg.fold_into_conv([])  # type: ignore[type-var]
