"""Read what nvcc made of the CUDA kernels: registers, spills, stores, loads, and a model.

    python -m fusereg.bench.device_code build/nvcc/*.o        # or .cubin files
    python -m fusereg.bench.device_code --json table.json --only dropout build/nvcc/*.o

No GPU is needed. The files are objects of nvcc for one architecture from sm_80 to sm_90; cuobjdump
and nvdisasm read them (of a CUDA toolkit, or of the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm). It ends with status 1 if a kernel crosses a bound of `BOUNDS`. Columns, of
each kernel:

  regs     registers of a thread
  spill    bytes that a thread keeps in local memory: registers that were spilled, indexed arrays
  warps    warps on a multiprocessor at once, of 64
  st16     16-byte global stores
  split    runs of smaller stores, side by side in a basic block, that one 16-byte store could do
  ld16     16-byte global loads
  alone    those of them that are waited for before another load of the same loop is issued, one by
           one: only one of them is ever under way
  KB       kilobytes of global loads that a multiprocessor has under way at once
  ins, alu instructions for each 16 bytes moved, and those of them in the ALU pipe (half rate)
  f64      those of them that calculate in float64 or convert to or from it
  share    predicted share of a copy's bandwidth on an H100, in percent, and what bounds it

The last six are of the kernel's slowest hot loop. Hot are the innermost loops that move more than
half as many 16-byte vectors as any of them; where no loop moves any, accesses of all widths count.
A loop's path is the one that moves the most in the fewest instructions; of dropout, in the most, as
it depends on the probability how a call draws.

The model knows bytes under way (Little's law), issue slots and pipes. It knows nothing of barriers,
caches, tails and launches: a kernel can't exceed what it says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from fusereg.bench.harness.machine import git_commit
from fusereg.core import screen

# --- bounds ---------------------------------------------------------------------------------------

#: Of all 16-byte loads, in percent.
MOST_ALONE = 3.0


class Bound(NamedTuple):
    """The limits of kernels whose names match; the first bound that matches counts."""

    kernels: str
    spill: int = 0
    split: int = 0
    share: float = 0.0
    f64: float = 10.0  # of kernels of other dtypes


#: Without `share`: what is still to become faster. `f64`: a GPU that calculates in float64 at 1/64
#: of its float32 rate does some ten such instructions while it moves 16 bytes.
BOUNDS: tuple[Bound, ...] = (
    Bound(r"^dropout::dropout_window_kernel", share=85.0),
    Bound(r"^dropout::", share=90.0),
    # Two Philox calls and four pairs of normals for 8 elements, each operation rounded; in windows
    # the normals are exchanged, too.
    Bound(r"^gaussian_dropout::gaussian_dropout_kernel", share=85.0),
    Bound(r"^gaussian_dropout::", share=70.0),
    Bound(r"^fused_dropout::", share=90.0),
    # Two doubles of a row's statistics lie side by side, where no vector fits them.
    Bound(r"^dropout_norm::dropout_norm_forward_kernel<double", split=1, share=90.0),
    Bound(r"^dropout_norm::", share=90.0),
    Bound(r"^penalty::", share=90.0),
    Bound(r"^optim::(?:clip|norm|adaptive)_kernel", share=90.0),
    # FTRL's four numbers of the last step lie side by side, where no vector fits them.
    Bound(r"^optim::optimizer_kernel<3,", split=3),
    # Two results of a call may lie side by side.
    Bound(r"^cross_entropy::cross_entropy_finish_kernel", split=1),
    Bound(r"^cross_entropy::", share=90.0),
    Bound(r"^drop_block::drop_block_apply_kernel", share=90.0),
    Bound(r"^batch_norm::", share=90.0),
    # Which output pixels read one is asked in float64, in both passes over the taps.
    Bound(r"^augment::augment_backward_kernel<\w+, 1,", share=90.0, f64=15.0),
    Bound(r"^augment::", share=90.0),
    Bound(""),
)

# --- the model: an H100 SXM -----------------------------------------------------------------------

WARP = 32
MULTIPROCESSORS = 132
CLOCK = 1.755e9
COPY = 3.0e12
"""Bytes a second that a copy reads and writes together."""
LATENCY = 1.0e-6
"""Seconds of a load from memory that is busy."""
BYTES_A_CYCLE = COPY / MULTIPROCESSORS / CLOCK
REGISTERS, WARPS, SHARED, BLOCKS = 65536, 64, 227 * 1024, 32
#: Instructions of a warp that a multiprocessor starts in a cycle.
RATES = {"issue": 4.0, "alu": 2.0, "fp64": 2.0, "special": 0.5}
PIPES = {
    "alu": re.compile(
        r"LOP3|PLOP3|IADD|VIADD|SHF|ISETP|FSETP|SEL|FSEL|PRMT|LEA|IABS|VI|FMNMX|F2FP|FLO|SGXT|BMSK|P2R|R2P"
    ),
    "fp64": re.compile(r"D(?:ADD|MUL|FMA|SETP)"),
    "special": re.compile(r"MUFU|POPC|I2F|F2I|F2F|FRND"),
}

#: A GeForce RTX 4090 (128 multiprocessors, two of these a cycle) does ten in the time of 16 bytes.
FLOAT64 = re.compile(r"D(?:ADD|MUL|FMA|SETP)|(?:F2F|I2F|F2I)\S*\.F64")

DRAWS = re.compile(r"dropout::")  # kernels of several paths, of which a call takes one

# --- reading --------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")
_SECTION = re.compile(r"^\s*\.section\s+\.(text|nv\.info|nv\.shared)\.([^,\s]+),")
_ATTRIBUTE = re.compile(r"^\s*//-+ nvinfo : EIATTR_(\w+)")
_WORD = re.compile(r"\.word\s+(?:index@\((\S+)\)|0x([0-9a-f]+))")
_ACCESS = re.compile(
    r"(LDG|STG)\.E(\S*) (?:\w+, )*(?:desc\[\w+\])?"
    r"\[(\w+)(?:\.64)?(?:\+(UR\d+))?(?:\+(-?0x[0-9a-f]+))?\]"
)


class Instruction(NamedTuple):
    """An instruction, with the barrier that it sets and those that it waits for."""

    guard: str
    text: str
    sets: int
    waits: int

    @property
    def access(self) -> tuple[str, int] | None:
        """LDG or STG and the bytes of a thread, of an access to global memory."""
        found = _ACCESS.match(self.text)
        return (found[1], _width(found[2])) if found else None

    def waits_for(self, barriers: Iterable[int]) -> bool:
        """Return whether it waits for one of the barriers."""
        return any(b < 6 and self.waits >> b & 1 for b in barriers)


def _width(suffix: str) -> int:
    for name, width in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if name in suffix:
            return width
    return 4


@dataclass
class Kernel:
    """A kernel: its code, and its part of a multiprocessor."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    spill: int = 0
    shared: int = 0
    threads: int = 1024


