"""What the documents say is so: examples run, tables are made from results, links lead somewhere.

Each Python example runs by itself, as if pasted into a new session in an empty folder; those for
several processes run under torchrun. Notebooks run as the scripts they are written as.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fusereg
from fusereg.core import pictures
from ops import FUNCTIONS, by_name
from pages import DOCS, FENCE, NEEDS, PAGES, RANKS, ROOT, examples, lacking, paste

NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no documents beside these tests")


def script(name: str) -> types.ModuleType:
    """A module of docs/scripts/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- examples -------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own, with a compiler that starts at once, and loggers as they were."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    root = logging.getLogger()
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    isa = fusereg.cpu.instruction_set()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)
    fusereg.cpu.set_instruction_set(isa)


WITH_EXAMPLES = [page for page in PAGES if page.is_file() and examples(page)]


def of_all_pages(ranks: bool) -> list[Any]:
    return [
        pytest.param(page, line, code, before, id=f"{page.name}:{line}")
        for page in WITH_EXAMPLES
        for line, code, before in examples(page)
        if (before.strip() == RANKS) is ranks
    ]


@pytest.mark.parametrize(("page", "line", "code", "before"), of_all_pages(ranks=False))
def test_each_example_runs_by_itself(
    page: Path, line: int, code: str, before: str, quiet: None
) -> None:
    if NEEDS.fullmatch(before.strip()):
        importlib.import_module("other_libraries")  # some want it before their first import
    if missing := lacking(before):
        pytest.skip(f"needs {', '.join(missing)}")
    paste(page, line, code)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line", "code", "before"), of_all_pages(ranks=True))
def test_each_example_for_several_processes_runs_by_itself(
    page: Path, line: int, code: str, before: str, tmp_path: Path
) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no torch.distributed with gloo")
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--nproc-per-node", "2", "page.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run()
    # On an overloaded machine torch's own threads have been seen to abort a rank that had come to
    # its end (a std::thread; fusereg has none). That, and nothing else, is tried once more.
    if done.returncode != 0 and "terminate called without an active exception" in done.stderr:
        done = run()
    assert done.returncode == 0, done.stdout + done.stderr


def test_examples_are_found_with_what_stands_before_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 1\n```\n\n```bash\nls\n```\n\n"
        "<!-- needs: lightning -->\n```python\ny = 2\n```\n",
        encoding="utf-8",
    )
    assert examples(page) == [(3, "x = 1\n", "# A"), (12, "y = 2\n", "<!-- needs: lightning -->")]
    assert lacking("<!-- needs: no_such_package, sys -->") == ["no_such_package"]
    assert lacking("text") == []


# --- notebooks ------------------------------------------------------------------------------------


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@pytest.mark.all_cases
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(notebook: Path, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    if notebook.stem == "compact":
        pytest.importorskip("torch_pruning")
    if notebook.stem == "augment":
        pytest.importorskip("PIL")
    plt.switch_backend("agg")
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())))
    code = "\n".join("".join(cell["source"]) for cell in cells(notebook, "code"))
    exec(compile(code, str(notebook), "exec"), {"__name__": "__main__"})
    plt.close("all")
    stored = [o for cell in cells(notebook, "code") for o in cell["outputs"]]
    pictures = [o for o in stored if "image/png" in o.get("data", {})]
    assert len(pictures) == len(shown) > 0, "run: python docs/scripts/notebooks.py"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_as_they_ran(notebook: Path) -> None:
    """From the first cell to the last, without an error or a warning, and small."""
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} <= {None, "stdout"}
    assert "error" not in {output["output_type"] for output in outputs}
    assert notebook.stat().st_size < 600_000


# --- versions -------------------------------------------------------------------------------------


def test_the_page_of_compatibility_has_the_versions_of_the_build_files() -> None:
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    (torch_version,) = re.findall(
        r"^torch==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M
    )
    (standin,) = re.findall(
        r"^STANDIN_TORCH \?= (\S+)", (ROOT / "Makefile").read_text("utf-8"), re.M
    )
    assert f"{torch_version}, the CPU build, on each change" in page
    assert f"{standin}, a CUDA build, on a stand-in device" in page
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={page.split("| torch | ")[1].split()[0]}"' in project
    rows = re.findall(r"^\| ([\w, -]+) \| ([\d., with]+) \| .* \| `make", page, re.M)
    pairs = [
        pair
        for names, versions in rows
        for pair in zip(
            re.split(r", | with ", names), re.split(r", | with ", versions), strict=True
        )
    ]
    assert len(pairs) >= 11
    for name, version in pairs:
        asked = {"ignite": "pytorch-ignite"}.get(name.lower(), name.lower())
        assert re.search(rf'"{asked}>={re.escape(version)}[",]', project), (name, version)


# --- tables ---------------------------------------------------------------------------------------


def test_measured_tables_are_those_of_the_results() -> None:
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("no measured results beside these tests")
    stale = script("tables").out_of_date()
    assert not stale, f"run: make docs ({', '.join(p.name for p in stale)})"


