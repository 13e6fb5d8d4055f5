"""The record of predictions: whole, in order, signed; old months go and the rest still verifies."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from consilium_serve.record import Record, entries
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import ConfigurationError, IntegrityError
from consilium_shared.identity import Identity

KEY = Identity.generate()


class Clock:
    def __init__(self, *date: int) -> None:
        self.now = datetime(*date, 12, tzinfo=UTC)  # type: ignore[misc,arg-type]

    def __call__(self) -> datetime:
        return self.now


def record(folder: Path, clock: Clock, days: int = 365) -> Record:
    return Record(folder, KEY, days, clock)


def filled(folder: Path) -> list[bytes]:
    made = record(folder, Clock(2026, 1, 5))
    for number in range(4):
        made.append("predictions", {"number": number})
    made.close()
    return (folder / "2026-01.jsonl").read_bytes().splitlines()


def test_entries_follow_each_other_over_months_and_restarts(tmp_path: Path) -> None:
    clock = Clock(2026, 1, 31)
    for month in (1, 2, 4):
        clock.now = datetime(2026, month, 28, tzinfo=UTC)
        made = record(tmp_path, clock)
        made.append("predictions", {"month": month})
        made.append("predictions", {"month": month})
        made.close()
    assert [e["body"]["month"] for e in entries(tmp_path, KEY.public)] == [1, 1, 2, 2, 4, 4]
    assert [e["seq"] for e in entries(tmp_path, KEY.public)] == list(range(1, 7))
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_time_never_goes_back(tmp_path: Path) -> None:
    clock = Clock(2026, 3, 5)
    made = record(tmp_path, clock)
    made.append("predictions", {})
    clock.now = datetime(2025, 1, 1, tzinfo=UTC)
    made.append("predictions", {})
    made.close()
    first, second = entries(tmp_path, KEY.public)
    assert first["time"] == second["time"]


def test_many_threads_give_one_chain(tmp_path: Path) -> None:
    made = record(tmp_path, Clock(2026, 1, 5))
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: made.append("predictions", {"n": n}), range(200)))
    made.close()
    assert sorted(numbers) == list(range(1, 201))
    assert sorted(e["body"]["n"] for e in entries(tmp_path, KEY.public)) == list(range(200))


@pytest.mark.parametrize("how", ["changed", "left out", "swapped", "another key", "spelt otherwise", "first left out"])
def test_no_entry_can_be_changed_or_left_out(tmp_path: Path, how: str) -> None:
    lines = filled(tmp_path)
    entry = json.loads(lines[2])
    if how == "changed":
        entry["body"]["number"] = 9
        lines[2] = canonical_bytes(entry)
    elif how == "another key":
        unsigned = {key: value for key, value in entry.items() if key != "sig"}
        entry["sig"] = Identity.generate().sign("prediction-record", canonical_bytes(unsigned)).hex()
        lines[2] = canonical_bytes(entry)
    elif how == "spelt otherwise":
        lines[2] = json.dumps(entry).encode()
    elif how == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        del lines[0 if how == "first left out" else 2]
    (tmp_path / "2026-01.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(IntegrityError):
        list(entries(tmp_path, KEY.public))
    if how != "first left out":
        with pytest.raises(IntegrityError):
            record(tmp_path, Clock(2026, 1, 6))


def test_a_line_that_a_crash_left_incomplete_is_cut_off_and_named(tmp_path: Path) -> None:
    filled(tmp_path)
    file = tmp_path / "2026-01.jsonl"
    file.write_bytes(file.read_bytes() + b'{"body":{"numb')
    made = record(tmp_path, Clock(2026, 1, 6))
    made.append("predictions", {"number": 4})
    made.close()
    found = list(entries(tmp_path, KEY.public))
    assert [e["kind"] for e in found[-2:]] == ["recovered", "predictions"]
    assert found[-2]["body"] == {"bytes": 14}


def test_months_beyond_the_retention_go_and_the_rest_verifies(tmp_path: Path) -> None:
    clock = Clock(2026, 1, 5)
    made = record(tmp_path, clock, days=60)
    for month in range(1, 7):
        clock.now = datetime(2026, month, 15, tzinfo=UTC)
        made.append("predictions", {"month": month})
    made.close()
    assert sorted(file.stem for file in tmp_path.glob("*.jsonl")) == ["2026-04", "2026-05", "2026-06"]
    found = list(entries(tmp_path, KEY.public))
    assert {e["body"]["month"] for e in found if e["kind"] == "retired"} >= {"2026-03"}
    (tmp_path / "2026-04.jsonl").unlink()
    with pytest.raises(IntegrityError, match="beginning is missing"):
        list(entries(tmp_path, KEY.public))


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    made = record(tmp_path, Clock(2026, 1, 5))
    with pytest.raises(ConfigurationError, match="another process"):
        record(tmp_path, Clock(2026, 1, 5))
    made.close()
    record(tmp_path, Clock(2026, 1, 5)).close()
