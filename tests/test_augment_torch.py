"""Augmentation inside torch: gradients, operators, compilers, transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import augment_reference as reference
from augment_reference import FILL_MODES, INTERPOLATIONS
from conftest import Backend
from fusereg import augment as A
from test_augment import FORMATS, OUT, images, numbers, random_records, run, warps


@pytest.mark.sanitizer
@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize(
    ("interpolation", "antialias"),
    [("nearest", False), *((i, a) for i in INTERPOLATIONS[1:] for a in (False, True))],
)
def test_gradient_of_everything(
    interpolation: str, antialias: bool, fill_mode: str, backend: Backend
) -> None:
    """Against autograd through the oracle: erased, mixed, colored or not, in every layout."""
    n = 2 if backend.on_host else 5
    records = random_records(n)
    for dtype, c, first, color in (
        (torch.float64, 3, 0, True),
        (torch.float32, 3, 1, False),
        (torch.float32, 2, 0, True),
    ):
        x = images((n, c, 7, 17), dtype, backend).contiguous(memory_format=FORMATS[first])
        values = numbers(c, dtype)
        plain = x.detach().cpu().double().requires_grad_()
        x.requires_grad_()
        y = run(
            x, records, OUT, interpolation, fill_mode, antialias=antialias, color=color, **values
        )
        wanted = reference.augment(
            plain, records, size=OUT, interpolation=interpolation, antialias=antialias,
            fill_mode=fill_mode, color=color, **values,
        )  # fmt: skip
        g = torch.randn(y.shape, dtype=torch.float64)
        y.backward(g.to(dtype).to(y.device))
        wanted.backward(g)
        assert x.grad is not None
        assert plain.grad is not None
        assert x.grad.stride() == x.stride()
        scale = float(plain.grad.abs().max())
        error = float((x.grad.cpu().double() - plain.grad).abs().max())
        assert error <= (1e-12 if dtype is torch.float64 else 4e-6) * max(scale, 1.0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradient_where_whole_blocks_are_inside(interpolation: str, backend: Backend) -> None:
    """In float64 the kernels go pixel by pixel; some rows are erased or mixed."""
    n, wide = 2, 21 if backend.on_host else 53
    records = reference.identity_records(n, warps(n, 0.0) * 0.2 + 0.8 * torch.eye(2, 3))
    records[:, 2], records[:, 5] = 2.3, 1.6
    records[0, reference.ERASE : reference.ERASE + 4] = torch.tensor([2.0, 3.0, 30.0, 5.0])
    records[1, reference.MIX : reference.MIX + 4] = torch.tensor([0.0, 7.0, 20.0, 9.0])
    records[1, reference.PARTNER], records[1, reference.LAM] = 0, 0.25
    for c in (1, 3, 4):
        for laid in FORMATS:
            x = torch.rand(n, c, 19, wide, device=backend.device).contiguous(memory_format=laid)
            grads = []
            for dtype in (torch.float32, torch.float64):
                t = x.detach().to(dtype).requires_grad_()
                y = run(t, records, (17, wide), interpolation)
                g = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(dtype)
                y.backward(g)
                assert t.grad is not None
                grads.append(t.grad.cpu().double())
            assert float((grads[0] - grads[1]).abs().max()) < 4e-6


def test_gradient_of_half_types_and_expanded_gradients(backend: Backend) -> None:
    m = warps(2, 1.0)
    for dtype in (torch.float16, torch.bfloat16):
        x = images((2, 3, 8, 9), dtype, backend).requires_grad_()
        A.warp_affine(x, m).sum().backward()  # a gradient of stride 0
        wide = x.detach().float().requires_grad_()
        A.warp_affine(wide, m).sum().backward()
        assert x.grad is not None
        assert wide.grad is not None
        assert torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.slow
def test_gradcheck_twice() -> None:
    x = torch.rand(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    records = random_records(2)

    def eager(t: Tensor) -> Tensor:
        return run(t, records, (4, 7), **numbers(2, torch.float64))

    def colored(t: Tensor) -> Tensor:
        return run(t, records, (4, 7), color=True, **numbers(2, torch.float64))

    def through_the_operator(t: Tensor) -> Tensor:
        v = numbers(2, torch.float64)
        result: Tensor = torch.ops.fusereg.augment(
            t, records, None, (4, 7), torch.float64, False, 1, False, 0, False, v["fill"],
            v["scale"], v["shift"], v["erase"],
        )  # fmt: skip
        return result

    assert torch.equal(through_the_operator(x), eager(x))
    for f in (eager, through_the_operator):
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=f is eager)
        assert torch.autograd.gradgradcheck(f, (x,))
    assert torch.autograd.gradcheck(colored, (x,))
    (g,) = torch.autograd.grad(colored(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="brightness, contrast or saturation"):
        g.sum().backward()


@pytest.mark.slow  # a sample of it is in test_contract.py
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool, requires_grad: bool) -> None:
    x = torch.rand(2, 3, 6, 5).contiguous(memory_format=FORMATS[channels_last])
    x.requires_grad_(requires_grad)
    options = (1, False, 0, False, [0.1] * 3, [2.0] * 3, [0.5] * 3, [0.0] * 3)
    records = random_records(2)
    keys = torch.tensor([[1, 2], [3, 4]])
    for k in (None, keys):
        arguments = (x, records, k, (4, 7), torch.float32, channels_last, *options)
        torch.library.opcheck(torch.ops.fusereg.augment.default, arguments)
    grad = torch.rand(2, 3, 4, 7, requires_grad=requires_grad)
    arguments = (grad, None, records, (6, 5), torch.float32, channels_last, *options)
    torch.library.opcheck(torch.ops.fusereg.augment_backward.default, arguments)


def test_uint8_results_have_no_gradient() -> None:
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert not A.warp_affine(x * 255, torch.eye(2, 3), out_dtype=torch.uint8).requires_grad


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop_flip_normalize": lambda t: A.crop_flip_normalize(
        t, (4, 5), top=torch.tensor([0, 2]), hflip=torch.tensor([True, False]), mean=0.5, std=0.2
    ),
    "resize": lambda t: A.resize(t, (4, 9), antialias=True),
    "erase": lambda t: A.erase(t, torch.tensor([[0, 1, 3, 4], [2, 2, 2, 2]]), 0.3),
    "erase by noise": lambda t: A.erase(t, torch.tensor([[0, 1, 3, 4]] * 2), "random", seed=5),
    "mix": lambda t: A.mix(t, torch.tensor([1, 0]), torch.tensor([0.25, 1.0])),
    "mix a box": lambda t: A.mix(t, torch.tensor([1, -1]), 0.0, torch.tensor([[0, 1, 4, 5]] * 2)),
}


@pytest.mark.slow  # a sample of it is in test_contract.py
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_graphs(name: str) -> None:
    f = FUNCTIONS[name]
    x = torch.rand(2, 3, 6, 7, requires_grad=True)
    (wanted,) = torch.autograd.grad(f(x).square().sum(), x)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, f(x))
    (g,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(g, wanted)

    class Module(torch.nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return f(t)

    exported = torch.export.export(Module(), (x.detach(),))
    assert torch.equal(exported.module()(x.detach()), f(x))


@pytest.mark.parametrize("name", [*FUNCTIONS, "Augment"])
def test_batched_gradients(name: str) -> None:
    """With color as well, whose gradient needs x."""
    augment = A.Augment((4, 5), degrees=20, brightness=0.3, saturation=0.3, mean=0.5, std=0.2)
    f = FUNCTIONS.get(name, lambda t: augment(t, sample_ids=[0, 1]))
    x = torch.rand(2, 3, 6, 7, requires_grad=True)
    y = f(x)
    batch = torch.randn(4, *y.shape)
    (together,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in batch]
    assert torch.equal(together, torch.stack(each))
    jacobian = torch.autograd.functional.jacobian(f, x[:, :, :3, :2].detach(), vectorize=True)
    wanted = torch.autograd.functional.jacobian(f, x[:, :, :3, :2].detach())
    assert torch.equal(jacobian, wanted)
