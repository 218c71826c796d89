"""The compiled module and the package around it: what they link, load, print and expose."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusereg
from fusereg.core import aliases

_C = fusereg._C
PACKAGE = Path(inspect.getfile(fusereg)).parent
MODULE = Path(inspect.getfile(_C))
ISAS = ("baseline", "avx2", "avx512")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")


def run_python(
    code: str, *options: str, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter with this one's packages and environment, and `env`."""
    inherited = {k: v for k, v in os.environ.items() if k != "FUSEREG_CPU_ISA"}
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


# --- what it links --------------------------------------------------------------------------------


class Elf:
    """The dynamic section of a 64-bit ELF file: enough to know what the loader will look for."""

    _PT_LOAD, _PT_DYNAMIC = 1, 2
    _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data[5] == 1 else ">"
        (table,) = self._unpack("Q", 0x20)
        size, count = self._unpack("HH", 0x36)
        self._loads: list[tuple[int, int, int]] = []  # address, offset, size in the file
        dynamic = None
        for i in range(count):
            at = table + i * size
            (kind,) = self._unpack("I", at)
            offset, address, _, in_file = self._unpack("4Q", at + 8)
            if kind == self._PT_LOAD:
                self._loads.append((address, offset, in_file))
            elif kind == self._PT_DYNAMIC:
                dynamic = (offset, in_file)
        assert dynamic is not None, "no dynamic section"
        start, length = dynamic
        self._entries = [self._unpack("qQ", start + at) for at in range(0, length, 16)]

    def _unpack(self, layout: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(self._order + layout, self._data, offset)

    def _strings(self, *tags: int) -> list[str]:
        (address,) = (value for tag, value in self._entries if tag == self._DT_STRTAB)
        (strings,) = (o + address - a for a, o, n in self._loads if a <= address < a + n)
        found = []
        for tag, value in self._entries:
            if tag in tags:
                end = self._data.index(b"\0", strings + value)
                found.append(self._data[strings + value : end].decode())
        return found

    def needed(self) -> list[str]:
        return self._strings(self._DT_NEEDED)

    def search_paths(self) -> list[str]:
        return self._strings(self._DT_RPATH, self._DT_RUNPATH)


def read_elf(path: Path) -> Elf:
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        pytest.skip(f"{path.name} is not a 64-bit ELF file")
    return Elf(data)


def needs_framework(library: str) -> bool:
    names = "torch|c10|aten|shm|cuda|cudart|cudnn|cublas|cufft|curand|cusolver|cusparse|nv"
    return re.match(rf"lib({names})", library) is not None


def test_module_links_neither_torch_nor_cuda() -> None:
    needed = read_elf(MODULE).needed()
    assert any(name.startswith("libc.") for name in needed), f"read wrong: {needed}"
    assert [name for name in needed if needs_framework(name)] == []


def test_the_linking_check_would_see_torch() -> None:
    """The same reader, on a library that does link torch's: torch's own Python module."""
    needed = read_elf(Path(inspect.getfile(torch._C))).needed()
    assert [name for name in needed if needs_framework(name)] != []


def test_module_has_no_library_path_of_the_machine_that_built_it() -> None:
    assert [path for path in read_elf(MODULE).search_paths() if path.startswith("/")] == []


# --- what import does -----------------------------------------------------------------------------


#: All that is asked of a new interpreter in one, for it takes seconds to start: what the import
#: does, the first calls under values of FUSEREG_CPU_ISA, each in a copy of the process in which
#: nothing was called, and numbers of threads.
_FRESH = """
    import json, os, sys, tempfile, warnings
    import torch
    torch_needs = set(sys.modules)
    with tempfile.TemporaryFile() as said, warnings.catch_warnings():
        warnings.simplefilter("error")
        before = os.dup(1), os.dup(2)
        os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
        try:
            import fusereg
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os.dup2(before[0], 1), os.dup2(before[1], 2)
        said.seek(0)
        printed = said.read().decode()
    everything = sorted(sys.modules)

    def first_calls():
        weights = torch.arange(-50.0, 51.0)
        others = weights.clone()
        calls = (
            fusereg._C.cpu_isa,
            lambda: fusereg.prox.l1_(weights, 1.0),
            lambda: float(fusereg.functional.elastic_net_penalty(others, 0.5, 2.0)),
            fusereg._C.cpu_isa,
        )
        for call in calls:
            try:
                yield call()
            except (ValueError, RuntimeError) as error:
                yield f"{type(error).__name__}: {error}"
        yield weights[0].item()

    def by_isa(isa):
        get, put = os.pipe()
        child = os.fork()
        if child == 0:
            if isa is not None:
                os.environ["FUSEREG_CPU_ISA"] = isa
            os.write(put, json.dumps([x for x in first_calls() if x is not None]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(os.read(get, 1 << 14))

    found = [by_isa(isa) for isa in VALUES]
    rows = []
    if os.path.isdir("/proc/self/task"):
        weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
        wide = weights.view(4, -1)
        alone = len(os.listdir("/proc/self/task"))
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            one = fusereg.functional.elastic_net_penalty(weights, 0.3, 0.7)
            two = fusereg.functional.group_lasso_penalty(wide, 0.3)
            started = len(os.listdir("/proc/self/task")) - alone
            rows.append((threads, started, one.item().hex(), two.item().hex()))
    added = [name for name in everything if name not in torch_needs]
    print(json.dumps({"printed": printed, "everything": everything, "added": added,
                      "found": found, "rows": rows}))
"""
_UNKNOWN = ("sse9", "AVX2", "avx2 ")
_VALUES = (None, "", *_C.cpu_isas(), *_UNKNOWN)


@functools.cache
def fresh() -> dict[str, Any]:
    """Return what a new interpreter tells of itself, once."""
    told: dict[str, Any] = json.loads(run_python(_FRESH.replace("VALUES", repr(_VALUES))).stdout)
    told["found"] = dict(zip(_VALUES, told["found"], strict=True))
    return told


def test_import_prints_nothing_and_warns_of_nothing() -> None:
    assert fresh()["printed"] == ""


def test_import_leaves_optional_packages_alone() -> None:
    added, everything = set(fresh()["added"]), set(fresh()["everything"])
    assert "fusereg.functional" in added
    assert everything.isdisjoint({"matplotlib", "rich", "typer", "mlxtend", "pandas", "hypothesis"})
    assert added.isdisjoint({"torch.distributed.tensor", "torch._inductor", "torch._dynamo"})


@pytest.mark.slow
def test_import_and_kernels_work_where_no_cuda_device_is_visible() -> None:
    code = """
        import torch, fusereg
        print(float(fusereg.functional.l1_penalty(torch.tensor([1.0, -2.0]), 0.5)))
        print(fusereg._C.cuda_device_info(), bool(fusereg._C.cuda_error()))
    """
    assert run_python(code, CUDA_VISIBLE_DEVICES="").stdout.split("\n")[:2] == ["1.5", "[] True"]


@pytest.mark.slow
@on_linux
def test_import_does_not_look_for_a_cuda_driver(tmp_path: Path) -> None:
    """The static CUDA runtime opens libcuda at the first CUDA call; the loader's log shows none."""
    code = """
        import os, sys
        import torch
        log = os.environ["LD_DEBUG_OUTPUT"] + "." + str(os.getpid())
        def searches():
            with open(log) as f:
                return f.read().count("find library=libcuda.so")
        before = searches()
        import fusereg
        after_import = searches()
        fusereg._C.cuda_device_info()
        print(before, after_import, searches())
    """
    log = str(tmp_path / "loader")
    done = run_python(code, LD_DEBUG="libs", LD_DEBUG_OUTPUT=log, check=False)
    if not list(tmp_path.iterdir()):
        pytest.skip("this system's loader writes no log (LD_DEBUG)")
    assert done.returncode == 0, done.stderr
    before, after_import, after_call = map(int, done.stdout.split())
    assert after_import == before
    if _C.build_info()["cuda"] is not None and before == 0:
        assert after_call > 0, "the log does not show what it should; this test proves nothing"


def fake_torch(folder: Path, text: str) -> str:
    """A package named torch that comes before the real one."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("version", ["2.9.0", "1.13.1+cu117"])
def test_an_older_torch_is_refused_by_an_error_that_says_which_is_needed(
    version: str, tmp_path: Path
) -> None:
    path = fake_torch(tmp_path, f'__version__ = "{version}"\n\nclass Tensor:\n    pass\n')
    done = run_python("import fusereg", PYTHONPATH=path, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "torch >= 2.10" in last
    assert f"torch {version}" in last
    assert "pip install" in last


#: Puts an exchange table of a later major version in front of torch's own (dlpack.h,
#: DLPackExchangeAPIHeader: a version and a pointer to the previous table).
_FORGED_TABLE = """
    import ctypes, torch

    class Header(ctypes.Structure):
        _fields_ = [
            ("major", ctypes.c_uint32),
            ("minor", ctypes.c_uint32),
            ("previous", ctypes.c_void_p),
        ]

    name = b"dlpack_exchange_api"
    pointer, text, capsule = ctypes.c_void_p, ctypes.c_char_p, ctypes.py_object
    new, get = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetPointer
    new.restype, new.argtypes = capsule, [pointer, text, pointer]
    get.restype, get.argtypes = pointer, [capsule, text]
    own = get(torch.Tensor.__dlpack_c_exchange_api__, name)
    header = Header(Header.from_address(own).major + 1, 0, own if KEEP else None)
    torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(header), name, None)
    import fusereg
    print(float(fusereg.functional.l1_penalty(torch.tensor([1.0, -2.0]), 0.5)))
