"""Findings of a doctor: each check with its state and, where something is wrong, what to do about it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from consilium_shared.errors import ConsiliumError

FREE_BYTES = 2 * 1024**3
LEAST_FREE_BYTES = 64 * 1024**2
"""Least free space: with less no round can be charged and kept."""
PINNED = re.compile(r"""^([A-Za-z0-9_.-]+)\s*==\s*([0-9][^\s;,]*)\s*;\s*extra\s*==\s*["']([a-z]+)["']""")


@dataclass(frozen=True)
class Finding:
    """One check. ``state``: ok, warning (it works, less well or not for long), or error (it does not work)."""

    check: str
    state: str
    detail: str


def attempt(check: str, look: Callable[[], str]) -> Finding:
    """The finding of a check that says what it saw, or raises a ConsiliumError that says what to do.

    >>> attempt("keys", lambda: "there")
    Finding(check='keys', state='ok', detail='there')
    """
    try:
        return Finding(check, "ok", look())
    except ConsiliumError as error:
        return Finding(check, "error", str(error))


def disk(root: Path) -> Finding:
    """Space on the disk of a home folder, or of the folder that it will be made in."""
    place = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(place).free
    said = f"{free / 1024**3:.1f} GiB free at {place}"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", "error", f"{said}: make room; the next round needs some, and cannot be kept")
    if free < FREE_BYTES:
        return Finding("disk", "warning", f"{said}: make room for what the next studies keep")
    return Finding("disk", "ok", said)


def memory(least: int, enough: int, use: str, root: Path = Path("/")) -> Finding:
    """Memory that is left to this machine, or to the control group that this process is in, where that is less.

    Args:
        least: bytes; with fewer it does not work.
        enough: bytes; with fewer, less well.
        use: what the memory is for.
        root: where ``proc`` and ``sys`` are.
    """
    left = [_available(root), _left_to_the_group(root)]
    known = [each for each in left if each is not None]
    if not known:
        return Finding("memory", "warning", "cannot be told: this system has no /proc/meminfo")
    said = f"{min(known) / 1024**3:.1f} GiB left"
    if min(known) < least:
        return Finding("memory", "error", f"{said}, and {use} takes {least / 1024**3:.1f}: end other programs, or add")
    if min(known) < enough:
        return Finding("memory", "warning", f"{said}: enough for {use} at rest, not for a study; end other programs")
    return Finding("memory", "ok", said)


def _available(root: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _left_to_the_group(root: Path) -> int | None:
    """Memory that a control group's limit leaves (version 2, as systemd and containers set it)."""
    try:
        group = (root / "proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        place = root / "sys/fs/cgroup" / group
        return int((place / "memory.max").read_text()) - int((place / "memory.current").read_text())
    except (OSError, ValueError):  # no such file system, or "max": no limit
        return None


def pinned(role: str, requirements: Iterable[str] | None = None) -> Finding:
    """Versions of the libraries on whose internals this release leans, held against the ones that it names.

    Args:
        role: the extra of the installation, as ``site``.
        requirements: of the package; its own by default.
    """
    wrong = []
    for line in requirements if requirements is not None else metadata.requires("consilium") or ():
        if (found := PINNED.match(line)) and found[3] == role:
            try:
                there = metadata.version(found[1])
            except metadata.PackageNotFoundError:
                there = "none"
            if there.split("+")[0] != found[2]:  # torch says its build after a plus
                wrong.append(f"{found[1]} is {there}, and this release is made for {found[2]}")
    if wrong:
        cure = f"pip install --constraint constraints.txt '.[{role}]' in the folder of the release"
        return Finding("libraries", "error", f"{'; '.join(wrong)}: {cure}")
    return Finding("libraries", "ok", "of the versions that this release is made for")
