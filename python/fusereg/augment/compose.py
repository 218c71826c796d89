"""Compose: a list of transforms, fused into as few passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import op as _ops
from .arguments import check_memory_format, flag, is_sequence
from .augment import collate
from .fuse import Pass, Plan, Stage, fuse
from .labels import transform_targets
from .params import AugmentParams, draw
from .render import render
from .seeded import SeededModule
from .steps import Encoded, encode

__all__ = ["Compose", "Transform"]


class Passes(SeededModule):
    """Base of Compose and of the single transforms: a sequence of passes."""

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
        self._settings = [p.settings() for p in self._passes]
        self._mixed = any(settings.mixed for settings in self._settings)
        for settings in self._settings:
            settings.check_out_dtype(out_dtype, self._op)

    def sample_params(
        self,
        n: int,
        *,
        input_size: Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> list[AugmentParams]:
        """Draw the parameters of n samples for each pass.

        Raises:
            ValueError: a function is called between passes, which may change the images' size.
        """
        if any(p.function is not None for p in self._passes[:-1]):
            raise ValueError(
                f"fusereg.{self._op}.sample_params: the list has functions that are called as they "
                "are, which may change the images' size"
            )
        ids, epoch = self._ids_and_epoch(sample_ids, n, epoch)
        size = (int(input_size[0]), int(input_size[1]))
        drawn = []
        for encoded, p in zip(self._encoded, self._passes, strict=True):
            if p.function is None:
                drawn.append(draw(encoded, ids, size, self.seed, epoch, self._op))
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
        """Apply all passes to a batch.

        Args:
            x: [N, C, H, W], each sample with random numbers of its own; or one image [C, H, W].
            targets: as for :class:`fusereg.augment.Augment`.
            sample_ids: N integers that identify the samples.
            epoch: default: that of ``set_epoch``.
            params: drawn by :meth:`sample_params`.
            out: the tensor that the last pass writes its result to.

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
        _ops.check_images(x, op)
        if params is not None and (sample_ids is not None or epoch is not None):
            raise ValueError(f"fusereg.{op}: params exclude sample_ids and epoch")
        given = None if params is None else list(params)
        wanted = sum(p.function is None for p in self._passes)
        if given is not None and len(given) != wanted:
            raise ValueError(
                f"fusereg.{op}: params must be one AugmentParams for each of {wanted} passes, "
                f"got {len(given)}"
            )
        if given is None:
            ids, epoch = self._ids_and_epoch(sample_ids, x.shape[0], epoch)
        last = len(self._passes) - 1
        checked = True
        for i, (p, settings) in enumerate(zip(self._passes, self._settings, strict=True)):
            if p.function is not None:
                x, checked = p.function(x), False
                continue
            if not checked:
                _ops.check_images(x, op)
                checked = True
            if given is not None:
                own = given.pop(0)
            else:
                assert epoch is not None
                size = (x.shape[-2], x.shape[-1])
                own = draw(self._encoded[i], ids, size, self.seed, epoch, op)
            x = render(
                x,
                own,
                settings,
                op,
                out_dtype=self.out_dtype if i == last else None,
                keep_dtype=True,
                memory_format=self.memory_format,
                out=out if i == last else None,
            )
            targets = transform_targets(targets, own, settings.mixed, settings.num_classes, op)
        if single:
            x = x[0]
        return x if targets is None else (x, targets)

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack samples and transform them, as :meth:`fusereg.augment.Augment.collate`."""
        return collate(self, self._mixed, samples)


class Transform(Passes):
    """Base of the drop-in transforms: one stage, usable alone or in :class:`Compose`.

    ``seed`` None draws one from torch's generator: ``torch.manual_seed`` before the transform is
    made reproduces it, and two transforms draw different numbers.
    """

    def __init__(self, stage: Stage, seed: int | None) -> None:
        self._op = type(self).__name__
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        super().__init__(fuse([(self._op, [stage])], exact=False), seed=seed)
        self.stage = stage
        self._text = ""

    def extra_repr(self) -> str:
        """Return the arguments."""
        return self._text


class Compose(Passes):
    """A list of transforms in as few passes over the batch as possible.

    Accepts fusereg's transforms, torchvision's of the same names (their arguments are read),
    another Compose (its transforms are taken, not its arguments), and any function of a batch,
    which is called as it is. Geometry composes to one matrix for each sample; a normalization, an
    erased box and MixUp or CutMix are part of the same pass. :meth:`plan` shows what was fused,
    what was not and why, and where the result differs from that of one transform after the other:
    two resamples in one are sharper, and a rotated crop shows the image's own pixels in its
    corners.

    Args:
        transforms: in the order in which they are applied.
        exact: fuse only what gives the same as one after the other, up to rounding.
        out_dtype: of the result; default: that of the images, float32 for uint8 that is normalized.
        memory_format: of the result.
        seed: of all transforms in the list; their own seeds are not used.

    Raises:
        TypeError: an element is neither a transform nor callable.

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
        if not is_sequence(transforms):
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
        """Return what was fused, what was not, and why."""
        return Plan(self._passes)

    def extra_repr(self) -> str:
        """Return the plan."""
        return str(self.plan())


#: Each returns fusereg's transform for one of another library, or None.
converters: list[Callable[[object], Transform | None]] = []


def _stages(item: object, op: str) -> list[tuple[str, Sequence[Stage] | Callable[..., Any]]]:
    """Return the stages of a transform or of a list, or a function, with their names."""
    if isinstance(item, Compose):
        return [pair for inner in item.transforms for pair in _stages(inner, op)]
    found = (convert(item) for convert in converters)
    known = item if isinstance(item, Transform) else next((t for t in found if t), None)
    if known is not None:
        return [(known._op, [known.stage])]
    if not callable(item):
        raise TypeError(
            f"fusereg.{op}: transforms must be transforms or functions, got {type(item).__name__}"
        )
    return [(getattr(item, "__name__", type(item).__name__), item)]
