"""Two homes over the same files are not served at the same time on one machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from consilium_client.site import Home
from consilium_client.state.data_claims import Claims
from consilium_shared.errors import ConfigurationError


def test_a_second_home_over_the_same_files_is_refused_until_the_first_ends(coordinator: Any, tmp_path: Path) -> None:
    home = coordinator.site
    other = Home(tmp_path / "other")
    other.root.mkdir()
    table = home.root / "synthetic.csv"
    other.config_file.write_text(home.config_file.read_text().replace("path: synthetic.csv", f"path: {table}"))
    shutil.copy(home.invitation_file, other.invitation_file)
    claims = Claims(home.config(), home.root)
    with pytest.raises(ConfigurationError, match=r"asset 'synthetic-table': .*two federations.* stop one of them"):
        Claims(other.config(), other.root)
    claims.release()
    again = Claims(other.config(), other.root)
    again.release()


def test_files_that_are_not_there_and_folders_are_no_hindrance(coordinator: Any) -> None:
    home = coordinator.site
    table = home.root / "synthetic.csv"
    table.unlink()
    Claims(home.config(), home.root).release()
    table.mkdir()
    claims = Claims(home.config(), home.root)
    with pytest.raises(ConfigurationError, match="is held by another program"):
        Claims(home.config(), home.root)
    claims.release()
