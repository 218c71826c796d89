"""What mkdocs calls while it builds the site: formulas become MathML, notebooks become pages.

Formulas are LaTeX: in the pages as GitHub takes it (``$x$`` within a line, a block between lines
of ``$$``), in docstrings as torch writes it (``:math:`x```, ``.. math::``).
"""

import importlib
import inspect
import posixpath
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import griffe
import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import other_libraries  # noqa: F401  # Lightning imports a torchvision, which may not fit this torch

BLOCK = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.M | re.S)
INLINE = re.compile(r"(?<![\\$\w`])\$(?![\s$])([^$\n`]+?)(?<![\s\\])\$(?![\w$])")
NOTEBOOK = re.compile(r"(\]\([^)\s]*)\.ipynb\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)

# In a docstring: a block ends where its indentation does.
MATH = re.compile(r"^([ ]*)\.\. math::(.*(?:\n(?:\1[ ]+.*|[ ]*))*)", re.M)
ROLE = re.compile(r":math:`([^`]+)`")
SESSION = re.compile(r"^(?:>>>|\.\.\.).*\n(?:.+(?:\n|$))*", re.M)
NAME = re.compile(r":(?:class|func|meth|attr|mod):`(~?)([^`]+)`")


def formula(latex: str, *, block: bool) -> str:
    """Return MathML of ``latex``; several lines of a block are aligned at their ``&``."""
    latex = " ".join(latex.split()).replace("{aligned}", "{align*}")
    if block and (r"\\" in latex or "&" in latex) and r"\begin" not in latex:
        latex = rf"\begin{{align*}} {latex} \end{{align*}}"
    markup = convert(latex, display="block" if block else "inline")
    # Markdown takes a line that begins with <math> for a block of its own.
    return f'<div class="formula">{markup}</div>' if block else f"<span>{markup}</span>"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, with its outputs as they are stored."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        folder, name = posixpath.split(file.src_uri)
        stem = name.removesuffix(".ipynb")
        notebook = nbformat.reads(file.content_string, 4)
        body, made = MarkdownExporter().from_notebook_node(notebook, {"unique_key": stem})
        body = body.replace("![png](", "![Drawn by the code above](")
        body += f'\n<a href="{name}" download>Download this notebook</a>\n'
        for path, content in {f"{stem}.md": body, **made["outputs"]}.items():
            files.append(File.generated(config, posixpath.join(folder, path), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the formulas of a page, but for those in code, and links to notebooks."""
    markdown = NOTEBOOK.sub(r"\1.md)", markdown)
    markdown = BLOCK.sub(lambda m: formula(m[1], block=True), markdown)
    parts = CODE.split(markdown)
    parts[::2] = [INLINE.sub(lambda m: formula(m[1], block=False), part) for part in parts[::2]]
    return "".join(parts)


def at_run_time(path: str) -> Any:
    """Return what lies at ``path`` once the package is imported, or ``None`` if nothing does."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = inspect.getattr_static(found, name, None)
        return found
    return None


def as_markdown(docstring: str) -> str:
    """Return a docstring with formulas and references as mkdocs takes them."""
    text = MATH.sub(
        lambda m: f"{m[1]}\n{m[1]}{formula(textwrap.dedent(m[2]), block=True)}\n\n", docstring
    )
    text = ROLE.sub(lambda m: formula(m[1], block=False), text)

    def reference(match: re.Match[str]) -> str:
        short, name = match[1], match[2]
        shown = name.rsplit(".", 1)[-1] if short else name
        if not name.startswith("fusereg."):
            return f"`{shown}`"
        # The reference knows a function by its module, not by each name that it is exported as.
        found = at_run_time(name)
        if inspect.isclass(found) or inspect.isfunction(found):
            name = f"{found.__module__}.{found.__qualname__}"
        return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'

    text = NAME.sub(reference, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text).replace("Example::", "Example:")
    return SESSION.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n\n", text)


class Docstrings(griffe.Extension):
    """Docstrings as they are once the package is imported: some share parts filled in then."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of the package."""
        seen: set[int] = set()

        def walk(obj: Any) -> None:
            if obj.is_alias or id(obj) in seen:
                return
            seen.add(id(obj))
            if obj.is_function and any(p.name == "unknown" for p in obj.parameters):
                del obj.parameters["unknown"]  # names that are refused with a hint
            if obj.docstring:
                found = at_run_time(obj.path)
                text = inspect.getdoc(found) if found is not None else None
                obj.docstring.value = as_markdown(text or obj.docstring.value)
            for member in obj.members.values():
                walk(member)

        walk(pkg)
