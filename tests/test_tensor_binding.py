"""What tensors may be: each trap of reading them through DLPack, met by the public functions.

Whatever comes in, the result is right, or an error names the operation, the argument with its
index, and why; and after an error nothing has changed. The tensors come from odd_tensors.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import forked
import fusereg
import reference
from conftest import HOST_MODULE, Backend, has_gpu
from fusereg import functional, prox
from odd_tensors import (
    LAYOUTS,
    NO_MEMORY,
    OVERLAPPING,
    UNREADABLE,
    WithFunction,
    around,
    as_leaf,
    inference_tensor,
    memory,
    nothing_changes,
    of_dtype,
    parameter,
    quarters,
    values_of,
)

BACKENDS = [Backend("cuda_on_host" if HOST_MODULE else "cpu", torch.device("cpu"))]
if has_gpu():
    BACKENDS.append(Backend("cuda", torch.device("cuda")))


@pytest.fixture(params=BACKENDS, ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """One for each device: how a tensor is read does not depend on the instruction set."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return backend.device


class Operation(NamedTuple):
    name: str  # as it stands in its errors
    call: Callable[[Any], Any]


OPERATIONS = [
    Operation("l1_penalty", lambda p: functional.l1_penalty(p, 0.5)),
    Operation("l2_penalty", lambda p: functional.l2_penalty(p, 0.5)),
    Operation("elastic_net_penalty", lambda p: functional.elastic_net_penalty(p, 0.5, 0.5)),
    Operation("group_lasso_penalty", lambda p: functional.group_lasso_penalty(p, 0.5)),
    Operation("add_penalty_grad_", lambda p: fusereg.add_penalty_grad_(p, l1=0.5)),
    Operation("prox.l1_", lambda p: prox.l1_(p, 0.5)),
    Operation("prox.elastic_net_", lambda p: prox.elastic_net_(p, 0.5, 0.5)),
    Operation("prox.group_lasso_", lambda p: prox.group_lasso_(p, 0.5)),
]
STEPS = [op for op in OPERATIONS if op.name.startswith("prox")]
every_operation = pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)


# --- tensors that are read as they are ------------------------------------------------------------

#: Inference tensors can be no leaves of a graph.
GRAD_LAYOUTS = [k for k in (*LAYOUTS, *OVERLAPPING) if k != "inference"]


