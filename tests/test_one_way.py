"""There is one way for what every room does, and many arguments go it by name, in a record.

A function that hands on its own parameters by position is right as long as nobody adds one in the
middle. With a few that is seen; with more than seven it is not, once it happens twice.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from test_rooms import ROOT, code_of

#: So many of its own parameters a function may hand on in a row, through any number of others.
MOST = 7


class Handed(NamedTuple):
    """A call that hands on more of the caller's own parameters in a row."""

    where: str
    by: str
    to: str
    bound: bool


def longest_row(arguments: Iterable[str], parameters: set[str]) -> int:
    best = now = 0
    for argument in arguments:
        now = now + 1 if argument in parameters else 0
        best = max(best, now)
    return best


# --- Python ---------------------------------------------------------------------------------------


def handed_on(root: Path) -> list[Handed]:
    """Return the calls in the package, but for those that make a record with named fields."""
    paths = sorted((root / "python/fusereg").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    records = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases)
    }
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.Lambda):
                continue
            a = node.args
            parameters = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
            name = getattr(node, "name", "lambda")
            for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
                given = [arg.id if isinstance(arg, ast.Name) else "" for arg in call.args]
                function = ast.unparse(call.func)
                own = not function.startswith("super()")
                to = function.rpartition(".")[2] if own else function
                if to not in records and longest_row(given, parameters) > MOST:
                    where = f"{path.relative_to(root)}:{call.lineno}"
                    found.append(Handed(where, name, to, function.startswith("_C.")))
    return found


def handed_on_twice(root: Path) -> list[str]:
    """Return the calls to a function, Python's or compiled, that hands as many on once more."""
    calls = handed_on(root)
    again = {call.by for call in calls}
    compiled = {call.by for call in handed_on_in_cpp(root)}
    return [
        f"{call.where}: {call.by} -> {call.to}, which hands them on"
        for call in calls
        if call.to in (compiled if call.bound else again)
    ]


# --- C++ ------------------------------------------------------------------------------------------

_CLOSING = {"(": ")", "{": "}", "[": "]", "<": ">"}


def end_of(text: str, start: int) -> int:
    """Return where the bracket that opens at ``start`` is closed, or the end of the text."""
    opening, depth = text[start], 0
    for at in range(start, len(text)):
        depth += (text[at] == opening) - (text[at] == _CLOSING[opening])
        if depth == 0:
            return at
    return len(text)


