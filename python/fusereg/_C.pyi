"""The compiled module. Private: the package's functions check and prepare what they pass to it.

Functions over lists return a status: 0 done; 1 the value must be float64; 2 a tensor needs
preparing in Python; 3 an optimizer's state is missing. Nothing has been written unless it is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

PENALTY_WORKSPACE_BYTES: int
CUDA_ON_HOST: bool

_Strength = float | Sequence[float]

def bind_torch(
    tensor: type[torch.Tensor], parameter: type[torch.nn.Parameter], increment_version: object
) -> None: ...
def build_info() -> dict[str, Any]: ...
def cuda_device_info() -> list[dict[str, Any]]: ...
def cuda_error() -> str: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def scan(tensors: Sequence[object]) -> tuple[bool, list[int]]: ...
def inspect(tensor: object) -> tuple[int, bool]: ...
def penalty_forward(
    params: Sequence[torch.Tensor],
    value: torch.Tensor,
    l1: _Strength,
    l2: _Strength,
    group: _Strength,
    dim: int,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def penalty_backward(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    scale: torch.Tensor | float | None,
    l1: _Strength,
    l2: _Strength,
    group: _Strength,
    dim: int,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def penalty_add_grad_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None] | None,
    value: torch.Tensor,
    scale: torch.Tensor | float | None,
    l1: _Strength,
    l2: _Strength,
    group: _Strength,
    dim: int,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def prox_(
    params: Sequence[torch.Tensor],
    l1: _Strength,
    l2: _Strength,
    group: _Strength,
    dim: int,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def optimizer_step(
    algorithm: int,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None] | None,
    states: Sequence[dict[str, Any]],
    counts: tuple[int, ...],
    hypers: tuple[tuple[Any, ...], ...],
    fresh: tuple[int, ...],
    value: torch.Tensor | None,
    grad_scale: torch.Tensor | float | None,
    found_inf: torch.Tensor | float | None,
    norm: torch.Tensor | None,
    max_norm: float,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def grad_norm(
    tensors: Sequence[torch.Tensor],
    of_params: bool,
    out: torch.Tensor,
    norm: int,
    clip: float,
    workspace: torch.Tensor | None,
    op: str,
) -> int: ...
def dropout_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    alpha: bool,
    row_dims: int,
    index_offset: int,
    op: str,
) -> int: ...
def dropout_backward(
    grad_x: torch.Tensor,
    grad_y: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    alpha: bool,
    row_dims: int,
    index_offset: int,
    op: str,
) -> int: ...
def dropout_constants(p: float, alpha: bool) -> tuple[int, int, float, float, float, float]: ...
def philox_words(key: int, low: int, high: int, vector: bool) -> list[int]: ...
