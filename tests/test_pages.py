"""Large results on the CPU lie in large pages, where Linux gives them to those who ask."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusereg import augment
from fusereg import functional as F

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this system has no transparent huge pages",
)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "augment": lambda x: augment.crop_flip_normalize(x, (1000, 1000)),
    "batch_norm": lambda x: F.batch_norm(x, None, None),
    "drop_block2d": lambda x: F.drop_block2d(x, 0.1, 3),
    "dropout": lambda x: F.dropout(x, 0.1),
    "dropout_add_rms_norm": lambda x: F.dropout_add_rms_norm(x, x, p=0.1),
    "dropout_add": lambda x: F.dropout_add(x, x, 0.1),
    "gaussian_dropout": lambda x: F.gaussian_dropout(x, 0.1),
}


def flags_of_the_mapping_at(address: int) -> list[str]:
    """What Linux says of the memory there: proc(5), /proc/pid/smaps, VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return rest.split()
    raise LookupError(f"no memory at {address:#x}")


def lies_in_large_pages(t: Tensor) -> bool:
    return "hg" in flags_of_the_mapping_at(t.data_ptr() + t.nbytes // 2)


@pytest.mark.parametrize("name", CALLS)
def test_large_results_ask_for_large_pages(name: str) -> None:
    """40 MB, which torch's allocator maps anew."""
    x = torch.ones(2, 5, 1000, 1000, requires_grad=True)
    assert not lies_in_large_pages(x)
    y = CALLS[name](x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert lies_in_large_pages(y)
    if name != "augment":  # whose gradient is added up in another way
        assert lies_in_large_pages(gradient)


def test_what_is_given_is_asked_for_as_well() -> None:
    x = torch.ones(2, 5, 1000, 1000)
    for call in (F.dropout, lambda t, out: F.batch_norm(t, None, None, out=out)):
        out = torch.empty_like(x)
        assert not lies_in_large_pages(out)
        call(x, out=out)
        assert lies_in_large_pages(out)


@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("step", [1, 3, 40, 10**6])
def test_memory_of_which_some_pages_are_there_is_written_as_any(
    step: int, of_file: bool, tmp_path: Path
) -> None:
    """5 MB, of which each ``step``-th page has been written to, 12 bytes past a page's begin."""
    size, before = 5 << 20, 12
    if of_file:
        with (tmp_path / "memory").open("w+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, size // mmap.PAGESIZE, step):
        memory[page * mmap.PAGESIZE + 5] = 7
    count = (size - mmap.PAGESIZE) // 4
    out = torch.frombuffer(memory, dtype=torch.float32, offset=before, count=count)
    x = torch.randn(count)
    F.dropout(x, 0.3, seed=1, out=out)
    assert torch.equal(out, F.dropout(x, 0.3, seed=1))
    assert memory[:before] == bytes((0, 0, 0, 0, 0, 7, *[0] * 6)), "what lies around it stays"
    assert not any(memory[before + 4 * count :])
