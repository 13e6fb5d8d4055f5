"""Table of faults that are planted at both ends, and of how each doctor names them: docs/results/doctor.md.

make doctor
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import faults, server_faults
from tests.support.site import CONTRACT, Coordinator

from consilium_client.commands import doctor as site_doctor
from consilium_client.site import Home as SiteHome
from consilium_server.commands import doctor as server_doctor
from consilium_server.federation import Home as ServerHome
from consilium_shared.findings import Finding
from consilium_shared.study import Study

PAGE = Path(__file__).parents[2] / "docs" / "results" / "doctor.md"
HEAD = """\
# What the doctors find

Faults that were planted one by one at a sound site and at a sound server, and the line by which \
`consilium-site doctor` and `consilium-server doctor` name each. Made by `make doctor`; that each is found is held by \
`tests/unit/client/test_doctor_faults.py` and `tests/unit/server/test_doctor_faults.py`. … is the home folder.
"""


def named(found: Iterable[Finding], check: str) -> Finding:
    """The finding of a check."""
    return next(each for each in found if each.check == check)


def rows(sound: Path, kind: str) -> Iterator[str]:
    """One line of the table for each fault of a site, or of a server."""
    for fault in faults.FAULTS if kind == "site" else server_faults.FAULTS:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            here = Path(folder) / "f"
            if isinstance(fault, faults.Fault):
                ground = faults.copy(sound, here, patch, stack)
                fault.plant(ground)
                found = named(site_doctor.examine(SiteHome(here / "a")), fault.check)
            else:
                other = server_faults.copy(sound, here, patch, stack, Study.model_validate(CONTRACT))
                fault.plant(other)
                found = named(server_doctor.examine(ServerHome(here / "server")), fault.check)
            detail = re.sub(r"\s+", " ", found.detail).replace(str(here / "a"), "…").replace(str(here / "server"), "…")
            detail = re.sub(r"127\.0\.0\.1:\d{4,5}", "127.0.0.1:8443", detail).replace("|", "\\|").replace(folder, "…")
            yield f"| {fault.what} | {found.check} | {found.state} | {detail} |"


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        Coordinator(Path(folder))
        parts = [HEAD]
        for kind in ("site", "server"):
            head = f"## At a {kind}\n\n| fault | check | state | detail |\n|---|---|---|---|"
            parts.append("\n".join([head, *rows(Path(folder), kind)]) + "\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
