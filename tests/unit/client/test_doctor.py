"""What would stop a site is found by its doctor, with what to do; what would not is no error."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.commands import doctor
from consilium_client.commands.doctor import Finding, examine
from consilium_client.commands.enroll import STARTER
from consilium_client.data import columns, head, lines
from consilium_client.site import Home
from consilium_shared.errors import DataError

ASSET = "asset synthetic-table"
Change = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server and no namespaces here."""
    monkeypatch.setattr(doctor, "_reach", lambda _: "not asked")
    monkeypatch.setattr(doctor, "_ahead", lambda _: 0.0)
    monkeypatch.setattr(doctor, "takes", lambda *_: True)
    monkeypatch.setattr(doctor, "without_network", lambda: True)


@pytest.fixture
def home(coordinator: Any) -> Home:
    found: Home = coordinator.site
    return found


@pytest.fixture
def change(home: Home) -> Change:
    def replace(old: str, new: str) -> None:
        text = home.config_file.read_text()
        assert old in text
        home.config_file.write_text(text.replace(old, new))

    return replace


def found(home: Home, check: str) -> Finding:
    (finding,) = (each for each in examine(home) if each.check == check)
    return finding


def test_a_sound_site_is_all_ok_and_its_patients_are_counted(home: Home) -> None:
    assert {each.state for each in examine(home)} == {"ok"}
    assert found(home, ASSET).detail.endswith("synthetic.csv: 80 patients")
    assert found(home, "site.yaml").detail == "1 asset, 1 budget"


def test_a_ledger_that_was_there_once_and_is_gone_is_an_error(home: Home, site: Any) -> None:
    site.service.close()
    assert found(home, "ledger").state == "ok"
    home.ledger.unlink()
    gone = found(home, "ledger")
    assert gone.state == "error"
    assert "missing, although this site had a ledger" in gone.detail
    assert "restore it from the backup" in gone.detail


def test_a_file_that_this_account_may_not_open_is_an_error(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(lines, "_chunks", forbidden)
    finding = found(home, ASSET)
    assert (finding.state, finding.detail.split(": ")[-1]) == ("error", "Permission denied")


def test_a_folder_where_a_table_is_meant_is_an_error(home: Home) -> None:
    table = home.root / "synthetic.csv"
    table.unlink()
    assert "not there" in found(home, ASSET).detail
    table.mkdir()
    assert found(home, ASSET).state == "error"
    assert "is a folder, where a table is meant" in found(home, ASSET).detail


@pytest.mark.parametrize(
    ("named", "missing"),
    [("columns: {chol: cholesterin}", "cholesterin"), ("patient: mrn", "mrn"), ("record: visit", "visit")],
)
def test_a_column_that_site_yaml_names_and_the_table_lacks_is_an_error(
    home: Home, change: Change, named: str, missing: str
) -> None:
    change("synthetic.csv}", f"synthetic.csv, {named}}}")
    finding = found(home, ASSET)
    assert finding.state == "error"
    assert f"no column {missing!r}" in finding.detail


def test_the_names_in_a_table_are_told_where_its_first_line_is_a_header_and_else_not(tmp_path: Path) -> None:
    file = tmp_path / "synthetic.csv"
    file.write_text("patient,age,chol\nP1,50,200\n")
    with pytest.raises(
        DataError, match=r"no column 'sex', 'thalach'; the table's other columns are 'chol'\. .*columns:"
    ):
        columns.read_columns(file, ["patient", "sex"], ["age", "thalach"])
    file.write_text("Synthetic Name,1950-01-01,positive\n")
    with pytest.raises(DataError, match="is the first line the header") as error:
        columns.read_columns(file, ["patient", "age"])
    assert "Synthetic" not in str(error.value)


def test_samples_and_labels_of_time_series_and_the_first_image_are_opened(tmp_path: Path) -> None:
    from consilium_client.data.asset import DicomAsset, TimeseriesAsset

    series, table, images = tmp_path / "synthetic-s.csv", tmp_path / "synthetic-l.csv", tmp_path / "images"
    series.write_text("patient,time,HR\na,1,60\n")
    table.write_text("patient,label\na,yes\nb,no\n")
    wide = TimeseriesAsset(kind="timeseries", series=series, table=table, layout="wide", columns={"pulse": "HR"})
    assert head.look(wide) == 2
    with pytest.raises(DataError, match="has a column 'RR'"):
        head.look(wide.model_copy(update={"columns": {"rate": "RR"}}))
    with pytest.raises(DataError, match="no column 'variable', 'value'"):
        head.look(wide.model_copy(update={"layout": "long"}))
    dicom = DicomAsset(kind="dicom", path=images, table=table)
    with pytest.raises(DataError, match="is not a folder"):
        head.look(dicom)
    (images / "below").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no file"):
        head.look(dicom)
    (images / "below" / "image").write_bytes(b"synthetic")
    assert head.look(dicom) == 2
    with pytest.raises(DataError, match="no column 'image'"):
        head.look(dicom.model_copy(update={"file": "image"}))


@pytest.mark.parametrize(("epsilon", "state"), [("5.0", "error"), ("unlimited", "warning")])
def test_a_delta_that_promises_these_patients_nothing_is_said(
    home: Home, change: Change, epsilon: str, state: str
) -> None:
    change("epsilon: 5.0, delta: 1.0e-3", f"epsilon: {epsilon}, delta: 0.1")
    finding = found(home, ASSET)
    assert finding.state == state
    assert "delta = 0.1 is too large for 80 patients" in finding.detail


@pytest.mark.parametrize(("free", "state"), [(0, "error"), (2**20, "error"), (2**30, "warning"), (2**33, "ok")])
def test_a_disk_without_room_is_an_error(home: Home, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    usage = shutil.disk_usage(home.root)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert found(home, "disk").state == state


def test_a_site_yaml_as_enrolling_wrote_it_says_what_to_fill_in(home: Home) -> None:
    home.config_file.write_text(STARTER.format(site="hospital-a"))
    finding = found(home, "site.yaml")
    assert finding.state == "warning"
    assert "name under assets: what data there is" in finding.detail
    assert "policy.budgets, with epsilon and delta" in finding.detail


def test_a_budget_under_another_name_than_its_asset_is_said_on_both_sides(home: Home, change: Change) -> None:
    change("budgets: {synthetic-table:", "budgets: {synthetic-tabel:")
    finding = found(home, "site.yaml")
    assert finding.state == "warning"
    assert "give synthetic-table a budget" in finding.detail
    assert "synthetic-tabel, which is no asset" in finding.detail


def another(file: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (Path.unlink, "cannot read .*supernode.key: No such file"),
        (lambda file: file.write_bytes(b"-"), "damaged"),
        (another, "another key than this site joined with"),
    ],
)
def test_a_lost_damaged_or_other_key_of_the_supernode_is_an_error(
    home: Home, happens: Callable[[Path], Any], words: str
) -> None:
    happens(home.keys / "supernode.key")
    finding = found(home, "SuperNode key")
    assert finding.state == "error"
    assert re.search(words, finding.detail)
    assert "restore keys/ from the backup" in finding.detail
