"""Clipping norms at the end of rounds, for studies with adaptive clipping.

It was made of noised counts that the rounds' charges paid for; still, nobody outside needs it, and it stays in the
site's store. The last two rounds are kept, so that a round which is made again begins as it did before.
"""

from __future__ import annotations

from pathlib import Path

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.limits import LEAST_CLIPPING_NORM, MOST_CLIPPING_NORM

_KEPT = 2


class ClippingNorms:
    """Clipping norms: one small file a study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def before(self, study: str, round_number: int) -> float | None:
        """Clipping norm that the last round before this one ended with; None where this site was in none."""
        ended = {number: norm for number, norm in self._read(study).items() if number < round_number}
        return ended[max(ended)] if ended else None

    def put(self, study: str, round_number: int, norm: float) -> None:
        """Keep what a round ended with, durably."""
        before = {number: ended for number, ended in self._read(study).items() if number < round_number}
        ended = {**before, round_number: norm}
        last = sorted(ended)[-_KEPT:]
        write_atomically(self._file(study), canonical_bytes({str(number): ended[number] for number in last}))

    def forget(self, study: str) -> None:
        """The study is over."""
        self._file(study).unlink(missing_ok=True)

    def _read(self, study: str) -> dict[int, float]:
        """Raises IntegrityError for a file that is not as ``put`` wrote it."""
        file = self._file(study)
        try:
            found = {int(number): float(norm) for number, norm in parse_canonical(file.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except (PeerError, AttributeError, TypeError, ValueError) as error:
            raise IntegrityError(f"{file} is damaged; delete it, and the study begins with its first norm") from error
        if not all(LEAST_CLIPPING_NORM <= norm <= MOST_CLIPPING_NORM for norm in found.values()):
            raise IntegrityError(f"{file} has a norm that no study has; delete it")
        return found

    def _file(self, study: str) -> Path:
        return self.folder / f"{study}.json"
