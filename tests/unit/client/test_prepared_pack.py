"""The file format of the prepared store: what is read is what was written, or nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.pack import CHUNK_BYTES, DamagedPack, Pack, write_pack
from consilium_shared.errors import ConfigurationError, IntegrityError

KEY = StoreKey(bytes(range(32)))
ABOUT = "ab" * 32
VECTOR = Path(__file__).parents[2] / "vectors" / "prepared" / "version-1.pack"


def rows(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count * size).integers(0, 256, (count, size), dtype=np.uint8)


def taken(pack: Pack, numbers: np.ndarray) -> np.ndarray:
    out = np.zeros((len(numbers), pack.head.record), dtype=np.uint8)
    pack.read(numbers, out, np.arange(len(numbers)))
    return out


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 8), (1, 1), (700, 56), (5, CHUNK_BYTES - 1), (4, CHUNK_BYTES), (3, 5 * CHUNK_BYTES + 7)],
)
def test_records_come_back_in_any_order_and_again(tmp_path: Path, count: int, size: int) -> None:
    records = rows(count, size)
    write_pack(tmp_path / "pack", KEY, ABOUT, b"what they are", records)
    pack = Pack(tmp_path / "pack", KEY, ABOUT)
    assert pack.index == b"what they are" and len(pack) == count
    wanted = np.random.default_rng(0).integers(0, max(count, 1), 2 * count)
    assert np.array_equal(taken(pack, wanted), records[wanted])


def test_records_go_to_the_places_they_are_wanted_at_and_nowhere_else(tmp_path: Path) -> None:
    records = rows(9, 100)
    write_pack(tmp_path / "pack", KEY, ABOUT, b"", records)
    out = np.zeros((6, 100), dtype=np.uint8)
    Pack(tmp_path / "pack", KEY, ABOUT).read(np.array([8, 2]), out, np.array([5, 1]))
    assert np.array_equal(out[[5, 1]], records[[8, 2]])
    assert not out[[0, 2, 3, 4]].any()


def test_only_the_account_reads_it_and_it_says_nothing_in_clear(tmp_path: Path) -> None:
    records = np.tile(np.frombuffer(b"patient 4711 ", dtype=np.uint8), (3000, 4))
    write_pack(tmp_path / "pack", KEY, ABOUT, b"patient 4711", records)
    assert stat.S_IMODE((tmp_path / "pack").stat().st_mode) == 0o600
    written = (tmp_path / "pack").read_bytes()
    assert b"4711" not in written and b"patient" not in written
    write_pack(tmp_path / "again", KEY, ABOUT, b"patient 4711", records)
    body = written.index(b"\n") + 1
    assert written[body:] != (tmp_path / "again").read_bytes()[body:], "a key was used twice"


@pytest.mark.parametrize("where", ["head", "index", "first chunk", "last byte"])
def test_a_changed_bit_is_noticed(tmp_path: Path, where: str) -> None:
    file = tmp_path / "pack"
    write_pack(file, KEY, ABOUT, b"index", rows(3, CHUNK_BYTES))
    content = bytearray(file.read_bytes())
    body = content.index(b"\n") + 1
    at = {"head": 20, "index": body, "first chunk": body + 5 + 16, "last byte": len(content) - 1}[where]
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedPack):
        taken(Pack(file, KEY, ABOUT), np.arange(3))


def test_a_pack_that_turns_out_damaged_says_so(tmp_path: Path) -> None:
    file = tmp_path / "pack"
    write_pack(file, KEY, ABOUT, b"index", rows(3, CHUNK_BYTES))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    pack = Pack(file, KEY, ABOUT)
    assert taken(pack, np.array([0, 1])).any() and pack.intact
    with pytest.raises(DamagedPack):
        taken(pack, np.array([2]))
    assert not pack.intact


def test_chunks_cannot_be_moved_left_out_or_taken_from_another_file(tmp_path: Path) -> None:
    records = rows(4, CHUNK_BYTES)
    write_pack(tmp_path / "one", KEY, ABOUT, b"index", records)
    write_pack(tmp_path / "two", KEY, ABOUT, b"index", records)
    one, two = (tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes()
    start, step = one.index(b"\n") + 1 + 5 + 16, CHUNK_BYTES + 16
    swapped = one[:start] + one[start + step : start + 2 * step] + one[start : start + step] + one[start + 2 * step :]
    for content in (swapped, one[:-step], one + one[-step:], one[:-step] + two[-step:], one[:-1], b"", b"{}\n"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DamagedPack):
            taken(Pack(tmp_path / "bad", KEY, ABOUT), np.arange(4))


def test_a_pack_is_read_under_its_own_key_and_as_what_it_is_about_alone(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", KEY, ABOUT, b"index", rows(2, 10))
    for key, about in ((StoreKey(bytes(32)), ABOUT), (KEY, "cd" * 32)):
        with pytest.raises(DamagedPack):
            Pack(tmp_path / "pack", key, about)


def test_a_deleted_pack_is_read_to_its_end(tmp_path: Path) -> None:
    records = rows(5, CHUNK_BYTES)
    write_pack(tmp_path / "pack", KEY, ABOUT, b"", records)
    pack = Pack(tmp_path / "pack", KEY, ABOUT)
    (tmp_path / "pack").unlink()
    assert np.array_equal(taken(pack, np.arange(5)), records)


def test_a_pack_of_the_release_that_brought_the_format_is_read() -> None:
    pack = Pack(VECTOR, KEY, ABOUT)
    assert pack.index == b'{"records":["first","second"]}'
    assert taken(pack, np.array([1, 0])).tolist() == [[9, 8, 7, 6], [1, 2, 3, 4]]


def test_a_key_is_made_once_and_is_for_this_account_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "store.key"
    made = StoreKey.at(file)
    assert StoreKey.at(file).name("x") == made.name("x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() not in repr(made)
    file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        StoreKey.at(file)
    file.chmod(0o600)
    file.write_text("none")
    with pytest.raises(IntegrityError, match="prepared anew"):
        StoreKey.at(file)


def test_a_pack_that_is_cut_off_under_its_reader_or_cannot_be_read_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pack"
    write_pack(file, KEY, ABOUT, b"index", rows(3, CHUNK_BYTES))
    cut, failing = Pack(file, KEY, ABOUT), Pack(file, KEY, ABOUT)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(os, "preadv", fail)
        with pytest.raises(DamagedPack):
            taken(failing, np.arange(3))
    assert file.exists() and not failing.intact
    os.truncate(file, len(file.read_bytes()) // 2)
    with pytest.raises(DamagedPack):
        taken(cut, np.arange(3))
    assert not cut.intact
    with pytest.raises((DamagedPack, FileNotFoundError)):
        Pack(file, KEY, ABOUT)


def test_a_pack_gives_its_file_back(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", KEY, ABOUT, b"index", rows(3, 10))
    pack = Pack(tmp_path / "pack", KEY, ABOUT)
    held = pack._file
    del pack
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)
