"""Exponential moving averages of the weights: begun here, kept up by the step's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import distributed
from ..core.arguments import check_type
from .kernels import LOW_PRECISION, State, update_dtype

KEY = "ema_param"


class Averages(torch.optim.Optimizer):
    """An optimizer that may keep averages of its weights in its states."""

    _name: str
    _shows_averages = False
    #: Parameters whose averages begin with the step that is running.
    _beginning: list[Tensor]

    @contextmanager
    def averaged(
        self, model: nn.Module | None = None, *, keep_zeros: bool = False
    ) -> Iterator[None]:
        r"""Return a context in which the parameters hold their averages (``ema_decay``).

        The average of a parameter is the parameter itself after its first step, and then
        :math:`a \leftarrow a + (1 - decay)(p - a)` after each step, as in
        ``torch.optim.swa_utils.AveragedModel``; steps that a ``GradScaler`` skips do not count. It
        is that of the float32 master if there is one. Afterwards the parameters hold the very bits
        that they had, also after an exception; but one that was written inside, by
        :meth:`fusereg.EarlyStopping.restore` for example, keeps what was written. Buffers are not
        averaged, as by default in ``AveragedModel``: for batch norm, call
        ``torch.optim.swa_utils.update_bn`` inside if the running statistics do not fit.

        Args:
            model: needed for DTensors only, because FSDP2 keeps gathered copies of parameters
                after a forward pass, which would be used instead: they are freed before and after.
            keep_zeros: weights that are zero now are zero in the average too, which is dense
                otherwise: a weight that the penalty sets to zero fades from the average slowly.

        Raises:
            ValueError: no param group has an ``ema_decay``, or parameters are DTensors and there is
                no ``model``.
            RuntimeError: inside of another such context, and at a step inside.

        Example:
            >>> optimizer = fusereg.optim.AdamW(model.parameters(), l1=1e-5, ema_decay=0.999)
            >>> with optimizer.averaged():
            ...     loss = validate(model)
            ...     torch.save(model.state_dict(), "averaged.pt")
        """
        self._check_raw("averaged")
        found = self._found("averaged", model)
        raws: list[Tensor] = []
        versions: list[int] = []
        self._shows_averages = True
        try:
            with torch.no_grad():
                for p, average in found:
                    raws.append(p.detach().clone())
                    p.copy_(_shown(raws[-1], average, keep_zeros))
                    versions.append(p._version)
            yield
        finally:
            self._shows_averages = False
            _free_gathered(model)
            with torch.no_grad():
                for i, raw in enumerate(raws):  # not all, if writing the averages has failed
                    p, average = found[i]
                    # Writes through .data do not count as a version.
                    same = _shown(raw, average, keep_zeros).to(p.dtype)
                    if len(versions) < len(found) or (
                        p._version == versions[i] and _equal(p.detach(), same)
                    ):
                        p.copy_(raw)

    def copy_averaged(self, model: nn.Module | None = None, *, keep_zeros: bool = False) -> None:
        """Write the averages to the parameters for good, as at the end of training.

        Args and errors as those of :meth:`averaged`.

        Example:
            >>> optimizer.copy_averaged(keep_zeros=True)
        """
        self._check_raw("copy_averaged")
        with torch.no_grad():
            for p, average in self._found("copy_averaged", model):
                p.copy_(_shown(p, average, keep_zeros))

    def _found(self, what: str, model: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters that have averages, and these, ready to be exchanged."""
        where = f"fusereg.optim.{self._name}.{what}"
        if not averages_of([self]):
            raise ValueError(f"{where}: there are no averages without ema_decay")
        check_type(model, (nn.Module, type(None)), f"{where}: model", "a module")
        params = [p for group in self.param_groups for p in group["params"]]
        if model is None and distributed.has_dtensor(params):
            raise ValueError(
                f"{where}: model must be given with DTensors, whose gathered copies FSDP2 may use"
            )
        _free_gathered(model)
        found = [(p, self._state_of(p).get(KEY)) for p in params]
        return [(p, average) for p, average in found if average is not None]

    def _state_of(self, p: Tensor) -> State:
        state: State = self.state.get(p, {})
        return state

    def _check_raw(self, what: str) -> None:
        if self._shows_averages:
            raise RuntimeError(
                f"fusereg.optim.{self._name}.{what}: the parameters hold their averages, inside "
                "averaged()"
            )

    def _begin_average(self, p: Tensor, group: State) -> None:
        """Make the average if it is missing; :meth:`_average_others` gives it the first weights."""
        state = self.state[p]
        if group.get("ema_decay") is not None and state.get(KEY) is None:
            state[KEY] = p.detach().to(update_dtype(p), copy=True)
            self._beginning.append(p)

    def _average_others(self) -> None:
        """Average, after a step, what the kernels have left: first steps, and missing gradients."""
        skipped = getattr(self, "found_inf", None)
        # Only where averages begin does the host wait for the device.
        skips = bool(self._beginning) and skipped is not None and float(skipped) != 0.0
        with torch.no_grad():
            while self._beginning:
                p = self._beginning.pop()
                if skips:
                    del self.state[p][KEY]  # the next step is the first one
                else:
                    self.state[p][KEY].copy_(self._exact(p))
            for group in self.param_groups:
                decay = group.get("ema_decay")
                if decay is None:
                    continue
                for p in group["params"]:
                    if p.grad is None and KEY in self._state_of(p):
                        self._approach(p, 1.0 - decay)

    def _approach(self, p: Tensor, weight: float | Tensor) -> None:
        average = self.state[p][KEY]
        skipped = getattr(self, "found_inf", None)
        if skipped is not None:
            weight = weight * (skipped.to(average.device) == 0)
        if isinstance(weight, Tensor):
            weight = weight.to(average.device, average.dtype)
        average.lerp_(self._exact(p), weight)

    def _exact(self, p: Tensor) -> Tensor:
        """Return the weights in the dtype in which they are updated, the master's where it is."""
        exact = p.detach().to(update_dtype(p))
        master = self.state[p].get("master_param")
        if master is None or p.dtype not in LOW_PRECISION:
            return exact
        return torch.where(master.to(p.dtype) == p.detach(), master, exact)


def averages_of(optimizers: Iterable[object]) -> list[Averages]:
    """Return the optimizers that keep averages."""
    found = [o for o in optimizers if isinstance(o, Averages)]
    return [o for o in found if any(g.get("ema_decay") is not None for g in o.param_groups)]


def _free_gathered(model: nn.Module | None) -> None:
    if model is None or not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same numbers, or NaN at the same places."""
    return torch.equal(a, b) or (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.masked_fill(a.isnan(), 0.0), b.masked_fill(b.isnan(), 0.0))
    )


def _shown(raw: Tensor, average: Tensor, keep_zeros: bool) -> Tensor:
    raw = raw.detach()
    return torch.where(raw == 0, raw.to(average.dtype), average) if keep_zeros else average
