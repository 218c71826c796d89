"""Programs: a short list of operations for each image, which one kernel runs one after the other.

An instruction is a row of 8 numbers, as csrc/augment/program.h defines them. Images of uint8 stay
so after each of them; images of floats go through functions of torch, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _C
from ..core import checks, dispatch, memory, operator
from . import floats
from . import op as _ops
from .arguments import for_channels
from .params import AugmentParams, Drawn, draw
from .seeded import Keys
from .tree import plain, wrap

#: The code of each instruction.
IDENTITY, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, INVERT, POSTERIZE = range(8)
SOLARIZE, SOLARIZE_ADD, AUTOCONTRAST, EQUALIZE, SHARPNESS, BLUR, WARP = range(8, 15)
#: Numbers of an instruction.
WIDTH = 8
#: The interpolation of a warp that is PIL's bicubic; others have the numbers of INTERPOLATIONS.
PIL_BICUBIC = 3
#: Those that need gray or hue, which images of 1 and 3 channels have.
_OF_COLORS = {CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue", GRAY: "grayscale"}

#: The code and its arguments.
Row: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ProgramParams(Drawn):
    """The programs of N images, as ``Compose.sample_params`` draws them.

    Attributes:
        programs: [N, length, 8] float64: instructions (``csrc/augment/program.h``). Of AugMix, the
            shares that they are mixed by, and then those of each chain.
        sample_ids: [N] int64.
    """

    programs: Tensor
    sample_ids: Tensor

    def check_images(self, shape: Sequence[int], op: str) -> None:
        """Check that there are images [N, C, H, W] for all programs."""
        if len(shape) != 4 or shape[0] != len(self):
            raise ValueError(
                f"fusereg.{op}: x must have {len(self)} images as its parameters, "
                f"got shape {tuple(shape)}"
            )

    def warps(self, size: tuple[int, int]) -> Iterator[AugmentParams]:
        """Yield the geometry of the instructions one after the other, for what moves with it."""
        for rows in self.programs.unbind(1):
            moved = rows[:, 0] == WARP
            if bool(moved.any()):
                still = draw([], self.sample_ids, size, 0, 0, "sample_params")
                still.records[moved, :6] = rows[moved, 1:7]
                yield still


class Numbers:
    """The random numbers of a sample: uniform within [0, 1), and standard normal."""

    def __init__(self, values: list[float], normals: int) -> None:
        count = len(values) - normals
        self.uniform: Callable[[], float] = iter(values[:count]).__next__
        self.normal: Callable[[], float] = iter(values[count:]).__next__

    def between(self, low: float, high: float) -> float:
        """Return a number of an interval."""
        return low + self.uniform() * (high - low)

    def below(self, count: int) -> int:
        """Return an integer from 0 to count - 1."""
        return int(self.uniform() * count)

    def sign(self) -> float:
        """Return 1 or -1."""
        return -1.0 if self.uniform() < 0.5 else 1.0


@dataclass(frozen=True)
class Policy:
    """A way of drawing the instructions of an image.

    Attributes:
        rows: returns the instructions for an image of a size (height, width).
        codes: the instructions that there may be.
        uniforms, normals: the most numbers of either kind that it takes.
        first: images of one channel have three after it, so nothing may come before it in a pass.
        chains: how many programs the image is mixed of, beside itself; 0: one, which is not mixed.
    """

    rows: Callable[[Numbers, tuple[int, int]], list[Row]]
    codes: frozenset[int]
    uniforms: int
    normals: int = 0
    first: bool = False
    chains: int = 0

    @property
    def moves(self) -> bool:
        """True where an instruction may move pixels."""
        return WARP in self.codes


@dataclass(frozen=True)
class Program:
    """The policies of a pass, with the numbers of those before them.

    Attributes:
        policies: with their occurrences.
        fill: of pixels outside the image.
        whole_pixels: pixels are either of the image or filled, as in PIL.
        own_units: the fill is in units of the images, of floats as well: else of bytes.
        chains: how many programs an image is mixed of, as Policy has it.
    """

    policies: tuple[tuple[Policy, int], ...]
    fill: tuple[float, ...] = (0.0,)
    whole_pixels: bool = False
    own_units: bool = False
    chains: int = 0

    @dispatch.outside_graphs
    def draw(self, keys: Keys, size: tuple[int, int], op: str) -> ProgramParams:
        """Draw the programs of samples, on the CPU."""
        n = len(keys.ids)
        found: list[list[Row]] = [[] for _ in range(n)]
        for policy, occurrence in self.policies:
            columns = policy.uniforms + policy.normals
            values = torch.empty(n, columns, dtype=torch.float64, device="cpu")
            where = (keys.drawn, keys.seed, keys.epoch, occurrence)
            _C.augment_numbers(values, *where, columns, policy.normals, op)
            for rows, own in zip(found, values.tolist(), strict=True):
                rows += policy.rows(Numbers(own, policy.normals), size)
        length = max(1, *(len(rows) for rows in found)) if found else 1
        flat: list[float] = []
        for rows in found:
            for row in rows:
                flat += row
                flat += (0.0,) * (WIDTH - len(row))
            flat += (0.0,) * (WIDTH * (length - len(rows)))
        programs = torch.tensor(flat, dtype=torch.float64, device="cpu").reshape(n, length, WIDTH)
        return ProgramParams(programs, keys.ids)

    def joins(self, x: Tensor) -> bool:
        """Return whether passes before and after the programs of these images can be part of them.

        A thread takes one sample after the other then: there must be some for each.
        """
        grows = x.shape[1] == 1 and any(policy.first for policy, _ in self.policies)
        return (
            x.dtype is torch.uint8
            and x.is_cpu
            and not _C.CUDA_ON_HOST
            and len(x) >= 2 * torch.get_num_threads()
            and not grows
            and not self.chains
            and dispatch.direct(plain(x))
        )

    def run(
        self,
        x: Tensor,
        params: ProgramParams,
        op: str,
        out: Tensor | None = None,
        before: _ops.Pass | None = None,
        after: _ops.Pass | None = None,
    ) -> Tensor:
        """Return the images after their programs, with a pass before and one after these.

        Passes are where ``joins`` is true, and mix no samples; the one after does not antialias.
        """
        images = plain(x)
        params.check_images(x.shape, op)
        self._check_channels(images.shape[1], op)
        if self.chains:
            return self._mixed(x, params, op, out)
        programs = params.programs.cpu().contiguous()
        if images.shape[1] == 1 and any(policy.first for policy, _ in self.policies):
            images = images.expand(-1, 3, -1, -1).contiguous()
            gray = (programs[..., 0] == GRAY) & (programs[..., 1] == 3)
            programs = torch.where(gray[..., None], torch.zeros_like(programs), programs)
        fill = for_channels(self.fill, images.shape[1], op, "fill")
        height, width = images.shape[2:] if before is None else before.target.size
        _C.color_program_check(programs, images.shape[1], height, width, op)
        if images.dtype is not torch.uint8:
            if out is not None:
                checks.check_target(images, out, op, tuple(images.shape), images.dtype)
            shades = tuple(f if self.own_units else f / 255 for f in fill)
            y = _in_floats(images, programs.tolist(), shades, self.whole_pixels, op)
            return wrap(y if out is None else out.copy_(y), x)  # type: ignore[no-any-return]
        programs = memory.to_device(programs, images.device, op)
        target = _ops.Target.of(images, (height, width), torch.uint8)
        if before is None and after is None:
            arguments = (programs, fill, self.whole_pixels)
            y = _ops.call(color_program, images, arguments, target, op, out)
            return wrap(y, x)  # type: ignore[no-any-return]
        target = target if after is None else after.target
        if out is not None:
            shape = (*images.shape[:2], *target.size)
            checks.check_target(images, out, op, shape, target.dtype)
        first = None if before is None else (*before.arguments, height, width)
        last = None if after is None else after.arguments
        passes = (programs, fill, self.whole_pixels, None, first, last, op)
        y = target.empty(images) if out is None else out
        y = _ops.run(_C.color_program, y, images, passes, op)
        return wrap(y if out is None else operator.written(y), x)  # type: ignore[no-any-return]

    def _mixed(self, x: Tensor, params: ProgramParams, op: str, out: Tensor | None) -> Tensor:
        """Return the images mixed with the results of their chains, as torchvision mixes them."""
        images = plain(x)
        alone = replace(self, chains=0)
        parts = params.programs[:, 1:].unflatten(1, (self.chains, -1)).unbind(1)
        chains = [
            alone.run(images, replace(params, programs=rows.contiguous()), op) for rows in parts
        ]
        if out is not None:
            checks.check_target(images, out, op, tuple(images.shape), images.dtype)
        own, others, shares = (
            params.programs[:, 0, : self.chains + 2].float().tensor_split((1, 2), 1)
        )
        weights = torch.cat([own, shares * others], 1)
        weights = memory.to_device(weights, images.device, op)[..., None, None, None]
        results = []
        for i, image in enumerate(images):  # one after the other, each while it is in the cache
            mixed = weights[i, 0] * image
            for weight, chain in zip(weights[i, 1:], chains, strict=True):
                mixed = mixed.add_(weight * chain[i])
            results.append(mixed.to(images.dtype))
        y = torch.stack(results) if results else images.clone()
        return wrap(y if out is None else out.copy_(y), x)  # type: ignore[no-any-return]

    def _check_channels(self, channels: int, op: str) -> None:
        """Refuse colors of images that have none, whether or not this batch has drawn them."""
        codes = {code for policy, _ in self.policies for code in policy.codes}
        named = [name for code, name in _OF_COLORS.items() if code in codes]
        if channels not in (1, 3) and named:
            raise ValueError(
                f"fusereg.{op}: x must have 1 or 3 channels for {', '.join(named)}, got "
                f"{channels}; transform x[:, :3] and join the other channels again, or leave "
                "these operations out"
            )


def _kernel(
    x: Tensor, programs: Tensor, fill: Any, whole_pixels: bool, out: Tensor | None = None
) -> Tensor:
    y = _like(x) if out is None else out
    scratch = None
    if x.device.type != "cpu" or _C.CUDA_ON_HOST:
        scratch = x.new_empty(_C.color_program_scratch(*x.shape))
    return _ops.run(
        _C.color_program,
        y,
        x,
        (programs, fill, whole_pixels, scratch, None, None, "program"),
        "program",
    )


def _like(x: Tensor) -> Tensor:
    return _ops.Target.of(x, x.shape[2:], torch.uint8).empty(x)


color_program = operator.Operator(
    "color_program(Tensor x, Tensor programs, float[] fill, bool whole_pixels) -> Tensor",
    _kernel,
    fake=lambda x, *_: _like(x),
)


# --- images of floats ---


def _solarized(x: Tensor, a: list[float]) -> Tensor:
    """Invert an image [C, H, W] from a threshold on: in its units or, without a[1], in bytes."""
    if a[1] and a[0] > 1:
        raise TypeError(
            f"RandomSolarize: threshold must be at most 1 for images of floats, got {a[0]:g}"
        )
    return torch.where(x >= (a[0] if a[1] else a[0] / 255), 1 - x, x)


_OF_FLOATS: dict[int, Callable[[Tensor, list[float]], Tensor]] = {
    IDENTITY: lambda x, a: x,
    BRIGHTNESS: lambda x, a: (x * a[0]).clamp(0, 1),
    CONTRAST: lambda x, a: floats.blend(x, floats.gray(x).mean(), a[0]),
    SATURATION: lambda x, a: x if len(x) == 1 else floats.blend(x, floats.gray(x), a[0]),
    HUE: lambda x, a: x if len(x) == 1 else floats.hue(x, a[0]),
    GRAY: lambda x, a: floats.gray(x).expand_as(x),
    INVERT: lambda x, a: 1 - x,
    POSTERIZE: lambda x, a: floats.posterize(x, int(a[0])),
    SOLARIZE: _solarized,
    SOLARIZE_ADD: lambda x, a: torch.where(x < a[1] / 255, (x + a[0] / 255).clamp(max=1), x),
    AUTOCONTRAST: lambda x, a: floats.stretch(x),
    SHARPNESS: lambda x, a: floats.sharpen(x, a[0]),
    BLUR: lambda x, a: floats.blur(x, (int(a[0]), int(a[1])), (a[2], a[3])),
}


def _warped(
    image: Tensor, a: list[float], fill: list[float], whole_pixels: bool, op: str
) -> Tensor:
    """Return an image [C, H, W] moved by a matrix; ``whole_pixels`` as in Program."""
    size = (image.shape[-2], image.shape[-1])
    params = draw([], torch.zeros(1, dtype=torch.int64, device="cpu"), size, 0, 0, op)
    params.records[0, :6] = torch.tensor(a[:6], dtype=torch.float64, device="cpu")
    sampling = (0, False, "border" if whole_pixels else "constant", fill)
    options = _ops.Options.of(len(fill), op, sampling)._replace(interpolation=int(a[6]))
    target = _ops.Target.of(image[None], size, image.dtype)
    records = memory.to_device(params.records, image.device, op)
    y = _ops.apply(image[None], records, None, target, options, op)[0]
    if not whole_pixels:
        return y
    rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in size)
    u = a[0] * columns + (a[1] * rows + a[2])[:, None]
    v = a[3] * columns + (a[4] * rows + a[5])[:, None]
    inside = (u >= -0.5) & (v >= -0.5) & (u < size[1] - 0.5) & (v < size[0] - 0.5)
    shades = memory.numbers(fill, y.dtype, y.device)[:, None, None]
    return torch.where(memory.to_device(inside, y.device, op), y, shades)


def _in_floats(
    x: Tensor,
    programs: list[list[list[float]]],
    fill: tuple[float, ...],
    whole_pixels: bool,
    op: str,
) -> Tensor:
    results = []
    for image, rows in zip(x, programs, strict=True):
        for code, *a in rows:
            if code == EQUALIZE:
                levels = (image.clamp(0, 1) * 255.999).to(torch.uint8)[None]
                row = torch.tensor([[[code, *a]]], dtype=torch.float64, device="cpu")
                row = memory.to_device(row, x.device, op)
                image = (_kernel(levels, row, fill, False)[0] / 255).to(x.dtype)
            elif code == WARP:
                image = _warped(image, a, list(fill), whole_pixels, op)
            else:
                image = _OF_FLOATS[int(code)](image, a)
        results.append(image)
    return torch.stack(results) if results else x.clone()
