"""Store key of a site: the secret from which the keys of all files of the prepared store are derived."""

from __future__ import annotations

import secrets
from pathlib import Path

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consilium_shared.errors import ConfigurationError, IntegrityError
from consilium_shared.identity import write_secret

KEY_BYTES = 32
_FILE = b"consilium prepared store 1 file"
_NAME = b"consilium prepared store 1 name"


class StoreKey:
    """Secret of 32 bytes. It has no representation that shows it.

    >>> key = StoreKey(bytes(32))
    >>> key.name("a patient's file") == StoreKey(bytes(32)).name("a patient's file")
    True
    >>> key
    StoreKey(…)
    """

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError unless the secret has 32 bytes."""
        if len(secret) != KEY_BYTES:
            raise ValueError("a store key has 32 bytes")
        self._secret = secret

    @classmethod
    def at(cls, path: Path) -> StoreKey:
        """The key in a file of 64 hex digits, mode 0600; where there is none, a new one is made.

        With another key nothing of the store can be read any more: it is prepared anew, and nothing else is lost.

        Raises:
            ConfigurationError: the file cannot be read or made, or others may read it.
            IntegrityError: it holds no key.
        """
        try:
            if not path.exists():
                write_secret(path, secrets.token_bytes(KEY_BYTES).hex().encode())
            if path.stat().st_mode & 0o077:
                raise ConfigurationError(f"{path} is readable by others; run: chmod 600 {path}")
            return cls(bytes.fromhex(path.read_text("ascii").strip()))
        except OSError as error:
            raise ConfigurationError(f"cannot read the key {path}: {error.strerror}") from error
        except ValueError as error:
            raise IntegrityError(
                f"{path} holds no key of the prepared store; delete it, and the site's data is prepared anew"
            ) from error

    def of_file(self, salt: bytes) -> bytes:
        """Key of one file, 32 bytes, by HKDF-SHA-256 (RFC 5869) from the file's own random salt."""
        return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=_FILE).derive(self._secret)

    def name(self, text: str) -> str:
        """Name on the disk for something that a name in clear would tell of: 32 hex digits of an HMAC-SHA-256."""
        made = hmac.HMAC(self._secret, hashes.SHA256())
        made.update(_NAME + b"\0" + text.encode())
        return made.finalize()[:16].hex()

    def __repr__(self) -> str:
        return "StoreKey(…)"
