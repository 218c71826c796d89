"""The language of docstrings and documents: plain American English, functions in the imperative."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("python", "csrc", "bench", "docs", "examples", "tests")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md", ".txt"}

#: American spelling: what begins like this is spelled the other way.
BRITISH = re.compile(
    r"\b(colour|neighbour|behaviour|honour|favour|artefact|centred|centres?\b|grey|licence|"
    r"normalis|initialis|optimis|regularis|synchronis|serialis|vectoris|analys(?:e|ing)\b|"
    r"modell(?:ed|ing)|labell(?:ed|ing)|cancell(?:ed|ing)|catalogue|programme\b)",
    re.IGNORECASE,
)
#: Words of this project's past for which the field has others.
PRIVATE = re.compile(
    r"for torch's sake|What it cannot\b|is no (?:tensor|number|integer|string)\b|without chance\b|"
    r"refused a prepared|_dropout_ops\b|are one in memory|named rightly|"
    r"nobody could tell|waits? for nobody|walked twice|there is to be one|nothing is to be done|"
    r"^#+ (?:When which|How to|Training on|Choosing one)$",
    re.MULTILINE,
)
#: What is not ours to spell: another library's argument names, and this list.
ALLOWED = {"tests/test_english.py"}


def texts() -> Iterator[tuple[str, str]]:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        yield path.name, path.read_text(encoding="utf-8")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if (
                path.suffix in SUFFIXES
                and name not in ALLOWED
                and "python/fusereg/bench" not in name
            ):
                yield name, path.read_text(encoding="utf-8")


def found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}"
        for name, text in texts()
        for m in pattern.finditer(text)
    ]


def test_spelling_is_american() -> None:
    assert found(BRITISH) == []


def test_words_are_those_of_the_field() -> None:
    assert found(PRIVATE) == []


@pytest.mark.parametrize("text", ["the colours", "Centre", "grey level", "a neighbouring pixel"])
def test_british_spelling_is_found(text: str) -> None:
    assert BRITISH.search(text)


# --- docstrings -----------------------------------------------------------------------------------

#: Words with which a sentence begins that is no request: what ruff's D401 does not know.
NOT_IMPERATIVE = re.compile(
    r"(?:The|An?|What|Whether|Where|Which|Who|How|Of|So|As|It|Its|This|Each|Every|All|One|Both|"
    r"True|False|None|While|With|Without|Under|If|For|In|On|At|By|To|From|\w+[^s]s|\W.*|[a-z].*)$"
)


def first_words(path: Path) -> Iterator[tuple[str, str]]:
    """Yield place and first word of the docstrings of functions; properties name what they are."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and not any("property" in ast.unparse(d) for d in node.decorator_list):
            yield (
                f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
                text.split()[0].strip(",:;"),
            )


def test_docstrings_of_functions_begin_with_a_verb_in_the_imperative() -> None:
    wrong = []
    for folder in ("python/fusereg", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "fusereg/bench" not in path.as_posix():
                wrong += [f"{p}: {w}" for p, w in first_words(path) if NOT_IMPERATIVE.match(w)]
    assert wrong == []


@pytest.mark.parametrize("word", ["The", "Of", "Whether", "Drops", "x", "[processes"])
def test_a_docstring_that_is_a_riddle_is_found(word: str) -> None:
    assert NOT_IMPERATIVE.match(word)


@pytest.mark.parametrize("word", ["Return", "Compress", "Pass", "Yield"])
def test_a_docstring_in_the_imperative_is_not(word: str) -> None:
    assert not NOT_IMPERATIVE.match(word)


def test_docstrings_of_modules_and_classes_name_what_they_are() -> None:
    """A noun phrase, not a question: what D401 does not look at."""
    wrong = []
    for folder in ("python/fusereg", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if re.match(r"(What|Whether|Which|How|Where|Who)\b", text):
                        wrong.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert wrong == []
