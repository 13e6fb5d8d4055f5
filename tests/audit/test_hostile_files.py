"""No file that an auditor is handed can hold the program up, fill its memory, or lead it out of the folder."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilium_audit import cli, handed
from consilium_audit.evidence import VerificationFailed, read_ledger
from consilium_audit.report import make_report
from consilium_audit.verify import Verification
from consilium_shared.errors import ConfigurationError, LedgerError, PeerError
from consilium_shared.ledger.entry import LINE_BYTES
from consilium_shared.limits import FILE_BYTES

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""


def a_socket(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # the name of a socket has at most some hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


def a_giant(place: Path) -> None:
    with place.open("wb") as out:
        out.truncate(1 << 40)  # a hole: read, it would be a tebibyte


def a_link_to_the_same(place: Path) -> None:
    """What it leads to would verify."""
    place.symlink_to(place.with_name(f"{place.name}.kept"))


THINGS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a folder": Path.mkdir,
    "a link": lambda place: place.symlink_to("/dev/zero"),
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
    "a link to the same": a_link_to_the_same,
    "larger than": a_giant,
}
FILES = (
    "coordinator.json",
    "roster.json",
    "contract.json",
    "rounds/0002.json",
    "rounds/0004.json",
    "closing/north.json",
    "north.jsonl",
    "north/ledger.jsonl",
    "card.json",
    "model.safetensors",
)


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", FILES)
def test_no_file_is_read_that_is_no_ordinary_one_and_it_is_named(evidence: Evidence, name: str, thing: str) -> None:
    file = evidence.root / name
    if name == "north/ledger.jsonl":
        file.parent.mkdir()
        evidence.ledger("north").rename(file)
    if file.exists():
        file.rename(file.with_name(f".{file.name}"))
    THINGS[thing](file)
    with pytest.raises(VerificationFailed) as caught:
        Verification(evidence.root).run()
    assert caught.value.file == file
    assert caught.value.why.startswith(("not an ordinary file, but " + thing.removesuffix(" to nothing")[:6], thing))


@pytest.mark.parametrize("name", ["rounds", "closing", "north"])
def test_no_folder_is_gone_into_that_is_a_link(evidence: Evidence, name: str) -> None:
    folder = evidence.root / name
    if name == "north":
        folder.mkdir()
        evidence.ledger("north").rename(folder / "ledger.jsonl")
    folder.rename(evidence.root.parent / "elsewhere")
    folder.symlink_to(evidence.root.parent / "elsewhere", target_is_directory=True)
    with pytest.raises(VerificationFailed, match="a link: put the f") as caught:
        Verification(evidence.root).run()
    assert caught.value.file == folder
    made = make_report(evidence.root)
    assert made.failure is not None and made.failure.file == name
    if name != "closing":
        assert name in made.left_out


@pytest.mark.parametrize("name", ["rounds", "closing"])
def test_no_fifo_passes_for_a_folder(evidence: Evidence, name: str) -> None:
    shutil.rmtree(evidence.root / name)
    os.mkfifo(evidence.root / name)
    with pytest.raises(VerificationFailed, match="not a folder") as caught:
        Verification(evidence.root).run()
    assert caught.value.file == evidence.root / name


def test_a_report_is_made_beside_hostile_files_and_says_which_it_leaves_out(evidence: Evidence) -> None:
    hostile = ("rounds/0002.json", "closing/north.json", "north.jsonl", "card.json", "model.safetensors")
    things: list[Callable[[Path], None]] = [os.mkfifo, a_socket, a_giant, THINGS["a link"], a_giant]
    for name, thing in zip(hostile, things, strict=True):
        (evidence.root / name).unlink(missing_ok=True)
        thing(evidence.root / name)
    made = make_report(evidence.root)
    assert made.state == "does not verify" and set(made.left_out) == set(hostile)
    assert [site.site for site in made.sites] == ["south", "west"] and made.rounds == 2
    shown = {file.name for file in made.files}
    assert not shown & set(hostile) and any(name.startswith("2 files: sha256sum rounds/") for name in shown)


@pytest.mark.parametrize("thing", ["a FIFO", "a socket", "a folder", "a link", "larger than"])
def test_neither_is_a_single_ledger(tmp_path: Path, evidence: Evidence, thing: str) -> None:
    THINGS[thing](tmp_path / "north.jsonl")
    key = evidence.sites["north"].public.hex()
    with pytest.raises(ConfigurationError, match=thing):
        cli._account_of_ledger(tmp_path / "north.jsonl", key, "north")


def test_a_single_ledger_may_be_larger_than_other_files(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed.read_file, "__defaults__", (100,))
    key = evidence.sites["north"].public.hex()
    assert cli._account_of_ledger(evidence.ledger("north"), key, None).entries > 20


def test_a_ledger_is_given_up_at_its_first_wrong_line_whatever_follows(evidence: Evidence) -> None:
    """A gigabyte of what no site signed is never in memory."""
    file, key = evidence.ledger("north"), evidence.sites["north"].public
    whole = len(file.read_bytes().splitlines())
    with file.open("ab") as out:
        out.truncate(200 * 1024**2)
    with pytest.raises(LedgerError, match=f"more than {LINE_BYTES} bytes") as caught:
        read_ledger(file, "north", key)
    assert caught.value.line == whole + 1


def test_an_ordinary_file_is_read_to_its_bound(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x" * FILE_BYTES)
    assert handed.read_file(good) == b"x" * FILE_BYTES
    with pytest.raises(PeerError, match=f"larger than {FILE_BYTES - 1} bytes"):
        handed.read_file(good, FILE_BYTES - 1)
    for device in (Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(PeerError, match="a device"):
            handed.read_file(device)


def test_a_folder_of_endless_names_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed, "MOST_FILES", 3)
    for number in range(3):
        (tmp_path / f"{number}").touch()
    assert handed.names_in(tmp_path) == ["0", "1", "2"]
    (tmp_path / "3").touch()
    with pytest.raises(PeerError, match="more than 3 files"):
        handed.names_in(tmp_path)