def parse(text: str) -> list[Kernel]:
    """Return the kernels of what `nvdisasm -hex` prints of a cubin."""
    kernels: dict[str, Kernel] = {}
    numbers: dict[tuple[str, str], int] = {}
    section = attribute = owner = ""
    kernel: Kernel | None = None
    for line in text.splitlines():
        if ".section\t" in line:
            found = _SECTION.match(line)
            section, owner = (found[1], found[2].strip('"')) if found else ("", "")
            kernel = kernels.setdefault(owner, Kernel(owner)) if section == "text" else None
        elif kernel is not None:
            _read_code(kernel, line)
        elif found := _ATTRIBUTE.match(line):
            attribute = found[1]
        elif section == "nv.shared" and ".zero" in line:
            numbers[owner, "SHARED"] = int(line.split()[-1])
        elif found := _WORD.search(line):
            if found[1]:
                owner = found[1]
            elif (owner, attribute) not in numbers:
                numbers[owner, attribute] = int(found[2], 16)
    for name, kernel in kernels.items():
        kernel.registers = numbers.get((name, "REGCOUNT"), 0)
        kernel.spill = numbers.get((name, "FRAME_SIZE"), 0)
        kernel.shared = numbers.get((name, "SHARED"), 0)
        kernel.threads = numbers.get((name, "MAX_THREADS"), 1024)
    return list(kernels.values())


