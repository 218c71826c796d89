"""Runs torch's databases of samples and errors against fusereg, and writes the differences' table.

    python docs/scripts/databases.py            # rewrites docs/migration.md if it is out of date
    python docs/scripts/databases.py --check    # says whether it is, and fails if so

torch tests its modules, functions and optimizers with the samples and error inputs of
``torch.testing._internal``. Here each of them is called twice, by torch's name and by fusereg's of
the same name, and results, gradients, states, warnings and errors are compared. What differs must
be one of ``REASONS``; a difference that is none, and a reason for which nothing differs, fail.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import fusereg

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "migration.md"
_BLOCK = re.compile(r"(<!-- databases -->\n).*?(<!-- end databases -->)", re.DOTALL)

#: float32 and float64, and a dtype of 16 bits.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Largest difference from torch's result, relative to its largest magnitude, or to 1 where that
#: is smaller: torch rounds as well.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}


class Reason(NamedTuple):
    torch: str
    fusereg: str
    why: str


#: Key of a difference -> what torch does, what fusereg does, and why it stays.
REASONS = {
    "no channels": Reason(
        "`batch_norm` of an empty tensor of one dimension returns it",
        "`ValueError`",
        "there is no dimension of channels",
    ),
    "words": Reason(
        "the error has torch's words",
        "an error of the same class begins with `fusereg.` and the name of the call, the argument "
        "and what came",
        "all of fusereg's errors have one form",
    ),
    "differentiable": Reason(
        "`differentiable=True` records the step for autograd",
        "`ValueError`, which names torch's optimizer",
        "the step is one kernel, which autograd does not see",
    ),
    "complex": Reason(
        "complex parameters",
        "`ValueError`",
        "a penalty of a complex weight has more than one meaning",
    ),
    "state dtype": Reason(
        "states of 16-bit parameters have 16 bits",
        "they are float32",
        "a 16-bit average of squares loses small gradients; `state_dict`s load both ways",
    ),
    "tensors with foreach": Reason(
        "a tensor as `lr` or in `betas` is refused with `foreach=True` and without `capturable`",
        "taken",
        "the kernel reads the tensor where it lies; `foreach` is ignored",
    ),
    "mixed betas": Reason(
        "`betas` of a number and a tensor are refused",
        "taken",
        "each is read by itself",
    ),
}


class Difference(NamedTuple):
    key: str
    name: str
    case: str


# --- comparing ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of a call: its result or its error, and the classes of its warnings."""

    result: Any
    error: Exception | None
    warned: list[type[Warning]]


def outcome(call: Callable[[], Any], seed: int = 1) -> Outcome:
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = call(), None
        except Exception as raised:  # whatever torch raises is what is compared
            result, error = None, raised
    return Outcome(result, error, [w.category for w in caught])


def error_difference(ours: Outcome, theirs: Outcome, words: str | None = None) -> str | None:
    """Return the key of what differs between two outcomes of which one at least is an error."""
    if ours.error is None or theirs.error is None:
        return f"torch: {theirs.error!r}, fusereg: {ours.error!r}"
    if type(ours.error) is not type(theirs.error):
        return f"torch: {theirs.error!r}, fusereg: {ours.error!r}"
    if words is None:
        words = re.escape(str(theirs.error))
    return None if re.search(words, str(ours.error)) else "words"


def values_differ(ours: Any, theirs: Any) -> str | None:
    """Return in what two results differ; None if they do not."""
    try:
        for a, b in zip(as_list(ours), as_list(theirs), strict=True):
            if isinstance(b, Tensor):
                assert a.shape == b.shape, "shape"
                assert a.dtype is b.dtype, "dtype"
                assert a.stride() == b.stride(), f"stride {a.stride()}, torch {b.stride()}"
                a, b = a.detach(), b.detach()
                bound = 0.0
                if b.dtype in TOLERANCES and b.numel():
                    bound = TOLERANCES[b.dtype] * max(1.0, b.nan_to_num().abs().max().item())
                torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=bound)
            else:
                assert a == b
    except AssertionError as error:
        return str(error).strip().partition("\n")[0] or "values"
    return None


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# --- functions ------------------------------------------------------------------------------------

#: Entries of the database whose function fusereg has under the same name.
OPS = [
    entry
    for entry in op_db
    if entry.name.startswith("nn.functional.")
    and entry.name.removeprefix("nn.functional.") in fusereg.functional.__all__
    and entry.variant_test_name != "without_cudnn"  # the same samples once more
]


