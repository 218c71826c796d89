"""The house keeps its plan: each technique has a room with all its levels; nothing leaks between.

These tests read the source tree. The rules are functions over a folder, so that each is also shown
to find what it looks for in a small tree with a planted fault.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fusereg import _C

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".sh"}
MAX_LINES = 700
#: What a file that is compiled once per instruction set may include of the standard library: no
#: inline function, compiled with AVX-512, that the linker could keep for everybody.
ISA_HEADERS = {"arm_neon.h", "cstdint", "cstring", "immintrin.h"}


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


# --- the levels of a room -------------------------------------------------------------------------


def missing_levels(root: Path, stem: str) -> list[str]:
    """Return what a technique lacks: the build and the benchmarks find its files by their names."""
    wanted = {
        f"csrc/{stem}/{stem}.h": "the contract",
        f"csrc/{stem}/{stem}_kernels.cpp": "the CPU kernels",
        f"csrc/{stem}/{stem}_launch.cpp": "the CPU launcher",
        f"csrc/{stem}/{stem}.cu": "the CUDA kernels",
        f"csrc/{stem}/bind.cpp": "the binding",
        f"python/fusereg/{stem}/__init__.py": "the Python package",
        f"python/fusereg/{stem}/check.py": "its operations, for the tests and fusereg verify",
        f"tests/test_{stem}.py": "the tests",
        f"bench/suites/{stem}.py": "the benchmark",
    }
    missing = [
        f"no {path} ({what})" for path, what in wanted.items() if not (root / path).is_file()
    ]
    pages = "".join(p.read_text(encoding="utf-8") for p in (root / "docs").glob("*.md"))
    if not re.search(rf"\b{stem}\w*", pages):
        missing.append(f"no page of docs/ names {stem}")
    return missing


def plant_room(root: Path, stem: str) -> None:
    """Write the smallest tree that has a room with all its levels."""
    csrc, python = f"csrc/{stem}", f"python/fusereg/{stem}"
    names = [f"{csrc}/{stem}.h", f"{csrc}/{stem}_kernels.cpp", f"{csrc}/{stem}_launch.cpp"]
    names += [
        f"{csrc}/{stem}.cu",
        f"{csrc}/bind.cpp",
        f"{python}/__init__.py",
        f"{python}/check.py",
    ]
    names += [f"tests/test_{stem}.py", f"bench/suites/{stem}.py", "python/fusereg/__init__.py"]
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    (root / "docs").mkdir(exist_ok=True)
    (root / f"docs/{stem}.md").write_text(f"# {stem}\n", encoding="utf-8")


@pytest.mark.parametrize("file", ["CMakeLists.txt", "csrc/module.cpp"])
def test_the_build_finds_rooms_by_itself(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [stem for stem in rooms(ROOT) if re.search(rf"\b{stem}\b", text)] == []


def test_there_are_rooms() -> None:
    assert "penalty" in rooms(ROOT)


@pytest.mark.parametrize("stem", rooms(ROOT))
def test_a_room_has_every_level(stem: str) -> None:
    assert missing_levels(ROOT, stem) == []


@pytest.mark.parametrize(
    "level",
    [
        "csrc/snow/snow.h",
        "csrc/snow/snow_kernels.cpp",
        "csrc/snow/snow_launch.cpp",
        "csrc/snow/snow.cu",
        "csrc/snow/bind.cpp",
        "python/fusereg/snow/__init__.py",
        "python/fusereg/snow/check.py",
        "tests/test_snow.py",
        "bench/suites/snow.py",
        "docs/snow.md",
    ],
)
def test_a_room_without_one_level_is_found_out(level: str, tmp_path: Path) -> None:
    plant_room(tmp_path, "snow")
    assert missing_levels(tmp_path, "snow") == []
    (tmp_path / level).unlink()
    assert len(missing_levels(tmp_path, "snow")) == 1


# --- a new room ---------------------------------------------------------------------------------

#: A technique without compiled kernels.
_SNOW = {
    "op.py": """
        import torch
        from ..core.operator import Operator
        def _kernel(x, strength, op="snow", out=None):
            return torch.mul(x, strength, out=out)
        def _save(ctx, arguments, output):
            ctx.strength = arguments[1]
        def _gradient(ctx, grad):
            return (snow_(grad, ctx.strength),)
        snow_ = Operator(
            "snow(Tensor x, float strength) -> Tensor", _kernel,
            fake=lambda x, strength: torch.empty_like(x), save=_save, gradient=_gradient,
        )
        """,
    "functional.py": """
        from .op import snow_
        def snow(x, strength=0.5):
            return snow_(x, strength)
        """,
    "layers.py": """
        from torch import nn
        from . import functional as F
        class Snow(nn.Module):
            def forward(self, input):
                return F.snow(input)
        """,
    "check.py": """
        from ..core.inventory import Operation
        from . import functional
        OPERATIONS = [Operation(
            name="snow", formula="x * strength", function=functional.snow,
            options={"strength": 0.25}, reference=lambda x: x * 0.25,
        )]
        """,
}
# Each process begins with it: the finder of an editable installation comes before the path.
_WITHOUT_FINDER = """
    import sys
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    """
_USE_SNOW = """
    import torch
    import fusereg
    from fusereg.cli import main
    from fusereg.cli.checks import OPERATIONS, TECHNIQUES, run_checks
    x = torch.randn(8, requires_grad=True)
    compiled = torch.compile(fusereg.functional.snow, fullgraph=True, backend="aot_eager")
    assert torch.equal(fusereg.nn.Snow()(x), compiled(x))
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(gradient, torch.full((8,), 0.5))
    assert torch.equal(torch.vmap(fusereg.functional.snow)(x), x * 0.5)
    assert "snow" in TECHNIQUES
    results = run_checks([row for row in OPERATIONS if row.technique == "snow"])
    assert results and all(result.ok for result in results), results
    assert main(["verify", "snow", "--device", "cpu", "--dtype", "float32"]) == 0
    """


@pytest.mark.slow
def test_a_new_room_is_named_in_three_lines_outside_of_its_folders(tmp_path: Path) -> None:
    """Its folders, one line in each face and one in the stub are all that a toy operation needs."""
    source = ROOT / "python" / "fusereg"
    leave = shutil.ignore_patterns("__pycache__", "bench")
    package = tmp_path / "python" / "fusereg"
    plant_room(tmp_path, "snow")
    (package / "__init__.py").unlink()
    shutil.copytree(source, package, ignore=leave, copy_function=os.symlink, dirs_exist_ok=True)
    module = Path(str(_C.__file__))  # an editable installation has it elsewhere
    if not (package / module.name).exists():
        (package / module.name).symlink_to(module)
    for name, text in _SNOW.items():
        (package / "snow" / name).write_text(textwrap.dedent(text), encoding="utf-8")
    lines = {
        "functional/__init__.py": "from ..snow.functional import snow",
        "nn/__init__.py": "from ..snow.layers import Snow",
        "_C.pyi": "def snow_forward(y: Tensor, x: Tensor, strength: float, op: str) -> None: ...",
    }
    for name, line in lines.items():
        before = (source / name).read_text(encoding="utf-8")
        (package / name).unlink()
        (package / name).write_text(f"{before}\n{line}\n", encoding="utf-8")
    finder = textwrap.dedent(_WITHOUT_FINDER)
    (tmp_path / "python" / "sitecustomize.py").write_text(finder, encoding="utf-8")
    assert missing_levels(tmp_path, "snow") == []
    assert forbidden_imports(tmp_path) == []
    assert statements_of_faces(tmp_path) == []
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_USE_SNOW)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "python")},
    )
    assert done.returncode == 0, done.stderr


# --- Python: who may import whom ------------------------------------------------------------------

#: Levels from the compiled module upwards. A module may import levels below its own, and its own
#: package. Packages that are not named are rooms.
LEVELS = {
    "_C": 0,
    "core": 1,
    "cpu": 1,
    "ROOMS": 2,
    "optim": 3,
    "augment": 3,
    "early_stopping": 3,
    "run": 3,
    "nn": 3,
    "functional": 3,
    "convert": 4,
    "backend": 4,
    "path": 4,
    "compact": 5,
    "": 6,  # the package itself, which integrations and programs import as a user does
    "integrations": 7,
    "cli": 7,
    "demo": 8,
    "__main__": 9,
}
#: Modules that only import, so that every technique stays one folder.
FACES = ("nn", "functional")


class Imported(NamedTuple):
    """One import of a module of the package by another."""

    where: str
    by: str
    target: str
    lazy: bool


def python_modules(root: Path) -> dict[str, Path]:
    """Return the package's modules by their names without "fusereg."."""
    package = root / "python/fusereg"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] != "bench":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def own_imports(root: Path) -> list[Imported]:
    """Return every import of the package's own modules, those in functions and for types too."""
    modules = python_modules(root)
    found = []
    for by, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = set(tree.body)
        package = ["fusereg", *by.split(".")] if by else ["fusereg"]
        if path.name != "__init__.py":
            package.pop()
        for node in ast.walk(tree):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                base = ".".join(filter(None, (base, node.module)))
                for a in node.names:
                    inner = f"{base}.{a.name}".removeprefix("fusereg.")
                    is_module = inner in modules or inner == "_C"
                    targets.append(f"{base}.{a.name}" if is_module else base)
            for target in targets:
                first, _, rest = target.partition(".")
                if first == "fusereg" and rest != by:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    found.append(Imported(where, by, rest, node not in at_once))
    return found