def is_right(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(values_of(got).double(), want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
def test_value_counts_every_element_of_every_layout(layout: str, device: torch.device) -> None:
    w = {**LAYOUTS, **OVERLAPPING}[layout](device)
    plain, other = values_of(w), quarters(5, device=device)
    with nothing_changes(w, other):
        value = functional.elastic_net_penalty([other, w], 0.5, 0.25)
    is_right(value, reference.total([other, plain], l1=0.5, l2=0.25).to(device))
    for dim in range(-1, w.dim()):
        with nothing_changes(w):
            value = functional.group_lasso_penalty(w, 0.5, dim=dim)
        is_right(value, reference.penalty(plain, group=0.5, dim=dim))


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_gradient_is_right_for_every_layout(layout: str, device: torch.device) -> None:
    w = as_leaf({**LAYOUTS, **OVERLAPPING}[layout](device))
    other = quarters(5, device=device).requires_grad_()
    value = functional.elastic_net_penalty([other, w], 0.5, 0.25)
    with nothing_changes(w, other):
        grads = torch.autograd.grad(value, [other, w])
    for leaf, grad in zip([other, w], grads, strict=True):
        assert grad.dtype == leaf.dtype
        is_right(grad, reference.gradient(values_of(leaf), l1=0.5, l2=0.25))


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_add_penalty_grad_creates_a_right_grad_for_every_layout(
    layout: str, device: torch.device
) -> None:
    w = as_leaf({**LAYOUTS, **OVERLAPPING}[layout](device))
    version, bytes_before = w._version, memory(w)
    value = fusereg.add_penalty_grad_([w], l1=0.5, l2=0.25)
    plain = values_of(w)
    is_right(value, reference.penalty(plain, l1=0.5, l2=0.25))
    assert w.grad is not None
    is_right(w.grad, reference.gradient(plain, l1=0.5, l2=0.25))
    assert w._version == version
    assert torch.equal(memory(w), bytes_before)


# A dense negated gradient is left out: torch's own functions make none (csrc/core/tensor.h).
@pytest.mark.parametrize(
    "layout", [k for k in LAYOUTS if k not in ("negated view", "subclass of Parameter", "buffer")]
)
def test_add_penalty_grad_adds_into_grads_of_every_layout(
    layout: str, device: torch.device
) -> None:
    grad = LAYOUTS[layout](device)
    p = nn.Parameter(quarters(*grad.shape, device=device, dtype=grad.dtype))
    p.grad = grad
    version = None if grad.is_inference() else grad._version
    before, outside = values_of(grad).double(), around(grad)
    fusereg.add_penalty_grad_([p], l1=0.5, l2=0.25)
    assert p.grad is grad
    is_right(grad, before + reference.gradient(values_of(p), l1=0.5, l2=0.25))
    assert around(grad) == outside
    assert version is None or grad._version > version


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prox_writes_every_layout_and_nothing_beside_it(layout: str, device: torch.device) -> None:
    w, other = LAYOUTS[layout](device), quarters(5, device=device)
    version = None if w.is_inference() else w._version
    before, outside = values_of(w), around(w)
    prox.elastic_net_([other, w], 0.5, 1.0)
    is_right(w, reference.prox(before, l1=0.5, l2=1.0))
    after = values_of(w)
    assert not after[after == 0].signbit().any(), "zeros are +0.0"
    assert around(w) == outside
    assert version is None or w._version > version


@pytest.mark.parametrize("layout", ["columns", "permuted", "imaginary part of a conjugate"])
def test_prox_keeps_groups_together_in_odd_layouts(layout: str, device: torch.device) -> None:
    for dim in range(LAYOUTS[layout](device).dim()):
        w = LAYOUTS[layout](device)
        before = values_of(w)
        prox.group_lasso_(w, 0.25, dim=dim)
        is_right(w, reference.prox(before, group=0.25, dim=dim))


def test_views_of_several_outputs_that_require_grad_can_be_stepped(device: torch.device) -> None:
    w = parameter(4, 6, device=device)
    before = values_of(w)
    prox.l1_(list(w.unbind(1)), 0.5)
    is_right(w, reference.prox(before, l1=0.5))


def test_a_wrapper_that_leaked_from_func_grad_is_read_as_its_value(device: torch.device) -> None:
    leaked: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        leaked.append(x)
        return x.sum()

    x = quarters(5, device=device)
    torch.func.grad(keep)(x)
    is_right(functional.l1_penalty(leaked, 0.5), reference.penalty(x, l1=0.5))


@pytest.mark.parametrize("layout", OVERLAPPING)
@pytest.mark.parametrize("op", STEPS, ids=lambda op: op.name)
def test_prox_refuses_elements_that_are_one_in_memory(
    op: Operation, layout: str, device: torch.device
) -> None:
    w, other = OVERLAPPING[layout](device), quarters(5, device=device)
    message = rf"fusereg\.{re.escape(op.name)}: .*params\[1\] .*memory"
    with nothing_changes(w, other), pytest.raises(ValueError, match=message):
        op.call([other, w])


def refuses_grads(device: torch.device, grads: list[Tensor], message: str) -> None:
    """add_penalty_grad_ fails with this message; it changes nothing and creates no grad."""
    params = [parameter(3, device=device, grad=False), parameter(3, device=device)]
    for grad in grads:
        params.append(nn.Parameter(quarters(*grad.shape, device=device)))
        params[-1].grad = grad
    match = rf"^fusereg\.add_penalty_grad_: {message}"
    with nothing_changes(*params), pytest.raises(ValueError, match=match):
        fusereg.add_penalty_grad_(params, l1=0.5)


@pytest.mark.parametrize("layout", OVERLAPPING)
def test_add_penalty_grad_refuses_a_grad_whose_elements_are_one_in_memory(
    layout: str, device: torch.device
) -> None:
    refuses_grads(device, [OVERLAPPING[layout](device)], r".*params\[2\]\.grad .*memory")


# --- tensors that are refused ---------------------------------------------------------------------


@every_operation
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tensor_that_no_kernel_can_read_is_refused_by_name_and_reason(
    kind: str, op: Operation, device: torch.device
) -> None:
    make, reason = UNREADABLE[kind]
    odd = make(device)
    with_grad, without = parameter(4, device=device), parameter(4, device=device, grad=False)
    message = rf"^fusereg\.{re.escape(op.name)}: params\[2\].*{reason}"
    with nothing_changes(with_grad, without), pytest.raises(ValueError, match=message):
        op.call([with_grad, without, odd])


@every_operation
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (None, r"params must be .*NoneType"),
        (3.0, r"params must be .*float"),
        ("weight", r"params must be .*str"),
        ({"w": torch.ones(2)}, r"params must be .*dict .*values\(\)"),
        ([torch.ones(2), None], r"params\[1\] must be a torch.Tensor, got NoneType"),
        ([torch.ones(2), 1.5], r"params\[1\] must be a torch.Tensor, got float"),
        ([[torch.ones(2)]], r"params\[0\] must be a torch.Tensor, got list"),
        ([nn.Linear(1, 1)], r"params\[0\] must be a torch.Tensor, got Linear"),
        ([("w", torch.ones(2))], r"params\[0\] .* got tuple.*named_parameters"),
        (np.ones(2), r"params\[0\] must be a torch.Tensor, got float64"),
    ],
    ids=range(10),
)
def test_what_is_no_tensor_is_refused_by_name(
    params: Any, reason: str, op: Operation, device: torch.device
) -> None:
    with pytest.raises(TypeError, match=rf"^fusereg\.{re.escape(op.name)}: {reason}"):
        op.call(params)


