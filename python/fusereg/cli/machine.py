"""What this process runs on: versions, processor, OpenMP runtimes, CUDA. Read, never changed."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fusereg
from fusereg import _C

# The OpenMP runtimes of GCC, LLVM and Intel, with the hashes that wheels put into file names.
_OPENMP_LIBRARY = re.compile(r"/lib(?:gomp|omp|iomp5)(?:[-.][^/]*)?$")


@dataclass(frozen=True)
class Cpu:
    """The processor, and which of its instruction sets the kernels use."""

    model: str
    architecture: str
    logical_cores: int
    usable_cores: int
    torch_threads: int
    isa: str
    isas_available: list[str]
    isas_compiled: list[str]
    isa_override: str | None


@dataclass(frozen=True)
class Cuda:
    """The CUDA side of this build, of torch and of the machine."""

    built: bool
    toolkit: str | None
    architectures: str
    torch_cuda: str | None
    driver: str | None
    devices: list[dict[str, object]]
    error: str | None  # why there is no device, in CUDA's words


@dataclass(frozen=True)
class Machine:
    """Everything about the process that a reader of a result wants to know."""

    versions: dict[str, str]
    system: str
    cpu: Cpu
    cuda: Cuda
    openmp: list[str]
    warnings: list[str] = field(default_factory=list)


def parse_openmp_libraries(maps: str) -> list[str]:
    """The OpenMP runtimes among the files of a /proc/<pid>/maps text, each once."""
    found: list[str] = []
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and _OPENMP_LIBRARY.search(parts[5]) and parts[5] not in found:
            found.append(parts[5])
    return found


def openmp_libraries() -> list[str]:
    """The OpenMP runtimes loaded into this process (empty where /proc does not tell)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    by_file: dict[str, str] = {}
    for library in parse_openmp_libraries(maps):
        by_file.setdefault(os.path.realpath(library), library)
    return list(by_file.values())


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else (platform.processor() or "unknown")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _driver_version(devices: list[dict[str, object]]) -> str | None:
    for device in devices:
        for key, value in device.items():
            if "driver" in key and value:
                return str(value)
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else None


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [name for name in re.split(r"[\s,;]+", value) if name]
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def read_machine() -> Machine:
    """Reads all of it now."""
    build: dict[str, object] = dict(_C.build_info())
    devices: list[dict[str, object]] = [dict(device) for device in _C.cuda_device_info()]
    versions = {
        "fusereg": fusereg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _text(build.get("compiler", "unknown")),
        "pybind11": _text(build.get("pybind11", "unknown")),
        "dlpack": _text(build.get("dlpack", "unknown")),
    }
    cpu = Cpu(
        model=_cpu_model(),
        architecture=platform.machine(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        torch_threads=torch.get_num_threads(),
        isa=_C.cpu_isa(),
        isas_available=list(_C.cpu_isas()),
        isas_compiled=_names(build.get("isas", ())),
        isa_override=os.environ.get("FUSEREG_CPU_ISA"),
    )
    toolkit = build.get("cuda")
    cuda = Cuda(
        built=bool(toolkit),
        toolkit=str(toolkit) if toolkit else None,
        architectures=_text(build.get("cuda_architectures") or ""),
        torch_cuda=torch.version.cuda,
        driver=_driver_version(devices),
        devices=devices,
        error=None if devices else (_C.cuda_error() or None),
    )
    openmp = openmp_libraries()
    warnings = []
    if len(openmp) > 1:
        warnings.append(
            f"{len(openmp)} OpenMP runtimes are loaded: their thread pools compete for the same "
            "cores. "
            "Import torch before other packages that bring an OpenMP runtime."
        )
    if torch.cuda.is_available() and torch.version.hip is None and not cuda.built:
        warnings.append(
            "torch sees a CUDA device, but this fusereg was built without CUDA: its kernels run "
            "on the "
            "CPU only. Rebuild where nvcc is on the PATH, with FUSEREG_CUDA=ON."
        )
    if cuda.built and torch.version.cuda is None:
        warnings.append(
            "this fusereg was built with CUDA, but torch was not: tensors stay on the CPU."
        )
    return Machine(versions, platform.platform(), cpu, cuda, openmp, warnings)