def level_of(module: str) -> int:
    return LEVELS.get(module.split(".")[0], LEVELS["ROOMS"])


def forbidden_imports(root: Path) -> list[str]:
    """Return imports of a level above, of another package of the same level, and lazy ones."""
    found = []
    for where, by, target, lazy in own_imports(root):
        own, other = by.split(".")[0], target.split(".")[0]
        if own == other:
            allowed = True
        elif by == "":  # the front page imports what it offers
            allowed = level_of(target) < LEVELS[""]
        else:
            allowed = level_of(target) < level_of(by)
        if not allowed:
            found.append(f"{where}: {by} imports {target or 'the whole package'}")
        elif lazy and own not in ("cli", "demo"):  # commands answer --help before torch is loaded
            found.append(f"{where}: {by} imports {target} only when it is called, or for its types")
    return found


def circles(root: Path) -> list[list[str]]:
    """Return the circles of imports among modules, whenever the imports happen."""
    modules = python_modules(root)
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for _, by, target, _ in own_imports(root):
        # The face of a package stands for what it imports; its parts do not import it back.
        if target in modules and not by.startswith(f"{target}.") and target:
            arrows[by].add(target)
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for target in sorted(arrows[name]):
            visit(target, [*path, name])
        done.add(name)

    for name in modules:
        visit(name, [])
    return found


