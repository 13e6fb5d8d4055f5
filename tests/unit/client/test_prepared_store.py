"""The prepared store deletes what it has made, and no file of anybody else, wherever its folder really lies."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from consilium_client.commands.cli import app
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.pack import write_pack
from consilium_client.prepared.store import UNUSED_DAYS, AssetFolder, PreparedStore, clear, held
from consilium_shared.errors import ConfigurationError

OURS, THEIRS = StoreKey(bytes(range(32))), StoreKey(bytes(32))
ABOUT = "ab" * 32


def kept(store: Path, key: StoreKey, asset: str = "xray", code: str = "now") -> Path:
    """The pack of a preparation in which there is one, beside a catalogue."""
    folder = AssetFolder(store / asset, key).preparation("image", code, ABOUT)
    file = folder / f"{key.name(str(folder))}.pack"
    write_pack(file, key, ABOUT, b"records")
    write_pack(store / asset / "catalogue", key, ABOUT, b"files")
    return file


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def foreign(tmp_path: Path) -> set[Path]:
    """Files of others in the folder of the store: a disk that was mounted there, or is shared."""
    store = tmp_path / "prepared"
    names = ["photos/1.jpg", "photos/catalogue", "photos/.settings", "xray/notes.txt", f"xray/image-{'0' * 32}/a.txt"]
    names += [f"photos/image-{'1' * 32}/{'2' * 32}/result.pack", "lost+found/x", "readme", "xray/.picture1"]
    for name in names:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("somebody else's")
        os.utime(store / name, (0, 0))
    return files(store)


def test_files_of_others_stay_whatever_the_agent_deletes(tmp_path: Path, foreign: set[Path]) -> None:
    store = tmp_path / "prepared"
    old, other = kept(store, OURS, code="older"), kept(store, THEIRS, "xray", "theirs")
    ours = kept(store, OURS)
    assert not old.exists() and ours.exists() and other.exists()
    os.utime(ours.parent, (0, time.time() - (UNUSED_DAYS + 1) * 86400))
    again = AssetFolder(store / "xray", OURS).preparation("image", "now", "another")
    assert not ours.exists()
    os.utime(again)
    gone = kept(store, OURS, "gone")
    PreparedStore(store, OURS).keep_only([])
    assert not gone.parent.exists() and other.exists() and foreign <= files(store)


def test_files_of_others_are_neither_counted_nor_deleted_by_a_person(tmp_path: Path, foreign: set[Path]) -> None:
    store = tmp_path / "prepared"
    kept(store, OURS)
    found = {each.asset: each.files for each in held(store)}
    assert found == {"photos": 0, "xray": 2}
    clear(store, [*found, "lost+found"])
    assert files(store) == foreign


def test_a_killed_writers_leftovers_go_with_the_rest(tmp_path: Path) -> None:
    file = kept(tmp_path, OURS)
    for name in (file.name, "catalogue", "facts"):
        half = file.with_name(f".{name}.abcd_123")
        half.write_bytes(b"half")
        os.utime(half, (0, 0))
    PreparedStore(tmp_path, OURS).keep_only([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", ["prepared", "prepared/xray"])
def test_a_linked_folder_is_no_store(tmp_path: Path, link: str) -> None:
    archive, store = tmp_path / "archive", tmp_path / "prepared"
    pack = kept(archive, OURS)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(archive if link == "prepared" else archive / "xray")
    with pytest.raises(ConfigurationError, match="is a link"):
        AssetFolder(store / "xray", OURS).preparation("image", "newer", ABOUT)
    if link == "prepared":
        with pytest.raises(ConfigurationError, match="is a link"):
            PreparedStore(store, OURS).keep_only([])
    else:
        PreparedStore(store, OURS).keep_only([])
    assert pack.exists()


def test_the_command_refuses_a_linked_store(tmp_path: Path) -> None:
    pack = kept(tmp_path / "archive", OURS)
    (tmp_path / "home" / "store").mkdir(parents=True)
    (tmp_path / "home" / "site.yaml").write_text("")
    (tmp_path / "home" / "store" / "prepared").symlink_to(tmp_path / "archive")
    done = CliRunner().invoke(app, ["data", "prepared", "--clear", "--home", str(tmp_path / "home")])
    assert isinstance(done.exception, ConfigurationError) and "is a link" in str(done.exception)
    assert pack.exists()
