"""The compiled module. Private: the package's functions check and prepare what they pass to it.

Functions over lists return a status: 0 done; 1 the value must be float64; 2 a tensor needs
preparing in Python. Nothing has been written unless it is 0.
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
def dropout_norm_forward(
    y: torch.Tensor,
    sum: torch.Tensor | None,
    statistics: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    eps: float,
    rms: bool,
    index_offset: int,
    op: str,
) -> int: ...
def dropout_norm_backward(
    grad_x: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    rms: bool,
    index_offset: int,
    partials: torch.Tensor | None,
    barrier: torch.Tensor | None,
    op: str,
) -> int: ...
def dropout_norm_chunks(rows: int, cuda: bool) -> int: ...
