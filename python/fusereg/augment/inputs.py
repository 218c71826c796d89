"""The forms that images come in: batches, single images, clips, and those of PIL and NumPy."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import op as _ops
from .tree import kind_of, plain, tv_tensors, wrap


@dataclass(slots=True)
class Batch:
    """Images [N * frames, C, H, W], and the form that they came in.

    Attributes:
        x: the images.
        frames: how many images in a row are one sample.
        like: what was given.
        one: whether it is one image, or clip, without a dimension of samples.
    """

    x: Tensor
    frames: int
    like: Any
    one: bool

    @property
    def n(self) -> int:
        """The number of samples; a clip is one."""
        return len(self.x) // self.frames

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.x.shape[-2], self.x.shape[-1]

    def restore(self, y: Tensor, types: str = "") -> Any:
        """Return a result in the form of the images; ``types``: as in Stage."""
        if not types and type(self.like) is Tensor and self.like.dim() == 4:
            return y
        result, kind = plain(y), kind_of(self.like)
        if (kind and self.like.dim() == 5) or (kind == "Video" and not self.one):
            result = result.unflatten(0, (-1, self.frames))
        elif self.one and kind != "Video":
            result = result[0]
        if types == "pure":
            return result
        if kind in ("Image", "Video"):
            return wrap(result, self.like)
        tv = tv_tensors()
        if types == "image" and tv is not None:
            return tv.Image(result)
        if types or not _is_pil(self.like):
            return result
        image = pil_image(result)
        if not isinstance(image, Tensor):
            image.info = dict(self.like.info)  # such as EXIF's orientation, as PIL's functions do
        return image


def _is_pil(x: object) -> bool:
    return type(x).__module__.partition(".")[0] == "PIL"


def image_tensor(x: Any, op: str) -> Tensor:
    """Return an image (C, H, W) or clip as a tensor; PIL's and NumPy's (H, W, C) are turned."""
    if isinstance(x, Tensor):
        return x
    if _is_pil(x):
        if x.mode not in ("L", "RGB", "RGBA", "LA"):
            remedy = "call convert('RGB')"
            if x.mode[0] in "IF":  # numbers that RGB has no room for
                remedy = "give a tensor of floats in [0, 1], of numpy.asarray(image)"
            raise ValueError(
                f"fusereg.{op}: an image of PIL must have mode L, LA, RGB or RGBA, got {x.mode!r}; "
                f"{remedy}"
            )
        bands = len(x.getbands())
        data = torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8)
        return data.reshape(x.height, x.width, bands).permute(2, 0, 1).contiguous()
    if type(x).__module__ == "numpy":
        if x.ndim == 2:
            return torch.tensor(x, device="cpu")[None]
        if x.ndim not in (3, 4) or x.shape[-1] > 4:
            raise ValueError(
                f"fusereg.{op}: an array of NumPy must be (H, W) or ([N,] H, W, C) with channels "
                f"last, got shape {x.shape}; give torch.from_numpy(x) if channels come first"
            )
        return torch.tensor(x, device="cpu").movedim(-1, -3).contiguous()
    return x  # type: ignore[no-any-return]  # refused by its caller


def pil_image(y: Tensor) -> Any:
    """Return an image (C, H, W) of uint8 as one of PIL, and others as they are."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(len(y))
    if y.dtype is not torch.uint8 or mode is None:
        return y
    last = y.permute(1, 2, 0).contiguous().cpu()
    data = ctypes.string_at(last.data_ptr(), last.numel())
    return sys.modules["PIL.Image"].frombytes(mode, (y.shape[2], y.shape[1]), data)


def batch_of(x: Any, op: str, single: bool) -> Batch:
    """Return images as a batch.

    Args:
        x: [N, C, H, W]; clips [N, T, C, H, W] or a tv_tensors.Video [T, C, H, W]; with ``single``
            one image [C, H, W], of PIL or NumPy as well.
        op: for errors.
        single: whether one image is a batch of one.
    """
    given = x
    if type(x) is Tensor and x.dim() == 4:
        _check(x, op)
        return Batch(x, 1, x, False)
    if single:
        x = image_tensor(x, op)
    if not isinstance(x, Tensor):
        form = ""
        if _is_pil(x):
            form = "; give a batch of tensors, or use collate"
        elif type(x).__module__ == "numpy":
            form = "; give torch.from_numpy(x), with channels first: (N, C, H, W)"
        elif isinstance(x, (Mapping, tuple, list)):
            form = "; call it with (images, targets), and collate with a list of samples"
        raise TypeError(f"fusereg.{op}: x must be a torch.Tensor, got {type(x).__name__}{form}")
    clip = kind_of(x) == "Video" and x.dim() == 4
    if clip or x.dim() == 5:
        flat = plain(x).flatten(0, -4)
        _check(flat, op)
        return Batch(flat, max(1, x.shape[-4]), given, clip)
    one = single and x.dim() == 3
    if one:
        x = wrap(plain(x)[None], x)
    _check(x, op)
    return Batch(x, 1, given, one)


def _check(x: Tensor, op: str) -> None:
    """Check images [N, C, H, W], and that channels come first."""
    shape = x.shape
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] > 4 and shape[2] > 4:
        raise ValueError(
            f"fusereg.{op}: x must have shape (N, C, H, W), channels come first, and "
            f"{tuple(x.shape)} looks like (N, H, W, C); call x.permute(0, 3, 1, 2)"
        )
    _ops.check_images(x, op)
