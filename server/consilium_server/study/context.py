"""Shared context of a study's exchanges: roster, common header fields, authentication of replies."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

from consilium_server import removed
from consilium_server.federation import Home
from consilium_server.removed import Removed
from consilium_server.state.heads import Doubt, Heads
from consilium_server.state.study_folder import StudyFolder
from consilium_server.transport.exchange import Answer as Arrival
from consilium_server.transport.exchange import StudyGrid
from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, TransportError
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Closing, Counts, Payload, Propose, Recorded, Refusal, Update

WEEK_SECONDS = 7 * 24 * 3600.0
"""Timeout in effect without a limit, in seconds: the caller decides when to stop waiting."""

LOOK_SECONDS = 1.0
"""Seconds between two looks, during a pause, whether somebody stopped the study."""


FOLLOW_SECONDS = 60.0
"""Seconds after a change of the roster in which the SuperLink's SuperNodes are looked up again."""


def _stamp(file: Path) -> tuple[int, int] | None:
    """Mark of a file's content, which every replacement changes; None where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


class Halted(Exception):
    """The study cannot or must not go on; the text says why."""


class RemovedSite(PeerError):
    """An answer of a site that is no site of the federation any more."""


class AskAgain(PeerError):
    """Answer that counts for nothing: the site is asked what ``StudyContext.instead`` says, or once more."""


class _Probe(NamedTuple):
    """A question that was never put before, and the one that made it necessary, by digest."""

    header: bytes
    payload: bytes
    about: str


class Addressing(TypedDict):
    """Fields that every request of a study has, and the slot of every sum."""

    federation: str
    study: str
    roster: str


class StudyContext:
    """Shared context of a study's exchanges: keys, folder, roster, common header fields."""

    def __init__(
        self,
        home: Home,
        folder: StudyFolder,
        grid: StudyGrid,
        nodes: Mapping[str, int],
        look_up: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """``nodes``: site to the node id of its SuperNode; ``look_up`` reads them again, as the roster may change."""
        self.home = home
        self.folder = folder
        self.grid = grid
        self.nodes = nodes
        self._look_up = look_up
        self._roster_at, self._looking_until, self._looked = _stamp(home.roster_file), 0.0, 0.0
        self.study = folder.study()
        self.roster = folder.roster(home)
        self.coordinator = home.coordinator()
        self.common = Addressing(federation=self.roster.federation, study=self.study.digest, roster=self.roster.digest)
        self._resumed = False
        self._heads = Heads(home.heads)
        self._probes: dict[str, _Probe] = {}
        self._removed: dict[str, Removed] = {}
        self._removed_at: tuple[int, int] | None = None

    def proposal(self, payload: bytes = b"") -> bytes:
        """The signed header of the study's proposal; no site reads its payload, which makes it another question."""
        document = self.folder.roster_document()
        contract = self.study.contract
        return self.encode(
            Propose(**self.common, contract=contract, roster_document=document, payload=Payload.of(payload))
        )

    def instead(self, site: str) -> tuple[bytes, bytes] | None:
        """Header and payload of what ``site`` is to be asked before anything else; None where it is in no doubt."""
        probe = self._probes.get(site)
        return None if probe is None else (probe.header, probe.payload)

    def note_asked(self, site: str, header: bytes) -> None:
        """Note that ``site`` is about to be asked this; call it before every question."""
        self._heads.ask(site, digest(header))

    def encode(self, request: messages.Request) -> bytes:
        """A request's signed header, in the protocol of the study."""
        return messages.encode(request, self.coordinator, self.study.schema_version)

    def nodes_changed(self) -> bool:
        """True where another roster has given a site another SuperNode, or taken one away; ``nodes`` is then new.

        The SuperLink follows the roster within seconds: so long after a change it is asked, once a second.
        """
        now = time.monotonic()
        if (stamp := _stamp(self.home.roster_file)) != self._roster_at:
            self._roster_at, self._looking_until = stamp, now + FOLLOW_SECONDS
        if self._look_up is None or now > self._looking_until or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        try:
            found = self._look_up()
        except TransportError:
            return False
        changed, self.nodes = dict(found) != dict(self.nodes), found
        return changed

    def removal(self, site: str) -> str | None:
        """Sentence about a site's removal from the federation, since the study began or before; None of others."""
        stamp = _stamp(self.home.removed_file)
        if stamp is None:
            return None
        if stamp != self._removed_at:
            self._removed, self._removed_at = {each.site: each for each in removed.read(self.home)}, stamp
        found = self._removed.get(site)
        return None if found is None else f"removed from the federation on {found.time[:10]}: {found.reason}"

    def decode(self, arrival: Arrival, header: bytes) -> messages.Answer:
        """The verified answer of exactly this site to exactly this request.

        Raises:
            RemovedSite: the site was removed from the federation, before this answer was read.
            TwoLedgers: it comes from another ledger than the site's answers before.
            AskAgain: it could, and the site is to be asked something new first; or it was the answer to that.
            PeerError: it is anything else.
        """
        if (why := self.removal(arrival.site)) is not None:
            raise RemovedSite(why)
        answer = messages.decode_answer(arrival.header, self._identity(arrival.site))
        unread = isinstance(answer, Refusal) and answer.study == messages.UNREAD
        study = messages.UNREAD if unread else self.study.digest
        expected = (self.roster.federation, study, arrival.site, digest(header))
        if (answer.federation, answer.study, answer.site, answer.request) != expected:
            raise PeerError("an answer to another question, study or federation, or of another site")
        if (answer.payload.size, answer.payload.sha256) != (arrival.payload.size, arrival.payload.sha256):
            raise PeerError("the payload is not the one that the header describes")
        if unread and isinstance(answer, Refusal):
            return self._explained(answer)  # of all answers the one that stands in no ledger
        self._check_head(arrival.site, answer)
        return answer

    def _check_head(self, site: str, answer: messages.Answer) -> None:
        probe = self._probes.get(site)
        probed = probe is not None and digest(probe.header) == answer.request
        short = not isinstance(answer, Update | Counts | Closing)
        try:
            self._heads.check(site, answer.request, answer.head, short=short, new=probed)
        except Doubt as doubt:
            payload = secrets.token_bytes(16)
            self._probes[site] = _Probe(self.proposal(payload), payload, answer.request)
            raise AskAgain(str(doubt)) from doubt
        if probe is not None and probed:
            self._heads.excuse(site, probe.about)
            del self._probes[site]
            raise AskAgain("its ledger goes on from what is known of it")

    def _explained(self, refusal: Refusal) -> Refusal:
        """A refusal of a request that the site could not read; where that is for want of a version, it says so."""
        number = self.study.schema_version
        if refusal.reason != "malformed" or refusal.protocol >= number:
            return refusal
        detail = (
            f"the site speaks protocol {refusal.protocol} (release 0.1), the study protocol {number}: upgrade the "
            f"site's Consilium, or start the study anew with schema_version: {refusal.protocol} in its file"
        )
        return refusal.model_copy(update={"reason": "version", "detail": detail})

    def countersignature(self, answer: Update | Closing, recorded: Recorded | None) -> str | None:
        """Countersignature of the site on the record that it was shown, verified; None where it was shown none.

        Raises:
            PeerError: it is missing, was made over something else, or there was nothing to sign.
        """
        if recorded is None:
            if answer.countersignature is not None:
                raise PeerError("a countersignature over nothing")
            return None
        if answer.countersignature is None:
            raise PeerError("the record that was shown is not countersigned")
        messages.verify_countersignature(answer.countersignature, recorded.record, self._identity(answer.site))
        return answer.countersignature

    def _identity(self, site: str) -> PublicIdentity:
        member = self.roster.member(site)
        if member is None:
            raise PeerError("not in the roster")
        return PublicIdentity.from_hex(member.identity)

    def check_wanted(self) -> None:
        """Raises Halted when somebody stopped the study."""
        state, why = self.folder.state()
        if state == "stopped":
            raise Halted(why)
        if state == "wanted":  # resumed while it ran, or stopped and resumed before this process noticed
            self.folder.set_state("running")
            self._resumed = True

    def resumed(self) -> bool:
        """True where somebody resumed the study since this was last asked."""
        resumed, self._resumed = self._resumed, False
        return resumed

    def pause(self, duration: float) -> None:
        """Sleep for so many seconds; raises Halted as ``check_wanted``, soon after the study was stopped."""
        until = time.monotonic() + duration
        self.check_wanted()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            self.check_wanted()
