"""Compaction of models as users have them: memory formats, hooks, ties, wrappers, odd layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional as F

import fusereg
from fusereg.compact.parts import shortened

pytest.importorskip("torch_pruning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def kill(model: nn.Module, x: Any) -> dict[str, int]:
    """Make each other channel of each set zero; return how many sets of which size there are."""
    groups = fusereg.groups_of(model, x)
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                slices = ((member.channels >= 0) & (member.channels % 2 == 1)).nonzero().flatten()
                member.parameter.index_fill_(member.dim, slices, 0)
    return {g.name: g.size for g in groups}


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


# --- memory formats -------------------------------------------------------------------------------

FORMATS = {
    "contiguous": (torch.contiguous_format, 4),
    "channels_last": (torch.channels_last, 4),
    "contiguous 5-D": (torch.contiguous_format, 5),
    "channels_last_3d": (torch.channels_last_3d, 5),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_cut_has_the_strides_of_its_memory_format(name: str) -> None:
    layout, dims = FORMATS[name]
    for shape in product((1, 2, 3), repeat=dims):
        whole = torch.empty(shape, memory_format=layout).copy_(torch.randn(shape))
        for dim in (0, 1):
            for left in range(1, shape[dim] + 1):
                got = shortened(whole, {dim: torch.arange(left)})
                assert torch.equal(got, whole.narrow(dim, 0, left))
                assert got.stride() == torch.empty(got.shape, memory_format=layout).stride()


def _last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)


def _last_3d(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def _columns_first(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    return net


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv": (
        lambda: _last(
            nn.Sequential(
                *(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(conv(8, 8, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()),
                *(conv(6, 6, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2, 2)),
                *(nn.ReLU(), conv(8, 4)),
            )
        ),
        lambda: torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last),
    ),
    "conv3d": (
        lambda: _last_3d(
            nn.Sequential(
                *(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1)),
            )
        ),
        lambda: torch.randn(2, 2, 5, 5, 5).to(memory_format=torch.channels_last_3d),
    ),
    "linear": (lambda: _columns_first(mlp()), lambda: torch.randn(4, 6)),
    "embedding": (
        lambda: _columns_first(
            nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        ),
        lambda: torch.randint(9, (2, 5)),
    ),
}


def order(tensor: Tensor) -> list[int]:
    """The dimensions of more than one slice, by their strides."""
    wide = [d for d in range(tensor.dim()) if tensor.shape[d] > 1]
    return sorted(wide, key=tensor.stride, reverse=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_states_and_outputs_keep_their_memory_format(name: str) -> None:
    make, draw = LAYOUTS[name]
    net, x = make().eval(), draw()
    assert kill(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    wanted = net(x)
    small = fusereg.compact(net, x, optimizer=optimizer)
    shorter = 0
    before = dict(net.named_parameters())
    for key, p in small.named_parameters():
        shorter += p.numel() < before[key].numel()
        assert p.is_contiguous() or order(p) == order(before[key])
        if p.dim() > 1:
            assert order(p) == [d for d in order(before[key]) if p.shape[d] > 1]
            assert order(optimizer.state[p]["momentum_buffer"]) == order(p)
    assert shorter
    got = small(x)
    torch.testing.assert_close(got, wanted)
    assert got.stride() == wanted.stride()
    if name.startswith("conv"):  # inside too
        for a, b in zip(small, net, strict=True):  # type: ignore[call-overload]
            if isinstance(a, nn.Conv2d):
                assert a.weight.is_contiguous(memory_format=torch.channels_last)
            assert type(a) is type(b)


# --- arguments that forward writes to -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_a_forward_that_writes_to_its_arguments_leaves_the_example_inputs(
    dtype: torch.dtype,
) -> None:
    if dtype is torch.int64:
        net: nn.Module = Net(
            lambda m, i: m.b(torch.relu(m.a(m.e(i.add_(1).remainder_(9))))),
            e=nn.Embedding(9, 6),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
        )
        x = torch.randint(9, (2, 5))
    else:
        net = nn.Sequential(nn.ReLU(inplace=True), mlp()).to(dtype)
        x = torch.randn(4, 6, dtype=dtype)
    before = x.clone()
    assert kill(net, x)
    small = fusereg.compact(net, x)
    assert torch.equal(x, before)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(small(x.clone()), net(x.clone()))


# --- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_the_state_of_a_weight_with_two_names_is_cut(first: bool) -> None:
    """A layer that is not called holds the weight too, under a name before or after."""
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3)}
    other = {"z": nn.Linear(6, 8)}
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), **(other | layers if first else layers | other))
    other["z"].weight = layers["a"].weight
    x = torch.randn(4, 6)
    assert kill(net, x) == {"a": 8}
    optimizer = fusereg.optim.Adam(net.parameters(), lr=0.1)
    net(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        layers["a"].weight[1::2] = 0
        layers["a"].bias[1::2] = 0
    small = fusereg.compact(net, x, optimizer=optimizer)
    assert small.a.weight is small.z.weight
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    for p in small.parameters():
        assert all(s.shape == p.shape for k, s in optimizer.state[p].items() if k != "step")
    small(x).sum().backward()
    optimizer.step()


def test_a_new_bias_beside_a_tied_weight_has_the_weights_type() -> None:
    net = Net(
        lambda m, i: m.h(torch.sigmoid(m.g(torch.relu(m.f(m.e(i)))))),
        e=nn.Embedding(20, 8), f=nn.Linear(8, 12), g=nn.Linear(12, 8),
        h=nn.Linear(8, 20, bias=False),
    )  # fmt: skip
    net.h.weight = net.e.weight
    net.k = nn.Linear(8, 5, bias=False)
    net.l = nn.Linear(8, 5, bias=False)
    net.l.weight = net.k.weight  # the name that is read is not the first one
    net._run = lambda m, i: m.l(torch.sigmoid(m.g(torch.relu(m.f(m.e(i))))))
    i = torch.randint(20, (2, 5))
    with torch.no_grad():
        net.g.weight[::2] = 0
        net.g.bias[::2] = 0
    small = fusereg.compact(net, i)
    assert small.l.bias.dtype == small.l.weight.dtype == torch.float32
    assert small.l.weight is small.k.weight
    assert small.l.in_features == 4
    torch.testing.assert_close(small(i), net(i))


# --- odd layers: what goes, and what stays --------------------------------------------------------


def _hooked(hook: Callable[[Any, Tensor], Any]) -> nn.Module:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
    net[0].register_forward_hook(lambda module, args, out: hook(module, out))
    return net


def _buffered(forward: Callable[[Any, Tensor], Tensor], buffer: Tensor) -> nn.Module:
    net = Net(forward, a=conv(3, 8), b=conv(8, 4))
    net.register_buffer("k", buffer)
    return net


def _frozen() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)).requires_grad_(
        False
    )


def _attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.e(x)
        y = y + m.m(y, y, y, need_weights=False)[0]
        return m.g(torch.relu(m.f(y)))

    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    layers = {"e": nn.Linear(6, 16), "m": attention, "f": nn.Linear(16, 32), "g": nn.Linear(32, 5)}
    return Net(forward, **layers)


class _Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class _Equalized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (2 / self.in_features) ** 0.5, self.bias)


class _Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1), self.bias)


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _rows() -> Tensor:
    return torch.randn(4, 6)


def _series() -> Tensor:
    return torch.randn(2, 5, 6)


_TWO = {"a": lambda: nn.Linear(6, 8), "b": lambda: nn.Linear(8, 3)}


def _two(forward: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **{k: make() for k, make in _TWO.items()})


def _recurrent(layer: Callable[[], nn.Module], forward: Callable[[Any, Tensor], Any]) -> Any:
    return lambda: Net(
        forward, a=nn.Linear(6, 8), l=layer(), b=nn.Linear(10, 12), c=nn.Linear(12, 3)
    )


Shape = dict[str, int]
ODD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Shape]] = {
    "a hook that looks": (lambda: _hooked(lambda m, y: None), _image, {"0": 8}),
    "a hook that scales": (
        lambda: _hooked(lambda m, y: y * torch.arange(1.0, 9.0).view(8, 1, 1).to(y)),
        *(_image, {}),
    ),
    "a hook that counts": (lambda: _hooked(lambda m, y: y * m.out_channels), _image, {}),
    "a buffer for each channel": (
        lambda: _buffered(lambda m, x: m.b(torch.relu(m.a(x)) * m.k), torch.rand(8, 1, 1)),
        *(_image, {}),
    ),
    "a buffer of their number": (
        lambda: _buffered(
            lambda m, x: m.b(torch.relu(m.a(x)) * (m.k == m.a.out_channels)), torch.tensor(8)
        ),
        *(_image, {}),
    ),
    "a branch by their number": (
        lambda: _buffered(
            lambda m, x: m.b(y := torch.relu(m.a(x))) * (2.0 if y.shape[1] > 6 else 1.0),
            torch.tensor(8),
        ),
        *(_image, {}),
    ),
    "weight_norm": (
        lambda: nn.Sequential(
            *(torch.nn.utils.parametrizations.weight_norm(conv(3, 8)), nn.ReLU()),
            *(conv(8, 6), nn.ReLU(), conv(6, 4)),
        ),
        *(_image, {"2": 6}),
    ),
    "frozen": (_frozen, _image, {"0": 8, "2": 6}),
    "a layer that is called twice": (
        lambda: Net(
            lambda m, x: m.c(torch.relu(m.b(torch.relu(m.b(torch.relu(m.a(x))))))),
            a=conv(3, 8),
            b=conv(8, 8),
            c=conv(8, 4),
        ),
        *(_image, {"a": 8}),
    ),
    "a norm that is called twice": (
        lambda: Net(
            lambda m, x: m.c(torch.relu(m.n(m.b(torch.relu(m.n(m.a(x))))))),
            a=conv(3, 8),
            b=conv(8, 8),
            c=conv(8, 4),
            n=nn.BatchNorm2d(8),
        ),
        *(_image, {"a": 8}),
    ),
    "a head of two branches": (
        lambda: Net(
            lambda m, x: (m.c(torch.relu(m.a(x))), m.c(torch.relu(m.b(x)))),
            a=conv(3, 8),
            b=conv(3, 8),
            c=conv(8, 4),
        ),
        *(_image, {"a": 8}),
    ),
    "MultiheadAttention": (_attention, _series, {"f": 32}),
    "TransformerEncoderLayer": (
        lambda: nn.Sequential(
            nn.Linear(6, 16),
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            nn.Linear(16, 3),
        ),
        *(_series, {"1.linear1": 32}),
    ),
    "ConvTranspose": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.ReLU(), conv(4, 2)),
        ),
        *(_image, {"0": 8, "2": 3, "5": 2}),
    ),
    "PixelShuffle": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.ReLU(), conv(8, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2))
        ),
        *(_image, {"0": 8}),
    ),
    "PixelUnshuffle": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.PixelUnshuffle(2), conv(32, 2)),
        *(_image, {}),
    ),
    "GroupNorm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 4)),
        *(_image, {"0": 4}),
    ),
    "InstanceNorm": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()),
            *(conv(8, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv(6, 4)),
        ),
        *(_image, {"0": 8, "3": 6}),
    ),
    "LSTM": (
        _recurrent(
            lambda: nn.LSTM(8, 10, batch_first=True),
            lambda m, x: m.c(torch.relu(m.b(m.l(torch.relu(m.a(x)))[0]))),
        ),
        *(_series, {"b": 12}),
    ),
    "GRUCell": (
        _recurrent(
            lambda: nn.GRUCell(8, 10), lambda m, x: m.c(torch.relu(m.b(m.l(torch.relu(m.a(x))))))
        ),
        *(_rows, {"b": 12}),
    ),
    "EmbeddingBag": (
        lambda: Net(
            lambda m, i: m.b(torch.relu(m.a(m.e(i)))),
            e=nn.EmbeddingBag(20, 8),
            a=nn.Linear(8, 12),
            b=nn.Linear(12, 3),
        ),
        *(lambda: torch.randint(20, (4, 6)), {"a": 12}),
    ),
    "Bilinear": (
        lambda: Net(
            lambda m, x: m.c(torch.relu(m.b(y := torch.relu(m.a(x)), y))),
            a=nn.Linear(6, 8),
            b=nn.Bilinear(8, 8, 10),
            c=nn.Linear(10, 3),
        ),
        *(_rows, {}),
    ),
    "weights as a result": (
        _two(lambda m, x: (m.b(torch.relu(m.a(x))), m.b.weight.square().sum())),
        *(_rows, {}),
    ),
    "weights outside of layers": (
        _two(lambda m, x: F.linear(torch.relu(m.a(x)), m.b.weight, m.b.bias)),
        *(_rows, {}),
    ),
    "standardized weights": (
        lambda: nn.Sequential(
            *(_Standardized(3, 8, 3), nn.ReLU(), _Standardized(8, 6, 3), nn.ReLU(), conv(6, 4))
        ),
        *(_image, {}),
    ),
    "equalized weights": (
        lambda: nn.Sequential(
            _Equalized(6, 8), nn.ReLU(), _Equalized(8, 7), nn.ReLU(), _Equalized(7, 3)
        ),
        *(_rows, {}),
    ),
    "normalized weights": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), _Cosine(8, 5, bias=False)),
        *(_rows, {}),
    ),
    "softmax over channels": (_two(lambda m, x: m.b(m.a(x).softmax(-1))), _rows, {}),
    "sorted channels": (_two(lambda m, x: m.b(torch.relu(m.a(x)).sort(-1).values)), _rows, {}),
    "sums along channels": (_two(lambda m, x: m.b(torch.relu(m.a(x)).cumsum(-1))), _rows, {}),
    "mean over channels": (
        _two(lambda m, x: m.b(y := torch.relu(m.a(x))) + y.mean(-1, keepdim=True)),
        *(_rows, {}),
    ),
    "turned channels": (_two(lambda m, x: m.b(torch.relu(m.a(x)).flip(-1))), _rows, {}),
    "LocalResponseNorm": (
        lambda: nn.Sequential(
            *(conv(3, 8), nn.LPPool2d(2, 2), conv(8, 6), nn.LocalResponseNorm(3), conv(6, 4))
        ),
        *(_image, {"0": 8}),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ODD)
def test_odd_layers_go_or_stay_with_a_reason_and_the_outputs_are_equal(
    name: str, dtype: torch.dtype
) -> None:
    make, draw, sizes = ODD[name]
    net, x = make().to(dtype).eval(), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    assert kill(net, x) == sizes
    state = copy.deepcopy(net.state_dict())
    groups = fusereg.groups_of(net, x)
    inside = {m.name.rpartition(".")[0] for g in groups for m in g.members}
    for layer, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and layer not in inside:
            assert groups.kept[layer]
    small = fusereg.compact(net, x)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])
    for key, size in sizes.items():
        assert len(small.get_submodule(key).weight) < len(net.get_submodule(key).weight), size
    assert all(p.dtype == dtype for p in small.parameters())
    wide = x.double() if x.is_floating_point() else x
    results = [copy.deepcopy(m).double()(wide) for m in (small, net)]
    for got, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_hooks_of_modules_go_along_and_those_of_parameters_do_not() -> None:
    net, x = mlp(), torch.randn(4, 6)
    kill(net, x)
    net[2].register_forward_hook(lambda module, args, out: 3 * out)
    net[2].weight.register_hook(lambda grad: 2 * grad)
    small = fusereg.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    for model in (net, small, copy.deepcopy(net)):
        model(x).sum().backward()
    twice = net[2].weight.grad
    assert twice is not None
    torch.testing.assert_close(small[2].weight.grad, twice[:, ::2] / 2)


# --- wrappers and kinds of model ------------------------------------------------------------------


def test_a_compiled_model_stays_compiled_and_runs_the_smaller_one() -> None:
    net = torch.compile(mlp(), backend="eager")
    x = torch.randn(4, 6)
    assert kill(net, x) == {"_orig_mod.0": 8}
    small = fusereg.compact(net, x)
    assert type(small) is type(net)
    assert small._orig_mod[0].out_features == 4
    torch.testing.assert_close(small(x), net(x))
    with torch.no_grad():
        small._orig_mod[2].bias += 1
    torch.testing.assert_close(small(x), net(x) + 1)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "ranks"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_in_ddp_is_refused(one_rank: None, inside: bool) -> None:
    net: nn.Module = nn.parallel.DistributedDataParallel(mlp())
    if inside:
        net = nn.Sequential(net, nn.Linear(3, 2))
    for call in (fusereg.groups_of, fusereg.compact):
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.*module inside"):
            call(net, torch.randn(4, 6))


def test_sharded_parameters_are_refused(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (1,))
    net = distribute_module(mlp(), mesh)
    with pytest.raises(ValueError, match=r"0\.weight is a DTensor; shard the smaller model"):
        fusereg.compact(net, torch.randn(4, 6))


@pytest.mark.parametrize("whole", [False, True])
def test_scripts_are_refused(whole: bool) -> None:
    net: nn.Module = torch.jit.script(mlp())
    if not whole:
        net = nn.Sequential(net, nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=f"{'the model' if whole else '0'} is a script"):
        fusereg.compact(net, torch.randn(4, 6))


def test_parameters_without_values_are_refused() -> None:
    net = mlp()
    net[2].to(device="meta")
    with pytest.raises(ValueError, match=r"2\.weight is on the meta device"):
        fusereg.groups_of(net, torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", ["prune", "weight_norm"])
def test_weights_with_a_graph_are_refused_until_they_are_parameters(kind: str) -> None:
    net = mlp()
    if kind == "prune":
        nn.utils.prune.ln_structured(net[0], "weight", 4, 2, 0)
    else:
        nn.utils.weight_norm(net[0])
    x = torch.randn(4, 6)
    with pytest.raises(
        ValueError, match=r"call torch\.nn\.utils\.prune\.remove or remove_weight_norm"
    ):
        fusereg.compact(net, x)
    if kind == "prune":
        nn.utils.prune.remove(net[0], "weight")
        with torch.no_grad():
            net[0].bias[(net[0].weight == 0).all(1)] = 0
    else:
        nn.utils.remove_weight_norm(net[0])
        kill(net, x)
    small = fusereg.compact(net, x)
    assert small[0].out_features == 4
    torch.testing.assert_close(small(x), net(x))


def test_inputs_that_the_model_cannot_take_are_refused() -> None:
    for x in (torch.randint(5, (4, 6)), torch.randn(4, 6, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="cannot be traced with these example_inputs"):
            fusereg.compact(mlp(), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d, fusereg.nn.BatchNorm2d])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_norms_with_and_without_tensors_have_the_size_of_what_they_read(
    dims: int, kind: type[nn.Module], affine: bool, tracked: bool
) -> None:
    library = fusereg.nn if kind is fusereg.nn.BatchNorm2d else nn
    make = getattr(library, kind.__name__.replace("2", str(dims)))
    layer = getattr(nn, f"Conv{dims}d")
    norm = make(8, affine=affine, track_running_stats=tracked)
    net = nn.Sequential(layer(3, 8, 3), norm, nn.ReLU(), layer(8, 4, 3)).eval()
    x = torch.randn(2, 3, *(6,) * dims)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of another size
        kill(net, x)
        small = fusereg.compact(net, x)
        assert small[1].num_features == small[0].out_channels == 4
        torch.testing.assert_close(small(x), net(x))
        small.train()(x).sum().backward()
