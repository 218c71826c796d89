"""Compose: a list of transforms, fused into as few passes as possible."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import flag, is_sequence, size_pair
from .chain import Chain, PassParams, Pipeline, Unit
from .fuse import Pass, Plan, Stage, fuse
from .loading import collate
from .loop import Called, why_called
from .steps import encode

__all__ = ["Compose", "Transform"]


#: Names of transforms that draw something.
_DRAWS = re.compile("Rand|Jitter|Aug|Mix|Elastic|Noise|Blur")


def _pipeline(passes: Sequence[Pass]) -> Pipeline:
    """Return passes as they run."""
    seen: dict[str, int] = {}
    units: list[Unit] = []
    for p in passes:
        steps = encode([step for stage in p.stages for step in stage.steps], seen)
        units.append(Unit(steps, p.settings(), p.called, p.program(seen)))
    stages = [stage for p in reversed(passes) for stage in reversed(p.stages)]
    return Pipeline(
        units,
        tuple(passes),
        next((s.types for s in stages if s.types), ""),
        next((s.cast for s in stages if s.cast is not None), None),
    )


class Passes(Chain):
    """Base of Compose and of the single transforms: a sequence of passes."""

    def __init__(
        self, passes: Sequence[Pass], evaluation: Sequence[Pass] | None = None, **options: Any
    ) -> None:
        super().__init__(
            _pipeline(passes), None if evaluation is None else _pipeline(evaluation), **options
        )
        self._warned = False

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
        self._refresh()
        self._notice_evaluation()
        given = None if params is None else list(params)
        return self._apply_to(x, targets, sample_ids, epoch, view, given, out)

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

    def __init__(self, stage: Stage, seed: int | None, **shown: Any) -> None:
        self._op = type(self).__name__
        super().__init__(fuse([stage]), seed=seed)
        self.stage = stage
        self._text = ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def extra_repr(self) -> str:
        """Return the arguments."""
        return self._text


class Compose(Passes):
    """A list of transforms in as few passes over the batch as possible.

    Accepts fusereg's transforms, torchvision's (their arguments are read), another Compose of
    either or an nn.Sequential (the transforms in it are taken), and any function of a batch.
    The result is that of one transform after the other, up to rounding: those that can are one
    pass, with one matrix for each sample, and a normalization, an erased box and MixUp or CutMix
    are part of it. A transform of torchvision for which there is no kernel is called for each
    sample, with its targets, under a generator keyed by the sample's id; any other function is
    called as it is, with the whole batch and without targets. :meth:`plan` shows what is one pass,
    what is not and why, and what ``merge=True`` would join.

    Args:
        transforms: in the order in which they are applied.
        evaluation: the transforms of evaluation mode (``.eval()``), in place of those of training.
            Default: the same, as in torchvision; a warning says so where they draw. The recipes
            have them.
        merge: join geometry in one pass where that changes the result as well, which the plan
            notes: two resamplings in one are sharper, and what left the image in the first, or was
            cropped, comes back in the second.
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
        merge: bool = False,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        seed: int | None = None,
        **rules: Any,
    ) -> None:
        op = self._op
        joins = flag(merge, op, "merge")
        super().__init__(
            _fused(transforms, op, "transforms", joins),
            evaluation=None if evaluation is None else _fused(evaluation, op, "evaluation", joins),
            seed=seed,
            out_dtype=out_dtype,
            memory_format=memory_format,
            rules=rules,
        )
        self.transforms = list(transforms)
        self._after = None if evaluation is None else list(evaluation)
        self._merge = joins
        self._watch = _Watch(self.transforms, self._after)

    def _refresh(self) -> None:
        if not self._watch.sees(self.transforms, self._after):
            return
        made = [
            None if each is None else _pipeline(_fused(each, self._op, name, self._merge))
            for each, name in ((self.transforms, "transforms"), (self._after, "evaluation"))
        ]
        assert made[0] is not None
        self._take(made[0], made[1])
        self._watch = _Watch(self.transforms, self._after)

    def plan(self) -> Plan:
        """Return what was fused, what was not, and why: in the present mode."""
        self._refresh()
        return Plan(self._pipeline.passes)

    def extra_repr(self) -> str:
        """Return the plan."""
        return str(self.plan())


#: Each returns the stage of another library's transform or how it is called; None: unknown.
converters: list[Callable[[object], Stage | Called | None]] = []


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


class _Watch:
    """The lists of transforms and the attributes that were read of these, as they were."""

    def __init__(self, *lists: Sequence[object] | None) -> None:
        self._lists = lists
        self._were: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        for transforms in lists:
            self._keep(transforms)
            self._look(transforms or ())

    def _keep(self, now: Any) -> None:
        self._were.append((now, self._copied(now)))

    def _look(self, transforms: Sequence[object]) -> None:
        for item in transforms:
            if type(item).__module__.startswith(_READ):
                self._keep(vars(item))
                self._look(_transforms_in(item) or getattr(item, "transforms", None) or ())

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._tensors.append((value, value._version))
        if isinstance(value, list):
            return [self._copied(v) for v in value]
        return {k: self._copied(v) for k, v in value.items()} if isinstance(value, dict) else value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, ()  # of a copy: its transforms have attributes of their own

    def sees(self, *lists: Sequence[object] | None) -> bool:
        """Return whether there are other lists now, or anything in them has changed."""
        pairs = zip(lists, self._lists, strict=False)
        if len(lists) != len(self._lists) or any(now is not was for now, was in pairs):
            return True
        try:
            same = all(now == was for now, was in self._were)
        except (RuntimeError, ValueError):  # another tensor or array in an attribute
            same = False
        return not same or any(t._version != was for t, was in self._tensors)


def _fused(transforms: object, op: str, name: str, merge: bool) -> tuple[Pass, ...]:
    """Return the passes of a list."""
    if not is_sequence(transforms):
        raise TypeError(f"fusereg.{op}: {name} must be a sequence, got {type(transforms).__name__}")
    return fuse([stage for item in transforms for stage in _stages(item, op)], merge)


def _stages(item: object, op: str) -> list[Stage | Called]:
    """Return the stage of a transform, those of a list, or what is called."""
    own = why_called(item)
    if isinstance(item, (Compose, Transform)) and own:
        raise TypeError(
            f"fusereg.{op}: {type(item).__name__}: {own}, which fusing would lose; call it before "
            "or after"
        )
    transforms = None if own else _transforms_in(item)
    if transforms is not None:
        return [stage for inner in transforms for stage in _stages(inner, op)]
    if isinstance(item, Transform):
        return [item.stage]
    if isinstance(item, Chain):
        raise TypeError(
            f"fusereg.{op}: transforms must be single ones or lists, got {type(item).__name__}, "
            "which draws by ids of its own; call it before or after"
        )
    known = next((made for convert in converters if (made := convert(item)) is not None), None)
    if known is not None:
        return [known]
    if isinstance(item, type):
        raise TypeError(f"fusereg.{op}: transforms must be made: {item.__name__}(), not the class")
    if not callable(item):
        raise TypeError(
            f"fusereg.{op}: transforms must be transforms or functions, got {type(item).__name__}"
        )
    return [Called.of(item)]
