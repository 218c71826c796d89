"""Objects that stand for what a forward uses while it is traced, other than its tensors.

Forward sees stand-ins alone. Each gives what the tracer knows and can record, and refuses whatever
else Python lets code ask of an object: what is not refused here would be answered for the stand-in.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, fx, nn

from .proxies import Standin, refuse


class Found(Enum):
    """Results of a read that are not values."""

    NOTHING = "no attribute"
    MODULE = "a module"
    TENSOR = "a tensor"


#: The name of a read that holds as long as a module's children are different modules.
DISTINCT = "distinct children"

_SCALARS = (bool, int, float, complex, str, type(None), type(...))
PLAIN = (*_SCALARS, torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
#: What ``isinstance`` may ask of a tensor, besides whether it is one: no tensor is any of these.
NO_TENSORS = (list, tuple, dict, set, str, bool, int, float, complex, type(None))


def is_plain(value: object) -> bool:
    """Return whether a value cannot change without being replaced."""
    return all(map(is_plain, value)) if type(value) is tuple else type(value) in PLAIN


attribute_of = object.__getattribute__


def _children(module: Any) -> list[Any]:
    """Stand for the children of a module, which are different modules."""
    tracer, (of, path) = attribute_of(module, "_tracer"), attribute_of(module, "_of")
    if type(of).named_children is not nn.Module.named_children:
        refuse(f"{type(of).__name__} has its own way of listing its children")
    names, children = tuple(of._modules), list(of._modules.values())
    if None in children or len({*map(id, children)}) != len(children):
        refuse("it goes through children of which one is None or occurs twice")
    tracer.read(path, "_modules", names)
    tracer.read(path, DISTINCT, len(names))
    return [Module._child(module, name) for name in names]


def _items(module: Any) -> list[tuple[str, Any]]:
    tracer, (of, path) = attribute_of(module, "_tracer"), attribute_of(module, "_of")
    tracer.read(path, "_modules", tuple(of._modules))
    return [(name, Module._child(module, name)) for name in of._modules]


#: Functions of torch that ask a module for those in it, and what stands for them.
GO_THROUGH: dict[Any, Callable[[Any], Any]] = {
    nn.Module.children: lambda module: iter(_children(module)),
    nn.Module.named_children: lambda module: iter(
        list(zip(attribute_of(module, "_of")[0]._modules, _children(module), strict=True))
    ),
    nn.ModuleDict.items: _items,
    nn.ModuleDict.values: lambda module: [child for _, child in _items(module)],
    nn.ModuleDict.keys: lambda module: [name for name, _ in _items(module)],
}
#: The names of these functions, and of the other reads that tell what a module is made of.
STRUCTURE = {"_modules", DISTINCT, *(function.__name__ for function in GO_THROUGH)}


# --- stand-ins ------------------------------------------------------------------------------------

_CONTAINERS: tuple[type, ...] = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: The methods of a container that its stand-in has; a class with one of its own is not known.
_OF_ITEMS = "__iter__", "__len__", "__bool__", "__getitem__", "__contains__", "__reversed__"


class _Standin(Standin):
    """Stands for an object; reads of its attributes go to the tracer."""

    __slots__ = ("_of", "_tracer")
    _words: ClassVar[str] = "layers"

    def __init__(self, tracer: Any, of: Any) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_of", of)

    def __getattribute__(self, name: str) -> Any:
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(f"it sets {name}")

    def __delattr__(self, name: str) -> None:
        refuse(f"it deletes {name}")

    def __eq__(self, other: object) -> bool:
        refuse(f"it compares {type(self)._words}")

    def __hash__(self) -> int:
        refuse(f"it compares {type(self)._words}")

    def __repr__(self) -> str:
        refuse(f"it makes text of {type(self)._words}")

    __str__ = __repr__


class Python(_Standin):
    """Stands for a module of Python."""

    def __getattribute__(self, name: str) -> Any:
        return attribute_of(self, "_tracer").global_(
            vars(attribute_of(self, "_of")), name, builtin=False
        )


class Settings(_Standin):
    """Stands for an object of a model's own class, given with the way to it, such as a config."""

    _words = "objects"

    def __getattribute__(self, name: str) -> Any:
        tracer, (settings, path, within) = attribute_of(self, "_tracer"), attribute_of(self, "_of")
        said = ".".join(("self", *path, *within, name))
        own = next((vars(c)[name] for c in type(settings).__mro__ if name in vars(c)), None)
        if hasattr(type(own), "__get__") and type(own) is not types.MemberDescriptorType:
            refuse(f"it uses {said}, a {type(own).__name__}", "make it a plain value")
        value = getattr(settings, name, Found.NOTHING)
        if has_settings(value):
            return tracer.settings(value, path, (*within, name))
        tracer.read(path, name, value, within=within)
        if value is Found.NOTHING:
            raise AttributeError(f"{said} is missing")
        return tracer.admit(value, said)

    def __bool__(self) -> bool:
        refuse("it asks whether an object is true")


