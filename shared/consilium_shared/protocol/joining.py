"""Joining of a site: the coordinator's invitation out, the site's request back. No secret stands in either.

Trust comes from outside: the two people compare the coordinator's fingerprint (printed by ``provision`` and by
``enroll``) and the site's (printed by ``enroll`` and by ``admit``) by telephone.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, ValidationError

from consilium_shared import documents
from consilium_shared.canonical import canonical_bytes, canonical_digest
from consilium_shared.config import Strict
from consilium_shared.errors import PeerError, SignatureError, VersionError
from consilium_shared.fields import Hex32, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.printable import printable
from consilium_shared.protocol.roster import SuperNodeKey
from consilium_shared.schema import OLDEST, SCHEMA

INVITATION_DOMAIN = "invitation"
REQUEST_DOMAIN = "join-request"
SUPERNODE_PREFIX = b"consilium/1/supernode-possession"


class Formats(Strict):
    """The contract schemas, and protocols, that a release speaks: from the oldest to the newest."""

    oldest: Annotated[int, Field(ge=1, le=1_000_000)] = OLDEST
    newest: Annotated[int, Field(ge=1, le=1_000_000)] = SCHEMA

    def check(self, whose: str) -> None:
        """Raises VersionError unless this release speaks one of them too; ``whose``: of which end they are."""
        if self.oldest > SCHEMA or self.newest < OLDEST:
            older = "here" if self.oldest > SCHEMA else f"at {whose}"
            raise VersionError(
                f"{whose} speaks protocols {self.oldest} to {self.newest}, this release {OLDEST} to {SCHEMA}, and none "
                f"is common to both: upgrade Consilium {older}"
            )


RELEASE_0_1 = Formats(oldest=1, newest=1)
"""Formats of an end that says nothing of it: there was nothing else to say."""


class Invitation(Strict):
    """Invitation of a site, with what it needs in order to join: whom to dial, whom to trust."""

    kind: Literal["consilium-invitation"] = "consilium-invitation"
    federation: Hex32
    name: Name
    site: Name
    address: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)]
    ca_certificate: Annotated[str, Field(max_length=10_000)]
    """PEM of the federation's CA."""
    ca_fingerprint: Hex32
    """SHA-256 of its DER form."""
    coordinator: Hex32
    """Ed25519 public key that signs rosters and requests."""
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Makes each invitation its own; not a secret."""
    formats: Formats | None = None
    """Formats that the coordinator speaks; None in invitations of release 0.1, which knows no such field."""

    @classmethod
    def new(
        cls, *, federation: str, name: str, site: str, address: str, port: int, ca_certificate: str, coordinator: str
    ) -> Invitation:
        """An invitation with a fresh nonce."""
        return cls(
            federation=federation,
            name=name,
            site=site,
            address=address,
            port=port,
            ca_certificate=ca_certificate,
            ca_fingerprint=certificate_fingerprint(ca_certificate),
            coordinator=coordinator,
            nonce=secrets.token_hex(16),
            formats=Formats(),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical body; the site's request repeats it."""
        return canonical_digest(self.model_dump(mode="json", exclude_none=True))

    def sign(self, coordinator: Identity) -> bytes:
        """The invitation as a signed document."""
        return documents.seal(self.model_dump(mode="json", exclude_none=True), INVITATION_DOMAIN, coordinator)


def open_invitation(data: bytes) -> Invitation:
    """The invitation of a file, checked against the coordinator's key that it names.

    The signature finds every edit but one: a forger may replace the key too. That is what comparing the fingerprint
    is for.

    Raises:
        VersionError: the coordinator speaks no protocol that this release speaks.
        PeerError: malformed, edited, or its CA fingerprint is not its CA certificate's.
    """
    body, signature = documents.parse(data)
    _check_formats(body, "the coordinator's end")
    try:
        invitation = Invitation.model_validate(body)
    except ValidationError as error:
        raise PeerError(f"not an invitation: {_first(error)}") from error
    try:
        documents.verify(body, signature, INVITATION_DOMAIN, PublicIdentity.from_hex(invitation.coordinator))
    except SignatureError as error:
        raise SignatureError("the invitation was edited after the coordinator signed it") from error
    if certificate_fingerprint(invitation.ca_certificate) != invitation.ca_fingerprint:
        raise PeerError("the CA certificate is not the one whose fingerprint the invitation gives")
    return invitation


