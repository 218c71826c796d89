"""The base of every layer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from .checks import probability
from .hints import explains, public_class


def _public_name(layer: object) -> str:
    """Return the name under which users know a layer, or the layer of ours that it is made from."""
    name = public_class(layer).__name__
    public = name in vars(sys.modules["fusereg.nn"])["__all__"]
    return f"fusereg.nn.{name}" if public else f"fusereg.{name}"


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


def name_module(cls: type) -> None:
    """Let instances of a class say that their module is one of torch's."""
    cls.__module__ = _ModuleName(cls.__module__)


class Layer(nn.Module):
    """A layer that torch.fx records as one call: symbolic_trace, feature extractors, prepare_fx.

    Raises:
        RuntimeError: by ``torch.jit.script``.
    """

    #: Arguments of other libraries' layers, and what to do instead.
    _elsewhere: ClassVar[Mapping[str, str]] = {}
    #: What a constructor takes as ``**rules``.
    _collected: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("__init__")
        if own is not None and cls.__module__.startswith("fusereg."):
            rules = "rules" in inspect.signature(own).parameters
            explain = explains(_public_name, cls._elsewhere, cls._collected if rules else ())
            cls.__init__ = explain(own)  # type: ignore[method-assign]
        name_module(cls)

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell torch.jit.script, which asks each module, that it cannot compile this one."""
        refuse_script(self)


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise RuntimeError, because torch.jit.script compiles the source of torch's layers alone."""
    refuse(module, "torch.jit.script cannot compile", "use torch.compile or torch.export")


def refuse(module: nn.Module, what: str, remedy: str) -> NoReturn:
    """Raise RuntimeError: what a tool cannot do with a layer, unless it is made torch's again."""
    if "_fusereg_original" in vars(module) or hasattr(type(module), "fusereg_original"):
        remedy = "call fusereg.revert(model) first"
    raise RuntimeError(f"{what} fusereg's {type(module).__name__}; {remedy}")


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


class DropInput(DropLayer):
    """A layer that drops from its one input."""

    #: Is called with (input, p, training, inplace).
    _function: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with parts dropped, or the input itself in evaluation mode."""
        return self._function(input, self.p, self.training, self.inplace)
