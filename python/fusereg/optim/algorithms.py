"""States that each algorithm of the kernels keeps of a parameter, by torch's names of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Algorithm(NamedTuple):
    """An algorithm of the kernels.

    Attributes:
        number: the kernels' number for it.
        name: of the optimizer.
        keys: the states of the parameter's shape, in the kernels' order.
        steps: the states that are numbers, as tensors.
        optional: those of ``keys`` that come with an option, and its field of a :class:`Hyper`.
    """

    number: int
    name: str
    keys: tuple[str, ...]
    steps: tuple[str, ...] = ("step",)
    optional: Mapping[str, str] = MappingProxyType({})

    def keys_of(self, hyper: Any) -> tuple[str, ...]:
        """Return the states that parameters with these hyperparameters have."""
        of = self.optional
        return tuple(key for key in self.keys if key not in of or getattr(hyper, of[key]))

    @property
    def needed(self) -> tuple[str, ...]:
        """Return the states without which a state is none of this algorithm's."""
        always = tuple(key for key in self.keys if key not in self.optional)
        # The corrections of both moments would begin anew with the count.
        count = self.steps[:1] if "exp_avg_sq" in self.keys else ()
        return (*(always or self.keys), *count, *self.steps[1:])


_MOMENTS = ("exp_avg", "exp_avg_sq")
ALGORITHMS = (
    Algorithm(0, "SGD", ("momentum_buffer",), (), {"momentum_buffer": "momentum"}),
    Algorithm(1, "Adam", (*_MOMENTS, "max_exp_avg_sq"), optional={"max_exp_avg_sq": "amsgrad"}),
    Algorithm(2, "Adagrad", ("sum",)),
    Algorithm(3, "FTRL", ("linear", "sum"), ("last",)),
    Algorithm(
        4,
        "RMSprop",
        ("square_avg", "momentum_buffer", "grad_avg"),
        optional={"momentum_buffer": "momentum", "grad_avg": "centered"},
    ),
    Algorithm(5, "NAdam", _MOMENTS, ("step", "mu_product")),
    Algorithm(6, "Lion", ("exp_avg",)),
    Algorithm(7, "LAMB", _MOMENTS),
)
SGD, ADAM, ADAGRAD, FTRL, RMSPROP, NADAM, LION, LAMB = ALGORITHMS
#: All states of the kernels, and some that tell other optimizers of torch.
STATES = {key for a in ALGORITHMS for key in (*a.keys, *a.needed) if key != "step"} | {
    *("acc_delta", "exp_inf", "ax", "prev", "row_var", "variance")
}
