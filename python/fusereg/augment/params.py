"""The drawn parameters of a batch: to replay, to invert, to apply to boxes, points and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _C
from ..core import dispatch, memory
from . import op as _ops
from .arguments import Interpolation, integer, interpolation_name, is_sequence, of_array, one_of
from .steps import Values

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AugmentParams"]

_VERSION = 1
#: Columns of records in states of before there was a perspective.
_WITHOUT_PERSPECTIVE = 28
_DRAWN = (
    *("angle", "scale_x", "scale_y", "shear_x", "shear_y", "translate_x", "translate_y"),
    *("flip_x", "flip_y", "window_x0", "window_y0", "window_x1", "window_y1"),
    *("brightness", "contrast", "saturation"),
)
BOX_FORMATS = ("xyxy", "xywh", "cxcywh")


def sample_id_tensor(ids: object, n: int, op: str, name: str = "sample_ids") -> Tensor:
    """Return sample ids as [n] int64 on the CPU."""
    ids = of_array(ids)
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"fusereg.{op}: {name} must be integers, got {ids.dtype}")
        result = ids.detach().to("cpu", torch.int64)
    elif is_sequence(ids):
        values = [integer(i, op, name) for i in ids]
        if any(not -(2**63) <= i < 2**63 for i in values):
            raise ValueError(f"fusereg.{op}: {name} must be within [-2^63, 2^63), got {values}")
        result = torch.tensor(values, dtype=torch.int64, device="cpu")
    else:
        raise TypeError(
            f"fusereg.{op}: {name} must be a tensor or a sequence of integers, "
            f"got {type(ids).__name__}"
        )
    if result.shape != (n,):
        raise ValueError(f"fusereg.{op}: {name} must have shape ({n},), got {tuple(result.shape)}")
    return result.contiguous()


def corners_of(boxes: Tensor, format: str) -> Tensor:
    """Return boxes [..., 4] of "xyxy", "xywh" or "cxcywh" as x0, y0, x1, y1 in float64."""
    first, second = boxes.double()[..., :2], boxes.double()[..., 2:]
    if format == "xywh":
        second = first + second
    elif format == "cxcywh":
        first, second = first - second / 2, first + second / 2
    return torch.cat([first, second], dim=-1)


def of_corners(corners: Tensor, format: str) -> Tensor:
    """Return boxes x0, y0, x1, y1 in a format of :func:`corners_of`."""
    low, high = corners[..., :2], corners[..., 2:]
    if format == "xywh":
        high = high - low
    elif format == "cxcywh":
        low, high = (low + high) / 2, high - low
    return torch.cat([low, high], dim=-1)


class Drawn:
    """Base of the drawn parameters of a batch: a dataclass, some of whose fields are tensors.

    Each tensor has a row for each sample.
    """

    sample_ids: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sample_ids)

    def __getitem__(self, index: Any) -> Self:
        """Return the parameters of some samples."""
        index = [index] if isinstance(index, int) else index
        return self._map(lambda t: t[index])

    def repeat_interleave(self, times: int) -> Self:
        """Return each sample's parameters several times in a row, as for the frames of a clip."""
        return self._map(lambda t: t.repeat_interleave(times, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return parameters whose tensors went through a function."""
        changed = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class AugmentParams(Drawn):
    """The parameters of N samples, as :meth:`fusereg.augment.Augment.sample_params` draws them.

    Coordinates are pixels (x, y); integers are pixel centers.

    Attributes:
        records: [N, 30] float64: what the kernels read (``csrc/augment/augment.h``); the color
            matrix's shifts are in units of full intensity.
        draws: [N, 16] float64: angle in degrees (counter-clockwise), scale x and y, shear x and y
            in degrees, translation x and y in pixels, flips x and y, the window x0 y0 x1 y1,
            brightness, contrast, saturation; :meth:`drawn` returns them by name. Of two steps of
            a kind, those of the last.
        keys: [N, 2] int64: the Philox keys of the noise in erased boxes.
        sample_ids: [N] int64.
        input_size: (height, width) of the images.
        size: (height, width) of the result.

    ``params[2:5]``, ``params[[3, 1]]`` and ``params[mask]`` select samples; partners of MixUp and
    CutMix are followed, and must be among them (:meth:`without_mix` drops them). To select of
    parameters on a GPU, and to ask whether they move anything (``moves``), waits for it.
    """

    records: Tensor
    draws: Tensor
    keys: Tensor
    sample_ids: Tensor
    input_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.records.device

    # --- what there is ---

    @property
    def moves(self) -> bool:
        """True where the geometry of any sample moves a pixel."""
        still = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64, device=self.device)
        stays = (self.records[:, :6] == still).all() and not self.records[:, 28:].any()
        return self.size != self.input_size or not bool(stays)

    @property
    def matrices(self) -> Tensor:
        """[N, 2, 3]: from an output pixel (x, y, 1) to its place in the input.

        With a perspective, the first two rows of :attr:`homographies`.
        """
        return self.records[:, :6].reshape(-1, 2, 3)

    @property
    def homographies(self) -> Tensor:
        """[N, 3, 3]: to (a, b, c) with that place (a / c, b / c); c is 1 without perspective."""
        last = torch.cat([self.records[:, 28:], torch.ones_like(self.records[:, :1])], 1)
        return torch.cat([self.matrices, last[:, None]], 1)

    @property
    def mirrored(self) -> Tensor:
        """[N] bool: whether the result shows the image mirrored."""
        (a, b, c), (d, e, f), (p, q, _) = (r.unbind(1) for r in self.homographies.unbind(1))
        return a * (e - f * q) - b * (d - f * p) + c * (d * q - e * p) < 0

    @property
    def flips(self) -> Tensor:
        """[N, 2] bool: flipped horizontally, vertically."""
        return self.draws[:, 7:9] != 0

    @property
    def erase_boxes(self) -> Tensor:
        """[N, 4] int64 x0, y0, x1, y1 in output pixels, half open; empty: nothing is erased."""
        return self.records[:, 6:10].long()

    @property
    def mix_boxes(self) -> Tensor:
        """[N, 4] int64: where the partner is mixed in; the whole output for MixUp."""
        return self.records[:, 10:14].long()

    @property
    def partners(self) -> Tensor:
        """[N] int64: the index in the batch of the sample that is mixed in, -1 for none."""
        return self.records[:, 14].long()

    @property
    def weights(self) -> Tensor:
        """[N] float64: the weight of a sample's own label.

        MixUp's lambda; for CutMix 1 - the pasted box's share of the area; 1 without a partner.
        """
        box = self.records[:, 10:14]
        area = (box[:, 2] - box[:, 0]).clamp(min=0) * (box[:, 3] - box[:, 1]).clamp(min=0)
        share = area / (self.size[0] * self.size[1])
        weight = 1 - share * (1 - self.records[:, 15])
        return torch.where(self.records[:, 14] >= 0, weight, torch.ones_like(weight))

    def drawn(self) -> dict[str, Tensor]:
        """Return the columns of ``draws`` by name: angle, scale_x, ..., saturation."""
        return {name: self.draws[:, i] for i, name in enumerate(_DRAWN)}

    # --- selecting, moving, keeping ---

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AugmentParams:
        """Copy the parameters to another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AugmentParams:
        """Copy the parameters to pinned memory (a DataLoader's ``pin_memory=True`` calls this)."""
        return self._map(lambda t: t.pin_memory())

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> AugmentParams:
        """Return the parameters of the selected samples."""
        n = len(self)
        if isinstance(index, int) and not -n <= index < n:
            raise IndexError(
                f"fusereg.AugmentParams: index {index} is out of range for {n} samples"
            )
        positions = torch.arange(n, device="cpu")
        chosen = positions[[index] if isinstance(index, int) else _cpu(index)]
        place = torch.full((n + 1,), -2, dtype=torch.int64, device="cpu")
        place[-1] = -1  # the partner of those without one
        # A sample that is selected twice has its first place.
        place.scatter_reduce_(
            0, chosen, positions.new_tensor(range(len(chosen))), "amin", include_self=False
        )
        partners = place[self.partners.cpu()[chosen]]
        if bool((partners == -2).any()):
            raise ValueError(
                "fusereg.AugmentParams: a selected sample's partner is not selected; select both, "
                "or take without_mix() first"
            )
        chosen = chosen.to(self.device)
        result = self._map(lambda t: t[chosen])
        result.records[:, 14] = partners.to(self.device, torch.float64)
        return result

    def repeat_interleave(self, times: int) -> AugmentParams:
        """Return each sample's parameters several times in a row, as for the frames of a clip.

        The partner of a frame is the same frame of its clip's partner.
        """
        result = super().repeat_interleave(times)
        partners = result.records[:, 14]
        frames = torch.arange(times, device=self.device).repeat(len(self))
        result.records[:, 14] = torch.where(partners >= 0, partners * times + frames, partners)
        return result

    @staticmethod
    def cat(parts: Sequence[AugmentParams]) -> AugmentParams:
        """Concatenate the parameters of several batches; partners stay those of their batch."""
        if not parts or not all(isinstance(p, AugmentParams) for p in parts):
            raise TypeError("fusereg.AugmentParams.cat: parts must be one or more AugmentParams")
        first = parts[0]
        for part in parts[1:]:
            if (part.input_size, part.size) != (first.input_size, first.size):
                raise ValueError(
                    f"fusereg.AugmentParams.cat: parts must be of the same sizes, got "
                    f"{first.input_size} to {first.size} and {part.input_size} to {part.size}"
                )
        names = ("records", "draws", "keys", "sample_ids")
        tensors: dict[str, Any] = {k: torch.cat([getattr(p, k) for p in parts]) for k in names}
        joined = replace(first, **tensors)
        begin = 0
        for part in parts:
            partners = joined.records[begin : begin + len(part), 14]
            partners += begin * (partners >= 0)
            begin += len(part)
        return joined

    def without_mix(self) -> AugmentParams:
        """Return the parameters without MixUp and CutMix."""
        records = self.records.clone()
        records[:, 10:14] = 0
        records[:, 14] = -1
        records[:, 15] = 1
        return replace(self, records=records)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and sizes, for ``torch.save`` and :meth:`from_state_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"version": _VERSION, **values}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> AugmentParams:
        """Return the parameters of a :meth:`state_dict`."""
        op = "AugmentParams.from_state_dict"
        names = [f.name for f in fields(cls)]
        missing = [name for name in ("version", *names) if name not in state]
        if missing:
            raise ValueError(f"fusereg.{op}: state lacks {', '.join(missing)}")
        if state["version"] != _VERSION:
            raise ValueError(
                f"fusereg.{op}: state must have version {_VERSION}, got {state['version']!r}"
            )
        values = {name: state[name] for name in names}
        n = len(values["records"])
        if tuple(values["records"].shape) == (n, _WITHOUT_PERSPECTIVE):
            values["records"] = pad(
                values["records"], (0, _C.AUGMENT_RECORD - _WITHOUT_PERSPECTIVE)
            )
        shapes = {"records": (n, _C.AUGMENT_RECORD), "draws": (n, _C.AUGMENT_DRAWS)}
        for name, shape in {**shapes, "keys": (n, 2), "sample_ids": (n,)}.items():
            if tuple(values[name].shape) != shape:
                raise ValueError(
                    f"fusereg.{op}: {name} must have shape {shape}, got {tuple(values[name].shape)}"
                )
        for name in ("input_size", "size"):
            height, width = values[name]
            values[name] = (int(height), int(width))
        return cls(**values)

    # --- geometry ---

    def inverse(self) -> AugmentParams:
        """Return the inverse geometry, from the result back to the input.

        ``params.inverse().boxes(...)`` maps predictions back, ``params.inverse().warp(y)`` images.
        Pixels that left the image are lost.
        """
        a, b, c, d, e, f = self.records[:, :6].unbind(1)
        p, q = self.records[:, 28:].unbind(1)
        back = [e - f * q, c * q - b, b * f - c * e, f * p - d, a - c * p, c * d - a * f]
        back += [d * q - e * p, b * p - a * q]
        records = torch.zeros_like(self.records)
        # Adding 0 turns a negative zero into a zero.
        values = torch.stack(back, 1) / (a * e - b * d)[:, None] + 0.0
        records[:, :6], records[:, 28:] = values[:, :6], values[:, 6:]
        records[:, 14] = -1
        records[:, 15] = 1
        records[:, 16:27:5] = 1
        return replace(self, records=records, input_size=self.size, size=self.input_size)

    def keypoints(self, points: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Map points of the input to the result.

        Args:
            points: [N, K, 2] (x, y), integers at pixel centers; or N tensors [K_i, 2]. A third
                column is the visibility, as in COCO: it becomes 0 where a point leaves the image.

        Returns:
            The points in the same form, floating; they may be outside the image.
        """
        if not isinstance(points, Tensor):
            return self._of_each(points, AugmentParams.keypoints)
        width = 3 if points.shape[-1:] == (3,) else 2
        self._check_points(points, "keypoints", "points", width)
        x = points if points.is_floating_point() else points.to(torch.float32)
        m = memory.to_device(self.inverse().homographies, x.device, "AugmentParams.keypoints")
        xy, m, last = x[..., :2].double(), m[:, :2], m[:, None, 2]
        moved = torch.einsum("nij,nkj->nki", m[:, :, :2], xy) + m[:, None, :, 2]
        moved = moved / ((last[..., :2] * xy).sum(-1, keepdim=True) + 1.0)
        if width == 3:
            seen = x[..., 2:] * self.inside(moved)[..., None]
            return torch.cat([moved.to(x.dtype), seen], dim=-1)
        return moved.to(x.dtype)

    def inside(self, points: Tensor) -> Tensor:
        """Return whether points (x, y) of the result are within its pixels."""
        limit = memory.numbers((self.size[1], self.size[0]), points.dtype, points.device) - 0.5
        return ((points >= -0.5) & (points < limit)).all(-1)

    def boxes(
        self, boxes: Tensor | Sequence[Tensor], *, format: str = "xyxy", clip: bool = True
    ) -> Tensor | list[Tensor]:
        """Map boxes of the input to boxes around their images in the result.

        Box coordinates are edges of pixels, as in torchvision and COCO: the first pixel is the box
        (0, 0, 1, 1).

        Args:
            boxes: [N, K, 4]; or N tensors [K_i, 4].
            format: "xyxy" (x0, y0, x1, y1), "xywh" (corner and size) or "cxcywh" (center and size).
            clip: cut boxes to the image; one that left it has no area then.

        Returns:
            The boxes in the same form and format, floating. Erasing and mixing do not change them.
        """
        op = "AugmentParams.boxes"
        format = getattr(format, "value", format)  # torchvision's are in capitals
        lower = format.lower() if isinstance(format, str) else format
        format = one_of(lower, op, "format", BOX_FORMATS)
        if not isinstance(boxes, Tensor):
            return self._of_each(boxes, partial(AugmentParams.boxes, format=format, clip=clip))
        self._check_points(boxes, "boxes", "boxes", 4)
        b = boxes if boxes.is_floating_point() else boxes.to(torch.float32)
        x0, y0, x1, y1 = corners_of(b, format).unbind(-1)
        x = torch.stack([x0, x1, x0, x1], dim=-1)
        y = torch.stack([y0, y0, y1, y1], dim=-1)
        corners = torch.stack([x, y], dim=-1).flatten(1, 2) - 0.5  # [N, 4K, 2] at pixel centers
        moved = self.keypoints(corners)
        assert isinstance(moved, Tensor)
        moved = moved.unflatten(1, (-1, 4)) + 0.5
        low, high = moved.amin(2), moved.amax(2)  # [N, K, 2]
        if clip:
            limit = memory.numbers((self.size[1], self.size[0]), low.dtype, low.device)
            low, high = low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)
        return of_corners(torch.cat([low, high], dim=-1), format).to(b.dtype)

    def _of_each(self, values: Sequence[Tensor], method: Callable[..., Any]) -> list[Tensor]:
        """Return what a method gives for a tensor of each sample."""
        if len(values) != len(self):
            n = len(self)
            raise ValueError(f"fusereg.AugmentParams: got {len(values)} tensors for {n} samples")
        alone = self.without_mix()
        return [method(alone[i], value[None])[0] for i, value in enumerate(values)]

    def _check_points(self, points: Tensor, op: str, name: str, last: int) -> None:
        if points.dim() != 3 or points.shape[0] != len(self) or points.shape[2] != last:
            raise ValueError(
                f"fusereg.AugmentParams.{op}: {name} must have shape ({len(self)}, K, {last}), "
                f"got {tuple(points.shape)}"
            )

    def mask(
        self,
        mask: Tensor,
        *,
        fill: float = 0,
        fill_mode: str = "constant",
        interpolation: Interpolation = "nearest",
    ) -> Tensor:
        """Warp a mask (labels of pixels) as the images, by the nearest pixel.

        CutMix's boxes are pasted as in the images; MixUp leaves a mask alone (mix the losses of
        both masks by :attr:`weights`), and so does erasing.

        Args:
            mask: [N, H, W] or [N, C, H, W] of any dtype.
            fill: the label outside the image, in the mask's dtype (such as 255 to ignore it).
            fill_mode: as in :class:`fusereg.augment.Augment`.
            interpolation: other than "nearest" for floating masks, such as probabilities.
        """
        op = "AugmentParams.mask"
        how = interpolation_name(interpolation, op)
        if how != "nearest" and not mask.is_floating_point():
            raise ValueError(
                f"fusereg.{op}: interpolation must be 'nearest' for a mask of {mask.dtype}, "
                f"got {how!r}"
            )
        cut = (self.records[:, 15] == 0) & (self.records[:, 14] >= 0)
        kept = torch.where(cut[:, None], self.records, self.without_mix().records)
        return replace(self, records=kept).planes(mask, op, (how, False, fill_mode, fill))

    def planes(
        self,
        mask: Tensor,
        op: str,
        sampling: tuple[object, bool, str, Any],
        blended: bool = False,
    ) -> Tensor:
        """Warp and mix planes [N, H, W] or [N, C, H, W] of any number and dtype; erase nothing.

        ``blended``: MixUp may be among what is mixed.
        """
        if mask.dim() not in (3, 4):
            raise ValueError(
                f"fusereg.{op}: mask must have shape (N, H, W) or (N, C, H, W), "
                f"got {tuple(mask.shape)}"
            )
        _check_fill(sampling[3], mask.dtype, op)
        x = mask if mask.dim() == 4 else mask[:, None]
        params = self._map(torch.clone)
        params.records[:, 6:10] = 0
        # Every pixel is one of the mask's, or the fill: its bytes move, and no value is read.
        copied = (
            mask.element_size() > 1
            and sampling[0] == "nearest"
            and not blended
            and dispatch.direct(mask)
            and not (mask.requires_grad and torch.is_grad_enabled())
        )
        if not 0 < x.shape[1] <= _C.AUGMENT_MAX_CHANNELS or copied:
            # Each channel as an image of its own.
            params = params.repeat_interleave(x.shape[1])
            x = x.flatten(0, 1)[:, None]
        if copied:
            y = params._copied(x, op, sampling)
        else:
            if mask.dtype is torch.bool:
                x = x.to(torch.uint8)
            elif mask.dtype is not torch.uint8 and not mask.is_floating_point():
                x = x.to(torch.float64)
            y = params._render(x, op, sampling).to(mask.dtype)
        return y.reshape(*mask.shape[:-2], *y.shape[-2:])

    def _copied(self, x: Tensor, op: str, sampling: tuple[object, bool, str, Any]) -> Tensor:
        """Warp planes [N, 1, H, W] by the nearest pixel: the bytes of one are channels of uint8."""
        how, _, fill_mode, fill = sampling
        fills = x.new_tensor([fill], device="cpu").view(torch.uint8).tolist()
        last = x.contiguous().view(torch.uint8).unflatten(-1, (x.shape[3], -1)).squeeze(1)
        y = self._render(last.permute(0, 3, 1, 2), op, (how, False, fill_mode, fills))
        return y.permute(0, 2, 3, 1).contiguous().flatten(2).view(x.dtype)

    def warp(
        self,
        x: Tensor,
        *,
        interpolation: Interpolation = "bilinear",
        antialias: bool = False,
        fill_mode: str = "constant",
        fill: float | Sequence[float] = 0,
    ) -> Tensor:
        """Apply the geometry alone to images [N, C, H, W]; the dtype stays. Differentiable in x."""
        geometry = self.without_mix()
        geometry.records[:, 6:10] = 0
        op = "AugmentParams.warp"
        return geometry._render(x, op, (interpolation, antialias, fill_mode, fill))

    def _render(self, x: Tensor, op: str, sampling: tuple[object, bool, str, Any]) -> Tensor:
        self.check_images(x.shape, op)
        options = _ops.Options.of(_ops.check_images(x, op).shape[1], op, sampling)
        target = _ops.Target.of(x, self.size, x.dtype)
        records = memory.to_device(self.records, x.device, op)
        return _ops.apply(x, records, None, target, options, op)

    def check_images(self, shape: Sequence[int], op: str) -> None:
        """Check that images are [N, C, height, width] of these parameters' input size."""
        n, (height, width) = len(self), self.input_size
        if len(shape) != 4 or shape[0] != n or tuple(shape[2:]) != (height, width):
            raise ValueError(
                f"fusereg.{op}: x must have shape ({n}, C, {height}, {width}) as its parameters, "
                f"got {tuple(shape)}"
            )


def _check_fill(fill: Any, dtype: torch.dtype, op: str) -> None:
    """Refuse a label outside the image that a mask's dtype would turn into another one."""
    if dtype.is_floating_point or not isinstance(fill, (int, float)):
        return
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if fill != int(fill) or not low <= fill <= high:
        name = "mask_fill" if op != "AugmentParams.mask" else "fill"
        raise ValueError(
            f"fusereg.{op}: {name} must be an integer from {low} to {high} for a mask of {dtype}, "
            f"got {fill}"
        )


def _cpu(index: slice | Sequence[int] | Tensor) -> Any:
    if isinstance(index, Tensor):
        return index.cpu()
    return index if isinstance(index, slice) else list(index)


@dispatch.outside_graphs
def draw(
    steps: Sequence[Values],
    sample_ids: Tensor,
    input_size: tuple[int, int] | list[tuple[int, int]],
    seed: int,
    epoch: int,
    op: str,
) -> AugmentParams:
    """Draw the parameters of samples, on the CPU.

    Of images of several sizes, ``input_size`` is a list, and the result's the first of it.
    """
    sizes = input_size if isinstance(input_size, list) else [input_size]
    n = sample_ids.shape[0]
    records = torch.empty(n, _C.AUGMENT_RECORD, dtype=torch.float64, device="cpu")
    draws = torch.empty(n, _C.AUGMENT_DRAWS, dtype=torch.float64, device="cpu")
    keys = torch.zeros(n, 2, dtype=torch.int64, device="cpu")
    size = _C.augment_params(records, draws, keys, sample_ids, seed, epoch, sizes, steps, op)
    return AugmentParams(records, draws, keys, sample_ids, sizes[0], size)
