"""Calls the functions of fusereg._C with whatever Python can hand them; test_robustness runs it.

    python tests/binding_fuzz.py --seed 7 --cases 2000            # some of every function
    python tests/binding_fuzz.py --seed 7 --only prox_:381        # one case again, in words

The functions and their arguments are read from _C.pyi, so a new one is called without being named
here. Most cases are the package's own calls (those that `fusereg info` makes to check each kernel)
with something about them changed: an argument or two, or all tensors alike, which are laid out in
another order of dimensions or cut to fewer elements, or none. The other cases are made from the
arguments' types.
Each case depends on nothing but the seed, the function and its number. It fails if

* the interpreter dies (whoever started this program sees that) or the error is no usual one;
* a call that was refused has changed a byte of a tensor;
* a call that was done has changed a byte that belongs to no element of its tensors.

The number of the case is in the file --progress while it runs.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import os
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import conftest  # puts the module with the CUDA kernels on the host in place, if it is to be tested
import fusereg
import fuzz_values as fv
from fusereg.cli import checks
from kernels_by_name import kernels_by_name

_C = fusereg._C

#: What a call may raise. SystemError is not among them: it means that the C++ side forgot an error.
ERRORS = (
    *(TypeError, ValueError, RuntimeError, OverflowError, IndexError, KeyError, AttributeError),
    *(MemoryError, NotImplementedError, BufferError, ImportError, fv.HostileError),
)


class Argument(NamedTuple):
    name: str
    type: str  # as it is written in _C.pyi
    required: bool


def signatures() -> dict[str, list[Argument]]:
    """Each function's arguments, as _C.pyi has them."""
    stub = Path(fusereg.__file__).with_name("_C.pyi").read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef):
            required = len(node.args.args) - len(node.args.defaults)
            found[node.name] = [
                Argument(a.arg, ast.unparse(a.annotation or ast.Constant(None)), i < required)
                for i, a in enumerate(node.args.args)
            ]
    return found


def exported() -> set[str]:
    return {n for n in dir(_C) if callable(getattr(_C, n)) and not n.startswith("_")}


# --- the package's own calls ----------------------------------------------------------------------

Call = tuple[Any, ...]
CALLS_KEPT = 12  # of a function