def parts_of(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for c in text.replace("->", ""):
        depth += (c in _CLOSING) - (c in _CLOSING.values())
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def cpp_functions(code: str) -> Iterator[tuple[str, set[str], int, int]]:
    """Yield name, parameters and place of the body of functions and lambdas with many of them."""
    body = re.compile(r"\s*(?:const|noexcept|mutable|override|\s)*(?:->[^;{}()]*)?(?::[^;{}]*)?\{")
    for head in re.finditer(r"(?:\b(\w+)|\])\s*\(", code):
        close = end_of(code, head.end() - 1)
        opened = body.match(code, close + 1)
        if opened is None or head[1] in ("if", "for", "while", "switch", "catch"):
            continue
        names = [
            re.findall(r"\w+", p.split("=")[0]) for p in parts_of(code[head.end() : close]) if p
        ]
        parameters = {words[-1] for words in names if words}
        if len(parameters) > MOST:
            start = opened.end() - 1
            yield head[1] or "lambda", parameters, start, end_of(code, start)


def handed_on_in_cpp(root: Path) -> list[Handed]:
    """Return the calls in csrc, but for braces: those make a struct with named fields.

    Bound functions are called from Python with as many arguments, so that for them one is two.
    """
    found = []
    for path in sorted((root / "csrc").rglob("*.*")):
        code = code_of(path)
        for name, parameters, start, end in cpp_functions(code):
            for call in re.finditer(r"(\w+)\s*(?:<[\w:, ]*>\s*)?\(", code[start:end]):
                opened = start + call.end() - 1
                given = parts_of(code[opened + 1 : end_of(code, opened)])
                if longest_row(given, parameters) > MOST:
                    line = code.count("\n", 0, opened) + 1
                    where = f"{path.relative_to(root)}:{line}"
                    found.append(Handed(where, name, call[1], bound=path.name.startswith("bind")))
    return found


def cpp_handed_on_twice(root: Path) -> list[str]:
    calls = handed_on_in_cpp(root)
    again = {call.by for call in calls}
    return [f"{c.where}: {c.by} -> {c.to}" for c in calls if c.bound or c.to in again]


def test_many_arguments_go_through_one_hop_at_most() -> None:
    assert handed_on_twice(ROOT) == []
    assert handed_on(ROOT), "none is found even once"


def test_many_arguments_go_through_one_hop_at_most_in_cpp() -> None:
    assert cpp_handed_on_twice(ROOT) == []
    many = [f for p in (ROOT / "csrc").rglob("*.cpp") for f in cpp_functions(code_of(p))]
    assert len(many) > 10, "the functions were not found"


NAMES = ", ".join("abcdefgh")
IN_CPP = ", ".join(f"int {name}" for name in "abcdefgh")


@pytest.mark.parametrize(
    ("last", "twice"),
    [
        (f"def g({NAMES}):\n    return h({NAMES})", True),
        (f"g = lambda {NAMES}: h({NAMES})\n", False),  # has no name to be called by
        (f"def g({NAMES}):\n    return h(a, b, c, d, e, f, g)", False),
        (f"def g({NAMES}):\n    return h(a, b, c, d, 0, e, f, g, h)", False),
        (f"def g({NAMES}):\n    return Record({NAMES})", False),
        (f"def g({NAMES}):\n    return h(a=a, b=b, c=c, d=d, e=e, f=f, g=g, h=h)", False),
    ],
)
def test_arguments_that_go_through_two_hops_are_found(
    last: str, twice: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "python/fusereg"
    folder.mkdir(parents=True)
    record = "class Record(NamedTuple):\n    a: int\n"
    first = f"def f({NAMES}, *, i):\n    return m.g({NAMES})\n"
    (folder / "snow.py").write_text(f"{record}\n{first}\n{last}\n", encoding="utf-8")
    assert bool(handed_on_twice(tmp_path)) == twice


@pytest.mark.parametrize(
    ("file", "text", "twice"),
    [
        ("bind.cpp", f"int f({IN_CPP}) {{\n  if (a) {{ g<int>({NAMES}); }}\n}}", True),
        ("bind.cpp", f"auto f = [&]({IN_CPP}) -> int {{ return g({NAMES}); }};", True),
        ("bind.cpp", f"int f({IN_CPP}) {{ return g(Job{{{NAMES}}}); }}", False),
        ("bind.cpp", f"int f({IN_CPP}) {{ return g(a, b, c, d, e, f, g); }}", False),
        ("snow.cu", f"int f({IN_CPP}) {{ return g({NAMES}); }}", False),
        (
            "snow.cu",
            f"int g({IN_CPP}) {{ h({NAMES}); }}\nint f({IN_CPP}) {{ return g({NAMES}); }}",
            True,
        ),
    ],
)
def test_arguments_that_go_through_two_hops_are_found_in_cpp(
    file: str, text: str, twice: bool, tmp_path: Path
) -> None:
    (tmp_path / "csrc/snow").mkdir(parents=True)
    (tmp_path / "csrc/snow" / file).write_text(text, encoding="utf-8")
    assert bool(cpp_handed_on_twice(tmp_path)) == twice


def test_a_compiled_function_that_hands_on_what_python_did_is_found(tmp_path: Path) -> None:
    for name, text in {
        "python/fusereg/snow.py": f"def f({NAMES}):\n    return _C.g({NAMES})\n",
        "csrc/snow/call.h": f"int g({IN_CPP}) {{ return h({NAMES}); }}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(handed_on_twice(tmp_path)) == 1


# --- torch.library --------------------------------------------------------------------------------


def registrations(root: Path) -> list[str]:
    """Return the calls outside core/operator.py that make operators or give them kernels."""
    makes = re.compile(
        r"\b(?:torch\.library\b|library\.(?:define|impl|register_\w+|custom_op|Library)\b|"
        r"(?:custom_op|register_fake|register_autograd|register_vmap|triton_op)\b)"
    )
    found = []
    for path in sorted((root / "python/fusereg").rglob("*.py")):
        if path.relative_to(root / "python/fusereg").as_posix() == "core/operator.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.ImportFrom) and makes.search(ast.unparse(node)):
                found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_operators_are_made_in_one_place() -> None:
    assert registrations(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.library.define('fusereg::snow', '(Tensor x) -> Tensor')",
        "from torch.library import custom_op",
        "lib = torch.library.Library('fusereg', 'FRAGMENT')",
        "from torch import library\nlibrary.register_fake('fusereg::snow')",
    ],
)
def test_an_operator_that_is_made_elsewhere_is_found(text: str, tmp_path: Path) -> None:
    for name, content in {"core/operator.py": text, "snow/op.py": text}.items():
        path = tmp_path / "python/fusereg" / name
        path.parent.mkdir(parents=True)
        path.write_text(content + "\n", encoding="utf-8")
    assert {line.partition(":")[0] for line in registrations(tmp_path)} == {
        "python/fusereg/snow/op.py"
    }


# --- kernels --------------------------------------------------------------------------------------


def jobs_run_elsewhere(root: Path) -> list[str]:
    """Return where a binding runs kernels, or lets the GIL go, other than by core/call.h."""
    own = re.compile(r"\b(?:run_cpu|run_cuda|gil_scoped_release)\b")
    return [
        f"{path.relative_to(root)}:{code.count(chr(10), 0, found.start()) + 1}: {found[0]}"
        for path in sorted((root / "csrc").glob("*/bind*.cpp"))
        for code in [code_of(path)]
        for found in own.finditer(code)
    ]


def test_bindings_run_their_jobs_in_one_way() -> None:
    assert jobs_run_elsewhere(ROOT) == []
    for path in (ROOT / "csrc").glob("*/bind.cpp"):
        code = "".join(code_of(p) for p in path.parent.glob("bind*.cpp"))
        assert "run_job(" in code, f"{path.parent.name} runs nothing"


@pytest.mark.parametrize(
    "text", ["run_cpu(job);", "run_cuda(job, 0, stream);", "py::gil_scoped_release released;"]
)
def test_a_binding_that_runs_its_jobs_in_another_way_is_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "csrc/snow").mkdir(parents=True)
    path = tmp_path / "csrc/snow/bind.cpp"
    path.write_text(f"// not run_cpu(job)\n{text}\n", encoding="utf-8")
    assert len(jobs_run_elsewhere(tmp_path)) == 1