def _read_code(kernel: Kernel, line: str) -> None:
    if found := _INSTRUCTION.match(line):
        guard, text = "", found[2].strip()
        if text.startswith("@"):
            guard, _, text = text.partition(" ")
        kernel.code.append(Instruction(guard, text.strip(), 7, 0))
    elif found := _CONTROL.match(line):
        bits = int(found[1], 16)
        kernel.code[-1] = kernel.code[-1]._replace(sets=bits >> 46 & 7, waits=bits >> 52 & 63)
    elif found := _LABEL.match(line):
        kernel.labels[found[1]] = len(kernel.code)


# --- the flow of control --------------------------------------------------------------------------


class Block(NamedTuple):
    """Instructions [begin, end) that run one after the other, and the blocks that may follow."""

    begin: int
    end: int
    following: tuple[int, ...]


_ENDS = ("BRA", "BRX", "EXIT", "RET", "JMP")


def blocks_of(kernel: Kernel) -> list[Block]:
    """Return the basic blocks in the order of their addresses."""
    code = kernel.code
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, c in enumerate(code) if c.text.startswith(_ENDS)}
    bounds = [*sorted(s for s in starts if s < len(code)), len(code)]
    index = {start: i for i, start in enumerate(bounds[:-1])}
    blocks = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        last = code[end - 1]
        following = []
        falls = not last.text.startswith(_ENDS) or last.guard != "" or _conditional(last.text)
        if last.text.startswith(_ENDS) and not last.text.startswith("BRA.DIV"):
            labels = re.findall(r"\.L_\w+", last.text)
            following = [index[kernel.labels[n]] for n in labels if kernel.labels.get(n) in index]
        if falls and i + 2 < len(bounds):
            following.append(i + 1)
        blocks.append(Block(begin, end, tuple(following)))
    return blocks


def _conditional(text: str) -> bool:
    return text.startswith("BRA") and re.match(r"BRA(?:\.U|\.ANY)*\s+`", text) is None


def loops_of(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """Return the first and last block of each loop, by jumps to a lower address."""
    last: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for target in block.following:
            if target <= i and not (target == i and block.end - block.begin == 1):
                last[target] = max(i, last.get(target, i))
    return sorted(last.items())


class Way(NamedTuple):
    """The instructions of a way through a loop."""

    code: list[Instruction]

    def moved(self, least: int = 1) -> int:
        """Return the bytes that a thread moves by accesses of at least so many bytes."""
        return _moved(self.code, least)


def best_path(
    kernel: Kernel, blocks: Sequence[Block], first: int, last: int, least: int, longest: bool
) -> Way:
    """Return the way from block `first` to `last` that moves the most in the fewest instructions.

    With `longest`, in the most. Accesses of at least `least` bytes count.
    """
    sizes = [(b.end - b.begin) * (1 if longest else -1) for b in blocks]
    weight = [_moved(kernel.code[b.begin : b.end], least) for b in blocks[first : last + 1]]
    best = {first: (weight[0], sizes[first], -1)}
    for i in range(first, last + 1):
        if i not in best:
            continue
        for j in blocks[i].following:
            if i < j <= last:
                found = (best[i][0] + weight[j - first], best[i][1] + sizes[j], i)
                if found[:2] > best.get(j, (-1, 0))[:2]:
                    best[j] = found
    if last not in best:
        return Way([])
    path, at = [last], best[last][2]
    while at >= 0:
        path.append(at)
        at = best[at][2]
    parts = (kernel.code[blocks[i].begin : blocks[i].end] for i in reversed(path))
    return Way([c for part in parts for c in part])


def _moved(code: Iterable[Instruction], least: int = 1) -> int:
    return sum(c.access[1] for c in code if c.access and c.access[1] >= least)


def hot_paths(kernel: Kernel, longest: bool = False) -> list[Way]:
    """Return the paths of the hot loops, or of the whole kernel where no loop moves anything."""
    blocks = blocks_of(kernel)
    # Loops of vectors if there are any: others are of tails and partial results.
    for least in (16, 1):
        paths = {
            loop: best_path(kernel, blocks, *loop, least, longest) for loop in loops_of(blocks)
        }
        moving = {loop: path for loop, path in paths.items() if path.moved(least)}
        inner = [path for loop, path in moving.items() if not _has_inner(loop, moving)]
        if inner:
            break
    else:
        ends = [i for i, b in enumerate(blocks) if kernel.code[b.end - 1].text.startswith("EXIT")]
        inner = [best_path(kernel, blocks, 0, i, least, longest) for i in ends]
    most = max((path.moved(least) for path in inner), default=0)
    return [path for path in inner if path.moved(least) > most / 2]


def _has_inner(loop: tuple[int, int], loops: Iterable[tuple[int, int]]) -> bool:
    return any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)