def test_tables_of_arguments_are_those_of_signatures_and_docstrings() -> None:
    arguments = script("arguments")
    stale = arguments.out_of_date()
    assert not stale, f"run: python docs/scripts/arguments.py ({', '.join(p.name for p in stale)})"
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {name for _, name, _ in arguments.PLACE.findall(text)}
    assert named == {"fusereg.augment.Augment", "fusereg.WeightPenalty", "fusereg.EarlyStopping"}
    made = arguments.renewed("<!-- arguments: fusereg.WeightPenalty -->\n<!-- end arguments -->")
    assert "| `l1`, `l2`, `group` | `0.0` | strengths >= 0" in made
    assert arguments.renewed(made.replace("strengths >= 0", "weights")) == made


def test_a_measured_table_that_was_changed_by_hand_is_found_out() -> None:
    tables = script("tables")
    rows = tables.load()
    text = "<!-- measured: suite=dropout op=dropout dtype=float32 -->\n<!-- end measured -->\n"
    made = tables.renewed(text, rows)
    assert "| 4M | float32 | forward |" in made
    assert tables.renewed(made, rows) == made
    assert tables.renewed(made.replace("| 4M |", "| 5M |"), rows) == made
    with pytest.raises(ValueError, match="no measured row fits"):
        tables.table("suite=dropout op=nothing", rows)
    assert "`fusereg bench snow` measures it" in tables.table("suite=snow", rows)
    with pytest.raises(ValueError, match="unknown option color"):
        tables.table("suite=dropout color=red", rows)


def test_each_stored_run_has_its_column_and_losses_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = script("tables")

    def stored(path: Path, date: str, ratios: dict[str, float]) -> None:
        common = {"op": "training", "mode": "step", "dtype": "float32"}
        rows = [
            {**common, "suite": "steps", "shape": s, "provider": p, "vs_eager": r}
            for s, ratio in ratios.items()
            for p, r in (("eager", 1.0), ("fusereg", ratio))
        ]
        machine = {"date": date}
        document = {"tool": "fusereg bench", "rows": rows, "machine": machine, "interrupted": False}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))

    stored(tmp_path / "b.json", "2026-01-01T10:00:00+00:00", {"mlp": 1.5, "unet": 0.9})
    stored(tmp_path / "again" / "a.json", "2026-01-02T11:30:00+00:00", {"unet": 1.25})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "AGAIN", tmp_path / "again")
    head, _, *lines = tables.table("suite=steps view=runs", []).strip().splitlines()
    assert head == "| size | data type | what | 2026-01-01 10:00 | 2026-01-02 11:30 |"
    assert lines == [
        "| mlp | float32 | step | 1.50x | – |",
        "| unet | float32 | step | **0.90x, slower** | 1.25x |",
    ]


def test_whole_training_has_memory_and_accuracy_of_both() -> None:
    tables = script("tables")
    machine = {
        "cpu": "C", "threads": 1, "isa": "avx2", "torch": "2.13.0", "date": "2026-01-01",
        "others_cpu_share": 0.5,
    }  # fmt: skip
    same = {
        "suite": "end_to_end", "op": "training", "mode": "step", "shape": "vit 32x28x28",
        "dtype": "float32", "device": "cpu", "host": False, "failed": "", "machine": machine,
        "interrupted": False,
    }  # fmt: skip
    rows = [
        {**same, "provider": "eager", "p50_us": 5e4, "vs_eager": 1.0, "peak_bytes": 18_500_000,
         "test_accuracy": 0.961},
        {**same, "provider": "torch.compile", "p50_us": 4e4, "vs_eager": 1.25},
        {**same, "provider": "fusereg", "p50_us": 1e5, "vs_eager": 0.5, "peak_bytes": 14_600_000,
         "test_accuracy": 0.972},
    ]  # fmt: skip
    made = tables.table("suite=end_to_end view=training", rows)
    head, _, line, _, origin = made.strip().splitlines()
    assert head == (
        "| network, batch | data type | eager | torch.compile | fusereg | vs eager "
        "| memory, eager | memory, fusereg | accuracy, eager | accuracy, fusereg |"
    )
    assert line == (
        "| vit 32x28x28 | float32 | 50.0 ms | 40.0 ms | 100 ms | **0.50x, slower** "
        "| 18.5 MB | 14.6 MB | 96.1 % | 97.2 % |"
    )
    assert "other programs took up to 50%" in origin


def test_a_measured_share_stands_beside_the_predicted_one() -> None:
    tables = script("tables")
    case = "dropout/dropout/forward/16m/float32"
    rows = json.loads((ROOT / "bench/gpu_cases.json").read_text(encoding="utf-8"))["rows"]
    (predicted,) = [r for r in rows if r["case"] == case]
    shares = f"| {case} | 95 % | {predicted['H100'][0]} % | {predicted['H200'][0]} % | memory |"
    assert f"{shares} – |" in tables.table("suite=all view=predicted", [])
    row = {
        "suite": "dropout", "op": "dropout", "mode": "forward", "shape": "16M", "dtype": "float32",
        "device": "cuda", "provider": "fusereg", "percent_of_copy": 86.4,
        "machine": {"gpu": {"name": "GPU 9000"}},
    }  # fmt: skip
    made = tables.table("suite=all view=predicted", [row])
    assert "| measured, GPU 9000 |" in made
    assert f"{shares} 86 % |" in made


