"""No file that an auditor is handed can hold the program up, and no record may tell the counts of too few."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from consilium_audit.evidence import read_file
from consilium_audit.records import _check_metrics
from consilium_shared.errors import PeerError
from consilium_shared.limits import FILE_BYTES


def test_a_file_is_read_only_when_it_is_an_ordinary_one_of_bounded_size(tmp_path: Path) -> None:
    good, pipe, link, huge = (tmp_path / name for name in ("good", "pipe", "link", "huge"))
    good.write_bytes(b"{}")
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with huge.open("wb") as out:
        out.truncate(1 << 40)  # a hole: read, it would be a tebibyte
    assert read_file(good) == b"{}"
    for bad in (pipe, huge, tmp_path, Path("/dev/zero")):
        with pytest.raises(PeerError, match=f"ordinary|{FILE_BYTES}"):
            read_file(bad)
    with pytest.raises(OSError, match="symbolic"):
        read_file(link)


@pytest.mark.parametrize(("sites", "refused"), [(1, True), (2, False), (3, False), (4, True)])
def test_metrics_of_fewer_sites_than_the_contract_wants_are_refused(sites: int, refused: bool) -> None:
    if refused:
        with pytest.raises(PeerError, match=f"of {sites} sites"):
            _check_metrics({"auroc": 0.8, "sites": sites}, 2, 3, "its metrics")
    else:
        _check_metrics({"auroc": 0.8, "sites": sites}, 2, 3, "its metrics")
