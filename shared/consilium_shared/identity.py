"""Ed25519 identities (RFC 8032): who signed what, under which label.

Every signature covers a domain label, so that a signature made for one purpose never serves another.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consilium_shared.canonical import digest
from consilium_shared.errors import ConfigurationError, SignatureError

PREFIX = b"consilium/1/"

_FIELD = 2**255 - 19
_ORDER_8 = 0x5FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER = {0, 1, _FIELD - 1, _ORDER_8, _FIELD - _ORDER_8}
"""The y of the eight points of order 1, 2, 4 and 8 (RFC 8032, section 5.1): for such a key anybody can sign."""


def _labelled(domain: str, data: bytes) -> bytes:
    label = domain.encode("ascii")
    return PREFIX + bytes([len(label)]) + label + data


@dataclass(frozen=True)
class PublicIdentity:
    """A verifying key: 32 raw bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise SignatureError("an Ed25519 public key has 32 bytes")

    @classmethod
    def from_hex(cls, text: str) -> PublicIdentity:
        """Raises SignatureError unless ``text`` is 64 lower-case hex digits."""
        try:
            raw = bytes.fromhex(text)
        except ValueError as error:
            raise SignatureError("a public key is 64 hex digits") from error
        if raw.hex() != text:
            raise SignatureError("a public key is 64 lower-case hex digits")
        return cls(raw)

    def hex(self) -> str:
        """The key as 64 lower-case hex digits."""
        return self.raw.hex()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key in groups of four digits, for comparing over the telephone."""
        text = digest(self.raw)
        return " ".join(text[i : i + 4] for i in range(0, 32, 4))

    def verify(self, domain: str, data: bytes, signature: bytes) -> None:
        """Raises SignatureError unless ``signature`` (64 bytes) was made over ``data`` for ``domain`` by this key.

        No signature counts under a key of small order: anybody could have made it.
        """
        try:
            if int.from_bytes(self.raw, "little") % 2**255 % _FIELD in _SMALL_ORDER:
                raise ValueError("small order")
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _labelled(domain, data))
        except (InvalidSignature, ValueError) as error:
            raise SignatureError(f"signature over {domain} does not verify") from error


class Identity:
    """A signing key. It has no representation that shows the secret.

    >>> key = Identity.generate()
    >>> signature = key.sign("example", b"text")
    >>> key.public.verify("example", b"text", signature)
    >>> key.public.verify("another purpose", b"text", signature)
    Traceback (most recent call last):
    consilium_shared.errors.SignatureError: signature over another purpose does not verify
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = PublicIdentity(raw)

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a PKCS #8 PEM file.

        Raises:
            ConfigurationError: no such file, not an Ed25519 key, or readable by others (mode must be 0600).
        """
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigurationError(f"{path} is readable by others; run: chmod 600 {path}")
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigurationError(f"cannot read the key {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{path} is not a private key in PEM form") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path} is not an Ed25519 key")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write as PKCS #8 PEM, mode 0600; never overwrites.

        Raises:
            ConfigurationError: the file exists already or cannot be written.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(path, pem)

    def sign(self, domain: str, data: bytes) -> bytes:
        """64-byte signature over ``data`` for ``domain``."""
        return self._key.sign(_labelled(domain, data))

    def __repr__(self) -> str:
        return f"Identity({self.public.hex()[:8]}…)"


def write_secret(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600, durably, whole or not at all.

    Raises:
        ConfigurationError: it exists, or cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it replaces nothing
    except OSError as error:
        raise ConfigurationError(f"cannot create {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink()