@every_operation
def test_inside_fake_tensor_mode_nothing_is_computed(op: Operation, device: torch.device) -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(3, 4, device=device))
        wide = torch.empty(2, dtype=torch.float64, device=device)
        out = op.call([p, wide])
    assert isinstance(p, FakeTensor)
    if op.name.startswith("prox"):
        assert out is None
        return
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype, out.device.type) == ((), torch.float64, device.type)
    if op.name == "add_penalty_grad_":
        assert isinstance(p.grad, FakeTensor)
        assert p.grad.shape == p.shape


# --- gradients that cannot be written -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse COO", "zero tensor"])
def test_a_grad_that_cannot_be_written_is_refused_by_name(kind: str, device: torch.device) -> None:
    make, reason = UNREADABLE[kind]
    refuses_grads(device, [make(device)], rf"params\[2\]\.grad .*{reason}")


@pytest.mark.skipif(bool(HOST_MODULE), reason="a process of its own has the module for the CPU")
@pytest.mark.parametrize("what", ["params[1].grad", "params[1]"])
def test_freed_memory_ends_in_an_error_not_in_a_crash(what: str, device: torch.device) -> None:
    call = "sparsity(params)" if what == "params[1]" else "add_penalty_grad_(params, l1=0.5)"
    code = f"""
        import torch, fusereg
        params = [torch.nn.Parameter(torch.ones(4, device="{device}")) for _ in range(2)]
        for p in params:
            p.grad = torch.zeros_like(p)
        {what}.untyped_storage().resize_(0)
        try:
            fusereg.{call}
        except ValueError as error:
            print(error, params[0].grad.tolist())
    """
    done = forked.run(code)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"fusereg\.\w+: {re.escape(what)} .*{NO_MEMORY}.*\[0.0, 0.0", done.stdout)


@pytest.mark.parametrize("retained", [False, True])
def test_a_tensor_that_is_no_leaf_is_refused_without_a_warning(
    retained: bool, device: torch.device
) -> None:
    without = parameter(3, device=device, grad=False)
    computed = parameter(3, device=device) * 2
    if retained:
        computed.retain_grad()
        computed.sum().backward(retain_graph=True)
    for params, name in (([without, computed], r"params\[1\]"), ([computed], r"params\[0\]")):
        match = rf"^fusereg\.add_penalty_grad_: {name} is not a leaf"
        with nothing_changes(without, computed.detach()), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=match):
                fusereg.add_penalty_grad_(params, l1=0.5)


BAD_SCALES: dict[str, Callable[[torch.device], Any]] = {
    **{k: make for k, (make, _) in UNREADABLE.items() if k in ("sparse COO", "meta", "freed")},
    "two elements": lambda d: torch.ones(2, device=d),
    "int64": lambda d: torch.ones((), dtype=torch.int64, device=d),
    "float8": of_dtype(torch.float8_e4m3fn, 1),
    "meta, one element": lambda d: torch.ones((), device="meta"),
    "sparse, one element": lambda d: torch.ones(1, device=d).to_sparse(),
    "zero tensor": lambda d: torch._efficientzerotensor((), device=d),
    "text": lambda d: "2",
    "list": lambda d: [2.0],
}


