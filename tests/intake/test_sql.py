"""Tables of a database become the same records as plain tables, by what site.yaml says alone, and are only read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
import yaml
from tests.intake import layouts, postgres
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import TimeseriesAsset
from consilium_client.intake.database import opened
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.sql import Imported, import_tables
from consilium_client.intake.sql_settings import SqlExport
from consilium_shared.errors import ConfigurationError, DataError, TransportError

SAMPLE = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "config" / "site.databases.yaml").read_text())
STAYS = layouts.stays()
STUDY = studies.study(
    "gru",
    {
        "asset": "icu",
        "label": {"column": "died", "classes": ["0", "1"]},
        "series": {
            "variables": [
                {"name": "heart_rate", "center": 80, "scale": 10},
                {"name": "glucose", "center": 120, "scale": 40},
            ],
            "bins": 8,
            "step_minutes": 30,
            "statics": [{"name": "age", "center": 50, "scale": 10}],
        },
    },
)


def export(name: str, folder: Path, **source: Any) -> SqlExport:
    """An export of the sample site.yaml, whose paths are a test's."""
    declared = {**SAMPLE["intake"]["sql"][name], "to": str(folder / "records.parquet")}
    declared["samples_to"] = str(folder / "samples.parquet")
    declared["source"] = source or {**declared["source"], "path": str(folder / "export")}
    return SqlExport.model_validate_json(json.dumps(declared))


def taken(name: str, folder: Path, declared: SqlExport) -> tuple[Imported, list[np.ndarray[Any, Any]]]:
    """What was imported, and a study's arrays of it beside those of the plain tables: they are the same."""
    names = Pseudonyms(folder / "home", 30)
    done = import_tables(declared, names)
    found = STAYS
    if name == "eicu":  # its patients have longer identifiers
        found = [layouts.Stay(**{**vars(stay), "patient": f"p-{stay.patient}"}) for stay in STAYS]
    layouts.plain(folder, found, names)
    spec = {"kind": "timeseries", "table": "table.csv", "series": "samples.csv", "record": "record"}
    wanted = load(TimeseriesAsset.model_validate(spec, strict=False).at(folder), STUDY)
    spec = {**SAMPLE["assets"][name], "table": "records.parquet", "series": "samples.parquet"}
    got = load(TimeseriesAsset.model_validate(spec, strict=False).at(folder), STUDY)
    assert got.patients.tolist() == wanted.patients.tolist()
    for one, other in zip(
        (*got.inputs, *got.labels, got.train), (*wanted.inputs, *wanted.labels, wanted.train), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert got.report.set_aside.counts == {}
    return done, list(got.inputs)


@pytest.mark.parametrize("name", ["mimic", "eicu", "aumc"])
def test_a_layout_loads_by_configuration_alone(name: str, tmp_path: Path) -> None:
    getattr(layouts, name)(tmp_path / "export", STAYS)
    done, _ = taken(name, tmp_path, export(name, tmp_path))
    assert (done.patients, done.records) == (24, 32)
    assert done.samples == sum(len(stay.samples) for stay in STAYS)
    if name == "mimic":  # the minor's sample, the empty one, and those of labs that belong to the other stay
        assert done.aside["sample of no record"] == 1
        assert done.aside["heart_rate: no value"] == 1
        assert done.aside["sample outside its record's start and end"] == 16


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Server]:
    with postgres.server() as running:
        running.fill(layouts.OMOP, layouts.omop(STAYS))
        yield running


def from_server(folder: Path, port: int, password: str = "secret of the reader", **more: Any) -> dict[str, Any]:
    (folder / "password").write_text(password + "\n")
    return {
        **{"kind": "postgresql", "host": "127.0.0.1", "port": port, "database": "postgres", "user": "reader"},
        **{"password": str(folder / "password"), "schema": "cdm", **more},
    }


def check_omop(tmp_path: Path, source: dict[str, Any]) -> Imported:
    done, _ = taken("omop", tmp_path, export("omop", tmp_path, **source))
    assert (done.patients, done.records) == (24, 32)
    assert done.samples == sum(len(stay.samples) for stay in STAYS)
    return done


