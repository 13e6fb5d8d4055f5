"""Contracts of every release: what was approved is read for ever under its digest, and nothing is added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest

from consilium_shared import task
from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.config import Strict, load_yaml
from consilium_shared.errors import ConfigurationError, PeerError, VersionError
from consilium_shared.schema import SCHEMA, Since, later_keys, written_out
from consilium_shared.study import Study

VECTORS = Path(__file__).parents[2] / "vectors" / "contracts"
DIGESTS: dict[str, dict[str, str]] = json.loads((VECTORS / "digests.json").read_text())
SAMPLE = task.studies()["demo-xray"] / "study.yaml"


def released(name: str) -> dict[str, Any]:
    """A contract as release 0.1 wrote it."""
    contract: dict[str, Any] = parse_canonical((VECTORS / name).read_bytes())
    return contract


@pytest.mark.parametrize("name", DIGESTS)
def test_a_contract_of_release_0_1_is_read_under_its_digest(name: str) -> None:
    study = Study.from_contract(released(name))
    assert study.digest == DIGESTS[name]["digest"]
    assert canonical_bytes(study.contract) == (VECTORS / name).read_bytes()
    assert study.schema_version == 1


@pytest.mark.parametrize("name", DIGESTS)
def test_a_study_written_in_schema_1_is_what_release_0_1_would_have_written(name: str) -> None:
    study = Study.model_validate({**released(name), "schema_version": 1})
    assert study.digest == DIGESTS[name]["digest"]


@pytest.mark.parametrize("name", DIGESTS)
def test_a_contract_keeps_its_digest_with_a_default_and_without(name: str) -> None:
    """Absent means the default, but what is digested is what was written."""
    whole = released(name)
    less = {key: value for key, value in whole.items() if key not in ("evaluation", "version")}
    less["training"] = {key: value for key, value in whole["training"].items() if key != "proximal"}
    study = Study.from_contract(less)
    assert study.contract == less
    assert study.digest == digest(canonical_bytes(less)) != Study.from_contract(whole).digest
    assert Study.from_contract(study.contract) == study


def test_a_study_of_a_file_says_every_key_of_the_newest_schema() -> None:
    study = load_yaml(SAMPLE, Study)
    assert study.schema_version == study.contract["schema_version"] == SCHEMA
    assert study.contract == study.model_dump(mode="json")
    assert Study.from_contract(study.contract) == study


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("study",), "Demo Vitals"),
        (("version",), "1"),
        (("training", "rounds"), "3"),
        (("training", "unheard_of"), 1),
        (("data", "image", "unheard_of"), 1),
        (("data", "label", "classes"), {"a": 1, "b": 2}),
        (("privacy", "epsilon"), "4"),
        (("aggregation", "optimizer"), None),
    ],
)
def test_a_contract_with_an_unknown_key_or_another_spelling_is_refused(path: tuple[Any, ...], value: Any) -> None:
    contract = load_yaml(SAMPLE, Study).contract
    where: Any = contract
    for part in path[:-1]:
        where = where[part]
    where[path[-1]] = value
    with pytest.raises(PeerError, match="study: "):
        Study.from_contract(contract)


def test_a_contract_of_a_schema_to_come_is_refused_by_its_number() -> None:
    contract = {**load_yaml(SAMPLE, Study).contract, "schema_version": SCHEMA + 1, "unheard_of": 1}
    with pytest.raises(VersionError, match=rf"schema {SCHEMA + 1}; its reader knows schemas 1 to {SCHEMA}: upgrade"):
        Study.from_contract(contract)


def test_a_contract_of_schema_1_has_no_later_key() -> None:
    with pytest.raises(PeerError, match="schema_version is a key of schema 2, the contract is of 1"):
        Study.from_contract({**released("demo-vitals-study.json"), "schema_version": 1})


def test_a_file_may_ask_for_schema_1_if_it_has_no_later_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(SAMPLE.read_text() + "schema_version: 1\n")
    with pytest.raises(ConfigurationError, match=r"schema_version: 1 has no evaluation\.split_label"):
        load_yaml(file, Study)
    file.write_text(SAMPLE.read_text().replace(" split_label: demo-xray,", "") + "schema_version: 1\n")
    assert "schema_version" not in load_yaml(file, Study).contract
    file.write_text(SAMPLE.read_text() + f"schema_version: {SCHEMA + 1}\n")
    with pytest.raises(ConfigurationError, match="schema_version"):
        load_yaml(file, Study)


# -- the rules of schema.py, on a contract of two releases


class Part(Strict):
    old: int = 1
    marked: Annotated[int, Since(2)] = 0
    fresh: Annotated[str, Since(3, fresh="new ways")] = "old ways"


class Whole(Strict):
    one: Part = Part()
    several: tuple[Part, ...] = ()
    either: Part | int = 0


def test_a_new_study_says_the_new_ways_and_an_absent_key_means_the_old_ones() -> None:
    given = Whole.model_validate({"several": [{}, {"fresh": "old ways"}], "either": {"old": 5}})
    assert given.one.fresh == "old ways"
    assert written_out(given, 1) == {"one": {"old": 1}, "several": [{"old": 1}, {"old": 1}], "either": {"old": 5}}
    assert written_out(given, 3) == {
        "one": {"old": 1, "marked": 0, "fresh": "new ways"},
        "several": [
            {"old": 1, "marked": 0, "fresh": "new ways"},
            {"old": 1, "marked": 0, "fresh": "old ways"},
        ],
        "either": {"old": 5, "marked": 0, "fresh": "new ways"},
    }


def test_a_key_of_a_later_schema_is_found_wherever_it_stands() -> None:
    given = Whole.model_validate({"one": {"old": 2}, "several": [{"marked": 0}], "either": {"fresh": "old ways"}})
    assert dict(later_keys(given, 1)) == {"several.marked": 2, "either.fresh": 3}
    assert dict(later_keys(given, 2)) == {"either.fresh": 3}
    assert not dict(later_keys(given, 3))