# --- stores and loads -----------------------------------------------------------------------------


def split_stores(kernel: Kernel) -> tuple[int, int]:
    """Return the number of 16-byte stores, and of runs of smaller ones that make one.

    A run has the address register, the basic block and the guard in common, and is as long as whole
    vectors: three doubles are a struct.
    """
    whole, split = 0, 0
    for block in blocks_of(kernel):
        parts: dict[tuple[str, ...], dict[int, int]] = defaultdict(dict)
        versions: Counter[str] = Counter()
        for c in kernel.code[block.begin : block.end]:
            found = _ACCESS.match(c.text)
            if found is None or found[1] != "STG":
                # What it writes comes first: one register, or up to two predicates.
                versions.update(re.findall(r"\b(?:R\d+|P\d)\b", c.text)[:2])
            elif (width := _width(found[2])) == 16:
                whole += 1
            else:
                guard, address = c.guard, found[3]
                names = guard, address, found[4] or "", str(width)
                now = str(versions[guard[-2:]]), str(versions[address])
                parts[names + now][int(found[5] or "0", 16)] = width
        for offsets in parts.values():
            for begin, width in offsets.items():
                if begin - width in offsets:
                    continue
                length = width
                while begin + length in offsets:
                    length += width
                split += length // 16 if length % 16 == 0 else 0
    return whole, split


def lone_loads(kernel: Kernel) -> tuple[int, int]:
    """Return the number of 16-byte loads, and of those that are under way alone, one by one.

    Two loads of a loop are under way together if a way leads from one to the next on which nothing
    waits for the first: what another branch waits for doesn't count.
    """
    blocks = blocks_of(kernel)
    loops = loops_of(blocks)
    where: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for i, block in enumerate(blocks):
        around = [loop for loop in loops if loop[0] <= i <= loop[1]]
        loop = min(around, key=lambda x: x[1] - x[0], default=(-1, -1))
        where[loop] += [
            (at, i) for at in range(block.begin, block.end) if kernel.code[at].access == ("LDG", 16)
        ]
    alone = 0
    for loads in where.values():
        # Of each two neighbors: whether one comes after the other, and whether both are under way.
        after = [_reaches(kernel, blocks, a, b, wait=False) for a, b in pairwise(loads)]
        joined = [_reaches(kernel, blocks, a, b, wait=True) for a, b in pairwise(loads)]
        for k in range(len(loads)):
            beside = range(max(k - 1, 0), min(k + 1, len(joined)))
            alone += any(after[j] for j in beside) and not any(joined[j] for j in beside)
    return sum(map(len, where.values())), alone


def _reaches(
    kernel: Kernel,
    blocks: Sequence[Block],
    start: tuple[int, int],
    end: tuple[int, int],
    wait: bool,
) -> bool:
    """Return whether a way without jumps back leads from one load to another.

    With `wait`, only ways on which nothing waits for the first load count.
    """
    (first, first_block), (last, last_block) = start, end
    barrier = kernel.code[first].sets if wait else 7

    def passes(begin: int, end: int) -> bool:
        return not any(c.waits_for([barrier]) for c in kernel.code[begin:end])

    if first_block == last_block:
        return passes(first + 1, last + 1)
    reached = (
        set(blocks[first_block].following) if passes(first + 1, blocks[first_block].end) else set()
    )
    for i in range(first_block + 1, last_block):
        if i in reached and passes(blocks[i].begin, blocks[i].end):
            reached |= {j for j in blocks[i].following if j > i}
    return last_block in reached and passes(blocks[last_block].begin, last + 1)


