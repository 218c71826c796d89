"""Which transforms of a list go into one pass, and why others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .render import Look, repeat_edge
from .steps import LARGER_IS_AN_ERROR, Centre, Room, Step, Window


@dataclass(frozen=True)
class Stage:
    """What one transform adds to a pass.

    Attributes:
        name: for the plan.
        steps: geometry, erasing, mixing.
        resamples: pixels do not fall on pixels.
        moves: pixels can leave the canvas, or it becomes smaller: what comes later must not look
            for them.
        fills: reads what is outside the canvas, and fills it.
        may_fill: does so where its window is larger than the canvas.
        half_pixels: looks outside by half a pixel, where it repeats the edge.
        interpolation, antialias, fill_mode, fill: of what resamples or fills.
        mean, std: of a normalization.
        erases, erase, erase_noise: of erased boxes.
        mixes, num_classes: of MixUp and CutMix.
    """

    name: str
    steps: tuple[Step, ...] = ()
    resamples: bool = False
    moves: bool = False
    fills: bool = False
    may_fill: bool = False
    half_pixels: bool = False
    interpolation: str = "bilinear"
    antialias: bool = False
    fill_mode: str = "constant"
    fill: tuple[float, ...] = (0.0,)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    erases: bool = False
    erase: tuple[float, ...] = (0.0,)
    erase_noise: bool = False
    mixes: bool = False
    num_classes: int | None = None

    @property
    def geometric(self) -> bool:
        """Whether it moves pixels at all."""
        return bool(self.steps) and not self.erases and not self.mixes


@dataclass
class Pass:
    """Transforms that run as one kernel.

    Attributes:
        names: theirs.
        notes: where the result differs from one transform after the other.
        reason: why this is not part of the pass before it; empty for the first.
    """

    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    function: Callable[..., Any] | None = None
    stages: list[Stage] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [" + ".join(self.names)]
        if self.function is not None:
            lines[0] += " (called as it is)"
        if self.reason:
            lines.append(f"  a pass of its own: {self.reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _last(self, wanted: Callable[[Stage], bool]) -> Stage | None:
        return next((s for s in reversed(self.stages) if wanted(s)), None)

    def _filler(self) -> Stage | None:
        """Whose fill the pass has: one that surely fills, if there is one."""
        return self._last(lambda s: s.fills) or self._last(lambda s: s.may_fill)

    def _clashes(self, a: Stage, b: Stage) -> bool:
        """Whether what both see outside is not the same."""
        if (a.fill_mode, a.fill) != (b.fill_mode, b.fill):
            return True
        before = [s.mean is not None for s in self.stages]
        since = before[self.stages.index(a) :] if a in self.stages else []
        return a.fill_mode == "constant" and any(since)

    def look(self) -> Look:
        """What the kernel is told besides the geometry."""
        look = Look()
        normalized = False
        filler = self._filler()
        for s in self.stages:
            if s.resamples:
                antialias = look.antialias or s.antialias
                look = replace(look, interpolation=s.interpolation, antialias=antialias)
            if s is filler:
                constant = s.fill_mode == "constant"
                look = replace(
                    look,
                    fill_mode=s.fill_mode,
                    fill=s.fill,
                    fill_normalized=normalized and constant,
                )
            if s.mean is not None:
                look = replace(look, mean=s.mean, std=s.std)
                normalized = True
            if s.erases:
                look = replace(
                    look, erase=s.erase, erase_noise=s.erase_noise, erase_before=not normalized
                )
            if s.mixes:
                look = replace(look, mixed=True, num_classes=s.num_classes)
        return look if filler else repeat_edge(look)

    def refuses(self, new: Stage, exact: bool) -> str:
        """Why the stage cannot join; empty if it can."""
        erased = self._last(lambda s: s.erases)
        mixed = self._last(lambda s: s.mixes)
        normal = self._last(lambda s: s.mean is not None)
        before = mixed or erased
        if new.geometric and before:
            return f"{new.name} would move the boxes of {before.name}"
        if new.erases and before:
            return f"a pass erases one box and mixes last, and {before.name} comes first"
        if new.mixes and mixed:
            return f"a pass mixes once, and {mixed.name} has"
        if new.mean is not None:
            if normal:
                return f"a pass normalizes once, and {normal.name} has"
            if erased and erased.erase_noise:
                return f"{new.name} would normalize the noise of {erased.name}"
        if new.geometric:
            return self._refuses_geometry(new, exact)
        return ""

    def _refuses_geometry(self, new: Stage, exact: bool) -> str:
        other = self._last(lambda s: s.resamples)
        if new.resamples and other:
            if other.interpolation != new.interpolation:
                return (
                    f"{new.name} reads by {new.interpolation}, "
                    f"{other.name} by {other.interpolation}"
                )
            if exact:
                return f"{other.name} and {new.name} resample, and exact=True keeps both"
        filler = self._last(lambda s: s.fills)
        if new.fills and filler and self._clashes(filler, new):
            if (filler.fill_mode, filler.fill) == (new.fill_mode, new.fill):
                return (
                    f"the images are normalized between the fills of {filler.name} and {new.name}"
                )
            return f"{new.name} fills by {_fill_text(new)}, {filler.name} by {_fill_text(filler)}"
        moved = self._last(lambda s: s.moves)
        if exact and moved and (new.fills or new.may_fill or new.resamples):
            return f"{new.name} would see what {moved.name} removed, and exact=True forbids it"
        return ""

    def canvas(self, before: tuple[int, int] | None) -> tuple[int, int] | None:
        """The size of what the pass makes of a canvas, if that does not depend on the images."""
        for step in (step for stage in self.stages for step in stage.steps):
            before = None if isinstance(step, Room) else getattr(step, "size", before)
        return before

    def add(self, new: Stage) -> None:
        """The stage joins."""
        if new.geometric:
            self._note(new)
        filler = self._filler()
        edge = None if self._last(lambda s: s.fills) else self._last(lambda s: s.half_pixels)
        if new.may_fill and filler and self._clashes(filler, new):
            new = self._must_fit(new, filler)
        elif new.may_fill and edge:
            new = self._must_fit(new, edge)
        if new.half_pixels and not self._last(lambda s: s.fills):
            self.stages = [self._must_fit(s, new) if s.may_fill else s for s in self.stages]
        if new.fills:
            self.stages = [
                self._must_fit(s, new) if s.may_fill and self._clashes(s, new) else s
                for s in self.stages
            ]
        self.stages.append(new)
        self.names.append(new.name)

    def _must_fit(self, optional: Stage, other: Stage) -> Stage:
        """A crop that would fill where it is larger than the image: it has no fill of its own."""
        self.notes.append(
            f"{optional.name} must not be larger than the images (an error says so): the fill is "
            f"that of {other.name}"
        )
        steps = tuple(
            replace(step, larger=LARGER_IS_AN_ERROR) if isinstance(step, (Window, Centre)) else step
            for step in optional.steps
        )
        return replace(optional, steps=steps, may_fill=False)

    def _note(self, new: Stage) -> None:
        other = self._last(lambda s: s.resamples)
        if new.resamples and other:
            self.notes.append(
                f"{other.name} and {new.name} resample once instead of twice: sharper than "
                "one after the other"
            )
        moved = self._last(lambda s: s.moves)
        if moved and (new.fills or new.may_fill):
            where = "" if new.fills else ", if it is larger than they are,"
            self.notes.append(
                f"{new.name}{where} sees the images' own pixels where {moved.name} had removed "
                "them, and fills only what is outside the images"
            )
        elif new.half_pixels and any(s.geometric for s in self.stages):
            self.notes.append(
                f"{new.name} reads the pixels beyond its window's edge instead of repeating it"
            )


def _fill_text(stage: Stage) -> str:
    if stage.fill_mode != "constant":
        return stage.fill_mode
    return f"constant {stage.fill[0] if len(stage.fill) == 1 else stage.fill}"


@dataclass(frozen=True)
class Plan:
    """What :class:`fusereg.augment.Compose` made of its list; ``print`` shows it.

    Attributes:
        passes: in order, with names, notes and reasons.
    """

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return "\n".join(f"{i}. {p}" for i, p in enumerate(self.passes, start=1))


def _fitted(stage: Stage, canvas: tuple[int, int] | None) -> Stage:
    """The stage, for which it is known whether it fills if the canvas is known."""
    if not stage.may_fill or canvas is None:
        return stage
    sizes = [step.size for step in stage.steps if isinstance(step, (Window, Centre))]
    fits = all(h <= canvas[0] and w <= canvas[1] for h, w in sizes)
    return replace(stage, fills=stage.fills or not fits, may_fill=False)


def fuse(
    items: Sequence[tuple[str, Sequence[Stage] | Callable[..., Any]]], exact: bool
) -> tuple[Pass, ...]:
    """The passes of a list of (name, stages or a function that is called as it is)."""
    passes: list[Pass] = []
    canvas: tuple[int, int] | None = None
    for name, item in items:
        if callable(item):
            passes.append(
                Pass([name], reason="fusereg does not know it" if passes else "", function=item)
            )
            canvas = None
            continue
        for stage in item:
            reason = ""
            stage = _fitted(stage, canvas)
            if passes and passes[-1].function is None:
                reason = passes[-1].refuses(stage, exact)
            elif passes:
                reason = f"{passes[-1].names[0]} is called as it is"
            if not passes or reason:
                passes.append(Pass(reason=reason))
            passes[-1].add(stage)
            canvas = passes[-1].canvas(canvas)
    return tuple(passes)
