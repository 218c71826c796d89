"""The compiled module. Private: the package's functions check and prepare what they pass to it.

Functions over lists return a status: 0 done; 1 the value must be float64; 2 a tensor needs
preparing in Python. Nothing has been written unless it is 0.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

FUSED_DROPOUT_COUNTERS: int
PENALTY_WORKSPACE_BYTES: int
BATCH_NORM_SEMAPHORE_BYTES: int
CUDA_ON_HOST: bool
DROP_BLOCK_SLOTS: int
AUGMENT_DRAWS: int
AUGMENT_MAX_CHANNELS: int
AUGMENT_RECORD: int

_Strength = float | Sequence[float]
_Method = Callable[..., Any]

class _LaunchTables: ...

def launch_tables(allocate: Callable[[int, int], torch.Tensor]) -> _LaunchTables: ...
def working_stream(device: int) -> int | None: ...
def set_restore_device(exchange: Callable[[int], object]) -> None: ...
def bind_torch(
    tensor: type[torch.Tensor], parameter: type[torch.nn.Parameter], increment_version: object
) -> None: ...
def bind_owners(
    use_count: object,
    storage: object,
    storage_use_count: object,
    weak_references: object,
    probe: torch.Tensor,
) -> None: ...
def bind_gate(
    torch: ModuleType,
    compiler: ModuleType,
    forward_ad: ModuleType,
    questions: tuple[Callable[[], object], ...],
) -> None: ...

# Whether no compiler (but Dynamo, which is asked before), tracer, dispatch mode or torch.func
# transform is active, and each tensor is exactly a Tensor or Parameter and not meta.
def direct(*tensors: torch.Tensor | None) -> bool: ...

# make_numbers(): a tensor of two int64 numbers, once for each thread; state_of_device(x): a Philox
# state for x, which is not on the CPU.
def bind_random(
    make_numbers: Callable[[], torch.Tensor], state_of_device: Callable[[torch.Tensor], object]
) -> None: ...

# A new Philox state from a generator of the CPU, None for torch's default one.
def random_state(generator: torch.Generator | None, /) -> tuple[int, int]: ...

# For drawn_at_once, of a linear map whose eager autograd function has this compiled `forward`: few
# float32 or float64 elements on the CPU are multiplied by their factors, all others left to
# `general`.
def drawn_apply(forward: _Method, general: _Method) -> Callable[..., Any]: ...

# The usual call of an operation that a Philox state determines, None for all others, of which
# nothing was done: apply(*tensors, (state, *constants)) where a gradient is wanted, else
# kernel(*tensors, state, *constants), which may be None. constants[0] is p; with 0 nothing is
# drawn. `roles` has a letter for each tensor: "x" for the first and what is like it, "v" for a
# vector of its last dimension.
def drawn_at_once(
    apply: _Method,
    kernel: _Method | None,
    roles: str,
    constants: tuple[object, ...],
    x: torch.Tensor,
    /,
    *tensors: torch.Tensor | None,
) -> Any: ...
def build_info() -> dict[str, Any]: ...
def cuda_device_info() -> list[dict[str, Any]]: ...
def cuda_error() -> str: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def scan(tensors: Sequence[object]) -> tuple[bool, list[int]]: ...
def inspect(tensor: object) -> tuple[int, bool]: ...
def coupled_sums(
    params: Sequence[torch.Tensor],
    dims: Sequence[int],
    slot_of: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    partial: torch.Tensor,
    sums: torch.Tensor,
    l1: float,
    thresholded: bool,
    thresholds: torch.Tensor | None,
    op: str,
) -> int: ...
def coupled_backward(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    dims: Sequence[int],
    slot_of: torch.Tensor,
    first: torch.Tensor | None,
    factors: torch.Tensor,
    op: str,
) -> int: ...
def coupled_prox_(
    params: Sequence[torch.Tensor],
    dims: Sequence[int],
    slot_of: torch.Tensor,
    l1: float,
    thresholds: torch.Tensor,
    squares: torch.Tensor,
    op: str,
) -> int: ...
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
def fused_dropout_add_functions(
    gradient_of: _Method, forward: _Method, backward: _Method
) -> tuple[_Method, _Method]: ...
def fused_dropout_add(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    rows: bool,
    index_offset: int,
    op: str,
) -> int: ...
def fused_dropout_partials(numel: int, columns: int) -> int: ...
def fused_dropout_bias_backward(
    grad_x: torch.Tensor,
    grad_bias: torch.Tensor,
    grad: torch.Tensor,
    partials: torch.Tensor,
    counters: torch.Tensor | None,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    index_offset: int,
    op: str,
) -> int: ...
def activation_dropout_functions(
    forward: _Method, backward: _Method
) -> tuple[_Method, _Method]: ...
def activation_dropout_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    activation: str,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    index_offset: int,
    op: str,
) -> int: ...
def activation_dropout_backward(
    grad_x: torch.Tensor,
    grad: torch.Tensor,
    saved: torch.Tensor,
    activation: str,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    index_offset: int,
    op: str,
) -> int: ...

# The functions of an eager autograd function, which do what these do for all tensors.
def dropout_functions(forward: _Method, backward: _Method) -> tuple[_Method, _Method]: ...
def dropout_constants(p: float, alpha: bool) -> tuple[int, int, float, float, float, float]: ...
def philox_words(key: int, low: int, high: int, vector: bool, rounds: int) -> list[int]: ...
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
def dropout_norm_functions(forward: _Method, backward: _Method) -> tuple[_Method, _Method]: ...
def drop_block_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    kept: torch.Tensor,
    slots: torch.Tensor | None,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    block_size: int,
    index_offset: int,
    op: str,
) -> int: ...
def drop_block_backward(
    grad_x: torch.Tensor,
    grad_y: torch.Tensor,
    kept: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    block_size: int,
    index_offset: int,
    op: str,
) -> int: ...

CROSS_ENTROPY_WORKSPACE: int

def cross_entropy_forward(
    loss: torch.Tensor,
    statistics: torch.Tensor,
    workspace: torch.Tensor | None,
    x: torch.Tensor,
    target: torch.Tensor,
    other: torch.Tensor | None,
    share: torch.Tensor | None,
    weight: torch.Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduction: int,
    op: str,
) -> int: ...
def cross_entropy_backward(
    grad_x: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    other: torch.Tensor | None,
    share: torch.Tensor | None,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    smoothing: float,
    ignore_index: int,
    reduction: int,
    op: str,
) -> int: ...
def cross_entropy_functions(forward: _Method, backward: _Method) -> tuple[_Method, _Method]: ...

# The loss of a usual call on the CPU, None for all others, of which nothing was done.
def cross_entropy_at_once(
    apply: _Method,
    mixed_labels: type,
    input: object,
    target: object,
    weight: object,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    /,
) -> torch.Tensor | None: ...
def gaussian_dropout_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    index_offset: int,
    op: str,
) -> int: ...
def gaussian_dropout_functions(forward: _Method, backward: _Method) -> tuple[_Method, _Method]: ...
def gaussian_dropout_backward(
    grad_x: torch.Tensor,
    grad_y: torch.Tensor,
    seed: int | torch.Tensor,
    offset: int,
    p: float,
    index_offset: int,
    op: str,
) -> int: ...

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
    from_y: bool,
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
def batch_norm_plan(
    layout: tuple[int, int, int, int],
    dtype: str,
    backward: bool,
    device: tuple[int, int, int],
    aligned: bool = True,
    mask: bool = False,
    bits: bool = False,
    resident: bool = True,
) -> dict[str, Any]: ...
def batch_norm_force(kind: str, splits: int = 0, counters: int = 0) -> None: ...
def batch_norm_functions(forward: _Method, backward: _Method) -> tuple[_Method, _Method]: ...

# y of a usual call on the CPU, None for all others, of which nothing was done. `draw` returns a
# Philox state for x; the settings are a layer, or what functional.Settings names.
def batch_norm_at_once(
    apply: _Method,
    draw: Callable[[torch.Tensor], object],
    inputs: tuple[object, ...],
    batches: object,
    settings: object,
    op: str,
    /,
) -> torch.Tensor | None: ...
def batch_norm_fits(
    x: object, running_mean: object, running_var: object, weight: object, bias: object
) -> bool: ...
def batch_norm_layout(
    x: torch.Tensor, group_samples: int, mask: bool
) -> tuple[int, int, int, int, int] | None: ...
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
    tables: _LaunchTables | None,
    op: str,
    norms: torch.Tensor | None = None,
) -> int: ...
def clip_values(
    params: Sequence[torch.Tensor], limit: float, tables: _LaunchTables | None, op: str
) -> int: ...
def clip_rows(
    params: Sequence[torch.Tensor],
    factor: float,
    eps: float,
    tables: _LaunchTables | None,
    op: str,
) -> int: ...
def grad_norm(
    tensors: Sequence[torch.Tensor],
    of_params: bool,
    out: torch.Tensor,
    norm: int,
    clip: float,
    workspace: torch.Tensor | None,
    tables: _LaunchTables | None,
    op: str,
) -> int: ...
def augment_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    records: torch.Tensor,
    keys: torch.Tensor | None,
    interpolation: int,
    antialias: bool,
    fill_mode: int,
    color: bool,
    fill: Sequence[float],
    scale: Sequence[float],
    shift: Sequence[float],
    erase: Sequence[float],
    erase_noise: bool,
    op: str,
) -> int: ...
def augment_forward_list(
    y: torch.Tensor,
    images: Sequence[torch.Tensor],
    records: torch.Tensor,
    keys: torch.Tensor | None,
    interpolation: int,
    antialias: bool,
    fill_mode: int,
    color: bool,
    fill: Sequence[float],
    scale: Sequence[float],
    shift: Sequence[float],
    erase: Sequence[float],
    erase_noise: bool,
    op: str,
) -> int: ...
def augment_backward(
    grad_x: torch.Tensor,
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    records: torch.Tensor,
    interpolation: int,
    antialias: bool,
    fill_mode: int,
    color: bool,
    fill: Sequence[float],
    scale: Sequence[float],
    shift: Sequence[float],
    erase: Sequence[float],
    op: str,
) -> int: ...
def augment_resize(
    y: torch.Tensor,
    x: torch.Tensor,
    first_row: torch.Tensor,
    row_weights: torch.Tensor,
    first_column: torch.Tensor,
    column_weights: torch.Tensor,
    scratch: torch.Tensor | None,
    scale: Sequence[float],
    shift: Sequence[float],
    op: str,
) -> int: ...
def augment_resize_taps(
    size: int, new_size: int, interpolation: int, transposed: bool, op: str
) -> int: ...
def augment_resize_band(
    first: torch.Tensor,
    weights: torch.Tensor,
    size: int,
    new_size: int,
    interpolation: int,
    transposed: bool,
    op: str,
) -> int: ...
def augment_params(
    records: torch.Tensor,
    draws: torch.Tensor,
    keys: torch.Tensor,
    ids: torch.Tensor,
    seed: int,
    epoch: int,
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[tuple[int, int, list[float]]],
    op: str,
) -> tuple[int, int]: ...
def augment_numbers(
    out: torch.Tensor,
    ids: torch.Tensor,
    seed: int,
    epoch: int,
    occurrence: int,
    columns: int,
    normals: int,
    op: str,
) -> None: ...
def color_program(
    y: torch.Tensor,
    x: torch.Tensor,
    programs: torch.Tensor,
    fill: Sequence[float],
    whole_pixels: bool,
    scratch: torch.Tensor | None,
    before: tuple[object, ...] | None,
    after: tuple[object, ...] | None,
    op: str,
) -> int: ...
def color_program_check(
    programs: torch.Tensor, channels: int, height: int, width: int, op: str
) -> None: ...
def color_program_scratch(n: int, c: int, h: int, w: int) -> int: ...
def augment_elementary(x: float) -> tuple[float, float, float, float]: ...
