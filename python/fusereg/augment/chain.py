"""The passes of a chain, one after the other: draw, move the targets, render or call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import dispatch
from . import op as _ops
from .arguments import check_memory_format
from .inputs import Batch
from .labels import rewrap, unwrap
from .loop import Called, CallParams, call, size_after
from .params import AugmentParams, draw
from .program import Program, ProgramParams
from .render import Settings, render, render_several
from .seeded import Keys, SeededModule
from .steps import VALUES, Encoded, Later, at_size, ends_alike
from .targets import Look, Targets, Unstacked, rules_of
from .tree import batch_tree, kind_of, leaves_of, stack

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
        dtype: of the result, where a transform says so.
        mask_fill: as its transforms have it.
        idle: nothing happens: there are only conversions of types.
        program: of each image, instead of all that.
    """

    steps: Sequence[Encoded]
    settings: Settings
    called: Called | None = None
    dtype: torch.dtype | None = None
    mask_fill: float | None = None
    idle: bool = False
    program: Program | None = None

    def look(self) -> Look:
        """Return what targets see."""
        s = self.settings
        edge = "constant" if s.antialias else "border"
        return Look(
            edge if s.fill_mode == "window" else s.fill_mode,
            self.mask_fill,
            s.interpolation,
            s.antialias,
            s.mixed,
            s.num_classes,
            s.label_smoothing,
            any(isinstance(step, Later) or step[0] not in VALUES for step in self.steps),
        )


