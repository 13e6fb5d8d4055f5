"""Memory that this process and those that it starts may take."""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """Bytes that are free now, or that the control group allows where that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        for folder in (_GROUPS / group, *(_GROUPS / group).parents):
            limit = folder / "memory.max"
            if limit.exists() and (words := limit.read_text().strip()) != "max":
                found = min(found, int(words) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(found, 0)