"""


@pytest.mark.slow
def test_a_newer_exchange_table_in_front_of_the_known_one_is_walked_past() -> None:
    assert run_python(_FORGED_TABLE.replace("KEEP", "True")).stdout.strip() == "1.5"


@pytest.mark.slow
def test_a_torch_with_only_a_newer_exchange_table_is_refused_with_the_remedy() -> None:
    done = run_python(_FORGED_TABLE.replace("KEEP", "False"), check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fusereg")
    assert "a newer fusereg is needed" in last


def test_the_module_without_the_package_says_that_it_needs_it() -> None:
    code = f"""
        from importlib import util
        spec = util.spec_from_file_location({MODULE.name.split(".")[0]!r}, {str(MODULE)!r})
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.inspect(1)
        except RuntimeError as error:
            print(error)
    """
    assert "through the package fusereg" in run_python(code).stdout


# --- OpenMP ---------------------------------------------------------------------------------------

needs_openmp = pytest.mark.skipif(not _C.build_info()["openmp"], reason="built without OpenMP")


@pytest.mark.slow
@on_linux
@needs_openmp
@pytest.mark.parametrize("packages", ["torch, fusereg", "fusereg, torch"])
def test_the_one_openmp_runtime_is_the_one_that_torch_loads(packages: str) -> None:
    code = """
        import os
        import PACKAGES
        big = torch.ones(1 << 20)
        big.exp()
        if "fusereg" in "PACKAGES":
            fusereg.functional.l1_penalty(big, 1.0)
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "/" in line}
        names = "libgomp", "libomp", "libiomp"
        print(*(f for f in files if os.path.basename(f).startswith(names)))
    """
    alone = run_python(code.replace("PACKAGES", "torch")).stdout.split()
    assert len(alone) == 1
    assert run_python(code.replace("PACKAGES", packages)).stdout.split() == alone


@on_linux
@needs_openmp
def test_set_num_threads_is_honored_and_does_not_change_a_bit() -> None:
    """OpenMP keeps a team's threads for the next one, so each larger team shows as new threads."""
    rows = fresh()["rows"]
    assert [(n, started) for n, started, *_ in rows] == [(1, 0), (2, 1), (8, 7)]
    assert len({tuple(bits) for _, _, *bits in rows}) == 1