def test_omop_in_a_folder_loads_by_concepts_with_outcomes_after_the_index_date(tmp_path: Path) -> None:
    for name, rows in layouts.omop(STAYS).items():
        layouts.write(tmp_path / "export" / f"{name}.csv", list(layouts.OMOP[name]), rows)
    check_omop(tmp_path, {"kind": "folder", "path": str(tmp_path / "export")})


needs_server = pytest.mark.parametrize("where", ["server"] if postgres.PROGRAMS else [])
"""Debian's PostgreSQL, where it is installed; what the statements say is tested without it, too."""


@needs_server
def test_omop_in_postgresql_is_the_same_and_nothing_is_written(
    where: str, tmp_path: Path, database: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.admin() as admin:
        before = admin.execute("SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables").fetchone()
    source = from_server(tmp_path, database.port)
    check_omop(tmp_path, source)
    with database.admin() as admin:
        after = admin.execute("SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables").fetchone()
    assert after == before
    declared = export("omop", tmp_path, **source).source
    with opened(declared) as (rows, _), pytest.raises(DataError, match="25006"):  # read_only_sql_transaction
        list(rows(sa.text("SELECT nextval('cdm.numbers')")))
    monkeypatch.setattr("consilium_client.intake.database.BATCH", 10)  # through a cursor of the server's
    with opened(declared) as (rows, there):
        sizes = [len(batch) for batch in rows(sa.select(sa.text("1")).select_from(there.table("measurement")))]
    assert sizes[:-1] == [10] * (len(sizes) - 1)
    assert len(sizes) > 10


@needs_server
@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"password": "no such word"}, TransportError, "password authentication failed"),
        ({"schema": "cdn"}, ConfigurationError, 'relation "cdn.person" does not exist: no such table'),
        ({"port": 1}, TransportError, "cannot connect to 127.0.0.1:1"),
        ({"schema": "pg_catalog"}, ConfigurationError, "no such table"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_without_password_or_row(
    where: str, change: dict[str, Any], kind: Any, says: str, tmp_path: Path, database: postgres.Server
) -> None:
    wrong = {"port": database.port, **change}
    port, password = wrong.pop("port"), wrong.pop("password", "secret of the reader")
    declared = export("omop", tmp_path, **from_server(tmp_path, port, password, **wrong))
    with pytest.raises(kind, match=says) as caught:
        import_tables(declared, Pseudonyms(tmp_path / "home", 30))
    assert password not in str(caught.value)
    assert not (tmp_path / "records.parquet").exists()
    assert not list(tmp_path.glob(".*.parquet.*"))


@needs_server
def test_a_statement_that_takes_too_long_is_ended_and_an_error_quotes_no_row(
    where: str, tmp_path: Path, database: postgres.Server
) -> None:
    declared = export("omop", tmp_path, **from_server(tmp_path, database.port, timeout=1)).source
    with opened(declared) as (rows, _), pytest.raises(TransportError, match="longer than timeout"):
        list(rows(sa.text("SELECT pg_sleep(20)")))
    with opened(declared) as (rows, _), pytest.raises(DataError, match="22P02") as caught:
        list(rows(sa.text("SELECT CAST('a name of somebody' AS int)")))
    assert "somebody" not in str(caught.value)


def test_a_password_of_the_environment_must_be_there_and_a_far_server_has_tls(tmp_path: Path) -> None:
    source = {**from_server(tmp_path, 1), "password": None, "password_env": "NO_SUCH_WORD"}
    with pytest.raises(ConfigurationError, match="the environment has no NO_SUCH_WORD"):
        import_tables(export("omop", tmp_path, **source), Pseudonyms(tmp_path / "home", 30))
    with pytest.raises(ValueError, match="tls: name the file of the CA"):
        export("omop", tmp_path, **{**source, "host": "db.hospital"})


# -- faults of a folder


@pytest.mark.parametrize(
    ("file", "content", "kind", "says"),
    [
        ("icu/chartevents.csv", None, ConfigurationError, "no file chartevents.csv"),
        ("lab/icustays.csv", "stay_id\n", ConfigurationError, "several files of the table icustays"),
        ("icu/icustays.csv", "subject_id,hadm_id,stay_id,intime\n1,5,3,2020\n", ConfigurationError, "outtime"),
        ("icu/chartevents.csv", 'stay_id,charttime,itemid\n1,"2,3\n1,2,3\n', DataError, "line 2"),
        ("hosp/admissions.csv", "subject_id,hadm_id,hospital_expire_flag\n7,7,0\n", DataError, "no row is a record"),
    ],
)  # fmt: skip
def test_a_fault_of_a_folder_names_the_table_and_leaves_nothing(
    file: str, content: str | None, kind: Any, says: str, tmp_path: Path
) -> None:
    layouts.mimic(tmp_path / "export", STAYS)
    path = tmp_path / "export" / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(kind, match=says):
        import_tables(export("mimic", tmp_path), Pseudonyms(tmp_path / "home", 30))
    assert not list(tmp_path.glob("*.parquet")) + list(tmp_path.glob(".*.parquet.*"))


def test_a_record_in_rows_that_differ_is_set_aside_and_a_unit_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    rows = [("p1", 1, 50, 0), ("p1", 1, 51, 0), ("p2", 2, 60, 1), ("p2", 2, 60, 1), ("nan", 3, 60, 1)]
    layouts.write(tmp_path / "export" / "patient.csv", ["uniquepid", "patientunitstayid", "age", "died"], rows)
    vital = [(2, 5, 80.0, "/min"), (2, 6, 1.0, "Hz"), (2, 7, 70.0, "bpm"), (1, 5, 60.0, "/min"), (2, 8, 999.0, "/min")]
    names = ["stay", "at", "rate", "unit", "it"]
    layouts.write(tmp_path / "export" / "vital.csv", names, [(*row, "x") for row in vital])
    records = {"patient": "uniquepid", "record": "patientunitstayid", "columns": {"age": "age"}}
    samples = {"record": "stay", "time": "at", "time_unit": "minutes", "item": "it", "value": "rate", "unit": "unit"}
    declared = SqlExport.model_validate(
        {
            "source": {"kind": "folder", "path": tmp_path / "export"},
            "to": tmp_path / "records.parquet",
            "samples_to": tmp_path / "samples.parquet",
            "records": {"table": "patient", **records},
            "samples": [{"table": "vital", **samples, "items": {"heart_rate": ["x"]}}],
            "variables": {"heart_rate": {"unit": "/min", "high": 300}},
        }
    )
    done = import_tables(declared, Pseudonyms(tmp_path / "home", 30))
    assert (done.patients, done.records, done.samples) == (1, 1, 2)  # 80 and 1 Hz, which is 60
    values = pd.read_parquet(tmp_path / "samples.parquet")["value"].tolist()
    assert values == pytest.approx([80.0, 60.0])
    assert done.aside == {
        "record whose patient is a word for nothing (such as nan, NULL or unknown), where an identifier is meant": 1,
        "record without a patient": 1,
        "record that stands in several rows with different values": 2,
        "sample of no record": 1,
        "heart_rate: unit 'bpm', which is none of UCUM's that this program knows": 1,
        "heart_rate: outside low … high": 1,
    }


def test_the_command_makes_the_tables_and_says_what_was_left_out(site: Any) -> None:
    layouts.eicu(site.root / "export", STAYS)
    declared = {**SAMPLE["intake"]["sql"]["eicu"], "source": {"kind": "folder", "path": "export"}}
    site.settings["sql"] = {"icu": {**declared, "to": "records.parquet", "samples_to": "samples.parquet"}}
    done = site.run("import-sql")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("icu: 24 patients, 32 records, 224 samples")
    assert (site.root / "records.parquet").stat().st_mode & 0o077 == 0
