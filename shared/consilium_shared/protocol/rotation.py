"""Rotation of a site's SuperNode key: the site's request, which both keys and the site's identity sign.

The identity stays, and with it the ledger; the roster's line gets the new key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, ValidationError

from consilium_shared import documents
from consilium_shared.canonical import canonical_bytes
from consilium_shared.config import Strict
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.fields import Hex32, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.protocol.roster import SuperNodeKey

DOMAIN = "supernode-rotation"
PREFIX = b"consilium/1/supernode-rotation"

Proof = Annotated[str, Field(pattern=r"^[0-9a-f]{1,300}$")]
"""ECDSA-SHA384 signature (DER, hex) over ``proof_bytes``."""


class Rotation(Strict):
    """Request of a site that its SuperNode be known by another key."""

    kind: Literal["consilium-rotation"] = "consilium-rotation"
    federation: Hex32
    site: Name
    identity: Hex32
    old: SuperNodeKey
    new: SuperNodeKey
    new_proof: Proof
    """Made by the new key."""
    old_proof: Proof | None = None
    """Made by the old key; None where that was lost, and the identity alone vouches for the new one."""


def make(
    federation: str,
    site: str,
    identity: Identity,
    old: str,
    new: ec.EllipticCurvePrivateKey,
    old_key: ec.EllipticCurvePrivateKey | None,
) -> bytes:
    """The signed request (bytes of a JSON file).

    Args:
        federation, site: the site's, as in its invitation.
        identity: that signs the site's answers and ledger.
        old: public key (OpenSSH) that the roster has.
        new: key that it shall have.
        old_key: private half of ``old``, where it is not lost.
    """
    public = openssh(new.public_key())
    message = proof_bytes(federation, site, old, public)
    how = ec.ECDSA(hashes.SHA384())
    request = Rotation(
        federation=federation,
        site=site,
        identity=identity.public.hex(),
        old=old,
        new=public,
        new_proof=new.sign(message, how).hex(),
        old_proof=None if old_key is None else old_key.sign(message, how).hex(),
    )
    return documents.seal(request.model_dump(mode="json", exclude_none=True), DOMAIN, identity)


def is_rotation(data: bytes) -> bool:
    """True where a file says that it is such a request; nothing of it is verified."""
    try:
        return documents.parse(data)[0].get("kind") == "consilium-rotation"
    except PeerError:
        return False


def open_rotation(data: bytes) -> Rotation:
    """The request of a file, after every proof that it has.

    Raises:
        PeerError: malformed, edited, or a key did not sign.
    """
    body, signature = documents.parse(data)
    try:
        request = Rotation.model_validate(body)
    except ValidationError as error:
        item: Any = error.errors()[0]
        raise PeerError(f"not a rotation: {item['msg']}") from error
    try:
        documents.verify(body, signature, DOMAIN, PublicIdentity.from_hex(request.identity))
    except SignatureError as error:
        raise SignatureError("the rotation was edited after the site signed it") from error
    message = proof_bytes(request.federation, request.site, request.old, request.new)
    _prove(request.new, request.new_proof, message, "new")
    if request.old_proof is not None:
        _prove(request.old, request.old_proof, message, "old")
    return request


def _prove(public: str, proof: str, message: bytes, which: str) -> None:
    try:
        key = serialization.load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or openssh(key) != public:
            raise ValueError
        key.verify(bytes.fromhex(proof), message, ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise PeerError(f"the site does not prove that it holds the {which} SuperNode key") from error


def proof_bytes(federation: str, site: str, old: str, new: str) -> bytes:
    """Bytes that both keys sign."""
    return PREFIX + canonical_bytes({"federation": federation, "new": new, "old": old, "site": site})


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as the roster has it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")
