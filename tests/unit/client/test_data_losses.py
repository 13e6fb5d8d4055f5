"""Nothing of a table is lost in silence: its lines are held against its rows, and every bound has a reason."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.data import bounds, lines
from consilium_client.data.columns import header, read_columns
from consilium_client.data.report import SetAside
from consilium_shared.errors import DataError

ROWS = 400


def csv(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def people(notes: dict[int, str], columns: int = 4) -> str:
    """Rows of ``columns`` columns, one of them free text that the study does not read."""
    rest = "," + ",".join("x" * (columns - 3)) if columns > 3 else ""
    rows = (f"p{n},{n % 90},{notes.get(n, 'well')}{rest}" for n in range(ROWS))
    return "patient,age,note" + (",more" if columns > 3 else "") + "\n" + "\n".join(rows) + "\n"


@pytest.mark.parametrize("at", [0, 1, ROWS // 2, ROWS - 1])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_quotation_mark_that_nothing_closes_is_an_error_at_its_line(tmp_path: Path, at: int, ending: str) -> None:
    path = csv(tmp_path, people({at: '"fell'}).replace("\n", ending))
    with pytest.raises(DataError) as error:
        read_columns(path, ["patient"], ["age"])
    assert f"t.csv, line {at + 2}: a quotation mark opens a field here, and nothing closes it" in str(error.value)
    assert f"{ROWS - 1 - at} lines follow" in str(error.value)
    assert "fell" not in str(error.value)


@pytest.mark.parametrize("second", ['"dizzy', 'dizzy"'])
def test_two_stray_marks_do_not_swallow_the_rows_between(tmp_path: Path, second: str) -> None:
    path = csv(tmp_path, people({5: '"fell', 300: second}))
    with pytest.raises(DataError, match="line 7: a quotation mark opens a field here that ends in line 302") as error:
        read_columns(path, ["patient"], ["age"])
    assert "would swallow 295 lines" in str(error.value)
    assert "fell" not in str(error.value)


def test_a_few_lines_that_all_look_like_rows_are_rows(tmp_path: Path) -> None:
    """Whether a mark was stray shows where each line has as many commas as a row; prose has not."""
    path = csv(tmp_path, 'patient,age,note\na,1,"began\nb,2,well\nc,3,over"\nd,4,well\n')
    with pytest.raises(DataError, match=r"line 2: .* ends in line 4, and each has 3 fields, as a row has"):
        read_columns(path, ["patient"])
    csv(tmp_path, 'patient,age,note\na,1,"began\nin June, and then, at last, ended\nc,3,over"\nd,4,well\n')
    assert len(read_columns(path, ["patient"])) == 2


def test_a_table_tells_how_far_it_is_read(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for name in ("t.csv", "t.csv.gz"):
        text = people(dict.fromkeys(range(ROWS), "long " * 2000)).encode()
        path = csv(tmp_path, gzip.compress(text, 0) if name.endswith("gz") else text, name)
        seen.clear()
        read_columns(path, ["patient"], on_progress=lambda done, total: seen.append((done, total)))
        assert len(seen) > 2
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {path.stat().st_size} == {seen[-1][0]}


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_without_a_row_says_so(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"patient": pa.array([], pa.string())}), tmp_path / name)
    else:
        csv(tmp_path, "patient,age\n")
    with pytest.raises(DataError, match="no row"):
        read_columns(tmp_path / name, ["patient"])


def test_a_note_of_several_lines_is_read_and_its_lines_are_counted(tmp_path: Path) -> None:
    notes = SetAside()
    path = csv(tmp_path, people({3: '"fell,\non the stairs,\n\nsays ""ouch"""', 9: '5" tall', 10: '""'}))
    frame = read_columns(path, ["patient", "note"], ["age"], notes)
    assert len(frame) == ROWS
    assert frame["note"].iloc[3] == 'fell,\non the stairs,\n\nsays "ouch"'
    assert notes.counts == {"t.csv: line inside a quoted field, no row of its own": 3}
    assert notes.first == {"t.csv: line inside a quoted field, no row of its own": "t.csv, line 5"}


def test_each_row_knows_its_line_behind_empty_lines_and_lines_in_quotes(tmp_path: Path) -> None:
    path = csv(tmp_path, b'\xef\xbb\xbf\npatient,age\n\na,1\n"b\nb",2\r\n\r\n\nc,3\nd,4\n')
    assert read_columns(path, ["patient"], ["age"]).index.tolist() == [4, 5, 9, 10]
    csv(tmp_path, 'patient,age\n\n"b\nb",2\nc\n')
    with pytest.raises(DataError, match="line 5: 1 fields where the header has 2"):
        read_columns(path, ["patient"], ["age"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(['"', ",", "\n", "\r", "x", "\r\n", '""', ',"', '",']), max_size=24))
def test_lines_make_the_rows_that_the_parser_makes_or_the_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    path = csv(tmp_path_factory.getbasetemp(), "a,b\n" + "".join(parts))
    try:
        frame = read_columns(path, ["a", "b"])
    except DataError:
        return
    table = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True))
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    assert len(frame) == table.num_rows
    assert list(frame.index) == sorted(set(frame.index))
    assert all(text[line - 1] for line in frame.index)  # no row begins on an empty line


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.csv.gz"])
def test_a_row_longer_than_a_parsers_block_is_read(tmp_path: Path, name: str) -> None:
    text = people({0: "short", 7: "long " * 700_000}).encode()
    path = csv(tmp_path, gzip.compress(text, 1) if name.endswith("gz") else text, name)
    assert len(read_columns(path, ["patient"], ["age"])) == ROWS
    assert header(path) == ["patient", "age", "note", "more"]