def recorded_calls() -> dict[str, list[Call]]:
    """Return what the checks of `fusereg info` pass to the compiled functions."""
    calls: dict[str, list[Call]] = {}

    def recorder(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            kept = calls.setdefault(name, [])
            if len(kept) < CALLS_KEPT:
                kept.append(fv.copied(args, {}))
            return function(*args)

        return record

    originals = {name: getattr(_C, name) for name in exported()}
    try:
        for name, function in originals.items():
            setattr(_C, name, recorder(name, function))
        with kernels_by_name():
            for operation in checks.OPERATIONS:
                operation.check(checks.Inputs(torch.device("cpu")))
    finally:
        for name, function in originals.items():
            setattr(_C, name, function)
    return calls


# --- cases ----------------------------------------------------------------------------------------


class Case:
    """One call: the arguments, by position and by name."""

    def __init__(self, name: str, index: int, seed: int, own: list[Call]) -> None:
        self.name = name
        self.rng = random.Random(f"{seed}:{name}:{index}")
        torch.manual_seed(self.rng.getrandbits(32))
        self.isa = self.rng.choice(_C.cpu_isas())
        self.named: dict[str, Any] = {}
        if own and self.rng.random() < 0.75:
            call = self.rng.choice(own)
            together = self.rng.random() < 0.6
            args = list(fv.changed_together(self.rng, call) if together else fv.copied(call, {}))
            for _ in range(self.rng.choice((0, 0, 0, 1) if together else (0, 1, 1, 1, 1, 2, 3))):
                at = self.rng.randrange(len(args)) if args else 0
                if args:
                    args[at] = self.changed(args[at], args)
        else:
            self.shape = self.rng.choice(fv.SHAPES)
            self.dtype = self.rng.choice(fv.FLOATS)
            args = [
                self.made(a) for a in signatures()[name] if a.required or self.rng.random() < 0.5
            ]
        if self.rng.random() < 0.03:
            self.miscount(args)
        self.args = args

    def miscount(self, args: list[Any]) -> None:
        """Too few, too many, or named as nobody should."""
        how = self.rng.randrange(4)
        if how == 0 and args:
            del args[self.rng.randrange(len(args))]
        elif how == 1:
            args.insert(self.rng.randrange(len(args) + 1), fv.hostile(self.rng))
        elif how == 2:
            self.named = {"nobody": 1}
        elif args:
            self.named = {
                self.rng.choice(signatures()[self.name] or [Argument("x", "", True)])[0]: 1
            }

    def made(self, a: Argument) -> Any:
        """A value of the argument's type, mostly."""
        rng = self.rng
        if rng.random() < 0.06:
            return fv.hostile(rng)
        if "None" in a.type and rng.random() < 0.3:
            return None
        if a.type.startswith("type["):
            return rng.choice([Tensor, torch.nn.Parameter, int, fv.HostileTensor])
        if "Sequence" in a.type or a.type == "_Strength":
            if a.type == "_Strength" and rng.random() < 0.6:
                return rng.random()
            count = rng.choice((0, 1, 2, 2, 3))
            if "Tensor" not in a.type and "dict" not in a.type:
                return [rng.random() for _ in range(count)]
            return [
                self.tensor() if "Tensor" in a.type else {"step": self.tensor()}
                for _ in range(count)
            ]
        if "tuple" in a.type:
            return tuple(rng.choice(fv.NUMBERS) for _ in range(rng.choice((0, 1, 3, 4, 4))))
        if "Tensor" in a.type and ("int" not in a.type or rng.random() < 0.1):
            return self.tensor()
        if a.type == "str":
            return rng.choice([*fv.STRINGS, "penalty", "float32"])
        if a.type == "bool":
            return rng.random() < 0.5
        if a.type == "float":
            return rng.choice([rng.random(), rng.choice(fv.NUMBERS)])
        if "int" in a.type:
            return rng.choice([rng.randrange(4), rng.randrange(40), rng.choice(fv.NUMBERS)])
        return fv.hostile(rng)

    def tensor(self) -> Any:
        """Of the call's shape and dtype, mostly."""
        rng = self.rng
        t = fv.ordinary(rng, self.shape, self.dtype)
        if rng.random() < 0.05:
            t = torch.nn.Parameter(t)
            t.grad = fv.ordinary(rng, self.shape, self.dtype)
        return fv.relative(rng, t) if rng.random() < 0.15 else t

    def changed(self, value: Any, args: list[Any]) -> Any:
        """The same with something changed, at any depth."""
        rng = self.rng
        if rng.random() < 0.08:
            return None
        if type(value) in (list, tuple, dict) and len(value) and rng.random() < 0.6:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            at = rng.choice(keys)
            items: Any = dict(value) if isinstance(value, dict) else list(value)
            items[at] = self.changed(value[at], args)
            return tuple(items) if isinstance(value, tuple) else items
        if type(value) in (list, tuple) and rng.random() < 0.7:
            return self.changed_list(list(value), type(value) is tuple, args)
        if type(value) is dict and rng.random() < 0.8:
            return self.changed_dict(value, args)
        if type(value) in (Tensor, torch.nn.Parameter) and rng.random() < 0.75:
            if rng.random() < 0.15:  # another tensor of the call, so that two arguments are one
                return rng.choice(list(fv.tensors_in(list(args))))
            if value.is_leaf and value.grad is not None and rng.random() < 0.5:
                value.grad = self.new_grad(value)
                return value
            return fv.relative(rng, value.detach())
        if type(value) in (int, float, bool) and rng.random() < 0.8:
            return rng.choice(fv.NUMBERS)
        if rng.random() < 0.1:
            return fv.Emptying(rng.choice([a for a in args if type(a) is list] or [[]]))
        return fv.hostile(rng)

    def new_grad(self, value: Tensor) -> Tensor | None:
        try:
            value.grad = (
                fv.relative(self.rng, value.grad.detach()) if value.grad is not None else None
            )
        except (RuntimeError, TypeError):
            value.grad = None
        return value.grad

    def changed_list(self, items: list[Any], as_tuple: bool, args: list[Any]) -> Any:
        rng = self.rng
        how = rng.randrange(8)
        if how == 0 and items:
            items.pop()
        elif how == 1:
            items.append(rng.choice(items) if items and rng.random() < 0.5 else fv.hostile(rng))
        elif how == 2:
            items.clear()
        elif how == 3 and items:
            items[rng.randrange(len(items))] = fv.Emptying(items)
        elif how == 4 and items:  # empties another argument while this one is read
            victims = [a for a in args if type(a) is list]
            items[rng.randrange(len(items))] = fv.Emptying(rng.choice(victims or [items]))
        elif how == 5:
            return rng.choice([iter, fv.LyingList, fv.HostileList, lambda x: {"a": x}])(items)
        elif how == 6:
            return [0.5] * len(items)
        else:
            rng.shuffle(items)
        return tuple(items) if as_tuple != (rng.random() < 0.1) else items

    def changed_dict(self, value: dict[Any, Any], args: list[Any]) -> dict[Any, Any]:
        rng = self.rng
        how = rng.randrange(3)
        items = dict(value)
        if how == 0 and items:
            del items[rng.choice(list(items))]
        elif how == 1 and items:  # compared with every key that is looked up
            key = fv.EmptyingKey(rng.choice(list(items)))
            items = {key: 1, **{k: v for k, v in items.items() if not str.__eq__(key, k)}}
            key.victims = (items, *(a for a in args if type(a) is list))
        else:
            items["more"] = fv.hostile(rng)
        return items

    # --- running it ---

    def run(self) -> str:
        """How the call ended; raises Failure if it should not have ended so."""
        _C.set_cpu_isa(self.isa)
        memory = Memory(fv.tensors_in([*self.args, *self.named.values()]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = getattr(_C, self.name)(*self.args, **self.named)
        except ERRORS as error:
            memory.check(nothing=True)
            return type(error).__name__
        except BaseException as error:
            raise Failure(f"raised {type(error).__name__}: {error}") from error
        memory.check(nothing=isinstance(result, int) and result != 0)
        return f"status {result}" if type(result) is int and -1 <= result < 8 else "a value"

    def describe(self) -> str:
        lines = [f"_C.{self.name}, instruction set {self.isa}"]
        names = [a.name for a in signatures()[self.name]]
        names += ["?"] * len(self.args)
        lines += [f"  {n} = {in_words(a)}" for n, a in zip(names, self.args, strict=False)]
        lines += [f"  {n} = {in_words(a)} (by name)" for n, a in self.named.items()]
        return "\n".join(lines)


class Failure(AssertionError):
    pass


class Memory:
    """The bytes of some tensors, and which of them belong to no element."""

    def __init__(self, tensors: Any) -> None:
        self.parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for t in tensors:
            if not fv.has_memory(t):
                continue
            plain = t.detach()
            storage = plain.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            address = storage.data_ptr()
            if address not in self.parts:
                self.parts[address] = (
                    whole,
                    whole.clone(),
                    torch.ones(len(whole), dtype=torch.bool),
                )
            size = plain.element_size()
            outside = self.parts[address][2].as_strided(
                (*[n if s else 1 for n, s in zip(plain.shape, plain.stride(), strict=True)], size),
                (*[s * size for s in plain.stride()], 1),
                plain.storage_offset() * size,
            )
            outside.fill_(False)

    def check(self, nothing: bool) -> None:
        for whole, before, outside in self.parts.values():
            if torch.equal(whole, before):
                continue
            if nothing:
                raise Failure("the call was refused, and yet it has written")
            if not torch.equal(whole[outside], before[outside]):
                raise Failure("the call has written outside of its tensors")


def in_words(value: Any) -> str:
    if issubclass(type(value), Tensor):
        if value.layout is not torch.strided or type(value) not in (Tensor, torch.nn.Parameter):
            return f"{type(value).__name__}, {value.layout}"
        grad = f", grad: {in_words(value.grad)}" if value.is_leaf and value.grad is not None else ""
        where = f"{tuple(value.shape)} {tuple(value.stride())} {value.dtype} {value.device}"
        return f"{type(value).__name__} {where}{grad}"
    if type(value) in (list, tuple):
        return f"{type(value).__name__}[{', '.join(map(in_words, value))}]"
    if type(value) is dict:
        return "{" + ", ".join(f"{k!s:.20}: {in_words(v)}" for k, v in value.items()) + "}"
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"<{type(value).__name__}>"


def main() -> int:
    parse = argparse.ArgumentParser()
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--cases", type=int, default=2000, help="of all functions together")
    parse.add_argument("--only", help="FUNCTION, or FUNCTION:NUMBER for one case in words")
    parse.add_argument("--own-calls", action="store_true", help="the package's calls, unchanged")
    parse.add_argument("--after", help="FUNCTION:NUMBER of the last case to be left out")
    parse.add_argument("--progress", type=Path, default=Path(os.devnull))
    options = parse.parse_args()
    faulthandler.enable()
    # pybind11 prints the arguments that fit no signature, and torch dies printing a freed tensor.
    Tensor.__repr__ = in_words  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    own = recorded_calls()
    names = sorted(signatures())
    name, _, number = (options.only or "").partition(":")
    if number:
        case = Case(name, int(number), options.seed, own.get(name, []))
        print(case.describe(), flush=True)
        print(case.run())
        return 0
    names = [name] if name else names
    if options.own_calls:
        for name, calls in own.items():
            print(name, Counter(f"status {getattr(_C, name)(*call)!r:.20}" for call in calls))
        return 0
    progress = os.open(options.progress, os.O_WRONLY | os.O_CREAT)
    failed = 0
    # A function with many arguments has more to be got wrong.
    weights = {n: 1 + len(signatures()[n]) for n in names}
    total = sum(weights.values())
    begin = 0
    if options.after:
        last, _, number = options.after.partition(":")
        names, begin = names[names.index(last) :], int(number) + 1
    for name in names:
        ends: Counter[str] = Counter()
        for index in range(begin, 1 + options.cases * weights[name] // total):
            os.pwrite(progress, f"{name}:{index}\n".ljust(80).encode(), 0)
            case = Case(name, index, options.seed, own.get(name, []))
            try:
                ends[case.run()] += 1
            except Failure as failure:
                failed += 1
                print(f"--- {name}:{index} {failure}\n{case.describe()}", flush=True)
                if failure.__cause__ is not None:
                    traceback.print_exception(failure.__cause__)
        begin = 0
        print(name, *(f"{how} {n}," for how, n in ends.most_common()), flush=True)
    print("finished")
    return int(failed > 0)


if __name__ == "__main__":
    assert conftest is not None
    sys.exit(main())
