"""Masks: AES-256 keystreams of single-use keys, added to a vector of ring elements where it lies.

Tile j of a key's stream is AES-256 in counter mode (NIST SP 800-38A, 6.5) from the counter block j ‖ 2, j in 96 bits
and 2 in 32. That is also how AES-256-GCM encrypts zeros under the nonce j (NIST SP 800-38D, 7.1: blocks count from
inc32(J0), and J0 is nonce ‖ 1). So both ways give the same mask, and each machine takes the one that it does faster:
with vector AES instructions GCM is more than twice as fast, although it computes a tag that nobody needs.

A tile has 2^14 blocks, so no counter reaches the next tile's. A key must not be used for two vectors: their difference
would be in the clear.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

TILE = 256 * 1024
"""Bytes: stream and vector of one tile lie in the second cache together."""

KEY_BYTES = 32
BUFFER = TILE + 16
"""Bytes that a stream may write: a tile, and GCM's tag."""

_ZEROS = memoryview(bytes(TILE))

Stream = Callable[[int, int, memoryview], None]
"""(tile, count, buffer): writes the first ``count`` bytes of a tile to the start of the buffer of ``BUFFER`` bytes."""


def gcm(key: bytes) -> Stream:
    """The stream of a key of 32 bytes as AES-256-GCM of zeros."""
    cipher = AESGCM(key)

    def fill(tile: int, count: int, buffer: memoryview) -> None:
        cipher.encrypt_into(tile.to_bytes(12, "big"), _ZEROS[:count], None, buffer[: count + 16])

    return fill


def ctr(key: bytes) -> Stream:
    """The stream of a key of 32 bytes as AES-256 in counter mode."""
    cipher = algorithms.AES256(key)

    def fill(tile: int, count: int, buffer: memoryview) -> None:
        counter = tile.to_bytes(12, "big") + (2).to_bytes(4, "big")
        Cipher(cipher, modes.CTR(counter)).encryptor().update_into(_ZEROS[:count], buffer[: count + 15])

    return fill


@cache
def fastest() -> Callable[[bytes], Stream]:
    """``gcm`` or ``ctr``: what this machine does faster, measured once, in about a millisecond."""
    buffer = memoryview(bytearray(BUFFER))

    def seconds(kind: Callable[[bytes], Stream]) -> float:
        fill = kind(bytes(KEY_BYTES))
        taken = []
        for tile in range(6):
            start = time.perf_counter()
            fill(tile, TILE, buffer)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return min((gcm, ctr), key=seconds)


def apply(
    vector: NDArray[np.unsignedinteger[Any]],
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    first_tile: int = 0,
) -> None:
    """Add the streams of the keys ``plus`` to ``vector`` and subtract those of ``minus``, in place, modulo its width.

    Args:
        vector: unsigned little-endian integers ``[k]``, contiguous and writable.
        plus: keys of 32 bytes.
        minus: keys of 32 bytes.
        first_tile: the tile at which the vector starts, so that a long vector can be masked in pieces: each but the
            last a multiple of ``TILE`` bytes.

    Raises:
        ValueError: another kind of vector, a key of another length, a negative tile.

    >>> vector = np.array([1, 2, 3], dtype="<u4")
    >>> apply(vector, plus=[bytes(32)], minus=[])
    >>> apply(vector, plus=[], minus=[bytes(32)])
    >>> vector.tolist()
    [1, 2, 3]
    """
    if vector.dtype.kind != "u" or vector.dtype.str.startswith(">") or vector.ndim != 1:
        raise ValueError("a mask is added to one vector of unsigned little-endian integers")
    if not (vector.flags.c_contiguous and vector.flags.writeable):
        raise ValueError("a mask is added to a vector that is contiguous and writable")
    if any(len(key) != KEY_BYTES for key in (*plus, *minus)):
        raise ValueError(f"the key of a mask has {KEY_BYTES} bytes")
    if first_tile < 0:
        raise ValueError("tiles count from 0")
    stream = fastest()
    steps = [(stream(key), np.add) for key in plus] + [(stream(key), np.subtract) for key in minus]
    width = TILE // vector.itemsize  # elements of a tile
    buffer = bytearray(BUFFER)
    octets, mask = memoryview(buffer), np.frombuffer(buffer, vector.dtype, width)
    for tile in range(-(-vector.size // width)):
        part = vector[tile * width : (tile + 1) * width]
        for fill, operation in steps:
            fill(first_tile + tile, part.nbytes, octets)
            operation(part, mask[: part.size], out=part)