def statements_of_faces(root: Path) -> list[str]:
    """Return what is in a face besides imports, its docstring and ``__all__``."""
    found = []
    for face in FACES:
        path = root / f"python/fusereg/{face}/__init__.py"
        others = [p for p in path.parent.iterdir() if p.suffix == ".py" and p != path]
        found += [f"{p.relative_to(root)} is more than a face" for p in others]
        for i, node in enumerate(ast.parse(path.read_text(encoding="utf-8")).body):
            is_doc = i == 0 and isinstance(node, ast.Expr)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not (is_doc or is_all or isinstance(node, ast.ImportFrom)):
                found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)[:60]}")
    return found


def test_arrows_between_packages_run_down_and_none_is_lazy() -> None:
    assert len(own_imports(ROOT)) > 100
    assert forbidden_imports(ROOT) == []


def test_no_import_runs_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_faces_only_import() -> None:
    assert statements_of_faces(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/checks.py", "from ..snow import op"),
        ("ice/op.py", "from ..snow import op"),
        ("ice/op.py", "from fusereg.snow.op import f"),
        ("ice/op.py", "import fusereg.snow"),
        ("ice/op.py", "def f() -> None:\n    from ..snow import op"),
        ("ice/op.py", "if TYPE_CHECKING:\n    from ..snow import op"),
        ("ice/op.py", "def f() -> None:\n    from ..core import checks"),
        ("ice/op.py", "from ..functional import snow"),
        ("ice/check.py", "import fusereg"),
        ("snow/check.py", "from ..cli import app"),
        ("optim/adam.py", "from ..augment import op"),
        ("convert/model.py", "from .. import nn, WeightPenalty"),
    ],
)
def test_an_arrow_that_runs_up_or_across_is_found_out(file: str, text: str, tmp_path: Path) -> None:
    package = tmp_path / "python/fusereg"
    for name in ("core/checks", "snow/op", "ice/op", "augment/op", "cli/app", "nn/__init__"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("", encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "ice/layers.py").write_text("from . import op\nfrom ..core import checks\n")
    assert forbidden_imports(tmp_path) == []
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(text + "\n", encoding="utf-8")
    assert len(forbidden_imports(tmp_path)) == 1


@pytest.mark.parametrize("back", ["from . import a", "def f():\n    from .a import g"])
def test_a_circle_is_found_out(back: str, tmp_path: Path) -> None:
    package = tmp_path / "python/fusereg"
    (package / "ice").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import ice\n", encoding="utf-8")
    (package / "ice/__init__.py").write_text("from .a import f\n", encoding="utf-8")
    (package / "ice/a.py").write_text("from .b import f\n", encoding="utf-8")
    (package / "ice/b.py").write_text("f = 1\n", encoding="utf-8")
    assert circles(tmp_path) == []
    (package / "ice/b.py").write_text(back + "\n", encoding="utf-8")
    assert circles(tmp_path) == [["ice.a", "ice.b", "ice.a"]]


@pytest.mark.parametrize(
    ("file", "text"), [("__init__.py", "x = 1"), ("__init__.py", "import torch"), ("snow.py", "")]
)
def test_a_face_that_does_more_is_found_out(file: str, text: str, tmp_path: Path) -> None:
    for face in FACES:
        folder = tmp_path / "python/fusereg" / face
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(
            '"""Layers."""\nfrom ..snow import f\n__all__ = ["f"]\n'
        )
    assert statements_of_faces(tmp_path) == []
    with (tmp_path / "python/fusereg/nn" / file).open("a", encoding="utf-8") as f:
        f.write(text + "\n")
    assert len(statements_of_faces(tmp_path)) == 1


# --- adding a technique ---------------------------------------------------------------------------


def test_nothing_but_faces_and_the_stub_names_the_functions_of_a_room() -> None:
    """The smallest room: what a new technique touches besides its own files."""
    stem = "gaussian_dropout"
    tracked = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".pyi", ".cpp", ".txt", ".h"}]
    own = {
        f"csrc/{stem}",
        f"python/fusereg/{stem}",
        "tests",
        "bench/suites",
        "docs",
        "bench/results",
    }
    named = set()
    for path in tracked:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith((".", "build/", "dist/")) or any(name.startswith(o) for o in own):
            continue
        if "bench" not in path.parts[len(ROOT.parts) : -1] and stem in path.read_text("utf-8"):
            named.add(name)
    expected = {
        "python/fusereg/_C.pyi",
        "python/fusereg/functional/__init__.py",
        "python/fusereg/nn/__init__.py",
    }
    assert expected <= named
    assert named - expected == {"python/fusereg/core/aliases.py"}  # old paths alone


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
    """Yield the sources, and the headers that exist for them alone."""
    for path in sorted((root / "csrc").glob("*/*_kernels.cpp")):
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
