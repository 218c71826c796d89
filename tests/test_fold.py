"""Folding batch norms into what is before them: what is folded is the same, the rest stays."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import fusereg
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

_Norm = nn.modules.batchnorm._BatchNorm
Make = Callable[[], nn.Module]


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation, with random parameters and statistics."""
    model.double().eval()
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            if values.is_floating_point():
                values.copy_(torch.rand_like(values) + (0.5 if "var" in name else -0.4))
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, (_Norm, FrozenBatchNorm)) for m in model.modules())


def folded(model: nn.Module, *inputs: Any, caplog: pytest.LogCaptureFixture) -> nn.Module:
    """The folded copy, which computes what the model does, and left the model as it was."""
    inputs = inputs or (torch.randn(2, 6, 7, 5, dtype=torch.float64),)
    with torch.no_grad():
        wanted = model(*inputs)
    state = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    caplog.set_level(logging.INFO, "fusereg")
    caplog.clear()
    copied = fusereg.fold_into_conv(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        found = copied(*inputs)
    wanted, found = (t if isinstance(t, (tuple, list)) else (t,) for t in (wanted, found))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, float(b.abs().max())), rtol=0.0)
    stays = [r.message for r in caplog.records if " stays: " in r.message]
    said = sum("folded into" in r.message for r in caplog.records)
    assert len(stays) == norms(copied)
    assert said == norms(model) - norms(copied)
    return copied


# --- what is folded -------------------------------------------------------------------------------


class Residual(nn.Module):
    """A residual block whose structure only its forward tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn2 = BatchNorm2d(6, activation="relu")
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.bn3 = BatchNorm2d(6, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))), x)
        return self.bn3(self.conv3(y), residual=x)


class Untraceable(nn.Module):
    """Calls its part, after a decision that depends on the data."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        if inputs[0].sum() > 1e9:
            return None
        return self.part(*inputs)


class UntraceableLoop(nn.Module):
    """Calls the elements of lists, in the ways in which one writes that."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(sequence() for _ in range(3))
        self.more = nn.ModuleList(sequence() for _ in range(2))
        self.last = nn.ModuleDict({"a": sequence(), "b": sequence()})

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
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
        if x.sum() > 1e9:
            return x
        for name, part in self.items():
            x = part(x) + len(name)
        for part in self.values():
            x = part(x)
        return x


class UntraceableList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for part in self:
            x = part(x)
        for i, part in enumerate(self):
            x = part(x) * i
        return x


def sequence(norm: Any = nn.BatchNorm2d, conv: Any = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1) if conv is None else conv, norm(6, **options), nn.ReLU()
    )


FOLDED: dict[str, tuple[Make, int]] = {
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
        lambda: nn.Sequential(nn.Sequential(nn.ReLU(), CONV()), nn.BatchNorm2d(6), sequence()),
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
    "in a list that is called": (lambda: UntraceableList([sequence(), sequence()]), 0),
    "items of a dict that is called": (
        lambda: UntraceableDict({"a": CONV(), "b": nn.BatchNorm2d(6), "c": sequence()}),
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
    for convert in (False, True):
        copied: Any = folded(
            randomized(fusereg.convert(model) if convert else model), caplog=caplog
        )
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
CONV = lambda: nn.Conv2d(6, 6, 3, padding=1)  # noqa: E731
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
        lambda: sequence(conv=parametrizations.weight_norm(CONV())), "ParametrizedConv2d, is a sub"
    ),
    "old weight norm": (lambda: sequence(conv=nn.utils.weight_norm(CONV())), "it has hooks"),
    "spectral norm": (lambda: sequence(conv=nn.utils.spectral_norm(CONV())), "it has hooks"),
    "pruned": (lambda: sequence(conv=prune.identity(CONV(), "weight")), "it has hooks"),
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


# --- what stays: something else reads the pair ----------------------------------------------------


class Pair(nn.Module):
    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = CONV() if conv is None else conv
        self.bn = nn.BatchNorm2d(6) if norm is None else norm

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.bn(self.conv(x)))


class ReturnsBoth(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y, self.bn(y)


class Adds(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class CallsTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv(x * 2)


class NormalizesTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn(x)


class ReadsWeight(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class ReadsBias(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv.bias.sum()


class ReadsScale(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.bn.weight.abs().sum()


class ReadsStatistics(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.bn.running_var.sum()


class Between(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x) * 2)


class OtherOrder(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.conv(self.bn(x))


class Method(Pair):
    """Also calls its convolution in another method, which its parent calls."""

    def raw(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CallsMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Method()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.raw(x)


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * self.part.conv.weight.sum()


class Masked(Pair):
    def __init__(self) -> None:
        super().__init__(norm=BatchNorm2d(6))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x), mask=x[:, 0] > -9.0)


class ReadsSetting(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn.eps


class AsksForBias(Pair):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(6, 6, 1, bias=False))

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) if self.conv.bias is None else self.bn(x)


class CallsItsOwn(Pair):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + self.conv(x)


class Replaces(nn.Module):
    """Reads attributes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Pair()
        self.other = Pair()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.conv if name == "other" else found

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.other(x)


