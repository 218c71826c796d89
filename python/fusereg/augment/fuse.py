"""Fusion of a list of transforms into passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .arguments import Normalization
from .loop import Called
from .program import Policy, Program
from .render import Settings
from .steps import (
    LARGER_IS_AN_ERROR,
    RESIZES,
    Affine,
    CenterWindow,
    ExpandCanvas,
    Flip,
    Padded,
    Perspective,
    RandomWindow,
    ResizedWindow,
    ShortSide,
    Step,
    encode,
    ends_apart,
)

#: What makes values of [0, 255] those of [0, 1], and leaves others alone.
UNIT = Normalization((0.0,), (1.0,))


@dataclass(frozen=True)
class Stage:
    """The contribution of one transform to a pass.

    Attributes:
        name: for the plan.
        steps: geometry, erasing, mixing.
        resamples: pixels are interpolated.
        moves: pixels can leave the canvas, or it becomes smaller: later stages must not expect
            them.
        fills: reads pixels outside the canvas, and fills them.
        may_fill: fills where its window is larger than the canvas.
        half_pixels: reads half a pixel outside the canvas, where the edge is repeated.
        interpolation, antialias, fill_mode, fill: of a stage that resamples or fills.
        floors: "nearest" takes the pixel at the place of the output pixel's corner.
        normal: the normalization.
        erases, erase, erase_noise: of erased boxes.
        mixes, num_classes, label_smoothing: of MixUp and CutMix.
        mask_fill: the fill of masks, where it is not that of the chain.
        dtype: of the result.
        types: what becomes of torchvision's types: "image" or "pure"; empty: they stay.
        cast: a function of each target.
        policy: draws a program for each image, which runs as a pass without other stages.
        whole_pixels: of a program: pixels are of the image or filled, and nothing in between.
        own_units: of a program: the fill is in units of the images, of floats as well.
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
    floors: bool = False
    fill_mode: str = "constant"
    fill: tuple[float, ...] = (0.0,)
    normal: Normalization | None = None
    erases: bool = False
    erase: tuple[float, ...] = (0.0,)
    erase_noise: bool = False
    mixes: bool = False
    num_classes: int | None = None
    label_smoothing: float = 0.0
    mask_fill: float | None = None
    dtype: torch.dtype | None = None
    types: str = ""
    cast: Callable[[Any], Any] | None = None
    policy: Policy | None = None
    whole_pixels: bool = False
    own_units: bool = False

    def has(self, *kinds: type[Step]) -> bool:
        """Return whether one of its steps is of one of these kinds."""
        return any(isinstance(step, kinds) for step in self.steps)

    @property
    def neutral(self) -> bool:
        """Return whether it leaves images as they are."""
        return not (self.steps or self.normal or self.dtype or self.policy)

    @property
    def geometric(self) -> bool:
        """Return whether it changes the places of pixels."""
        return bool(self.steps) and not self.erases and not self.mixes