def _drops(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether the result depends on random numbers."""
    training = bool(kwargs.get("training", "alpha" not in name))
    return "dropout" in name and training and 0 < kwargs.get("p", 0.5) < 1


def _random_differ(name: str, ours: Tensor, theirs: Tensor, x: Tensor, p: float) -> str | None:
    """Compare two results of which different elements are dropped.

    What is kept has torch's value; what is dropped too.
    """
    for what in ("shape", "dtype"):
        if getattr(ours, what) != getattr(theirs, what):
            return what
    if ours.stride() != theirs.stride():
        return f"stride {ours.stride()}, torch {theirs.stride()}"
    # The kernels' probability is a multiple of 2^-16.
    bound = max(2e-3, TOLERANCES[ours.dtype])
    if "alpha" in name:
        limit = -1.7580993408473766
        a = ((1 - p) * (1 + p * limit**2)) ** -0.5
        kept, dropped = a * x - a * p * limit, torch.full_like(x, a * limit - a * p * limit)
    else:
        kept, dropped = x / (1 - p), torch.zeros_like(x)
    for y in (ours, theirs):
        is_kept = torch.isclose(y, kept, bound, bound)
        if not (is_kept | torch.isclose(y, dropped, bound, bound)).all():
            return "values"
    return None


def op_differences(entry: Any, dtype: torch.dtype) -> Iterator[Difference]:
    name = entry.name.removeprefix("nn.functional.")
    ours, theirs = getattr(fusereg.functional, name), getattr(nn.functional, name)
    torch.manual_seed(0)
    float_grad = dtype.is_floating_point and dtype is not torch.bfloat16
    for i, sample in enumerate(entry.reference_inputs("cpu", dtype, requires_grad=float_grad)):
        case = f"{entry.full_name}, {dtype}, sample {i}"

        def called(
            function: Callable[..., Any], sample: Any = sample
        ) -> tuple[list[Any], Tensor, Sequence[Any]]:
            values, args, kwargs = copy_of((sample.input, sample.args, sample.kwargs))
            y = function(values, *args, **kwargs)
            kept = [y, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))]
            leaves = [t for t in (values, *kept[1:]) if t is not None and t.requires_grad]
            grads: list[Any] = []
            if leaves and y.requires_grad and not _drops(name, kwargs):
                grads = list(torch.autograd.grad(y, leaves, y.detach().cos(), allow_unused=True))
            return [*kept, *grads], values, leaves

        mine, wanted = outcome(lambda: called(ours)), outcome(lambda: called(theirs))
        if wanted.error is None and "at least 2 dimensions" in str(mine.error):
            key: str | None = "no channels"
        elif mine.error is not None or wanted.error is not None:
            key = error_difference(mine, wanted)
        elif mine.warned != wanted.warned:
            key = f"warnings {mine.warned}, torch {wanted.warned}"
        elif _drops(name, sample.kwargs):
            y, x, _ = mine.result[0][0], mine.result[1], None
            p = sample.kwargs.get("p", 0.5)
            key = _random_differ(name, y.detach(), wanted.result[0][0].detach(), x.detach(), p)
        else:
            key = values_differ(mine.result[0], wanted.result[0])
        if key:
            yield Difference(key, f"functional.{name}", case)


def copy_of(value: Any) -> Any:
    """Return a structure with copies of its tensors, which have the same strides."""

    def copied(t: Tensor) -> Tensor:
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return new.copy_(t.detach()).requires_grad_(t.requires_grad)

    return torch.utils._pytree.tree_map_only(Tensor, copied, value)


def doubled(given: Any) -> Any:
    """Return a module's input with its floating-point tensors in float64."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    new = copy.copy(given)
    for name in ("constructor_input", "forward_input"):
        part = copy.copy(getattr(given, name))
        mapped = torch.utils._pytree.tree_map_only(Tensor, wide, (part.args, part.kwargs))
        part.args, part.kwargs = mapped
        setattr(new, name, part)
    return new


def _error(y: Tensor, exact: Tensor) -> float:
    return float((y.detach().double() - exact).abs().max()) if y.numel() else 0.0


# --- modules --------------------------------------------------------------------------------------

MODULES = [m for m in module_db if m.module_cls.__name__ in fusereg.nn.__all__]


def module_differences(info: Any, dtype: torch.dtype) -> Iterator[Difference]:
    name = info.module_cls.__name__
    ours, theirs = getattr(fusereg.nn, name), info.module_cls
    has_dtype = "dtype" in inspect.signature(theirs).parameters
    factory = {"dtype": dtype} if has_dtype else {}

    def called(cls: Any, given: Any, training: bool) -> list[Any]:
        built, call = given.constructor_input, given.forward_input
        module = cls(*built.args, **built.kwargs, **factory).train(training)
        args, kwargs = copy_of((call.args, call.kwargs))
        y = module(*args, **kwargs)
        leaves = [t for t in (*args, *module.parameters()) if t.requires_grad]
        # Not a function of y, whose rounding it would enlarge where y is a sum.
        incoming = torch.arange(y.numel()).cos().view(y.shape).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, incoming) if leaves else ()
        return [y, *module.state_dict().values(), *module.state_dict(), repr(module), *grads]

    torch.manual_seed(0)
    for training in (True, False):
        inputs = info.module_inputs_func(info, "cpu", dtype, True, training)
        errors = (
            []
            if info.module_error_inputs_func is None
            else info.module_error_inputs_func(info, "cpu", dtype, True, training)
        )
        rows = [(s, None) for s in inputs]
        rows += [(e.module_error_input, e.error_regex) for e in errors]
        for i, (given, words) in enumerate(rows):
            mine = outcome(partial(called, ours, given, training))
            wanted = outcome(partial(called, theirs, given, training))
            if mine.error is not None or wanted.error is not None:
                key = error_difference(mine, wanted, words)
            elif mine.warned != wanted.warned:
                key = f"warnings {mine.warned}, torch {wanted.warned}"
            else:
                key = values_differ(mine.result, wanted.result)
                if key and dtype is torch.bfloat16:
                    # A sum of 16-bit terms that cancel: torch's may be the one that is off.
                    exact = called(theirs, doubled(given), training)[0].detach()
                    if _error(mine.result[0], exact) <= _error(wanted.result[0], exact):
                        key = values_differ(mine.result[1:], wanted.result[1:])
            if key:
                mode = "training" if training else "evaluation"
                yield Difference(key, f"nn.{name}", f"nn.{name}, {dtype}, {mode}, sample {i}")


