"""Which transforms of a list go into one pass, and why others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .render import Look
from .steps import Step


@dataclass(frozen=True)
class Stage:
    """What one transform adds to a pass.

    Attributes:
        name: for the plan.
        steps: geometry, erasing, mixing.
        resamples: pixels do not fall on pixels.
        moves: pixels can leave the canvas, or it becomes smaller: what comes later must not look
            for them.
        looks_outside: reads what is outside the canvas, and fills it.
        half_pixels: looks outside by half a pixel alone, where it repeats the edge.
        interpolation, antialias, fill_mode, fill: of what resamples or looks outside.
        mean, std: of a normalization.
        erases, erase, erase_noise: of erased boxes.
        mixes, num_classes: of MixUp and CutMix.
    """

    name: str
    steps: tuple[Step, ...] = ()
    resamples: bool = False
    moves: bool = False
    looks_outside: bool = False
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
    look: Look = field(default_factory=lambda: Look(fill_mode="border"))

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

    def refuses(self, new: Stage, exact: bool) -> str:
        """Why the stage cannot join; empty if it can."""
        erased = self._last(lambda s: s.erases)
        mixed = self._last(lambda s: s.mixes)
        normal = self._last(lambda s: s.mean is not None)
        if new.geometric and (erased or mixed):
            before = mixed or erased
            assert before is not None
            return f"{new.name} would move the boxes of {before.name}"
        if new.erases and (erased or mixed):
            before = mixed or erased
            assert before is not None
            return (
                f"{before.name} comes before {new.name}, and a pass has one erased box, mixed last"
            )
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
        normal = self._last(lambda s: s.mean is not None)
        if new.resamples:
            other = self._last(lambda s: s.resamples)
            if other and other.interpolation != new.interpolation:
                return (
                    f"{new.name} reads by {new.interpolation}, "
                    f"{other.name} by {other.interpolation}"
                )
            if other and exact:
                return f"{other.name} and {new.name} resample, and exact=True keeps both"
        if new.looks_outside and not new.half_pixels:
            other = self._last(lambda s: s.looks_outside and not s.half_pixels)
            if other and (other.fill_mode, other.fill) != (new.fill_mode, new.fill):
                return f"{new.name} fills by {_fill_text(new)}, {other.name} by {_fill_text(other)}"
            if other and normal and not self.look.fill_normalized and new.fill_mode == "constant":
                return f"{normal.name} lies between the fills of {other.name} and {new.name}"
        moved = self._last(lambda s: s.moves)
        if exact and moved and (new.looks_outside or new.resamples):
            return (
                f"{new.name} would see pixels that {moved.name} removed, and exact=True forbids it"
            )
        return ""

    def add(self, new: Stage) -> None:
        """The stage joins."""
        if new.geometric:
            self._note(new)
            if new.resamples:
                self.look = replace(
                    self.look,
                    interpolation=new.interpolation,
                    antialias=self.look.antialias or new.antialias,
                )
            if new.looks_outside and not new.half_pixels:
                normalized = any(s.mean is not None for s in self.stages)
                self.look = replace(
                    self.look,
                    fill_mode=new.fill_mode,
                    fill=new.fill,
                    fill_normalized=normalized and new.fill_mode == "constant",
                )
        if new.mean is not None:
            self.look = replace(
                self.look,
                mean=new.mean,
                std=new.std,
            )
        if new.erases:
            self.look = replace(
                self.look,
                erase=new.erase,
                erase_noise=new.erase_noise,
                erase_before=all(s.mean is None for s in self.stages),
            )
        if new.mixes:
            self.look = replace(self.look, mixed=True, num_classes=new.num_classes)
        self.stages.append(new)
        self.names.append(new.name)

    def _note(self, new: Stage) -> None:
        other = self._last(lambda s: s.resamples)
        if new.resamples and other:
            self.notes.append(
                f"{other.name} and {new.name} resample once instead of twice: sharper than "
                "one after the other"
            )
        moved = self._last(lambda s: s.moves)
        if moved and new.looks_outside and not new.half_pixels:
            self.notes.append(
                f"{new.name} sees the image's own pixels where {moved.name} had removed them, and "
                "fills only what is outside the image"
            )
        elif new.half_pixels and self.stages and any(s.geometric for s in self.stages):
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


def fuse(
    items: Sequence[tuple[str, Sequence[Stage] | Callable[..., Any]]], exact: bool
) -> tuple[Pass, ...]:
    """The passes of a list of (name, stages or a function that is called as it is)."""
    passes: list[Pass] = []
    for name, item in items:
        if callable(item):
            passes.append(
                Pass([name], reason="fusereg does not know it" if passes else "", function=item)
            )
            continue
        for stage in item:
            reason = ""
            if passes and passes[-1].function is None:
                reason = passes[-1].refuses(stage, exact)
            elif passes:
                reason = f"{passes[-1].names[0]} is called as it is"
            if not passes or reason:
                passes.append(Pass(reason=reason))
            passes[-1].add(stage)
    return tuple(passes)
