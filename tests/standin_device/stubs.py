"""Build the shared libraries that let a CUDA build of torch load where there is no GPU.

usage: stubs.py TORCH_LIB_FOLDER OUT_FOLDER

libcudart is cudart*.cpp. For every other of NVIDIA's libraries (cuBLAS, cuDNN, NCCL, ...) one is
made of functions that do nothing and return 0: those that torch's libraries ask for (nm), under the
symbol versions that they ask for. CUDA's headers are wanted, from a toolkit or from the package
nvidia-cuda-runtime.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
#: By the beginning of a symbol's name, for symbols without a version.
LIBRARY_OF = {
    "cusparseLt": "libcusparseLt",
    "nccl": "libnccl",
    "cuFile": "libcufile",
    "nvshmem": "libnvshmem_host",
    "cu[A-Z]": "libcuda",
}
#: What the driver says of contexts is what the runtime knows.
CONTEXT = """
#include <dlfcn.h>
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  int (*ask)(int) = dlsym(dlopen("libcudart.so.13", RTLD_NOW), "standin_has_context");
  *flags = 0;
  *active = ask(device);
  return 0;
}"""


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_include() -> Path:
    def candidates() -> Iterator[Path]:
        if nvcc := shutil.which("nvcc"):
            yield Path(nvcc).resolve().parents[1] / "include"
        yield from Path("/usr/local").glob("cuda*/include")
        yield from Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/include")

    for folder in candidates():
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    raise SystemExit("no cuda_runtime_api.h: CUDA's headers are wanted (a GPU is not)")


def wanted(torch_lib: Path) -> tuple[set[str], dict[str, set[str]], dict[str, str]]:
    """Return the libraries' names, the symbols of each, and the versions of the symbols."""
    libraries: set[str] = set()
    symbols: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, str] = {}
    for path in sorted(torch_lib.glob("*.so")):
        needs = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", str(path)))
        libraries.update(n for n in needs if re.match(r"lib(cu|nv|nccl)", n))
        for line in run("nm", "-D", "--undefined-only", str(path)).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            if version == "NVSHMEM" or re.match(r"lib(cu|nv)", version):
                library = "libnvshmem_host" if version == "NVSHMEM" else version
                versions[library] = version
            else:
                found = (name for prefix, name in LIBRARY_OF.items() if re.match(prefix, symbol))
                library = next(found, "")
            symbols[library].add(symbol)
    return libraries, symbols, versions


def main(torch_lib: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    libraries, symbols, versions = wanted(torch_lib)
    for library in sorted(libraries):
        version: str | None
        if library.startswith("libcudart."):
            flags = ["-std=c++17", "-O1", "-Wall", f"-I{HERE}", f"-isystem{cuda_include()}"]
            command = ["g++", "-shared", "-fPIC", *flags, *map(str, HERE.glob("cudart*.cpp"))]
            version = library
        else:
            keys = [k for k in symbols if k and re.match(rf"{re.escape(k)}(\.|$)", library)]
            names = sorted(set().union(*(symbols[k] for k in keys)))
            source = out / "stub.c"
            written = {"cuDevicePrimaryCtxGetState": CONTEXT} if "libcuda." in library else {}
            lines = [f"long {name}() {{ return 0; }}" for name in names if name not in written]
            source.write_text("\n".join([*lines, *written.values(), ""]))
            command = ["gcc", "-shared", "-fPIC", "-w", str(source)]
            version = next((versions[k] for k in keys if k in versions), None)
        if version:
            (out / "stub.map").write_text(f"{version} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={out / 'stub.map'}")
        subprocess.check_call([*command, "-o", str(out / library), f"-Wl,-soname,{library}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
