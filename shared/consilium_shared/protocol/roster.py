"""Roster: the federation's sites with their keys, signed by the coordinator."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from consilium_shared import documents, limits
from consilium_shared.canonical import canonical_digest
from consilium_shared.config import Strict
from consilium_shared.errors import PeerError
from consilium_shared.fields import Hex32, Name
from consilium_shared.identity import Identity, PublicIdentity

DOMAIN = "roster"
SuperNodeKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==$")]
"""OpenSSH ECDSA P-384 public key: type and base64, no comment, so that the same key is the same text."""


class Member(Strict):
    """One admitted site."""

    site: Name
    identity: Hex32
    """Ed25519 public key that signs the site's answers and ledger."""
    supernode: SuperNodeKey
    """Public key with which the site's SuperNode authenticates to the SuperLink."""


class Roster(Strict):
    """The members, sorted by name; ``version`` grows by one with every change."""

    federation: Hex32
    version: Annotated[int, Field(ge=1, le=1_000_000)]
    members: Annotated[tuple[Member, ...], Field(max_length=limits.SITES)]

    @model_validator(mode="after")
    def _sorted_and_distinct(self) -> Roster:
        names = [member.site for member in self.members]
        if names != sorted(set(names)):
            raise ValueError("members must be sorted by name, each once")
        for field in ("identity", "supernode"):
            values = [getattr(member, field) for member in self.members]
            if len(set(values)) != len(values):
                raise ValueError(f"two members have the same {field} key")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical body, with exactly the keys given; every message of a study carries it."""
        return canonical_digest(self.model_dump(mode="json", exclude_unset=True))

    def member(self, site: str) -> Member | None:
        """The member of that name, or None."""
        return next((member for member in self.members if member.site == site), None)

    def sign(self, coordinator: Identity) -> bytes:
        """The roster as a signed document (bytes of a JSON file)."""
        return documents.seal(self.model_dump(mode="json", exclude_unset=True), DOMAIN, coordinator)


def open_roster(data: bytes, coordinator: PublicIdentity, federation: str) -> Roster:
    """The roster of a signed document.

    Raises:
        SignatureError: not signed by this coordinator, or edited since.
        PeerError: malformed, or of another federation.
    """
    body, signature = documents.parse(data)
    documents.verify(body, signature, DOMAIN, coordinator)
    return parse_roster(body, federation)


def parse_roster(body: Any, federation: str) -> Roster:
    """A roster's body that is already verified; raises PeerError when malformed or of another federation."""
    try:
        roster = Roster.model_validate(body)
    except ValidationError as error:
        raise PeerError(f"roster: {error.errors()[0]['msg']}") from error
    if roster.federation != federation:
        raise PeerError("roster: it belongs to another federation")
    return roster
