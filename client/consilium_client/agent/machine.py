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

from consilium_client.state.trials import Trials
from consilium_shared.canonical import canonical_bytes, canonical_digest, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_client.training.fit import Finding, Fit
    from dpsgd.engines import Engine


Key = tuple[str, str, str, PrivacyPlan]
"""A study's digest, device and engine as site.yaml has them, and the plan."""


class Machine:
    """Device and microbatch sizes with which this machine computes a study."""

    def __init__(self, folder: Path) -> None:
        self._findings, self.trials = FindingFiles(folder), Trials(folder / "trying")
        self._fits: dict[Key, Fit] = {}
        self._failed: set[Key] = set()
        self._seconds: dict[Key, float] = {}

    def fit(self, study: Study, plan: PrivacyPlan, device_name: str, engine: Engine) -> Fit:
        """Device and pieces of the study's computation; found out once while the agent runs.

        Raises:
            MachineError: this machine cannot compute it, or not so that clipping bounds what one patient changes.
            ConfigurationError: there is no such device.
        """
        from consilium_client.training.fit import fitting

        key = (study.digest, device_name, engine, plan)
        if key not in self._fits:
            self._failed.add(key)
            self._fits[key] = fitting(study, plan, device_name, engine, self._findings, self.trials)
            self._failed.discard(key)
        return self._fits[key]

    def check_again(self, study: Study, plan: PrivacyPlan, device_name: str, engine: Engine) -> None:
        """Test anew a study that this machine could not compute the last time; leave other studies alone.

        Quick where it can be known without a test: so it is asked before a key is given.

        Raises:
            MachineError: still not.
        """
        from consilium_client.training.fit import fails

        if (study.digest, device_name, engine, plan) in self._failed or fails(
            study, device_name, engine, self._findings
        ):
            self.fit(study, plan, device_name, engine)

    def least_seconds(self, study: Study, plan: PrivacyPlan, device_name: str, engine: Engine, *, known: bool) -> float:
        """Seconds of a round at the least (``training/forecast.py``); measured once while the agent runs.

        Args:
            known: nothing is measured; 0 where nothing was.
        """
        key = (study.digest, device_name, engine, plan)
        if key not in self._seconds and not known:
            from consilium_client.training.forecast import least_seconds

            fit = self.fit(study, plan, device_name, engine)
            self._seconds[key] = least_seconds(study, plan, fit.device, engine, fit.rows or 1, fit.workers)
        return self._seconds.get(key, 0.0)

    def forget(self, study: str) -> int:
        """Try everything of a study's digest again, also what ended the agent; returns how many trials had."""
        for known in (self._fits, self._seconds):
            for key in [each for each in known if each[0] == study]:
                del known[key]
        return self.trials.forget(study)


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
        """Keep a finding durably."""
        write_atomically(self._file(about), canonical_bytes({"about": about, **finding._asdict()}))

    def all(self, machine: dict[str, Any]) -> Iterator[tuple[str, Finding]]:
        """Findings about this machine, each with the name of its model."""
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
