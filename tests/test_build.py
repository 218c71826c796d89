"""What CMake says of what it builds, and of what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file()
    or not shutil.which("cmake")
    or not shutil.which("ninja"),
    reason="no sources beside these tests, or no CMake and Ninja",
)


def configure(
    tmp_path: Path, *options: str, compiler: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run CMake with nothing on PATH but what it needs, and a compiler if wanted."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in (
        "cmake",
        "ninja",
        *(("c++", "cc", "ar", "ranlib", "ld", "as") if compiler else ()),
    ):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    kept = ("HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    return subprocess.run(
        [*command, f"-DPython_EXECUTABLE={sys.executable}", *options],
        env={**environment, "PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def words(text: str) -> str:
    """Return a text without CMake's line breaks."""
    return " ".join(text.split())


def test_a_missing_compiler_is_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    came = configure(tmp_path, "-DFUSEREG_CUDA=OFF", compiler=False)
    assert came.returncode != 0
    assert "fusereg: found no C++ compiler. Install one" in words(came.stderr)


def test_nvcc_that_was_asked_for_and_is_missing_is_one_sentence(tmp_path: Path) -> None:
    came = configure(tmp_path, "-DFUSEREG_CUDA=ON")
    assert came.returncode != 0
    assert "fusereg: FUSEREG_CUDA=ON, but nvcc was not found. Put it on PATH" in words(came.stderr)


def test_a_misspelled_choice_is_refused(tmp_path: Path) -> None:
    came = configure(tmp_path, "-DFUSEREG_CUDA=YES")
    assert came.returncode != 0
    assert "fusereg: FUSEREG_CUDA must be AUTO, ON or OFF, got YES" in words(came.stderr)


def test_cmake_says_what_it_builds_and_how_long_it_takes(tmp_path: Path) -> None:
    came = configure(tmp_path, "-DFUSEREG_CUDA=AUTO", "-DFUSEREG_ISAS=all")
    assert came.returncode == 0, came.stderr
    assert "fusereg: no nvcc, building for the CPU only" in came.stdout
    assert "fusereg: CPU kernels for baseline" in came.stdout
    assert "fusereg: compiling takes some" in came.stdout
