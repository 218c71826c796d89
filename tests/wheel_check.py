"""Installs the one wheel beside several torches, and builds another from the sdist without any.

    python tests/wheel_check.py dist --torch 2.13.0 2.12.1

For each torch: a new environment, the wheel from the folder, one call of every kernel held against
float64, as `fusereg info` does, and the examples of README.md and docs/ that need nothing else. For
the sdist: a new environment with neither torch nor
CUDA, in which pip builds it as it builds for anybody; the wheel must hold the same files. Other
options go to pip.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

SMOKE = """
import torch, fusereg
from fusereg.cli.checks import run_checks

results = run_checks()
wrong = [r for r in results if not r.ok]
assert results and not wrong, wrong
print(f"torch {torch.__version__}: {len(results)} kernel checks passed")
"""


def environment(folder: Path) -> str:
    """A new environment's interpreter."""
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} should have one {pattern}, has {len(found)}; do: make wheel")
    return found[0].resolve()


def contents(wheel: Path) -> set[str]:
    """A wheel's files of Python and of the compiled module."""
    with zipfile.ZipFile(wheel) as z:
        # auditwheel writes entries for folders as well.
        return {n for n in z.namelist() if n.startswith("fusereg/") and not n.endswith("/")}


def check_wheel(wheel: Path, torch: str, options: list[str], folder: Path) -> None:
    python = environment(folder)
    pip(python, "install", *options, f"torch=={torch}", str(wheel), "numpy")
    # From another folder, so that nothing but the installed package can be found.
    for command in (["-c", SMOKE], [str(Path(__file__).resolve().with_name("pages.py"))]):
        subprocess.run([python, *command], check=True, cwd=folder)


def check_sdist(sdist: Path, wheel: Path, options: list[str], folder: Path) -> None:
    python = environment(folder / "env")
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert missing.returncode != 0, "there should be no torch"
    # No compiler of CUDA either: what is on PATH beside the system's own is left out.
    env = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "CUDACXX": ""}
    command = [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder / "out")]
    command += [*options, "--config-settings=cmake.define.FUSEREG_CUDA=OFF", str(sdist)]
    subprocess.run(command, check=True, env=env, cwd=folder, stdout=subprocess.DEVNULL)
    built = only(folder / "out", "*.whl")
    assert contents(built) == contents(wheel), contents(built) ^ contents(wheel)
    print(f"{sdist.name}: builds with neither torch nor CUDA, {built.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("folder", type=Path)
    parse.add_argument("--torch", nargs="+", default=[], help="versions")
    arguments, options = parse.parse_known_args()
    wheel = only(arguments.folder, "*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    for torch in arguments.torch:
        with tempfile.TemporaryDirectory() as folder:
            check_wheel(wheel, torch, options, Path(folder))
    for sdist in arguments.folder.resolve().glob("*.tar.gz"):
        with tempfile.TemporaryDirectory() as folder:
            check_sdist(sdist, wheel, options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
