"""Encoding of a state as JSON plus a flat dict of tensors, which safetensors can hold.

A tensor that appears in several places is written once, and is one tensor again after reading.
Strides, tuples, sets, integer keys, NaN, Counter and numbers of NumPy are preserved; what JSON
cannot hold is refused.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .snapshot import Held, Sources

#: The dtypes that every safetensors from 0.4 on has; tensors of others are written as bytes.
_SAFE_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
#: NumPy's dtypes, in this machine's byte order, that torch has too.
_ARRAY_DTYPES = {
    *("bool", "float64", "float32", "float16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8"),
}


class Encoder:
    """Encodes states as JSON and collects their tensors in ``tensors``.

    Args:
        op: the name that begins error messages.
        dry: whether only to find out what cannot be encoded, without copying a tensor.
    """

    def __init__(self, op: str = "fusereg", *, dry: bool = False) -> None:
        self._op = op
        self._dry = dry
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, dict[str, Any]] = {}
        self._alive: list[Any] = []  # keeps the ids in _seen from being reused
        self._storages: set[int] = set()

    def encode(self, tree: Any, path: str) -> Any:
        """Return the state as JSON; ``path`` names it in errors and in the tensors' keys.

        Raises:
            TypeError: something is neither a tensor nor plain data.
            ValueError: a tensor is sparse, or one rank's part of a DTensor.
        """
        if isinstance(tree, (Tensor, Held)):
            return self._tensor(tree, path)
        if type(tree).__module__ == "numpy" and str(getattr(tree, "dtype", "")) in _ARRAY_DTYPES:
            if type(tree).__name__ == "ndarray":
                return {"$array": self.encode(torch.from_numpy(tree.copy()), path)}
            # Of another type it would make later numbers wider, and their bits other ones.
            return {"$number": [str(tree.dtype), self.encode(tree.item(), path)]}
        if isinstance(tree, float):
            value = float(tree)
            return value if math.isfinite(value) else {"$float": str(value)}
        if tree is None or isinstance(tree, (bool, str)):
            return tree
        if isinstance(tree, int):
            return int(tree)
        if isinstance(tree, Mapping):
            return self._mapping(tree, path)
        if isinstance(tree, torch.Size):
            return {"$size": list(tree)}
        if isinstance(tree, (list, tuple)):
            items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(tree)]
            return items if isinstance(tree, list) else {"$tuple": items}
        if isinstance(tree, (set, frozenset)):
            items = [self.encode(item, path) for item in sorted(tree, key=repr)]
            return {"$set" if isinstance(tree, set) else "$frozenset": items}
        if isinstance(tree, bytes):
            return {"$bytes": base64.b64encode(tree).decode()}
        if isinstance(tree, torch.dtype):
            return {"$dtype": str(tree).removeprefix("torch.")}
        if isinstance(tree, torch.device):
            return {"$device": str(tree)}
        if type(tree) is io.BytesIO:
            return {"$file": base64.b64encode(tree.getvalue()).decode()}
        raise TypeError(
            f"{self._op}: cannot write {path} to a checkpoint: {type(tree).__name__} is neither a "
            "tensor nor plain data"
        )

    def _mapping(self, tree: Mapping[Any, Any], path: str) -> Any:
        """Encode a mapping, with its type and the modules' versions that state_dict() adds."""
        values = {key: self.encode(value, f"{path}.{key}") for key, value in tree.items()}
        encoded: Any = values
        # A key that begins with $ would be mistaken for one of the tags.
        if not all(isinstance(key, str) and not key.startswith("$") for key in tree):
            encoded = {"$dict": [[self.encode(key, path), item] for key, item in values.items()]}
        if isinstance(tree, Counter):
            return {"$counter": encoded}
        metadata = getattr(tree, "_metadata", None)
        if metadata is not None:
            return {"$state_dict": encoded, "metadata": self.encode(metadata, f"{path}._metadata")}
        return {"$ordered": encoded} if isinstance(tree, OrderedDict) else encoded

    def _tensor(self, tree: Tensor | Held, path: str) -> dict[str, Any]:
        """Add a tensor to ``tensors``, and return the JSON that refers to it."""
        if id(tree) in self._seen:
            return self._seen[id(tree)]
        self._alive.append(tree)
        if isinstance(tree, Held) and tree.sharding is not None:
            raise ValueError(
                f"{self._op}: cannot write {path} to a checkpoint: it is sharded over ranks "
                "(DTensor), and only the parts of modules and of optimizers can be put together"
            )
        tensor = (tree.local if isinstance(tree, Held) else tree).detach()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"{self._op}: cannot write {path} to a checkpoint: only dense tensors can be "
                f"written, got layout {tensor.layout}, dtype {tensor.dtype}"
            )
        if self._dry:
            return {}
        key, n = path, 1
        while key in self.tensors:
            n += 1
            key = f"{path}#{n}"
        made: dict[str, Any] = {"$tensor": key}
        data = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        if not tensor.is_contiguous() and _is_dense(tensor.shape, tensor.stride()):
            made["stride"] = list(tensor.stride())
        if tensor.dtype not in _SAFE_DTYPES:
            made["dtype"] = str(tensor.dtype).removeprefix("torch.")
            made["shape"] = list(tensor.shape)
            data = data.reshape(-1).view(torch.uint8)
        # safetensors refuses two entries in one storage, and one that is part of a larger one.
        storage = data.untyped_storage()
        if storage.nbytes() != data.nbytes or storage.data_ptr() in self._storages:
            data = data.clone()
        if data.numel():
            self._storages.add(data.untyped_storage().data_ptr())
        self.tensors[key] = data
        self._seen[id(tree)] = made
        return made


