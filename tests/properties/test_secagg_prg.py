"""Masks: AES-256 in counter mode whichever way it is computed, and nothing is left of a pair's two masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_shared.secagg import prg

KEYS = st.binary(min_size=32, max_size=32)
TILES = st.integers(0, 2**96 - 8)
DTYPES = st.sampled_from([np.uint16, np.uint32, np.uint64])
KINDS = pytest.mark.parametrize("kind", [prg.gcm, prg.ctr])


def stream(kind: Callable[[bytes], prg.Stream], key: bytes, tile: int, count: int) -> bytes:
    buffer = bytearray(prg.BUFFER)
    kind(key)(tile, count, memoryview(buffer))
    return bytes(buffer[:count])


def masked(vector: Any, plus: Sequence[bytes], minus: Sequence[bytes], first: int = 0) -> Any:
    found = vector.copy()
    prg.apply(found, plus, minus, first)
    return found


@settings(max_examples=50)
@given(KEYS, TILES, st.one_of(st.integers(1, 100), st.integers(prg.TILE - 20, prg.TILE)))
def test_zeros_under_gcm_and_counter_mode_are_the_same_stream(key: bytes, tile: int, count: int) -> None:
    assert stream(prg.gcm, key, tile, count) == stream(prg.ctr, key, tile, count)


F55_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
F55 = [  # counter block, output block
    ("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", "0bdf7df1591716335e9a8b15c860c502"),
    ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff00", "5a6e699d536119065433863c8f657b94"),
    ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff01", "1bc12c9c01610d5d0d8bd6a3378eca62"),
    ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff02", "2956e1c8693536b1bee99c73a31576b6"),
]
"""NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt)."""


@KINDS
def test_a_block_of_the_stream_is_aes_of_its_counter_as_published(kind: Callable[[bytes], prg.Stream]) -> None:
    aes = Cipher(algorithms.AES256(F55_KEY), modes.ECB()).encryptor()
    for counter, output in F55:
        assert aes.update(bytes.fromhex(counter)).hex() == output
    for tile in (0, 1, 2**64 + 5):
        blocks = b"".join(tile.to_bytes(12, "big") + (2 + i).to_bytes(4, "big") for i in range(prg.TILE // 16))
        assert stream(kind, F55_KEY, tile, prg.TILE) == aes.update(blocks)


@KINDS
def test_the_mask_is_the_stream_added_to_zeros(
    kind: Callable[[bytes], prg.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prg, "fastest", lambda: kind)
    key = bytes(range(32))
    mask = masked(np.zeros(70_000, np.uint32), [key], [])
    assert mask.tobytes() == stream(prg.ctr, key, 0, prg.TILE) + stream(prg.ctr, key, 1, 280_000 - prg.TILE)


@settings(max_examples=30, deadline=None)
@given(DTYPES, st.integers(0, 200_000), st.lists(KEYS, max_size=3), st.lists(KEYS, max_size=3), TILES)
def test_masks_cancel(dtype: type, size: int, plus: list[bytes], minus: list[bytes], first: int) -> None:
    vector = np.arange(size, dtype=dtype) * dtype(40_503)
    hidden = masked(vector, plus, minus, first)
    assert masked(hidden, minus, plus, first).tobytes() == vector.tobytes()


@given(KEYS, DTYPES)
def test_the_masks_of_a_pair_leave_the_sum_and_hide_each_vector(key: bytes, dtype: type) -> None:
    one: Any = np.full(64, 5, dtype)
    other: Any = np.full(64, 2**15, dtype)
    a, b = masked(one, [key], []), masked(other, [], [key])
    assert (a + b == one + other).all()
    assert (a != one).any() and (b != other).any()


@settings(max_examples=30, deadline=None)
@given(DTYPES, st.integers(1, 500_000), st.integers(1, 3), st.lists(KEYS, min_size=1, max_size=3), TILES)
def test_pieces_of_whole_tiles_are_masked_as_the_whole_is(
    dtype: type, size: int, tiles: int, keys: list[bytes], first: int
) -> None:
    vector: Any = np.zeros(size, dtype)
    whole = masked(vector, keys[:1], keys[1:], first)
    step = tiles * prg.TILE // vector.itemsize
    for i, start in enumerate(range(0, size, step)):
        prg.apply(vector[start : start + step], keys[:1], keys[1:], first + i * tiles)
    assert vector.tobytes() == whole.tobytes()


@given(KEYS)
def test_no_two_tiles_begin_alike(key: bytes) -> None:
    heads = {stream(prg.gcm, key, tile, 16) for tile in [*range(20), *(2**shift for shift in range(5, 96))]}
    assert len(heads) == 20 + 91


def test_what_a_mask_cannot_be_added_to_is_refused() -> None:
    key = bytes(32)
    fixed = np.zeros(4, np.uint32)
    fixed.flags.writeable = False
    wrong: Any
    for wrong in (
        np.zeros(4, np.int32),
        np.zeros(4, np.float32),
        np.zeros(4, ">u4"),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        fixed,
    ):
        with pytest.raises(ValueError):
            prg.apply(wrong, [key], [])
    vector = np.zeros(4, np.uint32)
    arguments: tuple[list[bytes], list[bytes], int]
    for arguments in (([b"short"], [], 0), ([], [bytes(33)], 0), ([], [], -1)):
        with pytest.raises(ValueError):
            prg.apply(vector, *arguments)
    assert not vector.any()