# --- instruction sets -----------------------------------------------------------------------------


@pytest.fixture
def keeps_isa() -> Iterator[None]:
    before = _C.cpu_isa()
    yield
    _C.set_cpu_isa(before)


def test_the_best_available_isa_is_chosen_by_default() -> None:
    available = _C.cpu_isas()
    assert available[0] == "baseline"
    assert available == [isa for isa in ISAS if isa in available], "slowest first"
    for value in (None, ""):
        assert fresh()["found"][value][0] == available[-1]


def test_available_isas_were_compiled() -> None:
    assert set(_C.cpu_isas()) <= set(_C.build_info()["isas"])


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_the_environment_chooses_each_available_isa_and_it_computes(isa: str) -> None:
    # 0.5 * 2 * (1 + ... + 50) + 2 * (1 + 4 + ... + 2500), and -50 by one nearer to zero
    assert fresh()["found"][isa] == [isa, 0.5 * 2550 + 2.0 * 42925, isa, -49.0]


@pytest.mark.parametrize("name", _UNKNOWN)
def test_an_unknown_isa_in_the_environment_is_an_error_that_names_those_available(
    name: str,
) -> None:
    available = ", ".join(_C.cpu_isas())
    *errors, weight = fresh()["found"][name]
    assert {error.partition(": ")[0] for error in errors} <= {"ValueError", "RuntimeError"}
    assert [error.partition(": ")[2] for error in errors] == [
        f"FUSEREG_CPU_ISA: unknown instruction set '{name}'; available: {available}"
    ] * 4
    assert weight == -50.0


