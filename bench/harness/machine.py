"""The machine on which the figures were measured."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fusereg
from fusereg import _C
from fusereg.cli.machine import usable_cores
from fusereg.core import processor


def physical_cores() -> int | None:
    """Return the number of cores, where /proc tells them from hardware threads."""
    pairs = r"^physical id\s*: (\d+)$.*?^core id\s*: (\d+)$"
    found = re.findall(pairs, processor.read("/proc/cpuinfo"), re.MULTILINE | re.DOTALL)
    return len(set(found)) or None


def caches() -> dict[str, str]:
    """Return the size of each cache of the first CPU, such as {"L1d": "48K", "L2": "1024K"}."""
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(processor.read(index / "type"), "")
        level, size = processor.read(index / "level"), processor.read(index / "size")
        if level and size:
            found[f"L{level}{kind}"] = size
    return found


def memory_bytes(which: str = "MemTotal") -> int | None:
    """Return the size of the memory, or that of a part ("MemAvailable"), where /proc tells it."""
    found = re.search(rf"^{which}:\s*(\d+)", processor.read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Return the CUDA device's properties, or None on the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": int(properties.total_memory),
        "multiprocessors": int(properties.multi_processor_count),
        "l2_bytes": int(getattr(properties, "L2_cache_size", 0)) or None,
        "cuda": torch.version.cuda,
    }


def git_commit() -> str | None:
    """Return the commit of this checkout or the current folder's, "+changes" if it differs.

    Only a checkout of fusereg counts: an environment inside another project's repository must not
    report that project's commit.
    """
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if not (folder / "csrc" / "penalty").is_dir() or not (folder / ".git").exists():
            continue
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        if commit:
            return commit + ("+changes" if _git(folder, "status", "--porcelain") else "")
    return None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(device: torch.device) -> dict[str, Any]:
    """Return all facts, ready for JSON."""
    load: list[float] | None = None
    with contextlib.suppress(OSError, AttributeError):
        load = [round(value, 2) for value in os.getloadavg()]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor.name(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "usable_cpus": usable_cores(),
        "caches": caches(),
        "large_pages": processor.large_pages(),
        "torch_large_pages": processor.torch_asks_for_large_pages(),
        "memory_bytes": memory_bytes(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "fusereg": fusereg.__version__,
        "isa": _C.cpu_isa(),
        "build": dict(_C.build_info()),
        "gpu": gpu(device),
        "git_commit": git_commit(),
        "load_average": load,
    }


def summary(machine: dict[str, Any]) -> str:
    """Return the line below a table."""
    parts = []
    accelerator = machine.get("gpu")
    if accelerator:
        parts.append(f"{accelerator['name']} (CUDA {accelerator['cuda']})")
    threads = machine.get("threads")
    parts.append(f"{machine.get('cpu')}, {threads} thread{'s' if threads != 1 else ''}")
    if machine.get("isa"):
        parts.append(str(machine["isa"]))
    if machine.get("caches"):
        parts.append(", ".join(f"{name} {size}" for name, size in machine["caches"].items()))
    parts.append(f"torch {machine.get('torch')}")
    parts.append(f"fusereg {machine.get('fusereg')}")
    if machine.get("git_commit"):
        parts.append(str(machine["git_commit"]))
    parts.append(str(machine.get("date", ""))[:10])
    return "; ".join(parts)


class OthersMeter:
    """The share of the machine's CPU time that other programs took since the meter was made.

    Load averages lag by a minute and count this program too; /proc/stat counts exactly.
    """

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return seconds of all CPUs: in all, busy, and busy for this process and its children."""
        fields = processor.read("/proc/stat").splitlines()[:1]
        try:
            ticks = [int(value) for value in fields[0].split()[1:9]]
            per_second = os.sysconf("SC_CLK_TCK")
        except (IndexError, ValueError, OSError, AttributeError):
            return None
        # user nice system idle iowait irq softirq steal
        idle = ticks[3] + ticks[4]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, own

    def share(self) -> float | None:
        """Return the share, between 0 and 1, or None where it is not known."""
        now = self._read()
        if now is None or self._start is None:
            return None
        total, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return round(min(1.0, max(0.0, (busy - own) / total)), 3) if total > 0 else None


def noise_warning(machine: dict[str, Any]) -> str:
    """Return a warning if other programs used the machine during the run, else an empty text."""
    share = machine.get("others_cpu_share")
    if share is None or share < 0.03:
        return ""
    return (
        f"other programs took {100 * share:.0f} % of the CPU time during this run: expect noise, "
        "and measure again on a quiet machine"
    )