@dataclass
class Pass:
    """Transforms that run as one kernel.

    Attributes:
        names: of the transforms.
        notes: where the result differs from one transform after the other.
        reason: why this is not part of the pass before it; empty for the first.
        called: a transform that is called, instead of stages.
        stages: in order.
    """

    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    called: Called | None = None
    stages: list[Stage] = field(default_factory=list)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The function that is called, or None."""
        return None if self.called is None else self.called.function

    def __str__(self) -> str:
        """Return the lines of the plan."""
        lines = [" + ".join(self.names)]
        if self.called is not None:
            lines[0] += " (sample by sample)" if self.called.each else " (called as it is)"
        if self.reason:
            lines.append(f"  a pass of its own: {self.reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    @property
    def ends_apart(self) -> bool:
        """Return whether images of one size may have several after it."""
        return ends_apart(encode(step for s in self.stages for step in s.steps))

    def program(self, seen: dict[str, int]) -> Program | None:
        """Return the program of the pass, None for others; ``seen`` counts the policies."""
        stages = [s for s in self.stages if s.policy is not None]
        if not stages:
            return None
        first = seen.get("program", 0)
        seen["program"] = first + len(stages)
        policies = [s.policy for s in stages if s.policy is not None]
        filler = next((s for s in stages if s.policy is not None and s.policy.moves), stages[0])
        numbered = tuple(zip(policies, range(first, first + len(stages)), strict=True))
        how = (filler.fill, filler.whole_pixels, filler.own_units)
        return Program(numbered, *how, policies[0].chains)

    def _refuses_program(self, new: Stage, other: Stage) -> str:
        if new.policy is None or other.policy is None:
            names = (new, other) if new.policy is None else (other, new)
            return f"{names[1].name} runs as a program of each image, {names[0].name} does not"
        if chains := next((s for s in (new, other) if s.policy and s.policy.chains), None):
            return f"{chains.name} mixes several programs"
        if new.policy.first:
            return f"{new.name} may change the number of channels"
        mover = self._last(lambda s: s.policy is not None and s.policy.moves)
        if mover is None or not new.policy.moves:
            return ""
        first, second = ((s.fill, s.whole_pixels, s.own_units) for s in (mover, new))
        same = first == second
        return "" if same else f"{new.name} and {mover.name} fill differently"

    def _last(self, wanted: Callable[[Stage], bool]) -> Stage | None:
        return next((s for s in reversed(self.stages) if wanted(s)), None)

    def _filler(self) -> Stage | None:
        """Return the stage whose fill is that of the pass, preferably one that always fills."""
        return self._last(lambda s: s.fills) or self._last(lambda s: s.may_fill)

    def _clashes(self, a: Stage, b: Stage) -> bool:
        """Return whether two stages see different pixels outside the canvas."""
        if (a.fill_mode, a.fill, a.mask_fill) != (b.fill_mode, b.fill, b.mask_fill):
            return True
        # Zero is zero in both units.
        changes = [s.normal is not None and (s.normal != UNIT or any(a.fill)) for s in self.stages]
        since = changes[self.stages.index(a) :] if a in self.stages else []
        return a.fill_mode == "constant" and any(since)

    def settings(self) -> Settings:
        """Return the settings of the kernel."""
        values: dict[str, Any] = {}
        normalized = False
        filler = self._filler()
        last = self._last(lambda s: s.normal is not None)
        for at, s in enumerate(self.stages):
            if s.resamples:
                values["interpolation"] = s.interpolation
                values["antialias"] = values.get("antialias", False) or s.antialias
                values["floors"] = s.floors
                floats = any(b.normal or b.dtype for b in self.stages[:at])
                values["cuts"] = s.interpolation == "bicubic" and not floats
            if s is filler:
                values.update(fill_mode=s.fill_mode, fill=s.fill, mask_fill=s.mask_fill)
                values["fill_normalized"] = normalized and s.fill_mode == "constant"
            values["dtype"] = s.dtype or values.get("dtype")
            if s is last:
                values["normal"] = s.normal
                normalized = True
            if s.erases:
                values.update(erase=s.erase, erase_noise=s.erase_noise)
                values["erase_before"] = not normalized
            if s.mixes:
                values.update(mixed=True, num_classes=s.num_classes)
                values["label_smoothing"] = s.label_smoothing
        settings = Settings(**values)
        if filler:
            return settings
        return settings.crop_first() if self._crops_first() else settings.repeat_edge()

    def _crops_first(self, *more: Stage) -> bool:
        """Return whether a resized crop comes last, and is of whole pixels of the image."""
        steps = [step for s in (*self.stages, *more) if s.geometric for step in s.steps]
        still = [step for step in steps if not isinstance(step, Flip)]
        whole = (RandomWindow, CenterWindow)
        return (
            bool(still)
            and isinstance(still[-1], ResizedWindow)
            and all(isinstance(step, whole) for step in still[:-1])
        )

    def refuses(self, new: Stage, merge: bool) -> str:
        """Return why a stage does not join the pass, or an empty string if it does.

        Without ``merge`` it must give what it gives after the pass, up to rounding.
        """
        other = self._last(lambda s: not s.neutral)
        if new.neutral or other is None:
            return ""
        if new.policy is not None or other.policy is not None:
            return self._refuses_program(new, other)
        erased = self._last(lambda s: s.erases)
        mixed = self._last(lambda s: s.mixes)
        normal = self._last(lambda s: s.normal is not None)
        before = mixed or erased
        if new.geometric and before:
            return f"{new.name} would move the boxes of {before.name}"
        if new.erases and before:
            return f"a pass erases one box and mixes last, and {before.name} comes first"
        if new.mixes and mixed:
            return f"a pass mixes once, and {mixed.name} has"
        if new.normal is not None:
            if normal and normal.normal != UNIT:
                return f"a pass normalizes once, and {normal.name} has"
            if normal and normal.dtype and self._in_units_since(normal):
                return f"{new.name} would change the units of the fill after {normal.name}"
            if erased and erased.erase_noise:
                return f"{new.name} would normalize the noise of {erased.name}"
        if new.geometric:
            differs = "" if merge else self._differs(new)
            return self._refuses_geometry(new) or (differs and f"{differs} (merge=True joins them)")
        return ""

    def _in_units_since(self, stage: Stage) -> bool:
        """Return whether there is a fill, other than zero, in units of the result of a stage."""
        since = self.stages[self.stages.index(stage) :]
        return any(
            ((s.fills or s.may_fill) and s.fill_mode == "constant" and any(s.fill))
            or (s.erases and any(s.erase))
            for s in since
        )

    def _refuses_geometry(self, new: Stage) -> str:
        if new.has(Padded) and (moved := self._last(lambda s: s.moves)):
            return f"{new.name} would show what {moved.name} removed"
        other = self._last(lambda s: s.resamples)
        # A filter along the axes is fast, one across a turn is not, and not that of one after the
        # other.
        for a, b in ((self._last(_turns), new), (new, self._last(_filters))):
            if a and b and _turns(a) and _filters(b):
                return f"{a.name} is interpolated at points, and {b.name} filters"
        if new.floors and (mirror := self._last(lambda s: s.has(Flip))):
            return f"{new.name} takes the pixels at corners, which {mirror.name} would exchange"
        padded = self._last(lambda s: s.has(Padded))
        if padded and new.has(*RESIZES, ResizedWindow):
            return f"{new.name} would not interpolate at the edge of what {padded.name} adds"
        if new.has(*RESIZES):
            if new.antialias and (moved := self._last(lambda s: s.moves)):
                return f"{new.name} would see what {moved.name} removed"
            if smaller := self._last(lambda s: s.has(*RESIZES)):
                return f"{smaller.name} and {new.name} may shrink and enlarge"
        before = padded or other
        if before and new.fills and new.fill_mode != "constant" and new.has(Padded, RandomWindow):
            return f"{new.name} continues images by their edge, and {before.name} comes first"
        if new.resamples and other:
            if other.interpolation != new.interpolation:
                return (
                    f"{new.name} reads by {new.interpolation}, "
                    f"{other.name} by {other.interpolation}"
                )
            if other.floors != new.floors:
                return f"{new.name} and {other.name} round places in different ways"
        filler = self._last(lambda s: s.fills)
        if new.fills and filler and self._clashes(filler, new):
            if (filler.fill_mode, filler.fill) == (new.fill_mode, new.fill):
                return (
                    f"the images are normalized between the fills of {filler.name} and {new.name}"
                )
            return f"{new.name} fills by {_fill_text(new)}, {filler.name} by {_fill_text(filler)}"
        return ""

    def _differs(self, new: Stage) -> str:
        """Return why a stage that could join the pass would give something else than after it."""
        other = self._last(lambda s: s.resamples)
        if new.resamples and other:
            return f"{other.name} and {new.name} both resample"
        fills = new.fills or new.may_fill
        moved = self._last(lambda s: s.moves)
        if moved and (fills or new.resamples) and (self._filler() or not self._crops_first(new)):
            return f"{new.name} would see what {moved.name} removed"
        window = self._last(lambda s: s.has(ResizedWindow))
        if window and not _flips(new):
            return f"{window.name} repeats the edge of its window, and {new.name} would not"
        edge = self._last(lambda s: s.half_pixels)
        if edge and fills:
            return f"{edge.name} repeats the image's edge, and {new.name} may fill"
        filler = self._last(lambda s: s.fills)
        if filler and new.may_fill and self._clashes(filler, new):
            return (
                f"{new.name} may fill by {_fill_text(new)}, {filler.name} by {_fill_text(filler)}"
            )
        if filler and new.fills and new.fill_mode not in ("constant", "border"):
            return f"{new.name} continues what {filler.name} gives by {new.fill_mode}"
        return ""

    def canvas(self, before: Canvas | None) -> Canvas | None:
        """Return the size of the pass's result, or None if that depends on the images."""
        for step in (step for stage in self.stages for step in stage.steps):
            if isinstance(step, ShortSide):
                least = 0 if step.longest else step.sides[0]
                before = Canvas((least, least), False) if least else None
            elif isinstance(step, (ExpandCanvas, Padded, *RESIZES[2:])):
                before = None
            elif hasattr(step, "size"):
                before = Canvas(step.size, True)
        return before

    def add(self, new: Stage) -> None:
        """Add a stage to the pass."""
        if new.geometric:
            self._note(new, self._differs(new))
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
        """Return a crop that must not be larger than the image, as it has no fill of its own."""
        self.notes.append(
            f"{optional.name} must not be larger than the images (an error says so): the fill is "
            f"that of {other.name}"
        )
        steps = tuple(
            replace(step, larger=LARGER_IS_AN_ERROR)
            if isinstance(step, (RandomWindow, CenterWindow))
            else step
            for step in optional.steps
        )
        return replace(optional, steps=steps, may_fill=False)

    def _note(self, new: Stage, differs: str) -> None:
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
        elif differs and not (new.resamples and other):
            self.notes.append(f"not as one after the other: {differs}")