def test_an_isa_that_is_not_built_or_cannot_run_here_is_an_error_that_says_which() -> None:
    missing = [isa for isa in ISAS if isa not in _C.cpu_isas()]
    if not missing:
        pytest.skip("this build has every instruction set, and this machine runs them")
    for isa in missing:
        reason = f"this machine cannot run '{isa}'"
        if isa not in _C.build_info()["isas"]:
            reason = rf"this build has no kernels for '{isa}' \(build with FUSEREG_ISAS=all\)"
        with pytest.raises(ValueError, match=f"{reason}; available: baseline"):
            _C.set_cpu_isa(isa)


@pytest.mark.usefixtures("keeps_isa")
def test_set_cpu_isa_switches_to_each_available() -> None:
    for isa in _C.cpu_isas():
        _C.set_cpu_isa(isa)
        assert _C.cpu_isa() == isa


@pytest.mark.usefixtures("keeps_isa")
def test_set_cpu_isa_refuses_an_unknown_name_and_keeps_the_choice() -> None:
    _C.set_cpu_isa("baseline")
    with pytest.raises(ValueError, match=r"unknown instruction set 'best'; available: baseline"):
        _C.set_cpu_isa("best")
    with pytest.raises(TypeError):
        _C.set_cpu_isa(2)  # type: ignore[arg-type]
    assert _C.cpu_isa() == "baseline"


# --- what it tells of itself ----------------------------------------------------------------------


def test_build_info_has_the_keys_that_reports_read() -> None:
    info = _C.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "pybind11",
        "dlpack",
        "isas",
        "openmp",
        "cuda",
        "cuda_architectures",
    }
    assert info["version"] == fusereg.__version__
    assert re.fullmatch(r"\S+ \d+(\.\d+)+.*", info["compiler"])
    assert int(info["pybind11"].split(".")[0]) >= 3
    assert re.fullmatch(r"1\.\d+", info["dlpack"])
    assert info["isas"][0] == "baseline"
    assert isinstance(info["openmp"], bool)
    if info["cuda"] is None:
        assert info["cuda_architectures"] == ""
    else:
        assert re.match(r"\d+\.\d+", info["cuda"])
        assert info["cuda_architectures"] != ""


def test_device_info_lists_the_devices_or_says_why_there_are_none() -> None:
    devices = _C.cuda_device_info()
    assert isinstance(devices, list)
    for index, device in enumerate(devices):
        assert device["index"] == index
        assert device["sm_count"] > 0
        assert device["memory_bytes"] > 0
        assert re.fullmatch(r"\d+\.\d+", device["capability"])
        assert device["name"]
        assert {"driver", "runtime"} <= set(device)
    assert bool(_C.cuda_error()) == (not devices)


# --- the type stub --------------------------------------------------------------------------------


def stub_members() -> dict[str, ast.stmt]:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    members: dict[str, ast.stmt] = {}
    for node in stub.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            members[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members[node.target.id] = node
    return members


def test_the_stub_names_every_member_of_the_module_and_no_other() -> None:
    assert set(stub_members()) == {n for n in dir(_C) if not n.startswith("__")}


def test_the_stub_has_the_modules_argument_names_in_their_order() -> None:
    compared = 0
    for name, node in stub_members().items():
        if not isinstance(node, ast.FunctionDef):
            assert callable(getattr(_C, name)) == isinstance(node, ast.ClassDef), name
            continue
        signature = re.match(rf"{name}\((.*)\) -> ", getattr(_C, name).__doc__)
        assert signature is not None, f"{name} is overloaded or has no signature"
        given = re.findall(r"(\w+): ", signature[1])
        assert [a.arg for a in node.args.args] == given, name
        compared += len(given)
    assert compared > 20


# --- what is public -------------------------------------------------------------------------------


def public_modules() -> list[str]:
    """Fusereg and its modules whose names have no underscore and that say what they export."""
    names = ["fusereg"]
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not any(part.startswith("_") for part in parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in assigned):
                names.append(".".join(("fusereg", *parts)))
    return names


def import_public(name: str) -> ModuleType:
    if name.startswith("fusereg.integrations."):
        importlib.import_module("other_libraries")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fusereg"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is optional")


