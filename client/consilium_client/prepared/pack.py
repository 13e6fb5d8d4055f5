"""Pack: a file of records of one size, encrypted and authenticated in chunks, read and decrypted a chunk at a time.

The format, version 1 (``docs/decisions/0024-prepared-store.md``)::

    head     canonical JSON of ``Head``, ended by a newline
    index    AES-256-GCM of bytes that say what the records are
    chunks   AES-256-GCM of ``chunk`` records each, the last of what is left

A file has a key of its own, derived from the site's store key and the salt in its head. The nonce is a counter, 0 for
the index, from 1 for the chunks; the head is authenticated with each. So no piece can be altered, moved, left out or
taken from another file unseen.

A chunk is read, not mapped: of a file that was cut off under a map, or whose disk fails, the system tells by ending the
process.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from consilium_client.prepared.key import KEY_BYTES, StoreKey
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.fields import Hex32
from consilium_shared.files import write_pieces_atomically

HEAD_BYTES = 4096
"""Longest head."""
CHUNK_BYTES = 2**14
"""Small records share a chunk of about so many bytes: whoever wants one decrypts all of it."""
_TAG = 16
_NONCE = 12
_Size = Annotated[int, Field(ge=0, le=2**48)]


class DamagedPack(IntegrityError):
    """A file of the store cannot be used: it is damaged, of another release's format, or under another key."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} cannot be decrypted: it is damaged or was written under another key. What was in it is prepared "
            "anew when the study's data is next read"
        )


class Head(Strict):
    """First line of a pack.

    Attributes:
        about: digest of what the records are; a file is read as nothing else.
        salt: of the file's key.
        index: bytes of the index.
        records: number of records.
        record: bytes of one.
        chunk: records of a chunk.
    """

    format: Literal["consilium-pack"] = "consilium-pack"
    version: Literal[1] = 1
    about: Hex32
    salt: Hex32
    index: _Size
    records: _Size
    record: _Size
    chunk: Annotated[int, Field(ge=1, le=2**48)]

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.records // self.chunk)

    @property
    def size(self) -> int:
        """Bytes of the file after its head."""
        return self.index + _TAG + self.records * self.record + self.chunks * _TAG


