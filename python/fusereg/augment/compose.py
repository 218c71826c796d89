"""Compose: a list of transforms, fused into as few passes as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import op as _augment_ops
from .arguments import flag
from .augment import check_memory_format, collate
from .fuse import Pass, Plan, Stage, fuse
from .keyed import Keyed
from .labels import transform_targets
from .params import AugmentParams, draw
from .render import render
from .steps import Encoded, encode

__all__ = ["Compose", "Transform"]


class Passes(Keyed):
    """Base of Compose and of each transform alone: passes one after the other."""

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        seed: int,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        super().__init__(seed)
        self._passes = tuple(passes)
        self.out_dtype = out_dtype
        self.memory_format = check_memory_format(memory_format, self._op)
        seen: dict[str, int] = {}
        self._encoded: list[list[Encoded]] = [
            encode([step for stage in p.stages for step in stage.steps], seen) for p in self._passes
        ]
        self._looks = [p.look() for p in self._passes]
        self._mixed = any(look.mixed for look in self._looks)
        for look in self._looks:
            look.out_dtype(torch.empty(0), out_dtype, self._op, True)

    def sample_params(
        self,
        n: int,
        *,
        input_size: Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> list[AugmentParams]:
        """Draws the parameters of n samples for each pass.

        Raises:
            ValueError: a function that is called as it is stands between passes: what size it makes
                of the images is not known before it ran.
        """
        if any(p.function is not None for p in self._passes[:-1]):
            raise ValueError(
                f"fusereg.{self._op}.sample_params: the list has functions that are called as they "
                "are, which may change the images' size"
            )
        ids = self._ids_of(sample_ids, n)
        number = self._epoch_of(epoch)
        size = (int(input_size[0]), int(input_size[1]))
        drawn = []
        for encoded, p in zip(self._encoded, self._passes, strict=True):
            if p.function is None:
                drawn.append(draw(encoded, ids, size, self.seed, number, self._op))
                size = drawn[-1].size
        return drawn

    def forward(
        self,
        x: Tensor,
        targets: Any = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        params: Sequence[AugmentParams] | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """The batch through all passes.

        Args:
            x: [N, C, H, W], each sample with numbers of its own; or one image [C, H, W].
            targets: as for :class:`fusereg.augment.Augment`.
            sample_ids: N integers that name the samples.
            epoch: default: that of ``set_epoch``.
            params: what :meth:`sample_params` drew.
            out: where the last pass puts its result.

        Returns:
            The result; (result, targets) if there are targets. Evaluation mode changes nothing, as
            in torchvision.
        """
        op = self._op
        single = isinstance(x, Tensor) and x.dim() == 3
        if single:
            if targets is not None or out is not None:
                raise ValueError(f"fusereg.{op}: targets and out are for batches (N, C, H, W)")
            x = x[None]
        _augment_ops.check_images(x, op)
        if params is not None and (sample_ids is not None or epoch is not None):
            raise ValueError(f"fusereg.{op}: params exclude sample_ids and epoch")
        given = None if params is None else list(params)
        wanted = sum(p.function is None for p in self._passes)
        if given is not None and len(given) != wanted:
            raise ValueError(
                f"fusereg.{op}: params must be one AugmentParams for each of {wanted} passes, "
                f"got {len(given)}"
            )
        ids = None if given is not None else self._ids_of(sample_ids, x.shape[0])
        number = self._epoch_of(epoch)
        last = len(self._passes) - 1
        for i, (encoded, p) in enumerate(zip(self._encoded, self._passes, strict=True)):
            if p.function is not None:
                x = p.function(x)
                continue
            if given is not None:
                own = given.pop(0)
            else:
                assert ids is not None
                size = (x.shape[-2], x.shape[-1])
                own = draw(encoded, ids, size, self.seed, number, op)
            look = self._looks[i]
            x = render(
                x,
                own,
                look,
                op,
                out_dtype=self.out_dtype if i == last else None,
                keep_dtype=True,
                memory_format=self.memory_format,
                out=out if i == last else None,
            )
            targets = transform_targets(targets, own, look.mixed, look.num_classes, op)
        if single:
            x = x[0]
        return x if targets is None else (x, targets)

    def collate(self, samples: Sequence[Any]) -> Any:
        """As :meth:`fusereg.augment.Augment.collate`."""
        return collate(self, self._mixed, samples)


class Transform(Passes):
    """Base of the drop-in transforms: one stage, usable alone or in :class:`Compose`.

    ``seed`` None takes one from torch's generator, so that ``torch.manual_seed`` before the
    transform is made reproduces, and two transforms do not draw the same.
    """

    def __init__(self, stage: Stage, seed: int | None) -> None:
        self._op = type(self).__name__
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        super().__init__(fuse([(self._op, [stage])], exact=False), seed=seed)
        self.stage = stage
        self._text = ""

    def extra_repr(self) -> str:
        """The arguments."""
        return self._text


class Compose(Passes):
    """A list of transforms in as few passes over the batch as can be.

    Takes fusereg's transforms, torchvision's of the same names (their arguments are read), another
    Compose (its transforms are taken, not its arguments), and any function of a batch, which is
    called as it is. Geometry composes to one matrix a sample; a
    normalization, an erased box and MixUp or CutMix ride along. :meth:`plan` says what was fused,
    what not and why, and where the result differs from one transform after the other: two resamples
    in one are sharper, and a turned crop shows the image's own pixels in its corners.

    Args:
        transforms: in the order in which they are to act.
        exact: fuse only what gives the same as one after the other, up to rounding.
        out_dtype: of the result; default: the images' own, float32 for uint8 that is normalized.
        memory_format: of the result.
        seed: of all transforms in the list; theirs do not count.

    Raises:
        TypeError: one of the list is neither a transform nor callable.

    Example:
        >>> chain = Compose([RandomResizedCrop(192), RandomHorizontalFlip(), Normalize(mean, std)])
        >>> print(chain.plan())
        1. RandomResizedCrop + RandomHorizontalFlip + Normalize
        >>> y = chain(images)
    """

    _op = "Compose"

    def __init__(
        self,
        transforms: Sequence[Transform | Callable[..., Any]],
        *,
        exact: bool = False,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        seed: int = 0,
    ) -> None:
        op = self._op
        if not isinstance(transforms, Sequence) or isinstance(transforms, str):
            raise TypeError(
                f"fusereg.{op}: transforms must be a sequence, got {type(transforms).__name__}"
            )
        items: list[tuple[str, Sequence[Stage] | Callable[..., Any]]] = []
        for item in transforms:
            items.extend(_stages(item, op))
        passes = fuse(items, flag(exact, op, "exact"))
        super().__init__(passes, seed=seed, out_dtype=out_dtype, memory_format=memory_format)
        self.transforms = list(transforms)

    def plan(self) -> Plan:
        """What was fused and what not."""
        return Plan(self._passes)

    def extra_repr(self) -> str:
        """The plan."""
        return str(self.plan())


def _stages(item: object, op: str) -> list[tuple[str, Sequence[Stage] | Callable[..., Any]]]:
    from .torchvision import from_torchvision

    if isinstance(item, Compose):
        return [pair for inner in item.transforms for pair in _stages(inner, op)]
    known = item if isinstance(item, Transform) else from_torchvision(item)
    if known is not None:
        return [(known._op, [known.stage])]
    if not callable(item):
        raise TypeError(
            f"fusereg.{op}: transforms must be transforms or functions, got {type(item).__name__}"
        )
    return [(getattr(item, "__name__", type(item).__name__), item)]
