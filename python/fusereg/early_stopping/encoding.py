"""Encoding of a state as JSON plus a flat dict of tensors, which safetensors can hold.

A tensor that appears in several places is written once, and is one tensor again after reading.
Strides, tuples, integer keys, NaN and Counter are preserved; what JSON cannot hold is refused.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .checks import OP
from .snapshot import Held

#: The dtypes that every safetensors from 0.4 on has; tensors of others are written as bytes.
_SAFE_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


class Encoder:
    """Encodes states as JSON and collects their tensors in ``tensors``."""

    def __init__(self) -> None:
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
        if isinstance(tree, float):
            value = float(tree)
            return value if math.isfinite(value) else {"$float": str(value)}
        if tree is None or isinstance(tree, (bool, str)):
            return tree
        if isinstance(tree, int):
            return int(tree)
        if isinstance(tree, Mapping):
            return self._mapping(tree, path)
        if isinstance(tree, (list, tuple)):
            items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(tree)]
            return items if isinstance(tree, list) else {"$tuple": items}
        if isinstance(tree, (set, frozenset)):
            return {"$set": [self.encode(item, path) for item in sorted(tree, key=repr)]}
        if isinstance(tree, bytes):
            return {"$bytes": base64.b64encode(tree).decode()}
        if isinstance(tree, torch.dtype):
            return {"$dtype": str(tree).removeprefix("torch.")}
        if isinstance(tree, torch.device):
            return {"$device": str(tree)}
        if type(tree).__module__ == "numpy" and hasattr(tree, "item") and not tree.shape:
            return self.encode(tree.item(), path)
        raise TypeError(
            f"{OP}: cannot write {path} to a checkpoint: {type(tree).__name__} is neither a "
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
                f"{OP}: cannot write {path} to a checkpoint: it is sharded over ranks (DTensor), "
                "and only the parts of modules and of optimizers can be put together"
            )
        tensor = (tree.local if isinstance(tree, Held) else tree).detach()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"{OP}: cannot write {path} to a checkpoint: only dense tensors can be written, "
                f"got layout {tensor.layout}, dtype {tensor.dtype}"
            )
        key, n = path, 1
        while key in self.tensors:
            n += 1
            key = f"{path}#{n}"
        made: dict[str, Any] = {"$tensor": key}
        data = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        if not tensor.is_contiguous():
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


#: What makes an object of the decoded content under each tag.
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": tuple,
    "$set": set,
    "$bytes": base64.b64decode,
    "$dtype": lambda name: getattr(torch, name),
    "$device": torch.device,
    "$dict": dict,
    "$counter": Counter,
    "$ordered": OrderedDict,
    "$state_dict": OrderedDict,
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
        raise ValueError(f"{OP}: the checkpoint holds {tag}, which this version does not know")
    made = _DECODERS[tag](decode(content, tensors, memo))
    if tag == "$state_dict":
        cast(Any, made)._metadata = decode(tree["metadata"], tensors, memo)
    return made


def _decode_tensor(data: Tensor, encoded: Mapping[str, Any]) -> Tensor:
    """Restore a tensor's dtype, shape and strides."""
    if "dtype" in encoded:
        data = data.clone().view(getattr(torch, encoded["dtype"])).reshape(encoded["shape"])
    if "stride" in encoded:
        data = torch.empty_strided(data.shape, encoded["stride"], dtype=data.dtype).copy_(data)
    return data