def write_pack(path: Path, key: StoreKey, about: str, index: bytes, records: NDArray[np.uint8] | None = None) -> None:
    """Write a pack durably, whole or not at all, mode 0600; nothing of it is on the disk in clear at any time.

    Args:
        path: the file; one that is there is replaced.
        key: the site's.
        about: digest of what the records are, 64 hex digits.
        index: what the records are; it is encrypted, too.
        records: uint8 ``[N, bytes of one]``; None for an index alone.
    """
    rows = np.zeros((0, 0), dtype=np.uint8) if records is None else np.ascontiguousarray(records)
    count, record = rows.shape
    salt = secrets.token_bytes(KEY_BYTES)
    head = Head(
        about=about,
        salt=salt.hex(),
        index=len(index),
        records=count,
        record=record,
        chunk=max(1, CHUNK_BYTES // max(record, 1)),
    )
    line = canonical_bytes(head.model_dump(mode="json")) + b"\n"
    cipher = AESGCM(key.of_file(salt))

    def pieces() -> Iterator[bytes]:
        yield line
        yield cipher.encrypt(_nonce(0), index, line)
        for number in range(head.chunks):
            part = rows[number * head.chunk : (number + 1) * head.chunk]
            yield cipher.encrypt(_nonce(number + 1), part.data, line)

    write_pieces_atomically(path, pieces())


class Pack:
    """A pack that is open for reading.

    Safe to use from several threads. The file may be deleted meanwhile.

    Attributes:
        path: the file.
        head: its first line.
        index: decrypted.
        intact: False once a chunk could not be decrypted.
    """

    def __init__(self, path: Path, key: StoreKey, about: str | None) -> None:
        """Opens a pack. ``about``: digest of what its records must be; None: whatever they are.

        Raises:
            DamagedPack: the file is damaged, about something else, or under another key.
            FileNotFoundError: there is no such file.
            OSError: it cannot be read.
        """
        self.path, self.intact = path, True
        with path.open("rb") as file:
            self._line = file.readline(HEAD_BYTES)
            try:
                self.head = Head.model_validate(parse_canonical(self._line[:-1]))
            except (PeerError, ValidationError):
                raise DamagedPack(path) from None
            whole = len(self._line) + self.head.size
            if self._line[-1:] != b"\n" or os.fstat(file.fileno()).st_size != whole:
                raise DamagedPack(path)
            if about not in (None, self.head.about):
                raise DamagedPack(path)
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._cipher = AESGCM(key.of_file(bytes.fromhex(self.head.salt)))
        self._start = len(self._line) + self.head.index + _TAG
        sealed = bytearray(self._start - len(self._line))
        try:
            self._take(len(self._line), memoryview(sealed))
            self.index = self._cipher.decrypt(_nonce(0), sealed, self._line)
        except InvalidTag:
            raise DamagedPack(path) from None

    def __len__(self) -> int:
        return self.head.records

    def read(self, numbers: NDArray[np.int64], out: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        """Decrypt records into rows of an array.

        Args:
            numbers: int64 ``[n]``, of the records.
            out: uint8 ``[N, bytes of one]``, contiguous.
            places: int64 ``[n]``, the row of ``out`` into which each goes.

        Raises:
            DamagedPack: a chunk was altered or cut off, or cannot be read. Nothing of it is used; an altered file is
                deleted.
        """
        size, chunk = self.head.record, self.head.chunk
        of = numbers // chunk
        wanted = np.unique(of).tolist()
        for number in wanted:  # the disk is asked for all of them before the first is waited for
            start, end = self._range(number)
            os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)
        if chunk == 1:
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
                self._decrypt(number, out[place])
        else:
            for number in wanted:
                here = np.flatnonzero(of == number)
                rows = np.empty((min(chunk, len(self) - number * chunk), size), dtype=np.uint8)
                self._decrypt(number, rows.reshape(-1))
                out[places[here]] = rows[numbers[here] - number * chunk]

    def _range(self, chunk: int) -> tuple[int, int]:
        start = self._start + chunk * (self.head.chunk * self.head.record + _TAG)
        records = min(self.head.chunk, len(self) - chunk * self.head.chunk)
        return start, start + records * self.head.record + _TAG

    def _decrypt(self, chunk: int, into: NDArray[np.uint8]) -> None:
        start, end = self._range(chunk)
        sealed = bytearray(end - start)
        try:
            self._take(start, memoryview(sealed))
            self._cipher.decrypt_into(_nonce(chunk + 1), sealed, self._line, into.data)
        except InvalidTag:
            self.intact = False
            self.path.unlink(missing_ok=True)  # so that what was in it is prepared anew
            raise DamagedPack(self.path) from None
        except OSError as error:
            self.intact = False
            raise DamagedPack(self.path) from error

    def _take(self, start: int, into: memoryview) -> None:
        """Read bytes of the file; raises OSError, or InvalidTag where it ends before."""
        while into:
            taken = os.preadv(self._file, [into], start)
            if not taken:
                raise InvalidTag
            start, into = start + taken, into[taken:]


def is_pack(path: Path) -> bool:
    """True where a file begins as a pack does, under whichever key."""
    try:
        with path.open("rb") as file:
            Head.model_validate(parse_canonical(file.readline(HEAD_BYTES)[:-1]))
    except (OSError, PeerError, ValidationError):
        return False
    return True


def is_written_under(key: StoreKey, path: Path) -> bool:
    """True where a file is a whole pack under this key: its index is decrypted."""
    try:
        Pack(path, key, None)
    except (OSError, DamagedPack):
        return False
    return True


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE, "big")
