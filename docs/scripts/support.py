"""Finds out by trying what each operation supports, and writes it into the pages' tables.

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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusereg
from fusereg import augment
from fusereg import functional as F

ROOT = Path(__file__).resolve().parents[2]
YES, NO = "yes", "–"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_BLOCK = re.compile(r"(<!-- support: (?P<names>[^\n]*?) -->\n).*?(<!-- end support -->)", re.DOTALL)


@dataclass(frozen=True)
class Subject:
    """An operation as a function of one tensor that may need a gradient."""

    call: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (4, 6, 8, 8)
    #: Changes its argument and gives it back; no gradient goes through.
    in_place: bool = False


def _vector(x: Tensor, value: float = 1.0) -> Tensor:
    return x.new_full((x.shape[1],), value)


def _columns(x: Tensor) -> Tensor:
    return x.new_ones(x.shape[-1])


def _changed(step: Callable[..., object], *arguments: float) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        w = x.clone()
        step([w], *arguments)
        return w

    return call


SUBJECTS: dict[str, Subject] = {
    "l1_penalty": Subject(lambda x: F.l1_penalty([x], 0.1)),
    "l2_penalty": Subject(lambda x: F.l2_penalty([x], 0.1)),
    "elastic_net_penalty": Subject(lambda x: F.elastic_net_penalty([x], 0.1, 0.2)),
    "group_lasso_penalty": Subject(lambda x: F.group_lasso_penalty([x], 0.1)),
    "prox.l1_": Subject(_changed(fusereg.prox.l1_, 0.1), in_place=True),
    "prox.elastic_net_": Subject(_changed(fusereg.prox.elastic_net_, 0.1, 0.1), in_place=True),
    "prox.group_lasso_": Subject(_changed(fusereg.prox.group_lasso_, 0.1), in_place=True),
    "dropout": Subject(lambda x: F.dropout(x, 0.3)),
    "dropout1d": Subject(lambda x: F.dropout1d(x, 0.3), (4, 6, 8)),
    "dropout2d": Subject(lambda x: F.dropout2d(x, 0.3)),
    "dropout3d": Subject(lambda x: F.dropout3d(x, 0.3), (4, 6, 2, 8, 8)),
    "alpha_dropout": Subject(lambda x: F.alpha_dropout(x, 0.3)),
    "feature_alpha_dropout": Subject(lambda x: F.feature_alpha_dropout(x, 0.3)),
    "drop_path": Subject(lambda x: F.drop_path(x, 0.3)),
    "drop_block2d": Subject(lambda x: F.drop_block2d(x, 0.3, 3)),
    "gaussian_dropout": Subject(lambda x: F.gaussian_dropout(x, 0.3)),
    "consistent_dropout": Subject(lambda x: F.consistent_dropout(x, 0.3, 1), (4, 6, 8)),
    "drop_connect_linear": Subject(
        lambda x: F.drop_connect_linear(x, x.new_ones(5, x.shape[-1]), None, 0.3), (4, 8)
    ),
    "drop_connect_conv2d": Subject(
        lambda x: F.drop_connect_conv2d(x, x.new_ones(5, x.shape[1], 3, 3), None, p=0.3)
    ),
    "bias_dropout_add": Subject(lambda x: F.bias_dropout_add(x, _columns(x), x, 0.3), (4, 6, 8)),
    "dropout_add": Subject(lambda x: F.dropout_add(x, x, 0.3)),
    "drop_path_add": Subject(lambda x: F.drop_path_add(x, x, 0.3)),
    "activation_dropout": Subject(lambda x: F.activation_dropout(x, 0.3, "gelu")),
    "dropout_add_layer_norm": Subject(
        lambda x: F.dropout_add_layer_norm(x, x, _columns(x), _columns(x), 0.3), (4, 6, 8)
    ),
    "dropout_add_rms_norm": Subject(
        lambda x: F.dropout_add_rms_norm(x, x, _columns(x), 0.3), (4, 6, 8)
    ),
    "batch_norm": Subject(lambda x: F.batch_norm(x, None, None, _vector(x), _vector(x), True)),
    "batch_norm, evaluation": Subject(
        lambda x: F.batch_norm(x, _vector(x, 0.0), _vector(x), _vector(x), _vector(x), False)
    ),
    "batch_norm, activation and residual": Subject(
        lambda x: F.batch_norm(
            x, None, None, _vector(x), _vector(x), True, activation="relu", residual=x
        )
    ),
    "batch_norm, dropout": Subject(
        lambda x: F.batch_norm(x, None, None, _vector(x), _vector(x), True, dropout=0.3)
    ),
    "augment.warp_affine": Subject(
        lambda x: augment.warp_affine(x, torch.tensor([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.5]]))
    ),
    "augment.crop_flip_normalize": Subject(
        lambda x: augment.crop_flip_normalize(x, 5, top=1, left=2, hflip=True, mean=0.5, std=0.2)
    ),
    "augment.resize": Subject(lambda x: augment.resize(x, (5, 11))),
    "augment.erase": Subject(
        lambda x: augment.erase(x, torch.tensor([[1, 1, 4, 5]]).expand(x.shape[0], 4))
    ),
    "augment.mix": Subject(lambda x: augment.mix(x, torch.arange(x.shape[0]).roll(1), 0.3)),
}


# --- what is tried --------------------------------------------------------------------------------


def _input(s: Subject, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(s.shape, dtype=torch.float64).to(dtype)


def _forward_backward(s: Subject, x: Tensor, call: Callable[[Tensor], Tensor]) -> None:
    if s.in_place:
        with torch.no_grad():
            y = call(x)
        assert y.shape == x.shape
        return
    x = x.detach().requires_grad_()
    call(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def dtypes(s: Subject) -> None:
    for dtype in DTYPES:
        _forward_backward(s, _input(s, dtype), s.call)


def layouts(s: Subject) -> None:
    """Permuted, expanded, from the middle of a larger tensor, channels_last, empty."""
    x = _input(s)
    order = [len(s.shape) - 1, *range(len(s.shape) - 1)]
    back = sorted(range(len(order)), key=order.__getitem__)
    wide = torch.randn(*s.shape[:-1], s.shape[-1] + 3)
    tried = [x.permute(order).contiguous().permute(back), wide[..., 1 : 1 + s.shape[-1]]]
    tried.append(torch.randn(x.numel() + 1)[1:].view(s.shape))
    if not s.in_place:
        tried.append(x[:1].expand(s.shape))
    if x.dim() == 4:
        tried.append(x.contiguous(memory_format=torch.channels_last))
    for t in tried:
        _forward_backward(s, t, s.call)


def compiled(s: Subject) -> None:
    torch._dynamo.reset()
    call = torch.compile(s.call, fullgraph=True, backend="aot_eager")
    _forward_backward(s, _input(s), call)


class _AsModule(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def exported(s: Subject) -> None:
    program = torch.export.export(_AsModule(s.call), (_input(s),))
    program.module()(_input(s))


def vmap(s: Subject) -> None:
    torch.func.vmap(s.call, randomness="different")(torch.randn(3, *s.shape))


def func_grad(s: Subject) -> None:
    torch.func.grad(lambda x: s.call(x).sum())(_input(s))


def forward_mode(s: Subject) -> None:
    torch.func.jvp(s.call, (_input(s),), (_input(s),))


def double_backward(s: Subject) -> None:
    x = _input(s).requires_grad_()
    (g,) = torch.autograd.grad((s.call(x) ** 2).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert x.grad is not None


def autocast(s: Subject) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _forward_backward(s, _input(s), s.call)
        _forward_backward(s, _input(s, torch.bfloat16), s.call)


def dtensor(s: Subject) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    _forward_backward(s, distribute_tensor(_input(s), mesh, [Shard(0)]), s.call)


#: Columns that say nothing of what is no function of its input.
NOT_IN_PLACE = {"double backward", "vmap", "func.grad", "forward mode"}
COLUMNS: dict[str, Callable[[Subject], None]] = {
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
    """A group of this process alone."""
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
    """What the table says of an operation; needs ``process_group()``.

    ``why`` is told what went wrong in an attempt that failed.
    """
    found = []
    for column, attempt in COLUMNS.items():
        if SUBJECTS[name].in_place and column in NOT_IN_PLACE:
            found.append("")
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(SUBJECTS[name])
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
    """The operations that a page's comments name; separated by semicolons."""
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
