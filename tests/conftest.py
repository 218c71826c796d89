"""Backends, devices and tolerances that all tests share.

A test that takes the fixture ``backend`` runs once for each of them: every CPU instruction set that
this machine has, and a CUDA device if there is one. With FUSEREG_TEST_HOST_MODULE naming the module
that tests/cuda_on_host builds (its run.sh sets it), the same tests run the CUDA kernels on the host
instead, and those that do not take ``backend`` are left out, for they have run already. With
FUSEREG_TEST_STANDIN_MODULE (run.sh of tests/standin_device sets it) they run on a CUDA device that
is not there, and so do those that want a GPU and those of test_standin_*.py.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before libgomp is loaded: threads that spin while they wait double the suite's time on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# An error that users see as a module left alone ends a test.
os.environ.setdefault("FUSEREG_RAISE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# What is imported and collected stays; looking through it again and again is a third of that time.
gc.disable()

HOST_MODULE = os.environ.get("FUSEREG_TEST_HOST_MODULE", "")
STANDIN_MODULE = os.environ.get("FUSEREG_TEST_STANDIN_MODULE", "")

if STANDIN_MODULE:
    from standin_device import device

    device.install()

if _path := HOST_MODULE or STANDIN_MODULE:
    # Takes the place of the compiled module before the package is imported.
    _name = "_C_cuda_on_host" if HOST_MODULE else "_C_standin"
    _spec = importlib.util.spec_from_file_location(_name, _path)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules["fusereg._C"] = _module

import fusereg  # noqa: E402
import sample_of_cases  # noqa: E402
from fusereg.core.inventory import TOLERANCES  # noqa: E402

for _profile, _examples in (
    ("sample", 10 if HOST_MODULE or STANDIN_MODULE else 20),
    ("all cases", 60),
):
    settings.register_profile(
        _profile,
        deadline=None,
        derandomize=True,
        max_examples=_examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )

DTYPES = list(TOLERANCES)
_STANDIN_TESTS = "test_standin_"
SEED = 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Backend:
    name: str
    device: torch.device
    isa: str | None = None

    @property
    def on_host(self) -> bool:
        """Whether CUDA kernels run here as host code: right, but a thousand times slower."""
        return self.name == "cuda_on_host" or (bool(STANDIN_MODULE) and self.name == "cuda")


def make(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> torch.Tensor:
    """Return random numbers, the same for each dtype but for rounding."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(backend.device)


def make_nonzero(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> torch.Tensor:
    """Return random numbers without zeros, so that a mask can be read off the result."""
    x = torch.randn(shape, dtype=torch.float64)
    return (x + x.sign()).to(dtype).to(backend.device)


def _backends() -> list[Backend]:
    cpu = torch.device("cpu")
    if HOST_MODULE:
        return [Backend("cuda_on_host", cpu)]
    if STANDIN_MODULE:
        return [Backend("cuda", torch.device("cuda"))]
    found = [Backend(f"cpu_{isa}", cpu, isa) for isa in fusereg._C.cpu_isas()]
    if has_gpu():
        found.append(Backend("cuda", torch.device("cuda")))
    return found


def has_gpu() -> bool:
    return torch.cuda.is_available() and fusereg._C.build_info()["cuda"] is not None


@pytest.fixture(params=_backends(), ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen: Backend = request.param
    if chosen.isa is None:
        yield chosen
        return
    before = fusereg._C.cpu_isa()
    fusereg._C.set_cpu_isa(chosen.isa)
    yield chosen
    fusereg._C.set_cpu_isa(before)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusereg")
    group.addoption("--all-cases", action="store_true", help="run all cases, not a sample of them")
    group.addoption(
        "--only-backend",
        metavar="NAME",
        help="only the cases of this backend (cpu_baseline, cuda, ...); of cuda also what is "
        "marked gpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("all cases" if config.getoption("all_cases") else "sample")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by their name: the default is their address, which differs between processes."""
    return getattr(val, "__name__", None) if callable(val) else None


def _refuse_names_of_sets(item: pytest.Item) -> None:
    """The order of a set's elements differs between processes, and so would the tests' names."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for value in params.values():
        if isinstance(value, (set, frozenset)) and str(value) in item.name:
            raise pytest.UsageError(f"{item.nodeid} is named by a set: give its parameter an id")


def _is_of_backend(item: pytest.Item, name: str) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = any(isinstance(value, Backend) and value.name == name for value in params.values())
    return chosen or (name == "cuda" and item.get_closest_marker("gpu") is not None)


@pytest.hookimpl(trylast=True)  # after -k and -m: a sample of what they select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device, or a build without CUDA kernels")
    only = config.getoption("only_backend")
    left_out: set[pytest.Item] = set()
    for item in items:
        _refuse_names_of_sets(item)
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(no_gpu)
        takes_backend = "backend" in getattr(item, "fixturenames", ())
        wants_device = item.get_closest_marker("gpu") or item.path.name.startswith(_STANDIN_TESTS)
        if (HOST_MODULE and not takes_backend) or (
            STANDIN_MODULE and not (takes_backend or wants_device)
        ):
            left_out.add(item)
        if only and not _is_of_backend(item, only):
            left_out.add(item)
    named = any("::" in argument for argument in config.args)
    if not named and not config.getoption("all_cases"):
        rest = [item for item in items if item not in left_out]
        left_out |= sample_of_cases.left_out(rest, on_host=bool(HOST_MODULE))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections; the compiler collects at each reset."""
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not import what has no test to run here: imports are slow beside the sanitizers."""
    if collection_path.name.startswith(_STANDIN_TESTS):
        return not STANDIN_MODULE or None
    if (HOST_MODULE or STANDIN_MODULE) and collection_path.suffix == ".py":
        text = collection_path.read_text()
        return not ("Backend" in text or (STANDIN_MODULE and "mark.gpu" in text)) or None
    return None
