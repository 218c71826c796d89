"""Finds out by trying what each operation of the inventory supports, and writes the pages' tables.

    python docs/scripts/support.py            # rewrites what is out of date; a minute
    python docs/scripts/support.py --check    # says what is, and fails if anything

A table stands between two comments, the first of which names its operations:

    <!-- support: dropout drop_path -->
    <!-- end support -->

Each answer is an attempt on this machine's CPU: the operation is called in the way the column says,
forward and backward, on all supported dtypes where that matters. Whether results are *right* is for
the test suite; here is asked whether there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusereg.core.inventory import TOLERANCES, Inputs, Operation, as_tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from ops import LAYOUTS, by_name, laid_out  # noqa: E402

YES, NO = "yes", "–"

_BLOCK = re.compile(r"(<!-- support: (?P<names>[^\n]*?) -->\n).*?(<!-- end support -->)", re.DOTALL)


# --- what is tried --------------------------------------------------------------------------------


def _tensors(operation: Operation, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return operation.sample(Inputs(torch.device("cpu"), dtype, "tiny"))


def _function(
    operation: Operation, tensors: list[Tensor]
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return the operation as a function of its differentiable tensors, drawing where it draws."""
    options = {"seed": None} if "seed" in operation.options else {}
    return operation.as_function(tensors, **options)


def _total(results: Any) -> Tensor:
    return sum((y.square().sum() for y in as_tuple(results)), torch.zeros(()))


def _forward_backward(
    operation: Operation,
    tensors: list[Tensor],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
) -> None:
    call, leaves = _function(operation, tensors)
    if operation.written and operation.as_list:
        wrap(call)(*(t.clone() for t in leaves))
        return
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    _total(wrap(call)(*leaves)).backward()
    for t in leaves:
        assert t.grad is not None
        assert t.grad.shape == t.shape


def dtypes(operation: Operation) -> None:
    for dtype in TOLERANCES:
        _forward_backward(operation, _tensors(operation, dtype))


def layouts(operation: Operation) -> None:
    for layout in LAYOUTS:
        if not (operation.written and layout == "expanded"):
            _forward_backward(operation, laid_out(operation, layout, _tensors(operation)))


def compiled(operation: Operation) -> None:
    torch._dynamo.reset()
    _forward_backward(
        operation,
        _tensors(operation),
        lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
    )


class _AsModule(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(*tensors)


def exported(operation: Operation) -> None:
    call, leaves = _function(operation, _tensors(operation))
    torch.export.export(_AsModule(call), leaves).module()(*leaves)


def vmap(operation: Operation) -> None:
    call, leaves = _function(operation, _tensors(operation))
    torch.func.vmap(call, randomness="different")(*(torch.stack([t, t]) for t in leaves))


def func_grad(operation: Operation) -> None:
    call, leaves = _function(operation, _tensors(operation))
    torch.func.grad(lambda *t: _total(call(*t)))(*leaves)


def forward_mode(operation: Operation) -> None:
    call, leaves = _function(operation, _tensors(operation))
    torch.func.jvp(call, leaves, leaves)


def double_backward(operation: Operation) -> None:
    call, leaves = _function(operation, _tensors(operation))
    leaves = tuple(t.requires_grad_() for t in leaves)
    gradients = torch.autograd.grad(_total(call(*leaves)), leaves, create_graph=True)
    _total(gradients).backward()
    assert all(t.grad is not None for t in leaves)


def autocast(operation: Operation) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            _forward_backward(operation, _tensors(operation, dtype))


def dtensor(operation: Operation) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    tensors = _tensors(operation)
    placements = [Shard(0) if t.dim() == tensors[0].dim() else Replicate() for t in tensors]
    _forward_backward(
        operation,
        [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)],
    )


#: Columns that say nothing of what is no function of its input.
NOT_IN_PLACE = {"double backward", "vmap", "func.grad", "forward mode"}
COLUMNS: dict[str, Callable[[Operation], None]] = {
    "all four dtypes": dtypes,
    "any strides": layouts,
    "double backward": double_backward,
    "autocast": autocast,
    "compile, fullgraph": compiled,
    "export": exported,
    "vmap": vmap,
    "func.grad": func_grad,
    "forward mode": forward_mode,
    "DTensor": dtensor,
}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Make a process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def answers(name: str, why: Callable[[str], object] = lambda text: None) -> list[str]:
    """Return what the table says of an operation; needs ``process_group()``.

    ``why`` is told what went wrong in an attempt that failed.
    """
    operation = by_name(name)
    found = []
    for column, attempt in COLUMNS.items():
        if operation.as_list and operation.written and column in NOT_IN_PLACE:
            found.append("")
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(operation)
            found.append(YES)
        except Exception as error:  # whatever it is, it does not work
            why(f"{name}, {column}: {type(error).__name__}: {str(error)[:300]}")
            found.append(NO)
    return found


# --- tables ---------------------------------------------------------------------------------------


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row(name: str, found: Sequence[str]) -> str:
    operation, _, rest = name.partition(", ")
    return line([f"`{operation}`{', ' if rest else ''}{rest}", *found])


def table(rows: Sequence[str]) -> str:
    head = [line(["operation", *COLUMNS]), line(["---", *["---"] * len(COLUMNS)])]
    return "\n" + "\n".join([*head, *rows]) + "\n\n"


def names(text: str) -> list[str]:
    """Return the operations that a page's comments name; separated by semicolons."""
    return [n.strip() for m in _BLOCK.finditer(text) for n in m["names"].split(";")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    check = parser.parse_args(argv).check
    failed = False
    with process_group():
        for path in sorted((ROOT / "docs").glob("*.md")):
            text = path.read_text(encoding="utf-8")
            rows = {name: row(name, answers(name, print)) for name in names(text)}

            def made(m: re.Match[str], rows: dict[str, str] = rows) -> str:
                return m[1] + table([rows[n.strip()] for n in m["names"].split(";")]) + m[3]

            if (new := _BLOCK.sub(made, text)) != text:
                failed = True
                print(f"{path.relative_to(ROOT)}: {'is out of date' if check else 'renewed'}")
                if not check:
                    path.write_text(new, encoding="utf-8")
    return 1 if check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
