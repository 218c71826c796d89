"""The passes of a chain, one after the other: draw, move the targets, render or call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..core import dispatch
from . import op as _ops
from .arguments import check_memory_format
from .fuse import Pass
from .inputs import Batch, batch_of
from .labels import notice_labels
from .loop import Called, CallParams, call, refuse_types, size_after
from .params import AugmentParams, draw
from .program import Program, ProgramParams
from .render import Settings, pass_of, render
from .rules import RULES, rules_of
from .seeded import Keys, SeededModule
from .steps import VALUES, Values, ends_alike, ends_apart
from .targets import Targets, Unstacked
from .tree import plain

Size: TypeAlias = tuple[int, int]
#: More than any value of an image in [0, 1], normalized or not.
_LARGE = 16.0
#: What a pass has drawn; where the images differ in size, for each of them.
PassParams: TypeAlias = AugmentParams | CallParams | ProgramParams | list[Any]


@dataclass(frozen=True)
class Unit:
    """A pass as it runs.

    Attributes:
        steps: what is drawn.
        settings: of the kernel.
        called: what is called instead.
        program: of each image, instead of all that.
    """

    steps: Sequence[Values]
    settings: Settings
    called: Called | None = None
    program: Program | None = None

    @cached_property
    def idle(self) -> bool:
        """True where nothing happens: there are only conversions of types."""
        other = self.called or self.program or self.settings.normal or self.settings.dtype
        return not (self.steps or other)

    @cached_property
    def joins(self) -> bool:
        """True for a pass of the kernel, on one sample after the other."""
        other = self.called or self.program or self.idle or self.settings.mixed
        return not (other or self.makes_apart)

    @cached_property
    def makes_alike(self) -> bool:
        """True where the kernel gives images of several sizes one size."""
        return self.called is None and self.program is None and ends_alike(self.steps)

    @cached_property
    def makes_apart(self) -> bool:
        """True where the kernel may give images of one size several sizes."""
        return not self.settings.mixed and ends_apart(self.steps)

    @cached_property
    def moves(self) -> bool:
        """True where the kernel may move pixels."""
        return any(step[0] not in VALUES for step in self.steps)

    def check_params(self, params: PassParams, op: str) -> None:
        """Check that given parameters are of this pass."""
        kind: type = AugmentParams
        name = "a pass"
        if self.called is not None:
            kind, name = CallParams, self.called.name
        elif self.program is not None:
            kind, name = ProgramParams, "a program"
        for own in params if isinstance(params, list) else [params]:
            if not isinstance(own, kind):
                raise TypeError(
                    f"fusereg.{op}: params of {name} must be {kind.__name__}, got "
                    f"{type(own).__name__}"
                )


#: A pass with its place in the chain, and its parameters if they were given.
Task: TypeAlias = tuple[int, Unit, PassParams | None]


def joined(tasks: Sequence[Task], x: Tensor) -> tuple[Task | None, Task, Task | None] | None:
    """Return the program that comes next, and the passes before and after it that go with it.

    On the CPU they are one call, so that what is between them stays in the cache.
    """
    before = None if tasks[0][1].program is not None else tasks[0]
    if before is not None:
        settings = before[1].settings
        if not before[1].joins or settings.normal or settings.dtype not in (None, torch.uint8):
            return None
        tasks = tasks[1:]
    if not tasks or tasks[0][1].program is None or not tasks[0][1].program.joins(x):
        return None
    after = tasks[1] if len(tasks) > 1 and tasks[1][1].joins else None
    if after is not None and after[1].settings.antialias:
        after = None
    for task in (before, after):
        own = None if task is None else task[2]
        if isinstance(own, AugmentParams) and bool((own.partners >= 0).any()):
            return None
    return None if before is after else (before, tasks[0], after)


@dataclass(frozen=True)
class Pipeline:
    """The passes of a mode, and what becomes of types and targets in the end, as in Stage.

    Augment has none to plan.
    """

    units: Sequence[Unit]
    passes: tuple[Pass, ...] = ()
    types: str = ""
    cast: Callable[[Any], Any] | None = None

    @cached_property
    def mixed(self) -> bool:
        """True where samples are mixed."""
        return any(unit.settings.mixed for unit in self.units)


#: Arguments of other libraries' transforms, and what to do instead.
ELSEWHERE = {
    "hue": "ColorJitter has it, in Compose",
    "same_on_batch": "each sample has draws of its own; the frames of a clip share theirs",
    "keepdim": "one image [C, H, W] of Compose keeps its dimensions",
    "data_format": "images are (N, C, H, W)",
    "return_transform": "sample_params() returns what is drawn",
    "always_apply": "p=1 applies it always",
    "bbox_params": "boxes are torchvision's BoundingBoxes, among the targets of the call",
    "keypoint_params": "points are torchvision's KeyPoints, among the targets of the call",
    "additional_targets": "further images are among the targets of the call",
    "data_keys": "what moves with the images is the second argument of the call",
}


class Chain(SeededModule):
    """Base of Augment and Compose: passes that are drawn, rendered or called in turn."""

    #: Whether uint8 stays uint8 unless it is normalized, and one image is a batch of one.
    _keep_dtype = True
    _single = True
    _elsewhere: ClassVar[Mapping[str, str]] = ELSEWHERE
    _collected: ClassVar[Sequence[str]] = RULES

    def __init__(
        self,
        training: Pipeline,
        evaluation: Pipeline | None,
        *,
        seed: int | None,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        rules: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seed)
        self.out_dtype = out_dtype
        self._take(training, evaluation)
        self.memory_format = check_memory_format(memory_format, self._op)
        self.rules = rules_of(self._op, rules or {})
        self._looked = False

    def _take(self, training: Pipeline, evaluation: Pipeline | None) -> None:
        """Check the pipelines of both modes, and use them."""
        for pipeline in (training, evaluation):
            for unit in () if pipeline is None else pipeline.units:
                unit.settings.check_out_dtype(self.out_dtype, self._op)
        self._training, self._evaluation = training, evaluation

    @property
    def _pipeline(self) -> Pipeline:
        """The pipeline of the present mode."""
        if self.training or self._evaluation is None:
            return self._training
        return self._evaluation

    # --- what is drawn ---

    def _draw(self, place: int, unit: Unit, keys: Keys, size: Size | list[Size]) -> PassParams:
        """Draw for one pass, in images of one size or of several."""
        if unit.makes_apart and len(keys.ids) > 1 and not isinstance(size, list):
            size = [size] * len(keys.ids)
        if isinstance(size, list):
            return [self._draw(place, unit, keys[i : i + 1], own) for i, own in enumerate(size)]
        if unit.called is not None:
            return CallParams(keys.of_place(place), keys.ids)
        if unit.program is not None:
            return unit.program.draw(keys, size, self._op)
        return keys.draw(unit.steps, size, self._op)

    def _sizes(
        self, unit: Unit, params: PassParams, size: Size | list[Size], dtype: torch.dtype
    ) -> Any:
        """Return the size of the images after a pass, or their sizes."""
        if isinstance(params, AugmentParams):
            return params.size
        if isinstance(params, ProgramParams):
            return size
        if isinstance(params, list):
            each = size if isinstance(size, list) else [size] * len(params)
            pairs = zip(params, each, strict=True)
            found: list[Any] = [self._sizes(unit, p, s, dtype) for p, s in pairs]
        else:
            assert unit.called is not None
            if not unit.called.resizes or not len(params):
                return size
            seeds = params.seeds.tolist() if unit.called.each else params.seeds.tolist()[:1]
            assert isinstance(size, tuple)
            found = [size_after(unit.called, size, dtype, seed) for seed in seeds]
        return found[0] if len(set(found)) == 1 else found

    def _drawn(self, keys: Keys, size: Size) -> list[PassParams]:
        """Draw for all passes, as sample_params does."""
        drawn: list[PassParams] = []
        sizes: Any = size
        dtype = torch.uint8  # what transforms that are called see, to know the size they give
        for place, unit in enumerate(self._pipeline.units):
            drawn.append(self._draw(place, unit, keys, sizes))
            sizes = self._sizes(unit, drawn[-1], sizes, dtype)
            if unit.settings.dtype is not None or unit.settings.normal is not None:
                dtype = torch.float32
        return drawn

    # --- a batch ---

    def _apply_to(
        self,
        x: Any,
        targets: Any,
        sample_ids: Tensor | Sequence[int] | None,
        epoch: int | None,
        view: int | Sequence[int] | Tensor | None,
        given: Sequence[PassParams] | None,
        out: Tensor | None,
    ) -> Any:
        """Run all passes, as forward does; ``given`` has the parameters of each."""
        op, pipeline = self._op, self._pipeline
        batch = batch_of(x, op, self._single)
        single = batch.one and self._single
        if single and out is not None:
            raise ValueError(f"fusereg.{op}: out is for batches (N, C, H, W)")
        keys = None
        if given is None:
            keys = self._keys(batch.n, sample_ids, epoch, view)
            given = [None] * len(pipeline.units)  # type: ignore[list-item]
        elif not (sample_ids is None and epoch is None and view is None):
            raise ValueError(f"fusereg.{op}: params exclude sample_ids and epoch, and view")
        elif len(given) != len(pipeline.units):
            raise ValueError(
                f"fusereg.{op}: params must be one AugmentParams for each of "
                f"{len(pipeline.units)} passes, got {len(given)}"
            )
        else:
            for unit, params in zip(pipeline.units, given, strict=True):
                unit.check_params(params, op)
        if pipeline.mixed:
            notice_labels(op, targets, keys is None)
        found = None
        if targets is not None:
            tree = [targets] if single else targets
            found = Targets(tree, batch.n, batch.size, self.rules, op, pipeline.mixed)
        if not self._looked and batch.x.is_floating_point():
            self._look_at_scale(batch.x)
        tasks = list(zip(range(len(given)), pipeline.units, given, strict=True))
        y, found = self._some(tasks, batch.x, batch.frames, found, keys, out)
        if not tasks:
            y = self._converted(y, out)
        y = batch.restore(y, pipeline.types)
        if found is None:
            return y
        moved = found.finish(pipeline.types == "pure", pipeline.cast)
        return y, moved[0] if single else moved

    def _look_at_scale(self, x: Tensor) -> None:
        """Warn once if the first floating images are of [0, 255], where [0, 1] is understood."""
        if not dispatch.direct(x) or not x.is_cpu or len(x) == 0:
            return
        self._looked = True
        read = any(
            u.program is not None or u.settings.color or u.settings.normal is not None
            for u in self._pipeline.units
        )
        highest = float(x[0].detach().max()) if read else 0.0
        if highest > _LARGE:
            warnings.warn(
                f"fusereg.{self._op}: floating images are understood to be of [0, 1], and the "
                f"first has values up to {highest:g}; divide them by 255, or give uint8",
                stacklevel=6,
            )

    def _some(
        self,
        tasks: Sequence[Task],
        x: Tensor,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Targets | None]:
        """Run passes for images [N * frames, C, H, W] and their targets."""
        op, count = self._op, len(self._pipeline.units)
        done = 0
        for at, (place, unit, own) in enumerate(tasks):
            if at < done:
                continue
            last = place == count - 1
            if at and tasks[at - 1][1].called is not None:
                _ops.check_images(x, op)
            if unit.makes_apart and len(x) > frames:
                each = plain(x).reshape(-1, frames, *x.shape[1:]) if frames > 1 else plain(x)
                trees = None if found is None else found.split(False)
                return self._each(tasks[at:], list(each), trees, frames, found, keys, out)
            together = joined(tasks[at:], x)
            if together is not None:
                x = self._joined(*together, x, frames, found, keys, out)
                done = at + sum(task is not None for task in together)
                continue
            if own is None and not unit.idle:
                assert keys is not None
                own = self._draw(place, unit, keys, (x.shape[-2], x.shape[-1]))
            if unit.called is not None:
                y, trees = call(unit.called, x, own, found, op, frames)  # type: ignore[arg-type]
                if isinstance(y, list):
                    if found is not None and trees is None:
                        trees = found.split(False)
                    return self._each(tasks[at + 1 :], y, trees, frames, found, keys, out)
                x = y
                if found is not None and trees is not None:
                    found = found.joined(trees, (x.shape[-2], x.shape[-1]))
            elif isinstance(own, ProgramParams):
                x = self._programmed(unit, x, own, found, frames, out, last)
                continue
            elif not unit.idle:
                assert isinstance(own, AugmentParams)
                if found is not None:
                    found.move(own, unit.settings, unit.moves)
                every = own if frames == 1 else own.repeat_interleave(frames)
                x = self._rendered(x, every, unit, last, out if last else None)
                continue
            if last:
                x = self._converted(x, out)
        return x, found

    def _joined(
        self,
        before: Task | None,
        programmed: Task,
        after: Task | None,
        x: Tensor,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        out: Tensor | None,
    ) -> Tensor:
        """Run a program with the passes before and after it."""
        images, size = plain(x), (x.shape[-2], x.shape[-1])
        passes: list[_ops.Pass | None] = []
        every: ProgramParams | None = None
        for task in (before, programmed, after):
            if task is None:
                passes.append(None)
                continue
            place, unit, own = task
            if own is None:
                assert keys is not None
                own = self._draw(place, unit, keys, size)
            if isinstance(own, ProgramParams):
                every = self._moved(own, size, found, frames)
                every.check_images(images.shape, self._op)
                continue
            assert isinstance(own, AugmentParams)
            if found is not None:
                found.move(own, unit.settings, unit.moves)
            own = own if frames == 1 else own.repeat_interleave(frames)
            own.check_images((*images.shape[:2], *size), self._op)
            last = place == len(self._pipeline.units) - 1
            dtype = self._dtype_of(unit, last)
            if dtype is None and last and out is not None:
                dtype = out.dtype
            how = (unit.settings, self._op, dtype, self._keep_dtype, self.memory_format)
            passes.append(pass_of(images, own, *how))
            size = own.size
        place, unit, _ = programmed
        assert unit.program is not None
        assert every is not None
        last = (programmed if after is None else after)[0] == len(self._pipeline.units) - 1
        direct = after is not None or self._is_direct(x, last, out)
        target = out if last and direct else None
        y = unit.program.run(x, every, self._op, target, *passes)
        return y if direct else self._converted(y, out)

    def _dtype_of(self, unit: Unit, last: bool) -> torch.dtype | None:
        return (self.out_dtype or unit.settings.dtype) if last else unit.settings.dtype

    def _is_direct(self, x: Tensor, last: bool, out: Tensor | None) -> bool:
        """Return whether the result of a program is that of the chain, or that of no last pass."""
        given = x.dtype if out is None else out.dtype
        asked = (self.memory_format, self.out_dtype or x.dtype, given)
        return not last or asked == (None, x.dtype, x.dtype)

    def _rendered(
        self,
        x: Tensor | list[Tensor],
        params: AugmentParams,
        unit: Unit,
        last: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        return render(
            x,
            params,
            unit.settings,
            self._op,
            out_dtype=self._dtype_of(unit, last),
            keep_dtype=self._keep_dtype,
            memory_format=self.memory_format,
            out=out,
        )

    def _converted(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return the result of a last pass that is no kernel, in the dtype and form asked for."""
        if out is None and self.memory_format is None and self.out_dtype in (None, x.dtype):
            return x
        _ops.check_images(x, self._op)
        ids = torch.zeros(len(x), dtype=torch.int64, device="cpu")
        still = draw([], ids, (x.shape[-2], x.shape[-1]), 0, 0, self._op)
        return self._rendered(x, still, Unit((), Settings()), True, out)

    def _programmed(
        self,
        unit: Unit,
        x: Tensor,
        params: ProgramParams,
        found: Targets | None,
        frames: int,
        out: Tensor | None,
        last: bool,
    ) -> Tensor:
        assert unit.program is not None
        if unit.program.chains and found is not None:
            found.check_all_move("AugMix")
            refuse_types(found, self._op, "AugMix mixes them with their own moved images")
            found = None
        every = self._moved(params, (x.shape[-2], x.shape[-1]), found, frames)
        direct = self._is_direct(x, last, out)
        y = unit.program.run(x, every, self._op, out if last and direct else None)
        return y if direct else self._converted(y, out)

    def _moved(
        self, params: ProgramParams, size: Size, found: Targets | None, frames: int
    ) -> ProgramParams:
        """Move the targets by programs, and return these for each frame."""
        if found is not None:
            nearest = Settings(interpolation="nearest")
            for moved in params.warps(size):
                found.move(moved, nearest)
        return params if frames == 1 else params.repeat_interleave(frames)

    # --- images of several sizes ---

    def _each(
        self,
        tasks: Sequence[Task],
        images: list[Tensor],
        trees: list[Any] | None,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Targets | None]:
        """Run passes for images of several sizes, one by one up to one that takes them together.

        ``trees`` has the targets of each; those of ``found`` tell how they are joined.
        """
        together = keys is not None and frames == 1 and _ops.one_call(images)
        if keys is not None and together and tasks and tasks[0][1].makes_alike:
            place, unit, _ = tasks[0]
            x, found = self._together(place, unit, images, trees, found, keys)
            return self._rest(tasks[1:], x, frames, found, keys, out)
        stop = next(
            (
                i
                for i, (_, unit, _) in enumerate(tasks)
                if unit.settings.mixed or (together and unit.makes_alike)
            ),
            len(tasks),
        )
        results, moved = [], []
        for i, image in enumerate(images):
            x, one = image if image.dim() == 4 else image[None], None
            if found is not None and trees is not None:
                one = found.of_one(trees[i], (x.shape[-2], x.shape[-1]))
            own = [(at, unit, None if p is None else p[i]) for at, unit, p in tasks[:stop]]
            y, one = self._some(own, x, frames, one, None if keys is None else keys[i : i + 1])
            results.append(y)
            if one is not None:
                moved.append(one.whole()[0])
        if together and stop < len(tasks) and tasks[stop][1].makes_alike:
            later = [y[0] for y in results]
            return self._each(tasks[stop:], later, moved or None, frames, found, keys, out)
        sizes = {tuple(y.shape[-2:]) for y in results}
        if len(sizes) > 1:
            raise ValueError(
                f"fusereg.{self._op}: images must be of one size in the end and before they are "
                f"mixed, got {sorted(sizes)}; add a crop or a Resize to (height, width)"
            )
        x = torch.cat(results)
        if found is not None:
            found = found.joined(moved, (x.shape[-2], x.shape[-1]))
        return self._rest(tasks[stop:], x, frames, found, keys, out)

    def _rest(
        self,
        tasks: Sequence[Task],
        x: Tensor,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Targets | None]:
        """Run the passes after those for images of several sizes: there may be none."""
        if tasks or out is None:
            return self._some(tasks, x, frames, found, keys, out)
        return self._converted(x, out), found

    def _together(
        self,
        place: int,
        unit: Unit,
        images: list[Tensor],
        trees: list[Any] | None,
        found: Targets | None,
        keys: Keys,
    ) -> tuple[Tensor, Targets | None]:
        """Run a pass for images of several sizes by one call of the kernel."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        params = keys.draw(unit.steps, sizes, self._op)
        if found is not None and trees is not None:
            ones = [found.of_one(tree, size) for tree, size in zip(trees, sizes, strict=True)]
            if any(one.any_types() for one in ones):
                if unit.settings.mixed:
                    raise ValueError(
                        f"fusereg.{self._op}: images must be of one size to be mixed, with "
                        "targets that move"
                    )
                for i, one in enumerate(ones):
                    own = replace(params[i], input_size=sizes[i])
                    one.move(own, unit.settings, unit.moves)
                found = found.joined([one.whole()[0] for one in ones], params.size)
            else:
                found = found.joined(trees, params.size)
                found.move(params, unit.settings, unit.moves)
        last = place == len(self._pipeline.units) - 1
        return self._rendered(images, params, unit, last), found

    def run_several(
        self,
        images: list[Tensor],
        targets: list[Any] | None,
        sample_ids: Sequence[int] | None = None,
        view: Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Run all passes for images, or clips, of several sizes, with targets of each or none."""
        pipeline = self._pipeline
        keys = self._keys(len(images), sample_ids, None, view)
        found: Targets | None = None
        if targets is not None:
            found = Unstacked(len(images), self.rules, self._op, pipeline.mixed)
        elif pipeline.mixed:
            notice_labels(self._op, targets, False)
        flat = [plain(image) for image in images]
        frames = flat[0].shape[0] if flat[0].dim() == 4 else 1
        tasks: list[Task] = [(place, unit, None) for place, unit in enumerate(pipeline.units)]
        y, found = self._each(tasks, flat, targets, frames, found, keys)
        form = Batch(y, frames, images[0], False)
        moved = None if found is None else found.finish(pipeline.types == "pure", pipeline.cast)
        return form.restore(y, pipeline.types), moved