def test_a_row_longer_than_any_person_writes_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "ROW_BYTES", 2**20)
    for note in ("x" * 2**21, '"' + "x,\n" * 2**19 + '"'):
        with pytest.raises(DataError, match=r"t\.csv, line 9: .*longer than 1 MiB"):
            read_columns(csv(tmp_path, people({7: note})), ["patient"])


def test_a_table_that_unpacks_to_far_more_than_its_size_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_FREELY", 2**20)
    bomb = csv(tmp_path, gzip.compress(b"patient,age\n" + b"1,2\n" * 2**21), "t.csv.gz")
    monkeypatch.setattr(pacsv, "read_csv", None)
    with pytest.raises(DataError, match="MiB of text, more than 100 times the file; where that is right, unpack it"):
        read_columns(bomb, ["patient"])


@pytest.mark.parametrize(
    ("bound", "says"), [("TABLE_ROWS", "more than 9 rows"), ("TABLE_COLUMNS", "4 columns, more than 3")]
)
def test_rows_and_columns_are_bounded_in_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, says: str
) -> None:
    monkeypatch.setattr(bounds, bound, 9 if bound == "TABLE_ROWS" else 3)
    with pytest.raises(DataError, match=says):
        read_columns(csv(tmp_path, people({})), ["patient"])


def test_a_parquet_file_is_bounded_by_what_it_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary says a long text once, and a run of rows in a few bytes."""
    path = tmp_path / "t.parquet"
    words = pa.array(["x" * 2**16] * 2**12)
    pq.write_table(pa.table({"patient": words, "age": pa.array(np.zeros(len(words)))}), path)
    assert path.stat().st_size < 2**18
    assert len(read_columns(path, ["patient"], ["age"])) == len(words)
    monkeypatch.setattr(bounds, "TABLE_BYTES", 2**27)
    with pytest.raises(DataError, match="more than 128 MiB once unpacked"):
        read_columns(path, ["patient"], ["age"])
    assert len(read_columns(path, [], ["age"])) == len(words)
    monkeypatch.setattr(bounds, "TABLE_ROWS", 2**12 - 1)
    with pytest.raises(DataError, match="4096 rows, more than 4095"):
        read_columns(path, [], ["age"])
    monkeypatch.setattr(bounds, "TABLE_COLUMNS", 1)
    with pytest.raises(DataError, match="2 columns, more than 1"):
        header(path)


@pytest.mark.parametrize(
    "value", [[1.0, 2.0], {"SECRET": 1}, [["SECRET"]], [("SECRET", 1)]], ids=["list", "struct", "lists", "map"]
)
def test_a_column_that_holds_several_values_a_row_is_named_with_its_type(tmp_path: Path, value: object) -> None:
    kind = pa.map_(pa.string(), pa.int64()) if isinstance(value, list) and isinstance(value[0], tuple) else None
    pq.write_table(pa.table({"patient": ["SECRET"], "age": pa.array([value], kind)}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'age' is of type (list|struct|map)<.*>, where one value is meant"):
        read_columns(tmp_path / "t.parquet", ["patient"], ["age"])
    assert read_columns(tmp_path / "t.parquet", ["patient"])["patient"].tolist() == ["SECRET"]


GZIPPED = gzip.compress(b"patient,age\nSECRET,1\n", mtime=0)  # no time in it: each worker must name the test alike


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("patient;age\nSECRET;1\n", "t.csv", "semicolons stand between the names"),
        ("patient\tage\nSECRET\t1\n", "t.csv", "tabs stand between the names"),
        ("patient,age\nSECRET,1\n".encode("utf-16"), "t.csv", "UTF-16 text; export it as UTF-8"),
        (GZIPPED, "t.csv", "compressed with gzip; its name must end in .csv.gz"),
        (b"patient,age\nSECRET,1\n", "t.csv.gz", "no gzip file, damaged or cut off"),
        (GZIPPED[:-9], "t.csv.gz", "no gzip file, damaged or cut off"),
        (b"PK\x03\x04SECRET", "t.csv", "a zip file or an Excel workbook"),
        (b"\0" * 10_000, "t.csv", "it begins with zero bytes"),
        (b"PAR1SECRET", "t.csv", "a Parquet file; its name must end in .parquet"),
        (b"patient,age\nSECRET,1\n", "t.parquet", "no Parquet file, damaged or cut off"),
        (b"\xe4,age\nSECRET,1\n", "t.csv", "no header in UTF-8"),
        (b"\n\n", "t.csv", "an empty file"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(
    tmp_path: Path, content: str | bytes, name: str, says: str
) -> None:
    path = csv(tmp_path, content, name)
    for read in (lambda: read_columns(path, ["patient"], ["age"]), lambda: header(path)):
        with pytest.raises(DataError) as error:
            read()
        assert says in str(error.value)
        assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str) -> None:
    """A reader of a named pipe waits until somebody writes into it."""
    path = tmp_path / name
    os.mkfifo(path)
    for read in (lambda: read_columns(path, ["patient"]), lambda: header(path)):
        with pytest.raises(DataError, match="is a named pipe, where a table is meant"):
            read()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device, where a table is meant"):
        header(path)


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv(tmp_path, people({}))
    before = lines.read_lines(path)
    csv(tmp_path, people({}) + "late,1,well,x\n")
    monkeypatch.setattr("consilium_client.data.columns.read_lines", lambda *_: before)
    with pytest.raises(DataError, match=f"its lines make {ROWS} rows, and {ROWS + 1} were read"):
        read_columns(path, ["patient"])
