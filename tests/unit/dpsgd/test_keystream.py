"""The one source of everything random in a round."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dpsgd.keystream import KeyStream

SEED = bytes(range(32))


def test_the_words_are_aes_256_of_a_counter_under_a_key_derived_from_the_seed() -> None:
    """Computed another way: HKDF-Expand by its definition (RFC 5869, 2.3), and AES block by block."""
    mac = hmac.HMAC(SEED, hashes.SHA256())
    mac.update(b"consilium/1/round/noise" + b"\x01")
    block = Cipher(algorithms.AES256(mac.finalize()), modes.ECB()).encryptor()
    blocks = b"".join(block.update(counter.to_bytes(16)) for counter in range(70_000))
    assert KeyStream(SEED, "noise").words(140_000).tobytes() == blocks  # more than one piece of zeros


def test_words_do_not_depend_on_how_many_are_asked_for_at_a_time() -> None:
    whole, parts = KeyStream(SEED, "records").words(500), KeyStream(SEED, "records")
    assert np.array_equal(np.concatenate([parts.words(n) for n in (0, 1, 2, 97, 400)]), whole)


def test_seeds_and_purposes_share_no_word() -> None:
    other = bytes([*SEED[:31], SEED[31] ^ 1])
    streams = [KeyStream(s, p).words(1000) for s in (SEED, other) for p in ("sampling", "records", "noise")]
    assert len(np.unique(np.concatenate(streams))) == 6000


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33)])
def test_a_seed_of_another_length_is_refused(seed: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        KeyStream(seed, "noise")