def _flips(stage: Stage) -> bool:
    """Return whether a stage changes no places of pixels but by flips."""
    return not stage.geometric or all(isinstance(step, Flip) for step in stage.steps)


def _filters(stage: Stage) -> bool:
    return stage.antialias


def _turns(stage: Stage) -> bool:
    return any(
        isinstance(step, Perspective) or (isinstance(step, Affine) and step.turns)
        for step in stage.steps
    )


def _fill_text(stage: Stage) -> str:
    if stage.fill_mode != "constant":
        return stage.fill_mode
    return f"constant {stage.fill[0] if len(stage.fill) == 1 else stage.fill}"


@dataclass(frozen=True)
class Plan:
    """The passes that :class:`fusereg.augment.Compose` made of its list; ``print`` shows them.

    Attributes:
        passes: in order, with names, notes and reasons.
    """

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        """Return the passes, numbered."""
        return "\n".join(f"{i}. {p}" for i, p in enumerate(self.passes, start=1))


@dataclass(frozen=True)
class Canvas:
    """The size (height, width) that images have, or the least that it can be."""

    size: tuple[int, int]
    exact: bool


def _fitted(stage: Stage, canvas: Canvas | None) -> Stage:
    """Return a stage of which it is known whether it fills, if the canvas is known."""
    if not stage.may_fill or canvas is None:
        return stage
    sizes = [step.size for step in stage.steps if isinstance(step, (RandomWindow, CenterWindow))]
    fits = all(h <= canvas.size[0] and w <= canvas.size[1] for h, w in sizes)
    if not (fits or canvas.exact):
        return stage
    return replace(stage, fills=stage.fills or not fits, may_fill=False)


