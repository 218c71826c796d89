"""What is cross-entropy's own; what every operation must do is in test_contract.py."""

from __future__ import annotations

import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from conftest import Backend
from fusereg.augment import MixedLabels
from fusereg.core.inventory import TOLERANCES

F = fusereg.functional
torch_loss = nn.functional.cross_entropy

SHAPES = [(4, 7), (3, 33), (2, 1500), (5,), (3, 5, 4), (2, 21, 5, 9)]


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 3) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def indices(x: Tensor) -> Tensor:
    classes, *rest = x.shape if x.dim() == 1 else (x.shape[1], x.shape[0], *x.shape[2:])
    target = torch.arange(torch.Size(rest).numel()).mul(5).remainder(classes).view(rest)
    if target.numel() > 2:
        target.view(-1)[2] = -100
    return target


def with_gradient(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = kwargs.pop("function", F.cross_entropy)(leaf, *args, **kwargs)
    torch.manual_seed(3)
    incoming = torch.randn(loss.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, leaf, incoming.to(loss.device, loss.dtype))
    return loss.detach(), grad


def assert_close(came: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(came, wanted, strict=True):
        bound = tolerance * float(b.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.all_cases("host")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_option_gives_torch_s_result(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Backend
) -> None:
    x = logits(shape, dtype)
    if x.dim() > 2:
        x = x if dtype is torch.float64 else x.movedim(1, -1).contiguous().movedim(-1, 1)
    classes = shape[0] if len(shape) == 1 else shape[1]
    weight = torch.linspace(0.5, 2, classes).to(dtype)
    targets = (indices(x), torch.softmax(-logits(shape), 0).to(dtype))
    for target, w, e, reduction in itertools.product(
        targets, (None, weight), (0.0, 0.1, 1.0), ("mean", "sum", "none")
    ):
        options: dict[str, Any] = {"label_smoothing": e, "reduction": reduction}
        on_device = [None if t is None else t.to(backend.device) for t in (target, w)]
        came = with_gradient(x.to(backend.device), *on_device, **options)
        wide = [t if t is None or not t.is_floating_point() else t.double() for t in (target, w)]
        wanted = with_gradient(x.double(), *wide, **options, function=torch_loss)
        assert_close(came, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 7), (2, 1500), (2, 21, 5, 9)])
def test_mixed_labels_are_two_losses(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Backend
) -> None:
    """With one share for all, the weighted mean of two calls, each with its own divisor."""
    x, share = logits(shape, dtype), 0.3
    a = indices(x)
    b = a.flip(0).add(1).remainder(shape[1])
    weight = torch.linspace(0.5, 2, shape[1]).to(dtype)
    labels = MixedLabels(*(t.to(backend.device) for t in (a, b, torch.full(shape[:1], share))))
    for e, reduction in itertools.product((0.0, 0.1), ("mean", "sum", "none")):
        options: dict[str, Any] = {"label_smoothing": e, "reduction": reduction}
        came = with_gradient(x.to(backend.device), labels, weight.to(backend.device), **options)
        first, second = (
            with_gradient(x.double(), t, weight.double(), **options, function=torch_loss)
            for t in (a, b)
        )
        part = torch.tensor(share).double()
        wanted = tuple(part * p + (1 - part) * q for p, q in zip(first, second, strict=True))
        assert_close(came, wanted, TOLERANCES[dtype])


def test_mixed_labels_without_weights_are_their_probabilities() -> None:
    x = logits((5, 9))
    labels = MixedLabels(torch.arange(5), torch.arange(5).flip(0), torch.linspace(0, 1, 5))
    came = with_gradient(x, labels, label_smoothing=0.2)
    wanted = with_gradient(x, labels.soft(9).double(), label_smoothing=0.2, function=torch_loss)
    assert_close(came, wanted, 1e-7)
    layer = fusereg.nn.CrossEntropyLoss(label_smoothing=0.2)
    assert torch.equal(layer(x, labels), came[0])


def test_what_augment_mixes_goes_into_the_loss() -> None:
    augment = fusereg.augment.Augment(8, mix="mixup")
    _, labels = augment(torch.rand(6, 3, 8, 8), torch.arange(6))
    assert isinstance(labels, MixedLabels)
    x = logits((6, 10), torch.float32)
    wanted = labels.loss(nn.CrossEntropyLoss(reduction="none"), x)
    torch.testing.assert_close(F.cross_entropy(x, labels), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("shape", [(3, 40), (3, 40, 2)])
def test_what_is_not_finite_is_as_torch_has_it(
    shape: tuple[int, ...], value: float, smoothing: float, backend: Backend
) -> None:
    x = logits(shape, torch.float32)
    x[0, 3] = value
    x[1, 1:] = value
    x[2] = value
    target = torch.zeros((3, *shape[2:]), dtype=torch.int64)
    for t in (target, torch.softmax(logits(shape, torch.float32), 1)):
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
        loss = F.cross_entropy(x.to(backend.device), t.to(backend.device), **options).cpu()
        torch.testing.assert_close(loss, torch_loss(x, t, **options), equal_nan=True)
    came = with_gradient(x.to(backend.device), target.to(backend.device), reduction="none")[1]
    wanted = with_gradient(x, target, reduction="none", function=torch_loss)[1]
    torch.testing.assert_close(came.cpu(), wanted, equal_nan=True)


def test_a_masked_class_has_no_gradient(backend: Backend) -> None:
    x = logits((4, 1000), torch.float32)
    x[:, 500:] = float("-inf")
    grad = with_gradient(x.to(backend.device), torch.arange(4).to(backend.device))[1]
    assert (grad[:, 500:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_only_ignored_rows_are_as_torch_has_them(
    reduction: str, backend: Backend
) -> None:
    for rows, e in itertools.product((0, 3), (0.0, 0.1)):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": e}
        x, target = logits((rows, 5), torch.float32), torch.full((rows,), -100)
        came = with_gradient(x.to(backend.device), target.to(backend.device), **options)
        wanted = with_gradient(x, target, function=torch_loss, **options)
        for a, b in zip(came, wanted, strict=True):
            torch.testing.assert_close(a.cpu(), b, equal_nan=True)


def test_ignored_rows_are_not_read() -> None:
    x = logits((3, 5), torch.float32)
    x[1] = float("nan")
    loss, grad = with_gradient(x, torch.tensor([1, 4, 2]), ignore_index=4)
    assert loss.isfinite()
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 40.0, 3e4])
def test_large_logits_lose_nothing(scale: float, backend: Backend) -> None:
    x = logits((3, 5000), torch.float32, scale)
    target = torch.tensor([1, 2, 3])
    came = with_gradient(x.to(backend.device), target.to(backend.device), label_smoothing=0.1)
    wanted = with_gradient(x.double(), target, label_smoothing=0.1, function=torch_loss)
    assert_close(came, wanted, 1e-6)


def test_nothing_of_the_logits_size_is_kept_but_the_logits() -> None:
    x = logits((64, 1000), torch.float32).requires_grad_()
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() != x.data_ptr():
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for target in (indices(x), MixedLabels(indices(x), indices(x), torch.rand(64))):
            F.cross_entropy(x, target, torch.ones(1000), label_smoothing=0.1)
    assert sizes
    assert max(sizes) <= 1000


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("kind", "kept"), [("indices", 8), ("mixed", 8), ("probabilities", 16)])
def test_bytes_of_a_row_that_are_kept(kind: str, kept: int, layout: torch.memory_format) -> None:
    """And no copy of logits or probabilities in either layout."""
    x = logits((8, 21, 6, 7), torch.bfloat16).to(memory_format=layout).requires_grad_()
    weight, rows = torch.ones(21), 8 * 6 * 7
    target = torch.zeros(8, 6, 7, dtype=torch.int64)
    targets: dict[str, Any] = {
        "indices": target,
        "mixed": MixedLabels(target, target.flip(0), torch.rand(8)),
        "probabilities": x.detach().softmax(1).to(memory_format=layout),
    }
    given = {t.data_ptr() for t in (x, weight, targets["probabilities"], target)}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.data_ptr() not in given:
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(x, targets[kind], weight, label_smoothing=0.1)
    shares = 4 * 8 if kind == "mixed" else 0
    assert kept * rows <= sum(sizes) <= kept * rows + shares + 32


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["indices", "mixed", "probabilities"])
def test_memory_of_the_logits_size_is_taken_once_or_not_at_all(kind: str, inplace: bool) -> None:
    x = logits((256, 1000), torch.float32).requires_grad_()
    target = torch.arange(256)
    targets: dict[str, Any] = {
        "indices": target,
        "mixed": MixedLabels(target, target.flip(0), torch.rand(256)),
        "probabilities": x.detach().softmax(1),
    }
    y = x * 1
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = F.cross_entropy(y, targets[kind], label_smoothing=0.1, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(loss, y)
    taken = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    assert sum(size >= x.nbytes // 2 for size in taken) == (not inplace)
    assert (grad.data_ptr() == y.data_ptr()) == inplace


# --- gradients over the logits --------------------------------------------------------------------


def test_the_gradient_takes_the_place_of_the_logits_only_on_request() -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    target = torch.tensor([0, 3, 5])
    rows = torch.randn(3, 4)
    found = []
    for inplace in (False, True):
        x = rows @ weight.T
        before = x.detach().clone()
        loss = F.cross_entropy(x, target, label_smoothing=0.1, inplace_backward=inplace)
        assert torch.equal(x, before)
        found.append(torch.autograd.grad(loss, weight)[0])
        assert torch.equal(x, before) != inplace
    assert torch.equal(*found)
    leaf = before.requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(leaf, target, label_smoothing=0.1), leaf)
    assert torch.equal(x, wanted)


def test_who_needs_the_overwritten_logits_is_told() -> None:
    base = torch.randn(3, 6, requires_grad=True)
    x = base * 1
    other = x.square().sum()  # keeps x
    F.cross_entropy(x, torch.tensor([0, 3, 5]), inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    loss = F.cross_entropy(base * 1, torch.tensor([0, 3, 5]), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_cannot_be_overwritten_are_refused() -> None:
    leaf = torch.randn(3, 6, requires_grad=True)
    target = torch.tensor([0, 3, 5])
    with pytest.raises(ValueError, match="leaf"):
        F.cross_entropy(leaf, target, inplace_backward=True)
    for view in (leaf.view(3, 6), leaf[:], leaf.T.T, leaf[None][0]):
        for kind in (target, leaf.detach().softmax(1), MixedLabels(target, target, torch.ones(3))):
            with pytest.raises(ValueError, match="view of a leaf"):
                F.cross_entropy(view, kind, inplace_backward=True)
    with pytest.raises(ValueError, match="contiguous"):
        F.cross_entropy((leaf * 1)[:, ::2], target.clamp(max=2), inplace_backward=True)
    with torch.no_grad():
        F.cross_entropy(leaf, target, inplace_backward=True)


# --- what torch's function takes ------------------------------------------------------------------


def test_probabilities_that_require_a_gradient_get_torch_s() -> None:
    for needs in ("target", "weight"):
        x, target, weight = logits((3, 5)), torch.softmax(logits((3, 5)), 1), torch.rand(5).double()
        grads = []
        for function in (F.cross_entropy, torch_loss):
            leaves = [t.clone() for t in (x, target, weight)]
            leaves[0].requires_grad_()
            leaves[1 if needs == "target" else 2].requires_grad_()
            loss = function(*leaves, label_smoothing=0.1)
            grads.append(torch.autograd.grad(loss, [t for t in leaves if t.requires_grad]))
        torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError, match="weight has no derivative"):
        F.cross_entropy(x, torch.tensor([0, 1, 2]), weight.requires_grad_())


def test_a_derivative_of_a_target_that_torch_func_hides_is_torch_s() -> None:
    x, target = logits((3, 5)), torch.softmax(logits((3, 5)), 1)
    results = []
    for loss in (F.cross_entropy, torch_loss):
        of_target = partial(loss, x)
        tangent = torch.func.jvp(of_target, (target,), (target,))[1]
        results.append((torch.func.grad(of_target)(target), tangent))
    torch.testing.assert_close(*results)


def test_dtypes_of_the_loss_are_torch_s() -> None:
    x = logits((3, 5), torch.bfloat16)
    soft = torch.softmax(logits((3, 5), torch.float32), 1)
    for a, t in (
        (x, soft),
        (x, soft.bfloat16()),
        (x, soft.double()),
        (x.float(), soft.double()),
        (x.double(), soft),
    ):
        came, wanted = F.cross_entropy(a, t), torch_loss(a, t)
        assert came.dtype is wanted.dtype
        torch.testing.assert_close(
            came.double(), torch_loss(a.double(), t.double()), rtol=0.01, atol=0
        )
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(leaf, torch.tensor([0, 1, 2]))
        assert loss.dtype is torch_loss(x, torch.tensor([0, 1, 2])).dtype is torch.float32
        loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype is torch.bfloat16


def test_legacy_arguments_are_read_and_warned_of_as_torch_does() -> None:
    x, target = logits((3, 5)), torch.tensor([0, 1, 2])
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is None and reduce is None:
            continue
        results = []
        for function in (F.cross_entropy, torch_loss):
            with pytest.warns(UserWarning, match="size_average and reduce args"):
                results.append(function(x, target, size_average=size_average, reduce=reduce))
        torch.testing.assert_close(*results)


def test_the_layer_is_torch_s() -> None:
    weight = torch.rand(5)
    layers = [
        kind(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
        for kind in (fusereg.nn.CrossEntropyLoss, nn.CrossEntropyLoss)
    ]
    x, target = logits((3, 5), torch.float32), torch.tensor([0, 1, 2])
    torch.testing.assert_close(*(layer(x, target) for layer in layers))
    assert repr(layers[0]) == repr(layers[1])
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    assert isinstance(layers[0], nn.CrossEntropyLoss)
    again = pickle.loads(pickle.dumps(layers[0]))
    assert torch.equal(again(x, target), layers[0](x, target))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [-0.1, 2, float("nan")])
def test_a_smoothing_out_of_range_is_told_at_construction(smoothing: float) -> None:
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        fusereg.nn.CrossEntropyLoss(label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": torch.tensor([0, 1])}, ValueError, "target must have class indices of shape"),
        ({"target": torch.tensor([0, 5, 1])}, IndexError, r"within \[0, 5\) .*got 5"),
        ({"target": torch.tensor([0, -1, 1])}, IndexError, "got -1"),
        ({"target": torch.zeros(3)}, RuntimeError, "class indices of dtype"),
        ({"target": torch.zeros(3, 5).long()}, RuntimeError, "floating point type for target"),
        ({"target": [0, 1, 2]}, TypeError, "target must be a torch.Tensor"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight tensor should be defined"),
        ({"weight": torch.ones(5).long()}, RuntimeError, "weight must be floating-point"),
        ({"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between"),
        ({"label_smoothing": float("nan")}, RuntimeError, "label_smoothing must be between"),
        (
            {"target": torch.rand(3, 5), "ignore_index": 2},
            RuntimeError,
            "ignore_index is not supported for floating point target",
        ),
        (
            {"target": MixedLabels(torch.arange(3), torch.arange(3), torch.ones(2))},
            ValueError,
            "target.weight must have a share for each sample",
        ),
        (
            {"target": MixedLabels(torch.arange(2), torch.arange(3), torch.ones(3))},
            ValueError,
            "target.a must have class indices",
        ),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {"input": torch.randn(3, 5), "target": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=rf"^fusereg\.cross_entropy: .*{words}"):
        F.cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (3, 1500)])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_index_out_of_range_is_an_error_on_the_cpu_and_nan_on_cuda(
    shape: tuple[int, ...], mixed: bool, backend: Backend
) -> None:
    x = logits(shape, torch.float32).to(backend.device)
    good = torch.zeros((3, *shape[2:]), dtype=torch.int64, device=backend.device)
    for index in (-1, shape[1], 2**40):
        bad = good.clone()
        bad.view(3, -1)[1, 0] = index
        target = MixedLabels(good, bad, torch.full((3,), 0.5, device=x.device)) if mixed else bad
        if backend.isa is not None:
            with pytest.raises(IndexError, match=f"got {index}"):
                F.cross_entropy(x, target)
            continue
        loss, grad = with_gradient(x, target, reduction="none")
        at = loss.view(3, -1).isnan().nonzero().tolist()
        assert at == [[1, 0]]
        rows = grad.movedim(1, -1).reshape(3, -1, shape[1]).isnan()
        assert bool(rows[1, 0].all())
        assert int(rows.any(-1).sum()) == 1
        assert bool(with_gradient(x, target)[0].isnan())


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 3, 0), (0, 3, 2), (2, 0, 3), (2, 3, 2, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_empty_logits_give_what_torch_gives(
    shape: tuple[int, ...], reduction: str, weighted: bool
) -> None:
    x = torch.randn(shape)
    weight = torch.rand(shape[1]) if weighted else None
    targets = [torch.rand(shape)]
    if shape[1]:
        targets.append(torch.zeros(shape[:1] + shape[2:], dtype=torch.int64))
    for target in targets:
        want = torch.nn.functional.cross_entropy(x, target, weight, reduction=reduction)
        got = fusereg.functional.cross_entropy(x, target, weight, reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)