def has_settings(value: Any) -> bool:
    """Return whether reading attributes of an object does nothing else."""
    cls: Any = type(value)
    read = cls.__getattribute__
    usual = (
        read in (object.__getattribute__, types.SimpleNamespace.__getattribute__)
        # It knows attributes by several names.
        or getattr(read, "__module__", "") == "transformers.configuration_utils"
    )
    known = isinstance(value, (Tensor, nn.Module, types.ModuleType, Enum, *NO_TENSORS))
    return usual and not (
        known or is_plain(value) or callable(value) or hasattr(cls, "__getattr__")
    )


class Class(_Standin):
    """Stands for a class, for ``super`` and ``isinstance``."""

    _words = "classes"

    def __getattribute__(self, name: str) -> Any:
        refuse(f"it reads {name} of a class")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to make an object."""
        name = attribute_of(self, "_of").__name__
        refuse(f"it uses {name}, which may depend on more than its arguments")


class Function(_Standin):
    """Stands for a function; only calls of it are known."""

    _words = "functions"

    def __getattribute__(self, name: str) -> Any:
        refuse(f"it reads {name} of a function")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands for the function."""
        return attribute_of(self, "_of")(*args, **kwargs)


class OfNumbers(Function):
    """Stands for a function of numbers; one of a number that a tensor gives is recorded."""

    def __call__(self, *args: Any) -> Any:
        """Call the function, or record the call."""
        function = attribute_of(self, "_of")
        unknown = any(issubclass(type(a), fx.Proxy) for a in args)
        return (attribute_of(self, "_tracer").recorded(function) if unknown else function)(*args)


class Super(_Standin):
    """Stands for ``super()``."""

    def __getattribute__(self, name: str) -> Any:
        tracer, (module, cls) = attribute_of(self, "_tracer"), attribute_of(self, "_of")
        mro = type(attribute_of(module, "_of")[0]).__mro__
        for base in mro[mro.index(cls) + 1 :]:
            if name in vars(base):
                return tracer.method(module, base, name, vars(base)[name])
        return refuse(f"it reads super().{name}")


class Module(_Standin):
    """Stands for a module of torch, given with its path."""

    def __getattribute__(self, name: str) -> Any:
        return attribute_of(self, "_tracer").attribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call, or follow it."""
        return attribute_of(self, "_tracer").call(self, args, kwargs)

    def _names(self, method: str) -> list[str]:
        """Return the names of what a container holds, which one of its methods goes through."""
        tracer, (module, path) = attribute_of(self, "_tracer"), attribute_of(self, "_of")
        cls: Any = type(module)
        base = next((c for c in _CONTAINERS if issubclass(cls, c)), nn.Module)
        if base is nn.Module or any(getattr(cls, n, 0) != getattr(base, n, 0) for n in _OF_ITEMS):
            refuse(f"it iterates over {'.'.join(path) or 'itself'}, a {cls.__name__}")
        tracer.read(path, method, getattr(cls, method, Found.NOTHING))
        tracer.read(path, "_modules", tuple(module._modules))
        return list(module._modules)

    def __bool__(self) -> bool:
        module, path = attribute_of(self, "_of")
        if hasattr(type(module), "__len__") or hasattr(type(module), "__bool__"):
            return bool(Module._names(self, "__len__"))
        for name in ("__len__", "__bool__"):
            attribute_of(self, "_tracer").read(path, name, Found.NOTHING)
        return True

    def __len__(self) -> int:
        return len(Module._names(self, "__len__"))

    def __iter__(self) -> Iterator[Any]:
        names = Module._names(self, "__iter__")
        keys = isinstance(attribute_of(self, "_of")[0], nn.ModuleDict)
        return iter(names if keys else [Module._child(self, name) for name in names])

    def __getitem__(self, key: Any) -> Any:
        names = Module._names(self, "__getitem__")
        if isinstance(attribute_of(self, "_of")[0], nn.ModuleDict):
            return Module._child(self, key) if key in names else refuse(f"it has no layer {key}")
        if isinstance(key, slice):
            return [Module._child(self, name) for name in names[key]]
        return Module._child(self, names[key])

    def __contains__(self, key: Any) -> bool:
        names = Module._names(self, "__contains__")
        keys = isinstance(attribute_of(self, "_of")[0], nn.ModuleDict)
        return key in names if keys else refuse("it compares layers")

    def _child(self, name: str) -> Any:
        return attribute_of(self, "_tracer").attribute(self, name)


class Namespace(dict[str, Any]):
    """The globals of a function that is made again."""

    def __init__(self, tracer: Any, of: dict[str, Any]) -> None:
        super().__init__(__builtins__={}, __name__=of.get("__name__"))
        self.tracer, self.of = tracer, of

    def __missing__(self, name: str) -> Any:
        return self.tracer.global_(self.of, name, builtin=True)
