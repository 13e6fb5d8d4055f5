"""Data of studies: read when a study needs it, kept while it is the last one asked for."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from consilium_client import data
from consilium_client.agent.activity import Activity
from consilium_client.data.asset import AssetSpec
from consilium_client.data.dataset import Dataset
from consilium_client.prepared.store import PreparedStore
from consilium_client.quality import fit
from consilium_client.quality.fit import Finding
from consilium_client.site_config import SiteConfig
from consilium_shared.errors import PolicyRefusal
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")

REMEMBERED = 32
"""Studies whose numbers of patients and findings are kept."""


@dataclass(frozen=True)
class Patients:
    """Numbers of the site's patients that a study uses. No message contains them.

    Attributes:
        train: patients to train on.
        held_back: patients to evaluate on, those for test.
        validation: patients by whom a round is chosen.
    """

    train: int
    held_back: int
    validation: int = 0

    @classmethod
    def of(cls, records: Dataset) -> Patients:
        """Counted."""
        parts = (records.patients_of(part) for part in ("train", "test", "validation"))
        return cls(*(int(each.sum()) for each in parts))

    def counted(self, study: Study) -> int:
        """Fewest patients whose counts leave together in a study."""
        return self.held_back if study.evaluation.keep is None else min(self.held_back, self.validation)


class StudyData:
    """Data of the site's assets, as studies use it. Safe to use from several threads."""

    def __init__(self, config: SiteConfig, root: Path, activity: Activity, store: PreparedStore) -> None:
        """``root``: the folder from which relative paths in site.yaml are read; ``store``: of what was prepared."""
        self.config = config
        self._root, self._store = root, store
        self._activity = activity
        self._records: tuple[str, Dataset] | None = None
        self._patients: OrderedDict[str, Patients] = OrderedDict()
        self._findings: OrderedDict[str, list[Finding]] = OrderedDict()
        self._loading = threading.Lock()

    def records(self, study: Study) -> Dataset:
        """The study's data, read once and kept while it is the last one asked for.

        Raises:
            PolicyRefusal: this site has no such asset.
            DataError: the data cannot be used; the text stays at the site.
        """
        with self._loading:
            if self._records is not None and self._records[0] == study.digest and self._records[1].intact:
                return self._records[1]
            spec = self.asset(study)
            self._records = None  # free the old before reading the new
            self._patients.pop(study.digest, None)  # as long as it cannot be read, nothing is known of it
            self._findings.pop(study.digest, None)
            self._activity.begin("reading data", study=study.study)

            def watch(done: int, of: int) -> None:
                self._activity.begin("reading data", study=study.study, done=done, of=of)

            try:
                records = data.load(spec.at(self._root), study, watch, self._store.asset(study.data.asset))
            finally:
                self._activity.wait()
            log.info("study %s: data of asset %s is read", study.study, study.data.asset)
            self._records = (study.digest, records)
            self._patients[study.digest] = Patients.of(records)
            if len(self._patients) > REMEMBERED:
                self._patients.popitem(last=False)
            return records

    def patients(self, study: Study) -> Patients:
        """Numbers of patients that the study uses, as when its data was last read; reads it only where it never was.

        The coordinator asks for a pending study's status again and again: that neither reads the data each time nor
        pushes out the data of the study that trains. Raises as ``records``.
        """
        self.asset(study)
        return self._patients.get(study.digest) or Patients.of(self.records(study))

    def findings(self, study: Study) -> list[Finding]:
        """Findings of what does not fit the study, for the screen of the hospital's people alone.

        Taken when somebody asks, never in a round; kept until the data is read anew. Raises as ``records``.
        """
        self.asset(study)
        if (known := self._findings.get(study.digest)) is not None:
            return known
        found = fit.findings(study, self.records(study), self.config.policy.minimum_patients)
        self._findings[study.digest] = found
        if len(self._findings) > REMEMBERED:
            self._findings.popitem(last=False)
        return found

    def asset(self, study: Study) -> AssetSpec:
        """The asset that the study names; raises PolicyRefusal where site.yaml has none of that name."""
        spec = self.config.assets.get(study.data.asset)
        if spec is None:
            asset = study.data.asset
            raise PolicyRefusal("data", f"this site has no asset {asset!r}", f"assets.{asset}: where its files lie")
        return spec
