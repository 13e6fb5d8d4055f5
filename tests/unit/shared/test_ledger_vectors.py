"""The published test vectors: every ledger gets its verdict, step and line, and the files are the generator's."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from consilium_shared.errors import LedgerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import KINDS
from consilium_shared.ledger.verify import verify_ledger

FOLDER = Path(__file__).parents[2] / "vectors" / "ledger"
INDEX: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", INDEX, ids=lambda vector: vector["file"])
def test_a_vector_gets_its_verdict(vector: dict[str, Any]) -> None:
    data, key = (FOLDER / vector["file"]).read_bytes(), PublicIdentity.from_hex(vector["identity"])
    if vector["verdict"] == "good":
        assert (vector["step"], vector["line"]) == (None, None)
        assert len(verify_ledger(data, vector["site"], key).entries) == data.count(b"\n")
        return
    with pytest.raises(LedgerError) as caught:
        verify_ledger(data, vector["site"], key)
    assert (caught.value.step, caught.value.line) == (vector["step"], vector["line"]), str(caught.value)


def test_index_schema_and_ledgers_are_what_the_generator_writes(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "generate.py"))["write"](tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.suffix in (".json", ".jsonl")}
    assert sorted(written) == sorted(committed)
    for name, content in written.items():
        assert committed[name] == content, f"{name}: run tests/vectors/ledger/generate.py"


def test_every_step_and_every_kind_has_its_vector() -> None:
    assert {vector["step"] for vector in INDEX} == {None, *range(1, 9)}
    lines = [line for vector in INDEX if vector["step"] is None for line in (FOLDER / vector["file"]).open("rb")]
    assert {json.loads(line)["kind"] for line in lines} == set(KINDS)


def test_the_schema_has_every_kind_and_is_closed() -> None:
    schema = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    assert [each["properties"]["kind"]["const"] for each in schema["oneOf"]] == list(KINDS)
    objects = [*schema["oneOf"], *schema["$defs"].values()]
    assert all(each["additionalProperties"] is False for each in objects)
