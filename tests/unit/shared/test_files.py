"""Durable files: of a folder nothing is deleted but what a killed write left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium_shared.files import received_halves, remove_leftovers, write_atomically


def test_a_killed_writes_file_goes_and_every_other_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".snapshot").mkdir()
    stay = [tmp_path / name for name in (".gitignore", ".nfs000000000012", "state.json", ".a.b")]
    for file in stay:
        file.write_text("")
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: 1 / 0)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            write_atomically(tmp_path / "state.json", b"new")
    assert len(list(tmp_path.iterdir())) == len(stay) + 2
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {*stay, tmp_path / ".snapshot"}
    remove_leftovers(tmp_path / "nowhere")


def test_half_images_are_known_by_the_names_that_a_receiver_gives(tmp_path: Path) -> None:
    (tmp_path / "tmpfolder12.dcm").mkdir()
    half = tmp_path / "tmpab_3xy9z.dcm"
    for file in (half, tmp_path / "tmp.dcm", tmp_path / "tmpab_3xy9z.dcm.txt", tmp_path / "thesis.dcm"):
        file.write_bytes(b"")
    (tmp_path / "tmplinked_1.dcm").symlink_to(half)
    assert received_halves(tmp_path) == [half]
    assert received_halves(tmp_path / "nowhere") == []
