"""Instance of a site's home: the machine and the file on which it ran last; a copy says so when it starts.

A copy on another machine, or in another folder, is seen here, and a clone of a whole virtual machine where it was given
other network adapters, as hypervisors do unless they are told that it was moved. One that is the same in everything
that a program without privileges can read is found by the coordinator, by the heads of its answers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from consilium_client.site import Home
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import write_atomically

log = logging.getLogger("consilium.agent")

MACHINE = Path("/etc/machine-id")
ADAPTERS = Path("/sys/class/net")
"""Each with its address; one with a ``device`` is no bridge, tunnel or container's end, which come and go."""


def note(home: Home, machine: Path = MACHINE, adapters: Path = ADAPTERS) -> bool:
    """Warn where this home ran elsewhere before, and note where it runs now; to be called with the ledger's lock held.

    Returns:
        Whether it warned. A home that was moved starts all the same: nothing here can tell it from a copy.
    """
    lock, file = home.ledger.with_name(home.ledger.name + ".lock").stat(), home.store / "instance"
    here = {
        "machine": _read(machine),
        "folder": str(home.root.resolve()),
        "inode": lock.st_ino,
        "adapters": sorted(_read(each / "address") for each in adapters.glob("*") if (each / "device").exists()),
    }
    try:
        before = parse_canonical(file.read_bytes())
    except (OSError, PeerError):
        before = here
    elsewhere = _elsewhere(before, here)
    if elsewhere:
        log.warning(
            "this home ran elsewhere before (folder %s): it was moved, copied or restored. If the other one still runs "
            "anywhere, stop one of the two now: they would spend one budget in two ledgers, and the coordinator takes "
            "no answer from either. See deploy/runbooks/two-homes.md",
            before.get("folder") if isinstance(before, dict) else "unknown",
        )
    write_atomically(file, canonical_bytes(here))
    return elsewhere


def _elsewhere(before: Any, here: dict[str, Any]) -> bool:
    """True where that was another place. One adapter that stayed is enough: others are exchanged and added. A note of a
    release that knew none of them says nothing about them."""
    if not isinstance(before, dict):
        return True
    known, now = before.get("adapters"), here["adapters"]
    others = bool(isinstance(known, list) and known and now and not set(map(str, known)) & set(now))
    return others or any(before.get(name) != here[name] for name in ("machine", "folder", "inode"))


def _read(machine: Path) -> str:
    try:
        return machine.read_text().strip()
    except OSError:
        return ""
