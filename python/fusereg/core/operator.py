"""The one way in which kernels become torch operations.

An operation is declared once, as an :class:`Operator`: its schema, the kernel, an empty result for
fake tensors, what backward keeps, and the gradient. From these are made

- the eager call: the kernel, inside an old-style ``torch.autograd.Function`` where a gradient is
  wanted (25 us for forward and backward of 64 floats, where operators of ``torch.library`` take 39
  to 46);
- ``torch.ops.fusereg.<name>``, for torch.compile, export, fake tensors, make_fx, subclasses, and
  for gradients that are batched (``torch.autograd.grad(is_grads_batched=True)``), over which torch
  loops;
- the autograd function with a ``vmap`` rule that torch.func transforms need.

A gradient calls other operators, and each call takes the path that its surroundings want. So one
formula serves all three, and derivatives of any order. An operation whose gradient is another
kernel has the same formula in torch's operations besides, ``by_parts``, from which its further
derivatives come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import checks, dispatch, random
from .random import State

_library = torch.library.Library("fusereg", "DEF")
_EXACT = (torch.Tag.needs_exact_strides,)
#: What Inductor generates code from in place of an operator.
_FOR_INDUCTOR: dict[Any, Callable[..., Any]] = {}

Kernel = Callable[..., Any]


# --- what the functions of an operation use -------------------------------------------------------


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for backward, and for forward mode where a tangent may be asked for."""
    ctx.save_for_backward(*tensors)
    if dispatch.forward_mode():
        ctx.save_for_forward(*tensors)


