"""The base of every layer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from .checks import probability
from .hints import check_names

if TYPE_CHECKING:
    from typing_extensions import Self


class _ModuleName(str):
    """The name of a class's module; read from an instance, one under torch.nn.

    torch.fx records a layer as one call if the layer's ``__module__`` begins with "torch.nn", and
    otherwise runs its forward on proxies, of which no kernel can read anything. The name does not
    begin with "torch.nn.", by which torch.compile knows the layers that are built into torch.
    """

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return f"torch.nn+{self}"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # Pickles name a class by its module, in a string that must be exactly a str.
        return str, (str(self),)


class Layer(nn.Module):
    """A layer that torch.fx records as one call: symbolic_trace, feature extractors, prepare_fx.

    Raises:
        RuntimeError: by ``torch.jit.script``.
    """

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Check the arguments' names: Python's own error would name a base class."""
        if given and cls.__module__.startswith("fusereg."):
            known: set[str] = set()
            for base in (c for c in cls.__mro__ if "__init__" in vars(c)):
                own = inspect.signature(vars(base)["__init__"]).parameters
                known |= own.keys()
                if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                    break
            check_names(f"fusereg.nn.{cls.__name__}", given, sorted(known), {})
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__module__ = _ModuleName(cls.__module__)

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell torch.jit.script, which asks each module, that it cannot compile this one."""
        refuse_script(self)


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise RuntimeError, because torch.jit.script compiles the source of torch's layers alone."""
    converted = "_fusereg_original" in vars(module) or hasattr(type(module), "fusereg_original")
    remedy = (
        "call fusereg.revert(model) first" if converted else "use torch.compile or torch.export"
    )
    raise RuntimeError(
        f"torch.jit.script cannot compile fusereg's {type(module).__name__}; {remedy}"
    )


class DropLayer(Layer):
    """A layer that drops with probability p, and may write into its input."""

    def __init__(
        self, p: float | None = None, inplace: bool = False, *, keep_prob: float | None = None
    ) -> None:
        super().__init__()
        self.p = probability(p, keep_prob, f"nn.{type(self).__name__}")
        self.inplace = inplace

    def extra_repr(self) -> str:
        """Return the arguments as torch's dropout layers show them."""
        return f"p={self.p}, inplace={self.inplace}"