# --- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS = [o for o in optim_db if hasattr(fusereg.optim, o.optim_cls.__name__)]


def _trained(cls: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> list[Any]:
    """Return parameters and states after three steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5,), ())
    params = [
        torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for s in shapes
    ]
    optimizer = cls(params, **copy.deepcopy(kwargs))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(dtype)
        optimizer.step()
    found: list[Any] = [p.detach() for p in params]
    for state in optimizer.state_dict()["state"].values():
        for key in sorted(state):
            found += [key, state[key]]
    return found


def optimizer_differences(info: Any, dtype: torch.dtype) -> Iterator[Difference]:
    name = info.optim_cls.__name__
    ours, theirs = getattr(fusereg.optim, name), info.optim_cls
    samples = _get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, info)
    for given in samples:
        kwargs = given.kwargs
        mine = outcome(partial(_trained, ours, kwargs, dtype))
        wanted = outcome(partial(_trained, theirs, kwargs, dtype))
        if kwargs.get("differentiable") and isinstance(mine.error, ValueError):
            key: str | None = "differentiable"
        elif mine.error is not None or wanted.error is not None:
            key = error_difference(mine, wanted)
        elif dtype is torch.bfloat16:
            key = values_differ(mine.result[:3], wanted.result[:3])
            pairs = zip(mine.result[3:], wanted.result[3:], strict=True)
            if key is None and any(
                isinstance(a, Tensor) and a.dtype is not b.dtype for a, b in pairs
            ):
                key = "state dtype"
        else:
            key = values_differ(mine.result, wanted.result)
        if key:
            yield Difference(key, f"optim.{name}", f"optim.{name}, {dtype}, {given.desc}, {kwargs}")


def optimizer_error_differences(info: Any) -> Iterator[Difference]:
    name = info.optim_cls.__name__
    ours, theirs = getattr(fusereg.optim, name), info.optim_cls

    def called(cls: Any, given: Any, at_step: bool) -> None:
        params = given.params
        if params is None:
            params = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3))]
        optimizer = cls(params, **given.kwargs)
        if at_step:
            optimizer.step()

    for row in info.optim_error_inputs_func("cpu", torch.float32):
        given, at_step = row.optimizer_error_input, row.error_on is OptimizerErrorEnum.STEP_ERROR
        mine = outcome(partial(called, ours, given, at_step))
        wanted = outcome(partial(called, theirs, given, at_step))
        if row.error_type is UserWarning:
            key = None if mine.warned == wanted.warned else "warnings"
        elif mine.error is None and given.kwargs.get("foreach"):
            key = "tensors with foreach"
        elif mine.error is None and "betas" in given.kwargs:
            key = "mixed betas"
        else:
            key = error_difference(mine, wanted, row.error_regex)
        if key:
            yield Difference(key, f"optim.{name}", f"optim.{name}: {given.desc}")


def complex_differences(info: Any) -> Iterator[Difference]:
    name = info.optim_cls.__name__
    mine = outcome(lambda: _trained(getattr(fusereg.optim, name), {}, torch.complex64))
    wanted = outcome(lambda: _trained(info.optim_cls, {}, torch.complex64))
    if isinstance(mine.error, ValueError) and wanted.error is None:
        yield Difference("complex", f"optim.{name}", f"optim.{name}, complex64")


def wide_step_differences(info: Any) -> Iterator[Difference]:
    """Look at the states' dtypes under a default dtype of float64."""
    name = info.optim_cls.__name__
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = [
            _trained(cls, {}, torch.float64)
            for cls in (getattr(fusereg.optim, name), info.optim_cls)
        ]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(*found, strict=True):
        if isinstance(b, Tensor) and a.dtype is not b.dtype:
            key = f"{a.dtype}, torch {b.dtype}"
            yield Difference(key, f"optim.{name}", f"optim.{name}, default dtype float64")


# --- all ------------------------------------------------------------------------------------------


def runs() -> dict[str, list[Callable[[], Iterator[Difference]]]]:
    """Return what is run for each public name."""
    found: dict[str, list[Callable[[], Iterator[Difference]]]] = {}

    def add(name: str, compare: Callable[..., Iterator[Difference]], *arguments: Any) -> None:
        found.setdefault(name, []).append(partial(compare, *arguments))

    for entry in OPS:
        every = entry.supported_dtypes("cpu") if "without_train" in entry.full_name else DTYPES
        for dtype in sorted(every, key=str):
            add(entry.name.removeprefix("nn."), op_differences, entry, dtype)
    for module in MODULES:
        for dtype in DTYPES:
            add(module.name, module_differences, module, dtype)
    for optimizer in OPTIMIZERS:
        name = f"optim.{optimizer.optim_cls.__name__}"
        for dtype in DTYPES:
            add(name, optimizer_differences, optimizer, dtype)
        for compare in (optimizer_error_differences, wide_step_differences, complex_differences):
            add(name, compare, optimizer)
    return found


def differences(name: str) -> list[Difference]:
    """Return what differs for a public name."""
    return [difference for run in runs()[name] for difference in run()]


def unlisted(found: Iterable[Difference]) -> list[str]:
    """Return the differences that are none of ``REASONS``, in words."""
    return [f"{d.case}: {d.key}" for d in found if d.key not in REASONS]


def table(found: Iterable[Difference]) -> str:
    where: dict[str, set[str]] = {key: set() for key in REASONS}
    for difference in found:
        where.setdefault(difference.key, set()).add(difference.name)
    rows = ["| torch | fusereg | reason | where |", "| --- | --- | --- | --- |"]
    for key, reason in REASONS.items():
        names = ", ".join(f"`{name}`" for name in sorted(where[key]))
        rows.append(f"| {reason.torch} | {reason.fusereg} | {reason.why} | {names} |")
    return "\n" + "\n".join(rows) + "\n\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    check = parser.parse_args(argv).check
    found = [difference for name in runs() for difference in differences(name)]
    for text in unlisted(found):
        print(text)
    text = PAGE.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda m: m[1] + table(found) + m[2], text)
    if new != text:
        print(f"{PAGE.relative_to(ROOT)}: {'is out of date' if check else 'renewed'}")
        if not check:
            PAGE.write_text(new, encoding="utf-8")
    return 1 if unlisted(found) or (check and new != text) else 0


if __name__ == "__main__":
    sys.exit(main())