def keep_state(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors, and ``ctx.state`` among them where it is a tensor.

    Eager calls have numbers there, or a tensor of their own.
    """
    if type(ctx.state) is not tuple:
        tensors = (*tensors, ctx.state)
        ctx.state = None
    elif not tensors:
        return
    ctx.save_for_backward(*tensors)
    if dispatch.forward_mode():
        ctx.save_for_forward(*tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """Return the tensors that :func:`keep_state` kept, and the Philox state as the last."""
    if ctx.state is None:
        found: tuple[Any, ...] = ctx.saved_tensors
        return found
    return (*ctx.saved_tensors, ctx.state)


def state_of(seed: Any) -> State:
    """Return the Philox state of an operator's argument ``seed``, of which some have none."""
    if type(seed) is tuple:
        return seed
    return (0, 0) if seed is None else (seed, 0)


def unpacked(ctx: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``ctx.saved_tensors``, for which activation checkpointing lets one ask once.

    ``given``: what a gradient function has beside ctx and the gradient. A compiled one that has
    asked already passes them on there, as a tuple.
    """
    saved: tuple[Any, ...] = given[0] if given and type(given[0]) is tuple else ctx.saved_tensors
    return saved


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether a derivative of a function of these tensors may be asked for.

    In forward mode it is wherever a tensor has a tangent, under ``torch.no_grad()`` too.
    """
    if dispatch.forward_mode():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Apply an autograd function, which torch does not type."""
    result: Tensor = function.apply(*arguments)
    return result


def written(y: Tensor) -> Tensor:
    """Tell autograd that a kernel has written to y, and return it."""
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return y


def strides_of_result(x: Tensor) -> tuple[int, ...]:
    """Return the strides of ``torch.empty_like(x)``, in whose order elements are drawn."""
    return torch.empty_like(x, device="meta").stride()


def in_strides(t: Tensor, strides: Sequence[int]) -> Tensor:
    """Return t itself if it has these strides, else a copy that has them."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels compute on tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def refused(op: str) -> RuntimeError:
    """Return the error for a kernel that refuses a copy in a supported layout."""
    return RuntimeError(
        f"fusereg.{op}: the kernel refused a tensor in a layout that it supports; "
        "please report this"
    )


def through_copy(
    kernel: Callable[..., int],
    y: Tensor,
    x: Tensor,
    rest: tuple[Any, ...],
    supported: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Tensor:
    """Write into y what a kernel, which has refused x, computes of a copy, and return y.

    Args:
        kernel: is called with (y, x, *rest), and may write over x.
        y: the result, in any layout.
        x: the tensor.
        rest: the other arguments, the name that errors show last.
        supported: returns a new tensor like x, in a layout that the kernel supports.
    """
    x = checks.plain(x, rest[-1], "x")
    copy = supported(x).copy_(x)
    if kernel(copy, copy, *rest) != 0:
        raise refused(rest[-1])
    return y.copy_(copy)


def contiguous_copies(
    given: Sequence[Tensor | None], names: Sequence[str], op: str
) -> list[Tensor | None]:
    """Return what a kernel has refused as contiguous tensors that it can read."""

    def copied(t: Tensor, name: str) -> Tensor:
        return (checks.plain(t, op, name) if t.is_floating_point() else t.detach()).contiguous()

    pairs = zip(given, names, strict=True)
    return [None if t is None else copied(t, name) for t, name in pairs]


def gradients(
    formula: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    *,
    of_all: bool = True,
) -> list[Tensor | None]:
    """Return the gradients of a formula in torch's operations, as functions of all they depend on.

    Args:
        formula: a function of the tensors, with one result or several.
        tensors: whose gradients are wanted; integers and None have none.
        grads: the gradient of each result, or None.
        of_all: whether those of tensors that require none are wanted as well.
    """

    def apart(t: Tensor | None) -> Tensor | None:
        # One tensor may have been computed from another, and its gradient here is not to contain
        # what comes by that way.
        if t is None or not t.is_floating_point():
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(of_all)

    with torch.enable_grad():
        own = [apart(t) for t in tensors]
        asked = [t for t in own if t is not None and t.requires_grad]
        if not asked:
            return [None] * len(own)
        results = formula(*own)
        given = zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
        # A result that depends on no tensor, as the slope of a ReLU, has no gradient to pass on.
        pairs = [(y, g) for y, g in given if y is not None and y.requires_grad and g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                asked,
                [grad for _, grad in pairs],
                create_graph=True,
                materialize_grads=True,
            )
            if pairs
            else map(torch.zeros_like, asked)
        )
    return [next(found) if t is not None and t.requires_grad else None for t in own]


def tell_inductor() -> bool:
    """Add the decompositions to Inductor's table, which is none of the other compilers' tables."""
    from torch._inductor import decomposition as table  # 0.3 s, so only when something is compiled

    if not _FOR_INDUCTOR.keys() <= table.decompositions.keys():
        table.decompositions.update(_FOR_INDUCTOR)
        table.fast_random_decomps.cache_clear()  # a copy, made where something was compiled before
    return True


# Dynamo is to call it where it would trace it, as torch.compiler.assume_constant_result has it do.
tell_inductor._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- the declaration ------------------------------------------------------------------------------


class Operator:
    """A kernel as a torch operation, called with the arguments of its schema in their order.

    An eager call may pass a Philox state of numbers for the argument ``seed``, and after the
    schema's arguments the name under which errors show the operation.

    Args:
        schema: as ``torch.library.define`` takes it, without the namespace.
        kernel: allocates the results and computes them: ``kernel(*arguments, op=name, out=None)``.
            ``op`` and ``out`` are only passed where they are given. Where a result is None, the
            library's operator returns an empty tensor in its place.
        fake: empty results for the same arguments; a result may be None there too.
        save: ``save(ctx, arguments, output)``: keeps what gradient and tangent want, tensors by
            :func:`keep`.
        gradient: ``gradient(ctx, *gradients of the results)``: a gradient for each of the leading
            arguments, as differentiable operations. None: that of ``by_parts``, or none.
        tangent: ``tangent(ctx, *tangents of the arguments)``: that of the result, in forward mode.
        row_major: torch.func transforms make the first argument contiguous, for operations whose
            result depends on the order of elements in memory.
        linear: whether the tangent does not depend on the tensors.
        by_parts: the same of the same arguments in torch's operations and other operators, which
            have derivatives of any order. torch.func transforms and forward mode call it, in place
            of what is made of ``gradient`` and ``tangent``.
        flexible: whether tensors in any layout give the same result, so that a compiler need not
            copy them into the one that it traced. Another overload, ``exact``, is for calls to
            which this does not apply, and one, ``kept``, for what :meth:`decompose` leaves.

    Raises:
        RuntimeError: by torch, for a schema that it cannot read.
    """

    def __init__(
        self,
        schema: str,
        kernel: Kernel,
        *,
        fake: Kernel,
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
        tangent: Callable[..., Any] | None = None,
        row_major: bool = False,
        linear: bool = False,
        by_parts: Kernel | None = None,
        flexible: bool = False,
    ) -> None:
        self.linear = linear
        self.name = schema[: schema.index("(")]
        self.kernel = kernel
        self._by_parts = by_parts
        if by_parts is not None and gradient is None:
            save, gradient = self._save_all, self._gradient_by_parts
        _library.define(schema, tags=(torch.Tag.flexible_layout,) if flexible else ())
        names = [self.name]
        if flexible:
            names += [f"{self.name}.exact", f"{self.name}.kept"]
            for name, tags in zip(names[1:], (_EXACT, (torch.Tag.flexible_layout,)), strict=True):
                _library.define(name + schema[len(self.name) :], tags=tags)
        packet = getattr(torch.ops.fusereg, self.name)
        self.overload = packet.default
        #: The overload for which compilers keep the layouts that they traced.
        self.exact = packet.exact if flexible else self.overload
        arguments = self.overload._schema.arguments
        self._count = len(arguments)
        seeds = [i for i, a in enumerate(arguments) if a.name == "seed"]
        self._seed = seeds[0] if seeds else None
        #: How many arguments are tensors, or lists of them, before the first that is neither.
        self._tensors = next(
            (i for i, a in enumerate(arguments) if a.name == "seed" or "Tensor" not in str(a.type)),
            self._count,
        )
        lists = [i for i, a in enumerate(arguments) if str(a.type) == "List[Tensor]"]
        #: Where a list of tensors is among the arguments: autograd must see them one by one.
        self._list = lists[0] if lists and gradient is not None else None
        #: Where single ones are.
        self._single = [
            i for i, a in enumerate(arguments) if "Tensor" in str(a.type) and i not in lists
        ]
        returned = len(self.overload._schema.returns)

        def filled(results: Any, first: Any) -> Any:
            """Return the results with empty tensors in place of None."""
            if returned < 2:
                return results
            like = first[0] if isinstance(first, (list, tuple)) else first
            return tuple(like.new_empty(0) if r is None else r for r in results)

        def library_kernel(*args: Any) -> Any:
            return filled(kernel(*args), args[0])

        def library_fake(*args: Any) -> Any:
            return filled(fake(*args), args[0])

        self._transform: Any = None
        for name in names:
            for key in ("CPU", "CUDA"):
                _library.impl(name, library_kernel, key)
            torch.library.register_fake(f"fusereg::{name}", library_fake, lib=_library)
        if gradient is None:
            return
        assert save is not None

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = gradient(ctx, *grads)
            return (*found, *(None,) * (self._count - len(found)))

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        for name in names:
            torch.library.register_autograd(
                f"fusereg::{name}", backward, setup_context=setup, lib=_library
            )
        made = _functions(self, save, gradient, tangent, row_major)
        self._function, self._function_in_place, self._transform = made
        #: The eager autograd function: called with the tensors, and a tuple of all that follows
        #: them, which torch need not look at then. Without its question for functorch, which the
        #: gate has answered: 1.2 us less.
        self.apply: Callable[..., Any] = super(  # type: ignore[misc]
            torch.autograd.Function, self._function
        ).apply

    def compile(self, functions: Callable[[Kernel, Kernel], tuple[Any, Any]]) -> None:
        """Let compiled functions do the eager autograd function's usual calls.

        ``functions(forward, backward)`` of ``_C`` returns them, for the general ones by Python,
        which they call for all that is unusual: what small tensors wait for is not the kernel.
        """
        function: Any = self._function
        #: (forward, backward) by Python.
        self.general = function.forward, function.backward
        forward, backward = functions(*self.general)
        function.forward = staticmethod(forward)
        dispatch.call_at_once(function, backward)
        #: ``gradient_of(ctx, grad)``: what autograd calls.
        self.gradient_of: Callable[[Any, Tensor], tuple[Any, ...]] = backward

    def decompose(self, decomposition: Callable[..., Any]) -> None:
        """Let Inductor generate code from torch's operations in place of the flexible operator.

        ``decomposition`` gets the operator's arguments and returns its results, or NotImplemented
        where the operator is to stay. Other compilers keep the operator.
        """
        kept = getattr(torch.ops.fusereg, self.name).kept

        def decomposed(*args: Any) -> Any:
            results = decomposition(*args)
            # Inductor calls no operator that is in its table, so it gets the other overload.
            return kept(*args) if results is NotImplemented else results

        _FOR_INDUCTOR[self.overload] = decomposed

    def at_once(self, roles: str, *, without_gradient: bool = True) -> Callable[..., Any]:
        """Return ``f(constants, *tensors)``: the usual call with a new Philox state, or None.

        The caller asks Dynamo before. For ``roles``, and what is left to other ways, see
        ``_C.drawn_at_once``.
        """
        kernel = self.kernel if without_gradient else None
        return functools.partial(_C.drawn_at_once, self.apply, kernel, roles)

    def _save_all(self, ctx: Any, args: tuple[Any, ...], _: Any) -> None:
        """Keep all arguments, for :meth:`_gradient_by_parts`."""
        k = self._tensors
        ctx.state = args[k]
        ctx.constants = args[k + 1 :]
        if self._seed is None:
            ctx.state, ctx.constants = (), args[k:]
        keep_state(ctx, *args[:k])

    def _gradient_by_parts(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert self._by_parts is not None
        *tensors, state = kept(ctx)
        rest = ctx.constants if self._seed is None else (state, *ctx.constants)
        by_parts = self._by_parts
        found = gradients(lambda *t: by_parts(*t, *rest), tensors, grads, of_all=False)
        return tuple(found)

    def __call__(self, *args: Any) -> Any:
        """Compute the operation in whatever way its surroundings want."""
        # As dispatch.direct(), without a call for it.
        if dispatch.is_dynamo_compiling() or not _C.direct(*args[: self._tensors]):
            return self.traced(*args)
        try:
            return self.eager(*args)
        except (RuntimeError, TypeError, ValueError):
            # Kernels refuse wrappers before they write. To look for them first would cost each
            # backward pass of a small tensor a microsecond.
            if dispatch.wrapped(args):
                return self.traced(*args)
            raise

    def traced(self, *args: Any, exact: bool = False) -> Any:
        """Compute it under a compiler, mode or transform, and for subclasses.

        ``exact``: whether compilers must keep the layouts that they traced.
        """
        args = self._with_state(args[: self._count])
        if dispatch.is_dynamo_compiling():
            tell_inductor()
        if self._by_parts is not None:
            if not torch.compiler.is_compiling() and (
                dispatch.functorch() or dispatch.forward_mode()
            ):
                return self._by_parts(*args)
        elif dispatch.functorch() and self._transform is not None:
            return self._transform.apply(*self._flat(args))
        return (self.exact if exact else self.overload)(*args)

    def _with_state(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with a Philox state of numbers as the tensor that operators take."""
        at = self._seed
        if at is None or type(args[at]) is not tuple:
            return args
        seed = random.as_tensor(args[at], args[0].device)
        return (*args[:at], seed, *args[at + 1 :])

    def eager(self, *args: Any) -> Any:
        """Compute it by the kernel at once: the caller knows that nothing is tracing."""
        if self._by_parts is not None and dispatch.forward_mode():
            return self._by_parts(*args)
        if self._list is not None:
            if self._differentiated(args):
                # torch's own apply() unwraps what torch.func transforms have left.
                left = any(map(dispatch.is_wrapped, args[self._list]))
                apply: Callable[..., Any] = self._function.apply if left else self.apply
                return apply(*self._flat(args))
        else:  # as differentiated(), without a call for it: most of what small tensors cost
            k = self._tensors
            if torch.is_grad_enabled():
                for t in args[:k]:
                    if t is not None and t.requires_grad:
                        return self.apply(*args[:k], args[k:])
            if dispatch.forward_mode():
                return self.apply(*args[:k], args[k:])
        return self.kernel(*args)

    def to(self, target: Tensor | None, *args: Any) -> Tensor:
        """Compute it as ``eager`` does: as a new tensor, into another, or over the argument."""
        if target is None:
            return self.eager(*args)  # type: ignore[no-any-return]
        return self.in_place(*args) if target is args[0] else self.into(target, *args)

    def into(self, out: Tensor, *args: Any) -> Tensor:
        """Write the result into ``out``; no gradient."""
        self.kernel(*args, out=out)
        return written(out)

    def in_place(self, *args: Any) -> Tensor:
        """Write the result over the first argument."""
        x: Tensor = args[0]
        k = self._tensors
        if dispatch.forward_mode():
            y = self.eager(*args)
            return x.copy_(y if isinstance(y, Tensor) else y[0])
        if self._differentiated(args):
            result: Tensor = self._function_in_place.apply(*args[:k], args[k:])
            return result
        return self.into(x, *args)

    def _differentiated(self, args: tuple[Any, ...]) -> bool:
        if self._list is None:
            return differentiated(*args[: self._tensors])
        return differentiated(*[args[i] for i in self._single], *args[self._list])

    def _flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with a list of tensors laid out at their end."""
        if self._list is None:
            return args
        at = self._list
        return (*args[:at], len(args[at]), *args[at + 1 :], *args[at])

    def _folded(self, flat: tuple[Any, ...], length: int | None = None) -> tuple[Any, ...]:
        """Return the arguments of which :meth:`_flat` was made; for tangents, give the length."""
        if self._list is None:
            return flat
        at = self._list
        end = len(flat) - (flat[at] if length is None else length)
        return (*flat[:at], list(flat[end:]), *flat[at + 1 : end])

    def _flat_gradients(self, found: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        """Return the gradients of the flat arguments, of which there are ``count``."""
        at = self._list
        assert at is not None
        front = (*found[:at], None, *found[at + 1 :])
        return (*front, *(None,) * (count - len(front) - len(found[at])), *found[at])


_Function = type[torch.autograd.Function]


def _functions(
    op: Operator,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., tuple[Any, ...]],
    tangent: Callable[..., Any] | None,
    row_major: bool,
) -> tuple[_Function, _Function, _Function]:
    """Return the autograd functions of an operation: eager, eager in place, and for torch.func."""
    kernel, with_list = op.kernel, op._list is not None
    #: For the arguments that have no gradient; torch takes more of them than there are arguments.
    nones = (None,) * (op._count + 1)

    def forward(ctx: Any, *tensors: Any) -> Any:
        args = (*tensors[:-1], *tensors[-1])
        output = kernel(*args)
        save(ctx, args, output)
        return output

    def forward_of_list(ctx: Any, *flat: Any) -> Any:
        ctx.count, ctx.length = len(flat), flat[op._list]  # type: ignore[index]
        args = op._folded(flat)
        output = kernel(*args)
        save(ctx, args, output)
        return output

    def forward_in_place(ctx: Any, *tensors: Any) -> Any:
        args = (*tensors[:-1], *tensors[-1])
        ctx.mark_dirty(args[0])
        save(ctx, args, kernel(*args, out=args[0]))
        return args[0]

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = gradient(ctx, *grads)
        return op._flat_gradients(found, ctx.count) if with_list else (*found, *nones)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if tangent is None:
            raise NotImplementedError(f"fusereg.{op.name} has no derivative in forward mode")
        if dispatch.nested_jvp() and not op.linear:
            # What was kept has lost the tangents of the outer transform.
            raise NotImplementedError(
                f"fusereg.{op.name} has no second derivative by forward mode over forward mode; "
                "use jacfwd(jacrev(f)), as torch.func.hessian does"
            )
        return tangent(ctx, *(op._folded(tangents, ctx.length) if with_list else tangents))

    def transform_forward(*args: Any) -> Any:
        if row_major:
            args = (args[0].contiguous(), *args[1:])
        result = op.overload(*(op._folded(args) if with_list else args))
        return tuple(result) if isinstance(result, list) else result

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if op._list is not None:
            ctx.count, ctx.length = len(inputs), inputs[op._list]
            inputs = op._folded(inputs)
        save(ctx, inputs, output)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # A call for each sample: its draws and its reductions are those that it has alone.
        results = [
            made[2].apply(
                *(
                    a.select(d, i) if isinstance(d, int) else a
                    for a, d in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(r) for r in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    def function(suffix: str, methods: dict[str, Callable[..., Any]]) -> _Function:
        words = "".join(w.capitalize() for w in op.name.split("_"))
        members = {name: staticmethod(m) for name, m in methods.items()}
        return type(words + suffix, (torch.autograd.Function,), members)

    eager = {"forward": forward_of_list if with_list else forward, "backward": backward, "jvp": jvp}
    transform = {"forward": transform_forward, "setup_context": setup_context, "vmap": vmap}
    made = (
        function("", eager),
        function("InPlace", {"forward": forward_in_place, "backward": backward}),
        function("Transform", {**transform, "backward": backward, "jvp": jvp}),
    )
    for one in made[:2]:
        dispatch.call_at_once(one, backward)
    return made