class JoinRequest(Strict):
    """A site's request to join: its public keys, each proving that the site holds the private one."""

    kind: Literal["consilium-join-request"] = "consilium-join-request"
    federation: Hex32
    invitation: Hex32
    site: Name
    identity: Hex32
    supernode: SuperNodeKey
    supernode_possession: Annotated[str, Field(pattern=r"^[0-9a-f]{1,300}$")]
    """ECDSA-SHA384 signature (DER, hex) by that key over ``possession_bytes``."""
    formats: Formats | None = None
    """Formats that the site speaks, where the invitation says those of the coordinator; None of release 0.1."""


def make_request(invitation: Invitation, identity: Identity, supernode: ec.EllipticCurvePrivateKey) -> bytes:
    """The signed request of a site (bytes of a JSON file)."""
    proof = supernode.sign(possession_bytes(invitation.digest, identity.public.hex()), ec.ECDSA(hashes.SHA384()))
    request = JoinRequest(
        federation=invitation.federation,
        invitation=invitation.digest,
        site=invitation.site,
        identity=identity.public.hex(),
        supernode=_openssh(supernode.public_key()),
        supernode_possession=proof.hex(),
        formats=None if invitation.formats is None else Formats(),
    )
    return documents.seal(request.model_dump(mode="json", exclude_none=True), REQUEST_DOMAIN, identity)


def open_request(data: bytes) -> JoinRequest:
    """The request of a file, after both proofs of possession.

    Raises:
        VersionError: the site speaks no protocol that this release speaks.
        PeerError: malformed, edited, or the site does not hold one of its two keys.
    """
    body, signature = documents.parse(data)
    _check_formats(body, "the site's end")
    try:
        request = JoinRequest.model_validate(body)
    except ValidationError as error:
        raise PeerError(f"not a request to join: {_first(error)}") from error
    try:
        documents.verify(body, signature, REQUEST_DOMAIN, PublicIdentity.from_hex(request.identity))
    except SignatureError as error:
        raise SignatureError("the request was edited after the site signed it") from error
    try:
        key = serialization.load_ssh_public_key(request.supernode.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise PeerError("the SuperNode's key must be ECDSA on P-384")
        if _openssh(key) != request.supernode:  # base64 has several spellings of the same bytes
            raise PeerError("the SuperNode's key is not written as OpenSSH writes it")
        message = possession_bytes(request.invitation, request.identity)
        key.verify(bytes.fromhex(request.supernode_possession), message, ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise PeerError("the site does not prove that it holds its SuperNode key") from error
    return request


def _check_formats(body: dict[str, Any], whose: str) -> None:
    """Before anything else of a body is looked at: of a release without a protocol in common nothing need be known."""
    given = body.get("formats")
    try:
        formats = RELEASE_0_1 if given is None else Formats.model_validate(given)
    except ValidationError as error:
        raise PeerError(f"formats: {_first(error)}") from error
    formats.check(whose)


def possession_bytes(invitation_digest: str, identity_hex: str) -> bytes:
    """Bytes that the SuperNode's key signs, to tie it to one invitation and one identity."""
    return SUPERNODE_PREFIX + canonical_bytes({"identity": identity_hex, "invitation": invitation_digest})


def certificate_fingerprint(pem: str) -> str:
    """SHA-256 of a PEM certificate's DER form; raises PeerError when it is none."""
    try:
        return x509.load_pem_x509_certificate(pem.encode()).fingerprint(hashes.SHA256()).hex()
    except ValueError as error:
        raise PeerError("the CA certificate cannot be read") from error


def _openssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def _first(error: ValidationError) -> str:
    item: Any = error.errors()[0]
    return printable(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}")
