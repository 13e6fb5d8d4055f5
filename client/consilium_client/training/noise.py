"""Gaussian noise that nobody can predict or replay.

torch's own generators take a 32-bit seed on the CPU and stop at 5.8 standard deviations in float32. Here the bits are
a ChaCha20 key stream under a fresh 256-bit key for every draw, and the normal deviates come from 64-bit uniforms in
float64 (Box & Muller 1958), which reach 9.4 standard deviations.

Not covered: the gaps between floating-point numbers (Mironov 2012) are as in any floating-point mechanism.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_PIECE = 1 << 20
"""Deviates made at a time: bounds the temporary memory at about 40 MB."""


def standard_normal(count: int) -> npt.NDArray[np.float64]:
    """``count`` independent standard normal deviates: float64 ``[count]``."""
    found = np.empty(count, dtype=np.float64)
    for start in range(0, count, _PIECE):
        piece = found[start : start + _PIECE]
        piece[:] = _pairs((len(piece) + 1) // 2)[: len(piece)]
    return found


def _pairs(pairs: int) -> npt.NDArray[np.float64]:
    words = np.frombuffer(_key_stream(16 * pairs), dtype="<u8").astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[:pairs] + 1.0) * 2.0**-64))
    angle = words[pairs:] * (2.0 * np.pi * 2.0**-64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _key_stream(count: int) -> bytes:
    cipher = Cipher(algorithms.ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None)
    return cipher.encryptor().update(bytes(count))
