"""The environment of this process: versions, processor, OpenMP runtimes, CUDA."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field

import torch

import fusereg
from fusereg import _C
from fusereg.core import processor

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
    large_pages: str | None  # "always", "madvise" or "never"; None where the system does not say
    torch_large_pages: bool


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
    """Return the OpenMP runtimes among the files of a /proc/<pid>/maps text, each once."""
    paths = (parts[5] for line in maps.splitlines() if len(parts := line.split(maxsplit=5)) == 6)
    return list(dict.fromkeys(path for path in paths if _OPENMP_LIBRARY.search(path)))


def openmp_libraries() -> list[str]:
    """Return the OpenMP runtimes loaded into this process (none where there is no /proc)."""
    found = parse_openmp_libraries(processor.read("/proc/self/maps"))
    return list({os.path.realpath(path): path for path in found}.values())


def _driver_version(devices: list[dict[str, object]]) -> str | None:
    for device in devices:
        for key, value in device.items():
            if "driver" in key and value:
                return str(value)
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", processor.read("/proc/driver/nvidia/version"))
    return match.group(1) if match else None


def usable_cores() -> int:
    """Return the number of logical CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read_machine() -> Machine:
    """Return all of it as it is now."""
    build, devices = _C.build_info(), _C.cuda_device_info()
    versions = {
        "fusereg": fusereg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: str(build.get(name, "unknown")) for name in ("compiler", "pybind11", "dlpack")},
    }
    cpu = Cpu(
        model=processor.name(),
        architecture=platform.machine(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        torch_threads=torch.get_num_threads(),
        isa=_C.cpu_isa(),
        isas_available=list(_C.cpu_isas()),
        isas_compiled=list(build["isas"]),
        isa_override=os.environ.get("FUSEREG_CPU_ISA"),
        large_pages=processor.large_pages(),
        torch_large_pages=processor.torch_asks_for_large_pages(),
    )
    toolkit = build["cuda"]
    cuda = Cuda(
        built=bool(toolkit),
        toolkit=str(toolkit) if toolkit else None,
        architectures=build["cuda_architectures"] or "",
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
            "cores. Import torch before other packages that bring an OpenMP runtime."
        )
    if torch.cuda.is_available() and torch.version.hip is None and not cuda.built:
        warnings.append(
            "torch sees a CUDA device, but this fusereg was built without CUDA: its kernels run "
            "on the CPU only. Rebuild where nvcc is on the PATH, with FUSEREG_CUDA=ON."
        )
    if cuda.built and torch.version.cuda is None:
        warnings.append(
            "this fusereg was built with CUDA, but torch was not: tensors stay on the CPU."
        )
    return Machine(versions, platform.platform(), cpu, cuda, openmp, warnings)