def fuse(items: Sequence[Stage | Called], merge: bool = False) -> tuple[Pass, ...]:
    """Return the passes of a list of stages, and of transforms that are called.

    ``merge``: also of stages whose result in one pass is not that of one after the other.
    """
    passes: list[Pass] = []
    canvas: Canvas | None = None
    ragged = False  # images may differ in size until a pass has cropped or resized each
    for item in items:
        before = passes[-1] if passes else None
        if isinstance(item, Called):
            ragged = ragged or (item.each and item.resizes)
            own = Pass([item.name], called=item)
            if item.each:
                own.notes = [
                    f"called for each sample, under a generator keyed by its id: {item.reason}"
                ]
            elif before is not None:
                own.reason = item.reason
            passes.append(own)
            canvas = None
            continue
        stage = _fitted(item, canvas)
        reason = ""
        if before is not None and before.called is not None:
            how = "for each sample" if before.called.each else "as it is"
            reason = f"{before.names[0]} is called {how}"
        elif before is not None:
            reason = before.refuses(stage, merge)
            if ragged and stage.mixes and not reason:
                reason = "images of several sizes come to one size before they are mixed"
                ragged = False
        if before is None or reason:
            ragged = ragged or (before is not None and before.ends_apart)
            passes.append(Pass(reason=reason))
        passes[-1].add(stage)
        canvas = passes[-1].canvas(canvas)
    return tuple(passes)
