"""The one byte encoding of everything that is hashed or signed: JSON Canonicalization Scheme (RFC 8785)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import rfc8785

from consilium_shared.errors import PeerError


def canonical_bytes(value: Any) -> bytes:
    r"""RFC 8785 encoding of JSON-like data.

    >>> canonical_bytes({"b": 1.0, "a": ["ε", None]})
    b'{"a":["\xce\xb5",null],"b":1}'

    Raises:
        ValueError: something in it has no canonical form (NaN, an infinity, an integer beyond ±(2^53-1), a key that
            is not text).
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise ValueError(f"no canonical form: {error}") from error


def parse_canonical(data: bytes) -> Any:
    """The value whose canonical encoding is exactly ``data``.

    Refusing every other spelling (white space, key order, duplicate keys, number formats) means that what was
    signed and what is read cannot differ.

    >>> parse_canonical(b'{"rounds":3}')
    {'rounds': 3}
    >>> parse_canonical(b'{"rounds": 3}')
    Traceback (most recent call last):
    consilium_shared.errors.PeerError: JSON is not in canonical form

    Raises:
        PeerError: ``data`` is not UTF-8 JSON in canonical form.
    """
    try:
        value = json.loads(data.decode("utf-8"))
        again = rfc8785.dumps(value)
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise PeerError("not canonical JSON") from error
    if again != data:
        raise PeerError("JSON is not in canonical form")
    return value


def digest(data: bytes) -> str:
    """SHA-256 (FIPS 180-4) of bytes, as 64 lower-case hex digits.

    >>> digest(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(data).hexdigest()


def canonical_digest(value: Any) -> str:
    """SHA-256 of the canonical encoding, as 64 lower-case hex digits."""
    return digest(canonical_bytes(value))
