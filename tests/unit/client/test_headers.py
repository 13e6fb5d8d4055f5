"""Headers are read once: a later start takes what the store has of them, for files that did not change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest

from consilium_client.commands import baseline
from consilium_client.data import headers
from consilium_client.data.headers import Headers
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.store import PreparedStore, held
from consilium_client.site import Home
from consilium_client.site_config import SiteConfig
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.preparation.foreign import HEADER, SCANNER, Unusable, read_header

OLD = 1_600_000_000


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return PreparedStore(tmp_path / "store", StoreKey(bytes(range(32)))).asset("xray")


def radiograph(path: Path, patient: str) -> Path:
    write_radiograph(path, np.zeros((8, 9)), patient, patient, Scanner(8))
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilium_client.prepared.catalogue._SETTLED_NS", -(10**12))  # new files are kept, too


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose headers were read."""
    found: list[Path] = []

    def reading(path: Path) -> Any:
        found.append(path)
        return read_header(path)

    monkeypatch.setattr(headers, "read_header", reading)
    return found


def start(store: Any, *paths: Path) -> list[str]:
    """One start: the patients of the files."""
    made = Headers(store)
    patients = [str(made.read(path).get("PatientID")) for path in paths]
    made.save()
    return patients


@pytest.mark.usefixtures("settled")
def test_a_header_is_read_again_only_where_its_file_changed(store: Any, tmp_path: Path, read: list[Path]) -> None:
    one, other = (radiograph(tmp_path / f"{name}.dcm", name) for name in ("a", "b"))
    assert start(store, one, other) == ["a", "b"]
    assert start(store, one, other) == ["a", "b"]
    assert read == [one, other]
    radiograph(other, "c")  # of the same size and time; the inode's own time tells
    assert start(store, one, other) == ["a", "c"]
    assert read == [one, other, other]
    assert start(store, other) == ["c"]
    assert start(store, one, other) == ["a", "c"]  # what a start had no use for is not kept
    assert read == [one, other, other, one]


def test_a_file_that_was_only_just_written_is_read_again(store: Any, tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "a.dcm"
    write_radiograph(path, np.zeros((8, 9)), "a", "a", Scanner(8))
    assert start(store, path) == start(store, path) == ["a"]
    assert read == [path, path]


@pytest.mark.usefixtures("settled")
def test_another_key_or_a_damaged_file_costs_time_alone_and_nothing_stands_there_readable(
    store: Any, tmp_path: Path, read: list[Path]
) -> None:
    path = radiograph(tmp_path / "a.dcm", "PAT-0815")
    start(store, path)
    assert b"0815" not in store.facts.read_bytes() and b"a.dcm" not in store.facts.read_bytes()
    assert store.facts.stat().st_mode & 0o077 == 0
    assert [each.files for each in held(store.path.parent)] == [1]
    store.facts.write_bytes(store.facts.read_bytes()[:-1] + b"x")
    assert start(store, path) == ["PAT-0815"]
    assert start(PreparedStore(store.path.parent, StoreKey(bytes(32))).asset("xray"), path) == ["PAT-0815"]
    assert len(read) == 3


@pytest.mark.usefixtures("settled")
def test_what_is_kept_says_of_every_tag_what_the_header_says(store: Any, read: list[Path]) -> None:
    paths = sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))[::2]
    told = 0
    for _ in range(2):
        made = Headers(store)
        for path in paths:
            try:
                wanted = read_header(path)
            except Unusable:
                continue
            found = made.read(path)
            for tag in [*HEADER, *SCANNER]:
                one, other = value(wanted, tag), value(found, tag)
                assert one == other, (path.name, tag)
                told += one is not None
        made.save()
    assert told > 300
    assert len(read) < 1.2 * len(paths)


def value(header: Any, tag: str) -> Any:
    """Value of a tag as those see it who ask for it."""
    try:
        found = header.get(tag)
    except Exception:
        return "broken"
    return [str(each) for each in found] if hasattr(found, "append") else found


def test_the_commands_use_the_store_where_they_run_as_the_agents_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, config = Home(tmp_path), SiteConfig.model_validate({"site": "a", "policy": {"budgets": {}}})
    assert baseline._store(home, config, "xray") is None  # not enrolled: nothing is made
    home.keys.mkdir()
    folder = baseline._store(home, config, "xray")
    assert folder is not None and folder.path == home.prepared / "xray"
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert baseline._store(home, config, "xray") is None
