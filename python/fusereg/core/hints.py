"""Hints for users who know the names of torch, Keras, Lightning or timm."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def install(package: str) -> None:
    """Let the faces name what is meant by a name that they don't have.

    Set here, not written in them: a type checker takes any name from a module that has the method.
    """
    for name, torchs in (
        ("nn", torch.nn),
        ("functional", torch.nn.functional),
        ("optim", torch.optim),
    ):
        module = sys.modules[f"{package}.{name}"]
        vars(module)["__getattr__"] = functools.partial(_missing, module, torchs)


def _missing(module: Any, torchs: Any, name: str) -> Any:
    text = f"module {module.__name__!r} has no attribute {name!r}"
    if name[0] != "_":
        names = {known.lower(): known for known in module.__all__}
        if hasattr(torchs, name):
            text += f"; use {torchs.__name__}.{name}, which goes with all of fusereg"
        elif close := difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.75):
            text += f"; did you mean {names[close[0]]}?"
    raise AttributeError(text)


def check_names(
    op: str, given: Iterable[str], known: Iterable[str], elsewhere: Mapping[str, str]
) -> None:
    """Raise TypeError for a name of an argument that is not known, and say what may be meant."""
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = elsewhere.get(name) or (f"did you mean {close[0]}?" if close else "")
            raise TypeError(f"{op}: unknown argument {name!r}" + (hint and f"; {hint}"))


def explains(
    op: str | Callable[[Any], str], elsewhere: Mapping[str, str]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that says more of arguments that do not fit than Python does.

    Args:
        op: the function's name for the message, or what returns it for the first argument.
        elsewhere: arguments of other libraries' functions, and what to do instead.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        known = list(signature.parameters)
        others = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

        @functools.wraps(function)
        def explained(*args: P.args, **given: P.kwargs) -> T:
            where = op if isinstance(op, str) else op(args[0])
            if not others:
                # One of several constructors that pass arguments on knows the class's, too.
                more = () if isinstance(op, str) else inspect.signature(type(args[0])).parameters
                check_names(where, given, [*known, *more], elsewhere)
            try:
                signature.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{where}: {error}") from None
            return function(*args, **given)

        return explained

    return decorate
