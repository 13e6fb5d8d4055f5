"""The coordinator's own files: federation.yaml, the layout of the home folder, and how they are written."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from consilium_shared import limits
from consilium_shared.canonical import canonical_digest
from consilium_shared.config import Strict, load_yaml
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.fields import Name
from consilium_shared.identity import Identity
from consilium_shared.process.notices import Notify
from consilium_shared.protocol.roster import Roster, open_roster


def _address(text: str) -> str:
    """A name, or an IP address of either version as a literal."""
    if ":" in text:
        try:
            return str(ipaddress.IPv6Address(text))
        except ValueError:
            raise ValueError(
                f"{text!r} is no IPv6 address; write it without brackets and port, as fd00::5 or ::1"
            ) from None
    return text


Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9:])?$"), AfterValidator(_address)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Federation(Strict):
    """federation.yaml: how the sites reach the coordinator, and who is invited."""

    federation: Name
    address: Host
    """Name or IP address that the sites dial; it goes into the certificate."""
    port: Port = 8443
    also_known_as: tuple[Host, ...] = ()
    """More names or addresses for the certificate."""
    listen: Host = "0.0.0.0"  # noqa: S104  (the fleet interface is the one that sites must reach)
    private_port: Port = 8444
    """Loopback port of Flower's control and runtime interfaces."""
    notify: Notify | None = None
    """Receivers of notices about sites and studies."""
    sites: Annotated[tuple[Name, ...], Field(min_length=1, max_length=limits.SITES)]

    @model_validator(mode="after")
    def _distinct(self) -> Federation:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("sites: a name stands twice")
        if self.port == self.private_port:
            raise ValueError("port and private_port must differ")
        return self


@dataclass(frozen=True)
class Home:
    """Paths of everything of the coordinator."""

    root: Path

    @property
    def federation_file(self) -> Path:
        """The copy of federation.yaml that was provisioned."""
        return self.root / "federation.yaml"

    @property
    def keys(self) -> Path:
        """coordinator.key, ca.key, ca.crt, superlink.key, superlink.crt."""
        return self.root / "keys"

    @property
    def invitations(self) -> Path:
        """One <site>.json for each invited site."""
        return self.root / "invitations"

    @property
    def earlier_invitations(self) -> Path:
        """Invitations before the federation moved, each under its digest."""
        return self.invitations / "earlier"

    @property
    def roster_file(self) -> Path:
        """The signed roster of today."""
        return self.root / "roster.json"

    @property
    def removed_file(self) -> Path:
        """The signed list of sites that were removed."""
        return self.root / "removed.json"

    @property
    def rotations(self) -> Path:
        """Folder of the sites' signed requests for other SuperNode keys, as they were admitted."""
        return self.root / "rotations"

    @property
    def studies(self) -> Path:
        """One folder a study."""
        return self.root / "studies"

    @property
    def models(self) -> Path:
        """The registry of finished models."""
        return self.root / "models"

    @property
    def heads(self) -> Path:
        """Folder of what each site's answers said of its ledger."""
        return self.root / "heads"

    @property
    def logs(self) -> Path:
        """Logs of the supervised programs."""
        return self.root / "log"

    @property
    def run(self) -> Path:
        """Locks and process ids."""
        return self.root / "run"

    def federation(self) -> Federation:
        """Federation that was provisioned; raises ConfigurationError when nothing was."""
        if not self.federation_file.exists():
            raise ConfigurationError(
                f"{self.root} holds no federation: name its home with --home or CONSILIUM_SERVER_HOME; a new one is "
                f"made by consilium-server provision federation.yaml --home {self.root}"
            )
        return load_yaml(self.federation_file, Federation)

    def coordinator(self) -> Identity:
        """The coordinator's signing key."""
        return Identity.load(self.keys / "coordinator.key")

    def federation_id(self) -> str:
        """64 hex digits: the digest of the coordinator's key and the federation's name."""
        return federation_id(self.federation().federation, self.coordinator())

    def roster(self) -> Roster:
        """The signed roster, verified; raises ConfigurationError when it was edited, or no federation has its home
        here."""
        identifier = self.federation_id()
        try:
            return open_roster(self.roster_file.read_bytes(), self.coordinator().public, identifier)
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.roster_file}: {error.strerror}") from error
        except PeerError as error:
            raise ConfigurationError(
                f"{self.roster_file}: {error}. It was edited or damaged: restore it from a backup, then admit again "
                "the sites that came later"
            ) from error


def federation_id(name: str, coordinator: Identity) -> str:
    """64 hex digits that no other coordinator can claim: SHA-256 over the coordinator's key and the name."""
    return canonical_digest({"coordinator": coordinator.public.hex(), "federation": name})