@pytest.mark.parametrize("kind", BAD_SCALES)
@pytest.mark.parametrize("grad", [True, False], ids=["grads", "no grads yet"])
def test_a_bad_grad_scale_is_refused_by_name(kind: str, grad: bool, device: torch.device) -> None:
    p, scale = parameter(3, device=device, grad=grad), BAD_SCALES[kind](device)
    match = r"^fusereg\.add_penalty_grad_: grad_scale "
    with nothing_changes(p), pytest.raises((TypeError, ValueError), match=match):
        fusereg.add_penalty_grad_(p, l1=0.5, grad_scale=scale)


GOOD_SCALES: dict[str, Callable[[torch.device], Any]] = {
    "int": lambda d: 2,
    "float16": lambda d: torch.tensor(2.0, dtype=torch.float16, device=d),
    "one element, 2-d": lambda d: torch.full((1, 1), 2.0, device=d),
    "expanded": lambda d: torch.tensor(2.0, device=d).expand(1),
    "requires grad": lambda d: torch.tensor(2.0, device=d, requires_grad=True),
    "subclass": lambda d: torch.tensor(2.0, device=d).as_subclass(WithFunction),
    "negated": lambda d: torch._neg_view(torch.tensor(-2.0, device=d)),
    "imaginary": lambda d: torch.full((1,), 1 - 2j, device=d).conj().imag,
}


@pytest.mark.parametrize("kind", GOOD_SCALES)
def test_grad_scale_may_be_any_number_or_tensor_of_one(kind: str, device: torch.device) -> None:
    p = parameter(5, device=device, grad=False)
    value = fusereg.add_penalty_grad_(p, l1=0.5, l2=0.25, grad_scale=GOOD_SCALES[kind](device))
    assert p.grad is not None
    is_right(value, reference.penalty(p, l1=0.5, l2=0.25))
    is_right(p.grad, 2 * reference.gradient(p, l1=0.5, l2=0.25))


# --- memory that is shared, tensors that are listed twice -----------------------------------------

SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "one memory, two tensors": lambda m: (m, m.view(-1)),
    "a matrix and its transpose": lambda m: (m, m.t()),
    "overlapping slices": lambda m: (m.view(-1)[:20], m.view(-1)[12:]),
    "the same columns": lambda m: (m[:, ::2], m[:, ::2]),
    "columns and rows": lambda m: (m[:, :2], m[:3]),
}
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "neighboring slices": lambda m: (m.view(-1)[:15], m.view(-1)[15:]),
    "even and odd columns": lambda m: (m[:, ::2], m[:, 1::2]),
}


@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("op", STEPS, ids=lambda op: op.name)
def test_prox_refuses_two_tensors_over_the_same_memory(
    how: str, op: Operation, device: torch.device
) -> None:
    m, other = quarters(6, 6, device=device), quarters(4, device=device)
    match = rf"^fusereg\.{re.escape(op.name)}: params\[1\] and params\[2\] share memory"
    with nothing_changes(m, other), pytest.raises(ValueError, match=match):
        op.call([other, *SHARED[how](m)])


@pytest.mark.parametrize("how", SHARED)
def test_add_penalty_grad_refuses_two_grads_over_the_same_memory(
    how: str, device: torch.device
) -> None:
    message = r"params\[2\](\.grad)? and params\[3\](\.grad)? share memory"
    refuses_grads(device, [*SHARED[how](quarters(6, 6, device=device))], message)


@pytest.mark.parametrize("how", APART)
def test_views_of_one_storage_that_share_no_element_are_written(
    how: str, device: torch.device
) -> None:
    m = quarters(6, 6, device=device)
    before = m.clone()
    prox.l1_(APART[how](m), 0.5)
    is_right(m, reference.prox(before, l1=0.5))


@pytest.mark.parametrize("how", [*SHARED, *APART])
def test_reading_counts_each_of_two_views_of_one_memory(how: str, device: torch.device) -> None:
    views = {**SHARED, **APART}[how](quarters(6, 6, device=device))
    want = reference.total([v.clone() for v in views], l1=0.5).to(device)
    is_right(functional.l1_penalty(views, 0.5), want)


