"""Findings about this machine: what it can compute of a study with privacy, on invented records, before any charge.

That no record's result depends on another's is tested once for each processor, build of torch, driver and release of
ours, and each model, shape and precision (``training/fit.py``). The finding is kept in the site's store, in words for
``consilium-site doctor``; a file that cannot be read is no finding. That memory takes a study's pieces is tried once
while the agent runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_shared.canonical import canonical_bytes, canonical_digest, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_client.training.fit import Finding, Fit
    from dpsgd.engines import Engine


class Machine:
    """The machine that the agent runs on."""

    def __init__(self, folder: Path) -> None:
        self._findings = FindingFiles(folder)
        self._fits: dict[tuple[str, str, str, PrivacyPlan], Fit] = {}

    def fit(self, study: Study, plan: PrivacyPlan, device_name: str, engine: Engine) -> Fit:
        """Device and pieces of the study's computation; found out once while the agent runs.

        Raises:
            MachineError: this machine cannot compute it, or not so that clipping bounds what one patient changes.
            ConfigurationError: there is no such device.
        """
        from consilium_client.training.fit import fitting

        key = (study.digest, device_name, engine, plan)
        if key not in self._fits:
            self._fits[key] = fitting(study, plan, device_name, engine, self._findings)
        return self._fits[key]


class FindingFiles:
    """One small file for each machine and model: ``training.fit.Findings``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def get(self, about: dict[str, Any]) -> Finding | None:
        """The finding about exactly this, or None."""
        content = _read(self._file(about))
        return _finding(content) if content is not None and content.get("about") == about else None

    def put(self, about: dict[str, Any], finding: Finding) -> None:
        """Keep it, durably."""
        write_atomically(self._file(about), canonical_bytes({"about": about, **finding._asdict()}))

    def all(self, machine: dict[str, Any]) -> Iterator[tuple[str, Finding]]:
        """The model and the finding of each that is about this machine."""
        for file in sorted(self.folder.glob("*.json")):
            content = _read(file)
            if content is not None and content["about"].get("machine") == machine:
                found = _finding(content)
                if found is not None:
                    yield str(content["about"]["model"]["name"]), found

    def _file(self, about: dict[str, Any]) -> Path:
        return self.folder / f"{canonical_digest(about)}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = parse_canonical(file.read_bytes())
    except (FileNotFoundError, PeerError):
        return None
    known = isinstance(content, dict) and isinstance(content.get("about"), dict)
    return content if known else None


def _finding(content: dict[str, Any]) -> Finding | None:
    from consilium_client.training.fit import Finding

    rows, failed = content.get("rows"), content.get("failed")
    return Finding(rows, failed) if isinstance(rows, int) and isinstance(failed, str) else None
