"""Models and optimizers that are sharded over ranks, by torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..core.files import CheckpointError
from .checkpoint import OP


def _states(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states as torch.distributed.checkpoint takes them."""
    from torch.distributed.checkpoint import state_dict

    return {
        name: state_dict.get_model_state_dict(thing)
        if isinstance(thing, nn.Module)
        else state_dict.get_optimizer_state_dict(_trained(name, thing, objects), thing)
        for name, thing in objects.items()
    }


def _trained(name: str, optimizer: Optimizer, objects: Mapping[str, Any]) -> nn.Module:
    """Return the module that an optimizer trains."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for thing in objects.values():
        if isinstance(thing, nn.Module) and own <= {id(p) for p in thing.parameters()}:
            return thing
    raise ValueError(
        f"{OP}: {name} trains parameters of no module of this run; give it the sharded module too"
    )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn a CheckpointException, which is not even an Exception, into a CheckpointError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise CheckpointError(f"{OP}: {error}") from error


def save(objects: Mapping[str, Any], path: Path, group: Any) -> list[Path]:
    """Write all ranks' parts to a new folder, and return this rank's files. All must call it."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    with _plain_errors():
        save_parts(_states(objects), storage_writer=FileSystemWriter(path), process_group=group)
    found = sorted(path.glob(f"__{dist.get_rank()}_*.distcp"))
    return [*found, path / ".metadata"] if dist.get_rank(group) == 0 else found


def load(objects: Mapping[str, Any], path: Path, group: Any) -> None:
    """Load what ``save`` wrote into the objects, with any number of ranks. All must call it."""
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    states = _states(objects)
    with _plain_errors():
        load_parts(states, storage_reader=FileSystemReader(path), process_group=group)
    for name, thing in objects.items():
        if isinstance(thing, nn.Module):
            state_dict.set_model_state_dict(thing, states[name])
        else:
            module = _trained(name, thing, objects)
            state_dict.set_optimizer_state_dict(module, thing, states[name])
