"""A study's folder at the coordinator: the contract, the pinned roster, the state, the events as they come.

studies/<name>/study.json       contract and roster document (written once)
               start.safetensors    the weights that it starts from, where the contract names some (written once)
               state.json       wanted | running | finished | stopped | failed, and why
               run              number of its run at the SuperLink
               events.jsonl     one line an event; ``run`` and ``status`` read it
               checkpoint.*     after every round
               rounds/NNNN.json signed record of each round
               closing/<site>.json   each site's signed answer to the last record
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from consilium_server.federation import Home
from consilium_shared import documents
from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Closing, Recorded
from consilium_shared.protocol.records import RECORD_DOMAIN, RoundRecord, open_record
from consilium_shared.protocol.roster import Roster, open_roster
from consilium_shared.study import Study

State = Literal["wanted", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class StudyFolder:
    """One study's files."""

    root: Path

    @property
    def name(self) -> str:
        """The study's name."""
        return self.root.name

    def create(self, study: Study, roster_document: bytes, start: bytes | None = None) -> None:
        """Pin contract and roster; a folder that has the same contract already is left as it is.

        Args:
            study: the contract.
            roster_document: the roster as it is signed now.
            start: the model before round 1 (``vector.pack``), where the contract names one.

        Raises:
            ConfigurationError: a study of that name with another contract was started here before.
        """
        file = self.root / "study.json"
        if file.exists():
            if (known := self.study()).digest != study.digest:
                schema = known.schema_version
                older = (
                    f". That one is of contract schema {schema}; go on with it: consilium-server resume {study.study}"
                )
                raise ConfigurationError(
                    f"study {study.study} was started here before with another contract; give the new one another "
                    f"name, as {study.study}-v{study.version + (study.version == known.version)} (hospitals approve "
                    "one exact contract; version is what they read beside its name)"
                    + (older if schema < study.schema_version else "")
                )
            return
        if start is not None:
            write_atomically(self._start_file, start)
        content = {"contract": study.contract, "roster": json.loads(roster_document)}
        write_atomically(file, canonical_bytes(content))

    def _content(self) -> dict[str, Any]:
        file = self.root / "study.json"
        try:
            content: dict[str, Any] = parse_canonical(file.read_bytes())
        except FileNotFoundError as error:
            raise ConfigurationError(f"no study {self.name!r} here; consilium-server status lists them") from error
        except (OSError, PeerError) as error:
            raise IntegrityError(f"{file}: {error}; restore it from a backup") from error
        return content

    def study(self) -> Study:
        """The contract."""
        return Study.from_contract(self._content()["contract"])

    @property
    def _start_file(self) -> Path:
        return self.root / "start.safetensors"

    def start(self) -> bytes | None:
        """The model before round 1 as it was given; None where the contract names none.

        Raises:
            IntegrityError: the file is missing or unreadable.
        """
        if self.study().model.start is None:
            return None
        try:
            return self._start_file.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{self._start_file}: {error.strerror}; restore it from a backup") from error

    def roster_document(self) -> dict[str, Any]:
        """The roster as it was signed when the study began."""
        document: dict[str, Any] = self._content()["roster"]
        return document

    def roster(self, home: Home) -> Roster:
        """The pinned roster, verified."""
        data = json.dumps(self.roster_document()).encode()
        return open_roster(data, home.coordinator().public, home.federation_id())

    def state(self) -> tuple[State, str]:
        """The state and, where there is one, the reason in words."""
        try:
            value = parse_canonical((self.root / "state.json").read_bytes())
        except FileNotFoundError:
            return "stopped", "never started"
        except (OSError, PeerError) as error:
            raise IntegrityError(
                f"{self.root / 'state.json'}: {error}; delete it, then: consilium-server resume {self.name}"
            ) from error
        return value["state"], value["why"]

    def set_state(self, state: State, why: str = "") -> None:
        """Write the state durably and as an event."""
        write_atomically(self.root / "state.json", canonical_bytes({"state": state, "why": why}))
        self.event("state", state=state, why=why)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; a torn last line is ended first, so that one crash spoils one line at most."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, allow_nan=False) + "\n"
        file = self.root / "events.jsonl"
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = "\n" + line
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    def events(self, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Events from byte ``start``, each with the offset behind it; an unfinished or torn line is passed over."""
        try:
            with (self.root / "events.jsonl").open("rb") as file:
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    start += len(line)
                    try:
                        event = json.loads(line)
                    except ValueError:
                        continue
                    yield start, event
        except FileNotFoundError:
            return

    def write_record(self, record: dict[str, Any], coordinator: Identity) -> None:
        """Sign and keep the record of one round."""
        RoundRecord.model_validate(record)  # never sign what an auditor's program could not read
        write_atomically(self.record_file(record["round"]), documents.seal(record, RECORD_DOMAIN, coordinator))

    def record_file(self, number: int) -> Path:
        """File of the record of a round."""
        return self.root / "rounds" / f"{number:04d}.json"

    def recorded(self, number: int, coordinator: Identity) -> Recorded:
        """Part of the record of a round that the sites are shown.

        Raises:
            IntegrityError: it was edited or is missing.
        """
        file = self.record_file(number)
        try:
            data = file.read_bytes()
            return Recorded(round=number, record=digest(data), heads=open_record(data, coordinator.public).heads)
        except (OSError, PeerError) as error:
            raise IntegrityError(f"{file}: {error}") from error

    def keep_closing(self, site: str, header: bytes) -> None:
        """Keep a site's ``Closing``, which the caller has verified, as it was signed."""
        write_atomically(self.root / "closing" / f"{site}.json", header)

    def closings(self, roster: Roster) -> dict[str, tuple[bytes, Closing]]:
        """Every site's closing, signed header and content, verified, by site.

        Raises:
            IntegrityError: one was edited.
        """
        found: dict[str, tuple[bytes, Closing]] = {}
        for file in sorted((self.root / "closing").glob("*.json")):
            member, header = roster.member(file.stem), file.read_bytes()
            try:
                if member is None:
                    raise PeerError("not in the roster")
                answer = messages.decode_answer(header, PublicIdentity.from_hex(member.identity))
                if not isinstance(answer, Closing) or answer.site != member.site:
                    raise PeerError("not a closing of this site")
            except PeerError as error:
                raise IntegrityError(f"{file}: {error}") from error
            found[member.site] = header, answer
        return found

    def records(self, coordinator: Identity) -> list[dict[str, Any]]:
        """The records of all finished rounds in order, verified.

        Raises:
            IntegrityError: one was edited or is missing.
        """
        found: list[dict[str, Any]] = []
        files = sorted((self.root / "rounds").glob("*.json"), key=lambda file: (len(file.name), file.name))
        for number, file in enumerate(files, start=1):
            try:
                body, signature = documents.parse(file.read_bytes())
                documents.verify(body, signature, RECORD_DOMAIN, coordinator.public)
            except PeerError as error:
                raise IntegrityError(f"{file}: {error}") from error
            if body.get("round") != number:
                raise IntegrityError(f"{file}: the record of round {number} is missing")
            found.append(body)
        return found


def folder(home: Home, name: str) -> StudyFolder:
    """The folder of a study by name; raises ConfigurationError for a name that is not one."""
    if not name or "/" in name or name.startswith("."):
        raise ConfigurationError(f"{name!r} is not a study's name")
    return StudyFolder(home.studies / name)


def all_folders(home: Home) -> list[StudyFolder]:
    """Every study that was ever started here, by name."""
    return [StudyFolder(path.parent) for path in sorted(home.studies.glob("*/study.json"))]
