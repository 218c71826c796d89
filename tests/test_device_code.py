"""The reader of compiled CUDA kernels, on two small kernels as nvdisasm prints them.

The first moves two 16-byte vectors at a time; the second waits for a load before the next, and
stores a vector in four parts. Their source is in the comments of `WHOLE` and `SPLIT`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusereg.bench import device_code
from fusereg.bench.device_code import Bound, Kernel, Row, crossed, parse, row_of

TEXT = (Path(__file__).parent / "device_code.sass").read_text(encoding="utf-8")

#: for (i = threadIdx.x; i < n; i += 512) { a = x[i]; b = x[i + 256]; y[i] = ...; y[i + 256] = b; }
WHOLE = "_Z12whole_kernelPK5uint4PS_i"
#: for (...) { a = x[i]; b = x[a.x & 255]; p[0] = ...; p[1] = a.z; p[2] = a.w; p[3] = b.w; }
SPLIT = "_Z12split_kernelPK5uint4Pji"


def kernels(text: str = TEXT) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in parse(text)}


def row(name: str, text: str = TEXT) -> Row:
    return row_of(kernels(text)[name], name)


def test_a_kernel_has_its_registers_threads_and_memory() -> None:
    whole, split = kernels()[WHOLE], kernels()[SPLIT]
    assert (whole.registers, whole.threads, whole.shared, whole.spill) == (22, 256, 0, 0)
    assert (split.registers, split.threads, split.shared - 1024, split.spill) == (20, 128, 256, 0)


def test_names_are_short_and_have_all_template_arguments() -> None:
    assert device_code.short_names(
        [
            "_ZN7fusereg4room12_GLOBAL__N_16kernelIfLNS1_4KindE3ELb1EEEvPKT_",
            "_ZN7fusereg4room6kernelILNS0_4KindE2ELi16EEEvPKf",
            "_Z12whole_kernelPK5uint4PS_i",
        ]
    ) == ["room::kernel<float, 3, true>", "room::kernel<2, 16>", "whole_kernel"]


def test_stores_that_are_split_are_found() -> None:
    assert (row(WHOLE).st16, row(WHOLE).split) == (2, 0)
    assert (row(SPLIT).st16, row(SPLIT).split) == (0, 1)


def test_stores_with_a_gap_are_no_vector() -> None:
    text = TEXT.replace("STG.E desc[UR6][R4.64+0x4], R", "STG.E desc[UR6][R4.64+0x8], R")
    assert text != TEXT
    assert row(SPLIT, text).split == 0


def test_loads_that_are_waited_for_one_by_one_are_found() -> None:
    assert (row(WHOLE).ld16, row(WHOLE).alone) == (2, 0)
    assert (row(SPLIT).ld16, row(SPLIT).alone) == (2, 2)


def test_bytes_under_way_are_those_of_all_warps() -> None:
    assert row(WHOLE).warps == 64
    assert row(WHOLE).kilobytes == 2 * 16 * 64 * 32 / 1024
    assert row(SPLIT).kilobytes == 16 * 64 * 32 / 1024


def test_instructions_are_those_of_the_loop() -> None:
    """The loop of 16 instructions moves 64 bytes."""
    assert row(WHOLE).instructions == pytest.approx(16 / 4, abs=0.05)


def test_a_loop_of_much_arithmetic_is_bound_by_it() -> None:
    kernel = kernels()[WHOLE]
    first = next(i for i, c in enumerate(kernel.code) if c.access == ("STG", 16))
    more = [kernel.code[first]._replace(text=f"IADD3 R0, R0, {i}, RZ") for i in range(900)]
    kernel.code[first:first] = more
    kernel.labels = {k: v if v <= first else v + len(more) for k, v in kernel.labels.items()}
    found = row_of(kernel, WHOLE)
    assert found.bound == "alu"
    assert found.share < 50


def test_of_dropout_the_longest_path_is_rated() -> None:
    """Of a loop that skips 900 instructions or not."""
    kernel = kernels()[WHOLE]
    first = next(i for i, c in enumerate(kernel.code) if c.access == ("STG", 16))
    jump = kernel.code[first]._replace(guard="@P1", text="BRA `(.L_skip)")
    more = [kernel.code[first]._replace(text=f"IADD3 R0, R0, {i}, RZ") for i in range(900)]
    kernel.code[first:first] = [jump, *more]
    kernel.labels = {k: v if v <= first else v + 901 for k, v in kernel.labels.items()}
    kernel.labels[".L_skip"] = first + 901
    other, dropout = (row_of(kernel, f"{room}::kernel<float>") for room in ("penalty", "dropout"))
    assert (other.share, other.bound) == (95.0, "memory")
    assert dropout.share < 50


def test_float64_has_a_bound_of_its_own() -> None:
    """For GPUs that are slow in it; kernels of float64 may have any number."""
    kernel = kernels()[WHOLE]
    first = next(i for i, c in enumerate(kernel.code) if c.access == ("STG", 16))
    more = [
        kernel.code[first]._replace(text=text)
        for text in ("DADD R4, R4, R6", "F2F.F64.F32 R4, R2", "DFMA R4, R4, R6, R4") * 16
    ]
    kernel.code[first:first] = more
    kernel.labels = {k: v if v <= first else v + len(more) for k, v in kernel.labels.items()}
    found = row_of(kernel, WHOLE)
    assert found.f64 == 12.0
    assert crossed([found], (Bound("", f64=12.0),)) == []
    assert "12.0 float64 instructions" in crossed([found], (Bound("", f64=10.0),))[0]
    found.kernel = "room::kernel<double, 2>"
    assert crossed([found], (Bound("", f64=10.0),)) == []


def test_bounds_that_are_crossed_are_named() -> None:
    rows = [row(WHOLE), row(SPLIT)]
    lines = crossed(rows, (Bound("whole", share=96.0), Bound("")))
    assert [line.split(":")[0] for line in lines[:2]] == [WHOLE, SPLIT]
    assert "95 % of a copy" in lines[0]
    assert "1 16-byte stores are split" in lines[1]
    assert lines[2].startswith("2 of 4 16-byte loads")
    assert crossed([row(WHOLE)], (Bound(""),)) == []


def test_the_command_ends_with_1_where_a_bound_is_crossed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_code, "disassemble", lambda file: TEXT)
    table = tmp_path / "table.json"
    arguments = ["--json", str(table), "sample.o"]
    assert device_code.main([*arguments, "--only", "whole"]) == 0
    assert device_code.main(arguments) == 1
    said = capsys.readouterr()
    assert "split_kernel: 1 16-byte stores are split" in said.err
    assert "2 kernels: st16 2, split 1" in said.out
    assert '"kernel": "whole_kernel"' in table.read_text(encoding="utf-8")


# --- the stored table -----------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "device_code" / "sm90-nvcc13.0-after.json"
PAGE = ROOT / "docs" / "cuda.md"
needs_checkout = pytest.mark.skipif(
    not (STORED.is_file() and PAGE.is_file()), reason="no bench/ and docs/ beside these tests"
)


def stored() -> list[Row]:
    return [Row(**row) for row in json.loads(STORED.read_text(encoding="utf-8"))["rows"]]


def named_as_slow() -> list[re.Pattern[str]]:
    """Return what the page names in the table of slow kernels, with dots for anything."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("| kernels | why |")[2].partition("\n\n")[0]
    names = [
        name
        for line in table.splitlines()[2:]
        for name in re.findall("`([^`]*_kernel[^`]*)`", line.split(" | ")[0])
    ]
    parts = [".*".join(map(re.escape, name.split("..."))) for name in names]
    return [re.compile(rf"::{part}(?:<|$)" if "<" not in part else f"::{part}") for part in parts]


@needs_checkout
def test_the_stored_table_is_within_the_bounds() -> None:
    rows = stored()
    assert len(rows) > 500
    assert crossed(rows) == []


@needs_checkout
def test_each_slow_kernel_has_its_reason_on_the_page() -> None:
    slow = [row.kernel for row in stored() if row.share < 85.0]
    names = named_as_slow()
    assert slow
    assert names
    assert [k for k in slow if not any(name.search(k) for name in names)] == []
    unused = [n.pattern for n in names if not any(n.search(kernel) for kernel in slow)]
    assert unused == ["::program_kernel(?:<|$)"]  # what bounds it the model does not know
