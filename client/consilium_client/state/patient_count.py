"""Noisy patient count of a study, drawn once; the exact count never leaves the site.

The sampling rate of the plan and the weight of the updates follow from it. It is drawn when the study is first looked
at and kept, so that asking again does not average the noise away; it is charged when the study is approved, since the
approval in the ledger shows it. Where the file is lost a new one is drawn, and charged with the next approval.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.study import Study


class PatientCounts:
    """Noisy patient counts: one file of mode 0600 a study, in the site's store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def noised(self, study: Study, patients: int, least: int) -> int:
        """The number of patients that the study's plan is made for.

        Args:
            study: the study; without privacy the number is ``patients`` itself.
            patients: how many there are to train on, today.
            least: the policy's minimum, which is no secret: the noise never shows fewer.

        Returns:
            ``patients`` plus noise of standard deviation ``privacy.count_noise``, in whole patients, as first drawn.

        Raises:
            IntegrityError: the file is damaged.
        """
        if study.privacy.mode == "none":
            return patients
        file = self.folder / f"{study.digest}.json"
        if file.exists():
            try:
                return int(parse_canonical(file.read_bytes())["patients"])
            except (PeerError, KeyError, TypeError, ValueError) as error:
                raise IntegrityError(
                    f"{file} is damaged; restore it from the backup, or remove it: a new number is then charged"
                ) from error
        noise = round(secrets.SystemRandom().gauss(0.0, study.privacy.count_noise))
        size = max(patients + noise, least, 1)
        write_atomically(file, canonical_bytes({"patients": size}))
        return size