def test_the_pages_name_the_architectures_that_are_built() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (built,) = re.findall(r"foreach\(arch ([\d ]+)\)", cmake)
    for page in ("README.md", "docs/index.md", "docs/cuda.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = set(re.findall(r"sm_(\d+)", text))
        assert named == set(built.split()), page


def test_losses_are_marked() -> None:
    tables = script("tables")
    assert tables.ratio_text(0.5) == "**0.50x, slower**"
    assert tables.ratio_text(1.0) == "1.00x"
    assert tables.ratio_text(38.6) == "39x"
    assert tables.ratio_text(None) == "–"


SUPPORT = script("support") if DOCS.is_dir() else None
NAMED = [
    (page, name)
    for page in PAGES
    if page.is_file() and SUPPORT is not None
    for name in SUPPORT.names(page.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    assert SUPPORT is not None
    with SUPPORT.process_group():
        yield


@pytest.mark.all_cases
@pytest.mark.parametrize(("page", "name"), NAMED, ids=lambda v: getattr(v, "name", v))
def test_what_the_support_tables_say(page: Path, name: str, group: None) -> None:
    assert SUPPORT is not None
    said: list[str] = []
    wanted = SUPPORT.row(name, SUPPORT.answers(name, said.append))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert wanted in lines, f"run: python docs/scripts/support.py ({said})"


def test_every_operation_that_can_be_tried_is_in_a_table() -> None:
    assert SUPPORT is not None
    named = [name for _, name in NAMED]
    assert len(named) == len(set(named))
    functions = {operation.name for operation in FUNCTIONS} - {"nn.BatchRenorm"}
    assert {name for name in functions if "," not in name} <= set(named) <= functions


def test_an_attempt_that_fails_says_no() -> None:
    assert SUPPORT is not None
    detached = replace(by_name("dropout"), function=lambda input, p, seed: input.detach() * p)
    with pytest.raises(RuntimeError):
        SUPPORT.double_backward(detached)


# --- pages ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as Markdown processors make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", t.lower()).strip()) for t in titles}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    if page in NOTEBOOKS:
        text = "\n".join("".join(cell["source"]) for cell in cells(page, "markdown"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_first_look_is_short() -> None:
    """README.md is read in a minute; what is more belongs to docs/."""
    assert (ROOT / "README.md").stat().st_size < 7_000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_extras_are_installed_from_a_clone(page: Path) -> None:
    """No package index has fusereg."""
    assert not re.search(r"pip install [\"']?fusereg", page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"(\S+\.md)$", text, flags=re.M))
    pages = {*DOCS.rglob("*.md"), *(path.with_suffix(".md") for path in NOTEBOOKS)}
    assert named == {page.relative_to(DOCS).as_posix() for page in pages}


def test_pictures_are_used_and_small() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    for path in sorted((DOCS / "images").glob("*.png")):
        assert f"images/{path.name}" in text, path.name
        assert path.stat().st_size < 250_000, path.name


@pytest.mark.parametrize("name", ["dropouts", "shards"])
def test_pictures_of_masks_show_those_of_this_version(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    monkeypatch.syspath_prepend(DOCS / "scripts")
    torch.manual_seed(0)
    figure = script("pictures").PICTURES[name]()
    drawn, stored = (
        imread(source)
        for source in (io.BytesIO(pictures.png(figure)), DOCS / "images" / f"{name}.png")
    )
    assert drawn.shape == stored.shape, "run: python docs/scripts/pictures.py"
    height, width, _ = drawn.shape
    for axes in figure.axes:
        box = axes.get_position()  # text, which depends on fonts, is around it
        inside = (
            slice(int((1 - box.y1) * height) + 2, int((1 - box.y0) * height) - 2),
            slice(int(box.x0 * width) + 2, int(box.x1 * width) - 2),
        )
        difference = abs(drawn[inside] - stored[inside]).mean()
        assert difference < 0.01, "run: python docs/scripts/pictures.py"


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    if not all(map(importlib.util.find_spec, ("material", "mkdocstrings", "latex2mathml"))):
        pytest.skip("mkdocs-material is not installed: pip install 'fusereg[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    # mkdocs-material advertises its successor on every build unless told not to.
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    fetched = re.compile(r"""(?:src|<link[^>]* href)=["']?(https?:)?//[^"'>\s]+""")
    for path in tmp_path.glob("*.html"):
        found = fetched.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name} wants the network: {found and found[0]}"


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{fusereg.__version__}]" in text
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {fusereg.__version__}" in cited