def own_functions(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and property getters that the class itself defines."""
    for name, member in vars(cls).items():
        if name.startswith("_") or name in getattr(cls, "__dataclass_fields__", ()):
            continue
        if isinstance(member, property):
            yield name, member.fget
        elif isinstance(member, (staticmethod, classmethod)):
            yield name, member.__func__
        elif inspect.isfunction(member):
            yield name, member


def unannotated(function: Any) -> list[str]:
    signature = inspect.signature(function)
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is p.empty and p.name not in ("self", "cls")
    ]
    return missing + ["return"] * (signature.return_annotation is signature.empty)


def gaps(name: str, member: Any) -> list[str]:
    """What an exported member lacks: a docstring of its own, annotations."""
    if inspect.isfunction(member):
        found = [] if (member.__doc__ or "").strip() else [f"{name}: no docstring"]
        return found + [f"{name}: {p} is not annotated" for p in unannotated(member)]
    if inspect.isclass(member):
        own = vars(member).get("__doc__") or ""
        # dataclass() writes a signature there where the author wrote nothing.
        written = own.strip() and not own.startswith(f"{member.__name__}(")
        found = [] if written else [f"{name}: no docstring"]
        if "__init__" in vars(member) and not dataclasses.is_dataclass(member):
            lacking = [p for p in unannotated(member.__init__) if p != "return"]
            found += [f"{name}.__init__: {p} is not annotated" for p in lacking]
        for method, function in own_functions(member):
            found += gaps(f"{name}.{method}", function)
        return found
    if inspect.ismodule(member):
        return [] if (member.__doc__ or "").strip() else [f"{name}: no docstring"]
    return []


@pytest.mark.parametrize("name", public_modules())
def test_every_exported_name_exists_with_docstring_and_annotations(name: str) -> None:
    module = import_public(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [n for n in module.__all__ if not hasattr(module, n)]
    assert missing == []
    assert [g for n in module.__all__ for g in gaps(f"{name}.{n}", getattr(module, n))] == []


def test_the_public_modules_are_found() -> None:
    assert {"fusereg", "fusereg.functional", "fusereg.penalty", "fusereg.penalty.prox"} <= set(
        public_modules()
    )


def test_the_docstring_check_sees_what_is_missing() -> None:
    def bare(x, *, y: int):  # type: ignore[no-untyped-def]
        return x

    @dataclasses.dataclass
    class Silent:
        x: int

        def method(self) -> None:
            pass

    assert gaps("bare", bare) == [
        "bare: no docstring",
        "bare: x is not annotated",
        "bare: return is not annotated",
    ]
    assert gaps("Silent", Silent) == ["Silent: no docstring", "Silent.method: no docstring"]


def test_the_package_declares_its_types() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


# --- module paths of before -----------------------------------------------------------------------


@pytest.mark.parametrize("old", aliases.MOVED)
def test_an_old_module_path_imports_what_is_there_now(old: str) -> None:
    now = importlib.import_module(f"fusereg.{aliases.MOVED[old]}")
    assert importlib.import_module(f"fusereg.{old}") is now


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("nn.dropout", "Dropout"),
        ("nn.consistent_dropout", "ConsistentDropout"),
        ("nn.batch_norm", "BatchNorm2d"),
        ("nn.sync_batch_norm", "SyncBatchNorm"),
        ("penalty", "WeightPenalty"),
        ("_penalty_hook", "AttachedPenalty"),
    ],
)
def test_a_class_that_a_pickle_names_by_its_old_path_is_found(module: str, name: str) -> None:
    found = pickle.loads(f"cfusereg.{module}\n{name}\n.".encode())
    assert found is getattr(fusereg if hasattr(fusereg, name) else fusereg.nn, name)
