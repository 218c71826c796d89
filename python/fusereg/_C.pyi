"""The compiled module. Private: the package's functions check and prepare what they pass to it.

Functions over lists return a status: 0 done; 1 the value must be float64; 2 a tensor needs
preparing in Python. Nothing has been written unless it is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

PENALTY_WORKSPACE_BYTES: int
CUDA_ON_HOST: bool
BATCH_NORM_SEMAPHORE_BYTES: int

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

# A negative status is the scratch, in bytes, that must be passed; nothing has been written then.
def batch_norm_forward(
    y: torch.Tensor | None,
    moments: torch.Tensor | None,
    bits: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    scratch: torch.Tensor | None,
    semaphores: torch.Tensor | None,
    momentum: float,
    statistics: int,
    eps: float,
    group_samples: int,
    activation: int,
    slope: float,
    p: float,
    seed: int | torch.Tensor,
    offset: int,
    index_offset: int,
    op: str,
) -> int: ...
def batch_norm_backward(
    grad_x: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    grad: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    bits: torch.Tensor | None,
    moments: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    scratch: torch.Tensor | None,
    semaphores: torch.Tensor | None,
    reduce: bool,
    statistics: int,
    eps: float,
    group_samples: int,
    activation: int,
    slope: float,
    p: float,
    seed: int | torch.Tensor,
    offset: int,
    index_offset: int,
    op: str,
) -> int: ...
def batch_norm_layout(
    x: torch.Tensor, group_samples: int, mask: bool
) -> tuple[int, int, int, int, int] | None: ...
