"""State of secure sums that this site must not lose: keys and stages of each slot, and the secrets of each study.

Everything here is secret but worthless for any other sum. It is on the disk before what depends on it leaves, and
deleted once it can serve no honest question any more.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.fields import Hex32, Name
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.secagg.handshake import SEED_BYTES, Bundle, Encapsulated
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import Slot

Kind = TypeVar("Kind", bound=Strict)


class Peer(Strict):
    """Keys and secret kept of another site, for one study."""

    bundle: Bundle
    secret: Annotated[Hex32 | None, Field(repr=False)] = None
    sent: Encapsulated | None = None
    """To a site of a higher name; given again when it is asked for again."""


class Session(Strict):
    """A study's long-lived secrets (``secagg.handshake``)."""

    seed: Hex32
    peers: dict[Name, Peer] = Field(default_factory=dict)
    seen: dict[Hex32, str] = Field(default_factory=dict)
    """Digests worked on, to where each was masked last: a sum with this site's numbers may be opened there, or was."""
    frozen: Hex32 | None = None
    """Digest of what the study does not train, in the models that were worked on."""
    together: dict[Name, tuple[Name, ...]] = Field(default_factory=dict)
    """Sites of every sum, where those are to be the same: those of its updates, and those of its counts."""

    def __repr__(self) -> str:
        return f"Session({', '.join(self.peers)}; secrets hidden)"

    __str__ = __repr__

    @property
    def secrets(self) -> dict[str, bytes]:
        """Site to the secret shared with it."""
        return {site: bytes.fromhex(peer.secret) for site, peer in self.peers.items() if peer.secret is not None}


class Worked(Strict):
    """Remainder of a session whose secrets were deleted."""

    seen: dict[Hex32, str] = Field(default_factory=dict)
    frozen: Hex32 | None = None
    together: dict[Name, tuple[Name, ...]] = Field(default_factory=dict)


class SumStore:
    """Store of secure sums: one folder a study, files of mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for study in folder.iterdir():
            remove_leftovers(study)

    def session(self, study: str) -> Session:
        """The secrets of a study's digest; made and kept on first use. Raises IntegrityError for a damaged file."""
        found = self._read(study, "session.json", Session)
        if found is None:
            worked = self._read(study, "worked.json", Worked) or Worked()
            found = Session(seed=secrets.token_hex(SEED_BYTES), **worked.model_dump())
            self.put_session(study, found)
        return found

    def _read(self, study: str, name: str, kind: type[Kind]) -> Kind | None:
        file = self.folder / study / name
        try:
            return kind.model_validate(parse_canonical(file.read_bytes()))
        except FileNotFoundError:
            return None
        except (PeerError, ValidationError) as error:
            raise IntegrityError(
                f"{file} is damaged; delete it, and the site makes new keys for the study (without privacy, or where "
                "every round is of the same sites, it takes no further part: it cannot tell any more what left)"
            ) from error

    def put_session(self, study: str, session: Session) -> None:
        """Keep the secrets of a study durably."""
        write_atomically(self.folder / study / "session.json", canonical_bytes(session.model_dump(mode="json")))

    def put(self, state: SiteState) -> None:
        """Keep the state of a slot durably."""
        write_atomically(self._file(state.slot), state.to_bytes())

    def get(self, slot: Slot) -> SiteState | None:
        """The state of a slot, or None."""
        try:
            state = SiteState.from_bytes(self._file(slot).read_bytes())
        except FileNotFoundError:
            return None
        if state.slot != slot:
            raise IntegrityError(f"{self._file(slot)} is the state of another sum")
        return state

    def attempts(self, slot: Slot) -> list[SiteState]:
        """The states of all attempts at the same sum, in order."""
        files = (self.folder / slot.study).glob(f"{slot.purpose}.{slot.round}.*")
        found = [SiteState.from_bytes(file.read_bytes()) for file in files]
        return sorted(found, key=lambda state: state.slot.attempt)

    def forget_rounds_before(self, study: str, number: int) -> None:
        """Delete the states of earlier rounds."""
        for file in (self.folder / study).glob("*.*.*"):
            if int(file.name.split(".")[1]) < number:
                file.unlink()

    def forget_secrets(self, study: str) -> None:
        """Delete everything of a study but what was worked on, which is not to be worked on again."""
        folder = self.folder / study
        if not folder.exists():
            return
        try:
            session = self._read(study, "session.json", Session)
        except IntegrityError:
            session = None
        if session is not None:
            worked = Worked(seen=session.seen, frozen=session.frozen, together=session.together)
            write_atomically(folder / "worked.json", canonical_bytes(worked.model_dump(mode="json")))
        for file in folder.iterdir():
            if file.name != "worked.json":
                file.unlink()

    def forget(self, study: str) -> None:
        """Delete everything of a study that is over."""
        shutil.rmtree(self.folder / study, ignore_errors=True)

    def _file(self, slot: Slot) -> Path:
        return self.folder / slot.study / f"{slot.purpose}.{slot.round}.{slot.attempt}"
