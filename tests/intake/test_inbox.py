"""The inbox puts in order what a killed program left, and leaves alone what others keep in its folder."""

from __future__ import annotations

from pathlib import Path

from consilium_client.intake.inbox import Inbox, digest_of
from consilium_client.intake.settings import Limits


def test_only_its_own_half_files_go(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path, Limits())
    digest = digest_of("1.2.3")
    mine = [inbox.arriving / "tmpab_3xy9z.dcm", inbox.path(digest)]
    elsewhere = tmp_path / ("00" if digest[:2] != "00" else "01") / f"{digest}.dcm"
    others = [inbox.arriving / "thesis.dcm", inbox.arriving / "tmp" / "a", tmp_path / "ab" / "IM0001.dcm", elsewhere]
    for file in (*mine, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image")
    with inbox.writing():
        assert [file.exists() for file in mine] == [False, False]
        assert all(file.exists() for file in others)