def test_a_tensor_listed_twice_counts_once(device: torch.device) -> None:
    a, b = parameter(5, device=device, grad=False), parameter(3, device=device, grad=False)
    before = values_of(a)
    want = reference.total([a], l1=0.5) + reference.total([b], l1=0.25)
    is_right(functional.l1_penalty([a, b, a], [0.5, 0.25, 0.5]), want.to(device))
    want = reference.total([a, b], l1=0.5).to(device)
    is_right(fusereg.add_penalty_grad_([a, b, a, a], l1=0.5), want)
    assert a.grad is not None
    is_right(a.grad, reference.gradient(a, l1=0.5))
    prox.l1_([a, a], 0.5)
    is_right(a, reference.prox(before, l1=0.5))


def test_tied_parameters_of_a_module_count_once(device: torch.device) -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False, device=device) for _ in range(2)])
    model[1].weight = model[0].weight
    is_right(functional.l1_penalty(model, 0.5), reference.penalty(model[0].weight, l1=0.5))


# --- autograd is told -----------------------------------------------------------------------------


def test_add_penalty_grad_moves_the_version_of_grads_alone(device: torch.device) -> None:
    p, frozen = parameter(5, device=device), quarters(5, device=device)
    assert p.grad is not None
    before = p._version, frozen._version, p.grad._version
    fusereg.add_penalty_grad_([p, frozen], l1=0.5)
    assert (p._version, frozen._version) == before[:2]
    assert p.grad._version > before[2]


def test_a_weight_that_autograd_saved_and_prox_changed_is_noticed(device: torch.device) -> None:
    for loss_of in (lambda w: (w * w).sum(), lambda w: functional.l1_penalty(w, 0.5)):
        for w in (parameter(5, device=device), parameter(4, 6, device=device)[:, ::2]):
            loss = loss_of(w)
            prox.l1_(w, 0.25)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_a_grad_that_autograd_saved_and_add_penalty_grad_changed_is_noticed(
    device: torch.device,
) -> None:
    p, x = parameter(5, device=device), quarters(5, device=device).requires_grad_()
    loss = (x * p.grad).sum()
    fusereg.add_penalty_grad_(p, l1=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["inference", "changed before backward"])
def test_a_frozen_tensor_beside_a_trained_one_does_not_disturb_backward(
    kind: str, device: torch.device
) -> None:
    p = parameter(5, device=device, grad=False)
    frozen = inference_tensor(device) if kind == "inference" else quarters(4, device=device)
    loss = functional.elastic_net_penalty([frozen, p], 0.5, 0.25)
    if kind != "inference":
        frozen.zero_()
    loss.backward()
    assert p.grad is not None
    is_right(p.grad, reference.gradient(p, l1=0.5, l2=0.25))


def test_prox_of_strided_inference_tensors_is_right_or_changes_nothing(
    device: torch.device,
) -> None:
    odd, other = inference_tensor(device)[:, ::2], quarters(4, device=device)
    before = values_of(odd), values_of(other)
    step, said = 0.5, "fusereg.prox.l1_: params[1]"
    try:
        prox.l1_([other, odd], step)
    except RuntimeError as error:
        step, said = 0.0, str(error)
    assert said.startswith("fusereg.prox.l1_: params[1]")
    is_right(other, reference.prox(before[1], l1=step))
    is_right(odd, reference.prox(before[0], l1=step))


# --- strengths and other arguments ----------------------------------------------------------------


class Argument(NamedTuple):
    op: str
    name: str  # as the caller writes it
    call: Callable[[Any, Any], Any]


ARGUMENTS = [
    Argument("l1_penalty", "strength", functional.l1_penalty),
    Argument("l2_penalty", "strength", functional.l2_penalty),
    Argument("elastic_net_penalty", "l1", lambda p, s: functional.elastic_net_penalty(p, s, 0.5)),
    Argument("elastic_net_penalty", "l2", lambda p, s: functional.elastic_net_penalty(p, 0.5, s)),
    Argument("group_lasso_penalty", "strength", functional.group_lasso_penalty),
    Argument("add_penalty_grad_", "l1", lambda p, s: fusereg.add_penalty_grad_(p, l1=s)),
    Argument("add_penalty_grad_", "l2", lambda p, s: fusereg.add_penalty_grad_(p, l2=s)),
    Argument("add_penalty_grad_", "group", lambda p, s: fusereg.add_penalty_grad_(p, group=s)),
    Argument("prox.l1_", "threshold", prox.l1_),
    Argument("prox.elastic_net_", "l1", lambda p, s: prox.elastic_net_(p, s, 0.5)),
    Argument("prox.elastic_net_", "l2", lambda p, s: prox.elastic_net_(p, 0.5, s)),
    Argument("prox.group_lasso_", "threshold", prox.group_lasso_),
]
each_strength = pytest.mark.parametrize("arg", ARGUMENTS, ids=lambda a: f"{a.op}-{a.name}")


