"""Compose: a list of transforms, fused into as few passes as possible."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import flag, is_sequence, size_pair
from .chain import Chain, PassParams, Unit
from .fuse import Pass, Plan, Stage, fuse
from .inputs import Batch, batch_of
from .labels import notice_labels
from .loading import collate
from .loop import Called, why_called
from .steps import Encoded, encode
from .targets import Targets

__all__ = ["Compose", "Transform"]


#: Names of transforms that draw something.
_DRAWS = re.compile("Rand|Jitter|Aug|Mix|Elastic|Noise|Blur")


@dataclass(frozen=True)
class _Pipeline:
    """Passes as they run: what is drawn and computed, and what becomes of types and targets."""

    passes: tuple[Pass, ...]
    units: list[Unit]
    mixed: bool
    types: str
    cast: Callable[[Any], Any] | None

    @staticmethod
    def of(passes: Sequence[Pass], out_dtype: torch.dtype | None, op: str) -> _Pipeline:
        """Return the pipeline of passes."""
        seen: dict[str, int] = {}
        units: list[Unit] = []
        for p in passes:
            steps = encode([step for stage in p.stages for step in stage.steps], seen)
            settings = p.settings()
            settings.check_out_dtype(out_dtype, op)
            units.append(
                Unit(steps, settings, p.called, p.dtype, p.mask_fill, p.idle, p.program(seen))
            )
        stages = [stage for p in passes for stage in p.stages]
        return _Pipeline(
            tuple(passes),
            units,
            any(unit.settings.mixed for unit in units),
            next((s.types for s in reversed(stages) if s.types), ""),
            next((s.cast for s in reversed(stages) if s.cast is not None), None),
        )


class Passes(Chain):
    """Base of Compose and of the single transforms: a sequence of passes."""

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        evaluation: Sequence[Pass] | None = None,
        seed: int | None,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        rules: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            seed=seed, out_dtype=out_dtype, memory_format=memory_format, rules=rules or {}
        )
        self._training = _Pipeline.of(passes, out_dtype, self._op)
        self._evaluation = (
            None if evaluation is None else _Pipeline.of(evaluation, out_dtype, self._op)
        )
        self._warned = False

    @property
    def _pipeline(self) -> _Pipeline:
        """The pipeline of the present mode."""
        if self.training or self._evaluation is None:
            return self._training
        return self._evaluation

    def _units(self) -> list[Unit]:
        return self._pipeline.units

    @property
    def _encoded(self) -> list[Sequence[Encoded]]:
        """The steps of each pass."""
        return [unit.steps for unit in self._training.units]

    @_encoded.setter
    def _encoded(self, encoded: list[Sequence[Encoded]]) -> None:
        units = [replace(u, steps=s) for u, s in zip(self._training.units, encoded, strict=True)]
        self._training = replace(self._training, units=units)

    def _refresh(self) -> None:
        """Read the transforms again if they have changed."""

    def _notice_evaluation(self) -> None:
        """Warn once if evaluation mode goes on drawing, as torchvision's transforms do."""
        if self.training or self._evaluation is not None or self._warned:
            return
        self._warned = True
        names = [name for p in self._training.passes for name in p.names if _DRAWS.search(name)]
        if names:
            warnings.warn(
                f"fusereg.{self._op}: {names[0]} goes on drawing in evaluation mode, as it does in "
                "torchvision. Compose(..., evaluation=[...]) takes what runs there instead, and "
                "train() before this call says that it is meant",
                stacklevel=3,
            )

    def sample_params(
        self,
        n: int,
        *,
        input_size: Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        view: int | Sequence[int] | Tensor | None = None,
    ) -> list[PassParams]:
        """Draw the parameters of n samples for each pass.

        A transform that is called has a :class:`fusereg.augment.CallParams`, and one that runs as a
        program of each image a :class:`fusereg.augment.ProgramParams`. If one that is called may
        change the size, it is called with black images to know what comes after it. Passes that see
        images of several sizes have a list, with parameters for each.
        """
        self._refresh()
        keys = self._keys(n, sample_ids, epoch, view)
        return self._drawn(keys, size_pair(input_size, "Compose", "input_size"))

    def forward(
        self,
        x: Any,
        targets: Any = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        epoch: int | None = None,
        view: int | Sequence[int] | Tensor | None = None,
        params: Sequence[PassParams] | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """Apply all passes to a batch.

        Args:
            x: [N, C, H, W], each sample with random numbers of its own; clips [N, T, C, H, W] or a
                tv_tensors.Video, each with one draw for all its frames; one image [C, H, W], or of
                PIL or NumPy.
            targets: as for :class:`fusereg.augment.Augment`; those of one image are its own.
            sample_ids: N integers that identify the samples.
            epoch: default: that of ``set_epoch``.
            view: which occurrence of its sample each is: one integer, or N.
            params: drawn by :meth:`sample_params`.
            out: the tensor that the last pass writes its result to.

        Returns:
            The result; (result, targets) if there are targets. In evaluation mode
            (``.eval()``), of the transforms that ``evaluation`` names; without these nothing
            changes, as in torchvision, and a warning says so.
        """
        op = self._op
        self._refresh()
        self._notice_evaluation()
        pipeline = self._pipeline
        batch = batch_of(x, op, single=True)
        single = batch.one
        if single and out is not None:
            raise ValueError(f"fusereg.{op}: out is for batches (N, C, H, W)")
        if params is not None and not (sample_ids is None and epoch is None and view is None):
            raise ValueError(f"fusereg.{op}: params exclude sample_ids and epoch, and view")
        given = None if params is None else list(params)
        if given is not None and len(given) != len(pipeline.passes):
            raise ValueError(
                f"fusereg.{op}: params must be one AugmentParams for each of "
                f"{len(pipeline.passes)} passes, got {len(given)}"
            )
        keys = None if given is not None else self._keys(batch.n, sample_ids, epoch, view)
        found = None
        if pipeline.mixed:
            notice_labels(op, targets, given)
        if targets is not None:
            tree = [targets] if single else targets
            found = Targets(tree, batch.n, batch.size, self.rules, op, pipeline.mixed)
        y, found = self._run(batch, found, keys, given, out)
        y = batch.restore(y, pipeline.types)
        if found is None:
            return y
        moved = self.finished(found)
        return y, moved[0] if single else moved

    def finished(self, found: Targets) -> Any:
        """Return the targets as they are in the end."""
        pipeline = self._pipeline
        return found.finish(pipeline.types == "pure", pipeline.cast)

    def restored(self, y: Tensor, like: Tensor) -> Any:
        """Return the result for a list of images of the type of one of them."""
        return Batch(y, 1, like, False).restore(y, self._pipeline.types)

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack samples and transform them, as :meth:`fusereg.augment.Augment.collate`."""
        self._refresh()
        self._notice_evaluation()
        return collate(self, samples)


class Transform(Passes):
    """Base of the drop-in transforms: one stage, usable alone or in :class:`Compose`.

    ``seed`` None draws one from torch's generator: ``torch.manual_seed`` before the transform is
    made reproduces it, and two transforms draw different numbers.
    """

    def __init__(self, stage: Stage, seed: int | None) -> None:
        self._op = type(self).__name__
        super().__init__(fuse([(self._op, [stage])], exact=False), seed=seed)
        self.stage = stage
        self._text = ""

    def extra_repr(self) -> str:
        """Return the arguments."""
        return self._text


class Compose(Passes):
    """A list of transforms in as few passes over the batch as possible.

    Accepts fusereg's transforms, torchvision's (their arguments are read), another Compose of
    either or an nn.Sequential (the transforms in it are taken), and any function of a batch.
    Geometry composes to one matrix for each sample; a normalization, an erased box and MixUp or
    CutMix are part of the same pass. A transform of torchvision for which there is no kernel is
    called for each sample, with its targets, under a generator keyed by the sample's id; any other
    function is called as it is, with the whole batch and without targets. :meth:`plan` shows what
    was fused, what was not and why, and where the result differs from that of one transform after
    the other: two resamples in one are sharper, and a rotated crop shows the image's own pixels in
    its corners.

    Args:
        transforms: in the order in which they are applied.
        evaluation: the transforms of evaluation mode (``.eval()``), in place of those of training.
            Default: the same, as in torchvision; a warning says so where they draw. The recipes
            have them.
        exact: fuse only what gives the same as one after the other, up to rounding.
        out_dtype: of the result; default: that of the images, float32 for uint8 that is normalized.
        memory_format: of the result.
        seed: of all transforms in the list; their own seeds are not used. Default: from torch's
            generator.
        rules: how targets move: ``mask_fill``, ``mask_interpolation``, ``image_interpolation``,
            ``keypoint_pairs``, ``min_area``, ``min_visibility``, ``rows``, ``labels`` and
            ``passthrough``, as for :class:`fusereg.augment.Augment`.

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
        evaluation: Sequence[Transform | Callable[..., Any]] | None = None,
        exact: bool = False,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        seed: int | None = None,
        **rules: Any,
    ) -> None:
        op = self._op
        only = flag(exact, op, "exact")
        super().__init__(
            _fused(transforms, op, "transforms", only),
            evaluation=None if evaluation is None else _fused(evaluation, op, "evaluation", only),
            seed=seed,
            out_dtype=out_dtype,
            memory_format=memory_format,
            rules=rules,
        )
        self.transforms = list(transforms)
        self._lists = (self.transforms, None if evaluation is None else list(evaluation), only)
        self._were = _attributes(self._lists[:2])

    def _refresh(self) -> None:
        self._lists = (self.transforms, *self._lists[1:])  # it may have been set
        now = _attributes(self._lists[:2])
        if now == self._were:
            return
        training, evaluation, exact = self._lists
        made = [
            None
            if each is None
            else _Pipeline.of(_fused(each, self._op, name, exact), self.out_dtype, self._op)
            for each, name in ((training, "transforms"), (evaluation, "evaluation"))
        ]
        assert made[0] is not None
        self._training, self._evaluation = made[0], made[1]
        self._were = now

    def plan(self) -> Plan:
        """Return what was fused, what was not, and why: in the present mode."""
        self._refresh()
        return Plan(self._pipeline.passes)

    def extra_repr(self) -> str:
        """Return the plan."""
        return str(self.plan())