READ: dict[str, tuple[Make, str]] = {
    "a setting": (ReadsSetting, "reads its eps"),
    "whether there is a bias": (AsksForBias, "reads its bias"),
    "its own way of calling": (CallsItsOwn, "it has its own way of being called"),
    "both returned": (ReturnsBoth, "is used elsewhere"),
    "added": (Adds, "is used elsewhere"),
    "convolution twice": (CallsTwice, "it is called 2 times"),
    "batch norm twice": (NormalizesTwice, "it is called 2 times"),
    "weight": (ReadsWeight, "reads its "),
    "bias": (ReadsBias, "reads its "),
    "scale": (ReadsScale, "reads its "),
    "statistics": (ReadsStatistics, "reads its "),
    "something between": (Between, "no convolution or linear layer is seen before it"),
    "other order": (OtherOrder, "no convolution or linear layer is seen before it"),
    "a method": (CallsMethod, "may use it"),
    "a child's weight": (ReadsChild, "reads its "),
    "a mask": (Masked, "it is called with mask"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_what_something_else_reads_stays(
    name: str, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = READ[name]
    model = make()
    copied = folded(randomized(model if traced else Untraceable(model)), caplog=caplog)
    assert norms(copied) == 1
    assert reason in caplog.text


def test_nothing_is_folded_where_attributes_are_read_in_an_own_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert norms(folded(randomized(Replaces()), caplog=caplog)) == 2


class OptionalTensor(Pair):
    """Returns the convolution's result unless it gets a second argument."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.conv(x)
        return z if y is None else self.bn(z) + y


class OptionalKeyword(Pair):
    def forward(self, x: Tensor, *, y: Tensor | None = None) -> Any:
        z = self.conv(x)
        return self.bn(z) if y is None else z + y


class OptionalNeither(Pair):
    """Does the same with the pair in both cases, if at all."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        if y is None:
            return self.bn(self.conv(x))
        return x + y


class OptionalAdded(Pair):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.bn(self.conv(x))
        return z if y is None else z + y


class Flag(Pair):
    def forward(self, x: Tensor, raw: bool = False) -> Any:
        z = self.conv(x)
        return z if raw else self.bn(z)


class Word(Pair):
    def forward(self, x: Tensor, mode: str = "usual") -> Any:
        z = self.conv(x)
        return z if mode == "raw" else self.bn(z)


class Any_(Pair):
    def forward(self, x: Tensor, *more: Any, **options: Any) -> Any:
        z = self.conv(x)
        return z if more or options else self.bn(z)


class Needed(Pair):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return self.bn(self.conv(x)) * scale + shift


@pytest.mark.parametrize(
    ("cls", "left", "calls"),
    [
        (OptionalTensor, 1, [(), (1.0,)]),
        (OptionalKeyword, 1, [()]),
        (OptionalNeither, 0, [(), (1.0,)]),
        (OptionalAdded, 0, [(), (1.0,)]),
        (Flag, 1, [(), (True,)]),
        (Word, 1, [(), ("raw",)]),
        (Any_, 1, [(), (1.0,)]),
        (Needed, 0, [(2.0, 3.0)]),
    ],
)
def test_all_that_a_forward_may_get_is_considered(
    cls: Any, left: int, calls: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for more in calls:
        assert norms(folded(randomized(cls()), x, *more, caplog=caplog)) == left


def test_models_are_folded_in_several_threads_while_another_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = randomized(Residual())
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                running(x)
            except Exception as error:
                errors.append(error)

    def fold() -> None:
        try:
            for _ in range(5):
                assert norms(fusereg.fold_into_conv(running)) == 0
        except Exception as error:
            errors.append(error)

    runner = threading.Thread(target=run)
    threads = [threading.Thread(target=fold) for _ in range(4)]
    for thread in (runner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    runner.join()
    assert not errors


class Domains(nn.Module):
    """Parts for several domains, chosen by an argument: no trace of the whole."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.domains = nn.ModuleList(parts)

    def forward(self, x: Tensor, i: int) -> Any:
        return self.domains[i](x)


def with_shared_convolution(wrap: Any) -> nn.Module:
    conv = CONV()
    return wrap(Pair(conv), Pair(conv))


def with_shared_norm(wrap: Any) -> nn.Module:
    norm = nn.BatchNorm2d(6)
    return wrap(Pair(norm=norm), Pair(norm=norm))


def with_convolution_outside(wrap: Any) -> nn.Module:
    pair = Pair()
    return wrap(pair, nn.Sequential(pair.conv))


@pytest.mark.parametrize(
    ("share", "left"),
    [(with_shared_convolution, 2), (with_shared_norm, 1), (with_convolution_outside, 1)],
)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_what_two_parts_share_stays(
    share: Any, left: int, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(share(nn.Sequential if traced else Domains))
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for inputs in [(x,)] if traced else [(x, 0), (x, 1)]:
        assert norms(folded(model, *inputs, caplog=caplog)) == left
    assert "it is called 2 times" in caplog.text


# --- parents that cannot be traced and look inside ------------------------------------------------


class Inside(nn.Module):
    """Does not only call its part, after a decision that depends on the data."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.part = sequence() if part is None else part

    def forward(self, x: Tensor) -> Any:
        return None if x.sum() > 1e9 else self.look(x)


class Taps(Inside):
    """Collects the results of its part's layers, as perceptual losses and detectors do."""

    def look(self, x: Tensor) -> Any:
        found = []
        for layer in self.part:
            x = layer(x)
            found.append(x)
        return found


class Names(Inside):
    def look(self, x: Tensor) -> Any:
        return [self.part.get_submodule(name)(x) for name in ("0", "1")]


class Items(Inside):
    def look(self, x: Tensor) -> Any:
        return [layer(x) for _, layer in self.part._modules.items()]


class Index(Inside):
    def look(self, x: Tensor) -> Any:
        return self.part[0](x)


class Slice(Inside):
    def look(self, x: Tensor) -> Any:
        return self.part[:1](x)


class Local(Inside):
    def look(self, x: Tensor) -> Any:
        part = self.part
        return part[0](x)


class Weight(Inside):
    def look(self, x: Tensor) -> Any:
        return F.conv2d(x, self.part[0].weight)


class Getattr(Inside):
    def look(self, x: Tensor) -> Any:
        return getattr(self, "part")[0](x)  # noqa: B009


class Children(Inside):
    def look(self, x: Tensor) -> Any:
        return next(iter(self.children()))[0](x)


class Handed(Inside):
    def look(self, x: Tensor) -> Any:
        return first_of(self.part, x)


class HandedItself(Inside):
    def look(self, x: Tensor) -> Any:
        return first_of_part(self, x)


class Hidden(Inside):
    """Holds a part of its part where no child is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.part[0]]

    def look(self, x: Tensor) -> Any:
        return self.hidden[0](x)


class InAList(Inside):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList([sequence()]))

    def look(self, x: Tensor) -> Any:
        return [layer(x) for part in self.part for layer in part]


class Values(Inside):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"a": sequence()}))

    def look(self, x: Tensor) -> Any:
        return [part[0](x) for part in self.part.values()]


class Walrus(Inside):
    def look(self, x: Tensor) -> Any:
        return (p := self.part)(x) + p[0](x)


def first_of(part: Any, x: Tensor) -> Tensor:
    return part[0](x)


def first_of_part(module: Any, x: Tensor) -> Tensor:
    return module.part[0](x)


@pytest.mark.parametrize("cls", Inside.__subclasses__())
@pytest.mark.parametrize("outer", [False, True])
def test_inside_a_part_that_is_not_only_called_nothing_is_folded(
    cls: Any, outer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(nn.Sequential(cls()) if outer else cls())
    assert norms(folded(model, caplog=caplog)) == 1
    assert "cannot be traced" in caplog.text


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
