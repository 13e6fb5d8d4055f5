"""A site's doctor opens the data as a study would, and counts; test_doctor_faults.py has the table of faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilium_client.commands.checks import installation, resources
from consilium_client.data import columns, head
from consilium_client.site import Home
from consilium_shared.errors import DataError
from consilium_shared.findings import Finding

ASSET = "asset synthetic-table"
Change = Callable[[str, str], None]


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
    findings = [*installation.look(home), *resources.assets(home)]
    (finding,) = (each for each in findings if each.check == check)
    return finding


def test_the_patients_of_a_sound_site_are_counted(home: Home) -> None:
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


def test_a_budget_under_another_name_than_its_asset_is_said_on_both_sides(home: Home, change: Change) -> None:
    change("budgets: {synthetic-table:", "budgets: {synthetic-tabel:")
    finding = found(home, "site.yaml")
    assert finding.state == "warning"
    assert "give synthetic-table a budget" in finding.detail
    assert "synthetic-tabel, which is no asset" in finding.detail