@each_strength
@pytest.mark.parametrize(
    ("strength", "reason"),
    [
        (-1.0, "finite and not negative"),
        (float("nan"), "finite and not negative"),
        (float("inf"), "finite and not negative"),
        ([0.5, -1.0], "finite and not negative"),
        (torch.tensor([0.5, float("nan")]), "finite and not negative"),
        ([], "one number or 2 of them .* got 0"),
        ([0.5], "one number or 2 of them .* got 1"),
        (torch.ones(3), "one number or 2 of them .* got 3"),
    ],
    ids=["-1", "nan", "inf", "[-1]", "[nan]", "none", "one", "three"],
)
def test_a_strength_of_a_bad_value_is_refused(
    strength: Any, reason: str, arg: Argument, device: torch.device
) -> None:
    params = [parameter(3, device=device, grad=False), parameter(4, device=device)]
    match = rf"^fusereg\.{re.escape(arg.op)}: .*{reason}"
    with nothing_changes(*params), pytest.raises(ValueError, match=match):
        arg.call(params, strength)


@each_strength
@pytest.mark.parametrize(
    ("strength", "got"), [(-1.0, "-1"), ([0.5, -2.0], "-2"), ([0.5], "1"), ("0.5", "str")]
)
def test_a_refused_strength_is_named_as_the_caller_wrote_it(
    strength: Any, got: str, arg: Argument, device: torch.device
) -> None:
    params = [parameter(3, device=device), parameter(4, device=device)]
    match = rf"^fusereg\.{re.escape(arg.op)}: {arg.name}(\[1\])? must be .*got {got}(\.0)?$"
    with pytest.raises((TypeError, ValueError), match=match):
        arg.call(params, strength)


NOT_NUMBERS: list[Any] = ["0.5", None, {}, 1j, ["1", "1"], [0.5, None]]


@each_strength
@pytest.mark.parametrize("strength", [*NOT_NUMBERS, np.ones((2, 2))], ids=repr)
def test_a_strength_that_is_no_number_is_refused(
    strength: Any, arg: Argument, device: torch.device
) -> None:
    params = [parameter(3, device=device, grad=False), parameter(4, device=device)]
    match = rf"^fusereg\.{re.escape(arg.op)}: .*must be a number"
    with nothing_changes(*params), pytest.raises(TypeError, match=match):
        arg.call(params, strength)


@each_strength
@pytest.mark.parametrize("strength", NOT_NUMBERS, ids=repr)
def test_a_strength_that_is_no_number_is_refused_for_fake_tensors_too(
    strength: Any, arg: Argument, device: torch.device
) -> None:
    match = rf"^fusereg\.{re.escape(arg.op)}: .*must be a number"
    with FakeTensorMode(), pytest.raises(TypeError, match=match):
        arg.call([torch.empty(3, device=device), torch.empty(4, device=device)], strength)


def test_bytes_are_no_strengths(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"^fusereg\.l1_penalty: .*must be a number"):
        functional.l1_penalty([quarters(3, device=device), quarters(4, device=device)], b"ab")


@pytest.mark.parametrize(
    "strength",
    [
        np.float32(0.5),
        np.array(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16),
        [0.5, 0.5],
        (0.5, 0.5),
        np.array([0.5, 0.5]),
        torch.full((2,), 0.5),
    ],
    ids=repr,
)
def test_a_strength_may_be_any_kind_of_number_or_one_per_tensor(
    strength: Any, device: torch.device
) -> None:
    params = [quarters(3, device=device), quarters(4, device=device)]
    got = functional.elastic_net_penalty(params, strength, strength)
    is_right(got, reference.total(params, l1=0.5, l2=0.5).to(device))


@pytest.mark.parametrize("strength", [1, True, np.int64(1)], ids=repr)
def test_a_strength_of_one_is_one_in_every_number_type(strength: Any, device: torch.device) -> None:
    w = quarters(5, device=device)
    is_right(functional.l1_penalty(w, strength), reference.penalty(w, l1=1.0))


