"""Key agreement, derivation and sealing: X25519 (RFC 7748), HKDF-SHA-256 (RFC 5869), AES-256-GCM (SP 800-38D).

Every derived key names what it is for and the terms under which it holds, and is used once.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import PeerError

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE = bytes(12)
"""Nonce of a key that seals one message."""
_FIELD = 2**255 - 19
"""Prime of the field of X25519; a public key has another spelling only from here on."""


def derive(secret: bytes, purpose: str, *about: str) -> bytes:
    """A 32-byte key from ``secret``, for ``purpose`` and whatever else it depends on; other words, another key."""
    info = canonical_bytes(["consilium-secagg/1", purpose, *about])
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def stream(secret: bytes, length: int, purpose: str, *about: str) -> bytes:
    """``length`` pseudorandom bytes (AES-256 in counter mode under a key of ``derive``)."""
    cipher = Cipher(algorithms.AES256(derive(secret, purpose, *about)), modes.CTR(bytes(16))).encryptor()
    return cipher.update(bytes(length))


def private_key(seed: bytes, purpose: str) -> X25519PrivateKey:
    """The X25519 key that follows from a secret seed."""
    return X25519PrivateKey.from_private_bytes(derive(seed, purpose))


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The 32 bytes that both ends of an X25519 exchange share; to be derived from, never used as they are.

    Raises:
        PeerError: a public key that is malformed, not in its one canonical spelling (two sites could show the same), or
            of low order (the result would not depend on our key).
    """
    try:
        if int.from_bytes(public, "little") >= _FIELD:
            raise ValueError("not canonical")
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PeerError("a public key of no use") from error


def check_public(public: bytes) -> None:
    """Raises PeerError for an X25519 public key with which nobody can agree on a secret."""
    agree(X25519PrivateKey.generate(), public)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Ciphertext of ``text``, with a tag over it and ``about``: 16 bytes longer. ``key`` seals nothing else, ever.

    >>> unseal(bytes(32), seal(bytes(32), b"share", b"from va to bremen"), b"from va to bremen")
    b'share'
    """
    return AESGCM(key).encrypt(_NONCE, text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Plaintext that ``seal`` was given; raises PeerError when anything was altered."""
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, about)
    except InvalidTag as error:
        raise PeerError("a sealed share that was altered, or is for somebody or something else") from error
