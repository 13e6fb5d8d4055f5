"""The ledger on the disk: one writer, whole lines, recovery by rule."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from consilium_client.state.ledger_file import LedgerFile, read_ledger
from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.identity import Identity
from consilium_shared.ledger.entry import Recover
from consilium_shared.ledger.verify import verify_ledger

SITE = Identity.generate()
POLICY = {"digest": "1" * 64, "reason": "yearly review"}


def _open(folder: Path) -> LedgerFile:
    return LedgerFile(folder / "ledger.jsonl", "north", SITE)


def _begin(folder: Path, entries: int = 2) -> bytes:
    with _open(folder) as ledger:
        for _ in range(entries):
            ledger.append("policy", POLICY)
    return (folder / "ledger.jsonl").read_bytes()


def test_entries_are_there_after_closing_and_the_chain_goes_on(tmp_path: Path) -> None:
    _begin(tmp_path)
    with _open(tmp_path) as ledger:
        assert len(ledger.entries) == 2 and ledger.recovered is None
        entry = ledger.append("policy", POLICY)
        assert entry.seq == ledger.head.seq == 3
    verified = read_ledger(tmp_path / "ledger.jsonl", "north", SITE.public)
    assert verified.entries[-1] == entry
    assert stat.S_IMODE((tmp_path / "ledger.jsonl").stat().st_mode) == 0o600


def test_an_append_returns_only_after_the_whole_line_was_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _open(tmp_path) as ledger:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        for _ in range(2):
            ledger.append("policy", POLICY)
            assert synced[-1] == ledger.path.stat().st_size
        assert len(synced) == 2


def test_a_torn_last_line_is_recovered_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a thousand of them, and no power will fail here
    data = _begin(tmp_path)
    first = data.index(b"\n") + 1
    for cut in range(first + 1, len(data)):
        torn = data[first:cut]
        (tmp_path / "ledger.jsonl").write_bytes(data[:cut])
        with _open(tmp_path) as ledger:
            assert ledger.recovered is not None
            assert ledger.recovered.body == Recover(sha256=hashlib.sha256(torn).hexdigest(), bytes=len(torn))
            assert ledger.append("policy", POLICY).seq == 3
        after = (tmp_path / "ledger.jsonl").read_bytes()
        assert after.startswith(data[:first])
        assert [entry.kind for entry in verify_ledger(after, "north", SITE.public).entries] == [
            "policy",
            "recover",
            "policy",
        ]


def test_a_crash_in_the_middle_of_recovery_is_recovered_as_the_first_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _begin(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(data[:-5])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _no_space)
        with pytest.raises(ConfigurationError, match="No space"):
            _open(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == data[:-5]
    with _open(tmp_path) as ledger:
        assert [entry.kind for entry in ledger.entries] == ["policy", "recover"]


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("old", "new"), [(b"yearly", b"weekly"), (b"}\n", b"}\n{}\n"), (b"}\n", b"}\n\n")])
def test_a_complete_but_wrong_line_is_never_recovered(tmp_path: Path, old: bytes, new: bytes) -> None:
    wrong = _begin(tmp_path).replace(old, new, 1)
    (tmp_path / "ledger.jsonl").write_bytes(wrong)
    with pytest.raises(LedgerError, match=r"line \d+: step \d.*restore the file from the backup") as caught:
        _open(tmp_path)
    assert caught.value.line is not None
    assert (tmp_path / "ledger.jsonl").read_bytes() == wrong


def test_a_ledger_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    _begin(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="restore it from the backup"):
        _open(tmp_path)


def test_only_one_process_writes(tmp_path: Path) -> None:
    with _open(tmp_path):
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
            _open(tmp_path)
        code = (
            "import sys; from pathlib import Path; from consilium_shared.process.process_lock import ProcessLock\n"
            "from consilium_shared.errors import ConfigurationError\n"
            "try: ProcessLock(Path(sys.argv[1]))\n"
            "except ConfigurationError: sys.exit(7)"
        )
        child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ledger.jsonl.lock")], check=False)
        assert child.returncode == 7
    _open(tmp_path).close()


def test_nothing_is_written_of_an_entry_that_does_not_fit(tmp_path: Path) -> None:
    before = _begin(tmp_path)
    with _open(tmp_path) as ledger:
        for kind, fields in (("discount", {}), ("policy", {}), ("settle", {"charge_seq": 1, "steps": 0})):
            with pytest.raises(LedgerError):
                ledger.append(kind, fields)
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        assert ledger.append("policy", POLICY).seq == 3


def test_after_a_failed_write_nothing_more_is_written_and_a_restart_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _begin(tmp_path)
    with _open(tmp_path) as ledger:
        real = os.write

        def full(fd: int, data: bytes) -> int:
            monkeypatch.setattr(os, "write", _no_space)
            return real(fd, bytes(data[:10]))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LedgerError, match="No space"):
            ledger.append("policy", POLICY)
        monkeypatch.setattr(os, "write", real)
        with pytest.raises(LedgerError, match="restart"):
            ledger.append("policy", POLICY)
        with pytest.raises(LedgerError, match="restart"):
            _ = ledger.head
    assert len((tmp_path / "ledger.jsonl").read_bytes()) == len(before) + 10
    with _open(tmp_path) as ledger:
        assert ledger.recovered is not None and len(ledger.entries) == 3


def test_a_file_that_somebody_else_changed_is_not_written_to(tmp_path: Path) -> None:
    with _open(tmp_path) as ledger:
        ledger.append("policy", POLICY)
        with (tmp_path / "ledger.jsonl").open("ab") as file:
            file.write(b"x")
        with pytest.raises(LedgerError, match="changed by another program"):
            ledger.append("policy", POLICY)


def test_a_clock_that_goes_back_does_not_make_the_ledger_go_back(tmp_path: Path) -> None:
    years = iter([2030, 2026])
    with LedgerFile(tmp_path / "l", "north", SITE, clock=lambda: datetime(next(years), 1, 1, tzinfo=UTC)) as ledger:
        first, second = ledger.append("policy", POLICY), ledger.append("policy", POLICY)
    assert first.time == second.time == "2030-01-01T00:00:00.000Z"


def test_threads_take_turns(tmp_path: Path) -> None:
    with _open(tmp_path) as ledger:
        threads = [
            threading.Thread(target=lambda: [ledger.append("policy", POLICY) for _ in range(10)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert read_ledger(tmp_path / "ledger.jsonl", "north", SITE.public).head.seq == 40


def test_a_reader_beside_the_writer_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    data = _begin(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(data[:-3])
    assert read_ledger(tmp_path / "ledger.jsonl", "north", SITE.public).head.seq == 1
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_ledger(tmp_path / "none", "north", SITE.public)
