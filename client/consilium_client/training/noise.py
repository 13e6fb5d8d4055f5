"""Gaussian noise that nobody can predict.

torch's own generators take a 32-bit seed on the CPU and stop at 5.8 standard deviations in float32. Here the bits are
a ChaCha20 key stream under a 256-bit seed from the operating system, and the normal deviates come from 64-bit uniforms
in float64 (Box & Muller 1958), which reach 9.4 standard deviations.

Not covered: the gaps between floating-point numbers (Mironov 2012) are as in any floating-point mechanism.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_PIECE = 1 << 20
"""Deviates made at a time: bounds the temporary memory at about 40 MB."""


class Noise:
    """Independent deviates under one seed. The same seed gives the same deviates in the same order of calls."""

    def __init__(self, seed: bytes) -> None:
        """``seed``: 32 secret bytes, used for one round and never again (``attempts.py``)."""
        self._seed = seed
        self._keys = 0

    def standard_normal(self, count: int) -> npt.NDArray[np.float64]:
        """``count`` independent standard normal deviates: float64 ``[count]``."""
        found = np.empty(count, dtype=np.float64)
        for start in range(0, count, _PIECE):
            piece = found[start : start + _PIECE]
            pairs = (len(piece) + 1) // 2
            piece[:] = _normal(_key_stream(self._next_key(), 16 * pairs))[: len(piece)]
        return found

    def _next_key(self) -> bytes:
        """A key for one piece: a key stream is never continued, so its counter cannot run out (RFC 8439)."""
        self._keys += 1
        info = b"consilium/1/noise" + self._keys.to_bytes(8, "big")
        return HKDFExpand(hashes.SHA256(), 32, info).derive(self._seed)


def _normal(stream: bytes) -> npt.NDArray[np.float64]:
    """Two deviates from each 16 bytes."""
    words = np.frombuffer(stream, dtype="<u8").astype(np.float64)
    pairs = len(words) // 2
    radius = np.sqrt(-2.0 * np.log((words[:pairs] + 1.0) * 2.0**-64))
    angle = words[pairs:] * (2.0 * np.pi * 2.0**-64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _key_stream(key: bytes, count: int) -> bytes:
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
    return cipher.encryptor().update(bytes(count))