def check_savable(sources: Sources, op: str) -> None:
    """Raise what writing the objects' states would raise, without copying a tensor.

    Raises:
        TypeError, ValueError: a file cannot hold something in a state.
    """
    encoder = Encoder(op, dry=True)
    for name, state in sources.states().items():
        encoder.encode(state, name)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether these strides have neither gaps nor overlaps."""
    size = 1
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length != 1 and step != size:
            return length == 0
        size *= length
    return True


def _dtype(name: Any) -> torch.dtype:
    """Return the dtype of this name, and nothing else that torch has under it."""
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _number(content: Sequence[Any]) -> Any:
    """Return a number of NumPy's."""
    import numpy as np

    dtype, value = content
    if dtype not in _ARRAY_DTYPES:
        raise ValueError(f"{dtype!r} is no dtype of a number")
    return np.dtype(dtype).type(value)


#: What makes an object of the decoded content under each tag.
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$size": torch.Size,
    "$number": _number,
    "$bytes": base64.b64decode,
    "$dtype": _dtype,
    "$device": torch.device,
    "$dict": dict,
    "$counter": Counter,
    "$ordered": OrderedDict,
    "$state_dict": OrderedDict,
    "$array": lambda tensor: tensor.numpy().copy(),
    "$file": lambda text: io.BytesIO(base64.b64decode(text)),
}


def decode(tree: Any, tensors: Mapping[str, Tensor], memo: dict[str, Tensor] | None = None) -> Any:
    """Return the state that ``Encoder.encode`` was given, on the CPU."""
    memo = {} if memo is None else memo
    if isinstance(tree, list):
        return [decode(item, tensors, memo) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensors, memo) for key, value in tree.items()}
    content = tree[tag]
    if tag == "$tensor":
        if content not in memo:
            memo[content] = _decode_tensor(tensors[content], tree)
        return memo[content]
    if tag not in _DECODERS:
        raise ValueError(f"the checkpoint holds {tag}, which this version does not know")
    made = _DECODERS[tag](decode(content, tensors, memo))
    if tag == "$state_dict":
        cast(Any, made)._metadata = decode(tree["metadata"], tensors, memo)
    return made


def _decode_tensor(data: Tensor, encoded: Mapping[str, Any]) -> Tensor:
    """Restore a tensor's dtype, shape and strides."""
    if "dtype" in encoded:
        data = data.clone().view(_dtype(encoded["dtype"])).reshape(encoded["shape"])
    if "stride" in encoded:
        stride = encoded["stride"]
        if not _is_dense(data.shape, stride):  # it would claim memory that the file does not have
            raise ValueError(f"a tensor of shape {tuple(data.shape)} with strides {stride}")
        data = torch.empty_strided(data.shape, stride, dtype=data.dtype).copy_(data)
    return data
