"""Signed JSON documents that people hand to each other as files: invitations, requests to join, rosters, model cards.

A document is ``{"body": {...}, "signature": "<128 hex digits>"}``. The signature covers the canonical form of the body,
so a file that was only re-indented still verifies and any other edit does not.
"""

from __future__ import annotations

import json
from typing import Any

from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.limits import FILE_BYTES


def seal(body: dict[str, Any], domain: str, signer: Identity) -> bytes:
    """The document of ``body``, signed for ``domain``, as UTF-8 JSON that a person can read.

    >>> coordinator = Identity.generate()
    >>> body, signature = parse(seal({"site": "va"}, "consilium/example", coordinator))
    >>> verify(body, signature, "consilium/example", coordinator.public)
    >>> body
    {'site': 'va'}
    """
    signature = signer.sign(domain, canonical_bytes(body)).hex()
    text = json.dumps({"body": body, "signature": signature}, indent=2, sort_keys=True, ensure_ascii=False)
    return text.encode() + b"\n"


def parse(data: bytes, limit: int = FILE_BYTES) -> tuple[dict[str, Any], bytes]:
    """The body and the signature of a document of at most ``limit`` bytes, not yet verified; call ``verify`` next.

    Raises:
        PeerError: too large, not JSON, or not of the shape above.
    """
    if len(data) > limit:
        raise PeerError(f"larger than {limit} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerError("not JSON: was it cut when it was copied?") from error
    if not isinstance(value, dict) or set(value) != {"body", "signature"} or not isinstance(value["body"], dict):
        raise PeerError("not a signed document (it has a body and a signature, and nothing else)")
    return value["body"], signature_bytes(value["signature"])


def verify(body: dict[str, Any], signature: bytes, domain: str, signer: PublicIdentity) -> None:
    """Raises SignatureError unless ``signer`` signed exactly this body for ``domain``."""
    try:
        data = canonical_bytes(body)
    except ValueError as error:
        raise SignatureError("the body has no canonical form") from error
    signer.verify(domain, data, signature)


def signature_bytes(text: Any) -> bytes:
    """64 bytes of a signature in lower-case hex; raises SignatureError for anything else, so it has one spelling."""
    if isinstance(text, str) and len(text) == 128:
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if raw.hex() == text:
            return raw
    raise SignatureError("a signature is 128 lower-case hex digits")