@each_strength
def test_one_strength_per_tensor_goes_to_its_tensor(arg: Argument, device: torch.device) -> None:
    def run(strengths: list[float]) -> list[Tensor]:
        params = [parameter(2, 3, device=device, grad=False) for _ in strengths]
        for i, p in enumerate(params):
            p.data.copy_(torch.arange(6.0).view(2, 3) / 4 - i)
        value = arg.call(params, strengths)
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in params]
        return [torch.zeros(()) if value is None else value.detach(), *grads, *params]

    both, first, second = run([0.25, 0.5]), run([0.25, 0.0]), run([0.0, 0.5])
    zero = run([0.0, 0.0])
    is_right(both[0], (first[0] + second[0] - zero[0]).double())
    for i, alone in ((1, first), (2, second)):
        assert torch.equal(both[i], alone[i])
        assert torch.equal(both[i + 2], alone[i + 2])
    assert any(not torch.equal(a, b) for a, b in zip(both, zero, strict=True))


@each_strength
def test_a_tensor_listed_twice_with_two_strengths_is_refused(
    arg: Argument, device: torch.device
) -> None:
    a, b = parameter(3, device=device), parameter(4, device=device, grad=False)
    match = rf"^fusereg\.{re.escape(arg.op)}: params\[0\] and params\[2\] are one tensor"
    with nothing_changes(a, b), pytest.raises(ValueError, match=match):
        arg.call([a, b, a], [0.5, 0.5, 0.25])


@pytest.mark.parametrize("dim", [2, -3, "0", 1.0, None], ids=repr)
@pytest.mark.parametrize("step", [False, True], ids=["penalty", "prox"])
def test_a_dim_that_no_tensor_has_is_refused_by_name(
    dim: Any, step: bool, device: torch.device
) -> None:
    w = [quarters(2, 3, device=device), quarters(2, 3, device=device)]
    call: Any = prox.group_lasso_ if step else functional.group_lasso_penalty
    name = "prox.group_lasso_" if step else "group_lasso_penalty"
    match = rf"^fusereg\.{re.escape(name)}: dim "
    kind = ValueError if isinstance(dim, int) else TypeError
    with nothing_changes(*w), pytest.raises(kind, match=match):
        call(w, 0.5, dim=dim)


def test_any_iterable_of_tensors_is_taken(device: torch.device) -> None:
    a, b = parameter(3, device=device), parameter(4, device=device)
    want = functional.l1_penalty([a, b], 0.5).detach().double()
    named = {"a": a, "b": b}
    for params in ((a, b), iter([a, b]), named.values(), nn.ParameterList([a, b])):
        is_right(functional.l1_penalty(params, 0.5), want)
    is_right(functional.l1_penalty(a, 0.5), reference.penalty(a, l1=0.5))


def test_defaults_of_torch_do_not_change_the_result(device: torch.device) -> None:
    w = parameter(4, 5, device=device)[:, ::2]
    want = reference.penalty(w, l1=0.5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            values = [functional.l1_penalty(p, 0.5) for p in (w, [])]
            values.append(fusereg.add_penalty_grad_([], l1=0.5))
    finally:
        torch.set_default_dtype(torch.float32)
    is_right(values[0], want)
    assert {v.dtype for v in values} == {torch.float32}
    assert all(v.device.type != "meta" for v in values)


@pytest.mark.parametrize(
    "kind",
    [k for k in UNREADABLE if k.startswith(("fake", "meta", "sparse", "mkldnn", "nested", "lazy"))],
)
def test_sparsity_refuses_what_it_cannot_count_by_name(kind: str, device: torch.device) -> None:
    odd = UNREADABLE[kind][0](device)
    match = r"^fusereg\.sparsity: params\[1\] "
    with pytest.raises((TypeError, ValueError), match=match):
        fusereg.sparsity([quarters(3, device=device), odd])


@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
def test_sparsity_counts_the_zeros_of_every_layout(layout: str, device: torch.device) -> None:
    w = {**LAYOUTS, **OVERLAPPING}[layout](device)
    plain = values_of(w)
    want = float((plain == 0).double().mean()) if plain.numel() else 0.0
    assert fusereg.sparsity(w) == pytest.approx(want, abs=1e-12)