#: Each returns the stages of another library's transform or how it is called; None: unknown.
converters: list[Callable[[object], Sequence[Stage] | Called | None]] = []


def _transforms_in(item: object) -> Sequence[object] | None:
    """Return the transforms of a list; None if this is none."""
    if isinstance(item, torch.nn.Sequential):
        return list(item)
    of_torchvision = type(item).__module__.startswith("torchvision.transforms")
    if isinstance(item, Compose) or (of_torchvision and type(item).__name__ == "Compose"):
        return list(item.transforms)  # type: ignore[attr-defined]
    return None


#: Whose transforms are read when a list is made, and called no more.
_READ = ("torchvision.transforms", "timm.data", "torch.nn", "fusereg.augment")


def _attributes(transforms: Sequence[object]) -> list[Any]:
    """Return all attributes that are read of transforms, by which a change is seen."""
    found: list[Any] = []
    for item in transforms:
        found.append(item)
        if isinstance(item, list):
            found[-1] = _attributes(item)
        elif type(item).__module__.startswith(_READ):
            found.append({k: _copied(v) for k, v in vars(item).items() if k != "training"})
            inner = getattr(item, "transforms", None)
            found.append(_attributes(_transforms_in(item) or inner or ()))
    return found


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value


def _fused(transforms: object, op: str, name: str, exact: bool) -> tuple[Pass, ...]:
    """Return the passes of a list."""
    if not is_sequence(transforms):
        raise TypeError(f"fusereg.{op}: {name} must be a sequence, got {type(transforms).__name__}")
    items: list[tuple[str, Sequence[Stage] | Called]] = []
    for item in transforms:
        items.extend(_stages(item, op))
    return fuse(items, exact)


def _stages(item: object, op: str) -> list[tuple[str, Sequence[Stage] | Called]]:
    """Return the stages of a transform or of a list, or what is called, with their names."""
    own = why_called(item)
    if isinstance(item, (Compose, Transform)) and own:
        raise TypeError(
            f"fusereg.{op}: {type(item).__name__}: {own}, which fusing would lose; call it before "
            "or after"
        )
    transforms = None if own else _transforms_in(item)
    if transforms is not None:
        return [pair for inner in transforms for pair in _stages(inner, op)]
    if isinstance(item, Transform):
        return [(item._op, [item.stage])]
    if isinstance(item, Chain):
        raise TypeError(
            f"fusereg.{op}: transforms must be single ones or lists, got {type(item).__name__}, "
            "which draws by ids of its own; call it before or after"
        )
    for convert in converters:
        known = convert(item)
        if known is not None:
            return [(type(item).__name__, known)]
    if isinstance(item, type):
        raise TypeError(f"fusereg.{op}: transforms must be made: {item.__name__}(), not the class")
    if not callable(item):
        raise TypeError(
            f"fusereg.{op}: transforms must be transforms or functions, got {type(item).__name__}"
        )
    called = Called.of(item)
    return [(called.name, called)]
