"""Pace of each study's last training: what it took, kept so that a restart knows it.

Format 1: ``{"format": 1, "round": …, "seconds": …, "computing": …}``, canonical JSON; the last is a digest of what
it was computed with. A file of another format, or one that cannot be read, is no pace.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import remove_leftovers, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class PaceOfRound:
    """Pace of one round's training.

    Attributes:
        round: its number.
        seconds: that it took.
        computing: digest of the device, the libraries and the settings that it was computed with.
    """

    round: int
    seconds: float
    computing: str


class Paces:
    """One small file a study, of mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def put(self, study: str, pace: PaceOfRound) -> None:
        """Keep the pace of a study's digest, durably, in place of an earlier round's."""
        about = {"round": pace.round, "seconds": round(pace.seconds, 3), "computing": pace.computing}
        write_atomically(self._file(study), canonical_bytes({"format": FORMAT, **about}))

    def get(self, study: str) -> PaceOfRound | None:
        """The pace that is kept, or None."""
        try:
            found = parse_canonical(self._file(study).read_bytes())
            if found["format"] != FORMAT:
                return None
            return PaceOfRound(int(found["round"]), float(found["seconds"]), str(found["computing"]))
        except (OSError, PeerError, KeyError, TypeError, ValueError):
            return None

    def forget(self, study: str) -> None:
        """Delete what is kept of a study."""
        self._file(study).unlink(missing_ok=True)

    def _file(self, study: str) -> Path:
        return self.folder / f"{study}.json"
