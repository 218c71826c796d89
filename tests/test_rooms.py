"""The house keeps its plan: each technique has a room with all its levels; nothing leaks between.

These tests read the source tree. The rules are functions over a folder, so that each is also shown
to find what it looks for in a small tree with a planted fault.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusereg

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".sh"}
MAX_LINES = 700
#: What a file that is compiled once per instruction set may include of the standard library: no
#: inline function, compiled with AVX-512, that the linker could keep for everybody.
ISA_HEADERS = {"cstdint", "cstring", "immintrin.h"}


def rooms(root: Path) -> list[str]:
    folders = (p for p in (root / "csrc").iterdir() if p.is_dir())
    return sorted(p.name for p in folders if p.name != "core")


def code_of(path: Path) -> str:
    """A C++ or CUDA source without comments and string literals, line numbers kept."""
    text = path.read_text(encoding="utf-8")
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

    def blank(found: re.Match[str]) -> str:
        keep = found[0] if is_include(text, found.start()) else ""
        return keep or "\n" * found[0].count("\n")

    return re.sub(pattern, blank, text, flags=re.DOTALL)


def is_include(text: str, at: int) -> bool:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return re.fullmatch(r"\s*#\s*include\s*", line) is not None


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(path), flags=re.MULTILINE)


def without_hash_comments(path: Path) -> str:
    return re.sub(r"#[^\n]*", "", path.read_text(encoding="utf-8"))


def cmake_sources(root: Path, *variables: str) -> set[str]:
    """The files that CMakeLists.txt lists in these variables."""
    found: set[str] = set()
    text = without_hash_comments(root / "CMakeLists.txt")
    for variable in variables:
        for body in re.findall(rf"\bset\(\s*{variable}\s+([^)]*)\)", text):
            found.update(body.split())
    return found


# --- the levels of a room -------------------------------------------------------------------------


def missing_levels(root: Path, stem: str) -> list[str]:
    wanted = {
        f"csrc/{stem}/{stem}.h": "the contract",
        f"csrc/{stem}/{stem}.cpp": "the CPU kernels",
        f"csrc/{stem}/{stem}.cu": "the CUDA kernels",
        f"csrc/{stem}/bind.cpp": "the binding",
        f"tests/test_{stem}.py": "the tests",
        f"bench/{stem}.py": "the benchmark",
        f"python/fusereg/cli/checks/{stem}.py": "the checks of fusereg verify",
    }
    missing = [
        f"no {path} ({what})" for path, what in wanted.items() if not (root / path).is_file()
    ]
    module = code_of(root / "csrc/module.cpp")
    if not re.search(rf"\b{stem}::bind\(m\);", module):
        missing.append(f"csrc/module.cpp does not call {stem}::bind(m)")
    listed = cmake_sources(root, "room_sources", "isa_sources", "cuda_sources")
    for path in sorted((root / "csrc" / stem).glob("*.c[pu]*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".cpp", ".cu") and name not in listed:
            missing.append(f"CMakeLists.txt does not list {name}")
    python = [p for p in (root / "python/fusereg").rglob(f"{stem}.py") if p.parts[-2] != "checks"]
    if not python:
        missing.append(f"no python/fusereg/**/{stem}.py (the Python level)")
    return missing


def plant_room(root: Path, stem: str) -> None:
    """The smallest tree that has a room with all its levels."""
    files = {
        f"csrc/{stem}/{stem}.h": "",
        f"csrc/{stem}/{stem}.cpp": "",
        f"csrc/{stem}/{stem}.cu": "",
        f"csrc/{stem}/bind.cpp": "",
        "csrc/module.cpp": f"{stem}::bind(m);\n",
        "CMakeLists.txt": f"set(room_sources csrc/{stem}/bind.cpp)\n"
        f"set(isa_sources csrc/{stem}/{stem}.cpp)\nset(cuda_sources csrc/{stem}/{stem}.cu)\n",
        f"tests/test_{stem}.py": "",
        f"bench/{stem}.py": "",
        f"python/fusereg/cli/checks/{stem}.py": "",
        f"python/fusereg/nn/{stem}.py": "",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_there_are_rooms() -> None:
    assert "penalty" in rooms(ROOT)


@pytest.mark.parametrize("stem", rooms(ROOT))
def test_a_room_has_every_level(stem: str) -> None:
    assert missing_levels(ROOT, stem) == []


@pytest.mark.parametrize(
    "level",
    [
        "csrc/snow/snow.h",
        "csrc/snow/snow.cpp",
        "csrc/snow/snow.cu",
        "csrc/snow/bind.cpp",
        "tests/test_snow.py",
        "bench/snow.py",
        "python/fusereg/cli/checks/snow.py",
        "python/fusereg/nn/snow.py",
    ],
)
def test_a_room_without_one_level_is_found_out(level: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    assert missing_levels(tmp_path, "snow") == []
    (tmp_path / level).unlink()
    assert len(missing_levels(tmp_path, "snow")) == 1


@pytest.mark.parametrize("file", ["csrc/module.cpp", "CMakeLists.txt"])
def test_a_room_that_is_only_mentioned_in_a_comment_is_found_out(file: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    path = tmp_path / file
    mark = "#" if file.endswith(".txt") else "//"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{mark} {line}\n" for line in lines), encoding="utf-8")
    assert missing_levels(tmp_path, "snow") != []


def test_cmake_lists_only_files_that_exist() -> None:
    variables = ("core_sources", "room_sources", "isa_sources", "cuda_sources")
    listed = cmake_sources(ROOT, *variables)
    assert len(listed) > 5
    assert [name for name in sorted(listed) if not (ROOT / name).is_file()] == []


# --- who may include whom -------------------------------------------------------------------------


def foreign_includes(root: Path) -> list[str]:
    """Includes of one room by another, or of a room by core/."""
    known = {*rooms(root), "core"}
    found = []
    for path in sorted((root / "csrc").rglob("*.*")):
        home = path.relative_to(root / "csrc").parts[0]
        for name in includes(path):
            first = name.split("/")[0] if "/" in name else None
            resolved = (path.parent / name).resolve()
            if first not in known and resolved.is_file():
                first = resolved.relative_to((root / "csrc").resolve()).parts[0]
            if path.parent != root / "csrc" and first in known - {home, "core"}:
                found.append(f"{path.relative_to(root)} includes {name}")
    return found


def test_core_includes_no_room_and_rooms_do_not_include_each_other() -> None:
    assert foreign_includes(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("csrc/core/tensor.h", '#include "snow/snow.h"'),
        ("csrc/ice/ice.h", "#include <snow/snow.h>"),
        ("csrc/ice/ice.h", '  #  include "../snow/snow.h"'),
    ],
)
def test_an_include_across_rooms_is_found_out(file: str, text: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    plant_room(tmp_path, "ice")
    assert foreign_includes(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text + "\n", encoding="utf-8")
    assert len(foreign_includes(tmp_path)) == 1


# --- files that are compiled once per instruction set ---------------------------------------------


def isa_files(root: Path) -> Iterator[Path]:
    """The sources, and the headers that exist for them alone."""
    for name in sorted(cmake_sources(root, "isa_sources")):
        path = root / name
        yield path
        yield from path.parent.glob(f"{path.parent.name}_math.h")
    yield root / "csrc/core/simd.h"


@pytest.mark.parametrize("path", list(isa_files(ROOT)), ids=lambda p: p.name)
def test_a_file_compiled_per_isa_includes_no_inline_standard_library(path: Path) -> None:
    used = set(includes(path))
    assert used, "no includes were read"
    assert {name for name in used if "/" not in name} <= ISA_HEADERS


def test_isa_objects_define_nothing_outside_their_namespace() -> None:
    """A weak symbol of an AVX-512 object could become everybody's: SIGILL on an older processor."""
    nm = shutil.which("nm")
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/fusereg_cpu_*.dir/**/*.o"))
    if nm is None or not objects:
        pytest.skip("no nm, or no build folder here (build/*)")
    for path in objects:
        (isa,) = re.findall(r"fusereg_cpu_(\w+)\.dir", path.as_posix())
        done = subprocess.run(
            [nm, "-C", "--extern-only", "--defined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        symbols = [line.split(maxsplit=2)[2] for line in done.stdout.splitlines()]
        assert symbols, f"{path} defines nothing"
        own = re.compile(rf"fusereg::\w+::{isa}::")
        assert [s for s in symbols if not own.match(s)] == [], path


# --- CUDA -----------------------------------------------------------------------------------------


def direct_launches(root: Path) -> list[str]:
    """Launches that do not go through cuda::launch(), the seam of the host build."""
    seam = root / "csrc/core/cuda.cuh"
    found = []
    for path in sorted((root / "csrc").rglob("*.*")):
        code = code_of(path)
        for line, text in enumerate(code.splitlines(), 1):
            launches = "<<<" in text or (
                path != seam and re.search(r"\b(cudaLaunch\w*|cuLaunch\w*)\b", text)
            )
            if launches:
                found.append(f"{path.relative_to(root)}:{line}: {text.strip()}")
    return found


def test_every_kernel_is_launched_through_the_one_launch_function() -> None:
    assert direct_launches(ROOT) == []
    for stem in rooms(ROOT):
        code = "".join(code_of(p) for p in (ROOT / "csrc" / stem).glob("*.cu"))
        assert re.search(r"\blaunch\(", code), f"{stem} launches nothing"


@pytest.mark.parametrize(
    "text",
    ["kernel<<<1, 32>>>(x);", "kernel\n  <<<grid, block, 0, stream>>>(x);", "cudaLaunchKernel(f);"],
)
def test_a_direct_launch_is_found_out(text: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    (tmp_path / "csrc/snow/snow.cu").write_text(f"// not <<<this>>>\n{text}\n", encoding="utf-8")
    assert len(direct_launches(tmp_path)) == 1


# --- the build ------------------------------------------------------------------------------------

FAST_MATH = re.compile(
    r"fast-math|use_fast_math|-Ofast|-funsafe-math|-fassociative-math|-ffinite-math|-freciprocal-math"
)


def build_files(root: Path) -> list[Path]:
    names = ["CMakeLists.txt", "Makefile", "pyproject.toml", ".ci/run"]
    paths = [root / n for n in names if (root / n).is_file()]
    for folder in ("csrc", "tests", "bench", "cmake"):
        for pattern in ("**/CMakeLists.txt", "**/*.cmake", "**/*.sh"):
            paths += (root / folder).glob(pattern)
    return paths


def fast_math(root: Path) -> list[str]:
    found = [p for p in build_files(root) if FAST_MATH.search(without_hash_comments(p))]
    for path in sorted((root / "csrc").rglob("*.*")):
        # Strings too: __attribute__((optimize("fast-math"))) is one.
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        if FAST_MATH.search(code):
            found.append(path)
    return [p.relative_to(root).as_posix() for p in found]


def test_nothing_is_built_with_fast_math() -> None:
    assert ROOT / "CMakeLists.txt" in build_files(ROOT)
    assert fast_math(ROOT) == []


def test_no_compile_command_has_fast_math() -> None:
    plans = sorted((ROOT / "build").glob("*/build.ninja"))
    if not plans:
        pytest.skip("no build folder here (build/*)")
    for plan in plans:
        text = plan.read_text(encoding="utf-8")
        assert "-ffp-contract=off" in text, f"{plan}: no compile commands were read"
        assert not FAST_MATH.search(text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("CMakeLists.txt", "add_compile_options(-O3 -ffast-math) # no fast-math here"),
        ("tests/CMakeLists.txt", "set(CMAKE_CUDA_FLAGS --use_fast_math)"),
        ("csrc/snow/snow.cpp", '__attribute__((optimize("fast-math"))) void f();'),
        ("bench/gpu.sh", "nvcc -Xcompiler=-Ofast x.cu"),
    ],
)
def test_fast_math_is_found_out(file: str, text: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    for path, comment in (
        ("CMakeLists.txt", "# never fast-math"),
        ("csrc/snow/snow.h", "// fast-math"),
    ):
        with (tmp_path / path).open("a", encoding="utf-8") as f:
            f.write(comment + "\n")
    assert fast_math(tmp_path) == []
    with (tmp_path / file).open("a", encoding="utf-8") as f:
        f.write(text + "\n")
    assert fast_math(tmp_path) == [file]


def source_files(root: Path) -> Iterator[Path]:
    for folder in ("csrc", "python", "tests", "bench"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES or path.name == "CMakeLists.txt":
                yield path
    yield from (root / name for name in ("CMakeLists.txt", "Makefile"))


def test_no_source_file_is_longer_than_it_should_be() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in source_files(ROOT)
    }
    assert len(lines) > 30
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


# --- operators ------------------------------------------------------------------------------------


def operators() -> list[str]:
    names = (str(name) for name in torch._C._dispatch_get_all_op_names())
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("fusereg::")})


def checked_operators(text: str) -> set[str]:
    """Attribute names in the first argument of calls of opcheck.

    Where that is a variable, those in the decorators of the function that calls it.
    """
    found: set[str] = set()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func
            if name != "opcheck" and not (isinstance(name, ast.Name) and name.id == "opcheck"):
                continue
            where = [call.args[0]]
            if isinstance(call.args[0], ast.Name):
                where = function.decorator_list
            for node in (n for w in where for n in ast.walk(w)):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
    return found


def test_the_operators_are_found() -> None:
    assert fusereg.__version__
    assert {"penalty", "penalty_backward", "penalty_add_grad_", "prox_"} <= set(operators())


@pytest.mark.parametrize("name", operators())
def test_every_operator_has_an_opcheck(name: str) -> None:
    checked: set[str] = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        checked |= checked_operators(path.read_text(encoding="utf-8"))
    assert name in checked


def test_only_what_opcheck_is_called_on_counts_as_checked() -> None:
    text = """
@parametrize("op", [torch.ops.fusereg.snow.default])
def test_a(op):
    torch.library.opcheck(op, (1,))

def test_b():
    opcheck(torch.ops.fusereg.ice.default, (torch.ops.fusereg.rain(),))
    torch.ops.fusereg.hail()
"""
    assert {"snow", "ice"} <= checked_operators(text)
    assert checked_operators(text).isdisjoint({"rain", "hail"})