def most_under_way(code: Iterable[Instruction]) -> int:
    """Return the most bytes of global loads that a thread has under way on a path."""
    under_way: list[tuple[int, int]] = []
    most = 0
    for c in code:
        under_way = [(b, n) for b, n in under_way if not c.waits_for([b])]
        if c.access and c.access[0] == "LDG":
            under_way.append((c.sets, c.access[1]))
            most = max(most, sum(n for _, n in under_way))
    return most


# --- the table ------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of the table: one kernel."""

    kernel: str
    regs: int
    spill: int
    warps: int
    st16: int
    split: int
    ld16: int
    alone: int
    kilobytes: float
    instructions: float
    alu: float
    f64: float
    share: float
    bound: str


def warps_at_once(kernel: Kernel) -> int:
    """Return how many warps a multiprocessor holds."""
    warps = -(-kernel.threads // WARP)
    registers = -(-kernel.registers * WARP // 256) * 256 * warps
    blocks = min(
        WARPS // warps, BLOCKS, REGISTERS // max(registers, 1), SHARED // (kernel.shared + 1024)
    )
    return blocks * warps


def row_of(kernel: Kernel, name: str) -> Row:
    """Return the kernel's row."""
    whole, split = split_stores(kernel)
    loads, alone = lone_loads(kernel)
    warps = warps_at_once(kernel)
    models = [Model(p, warps) for p in hot_paths(kernel, longest=bool(DRAWS.match(name)))]
    model = min(models, key=lambda m: m.share, default=Model(Way([]), warps))
    return Row(
        kernel=name,
        regs=kernel.registers,
        spill=kernel.spill,
        warps=warps,
        st16=whole,
        split=split,
        ld16=loads,
        alone=alone,
        kilobytes=round(model.under_way / 1024, 1),
        instructions=round(model.each["issue"], 1),
        alu=round(model.each["alu"], 1),
        f64=round(model.float64, 1),
        share=round(100 * model.share, 1),
        bound=model.bound,
    )


class Model:
    """The model of a loop: the `share` of a copy that it reaches, and what bounds it."""

    def __init__(self, path: Way, warps: int) -> None:
        accesses = [c.access for c in path.code if c.access]
        read = sum(width for kind, width in accesses if kind == "LDG")
        vectors = max(path.moved(), 1) / 16
        counts = {"issue": len(path.code)}
        for pipe, pattern in PIPES.items():
            counts[pipe] = sum(bool(pattern.match(c.text)) for c in path.code)
        self.each = {pipe: n / vectors for pipe, n in counts.items()}
        self.float64 = sum(bool(FLOAT64.match(c.text)) for c in path.code) / vectors
        self.under_way = most_under_way(path.code) * warps * WARP
        # A warp moves 512 bytes with a vector of each of its threads.
        cycles = 16 * WARP / BYTES_A_CYCLE
        shares = {"memory": 0.95}
        shares |= {pipe: cycles * RATES[pipe] / n for pipe, n in self.each.items() if n}
        if read:
            shares["latency"] = self.under_way / (
                read / path.moved() * COPY / MULTIPROCESSORS * LATENCY
            )
        self.bound = min(shares, key=lambda k: shares[k]) if path.moved() else "none"
        self.share = shares.get(self.bound, 0.0)


def crossed(rows: Sequence[Row], bounds: Sequence[Bound] = BOUNDS) -> list[str]:
    """Return a line for each bound that is crossed."""
    lines = []
    for row in rows:
        bound = next((b for b in bounds if re.search(b.kernels, row.kernel)), Bound(""))
        if row.split > bound.split:
            lines.append(f"{row.kernel}: {row.split} 16-byte stores are split, not {bound.split}")
        if row.spill > bound.spill:
            lines.append(f"{row.kernel}: {row.spill} bytes of local memory, not {bound.spill}")
        if "<double" not in row.kernel and row.f64 > bound.f64:
            lines.append(f"{row.kernel}: {row.f64} float64 instructions, not {bound.f64}")
        if row.bound != "none" and row.share < bound.share:
            lines.append(
                f"{row.kernel}: {row.share:.0f} % of a copy by the model ({row.bound}), "
                f"not {bound.share:.0f}"
            )
    loads, alone = sum(r.ld16 for r in rows), sum(r.alone for r in rows)
    if alone > MOST_ALONE / 100 * loads:
        lines.append(f"{alone} of {loads} 16-byte loads are under way alone: over {MOST_ALONE} %")
    return lines


# --- the command ----------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Return the path of one of CUDA's tools, from PATH or from this environment's packages.

    Raises:
        SystemExit: If it is not there.
    """
    if found := shutil.which(name):
        return found
    for folder in sys.path:
        for path in sorted(Path(folder).glob(f"nvidia/*/bin/{name}")):
            return str(path)
    raise SystemExit(f"device_code: {name} is missing; do: pip install nvidia-cuda-{name}")


def _output(*command: str | Path, given: str | None = None, folder: Path | None = None) -> str:
    return subprocess.run(
        [str(c) for c in command],
        input=given,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def disassemble(file: Path) -> str:
    """Return what nvdisasm says of a .cubin, or of the one in an object."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = file.resolve()
        if file.suffix != ".cubin":
            _output(tool("cuobjdump"), "-xelf", "all", cubin, folder=Path(folder))
            found = sorted(Path(folder).glob("*.cubin"))
            if len(found) != 1:
                raise SystemExit(
                    f"device_code: {file} has code for {len(found)} architectures, not 1"
                )
            cubin = found[0]
        return _output(tool("nvdisasm"), "-hex", cubin)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the kernels' names and template arguments in C++, without namespaces."""
    plain = _output("c++filt", given="\n".join(names)).splitlines()
    noise = r"^void |\(anonymous namespace\)::|\b(?:fusereg|cuda|std)::"
    types = r"\((?:\w+::)*\w+\)(?=\d)"
    found = []
    for name in plain:
        text = re.sub(types, "", re.sub(noise, "", name))
        room, _, rest = text.partition("(")[0].partition("::")
        found.append(f"{room}::{rest.replace(f'{room}::', '')}" if rest else room)
    return found


def _follow(files: Sequence[Path]) -> Iterator[Path]:
    """Yield the files, with a bar on a terminal and a line for each elsewhere."""
    console = Console(stderr=True, highlight=False)
    with screen.progress(console) as p:
        bar = p.add_task("", total=len(files))
        for file in files:
            p.update(bar, description=f"reading {file.name}")
            yield file
            p.advance(bar)
            if not console.is_terminal:
                console.print(f"read {file.name}")


_HEADS = (
    *("regs", "spill", "warps", "st16", "split", "ld16", "alone", "KB", "ins", "alu", "f64"),
    "share",
)


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, and a last line with their sums."""
    grid = screen.table(("kernel", *_HEADS, "by"), padding=(0, 1, 0, 0), pad_edge=True)
    for column in grid.columns[1:]:
        column.no_wrap = True
    grid.columns[-1].justify = "left"
    for row in rows:
        name, *numbers, bound = asdict(row).values()
        grid.add_row(Text(name), *(f"{n:.0f}" for n in numbers), bound)
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    console.print(grid)
    sums = ", ".join(f"{key} {value}" for key, value in totals(rows).items())
    console.print(f"{len(rows)} kernels: {sums}")


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Return the sums over all kernels."""
    return {
        k: sum(getattr(r, k) for r in rows) for k in ("st16", "split", "ld16", "alone", "spill")
    }


def write_json(path: Path, rows: Sequence[Row], compiler: str, files: Sequence[Path]) -> None:
    """Write the rows, a line each, with the compiler and the commit."""
    head = {
        "tool": "device_code",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "compiler": compiler,
        "git_commit": git_commit(),
        "files": [file.name for file in files],
        "totals": totals(rows),
    }
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the files, print the table, and return 1 if a bound is crossed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="device_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--only", default="", metavar="REGEX", help="kernels to show and to check")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    compiler = ""
    for file in _follow(options.files):
        text = disassemble(file)
        release = re.search(r"release [\d.]+, V[\d.]+", text)
        compiler = release[0] if release else compiler
        kernels = parse(text)
        rows += map(row_of, kernels, short_names([k.name for k in kernels]))
    rows = sorted((r for r in rows if re.search(options.only, r.kernel)), key=lambda r: r.kernel)
    print_table(rows)
    if options.json:
        write_json(options.json, rows, compiler, options.files)
    lines = crossed(rows)
    for line in lines:
        print(f"bound crossed: {line}", file=sys.stderr)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