class Chain(SeededModule):
    """Base of Augment and Compose: passes that are drawn, rendered or called in turn."""

    def __init__(
        self,
        *,
        seed: int | None,
        out_dtype: torch.dtype | None,
        memory_format: torch.memory_format | None,
        rules: dict[str, Any],
    ) -> None:
        super().__init__(seed)
        self.out_dtype = out_dtype
        self.memory_format = check_memory_format(memory_format, self._op)
        self.rules = rules_of(self._op, rules)
        self._keep_dtype = True
        self._looked = False

    def _units(self) -> Sequence[Unit]:
        raise NotImplementedError

    def _draw(self, place: int, unit: Unit, keys: Keys, size: Size | list[Size]) -> PassParams:
        """Draw for one pass, in images of one size or of several."""
        if isinstance(size, list):
            return [self._draw(place, unit, keys[i : i + 1], own) for i, own in enumerate(size)]
        if unit.called is not None:
            return CallParams(keys.of_place(place), keys.ids)
        if unit.program is not None:
            return unit.program.draw(keys, size, self._op)
        return keys.draw(at_size(unit.steps, size), size, self._op)

    def _sizes(
        self, unit: Unit, params: PassParams, size: Size | list[Size], dtype: torch.dtype
    ) -> Any:
        """Return the size of the images after a pass, or their sizes."""
        if isinstance(params, AugmentParams):
            return params.size
        if isinstance(params, ProgramParams):
            return size
        if isinstance(params, list):
            assert isinstance(size, list)
            pairs = zip(params, size, strict=True)
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
        for place, unit in enumerate(self._units()):
            drawn.append(self._draw(place, unit, keys, sizes))
            sizes = self._sizes(unit, drawn[-1], sizes, dtype)
            if unit.dtype is not None or unit.settings.normal is not None:
                dtype = torch.float32
        return drawn

    def _run(
        self,
        batch: Batch,
        found: Targets | None,
        keys: Keys | None,
        given: list[Any] | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Targets | None]:
        """Run all passes: the images [N * frames, C, H, W] and the targets."""
        units = list(enumerate(self._units()))
        if not self._looked and batch.x.is_floating_point():
            self._look_at_scale(batch.x, [unit for _, unit in units])
        return self._some(units, batch.x, batch.frames, found, keys, given, out)

    def _look_at_scale(self, x: Tensor, units: list[Unit]) -> None:
        """Warn once if the first floating images are of [0, 255], where [0, 1] is understood."""
        if not dispatch.direct(x) or not x.is_cpu or len(x) == 0:
            return
        self._looked = True
        read = any(
            u.program is not None or u.settings.color or u.settings.normal is not None
            for u in units
        )
        highest = float(x[0].detach().max()) if read else 0.0
        if highest > _LARGE:
            warnings.warn(
                f"fusereg.{self._op}: floating images are understood to be of [0, 1], and the "
                f"first has values up to {highest:g}; divide them by 255, or give uint8",
                stacklevel=4,
            )

    def _some(
        self,
        units: list[tuple[int, Unit]],
        x: Tensor,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        given: list[Any] | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Targets | None]:
        op, last = self._op, len(units) - 1
        checked = True
        for at, (place, unit) in enumerate(units):
            if not checked:
                _ops.check_images(x, op)
                checked = True
            size = (x.shape[-2], x.shape[-1])
            if given is not None:
                own = given[at]
            else:
                assert keys is not None
                own = self._draw(place, unit, keys, size)
            if unit.called is not None:
                if not isinstance(own, CallParams):
                    raise TypeError(
                        f"fusereg.{op}: params of {unit.called.name} must be CallParams, got "
                        f"{type(own).__name__}"
                    )
                y, trees = call(unit.called, x, own, found, op, frames)
                rest = None if given is None else given[at + 1 :]
                if isinstance(y, list):
                    return self._each(units[at + 1 :], y, trees, frames, found, keys, rest)
                x, checked = y, False
                if found is not None and trees is not None:
                    found = found.joined(trees, (x.shape[-2], x.shape[-1]))
                continue
            if unit.idle:
                continue
            if unit.program is not None:
                x = self._programmed(
                    unit.program, x, own, found, frames, out if at == last else None, at == last
                )
                continue
            if found is not None:
                found.move(own, unit.look())
            x = render(
                x,
                own if frames == 1 else own.repeat_interleave(frames),
                unit.settings,
                op,
                out_dtype=(self.out_dtype or unit.dtype) if at == last else unit.dtype,
                keep_dtype=self._keep_dtype,
                memory_format=self.memory_format,
                out=out if at == last else None,
            )
        return x, found

    def finished(self, found: Targets) -> Any:
        """Return the targets as they are in the end."""
        return found.finish()

    def restored(self, y: Tensor, like: Tensor) -> Any:
        """Return the result for a list of images of the type of one of them."""
        return rewrap(y, like)

    def _programmed(
        self,
        program: Program,
        x: Tensor,
        params: ProgramParams,
        found: Targets | None,
        frames: int,
        out: Tensor | None,
        last: bool,
    ) -> Tensor:
        op = self._op
        if not isinstance(params, ProgramParams):
            raise TypeError(
                f"fusereg.{op}: params of a program must be ProgramParams, got "
                f"{type(params).__name__}"
            )
        if found is not None:
            look = Look(fill_mode="constant", interpolation="nearest")
            for moved in params.warps((x.shape[-2], x.shape[-1])):
                found.move(moved, look)
        dtype, form = (self.out_dtype, self.memory_format) if last else (None, None)
        as_is = dtype in (None, x.dtype) and form is None and (out is None or out.dtype is x.dtype)
        every = params if frames == 1 else params.repeat_interleave(frames)
        y = program.run(x, every, op, out if as_is else None)
        if as_is:
            return y
        size = (x.shape[-2], x.shape[-1])
        still = draw([], every.sample_ids, size, 0, 0, op)
        return render(
            y,
            still,
            Settings(),
            op,
            out_dtype=dtype,
            keep_dtype=True,
            memory_format=form,
            out=out,
        )

    def _each(
        self,
        units: list[tuple[int, Unit]],
        images: list[Tensor],
        trees: list[Any] | None,
        frames: int,
        found: Targets | None,
        keys: Keys | None,
        given: list[Any] | None,
    ) -> tuple[Tensor, Targets | None]:
        """Run passes for images of several sizes, one by one up to a pass that mixes them."""
        op = self._op
        while units and units[0][1].idle:
            units, given = units[1:], given and given[1:]
        unit = units[0][1] if units else None
        if (
            unit is not None
            and unit.called is None
            and unit.program is None
            and keys is not None
            and frames == 1
            and ends_alike(unit.steps)
            and _ops.one_call(images)
        ):
            x, found = self._together(unit, images, trees, found, keys, len(units) == 1)
            return self._some(units[1:], x, frames, found, keys, None, None)
        stop = next((i for i, (_, u) in enumerate(units) if u.settings.mixed), len(units))
        if found is not None and trees is None:
            trees = found.split(False)
        results, moved = [], []
        for i, image in enumerate(images):
            x = image if image.dim() == 4 else image[None]
            one = None
            if found is not None and trees is not None:
                one = found.of_one(trees[i], (x.shape[-2], x.shape[-1]))
            some = None if given is None else [g[i] for g in given[:stop]]
            key = None if keys is None else keys[i : i + 1]
            y, one = self._some(units[:stop], x, frames, one, key, some, None)
            results.append(y)
            if one is not None:
                moved.append(one.whole()[0])
        sizes = {tuple(y.shape[-2:]) for y in results}
        if len(sizes) > 1:
            raise ValueError(
                f"fusereg.{op}: images must be of one size in the end and before they are mixed, "
                f"got {sorted(sizes)}; add a crop or a Resize to (height, width)"
            )
        x = torch.cat(results)
        if found is not None:
            found = found.joined(moved, (x.shape[-2], x.shape[-1]))
        rest = None if given is None else given[stop:]
        return self._some(units[stop:], x, frames, found, keys, rest, None)

    def _together(
        self,
        unit: Unit,
        images: list[Tensor],
        trees: list[Any] | None,
        found: Targets | None,
        keys: Keys,
        last: bool,
    ) -> tuple[Tensor, Targets | None]:
        """Run a pass for images of several sizes by one call of the kernel."""
        op = self._op
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        params = keys.draw(unit.steps, sizes, op)  # type: ignore[arg-type]  # no Later
        look = unit.look()
        if found is not None and trees is None and not found.any_types():
            found.move(params, look)
        elif found is not None:
            if look.mixed:
                raise ValueError(
                    f"fusereg.{op}: images must be of one size to be mixed, with targets that move"
                )
            moved = []
            for i, tree in enumerate(found.split(False) if trees is None else trees):
                one = found.of_one(tree, sizes[i])
                one.move(replace(params[i], input_size=sizes[i]), look)
                moved.append(one.whole()[0])
            found = found.joined(moved, params.size)
        x = render_several(
            images,
            params,
            unit.settings,
            op,
            out_dtype=(self.out_dtype or unit.dtype) if last else unit.dtype,
            keep_dtype=self._keep_dtype,
            memory_format=self.memory_format,
        )
        return x, found

    def run_several(
        self, images: list[Tensor], targets: list[Any] | None, keys: dict[str, Any]
    ) -> tuple[Tensor, Targets | None]:
        """Run all passes for images, or clips, of several sizes, with targets of each or none.

        ``keys`` are those of :meth:`forward`.
        """
        n = len(images)
        drawn = self._keys(n, keys.get("sample_ids"), None, keys.get("view"))
        units = list(enumerate(self._units()))
        mixed = any(unit.settings.mixed for _, unit in units)
        flat = [unwrap(image) for image in images]
        frames = flat[0].shape[0] if flat[0].dim() == 4 else 1
        found: Targets | None = None
        trees = targets
        if targets is not None:
            if any(kind_of(leaf) not in ("", "Tensor") for leaf in leaves_of(targets)):
                found = Unstacked(n, self.rules, self._op, mixed)
            else:
                size = (flat[0].shape[-2], flat[0].shape[-1])
                tree = batch_tree(stack(targets))
                found, trees = Targets(tree, n, size, self.rules, self._op, mixed), None
        return self._each(units, flat, trees, frames, found, drawn, None)
