"""Studies that the coordinator proposed to this site, kept as they came; what was decided on them is in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError, VersionError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.identity import PublicIdentity
from consilium_shared.study import Study


@dataclass(frozen=True)
class Proposal:
    """A verified proposal."""

    study: Study
    roster: str
    """Digest of the roster that it came with; every later message of the study must carry the same."""
    identities: dict[str, PublicIdentity]
    """Site to identity key, of that roster."""


class Proposals:
    """One file a study, named by its digest: what may be decided on, and apart from it what was refused unseen."""

    def __init__(self, folder: Path, refused: Path) -> None:
        self.folder = folder
        self.refused = refused
        for each in (folder, refused):
            remove_leftovers(each)

    def put(self, proposal: Proposal) -> None:
        """Keep a proposal; one that is there already is left as it is. Raises as ``has``."""
        if not self.has(proposal):
            self._write(self.folder, proposal)
            (self.refused / f"{proposal.study.digest}.json").unlink(missing_ok=True)

    def put_refused(self, proposal: Proposal) -> None:
        """Keep a proposal that the policy forbids, to be looked at: the last ``limits.REFUSED_PROPOSALS`` of them."""
        if self.has(proposal):
            return
        self._write(self.refused, proposal)
        oldest = sorted(self.refused.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        for file in oldest[: -limits.REFUSED_PROPOSALS]:
            file.unlink(missing_ok=True)

    def _write(self, folder: Path, proposal: Proposal) -> None:
        content = {"contract": proposal.study.contract, "roster": proposal.roster}
        content["identities"] = {site: public.hex() for site, public in proposal.identities.items()}
        write_atomically(folder / f"{proposal.study.digest}.json", canonical_bytes(content))

    def has(self, proposal: Proposal) -> bool:
        """True where this proposal is kept.

        Raises:
            PeerError: the same study came before with another roster.
        """
        known = self.get(proposal.study.digest)
        if known is not None and known != proposal:
            raise PeerError("this study was proposed before with another roster; give the new one a new version")
        return known is not None

    def digests(self) -> list[str]:
        """The studies that may be decided on, by digest; nothing is read."""
        return [file.stem for file in self.folder.glob("*.json")]

    def get(self, digest: str) -> Proposal | None:
        """The proposal of a study's digest that may be decided on, or None."""
        return _read(self.folder / f"{digest}.json")

    def all(self) -> list[Proposal]:
        """Every proposal, by name and version; also those refused."""
        files = {file.stem: file for folder in (self.refused, self.folder) for file in folder.glob("*.json")}
        found = [_read(file) for file in files.values()]
        return sorted((p for p in found if p is not None), key=lambda p: (p.study.study, p.study.version))

    def find(self, name: str) -> Proposal:
        """The proposal of a study's name, or of the beginning of its digest.

        Raises:
            ConfigurationError: none, or several.
        """
        found = [p for p in self.all() if p.study.study == name or (len(name) >= 6 and p.study.digest.startswith(name))]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ConfigurationError(f"no study {name!r} was proposed here; consilium-site studies lists what was")
        digests = ", ".join(f"{p.study.digest[:12]} (version {p.study.version})" for p in found)
        raise ConfigurationError(f"several studies are named {name!r}; name one by its digest: {digests}")


def _read(file: Path) -> Proposal | None:
    try:
        content: dict[str, Any] = parse_canonical(file.read_bytes())
        study = Study.from_contract(content["contract"])
        identities = {site: PublicIdentity.from_hex(key) for site, key in content["identities"].items()}
    except FileNotFoundError:
        return None
    except VersionError as error:
        raise IntegrityError(f"{file} was written by a later release: {error}") from error
    except (PeerError, KeyError) as error:
        raise IntegrityError(f"{file} is damaged; delete it, and the coordinator proposes again") from error
    if study.digest != file.stem:
        raise IntegrityError(f"{file} is not the study of its name; delete it, and the coordinator proposes again")
    return Proposal(study, content["roster"], identities)
