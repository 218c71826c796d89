"""The processor, and the pages that its memory comes in, as Linux describes them."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

#: Microarchitectures by family and range of models, for virtual machines often name no more than
#: "AMD EPYC" (Linux, arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h).
_MICROARCHITECTURES: dict[str, tuple[tuple[int, int, int, str], ...]] = {
    "AuthenticAMD": (
        (23, 0x00, 0x2F, "Zen"),
        (23, 0x30, 0x4F, "Zen 2"),
        (23, 0x60, 0x7F, "Zen 2"),
        (25, 0x00, 0x0F, "Zen 3"),
        (25, 0x10, 0x1F, "Zen 4"),
        (25, 0x20, 0x5F, "Zen 3"),
        (25, 0x60, 0xAF, "Zen 4"),
        (26, 0x00, 0x2F, "Zen 5"),
        (26, 0x40, 0x4F, "Zen 5"),
        (26, 0x60, 0x7F, "Zen 5"),
    ),
    "GenuineIntel": (
        (6, 85, 85, "Skylake or Cascade Lake"),
        (6, 106, 106, "Ice Lake"),
        (6, 143, 143, "Sapphire Rapids"),
        (6, 173, 173, "Granite Rapids"),
        (6, 207, 207, "Emerald Rapids"),
    ),
}


def read(path: str | Path) -> str:
    """Return a text file's content without space around it; nothing if there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def name(cpuinfo: str | None = None) -> str:
    """Return the processor's name with its microarchitecture, as "AMD EPYC (Zen 4)".

    Of the content of ``/proc/cpuinfo``, by default this machine's. A microarchitecture that is not
    known is left out: a virtual machine may report a family and model of its own.
    """
    facts: dict[str, str] = {}
    for line in (read("/proc/cpuinfo") if cpuinfo is None else cpuinfo).splitlines():
        key, _, value = line.partition(":")
        if value.strip():
            facts.setdefault(key.strip(), value.strip())
    named = (facts[key] for key in ("model name", "Model", "Hardware") if key in facts)
    found = next(named, None) or platform.processor() or platform.machine()
    try:
        family, model = int(facts["cpu family"]), int(facts["model"])
    except (KeyError, ValueError):
        return found
    for of, first, last, kind in _MICROARCHITECTURES.get(facts.get("vendor_id", ""), ()):
        if family == of and first <= model <= last:
            return f"{found} ({kind})"
    return found


def large_pages() -> str | None:
    """Return for which memory Linux uses large pages, or None where it does not say.

    "always", "madvise" (for who asks: fusereg for its results from 4 MB on, torch from 2 MB on if
    the environment has ``THP_MEM_ALLOC_ENABLE=1``) or "never".
    """
    chosen = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen.group(1) if chosen else None


def torch_asks_for_large_pages() -> bool:
    """Return whether torch asks for large pages when it allocates memory of a CPU."""
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
